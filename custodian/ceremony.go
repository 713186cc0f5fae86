package custodian

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/keycustody/custodian/internal/audit"
)

// maxOpenCeremonies bounds how many ceremonies can wait for officers at once.
const maxOpenCeremonies = 32

// A CeremonyState is how far a ceremony is. The zero state is none.
type CeremonyState uint8

// The states. Expired is never recorded: it is a proposed one whose time is up.
const (
	CeremonyProposed  CeremonyState = 1
	CeremonyExecuted  CeremonyState = 2 // it takes effect, and its end is not proved and written down yet
	CeremonyDone      CeremonyState = 3
	CeremonyCancelled CeremonyState = 4
	CeremonyExpired   CeremonyState = 5
	CeremonyFailed    CeremonyState = 6 // it was executed, and could not be done
)

func (s CeremonyState) String() string {
	names := [...]string{"UNSPECIFIED", "PROPOSED", "EXECUTED", "DONE", "CANCELLED", "EXPIRED", "FAILED"}
	if int(s) < len(names) {
		return names[s]
	}
	return fmt.Sprintf("STATE_%d", uint8(s))
}

// MarshalText writes the state's name.
func (s CeremonyState) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// A Ceremony is a plan on its way. It is a control record.
type Ceremony struct {
	ID    string // 16 hexadecimal digits, the beginning of the nonce
	Plan  string // Plan.Canonical
	State CeremonyState

	// What approvals are tied to, beside the plan's digest and the store.
	Base   uint64   // the control revision at which it was proposed
	Nonce  [32]byte // drawn by the token
	LogKey [32]byte // SHA-256 of the public key that signs the audit log
	// Basis is the digest of the state of every object that the plan names, and
	// of the officers. Where it has changed since, the plan is out of date.
	Basis [32]byte

	Proposer    string
	ProposeTime time.Time
	FirstEntry  uint64 // no entry of the audit log before this index is about it
	Needed      uint32 // approvals

	Approvals  []Approval
	Cancels    []Approval
	QuorumTime time.Time // when the last approval came that was needed
	Executor   string
	ExecTime   time.Time
	EndTime    time.Time
	Before     []byte // a Snapshot in JSON, taken before it was executed
	After      []byte // and after
	Revision   uint64
}

// plan reads the plan again.
func (x Ceremony) plan() (*Plan, error) {
	p, err := ParsePlan([]byte(x.Plan))
	if err != nil {
		return nil, corrupt("ceremony "+x.ID, err)
	}
	return p, nil
}

// challenge is what officers sign.
func (x Ceremony) challenge(store [16]byte, p *Plan) Challenge {
	c := Challenge{PlanDigest: p.Digest(), StoreID: store, Revision: x.Base, Expires: p.ExpireTime(), Nonce: x.Nonce, LogKey: x.LogKey}
	if _, offline := p.offlineNonce(); offline {
		c.StoreID, c.LogKey = [16]byte{}, [32]byte{}
	}
	return c
}

// stateAt is the state as it is at that time.
func (x Ceremony) stateAt(now time.Time, p *Plan) CeremonyState {
	if x.State == CeremonyProposed && !now.Before(p.ExpireTime()) {
		return CeremonyExpired
	}
	return x.State
}

// A CeremonyError is a refusal whose words are for the officers: beside the
// reason it says what stands against the plan or the approval.
type CeremonyError struct {
	Err  error // ErrCeremonyState, ErrApproval, ErrPlan or ErrQuorum
	Text string
}

func (e *CeremonyError) Error() string { return e.Text }
func (e *CeremonyError) Unwrap() error { return e.Err }

func refusePlan(err error, format string, args ...any) error {
	return &CeremonyError{err, fmt.Sprintf(format, args...)}
}

// A Rehearsal says what a plan would do now. Nothing has been done.
type Rehearsal struct {
	Kind    PlanKind
	Digest  [32]byte
	Needed  uint32   // approvals
	Changes []string // what would change, a sentence each
	// ContentKeys is how many content keys would be re-wrapped, Duration about
	// how long that takes.
	ContentKeys uint64
	Duration    time.Duration
}

