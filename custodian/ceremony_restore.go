package custodian

import (
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

// A BackupPlan names the backup that is restored, and makes the approvals those
// of no other restore.
type BackupPlan struct {
	SHA256 string `yaml:"sha256" json:"sha256"` // of the backup file, encrypted as it is
	Nonce  string `yaml:"nonce" json:"nonce"`   // 64 random hexadecimal digits
}

func (b *BackupPlan) check() (faults []error) {
	for _, f := range []struct{ name, text string }{{"sha256", b.SHA256}, {"nonce", b.Nonce}} {
		if raw, err := hex.DecodeString(f.text); err != nil || len(raw) != 32 || strings.ToLower(f.text) != f.text {
			faults = append(faults, fmt.Errorf("backup.%s: must be 64 digits, 0-9 a-f", f.name))
		}
	}
	return faults
}

// offlineNonce is the nonce of a plan that officers sign without a daemon: of a
// genesis or a restore. Other plans have none.
func (p *Plan) offlineNonce() (string, bool) {
	switch {
	case p.Kind == KindGenesis && p.Genesis != nil:
		return p.Genesis.Nonce, true
	case p.Kind == KindRestore && p.Backup != nil:
		return p.Backup.Nonce, true
	}
	return "", false
}

// A RestoreOrder is the plan of a restore, and what officers have signed.
type RestoreOrder struct {
	Plan      *Plan
	Approvals []Approval
	SHA256    [32]byte // of the backup file that is being restored
}

// approvedRestore says whether the officers of the backup want it to be
// restored: nil, or what stands against it. A plan is good for one restore.
func (s *controlSet) approvedRestore(o *RestoreOrder, l Logged, now time.Time) error {
	switch {
	case s.authority == nil && o == nil:
		return nil
	case s.authority == nil:
		return refusePlan(ErrPlan, "the backup is of a custody without officers: leave the plan out")
	case o == nil:
		return refusePlan(ErrQuorum, "the officers of the backup decide about its restore: give a plan of kind %s and their approvals", KindRestore)
	case o.Plan.Kind != KindRestore:
		return refusePlan(ErrPlan, "the plan is of kind %s, and this is a %s", o.Plan.Kind, KindRestore)
	case o.Plan.Backup.SHA256 != hex.EncodeToString(o.SHA256[:]):
		return refusePlan(ErrPlan, "the plan is about the backup %s, and this is %x", o.Plan.Backup.SHA256, o.SHA256)
	case !now.Before(o.Plan.ExpireTime()):
		return refusePlan(ErrCeremonyState, "the plan expired %s, and it is %s", o.Plan.Expires, now.UTC().Format(time.RFC3339))
	}
	if _, twice := s.ceremonies[o.Plan.Backup.Nonce[:16]]; twice {
		return refusePlan(ErrPlan, "the nonce of the plan is that of another ceremony: draw a new one")
	}
	for _, ch := range l.Changes { // not before the first start is the restore done: until then it can be run again
		if ch.Action == actionCeremonyDone && strings.HasPrefix(ch.Detail, about(o.Plan.Backup.Nonce[:16])+":") {
			return refusePlan(ErrCeremonyState, "this plan was carried out at %s: a plan is good for one restore", ch.Time.UTC().Format(time.RFC3339))
		}
	}
	challenge, err := o.Plan.OfflineChallenge()
	if err != nil {
		return err
	}
	voters, needed := s.authority.voters(KindRestore)
	for i, a := range o.Approvals {
		n := slices.IndexFunc(voters, func(v Officer) bool { return v.Key == a.Key })
		switch {
		case n < 0 || !challenge.verify(ActApprove, voters[n], a.Signature):
			return refusePlan(ErrApproval, "approval %d is not that of an officer of the backup on this plan", i+1)
		case has(o.Approvals[:i], a.Key):
			return refusePlan(ErrApproval, "%s has approved twice, and counts once", voters[n].Name)
		}
	}
	if n := uint32(len(o.Approvals)); n < needed {
		return refusePlan(ErrQuorum, "%d of %d approvals are there", n, needed)
	}
	return nil
}

// text is what the audit log has of the plan.
func (o *RestoreOrder) text() string {
	if o == nil {
		return "without a plan"
	}
	return fmt.Sprintf("by the plan %x", o.Plan.Digest())
}

// ceremony is the record of the restore, whose end the next start proves and
// writes down. The order is approved.
func (o *RestoreOrder) ceremony(s *controlSet, first uint64, now time.Time) (Ceremony, error) {
	signer, err := s.auditSigner()
	if err != nil {
		return Ceremony{}, err
	}
	challenge, err := o.Plan.OfflineChallenge()
	if err != nil {
		return Ceremony{}, err
	}
	voters, needed := s.authority.voters(KindRestore)
	x := Ceremony{Plan: string(o.Plan.Canonical()), State: CeremonyExecuted, Nonce: challenge.Nonce, LogKey: sha256.Sum256(signer.PublicKey), Proposer: "custodiand restore",
		ProposeTime: now, FirstEntry: first, Needed: needed, Executor: "custodiand restore", QuorumTime: now, ExecTime: now, Before: []byte("null"), Revision: 1}
	x.ID = hex.EncodeToString(x.Nonce[:8])
	for _, v := range voters { // in the order of the authority, whatever the files' was
		if i := slices.IndexFunc(o.Approvals, func(a Approval) bool { return a.Key == v.Key }); i >= 0 {
			x.Approvals = append(x.Approvals, Approval{Officer: v.Name, Key: v.Key, Time: now, Signature: o.Approvals[i].Signature})
		}
	}
	return x, nil
}

// refuseRestore writes a restore that is refused to the audit log.
func (c *Custodian) refuseRestore(ctx context.Context, e audit.Entry, why error) error {
	e.Outcome, e.Reason, e.Detail, e.Priority = audit.Denied, string(ReasonOf(why)), why.Error(), true
	_, err := c.record(ctx, e)
	return errors.Join(why, err)
}
