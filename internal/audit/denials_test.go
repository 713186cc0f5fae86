package audit_test

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/keycustody/custodian/internal/audit"
	"golang.org/x/sys/unix"
)

// A clock stands still until it is set.
type clock struct{ nanos atomic.Int64 }

func newClock() *clock {
	c := new(clock)
	c.nanos.Store(when.UnixNano())
	return c
}

func (c *clock) now() time.Time          { return time.Unix(0, c.nanos.Load()).UTC() }
func (c *clock) advance(d time.Duration) { c.nanos.Add(int64(d)) }

// deny appends n denials and returns how many of them were only counted.
func deny(t *testing.T, l *audit.Log, e audit.Entry, n int) (counted int) {
	t.Helper()
	for range n {
		r := appendTo(t, l, e)[0]
		if r.Coalesced != (r.LeafHash == [32]byte{}) {
			t.Errorf("receipt = %+v", r)
		}
		if r.Coalesced {
			counted++
		}
	}
	return counted
}

// countOf returns how many denials the log has of a caller, and in how many
// entries.
func countOf(t *testing.T, dir, caller string) (denials uint64, entries int) {
	t.Helper()
	for _, e := range readAll(t, dir) {
		if e.Caller == caller {
			denials += max(1, e.Count)
			entries++
		}
	}
	return denials, entries
}

func TestDenials(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	c := newClock()
	l := create(t, dir, audit.Options{Now: c.now})
	if got, want := deny(t, l, denial(0, "bad"), 1000), 900; got != want {
		t.Errorf("%d of 1000 denials were counted, want %d", got, want)
	}
	other := denial(0, "bad")
	other.Reason = "RATE"
	if got, want := deny(t, l, other, 1), 1; got != want {
		t.Errorf("%d denials for another reason were counted, want %d", got, want)
	}
	if got := deny(t, l, denial(0, "good"), 100); got != 0 {
		t.Errorf("%d denials of another caller were counted", got)
	}
	urgent := denial(0, "bad")
	urgent.Priority = true
	if got := deny(t, l, urgent, 1); got != 0 {
		t.Error("a denial with priority was counted")
	}
	mixed := appendTo(t, l, denial(0, "bad"), release(1), denial(2, "bad"), release(3))
	if !mixed[0].Coalesced || mixed[1].Coalesced || !mixed[2].Coalesced || mixed[3].Index != mixed[1].Index+1 {
		t.Errorf("receipts = %+v, want the denials counted and the releases written", mixed)
	}
	if got, want := l.Stats().Coalesced, uint64(903); got != want {
		t.Errorf("stats say that %d denials were counted, want %d", got, want)
	}

	// What was counted follows within a second, by itself.
	deadline := time.Now().Add(10 * time.Second)
	for {
		if got, _ := countOf(t, dir, "bad"); got == 1004 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the counted denials are not written")
		}
		time.Sleep(10 * time.Millisecond)
	}
	// Usually two entries stand for them, but a second can end in between.
	if _, got := countOf(t, dir, "bad"); got > 101+10 {
		t.Errorf("%d entries, want at most ten for what was counted", got)
	}
	for _, e := range readAll(t, dir) {
		switch {
		case e.Count == 0 && e.Category == "movies": // one that stands for itself is complete
		case e.Count > 1 && e.Reason == "DENIED" && e.Category == "" && e.Outcome == audit.Denied && e.Role == "drm-provider":
		default:
			t.Errorf("entry = %+v", e)
		}
	}

	c.advance(time.Second)
	if got := deny(t, l, denial(0, "bad"), 100); got != 0 {
		t.Errorf("%d denials were counted in the next second", got)
	}
	if got, want := deny(t, l, denial(0, "bad"), 5), 5; got != want {
		t.Errorf("%d denials were counted, want %d", got, want)
	}
	shut(t, l) // writes what is counted
	if got, _ := countOf(t, dir, "bad"); got != 1109 {
		t.Errorf("%d denials in the log, want 1109", got)
	}
	verify(t, dir)
}

