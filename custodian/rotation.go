package custodian

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/keycustody/custodian/internal/audit"
)

// A RotationKind is what a rotation replaces.
type RotationKind string

// The kinds.
const (
	RotateKEK RotationKind = "kek"
	RotateMEK RotationKind = "mek"
)

// A RotationStep is how far a rotation has come. Each is one control record,
// changed in one store update, so a rotation goes on after a crash where it
// was. The zero step is none.
type RotationStep uint8

// The steps. A KEK begins at REWRAP: until its first store update nothing of
// it is anywhere.
const (
	StepGenerate   RotationStep = 1 // the successor's token object is named, but neither made nor proved
	StepRewrap     RotationStep = 2 // the successor protects, and records move to it
	StepVerify     RotationStep = 3 // every record has moved, and is opened once more
	StepHold       RotationStep = 4 // verified; the predecessor could still come back
	StepRetired    RotationStep = 5 // no record refers to the predecessor, which opens nothing any more
	StepRollback   RotationStep = 6 // the predecessor protects again, and records move back to it
	StepRolledBack RotationStep = 7
)

var stepNames = [...]string{"UNSPECIFIED", "GENERATE", "REWRAP", "VERIFY", "HOLD", "RETIRED", "ROLLBACK", "ROLLED_BACK"}

func (s RotationStep) String() string {
	if int(s) < len(stepNames) {
		return stepNames[s]
	}
	return fmt.Sprintf("STEP_%d", uint8(s))
}

// MarshalText writes the step's name.
func (s RotationStep) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// running says whether the engine has something to do in s by itself.
func (s RotationStep) running() bool {
	switch s {
	case StepGenerate, StepRewrap, StepVerify, StepRollback:
		return true
	}
	return false
}

// over says whether nothing can be done about a rotation in s any more.
func (s RotationStep) over() bool { return !s.running() && s != StepHold }

// A Rotation puts a new version of a key in the place of others, and moves
// every record to it. It has no journal: each record names the version that
// wraps it, so what is left to do is what still refers to the old ones.
type Rotation struct {
	Kind     RotationKind
	Category CategoryName // of a KEK
	To       uint32       // the version that is new
	// Predecessor protected before, and does again after a rollback.
	Predecessor uint32
	// From are the versions that lose their records; the predecessor is one.
	From []uint32
	// Compromised are the KEK versions that became known to others. What was
	// born at or before one of them counts as compromised; Serve is the
	// officers' decision to release it all the same.
	Compromised []uint32
	Serve       bool
	Step        RotationStep
	Cause       string
	RequestID   string // of the order; an order that is repeated is the same one
	StartTime   time.Time
	StepTime    time.Time // when Step began
	HoldUntil   time.Time // not retired before
	Total       uint64    // content keys that had to move
	Verified    uint64    // content keys that were opened after the move
	Revision    uint64
}

// Name names a rotation by what is new: kek/movies/5, mek/2.
func (r Rotation) Name() string {
	if r.Kind == RotateMEK {
		return fmt.Sprintf("%s/%d", r.Kind, r.To)
	}
	return fmt.Sprintf("%s/%s", r.Kind, KEKID{r.Category, r.To})
}

// rolledBackTo says whether a rotation is being rolled back to a version.
func (s *controlSet) rolledBackTo(k RotationKind, c CategoryName, version uint32) bool {
	for _, r := range s.rotations {
		if r.Kind == k && r.Category == c && r.Step == StepRollback && r.Predecessor == version {
			return true
		}
	}
	return false
}

// gone are the versions that a rotation has proved to be without any record,
// and that open nothing any more.
func (r Rotation) gone() []uint32 {
	switch r.Step {
	case StepRetired:
		return r.From
	case StepRolledBack:
		return []uint32{r.To}
	}
	return nil
}

// retired says whether a KEK version is gone.
func (s *controlSet) retired(id KEKID) bool {
	for _, r := range s.rotations {
		if r.Kind == RotateKEK && r.Category == id.Category && slices.Contains(r.gone(), id.Version) {
			return true
		}
	}
	return false
}

