package kms_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/custodian/custodiantest"
	"github.com/keycustody/custodian/kms"
)

func TestLocal(t *testing.T) {
	custodiantest.TestProvider(t, func(t *testing.T) custodian.Provider {
		return open(t, kms.Config{Name: "here", Kind: kms.KindLocal})
	})
}

func TestLocalSaysThatItHasNoOuterLayer(t *testing.T) {
	p := open(t, kms.Config{Name: "here", Kind: kms.KindLocal})
	got := p.Status()
	if got.OuterLayer || got.KeyRef != "" || !got.Reachable {
		t.Errorf("status: got %+v, want no outer layer, no key reference, reachable", got)
	}
}

func open(t *testing.T, c kms.Config) custodian.Provider {
	t.Helper()
	p, err := kms.Open(t.Context(), c)
	if err != nil {
		t.Fatalf("open: %v", err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

func TestConfigFaults(t *testing.T) {
	dir := t.TempDir()
	private := write(t, dir, "private", "s.token", 0o600)
	readable := write(t, dir, "readable", "s.token", 0o640)
	empty := write(t, dir, "empty", "\n", 0o600)
	twoLines := write(t, dir, "two-lines", "one\ntwo\n", 0o600)
	notPEM := write(t, dir, "not-pem", "hello", 0o600)
	good := kms.VaultConfig{Address: "https://vault.example:8200", Key: "custodian", TokenFile: private}
	for _, test := range []struct {
		name   string
		kind   string
		change func(v *kms.VaultConfig)
		want   []string
	}{
		{"no kind", "", func(v *kms.VaultConfig) { *v = kms.VaultConfig{} }, []string{`kind: "": must be one of local, vault, aws, gcp`}},
		{"unknown kind", "kes", func(v *kms.VaultConfig) { *v = kms.VaultConfig{} }, []string{`kind: "kes": must be one of local, vault, aws, gcp`}},
		{"settings of another kind", "local", func(*kms.VaultConfig) {}, []string{"vault: set, but kind is local"}},
		{"nothing set", "vault", func(v *kms.VaultConfig) { *v = kms.VaultConfig{} },
			[]string{"vault.address: ", "vault.key: ", "vault.token_file: missing: either it or approle must be set"}},
		{"plain HTTP", "vault", func(v *kms.VaultConfig) { v.Address = "http://vault.example:8200" },
			[]string{`vault.address: "http://vault.example:8200": must be https://HOST:PORT`}},
		{"password in the address", "vault", func(v *kms.VaultConfig) { v.Address = "https://user:hidden@vault.example" }, []string{"vault.address: "}},
		{"path as key", "vault", func(v *kms.VaultConfig) { v.Key = "../sys/seal" }, []string{"vault.key: "}},
		{"path as mount", "vault", func(v *kms.VaultConfig) { v.Mount = "../sys" }, []string{"vault.mount: "}},
		{"slash before the namespace", "vault", func(v *kms.VaultConfig) { v.Namespace = "/drm" }, []string{"vault.namespace: "}},
		{"negative timeout", "vault", func(v *kms.VaultConfig) { v.Timeout = -time.Second }, []string{"vault.timeout: -1s: "}},
		{"an hour's timeout", "vault", func(v *kms.VaultConfig) { v.Timeout = time.Hour }, []string{"vault.timeout: 1h0m0s: "}},
		{"missing CA", "vault", func(v *kms.VaultConfig) { v.CAFile = dir + "/none" }, []string{"vault.ca_file: open " + dir + "/none: no such file"}},
		{"CA of no certificate", "vault", func(v *kms.VaultConfig) { v.CAFile = notPEM }, []string{"vault.ca_file: "}},
		{"certificate without key", "vault", func(v *kms.VaultConfig) { v.CertFile = notPEM }, []string{"vault.key_file: missing"}},
		{"key without certificate", "vault", func(v *kms.VaultConfig) { v.KeyFile = notPEM }, []string{"vault.cert_file: missing"}},
		{"readable key", "vault", func(v *kms.VaultConfig) { v.CertFile, v.KeyFile = notPEM, readable }, []string{"vault.key_file: " + readable + ": mode 0640"}},
		{"readable token", "vault", func(v *kms.VaultConfig) { v.TokenFile = readable }, []string{"vault.token_file: " + readable + ": mode 0640"}},
		{"missing token", "vault", func(v *kms.VaultConfig) { v.TokenFile = dir + "/none" }, []string{"vault.token_file: open " + dir + "/none: no such file"}},
		{"folder as token", "vault", func(v *kms.VaultConfig) { v.TokenFile = dir }, []string{"vault.token_file: " + dir + ": not a regular file"}},
		{"empty token", "vault", func(v *kms.VaultConfig) { v.TokenFile = empty }, []string{"vault.token_file: " + empty + ": the file is empty"}},
		{"two lines of token", "vault", func(v *kms.VaultConfig) { v.TokenFile = twoLines }, []string{"vault.token_file: " + twoLines + ": must hold one line"}},
		{"two logins", "vault", func(v *kms.VaultConfig) { v.AppRole.RoleIDFile = private }, []string{"vault.token_file: set beside approle"}},
		{"half an AppRole", "vault", func(v *kms.VaultConfig) { v.TokenFile, v.AppRole.RoleIDFile = "", private },
			[]string{"vault.approle.secret_id_file: missing"}},
		{"readable secret ID", "vault", func(v *kms.VaultConfig) {
			v.TokenFile, v.AppRole = "", kms.AppRole{RoleIDFile: private, SecretIDFile: readable}
		}, []string{"vault.approle.secret_id_file: " + readable + ": mode 0640"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := kms.Config{Name: "outer", Kind: test.kind, Vault: good}
			test.change(&c.Vault)
			faults := c.Check()
			if len(faults) != len(test.want) {
				t.Fatalf("faults: got %v, want %q", faults, test.want)
			}
			for i, want := range test.want {
				if got := faults[i].Error(); !strings.HasPrefix(got, want) {
					t.Errorf("fault %d: got %q, want %q", i, got, want)
				}
				if strings.Contains(faults[i].Error(), "hidden") {
					t.Errorf("fault %d shows a password", i)
				}
			}
			p, err := kms.Open(t.Context(), c)
			if err == nil || p != nil {
				t.Fatalf("open: got %v, %v, want a refusal and no provider", p, err)
			}
			for _, fault := range faults {
				if !strings.Contains(err.Error(), fault.Error()) {
					t.Errorf("open: got %q, want it to say %q", err, fault)
				}
			}
		})
	}
}

func TestConfigRefusesAName(t *testing.T) {
	for _, name := range []string{"", "Outer", "-outer", "a/b", strings.Repeat("a", 65)} {
		faults := kms.Config{Name: name, Kind: kms.KindLocal}.Check()
		if len(faults) != 1 || !strings.HasPrefix(faults[0].Error(), "name: ") {
			t.Errorf("name %q: got %v, want one fault of name", name, faults)
		}
	}
}

func TestConfigInYAML(t *testing.T) {
	const text = `
name: outer
kind: vault
vault:
  address: https://vault.example:8200
  namespace: drm
  mount: keys/transit
  key: custodian
  ca_file: ca.pem
  cert_file: client.pem
  key_file: client.key
  approle:
    role_id_file: role-id
    secret_id_file: secret-id
    mount: approle-2
  timeout: 2s
`
	decoder := yaml.NewDecoder(strings.NewReader(text))
	decoder.KnownFields(true)
	var got kms.Config
	if err := decoder.Decode(&got); err != nil {
		t.Fatalf("decode: %v", err)
	}
	want := kms.VaultConfig{
		Address: "https://vault.example:8200", Namespace: "drm", Mount: "keys/transit", Key: "custodian",
		CAFile: "ca.pem", CertFile: "client.pem", KeyFile: "client.key",
		AppRole: kms.AppRole{RoleIDFile: "role-id", SecretIDFile: "secret-id", Mount: "approle-2"},
		Timeout: 2 * time.Second,
	}
	if got.Name != "outer" || got.Kind != kms.KindVault || got.Vault != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

// write makes a file with exactly this mode.
func write(t *testing.T, dir, name, text string, mode os.FileMode) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
	return path
}
