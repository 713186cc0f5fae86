package custodian

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sony/gobreaker/v2"
)

// KMSLimits say how providers are called, and how long loaded KEKs serve on
// while one is away.
type KMSLimits struct {
	// Deadline of opening one wrap, with its retries. Making a wrap, which a
	// provider proves to be bound to its record, may take twice as long. Zero: 5 s.
	Deadline time.Duration
	// Deadlines are other deadlines of single providers, by their names.
	Deadlines map[string]time.Duration
	// Grace is how long after the last contact with its provider a loaded KEK
	// serves on beyond its lifetime. Zero: not at all.
	Grace time.Duration
	// GraceCeiling is how long after it was loaded a KEK serves at most,
	// whatever contact there was since. Zero: 24 hours.
	GraceCeiling time.Duration
	// BreakerPause is how long a provider is left alone after five failures in
	// a row. Zero: 5 s.
	BreakerPause time.Duration
	// Patience is how long a caller waits for a provider that is not known to
	// be slow before a KEK in its grace serves; half of its own time at most.
	// Zero: 100 ms.
	Patience time.Duration
	// RewrapRate is how many keys a second get new outer wraps while a job
	// moves them. Zero: 50.
	RewrapRate float64
}

func (l KMSLimits) withDefaults() KMSLimits {
	l.Deadline = cmp.Or(l.Deadline, 5*time.Second)
	l.GraceCeiling = cmp.Or(l.GraceCeiling, 24*time.Hour)
	l.BreakerPause = cmp.Or(l.BreakerPause, 5*time.Second)
	l.Patience = cmp.Or(l.Patience, 100*time.Millisecond)
	l.RewrapRate = cmp.Or(l.RewrapRate, 50)
	return l
}

const (
	// breakerFailures in a row open the breaker.
	breakerFailures = 5
	// unwrapTries is how often one opening is tried; the pauses between are
	// drawn from zero up to retryPause, and up to twice that.
	unwrapTries = 3
	retryPause  = 20 * time.Millisecond
	// slowFailure is how long a failure takes that callers need not wait for.
	slowFailure = 50 * time.Millisecond
	// throttlePause is how long a provider that throttles us is left alone at
	// first, and maxThrottlePause in the end.
	throttlePause    = time.Second
	maxThrottlePause = 30 * time.Second
	// probeInterval is how often a provider that nobody calls is asked whether
	// it answers.
	probeInterval = time.Minute
)

// A CallReason is why a provider is called.
type CallReason string

// To load a key into the token, to make a new one, to see whether the provider
// answers, or to move a key's outer wraps.
const (
	CallLoad   CallReason = "load"
	CallMake   CallReason = "make"
	CallProbe  CallReason = "probe"
	CallRewrap CallReason = "rewrap"
)

// A CallResult is how a call of a provider ended: ok, or one of the classes of
// its errors. Held calls were not made, because of the breaker or a throttle;
// abandoned ones say nothing, for nobody waited for their end.
type CallResult string

// The results.
const (
	ResultOK          CallResult = "ok"
	ResultUnavailable CallResult = "unavailable"
	ResultLogin       CallResult = "login" // refused: an outage that we must mend
	ResultThrottled   CallResult = "throttled"
	ResultDenied      CallResult = "denied"
	ResultDisabled    CallResult = "disabled"
	ResultBlob        CallResult = "blob"
	ResultHeld        CallResult = "held"
	ResultAbandoned   CallResult = "abandoned"
)

// A CallCount counts the calls of one provider by why they were made and how
// they ended.
type CallCount struct {
	Reason CallReason `json:"reason"`
	Result CallResult `json:"result"`
	Count  uint64     `json:"count"`
}

var (
	errHeld      = errors.New("it is left alone for a while")
	errAbandoned = errors.New("the call was given up")
)

// resultOf classifies a provider's error. What it does not know is an outage.
func resultOf(err error) CallResult {
	switch {
	case err == nil:
		return ResultOK
	case errors.Is(err, errHeld):
		return ResultHeld
	case errors.Is(err, errAbandoned):
		return ResultAbandoned
	case errors.Is(err, ErrProviderDenied):
		return ResultDenied
	case errors.Is(err, ErrProviderDisabled):
		return ResultDisabled
	case errors.Is(err, ErrProviderThrottled):
		return ResultThrottled
	case errors.Is(err, ErrProviderBlob):
		return ResultBlob
	case errors.Is(err, ErrProviderLogin):
		return ResultLogin
	}
	return ResultUnavailable
}

