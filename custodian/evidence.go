package custodian

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/keycustody/custodian/internal/audit"
	"github.com/keycustody/custodian/internal/checkpoint"
)

// ErrEvidence means that an evidence bundle does not show what it should.
var ErrEvidence = errors.New("the evidence does not verify")

const (
	evidenceFormat     = "custodian-evidence/1"
	actionCeremonyDone = "ceremony.done"
)

// Evidence is what a ceremony leaves behind, in one file that can be checked
// anywhere: officers sign the plan, and the key of the audit log; that key
// signs a checkpoint; the checkpoint covers the entries; and the last entry
// has the digest of everything else in the file.
type Evidence struct {
	Format      string       `json:"format"`
	ID          string       `json:"ceremony"`
	StoreID     string       `json:"store_id"`
	PlanDigest  string       `json:"plan_digest"`
	Plan        Plan         `json:"plan"`
	Revision    uint64       `json:"control_revision"` // at which it was proposed
	Nonce       string       `json:"nonce"`
	LogKey      string       `json:"log_key_sha256"`
	Proposer    string       `json:"proposer"`
	ProposeTime time.Time    `json:"propose_time"`
	Needed      uint32       `json:"approvals_needed"`
	Approvals   []Approval   `json:"approvals"`
	Executor    string       `json:"executor"`
	ExecTime    time.Time    `json:"execute_time"`
	EndTime     time.Time    `json:"end_time"`
	Before      *Snapshot    `json:"before"` // nil for a genesis: there was nothing
	After       *Snapshot    `json:"after"`
	Log         *EvidenceLog `json:"audit_log,omitempty"`
}

// An EvidenceLog is the part of the audit log that is about the ceremony.
type EvidenceLog struct {
	Key        string          `json:"key"` // base64 of the DER SubjectPublicKeyInfo
	Checkpoint string          `json:"checkpoint"`
	Entries    []EvidenceEntry `json:"entries"`
}

// An EvidenceEntry is an entry in its canonical encoding, with its inclusion
// proof (RFC 6962).
type EvidenceEntry struct {
	Entry  []byte   `json:"entry"`
	Hashes [][]byte `json:"hashes"`
}

// statement is the evidence without the log.
func statement(x Ceremony, store [16]byte, p *Plan) (Evidence, error) {
	digest := p.Digest()
	e := Evidence{Format: evidenceFormat, ID: x.ID, StoreID: hex.EncodeToString(store[:]), PlanDigest: hex.EncodeToString(digest[:]), Plan: *p,
		Revision: x.Base, Nonce: hex.EncodeToString(x.Nonce[:]), LogKey: hex.EncodeToString(x.LogKey[:]), Proposer: x.Proposer, ProposeTime: x.ProposeTime,
		Needed: x.Needed, Approvals: x.Approvals, Executor: x.Executor, ExecTime: x.ExecTime, EndTime: x.EndTime}
	for _, s := range []struct {
		from []byte
		to   **Snapshot
	}{{x.Before, &e.Before}, {x.After, &e.After}} {
		if len(s.from) == 0 {
			continue
		}
		if err := json.Unmarshal(s.from, s.to); err != nil {
			return e, corrupt("ceremony "+x.ID, err)
		}
	}
	return e, nil
}

// digest is what the last entry of the ceremony has of the statement.
func (e Evidence) digest() ([32]byte, error) {
	e.Log = nil
	b, err := json.Marshal(e)
	return sha256.Sum256(append([]byte("custodian ceremony statement 1\x00"), b...)), err
}

// doneDetail is what the last entry of a ceremony says.
func (e Evidence) doneDetail() (string, error) {
	sum, err := e.digest()
	return fmt.Sprintf("%s: done, %s, plan %s, statement %x", about(e.ID), e.Plan.Kind, e.PlanDigest, sum), err
}

// encode writes the one form that an evidence has.
func (e Evidence) encode() ([]byte, error) {
	b, err := json.MarshalIndent(e, "", "  ")
	return append(b, '\n'), err
}

