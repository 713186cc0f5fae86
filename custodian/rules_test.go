package custodian_test

import (
	"fmt"
	goast "go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	jose "github.com/go-jose/go-jose/v4"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/audit"
)

const exampleRules = "../deploy/rules-example.cedar"

func rulesOf(text string) []custodian.RulesFile {
	return []custodian.RulesFile{{Name: "rules.cedar", Text: []byte(text)}}
}

// TestExampleRules: each example rule with what it leaves alone and what it
// forbids.
func TestExampleRules(t *testing.T) {
	text, err := os.ReadFile(exampleRules)
	if err != nil {
		t.Fatal(err)
	}
	hardware := &custodian.TokenClaims{Issuer: playback, Session: "s", Viewer: custodian.Viewer{SecurityLevel: "L1"}}
	software := &custodian.TokenClaims{Issuer: playback, Session: "s", Viewer: custodian.Viewer{SecurityLevel: "L3"}}
	region := func(r string) *custodian.TokenClaims {
		return &custodian.TokenClaims{Issuer: playback, Session: "s", Viewer: custodian.Viewer{Region: r}}
	}
	key := func(category, track string) custodian.ContentKey {
		return custodian.ContentKey{NaturalKey: custodian.NaturalKey{Category: custodian.CategoryName(category), ContentID: custodian.ContentID("film"), TrackType: custodian.TrackType(track), Scheme: "cenc", Generation: 1}}
	}
	const trainee = "spiffe://video.example.com/packager/trainee"
	now := time.Date(2027, 6, 1, 0, 0, 0, 0, time.UTC)
	tried := map[string][2]bool{}
	for _, q := range []struct {
		name string
		ask  custodian.RulesQuestion
		want string // the rule that forbids; "": none
		of   string // the rule that leaves it alone
	}{
		{"UHD on hardware", custodian.RulesQuestion{Key: key("movies", "UHD1"), Token: hardware}, "", "uhd-needs-hardware"},
		{"UHD on software", custodian.RulesQuestion{Key: key("movies", "UHD1"), Token: software}, "uhd-needs-hardware", ""},
		{"UHD on hardware that only the caller asserts", custodian.RulesQuestion{Key: key("movies", "UHD2"), Asserted: custodian.Viewer{SecurityLevel: "L1"}}, "uhd-needs-hardware", ""},
		{"HD without a token", custodian.RulesQuestion{Key: key("movies", "HD")}, "", "uhd-needs-hardware"},
		{"a partner's own track", custodian.RulesQuestion{Caller: "callback.partner-b.example", Key: key("conference", "partner-b.slides")}, "", "partner-b-tracks"},
		{"another partner's track", custodian.RulesQuestion{Caller: "callback.partner-b.example", Key: key("conference", "partner-c.slides")}, "partner-b-tracks", ""},
		{"that track for another caller", custodian.RulesQuestion{Key: key("conference", "partner-c.slides")}, "", "partner-b-tracks"},
		{"within territory and window", custodian.RulesQuestion{Key: key("nordic", "HD"), Token: region("SE")}, "", "nordic-window"},
		{"another territory", custodian.RulesQuestion{Key: key("nordic", "HD"), Token: region("DE")}, "nordic-window", ""},
		{"a territory that only the caller asserts", custodian.RulesQuestion{Key: key("nordic", "HD"), Asserted: custodian.Viewer{Region: "SE"}}, "nordic-window", ""},
		{"after the window", custodian.RulesQuestion{Key: key("nordic", "HD"), Token: region("SE"), Now: time.Date(2027, 12, 31, 23, 0, 0, 0, time.UTC)}, "nordic-window", ""},
		{"before the embargo ends", custodian.RulesQuestion{Key: key("premiere", "HD"), Now: time.Date(2027, 3, 1, 18, 59, 59, 0, time.UTC)}, "premiere-embargo", ""},
		{"when it ends", custodian.RulesQuestion{Key: key("premiere", "HD"), Now: time.Date(2027, 3, 1, 19, 0, 0, 0, time.UTC)}, "", "premiere-embargo"},
		{"the trainee's trailers", custodian.RulesQuestion{Caller: trainee, Action: custodian.ActionIssue, Key: key("trailers", "")}, "", "trainee-packager"},
		{"the trainee's movies", custodian.RulesQuestion{Caller: trainee, Action: custodian.ActionReissue, Key: key("movies", "")}, "trainee-packager", ""},
	} {
		ask := q.ask
		if ask.Action == "" {
			ask.Action = custodian.ActionRelease
		}
		if ask.Caller == "" {
			ask.Caller = "callback.partner-a.example"
		}
		if ask.Now.IsZero() {
			ask.Now = now
		}
		got, err := custodian.TryRules(rulesOf(string(text)), ask)
		if err != nil {
			t.Fatal(err)
		}
		var want []string
		seen := tried[q.want+q.of]
		if q.want != "" {
			want = []string{q.want}
			seen[1] = true
		} else {
			seen[0] = true
		}
		tried[q.want+q.of] = seen
		if !slices.Equal(got, want) {
			t.Errorf("%s: forbidden by %q, want %q", q.name, got, want)
		}
	}
	if n := strings.Count(string(text), "@id("); n != len(tried) || n < 5 {
		t.Errorf("%d rules in the examples, %d were tried", n, len(tried))
	}
	for rule, seen := range tried {
		if seen != [2]bool{true, true} {
			t.Errorf("%s: tried leaving alone %v, forbidding %v; want both", rule, seen[0], seen[1])
		}
	}
}

