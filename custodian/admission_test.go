package custodian_test

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/audit"
)

// TestShed: with a token that answers nobody, what is more than may wait is
// refused at once; it is never begun, and the audit log has few entries for all.
func TestShed(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	kid := w.issue("movies", "film", "HD")[0].KID
	many := custodian.RetrieveRequest{RequestID: "many", KIDs: slices.Repeat([]custodian.KID{kid}, custodian.MaxKIDsPerCall)}

	release := w.breaker.block("hsm.Open")
	const begun, wait, extra = 1024 / custodian.MaxKIDsPerCall, 4096 / custodian.MaxKIDsPerCall, 50
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var wg sync.WaitGroup
	for range begun + wait {
		wg.Go(func() {
			results, err := w.c.Retrieve(ctx, provider, many)
			if err == nil {
				destroy(results)
			}
		})
	}
	for s := w.c.Admission(); s.CallsWaiting < wait; s = w.c.Admission() {
		if s.Shed > 0 {
			t.Fatalf("shed with %d calls waiting", s.CallsWaiting)
		}
		time.Sleep(time.Millisecond)
	}
	for range extra {
		start := time.Now()
		_, err := w.c.Retrieve(t.Context(), provider, many)
		wantErr(t, "one too many", err, custodian.ErrRate)
		if took := time.Since(start); took > 2*time.Second { // nothing moves: who waits, waits for ever
			t.Errorf("it was refused after %s, not at once", took)
		}
	}
	if got := w.c.Admission().Shed; got != extra {
		t.Errorf("shed: got %d, want %d", got, extra)
	}
	// Another caller still gets in line.
	other, leave := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer leave()
	_, err := w.c.Retrieve(other, narrow, custodian.RetrieveRequest{RequestID: "other", KIDs: []custodian.KID{kid}})
	wantErr(t, "a caller whose time ends in the queue", err, custodian.ErrDeadline)
	cancel()
	release()
	wg.Wait()
	w.close()

	var shed, entries, late uint64
	for _, e := range w.entries(0) {
		switch {
		case e.Outcome != audit.Denied || e.Action != string(custodian.ActionRelease):
		case e.Caller == provider.ID && e.Reason == string(custodian.ReasonOf(custodian.ErrRate)):
			shed += max(1, e.Count)
			entries++
		case e.Caller == narrow.ID && e.RequestID == "other" && e.Reason == string(custodian.ReasonOf(custodian.ErrDeadline)):
			late++
		}
	}
	if entries > 3 { // one a second
		t.Errorf("%d entries about shed calls", entries)
	}
	if shed != extra || late != 1 {
		t.Errorf("the audit log: %d shed calls, want %d; %d that ran out of time in the queue, want 1", shed, extra, late)
	}
}

// TestCountRefused: what is not an entry is refused.
func TestCountRefused(t *testing.T) {
	w := newWorld(t)
	if err := w.c.CountRefused(provider, "", "r", custodian.ErrRate); !errors.Is(err, audit.ErrInvalidEntry) {
		t.Errorf("without an action: got %v", err)
	}
}

func destroy(results []custodian.RetrieveResult) {
	for i := range results {
		results[i].Key.Destroy()
	}
}
