package custodian

import (
	"context"
	"crypto/subtle"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/keycustody/custodian/internal/admission"
	"github.com/keycustody/custodian/internal/audit"
)

const (
	// moveBatch is how many content keys one store update moves.
	moveBatch = 160
	// putChunk is how many of them are put into it before whoever waits for a
	// processor has it.
	putChunk = 8
	// readPage and countPage are how many are read, and counted, before
	// whoever waits for a processor has it: some 200 µs.
	readPage  = 64
	countPage = 512
	// rotationPause is how long a rotation that failed is left alone at first,
	// and maxRotationPause in the end.
	rotationPause    = time.Second
	maxRotationPause = 5 * time.Minute
	// rotationLook is how often somebody looks whether there is work, who was
	// not woken up.
	rotationLook = time.Minute
)

// errStepped: the rotation is at another step than the work that goes on.
var errStepped = errors.New("the rotation has taken another step")

// RunRotations does what is left to do of all rotations, from the start of the
// process until ctx ends: moving records and verifying them. What a crash has
// cut off is done by the same code.
func (c *Custodian) RunRotations(ctx context.Context) {
	pause := rotationPause
	for {
		wait := rotationLook
		err := c.AdvanceRotations(ctx)
		if c.lookAtClock() == nil {
			err = errors.Join(err, c.rotateAged(ctx))
		}
		if err != nil && ctx.Err() == nil {
			c.log.Error("a rotation waits", "err", err, "again_in", pause.String())
			wait, pause = pause, min(2*pause, maxRotationPause)
		} else {
			pause = rotationPause
		}
		if err := c.finishCeremonies(ctx); err != nil && ctx.Err() == nil {
			c.log.Error("a ceremony is not finished", "err", err)
		}
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-c.rotations.wake:
			t.Stop()
		case <-t.C:
		}
	}
}

// AdvanceRotations does what can be done of all rotations now. One caller at a
// time: no record is moved by two.
func (c *Custodian) AdvanceRotations(ctx context.Context) error {
	failed := map[string]error{}
	for {
		r, ok := c.set.Load().nextRotation(failed)
		if !ok {
			break
		}
		err := c.lookAtClock()
		if err == nil {
			err = c.advance(ctx, r)
		}
		if errors.Is(err, errStepped) || errors.Is(err, ErrChanged) && ctx.Err() == nil {
			continue
		}
		if err != nil {
			err = fmt.Errorf("rotation %s: %s: %w", r.Name(), r.Step, deadline(ctx, err))
			failed[r.Name()] = err
		}
		c.rotations.note(r.Name(), err)
	}
	faults := make([]error, 0, len(failed))
	for _, err := range failed {
		faults = append(faults, err)
	}
	return errors.Join(faults...)
}

// nextRotation is the one to work on: what is compromised first, then the
// oldest. Those that failed are left out.
func (s *controlSet) nextRotation(failed map[string]error) (next Rotation, ok bool) {
	before := func(a, b Rotation) bool {
		if (len(a.Compromised) > 0) != (len(b.Compromised) > 0) {
			return len(a.Compromised) > 0
		}
		if d := a.StartTime.Compare(b.StartTime); d != 0 {
			return d < 0
		}
		return strings.Compare(a.Name(), b.Name()) < 0
	}
	for name, r := range s.rotations {
		if r.Step.running() && failed[name] == nil && (!ok || before(r, next)) {
			next, ok = r, true
		}
	}
	return next, ok
}