// nextKEK is the version that a category's next KEK has. None is given twice.
func (s *controlSet) nextKEK(name CategoryName) uint32 {
	var last uint32
	for id := range s.keks {
		if id.Category == name {
			last = max(last, id.Version)
		}
	}
	return last + 1
}

// liveKEKs are the versions of a category that records may lie under.
func (s *controlSet) liveKEKs(name CategoryName) (versions []uint32) {
	for id, k := range s.keks {
		if id.Category == name && (k.State == StateActive || k.State == StateDeactivated) && !s.retired(id) {
			versions = append(versions, id.Version)
		}
	}
	slices.Sort(versions)
	return versions
}

// A RotationOrder asks for a rotation.
type RotationOrder struct {
	RequestID string
	Kind      RotationKind
	Category  CategoryName // of a KEK
	// Compromised are the KEK versions that became known to others, if that is
	// why; Serve says whether what they wrapped is released all the same.
	Compromised []uint32
	Serve       bool
	Mode        CategoryMode // that a compromise puts the category into; zero: OPEN or FROZEN, by Serve
	// Hold is how long the rotation can be rolled back at least before it may
	// be retired. A compromised KEK has no hold.
	Hold  time.Duration
	Cause string
}

// Check says what is wrong with the order, or nil.
func (o RotationOrder) Check() error {
	if err := checkText(o.RequestID, MaxRequestIDSize); err != nil {
		return invalid("request_id", err)
	}
	if err := checkText(o.Cause, MaxCauseSize); err != nil {
		return invalid("cause", err)
	}
	if o.Hold < 0 || o.Hold > MEKPeriod {
		return invalid("hold", fmt.Errorf("%s: must be positive, a year at most", o.Hold))
	}
	switch o.Kind {
	case RotateKEK:
		if err := o.Category.Check(); err != nil {
			return invalid("category", err)
		}
	case RotateMEK:
		if o.Category != "" || len(o.Compromised) > 0 {
			return invalid("kind", errors.New("a MEK has no category and no compromised KEKs"))
		}
	default:
		return invalid("kind", fmt.Errorf("%q: must be %s or %s", o.Kind, RotateKEK, RotateMEK))
	}
	return nil
}

// modeAfter is the mode of a category after a compromise of its KEK.
func (o RotationOrder) modeAfter() CategoryMode {
	switch {
	case o.Mode != 0:
		return o.Mode
	case o.Serve:
		return CategoryOpen
	}
	return CategoryFrozen
}

// StartRotation makes the successor, has it protect from now on, and leaves
// the rest to RunRotations. An order with the request ID of one that there is
// already is that one.
func (c *Custodian) StartRotation(ctx context.Context, who Caller, o RotationOrder) (r Rotation, err error) {
	if err := o.Check(); err != nil {
		return r, err
	}
	err = c.ordered(ctx, who, actionRotationStart, o.RequestID, o.Category, o.text(), func(e audit.Entry) error {
		r, err = c.startRotation(ctx, o, e)
		return err
	})
	return r, err
}

// RollBackRotation makes the predecessor protect again; the records go back to
// it in the background. It is possible until the rotation is retired.
func (c *Custodian) RollBackRotation(ctx context.Context, who Caller, requestID, name string) (r Rotation, err error) {
	err = c.ordered(ctx, who, actionRotationRollBack, requestID, c.set.Load().rotations[name].Category, name, func(e audit.Entry) error {
		r, err = c.rollBack(ctx, name, e)
		return err
	})
	return r, err
}

// RetireRotation ends the hold of a rotation. It looks at every record first:
// while one refers to an old version, the answer is no.
func (c *Custodian) RetireRotation(ctx context.Context, who Caller, requestID, name string) (r Rotation, err error) {
	err = c.ordered(ctx, who, actionRotationRetire, requestID, c.set.Load().rotations[name].Category, name, func(e audit.Entry) error {
		r, err = c.retire(ctx, name, e)
		return err
	})
	return r, err
}

