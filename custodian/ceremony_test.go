package custodian_test

import (
	"bytes"
	"cmp"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/audit"
)

// A signatory is an officer with the private key.
type signatory struct {
	custodian.Officer
	key crypto.Signer
}

func newSignatory(t *testing.T, name string, ed bool) signatory {
	t.Helper()
	var key crypto.Signer
	var err error
	if ed {
		_, key, err = ed25519.GenerateKey(rand.Reader)
	} else {
		key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	}
	if err != nil {
		t.Fatal(err)
	}
	text, err := custodian.OfficerKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return signatory{custodian.Officer{Name: name, Key: text}, key}
}

// An assembly is a world with officers anna, ben and cleo, of whom two
// decide, and two recovery keys.
type assembly struct {
	*world
	anna, ben, cleo, rita, ron signatory
	profile                    custodian.MEKProfile // empty: sealed
	genesis                    *custodian.Plan
}

// officersQuorum is the quorum of every assembly.
const officersQuorum = `
quorum:
  default: 2`

func (a *assembly) people() string {
	return fmt.Sprintf(`
officers:
- {name: anna, key: "%s"}
- {name: ben, key: "%s"}
- {name: cleo, key: "%s"}`, a.anna.Key, a.ben.Key, a.cleo.Key)
}

func (a *assembly) recovery() string {
	return fmt.Sprintf(`
recovery:
  quorum: 2
  keys:
  - {name: rita, key: "%s"}
  - {name: ron, key: "%s"}`, a.rita.Key, a.ron.Key)
}

// testGrants are testPolicy in a plan.
const testGrants = `
grants:
- {identity: spiffe://test/packager, role: packager, categories: ["*"]}
- {identity: spiffe://test/patient, role: packager, categories: ["*"], reissue: true}
- {identity: spiffe://test/provider, role: drm-provider, categories: ["*"]}
- {identity: spiffe://test/narrow, role: drm-provider, categories: [movies]}
- {identity: spiffe://test/officer, role: officer, categories: ["*"], spki: "0100000000000000000000000000000000000000000000000000000000000000"}
- {identity: spiffe://test/auditor, role: auditor, categories: ["*"]}
- {identity: spiffe://test/operator, role: operator}`

// newAssembly is a world after a genesis that all officers have signed.
func newAssembly(t *testing.T) *assembly {
	t.Helper()
	return assemblyOf(t, custodian.ProfileSealed)
}

func assemblyOf(t *testing.T, p custodian.MEKProfile) *assembly {
	t.Helper()
	a := &assembly{world: bareWorld(t), profile: p, anna: newSignatory(t, "anna", false), ben: newSignatory(t, "ben", true), cleo: newSignatory(t, "cleo", false),
		rita: newSignatory(t, "rita", true), ron: newSignatory(t, "ron", false)}
	a.openParts()
	g := a.genesisOf(t, a.genesisText())
	a.genesis = g.Plan
	if err := custodian.Init(t.Context(), a.cfg, custodian.InitSpec{Genesis: g}); err != nil {
		t.Fatal(err)
	}
	a.reopen()
	if err := a.c.Tick(t.Context()); err != nil {
		t.Fatal(err)
	}
	return a
}

func (a *assembly) genesisText() string {
	return "plan: custodian/1\nkind: genesis\nreason: the first day\nexpires: " + a.in(24*time.Hour) +
		"\ngenesis: {mek_profile: " + string(cmp.Or(a.profile, custodian.ProfileSealed)) + ", nonce: " + strings.Repeat("ab", 32) + "}" + a.people() + officersQuorum + a.recovery() + testGrants
}

func (a *assembly) genesisOf(t *testing.T, text string) *custodian.Genesis {
	t.Helper()
	g := &custodian.Genesis{Plan: a.parse(text)}
	for _, o := range []signatory{a.anna, a.ben, a.cleo} {
		g.Approvals = append(g.Approvals, custodian.Approval{Officer: o.Name, Key: o.Key, Signature: sign(t, o, genesisChallenge(g.Plan), custodian.ActApprove)})
	}
	return g
}

func genesisChallenge(p *custodian.Plan) custodian.Challenge {
	nonce, _ := hex.DecodeString(p.Genesis.Nonce)
	return custodian.Challenge{PlanDigest: p.Digest(), Expires: p.ExpireTime(), Nonce: [32]byte(nonce)}
}

// in is a time from now on, as a plan has it.
func (a *assembly) in(d time.Duration) string { return a.now().Add(d).UTC().Format(time.RFC3339) }

func (a *assembly) parse(text string) *custodian.Plan {
	a.t.Helper()
	p, err := custodian.ParsePlan([]byte(text))
	if err != nil {
		a.t.Fatalf("plan: %v\n%s", err, text)
	}
	return p
}

// plan is the text of a plan of that kind, that lives a day.
func (a *assembly) plan(kind, body string) string {
	return fmt.Sprintf("plan: custodian/1\nkind: %s\nreason: a test\nexpires: %s\n%s", kind, a.in(24*time.Hour), body)
}

func (a *assembly) propose(text string) custodian.CeremonyInfo {
	a.t.Helper()
	info, _, err := a.c.ProposeCeremony(a.t.Context(), officer, []byte(text), "", false)
	if err != nil {
		a.t.Fatalf("propose: %v\n%s", err, text)
	}
	return info
}

