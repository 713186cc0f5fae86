package main

import (
	"os"
	"path/filepath"
	"testing"

	"go.yaml.in/yaml/v3"
)

// FuzzParseConfig: whatever the file holds, the parser answers with a
// configuration or an error, and what it took it can write and take again.
func FuzzParseConfig(f *testing.F) {
	example, err := os.ReadFile(filepath.Join("..", "..", "deploy", "example.yaml"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(example)
	for _, s := range []string{"", "listen: x", "lisen: x", "grants: [{identity: a, role: b, categories: ['*']}]", "limits: {callback_deadline: 1s}",
		"a: &a [*a]", "--- {}\n--- {}", "\x00", "kms: {providers: [{name: v, kind: vault, vault: {address: 'https://x'}}]}"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		c, err := parseConfig(raw)
		if err != nil {
			return
		}
		c.resolve("/etc/custodian")
		again, err := yaml.Marshal(c)
		if err != nil {
			t.Fatalf("a configuration that was read cannot be written: %v", err)
		}
		if _, err := parseConfig(again); err != nil {
			t.Fatalf("a configuration that was written cannot be read: %v\n%s", err, again)
		}
	})
}