// What the audit log calls orders about a rotation.
const (
	actionRotationStart    = "rotation.start"
	actionRotationRollBack = "rotation.rollback"
	actionRotationRetire   = "rotation.retire"
)

// ordered does what an officer orders: decided, at a time that is believed, and
// written down. what says in the log what is about to be done.
func (c *Custodian) ordered(ctx context.Context, who Caller, action, requestID string, category CategoryName, what string, f func(audit.Entry) error) error {
	d := c.decide(who, ActionRotate, Resource{Category: category})
	if d.Allow && category == "" && !d.KnowIt {
		d.Allow, d.Err = false, ErrDenied // the MEK is every category's
	}
	err := d.Err
	if d.Allow {
		err = c.lookAtClock()
	}
	e := c.entry(c.set.Load(), who, d, Action(action), requestID, ref{category: category}, nil)
	e.Detail = what
	return c.administer(ctx, d, e, err, f)
}

// startRotation carries out an order that somebody has decided. e says who.
func (c *Custodian) startRotation(ctx context.Context, o RotationOrder, e audit.Entry) (Rotation, error) {
	if r, ok := c.set.Load().ordered(o.RequestID); ok {
		return r, nil
	}
	start := c.startKEK
	if o.Kind == RotateMEK {
		start = c.startMEK
	}
	r, err := start(ctx, o, e)
	if err == nil {
		c.rotations.wakeUp()
	}
	return r, err
}

func (s *controlSet) ordered(requestID string) (Rotation, bool) {
	for _, r := range s.rotations {
		if requestID != "" && r.RequestID == requestID {
			return r, true
		}
	}
	return Rotation{}, false
}

// startKEK makes the new KEK and activates it in one store update.
func (c *Custodian) startKEK(ctx context.Context, o RotationOrder, e audit.Entry) (Rotation, error) {
	set := c.set.Load()
	cat, ok := set.categories[o.Category]
	if !ok {
		return Rotation{}, fmt.Errorf("category %s: %w", o.Category, ErrCategoryNotFound)
	}
	if err := set.mayRotateKEK(o); err != nil {
		return Rotation{}, err
	}
	kek, err := c.newKEK(ctx, set, KEKID{cat.Name, set.nextKEK(cat.Name)}, cat.Providers)
	if err != nil {
		return Rotation{}, err
	}
	var r Rotation
	err = c.change(ctx, func(old *controlSet, now time.Time) (change, error) {
		if err := old.mayRotateKEK(o); err != nil {
			return change{}, err
		}
		if old.nextKEK(cat.Name) != kek.ID.Version {
			return change{}, fmt.Errorf("kek %s: another was made meanwhile: %w", kek.ID, ErrRotationState)
		}
		cat := old.categories[o.Category]
		r = Rotation{Kind: RotateKEK, Category: cat.Name, To: kek.ID.Version, Predecessor: cat.ActiveKEK, From: old.liveKEKs(cat.Name),
			Compromised: o.Compromised, Serve: o.Serve, Step: StepRewrap, Cause: o.Cause, RequestID: o.RequestID, StartTime: now, StepTime: now,
			HoldUntil: now.Add(o.Hold), Revision: 1}
		pred := old.keks[KEKID{cat.Name, cat.ActiveKEK}]
		pred.State, pred.DeactivateTime, pred.Revision = StateDeactivated, now, pred.Revision+1
		cat.ActiveKEK, cat.Revision = r.To, cat.Revision+1
		put := []ControlRecord{categoryRecord(cat)}
		if len(o.Compromised) > 0 {
			put = old.setMode(cat, o.modeAfter(), now)
		}
		e.Action, e.KeyVersion, e.Detail = actionRotationStart, kek.ID.String(), r.text()
		return change{put: append(put, kekRecord(pred), kekRecord(kek), rotationRecord(r)), entry: e}, nil
	})
	return r, err
}