// TestRulesFaults: what is not loaded, and why.
func TestRulesFaults(t *testing.T) {
	p := testPolicy(t)
	const head = `@id("a") forbid (principal, action == Custodian::Action::"release", resource)`
	for name, test := range map[string]struct{ text, want string }{
		"no Cedar":                        {"nonsense", "rules.cedar"},
		"no id":                           {`forbid (principal, action, resource);`, "has no @id"},
		"an id twice":                     {head + ";" + head + ";", `@id "a" is that of rules.cedar:1 too`},
		"an id with a line break":         {strings.Replace(head, `"a"`, `"a\nb"`, 1) + ";", "printable ASCII"},
		"a permit":                        {`@id("a") permit (principal, action, resource);`, "rule a permits: rules only forbid"},
		"an unknown action":               {`@id("a") forbid (principal, action == Custodian::Action::"relese", resource);`, "rule a"},
		"an unknown attribute":            {head + ` when { resource.tracktype == "HD" };`, "tracktype"},
		"an attribute that may be absent": {head + ` when { context.token.viewer.region == "SE" };`, "token"},
		"another type":                    {head + ` when { resource.track_type > 3 };`, "rule a"},
		"asserted taken for signed":       {head + ` when { context.asserted.session == "x" };`, "session"},
	} {
		got, err := p.WithRules(rulesOf(test.text))
		if err == nil || got != nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: got %v, want an error that says %q", name, err, test.want)
		}
	}
	_, err := p.WithRules(append(rulesOf(`@id("a") permit (principal, action, resource);`), custodian.RulesFile{Name: "other.cedar", Text: []byte("nonsense")}))
	if err == nil || !strings.Contains(err.Error(), "rules.cedar:1") || !strings.Contains(err.Error(), "other.cedar") {
		t.Errorf("two faults: got %v, want both", err)
	}
	ruled, err := p.WithRules(rulesOf(head + ";"))
	if err != nil {
		t.Fatal(err)
	}
	if ruled.Digest() == p.Digest() {
		t.Error("the digest does not cover the rules")
	}
	// No grants, no rules, nothing: all refused.
	for _, empty := range []*custodian.Policy{nil, {}} {
		if d := empty.Decide(custodian.Request{Caller: provider, Action: custodian.ActionRelease}); d.Allow || d.Err == nil {
			t.Errorf("an empty policy: got %+v", d)
		}
	}
	none, err := new(custodian.Policy).WithRules(nil)
	if err != nil {
		t.Fatal(err)
	}
	if d := none.Decide(custodian.Request{Caller: provider, Action: custodian.ActionRelease}); d.Allow {
		t.Error("an empty set of grants and rules permits")
	}
}

