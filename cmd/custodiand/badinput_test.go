package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/miekg/pkcs11"
	"golang.org/x/sys/unix"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/client"
	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/testservers"
)

// edit replaces a part of the configuration file; each pair is old and new.
func (c *custody) edit(pairs ...string) {
	c.t.Helper()
	raw, err := os.ReadFile(c.dev.configFile())
	if err != nil {
		c.t.Fatal(err)
	}
	for i := 0; i < len(pairs); i += 2 {
		if !bytes.Contains(raw, []byte(pairs[i])) {
			c.t.Fatalf("the configuration has no %q:\n%s", pairs[i], raw)
		}
		raw = bytes.Replace(raw, []byte(pairs[i]), []byte(pairs[i+1]), 1)
	}
	if err := os.WriteFile(c.dev.configFile(), raw, 0o600); err != nil {
		c.t.Fatal(err)
	}
}

// TestBadConfig: a configuration that is wrong ends with exit code 2 and
// names every fault with its key, at once.
func TestBadConfig(t *testing.T) {
	for name, tt := range map[string]struct {
		edit []string
		want []string
	}{
		"unknown field":         {[]string{"listen:", "lisen: x\nlisten:"}, []string{"lisen"}},
		"several faults":        {[]string{"role: auditor", "role: boss", "kind: local", "kind: paper", "level: \"\"", "level: loud"}, []string{"boss", "paper", "log.level"}},
		"admin on all networks": {[]string{"admin_listen: 127.0.0.1:0", "admin_listen: 0.0.0.0:0"}, []string{"admin_listen", "loopback"}},
		"empty grants":          {[]string{"grants:", "grants: []\nlimits: {}\nlog: {}\n#"}, nil},
		"officer without pin":   {[]string{"role: auditor", "role: officer"}, []string{"officer", "spki"}},
		"no such PIN file":      {[]string{"pin_file: ", "pin_file: /nonexistent"}, []string{"hsm.pin_file", "no such file"}},
		"rewraps without end":   {[]string{"rewrap_rate: 0", "rewrap_rate: 1e9"}, []string{"kms.rewrap_rate"}},
		"a hurried provider":    {[]string{"- name: local", "- name: local\n          deadline: 1ms"}, []string{"kms.providers[0].deadline"}},
		"audit log without sense": {[]string{"segment_size: 0", "segment_size: 5", "limit: 0", "limit: 1MiB", "keep_segments: 0", "keep_segments: -1",
			"keep_for: 0s", "keep_for: 1s", "archive_dir: \"\"", "archive_dir: nowhere", "name: \"\"\n    signing", "name: a b\n    signing", "signing: \"\"", "signing: rsa"},
			[]string{"audit.segment_size", "audit.limit", "audit.keep_segments", "audit.keep_for", "audit.archive_dir", "audit.name", "audit.signing"}},
		"archive of nothing": {[]string{"archive_dir: \"\"", "archive_dir: ."}, []string{"nothing is pruned"}},
		"size without sense": {[]string{"segment_size: 0", "segment_size: 5 pounds"}, []string{"5 pounds"}},
		"grace without end":  {[]string{"grace: null", "grace: 48h"}, []string{"kms.grace", "kms.grace_ceiling"}},
		"webhook in clear":   {[]string{"webhook:\n        url: \"\"", "webhook:\n        url: http://example.com/hook"}, []string{"kms.webhook.url", "loopback", "kms.webhook.secret_file"}},
		"no such module":     {[]string{"module: ", "module: /nonexistent"}, []string{"hsm.module", "no such file"}},
	} {
		t.Run(name, func(t *testing.T) {
			c := provision(t)
			c.edit(tt.edit...)
			out, code := c.run("-config", c.dev.configFile(), "-check-config")
			if code != exitUsage {
				t.Errorf("exit %d, want %d\n%s", code, exitUsage, out)
			}
			for _, want := range tt.want {
				if !strings.Contains(out, want) {
					t.Errorf("the output does not name %q:\n%s", want, out)
				}
			}
		})
	}
}

