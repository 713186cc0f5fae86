package custodian

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/keycustody/custodian/internal/audit"
)

// Limits of what a Budget may say.
const (
	MinBudgetWindow = time.Minute
	MaxBudgetWindow = 24 * time.Hour
	MaxBudgetKIDs   = 1_000_000 // some 50 MB of memory
	MinBudgetRate   = 0.001     // keys a second
	MaxBudgetRate   = 1e6
)

// AnyCaller in a Budget stands for each caller that has no budget of its own for
// the action.
const AnyCaller = "*"

// A Budget bounds what one caller takes in one category, or in all together.
// Whoever holds a stolen certificate takes as much as the caller's budgets let
// it, and then nothing.
//
// A KID counts once, however often its key is taken, and for at least a Window
// after it was taken last, for twice that at most.
type Budget struct {
	Caller   string       // identity, or AnyCaller
	Action   Action       // ActionRelease, or ActionReissue: keys that exist, handed to a packager again
	Category CategoryName // empty: all categories together
	Window   time.Duration
	// SoftKIDs alert people, HardKIDs freeze the caller, when it takes more
	// different KIDs. 0 for SoftKIDs: there is no alert before the freeze.
	SoftKIDs, HardKIDs int
	// Rate is how many keys a second may be taken, beside bursts of one second's
	// worth, or of the largest call. 0: any number.
	Rate float64
}

// check says what is wrong with a budget.
func (b Budget) check() error {
	var faults []error
	fault := func(format string, args ...any) { faults = append(faults, fmt.Errorf(format, args...)) }
	if b.Caller == "" {
		fault(`caller: empty; name one, or write "*" for each that has no budget of its own`)
	}
	if b.Action != ActionRelease && b.Action != ActionReissue {
		fault("action: %q: must be %s or %s", b.Action, ActionRelease, ActionReissue)
	}
	if b.Category != "" {
		if err := b.Category.Check(); err != nil {
			fault("category: %w", err)
		}
	}
	if b.Window < MinBudgetWindow || b.Window > MaxBudgetWindow {
		fault("window: %s: must be %s to %s", b.Window, MinBudgetWindow, MaxBudgetWindow)
	}
	if b.HardKIDs < 1 || b.HardKIDs > MaxBudgetKIDs {
		fault("hard_kids: %d: must be 1 to %d", b.HardKIDs, MaxBudgetKIDs)
	}
	if b.SoftKIDs < 0 || b.SoftKIDs >= max(b.HardKIDs, 1) {
		fault("soft_kids: %d: must be below hard_kids, %d, or 0 for no alert", b.SoftKIDs, b.HardKIDs)
	}
	if !(b.Rate == 0 || b.Rate >= MinBudgetRate && b.Rate <= MaxBudgetRate) { // nor NaN
		fault("rate: %g: must be %g to %g, or 0 for any number", b.Rate, MinBudgetRate, MaxBudgetRate)
	}
	return errors.Join(faults...)
}

func (b Budget) String() string {
	where := "all categories"
	if b.Category != "" {
		where = "category " + string(b.Category)
	}
	return fmt.Sprintf("%s in %s: %d different KIDs in %s", b.Action, where, b.HardKIDs, b.Window)
}

// budgetRules are a policy's budgets. Where there are any, what none of them
// covers is refused.
type budgetRules struct {
	list []Budget
	of   map[budgetOwner][]Budget
}

type budgetOwner struct {
	caller string
	action Action
}

// WithBudgets returns the policy with budgets, which Digest covers. It reports
// every fault at once, also each grant whose holder no budget lets take
// anything. A policy without budgets bounds nobody.
func (p *Policy) WithBudgets(list []Budget) (*Policy, error) {
	if len(list) == 0 {
		return p, nil
	}
	rules := &budgetRules{list: slices.Clone(list), of: map[budgetOwner][]Budget{}}
	var faults []error
	var text []string
	for i, b := range list {
		if err := b.check(); err != nil {
			for _, f := range strings.Split(err.Error(), "\n") {
				faults = append(faults, fmt.Errorf("budgets[%d].%s", i, f))
			}
		}
		owner := budgetOwner{b.Caller, b.Action}
		if slices.ContainsFunc(rules.of[owner], func(o Budget) bool { return o.Category == b.Category }) {
			faults = append(faults, fmt.Errorf("budgets[%d]: %s has another one for %s in the same categories", i, b.Caller, b.Action))
		}
		rules.of[owner] = append(rules.of[owner], b)
		text = append(text, fmt.Sprintf("%q %s %q %s %d %d %g", b.Caller, b.Action, b.Category, b.Window, b.SoftKIDs, b.HardKIDs, b.Rate))
	}
	if len(faults) == 0 {
		faults = rules.uncovered(p)
	}
	if len(faults) > 0 {
		return nil, errors.Join(faults...)
	}
	with := p.with(conditionBudgets, text)
	with.budgets = rules
	return with, nil
}

