package custodian

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/keycustody/custodian/internal/audit"
)

// A Status is what custodianctl status shows. It names no key material.
type Status struct {
	Time            time.Time        `json:"time"`
	Started         time.Time        `json:"started"`
	StoreID         string           `json:"store_id"`
	ControlRevision uint64           `json:"control_revision"`
	Warnings        []string         `json:"warnings"`
	HSM             HSMStatus        `json:"hsm"`
	MEKs            []MEKStatus      `json:"meks"`
	Providers       []ProviderStatus `json:"providers"`
	Store           StoreStats       `json:"store"`
	Audit           AuditStatus      `json:"audit"`
	Categories      int              `json:"categories"`
	KEKsLoaded      int              `json:"keks_loaded"`
	KEKLoads        uint64           `json:"kek_loads"`
	CEKsInClear     int              `json:"ceks_in_clear"`
	Admission       AdmissionStats   `json:"admission"`
	Hot             HotStats         `json:"hot_titles"`
	Incidents       uint64           `json:"unknown_kid_incidents"`
	UnknownObjects  []TokenObject    `json:"unknown_token_objects"`
	Authority       string           `json:"authority"` // who may change policy
	Rewraps         []RewrapStatus   `json:"rewraps"`   // jobs that have not ended
	Rotations       []RotationStatus `json:"rotations"` // that have something left to do, or are held

	Conditions       string `json:"conditions"`        // the digest of those in force
	SignedConditions string `json:"signed_conditions"` // that of the officers'; "": the configuration decides
}

// A MEKStatus describes one MEK version.
type MEKStatus struct {
	Version    uint32     `json:"version"`
	Label      string     `json:"label"`
	Profile    MEKProfile `json:"profile"`
	State      State      `json:"state"`
	CreateTime time.Time  `json:"create_time"`
	EndTime    time.Time  `json:"end_time"`
	DaysLeft   int        `json:"days_left"`
	// Warning is the last of MEKWarnings that has come, in days; nil: none, or it
	// does not protect.
	Warning *int `json:"warning,omitempty"`
}

// An AuditStatus describes the audit log.
type AuditStatus struct {
	Entries uint64 `json:"entries"`
	Root    string `json:"root"`
	Blocked string `json:"blocked,omitempty"`
	Full    bool   `json:"full"` // blocked for want of room

	Segments  int    `json:"segments"`
	Pruned    uint64 `json:"pruned_entries"`
	Bytes     int64  `json:"bytes"`
	Limit     int64  `json:"limit"`     // bytes that it may have
	Watermark int    `json:"watermark"` // 80 or 95, in percent of the limit, or 0

	Anchors []AnchorStatus `json:"anchors,omitempty"`
}

// Status describes the daemon to who may know.
func (c *Custodian) Status(ctx context.Context, who Caller) (Status, error) {
	d := c.decide(who, ActionReadStatus, Resource{})
	if !d.Allow {
		_, err := c.record(ctx, c.entry(c.set.Load(), who, d, ActionReadStatus, "", ref{}, d.Err))
		return Status{}, errors.Join(d.Err, err)
	}
	return c.Snapshot(ctx)
}