// A CeremonyInfo is a ceremony as people see it.
type CeremonyInfo struct {
	Ceremony
	Kind      PlanKind
	Reason    string
	Digest    [32]byte
	Expires   time.Time
	StoreID   [16]byte
	ReadyTime time.Time          // of a recovery with its quorum: not executed before
	Progress  []CeremonyProgress // what is done in the background
}

// A CeremonyProgress is a piece of a ceremony's work, and how far it is.
type CeremonyProgress struct {
	Name        string // kek/movies/5; "content"; "outer wraps of category movies"
	Step        string
	Done, Total uint64
	Rate        float64 // a second; 0: not known
	Remaining   time.Duration
	LastError   string
}

// ceremonyProgress is how far the work of a ceremony is.
func (c *Custodian) ceremonyProgress(set *controlSet, x Ceremony, p *Plan) (out []CeremonyProgress) {
	for _, s := range c.progressOf(set, x, p) {
		out = append(out, CeremonyProgress{s.Name, s.Step.String(), s.Done, s.Total, s.Rate, s.Remaining, s.LastError})
	}
	switch {
	case p.Kind == KindProviders:
		for _, s := range c.rewrapStatuses(set) {
			if slices.Contains(p.Categories, s.Category) || s.HelperKeys && p.HelperKeys {
				out = append(out, CeremonyProgress{Name: "outer wraps of " + scope(s.Category), Step: "MOVE", Done: uint64(s.Done), Total: uint64(s.Total), LastError: s.LastError})
			}
		}
	case (p.Kind == KindRekey || p.Kind == KindWithdraw) && x.State >= CeremonyExecuted:
		s := RotationStatus{Name: about(x.ID)}
		c.rotations.describe(&s)
		raised, withdrawn := set.rekeyed(x.ID)
		done := CeremonyProgress{"content", strings.ToUpper(string(p.Kind)), s.Done, s.Total, s.Rate, s.Remaining, s.LastError}
		if s.Total == 0 {
			done.Done = max(raised, withdrawn)
			done.Total = done.Done
		}
		out = append(out, done)
	}
	return out
}

func (c *Custodian) describeCeremony(set *controlSet, x Ceremony) (CeremonyInfo, error) {
	p, err := x.plan()
	if err != nil {
		return CeremonyInfo{}, err
	}
	info := CeremonyInfo{Ceremony: x, Kind: p.Kind, Reason: p.Reason, Digest: p.Digest(), Expires: p.ExpireTime(), StoreID: set.head.StoreID}
	info.State, info.Progress = x.stateAt(c.now(), p), c.ceremonyProgress(set, x, p)
	if p.Kind == KindRecovery && !x.QuorumTime.IsZero() {
		info.ReadyTime = x.QuorumTime.Add(RecoveryDelay)
	}
	return info, nil
}

// about begins the detail of every audit entry about a ceremony.
func about(id string) string { return "ceremony " + id }

// ceremonyEntry makes the audit entry of an act of a ceremony.
func (c *Custodian) ceremonyEntry(who Caller, d Decision, a Action, requestID, id, detail string, err error) audit.Entry {
	e := c.entry(c.set.Load(), who, d, a, requestID, ref{}, err)
	if errors.Is(err, ErrApproval) || errors.Is(err, ErrQuorum) || errors.Is(err, ErrCeremonyState) || errors.Is(err, ErrPlan) {
		e.Outcome = audit.Denied
	}
	// An officer's attempt on a ceremony is never counted away. What anybody can
	// send as often as they like is.
	e.Priority = d.Allow && !errors.Is(err, ErrInvalid)
	e.Detail = about(id) + ": " + detail
	if err != nil {
		e.Detail = about(id) + ": refused: " + err.Error()
	}
	if len(e.Detail) > 2000 {
		e.Detail = strings.ToValidUTF8(e.Detail[:2000], "")
	}
	return e
}

// refuseCeremony writes to the audit log that an act was refused, or where it
// had begun that it failed, and returns err.
func (c *Custodian) refuseCeremony(ctx context.Context, who Caller, d Decision, a Action, requestID, id string, begun *attempt, err error) error {
	err = deadline(ctx, err)
	if _, aerr := c.record(ctx, c.fail(begun, c.ceremonyEntry(who, d, a, requestID, id, "", err))); aerr != nil {
		return errors.Join(aerr, err)
	}
	return err
}

