package custodian

import (
	"encoding/hex"
	"iter"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	cedar "github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/ast"
	"github.com/cedar-policy/cedar-go/types"
	cedarast "github.com/cedar-policy/cedar-go/x/exp/ast"
)

// Authority is evaluated by Cedar and by nothing else: each grant is compiled
// into a permit, and the forbids of rules are added. What no permit allows is
// refused, and so is what a forbid forbids, or a rule fails on.
//
// The permits depend on caller, action and category alone, so their answers are
// kept (authority.known) for as long as the policy, with the rules whose scope
// is about the three. Rules depend on the key, the token and the time, and are
// evaluated for each decision.

// Types of entities. A question that names no category is about everything.
const (
	typeCaller   types.EntityType = "Custodian::Caller"
	typeAction   types.EntityType = "Custodian::Action"
	typeCategory types.EntityType = "Custodian::Category"
	typeKey      types.EntityType = "Custodian::Key"
)

var everything = types.NewEntityUID("Custodian::Daemon", "everything")

// authority is the compiled form of a policy's grants and rules. The nil
// authority permits nothing.
type authority struct {
	permits map[string][]compiled // by identity
	rules   []compiled            // forbids

	known   kept[question, *answer]
	keys    kept[KID, *keyFacts]
	viewers kept[Viewer, types.Record]
}

// kept are values that are dear to make, up to maxKept of them for as long as
// the policy. Beyond it they are made anew each time.
type kept[K comparable, V any] struct {
	values sync.Map
	count  atomic.Int64
}

const maxKept = 1 << 14

func (k *kept[K, V]) get(key K) (value V, ok bool) {
	v, ok := k.values.Load(key)
	if !ok {
		return value, false
	}
	return v.(V), true
}

func (k *kept[K, V]) put(key K, value V) {
	if k.count.Load() >= maxKept { // it may be passed by as many as put at once
		return
	}
	if _, there := k.values.Swap(key, value); !there {
		k.count.Add(1)
	}
}

// A compiled policy and what it came from.
type compiled struct {
	id     types.PolicyID
	policy *cedar.Policy
	grant  *rule // nil: a rule
}

// A question is all that the permits depend on.
type question struct {
	id       string
	spki     [32]byte
	roles    uint8 // a bit for each of Roles
	action   Action
	category CategoryName
}

// An answer is what the permits say to a question.
type answer struct {
	allow  bool
	rules  []string
	role   Role
	knowIt bool
	caller types.Entity
	// against are the rules whose scope does not leave the question out.
	against []compiled
}

// compileGrant makes the permit of a grant.
func compileGrant(g Grant) *cedar.Policy {
	var actions []types.EntityUID
	for action, roles := range permits {
		if slices.Contains(roles, g.Role) && (action != ActionReissue || g.Reissue) {
			actions = append(actions, actionUID(action))
		}
	}
	slices.SortFunc(actions, func(a, b types.EntityUID) int { return strings.Compare(string(a.ID), string(b.ID)) })
	p := ast.Permit().PrincipalEq(types.NewEntityUID(typeCaller, types.String(g.Identity))).ActionInSet(actions...).
		When(ast.Principal().Access("roles").Contains(ast.String(string(g.Role))))
	if g.SPKI != nil {
		p = p.When(ast.Principal().Access("spki").Equal(ast.String(hex.EncodeToString(g.SPKI[:]))))
	}
	if g.Role == RoleOperator { // not even an officer's key under another name
		p = p.When(ast.Not(ast.Principal().Access("officer_key")))
	}
	if !g.AllCategories {
		where := []ast.Node{ast.Value(everything)}
		for _, c := range g.Categories {
			where = append(where, ast.Value(types.NewEntityUID(typeCategory, types.String(c))))
		}
		p = p.When(ast.Resource().In(ast.Set(where...)))
	}
	return cedar.NewPolicyFromAST(p)
}

func actionUID(a Action) types.EntityUID { return types.NewEntityUID(typeAction, types.String(a)) }

// authorize says what grants and rules make of a request. Its Err is ErrDenied
// where they refuse.
func (p *Policy) authorize(r Request) Decision {
	known := p.answer(r)
	d := Decision{Allow: known.allow, Role: known.role, Rules: known.rules, KnowIt: known.knowIt}
	if d.Allow && len(known.against) > 0 {
		if against := p.against(r, known); len(against) > 0 {
			d.Allow, d.Rules, d.KnowIt = false, against, false
		}
	}
	if !d.Allow {
		d.Err = ErrDenied
	}
	return d
}

