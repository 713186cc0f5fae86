package custodian

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/keycustody/custodian/internal/audit"
	"github.com/keycustody/custodian/internal/sealing"
	"github.com/keycustody/custodian/internal/secret"
)

// A KeySpec names one key of an issue request.
type KeySpec struct {
	TrackType TrackType
	Scheme    Scheme
	Period    Period
	KID       KID // zero: drawn from the token's random source
}

// An IssueRequest asks for the keys of one content item, 1 to 600 of them.
type IssueRequest struct {
	RequestID string
	Category  CategoryName
	ContentID ContentID
	Keys      []KeySpec
	// Sealable says that the front door can carry keys that are sealed to the
	// caller. Where it cannot, keys leave in clear or, if their category
	// requires it, not at all.
	Sealable bool

	recipient sealing.PublicKey
}

func (r IssueRequest) terms() terms { return terms{recipient: r.recipient} }

// An IssuedKey is the answer for one KeySpec: Key, or Sealed in its place.
// Whoever gets it destroys Key.
type IssuedKey struct {
	ContentKey
	Key     secret.Secret
	Sealed  *SealedTo
	Created bool // false: the natural key had it already
	Receipt audit.Receipt
	// Grace is what is left of the grace on which the category's KEK served
	// while the KMS is away; zero: it was not needed.
	Grace time.Duration
}

// Check says what is wrong with the request, or nil.
func (r IssueRequest) Check() error {
	if err := checkText(r.RequestID, MaxRequestIDSize); err != nil {
		return invalid("request_id", err)
	}
	if err := r.Category.Check(); err != nil {
		return invalid("category", err)
	}
	if err := r.ContentID.Check(); err != nil {
		return invalid("content_id", err)
	}
	if len(r.Keys) == 0 || len(r.Keys) > MaxKeysPerIssue {
		return invalid("keys", fmt.Errorf("%d keys: must be 1 to %d", len(r.Keys), MaxKeysPerIssue))
	}
	type slot struct {
		track  TrackType
		scheme Scheme
		has    bool
		period uint32
	}
	slots, kids := map[slot]int{}, map[KID]int{}
	for i, k := range r.Keys {
		at := func(f string) string { return fmt.Sprintf("keys[%d].%s", i, f) }
		if err := k.TrackType.Check(); err != nil {
			return invalid(at("track_type"), err)
		}
		if err := k.Scheme.Check(); err != nil {
			return invalid(at("scheme"), err)
		}
		if err := k.Period.Check(); err != nil {
			return invalid(at("period"), err)
		}
		s := slot{k.TrackType, k.Scheme, k.Period.Set, k.Period.Index}
		if j, twice := slots[s]; twice {
			return invalid(at("track_type"), fmt.Errorf("the same key is asked for in keys[%d]", j))
		}
		slots[s] = i
		if j, twice := kids[k.KID]; twice && !k.KID.IsZero() {
			return invalid(at("kid"), fmt.Errorf("the same KID is given in keys[%d]", j))
		}
		kids[k.KID] = i
	}
	return nil
}

func (r IssueRequest) natural(k KeySpec, generation uint32) NaturalKey {
	return NaturalKey{Category: r.Category, ContentID: r.ContentID, TrackType: k.TrackType, Scheme: k.Scheme,
		HasPeriod: k.Period.Set, Period: k.Period.Index, Generation: generation}
}

// Issue returns the keys of a content item, making those that do not exist.
// The natural key decides, never the caller: the same request gives the same
// keys. It answers all keys or none.
func (c *Custodian) Issue(ctx context.Context, who Caller, req IssueRequest) ([]IssuedKey, error) {
	if err := req.Check(); err != nil {
		return nil, err
	}
	if err := c.anchored(); err != nil {
		return nil, err
	}
	defer c.freezeBroken(ctx)
	if req.Sealable {
		var err error
		if req.recipient, err = c.policy.Load().recipient(who, ""); err != nil {
			return nil, err
		}
	}
	d, keys, err := c.issue(ctx, who, req)
	if err != nil {
		destroy(keys)
		err = deadline(ctx, err)
		if _, aerr := c.record(ctx, c.entry(c.set.Load(), who, d, ActionIssue, req.RequestID, ref{category: req.Category, contentID: req.ContentID}, err)); aerr != nil {
			return nil, aerr
		}
		return nil, err
	}
	entries := make([]audit.Entry, len(keys))
	for i := range keys {
		a := ActionReissue
		if keys[i].Created {
			a = ActionIssue
		}
		entries[i] = c.entry(c.set.Load(), who, d, a, req.RequestID, ref{key: &keys[i].ContentKey}, nil)
		entries[i].StoreSequence, entries[i].Detail = keys[i].sequence, keys[i].Sealed.detail(graceDetail(keys[i].Grace))
	}
	receipts, err := c.record(ctx, entries...)
	if err == nil && ctx.Err() != nil {
		err = fmt.Errorf("issue %d keys: they are stored: %w", len(keys), ErrDeadline)
	}
	if err != nil {
		destroy(keys)
		return nil, err
	}
	out := make([]IssuedKey, len(keys))
	for i := range keys {
		keys[i].Receipt = receipts[i]
		out[i] = keys[i].IssuedKey
	}
	return out, nil
}

