package audit_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/keycustody/custodian/internal/audit"
	"github.com/keycustody/custodian/internal/checkpoint"
)

// keepThirds keeps a third of the entries.
func keepThirds(e *audit.Entry) bool { return e.Index%3 == 0 }

// prunedLog is a signed log of 60 entries, whose sealed segments but the newest
// are pruned.
func prunedLog(t testing.TB) (dir string, receipts []audit.Receipt, k *testKey) {
	t.Helper()
	dir, k = filepath.Join(fastDir(t), "audit"), newTestKey(t)
	l := create(t, dir, small)
	signWith(t, l, k)
	receipts = fill(t, l, 0, 60)
	shut(t, l)
	if _, err := audit.Prune(context.Background(), dir, audit.PruneOptions{Whole: 1, Keep: keepThirds, Check: k.check, Now: time.Unix(1e9, 0)}); err != nil {
		t.Fatal(err)
	}
	return dir, receipts, k
}

// A log whose oldest segments are pruned verifies, and says what is gone. Every
// proof holds; what was kept is read; the log goes on.
func TestPruned(t *testing.T) {
	dir, receipts, k := prunedLog(t)
	ctx := context.Background()
	r, err := verifySigned(dir, k)
	if err != nil || r.Entries != 60 || len(r.Pruned) != r.Segments-2 || r.Unsigned != 0 {
		t.Fatalf("report = %+v, %v", r, err)
	}
	gone := uint64(0) // entries that are in pruned segments
	for i, p := range r.Pruned {
		if p.First != gone || int(p.Segment) != i || p.Kept != (gone+p.Entries+2)/3-(gone+2)/3 || !p.At.Equal(time.Unix(1e9, 0)) ||
			!p.From.Equal(release(int(gone)).Time) || !p.To.Equal(release(int(gone+p.Entries-1)).Time) {
			t.Errorf("pruned = %+v, want the segment from entry %d", p, gone)
		}
		gone += p.Entries
	}
	listed, err := audit.ListPruned(dir)
	if err != nil || len(listed) != len(r.Pruned) {
		t.Fatalf("%d pruned segments are listed, want %d, %v", len(listed), len(r.Pruned), err)
	}
	for i, p := range r.Pruned {
		if p.Kept = 0; listed[i] != p {
			t.Errorf("listed %+v, want %+v", listed[i], p)
		}
	}
	newest, err := checkpoint.Verify(receipts[59].Checkpoint, k.key.Public())
	if err != nil || gone < 20 || gone > 50 {
		t.Fatalf("%d entries are pruned, %v", gone, err)
	}
	var want []uint64
	for i := range uint64(60) {
		if i >= gone || i%3 == 0 {
			want = append(want, i)
		}
		p, err := audit.ProveInclusion(ctx, dir, i, 0)
		if err != nil || p.LeafHash != receipts[i].LeafHash || p.Entry.Index != i || p.Pruned != (i < gone && i%3 != 0) {
			t.Fatalf("proof of %d: %+v, %v", i, p, err)
		}
		if err := newest.CheckInclusion(i, p.LeafHash, p.Hashes); err != nil {
			t.Error(err)
		}
		old, err := checkpoint.Parse(receipts[i].Checkpoint)
		if err != nil {
			t.Fatal(err)
		}
		hashes, _, err := audit.ProveConsistency(ctx, dir, old.Size, 0)
		if err == nil {
			err = newest.CheckConsistency(old, hashes)
		}
		if err != nil {
			t.Errorf("consistency with %d: %v", old.Size, err)
		}
		if _, err := audit.Verify(ctx, dir, audit.VerifyOptions{Since: &old}); err != nil {
			t.Errorf("since %d: %v", old.Size, err)
		}
		if part, err := audit.Verify(ctx, dir, audit.VerifyOptions{From: i, To: i + 1, Check: k.check}); err != nil || part.From > i || part.Entries <= i {
			t.Errorf("Verify of %d: %+v, %v", i, part, err)
		}
		var out bytes.Buffer
		if _, err := audit.Export(ctx, dir, i, i+1, nil, &out); i < gone && i%3 != 0 && !errors.Is(err, audit.ErrPruned) {
			t.Errorf("export of %d: error = %v, want ErrPruned", i, err)
		}
	}
	var got []uint64
	for _, e := range readAll(t, dir) {
		if e.RequestID != release(int(e.Index)).RequestID {
			t.Errorf("entry %d is %s", e.Index, e.RequestID)
		}
		got = append(got, e.Index)
	}
	if !slices.Equal(got, want) {
		t.Errorf("entries = %v, want %v", got, want)
	}

	var visited []uint64
	o := small
	o.Visit = func(e *audit.Entry) error { visited = append(visited, e.Index); return nil }
	l := open(t, dir, o)
	if s := l.Stats(); !slices.Equal(visited, want) || s.Pruned != gone {
		t.Errorf("visited %v, stats %+v, want %v", visited, s, want)
	}
	signWith(t, l, k)
	fill(t, l, 60, 80)
	shut(t, l)
	if r, err := verifySigned(dir, k); err != nil || r.Entries != 80 {
		t.Errorf("report = %+v, %v", r, err)
	}
}

