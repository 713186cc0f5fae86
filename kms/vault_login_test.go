package kms_test

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/keycustody/custodian/custodian"
)

const logins = "auth/approle/login"

// tokenLife is how long Vault's tokens live where nobody says otherwise.
const tokenLife = 768 * time.Hour

// revoke has Vault forget every token that the provider has used.
func (b *bed) revoke(t *testing.T) {
	t.Helper()
	for _, token := range b.proxy.tokens() {
		// Tokens that are dead already are no matter.
		var answer *api.ResponseError
		if err := b.vault.Client().Auth().Token().RevokeOrphan(token); err != nil && !errors.As(err, &answer) {
			t.Fatal(err)
		}
	}
}

func (b *bed) wantCount(t *testing.T, what, part string, want int) {
	t.Helper()
	if got := b.proxy.count(part); got != want {
		t.Errorf("%s: got %d, want %d", what, got, want)
	}
}

func TestVaultTokenRevoked(t *testing.T) {
	b := newBed(t)
	w := b.wrap(t)
	b.revoke(t)
	b.wantOpens(t, "after the token was revoked", w)
	b.wantCount(t, "logins", logins, 2)
}

func TestVaultTokenRevokedUnderLoad(t *testing.T) {
	b := newBed(t)
	w := b.wrap(t)
	b.revoke(t)
	var all sync.WaitGroup
	for range 32 {
		all.Go(func() { b.wantOpens(t, "after the token was revoked", w) })
	}
	all.Wait()
	b.wantCount(t, "logins", logins, 2)
}

func TestVaultTokenExpires(t *testing.T) {
	b := newBed(t)
	w := b.wrap(t)
	b.clock.Add(tokenLife/2 + time.Hour)
	b.wantOpens(t, "in the middle of the token's life", w)
	b.wantCount(t, "logins in the middle of the token's life", logins, 1)

	b.clock.Add(tokenLife / 4)
	b.wantOpens(t, "near the end of the token's life", w)
	b.wantCount(t, "logins near the end of the token's life", logins, 2)

	b.clock.Add(tokenLife / 3 * 2)
	b.proxy.set(only(logins, answer(http.StatusInternalServerError, `{"errors":["internal error"]}`)))
	for range 5 {
		b.wantOpens(t, "when the login cannot be renewed yet", w)
	}
	b.wantCount(t, "logins when the login cannot be renewed", logins, 3)

	b.clock.Add(tokenLife / 3)
	b.wantRefused(t, "when the login has ended and there is no other", w, custodian.ErrProviderUnavailable)
	b.proxy.set(forward)
	b.pass()
	b.wantOpens(t, "when logins work again", w)
}

