package custodian_test

import (
	"maps"
	"testing"
	"time"

	"github.com/keycustody/custodian/custodian"
)

var mekOrder = custodian.RotationOrder{RequestID: "mek-1", Kind: custodian.RotateMEK, Cause: "annual"}

var profiles = []custodian.MEKProfile{custodian.ProfileSealed, custodian.ProfileRotatable}

// wantMEK checks that one MEK version is active, and that everything that
// protects is under it.
func (w *world) wantMEK(version uint32) {
	w.t.Helper()
	s, err := w.c.Status(w.t.Context(), auditor)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, m := range s.MEKs {
		if active := m.State == custodian.StateActive; active != (m.Version == version) {
			w.t.Errorf("mek %s: got %s, want version %d to be the active one", m.Label, m.State, version)
		}
	}
	cats, err := w.c.Categories(w.t.Context(), auditor)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, cat := range cats {
		for _, k := range w.keks(cat.Name) {
			if k.ID.Version == cat.ActiveKEK && k.Wrapped.MEKVersion != version {
				w.t.Errorf("kek %s protects and is under mek version %d, want %d", k.ID, k.Wrapped.MEKVersion, version)
			}
		}
	}
}

func mekWorld(t *testing.T, p custodian.MEKProfile) *world {
	t.Helper()
	w := profileWorld(t, p)
	w.category("movies")
	w.category("series")
	w.fill("movies", "film", 5)
	w.rotate(custodian.RotationOrder{Kind: custodian.RotateKEK, Category: "movies"})
	w.fill("movies", "later", 3)
	w.fill("series", "episode", 4)
	return w
}

func TestRotateMEK(t *testing.T) {
	for _, p := range profiles {
		t.Run(string(p), func(t *testing.T) {
			w := mekWorld(t, p)
			r := w.rotate(mekOrder)
			w.wantStep("mek/2", custodian.StepHold)
			w.fill("movies", "after", 2)
			w.category("shows")
			w.wantMEK(2)
			w.whole()
			if got, err := w.c.RetireRotation(t.Context(), officer, "", r.Name()); err != nil || got.Step != custodian.StepRetired {
				t.Fatalf("retire: got %+v, %v", got, err)
			}
			w.whole()
			w.wantMEK(2)
			if _, _, err := w.c.AuditEntries(t.Context(), auditor, custodian.AuditQuery{UserID: "viewer", PageSize: 10}); err != nil {
				t.Errorf("look for a viewer under the pseudonym keys of both: %v", err)
			}
			born := w.births()
			version := map[custodian.MEKProfile]uint32{custodian.ProfileSealed: 3, custodian.ProfileRotatable: 2}[p]
			w.wantUnder("movies", version, born)
			// And once more: nothing was tied to the first version.
			o := mekOrder
			o.RequestID = "mek-2"
			r = w.rotate(o)
			if _, err := w.c.RetireRotation(t.Context(), officer, "", r.Name()); err != nil {
				t.Fatal(err)
			}
			w.whole()
			w.wantMEK(3)
		})
	}
}

func TestRollBackMEK(t *testing.T) {
	for _, p := range profiles {
		for _, when := range []string{"before it is made", "before the move", "in the hold", "in the hold, past the year"} {
			t.Run(string(p)+" "+when, func(t *testing.T) {
				w := mekWorld(t, p)
				if when == "in the hold, past the year" {
					w.advance(custodian.MEKPeriod - time.Hour)
				}
				r, err := w.c.StartRotation(t.Context(), officer, mekOrder)
				if err != nil {
					t.Fatal(err)
				}
				switch when {
				case "before the move":
					w.breaker.down("hsm.RewrapKey")
					w.breaker.arm("hsm.Seal", 1, false)
					if err := w.c.AdvanceRotations(t.Context()); err == nil || !w.breaker.disarm() {
						t.Fatalf("the token does not move keys: got %v", err)
					}
				case "in the hold":
					w.advanceRotations()
					w.category("shows")
				case "in the hold, past the year":
					w.advanceRotations()
					w.advance(2 * time.Hour)
				}
				if when != "before it is made" {
					w.fill("movies", "meanwhile", 3)
				}
				_, err = w.c.RollBackRotation(t.Context(), officer, "", r.Name())
				if p == custodian.ProfileRotatable && when == "in the hold, past the year" {
					wantErr(t, "wrap keys under a MEK that is past its year", err, custodian.ErrMEKExpired)
					w.whole()
					return
				}
				wantErr(t, "roll back", err, nil)
				w.reopen()
				w.advanceRotations()
				w.wantStep(r.Name(), custodian.StepRolledBack)
				w.wantMEK(1)
				w.whole()
				if when == "in the hold, past the year" {
					return
				}
				w.fill("movies", "after all", 2)
				o := mekOrder
				o.RequestID = "mek-2"
				if again := w.rotate(o); again.Name() != "mek/3" {
					t.Errorf("the version after one that was rolled back: got %s, want mek/3", again.Name())
				}
				w.wantStep("mek/3", custodian.StepHold)
				w.whole()
				w.wantMEK(3)
			})
		}
	}
}

// A MEK past its year makes no KEK, but its rotation goes on.
func TestRotateMEKPastItsYear(t *testing.T) {
	w := mekWorld(t, custodian.ProfileSealed)
	w.advance(custodian.MEKPeriod + time.Hour)
	_, err := w.c.CreateCategory(t.Context(), officer, custodian.CreateCategoryRequest{Name: "shows"})
	wantErr(t, "create a category", err, custodian.ErrMEKExpired)
	w.rotate(mekOrder)
	w.wantStep("mek/2", custodian.StepHold)
	w.category("shows")
	w.whole()
}

// While a rotation goes on, no key is stored twice under two helper keys: the
// fingerprints of both are looked at.
func TestFingerprintsOfTwoHelpers(t *testing.T) {
	w := mekWorld(t, custodian.ProfileSealed)
	if _, err := w.take(officer, w.bring("series", "imported", w.foreign("SD", 1, 0xa1))); err != nil {
		t.Fatal(err)
	}
	if _, err := w.c.StartRotation(t.Context(), officer, mekOrder); err != nil {
		t.Fatal(err)
	}
	w.breaker.arm("hsm.Open", 1, false)
	if err := w.c.AdvanceRotations(t.Context()); err == nil || !w.breaker.disarm() {
		t.Fatalf("the token does not open keys: got %v", err)
	}
	old := maps.Clone(w.answered)
	for _, b := range old {
		w.hsm.NextRandom(b)
		break
	}
	_, err := w.c.Issue(t.Context(), packager, ask("series", "twice", "SD"))
	wantErr(t, "a token that draws a key twice", err, custodian.ErrFingerprint)
	keys, err := w.take(officer, w.bring("series", "imported", w.foreign("SD", 1, 0xa1)))
	if err != nil || keys[0].Created {
		t.Errorf("the same import again: got %+v, %v, want the key that is there", keys, err)
	}
	_, err = w.take(officer, w.bring("series", "other", w.foreign("SD", 2, 0xa1)))
	wantErr(t, "the same bytes for other content", err, custodian.ErrKeyConflict)
	w.advanceRotations()
	w.whole()
}
