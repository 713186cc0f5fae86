package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/client"
	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/softhsm/fault"
)

// A served custody has one category and one key, and the two clients that the
// fault tests call with.
type served struct {
	*custody
	packager, provider *client.Client
	kid, key           []byte
}

func serve(c *custody) *served {
	t := c.t
	t.Helper()
	if _, err := c.dial(custodian.RoleOfficer).CreateCategory(t.Context(), &v1.CreateCategoryRequest{Name: "movies"}); err != nil {
		t.Fatal(err)
	}
	s := &served{custody: c, packager: c.dial(custodian.RolePackager), provider: c.dial(custodian.RoleProvider)}
	res, err := s.issue("film-1")
	if err != nil {
		t.Fatal(err)
	}
	s.kid, s.key = res.Keys[0].Key.Kid, res.Keys[0].Key.GetKey()
	return s
}

func (s *served) issue(content string) (*v1.IssueContentKeysResponse, error) {
	return s.packager.IssueContentKeys(s.t.Context(), &v1.IssueContentKeysRequest{Category: "movies", ContentId: []byte(content),
		Keys: []*v1.ContentKeySpec{{TrackType: "SD", Scheme: "cenc"}}})
}

// get is one callback; it returns the reason of a refusal.
func (s *served) get() string {
	s.t.Helper()
	got := s.getOnce()
	for again := 0; got == "DEADLINE" && again < 3; again++ {
		got = s.getOnce() // a disk that stalls under other tests is not what is asked
	}
	return got
}

func (s *served) getOnce() string {
	s.t.Helper()
	res, err := s.provider.GetContentKeys(s.t.Context(), &v1.GetContentKeysRequest{Kids: [][]byte{s.kid}})
	if err != nil {
		if r := client.ReasonOf(err); r != "" {
			return r
		}
		return err.Error()
	}
	if !bytes.Equal(res.Results[0].GetKey().GetKey(), s.key) {
		return "another key than was issued"
	}
	return ""
}