func TestVaultSecretIDGone(t *testing.T) {
	b := newBed(t)
	w := b.wrap(t)
	file := b.config.Vault.AppRole.SecretIDFile
	secretID, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	b.write(t, "auth/approle/role/"+b.key+"/secret-id/destroy", map[string]any{"secret_id": string(secretID)})
	b.wantOpens(t, "while the token lives", w)
	b.revoke(t)

	// It is an outage, and no storm of logins.
	before := b.proxy.count(logins)
	for range 20 {
		err := b.wantRefused(t, "without a secret ID", w, custodian.ErrProviderUnavailable)
		if err != nil && !strings.Contains(err.Error(), "refuses our login") {
			t.Errorf("open without a secret ID: got %q, want it to say that the login is refused", err)
		}
	}
	b.wantCount(t, "logins in 20 calls without a secret ID", logins, before+1)
	b.clock.Add(time.Second)
	b.wantRefused(t, "a second later", w, custodian.ErrProviderUnavailable)
	b.wantCount(t, "logins a second later", logins, before+2)

	fresh, err := b.vault.Client().Logical().Write("auth/approle/role/"+b.key+"/secret-id", nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(fresh.Data["secret_id"].(string)+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	b.pass()
	b.wantOpens(t, "with a new secret ID", w)
}

func TestVaultSecretIDFileTurnsBad(t *testing.T) {
	b := newBed(t)
	w := b.wrap(t)
	file := b.config.Vault.AppRole.SecretIDFile
	b.revoke(t)
	if err := os.Chmod(file, 0o644); err != nil {
		t.Fatal(err)
	}
	err := b.wantRefused(t, "with a secret ID that others can read", w, custodian.ErrProviderUnavailable)
	if err != nil && !strings.Contains(err.Error(), "mode 0644") {
		t.Errorf("open: got %q, want it to name the mode", err)
	}
	if err := os.Chmod(file, 0o600); err != nil {
		t.Fatal(err)
	}
	b.pass()
	b.wantOpens(t, "with the mode mended", w)
}

func TestVaultLoginFails(t *testing.T) {
	b := newBed(t)
	w := b.wrap(t)
	for _, test := range []struct {
		name    string
		behaves behaviour
		want    error
	}{
		{"500", answer(500, `{"errors":["internal error"]}`), custodian.ErrProviderUnavailable},
		{"429", answer(429, `{"errors":["rate limit quota exceeded"]}`), custodian.ErrProviderThrottled},
		{"403 of a firewall", answer(403, "<html>blocked</html>"), custodian.ErrProviderUnavailable},
		{"403 of Vault", answer(403, `{"errors":["permission denied"]}`), custodian.ErrProviderUnavailable},
		{"garbage", answer(200, "garbage"), custodian.ErrProviderUnavailable},
		{"no token", answer(200, `{"auth":null}`), custodian.ErrProviderUnavailable},
		{"empty", answer(200, ""), custodian.ErrProviderUnavailable},
		{"reset", reset, custodian.ErrProviderUnavailable},
		{"reset after doing it", resetAfter, custodian.ErrProviderUnavailable},
		{"hang", hang, custodian.ErrProviderUnavailable},
	} {
		t.Run(test.name, func(t *testing.T) {
			b.revoke(t)
			b.proxy.set(only(logins, test.behaves))
			b.patience = 0
			if test.name == "hang" {
				b.patience = 500 * time.Millisecond
			}
			err := b.wantRefused(t, "when the login answers "+test.name, w, test.want)
			if err != nil && !strings.Contains(err.Error(), "log in to vault") {
				t.Errorf("open: got %q, want it to name the login", err)
			}
			b.proxy.set(forward)
			b.pass()
			b.wantOpens(t, "when logins work again", w)
		})
	}
}

// A refusal that is repeated after a good login is a denial. It costs no storm
// of logins, and it ends with the call after the policy came back.
func TestVaultDenied(t *testing.T) {
	b := newBed(t)
	w := b.wrap(t)
	b.vault.WritePolicy(b.key, policy(b.key, "encrypt"))
	for range 20 {
		b.wantRefused(t, "without the right to decrypt", w, custodian.ErrProviderDenied)
	}
	b.wantCount(t, "logins in 20 denied calls", logins, 2)
	b.allow()
	b.wantOpens(t, "with the right again, no time having passed", w)

	b.revoke(t)
	b.wantOpens(t, "after a denial and a revoked token", w)
}

// tokenBed is a bed whose provider logs in by a token file.
func tokenBed(t *testing.T, request *api.TokenCreateRequest) (b *bed, file string) {
	t.Helper()
	b = newBed(t)
	file = write(t, t.TempDir(), "token", b.token(t, request)+"\n", 0o600)
	b.config.Vault.TokenFile, b.config.Vault.AppRole.RoleIDFile, b.config.Vault.AppRole.SecretIDFile = file, "", ""
	b.p = open(t, b.config)
	return b, file
}

func (b *bed) token(t *testing.T, request *api.TokenCreateRequest) string {
	t.Helper()
	made := *request
	made.Policies = append([]string{b.key}, made.Policies...)
	secret, err := b.vault.Client().Auth().Token().Create(&made)
	if err != nil {
		t.Fatal(err)
	}
	return secret.Auth.ClientToken
}

func TestVaultTokenFile(t *testing.T) {
	b, file := tokenBed(t, &api.TokenCreateRequest{})
	w := b.wrap(t)
	b.revoke(t)
	// A dead token is an outage, not a denial: nothing proves the login good.
	b.wantRefused(t, "with a dead token", w, custodian.ErrProviderUnavailable)
	for range 20 {
		b.wantRefused(t, "with a dead token", w, custodian.ErrProviderUnavailable)
	}
	if got := b.proxy.count("lookup-self"); got > 3 {
		t.Errorf("questions about a dead token in 21 calls: got %d, want at most 3", got)
	}

	write(t, "", file, b.token(t, &api.TokenCreateRequest{}), 0o600)
	b.pass()
	b.wantOpens(t, "with a new token in the file", w)

	b.vault.WritePolicy(b.key, policy(b.key, "encrypt"))
	b.wantRefused(t, "without the right to decrypt", w, custodian.ErrProviderDenied)
	b.allow()
	b.wantOpens(t, "with the right again", w)

	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	b.wantOpens(t, "without the file, while the token lives", w)
	b.revoke(t)
	b.wantRefused(t, "without the file", w, custodian.ErrProviderUnavailable)
}

func TestVaultTokenFileIsReadAtOnceWhenTheTokenIsRefused(t *testing.T) {
	b, file := tokenBed(t, &api.TokenCreateRequest{})
	w := b.wrap(t)
	write(t, "", file, b.token(t, &api.TokenCreateRequest{}), 0o600)
	b.revoke(t)
	b.wantOpens(t, "with a new token in the file, no time having passed", w)
}

// A token that may not ask about itself works; its refusals prove nothing.
func TestVaultTokenWithoutDefaultPolicy(t *testing.T) {
	b, _ := tokenBed(t, &api.TokenCreateRequest{NoDefaultPolicy: true})
	w := b.wrap(t)
	b.wantOpens(t, "with a token without the default policy", w)
	b.vault.WritePolicy(b.key, policy(b.key, "encrypt"))
	b.wantRefused(t, "without the right to decrypt", w, custodian.ErrProviderUnavailable)
	b.allow()
	b.wantOpens(t, "with the right again", w)
}

func TestVaultTokenIsRenewed(t *testing.T) {
	renewable := true
	b, _ := tokenBed(t, &api.TokenCreateRequest{Period: "1h", Renewable: &renewable})
	w := b.wrap(t)
	b.wantCount(t, "renewals at the first call", "renew-self", 1)
	b.clock.Add(30 * time.Minute)
	b.wantOpens(t, "half way", w)
	b.wantCount(t, "renewals half way", "renew-self", 1)
	b.clock.Add(15 * time.Minute)
	b.wantOpens(t, "at three quarters", w)
	b.wantCount(t, "renewals at three quarters", "renew-self", 2)
	b.clock.Add(45 * time.Minute)
	b.wantOpens(t, "beyond the first hour", w)
	if got, want := len(b.proxy.tokens()), 1; got != want {
		t.Errorf("tokens used: got %d, want %d", got, want)
	}
}

func TestVaultLoginAnswersOfATokenFile(t *testing.T) {
	b, _ := tokenBed(t, &api.TokenCreateRequest{})
	for i, text := range []string{`{"data":{}}`, `{"data":{"ttl":"soon"}}`, `{"data":{"ttl":1.5}}`, `{"data":{"ttl":99999999999999999999}}`, `{}`, ``} {
		b.proxy.set(only("lookup-self", answer(200, text)))
		_, err := b.p.Wrap(t.Context(), inner, context1)
		wantOnly(t, fmt.Sprintf("answer %d about the token", i), err, custodian.ErrProviderUnavailable)
		b.pass()
	}
	b.proxy.set(forward)
	b.wrap(t)
}