// An issued key also knows the store's sequence after it was stored.
type issued struct {
	IssuedKey
	sequence uint64
}

func destroy(keys []issued) {
	for i := range keys {
		keys[i].Key.Destroy()
	}
}

func (c *Custodian) issue(ctx context.Context, who Caller, req IssueRequest) (Decision, []issued, error) {
	set := c.set.Load()
	d := c.decide(who, ActionIssue, Resource{Category: req.Category})
	if !d.Allow {
		return d, nil, fmt.Errorf("issue for category %s: %w", req.Category, d.Err)
	}
	cat, ok := set.categories[req.Category]
	if !ok {
		return d, nil, fmt.Errorf("category %s: %w", req.Category, ErrCategoryNotFound)
	}
	if d = c.decideLeaving(who, ActionIssue, Resource{Category: cat.Name, Mode: cat.Mode}, req.terms()); !d.Allow {
		return d, nil, fmt.Errorf("category %s: %w", cat.Name, d.Err)
	}
	if err := c.lookAtClock(); err != nil {
		return d, nil, err
	}
	keys := make([]issued, len(req.Keys))
	found, err := c.findOrCreate(ctx, who, req, keys)
	for errors.Is(err, ErrChanged) && ctx.Err() == nil { // the KEK was rotated, or the content re-keyed, meanwhile
		destroy(keys)
		clear(keys)
		found, err = c.findOrCreate(ctx, who, req, keys)
	}
	if err != nil {
		return d, keys, err
	}
	for i := range keys {
		if keys[i].Created {
			continue
		}
		if d, err := c.handOutAgain(ctx, c.set.Load(), who, req, found[i], &keys[i]); err != nil {
			return d, keys, err
		}
	}
	for i := range keys {
		if keys[i].Sealed, err = sealTo(req.recipient, who, req.RequestID, &keys[i].ContentKey, keys[i].Key); err != nil {
			return d, keys, err
		}
	}
	return d, keys, nil
}

// findOrCreate returns the keys that exist, and makes those that do not.
func (c *Custodian) findOrCreate(ctx context.Context, who Caller, req IssueRequest, keys []issued) ([]SealedKey, error) {
	found, err := c.existing(ctx, req)
	if err != nil {
		return nil, err
	}
	var missing []int
	for i := range found {
		if found[i].Sealed == nil {
			missing = append(missing, i)
		}
	}
	if len(missing) > 0 {
		err = c.createKeys(ctx, who, req, missing, found, keys)
	}
	return found, err
}

// existing reads what the natural keys of the request have already, of the
// content's generation.
func (c *Custodian) existing(ctx context.Context, req IssueRequest) ([]SealedKey, error) {
	found := make([]SealedKey, len(req.Keys))
	generation := c.set.Load().generation(req.Category, req.ContentID)
	err := c.store.View(ctx, func(tx Tx) error {
		if owner, err := tx.ContentCategory(req.ContentID); err == nil && owner != req.Category {
			return fmt.Errorf("content %q: %w", []byte(req.ContentID), ErrContentCategory)
		} else if err != nil && !errors.Is(err, ErrNotFound) {
			return err
		}
		for i, spec := range req.Keys {
			k, err := findExisting(tx, req.natural(spec, generation))
			if err != nil {
				return err
			}
			found[i] = k
			if k.Sealed != nil || spec.KID.IsZero() {
				continue
			}
			if _, err := tx.ContentKey(spec.KID); !errors.Is(err, ErrNotFound) {
				return fmt.Errorf("keys[%d].kid %s: %w", i, spec.KID, orConflict(err))
			}
		}
		return nil
	})
	return found, err
}

// findExisting returns the newest key of a natural key; a zero SealedKey
// where there is none of its generation or a later one.
func findExisting(tx Tx, n NaturalKey) (SealedKey, error) {
	k, err := tx.HighestGeneration(n)
	if errors.Is(err, ErrNotFound) {
		return SealedKey{}, nil
	}
	if err == nil && !k.Key.SameItem(n) {
		err = corrupt(fmt.Sprintf("natural key %s", n), fmt.Errorf("its index names the key of %s", k.Key.NaturalKey))
	}
	if err == nil && k.Key.Generation < n.Generation {
		return SealedKey{}, nil // superseded: the content was re-keyed
	}
	return k, err
}

