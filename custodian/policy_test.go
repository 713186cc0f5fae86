package custodian_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/keycustody/custodian/custodian"
)

const (
	lowestState  = custodian.State(0)
	highestState = custodian.StateDestroyed + 1 // which is none
)

func TestUsable(t *testing.T) {
	const protect, process = custodian.Protect, custodian.Process
	for s := lowestState; s <= highestState; s++ {
		want := map[custodian.Purpose][2]error{ // without and with a decision
			0:       {custodian.ErrKeyState, custodian.ErrKeyState},
			protect: {custodian.ErrKeyState, custodian.ErrKeyState},
			process: {custodian.ErrKeyState, custodian.ErrKeyState},
		}
		switch s {
		case custodian.StateActive:
			want[protect], want[process] = [2]error{}, [2]error{}
		case custodian.StateDeactivated:
			want[process] = [2]error{}
		case custodian.StateCompromised:
			no := custodian.ErrKeyCompromised
			want[0], want[protect], want[process] = [2]error{no, no}, [2]error{no, no}, [2]error{no, nil}
		case custodian.StateDestroyed:
			no := custodian.ErrKeyDestroyed
			want[0], want[protect], want[process] = [2]error{no, no}, [2]error{no, no}, [2]error{no, no}
		}
		for p, errs := range want {
			for i, decided := range []bool{false, true} {
				wantErr(t, fmt.Sprintf("state %s, purpose %d, decided %v", s, p, decided), custodian.Usable(s, p, decided), errs[i])
			}
		}
	}
}

// SP 800-57 part 1, figure 6: nothing comes back from compromised or
// destroyed, and what was active is never destroyed without a stop between.
func TestCanBecome(t *testing.T) {
	names := map[custodian.State]string{1: "P", 2: "A", 3: "S", 4: "D", 5: "C", 6: "X"}
	want := []string{"PA", "PS", "PC", "PX", "AS", "AD", "AC", "SA", "SD", "SC", "DC", "DX", "CX"}
	var got []string
	for from := lowestState; from <= highestState; from++ {
		for to := lowestState; to <= highestState; to++ {
			if from.CanBecome(to) {
				got = append(got, names[from]+names[to])
			}
		}
	}
	slices.Sort(want)
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Errorf("transitions: got %v, want %v", got, want)
	}
}

// allowed is DESIGN.md section 6: which role may do what at all.
var allowed = map[custodian.Action]string{
	custodian.ActionIssue:          "packager",
	custodian.ActionReissue:        "packager",
	custodian.ActionRelease:        "drm-provider",
	custodian.ActionCreateCategory: "officer",
	custodian.ActionSetMode:        "officer",
	custodian.ActionReadCategories: "officer operator auditor",
	custodian.ActionReadKeys:       "auditor",
	custodian.ActionReadStatus:     "operator officer auditor",
	custodian.ActionBackup:         "operator",
	"":                             "",
	"release ":                     "",
}

