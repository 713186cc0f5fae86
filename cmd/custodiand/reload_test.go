package main

import (
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/client"
	"github.com/keycustody/custodian/custodian"
)

const reloadedLine = "reloaded grants, budgets, signers, recipients and certificates"

// hangUp sends SIGHUP and waits for what the log has to say about it.
func (c *custody) hangUp(want string) {
	c.t.Helper()
	before := len(c.logText())
	if err := c.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		c.t.Fatal(err)
	}
	for limit := time.Now().Add(10 * time.Second); !strings.Contains(c.logText()[before:], want); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(limit) {
			c.t.Fatalf("after SIGHUP the daemon does not say %q:\n%s", want, tail(c.logText()))
		}
	}
}

// TestHangupBeforeService: SIGHUP does not end a daemon that waits, and the
// grants that it takes are those that service begins with.
func TestHangupBeforeService(t *testing.T) {
	c := provision(t)
	lines := c.launch()
	c.awaitLog(lines, "not initialised")
	c.edit("role: drm-provider", "role: no-such-role")
	c.hangUp("the last good configuration stays")
	c.edit("role: no-such-role", "role: auditor")
	c.hangUp(reloadedLine)
	c.mustRun("init", "-config", c.dev.configFile())
	if err := c.awaitServing(lines); err != nil {
		t.Fatal(err)
	}
	_, err := c.dial(custodian.RoleProvider).GetContentKeys(t.Context(), &v1.GetContentKeysRequest{Kids: [][]byte{[]byte("0123456789abcdef")}})
	if got := client.ReasonOf(err); got != "DENIED" {
		t.Errorf("callback of one who lost the grant before service began: got %v, want DENIED", err)
	}
	if _, err := c.dial(custodian.RoleOfficer).CreateCategory(t.Context(), &v1.CreateCategoryRequest{Name: "movies"}); err != nil {
		t.Errorf("a grant that did not change: %v", err)
	}
}

// TestHangupWhileSealed: nor does it end one that the PIN latch holds.
func TestHangupWhileSealed(t *testing.T) {
	c := provision(t)
	c.mustRun("init", "-config", c.dev.configFile())
	if err := os.WriteFile(c.config.latchPath(), []byte("failed\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	c.awaitLog(c.launch(), "sealed by the PIN latch")
	c.hangUp(reloadedLine)
	if code := c.stop(); code != 0 {
		t.Errorf("stop: exit %d, want 0\n%s", code, tail(c.logText()))
	}
}

// TestReloadNamesWhatNeedsARestart: a key that is not taken at SIGHUP is not
// passed over in silence.
func TestReloadNamesWhatNeedsARestart(t *testing.T) {
	c := newCustody(t)
	c.edit("role: drm-provider", "role: auditor")
	before := len(c.logText())
	c.hangUp(reloadedLine)
	if log := c.logText()[before:]; strings.Contains(log, "restart") {
		t.Errorf("new grants alone: the log asks for a restart:\n%s", log)
	}
	c.edit("drain_timeout: 0s", "drain_timeout: 7s")
	c.edit("trust_domain: ", "trust_domain: other.")
	c.hangUp(`keys="hsm.drain_timeout tls.client_cas[0].trust_domain"`)
}

// TestChangedKeys: each kind of difference, by its key and never by its value.
func TestChangedKeys(t *testing.T) {
	base := func() *Config {
		return &Config{Listen: "127.0.0.1:1", TLS: TLSConfig{ClientCAs: []CAConfig{{Name: "a"}, {Name: "b"}}}, Grants: []GrantConfig{{Identity: "x"}}}
	}
	for _, test := range []struct {
		name   string
		change func(*Config)
		want   string
	}{
		{"nothing", func(*Config) {}, ""},
		{"grants", func(c *Config) { c.Grants = nil }, ""},
		{"signers", func(c *Config) { c.Packagers.Signers = []SignerConfig{{Name: "a"}} }, ""},
		{"the packagers' listener", func(c *Config) { c.Packagers.Listen = "127.0.0.1:3" }, "packagers.listen"},
		{"a value", func(c *Config) { c.Listen = "127.0.0.1:2" }, "listen"},
		{"within a part", func(c *Config) { c.Limits.KEKLifetime = time.Minute }, "limits.kek_lifetime"},
		{"within a list", func(c *Config) { c.TLS.ClientCAs[1].TrustDomain = "b.test" }, "tls.client_cas[1].trust_domain"},
		{"a longer list", func(c *Config) { c.TLS.ClientCAs = append(c.TLS.ClientCAs, CAConfig{}) }, "tls.client_cas"},
		{"a list that is gone", func(c *Config) { c.TLS.ClientCAs = nil }, "tls.client_cas"},
		{"two", func(c *Config) { c.DataDir, c.Log.Level = "/x", "debug" }, "data_dir log.level"},
	} {
		t.Run(test.name, func(t *testing.T) {
			loaded := base()
			test.change(loaded)
			keys, err := restartKeys(base(), loaded)
			if err != nil {
				t.Fatal(err)
			}
			if got := strings.Join(keys, " "); got != test.want {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
}