// advance does the work of one step and takes the next.
func (c *Custodian) advance(ctx context.Context, r Rotation) error {
	if r.Kind == RotateMEK {
		return c.advanceMEK(ctx, r)
	}
	switch r.Step {
	case StepRewrap:
		if err := c.moveKeys(ctx, r, func(set *controlSet) []KEKID { return r.sources() }); err != nil {
			return err
		}
		return c.takeStep(ctx, r, StepVerify, nil)
	case StepVerify:
		n, err := c.verifyKeys(ctx, r, []CategoryName{r.Category}, r.refersTo)
		if err != nil {
			return err
		}
		if len(r.Compromised) > 0 { // nobody goes back to what others know
			_, err := c.retire(ctx, r.Name(), audit.Entry{Category: string(r.Category)})
			return err
		}
		return c.takeStep(ctx, r, StepHold, func(r *Rotation) { r.Verified = n })
	case StepRollback:
		if err := c.moveKeys(ctx, r, func(set *controlSet) []KEKID { return r.sources() }); err != nil {
			return err
		}
		n, err := c.verifyKeys(ctx, r, []CategoryName{r.Category}, r.refersTo)
		if err != nil {
			return err
		}
		return c.takeStep(ctx, r, StepRolledBack, func(r *Rotation) { r.Verified = n })
	}
	return fmt.Errorf("a KEK has nothing to do at %s", r.Step)
}

// sources are the KEK versions that records are moved away from.
func (r Rotation) sources() []KEKID {
	if r.Step == StepRollback {
		return []KEKID{{r.Category, r.To}}
	}
	ids := make([]KEKID, len(r.From))
	for i, v := range r.From {
		ids[i] = KEKID{r.Category, v}
	}
	return ids
}

// refersTo says whether a content key still lies under what loses its records.
func (r Rotation) refersTo(_ *controlSet, k ContentKey) bool {
	return slices.Contains(r.sources(), k.KEK)
}

// takeStep moves a rotation on, if it is still where r says it is.
func (c *Custodian) takeStep(ctx context.Context, r Rotation, to RotationStep, set func(*Rotation)) error {
	return c.change(ctx, func(old *controlSet, now time.Time) (change, error) {
		is := old.rotations[r.Name()]
		if is.Step != r.Step {
			return change{}, errStepped
		}
		is.Step, is.StepTime, is.Revision = to, now, is.Revision+1
		if set != nil {
			set(&is)
		}
		return change{put: []ControlRecord{rotationRecord(is)}, entry: audit.Entry{Action: "rotation." + strings.ToLower(to.String()),
			Category: string(r.Category), Detail: fmt.Sprintf("%s: %d moved, %d verified", r.Name(), is.Total, is.Verified)}}, nil
	})
}

// at says whether a rotation is still at the step of the work that goes on.
func (c *Custodian) at(r Rotation) error {
	if c.set.Load().rotations[r.Name()].Step != r.Step {
		return errStepped
	}
	return nil
}

// moveKeys seals every content key that lies under one of the sources anew,
// under the KEK that its category protects with now. What is left to do is
// read from the records themselves, so it may be cut off anywhere.
func (c *Custodian) moveKeys(ctx context.Context, r Rotation, sources func(*controlSet) []KEKID) error {
	left, err := c.countUnder(ctx, sources(c.set.Load()))
	if err != nil {
		return err
	}
	if left > r.Total { // at the first try; later ones find less
		if err := c.takeStep(ctx, r, r.Step, func(r *Rotation) { r.Total = left }); err != nil {
			return err
		}
		r.Total = left
	}
	c.rotations.begin(r.Name(), r.Step, r.Total-left, r.Total)
	var faults []error
	for _, id := range sources(c.set.Load()) {
		unfit, err := c.moveKEK(ctx, r, id)
		if err != nil {
			return err
		}
		faults = append(faults, unfit...)
	}
	if len(faults) > 0 {
		return fmt.Errorf("%d content keys cannot be moved, and the old version cannot be retired before they are restored: %w", len(faults), faults[0])
	}
	return nil
}

func (c *Custodian) countUnder(ctx context.Context, ids []KEKID) (n uint64, err error) {
	for _, id := range ids {
		var after KID
		for more := true; more; {
			admission.StandBack()
			var kids []KID
			if err := c.store.View(ctx, func(tx Tx) error { kids, err = tx.KeysUnderKEK(id, after, countPage); return err }); err != nil {
				return 0, err
			}
			n += uint64(len(kids))
			if more = len(kids) == countPage; more {
				after = kids[countPage-1]
			}
		}
	}
	return n, nil
}

