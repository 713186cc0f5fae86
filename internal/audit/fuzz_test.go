package audit_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"hash/crc32"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/keycustody/custodian/internal/audit"
)

func FuzzUnmarshalEntry(f *testing.F) {
	for _, e := range []audit.Entry{full(), release(3), denial(4, "x"), {Time: when, Action: "start", Outcome: audit.Failed}} {
		b, err := e.MarshalBinary()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
		f.Add(append(b, 0x80, 0))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := audit.UnmarshalEntry(b)
		if err != nil {
			return
		}
		back, err := e.MarshalBinary()
		if err != nil {
			t.Fatalf("%+v was read, but cannot be written: %v", e, err)
		}
		if !bytes.Equal(back, b) {
			t.Fatalf("%x was read, %x is written", b, back)
		}
		again, err := audit.UnmarshalEntry(back)
		if err != nil || !reflect.DeepEqual(again, e) {
			t.Fatalf("entry = %+v, %v, want %+v", again, err, e)
		}
	})
}

// FuzzReader gives arbitrary bytes to everything that reads a file, as they
// are and with checksums that fit. Whatever they agree on must be one log. The
// log's goroutine makes coverage vary, so run it with -fuzzminimizetime 10x.
func FuzzReader(f *testing.F) {
	dir := filepath.Join(f.TempDir(), "audit")
	l := create(f, dir, audit.Options{})
	appendTo(f, l, release(0))
	appendTo(f, l, release(1), release(2))
	appendTo(f, l, full())
	end := l.Stats().Bytes
	shut(f, l)
	whole := load(f, dir)[:end]
	f.Add(whole)
	f.Add(whole[:end-9])
	f.Add(append(bytes.Clone(whole), make([]byte, 100)...))
	f.Add([]byte("custaud\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		dir := t.TempDir()
		checkReader(t, dir, b)
		checkReader(t, dir, reseal(b))
	})
}

func checkReader(t *testing.T, dir string, b []byte) {
	t.Helper()
	store(t, dir, b)
	report, failed := audit.Verify(context.Background(), dir, audit.VerifyOptions{})
	entries := uint64(0)
	err := audit.Read(dir, 0, func(e *audit.Entry) error { entries++; return nil })
	if failed == nil && (err != nil || entries != report.Entries) {
		t.Fatalf("Verify found %d entries, Read %d: %v", report.Entries, entries, err)
	}
	l, err := audit.Open(dir, audit.Options{Reserve: 1})
	if (err == nil) != (failed == nil) {
		t.Fatalf("Open says %v, Verify says %v", err, failed)
	}
	if err != nil {
		return
	}
	if l.Size() != report.Entries || l.Root() != report.Root {
		t.Fatalf("Open found %d entries with root %x, Verify %d with %x", l.Size(), l.Root(), report.Entries, report.Root)
	}
	appendTo(t, l, release(0))
	shut(t, l)
	if got := verify(t, dir); got.Entries != report.Entries+1 || got.Torn != 0 {
		t.Fatalf("after one more entry: %+v", got)
	}
}

// FuzzVerifyExport gives arbitrary bytes to what reads exports, and believes any
// signature. What verifies against the root of a log is that log. Run it as
// FuzzReader.
func FuzzVerifyExport(f *testing.F) {
	dir, receipts, _ := signedLog(f)
	var whole bytes.Buffer
	for _, r := range [][2]uint64{{0, 20}, {3, 4}, {7, 19}} {
		var b bytes.Buffer
		if _, err := audit.Export(context.Background(), dir, r[0], r[1], receipts[2].Checkpoint, &b); err != nil {
			f.Fatal(err)
		}
		f.Add(b.Bytes())
	}
	all, err := audit.Export(context.Background(), dir, 0, 20, nil, &whole)
	if err != nil {
		f.Fatal(err)
	}
	var entries []audit.Entry
	believe := func([]byte) error { return nil }
	if _, err := audit.VerifyExport(context.Background(), &whole, believe, func(e *audit.Entry) error { entries = append(entries, *e); return nil }); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var got []audit.Entry
		r, err := audit.VerifyExport(context.Background(), bytes.NewReader(b), believe, func(e *audit.Entry) error { got = append(got, *e); return nil })
		if err != nil || r.Checkpoint.Root != all.Checkpoint.Root || r.Checkpoint.Size != all.Checkpoint.Size {
			return
		}
		if r.To > 20 || !reflect.DeepEqual(got, entries[r.From:r.To]) {
			t.Fatalf("entries %d to %d verify and are others: %+v", r.From, r.To, got)
		}
	})
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// reseal returns the log with its checksums as the package doc says.
func reseal(b []byte) []byte {
	b = bytes.Clone(b)
	if len(b) < 64 {
		return b
	}
	sum := func(b []byte, seed uint32) uint32 { return crc32.Update(seed, castagnoli, b) }
	binary.BigEndian.PutUint32(b[60:], sum(b[:60], 0))
	id := sum(b[12:28], 0)
	for at := 64; len(b)-at >= 64; {
		h := b[at : at+64]
		padded := (int(binary.BigEndian.Uint32(h[8:])) + 7) &^ 7
		rest := b[at+64:]
		if padded <= len(rest) {
			binary.BigEndian.PutUint32(h[56:], sum(rest[:padded], 0))
		}
		binary.BigEndian.PutUint32(h[60:], sum(h[:60], id))
		at += 64 + padded + 8
		if at < 0 || padded > len(rest) {
			break
		}
	}
	return b
}

// load returns the file of the log in dir.
func load(t testing.TB, dir string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, "audit.log"))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// store makes b the file of the log in dir.
func store(t testing.TB, dir string, b []byte) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "audit.log"), b, 0o600); err != nil {
		t.Fatal(err)
	}
}