// uncovered names the grants that are worth nothing, since no budget covers them.
func (r *budgetRules) uncovered(p *Policy) (faults []error) {
	for identity, grants := range p.authority.permits {
		for _, g := range grants {
			action := map[Role]Action{RoleProvider: ActionRelease, RolePackager: ActionReissue}[g.grant.Role]
			if action == "" {
				continue
			}
			covers := func(c CategoryName) bool {
				return slices.ContainsFunc(r.budgets(identity, action), func(b Budget) bool { return b.Category == "" || b.Category == c })
			}
			names := g.grant.Categories
			if g.grant.AllCategories {
				names = []CategoryName{""}
			}
			for _, name := range names {
				if !covers(name) {
					faults = append(faults, fmt.Errorf("budgets: none covers %s by %s in %s", action, identity, cmp.Or(string(name), `"*"`)))
				}
			}
		}
	}
	slices.SortFunc(faults, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	return faults
}

// budgets are those of a caller for an action.
func (r *budgetRules) budgets(caller string, action Action) []Budget {
	if own, ok := r.of[budgetOwner{caller, action}]; ok {
		return own
	}
	return r.of[budgetOwner{AnyCaller, action}]
}

// Budgets are those of WithBudgets.
func (p *Policy) Budgets() []Budget {
	if p == nil || p.budgets == nil {
		return nil
	}
	return p.budgets.list
}

// A ledger knows what callers have taken of their budgets. It is filled from the
// audit log at a start: a release is written down before the key leaves, so a
// restart, or a kill, forgets nothing but how full the bucket of a rate was.
type ledger struct {
	// mu guards the map. Callers without a grant do not get into it.
	mu       sync.RWMutex
	accounts map[string]*account

	// broken counts the accounts whose freeze is not recorded yet.
	broken atomic.Int32
}

// An account is what one caller has taken.
type account struct {
	caller string

	// mu guards the fields below.
	mu       sync.Mutex
	counters map[budgetScope]*counter
	// cause is why the caller is to be frozen, and broken which budget; the freeze
	// is in the control set when frozen is set. Nothing more is taken then until
	// it was lifted.
	cause  string
	frozen bool
	alerts []Incident // that nobody was told of yet
}

type budgetScope struct {
	action   Action
	category CategoryName
}

// A counter knows different KIDs in two generations: one is found in both, and
// is written to the newer; every window the older is dropped. It never has more
// than the hard budget.
type counter struct {
	turn         time.Time // the end of the newer generation
	newer, older map[KID]struct{}
	full         time.Time // when the bucket of the rate is full again
	rate         float64   // by which full was reckoned
	soft, slowed bool      // people were told in this window
}

func (c *counter) count() int { return len(c.newer) + len(c.older) }

func (c *counter) forget(now time.Time, window time.Duration) {
	if now.Before(c.turn) {
		return
	}
	c.older, c.newer = c.newer, map[KID]struct{}{}
	if !now.Before(c.turn.Add(window)) {
		c.older = nil
	}
	c.turn, c.soft, c.slowed = now.Add(window), false, false
}

// mend reckons the bucket anew where the rate of its budget has changed: as many
// keys as before are missing from it.
func (c *counter) mend(b *Budget, now time.Time) {
	if c.rate == b.Rate {
		return
	}
	missing := max(0, c.full.Sub(now).Seconds()) * c.rate
	if c.full, c.rate = now, b.Rate; b.Rate > 0 {
		c.full = now.Add(time.Duration(missing / b.Rate * float64(time.Second)))
	}
}

// next is when the bucket of the rate is full again after one more key, and
// whether that is within the rate.
func (c *counter) next(b *Budget, now time.Time) (full time.Time, ok bool) {
	if b.Rate == 0 {
		return c.full, true
	}
	burst := float64(MaxKIDsPerCall)
	if b.Action == ActionReissue {
		burst = MaxKeysPerIssue
	}
	allowed := time.Duration(max(b.Rate, burst) / b.Rate * float64(time.Second))
	next := c.full
	if next.Before(now) {
		next = now
	}
	next = next.Add(time.Duration(float64(time.Second) / b.Rate))
	return next, next.Sub(now) <= allowed
}

func (l *ledger) account(caller string) *account {
	l.mu.RLock()
	a := l.accounts[caller]
	l.mu.RUnlock()
	if a != nil {
		return a
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if a = l.accounts[caller]; a == nil {
		a = &account{caller: caller, counters: map[budgetScope]*counter{}}
		l.accounts[caller] = a
	}
	return a
}

// spend counts one key that a caller is allowed to take, or refuses it. It is on
// the path of every release: it waits for nobody but for other calls of the same
// caller.
func (c *Custodian) spend(p *Policy, who Caller, action Action, category CategoryName, kid KID, now time.Time) error {
	if p == nil || p.budgets == nil {
		return nil
	}
	a := c.ledger.account(who.ID)
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.cause != "" && !c.lifted(a) {
		return fmt.Errorf("%s: %w", a.cause, ErrKIDBudget)
	}
	budgets := p.budgets.budgets(who.ID, action)
	covered := false
	for i := range budgets { // nothing is counted before all agree
		b := &budgets[i]
		if b.Category != "" && b.Category != category {
			continue
		}
		covered = true
		n := a.counters[budgetScope{action, b.Category}]
		if n == nil {
			n = &counter{}
			a.counters[budgetScope{action, b.Category}] = n
		}
		n.forget(now, b.Window)
		n.mend(b, now)
		if _, ok := n.next(b, now); !ok {
			a.tell(n, b, IncidentBudgetRate, &n.slowed, now)
			return fmt.Errorf("more than %g keys a second: %w", b.Rate, ErrRate)
		}
		if n.count() >= b.HardKIDs && !n.has(kid) {
			a.cause = "budget " + b.String()
			c.ledger.broken.Add(1)
			return fmt.Errorf("%s: %w", a.cause, ErrKIDBudget)
		}
	}
	if !covered {
		return fmt.Errorf("no budget covers %s in category %s: %w", action, category, ErrKIDBudget)
	}
	for i := range budgets {
		b := &budgets[i]
		if b.Category != "" && b.Category != category {
			continue
		}
		n := a.counters[budgetScope{action, b.Category}]
		n.add(kid)
		n.full, _ = n.next(b, now)
		if b.SoftKIDs > 0 && n.count() > b.SoftKIDs {
			a.tell(n, b, IncidentBudgetSoft, &n.soft, now)
		}
	}
	return nil
}

func (c *counter) has(kid KID) bool {
	if _, ok := c.newer[kid]; ok {
		return true
	}
	_, ok := c.older[kid]
	return ok
}

func (c *counter) add(kid KID) {
	if _, ok := c.newer[kid]; ok {
		return
	}
	delete(c.older, kid)
	c.newer[kid] = struct{}{}
}

// lifted says whether the freeze of an account that broke a budget was lifted
// again. Then it begins anew.
func (c *Custodian) lifted(a *account) bool {
	if _, is := c.set.Load().frozenCallers[a.caller]; is || !a.frozen {
		return false
	}
	a.cause, a.frozen = "", false
	clear(a.counters)
	return true
}

// tell notes that people are to hear of a budget, once in its window. a.mu is
// held.
func (a *account) tell(n *counter, b *Budget, kind IncidentKind, told *bool, now time.Time) {
	if *told {
		return
	}
	*told = true
	what := fmt.Sprintf("%d of the budget for %s", n.count(), b)
	if kind == IncidentBudgetRate {
		what = fmt.Sprintf("more than %g keys a second, by the budget for %s", b.Rate, b)
	}
	a.alerts = append(a.alerts, budgetIncident(kind, a.caller, what, now))
}

func budgetIncident(kind IncidentKind, caller, what string, now time.Time) Incident {
	return Incident{ID: fmt.Sprintf("%s-%s-%d", caller, kind, now.Unix()), Kind: kind, Caller: caller, Since: now, Declared: now, Closed: now, LastError: what}
}

// TickBudgets tells people of budgets, and freezes the callers that have broken
// one and are not frozen yet. Call it about once a second.
func (c *Custodian) TickBudgets(ctx context.Context) {
	for _, a := range c.ledger.all() {
		a.mu.Lock()
		alerts := a.alerts
		a.alerts = nil
		a.mu.Unlock()
		for _, i := range alerts {
			c.keys.outages.alert(i)
		}
	}
	c.freezeBroken(ctx)
}

func (l *ledger) all() []*account {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return slices.Collect(maps.Values(l.accounts))
}

// freezeBroken freezes the callers that have broken a budget, at the end of the
// call that broke it. What cannot be done then, TickBudgets tries again. It costs
// nothing where there is nothing to do.
func (c *Custodian) freezeBroken(ctx context.Context) {
	if c.ledger.broken.Load() == 0 {
		return
	}
	// The caller's deadline is not that of its freeze.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), settleTimeout)
	defer cancel()
	for _, a := range c.ledger.all() {
		a.mu.Lock()
		cause, frozen := a.cause, a.frozen
		a.mu.Unlock()
		if cause == "" || frozen {
			continue
		}
		if _, err := c.freezeCaller(ctx, a.caller, budgetFreezer, cause, audit.Entry{}); err != nil {
			c.log.Error("a caller has broken a budget: it gets nothing, but its freeze is not recorded yet", "caller", a.caller, "cause", cause, "err", err)
			continue
		}
		a.mu.Lock()
		if !a.frozen { // no other call was quicker
			a.frozen = true
			a.alerts = append(a.alerts, budgetIncident(IncidentCallerFrozen, a.caller, cause, c.now()))
			c.ledger.broken.Add(-1)
		}
		a.mu.Unlock()
	}
}

// budgetFreezer is who froze a caller that broke a budget.
const budgetFreezer = "budget"

// loggedSpending is what the audit log knows of what callers took.
type loggedSpending struct {
	taken map[budgetOwner]map[KID]taking
	names map[string]CategoryName // each once
	total int
	swept int // how many were left after the last sweep
}

type taking struct {
	at       int64 // Unix nanoseconds
	category CategoryName
}

// visit takes one entry in. window is the longest of the budgets.
func (l *loggedSpending) visit(e *audit.Entry, window time.Duration) {
	if e.Outcome != audit.Allowed || window == 0 {
		return
	}
	if e.Action == actionCallerFrozen { // it takes nothing more until that is lifted, and then begins anew
		identity, _, _ := strings.Cut(e.Detail, " ")
		for _, action := range []Action{ActionRelease, ActionReissue} {
			l.total -= len(l.taken[budgetOwner{identity, action}])
			delete(l.taken, budgetOwner{identity, action})
		}
		return
	}
	if len(e.KID) != KIDSize || e.Action != string(ActionRelease) && e.Action != string(ActionReissue) {
		return
	}
	owner := budgetOwner{e.Caller, Action(e.Action)}
	mine := l.taken[owner]
	if mine == nil {
		if l.taken == nil {
			l.taken, l.names = map[budgetOwner]map[KID]taking{}, map[string]CategoryName{}
		}
		mine = map[KID]taking{}
		l.taken[owner] = mine
	}
	name, ok := l.names[e.Category]
	if !ok {
		name = CategoryName(strings.Clone(e.Category))
		l.names[string(name)] = name
	}
	before := len(mine)
	mine[KID(e.KID)] = taking{e.Time.UnixNano(), name}
	if l.total += len(mine) - before; l.total < 2*l.swept+4096 {
		return
	}
	for _, kids := range l.taken {
		for kid, t := range kids {
			if t.at < e.Time.Add(-window).UnixNano() {
				delete(kids, kid)
				l.total--
			}
		}
	}
	l.swept = l.total
}

// newLedger counts what the log knows.
func newLedger(p *Policy, logged loggedSpending, now time.Time) *ledger {
	l := &ledger{accounts: map[string]*account{}}
	if p == nil || p.budgets == nil {
		return l
	}
	for owner, kids := range logged.taken {
		a := l.account(owner.caller)
		for _, b := range p.budgets.budgets(owner.caller, owner.action) {
			n := &counter{turn: now.Add(b.Window), newer: map[KID]struct{}{}, older: map[KID]struct{}{}}
			for kid, t := range kids {
				if (b.Category == "" || b.Category == t.category) && t.at > now.Add(-b.Window).UnixNano() {
					n.older[kid] = struct{}{}
				}
			}
			a.counters[budgetScope{owner.action, b.Category}] = n
		}
	}
	return l
}

// longestWindow of budgets; zero: there are none.
func longestWindow(budgets []Budget) (longest time.Duration) {
	for _, b := range budgets {
		longest = max(longest, b.Window)
	}
	return longest
}
