package custodian

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/keycustody/custodian/internal/audit"
)

// Decisions about what a compromised KEK has wrapped, or a compromised caller was
// given: it goes on being released; its categories are frozen; or it goes on
// being released, and is issued to nobody until its content is re-keyed.
const (
	DecisionServe  = "serve"
	DecisionFreeze = "freeze"
	DecisionRekey  = "rekey"
)

// decisions are the modes that decisions put a category into.
var decisions = map[string]CategoryMode{DecisionServe: CategoryOpen, DecisionFreeze: CategoryFrozen, DecisionRekey: CategoryRekeyRequired}

// checkRotationFields says what is wrong with the fields of a plan that are
// about rotations.
func (p *Plan) checkRotationFields() (faults []error) {
	fault := func(field, format string, args ...any) {
		faults = append(faults, fmt.Errorf("%s: %w", field, fmt.Errorf(format, args...)))
	}
	if p.Hold != "" {
		if d, err := time.ParseDuration(p.Hold); err != nil || d < 0 || d > MEKPeriod {
			fault("hold", "%.40q: must be a duration of up to a year: 72h", p.Hold)
		}
	}
	if _, known := decisions[p.Decision]; p.Decision != "" && !known {
		fault("decision", "%.40q: must be %s, to go on serving what is exposed, %s, to serve it until it is re-keyed, or %s", p.Decision, DecisionServe, DecisionRekey, DecisionFreeze)
	}
	for i, text := range p.KeyVersions {
		id, err := ParseKEKID(text)
		if err != nil {
			fault(fmt.Sprintf("key_versions[%d]", i), "%w", err)
			continue
		}
		if first, err := ParseKEKID(p.KeyVersions[0]); err == nil && first.Category != id.Category {
			fault(fmt.Sprintf("key_versions[%d]", i), "%s: the decision is one category's; propose a plan for each", text)
		}
		if slices.Contains(p.KeyVersions[:i], text) {
			fault(fmt.Sprintf("key_versions[%d]", i), "%s is named twice", text)
		}
	}
	for i, name := range p.Rotations {
		if !rotationName(name) {
			fault(fmt.Sprintf("rotations[%d]", i), "%.80q: must be the name of a rotation: kek/movies/5, mek/2", name)
		}
		if slices.Contains(p.Rotations[:i], name) {
			fault(fmt.Sprintf("rotations[%d]", i), "%s is named twice", name)
		}
	}
	return faults
}

// ParseKEKID reads movies/4.
func ParseKEKID(s string) (KEKID, error) {
	name, version, _ := strings.Cut(s, "/")
	n, err := strconv.ParseUint(version, 10, 32)
	id := KEKID{CategoryName(name), uint32(n)}
	if err != nil || n == 0 || id.String() != s || id.Category.Check() != nil {
		return KEKID{}, fmt.Errorf("%.80q: must be a category and a version: movies/4", s)
	}
	return id, nil
}

func rotationName(s string) bool {
	if v, ok := strings.CutPrefix(s, string(RotateMEK)+"/"); ok {
		n, err := strconv.ParseUint(v, 10, 32)
		return err == nil && strconv.FormatUint(n, 10) == v
	}
	v, ok := strings.CutPrefix(s, string(RotateKEK)+"/")
	_, err := ParseKEKID(v)
	return ok && err == nil
}

// hold is how long what the plan begins can be rolled back at least.
func (p *Plan) hold() time.Duration {
	d, _ := time.ParseDuration(p.Hold) // checked by ParsePlan
	return d
}

// orders are the rotations that a plan begins. The request ID ties each to its
// ceremony: however often it is ordered, it is one.
func (p *Plan) orders(id string) (orders []RotationOrder) {
	order := RotationOrder{RequestID: about(id), Kind: RotateKEK, Hold: p.hold(), Cause: p.Reason}
	switch p.Kind {
	case KindMEKRotation:
		order.Kind = RotateMEK
		return []RotationOrder{order}
	case KindKEKCompromise:
		for _, text := range p.KeyVersions {
			k, _ := ParseKEKID(text) // checked by ParsePlan
			order.Category, order.Compromised = k.Category, append(order.Compromised, k.Version)
		}
		order.Serve, order.Mode = p.Decision != DecisionFreeze, decisions[p.Decision]
		return []RotationOrder{order}
	}
	for _, name := range p.Categories {
		order.Category, order.RequestID = name, about(id)+" "+string(name)
		orders = append(orders, order)
	}
	return orders
}

// ceremonyOf is the ceremony that a rotation belongs to; empty: none.
func (r Rotation) ceremonyOf() string {
	if rest, ok := strings.CutPrefix(r.RequestID, about("")); ok && len(rest) >= 16 {
		return rest[:16]
	}
	return ""
}