// moveKEK moves the content keys away from one KEK version. While one batch is
// being stored, the token seals the next. unfit are records that do not open:
// they stay where they are.
func (c *Custodian) moveKEK(ctx context.Context, r Rotation, id KEKID) (unfit []error, err error) {
	var after KID
	var storing chan error // the batch before; nil: none
	stored := func() error {
		if storing == nil {
			return nil
		}
		err := <-storing
		storing = nil
		return err
	}
	defer func() { err = errors.Join(err, stored()) }()
	for {
		if err := c.at(r); err != nil {
			return unfit, err
		}
		batch, faults, last, err := c.sealBatch(ctx, id, after)
		unfit = append(unfit, faults...)
		if serr := stored(); err != nil || serr != nil {
			return unfit, errors.Join(err, serr)
		}
		if last.IsZero() {
			return unfit, nil
		}
		after, storing = last, make(chan error, 1)
		go func(done chan<- error) {
			_, err := c.storeBatch(ctx, batch)
			if err == nil {
				c.rotations.add(r.Name(), len(batch.keys))
			}
			done <- err
		}(storing)
	}
}

// A movedBatch is content keys that are sealed anew and not stored yet.
type movedBatch struct {
	to   KEKID
	set  *controlSet
	keys []SealedKey
}

// sealBatch reads up to a batch of content keys behind after and seals them
// anew: for each the token opens, seals and opens again. last is the KID of
// the last one; zero where there is none left.
func (c *Custodian) sealBatch(ctx context.Context, id KEKID, after KID) (b movedBatch, unfit []error, last KID, err error) {
	var old []SealedKey
	err = c.store.View(ctx, func(tx Tx) error {
		kids, err := tx.KeysUnderKEK(id, after, moveBatch)
		for _, kid := range kids {
			last = kid
			k, err := tx.ContentKey(kid)
			if err != nil && !errors.Is(err, ErrNotFound) && !errors.Is(err, ErrRecordCorrupt) {
				return err
			}
			if err == nil && k.Key.KEK != id {
				err = fmt.Errorf("content key %s: it is sealed under %s, and indexed under %s: %w", kid, k.Key.KEK, id, ErrRecordCorrupt)
			}
			if err != nil {
				unfit = append(unfit, err)
				continue
			}
			old = append(old, k)
		}
		return err
	})
	if err != nil || len(old) == 0 {
		return b, unfit, last, err
	}
	if c.limiter != nil {
		if err := c.limiter.WaitN(ctx, len(old)); err != nil {
			return b, unfit, last, fmt.Errorf("%w: %w", err, ErrDeadline)
		}
	}
	if b.to, b.set, err = c.reserve(ctx, id.Category, uint64(len(old))); err != nil {
		return b, unfit, last, err
	}
	admission.StandBack()
	moved, faults, err := c.reseal(ctx, b.set, id, b.to, old)
	b.keys = moved
	return b, append(unfit, faults...), last, err
}

