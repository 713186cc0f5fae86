package audit

import (
	"bytes"
	"fmt"
	"slices"
	"sync"
	"time"
)

const (
	maxCallers = 1024 // that are counted apart
	maxKinds   = 64   // of denials that are counted apart for one caller

	othersName = "(others)" // where one of these bounds is reached
)

// denials counts what is denied to a caller, or fails for it, too often to be
// written down one by one, so that nobody can fill the disk by asking for what is
// refused, nor an outage by failing.
type denials struct {
	limit int // entries per second and caller

	mu      sync.Mutex // guards the fields below
	callers map[string]*denied
	others  denied // callers beyond maxCallers
	total   uint64
}

// denied is one caller's second.
type denied struct {
	start   time.Time
	written int
	counted map[deniedKind]*Entry // with Count; the rest is the first one's
}

type deniedKind struct {
	outcome              Outcome // Denied, or Failed: what failed for us is no denial
	role, action, reason string
}

func newDenials(limit int) *denials {
	return &denials{limit: limit, callers: make(map[string]*denied)}
}

// write reports whether e is to be written. Otherwise it is counted.
func (d *denials) write(e *Entry, now time.Time) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	c := d.caller(e.Caller)
	if since := now.Sub(c.start); since >= time.Second || since < 0 {
		c.start, c.written = now, 0
	}
	if c.written < d.limit {
		c.written++
		return true
	}
	d.add(c, e)
	return false
}

// add counts e. The caller holds mu.
func (d *denials) add(c *denied, e *Entry) {
	first := *e
	first.ContentID = bytes.Clone(e.ContentID)
	first.KID = bytes.Clone(e.KID)
	first.ControlDigest = bytes.Clone(e.ControlDigest)
	first.Refs = slices.Clone(e.Refs)
	first.Count = max(1, e.Count)
	d.total += first.Count
	d.count(c, first)
}

// Count counts what was refused to a caller before anything was done for it,
// such as a call too many. It waits for nothing: within a second or so, one
// entry stands for all of a kind. An entry that Append would not take is
// ErrInvalidEntry.
func (l *Log) Count(e Entry) error {
	if err := e.check(); err != nil {
		return err
	}
	if e.Outcome != Denied {
		return fmt.Errorf("%s is not counted, only what was denied: %w", e.Action, ErrInvalidEntry)
	}
	d := l.denials
	d.mu.Lock()
	defer d.mu.Unlock()
	d.add(d.caller(e.Caller), &e)
	return nil
}

func (d *denials) caller(name string) *denied {
	if c := d.callers[name]; c != nil {
		return c
	}
	if len(d.callers) >= maxCallers {
		return &d.others
	}
	c := new(denied)
	d.callers[name] = c
	return c
}

func (d *denials) count(c *denied, e Entry) {
	if c == &d.others {
		e = Entry{Time: e.Time, Action: e.Action, Outcome: e.Outcome, Reason: e.Reason, Caller: othersName, Count: e.Count}
	}
	kind := deniedKind{e.Outcome, e.Role, e.Action, e.Reason}
	if c.counted[kind] == nil && len(c.counted) >= maxKinds {
		kind = deniedKind{e.Outcome, othersName, othersName, othersName}
		e.Role, e.Action, e.Reason = kind.role, kind.action, kind.reason
	}
	if c.counted == nil {
		c.counted = make(map[deniedKind]*Entry)
	}
	if first := c.counted[kind]; first != nil {
		first.Count += e.Count
		return
	}
	c.counted[kind] = &e
}

// take returns the entries that stand for what was counted, and forgets it. One
// that stands for itself alone is complete; others say only what those they
// stand for have in common.
func (d *denials) take(now time.Time) []Entry {
	d.mu.Lock()
	defer d.mu.Unlock()
	entries := d.others.take(nil)
	for name, c := range d.callers {
		entries = c.take(entries)
		if since := now.Sub(c.start); since >= time.Second || since < 0 {
			delete(d.callers, name)
		}
	}
	return entries
}

func (c *denied) take(entries []Entry) []Entry {
	for _, e := range c.counted {
		if e.Count == 1 {
			e.Count = 0
		} else {
			*e = Entry{
				Time: e.Time, Action: e.Action, Outcome: e.Outcome, Reason: e.Reason,
				Caller: e.Caller, Role: e.Role, Count: e.Count,
			}
		}
		entries = append(entries, *e)
	}
	c.counted = nil
	return entries
}

// putBack counts entries again that take returned and that were not written.
func (d *denials) putBack(entries []Entry) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, e := range entries {
		e.Count = max(1, e.Count)
		d.count(d.caller(e.Caller), e)
	}
}

// all returns how many denials were counted rather than written.
func (d *denials) all() uint64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.total
}
