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

// TestUnknownTakesAsLong measures, for callers who may not know, how long it takes
// to hear of a key that is not granted and of one that does not exist: for one who
// is granted nothing, one who is granted other categories, and one whose category
// it is, but not its track. The two differ by reading one record, and by a rule.
// Denials are asked for faster than the audit log has an entry of its own for each,
// so that no disk hides a difference; the machine has other work, too, so only one
// of half the time and beyond the noise is a fault.
func TestUnknownTakesAsLong(t *testing.T) {
	k := newKit(t, options{custody: func(c *custodian.Config) {
		p, err := c.Policy.WithRules([]custodian.RulesFile{{Name: "tracks.cedar", Text: []byte(
			`@id("own-tracks") forbid (principal == Custodian::Caller::"` + identity(provider) + `", action == Custodian::Action::"release", resource) unless { resource.track_type like "alpha.*" };`)}})
		if err != nil {
			t.Fatal(err)
		}
		c.Policy = p
	}})
	k.createCategory(t, "movies")
	k.createCategory(t, "series")
	series, err := k.core.Issue(t.Context(), custodian.Caller{ID: identity(packager), Roles: custodian.Roles}, custodian.IssueRequest{Category: "movies", ContentID: custodian.ContentID("film"), Keys: []custodian.KeySpec{
		{TrackType: "alpha.slides", Scheme: "cenc"}, {TrackType: "beta.slides", Scheme: "cenc"}}})
	if err != nil {
		t.Fatal(err)
	}
	own, beta := series[0].KID[:], series[1].KID[:]
	for i := range series {
		series[i].Key.Destroy()
	}
	// Of a category that provider is not granted.
	policy, err := custodian.NewPolicy([]custodian.Grant{{Identity: identity(packager), Role: custodian.RolePackager, AllCategories: true}})
	if err != nil {
		t.Fatal(err)
	}
	if err := k.core.SetPolicy(t.Context(), policy); err != nil {
		t.Fatal(err)
	}
	if series, err = k.core.Issue(t.Context(), custodian.Caller{ID: identity(packager), Roles: custodian.Roles}, custodian.IssueRequest{Category: "series", ContentID: custodian.ContentID("pilot"), Keys: []custodian.KeySpec{{TrackType: "alpha.slides", Scheme: "cenc"}}}); err != nil {
		t.Fatal(err)
	}
	series[0].Key.Destroy()
	if err := k.core.SetPolicy(t.Context(), k.custody.Policy); err != nil {
		t.Fatal(err)
	}
	if _, err := k.dial(t, provider).GetContentKeys(t.Context(), &v1.GetContentKeysRequest{Kids: [][]byte{own}}); err != nil {
		t.Fatalf("the key that the narrow one is granted: %v", err)
	}
	median := func(d []time.Duration) time.Duration { slices.Sort(d); return d[len(d)/2] }
	for _, test := range []struct {
		name, who string
		kid       []byte
		viewer    *v1.ViewerContext
	}{
		{"nothing is granted", stranger, own, nil},
		{"other categories are granted", provider, series[0].KID[:], nil},
		{"other tracks of the category are granted", provider, beta, &v1.ViewerContext{SessionId: "session", UserId: "user"}},
	} {
		cl := k.dial(t, test.who)
		asked := [2][]byte{test.kid, bytes.Repeat([]byte{7}, 16)}
		var took [2][]time.Duration
		for n := range 200 { // in turn, so that what slows one slows the other
			for i, kid := range asked {
				began := time.Now()
				_, err := cl.GetContentKeys(t.Context(), &v1.GetContentKeysRequest{Kids: [][]byte{kid}, ViewerContext: test.viewer})
				if n >= 60 {
					took[i] = append(took[i], time.Since(began))
				}
				wantRefused(t, err, "DENIED")
			}
		}
		denied, unknown := median(took[0]), median(took[1])
		spread := took[0][len(took[0])*3/4] - took[0][len(took[0])/4]
		t.Logf("%s: not granted %s, unknown %s, the middle half of the answers within %s", test.name, denied, unknown, spread)
		if diff := (denied - unknown).Abs(); diff > max(spread, denied/2) {
			t.Errorf("%s: they differ by %s, which is no noise", test.name, diff)
		}
	}
}
