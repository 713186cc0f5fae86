package main

import (
	"fmt"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	jose "github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"go.yaml.in/yaml/v3"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/certs"
	"github.com/keycustody/custodian/client"
	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/audit"
)

// configure changes the configuration file.
func (c *custody) configure(change func(*Config)) {
	c.t.Helper()
	raw, err := os.ReadFile(c.dev.configFile())
	if err != nil {
		c.t.Fatal(err)
	}
	config, err := parseConfig(raw)
	if err != nil {
		c.t.Fatal(err)
	}
	change(config)
	if raw, err = yaml.Marshal(config); err != nil {
		c.t.Fatal(err)
	}
	if err := os.WriteFile(c.dev.configFile(), raw, 0o600); err != nil {
		c.t.Fatal(err)
	}
}

// caller is a grant for one more caller of the development PKI.
func (c *custody) caller(name string, role custodian.Role) GrantConfig {
	c.t.Helper()
	ca, err := certs.OpenAuthority(filepath.Join(c.dev.dir, "pki"), devTrustDomain)
	if err != nil {
		c.t.Fatal(err)
	}
	if _, err := ca.IssueClient("/"+name, time.Hour); err != nil {
		c.t.Fatal(err)
	}
	return GrantConfig{Identity: "spiffe://" + devTrustDomain + "/" + name, Role: string(role), Categories: []string{"*"}}
}

// withTokens has every release need a token of a playback service, and returns
// what signs one for a content item. Each token is of a session of its own.
func (c *custody) withTokens() (sign func(content string) string) {
	c.t.Helper()
	playback := newIssuer(c.t.(*testing.T), "k1")
	file := filepath.Join(c.dev.dir, "playback.jwks")
	if err := os.WriteFile(file, jwkSet(c.t.(*testing.T), playback), 0o600); err != nil {
		c.t.Fatal(err)
	}
	c.configure(func(config *Config) {
		config.Tokens = &TokensConfig{Audience: "custodian.test", Issuers: []TokenIssuerConfig{{Issuer: "https://play.test", Categories: []string{"*"}, JWKSFile: file}}}
	})
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: playback.key}, (&jose.SignerOptions{}).WithType("JWT").WithHeader("kid", "k1"))
	if err != nil {
		c.t.Fatal(err)
	}
	n := 0
	return func(content string) string {
		n++
		now := time.Now()
		token, err := jwt.Signed(signer).Claims(map[string]any{"iss": "https://play.test", "aud": "custodian.test", "iat": now.Unix(), "exp": now.Add(30 * time.Second).Unix(),
			"jti": fmt.Sprintf("t-%d", n), "sid": fmt.Sprintf("s-%d", n), "content_id": content, "track_types": []string{"HD"}}).Serialize()
		if err != nil {
			c.t.Fatal(err)
		}
		return token
	}
}

