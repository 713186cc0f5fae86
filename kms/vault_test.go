package kms_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/custodian/custodiantest"
	"github.com/keycustody/custodian/kms"
	"github.com/keycustody/custodian/testservers"
)

// The wrapped blob and the context of the tests.
var (
	inner    = []byte(strings.Repeat("w", 40))
	context1 = []byte("store 1 kek movies/1")
	context2 = []byte("store 1 kek movies/2")
)

// A clock that moves only when a test moves it.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func newClock() *clock { return &clock{now: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)} }

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) Add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// A bed is a Vault with a proxy before it, a derived key, a role that may use
// it, and a provider that goes through the proxy with that role.
type bed struct {
	vault  *testservers.VaultServer
	proxy  *proxy
	clock  *clock
	key    string
	config kms.Config
	p      custodian.Provider
	// patience bounds the calls of wantRefused, where it is set.
	patience time.Duration
}

func newBed(t *testing.T) *bed {
	t.Helper()
	return bedOn(t, testservers.Vault(t))
}

func bedOn(t *testing.T, v *testservers.VaultServer) *bed {
	t.Helper()
	b := &bed{vault: v, clock: newClock(), key: fmt.Sprintf("key-%08x", rand.Uint32())}
	v.CreateTransitKey(b.key, true)
	b.allow()
	roleID, secretID := v.AppRole(b.key, b.key)
	b.proxy = newProxy(t, v)
	b.config = kms.Config{Name: "outer", Kind: kms.KindVault, Now: b.clock.Now, Vault: kms.VaultConfig{
		Address: b.proxy.address, Key: b.key, CAFile: b.proxy.caFile,
		CertFile: v.ClientCertFile, KeyFile: v.ClientKeyFile,
		AppRole: kms.AppRole{RoleIDFile: roleID, SecretIDFile: secretID},
		Timeout: 20 * time.Second,
	}}
	b.p = open(t, b.config)
	return b
}

// allow gives the role what docs say that it needs, and not more.
func (b *bed) allow() {
	b.vault.WritePolicy(b.key, policy(b.key, "encrypt", "decrypt", "rewrap"))
}

func policy(key string, operations ...string) string {
	var hcl strings.Builder
	for _, op := range operations {
		fmt.Fprintf(&hcl, "path \"transit/%s/%s\" { capabilities = [\"update\"] }\n", op, key)
	}
	return hcl.String()
}

func (b *bed) wrap(t *testing.T) custodian.OuterWrap {
	t.Helper()
	w, err := b.p.Wrap(t.Context(), inner, context1)
	if err != nil {
		t.Fatalf("wrap: %v", err)
	}
	return w
}

func (b *bed) wantOpens(t *testing.T, when string, w custodian.OuterWrap) {
	t.Helper()
	got, err := b.p.Unwrap(t.Context(), w, context1)
	if err != nil {
		t.Errorf("open %s: %v", when, err)
		return
	}
	if string(got) != string(inner) {
		t.Errorf("open %s: got other bytes", when)
	}
}

// wantRefused opens w and returns the error, which must be want and none of
// the others.
func (b *bed) wantRefused(t *testing.T, when string, w custodian.OuterWrap, want error) error {
	t.Helper()
	ctx, cancel := b.limit(t)
	defer cancel()
	_, err := b.p.Unwrap(ctx, w, context1)
	wantOnly(t, "open "+when, err, want)
	return err
}

func (b *bed) limit(t *testing.T) (context.Context, context.CancelFunc) {
	if b.patience == 0 {
		return context.WithCancel(t.Context())
	}
	return context.WithTimeout(t.Context(), b.patience)
}

func wantOnly(t *testing.T, what string, err, want error) {
	t.Helper()
	for _, sentinel := range []error{custodian.ErrProviderUnavailable, custodian.ErrProviderThrottled, custodian.ErrProviderDenied, custodian.ErrProviderDisabled, custodian.ErrProviderBlob} {
		if got := errors.Is(err, sentinel); got != (sentinel == want) {
			t.Errorf("%s: got %v, want %v only", what, err, want)
		}
	}
}

// pass lets any wait before the next login pass.
func (b *bed) pass() { b.clock.Add(time.Minute) }

