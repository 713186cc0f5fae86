package audit

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/mod/sumdb/tlog"
	"golang.org/x/sys/unix"

	"github.com/keycustody/custodian/internal/checkpoint"
)

const fileName = "audit.log"

// A DamageError says where a log is not what was written.
type DamageError struct {
	Path    string
	Offset  int64  // of the batch, or of the file header
	Index   uint64 // of the batch's first entry
	Problem error
}

func (e *DamageError) Error() string {
	return fmt.Sprintf("audit log %s: damaged at offset %d, entry %d: %v", e.Path, e.Offset, e.Index, e.Problem)
}

func (e *DamageError) Unwrap() error { return e.Problem }

// A scanner walks over the batches of a log.
type scanner struct {
	file *os.File
	id   logID
	live bool // somebody may be writing to the file

	off    int64  // where the next batch is
	index  uint64 // its first entry
	sealed bool   // a signed batch was there, so all that follow are signed
	torn   int64  // after io.EOF: how many bytes of a torn batch follow
	buf    []byte
}

// openLog opens the file of dir and reads its header.
func openLog(dir string, flag int) (*scanner, error) {
	path := filepath.Join(dir, fileName)
	f, err := os.OpenFile(path, flag|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, fmt.Errorf("open audit log: %w", err)
	}
	s := &scanner{file: f, live: flag == os.O_RDONLY, off: headerSize}
	b := make([]byte, headerSize)
	if _, err = s.readAt(b, 0); err == nil {
		if s.id, err = decodeFileHeader(b); err != nil {
			err = &DamageError{Path: path, Problem: err}
		}
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return s, nil
}

// next returns the batch at s.off and steps over it. The payload is valid
// until the next call. Where the whole batches end, the error is io.EOF.
func (s *scanner) next() (h batchHeader, payload []byte, err error) {
	// A writer may have been half-way in what was read. If so, another look
	// shows more; a few are enough, because a writer is never slower than
	// the copy of one batch.
	for look := 0; ; look++ {
		h, payload, err = s.look()
		if err == nil || !s.live || look == 3 || err == io.EOF && s.torn == 0 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	if err != nil {
		return batchHeader{}, nil, err
	}
	s.step(&h)
	return h, payload, nil
}

// step goes over the batch at s.off.
func (s *scanner) step(h *batchHeader) {
	s.off += frameSize(h.payload)
	s.index += uint64(h.count)
	s.sealed = s.sealed || h.signed
}

func (s *scanner) look() (batchHeader, []byte, error) {
	h, header, err := s.header()
	if err != nil {
		return batchHeader{}, nil, err
	}
	size := int(frameSize(h.payload))
	if cap(s.buf) < size {
		s.buf = make([]byte, size)
	}
	frame := s.buf[:size]
	copy(frame, header[:])
	if _, err := s.readAt(frame[headerSize:], s.off+headerSize); err != nil {
		return batchHeader{}, nil, err
	}
	if !h.whole(frame[headerSize:]) {
		lost := frame[size-1] == 0 || sectorLost(frame, s.off)
		return batchHeader{}, nil, s.stop(lost, "the batch is not what was written")
	}
	return h, frame[headerSize:][:h.payload], nil
}

// header reads the header of the batch at s.off.
func (s *scanner) header() (batchHeader, [headerSize]byte, error) {
	var b [headerSize]byte
	if _, err := s.readAt(b[:], s.off); err != nil {
		return batchHeader{}, b, err
	}
	h, ok := decodeBatchHeader(b[:], s.id)
	if !ok {
		return batchHeader{}, b, s.stop(sectorLost(b[:], s.off), "the header of the batch is not what was written")
	}
	if h.first != s.index {
		return batchHeader{}, b, s.damage(fmt.Errorf("a batch that begins with entry %d is here", h.first))
	}
	if s.sealed && !h.signed {
		return batchHeader{}, b, s.damage(errors.New("a batch without a checkpoint follows one that has it"))
	}
	if h.payload > maxPayload || h.count == 0 || h.count > h.payload/entryPrefix {
		return batchHeader{}, b, s.damage(fmt.Errorf("a batch of %d bytes says that it has %d entries", h.payload, h.count))
	}
	return h, b, nil
}

// skip steps over the batch at s.off without reading its payload, and reports
// whether it did. It does not step over a batch with entries from index from.
func (s *scanner) skip(from uint64) bool {
	if s.index >= from {
		return false
	}
	h, _, err := s.header()
	if err != nil || h.first+uint64(h.count) > from {
		return false
	}
	s.step(&h)
	return true
}

// stop says why there is no whole batch at s.off: io.EOF at the end of the log,
// with s.torn set where a batch was being written when the machine stopped;
// damage otherwise. lost tells that parts of what is there never arrived.
func (s *scanner) stop(lost bool, problem string) error {
	last, later, err := s.tail()
	if err != nil {
		return err
	}
	if later >= 0 {
		return s.damage(fmt.Errorf("%s, and a later one is at offset %d", problem, later))
	}
	if last >= s.off+headerSize && !lost {
		return s.damage(errors.New(problem))
	}
	s.torn = max(0, last+1-s.off)
	return io.EOF
}

// tail looks at everything from s.off: where the last byte is that is not
// zero, and where a later batch header is; -1 where there is none.
func (s *scanner) tail() (last, later int64, err error) {
	const chunk = 32 << 10
	b := make([]byte, chunk+headerSize)
	last = -1
	for off := s.off; ; off += chunk {
		n, err := s.readAt(b, off)
		if err != nil {
			return 0, 0, err
		}
		if !allZero(b[:n]) {
			last = off + int64(len(bytes.TrimRight(b[:n], "\x00"))) - 1
		}
		for at := 0; ; at++ {
			i := bytes.Index(b[at:n], []byte(magicPrefix))
			if i < 0 {
				break
			}
			at += i
			if _, ok := decodeBatchHeader(b[at:n], s.id); ok && off+int64(at) > s.off {
				return last, off + int64(at), nil
			}
		}
		if n < len(b) {
			return last, -1, nil
		}
	}
}

// readAt fills b from off, with zeros beyond the end of the file, and returns
// how many bytes the file had.
func (s *scanner) readAt(b []byte, off int64) (int, error) {
	n, err := s.file.ReadAt(b, off)
	if err != nil && err != io.EOF {
		return n, fmt.Errorf("read audit log at offset %d: %w", off, err)
	}
	clear(b[n:])
	return n, nil
}

func (s *scanner) damage(problem error) error {
	return &DamageError{Path: s.file.Name(), Offset: s.off, Index: s.index, Problem: problem}
}

// A verifier checks every batch that a scanner finds.
type verifier struct {
	*scanner
	tree tree

	batches     uint64
	lastBatch   int64                     // offset of the last batch, 0 while there is none
	check       func(signed []byte) error // of each checkpoint; nil: their signatures are not looked at
	checkpoint  []byte                    // the last one, nil while there is none
	checkpoints uint64
	unsigned    uint64 // entries before the first signed batch
	first, last time.Time
}

// next checks the next batch and calls visit, if it is not nil, with each
// entry. It returns io.EOF as the scanner does.
func (v *verifier) next(visit func(*Entry) error) error {
	at, index := v.off, v.index
	h, payload, err := v.scanner.next()
	if err != nil {
		return err
	}
	var refused error
	entries, signed, err := h.split(payload)
	if err != nil {
		return v.damageAt(at, index, err)
	}
	err = h.entries(entries, func(b []byte) error {
		e, err := UnmarshalEntry(b)
		if err != nil {
			return err
		}
		if v.tree.size == 0 {
			v.first = e.Time
		}
		v.last = e.Time
		v.tree.add(tlog.RecordHash(b))
		if visit != nil {
			refused = visit(&e)
		}
		return refused
	})
	if refused != nil {
		return refused
	}
	if err == nil && v.tree.root() != h.root {
		err = errors.New("the root of the tree is not the one that the batch carries")
	}
	if err == nil && h.signed {
		err = v.signed(signed)
	}
	if err != nil {
		return v.damageAt(at, index, err)
	}
	if !h.signed {
		v.unsigned = v.tree.size
	}
	v.batches++
	v.lastBatch = at
	return nil
}

// signed checks that the checkpoint is that of the log as it is now.
func (v *verifier) signed(signed []byte) error {
	c, err := checkpoint.Parse(signed)
	if err != nil {
		return err
	}
	if want := (checkpoint.Checkpoint{Origin: checkpoint.Origin(v.id), Size: v.tree.size, Root: v.tree.root()}); c != want {
		return fmt.Errorf("the checkpoint of %d entries of %q is not that of the batch", c.Size, c.Origin)
	}
	if v.check != nil {
		if err := v.check(signed); err != nil {
			return fmt.Errorf("the checkpoint of %d entries: %w", c.Size, err)
		}
	}
	v.checkpoint = append(v.checkpoint[:0], signed...)
	v.checkpoints++
	return nil
}

func (v *verifier) damageAt(off int64, index uint64, problem error) error {
	return &DamageError{Path: v.file.Name(), Offset: off, Index: index, Problem: problem}
}