// TestStolenCertificate is the drill, on the real daemon with a real token, over
// mutual TLS, with good licence tokens for everything: a provider's certificate
// walks the KIDs, and a packager's walks the content list. Each gets its budget
// and not one key more, the webhook is told, others go on, and kill -9 changes
// nothing.
func TestStolenCertificate(t *testing.T) {
	const titles, soft, hard = 30, 5, 12
	secret := strings.Repeat("s3cret-", 4)
	told := &receiver{t: t, secret: secret, got: make(chan message, 10)}
	hook := httptest.NewServer(told)
	defer hook.Close()
	c := provision(t)
	c.patient()
	sign := c.withTokens()
	secretFile := filepath.Join(c.dev.dir, "webhook.secret")
	if err := os.WriteFile(secretFile, []byte(secret), 0o600); err != nil {
		t.Fatal(err)
	}
	budget := func(action custodian.Action) BudgetConfig {
		return BudgetConfig{Caller: "*", Action: string(action), Category: "*", Window: time.Hour, SoftKIDs: soft, HardKIDs: hard}
	}
	c.configure(func(config *Config) {
		config.KMS.Webhook = WebhookConfig{URL: hook.URL, SecretFile: secretFile}
		config.Grants = append(config.Grants, c.caller("other-provider", custodian.RoleProvider), c.caller("other-packager", custodian.RolePackager))
		config.Budgets = []BudgetConfig{budget(custodian.ActionRelease), budget(custodian.ActionReissue)}
	})
	c.mustRun("init", "-config", c.dev.configFile())
	c.mustStart()
	if _, err := c.dial(custodian.RoleOfficer).CreateCategory(t.Context(), &v1.CreateCategoryRequest{Name: "movies"}); err != nil {
		t.Fatal(err)
	}
	title := func(i int) string { return fmt.Sprintf("title-%d", i) }
	issue := func(cl *client.Client, content string) ([]byte, error) {
		resp, err := cl.IssueContentKeys(t.Context(), &v1.IssueContentKeysRequest{Category: "movies", ContentId: []byte(content), Keys: []*v1.ContentKeySpec{{TrackType: "HD", Scheme: "cenc"}}})
		if err != nil {
			return nil, err
		}
		return resp.Keys[0].Key.Kid, nil
	}
	var kids [][]byte
	honest := c.dial("other-packager")
	for i := range titles {
		kid, err := issue(honest, title(i))
		if err != nil {
			t.Fatal(err)
		}
		kids = append(kids, kid)
	}
	get := func(cl *client.Client, i int) error {
		_, err := cl.GetContentKeys(t.Context(), &v1.GetContentKeysRequest{Kids: [][]byte{kids[i]}, LicenceToken: sign(title(i))})
		return err
	}
	heard := map[string]bool{} // by ID: what is told around a kill may be told twice
	hear := func() (m message, ok bool) {
		for limit := time.After(10 * time.Second); ; {
			select {
			case m = <-told.got:
				if !heard[m.ID] {
					heard[m.ID] = true
					return m, true
				}
			case <-limit:
				return m, false
			}
		}
	}
	wantTold := func(events ...string) {
		t.Helper()
		for _, want := range events {
			if m, ok := hear(); !ok || m.Event != want || m.Caller == "" {
				t.Errorf("the webhook heard %q of %q, want %s", m.Event, m.Caller, want)
			}
		}
	}

	thief := c.dial(custodian.RoleProvider)
	stolen := 0
	for i := range titles {
		if i == hard-2 { // in the middle of the walk
			c.kill()
			c.mustStart()
			thief = c.dial(custodian.RoleProvider)
		}
		switch err := get(thief, i); {
		case err == nil:
			stolen++
		case i == hard && client.ReasonOf(err) != "KID_BUDGET", i > hard && client.ReasonOf(err) != "CALLER_FROZEN":
			t.Errorf("title %d: %v", i, err)
		}
	}
	if stolen != hard {
		t.Errorf("the thief of a provider's certificate got %d keys, want its budget, %d", stolen, hard)
	}
	wantTold("caller.budget.soft", "caller.frozen")
	if log := c.logText(); !strings.Contains(log, "has broken its budget and is frozen") {
		t.Errorf("the log does not say it:\n%s", tail(log))
	}
	if err := get(c.dial("other-provider"), 0); err != nil {
		t.Errorf("another provider: %v", err)
	}

	// The packager's: all of it within the re-issue window, which is 72 hours.
	thief, stolen = c.dial(custodian.RolePackager), 0
	for i := range titles {
		switch _, err := issue(thief, title(i)); {
		case err == nil:
			stolen++
		case i == hard && client.ReasonOf(err) != "KID_BUDGET", i > hard && client.ReasonOf(err) != "CALLER_FROZEN":
			t.Errorf("title %d: %v", i, err)
		}
	}
	if stolen != hard {
		t.Errorf("the thief of a packager's certificate got %d keys, want its budget, %d", stolen, hard)
	}
	wantTold("caller.budget.soft", "caller.frozen")
	if _, err := issue(c.dial("other-packager"), "a new title"); err != nil {
		t.Errorf("another packager: %v", err)
	}

	c.kill()
	c.mustStart()
	for _, role := range []custodian.Role{custodian.RoleProvider, custodian.RolePackager} {
		cl := c.dial(role)
		err := get(cl, 0)
		if role == custodian.RolePackager {
			_, err = issue(cl, "something else")
		}
		if client.ReasonOf(err) != "CALLER_FROZEN" {
			t.Errorf("%s after a kill: %v, want CALLER_FROZEN", role, err)
		}
	}
	if err := get(c.dial("other-provider"), 1); err != nil {
		t.Errorf("another provider after a kill: %v", err)
	}
	c.kill()
	frozen, left := 0, 0
	if err := audit.Read(c.config.auditDir(), 0, func(e *audit.Entry) error {
		if e.Action == "caller.freeze" && e.Outcome == audit.Allowed {
			frozen++
		}
		if e.Action == "release" && e.Outcome == audit.Allowed && strings.HasSuffix(e.Caller, "/drm-provider") {
			left++
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if frozen != 2 || left != hard {
		t.Errorf("the audit log has %d freezes and %d keys that left to the thief, want 2 and %d", frozen, left, hard)
	}
}

// TestTokenReplayAfterKill: a token that was shown as often as it may be stays
// used up after kill -9, on the real daemon, and is bound to whom it was bound
// to.
func TestTokenReplayAfterKill(t *testing.T) {
	c := provision(t)
	c.patient()
	sign := c.withTokens()
	c.configure(func(config *Config) {
		config.Grants = append(config.Grants, c.caller("other-provider", custodian.RoleProvider))
	})
	c.mustRun("init", "-config", c.dev.configFile())
	c.mustStart()
	if _, err := c.dial(custodian.RoleOfficer).CreateCategory(t.Context(), &v1.CreateCategoryRequest{Name: "movies"}); err != nil {
		t.Fatal(err)
	}
	resp, err := c.dial(custodian.RolePackager).IssueContentKeys(t.Context(), &v1.IssueContentKeysRequest{Category: "movies", ContentId: []byte("film"), Keys: []*v1.ContentKeySpec{{TrackType: "HD", Scheme: "cenc"}}})
	if err != nil {
		t.Fatal(err)
	}
	get := func(role custodian.Role, token string) string {
		_, err := c.dial(role).GetContentKeys(t.Context(), &v1.GetContentKeysRequest{Kids: [][]byte{resp.Keys[0].Key.Kid}, LicenceToken: token})
		return client.ReasonOf(err)
	}
	if want := "\ncustodian_token_keys_load_timestamp_seconds{issuer="; !strings.Contains(c.metrics(), want) {
		t.Errorf("the metrics have no %q", want)
	}
	once, often := sign("film"), sign("film")
	if got := get(custodian.RoleProvider, once); got != "" {
		t.Fatalf("first use: %s", got)
	}
	for range 3 {
		if got := get(custodian.RoleProvider, often); got != "" {
			t.Fatalf("one of three uses: %s", got)
		}
	}
	c.kill()
	c.mustStart()
	for _, test := range []struct {
		what  string
		role  custodian.Role
		token string
		want  string
	}{
		{"the one that was used up", custodian.RoleProvider, often, "TOKEN_REPLAYED"},
		{"the other one, by another caller", "other-provider", once, "TOKEN_REPLAYED"},
		{"the second use of the other one", custodian.RoleProvider, once, ""},
		{"its third use", custodian.RoleProvider, once, ""},
		{"its fourth use", custodian.RoleProvider, once, "TOKEN_REPLAYED"},
		{"a new one", "other-provider", sign("film"), ""},
	} {
		if got := get(test.role, test.token); got != test.want {
			t.Errorf("%s: got %q, want %q", test.what, got, test.want)
		}
	}
}

// TestReloadOfRulesAndBudgets: SIGHUP takes rules and budgets, end to end; rules
// that do not compile, or budgets that cover too little, leave the last good
// ones in force.
func TestReloadOfRulesAndBudgets(t *testing.T) {
	c := provision(t)
	c.patient()
	c.mustRun("init", "-config", c.dev.configFile())
	c.mustStart()
	if _, err := c.dial(custodian.RoleOfficer).CreateCategory(t.Context(), &v1.CreateCategoryRequest{Name: "movies"}); err != nil {
		t.Fatal(err)
	}
	resp, err := c.dial(custodian.RolePackager).IssueContentKeys(t.Context(), &v1.IssueContentKeysRequest{Category: "movies", ContentId: []byte("film"),
		Keys: []*v1.ContentKeySpec{{TrackType: "HD", Scheme: "cenc"}, {TrackType: "SD", Scheme: "cenc"}}})
	if err != nil {
		t.Fatal(err)
	}
	provider := c.dial(custodian.RoleProvider)
	want := func(when string, hd, sd string) {
		t.Helper()
		for i, want := range []string{hd, sd} {
			_, err := provider.GetContentKeys(t.Context(), &v1.GetContentKeysRequest{Kids: [][]byte{resp.Keys[i].Key.Kid}})
			if got := client.ReasonOf(err); got != want {
				t.Errorf("%s, key %d: got %q, want %q", when, i, got, want)
			}
		}
	}
	want("before", "", "")
	file := filepath.Join(c.dev.dir, "rules.cedar")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(`@id("no-hd") forbid (principal, action == Custodian::Action::"release", resource) when { resource.track_type == "HD" };`)
	c.configure(func(config *Config) { config.Policy.RulesFiles = []string{file} })
	want("before SIGHUP", "", "")
	c.hangUp(reloadedLine)
	want("with the rule", "DENIED", "")
	write(`forbid (principal, action, resource) when { resource.no_such == 1 };`)
	c.hangUp("the last good configuration stays")
	want("with a rule that is none", "DENIED", "")
	write(`@id("no-sd") forbid (principal, action == Custodian::Action::"release", resource) when { resource.track_type == "SD" };`)
	c.hangUp(reloadedLine)
	want("with another rule", "", "DENIED")
	c.configure(func(config *Config) {
		config.Policy.RulesFiles = nil
		config.Budgets = []BudgetConfig{{Caller: "*", Action: "release", Category: "*", Window: time.Hour, HardKIDs: 1}}
	})
	c.hangUp("budgets: none covers reissue by")
	want("with budgets that cover too little", "", "DENIED")
	c.configure(func(config *Config) {
		config.Budgets = append(config.Budgets, BudgetConfig{Caller: "*", Action: "reissue", Category: "*", Window: time.Hour, HardKIDs: 10})
	})
	c.hangUp(reloadedLine)
	want("with budgets", "", "KID_BUDGET")
	want("frozen", "CALLER_FROZEN", "CALLER_FROZEN")
	metrics, of := c.metrics(), `{action="release",caller="spiffe://`+devTrustDomain+`/`+string(custodian.RoleProvider)+`",category="*"} 1`
	for _, line := range []string{"custodian_frozen_callers 1", "custodian_budget_kids" + of, "custodian_budget_hard_kids" + of} {
		if !strings.Contains(metrics, "\n"+line+"\n") {
			t.Errorf("the metrics have no line %q", line)
		}
	}
}
