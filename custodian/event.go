package custodian

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/keycustody/custodian/internal/audit"
)

// KEKMaxAge is the longest originator-usage period of a KEK.
const KEKMaxAge = 2 * 365 * 24 * time.Hour

// EventLimits bound what events do by themselves: the standing approval. The
// zero limits approve nothing.
type EventLimits struct {
	// DailyCap is how many KEK versions a category gets in 24 hours at most.
	DailyCap int
	// MinInterval is how long a KEK version protects at least before an event
	// makes its successor.
	MinInterval time.Duration
}

// An EventKind is what has happened.
type EventKind string

// The kinds. None of them is a compromise: that is the officers' to say.
const (
	// EventNewBatch: new content is about to be packaged, and its keys get a KEK
	// version of their own.
	EventNewBatch EventKind = "new-batch"
	// EventPackaged: a content item was packaged. Its keys are in use, and their
	// re-issue window closes.
	EventPackaged EventKind = "packaged"
	// EventSessionRevoked: nothing more is to be released for a viewer's session.
	EventSessionRevoked EventKind = "session-revoked"
)

// EventKinds are all of them.
var EventKinds = []EventKind{EventNewBatch, EventPackaged, EventSessionRevoked}

// An Event is something that happened elsewhere. One that is reported again is
// the same event, and has the same effect once.
type Event struct {
	ID        string
	Kind      EventKind
	Category  CategoryName // but of EventSessionRevoked: a session is every category's
	ContentID ContentID    // of EventPackaged
	SessionID string       // of EventSessionRevoked
}

// Check says what is wrong with the event, or nil.
func (e Event) Check() error {
	if e.ID == "" {
		return invalid("event_id", errors.New("empty: without it, an event that is repeated could not be told from a new one"))
	}
	if err := checkText(e.ID, MaxRequestIDSize); err != nil {
		return invalid("event_id", err)
	}
	if !slices.Contains(EventKinds, e.Kind) {
		return invalid("kind", fmt.Errorf("%.40q: must be one of %v", string(e.Kind), EventKinds))
	}
	none := fmt.Errorf("an event of kind %s has none", e.Kind)
	if e.Kind == EventSessionRevoked {
		switch {
		case e.SessionID == "":
			return invalid("session_id", errors.New("empty"))
		case e.Category != "":
			return invalid("category", none)
		case len(e.ContentID) > 0:
			return invalid("content_id", none)
		}
		return checkViewer("session_id", e.SessionID)
	}
	if err := e.Category.Check(); err != nil {
		return invalid("category", err)
	}
	if e.SessionID != "" {
		return invalid("session_id", none)
	}
	if e.Kind == EventPackaged {
		if err := e.ContentID.Check(); err != nil {
			return invalid("content_id", err)
		}
	} else if len(e.ContentID) > 0 {
		return invalid("content_id", none)
	}
	return nil
}

// An EventResult says what came of an event.
type EventResult struct {
	KEK     KEKID  // protects now
	Rotated bool   // by this event, now or when it was reported first
	Reason  string // why it was not
	Marked  int    // content keys that are in use from now on
}

// ReportEvent does what an event calls for. A new batch gets a KEK version
// where the standing approval covers it: the next content keys are under that,
// and nothing is moved to it. What the approval does not cover is no error: it is
// written down, and nothing is done.
func (c *Custodian) ReportEvent(ctx context.Context, who Caller, ev Event) (EventResult, error) {
	if err := ev.Check(); err != nil {
		return EventResult{}, err
	}
	if ev.Kind == EventSessionRevoked {
		return EventResult{}, c.revokeByEvent(ctx, who, ev)
	}
	d := c.decide(who, ActionReportEvent, Resource{Category: ev.Category})
	about := ref{category: ev.Category, contentID: ev.ContentID}
	e := c.entry(c.set.Load(), who, d, ActionReportEvent, ev.ID, about, nil)
	var res EventResult
	var begun *attempt
	err := d.Err
	if d.Allow {
		err = c.lookAtClock()
	}
	switch {
	case err != nil:
	case ev.Kind == EventPackaged:
		res, err = c.packaged(ctx, ev, e)
	default:
		res, begun, err = c.newBatch(ctx, ev, e)
	}
	if err != nil {
		err = deadline(ctx, err)
		failed := c.entry(c.set.Load(), who, d, ActionReportEvent, ev.ID, about, err)
		if begun != nil {
			failed.Action = actionRotateKEK
		}
		if _, aerr := c.record(ctx, c.fail(begun, failed)); aerr != nil {
			return EventResult{}, errors.Join(aerr, err)
		}
		return EventResult{}, err
	}
	return res, nil
}

// revokeByEvent revokes a session for as long as licence tokens that are out for
// it can be valid. Only who may report about every category may do that.
func (c *Custodian) revokeByEvent(ctx context.Context, who Caller, ev Event) error {
	d := c.decide(who, ActionRevokeByEvent, Resource{})
	if d.Allow && !d.KnowIt {
		d.Allow, d.Err = false, ErrDenied
	}
	_, err := c.revoke(ctx, who, d, RevokeRequest{RequestID: ev.ID, SessionID: ev.SessionID, Cause: "reported by an event"})
	return err
}

