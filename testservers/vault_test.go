package testservers_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/keycustody/custodian/testservers"
)

func vault(t *testing.T, options ...testservers.Option) *testservers.VaultServer {
	t.Helper()
	if testing.Short() {
		t.Skip("starts a real Vault server: run without -short")
	}
	return testservers.Vault(t, options...)
}

func TestVaultSealAndUnseal(t *testing.T) {
	v := vault(t)
	v.CreateTransitKey("movies", true)
	blob := encrypt(t, v.Client(), "movies", "a title", "kek-1")

	v.Seal()
	if _, err := decrypt(v.Client(), "movies", blob, "kek-1"); status(err) != http.StatusServiceUnavailable {
		t.Errorf("decrypt while sealed: got %v, want status 503", err)
	}

	v.Unseal()
	got, err := decrypt(v.Client(), "movies", blob, "kek-1")
	if err != nil {
		t.Fatalf("decrypt after unseal: %v", err)
	}
	if want := "a title"; got != want {
		t.Errorf("decrypt after unseal: got %q, want %q", got, want)
	}
	if _, err := decrypt(v.Client(), "movies", blob, "kek-2"); status(err) != http.StatusBadRequest {
		t.Errorf("decrypt with another context: got %v, want status 400", err)
	}
}

func TestVaultRotatesAKey(t *testing.T) {
	v := vault(t)
	v.CreateTransitKey("movies", false)
	before := encrypt(t, v.Client(), "movies", "a title", "")
	v.RotateTransitKey("movies")
	after := encrypt(t, v.Client(), "movies", "a title", "")

	if b, a := version(t, before), version(t, after); b == a {
		t.Errorf("versions before and after rotation: got %s and %s, want two", b, a)
	}
	if _, err := decrypt(v.Client(), "movies", before, ""); err != nil {
		t.Errorf("decrypt what the old version encrypted: %v", err)
	}
}

func TestVaultNeedsAClientCertificate(t *testing.T) {
	v := vault(t)
	pem, err := os.ReadFile(v.CAFile)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	without := &tls.Config{RootCAs: roots}
	if status, err := health(t, v.Address, without); err == nil {
		t.Errorf("without a client certificate: got status %d, want a refused handshake", status)
	}

	pair, err := tls.LoadX509KeyPair(v.ClientCertFile, v.ClientKeyFile)
	if err != nil {
		t.Fatal(err)
	}
	with := &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}}
	status, err := health(t, v.Address, with)
	if err != nil {
		t.Fatalf("with the client certificate: %v", err)
	}
	if want := http.StatusOK; status != want {
		t.Errorf("with the client certificate: got status %d, want %d", status, want)
	}
}

func TestVaultAppRoleHasItsPoliciesOnly(t *testing.T) {
	v := vault(t)
	v.CreateTransitKey("movies", false)
	v.CreateTransitKey("live", false)
	v.WritePolicy("movies", `path "transit/encrypt/movies" { capabilities = ["update"] }`)
	roleFile, secretFile := v.AppRole("custodian", "movies")
	for _, file := range []string{roleFile, secretFile, v.RootTokenFile, v.ClientKeyFile} {
		info, err := os.Stat(file)
		if err != nil {
			t.Fatal(err)
		}
		if got, want := info.Mode().Perm(), os.FileMode(0o600); got != want {
			t.Errorf("mode of %s: got %v, want %v", filepath.Base(file), got, want)
		}
	}

	client := v.Client()
	client.SetToken(login(t, client, roleFile, secretFile))
	encrypt(t, client, "movies", "a title", "")
	if _, err := client.Logical().Write("transit/encrypt/live", map[string]any{"plaintext": ""}); status(err) != http.StatusForbidden {
		t.Errorf("encrypt outside the policy: got %v, want status 403", err)
	}

	// A second role at the mount that the first one made.
	roleFile, secretFile = v.AppRole("nobody")
	client.SetToken(login(t, client, roleFile, secretFile))
	if _, err := client.Logical().Write("transit/encrypt/movies", map[string]any{"plaintext": ""}); status(err) != http.StatusForbidden {
		t.Errorf("encrypt without a policy: got %v, want status 403", err)
	}
}

func TestVaultOnRaftSurvivesARestart(t *testing.T) {
	v := vault(t, testservers.Raft)
	v.CreateTransitKey("movies", true)
	blob := encrypt(t, v.Client(), "movies", "a title", "kek-1")
	address := v.Address

	v.Stop()
	if _, err := decrypt(v.Client(), "movies", blob, "kek-1"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("decrypt while stopped: got %v, want a refused connection", err)
	}
	v.Start()
	if v.Address != address {
		t.Errorf("address after the restart: got %s, want %s", v.Address, address)
	}
	got, err := decrypt(v.Client(), "movies", blob, "kek-1")
	if err != nil {
		t.Fatalf("decrypt after the restart: %v", err)
	}
	if want := "a title"; got != want {
		t.Errorf("decrypt after the restart: got %q, want %q", got, want)
	}
}

