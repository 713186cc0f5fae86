package hsm

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// Back-off between attempts to reconnect.
const (
	firstBackoff = 100 * time.Millisecond
	lastBackoff  = 5 * time.Second
)

// keep connects, and then is the one goroutine that reconnects, destroys what
// is not used any more and, at the end of the token's life, finalises the
// module. It holds every worker while it changes the connection.
func (t *Token) keep(connected chan<- error) {
	defer close(t.ended)
	if err := t.connect(); err != nil {
		t.finish() // before Open returns, so that the module is free again
		connected <- err
		return
	}
	t.sendHome(t.workers)
	connected <- nil
	backoff, due, examined, timer := firstBackoff, time.Time{}, time.Time{}, time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		select {
		case <-t.life.Done():
			t.drain(nil)
			t.finish()
			return
		case <-t.wake:
		case <-timer.C:
		}
		if wait, ok := t.nextLook(examined); t.doubt.Swap(false) || (ok && wait <= 0) {
			t.examine()
			examined = time.Now()
		}
		o := t.down.Load()
		if o == nil {
			backoff, due = firstBackoff, time.Time{}
			if !t.destroyDoomed() {
				timer.Reset(t.c.CallTimeout)
			}
			if wait, ok := t.nextLook(examined); ok {
				timer.Reset(wait)
			}
			continue
		}
		if urgent := t.now.Swap(false); o.final || (!urgent && time.Now().Before(due)) {
			continue
		}
		next := t.reconnect(o)
		t.down.CompareAndSwap(o, next) // not if the token was closed meanwhile
		t.attempted()
		due = time.Now().Add(backoff)
		timer.Reset(backoff)
		backoff = min(2*backoff, lastBackoff)
	}
}

// reconnect calls every worker in, finalises the module and connects again. It
// returns why there is no connection, or nil.
func (t *Token) reconnect(o *outage) *outage {
	timer := time.NewTimer(t.c.DrainTimeout)
	defer timer.Stop()
	workers := t.drain(timer.C)
	defer t.sendHome(workers)
	if len(workers) < len(t.workers) {
		if t.life.Err() == nil {
			t.die(fmt.Errorf("token %s: reconnect: %d calls in flight after %s: %w",
				t.c.Token, len(t.workers)-len(workers), t.c.DrainTimeout, ErrDevice))
		}
		return o
	}
	t.disconnect()
	err := t.connect()
	if err == nil {
		return nil
	}
	final := errors.Is(err, ErrPIN) || errors.Is(err, ErrLatched)
	t.c.Log.Warn("token not reconnected", "token", t.c.Token, "error", err.Error(), "final", final)
	if !final && !errors.Is(err, ErrDevice) {
		err = fmt.Errorf("%w: %w", err, ErrDevice)
	}
	return &outage{err, final}
}

// attempted tells those who wait in recovered.
func (t *Token) attempted() {
	t.mu.Lock()
	defer t.mu.Unlock()
	close(t.attempt)
	t.attempt = make(chan struct{})
}

// drain takes workers until it has all of them or the time is over; without a
// timeout it waits as long as calls hang.
func (t *Token) drain(timeout <-chan time.Time) []*worker {
	var got []*worker
	for len(got) < len(t.workers) {
		select {
		case w := <-t.anchor:
			got = append(got, w)
		case w := <-t.control:
			got = append(got, w)
		case w := <-t.signing:
			got = append(got, w)
		case w := <-t.pool:
			got = append(got, w)
		case <-timeout:
			return got
		}
	}
	return got
}

func (t *Token) sendHome(workers []*worker) {
	for _, w := range workers {
		w.home <- w
	}
}

// finish ends the token's life. The keeper holds every worker.
func (t *Token) finish() {
	err := t.disconnect()
	for _, w := range t.workers {
		close(w.start)
	}
	if t.arena != nil {
		err = errors.Join(err, t.arena.Close())
	}
	t.lib.unclaim(t)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closing = err
}

// nextLook tells in what time the keeper has to examine the token again: when
// the oldest call whose caller has left is overdue, but CallTimeout after the
// last time at the earliest. Callers whose own deadlines are shorter than
// CallTimeout never time a call out, so that nobody else would notice. ok is
// false if there is nothing to look at.
func (t *Token) nextLook(examined time.Time) (wait time.Duration, ok bool) {
	var first int64
	for _, w := range t.workers {
		if w.state.Load() != stateAbandoned {
			continue
		}
		if due := w.due.Load(); !ok || due < first {
			first, ok = due, true
		}
	}
	if !ok {
		return 0, false
	}
	return max(time.Until(t.born.Add(time.Duration(first))), time.Until(examined.Add(t.c.CallTimeout))), true
}

// examine runs the probe in every kind of session after a call timed out. One
// stuck session of several does no harm; a kind that is all stuck does.
func (t *Token) examine() {
	if t.check() != nil {
		return
	}
	for _, home := range []chan *worker{t.pool, t.control, t.anchor, t.signing} {
		ctx, cancel := context.WithTimeout(t.life, t.c.CallTimeout)
		err := t.ask(ctx, home)
		cancel()
		if err != nil {
			t.lose(fmt.Errorf("calls hang: %w", err))
			return
		}
	}
}

// ask runs the probe in a session of one kind, and waits where take gives up.
func (t *Token) ask(ctx context.Context, home chan *worker) error {
	w, err := t.wait(ctx, home)
	if err != nil {
		return err
	}
	if err := w.run(ctx, (*worker).probe); err != nil {
		return err
	}
	w.release()
	return nil
}

// destroyDoomed destroys session objects that were released. Those of an older
// epoch ended with it, and their numbers may name other objects now. false says
// that the anchor was not free, so that they wait for another try.
func (t *Token) destroyDoomed() bool {
	t.mu.Lock()
	list := t.doomed
	t.doomed = nil
	t.mu.Unlock()
	if len(list) == 0 {
		return true
	}
	w, err := t.take(t.life, t.anchor)
	if err != nil {
		t.mu.Lock()
		t.doomed = append(list, t.doomed...)
		t.mu.Unlock()
		t.warnDoomed(list, err)
		return false
	}
	err = w.run(t.life, func(w *worker) error {
		for _, d := range list {
			if d.epoch == t.epoch {
				w.destroy(d.key)
			}
		}
		return nil
	})
	if err != nil {
		// The job goes on without us, or the epoch has ended: destroying a second
		// time could hit what has the number now.
		t.warnDoomed(list, err)
		return true
	}
	w.release()
	return true
}

func (t *Token) warnDoomed(list []doomed, err error) {
	if t.life.Err() == nil {
		t.c.Log.Warn("released keys not destroyed yet", "token", t.c.Token, "keys", len(list), "error", err.Error())
	}
}
