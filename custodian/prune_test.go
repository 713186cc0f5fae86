package custodian_test

import (
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/audit"
	"github.com/keycustody/custodian/internal/checkpoint"
)

// Pruning takes releases and denials away and nothing that a start, a restore
// or an auditor of changes needs. It is in the log.
func TestPruneLog(t *testing.T) {
	w := newWorld(t)
	w.segment = 8 << 10
	w.reopen()
	w.category("movies")
	kid := w.issue("movies", "film-1", "SD")[0].KID
	w.issue("movies", "film-2", "SD", "HD")
	release := func(n int) {
		t.Helper()
		for range n {
			if err := w.release(provider, kid); err != nil {
				t.Fatal(err)
			}
		}
	}
	release(60)
	w.reopen()
	want := w.logged
	all := w.entries(0)
	releases := func() (n int) {
		for _, e := range w.entries(0) {
			if e.Action == string(custodian.ActionRelease) {
				n++
			}
		}
		return n
	}

	if err := w.c.PruneLog(t.Context(), custodian.LogRetention{}); err != nil || releases() != 60 {
		t.Errorf("without a bound: %v, %d releases, want 60", err, releases())
	}
	archive := t.TempDir()
	keep := custodian.LogRetention{Segments: 1, Age: time.Hour, Archive: archive}
	size := len(w.entries(0))
	if err := w.c.PruneLog(t.Context(), keep); err != nil || len(w.entries(0)) != size {
		t.Errorf("within the hour: %v, %d entries, want %d", err, len(w.entries(0)), size)
	}
	w.advance(2 * time.Hour)
	if err := w.c.PruneLog(t.Context(), keep); err != nil {
		t.Fatal(err)
	}
	left := releases()
	if left == 0 || left > 40 {
		t.Errorf("%d releases are left of 60, want those of the newest segments", left)
	}
	if files, err := os.ReadDir(archive); err != nil || len(files) == 0 {
		t.Errorf("archive: %v, %v", files, err)
	}
	var kept []audit.Entry
	for _, e := range w.entries(0) {
		if e.Index < uint64(len(all)) {
			kept = append(kept, e)
		}
	}
	gone := slices.DeleteFunc(slices.Clone(all), func(e audit.Entry) bool {
		return slices.ContainsFunc(kept, func(k audit.Entry) bool { return k.Index == e.Index })
	})
	for _, e := range gone {
		if e.Action != string(custodian.ActionRelease) {
			t.Errorf("entry %d, %s, is gone", e.Index, line(e))
		}
	}
	var told []string
	for _, e := range w.entries(uint64(len(all))) {
		if e.Action == "audit.prune" {
			told = append(told, e.Outcome.String())
		}
	}
	if want := []string{"begun", "allowed"}; !slices.Equal(told, want) {
		t.Errorf("the log tells %v, want %v", told, want)
	}

	w.reopen()
	got := w.logged
	if got.Revision < want.Revision || got.Sequence != want.Sequence || !reflect.DeepEqual(got.KIDs, want.KIDs) || !reflect.DeepEqual(got.KEKs, want.KEKs) ||
		len(got.Changes) < len(want.Changes) {
		t.Errorf("a start knows %+v, want what it knew, %+v", got, want)
	}
	release(60)
	key := w.auditSigner().Public()
	if r, err := audit.Verify(t.Context(), w.auditDir(), audit.VerifyOptions{Check: func(signed []byte) error {
		_, err := checkpoint.Verify(signed, key)
		return err
	}}); err != nil || len(r.Pruned) == 0 {
		t.Errorf("%d pruned segments, %v", len(r.Pruned), err)
	}
	w.wantRecorded("pruned by the daemon", true)
	if got, want := w.c.AuditPrunedBefore(), w.log.Stats().Pruned; got == 0 || got != want {
		t.Errorf("entries before %d are said to be pruned, want %d", got, want)
	}

	// Somebody else prunes: that is in the log after the next tick, once.
	if err := w.c.Tick(t.Context()); err != nil {
		t.Fatal(err)
	}
	if pruned, err := audit.Prune(t.Context(), w.auditDir(), audit.PruneOptions{Keep: custodian.KeepInLog}); err != nil || len(pruned) == 0 {
		t.Fatalf("pruned %v, %v", pruned, err)
	}
	w.wantRecorded("pruned by somebody else", false)
	release(1)
	from := w.log.Size()
	for range 2 {
		if err := w.c.Tick(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if e := w.entries(from); len(e) != 1 || e[0].Action != "audit.prune" || !strings.HasPrefix(e[0].Detail, "seen: ") {
		t.Errorf("entries after it: %v, want one that tells it", e)
	}
	w.wantRecorded("seen by the daemon", true)
}

// wantRecorded checks whether the log tells of the newest segment that is
// pruned.
func (w *world) wantRecorded(what string, want bool) {
	w.t.Helper()
	pruned, err := audit.ListPruned(w.auditDir())
	if err != nil || len(pruned) == 0 {
		w.t.Fatalf("%s: %d segments are pruned, %v", what, len(pruned), err)
	}
	got := slices.ContainsFunc(w.entries(0), func(e audit.Entry) bool { return custodian.RecordsPrune(&e, pruned[len(pruned)-1]) })
	if got != want {
		w.t.Errorf("%s: an entry tells of segment %d: %v, want %v", what, pruned[len(pruned)-1].Segment, got, want)
	}
}
