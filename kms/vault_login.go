package kms

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/hashicorp/vault/api/auth/approle"

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

// A session is one login. Vault's client keeps the token as a string, which
// cannot be wiped.
type session struct {
	client *api.Client
	// proved: Vault has said itself that the login was good.
	proved bool
	// renew is when to log in ahead of end, when the token ends. Both are
	// zero for a token that has no end.
	renew, end time.Time
}

func (s *session) over(now time.Time) bool { return !s.end.IsZero() && !now.Before(s.end) }
func (s *session) due(now time.Time) bool  { return !s.renew.IsZero() && !now.Before(s.renew) }

// logins keeps one session for all calls, and makes the next when it ends or
// is refused: one login at a time, and none before its wait is over.
type logins struct {
	v       *vault
	now     func() time.Time
	current atomic.Pointer[session]

	// turn is held by whoever logs in; it guards the fields below.
	turn  chan struct{}
	tries int       // since the last good call
	next  time.Time // no login before
	last  error     // what calls hear until then
}

func newLogins(v *vault, now func() time.Time) *logins {
	return &logins{v: v, now: now, turn: make(chan struct{}, 1)}
}

// session returns the current login, or makes one. A login that is due to be
// renewed and cannot be serves on until it ends.
func (l *logins) session(ctx context.Context) (*session, error) {
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
func (l *logins) replace(ctx context.Context, old *session) (*session, error) {
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
	s, err := l.login(ctx)
	if err != nil {
		l.last = l.refusal(err)
		if !errors.Is(err, context.Canceled) { // a caller that left says nothing about Vault
			l.wait(longestWait(err))
		}
		return nil, l.last
	}
	l.current.Store(s)
	return s, nil
}

// denied takes down that Vault forbids a call right after the login s, and
// returns what the caller hears: err, or that the login is not worth
// anything. Calls go on asking with the session that is there; only another
// login has to wait.
func (l *logins) denied(s *session, err error) error {
	if !s.proved {
		err = fmt.Errorf("kms %s: log in to vault: the token of %s is refused: %w", l.v.name, l.v.c.TokenFile, custodian.ErrProviderUnavailable)
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
func (l *logins) welcome(s *session) {
	select {
	case l.turn <- struct{}{}:
		defer l.give()
		if l.current.Load() == s && !s.due(l.now()) {
			l.tries, l.next, l.last = 0, time.Time{}, nil
		}
	default:
	}
}

func (l *logins) take(ctx context.Context) error {
	select {
	case l.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("kms %s: wait for another call's login: %w: %w", l.v.name, custodian.ErrProviderUnavailable, context.Cause(ctx))
	}
}

func (l *logins) give() { <-l.turn }

// wait puts the next login off; the caller has the turn. The jitter keeps the
// daemons that one outage hit from coming back at the same instant.
func (l *logins) wait(longest time.Duration) {
	d := min(firstWait<<min(l.tries, 20), longest)
	l.tries++
	l.next = l.now().Add(d/2 + rand.N(d/2))
}

func (l *logins) forget() { l.current.Store(nil) }

// login logs in by the method that is configured.
func (l *logins) login(ctx context.Context) (*session, error) {
	if l.v.c.TokenFile != "" {
		return l.byTokenFile(ctx)
	}
	return l.byAppRole(ctx)
}

func (l *logins) byAppRole(ctx context.Context) (*session, error) {
	role, err := readSecretLine(l.v.c.AppRole.RoleIDFile)
	if err != nil {
		return nil, err
	}
	secret, err := readSecretLine(l.v.c.AppRole.SecretIDFile)
	if err != nil {
		return nil, err
	}
	method, err := approle.NewAppRoleAuth(role, &approle.SecretID{FromString: secret}, approle.WithMountPath(l.v.c.AppRole.Mount))
	if err != nil {
		return nil, err
	}
	client, err := l.v.client("")
	if err != nil {
		return nil, err
	}
	begin := l.now()
	answer, err := method.Login(ctx, client)
	if err != nil {
		return nil, err
	}
	if answer == nil || answer.Auth == nil || answer.Auth.ClientToken == "" {
		return nil, errors.New("the answer has no token")
	}
	client.SetToken(answer.Auth.ClientToken)
	return lasting(&session{client: client, proved: true}, begin, int64(answer.Auth.LeaseDuration)), nil
}

// byTokenFile takes the token of the file and asks Vault about it. The answer
// needs Vault's default policy: a token without it is used all the same, but
// no refusal counts as proved then, because a dead token looks no different.
func (l *logins) byTokenFile(ctx context.Context) (*session, error) {
	token, err := readSecretLine(l.v.c.TokenFile)
	if err != nil {
		return nil, err
	}
	client, err := l.v.client(token)
	if err != nil {
		return nil, err
	}
	begin := l.now()
	self, err := client.Logical().ReadWithContext(ctx, "auth/token/lookup-self")
	if forbidden(err) {
		return &session{client: client}, nil
	}
	if err != nil {
		return nil, err
	}
	if self == nil {
		return nil, errors.New("the answer about the token is empty")
	}
	ttl, ok := self.Data["ttl"].(json.Number)
	if !ok {
		return nil, errors.New("the answer about the token has no ttl")
	}
	seconds, err := ttl.Int64()
	if err != nil {
		return nil, errors.New("the answer about the token has no ttl")
	}
	if renewable, _ := self.Data["renewable"].(bool); renewable && seconds > 0 {
		// Best effort: the token is good for what is left of it.
		if renewed, err := client.Logical().WriteWithContext(ctx, "auth/token/renew-self", nil); err == nil && renewed != nil && renewed.Auth != nil {
			seconds = int64(renewed.Auth.LeaseDuration)
		}
	}
	return lasting(&session{client: client, proved: true}, begin, seconds), nil
}

// maxLease is ten years, in seconds: a longer lease would overflow a Duration
// some day, and has no other effect.
const maxLease = 10 * 365 * 24 * 3600

// lasting sets when s ends and when it is renewed: after two thirds.
func lasting(s *session, begin time.Time, seconds int64) *session {
	if seconds > 0 {
		lease := time.Duration(min(seconds, maxLease)) * time.Second
		s.end, s.renew = begin.Add(lease), begin.Add(lease*2/3)
	}
	return s
}

// refusal is a failed login in a sentence. Whatever the reason, it is an
// outage: only a call that is forbidden after a good login is a denial.
func (l *logins) refusal(err error) error {
	answer := answerOf(err)
	switch {
	case answer == nil:
		return fmt.Errorf("kms %s: log in to vault: %w: %w", l.v.name, custodian.ErrProviderUnavailable, err)
	case answer.StatusCode == http.StatusTooManyRequests:
		return fmt.Errorf("kms %s: log in to vault: %s: %w", l.v.name, says(answer), custodian.ErrProviderThrottled)
	case refused(answer):
		return fmt.Errorf("kms %s: log in to vault: the login is refused: %s: %w", l.v.name, says(answer), custodian.ErrProviderUnavailable)
	}
	return fmt.Errorf("kms %s: log in to vault: %s: %w", l.v.name, says(answer), custodian.ErrProviderUnavailable)
}

func refused(answer *api.ResponseError) bool {
	return !answer.RawError && (answer.StatusCode == http.StatusBadRequest || answer.StatusCode == http.StatusForbidden)
}

func longestWait(err error) time.Duration {
	if answer := answerOf(err); answer != nil && refused(answer) {
		return refusedWait
	}
	return awayWait
}
