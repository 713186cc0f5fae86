package custodian_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	jose "github.com/go-jose/go-jose/v4"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/audit"
)

// conditions are one of each kind; a test edits them.
type conditions struct {
	rules   []custodian.RulesFile
	tokens  *custodian.Tokens
	sealing *custodian.Sealing
	budgets []custodian.Budget
}

// allGrants are testPolicy in a plan, all of them.
const allGrants = testGrants + `
- {identity: spiffe://test/narrow-officer, role: officer, categories: [movies], spki: "0200000000000000000000000000000000000000000000000000000000000000"}
- {identity: kafka:media, role: event-source, categories: [movies]}
- {identity: kafka:all, role: event-source, categories: ["*"]}`

func testConditions() conditions {
	return conditions{
		rules: []custodian.RulesFile{
			{Name: "a.cedar", Text: []byte(`@id("no-uhd") forbid (principal, action == Custodian::Action::"release", resource) when { resource.track_type == "UHD1" };`)},
			{Name: "b.cedar", Text: []byte(`@id("no-8k") forbid (principal, action == Custodian::Action::"release", resource) when { resource.track_type == "UHD2" };`)}},
		tokens: &custodian.Tokens{Audience: "custodian.test", Mode: custodian.TokenOptional, Categories: map[custodian.CategoryName]custodian.TokenMode{"premium": custodian.TokenRequired},
			Issuers: []custodian.TokenIssuer{{Issuer: "https://playback.test", Keys: custodian.NewTokenKeys(), KeysFrom: "https://playback.test/jwks", Categories: []custodian.CategoryName{"movies"}}}},
		sealing: &custodian.Sealing{Require: []custodian.CategoryName{"masters"}},
		budgets: []custodian.Budget{
			{Caller: custodian.AnyCaller, Action: custodian.ActionRelease, Window: time.Hour, HardKIDs: 100},
			{Caller: custodian.AnyCaller, Action: custodian.ActionReissue, Window: time.Hour, HardKIDs: 10}},
	}
}

// policy is testPolicy under the conditions, with their edits.
func (c conditions) policy(t *testing.T, edits ...func(*conditions)) *custodian.Policy {
	t.Helper()
	for _, edit := range edits {
		edit(&c)
	}
	p := testPolicy(t)
	var err error
	then := func(apply func() (*custodian.Policy, error)) {
		if p, err = apply(); err != nil {
			t.Fatal(err)
		}
	}
	if c.rules != nil {
		then(func() (*custodian.Policy, error) { return p.WithRules(c.rules) })
	}
	if c.sealing != nil {
		then(func() (*custodian.Policy, error) { return p.WithSealing(*c.sealing) })
	}
	if c.tokens != nil {
		then(func() (*custodian.Policy, error) { return p.WithTokens(*c.tokens) })
	}
	then(func() (*custodian.Policy, error) { return p.WithBudgets(c.budgets) })
	return p
}

// Officers have signed these digests, so no version of the program may change
// them.
func TestConditionsStay(t *testing.T) {
	const full = "7cbc76c8af7512672b38f24bc84e273362ba1844160444e7998741095070314f"
	for _, test := range []struct {
		name string
		p    *custodian.Policy
		want string
	}{
		{"none", testPolicy(t), "1e3d5ff284819cc2f9f0628fffec9889e08b01e40c62fbb97cd41c107f7462a3"},
		{"of each kind", testConditions().policy(t), full},
		{"rules in another order, from files of other names", testConditions().policy(t, func(c *conditions) {
			slices.Reverse(c.rules)
			c.rules[0].Name = "c.cedar"
		}), full},
		{"other keys of an issuer", testConditions().policy(t, func(c *conditions) {
			if _, err := c.tokens.Issuers[0].Keys.Set(jwks(t, newSigner(t, jose.ES256, "k1").public())); err != nil {
				t.Fatal(err)
			}
		}), full},
	} {
		if got := fmt.Sprintf("%x", test.p.Conditions()); got != test.want {
			t.Errorf("%s: got %s, want %s", test.name, got, test.want)
		}
	}
}