func sign(t *testing.T, by signatory, ch custodian.Challenge, act custodian.Act) []byte {
	t.Helper()
	sig, err := ch.Sign(act, by.key)
	if err != nil {
		t.Fatal(err)
	}
	return sig
}

// request is what an officer sends, made from the officer's own copy of the plan.
func (a *assembly) request(by signatory, info custodian.CeremonyInfo, text string, act custodian.Act) custodian.ApproveRequest {
	a.t.Helper()
	p := a.parse(text)
	ch := custodian.Challenge{PlanDigest: p.Digest(), StoreID: info.StoreID, Revision: info.Base, Expires: p.ExpireTime(), Nonce: info.Nonce, LogKey: info.LogKey}
	return custodian.ApproveRequest{ID: info.ID, Key: by.Key, Challenge: ch, Signature: sign(a.t, by, ch, act)}
}

func (a *assembly) approve(info custodian.CeremonyInfo, text string, by ...signatory) {
	a.t.Helper()
	for _, o := range by {
		if _, err := a.c.ApproveCeremony(a.t.Context(), officer, a.request(o, info, text, custodian.ActApprove)); err != nil {
			a.t.Fatalf("%s approves: %v", o.Name, err)
		}
	}
}

func (a *assembly) execute(info custodian.CeremonyInfo) error {
	_, err := a.c.ExecuteCeremony(a.t.Context(), officer, info.ID, "")
	return err
}

// hold carries a plan out, from its proposal to its end.
func (a *assembly) hold(text string, by ...signatory) custodian.CeremonyInfo {
	a.t.Helper()
	info := a.propose(text)
	a.approve(info, text, by...)
	done, err := a.c.ExecuteCeremony(a.t.Context(), officer, info.ID, "")
	if err != nil {
		a.t.Fatalf("execute: %v", err)
	}
	if done.State != custodian.CeremonyDone {
		a.t.Fatalf("state after execution: got %s, want DONE", done.State)
	}
	return done
}

