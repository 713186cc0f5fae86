package custodian

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/keycustody/custodian/internal/audit"
)

// A kind is what one kind of ceremony does.
type kind struct {
	// check says everything that stands against the plan now, and what it would
	// change. It changes nothing.
	check func(ctx context.Context, c *Custodian, set *controlSet, p *Plan, r *Rehearsal) error
	// apply, if there is one, makes the records of the change. It has no effect
	// of its own.
	apply func(c *Custodian, old *controlSet, p *Plan, now time.Time) (change, error)
	// applied, if there is one, is called once the change holds.
	applied func(c *Custodian)
	// work, if there is one, does what takes its time, and says whether it has
	// come to its end. It is called again until then, and after a crash: what is
	// done already, it does not do again.
	work func(ctx context.Context, c *Custodian, x Ceremony, p *Plan) (bool, error)
}

// kinds are all kinds that can be proposed.
var kinds = map[PlanKind]kind{
	KindGenesis: {check: func(context.Context, *Custodian, *controlSet, *Plan, *Rehearsal) error {
		return refusePlan(ErrPlan, "a genesis happens once, before there is a store: custodiand init -plan FILE")
	}},
	KindRestore: {check: func(context.Context, *Custodian, *controlSet, *Plan, *Rehearsal) error {
		return refusePlan(ErrPlan, "a restore is done where there is no store: custodiand restore -plan FILE, with the approvals that custodianctl ceremony sign has made")
	}},
	KindOfficers: {check: checkNewOfficers, apply: applyOfficers},
	KindRecovery: {check: checkRecovery, apply: applyOfficers},
	KindPolicy:   {check: checkBundle, apply: applyBundle},
	KindUnfreeze: {check: checkUnfreeze, apply: applyUnfreeze},
	KindSeal:     {check: checkSeal, apply: applySeal, applied: (*Custodian).dropKeys},
	KindUnseal:   {check: checkSeal, apply: applySeal},

	KindProviders:     {check: checkMove, work: moveToProviders},
	KindKEKRotation:   {check: checkRotate, work: beginRotations},
	KindMEKRotation:   {check: checkRotate, work: beginRotations},
	KindKEKCompromise: {check: checkRotate, work: beginRotations},
	KindRollback:      {check: checkRollBack, work: rollBackRotations},
	KindRetire:        {check: checkRetire, work: retireRotations},

	KindImport: {check: checkPermit},
	KindExport: {check: checkPermit},

	KindCallerCompromise: {check: checkCallerCompromise, apply: applyCallerCompromise},
	KindDestroy:          {check: checkDestroy, work: destroyKeys},
	KindCategoryPolicy:   {check: checkCategoryPolicy, apply: applyCategoryPolicy},
	KindRekey:            {check: checkRekey, work: rekeyContent},
	KindWithdraw:         {check: checkRekey, work: rekeyContent},
}

// basis is the digest of what a plan stands on: who the officers are, and the
// state of each object that it names.
func (s *controlSet) basis(p *Plan) [32]byte {
	e := newEncoder(0, 1024)
	e.str(string(p.Kind))
	a := Authority{}
	if s.authority != nil {
		a = *s.authority
		a.Revision = 0
	}
	grants, signed, sealed := a.Grants, a.Conditions, a.Sealed
	a.Grants, a.Conditions, a.Sealed = nil, [32]byte{}, false
	e.bytes(encodeAuthority(a))
	switch p.Kind {
	case KindPolicy:
		e.grants(grants)
		if signed != [32]byte{} { // else as it was before there were any
			e.raw(signed[:])
		}
	case KindSeal, KindUnseal:
		e.bool(sealed)
	case KindUnfreeze, KindCallerCompromise:
		for _, name := range p.Categories {
			e.str(string(name))
			e.uint(uint64(s.categories[name].Mode))
		}
		for _, identity := range p.Callers {
			e.str(identity)
			e.time(s.frozenCallers[identity].Time)
		}
	}
	if p.Kind == KindProviders {
		for _, name := range p.Categories {
			e.str(string(name))
			e.str(names(s.categories[name].Providers))
		}
		if p.HelperKeys {
			e.str(names(s.helperProviders()))
		}
	}
	if p.Kind == KindCategoryPolicy {
		for _, name := range p.Categories {
			e.uint(uint64(s.categories[name].Mode))
			e.bytes(encodeCategoryPolicy(s.policyFor(name)))
		}
	}
	for _, named := range p.Content {
		item, _ := named.item() // checked by ParsePlan
		e.uint(uint64(s.rekeys[item].Generation))
		e.uint(uint64(s.rekeys[item].Withdrawn))
	}
	s.rotationBasis(e, p)
	return sha256.Sum256(e.b)
}

