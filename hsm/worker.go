package hsm

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/keycustody/custodian/internal/admission"
)

// Limits of one operation in bytes.
const (
	IVSize  = 12 // of AES-GCM, SP 800-38D
	TagSize = 16
	// MaxPlaintext is the longest plaintext of Key.Seal.
	MaxPlaintext = scratchText - TagSize
	// MaxAAD is the longest associated data of Key.Seal and Key.Open.
	MaxAAD = 4096
	// MaxMessage is the longest message of Key.CMAC.
	MaxMessage = 1 << 20

	scratchText = 2048 // room for a ciphertext
)

// A worker owns one session and the buffers of the calls on it. A caller takes
// it from its home, fills the inputs, runs a job and reads the results; nobody
// else touches it meanwhile. If the caller leaves early, the worker finishes
// alone, wipes its buffers and goes home by itself.
type worker struct {
	t     *Token
	home  chan *worker
	start chan struct{}
	done  chan struct{}
	state atomic.Int32 // of one job
	due   atomic.Int64 // when the job ought to have ended, on the clock of the token's life
	timer *time.Timer

	// keep says that the session must outlive errors: keys live in it.
	keep    bool
	open    bool
	session pkcs11.SessionHandle

	// Inputs and results of the job.
	job   func(*worker) error
	err   error
	limit time.Duration // CallTimeout if zero
	key   *Key          // held until the job ends
	undo  func()
	n     int    // bytes of result in out
	made  handle // key that the job made

	slot    []byte // locked memory, divided into the four below
	in, out []byte // scratchText each
	check   []byte // scratchText, where a seal is verified
	aad     []byte // MaxAAD, not a secret
	iv      [IVSize]byte
	inLen   int
	aadLen  int
	message []byte // of CMAC, our own copy: in aad, or in ordinary memory where it is longer than any key

	resealing *resealing
}

// A job is waiting for a lane, then running, then finished; a long one steps
// aside now and then, and waits again. Its caller can leave before: a job that
// waits is withdrawn and does nothing more, one that runs is abandoned and ends
// alone.
const (
	stateWaiting = iota
	stateRunning
	stateFinished
	stateWithdrawn
	stateAbandoned
)

const workerSlot = 3*scratchText + MaxAAD

// newWorker starts a worker, which is not at home yet.
func newWorker(t *Token, home chan *worker, keep bool) (*worker, error) {
	slot, err := t.arena.Get()
	if err != nil {
		return nil, err
	}
	timer := time.NewTimer(time.Hour)
	timer.Stop()
	w := &worker{
		t: t, home: home, keep: keep, timer: timer,
		start: make(chan struct{}, 1), done: make(chan struct{}, 1),
		slot: slot, in: slot[:scratchText], out: slot[scratchText : 2*scratchText],
		check: slot[2*scratchText : 3*scratchText], aad: slot[3*scratchText : workerSlot],
	}
	go w.loop()
	return w, nil
}

// loop runs jobs until start is closed.
func (w *worker) loop() {
	for range w.start {
		if !w.enter() {
			w.release()
			continue
		}
		w.err = w.attempt()
		if w.state.CompareAndSwap(stateRunning, stateFinished) {
			w.done <- struct{}{}
			w.leave() // last, so that the runtime runs the next worker first
			continue
		}
		if w.undo != nil {
			w.undo()
		}
		if w.state.Load() == stateAbandoned { // not withdrawn when it had stepped aside
			w.t.abandoned.Add(-1)
		}
		w.release()
	}
}

// enter waits for a lane, where there are any, and tells whether the caller is
// still there. Whoever has the lane is bounded by CallTimeout, so the wait is
// too. That the worker waits and not its caller makes the next call of the
// module begin when the last one ends: the callers in between fill and empty
// other workers meanwhile.
func (w *worker) enter() bool {
	if w.home == w.t.pool {
		<-w.t.lanes
	}
	w.due.Store(int64(time.Since(w.t.born) + w.patience()))
	if w.state.CompareAndSwap(stateWaiting, stateRunning) {
		return true
	}
	w.leave()
	return false
}

// leave gives the lane back.
func (w *worker) leave() {
	if w.home == w.t.pool {
		w.t.lanes <- struct{}{}
	}
}