// Snapshot is Status for the daemon's own metrics: it asks nobody.
func (c *Custodian) Snapshot(ctx context.Context) (Status, error) {
	set, now := c.set.Load(), c.now()
	stats, err := c.store.Stats(ctx)
	if err != nil {
		return Status{}, err
	}
	log := c.audit.Stats()
	root := c.audit.Root()
	s := Status{Time: now, Started: c.started, StoreID: fmt.Sprintf("%x", set.head.StoreID), ControlRevision: set.head.Revision,
		HSM: c.hsm.Status(), Store: stats, Categories: len(set.categories), KEKsLoaded: c.keys.count(), KEKLoads: c.keys.loads.Load(),
		CEKsInClear: c.arena.InUse(), Admission: c.Admission(), Hot: c.Hot(), Incidents: c.incidents.Load(), UnknownObjects: c.unknownObjects,
		Audit: AuditStatus{Entries: c.audit.Size(), Root: fmt.Sprintf("%x", root), Blocked: log.Blocked, Full: log.Full,
			Segments: log.Segments, Pruned: log.Pruned, Bytes: log.Bytes, Limit: log.Limit, Watermark: log.Watermark},
		Authority: set.authority.describe(), Rewraps: c.rewrapStatuses(set)}
	s.Conditions, s.SignedConditions = c.conditionsOf(set.authority)
	for _, m := range set.meks {
		st := MEKStatus{m.Version, m.Label, m.Profile, m.State, m.CreateTime, m.EndTime, int(m.EndTime.Sub(now).Hours() / 24), nil}
		if before, due := m.mekWarning(now); due && m.State == StateActive {
			days := int(before / (24 * time.Hour))
			st.Warning = &days
		}
		s.MEKs = append(s.MEKs, st)
	}
	slices.SortFunc(s.MEKs, func(a, b MEKStatus) int { return int(a.Version) - int(b.Version) })
	for _, r := range c.rotationStatuses(set) {
		if !r.Step.over() {
			s.Rotations = append(s.Rotations, r)
		}
	}
	for _, g := range c.keys.order {
		p := g.describe()
		p.KeyVersions, p.SoleKeyVersions = set.heldBy(p.Name)
		s.Providers = append(s.Providers, p)
	}
	if c.anchors != nil {
		s.Audit.Anchors = c.anchors.Status()
		if err := c.anchors.Blocked(); err != nil && s.Audit.Blocked == "" {
			s.Audit.Blocked = err.Error()
		}
	}
	s.Warnings = c.warnings(set, s)
	return s, nil
}

// heldBy counts the keys that a provider holds a wrap of, and those that nobody
// else does.
func (s *controlSet) heldBy(provider string) (all, alone int) {
	count := func(w Wrapped) {
		if slices.ContainsFunc(w.Outer, func(o OuterWrap) bool { return o.Provider == provider }) {
			all++
			if len(w.Outer) == 1 {
				alone++
			}
		}
	}
	for _, k := range s.keks {
		count(k.Wrapped)
	}
	for _, h := range s.helpers {
		count(h.Wrapped)
	}
	return all, alone
}

func (c *Custodian) warnings(set *controlSet, s Status) []string {
	w := c.ceremonyWarnings(set, s.Time)
	for _, f := range set.sortedFrozen() {
		w = append(w, fmt.Sprintf("caller %s is frozen since %s, by %s: %s", f.Identity, f.Time.Format(time.RFC3339), f.By, f.Cause))
	}
	officers := len(w)
	if hot := c.HotTitles(); len(hot) > 0 {
		w = append(w, fmt.Sprintf("opened content keys of %s are kept in clear for a while (limits.hot_titles); %d now", strings.Trim(fmt.Sprint(hot), "[]"), s.Hot.Kept))
	}
	for _, m := range s.MEKs {
		w = append(w, m.warnings(s)...)
	}
	for _, p := range s.Providers {
		w = append(w, p.warnings()...)
	}
	if len(c.policyOf(set).Budgets()) == 0 {
		w = append(w, "no budgets: nothing bounds how many different keys a caller takes")
	}
	for _, j := range s.Rewraps {
		if j.LastError != "" {
			w = append(w, fmt.Sprintf("outer wraps of %s: %d of %d keys are moved, and it does not go on: %s", scope(j.Category), j.Done, j.Total, j.LastError))
		}
	}
	for _, r := range s.Rotations {
		if r.LastError != "" {
			w = append(w, fmt.Sprintf("rotation %s: %s, %d of %d records, and it does not go on: %s", r.Name, r.Step, r.Done, r.Total, r.LastError))
		}
	}
	for id, k := range set.keks {
		if k.State == StateActive && k.Reserved >= c.limits.Soft {
			w = append(w, fmt.Sprintf("kek %s is past its soft limit of GCM invocations", id))
		}
	}
	if len(s.UnknownObjects) > 0 {
		w = append(w, fmt.Sprintf("%d objects in the token are not ours; they are never used", len(s.UnknownObjects)))
	}
	if err := c.believesClock(); err != nil {
		w = append(w, err.Error())
	}
	for _, a := range s.Audit.Anchors {
		if !a.Alert.IsZero() {
			w = append(w, fmt.Sprintf("anchor %s is %d entries behind the audit log, since %s: %s", a.Name, a.Lag, s.Time.Add(-a.LagTime).Format(time.RFC3339), a.LastError))
		}
	}
	if s.Audit.Watermark > 0 {
		w = append(w, fmt.Sprintf("the audit log is %d%% full: it has %d bytes, and room for %d; when it is full nothing is released", s.Audit.Watermark, s.Audit.Bytes, s.Audit.Limit))
	}
	if s.Audit.Blocked != "" {
		w = append(w, "the audit log is blocked, so nothing is released: "+s.Audit.Blocked)
	}
	if c.foreign != nil {
		w = append(w, c.foreign()...)
	}
	slices.Sort(w[officers:])
	return w
}