// What an attacker tries, each refused, and each written to the audit log
// with its outcome. TestRetireWithReferences and TestDestroyCeremony have the
// rows for which a record must be forged.
func TestCeremonyAttacks(t *testing.T) {
	type attack struct {
		name   string
		try    func(a *assembly) error
		want   error
		action string // of the audit entry
	}
	unfreeze := "categories: [movies]"
	frozen := func(a *assembly) (custodian.CeremonyInfo, string) {
		text := a.plan("unfreeze", unfreeze)
		return a.propose(text), text
	}
	ctx := t.Context()
	approve := func(a *assembly, req custodian.ApproveRequest) error {
		_, err := a.c.ApproveCeremony(ctx, officer, req)
		return err
	}
	for _, test := range []attack{
		{"approve with a changed plan", func(a *assembly) error {
			info, _ := frozen(a)
			return approve(a, a.request(a.anna, info, a.plan("unfreeze", "categories: [sport]"), custodian.ActApprove))
		}, custodian.ErrApproval, "ceremony.approve"},
		{"say the right plan and sign a changed one", func(a *assembly) error {
			info, text := frozen(a)
			req := a.request(a.anna, info, a.plan("unfreeze", "categories: [sport]"), custodian.ActApprove)
			req.Challenge.PlanDigest = a.parse(text).Digest()
			return approve(a, req)
		}, custodian.ErrApproval, "ceremony.approve"},
		{"approve twice", func(a *assembly) error {
			info, text := frozen(a)
			a.approve(info, text, a.anna)
			return approve(a, a.request(a.anna, info, text, custodian.ActApprove))
		}, custodian.ErrApproval, "ceremony.approve"},
		{"approve by a non-officer", func(a *assembly) error {
			info, text := frozen(a)
			return approve(a, a.request(newSignatory(t, "anna", false), info, text, custodian.ActApprove))
		}, custodian.ErrApproval, "ceremony.approve"},
		{"approve in another officer's name", func(a *assembly) error {
			info, text := frozen(a)
			req := a.request(a.ben, info, text, custodian.ActApprove)
			req.Key = a.anna.Key
			return approve(a, req)
		}, custodian.ErrApproval, "ceremony.approve"},
		{"approve with a recovery key", func(a *assembly) error {
			info, text := frozen(a)
			return approve(a, a.request(a.rita, info, text, custodian.ActApprove))
		}, custodian.ErrApproval, "ceremony.approve"},
		{"approve with a removed officer's key", func(a *assembly) error {
			dora := newSignatory(t, "dora", false)
			text := a.plan("officers", strings.Replace(a.people(), a.cleo.Key, dora.Key, 1)+officersQuorum+a.recovery())
			text = strings.Replace(text, "cleo", "dora", 1)
			a.hold(text, a.anna, a.ben)
			info, text := frozen(a)
			return approve(a, a.request(a.cleo, info, text, custodian.ActApprove))
		}, custodian.ErrApproval, "ceremony.approve"},
		{"approve without the role", func(a *assembly) error {
			info, text := frozen(a)
			_, err := a.c.ApproveCeremony(ctx, operator, a.request(a.anna, info, text, custodian.ActApprove))
			return err
		}, custodian.ErrDenied, "ceremony.approve"},
		{"replay an approval of another ceremony", func(a *assembly) error {
			first, text := frozen(a)
			req := a.request(a.anna, first, text, custodian.ActApprove)
			second := a.propose(text) // the very same plan
			req.ID = second.ID
			return approve(a, req)
		}, custodian.ErrApproval, "ceremony.approve"},
		{"replay an approval of another ceremony under this one's challenge", func(a *assembly) error {
			first, text := frozen(a)
			second := a.propose(text)
			req := a.request(a.anna, second, text, custodian.ActApprove)
			req.Signature = a.request(a.anna, first, text, custodian.ActApprove).Signature
			return approve(a, req)
		}, custodian.ErrApproval, "ceremony.approve"},
		{"replay an approval of another store", func(a *assembly) error {
			info, text := frozen(a)
			info.StoreID[0] ^= 1
			return approve(a, a.request(a.anna, info, text, custodian.ActApprove))
		}, custodian.ErrApproval, "ceremony.approve"},
		{"replay an approval of another store under this one's name", func(a *assembly) error {
			info, text := frozen(a)
			other := info
			other.StoreID[0] ^= 1
			req := a.request(a.anna, info, text, custodian.ActApprove)
			req.Signature = a.request(a.anna, other, text, custodian.ActApprove).Signature
			return approve(a, req)
		}, custodian.ErrApproval, "ceremony.approve"},
		{"approve for another revision", func(a *assembly) error {
			info, text := frozen(a)
			info.Base++
			return approve(a, a.request(a.anna, info, text, custodian.ActApprove))
		}, custodian.ErrApproval, "ceremony.approve"},
		{"approve for another expiry", func(a *assembly) error {
			info, text := frozen(a)
			req := a.request(a.anna, info, text, custodian.ActApprove)
			req.Challenge.Expires = req.Challenge.Expires.Add(time.Hour)
			req.Signature = sign(t, a.anna, req.Challenge, custodian.ActApprove)
			return approve(a, req)
		}, custodian.ErrApproval, "ceremony.approve"},
		{"take a cancellation for an approval", func(a *assembly) error {
			info, text := frozen(a)
			return approve(a, a.request(a.anna, info, text, custodian.ActCancel))
		}, custodian.ErrApproval, "ceremony.approve"},
		{"propose and self-approve to reach the quorum alone", func(a *assembly) error {
			info, text := frozen(a)
			a.approve(info, text, a.anna)
			if err := approve(a, a.request(a.anna, info, text, custodian.ActApprove)); err == nil {
				return nil
			}
			return a.execute(info)
		}, custodian.ErrQuorum, "ceremony.execute"},
		{"cancel without the quorum", func(a *assembly) error {
			info, text := frozen(a)
			if _, err := a.c.CancelCeremony(ctx, officer, a.request(a.anna, info, text, custodian.ActCancel)); err != nil {
				t.Fatal(err) // one wish is taken, and does nothing
			}
			if got, err := a.c.Ceremony(ctx, officer, info.ID); err != nil || got.State != custodian.CeremonyProposed {
				t.Errorf("after one of two: got %s and %v, want PROPOSED", got.State, err)
			}
			_, err := a.c.CancelCeremony(ctx, officer, a.request(a.anna, info, text, custodian.ActCancel))
			return err
		}, custodian.ErrApproval, "ceremony.cancel"},
		{"execute after it was cancelled", func(a *assembly) error {
			info, text := frozen(a)
			a.approve(info, text, a.anna, a.ben)
			for _, o := range []signatory{a.ben, a.cleo} {
				if _, err := a.c.CancelCeremony(ctx, officer, a.request(o, info, text, custodian.ActCancel)); err != nil {
					t.Fatal(err)
				}
			}
			return a.execute(info)
		}, custodian.ErrCeremonyState, "ceremony.execute"},
		{"execute twice", func(a *assembly) error {
			info := a.hold(a.plan("unfreeze", unfreeze), a.anna, a.ben)
			a.freeze("movies", custodian.CategoryFrozen)
			return a.execute(info)
		}, custodian.ErrCeremonyState, "ceremony.execute"},
		{"execute after the expiry", func(a *assembly) error {
			info, text := frozen(a)
			a.approve(info, text, a.anna, a.ben)
			a.advance(24 * time.Hour)
			return a.execute(info)
		}, custodian.ErrCeremonyState, "ceremony.execute"},
		{"approve after the expiry", func(a *assembly) error {
			info, text := frozen(a)
			a.advance(25 * time.Hour)
			return approve(a, a.request(a.anna, info, text, custodian.ActApprove))
		}, custodian.ErrCeremonyState, "ceremony.approve"},
		{"propose what has expired", func(a *assembly) error {
			text := a.plan("unfreeze", unfreeze)
			a.advance(24 * time.Hour)
			_, _, err := a.c.ProposeCeremony(ctx, officer, []byte(text), "", false)
			return err
		}, custodian.ErrPlan, "ceremony.propose"},
		{"propose what never expires", func(a *assembly) error {
			text := strings.Replace(a.plan("unfreeze", unfreeze), a.in(24*time.Hour), a.in(custodian.MaxPlanLife+time.Minute), 1)
			_, _, err := a.c.ProposeCeremony(ctx, officer, []byte(text), "", false)
			return err
		}, custodian.ErrPlan, "ceremony.propose"},
		{"lower the quorum without the quorum", func(a *assembly) error {
			dora := newSignatory(t, "dora", false)
			body := a.people() + fmt.Sprintf("\n- {name: dora, key: %q}", dora.Key)
			a.hold(a.plan("officers", body+"\nquorum: {default: 3}"+a.recovery()), a.anna, a.ben)
			text := a.plan("officers", body+officersQuorum+a.recovery())
			info := a.propose(text)
			a.approve(info, text, a.anna, dora)
			return a.execute(info)
		}, custodian.ErrQuorum, "ceremony.execute"},
		{"a quorum of one", func(a *assembly) error {
			_, _, err := a.c.ProposeCeremony(ctx, officer, []byte(a.plan("officers", a.people()+"\nquorum: {default: 1}")), "", false)
			return err
		}, custodian.ErrInvalid, "ceremony.propose"},
		{"a quorum of all", func(a *assembly) error {
			_, _, err := a.c.ProposeCeremony(ctx, officer, []byte(a.plan("officers", a.people()+"\nquorum: {default: 3}")), "", false)
			return err
		}, custodian.ErrInvalid, "ceremony.propose"},
		{"one key under two names", func(a *assembly) error {
			text := a.plan("officers", strings.Replace(a.people(), a.cleo.Key, a.ben.Key, 1)+officersQuorum)
			_, _, err := a.c.ProposeCeremony(ctx, officer, []byte(text), "", false)
			return err
		}, custodian.ErrInvalid, "ceremony.propose"},
		{"approvals outlive a change of the officers", func(a *assembly) error {
			info, text := frozen(a)
			a.approve(info, text, a.anna, a.ben)
			dora := newSignatory(t, "dora", false)
			a.hold(a.plan("officers", a.people()+fmt.Sprintf("\n- {name: dora, key: %q}", dora.Key)+officersQuorum+a.recovery()), a.anna, a.ben)
			return a.execute(info)
		}, custodian.ErrCeremonyState, "ceremony.execute"},
		{"approvals outlive a change of what the plan names", func(a *assembly) error {
			info, text := frozen(a)
			a.approve(info, text, a.anna, a.ben)
			a.hold(text, a.anna, a.ben)
			return a.execute(info)
		}, custodian.ErrCeremonyState, "ceremony.execute"},
		{"an operator's edit of the policy file where officers exist", func(a *assembly) error {
			p, err := custodian.NewPolicy([]custodian.Grant{{Identity: operator.ID, Role: custodian.RoleProvider, AllCategories: true}})
			if err != nil {
				t.Fatal(err)
			}
			return a.c.SetPolicy(ctx, p)
		}, custodian.ErrQuorum, "policy.load"},
		{"lift a freeze without the quorum", func(a *assembly) error {
			_, err := a.c.SetCategoryMode(ctx, officer, custodian.SetModeRequest{Name: "movies", Mode: custodian.CategoryOpen})
			return err
		}, custodian.ErrQuorum, "category.mode"},
		{"destroy an active key", func(a *assembly) error {
			_, _, err := a.c.ProposeCeremony(ctx, officer, []byte(a.plan("destroy", "key_versions: [movies/1]")), "", false)
			return err
		}, custodian.ErrPlan, "ceremony.propose"},
		{"lift the freeze of a caller without the quorum", func(a *assembly) error {
			a.freezeCaller(packager.ID)
			_, err := a.c.LiftCaller(ctx, officer, custodian.FreezeCallerRequest{Identity: packager.ID, Cause: "alone"})
			return err
		}, custodian.ErrQuorum, "caller.lift"},
		{"silence the other officers", func(a *assembly) error {
			_, err := a.c.FreezeCaller(ctx, officer, custodian.FreezeCallerRequest{Identity: officer.ID, Cause: "a coup"})
			return err
		}, custodian.ErrInvalid, "caller.freeze"},
		{"set a mode without the quorum", func(a *assembly) error {
			text := a.plan("category-policy", "categories: [movies]\nmode: open")
			info := a.propose(text)
			a.approve(info, text, a.cleo)
			return a.execute(info)
		}, custodian.ErrQuorum, "ceremony.execute"},
		{"bring keys in alone", func(a *assembly) error {
			_, err := a.take(officer, a.bring("movies", "film", a.foreign("SD", 9, 9)))
			return err
		}, custodian.ErrQuorum, "keys.import"},
		{"take keys out alone", func(a *assembly) error {
			_, err := a.c.Export(ctx, officer, custodian.ExportRequest{Category: "movies", ContentID: []byte("film"), Recipient: "studio"})
			return err
		}, custodian.ErrQuorum, "keys.export"},
		{"take away the outer layer alone", func(a *assembly) error {
			_, err := a.c.SetProviders(ctx, officer, custodian.SetProvidersRequest{Category: "movies", Providers: []string{"local"}, Cause: "alone"})
			return err
		}, custodian.ErrQuorum, "category.providers"},
		{"a second genesis", func(a *assembly) error {
			text := a.genesisText()
			_, _, err := a.c.ProposeCeremony(ctx, officer, []byte(text), "", false)
			return err
		}, custodian.ErrPlan, "ceremony.propose"},
		{"a bundle that makes an officer's key an operator's", func(a *assembly) error {
			text := a.plan("policy", strings.Replace(testGrants, "role: operator}", "role: operator, spki: \"0100000000000000000000000000000000000000000000000000000000000000\"}", 1))
			_, _, err := a.c.ProposeCeremony(ctx, officer, []byte(text), "", false)
			return err
		}, custodian.ErrInvalid, "ceremony.propose"},
		{"execute a recovery at once", func(a *assembly) error {
			text := strings.Replace(a.plan("recovery", strings.Replace(a.people(), "cleo", "dora", 1)+officersQuorum), a.in(24*time.Hour), a.in(100*time.Hour), 1)
			info := a.propose(text)
			a.approve(info, text, a.rita, a.ron)
			a.advance(71 * time.Hour)
			return a.execute(info)
		}, custodian.ErrCeremonyState, "ceremony.execute"},
		{"approve a recovery as an officer", func(a *assembly) error {
			text := strings.Replace(a.plan("recovery", strings.Replace(a.people(), "cleo", "dora", 1)+officersQuorum), a.in(24*time.Hour), a.in(100*time.Hour), 1)
			return approve(a, a.request(a.anna, a.propose(text), text, custodian.ActApprove))
		}, custodian.ErrApproval, "ceremony.approve"},
	} {
		t.Run(test.name, func(t *testing.T) {
			a := newAssembly(t)
			a.category("movies")
			a.category("sport")
			a.freeze("movies", custodian.CategoryFrozen)
			a.freeze("sport", custodian.CategoryFrozen)
			err := test.try(a)
			wantErr(t, test.name, err, test.want)
			all := a.entries(0)
			last := all[len(all)-1]
			if last.Action != test.action || last.Outcome == audit.Allowed || last.Reason != string(custodian.ReasonOf(err)) {
				t.Errorf("the attempt in the audit log: got %s %s %s, want %s refused with %s", last.Action, last.Outcome, last.Reason, test.action, custodian.ReasonOf(err))
			}
			if mode := categoryMode(t, a, "sport"); mode != custodian.CategoryFrozen {
				t.Errorf("category sport: got %s, want FROZEN", mode)
			}
			a.whole()
		})
	}
}

