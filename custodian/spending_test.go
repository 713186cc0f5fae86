package custodian_test

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/audit"
)

// A budgetWorld is a world with 40 keys in movies and 10 in series, whose callers
// have budgets.
type budgetWorld struct {
	*world
	movies, series []custodian.KID

	mu   sync.Mutex
	told []custodian.Incident
}

func newBudgetWorld(t *testing.T, budgets ...custodian.Budget) *budgetWorld {
	t.Helper()
	w := &budgetWorld{world: bareWorld(t)}
	w.cfg.OnIncident = func(i custodian.Incident) {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.told = append(w.told, i)
	}
	w.openParts()
	if err := custodian.Init(t.Context(), w.cfg, custodian.InitSpec{}); err != nil {
		t.Fatal(err)
	}
	w.reopen()
	w.category("movies")
	w.category("series")
	for i := range 4 {
		for _, k := range w.issue("movies", fmt.Sprintf("film-%d", i), "SD", "HD", "UHD1", "UHD2", "AUDIO", "a", "b", "c", "d", "e") {
			w.movies = append(w.movies, k.KID)
		}
	}
	for _, k := range w.issue("series", "show", "SD", "HD", "UHD1", "UHD2", "AUDIO", "a", "b", "c", "d", "e") {
		w.series = append(w.series, k.KID)
	}
	p, err := testPolicy(t).WithBudgets(budgets)
	if err != nil {
		t.Fatal(err)
	}
	w.cfg.Policy = p
	w.reopen()
	return w
}

// take releases keys one by one, and returns how many came and the first refusal.
func (w *budgetWorld) take(who custodian.Caller, kids ...custodian.KID) (n int, first error) {
	w.t.Helper()
	for _, kid := range kids {
		err := w.release(who, kid)
		if err == nil {
			n++
		} else if first == nil {
			first = err
		}
	}
	return n, first
}

func (w *budgetWorld) wantTold(kinds ...custodian.IncidentKind) {
	w.t.Helper()
	w.c.TickBudgets(w.t.Context())
	w.mu.Lock()
	defer w.mu.Unlock()
	var got []custodian.IncidentKind
	for _, i := range w.told {
		got = append(got, i.Kind)
		if i.Caller == "" || i.Closed.IsZero() || i.LastError == "" || i.ID == "" {
			w.t.Errorf("told %+v, want it whole", i)
		}
	}
	if !slices.Equal(got, kinds) {
		w.t.Errorf("people were told %v, want %v", got, kinds)
	}
	w.told = nil
}

func (w *budgetWorld) wantFrozen(callers ...string) {
	w.t.Helper()
	list, err := w.c.FrozenCallers(w.t.Context(), operator)
	if err != nil {
		w.t.Fatal(err)
	}
	var got []string
	for _, f := range list {
		got = append(got, f.Identity)
	}
	if !slices.Equal(got, callers) {
		w.t.Errorf("frozen: %v, want %v", got, callers)
	}
}

func (w *budgetWorld) lift(identity string) {
	w.t.Helper()
	if _, err := w.c.LiftCaller(w.t.Context(), officer, custodian.FreezeCallerRequest{Identity: identity, Cause: "we looked"}); err != nil {
		w.t.Fatal(err)
	}
}

var hourly = []custodian.Budget{
	{Caller: "*", Action: custodian.ActionRelease, Window: time.Hour, SoftKIDs: 10, HardKIDs: 20},
	{Caller: "*", Action: custodian.ActionReissue, Window: time.Hour, SoftKIDs: 15, HardKIDs: 25},
}

