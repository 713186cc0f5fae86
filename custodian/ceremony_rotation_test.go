package custodian_test

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/audit"
)

// begin carries a plan out until the engine has to work, and then lets it.
func (a *assembly) begin(text string) custodian.CeremonyInfo {
	a.t.Helper()
	info := a.propose(text)
	a.approve(info, text, a.anna, a.ben)
	wantErr(a.t, "execute", a.execute(info), nil)
	return a.finish(info.ID)
}

// finish lets engine and Tick work, and returns the ceremony.
func (a *assembly) finish(id string) custodian.CeremonyInfo {
	a.t.Helper()
	a.advanceRotations()
	if err := a.c.Tick(a.t.Context()); err != nil {
		a.t.Fatal(err)
	}
	info, err := a.c.Ceremony(a.t.Context(), officer, id)
	if err != nil {
		a.t.Fatal(err)
	}
	return info
}

func (a *assembly) wantDone(info custodian.CeremonyInfo) custodian.Evidence {
	a.t.Helper()
	if info.State != custodian.CeremonyDone {
		a.t.Fatalf("ceremony %s of kind %s: got %s with %+v, want DONE", info.ID, info.Kind, info.State, info.Progress)
	}
	e, err := custodian.VerifyEvidence(a.evidence(info.ID), a.trust())
	if err != nil {
		a.t.Fatal(err)
	}
	return e
}

// wantDoneAfter is wantDone of a ceremony whose execution may have failed, or
// was cut off: the daemon goes on with it, or the officers execute it again.
func (a *assembly) wantDoneAfter(info custodian.CeremonyInfo, err error) {
	a.t.Helper()
	got := a.finish(info.ID)
	if got.State == custodian.CeremonyProposed && err != nil {
		wantErr(a.t, "execute again", a.execute(info), nil)
		got = a.finish(info.ID)
	}
	a.wantDone(got)
}

// populated is an assembly with a category that has keys.
func populated(t *testing.T) *assembly { return populatedOf(t, custodian.ProfileSealed) }

func populatedOf(t *testing.T, p custodian.MEKProfile) *assembly {
	t.Helper()
	a := assemblyOf(t, p)
	a.category("movies")
	for i := range 20 {
		a.issue("movies", fmt.Sprint("film", i), "SD")
	}
	return a
}

func TestKEKRotationCeremony(t *testing.T) {
	a := populated(t)
	text := a.plan("kek-rotation", "categories: [movies]\nhold: 24h")
	_, r, err := a.c.ProposeCeremony(t.Context(), officer, []byte(text), "", true)
	if err != nil || r.ContentKeys != 20 || !strings.Contains(fmt.Sprint(r.Changes), "category movies gets key version 2 in the place of 1") {
		t.Errorf("rehearsal: got %+v and %v, want 20 content keys", r, err)
	}
	e := a.wantDone(a.begin(text))
	if got := e.After.Rotations; len(got) != 1 || got[0].Step != "HOLD" || got[0].Moved != 20 || got[0].Verified != 20 || len(e.Before.Rotations) != 0 {
		t.Errorf("evidence: got rotations %+v, want one that holds 20 verified keys", got)
	}
	a.wantStep("kek/movies/2", custodian.StepHold)

	// What is held is retired by the quorum only, and not before its time.
	retire := func() string { return a.plan("retire", "rotations: [kek/movies/2]") }
	_, err = a.c.RetireRotation(t.Context(), officer, "", "kek/movies/2")
	wantErr(t, "retire without the quorum", err, custodian.ErrQuorum)
	_, err = a.c.StartRotation(t.Context(), officer, custodian.RotationOrder{Kind: custodian.RotateKEK, Category: "movies"})
	wantErr(t, "rotate without the quorum", err, custodian.ErrQuorum)
	_, _, err = a.c.ProposeCeremony(t.Context(), officer, []byte(retire()), "", false)
	wantErr(t, "retire within the hold", err, custodian.ErrPlan)
	a.advance(25 * time.Hour)
	a.wantDone(a.begin(retire()))
	a.wantStep("kek/movies/2", custodian.StepRetired)
	a.whole()
}

func TestProvidersCeremony(t *testing.T) {
	a := newAssembly(t)
	a.cfg.Providers = append(a.cfg.Providers, &badKMS{name: "vault"})
	a.reopen()
	a.category("movies")
	kid := a.issue("movies", "film", "SD")[0].KID
	text := a.plan("providers", "categories: [movies]\nproviders: [vault]")
	_, r, err := a.c.ProposeCeremony(t.Context(), officer, []byte(text), "", true)
	if want := "[category movies moves from local to vault: 1 KEK versions get other outer wraps]"; err != nil || fmt.Sprint(r.Changes) != want {
		t.Errorf("rehearsal: got %v and %v, want %s", r.Changes, err, want)
	}
	info := a.propose(text)
	a.approve(info, text, a.anna, a.ben)
	wantErr(t, "execute", a.execute(info), nil)
	a.rewraps(func(left []custodian.RewrapStatus) bool { return len(left) == 0 })
	e := a.wantDone(a.finish(info.ID))
	if got := e.After.Categories[0].Providers; fmt.Sprint(got) != "[vault]" {
		t.Errorf("evidence: got providers %v, want vault", got)
	}
	if got := a.keks("movies")[0].Wrapped.Outer; len(got) != 1 || got[0].Provider != "vault" {
		t.Errorf("outer wraps: got %+v, want vault's", got)
	}
	wantErr(t, "release", a.release(provider, kid), nil)
	_, _, err = a.c.ProposeCeremony(t.Context(), officer, []byte(a.plan("providers", "categories: [movies]\nproviders: [aws]")), "", false)
	wantErr(t, "a provider that is not configured", err, custodian.ErrPlan)
	a.whole()
}