// reseal moves content keys from one KEK to another. Those whose fingerprints
// are of a helper key that was replaced get new ones, for which they are opened;
// the others leave the token only sealed.
func (c *Custodian) reseal(ctx context.Context, set *controlSet, from, to KEKID, old []SealedKey) (moved []SealedKey, unfit []error, err error) {
	h, err := set.latestHelper(HelperFingerprint)
	if err != nil {
		return nil, nil, err
	}
	var keys []SealedKey
	var items []Resealing
	for _, k := range old {
		is := SealedKey{Key: k.Key}
		is.Key.KEK, is.Key.Revision = to, k.Key.Revision+1
		if k.Key.Fingerprint.Version != h.Version {
			admission.StandBack()
			is, err = c.sealAnew(ctx, set, k, func(is *ContentKey) { is.KEK = to })
			switch {
			case errors.Is(err, ErrRecordCorrupt):
				unfit = append(unfit, err)
			case err != nil:
				return nil, unfit, err
			default:
				moved = append(moved, is)
			}
			continue
		}
		if err := k.checkSize(); err != nil {
			unfit = append(unfit, err)
			continue
		}
		is.Body = EncodeContentKey(is.Key)
		keys = append(keys, is)
		items = append(items, Resealing{IV: k.IV, AAD: associatedData(set.head.StoreID, k.Body), Sealed: k.Sealed, To: associatedData(set.head.StoreID, is.Body)})
	}
	for len(items) > 0 {
		n := 0
		_, err := c.keys.withKEK(ctx, set, from, func(source Key) error {
			_, err := c.keys.withKEK(ctx, set, to, func(target Key) (err error) {
				n, err = source.Reseal(ctx, target, items)
				return err
			})
			return err
		})
		if err != nil && !errors.Is(err, ErrAuth) {
			return nil, unfit, fmt.Errorf("content key %s and %d more: kek %s: %w", keys[0].Key.KID, len(keys)-1, from, deadline(ctx, err))
		}
		for i := range n {
			keys[i].IV, keys[i].Sealed = items[i].IV, items[i].Sealed
		}
		moved, keys, items = append(moved, keys[:n]...), keys[n:], items[n:]
		if err != nil {
			unfit = append(unfit, fmt.Errorf("content key %s: kek %s: %w", keys[0].Key.KID, from, corrupt("sealed key", err)))
			keys, items = keys[1:], items[1:]
		}
	}
	return moved, unfit, nil
}

// sealAnew opens a content key and seals it as what change makes of it. Its
// birth version, and all else that it is, stay.
func (c *Custodian) sealAnew(ctx context.Context, set *controlSet, old SealedKey, change func(*ContentKey)) (SealedKey, error) {
	cek, _, err := c.openCEK(ctx, set, old)
	if err != nil {
		return SealedKey{}, err
	}
	defer cek.Destroy()
	k := SealedKey{Key: old.Key}
	k.Key.Revision = old.Key.Revision + 1
	change(&k.Key)
	cek.Use(func(b []byte) { _, err = c.sealCEK(ctx, set, &k, b, false) })
	if err != nil {
		return SealedKey{}, fmt.Errorf("content key %s: %w", old.Key.KID, err)
	}
	return k, nil
}

// storeBatch puts a batch in the place of the old records, if its KEK still
// protects. sequence is the store's after it.
func (c *Custodian) storeBatch(ctx context.Context, b movedBatch) (sequence uint64, err error) {
	if len(b.keys) == 0 {
		return 0, nil
	}
	err = c.store.Update(ctx, func(tx UpdateTx) error {
		cat, err := categoryIn(tx, b.to.Category)
		if err != nil {
			return err
		}
		if cat.ActiveKEK != b.to.Version {
			return fmt.Errorf("kek %s: %w", b.to, ErrChanged)
		}
		for i, k := range b.keys {
			if i%putChunk == 0 {
				admission.StandBack()
			}
			if err := tx.ReplaceContentKey(k.Key.Revision-1, k); err != nil {
				return err
			}
		}
		sequence = tx.Sequence()
		return nil
	})
	return sequence, err
}