// TestBudget: a caller gets as many different keys as its hard budget says,
// people hear of it on the way, and then it is frozen. Others are not.
func TestBudget(t *testing.T) {
	w := newBudgetWorld(t, hourly...)
	for range 5 { // one key often is one key
		if n, err := w.take(narrow, w.movies[:10]...); n != 10 || err != nil {
			t.Fatalf("got %d keys and %v", n, err)
		}
	}
	w.wantTold()
	w.take(narrow, w.movies[10])
	w.wantTold(custodian.IncidentBudgetSoft)
	w.take(narrow, w.movies[:20]...)
	w.wantTold()
	w.wantFrozen()
	if n, err := w.take(narrow, w.movies[:20]...); n != 20 || err != nil {
		t.Errorf("the keys that it has: got %d and %v", n, err)
	}

	from := w.logSize()
	n, err := w.take(narrow, w.movies[20:]...)
	wantErr(t, "the key above the budget", err, custodian.ErrKIDBudget)
	if n != 0 {
		t.Errorf("%d keys above the budget", n)
	}
	wantErr(t, "a key that it has, now", w.release(narrow, w.movies[0]), custodian.ErrCallerFrozen)
	entries := w.entries(from)
	if e := entries[0]; e.Outcome != audit.Denied || e.Reason != "KID_BUDGET" || e.Caller != narrow.ID {
		t.Errorf("the log begins with %+v, want the refusal", e)
	}
	if e := entries[1]; e.Action != "caller.freeze" || !strings.HasPrefix(e.Detail, narrow.ID+" budget release in all categories: 20 different KIDs in 1h0m0s") || len(e.ControlDigest) == 0 {
		t.Errorf("the log goes on with %+v, want the freeze", e)
	}
	w.wantFrozen(narrow.ID)
	w.wantTold(custodian.IncidentCallerFrozen)
	if n, err := w.take(provider, w.movies[:20]...); n != 20 || err != nil {
		t.Errorf("another caller: got %d and %v", n, err)
	}
	w.wantTold(custodian.IncidentBudgetSoft)
	w.reopen()
	wantErr(t, "after a restart", w.release(narrow, w.movies[0]), custodian.ErrCallerFrozen)

	// Lifted, it begins anew, and so it does after a restart.
	w.lift(narrow.ID)
	for range 2 {
		if n, err := w.take(narrow, w.movies[:10]...); n != 10 || err != nil {
			t.Errorf("after the lift: got %d and %v", n, err)
		}
		w.reopen()
	}
	w.wantFrozen()
	w.wantTold()
	if n, err := w.take(narrow, w.movies[10:]...); n != 10 {
		t.Errorf("after the lift: %d more keys and %v, want 10", n, err)
	}
	w.wantFrozen(narrow.ID)
	// Without a restart between, too.
	w.lift(narrow.ID)
	if n, err := w.take(narrow, w.movies...); n != 20 {
		t.Errorf("after the second lift: %d keys and %v, want 20", n, err)
	}
	w.wantFrozen(narrow.ID)
}

// TestBudgetOfACall: what is above the budget in one call is refused, the rest
// answered, and the caller is frozen with it.
func TestBudgetOfACall(t *testing.T) {
	w := newBudgetWorld(t, hourly...)
	res, err := w.c.Retrieve(t.Context(), provider, custodian.RetrieveRequest{KIDs: append(slices.Clone(w.movies[:15]), w.series...)})
	if err != nil {
		t.Fatal(err)
	}
	for i, r := range res {
		want := error(nil)
		if i >= 20 {
			want = custodian.ErrKIDBudget
		}
		wantErr(t, fmt.Sprintf("key %d", i), r.Err, want)
		r.Key.Destroy()
	}
	w.wantFrozen(provider.ID)
	w.noneInClear()
}

// TestBudgetOfACategory: a budget of one category beside one of all, and a caller
// with budgets of its own, which has none of all callers'.
func TestBudgetOfACategory(t *testing.T) {
	w := newBudgetWorld(t, append([]custodian.Budget{
		{Caller: "*", Action: custodian.ActionRelease, Category: "series", Window: time.Hour, HardKIDs: 5},
		{Caller: narrow.ID, Action: custodian.ActionRelease, Category: "movies", Window: time.Hour, HardKIDs: 30},
	}, hourly...)...)
	if n, err := w.take(narrow, w.movies...); n != 30 {
		t.Errorf("a budget of its own: got %d and %v, want 30", n, err)
	}
	if n, _ := w.take(provider, w.movies[:12]...); n != 12 {
		t.Errorf("movies: got %d, want 12", n)
	}
	if n, _ := w.take(provider, w.series...); n != 5 {
		t.Errorf("series: got %d, want 5", n)
	}
	w.wantFrozen(narrow.ID, provider.ID)
}

// TestBudgetWindow: a KID counts for one window at least, and for two at most.
func TestBudgetWindow(t *testing.T) {
	w := newBudgetWorld(t, hourly...)
	w.take(provider, w.movies[:10]...)
	w.advance(59 * time.Minute)
	w.take(provider, w.movies[10:20]...)
	w.advance(2 * time.Minute)
	w.take(provider, w.movies[:20]...) // they are known
	w.wantFrozen()
	w.advance(2*time.Hour - time.Second)
	w.reopen()
	if n, err := w.take(provider, w.movies[20:]...); n != 20 || err != nil {
		t.Errorf("when all are forgotten: got %d and %v, want 20", n, err)
	}
	w.advance(time.Hour - 2*time.Second)
	w.reopen()
	if n, _ := w.take(provider, w.movies[0]); n != 0 {
		t.Error("a restart within the window forgot what was taken")
	}
	w.wantFrozen(provider.ID)
}

