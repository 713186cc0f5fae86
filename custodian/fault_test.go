package custodian_test

import (
	"errors"
	"fmt"
	"maps"
	"testing"

	"github.com/keycustody/custodian/custodian"
)

// A deed is something that must be done wholly or not at all, whichever call
// of whichever part fails in it, before or after doing it.
type deed struct {
	name string
	// prepare makes the world in which it is done.
	prepare func(w *world)
	// do does it, the first time and again.
	do func(w *world) error
	// done says whether it is done, in a world that was opened again.
	done func(w *world) bool
}

func small(w *world) {
	w.cfg.GCMLimits = custodian.GCMLimits{Block: 4, Soft: 5, Hard: 64}
	w.reopen()
	w.category("movies")
	w.issue("movies", "film-1", "SD", "HD")
}

func (w *world) issueErr(req custodian.IssueRequest) error {
	keys, err := w.c.Issue(w.t.Context(), packager, req)
	w.remember(keys)
	return err
}

func (w *world) has(content string, n int) bool {
	w.t.Helper()
	keys, _, err := w.c.ListContentKeys(w.t.Context(), auditor, custodian.ListRequest{Category: "movies", ContentID: []byte(content)})
	if err != nil {
		w.t.Fatal(err)
	}
	if len(keys) != 0 && len(keys) != n {
		w.t.Errorf("content %s has %d keys, want all %d or none", content, len(keys), n)
	}
	return len(keys) == n
}

var deeds = []deed{
	{
		name:    "create a category",
		prepare: small,
		do: func(w *world) error {
			_, err := w.c.CreateCategory(w.t.Context(), officer, custodian.CreateCategoryRequest{Name: "series"})
			if errors.Is(err, custodian.ErrCategoryExists) {
				return nil // as a second try is told after the first was done
			}
			return err
		},
		done: func(w *world) bool {
			_, err := w.c.KeyVersions(w.t.Context(), auditor, "series")
			return err == nil
		},
	}, {
		name:    "issue within a reserved block",
		prepare: small,
		do: func(w *world) error {
			return w.issueErr(ask("movies", "film-2", "SD", "HD"))
		},
		done: func(w *world) bool { return w.has("film-2", 2) },
	}, {
		name: "issue where a block must be reserved",
		prepare: func(w *world) {
			w.cfg.GCMLimits = custodian.GCMLimits{Block: 4, Soft: 60, Hard: 64}
			w.reopen()
			w.category("movies")
			w.issue("movies", "film-1", tracks(4)...)
		},
		do:   func(w *world) error { return w.issueErr(ask("movies", "film-2", "SD", "HD")) },
		done: func(w *world) bool { return w.has("film-2", 2) },
	}, {
		name: "issue at the soft limit",
		prepare: func(w *world) {
			small(w)
			w.issue("movies", "film-3", "SD", "HD")
		},
		do:   func(w *world) error { return w.issueErr(ask("movies", "film-2", "SD", "HD")) },
		done: func(w *world) bool { return w.has("film-2", 2) },
	}, {
		name:    "hand out again",
		prepare: small,
		do:      func(w *world) error { return w.issueErr(ask("movies", "film-1", "SD", "HD")) },
		done:    func(w *world) bool { return w.has("film-1", 2) },
	}, {
		name:    "release",
		prepare: small,
		do: func(w *world) error {
			var errs []error
			for kid := range w.answered {
				errs = append(errs, w.release(provider, kid))
			}
			return errors.Join(errs...)
		},
		done: func(w *world) bool { return true },
	}, {
		name:    "freeze a category",
		prepare: small,
		do: func(w *world) error {
			_, err := w.c.SetCategoryMode(w.t.Context(), officer, custodian.SetModeRequest{Name: "movies", Mode: custodian.CategoryFrozen})
			return err
		},
		done: func(w *world) bool {
			cats, err := w.c.Categories(w.t.Context(), officer)
			return err == nil && cats[0].Mode == custodian.CategoryFrozen
		},
	}, {
		name:    "mark content as packaged",
		prepare: small,
		do: func(w *world) error {
			_, err := w.c.ReportEvent(w.t.Context(), source, packagedEvent("p1", "movies", "film-1"))
			return err
		},
		done: func(w *world) bool {
			for _, k := range w.contentKeys() {
				if k.Key.PackagedTime.IsZero() {
					return false
				}
			}
			return true
		},
	}, {
		name:    "start",
		prepare: small,
		do:      func(w *world) error { return w.open() },
		done:    func(w *world) bool { return true },
	},
}

