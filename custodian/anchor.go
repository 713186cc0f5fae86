package custodian

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"github.com/keycustody/custodian/internal/audit"
	"github.com/keycustody/custodian/internal/checkpoint"
)

// Anchors are where the newest checkpoints of the audit log lie outside of this
// machine's own trust. They are asked at the start, before anything is written
// to the log, and told of what is new while the daemon runs.
type Anchors interface {
	// Check holds the log against every anchor that answers. One that does not
	// is no error; Blocked says when there was none for too long. Errors:
	// ErrAnchorAhead, ErrAnchorFork.
	Check(context.Context, AnchoredLog) error
	// Blocked says why nothing may be issued or released, or nil. It is asked
	// for every call, so it waits for nothing.
	Blocked() error
	// Status describes every anchor, in the order of the configuration.
	Status() []AnchorStatus
}

// What an anchor shows. Each matches ErrRecordCorrupt as well where Open
// returns it.
var (
	// ErrAnchorAhead: an anchor has a checkpoint of more entries than the log.
	ErrAnchorAhead = errors.New("an anchor has a later audit log than this one: log and store were rolled back")
	// ErrAnchorFork: an anchor has a checkpoint that the log does not continue.
	ErrAnchorFork = errors.New("an anchor has another audit log than this one: the history was forked")
)

// An AnchoredLog is the audit log as anchors see it.
type AnchoredLog struct {
	Origin string // of its checkpoints
	// Checkpoint returns the newest checkpoint that is durable; nil where there
	// is none yet.
	Checkpoint func() []byte
	// Verify returns what a checkpoint says that a key of this custody signed.
	Verify func(signed []byte) (checkpoint.Checkpoint, error)
	// Consistency proves that the log of old entries, at least one, is the
	// beginning of that of c, a checkpoint which Checkpoint has returned.
	Consistency func(ctx context.Context, old uint64, c checkpoint.Checkpoint) ([][32]byte, error)
}

// An AnchorStatus says how far an anchor is behind.
type AnchorStatus struct {
	Name string `json:"name"`
	Kind string `json:"kind"`
	// Size is how many entries its newest checkpoint covers, Time when it took
	// that; zero until it took one since the start.
	Size uint64    `json:"size"`
	Time time.Time `json:"time,omitzero"`
	// Lag is how many entries the log has beyond that, and LagTime since when.
	Lag     uint64        `json:"lag_entries"`
	LagTime time.Duration `json:"lag"`
	// LastError is why the last try failed; empty: it did not.
	LastError string `json:"last_error,omitempty"`
	Failures  uint64 `json:"failures"`
	// Alert is when it was found to be too far behind; zero: it is not.
	Alert time.Time `json:"alert,omitzero"`
}

// An AnchorAlert says that an anchor is too far behind, or no more.
type AnchorAlert struct {
	ID        string    `json:"id"`
	Anchor    string    `json:"anchor"`
	Since     time.Time `json:"since"` // what it does not have is from then on
	Declared  time.Time `json:"declared"`
	Closed    time.Time `json:"closed,omitzero"`
	Lag       uint64    `json:"lag_entries"`
	LastError string    `json:"last_error,omitempty"`
}

// anchoredLog is the audit log for anchors. set is what the start found.
func (c *Custodian) anchoredLog(set *controlSet) (AnchoredLog, error) {
	origin := c.auditOrigin()
	var keys []crypto.PublicKey
	for _, g := range set.signers {
		if g.Purpose != signerAudit {
			continue
		}
		key, err := x509.ParsePKIXPublicKey(g.PublicKey)
		if err != nil {
			return AnchoredLog{}, corrupt("signing key "+g.Label, err)
		}
		keys = append(keys, key)
	}
	return AnchoredLog{
		Origin:     origin,
		Checkpoint: c.audit.Checkpoint,
		Verify: func(signed []byte) (cp checkpoint.Checkpoint, err error) {
			for _, key := range keys {
				if cp, err = checkpoint.Verify(signed, key); err == nil {
					break
				}
			}
			if err == nil && cp.Origin != origin {
				err = fmt.Errorf("it is of the log %q: %w", cp.Origin, checkpoint.ErrMalformed)
			}
			return cp, err
		},
		Consistency: audit.NewProver(c.audit.Dir()).Consistency,
	}, nil
}

// checkAnchors holds the log against its anchors, if it has any.
func (c *Custodian) checkAnchors(ctx context.Context, set *controlSet) error {
	if c.anchors == nil {
		return nil
	}
	l, err := c.anchoredLog(set)
	if err != nil {
		return err
	}
	err = c.anchors.Check(ctx, l)
	if errors.Is(err, ErrAnchorAhead) || errors.Is(err, ErrAnchorFork) {
		return corrupt("audit log", err)
	}
	return err
}

// anchored says why nothing may be issued or released for want of an anchor.
func (c *Custodian) anchored() error {
	if c.anchors == nil {
		return nil
	}
	if err := c.anchors.Blocked(); err != nil {
		return fmt.Errorf("%w: %w", err, ErrAuditBlocked)
	}
	return nil
}
