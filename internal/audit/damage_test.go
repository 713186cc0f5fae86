package audit_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/keycustody/custodian/internal/audit"
)

// A sample is a log that was closed, and where its batches are.
type sample struct {
	file  []byte  // without the room behind the last batch
	ends  []int64 // of the file header and of each batch
	sizes []int   // entries after each of them
}

// makeSample writes a log of 40 entries in batches of 1 to 5.
func makeSample(t testing.TB) sample {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "audit")
	l := create(t, dir, audit.Options{})
	s := sample{ends: []int64{64}, sizes: []int{0}}
	for n := 0; n < 40; {
		var entries []audit.Entry
		for range min(len(s.ends)%5+1, 40-n) {
			entries = append(entries, release(n))
			n++
		}
		appendTo(t, l, entries...)
		s.ends = append(s.ends, l.Stats().Bytes)
		s.sizes = append(s.sizes, n)
	}
	shut(t, l)
	s.file = load(t, dir)[:s.ends[len(s.ends)-1]]
	return s
}

// batch returns the i-th batch, from 1.
func (s sample) batch(i int) []byte { return s.file[s.ends[i-1]:s.ends[i]] }

func verifyBytes(t testing.TB, dir string, b []byte) (audit.Report, error) {
	t.Helper()
	store(t, dir, b)
	return audit.Verify(context.Background(), dir, audit.VerifyOptions{})
}