// act makes a change of a ceremony. The audit log has it before it begins, too.
// build makes the change; it may run twice: what it refuses has not begun. The
// attempt is returned where it came to one.
func (c *Custodian) act(ctx context.Context, build func(old *controlSet, now time.Time) (change, error)) (*attempt, error) {
	would, err := build(c.set.Load(), c.now())
	if err != nil {
		return nil, err
	}
	begun, err := c.begin(ctx, would.entry)
	if err != nil {
		return nil, err
	}
	return begun, c.change(ctx, func(old *controlSet, now time.Time) (change, error) {
		ch, err := build(old, now)
		ch.entry = begun.end(ch.entry)
		return ch, err
	})
}

// ProposeCeremony checks a plan against what is there, and records it for the
// officers. With rehearse it records nothing.
func (c *Custodian) ProposeCeremony(ctx context.Context, who Caller, text []byte, requestID string, rehearse bool) (CeremonyInfo, Rehearsal, error) {
	d := c.decide(who, ActionPropose, Resource{})
	x, r, begun, err := c.propose(ctx, who, d, text, requestID, rehearse)
	if err != nil {
		return CeremonyInfo{}, r, c.refuseCeremony(ctx, who, d, ActionPropose, requestID, cmp.Or(x.ID, "new"), begun, err)
	}
	if rehearse {
		return CeremonyInfo{}, r, nil
	}
	info, err := c.describeCeremony(c.set.Load(), x)
	return info, r, err
}

func (c *Custodian) propose(ctx context.Context, who Caller, d Decision, text []byte, requestID string, rehearse bool) (Ceremony, Rehearsal, *attempt, error) {
	if !d.Allow {
		return Ceremony{}, Rehearsal{}, nil, d.Err
	}
	p, err := ParsePlan(text)
	if err != nil {
		return Ceremony{}, Rehearsal{}, nil, err
	}
	if err := c.lookAtClock(); err != nil {
		return Ceremony{}, Rehearsal{}, nil, err
	}
	set := c.set.Load()
	r, err := c.rehearse(ctx, set, p)
	if err != nil || rehearse {
		return Ceremony{}, r, nil, err
	}
	x := Ceremony{Plan: string(p.Canonical()), State: CeremonyProposed, Proposer: who.ID, ProposeTime: c.now(), FirstEntry: c.audit.Size(),
		Basis: set.basis(p), Needed: r.Needed, Revision: 1}
	if err := c.hsm.Random(ctx, x.Nonce[:]); err != nil {
		return x, r, nil, err
	}
	x.ID = hex.EncodeToString(x.Nonce[:8])
	begun, err := c.act(ctx, func(old *controlSet, now time.Time) (change, error) {
		if _, twice := old.ceremonies[x.ID]; twice {
			return change{}, fmt.Errorf("ceremony %s: the token has drawn this nonce before: %w", x.ID, ErrHSMUnavailable)
		}
		if n := old.openCeremonies(now); n >= maxOpenCeremonies {
			return change{}, refusePlan(ErrPlan, "%d ceremonies wait for officers: cancel some, or let them expire", n)
		}
		if old.basis(p) != x.Basis {
			return change{}, refusePlan(ErrPlan, "what the plan names changed while it was proposed; propose it again")
		}
		signer, err := old.auditSigner()
		if err != nil {
			return change{}, err
		}
		x.Base, x.LogKey = old.head.Revision, sha256.Sum256(signer.PublicKey)
		digest := p.Digest()
		e := c.ceremonyEntry(who, d, ActionPropose, requestID, x.ID, fmt.Sprintf("%s, plan %x, expires %s, needs %d approvals", p.Kind, digest, p.Expires, x.Needed), nil)
		return change{put: []ControlRecord{ceremonyRecord(x)}, entry: e}, nil
	})
	return x, r, begun, err
}

