package custodian_test

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/audit"
)

func (w *world) takeBackup() {
	w.t.Helper()
	id, err := age.GenerateX25519Identity()
	if err != nil {
		w.t.Fatal(err)
	}
	if err := w.c.Backup(w.t.Context(), operator, id.Recipient().String(), new(bytes.Buffer)); err != nil {
		w.t.Fatal(err)
	}
}

// A KEK version is destroyed later than it is retired, and its backups are
// named before.
func TestDestroyCeremony(t *testing.T) {
	a := populated(t)
	destroy := func() string { return a.plan("destroy", "key_versions: [movies/1]") }
	a.refusePlan(destroy(), "movies/1 is active")
	a.refusePlan(a.plan("destroy", "key_versions: [movies/3]"), "there is no key version movies/3")
	a.advance(time.Minute)
	a.takeBackup()
	old := a.contentKeys()[0]
	a.wantDone(a.begin(a.plan("kek-rotation", "categories: [movies]")))
	a.refusePlan(destroy(), "only what is retired can be destroyed")
	a.wantDone(a.begin(a.plan("retire", "rotations: [kek/movies/2]")))
	a.advance(time.Minute)
	a.takeBackup() // nothing lies under movies/1 in it
	text := destroy()
	a.rehearse(text, "key version movies/1 is destroyed", "the backup of 2026-11-22T12:01:00Z, control revision ", "becomes unreadable: what lies under movies/1")
	_, r, err := a.c.ProposeCeremony(t.Context(), officer, []byte(text), "", true)
	if err != nil || strings.Count(fmt.Sprint(r.Changes), "becomes unreadable") != 1 {
		t.Errorf("rehearsal: got %q and %v, want one backup", r.Changes, err)
	}

	// A record that somebody has put back refers to it: no.
	info := a.propose(text)
	a.approve(info, text, a.anna, a.ben)
	var moved custodian.SealedKey
	swap := func(k custodian.SealedKey) {
		t.Helper()
		if err := a.st.Update(t.Context(), func(tx custodian.UpdateTx) (err error) {
			if moved, err = tx.ContentKey(k.Key.KID); err != nil {
				return err
			}
			return tx.ReplaceContentKey(moved.Key.Revision, k)
		}); err != nil {
			t.Fatal(err)
		}
	}
	swap(old)
	wantErr(t, "execute with a reference", a.execute(info), custodian.ErrPlan)
	a.wantLast("ceremony.execute", audit.Denied, "PLAN", "1 content keys refer to it")
	a.refusePlan(text, "1 content keys refer to it")
	swap(moved)

	wantErr(t, "execute", a.execute(info), nil)
	e := a.wantDone(a.finish(info.ID))
	if b, k := e.Before.Keys[0], e.After.Keys[0]; b.State != "DEACTIVATED" || b.Canary == "" || k.State != "DESTROYED" || k.Canary != "" {
		t.Errorf("evidence: got %+v before and %+v after", b, k)
	}
	k := a.keks("movies")[0]
	if k.State != custodian.StateDestroyed || len(k.Wrapped.Outer) != 0 || len(k.Wrapped.Canary) != 0 {
		t.Errorf("the record of movies/1: got %+v, want it erased", k)
	}
	a.refusePlan(destroy(), "destroyed already")
	a.whole()
	// The MEK can be rotated still, though the destroyed version is under it.
	a.wantDone(a.begin(a.plan("mek-rotation", "mek_version: 1")))
	a.refusePlan(a.plan("destroy", "key_versions: [movies/2]"), "only what is retired can be destroyed")
	a.wantDone(a.begin(a.plan("retire", "rotations: [mek/2]")))
	a.whole()
	// What it has replaced is retired with the old MEK, and can be destroyed before
	// that is, or in the same plan.
	a.wantDone(a.begin(a.plan("destroy", "key_versions: [movies/2]\nmek_version: 1")))
	a.whole()
}