// TestBudgetReissue: a packager that walks a content list gets what the budget of
// re-issues says, and all of a call or nothing. New keys are nobody's loss.
func TestBudgetReissue(t *testing.T) {
	w := newBudgetWorld(t, hourly...)
	walk := func(i int) error {
		keys, err := w.c.Issue(t.Context(), packager, ask("movies", fmt.Sprintf("film-%d", i), "SD", "HD", "UHD1", "UHD2", "AUDIO", "a", "b", "c", "d", "e"))
		for _, k := range keys {
			k.Key.Destroy()
		}
		return err
	}
	w.fill("movies", "fresh", 30)
	wantErr(t, "10 keys", walk(0), nil)
	w.reopen()
	wantErr(t, "20 keys", walk(1), nil)
	wantErr(t, "20 keys once more", walk(0), nil)
	w.wantTold(custodian.IncidentBudgetSoft)
	from := w.logSize()
	wantErr(t, "30 keys", walk(2), custodian.ErrKIDBudget)
	if e := w.entries(from)[0]; e.Outcome != audit.Denied || e.Reason != "KID_BUDGET" || e.ContentID == nil {
		t.Errorf("the log has %+v, want the refusal", e)
	}
	w.wantFrozen(packager.ID)
	w.wantTold(custodian.IncidentCallerFrozen)
	wantErr(t, "frozen", walk(0), custodian.ErrCallerFrozen)
	keys, err := w.c.Issue(t.Context(), patient, ask("movies", "film-3", "SD"))
	wantErr(t, "another packager", err, nil)
	for _, k := range keys {
		k.Key.Destroy()
	}
	w.noneInClear()
}

// TestBudgetRate: a caller that is too quick is told to come back, is not frozen,
// and people are told once.
func TestBudgetRate(t *testing.T) {
	w := newBudgetWorld(t, custodian.Budget{Caller: "*", Action: custodian.ActionRelease, Window: time.Hour, HardKIDs: 100, Rate: 2}, hourly[1])
	quick := func(n int) (got int, first error) {
		for range n {
			if err := w.release(provider, w.movies[0]); err == nil {
				got++
			} else if first == nil {
				first = err
			}
		}
		return got, first
	}
	n, err := quick(70)
	wantErr(t, "too quick", err, custodian.ErrRate)
	if n != custodian.MaxKIDsPerCall {
		t.Errorf("a burst of %d keys, want %d", n, custodian.MaxKIDsPerCall)
	}
	w.advance(3 * time.Second)
	if n, _ := quick(10); n != 6 {
		t.Errorf("%d keys after 3 s, want 6", n)
	}
	w.wantTold(custodian.IncidentBudgetRate)
	w.wantFrozen()
	w.reopen()
	if n, _ := quick(100); n > custodian.MaxKIDsPerCall {
		t.Errorf("%d keys after a restart, want one more burst", n)
	}
}

// TestBudgetFreezeIsHeldUp: what broke its budget gets nothing while its freeze
// cannot be recorded, and is frozen when it can.
func TestBudgetFreezeIsHeldUp(t *testing.T) {
	w := newBudgetWorld(t, hourly...)
	w.take(provider, w.movies[:20]...)
	w.breaker.down("store.Update")
	wantErr(t, "above the budget", w.release(provider, w.movies[20]), custodian.ErrKIDBudget)
	for _, kid := range w.movies[:3] {
		wantErr(t, "a key that it has", w.release(provider, kid), custodian.ErrKIDBudget)
	}
	if n, _ := w.take(narrow, w.movies[0]); n != 1 {
		t.Error("another caller got nothing")
	}
	w.wantFrozen()
	w.breaker.disarm()
	w.c.TickBudgets(t.Context())
	w.wantFrozen(provider.ID)
	w.wantTold(custodian.IncidentBudgetSoft, custodian.IncidentCallerFrozen)
}

