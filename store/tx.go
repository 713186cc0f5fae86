package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"runtime/debug"
	"slices"

	bolt "go.etcd.io/bbolt"

	"github.com/keycustody/custodian/custodian"
)

// Limits of what is stored, in bytes; bbolt's own are far above.
const (
	maxName  = 1024    // of a control record or a job
	maxValue = 1 << 20 // of a body, a sealed key or a position
)

// A tx is one bbolt transaction, or in an Update the part of it that the
// update in hand may write. It belongs to one goroutine.
//
// Every method that touches pages defers guard with enter, so that a damaged
// page is an error and not a panic.
type tx struct {
	store    *Store
	bolt     *bolt.Tx
	writable bool
	buckets  [bucketCount]*bolt.Bucket
	outside  bool // the caller's function runs, whose panics are not ours

	counters *counters // nil until needed; written back before the commit
	counted  bool      // the update in hand has raised the sequence
	writes   uint64    // made since begin, undone ones too
	undo     []change  // what the update in hand has changed, in order
	failed   error     // bbolt panicked: nothing of this transaction may stay
}

// A change is what a key held before it was written: nil for nothing.
type change struct {
	bucket bucketID
	key    []byte
	old    []byte
}

var _ custodian.UpdateTx = (*tx)(nil)

// enter begins a method, which the caller's function inside another method
// may have called. guard takes its result.
func (t *tx) enter() (outside bool) {
	outside, t.outside = t.outside, false
	return outside
}

// guard turns a panic of bbolt or of ours into an error. It is deferred.
func (t *tx) guard(err *error, outside bool) {
	callers := t.outside
	t.outside = outside
	if callers {
		return
	}
	p := recover()
	if p == nil {
		return
	}
	*err = t.damage(p)
	if t.writable {
		t.failed = *err
	}
}

