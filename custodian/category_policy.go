package custodian

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
)

// A CategoryPolicy is what was decided for a category beside its mode. It is a
// control record of its own; a category need not have one.
type CategoryPolicy struct {
	Category CategoryName
	// RekeyUntil: where the mode is REKEY_REQUIRED, content keys that were made
	// up to it are issued to nobody until their content is re-keyed.
	RekeyUntil time.Time
	// Standing says that the next two fields are a standing approval for new
	// batches, in the place of the configuration's.
	Standing    bool
	DailyCap    uint32
	MinInterval time.Duration
	Revision    uint64
}

const (
	// ControlCategoryPolicy is a CategoryPolicy, by the category's name.
	ControlCategoryPolicy ControlKind = 13

	formCategoryPolicy = 15
)

func categoryPolicyRecord(p CategoryPolicy) ControlRecord {
	return ControlRecord{Kind: ControlCategoryPolicy, Name: string(p.Category), Body: encodeCategoryPolicy(p)}
}

func encodeCategoryPolicy(p CategoryPolicy) []byte {
	e := newEncoder(formCategoryPolicy, 96)
	e.str(string(p.Category))
	e.time(p.RekeyUntil)
	e.bool(p.Standing)
	e.uint(uint64(p.DailyCap))
	e.uint(uint64(p.MinInterval))
	e.uint(p.Revision)
	return e.b
}

func decodeCategoryPolicy(b []byte) (CategoryPolicy, error) {
	d := newDecoder(formCategoryPolicy, b)
	p := CategoryPolicy{Category: CategoryName(d.str()), RekeyUntil: d.time(), Standing: d.bool(), DailyCap: d.uint32(),
		MinInterval: time.Duration(d.uint()), Revision: d.uint()}
	return p, d.done("category policy record")
}

// PlanModes are the modes as plans and the audit log have them.
var PlanModes = map[string]CategoryMode{"open": CategoryOpen, "frozen": CategoryFrozen, "no-new": CategoryNoNew, "rekey-required": CategoryRekeyRequired}

// inWords is the mode as plans have it.
func (m CategoryMode) inWords() string {
	return strings.ReplaceAll(strings.ToLower(m.String()), "_", "-")
}

// A NewBatchPlan is a standing approval: new batches get KEK versions of their
// own within these bounds, and nobody is asked.
type NewBatchPlan struct {
	DailyCap    uint32 `yaml:"daily_cap" json:"daily_cap"`       // versions in 24 hours; 0: none at all
	MinInterval string `yaml:"min_interval" json:"min_interval"` // between two: 1h
}

func (p *Plan) checkCategoryPolicy() (faults []error) {
	if _, known := PlanModes[p.Mode]; p.Mode != "" && !known {
		faults = append(faults, fmt.Errorf("mode: %.40q: must be open, no-new, rekey-required or frozen", p.Mode))
	}
	if p.NewBatch != nil {
		if d, err := time.ParseDuration(p.NewBatch.MinInterval); err != nil || d < 0 || d > KEKMaxAge {
			faults = append(faults, fmt.Errorf("new_batch.min_interval: %.40q: must be a duration of two years at most: 1h", p.NewBatch.MinInterval))
		}
	}
	if p.Kind == KindCategoryPolicy && p.Mode == "" && p.NewBatch == nil {
		faults = append(faults, errors.New("mode: a plan of kind category-policy needs it, or new_batch"))
	}
	return faults
}

// setMode are the records of a category in a mode from now on.
func (s *controlSet) setMode(cat Category, m CategoryMode, now time.Time) []ControlRecord {
	cat.Mode, cat.Revision = m, cat.Revision+1
	put := []ControlRecord{categoryRecord(cat)}
	if m == CategoryRekeyRequired {
		p := s.policyFor(cat.Name)
		p.RekeyUntil, p.Revision = now, p.Revision+1
		put = append(put, categoryPolicyRecord(p))
	}
	return put
}

// policyFor is the policy of a category, or what it is without one.
func (s *controlSet) policyFor(name CategoryName) CategoryPolicy {
	p := s.categoryPolicies[name]
	p.Category = name
	return p
}

// standing is the standing approval for new batches of a category. Where there
// are officers it is theirs to give, and the configuration approves nothing.
func (s *controlSet) standing(config EventLimits, name CategoryName) EventLimits {
	switch p := s.categoryPolicies[name]; {
	case p.Standing:
		return EventLimits{DailyCap: int(p.DailyCap), MinInterval: p.MinInterval}
	case s.authority != nil:
		return EventLimits{}
	}
	return config
}