// rehearse runs every check of a plan and says what it would change.
func (c *Custodian) rehearse(ctx context.Context, set *controlSet, p *Plan) (Rehearsal, error) {
	_, needed := set.authority.voters(p.Kind)
	r := Rehearsal{Kind: p.Kind, Digest: p.Digest(), Needed: needed}
	now := c.now()
	switch end := p.ExpireTime(); {
	case !end.After(now):
		return r, refusePlan(ErrPlan, "the plan expired %s, and it is %s", p.Expires, now.Format(time.RFC3339))
	case end.After(now.Add(MaxPlanLife)):
		return r, refusePlan(ErrPlan, "the plan expires %s: it may live %d days at most", p.Expires, MaxPlanLife/(24*time.Hour))
	case p.Kind == KindRecovery && end.Before(now.Add(RecoveryDelay+time.Hour)):
		return r, refusePlan(ErrPlan, "the plan expires %s: a recovery waits %s for the officers, so it must live longer", p.Expires, RecoveryDelay)
	}
	return r, kinds[p.Kind].check(ctx, c, set, p, &r)
}

// openCeremonies counts those that wait for officers.
func (s *controlSet) openCeremonies(now time.Time) int {
	n := 0
	for _, x := range s.ceremonies {
		if p, err := x.plan(); err == nil && x.stateAt(now, p) == CeremonyProposed {
			n++
		}
	}
	return n
}

// An ApproveRequest is a signature on its way. It repeats what was signed, so
// that a refusal can say what does not fit.
type ApproveRequest struct {
	RequestID string
	ID        string // of the ceremony
	Key       string // the officer's public key, as Officer.Key
	Challenge Challenge
	Signature []byte
}

// Check says what is wrong with the request, or nil.
func (r ApproveRequest) Check() error {
	if err := checkText(r.RequestID, MaxRequestIDSize); err != nil {
		return invalid("request_id", err)
	}
	if err := checkCeremonyID(r.ID); err != nil {
		return err
	}
	if len(r.Signature) == 0 || len(r.Signature) > 256 {
		return invalid("signature", fmt.Errorf("%d bytes: must be 1 to 256", len(r.Signature)))
	}
	if len(r.Key) > 1024 {
		return invalid("key", fmt.Errorf("%d bytes: must be at most 1024", len(r.Key)))
	}
	return nil
}

func checkCeremonyID(id string) error {
	if b, err := hex.DecodeString(id); err != nil || len(b) != 8 || strings.ToLower(id) != id {
		return invalid("id", fmt.Errorf("%.40q: must be 16 digits, 0-9 a-f", id))
	}
	return nil
}

// ApproveCeremony adds an officer's approval to a ceremony.
func (c *Custodian) ApproveCeremony(ctx context.Context, who Caller, req ApproveRequest) (CeremonyInfo, error) {
	return c.signed(ctx, who, ActionApprove, req, func(set *controlSet, x *Ceremony, p *Plan, now time.Time) (string, error) {
		voters, _ := set.authority.voters(p.Kind)
		by, err := c.approval(set, *x, p, ActApprove, voters, req, now)
		if err != nil {
			return "", err
		}
		if has(x.Approvals, by.Key) {
			return "", refusePlan(ErrApproval, "%s has approved already, and counts once", by.Officer)
		}
		x.Approvals = append(x.Approvals, by)
		if uint32(len(x.Approvals)) == x.Needed {
			x.QuorumTime = now
		}
		return fmt.Sprintf("approved by %s, %d of %d", by.Officer, len(x.Approvals), x.Needed), nil
	})
}

// CancelCeremony adds an officer's wish to cancel. A ceremony is cancelled by
// as many officers as it needs to be executed; a recovery by any one of them.
func (c *Custodian) CancelCeremony(ctx context.Context, who Caller, req ApproveRequest) (CeremonyInfo, error) {
	return c.signed(ctx, who, ActionCancel, req, func(set *controlSet, x *Ceremony, p *Plan, now time.Time) (string, error) {
		voters, needed := set.authority.voters(p.Kind)
		if p.Kind == KindRecovery {
			voters, needed = set.authority.Officers, 1
		}
		by, err := c.approval(set, *x, p, ActCancel, voters, req, now)
		if err != nil {
			return "", err
		}
		if has(x.Cancels, by.Key) {
			return "", refusePlan(ErrApproval, "%s wants to cancel it already, and counts once", by.Officer)
		}
		x.Cancels = append(x.Cancels, by)
		if uint32(len(x.Cancels)) < needed {
			return fmt.Sprintf("%s wants to cancel it, %d of %d", by.Officer, len(x.Cancels), needed), nil
		}
		x.State, x.EndTime = CeremonyCancelled, now
		return fmt.Sprintf("cancelled, the last one was %s", by.Officer), nil
	})
}