// The helper keys move by a plan, too, alone or beside categories.
func TestHelperProvidersCeremony(t *testing.T) {
	a := newAssembly(t)
	a.cfg.Providers = append(a.cfg.Providers, &badKMS{name: "vault"})
	a.reopen()
	a.category("movies")
	kid := a.issue("movies", "film", "SD")[0].KID
	text := a.plan("providers", "categories: [movies]\nhelper_keys: true\nproviders: [vault, local]")
	a.rehearse(text, "the helper keys, without which no record is believed, move from local to vault, local: 3 keys", "category movies moves from local to vault, local")
	a.refusePlan(a.plan("providers", "helper_keys: true\nproviders: [local]"), "the helper keys have these providers already")
	info := a.propose(text)
	a.approve(info, text, a.anna, a.ben)
	wantErr(t, "execute", a.execute(info), nil)
	got, err := a.c.Ceremony(t.Context(), officer, info.ID)
	if want := "[{outer wraps of helper keys MOVE 0 3 0 0s } {outer wraps of category movies MOVE 0 1 0 0s }]"; err != nil || fmt.Sprint(got.Progress) != want {
		t.Errorf("progress: got %v and %v, want %s", got.Progress, err, want)
	}
	a.rewraps(func(left []custodian.RewrapStatus) bool { return len(left) == 0 })
	a.wantDone(a.finish(info.ID))
	a.refusePlan(text, "the helper keys have these providers already")
	a.reopen()
	wantErr(t, "release", a.release(provider, kid), nil)
	_, err = custodian.ParsePlan([]byte(a.plan("providers", "providers: [local]")))
	wantErr(t, "a plan about nothing", err, custodian.ErrInvalid)
	a.whole()
}

// A record that still refers to the old version keeps it from being retired,
// when the plan is proposed and when it is executed.
func TestRetireWithReferences(t *testing.T) {
	a := populated(t)
	kid := a.contentKeys()[0].Key.KID
	old := a.contentKeys()[0]
	a.wantDone(a.begin(a.plan("kek-rotation", "categories: [movies]")))
	text := a.plan("retire", "rotations: [kek/movies/2]")
	info := a.propose(text)
	a.approve(info, text, a.anna, a.ben)
	put := func(k custodian.SealedKey) (before custodian.SealedKey) {
		t.Helper()
		if err := a.st.Update(t.Context(), func(tx custodian.UpdateTx) (err error) {
			if before, err = tx.ContentKey(kid); err != nil {
				return err
			}
			return tx.ReplaceContentKey(before.Key.Revision, k)
		}); err != nil {
			t.Fatal(err)
		}
		return before
	}
	moved := put(old) // somebody has put the old record back
	wantErr(t, "execute", a.execute(info), custodian.ErrPlan)
	a.wantLast("ceremony.execute", audit.Denied, "PLAN", "still refer to versions [1]")
	_, _, err := a.c.ProposeCeremony(t.Context(), officer, []byte(text), "", false)
	wantErr(t, "propose", err, custodian.ErrPlan)
	if err != nil && !strings.Contains(err.Error(), "still refer to versions [1]") {
		t.Errorf("propose: got %q, want it to say what refers", err)
	}
	a.wantLast("ceremony.propose", audit.Denied, "PLAN", "still refer to versions [1]")
	a.wantStep("kek/movies/2", custodian.StepHold)
	put(moved)
	wantErr(t, "execute without references", a.execute(info), nil)
	a.wantStep("kek/movies/2", custodian.StepRetired)
}

func TestRollbackCeremony(t *testing.T) {
	a := populated(t)
	a.wantDone(a.begin(a.plan("kek-rotation", "categories: [movies]")))
	a.wantDone(a.begin(a.plan("rollback", "rotations: [kek/movies/2]")))
	a.wantStep("kek/movies/2", custodian.StepRolledBack)
	_, _, err := a.c.ProposeCeremony(t.Context(), officer, []byte(a.plan("retire", "rotations: [kek/movies/2]")), "", false)
	wantErr(t, "retire what is rolled back", err, custodian.ErrPlan)
	a.whole()
}

