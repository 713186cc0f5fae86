package custodian_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/audit"
)

// rehearse wants a plan to be good, and its changes to say something.
func (a *assembly) rehearse(text string, says ...string) {
	a.t.Helper()
	_, r, err := a.c.ProposeCeremony(a.t.Context(), officer, []byte(text), "", true)
	if err != nil {
		a.t.Errorf("rehearse: %v\n%s", err, text)
	}
	for _, s := range says {
		if !strings.Contains(strings.Join(r.Changes, "\n"), s) {
			a.t.Errorf("rehearsal: got %q, want %q in it", r.Changes, s)
		}
	}
}

// refusePlan wants a plan to be refused for a reason.
func (a *assembly) refusePlan(text, says string) {
	a.t.Helper()
	_, _, err := a.c.ProposeCeremony(a.t.Context(), officer, []byte(text), "", false)
	wantErr(a.t, "propose", err, custodian.ErrPlan)
	if err != nil && !strings.Contains(err.Error(), says) {
		a.t.Errorf("propose: got %q, want %q in it", err, says)
	}
}

func (w *world) state(kid custodian.KID) custodian.State {
	w.t.Helper()
	info, err := w.c.DescribeContentKey(w.t.Context(), auditor, kid)
	if err != nil {
		w.t.Fatal(err)
	}
	return info.State
}

// A content item is re-keyed: packagers get new keys, the old ones are released
// until they are withdrawn.
func TestRekeyCeremony(t *testing.T) {
	a := newAssembly(t)
	a.category("movies")
	old := a.issue("movies", "film-1", "SD", "HD")
	other := a.issue("movies", "film-2", "SD")[0]
	text := a.plan("rekey", "content:\n- {category: movies, id: film-1}")
	a.rehearse(text, "content items that are re-keyed: 1;", "content keys that are superseded: 2;")
	a.refusePlan(a.plan("rekey", "content:\n- {category: movies, id: film-9}"), "there is no content \"film-9\" in category movies")
	a.refusePlan(a.plan("withdraw", "content:\n- {category: movies, hex: 66696c6d2d31}"), "was not re-keyed")
	e := a.wantDone(a.begin(text))
	if e.After.Rekeyed != 1 || e.Before.Rekeyed != 0 {
		t.Errorf("evidence: got %d re-keyed before and %d after, want 0 and 1", e.Before.Rekeyed, e.After.Rekeyed)
	}
	found := 0
	for _, e := range a.entries(0) {
		if e.Action == "content.rekey" && e.Outcome == audit.Allowed && string(e.ContentID) == "film-1" && e.Generation == 2 {
			found++
		}
	}
	if found != 1 {
		t.Errorf("audit entries about film-1: got %d, want 1", found)
	}

	// Nobody has asked for new keys yet: what is packaged goes on playing.
	a.refusePlan(text, "nobody has asked for its keys since")
	a.rehearse(a.plan("withdraw", "content:\n- {category: movies, id: film-1}"), "content keys that are withdrawn: 2, of 1 content items", "nobody has asked for new keys yet: 1;")
	wantErr(t, "release of a superseded key", a.release(provider, old[0].KID), nil)
	if got := a.state(old[0].KID); got != custodian.StateDeactivated {
		t.Errorf("state of a superseded key: got %s, want DEACTIVATED", got)
	}
	a.reopen()
	fresh := a.issue("movies", "film-1", "SD", "HD")
	again := a.issue("movies", "film-1", "SD", "HD")
	for i := range fresh {
		if fresh[i].KID == old[i].KID || fresh[i].Generation != 2 || !fresh[i].Created || again[i].KID != fresh[i].KID || again[i].Created {
			t.Errorf("key %d: got %+v, then %+v; want one new key of generation 2", i, fresh[i].ContentKey, again[i].ContentKey)
		}
	}
	if k := a.issue("movies", "film-1", "UHD1")[0]; k.Generation != 2 {
		t.Errorf("a track that is new: got generation %d, want 2", k.Generation)
	}
	if k := a.issue("movies", "film-2", "SD")[0]; k.KID != other.KID {
		t.Errorf("content that was not re-keyed: got another key")
	}
	// The old KID is known already, so nobody can be given it for the new key.
	req := ask("movies", "film-1", "AUDIO")
	req.Keys[0].KID = old[0].KID
	_, err := a.c.Issue(t.Context(), packager, req)
	wantErr(t, "the old KID for a new key", err, custodian.ErrKIDConflict)

	e = a.wantDone(a.begin(a.plan("withdraw", "content:\n- {category: movies, id: film-1}")))
	if e.After.Withdrawn != 1 {
		t.Errorf("evidence: got %d withdrawn, want 1", e.After.Withdrawn)
	}
	for i := range old {
		wantErr(t, "release of a withdrawn key", a.release(provider, old[i].KID), custodian.ErrKeyState)
		wantErr(t, "release of its successor", a.release(provider, fresh[i].KID), nil)
		delete(a.answered, old[i].KID)
	}
	a.refusePlan(a.plan("withdraw", "content:\n- {category: movies, id: film-1}"), "no keys that are superseded")
	a.rehearse(text, "content keys that are superseded: 3;") // and so on, to generation 3
	a.reopen()
	wantErr(t, "release of a withdrawn key after a start", a.release(provider, old[0].KID), custodian.ErrKeyState)
}

