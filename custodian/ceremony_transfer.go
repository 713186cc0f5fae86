package custodian

import (
	"context"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Keys come in by Import and go out by Export. Where there are officers, a
// ceremony of kind import or export permits that, for the content items that its
// plan names, from its execution until the plan expires: the keys themselves
// cannot be in a plan, and come or go by a call of one officer. A permission is
// the record of the ceremony; there is no other.

// A PlanRecipient is to whom keys may be exported: a recipient of the
// configuration, and which certificate that has to be.
type PlanRecipient struct {
	Name        string `yaml:"name" json:"name"`
	Certificate string `yaml:"certificate" json:"certificate"` // its SHA-256, 64 hexadecimal digits
}

// String is as ExportRequest.Recipient and the audit log have it.
func (r PlanRecipient) String() string { return ExportRecipient(r.Name, r.Certificate) }

// ExportRecipient names somebody who takes keys by push, for ExportRequest: the
// name in the configuration, and the SHA-256 of the certificate.
func ExportRecipient(name, certificate string) string {
	return name + ", certificate " + certificate
}

// checkTransfer says what is wrong with what a plan lets in or out.
func (p *Plan) checkTransfer() (faults []error) {
	for i, text := range p.KIDs {
		kid, err := ParseKID(text)
		if err == nil && kid.String() != text {
			err = fmt.Errorf("%.40q: must be in lower case, 8-4-4-4-12 digits", text)
		}
		if err == nil && slices.Contains(p.KIDs[:i], text) {
			err = fmt.Errorf("%s is named twice", text)
		}
		if err != nil {
			faults = append(faults, fmt.Errorf("kids[%d]: %w", i, err))
		}
	}
	if len(p.KIDs) > maxPlanKIDs {
		faults = append(faults, fmt.Errorf("kids: %d: must be at most %d", len(p.KIDs), maxPlanKIDs))
	}
	if r := p.Recipient; r != nil {
		if err := printable(r.Name, 256); err != nil {
			faults = append(faults, fmt.Errorf("recipient.name: %w", err))
		}
		if b, err := hex.DecodeString(r.Certificate); err != nil || len(b) != 32 || strings.ToLower(r.Certificate) != r.Certificate {
			faults = append(faults, fmt.Errorf("recipient.certificate: %.80q: must be the SHA-256 of the certificate, 64 digits 0-9 a-f", r.Certificate))
		}
	}
	return faults
}

// maxPlanKIDs bounds the keys of one import plan: as many as one call brings.
const maxPlanKIDs = MaxKeysPerIssue

// checkPermit rehearses an import or an export.
func checkPermit(_ context.Context, _ *Custodian, set *controlSet, p *Plan, r *Rehearsal) error {
	if err := needOfficers(set); err != nil {
		return err
	}
	for _, named := range p.Content {
		item, err := named.item()
		if err != nil {
			return err
		}
		cat, ok := set.categories[item.category]
		if !ok {
			return refusePlan(ErrPlan, "there is no category %s", item.category)
		}
		if cat.Mode != CategoryOpen {
			return refusePlan(ErrPlan, "category %s is frozen: no key comes in or goes out", item.category)
		}
		if p.Kind == KindImport {
			r.Changes = append(r.Changes, fmt.Sprintf("an officer may import keys of content %s, of the %d that the plan names, until %s", item, len(p.KIDs), p.Expires))
		} else {
			r.Changes = append(r.Changes, fmt.Sprintf("an officer may export the keys of content %s to %s, until %s", item, p.Recipient, p.Expires))
		}
	}
	return nil
}

// A move is what an import or an export is about, and the ceremony that it is
// said to be permitted by.
type move struct {
	ceremony  string
	item      contentItem
	kids      []KID  // of an import
	recipient string // of an export
}

// permits says why the ceremony that a move names does not permit it, or nil.
func (s *controlSet) permits(a Action, m move, now time.Time) error {
	if m.ceremony == "" {
		return refusePlan(ErrQuorum, "the officers' quorum decides it, and no officer alone: name the ceremony that permits it")
	}
	x, ok := s.ceremonies[m.ceremony]
	if !ok {
		return ErrCeremonyNotFound
	}
	p, err := x.plan()
	if err != nil {
		return err
	}
	named := slices.ContainsFunc(p.Content, func(c PlanContent) bool { item, err := c.item(); return err == nil && item == m.item })
	switch {
	case p.Kind != map[Action]PlanKind{ActionImport: KindImport, ActionExport: KindExport}[a]:
		return refusePlan(ErrCeremonyState, "the ceremony is of kind %s, and permits no %s", p.Kind, a)
	case x.State != CeremonyDone:
		return refusePlan(ErrCeremonyState, "the ceremony is %s: it permits it once it is done", strings.ToLower(x.stateAt(now, p).String()))
	case !now.Before(p.ExpireTime()):
		return refusePlan(ErrCeremonyState, "what the ceremony permitted ended %s", p.Expires)
	case !named:
		return refusePlan(ErrCeremonyState, "the ceremony does not name content %s", m.item)
	case p.Kind == KindExport && m.recipient != "" && p.Recipient.String() != m.recipient: // to nobody, nothing goes anyhow
		return refusePlan(ErrCeremonyState, "the ceremony permits an export to %s, and to nobody else", p.Recipient)
	}
	for _, kid := range m.kids {
		if !slices.Contains(p.KIDs, kid.String()) {
			return refusePlan(ErrCeremonyState, "the ceremony does not name the key %s", kid)
		}
	}
	return nil
}

// detail begins the audit entries of a move.
func (m move) detail(text string) string {
	if m.ceremony == "" {
		return text
	}
	return strings.TrimSuffix(about(m.ceremony)+": "+text, ": ")
}

// mayMove decides whether keys of a content item may come in or go out. The
// terms are for what is decided about each of them later.
func (c *Custodian) mayMove(who Caller, a Action, m move) (Decision, terms, error) {
	set := c.set.Load()
	unpermitted := set.permits(a, m, c.now())
	t := terms{permitted: unpermitted == nil}
	name := m.item.category
	refused := func(d Decision) error {
		if ReasonOf(d.Err) == ReasonOf(ErrQuorum) {
			return unpermitted // it says more
		}
		return fmt.Errorf("category %s: %w", name, d.Err)
	}
	d := c.decideLeaving(who, a, Resource{Category: name}, t)
	if !d.Allow {
		return d, t, refused(d)
	}
	cat, ok := set.categories[name]
	if !ok {
		return d, t, fmt.Errorf("category %s: %w", name, ErrCategoryNotFound)
	}
	if d = c.decideLeaving(who, a, Resource{Category: name, Mode: cat.Mode}, t); !d.Allow {
		return d, t, refused(d)
	}
	return d, t, nil
}
