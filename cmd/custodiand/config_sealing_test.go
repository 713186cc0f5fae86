package main

import (
	"strings"
	"testing"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/sealing"
)

// TestSealingConfig: what is pinned is in the policy's digest, and each fault
// is named by its key.
func TestSealingConfig(t *testing.T) {
	key, err := sealing.GenerateKey(sealing.X25519)
	if err != nil {
		t.Fatal(err)
	}
	policy, err := custodian.NewPolicy([]custodian.Grant{{Identity: "a", Role: custodian.RoleProvider, AllCategories: true}})
	if err != nil {
		t.Fatal(err)
	}
	good := SealingConfig{Recipients: []RecipientConfig{{Identity: "a", Keys: []string{key.Public().String()}}}, RequireSealed: []string{"movies"}}
	seen := map[[32]byte]bool{policy.Digest(): true}
	for _, c := range []SealingConfig{good, {Recipients: good.Recipients}, {RequireSealed: []string{"*"}}} {
		p, err := c.apply(policy)
		if err != nil {
			t.Fatal(err)
		}
		if seen[p.Digest()] {
			t.Errorf("%v: the digest does not cover it", c)
		}
		seen[p.Digest()] = true
	}
	if p, err := (SealingConfig{}).apply(policy); err != nil || p.Digest() != policy.Digest() {
		t.Errorf("no sealing: got another policy, or %v", err)
	}
	for want, c := range map[string]SealingConfig{
		"sealing.recipients[0].keys[1]":  {Recipients: []RecipientConfig{{Identity: "a", Keys: []string{key.Public().String(), "x25519:AA"}}}},
		"sealing.recipients[0].keys":     {Recipients: []RecipientConfig{{Identity: "a"}}},
		"sealing.recipients[0].identity": {Recipients: []RecipientConfig{{Keys: []string{key.Public().String()}}}},
		"sealing.require_sealed[0]":      {RequireSealed: []string{"No Such"}},
	} {
		if _, err := c.apply(policy); err == nil || !strings.Contains(err.Error(), want+": ") {
			t.Errorf("got %v, want a fault of %s", err, want)
		}
	}
}
