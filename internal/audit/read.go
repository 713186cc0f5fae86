package audit

import (
	"context"
	"io"
	"os"
	"time"
)

// Read calls fn with every entry from index from, in order, until there are no
// more or fn returns an error, which Read returns. It needs no lock, so that it
// can run beside the writer; it may then see entries that are not yet
// acknowledged. It checks that batches are whole, not that they are genuine:
// that is for Verify. The entry is fn's to keep.
func Read(dir string, from uint64, fn func(*Entry) error) error {
	s, err := openLog(dir, os.O_RDONLY)
	if err != nil {
		return err
	}
	defer s.file.Close()
	for s.skip(from) {
	}
	for {
		h, payload, err := s.next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		var refused error
		entries, _, err := h.split(payload)
		if err != nil {
			return &DamageError{Path: s.file.Name(), Offset: s.off - frameSize(h.payload), Index: h.first, Problem: err}
		}
		err = h.entries(entries, func(b []byte) error {
			e, err := UnmarshalEntry(b)
			if err != nil || e.Index < from {
				return err
			}
			refused = fn(&e)
			return refused
		})
		if refused != nil {
			return refused
		}
		if err != nil {
			return &DamageError{Path: s.file.Name(), Offset: s.off - frameSize(h.payload), Index: h.first, Problem: err}
		}
	}
}

// A Report is what Verify found in a log that verifies.
type Report struct {
	ID      [16]byte // of the log
	Entries uint64
	Batches uint64
	Root    [32]byte  // of the tree with all entries
	First   time.Time // of the first entry
	Last    time.Time // of the last entry
	Bytes   int64     // from the start of the file to the end of the last whole batch

	Checkpoints uint64 // one for each signed batch
	Checkpoint  []byte // the last one; nil where there is none
	// Unsigned counts the entries before the first signed batch. Its
	// checkpoint covers them, but nobody signed before it was made.
	Unsigned uint64

	// Torn counts the bytes after the last whole batch that are not zero as
	// they should be: a batch that is being written, one that a crash cut
	// off, or something that somebody else appended.
	Torn int64
}

// VerifyOptions says what Verify does beside checking the log. The zero value
// is good.
type VerifyOptions struct {
	// Progress is called after each batch with bytes done and bytes in all.
	Progress func(done, total int64)

	// Check is called with every checkpoint, once its size and root are right,
	// and decides on its signature. Where it is nil, signatures are not
	// looked at.
	Check func(signed []byte) error
}

// Verify checks every byte of a log. It changes nothing and can run beside the
// writer; it ends at what was there when it began. What it finds wrong, or
// o.Check, is a *DamageError.
func Verify(ctx context.Context, dir string, o VerifyOptions) (Report, error) {
	s, err := openLog(dir, os.O_RDONLY)
	if err != nil {
		return Report{}, err
	}
	defer s.file.Close()
	info, err := s.file.Stat()
	if err != nil {
		return Report{}, err
	}
	v := &verifier{scanner: s, check: o.Check}
	// The file is longer than what is written, so the bound is loose; it is
	// there so that a busy writer cannot keep Verify running.
	for v.off < info.Size() {
		if err := ctx.Err(); err != nil {
			return Report{}, err
		}
		err := v.next(nil)
		if err == io.EOF {
			break
		}
		if err != nil {
			return Report{}, err
		}
		if o.Progress != nil {
			o.Progress(v.off, max(v.off, info.Size()))
		}
	}
	return Report{
		ID:      s.id,
		Entries: v.tree.size,
		Batches: v.batches,
		Root:    v.tree.root(),
		First:   v.first,
		Last:    v.last,
		Bytes:   v.off,
		Torn:    v.torn,

		Checkpoints: v.checkpoints,
		Checkpoint:  v.checkpoint,
		Unsigned:    v.unsigned,
	}, nil
}