// stepAside lets those who wait for the lane, or for a processor, have it in the
// middle of a long job. It tells whether the caller is still there; if not, the
// job has to end.
func (w *worker) stepAside() bool {
	if !w.state.CompareAndSwap(stateRunning, stateWaiting) {
		return false // abandoned, and the lane given back
	}
	w.leave()
	admission.StandBack()
	return w.enter()
}

// release ends a call: it wipes what the job left and sends the worker home.
func (w *worker) release() {
	clear(w.in[:w.inLen])
	clear(w.out)
	clear(w.message) // a fingerprint's is a content key
	if w.key != nil {
		w.key.unref()
	}
	if w.resealing != nil {
		w.resealing.to.unref()
	}
	w.state.Store(stateFinished)
	w.job, w.key, w.undo, w.message, w.resealing, w.err, w.limit = nil, nil, nil, nil, nil, nil, 0
	w.inLen, w.aadLen, w.n, w.made = 0, 0, 0, 0
	w.t.inFlight.Add(-1)
	w.home <- w
}

// take waits for a free worker, the caller's context or CallTimeout. It does
// not wait for a pool that no call came back from in the time of its caller.
func (t *Token) take(ctx context.Context, home chan *worker) (*worker, error) {
	if err := t.check(); err != nil {
		return nil, err
	}
	if home == t.pool && len(home) == 0 && t.poolAbandoned() {
		return nil, fmt.Errorf("every session of the pool is in a call that its caller gave up: %w", ErrDevice)
	}
	return t.wait(ctx, home)
}

// wait is take that waits for any pool. It sends the worker home again if the
// token was lost meanwhile.
func (t *Token) wait(ctx context.Context, home chan *worker) (*worker, error) {
	w, err := t.await(ctx, home)
	if err != nil {
		return nil, err
	}
	if err := t.check(); err != nil {
		home <- w
		return nil, err
	}
	t.inFlight.Add(1)
	return w, nil
}

// poolAbandoned tells whether all workers of the pool are in a call whose
// caller has left.
func (t *Token) poolAbandoned() bool {
	for _, w := range t.workers {
		if w.home == t.pool && w.state.Load() != stateAbandoned {
			return false
		}
	}
	return true
}

// await takes a worker as soon as one is home, within the time of the context
// and CallTimeout.
func (t *Token) await(ctx context.Context, home chan *worker) (*worker, error) {
	select {
	case w := <-home:
		return w, nil
	default:
	}
	var timeout <-chan time.Time
	if deadline, ok := ctx.Deadline(); !ok || time.Until(deadline) > t.c.CallTimeout {
		timer := time.NewTimer(t.c.CallTimeout)
		defer timer.Stop()
		timeout = timer.C
	}
	select {
	case w := <-home:
		return w, nil
	case <-ctx.Done():
		return nil, t.busy(ctx.Err())
	case <-timeout:
		return nil, t.busy(nil)
	}
}

// busy says that a call did not get its turn: ctxErr ended its wait, or, if that
// is nil, CallTimeout.
func (t *Token) busy(ctxErr error) error {
	if ctxErr == nil {
		t.suspect()
		return fmt.Errorf("within %s: %w", t.c.CallTimeout, ErrBusy)
	}
	if err := t.check(); err != nil {
		return fmt.Errorf("%w: %w", err, ctxErr)
	}
	t.poke() // to look at the calls that we waited for
	return fmt.Errorf("%w: %w", ErrBusy, ctxErr)
}

// run lets a taken worker do a job. After an error the worker is not the
// caller's any more; after success the caller reads the results and calls
// release.
func (w *worker) run(ctx context.Context, job func(*worker) error) error {
	w.job = job
	w.state.Store(stateWaiting)
	w.start <- struct{}{}
	timeout := w.arm(ctx)
	var why error
	for finished := false; !finished && why == nil; {
		select {
		case <-w.done:
			finished = true
		case <-ctx.Done():
			why = fmt.Errorf("call abandoned: %w", ctx.Err())
		case <-timeout:
			if left := w.left(); w.resealing != nil && left > 0 {
				w.timer.Reset(left) // it has stepped aside since
				continue
			}
			why = fmt.Errorf("no answer within %s: %w", w.patience(), ErrDevice)
		}
	}
	if timeout != nil {
		w.timer.Stop()
	}
	for t := w.t; why != nil; { // again where the job steps aside, or is back, at this moment
		if w.state.CompareAndSwap(stateWaiting, stateWithdrawn) {
			return t.busy(ctx.Err())
		}
		t.abandoned.Add(1)
		if w.state.CompareAndSwap(stateRunning, stateAbandoned) {
			w.leave()
			if errors.Is(why, ErrDevice) {
				t.suspect()
			} else {
				t.poke() // to look again when the call is overdue
			}
			return why
		}
		t.abandoned.Add(-1)
		if w.state.Load() == stateFinished { // just now
			<-w.done
			why = nil
		}
	}
	if err := w.err; err != nil {
		w.release()
		return err
	}
	return nil
}

