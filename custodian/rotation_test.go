package custodian_test

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/audit"
)

// profileWorld is newWorld with a MEK of a profile.
func profileWorld(t *testing.T, p custodian.MEKProfile) *world {
	t.Helper()
	w := bareWorld(t)
	w.openParts()
	if err := custodian.Init(t.Context(), w.cfg, custodian.InitSpec{Profile: p}); err != nil {
		t.Fatal(err)
	}
	w.reopen()
	return w
}

// rotate orders a rotation and lets the engine work until it rests.
func (w *world) rotate(o custodian.RotationOrder) custodian.Rotation {
	w.t.Helper()
	r, err := w.c.StartRotation(w.t.Context(), officer, o)
	if err != nil {
		w.t.Fatal(err)
	}
	w.advanceRotations()
	return r
}

func (w *world) advanceRotations() {
	w.t.Helper()
	if err := w.c.AdvanceRotations(w.t.Context()); err != nil {
		w.t.Fatal(err)
	}
}

// rotation is the status of one rotation.
func (w *world) rotation(name string) custodian.RotationStatus {
	w.t.Helper()
	list, err := w.c.Rotations(w.t.Context(), auditor)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, s := range list {
		if s.Name == name {
			return s
		}
	}
	w.t.Fatalf("rotation %s: it is not listed among %v", name, list)
	return custodian.RotationStatus{}
}

func (w *world) wantStep(name string, want custodian.RotationStep) {
	w.t.Helper()
	if got := w.rotation(name); got.Step != want || got.LastError != "" {
		w.t.Errorf("rotation %s: got %s %q, want %s", name, got.Step, got.LastError, want)
	}
}

// wantUnder checks under which KEK version every content key of a category
// lies, and under which each was born.
func (w *world) wantUnder(name custodian.CategoryName, version uint32, born map[custodian.KID]uint32) {
	w.t.Helper()
	n := 0
	for _, k := range w.contentKeys() {
		if k.Key.Category != name {
			continue
		}
		n++
		if k.Key.KEK.Version != version || k.Key.BirthKEK != born[k.Key.KID] {
			w.t.Errorf("content key %s: under %s, born under %d; want version %d, born under %d", k.Key.KID, k.Key.KEK, k.Key.BirthKEK, version, born[k.Key.KID])
		}
	}
	if n == 0 {
		w.t.Errorf("category %s has no content keys", name)
	}
}

func (w *world) births() map[custodian.KID]uint32 {
	born := map[custodian.KID]uint32{}
	for _, k := range w.contentKeys() {
		born[k.Key.KID] = k.Key.BirthKEK
	}
	return born
}

// fill issues n content keys in a category, each of an item of its own.
func (w *world) fill(name custodian.CategoryName, prefix string, n int) {
	w.t.Helper()
	for i := range n {
		w.issue(name, fmt.Sprintf("%s-%d", prefix, i), "SD")
	}
}

var kekOrder = custodian.RotationOrder{RequestID: "rotate-1", Kind: custodian.RotateKEK, Category: "movies", Cause: "test", Hold: 24 * time.Hour}

func TestRotateKEK(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	w.category("series")
	w.fill("movies", "old", 300) // more than two batches
	w.fill("series", "other", 3)
	born := w.births()

	r, err := w.c.StartRotation(t.Context(), officer, kekOrder)
	if err != nil || r.Name() != "kek/movies/2" || r.Step != custodian.StepRewrap || !slices.Equal(r.From, []uint32{1}) {
		t.Fatalf("start: got %+v, %v", r, err)
	}
	again, err := w.c.StartRotation(t.Context(), officer, kekOrder)
	if err != nil || again.Name() != r.Name() {
		t.Errorf("the same order again: got %s, %v, want %s", again.Name(), err, r.Name())
	}
	other := kekOrder
	other.RequestID = "rotate-2"
	_, err = w.c.StartRotation(t.Context(), officer, other)
	wantErr(t, "a second rotation of the category", err, custodian.ErrRotationState)
	_, err = w.c.RetireRotation(t.Context(), officer, "", r.Name())
	wantErr(t, "retire before the records have moved", err, custodian.ErrRotationState)
	w.issue("movies", "new", "SD") // issuing goes on, under the successor
	for kid, v := range w.births() {
		born[kid] = v
	}

	w.advanceRotations()
	w.wantStep(r.Name(), custodian.StepHold)
	if s := w.rotation(r.Name()); s.Total != 300 || s.Done != 301 {
		t.Errorf("counts: got %d moved, %d verified, want 300 and 301", s.Total, s.Done)
	}
	w.wantUnder("movies", 2, born)
	w.wantUnder("series", 1, born)
	w.whole()

	_, err = w.c.RetireRotation(t.Context(), officer, "", r.Name())
	wantErr(t, "retire within the hold", err, custodian.ErrRotationState)
	w.advance(25 * time.Hour)
	if got, err := w.c.RetireRotation(t.Context(), officer, "", r.Name()); err != nil || got.Step != custodian.StepRetired {
		t.Errorf("retire: got %+v, %v", got, err)
	}
	_, err = w.c.RollBackRotation(t.Context(), officer, "", r.Name())
	wantErr(t, "roll back what is retired", err, custodian.ErrRotationState)
	w.whole()
	if keks := w.keks("movies"); len(keks) != 2 || keks[0].State != custodian.StateDeactivated || keks[1].State != custodian.StateActive {
		t.Errorf("keks: got %v", keks)
	}
}

