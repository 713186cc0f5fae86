package custodian_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"filippo.io/age"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/audit"
)

// An adminAction is what the log has twice. ready prepares one that has not been done
// before, and returns what does it.
type adminAction struct {
	action string
	breaks string // an operation that it needs and that can fail, where there is one
	stops  bool   // it only stops something, and does not wait for the log
	ready  func(n int) func() error
}

// Every administrative action is written before it begins and after it ends,
// with one reference, whatever comes of it. Where the attempt cannot be written,
// nothing is done; where the machine stops right behind it, the log shows an
// attempt without an end, and the next start ends it.
func TestAttempts(t *testing.T) {
	w := newWorld(t)
	w.cfg.Events = custodian.EventLimits{DailyCap: 1000}
	w.reopen()
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	// in prepares a category of its own for each try.
	in := func(prefix string, f func(name custodian.CategoryName) error) func(int) func() error {
		return func(n int) func() error {
			name := custodian.CategoryName(fmt.Sprintf("%s-%d", prefix, n))
			w.category(name)
			return func() error { return f(name) }
		}
	}
	rotating := func(prefix string, f func(rotation string) error) func(int) func() error {
		return func(n int) func() error {
			name := custodian.CategoryName(fmt.Sprintf("%s-%d", prefix, n))
			w.category(name)
			r := w.rotate(custodian.RotationOrder{Kind: custodian.RotateKEK, Category: name})
			return func() error { return f(r.Name()) }
		}
	}
	mode := func(name custodian.CategoryName, m custodian.CategoryMode) error {
		_, err := w.c.SetCategoryMode(ctx, officer, custodian.SetModeRequest{Name: name, Mode: m})
		return err
	}
	caller := custodian.FreezeCallerRequest{Identity: narrow.ID, Cause: "a test"}
	w.attempted([]adminAction{
		{"category.create", "hsm.GenerateKey", false, func(n int) func() error {
			return func() error {
				_, err := w.c.CreateCategory(ctx, officer, custodian.CreateCategoryRequest{Name: custodian.CategoryName(fmt.Sprintf("new-%d", n))})
				return err
			}
		}},
		{"category.freeze", "store.Update", true, in("freeze", func(name custodian.CategoryName) error { return mode(name, custodian.CategoryFrozen) })},
		{"category.open", "store.Update", false, in("open", func(name custodian.CategoryName) error { return mode(name, custodian.CategoryOpen) })},
		{"category.providers", "store.Update", false, in("providers", func(name custodian.CategoryName) error {
			_, err := w.c.SetProviders(ctx, officer, custodian.SetProvidersRequest{Category: name, Providers: []string{"local"}})
			return err
		})},
		{"category.reencrypt", "store.Update", false, in("reencrypt", func(name custodian.CategoryName) error {
			_, err := w.c.Reencrypt(ctx, operator, custodian.ReencryptRequest{Category: name})
			return err
		})},
		{"kek.rotate", "hsm.GenerateKey", false, in("event", func(name custodian.CategoryName) error {
			_, err := w.c.ReportEvent(ctx, packager, custodian.Event{ID: string(name), Kind: custodian.EventNewBatch, Category: name})
			return err
		})},
		{"rotation.start", "store.Update", false, in("rotate", func(name custodian.CategoryName) error {
			_, err := w.c.StartRotation(ctx, officer, custodian.RotationOrder{Kind: custodian.RotateKEK, Category: name})
			return err
		})},
		{"rotation.rollback", "store.Update", false, rotating("rollback", func(rotation string) error {
			_, err := w.c.RollBackRotation(ctx, officer, "", rotation)
			return err
		})},
		{"rotation.retire", "store.Update", false, rotating("retire", func(rotation string) error {
			_, err := w.c.RetireRotation(ctx, officer, "", rotation)
			return err
		})},
		{"keys.import", "store.Update", false, in("import", func(name custodian.CategoryName) error {
			_, err := w.take(officer, w.bring(name, string(name), w.foreign("SD", 0xa0+name[len(name)-1], name[len(name)-1]), w.foreign("HD", 0xb0+name[len(name)-1], 0x80+name[len(name)-1])))
			return err
		})},
		{"keys.export", "hsm.Open", false, func(n int) func() error {
			name := custodian.CategoryName(fmt.Sprintf("export-%d", n))
			w.category(name)
			w.issue(name, string(name), "SD", "HD")
			return func() error {
				keys, err := w.c.Export(ctx, officer, custodian.ExportRequest{Category: name, ContentID: []byte(name), Recipient: "alpha"})
				for _, k := range keys {
					k.Key.Destroy()
				}
				return err
			}
		}},
		{"caller.freeze", "store.Update", true, func(n int) func() error {
			if n == 2 { // the first try has stopped it, without the log
				if _, err := w.c.LiftCaller(ctx, officer, caller); err != nil {
					t.Fatal(err)
				}
			}
			return func() error { _, err := w.c.FreezeCaller(ctx, officer, caller); return err }
		}},
		{"caller.lift", "store.Update", false, func(int) func() error {
			if _, err := w.c.FreezeCaller(ctx, officer, caller); err != nil {
				t.Fatal(err)
			}
			return func() error { _, err := w.c.LiftCaller(ctx, officer, caller); return err }
		}},
		{"policy.load", "", false, func(int) func() error { return func() error { return w.c.SetPolicy(ctx, testPolicy(t)) } }},
		{"backup", "", false, func(int) func() error {
			return func() error { return w.c.Backup(ctx, operator, id.Recipient().String(), new(bytes.Buffer)) }
		}},
		{"time.confirm", "store.Update", false, func(int) func() error {
			w.cfg.ConfirmTime = true
			w.openParts()
			return func() (err error) { w.c, err = custodian.Open(ctx, w.cfg); return err }
		}},
	})
	w.cfg.ConfirmTime = false
	w.reopen()
	from := w.log.Size()
	device := errors.New("out of order")
	wantErr(t, "backup that nobody takes", w.c.Backup(ctx, operator, id.Recipient().String(), fullDisk{device}), device)
	w.wantPair(from, "backup", audit.Failed)
	w.whole()
}

