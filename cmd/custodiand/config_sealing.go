package main

import (
	"errors"
	"fmt"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/sealing"
)

// SealingConfig says whose keys are sealed to a public key of their own.
type SealingConfig struct {
	Recipients []RecipientConfig `yaml:"recipients"`
	// RequireSealed are categories whose keys leave sealed or not at all; "*"
	// for all.
	RequireSealed []string `yaml:"require_sealed"`
}

// RecipientConfig pins the public keys of one caller.
type RecipientConfig struct {
	Identity string   `yaml:"identity"`
	Keys     []string `yaml:"keys"` // KEM:BASE64; the first is used unless a request names another
}

// apply adds the sealing to a policy.
func (c SealingConfig) apply(p *custodian.Policy) (*custodian.Policy, error) {
	if len(c.Recipients) == 0 && len(c.RequireSealed) == 0 {
		return p, nil
	}
	var s custodian.Sealing
	var faults []error
	for i, r := range c.Recipients {
		to := custodian.Recipient{Identity: r.Identity}
		for j, text := range r.Keys {
			k, err := sealing.ParsePublicKey(text)
			if err != nil {
				faults = append(faults, fmt.Errorf("sealing.recipients[%d].keys[%d]: %w", i, j, err))
				continue
			}
			to.Keys = append(to.Keys, k)
		}
		s.Recipients = append(s.Recipients, to)
	}
	for _, name := range c.RequireSealed {
		if name == "*" {
			s.RequireAll = true
		} else {
			s.Require = append(s.Require, custodian.CategoryName(name))
		}
	}
	if len(faults) > 0 {
		return nil, errors.Join(faults...)
	}
	return p.WithSealing(s)
}