// wantRecovery calls until the key comes back, for half a minute at most. On
// the way only these refusals may be heard: never that the key is unknown.
func (s *served) wantRecovery(allowed ...string) {
	t := s.t
	t.Helper()
	limit := time.Now().Add(30 * time.Second)
	for time.Now().Before(limit) {
		got := s.get()
		if got == "" {
			return
		}
		if !slices.Contains(allowed, got) {
			t.Fatalf("while the token recovers: got %s, want one of %v", got, allowed)
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Fatalf("no recovery in 30 s without a restart:\n%s", s.logText())
}

// withFaults makes a custody whose module stands behind the fault module.
func withFaults(t *testing.T) (*custody, *fault.Control) {
	t.Helper()
	c, f := provisionWithFaults(t)
	c.mustRun("init", "-config", c.dev.configFile())
	c.mustStart()
	return c, f
}

// provisionWithFaults is the same without init and start.
func provisionWithFaults(t *testing.T) (*custody, *fault.Control) {
	t.Helper()
	c := provision(t)
	f := fault.Build(t, c.config.HSM.Module)
	raw, err := os.ReadFile(c.dev.configFile())
	if err != nil {
		t.Fatal(err)
	}
	changed := strings.Replace(string(raw), "module: "+c.config.HSM.Module, "module: "+f.Module, 1)
	if changed == string(raw) {
		t.Fatalf("the configuration does not name %s", c.config.HSM.Module)
	}
	changed = strings.Replace(changed, "drain_timeout: 0s", "drain_timeout: 2s", 1)
	changed = strings.Replace(changed, "call_timeout: 0s", "call_timeout: 1s", 1)
	if err := os.WriteFile(c.dev.configFile(), []byte(changed), 0o600); err != nil {
		t.Fatal(err)
	}
	c.env = f.Env()
	return c, f
}

// CK_RV values of PKCS#11.
const ckrSessionHandleInvalid, ckrDeviceError = 0xB3, 0x30

// TestSessionsClosedFromOutside: all sessions turn invalid at once. The
// daemon opens new ones.
func TestSessionsClosedFromOutside(t *testing.T) {
	c, f := withFaults(t)
	s := serve(c)
	f.Fail("C_DecryptInit", ckrSessionHandleInvalid, 4)
	s.wantRecovery("HSM_UNAVAILABLE", "DEADLINE")
}

// TestDeviceErrors: the device fails for a while, before and after doing what
// it was asked.
func TestDeviceErrors(t *testing.T) {
	c, f := withFaults(t)
	s := serve(c)
	for _, fn := range []string{"C_DecryptInit", "C_Decrypt"} {
		f.Fail(fn, ckrDeviceError, 3)
		s.wantRecovery("HSM_UNAVAILABLE", "DEADLINE")
		f.FailAfter(fn, ckrDeviceError, 3)
		s.wantRecovery("HSM_UNAVAILABLE", "DEADLINE")
	}
	f.FailAfter("C_Encrypt", ckrDeviceError, 1)
	if _, err := s.issue("film-2"); err != nil && client.ReasonOf(err) != "HSM_UNAVAILABLE" {
		t.Errorf("issue while the token fails after sealing: got %v, want HSM_UNAVAILABLE", err)
	}
	f.Reset()
	s.wantRecovery("HSM_UNAVAILABLE", "DEADLINE")
	if _, err := s.issue("film-2"); err != nil {
		t.Errorf("issue after the fault: %v", err)
	}
}

// TestCallThatHangs: a call into the module never returns. The caller hears
// DEADLINE in its 250 ms, others go on, and a stop ends with the documented
// self-exit because the call cannot be cancelled.
func TestCallThatHangs(t *testing.T) {
	t.Parallel() // it waits, and takes little of the CPUs
	c, f := withFaults(t)
	s := serve(c)
	f.Hang("C_Decrypt")
	began := time.Now()
	if got := s.get(); got != "DEADLINE" && got != "HSM_UNAVAILABLE" {
		t.Errorf("callback while the token hangs: got %q, want DEADLINE", got)
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("callback while the token hangs took %s", took)
	}
	await(t, "the call that hangs", func() bool { return f.Hanging("C_Decrypt") > 0 })
	if live := c.http("/livez"); live != 200 {
		t.Errorf("/livez while the token hangs: got %d, want 200", live)
	}
	if code := c.stop(); code != exitHung {
		t.Errorf("stop with a hung call: exit %d, want %d\n%s", code, exitHung, c.logText())
	}
}

// TestHangUnderCallbacksOnly: the token hangs, and nobody but callers with
// their 250 ms asks it for anything. They hear that the token is away before
// long, and get their keys again when it is back.
func TestHangUnderCallbacksOnly(t *testing.T) {
	c, f := withFaults(t)
	s := serve(c)
	f.Hang("C_Decrypt")
	began := time.Now()
	limit := 2*time.Second + 1500*time.Millisecond // twice hsm.call_timeout, and one callback per session
	for got := ""; got != "HSM_UNAVAILABLE"; got = s.get() {
		if got != "" && got != "DEADLINE" {
			t.Fatalf("callback while the token hangs: got %s, want DEADLINE or HSM_UNAVAILABLE", got)
		}
		if time.Since(began) > limit {
			t.Fatalf("callbacks %s after the token began to hang: got %s, want HSM_UNAVAILABLE", time.Since(began), got)
		}
	}
	f.Resume("C_Decrypt")
	s.wantRecovery("HSM_UNAVAILABLE", "DEADLINE")
	for range 20 {
		if got := s.get(); got != "" {
			t.Errorf("callback after the token is back: got %s", got)
		}
	}
}

// TestTokenTakenAway: the token's files go and come back. Readiness follows,
// no key is called unknown, and service returns without a restart.
func TestTokenTakenAway(t *testing.T) {
	t.Parallel() // it waits, and takes little of the CPUs
	s := serve(newCustody(t))
	officer := s.dial(custodian.RoleOfficer)
	tokens := filepath.Join(filepath.Dir(s.config.HSM.SoftHSMConf), "tokens")
	if _, err := os.Stat(tokens); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(tokens, tokens+".away"); err != nil {
		t.Fatal(err)
	}
	created := make(chan error, 1)
	go func() { // it is given ten seconds
		_, err := officer.CreateCategory(t.Context(), &v1.CreateCategoryRequest{Name: "series"})
		created <- err
	}()
	for range 20 { // session objects may go on for a while: that is the module's business
		if got := s.getOnce(); got != "" && got != "HSM_UNAVAILABLE" && got != "DEADLINE" {
			t.Fatalf("callback while the token is away: got %s", got)
		}
		time.Sleep(20 * time.Millisecond)
	}
	if err := <-created; client.ReasonOf(err) != "HSM_UNAVAILABLE" {
		t.Errorf("new KEK while the token is away: got %v, want HSM_UNAVAILABLE", err)
	}
	if err := os.Rename(tokens+".away", tokens); err != nil {
		t.Fatal(err)
	}
	s.wantRecovery("HSM_UNAVAILABLE", "DEADLINE")
	limit := time.Now().Add(30 * time.Second)
	for {
		_, err := s.dial(custodian.RoleOfficer).CreateCategory(t.Context(), &v1.CreateCategoryRequest{Name: "series"})
		if err == nil || client.ReasonOf(err) == "CATEGORY_EXISTS" {
			break
		}
		if time.Now().After(limit) {
			t.Fatalf("no new KEK 30 s after the token is back: %v\n%s", err, s.logText())
		}
		time.Sleep(200 * time.Millisecond)
	}
	if code := s.stop(); code != 0 {
		t.Errorf("stop: exit %d", code)
	}
}

// TestTokenReinitialised: another process wipes the token. Nothing is
// released under a wrong key, and a restart refuses and says what is missing.
func TestTokenReinitialised(t *testing.T) {
	s := serve(newCustody(t))
	c := s.config.HSM
	so, err := filepath.Glob(filepath.Join(filepath.Dir(c.SoftHSMConf), "*so*pin*"))
	if err != nil || len(so) != 1 {
		t.Fatalf("SO PIN file: %v %v", so, err)
	}
	soPIN, err := os.ReadFile(so[0])
	if err != nil {
		t.Fatal(err)
	}
	pin, err := os.ReadFile(c.PINFile)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("softhsm2-util", "--init-token", "--token", c.Token, "--label", c.Token,
		"--so-pin", string(bytes.TrimSpace(soPIN)), "--pin", string(bytes.TrimSpace(pin)))
	cmd.Env = append(os.Environ(), "SOFTHSM2_CONF="+c.SoftHSMConf)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("re-initialise the token: %v: %s", err, out)
	}
	for range 20 {
		if got := s.get(); got != "" && got != "HSM_UNAVAILABLE" && got != "DEADLINE" && got != "RECORD_CORRUPT" && got != "AUDIT_BLOCKED" {
			t.Fatalf("callback after the token was wiped: got %s", got)
		}
		time.Sleep(50 * time.Millisecond)
	}
	s.kill()
	err = s.start()
	if err == nil {
		t.Fatal("the daemon serves on a wiped token")
	}
	s.wantLog("is not in the token")
}

// TestFlippedByteInToken: one byte of the MEK's object file changes. SoftHSM
// would silently use another key; the canary does not let it.
func TestFlippedByteInToken(t *testing.T) {
	s := serve(newCustody(t))
	if code := s.stop(); code != 0 {
		t.Fatalf("stop: exit %d", code)
	}
	files, err := filepath.Glob(filepath.Join(filepath.Dir(s.config.HSM.SoftHSMConf), "tokens", "*", "*.object"))
	if err != nil || len(files) == 0 {
		t.Fatalf("object files: %v %v", files, err)
	}
	flipped := false
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		// The MEK's file: its label in clear or not, it is the one of the three
		// that is a secret key and not the token's own.
		if filepath.Base(f) == "token.object" || !s.flipValue(b) {
			continue
		}
		if err := os.WriteFile(f, b, 0o600); err != nil {
			t.Fatal(err)
		}
		flipped = true
	}
	if !flipped {
		t.Fatal("no object file with a CKA_VALUE of a wrapped AES key was found")
	}
	if err := s.start(); err == nil {
		t.Fatal("the daemon serves with a damaged MEK")
	}
	if log := s.logText(); !strings.Contains(log, "canary") && !strings.Contains(log, "not in the token") {
		t.Errorf("the refusal does not name the canary:\n%s", log)
	}
}