func (m MEKStatus) warnings(s Status) (w []string) {
	switch left := m.EndTime.Sub(s.Time); {
	case m.State != StateActive:
	case left <= 0:
		w = append(w, fmt.Sprintf("mek %s is past its year: no new KEK is made under it; rotate it", m.Label))
	case left <= MEKWarning:
		w = append(w, fmt.Sprintf("mek %s ends in %d days; plan its rotation", m.Label, m.DaysLeft))
	}
	if m.Profile == ProfileRotatable && !s.HSM.EnforcesTrusted {
		w = append(w, fmt.Sprintf("mek %s is rotatable on a token that does not enforce CKA_WRAP_WITH_TRUSTED: who has PIN and KMS could take a KEK out", m.Label))
	}
	return w
}

func (p ProviderStatus) warnings() (w []string) {
	if !p.OuterLayer {
		w = append(w, fmt.Sprintf("provider %s has no outer layer: the token alone opens what it wraps", p.Name))
	}
	switch {
	case p.Refused != "":
		w = append(w, fmt.Sprintf("provider %s refuses its key to us: loaded keys have no grace there: %s", p.Name, p.Refused))
	case p.LoginRefused != "":
		w = append(w, fmt.Sprintf("provider %s refuses our login: renew its credentials; loaded keys that need it have %s of grace left: %s",
			p.Name, p.GraceLeft.Round(time.Second), p.LoginRefused))
	case !p.AwaySince.IsZero():
		w = append(w, fmt.Sprintf("provider %s does not answer since %s; loaded keys that need it have %s of grace left",
			p.Name, p.AwaySince.Format(time.RFC3339), p.GraceLeft.Round(time.Second)))
	}
	return w
}

// Ready says whether keys can be served: nil, or why not. It makes one real
// token operation.
func (c *Custodian) Ready(ctx context.Context) error {
	if c.set.Load().sealed() {
		return fmt.Errorf("by the officers: %w", ErrSealed)
	}
	if b := c.audit.Stats().Blocked; b != "" {
		return fmt.Errorf("%s: %w", b, ErrAuditBlocked)
	}
	if err := c.anchored(); err != nil {
		return err
	}
	if err := c.hsm.Health(ctx); err != nil {
		return err
	}
	c.ProbeKMS(ctx)
	return c.keys.ready(c.set.Load())
}

// Categories lists the categories that who may see.
func (c *Custodian) Categories(ctx context.Context, who Caller) ([]Category, error) {
	set := c.set.Load()
	var out []Category
	for _, cat := range set.categories {
		if c.decide(who, ActionReadCategories, Resource{Category: cat.Name}).Allow {
			out = append(out, cat)
		}
	}
	if d := c.decide(who, ActionReadCategories, Resource{}); !d.Allow {
		return nil, c.refuse(ctx, who, d, ActionReadCategories, ref{})
	}
	slices.SortFunc(out, func(a, b Category) int { return strings.Compare(string(a.Name), string(b.Name)) })
	return out, nil
}

// refuse writes a refusal to the audit log and returns it.
func (c *Custodian) refuse(ctx context.Context, who Caller, d Decision, a Action, about ref) error {
	if _, err := c.record(ctx, c.entry(c.set.Load(), who, d, a, "", about, d.Err)); err != nil {
		return err
	}
	return d.Err
}

// KeyVersions lists the KEK versions of a category, oldest first.
func (c *Custodian) KeyVersions(ctx context.Context, who Caller, name CategoryName) ([]KEK, error) {
	if err := name.Check(); err != nil {
		return nil, invalid("category", err)
	}
	d := c.decide(who, ActionReadCategories, Resource{Category: name})
	if !d.Allow {
		return nil, c.refuse(ctx, who, d, ActionReadCategories, ref{category: name})
	}
	set := c.set.Load()
	if _, ok := set.categories[name]; !ok {
		return nil, fmt.Errorf("category %s: %w", name, ErrCategoryNotFound)
	}
	var out []KEK
	for id, k := range set.keks {
		if id.Category == name {
			out = append(out, k)
		}
	}
	slices.SortFunc(out, func(a, b KEK) int { return int(a.ID.Version) - int(b.ID.Version) })
	return out, nil
}