// verifyKeys opens every content key of the categories and holds it against
// the fingerprint that it was born with. One that is stale, or that does not
// open, ends the step with an error that counts them all.
func (c *Custodian) verifyKeys(ctx context.Context, r Rotation, categories []CategoryName, stale func(*controlSet, ContentKey) bool) (uint64, error) {
	set, ids := c.set.Load(), []KEKID(nil)
	for _, name := range categories {
		for _, v := range set.liveKEKs(name) {
			ids = append(ids, KEKID{name, v})
		}
	}
	total, err := c.countUnder(ctx, ids)
	if err != nil {
		return 0, err
	}
	c.rotations.begin(r.Name(), r.Step, 0, total)
	var n, bad uint64
	var first error
	for _, name := range categories {
		err := c.eachKey(ctx, name, func(page []SealedKey) error {
			for _, k := range page {
				admission.StandBack()
				err := c.verifyKey(ctx, k)
				if set := c.set.Load(); err == nil && stale(set, k.Key) {
					err = fmt.Errorf("content key %s: it is still sealed under %s: %w", k.Key.KID, k.Key.KEK, ErrRecordCorrupt)
				}
				if errors.Is(err, ErrRecordCorrupt) {
					if bad++; first == nil {
						first = err
					}
					continue
				}
				if err != nil {
					return err
				}
				n++
			}
			c.rotations.add(r.Name(), len(page))
			return c.at(r)
		})
		if err != nil {
			return n, err
		}
	}
	if bad > 0 {
		return n, fmt.Errorf("%d content keys are not right, and the old version cannot be retired before they are restored: %w", bad, first)
	}
	return n, nil
}

func (c *Custodian) verifyKey(ctx context.Context, k SealedKey) error {
	set := c.set.Load()
	cek, _, err := c.openCEK(ctx, set, k)
	if err != nil {
		return err
	}
	defer cek.Destroy()
	var f Fingerprint
	cek.Use(func(b []byte) { f, err = c.fingerprint(ctx, set, k.Key.Fingerprint.Version, b) })
	if err != nil {
		return fmt.Errorf("content key %s: %w", k.Key.KID, err)
	}
	if subtle.ConstantTimeCompare(f.MAC[:], k.Key.Fingerprint.MAC[:]) != 1 {
		return corrupt("content key "+k.Key.KID.String(), errors.New("it is another key than it was born as"))
	}
	return nil
}

// eachKey calls f with every content key of a category, a page at a time. No
// transaction is open while f runs.
func (c *Custodian) eachKey(ctx context.Context, name CategoryName, f func([]SealedKey) error) error {
	var after *NaturalKey
	for {
		admission.StandBack()
		var page []SealedKey
		err := c.store.View(ctx, func(tx Tx) error {
			page = page[:0]
			return tx.ContentKeys(name, nil, after, readPage, func(k SealedKey) error {
				page = append(page, k)
				return nil
			})
		})
		if err != nil || len(page) == 0 {
			return err
		}
		if err := f(page); err != nil {
			return err
		}
		after = &page[len(page)-1].Key.NaturalKey
	}
}

// noReference proves that no record refers to what a rotation is about to
// retire: by the index of KEKs, and by reading every content key. It opens
// none, so it is quick.
func (c *Custodian) noReference(ctx context.Context, set *controlSet, r Rotation) error {
	if r.Kind == RotateMEK {
		return c.noReferenceToMEK(ctx, set, r)
	}
	left, err := c.countUnder(ctx, r.sources())
	if err != nil {
		return err
	}
	if left > 0 {
		return fmt.Errorf("%d content keys still refer to versions %v: %w", left, r.From, ErrRotationState)
	}
	return c.noneRefers(ctx, []CategoryName{r.Category}, r.refersTo)
}

// noneRefers reads every content key of the categories.
func (c *Custodian) noneRefers(ctx context.Context, categories []CategoryName, refers func(*controlSet, ContentKey) bool) error {
	set := c.set.Load()
	for _, name := range categories {
		err := c.eachKey(ctx, name, func(page []SealedKey) error {
			for _, k := range page {
				if refers(set, k.Key) {
					return fmt.Errorf("content key %s still refers to %s: %w", k.Key.KID, k.Key.KEK, ErrRotationState)
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// forget releases the loaded keys that s lets nobody use any more.
func (r *keyring) forget(s *controlSet) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for id, l := range r.loaded {
		if _, _, _, err := s.wrapped(id); err != nil {
			delete(r.loaded, id)
			l.key.Release()
		}
	}
}
