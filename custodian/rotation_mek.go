package custodian

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/keycustody/custodian/internal/audit"
)

// controlBatch is how many control records one change gives new MACs.
const controlBatch = 200

// protectingMEK is the version that new keys are wrapped under, whether or not
// its year is over.
func (s *controlSet) protectingMEK() MEK {
	var latest MEK
	for v, m := range s.meks {
		if v > latest.Version && m.State == StateActive {
			latest = m
		}
	}
	return latest
}

// retiredMEK says whether a MEK version is gone, and with it every key that is
// wrapped under it.
func (s *controlSet) retiredMEK(version uint32) bool {
	for _, r := range s.rotations {
		if r.Kind == RotateMEK && slices.Contains(r.gone(), version) {
			return true
		}
	}
	return false
}

// mayRotateMEK says why the MEK cannot be rotated now, or nil.
func (s *controlSet) mayRotateMEK() error {
	for name, r := range s.rotations {
		if r.Kind == RotateMEK && !r.Step.over() {
			return fmt.Errorf("rotation %s is at %s; retire it or roll it back first: %w", name, r.Step, ErrRotationState)
		}
	}
	return nil
}

// startMEK names the successor, with a random ID, before it is made: a crash
// leaves no object in the token that nobody knows. The engine makes it.
func (c *Custodian) startMEK(ctx context.Context, o RotationOrder, e audit.Entry) (Rotation, error) {
	if err := c.set.Load().mayRotateMEK(); err != nil {
		return Rotation{}, err
	}
	objects, err := c.hsm.Objects(ctx)
	if err != nil {
		return Rotation{}, err
	}
	var id [16]byte
	if err := c.hsm.Random(ctx, id[:]); err != nil {
		return Rotation{}, err
	}
	var r Rotation
	err = c.change(ctx, func(old *controlSet, now time.Time) (change, error) {
		if err := old.mayRotateMEK(); err != nil {
			return change{}, err
		}
		pred := old.protectingMEK()
		m := MEK{ID: id, Profile: pred.Profile, State: StatePreActive, CreateTime: now, EndTime: now.Add(MEKPeriod), TokenSerial: c.hsm.Status().Serial, Revision: 1}
		m.Version, m.Label = old.nextMEK(c.prefix, objects)
		r = Rotation{Kind: RotateMEK, To: m.Version, Predecessor: pred.Version, From: old.liveMEKs(), Step: StepGenerate, Cause: o.Cause, RequestID: o.RequestID,
			StartTime: now, StepTime: now, HoldUntil: now.Add(o.Hold), Revision: 1}
		e.Action, e.Detail = actionRotationStart, fmt.Sprintf("%s; mek %s id %x profile %s", r.text(), m.Label, m.ID, m.Profile)
		return change{put: []ControlRecord{mekRecord(m), rotationRecord(r)}, entry: e}, nil
	})
	return r, err
}

// nextMEK is a version and a label that neither the store nor the token knows:
// after a restore, the token can hold a MEK of a later time than the store.
func (s *controlSet) nextMEK(prefix string, objects []TokenObject) (uint32, string) {
	var last uint32
	for v := range s.meks {
		last = max(last, v)
	}
	for v := last + 1; ; v++ {
		label := fmt.Sprintf("%s-v%d", prefix, v)
		if !slices.ContainsFunc(objects, func(o TokenObject) bool { return o.Label == label }) {
			return v, label
		}
	}
}

// liveMEKs are the versions that keys may be wrapped under.
func (s *controlSet) liveMEKs() (versions []uint32) {
	for v, m := range s.meks {
		if (m.State == StateActive || m.State == StateDeactivated) && !s.retiredMEK(v) {
			versions = append(versions, v)
		}
	}
	slices.Sort(versions)
	return versions
}

func (c *Custodian) advanceMEK(ctx context.Context, r Rotation) error {
	switch r.Step {
	case StepGenerate:
		return c.generateMEK(ctx, r)
	case StepRewrap, StepRollback:
		if err := c.moveToMEK(ctx, r); err != nil {
			return err
		}
		if r.Step == StepRewrap {
			return c.takeStep(ctx, r, StepVerify, nil)
		}
		n, err := c.verifyMEK(ctx, r)
		if err != nil {
			return err
		}
		return c.takeStep(ctx, r, StepRolledBack, func(r *Rotation) { r.Verified = n })
	case StepVerify:
		n, err := c.verifyMEK(ctx, r)
		if err != nil {
			return err
		}
		return c.takeStep(ctx, r, StepHold, func(r *Rotation) { r.Verified = n })
	}
	return fmt.Errorf("a MEK has nothing to do at %s", r.Step)
}

