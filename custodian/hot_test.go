package custodian_test

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/audit"
)

// crowd has n callers ask for one key at once, and returns when all but the first
// wait for the operation that it has begun. end waits for the answers.
func (w *world) crowd(first context.Context, n int, kid custodian.KID) (end func() []error) {
	w.t.Helper()
	errs := make([]error, n)
	var wg sync.WaitGroup
	ask := func(ctx context.Context, i int) {
		res, err := w.c.Retrieve(ctx, provider, custodian.RetrieveRequest{KIDs: []custodian.KID{kid}})
		if err == nil {
			if err = res[0].Err; err == nil {
				res[0].Key.Use(func(b []byte) {
					if !bytes.Equal(b, w.answered[kid]) {
						err = errors.New("other bytes than answered before")
					}
				})
			}
			res[0].Key.Destroy()
		}
		errs[i] = err
	}
	before, shared := w.breaker.count("hsm.Open"), w.c.Hot().Shared
	wg.Go(func() { ask(first, 0) })
	w.until(func() bool { return w.breaker.count("hsm.Open") == before+1 })
	for i := 1; i < n; i++ {
		wg.Go(func() { ask(w.t.Context(), i) })
	}
	w.until(func() bool { return w.c.Hot().Shared == shared+uint64(n-1) })
	return func() []error { wg.Wait(); return errs }
}

func (w *world) until(is func() bool) {
	w.t.Helper()
	for end := time.Now().Add(10 * time.Second); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			w.t.Fatal("it did not come to that within 10 s")
		}
	}
}

// TestFlight: who ask for one key at once share one operation of the token,
// and each gets a key, a decision and an audit entry of their own.
func TestFlight(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	kid := w.issue("movies", "film", "HD")[0].KID
	from := w.log.Size()
	const n = 50
	t.Run("success", func(t *testing.T) {
		before := w.breaker.count("hsm.Open")
		release := w.breaker.block("hsm.Open")
		end := w.crowd(t.Context(), n, kid)
		wantErr(t, "a caller without a grant, meanwhile", w.release(nobody, kid), custodian.ErrDenied)
		release()
		for i, err := range end() {
			if err != nil {
				t.Errorf("caller %d: %v", i, err)
			}
		}
		if got := w.breaker.count("hsm.Open") - before; got != 1 {
			t.Errorf("%d operations of the token, want 1", got)
		}
		allowed := 0
		for _, e := range w.entries(from) {
			if e.Outcome == audit.Allowed {
				allowed++
			}
		}
		if allowed != n {
			t.Errorf("%d audit entries, want %d", allowed, n)
		}
		w.noneInClear()
	})
	t.Run("the token fails", func(t *testing.T) {
		release := w.breaker.block("hsm.Open")
		end := w.crowd(t.Context(), n, kid)
		w.breaker.arm("hsm.Open", 1, true)
		release()
		for i, err := range end() {
			if i == 0 && err == nil { // it was on its way into the token before that was armed
				continue
			}
			if err != nil {
				wantErr(t, "a caller", err, custodian.ErrHSMUnavailable)
			}
		}
		w.breaker.disarm()
		if err := w.release(provider, kid); err != nil {
			t.Errorf("the next call: %v", err)
		}
		w.noneInClear()
	})
	t.Run("the first one leaves", func(t *testing.T) {
		before := w.breaker.count("hsm.Open")
		release := w.breaker.block("hsm.Open")
		ctx, leave := context.WithCancel(t.Context())
		end := w.crowd(ctx, n, kid)
		leave()
		release()
		errs := end()
		wantErr(t, "the first one", errs[0], custodian.ErrDeadline)
		for i, err := range errs[1:] {
			if err != nil {
				t.Errorf("caller %d: %v", i+1, err)
			}
		}
		if got := w.breaker.count("hsm.Open") - before; got != 2 {
			t.Errorf("%d operations of the token, want the first one's and one more", got)
		}
		w.noneInClear()
	})
	t.Run("one that waits leaves", func(t *testing.T) {
		release := w.breaker.block("hsm.Open")
		end := w.crowd(t.Context(), 2, kid)
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Millisecond)
		defer cancel()
		_, err := w.c.Retrieve(ctx, provider, custodian.RetrieveRequest{KIDs: []custodian.KID{kid}})
		wantErr(t, "one whose time ends", err, custodian.ErrDeadline)
		release()
		for i, err := range end() {
			if err != nil {
				t.Errorf("caller %d: %v", i, err)
			}
		}
		w.noneInClear()
	})
}

