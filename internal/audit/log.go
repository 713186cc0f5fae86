package audit

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/mod/sumdb/tlog"
	"golang.org/x/sys/unix"
)

var (
	// ErrBlocked means that nothing was written and nothing may be released.
	// Where the reason is a full disk, the log goes on by itself when there
	// is room again. After a write or sync that failed, or when the file was
	// taken away, it stays blocked until it is opened again.
	ErrBlocked = errors.New("audit log is blocked")

	// ErrFull comes with ErrBlocked where the reason is that there is no room.
	ErrFull = errors.New("no room on the disk, or within the limit, for the audit log")

	// ErrInUse means that another process, or another Log, has the log open.
	ErrInUse = errors.New("another writer has it open")
)

const (
	growth          = 4 << 20 // allocated at a time
	defaultReserve  = 8 << 20
	defaultDenials  = 100
	maxAppend       = 8 << 20  // bytes of one Append
	maxGather       = 4 << 20  // bytes of a batch, unless one Append is longer
	maxWaiting      = 16 << 20 // bytes of all Appends that wait
	maxWaitingCalls = 1 << 14
	leastRoom       = 4 << 10 // below it, the reserve counts as exhausted
	flushEntries    = 256     // counted denials in one batch

	defaultSegment = 64 << 20
)

// Options says how a log is kept. The zero value is good.
type Options struct {
	Now func() time.Time // time.Now where nil

	// Reserve is the room, in bytes, that only entries with the outcome
	// Allowed or with Priority may use; 8 MiB where 0.
	Reserve int64

	// DenialsPerSecond is how many denials, and calls that failed, are written for each caller before
	// they are only counted; 100 where 0.
	DenialsPerSecond int

	// Visit is called by Open with every entry, in order.
	Visit func(*Entry) error

	// SegmentSize is how many bytes a file of the log has before the next one
	// begins; 64 MiB where 0. It may have one batch more, and goes on where a
	// new one cannot be made.
	SegmentSize int64

	// Limit is how many bytes all files of the log may have, what is allocated
	// ahead included; as many as the file system has where 0.
	Limit int64

	Log *slog.Logger // nothing is logged where nil

	// WrapFile, where it is set, is put between the log and its file. Tests
	// use it to make the file fail.
	WrapFile func(File) File
}