func needOfficers(set *controlSet) error {
	if set.authority == nil {
		return refusePlan(ErrPlan, "this custody has no officers: its configuration decides. Officers are named by the genesis plan of custodiand init")
	}
	return nil
}

func checkNewOfficers(_ context.Context, _ *Custodian, set *controlSet, p *Plan, r *Rehearsal) error {
	if err := needOfficers(set); err != nil {
		return err
	}
	if _, err := planPolicy(set.authority.Grants, p.Officers); err != nil {
		return refusePlan(ErrPlan, "the grants in force do not fit the new officers: %v", err)
	}
	was, is := *set.authority, *set.authority
	is.adopt(p)
	r.Changes = append(r.Changes, compareOfficers("officer", was.Officers, is.Officers)...)
	r.Changes = append(r.Changes, compareOfficers("recovery key", was.Recovery, is.Recovery)...)
	for _, k := range kindNames() {
		_, from := was.voters(PlanKind(k))
		if _, to := is.voters(PlanKind(k)); from != to && k != string(KindGenesis) {
			r.Changes = append(r.Changes, fmt.Sprintf("quorum of %s from %d to %d", k, from, to))
		}
	}
	if len(r.Changes) == 0 {
		return refusePlan(ErrPlan, "officers, quorum and recovery keys are as the plan has them already")
	}
	return nil
}

func compareOfficers(what string, was, is []Officer) (changes []string) {
	for _, o := range was {
		if !slices.Contains(is, o) {
			changes = append(changes, fmt.Sprintf("%s %s leaves, key %s", what, o.Name, keyName(o)))
		}
	}
	for _, o := range is {
		if !slices.Contains(was, o) {
			changes = append(changes, fmt.Sprintf("%s %s is new, key %s", what, o.Name, keyName(o)))
		}
	}
	return changes
}

// keyName is the SHA-256 of a public key, as people compare it.
func keyName(o Officer) string {
	h := o.keyHash()
	return hex.EncodeToString(h[:])
}

func checkRecovery(ctx context.Context, c *Custodian, set *controlSet, p *Plan, r *Rehearsal) error {
	if err := needOfficers(set); err != nil {
		return err
	}
	if set.authority.RecoveryQuorum == 0 {
		return refusePlan(ErrPlan, "this custody has no recovery keys")
	}
	for _, o := range p.Officers {
		if slices.ContainsFunc(set.authority.Recovery, func(k Officer) bool { return k.Key == o.Key || k.Name == o.Name }) {
			return refusePlan(ErrPlan, "officer %s: its name or its key is that of a recovery key", o.Name)
		}
	}
	return checkNewOfficers(ctx, c, set, p, r)
}

func applyOfficers(_ *Custodian, old *controlSet, p *Plan, _ time.Time) (change, error) {
	a := *old.authority
	a.adopt(p)
	a.Revision++
	return change{put: []ControlRecord{authorityRecord(a)}}, nil
}

func checkBundle(_ context.Context, c *Custodian, set *controlSet, p *Plan, r *Rehearsal) error {
	if err := needOfficers(set); err != nil {
		return err
	}
	if _, err := planPolicy(p.Grants, set.authority.Officers); err != nil {
		return refusePlan(ErrPlan, "the grants do not fit the officers: %v", err)
	}
	was, is := grantLines(set.authority.Grants), grantLines(p.Grants)
	for _, g := range missing(was, is) {
		r.Changes = append(r.Changes, "taken away: "+g)
	}
	for _, g := range missing(is, was) {
		r.Changes = append(r.Changes, "granted: "+g)
	}
	line, same := c.rehearseConditions(set.authority, p)
	if len(r.Changes) == 0 && same {
		return refusePlan(ErrPlan, "grants and conditions are as the plan has them already")
	}
	r.Changes = append(r.Changes, line)
	return nil
}

