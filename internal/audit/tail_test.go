package audit_test

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/keycustody/custodian/internal/audit"
	"github.com/keycustody/custodian/internal/checkpoint"
)

// A Tail shows every entry once, from where it begins and in order, however the
// log grows, across segments.
func TestTail(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	l := create(t, dir, audit.Options{SegmentSize: 8 << 10})
	n := 0
	add := func(k int) {
		t.Helper()
		var entries []audit.Entry
		for range k {
			entries = append(entries, release(n))
			n++
		}
		appendTo(t, l, entries...)
	}
	tails := map[uint64]*audit.Tail{} // by where they begin
	got := map[uint64]uint64{}        // where they are
	for i := range 60 {
		add(1 + i%4)
		if i%20 == 3 {
			from := uint64(n - 2) // inside of a batch, mostly
			tail, err := audit.OpenTail(dir, from)
			if err != nil {
				t.Fatal(err)
			}
			defer tail.Close()
			tails[from], got[from] = tail, from
		}
		for from, tail := range tails {
			err := tail.Next(l.Size(), func(e *audit.Entry) error {
				if e.Index != got[from] {
					t.Errorf("the tail from %d shows entry %d, want %d", from, e.Index, got[from])
				}
				got[from]++
				return nil
			})
			if err != nil || got[from] != uint64(n) {
				t.Fatalf("the tail from %d is at %d of %d: %v", from, got[from], n, err)
			}
		}
	}
	if segments, err := filepath.Glob(filepath.Join(dir, "*.log")); err != nil || len(segments) < 3 {
		t.Fatalf("%d segments, %v, want several", len(segments), err)
	}
	tail, err := audit.OpenTail(dir, 5)
	if err != nil {
		t.Fatal(err)
	}
	defer tail.Close()
	if err := tail.Next(9, func(e *audit.Entry) error {
		if e.Index == 7 {
			return io.ErrUnexpectedEOF
		}
		return nil
	}); err != io.ErrUnexpectedEOF {
		t.Errorf("Next = %v, want the error of fn", err)
	}
}

// A Prover makes the proofs that ProveConsistency makes, from any size to any
// later one that was a checkpoint, in any order, and reads what was added only.
func TestProver(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	k := newTestKey(t)
	l := create(t, dir, audit.Options{SegmentSize: 16 << 10})
	signWith(t, l, k)
	p := audit.NewProver(dir)
	sizes := []uint64{}
	ctx := t.Context()
	for i := range 40 {
		for range 1 + i%5 {
			appendTo(t, l, release(i))
		}
		c, err := checkpoint.Parse(l.Checkpoint())
		if err != nil {
			t.Fatal(err)
		}
		for _, old := range append(sizes, c.Size/2+1, c.Size) {
			if (old+c.Size)%3 == 1 {
				continue // of some of them, the Prover has never heard
			}
			got, err := p.Consistency(ctx, old, c)
			if err != nil {
				t.Fatal(err)
			}
			want, _, err := audit.ProveConsistency(ctx, dir, old, c.Size)
			if err != nil || len(got)+len(want) > 0 && !reflect.DeepEqual(got, want) {
				t.Fatalf("from %d to %d: got %x, want %x, %v", old, c.Size, got, want, err)
			}
		}
		sizes = append(sizes, c.Size)
	}
	c, err := checkpoint.Parse(l.Checkpoint())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Consistency(ctx, c.Size, c); err != nil {
		t.Fatal(err)
	}
	appendTo(t, l, release(1), release(2))
	now, err := checkpoint.Parse(l.Checkpoint())
	if err != nil {
		t.Fatal(err)
	}
	// The beginning of the log is damaged: who reads it notices.
	segments, err := filepath.Glob(filepath.Join(dir, "*.log"))
	if err != nil || len(segments) < 2 {
		t.Fatalf("segments %q, %v", segments, err)
	}
	b, err := os.ReadFile(segments[0])
	if err == nil {
		b[300] ^= 1
		err = os.WriteFile(segments[0], b, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Consistency(ctx, c.Size, now); err != nil {
		t.Errorf("from a tree that is known: %v, want it not to read the beginning", err)
	}
	var damage *audit.DamageError
	if _, err := audit.NewProver(dir).Consistency(ctx, c.Size, now); !errors.As(err, &damage) {
		t.Errorf("from the start: %v, want a DamageError", err)
	}
	now.Root[0] ^= 1
	if _, err := p.Consistency(ctx, c.Size, now); !errors.As(err, &damage) {
		t.Errorf("to a root that is not the log's: %v, want a DamageError", err)
	}
	for _, old := range []uint64{0, now.Size + 1} {
		if _, err := p.Consistency(context.Background(), old, now); !errors.Is(err, audit.ErrNoEntry) {
			t.Errorf("from %d: %v, want ErrNoEntry", old, err)
		}
	}
}