func checkCategoryPolicy(_ context.Context, _ *Custodian, set *controlSet, p *Plan, r *Rehearsal) error {
	for _, name := range p.Categories {
		cat, ok := set.categories[name]
		if !ok {
			return refusePlan(ErrPlan, "there is no category %s", name)
		}
		if m := PlanModes[p.Mode]; p.Mode != "" && cat.Mode == m {
			return refusePlan(ErrPlan, "category %s is %s already", name, p.Mode)
		}
		if p.Mode != "" {
			r.Changes = append(r.Changes, fmt.Sprintf("category %s goes from %s to %s: %s", name, cat.Mode.inWords(), p.Mode, modeMeans[PlanModes[p.Mode]]))
		}
		if b := p.NewBatch; b != nil {
			r.Changes = append(r.Changes, fmt.Sprintf("category %s: events of new batches make %d key versions in 24 hours at most, %s apart at least, and nobody is asked", name, b.DailyCap, b.MinInterval))
		}
	}
	return nil
}

// modeMeans says it to people.
var modeMeans = map[CategoryMode]string{
	CategoryOpen:          "keys are issued and released",
	CategoryFrozen:        "nothing is issued or released",
	CategoryNoNew:         "no new content key is made; those that exist are issued again and released",
	CategoryRekeyRequired: "content keys that exist are released, and issued to nobody until their content is re-keyed",
}

func applyCategoryPolicy(_ *Custodian, old *controlSet, p *Plan, now time.Time) (change, error) {
	var ch change
	for _, name := range p.Categories {
		policy := old.policyFor(name)
		if p.Mode != "" {
			cat := old.categories[name]
			cat.Mode, cat.Revision = PlanModes[p.Mode], cat.Revision+1
			ch.put = append(ch.put, categoryRecord(cat))
		}
		if p.Mode == CategoryRekeyRequired.inWords() {
			policy.RekeyUntil = now
		}
		if b := p.NewBatch; b != nil {
			interval, _ := time.ParseDuration(b.MinInterval) // checked by ParsePlan
			policy.Standing, policy.DailyCap, policy.MinInterval = true, b.DailyCap, interval
		}
		if policy != old.policyFor(name) {
			policy.Revision++
			ch.put = append(ch.put, categoryPolicyRecord(policy))
		}
	}
	return ch, nil
}

// forbids says why a category's mode forbids a purpose of the resource, or nil.
func (r Resource) forbids(p Purpose) error {
	switch r.Mode {
	case CategoryOpen:
		return nil
	case CategoryNoNew:
		if p == Protect && r.New {
			return fmt.Errorf("category %s takes no new content keys: %w", r.Category, ErrKeyState)
		}
		return nil
	case CategoryRekeyRequired:
		if p == Protect && r.Overdue {
			return fmt.Errorf("category %s: the content must be re-keyed first: %w", r.Category, ErrKeyCompromised)
		}
		return nil
	}
	return ErrCategoryFrozen
}

// overdue says whether a content key is to be re-keyed before it, or another
// one of its content, is issued.
func (s *controlSet) overdue(k *ContentKey) bool {
	return s.categories[k.Category].Mode == CategoryRekeyRequired && !k.CreateTime.After(s.categoryPolicies[k.Category].RekeyUntil) &&
		k.Generation >= s.generation(k.Category, k.ContentID)
}

// mayMake says why no new keys may be made for a content item, or nil. What
// changes after set is found when they are stored.
func (c *Custodian) mayMake(ctx context.Context, set *controlSet, who Caller, a Action, t terms, name CategoryName, id ContentID) error {
	r := Resource{Category: name, Mode: set.categories[name].Mode, New: true}
	if r.Mode == CategoryRekeyRequired {
		err := c.store.View(ctx, func(tx Tx) error {
			r.Overdue = false
			return tx.ContentKeys(name, id, nil, maxItemKeys, func(k SealedKey) error {
				r.Overdue = r.Overdue || set.overdue(&k.Key)
				return nil
			})
		})
		if err != nil {
			return err
		}
	}
	return c.decideLeaving(who, a, r, t).Err
}

// maxItemKeys is more than the keys that a content item can have: 2^31.
const maxItemKeys = 1 << 31