func grantLines(all []PlanGrant) (lines []string) {
	for _, g := range all {
		lines = append(lines, g.line())
	}
	return lines
}

// line says a grant to people.
func (g PlanGrant) line() string {
	line := fmt.Sprintf("%s as %s", g.Identity, g.Role)
	if len(g.Categories) > 0 {
		line += " for " + strings.Join(g.Categories, ", ")
	}
	if g.Reissue {
		line += ", with reissue"
	}
	if g.SPKI != "" {
		line += ", key " + g.SPKI
	}
	return line
}

// missing are the lines of a that b has not.
func missing(a, b []string) (lines []string) {
	for _, line := range a {
		if !slices.Contains(b, line) {
			lines = append(lines, line)
		}
	}
	return lines
}

func applyBundle(_ *Custodian, old *controlSet, p *Plan, _ time.Time) (change, error) {
	a := *old.authority
	a.Grants, a.Conditions = p.Grants, p.conditionsAfter(a.Conditions)
	a.Revision++
	return change{put: []ControlRecord{authorityRecord(a)}}, nil
}

func checkUnfreeze(_ context.Context, _ *Custodian, set *controlSet, p *Plan, r *Rehearsal) error {
	if err := needOfficers(set); err != nil {
		return err
	}
	for _, name := range p.Categories {
		cat, ok := set.categories[name]
		if !ok {
			return refusePlan(ErrPlan, "there is no category %s", name)
		}
		if cat.Mode != CategoryFrozen {
			return refusePlan(ErrPlan, "category %s is not frozen", name)
		}
		r.Changes = append(r.Changes, fmt.Sprintf("category %s is opened", name))
	}
	for _, identity := range p.Callers {
		f, ok := set.frozenCallers[identity]
		if !ok {
			return refusePlan(ErrPlan, "caller %s is not frozen", identity)
		}
		r.Changes = append(r.Changes, fmt.Sprintf("caller %s may call again; it is frozen since %s, by %s: %s", identity, f.Time.Format(time.RFC3339), f.By, f.Cause))
	}
	return nil
}

func applyUnfreeze(_ *Custodian, old *controlSet, p *Plan, _ time.Time) (change, error) {
	var ch change
	for _, name := range p.Categories {
		cat := old.categories[name]
		cat.Mode, cat.Revision = CategoryOpen, cat.Revision+1
		ch.put = append(ch.put, categoryRecord(cat))
	}
	for _, identity := range p.Callers {
		ch.remove = append(ch.remove, controlKey{ControlFrozenCaller, frozenCallerName(identity)})
	}
	return ch, nil
}

func checkSeal(_ context.Context, _ *Custodian, set *controlSet, p *Plan, r *Rehearsal) error {
	if err := needOfficers(set); err != nil {
		return err
	}
	if seal := p.Kind == KindSeal; seal == set.authority.Sealed {
		return refusePlan(ErrPlan, "the custody is %s already", map[bool]string{true: "sealed", false: "open"}[seal])
	}
	r.Changes = append(r.Changes, map[PlanKind]string{
		KindSeal:   "no key is issued or released any more, and no category made, until the custody is unsealed; loaded keys leave the token",
		KindUnseal: "keys are issued and released again",
	}[p.Kind])
	return nil
}

func applySeal(_ *Custodian, old *controlSet, p *Plan, _ time.Time) (change, error) {
	a := *old.authority
	a.Sealed = p.Kind == KindSeal
	a.Revision++
	return change{put: []ControlRecord{authorityRecord(a)}}, nil
}

