package custodian

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/keycustody/custodian/internal/audit"
)

// A LogRetention says which sealed segments of the audit log stay whole. Zero
// keeps all of them; otherwise a segment is pruned where both bounds let it go.
type LogRetention struct {
	Segments int           // so many of the newest; 0 is no bound
	Age      time.Duration // what is younger; 0 is no bound
	Archive  string        // a directory that has each segment first; none where empty
}

// KeepInLog picks the audit entries that outlive the pruning of their segment:
// all but releases, denials and failures. A start needs them to hold the store
// against the log, a restore to find the keys that a backup lacks, and an
// auditor to see who changed what.
func KeepInLog(e *AuditEntry) bool {
	return len(e.ControlDigest) > 0 || e.StoreSequence > 0 || e.Outcome == audit.Begun || e.HasAttempt ||
		e.Outcome == audit.Allowed && e.Action != string(ActionRelease)
}

// PruneLog prunes the audit log as r says. It is in the log before it begins,
// and again when it has ended. Call it now and then; it has seldom something to do.
func (c *Custodian) PruneLog(ctx context.Context, r LogRetention) error {
	if r == (LogRetention{}) {
		return nil
	}
	now := c.now()
	o := audit.PruneOptions{Whole: r.Segments, Keep: KeepInLog, Check: c.checkLogged, Archive: r.Archive, Now: now, Rehearse: true}
	if r.Age > 0 {
		o.Before = now.Add(-r.Age)
	}
	plan, err := audit.Prune(ctx, c.audit.Dir(), o)
	if err != nil || len(plan) == 0 {
		return err
	}
	e := audit.Entry{Action: actionPrune, Outcome: audit.Allowed, Detail: describePruned(plan)}
	begun, err := c.begin(ctx, e)
	if err != nil {
		return err
	}
	o.Rehearse = false
	pruned, err := audit.Prune(ctx, c.audit.Dir(), o)
	e.Detail = describePruned(pruned)
	if err != nil {
		e.Outcome, e.Reason = audit.Failed, string(ReasonOf(err))
	}
	_, rerr := c.record(ctx, begun.end(e))
	if rerr == nil {
		c.prunedNoted.Store(c.audit.Stats().Pruned)
	}
	return errors.Join(err, rerr)
}

const actionPrune = "audit.prune"

func describePruned(pruned []audit.Pruned) string {
	if len(pruned) == 0 {
		return "nothing"
	}
	first, last := pruned[0], pruned[len(pruned)-1]
	return fmt.Sprintf(prunedForm, first.Segment, last.Segment, first.First, last.First+last.Entries-1)
}

// RecordsPrune says whether an entry of the audit log tells that the segment was
// pruned: by the daemon, or by somebody else and seen by the daemon.
func RecordsPrune(e *AuditEntry, p audit.Pruned) bool {
	if e.Action != actionPrune || e.Outcome != audit.Allowed {
		return false
	}
	var ignored, first, last, seen uint64
	if _, err := fmt.Sscanf(e.Detail, prunedForm, &ignored, &ignored, &first, &last); err == nil {
		return first <= p.First && p.First+p.Entries-1 <= last
	}
	_, err := fmt.Sscanf(e.Detail, prunedSeen, &seen)
	return err == nil && p.First+p.Entries <= seen
}

// What the audit log says of pruning; RecordsPrune reads it.
const (
	prunedForm = "segments %d to %d, entries %d to %d"
	prunedSeen = "seen: of %d entries there are no more than those that outlive pruning"
)

// notePruned writes down that segments were pruned, by whomever, since it was
// called last.
func (c *Custodian) notePruned(ctx context.Context) error {
	n := c.audit.Stats().Pruned
	if c.prunedNoted.Load() == n {
		return nil
	}
	_, err := c.record(ctx, audit.Entry{Action: actionPrune, Outcome: audit.Allowed,
		Detail: fmt.Sprintf(prunedSeen, n)})
	if err == nil {
		c.prunedNoted.Store(n)
	}
	return err
}