// A ContentKeyInfo is the metadata of a content key.
type ContentKeyInfo struct {
	ContentKey
	State State
}

// A ListRequest asks for the metadata of a category's content keys.
type ListRequest struct {
	Category  CategoryName
	ContentID ContentID // empty: of all content items
	PageSize  int       // 1 to 1000; zero: 100
	PageToken string    // of the page before
}

// ListContentKeys lists metadata, a page at a time. The next token is empty
// on the last page.
func (c *Custodian) ListContentKeys(ctx context.Context, who Caller, req ListRequest) (keys []ContentKeyInfo, next string, err error) {
	if err := req.Category.Check(); err != nil {
		return nil, "", invalid("category", err)
	}
	if req.PageSize < 0 || req.PageSize > 1000 {
		return nil, "", invalid("page_size", fmt.Errorf("%d: must be 1 to 1000", req.PageSize))
	}
	if req.PageSize == 0 {
		req.PageSize = 100
	}
	var after *NaturalKey
	if req.PageToken != "" {
		b, err := base64.RawURLEncoding.DecodeString(req.PageToken)
		if err != nil {
			return nil, "", invalid("page_token", errors.New("it is not one that we gave"))
		}
		k, err := DecodeContentKey(b)
		if err != nil {
			return nil, "", invalid("page_token", errors.New("it is not one that we gave"))
		}
		if k.Category != req.Category || len(req.ContentID) > 0 && !bytes.Equal(k.ContentID, req.ContentID) {
			return nil, "", invalid("page_token", errors.New("it belongs to another list"))
		}
		after = &k.NaturalKey
	}
	d := c.decide(who, ActionReadKeys, Resource{Category: req.Category})
	if !d.Allow {
		return nil, "", c.refuse(ctx, who, d, ActionReadKeys, ref{category: req.Category})
	}
	set := c.set.Load()
	if _, ok := set.categories[req.Category]; !ok {
		return nil, "", fmt.Errorf("category %s: %w", req.Category, ErrCategoryNotFound)
	}
	err = c.store.View(ctx, func(tx Tx) error {
		return tx.ContentKeys(req.Category, req.ContentID, after, req.PageSize+1, func(k SealedKey) error {
			keys = append(keys, ContentKeyInfo{k.Key, resourceOf(set, &k.Key).State})
			return nil
		})
	})
	if err != nil {
		return nil, "", deadline(ctx, err)
	}
	if len(keys) > req.PageSize {
		keys = keys[:req.PageSize]
		last := ContentKey{NaturalKey: keys[req.PageSize-1].NaturalKey}
		next = base64.RawURLEncoding.EncodeToString(EncodeContentKey(last))
	}
	return keys, next, nil
}

// DescribeContentKey returns the metadata of one content key.
func (c *Custodian) DescribeContentKey(ctx context.Context, who Caller, kid KID) (ContentKeyInfo, error) {
	var k SealedKey
	err := c.store.View(ctx, func(tx Tx) error {
		var err error
		k, err = tx.ContentKey(kid)
		return err
	})
	unknown := errors.Is(err, ErrNotFound)
	d := c.decide(who, ActionReadKeys, Resource{Category: k.Key.Category})
	if !d.Allow || !d.KnowIt && (unknown || errors.Is(err, ErrRecordCorrupt)) {
		d.Allow, d.Err = false, ErrDenied
		return ContentKeyInfo{}, c.refuse(ctx, who, d, ActionReadKeys, ref{kid: kid})
	}
	if unknown {
		return ContentKeyInfo{}, fmt.Errorf("content key %s: %w", kid, ErrKeyNotFound)
	}
	if err != nil {
		return ContentKeyInfo{}, deadline(ctx, err)
	}
	return ContentKeyInfo{k.Key, resourceOf(c.set.Load(), &k.Key).State}, nil
}

// A Receipt says where in the audit log a decision is written down. It is the
// log's own, under a name that a front door can use without knowing the log.
type Receipt = audit.Receipt