// signed makes one change of a ceremony that an officer has signed.
func (c *Custodian) signed(ctx context.Context, who Caller, a Action, req ApproveRequest, apply func(*controlSet, *Ceremony, *Plan, time.Time) (string, error)) (CeremonyInfo, error) {
	if err := req.Check(); err != nil {
		return CeremonyInfo{}, err
	}
	d := c.decide(who, a, Resource{})
	err := d.Err
	if d.Allow {
		err = c.lookAtClock()
	}
	var x Ceremony
	var begun *attempt
	if err == nil {
		begun, err = c.act(ctx, func(old *controlSet, now time.Time) (change, error) {
			var p *Plan
			var err error
			if x, p, err = old.openCeremony(req.ID, now); err != nil {
				return change{}, err
			}
			x.Approvals, x.Cancels = slices.Clone(x.Approvals), slices.Clone(x.Cancels)
			detail, err := apply(old, &x, p, now)
			if err != nil {
				return change{}, err
			}
			x.Revision++
			return change{put: []ControlRecord{ceremonyRecord(x)}, entry: c.ceremonyEntry(who, d, a, req.RequestID, x.ID, detail, nil)}, nil
		})
	}
	if err != nil {
		return CeremonyInfo{}, c.refuseCeremony(ctx, who, d, a, req.RequestID, req.ID, begun, err)
	}
	return c.describeCeremony(c.set.Load(), x)
}

// openCeremony is a ceremony that still waits for officers.
func (s *controlSet) openCeremony(id string, now time.Time) (Ceremony, *Plan, error) {
	x, ok := s.ceremonies[id]
	if !ok {
		return x, nil, ErrCeremonyNotFound
	}
	p, err := x.plan()
	if err != nil {
		return x, nil, err
	}
	if st := x.stateAt(now, p); st != CeremonyProposed {
		return x, nil, refusePlan(ErrCeremonyState, "the ceremony is %s", strings.ToLower(st.String()))
	}
	return x, p, nil
}

// approval checks a signature: it must be of one of the voters, on this plan,
// of this ceremony of this store.
func (c *Custodian) approval(set *controlSet, x Ceremony, p *Plan, a Act, voters []Officer, req ApproveRequest, now time.Time) (Approval, error) {
	want, got := x.challenge(set.head.StoreID, p), req.Challenge
	switch {
	case got.PlanDigest != want.PlanDigest:
		return Approval{}, refusePlan(ErrApproval, "the approval is of the plan %x, and this ceremony's plan is %x", got.PlanDigest, want.PlanDigest)
	case got.StoreID != want.StoreID:
		return Approval{}, refusePlan(ErrApproval, "the approval is for the store %x, and this is %x", got.StoreID, want.StoreID)
	case got.Revision != want.Revision:
		return Approval{}, refusePlan(ErrApproval, "the approval is for control revision %d, and the plan was proposed at %d", got.Revision, want.Revision)
	case got.Nonce != want.Nonce:
		return Approval{}, refusePlan(ErrApproval, "the approval is of another ceremony")
	case got.LogKey != want.LogKey:
		return Approval{}, refusePlan(ErrApproval, "the approval names another key of the audit log")
	case !got.Expires.Equal(want.Expires):
		return Approval{}, refusePlan(ErrApproval, "the approval expires %s, and the plan %s", got.Expires.UTC().Format(time.RFC3339), p.Expires)
	}
	i := slices.IndexFunc(voters, func(o Officer) bool { return o.Key == req.Key })
	if i < 0 {
		return Approval{}, refusePlan(ErrApproval, "the key is not that of anybody who may sign this")
	}
	if !want.verify(a, voters[i], req.Signature) {
		return Approval{}, refusePlan(ErrApproval, "the signature is not one of %s on this %s", voters[i].Name, a)
	}
	return Approval{Officer: voters[i].Name, Key: voters[i].Key, Time: now, Signature: req.Signature}, nil
}

