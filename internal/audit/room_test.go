package audit_test

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/keycustody/custodian/internal/audit"
	"golang.org/x/sys/unix"
)

// failure is a fault of the daemon's own: it may not use the reserve, and
// without a caller it is never only counted.
func failure(i int) audit.Entry {
	e := release(i)
	e.Caller = ""
	e.Outcome, e.Reason = audit.Failed, "HSM_UNAVAILABLE"
	return e
}

const reserve = 256 << 10

// checkFull fills the disk under l until nothing can be written. What has no
// priority is refused first, with the whole reserve left; then everything. free
// makes room again, and the log goes on by itself.
func checkFull(t *testing.T, dir string, l *audit.Log, free func()) {
	t.Helper()
	fill := func(e audit.Entry, together int) (n int) {
		t.Helper()
		for batch := slices.Repeat([]audit.Entry{e}, together); ; n += together {
			if _, err := l.Append(context.Background(), batch); err != nil {
				if !errors.Is(err, audit.ErrBlocked) {
					t.Fatalf("error = %v, want ErrBlocked", err)
				}
				return n
			}
			if n > 1_000_000 {
				t.Fatal("the disk does not get full")
			}
		}
	}
	big := failure(0)
	big.Detail = longText
	lines := fill(big, 16)
	s := l.Stats()
	if !s.OnReserve || s.Blocked != "" || s.Free < reserve {
		t.Errorf("after %d entries without priority: stats = %+v, want the reserve left", lines, s)
	}
	released := release(0)
	released.Detail = longText
	if got, want := fill(released, 1), reserve/8192; got < want {
		t.Errorf("%d releases were written on the reserve, want at least %d", got, want)
	}
	s = l.Stats()
	if !s.OnReserve || s.Blocked == "" || s.Free >= 8192 {
		t.Errorf("after the reserve: stats = %+v, want it to be blocked", s)
	}
	if r := verify(t, dir); r.Entries != l.Size() {
		t.Errorf("%d entries on disk, %d acknowledged", r.Entries, l.Size())
	}

	free()
	for _, e := range []audit.Entry{failure(1), release(1)} {
		appendTo(t, l, e)
	}
	if s := l.Stats(); s.OnReserve || s.Blocked != "" || s.Free < reserve {
		t.Errorf("with room again: stats = %+v", s)
	}
	if r := verify(t, dir); r.Entries != l.Size() {
		t.Errorf("%d entries on disk, %d acknowledged", r.Entries, l.Size())
	}
}

var longText = func() string {
	b := make([]byte, 4000)
	for i := range b {
		b[i] = 'x'
	}
	return string(b)
}()

func TestFullInjected(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	file := faultyFile{limit: 6 << 20}
	l := create(t, dir, audit.Options{Reserve: reserve, WrapFile: file.wrap})
	checkFull(t, dir, l, func() { file.set(func() { file.limit = 0 }) })
}

func TestFullTmpfs(t *testing.T) {
	mount := t.TempDir()
	if err := unix.Mount("none", mount, "tmpfs", 0, "size=6m"); err != nil {
		t.Skip("mounting tmpfs does not work here: ", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(mount, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	dir := filepath.Join(mount, "audit")
	l := create(t, dir, audit.Options{Reserve: reserve})
	checkFull(t, dir, l, func() {
		if err := unix.Mount("none", mount, "tmpfs", unix.MS_REMOUNT, "size=20m"); err != nil {
			t.Fatal(err)
		}
	})
	shut(t, l)
}

func TestFullFileSize(t *testing.T) {
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_FSIZE, &old); err != nil {
		t.Fatal(err)
	}
	signal.Ignore(unix.SIGXFSZ)
	defer signal.Reset(unix.SIGXFSZ)
	restore := func() {
		if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &old); err != nil {
			t.Fatal(err)
		}
	}
	dir := filepath.Join(t.TempDir(), "audit")
	l := create(t, dir, audit.Options{Reserve: reserve})
	if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: 6 << 20, Max: old.Max}); err != nil {
		t.Fatal(err)
	}
	defer restore()
	checkFull(t, dir, l, restore)
}

// A log on a full disk opens, keeps the reserve that it had, and looks for room
// by itself.
func TestOpenFull(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	var file faultyFile
	l := create(t, dir, audit.Options{Reserve: reserve, WrapFile: file.wrap})
	file.set(func() { file.limit = 5 << 20 })
	long := failure(0)
	long.Detail = longText
	for _, batch := range [][]audit.Entry{slices.Repeat([]audit.Entry{long}, 16), {long}} {
		for err := error(nil); err == nil; {
			_, err = l.Append(context.Background(), batch)
		}
	}
	had := l.Stats()
	shut(t, l)
	// A batch that was torn when the disk was full does not cost the reserve.
	f, err := os.OpenFile(filepath.Join(dir, "audit.log"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("batch/1\n torn"), had.Bytes); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}

	l = open(t, dir, audit.Options{Reserve: reserve, WrapFile: file.wrap})
	if got := l.Stats(); got.Free != had.Free || got.Cut != 13 {
		t.Errorf("stats = %+v, want those before Close, %+v, and 13 bytes cut", got, had)
	}
	wantBlocked(t, l, unix.ENOSPC, long)
	long.Outcome = audit.Allowed
	appendTo(t, l, long)
	if got := l.Stats(); !got.OnReserve || got.Free >= reserve {
		t.Errorf("stats = %+v, want the reserve to be in use", got)
	}

	file.set(func() { file.limit = 0 })
	deadline := time.Now().Add(5 * time.Second)
	for l.Stats().OnReserve {
		if time.Now().After(deadline) {
			t.Fatal("the log does not find the room that is there again")
		}
		time.Sleep(10 * time.Millisecond)
	}
	appendTo(t, l, failure(0))
	shut(t, l)
	verify(t, dir)
}