// TestFilesThatOthersCanRead: configuration, PIN and key must be private.
func TestFilesThatOthersCanRead(t *testing.T) {
	c := provision(t)
	for key, path := range map[string]string{"config": c.dev.configFile(), "hsm.pin_file": c.config.HSM.PINFile, "tls.key_file": c.config.TLS.KeyFile} {
		if err := os.Chmod(path, 0o644); err != nil {
			t.Fatal(err)
		}
		out, code := c.run("-config", c.dev.configFile(), "-check-config")
		if code != exitUsage || !strings.Contains(out, key) || !strings.Contains(out, "0644") {
			t.Errorf("%s with mode 0644: exit %d, want %d and a sentence with the key and the mode:\n%s", key, code, exitUsage, out)
		}
		if err := os.Chmod(path, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if out, code := c.run("-config", c.dev.configFile(), "-check-config"); code != 0 {
		t.Errorf("all private again: exit %d\n%s", code, out)
	}
}

// TestUninitialised: without init the daemon answers UNINITIALISED and tells
// who may have it its status; it never initialises by itself, and it begins
// to serve by itself once init is done.
func TestUninitialised(t *testing.T) {
	c := provision(t)
	lines := c.launch()
	c.awaitLog(lines, "not initialised")
	c.listenFromLog()
	_, err := c.dial(custodian.RoleProvider).GetContentKeys(t.Context(), &v1.GetContentKeysRequest{Kids: [][]byte{bytes.Repeat([]byte{7}, 16)}})
	if got := client.ReasonOf(err); got != "UNINITIALISED" {
		t.Errorf("callback: got %v, want UNINITIALISED", err)
	}
	if _, err := c.dial(custodian.RoleOperator).Status(t.Context()); err != nil {
		t.Errorf("status: %v", err)
	}
	if _, err := os.Stat(c.config.storePath()); !os.IsNotExist(err) {
		t.Errorf("a store was made without init: %v", err)
	}
	c.mustRun("init", "-config", c.dev.configFile())
	if err := c.awaitServing(lines); err != nil {
		t.Fatal(err)
	}
	if out, code := c.run("init", "-config", c.dev.configFile()); code == 0 {
		t.Errorf("a second init succeeds:\n%s", out)
	}
}

// TestStoreWithoutMEKAndMEKWithoutStore: both halves alone are refused, and
// init does not make a new custody over either.
func TestStoreWithoutMEKAndMEKWithoutStore(t *testing.T) {
	c := provision(t)
	c.mustRun("init", "-config", c.dev.configFile())
	away := c.config.storePath() + ".away"
	if err := os.Rename(c.config.storePath(), away); err != nil {
		t.Fatal(err)
	}
	if out, code := c.run("-config", c.dev.configFile()); code != exitIntegrity || !strings.Contains(out, "restore") {
		t.Errorf("audit log without its store: exit %d, want %d and what to do\n%s", code, exitIntegrity, out)
	}
	if out, code := c.run("init", "-config", c.dev.configFile()); code == 0 {
		t.Errorf("init over the audit log of another custody succeeds\n%s", out)
	}
	if err := os.RemoveAll(c.config.DataDir); err != nil {
		t.Fatal(err)
	}
	if out, code := c.run("init", "-config", c.dev.configFile()); code == 0 || !strings.Contains(out, "a MEK without its store") {
		t.Errorf("init in a token that holds a MEK: exit %d, want a refusal that names it\n%s", code, out)
	}
}

// TestExtractableMEK: a MEK with CKA_EXTRACTABLE true is refused at start.
func TestExtractableMEK(t *testing.T) {
	c := provision(t)
	c.mustRun("init", "-config", c.dev.configFile())
	c.withSession(func(m *pkcs11.Ctx, s pkcs11.SessionHandle) {
		if err := m.FindObjectsInit(s, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_LABEL, "custodian-mek-v1")}); err != nil {
			t.Fatal(err)
		}
		found, _, err := m.FindObjects(s, 2)
		m.FindObjectsFinal(s)
		if err != nil || len(found) != 1 {
			t.Fatalf("find the MEK: %d, %v", len(found), err)
		}
		a, err := m.GetAttributeValue(s, found[0], []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_ID, nil)})
		if err != nil {
			t.Fatal(err)
		}
		if err := m.DestroyObject(s, found[0]); err != nil {
			t.Fatal(err)
		}
		if _, err := m.GenerateKey(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_GEN, nil)}, []*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES),
			pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, 32), pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
			pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true), pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, true),
			pkcs11.NewAttribute(pkcs11.CKA_WRAP, true), pkcs11.NewAttribute(pkcs11.CKA_UNWRAP, true),
			pkcs11.NewAttribute(pkcs11.CKA_LABEL, "custodian-mek-v1"), pkcs11.NewAttribute(pkcs11.CKA_ID, a[0].Value)}); err != nil {
			t.Fatal(err)
		}
	})
	if out, code := c.run("-config", c.dev.configFile()); code != exitIntegrity || !strings.Contains(out, "extractable is true") {
		t.Errorf("extractable MEK: exit %d, want %d and a sentence that names the attribute\n%s", code, exitIntegrity, out)
	}
}

