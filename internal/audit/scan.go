package audit

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/keycustody/custodian/internal/checkpoint"
)

// A DamageError says where a log is not what was written.
type DamageError struct {
	Path    string
	Segment uint32
	Offset  int64  // of the batch, or of the file header
	Index   uint64 // of the batch's first entry
	Problem error
}

func (e *DamageError) Error() string {
	return fmt.Sprintf("audit log %s: damaged in segment %d at offset %d, entry %d: %v", e.Path, e.Segment, e.Offset, e.Index, e.Problem)
}

func (e *DamageError) Unwrap() error { return e.Problem }

var (
	errSealed   = errors.New("the segment ends here")
	errUnsealed = errors.New("the segment has no seal yet")
	errPruned   = errors.New("the segment is pruned")
)

// A scanner walks over the batches of a log, from one segment to the next.
type scanner struct {
	dir  string
	id   logID
	live bool // somebody may be writing to the log

	// leave and enter, if they are not nil, are called at the end of a
	// segment and when the next one has been opened.
	leave, enter func() error
	// last, if it is not nil, says in which segment to stop.
	last *uint32

	file *os.File // the segment that is open
	head segmentHead

	off    int64  // where the next batch is
	index  uint64 // its first entry
	sealed bool   // a signed batch was there, so all that follow are signed
	torn   int64  // after io.EOF: how many bytes of a torn batch follow
	passed int64  // bytes of the segments before
	later  bool   // a batch follows what is not one
	buf    []byte
	chunk  []byte // for tail

	sealRoot *tlog.Hash // what the seal of this segment says, nil before it was there

	// loose is where the seal of the segment before has to be, if it was not
	// there, or had something behind it: a new segment stays empty until
	// that is done. It is 0 otherwise.
	loose int64
}

// openLog opens the log in dir at its beginning.
func openLog(dir string, live bool) (*scanner, error) {
	s := &scanner{dir: dir, live: live}
	if err := s.open(0); err != nil {
		return nil, err
	}
	s.id = s.head.id
	return s, nil
}

// openLogAt opens the log in dir at the beginning of the segment that has the
// entry with that index, or would have it.
func openLogAt(dir string, index uint64) (*scanner, error) {
	numbers, err := segments(dir)
	if err != nil || len(numbers) == 0 || index == 0 {
		return openLog(dir, true) // which says what is wrong
	}
	s := &scanner{dir: dir, live: true}
	for i := len(numbers) - 1; i >= 0; i-- {
		s.sealed = false
		if err := s.open(numbers[i]); err != nil {
			s.close()
			return nil, err
		}
		if s.head.first <= index {
			break
		}
	}
	s.id = s.head.id
	return s, nil
}

// open makes a segment the one to scan, from its start.
func (s *scanner) open(number uint32) error {
	f, h, err := openSegment(s.dir, number)
	if err != nil {
		return err
	}
	s.close()
	s.file, s.head, s.sealRoot = f, h, nil
	s.off, s.index, s.sealed = h.body, h.first, s.sealed && h.number > 0 || h.signed != nil
	if !s.live {
		if err := checkMode(f); err != nil {
			return fmt.Errorf("open audit log: %w", err)
		}
	}
	return nil
}

func (s *scanner) close() {
	if s.file != nil {
		s.file.Close()
	}
}

// advance goes to the next segment.
func (s *scanner) advance() error {
	if s.leave != nil {
		if err := s.leave(); err != nil {
			return err
		}
	}
	number, index := s.head.number, s.index
	s.passed += s.off
	err := s.open(number + 1)
	if errors.Is(err, os.ErrNotExist) {
		err = s.damage(fmt.Errorf("segment %d, which follows, is missing: %w", number+1, err))
	}
	if err != nil {
		return err
	}
	if s.head.id != s.id {
		return s.damage(errors.New("the segment is of another log"))
	}
	if s.head.first != index {
		first := s.head.first
		s.index = index
		return s.damage(fmt.Errorf("a segment that begins with entry %d is here", first))
	}
	if s.enter != nil {
		return s.enter()
	}
	return nil
}