// However many callers and kinds there are, the table is bounded and no denial
// gets lost.
func TestDenialsBounded(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	c := newClock()
	l := create(t, dir, audit.Options{Now: c.now, DenialsPerSecond: 1})
	const callers, each = 1500, 3
	var batch []audit.Entry
	for i := range callers {
		batch = append(batch, slices.Repeat([]audit.Entry{denial(0, fmt.Sprintf("caller-%d", i))}, each)...)
	}
	appendTo(t, l, batch...)
	for i := range 100 {
		e := denial(0, "caller-0")
		e.Reason = fmt.Sprintf("REASON_%d", i)
		appendTo(t, l, e)
	}
	shut(t, l)
	total, others := uint64(0), 0
	for _, e := range readAll(t, dir) {
		total += max(1, e.Count)
		if e.Caller == "(others)" || e.Reason == "(others)" {
			others++
		}
	}
	if got, want := total, uint64(callers*each+100); got != want {
		t.Errorf("%d denials in the log, want %d", got, want)
	}
	if got, want := others, 2; got != want {
		t.Errorf("%d entries stand for others, want %d", got, want)
	}
}

// Denials that cannot be written stay counted until they can, and Close says if
// they never could.
func TestDenialsFull(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	c := newClock()
	var file faultyFile
	l := create(t, dir, audit.Options{Now: c.now, DenialsPerSecond: 1, Reserve: reserve, WrapFile: file.wrap})
	deny(t, l, denial(0, "bad"), 1)
	file.set(func() { file.limit = 1 })
	long := failure(0)
	long.Detail = longText
	for _, batch := range [][]audit.Entry{slices.Repeat([]audit.Entry{long}, 64), {long}, {failure(0)}} {
		for err := error(nil); err == nil; { // until not even a short one fits
			_, err = l.Append(t.Context(), batch)
		}
	}
	if got, want := deny(t, l, denial(0, "bad"), 9), 9; got != want {
		t.Errorf("%d denials were counted, want %d", got, want)
	}
	time.Sleep(1200 * time.Millisecond) // the log tries to write what is counted
	if got, _ := countOf(t, dir, "bad"); got != 1 {
		t.Errorf("%d denials in the log while there is no room, want 1", got)
	}
	file.set(func() { file.limit = 0 })
	shut(t, l)
	if got, _ := countOf(t, dir, "bad"); got != 10 {
		t.Errorf("%d denials in the log, want 10", got)
	}

	l = open(t, dir, audit.Options{Now: c.now, DenialsPerSecond: 1, WrapFile: file.wrap})
	deny(t, l, denial(0, "bad"), 10)
	file.set(func() { file.sync = func() error { return unix.EIO } })
	wantBlocked(t, l, unix.EIO, release(0))
	if err := l.Close(); err == nil || !strings.Contains(err.Error(), "counted denials") {
		t.Errorf("Close: error = %v, want that denials are not written", err)
	}
}

// TestFailuresAreCounted: what fails too often is counted as what is denied, apart
// from it, and stays a failure.
func TestFailuresAreCounted(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	l := create(t, dir, audit.Options{Now: newClock().now, DenialsPerSecond: 10})
	failed := denial(0, "provider")
	failed.Outcome = audit.Failed // for the same reason, so that nothing else tells them apart
	for range 50 {
		deny(t, l, denial(0, "provider"), 1)
		deny(t, l, failed, 1)
	}
	shut(t, l)
	got := map[audit.Outcome]uint64{}
	for _, e := range readAll(t, dir) {
		got[e.Outcome] += max(1, e.Count)
	}
	if len(got) != 2 || got[audit.Failed] != 50 || got[audit.Denied] != 50 {
		t.Errorf("the log has %v, want 50 that failed and 50 that were denied", got)
	}
}
