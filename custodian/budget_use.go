package custodian

import (
	"cmp"
	"slices"
)

// A BudgetUse is how much of a budget one caller has taken.
type BudgetUse struct {
	Caller   string
	Action   Action
	Category CategoryName // empty: all categories together
	// KIDs are the different ones that count now, of the HardKIDs that freeze the
	// caller. SoftKIDs as in Budget.
	KIDs, SoftKIDs, HardKIDs int
}

// BudgetUse tells what callers have taken of their budgets, for metrics: one for
// each budget of a caller that has a grant and has taken something since the
// longest window. Who has no grant is not in it, so that there are no more than
// the configuration has grants and budgets for.
func (c *Custodian) BudgetUse() []BudgetUse {
	p, now := c.policyOf(c.set.Load()), c.now()
	if p == nil || p.budgets == nil {
		return nil
	}
	var list []BudgetUse
	for _, a := range c.ledger.all() {
		if len(p.rolesOf(a.caller)) == 0 {
			continue
		}
		a.mu.Lock()
		if a.cause != "" {
			c.lifted(a) // then it begins anew
		}
		for _, action := range []Action{ActionRelease, ActionReissue} {
			for _, b := range p.budgets.budgets(a.caller, action) {
				n := a.counters[budgetScope{action, b.Category}]
				if n == nil {
					continue
				}
				n.forget(now, b.Window)
				list = append(list, BudgetUse{a.caller, action, b.Category, n.count(), b.SoftKIDs, b.HardKIDs})
			}
		}
		a.mu.Unlock()
	}
	slices.SortFunc(list, func(a, b BudgetUse) int {
		return cmp.Or(cmp.Compare(a.Caller, b.Caller), cmp.Compare(a.Action, b.Action), cmp.Compare(a.Category, b.Category))
	})
	return list
}

// CallersFrozen is how many callers are frozen, by officers or by a budget.
func (c *Custodian) CallersFrozen() int { return len(c.set.Load().frozenCallers) }
