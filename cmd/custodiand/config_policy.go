package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/keycustody/custodian/custodian"
)

// PolicyConfig restricts what the grants permit.
type PolicyConfig struct {
	RulesFiles []string `yaml:"rules_files"` // Cedar policies that forbid; read again at SIGHUP
}

// apply adds the rules to a policy.
func (c PolicyConfig) apply(p *custodian.Policy) (*custodian.Policy, error) {
	if len(c.RulesFiles) == 0 {
		return p, nil
	}
	files := make([]custodian.RulesFile, len(c.RulesFiles))
	var faults []error
	for i, name := range c.RulesFiles {
		text, err := os.ReadFile(name)
		if err != nil {
			faults = append(faults, fmt.Errorf("policy.rules_files[%d]: %w", i, err))
		}
		files[i] = custodian.RulesFile{Name: name, Text: text}
	}
	if len(faults) > 0 {
		return nil, errors.Join(faults...)
	}
	with, err := p.WithRules(files)
	if err != nil {
		return nil, fmt.Errorf("policy.rules_files: %w", err)
	}
	return with, nil
}