func orConflict(err error) error {
	if err == nil {
		return ErrKIDConflict
	}
	return err
}

// createKeys makes the missing keys outside any transaction and stores them
// in one. Where another request was quicker, its key wins: found[i] is set,
// and ours is wiped.
func (c *Custodian) createKeys(ctx context.Context, who Caller, req IssueRequest, missing []int, found []SealedKey, keys []issued) error {
	kek, set, err := c.reserve(ctx, req.Category, uint64(len(missing)))
	if err != nil {
		return err
	}
	if err := c.mayMake(ctx, set, who, ActionIssue, req.terms(), req.Category, req.ContentID); err != nil {
		return err
	}
	fresh := make([]SealedKey, len(req.Keys))
	var others []Fingerprint // of the same keys, under older helper keys
	for _, i := range missing {
		keys[i].Key.Destroy()
		if fresh[i], keys[i].Key, keys[i].Grace, err = c.newKey(ctx, set, kek, req, req.Keys[i]); err != nil {
			return err
		}
		if others, err = c.olderFingerprints(ctx, set, keys[i].Key, others); err != nil {
			return err
		}
	}
	var sequence uint64
	var created []bool
	err = c.store.Update(ctx, func(tx UpdateTx) error {
		if err := stillProtects(tx, set, kek, req.ContentID); err != nil {
			return err
		}
		if err := unusedUnder(tx, others); err != nil {
			return err
		}
		created = make([]bool, len(req.Keys))
		for _, i := range missing {
			won, err := findExisting(tx, fresh[i].Key.NaturalKey)
			if err != nil {
				return err
			}
			if found[i] = won; won.Sealed != nil {
				continue
			}
			if err := tx.InsertContentKey(fresh[i]); err != nil {
				return fmt.Errorf("keys[%d]: %w", i, err)
			}
			created[i] = true
		}
		sequence = tx.Sequence()
		return nil
	})
	if err != nil {
		return err
	}
	for _, i := range missing {
		if !created[i] {
			keys[i].Key.Destroy()
			continue
		}
		keys[i].ContentKey, keys[i].Created, keys[i].sequence = fresh[i].Key, true, sequence
	}
	return nil
}

// stillProtects says whether a new key of the content item may be stored under
// kek in the store's own state: a freeze, a rotation or a re-key may have come
// since set.
func stillProtects(tx Tx, set *controlSet, kek KEKID, id ContentID) error {
	r, err := tx.Head()
	if err != nil {
		return err
	}
	if h, err := decodeHead(r.Body); err != nil || h.Revision == set.head.Revision {
		return err
	}
	cat, err := categoryIn(tx, kek.Category)
	if err != nil {
		return err
	}
	if cat.Mode == CategoryFrozen { // not ErrChanged: set may not know it before the log can be written
		return fmt.Errorf("category %s: %w", kek.Category, ErrCategoryFrozen)
	}
	generation, err := generationIn(tx, kek.Category, id)
	if err != nil {
		return err
	}
	if cat.ActiveKEK != kek.Version || cat.Mode != set.categories[kek.Category].Mode || generation != set.generation(kek.Category, id) {
		return fmt.Errorf("kek %s: %w", kek, ErrChanged)
	}
	return nil
}

// categoryIn is a category in the store's own state.
func categoryIn(tx Tx, name CategoryName) (Category, error) {
	r, err := tx.Control(ControlCategory, string(name))
	if err != nil {
		return Category{}, fmt.Errorf("category %s: %w", name, err)
	}
	return decodeCategory(r.Body)
}

// newKey draws a CEK in the token and seals it.
func (c *Custodian) newKey(ctx context.Context, set *controlSet, kek KEKID, req IssueRequest, spec KeySpec) (sealed SealedKey, cek secret.Secret, grace time.Duration, err error) {
	k := SealedKey{Key: ContentKey{NaturalKey: req.natural(spec, set.generation(req.Category, req.ContentID)), KID: spec.KID, PeriodStart: spec.Period.Start.UTC(), PeriodEnd: spec.Period.End.UTC(),
		Origin: OriginGenerated, KEK: kek, BirthKEK: kek.Version, CreateTime: c.now(), Revision: 1}}
	k.Key.ContentID = slices.Clone(k.Key.ContentID)
	var public [2 * KIDSize]byte // KID and explicit IV in one call
	if err := c.hsm.Random(ctx, public[:]); err != nil {
		return k, secret.Secret{}, 0, err
	}
	if k.Key.KID.IsZero() {
		k.Key.KID = KID(public[:KIDSize])
		k.Key.KID[6] = k.Key.KID[6]&0x0f | 0x40 // RFC 4122, version 4
		k.Key.KID[8] = k.Key.KID[8]&0x3f | 0x80 // RFC 4122, variant
	}
	if spec.Scheme.ExplicitIV() {
		k.Key.IV = public[KIDSize:]
	}
	slot, err := c.arena.Get()
	if err != nil {
		return k, secret.Secret{}, 0, fmt.Errorf("%w: %w", err, ErrRate)
	}
	cek = secret.New(c.arena, slot, CEKSize)
	if grace, err = c.sealCEK(ctx, set, &k, slot[:CEKSize], true); err != nil {
		cek.Destroy()
		return k, secret.Secret{}, 0, fmt.Errorf("content key %s: %w", k.Key.KID, err)
	}
	return k, cek, grace, nil
}