// damage is the error for a panic in the midst of pages.
func (t *tx) damage(p any) error {
	class := custodian.ErrRecordCorrupt
	if _, ok := p.(interface{ Addr() uintptr }); ok {
		// An address of the mapped file that cannot be read: the device, or a
		// file that somebody made shorter.
		class = custodian.ErrStoreUnavailable
	}
	t.store.log.Error("damaged page", "path", t.store.path, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
	return fmt.Errorf("store %s: damaged page: %v: %w", t.store.path, p, class)
}

// call runs a function of the caller in the midst of a method.
func (t *tx) call(f func() error) error {
	t.outside = true
	err := f()
	t.outside = false
	return err
}

func (t *tx) bucket(id bucketID) *bolt.Bucket {
	if t.buckets[id] == nil {
		// A bucket that is missing is nil here and panics below: Open has seen
		// it, so a page is damaged.
		t.buckets[id] = t.bolt.Bucket(bucketNames[id])
	}
	return t.buckets[id]
}

// get returns what lies under key, nil for nothing. It is valid until the
// transaction ends, and nobody may write to it.
func (t *tx) get(id bucketID, key []byte) []byte { return t.bucket(id).Get(key) }

// put writes value, nil for nothing, and remembers what was there.
func (t *tx) put(id bucketID, key, value []byte) error {
	if !t.writable {
		return fmt.Errorf("store %s: write in a read transaction", t.store.path)
	}
	old := t.get(id, key)
	if err := t.set(id, key, value); err != nil {
		return err
	}
	t.undo = append(t.undo, change{id, key, old})
	return nil
}

func (t *tx) set(id bucketID, key, value []byte) error {
	t.writes++
	var err error
	if value == nil {
		err = t.bucket(id).Delete(key)
	} else {
		err = t.bucket(id).Put(key, value)
	}
	if err != nil {
		return fmt.Errorf("store %s: write %s: %w: %w", t.store.path, bucketNames[id], custodian.ErrStoreUnavailable, err)
	}
	return nil
}

// revert takes back what the update in hand has written.
func (t *tx) revert() (err error) {
	defer t.guard(&err, t.enter())
	for _, c := range slices.Backward(t.undo) {
		if err := t.set(c.bucket, c.key, c.old); err != nil {
			return err
		}
	}
	t.undo = t.undo[:0]
	return nil
}

// scan calls f for the entries of a bucket from key from on while they begin
// with prefix, until f returns false. f may write.
func (t *tx) scan(id bucketID, prefix, from []byte, f func(k, v []byte) (bool, error)) error {
	c := t.bucket(id).Cursor()
	writes := t.writes
	for k, v := c.Seek(from); k != nil && bytes.HasPrefix(k, prefix); {
		more, err := f(k, v)
		if err != nil || !more {
			return err
		}
		if t.writes == writes {
			k, v = c.Next()
			continue
		}
		// A write invalidates cursors; look for the successor anew.
		writes = t.writes
		last := slices.Clone(k)
		c = t.bucket(id).Cursor()
		if k, v = c.Seek(last); bytes.Equal(k, last) {
			k, v = c.Next()
		}
	}
	return nil
}

func (t *tx) writeTo(w io.Writer) (err error) {
	defer t.guard(&err, t.enter())
	_, err = t.bolt.WriteTo(w)
	return err
}

// loadCounters reads the counters once. The result is the transaction's own.
func (t *tx) loadCounters() (c *counters, err error) {
	if t.counters != nil {
		return t.counters, nil
	}
	defer t.guard(&err, t.enter())
	read, err := decodeCounters(t.get(bucketMeta, metaCounters))
	if err != nil {
		return nil, fmt.Errorf("store %s: %w: %w", t.store.path, custodian.ErrRecordCorrupt, err)
	}
	t.counters = &read
	return t.counters, nil
}

// saveCounters writes the counters back.
func (t *tx) saveCounters() (err error) {
	if t.counters == nil {
		return nil
	}
	defer t.guard(&err, t.enter())
	return t.set(bucketMeta, metaCounters, encodeCounters(*t.counters))
}

// Sequence counts the updates that inserted or replaced content keys, the
// one in hand with them once it did.
func (t *tx) Sequence() uint64 {
	c, err := t.loadCounters()
	if err != nil {
		// The sequence has no error to give. Zero is not past any position
		// that a job has reached, so a job looks at everything again.
		return 0
	}
	return c.sequence
}

// Head returns the head record, else ErrNotFound.
func (t *tx) Head() (c custodian.ControlRecord, err error) {
	defer t.guard(&err, t.enter())
	b := t.get(bucketMeta, metaHead)
	if b == nil {
		return c, fmt.Errorf("head: %w", custodian.ErrNotFound)
	}
	if c, err = decodeControl(recordHead, bytes.Clone(b)); err != nil {
		return c, fmt.Errorf("head: %w: %w", custodian.ErrRecordCorrupt, err)
	}
	return c, nil
}

// PutHead replaces the head record, whose kind is 0.
func (t *tx) PutHead(r custodian.ControlRecord) (err error) {
	defer t.guard(&err, t.enter())
	if r.Kind != 0 {
		return invalid("kind", fmt.Errorf("the head has kind 0, not %d", r.Kind))
	}
	if err := checkControl(r); err != nil {
		return err
	}
	return t.put(bucketMeta, metaHead, encodeControl(recordHead, r))
}

// InitJournal returns the journal of an unfinished init, else ErrNotFound.
func (t *tx) InitJournal() (j custodian.InitJournal, err error) {
	defer t.guard(&err, t.enter())
	b := t.get(bucketMeta, metaJournal)
	if b == nil {
		return j, fmt.Errorf("init journal: %w", custodian.ErrNotFound)
	}
	if j, err = decodeJournal(b); err != nil {
		return j, fmt.Errorf("init journal: %w: %w", custodian.ErrRecordCorrupt, err)
	}
	return j, nil
}

// PutInitJournal replaces the journal.
func (t *tx) PutInitJournal(j custodian.InitJournal) (err error) {
	defer t.guard(&err, t.enter())
	for _, s := range []string{j.MEKLabel, string(j.Profile), j.SignLbl} {
		if len(s) > maxName {
			return invalid("init journal", fmt.Errorf("a text of %d bytes: must be at most %d", len(s), maxName))
		}
	}
	return t.put(bucketMeta, metaJournal, encodeJournal(j))
}

// DeleteInitJournal removes the journal; there need not be one.
func (t *tx) DeleteInitJournal() (err error) {
	defer t.guard(&err, t.enter())
	return t.put(bucketMeta, metaJournal, nil)
}

// Control returns one control record, else ErrNotFound.
func (t *tx) Control(kind custodian.ControlKind, name string) (c custodian.ControlRecord, err error) {
	defer t.guard(&err, t.enter())
	key := controlKey(kind, name)
	b := t.get(bucketControl, key)
	if b == nil {
		return c, fmt.Errorf("control record %d %q: %w", kind, name, custodian.ErrNotFound)
	}
	return readControl(key, b)
}

// readControl decodes what lies under key in the control bucket.
func readControl(key, b []byte) (custodian.ControlRecord, error) {
	c, err := decodeControl(recordControl, bytes.Clone(b))
	if err == nil && !bytes.Equal(controlKey(c.Kind, c.Name), key) {
		err = fmt.Errorf("holds %d %q", c.Kind, c.Name)
	}
	if err != nil {
		return custodian.ControlRecord{}, fmt.Errorf("control record %d %q: %w: %w", key[0], key[1:], custodian.ErrRecordCorrupt, err)
	}
	return c, nil
}

// Controls calls f for every control record, by kind, then name.
func (t *tx) Controls(f func(custodian.ControlRecord) error) (err error) {
	defer t.guard(&err, t.enter())
	return t.scan(bucketControl, nil, nil, func(k, v []byte) (bool, error) {
		c, err := readControl(k, v)
		if err != nil {
			return false, err
		}
		return true, t.call(func() error { return f(c) })
	})
}

// PutControl writes a control record.
func (t *tx) PutControl(r custodian.ControlRecord) (err error) {
	defer t.guard(&err, t.enter())
	if r.Kind == 0 || r.Name == "" {
		return invalid("control record", errors.New("must have a kind and a name"))
	}
	if err := checkControl(r); err != nil {
		return err
	}
	return t.put(bucketControl, controlKey(r.Kind, r.Name), encodeControl(recordControl, r))
}

// DeleteControl removes a control record, else ErrNotFound.
func (t *tx) DeleteControl(kind custodian.ControlKind, name string) (err error) {
	defer t.guard(&err, t.enter())
	key := controlKey(kind, name)
	if t.get(bucketControl, key) == nil {
		return fmt.Errorf("control record %d %q: %w", kind, name, custodian.ErrNotFound)
	}
	return t.put(bucketControl, key, nil)
}

func checkControl(r custodian.ControlRecord) error {
	if len(r.Name) > maxName {
		return invalid("name", fmt.Errorf("%d bytes: must be at most %d", len(r.Name), maxName))
	}
	if len(r.Body) > maxValue {
		return invalid("body", fmt.Errorf("%d bytes: must be at most %d", len(r.Body), maxValue))
	}
	return nil
}

// ContentKey returns the content key with that KID, else ErrNotFound.
func (t *tx) ContentKey(kid custodian.KID) (k custodian.SealedKey, err error) {
	defer t.guard(&err, t.enter())
	return t.contentKey(kid)
}

func (t *tx) contentKey(kid custodian.KID) (custodian.SealedKey, error) {
	b := t.get(bucketContent, kid[:])
	if b == nil {
		return custodian.SealedKey{}, fmt.Errorf("content key %s: %w", kid, custodian.ErrNotFound)
	}
	// The one copy: everything in k shares it, and nothing the mapped file.
	k, err := decodeContentKey(bytes.Clone(b))
	if err == nil && k.Key.KID != kid {
		err = fmt.Errorf("holds %s", k.Key.KID)
	}
	if err != nil {
		return custodian.SealedKey{}, fmt.Errorf("content key %s: %w: %w", kid, custodian.ErrRecordCorrupt, err)
	}
	return k, nil
}

// indexed returns the content key that an entry of the natural index names.
func (t *tx) indexed(key, value []byte) (custodian.SealedKey, error) {
	kid, err := custodian.KIDFromBytes(value)
	if err != nil {
		return custodian.SealedKey{}, fmt.Errorf("natural key %x: %w: %w", key, custodian.ErrRecordCorrupt, err)
	}
	k, err := t.contentKey(kid)
	if errors.Is(err, custodian.ErrNotFound) {
		return k, fmt.Errorf("content key %s: in the index of natural keys and not in the store: %w", kid, custodian.ErrRecordCorrupt)
	}
	if err != nil {
		return k, err
	}
	if !bytes.Equal(naturalKey(k.Key.NaturalKey), key) {
		return custodian.SealedKey{}, fmt.Errorf("content key %s: stored for %s, indexed otherwise: %w", kid, k.Key.NaturalKey, custodian.ErrRecordCorrupt)
	}
	return k, nil
}

// HighestGeneration returns the content key of the highest generation for n.
func (t *tx) HighestGeneration(n custodian.NaturalKey) (k custodian.SealedKey, err error) {
	defer t.guard(&err, t.enter())
	if err := checkNatural(n); err != nil {
		return k, err
	}
	prefix := naturalPrefix(n)
	c := t.bucket(bucketNatural).Cursor()
	last := binary.BigEndian.AppendUint32(slices.Clip(prefix), 1<<32-1)
	key, value := c.Seek(last)
	if !bytes.Equal(key, last) {
		if key == nil {
			key, value = c.Last()
		} else {
			key, value = c.Prev()
		}
	}
	if len(key) != len(last) || !bytes.HasPrefix(key, prefix) {
		n.Generation = 0
		return k, fmt.Errorf("content key for %s: %w", n, custodian.ErrNotFound)
	}
	return t.indexed(key, value)
}

// ContentCategory returns the category that a content item belongs to.
func (t *tx) ContentCategory(id custodian.ContentID) (c custodian.CategoryName, err error) {
	defer t.guard(&err, t.enter())
	b := t.get(bucketCategory, id)
	if b == nil {
		return "", fmt.Errorf("content item %q: %w", []byte(id), custodian.ErrNotFound)
	}
	return custodian.CategoryName(b), nil
}

// FingerprintOwner returns the KID that the key bytes are stored under.
func (t *tx) FingerprintOwner(f custodian.Fingerprint) (kid custodian.KID, err error) {
	defer t.guard(&err, t.enter())
	b := t.get(bucketFingerprint, fingerprintKey(f))
	if b == nil {
		return kid, fmt.Errorf("fingerprint: %w", custodian.ErrNotFound)
	}
	if kid, err = custodian.KIDFromBytes(b); err != nil {
		return kid, fmt.Errorf("fingerprint: %w: %w", custodian.ErrRecordCorrupt, err)
	}
	return kid, nil
}

// ContentKeys lists the content keys of a category, or of one content item.
func (t *tx) ContentKeys(c custodian.CategoryName, id custodian.ContentID, after *custodian.NaturalKey, limit int, f func(custodian.SealedKey) error) (err error) {
	defer t.guard(&err, t.enter())
	if err := c.Check(); err != nil {
		return invalid("category", err)
	}
	prefix := itemPrefix(c, id)
	from := prefix
	if after != nil {
		// The successor of a key is the key and a zero byte.
		from = append(naturalKey(*after), 0)
		if bytes.Compare(from, prefix) < 0 {
			from = prefix
		}
	}
	if limit <= 0 {
		return nil
	}
	return t.scan(bucketNatural, prefix, from, func(key, value []byte) (bool, error) {
		k, err := t.indexed(key, value)
		if err != nil {
			return false, err
		}
		limit--
		return limit > 0, t.call(func() error { return f(k) })
	})
}

// KeysUnderKEK returns up to limit KIDs whose keys are sealed under id.
func (t *tx) KeysUnderKEK(id custodian.KEKID, after custodian.KID, limit int) (kids []custodian.KID, err error) {
	defer t.guard(&err, t.enter())
	if err := id.Category.Check(); err != nil {
		return nil, invalid("category", err)
	}
	if limit <= 0 {
		return nil, nil
	}
	prefix := kekPrefix(id)
	from := append(byKEKKey(id, after), 0)
	err = t.scan(bucketByKEK, prefix, from, func(key, _ []byte) (bool, error) {
		kid, err := custodian.KIDFromBytes(key[len(prefix):])
		if err != nil {
			return false, fmt.Errorf("kek %s: %w: %w", id, custodian.ErrRecordCorrupt, err)
		}
		kids = append(kids, kid)
		return len(kids) < limit, nil
	})
	if err != nil {
		return nil, err
	}
	return kids, nil
}

// Cursor returns the saved position of a background job, nil if none.
func (t *tx) Cursor(job string) (pos []byte, err error) {
	defer t.guard(&err, t.enter())
	if job == "" {
		return nil, invalid("job", errors.New("must have a name"))
	}
	return bytes.Clone(t.get(bucketCursor, []byte(job))), nil
}

// PutCursor saves the position of a background job; nil removes it.
func (t *tx) PutCursor(job string, pos []byte) (err error) {
	defer t.guard(&err, t.enter())
	if len(job) < 1 || len(job) > maxName {
		return invalid("job", fmt.Errorf("name of %d bytes: must be 1 to %d", len(job), maxName))
	}
	if len(pos) > maxValue {
		return invalid("position", fmt.Errorf("%d bytes: must be at most %d", len(pos), maxValue))
	}
	return t.put(bucketCursor, []byte(job), bytes.Clone(pos))
}

// InsertContentKey adds a content key with all its index entries.
func (t *tx) InsertContentKey(k custodian.SealedKey) (err error) {
	defer t.guard(&err, t.enter())
	if err := checkSealed(k); err != nil {
		return fmt.Errorf("insert content key %s: %w", k.Key.KID, err)
	}
	item, natural := []byte(k.Key.ContentID), naturalKey(k.Key.NaturalKey)
	kid, fingerprint := k.Key.KID[:], fingerprintKey(k.Key.Fingerprint)

	category := t.get(bucketCategory, item)
	if category != nil && string(category) != string(k.Key.Category) {
		return fmt.Errorf("content key %s for %s: stored in category %q: %w", k.Key.KID, k.Key.NaturalKey, category, custodian.ErrContentCategory)
	}
	if owner := t.get(bucketNatural, natural); owner != nil {
		return fmt.Errorf("content key %s for %s: it is %x: %w", k.Key.KID, k.Key.NaturalKey, owner, custodian.ErrNaturalKey)
	}
	if t.get(bucketContent, kid) != nil {
		return fmt.Errorf("content key %s for %s: %w", k.Key.KID, k.Key.NaturalKey, custodian.ErrKIDConflict)
	}
	if owner := t.get(bucketFingerprint, fingerprint); owner != nil {
		return fmt.Errorf("content key %s for %s: stored under %x: %w", k.Key.KID, k.Key.NaturalKey, owner, custodian.ErrFingerprint)
	}

	if category == nil {
		if err := t.put(bucketCategory, bytes.Clone(item), []byte(k.Key.Category)); err != nil {
			return err
		}
	}
	if err := t.put(bucketNatural, natural, bytes.Clone(kid)); err != nil {
		return err
	}
	if err := t.put(bucketFingerprint, fingerprint, bytes.Clone(kid)); err != nil {
		return err
	}
	if err := t.put(bucketByKEK, byKEKKey(k.Key.KEK, k.Key.KID), []byte{}); err != nil {
		return err
	}
	if err := t.put(bucketContent, bytes.Clone(kid), encodeContentKey(k)); err != nil {
		return err
	}
	return t.count(1)
}

// ReplaceContentKey puts k in the place of the record with the same KID. A
// natural key other than the record's is ErrNaturalKey. A fingerprint other
// than the record's is ErrFingerprint, unless it is of another helper key and
// no other record has it.
func (t *tx) ReplaceContentKey(revision uint64, k custodian.SealedKey) (err error) {
	defer t.guard(&err, t.enter())
	if err := checkSealed(k); err != nil {
		return fmt.Errorf("replace content key %s: %w", k.Key.KID, err)
	}
	old, err := t.contentKey(k.Key.KID)
	if err != nil {
		return err
	}
	if old.Key.Revision != revision {
		return fmt.Errorf("content key %s: is at revision %d, not %d: %w", k.Key.KID, old.Key.Revision, revision, custodian.ErrChanged)
	}
	if !old.Key.SameItem(k.Key.NaturalKey) || old.Key.Generation != k.Key.Generation {
		return fmt.Errorf("content key %s: is stored for %s, not %s: %w", k.Key.KID, old.Key.NaturalKey, k.Key.NaturalKey, custodian.ErrNaturalKey)
	}
	if was, is := old.Key.Fingerprint, k.Key.Fingerprint; was != is {
		if was.Version == is.Version {
			return fmt.Errorf("content key %s: its fingerprint would change: %w", k.Key.KID, custodian.ErrFingerprint)
		}
		if owner := t.get(bucketFingerprint, fingerprintKey(is)); owner != nil {
			return fmt.Errorf("content key %s: stored under %x as well: %w", k.Key.KID, owner, custodian.ErrFingerprint)
		}
		if err := t.put(bucketFingerprint, fingerprintKey(was), nil); err != nil {
			return err
		}
		if err := t.put(bucketFingerprint, fingerprintKey(is), bytes.Clone(k.Key.KID[:])); err != nil {
			return err
		}
	}

	if old.Key.KEK != k.Key.KEK {
		if err := t.put(bucketByKEK, byKEKKey(old.Key.KEK, k.Key.KID), nil); err != nil {
			return err
		}
		if err := t.put(bucketByKEK, byKEKKey(k.Key.KEK, k.Key.KID), []byte{}); err != nil {
			return err
		}
	}
	if err := t.put(bucketContent, bytes.Clone(k.Key.KID[:]), encodeContentKey(k)); err != nil {
		return err
	}
	return t.count(0)
}

// count raises the sequence once in an update, and the number of keys.
func (t *tx) count(inserted uint64) error {
	c, err := t.loadCounters()
	if err != nil {
		return err
	}
	if !t.counted {
		t.counted = true
		c.sequence++
	}
	c.contentKeys += inserted
	return nil
}

// checkNatural says whether n has a place in the order of natural keys.
func checkNatural(n custodian.NaturalKey) error {
	if err := n.Category.Check(); err != nil {
		return invalid("category", err)
	}
	if err := n.ContentID.Check(); err != nil {
		return invalid("content_id", err)
	}
	if err := n.TrackType.Check(); err != nil {
		return invalid("track_type", err)
	}
	if err := n.Scheme.Check(); err != nil {
		return invalid("scheme", err)
	}
	if !n.HasPeriod && n.Period != 0 {
		return invalid("period", fmt.Errorf("index %d of no period", n.Period))
	}
	return nil
}

// checkSealed says whether k is fit to be stored: the indexes are made of
// k.Key, and a reader's Key is made of k.Body, so they must agree.
func checkSealed(k custodian.SealedKey) error {
	if err := checkNatural(k.Key.NaturalKey); err != nil {
		return err
	}
	if k.Key.Generation == 0 {
		return invalid("generation", errors.New("must be from 1"))
	}
	if k.Key.KID.IsZero() {
		return invalid("kid", errors.New("the zero KID names no key"))
	}
	if err := k.Key.KEK.Category.Check(); err != nil {
		return invalid("kek", err)
	}
	if len(k.Body) > maxValue || len(k.Sealed) > maxValue {
		return invalid("body", fmt.Errorf("must be at most %d bytes", maxValue))
	}
	if !bytes.Equal(custodian.EncodeContentKey(k.Key), k.Body) {
		return invalid("body", errors.New("is not the encoding of the key"))
	}
	if _, err := custodian.DecodeContentKey(k.Body); err != nil {
		return invalid("body", err)
	}
	return nil
}

func invalid(field string, err error) error { return &custodian.InvalidError{Field: field, Err: err} }
