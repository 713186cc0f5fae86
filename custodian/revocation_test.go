package custodian_test

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/audit"
)

func (w *world) revoke(req custodian.RevokeRequest) custodian.Revocation {
	w.t.Helper()
	if req.Cause == "" {
		req.Cause = "a test"
	}
	r, err := w.c.Revoke(w.t.Context(), operator, req)
	if err != nil {
		w.t.Fatal(err)
	}
	return r
}

func (w *world) revocations() []custodian.Revocation {
	w.t.Helper()
	all, err := w.c.Revocations(w.t.Context(), auditor)
	if err != nil {
		w.t.Fatal(err)
	}
	return all
}

// TestRevokeSession: from the next call on, no key leaves for the session, with
// whatever token, until the revocation is over; a restart changes nothing.
func TestRevokeSession(t *testing.T) {
	w := newTokenWorld(t, nil)
	other := map[string]any{"sid": "session-2"}
	before := w.token(nil)
	wantErr(t, "before", w.show(provider, w.hd, before), nil)
	from := w.logSize()
	r := w.revoke(custodian.RevokeRequest{SessionID: "session-1", Cause: "it was shared", RequestID: "case-7"})
	if want := w.now().Add(40 * time.Second); !r.Until.Equal(want) {
		t.Errorf("until %s, want %s: lifetime and twice the skew", r.Until, want)
	}
	if e := w.entries(from); len(e) != 2 || e[0].Outcome != audit.Begun || e[1].Outcome != audit.Allowed || e[1].Detail != "until "+r.Until.Format(time.RFC3339Nano)+": it was shared" || len(e[1].Refs) != 1 || e[1].Refs[0] != r.Session {
		t.Errorf("the log has %+v, want the attempt and its end with the session's hash", e)
	}
	for range 2 {
		opened := w.breaker.count("hsm.Open")
		from := w.logSize()
		wantErr(t, "a token of before", w.show(provider, w.hd, before), custodian.ErrTokenRevoked)
		if e := w.entries(from); len(e) != 1 || e[0].Outcome != audit.Denied || e[0].Reason != "TOKEN_REVOKED" || len(e[0].Refs) != 1 || e[0].Refs[0] != r.Session {
			t.Errorf("the log has %+v, want the refusal with the session's hash", e)
		}
		wantErr(t, "a new token", w.show(provider, w.hd, w.token(nil)), custodian.ErrTokenRevoked)
		if got := w.breaker.count("hsm.Open"); got != opened {
			t.Errorf("the token opened %d keys for it", got-opened)
		}
		wantErr(t, "another session", w.show(provider, w.hd, w.token(other)), nil)
		wantErr(t, "not granted hears no more than ever", w.show(nobody, w.hd, w.token(nil)), custodian.ErrDenied)
		wantErr(t, "unknown hears no more than ever", w.show(narrow, custodian.KID{9}, w.token(nil)), custodian.ErrDenied)
		w.reopen()
	}
	if all := w.revocations(); len(all) != 1 || all[0].Name() != r.Name() || all[0].By != operator.ID {
		t.Errorf("listed: %+v, want %s", all, r.Name())
	}
	// A repetition does not shorten it.
	long := w.revoke(custodian.RevokeRequest{SessionID: "session-1", Until: w.now().Add(time.Hour)})
	if short := w.revoke(custodian.RevokeRequest{SessionID: "session-1"}); !short.Until.Equal(long.Until) || len(w.revocations()) != 1 {
		t.Errorf("until %s after a repetition, want %s; and %d of them", short.Until, long.Until, len(w.revocations()))
	}
	w.advance(time.Hour - time.Second)
	wantErr(t, "at its end", w.show(provider, w.hd, w.token(nil)), custodian.ErrTokenRevoked)
	w.advance(time.Second)
	wantErr(t, "after its end", w.show(provider, w.hd, w.token(nil)), nil)
	if n := len(w.revocations()); n != 0 {
		t.Errorf("%d are listed after their end", n)
	}
	if err := w.c.Tick(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, c := range w.controls() {
		if c.Kind == custodian.ControlRevocation {
			t.Errorf("the record %s is there after its end", c.Name)
		}
	}
	w.reopen()
	w.attemptsEnd()
}

// TestRevokeAsserted: without tokens, a session is what the caller says it is.
func TestRevokeAsserted(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	kid := w.issue("movies", "film", "HD")[0].KID
	r := w.revoke(custodian.RevokeRequest{SessionID: "session-1"})
	if want := w.now().Add(custodian.MaxTokenLifetime + 2*custodian.MaxTokenSkew); !r.Until.Equal(want) {
		t.Errorf("until %s, want %s", r.Until, want)
	}
	ask := func(session string) error {
		res, err := w.c.Retrieve(t.Context(), provider, custodian.RetrieveRequest{KIDs: []custodian.KID{kid}, SessionID: session})
		if err != nil {
			return err
		}
		res[0].Key.Destroy()
		return res[0].Err
	}
	wantErr(t, "the session", ask("session-1"), custodian.ErrTokenRevoked)
	wantErr(t, "another", ask("session-2"), nil)
	wantErr(t, "none", ask(""), nil)
}

// TestRevokeIssuer: no token of it is good, in no category, until it is lifted or
// the issuer is not configured any more.
func TestRevokeIssuer(t *testing.T) {
	w := newTokenWorld(t, nil)
	w.category("free")
	free := w.issue("free", "clip", "HD")[0].KID
	r := w.revoke(custodian.RevokeRequest{Issuer: playback, Cause: "its key was stolen"})
	if !r.Until.IsZero() || r.Name() != "issuer/"+playback {
		t.Errorf("got %+v, want one without an end", r)
	}
	for range 2 {
		wantErr(t, "a good token", w.show(provider, w.hd, w.token(nil)), custodian.ErrTokenRevoked)
		wantErr(t, "where none is needed", w.show(provider, free, w.token(map[string]any{"content_id": "clip"})), custodian.ErrTokenRevoked)
		wantErr(t, "no token where none is needed", w.show(provider, free, ""), nil)
		w.advance(48 * time.Hour)
		w.reopen()
	}
	lift := func(who custodian.Caller, name string) error {
		return w.c.LiftRevocation(t.Context(), who, custodian.LiftRequest{Name: name, Cause: "a new key"})
	}
	wantErr(t, "a provider lifts it", lift(provider, r.Name()), custodian.ErrDenied)
	wantErr(t, "another name", lift(operator, "issuer/other"), custodian.ErrInvalid)
	wantErr(t, "lifted", lift(operator, r.Name()), nil)
	wantErr(t, "lifted twice", lift(operator, r.Name()), custodian.ErrInvalid)
	wantErr(t, "after it was lifted", w.show(provider, w.hd, w.token(nil)), nil)

	w.revoke(custodian.RevokeRequest{Issuer: playback})
	p, err := testPolicy(t).WithTokens(custodian.Tokens{Audience: "custodian.test", Issuers: []custodian.TokenIssuer{{Issuer: "https://other.test", Keys: w.keys, AllCategories: true}}})
	if err != nil {
		t.Fatal(err)
	}
	w.cfg.Policy = p
	w.reopen()
	if err := w.c.Tick(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := len(w.revocations()); n != 0 {
		t.Errorf("%d revocations of an issuer that is not configured any more", n)
	}
	w.reopen()
	w.attemptsEnd()
}

func TestRevokeRefuses(t *testing.T) {
	w := newTokenWorld(t, nil)
	for name, test := range map[string]struct {
		who  custodian.Caller
		req  custodian.RevokeRequest
		want error
	}{
		"a provider":          {provider, custodian.RevokeRequest{SessionID: "s"}, custodian.ErrDenied},
		"an auditor":          {auditor, custodian.RevokeRequest{Issuer: playback}, custodian.ErrDenied},
		"a packager":          {packager, custodian.RevokeRequest{SessionID: "s"}, custodian.ErrDenied},
		"nothing":             {operator, custodian.RevokeRequest{}, custodian.ErrInvalid},
		"both":                {operator, custodian.RevokeRequest{SessionID: "s", Issuer: playback}, custodian.ErrInvalid},
		"unknown issuer":      {operator, custodian.RevokeRequest{Issuer: "https://evil.test"}, custodian.ErrInvalid},
		"an issuer's end":     {operator, custodian.RevokeRequest{Issuer: playback, Until: w.now().Add(time.Hour)}, custodian.ErrInvalid},
		"an end in the past":  {operator, custodian.RevokeRequest{SessionID: "s", Until: w.now()}, custodian.ErrInvalid},
		"an end in two years": {operator, custodian.RevokeRequest{SessionID: "s", Until: w.now().Add(2 * custodian.MaxRevocation)}, custodian.ErrInvalid},
		"a long session":      {operator, custodian.RevokeRequest{SessionID: strings.Repeat("s", 257)}, custodian.ErrInvalid},
		"no cause":            {operator, custodian.RevokeRequest{SessionID: "s"}, custodian.ErrInvalid},
		"a long cause":        {operator, custodian.RevokeRequest{SessionID: "s", Cause: strings.Repeat("c", 1001)}, custodian.ErrInvalid},
	} {
		if test.req.Cause == "" && name != "no cause" {
			test.req.Cause = "a test"
		}
		_, err := w.c.Revoke(t.Context(), test.who, test.req)
		wantErr(t, name, err, test.want)
	}
	if n := len(w.revocations()); n != 0 {
		t.Errorf("%d revocations were made", n)
	}
	if _, err := w.c.Revocations(t.Context(), provider); !errors.Is(err, custodian.ErrDenied) {
		t.Errorf("a provider lists them: %v", err)
	}
}

// TestRevokedSessionIsNowhere: neither store nor log has the session's ID.
func TestRevokedSessionIsNowhere(t *testing.T) {
	w := newTokenWorld(t, nil)
	w.revoke(custodian.RevokeRequest{SessionID: "mary-had-a-little-lamb"})
	wantErr(t, "lift by the session", w.c.LiftRevocation(t.Context(), officer, custodian.LiftRequest{SessionID: "mary-had-a-little-lamb", Cause: "found"}), nil)
	w.revoke(custodian.RevokeRequest{SessionID: "mary-had-a-little-lamb"})
	for _, r := range w.controls() {
		if bytes.Contains(append(r.Body, r.Name...), []byte("mary")) {
			t.Errorf("control record %s has it", r.Name)
		}
	}
	for _, e := range w.entries(0) {
		if strings.Contains(fmt.Sprintf("%+v", e), "mary") {
			t.Errorf("the log has it: %+v", e)
		}
	}
}

// TestRevocationOfAnOldHash: a session that was revoked before the pseudonym key
// was replaced is revoked after it, and is found by its ID.
func TestRevocationOfAnOldHash(t *testing.T) {
	w := newTokenWorld(t, nil)
	r := w.revoke(custodian.RevokeRequest{SessionID: "session-1", Until: w.now().Add(300 * 24 * time.Hour)})
	w.rotate(mekOrder)
	again := w.revoke(custodian.RevokeRequest{SessionID: "session-2"})
	if again.Session.KeyVersion == r.Session.KeyVersion {
		t.Fatal("the pseudonym key was not replaced, so this shows nothing")
	}
	for range 2 {
		wantErr(t, "the session of before", w.show(provider, w.hd, w.token(nil)), custodian.ErrTokenRevoked)
		wantErr(t, "the session of after", w.show(provider, w.hd, w.token(map[string]any{"sid": "session-2"})), custodian.ErrTokenRevoked)
		wantErr(t, "another", w.show(provider, w.hd, w.token(map[string]any{"sid": "session-3"})), nil)
		w.reopen()
	}
	wantErr(t, "lift", w.c.LiftRevocation(t.Context(), operator, custodian.LiftRequest{SessionID: "session-1", Cause: "over"}), nil)
	wantErr(t, "after that", w.show(provider, w.hd, w.token(nil)), nil)
}

// TestUngrantedCostsNoToken: who may release nothing has the token make no hash
// of the session that it names, whatever KID it asks for.
func TestUngrantedCostsNoToken(t *testing.T) {
	w := newTokenWorld(t, nil)
	for name, kid := range map[string]custodian.KID{"a key": w.hd, "no key": {9}} {
		before := w.breaker.count("hsm.CMAC")
		wantErr(t, name, w.ask(nobody, custodian.RetrieveRequest{KIDs: []custodian.KID{kid}, SessionID: "s", UserID: "u"}), custodian.ErrDenied)
		if got := w.breaker.count("hsm.CMAC") - before; got != 0 {
			t.Errorf("%s: the token made %d MACs", name, got)
		}
	}
	// The counter counts: who may release makes two.
	before := w.breaker.count("hsm.CMAC")
	w.ask(provider, custodian.RetrieveRequest{KIDs: []custodian.KID{{9}}, SessionID: "s", UserID: "u"})
	if got := w.breaker.count("hsm.CMAC") - before; got != 2 {
		t.Errorf("a granted caller: the token made %d MACs, want 2", got)
	}
}

// TestRestoreKeepsRevoked: a backup from before a revocation does not end it. What
// cannot be revoked again is in the report.
func TestRestoreKeepsRevoked(t *testing.T) {
	w := newTokenWorld(t, nil)
	hour := w.now().Add(time.Hour)
	for _, s := range []string{"kept", "longer"} {
		w.revoke(custodian.RevokeRequest{SessionID: s, Until: hour})
	}
	putBack := w.saveStore()
	w.reopen()
	after := w.revoke(custodian.RevokeRequest{SessionID: "session-1", Until: hour.Add(time.Nanosecond), Cause: "shared: issuer \"x\""})
	longer := w.revoke(custodian.RevokeRequest{SessionID: "longer", Until: hour.Add(time.Hour)})
	w.revoke(custodian.RevokeRequest{SessionID: "short"})
	issuer := w.revoke(custodian.RevokeRequest{Issuer: playback, Cause: "its key: stolen"})
	for _, s := range []string{"lifted", "kept"} {
		w.revoke(custodian.RevokeRequest{SessionID: s, Until: hour})
		wantErr(t, "lift", w.c.LiftRevocation(t.Context(), operator, custodian.LiftRequest{SessionID: s, Cause: "issuer \"https://playback.test\": no"}), nil)
	}
	w.rotate(mekOrder) // and so the key that sessions are hashed with
	lost := w.revoke(custodian.RevokeRequest{SessionID: "lost", Until: hour, Cause: "late"})
	w.advance(2 * time.Minute) // "short" is over
	for range 2 {              // also where the restore is repeated
		putBack()
		if err := w.tryParts(); err != nil {
			t.Fatal(err)
		}
		rep, err := custodian.Restore(t.Context(), w.cfg)
		if err != nil {
			t.Fatal(err)
		}
		want := []string{after.Name(), longer.Name(), issuer.Name()}
		slices.Sort(want)
		if !slices.Equal(rep.Revoked, want) {
			t.Errorf("revoked again: got %q, want %q", rep.Revoked, want)
		}
		if l := rep.LostRevocations; len(l) != 1 || l[0].Name != lost.Name() || !l[0].Until.Equal(hour) || l[0].Cause != "late" {
			t.Errorf("lost: got %+v, want %s", l, lost.Name())
		}
		w.reopen()
		listed := map[string]custodian.Revocation{}
		for _, r := range w.revocations() {
			listed[r.Name()] = r
		}
		for _, r := range []custodian.Revocation{after, longer, issuer} {
			if got := listed[r.Name()]; !got.Until.Equal(r.Until) || got.Cause != r.Cause || got.By != "restore" {
				t.Errorf("listed: %+v, want %+v by the restore", got, r)
			}
		}
		if len(listed) != 4 { // and the one that was lifted after the backup, which has it
			t.Errorf("listed: %+v, want 4", listed)
		}
		wantErr(t, "its issuer is revoked", w.show(provider, w.hd, w.token(map[string]any{"sid": "another"})), custodian.ErrTokenRevoked)
		wantErr(t, "lift", w.c.LiftRevocation(t.Context(), operator, custodian.LiftRequest{Name: issuer.Name(), Cause: "a new key"}), nil)
		wantErr(t, "the session", w.show(provider, w.hd, w.token(nil)), custodian.ErrTokenRevoked)
		wantErr(t, "another one", w.show(provider, w.hd, w.token(map[string]any{"sid": "another"})), nil)
		w.revoke(custodian.RevokeRequest{Issuer: playback, Cause: "its key: stolen"})
		w.attemptsEnd()
	}
}

// TestRestoreManyRevocations: they are put in a few changes, and one from before
// their end was logged is told of.
func TestRestoreManyRevocations(t *testing.T) {
	w := newTokenWorld(t, nil)
	ref := w.revoke(custodian.RevokeRequest{SessionID: "session-1", Until: w.now().Add(time.Hour)}).Session
	w.close()
	if err := w.tryParts(); err != nil {
		t.Fatal(err)
	}
	w.cfg.Logged.ForgeRevocations(ref, 1001, w.now().Add(time.Hour))
	rep, err := custodian.Restore(t.Context(), w.cfg)
	if err != nil {
		t.Fatal(err)
	}
	if len(rep.Revoked) != 1001 || len(rep.LostRevocations) != 1 || rep.LostRevocations[0].Cause != "of an older daemon" {
		t.Errorf("got %d revoked again and %+v lost, want 1001 and the one without an end", len(rep.Revoked), rep.LostRevocations)
	}
	w.reopen()
	if n := len(w.revocations()); n != 1002 {
		t.Errorf("%d are listed, want 1002", n)
	}
	wantErr(t, "the session", w.show(provider, w.hd, w.token(nil)), custodian.ErrTokenRevoked)
	changes := 0
	for _, e := range w.entries(0) {
		if e.Action == "revocation.restore" && e.Outcome == audit.Allowed {
			changes++
		}
	}
	if changes != 6 {
		t.Errorf("the log has %d changes, want 6", changes)
	}
}

// TestRevokedSessionsAreBounded: one session more than can be revoked at once is
// refused, and says what to do; a known one, and its issuer, still can be, and
// there is room when others are over.
func TestRevokedSessionsAreBounded(t *testing.T) {
	w := newTokenWorld(t, nil)
	known := w.revoke(custodian.RevokeRequest{SessionID: "session-1", Until: w.now().Add(time.Hour)}).Session
	w.close()
	if err := w.tryParts(); err != nil {
		t.Fatal(err)
	}
	w.cfg.Logged.ForgeRevocations(known, custodian.MaxRevokedSessions-1, w.now().Add(time.Minute))
	if _, err := custodian.Restore(t.Context(), w.cfg); err != nil {
		t.Fatal(err)
	}
	w.reopen()
	more := func() error {
		_, err := w.c.Revoke(t.Context(), operator, custodian.RevokeRequest{SessionID: "session-2", Cause: "a test"})
		return err
	}
	from := w.logSize()
	err := more()
	wantErr(t, "one too many", err, custodian.ErrRate)
	if err != nil && !strings.Contains(err.Error(), "10000 sessions are revoked, and no more can be; revoke the issuer of their tokens instead") {
		t.Errorf("got %v, want it to say what to do", err)
	}
	if e := w.entries(from); len(e) != 2 || e[1].Outcome != audit.Failed || e[1].Reason != "RATE" {
		t.Errorf("the log has %+v, want the attempt and that it failed", e)
	}
	w.revoke(custodian.RevokeRequest{SessionID: "session-1", Until: w.now().Add(2 * time.Hour)})
	w.revoke(custodian.RevokeRequest{Issuer: playback})
	w.advance(time.Minute)
	wantErr(t, "when others are over", more(), nil)
	if n := len(w.revocations()); n != 3 {
		t.Errorf("%d are listed, want 3", n)
	}
}