// What one officer, or a budget, has frozen, the quorum opens.
func TestLiftCallerCeremony(t *testing.T) {
	a := newAssembly(t)
	a.category("movies")
	kid := a.issue("movies", "film", "SD")[0].KID
	a.freezeCaller(provider.ID)
	_, err := a.c.LiftCaller(t.Context(), officer, custodian.FreezeCallerRequest{Identity: provider.ID, Cause: "alone"})
	wantErr(t, "lift without the quorum", err, custodian.ErrQuorum)
	a.wantLast("caller.lift", audit.Failed, "QUORUM", provider.ID)
	text := a.plan("unfreeze", "callers: ["+provider.ID+"]")
	_, r, err := a.c.ProposeCeremony(t.Context(), officer, []byte(text), "", true)
	if want := "[caller " + provider.ID + " may call again; it is frozen since 2026-11-22T12:00:00Z, by " + officer.ID + ": stolen]"; err != nil || fmt.Sprint(r.Changes) != want {
		t.Errorf("rehearsal: got %v and %v, want %s", r.Changes, err, want)
	}
	_, _, err = a.c.ProposeCeremony(t.Context(), officer, []byte(a.plan("unfreeze", "callers: ["+packager.ID+"]")), "", false)
	wantErr(t, "a caller that is not frozen", err, custodian.ErrPlan)
	wantErr(t, "release", a.release(provider, kid), custodian.ErrCallerFrozen)
	e := a.wantDone(a.hold(text, a.anna, a.ben))
	if fmt.Sprint(e.Before.Callers, e.After.Callers) != fmt.Sprintf("[{%s true 0}] [{%s false 0}]", provider.ID, provider.ID) {
		t.Errorf("evidence: got %v before and %v after", e.Before.Callers, e.After.Callers)
	}
	wantErr(t, "release", a.release(provider, kid), nil)
	a.whole()
}

