//go:build linux

package store_test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/store"
)

// A child of the tests is this test binary, told by these variables what to
// do with which store.
const (
	childDoes = "STORE_TEST_CHILD"
	childPath = "STORE_TEST_PATH"
)

// child makes a command that runs one of the functions of TestChild.
func child(t *testing.T, does, path string, wrapper ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	args := append(wrapper, self, "-test.run=^TestChild$", "-test.v")
	cmd := exec.CommandContext(t.Context(), args[0], args[1:]...)
	cmd.Env = append(os.Environ(), childDoes+"="+does, childPath+"="+path)
	cmd.Stderr = os.Stderr
	return cmd
}

// TestChild is run by other tests in a process of its own.
func TestChild(t *testing.T) {
	path := os.Getenv(childPath)
	switch does := os.Getenv(childDoes); does {
	case "":
		t.Skip("only run by other tests, in a process of its own")
	case "crash":
		childInserts(t, path)
	case "sync":
		childSyncFails(t, path)
	case "limit-write":
		childMeetsLimit(t, path, 1<<20, 50, 6_000)
	case "limit-grow":
		childMeetsLimit(t, path, 0, 5_000, 25_000)
	default:
		t.Fatalf("unknown %q", does)
	}
}

// runChild runs a child that is to pass.
func runChild(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		t.Fatalf("child: %v\n%s", err, out.Bytes())
	}
	if !strings.Contains(out.String(), "--- PASS: TestChild") {
		t.Fatalf("child did not run:\n%s", out.Bytes())
	}
}

func insertKey(t testing.TB, s custodian.Store, n uint32) error {
	t.Helper()
	return s.Update(t.Context(), func(tx custodian.UpdateTx) error { return tx.InsertContentKey(benchKey(n)) })
}

func readKey(t testing.TB, s custodian.Store, n uint32) error {
	t.Helper()
	return s.View(t.Context(), func(tx custodian.Tx) error {
		_, err := tx.ContentKey(benchKid(n))
		return err
	})
}

// descriptor finds the store's own file descriptor.
func descriptor(t *testing.T, path string) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Skipf("descriptors cannot be listed: %v", err)
	}
	want, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		got, err := os.Stat("/proc/self/fd/" + e.Name())
		if err != nil || !os.SameFile(got, want) {
			continue
		}
		fd, err := strconv.Atoi(e.Name())
		if err != nil {
			t.Fatal(err)
		}
		return fd
	}
	t.Fatalf("no descriptor of %s", path)
	return -1
}

