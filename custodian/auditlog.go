package custodian

import (
	"context"
	"errors"
	"io"
	"time"

	"github.com/keycustody/custodian/internal/audit"
)

// SignerAttributes are what HSM.Signer has found of the private half of every
// pair that it opens; it opens no other.
var SignerAttributes = []string{"CKA_LOCAL=true", "CKA_SENSITIVE=true", "CKA_ALWAYS_SENSITIVE=true", "CKA_EXTRACTABLE=false",
	"CKA_NEVER_EXTRACTABLE=true", "CKA_SIGN=true"}

// An AuditKey is the key that signs the audit log's checkpoints.
type AuditKey struct {
	Signer
	TokenSerial string
}

// What the audit log holds is its own package's to say.
type (
	AuditEntry   = audit.Entry
	AuditProof   = audit.Proof
	AuditFilter  = audit.Filter
	AuditOutcome = audit.Outcome
)

// The outcomes.
const (
	AuditAllowed = audit.Allowed
	AuditDenied  = audit.Denied
	AuditFailed  = audit.Failed
	AuditBegun   = audit.Begun
)

// An AuditQuery asks for a page of the audit log.
type AuditQuery struct {
	From     uint64 // index of the first entry to look at
	PageSize int
	// SessionID or UserID, of which one may be set, picks entries about that
	// viewer. That somebody asked is written to the log.
	SessionID, UserID string
	AuditFilter
}

// mayReadAudit says no to who may not read entries of the category. Entries of
// no category are for who may see all.
func (c *Custodian) mayReadAudit(ctx context.Context, who Caller, name CategoryName) error {
	d := c.decide(who, ActionReadAudit, Resource{Category: name})
	if d.Allow && (name != "" || d.KnowIt) {
		return nil
	}
	d.Allow, d.Err = false, ErrDenied
	return c.refuse(ctx, who, d, ActionReadAudit, ref{category: name})
}

// AuditCheckpoint returns the newest checkpoint and the key that signed it, to
// any auditor.
func (c *Custodian) AuditCheckpoint(ctx context.Context, who Caller) ([]byte, AuditKey, error) {
	if d := c.decide(who, ActionReadAudit, Resource{}); !d.Allow {
		return nil, AuditKey{}, c.refuse(ctx, who, d, ActionReadAudit, ref{})
	}
	g, err := c.set.Load().auditSigner()
	return c.audit.Checkpoint(), AuditKey{g, c.hsm.Status().Serial}, err
}

// AuditInclusion proves one entry to the checkpoint of size, or to the newest
// where size is 0.
func (c *Custodian) AuditInclusion(ctx context.Context, who Caller, index, size uint64) (AuditProof, error) {
	if d := c.decide(who, ActionReadAudit, Resource{}); !d.Allow {
		return AuditProof{}, c.refuse(ctx, who, d, ActionReadAudit, ref{})
	}
	p, err := audit.ProveInclusion(ctx, c.audit.Dir(), index, size)
	if err != nil {
		return AuditProof{}, auditError("index", err)
	}
	if err := c.mayReadAudit(ctx, who, CategoryName(p.Entry.Category)); err != nil {
		return AuditProof{}, err
	}
	return p, nil
}

// AuditConsistency proves that the log of old entries is the beginning of the
// log of size, or of the newest checkpoint where size is 0.
func (c *Custodian) AuditConsistency(ctx context.Context, who Caller, old, size uint64) (hashes [][32]byte, signed []byte, err error) {
	if d := c.decide(who, ActionReadAudit, Resource{}); !d.Allow {
		return nil, nil, c.refuse(ctx, who, d, ActionReadAudit, ref{})
	}
	hashes, signed, err = audit.ProveConsistency(ctx, c.audit.Dir(), old, size)
	return hashes, signed, auditError("old_size", err)
}

// AuditEntries returns a page of entries, and the index where the next one
// begins; 0 at the end of the log.
func (c *Custodian) AuditEntries(ctx context.Context, who Caller, q AuditQuery) (page []AuditEntry, next uint64, err error) {
	if err := c.mayReadAudit(ctx, who, CategoryName(q.Category)); err != nil {
		return nil, 0, err
	}
	if err := c.lookUp(ctx, who, &q); err != nil {
		return nil, 0, err
	}
	err = c.index.Find(ctx, q.From, &q.AuditFilter, func(e *audit.Entry) error {
		if len(page) == q.PageSize {
			next = e.Index
			return io.EOF
		}
		page = append(page, *e)
		return nil
	})
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return page, next, auditError("from_index", err)
}

// AuditPrunedBefore is the index of the first entry of the log that no pruning
// has taken away; 0 where nothing is pruned. Of the entries before it there are
// those that KeepInLog picks.
func (c *Custodian) AuditPrunedBefore() uint64 { return c.audit.Stats().Pruned }

// KeepIndex keeps the index of the audit log up to date until ctx ends, so that
// questions are answered soon.
func (c *Custodian) KeepIndex(ctx context.Context) { c.index.UpdateEvery(ctx, indexInterval) }

// indexInterval is how often the index takes in what is new. A question does
// that, too.
const indexInterval = time.Minute

// followInterval is how often FollowAudit looks for new entries.
const followInterval = 250 * time.Millisecond

// followBatch is how many entries send gets at most.
const followBatch = 100

// FollowAudit calls send with the entries that q picks, from q.From on and then
// as they are written, until ctx ends, send returns an error, or the caller may
// not read them any more. An entry is shown once it is durable, within a second.
func (c *Custodian) FollowAudit(ctx context.Context, who Caller, q AuditQuery, send func([]AuditEntry) error) error {
	if err := c.mayReadAudit(ctx, who, CategoryName(q.Category)); err != nil {
		return err
	}
	if err := c.lookUp(ctx, who, &q); err != nil {
		return err
	}
	tail, err := audit.OpenTail(c.audit.Dir(), q.From)
	if err != nil {
		return err
	}
	defer tail.Close()
	tick := time.NewTicker(followInterval)
	defer tick.Stop()
	for {
		var found []AuditEntry
		flush := func() error {
			if len(found) == 0 {
				return nil
			}
			part := found
			found = nil
			return send(part)
		}
		err := tail.Next(c.audit.Size(), func(e *audit.Entry) error {
			if q.Match(e) {
				found = append(found, *e)
			}
			if len(found) < followBatch {
				return ctx.Err()
			}
			return flush()
		})
		if err == nil {
			err = flush()
		}
		if err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
		if err := c.mayReadAudit(ctx, who, CategoryName(q.Category)); err != nil {
			return err
		}
	}
}

// auditError makes a fault of the request of what the log does not have.
func auditError(field string, err error) error {
	if errors.Is(err, audit.ErrNoEntry) || errors.Is(err, audit.ErrNoCheckpoint) {
		return invalid(field, err)
	}
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
		return errors.Join(err, ErrDeadline)
	}
	return err
}