func categoryMode(t *testing.T, a *assembly, name custodian.CategoryName) custodian.CategoryMode {
	t.Helper()
	all, err := a.c.Categories(t.Context(), auditor)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range all {
		if c.Name == name {
			return c.Mode
		}
	}
	t.Fatalf("no category %s", name)
	return 0
}

func TestUnfreezeCeremony(t *testing.T) {
	a := newAssembly(t)
	a.category("movies")
	key := a.issue("movies", "film", "SD")[0]
	a.freeze("movies", custodian.CategoryFrozen)
	text := a.plan("unfreeze", "categories: [movies]")

	_, r, err := a.c.ProposeCeremony(t.Context(), officer, []byte(text), "", true)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := fmt.Sprint(r.Changes), "[category movies is opened]"; got != want || r.Needed != 2 || r.Digest != a.parse(text).Digest() {
		t.Errorf("rehearsal: got %s, %d approvals, want %s, 2", got, r.Needed, want)
	}
	if all, err := a.c.Ceremonies(t.Context(), officer); err != nil || len(all) != 1 { // the genesis
		t.Errorf("after a rehearsal: got %d ceremonies and %v, want 1", len(all), err)
	}
	a.hold(text, a.cleo, a.ben)
	wantErr(t, "release after the ceremony", a.release(provider, key.KID), nil)
	a.whole()
}