func TestFaults(t *testing.T) {
	for _, d := range deeds {
		t.Run(d.name, func(t *testing.T) {
			t.Parallel() // half of the time it waits for the disk
			w := newWorld(t)
			d.prepare(w)
			answered := w.answered
			putBack := w.save()
			faults := 0
			everyFault(func(op string, nth int, after bool) (hit bool) {
				putBack()
				w.answered = maps.Clone(answered)
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
			if faults < 4 {
				t.Errorf("%d faults were met; the breaker is not in the way", faults)
			}
		})
	}
}

// everyFault calls f for the first call of every operation, the second and so
// on, until f says that the call did not come.
func everyFault(f func(op string, nth int, after bool) (hit bool)) {
	for _, op := range allOps {
		for _, after := range []bool{false, true} {
			for nth := 1; f(op, nth, after); nth++ {
			}
		}
	}
}

// check holds what must be so after one fault: err is what do said.
func (d deed) check(w *world, err error) {
	w.t.Helper()
	if err != nil && custodian.ReasonOf(err) == "INTERNAL" && !errors.Is(err, errBroken) {
		w.t.Errorf("got %v, which nobody classified", err)
	}
	for _, never := range []error{custodian.ErrKeyNotFound, custodian.ErrDenied, custodian.ErrRecordCorrupt} {
		if errors.Is(err, never) {
			w.t.Errorf("a device fault is told as %v", err)
		}
	}
	again := errors.New("the process has ended")
	if w.c != nil { // the same process goes on, where the log lets it
		if again = d.do(w); again != nil && !errors.Is(again, custodian.ErrAuditBlocked) {
			w.t.Errorf("done again in the same process: %v", again)
		}
	}
	d.settled(w, err == nil || again == nil)
	if again == nil {
		return
	}
	if err := d.do(w); err != nil {
		w.t.Errorf("done again after a restart: %v", err)
	}
	d.settled(w, true)
}

// settled starts again and checks that the deed is done, or that it may also
// not be, and that all is whole.
func (d deed) settled(w *world, must bool) {
	w.t.Helper()
	w.reopen()
	if !d.done(w) && must {
		w.t.Error("it was answered as done, and after a restart it is not")
	}
	w.freeze("movies", custodian.CategoryOpen) // or the keys could not be compared
	w.whole()
	w.consistent()
}

// consistent checks that no control record is half of something, and that the
// token holds what is recorded and no orphan.
func (w *world) consistent() {
	w.t.Helper()
	cats, err := w.c.Categories(w.t.Context(), auditor)
	if err != nil {
		w.t.Fatal(err)
	}
	keks := 0
	for _, cat := range cats {
		for i, k := range w.keks(cat.Name) {
			keks++
			want := custodian.StateDeactivated
			if k.ID.Version == cat.ActiveKEK {
				want = custodian.StateActive
			}
			if k.ID.Version < uint32(i+1) || k.State != want || k.ID.Version > cat.ActiveKEK {
				w.t.Errorf("kek %s is %s at place %d of %s, whose active one is %d", k.ID, k.State, i+1, cat.Name, cat.ActiveKEK)
			}
		}
	}
	for _, r := range w.controls() {
		if r.Kind == custodian.ControlKEK {
			keks--
		}
	}
	if keks != 0 {
		w.t.Errorf("%d KEK records beside those of categories", -keks)
	}
	objects, err := w.hsm.Objects(w.t.Context())
	if err != nil {
		w.t.Fatal(err)
	}
	if len(objects) != 3 {
		w.t.Errorf("the token holds %v, want a MEK and a key pair", objects)
	}
}

// The store answers an error, and then cannot be asked what it did. The change
// is settled before the next one, whichever way it went.
func TestOutcomeUnknown(t *testing.T) {
	for _, did := range []bool{false, true} {
		w := newWorld(t)
		small(w)
		from := w.log.Size()
		w.breaker.arm("store.Update", 1, did)
		w.breaker.down("store.View")
		freeze := custodian.SetModeRequest{Name: "movies", Mode: custodian.CategoryFrozen}
		for range 2 { // the second finds the first still unsettled
			_, err := w.c.SetCategoryMode(t.Context(), officer, freeze)
			wantErr(t, "freeze", err, custodian.ErrStoreUnavailable)
		}
		w.breaker.disarm()
		w.category("series")
		cats, err := w.c.Categories(t.Context(), officer)
		if err != nil || len(cats) != 2 || (cats[0].Mode == custodian.CategoryFrozen) != did {
			t.Errorf("the store did it: %v; got %v and %v", did, cats, err)
		}
		var revisions []uint64
		for _, e := range w.entries(from) {
			if e.ControlDigest != nil {
				revisions = append(revisions, e.ControlRevision)
			}
		}
		for i := range revisions {
			if i > 0 && revisions[i] != revisions[i-1]+1 {
				t.Errorf("the store did it: %v; control revisions in the log: got %v, want no gap", did, revisions)
			}
		}
		if want := map[bool]int{false: 1, true: 2}[did]; len(revisions) != want {
			t.Errorf("the store did it: %v; got control revisions %v in the log, want %d", did, revisions, want)
		}
		w.reopen()
		w.freeze("movies", custodian.CategoryOpen)
		w.whole()
		w.consistent()
	}
}

// What the store did counts as done, even where it answered an error.
func TestStoreDidIt(t *testing.T) {
	w := newWorld(t)
	small(w)
	from := w.log.Size()
	w.breaker.arm("store.Update", 1, true)
	_, err := w.c.CreateCategory(t.Context(), officer, custodian.CreateCategoryRequest{Name: "series"})
	wantErr(t, "create a category", err, nil)
	if entries := w.entries(from); !w.breaker.disarm() || len(entries) != 2 || entries[1].ControlDigest == nil {
		t.Errorf("got %d entries, want the attempt and the change", len(entries))
	}
	w.whole()
	w.consistent()
}

func TestInitFaults(t *testing.T) {
	faults := 0
	everyFault(func(op string, nth int, after bool) (hit bool) {
		w := bareWorld(t)
		w.openParts()
		w.breaker.arm(op, nth, after)
		err := custodian.Init(t.Context(), w.cfg, custodian.InitSpec{})
		if hit = w.breaker.disarm(); !hit {
			return false
		}
		faults++
		t.Run(fmt.Sprintf("%s %d after=%v", op, nth, after), func(t *testing.T) {
			w.t = t
			if err == nil && op != "kms.Unwrap" { // that is tried again
				t.Error("init answers that all is well")
			}
			// Whoever sees the error runs init again, and then starts.
			w.openParts()
			again := custodian.Init(t.Context(), w.cfg, custodian.InitSpec{})
			if err := w.open(); err != nil {
				t.Fatalf("after init said %v, and then %v: start: %v", err, again, err)
			}
			w.category("movies")
			w.issue("movies", "film-1", "SD")
			w.whole()
			w.consistent()
		})
		return true
	})
	if faults < 40 {
		t.Errorf("%d faults were met, want more than 40", faults)
	}
}

func TestInitRefuses(t *testing.T) {
	t.Run("what is initialised", func(t *testing.T) {
		w := newWorld(t)
		w.openParts()
		if err := custodian.Init(t.Context(), w.cfg, custodian.InitSpec{}); err == nil {
			t.Error("a second init makes a second custody")
		}
		w.whole()
		w.consistent()
	})
	t.Run("a MEK without its store", func(t *testing.T) {
		w, other := newWorld(t), bareWorld(t)
		other.cfg.HSM = w.cfg.HSM
		other.openParts()
		if err := custodian.Init(t.Context(), other.cfg, custodian.InitSpec{}); err == nil {
			t.Error("init makes a second custody beside a MEK of the same prefix")
		}
		wantErr(t, "start what was not initialised", other.open(), custodian.ErrUninitialised)
		w.consistent()
	})
	t.Run("a profile that is none", func(t *testing.T) {
		w := bareWorld(t)
		w.openParts()
		if err := custodian.Init(t.Context(), w.cfg, custodian.InitSpec{Profile: "open"}); err == nil {
			t.Error("init makes a MEK of a profile that is none")
		}
		if err := custodian.Init(t.Context(), w.cfg, custodian.InitSpec{}); err != nil {
			t.Errorf("init with a good profile afterwards: %v", err)
		}
	})
	t.Run("no provider", func(t *testing.T) {
		w := bareWorld(t)
		w.openParts()
		cfg := w.cfg
		cfg.DefaultProviders = nil
		if err := custodian.Init(t.Context(), cfg, custodian.InitSpec{}); err == nil {
			t.Error("init makes helper keys that nobody wraps")
		}
		if objects, _ := w.hsm.Objects(t.Context()); len(objects) != 0 {
			t.Errorf("the token holds %v after an init that was refused", objects)
		}
	})
}
