package audit_test

import (
	"bytes"
	"context"
	"fmt"
	"path/filepath"
	"reflect"
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
	r, err := audit.Verify(context.Background(), dir, nil)
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
