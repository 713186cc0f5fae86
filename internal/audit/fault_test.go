package audit_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/keycustody/custodian/internal/audit"
	"golang.org/x/sys/unix"
)

var errInjected = errors.New("injected fault")

// A faultyFile is the log's real file, whose calls fail when told to.
type faultyFile struct {
	audit.File
	mu    sync.Mutex // guards the fields below
	write func(b []byte, off int64) (int, error)
	sync  func() error
	limit int64 // where a disk with a limit is full
}

func (f *faultyFile) wrap(inner audit.File) audit.File {
	f.File = inner
	return f
}

func (f *faultyFile) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

func (f *faultyFile) WriteAt(b []byte, off int64) (int, error) {
	f.mu.Lock()
	write := f.write
	f.mu.Unlock()
	if write != nil {
		return write(b, off)
	}
	return f.File.WriteAt(b, off)
}

func (f *faultyFile) Sync() error {
	f.mu.Lock()
	sync := f.sync
	f.mu.Unlock()
	if sync != nil {
		return sync()
	}
	return f.File.Sync()
}

func (f *faultyFile) Allocate(off, n int64) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.limit > 0 && off+n > f.limit {
		return unix.ENOSPC
	}
	return f.File.Allocate(off, n)
}

func wantBlocked(t testing.TB, l *audit.Log, cause error, entries ...audit.Entry) {
	t.Helper()
	receipts, err := l.Append(context.Background(), entries)
	if !errors.Is(err, audit.ErrBlocked) || receipts != nil {
		t.Fatalf("Append = %v, %v, want ErrBlocked", receipts, err)
	}
	if cause != nil && !errors.Is(err, cause) {
		t.Errorf("error = %v, want one that wraps %v", err, cause)
	}
}

// Each call to the file fails once before and once after it did its work. The
// entries are not acknowledged, nothing is until the log is opened again, and
// then all that was acknowledged is there.
func TestFileFaults(t *testing.T) {
	for _, tt := range []struct {
		name   string
		inject func(f *faultyFile)
		left   uint64 // entries in the log that were not acknowledged
	}{
		{"write fails", func(f *faultyFile) {
			f.write = func([]byte, int64) (int, error) { return 0, errInjected }
		}, 0},
		{"write fails half-way", func(f *faultyFile) {
			f.write = func(b []byte, off int64) (int, error) {
				n, _ := f.File.WriteAt(b[:len(b)/2], off)
				return n, errInjected
			}
		}, 0},
		{"write fails after it", func(f *faultyFile) {
			f.write = func(b []byte, off int64) (int, error) {
				f.File.WriteAt(b, off)
				return 0, errInjected
			}
		}, 1},
		{"sync fails", func(f *faultyFile) {
			f.sync = func() error { return errInjected }
		}, 1},
		{"sync fails after it", func(f *faultyFile) {
			f.sync = func() error { f.File.Sync(); return errInjected }
		}, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "audit")
			var file faultyFile
			l := create(t, dir, audit.Options{WrapFile: file.wrap})
			appendTo(t, l, release(0), release(1))
			root := l.Root()

			file.set(func() { tt.inject(&file) })
			wantBlocked(t, l, errInjected, release(2))
			file.set(func() { file.write, file.sync = nil, nil })
			wantBlocked(t, l, errInjected, release(3))
			if got := l.Stats(); got.Entries != 2 || !strings.Contains(got.Blocked, "injected fault") {
				t.Errorf("stats = %+v, want 2 entries and the reason", got)
			}
			if l.Root() != root {
				t.Error("the root is not that of what was acknowledged")
			}
			shut(t, l)

			l = open(t, dir, audit.Options{})
			if got, want := l.Size(), 2+tt.left; got != want {
				t.Fatalf("%d entries after Open, want %d", got, want)
			}
			if got, want := appendTo(t, l, release(4))[0].Index, 2+tt.left; got != want {
				t.Errorf("index = %d, want %d", got, want)
			}
			for i, e := range readAll(t, dir)[:2] {
				if got, want := e.RequestID, release(i).RequestID; got != want {
					t.Errorf("entry %d is %s, want %s", i, got, want)
				}
			}
			verify(t, dir)
		})
	}
}

