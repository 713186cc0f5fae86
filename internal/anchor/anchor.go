// Package anchor takes the checkpoints of the audit log out of the machine's
// own trust: to a witness over HTTP, to a directory that somebody else's
// storage keeps, to syslog. It decides when a checkpoint is pushed, how far
// behind an anchor may be, and what an answer means: an anchor that has a later
// log than this one, or another one, shows a rollback or a fork. What follows
// from that is the domain's to say.
//
// An anchor only ever gets a checkpoint that is durable here. So whatever a
// crash cuts off, the log is never behind its anchors by it.
package anchor

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/checkpoint"
)

// The kinds of anchors.
const (
	Witness   = "witness"
	Directory = "directory"
	Syslog    = "syslog"
)

// A place takes checkpoints. Its methods are called by one goroutine at a time.
type place interface {
	// push returns nil once the place has the checkpoint c, signed, and all that
	// it had before is the beginning of c's log. Errors: ErrAnchorAhead,
	// ErrAnchorFork of package custodian; others, if it may be tried again.
	push(ctx context.Context, l custodian.AnchoredLog, c checkpoint.Checkpoint, signed []byte) error
}

// errNoCheckpoint: there is nothing to push, and nothing to hold against what
// the anchor has.
var errNoCheckpoint = errors.New("the audit log has no checkpoint yet")

// Of tries that fail: the pauses are drawn from zero up to a bound, which
// doubles from the first to the longest; and the time of one try.
const (
	firstPause   = time.Second
	longestPause = 5 * time.Minute
	pushTimeout  = 30 * time.Second
	// checkTimeout is how long a start waits for the anchors.
	checkTimeout = 10 * time.Second
)

// Options say how anchors are kept.
type Options struct {
	Anchors []Config
	// AlertAfter is how long the newest checkpoint may be missing at an anchor
	// before that is an alert.
	AlertAfter time.Duration
	// Required tells that nothing may be issued or released where no anchor
	// that can be asked has answered for StartWithout after the start.
	Required     bool
	StartWithout time.Duration
	// OnAlert hears of every alert when it is declared and when it is closed.
	// It must not wait.
	OnAlert func(custodian.AnchorAlert)
	Log     *slog.Logger
}

// A Set is the anchors of one audit log. Its methods may be called from any
// goroutine.
type Set struct {
	o       Options
	anchors []*anchor
	log     custodian.AnchoredLog
	began   time.Time // Check was called
}

// An anchor is one place, and what is known of it.
type anchor struct {
	Config
	place place

	// mu guards the fields below.
	mu       sync.Mutex
	size     uint64    // of the newest checkpoint that it has; 0: not known
	taken    time.Time // when it took that
	behind   time.Time // since when there is one that it does not have
	lastErr  error
	failures uint64
	alert    *custodian.AnchorAlert
}

// New makes the anchors of a configuration that is good, and calls none.
func New(o Options) (*Set, error) {
	s := &Set{o: o}
	for _, c := range o.Anchors {
		p, err := c.place()
		if err != nil {
			return nil, fmt.Errorf("anchor %s: %w", c.Name, err)
		}
		s.anchors = append(s.anchors, &anchor{Config: c, place: p})
	}
	return s, nil
}

// Check is a first push to all anchors at once; custodian.Anchors says more.
// It is called once, before Run.
func (s *Set) Check(ctx context.Context, l custodian.AnchoredLog) error {
	s.log, s.began = l, time.Now()
	short, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	errs := make([]error, len(s.anchors))
	var asked sync.WaitGroup
	for i, a := range s.anchors {
		asked.Go(func() { errs[i] = s.push(short, a) })
	}
	asked.Wait()
	if err := ctx.Err(); err != nil {
		return err
	}
	for i, a := range s.anchors {
		if contradicts(errs[i]) {
			return fmt.Errorf("anchor %s: %w", a.Name, errs[i])
		}
	}
	if err := s.unanswered(); err != nil {
		s.o.Log.Error("NO ANCHOR ANSWERS: whether store and audit log were rolled back together is not known", "err", err, "issuing_and_releasing_until", s.began.Add(s.o.StartWithout))
	}
	return nil
}

// contradicts tells an anchor that has another log from one that is away.
func contradicts(err error) bool {
	return errors.Is(err, custodian.ErrAnchorAhead) || errors.Is(err, custodian.ErrAnchorFork)
}

// Run pushes to every anchor until ctx ends, each at its interval where there is
// something new, and again with full jitter where that failed. It returns an
// error only where an anchor contradicts the log.
func (s *Set) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, a := range s.anchors {
		g.Go(func() error { return s.serve(ctx, a) })
	}
	g.Go(func() error {
		for sleep(ctx, time.Second) {
			s.tick(time.Now())
		}
		return nil
	})
	return g.Wait()
}

func (s *Set) serve(ctx context.Context, a *anchor) error {
	pause := firstPause
	for {
		wait := a.Interval
		if a.failing() {
			wait = mathrand.N(pause)
			pause = min(2*pause, longestPause)
		} else {
			pause = firstPause
		}
		if !sleep(ctx, wait) {
			return nil
		}
		if size, _ := s.size(); a.upToDate(size) {
			continue
		}
		if err := s.push(ctx, a); contradicts(err) {
			return fmt.Errorf("anchor %s: %w", a.Name, err)
		}
	}
}

