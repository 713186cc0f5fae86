package rpc_test

import (
	"bytes"
	"fmt"
	"path/filepath"
	"slices"
	"testing"
	"time"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/audit"
)

// TestBudgetAtBothDoors: what a caller takes by gRPC and by HTTP is of one
// budget, and its end is heard alike and written down.
func TestBudgetAtBothDoors(t *testing.T) {
	k := newKit(t, options{custody: func(c *custodian.Config) {
		p, err := c.Policy.WithBudgets([]custodian.Budget{{Caller: "*", Action: custodian.ActionRelease, Window: time.Hour, HardKIDs: 4},
			{Caller: "*", Action: custodian.ActionReissue, Window: time.Hour, HardKIDs: 4}})
		if err != nil {
			t.Fatal(err)
		}
		c.Policy = p
	}})
	k.createCategory(t, "movies")
	keys := k.issue(t, "clip", "A", "B", "C", "D", "E", "F")
	url := k.serveTwin(t)
	cl, browser := k.dial(t, provider), k.browser(t, provider, nil)
	grpc := func(i int, id string) error {
		_, err := cl.GetContentKeys(t.Context(), &v1.GetContentKeysRequest{RequestId: id, Kids: [][]byte{keys[i].GetKid()}})
		return err
	}
	http := func(i int, id string) twinAnswer {
		kid, _ := custodian.KIDFromBytes(keys[i].GetKid())
		return post(t, browser, url, map[string]any{"request_id": id, "kids": []string{kid.String()}})
	}
	for i := range 2 {
		if err := grpc(i, ""); err != nil {
			t.Fatal(err)
		}
		if a := http(i+2, ""); a.status != 200 {
			t.Fatalf("HTTP: got %d and %+v", a.status, a.Error)
		}
	}
	if e := wantRefused(t, grpc(4, "spent"), "KID_BUDGET"); e.Retry != time.Minute {
		t.Errorf("retry: got %v, want a minute", e.Retry)
	}
	if a := http(5, "frozen"); a.status != 403 || a.Error.Reason != "CALLER_FROZEN" || a.retryAfter != "" {
		t.Errorf("HTTP: got %d and %+v, want 403 and CALLER_FROZEN", a.status, a.Error)
	}
	wantRefused(t, grpc(0, "frozen"), "CALLER_FROZEN")
	if _, err := k.dial(t, everybody).GetContentKeys(t.Context(), &v1.GetContentKeysRequest{Kids: [][]byte{keys[4].GetKid()}}); err != nil {
		t.Errorf("another caller: %v", err)
	}
	got := map[string]int{}
	if err := audit.Read(filepath.Join(k.dir, "audit"), 0, func(e *audit.Entry) error {
		if e.RequestID == "spent" || e.RequestID == "frozen" {
			got[fmt.Sprintf("%s %v %s", e.Action, e.Outcome, e.Reason)]++
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if got["release denied KID_BUDGET"] != 1 || got["release denied CALLER_FROZEN"] != 2 || len(got) != 2 {
		t.Errorf("the audit log has %v", got)
	}
}

// TestUnknownTakesAsLong measures, for a caller who may not know, how long it
// takes to hear of a key that is not granted and of one that does not exist. The
// two differ by reading one record; the bound is a generous one, because the
// machine has other work, too.
func TestUnknownTakesAsLong(t *testing.T) {
	k := newKit(t, options{})
	k.createCategory(t, "movies")
	k.createCategory(t, "frozen")
	resp, err := k.dial(t, packager).IssueContentKeys(t.Context(), &v1.IssueContentKeysRequest{Category: "movies", ContentId: []byte("film"), Keys: []*v1.ContentKeySpec{{TrackType: "HD", Scheme: "cenc"}}})
	if err != nil {
		t.Fatal(err)
	}
	asked := [2][]byte{resp.Keys[0].Key.Kid, bytes.Repeat([]byte{7}, 16)}
	cl := k.dial(t, stranger)
	var took [2][]time.Duration
	for range 150 { // in turn, so that what slows one slows the other
		for i, kid := range asked {
			began := time.Now()
			_, err := cl.GetContentKeys(t.Context(), &v1.GetContentKeysRequest{Kids: [][]byte{kid}})
			took[i] = append(took[i], time.Since(began))
			wantRefused(t, err, "DENIED")
		}
	}
	median := func(d []time.Duration) time.Duration { slices.Sort(d); return d[len(d)/2] }
	denied, unknown := median(took[0]), median(took[1])
	spread := took[0][len(took[0])*3/4] - took[0][len(took[0])/4]
	t.Logf("not granted %s, unknown %s, the middle half of the answers within %s", denied, unknown, spread)
	if diff := (denied - unknown).Abs(); diff > max(4*spread, denied) {
		t.Errorf("they differ by %s, which is no noise", diff)
	}
}
