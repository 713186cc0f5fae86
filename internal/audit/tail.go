package audit

import (
	"io"

	"golang.org/x/mod/sumdb/tlog"
)

// A Tail reads a log that grows, each time from where it stopped. It is for one
// goroutine.
type Tail struct {
	s    *scanner
	from uint64
}

// OpenTail opens the log in dir before the entry with that index, which need
// not be there yet.
func OpenTail(dir string, from uint64) (*Tail, error) {
	s, err := openLogAt(dir, from)
	if err != nil {
		return nil, err
	}
	for s.skip(from) {
	}
	return &Tail{s, from}, nil
}

// Close gives the file back.
func (t *Tail) Close() { t.s.close() }

// Next calls fn with the entries that it has not shown yet, up to, and without,
// that with the index end, which must be what Log.Size has said: so nothing is
// shown that is not acknowledged. Of segments that are pruned it shows the
// entries that were kept. Like Read it does not check that entries are genuine.
// After an error of fn, which it returns, the Tail is of no more use.
func (t *Tail) Next(end uint64, fn func(*Entry) error) error { return t.next(end, nil, fn) }

// next is Next. leaf, if it is not nil, is called with the hash of each entry,
// those that are pruned too.
func (t *Tail) next(end uint64, leaf func(tlog.Hash), fn func(*Entry) error) error {
	var refused error
	show := func(e *Entry) error {
		if e.Index < t.from || e.Index >= end {
			return nil
		}
		t.from = e.Index + 1
		refused = fn(e)
		return refused
	}
	for t.s.index < end {
		h, payload, err := t.s.next()
		switch {
		case err == io.EOF:
			return nil
		case err == errPruned:
			if err = t.s.remains(t.leaves(leaf), show); err == nil {
				err = t.s.advance()
			}
		case err == nil:
			err = readBatch(t.s, &h, payload, func(e *Entry) error {
				if leaf != nil && e.Index >= t.from {
					b, err := e.MarshalBinary()
					if err != nil {
						return err
					}
					leaf(tlog.RecordHash(b))
				}
				return show(e)
			})
		}
		if refused != nil {
			return refused
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// leaves is leaf from the entry from on, of a segment that is pruned.
func (t *Tail) leaves(leaf func(tlog.Hash)) func(tlog.Hash) {
	index, from := t.s.index, t.from
	return func(h tlog.Hash) {
		if leaf != nil && index >= from {
			leaf(h)
		}
		index++
	}
}
