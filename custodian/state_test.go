package custodian_test

import (
	"testing"

	"github.com/keycustody/custodian/custodian"
)

// The recorded state of a content key rules its release and its issue, and it
// is part of the control set.
func TestKeyStates(t *testing.T) {
	for _, test := range []struct {
		state   custodian.State
		decided bool
		release error
		issue   error
	}{
		{0, false, custodian.ErrKeyState, custodian.ErrKeyState},
		{0, true, custodian.ErrKeyState, custodian.ErrKeyState},
		{custodian.StatePreActive, false, custodian.ErrKeyState, custodian.ErrKeyState},
		{custodian.StateActive, false, nil, nil},
		{custodian.StateSuspended, false, custodian.ErrKeyState, custodian.ErrKeyState},
		{custodian.StateDeactivated, false, nil, custodian.ErrKeyState},
		{custodian.StateCompromised, false, custodian.ErrKeyCompromised, custodian.ErrKeyCompromised},
		{custodian.StateCompromised, true, nil, custodian.ErrKeyCompromised},
		{custodian.StateDestroyed, true, custodian.ErrKeyDestroyed, custodian.ErrKeyDestroyed},
		{custodian.StateDestroyed + 1, true, custodian.ErrKeyState, custodian.ErrKeyState},
	} {
		w := newWorld(t)
		w.category("movies")
		keys := kidsOf(w.issue("movies", "film-1", "SD", "HD"))
		x := custodian.Exception{KID: keys[0], State: test.state, Decided: test.decided, Time: w.now(), Cause: "test", Revision: 1}
		wantErr(t, "record the state", w.c.PutException(t.Context(), x), nil)
		for range 2 {
			what := test.state.String()
			wantErr(t, what+": release", w.release(provider, keys[0]), test.release)
			wantErr(t, what+": issue", w.issueErr(ask("movies", "film-1", "SD")), test.issue)
			wantErr(t, what+": the other key", w.release(provider, keys[1]), nil)
			info, err := w.c.DescribeContentKey(t.Context(), auditor, keys[0])
			if err != nil || info.State != test.state {
				t.Errorf("%s: described as %s, %v", what, info.State, err)
			}
			w.reopen()
		}
		putBack := w.saveStore()
		w.rewrite(func(tx custodian.UpdateTx) error {
			return tx.DeleteControl(custodian.ControlException, keys[0].String())
		})
		w.refused("the exception is dropped", custodian.ErrControlDigest)
		putBack()
		w.reopen()
		wantErr(t, "remove the state", w.c.RemoveException(t.Context(), keys[0]), nil)
		wantErr(t, "release afterwards", w.release(provider, keys[0]), nil)
		w.whole()
	}
}