// The officers' bundle is the policy, before and after a start, whatever the
// configuration says.
func TestPolicyCeremony(t *testing.T) {
	a := newAssembly(t)
	a.category("movies")
	kid := a.issue("movies", "film", "SD")[0].KID
	text := a.plan("policy", strings.Replace(testGrants, `{identity: spiffe://test/provider, role: drm-provider, categories: ["*"]}`,
		`{identity: spiffe://test/newcomer, role: drm-provider, categories: [movies]}`, 1))
	a.hold(text, a.anna, a.cleo)
	newcomer := custodian.Caller{ID: "spiffe://test/newcomer", Roles: []custodian.Role{custodian.RoleProvider}}
	check := func() {
		t.Helper()
		wantErr(t, "release to who was taken off", a.release(provider, kid), custodian.ErrDenied)
		wantErr(t, "release to who was put on", a.release(newcomer, kid), nil)
	}
	check()
	before := len(a.entries(0))
	a.reopen() // the configuration still has the old grants
	check()
	refused := false
	for _, e := range a.entries(uint64(before)) {
		refused = refused || e.Action == "policy.load" && e.Outcome == audit.Denied && e.Reason == "QUORUM"
	}
	if !refused {
		t.Error("a start with other grants in its configuration: got no refusal in the audit log")
	}
	st, err := a.c.Status(t.Context(), operator)
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(st.Warnings); !strings.Contains(got, "not the officers' bundle") || strings.Contains(got, "no officers' quorum") {
		t.Errorf("warnings: got %s", got)
	}
	// What the configuration forbids, the officers' bundle does not permit.
	if a.cfg.Policy, err = a.cfg.Policy.WithRules(rulesOf(`@id("stop") forbid (principal, action == Custodian::Action::"release", resource);`)); err != nil {
		t.Fatal(err)
	}
	a.reopen()
	wantErr(t, "release against a rule", a.release(newcomer, kid), custodian.ErrDenied)
}

func TestSealCeremony(t *testing.T) {
	a := newAssembly(t)
	a.category("movies")
	kid := a.issue("movies", "film", "SD")[0].KID
	a.hold(a.plan("seal", ""), a.anna, a.ben)
	sealed := func() {
		t.Helper()
		wantErr(t, "release", a.release(provider, kid), custodian.ErrSealed)
		_, err := a.c.Issue(t.Context(), packager, ask("movies", "film", "SD"))
		wantErr(t, "issue", err, custodian.ErrSealed)
		_, err = a.c.CreateCategory(t.Context(), officer, custodian.CreateCategoryRequest{Name: "sport"})
		wantErr(t, "create category", err, custodian.ErrSealed)
		wantErr(t, "ready", a.c.Ready(t.Context()), custodian.ErrSealed)
	}
	sealed()
	st, err := a.c.Status(t.Context(), operator)
	if err != nil || st.KEKsLoaded != len(custodian.HelperPurposes) {
		t.Errorf("loaded keys of a sealed custody: got %d and %v, want the %d helpers", st.KEKsLoaded, err, len(custodian.HelperPurposes))
	}
	a.reopen()
	sealed()
	a.hold(a.plan("unseal", ""), a.ben, a.cleo)
	wantErr(t, "release after unsealing", a.release(provider, kid), nil)
	wantErr(t, "ready after unsealing", a.c.Ready(t.Context()), nil)
	a.whole()
}

func TestRecovery(t *testing.T) {
	dora := newSignatory(t, "dora", true)
	begin := func(t *testing.T) (*assembly, custodian.CeremonyInfo, string) {
		a := newAssembly(t)
		people := strings.Replace(strings.Replace(a.people(), a.cleo.Key, dora.Key, 1), "cleo", "dora", 1)
		text := strings.Replace(a.plan("recovery", people+officersQuorum), a.in(24*time.Hour), a.in(100*time.Hour), 1)
		info := a.propose(text)
		a.approve(info, text, a.rita, a.ron)
		st, err := a.c.Status(t.Context(), operator)
		if err != nil || !strings.Contains(fmt.Sprint(st.Warnings), "recovery "+info.ID) {
			t.Errorf("a recovery on its way: got warnings %q and %v", st.Warnings, err)
		}
		return a, info, text
	}
	t.Run("takes effect after three days", func(t *testing.T) {
		a, info, _ := begin(t)
		a.advance(custodian.RecoveryDelay)
		wantErr(t, "execute", a.execute(info), nil)
		a.category("movies")
		a.freeze("movies", custodian.CategoryFrozen)
		a.hold(a.plan("unfreeze", "categories: [movies]"), a.anna, dora)
		a.whole()
	})
	t.Run("any remaining officer stops it", func(t *testing.T) {
		a, info, text := begin(t)
		a.advance(custodian.RecoveryDelay - time.Hour)
		_, err := a.c.CancelCeremony(t.Context(), officer, a.request(a.rita, info, text, custodian.ActCancel))
		wantErr(t, "stopped by a recovery key", err, custodian.ErrApproval)
		got, err := a.c.CancelCeremony(t.Context(), officer, a.request(a.ben, info, text, custodian.ActCancel))
		if err != nil || got.State != custodian.CeremonyCancelled {
			t.Fatalf("stopped by one officer: got %s and %v, want CANCELLED", got.State, err)
		}
		a.advance(2 * time.Hour)
		wantErr(t, "execute", a.execute(info), custodian.ErrCeremonyState)
	})
	t.Run("replaces officers and nothing else", func(t *testing.T) {
		a := newAssembly(t)
		for _, body := range []string{a.people() + officersQuorum + a.recovery(), a.people() + officersQuorum + testGrants} {
			_, err := custodian.ParsePlan([]byte(a.plan("recovery", body)))
			wantErr(t, "a recovery plan with more", err, custodian.ErrInvalid)
		}
	})
}