// What the status says of a rotation is what the store has: whenever it stands
// still, through a restart, and at the end.
func TestRotationProgress(t *testing.T) {
	const total = 4*custodian.MoveBatch + 20
	w := newWorld(t)
	w.cfg.RotationRate = 5 * custodian.MoveBatch // slow enough to be stopped on the way
	w.reopen()
	w.category("movies")
	w.fill("movies", "film", total)
	if _, err := w.c.StartRotation(t.Context(), officer, kekOrder); err != nil {
		t.Fatal(err)
	}
	inStatus := func() custodian.RotationStatus {
		t.Helper()
		s, err := w.c.Status(t.Context(), operator)
		if err != nil || len(s.Rotations) != 1 {
			t.Fatalf("status: got rotations %+v, %v", s.Rotations, err)
		}
		return s.Rotations[0]
	}
	moved := func() (n uint64) {
		for _, k := range w.contentKeys() {
			if k.Key.KEK.Version == 2 {
				n++
			}
		}
		return n
	}
	for stop := 1; stop <= 3; stop++ {
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- w.c.AdvanceRotations(ctx) }()
		for deadline := time.Now().Add(10 * time.Second); inStatus().Done < uint64(custodian.MoveBatch*stop); time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("stop %d: it is still at %+v", stop, inStatus())
			}
		}
		held := w.breaker.block("hsm.Reseal")
		got, want := inStatus(), moved()
		agree := func() bool { return (max(got.Done, want)-min(got.Done, want))*100 <= total }
		// A batch may still be on its way into the store.
		for deadline := time.Now().Add(10 * time.Second); !agree() && time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
			got, want = inStatus(), moved()
		}
		if got.Total != total || !agree() || got.Rate <= 0 {
			t.Errorf("stop %d: status says %d of %d at %.1f/s, and %d of %d have moved", stop, got.Done, got.Total, got.Rate, want, total)
		}
		if left := time.Duration(float64(got.Total-got.Done) / got.Rate * float64(time.Second)); got.Remaining < left-left/100 || got.Remaining > left+left/100 {
			t.Errorf("stop %d: %s remain, want %s", stop, got.Remaining, left)
		}
		cancel()
		held()
		if err := <-ended; err == nil {
			t.Fatalf("stop %d: it came to its end", stop)
		}
		w.reopen()
	}
	w.advanceRotations()
	if got := inStatus(); got.Step != custodian.StepHold || got.Done != total || got.Total != total {
		t.Errorf("at the end: got %+v", got)
	}
	w.whole()
}

// A record that was put back from before the rotation does not open any more,
// once its KEK is retired; one that still lies under it forbids to retire it.
func TestRetireLooksAtRecords(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	w.fill("movies", "film", 3)
	old := w.contentKeys()[1]
	o := kekOrder
	o.Hold = 0
	r := w.rotate(o)
	putBack := func() {
		t.Helper()
		if err := w.st.Update(t.Context(), func(tx custodian.UpdateTx) error { return tx.ReplaceContentKey(old.Key.Revision+1, old) }); err != nil {
			t.Fatal(err)
		}
	}
	putBack()
	_, err := w.c.RetireRotation(t.Context(), officer, "", r.Name())
	wantErr(t, "retire with a reference left", err, custodian.ErrRotationState)
	wantErr(t, "release meanwhile", w.release(provider, old.Key.KID), nil)
	// Rolling back and forth cleans up.
	if _, err := w.c.RollBackRotation(t.Context(), officer, "", r.Name()); err != nil {
		t.Fatal(err)
	}
	w.advanceRotations()
	w.wantStep(r.Name(), custodian.StepRolledBack)
	o.RequestID = "rotate-2"
	r = w.rotate(o)
	if r.Name() != "kek/movies/3" {
		t.Errorf("the version after one that was rolled back: got %s, want kek/movies/3", r.Name())
	}
	if _, err := w.c.RetireRotation(t.Context(), officer, "", r.Name()); err != nil {
		t.Fatal(err)
	}
	w.whole()
	for _, k := range w.contentKeys() {
		if k.Key.KID == old.Key.KID {
			old.Key.Revision = k.Key.Revision - 1
		}
	}
	putBack()
	wantErr(t, "release what lies under a retired KEK", w.release(provider, old.Key.KID), custodian.ErrRecordCorrupt)
}

