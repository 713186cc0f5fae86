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
			[]string{"vault.address: ", "vault.key: ", "vault.token_file: missing: it, approle, cert or kubernetes must be set"}},
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
		{"three logins", "vault", func(v *kms.VaultConfig) { v.Cert.Role, v.Kubernetes.Role = "r", "r" }, []string{"vault.token_file: set beside cert and kubernetes"}},
		{"certificate login without a certificate", "vault", func(v *kms.VaultConfig) { v.TokenFile, v.Cert.Role = "", "r" }, []string{"vault.cert_file: missing"}},
		{"certificate login without a role", "vault", func(v *kms.VaultConfig) { v.TokenFile, v.Cert.Mount = "", "../sys" },
			[]string{"vault.cert_file: missing", "vault.cert.role: ", "vault.cert.mount: "}},
		{"Kubernetes without all", "vault", func(v *kms.VaultConfig) { v.TokenFile, v.Kubernetes.Mount = "", "/" },
			[]string{"vault.kubernetes.role: ", "vault.kubernetes.jwt_file: missing", "vault.kubernetes.mount: "}},
		{"readable JWT", "vault", func(v *kms.VaultConfig) {
			v.TokenFile, v.Kubernetes = "", kms.Kubernetes{Role: "r", JWTFile: readable}
		}, []string{"vault.kubernetes.jwt_file: " + readable + ": mode 0640"}},
		{"half an AppRole", "vault", func(v *kms.VaultConfig) { v.TokenFile, v.AppRole.RoleIDFile = "", private },
			[]string{"vault.approle.secret_id_file: missing"}},
		{"readable secret ID", "vault", func(v *kms.VaultConfig) {
			v.TokenFile, v.AppRole = "", kms.AppRole{RoleIDFile: private, SecretIDFile: readable}
		}, []string{"vault.approle.secret_id_file: " + readable + ": mode 0640"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := kms.Config{Name: "outer", Kind: test.kind, Vault: good}
			test.change(&c.Vault)
			wantFaults(t, c, test.want)
		})
	}
}

func TestConfigFaultsOfAWS(t *testing.T) {
	dir := t.TempDir()
	readable := write(t, dir, "readable", "[default]", 0o640)
	const arn = "arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
	for _, test := range []struct {
		name   string
		change func(c *kms.Config)
		want   []string
	}{
		{"good", func(*kms.Config) {}, nil},
		{"alias ARN", func(c *kms.Config) {
			c.AWS.Key = "arn:aws-us-gov:kms:us-gov-west-1:111122223333:alias/custodian/movies"
		}, nil},
		{"alias with region", func(c *kms.Config) { c.AWS.Key, c.AWS.Region = "alias/custodian", "eu-central-1" }, nil},
		{"nothing set", func(c *kms.Config) { c.AWS = kms.AWSConfig{} }, []string{`aws.key: "": must be the ARN`}},
		{"alias without region", func(c *kms.Config) { c.AWS.Key = "alias/custodian" }, []string{"aws.region: missing"}},
		{"another region", func(c *kms.Config) { c.AWS.Region = "us-east-1" }, []string{`aws.region: "us-east-1": the key is in eu-central-1`}},
		{"a URL as region", func(c *kms.Config) { c.AWS.Key, c.AWS.Region = "alias/custodian", "evil.example/" }, []string{"aws.region: "}},
		{"plain HTTP", func(c *kms.Config) { c.AWS.Endpoint = "http://127.0.0.1:1" }, []string{"aws.endpoint: "}},
		{"missing CA", func(c *kms.Config) { c.AWS.CAFile = dir + "/none" }, []string{"aws.ca_file: open "}},
		{"readable credentials", func(c *kms.Config) { c.AWS.CredentialsFile = readable }, []string{"aws.credentials_file: " + readable + ": mode 0640"}},
		{"profile with a line break", func(c *kms.Config) { c.AWS.Profile = "a\nb" }, []string{"aws.profile: "}},
		{"an hour's timeout", func(c *kms.Config) { c.AWS.Timeout = time.Hour }, []string{"aws.timeout: 1h0m0s: "}},
		{"settings of another kind", func(c *kms.Config) { c.GCP.Key = "k" }, []string{"gcp: set, but kind is aws"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := kms.Config{Name: "outer", Kind: kms.KindAWS, AWS: kms.AWSConfig{Key: arn}}
			test.change(&c)
			wantFaults(t, c, test.want)
		})
	}
}

