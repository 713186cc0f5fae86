package custodian

import (
	_ "embed"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	cedar "github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/types"
	cedarast "github.com/cedar-policy/cedar-go/x/exp/ast"
	"github.com/cedar-policy/cedar-go/x/exp/schema"
	"github.com/cedar-policy/cedar-go/x/exp/schema/validate"
)

// RulesSchema is the Cedar schema that rules are checked against.
//
//go:embed rules.cedarschema
var RulesSchema string

// A RulesFile is a file of rules: Cedar policies that forbid. Each has an @id of
// its own, which the audit log names.
type RulesFile struct {
	Name string
	Text []byte
}

var rulesValidator = sync.OnceValues(func() (*validate.Validator, error) {
	var s schema.Schema
	if err := s.UnmarshalCedar([]byte(RulesSchema)); err != nil {
		return nil, err
	}
	resolved, err := s.Resolve()
	if err != nil {
		return nil, err
	}
	return validate.New(resolved, validate.WithStrict()), nil
})

// WithRules returns the policy with rules that forbid what its grants permit.
// Digest covers them. It reports every fault at once. A rule is refused that is
// not valid under RulesSchema, that has no @id, or that permits: who may do
// something is said by grants alone.
func (p *Policy) WithRules(files []RulesFile) (*Policy, error) {
	validator, err := rulesValidator()
	if err != nil {
		return nil, fmt.Errorf("schema of rules: %w", err)
	}
	var faults []error
	var rules []compiled
	seen := map[types.PolicyID]string{}
	var text []string
	for _, f := range files {
		text = append(text, fmt.Sprintf("%d %s", len(f.Text), f.Text))
		list, err := cedar.NewPolicyListFromBytes(f.Name, f.Text)
		if err != nil {
			faults = append(faults, fmt.Errorf("%s: %w", f.Name, err))
			continue
		}
		for _, policy := range list {
			at := fmt.Sprintf("%s:%d", f.Name, policy.Position().Line)
			id := types.PolicyID(policy.Annotations()["id"])
			other, twice := seen[id]
			switch {
			case id == "":
				faults = append(faults, fmt.Errorf(`%s: the rule has no @id("…"), which names it in the audit log`, at))
				id = types.PolicyID(at)
			case len(id) > 64 || strings.ContainsFunc(string(id), func(r rune) bool { return r <= ' ' || r > '~' }):
				faults = append(faults, fmt.Errorf("%s: @id %.80q: must be 1 to 64 printable ASCII characters without spaces", at, id))
			case twice:
				faults = append(faults, fmt.Errorf("%s: @id %q is that of %s too", at, id, other))
			}
			seen[id] = at
			if policy.Effect() != cedar.Forbid {
				faults = append(faults, fmt.Errorf("%s: rule %s permits: rules only forbid, and grants permit", at, id))
			}
			if err := validator.Policy(string(id), (*cedarast.Policy)(policy.AST())); err != nil {
				faults = append(faults, fmt.Errorf("%s: rule %s: %w", at, id, err))
			}
			rules = append(rules, compiled{id: id, policy: policy})
		}
	}
	if len(faults) > 0 {
		return nil, errors.Join(faults...)
	}
	slices.SortFunc(rules, func(a, b compiled) int { return strings.Compare(string(a.id), string(b.id)) })
	with := p.with(conditionRules, text)
	with.authority = &authority{rules: rules}
	if p.authority != nil {
		with.authority.permits = p.authority.permits
	}
	return with, nil
}

// rules are those of the policy that forbid.
func (p *Policy) rules() []compiled {
	if p.authority == nil {
		return nil
	}
	return p.authority.rules
}

// A RulesQuestion is a decision that rules are tried on.
type RulesQuestion struct {
	Caller   string
	Action   Action // release, issue or reissue
	Key      ContentKey
	Now      time.Time
	Token    *TokenClaims // nil: none is shown
	Asserted Viewer
}

// TokenClaims are what rules can know of a licence token.
type TokenClaims struct {
	Issuer  string
	Session string
	Viewer  Viewer
}

// TryRules says which rules forbid what grants would permit; none: it is left to
// the grants.
func TryRules(files []RulesFile, q RulesQuestion) (against []string, err error) {
	roles, ok := permits[q.Action]
	if !ok || purposeOf(q.Action) == 0 {
		return nil, fmt.Errorf("action %q: must be release, issue or reissue", q.Action)
	}
	if err := errors.Join(q.Key.Category.Check(), q.Asserted.Check()); err != nil {
		return nil, err
	}
	granted, err := NewPolicy([]Grant{{Identity: q.Caller, Role: roles[0], AllCategories: true, Reissue: true}})
	if err != nil {
		return nil, err
	}
	p, err := granted.WithRules(files)
	if err != nil {
		return nil, err
	}
	r := Request{Caller: Caller{ID: q.Caller, Roles: roles[:1]}, Action: q.Action, Now: q.Now, Asserted: q.Asserted,
		Resource: Resource{Category: q.Key.Category, Key: &q.Key}}
	if q.Token != nil {
		r.Token = &Token{issuer: &TokenIssuer{Issuer: q.Token.Issuer}, session: q.Token.Session, viewer: q.Token.Viewer}
	}
	d := p.authorize(r)
	if d.Allow {
		return nil, nil
	}
	return d.Rules, nil
}