// breakDevice puts a device in the place of the store's file. The returned
// function puts the file back.
func breakDevice(t *testing.T, path, device string) (repair func()) {
	t.Helper()
	fd := descriptor(t, path)
	kept, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	other, err := os.OpenFile(device, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Dup3(int(other.Fd()), fd, unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := errors.Join(unix.Dup3(kept, fd, unix.O_CLOEXEC), unix.Close(kept), other.Close()); err != nil {
			t.Fatal(err)
		}
	}
}

// TestSyncFails lets the sync of the data pages fail: /dev/null takes what is
// written and cannot be synced. The store stops, also when the device is well
// again, and its readers go on.
func TestSyncFails(t *testing.T) {
	path := filepath.Join(t.TempDir(), "keys.db")
	s := create(t, path)
	seed(t, s, 0, 200, 20)
	repair := breakDevice(t, path, "/dev/null")
	// The first update may also meet the file's size, which is wrong as well.
	for range 3 {
		if err := insertKey(t, s, 1000); !errors.Is(err, custodian.ErrStoreUnavailable) {
			t.Errorf("update with a broken device: got %v, want %v", err, custodian.ErrStoreUnavailable)
		}
	}
	repair()
	err := insertKey(t, s, 1000)
	if !errors.Is(err, store.ErrStopped) || !errors.Is(err, custodian.ErrStoreUnavailable) {
		t.Errorf("update after a failed sync: got %v, want %v", err, store.ErrStopped)
	}
	if err := readKey(t, s, 7); err != nil {
		t.Errorf("read after a failed sync: %v", err)
	}
	if err := readKey(t, s, 1000); !errors.Is(err, custodian.ErrNotFound) {
		t.Errorf("read of what was not stored: got %v, want %v", err, custodian.ErrNotFound)
	}
	if err := s.Close(); err != nil {
		t.Fatalf("close: %v", err)
	}
	s = open(t, path)
	if err := s.Check(t.Context()); err != nil {
		t.Errorf("check: %v", err)
	}
	if err := insertKey(t, s, 1000); err != nil {
		t.Errorf("update after a reopen: %v", err)
	}
}

// TestWriteFails is the same with a write that fails otherwise than for want
// of space.
func TestWriteFails(t *testing.T) {
	path := filepath.Join(t.TempDir(), "keys.db")
	s := create(t, path)
	seed(t, s, 0, 200, 20)
	fd := descriptor(t, path)
	kept, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	readOnly, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Dup3(int(readOnly.Fd()), fd, unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	err = insertKey(t, s, 1000)
	if !errors.Is(err, custodian.ErrStoreUnavailable) || !errors.Is(err, syscall.EBADF) {
		t.Errorf("update: got %v, want %v of %v", err, custodian.ErrStoreUnavailable, syscall.EBADF)
	}
	if err := errors.Join(unix.Dup3(kept, fd, unix.O_CLOEXEC), unix.Close(kept), readOnly.Close()); err != nil {
		t.Fatal(err)
	}
	if err := insertKey(t, s, 1000); !errors.Is(err, store.ErrStopped) {
		t.Errorf("update after a failed write: got %v, want %v", err, store.ErrStopped)
	}
}

// TestMetaSyncFails lets the second sync of a commit fail, that of the meta
// page: what the update wrote is then visible and not durable, so nobody may
// read either. strace makes the system call fail.
func TestMetaSyncFails(t *testing.T) {
	strace, err := exec.LookPath("strace")
	if err != nil {
		t.Skip("strace is not installed: no way to make the second fdatasync of a commit fail")
	}
	if out, err := exec.Command(strace, "-f", "-o", os.DevNull, "true").CombinedOutput(); err != nil {
		t.Skipf("strace may not trace here: %v: %s", err, out)
	}
	path := filepath.Join(t.TempDir(), "keys.db")
	s := create(t, path)
	seed(t, s, 0, 100, 100)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	// The child's first update needs the syncs 1 and 2, its second 3 and 4.
	// strace counts per thread, so the child locks its goroutine to one.
	runChild(t, child(t, "sync", path, strace, "-f", "-o", os.DevNull,
		"-e", "trace=fdatasync", "-e", "inject=fdatasync:error=EIO:when=4"))
	s = open(t, path)
	if err := s.Check(t.Context()); err != nil {
		t.Errorf("check: %v", err)
	}
	if err := insertKey(t, s, 3000); err != nil {
		t.Errorf("update after a reopen: %v", err)
	}
}

func childSyncFails(t *testing.T, path string) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	s := open(t, path)
	if err := insertKey(t, s, 1000); err != nil {
		t.Fatalf("first update: %v", err)
	}
	err := insertKey(t, s, 2000)
	if !errors.Is(err, custodian.ErrStoreUnavailable) || !errors.Is(err, syscall.EIO) {
		t.Fatalf("second update: got %v, want %v of %v", err, custodian.ErrStoreUnavailable, syscall.EIO)
	}
	for what, err := range map[string]error{
		"update":           insertKey(t, s, 3000),
		"read":             readKey(t, s, 2000),
		"read of old keys": readKey(t, s, 7),
		"check":            s.Check(t.Context()),
	} {
		if !errors.Is(err, store.ErrStopped) || errors.Is(err, custodian.ErrNotFound) {
			t.Errorf("%s: got %v, want %v", what, err, store.ErrStopped)
		}
	}
	if err := s.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
}

// fill inserts keys until the store takes no more, and returns how many it
// took and the error.
func fill(t *testing.T, s *store.Store, batch uint32) (uint32, error) {
	t.Helper()
	for n := uint32(0); n < 200_000; n += batch {
		if err := insertMany(t, s, n, batch); err != nil {
			return n, err
		}
	}
	t.Fatal("the disk did not fill")
	return 0, nil
}

func insertMany(t *testing.T, s *store.Store, first, n uint32) error {
	t.Helper()
	return s.Update(t.Context(), func(tx custodian.UpdateTx) error {
		for i := range n {
			if err := tx.InsertContentKey(benchKey(first + i)); err != nil {
				return err
			}
		}
		return nil
	})
}

// A full store is one that has met the end of its disk.
type full struct {
	*store.Store
	stored uint32 // keys that fitted
	many   uint32 // keys that surely do not
}

// want demands that the update failed and all before it are there, that
// readers go on, and that the store tries again.
func (f full) want(t *testing.T, err error) {
	t.Helper()
	if !errors.Is(err, custodian.ErrStoreUnavailable) || errors.Is(err, store.ErrStopped) {
		t.Fatalf("update on a full disk: got %v after %d keys, want %v", err, f.stored, custodian.ErrStoreUnavailable)
	}
	for range 3 {
		err := insertMany(t, f.Store, 1_000_000, f.many)
		if !errors.Is(err, custodian.ErrStoreUnavailable) || errors.Is(err, store.ErrStopped) {
			t.Errorf("another update on a full disk: got %v, want %v", err, custodian.ErrStoreUnavailable)
		}
	}
	for n := range f.stored {
		if err := readKey(t, f, n); err != nil {
			t.Fatalf("read of key %d of %d: %v", n, f.stored, err)
		}
	}
	if err := readKey(t, f, f.stored); !errors.Is(err, custodian.ErrNotFound) {
		t.Errorf("read of what did not fit: got %v, want %v", err, custodian.ErrNotFound)
	}
	if err := f.Check(t.Context()); err != nil {
		t.Errorf("check on a full disk: %v", err)
	}
}

// wantRoom demands that the store works when its disk has space again.
func (f full) wantRoom(t *testing.T) {
	t.Helper()
	if err := insertMany(t, f.Store, 1_000_000, f.many); err != nil {
		t.Errorf("update when there is space again: %v", err)
	}
	if err := f.Check(t.Context()); err != nil {
		t.Errorf("check when there is space again: %v", err)
	}
	want := uint64(f.stored + f.many)
	if stats, err := f.Stats(t.Context()); err != nil || stats.ContentKeys != want {
		t.Errorf("stats: got %+v, %v, want %d content keys", stats, err, want)
	}
}

// TestDiskFull fills a small tmpfs: a write of a page returns ENOSPC, because
// growing the file reserves nothing.
func TestDiskFull(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=2m,mode=0700"); err != nil {
		t.Skipf("tmpfs cannot be mounted (%v); TestFileLimit fills a file instead", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	path := filepath.Join(dir, "keys.db")
	s := create(t, path)
	stored, err := fill(t, s, 50)
	if !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("update on a full disk: got %v, want %v", err, syscall.ENOSPC)
	}
	f := full{s, stored, 6_000}
	f.want(t, err)
	if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_REMOUNT, "size=64m"); err != nil {
		t.Fatal(err)
	}
	f.wantRoom(t)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, path)
	if err := s.Check(t.Context()); err != nil {
		t.Errorf("check after a reopen: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

// TestFileLimit lets the file meet RLIMIT_FSIZE in a process of its own, in
// two ways: pages cannot be written, and the file cannot be made longer.
func TestFileLimit(t *testing.T) {
	for _, does := range []string{"limit-write", "limit-grow"} {
		t.Run(does, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "keys.db")
			runChild(t, child(t, does, path))
			if err := open(t, path).Check(t.Context()); err != nil {
				t.Errorf("check: %v", err)
			}
		})
	}
}