// mayRotateKEK says why a category's KEK cannot be rotated now, or nil. A
// compromise waits for nobody.
func (s *controlSet) mayRotateKEK(o RotationOrder) error {
	for _, v := range o.Compromised {
		if _, ok := s.keks[KEKID{o.Category, v}]; !ok {
			return invalid("compromised", fmt.Errorf("kek %s does not exist", KEKID{o.Category, v}))
		}
	}
	for name, r := range s.rotations {
		if r.Kind == RotateKEK && r.Category == o.Category && !r.Step.over() && len(o.Compromised) == 0 {
			return fmt.Errorf("category %s: rotation %s is at %s; retire it or roll it back first: %w", o.Category, name, r.Step, ErrRotationState)
		}
	}
	return nil
}

// text is what the audit log says of a rotation.
func (r Rotation) text() string {
	return fmt.Sprintf("%s: from %v to %d", r.Name(), r.From, r.To) + r.why()
}

// text is what the audit log says of a rotation that is to begin.
func (o RotationOrder) text() string {
	why := Rotation{Compromised: o.Compromised, Serve: o.Serve, Cause: o.Cause}.why()
	if o.Kind == RotateMEK {
		return string(o.Kind) + why
	}
	return fmt.Sprintf("%s/%s%s", o.Kind, o.Category, why)
}

func (r Rotation) why() (t string) {
	if len(r.Compromised) > 0 {
		decision := "freeze"
		if r.Serve {
			decision = "go on serving"
		}
		t += fmt.Sprintf("; compromised %v, %s", r.Compromised, decision)
	}
	if r.Cause != "" {
		t += "; " + r.Cause
	}
	return t
}

// rollBack has the predecessor protect again.
func (c *Custodian) rollBack(ctx context.Context, name string, e audit.Entry) (Rotation, error) {
	var r Rotation
	err := c.change(ctx, func(old *controlSet, now time.Time) (change, error) {
		var ok bool
		if r, ok = old.rotations[name]; !ok {
			return change{}, invalid("name", fmt.Errorf("there is no rotation %q", name))
		}
		if r.Step == StepRollback || r.Step == StepRolledBack {
			return change{}, errNoChange
		}
		put, err := old.restorePredecessor(r, now)
		if err != nil {
			return change{}, fmt.Errorf("rotation %s: it cannot be rolled back: %w", name, err)
		}
		r.Step, r.StepTime, r.Total, r.Verified, r.Revision = StepRollback, now, 0, 0, r.Revision+1
		e.Action, e.Detail = actionRotationRollBack, r.text()
		return change{put: append(put, rotationRecord(r)), entry: e}, nil
	})
	if err == nil {
		c.rotations.wakeUp()
	}
	return r, err
}

// restorePredecessor are the records of what protects after a rollback.
func (s *controlSet) restorePredecessor(r Rotation, now time.Time) ([]ControlRecord, error) {
	switch {
	case r.Step.over():
		return nil, fmt.Errorf("it is at %s: %w", r.Step, ErrRotationState)
	case len(r.Compromised) > 0:
		return nil, fmt.Errorf("versions %v are compromised: %w", r.Compromised, ErrKeyCompromised)
	case r.Kind == RotateMEK:
		return s.restoreMEK(r, now)
	}
	cat, pred, succ := s.categories[r.Category], s.keks[KEKID{r.Category, r.Predecessor}], s.keks[KEKID{r.Category, r.To}]
	if cat.ActiveKEK != r.To {
		return nil, fmt.Errorf("version %d has followed: %w", cat.ActiveKEK, ErrRotationState)
	}
	if m := s.meks[pred.Wrapped.MEKVersion]; m.State != StateActive {
		return nil, fmt.Errorf("kek %s is under mek %s, which is %s: %w", pred.ID, m.Label, m.State, ErrRotationState)
	}
	cat.ActiveKEK, cat.Revision = r.Predecessor, cat.Revision+1
	pred.State, pred.DeactivateTime, pred.Revision = StateActive, time.Time{}, pred.Revision+1
	succ.State, succ.DeactivateTime, succ.Revision = StateDeactivated, now, succ.Revision+1
	return []ControlRecord{categoryRecord(cat), kekRecord(pred), kekRecord(succ)}, nil
}