func TestVaultPausedHangs(t *testing.T) {
	v := vault(t)
	client := v.Client()
	client.SetClientTimeout(300 * time.Millisecond)
	v.Pause()
	if _, err := client.Sys().Health(); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("health while paused: got %v, want a missed deadline", err)
	}
	v.Resume()
	client.SetClientTimeout(10 * time.Second)
	if _, err := client.Sys().Health(); err != nil {
		t.Errorf("health after the pause: %v", err)
	}
}

// The lock is what keeps two test processes from building at once: whoever
// finds it held waits, and no longer than its context allows.
func TestEnsureVaultWaitsForAnotherBuild(t *testing.T) {
	cache := t.TempDir()
	t.Setenv("XDG_CACHE_HOME", cache)
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := testservers.EnsureVault(cancelled, nil); !errors.Is(err, context.Canceled) {
		t.Fatalf("with a cancelled context: got %v, want %v", err, context.Canceled)
	}
	hold(t, cache)

	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	var said []string
	_, err := testservers.EnsureVault(ctx, func(line string) { said = append(said, line) })
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("while another process builds: got %v, want %v", err, context.DeadlineExceeded)
	}
	if len(said) != 1 || !strings.Contains(said[0], "waiting") {
		t.Errorf("while another process builds: said %q, want one line that it waits", said)
	}
}

func TestEnsureVaultOutsideACheckout(t *testing.T) {
	t.Chdir(t.TempDir())
	_, err := testservers.EnsureVault(t.Context(), nil)
	if err == nil || !strings.Contains(err.Error(), "not inside a checkout") {
		t.Errorf("got %v, want an error that names the reason", err)
	}
}

// hold takes the build lock that lies in the one folder of the cache.
func hold(t *testing.T, cache string) {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(cache, "custodian-testservers", "*", "lock"))
	if err != nil || len(found) != 1 {
		t.Fatalf("find the lock file: got %q, %v, want one", found, err)
	}
	f, err := os.Open(found[0])
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
}

// login logs in with the files of an AppRole and returns the token.
func login(t *testing.T, client *api.Client, roleFile, secretFile string) string {
	t.Helper()
	role, err := os.ReadFile(roleFile)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := os.ReadFile(secretFile)
	if err != nil {
		t.Fatal(err)
	}
	answer, err := client.Logical().Write("auth/approle/login", map[string]any{"role_id": string(role), "secret_id": string(secret)})
	if err != nil {
		t.Fatalf("log in: %v", err)
	}
	return answer.Auth.ClientToken
}

func encrypt(t *testing.T, client *api.Client, key, text, context string) string {
	t.Helper()
	request := map[string]any{"plaintext": base64.StdEncoding.EncodeToString([]byte(text))}
	if context != "" {
		request["context"] = base64.StdEncoding.EncodeToString([]byte(context))
	}
	answer, err := client.Logical().Write("transit/encrypt/"+key, request)
	if err != nil {
		t.Fatalf("encrypt under %s: %v", key, err)
	}
	return answer.Data["ciphertext"].(string)
}

func decrypt(client *api.Client, key, ciphertext, context string) (string, error) {
	request := map[string]any{"ciphertext": ciphertext}
	if context != "" {
		request["context"] = base64.StdEncoding.EncodeToString([]byte(context))
	}
	answer, err := client.Logical().Write("transit/decrypt/"+key, request)
	if err != nil {
		return "", err
	}
	text, err := base64.StdEncoding.DecodeString(answer.Data["plaintext"].(string))
	return string(text), err
}

// version is the key version in a ciphertext, "vault:VERSION:...".
func version(t *testing.T, ciphertext string) string {
	t.Helper()
	parts := strings.SplitN(ciphertext, ":", 3)
	if len(parts) != 3 {
		t.Fatalf("ciphertext %q has no version", ciphertext)
	}
	return parts[1]
}

// status is the HTTP status in an error of Vault's client, 0 for any other.
func status(err error) int {
	var answer *api.ResponseError
	if errors.As(err, &answer) {
		return answer.StatusCode
	}
	return 0
}

func health(t *testing.T, address string, config *tls.Config) (int, error) {
	t.Helper()
	transport := &http.Transport{TLSClientConfig: config}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport, Timeout: 10 * time.Second}
	answer, err := client.Get(fmt.Sprintf("%s/v1/sys/health", address))
	if err != nil {
		return 0, err
	}
	return answer.StatusCode, answer.Body.Close()
}
