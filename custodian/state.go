package custodian

import (
	"fmt"
	"time"
)

// A State is the state of a key version (NIST SP 800-57 part 1, section 7).
// The zero State permits nothing.
type State uint8

// The states. Only ACTIVE protects; ACTIVE and DEACTIVATED process; for the
// others a recorded decision is needed (Exception.Decided).
const (
	StatePreActive   State = 1
	StateActive      State = 2
	StateSuspended   State = 3
	StateDeactivated State = 4
	StateCompromised State = 5
	StateDestroyed   State = 6
)

var stateNames = [...]string{"UNSPECIFIED", "PRE_ACTIVE", "ACTIVE", "SUSPENDED", "DEACTIVATED", "COMPROMISED", "DESTROYED"}

func (s State) String() string {
	if int(s) < len(stateNames) {
		return stateNames[s]
	}
	return fmt.Sprintf("STATE_%d", uint8(s))
}

// MarshalText writes the state's name.
func (s State) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// successors of a state; SP 800-57 part 1, figure 6.
var successors = map[State][]State{
	StatePreActive:   {StateActive, StateSuspended, StateCompromised, StateDestroyed},
	StateActive:      {StateSuspended, StateDeactivated, StateCompromised},
	StateSuspended:   {StateActive, StateDeactivated, StateCompromised},
	StateDeactivated: {StateCompromised, StateDestroyed},
	StateCompromised: {StateDestroyed},
}

// CanBecome reports whether a key in state s may go to state next.
func (s State) CanBecome(next State) bool {
	for _, n := range successors[s] {
		if n == next {
			return true
		}
	}
	return false
}

// A Purpose is what a key is about to be used for.
type Purpose uint8

// Protect makes new protection (issuing, wrapping); Process removes it
// (releasing, unwrapping).
const (
	Protect Purpose = 1
	Process Purpose = 2
)

// Usable says whether a key in state s may be used for p: nil, or the error
// that the caller hears. decided tells that officers recorded the decision to
// go on processing with a suspended or compromised key.
func Usable(s State, p Purpose, decided bool) error {
	switch {
	case s == StateActive && (p == Protect || p == Process):
		return nil
	case s == StateDeactivated && p == Process:
		return nil
	case s == StateCompromised && p == Process && decided:
		return nil
	case s == StateCompromised:
		return ErrKeyCompromised
	case s == StateDestroyed:
		return ErrKeyDestroyed
	}
	return ErrKeyState
}

// usableMEK says whether new KEKs may be made under m at now. A MEK that is
// past its year still opens what it wraps.
func usableMEK(m MEK, p Purpose, now time.Time) error {
	if err := Usable(m.State, p, false); err != nil {
		return fmt.Errorf("mek %s: state %s: %w", m.Label, m.State, err)
	}
	if p == Protect && !now.Before(m.EndTime) {
		return fmt.Errorf("mek %s: its cryptoperiod ended %s: %w", m.Label, m.EndTime.UTC().Format(time.RFC3339), ErrMEKExpired)
	}
	return nil
}
