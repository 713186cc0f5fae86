package rpc

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/keycustody/custodian/custodian"
)

const (
	// readyInterval is how long a readiness is good for. Looking costs an
	// operation of the token, and whoever has a certificate may ask.
	readyInterval = time.Second
	// readyTimeout bounds one look, so that a KMS that hangs makes nobody wait
	// for longer.
	readyTimeout = 2 * time.Second
	// readyPatience is how long an asker waits for a look that does not heed its
	// timeout.
	readyPatience = readyTimeout + 250*time.Millisecond
)

// ready says whether the daemon should get calls: what the custody said when it
// was last looked at, at most readyInterval ago. Looks are made one at a time,
// in a time of their own, however many ask and however soon they leave.
func (s *Server) ready(ctx context.Context) error {
	now := s.serving.Load()
	if now.err != nil {
		return now.err
	}
	l, err := now.readiness.look(ctx, now.custody.Ready, s.config.Now)
	if err != nil {
		return err
	}
	timer := time.NewTimer(readyPatience)
	defer timer.Stop()
	select {
	case <-l.done:
		return l.err
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return fmt.Errorf("readiness not known within %s: %w", readyPatience, custodian.ErrDeadline)
	}
}

// A readiness holds the last look at a custody.
type readiness struct {
	// mu guards the fields below.
	mu     sync.Mutex
	last   *look // nil: none yet
	closed bool
}

// A look is one question whether the custody is ready.
type look struct {
	cancel context.CancelFunc
	done   chan struct{} // closed when the fields below are set
	err    error
	end    time.Time
}

// look is the last look while it is under way or fresh, else a new one.
func (r *readiness) look(ctx context.Context, ready func(context.Context) error, now func() time.Time) (*look, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil, fmt.Errorf("the server has ended: %w", custodian.ErrStarting)
	}
	if r.last != nil && r.last.holds(now) {
		return r.last, nil
	}
	// Whoever happened to ask first may leave before the others.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), readyTimeout)
	l := &look{cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(l.done)
		defer cancel()
		l.err = ready(ctx)
		l.end = now()
	}()
	r.last = l
	return l, nil
}

func (l *look) holds(now func() time.Time) bool {
	select {
	case <-l.done:
		return now().Sub(l.end) < readyInterval
	default:
		return true
	}
}

// close ends the look that is under way, and waits for its end. There is none
// after it.
func (r *readiness) close() {
	r.mu.Lock()
	r.closed = true
	l := r.last
	r.mu.Unlock()
	if l != nil {
		l.cancel()
		<-l.done
	}
}
