package hsm

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ThalesIgnite/crypto11"

	"github.com/keycustody/custodian/internal/secret"
)

// An Epoch counts the connections to a token, from 1. Handles belong to one.
type Epoch uint64

// A Token is a logged-in connection to one PKCS#11 token. It reconnects by
// itself after the token was lost. It is safe for concurrent use.
//
// Errors of all its operations: ErrDevice if the token is gone, did not answer
// within CallTimeout, is being reconnected, or has every session of the pool in
// a call whose caller gave up; ErrBusy if no session came free; ErrPIN and
// ErrLatched if a login did not succeed and a person has to look.
type Token struct {
	c     Config
	uri   URI
	lib   *library
	arena *secret.Arena

	born  time.Time
	life  context.Context // ends with Close
	stop  context.CancelFunc
	ended chan struct{} // closed when the keeper has ended

	// Homes of the workers. The anchor's session holds every session object;
	// control finds and makes token objects, one at a time; signing is for
	// crypto11, which has sessions of its own; the pool does the rest.
	anchor, control, signing, pool chan *worker
	workers                        []*worker
	// lanes holds one for each job of the pool that may run now. Who abandons a
	// job gives its lane back.
	lanes chan struct{}

	// The connection. Written by the keeper while it holds every worker, and
	// so read without a lock by whoever holds one.
	conn

	down  atomic.Pointer[outage] // nil while connected
	wake  chan struct{}
	doubt atomic.Bool // a call timed out: examine the token
	now   atomic.Bool // reconnect without waiting for the back-off
	fatal sync.Once

	inFlight, abandoned, sessions atomic.Int64

	mu      sync.Mutex // guards the fields below
	info    Info       // of the current connection
	attempt chan struct{}
	doomed  []doomed
	meks    []handle // MEKs that were found in this epoch
	closing error    // of the end
}

// A conn is one connection to the token.
type conn struct {
	epoch   Epoch
	slot    uint
	serial  string
	profile profile
	signers *crypto11.Context
	probing probe
	trusted bool // the module enforces WRAP_WITH_TRUSTED
}

// An outage says why there is no connection. A final one is not retried.
type outage struct {
	err   error
	final bool
}

// doomed is a session object that nobody uses any more.
type doomed struct {
	epoch Epoch
	key   handle
}

// Info describes a token and its load.
type Info struct {
	Label, Serial, Manufacturer, Model string
	Firmware                           string // major.minor
	Profile                            string // vendor profile
	Epoch                              Epoch
	EnforcesTrusted                    bool // WRAP_WITH_TRUSTED holds, and a MEK can be trusted
	DefaultMEKProfile                  MEKProfile
	Sessions, MaxSessions              int
	InFlight                           int   // calls under way, abandoned ones included
	Abandoned                          int   // calls whose caller has left
	Outage                             error // why the token is away; nil while connected
}

// Open loads the module, finds the token, logs in once and tests the module.
// It fails with ErrLatched without a login if an earlier one did not succeed,
// with ErrPIN if this one does not, with ErrDevice if the token is not there,
// and with ErrUnfit if the module cannot do what is needed. A process can have
// one Token per module, because a module can be finalised only as a whole.
func Open(ctx context.Context, c Config) (*Token, error) {
	c, uri, err := c.withDefaults()
	if err != nil {
		return nil, err
	}
	if _, err := latch(c.LatchFile).tries(); err != nil {
		return nil, fmt.Errorf("token %s: %w", c.Token, err)
	}
	lib, err := loadLibrary(c.Module)
	if err != nil {
		return nil, err
	}
	t := &Token{c: c, uri: uri, lib: lib, born: time.Now(), wake: make(chan struct{}, 1), ended: make(chan struct{}), attempt: make(chan struct{})}
	if err := lib.claim(t); err != nil {
		return nil, err
	}
	t.life, t.stop = context.WithCancel(context.WithoutCancel(ctx))
	connected := make(chan error, 1)
	go t.keep(connected)
	select {
	case err = <-connected:
	case <-ctx.Done():
		// The keeper cleans up when the module lets it.
		err = fmt.Errorf("connect: %w", ctx.Err())
	}
	if err != nil {
		t.stop()
		return nil, fmt.Errorf("token %s: %w", c.Token, err)
	}
	return t, nil
}

// Close waits for calls in flight, then finalises the module. It returns an
// error if they do not end before the context or DrainTimeout does, the latter
// after OnFatal was called. Closing twice does no harm.
func (t *Token) Close(ctx context.Context) error {
	t.down.Store(&outage{fmt.Errorf("token %s: closed: %w", t.c.Token, ErrDevice), true})
	t.stop()
	timer := time.NewTimer(t.c.DrainTimeout)
	defer timer.Stop()
	select {
	case <-t.ended:
		t.mu.Lock()
		defer t.mu.Unlock()
		return t.closing
	case <-ctx.Done():
		return fmt.Errorf("close token %s: %d calls in flight: %w", t.c.Token, t.inFlight.Load(), ctx.Err())
	case <-timer.C:
		err := fmt.Errorf("close token %s: %d calls in flight after %s: %w", t.c.Token, t.inFlight.Load(), t.c.DrainTimeout, ErrDevice)
		t.die(err)
		return err
	}
}

