package custodian

import (
	"cmp"
	"context"
	"slices"

	"github.com/keycustody/custodian/internal/audit"
)

// An attempt is an administrative action that the audit log says has begun. Its
// end is an entry that names it, made by end: as part of the change that it
// makes, or written by itself.
type attempt struct{ index uint64 }

// begin writes that an administrative action begins. It comes before the first
// thing that the action does, and after all that can refuse it: what is refused
// has not begun.
func (c *Custodian) begin(ctx context.Context, e audit.Entry) (*attempt, error) {
	e.Outcome, e.Reason, e.Priority = audit.Begun, "", true
	receipts, err := c.record(ctx, e)
	if err != nil {
		return nil, err
	}
	return &attempt{receipts[0].Index}, nil
}

// end makes e the entry of the end of the attempt. Where there is none, because
// what was asked for was refused, e stays as it is.
func (a *attempt) end(e audit.Entry) audit.Entry {
	if a != nil {
		e.HasAttempt, e.Attempt, e.Priority = true, a.index, true
	}
	return e
}

// fail makes e the entry of an attempt that failed, unless its change may still
// come to an end: that has an entry of its own.
func (c *Custodian) fail(a *attempt, e audit.Entry) audit.Entry {
	c.controlMu.Lock()
	defer c.controlMu.Unlock()
	if u := c.unsettled; u != nil && a != nil && u.entry.HasAttempt && u.entry.Attempt == a.index {
		return e
	}
	return a.end(e)
}

// visitAttempt keeps the attempts whose end has not been seen.
func (l *Logged) visitAttempt(e *audit.Entry) {
	if e.Outcome == audit.Begun {
		if l.Begun == nil {
			l.Begun = map[uint64]audit.Entry{}
		}
		l.Begun[e.Index] = *e
	}
	if e.HasAttempt {
		delete(l.Begun, e.Attempt)
	}
}

// endAttempts writes the end of what had begun when the last run ended: it is
// not known how far it came. What it changed in the control set has an entry of
// its own, and then this is not called for it.
func (c *Custodian) endAttempts(ctx context.Context, begun map[uint64]audit.Entry) error {
	var entries []audit.Entry
	for index, b := range begun {
		e := audit.Entry{Action: b.Action, Outcome: audit.Failed, Reason: "INTERRUPTED", Caller: b.Caller, Role: b.Role, RequestID: b.RequestID,
			Category: b.Category, KeyVersion: b.KeyVersion, ControlRevision: c.set.Load().head.Revision,
			Detail: "the daemon ended before it was done (written by the next start)"}
		entries = append(entries, (&attempt{index}).end(e))
	}
	if len(entries) == 0 {
		return nil
	}
	slices.SortFunc(entries, func(a, b audit.Entry) int { return cmp.Compare(a.Attempt, b.Attempt) })
	_, err := c.record(ctx, entries...)
	return err
}