func checkRotate(ctx context.Context, c *Custodian, set *controlSet, p *Plan, r *Rehearsal) error {
	if _, err := set.activeMEK(c.now()); err != nil && p.Kind != KindMEKRotation {
		return refusePlan(ErrPlan, "a new KEK is needed: %v", err)
	}
	for _, o := range p.orders("") {
		if err := o.Check(); err != nil {
			return err
		}
		if o.Kind == RotateMEK {
			if err := checkRotateMEK(set, p, r); err != nil {
				return err
			}
			for name := range set.categories {
				if err := c.countCategory(ctx, set, name, r); err != nil {
					return err
				}
			}
			continue
		}
		cat, ok := set.categories[o.Category]
		if !ok {
			return refusePlan(ErrPlan, "there is no category %s", o.Category)
		}
		if err := set.mayRotateKEK(o); err != nil {
			return refusePlan(ErrPlan, "%v", err)
		}
		r.Changes = append(r.Changes, fmt.Sprintf("category %s gets key version %d in the place of %d, and every content key moves to it", cat.Name, set.nextKEK(cat.Name), cat.ActiveKEK))
		if len(o.Compromised) > 0 {
			if err := c.rehearseCompromise(ctx, o, r); err != nil {
				return err
			}
		}
		if err := c.countCategory(ctx, set, cat.Name, r); err != nil {
			return err
		}
	}
	return c.estimate(ctx, r)
}

func checkRotateMEK(set *controlSet, p *Plan, r *Rehearsal) error {
	if err := set.mayRotateMEK(); err != nil {
		return refusePlan(ErrPlan, "%v", err)
	}
	m := set.protectingMEK()
	if m.Version != p.MEKVersion {
		return refusePlan(ErrPlan, "the MEK that protects is version %d, and the plan is about %d", m.Version, p.MEKVersion)
	}
	how := "every KEK is re-wrapped in the token"
	if m.Profile == ProfileSealed {
		how = "every category gets a new KEK, and every content key moves to it"
	}
	r.Changes = append(r.Changes, fmt.Sprintf("a MEK of the profile %s takes the place of %s; %s", m.Profile, m.Label, how))
	return nil
}

// countCategory adds the content keys that will move.
func (c *Custodian) countCategory(ctx context.Context, set *controlSet, name CategoryName, r *Rehearsal) error {
	if m := set.protectingMEK(); r.Kind == KindMEKRotation && m.Profile == ProfileRotatable {
		return nil
	}
	var ids []KEKID
	for _, v := range set.liveKEKs(name) {
		ids = append(ids, KEKID{name, v})
	}
	n, err := c.countUnder(ctx, ids)
	r.ContentKeys += n
	return err
}

// rehearseCompromise says what a compromise means for the content keys.
func (c *Custodian) rehearseCompromise(ctx context.Context, o RotationOrder, r *Rehearsal) error {
	var n uint64
	err := c.eachKey(ctx, o.Category, func(page []SealedKey) error {
		for _, k := range page {
			if slices.ContainsFunc(o.Compromised, func(v uint32) bool { return k.Key.BirthKEK <= v && v <= k.Key.KEK.Version }) {
				n++
			}
		}
		return nil
	})
	what := "are not released any more, and the category stays frozen"
	switch o.Mode {
	case CategoryOpen:
		what = "go on being released, by this decision"
	case CategoryRekeyRequired:
		what = "go on being released, by this decision, and their content must be re-keyed before it is packaged again"
	}
	r.Changes = append(r.Changes, fmt.Sprintf("content keys of %s that count as compromised: %d; they %s", o.Category, n, what))
	return err
}

// estimate says about how long the content keys take: three operations of the
// token each (open, seal, verify), as fast as it is now.
func (c *Custodian) estimate(ctx context.Context, r *Rehearsal) error {
	const tries = 8
	began := time.Now()
	for range tries {
		if err := c.hsm.Health(ctx); err != nil {
			return err
		}
	}
	r.Duration = time.Duration(r.ContentKeys) * 3 * time.Since(began) / tries
	return nil
}

// beginRotations orders what the plan begins, and says whether all of it has
// come to its rest.
func beginRotations(ctx context.Context, c *Custodian, x Ceremony, p *Plan) (bool, error) {
	over := true
	for _, o := range p.orders(x.ID) {
		r, ordered := c.set.Load().ordered(o.RequestID)
		if !ordered {
			e := audit.Entry{Action: actionRotationStart, Caller: x.Executor, RequestID: o.RequestID, Category: string(o.Category), Detail: o.text()}
			if err := c.carryOut(ctx, e, func(end audit.Entry) (err error) { r, err = c.startRotation(ctx, o, end); return err }); err != nil {
				return false, err
			}
		}
		over = over && !r.Step.running()
	}
	return over, nil
}

