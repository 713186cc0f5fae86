package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/client"
	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/audit"
	"github.com/keycustody/custodian/store"
)

var crashRuns = flag.Int("crash.n", 20, "random kills of the daemon under load")

// A ledger is what the daemon ever answered. Keys are kept as digests.
type ledger struct {
	mu       sync.Mutex
	byItem   map[string]answer
	released map[custodian.KID]bool
	faults   []string
}

type answer struct {
	kid custodian.KID
	key [32]byte
}

// issued takes an answer in and complains where it differs from an earlier one.
func (l *ledger) issued(item string, kid, key []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	a := answer{custodian.KID(kid), sha256.Sum256(key)}
	if before, ok := l.byItem[item]; ok && before != a {
		l.faults = append(l.faults, fmt.Sprintf("%s: was %s, is %s, or has another key", item, before.kid, a.kid))
	}
	l.byItem[item] = a
}

func (l *ledger) release(kid custodian.KID) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.released[kid] = true
}

// some returns an answer at random.
func (l *ledger) some() (answer, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, a := range l.byItem {
		return a, true
	}
	return answer{}, false
}

// load issues and retrieves until the daemon is gone.
func (l *ledger) load(ctx context.Context, packager, provider *client.Client, worker, run int) {
	for i := 0; ctx.Err() == nil; i++ {
		// Half of the items are asked for by all workers at once.
		item := fmt.Sprintf("run-%d-shared-%d", run, i/4)
		if i%2 == 0 {
			item = fmt.Sprintf("run-%d-worker-%d-%d", run, worker, i)
		}
		res, err := packager.IssueContentKeys(ctx, &v1.IssueContentKeysRequest{Category: "movies", ContentId: []byte(item),
			Keys: []*v1.ContentKeySpec{{TrackType: "SD", Scheme: "cenc"}, {TrackType: "AUDIO", Scheme: "cbcs"}}})
		if err != nil {
			return
		}
		for _, k := range res.Keys {
			l.issued(item+"/"+k.Key.TrackType, k.Key.Kid, k.Key.GetKey())
		}
		if a, ok := l.some(); ok {
			l.check(ctx, provider, a)
		}
	}
}

// check retrieves one key and holds it against what was answered before. A
// daemon that is gone is no fault; an answer that differs is.
func (l *ledger) check(ctx context.Context, provider *client.Client, a answer) bool {
	res, err := provider.GetContentKeys(ctx, &v1.GetContentKeysRequest{Kids: [][]byte{a.kid[:]}})
	if err != nil {
		var e *client.Error
		if errors.As(err, &e) && e.Reason != "" && e.Retry == 0 {
			l.mu.Lock()
			l.faults = append(l.faults, fmt.Sprintf("%s: %v", a.kid, err))
			l.mu.Unlock()
		}
		return false
	}
	l.release(a.kid)
	if got := sha256.Sum256(res.Results[0].GetKey().GetKey()); got != a.key {
		l.mu.Lock()
		l.faults = append(l.faults, fmt.Sprintf("%s: another key than was answered before", a.kid))
		l.mu.Unlock()
	}
	return true
}

// patient gives callbacks more time than a disk stalls: what is asked after a
// kill is whether the keys are there, not how soon.
func (c *custody) patient() { c.edit("callback_deadline: 0s", "callback_deadline: 30s") }