// retire ends a rotation for good, once no record refers to an old version.
func (c *Custodian) retire(ctx context.Context, name string, e audit.Entry) (Rotation, error) {
	set := c.set.Load()
	r, ok := set.rotations[name]
	if !ok {
		return r, invalid("name", fmt.Errorf("there is no rotation %q", name))
	}
	if r.Step == StepRetired {
		return r, nil
	}
	if r.Step != StepHold && !(r.Step == StepVerify && len(r.Compromised) > 0) {
		return r, fmt.Errorf("rotation %s: it is at %s, and only what is verified and held can be retired: %w", name, r.Step, ErrRotationState)
	}
	if now := c.now(); now.Before(r.HoldUntil) && len(r.Compromised) == 0 {
		return r, fmt.Errorf("rotation %s: it can be rolled back until %s, and not be retired before: %w", name, r.HoldUntil.Format(time.RFC3339), ErrRotationState)
	}
	if err := c.noReference(ctx, set, r); err != nil {
		return r, fmt.Errorf("rotation %s: it cannot be retired: %w", name, err)
	}
	was := r.Step
	err := c.change(ctx, func(old *controlSet, now time.Time) (change, error) {
		r = old.rotations[name]
		if r.Step == StepRetired {
			return change{}, errNoChange
		}
		if r.Step != was {
			return change{}, fmt.Errorf("rotation %s: it is at %s now: %w", name, r.Step, ErrRotationState)
		}
		var put []ControlRecord
		for _, v := range r.Compromised {
			if k := old.keks[KEKID{r.Category, v}]; k.State != StateCompromised {
				k.State, k.Revision = StateCompromised, k.Revision+1
				put = append(put, kekRecord(k))
			}
		}
		r.Step, r.StepTime, r.Revision = StepRetired, now, r.Revision+1
		e.Action, e.Detail = actionRotationRetire, r.text()
		return change{put: append(put, rotationRecord(r)), entry: e}, nil
	})
	if err == nil {
		c.keys.forget(c.set.Load())
	}
	return r, err
}

// A RotationStatus is a rotation and how its work goes.
type RotationStatus struct {
	Name        string        `json:"name"`
	Kind        RotationKind  `json:"kind"`
	Category    CategoryName  `json:"category,omitempty"`
	From        []uint32      `json:"from"`
	To          uint32        `json:"to"`
	Compromised []uint32      `json:"compromised,omitempty"`
	Serve       bool          `json:"serve,omitempty"`
	Step        RotationStep  `json:"step"`
	Cause       string        `json:"cause,omitempty"`
	StartTime   time.Time     `json:"start_time"`
	StepTime    time.Time     `json:"step_time"`
	HoldUntil   time.Time     `json:"hold_until"`
	Done        uint64        `json:"done"`      // records, of the step under way
	Total       uint64        `json:"total"`     // records
	Rate        float64       `json:"rate"`      // records a second
	Remaining   time.Duration `json:"remaining"` // of the step, by that rate
	LastError   string        `json:"last_error,omitempty"`
}

// Status is what the record alone says.
func (r Rotation) Status() RotationStatus {
	return RotationStatus{Name: r.Name(), Kind: r.Kind, Category: r.Category, From: r.From, To: r.To, Compromised: r.Compromised, Serve: r.Serve,
		Step: r.Step, Cause: r.Cause, StartTime: r.StartTime, StepTime: r.StepTime, HoldUntil: r.HoldUntil, Total: r.Total, Done: r.Verified}
}

