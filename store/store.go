// Package store keeps the records of custody in one bbolt file. It decides
// how records rest (record.go), how they are found (keys.go), which files it
// opens and which it refuses (file.go), and how waiting updates share one
// durable transaction (update.go).
//
// It leaves to package custodian what a record means and whether it is
// genuine: bodies and MACs are opaque here, but for the content key's body,
// which names what the indexes are made of.
package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/keycustody/custodian/custodian"
)

// Options of Create, Open and Migrate. The zero Options are the defaults.
type Options struct {
	// Timeout bounds the wait for the file's lock; zero means one second.
	Timeout time.Duration
	// InitialMmapSize is how much address space is mapped at once, in bytes;
	// zero means 8 GiB where an int has 64 bits. As long as the file is
	// smaller it is never mapped again, so that a long read (a backup) and a
	// growing write do not wait for each other. It costs no memory.
	InitialMmapSize int
	// Log hears of what an operator must look at: damaged pages, and a store
	// that has stopped writing. Nil means nobody.
	Log *slog.Logger
}

func (o Options) withDefaults() Options {
	if o.Timeout == 0 {
		o.Timeout = time.Second
	}
	if o.InitialMmapSize == 0 && ^uint(0)>>63 == 1 {
		o.InitialMmapSize = 1 << 33
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return o
}

// A Store is a custodian.Store in one bbolt file. One process has it open at
// a time. It is safe for concurrent use.
//
// A disk that is full fails the update that met it, and later updates work
// once there is space. After any other error of a write or a sync nobody
// knows what the file holds: the store then refuses all updates until it is
// opened again, and also all reads if the update that failed has become
// visible to them.
type Store struct {
	path string
	db   *bolt.DB
	file *os.File // owned by db
	log  *slog.Logger

	// writer holds one token: who has it may run write transactions.
	writer chan struct{}
	mu     sync.Mutex
	queue  []*update // guarded by mu; updates that no transaction has taken

	broken    atomic.Pointer[stop] // set once: no more updates
	unsettled atomic.Bool          // set once: no more reads either
	wedged    atomic.Bool          // set once: bbolt's locks cannot be trusted
	closed    atomic.Bool
}

// A stop is why a store no longer writes.
type stop struct{ err error }

var _ custodian.Store = (*Store)(nil)

// View runs f in a read transaction.
func (s *Store) View(ctx context.Context, f func(custodian.Tx) error) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("read store: %w", err)
	}
	if s.unsettled.Load() {
		return s.broken.Load().err
	}
	// A damaged page makes bbolt touch addresses that are not there; the
	// guards in tx turn such a fault into an error, if it is a panic.
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	t, err := s.begin(false)
	if err != nil {
		return err
	}
	defer func() { _ = t.bolt.Rollback() }() // a read transaction has nothing to lose
	return f(t)
}

// begin starts a transaction. Whoever begins one has called SetPanicOnFault.
func (s *Store) begin(writable bool) (t *tx, err error) {
	t = &tx{store: s, writable: writable}
	defer func() {
		if p := recover(); p != nil {
			s.wedge(p)
			err = s.broken.Load().err
		}
	}()
	t.bolt, err = s.db.Begin(writable)
	if err != nil {
		return nil, fmt.Errorf("store %s: begin: %w: %w", s.path, custodian.ErrStoreUnavailable, err)
	}
	return t, nil
}

// Backup writes a copy of the store as it is at the beginning of the call: a
// file that Open accepts. A slow w keeps old pages from being reused, so the
// file may grow meanwhile. An error of w is returned as it is, wrapped.
func (s *Store) Backup(ctx context.Context, w io.Writer) error {
	return s.View(ctx, func(v custodian.Tx) error {
		to := &checkedWriter{ctx: ctx, w: w}
		t := v.(*tx)
		if err := t.writeTo(to); err != nil {
			if to.err != nil {
				return fmt.Errorf("back up store %s: %w", s.path, to.err)
			}
			return fmt.Errorf("back up store %s: %w: %w", s.path, custodian.ErrStoreUnavailable, err)
		}
		return nil
	})
}

// A checkedWriter ends with its context and remembers its own error, which
// bbolt would flatten into text.
type checkedWriter struct {
	ctx context.Context
	w   io.Writer
	err error
}

func (c *checkedWriter) Write(b []byte) (int, error) {
	if c.err = c.ctx.Err(); c.err != nil {
		return 0, c.err
	}
	n, err := c.w.Write(b)
	c.err = err
	return n, err
}

// Stats describes the store.
func (s *Store) Stats(ctx context.Context) (custodian.StoreStats, error) {
	stats := custodian.StoreStats{Engine: "bbolt", Path: s.path, Schema: Schema}
	err := s.View(ctx, func(v custodian.Tx) error {
		t := v.(*tx)
		c, err := t.loadCounters()
		if err != nil {
			return err
		}
		stats.Bytes = t.bolt.Size()
		stats.ContentKeys = c.contentKeys
		stats.Sequence = c.sequence
		return nil
	})
	return stats, err
}

// Close waits for open transactions and closes the file.
func (s *Store) Close() error {
	if s.closed.Swap(true) {
		return nil
	}
	if s.wedged.Load() {
		return fmt.Errorf("close store %s: left open, it panicked in a transaction: %w", s.path, custodian.ErrStoreUnavailable)
	}
	if err := s.db.Close(); err != nil {
		return fmt.Errorf("close store %s: %w: %w", s.path, custodian.ErrStoreUnavailable, err)
	}
	return nil
}

// ErrStopped means that the store no longer writes after an earlier error,
// and must be opened again. It comes with custodian.ErrStoreUnavailable.
var ErrStopped = errors.New("the store has stopped after an error of its device")

// stop ends all further updates because of err.
func (s *Store) stop(err error) {
	why := fmt.Errorf("store %s: %w: %w: %w", s.path, custodian.ErrStoreUnavailable, ErrStopped, err)
	if s.broken.CompareAndSwap(nil, &stop{why}) {
		s.log.Error("store stopped", "path", s.path, "error", err)
	}
}