// TestRules: rules at work, over a release and a restart of the policy.
func TestRules(t *testing.T) {
	w := newTokenWorld(t, func(r *custodian.Tokens) { r.Mode = custodian.TokenOptional })
	rules := `
@id("hd-needs-l1") forbid (principal, action == Custodian::Action::"release", resource)
when { resource.track_type == "HD" }
unless { context has token && context.token.viewer has security_level && context.token.viewer.security_level == "L1" };
@id("overflow") forbid (principal, action == Custodian::Action::"release", resource)
when { resource.track_type == "SD" && resource.generation + 9223372036854775807 > 0 };`
	p, err := w.cfg.Policy.WithRules(rulesOf(rules))
	if err != nil {
		t.Fatal(err)
	}
	if err := w.c.SetPolicy(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	from := w.logSize()
	wantErr(t, "HD without a token", w.show(provider, w.hd, ""), custodian.ErrDenied)
	if e := w.entries(from); len(e) != 1 || e[0].Outcome != audit.Denied || e[0].Detail != "forbidden by hd-needs-l1" {
		t.Errorf("the audit log has %+v, want the rule", e)
	}
	l1 := map[string]any{"viewer": map[string]string{"security_level": "L1"}}
	wantErr(t, "HD with a token for L1", w.show(provider, w.hd, w.token(l1)), nil)
	wantErr(t, "HD with a token for L3", w.show(provider, w.hd, w.token(map[string]any{"viewer": map[string]string{"security_level": "L3"}})), custodian.ErrDenied)
	wantErr(t, "HD with L1 asserted", w.ask(provider, custodian.RetrieveRequest{KIDs: []custodian.KID{w.hd}, Asserted: custodian.Viewer{SecurityLevel: "L1"}}), custodian.ErrDenied)
	// A token that is not believed counts for nothing, also where it says L1.
	wantErr(t, "HD with a forged token for L1", w.show(provider, w.hd, newSigner(t, jose.ES256, "k1").sign(w.claims())), custodian.ErrDenied)
	// A rule that cannot be evaluated forbids.
	wantErr(t, "SD, where the rule overflows", w.show(provider, w.sd, ""), custodian.ErrDenied)
	wantErr(t, "a long assertion", w.ask(provider, custodian.RetrieveRequest{KIDs: []custodian.KID{w.hd}, Asserted: custodian.Viewer{Region: strings.Repeat("x", 65)}}), custodian.ErrInvalid)
	// Rules take away, and when they go what the grants permit is there again.
	if err := w.c.SetPolicy(t.Context(), w.cfg.Policy); err != nil {
		t.Fatal(err)
	}
	wantErr(t, "HD without rules", w.show(provider, w.hd, ""), nil)
	wantErr(t, "nobody without rules", w.show(nobody, w.hd, ""), custodian.ErrDenied)

	// Rules about issuing.
	p, err = w.cfg.Policy.WithRules(rulesOf(fmt.Sprintf(`@id("no-series") forbid (principal == Custodian::Caller::%q, action in [Custodian::Action::"issue", Custodian::Action::"reissue"], resource == Custodian::Category::"series");`, packager.ID)))
	if err != nil {
		t.Fatal(err)
	}
	w.category("series")
	if err := w.c.SetPolicy(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	_, err = w.c.Issue(t.Context(), packager, ask("series", "pilot", "HD"))
	wantErr(t, "issue in a forbidden category", err, custodian.ErrDenied)
	w.issue("movies", "film", "HD")
	if keys, err := w.c.Issue(t.Context(), patient, ask("series", "pilot", "HD")); err != nil {
		t.Errorf("another packager: %v", err)
	} else {
		keys[0].Key.Destroy()
	}
}

// TestOneDecision walks the sources: what opens a content key, and what decides,
// is called from where it is known to be called, so that no front door reaches a
// key around Decide. Who adds a call looks here first.
func TestOneDecision(t *testing.T) {
	calls := map[string][]string{} // what is called, to the functions that call it
	root := ".."
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (d.Name() == "bin" || d.Name() == "testservers" || d.Name() == "tools" || d.Name() == ".git" || d.Name() == "custodiantest" || d.Name() == "bench") {
			return filepath.SkipDir
		}
		if !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return nil
		}
		return collectCalls(path, calls)
	})
	if err != nil {
		t.Fatal(err)
	}
	for what, want := range map[string][]string{
		// The CEK in clear, and what is handed over.
		"openCEK":   {"custodian.export", "custodian.handOutAgain", "custodian.openHot", "custodian.sealAnew", "custodian.verifyKey"},
		"openHot":   {"custodian.release"},
		"authorize": {"custodian.Decide", "custodian.TryRules"},
		"Decide":    {"custodian.KeyPeriods", "custodian.decideLeaving", "custodian.decideRelease", "main.earlyStatus"},
		"mayLeave":  {"custodian.Decide"},
		// The front doors. internal/rpc TestEveryDoor knocks at each.
		"Retrieve": {"kms.credentials" /* of the AWS SDK */, "rpc.GetContentKeys"},
		"Issue":    {"packager.issue", "rpc.Issue", "rpc.IssueContentKeys"},
		"Export":   {"main.auditExportCmd" /* of the audit log */, "rpc.ExportContentKeys"},
	} {
		got := slices.Compact(slices.Sorted(slices.Values(calls[what])))
		if !goast.IsExported(what) { // unexported: what another package calls so is another function
			got = slices.DeleteFunc(got, func(caller string) bool { return !strings.HasPrefix(caller, "custodian.") })
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s is called by %q, want %q: is what is new behind the decision?", what, got, want)
		}
	}
}

