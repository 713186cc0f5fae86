package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestReloadKeepsTheLastGoodRules: rules are taken at SIGHUP, and a bad file
// leaves those that were good.
func TestReloadKeepsTheLastGoodRules(t *testing.T) {
	rules := filepath.Join(t.TempDir(), "rules.cedar")
	write := func(text string) {
		if err := os.WriteFile(rules, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	const good = `@id("all") forbid (principal, action == Custodian::Action::"release", resource);`
	write(good)
	c := &Config{Grants: []GrantConfig{{Identity: "a", Role: "drm-provider", Categories: []string{"*"}}}, Policy: PolicyConfig{RulesFiles: []string{rules}}}
	first, err := c.policy(nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"no Cedar": "nonsense", "a permit": strings.Replace(good, "forbid", "permit", 1), "an unknown attribute": strings.TrimSuffix(good, ";") + ` when { resource.colour == "red" };`} {
		write(text)
		if p, err := c.policy(nil); err == nil || p != nil || !strings.Contains(err.Error(), "policy.rules_files: "+rules) {
			t.Errorf("%s: got a policy or %v, want a fault of policy.rules_files that names the file", name, err)
		}
	}
	write(strings.Replace(good, `"all"`, `"every"`, 1))
	second, err := c.policy(nil)
	if err != nil {
		t.Fatal(err)
	}
	if first.Digest() == second.Digest() {
		t.Error("the digest does not cover the rules")
	}
	c.Policy.RulesFiles = append(c.Policy.RulesFiles, "/nowhere.cedar")
	if _, err := c.policy(nil); err == nil || !strings.Contains(err.Error(), "policy.rules_files[1]: open /nowhere.cedar") {
		t.Errorf("a file that is not there: got %v", err)
	}
}