func (o *Options) defaults() {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Reserve <= 0 {
		o.Reserve = defaultReserve
	}
	if o.DenialsPerSecond <= 0 {
		o.DenialsPerSecond = defaultDenials
	}
	if o.SegmentSize <= 0 {
		o.SegmentSize = defaultSegment
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
}

func (o *Options) wrap(f *os.File) File {
	if o.WrapFile == nil {
		return diskFile{f}
	}
	return o.WrapFile(diskFile{f})
}

func newLogID() (id logID) {
	rand.Read(id[:]) // never fails
	return id
}

// A Receipt says where an entry is.
type Receipt struct {
	Index    uint64
	LeafHash [32]byte // RFC 6962 hash of the canonical encoding

	// Checkpoint is a signed root that covers the entry, empty where the log
	// has no Signer. It is not to be changed: other receipts have it too.
	Checkpoint []byte

	// Coalesced means that the entry, a denial, was counted and not written;
	// there is no Index and no LeafHash.
	Coalesced bool
}

// Stats is how a log is doing.
type Stats struct {
	Entries uint64 // in the log
	Bytes   int64  // written to the files, with headers
	Free    int64  // bytes that are allocated and not written

	Segments int    // files of the log
	Pruned   uint64 // entries in those that are pruned

	// Limit is how many bytes the log may have: what Options say, or what the
	// file system has for it. Watermark is 80 or 95 where Bytes are that many
	// percent of it, else 0.
	Limit     int64
	Watermark int

	Batches   uint64 // since it was opened, each of which cost one sync
	Coalesced uint64 // denials that were counted and not written, since it was opened
	Cut       int64  // bytes of a torn batch that were cut when it was opened

	Blocked   string // why nothing can be written; empty while something can
	Full      bool   // the reason is that there is no room
	OnReserve bool   // no room is left but the reserve, for what has priority
}

// A Log is the one writer of a log. Its methods may be called from any
// goroutine.
type Log struct {
	dir     string
	id      logID
	now     func() time.Time
	wrap    func(*os.File) File
	reserve int64
	size    int64 // of a segment
	limit   int64 // of all, 0 for none
	log     *slog.Logger
	denials *denials
	pool    sync.Pool // of *request
	cut     int64

	wake    chan struct{} // something waits
	closing chan struct{}
	done    chan struct{} // run has returned

	// Owned by the goroutine of run, once it runs.
	path  string // of the segment that is written
	os    *os.File
	lock  *os.File
	file  File
	tree  tree
	end   int64 // of the last whole batch
	alloc int64 // where the allocated room ends
	full  error // why the last allocation failed, or nil
	frame []byte
	undo  tree // before the batch that is being made

	segment  segmentHead     // the one that is written
	before   []sealedSegment // it
	sealedAt int             // which of them is to be looked at next
	bytes    int64           // of them, on disk
	pruned   uint64          // entries in those that are pruned
	seen     fileState       // of the file when we had last written to it
	avail    int64           // bytes that the file system has for us
	told     int             // the watermark that was logged
	cannot   error           // why the last rotation failed, or nil

	// sealed tells that all batches from here on are signed.
	sealed   bool
	origin   string // of the checkpoints; empty before the first
	unsigned error  // why the last batch could not be signed, or nil

	mu      sync.Mutex // guards the fields below
	queue   []*request
	spare   []*request // an empty queue, to take turns
	waiting int        // bytes in queue
	closed  bool
	latched error // stays, and wraps ErrBlocked
	stats   Stats
	place   DamageError // where the next batch goes
	root    tlog.Hash   // of what is acknowledged
	signed  []byte      // the checkpoint of what is acknowledged, if it has one
	signer  *Signer
	steps   steps
}

// A request is one Append on its way.
type request struct {
	entries  []byte // as in a payload
	n        int
	priority bool
	state    atomic.Int32

	salts, scratch []byte

	// Set by the committer before it sends on done.
	first  uint64
	leaves []tlog.Hash
	signed []byte
	err    error
	done   chan struct{} // holds one
}

// The states of a request. Whoever moves it out of waiting has it.
const (
	waiting = iota
	taken
	withdrawn
)

// Create makes an empty log in dir, which it makes if it is not there, and
// opens it. If there is a log already, the error is an os.ErrExist.
func Create(dir string, o Options) (*Log, error) {
	o.defaults()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("create audit log: %w", err)
	}
	if err := syncDir(filepath.Dir(filepath.Clean(dir))); err != nil {
		return nil, fmt.Errorf("create audit log: %w", err)
	}
	lock, err := lockDir(dir)
	if err != nil {
		return nil, err
	}
	if err := createFile(dir, &o); err != nil {
		lock.Close()
		return nil, err
	}
	return open(dir, o, lock)
}

// Open opens the log in dir for writing, after it has checked all of it. What
// a crash left of a batch that was never acknowledged is cut off. Entries that
// were never acknowledged, because the machine stopped or an error came in
// between, may be there; acknowledged ones always are. If the log is not what
// was written, the error is a *DamageError.
func Open(dir string, o Options) (*Log, error) {
	o.defaults()
	lock, err := lockDir(dir)
	if err != nil {
		return nil, err
	}
	return open(dir, o, lock)
}

func open(dir string, o Options, lock *os.File) (_ *Log, err error) {
	l := &Log{
		dir:     dir,
		now:     o.Now,
		wrap:    o.wrap,
		reserve: o.Reserve,
		size:    o.SegmentSize,
		limit:   o.Limit,
		log:     o.Log,
		denials: newDenials(o.DenialsPerSecond),
		pool:    sync.Pool{New: func() any { return &request{done: make(chan struct{}, 1)} }},
		wake:    make(chan struct{}, 1),
		closing: make(chan struct{}),
		done:    make(chan struct{}),
		lock:    lock,
	}
	v, err := l.load(o.Visit)
	if err == nil {
		err = l.repair(v)
	}
	if err != nil {
		if l.os != nil {
			l.os.Close()
		}
		lock.Close()
		return nil, err
	}
	l.publish(l.tree.root(), v.checkpoint)
	l.stats.Batches = 0
	go l.run()
	return l, nil
}