func (b *bed) write(t *testing.T, path string, data map[string]any) {
	t.Helper()
	if _, err := b.vault.Client().Logical().Write(path, data); err != nil {
		t.Fatalf("write %s: %v", path, err)
	}
}

func TestVault(t *testing.T) {
	v := testservers.Vault(t)
	custodiantest.TestProvider(t, func(t *testing.T) custodian.Provider { return bedOn(t, v).p })
}

// Each row breaks Vault, or the way to it, and says what a call answers. The
// provider that is open works again when the row has mended it.
func TestVaultFails(t *testing.T) {
	v := testservers.Vault(t)
	for _, test := range []struct {
		name string
		harm func(t *testing.T, b *bed)
		mend func(t *testing.T, b *bed)
		want error
		says string
	}{
		{"sealed", func(_ *testing.T, b *bed) { b.vault.Seal() }, func(_ *testing.T, b *bed) { b.vault.Unseal() },
			custodian.ErrProviderUnavailable, "Vault is sealed"},
		{"hung", func(_ *testing.T, b *bed) { b.vault.Pause() }, func(_ *testing.T, b *bed) { b.vault.Resume() },
			custodian.ErrProviderUnavailable, "deadline"},
		{"policy removed", func(_ *testing.T, b *bed) { b.vault.WritePolicy(b.key, policy(b.key, "encrypt")) }, func(_ *testing.T, b *bed) { b.allow() },
			custodian.ErrProviderDenied, "permission denied"},
		{"version too old", func(t *testing.T, b *bed) {
			b.vault.RotateTransitKey(b.key)
			b.write(t, "transit/keys/"+b.key+"/config", map[string]any{"min_decryption_version": 2})
		}, func(t *testing.T, b *bed) {
			b.write(t, "transit/keys/"+b.key+"/config", map[string]any{"min_decryption_version": 1})
		}, custodian.ErrProviderDisabled, "too old"},
		{"transit unmounted", func(t *testing.T, b *bed) {
			b.write(t, "sys/remount", map[string]any{"from": "transit", "to": "elsewhere"})
			awaitRoute(t, b, "elsewhere")
		}, func(t *testing.T, b *bed) {
			b.write(t, "sys/remount", map[string]any{"from": "elsewhere", "to": "transit"})
			awaitRoute(t, b, "transit")
		}, custodian.ErrProviderDisabled, "no handler for route"},
		{"500", func(_ *testing.T, b *bed) {
			b.proxy.set(answer(500, `{"errors":["1 error occurred: internal error"]}`))
		}, unbreak, custodian.ErrProviderUnavailable, "status 500"},
		{"502 of a balancer", func(_ *testing.T, b *bed) { b.proxy.set(answer(502, "<html>bad gateway</html>")) }, unbreak, custodian.ErrProviderUnavailable, "status 502"},
		{"429", func(_ *testing.T, b *bed) {
			b.proxy.set(answer(429, `{"errors":["request path \"transit\": rate limit quota exceeded"]}`))
		}, unbreak, custodian.ErrProviderThrottled, "quota"},
		{"429 of a balancer", func(_ *testing.T, b *bed) { b.proxy.set(answer(429, "slow down")) }, unbreak, custodian.ErrProviderThrottled, "status 429"},
		{"400 of a balancer", func(_ *testing.T, b *bed) { b.proxy.set(answer(400, "<html>bad request</html>")) }, unbreak, custodian.ErrProviderUnavailable, "status 400"},
		{"403 of a firewall", func(_ *testing.T, b *bed) { b.proxy.set(answer(403, "<html>blocked</html>")) }, unbreak, custodian.ErrProviderUnavailable, "status 403"},
		{"404 of a balancer", func(_ *testing.T, b *bed) { b.proxy.set(answer(404, "<html>not found</html>")) }, unbreak, custodian.ErrProviderUnavailable, ""},
		{"garbage", func(_ *testing.T, b *bed) { b.proxy.set(answer(200, "\x00\x01 garbage")) }, unbreak, custodian.ErrProviderUnavailable, ""},
		{"empty answer", func(_ *testing.T, b *bed) { b.proxy.set(answer(200, "")) }, unbreak, custodian.ErrProviderUnavailable, ""},
		{"answer without data", func(_ *testing.T, b *bed) { b.proxy.set(answer(200, `{"data":{}}`)) }, unbreak, custodian.ErrProviderUnavailable, "no plaintext"},
		{"answer of another type", func(_ *testing.T, b *bed) { b.proxy.set(answer(200, `{"data":{"plaintext":7}}`)) }, unbreak, custodian.ErrProviderUnavailable, "no plaintext"},
		{"plaintext that is no base64", func(_ *testing.T, b *bed) { b.proxy.set(answer(200, `{"data":{"plaintext":"***"}}`)) }, unbreak, custodian.ErrProviderUnavailable, "base64"},
		{"endless answer", func(_ *testing.T, b *bed) { b.proxy.set(endless) }, unbreak, custodian.ErrProviderUnavailable, "too large"},
		{"connection reset", func(_ *testing.T, b *bed) { b.proxy.set(reset) }, unbreak, custodian.ErrProviderUnavailable, ""},
		{"connection reset after doing it", func(_ *testing.T, b *bed) { b.proxy.set(resetAfter) }, unbreak, custodian.ErrProviderUnavailable, ""},
		{"answer lost after doing it", func(_ *testing.T, b *bed) { b.proxy.set(hangAfter) }, unbreak, custodian.ErrProviderUnavailable, "deadline"},
		{"hang before the answer", func(_ *testing.T, b *bed) { b.proxy.set(hang) }, unbreak, custodian.ErrProviderUnavailable, "deadline"},
	} {
		t.Run(test.name, func(t *testing.T) {
			b := bedOn(t, v)
			w := b.wrap(t)
			if test.says == "deadline" {
				b.patience = 500 * time.Millisecond
			}

			test.harm(t, b)
			mended := false
			defer func() {
				if !mended {
					test.mend(t, b)
				}
			}()
			err := b.wantRefused(t, "while broken", w, test.want)
			if err != nil && !strings.Contains(err.Error(), test.says) {
				t.Errorf("open while broken: got %q, want it to say %q", err, test.says)
			}
			ctx, cancel := b.limit(t)
			defer cancel()
			_, err = b.p.Wrap(ctx, inner, context1)
			if err == nil && test.name != "version too old" {
				t.Error("wrap while broken: got no error")
			}
			status := b.p.Status()
			if want := test.want != custodian.ErrProviderUnavailable; status.Reachable != want {
				t.Errorf("status while broken: got reachable %v, want %v", status.Reachable, want)
			}

			test.mend(t, b)
			mended = true
			b.pass()
			b.wantOpens(t, "after it was mended", w)
			b.wrap(t)
			if status := b.p.Status(); !status.Reachable || status.LastError != "" {
				t.Errorf("status after it was mended: got %+v", status)
			}
		})
	}
}

