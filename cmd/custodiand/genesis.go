package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"github.com/keycustody/custodian/custodian"
)

// readGenesis reads a plan that was signed without a daemon, and what the officers
// have signed; nil where there is no plan.
func readGenesis(plan string, approvals []string) (*custodian.Genesis, error) {
	if plan == "" {
		if len(approvals) > 0 {
			return nil, errors.New("-approval: it belongs to a -plan")
		}
		return nil, nil
	}
	text, err := os.ReadFile(plan)
	if err != nil {
		return nil, fmt.Errorf("-plan: %w", err)
	}
	g := &custodian.Genesis{}
	if g.Plan, err = custodian.ParsePlan(text); err != nil {
		return nil, fmt.Errorf("-plan %s: %w", plan, err)
	}
	for _, path := range approvals {
		raw, err := os.ReadFile(path)
		if err != nil {
			return nil, fmt.Errorf("-approval: %w", err)
		}
		var a custodian.Approval
		d := json.NewDecoder(bytes.NewReader(raw))
		d.DisallowUnknownFields()
		if err := d.Decode(&a); err != nil {
			return nil, fmt.Errorf("-approval %s: not what custodianctl ceremony sign writes: %w", path, err)
		}
		g.Approvals = append(g.Approvals, a)
	}
	return g, nil
}