// Where the officers have signed the conditions, an operator's edit of any of
// them is refused and written down: a load leaves those in force, and a start
// serves nothing.
func TestConditionsAttacks(t *testing.T) {
	a := newAssembly(t)
	a.category("movies")
	signed := testConditions().policy(t)
	a.cfg.Policy = signed
	a.reopen()
	kid := a.issue("movies", "film", "SD")[0].KID
	uhd := a.issue("movies", "film", "UHD1")[0].KID
	delete(a.answered, uhd) // since nobody gets it
	a.hold(a.plan("policy", allGrants+fmt.Sprintf("\nconditions: %x", signed.Conditions())), a.anna, a.ben)
	refused := func(what string, from int, err error) {
		t.Helper()
		if !errors.Is(err, custodian.ErrConditions) || !errors.Is(err, custodian.ErrQuorum) || !strings.Contains(err.Error(), fmt.Sprintf("signed (%x)", signed.Conditions())) {
			t.Errorf("%s: got %v, want ErrConditions with what is signed", what, err)
		}
		all := a.entries(uint64(from))
		if last := all[len(all)-1]; last.Action != "policy.load" || last.Outcome != audit.Denied || last.Reason != "QUORUM" {
			t.Errorf("%s: the audit log ends with %s %s %s, want a policy.load denied for QUORUM", what, last.Action, last.Outcome, last.Reason)
		}
	}
	for _, test := range []struct {
		name string
		edit func(*conditions)
	}{
		{"a rule taken away", func(c *conditions) { c.rules = c.rules[1:] }},
		{"a rule that forbids less", func(c *conditions) {
			c.rules[0].Text = []byte(strings.Replace(string(c.rules[0].Text), "UHD1", "UHD9", 1))
		}},
		{"all rules taken away", func(c *conditions) { c.rules = nil }},
		{"the mode of tokens", func(c *conditions) { c.tokens.Mode = custodian.TokenNone }},
		{"the mode of tokens of a category", func(c *conditions) { c.tokens.Categories["premium"] = custodian.TokenOptional }},
		{"an issuer more", func(c *conditions) {
			c.tokens.Issuers = append(c.tokens.Issuers, custodian.TokenIssuer{Issuer: "https://evil.test", Keys: custodian.NewTokenKeys(), AllCategories: true})
		}},
		{"an issuer's categories", func(c *conditions) { c.tokens.Issuers[0].AllCategories = true }},
		{"where an issuer's keys come from", func(c *conditions) { c.tokens.Issuers[0].KeysFrom = "https://evil.test/jwks" }},
		{"the audience", func(c *conditions) { c.tokens.Audience = "other.test" }},
		{"a limit of tokens", func(c *conditions) { c.tokens.MaxUses = 100 }},
		{"no tokens", func(c *conditions) { c.tokens = nil }},
		{"a category that needs sealing no more", func(c *conditions) { c.sealing = nil }},
		{"a larger budget", func(c *conditions) { c.budgets[0].HardKIDs = 1_000_000 }},
		{"no budgets", func(c *conditions) { c.budgets = nil }},
	} {
		edited := testConditions().policy(t, test.edit)
		from := len(a.entries(0))
		refused(test.name+", loaded", from, a.c.SetPolicy(t.Context(), edited))
		wantErr(t, test.name+": what a rule in force forbids", a.release(provider, uhd), custodian.ErrDenied)
		wantErr(t, test.name+": what nothing forbids", a.release(provider, kid), nil)
	}
	wantErr(t, "the same conditions, loaded", a.c.SetPolicy(t.Context(), testConditions().policy(t)), nil)

	a.cfg.Policy = testConditions().policy(t, func(c *conditions) { c.rules = c.rules[1:] })
	from := len(a.entries(0))
	refused("a start without the rule", from, a.open())
	a.cfg.Policy = signed
	a.reopen()
	wantErr(t, "release after a start with what is signed", a.release(provider, kid), nil)
	a.whole()
}