// The blast radius of a key version is re-keyed without naming every item, in
// slices, and once.
func TestRekeyBlastRadius(t *testing.T) {
	a := populated(t) // 20 content items under movies/1
	a.refusePlan(a.plan("rekey", "key_versions: [movies/1]"), "movies/1 protects")
	a.refusePlan(a.plan("rekey", "key_versions: [movies/7]"), "there is no key version movies/7")
	a.wantDone(a.begin(a.plan("kek-compromise", "key_versions: [movies/1]\ndecision: rekey")))
	if got := categoryMode(t, a, "movies"); got != custodian.CategoryRekeyRequired {
		t.Fatalf("mode after the compromise: got %s, want REKEY_REQUIRED", got)
	}
	old := a.contentKeys()[0].Key
	content := string(old.ContentID)
	a.advance(time.Second)

	// Exposed keys are released, and issued to nobody; nor is a new track of
	// their content. New content is issued as ever.
	wantErr(t, "release of an exposed key", a.release(provider, old.KID), nil)
	for _, track := range []custodian.TrackType{"SD", "HD"} {
		_, err := a.c.Issue(t.Context(), packager, ask("movies", content, track))
		wantErr(t, "issue of exposed content "+string(track), err, custodian.ErrKeyCompromised)
	}
	young := a.issue("movies", "young", "SD")[0]
	if again := a.issue("movies", "young", "SD", "HD"); again[0].KID != young.KID {
		t.Error("new content: got another key the second time")
	}

	text := a.plan("rekey", "key_versions: [movies/1]")
	a.rehearse(text, "content items that are re-keyed: 20;", "content keys that are superseded: 20;")
	e := a.wantDone(a.begin(text))
	if e.After.Rekeyed != 20 {
		t.Errorf("evidence: got %d content items, want 20", e.After.Rekeyed)
	}
	fresh := a.issue("movies", content, "SD", "HD")
	if fresh[0].KID == old.KID || fresh[0].Generation != 2 || fresh[1].Generation != 2 {
		t.Errorf("after the re-key: got %+v", fresh)
	}
	a.refusePlan(text, "there is no content to rekey")
	wantErr(t, "release of an exposed key", a.release(provider, old.KID), nil)
	a.rehearse(a.plan("withdraw", "key_versions: [movies/1]"), "content keys that are withdrawn: 20, of 20", "nobody has asked for new keys yet: 19;")
	a.wantDone(a.begin(a.plan("withdraw", "key_versions: [movies/1]")))
	wantErr(t, "release of a withdrawn key", a.release(provider, old.KID), custodian.ErrKeyState)
	wantErr(t, "release of its successor", a.release(provider, fresh[0].KID), nil)

	// The officers declare it over.
	a.wantDone(a.hold(a.plan("category-policy", "categories: [movies]\nmode: open"), a.anna, a.ben))
	a.issue("movies", "film-of-tomorrow", "SD")
}

// A crash, or a fault, in the middle of a re-key: the next start goes on, and
// nothing is raised twice.
func TestRekeyGoesOn(t *testing.T) {
	for op, calls := range map[string]int{"store.Update": 2, "audit.Sync": 2} {
		for n := range 2 * calls {
			nth, after := n/2+1, n%2 == 1
			t.Run(fmt.Sprint(op, nth, after), func(t *testing.T) {
				a := newAssembly(t)
				a.category("movies")
				for i := range 3 {
					a.issue("movies", fmt.Sprint("film", i), "SD")
				}
				text := a.plan("rekey", "content:\n- {category: movies, id: film0}\n- {category: movies, id: film2}")
				info := a.propose(text)
				a.approve(info, text, a.anna, a.ben)
				a.breaker.arm(op, nth, after)
				a.execute(info) // may fail
				if !a.breaker.disarm() {
					t.Fatalf("a re-key makes fewer than %d calls of %s", nth, op)
				}
				a.reopen()
				got := a.finish(info.ID)
				if got.State == custodian.CeremonyProposed {
					wantErr(t, "execute again", a.execute(info), nil)
					got = a.finish(info.ID)
				}
				if e := a.wantDone(got); e.After.Rekeyed != 2 {
					t.Errorf("evidence: got %d content items, want 2", e.After.Rekeyed)
				}
				for i, want := range []uint32{2, 1, 2} {
					if k := a.issue("movies", fmt.Sprint("film", i), "SD")[0]; k.Generation != want {
						t.Errorf("film%d: got generation %d, want %d", i, k.Generation, want)
					}
				}
			})
		}
	}
}