func checkRetire(ctx context.Context, c *Custodian, set *controlSet, p *Plan, r *Rehearsal) error {
	for _, name := range p.Rotations {
		rot, ok := set.rotations[name]
		if !ok {
			return refusePlan(ErrPlan, "there is no rotation %s", name)
		}
		if rot.Step != StepHold {
			return refusePlan(ErrPlan, "rotation %s is at %s, and only what is verified and held can be retired", name, rot.Step)
		}
		if now := c.now(); now.Before(rot.HoldUntil) {
			return refusePlan(ErrPlan, "rotation %s can be rolled back until %s, and not be retired before", name, rot.HoldUntil.UTC().Format(time.RFC3339))
		}
		if err := c.noReference(ctx, set, rot); err != nil {
			return refusePlan(ErrPlan, "rotation %s cannot be retired: %v", name, err)
		}
		r.Changes = append(r.Changes, fmt.Sprintf("versions %v open nothing any more, and rotation %s cannot be rolled back", rot.From, name))
	}
	return nil
}

func retireRotations(ctx context.Context, c *Custodian, x Ceremony, p *Plan) (bool, error) {
	for _, name := range p.Rotations {
		r := c.set.Load().rotations[name]
		if r.Step == StepRetired {
			continue
		}
		e := audit.Entry{Action: actionRotationRetire, Caller: x.Executor, RequestID: about(x.ID), Category: string(r.Category), Detail: name}
		if err := c.carryOut(ctx, e, func(end audit.Entry) error { _, err := c.retire(ctx, name, end); return err }); err != nil {
			return false, err
		}
	}
	return true, nil
}

func checkRollBack(_ context.Context, c *Custodian, set *controlSet, p *Plan, r *Rehearsal) error {
	for _, name := range p.Rotations {
		rot, ok := set.rotations[name]
		if !ok {
			return refusePlan(ErrPlan, "there is no rotation %s", name)
		}
		if _, err := set.restorePredecessor(rot, c.now()); err != nil {
			return refusePlan(ErrPlan, "rotation %s cannot be rolled back: %v", name, err)
		}
		r.Changes = append(r.Changes, fmt.Sprintf("rotation %s is rolled back: version %d protects again", name, rot.Predecessor))
	}
	return nil
}

func rollBackRotations(ctx context.Context, c *Custodian, x Ceremony, p *Plan) (bool, error) {
	over := true
	for _, name := range p.Rotations {
		r := c.set.Load().rotations[name]
		if r.Step == StepRollback || r.Step == StepRolledBack {
			over = over && r.Step == StepRolledBack
			continue
		}
		e := audit.Entry{Action: actionRotationRollBack, Caller: x.Executor, RequestID: about(x.ID), Category: string(r.Category), Detail: name}
		if err := c.carryOut(ctx, e, func(end audit.Entry) error { _, err := c.rollBack(ctx, name, end); return err }); err != nil {
			return false, err
		}
		over = false
	}
	return over, nil
}

// progressOf is how far the rotations of a ceremony are.
func (c *Custodian) progressOf(set *controlSet, x Ceremony, p *Plan) (out []RotationStatus) {
	for _, s := range c.rotationStatuses(set) {
		if set.rotations[s.Name].ceremonyOf() == x.ID || slices.Contains(p.Rotations, s.Name) {
			out = append(out, s)
		}
	}
	return out
}

// rotationBasis is the state of the keys that a plan is about.
func (s *controlSet) rotationBasis(e *encoder, p *Plan) {
	if p.Kind == KindMEKRotation {
		for _, v := range s.liveMEKs() {
			e.uint(uint64(v))
			e.uint(uint64(s.meks[v].State))
		}
	}
	if p.Kind == KindDestroy && p.MEKVersion > 0 {
		e.uint(uint64(s.meks[p.MEKVersion].State))
	}
	for _, name := range p.Categories {
		e.str(string(name))
		e.uint(uint64(s.categories[name].ActiveKEK))
	}
	for _, text := range p.KeyVersions {
		id, _ := ParseKEKID(text) // checked by ParsePlan
		e.uint(uint64(s.keks[id].State))
	}
	for _, name := range p.Rotations {
		e.str(name)
		e.uint(uint64(s.rotations[name].Step))
		e.uint(uint64(s.rotations[name].Predecessor))
	}
}

// final says whether trying again cannot help.
func final(err error) bool {
	for _, again := range []error{ErrHSMUnavailable, ErrKMSUnavailable, ErrStoreUnavailable, ErrAuditBlocked, ErrDeadline, ErrClock, ErrChanged, ErrRate} {
		if errors.Is(err, again) {
			return false
		}
	}
	return ReasonOf(err) != "INTERNAL"
}
