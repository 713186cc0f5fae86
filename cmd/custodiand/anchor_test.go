package main

import (
	"crypto/ed25519"
	"crypto/rand"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/anchor"
	"github.com/keycustody/custodian/internal/checkpoint"
)

// anchorTo makes the configuration one of production with that anchor, in YAML.
func (c *custody) anchorTo(anchors, startWithout string) {
	c.t.Helper()
	c.edit("mode: development", "mode: production", "list: []", "list: ["+anchors+"]", "start_without: null", "start_without: "+startWithout)
}

// know gives a witness the audit key of the running daemon.
func (c *custody) know(dir string) {
	c.t.Helper()
	res, err := c.dial(custodian.RoleAuditor).GetCheckpoint(c.t.Context())
	if err != nil {
		c.t.Fatal(err)
	}
	cp, err := checkpoint.Parse(res.GetCheckpoint())
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, strings.TrimPrefix(cp.Origin, "custodian/")+".pem"), checkpoint.FormatKey(res.GetSigningKey().GetPublicKey()), 0o600)
	}
	if err != nil {
		c.t.Fatal(err)
	}
}

// status of the only anchor.
func (c *custody) anchorStatus() (size, lag uint64, lastErr string) {
	c.t.Helper()
	s, err := c.dial(custodian.RoleAuditor).Status(c.t.Context())
	if err != nil || len(s.GetAudit().GetAnchors()) != 1 {
		c.t.Fatalf("status: %v, %v", err, s.GetAudit())
	}
	a := s.GetAudit().GetAnchors()[0]
	return a.GetSize(), a.GetLagEntries(), a.GetLastError()
}

