package audit_test

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/keycustody/custodian/internal/audit"
)

// many writes n entries in batches of 50: of 7 callers, 40 content items in 3
// categories, a KID of its own for each 10 entries, and now and then a session.
func many(t testing.TB, l *audit.Log, from, n int) {
	t.Helper()
	batch := make([]audit.Entry, 0, 50)
	for i := from; i < from+n; i++ {
		e := release(i)
		e.Time = when.Add(time.Duration(i) * time.Second)
		e.Caller = fmt.Sprintf("spiffe://test/caller-%d", i%7)
		e.Category = fmt.Sprintf("category-%d", i%3)
		e.ContentID = fmt.Appendf(nil, "film-%d", i%40)
		e.KID = fmt.Appendf(nil, "%016d", i/10)
		e.KeyVersion = fmt.Sprintf("category-%d/%d", i%3, 1+i/30_000)
		e.RequestID = fmt.Sprintf("request-%d", i)
		if i%1000 == 5 {
			e.Refs = []audit.Ref{{Kind: "session", KeyVersion: 1, MAC: [16]byte{byte(i / 1000)}}}
		}
		if i%500 == 7 {
			e.Outcome, e.Reason, e.Priority = audit.Denied, "DENIED", true
		}
		if batch = append(batch, e); len(batch) == cap(batch) || i == from+n-1 {
			appendTo(t, l, batch...)
			batch = batch[:0]
		}
	}
}

