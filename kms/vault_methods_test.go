package kms_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/kms"
)

func (b *bed) enableAuth(t *testing.T, path, kind string) {
	t.Helper()
	if err := b.vault.Client().Sys().EnableAuthWithOptions(path, &api.EnableAuthOptions{Type: kind}); err != nil {
		t.Fatalf("enable %s at %s: %v", kind, path, err)
	}
}

// endTokens has Vault forget every token that one auth method gave.
func (b *bed) endTokens(t *testing.T, path string) {
	t.Helper()
	if err := b.vault.Client().Sys().RevokePrefix("auth/" + path + "/login"); err != nil {
		t.Fatalf("revoke the tokens of %s: %v", path, err)
	}
}

// A login by certificate ends at Vault itself, so there is no proxy here.
func TestVaultLoginByCertificate(t *testing.T) {
	b := newBed(t)
	b.enableAuth(t, "cert", "cert")
	ca, err := os.ReadFile(b.vault.CAFile)
	if err != nil {
		t.Fatal(err)
	}
	trust := func(name string) {
		b.write(t, "auth/cert/certs/"+name, map[string]any{"certificate": string(ca), "allowed_common_names": "custodian test client", "token_policies": b.key})
	}
	trust("custodian")
	b.config.Vault.Address, b.config.Vault.CAFile = b.vault.Address, b.vault.CAFile
	b.config.Vault.AppRole, b.config.Vault.Cert = kms.AppRole{}, kms.CertLogin{Role: "custodian"}
	b.p = open(t, b.config)
	w := b.wrap(t)
	b.wantOpens(t, "after a login by certificate", w)
	b.endTokens(t, "cert")
	b.wantOpens(t, "after the token was revoked", w)

	if _, err := b.vault.Client().Logical().Delete("auth/cert/certs/custodian"); err != nil {
		t.Fatal(err)
	}
	trust("somebody-else") // whose role is not asked for
	b.endTokens(t, "cert")
	err = b.wantRefused(t, "when the certificate is not trusted any more", w, custodian.ErrProviderUnavailable)
	if err != nil && !strings.Contains(err.Error(), "refuses our login") {
		t.Errorf("open when the certificate is not trusted any more: got %q, want it to name the login", err)
	}
	trust("custodian")
	b.pass()
	b.wantOpens(t, "when the certificate is trusted again", w)
}

// Vault's Kubernetes method asks a Kubernetes API server, which is not here.
// Its jwt method, mounted in its place, takes the same request.
func TestVaultLoginByServiceAccountToken(t *testing.T) {
	b := newBed(t)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	b.enableAuth(t, "kubernetes", "jwt")
	b.write(t, "auth/kubernetes/config", map[string]any{"jwt_validation_pubkeys": string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public}))})
	const subject = "system:serviceaccount:drm:custodian"
	b.write(t, "auth/kubernetes/role/custodian", map[string]any{"role_type": "jwt", "user_claim": "sub", "bound_subject": subject, "bound_audiences": "vault", "token_policies": b.key})

	file := write(t, t.TempDir(), "token", serviceAccountToken(t, key, subject, time.Hour), 0o600)
	b.config.Vault.AppRole, b.config.Vault.Kubernetes = kms.AppRole{}, kms.Kubernetes{Role: "custodian", JWTFile: file}
	b.p = open(t, b.config)
	w := b.wrap(t)
	b.wantOpens(t, "after a login by JWT", w)
	b.wantCount(t, "logins", "auth/kubernetes/login", 1)

	// The token of a service account is replaced on disk before it ends.
	write(t, "", file, serviceAccountToken(t, key, subject, -time.Hour), 0o600)
	b.revoke(t)
	err = b.wantRefused(t, "with an expired JWT", w, custodian.ErrProviderUnavailable)
	if err != nil && !strings.Contains(err.Error(), "refuses our login") {
		t.Errorf("open with an expired JWT: got %q, want it to name the login", err)
	}
	write(t, "", file, serviceAccountToken(t, key, "system:serviceaccount:drm:another", time.Hour), 0o600)
	b.pass()
	b.wantRefused(t, "with the JWT of another account", w, custodian.ErrProviderUnavailable)
	good := serviceAccountToken(t, key, subject, time.Hour)
	write(t, "", file, good, 0o600)
	b.pass()
	b.wantOpens(t, "with a new JWT", w)

	b.proxy.set(only("auth/kubernetes/login", answer(500, `{"errors":["internal error"]}`)))
	b.revoke(t)
	if err := b.wantRefused(t, "when the login breaks", w, custodian.ErrProviderUnavailable); err != nil && strings.Contains(err.Error(), good) {
		t.Error("an error shows the JWT")
	}
}

// serviceAccountToken makes a JWT (RFC 7519) as Kubernetes does, but for the
// algorithm: ES256.
func serviceAccountToken(t *testing.T, key *ecdsa.PrivateKey, subject string, life time.Duration) string {
	t.Helper()
	claims, err := json.Marshal(map[string]any{"iss": "kubernetes", "sub": subject, "aud": []string{"vault"},
		"iat": time.Now().Add(-2 * time.Hour).Unix(), "exp": time.Now().Add(life).Unix()})
	if err != nil {
		t.Fatal(err)
	}
	text := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"ES256","typ":"JWT"}`)) + "." + base64.RawURLEncoding.EncodeToString(claims)
	sum := sha256.Sum256([]byte(text))
	r, s, err := ecdsa.Sign(rand.Reader, key, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	signature := append(r.FillBytes(make([]byte, 32)), s.FillBytes(make([]byte, 32))...)
	return text + "." + base64.RawURLEncoding.EncodeToString(signature)
}

// Namespaces are of Vault Enterprise, which is not here: what is shown is that
// each request, the login's too, names the one that is configured.
func TestVaultNamespaceIsSent(t *testing.T) {
	b := newBed(t)
	b.config.Vault.Namespace = "drm/movies"
	var sent []string
	b.proxy.set(func(w http.ResponseWriter, r *http.Request, next http.HandlerFunc) {
		sent = append(sent, r.Header.Get("X-Vault-Namespace")) // one call at a time
		r.Header.Del("X-Vault-Namespace")
		next(w, r)
	})
	b.p = open(t, b.config)
	b.wantOpens(t, "in a namespace", b.wrap(t))
	if len(sent) < 4 || slices.ContainsFunc(sent, func(ns string) bool { return ns != "drm/movies" }) {
		t.Errorf("namespaces sent: got %q, want drm/movies in all, of the login and of three calls or more", sent)
	}
}