// Whatever byte of a pruned segment is changed, the log does not verify, but
// for what it says of the segment's times and sizes if the checksum is made to
// fit, too.
func TestPrunedFlips(t *testing.T) {
	dir, _, k := prunedLog(t)
	for _, name := range []string{"audit.log", "audit-00000001.log"} {
		path := filepath.Join(dir, name)
		whole, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		try := func(what string, at int, b []byte) {
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
			var damage *audit.DamageError
			if _, err := verifySigned(dir, k); !errors.As(err, &damage) {
				t.Errorf("%s: byte %d %s: Verify says %v", name, at, what, err)
			}
		}
		for at := range whole {
			b := bytes.Clone(whole)
			b[at] ^= 0x41
			try("changed", at, b)
		}
		for at := 0; at < len(whole); at += 97 {
			try("and all that follow cut", at, whole[:at])
		}
		try("appended", len(whole), append(bytes.Clone(whole), 0))
		if err := os.WriteFile(path, whole, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := verifySigned(dir, k); err != nil {
		t.Error(err)
	}
}

// A log never ends with a segment that is pruned: where all that follow are taken
// away, and it is cut anywhere, that is damage.
func TestPrunedEnd(t *testing.T) {
	dir, _, k := prunedLog(t)
	whole := load(t, dir)
	for _, name := range segmentFiles(t, dir) {
		if err := os.Remove(filepath.Join(dir, filepath.Base(name))); err != nil {
			t.Fatal(err)
		}
	}
	for end := range len(whole) + 1 {
		store(t, dir, whole[:end])
		var damage *audit.DamageError
		if _, err := verifySigned(dir, k); !errors.As(err, &damage) {
			t.Errorf("cut at byte %d of %d: Verify says %v", end, len(whole), err)
		}
	}
	if l, err := audit.Open(dir, audit.Options{}); err == nil {
		shut(t, l)
		t.Error("Open takes a log that ends with a pruned segment")
	}
}

// What goes is what both bounds let go, whole and in order, and what is under
// the archive's name is what was there. Put back, it is the log again.
func TestPrunePolicy(t *testing.T) {
	ctx := context.Background()
	dir, k := filepath.Join(t.TempDir(), "audit"), newTestKey(t)
	l := create(t, dir, small)
	signWith(t, l, k)
	fill(t, l, 0, 60)
	shut(t, l)
	before := filepath.Join(t.TempDir(), "before")
	copyLog(t, dir, before)
	n := len(segmentFiles(t, before))

	count := func(o audit.PruneOptions) int {
		t.Helper()
		o.Rehearse = true
		pruned, err := audit.Prune(ctx, dir, o)
		if err != nil {
			t.Error(err)
		}
		return len(pruned)
	}
	all, err := audit.Prune(ctx, dir, audit.PruneOptions{Rehearse: true})
	if err != nil || len(all) != n-1 {
		t.Fatalf("%d of %d segments would be pruned, %v", len(all), n, err)
	}
	for _, tt := range []struct {
		o    audit.PruneOptions
		want int
	}{
		{audit.PruneOptions{Whole: 1}, n - 2},
		{audit.PruneOptions{Whole: 2}, n - 3},
		{audit.PruneOptions{Whole: n}, 0},
		{audit.PruneOptions{Before: all[0].From}, 0},
		{audit.PruneOptions{Before: all[0].To}, 0},
		{audit.PruneOptions{Before: all[0].To.Add(1)}, 1},
		{audit.PruneOptions{Before: all[1].To.Add(1)}, 2},
		{audit.PruneOptions{Before: all[1].To.Add(1), Whole: n - 2}, 1},
	} {
		if got := count(tt.o); got != tt.want {
			t.Errorf("%+v: %d segments, want %d", tt.o, got, tt.want)
		}
	}
	for _, name := range segmentFiles(t, before) {
		if !reflect.DeepEqual(readFile(t, dir, name), readFile(t, before, name)) {
			t.Fatalf("a rehearsal changed %s", name)
		}
	}

	other := newTestKey(t)
	var damage *audit.DamageError
	if _, err := audit.Prune(ctx, dir, audit.PruneOptions{Check: other.check}); !errors.As(err, &damage) {
		t.Errorf("another key: error = %v, want a DamageError", err)
	}
	archive := t.TempDir()
	if err := os.WriteFile(filepath.Join(archive, "audit.log"), []byte("other"), 0o600); err != nil {
		t.Fatal(err)
	}
	if pruned, err := audit.Prune(ctx, dir, audit.PruneOptions{Archive: archive}); err == nil || len(pruned) != 0 {
		t.Errorf("pruned %v although the archive has another file", pruned)
	}
	if err := os.Remove(filepath.Join(archive, "audit.log")); err != nil {
		t.Fatal(err)
	}
	if _, err := audit.Prune(ctx, dir, audit.PruneOptions{Archive: filepath.Join(archive, "none")}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("archive that is not there: error = %v", err)
	}
	if pruned, err := audit.Prune(ctx, dir, audit.PruneOptions{Archive: archive, Whole: 1}); err != nil || len(pruned) != n-2 {
		t.Errorf("pruned %d segments, %v", len(pruned), err)
	}
	if got := len(segmentFiles(t, archive)); got != n-2 {
		t.Errorf("%d files in the archive, want %d", got, n-2)
	}
	if pruned, err := audit.Prune(ctx, dir, audit.PruneOptions{Archive: archive, Whole: 1}); err != nil || len(pruned) != 0 {
		t.Errorf("pruned %d segments again, %v", len(pruned), err)
	}
	if r, err := verifySigned(dir, k); err != nil || len(r.Pruned) != n-2 {
		t.Errorf("report = %+v, %v", r, err)
	}
	copyLog(t, archive, dir)
	if r, err := verifySigned(dir, k); err != nil || len(r.Pruned) != 0 || r.Entries != 60 {
		t.Errorf("put back: report = %+v, %v", r, err)
	}
}

func readFile(t testing.TB, dir, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// A log that is written notices that it is pruned, and goes on; readers see no
// gap. A segment that does not verify is not pruned.
func TestPruneBesideWriter(t *testing.T) {
	ctx := context.Background()
	dir, k := filepath.Join(t.TempDir(), "audit"), newTestKey(t)
	l := create(t, dir, small)
	signWith(t, l, k)
	fill(t, l, 0, 60)
	was := l.Stats()
	pruned, err := audit.Prune(ctx, dir, audit.PruneOptions{Whole: 1})
	if err != nil || len(pruned) == 0 {
		t.Fatalf("pruned %v, %v", pruned, err)
	}
	appendTo(t, l, release(60))
	gone := uint64(0)
	for _, p := range pruned {
		gone += p.Entries
	}
	if s := l.Stats(); s.Pruned != gone || s.Bytes >= was.Bytes {
		t.Errorf("stats = %+v, want %d pruned entries and less than %d bytes", s, gone, was.Bytes)
	}
	// What is left of a segment cannot be replaced, not even by the segment.
	path := filepath.Join(dir, "audit.log")
	b, err := os.ReadFile(path)
	if err == nil {
		err = os.WriteFile(path+".x", b, 0o600)
	}
	if err == nil {
		err = os.Rename(path+".x", path)
	}
	if err != nil {
		t.Fatal(err)
	}
	wantBlocked(t, l, nil, release(61))
	shut(t, l)

	dir, _, _ = prunedLog(t)
	files := segmentFiles(t, dir)
	path = filepath.Join(dir, files[len(files)-4]) // the newest that is sealed
	b, err = os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)-100] ^= 1
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	var damage *audit.DamageError
	if _, err := audit.Prune(ctx, dir, audit.PruneOptions{}); !errors.As(err, &damage) {
		t.Errorf("pruning a damaged segment: error = %v, want a DamageError", err)
	}
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, b) {
		t.Errorf("the damaged segment was touched: %v", err)
	}
}

// Root may prune the log of the daemon, which can read what is left.
func TestPruneKeepsOwner(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can give files away")
	}
	dir := filepath.Join(t.TempDir(), "audit")
	l := create(t, dir, small)
	fill(t, l, 0, 40)
	shut(t, l)
	const daemon = 4711
	for _, name := range append(segmentFiles(t, dir), ".") {
		if err := os.Chown(filepath.Join(dir, name), daemon, daemon); err != nil {
			t.Fatal(err)
		}
	}
	if pruned, err := audit.Prune(context.Background(), dir, audit.PruneOptions{}); err != nil || len(pruned) == 0 {
		t.Fatalf("pruned %v, %v", pruned, err)
	}
	for _, name := range segmentFiles(t, dir) {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil || info.Sys().(*syscall.Stat_t).Uid != daemon || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %+v, %v, want it to be the daemon's alone", name, info.Sys(), err)
		}
	}
}