func TestRollBackKEK(t *testing.T) {
	for _, when := range []string{"before the move", "in the hold"} {
		t.Run(when, func(t *testing.T) {
			w := newWorld(t)
			w.category("movies")
			w.fill("movies", "film", 5)
			r, err := w.c.StartRotation(t.Context(), officer, kekOrder)
			if err != nil {
				t.Fatal(err)
			}
			w.fill("movies", "under the successor", 5)
			born := w.births()
			if when == "in the hold" {
				w.advanceRotations()
				w.wantStep(r.Name(), custodian.StepHold)
			}
			if got, err := w.c.RollBackRotation(t.Context(), officer, "", r.Name()); err != nil || got.Step != custodian.StepRollback {
				t.Fatalf("roll back: got %+v, %v", got, err)
			}
			w.fill("movies", "after", 2)
			for kid, v := range w.births() {
				born[kid] = v
			}
			w.reopen()
			w.advanceRotations()
			w.wantStep(r.Name(), custodian.StepRolledBack)
			w.wantUnder("movies", 1, born)
			w.whole()
		})
	}
}

// A compromise freezes or goes on as decided; what was born at or before the
// compromised version counts as compromised for good, what is born later not.
func TestCompromisedKEK(t *testing.T) {
	for _, serve := range []bool{false, true} {
		t.Run(fmt.Sprintf("serve=%v", serve), func(t *testing.T) {
			w := newWorld(t)
			w.category("movies")
			w.fill("movies", "film", 3)
			exposed := w.contentKeys()
			w.freeze("movies", custodian.CategoryFrozen) // break-glass
			o := kekOrder
			o.Compromised, o.Serve = []uint32{1}, serve
			r, err := w.c.StartRotation(t.Context(), officer, o)
			if err != nil {
				t.Fatal(err)
			}
			_, err = w.c.RollBackRotation(t.Context(), officer, "", r.Name())
			wantErr(t, "go back to what others know", err, custodian.ErrKeyCompromised)
			w.advanceRotations()
			w.wantStep(r.Name(), custodian.StepRetired)
			if k := w.keks("movies")[0]; k.State != custodian.StateCompromised {
				t.Errorf("kek %s: got %s, want COMPROMISED", k.ID, k.State)
			}
			w.reopen()
			want := custodian.ErrCategoryFrozen
			if serve {
				want = nil
			}
			for _, k := range exposed {
				wantErr(t, "release what was exposed", w.release(provider, k.Key.KID), want)
			}
			w.freeze("movies", custodian.CategoryOpen)
			want = custodian.ErrKeyCompromised
			if serve {
				want = nil
			}
			for _, k := range exposed {
				wantErr(t, "release what was exposed, not frozen", w.release(provider, k.Key.KID), want)
				info, err := w.c.DescribeContentKey(t.Context(), auditor, k.Key.KID)
				if err != nil || info.State != custodian.StateCompromised || info.KEK.Version != 2 {
					t.Errorf("content key %s: got %s under %s, %v, want COMPROMISED under version 2", k.Key.KID, info.State, info.KEK, err)
				}
			}
			wantErr(t, "issue what was exposed", w.issueErr(ask("movies", "film-0", "SD")), custodian.ErrKeyCompromised)
			w.issue("movies", "born later", "SD")
			for _, k := range w.contentKeys() {
				if k.Key.BirthKEK == 2 {
					wantErr(t, "release what was born later", w.release(provider, k.Key.KID), nil)
				}
			}
			w.reopen()
		})
	}
}

func TestRotationRefusals(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	from := w.log.Size()
	for _, c := range []struct {
		name string
		who  custodian.Caller
		o    custodian.RotationOrder
		want error
	}{
		{"operator", operator, kekOrder, custodian.ErrDenied},
		{"packager", packager, kekOrder, custodian.ErrDenied},
		{"nobody", nobody, custodian.RotationOrder{Kind: custodian.RotateMEK}, custodian.ErrDenied},
		{"unknown category", officer, custodian.RotationOrder{Kind: custodian.RotateKEK, Category: "none"}, custodian.ErrCategoryNotFound},
		{"unknown version", officer, custodian.RotationOrder{Kind: custodian.RotateKEK, Category: "movies", Compromised: []uint32{2}}, custodian.ErrInvalid},
	} {
		_, err := w.c.StartRotation(t.Context(), c.who, c.o)
		wantErr(t, c.name, err, c.want)
	}
	n := 0
	for _, e := range w.entries(from) {
		if e.Outcome != audit.Begun {
			n++
		}
	}
	if n != 5 {
		t.Errorf("got %d entries in the audit log, want one for each refusal", n)
	}
	_, err := w.c.StartRotation(t.Context(), officer, custodian.RotationOrder{Kind: "cek"})
	wantErr(t, "unknown kind", err, custodian.ErrInvalid)
	_, err = w.c.RollBackRotation(t.Context(), officer, "", "kek/movies/9")
	wantErr(t, "roll back what there is not", err, custodian.ErrInvalid)
}
