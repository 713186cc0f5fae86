package custodian

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/keycustody/custodian/internal/audit"
	"github.com/keycustody/custodian/internal/secret"
)

// Keys that others have made come in by Import, and keys go out to those who
// take them by push through Export. Both are an officer's, for the categories
// of the grant, and both are written down key by key.

// An ImportKey is one key that a studio has made. Whoever makes the request
// destroys Key.
type ImportKey struct {
	KeySpec // its KID must be there
	// IV is the constant IV that the content was encrypted with, 16 bytes. Only
	// a scheme with an explicit IV may have one.
	IV  []byte
	Key secret.Secret
}

// An ImportRequest brings the keys of one content item, 1 to 600 of them.
type ImportRequest struct {
	RequestID string
	Category  CategoryName
	ContentID ContentID
	Keys      []ImportKey
	// Ceremony is the one that permits it, where there are officers.
	Ceremony string
}

func (r ImportRequest) move() move {
	m := move{ceremony: r.Ceremony, item: contentItem{r.Category, string(r.ContentID)}}
	for _, k := range r.Keys {
		m.kids = append(m.kids, k.KID)
	}
	return m
}

// An ImportedKey is the answer for one ImportKey.
type ImportedKey struct {
	ContentKey
	Created bool // false: this very key was there already
	Receipt audit.Receipt
}

// Check says what is wrong with the request, or nil.
func (r ImportRequest) Check() error {
	issue := IssueRequest{RequestID: r.RequestID, Category: r.Category, ContentID: r.ContentID, Keys: make([]KeySpec, len(r.Keys))}
	for i, k := range r.Keys {
		issue.Keys[i] = k.KeySpec
	}
	if err := errors.Join(issue.Check(), checkPermission(r.Ceremony)); err != nil {
		return err
	}
	for i, k := range r.Keys {
		at := func(f string) string { return fmt.Sprintf("keys[%d].%s", i, f) }
		if k.KID.IsZero() {
			return invalid(at("kid"), errors.New("a key that exists has a KID"))
		}
		switch {
		case len(k.IV) == 0:
		case !k.Scheme.ExplicitIV():
			return invalid(at("iv"), fmt.Errorf("a key of scheme %s has no constant IV here", k.Scheme))
		case len(k.IV) != ivSize:
			return invalid(at("iv"), fmt.Errorf("%d bytes: must be %d", len(k.IV), ivSize))
		}
		if k.Key.Len() != CEKSize {
			return invalid(at("key"), fmt.Errorf("%d bytes: must be %d", k.Key.Len(), CEKSize))
		}
		zero := false
		k.Key.Use(func(b []byte) { zero = bytes.Equal(b, make([]byte, CEKSize)) })
		if zero {
			return invalid(at("key"), errors.New("16 zero bytes are a placeholder, not a key"))
		}
	}
	return nil
}

// checkPermission is checkCeremonyID, where a ceremony is named.
func checkPermission(id string) error {
	if id == "" || checkCeremonyID(id) == nil {
		return nil
	}
	return invalid("ceremony", fmt.Errorf("%.40q: must be 16 digits, 0-9 a-f", id))
}

// ivSize is that of a constant IV, in bytes (ISO/IEC 23001-7).
const ivSize = 16

// Import stores keys that exist already, all or none. A key that is stored
// under this very natural key and KID is left as it is, so that an import can
// be repeated. A KID, a natural key or key bytes that are in use otherwise are
// refused: ErrKIDConflict, ErrKeyConflict.
func (c *Custodian) Import(ctx context.Context, who Caller, req ImportRequest) ([]ImportedKey, error) {
	if err := req.Check(); err != nil {
		return nil, err
	}
	d, begun, keys, sequence, err := c.importKeys(ctx, who, req)
	if err != nil {
		about := ref{category: req.Category, contentID: req.ContentID}
		if f, ok := errors.AsType[*importFault](err); ok {
			about.kid = f.kid
		}
		err = deadline(ctx, err)
		e := c.entry(c.set.Load(), who, d, ActionImport, req.RequestID, about, err)
		e.Detail = req.move().detail("")
		if _, aerr := c.record(ctx, c.fail(begun, e)); aerr != nil {
			return nil, aerr
		}
		return nil, err
	}
	entries := make([]audit.Entry, len(keys))
	for i := range keys {
		entries[i] = begun.end(c.entry(c.set.Load(), who, d, ActionImport, req.RequestID, ref{key: &keys[i].ContentKey}, nil))
		entries[i].StoreSequence = sequence
		entries[i].Detail = req.move().detail("")
		if !keys[i].Created {
			entries[i].Detail = req.move().detail("was there already")
		}
	}
	receipts, err := c.record(ctx, entries...)
	if err != nil {
		return nil, err
	}
	for i := range keys {
		keys[i].Receipt = receipts[i]
	}
	return keys, nil
}

// An importFault is a conflict of one key.
type importFault struct {
	kid KID
	err error
}

func (f *importFault) Error() string { return fmt.Sprintf("content key %s: %s", f.kid, f.err) }
func (f *importFault) Unwrap() error { return f.err }