// Decide over role, action, grant, mode and state.
func TestDecide(t *testing.T) {
	pin := [32]byte{7}
	rows := 0
	for _, role := range append([]custodian.Role{"", "root"}, custodian.Roles...) {
		for _, granted := range []string{"all", "movies", "series", "all, with reissue"} {
			grant := custodian.Grant{Identity: "who", Role: role, AllCategories: strings.HasPrefix(granted, "all"), Reissue: granted == "all, with reissue", SPKI: &pin}
			if !grant.AllCategories {
				grant.Categories = []custodian.CategoryName{custodian.CategoryName(granted)}
			}
			p, err := custodian.NewPolicy([]custodian.Grant{grant})
			if !slices.Contains(custodian.Roles, role) {
				if err == nil || p != nil {
					t.Errorf("role %q is granted", role)
				}
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			who := custodian.Caller{ID: "who", Roles: []custodian.Role{role}, SPKI: pin}
			for action, roles := range allowed {
				may := slices.Contains(strings.Fields(roles), string(role)) && granted != "series" && (action != custodian.ActionReissue || grant.Reissue)
				for _, r := range resources() {
					want := custodian.ErrDenied
					if may {
						want = unusable(action, r)
					}
					d := p.Decide(custodian.Request{Caller: who, Action: action, Resource: r})
					what := fmt.Sprintf("%s, granted %s, %s of %+v", role, granted, action, r)
					wantErr(t, what, d.Err, want)
					if d.Allow != (want == nil) {
						t.Errorf("%s: got allow %v with %v", what, d.Allow, d.Err)
					}
					if want == nil && len(d.Rules) != 1 {
						t.Errorf("%s: it is allowed by %q, want one grant", what, d.Rules)
					}
					rows++
				}
			}
		}
	}
	if rows < 4000 {
		t.Errorf("%d rows, the table is not whole", rows)
	}
}

// resources are a category in every mode, and keys of it in every mode and
// state. Modes and states that do not exist are among them.
func resources() []custodian.Resource {
	out := []custodian.Resource{{Category: "movies"}}
	for mode := custodian.CategoryMode(0); mode <= 5; mode++ {
		if mode != 0 {
			out = append(out, custodian.Resource{Category: "movies", Mode: mode})
		}
		for state := lowestState; state <= highestState; state++ {
			for _, decided := range []bool{false, true} {
				out = append(out, custodian.Resource{Category: "movies", Mode: mode, IsKey: true, State: state, Decided: decided})
			}
		}
		// One that is about to be made, and one that must be re-keyed first.
		out = append(out, custodian.Resource{Category: "movies", Mode: mode, New: true}, custodian.Resource{Category: "movies", Mode: mode, New: true, Overdue: true},
			custodian.Resource{Category: "movies", Mode: mode, IsKey: true, State: custodian.StateActive, Overdue: true})
	}
	return out
}

// unusable is what a granted caller hears of a resource.
func unusable(a custodian.Action, r custodian.Resource) error {
	uses := map[custodian.Action]custodian.Purpose{custodian.ActionIssue: custodian.Protect, custodian.ActionReissue: custodian.Protect, custodian.ActionRelease: custodian.Process}
	purpose := uses[a]
	switch {
	case purpose == 0 || r == custodian.Resource{Category: "movies"}:
		return nil
	case r.Mode == custodian.CategoryNoNew && r.New && purpose == custodian.Protect:
		return custodian.ErrKeyState
	case r.Mode == custodian.CategoryRekeyRequired && r.Overdue && purpose == custodian.Protect:
		return custodian.ErrKeyCompromised
	case r.Mode != custodian.CategoryOpen && r.Mode != custodian.CategoryNoNew && r.Mode != custodian.CategoryRekeyRequired:
		return custodian.ErrCategoryFrozen
	case !r.IsKey:
		return nil
	}
	return custodian.Usable(r.State, purpose, r.Decided) // TestUsable has its table
}

func TestDecideRefuses(t *testing.T) {
	pin := [32]byte{7}
	p, err := custodian.NewPolicy([]custodian.Grant{
		{Identity: "officer", Role: custodian.RoleOfficer, AllCategories: true, SPKI: &pin},
		{Identity: "provider", Role: custodian.RoleProvider, Categories: []custodian.CategoryName{"movies"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	var zero custodian.Policy
	freeze := custodian.Request{Caller: custodian.Caller{ID: "officer", Roles: custodian.Roles, SPKI: pin}, Action: custodian.ActionSetMode, Resource: custodian.Resource{Category: "movies"}}
	release := custodian.Request{Caller: custodian.Caller{ID: "provider", Roles: custodian.Roles}, Action: custodian.ActionRelease, Resource: custodian.Resource{Category: "movies"}}
	with := func(r custodian.Request, f func(*custodian.Request)) custodian.Request { f(&r); return r }
	for _, test := range []struct {
		what string
		p    *custodian.Policy
		r    custodian.Request
		want bool
	}{
		{"an officer", p, freeze, true},
		{"a provider", p, release, true},
		{"no policy", nil, release, false},
		{"the zero policy", &zero, release, false},
		{"the zero request", p, custodian.Request{}, false},
		{"the zero caller", p, with(release, func(r *custodian.Request) { r.Caller = custodian.Caller{} }), false},
		{"an officer without a pin", p, with(freeze, func(r *custodian.Request) { r.Caller.SPKI = [32]byte{} }), false},
		{"an officer with another key", p, with(freeze, func(r *custodian.Request) { r.Caller.SPKI[31]++ }), false},
		{"a CA that vouches for no role", p, with(release, func(r *custodian.Request) { r.Caller.Roles = nil }), false},
		{"a CA that vouches for another role", p, with(release, func(r *custodian.Request) { r.Caller.Roles = []custodian.Role{custodian.RolePackager} }), false},
		{"an officer whose CA vouches for operators", p, with(freeze, func(r *custodian.Request) { r.Caller.Roles = []custodian.Role{custodian.RoleOperator} }), false},
		{"another category", p, with(release, func(r *custodian.Request) { r.Resource.Category = "series" }), false},
		{"another identity", p, with(release, func(r *custodian.Request) { r.Caller.ID = "provider2" }), false},
	} {
		d := test.p.Decide(test.r)
		if d.Allow != test.want || (d.Err == nil) != test.want {
			t.Errorf("%s: got allow %v with %v, want %v", test.what, d.Allow, d.Err, test.want)
		}
		if !test.want && !errors.Is(d.Err, custodian.ErrDenied) {
			t.Errorf("%s: got %v, want ErrDenied", test.what, d.Err)
		}
	}
	if d := (custodian.Decision{}); d.Allow || d.KnowIt {
		t.Error("the zero decision allows")
	}
}

func TestNewPolicyFaults(t *testing.T) {
	p, err := custodian.NewPolicy([]custodian.Grant{
		{Identity: "good", Role: custodian.RoleProvider, AllCategories: true},
		{Role: custodian.RoleProvider, AllCategories: true},
		{Identity: "b", Role: "king", AllCategories: true},
		{Identity: "c", Role: custodian.RoleOfficer, AllCategories: true},
		{Identity: "d", Role: custodian.RoleProvider},
		{Identity: "e", Role: custodian.RoleProvider, Categories: []custodian.CategoryName{"Movies"}},
		{Identity: "f", Role: custodian.RoleOfficer, AllCategories: true, SPKI: &[32]byte{1}},
		{Identity: "f", Role: custodian.RoleOperator},
	})
	if err == nil || p != nil {
		t.Fatalf("got %v and %v, want faults and no policy", p, err)
	}
	for _, place := range []string{"grants[1]: identity", "grants[2]: role", "grants[3]: officer c", "grants[4]: d as drm-provider", `grants[5]: category "Movies"`, "f: is officer and operator"} {
		if !strings.Contains(err.Error(), place) {
			t.Errorf("faults do not name %q:\n%v", place, err)
		}
	}
	if strings.Contains(err.Error(), "grants[0]") {
		t.Errorf("a good grant is a fault:\n%v", err)
	}
	if p, err := custodian.NewPolicy(nil); err == nil || p != nil {
		t.Errorf("an empty table: got %v and %v, want a fault", p, err)
	}
}

func TestPolicyDigest(t *testing.T) {
	grants := []custodian.Grant{
		{Identity: "a", Role: custodian.RoleProvider, Categories: []custodian.CategoryName{"movies", "series"}},
		{Identity: "b", Role: custodian.RolePackager, AllCategories: true},
	}
	digest := func(f func(g []custodian.Grant)) [32]byte {
		g := slices.Clone(grants)
		f(g)
		p, err := custodian.NewPolicy(g)
		if err != nil {
			t.Fatal(err)
		}
		return p.Digest()
	}
	base := digest(func([]custodian.Grant) {})
	if digest(func(g []custodian.Grant) { slices.Reverse(g) }) != base {
		t.Error("the order of grants changes the digest")
	}
	for what, f := range map[string]func(g []custodian.Grant){
		"identity":   func(g []custodian.Grant) { g[0].Identity = "c" },
		"role":       func(g []custodian.Grant) { g[0].Role = custodian.RoleAuditor },
		"categories": func(g []custodian.Grant) { g[0].Categories = g[0].Categories[:1] },
		"all":        func(g []custodian.Grant) { g[0].AllCategories = true },
		"reissue":    func(g []custodian.Grant) { g[1].Reissue = true },
		"pin":        func(g []custodian.Grant) { g[1].SPKI = &[32]byte{1} },
	} {
		if digest(f) == base {
			t.Errorf("another %s has the same digest", what)
		}
	}
}

func TestSetPolicy(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	kid := w.issue("movies", "film-1", "SD")[0].KID
	next, err := custodian.NewPolicy([]custodian.Grant{{Identity: provider.ID, Role: custodian.RoleProvider, Categories: []custodian.CategoryName{"series"}}})
	if err != nil {
		t.Fatal(err)
	}

	w.breaker.down("audit.Sync")
	wantErr(t, "set a policy that cannot be written down", w.c.SetPolicy(t.Context(), next), custodian.ErrAuditBlocked)
	w.breaker.disarm()
	w.reopen()
	wantErr(t, "release under the policy of before", w.release(provider, kid), nil)

	from := w.log.Size()
	wantErr(t, "set a policy", w.c.SetPolicy(t.Context(), next), nil)
	wantErr(t, "release under the new policy", w.release(provider, kid), custodian.ErrDenied)
	digest := fmt.Sprintf("%x", next.Digest())
	if e := w.entries(from); e[0].Action != "policy.load" || !strings.Contains(e[0].Detail, digest) {
		t.Errorf("audit: got %q %q, want the load of %s", e[0].Action, e[0].Detail, digest)
	}
}