func TestMEKRotationCeremony(t *testing.T) {
	a := populated(t)
	_, _, err := a.c.ProposeCeremony(t.Context(), officer, []byte(a.plan("mek-rotation", "mek_version: 2")), "", false)
	wantErr(t, "another MEK than the one that protects", err, custodian.ErrPlan)
	e := a.wantDone(a.begin(a.plan("mek-rotation", "mek_version: 1")))
	if len(e.Before.MEKs) != 1 || len(e.After.MEKs) != 2 || e.After.MEKs[1].State != "ACTIVE" || e.After.MEKs[1].Attributes["extractable"] != "false" ||
		e.After.MEKs[0].Canary == e.After.MEKs[1].Canary {
		t.Errorf("evidence: got MEKs %+v before and %+v after", e.Before.MEKs, e.After.MEKs)
	}
	a.whole()
}

func TestCompromiseCeremony(t *testing.T) {
	for decision, release := range map[string]error{"serve": nil, "freeze": custodian.ErrCategoryFrozen} {
		t.Run(decision, func(t *testing.T) {
			a := populated(t)
			kid := a.issue("movies", "film0", "SD")[0].KID
			a.freeze("movies", custodian.CategoryFrozen) // break-glass first
			text := a.plan("kek-compromise", "key_versions: [movies/1]\ndecision: "+decision)
			_, r, err := a.c.ProposeCeremony(t.Context(), officer, []byte(text), "", true)
			if err != nil || !strings.Contains(fmt.Sprint(r.Changes), "content keys of movies that count as compromised: 20;") {
				t.Errorf("rehearsal: got %v and %v", r.Changes, err)
			}
			e := a.wantDone(a.begin(text))
			if e.After.Keys[0].State != "COMPROMISED" || e.After.Rotations[0].Step != "RETIRED" {
				t.Errorf("evidence: got keys %+v, rotations %+v", e.After.Keys, e.After.Rotations)
			}
			wantErr(t, "release", a.release(provider, kid), release)
		})
	}
}

// A crash after the execution: the next start orders the rotation once, and
// ends the ceremony.
func TestRotationCeremonyGoesOn(t *testing.T) {
	for op, calls := range map[string]int{"store.Update": 2, "hsm.GenerateKey": 1, "audit.Sync": 4} {
		for n := range 2 * calls { // each before and after doing it
			nth, after := n/2+1, n%2 == 1
			t.Run(fmt.Sprint(op, nth, after), func(t *testing.T) {
				a := populated(t)
				text := a.plan("kek-rotation", "categories: [movies]")
				info := a.propose(text)
				a.approve(info, text, a.anna, a.ben)
				a.breaker.arm(op, nth, after)
				err := a.execute(info)
				if !a.breaker.disarm() {
					t.Fatalf("an execution makes fewer than %d calls of %s", nth, op)
				}
				a.reopen()
				a.wantDoneAfter(info, err)
				if n := len(a.keks("movies")); n != 2 {
					t.Errorf("KEK versions: got %d, want 2", n)
				}
				a.whole()
			})
		}
	}
}

// What cannot be done any more after it was executed fails, and says so.
func TestCeremonyFails(t *testing.T) {
	a := populated(t)
	a.wantDone(a.begin(a.plan("kek-rotation", "categories: [movies]")))
	retire, back := a.plan("retire", "rotations: [kek/movies/2]"), a.plan("rollback", "rotations: [kek/movies/2]")
	first, second := a.propose(retire), a.propose(back)
	a.approve(first, retire, a.anna, a.ben)
	a.approve(second, back, a.anna, a.ben)
	state := func(id string) custodian.CeremonyState {
		t.Helper()
		got, err := a.c.Ceremony(t.Context(), officer, id)
		if err != nil {
			t.Fatal(err)
		}
		return got.State
	}
	// The retirement is executed, and the store goes away before its work.
	a.breaker.afterwards("store.Update", func() { a.breaker.down("store.View") })
	wantErr(t, "execute the retirement", a.execute(first), nil)
	a.breaker.disarm()
	if got := state(first.ID); got != custodian.CeremonyExecuted {
		t.Fatalf("the retirement without a store: got %s, want EXECUTED", got)
	}
	a.advance(time.Second) // so that one is the first
	wantErr(t, "execute the rollback", a.execute(second), nil)
	if one, two := state(first.ID), state(second.ID); one != custodian.CeremonyDone || two != custodian.CeremonyFailed {
		t.Errorf("the retirement is %s and the rollback %s, want DONE and FAILED", one, two)
	}
	all := a.entries(0)
	if last := all[len(all)-1]; last.Action != "ceremony.failed" || last.Outcome != audit.Failed || !strings.Contains(last.Detail, "RETIRED") {
		t.Errorf("the failure in the audit log: got %+v", last)
	}
	a.whole()
}

// Evidence of a rotation: every byte counts, too.
func TestRotationEvidence(t *testing.T) {
	a := populated(t)
	info := a.begin(a.plan("kek-rotation", "categories: [movies]"))
	a.wantDone(info)
	good := a.evidence(info.ID)
	changed := bytes.Clone(good)
	for i := 0; i < len(good); i += 3 {
		changed[i] ^= 1 << (i % 7)
		if _, err := custodian.VerifyEvidence(changed, a.trust()); err == nil {
			t.Errorf("byte %d changed: it verifies", i)
		}
		changed[i] = good[i]
	}
}