// importKeys returns the attempt too, where it came to one.
func (c *Custodian) importKeys(ctx context.Context, who Caller, req ImportRequest) (Decision, *attempt, []ImportedKey, uint64, error) {
	d, t, err := c.mayMove(who, ActionImport, req.move())
	if err != nil {
		return d, nil, nil, 0, err
	}
	if err := c.lookAtClock(); err != nil {
		return d, nil, nil, 0, err
	}
	e := c.entry(c.set.Load(), who, d, ActionImport, req.RequestID, ref{category: req.Category, contentID: req.ContentID}, nil)
	e.Detail = req.move().detail(fmt.Sprintf("%d keys", len(req.Keys)))
	begun, err := c.begin(ctx, e)
	if err != nil {
		return d, nil, nil, 0, err
	}
	for {
		keys, sequence, err := c.storeImports(ctx, who, req, t)
		if errors.Is(err, ErrChanged) && ctx.Err() == nil {
			continue // the KEK was rotated meanwhile; its successor seals
		}
		return d, begun, keys, sequence, err
	}
}

// storeImports seals the keys outside any transaction and stores them in one.
func (c *Custodian) storeImports(ctx context.Context, who Caller, req ImportRequest, t terms) ([]ImportedKey, uint64, error) {
	kek, set, err := c.reserve(ctx, req.Category, uint64(len(req.Keys)))
	if err != nil {
		return nil, 0, err
	}
	if err := c.mayMake(ctx, set, who, ActionImport, t, req.Category, req.ContentID); err != nil {
		return nil, 0, err
	}
	fresh, older := make([]SealedKey, len(req.Keys)), make([][]Fingerprint, len(req.Keys))
	for i, k := range req.Keys {
		if fresh[i], err = c.sealImport(ctx, set, kek, req, k); err == nil {
			older[i], err = c.olderFingerprints(ctx, set, k.Key, nil)
		}
		if err != nil {
			return nil, 0, fmt.Errorf("content key %s: %w", k.KID, err)
		}
	}
	var keys []ImportedKey
	var sequence uint64
	err = c.store.Update(ctx, func(tx UpdateTx) error {
		keys = make([]ImportedKey, len(fresh))
		if err := stillProtects(tx, set, kek, req.ContentID); err != nil {
			return err
		}
		for i := range fresh {
			stored, created, err := insertImport(tx, fresh[i], older[i])
			if err != nil {
				return &importFault{fresh[i].Key.KID, err}
			}
			keys[i] = ImportedKey{ContentKey: stored, Created: created}
		}
		sequence = tx.Sequence()
		return nil
	})
	return keys, sequence, err
}

// sealImport fingerprints and seals one key.
func (c *Custodian) sealImport(ctx context.Context, set *controlSet, kek KEKID, req ImportRequest, k ImportKey) (SealedKey, error) {
	natural := IssueRequest{Category: req.Category, ContentID: req.ContentID}.natural(k.KeySpec, set.generation(req.Category, req.ContentID))
	natural.ContentID = slices.Clone(natural.ContentID)
	s := SealedKey{Key: ContentKey{NaturalKey: natural, KID: k.KID, IV: k.IV, PeriodStart: k.Period.Start.UTC(), PeriodEnd: k.Period.End.UTC(),
		Origin: OriginImported, KEK: kek, BirthKEK: kek.Version, CreateTime: c.now(), Revision: 1}}
	var err error
	k.Key.Use(func(cek []byte) { _, err = c.sealCEK(ctx, set, &s, cek, false) })
	return s, err
}

// insertImport adds a key, or returns the one that is there where it is the
// same: KID, key bytes and IV. older are its fingerprints under helper keys
// that a rotation is about to replace.
func insertImport(tx UpdateTx, k SealedKey, older []Fingerprint) (ContentKey, bool, error) {
	there, err := findExisting(tx, k.Key.NaturalKey)
	if err != nil {
		return ContentKey{}, false, err
	}
	if there.Sealed != nil {
		same := there.Key.Fingerprint == k.Key.Fingerprint || slices.Contains(older, there.Key.Fingerprint)
		if there.Key.KID != k.Key.KID || !same || !bytes.Equal(there.Key.IV, k.Key.IV) {
			return ContentKey{}, false, fmt.Errorf("%s has another key, %s: %w", k.Key.NaturalKey, there.Key.KID, ErrKeyConflict)
		}
		return there.Key, false, nil
	}
	if err = unusedUnder(tx, older); err == nil {
		err = tx.InsertContentKey(k)
	}
	if errors.Is(err, ErrFingerprint) {
		err = fmt.Errorf("%w: %w", ErrKeyConflict, err)
	}
	return k.Key, true, err
}

// An ExportRequest asks for the newest keys of one content item, for somebody
// who takes them by push.
type ExportRequest struct {
	RequestID string
	Category  CategoryName
	ContentID ContentID
	// Recipient says to whom the keys will be encrypted, for the audit log: its
	// name in the configuration, and the digest of its certificate. Empty: no
	// such recipient may have keys of the category. As ExportRecipient has it.
	Recipient string
	// Ceremony is the one that permits it, where there are officers.
	Ceremony string
}

