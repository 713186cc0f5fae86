package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/client"
	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/audit"
	"github.com/keycustody/custodian/store"
)

// A rotationCase is a rotation that is killed.
type rotationCase struct {
	name    string
	profile string
	lanes   int // that share the durable calls to kill at, side by side
	order   *v1.StartRotationRequest
}

var rotationCases = []rotationCase{
	{"kek", "sealed", 1, &v1.StartRotationRequest{Kind: v1.RotationKind_ROTATION_KIND_KEK, Category: "movies"}},
	{"mek sealed", "sealed", 3, &v1.StartRotationRequest{Kind: v1.RotationKind_ROTATION_KIND_MEK}},
	{"mek rotatable", "rotatable", 3, &v1.StartRotationRequest{Kind: v1.RotationKind_ROTATION_KIND_MEK}},
}

// custodyOf is newCustody with a MEK profile, a category and some keys.
func custodyOf(t *testing.T, profile string, items int) (*custody, *ledger) {
	t.Helper()
	c := provision(t)
	c.edit(`mek_profile: ""`, "mek_profile: "+profile)
	c.patient()
	c.mustRun("init", "-config", c.dev.configFile())
	c.mustStart()
	if _, err := c.dial(custodian.RoleOfficer).CreateCategory(t.Context(), &v1.CreateCategoryRequest{Name: "movies"}); err != nil {
		t.Fatal(err)
	}
	l := &ledger{byItem: map[string]answer{}, released: map[custodian.KID]bool{}}
	c.issueItems(l, "first", items)
	return c, l
}

// issueItems issues n keys and takes them into the ledger.
func (c *custody) issueItems(l *ledger, prefix string, n int) {
	c.t.Helper()
	packager := c.dial(custodian.RolePackager)
	defer packager.Close()
	for i := range n {
		item := fmt.Sprintf("%s-%d", prefix, i)
		res, err := packager.IssueContentKeys(c.t.Context(), &v1.IssueContentKeysRequest{Category: "movies", ContentId: []byte(item),
			Keys: []*v1.ContentKeySpec{{TrackType: "SD", Scheme: "cenc"}}})
		if err != nil {
			c.t.Fatalf("issue %s: %v\n%s", item, err, c.logText())
		}
		l.issued(item, res.Keys[0].Key.Kid, res.Keys[0].Key.GetKey())
	}
}

// all retrieves every key of the ledger.
func (c *custody) all(l *ledger) {
	c.t.Helper()
	provider := c.dial(custodian.RoleProvider)
	defer provider.Close()
	for item, a := range l.byItem {
		if !l.check(c.t.Context(), provider, a) {
			c.t.Errorf("%s: %s does not come back", item, a.kid)
		}
	}
	for _, f := range l.faults {
		c.t.Error(f)
	}
	l.faults = nil
}

// order starts the rotation, or finds the one that this order has started.
func (c *custody) order(o *v1.StartRotationRequest, id string) (*v1.Rotation, error) {
	c.t.Helper()
	officer, err := c.tryDial(custodian.RoleOfficer)
	if err != nil {
		return nil, err
	}
	defer officer.Close()
	return officer.StartRotation(c.t.Context(), &v1.StartRotationRequest{RequestId: id, Kind: o.Kind, Category: o.Category, Cause: "drill", Hold: durationpb.New(0)})
}

// held waits until a rotation is held: verified, with nothing left to do. It
// fails where the daemon is gone.
func (c *custody) held(name string) error {
	c.t.Helper()
	cl, err := c.tryDial(custodian.RoleAuditor)
	if err != nil {
		return err
	}
	defer cl.Close()
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		list, err := cl.ListRotations(c.t.Context())
		if err != nil {
			return err
		}
		for _, r := range list {
			if r.Name == name && r.Step == v1.RotationStep_ROTATION_STEP_HOLD {
				return nil
			}
		}
	}
	c.t.Fatalf("rotation %s is not held after a minute\n%s", name, c.logText())
	return nil
}

func (c *custody) retire(name string) {
	c.t.Helper()
	officer := c.dial(custodian.RoleOfficer)
	defer officer.Close()
	if _, err := officer.RetireRotation(c.t.Context(), &v1.RetireRotationRequest{Name: name}); err != nil {
		c.t.Fatalf("retire %s: %v\n%s", name, err, c.logText())
	}
}