// next returns the batch at s.off and steps over it. The payload is valid
// until the next call. Where the whole batches end, the error is io.EOF; at a
// segment that is pruned it is errPruned.
func (s *scanner) next() (batchHeader, []byte, error) {
	for {
		if s.head.pruned != nil {
			return batchHeader{}, nil, errPruned
		}
		h, payload, err := s.lookAgain()
		if err == io.EOF && !s.isLast() {
			// Once there is a next segment, this one has all its batches.
			if err = s.follow(); err == nil {
				if h, payload, err = s.look(); err == io.EOF {
					err = s.unsealed()
				}
			}
		}
		switch {
		case err == nil:
			s.step(&h)
			return h, payload, nil
		case err == errSealed:
			s.off += sealSize
			if s.isLast() {
				return batchHeader{}, nil, io.EOF
			}
		case err != errUnsealed:
			return batchHeader{}, nil, err
		}
		if err := s.advance(); err != nil {
			return batchHeader{}, nil, err
		}
	}
}

// isLast reports whether the scanner is to stop at the end of this segment.
func (s *scanner) isLast() bool { return s.last != nil && *s.last == s.head.number }

// follow returns nil where another segment follows, io.EOF where none does.
func (s *scanner) follow() error {
	numbers, err := segments(s.dir)
	if err != nil {
		return err
	}
	numbers = slices.DeleteFunc(numbers, func(n uint32) bool { return n <= s.head.number })
	if len(numbers) == 0 {
		return io.EOF
	}
	if numbers[0] != s.head.number+1 {
		return s.damage(fmt.Errorf("segment %d is missing, and segment %d is there", s.head.number+1, numbers[0]))
	}
	return nil
}

// unsealed returns errUnsealed for a segment that another one follows and that
// has no seal yet.
func (s *scanner) unsealed() error {
	if s.torn > sealSize {
		return s.damage(errors.New("the batch is not what was written, and another segment follows"))
	}
	s.loose, s.sealRoot = s.off, nil
	return errUnsealed
}