// awaitAnchor waits until the anchor has the whole log.
func (c *custody) awaitAnchor() {
	c.t.Helper()
	for range 300 {
		if size, lag, _ := c.anchorStatus(); size > 0 && lag == 0 {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	size, lag, lastErr := c.anchorStatus()
	c.t.Fatalf("after 15 seconds the anchor has %d entries, %d are missing: %s\n%s", size, lag, lastErr, c.logText())
}

// snapshot copies store and audit log; putBack puts such a copy in their place.
func (c *custody) snapshot() string {
	c.t.Helper()
	dir := c.t.TempDir()
	copyTree(c.t, c.config.DataDir, dir)
	return dir
}

func (c *custody) putBack(snapshot string) {
	c.t.Helper()
	if err := os.RemoveAll(c.config.DataDir); err != nil {
		c.t.Fatal(err)
	}
	copyTree(c.t, snapshot, c.config.DataDir)
}

func copyTree(t testing.TB, from, to string) {
	t.Helper()
	if err := os.MkdirAll(to, 0o700); err != nil {
		t.Fatal(err)
	}
	files, err := os.ReadDir(from)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		src, dst := filepath.Join(from, f.Name()), filepath.Join(to, f.Name())
		if f.IsDir() {
			copyTree(t, src, dst)
			continue
		}
		b, err := os.ReadFile(src)
		if err == nil {
			err = os.WriteFile(dst, b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// TestRollback: store and audit log are put back together, as they were before.
// Each of them is genuine, and they fit each other. The daemon alone cannot
// see it, and with an anchor of either kind it refuses, whatever is written
// after that.
func TestRollback(t *testing.T) {
	t.Parallel() // it waits, and takes little of the CPUs
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	witness := &anchor.Server{Dir: t.TempDir(), Name: "witness.test", Key: key}
	server := httptest.NewServer(witness)
	defer server.Close()
	for kind, entry := range map[string]string{
		anchor.Directory: fmt.Sprintf("{name: worm, kind: directory, interval: 1s, path: %s}", t.TempDir()),
		anchor.Witness:   fmt.Sprintf("{name: studio, kind: witness, interval: 1s, url: %s, key: %s}", server.URL, witness.VerifierKey()),
	} {
		t.Run(kind, func(t *testing.T) {
			c := newCustody(t)
			c.know(witness.Dir)
			s := serve(c)
			if code := c.stop(); code != 0 {
				t.Fatalf("stop: exit %d", code)
			}
			without, err := os.ReadFile(c.dev.configFile())
			if err != nil {
				t.Fatal(err)
			}
			c.anchorTo(entry, "1h")
			older := c.snapshot()
			c.mustStart()
			s = &served{custody: c, packager: c.dial(custodian.RolePackager), provider: c.dial(custodian.RoleProvider), kid: s.kid, key: s.key}
			if _, err := s.issue("film-2"); err != nil {
				t.Fatal(err)
			}
			c.awaitAnchor()
			c.kill() // what the anchor has is durable here, too
			newer := c.snapshot()
			c.mustStart()
			c.awaitAnchor()
			if code := c.stop(); code != 0 {
				t.Fatalf("stop: exit %d", code)
			}

			for what, step := range map[string]struct{ back, want string }{
				"older": {older, custodian.ErrAnchorAhead.Error()},
				"newer": {newer, custodian.ErrAnchorAhead.Error()}, // by the entry of one start
			} {
				c.putBack(step.back)
				out, code := c.run("-config", c.dev.configFile())
				if code != exitIntegrity || !strings.Contains(out, step.want) {
					t.Errorf("%s: exit %d, want %d and %q\n%s", what, code, exitIntegrity, step.want, out)
				}
			}

			// Somebody starts it without the anchor, and the log grows on.
			config, err := os.ReadFile(c.dev.configFile())
			if err == nil {
				err = os.WriteFile(c.dev.configFile(), without, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
			c.putBack(older)
			c.mustStart()
			s = &served{custody: c, packager: c.dial(custodian.RolePackager), provider: c.dial(custodian.RoleProvider), kid: s.kid, key: s.key}
			for range 12 {
				if got := s.get(); got != "" {
					t.Fatalf("the older store does not serve: %s", got)
				}
			}
			if code := c.stop(); code != 0 {
				t.Fatalf("stop: exit %d", code)
			}
			if err := os.WriteFile(c.dev.configFile(), config, 0o600); err != nil {
				t.Fatal(err)
			}
			out, code := c.run("-config", c.dev.configFile())
			if code != exitIntegrity || !strings.Contains(out, custodian.ErrAnchorFork.Error()) {
				t.Errorf("another history: exit %d, want %d and %q\n%s", code, exitIntegrity, custodian.ErrAnchorFork, out)
			}
		})
	}
}

// TestNoAnchor: in production, a daemon whose anchor is away starts, says so,
// and issues and releases for the configured time; then it stops that, and goes
// on when the anchor is back.
func TestNoAnchor(t *testing.T) {
	t.Parallel() // it waits, and takes little of the CPUs
	c := newCustody(t)
	s := serve(c)
	if code := c.stop(); code != 0 {
		t.Fatalf("stop: exit %d", code)
	}
	away := filepath.Join(t.TempDir(), "worm")
	c.anchorTo("{name: worm, kind: directory, interval: 1s, path: "+away+"}", "4s")
	c.mustStart()
	began := time.Now()
	c.wantLog("NO ANCHOR ANSWERS")
	s = &served{custody: c, packager: c.dial(custodian.RolePackager), provider: c.dial(custodian.RoleProvider), kid: s.kid, key: s.key}
	if got := s.get(); got != "" {
		t.Errorf("right after the start: %s, want the key", got)
	}
	if got := c.http("/readyz"); got != http.StatusOK {
		t.Errorf("readyz right after the start: %d", got)
	}
	time.Sleep(time.Until(began.Add(5 * time.Second)))
	if got := s.get(); got != "AUDIT_BLOCKED" {
		t.Errorf("after the time without an anchor: %q, want AUDIT_BLOCKED", got)
	}
	if _, err := s.issue("film-9"); err == nil || !strings.Contains(err.Error(), "audit") {
		t.Errorf("issue: %v, want it refused", err)
	}
	if got := c.http("/readyz"); got != http.StatusServiceUnavailable {
		t.Errorf("readyz: %d, want 503", got)
	}
	metrics := c.metrics()
	for _, want := range []string{`custodian_audit_blocked 1`, `custodian_audit_anchor_lag_entries{anchor="worm",kind="directory"}`, `custodian_audit_anchor_failures_total{anchor="worm"`} {
		if !strings.Contains(metrics, want) {
			t.Errorf("the metrics do not have %s", want)
		}
	}
	if err := os.Mkdir(away, 0o700); err != nil {
		t.Fatal(err)
	}
	s.wantRecovery("AUDIT_BLOCKED")
}

// Production without an anchor that can be asked is refused.
func TestProductionNeedsAnchor(t *testing.T) {
	c := provision(t)
	for _, anchors := range []string{"", "{name: log, kind: syslog, address: 'udp:127.0.0.1:514'}"} {
		c.edit("mode: development", "mode: production", "list: []", "list: ["+anchors+"]")
		out, code := c.run("-config", c.dev.configFile(), "-check-config")
		if code != exitUsage || !strings.Contains(out, "anchors.list: no witness and no directory") {
			t.Errorf("anchors %q: exit %d, want %d and the key\n%s", anchors, code, exitUsage, out)
		}
		c.edit("mode: production", "mode: development", "list: ["+anchors+"]", "list: []")
	}
	c.edit("mode: development", "mode: produktion", "list: []", "list: [{name: a, kind: witness, interval: 1h, url: 'http://example.com'}]")
	out, code := c.run("-config", c.dev.configFile(), "-check-config")
	for _, want := range []string{"mode:", "anchors.list[0].url", "anchors.alert_after"} {
		if code != exitUsage || !strings.Contains(out, want) {
			t.Errorf("exit %d, and the output does not name %q:\n%s", code, want, out)
		}
	}
}