// scan is the answer of a full scan; find that of the index.
func scan(t testing.TB, dir string, from uint64, f audit.Filter) (found []uint64) {
	t.Helper()
	if err := audit.Read(dir, from, func(e *audit.Entry) error {
		if f.Match(e) {
			found = append(found, e.Index)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return found
}

func find(t testing.TB, x *audit.Index, from uint64, f audit.Filter) (found []uint64) {
	t.Helper()
	if err := x.Find(context.Background(), from, &f, func(e *audit.Entry) error {
		found = append(found, e.Index)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return found
}

// questions to a log of many, with the least that they must find in 5,000.
func questions(n int) []struct {
	what  string
	f     audit.Filter
	least int
} {
	return []struct {
		what  string
		f     audit.Filter
		least int
	}{
		{"who was given this key", audit.Filter{KID: fmt.Appendf(nil, "%016d", n/20), Outcome: audit.Allowed}, 9},
		{"no such key", audit.Filter{KID: make([]byte, 16)}, 0},
		{"which keys did this caller get", audit.Filter{Caller: "spiffe://test/caller-3", Action: "release", Outcome: audit.Allowed}, n / 8},
		{"all under a KEK version", audit.Filter{KeyVersion: "category-1/1"}, min(n, 30_000) / 3},
		{"one content item", audit.Filter{ContentID: []byte("film-7")}, n / 40},
		{"a caller and a content item", audit.Filter{ContentID: []byte("film-7"), Caller: "spiffe://test/caller-0"}, n / 300},
		{"denials of a category", audit.Filter{Outcome: audit.Denied, Category: "category-1"}, n / 1600},
		{"one call", audit.Filter{RequestID: fmt.Sprintf("request-%d", n/3)}, 1},
		{"a session", audit.Filter{Refs: []audit.Ref{{Kind: "session", KeyVersion: 2, MAC: [16]byte{2}}, {Kind: "session", KeyVersion: 1, MAC: [16]byte{2}}}}, 1},
		{"a minute", audit.Filter{Since: when.Add(time.Duration(n/2) * time.Second), Before: when.Add(time.Duration(n/2+60) * time.Second)}, 60},
		{"everything", audit.Filter{}, n},
	}
}

// The index finds what a full scan finds, from any entry on, while the log
// grows over several segments, after it was damaged, and where it cannot be
// written.
func TestIndex(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	l := create(t, dir, audit.Options{SegmentSize: 256 << 10})
	x := audit.NewIndex(l)
	defer x.Close()
	compare := func(what string, n int) {
		t.Helper()
		for _, q := range questions(5000) {
			for _, from := range []uint64{0, 1, uint64(n / 3), uint64(n - 1), uint64(n)} {
				got, want := find(t, x, from, q.f), scan(t, dir, from, q.f)
				if fmt.Sprint(got) != fmt.Sprint(want) {
					t.Errorf("%s, %s, from %d: got %d entries, want %d", what, q.what, from, len(got), len(want))
				}
				if from == 0 && n >= 5000 && len(want) < q.least {
					t.Errorf("%s, %s: the scan finds %d entries, want %d at least", what, q.what, len(want), q.least)
				}
			}
		}
	}
	compare("empty", 1)
	many(t, l, 0, 100)
	compare("less than a block", 100)
	many(t, l, 100, 2900)
	compare("blocks", 3000)
	many(t, l, 3000, 2000)
	compare("more blocks", 5000)
	if l.Stats().Segments < 4 {
		t.Fatalf("%d segments, want several", l.Stats().Segments)
	}
	left, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range left {
		if strings.HasPrefix(f.Name(), "index") {
			t.Errorf("the index has the name %s, so that somebody could replace it", f.Name())
		}
	}

	file := openDeleted(t, "index.tmp")
	info, err := file.Stat()
	if err != nil || info.Size() < 5000/300*1024 || info.Size() > 5000/200*1024 {
		t.Errorf("the index has %d bytes, %v", info.Size(), err)
	}
	for _, at := range []int64{0, 2*1024 + 8, 3*1024 + 500, info.Size() - 1} {
		file := openDeleted(t, "index.tmp")
		b := []byte{0}
		if _, err := file.ReadAt(b, at); err != nil {
			t.Fatal(err)
		}
		b[0] ^= 0x10
		if _, err := file.WriteAt(b, at); err != nil {
			t.Fatal(err)
		}
		compare(fmt.Sprintf("byte %d of the index changed", at), 5000)
	}
	if err := openDeleted(t, "index.tmp").Truncate(1500); err != nil {
		t.Fatal(err)
	}
	compare("the index was cut", 5000)

	// Where there is no room for it, questions are answered without.
	x.Close()
	if err := os.Mkdir(filepath.Join(dir, "index.tmp"), 0o700); err != nil {
		t.Fatal(err)
	}
	compare("it cannot be written", 5000)
	if err := os.Remove(filepath.Join(dir, "index.tmp")); err != nil {
		t.Fatal(err)
	}
	compare("it can be written again", 5000)

	if err := x.Find(t.Context(), 0, &audit.Filter{}, func(*audit.Entry) error { return io.ErrUnexpectedEOF }); err != io.ErrUnexpectedEOF {
		t.Errorf("Find = %v, want the error of fn", err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := x.Find(ended, 0, &audit.Filter{}, func(*audit.Entry) error { return nil }); err != context.Canceled {
		t.Errorf("Find = %v, want context.Canceled", err)
	}
}

// openDeleted opens a file of this process that has no name any more.
func openDeleted(t *testing.T, name string) *os.File {
	t.Helper()
	open, err := filepath.Glob("/proc/self/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range open {
		if to, err := os.Readlink(fd); err == nil && strings.Contains(to, t.TempDir()[:strings.LastIndex(t.TempDir(), "/")]) && strings.HasSuffix(to, name+" (deleted)") {
			f, err := os.OpenFile(fd, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { f.Close() })
			return f
		}
	}
	t.Fatalf("no deleted file %s is open", name)
	return nil
}

// BenchmarkFind asks a log of 100,000 entries with and without the index.
func BenchmarkFind(b *testing.B) {
	const n = 100_000
	dir := filepath.Join(b.TempDir(), "audit")
	l := create(b, dir, audit.Options{})
	many(b, l, 0, n)
	b.Run("build", func(b *testing.B) {
		for b.Loop() {
			x := audit.NewIndex(l)
			if err := x.Update(context.Background()); err != nil {
				b.Fatal(err)
			}
			x.Close()
		}
	})
	x := audit.NewIndex(l)
	defer x.Close()
	if err := x.Update(context.Background()); err != nil {
		b.Fatal(err)
	}
	for _, q := range questions(n) {
		if q.what == "everything" {
			continue
		}
		b.Run("index/"+q.what, func(b *testing.B) {
			for b.Loop() {
				b.ReportMetric(float64(len(find(b, x, 0, q.f))), "found")
			}
		})
		b.Run("scan/"+q.what, func(b *testing.B) {
			for b.Loop() {
				b.ReportMetric(float64(len(scan(b, dir, 0, q.f))), "found")
			}
		})
	}
}