func TestGenesisRefuses(t *testing.T) {
	for name, spoil := range map[string]func(a *assembly, g *custodian.Genesis){
		"one has not signed": func(_ *assembly, g *custodian.Genesis) { g.Approvals = g.Approvals[:2] },
		"one has signed twice": func(_ *assembly, g *custodian.Genesis) {
			g.Approvals = append(g.Approvals, g.Approvals[0])
		},
		"a stranger has signed, too": func(a *assembly, g *custodian.Genesis) {
			s := newSignatory(t, "stranger", false)
			g.Approvals = append(g.Approvals, custodian.Approval{Officer: "stranger", Key: s.Key, Signature: sign(t, s, genesisChallenge(g.Plan), custodian.ActApprove)})
		},
		"the plan was changed": func(_ *assembly, g *custodian.Genesis) { g.Plan.Reason += "!" },
		"it has expired":       func(a *assembly, _ *custodian.Genesis) { a.advance(25 * time.Hour) },
		"it is another kind": func(a *assembly, g *custodian.Genesis) {
			g.Plan = a.parse(a.plan("officers", a.people()+officersQuorum))
		},
	} {
		t.Run(name, func(t *testing.T) {
			a := &assembly{world: bareWorld(t), anna: newSignatory(t, "anna", false), ben: newSignatory(t, "ben", true), cleo: newSignatory(t, "cleo", false),
				rita: newSignatory(t, "rita", true), ron: newSignatory(t, "ron", false)}
			a.openParts()
			g := a.genesisOf(t, a.genesisText())
			spoil(a, g)
			wantErr(t, "init", custodian.Init(t.Context(), a.cfg, custodian.InitSpec{Genesis: g}), custodian.ErrApproval)
			if objects, err := a.hsm.Objects(t.Context()); err != nil || len(objects) != 0 {
				t.Errorf("after it: got %d objects in the token and %v, want none", len(objects), err)
			}
		})
	}
}

// A crash between the effect and its end leaves a ceremony that the next
// start ends.
func TestCeremonyIsFinished(t *testing.T) {
	for _, op := range []string{"hsm.CheckMEK", "store.Update", "audit.Sync"} {
		for n := range 4 { // the effect or its end, before or after doing it
			nth, after := n/2+1, n%2 == 1
			t.Run(fmt.Sprint(op, nth, after), func(t *testing.T) {
				a := newAssembly(t)
				a.category("movies")
				a.freeze("movies", custodian.CategoryFrozen)
				text := a.plan("unfreeze", "categories: [movies]")
				info := a.propose(text)
				a.approve(info, text, a.anna, a.ben)
				a.breaker.arm(op, nth, after)
				first := a.execute(info)
				if !a.breaker.disarm() {
					t.Fatalf("an execution makes fewer than %d calls of %s", nth, op)
				}
				a.reopen()
				if err := a.c.Tick(t.Context()); err != nil {
					t.Fatal(err)
				}
				got, err := a.c.Ceremony(t.Context(), officer, info.ID)
				if err != nil {
					t.Fatal(err)
				}
				mode := categoryMode(t, a, "movies")
				switch {
				case got.State == custodian.CeremonyProposed && mode == custodian.CategoryFrozen && first != nil:
					wantErr(t, "execute again", a.execute(info), nil)
				case got.State == custodian.CeremonyDone && mode == custodian.CategoryOpen:
				default:
					t.Errorf("got state %s, category %s, error %v", got.State, mode, first)
				}
				if _, err := a.c.Evidence(t.Context(), auditor, info.ID); err != nil {
					t.Errorf("evidence: %v", err)
				}
				a.whole()
			})
		}
	}
}

func (a *assembly) trust() custodian.Trust {
	var t custodian.Trust
	for _, o := range []signatory{a.anna, a.ben, a.cleo} {
		t.Officers = append(t.Officers, o.key.Public())
	}
	return t
}

func (a *assembly) evidence(id string) []byte {
	a.t.Helper()
	b, err := a.c.Evidence(a.t.Context(), auditor, id)
	if err != nil {
		a.t.Fatal(err)
	}
	return b
}