// TestCrash kills the real daemon at random moments under a mixed load of
// issue and retrieve. Whatever was ever answered must be there unchanged.
func TestCrash(t *testing.T) {
	c := provision(t)
	c.patient()
	c.mustRun("init", "-config", c.dev.configFile())
	c.mustStart()
	if _, err := c.dial(custodian.RoleOfficer).CreateCategory(t.Context(), &v1.CreateCategoryRequest{Name: "movies"}); err != nil {
		t.Fatal(err)
	}
	l := &ledger{byItem: map[string]answer{}, released: map[custodian.KID]bool{}}
	for run := range *crashRuns {
		packager, provider := c.dial(custodian.RolePackager), c.dial(custodian.RoleProvider)
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for worker := range 4 {
			wg.Go(func() { l.load(ctx, packager, provider, worker, run) })
		}
		time.Sleep(randomBelow(t, 400*time.Millisecond))
		c.kill()
		wg.Wait()
		cancel()
		packager.Close()
		provider.Close()
		if err := c.start(); err != nil {
			t.Fatalf("start after kill %d: %v", run, err)
		}
	}
	provider := c.dial(custodian.RoleProvider)
	for item, a := range l.byItem {
		if !l.check(t.Context(), provider, a) {
			t.Errorf("%s: %s does not come back", item, a.kid)
		}
	}
	for _, f := range l.faults {
		t.Error(f)
	}
	if len(l.byItem) < *crashRuns {
		t.Errorf("only %d keys were answered in %d runs: the load does not load", len(l.byItem), *crashRuns)
	}
	if code := c.stop(); code != 0 {
		t.Errorf("clean stop: exit %d, want 0\n%s", code, c.logText())
	}
	c.checkAtRest(l, "custodian-mek-v1")
	t.Logf("%d kills, %d keys answered, %d released", *crashRuns, len(l.byItem), len(l.released))
}

func randomBelow(t *testing.T, d time.Duration) time.Duration {
	t.Helper()
	n, err := rand.Int(rand.Reader, big.NewInt(int64(d)))
	if err != nil {
		t.Fatal(err)
	}
	return time.Duration(n.Int64())
}

// checkAtRest verifies what lies on disk and in the token: the audit log and
// that every released KID is in it, the store's own consistency, and that the
// token holds these MEKs, the pair that signs the log, and nothing else.
func (c *custody) checkAtRest(l *ledger, meks ...string) {
	t := c.t
	t.Helper()
	if _, err := audit.Verify(t.Context(), c.config.auditDir(), audit.VerifyOptions{}); err != nil {
		t.Errorf("audit verify: %v", err)
	}
	logged, begun := map[custodian.KID]bool{}, map[uint64]string{}
	if err := audit.Read(c.config.auditDir(), 0, func(e *audit.Entry) error {
		if e.Outcome == audit.Begun {
			begun[e.Index] = e.Action
		}
		if e.HasAttempt && begun[e.Attempt] != e.Action {
			t.Errorf("entry %d ends %s at %d, which is %q", e.Index, e.Action, e.Attempt, begun[e.Attempt])
		}
		if e.HasAttempt {
			delete(begun, e.Attempt)
		}
		if len(e.KID) == custodian.KIDSize && e.Outcome == audit.Allowed && e.Action == string(custodian.ActionRelease) {
			logged[custodian.KID(e.KID)] = true
		}
		return nil
	}); err != nil {
		t.Errorf("audit read: %v", err)
	}
	if len(begun) > 0 {
		t.Errorf("attempts without an end: %v", begun)
	}
	for kid := range l.released {
		if !logged[kid] {
			t.Errorf("%s was released and is not in the audit log", kid)
		}
	}
	s, err := store.Open(t.Context(), c.config.storePath(), store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.Check(t.Context()); err != nil {
		t.Errorf("store: %v", err)
	}
	want := append([]string{"custodian-mek-audit-v1", "custodian-mek-audit-v1"}, meks...)
	if got := c.tokenLabels(); strings.Join(got, " ") != strings.Join(want, " ") {
		t.Errorf("objects in the token: got %q, want %q", got, want)
	}
}

// tokenLabels lists the labels of all objects in the token, sorted, as
// another program would see them.
func (c *custody) tokenLabels() []string {
	t := c.t
	t.Helper()
	var labels []string
	c.withSession(func(m *pkcs11.Ctx, s pkcs11.SessionHandle) {
		if err := m.FindObjectsInit(s, nil); err != nil {
			t.Fatal(err)
		}
		objects, _, err := m.FindObjects(s, 1000)
		m.FindObjectsFinal(s)
		if err != nil {
			t.Fatal(err)
		}
		for _, o := range objects {
			a, err := m.GetAttributeValue(s, o, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_LABEL, nil)})
			if err != nil { // an object that is not whole has no label to read
				labels = append(labels, "("+err.Error()+")")
				continue
			}
			labels = append(labels, string(a[0].Value))
		}
	})
	slices.Sort(labels)
	return labels
}