// A guard stands before one provider. Every call goes through it: it bounds
// the call, leaves a provider alone that fails, and knows from what was
// answered whether it is there and what that means for keys that are loaded.
// Its times are the steady clock's.
type guard struct {
	p        Provider
	limits   KMSLimits
	clock    *steady
	outage   *outage // is it there?
	breaker  *gobreaker.CircuitBreaker[struct{}]
	sequence *atomic.Uint64 // of successes, over all guards

	// mu guards the fields below.
	mu        sync.Mutex
	counts    map[CallReason]map[CallResult]uint64
	called    time.Time // the last call that had an end
	contact   time.Time // the last proof that it opens what is ours
	lastGood  uint64    // place of that in sequence
	lastErr   error
	slow      bool      // the last call took long and had no answer
	refused   error     // access was taken away on purpose; nil since the next success
	logged    bool      // that
	quiet     time.Time // until then it asked not to be called
	throttles int
	probing   bool
}

func newGuard(p Provider, limits KMSLimits, outages *Outages, sequence *atomic.Uint64) *guard {
	limits.Deadline = cmp.Or(limits.Deadlines[p.Name()], limits.Deadline)
	return &guard{p: p, limits: limits, clock: outages.clock, outage: outages.provider(p.Name()), sequence: sequence, counts: map[CallReason]map[CallResult]uint64{},
		breaker: gobreaker.NewCircuitBreaker[struct{}](gobreaker.Settings{
			Timeout:     limits.BreakerPause,
			ReadyToTrip: func(n gobreaker.Counts) bool { return n.ConsecutiveFailures >= breakerFailures },
			// A blob that it refuses says nothing against the provider.
			IsSuccessful: func(err error) bool { return err == nil || resultOf(err) == ResultBlob },
			// A throttle has a pause of its own.
			IsExcluded: func(err error) bool {
				return resultOf(err) == ResultThrottled || resultOf(err) == ResultAbandoned
			},
		})}
}

// unwrap opens w. An opening may be repeated without harm, so one that had no
// answer is, for as long as there is time; but not of a provider that was away
// already.
func (g *guard) unwrap(ctx context.Context, why CallReason, w OuterWrap, ident []byte) (inner []byte, err error) {
	bounded, cancel := context.WithTimeout(ctx, g.limits.Deadline)
	defer cancel()
	tries := unwrapTries
	if failing, _, _ := g.rank(); failing || why == CallProbe {
		tries = 1
	}
	for try := 1; ; try++ {
		err = g.call(ctx, why, func() error {
			var err error
			inner, err = g.p.Unwrap(bounded, w, ident)
			return err
		})
		if resultOf(err) != ResultUnavailable || try == tries {
			return inner, err
		}
		pause := time.NewTimer(rand.N(retryPause << (try - 1)))
		select {
		case <-pause.C:
		case <-bounded.Done():
			pause.Stop()
			return nil, err
		}
	}
}

// wrap makes a wrap. It is not tried again: the caller decides that.
func (g *guard) wrap(ctx context.Context, why CallReason, blob, ident []byte) (w OuterWrap, err error) {
	bounded, cancel := context.WithTimeout(ctx, 2*g.limits.Deadline)
	defer cancel()
	err = g.call(ctx, why, func() error {
		var err error
		w, err = g.p.Wrap(bounded, blob, ident)
		return err
	})
	return w, err
}

// rewrap moves w, which opens to blob, to the newest version of the provider's
// own key: inside the provider, where it can do that.
func (g *guard) rewrap(ctx context.Context, w OuterWrap, blob, ident []byte) (moved OuterWrap, err error) {
	p, ok := g.p.(Rewrapper)
	if !ok {
		return g.wrap(ctx, CallRewrap, blob, ident)
	}
	bounded, cancel := context.WithTimeout(ctx, 2*g.limits.Deadline)
	defer cancel()
	err = g.call(ctx, CallRewrap, func() error {
		var err error
		moved, err = p.Rewrap(bounded, w, ident)
		return err
	})
	if errors.Is(err, ErrProviderDenied) { // a policy that lets us wrap and open, but not that
		return g.wrap(ctx, CallRewrap, blob, ident)
	}
	return moved, err
}