// sound checks what lies on disk, with the daemon stopped.
func (c *custody) sound() {
	t := c.t
	t.Helper()
	if code := c.stop(); code != 0 {
		t.Errorf("stop: exit %d, want 0\n%s", code, c.logText())
	}
	if _, err := audit.Verify(t.Context(), c.config.auditDir(), audit.VerifyOptions{}); err != nil {
		t.Errorf("audit verify: %v", err)
	}
	s, err := store.Open(t.Context(), c.config.storePath(), store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.Check(t.Context()); err != nil {
		t.Errorf("store: %v", err)
	}
}

// TestCrashRotation kills the daemon before its first durable call after the
// order of a rotation, before its second, and so on to the end: that is also
// behind each of them. Each time a start finishes the rotation, and every key
// that was ever answered is there, and is the same.
func TestCrashRotation(t *testing.T) {
	needStrace(t)
	for _, rc := range rotationCases {
		for lane := range rc.lanes {
			t.Run(fmt.Sprintf("%s, from %d by %d", rc.name, lane+1, rc.lanes), func(t *testing.T) {
				t.Parallel() // it waits, and takes little of the CPUs
				crashRotation(t, rc, lane+1)
			})
		}
	}
}

// crashRotation kills at one of so many durable calls as there are lanes, from
// first on.
func crashRotation(t *testing.T, rc rotationCase, first int) {
	c, l := custodyOf(t, rc.profile, 5)
	step := first
	for ; ; step += rc.lanes {
		id := "order-" + strconv.Itoa(step)
		trace := c.killAtCall(step)
		r, err := c.order(rc.order, id)
		if err == nil {
			err = c.held(r.Name)
		}
		trace.end()
		if !trace.hit() {
			if err != nil {
				t.Fatalf("step %d: nobody was killed, and: %v\n%s", step, err, c.logText())
			}
			break
		}
		c.kill()
		if err := c.start(); err != nil {
			t.Fatalf("start after a kill before durable call %d: %v", step, err)
		}
		if r, err = c.order(rc.order, id); err != nil {
			t.Fatalf("the order again after a kill before durable call %d: %v\n%s", step, err, c.logText())
		}
		if err := c.held(r.Name); err != nil {
			t.Fatalf("after a kill before durable call %d: %v\n%s", step, err, c.logText())
		}
		c.issueItems(l, id, 1)
		c.all(l)
		c.retire(r.Name)
		if t.Failed() {
			t.Fatalf("that was after a kill before durable call %d", step)
		}
	}
	c.all(l)
	c.sound()
	if step < 10 {
		t.Errorf("a rotation has only %d durable calls; the kill does not reach it", step-1)
	}
	t.Logf("a rotation has %d durable calls at most", step-1)
}

// A killer is strace on the daemon: it holds up each durable call for a moment
// on its way in, and at one of them the daemon is killed. Unlike a count of
// strace's own, this one is over all threads.
type killer struct {
	cmd    *exec.Cmd
	killed atomic.Bool
	read   sync.WaitGroup
}

func (k *killer) hit() bool { return k.killed.Load() }

func (k *killer) end() {
	k.cmd.Process.Kill()
	k.read.Wait()
	k.cmd.Wait()
}

var durableCall = regexp.MustCompile(`\b(` + strings.ReplaceAll(durable, ",", "|") + `)\(`)

// killAtCall kills the daemon before its n'th durable call from now.
func (c *custody) killAtCall(n int) *killer {
	t := c.t
	t.Helper()
	pid := c.cmd.Process.Pid
	k := &killer{cmd: exec.Command("strace", "-f", "-e", "trace="+durable, "-e", "signal=none", "-e", "inject="+durable+":delay_enter=20000", "-p", strconv.Itoa(pid))}
	pipe, err := k.cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := k.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	attached := make(chan struct{})
	k.read.Go(func() {
		var said []byte
		buf := make([]byte, 4096)
		for once := false; ; {
			m, err := pipe.Read(buf)
			said = append(said, buf[:m]...)
			if !once && strings.Contains(string(said), "attached") {
				once = true
				close(attached)
			}
			if !k.killed.Load() && len(durableCall.FindAll(said, -1)) >= n {
				k.killed.Store(true)
				syscall.Kill(pid, syscall.SIGKILL)
			}
			if err != nil {
				if !errors.Is(err, io.EOF) {
					t.Logf("strace: %v", err)
				}
				return
			}
		}
	})
	t.Cleanup(func() { k.cmd.Process.Kill() })
	select {
	case <-attached:
		time.Sleep(50 * time.Millisecond) // the other threads
	case <-time.After(10 * time.Second):
		t.Fatal("strace does not attach")
	}
	return k
}

// TestCrashRotationLoad kills the daemon at random moments of rotations, under
// a load of callbacks and of new keys: as many times as -crash.n says.
func TestCrashRotationLoad(t *testing.T) {
	const items = 400
	for i, rc := range rotationCases {
		t.Run(rc.name, func(t *testing.T) {
			c, l := custodyOf(t, rc.profile, items)
			runs := (*crashRuns + 2 - i) / len(rotationCases)
			for run := range runs {
				id := "order-" + strconv.Itoa(run)
				packager, provider := c.dial(custodian.RolePackager), c.dial(custodian.RoleProvider)
				ctx, cancel := context.WithCancel(t.Context())
				var wg sync.WaitGroup
				wg.Go(func() { l.load(ctx, packager, provider, 0, run) })
				wg.Go(func() { l.callbacks(ctx, provider) })
				r, err := c.order(rc.order, id)
				if err != nil {
					t.Fatalf("order %s: %v\n%s", id, err, c.logText())
				}
				time.Sleep(randomBelow(t, 600*time.Millisecond))
				c.kill()
				cancel()
				wg.Wait()
				packager.Close()
				provider.Close()
				if err := c.start(); err != nil {
					t.Fatalf("start after kill %d: %v", run, err)
				}
				if err := c.held(r.Name); err != nil {
					t.Fatalf("after kill %d: %v\n%s", run, err, c.logText())
				}
				c.retire(r.Name)
				for _, f := range l.faults {
					t.Error(f)
				}
			}
			c.all(l)
			c.sound()
			t.Logf("%d kills, %d keys answered, %d released", runs, len(l.byItem), len(l.released))
		})
	}
}

// callbacks retrieves until ctx ends or the daemon is gone.
func (l *ledger) callbacks(ctx context.Context, provider *client.Client) {
	for ctx.Err() == nil {
		a, ok := l.some()
		if !ok {
			return
		}
		if res, err := provider.GetContentKeys(ctx, &v1.GetContentKeysRequest{Kids: [][]byte{a.kid[:]}}); err == nil {
			if sha256.Sum256(res.Results[0].GetKey().GetKey()) != a.key {
				l.mu.Lock()
				l.faults = append(l.faults, fmt.Sprintf("%s: another key than was answered before", a.kid))
				l.mu.Unlock()
			}
		} else if !l.check(ctx, provider, a) {
			return
		}
	}
}