func (r ExportRequest) move() move {
	return move{ceremony: r.Ceremony, item: contentItem{r.Category, string(r.ContentID)}, recipient: r.Recipient}
}

// An ExportedKey is one key that leaves. Whoever gets it destroys Key.
type ExportedKey struct {
	ContentKey
	Key     secret.Secret
	Receipt audit.Receipt
}

// Check says what is wrong with the request, or nil.
func (r ExportRequest) Check() error {
	if err := checkText(r.RequestID, MaxRequestIDSize); err != nil {
		return invalid("request_id", err)
	}
	if err := r.Category.Check(); err != nil {
		return invalid("category", err)
	}
	if err := r.ContentID.Check(); err != nil {
		return invalid("content_id", err)
	}
	if err := checkText(r.Recipient, MaxCauseSize); err != nil {
		return invalid("recipient", err)
	}
	return checkPermission(r.Ceremony)
}

// Export returns the newest key of each natural key of a content item, all or
// none, each written down with its recipient before. They are in clear: the
// front door that asks encrypts them to the recipient, and gives out nothing
// else.
func (c *Custodian) Export(ctx context.Context, who Caller, req ExportRequest) ([]ExportedKey, error) {
	if err := req.Check(); err != nil {
		return nil, err
	}
	d, begun, keys, err := c.export(ctx, who, req)
	if err != nil {
		destroyExports(keys)
		err = deadline(ctx, err)
		e := c.entry(c.set.Load(), who, d, ActionExport, req.RequestID, ref{category: req.Category, contentID: req.ContentID}, err)
		e.Detail = req.move().detail("to " + req.Recipient)
		if _, aerr := c.record(ctx, c.fail(begun, e)); aerr != nil {
			return nil, aerr
		}
		return nil, err
	}
	entries := make([]audit.Entry, len(keys))
	for i := range keys {
		entries[i] = begun.end(c.entry(c.set.Load(), who, d, ActionExport, req.RequestID, ref{key: &keys[i].ContentKey}, nil))
		entries[i].Detail = req.move().detail("to " + req.Recipient)
	}
	receipts, err := c.record(ctx, entries...)
	if err != nil {
		destroyExports(keys)
		return nil, err
	}
	for i := range keys {
		keys[i].Receipt = receipts[i]
	}
	return keys, nil
}

func destroyExports(keys []ExportedKey) {
	for i := range keys {
		keys[i].Key.Destroy()
	}
}

// export returns the attempt too, where it came to one.
func (c *Custodian) export(ctx context.Context, who Caller, req ExportRequest) (Decision, *attempt, []ExportedKey, error) {
	d, t, err := c.mayMove(who, ActionExport, req.move())
	if err != nil {
		return d, nil, nil, err
	}
	if req.Recipient == "" { // said to those only who may export
		return d, nil, nil, invalid("recipient", errors.New("the configuration has no recipient of this name for exports from this category"))
	}
	var sealed []SealedKey
	err = c.store.View(ctx, func(tx Tx) error {
		sealed = nil
		return tx.ContentKeys(req.Category, req.ContentID, nil, exportLimit+1, func(k SealedKey) error {
			if n := len(sealed); n > 0 && sealed[n-1].Key.SameItem(k.Key.NaturalKey) {
				sealed[n-1] = k // generations come in their order
				return nil
			}
			sealed = append(sealed, k)
			return nil
		})
	})
	switch {
	case err != nil:
		return d, nil, nil, err
	case len(sealed) == 0:
		return d, nil, nil, fmt.Errorf("content %q in category %s: %w", []byte(req.ContentID), req.Category, ErrKeyNotFound)
	case len(sealed) > exportLimit:
		return d, nil, nil, invalid("content_id", fmt.Errorf("it has more than %d keys", exportLimit))
	}
	e := c.entry(c.set.Load(), who, d, ActionExport, req.RequestID, ref{category: req.Category, contentID: req.ContentID}, nil)
	e.Detail = req.move().detail(fmt.Sprintf("%d keys, to %s", len(sealed), req.Recipient))
	begun, err := c.begin(ctx, e)
	if err != nil {
		return d, nil, nil, err
	}
	set := c.set.Load() // after the records, so that it knows their KEKs
	keys := make([]ExportedKey, len(sealed))
	for i, k := range sealed {
		if d = c.decideLeaving(who, ActionExport, resourceOf(set, &k.Key), t); !d.Allow {
			return d, begun, keys, fmt.Errorf("content key %s: %w", k.Key.KID, d.Err)
		}
		keys[i].ContentKey = k.Key
		if keys[i].Key, _, err = c.openCEK(ctx, set, k); err != nil {
			return d, begun, keys, err
		}
	}
	return d, begun, keys, nil
}

// exportLimit is how many records of a content item one export reads.
const exportLimit = MaxKeysPerIssue