// A backup from before does not bring a destroyed version back.
func TestRestoreKeepsDestroyed(t *testing.T) {
	a := populated(t)
	kid := a.contentKeys()[0].Key.KID
	putBack := a.saveStore()
	a.reopen()
	a.wantDone(a.begin(a.plan("kek-rotation", "categories: [movies]")))
	a.wantDone(a.begin(a.plan("retire", "rotations: [kek/movies/2]")))
	a.wantDone(a.begin(a.plan("destroy", "key_versions: [movies/1]")))
	putBack()
	if err := a.tryParts(); err != nil {
		t.Fatal(err)
	}
	a.cfg.RestoreOrder = a.restoreOrder("the backup", a.anna, a.ben)
	rep, err := custodian.Restore(t.Context(), a.cfg)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := fmt.Sprint(rep.Destroyed), "[{movies/1 20}]"; got != want {
		t.Errorf("destroyed again: got %s, want %s", got, want)
	}
	a.reopen()
	wantErr(t, "release", a.release(provider, kid), custodian.ErrKeyDestroyed)
}

// A provider's certificate is stolen. One officer stops it; the quorum decides
// about what it was given.
func TestCallerCompromiseCeremony(t *testing.T) {
	for decision, want := range map[string]struct {
		mode           custodian.CategoryMode
		release, issue error
	}{
		"serve":  {custodian.CategoryOpen, nil, nil},
		"freeze": {custodian.CategoryFrozen, custodian.ErrCategoryFrozen, custodian.ErrCategoryFrozen},
		"rekey":  {custodian.CategoryRekeyRequired, nil, custodian.ErrKeyCompromised},
	} {
		t.Run(decision, func(t *testing.T) {
			a := newAssembly(t)
			a.category("movies")
			a.category("sport")
			film, match := a.issue("movies", "film", "SD")[0].KID, a.issue("sport", "match", "SD")[0].KID
			wantErr(t, "release", a.release(provider, film), nil)
			a.freezeCaller(provider.ID)
			callers := "callers: [" + provider.ID + "]\n"
			named := callers + "categories: [movies]\n"
			if decision == "serve" {
				a.refusePlan(a.plan("caller-compromise", named+"decision: serve"), "name none")
				named = callers
			} else {
				a.refusePlan(a.plan("caller-compromise", callers+"decision: "+decision), "keys of category movies were given, too")
				a.refusePlan(a.plan("caller-compromise", callers+"categories: [movies, sport]\ndecision: "+decision), "no key of category sport was given")
			}
			a.refusePlan(a.plan("caller-compromise", "callers: [spiffe://test/nobody]\ndecision: serve"), "the audit log does not know it")
			a.refusePlan(a.plan("caller-compromise", "callers: ["+officer.ID+"]\ndecision: serve"), "is an officer's")
			text := a.plan("caller-compromise", named+"decision: "+decision)
			a.rehearse(text, "caller "+provider.ID+" stays frozen", "it was given 1 content keys of category movies, of 1 content items, from 2026-11-22T12:00:00Z")
			e := a.wantDone(a.hold(text, a.anna, a.ben))
			if got := e.After.Callers[0]; !got.Frozen || got.Given != 1 {
				t.Errorf("evidence: got %+v, want frozen, with 1 key", got)
			}
			if got := categoryMode(t, a, "movies"); got != want.mode {
				t.Errorf("category movies: got %s, want %s", got, want.mode)
			}
			wantErr(t, "release to the caller", a.release(provider, film), custodian.ErrCallerFrozen)
			wantErr(t, "release to another", a.release(narrow, film), want.release)
			_, err := a.c.Issue(t.Context(), packager, ask("movies", "film", "HD"))
			wantErr(t, "a new track of what was given", err, want.issue)
			_, err = a.c.Issue(t.Context(), packager, ask("sport", "match", "HD"))
			wantErr(t, "a new track of what was not", err, nil)
			_ = match

			// What it was given is the work list.
			if decision == "rekey" {
				a.advance(time.Second)
				a.wantDone(a.begin(a.plan("rekey", callers)))
				if k := a.issue("movies", "film", "SD")[0]; k.Generation != 2 {
					t.Errorf("after the re-key: got generation %d, want 2", k.Generation)
				}
				if k := a.issue("sport", "match", "SD")[0]; k.KID != match {
					t.Error("content that was not given to it has another key")
				}
			}
		})
	}
}