// lookAgain looks at s.off. A writer may have been half-way in what was read.
// If so, another look shows more; a few are enough, because a writer is never
// slower than the copy of one batch, and one where a later batch is there.
func (s *scanner) lookAgain() (h batchHeader, payload []byte, err error) {
	for look := 0; ; look++ {
		s.later = false
		h, payload, err = s.look()
		if err == nil || err == errSealed || !s.live || look == 3 || s.later && look == 1 || err == io.EOF && s.torn == 0 {
			return h, payload, err
		}
		time.Sleep(time.Millisecond)
	}
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

// header reads the header of the batch at s.off. At the seal of the segment the
// error is errSealed.
func (s *scanner) header() (batchHeader, [headerSize]byte, error) {
	var b [headerSize]byte
	if _, err := s.readAt(b[:], s.off); err != nil {
		return batchHeader{}, b, err
	}
	h, ok := decodeBatchHeader(b[:], s.id)
	if !ok && isFrame(b[:], s.id) && string(b[:8]) == sealMagic {
		return batchHeader{}, b, s.seal()
	}
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
	return h, b, s.tighten()
}

// seal checks the seal at s.off, and returns errSealed if it is good.
func (s *scanner) seal() error {
	b := make([]byte, sealSize)
	if _, err := s.readAt(b, s.off); err != nil {
		return err
	}
	if string(b[headerSize:]) != batchTrailer {
		return s.stop(b[sealSize-1] == 0 || sectorLost(b, s.off), "the seal of the segment is not what was written")
	}
	if string(b) != string(sealOf(s.id, s.head.number, s.index, tlog.Hash(b[24:56]))) {
		return s.damage(errors.New("the seal of another segment is here"))
	}
	root := tlog.Hash(b[24:56])
	last, _, err := s.tail(s.off + sealSize)
	if err != nil {
		return err
	}
	if last >= 0 {
		return s.damage(errors.New("something follows the seal of the segment"))
	}
	info, err := s.file.Stat()
	if err != nil {
		return err
	}
	if err := s.tighten(); err != nil {
		return err
	}
	if info.Size() > s.off+sealSize {
		s.loose = s.off
	}
	s.sealRoot = &root
	return errSealed
}

// tighten makes sure, before the first batch of a segment is believed, that the
// segment before it is sealed and ends there.
func (s *scanner) tighten() error {
	if s.loose == 0 {
		return nil
	}
	f, h, err := openSegment(s.dir, s.head.number-1)
	if err != nil {
		return err
	}
	defer f.Close()
	b := make([]byte, sealSize+1)
	n, err := f.ReadAt(b, s.loose)
	if err != nil && err != io.EOF {
		return err
	}
	if h.pruned == nil && (n != sealSize || !isFrame(b, s.id) || string(b[:8]) != sealMagic || string(b[headerSize:sealSize]) != batchTrailer) {
		return &DamageError{Path: f.Name(), Segment: h.number, Offset: s.loose, Index: s.head.first,
			Problem: errors.New("the next segment has entries, and this one does not end with its seal here")}
	}
	s.loose = 0
	return nil
}

// skip steps over the batch at s.off without reading its payload, and reports
// whether it did. It does not step over a batch with entries from index from,
// nor over the end of a segment.
func (s *scanner) skip(from uint64) bool {
	if s.index >= from || s.head.pruned != nil {
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
	last, later, err := s.tail(s.off)
	if err != nil {
		return err
	}
	if s.later = later >= 0; s.later {
		return s.damage(fmt.Errorf("%s, and a later one is at offset %d", problem, later))
	}
	if last >= s.off+headerSize && !lost {
		return s.damage(errors.New(problem))
	}
	s.torn = max(0, last+1-s.off)
	return io.EOF
}

// tail looks at everything from off: where the last byte is that is not zero,
// and where a batch header or a seal is behind it; -1 where there is none.
func (s *scanner) tail(from int64) (last, later int64, err error) {
	const chunk = 32 << 10
	if s.chunk == nil {
		s.chunk = make([]byte, chunk+headerSize)
	}
	b := s.chunk
	last = -1
	for off := from; ; off += chunk {
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
			if isFrame(b[at:n], s.id) && off+int64(at) > from {
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
	return &DamageError{Path: s.file.Name(), Segment: s.head.number, Offset: s.off, Index: s.index, Problem: problem}
}

// A verifier checks every batch that a scanner finds.
type verifier struct {
	*scanner
	tree tree

	batches     uint64
	lastBatch   int64                     // offset of the last batch of this segment, 0 while there is none
	check       func(signed []byte) error // of each checkpoint; nil: their signatures are not looked at
	since       *checkpoint.Checkpoint    // nil, or what the log must contain
	decode      func(index uint64) bool   // which entries are looked into; nil: all. The others are only hashed
	checkpoint  []byte                    // the last one, nil while there is none
	origin      string                    // of the checkpoints
	checkpoints uint64
	unsigned    uint64 // entries before the first signed batch
	first, last time.Time
	pruned      []Pruned
	segments    []sealedSegment
}

// newVerifier checks from where s is, which is the start of a segment.
func newVerifier(s *scanner, check func(signed []byte) error) (*verifier, error) {
	v := &verifier{scanner: s, check: check, tree: s.head.tree()}
	s.leave, s.enter = v.leave, v.enter
	if s.head.signed == nil {
		v.unsigned = s.index
		return v, nil
	}
	err := v.signed(s.head.signed)
	v.checkpoints = 0 // it is of another segment
	if err != nil {
		return nil, v.damageAt(0, s.index, err)
	}
	return v, nil
}

// enter checks what a segment says of the entries before it.
func (v *verifier) enter() error {
	h := &v.head
	if !slices.Equal(h.edge, v.tree.edge) || h.first != v.tree.size {
		return v.damageAt(0, v.index, errors.New("the segment does not follow the one before it: it begins with another tree"))
	}
	if !bytes.Equal(h.signed, v.checkpoint) {
		return v.damageAt(0, v.index, errors.New("the segment does not follow the one before it: it begins with another checkpoint"))
	}
	v.lastBatch = 0
	return nil
}

// leave checks the seal of a segment, and notes what the segment was.
func (v *verifier) leave() error {
	if v.sealRoot != nil && *v.sealRoot != v.tree.root() {
		return v.damageAt(v.off-sealSize, v.index, errors.New("the root of the tree is not the one that the seal carries"))
	}
	is := sealedSegment{number: v.head.number, first: v.head.first, end: v.index, root: v.tree.root(), pruned: v.head.pruned != nil}
	if err := is.stat(v.file); err != nil {
		return err
	}
	v.segments = append(v.segments, is)
	return nil
}

// next checks the next batch, or a whole pruned segment, and calls visit, if it
// is not nil, with each entry. It returns io.EOF as the scanner does.
func (v *verifier) next(visit func(*Entry) error) error {
	h, payload, err := v.scanner.next()
	if err == errPruned {
		return v.remains(visit)
	}
	if err == io.EOF && v.sealRoot != nil {
		if fault := v.leave(); fault != nil {
			return fault
		}
	}
	if err != nil {
		return err
	}
	at, index := v.off-frameSize(h.payload), h.first
	var refused error
	entries, signed, err := h.split(payload)
	if err != nil {
		return v.damageAt(at, index, err)
	}
	err = h.entries(entries, func(b []byte) error {
		if v.decode != nil && !v.decode(v.tree.size) {
			return v.add(tlog.RecordHash(b))
		}
		e, err := UnmarshalEntry(b)
		if err != nil {
			return err
		}
		v.seen(e.Time)
		if err := v.add(tlog.RecordHash(b)); err != nil {
			return err
		}
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

// seen takes in when an entry was.
func (v *verifier) seen(t time.Time) {
	if v.first.IsZero() {
		v.first = t
	}
	v.last = t
}

// add adds a leaf, and holds the tree against the checkpoint that it has to
// contain.
func (v *verifier) add(leaf tlog.Hash) error {
	v.tree.add(leaf)
	if c := v.since; c != nil && c.Size == v.tree.size && c.Root != v.tree.root() {
		return fmt.Errorf("the log has another root after %d entries than the checkpoint that it must contain: %w", c.Size, checkpoint.ErrProof)
	}
	return nil
}

// signed checks that the checkpoint is that of the log as it is now.
func (v *verifier) signed(signed []byte) error {
	c, err := checkpoint.Parse(signed)
	if err != nil {
		return err
	}
	if !checkpoint.OfLog(c.Origin, v.id) || c.Size != v.tree.size || c.Root != v.tree.root() {
		return fmt.Errorf("the checkpoint of %d entries of %q is not that of the batch", c.Size, c.Origin)
	}
	if v.origin != "" && v.origin != c.Origin {
		return fmt.Errorf("the checkpoint of %d entries is of %q, and those before it of %q", c.Size, c.Origin, v.origin)
	}
	v.origin = c.Origin
	if v.check != nil {
		if err := v.check(signed); err != nil {
			return fmt.Errorf("the checkpoint of %d entries: %w", c.Size, err)
		}
	}
	v.checkpoint = append(v.checkpoint[:0], signed...)
	v.checkpoints++
	return nil
}

// remains checks the pruned segment that is open, and goes to the next one.
func (v *verifier) remains(visit func(*Entry) error) error {
	if err := v.tighten(); err != nil {
		return err
	}
	r := v.head.pruned
	p := Pruned{Segment: v.head.number, First: v.index, Entries: r.entries, From: r.first, To: r.last, At: r.at}
	var wrong error
	err := v.scanner.remains(func(leaf tlog.Hash) {
		if wrong == nil {
			wrong = v.add(leaf)
		}
	}, func(e *Entry) error {
		p.Kept++
		if visit == nil {
			return nil
		}
		return visit(e)
	})
	if err != nil {
		return err
	}
	if wrong == nil && v.tree.root() != r.root {
		wrong = errors.New("the hashes that are left of the pruned segment do not lead to the root that it had")
	}
	if wrong == nil && r.signed != nil {
		wrong = v.signed(r.signed)
	}
	if wrong != nil {
		return v.damageAt(0, p.First, wrong)
	}
	if r.entries > 0 {
		v.seen(r.first)
		v.last = r.last
	}
	v.sealed = v.sealed || r.signed != nil
	v.unsigned, v.batches = max(v.unsigned, r.bare), v.batches+r.batches
	v.pruned = append(v.pruned, p)
	if v.isLast() {
		return io.EOF
	}
	return v.advance()
}

func (v *verifier) damageAt(off int64, index uint64, problem error) error {
	return &DamageError{Path: v.file.Name(), Segment: v.head.number, Offset: off, Index: index, Problem: problem}
}