// load checks the whole log, and opens the last segment for writing.
func (l *Log) load(visit func(*Entry) error) (*verifier, error) {
	s, err := openLog(l.dir, false)
	if err != nil {
		return nil, err
	}
	defer s.close()
	v, err := newVerifier(s, nil)
	for err == nil {
		err = v.next(visit)
	}
	if err != io.EOF {
		return nil, err
	}
	f, err := os.OpenFile(s.file.Name(), os.O_RDWR|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, fmt.Errorf("open audit log: %w", err)
	}
	l.id, l.path, l.os, l.file = s.id, f.Name(), f, l.wrap(f)
	l.segment, l.before, l.cut = s.head, v.segments, s.torn
	l.tree, l.end, l.alloc, l.sealed, l.signed = v.tree, s.off, s.off, s.sealed, v.checkpoint
	l.origin = v.origin
	for _, b := range l.before {
		l.bytes += b.size
		if b.pruned {
			l.pruned += b.end - b.first
		}
	}
	return v, nil
}

// repair makes the files what the next batch expects: whole batches that are
// surely on disk, and then zeros in allocated room; and before them segments
// that are sealed.
func (l *Log) repair(v *verifier) error {
	if v.loose > 0 {
		l.log.Warn("audit log: ending the rotation that was interrupted", "segment", v.head.number)
		if err := l.sealBefore(v.loose); err != nil {
			return fmt.Errorf("open audit log %s: %w", l.dir, err)
		}
	}
	if err := l.repairLast(v); err != nil {
		return fmt.Errorf("open audit log %s: %w", l.path, err)
	}
	l.lookAtDisk()
	l.grow(0)
	l.tellRoom()
	return l.seen.read(l.os)
}

func (l *Log) repairLast(v *verifier) error {
	if v.torn > 0 {
		l.log.Warn("audit log: cutting off a batch that was not acknowledged", "offset", l.end, "bytes", v.torn)
		// The file is not shortened, because the room must not get lost.
		if err := writeZeros(l.file, l.end, v.torn); err != nil {
			return err
		}
	}
	// After a sync that failed, the kernel can go on showing what never
	// reached the disk. That can be so of the last batch, so it is written
	// again.
	if v.lastBatch > 0 {
		b := make([]byte, l.end-v.lastBatch)
		if _, err := l.os.ReadAt(b, v.lastBatch); err != nil {
			return err
		}
		if _, err := l.file.WriteAt(b, v.lastBatch); err != nil {
			return err
		}
	}
	if err := l.file.Sync(); err != nil {
		return err
	}
	info, err := l.os.Stat()
	if err != nil {
		return err
	}
	// A copied file can have holes where there was room.
	if size := info.Size(); size > l.end {
		if err := l.file.Allocate(l.end, size-l.end); err == nil {
			l.alloc = size
		}
	}
	return nil
}

// ID returns the random number that tells this log from others.
func (l *Log) ID() [16]byte { return l.id }

// Dir returns the directory of the log, for Read and the proofs.
func (l *Log) Dir() string { return l.dir }

// Append writes the entries, one after the other and all or none, and returns
// when they are on disk. It gives them their index and salt, and its time to
// those without one. If ctx ends before, Append returns, and the entries may or
// may not be in the log; nothing may be released for them.
//
// Denials beyond Options.DenialsPerSecond of one caller are not written but
// counted, and an entry with their number follows within a second.
func (l *Log) Append(ctx context.Context, entries []Entry) ([]Receipt, error) {
	if len(entries) == 0 {
		return nil, nil
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("append to audit log: %w", err)
	}
	r, receipts, err := l.prepare(entries)
	if err != nil {
		return nil, fmt.Errorf("append to audit log: %w", err)
	}
	if r.n == 0 {
		l.release(r)
		return receipts, nil
	}
	if err := l.submit(r); err != nil {
		return nil, fmt.Errorf("append to audit log: %w", err)
	}
	select {
	case <-r.done:
	case <-ctx.Done():
		// If the committer has the request, it has its done too, so in no
		// case may it go back to the pool.
		r.state.CompareAndSwap(waiting, withdrawn)
		return nil, fmt.Errorf("append to audit log: %w", ctx.Err())
	}
	defer l.release(r)
	if r.err != nil {
		return nil, fmt.Errorf("append to audit log: %w", r.err)
	}
	next := 0
	for i := range receipts {
		if receipts[i].Coalesced {
			continue
		}
		receipts[i].Index = r.first + uint64(next)
		receipts[i].LeafHash = r.leaves[next]
		receipts[i].Checkpoint = r.signed
		next++
	}
	return receipts, nil
}