// The same for the acts of ceremonies.
func TestAttemptsOfCeremonies(t *testing.T) {
	a := newAssembly(t)
	a.category("movies")
	a.freeze("movies", custodian.CategoryFrozen)
	act := func(prepare func(info custodian.CeremonyInfo, text string), do func(info custodian.CeremonyInfo, text string) error) func(int) func() error {
		return func(int) func() error {
			if categoryMode(t, a, "movies") != custodian.CategoryFrozen {
				a.freeze("movies", custodian.CategoryFrozen)
			}
			text := a.plan("unfreeze", "categories: [movies]")
			info := a.propose(text)
			prepare(info, text)
			return func() error { return do(info, text) }
		}
	}
	nothing := func(custodian.CeremonyInfo, string) {}
	a.attempted([]adminAction{
		{"ceremony.propose", "store.Update", false, func(int) func() error {
			return func() error {
				_, _, err := a.c.ProposeCeremony(t.Context(), officer, []byte(a.plan("unfreeze", "categories: [movies]")), "", false)
				return err
			}
		}},
		{"ceremony.approve", "store.Update", false, act(nothing, func(info custodian.CeremonyInfo, text string) error {
			_, err := a.c.ApproveCeremony(t.Context(), officer, a.request(a.anna, info, text, custodian.ActApprove))
			return err
		})},
		{"ceremony.cancel", "store.Update", false, act(nothing, func(info custodian.CeremonyInfo, text string) error {
			_, err := a.c.CancelCeremony(t.Context(), officer, a.request(a.anna, info, text, custodian.ActCancel))
			return err
		})},
		{"ceremony.execute", "store.Update", false, act(func(info custodian.CeremonyInfo, text string) { a.approve(info, text, a.anna, a.ben) },
			func(info custodian.CeremonyInfo, _ string) error { return a.execute(info) })},
	})
	a.whole()
}

// attempted tries each action where its attempt cannot be written, where it
// fails, and where it succeeds; and lets the machine stop behind the attempt.
func (w *world) attempted(actions []adminAction) {
	w.t.Helper()
	for _, d := range actions {
		do := d.ready(1)
		w.breaker.arm("audit.Sync", 1, false)
		before := w.breaker.count("store.Update") + w.breaker.count("hsm.GenerateKey")
		wantErr(w.t, d.action+" without an attempt", do(), custodian.ErrAuditBlocked)
		w.breaker.disarm()
		if n := w.breaker.count("store.Update") + w.breaker.count("hsm.GenerateKey") - before; n != 0 && !d.stops {
			w.t.Errorf("%s: its attempt is not written down, and it made %d calls that change something", d.action, n)
		}
		w.reopen()
		if d.breaks != "" {
			do = d.ready(2)
			from := w.log.Size()
			w.breaker.arm(d.breaks, 1, false)
			if err := do(); !errors.Is(err, errBroken) {
				w.t.Errorf("%s, %s fails: got %v", d.action, d.breaks, err)
			}
			w.breaker.disarm()
			w.wantPair(from, d.action, audit.Failed)
		}
		do = d.ready(3)
		from, image := w.log.Size(), filepath.Join(w.t.TempDir(), "image")
		w.breaker.afterwards("audit.Sync", func() { copyFolder(w.t, w.dir, image) })
		wantErr(w.t, d.action, do(), nil)
		w.wantPair(from, d.action, audit.Allowed)
		w.wantInterrupted(image, from, d.action)
	}
}

// wantPair checks that the log has, from there on, one attempt of the action,
// before anything else, and one end of it.
func (w *world) wantPair(from uint64, action string, want audit.Outcome) {
	w.t.Helper()
	ended := false
	entries := w.entries(from)
	for i, e := range entries {
		if (e.Outcome == audit.Begun) != (i == 0) || i == 0 && e.Action != action {
			w.t.Errorf("entry %d: got %q, want one attempt of %s, first", e.Index, line(e), action)
		}
		if !e.HasAttempt {
			continue
		}
		ended = true
		if e.Attempt != from || e.Action != action || e.Outcome != want {
			w.t.Errorf("entry %d: got %q, the end of %d, want %s %s of %d", e.Index, line(e), e.Attempt, action, want, from)
		}
	}
	if !ended {
		w.t.Errorf("%s: no end among %d entries", action, len(entries))
	}
}