// withSession runs f with a session of the test's own, logged in: nothing of
// the daemon's code stands between.
func (c *custody) withSession(f func(*pkcs11.Ctx, pkcs11.SessionHandle)) {
	t := c.t
	t.Helper()
	defer c.holdModule()()
	m := pkcs11.New(c.config.HSM.Module)
	if m == nil {
		t.Fatalf("load %s", c.config.HSM.Module)
	}
	defer m.Destroy()
	if err := m.Initialize(); err != nil {
		t.Fatal(err)
	}
	defer m.Finalize()
	pin, err := os.ReadFile(c.config.HSM.PINFile)
	if err != nil {
		t.Fatal(err)
	}
	slots, err := m.GetSlotList(true)
	if err != nil {
		t.Fatal(err)
	}
	for _, slot := range slots {
		if info, err := m.GetTokenInfo(slot); err != nil || info.Label != c.config.HSM.Token {
			continue
		}
		s, err := m.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
		if err != nil {
			t.Fatal(err)
		}
		if err := m.Login(s, pkcs11.CKU_USER, string(bytes.TrimSpace(pin))); err != nil {
			t.Fatal(err)
		}
		f(m, s)
		return
	}
	t.Fatalf("no token %q", c.config.HSM.Token)
}

// durable are the system calls that make a step durable, or visible to a
// later start.
const durable = "fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat,ftruncate,fallocate"

// needStrace skips where strace cannot be used; set-up installs it.
func needStrace(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("strace"); err != nil {
		t.Skipf("strace is not installed, so no kill at an exact step: %v", err)
	}
	if out, err := exec.Command("strace", "-o", os.DevNull, "true").CombinedOutput(); err != nil {
		t.Skipf("strace may not trace here, so no kill at an exact step: %v: %s", err, out)
	}
}

// TestCrashInit kills init before its first durable step, before its second,
// and so on to its end. Each time, a second init must finish, the daemon must
// serve, and nothing may be left in the token that is not used.
func TestCrashInit(t *testing.T) {
	needStrace(t)
	const lanes = 4 // of steps side by side: each waits for the disk
	for lane := range lanes {
		t.Run(fmt.Sprintf("lane %d", lane), func(t *testing.T) {
			t.Parallel()
			step := 1 + lane
			for ; crashInit(t, step); step += lanes {
			}
			if step < 5 {
				t.Fatalf("init has fewer than %d durable steps; the kill does not reach it", step)
			}
			t.Logf("init has fewer than %d durable steps", step)
		})
	}
}

// crashInit kills init before a durable step. It says whether there is such a
// step.
func crashInit(t *testing.T, step int) bool {
	t.Helper()
	c := provision(t)
	out, err := exec.Command("strace", "-f", "-o", os.DevNull, "-e", "trace="+durable, "-e", "inject="+durable+":signal=SIGKILL:when="+strconv.Itoa(step),
		daemonBinary, "init", "-config", c.dev.configFile()).CombinedOutput()
	if err == nil {
		return false
	}
	if step > 300 {
		t.Fatalf("init does not end: %s", out)
	}
	if out, code := c.run("init", "-config", c.dev.configFile()); code != 0 && !strings.Contains(out, "initialised already") {
		t.Fatalf("init after a kill before step %d: exit %d\n%s", step, code, out)
	}
	if err := c.start(); err != nil {
		t.Fatalf("start after a kill before step %d: %v", step, err)
	}
	if code := c.stop(); code != 0 {
		t.Errorf("stop after a kill before step %d: exit %d", step, code)
	}
	if c.checkAtRest(&ledger{}, "custodian-mek-v1"); t.Failed() {
		t.Fatalf("that was after a kill before step %d", step)
	}
	return true
}

