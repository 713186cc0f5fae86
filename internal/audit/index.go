package audit

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"hash/maphash"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/mod/sumdb/tlog"
)

// An Index finds the entries that a Filter picks without reading all of the
// log. It is derived from the log, belongs to one process, and ends with it: its
// file has no name, so nobody can put another in its place. It never says
// anything about an entry but where to look: what it points to is read from the
// log and matched, and where it has nothing, or is damaged, the log is read. So
// an answer is always that of a full scan, sooner.
//
// The file has a record for each block of some 256 entries: where it is in the
// log, when it was, and a Bloom filter of what its entries are about, about four
// bytes for an entry. In memory there is one record. Its methods may be called
// from any goroutine.
type Index struct {
	log  *Log
	seed maphash.Seed

	// turn is taken for an update, and guards the two fields below.
	turn  sync.Mutex
	fresh block // the block that is being gathered
	at    place // behind it

	mu     sync.Mutex // guards the fields below
	file   *os.File   // nil until there is something to write
	blocks int64      // records in file
	end    place      // behind the last block
}

// A place is a batch in the log.
type place struct {
	segment uint32
	off     int64
	index   uint64 // of its first entry
}

const (
	blockEntries = 256
	blockSize    = 1024
	bloomSize    = blockSize - 56
	bloomBits    = 8 * bloomSize
	bloomHashes  = 4
)

// A block says what some batches that follow each other are about.
type block struct {
	start       place
	count       uint64 // entries; 0 while it is being gathered
	timed       bool   // first and last are set
	first, last int64  // the earliest and the latest time, in seconds
	bloom       [bloomSize]byte
}

// NewIndex returns the index of a log, with nothing in it.
func NewIndex(l *Log) *Index { return &Index{log: l, seed: maphash.MakeSeed()} }

// Close gives the file back. The index is empty then, and can be used again.
func (x *Index) Close() error {
	x.turn.Lock()
	defer x.turn.Unlock()
	x.at, x.fresh = place{}, block{}
	x.mu.Lock()
	defer x.mu.Unlock()
	var err error
	if x.file != nil {
		err = x.file.Close()
	}
	x.file, x.blocks, x.end = nil, 0, place{}
	return err
}

// Update takes in what the log has by now, unless that is being done already.
func (x *Index) Update(ctx context.Context) error {
	if !x.turn.TryLock() {
		return nil
	}
	defer x.turn.Unlock()
	size := x.log.Size()
	if x.at.index >= size {
		return nil
	}
	s, err := openAt(x.log.Dir(), x.at)
	if err != nil {
		return err
	}
	defer s.close()
	for s.index < size {
		if err := ctx.Err(); err != nil {
			return err
		}
		if !x.fresh.timed {
			x.fresh.start = place{s.head.number, s.off, s.index}
		}
		err := s.entries(func(e *Entry) error { x.take(e); return nil })
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		x.fresh.count = s.index - x.fresh.start.index
		x.at = place{s.head.number, s.off, s.index}
		if x.fresh.count >= blockEntries {
			if err := x.write(); err != nil {
				return fmt.Errorf("index of the audit log: %w", err)
			}
		}
	}
	return nil
}

// take notes what an entry is about.
func (x *Index) take(e *Entry) {
	t, b := e.Time.Unix(), &x.fresh
	if !b.timed {
		b.first, b.last, b.timed = t, t, true
	}
	b.first, b.last = min(b.first, t), max(b.last, t)
	each(e, func(field byte, value []byte) {
		x.bits(field, value, func(at uint64) bool { b.bloom[at/8] |= 1 << (at % 8); return true })
	})
}