// answer is what the permits say.
func (p *Policy) answer(r Request) *answer {
	q := question{id: r.Caller.ID, spki: r.Caller.SPKI, action: r.Action, category: r.Resource.Category}
	for i, role := range Roles {
		if slices.Contains(r.Caller.Roles, role) {
			q.roles |= 1 << i
		}
	}
	a := p.authority
	if known, ok := a.known.get(q); ok {
		return known
	}
	found := p.ask(r)
	if len(a.permits[r.Caller.ID]) > 0 { // strangers fill nothing
		a.known.put(q, found)
	}
	return found
}

// ask evaluates the permits.
func (p *Policy) ask(r Request) *answer {
	mine := p.authority.permits[r.Caller.ID]
	resource := everything
	if r.Resource.Category != "" {
		resource = types.NewEntityUID(typeCategory, types.String(r.Resource.Category))
	}
	found := &answer{caller: callerEntity(r.Caller, p.officers[r.Caller.SPKI])}
	allow, diag := cedar.Authorize(policies(mine), entities{found.caller}, types.Request{Principal: found.caller.UID, Action: actionUID(r.Action), Resource: resource})
	found.allow = bool(allow) && len(diag.Errors) == 0
	for _, g := range mine { // in the order of the configuration
		if g.grant.acts(r, p.officers) {
			found.role = g.grant.Role // also where it is refused, for the audit log
		}
		if found.allow && slices.ContainsFunc(diag.Reasons, func(reason types.DiagnosticReason) bool { return reason.PolicyID == g.id }) {
			found.rules = append(found.rules, g.grant.text)
			found.knowIt = found.knowIt || g.grant.AllCategories
		}
	}
	for _, rule := range p.authority.rules {
		if rule.concerns(found.caller.UID, actionUID(r.Action), resource) {
			found.against = append(found.against, rule)
		}
	}
	return found
}

// concerns says whether the scope of a rule leaves caller, action and category
// in. Callers and actions have no groups, so a scope names them or it does not.
func (c compiled) concerns(caller, action, category types.EntityUID) bool {
	p := (*cedarast.Policy)(c.policy.AST())
	switch s := p.Principal.(type) {
	case cedarast.ScopeTypeEq:
		if s.Entity != caller {
			return false
		}
	}
	switch s := p.Action.(type) {
	case cedarast.ScopeTypeEq:
		if s.Entity != action {
			return false
		}
	case cedarast.ScopeTypeInSet:
		if !slices.Contains(s.Entities, action) {
			return false
		}
	}
	switch s := p.Resource.(type) {
	case cedarast.ScopeTypeIn:
		if s.Entity.Type == typeCategory && s.Entity != category {
			return false
		}
	case cedarast.ScopeTypeIsIn:
		if s.Entity.Type == typeCategory && s.Entity != category {
			return false
		}
	}
	return true
}

// acts says whether a caller acts in the role of the grant. It decides nothing:
// the audit log names the role of who was refused by it.
func (g *rule) acts(r Request, officers map[[32]byte]bool) bool {
	return slices.Contains(permits[r.Action], g.Role) && slices.Contains(r.Caller.Roles, g.Role) &&
		(g.SPKI == nil || *g.SPKI == r.Caller.SPKI) && (g.Role != RoleOperator || !officers[r.Caller.SPKI])
}

func callerEntity(who Caller, officerKey bool) types.Entity {
	roles := make([]types.Value, len(who.Roles))
	for i, role := range who.Roles {
		roles[i] = types.String(role)
	}
	return types.Entity{UID: types.NewEntityUID(typeCaller, types.String(who.ID)), Attributes: types.NewRecord(types.RecordMap{
		"ca": types.String(who.CA), "roles": types.NewSet(roles...), "spki": types.String(hex.EncodeToString(who.SPKI[:])), "officer_key": types.Boolean(officerKey)})}
}

