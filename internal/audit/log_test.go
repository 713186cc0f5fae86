package audit_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/keycustody/custodian/internal/audit"
	"golang.org/x/mod/sumdb/tlog"
)

var when = time.Date(2026, 3, 4, 5, 6, 7, 8, time.UTC)

// release returns the i-th of a row of typical entries.
func release(i int) audit.Entry {
	return audit.Entry{
		Time: when.Add(time.Duration(i) * time.Millisecond), Action: "release", Outcome: audit.Allowed,
		Caller: "spiffe://studio.example/drm/one", Role: "drm-provider", RequestID: fmt.Sprintf("req-%06d", i),
		Category: "movies", ContentID: []byte(fmt.Sprintf("title-%d", i)), TrackType: "HD", Scheme: "cenc",
		Generation: 1, KID: bytes.Repeat([]byte{byte(i)}, 16), KeyVersion: "movies/4", ControlRevision: 17,
		StoreSequence: uint64(i),
	}
}

func denial(i int, caller string) audit.Entry {
	e := release(i)
	e.Outcome, e.Reason, e.Caller, e.KeyVersion = audit.Denied, "DENIED", caller, ""
	return e
}

func create(t testing.TB, dir string, o audit.Options) *audit.Log {
	t.Helper()
	l, err := audit.Create(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func open(t testing.TB, dir string, o audit.Options) *audit.Log {
	t.Helper()
	l, err := audit.Open(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func shut(t testing.TB, l *audit.Log) {
	t.Helper()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
}

func appendTo(t testing.TB, l *audit.Log, entries ...audit.Entry) []audit.Receipt {
	t.Helper()
	receipts, err := l.Append(context.Background(), entries)
	if err != nil {
		t.Fatal(err)
	}
	return receipts
}

func readAll(t testing.TB, dir string) []audit.Entry {
	t.Helper()
	var got []audit.Entry
	if err := audit.Read(dir, 0, func(e *audit.Entry) error { got = append(got, *e); return nil }); err != nil {
		t.Fatal(err)
	}
	return got
}

func verify(t testing.TB, dir string) audit.Report {
	t.Helper()
	r, err := audit.Verify(context.Background(), dir, audit.VerifyOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// rootOf computes the root of the tree of leaves with the whole of tlog.
func rootOf(t testing.TB, leaves []tlog.Hash) [32]byte {
	t.Helper()
	var stored []tlog.Hash
	read := tlog.HashReaderFunc(func(indexes []int64) ([]tlog.Hash, error) {
		var hashes []tlog.Hash
		for _, i := range indexes {
			hashes = append(hashes, stored[i])
		}
		return hashes, nil
	})
	for i, leaf := range leaves {
		hashes, err := tlog.StoredHashesForRecordHash(int64(i), leaf, read)
		if err != nil {
			t.Fatal(err)
		}
		stored = append(stored, hashes...)
	}
	root, err := tlog.TreeHash(int64(len(leaves)), read)
	if err != nil {
		t.Fatal(err)
	}
	return root
}

func TestRoundTrip(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	l := create(t, dir, audit.Options{})
	var leaves []tlog.Hash
	var want []audit.Entry
	for i := 0; len(want) < 100; i++ {
		var entries []audit.Entry
		for range i%5 + 1 {
			entries = append(entries, release(len(want)+len(entries)))
		}
		for j, r := range appendTo(t, l, entries...) {
			if got, want := r.Index, uint64(len(want)+j); got != want {
				t.Fatalf("index = %d, want %d", got, want)
			}
			leaves = append(leaves, r.LeafHash)
		}
		want = append(want, entries...)
		if got, want := l.Root(), rootOf(t, leaves); got != want {
			t.Fatalf("root of %d entries = %x, want %x", len(leaves), got, want)
		}
	}
	check := func() {
		t.Helper()
		got := readAll(t, dir)
		if len(got) != len(want) {
			t.Fatalf("%d entries, want %d", len(got), len(want))
		}
		for i := range got {
			b, err := got[i].MarshalBinary()
			if err != nil {
				t.Fatal(err)
			}
			if got, want := tlog.RecordHash(b), leaves[i]; got != want {
				t.Errorf("leaf hash of entry %d = %v, want %v", i, got, want)
			}
			want := want[i]
			want.Index, want.Salt = uint64(i), got[i].Salt
			if !reflect.DeepEqual(got[i], want) {
				t.Errorf("entry = %+v, want %+v", got[i], want)
			}
		}
		r := verify(t, dir)
		if r.Entries != uint64(len(want)) || r.Root != rootOf(t, leaves) || r.Torn != 0 || !r.First.Equal(when) {
			t.Errorf("report = %+v", r)
		}
	}
	check()
	shut(t, l)
	check()

	visited := 0
	l = open(t, dir, audit.Options{Visit: func(e *audit.Entry) error { visited++; return nil }})
	if got, want := visited, len(want); got != want {
		t.Errorf("Open visited %d entries, want %d", got, want)
	}
	if got, want := l.Root(), rootOf(t, leaves); got != want {
		t.Errorf("root after Open = %x, want %x", got, want)
	}
	next := release(len(want))
	leaves = append(leaves, appendTo(t, l, next)[0].LeafHash)
	want = append(want, next)
	check()
}

// The file that this version wrote, for those to come.
func TestGoldenLog(t *testing.T) {
	golden := filepath.Join("testdata", "log_v1")
	if *update {
		if err := os.RemoveAll(golden); err != nil {
			t.Fatal(err)
		}
		l := create(t, golden, audit.Options{})
		appendTo(t, l, release(0))
		appendTo(t, l, denial(1, "x"), full(), release(3))
		end := l.Stats().Bytes
		shut(t, l)
		if err := os.Truncate(filepath.Join(golden, "audit.log"), end); err != nil {
			t.Fatal(err)
		}
	}
	dir := t.TempDir()
	store(t, dir, load(t, golden))
	got := readAll(t, dir)
	want := []audit.Entry{release(0), denial(1, "x"), full(), release(3)}
	if len(got) != len(want) {
		t.Fatalf("%d entries, want %d", len(got), len(want))
	}
	for i := range want {
		want[i].Index, want[i].Salt = uint64(i), got[i].Salt
		if !reflect.DeepEqual(got[i], want[i]) {
			t.Errorf("entry = %+v, want %+v", got[i], want[i])
		}
	}
	r := verify(t, dir)
	if r.Entries != 4 || r.Batches != 2 || !r.Last.Equal(want[3].Time) {
		t.Errorf("report = %+v", r)
	}
	l := open(t, dir, audit.Options{})
	if got, want := l.ID(), r.ID; got != want {
		t.Errorf("ID = %x, want %x", got, want)
	}
	if got, want := appendTo(t, l, release(4))[0].Index, uint64(4); got != want {
		t.Errorf("index = %d, want %d", got, want)
	}
}

func TestEmptyLog(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	l := create(t, dir, audit.Options{})
	want, err := tlog.TreeHash(0, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got := l.Root(); got != want {
		t.Errorf("root = %x, want %x", got, want)
	}
	if receipts, err := l.Append(context.Background(), nil); receipts != nil || err != nil {
		t.Errorf("Append of nothing = %v, %v", receipts, err)
	}
	shut(t, l)
	if r := verify(t, dir); r.Entries != 0 || r.Root != want || r.Bytes != 64 {
		t.Errorf("report = %+v", r)
	}
	if got := readAll(t, dir); len(got) != 0 {
		t.Errorf("entries = %v", got)
	}
}

func TestCreateAndOpen(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "audit")
	if _, err := audit.Open(dir, audit.Options{}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Open of nothing: error = %v, want os.ErrNotExist", err)
	}
	l := create(t, dir, audit.Options{})
	path := filepath.Join(dir, "audit.log")
	for name, want := range map[string]os.FileMode{dir: 0o700 | os.ModeDir, path: 0o600} {
		info, err := os.Stat(name)
		if err != nil {
			t.Fatal(err)
		}
		if got := info.Mode(); got != want {
			t.Errorf("mode of %s = %v, want %v", name, got, want)
		}
	}
	if _, err := audit.Open(dir, audit.Options{}); !errors.Is(err, audit.ErrInUse) {
		t.Errorf("second Open: error = %v, want ErrInUse", err)
	}
	if _, err := audit.Create(dir, audit.Options{}); !errors.Is(err, audit.ErrInUse) {
		t.Errorf("Create beside a writer: error = %v, want ErrInUse", err)
	}
	appendTo(t, l, release(0))
	shut(t, l)
	shut(t, l) // once is enough, twice is no harm
	if _, err := l.Append(context.Background(), []audit.Entry{release(1)}); !errors.Is(err, audit.ErrBlocked) {
		t.Errorf("Append after Close: error = %v, want ErrBlocked", err)
	}
	if _, err := audit.Create(dir, audit.Options{}); !errors.Is(err, os.ErrExist) {
		t.Errorf("second Create: error = %v, want os.ErrExist", err)
	}
	if r := verify(t, dir); r.Entries != 1 {
		t.Errorf("%d entries after the second Create, want 1", r.Entries)
	}

	for _, name := range []string{dir, path} {
		if err := os.Chmod(name, 0o770); err != nil {
			t.Fatal(err)
		}
		if _, err := audit.Open(dir, audit.Options{}); err == nil || !strings.Contains(err.Error(), "must not be able to write") {
			t.Errorf("Open where others can write to %s: error = %v", name, err)
		}
		if err := os.Chmod(name, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(path+".1", path); err != nil {
		t.Fatal(err)
	}
	if _, err := audit.Open(dir, audit.Options{}); err == nil {
		t.Error("Open followed a symbolic link")
	}
}

func TestVisit(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	l := create(t, dir, audit.Options{})
	appendTo(t, l, release(0), release(1))
	shut(t, l)
	stop := errors.New("stop")
	if _, err := audit.Open(dir, audit.Options{Visit: func(e *audit.Entry) error {
		if e.Index == 1 {
			return stop
		}
		return nil
	}}); err != stop {
		t.Errorf("Open: error = %v, want that of Visit", err)
	}
	if err := audit.Read(dir, 1, func(e *audit.Entry) error { return stop }); err != stop {
		t.Errorf("Read: error = %v, want that of the function", err)
	}
	shut(t, open(t, dir, audit.Options{})) // the lock was given back
}

func TestInvalidEntries(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	l := create(t, dir, audit.Options{})
	bad := release(1)
	bad.KID = bad.KID[:15]
	_, err := l.Append(context.Background(), []audit.Entry{release(0), bad})
	if !errors.Is(err, audit.ErrInvalidEntry) || !strings.Contains(err.Error(), "entry 2 of 2: KID") {
		t.Errorf("error = %v, want ErrInvalidEntry for entry 2", err)
	}
	big := release(0)
	big.Detail = strings.Repeat("x", 4096)
	if _, err := l.Append(context.Background(), slices.Repeat([]audit.Entry{big}, 2100)); !errors.Is(err, audit.ErrInvalidEntry) {
		t.Errorf("9 MB at once: error = %v, want ErrInvalidEntry", err)
	}
	if got := l.Size(); got != 0 {
		t.Errorf("%d entries, want none", got)
	}
	appendTo(t, l, slices.Repeat([]audit.Entry{big}, 1900)...)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := l.Append(ctx, []audit.Entry{release(0)}); !errors.Is(err, context.Canceled) {
		t.Errorf("error = %v, want %v", err, context.Canceled)
	}
	shut(t, l)
	if r := verify(t, dir); r.Entries != 1900 {
		t.Errorf("%d entries, want 1900", r.Entries)
	}
}

// An entry without a time gets the log's.
func TestTime(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	l := create(t, dir, audit.Options{Now: func() time.Time { return when }})
	e := release(5)
	e.Time = time.Time{}
	appendTo(t, l, e, release(6))
	got := readAll(t, dir)
	if got, want := got[0].Time, when; got != want {
		t.Errorf("time = %v, want %v", got, want)
	}
	if got, want := got[1].Time, release(6).Time; got != want {
		t.Errorf("time = %v, want %v", got, want)
	}
	if got[0].Salt == got[1].Salt || got[0].Salt == [16]byte{} {
		t.Errorf("salts are %x and %x", got[0].Salt, got[1].Salt)
	}
}

// While one batch is synced, others gather. Everybody gets the receipt of the
// own entry.
func TestGroupCommit(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	var file faultyFile
	file.sync = func() error { time.Sleep(time.Millisecond); return file.File.Sync() }
	l := create(t, dir, audit.Options{WrapFile: file.wrap})
	const callers, calls = 64, 20
	var mu sync.Mutex
	indexes := make(map[string]uint64) // of each request
	leaves := make(map[uint64]tlog.Hash)
	var wg sync.WaitGroup
	for caller := range callers {
		wg.Go(func() {
			for call := range calls {
				entries := []audit.Entry{release(caller*1000 + call*2), release(caller*1000 + call*2 + 1)}
				receipts, err := l.Append(context.Background(), entries)
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				for i, r := range receipts {
					indexes[entries[i].RequestID], leaves[r.Index] = r.Index, r.LeafHash
				}
				mu.Unlock()
				if receipts[1].Index != receipts[0].Index+1 {
					t.Errorf("the entries of one call have the indexes %d and %d", receipts[0].Index, receipts[1].Index)
				}
			}
		})
	}
	wg.Wait()
	const total = callers * calls * 2
	if got := l.Stats(); got.Entries != total || got.Batches > total/8 {
		t.Errorf("%d entries in %d batches, want %d in fewer than an eighth", got.Entries, got.Batches, total)
	}
	entries := readAll(t, dir)
	if len(entries) != total {
		t.Fatalf("%d entries, want %d", len(entries), total)
	}
	for i := range entries {
		b, err := entries[i].MarshalBinary()
		if err != nil {
			t.Fatal(err)
		}
		index, ok := indexes[entries[i].RequestID]
		if !ok || index != uint64(i) || leaves[index] != tlog.RecordHash(b) {
			t.Errorf("entry %d is of request %s, whose receipt says %d", i, entries[i].RequestID, index)
		}
	}
	if got, want := verify(t, dir).Root, l.Root(); got != want {
		t.Errorf("root = %x, want %x", got, want)
	}
}

// Readers beside the writer see a log that grows, and all that was
// acknowledged before they began.
func TestReadBesideWriter(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	l := create(t, dir, audit.Options{SegmentSize: 32 << 10, Reserve: 64 << 10})
	appendTo(t, l, release(0))
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				_, err := l.Append(ctx, slices.Repeat([]audit.Entry{release(i)}, i%40+1))
				if err != nil && ctx.Err() == nil {
					t.Error(err)
				}
			}
		})
	}
	reads := 0
	for from := uint64(0); ctx.Err() == nil; reads++ {
		acknowledged := l.Size()
		next := from
		if err := audit.Read(dir, from, func(e *audit.Entry) error {
			if e.Index != next {
				return fmt.Errorf("entry %d follows entry %d", e.Index, next)
			}
			next++
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		if next < acknowledged {
			t.Fatalf("Read ends at entry %d, %d were acknowledged", next, acknowledged)
		}
		from = next
		if reads%8 == 0 {
			acknowledged := l.Size()
			if got := verify(t, dir).Entries; got < acknowledged {
				t.Fatalf("Verify finds %d entries, %d were acknowledged", got, acknowledged)
			}
		}
	}
	wg.Wait()
	if reads < 3 {
		t.Errorf("%d reads, want some", reads)
	}
}

func TestVerifyProgress(t *testing.T) {
	s := makeSample(t)
	dir := t.TempDir()
	store(t, dir, s.file)
	var got []int64
	_, err := audit.Verify(context.Background(), dir, audit.VerifyOptions{Progress: func(done, total int64) {
		if total != int64(len(s.file)) {
			t.Errorf("total = %d, want %d", total, len(s.file))
		}
		got = append(got, done)
	}})
	if err != nil {
		t.Fatal(err)
	}
	if want := s.ends[1:]; !slices.Equal(got, want) {
		t.Errorf("progress = %v, want %v", got, want)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := audit.Verify(ctx, dir, audit.VerifyOptions{}); !errors.Is(err, context.Canceled) {
		t.Errorf("error = %v, want %v", err, context.Canceled)
	}
}

// A process that is killed at any moment, most of which it spends with beginning
// another segment, has lost nothing that was acknowledged.
func TestKilled(t *testing.T) {
	if dir := os.Getenv("AUDIT_TEST_KILLED"); dir != "" {
		writeUntilKilled(t, dir)
		return
	}
	dir := filepath.Join(t.TempDir(), "audit")
	l := create(t, dir, audit.Options{})
	shut(t, l)
	size := uint64(0)
	defer func() {
		if files := segmentFiles(t, dir); len(files) < 5 {
			t.Errorf("segments %v, want one at least of each round", files)
		}
	}()
	for round := range 5 {
		cmd := exec.Command(os.Args[0], "-test.run=^TestKilled$")
		cmd.Env = append(os.Environ(), "AUDIT_TEST_KILLED="+dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		acknowledged := uint64(0)
		for lines.Scan() {
			n, err := strconv.ParseUint(lines.Text(), 10, 64)
			if err != nil {
				break // a line that was cut off
			}
			if acknowledged == 0 {
				time.AfterFunc(time.Duration(round)*7*time.Millisecond, func() { cmd.Process.Kill() })
			}
			acknowledged = max(acknowledged, n+1)
		}
		if err := cmd.Wait(); err == nil || acknowledged <= size {
			t.Fatalf("the writer ended with %v after %d entries", err, acknowledged)
		}
		l := open(t, dir, audit.Options{})
		if l.Size() < acknowledged {
			t.Errorf("%d entries after the kill, %d were acknowledged", l.Size(), acknowledged)
		}
		size = l.Size()
		shut(t, l)
		if got := verify(t, dir).Entries; got != size {
			t.Errorf("Verify finds %d entries, want %d", got, size)
		}
	}
}

func writeUntilKilled(t *testing.T, dir string) {
	l := open(t, dir, audit.Options{SegmentSize: 4 << 10, Reserve: 64 << 10})
	var mu sync.Mutex
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for i := 0; ; i++ {
				for _, r := range appendTo(t, l, slices.Repeat([]audit.Entry{release(i)}, i%30+1)...) {
					mu.Lock()
					fmt.Println(r.Index)
					mu.Unlock()
				}
			}
		})
	}
	wg.Wait()
}