// push gives one anchor the newest checkpoint, and notes what came of it.
func (s *Set) push(ctx context.Context, a *anchor) error {
	ctx, cancel := context.WithTimeout(ctx, pushTimeout)
	defer cancel()
	began := time.Now()
	signed := s.log.Checkpoint()
	var c checkpoint.Checkpoint
	err := errNoCheckpoint
	if signed != nil {
		if c, err = checkpoint.Parse(signed); err == nil {
			err = a.place.push(ctx, s.log, c, signed)
		}
	}
	a.note(c.Size, began, err)
	switch {
	case contradicts(err):
		s.o.Log.Error("AN ANCHOR CONTRADICTS THE AUDIT LOG", "anchor", a.Name, "err", err)
	case err != nil && !errors.Is(ctx.Err(), context.Canceled):
		s.o.Log.Warn("an anchor did not take the newest checkpoint; it is tried again", "anchor", a.Name, "err", err)
	}
	return err
}

func (a *anchor) note(size uint64, began time.Time, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.lastErr = err
	if err != nil {
		a.failures++
		return
	}
	a.size, a.taken = size, time.Now()
	if !a.behind.IsZero() {
		a.behind = began // what came since is missing; tick finds out if nothing did
	}
}

func (a *anchor) failing() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.lastErr != nil
}

func (a *anchor) upToDate(size uint64) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.lastErr == nil && a.size == size
}

// size of the newest checkpoint of the log.
func (s *Set) size() (uint64, error) {
	if s.log.Checkpoint == nil {
		return 0, errNoCheckpoint
	}
	c, err := checkpoint.Parse(s.log.Checkpoint())
	return c.Size, err
}

// tick measures how far the anchors are behind, and declares and closes alerts.
func (s *Set) tick(now time.Time) {
	size, err := s.size()
	if err != nil {
		return
	}
	for _, a := range s.anchors {
		told := a.tick(size, now, s.o.AlertAfter)
		if told == nil {
			continue
		}
		if told.Closed.IsZero() {
			s.o.Log.Error("alert: an anchor is behind the audit log", "alert", told.ID, "anchor", a.Name, "since", told.Since, "entries", told.Lag, "err", told.LastError)
		} else {
			s.o.Log.Warn("alert closed: the anchor has caught up", "alert", told.ID, "anchor", a.Name, "since", told.Since)
		}
		if s.o.OnAlert != nil {
			s.o.OnAlert(*told)
		}
	}
}

func (a *anchor) tick(size uint64, now time.Time, limit time.Duration) *custodian.AnchorAlert {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case a.size >= size:
		a.behind = time.Time{}
	case a.behind.IsZero():
		a.behind = now
	}
	late := !a.behind.IsZero() && now.Sub(a.behind) >= limit
	switch {
	case late && a.alert == nil:
		a.alert = &custodian.AnchorAlert{ID: newID(), Anchor: a.Name, Since: a.behind.UTC(), Declared: now.UTC(), Lag: size - a.size, LastError: text(a.lastErr)}
		told := *a.alert
		return &told
	case !late && a.alert != nil:
		told := *a.alert
		told.Closed, told.Lag, told.LastError = now.UTC(), size-a.size, ""
		a.alert = nil
		return &told
	}
	return nil
}

// Blocked is for custodian.Anchors.
func (s *Set) Blocked() error {
	if !s.o.Required || time.Since(s.began) < s.o.StartWithout {
		return nil
	}
	return s.unanswered()
}

// unanswered says that no anchor that can be asked has answered since the
// start, where one has to; or nil.
func (s *Set) unanswered() error {
	if !s.o.Required {
		return nil
	}
	var last error
	for _, a := range s.anchors {
		if !a.CanAnswer() {
			continue
		}
		a.mu.Lock()
		answered := !a.taken.IsZero()
		if last == nil && a.lastErr != nil {
			last = fmt.Errorf("anchor %s: %w", a.Name, a.lastErr)
		}
		a.mu.Unlock()
		if answered {
			return nil
		}
	}
	return fmt.Errorf("no anchor has confirmed the audit log since the start: %w", last)
}

// Status is for custodian.Anchors.
func (s *Set) Status() []custodian.AnchorStatus {
	size, _ := s.size()
	now := time.Now()
	out := make([]custodian.AnchorStatus, len(s.anchors))
	for i, a := range s.anchors {
		a.mu.Lock()
		st := custodian.AnchorStatus{Name: a.Name, Kind: a.Kind, Size: a.size, LastError: text(a.lastErr), Failures: a.failures}
		if !a.taken.IsZero() {
			st.Time = a.taken.UTC()
		}
		if size > a.size {
			st.Lag = size - a.size
			if !a.behind.IsZero() {
				st.LagTime = now.Sub(a.behind)
			}
		}
		if a.alert != nil {
			st.Alert = a.alert.Declared
		}
		a.mu.Unlock()
		out[i] = st
	}
	return out
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// continues checks that the log of c begins with what an anchor has.
func continues(ctx context.Context, l custodian.AnchoredLog, old, c checkpoint.Checkpoint) error {
	if old.Size > c.Size {
		return ahead(old.Size, c.Size)
	}
	var proof [][32]byte
	if 0 < old.Size && old.Size < c.Size {
		var err error
		if proof, err = l.Consistency(ctx, old.Size, c); err != nil {
			return err
		}
	}
	if err := c.CheckConsistency(old, proof); err != nil {
		return fmt.Errorf("%w: %w", custodian.ErrAnchorFork, err)
	}
	return nil
}

func ahead(theirs, ours uint64) error {
	return fmt.Errorf("%d entries there, %d here: %w", theirs, ours, custodian.ErrAnchorAhead)
}

func newID() string {
	var b [8]byte
	rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// sleep waits for d; false means that ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