// Every byte of the log counts, for Verify as for Open.
func TestFlips(t *testing.T) {
	s := makeSample(t)
	offsets := make(chan int)
	var wg sync.WaitGroup
	for range 16 {
		dir := t.TempDir()
		store(t, dir, s.file)
		f, err := os.OpenFile(filepath.Join(dir, "audit.log"), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		wg.Go(func() {
			for at := range offsets {
				checkFlip(t, dir, f, s, at)
			}
		})
	}
	for at := range s.file {
		offsets <- at
	}
	close(offsets)
	wg.Wait()
}

// checkFlip changes the byte of f, the log in dir, that is at that offset.
func checkFlip(t *testing.T, dir string, f *os.File, s sample, at int) {
	set := func(c byte) {
		if _, err := f.WriteAt([]byte{c}, int64(at)); err != nil {
			t.Error(err)
		}
	}
	defer set(s.file[at])
	for _, mask := range []byte{0x01, 0x80, 0xff} {
		set(s.file[at] ^ mask)
		var damage *audit.DamageError
		if _, err := audit.Open(dir, audit.Options{}); !errors.As(err, &damage) {
			t.Errorf("byte %d changed by %#x: Open says %v", at, mask, err)
		}
		if mask != 0x80 {
			continue // to save time
		}
		_, err := audit.Verify(context.Background(), dir, audit.VerifyOptions{})
		if !errors.As(err, &damage) {
			t.Errorf("byte %d changed by %#x: Verify says %v", at, mask, err)
			return
		}
		i := 0
		for i+1 < len(s.ends) && int64(at) >= s.ends[i] {
			i++
		}
		want := int64(0)
		if i > 0 {
			want = s.ends[i-1]
		}
		if damage.Offset != want || i > 0 && damage.Index != uint64(s.sizes[i-1]) {
			t.Errorf("byte %d changed: %v, want offset %d", at, err, want)
		}
	}
}

// What somebody puts behind the log is no damage to it, but it is seen.
func TestAppendedBytes(t *testing.T) {
	s := makeSample(t)
	dir := t.TempDir()
	end := len(s.file)
	for _, at := range []int{0, 1, 63, 64, 500, 4096, 1 << 20} {
		b := append(bytes.Clone(s.file), make([]byte, at+1)...)
		b[end+at] = 1
		r, err := verifyBytes(t, dir, b)
		if err != nil || r.Torn != int64(at+1) || r.Entries != 40 {
			t.Errorf("byte %d after the end: %+v, %v, want %d torn bytes", at, r, err, at+1)
		}
		l := open(t, dir, audit.Options{})
		if got, want := l.Stats().Cut, int64(at+1); got != want {
			t.Errorf("Open cut %d bytes, want %d", got, want)
		}
		shut(t, l)
		if r := verify(t, dir); r.Torn != 0 || r.Entries != 40 {
			t.Errorf("after Open: %+v", r)
		}
	}
}

// A log is cut, or stops to arrive, at every byte of its last batch: what was
// acknowledged before is there, and the log goes on.
func TestTornTail(t *testing.T) {
	s := makeSample(t)
	last := len(s.ends) - 1
	whole, size := s.ends[last-1], uint64(s.sizes[last-1])
	var wg sync.WaitGroup
	cuts := make(chan int64)
	for range runtime.GOMAXPROCS(0) {
		dir := t.TempDir()
		wg.Go(func() {
			for cut := range cuts {
				checkTorn(t, dir, s.file[:cut], size)
				zeroed := make([]byte, len(s.file)+1000)
				copy(zeroed, s.file[:cut])
				checkTorn(t, dir, zeroed, size)
			}
		})
	}
	for cut := whole; cut < int64(len(s.file)); cut++ {
		cuts <- cut
	}
	close(cuts)
	wg.Wait()
	if r, err := verifyBytes(t, t.TempDir(), s.file); err != nil || r.Entries != 40 || r.Torn != 0 {
		t.Errorf("the whole log: %+v, %v", r, err)
	}
}

// checkTorn makes b the log, which has size whole entries.
func checkTorn(t *testing.T, dir string, b []byte, size uint64) {
	if err := os.WriteFile(filepath.Join(dir, "audit.log"), b, 0o600); err != nil {
		t.Error(err)
		return
	}
	r, err := audit.Verify(context.Background(), dir, audit.VerifyOptions{})
	if err != nil || r.Entries != size {
		t.Errorf("%d bytes: Verify found %d entries, %v, want %d", len(b), r.Entries, err, size)
	}
	l, err := audit.Open(dir, audit.Options{})
	if err != nil {
		t.Errorf("%d bytes: %v", len(b), err)
		return
	}
	defer l.Close()
	if l.Size() != size || l.Root() != r.Root {
		t.Errorf("%d bytes: %d entries, want %d", len(b), l.Size(), size)
	}
	receipts, err := l.Append(context.Background(), []audit.Entry{release(1)})
	if err != nil || receipts[0].Index != size {
		t.Errorf("%d bytes: next entry is %+v, %v, want index %d", len(b), receipts, err, size)
	}
	if r, err := audit.Verify(context.Background(), dir, audit.VerifyOptions{}); err != nil || r.Entries != size+1 || r.Torn != 0 {
		t.Errorf("%d bytes: after one more: %+v, %v", len(b), r, err)
	}
}

// A batch of several sectors of which any did not arrive is torn.
func TestTornSectors(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	l := create(t, dir, audit.Options{})
	appendTo(t, l, release(0), release(1))
	from := l.Stats().Bytes
	var entries []audit.Entry
	for i := range 8 {
		e := release(i)
		e.ContentID = make([]byte, 500) // zeros, to be mistaken
		entries = append(entries, e)
	}
	appendTo(t, l, entries...)
	end := l.Stats().Bytes
	shut(t, l)
	file := load(t, dir)[:end]
	first, last := from/512, (end-1)/512
	for from, to := first, first; from <= last; to++ {
		b := bytes.Clone(file)
		clear(b[max(from*512, 64+frameOf(file, 64)):min((to+1)*512, end)])
		checkTorn(t, t.TempDir(), b, 2)
		if to == last {
			from++
			to = from - 1
		}
	}
}

// frameOf returns the length of the batch at off.
func frameOf(b []byte, off int64) int64 {
	return 64 + (int64(binary.BigEndian.Uint32(b[off+8:]))+7)&^7 + 8
}

// Batches and entries stay where they are.
func TestRearranged(t *testing.T) {
	s, other := makeSample(t), makeSample(t)
	n := len(s.ends) - 1
	join := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	type row struct {
		name string
		b    []byte
		at   int // the batch that is found wrong
	}
	var rows []row
	for i := 1; i <= n; i++ {
		before, after := s.file[:s.ends[i-1]], s.file[s.ends[i]:]
		rows = append(rows,
			row{fmt.Sprintf("batch %d twice", i), join(before, s.batch(i), s.batch(i), after), i + 1},
			row{fmt.Sprintf("batch %d of another log", i), join(before, other.batch(i), after), i},
			row{fmt.Sprintf("batch %d of another log, resealed", i), reseal(join(before, other.batch(i), after)), i},
			row{fmt.Sprintf("other log from batch %d", i), join(before, other.file[other.ends[i-1]:]), i},
		)
		if i < n {
			rows = append(rows,
				row{fmt.Sprintf("batch %d dropped", i), join(before, after), i},
				row{fmt.Sprintf("batch %d lost", i), join(before, make([]byte, len(s.batch(i))), after), i},
				row{fmt.Sprintf("batches %d and %d swapped", i, i+1), join(before, s.batch(i+1), s.batch(i), s.file[s.ends[i+1]:]), i},
				row{fmt.Sprintf("cut in batch %d", i), join(before, s.batch(i)[:len(s.batch(i))-8], after), i},
			)
		}
	}
	dir := t.TempDir()
	for _, tt := range rows {
		// The last batch from another log looks like nothing, but not like
		// something torn either. A first batch of another log that is
		// resealed is a log of its own, until the next one.
		if strings.Contains(tt.name, "batch 1 of another log, resealed") {
			tt.at = 2
		}
		_, err := verifyBytes(t, dir, tt.b)
		var damage *audit.DamageError
		if !errors.As(err, &damage) {
			t.Errorf("%s: Verify says %v", tt.name, err)
			continue
		}
		if i := min(tt.at, n+1); damage.Index != uint64(s.sizes[i-1]) {
			t.Errorf("%s: %v, want it at entry %d", tt.name, err, s.sizes[i-1])
		}
		if _, err := audit.Open(dir, audit.Options{}); !errors.As(err, &damage) {
			t.Errorf("%s: Open says %v", tt.name, err)
		}
	}
}

// An entry that is edited with all checksums made to fit does not fit the
// tree; with its own root made to fit, it does not fit the next one.
func TestEdited(t *testing.T) {
	s := makeSample(t)
	dir := t.TempDir()
	at := bytes.Index(s.file, []byte("req-000007"))
	b := bytes.Clone(s.file)
	copy(b[at:], "req-000008")
	_, err := verifyBytes(t, dir, reseal(b))
	if err == nil || !strings.Contains(err.Error(), "root of the tree") {
		t.Errorf("edited and resealed: %v, want the root not to fit", err)
	}
}

func TestNotALog(t *testing.T) {
	s := makeSample(t)
	header := func(change func(b []byte)) []byte {
		b := bytes.Clone(s.file)
		change(b)
		return reseal(b)
	}
	for _, tt := range []struct {
		name string
		b    []byte
		want string
	}{
		{"empty", nil, "not an audit log"},
		{"short", s.file[:63], "checksum"},
		{"text", []byte(strings.Repeat("hello, world\n", 20)), "not an audit log"},
		{"newer", header(func(b []byte) { b[11] = 4 }), "version of the file is 4"},
		{"later", header(func(b []byte) { b[11] = 2 }), "segment 0 with the version 2"},
		{"reserved", header(func(b []byte) { b[40] = 1 }), "reserved bytes"},
		{"count", header(func(b []byte) { b[64+15]++ }), "malformed length"},
		{"no count", header(func(b []byte) { clear(b[64+12 : 64+16]) }), "it has 0 entries"},
		{"long", header(func(b []byte) { b[64+8] = 0xff }), "it has 2 entries"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			_, err := verifyBytes(t, dir, tt.b)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Verify: error = %v, want %q", err, tt.want)
			}
			if _, err := audit.Open(dir, audit.Options{}); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Open: error = %v, want %q", err, tt.want)
			}
			if got := load(t, dir); !bytes.Equal(got, tt.b) {
				t.Error("Open changed the file")
			}
		})
	}
}