// TestTokenNotThere: the daemon stays up, answers STARTING, and serves once
// the token is there.
func TestTokenNotThere(t *testing.T) {
	c := provision(t)
	c.mustRun("init", "-config", c.dev.configFile())
	tokens := filepath.Join(filepath.Dir(c.config.HSM.SoftHSMConf), "tokens")
	if err := os.Rename(tokens, tokens+".away"); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(tokens, 0o700); err != nil {
		t.Fatal(err)
	}
	lines := c.launch()
	c.awaitLog(lines, "not serving yet")
	c.wantLog("custodian-dev")
	c.listenFromLog()
	_, err := c.dial(custodian.RoleProvider).GetContentKeys(t.Context(), &v1.GetContentKeysRequest{Kids: [][]byte{bytes.Repeat([]byte{7}, 16)}})
	if got := client.ReasonOf(err); got != "STARTING" {
		t.Errorf("callback: got %v, want STARTING", err)
	}
	if err := os.Remove(tokens); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(tokens+".away", tokens); err != nil {
		t.Fatal(err)
	}
	if err := c.awaitServing(lines); err != nil {
		t.Fatal(err)
	}
}

// withVault changes the configuration to a transit key of a real Vault, with
// a KEK lifetime of a second and a grace of five.
func (c *custody) withVault(v *testservers.VaultServer) {
	c.t.Helper()
	v.CreateTransitKey("custodian", true)
	v.WritePolicy("custodian", vaultPolicy)
	role, secret := v.AppRole("custodian", "custodian")
	c.withKMS("name: outer\n    kind: vault\n    vault: {address: '"+v.Address+"', ca_file: "+v.CAFile+
		", cert_file: "+v.ClientCertFile+", key_file: "+v.ClientKeyFile+
		", key: custodian, approle: {role_id_file: "+role+", secret_id_file: "+secret+"}}", "5s")
}

// withKMS makes the provider outer, written in YAML, the only one, with a grace.
func (c *custody) withKMS(outer, grace string) {
	c.t.Helper()
	raw, err := os.ReadFile(c.dev.configFile())
	if err != nil {
		c.t.Fatal(err)
	}
	before, rest, ok := strings.Cut(string(raw), "\nkms:\n")
	_, after, ok2 := strings.Cut(rest, "\ntls:\n")
	if !ok || !ok2 {
		c.t.Fatalf("the configuration has no kms section followed by tls:\n%s", raw)
	}
	kms := "\nkms:\n  default: [outer]\n  providers:\n  - " + outer + "\n  grace: " + grace + "\n"
	if err := os.WriteFile(c.dev.configFile(), []byte(before+kms+"\ntls:\n"+after), 0o600); err != nil {
		c.t.Fatal(err)
	}
	c.edit("kek_lifetime: 0s", "kek_lifetime: 1s")
}

