package main

import (
	"fmt"
	"time"

	"github.com/keycustody/custodian/custodian"
)

// BudgetConfig bounds what one caller takes; see custodian.Budget. Where there is
// any, what none of them covers is refused. Read again at SIGHUP.
type BudgetConfig struct {
	Caller   string        `yaml:"caller"`    // an identity, or "*": each caller that has no budget of its own
	Action   string        `yaml:"action"`    // release, or reissue: keys that exist, handed to a packager again
	Category string        `yaml:"category"`  // "*": all categories together
	Window   time.Duration `yaml:"window"`    // 1m to 24h
	SoftKIDs int           `yaml:"soft_kids"` // different KIDs in the window; more of them alert people. 0: there is no alert
	HardKIDs int           `yaml:"hard_kids"` // more of them freeze the caller
	Rate     float64       `yaml:"rate"`      // keys a second; 0: any number
}

// applyBudgets adds the budgets to a policy.
func (c *Config) applyBudgets(p *custodian.Policy) (*custodian.Policy, error) {
	var list []custodian.Budget
	for i, b := range c.Budgets {
		if b.Category == "" {
			return nil, fmt.Errorf(`budgets[%d].category: empty; name one, or write "*" for all together`, i)
		}
		budget := custodian.Budget{Caller: b.Caller, Action: custodian.Action(b.Action), Window: b.Window, SoftKIDs: b.SoftKIDs, HardKIDs: b.HardKIDs, Rate: b.Rate}
		if b.Category != "*" {
			budget.Category = custodian.CategoryName(b.Category)
		}
		list = append(list, budget)
	}
	return p.WithBudgets(list)
}