// each calls fn with everything of an entry that can be asked for by its value.
func each(e *Entry, fn func(field byte, value []byte)) {
	for _, f := range []struct {
		tag   byte
		value string
	}{{tagCaller, e.Caller}, {tagAction, e.Action}, {tagCategory, e.Category}, {tagKeyVersion, e.KeyVersion}, {tagRequestID, e.RequestID},
		{tagContentID, string(e.ContentID)}, {tagKID, string(e.KID)}} {
		if f.value != "" {
			fn(f.tag, []byte(f.value))
		}
	}
	if e.Outcome != 0 {
		fn(tagOutcome, []byte{byte(e.Outcome)})
	}
	for i := range e.Refs {
		fn(tagRef, refValue(&e.Refs[i]))
	}
}

func refValue(r *Ref) []byte {
	b := binary.BigEndian.AppendUint32(append([]byte(nil), r.MAC[:]...), r.KeyVersion)
	return append(b, r.Kind...)
}

// bits calls fn with the bits of a value, until it returns false, and reports
// whether it never did.
func (x *Index) bits(field byte, value []byte, fn func(at uint64) bool) bool {
	h := maphash.Bytes(x.seed, append(value, field))
	step := h>>32 | 1
	for range bloomHashes {
		if !fn(h % bloomBits) {
			return false
		}
		h += step
	}
	return true
}

// mayHave reports whether a block can have an entry that f picks.
func (x *Index) mayHave(b *block, f *Filter) bool {
	if !f.Since.IsZero() && b.last < f.Since.Unix() || !f.Before.IsZero() && b.first > f.Before.Unix() {
		return false
	}
	has := func(field byte, value []byte) bool {
		return x.bits(field, value, func(at uint64) bool { return b.bloom[at/8]&(1<<(at%8)) != 0 })
	}
	all := true
	wanted := Entry{Caller: f.Caller, Action: f.Action, Category: f.Category, KeyVersion: f.KeyVersion, RequestID: f.RequestID,
		Outcome: f.Outcome, ContentID: f.ContentID, KID: f.KID}
	each(&wanted, func(field byte, value []byte) {
		all = all && has(field, value)
	})
	one := len(f.Refs) == 0
	for i := range f.Refs {
		one = one || has(tagRef, refValue(&f.Refs[i]))
	}
	return all && one
}

// write ends the block that is being gathered. The caller has the turn.
func (x *Index) write() error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.file == nil {
		path := filepath.Join(x.log.Dir(), "index.tmp")
		f, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_RDWR, 0o600)
		if err != nil {
			return err
		}
		if err := os.Remove(path); err != nil {
			return errors.Join(err, f.Close())
		}
		x.file = f
	}
	if _, err := x.file.WriteAt(x.fresh.encode(), x.blocks*blockSize); err != nil {
		x.at, x.fresh = x.end, block{} // again with the next update
		return err
	}
	x.blocks++
	x.end, x.fresh = x.at, block{}
	return nil
}

func (b *block) encode() []byte {
	out := make([]byte, 4, blockSize)
	out = binary.BigEndian.AppendUint32(out, b.start.segment)
	for _, v := range []uint64{uint64(b.start.off), b.start.index, b.count, uint64(b.first), uint64(b.last), 0} {
		out = binary.BigEndian.AppendUint64(out, v)
	}
	out = append(out, b.bloom[:]...)
	binary.BigEndian.PutUint32(out, crc32.Checksum(out[4:], crcTable))
	return out
}

func (b *block) decode(in []byte) error {
	if crc32.Checksum(in[4:], crcTable) != binary.BigEndian.Uint32(in) {
		return errors.New("a record of the index is damaged")
	}
	n := func(i int) uint64 { return binary.BigEndian.Uint64(in[8+8*i:]) }
	b.start = place{binary.BigEndian.Uint32(in[4:]), int64(n(0)), n(1)}
	b.count, b.first, b.last = n(2), int64(n(3)), int64(n(4))
	copy(b.bloom[:], in[56:])
	return nil
}

