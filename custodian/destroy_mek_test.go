package custodian_test

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/audit"
)

// A MEK is destroyed later than it is retired, with all that only it wraps, and
// what becomes unreadable by that is said before.
func TestDestroyMEK(t *testing.T) {
	for _, p := range profiles {
		t.Run(string(p), func(t *testing.T) {
			a := populatedOf(t, p)
			mek := a.mek()
			destroy := func() string { return a.plan("destroy", "mek_version: 1") }
			a.refusePlan(destroy(), "mek mek-v1 is active")
			a.refusePlan(a.plan("destroy", "mek_version: 7"), "there is no mek of version 7")
			_, err := custodian.ParsePlan([]byte(a.plan("destroy", "")))
			wantErr(t, "a plan about nothing", err, custodian.ErrInvalid)
			a.advance(time.Minute)
			early := a.backup()
			old := a.contentKeys()[0]
			a.wantDone(a.begin(a.plan("mek-rotation", "mek_version: 1")))
			a.refusePlan(destroy(), "mek mek-v1 is DEACTIVATED, and only what is retired can be destroyed")
			a.wantDone(a.begin(a.plan("retire", "rotations: [mek/2]")))
			a.advance(time.Minute)
			late := a.backup()

			text := destroy()
			_, r, err := a.c.ProposeCeremony(t.Context(), officer, []byte(text), "", true)
			if err != nil {
				t.Fatal(err)
			}
			said := strings.Join(r.Changes, "\n")
			want := []string{fmt.Sprintf("mek mek-v1, version 1, CKA_ID %x, is destroyed", mek.ID), "the backup of 2026-11-22T12:01:00Z, control revision "}
			if p == custodian.ProfileSealed {
				want = append(want, "nothing else wraps them: key versions movies/1", "under helper key pseudonym/1")
			}
			for _, w := range want {
				if !strings.Contains(said, w) {
					t.Errorf("rehearsal: got\n%s\nwant it to say %q", said, w)
				}
			}
			if strings.Count(said, "becomes unreadable: nothing of it can be restored without mek-v1") != 1 {
				t.Errorf("rehearsal: got\n%s\nwant one backup", said)
			}

			info := a.propose(text)
			a.approve(info, text, a.anna, a.ben)
			if p == custodian.ProfileSealed { // a record that somebody has put back refers to it: no
				moved := a.swap(old)
				wantErr(t, "execute with a reference", a.execute(info), custodian.ErrPlan)
				a.wantLast("ceremony.execute", audit.Denied, "PLAN", "1 content keys refer to keks under it")
				a.swap(moved)
			}
			wantErr(t, "execute", a.execute(info), nil)
			e := a.wantDone(a.finish(info.ID))
			if b, m := e.Before.MEKs[0], e.After.MEKs[0]; b.State != "DEACTIVATED" || b.Canary == "" || m.State != "DESTROYED" || m.Canary != "" || e.After.KEKsByMEK[1] != 0 {
				t.Errorf("evidence: got %+v before and %+v after, with %v keys by MEK", b, m, e.After.KEKsByMEK)
			}
			a.wantNoMEK(mek)
			a.whole()
			if _, _, err := a.c.AuditEntries(t.Context(), auditor, custodian.AuditQuery{UserID: "viewer", PageSize: 10}); err != nil {
				t.Errorf("look for a viewer: %v", err)
			}
			a.refusePlan(destroy(), "mek mek-v1 is destroyed already")

			// Somebody restores the token from its backup: the object is not ours.
			a.hsm.AddObject(mek)
			a.reopen()
			if s, err := a.c.Status(t.Context(), operator); err != nil || len(s.UnknownObjects) != 1 || s.UnknownObjects[0].Label != mek.Label {
				t.Errorf("the object of a destroyed MEK: got unknown objects %v and %v, want it", s.UnknownObjects, err)
			}

			// A backup from before it was retired is lost, as was said. A later one
			// is not, and the MEK stays destroyed.
			later := a.saveStore()
			a.putStore(early)
			a.cfg.RestoreOrder = a.restoreOrder("early", a.anna, a.ben)
			_, err = custodian.Restore(t.Context(), a.cfg)
			wantErr(t, "restore a backup that needs it", err, custodian.ErrKeyDestroyed)
			later()
			a.putStore(late)
			a.cfg.RestoreOrder = a.restoreOrder("late", a.anna, a.ben)
			rep, err := custodian.Restore(t.Context(), a.cfg)
			if err != nil || !slices.Equal(rep.DestroyedMEKs, []uint32{1}) {
				t.Fatalf("restore a later backup: got %+v and %v, want MEK 1 destroyed again", rep, err)
			}
			a.wantNoMEK(mek)
			a.reopen()
			a.wantDone(a.begin(a.plan("mek-rotation", "mek_version: 2")))
			a.wantDone(a.begin(a.plan("retire", "rotations: [mek/3]")))
			a.whole()
		})
	}
}

// swap puts k in the place of what the store has, which it returns.
func (w *world) swap(k custodian.SealedKey) (was custodian.SealedKey) {
	w.t.Helper()
	if err := w.st.Update(w.t.Context(), func(tx custodian.UpdateTx) (err error) {
		if was, err = tx.ContentKey(k.Key.KID); err != nil {
			return err
		}
		return tx.ReplaceContentKey(was.Key.Revision, k)
	}); err != nil {
		w.t.Fatal(err)
	}
	return was
}

// putStore puts a backup in the place of the store, and opens the parts.
func (w *world) putStore(backup []byte) {
	w.t.Helper()
	w.close()
	writeFile(w.t, w.storePath(), backup)
	w.openParts()
}

func (w *world) wantNoMEK(mek custodian.TokenObject) {
	w.t.Helper()
	objects, err := w.hsm.Objects(w.t.Context())
	if err != nil {
		w.t.Fatal(err)
	}
	if slices.ContainsFunc(objects, func(o custodian.TokenObject) bool { return bytes.Equal(o.ID, mek.ID) }) {
		w.t.Errorf("the token holds %s still", mek.Label)
	}
}

// Whatever fails while a MEK is destroyed, before or after it is done: the next
// start ends it, and every key opens.
func TestDestroyMEKIsFinished(t *testing.T) {
	a := populated(t)
	mek := a.mek()
	a.wantDone(a.begin(a.plan("mek-rotation", "mek_version: 1")))
	a.wantDone(a.begin(a.plan("retire", "rotations: [mek/2]")))
	text := a.plan("destroy", "mek_version: 1")
	info := a.propose(text)
	a.approve(info, text, a.anna, a.ben)
	putBack, token := a.save(), a.hsm
	for op, calls := range map[string]int{"store.Update": 3, "hsm.DestroyMEK": 1, "hsm.Objects": 1, "audit.Sync": 5} {
		for n := range 2 * calls { // each before and after doing it
			nth, after := n/2+1, n%2 == 1
			t.Run(fmt.Sprint(op, nth, after), func(t *testing.T) {
				a.t = t
				putBack()
				a.hsm = token.Clone()
				a.cfg.HSM = brokenHSM{a.hsm, a.breaker}
				a.reopen()
				a.breaker.arm(op, nth, after)
				err := a.execute(info)
				if !a.breaker.disarm() {
					t.Fatalf("it makes fewer than %d calls of %s", nth, op)
				}
				a.reopen()
				a.wantDoneAfter(info, err)
				a.wantNoMEK(mek)
				a.whole()
			})
			a.t = t
		}
	}
}