const vaultPolicy = `path "transit/encrypt/custodian" { capabilities = ["update"] }
path "transit/decrypt/custodian" { capabilities = ["update"] }`

// TestVaultSealed: with the outer layer in a real Vault, a sealed Vault is an
// outage: no new KEK, releases by a loaded one for the grace and no longer,
// never "unknown key"; unsealed, service returns without a restart. A policy
// that is taken away ends the grace at once. A start while Vault is sealed
// waits.
func TestVaultSealed(t *testing.T) {
	t.Parallel() // it waits, and takes little of the CPUs
	if testing.Short() {
		t.Skip("a real Vault takes minutes to build; not in -short")
	}
	v := testservers.Vault(t)
	c := provision(t)
	c.withVault(v)
	c.mustRun("init", "-config", c.dev.configFile())
	c.mustStart()
	s := serve(c)
	if got := s.get(); got != "" {
		t.Fatalf("callback: %s", got)
	}
	v.Seal()
	time.Sleep(1100 * time.Millisecond) // the KEK's lifetime
	if got := s.get(); got != "" {
		t.Errorf("callback on grace: got %q, want the key", got)
	}
	time.Sleep(5 * time.Second) // the grace
	if got := s.get(); got != "KMS_UNAVAILABLE" {
		t.Errorf("callback while Vault is sealed: got %q, want KMS_UNAVAILABLE", got)
	}
	if _, err := c.dial(custodian.RoleOfficer).CreateCategory(t.Context(), &v1.CreateCategoryRequest{Name: "series"}); client.ReasonOf(err) != "KMS_UNAVAILABLE" {
		t.Errorf("new KEK while Vault is sealed: got %v, want KMS_UNAVAILABLE", err)
	}
	v.Unseal()
	s.wantRecovery("KMS_UNAVAILABLE", "DEADLINE")

	v.WritePolicy("custodian", `path "transit/encrypt/custodian" { capabilities = ["update"] }`)
	time.Sleep(1100 * time.Millisecond)
	got := s.get()
	for range 10 { // the first one may be served before Vault has said no twice
		if got == "KMS_UNAVAILABLE" {
			break
		}
		time.Sleep(100 * time.Millisecond)
		got = s.get()
	}
	if got != "KMS_UNAVAILABLE" {
		t.Errorf("callback when access is taken away: got %q, want KMS_UNAVAILABLE", got)
	}
	v.WritePolicy("custodian", vaultPolicy)
	s.wantRecovery("KMS_UNAVAILABLE", "DEADLINE")

	v.Seal()
	c.kill()
	lines := c.launch()
	c.awaitLog(lines, "not serving yet")
	c.listenFromLog()
	s.provider = c.dial(custodian.RoleProvider)
	if got := s.get(); got != "STARTING" {
		t.Errorf("callback to a daemon that cannot start: got %q, want STARTING", got)
	}
	v.Unseal()
	if err := c.awaitServing(lines); err != nil {
		t.Fatal(err)
	}
	s.provider = c.dial(custodian.RoleProvider)
	s.wantRecovery("KMS_UNAVAILABLE", "DEADLINE")
}