// Info describes the current connection, or the last one if there is none.
func (t *Token) Info() Info {
	t.mu.Lock()
	info := t.info
	t.mu.Unlock()
	info.Sessions = int(t.sessions.Load())
	info.InFlight = int(t.inFlight.Load())
	info.Abandoned = int(t.abandoned.Load())
	info.Outage = t.check()
	return info
}

// Epoch is that of the current connection, or the last one if there is none.
func (t *Token) Epoch() Epoch {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.info.Epoch
}

// Health seals and opens with a key in the token, and asks whether the token
// and the MEKs that were found are still there. If not, it reconnects at once
// and tries again.
func (t *Token) Health(ctx context.Context) error {
	err := t.do(ctx, t.pool, (*worker).health)
	if err != nil && t.check() != nil {
		t.recovered(ctx, true)
		err = t.do(ctx, t.pool, (*worker).health) // works again, or says why there is no connection
	}
	return t.named("health", err)
}

// Random fills dst from the token's generator, at most 2048 bytes.
func (t *Token) Random(ctx context.Context, dst []byte) error {
	if len(dst) == 0 {
		return nil
	}
	if len(dst) > scratchText {
		return t.named("random", fmt.Errorf("%d bytes are more than %d: %w", len(dst), scratchText, ErrPolicy))
	}
	err := t.again(ctx, func() error {
		w, err := t.take(ctx, t.pool)
		if err != nil {
			return err
		}
		w.inLen = len(dst)
		if err := w.run(ctx, runRandom); err != nil {
			return err
		}
		copy(dst, w.in[:w.inLen])
		w.release()
		return nil
	})
	return t.named("random", err)
}

func runRandom(w *worker) error {
	return newFault(callRandom, w.t.lib.random(w.session, w.in[:w.inLen]))
}

// again repeats an operation once if the token was lost and came back.
func (t *Token) again(ctx context.Context, op func() error) error {
	err := op()
	if err == nil || !errors.Is(err, ErrDevice) || t.check() == nil {
		return err
	}
	if t.recovered(ctx, false) {
		return op()
	}
	return t.reason(err)
}

// named puts the token and the operation before an error.
func (t *Token) named(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("token %s: %s: %w", t.c.Token, what, err)
}

// check is the reason why there is no connection, or nil.
func (t *Token) check() error {
	if o := t.down.Load(); o != nil {
		return o.err
	}
	return nil
}

// reason is why there is no connection, which tells more than the error of the
// operation that found out; or that error, if there is one again.
func (t *Token) reason(err error) error {
	if why := t.check(); why != nil {
		return why
	}
	return err
}

// lose says that the connection does not work any more.
func (t *Token) lose(reason error) {
	if !errors.Is(reason, ErrDevice) {
		reason = fmt.Errorf("%w: %w", reason, ErrDevice)
	}
	if t.down.CompareAndSwap(nil, &outage{err: reason}) {
		t.c.Log.Warn("token lost", "token", t.c.Token, "reason", reason.Error())
		t.poke()
	}
}

// suspect has the keeper find out whether the token still answers.
func (t *Token) suspect() {
	t.doubt.Store(true)
	t.poke()
}

func (t *Token) poke() {
	select {
	case t.wake <- struct{}{}:
	default:
	}
}

// recovered waits for the end of the attempt to reconnect that is under way or
// due, at most CallTimeout, and tells whether there is a connection. urgent does
// not wait for the back-off.
func (t *Token) recovered(ctx context.Context, urgent bool) bool {
	t.mu.Lock()
	attempt := t.attempt
	t.mu.Unlock()
	o := t.down.Load()
	if o == nil || o.final {
		return o == nil
	}
	if urgent {
		t.now.Store(true)
		t.poke()
	}
	timer := time.NewTimer(t.c.CallTimeout)
	defer timer.Stop()
	select {
	case <-attempt:
	case <-timer.C:
	case <-ctx.Done():
	case <-t.life.Done():
	}
	return t.check() == nil
}

// die calls OnFatal, once.
func (t *Token) die(err error) {
	t.fatal.Do(func() {
		t.c.Log.Error("token hangs", "token", t.c.Token, "reason", err.Error())
		if t.c.OnFatal != nil {
			t.c.OnFatal(err)
		}
	})
}

// doom has a session object destroyed when the anchor is free.
func (t *Token) doom(epoch Epoch, key handle) {
	t.mu.Lock()
	t.doomed = append(t.doomed, doomed{epoch, key})
	t.mu.Unlock()
	t.poke()
}