// arm starts the timer of a call, unless the context ends before that.
func (w *worker) arm(ctx context.Context) <-chan time.Time {
	limit := w.patience()
	if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) <= limit {
		return nil
	}
	w.timer.Reset(limit)
	return w.timer.C
}

// left is how long the job may take from now on, or, if it is long, until it
// steps aside.
func (w *worker) left() time.Duration {
	return time.Until(w.t.born.Add(time.Duration(w.due.Load())))
}

func (w *worker) patience() time.Duration { return max(w.limit, w.t.c.CallTimeout) }

// attempt does the job, a second time in a new session if the first one was
// broken, and finds out what an unclear error means.
func (w *worker) attempt() error {
	err := w.once()
	if hasClass(err, classSession) && !w.keep {
		err = w.once()
	}
	switch {
	case err == nil:
		return nil
	case hasClass(err, classSession):
		// The keys that lived in the anchor are gone, or sessions break at once.
		return w.lost(err)
	case hasClass(err, classLost):
		return w.lost(err)
	case hasClass(err, classUnclear):
		return w.settle(err)
	}
	if _, ok := classOf(err); !ok && errors.Is(err, ErrDevice) {
		return w.lost(err) // the job itself found that the token is not right
	}
	return err
}

func (w *worker) once() error {
	if err := w.openSession(); err != nil {
		return err
	}
	err := w.job(w)
	if err != nil && !hasClass(err, classAuth) {
		w.closeSession()
	}
	return err
}

// settle asks the probe what an unclear code means. If the token still works,
// a decryption or an unwrap had bad input; anything else failed alone.
func (w *worker) settle(err error) error {
	var f *fault
	if !errors.As(err, &f) {
		return err
	}
	if perr := w.probe(); perr != nil {
		return w.lost(fmt.Errorf("%w; probe: %w", err, perr))
	}
	if f.call == callDecrypt || f.call == callUnwrap {
		f.class = classAuth
	}
	return err
}

// lost starts a reconnect.
func (w *worker) lost(err error) error {
	w.t.lose(err)
	if errors.Is(err, ErrDevice) {
		return err
	}
	return fmt.Errorf("%w: %w", err, ErrDevice)
}

func (w *worker) openSession() error {
	if w.open {
		return nil
	}
	if w.keep {
		return &fault{callSession, 0xB3, classLost} // only a connect opens the anchor
	}
	s, err := w.t.lib.p.OpenSession(w.t.slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		return faultOf(callSession, err)
	}
	w.session, w.open = s, true
	w.t.sessions.Add(1)
	return nil
}

// closeSession drops a session that saw an error. Its state is not known, and
// it is not used again whether the close succeeds or not.
func (w *worker) closeSession() {
	if !w.open || w.keep {
		return
	}
	_ = w.t.lib.p.CloseSession(w.session)
	w.forget()
}

// forget is for sessions that ended with the module.
func (w *worker) forget() {
	if w.open {
		w.open = false
		w.t.sessions.Add(-1)
	}
}

// do runs a job whose results stay in variables that the job alone writes
// before it ends; the caller reads them only after success.
func (t *Token) do(ctx context.Context, home chan *worker, job func(*worker) error) error {
	return t.doWithin(ctx, 0, home, job)
}

// doWithin is do with a limit longer than CallTimeout.
func (t *Token) doWithin(ctx context.Context, limit time.Duration, home chan *worker, job func(*worker) error) error {
	w, err := t.take(ctx, home)
	if err != nil {
		return err
	}
	w.limit = limit
	if err := w.run(ctx, job); err != nil {
		return err
	}
	w.release()
	return nil
}