// TestCrashCreateCategory kills the daemon before each durable step of
// creating a category. A category that was answered is there; one that was
// not can be made again.
func TestCrashCreateCategory(t *testing.T) {
	needStrace(t)
	c := newCustody(t)
	for step := 1; ; step++ {
		name := fmt.Sprintf("category-%d", step)
		officer := c.dial(custodian.RoleOfficer)
		trace := c.injectKill(step)
		_, err := officer.CreateCategory(t.Context(), &v1.CreateCategoryRequest{Name: name})
		officer.Close()
		if err == nil {
			trace.Process.Kill()
			trace.Wait()
			c.kill()
			c.mustStart()
			c.wantCategory(name)
			if step < 3 {
				t.Fatalf("creating a category has only %d durable steps; the kill does not reach it", step-1)
			}
			t.Logf("creating a category has %d durable steps", step-1)
			c.wantInterrupted()
			break
		}
		trace.Wait()
		c.kill()
		if err := c.start(); err != nil {
			t.Fatalf("start after a kill before step %d: %v", step, err)
		}
		_, err = c.dial(custodian.RoleOfficer).CreateCategory(t.Context(), &v1.CreateCategoryRequest{Name: name})
		if err != nil && client.ReasonOf(err) != "CATEGORY_EXISTS" {
			t.Fatalf("create again after a kill before step %d: %v", step, err)
		}
		c.wantCategory(name)
	}
	if code := c.stop(); code != 0 {
		t.Errorf("stop: exit %d", code)
	}
	c.checkAtRest(&ledger{}, "custodian-mek-v1")
}

// wantInterrupted checks that the log has an attempt that a kill cut off, and
// whose end a start has written.
func (c *custody) wantInterrupted() {
	c.t.Helper()
	n := 0
	if err := audit.Read(c.config.auditDir(), 0, func(e *audit.Entry) error {
		if e.HasAttempt && e.Outcome == audit.Failed && e.Reason == "INTERRUPTED" {
			n++
		}
		return nil
	}); err != nil || n == 0 {
		c.t.Errorf("%d attempts were interrupted, %v, want some", n, err)
	}
}

// injectKill attaches strace to the daemon, which will kill it before its
// step'th durable call from now.
func (c *custody) injectKill(step int) *exec.Cmd {
	t := c.t
	t.Helper()
	cmd := exec.Command("strace", "-f", "-o", os.DevNull, "-e", "trace="+durable, "-e", "inject="+durable+":signal=SIGKILL:when="+strconv.Itoa(step),
		"-p", strconv.Itoa(c.cmd.Process.Pid))
	said := &lockedBuffer{}
	cmd.Stderr = said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill() })
	for range 500 {
		if strings.Contains(said.String(), "attached") {
			time.Sleep(50 * time.Millisecond) // the other threads
			return cmd
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("strace does not attach: %s", said.String())
	return nil
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// wantCategory issues a key in the category and has it back.
func (c *custody) wantCategory(name string) {
	t := c.t
	t.Helper()
	res, err := c.dial(custodian.RolePackager).IssueContentKeys(t.Context(), &v1.IssueContentKeysRequest{Category: name, ContentId: []byte("film of " + name),
		Keys: []*v1.ContentKeySpec{{TrackType: "SD", Scheme: "cenc"}}})
	if err != nil {
		t.Fatalf("category %s: issue: %v", name, err)
	}
	got, err := c.dial(custodian.RoleProvider).GetContentKeys(t.Context(), &v1.GetContentKeysRequest{Kids: [][]byte{res.Keys[0].Key.Kid}})
	if err != nil {
		t.Fatalf("category %s: retrieve: %v", name, err)
	}
	if !bytes.Equal(got.Results[0].GetKey().GetKey(), res.Keys[0].Key.GetKey()) {
		t.Errorf("category %s: another key comes back than was issued", name)
	}
}