// sealCEK fingerprints cek, unless k has a fingerprint by the newest helper
// already, and seals it under k.Key.KEK; with draw, it fills cek from the
// token's random source first.
func (c *Custodian) sealCEK(ctx context.Context, set *controlSet, k *SealedKey, cek []byte, draw bool) (grace time.Duration, err error) {
	if draw {
		if err := c.hsm.Random(ctx, cek); err != nil {
			return 0, err
		}
	}
	h, err := set.latestHelper(HelperFingerprint)
	if err != nil {
		return 0, err
	}
	if k.Key.Fingerprint.Version != h.Version {
		if k.Key.Fingerprint, err = c.fingerprint(ctx, set, h.Version, cek); err != nil {
			return 0, err
		}
	}
	k.Body = EncodeContentKey(k.Key)
	return c.keys.withKEK(ctx, set, k.Key.KEK, func(kek Key) error {
		var err error
		k.IV, k.Sealed, err = kek.Seal(ctx, associatedData(set.head.StoreID, k.Body), cek)
		return err
	})
}

func (c *Custodian) fingerprint(ctx context.Context, set *controlSet, version uint32, cek []byte) (Fingerprint, error) {
	f := Fingerprint{Version: version}
	err := c.keys.withHelper(ctx, set, HelperFingerprint, version, func(k Key) error {
		var err error
		f.MAC, err = k.CMAC(ctx, cek)
		return err
	})
	if err != nil {
		return f, fmt.Errorf("fingerprint: %w", err)
	}
	return f, nil
}

// olderFingerprints appends the fingerprints of a key under the helper keys
// that are about to be replaced: until the rotation of the MEK is retired,
// stored keys may still be known by those.
func (c *Custodian) olderFingerprints(ctx context.Context, set *controlSet, cek secret.Secret, to []Fingerprint) ([]Fingerprint, error) {
	for id, h := range set.helpers {
		if id.purpose != HelperFingerprint || h.State != StateDeactivated || set.retiredMEK(h.Wrapped.MEKVersion) {
			continue
		}
		var f Fingerprint
		var err error
		cek.Use(func(b []byte) { f, err = c.fingerprint(ctx, set, id.version, b) })
		if err != nil {
			return nil, err
		}
		to = append(to, f)
	}
	return to, nil
}

// unusedUnder says whether no stored key has one of the fingerprints.
func unusedUnder(tx Tx, fingerprints []Fingerprint) error {
	for _, f := range fingerprints {
		owner, err := tx.FingerprintOwner(f)
		if err == nil {
			return fmt.Errorf("the key bytes are those of %s: %w", owner, ErrFingerprint)
		}
		if !errors.Is(err, ErrNotFound) {
			return err
		}
	}
	return nil
}

// handOutAgain gives a packager a key that exists: through the same decision,
// and only within the re-issue window unless it is granted more.
func (c *Custodian) handOutAgain(ctx context.Context, set *controlSet, who Caller, req IssueRequest, k SealedKey, out *issued) (Decision, error) {
	res := resourceOf(set, &k.Key)
	d := c.decideLeaving(who, ActionIssue, res, req.terms())
	if why := c.mayHaveAgain(set.categories[k.Key.Category], &k.Key); d.Allow && why != nil {
		d = c.decideLeaving(who, ActionReissue, res, req.terms())
		if !d.Allow {
			return d, fmt.Errorf("content key %s: %w, and a reissue grant is needed to have it again: %w", k.Key.KID, why, d.Err)
		}
	}
	if !d.Allow {
		return d, fmt.Errorf("content key %s: %w", k.Key.KID, d.Err)
	}
	err := c.spend(c.policyOf(c.set.Load()), who, ActionReissue, k.Key.Category, k.Key.KID, c.now())
	if err != nil {
		d.Allow = false
		return d, fmt.Errorf("content key %s: %w", k.Key.KID, err)
	}
	out.ContentKey = k.Key
	out.Key, out.Grace, err = c.openCEK(ctx, set, k)
	return d, err
}
