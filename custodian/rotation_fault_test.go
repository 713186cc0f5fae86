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

// A rotationDeed is a part of a rotation that must come to its end, whichever
// call of whichever part fails in it, before or after doing it.
type rotationDeed struct {
	name    string
	profile custodian.MEKProfile
	order   custodian.RotationOrder
	part    rotationPart
	met     []string // the calls that it cannot do without
}

// A rotationPart is where calls fail.
type rotationPart int

const (
	forward rotationPart = iota // up to the hold; then it goes on, and is rolled back from there
	atOnce                      // up to the hold; then it is rolled back from where it is
	back                        // on the way back from the hold
	retired                     // when the hold is ended
)

var (
	recorded    = []string{"store.View", "store.Update", "audit.WriteAt", "audit.Sync", "hsm.CMAC"}
	kekMet      = slices.Concat(recorded, []string{"hsm.GenerateKey", "kms.Wrap", "kms.Unwrap", "hsm.LoadKey", "hsm.Open", "hsm.Reseal", "store.ContentKey"})
	sealedMet   = slices.Concat(recorded, []string{"hsm.GenerateKey", "kms.Wrap", "kms.Unwrap", "hsm.LoadKey", "hsm.Open", "hsm.Seal", "store.ContentKey", "hsm.Random", "hsm.GenerateMEK", "hsm.NewMEKCanary", "hsm.CheckMEK"})
	backMet     = slices.Concat(recorded, []string{"hsm.Open", "store.ContentKey"})
	rotatable   = slices.Concat(recorded, []string{"hsm.RewrapKey", "kms.Wrap", "kms.Unwrap", "hsm.Open"})
	rotatingMet = slices.Concat(rotatable, []string{"hsm.Random", "hsm.GenerateMEK", "hsm.NewMEKCanary", "hsm.CheckMEK"})

	compromised = custodian.RotationOrder{RequestID: "c", Kind: custodian.RotateKEK, Category: "movies", Compromised: []uint32{1}, Serve: true}
)

var rotationDeeds = []rotationDeed{
	{"kek", custodian.ProfileSealed, kekOrder, forward, kekMet},
	{"kek rolled back at once", custodian.ProfileSealed, kekOrder, atOnce, kekMet},
	{"kek rolled back", custodian.ProfileSealed, kekOrder, back, slices.Concat(backMet, []string{"hsm.Reseal"})},
	{"kek retired", custodian.ProfileSealed, kekOrder, retired, recorded},
	{"kek compromised", custodian.ProfileSealed, compromised, forward, kekMet},
	{"mek sealed", custodian.ProfileSealed, mekOrder, forward, sealedMet},
	{"mek sealed rolled back at once", custodian.ProfileSealed, mekOrder, atOnce, sealedMet},
	{"mek sealed rolled back", custodian.ProfileSealed, mekOrder, back, slices.Concat(backMet, []string{"hsm.Seal"})},
	{"mek sealed retired", custodian.ProfileSealed, mekOrder, retired, recorded},
	{"mek rotatable", custodian.ProfileRotatable, mekOrder, forward, rotatingMet},
	{"mek rotatable rolled back at once", custodian.ProfileRotatable, mekOrder, atOnce, rotatingMet},
	{"mek rotatable rolled back", custodian.ProfileRotatable, mekOrder, back, rotatable},
	{"mek rotatable retired", custodian.ProfileRotatable, mekOrder, retired, recorded},
}

// do orders the rotation, or what comes after it, and lets the engine work once.
func (d rotationDeed) do(w *world) error {
	r, err := w.c.StartRotation(w.t.Context(), officer, d.order)
	switch {
	case err == nil && d.part == back:
		_, err = w.c.RollBackRotation(w.t.Context(), officer, "back", r.Name())
	case err == nil && d.part == retired:
		_, err = w.c.RetireRotation(w.t.Context(), officer, "retire", r.Name())
	}
	if err != nil {
		return err
	}
	return w.c.AdvanceRotations(w.t.Context())
}

func (d rotationDeed) ends() custodian.RotationStep {
	switch {
	case d.part == back:
		return custodian.StepRolledBack
	case d.part == retired, len(d.order.Compromised) > 0:
		return custodian.StepRetired
	}
	return custodian.StepHold
}

// repeated are operations that come again and again within one step: of them
// the first two are broken, and all in TestLongRotationFaults.
var repeated = []string{"hsm.CMAC", "hsm.Seal", "hsm.Open", "hsm.LoadKey", "hsm.Random", "kms.Unwrap", "store.View", "store.ContentKey", "audit.WriteAt"}

// TestRotationFaults breaks each call in turn, before and after it is done:
// each step's store update, its entry in the audit log, and what it asks of the
// token and the KMS, of KEK and MEK, on the way to the hold, back from it and
// out of it. Right behind the fault, in the same process and after a restart,
// every key opens. Then the rotation comes to its end, and one that is held is
// rolled back; or it is rolled back from where the fault has left it.
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
			t.Parallel() // most of its time it waits for the disk
			w := profileWorld(t, d.profile)
			w.category("movies")
			w.fill("movies", "film", 2)
			if d.part == back || d.part == retired {
				w.rotate(d.order)
			}
			if d.part == retired {
				w.advance(d.order.Hold)
			}
			answered := w.answered
			putBack, token := w.save(), w.hsm
			met := map[string]int{}
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
				met[op]++
				t.Run(fmt.Sprintf("%s %d after=%v", op, nth, after), func(t *testing.T) {
					w.t = t
					d.check(w, err)
				})
				w.t = t
				return true
			})
			for _, op := range d.met {
				if met[op] < 2 {
					t.Errorf("%s: %d faults were met, want one before and one after it is done at least", op, met[op])
				}
			}
			t.Logf("faults: %v", met)
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
	if d.part == atOnce {
		d.rollBack(w)
		return
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

// rollBack takes a rotation back from wherever it is after a restart, if its
// order has come that far. The predecessor protects, and every key opens.
func (d rotationDeed) rollBack(w *world) {
	w.t.Helper()
	w.reopen()
	list, err := w.c.Rotations(w.t.Context(), auditor)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, r := range list {
		if _, err := w.c.RollBackRotation(w.t.Context(), officer, "", r.Name); err != nil {
			w.t.Fatalf("roll back from %s: %v", r.Step, err)
		}
		w.advanceRotations()
		w.wantStep(r.Name, custodian.StepRolledBack)
	}
	w.fill("movies", "after", 1)
	w.whole()
	if k := w.keks("movies")[0]; k.State != custodian.StateActive || k.Wrapped.MEKVersion != 1 {
		w.t.Errorf("kek %s, which protected before: got %s under MEK version %d, want ACTIVE under 1", k.ID, k.State, k.Wrapped.MEKVersion)
	}
}