// Evidence makes the evidence of a ceremony that is done. Made again, it is
// the same.
func (c *Custodian) Evidence(ctx context.Context, who Caller, id string) ([]byte, error) {
	info, err := c.Ceremony(ctx, who, id)
	if err != nil {
		return nil, err
	}
	if info.State != CeremonyDone {
		return nil, refusePlan(ErrCeremonyState, "the ceremony is %s; there is evidence of it when it is done", strings.ToLower(info.State.String()))
	}
	p, err := info.plan()
	if err != nil {
		return nil, err
	}
	e, err := statement(info.Ceremony, info.StoreID, p)
	if err != nil {
		return nil, err
	}
	done, err := e.doneDetail()
	if err != nil {
		return nil, err
	}
	var indexes []uint64
	ended := errors.New("all entries are there")
	err = audit.Read(c.audit.Dir(), info.FirstEntry, func(a *audit.Entry) error {
		if a.Outcome != audit.Begun && strings.HasPrefix(a.Detail, about(id)+":") { // of an act, its end is enough
			indexes = append(indexes, a.Index)
		}
		if a.Action == actionCeremonyDone && strings.HasPrefix(a.Detail, done) {
			return ended
		}
		return ctx.Err()
	})
	if err == nil {
		return nil, corrupt("ceremony "+id, errors.New("its end is not in the audit log"))
	}
	if !errors.Is(err, ended) {
		return nil, auditError("id", err)
	}
	proofs, err := audit.ProveEntries(ctx, c.audit.Dir(), indexes)
	if err != nil {
		return nil, err
	}
	for _, g := range c.set.Load().signers {
		if sha256.Sum256(g.PublicKey) == info.LogKey {
			e.Log = &EvidenceLog{Key: base64.StdEncoding.EncodeToString(g.PublicKey), Checkpoint: string(proofs[0].Checkpoint)}
		}
	}
	if e.Log == nil {
		return nil, corrupt("ceremony "+id, errors.New("the key of the audit log that it names is not recorded"))
	}
	for _, proof := range proofs {
		b, err := proof.Entry.MarshalBinary()
		if err != nil {
			return nil, err
		}
		entry := EvidenceEntry{Entry: b, Hashes: [][]byte{}}
		for _, h := range proof.Hashes {
			entry.Hashes = append(entry.Hashes, h[:])
		}
		e.Log.Entries = append(e.Log.Entries, entry)
	}
	return e.encode()
}

// Trust is what evidence is held against.
type Trust struct {
	Officers []crypto.PublicKey
	// AuditKey is the public key of the audit log. Nil: the one that the
	// approvals vouch for. A genesis was before it, and needs it here.
	AuditKey crypto.PublicKey
}

// VerifyEvidence checks an evidence bundle, without a daemon. The error wraps
// ErrEvidence.
func VerifyEvidence(text []byte, t Trust) (Evidence, error) {
	e, err := parseEvidence(text)
	if err == nil {
		err = e.verifyApprovals(t)
	}
	if err == nil {
		err = e.verifyLog(t)
	}
	if err != nil {
		return Evidence{}, fmt.Errorf("%w: %w", err, ErrEvidence)
	}
	return e, nil
}

func parseEvidence(text []byte) (Evidence, error) {
	var e Evidence
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(&e); err != nil {
		return e, fmt.Errorf("not an evidence bundle: %w", err)
	}
	again, err := e.encode()
	if err != nil {
		return e, err
	}
	// One form only: what is not looked at below cannot be changed either.
	if e.Format != evidenceFormat || e.Log == nil || e.After == nil || !bytes.Equal(again, text) {
		return e, fmt.Errorf("not an evidence bundle as %s has it, byte by byte", evidenceFormat)
	}
	return e, nil
}

func (e Evidence) verifyApprovals(t Trust) error {
	p, err := ParsePlan(e.Plan.Canonical())
	if err != nil {
		return err
	}
	digest := p.Digest()
	if hex.EncodeToString(digest[:]) != e.PlanDigest {
		return fmt.Errorf("the plan's digest is %x, not %s", digest, e.PlanDigest)
	}
	x := Ceremony{ID: e.ID, Base: e.Revision}
	var store [16]byte
	for _, f := range []struct {
		text string
		to   []byte
	}{{e.Nonce, x.Nonce[:]}, {e.LogKey, x.LogKey[:]}, {e.StoreID, store[:]}} {
		b, err := hex.DecodeString(f.text)
		if err != nil || len(b) != len(f.to) {
			return fmt.Errorf("%.80q: not %d bytes in hexadecimal", f.text, len(f.to))
		}
		copy(f.to, b)
	}
	if nonce, offline := p.offlineNonce(); offline && e.Nonce != nonce {
		return errors.New("the nonce is not that of the plan")
	}
	if e.Needed < 2 {
		return fmt.Errorf("%d approvals were needed: this custody has no officers, so nobody vouches for what it says", e.Needed)
	}
	var trusted []string
	for _, k := range t.Officers {
		text, err := OfficerKey(k)
		if err != nil {
			return err
		}
		trusted = append(trusted, text)
	}
	challenge := x.challenge(store, p)
	for i, a := range e.Approvals {
		switch {
		case has(e.Approvals[:i], a.Key):
			return fmt.Errorf("officer %s is counted twice", a.Officer)
		case !slices.Contains(trusted, a.Key):
			return fmt.Errorf("the key of officer %s is not among the trusted ones", a.Officer)
		case !challenge.verify(ActApprove, Officer{a.Officer, a.Key}, a.Signature):
			return fmt.Errorf("the signature of officer %s is not one on this plan", a.Officer)
		}
	}
	if n := uint32(len(e.Approvals)); n < e.Needed {
		return fmt.Errorf("%d approvals, and %d are needed", n, e.Needed)
	}
	return nil
}

