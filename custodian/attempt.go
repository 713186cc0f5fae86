package custodian

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"sync"

	"github.com/keycustody/custodian/internal/audit"
)

// An attempt is an administrative action that the audit log says has begun. Its
// end is an entry that names it, made by end: as part of the change that it
// makes, or written by itself.
type attempt struct{ index uint64 }

// administer does an administrative action, unless err says what stands against
// it: it writes that the action begins, does it, and sees to it that the log has
// its end, whatever comes of it. do gets the entry of the end: a change has it
// as its own, and where do has not written it, administer does. What stops a
// caller is not held up by a log that cannot be written: then nothing is
// released either, but it is to hold when that has passed.
func (c *Custodian) administer(ctx context.Context, d Decision, e audit.Entry, err error, do func(end audit.Entry) error) error {
	var begun *attempt
	if err == nil {
		if begun, err = c.begin(ctx, e); e.Action == actionCallerFrozen {
			err = nil
		}
	}
	if err == nil {
		err = do(begun.end(e))
	}
	if err == nil {
		if begun != nil && c.attempts.has(begun.index) {
			_, err = c.record(ctx, begun.end(e))
		}
		return err
	}
	err = deadline(ctx, err)
	if _, aerr := c.record(ctx, c.fail(begun, judged(e, d, err))); aerr != nil {
		return errors.Join(aerr, err)
	}
	return err
}

// carryOut does a part of what a ceremony, or the start of the daemon, has
// decided already. The log has it before it begins, as what one person orders.
func (c *Custodian) carryOut(ctx context.Context, e audit.Entry, do func(end audit.Entry) error) error {
	e.Outcome = audit.Allowed
	return c.administer(ctx, Decision{Allow: true}, e, nil, do)
}

// attempts are those of this process that have no end in the log yet.
type attempts struct {
	mu   sync.Mutex
	open map[uint64]bool
}

// note takes in what was just written.
func (a *attempts) note(entries []audit.Entry, receipts []audit.Receipt) {
	for i := range entries {
		switch e := &entries[i]; {
		case e.Outcome == audit.Begun:
			a.mu.Lock()
			a.open[receipts[i].Index] = true
			a.mu.Unlock()
		case e.HasAttempt:
			a.mu.Lock()
			delete(a.open, e.Attempt)
			a.mu.Unlock()
		}
	}
}

func (a *attempts) has(index uint64) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.open[index]
}

// begin writes that an administrative action begins. It comes before the first
// thing that the action does, and after authority and clock have allowed it:
// what they refuse has not begun.
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

// fail makes e the entry of an attempt that failed, unless it has an end
// already, or its change may still come to one: that has an entry of its own.
func (c *Custodian) fail(a *attempt, e audit.Entry) audit.Entry {
	c.controlMu.Lock()
	defer c.controlMu.Unlock()
	if a == nil || !c.attempts.has(a.index) {
		return e
	}
	if u := c.unsettled; u != nil && u.entry.HasAttempt && u.entry.Attempt == a.index {
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

// ReasonInterrupted is what the end of an attempt says that the next start wrote:
// nobody saw how it ended.
const ReasonInterrupted = "INTERRUPTED"

// endAttempts writes the end of what had begun when the last run ended: it is
// not known how far it came. What it changed in the control set has an entry of
// its own, and then this is not called for it.
func (c *Custodian) endAttempts(ctx context.Context, begun map[uint64]audit.Entry) error {
	var entries []audit.Entry
	for index, b := range begun {
		e := audit.Entry{Action: b.Action, Outcome: audit.Failed, Reason: ReasonInterrupted, Caller: b.Caller, Role: b.Role, RequestID: b.RequestID,
			Category: b.Category, ContentID: b.ContentID, KeyVersion: b.KeyVersion, Detail: "the daemon ended before it was done (written by the next start)"}
		if b.Detail != "" {
			e.Detail = b.Detail + ": " + e.Detail
		}
		if set := c.set.Load(); set != nil { // an init has none
			e.ControlRevision = set.head.Revision
		}
		entries = append(entries, (&attempt{index}).end(e))
	}
	if len(entries) == 0 {
		return nil
	}
	slices.SortFunc(entries, func(a, b audit.Entry) int { return cmp.Compare(a.Attempt, b.Attempt) })
	_, err := c.record(ctx, entries...)
	return err
}