// wantInterrupted checks a copy of the folder, made right behind the attempt at
// index: its log ends with it, and a start writes its end.
func (w *world) wantInterrupted(image string, index uint64, action string) {
	w.t.Helper()
	dir, answered := w.dir, w.answered
	w.close()
	defer func() {
		w.dir, w.answered = dir, answered
		w.reopen()
	}()
	w.dir = image
	var last audit.Entry
	if err := audit.Read(w.auditDir(), 0, func(e *audit.Entry) error { last = *e; return nil }); err != nil {
		w.t.Fatal(err)
	}
	if last.Index != index || last.Outcome != audit.Begun || last.Action != action {
		w.t.Errorf("%s: right behind the attempt, the log ends with %q", action, line(last))
	}
	w.reopen()
	if e := w.entries(index + 1)[0]; e.Action != action || e.Outcome != audit.Failed || e.Reason != custodian.ReasonInterrupted || !e.HasAttempt || e.Attempt != index {
		w.t.Errorf("%s: the start wrote %q, the end of %d", action, line(e), e.Attempt)
	}
	w.attemptsEnd()
}

type fullDisk struct{ err error }

func (f fullDisk) Write([]byte) (int, error) { return 0, f.err }

// A copier copies store and log as they are when it is first written to.
type copier struct {
	w    *world
	to   string
	done bool
}

func (c *copier) Write(b []byte) (int, error) {
	if !c.done {
		c.done = true
		if err := os.CopyFS(c.to, os.DirFS(c.w.dir)); err != nil {
			return 0, err
		}
	}
	return len(b), nil
}

// The machine stops in the middle of a backup. The log shows the attempt, and
// the next start ends it, once.
func TestInterrupted(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	c := &copier{w: w, to: t.TempDir()}
	if err := w.c.Backup(t.Context(), operator, id.Recipient().String(), c); err != nil || !c.done {
		t.Fatal(err)
	}
	w.close()
	w.dir = c.to
	from := uint64(0)
	for _, e := range w.entries(0) {
		from = e.Index
		if e.Action == "backup" && e.Outcome != audit.Begun {
			t.Fatalf("the backup has ended already: %s", line(e))
		}
	}
	w.reopen()
	entries := w.entries(from)
	if len(entries) != 3 || line(entries[0]) != "backup begun operator operator" ||
		line(entries[1]) != "backup failed INTERRUPTED operator operator" || entries[1].Attempt != from || !entries[1].HasAttempt {
		t.Errorf("entries = %+v, want the attempt, its end and a start", entries)
	}
	w.reopen()
	w.attemptsEnd()
	if again := w.entries(from); len(again) != 4 {
		t.Errorf("%d entries after another start, want one more", len(again))
	}
	w.whole()
}

// What a ceremony orders is in the log twice as well: the log has it before it
// begins, and its end names that, once, however often the work is looked after.
func TestAttemptsOfOrders(t *testing.T) {
	a := populated(t)
	a.cfg.Providers = append(a.cfg.Providers, &badKMS{name: "vault"})
	a.reopen()
	for _, order := range []struct{ action, kind, body string }{
		{"rotation.start", "kek-rotation", "categories: [movies]"},
		{"rotation.rollback", "rollback", "rotations: [kek/movies/2]"},
		{"rotation.start", "kek-rotation", "categories: [movies]"},
		{"rotation.retire", "retire", "rotations: [kek/movies/3]"},
		{"kek.destroy", "destroy", "key_versions: [movies/1]"},
		{"rotation.start", "mek-rotation", "mek_version: 1"},
		{"category.providers", "providers", "categories: [movies]\nproviders: [vault]"},
	} {
		from := a.log.Size()
		info := a.begin(a.plan(order.kind, order.body))
		if order.kind == "providers" {
			a.rewraps(func(left []custodian.RewrapStatus) bool { return len(left) == 0 })
		}
		a.wantDone(a.finish(info.ID))
		var begun, ended []uint64
		for _, e := range a.entries(from) {
			switch {
			case e.Action != order.action || e.Caller == "": // the engine's own entries name nobody
			case e.Outcome == audit.Begun && strings.Contains(e.RequestID, info.ID):
				begun = append(begun, e.Index)
			case e.HasAttempt && e.Outcome == audit.Allowed:
				ended = append(ended, e.Attempt)
			default:
				t.Errorf("%s: %q", order.kind, line(e))
			}
		}
		if len(begun) != 1 || !slices.Equal(begun, ended) {
			t.Errorf("%s: %s begins at entries %v, and the ends name %v; want one pair", order.kind, order.action, begun, ended)
		}
	}
	a.whole()
}