// prepare encodes the entries that are to be written, and marks the receipts of
// the others.
func (l *Log) prepare(entries []Entry) (*request, []Receipt, error) {
	l.mu.Lock()
	err := l.usable()
	l.mu.Unlock()
	if err != nil {
		return nil, nil, err
	}
	for i := range entries {
		if err := entries[i].check(); err != nil {
			return nil, nil, fmt.Errorf("entry %d of %d: %w", i+1, len(entries), err)
		}
	}
	now := l.now()
	r := l.request(len(entries))
	receipts := make([]Receipt, len(entries))
	for i := range entries {
		if e := &entries[i]; e.Outcome != Allowed && e.Caller != "" && !e.Priority && !l.denials.write(e, now) {
			receipts[i].Coalesced = true
			continue
		}
		r.add(&entries[i], now)
	}
	if len(r.entries) > maxAppend {
		return nil, nil, fmt.Errorf("%d entries have %d bytes, the limit is %d: %w", r.n, len(r.entries), maxAppend, ErrInvalidEntry)
	}
	return r, receipts, nil
}

// request returns an empty request with salts for n entries.
func (l *Log) request(n int) *request {
	r := l.pool.Get().(*request)
	r.entries, r.leaves = r.entries[:0], r.leaves[:0]
	r.n, r.priority, r.signed, r.err = 0, false, nil, nil
	r.state.Store(waiting)
	if cap(r.salts) < 16*n {
		r.salts = make([]byte, 16*n)
	}
	r.salts = r.salts[:16*n]
	rand.Read(r.salts) // never fails
	return r
}

// release gives a request back that nobody else has.
func (l *Log) release(r *request) {
	if cap(r.entries) <= maxEntry {
		l.pool.Put(r)
	}
}

// add encodes one entry, which check has accepted, with index 0.
func (r *request) add(entry *Entry, now time.Time) {
	e := *entry
	e.Index = 0
	e.Salt = [16]byte(r.salts[16*r.n:])
	if e.Time.IsZero() {
		e.Time = now
	}
	r.scratch = e.encode(r.scratch[:0])
	r.entries = binary.AppendUvarint(r.entries, uint64(len(r.scratch)))
	r.entries = append(r.entries, r.scratch...)
	r.n++
	r.priority = r.priority || e.Priority || e.Outcome == Allowed
}

// usable says why nothing may be appended. The caller holds mu.
func (l *Log) usable() error {
	if l.latched != nil {
		return l.latched
	}
	if l.closed {
		return fmt.Errorf("%w: it is closed", ErrBlocked)
	}
	return nil
}

func (l *Log) submit(r *request) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.usable(); err != nil {
		return err
	}
	if l.waiting+len(r.entries) > maxWaiting || len(l.queue) >= maxWaitingCalls {
		return fmt.Errorf("%w: %d calls wait for the disk already", ErrBlocked, len(l.queue))
	}
	l.queue = append(l.queue, r)
	l.waiting += len(r.entries)
	l.signal()
	return nil
}

// Size returns the number of entries that are on disk.
func (l *Log) Size() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.stats.Entries
}

// Root returns the root of the tree of the entries that are on disk.
func (l *Log) Root() [32]byte {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.root
}

// Checkpoint returns the signed root of the entries that are on disk, or of the
// beginning of them if the last ones are not signed; nil where nothing is.
func (l *Log) Checkpoint() []byte {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.signed
}

// Stats returns how the log is doing.
func (l *Log) Stats() Stats {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.stats
	s.Coalesced = l.denials.all()
	s.Cut = l.cut
	if l.latched != nil {
		s.Blocked = l.latched.Error()
	}
	return s
}

// Close writes what waits and what is counted, and ends the log. Its error says
// what could not be written.
func (l *Log) Close() error {
	l.mu.Lock()
	first := !l.closed
	l.closed = true
	l.mu.Unlock()
	if !first {
		<-l.done
		return nil
	}
	close(l.closing)
	<-l.done
	var err error
	if left := l.denials.take(l.now()); len(left) > 0 {
		err = fmt.Errorf("close audit log: counted denials of %d kinds are not written", len(left))
		if l.latched != nil {
			err = fmt.Errorf("%w: %w", err, l.latched)
		}
	}
	return errors.Join(err, l.os.Close(), l.lock.Close())
}
