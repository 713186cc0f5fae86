package custodian

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/cedar-policy/cedar-go/types"

	"github.com/keycustody/custodian/internal/sealing"
)

// A Role is what a caller acts as. The zero Role may do nothing.
type Role string

// The roles.
const (
	RolePackager Role = "packager"
	RoleProvider Role = "drm-provider"
	RoleOfficer  Role = "officer"
	RoleOperator Role = "operator"
	RoleAuditor  Role = "auditor"
	// RoleEventSource reports events, and can do nothing else.
	RoleEventSource Role = "event-source"
)

// Roles are all of them.
var Roles = []Role{RolePackager, RoleProvider, RoleOfficer, RoleOperator, RoleAuditor, RoleEventSource}

// A Caller is who calls, from a verified certificate chain.
type Caller struct {
	ID    string   // SPIFFE ID or DNS name
	CA    string   // the configured CA that vouches for it
	Roles []Role   // what that CA may vouch for
	SPKI  [32]byte // SHA-256 of the certificate's public key
	Cert  [32]byte // SHA-256 of the certificate in DER
}

// An Action is what a caller wants to do.
type Action string

// The actions.
const (
	ActionIssue          Action = "issue"
	ActionReissue        Action = "reissue"
	ActionRelease        Action = "release"
	ActionCreateCategory Action = "category.create"
	ActionSetMode        Action = "category.mode"
	ActionReadCategories Action = "category.read"
	ActionReadKeys       Action = "keys.read"
	ActionReadStatus     Action = "status.read"
	ActionBackup         Action = "backup"
	ActionReadAudit      Action = "audit.read"
	ActionRotate         Action = "rotation"
	ActionReadRotations  Action = "rotation.read"
	ActionRevokeByEvent  Action = "event.revoke"
	ActionReportEvent    Action = "event"
	ActionSetProviders   Action = "category.providers"
	ActionReencrypt      Action = "category.reencrypt"
	ActionImport         Action = "keys.import"
	ActionExport         Action = "keys.export"
	ActionPropose        Action = "ceremony.propose"
	ActionApprove        Action = "ceremony.approve"
	ActionCancel         Action = "ceremony.cancel"
	ActionExecute        Action = "ceremony.execute"
	ActionReadCeremonies Action = "ceremony.read"
	ActionBlastRadius    Action = "blast-radius"
	ActionFreezeCaller   Action = "caller.freeze"

	ActionRevoke          Action = "revoke"
	ActionLiftRevocation  Action = "revocation.lift"
	ActionReadRevocations Action = "revocation.read"
)

// permits says which roles may do an action at all.
var permits = map[Action][]Role{
	ActionIssue:          {RolePackager},
	ActionReissue:        {RolePackager},
	ActionRelease:        {RoleProvider},
	ActionCreateCategory: {RoleOfficer},
	ActionSetMode:        {RoleOfficer},
	ActionReadCategories: {RoleOfficer, RoleOperator, RoleAuditor},
	ActionReadKeys:       {RoleAuditor},
	ActionReadStatus:     {RoleOperator, RoleOfficer, RoleAuditor},
	ActionBackup:         {RoleOperator},
	ActionReadAudit:      {RoleAuditor},
	ActionRotate:         {RoleOfficer},
	ActionReadRotations:  {RoleOfficer, RoleOperator, RoleAuditor},
	ActionReportEvent:    {RolePackager, RoleOfficer, RoleEventSource},
	ActionRevokeByEvent:  {RoleEventSource},
	// Who holds the outer layer is decided by those who decide who holds keys;
	// that its wraps follow a provider's own rotation is housekeeping.
	ActionSetProviders:   {RoleOfficer},
	ActionReencrypt:      {RoleOfficer, RoleOperator},
	ActionImport:         {RoleOfficer},
	ActionExport:         {RoleOfficer},
	ActionPropose:        {RoleOfficer},
	ActionApprove:        {RoleOfficer},
	ActionCancel:         {RoleOfficer},
	ActionExecute:        {RoleOfficer},
	ActionReadCeremonies: {RoleOfficer, RoleOperator, RoleAuditor},
	ActionBlastRadius:    {RoleOfficer, RoleAuditor},
	// Whoever runs the daemon says in its configuration which issuers there are,
	// so that he may lift a revocation gives him nothing.
	ActionRevoke:          {RoleOperator, RoleOfficer},
	ActionLiftRevocation:  {RoleOperator, RoleOfficer},
	ActionReadRevocations: {RoleOperator, RoleOfficer, RoleAuditor},
	ActionFreezeCaller:    {RoleOfficer},
}