// Open makes sure of the last batch, which a failed sync may have left in the
// page cache only.
func TestOpenWritesLastBatchAgain(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	l := create(t, dir, audit.Options{})
	appendTo(t, l, release(0))
	from := l.Stats().Bytes
	appendTo(t, l, release(1))
	to := l.Stats().Bytes
	shut(t, l)

	var file faultyFile
	var written [][2]int64
	synced := false
	file.write = func(b []byte, off int64) (int, error) {
		written = append(written, [2]int64{off, off + int64(len(b))})
		return file.File.WriteAt(b, off)
	}
	file.sync = func() error { synced = len(written) > 0; return file.File.Sync() }
	shut(t, open(t, dir, audit.Options{WrapFile: file.wrap}))
	if len(written) != 1 || written[0] != [2]int64{from, to} || !synced {
		t.Errorf("written %v and then synced %t, want [[%d %d]] and true", written, synced, from, to)
	}

	file.sync = func() error { return errInjected }
	if _, err := audit.Open(dir, audit.Options{WrapFile: file.wrap}); !errors.Is(err, errInjected) {
		t.Errorf("Open on a disk that does not sync: error = %v, want %v", err, errInjected)
	}
	file.sync = nil
	shut(t, open(t, dir, audit.Options{WrapFile: file.wrap}))
}

// When somebody takes the file away, the next batch is not acknowledged.
func TestFileTakenAway(t *testing.T) {
	for _, tt := range []struct {
		name string
		take func(path string) error
		want string
	}{
		{"removed", os.Remove, "the file is gone"},
		{"directory removed", func(path string) error { return os.RemoveAll(filepath.Dir(path)) }, "the file is gone"},
		{"renamed", func(path string) error { return os.Rename(path, path+".1") }, "the file is gone"},
		{"replaced", func(path string) error {
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			if err := os.WriteFile(path+".new", b, 0o600); err != nil {
				return err
			}
			return os.Rename(path+".new", path)
		}, "another file is in its place"},
		{"cut", func(path string) error { return os.Truncate(path, 100) }, "the file was cut to"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "audit")
			l := create(t, dir, audit.Options{})
			appendTo(t, l, release(0))
			if err := tt.take(filepath.Join(dir, "audit.log")); err != nil {
				t.Fatal(err)
			}
			wantBlocked(t, l, nil, release(1))
			if got := l.Stats().Blocked; !strings.Contains(got, tt.want) {
				t.Errorf("blocked = %q, want %q", got, tt.want)
			}
			wantBlocked(t, l, nil, release(2))
		})
	}
}

// A call does not wait longer than its context, even for a disk that hangs, and
// those that wait are bounded.
func TestHungDisk(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	var file faultyFile
	l := create(t, dir, audit.Options{WrapFile: file.wrap})
	hung, resume := make(chan struct{}), make(chan struct{})
	file.set(func() {
		file.sync = func() error {
			hung <- struct{}{}
			<-resume
			return file.File.Sync()
		}
	})
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var wg sync.WaitGroup
	abandon := func() {
		wg.Go(func() {
			if _, err := l.Append(ctx, []audit.Entry{release(0)}); !errors.Is(err, context.Canceled) {
				t.Errorf("error = %v, want %v", err, context.Canceled)
			}
		})
	}
	abandon()
	<-hung
	for range 10 {
		abandon()
	}
	time.AfterFunc(50*time.Millisecond, cancel)
	wg.Wait()

	// Beyond this many calls, the log says no.
	many, stop := context.WithCancel(context.Background())
	defer stop()
	var mu sync.Mutex
	refused := 0
	for range 17_000 {
		wg.Go(func() {
			_, err := l.Append(many, []audit.Entry{release(0)})
			if errors.Is(err, audit.ErrBlocked) {
				mu.Lock()
				refused++
				if refused == 100 {
					stop()
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if refused == 0 {
		t.Error("17,000 calls wait for a disk that hangs, want some to be refused")
	}

	file.set(func() { file.sync = nil })
	close(resume)
	// The first one was on its way and is in the log, others are not.
	deadline := time.Now().Add(10 * time.Second)
	receipts, err := l.Append(context.Background(), []audit.Entry{release(1)})
	for errors.Is(err, audit.ErrBlocked) && time.Now().Before(deadline) {
		time.Sleep(time.Millisecond)
		receipts, err = l.Append(context.Background(), []audit.Entry{release(1)})
	}
	if err != nil || receipts[0].Index != 1 {
		t.Errorf("after the disk came back: %+v, %v, want index 1", receipts, err)
	}
	shut(t, l)
	verify(t, dir)
}

func TestCreateFails(t *testing.T) {
	for _, tt := range []struct {
		name   string
		inject func(f *faultyFile)
	}{
		{"no room", func(f *faultyFile) { f.limit = 1 << 20 }},
		{"write", func(f *faultyFile) { f.write = func([]byte, int64) (int, error) { return 0, errInjected } }},
		{"sync", func(f *faultyFile) { f.sync = func() error { return errInjected } }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			var file faultyFile
			tt.inject(&file)
			if l, err := audit.Create(dir, audit.Options{WrapFile: file.wrap}); err == nil {
				l.Close()
				t.Fatal("Create made a log")
			}
			if left, _ := os.ReadDir(dir); len(left) != 0 {
				t.Errorf("Create left %v", left)
			}
			create(t, dir, audit.Options{})
		})
	}
}