// TestHotTitle: what is kept spares the token for an absolute time, and for that
// time only; each release is decided and written down on its own.
func TestHotTitle(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	w.category("series")
	hot, cold := w.issue("movies", "film", "HD")[0].KID, w.issue("series", "show", "HD")[0].KID
	w.cfg.HotTitles = map[custodian.CategoryName]time.Duration{"movies": 30 * time.Second}
	w.reopen()
	before, from := w.breaker.count("hsm.Open"), w.log.Size()
	opens := func(want int) {
		t.Helper()
		if got := w.breaker.count("hsm.Open") - before; got != want {
			t.Errorf("%d operations of the token, want %d", got, want)
		}
	}
	ask := func(kid custodian.KID) {
		t.Helper()
		r := w.retrieve(provider, kid)
		if r.Err != nil {
			t.Fatal(r.Err)
		}
		r.Key.Use(func(b []byte) {
			if !bytes.Equal(b, w.answered[kid]) {
				t.Error("other bytes than answered before")
			}
		})
		r.Key.Destroy()
	}
	for range 3 {
		ask(hot)
		ask(cold)
	}
	opens(1 + 3)
	wantErr(t, "a caller without a grant", w.release(nobody, hot), custodian.ErrDenied)
	var details []string
	for _, e := range w.entries(from) {
		if bytes.Equal(e.KID, hot[:]) && e.Outcome == audit.Allowed {
			details = append(details, e.Detail)
		}
	}
	if len(details) != 3 || details[0] != "" || !strings.Contains(details[1], "kept in clear") || !strings.Contains(details[2], "kept in clear") {
		t.Errorf("the audit entries say %q", details)
	}
	// Its use does not prolong it.
	w.advance(29 * time.Second)
	w.c.SweepHotTitles()
	ask(hot)
	opens(4)
	slots := w.c.KeptForTest()
	w.advance(900 * time.Millisecond) // the next look would be at its end
	w.c.SweepHotTitles()
	if got := w.c.Hot().Kept; got != 0 {
		t.Errorf("%d kept just before the end, want 0", got)
	}
	for _, slot := range slots {
		if !bytes.Equal(slot, make([]byte, len(slot))) {
			t.Error("a slot of the arena is not wiped")
		}
	}
	ask(hot)
	opens(5)
	// Nor does it serve past its end where nobody has looked.
	w.advance(30 * time.Second)
	ask(hot)
	opens(6)
	if s := w.c.Hot(); s.Hits != 3 || s.Kept != 1 {
		t.Errorf("got %+v, want 3 hits, 1 kept", s)
	}
	s, err := w.c.Snapshot(t.Context())
	if err != nil || !strings.Contains(strings.Join(s.Warnings, "\n"), "hot_titles") {
		t.Errorf("status does not warn: %v, %q", err, s.Warnings)
	}
}

