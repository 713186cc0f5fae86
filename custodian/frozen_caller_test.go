package custodian_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/audit"
)

func (w *world) freezeCaller(identity string) {
	w.t.Helper()
	if _, err := w.c.FreezeCaller(w.t.Context(), officer, custodian.FreezeCallerRequest{Identity: identity, Cause: "stolen"}); err != nil {
		w.t.Fatal(err)
	}
}

// wantLast checks the newest entry of the audit log.
func (w *world) wantLast(action string, outcome audit.Outcome, reason, detail string) {
	w.t.Helper()
	all := w.entries(0)
	if e := all[len(all)-1]; e.Action != action || e.Outcome != outcome || e.Reason != reason || !strings.Contains(e.Detail, detail) {
		w.t.Errorf("the newest audit entry: got %+v, want %s %s %s with %q", e, action, outcome, reason, detail)
	}
}

// A frozen caller is refused everything, in the same words, and nobody else is.
func TestFrozenCaller(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	kid := w.issue("movies", "film-1", "SD")[0].KID
	w.freezeCaller(provider.ID)
	w.wantLast("caller.freeze", audit.Allowed, "", provider.ID+" stolen")

	wantErr(t, "release", w.release(provider, kid), custodian.ErrCallerFrozen)
	w.wantLast("release", audit.Denied, "CALLER_FROZEN", "")
	wantErr(t, "release of what is not there", w.release(provider, custodian.KID{1}), custodian.ErrCallerFrozen)
	wantErr(t, "release to another provider", w.release(narrow, kid), nil)
	w.freezeCaller(packager.ID)
	_, err := w.c.Issue(t.Context(), packager, ask("movies", "film-2", "SD"))
	wantErr(t, "issue", err, custodian.ErrCallerFrozen)
	w.freezeCaller(operator.ID)
	_, err = w.c.Status(t.Context(), operator)
	wantErr(t, "status", err, custodian.ErrCallerFrozen)

	w.reopen()
	wantErr(t, "release after a start", w.release(provider, kid), custodian.ErrCallerFrozen)
	st, err := w.c.Snapshot(t.Context())
	if err != nil || !strings.Contains(fmt.Sprint(st.Warnings), "caller "+provider.ID+" is frozen since 2026-11-22T12:00:00Z, by "+officer.ID+": stolen") {
		t.Errorf("status: got warnings %q and %v", st.Warnings, err)
	}
	list, err := w.c.FrozenCallers(t.Context(), auditor)
	if err != nil || len(list) != 3 || list[2].Identity != provider.ID || list[2].By != officer.ID {
		t.Errorf("frozen callers: got %+v and %v", list, err)
	}

	lift := custodian.FreezeCallerRequest{Identity: provider.ID, Cause: "revoked"}
	_, err = w.c.LiftCaller(t.Context(), narrowOfficer, lift)
	wantErr(t, "lift by an officer of one category", err, custodian.ErrDenied)
	if _, err := w.c.LiftCaller(t.Context(), officer, lift); err != nil {
		t.Fatal(err)
	}
	w.wantLast("caller.lift", audit.Allowed, "", provider.ID+" revoked")
	wantErr(t, "release after the lift", w.release(provider, kid), nil)
	_, err = w.c.LiftCaller(t.Context(), officer, lift)
	wantErr(t, "lift twice", err, custodian.ErrInvalid)
	w.whole()
}

func TestFreezeCallerRefused(t *testing.T) {
	w := newWorld(t)
	for _, test := range []struct {
		name     string
		who      custodian.Caller
		identity string
		want     error
	}{
		{"by a packager", packager, provider.ID, custodian.ErrDenied},
		{"by an operator", operator, provider.ID, custodian.ErrDenied},
		{"by an officer of one category", narrowOfficer, provider.ID, custodian.ErrDenied},
		{"an identity that no grant names", officer, provider.ID + "x", custodian.ErrInvalid},
		{"an officer", officer, narrowOfficer.ID, custodian.ErrInvalid},
		{"oneself", officer, officer.ID, custodian.ErrInvalid},
		{"an identity with a space", officer, "a b", custodian.ErrInvalid},
		{"nobody", officer, "", custodian.ErrInvalid},
	} {
		_, err := w.c.FreezeCaller(t.Context(), test.who, custodian.FreezeCallerRequest{Identity: test.identity, Cause: "stolen"})
		wantErr(t, test.name, err, test.want)
	}
	if list, err := w.c.FrozenCallers(t.Context(), auditor); err != nil || len(list) != 0 {
		t.Errorf("frozen callers: got %+v and %v, want none", list, err)
	}
}

// A freeze holds at once, also where the audit log cannot be written.
func TestFrozenCallerWithoutLog(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	kid := w.issue("movies", "film-1", "SD")[0].KID
	w.breaker.arm("audit.Sync", 1, false)
	_, err := w.c.FreezeCaller(t.Context(), officer, custodian.FreezeCallerRequest{Identity: provider.ID, Cause: "stolen"})
	wantErr(t, "freeze without a log", err, custodian.ErrAuditBlocked)
	w.breaker.disarm()
	w.reopen()
	wantErr(t, "release", w.release(provider, kid), custodian.ErrCallerFrozen)
	wantErr(t, "release to another", w.release(narrow, kid), nil)
}

// A backup from before the freeze does not lift it.
func TestRestoreKeepsCallersFrozen(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	kid := w.issue("movies", "film-1", "SD")[0].KID
	putBack := w.saveStore()
	w.reopen()
	w.freezeCaller(provider.ID)
	w.freezeCaller(narrow.ID)
	if _, err := w.c.LiftCaller(t.Context(), officer, custodian.FreezeCallerRequest{Identity: narrow.ID, Cause: "found"}); err != nil {
		t.Fatal(err)
	}
	putBack()
	if err := w.tryParts(); err != nil {
		t.Fatal(err)
	}
	rep, err := custodian.Restore(t.Context(), w.cfg)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := fmt.Sprint(rep.FrozenCallers), "["+provider.ID+"]"; got != want {
		t.Errorf("frozen again: got %s, want %s", got, want)
	}
	w.reopen()
	wantErr(t, "release", w.release(provider, kid), custodian.ErrCallerFrozen)
	wantErr(t, "release to who was lifted", w.release(narrow, kid), nil)
}
