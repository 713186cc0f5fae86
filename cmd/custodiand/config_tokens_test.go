package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	jose "github.com/go-jose/go-jose/v4"
	"github.com/prometheus/client_golang/prometheus"
)

// An issuer is a playback service's key.
type issuer struct {
	kid string
	key *ecdsa.PrivateKey
}

func newIssuer(t *testing.T, kid string) issuer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return issuer{kid, key}
}

func jwkSet(t *testing.T, issuers ...issuer) []byte {
	t.Helper()
	var set jose.JSONWebKeySet
	for _, i := range issuers {
		set.Keys = append(set.Keys, jose.JSONWebKey{Key: &i.key.PublicKey, KeyID: i.kid})
	}
	b, err := json.Marshal(set)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestTokenSources: keys in a file and at a URL are followed; what is bad, or
// away, leaves the keys that were good.
func TestTokenSources(t *testing.T) {
	first, second := newIssuer(t, "k1"), newIssuer(t, "k2")
	for _, kind := range []string{"file", "url"} {
		t.Run(kind, func(t *testing.T) {
			var set atomic.Pointer[[]byte]
			put := func(b []byte) { set.Store(&b) }
			put(jwkSet(t, first))
			ic := TokenIssuerConfig{Issuer: "https://play.test", Categories: []string{"*"}, Refresh: time.Second}
			if kind == "file" {
				ic.JWKSFile = filepath.Join(t.TempDir(), "jwks.json")
				put = func(b []byte) {
					if err := os.WriteFile(ic.JWKSFile, b, 0o600); err != nil {
						t.Fatal(err)
					}
				}
				put(jwkSet(t, first))
			} else {
				s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
					if b := *set.Load(); b != nil {
						w.Write(b)
						return
					}
					w.WriteHeader(http.StatusBadGateway)
				}))
				defer s.Close()
				ic.JWKSURL = s.URL
			}
			config := &TokensConfig{Audience: "custodian.test", Issuers: []TokenIssuerConfig{ic}}
			if faults := config.check(); len(faults) > 0 {
				t.Fatal(faults)
			}
			sources, sets, err := newTokenSources(t.Context(), config, prometheus.NewRegistry(), slog.New(slog.DiscardHandler))
			if err != nil {
				t.Fatal(err)
			}
			keys := sets["https://play.test"]
			if got, want := keys.Loaded(), kind == "file"; got != want {
				t.Errorf("loaded before it runs: got %v, want %v", got, want)
			}
			sources[0].pause = 10 * time.Millisecond
			ctx, stop := context.WithCancel(t.Context())
			done := make(chan struct{})
			go func() { sources[0].run(ctx); close(done) }()
			defer func() { stop(); <-done }()
			await(t, "the first set", func() bool { return keys.Knows("k1") })
			put(jwkSet(t, first, second))
			await(t, "a key more", func() bool { return keys.Knows("k2") })
			put([]byte("not a set"))
			time.Sleep(1200 * time.Millisecond)
			if !keys.Knows("k1") || !keys.Knows("k2") {
				t.Error("after a bad set: the good keys are gone")
			}
			put(jwkSet(t, second))
			await(t, "a key that was retired", func() bool { return !keys.Knows("k1") })
		})
	}
}

// await waits for what must come soon.
func await(t *testing.T, what string, come func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !come(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s did not come in 30 s", what)
		}
	}
}

func TestTokensConfigFaults(t *testing.T) {
	bad := filepath.Join(t.TempDir(), "bad.json")
	if err := os.WriteFile(bad, []byte(`{"keys":[]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	hour := -time.Hour
	c := Config{Grants: []GrantConfig{{Identity: "a", Role: "drm-provider", Categories: []string{"*"}}}, Tokens: &TokensConfig{ClockSkew: &hour, Issuers: []TokenIssuerConfig{
		{Issuer: "a"}, {Issuer: "b", JWKSFile: bad, JWKSURL: "http://example.test/jwks"}, {Issuer: "c", JWKSFile: "/nowhere", Refresh: time.Millisecond, CAFile: "/nowhere"}}}}
	_, err := c.policy(nil)
	text := ""
	for _, f := range append(c.Tokens.check(), err) {
		text += f.Error() + "\n"
	}
	for _, want := range []string{"tokens.issuers[0].jwks_file: set it", "tokens.issuers[1].jwks_file: set it", "tokens.issuers[1].jwks_file: JWK set", "tokens.issuers[1].jwks_url: scheme",
		"tokens.issuers[2].jwks_file: open /nowhere", "tokens.issuers[2].refresh: ", "tokens.issuers[2].ca_file: ", "tokens.clock_skew: ", "tokens.audience: ", "tokens.issuers[0].categories: empty"} {
		if !strings.Contains(text, want) {
			t.Errorf("got\n%s\nwant it to say %q", text, want)
		}
	}
	// An empty section asks for tokens that nobody could sign.
	if _, err := (&Config{Grants: c.Grants, Tokens: &TokensConfig{}}).policy(nil); err == nil {
		t.Error("an empty section: got no fault")
	}
	if _, err := (&Config{Grants: c.Grants}).policy(nil); err != nil {
		t.Errorf("no section: got %v, want what was before there were tokens", err)
	}
}