// generateMEK makes the MEK that the order has named, proves it, and activates
// it in one store update: successor ACTIVE, predecessor DEACTIVATED, and where
// the profile is sealed new helper keys with it, so that nothing is made under
// the new MEK that the old helpers have a part in.
func (c *Custodian) generateMEK(ctx context.Context, r Rotation) error {
	set := c.set.Load()
	m := set.meks[r.To]
	if err := c.makeMEK(ctx, m); err != nil {
		return err
	}
	var err error
	if m.Canary, err = c.hsm.NewMEKCanary(ctx, m); err != nil {
		return fmt.Errorf("mek %s: canary: %w", m.Label, err)
	}
	if err := c.hsm.CheckMEK(ctx, m); err != nil {
		return mekError(m, err)
	}
	m.State, m.Revision = StateActive, m.Revision+1
	var fresh []Helper
	if m.Profile == ProfileSealed {
		if fresh, err = c.newHelpers(ctx, set, m); err != nil {
			return err
		}
	}
	return c.change(ctx, func(old *controlSet, now time.Time) (change, error) {
		is := old.rotations[r.Name()]
		if is.Step != StepGenerate {
			return change{}, errStepped
		}
		pred := old.meks[is.Predecessor]
		pred.State, pred.Revision = StateDeactivated, pred.Revision+1
		is.Step, is.StepTime, is.Revision = StepRewrap, now, is.Revision+1
		put := []ControlRecord{mekRecord(m), mekRecord(pred), rotationRecord(is)}
		for _, h := range fresh {
			was, err := old.latestHelper(h.Purpose)
			if err != nil {
				return change{}, err
			}
			was.State, was.Revision = StateDeactivated, was.Revision+1
			put = append(put, helperRecord(was), helperRecord(h))
		}
		return change{put: put, entry: audit.Entry{Action: "rotation.activate", Detail: fmt.Sprintf("%s: mek %s id %x is proved and protects", r.Name(), m.Label, m.ID)}}, nil
	})
}

// makeMEK makes the token object of m, or adopts it whole from a try that was
// cut off. What is no whole key is removed first: nothing was ever wrapped
// under it.
func (c *Custodian) makeMEK(ctx context.Context, m MEK) error {
	err := c.hsm.GenerateMEK(ctx, m)
	if err == nil || errors.Is(err, ErrHSMUnavailable) || errors.Is(err, ErrDeadline) {
		return err
	}
	n, lerr := c.hsm.DestroyLeftovers(ctx, []string{m.Label}, [][16]byte{m.ID})
	if lerr != nil {
		return errors.Join(err, lerr)
	}
	c.log.Warn("removed what an interrupted rotation had left in the token", "objects", n, "err", err)
	return c.hsm.GenerateMEK(ctx, m)
}

// newHelpers makes the next version of every helper key under m.
func (c *Custodian) newHelpers(ctx context.Context, set *controlSet, m MEK) (fresh []Helper, err error) {
	for _, p := range HelperPurposes {
		h := Helper{Purpose: p, Version: set.nextHelper(p), State: StateActive, CreateTime: c.now(), Revision: 1}
		was, err := set.latestHelper(p)
		if err != nil {
			return nil, err
		}
		if h.Wrapped, err = c.keys.make(ctx, m, UseMAC, helperIdentity(set.head.StoreID, p, h.Version), providersOf(was.Wrapped)); err != nil {
			return nil, fmt.Errorf("helper key %s/%d: %w", p, h.Version, err)
		}
		fresh = append(fresh, h)
	}
	return fresh, nil
}

func (s *controlSet) nextHelper(p HelperPurpose) uint32 {
	var last uint32
	for id := range s.helpers {
		if id.purpose == p {
			last = max(last, id.version)
		}
	}
	return last + 1
}