// against are the rules that forbid what the permits allow, or that could not be
// evaluated. Rules are about keys, on release, and about categories, on issue:
// to a question about neither they say nothing.
func (p *Policy) against(r Request, known *answer) []string {
	req := types.Request{Principal: known.caller.UID, Action: actionUID(r.Action)}
	about := entities{known.caller}
	switch {
	case r.Action == ActionRelease && r.Resource.Key != nil:
		key := p.authority.keyEntity(r.Resource)
		req.Resource, about = key.UID, append(about, key)
		req.Context = p.authority.releaseContext(r)
	case (r.Action == ActionIssue || r.Action == ActionReissue) && r.Resource.Category != "":
		req.Resource = types.NewEntityUID(typeCategory, types.String(r.Resource.Category))
		req.Context = types.NewRecord(types.RecordMap{"now": types.NewDatetime(r.Now)})
	default:
		return nil
	}
	_, diag := cedar.Authorize(policies(known.against), about, req)
	var against []string
	for _, reason := range diag.Reasons { // of forbids: there is no permit among the rules
		against = append(against, string(reason.PolicyID))
	}
	for _, e := range diag.Errors {
		against = append(against, string(e.PolicyID)+" (cannot be evaluated)")
	}
	return against
}

// keyFacts are what rules can know of a key, and what they were made of.
type keyFacts struct {
	of      NaturalKey
	created time.Time
	entity  types.Entity
}

func (a *authority) keyEntity(r Resource) types.Entity {
	k := r.Key
	if known, ok := a.keys.get(k.KID); ok && known.created.Equal(k.CreateTime) && known.of.Category == r.Category && known.of.Generation == k.Generation && known.of.SameItem(k.NaturalKey) {
		return known.entity
	}
	facts := &keyFacts{of: k.NaturalKey, created: k.CreateTime}
	facts.of.Category, facts.of.ContentID = r.Category, slices.Clone(k.ContentID)
	facts.entity = types.Entity{UID: types.NewEntityUID(typeKey, types.String(k.KID.String())),
		Parents: types.NewEntityUIDSet(types.NewEntityUID(typeCategory, types.String(r.Category))),
		Attributes: types.NewRecord(types.RecordMap{"content_id": types.String(strings.ToValidUTF8(string(k.ContentID), "\uFFFD")), "track_type": types.String(k.TrackType),
			"scheme": types.String(k.Scheme), "generation": types.Long(k.Generation), "create_time": types.NewDatetime(k.CreateTime)})}
	a.keys.put(k.KID, facts)
	return facts.entity
}

func (a *authority) releaseContext(r Request) types.Record {
	c := types.RecordMap{"now": types.NewDatetime(r.Now), "asserted": a.viewer(r.Asserted)}
	if t := r.Token; t != nil && t.err == nil {
		c["token"] = types.NewRecord(types.RecordMap{"issuer": types.String(t.issuer.Issuer), "session": types.String(t.session), "viewer": a.viewer(t.viewer)})
	}
	return types.NewRecord(c)
}

// A Viewer is a viewer's device and place, as a token or a caller describes it.
// Empty fields were not said.
type Viewer struct {
	DRMSystem     string `json:"drm_system"`
	SecurityLevel string `json:"security_level"`
	HDCP          string `json:"hdcp"`
	Region        string `json:"region"`
	LicenceType   string `json:"licence_type"`
}

// Check says what is wrong with the viewer, or nil.
func (v Viewer) Check() error {
	for _, text := range [...]string{v.DRMSystem, v.SecurityLevel, v.HDCP, v.Region, v.LicenceType} {
		if err := checkText(text, maxViewerText); err != nil {
			return err
		}
	}
	return nil
}

// maxViewerText in bytes, of one field of a Viewer.
const maxViewerText = 64

func (a *authority) viewer(v Viewer) types.Record {
	if known, ok := a.viewers.get(v); ok {
		return known
	}
	m := types.RecordMap{}
	for _, f := range [...]struct {
		name  types.String
		value string
	}{{"drm_system", v.DRMSystem}, {"security_level", v.SecurityLevel}, {"hdcp", v.HDCP}, {"region", v.Region}, {"licence_type", v.LicenceType}} {
		if f.value != "" {
			m[f.name] = types.String(f.value)
		}
	}
	made := types.NewRecord(m)
	a.viewers.put(v, made)
	return made
}

// policies are a set that Cedar goes through.
type policies []compiled

func (p policies) All() iter.Seq2[types.PolicyID, *cedar.Policy] {
	return func(yield func(types.PolicyID, *cedar.Policy) bool) {
		for i := range p {
			if !yield(p[i].id, p[i].policy) {
				return
			}
		}
	}
}

// entities are the few that one request is about.
type entities []types.Entity

func (e entities) Get(uid types.EntityUID) (types.Entity, bool) {
	for i := range e {
		if e[i].UID == uid {
			return e[i], true
		}
	}
	return types.Entity{}, false
}
