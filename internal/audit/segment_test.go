package audit_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/keycustody/custodian/internal/audit"
	"github.com/keycustody/custodian/internal/checkpoint"
	"golang.org/x/sys/unix"
)

// segmentFiles returns the names of the files in dir.
func segmentFiles(t testing.TB, dir string) []string {
	t.Helper()
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, f := range files {
		names = append(names, f.Name())
	}
	return names
}

// copyLog copies the files of a log to another directory.
func copyLog(t testing.TB, from, to string) {
	t.Helper()
	for _, name := range segmentFiles(t, from) {
		b, err := os.ReadFile(filepath.Join(from, name))
		if err == nil {
			err = os.MkdirAll(to, 0o700)
		}
		if err == nil {
			err = os.WriteFile(filepath.Join(to, name), b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// small begins another segment with every few batches.
var small = audit.Options{SegmentSize: 4 << 10, Reserve: 64 << 10}

// fill writes entries from index from up to to in batches of 1 to 5.
func fill(t testing.TB, l *audit.Log, from, to int) (receipts []audit.Receipt) {
	t.Helper()
	for n := from; n < to; {
		var entries []audit.Entry
		for range min(n%5+1, to-n) {
			entries = append(entries, release(n))
			n++
		}
		receipts = append(receipts, appendTo(t, l, entries...)...)
	}
	return receipts
}

// The tree crosses segments: every entry is there, in its order, from wherever
// it is read, and every proof holds.
func TestSegments(t *testing.T) {
	const n = 60
	ctx := context.Background()
	dir, k := filepath.Join(fastDir(t), "audit"), newTestKey(t)
	l := create(t, dir, small)
	unsigned := fill(t, l, 0, 20)
	signWith(t, l, k)
	receipts := append(unsigned, fill(t, l, 20, n)...)
	stats := l.Stats()
	root := l.Root()
	shut(t, l)

	files := segmentFiles(t, dir)
	if len(files) < 4 || stats.Segments != len(files) || files[0] != "audit-00000001.log" || files[len(files)-1] != "audit.log" {
		t.Fatalf("files = %v, stats = %+v, want at least 4 segments", files, stats)
	}
	r, err := verifySigned(dir, k)
	if err != nil || r.Entries != n || r.Root != root || r.Unsigned != 20 || r.Segments != len(files) || r.Bytes != stats.Bytes {
		t.Errorf("report = %+v, %v, want %d bytes", r, err, stats.Bytes)
	}
	for from := range uint64(n) {
		next := from
		err := audit.Read(dir, from, func(e *audit.Entry) error {
			if e.Index != next || e.RequestID != release(int(next)).RequestID {
				return fmt.Errorf("entry %d is %s", e.Index, e.RequestID)
			}
			next++
			return nil
		})
		if err != nil || next != n {
			t.Errorf("Read from %d ends before %d: %v", from, next, err)
		}
		part, err := audit.Verify(ctx, dir, audit.VerifyOptions{Check: k.check, From: from, To: from + 1})
		if err != nil || part.From > from || part.Entries <= from {
			t.Errorf("Verify of %d: %+v, %v", from, part, err)
		}
		if part.Entries-part.From > 30 {
			t.Errorf("Verify of %d read %d to %d, want a segment or two", from, part.From, part.Entries)
		}
	}
	newest, err := checkpoint.Verify(receipts[n-1].Checkpoint, k.key.Public())
	if err != nil {
		t.Fatal(err)
	}
	for i, receipt := range receipts {
		p, err := audit.ProveInclusion(ctx, dir, uint64(i), 0)
		if err != nil || p.LeafHash != receipt.LeafHash || p.Entry.RequestID != release(i).RequestID {
			t.Fatalf("proof of %d: %+v, %v", i, p, err)
		}
		if err := newest.CheckInclusion(uint64(i), receipt.LeafHash, p.Hashes); err != nil {
			t.Error(err)
		}
		var out bytes.Buffer
		if _, err := audit.Export(ctx, dir, uint64(i), 0, nil, &out); err != nil {
			t.Fatal(err)
		}
		if _, err := audit.VerifyExport(ctx, &out, k.check, nil); err != nil {
			t.Errorf("export from %d: %v", i, err)
		}
	}

	l = open(t, dir, small)
	if l.Size() != n || l.Root() != root {
		t.Errorf("opened with %d entries, want %d", l.Size(), n)
	}
	if got, want := l.Stats(), stats; got.Bytes != want.Bytes || got.Segments != want.Segments {
		t.Errorf("stats = %+v, want %+v", got, want)
	}
	signWith(t, l, k)
	if got := fill(t, l, n, n+20)[0].Index; got != n {
		t.Errorf("index = %d, want %d", got, n)
	}
	shut(t, l)
	if r, err := verifySigned(dir, k); err != nil || r.Entries != n+20 {
		t.Errorf("report = %+v, %v", r, err)
	}
}

// A range that is verified begins with a checkpoint that has to be good.
func TestVerifyRangeStart(t *testing.T) {
	dir, k := filepath.Join(t.TempDir(), "audit"), newTestKey(t)
	l := create(t, dir, small)
	signWith(t, l, k)
	fill(t, l, 0, 60)
	shut(t, l)
	other := newTestKey(t)
	_, err := audit.Verify(context.Background(), dir, audit.VerifyOptions{Check: other.check, From: 40, To: 41})
	var damage *audit.DamageError
	if !errors.As(err, &damage) || damage.Segment == 0 || damage.Offset != 0 || !errors.Is(err, checkpoint.ErrSignature) {
		t.Errorf("error = %v, want the start of a segment not to be signed", err)
	}
	for _, r := range [][2]uint64{{0, 61}, {61, 0}, {70, 80}} {
		if _, err := audit.Verify(context.Background(), dir, audit.VerifyOptions{From: r[0], To: r[1]}); !errors.Is(err, audit.ErrNoEntry) {
			t.Errorf("Verify of %v: %v, want ErrNoEntry", r, err)
		}
	}
}

// A log contains each of its older checkpoints, and no other.
func TestVerifySince(t *testing.T) {
	dir, k := filepath.Join(t.TempDir(), "audit"), newTestKey(t)
	l := create(t, dir, small)
	signWith(t, l, k)
	receipts := fill(t, l, 0, 60)
	id := l.ID()
	shut(t, l)
	ctx := context.Background()
	for _, r := range receipts {
		c, err := checkpoint.Parse(r.Checkpoint)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := audit.Verify(ctx, dir, audit.VerifyOptions{Since: &c}); err != nil {
			t.Errorf("since %d: %v", c.Size, err)
		}
		forked := c
		forked.Root[3] ^= 1
		for _, c := range []checkpoint.Checkpoint{forked,
			{Origin: c.Origin, Size: 61, Root: c.Root}, {Origin: "custodian/other", Size: c.Size, Root: c.Root}} {
			if _, err := audit.Verify(ctx, dir, audit.VerifyOptions{Since: &c}); !errors.Is(err, checkpoint.ErrProof) {
				t.Errorf("since %+v: error = %v, want ErrProof", c, err)
			}
		}
	}
	if c := (checkpoint.Checkpoint{Origin: checkpoint.Origin(id), Size: 3}); true {
		if _, err := audit.Verify(ctx, dir, audit.VerifyOptions{Since: &c, From: 40}); !errors.Is(err, checkpoint.ErrProof) {
			t.Errorf("before the range: error = %v, want ErrProof", err)
		}
	}
}

// A failingDisk is the files of a log, which work until a number of calls was
// made, and never again: what a crash leaves.
type failingDisk struct {
	mu    sync.Mutex // guards the fields below
	left  int
	calls int
}

func (d *failingDisk) wrap(f audit.File) audit.File { return failingFile{f, d} }

func (d *failingDisk) call() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.calls++; d.calls > d.left {
		return errInjected
	}
	return nil
}

type failingFile struct {
	audit.File
	disk *failingDisk
}

func (f failingFile) WriteAt(b []byte, off int64) (int, error) {
	if err := f.disk.call(); err != nil {
		// Half of it arrives.
		n, _ := f.File.WriteAt(b[:len(b)/2], off)
		return n, err
	}
	return f.File.WriteAt(b, off)
}

func (f failingFile) Sync() error {
	if err := f.disk.call(); err != nil {
		return err
	}
	return f.File.Sync()
}

func (f failingFile) Allocate(off, n int64) error {
	if err := f.disk.call(); err != nil {
		return err
	}
	return f.File.Allocate(off, n)
}

// The disk stops to work with any call that is made while segments are begun.
// What was acknowledged is there, and the log goes on.
func TestRotationStops(t *testing.T) {
	k := newTestKey(t)
	run := func(dir string, disk *failingDisk) (acknowledged uint64) {
		o := small
		o.WrapFile = disk.wrap
		l, err := audit.Create(dir, o)
		if err != nil {
			return 0
		}
		defer l.Close()
		signWith(t, l, k)
		for i := range 30 {
			if receipts, err := l.Append(context.Background(), []audit.Entry{release(i), release(i)}); err == nil {
				acknowledged = receipts[1].Index + 1
			}
		}
		return acknowledged
	}
	count := &failingDisk{left: 1 << 30}
	if got := run(filepath.Join(fastDir(t), "audit"), count); got != 60 {
		t.Fatalf("%d entries, want 60", got)
	}
	for calls := 3; calls < count.calls; calls++ {
		dir := filepath.Join(fastDir(t), "audit")
		disk := &failingDisk{left: calls}
		acknowledged := run(dir, disk)
		if r, err := verifySigned(dir, k); err != nil && acknowledged > 0 || r.Entries < acknowledged {
			t.Errorf("after %d calls: %d entries, %d acknowledged, %v", calls, r.Entries, acknowledged, err)
		}
		l := open(t, dir, small)
		if l.Size() < acknowledged || l.Size() > acknowledged+2 {
			t.Errorf("after %d calls: opened with %d entries, %d were acknowledged", calls, l.Size(), acknowledged)
		}
		signWith(t, l, k)
		fill(t, l, int(l.Size()), int(l.Size())+10)
		want := l.Size()
		shut(t, l)
		if r, err := verifySigned(dir, k); err != nil || r.Entries != want {
			t.Errorf("after %d calls and 10 entries more: %+v, %v", calls, r, err)
		}
	}
}

// A new segment that cannot be made stops nothing, and is made when it can be.
func TestRotationWithoutRoom(t *testing.T) {
	dir := filepath.Join(fastDir(t), "audit")
	file := faultyFile{}
	o := small
	o.WrapFile = func(f audit.File) audit.File {
		file.mu.Lock()
		defer file.mu.Unlock()
		if file.File == nil {
			return file.wrap(f)
		}
		return &faultyFile{File: f, limit: file.limit}
	}
	l := create(t, dir, o)
	file.set(func() { file.limit = 4 << 20 })
	fill(t, l, 0, 60)
	if got := l.Stats(); got.Segments != 1 || got.Blocked != "" || got.OnReserve {
		t.Errorf("stats = %+v, want one segment that goes on", got)
	}
	if got, want := segmentFiles(t, dir), 1; len(got) != want {
		t.Errorf("files = %v, want no half of one", got)
	}
	file.set(func() { file.limit = 0 })
	deadline := time.Now().Add(5 * time.Second)
	for i := 60; l.Stats().Segments == 1; i++ {
		if time.Now().After(deadline) {
			t.Fatal("the log begins no segment when it can")
		}
		appendTo(t, l, release(i))
		time.Sleep(10 * time.Millisecond)
	}
	shut(t, l)
	verify(t, dir)
}

// Someone does something to the files of a log that is open. The next batch is
// not acknowledged, and says why.
func TestSegmentsTampered(t *testing.T) {
	overwrite := func(path string, off int64, text string) error {
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = f.WriteAt([]byte(text), off)
		return err
	}
	grow := func(path string) error {
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = f.WriteString("more")
		return err
	}
	replace := func(path string) error {
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if err := os.WriteFile(path+".x", b, 0o600); err != nil {
			return err
		}
		return os.Rename(path+".x", path)
	}
	for _, tt := range []struct {
		name   string
		active bool
		do     func(path string) error
		want   string
	}{
		{"sealed removed", false, os.Remove, "segment 1 is gone"},
		{"sealed renamed", false, func(path string) error { return os.Rename(path, path+".1") }, "segment 1 is gone"},
		{"sealed cut", false, func(path string) error { return os.Truncate(path, 1000) }, "segment 1, "},
		{"sealed emptied", false, func(path string) error { return os.Truncate(path, 0) }, "not an audit log"},
		{"sealed appended to", false, grow, "segment 1, "},
		{"sealed replaced", false, replace, "segment 1, "},
		{"sealed edited", false, func(path string) error { return overwrite(path, 1000, "x") }, "segment 1, "},
		{"directory removed", false, func(path string) error { return os.RemoveAll(filepath.Dir(path)) }, "the file is gone"},
		{"directory replaced", false, func(path string) error {
			dir := filepath.Dir(path)
			if err := os.Rename(dir, dir+".1"); err != nil {
				return err
			}
			return os.Mkdir(dir, 0o700)
		}, "the file is gone"},
		{"appended to", true, grow, "somebody else has appended 4 bytes"},
		{"edited", true, func(path string) error { return overwrite(path, 1000, "x") }, "somebody else has written to the file"},
		{"a batch put behind the last", true, func(path string) error { return overwrite(path, 9000, "batch/1\n") }, "somebody else has written to the file"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "audit")
			l := create(t, dir, small)
			fill(t, l, 0, 60)
			files := segmentFiles(t, dir)
			path := filepath.Join(dir, files[0])
			if tt.active {
				path = filepath.Join(dir, files[len(files)-2])
			}
			backup := filepath.Join(t.TempDir(), "backup")
			copyLog(t, dir, backup)
			time.Sleep(20 * time.Millisecond) // the kernel's clock for files has ticks
			if err := tt.do(path); err != nil {
				t.Fatal(err)
			}
			wantBlocked(t, l, nil, release(61))
			if got := l.Stats().Blocked; !strings.Contains(got, tt.want) {
				t.Errorf("blocked = %q, want %q", got, tt.want)
			}
			wantBlocked(t, l, nil, release(62))

			// Once the files are what they were, it goes on, and nothing is lost.
			shut(t, l)
			if err := os.RemoveAll(dir); err != nil {
				t.Fatal(err)
			}
			copyLog(t, backup, dir)
			l = open(t, dir, small)
			if got := appendTo(t, l, release(60))[0].Index; got != 60 {
				t.Errorf("index = %d, want 60", got)
			}
			shut(t, l)
			if r := verify(t, dir); r.Entries != 61 {
				t.Errorf("%d entries, want 61", r.Entries)
			}
		})
	}
}

// Marks are passed once each, up and down, and beyond the limit there is only
// the reserve.
func TestWatermarks(t *testing.T) {
	dir := filepath.Join(fastDir(t), "audit")
	var said bytes.Buffer
	o := audit.Options{Reserve: reserve, Limit: 6 << 20, Log: slog.New(slog.NewTextHandler(&said, nil))}
	l := create(t, dir, o)
	big := failure(0)
	big.Detail = longText
	marks := map[int]int64{}
	for {
		_, err := l.Append(context.Background(), []audit.Entry{big, big, big, big})
		if s := l.Stats(); marks[s.Watermark] == 0 {
			marks[s.Watermark] = s.Bytes
		}
		if err == nil {
			continue
		}
		if !errors.Is(err, audit.ErrBlocked) || !errors.Is(err, audit.ErrFull) || !strings.Contains(err.Error(), "the limit is 6291456") {
			t.Fatalf("error = %v, want ErrBlocked, ErrFull and the limit", err)
		}
		break
	}
	if s := l.Stats(); s.Limit != 6<<20 || !s.OnReserve || s.Full || s.Blocked != "" || s.Bytes > 6<<20 {
		t.Errorf("stats = %+v, want the reserve to be left", s)
	}
	if got := marks[80]; got < 6<<20*80/100 || got > 6<<20*80/100+64<<10 {
		t.Errorf("80 %% was told at %d bytes of %d", got, 6<<20)
	}
	big.Outcome = audit.Allowed
	for err := error(nil); err == nil; {
		_, err = l.Append(context.Background(), []audit.Entry{big})
		if s := l.Stats(); marks[s.Watermark] == 0 {
			marks[s.Watermark] = s.Bytes
		}
	}
	if got := marks[95]; got < 6<<20*95/100 || got > 6<<20*95/100+64<<10 {
		t.Errorf("95 %% was told at %d bytes of %d", got, 6<<20)
	}
	if s := l.Stats(); !s.Full || !strings.Contains(s.Blocked, audit.ErrFull.Error()) {
		t.Errorf("stats = %+v, want it to be full", s)
	}
	shut(t, l)
	for _, want := range []string{"it is 80 percent full", "it is 95 percent full", "no room but the reserve", "no room, nothing can be written"} {
		if got := strings.Count(said.String(), want); got != 1 && !strings.Contains(want, "reserve") || got == 0 {
			t.Errorf("said %q %d times, want once", want, got)
		}
	}

	o.Limit = 60 << 20
	l = open(t, dir, o)
	if s := l.Stats(); s.Full || s.Blocked != "" || s.Watermark != 0 {
		t.Errorf("with a higher limit: stats = %+v", s)
	}
	appendTo(t, l, big)
}

// Without a limit, the marks are those of the disk.
func TestWatermarkOfDisk(t *testing.T) {
	mount := t.TempDir()
	if err := unix.Mount("none", mount, "tmpfs", 0, "size=10m"); err != nil {
		t.Skip("mounting tmpfs does not work here: ", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(mount, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	l := create(t, filepath.Join(mount, "audit"), audit.Options{Reserve: reserve})
	if s := l.Stats(); s.Limit < 9<<20 || s.Limit > 10<<20 || s.Watermark != 0 {
		t.Errorf("stats = %+v, want a limit of some 10 MiB", s)
	}
	if err := os.WriteFile(filepath.Join(mount, "other"), make([]byte, 5<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(5 * time.Second)
	for l.Stats().Limit > 6<<20 {
		if time.Now().After(deadline) {
			t.Fatalf("stats = %+v, want the disk to be looked at", l.Stats())
		}
		time.Sleep(10 * time.Millisecond)
	}
	shut(t, l)
}