// restoreMEK are the records of what protects after a MEK rotation is rolled
// back: the predecessor, its helper keys, and the newest KEK of each category
// that it wraps. Where a category has none, one will be made.
func (s *controlSet) restoreMEK(r Rotation, now time.Time) ([]ControlRecord, error) {
	pred, succ := s.meks[r.Predecessor], s.meks[r.To]
	if succ.State == StatePreActive {
		return nil, nil // the predecessor still protects
	}
	pred.State, pred.Revision = StateActive, pred.Revision+1
	succ.State, succ.Revision = StateDeactivated, succ.Revision+1
	put := []ControlRecord{mekRecord(pred), mekRecord(succ)}
	if pred.Profile == ProfileRotatable {
		return put, usableMEK(pred, Protect, now) // its keys are wrapped anew
	}
	for _, p := range HelperPurposes {
		var newest Helper
		for id, h := range s.helpers {
			if id.purpose == p && h.State == StateActive {
				h.State, h.Revision = StateDeactivated, h.Revision+1
				put = append(put, helperRecord(h))
			}
			if id.purpose == p && h.Wrapped.MEKVersion == pred.Version && id.version > newest.Version {
				newest = h
			}
		}
		newest.State, newest.Revision = StateActive, newest.Revision+1
		put = append(put, helperRecord(newest))
	}
	for name, cat := range s.categories {
		succ := s.keks[KEKID{name, cat.ActiveKEK}]
		if succ.Wrapped.MEKVersion == pred.Version {
			continue
		}
		back, ok := s.newestUnder(name, pred.Version)
		if !ok {
			if err := usableMEK(pred, Protect, now); err != nil {
				return nil, fmt.Errorf("category %s has no KEK under it: %w", name, err)
			}
			continue
		}
		cat.ActiveKEK, cat.Revision = back.ID.Version, cat.Revision+1
		back.State, back.DeactivateTime, back.Revision = StateActive, time.Time{}, back.Revision+1
		succ.State, succ.DeactivateTime, succ.Revision = StateDeactivated, now, succ.Revision+1
		put = append(put, categoryRecord(cat), kekRecord(back), kekRecord(succ))
	}
	return put, nil
}

// newestUnder is the newest KEK of a category that a MEK wraps and that can
// protect again.
func (s *controlSet) newestUnder(name CategoryName, mek uint32) (newest KEK, ok bool) {
	for _, v := range s.liveKEKs(name) {
		if k := s.keks[KEKID{name, v}]; k.Wrapped.MEKVersion == mek {
			newest, ok = k, true
		}
	}
	return newest, ok
}

// stale says whether something that is wrapped under a MEK version has to
// move: to the MEK that protects now.
func (s *controlSet) stale(mek uint32) bool { return mek != s.protectingMEK().Version }

// moveToMEK brings everything under the MEK that protects. Where the profile
// is rotatable, the wrapped keys move inside the token, and nothing else has
// to. Where it is sealed, each category gets a new KEK, its content keys move
// to that, and every control record gets a MAC of the new helper key.
func (c *Custodian) moveToMEK(ctx context.Context, r Rotation) error {
	if c.set.Load().protectingMEK().Profile == ProfileRotatable {
		return c.moveWrapped(ctx, r)
	}
	for {
		set := c.set.Load()
		cat, ok := set.staleCategory()
		if !ok {
			break
		}
		if err := c.rotateKEK(ctx, cat.Name, cat.ActiveKEK, set.nextKEK(cat.Name), r.Name()); err != nil {
			return fmt.Errorf("category %s: %w", cat.Name, err)
		}
		if err := c.at(r); err != nil {
			return err
		}
	}
	if err := c.moveKeys(ctx, r, (*controlSet).staleKEKs); err != nil {
		return err
	}
	return c.moveMACs(ctx, r)
}

// staleCategory is a category whose KEK is not under the MEK that protects.
func (s *controlSet) staleCategory() (Category, bool) {
	for name, cat := range s.categories {
		if s.stale(s.keks[KEKID{name, cat.ActiveKEK}].Wrapped.MEKVersion) {
			return cat, true
		}
	}
	return Category{}, false
}

// staleKEKs are the KEKs that are not under the MEK that protects, and that
// records may lie under.
func (s *controlSet) staleKEKs() (ids []KEKID) {
	for name := range s.categories {
		for _, v := range s.liveKEKs(name) {
			if id := (KEKID{name, v}); s.stale(s.keks[id].Wrapped.MEKVersion) {
				ids = append(ids, id)
			}
		}
	}
	return ids
}

