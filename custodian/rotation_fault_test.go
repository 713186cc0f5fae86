package custodian_test

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"testing"

	"github.com/keycustody/custodian/custodian"
)

// A rotationDeed is a rotation that must come to its end, whichever call of
// whichever part fails in it, before or after doing it.
type rotationDeed struct {
	name    string
	profile custodian.MEKProfile
	order   custodian.RotationOrder
	back    bool // it is rolled back in its hold, and that is where calls fail
}

var rotationDeeds = []rotationDeed{
	{"kek", custodian.ProfileSealed, kekOrder, false},
	{"kek rolled back", custodian.ProfileSealed, kekOrder, true},
	{"kek compromised", custodian.ProfileSealed, custodian.RotationOrder{RequestID: "c", Kind: custodian.RotateKEK, Category: "movies", Compromised: []uint32{1}, Serve: true}, false},
	{"mek sealed", custodian.ProfileSealed, mekOrder, false},
	{"mek sealed rolled back", custodian.ProfileSealed, mekOrder, true},
	{"mek rotatable", custodian.ProfileRotatable, mekOrder, false},
	{"mek rotatable rolled back", custodian.ProfileRotatable, mekOrder, true},
}

// do orders the rotation and lets the engine work once.
func (d rotationDeed) do(w *world) error {
	r, err := w.c.StartRotation(w.t.Context(), officer, d.order)
	if err == nil && d.back {
		_, err = w.c.RollBackRotation(w.t.Context(), officer, "back", r.Name())
	}
	if err != nil {
		return err
	}
	return w.c.AdvanceRotations(w.t.Context())
}

func (d rotationDeed) ends() custodian.RotationStep {
	switch {
	case d.back:
		return custodian.StepRolledBack
	case len(d.order.Compromised) > 0:
		return custodian.StepRetired
	}
	return custodian.StepHold
}

// repeated are operations that come again and again within one step: of them
// the first two are broken, and all in TestLongRotationFaults.
var repeated = []string{"hsm.CMAC", "hsm.Seal", "hsm.Open", "hsm.LoadKey", "hsm.Random", "kms.Unwrap", "store.View", "store.ContentKey", "audit.WriteAt"}

// TestRotationFaults breaks each call in turn, before and after it is done:
// each step's store update, its entry in the audit log, and what it asks of
// the token and the KMS. Right behind the fault, in the same process and after a restart, every key
// opens; then the rotation comes to its end; and one that is held is rolled
// back.
func TestRotationFaults(t *testing.T) { rotationFaults(t, repeated) }

func TestLongRotationFaults(t *testing.T) {
	if os.Getenv("CUSTODIAN_LONG") != "1" {
		t.Skip("every call of every kind, some minutes: set CUSTODIAN_LONG=1, or make long")
	}
	rotationFaults(t, nil)
}

func rotationFaults(t *testing.T, seldom []string) {
	for _, d := range rotationDeeds {
		t.Run(d.name, func(t *testing.T) {
			t.Parallel() // half of the time it waits for the disk
			w := profileWorld(t, d.profile)
			w.category("movies")
			w.fill("movies", "film", 2)
			if d.back {
				w.rotate(d.order)
			}
			answered := w.answered
			putBack, token := w.save(), w.hsm
			faults := 0
			everyFault(func(op string, nth int, after bool) (hit bool) {
				if nth > 2 && slices.Contains(seldom, op) {
					return false
				}
				putBack()
				w.answered = maps.Clone(answered)
				w.hsm = token.Clone()
				w.cfg.HSM = brokenHSM{w.hsm, w.breaker}
				w.reopen()
				w.breaker.arm(op, nth, after)
				err := d.do(w)
				if hit = w.breaker.disarm(); !hit {
					return false
				}
				faults++
				t.Run(fmt.Sprintf("%s %d after=%v", op, nth, after), func(t *testing.T) {
					w.t = t
					d.check(w, err)
				})
				w.t = t
				return true
			})
			if faults < 20 {
				t.Errorf("%d faults were met; the breaker is not in the way", faults)
			}
		})
	}
}

func (d rotationDeed) check(w *world, err error) {
	w.t.Helper()
	if err != nil && custodian.ReasonOf(err) == "INTERNAL" && !errors.Is(err, errBroken) {
		w.t.Errorf("got %v, which nobody classified", err)
	}
	for _, never := range []error{custodian.ErrKeyNotFound, custodian.ErrDenied, custodian.ErrRecordCorrupt} {
		if errors.Is(err, never) {
			w.t.Errorf("a device fault is told as %v", err)
		}
	}
	for kid := range w.answered { // half way, in the same process
		if err := w.release(provider, kid); err != nil && !errors.Is(err, custodian.ErrAuditBlocked) {
			w.t.Errorf("content key %s, right behind the fault: %v", kid, err)
		}
	}
	w.whole() // and after a restart
	if err := d.do(w); err != nil {
		w.t.Errorf("done again after a restart: %v", err)
	}
	list, err := w.c.Rotations(w.t.Context(), auditor)
	if err != nil || len(list) != 1 {
		w.t.Fatalf("got rotations %v, %v, want one: the order is repeated, not doubled", list, err)
	}
	w.wantStep(list[0].Name, d.ends())
	w.fill("movies", "after", 1)
	w.whole()
	if d.ends() != custodian.StepHold {
		return
	}
	if _, err := w.c.RollBackRotation(w.t.Context(), officer, "", list[0].Name); err != nil {
		w.t.Fatal(err)
	}
	w.advanceRotations()
	w.wantStep(list[0].Name, custodian.StepRolledBack)
	w.whole()
}