// childMeetsLimit limits the file to size bytes, zero for the size that it
// has, which is more than it uses.
func childMeetsLimit(t *testing.T, path string, size uint64, batch, many uint32) {
	signal.Ignore(syscall.SIGXFSZ)
	s := create(t, path)
	if size == 0 {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		size = uint64(info.Size())
	}
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_FSIZE, &old); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: size, Max: old.Max}); err != nil {
		t.Fatal(err)
	}
	stored, err := fill(t, s, batch)
	f := full{s, stored, many}
	f.want(t, err)
	if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &old); err != nil {
		t.Fatal(err)
	}
	f.wantRoom(t)
}

// TestKilled kills a process that inserts, at random moments. Whatever it
// said was stored is stored, and the store holds together.
func TestKilled(t *testing.T) {
	runs := 10
	if testing.Short() {
		runs = 2
	}
	path := filepath.Join(t.TempDir(), "keys.db")
	s := create(t, path)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	said := map[uint32]bool{}
	for run := range runs {
		for _, n := range killedChild(t, path, 5+run*37%200) {
			if said[n] {
				t.Errorf("run %d: key %d inserted twice", run, n)
			}
			said[n] = true
		}
		s := open(t, path)
		if err := s.Check(t.Context()); err != nil {
			t.Errorf("run %d: check: %v", run, err)
		}
		for n := range said {
			if err := readKey(t, s, n); err != nil {
				t.Errorf("run %d: key %d was said to be stored: %v", run, n, err)
			}
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if len(said) < runs*5 {
		t.Errorf("%d keys in %d runs: the child was killed before it did anything", len(said), runs)
	}
}

// killedChild runs a child until it has said that many keys are stored, kills
// it, and returns all of which it said so.
func killedChild(t *testing.T, path string, after int) []uint32 {
	t.Helper()
	cmd := child(t, "crash", path)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var said []uint32
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		number, ok := strings.CutPrefix(lines.Text(), "stored ")
		if !ok {
			continue
		}
		n, err := strconv.ParseUint(number, 10, 32)
		if err != nil {
			break // the kill cut the line
		}
		said = append(said, uint32(n))
		if len(said) == after {
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := cmd.Wait(); err == nil {
		t.Fatal("the child ended by itself")
	}
	if len(said) < after {
		t.Fatalf("the child died after %d keys of %d", len(said), after)
	}
	return said
}

// childInserts inserts from several goroutines, in small and large updates,
// and says what is stored.
func childInserts(t *testing.T, path string) {
	s := open(t, path)
	stats, err := s.Stats(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	const callers = 4
	for c := range uint32(callers) {
		go func() {
			defer func() { done <- struct{}{} }()
			// Numbers that no earlier run has used: each run stores some.
			for n := uint32(stats.Sequence)*1000 + c*100_000_000; ; n += 10 {
				size := 1 + n/10%10
				err := s.Update(t.Context(), func(tx custodian.UpdateTx) error {
					for i := range size {
						if err := tx.InsertContentKey(benchKey(n + i)); err != nil {
							return err
						}
					}
					return nil
				})
				if err != nil {
					t.Errorf("update: %v", err)
					return
				}
				var b bytes.Buffer
				for i := range size {
					fmt.Fprintf(&b, "stored %d\n", n+i)
				}
				// One write to the pipe, which a kill does not cut.
				if _, err := os.Stdout.Write(b.Bytes()); err != nil {
					return
				}
			}
		}()
	}
	for range callers {
		<-done
	}
}
