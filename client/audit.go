package client

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"errors"
	"fmt"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/internal/checkpoint"
)

// A Checkpoint is a state of the daemon's audit log, which the daemon's HSM has
// signed: its Origin, which names the log, its Size in entries and its Merkle
// Root. Keep the newest one, and CheckConsistency of a later one shows that
// nothing was changed or dropped in between.
type Checkpoint = checkpoint.Checkpoint

// ErrReceipt means that a receipt or a proof does not show what it should.
var ErrReceipt = errors.New("receipt does not verify")

// ParseAuditKey reads the public key of the audit log, in PEM, as custodianctl
// audit key prints it. Pin it: get it from an auditor, not with the receipt.
func ParseAuditKey(pem []byte) (crypto.PublicKey, error) { return checkpoint.ParseKey(pem) }

// VerifyReceipt checks that the HSM has signed a state of the log which covers
// the receipt's entry, and returns it. That this entry is the one that the
// receipt names is shown by VerifyInclusion. The error wraps ErrReceipt.
func VerifyReceipt(r *v1.Receipt, key crypto.PublicKey) (Checkpoint, error) {
	c, err := checkpoint.Verify(r.GetCheckpoint(), key)
	if err != nil {
		return Checkpoint{}, fmt.Errorf("entry %d: %w: %w", r.GetIndex(), err, ErrReceipt)
	}
	if r.GetIndex() >= c.Size || len(r.GetLeafHash()) != sha256.Size {
		return Checkpoint{}, fmt.Errorf("entry %d: the checkpoint of %d entries does not cover it: %w", r.GetIndex(), c.Size, ErrReceipt)
	}
	return c, nil
}

// VerifyInclusion checks that the receipt's entry is the one of the proof, and
// is in the log of the proof's checkpoint, which it returns. The receipt's own
// checkpoint is checked too. The error wraps ErrReceipt.
func VerifyInclusion(r *v1.Receipt, proof *v1.GetInclusionProofResponse, key crypto.PublicKey) (Checkpoint, error) {
	own, err := VerifyReceipt(r, key)
	if err != nil {
		return Checkpoint{}, err
	}
	c, err := checkpoint.Verify(proof.GetCheckpoint(), key)
	if err != nil {
		return Checkpoint{}, fmt.Errorf("entry %d: proof: %w: %w", r.GetIndex(), err, ErrReceipt)
	}
	if c.Origin != own.Origin {
		return Checkpoint{}, fmt.Errorf("entry %d: the proof is of the log %q, not of %q: %w", r.GetIndex(), c.Origin, own.Origin, ErrReceipt)
	}
	leaf := sha256.Sum256(append([]byte{0}, proof.GetEntry()...)) // RFC 6962, section 2.1
	if !bytes.Equal(leaf[:], r.GetLeafHash()) {
		return Checkpoint{}, fmt.Errorf("entry %d: the proof is of another entry: %w", r.GetIndex(), ErrReceipt)
	}
	hashes, err := toHashes(proof.GetHashes())
	if err == nil {
		err = c.CheckInclusion(r.GetIndex(), leaf, hashes)
	}
	if err != nil {
		return Checkpoint{}, fmt.Errorf("%w: %w", err, ErrReceipt)
	}
	return c, nil
}

// VerifyConsistency checks that the log of old, which was verified before, is
// the beginning of the log of the proof's checkpoint, which it returns. The
// error wraps ErrReceipt.
func VerifyConsistency(old Checkpoint, proof *v1.GetConsistencyProofResponse, key crypto.PublicKey) (Checkpoint, error) {
	c, err := checkpoint.Verify(proof.GetCheckpoint(), key)
	if err != nil {
		return Checkpoint{}, fmt.Errorf("%w: %w", err, ErrReceipt)
	}
	hashes, err := toHashes(proof.GetHashes())
	if err == nil {
		err = c.CheckConsistency(old, hashes)
	}
	if err != nil {
		return Checkpoint{}, fmt.Errorf("%w: %w", err, ErrReceipt)
	}
	return c, nil
}

func toHashes(in [][]byte) ([][32]byte, error) {
	out := make([][32]byte, len(in))
	for i, b := range in {
		if len(b) != sha256.Size {
			return nil, fmt.Errorf("a hash of %d bytes", len(b))
		}
		out[i] = [32]byte(b)
	}
	return out, nil
}

// GetCheckpoint returns the newest checkpoint of the audit log and the key that
// signs it, for an auditor.
func (c *Client) GetCheckpoint(ctx context.Context) (*v1.GetCheckpointResponse, error) {
	return answer(c.audit.GetCheckpoint(ctx, &v1.GetCheckpointRequest{}))
}

// GetInclusionProof proves an entry of the audit log, for an auditor.
func (c *Client) GetInclusionProof(ctx context.Context, req *v1.GetInclusionProofRequest) (*v1.GetInclusionProofResponse, error) {
	return answer(c.audit.GetInclusionProof(ctx, req))
}

// GetConsistencyProof proves that an older audit log is the beginning of a newer
// one, for an auditor.
func (c *Client) GetConsistencyProof(ctx context.Context, req *v1.GetConsistencyProofRequest) (*v1.GetConsistencyProofResponse, error) {
	return answer(c.audit.GetConsistencyProof(ctx, req))
}

// ListAuditEntries returns a page of the audit log, for an auditor.
func (c *Client) ListAuditEntries(ctx context.Context, req *v1.ListEntriesRequest) (*v1.ListEntriesResponse, error) {
	return answer(c.audit.ListEntries(ctx, req))
}
