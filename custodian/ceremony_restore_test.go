package custodian_test

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/audit"
)

// restoreOrder is a plan about a backup with these bytes, and who has signed it.
func (a *assembly) restoreOrder(backup string, by ...signatory) *custodian.RestoreOrder {
	a.t.Helper()
	sum := sha256.Sum256([]byte(backup))
	p := a.parse(a.plan("restore", fmt.Sprintf("backup: {sha256: %s, nonce: %s}", hex.EncodeToString(sum[:]), strings.Repeat("cd", 32))))
	ch, err := p.OfflineChallenge()
	if err != nil {
		a.t.Fatal(err)
	}
	o := &custodian.RestoreOrder{Plan: p, SHA256: sum}
	for _, s := range by {
		o.Approvals = append(o.Approvals, custodian.Approval{Key: s.Key, Signature: sign(a.t, s, ch, custodian.ActApprove)})
	}
	return o
}

// Where there are officers, a backup takes a store's place by their plan, once.
func TestRestoreCeremony(t *testing.T) {
	a := populated(t)
	putBack := a.saveStore()
	a.reopen()
	a.issue("movies", "later", "SD")
	restore := func(o *custodian.RestoreOrder) (custodian.RestoreReport, error) {
		t.Helper()
		putBack()
		if err := a.tryParts(); err != nil {
			t.Fatal(err)
		}
		a.cfg.RestoreOrder = o
		return custodian.Restore(t.Context(), a.cfg)
	}
	good := func() *custodian.RestoreOrder { return a.restoreOrder("the backup", a.anna, a.cleo) }
	other := good()
	other.SHA256[0] ^= 1
	forged := good()
	forged.Approvals[1].Signature = forged.Approvals[0].Signature
	usedNonce := good()
	usedNonce.Plan.Backup.Nonce = strings.Repeat("ab", 32) // of the genesis
	wrongKind := good()
	wrongKind.Plan = a.parse(a.plan("seal", ""))
	for name, test := range map[string]struct {
		order *custodian.RestoreOrder
		want  error
	}{
		"without a plan":         {nil, custodian.ErrQuorum},
		"one approval":           {a.restoreOrder("the backup", a.anna), custodian.ErrQuorum},
		"one officer twice":      {a.restoreOrder("the backup", a.anna, a.anna), custodian.ErrApproval},
		"a recovery key":         {a.restoreOrder("the backup", a.anna, a.rita), custodian.ErrApproval},
		"a stranger":             {a.restoreOrder("the backup", a.anna, newSignatory(t, "ben", false)), custodian.ErrApproval},
		"a nonce that is used":   {usedNonce, custodian.ErrPlan},
		"a forged signature":     {forged, custodian.ErrApproval},
		"another backup":         {other, custodian.ErrPlan},
		"a plan of another kind": {wrongKind, custodian.ErrPlan},
	} {
		_, err := restore(test.order)
		wantErr(t, name, err, test.want)
		all := a.entries(0)
		if e := all[len(all)-1]; e.Action != "custody.restore" || e.Outcome != audit.Denied || e.Reason != string(custodian.ReasonOf(test.want)) {
			t.Errorf("%s: the audit log has %s %s %s", name, e.Action, e.Outcome, e.Reason)
		}
	}
	expired := good()
	a.clock.Add(int64(25 * time.Hour))
	_, err := restore(expired)
	wantErr(t, "an expired plan", err, custodian.ErrCeremonyState)

	order := good()
	rep, err := restore(order)
	if err != nil || len(rep.MissingKIDs) != 1 {
		t.Fatalf("restore: got %+v and %v, want one missing key", rep, err)
	}
	a.cfg.RestoreOrder = nil
	a.reopen()
	if err := a.c.Tick(t.Context()); err != nil {
		t.Fatal(err)
	}
	all, err := a.c.Ceremonies(t.Context(), officer)
	if err != nil || all[0].Kind != custodian.KindRestore || all[0].State != custodian.CeremonyDone {
		t.Fatalf("ceremonies: got %+v and %v, want the restore done", all, err)
	}
	trust := a.trust()
	if _, err := custodian.VerifyEvidence(a.evidence(all[0].ID), trust); err == nil {
		t.Error("evidence of a restore verifies without the key of the audit log")
	}
	_, key, err := a.c.AuditCheckpoint(t.Context(), auditor)
	if err != nil {
		t.Fatal(err)
	}
	if trust.AuditKey, err = x509.ParsePKIXPublicKey(key.PublicKey); err != nil {
		t.Fatal(err)
	}
	if e, err := custodian.VerifyEvidence(a.evidence(all[0].ID), trust); err != nil || len(e.Approvals) != 2 {
		t.Errorf("evidence: got %d approvals and %v, want 2", len(e.Approvals), err)
	}
	_, _, err = a.c.ProposeCeremony(t.Context(), officer, []byte(a.plan("restore", "backup: {sha256: "+strings.Repeat("ab", 32)+", nonce: "+strings.Repeat("ab", 32)+"}")), "", false)
	wantErr(t, "propose a restore to the daemon", err, custodian.ErrPlan)

	// The same plan rolls nothing back a second time.
	_, err = restore(order)
	wantErr(t, "the same plan again", err, custodian.ErrCeremonyState)
}