func checkMove(_ context.Context, c *Custodian, set *controlSet, p *Plan, r *Rehearsal) error {
	if err := c.keys.configured(p.Providers); err != nil {
		return refusePlan(ErrPlan, "%v", err)
	}
	if was := set.helperProviders(); p.HelperKeys {
		if slices.Equal(was, p.Providers) {
			return refusePlan(ErrPlan, "the helper keys have these providers already")
		}
		r.Changes = append(r.Changes, fmt.Sprintf("the helper keys, without which no record is believed, move from %s to %s: %d keys get other outer wraps", names(was), names(p.Providers), len(set.rewrappable(""))))
	}
	for _, name := range p.Categories {
		cat, ok := set.categories[name]
		if !ok {
			return refusePlan(ErrPlan, "there is no category %s", name)
		}
		if slices.Equal(cat.Providers, p.Providers) {
			return refusePlan(ErrPlan, "category %s has these providers already", name)
		}
		r.Changes = append(r.Changes, fmt.Sprintf("category %s moves from %s to %s: %d KEK versions get other outer wraps", name, names(cat.Providers), names(p.Providers), len(set.rewrappable(name))))
	}
	return nil
}

// moveToProviders has the wraps of the categories moved, and says whether all
// of them have.
func moveToProviders(ctx context.Context, c *Custodian, x Ceremony, p *Plan) (bool, error) {
	moving := slices.Clone(p.Categories)
	if p.HelperKeys {
		moving = append(moving, "") // as jobs name them
	}
	over := true
	for _, name := range moving {
		if !slices.Equal(c.set.Load().providersWanted(name), p.Providers) {
			e := audit.Entry{Action: string(ActionSetProviders), Caller: x.Executor, RequestID: about(x.ID), Category: string(name),
				Detail: fmt.Sprintf("%s: to %s", scope(name), names(p.Providers))}
			if err := c.carryOut(ctx, e, func(end audit.Entry) error {
				_, err := c.putRewrap(ctx, end, name, c.toProviders(p.Providers, p.Reason))
				return err
			}); err != nil {
				return false, err
			}
			c.rewraps.wake()
		}
		_, left := c.set.Load().rewraps[name]
		over = over && !left
	}
	return over, nil
}

// providersWanted are those of a category, or of the helper keys where name is
// empty, once the jobs that have begun are done.
func (s *controlSet) providersWanted(name CategoryName) []string {
	if job, ok := s.rewraps[name]; ok {
		return job.Providers
	}
	if name == "" {
		return s.helperProviders()
	}
	return s.categories[name].Providers
}

// dropKeys takes every loaded KEK out of the token.
func (c *Custodian) dropKeys() { c.keys.dropKEKs() }

func (r *keyring) dropKEKs() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for id, l := range r.loaded {
		if id.kek != "" {
			delete(r.loaded, id)
			l.key.Release()
		}
	}
}

// A Snapshot is what evidence shows of the state before and after.
type Snapshot struct {
	MEKs       []MEKEvidence      `json:"meks"`
	Keys       []KeyEvidence      `json:"key_versions"`
	Categories []CategoryEvidence `json:"categories"`
	Rotations  []RotationEvidence `json:"rotations"`
	KEKsByMEK  map[uint32]int     `json:"key_versions_by_mek"` // how many each MEK wraps
	Officers   []Officer          `json:"officers"`
	Quorum     uint32             `json:"quorum"`
	Policy     string             `json:"policy"`               // digest of the grants
	Conditions string             `json:"conditions,omitempty"` // that the officers have signed
	Sealed     bool               `json:"sealed"`
	Callers    []CallerEvidence   `json:"callers,omitempty"`
	// Rekeyed and Withdrawn are the content items that the ceremony has raised the
	// generation of, and whose older keys it has withdrawn.
	Rekeyed   uint64 `json:"content_items_rekeyed,omitempty"`
	Withdrawn uint64 `json:"content_items_withdrawn,omitempty"`
	// ContentKeys is how many content keys the store has.
	ContentKeys uint64 `json:"content_keys"`
}

// A MEKEvidence is a MEK whose attributes and canary the token has just shown.
type MEKEvidence struct {
	Version    uint32            `json:"version"`
	Label      string            `json:"label"`
	ID         string            `json:"id"`
	State      string            `json:"state"`
	Profile    MEKProfile        `json:"profile"`
	EndTime    time.Time         `json:"end_time"`
	Attributes map[string]string `json:"attributes"`
	Canary     string            `json:"canary_sha256"` // of the canary that verified
}