func has(all []Approval, key string) bool {
	return slices.ContainsFunc(all, func(a Approval) bool { return a.Key == key })
}

// ExecuteCeremony does what a plan says, once. It needs the approvals, no
// matter who calls: any officer may.
func (c *Custodian) ExecuteCeremony(ctx context.Context, who Caller, id, requestID string) (CeremonyInfo, error) {
	if err := errors.Join(checkCeremonyID(id), checkText(requestID, MaxRequestIDSize)); err != nil {
		return CeremonyInfo{}, err
	}
	d := c.decide(who, ActionExecute, Resource{})
	err := d.Err
	if d.Allow {
		err = c.lookAtClock()
	}
	var begun *attempt
	if err == nil {
		begun, err = c.execute(ctx, who, d, id, requestID)
	}
	if err != nil {
		return CeremonyInfo{}, c.refuseCeremony(ctx, who, d, ActionExecute, requestID, id, begun, err)
	}
	// What has taken effect is not taken back: if its end cannot be proved and
	// written down now, Tick does it later.
	if err := c.finishCeremonies(ctx); err != nil {
		c.log.Error("a ceremony has taken effect, and its end is not written down yet", "ceremony", id, "err", err)
	}
	set := c.set.Load()
	return c.describeCeremony(set, set.ceremonies[id])
}

func (c *Custodian) execute(ctx context.Context, who Caller, d Decision, id, requestID string) (*attempt, error) {
	set := c.set.Load()
	x, p, err := set.openCeremony(id, c.now())
	if err != nil {
		return nil, err
	}
	if err := x.ready(set, p, c.now()); err != nil {
		return nil, err
	}
	r := Rehearsal{}
	if err := kinds[p.Kind].check(ctx, c, set, p, &r); err != nil {
		return nil, err
	}
	before, err := c.snapshot(ctx, set, x, p)
	if err != nil {
		return nil, err
	}
	begun, err := c.act(ctx, func(old *controlSet, now time.Time) (change, error) {
		if x, p, err = old.openCeremony(id, now); err != nil {
			return change{}, err
		}
		if err := x.ready(old, p, now); err != nil {
			return change{}, err
		}
		var ch change
		if apply := kinds[p.Kind].apply; apply != nil {
			if ch, err = apply(c, old, p, now); err != nil {
				return change{}, err
			}
		}
		x.State, x.Executor, x.ExecTime, x.Before, x.Revision = CeremonyExecuted, who.ID, now, before, x.Revision+1
		ch.put = append(ch.put, ceremonyRecord(x))
		ch.entry = c.ceremonyEntry(who, d, ActionExecute, requestID, id, string(p.Kind)+" takes effect: "+strings.Join(r.Changes, "; "), nil)
		return ch, nil
	})
	if err == nil && kinds[p.Kind].applied != nil {
		kinds[p.Kind].applied(c)
	}
	return begun, err
}

// ready says why a ceremony cannot be executed, or nil.
func (x Ceremony) ready(set *controlSet, p *Plan, now time.Time) error {
	voters, needed := set.authority.voters(p.Kind)
	valid := uint32(0)
	for _, a := range x.Approvals { // each was checked when it came, and is again
		if o := (Officer{a.Officer, a.Key}); slices.Contains(voters, o) && x.challenge(set.head.StoreID, p).verify(ActApprove, o, a.Signature) {
			valid++
		}
	}
	switch {
	case set.basis(p) != x.Basis:
		return refusePlan(ErrCeremonyState, "what the plan names, or who the officers are, has changed since it was proposed; propose it again")
	case valid < needed || needed != x.Needed:
		return refusePlan(ErrQuorum, "%d of %d approvals are there", valid, needed)
	case p.Kind == KindRecovery && now.Before(x.QuorumTime.Add(RecoveryDelay)):
		return refusePlan(ErrCeremonyState, "the officers can stop this recovery until %s", x.QuorumTime.Add(RecoveryDelay).UTC().Format(time.RFC3339))
	}
	return nil
}

