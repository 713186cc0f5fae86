package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"runtime/debug"
	"slices"
	"syscall"

	"github.com/keycustody/custodian/custodian"
)

// One transaction takes updates until it has made this many writes or run
// this many updates, so that those who wait for it wait for a bounded time.
const (
	maxWrites  = 8192
	maxUpdates = 256
)

// An update is one call of Update. Whoever runs it closes done, after which
// its result is the caller's.
type update struct {
	ctx  context.Context
	f    func(custodian.UpdateTx) error
	done chan struct{}

	err      error
	panicked any
}

// errEnded is what an update hears whose transaction was cut off because a
// function of another one ended the goroutine that ran them (runtime.Goexit).
var errEnded = errors.New("the goroutine of the transaction was ended")

// Update runs f in a write transaction, durable when it returns nil. Updates
// that wait while another is made durable share the next transaction: its
// cost is two syncs however many they are. They run one after the other, each
// sees those before it, and one that fails takes back its own writes only. f
// may run on another goroutine than the caller's.
//
// A context that ends before f has begun ends the wait; later it is too late.
func (s *Store) Update(ctx context.Context, f func(custodian.UpdateTx) error) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("update store: %w", err)
	}
	u := &update{ctx: ctx, f: f, done: make(chan struct{})}
	s.mu.Lock()
	s.queue = append(s.queue, u)
	s.mu.Unlock()

	select {
	case s.writer <- struct{}{}:
		s.lead(u)
	case <-u.done:
	case <-ctx.Done():
		if s.withdraw(u) {
			return fmt.Errorf("update store: %w", ctx.Err())
		}
		<-u.done
	}
	if u.panicked != nil {
		panic(u.panicked)
	}
	return u.err
}

// withdraw takes u out of the queue, and reports false if a transaction has
// taken it already.
func (s *Store) withdraw(u *update) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := slices.Index(s.queue, u)
	if i < 0 {
		return false
	}
	s.queue = slices.Delete(s.queue, i, i+1)
	return true
}

// next takes the first waiting update, nil if there is none.
func (s *Store) next() *update {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.queue) == 0 {
		return nil
	}
	u := s.queue[0]
	s.queue[0] = nil
	s.queue = s.queue[1:]
	return u
}

// lead runs transactions until u is done. The caller holds the writer's
// token, which lead gives back: a waiting update is then the next to lead.
func (s *Store) lead(u *update) {
	defer func() { <-s.writer }()
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	for {
		select {
		case <-u.done:
			return
		default:
			s.transact()
		}
	}
}

// transact runs one transaction with the updates that wait.
func (s *Store) transact() {
	var batch []*update
	err := errEnded
	var t *tx
	defer func() {
		// t is nil where it did not begin, and closed where it committed.
		s.abandon(t)
		for _, u := range batch {
			if err != nil {
				u.err = err
			}
			close(u.done)
		}
	}()
	t, beginErr := s.beginUpdate()
	kept := false
	for len(batch) < maxUpdates && (t == nil || t.writes < maxWrites) {
		u := s.next()
		if u == nil {
			break
		}
		batch = append(batch, u)
		if beginErr == nil && t.failed == nil {
			kept = t.run(u) || kept
		}
	}
	switch {
	case beginErr != nil:
		err = beginErr
	case t.failed != nil:
		// bbolt's nodes in memory are not to be trusted, the file is as it was.
		err = t.failed
	case kept:
		err = s.commit(t)
	default:
		err = nil
	}
}

// beginUpdate begins a write transaction unless the store has stopped.
func (s *Store) beginUpdate() (*tx, error) {
	if stop := s.broken.Load(); stop != nil {
		return nil, stop.err
	}
	t, err := s.begin(true)
	if err != nil {
		return nil, err
	}
	return t, nil
}

// abandon ends a transaction that is not committed; after a commit it does
// nothing.
func (s *Store) abandon(t *tx) {
	if t == nil {
		return
	}
	defer func() {
		if p := recover(); p != nil {
			s.wedge(p)
		}
	}()
	_ = t.bolt.Rollback() // "closed" after a commit
}

// run runs one update in the transaction and reports whether it wrote
// something that is to stay.
func (t *tx) run(u *update) (kept bool) {
	if u.err = u.ctx.Err(); u.err != nil {
		u.err = fmt.Errorf("update store: %w", u.err)
		return false
	}
	t.undo = t.undo[:0]
	t.counted = false
	var before *counters
	if t.counters != nil {
		c := *t.counters
		before = &c
	}
	finished := false
	defer func() {
		if finished && u.err == nil {
			return
		}
		if !finished {
			u.err = errEnded
			u.panicked = recover() // nil if f ended the goroutine
		}
		// Without a copy nobody had read them, and they are read again.
		t.counters = before
		if err := t.revert(); err != nil && t.failed == nil {
			t.failed = err
		}
	}()
	u.err = u.f(t)
	finished = true
	return u.err == nil && len(t.undo) > 0
}

// commit makes the transaction durable. If it cannot, nothing of it stays,
// and the store stops where the file may not be what bbolt believes.
func (s *Store) commit(t *tx) error {
	if err := t.saveCounters(); err != nil {
		return err
	}
	before, err := s.size()
	if err != nil {
		return err
	}
	id := t.bolt.ID()
	err = t.commitGuarded()
	if err == nil {
		return nil
	}
	err = fmt.Errorf("store %s: commit: %w: %w", s.path, custodian.ErrStoreUnavailable, err)
	if s.wedged.Load() || !s.retryable(err, before) {
		s.stop(err)
		s.settle(id)
	}
	return err
}

// retryable reports whether after err the file holds what it held before, and
// a later commit may succeed. That is so where a page could not be written
// for want of space, and where the file could not be made longer, which bbolt
// reports in words only: then nothing was written and the size is as before.
func (s *Store) retryable(err error, before int64) bool {
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		after, sizeErr := s.size()
		return sizeErr == nil && after == before
	}
	var write *fs.PathError // of a write; a sync returns the bare number
	full := errno == syscall.ENOSPC || errno == syscall.EDQUOT || errno == syscall.EFBIG
	return full && errors.As(err, &write)
}

func (s *Store) size() (int64, error) {
	info, err := s.file.Stat()
	if err != nil {
		return 0, fmt.Errorf("store %s: %w: %w", s.path, custodian.ErrStoreUnavailable, err)
	}
	return info.Size(), nil
}

// settle also ends all reads if they see what the failed transaction wrote:
// it is not durable, and a key read from it could be gone after a crash.
func (s *Store) settle(failed int) {
	if s.wedged.Load() {
		s.unsettled.Store(true)
		return
	}
	t, err := s.begin(false)
	if err != nil {
		s.unsettled.Store(true)
		return
	}
	if t.bolt.ID() >= failed {
		s.unsettled.Store(true)
	}
	_ = t.bolt.Rollback() // a read transaction has nothing to lose
}

// commitGuarded is bbolt's Commit, a panic of which is an error that wedges
// the store: bbolt may hold any of its locks.
func (t *tx) commitGuarded() (err error) {
	defer func() {
		if p := recover(); p != nil {
			t.store.wedge(p)
			err = fmt.Errorf("panic: %v", p)
		}
	}()
	return t.bolt.Commit()
}

// wedge stops the store for good after bbolt panicked with its locks held.
func (s *Store) wedge(p any) {
	s.wedged.Store(true)
	s.unsettled.Store(true)
	s.log.Error("bbolt panicked", "path", s.path, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
	s.stop(fmt.Errorf("panic: %v", p))
}