func BenchmarkDecide(b *testing.B) {
	examples, err := os.ReadFile(exampleRules)
	if err != nil {
		b.Fatal(err)
	}
	plain, err := custodian.NewPolicy([]custodian.Grant{{Identity: provider.ID, Role: custodian.RoleProvider, Categories: []custodian.CategoryName{"movies", "series"}}})
	if err != nil {
		b.Fatal(err)
	}
	ruled, err := plain.WithRules(rulesOf(string(examples)))
	if err != nil {
		b.Fatal(err)
	}
	now := time.Unix(1_800_000_000, 0)
	req := custodian.Request{Caller: provider, Action: custodian.ActionRelease, Now: now, Asserted: custodian.Viewer{DRMSystem: "widevine", SecurityLevel: "L1", Region: "SE"},
		Resource: custodian.Resource{Category: "movies", Mode: custodian.CategoryOpen, IsKey: true, State: custodian.StateActive,
			Key: &custodian.ContentKey{NaturalKey: custodian.NaturalKey{Category: "movies", ContentID: custodian.ContentID("film"), TrackType: "HD", Scheme: "cenc"}, KID: custodian.KID{1}, CreateTime: now}}}
	for _, test := range []struct {
		name string
		p    *custodian.Policy
	}{{"grants", plain}, {"rules", ruled}} {
		b.Run(test.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if d := test.p.Decide(req); !d.Allow {
					b.Fatal(d.Err, d.Rules)
				}
			}
		})
	}
}

// collectCalls notes for each call in a file which function makes it, as
// package.function.
func collectCalls(path string, calls map[string][]string) error {
	f, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
	if err != nil {
		return err
	}
	for _, decl := range f.Decls {
		fn, ok := decl.(*goast.FuncDecl)
		if !ok {
			continue
		}
		goast.Inspect(fn, func(n goast.Node) bool {
			call, ok := n.(*goast.CallExpr)
			if !ok {
				return true
			}
			name := ""
			switch called := call.Fun.(type) {
			case *goast.SelectorExpr:
				name = called.Sel.Name
			case *goast.Ident:
				name = called.Name
			}
			calls[name] = append(calls[name], f.Name.Name+"."+fn.Name.Name)
			return true
		})
	}
	return nil
}