// TestHotTitleWiped: whatever takes a key away, or replaces what protects it,
// wipes what is kept, at once.
func TestHotTitleWiped(t *testing.T) {
	for _, test := range []struct {
		what string
		do   func(*world, custodian.KID) error
		want error // of the next release
	}{
		{"freeze", func(w *world, _ custodian.KID) error {
			w.freeze("movies", custodian.CategoryFrozen)
			return nil
		}, custodian.ErrCategoryFrozen},
		{"suspended key", func(w *world, kid custodian.KID) error {
			return w.c.PutException(w.t.Context(), custodian.Exception{KID: kid, State: custodian.StateSuspended, Time: w.now(), Revision: 1})
		}, custodian.ErrKeyState},
		{"compromised key", func(w *world, kid custodian.KID) error {
			return w.c.PutException(w.t.Context(), custodian.Exception{KID: kid, State: custodian.StateCompromised, Time: w.now(), Revision: 1})
		}, custodian.ErrKeyCompromised},
		{"frozen caller", func(w *world, _ custodian.KID) error {
			_, err := w.c.FreezeCaller(w.t.Context(), officer, custodian.FreezeCallerRequest{Identity: provider.ID, Cause: "stolen"})
			return err
		}, custodian.ErrCallerFrozen},
		{"revoked session", func(w *world, _ custodian.KID) error {
			_, err := w.c.Revoke(w.t.Context(), operator, custodian.RevokeRequest{SessionID: "session-1", Until: w.now().Add(time.Hour), Cause: "shared"})
			return err
		}, nil},
		{"rotation of the KEK", func(w *world, _ custodian.KID) error {
			_, err := w.c.StartRotation(w.t.Context(), officer, custodian.RotationOrder{Kind: custodian.RotateKEK, Category: "movies"})
			return err
		}, nil},
		{"compromise of the KEK", func(w *world, _ custodian.KID) error {
			_, err := w.c.StartRotation(w.t.Context(), officer, custodian.RotationOrder{Kind: custodian.RotateKEK, Category: "movies", Compromised: []uint32{1}})
			return err
		}, custodian.ErrCategoryFrozen},
		{"rotation of the MEK", func(w *world, _ custodian.KID) error {
			_, err := w.c.StartRotation(w.t.Context(), officer, mekOrder)
			return err
		}, nil},
	} {
		t.Run(test.what, func(t *testing.T) {
			w := newWorld(t)
			w.category("movies")
			kid := w.issue("movies", "film", "HD")[0].KID
			w.cfg.HotTitles = map[custodian.CategoryName]time.Duration{"movies": time.Minute}
			w.reopen()
			if err := w.release(provider, kid); err != nil {
				t.Fatal(err)
			}
			slots := w.c.KeptForTest()
			if len(slots) != 1 || !bytes.Equal(slots[0][:custodian.CEKSize], w.answered[kid]) {
				t.Fatalf("%d kept, want the one that was released", len(slots))
			}
			if err := test.do(w, kid); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(slots[0], make([]byte, len(slots[0]))) {
				t.Error("it is not wiped")
			}
			if s := w.c.Hot(); s.Kept != 0 {
				t.Errorf("%d are kept", s.Kept)
			}
			err := w.release(provider, kid)
			if test.want != nil {
				wantErr(t, "the next release", err, test.want)
			} else if err != nil {
				t.Errorf("the next release: %v", err)
			}
			if s := w.c.Hot(); s.Hits != 0 {
				t.Errorf("%d releases of what was kept", s.Hits)
			}
		})
	}
}

// TestHotTitleTooLate: a call that was decided before a freeze keeps nothing
// after it.
func TestHotTitleTooLate(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	kid := w.issue("movies", "film", "HD")[0].KID
	w.cfg.HotTitles = map[custodian.CategoryName]time.Duration{"movies": time.Minute}
	w.reopen()
	release := w.breaker.block("hsm.Open")
	end := w.crowd(t.Context(), 3, kid)
	w.freeze("movies", custodian.CategoryFrozen)
	release()
	end()
	if s := w.c.Hot(); s.Kept != 0 {
		t.Errorf("%d are kept after the freeze", s.Kept)
	}
	w.freeze("movies", custodian.CategoryOpen)
	if err := w.release(provider, kid); err != nil {
		t.Fatal(err)
	}
	slots := w.c.KeptForTest()
	if len(slots) != 1 {
		t.Fatalf("%d kept, want 1", len(slots))
	}
	// A KEK that is gone takes what it opened along.
	w.advance(16 * time.Minute)
	w.c.SweepHotTitles()
	if w.c.Hot().Kept != 0 {
		t.Error("it outlived its KEK")
	}
	ctx, cancel := context.WithCancel(t.Context())
	if err := w.release(provider, kid); err != nil {
		t.Fatal(err)
	}
	slots = w.c.KeptForTest()
	cancel()
	w.c.RunHotTitles(ctx) // the daemon ends
	if len(slots) != 1 || !bytes.Equal(slots[0], make([]byte, len(slots[0]))) {
		t.Errorf("at the end: %d kept, and not wiped", len(slots))
	}
}

// TestHotTitleLimits: nothing is kept for longer than a minute.
func TestHotTitleLimits(t *testing.T) {
	w := newWorld(t)
	for _, life := range []time.Duration{time.Minute + 1, time.Second - 1, -time.Minute} {
		w.cfg.HotTitles = map[custodian.CategoryName]time.Duration{"movies": life}
		if err := w.open(); err == nil || !strings.Contains(err.Error(), "1s to 1m0s") {
			t.Errorf("%s: got %v, want a refusal that says what it may be", life, err)
		}
	}
}

// BenchmarkFlight is what a release pays for its flight where nobody joins it.
func BenchmarkFlight(b *testing.B) {
	fly := custodian.NewFlights()
	b.ReportAllocs()
	var worker atomic.Int32
	b.RunParallel(func(pb *testing.PB) {
		kid := custodian.KID{1: byte(worker.Add(1))}
		for pb.Next() {
			kid[0]++
			kid[15]++
			fly(kid)
		}
	})
}