// byQuorum are the actions that are one officer's only where there are no
// officers with a quorum.
var byQuorum = []Action{ActionRotate, ActionSetProviders, ActionImport, ActionExport}

// A Grant gives one identity one role over categories. AllCategories is only
// set where the configuration says "*".
type Grant struct {
	Identity      string
	Role          Role
	AllCategories bool
	Categories    []CategoryName
	// Reissue lets a packager have keys again after their re-issue window.
	Reissue bool
	// SPKI pins the public key: another one is not granted. Officers must have
	// it, and it makes whoever shows it no operator, under any name.
	SPKI *[32]byte
}

// A Policy is the grants, and what restricts them: rules, sealing, licence
// tokens. The zero Policy permits nothing.
type Policy struct {
	authority  *authority        // nil: nothing is permitted
	officers   map[[32]byte]bool // public keys that are pinned for officers
	digest     [32]byte
	granted    [32]byte             // digest of the grants alone
	conditions [conditions][32]byte // digest of each part of the rest; zero: it has none
	sealing    *sealingRule         // nil: nothing is sealed to callers
	tokens     *Tokens              // nil: no licence token is asked for
	budgets    *budgetRules         // nil: nobody is bounded
}

// A rule is a grant and what names it in a Decision.
type rule struct {
	Grant
	text string
}

// NewPolicy checks the grants and makes a policy of them. It reports every
// fault at once, each with the place grants[i].
func NewPolicy(grants []Grant) (*Policy, error) {
	p := &Policy{authority: &authority{permits: map[string][]compiled{}}, officers: map[[32]byte]bool{}}
	var faults []error
	fault := func(i int, format string, args ...any) {
		faults = append(faults, fmt.Errorf("grants[%d]: %w", i, fmt.Errorf(format, args...)))
	}
	if len(grants) == 0 {
		faults = append(faults, errors.New("grants: empty; nobody could do anything, which is surely not meant"))
	}
	var canonical []string
	for i, g := range grants {
		if g.Identity == "" {
			fault(i, "identity: empty")
		}
		if !slices.Contains(Roles, g.Role) {
			fault(i, "role %q: must be one of %v", g.Role, Roles)
		}
		if g.Role == RoleOfficer && g.SPKI == nil {
			fault(i, "officer %s: an officer is a pinned public key: set spki", g.Identity)
		}
		if !g.AllCategories && len(g.Categories) == 0 && g.Role != RoleOperator {
			fault(i, "%s as %s: categories is empty, so it could do nothing; name them, or write \"*\"", g.Identity, g.Role)
		}
		for _, c := range g.Categories {
			if err := c.Check(); err != nil {
				fault(i, "%w", err)
			}
		}
		text := g.canonical()
		if g.Role == RoleOfficer && g.SPKI != nil {
			p.officers[*g.SPKI] = true
		}
		p.authority.permits[g.Identity] = append(p.authority.permits[g.Identity],
			compiled{id: types.PolicyID(fmt.Sprintf("grants[%d]", i)), policy: compileGrant(g), grant: &rule{g, text}})
		canonical = append(canonical, text)
	}
	for id, gs := range p.authority.permits {
		holds := func(r Role) bool { return slices.ContainsFunc(gs, func(g compiled) bool { return g.grant.Role == r }) }
		if holds(RoleOfficer) && holds(RoleOperator) {
			faults = append(faults, fmt.Errorf("%s: is officer and operator; these must be different people", id))
		}
	}
	if len(faults) > 0 {
		return nil, errors.Join(faults...)
	}
	slices.Sort(canonical)
	p.granted = sha256.Sum256([]byte(strings.Join(slices.Compact(canonical), "\n")))
	p.digest = p.granted
	return p, nil
}

func (g Grant) canonical() string {
	pin := ""
	if g.SPKI != nil {
		pin = hex.EncodeToString(g.SPKI[:])
	}
	cats := slices.Clone(g.Categories)
	slices.Sort(cats)
	return fmt.Sprintf("%q %q %v %q %v %s", g.Identity, g.Role, g.AllCategories, cats, g.Reissue, pin)
}