// finishCeremonies does what executed ceremonies have left to do, proves it,
// and writes their end down. It is the same function on a good day and after a
// crash.
func (c *Custodian) finishCeremonies(ctx context.Context) error {
	c.finishing.Lock()
	defer c.finishing.Unlock()
	var executed []Ceremony
	for _, x := range c.set.Load().ceremonies {
		if x.State == CeremonyExecuted {
			executed = append(executed, x)
		}
	}
	slices.SortFunc(executed, func(a, b Ceremony) int { return a.ExecTime.Compare(b.ExecTime) })
	var errs []error
	for _, x := range executed {
		if err := c.finishCeremony(ctx, x.ID); err != nil {
			errs = append(errs, fmt.Errorf("ceremony %s: %w", x.ID, err))
		}
	}
	return errors.Join(errs...)
}

func (c *Custodian) finishCeremony(ctx context.Context, id string) error {
	set := c.set.Load()
	x := set.ceremonies[id]
	p, err := x.plan()
	if err != nil {
		return err
	}
	if work := kinds[p.Kind].work; work != nil {
		over, err := work(ctx, c, x, p)
		if err != nil && final(err) {
			return errors.Join(err, c.failCeremony(ctx, id, err))
		}
		if err != nil || !over {
			return err
		}
		set = c.set.Load()
	}
	after, err := c.snapshot(ctx, set, x, p)
	if err != nil {
		return err
	}
	return c.change(ctx, func(old *controlSet, now time.Time) (change, error) {
		x := old.ceremonies[id]
		if x.State != CeremonyExecuted {
			return change{}, errNoChange
		}
		x.State, x.After, x.EndTime, x.Revision = CeremonyDone, after, now, x.Revision+1
		e, err := statement(x, old.head.StoreID, p)
		if err != nil {
			return change{}, err
		}
		done, err := e.doneDetail()
		if err != nil {
			return change{}, err
		}
		return change{put: []ControlRecord{ceremonyRecord(x)}, entry: audit.Entry{Action: actionCeremonyDone, Caller: x.Executor, Detail: done}}, nil
	})
}

// failCeremony ends a ceremony that was executed and cannot be done.
func (c *Custodian) failCeremony(ctx context.Context, id string, why error) error {
	return c.change(ctx, func(old *controlSet, now time.Time) (change, error) {
		x := old.ceremonies[id]
		if x.State != CeremonyExecuted {
			return change{}, errNoChange
		}
		x.State, x.EndTime, x.Revision = CeremonyFailed, now, x.Revision+1
		e := audit.Entry{Action: "ceremony.failed", Outcome: audit.Failed, Reason: string(ReasonOf(why)), Caller: x.Executor, Priority: true,
			Detail: strings.ToValidUTF8(fmt.Sprintf("%s: %.1500s", about(id), why), "")}
		return change{put: []ControlRecord{ceremonyRecord(x)}, entry: e}, nil
	})
}

// Ceremonies lists all ceremonies, the newest first.
func (c *Custodian) Ceremonies(ctx context.Context, who Caller) ([]CeremonyInfo, error) {
	if d := c.decide(who, ActionReadCeremonies, Resource{}); !d.Allow {
		return nil, c.refuse(ctx, who, d, ActionReadCeremonies, ref{})
	}
	set := c.set.Load()
	var out []CeremonyInfo
	for _, x := range set.ceremonies {
		info, err := c.describeCeremony(set, x)
		if err != nil {
			return nil, err
		}
		out = append(out, info)
	}
	slices.SortFunc(out, func(a, b CeremonyInfo) int {
		if n := b.ProposeTime.Compare(a.ProposeTime); n != 0 {
			return n
		}
		return strings.Compare(a.ID, b.ID)
	})
	return out, nil
}

// Ceremony returns one ceremony.
func (c *Custodian) Ceremony(ctx context.Context, who Caller, id string) (CeremonyInfo, error) {
	if err := checkCeremonyID(id); err != nil {
		return CeremonyInfo{}, err
	}
	if d := c.decide(who, ActionReadCeremonies, Resource{}); !d.Allow {
		return CeremonyInfo{}, c.refuse(ctx, who, d, ActionReadCeremonies, ref{})
	}
	set := c.set.Load()
	x, ok := set.ceremonies[id]
	if !ok {
		return CeremonyInfo{}, ErrCeremonyNotFound
	}
	return c.describeCeremony(set, x)
}