// Find calls fn with every acknowledged entry from index from that f picks, in
// order, until there are no more or fn returns an error, which Find returns. The
// entry is fn's to keep.
func (x *Index) Find(ctx context.Context, from uint64, f *Filter, fn func(*Entry) error) error {
	if err := x.Update(ctx); err != nil {
		if ctx.Err() != nil {
			return err
		}
		x.log.log.Warn("audit log: the index cannot be brought up to date; the rest is searched without it", "error", err)
	}
	size := x.log.Size()
	look := finder{index: x, from: from, size: size, ctx: ctx, fn: func(e *Entry) error {
		if f.Match(e) {
			return fn(e)
		}
		return nil
	}}
	defer look.close()
	x.mu.Lock()
	blocks, end, file := x.blocks, x.end, x.file
	x.mu.Unlock()
	raw := make([]byte, 64*blockSize)
	for at := int64(0); at < blocks; at += 64 {
		part := raw[:min(64, blocks-at)*blockSize]
		if _, err := file.ReadAt(part, at*blockSize); err != nil {
			return look.without(err)
		}
		for ; len(part) > 0; part = part[blockSize:] {
			var b block
			if err := b.decode(part[:blockSize]); err != nil {
				return look.without(err)
			}
			if b.start.index+b.count <= look.from || !x.mayHave(&b, f) {
				continue
			}
			if err := look.read(b.start, b.start.index+b.count); err != nil {
				return err
			}
		}
	}
	return look.read(end, size)
}

// A finder reads parts of the log, one behind the other.
type finder struct {
	index *Index
	ctx   context.Context
	s     *scanner
	from  uint64 // entries before it are not looked at (any more)
	size  uint64
	fn    func(*Entry) error
}

func (r *finder) close() {
	if r.s != nil {
		r.s.close()
	}
}

// without reads the rest of the log where the index is damaged, and throws the
// index away: the next update makes it anew.
func (r *finder) without(cause error) error {
	r.index.log.log.Warn("audit log: the index is made anew", "error", cause)
	if err := r.index.Close(); err != nil {
		return err
	}
	return r.read(place{}, r.size)
}

// read looks at the entries from a place up to, and without, index end.
func (r *finder) read(at place, end uint64) error {
	end = min(end, r.size)
	if end <= r.from {
		return nil
	}
	if r.s == nil || r.s.index != at.index {
		r.close()
		s, err := openAt(r.index.log.Dir(), at)
		if err != nil {
			return err
		}
		r.s = s
	}
	var refused error
	for r.s.index < end && r.s.index < r.size {
		if err := r.ctx.Err(); err != nil {
			return err
		}
		err := r.s.entries(func(e *Entry) error {
			if e.Index < r.from || e.Index >= r.size {
				return nil
			}
			r.from = e.Index + 1
			refused = r.fn(e)
			return refused
		})
		if refused != nil {
			return refused
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		r.from = max(r.from, min(r.s.index, r.size))
	}
	return nil
}

// openAt opens the log at a place that was seen before. Where its segment was
// pruned meanwhile, that is at the segment's beginning.
func openAt(dir string, at place) (*scanner, error) {
	s := &scanner{dir: dir, live: true}
	if err := s.open(at.segment); err != nil {
		return nil, err
	}
	s.id = s.head.id
	if at.off > 0 && s.head.pruned == nil {
		s.off, s.index = at.off, at.index
	}
	return s, nil
}

// entries calls fn with the entries of the next batch, or of the whole segment
// where it is pruned.
func (s *scanner) entries(fn func(*Entry) error) error {
	h, payload, err := s.next()
	if err == errPruned {
		if err = s.remains(func(tlog.Hash) {}, fn); err == nil {
			err = s.advance()
		}
		return err
	}
	if err != nil {
		return err
	}
	return readBatch(s, &h, payload, fn)
}

// UpdateEvery brings the index up to date at that interval until ctx ends, so
// that questions find it so.
func (x *Index) UpdateEvery(ctx context.Context, interval time.Duration) {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		if err := x.Update(ctx); err != nil && ctx.Err() == nil {
			x.log.log.Warn("audit log: the index cannot be brought up to date", "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}