// An evidence bundle with any byte changed, dropped or doubled does not
// verify; a good one does, with nothing but the officers' public keys.
func TestEvidence(t *testing.T) {
	a := newAssembly(t)
	a.category("movies")
	a.freeze("movies", custodian.CategoryFrozen)
	text := a.plan("unfreeze", "categories: [movies]")
	info := a.propose(text)
	if _, err := a.c.ApproveCeremony(t.Context(), officer, a.request(newSignatory(t, "eve", false), info, text, custodian.ActApprove)); err == nil {
		t.Fatal("a stranger has approved")
	}
	_, err := a.c.Evidence(t.Context(), auditor, info.ID)
	wantErr(t, "evidence of what is not done", err, custodian.ErrCeremonyState)
	a.approve(info, text, a.anna, a.ben)
	wantErr(t, "execute", a.execute(info), nil)

	good := a.evidence(info.ID)
	e, err := custodian.VerifyEvidence(good, a.trust())
	if err != nil {
		t.Fatal(err)
	}
	if e.Before.Categories[0].Mode != "FROZEN" || e.After.Categories[0].Mode != "OPEN" || len(e.Approvals) != 2 ||
		e.After.MEKs[0].Attributes["extractable"] != "false" || len(e.Log.Entries) != 6 {
		t.Errorf("evidence: got %+v", e)
	}
	a.category("sport") // the log goes on
	a.reopen()
	if again := a.evidence(info.ID); !bytes.Equal(again, good) {
		t.Error("made again from the same inputs, the evidence is another")
	}

	changed := bytes.Clone(good)
	for i := range good {
		changed[i] ^= 1 << (i % 8)
		if _, err := custodian.VerifyEvidence(changed, a.trust()); err == nil {
			t.Errorf("byte %d changed: it verifies\n%s", i, changed[max(0, i-40):min(len(good), i+40)])
		}
		changed[i] = good[i]
	}
	for i := 0; i < len(good); i += 97 {
		if _, err := custodian.VerifyEvidence(append(bytes.Clone(good[:i]), good[i+1:]...), a.trust()); err == nil {
			t.Errorf("byte %d dropped: it verifies", i)
		}
	}
	less := a.trust()
	less.Officers = less.Officers[1:]
	_, err = custodian.VerifyEvidence(good, less)
	wantErr(t, "an officer who is not trusted", err, custodian.ErrEvidence)
	wrong := a.trust()
	wrong.AuditKey = a.anna.key.Public()
	_, err = custodian.VerifyEvidence(good, wrong)
	wantErr(t, "another audit key", err, custodian.ErrEvidence)
}

// Entries that are left out, or of another ceremony, are noticed.
func TestEvidenceIsWhole(t *testing.T) {
	a := newAssembly(t)
	a.category("movies")
	var bundles []map[string]any
	for range 2 {
		a.freeze("movies", custodian.CategoryFrozen)
		info := a.hold(a.plan("unfreeze", "categories: [movies]"), a.anna, a.ben)
		var m map[string]any
		if err := json.Unmarshal(a.evidence(info.ID), &m); err != nil {
			t.Fatal(err)
		}
		bundles = append(bundles, m)
	}
	for name, spoil := range map[string]func(e *custodian.Evidence){
		"an approval's entry is left out": func(e *custodian.Evidence) { e.Log.Entries = append(e.Log.Entries[:1:1], e.Log.Entries[2:]...) },
		"the last entry is left out":      func(e *custodian.Evidence) { e.Log.Entries = e.Log.Entries[:len(e.Log.Entries)-1] },
		"an approval is left out":         func(e *custodian.Evidence) { e.Approvals = e.Approvals[:1] },
		"fewer are needed":                func(e *custodian.Evidence) { e.Needed, e.Approvals = 1, e.Approvals[:1] },
		"one approval counts twice":       func(e *custodian.Evidence) { e.Approvals[1] = e.Approvals[0] },
		"another state after":             func(e *custodian.Evidence) { e.After.ContentKeys++ },
		"the log of another ceremony": func(e *custodian.Evidence) {
			var other custodian.Evidence
			again(t, bundles[1], &other)
			e.Log = other.Log
		},
	} {
		var e custodian.Evidence
		again(t, bundles[0], &e)
		spoil(&e)
		b, err := json.MarshalIndent(e, "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		_, err = custodian.VerifyEvidence(append(b, '\n'), a.trust())
		wantErr(t, name, err, custodian.ErrEvidence)
	}
}

func again(t *testing.T, from map[string]any, to *custodian.Evidence) {
	t.Helper()
	b, err := json.Marshal(from)
	if err == nil {
		err = json.Unmarshal(b, to)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func TestGenesisEvidence(t *testing.T) {
	a := newAssembly(t)
	all, err := a.c.Ceremonies(t.Context(), auditor)
	if err != nil || len(all) != 1 {
		t.Fatalf("got %d ceremonies and %v, want the genesis", len(all), err)
	}
	b := a.evidence(all[0].ID)
	_, err = custodian.VerifyEvidence(b, a.trust())
	wantErr(t, "without the audit key", err, custodian.ErrEvidence)
	trust := a.trust()
	_, key, err := a.c.AuditCheckpoint(t.Context(), auditor)
	if err != nil {
		t.Fatal(err)
	}
	logKey := custodian.Officer{Key: base64Text(key.PublicKey)}
	if trust.AuditKey, err = logKey.PublicKey(); err != nil {
		t.Fatal(err)
	}
	e, err := custodian.VerifyEvidence(b, trust)
	if err != nil || len(e.Approvals) != 3 {
		t.Errorf("with it: got %d approvals and %v, want 3", len(e.Approvals), err)
	}
}

// Without officers the configuration decides, and there is no ceremony about
// officers.
func TestNoOfficers(t *testing.T) {
	w := newWorld(t)
	a := &assembly{world: w}
	for _, kind := range []string{"seal", "unseal"} {
		_, _, err := w.c.ProposeCeremony(t.Context(), officer, []byte(a.plan(kind, "")), "", false)
		wantErr(t, kind, err, custodian.ErrPlan)
	}
	wantErr(t, "a new policy", w.c.SetPolicy(t.Context(), testPolicy(t)), nil)
}