// verifyLog follows the log from its key to the entries.
func (e Evidence) verifyLog(t Trust) error {
	der, err := base64.StdEncoding.Strict().DecodeString(e.Log.Key)
	if err != nil {
		return err
	}
	key, err := x509.ParsePKIXPublicKey(der)
	if err != nil {
		return err
	}
	if sum := sha256.Sum256(der); hex.EncodeToString(sum[:]) != e.LogKey {
		return errors.New("the key of the audit log is not the one that is named")
	}
	if pinned, ok := t.AuditKey.(interface{ Equal(crypto.PublicKey) bool }); ok && !pinned.Equal(key) {
		return errors.New("the key of the audit log is not the trusted one")
	} else if _, offline := e.Plan.offlineNonce(); !ok && offline {
		return fmt.Errorf("what officers sign of a %s does not name the key of the audit log: give that key (custodianctl audit key prints it)", e.Plan.Kind)
	}
	signed, err := checkpoint.Verify([]byte(e.Log.Checkpoint), key)
	if err != nil {
		return err
	}
	entries, err := e.Log.open(signed)
	if err != nil {
		return err
	}
	return e.matchEntries(entries)
}

// open checks the proof of each entry.
func (l *EvidenceLog) open(signed checkpoint.Checkpoint) (entries []audit.Entry, err error) {
	for _, in := range l.Entries {
		a, err := audit.UnmarshalEntry(in.Entry)
		if err != nil {
			return nil, err
		}
		if n := len(entries); n > 0 && entries[n-1].Index >= a.Index {
			return nil, errors.New("the entries are not in the order of the log")
		}
		var hashes [][32]byte
		for _, h := range in.Hashes {
			if len(h) != sha256.Size {
				return nil, fmt.Errorf("entry %d: a hash of %d bytes", a.Index, len(h))
			}
			hashes = append(hashes, [32]byte(h))
		}
		leaf := sha256.Sum256(append([]byte{0}, in.Entry...)) // RFC 6962, section 2.1
		if err := signed.CheckInclusion(a.Index, leaf, hashes); err != nil {
			return nil, err
		}
		entries = append(entries, a)
	}
	return entries, nil
}

// matchEntries holds what the log says against what the file says.
func (e Evidence) matchEntries(entries []audit.Entry) error {
	done, err := e.doneDetail()
	if err != nil {
		return err
	}
	count := map[string]int{}
	for _, a := range entries {
		if !strings.HasPrefix(a.Detail, about(e.ID)+":") {
			return fmt.Errorf("entry %d is about something else", a.Index)
		}
		if a.Outcome == audit.Allowed {
			count[a.Action]++
		}
	}
	if len(entries) == 0 || !isDone(entries[len(entries)-1], done) || count[actionCeremonyDone] != 1 {
		return errors.New("the last entry of the audit log does not say what the file says")
	}
	if _, offline := e.Plan.offlineNonce(); offline {
		return nil // what came before was done without a daemon
	}
	if count[string(ActionPropose)] != 1 || count[string(ActionApprove)] != len(e.Approvals) || count[string(ActionExecute)] != 1 {
		return fmt.Errorf("the audit log has %d proposals, %d approvals and %d executions, and the file 1, %d and 1",
			count[string(ActionPropose)], count[string(ActionApprove)], count[string(ActionExecute)], len(e.Approvals))
	}
	return nil
}

// isDone recognises the last entry. A start that had to write it says so at
// its end.
func isDone(a audit.Entry, want string) bool {
	return a.Action == actionCeremonyDone && a.Outcome == audit.Allowed && (a.Detail == want || a.Detail == want+" (written by the next start)")
}