// TestBudgetOfACrowd: calls that run at once get no more than the budget, and
// one freeze.
func TestBudgetOfACrowd(t *testing.T) {
	w := newBudgetWorld(t, hourly...)
	var got sync.Map
	var crowd sync.WaitGroup
	for i := range 8 {
		crowd.Go(func() {
			for j := range w.movies {
				kid := w.movies[(j+5*i)%len(w.movies)]
				if w.release(provider, kid) == nil {
					got.Store(kid, true)
				}
			}
		})
	}
	crowd.Wait()
	n := 0
	got.Range(func(any, any) bool { n++; return true })
	if n != 20 {
		t.Errorf("the crowd got %d different keys, want 20", n)
	}
	w.wantFrozen(provider.ID)
	w.wantTold(custodian.IncidentBudgetSoft, custodian.IncidentCallerFrozen)
	w.reopen()
	w.wantFrozen(provider.ID)
}

// TestBudgetRules: where there are budgets, what none covers is refused,
// and a policy whose grants they make worthless is none.
func TestBudgetRules(t *testing.T) {
	good := custodian.Budget{Caller: "*", Action: custodian.ActionRelease, Window: time.Hour, HardKIDs: 20}
	for name, test := range map[string]struct {
		change func(*custodian.Budget)
		want   string
	}{
		"no caller":         {func(b *custodian.Budget) { b.Caller = "" }, "budgets[0].caller: empty"},
		"no action":         {func(b *custodian.Budget) { b.Action = "" }, `budgets[0].action: "": must be release or reissue`},
		"another action":    {func(b *custodian.Budget) { b.Action = custodian.ActionIssue }, "budgets[0].action:"},
		"no window":         {func(b *custodian.Budget) { b.Window = 0 }, "budgets[0].window: 0s: must be"},
		"a week":            {func(b *custodian.Budget) { b.Window = 7 * 24 * time.Hour }, "budgets[0].window:"},
		"no hard budget":    {func(b *custodian.Budget) { b.HardKIDs = 0 }, "budgets[0].hard_kids: 0: must be"},
		"too much":          {func(b *custodian.Budget) { b.HardKIDs = custodian.MaxBudgetKIDs + 1 }, "budgets[0].hard_kids:"},
		"soft above hard":   {func(b *custodian.Budget) { b.SoftKIDs = 20 }, "budgets[0].soft_kids: 20: must be below"},
		"a negative rate":   {func(b *custodian.Budget) { b.Rate = -1 }, "budgets[0].rate:"},
		"a rate of years":   {func(b *custodian.Budget) { b.Rate = 1e-9 }, "budgets[0].rate: 1e-09: must be 0.001 to"},
		"a category's name": {func(b *custodian.Budget) { b.Category = "No Such" }, "budgets[0].category:"},
		"too narrow":        {func(b *custodian.Budget) { b.Category = "movies" }, `budgets: none covers release by ` + provider.ID + ` in "*"`},
		"none for reissue":  {func(*custodian.Budget) {}, "budgets: none covers reissue by " + packager.ID},
	} {
		b := good
		test.change(&b)
		_, err := testPolicy(t).WithBudgets([]custodian.Budget{b})
		if err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: got %v, want %q", name, err, test.want)
		}
	}
	if _, err := testPolicy(t).WithBudgets([]custodian.Budget{good, good, hourly[1]}); err == nil || !strings.Contains(err.Error(), "budgets[1]: * has another one") {
		t.Errorf("one twice: got %v", err)
	}
	none, err := testPolicy(t).WithBudgets(nil)
	if err != nil || none.Digest() != testPolicy(t).Digest() {
		t.Errorf("no budgets: got another policy, or %v", err)
	}
	some, err := testPolicy(t).WithBudgets(hourly)
	if err != nil || some.Digest() == none.Digest() {
		t.Errorf("budgets: got the same digest, or %v", err)
	}
}

