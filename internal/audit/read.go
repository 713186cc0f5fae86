package audit

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/keycustody/custodian/internal/checkpoint"
)

// Read calls fn with every entry from index from, in order, until there are no
// more or fn returns an error, which Read returns. It needs no lock, so that it
// can run beside the writer; it may then see entries that are not yet
// acknowledged. It checks that batches are whole, not that they are genuine:
// that is for Verify. Of segments that are pruned it shows the entries that
// were kept. The entry is fn's to keep.
func Read(dir string, from uint64, fn func(*Entry) error) error {
	s, err := openLogAt(dir, from)
	if err != nil {
		return err
	}
	defer s.close()
	for s.skip(from) {
	}
	var refused error
	show := func(e *Entry) error {
		if e.Index >= from {
			refused = fn(e)
		}
		return refused
	}
	for {
		h, payload, err := s.next()
		switch {
		case err == io.EOF:
			return nil
		case err == errPruned:
			if err = s.remains(func(tlog.Hash) {}, show); err == nil {
				err = s.advance()
			}
		case err == nil:
			err = readBatch(s, &h, payload, show)
		}
		if refused != nil {
			return refused
		}
		if err != nil {
			return err
		}
	}
}

func readBatch(s *scanner, h *batchHeader, payload []byte, show func(*Entry) error) error {
	entries, _, err := h.split(payload)
	if err == nil {
		err = h.entries(entries, func(b []byte) error {
			e, err := UnmarshalEntry(b)
			if err != nil {
				return err
			}
			return show(&e)
		})
	}
	if err != nil {
		return &DamageError{Path: s.file.Name(), Segment: s.head.number, Offset: s.off - frameSize(h.payload), Index: h.first, Problem: err}
	}
	return nil
}

// A Report is what Verify found in a log that verifies.
type Report struct {
	ID      [16]byte // of the log
	From    uint64   // the first entry that was read
	Entries uint64   // up to the last one that was read, all before it included
	Batches uint64
	Root    [32]byte  // of the tree with all entries
	First   time.Time // of the first entry that was read
	Last    time.Time // of the last entry
	Bytes   int64     // from the start of the first file to the end of the last whole batch

	Segments int
	Pruned   []Pruned // what is gone of them, in order

	Checkpoints uint64 // of those that are there, one for each signed batch
	Checkpoint  []byte // the last one; nil where there is none
	// Unsigned counts the entries before the first signed batch. Its
	// checkpoint covers them, but nobody signed before it was made.
	Unsigned uint64

	// Torn counts the bytes after the last whole batch that are not zero as
	// they should be: a batch that is being written, one that a crash cut
	// off, or something that somebody else appended.
	Torn int64
}

// Pruned says what is gone of a segment. The times are not proved by anything.
type Pruned struct {
	Segment  uint32
	First    uint64    // index of its first entry
	Entries  uint64    // in it
	Kept     uint64    // of these
	From, To time.Time // of its first and its last entry
	At       time.Time // when it was pruned
}

// VerifyOptions says what Verify does beside checking the log. The zero value
// is good.
type VerifyOptions struct {
	// From and To bound the range of entries, without To, that is wanted;
	// up to the end where To is 0. What is read is a little more: whole
	// segments before it, whole batches behind it. What lies before is
	// taken from the checkpoint that the segment begins with.
	From, To uint64

	// Since, where it is not nil, is a checkpoint that the log must contain.
	// Who has verified it knows so that the log's end was not cut off before
	// it, and that nothing in it was changed since.
	Since *checkpoint.Checkpoint

	// Progress is called after each batch with bytes done and bytes in all.
	Progress func(done, total int64)

	// Check is called with every checkpoint, once its size and root are right,
	// and decides on its signature. Where it is nil, signatures are not
	// looked at.
	Check func(signed []byte) error
}

// Verify checks every byte of a log, or of a part of it. It changes nothing and
// can run beside the writer; it ends at what was there when it began. What it
// finds wrong, or o.Check, is a *DamageError.
func Verify(ctx context.Context, dir string, o VerifyOptions) (Report, error) {
	s, err := openLogAt(dir, o.From)
	if err != nil {
		return Report{}, err
	}
	defer s.close()
	r := Report{ID: s.id, From: s.index}
	if c := o.Since; c != nil && (!checkpoint.OfLog(c.Origin, s.id) || c.Size < s.index) {
		return r, fmt.Errorf("the checkpoint of %d entries of %q is not of this part of the log: %w", c.Size, c.Origin, checkpoint.ErrProof)
	}
	v, err := newVerifier(s, o.Check)
	if err != nil {
		return r, err
	}
	v.since = o.Since
	if c := o.Since; c != nil && c.Size == s.index && c.Root != v.tree.root() {
		return r, fmt.Errorf("the log has another root after %d entries than the checkpoint that it must contain: %w", c.Size, checkpoint.ErrProof)
	}
	total, last, err := written(dir, s.head.number)
	if err != nil {
		return r, err
	}
	// The files are longer than what is written, so the bound is loose; it is
	// there so that a busy writer cannot keep Verify running. A log does not end
	// with a segment that is pruned, wherever that was cut.
	for (o.To == 0 || v.tree.size < o.To) && (v.head.pruned != nil || v.head.number < last.number || v.off < last.size) {
		if err := ctx.Err(); err != nil {
			return r, err
		}
		err := v.next(nil)
		if err == io.EOF {
			break
		}
		if err != nil {
			return r, err
		}
		if o.Progress != nil {
			o.Progress(v.passed+v.off, max(v.passed+v.off, total))
		}
	}
	if v.tree.size < o.To || o.From > v.tree.size {
		return r, fmt.Errorf("entries %d to %d of %d: %w", o.From, o.To, v.tree.size, ErrNoEntry)
	}
	if c := o.Since; c != nil && c.Size > v.tree.size {
		return r, fmt.Errorf("the log has %d entries, and the checkpoint that it must contain covers %d: %w", v.tree.size, c.Size, checkpoint.ErrProof)
	}
	r.Entries, r.Batches, r.Root = v.tree.size, v.batches, v.tree.root()
	r.First, r.Last, r.Bytes, r.Torn = v.first, v.last, v.passed+v.off, v.torn
	r.Segments, r.Pruned = len(v.segments)+1, v.pruned
	r.Checkpoints, r.Checkpoint, r.Unsigned = v.checkpoints, v.checkpoint, v.unsigned
	return r, nil
}

// written returns how many bytes the segments from number on have, and how long
// the last one is.
func written(dir string, number uint32) (total int64, last sealedSegment, err error) {
	numbers, err := segments(dir)
	if err != nil {
		return 0, last, err
	}
	for _, n := range numbers {
		if n < number {
			continue
		}
		info, err := os.Lstat(filepath.Join(dir, segmentName(n)))
		if err != nil {
			return 0, last, fmt.Errorf("open audit log: %w", err)
		}
		total += info.Size()
		last = sealedSegment{number: n, size: info.Size()}
	}
	return total, last, nil
}