// Conditions are signed, stay, change and are given back, each by a ceremony.
func TestConditionsCeremony(t *testing.T) {
	a := newAssembly(t)
	ctx := t.Context()
	none, first := testPolicy(t), testConditions().policy(t)
	warned := func(what, want string) {
		t.Helper()
		st, err := a.c.Status(ctx, operator)
		if err != nil {
			t.Fatal(err)
		}
		got := slices.DeleteFunc(st.Warnings, func(w string) bool { return !strings.Contains(w, "(conditions ") })
		if (want == "") != (len(got) == 0) || !strings.Contains(fmt.Sprint(got), want) {
			t.Errorf("warnings %s: got %q, want %q", what, got, want)
		}
	}
	// rehearse says what becomes of the conditions.
	rehearse := func(conditions, want string) {
		t.Helper()
		grants := strings.Replace(allGrants, "categories: [movies]", "categories: [sport]", 1)
		_, r, err := a.c.ProposeCeremony(ctx, officer, []byte(a.plan("policy", grants+conditions)), "", true)
		if err != nil {
			t.Fatal(err)
		}
		if got := r.Changes[len(r.Changes)-1]; got != want {
			t.Errorf("rehearsal: got %s, want %s", got, want)
		}
	}
	sign := func(p *custodian.Policy) string { return fmt.Sprintf("\nconditions: %x", p.Conditions()) }
	const theFile = "those of the configuration file"

	warned("at first", "the officers leave rules, licence tokens, sealing and budgets to the configuration file")
	rehearse("", "conditions stay: "+theFile)
	rehearse(sign(none), fmt.Sprintf("conditions: from %s to %x, which the running configuration has", theFile, none.Conditions()))
	rehearse(sign(first), fmt.Sprintf("conditions: from %s to %x; the running configuration has others, %x, which stay in force until one with those of the plan is loaded: no other starts any more", theFile, first.Conditions(), none.Conditions()))

	if _, err := custodian.ParsePlan([]byte(a.plan("policy", allGrants+"\nconditions: "+strings.Repeat("0", 64)))); err == nil || !strings.Contains(err.Error(), "conditions: must be the 64 digits") {
		t.Errorf("zero conditions in a plan: got %v", err)
	}
	a.hold(a.plan("policy", allGrants+sign(first)), a.anna, a.ben)
	warned("until they are loaded", "are not what the officers have signed")
	wantErr(t, "a load of the old ones", a.c.SetPolicy(ctx, none), custodian.ErrConditions)
	wantErr(t, "a load of those that were signed", a.c.SetPolicy(ctx, first), nil)
	warned("once they are", "")
	a.cfg.Policy = first
	a.reopen()

	rehearse("", fmt.Sprintf("conditions stay: %x", first.Conditions()))
	_, _, err := a.c.ProposeCeremony(ctx, officer, []byte(a.plan("policy", allGrants)), "", true)
	wantErr(t, "a plan that changes nothing", err, custodian.ErrPlan)
	waiting := a.plan("policy", allGrants+sign(none))
	info := a.propose(waiting)
	a.approve(info, waiting, a.anna, a.cleo)
	rehearse("\nconditions: configuration", fmt.Sprintf("conditions: from %x to %s", first.Conditions(), theFile))
	e := a.wantDone(a.hold(a.plan("policy", allGrants+"\nconditions: configuration"), a.ben, a.cleo))
	if e.Before.Conditions != fmt.Sprintf("%x", first.Conditions()) || e.After.Conditions != "" {
		t.Errorf("evidence: got conditions %q and then %q", e.Before.Conditions, e.After.Conditions)
	}
	wantErr(t, "a plan that stood on other conditions", a.execute(info), custodian.ErrCeremonyState)
	wantErr(t, "any load, once they are given back", a.c.SetPolicy(ctx, none), nil)
	a.whole()
}

// A genesis that the configuration could not serve is refused before anything
// is made.
func TestGenesisConditions(t *testing.T) {
	a := &assembly{world: bareWorld(t), anna: newSignatory(t, "anna", false), ben: newSignatory(t, "ben", true), cleo: newSignatory(t, "cleo", false),
		rita: newSignatory(t, "rita", true), ron: newSignatory(t, "ron", false)}
	a.openParts()
	signed := testConditions().policy(t)
	spec := custodian.InitSpec{Genesis: a.genesisOf(t, a.genesisText()+fmt.Sprintf("\nconditions: %x", signed.Conditions()))}
	wantErr(t, "init with other conditions", custodian.Init(t.Context(), a.cfg, spec), custodian.ErrConditions)
	a.cfg.Policy = signed
	wantErr(t, "init", custodian.Init(t.Context(), a.cfg, spec), nil)
	a.reopen()
	wantErr(t, "a load of other conditions", a.c.SetPolicy(t.Context(), testPolicy(t)), custodian.ErrConditions)
}