// Rotations lists the rotations that who may see, oldest first.
func (c *Custodian) Rotations(ctx context.Context, who Caller) ([]RotationStatus, error) {
	if d := c.decide(who, ActionReadRotations, Resource{}); !d.Allow {
		return nil, c.refuse(ctx, who, d, ActionReadRotations, ref{})
	}
	var out []RotationStatus
	for _, s := range c.rotationStatuses(c.set.Load()) {
		if c.decide(who, ActionReadRotations, Resource{Category: s.Category}).Allow {
			out = append(out, s)
		}
	}
	return out, nil
}

func (c *Custodian) rotationStatuses(set *controlSet) []RotationStatus {
	var out []RotationStatus
	for _, r := range set.rotations {
		s := r.Status()
		c.rotations.describe(&s)
		out = append(out, s)
	}
	slices.SortFunc(out, func(a, b RotationStatus) int {
		if d := a.StartTime.Compare(b.StartTime); d != 0 {
			return d
		}
		return strings.Compare(a.Name, b.Name)
	})
	return out
}

// rotations is what is known of the work under way. It is lost with the
// process, and found again by looking at the records.
type rotations struct {
	wake chan struct{} // of one place: there is something to do

	// mu guards the fields below.
	mu     sync.Mutex
	work   map[string]*progress
	faults map[string]error
}

// progress is one step of one rotation at work.
type progress struct {
	step        RotationStep
	done, total uint64
	began       time.Time // when done was first
	first       uint64
	last        time.Time
}

func newRotations() *rotations {
	return &rotations{wake: make(chan struct{}, 1), work: map[string]*progress{}, faults: map[string]error{}}
}

func (w *rotations) wakeUp() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// begin says that a step has begun, with done of total records behind it.
func (w *rotations) begin(name string, step RotationStep, done, total uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := time.Now()
	w.work[name] = &progress{step: step, done: done, first: done, total: total, began: now, last: now}
}

// add says that n more records are behind it.
func (w *rotations) add(name string, n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if p := w.work[name]; p != nil {
		p.done, p.last = p.done+uint64(n), time.Now()
	}
}

// note takes down how the last try of a rotation ended.
func (w *rotations) note(name string, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.faults[name] = err
	if err == nil {
		delete(w.work, name)
		delete(w.faults, name)
	}
}

func (w *rotations) describe(s *RotationStatus) {
	w.mu.Lock()
	defer w.mu.Unlock()
	s.LastError = text(w.faults[s.Name])
	p := w.work[s.Name]
	if p == nil || p.step != s.Step {
		return
	}
	s.Done, s.Total = p.done, p.total
	if took := p.last.Sub(p.began).Seconds(); took > 0 {
		s.Rate = float64(p.done-p.first) / took
	}
	if s.Rate > 0 && p.total > p.done {
		s.Remaining = time.Duration(float64(p.total-p.done) / s.Rate * float64(time.Second))
	}
}

// An exposure is a KEK version that became known to others, and the decision
// about what it has wrapped.
type exposure struct {
	version uint32
	serve   bool
	by      uint32 // the version that took its place; a later decision counts
}

// expose takes in which versions a rotation says are compromised.
func (s *controlSet) expose(r Rotation) {
	for _, v := range r.Compromised {
		list := slices.Clone(s.exposed[r.Category]) // the set before has it, too
		i := slices.IndexFunc(list, func(e exposure) bool { return e.version == v })
		switch {
		case i < 0:
			list = append(list, exposure{v, r.Serve, r.To})
		case list[i].by < r.To:
			list[i] = exposure{v, r.Serve, r.To}
		}
		s.exposed[r.Category] = list
	}
}

// compromised says whether a content key may have lain under a compromised
// KEK: every version from its birth to its present one counts. serve is the
// decision to release it all the same, which all of them must have.
func (s *controlSet) compromised(k *ContentKey) (exposed, serve bool) {
	serve = true
	for _, e := range s.exposed[k.Category] {
		if k.BirthKEK <= e.version && e.version <= k.KEK.Version {
			exposed, serve = true, serve && e.serve
		}
	}
	return exposed, exposed && serve
}