func unbreak(_ *testing.T, b *bed) { b.proxy.set(forward) }

// awaitRoute waits until a mount is where it was moved to.
func awaitRoute(t *testing.T, b *bed, mount string) {
	t.Helper()
	for range 200 {
		if s, err := b.vault.Client().Logical().Read(mount + "/keys/" + b.key); err == nil && s != nil {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Fatalf("transit is not at %s", mount)
}

func TestVaultStopsAndStarts(t *testing.T) {
	b := bedOn(t, testservers.Vault(t, testservers.Raft))
	w := b.wrap(t)
	b.vault.Stop()
	b.wantRefused(t, "while stopped", w, custodian.ErrProviderUnavailable)
	b.vault.Start()
	b.pass()
	b.wantOpens(t, "after the restart", w)
}

// A daemon can start while its KMS is away.
func TestVaultAwayAtOpen(t *testing.T) {
	b := newBed(t)
	w := b.wrap(t)
	b.vault.Seal()
	b.p = open(t, b.config)
	if status := b.p.Status(); status.Reachable || status.Calls != 0 {
		t.Errorf("status before the first call: got %+v, want no contact", status)
	}
	b.wantRefused(t, "while sealed", w, custodian.ErrProviderUnavailable)
	b.vault.Unseal()
	b.pass()
	b.wantOpens(t, "after unsealing", w)
}

func TestVaultKeyDeleted(t *testing.T) {
	b := newBed(t)
	w := b.wrap(t)
	b.write(t, "transit/keys/"+b.key+"/config", map[string]any{"deletion_allowed": true})
	if _, err := b.vault.Client().Logical().Delete("transit/keys/" + b.key); err != nil {
		t.Fatal(err)
	}
	err := b.wantRefused(t, "under a deleted key", w, custodian.ErrProviderDisabled)
	if err != nil && !strings.Contains(err.Error(), "not found") {
		t.Errorf("open under a deleted key: got %q, want it to say so", err)
	}
	// Even a role that may create keys does not do so in passing.
	b.vault.WritePolicy(b.key, `path "transit/*" { capabilities = ["create", "update"] }`)
	_, err = b.p.Wrap(t.Context(), inner, context1)
	wantOnly(t, "wrap under a deleted key", err, custodian.ErrProviderDisabled)
	made, err := b.vault.Client().Logical().Read("transit/keys/" + b.key)
	if err != nil || made != nil {
		t.Errorf("the deleted key after a wrap: got %v, %v, want none", made, err)
	}
}

// Vault ignores the context of a key that is not derived, so nothing must be
// wrapped under one.
func TestVaultKeyNotDerived(t *testing.T) {
	b := newBed(t)
	b.vault.CreateTransitKey("plain", false)
	b.vault.WritePolicy(b.key, policy("plain", "encrypt", "decrypt", "rewrap"))
	b.config.Vault.Key = "plain"
	b.p = open(t, b.config)
	_, err := b.p.Wrap(t.Context(), inner, context1)
	wantOnly(t, "wrap under a key that is not derived", err, custodian.ErrProviderDisabled)
	if err != nil && !strings.Contains(err.Error(), "derived=true") {
		t.Errorf("wrap under a key that is not derived: got %q, want it to say what to do", err)
	}
}

func TestVaultRotation(t *testing.T) {
	b := newBed(t)
	w := b.wrap(t)
	b.vault.RotateTransitKey(b.key)
	b.wantOpens(t, "after the rotation", w)

	moved, err := b.p.(custodian.Rewrapper).Rewrap(t.Context(), w, context1)
	if err != nil {
		t.Fatalf("rewrap: %v", err)
	}
	b.write(t, "transit/keys/"+b.key+"/config", map[string]any{"min_decryption_version": 2})
	b.wantRefused(t, "the old wrap after its version was closed", w, custodian.ErrProviderDisabled)
	b.wantOpens(t, "the new wrap after the old version was closed", moved)
	if _, err := b.p.Unwrap(t.Context(), moved, context2); !errors.Is(err, custodian.ErrProviderBlob) {
		t.Errorf("open the new wrap with another context: got %v, want %v", err, custodian.ErrProviderBlob)
	}
}

// A transit engine that was restored under another path opens what it made.
func TestVaultMountMoved(t *testing.T) {
	b := newBed(t)
	w := b.wrap(t)
	b.write(t, "sys/remount", map[string]any{"from": "transit", "to": "restored"})
	awaitRoute(t, b, "restored")
	b.vault.WritePolicy(b.key, strings.ReplaceAll(policy(b.key, "encrypt", "decrypt"), "transit/", "restored/"))
	b.config.Vault.Mount = "restored"
	b.p = open(t, b.config)
	b.wantOpens(t, "under another mount", w)
	broken := w
	broken.Blob = append([]byte{}, w.Blob...)
	broken.Blob[len(broken.Blob)/2] ^= 1
	err := b.wantRefused(t, "a changed blob under another mount", broken, custodian.ErrProviderBlob)
	if err != nil && !strings.Contains(err.Error(), "made under transit/"+b.key) {
		t.Errorf("got %q, want it to say where the blob was made", err)
	}
}

// The variables of Vault's own tools have no say in the daemon.
func TestVaultEnvironmentHasNoSay(t *testing.T) {
	b := newBed(t)
	t.Setenv("VAULT_TOKEN", "not-ours")
	t.Setenv("VAULT_ADDR", "https://127.0.0.1:1")
	t.Setenv("VAULT_NAMESPACE", "not-ours")
	t.Setenv("VAULT_SKIP_VERIFY", "true")
	t.Setenv("VAULT_HEADERS", `{"X-Not-Ours":"1"}`)
	t.Setenv("HTTPS_PROXY", "http://127.0.0.1:1")
	b.p = open(t, b.config)
	b.wantOpens(t, "with a hostile environment", b.wrap(t))
	for _, header := range []string{"X-Not-Ours", "X-Vault-Namespace"} {
		if b.proxy.sawHeader(header) {
			t.Errorf("header %s of the environment was sent", header)
		}
	}
	b.config.Vault.CAFile = b.vault.CAFile + ".other"
	if err := os.WriteFile(b.config.Vault.CAFile, b.proxy.otherCA, 0o600); err != nil {
		t.Fatal(err)
	}
	b.p = open(t, b.config)
	_, err := b.p.Wrap(t.Context(), inner, context1)
	wantOnly(t, "wrap at a server of another CA", err, custodian.ErrProviderUnavailable)
}

// A client certificate that was renewed on disk is used without a reopening.
func TestVaultClientCertificateIsReadAgain(t *testing.T) {
	b := newBed(t)
	dir := t.TempDir()
	cert, err := os.ReadFile(b.vault.ClientCertFile)
	if err != nil {
		t.Fatal(err)
	}
	key, err := os.ReadFile(b.vault.ClientKeyFile)
	if err != nil {
		t.Fatal(err)
	}
	b.config.Vault.CertFile = write(t, dir, "client.pem", string(cert), 0o600)
	b.config.Vault.KeyFile = write(t, dir, "client.key", string(key), 0o600)
	b.p = open(t, b.config)
	w := b.wrap(t)

	b.proxy.closeConnections()
	write(t, dir, "client.pem", "nothing", 0o600)
	b.wantRefused(t, "with a bad certificate file", w, custodian.ErrProviderUnavailable)
	write(t, dir, "client.pem", string(cert), 0o600)
	b.wantOpens(t, "with a good certificate file again", w)
}

func TestVaultCallerGivesUp(t *testing.T) {
	b := newBed(t)
	w := b.wrap(t)
	b.proxy.set(hang)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	begin := time.Now()
	_, err := b.p.Unwrap(ctx, w, context1)
	wantOnly(t, "open while Vault hangs", err, custodian.ErrProviderUnavailable)
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("open while Vault hangs: got %v, want %v in it", err, context.DeadlineExceeded)
	}
	if took := time.Since(begin); took > 10*time.Second {
		t.Errorf("open while Vault hangs: it took %s with a deadline of 100ms", took)
	}
	b.proxy.set(forward)
	b.pass()
	b.wantOpens(t, "afterwards", w)
}

func TestVaultTimeout(t *testing.T) {
	b := newBed(t)
	w := b.wrap(t)
	b.config.Vault.Timeout = 100 * time.Millisecond
	b.p = open(t, b.config)
	b.proxy.set(hang)
	begin := time.Now()
	err := b.wantRefused(t, "while Vault hangs", w, custodian.ErrProviderUnavailable)
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("open while Vault hangs: got %v, want %v in it", err, context.DeadlineExceeded)
	}
	if took := time.Since(begin); took > 10*time.Second {
		t.Errorf("open while Vault hangs: it took %s with a timeout of 100ms", took)
	}
}

// No error and no status shows a token or a secret ID.
func TestVaultErrorsShowNoSecrets(t *testing.T) {
	b := newBed(t)
	w := b.wrap(t)
	var secrets []string
	for _, file := range []string{b.config.Vault.AppRole.RoleIDFile, b.config.Vault.AppRole.SecretIDFile} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		secrets = append(secrets, string(text))
	}
	secrets = append(secrets, b.proxy.tokens()...)
	if len(secrets) < 3 {
		t.Fatalf("secrets to look for: got %d, want the role ID, the secret ID and a token", len(secrets))
	}
	for _, behaviour := range []behaviour{answer(500, "oops"), answer(403, `{"errors":["permission denied"]}`), answer(200, "{"), reset, hang} {
		b.proxy.set(behaviour)
		b.pass()
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		_, err := b.p.Unwrap(ctx, w, context1)
		cancel()
		if err == nil {
			t.Fatal("open while broken: got no error")
		}
		for _, secret := range secrets {
			if strings.Contains(err.Error(), secret) || strings.Contains(b.p.Status().LastError, secret) {
				t.Error("an error shows a secret")
			}
		}
	}
}