// What each mode forbids, and what it does not.
func TestCategoryModes(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	kid := w.issue("movies", "film-1", "SD")[0].KID
	w.advance(time.Hour)
	issue := func(content string, track custodian.TrackType) error {
		keys, err := w.c.Issue(t.Context(), packager, ask("movies", content, track))
		w.remember(keys)
		return err
	}
	for _, test := range []struct {
		mode                               custodian.CategoryMode
		action                             string
		again, track, content, release, in error
	}{
		{custodian.CategoryNoNew, "category.no-new", nil, custodian.ErrKeyState, custodian.ErrKeyState, nil, custodian.ErrKeyState},
		{custodian.CategoryRekeyRequired, "category.rekey-required", custodian.ErrKeyCompromised, custodian.ErrKeyCompromised, nil, nil, custodian.ErrKeyCompromised},
		{custodian.CategoryFrozen, "category.freeze", custodian.ErrCategoryFrozen, custodian.ErrCategoryFrozen, custodian.ErrCategoryFrozen, custodian.ErrCategoryFrozen, custodian.ErrCategoryFrozen},
		{custodian.CategoryOpen, "category.open", nil, nil, nil, nil, nil},
	} {
		name := test.mode.String()
		w.freeze("movies", test.mode)
		all := w.entries(0)
		if e := all[len(all)-1]; e.Action != test.action || e.Outcome != audit.Allowed {
			t.Errorf("%s: the audit log has %s %s, want %s", name, e.Action, e.Outcome, test.action)
		}
		wantErr(t, name+": an existing key", issue("film-1", "SD"), test.again)
		wantErr(t, name+": a new track of existing content", issue("film-1", custodian.TrackType("T"+name)), test.track)
		wantErr(t, name+": new content", issue("film-"+name, "SD"), test.content)
		wantErr(t, name+": release", w.release(provider, kid), test.release)
		_, err := w.take(officer, w.bring("movies", "film-1", w.foreign(custodian.TrackType("I"+name), byte(100+test.mode), byte(100+test.mode))))
		wantErr(t, name+": import", err, test.in)
	}
	_, err := w.c.SetCategoryMode(t.Context(), officer, custodian.SetModeRequest{Name: "movies", Mode: 9})
	wantErr(t, "a mode that is none", err, custodian.ErrInvalid)
	w.whole()
}

// Where there are officers, only a freeze is one officer's.
func TestCategoryPolicyCeremony(t *testing.T) {
	a := newAssembly(t)
	a.category("movies")
	for _, m := range []custodian.CategoryMode{custodian.CategoryNoNew, custodian.CategoryRekeyRequired} {
		_, err := a.c.SetCategoryMode(t.Context(), officer, custodian.SetModeRequest{Name: "movies", Mode: m})
		wantErr(t, m.String()+" alone", err, custodian.ErrQuorum)
	}
	ev := custodian.Event{ID: "batch-1", Kind: custodian.EventNewBatch, Category: "movies"}
	a.cfg.Events = custodian.EventLimits{DailyCap: 9}
	a.reopen()
	res, err := a.c.ReportEvent(t.Context(), packager, ev)
	if err != nil || res.Rotated || !strings.Contains(res.Reason, "a plan of kind category-policy gives it") {
		t.Errorf("a new batch without the officers' approval: got %+v and %v", res, err)
	}
	text := a.plan("category-policy", "categories: [movies]\nmode: no-new\nnew_batch: {daily_cap: 2, min_interval: 1h}")
	a.rehearse(text, "category movies goes from open to no-new: no new content key is made", "events of new batches make 2 key versions in 24 hours at most, 1h apart at least")
	e := a.wantDone(a.hold(text, a.anna, a.ben))
	if c := e.After.Categories[0]; c.Mode != "NO_NEW" || c.Standing == nil || c.Standing.DailyCap != 2 || c.Standing.MinInterval != "1h0m0s" {
		t.Errorf("evidence: got %+v", c)
	}
	a.refusePlan(a.plan("category-policy", "categories: [movies]\nmode: no-new"), "is no-new already")
	_, err = a.c.Issue(t.Context(), packager, ask("movies", "film", "SD"))
	wantErr(t, "a new key", err, custodian.ErrKeyState)

	// The standing approval covers one now, and the next an hour later.
	rotated := func(id string) (bool, string) {
		t.Helper()
		ev.ID = id
		res, err := a.c.ReportEvent(t.Context(), packager, ev)
		if err != nil {
			t.Fatal(err)
		}
		return res.Rotated, res.Reason
	}
	if ok, why := rotated("batch-2"); ok || !strings.Contains(why, "younger than 1h0m0s") {
		t.Errorf("a batch within the hour: got %v, %q", ok, why)
	}
	a.advance(time.Hour)
	if ok, why := rotated("batch-3"); !ok {
		t.Errorf("a batch after an hour: %s", why)
	}
	a.advance(time.Hour)
	if ok, why := rotated("batch-4"); ok || !strings.Contains(why, "2 is the cap") {
		t.Errorf("one batch too many: got %v, %q", ok, why)
	}
	a.reopen()
	if got := categoryMode(t, a, "movies"); got != custodian.CategoryNoNew {
		t.Errorf("mode after a start: got %s, want NO_NEW", got)
	}
}
