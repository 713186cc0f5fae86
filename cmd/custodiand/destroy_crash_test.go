package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/audit"
)

// TestCrashDestroyMEK kills the daemon before the first durable call of the
// destruction of a retired MEK, before its second, and so on to the end: that is
// also behind each of them. Each time a start finishes it, and nothing else is
// gone: not a content key, nor another MEK, retired or active, nor what lies
// under it.
func TestCrashDestroyMEK(t *testing.T) {
	needStrace(t)
	t.Parallel() // it waits, and takes little of the CPUs
	c, l := custodyOf(t, "sealed", 5)
	for _, id := range []string{"first", "second"} {
		r, err := c.order(&v1.StartRotationRequest{Kind: v1.RotationKind_ROTATION_KIND_MEK}, id)
		if err == nil {
			err = c.held(r.Name)
		}
		if err != nil {
			t.Fatal(err)
		}
		c.retire(r.Name)
	}
	plan := fmt.Sprintf("plan: custodian/1\nkind: destroy\nreason: drill\nexpires: %s\nmek_version: 1\n", time.Now().Add(time.Hour).UTC().Format(time.RFC3339))
	res, err := c.dial(custodian.RoleOfficer).ProposeCeremony(t.Context(), &v1.ProposeCeremonyRequest{Plan: []byte(plan)})
	if err != nil {
		t.Fatal(err)
	}
	id := res.GetCeremony().GetId()
	if code := c.stop(); code != 0 {
		t.Fatalf("stop: exit %d, want 0\n%s", code, c.logText())
	}
	whole := filepath.Join(t.TempDir(), "custody")
	copyTree(t, c.dev.dir, whole)

	seen := map[string]int{} // how far it was at the kills
	step := 1
	for ; ; step++ {
		if err := os.RemoveAll(c.dev.dir); err != nil {
			t.Fatal(err)
		}
		copyTree(t, whole, c.dev.dir)
		c.mustStart()
		trace := c.killAtCall(step)
		officer := c.dial(custodian.RoleOfficer)
		x, err := officer.ExecuteCeremony(t.Context(), &v1.ExecuteCeremonyRequest{Id: id})
		officer.Close()
		trace.end()
		hit := trace.hit()
		if !hit && (err != nil || x.GetState() != v1.CeremonyState_CEREMONY_STATE_DONE) {
			t.Fatalf("step %d: nobody was killed, and: %v, %v\n%s", step, x, err, c.logText())
		}
		if hit {
			c.kill()
			seen[c.cutOff()]++
			if err := c.start(); err != nil {
				t.Fatalf("start after a kill before durable call %d: %v", step, err)
			}
			c.finish(id)
		}
		c.wantVersions("movies/1 DESTROYED", "movies/2 DEACTIVATED", "movies/3 ACTIVE")
		c.all(l)
		if code := c.stop(); code != 0 {
			t.Errorf("stop: exit %d, want 0\n%s", code, c.logText())
		}
		c.checkAtRest(l, "custodian-mek-v2", "custodian-mek-v3")
		if t.Failed() {
			t.Fatalf("that was after a kill before durable call %d", step)
		}
		if !hit {
			break
		}
	}
	t.Logf("destroying a MEK has %d durable calls at most: %v", step-1, seen)
	for _, want := range []string{"there", "there, destroyed in the log", "gone, destroyed in the log"} {
		if seen[want] == 0 {
			t.Errorf("no kill has left the MEK %s: the matrix does not reach it", want)
		}
	}
}

// cutOff says where the destruction of MEK 1 was cut off. That the object has
// left the token before the log has it is a fault.
func (c *custody) cutOff() string {
	c.t.Helper()
	where := "gone"
	if slices.Contains(c.tokenLabels(), "custodian-mek-v1") {
		where = "there"
	}
	logged := false
	if err := audit.Read(c.config.auditDir(), 0, func(e *audit.Entry) error {
		logged = logged || e.Action == "mek.destroy" && e.Outcome == audit.Allowed
		return nil
	}); err != nil {
		c.t.Errorf("audit read: %v", err)
	}
	if logged {
		return where + ", destroyed in the log"
	}
	if where == "gone" {
		c.t.Error("the MEK is gone from the token, and the log does not have it")
	}
	return where
}

// finish waits until a ceremony is done, and executes it where the kill came
// before it was recorded.
func (c *custody) finish(id string) {
	t := c.t
	t.Helper()
	officer := c.dial(custodian.RoleOfficer)
	defer officer.Close()
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		x, err := officer.GetCeremony(t.Context(), id)
		if err == nil && x.GetState() == v1.CeremonyState_CEREMONY_STATE_PROPOSED {
			x, err = officer.ExecuteCeremony(t.Context(), &v1.ExecuteCeremonyRequest{Id: id})
		}
		if err != nil {
			t.Fatalf("ceremony %s: %v\n%s", id, err, c.logText())
		}
		if x.GetState() == v1.CeremonyState_CEREMONY_STATE_DONE {
			return
		}
	}
	t.Fatalf("ceremony %s is not done after a minute\n%s", id, c.logText())
}

// wantVersions holds the KEK versions of movies against NAME STATE.
func (c *custody) wantVersions(want ...string) {
	t := c.t
	t.Helper()
	auditor := c.dial(custodian.RoleAuditor)
	defer auditor.Close()
	all, err := auditor.ListKeyVersions(t.Context(), "movies")
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, k := range all {
		got = append(got, fmt.Sprintf("movies/%d %s", k.GetVersion(), strings.TrimPrefix(k.GetState().String(), "KEY_STATE_")))
	}
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Errorf("key versions: got %q, want %q", got, want)
	}
}