// listenFromLog finds the addresses of a daemon that does not serve keys yet.
func (c *custody) listenFromLog() {
	c.t.Helper()
	limit := time.Now().Add(10 * time.Second)
	for time.Now().Before(limit) {
		if m := listeningLine.FindAllStringSubmatch(c.logText(), -1); m != nil {
			last := m[len(m)-1]
			c.listen, c.admin = last[1], last[2]
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	c.t.Fatalf("the daemon does not say where it listens:\n%s", c.logText())
}

// smallDisk mounts a tmpfs of so many bytes on the data directory.
func (c *custody) smallDisk(bytes string) {
	t := c.t
	t.Helper()
	if err := os.MkdirAll(c.config.DataDir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("custodian-test", c.config.DataDir, "tmpfs", 0, "mode=0700,size="+bytes); err != nil {
		t.Skipf("no tmpfs can be mounted here, so no real full disk: %v", err)
	}
	t.Cleanup(func() {
		c.kill()
		if err := unix.Unmount(c.config.DataDir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

// fill takes all free space of the data directory.
func (c *custody) fill() (free func()) {
	t := c.t
	t.Helper()
	path := filepath.Join(c.config.DataDir, "filler")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for size := 1 << 20; size > 0; size /= 16 {
		for {
			if _, err := f.Write(make([]byte, size)); err != nil {
				break
			}
		}
	}
	return func() {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
}

// TestDiskFull fills a small tmpfs under store and audit log. Issuing is
// refused as unavailable and leaves nothing; releases go on in the room that
// the log keeps back, until that is used up, and then are refused, never
// unwritten. With room again, service returns by itself.
func TestDiskFull(t *testing.T) {
	c := provision(t)
	c.smallDisk("64m")
	c.mustRun("init", "-config", c.dev.configFile())
	c.mustStart()
	s := serve(c)
	free := c.fill()
	refused := false
	for i := range 3000 { // the store file has free pages for a while
		_, err := s.issue("film-full-" + strings.Repeat("x", 200) + string(rune('a'+i%26)) + time.Now().String())
		if err == nil {
			continue
		}
		if got := client.ReasonOf(err); got != "STORE_UNAVAILABLE" && got != "AUDIT_BLOCKED" {
			t.Fatalf("issue on a full disk: got %v, want STORE_UNAVAILABLE or AUDIT_BLOCKED", err)
		}
		refused = true
		break
	}
	if !refused {
		t.Fatal("3,000 keys were issued on a full disk: it is not full")
	}
	if got := s.get(); got != "" {
		t.Errorf("release while the disk is full and room is kept back: got %s", got)
	}
	free()
	limit := time.Now().Add(10 * time.Second)
	for {
		_, err := s.issue("film-after")
		if err == nil {
			break
		}
		if time.Now().After(limit) {
			t.Fatalf("issue with room again: %v\n%s", err, tail(c.logText()))
		}
		time.Sleep(100 * time.Millisecond)
	}
	if got := s.get(); got != "" {
		t.Errorf("release with room again: got %s", got)
	}
	if code := c.stop(); code != 0 {
		t.Errorf("stop: exit %d", code)
	}
	c.checkAtRest(&ledger{released: map[custodian.KID]bool{custodian.KID(s.kid): true}}, "custodian-mek-v1")
}

// TestAuditDiskFull uses up even the room that the audit log keeps back for
// releases: from then on nothing is released, until there is room.
func TestAuditDiskFull(t *testing.T) {
	c := provision(t)
	c.patient()
	c.smallDisk("64m")
	c.mustRun("init", "-config", c.dev.configFile())
	c.mustStart()
	s := serve(c)
	req := &v1.IssueContentKeysRequest{Category: "movies", ContentId: []byte("film-64")}
	for i := range 64 {
		req.Keys = append(req.Keys, &v1.ContentKeySpec{TrackType: fmt.Sprintf("T%d", i), Scheme: "cenc"})
	}
	res, err := s.packager.IssueContentKeys(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	var kids [][]byte
	for _, k := range res.Keys {
		kids = append(kids, k.Key.Kid)
	}
	free := c.fill()
	blocked := ""
	for range 20000 {
		if _, err := s.provider.GetContentKeys(t.Context(), &v1.GetContentKeysRequest{Kids: kids}); err != nil {
			blocked = client.ReasonOf(err)
			break
		}
	}
	if blocked != "AUDIT_BLOCKED" {
		t.Fatalf("releases on a full disk end with %q, want AUDIT_BLOCKED", blocked)
	}
	free()
	s.wantRecovery("AUDIT_BLOCKED")
}

func tail(s string) string {
	if len(s) > 3000 {
		return s[len(s)-3000:]
	}
	return s
}