// flipValue flips a byte in the CKA_VALUE of an AES key object file. SoftHSM
// writes attributes as type (8 bytes, big endian), kind, length and bytes;
// the value is IV and ciphertext, so a flip in the IV changes the key and
// leaves the padding whole.
func (s *served) flipValue(b []byte) bool {
	value := []byte{0, 0, 0, 0, 0, 0, 0, 0x11, 0, 0, 0, 0, 0, 0, 0, 3} // CKA_VALUE, byte string
	i := bytes.Index(b, value)
	if i < 0 || len(b) < i+len(value)+8+4 {
		return false
	}
	b[i+len(value)+8+3] ^= 1
	return true
}

// TestWrongPIN: a wrong PIN is tried once, and a restart does not try again.
func TestWrongPIN(t *testing.T) {
	c, f := withFaults(t)
	if code := c.stop(); code != 0 {
		t.Fatalf("stop: exit %d", code)
	}
	pin, err := os.ReadFile(c.config.HSM.PINFile)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(c.config.HSM.PINFile, []byte("0000000000000000"), 0o600); err != nil {
		t.Fatal(err)
	}
	before := f.Calls("C_Login")
	for try := range 2 {
		lines := c.launch()
		c.awaitLog(lines, "sealed by the PIN latch")
		c.kill()
		if got := f.Calls("C_Login") - before; got != 1 {
			t.Fatalf("after start %d with a wrong PIN: %d logins, want 1 in all", try+1, got)
		}
	}
	// The operator puts the PIN right, and removes the latch.
	if err := os.WriteFile(c.config.HSM.PINFile, pin, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(c.config.latchPath()); err != nil {
		t.Fatal(err)
	}
	c.mustStart()
}

// awaitLog waits for a line of the log.
func (c *custody) awaitLog(lines <-chan string, want string) {
	c.t.Helper()
	limit := time.After(30 * time.Second)
	for {
		select {
		case line, ok := <-lines:
			if !ok {
				c.t.Fatalf("the daemon ended before it said %q:\n%s", want, c.logText())
			}
			if strings.Contains(line, want) {
				return
			}
		case <-limit:
			c.t.Fatalf("the daemon does not say %q:\n%s", want, c.logText())
		}
	}
}