// moveWrapped wraps every KEK and helper key anew, inside the token, under the
// MEK that protects, and around that by the providers that wrapped it before.
// Each is one change.
func (c *Custodian) moveWrapped(ctx context.Context, r Rotation) error {
	left := c.set.Load().staleWrapped()
	if total := uint64(len(left)); total > r.Total {
		if err := c.takeStep(ctx, r, r.Step, func(r *Rotation) { r.Total = total }); err != nil {
			return err
		}
		r.Total = total
	}
	c.rotations.begin(r.Name(), r.Step, r.Total-uint64(len(left)), r.Total)
	for _, id := range left {
		if err := c.at(r); err != nil {
			return err
		}
		if err := c.moveOne(ctx, r, id); err != nil {
			return err
		}
		c.rotations.add(r.Name(), 1)
	}
	return nil
}

// staleWrapped are the wrapped keys that are still in use and not under the
// MEK that protects.
func (s *controlSet) staleWrapped() (ids []keyID) {
	for h := range s.helpers {
		ids = append(ids, keyID{helper: h.purpose, version: h.version})
	}
	for k := range s.keks {
		ids = append(ids, keyID{kek: k.Category, version: k.Version})
	}
	return slices.DeleteFunc(ids, func(id keyID) bool {
		w, _, _, err := s.wrapped(id)
		return err != nil || !s.stale(w.MEKVersion)
	})
}

func (c *Custodian) moveOne(ctx context.Context, r Rotation, id keyID) error {
	set := c.set.Load()
	to := set.protectingMEK()
	if err := usableMEK(to, Protect, c.now()); err != nil {
		return err
	}
	moved, err := c.keys.rewrapUnder(ctx, set, id, to)
	if err != nil {
		return err
	}
	return c.change(ctx, func(old *controlSet, _ time.Time) (change, error) {
		was, _, _ := set.outerOf(id)
		is, _, _ := old.outerOf(id)
		// Another MEK protects meanwhile, or another provider wraps the key.
		if old.protectingMEK().Version != to.Version || is.MEKVersion != was.MEKVersion || !sameOuter(is.Outer, was.Outer) {
			return change{}, errStepped
		}
		e := audit.Entry{Action: "key.rewrap", Category: string(id.kek), KeyVersion: id.String(), Detail: fmt.Sprintf("%s: under mek %s", r.Name(), to.Label)}
		if id.helper != "" {
			h := old.helpers[helperID{id.helper, id.version}]
			h.Wrapped, h.Revision = moved, h.Revision+1
			return change{put: []ControlRecord{helperRecord(h)}, entry: e}, nil
		}
		k := old.keks[KEKID{id.kek, id.version}]
		k.Wrapped, k.Revision = moved, k.Revision+1
		return change{put: []ControlRecord{kekRecord(k)}, entry: e}, nil
	})
}

