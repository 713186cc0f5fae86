package custodian

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"
)

// An exposedTo is what a caller was given of a category.
type exposedTo struct {
	keys        uint64
	content     map[string]bool
	first, last time.Time
}

// givenTo sums up, by category, what a caller was given, as far back as the
// audit log goes. Keys that a restore has lost are under "".
func (c *Custodian) givenTo(ctx context.Context, identity string) (map[CategoryName]*exposedTo, error) {
	given, err := c.handedOut(ctx, BlastRequest{Caller: identity})
	if err != nil {
		return nil, err
	}
	sums := map[CategoryName]*exposedTo{}
	for kid, list := range given {
		k, _, err := c.storedKey(ctx, kid)
		if err != nil {
			return nil, err
		}
		s := sums[k.Category]
		if s == nil {
			s = &exposedTo{content: map[string]bool{}, first: list[0].First}
			sums[k.Category] = s
		}
		s.keys++
		s.content[string(k.ContentID)] = true
		for _, g := range list {
			if g.First.Before(s.first) {
				s.first = g.First
			}
			if g.Last.After(s.last) {
				s.last = g.Last
			}
		}
	}
	return sums, nil
}

// checkCallerCompromise wants the categories of which the callers were given
// keys to be named, where the decision touches them.
func checkCallerCompromise(ctx context.Context, c *Custodian, set *controlSet, p *Plan, r *Rehearsal) error {
	for _, name := range p.Categories {
		if _, ok := set.categories[name]; !ok {
			return refusePlan(ErrPlan, "there is no category %s", name)
		}
	}
	if p.Decision == DecisionServe && len(p.Categories) > 0 {
		return refusePlan(ErrPlan, "with the decision serve nothing becomes of categories: name none")
	}
	exposed := map[CategoryName]bool{}
	for _, identity := range p.Callers {
		sums, err := c.givenTo(ctx, identity)
		if err != nil {
			return err
		}
		_, frozen := set.frozenCallers[identity]
		switch roles := c.policyOf(set).rolesOf(identity); {
		case slices.Contains(roles, RoleOfficer):
			return refusePlan(ErrPlan, "caller %s is an officer's: a plan of kind policy takes its grant away", identity)
		case len(roles) == 0 && len(sums) == 0 && !frozen:
			return refusePlan(ErrPlan, "no grant names the caller %s, and the audit log does not know it", identity)
		}
		line := fmt.Sprintf("caller %s is refused everything", identity)
		if frozen {
			line = fmt.Sprintf("caller %s stays frozen", identity)
		}
		r.Changes = append(r.Changes, line)
		for _, name := range slices.Sorted(maps.Keys(sums)) {
			s := sums[name]
			if name == "" {
				r.Changes = append(r.Changes, fmt.Sprintf("it was given %d content keys that are not stored any more", s.keys))
				continue
			}
			exposed[name] = true
			r.Changes = append(r.Changes, fmt.Sprintf("it was given %d content keys of category %s, of %d content items, from %s to %s; they %s", s.keys, name, len(s.content),
				s.first.UTC().Format(time.RFC3339), s.last.UTC().Format(time.RFC3339), decisionMeans[p.Decision]))
		}
	}
	if n := c.audit.Stats().Pruned; n > 0 {
		r.Changes = append(r.Changes, fmt.Sprintf("the first %d entries of the audit log are pruned: what was given before is not known", n))
	}
	if p.Decision == DecisionServe {
		return nil
	}
	for _, name := range slices.Sorted(maps.Keys(exposed)) {
		if !slices.Contains(p.Categories, name) {
			return refusePlan(ErrPlan, "keys of category %s were given, too: name it", name)
		}
	}
	for _, name := range p.Categories {
		if !exposed[name] {
			return refusePlan(ErrPlan, "no key of category %s was given: do not name it", name)
		}
		r.Changes = append(r.Changes, fmt.Sprintf("category %s becomes %s: %s", name, decisions[p.Decision].inWords(), modeMeans[decisions[p.Decision]]))
	}
	return nil
}

// decisionMeans says it to people.
var decisionMeans = map[string]string{
	DecisionServe:  "go on being released, by this decision",
	DecisionFreeze: "are not released any more, because their category is frozen",
	DecisionRekey:  "go on being released, and are issued to nobody until their content is re-keyed",
}

func applyCallerCompromise(_ *Custodian, old *controlSet, p *Plan, now time.Time) (change, error) {
	ch := change{restricts: true}
	for _, identity := range p.Callers {
		if _, frozen := old.frozenCallers[identity]; !frozen {
			ch.put = append(ch.put, frozenCallerRecord(FrozenCaller{Identity: identity, By: "the officers' quorum", Cause: p.Reason, Time: now, Revision: 1}))
		}
	}
	for _, name := range p.Categories {
		ch.put = append(ch.put, old.setMode(old.categories[name], decisions[p.Decision], now)...)
	}
	return ch, nil
}