// A KeyEvidence is a KEK version that a plan names.
type KeyEvidence struct {
	Key        string `json:"key"`
	State      string `json:"state"`
	MEKVersion uint32 `json:"mek_version"`
	Canary     string `json:"canary_sha256"`
}

// A CategoryEvidence is a category that a plan names.
type CategoryEvidence struct {
	Name      CategoryName  `json:"name"`
	Mode      string        `json:"mode"`
	Providers []string      `json:"providers"`
	ActiveKEK uint32        `json:"active_key_version"`
	Standing  *NewBatchPlan `json:"new_batch,omitempty"`
}

// A CallerEvidence is a caller that a plan names.
type CallerEvidence struct {
	Identity string `json:"identity"`
	Frozen   bool   `json:"frozen"`
	// Given is how many content keys the audit log says that it was given, of a
	// compromised one.
	Given uint64 `json:"content_keys_given,omitempty"`
}

// A RotationEvidence is a rotation of the ceremony.
type RotationEvidence struct {
	Name        string   `json:"name"`
	Step        string   `json:"step"`
	From        []uint32 `json:"from"`
	To          uint32   `json:"to"`
	Compromised []uint32 `json:"compromised"`
	Serve       bool     `json:"serve"`
	Moved       uint64   `json:"moved"`    // content keys
	Verified    uint64   `json:"verified"` // content keys that were opened after the move
}

// snapshot proves what the plan is about in the token, and describes it.
func (c *Custodian) snapshot(ctx context.Context, set *controlSet, x Ceremony, p *Plan) ([]byte, error) {
	s := Snapshot{MEKs: []MEKEvidence{}, Keys: []KeyEvidence{}, Categories: []CategoryEvidence{}, Officers: []Officer{},
		Rotations: []RotationEvidence{}, KEKsByMEK: map[uint32]int{}}
	for _, m := range set.meks {
		e := MEKEvidence{Version: m.Version, Label: m.Label, ID: hex.EncodeToString(m.ID[:]), State: m.State.String(), Profile: m.Profile, EndTime: m.EndTime}
		if len(m.Canary) > 0 { // a destroyed one has none
			e.Canary = sumText(m.Canary)
		}
		if m.State == StateActive || m.State == StateDeactivated {
			if err := c.hsm.CheckMEK(ctx, m); err != nil {
				return nil, mekError(m, err)
			}
			var err error
			if e.Attributes, err = c.hsm.MEKAttributes(ctx, m); err != nil {
				return nil, mekError(m, err)
			}
		}
		s.MEKs = append(s.MEKs, e)
	}
	slices.SortFunc(s.MEKs, func(a, b MEKEvidence) int { return int(a.Version) - int(b.Version) })
	for _, name := range p.Categories {
		cat := set.categories[name]
		e := CategoryEvidence{Name: name, Mode: cat.Mode.String(), Providers: cat.Providers, ActiveKEK: cat.ActiveKEK}
		if policy := set.policyFor(name); policy.Standing {
			e.Standing = &NewBatchPlan{policy.DailyCap, policy.MinInterval.String()}
		}
		s.Categories = append(s.Categories, e)
	}
	s.Rekeyed, s.Withdrawn = set.rekeyed(x.ID)
	for _, identity := range p.Callers {
		_, frozen := set.frozenCallers[identity]
		e := CallerEvidence{Identity: identity, Frozen: frozen}
		if p.Kind == KindCallerCompromise {
			given, err := c.handedOut(ctx, BlastRequest{Caller: identity})
			if err != nil {
				return nil, err
			}
			e.Given = uint64(len(given))
		}
		s.Callers = append(s.Callers, e)
	}
	for id, k := range set.keks {
		if k.State != StateDestroyed {
			s.KEKsByMEK[k.Wrapped.MEKVersion]++
		}
		if slices.Contains(p.Categories, id.Category) || slices.Contains(p.KeyVersions, id.String()) {
			canary := ""
			if len(k.Wrapped.Canary) > 0 { // a destroyed one has none
				canary = sumText(k.Wrapped.Canary)
			}
			s.Keys = append(s.Keys, KeyEvidence{k.ID.String(), k.State.String(), k.Wrapped.MEKVersion, canary})
		}
	}
	slices.SortFunc(s.Keys, func(a, b KeyEvidence) int { return strings.Compare(a.Key, b.Key) })
	for _, r := range c.progressOf(set, x, p) {
		s.Rotations = append(s.Rotations, RotationEvidence{r.Name, r.Step.String(), r.From, r.To, r.Compromised, r.Serve, set.rotations[r.Name].Total, set.rotations[r.Name].Verified})
	}
	if a := set.authority; a != nil {
		_, s.Quorum = a.voters(p.Kind)
		s.Officers, s.Sealed = a.Officers, a.Sealed
		if a.Conditions != [32]byte{} {
			s.Conditions = sayConditions(a.Conditions)
		}
	}
	digest := c.policyOf(set).Digest()
	s.Policy = hex.EncodeToString(digest[:])
	stats, err := c.store.Stats(ctx)
	if err != nil {
		return nil, err
	}
	s.ContentKeys = stats.ContentKeys
	return json.Marshal(s)
}