// moveMACs gives every control record a MAC of the newest helper key. Service
// does not stop: the records are the same.
func (c *Custodian) moveMACs(ctx context.Context, r Rotation) error {
	for more := true; more; {
		if err := c.at(r); err != nil {
			return err
		}
		err := c.change(ctx, func(old *controlSet, _ time.Time) (change, error) {
			h, err := old.latestHelper(HelperRecord)
			if err != nil {
				return change{}, err
			}
			var put []ControlRecord
			// Nobody changes control records while a change is built.
			err = c.eachControl(ctx, func(rec ControlRecord) error {
				if rec.MACVersion != h.Version && len(put) < controlBatch {
					put = append(put, rec)
				}
				return nil
			})
			if err != nil {
				return change{}, err
			}
			if more = len(put) > 0; !more {
				return change{}, errNoChange
			}
			return change{put: put, entry: audit.Entry{Action: "record.mac", Detail: fmt.Sprintf("%s: %d records under %s/%d", r.Name(), len(put), h.Purpose, h.Version)}}, nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (c *Custodian) eachControl(ctx context.Context, f func(ControlRecord) error) error {
	return c.store.View(ctx, func(tx Tx) error { return tx.Controls(f) })
}

// refersToMEK says whether a content key needs a MEK other than the one that
// protects, to be opened or to be told from others.
func refersToMEK(s *controlSet, k ContentKey) bool {
	return s.stale(s.keks[k.KEK].Wrapped.MEKVersion) || s.stale(s.helpers[helperID{HelperFingerprint, k.Fingerprint.Version}].Wrapped.MEKVersion)
}

// verifyMEK loads every wrapped key anew, as it is recorded now, and opens
// every content key with it.
func (c *Custodian) verifyMEK(ctx context.Context, r Rotation) (uint64, error) {
	set := c.set.Load()
	if err := c.noControlRefersToMEK(ctx, set); err != nil {
		return 0, err
	}
	for id := range set.helpers {
		if err := c.keys.prove(ctx, set, keyID{helper: id.purpose, version: id.version}); err != nil {
			return 0, err
		}
	}
	for id := range set.keks {
		if err := c.keys.prove(ctx, set, keyID{kek: id.Category, version: id.Version}); err != nil {
			return 0, err
		}
	}
	return c.verifyKeys(ctx, r, set.categoryNames(), refersToMEK)
}

func (s *controlSet) categoryNames() (names []CategoryName) {
	for name := range s.categories {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// noReferenceToMEK is noReference for a MEK.
func (c *Custodian) noReferenceToMEK(ctx context.Context, set *controlSet, r Rotation) error {
	if err := c.noControlRefersToMEK(ctx, set); err != nil {
		return err
	}
	left, err := c.countUnder(ctx, set.staleKEKs())
	if err != nil {
		return err
	}
	if left > 0 {
		return fmt.Errorf("%d content keys still refer to KEKs under meks %v: %w", left, r.From, ErrRotationState)
	}
	return c.noneRefers(ctx, set.categoryNames(), refersToMEK)
}

// noControlRefersToMEK proves that what protects is under the MEK that
// protects, and that every control record has a MAC of such a key.
func (c *Custodian) noControlRefersToMEK(ctx context.Context, set *controlSet) error {
	for _, p := range HelperPurposes {
		h, err := set.latestHelper(p)
		if err != nil {
			return err
		}
		if set.stale(h.Wrapped.MEKVersion) {
			return fmt.Errorf("helper key %s/%d is still under mek version %d: %w", p, h.Version, h.Wrapped.MEKVersion, ErrRotationState)
		}
	}
	if cat, found := set.staleCategory(); found {
		return fmt.Errorf("kek %s is still under an old mek: %w", KEKID{cat.Name, cat.ActiveKEK}, ErrRotationState)
	}
	if set.protectingMEK().Profile == ProfileRotatable {
		if left := set.staleWrapped(); len(left) > 0 {
			return fmt.Errorf("%s is still under an old mek: %w", left[0], ErrRotationState)
		}
	}
	return c.eachControl(ctx, func(rec ControlRecord) error {
		h := set.helpers[helperID{HelperRecord, rec.MACVersion}]
		if set.stale(h.Wrapped.MEKVersion) {
			return fmt.Errorf("control record %q still has a MAC of %s/%d, which is under an old mek: %w", rec.Name, HelperRecord, rec.MACVersion, ErrRotationState)
		}
		return nil
	})
}

// rewrapUnder moves a wrapped key to another MEK inside the token, and has the
// providers that wrapped it before wrap it again.
func (r *keyring) rewrapUnder(ctx context.Context, s *controlSet, id keyID, to MEK) (Wrapped, error) {
	w, ident, use, err := s.wrapped(id)
	if err != nil {
		return Wrapped{}, err
	}
	inner, err := r.openOuter(ctx, CallRewrap, id, w, ident)
	if err != nil {
		return Wrapped{}, err
	}
	moved, err := r.hsm.RewrapKey(ctx, s.meks[w.MEKVersion], to, use, ident, inner, w.Canary)
	if err != nil {
		return Wrapped{}, unwrapError(id.String(), err)
	}
	return r.wrapOuter(ctx, Wrapped{MEKVersion: to.Version, Canary: w.Canary}, moved, ident, providersOf(w))
}

// prove loads a key as it is recorded, whatever is loaded already. One that
// nobody may use has nothing to prove.
func (r *keyring) prove(ctx context.Context, s *controlSet, id keyID) error {
	if _, _, _, err := s.wrapped(id); err != nil {
		return nil
	}
	_, err := r.load(ctx, s, id)
	return err
}