// call makes one call, unless the provider is to be left alone. ctx is the
// caller's: a call that fails because the caller left says nothing about the
// provider.
func (g *guard) call(ctx context.Context, why CallReason, f func() error) error {
	if err := g.throttled(); err != nil {
		return g.held(why, err)
	}
	_, err := g.breaker.Execute(func() (struct{}, error) {
		began := time.Now()
		err := f()
		if err != nil && ctx.Err() != nil {
			err = fmt.Errorf("%w: %w", errAbandoned, err)
		}
		g.note(why, time.Since(began), err)
		return struct{}{}, err
	})
	if errors.Is(err, gobreaker.ErrOpenState) || errors.Is(err, gobreaker.ErrTooManyRequests) {
		g.mu.Lock()
		last := g.lastErr
		g.mu.Unlock()
		if last == nil {
			last = ErrProviderUnavailable
		}
		return g.held(why, last)
	}
	return err
}

func (g *guard) throttled() error {
	now := g.clock.now()
	g.mu.Lock()
	defer g.mu.Unlock()
	if now.Before(g.quiet) {
		return g.lastErr
	}
	return nil
}

func (g *guard) held(why CallReason, last error) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.count(why, ResultHeld)
	return fmt.Errorf("%w after: %w", errHeld, last)
}

func (g *guard) count(why CallReason, r CallResult) {
	if g.counts[why] == nil {
		g.counts[why] = map[CallResult]uint64{}
	}
	g.counts[why][r]++
}

// note takes down how a call ended.
func (g *guard) note(why CallReason, took time.Duration, err error) {
	now, result := g.clock.now(), resultOf(err)
	g.mu.Lock()
	defer g.mu.Unlock()
	g.count(why, result)
	if result == ResultAbandoned {
		return
	}
	g.called = now
	if err != nil && result != ResultBlob {
		g.lastErr = err
	}
	g.outage.note(now, result, err)
	if result == ResultUnavailable || result == ResultLogin {
		g.slow = took > slowFailure
		return
	}
	g.slow = false // whatever it says, it is there
	switch result {
	case ResultThrottled:
		pause := min(throttlePause<<min(g.throttles, 10), maxThrottlePause)
		g.throttles++
		g.quiet = now.Add(pause/2 + rand.N(pause/2))
		return
	case ResultDenied, ResultDisabled:
		g.refused = err
	case ResultOK:
		g.contact, g.lastGood, g.refused, g.logged = now, g.sequence.Add(1), nil, false
	case ResultBlob:
		g.contact = now
	}
	g.throttles, g.quiet = 0, time.Time{}
}

// rank orders providers for an opening: those that answer before those that do
// not, and the last that was good first. Nobody waits for a slow one that can
// do without it.
func (g *guard) rank() (failing, slow bool, lastGood uint64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return !g.outage.awaySince().IsZero() || g.refused != nil, g.slow, g.lastGood
}

// graceLeft is how long keys that it opened once may serve on.
func (g *guard) graceLeft(now time.Time) time.Duration {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.graceLeftLocked(now)
}

func (g *guard) graceLeftLocked(now time.Time) time.Duration {
	if g.refused != nil || g.contact.IsZero() {
		return 0
	}
	return max(0, g.contact.Add(g.limits.Grace).Sub(now))
}

// beginProbe says whether a probe is due, and that it is begun.
func (g *guard) beginProbe(now time.Time) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.probing || now.Sub(g.called) < probeInterval {
		return false
	}
	g.probing = true
	return true
}

func (g *guard) endProbe() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.probing = false
}

// newRefusal is a refusal that it has not returned yet.
func (g *guard) newRefusal() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.refused == nil || g.logged {
		return nil
	}
	g.logged = true
	return g.refused
}

// describe adds what the guard knows to the provider's own status.
func (g *guard) describe() ProviderStatus {
	s, now := g.p.Status(), g.clock.now()
	g.mu.Lock()
	defer g.mu.Unlock()
	s.GraceLeft, s.Refused = g.graceLeftLocked(now), text(g.refused)
	g.outage.describe(&s, g.clock)
	for why, results := range g.counts {
		for result, n := range results {
			s.CallsByReason = append(s.CallsByReason, CallCount{why, result, n})
		}
	}
	slices.SortFunc(s.CallsByReason, func(a, b CallCount) int {
		return cmp.Or(strings.Compare(string(a.Reason), string(b.Reason)), strings.Compare(string(a.Result), string(b.Result)))
	})
	return s
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
