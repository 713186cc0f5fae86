package custodian

import (
	"sync"
	"time"
)

// A steady clock only goes forward. Lifetimes, grace and incidents are
// measured by it, so that setting the clock back makes none of them longer:
// for a step back it stands still, and then goes on. It takes the larger of
// what the clock's face and its monotonic reading say has passed, so that time
// asleep counts as well.
type steady struct {
	clock func() time.Time

	// mu guards the fields below.
	mu   sync.Mutex
	last time.Time // what the clock said last
	at   time.Time
}

func newSteady(clock func() time.Time) *steady {
	t := clock()
	return &steady{clock: clock, last: t, at: t.Round(0)}
}

func (s *steady) now() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.clock()
	s.at = s.at.Add(max(0, t.Sub(s.last), t.Round(0).Sub(s.last.Round(0))))
	s.last = t
	return s.at
}

// wall tells a time of this clock, for people, by the other one.
func (s *steady) wall(t time.Time) time.Time {
	if t.IsZero() {
		return t
	}
	now := s.now()
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.last.Add(t.Sub(now)).UTC()
}