func TestConfigFaultsOfGCP(t *testing.T) {
	dir := t.TempDir()
	account := write(t, dir, "account", `{"type":"service_account"}`, 0o600)
	readable := write(t, dir, "readable", `{"type":"service_account"}`, 0o640)
	person := write(t, dir, "person", `{"type":"authorized_user","refresh_token":"hidden"}`, 0o600)
	notJSON := write(t, dir, "not-json", "hidden", 0o600)
	const key = "projects/p-1/locations/europe-west3/keyRings/r/cryptoKeys/k"
	for _, test := range []struct {
		name   string
		change func(c *kms.GCPConfig)
		want   []string
	}{
		{"good", func(*kms.GCPConfig) {}, nil},
		{"emulator", func(c *kms.GCPConfig) { c.Endpoint, c.InsecureLoopback = "127.0.0.1:9010", true }, nil},
		{"emulator of IPv6", func(c *kms.GCPConfig) { c.Endpoint, c.InsecureLoopback = "[::1]:9010", true }, nil},
		{"service account", func(c *kms.GCPConfig) { c.CredentialsFile = account }, nil},
		{"nothing set", func(c *kms.GCPConfig) { *c = kms.GCPConfig{} }, []string{`gcp.key: "": must be projects/`}},
		{"a version as key", func(c *kms.GCPConfig) { c.Key += "/cryptoKeyVersions/1" }, []string{"gcp.key: "}},
		{"URL as endpoint", func(c *kms.GCPConfig) { c.Endpoint = "https://kms.example" }, []string{"gcp.endpoint: "}},
		{"no port", func(c *kms.GCPConfig) { c.Endpoint = "kms.example" }, []string{"gcp.endpoint: "}},
		{"insecure at Google", func(c *kms.GCPConfig) { c.InsecureLoopback = true }, []string{"gcp.insecure_loopback: "}},
		{"insecure at a name", func(c *kms.GCPConfig) { c.Endpoint, c.InsecureLoopback = "localhost:9010", true }, []string{"gcp.insecure_loopback: "}},
		{"insecure elsewhere", func(c *kms.GCPConfig) { c.Endpoint, c.InsecureLoopback = "10.0.0.1:9010", true }, []string{"gcp.insecure_loopback: "}},
		{"insecure with credentials", func(c *kms.GCPConfig) {
			c.Endpoint, c.InsecureLoopback, c.CredentialsFile = "127.0.0.1:9010", true, account
		}, []string{"gcp.credentials_file: set beside"}},
		{"missing CA", func(c *kms.GCPConfig) { c.CAFile = dir + "/none" }, []string{"gcp.ca_file: open "}},
		{"readable credentials", func(c *kms.GCPConfig) { c.CredentialsFile = readable }, []string{"gcp.credentials_file: " + readable + ": mode 0640"}},
		{"a person's credentials", func(c *kms.GCPConfig) { c.CredentialsFile = person }, []string{"gcp.credentials_file: " + person + `: type "authorized_user": must be one of`}},
		{"credentials that are no JSON", func(c *kms.GCPConfig) { c.CredentialsFile = notJSON }, []string{"gcp.credentials_file: " + notJSON + ": not JSON"}},
		{"negative timeout", func(c *kms.GCPConfig) { c.Timeout = -time.Second }, []string{"gcp.timeout: -1s: "}},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := kms.Config{Name: "outer", Kind: kms.KindGCP, GCP: kms.GCPConfig{Key: key}}
			test.change(&c.GCP)
			wantFaults(t, c, test.want)
		})
	}
}

// wantFaults compares the faults of c by how they begin. What Check refuses,
// Open does, and what it takes, Open opens without a KMS.
func wantFaults(t *testing.T, c kms.Config, want []string) {
	t.Helper()
	faults := c.Check()
	if len(faults) != len(want) {
		t.Fatalf("faults: got %v, want %q", faults, want)
	}
	for i, want := range want {
		if got := faults[i].Error(); !strings.HasPrefix(got, want) {
			t.Errorf("fault %d: got %q, want %q", i, got, want)
		}
		if strings.Contains(faults[i].Error(), "hidden") {
			t.Errorf("fault %d shows a secret", i)
		}
	}
	if len(want) == 0 {
		open(t, c)
		return
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

func TestConfigOfAWSAndGCPInYAML(t *testing.T) {
	const text = `
- name: a
  kind: aws
  aws: {key: alias/custodian, region: eu-central-1, endpoint: "https://kms.example", ca_file: ca.pem, credentials_file: aws, profile: drm, timeout: 2s}
- name: g
  kind: gcp
  gcp: {key: k, endpoint: "127.0.0.1:9010", ca_file: ca.pem, credentials_file: account.json, insecure_loopback: true, timeout: 3s}
`
	decoder := yaml.NewDecoder(strings.NewReader(text))
	decoder.KnownFields(true)
	var got []kms.Config
	if err := decoder.Decode(&got); err != nil {
		t.Fatalf("decode: %v", err)
	}
	wantAWS := kms.AWSConfig{Key: "alias/custodian", Region: "eu-central-1", Endpoint: "https://kms.example", CAFile: "ca.pem",
		CredentialsFile: "aws", Profile: "drm", Timeout: 2 * time.Second}
	wantGCP := kms.GCPConfig{Key: "k", Endpoint: "127.0.0.1:9010", CAFile: "ca.pem", CredentialsFile: "account.json",
		InsecureLoopback: true, Timeout: 3 * time.Second}
	if len(got) != 2 || got[0].Kind != kms.KindAWS || got[0].AWS != wantAWS || got[1].Kind != kms.KindGCP || got[1].GCP != wantGCP {
		t.Errorf("got %+v, want %+v and %+v", got, wantAWS, wantGCP)
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