// line says a grant to people, as that of a plan.
func (g Grant) line() string {
	said := PlanGrant{Identity: g.Identity, Role: string(g.Role), Reissue: g.Reissue}
	if g.AllCategories {
		said.Categories = []string{"*"}
	}
	for _, c := range slices.Sorted(slices.Values(g.Categories)) {
		said.Categories = append(said.Categories, string(c))
	}
	if g.SPKI != nil {
		said.SPKI = hex.EncodeToString(g.SPKI[:])
	}
	return said.line()
}

// lines are the grants, for people.
func (p *Policy) lines() (lines []string) {
	if p.authority == nil {
		return nil
	}
	for _, grants := range p.authority.permits {
		for _, g := range grants {
			lines = append(lines, g.grant.line())
		}
	}
	slices.Sort(lines)
	return lines
}

// Digest names the policy in the audit log.
func (p *Policy) Digest() [32]byte { return p.digest }

// A Resource is what an action touches. The zero Category is the daemon as a
// whole, for actions that are about no category.
type Resource struct {
	Category CategoryName
	Mode     CategoryMode // of the category; zero where the action needs none
	IsKey    bool         // it is a key: without Mode and State it is refused
	State    State        // of the key
	Decided  bool         // of the key's exception
	Key      *ContentKey  // it is one that exists
	New      bool         // it is about to be made
	Overdue  bool         // it, or what it would stand beside, is to be re-keyed first
}

// known says whether the resource is what is there, and not only its name.
func (r Resource) known() bool { return r.Mode != 0 || r.IsKey || r.New }

// A Request is one question to Decide.
type Request struct {
	Caller   Caller
	Action   Action
	Resource Resource
	Officers bool   // there are officers, whose quorum decides what one officer may not
	Sealed   bool   // they have sealed the custody
	Frozen   bool   // the caller is stopped
	Token    *Token // what the caller has shown; nil: none
	Asserted Viewer // what the caller says of the viewer
	Now      time.Time
	// Recipient is the caller's public key that the keys leave sealed to; the
	// zero key: they would leave in clear.
	Recipient sealing.PublicKey
	// Permitted says that a ceremony of the officers permits this very import or
	// export.
	Permitted bool
}

// A Decision answers a Request. The zero Decision refuses.
type Decision struct {
	Allow  bool
	Err    error    // the refusal; nil only where Allow
	Role   Role     // the role that it was allowed or refused in
	Rules  []string // the grants that allowed it, or the rules that forbid it
	KnowIt bool     // the caller may hear that something does not exist
}

// Decide is the one place where an action is allowed or refused: authority and
// whether the caller is frozen first, then the licence token, the category's
// mode, the key's state, and the form in which a key would leave.
func (p *Policy) Decide(r Request) Decision {
	if p == nil || p.authority == nil {
		return Decision{Err: ErrDenied}
	}
	d := p.authorize(r)
	if r.Frozen { // and hears nothing else: not what it is granted, nor what exists
		d.Allow, d.KnowIt, d.Err = false, false, ErrCallerFrozen
	}
	if !d.Allow {
		return d
	}
	if r.Action == ActionRelease {
		d.Err = p.checkToken(r.Token, r.Resource)
	}
	if d.Err == nil {
		d.Err = r.unusable()
	}
	if d.Err == nil {
		d.Err = p.mayLeave(r)
	}
	switch {
	case r.Officers && !r.Permitted && slices.Contains(byQuorum, r.Action):
		d.Err = &CeremonyError{ErrQuorum, "the officers' quorum decides it, and no officer alone"}
	case r.Sealed && (purposeOf(r.Action) != 0 || r.Action == ActionCreateCategory):
		d.Err = fmt.Errorf("by the officers: %w", ErrSealed)
	}
	d.Allow = d.Err == nil
	return d
}

// unusable says why the resource's mode or state forbids an action that uses
// keys, or nil.
func (r Request) unusable() error {
	purpose := purposeOf(r.Action)
	if purpose == 0 {
		return nil
	}
	if r.Resource.known() {
		if err := r.Resource.forbids(purpose); err != nil {
			return err
		}
	}
	if !r.Resource.IsKey {
		return nil
	}
	return Usable(r.Resource.State, purpose, r.Resource.Decided)
}

// leaving are the actions that let keys out.
var leaving = []Action{ActionIssue, ActionReissue, ActionRelease, ActionExport}

// purposeOf is what an action uses keys for; zero where it uses none.
func purposeOf(a Action) Purpose {
	switch a {
	case ActionIssue, ActionReissue, ActionImport:
		return Protect
	case ActionRelease, ActionExport:
		return Process
	}
	return 0
}