// newBatch makes the version of an event. The rotation's record is what the
// event is known by when it is repeated. The attempt is returned where it came to
// one.
func (c *Custodian) newBatch(ctx context.Context, ev Event, e audit.Entry) (EventResult, *attempt, error) {
	set := c.set.Load()
	cat, ok := set.categories[ev.Category]
	if !ok {
		return EventResult{}, nil, fmt.Errorf("category %s: %w", ev.Category, ErrCategoryNotFound)
	}
	res := EventResult{KEK: KEKID{cat.Name, cat.ActiveKEK}}
	if _, done := set.ordered(ev.ID); done {
		res.Rotated = true
		return res, nil, nil
	}
	if res.Reason = set.holdsBack(set.standing(c.events, cat.Name), cat, c.now()); res.Reason != "" {
		e.Detail = "no new version: " + res.Reason
		_, err := c.record(ctx, e)
		return res, nil, err
	}
	e.Action, e.Detail = actionRotateKEK, string(ev.Kind)
	begun, err := c.begin(ctx, e)
	if err != nil {
		return res, nil, err
	}
	kek, err := c.newKEK(ctx, set, KEKID{cat.Name, set.nextKEK(cat.Name)}, cat.Providers)
	if err != nil {
		return res, begun, err
	}
	err = c.change(ctx, func(old *controlSet, now time.Time) (change, error) {
		cat := old.categories[ev.Category]
		if _, done := old.ordered(ev.ID); done || old.nextKEK(cat.Name) != kek.ID.Version {
			return change{}, fmt.Errorf("category %s: its KEK changed meanwhile; report the event again: %w", cat.Name, ErrStoreUnavailable)
		}
		if why := old.holdsBack(old.standing(c.events, cat.Name), cat, now); why != "" {
			return change{}, fmt.Errorf("category %s: %s: %w", cat.Name, why, ErrStoreUnavailable)
		}
		pred := old.keks[KEKID{cat.Name, cat.ActiveKEK}]
		r := Rotation{Kind: RotateKEK, Category: cat.Name, To: kek.ID.Version, Predecessor: cat.ActiveKEK, Step: StepRetired, Cause: string(ev.Kind),
			RequestID: ev.ID, StartTime: now, StepTime: now, HoldUntil: now, Revision: 1}
		pred.State, pred.DeactivateTime, pred.Revision = StateDeactivated, now, pred.Revision+1
		cat.ActiveKEK, cat.Revision = r.To, cat.Revision+1
		e.KeyVersion = kek.ID.String()
		return change{put: []ControlRecord{categoryRecord(cat), kekRecord(pred), kekRecord(kek), rotationRecord(r)}, entry: begun.end(e)}, nil
	})
	if err == nil {
		res.KEK, res.Rotated = kek.ID, true
	}
	return res, begun, err
}

// holdsBack says why the standing approval does not cover one more version of
// a category's KEK at now, or "".
func (s *controlSet) holdsBack(l EventLimits, cat Category, now time.Time) string {
	if l.DailyCap == 0 {
		if s.authority != nil {
			return fmt.Sprintf("there is no standing approval: a plan of kind %s gives it", KindCategoryPolicy)
		}
		return "there is no standing approval (events.daily_cap is 0)"
	}
	for name, r := range s.rotations {
		if r.Kind == RotateKEK && r.Category == cat.Name && !r.Step.over() {
			return fmt.Sprintf("rotation %s is at %s", name, r.Step)
		}
	}
	made := 0
	for id, k := range s.keks {
		if id.Category != cat.Name {
			continue
		}
		if next := k.CreateTime.Add(l.MinInterval); now.Before(next) {
			return fmt.Sprintf("version %d is younger than %s", id.Version, l.MinInterval)
		}
		if now.Sub(k.CreateTime) < 24*time.Hour {
			made++
		}
	}
	if made >= l.DailyCap {
		return fmt.Sprintf("%d versions were made within 24 hours, and %d is the cap", made, l.DailyCap)
	}
	return ""
}

// rotateAged gives a new version to each category whose KEK is past its
// period. Nothing is moved to it.
func (c *Custodian) rotateAged(ctx context.Context) error {
	var faults []error
	set := c.set.Load()
	for name, cat := range set.categories {
		if k := set.keks[KEKID{name, cat.ActiveKEK}]; c.now().Sub(k.CreateTime) >= KEKMaxAge {
			if err := c.rotateKEK(ctx, name, cat.ActiveKEK, set.nextKEK(name), "two years old"); err != nil {
				faults = append(faults, fmt.Errorf("category %s: its KEK is past its period: %w", name, err))
			}
		}
	}
	return errors.Join(faults...)
}