func sumText(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// A Genesis is the plan of a first start, which every officer has signed.
type Genesis struct {
	Plan      *Plan
	Approvals []Approval
}

// verify says what stands against the genesis.
func (g *Genesis) verify(now time.Time) error {
	challenge, err := g.Plan.OfflineChallenge()
	if err != nil {
		return err
	}
	if !now.Before(g.Plan.ExpireTime()) {
		return fmt.Errorf("the plan expired %s, and it is %s", g.Plan.Expires, now.UTC().Format(time.RFC3339))
	}
	var faults []error
	for _, a := range g.Approvals {
		i := slices.IndexFunc(g.Plan.Officers, func(o Officer) bool { return o.Key == a.Key })
		if i < 0 || !challenge.verify(ActApprove, g.Plan.Officers[i], a.Signature) {
			faults = append(faults, fmt.Errorf("the approval of %s is not that of an officer on this plan", a.Officer))
		}
	}
	for _, o := range g.Plan.Officers {
		if !has(g.Approvals, o.Key) {
			faults = append(faults, fmt.Errorf("officer %s has not signed; at genesis, all of them do", o.Name))
		}
	}
	if len(g.Approvals) > len(g.Plan.Officers) {
		faults = append(faults, errors.New("an officer has signed twice"))
	}
	return errors.Join(faults...)
}

// OfflineChallenge is what officers sign of a plan of genesis or restore: there
// is no daemon to ask, so the plan itself has the nonce.
func (p *Plan) OfflineChallenge() (Challenge, error) {
	text, ok := p.offlineNonce()
	if !ok {
		return Challenge{}, fmt.Errorf("the plan is of kind %s, and only %s and %s are signed without a daemon", p.Kind, KindGenesis, KindRestore)
	}
	nonce, err := hex.DecodeString(text)
	if err != nil {
		return Challenge{}, err
	}
	x := Ceremony{Nonce: [32]byte(nonce)}
	return x.challenge([16]byte{}, p), nil
}

// records are the first authority, and the ceremony, whose end the first start
// proves and writes down. The genesis is verified.
func (g *Genesis) records(now time.Time, logKey []byte) []ControlRecord {
	challenge, _ := g.Plan.OfflineChallenge()
	a := Authority{Grants: g.Plan.Grants, Conditions: g.Plan.conditionsAfter([32]byte{}), Revision: 1}
	a.adopt(g.Plan)
	x := Ceremony{Plan: string(g.Plan.Canonical()), State: CeremonyExecuted, Nonce: challenge.Nonce, LogKey: sha256.Sum256(logKey), Proposer: "custodiand init",
		ProposeTime: now, Needed: uint32(len(g.Plan.Officers)), Executor: "custodiand init", QuorumTime: now, ExecTime: now, Revision: 1}
	x.ID = hex.EncodeToString(x.Nonce[:8])
	for _, o := range g.Plan.Officers { // in the order of the plan, whatever the files' was
		i := slices.IndexFunc(g.Approvals, func(a Approval) bool { return a.Key == o.Key })
		x.Approvals = append(x.Approvals, Approval{Officer: o.Name, Key: o.Key, Time: now, Signature: g.Approvals[i].Signature})
	}
	return []ControlRecord{authorityRecord(a), ceremonyRecord(x)}
}
