package kms

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"github.com/keycustody/custodian/custodian"
)

// How long no login is tried after one that failed, or that changed nothing:
// from firstWait, doubled each time. Vault locks a role for a while that is
// refused too often, so a refusal waits longer than an outage.
const (
	firstWait   = 250 * time.Millisecond
	awayWait    = 5 * time.Second
	refusedWait = 30 * time.Second
	deniedWait  = 10 * time.Second
)

// A session is one login: what calls are made with. It keeps tokens as
// strings, as the vendors' clients do, which cannot be wiped.
type session[C any] struct {
	client C
	// doubt is what a caller hears whose call is forbidden with this login,
	// where the KMS does not tell a login that is none from one that may not.
	// nil: it does, or has said itself that the login was good.
	doubt error
	// renew is when to log in ahead of end, when the login ends. Both are
	// zero for one that has no end.
	renew, end time.Time
}

func (s *session[C]) over(now time.Time) bool { return !s.end.IsZero() && !now.Before(s.end) }
func (s *session[C]) due(now time.Time) bool  { return !s.renew.IsZero() && !now.Before(s.renew) }

// maxLease is ten years, in seconds: a longer lease would overflow a Duration
// some day, and has no other effect.
const maxLease = 10 * 365 * 24 * 3600

// lasting sets when s ends and when it is renewed: after two thirds.
func lasting[C any](s *session[C], begin time.Time, seconds int64) *session[C] {
	if seconds > 0 {
		lease := time.Duration(min(seconds, maxLease)) * time.Second
		s.end, s.renew = begin.Add(lease), begin.Add(lease*2/3)
	}
	return s
}

// A method is how one provider logs in, and what it makes of refusals.
type method[C any] interface {
	// login logs in; its error is whatever it is.
	login(ctx context.Context) (*session[C], error)
	// refusal is a failed login in a sentence: unavailable or throttled.
	refusal(err error) error
	// refused reports whether the KMS, not something in between, answers that
	// it does not accept the login.
	refused(err error) bool
	// forbidden reports whether the KMS itself answers to a call that this
	// login may not do this, or is none.
	forbidden(err error) bool
	// classify turns a failed call of op into one of the errors of a
	// custodian.Provider, in a sentence.
	classify(op string, err error) error
}

// logins keeps one session for all calls, and makes the next when it ends or
// is refused: one login at a time, and none before its wait is over.
type logins[C any] struct {
	name    string // of the provider
	method  method[C]
	now     func() time.Time
	current atomic.Pointer[session[C]]

	// turn is held by whoever logs in; it guards the fields below.
	turn  chan struct{}
	tries int       // since the last good call
	next  time.Time // no login before
	last  error     // what calls hear until then
}

func newLogins[C any](name string, m method[C], now func() time.Time) *logins[C] {
	return &logins[C]{name: name, method: m, now: now, turn: make(chan struct{}, 1)}
}

// ask makes one request with the current login. All operations of all
// providers may be repeated without harm, so one that the KMS forbids is made
// once more after a fresh login.
func ask[C, A any](ctx context.Context, l *logins[C], op string, send func(context.Context, C) (A, error)) (A, error) {
	var none A
	s, err := l.session(ctx)
	if err != nil {
		return none, err
	}
	answer, err := send(ctx, s.client)
	if l.method.forbidden(err) {
		if s, err = l.replace(ctx, s); err != nil {
			return none, err
		}
		answer, err = send(ctx, s.client)
	}
	switch {
	case l.method.forbidden(err):
		return none, l.denied(s, l.method.classify(op, err))
	case err != nil:
		return none, l.method.classify(op, err)
	}
	l.welcome(s)
	return answer, nil
}

// session returns the current login, or makes one. A login that is due to be
// renewed and cannot be serves on until it ends.
func (l *logins[C]) session(ctx context.Context) (*session[C], error) {
	s, now := l.current.Load(), l.now()
	if s == nil || s.over(now) {
		return l.replace(ctx, s)
	}
	if s.due(now) {
		if renewed, err := l.replace(ctx, s); err == nil {
			return renewed, nil
		}
	}
	return s, nil
}

// replace logs in, unless another call has done so since old was handed out.
func (l *logins[C]) replace(ctx context.Context, old *session[C]) (*session[C], error) {
	if err := l.take(ctx); err != nil {
		return nil, err
	}
	defer l.give()
	if s := l.current.Load(); s != nil && s != old && !s.over(l.now()) {
		return s, nil
	}
	if l.now().Before(l.next) {
		return nil, l.last
	}
	s, err := l.method.login(ctx)
	if err != nil {
		l.last = l.method.refusal(err)
		if !errors.Is(err, context.Canceled) { // a caller that left says nothing about the KMS
			l.wait(l.longest(err))
		}
		return nil, l.last
	}
	l.current.Store(s)
	return s, nil
}

// denied takes down that the KMS forbids a call right after the login s, and
// returns what the caller hears: err, or that the login is not worth
// anything. Calls go on asking with the session that is there; only another
// login has to wait.
func (l *logins[C]) denied(s *session[C], err error) error {
	if s.doubt != nil {
		err = s.doubt
	}
	select {
	case l.turn <- struct{}{}:
		defer l.give()
		l.last = err
		l.wait(deniedWait)
	default: // another call logs in, and decides
	}
	return err
}

// welcome takes down that a call with s was not forbidden.
func (l *logins[C]) welcome(s *session[C]) {
	select {
	case l.turn <- struct{}{}:
		defer l.give()
		if l.current.Load() == s && !s.due(l.now()) {
			l.tries, l.next, l.last = 0, time.Time{}, nil
		}
	default:
	}
}

func (l *logins[C]) take(ctx context.Context) error {
	select {
	case l.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("kms %s: wait for another call's login: %w: %w", l.name, custodian.ErrProviderUnavailable, context.Cause(ctx))
	}
}

func (l *logins[C]) give() { <-l.turn }

// wait puts the next login off; the caller has the turn. The jitter keeps the
// daemons that one outage hit from coming back at the same instant.
func (l *logins[C]) wait(longest time.Duration) {
	d := min(firstWait<<min(l.tries, 20), longest)
	l.tries++
	l.next = l.now().Add(d/2 + rand.N(d/2))
}

// describe fills in s when the login is renewed and when it ends.
func (l *logins[C]) describe(s custodian.ProviderStatus) custodian.ProviderStatus {
	if current := l.current.Load(); current != nil {
		s.NextRenewal, s.LoginEnd = current.renew, current.end
	}
	return s
}

func (l *logins[C]) forget() { l.current.Store(nil) }

// longest is the longest wait after a login that failed with err.
func (l *logins[C]) longest(err error) time.Duration {
	if l.method.refused(err) {
		return refusedWait
	}
	return awayWait
}