// TestBudgetUse: what the metrics tell of budgets, through windows, a freeze, its
// lift and a restart; and of nobody without a grant.
func TestBudgetUse(t *testing.T) {
	w := newBudgetWorld(t, append([]custodian.Budget{{Caller: provider.ID, Action: custodian.ActionRelease, Category: "movies", Window: time.Hour, HardKIDs: 5},
		{Caller: provider.ID, Action: custodian.ActionRelease, Window: time.Hour, SoftKIDs: 7, HardKIDs: 9}}, hourly...)...)
	want := func(when string, frozen int, lines ...string) {
		t.Helper()
		var got []string
		for _, b := range w.c.BudgetUse() {
			got = append(got, fmt.Sprintf("%s %s %q %d %d %d", strings.TrimPrefix(b.Caller, "spiffe://test/"), b.Action, b.Category, b.KIDs, b.SoftKIDs, b.HardKIDs))
		}
		if !slices.Equal(got, lines) {
			t.Errorf("%s: got %q, want %q", when, got, lines)
		}
		if n := w.c.CallersFrozen(); n != frozen {
			t.Errorf("%s: %d are frozen, want %d", when, n, frozen)
		}
	}
	want("before anything is taken", 0)
	w.take(nobody, w.movies[0])
	w.take(narrow, w.movies[:3]...)
	w.take(provider, w.movies[:2]...)
	w.take(provider, w.series[:4]...)
	for range 2 {
		want("taken", 0, `narrow release "" 3 10 20`, `provider release "" 6 7 9`, `provider release "movies" 2 0 5`)
		w.reopen()
	}
	w.take(provider, w.movies[:6]...)
	want("frozen", 1, `narrow release "" 3 10 20`, `provider release "" 9 7 9`, `provider release "movies" 5 0 5`)
	w.lift(provider.ID)
	want("lifted", 0, `narrow release "" 3 10 20`)
	w.advance(2*time.Hour + time.Second)
	want("when all is forgotten", 0, `narrow release "" 0 10 20`)
}

// TestBudgetIsMended: what a reload says of budgets holds from the next key on:
// another rate, a larger budget, and none that covers a category any more.
func TestBudgetIsMended(t *testing.T) {
	release := func(rate float64, hard int) custodian.Budget {
		return custodian.Budget{Caller: "*", Action: custodian.ActionRelease, Window: time.Hour, HardKIDs: hard, Rate: rate}
	}
	w := newBudgetWorld(t, release(0.01, 100), hourly[1])
	load := func(p *custodian.Policy, err error) {
		t.Helper()
		if err == nil {
			err = w.c.SetPolicy(t.Context(), p)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	w.take(provider, slices.Repeat(w.movies[:1], custodian.MaxKIDsPerCall)...) // the burst
	wantErr(t, "too quick", w.release(provider, w.movies[0]), custodian.ErrRate)
	load(testPolicy(t).WithBudgets([]custodian.Budget{release(1000, 2), hourly[1]}))
	w.advance(time.Second)
	wantErr(t, "with a rate that is mended", w.release(provider, w.movies[1]), nil)
	load(testPolicy(t).WithBudgets([]custodian.Budget{release(0, 4), hourly[1]}))
	if n, _ := w.take(provider, w.movies[:4]...); n != 4 {
		t.Errorf("with a larger budget: got %d, want 4", n)
	}
	w.wantFrozen()
	w.wantTold(custodian.IncidentBudgetRate)
}

// TestNoBudgetCovers: grants and budgets can part where officers decide about the
// one and the configuration has the other. Then what no budget covers is refused,
// nobody is frozen for it, and the log says why.
func TestNoBudgetCovers(t *testing.T) {
	a := newAssembly(t)
	a.category("movies")
	a.category("series")
	film, pilot := a.issue("movies", "film", "SD")[0].KID, a.issue("series", "pilot", "SD")[0].KID
	// The configuration grants less than the officers do, so that it covers all
	// that it knows of.
	p, err := custodian.NewPolicy([]custodian.Grant{{Identity: provider.ID, Role: custodian.RoleProvider, Categories: []custodian.CategoryName{"movies"}}})
	if err == nil {
		p, err = p.WithBudgets([]custodian.Budget{{Caller: "*", Action: custodian.ActionRelease, Category: "movies", Window: time.Hour, HardKIDs: 10}})
	}
	if err != nil {
		t.Fatal(err)
	}
	a.cfg.Policy = p
	a.reopen()
	wantErr(t, "what a budget covers", a.release(provider, film), nil)
	from := a.logSize()
	wantErr(t, "what none covers", a.release(provider, pilot), custodian.ErrKIDBudget)
	if e := a.entries(from); len(e) != 1 || e[0].Outcome != audit.Denied || e[0].Reason != "KID_BUDGET" {
		t.Errorf("the log has %+v, want one denial", e)
	}
	_, err = a.c.Issue(t.Context(), packager, ask("movies", "film", "SD"))
	wantErr(t, "a re-issue, which none covers", err, custodian.ErrKIDBudget)
	if err != nil && !strings.Contains(err.Error(), "no budget covers reissue in category movies") {
		t.Errorf("got %v, want it to say what is not covered", err)
	}
	wantErr(t, "what a budget covers, after that", a.release(provider, film), nil)
	if n := a.c.CallersFrozen(); n != 0 {
		t.Errorf("%d callers are frozen", n)
	}
}
