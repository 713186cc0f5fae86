package custodiantest

import (
	"bytes"
	"cmp"
	"context"
	"encoding/gob"
	"fmt"
	"io"
	"strings"
	"sync/atomic"

	"github.com/keycustody/custodian/custodian"
)

// NewStore returns an empty store in memory. It keeps the whole contract of
// custodian.Store but durability: its transactions are serializable, readers
// see one state however long they take, and nothing that goes in or comes out
// shares memory with it.
//
// As f of Update may run twice, here every f that succeeds does: the first
// run is thrown away. An f with an effect beside its transaction so fails in
// a test before it does in production.
func NewStore() custodian.Store {
	s := &memory{writer: make(chan struct{}, 1)}
	s.state.Store(&state{})
	return s
}

type memory struct {
	writer chan struct{} // holds a token while an update runs
	state  atomic.Pointer[state]
	closed atomic.Bool
}

// A state is everything stored. It never changes: an update works on a copy,
// whose trees share what is alike.
type state struct {
	head        *custodian.ControlRecord
	journal     *custodian.InitJournal
	controls    tree[controlID, custodian.ControlRecord]
	content     tree[custodian.KID, custodian.SealedKey]
	natural     tree[custodian.NaturalKey, custodian.KID]
	categories  tree[string, custodian.CategoryName]
	fingerprint tree[custodian.Fingerprint, custodian.KID]
	byKEK       tree[kekUse, struct{}]
	cursors     tree[string, []byte]
	keys        uint64
	sequence    uint64
}

type controlID struct {
	kind custodian.ControlKind
	name string
}

func compareControl(a, b controlID) int {
	return cmp.Or(cmp.Compare(a.kind, b.kind), strings.Compare(a.name, b.name))
}

type kekUse struct {
	kek custodian.KEKID
	kid custodian.KID
}

func compareUse(a, b kekUse) int {
	return cmp.Or(
		cmp.Compare(a.kek.Category, b.kek.Category),
		cmp.Compare(a.kek.Version, b.kek.Version),
		compareKID(a.kid, b.kid))
}

func compareKID(a, b custodian.KID) int { return bytes.Compare(a[:], b[:]) }

func compareFingerprint(a, b custodian.Fingerprint) int {
	return cmp.Or(cmp.Compare(a.Version, b.Version), bytes.Compare(a.MAC[:], b.MAC[:]))
}

// compareNatural is the order of ContentKeys.
func compareNatural(a, b custodian.NaturalKey) int {
	return cmp.Or(
		cmp.Compare(a.Category, b.Category),
		bytes.Compare(a.ContentID, b.ContentID),
		cmp.Compare(a.TrackType, b.TrackType),
		cmp.Compare(a.Scheme, b.Scheme),
		comparePeriod(a, b),
		cmp.Compare(a.Generation, b.Generation))
}

func comparePeriod(a, b custodian.NaturalKey) int {
	switch {
	case a.HasPeriod == b.HasPeriod:
		return cmp.Compare(a.Period, b.Period)
	case b.HasPeriod:
		return -1
	}
	return 1
}

func (m *memory) check(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("store in memory: %w", err)
	}
	if m.closed.Load() {
		return fmt.Errorf("store in memory: closed: %w", custodian.ErrStoreUnavailable)
	}
	return nil
}

func (m *memory) View(ctx context.Context, f func(custodian.Tx) error) error {
	if err := m.check(ctx); err != nil {
		return err
	}
	s := *m.state.Load()
	return f(&memoryTx{state: &s})
}

func (m *memory) Update(ctx context.Context, f func(custodian.UpdateTx) error) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("store in memory: %w", err)
	}
	select {
	case m.writer <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("store in memory: %w", ctx.Err())
	}
	defer func() { <-m.writer }()
	if err := m.check(ctx); err != nil {
		return err
	}
	rehearsal := *m.state.Load()
	if err := f(&memoryTx{state: &rehearsal}); err != nil {
		return err
	}
	next := *m.state.Load()
	if err := f(&memoryTx{state: &next}); err != nil {
		return err
	}
	m.state.Store(&next)
	return nil
}

// Backup writes the records one after the other. No function reads them.
func (m *memory) Backup(ctx context.Context, w io.Writer) error {
	return m.View(ctx, func(tx custodian.Tx) error {
		s := tx.(*memoryTx).state
		enc := gob.NewEncoder(w)
		for _, e := range s.controls.from(controlID{}, compareControl) {
			if err := enc.Encode(e); err != nil {
				return fmt.Errorf("back up store in memory: %w", err)
			}
		}
		for _, e := range s.content.from(custodian.KID{}, compareKID) {
			if err := enc.Encode(e); err != nil {
				return fmt.Errorf("back up store in memory: %w", err)
			}
		}
		if err := enc.Encode(s.sequence); err != nil {
			return fmt.Errorf("back up store in memory: %w", err)
		}
		return nil
	})
}

func (m *memory) Stats(ctx context.Context) (custodian.StoreStats, error) {
	if err := m.check(ctx); err != nil {
		return custodian.StoreStats{}, err
	}
	s := m.state.Load()
	return custodian.StoreStats{Engine: "memory", ContentKeys: s.keys, Sequence: s.sequence}, nil
}

func (m *memory) Close() error {
	m.closed.Store(true)
	return nil
}

// A memoryTx works on a state of its own.
type memoryTx struct {
	state   *state
	counted bool
}

func missing(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, custodian.ErrNotFound)...)
}

func (t *memoryTx) Head() (custodian.ControlRecord, error) {
	if t.state.head == nil {
		return custodian.ControlRecord{}, missing("head")
	}
	return copyControl(*t.state.head), nil
}

func (t *memoryTx) PutHead(r custodian.ControlRecord) error {
	if r.Kind != 0 {
		return invalid("kind", "the head has kind 0, not %d", r.Kind)
	}
	r = copyControl(r)
	t.state.head = &r
	return nil
}

func (t *memoryTx) InitJournal() (custodian.InitJournal, error) {
	if t.state.journal == nil {
		return custodian.InitJournal{}, missing("init journal")
	}
	return *t.state.journal, nil
}

func (t *memoryTx) PutInitJournal(j custodian.InitJournal) error {
	j.Start, j.End = j.Start.UTC().Round(0), j.End.UTC().Round(0)
	t.state.journal = &j
	return nil
}

func (t *memoryTx) DeleteInitJournal() error {
	t.state.journal = nil
	return nil
}

func (t *memoryTx) Control(kind custodian.ControlKind, name string) (custodian.ControlRecord, error) {
	r, ok := t.state.controls.get(controlID{kind, name}, compareControl)
	if !ok {
		return r, missing("control record %d %q", kind, name)
	}
	return copyControl(r), nil
}

func (t *memoryTx) Controls(f func(custodian.ControlRecord) error) error {
	id, r, ok := t.state.controls.next(controlID{}, true, compareControl)
	for ok {
		if err := f(copyControl(r)); err != nil {
			return err
		}
		id, r, ok = t.state.controls.next(id, false, compareControl)
	}
	return nil
}

func (t *memoryTx) PutControl(r custodian.ControlRecord) error {
	if r.Kind == 0 || r.Name == "" {
		return invalid("control record", "must have a kind and a name")
	}
	t.state.controls = t.state.controls.with(controlID{r.Kind, r.Name}, copyControl(r), compareControl)
	return nil
}

func (t *memoryTx) DeleteControl(kind custodian.ControlKind, name string) error {
	id := controlID{kind, name}
	if _, ok := t.state.controls.get(id, compareControl); !ok {
		return missing("control record %d %q", kind, name)
	}
	t.state.controls = t.state.controls.without(id, compareControl)
	return nil
}

func (t *memoryTx) ContentKey(kid custodian.KID) (custodian.SealedKey, error) {
	k, ok := t.state.content.get(kid, compareKID)
	if !ok {
		return k, missing("content key %s", kid)
	}
	return copySealed(k), nil
}

func (t *memoryTx) HighestGeneration(n custodian.NaturalKey) (custodian.SealedKey, error) {
	if err := checkNatural(n); err != nil {
		return custodian.SealedKey{}, err
	}
	n.Generation = 0
	var best custodian.SealedKey
	found := false
	for k, kid, ok := t.state.natural.next(n, true, compareNatural); ok && k.SameItem(n); k, kid, ok = t.state.natural.next(k, false, compareNatural) {
		best, found = t.state.content.get(kid, compareKID)
	}
	if !found {
		return best, missing("content key for %s", n)
	}
	return copySealed(best), nil
}

func (t *memoryTx) ContentCategory(id custodian.ContentID) (custodian.CategoryName, error) {
	c, ok := t.state.categories.get(string(id), strings.Compare)
	if !ok {
		return "", missing("content item %q", []byte(id))
	}
	return c, nil
}

func (t *memoryTx) FingerprintOwner(f custodian.Fingerprint) (custodian.KID, error) {
	kid, ok := t.state.fingerprint.get(f, compareFingerprint)
	if !ok {
		return kid, missing("fingerprint")
	}
	return kid, nil
}

func (t *memoryTx) ContentKeys(c custodian.CategoryName, id custodian.ContentID, after *custodian.NaturalKey, limit int, f func(custodian.SealedKey) error) error {
	if err := c.Check(); err != nil {
		return &custodian.InvalidError{Field: "category", Err: err}
	}
	from := custodian.NaturalKey{Category: c, ContentID: id}
	inclusive := true
	if after != nil && compareNatural(*after, from) >= 0 {
		from, inclusive = *after, false
	}
	n, kid, ok := t.state.natural.next(from, inclusive, compareNatural)
	for ; ok && limit > 0; limit-- {
		if n.Category != c || len(id) > 0 && !bytes.Equal(n.ContentID, id) {
			return nil
		}
		k, _ := t.state.content.get(kid, compareKID)
		if err := f(copySealed(k)); err != nil {
			return err
		}
		n, kid, ok = t.state.natural.next(n, false, compareNatural)
	}
	return nil
}

func (t *memoryTx) KeysUnderKEK(id custodian.KEKID, after custodian.KID, limit int) ([]custodian.KID, error) {
	if err := id.Category.Check(); err != nil {
		return nil, &custodian.InvalidError{Field: "category", Err: err}
	}
	var kids []custodian.KID
	use, _, ok := t.state.byKEK.next(kekUse{id, after}, false, compareUse)
	for ok && use.kek == id && len(kids) < limit {
		kids = append(kids, use.kid)
		use, _, ok = t.state.byKEK.next(use, false, compareUse)
	}
	return kids, nil
}

func (t *memoryTx) Cursor(job string) ([]byte, error) {
	if job == "" {
		return nil, invalid("job", "must have a name")
	}
	pos, _ := t.state.cursors.get(job, strings.Compare)
	return bytes.Clone(pos), nil
}

func (t *memoryTx) PutCursor(job string, pos []byte) error {
	if job == "" {
		return invalid("job", "must have a name")
	}
	if pos == nil {
		t.state.cursors = t.state.cursors.without(job, strings.Compare)
		return nil
	}
	t.state.cursors = t.state.cursors.with(job, bytes.Clone(pos), strings.Compare)
	return nil
}

func (t *memoryTx) Sequence() uint64 { return t.state.sequence }

func (t *memoryTx) InsertContentKey(k custodian.SealedKey) error {
	if err := checkSealed(k); err != nil {
		return fmt.Errorf("insert content key %s: %w", k.Key.KID, err)
	}
	k = copySealed(k)
	what := func(err error) error {
		return fmt.Errorf("content key %s for %s: %w", k.Key.KID, k.Key.NaturalKey, err)
	}
	s := t.state
	if c, ok := s.categories.get(string(k.Key.ContentID), strings.Compare); ok && c != k.Key.Category {
		return what(custodian.ErrContentCategory)
	}
	if _, ok := s.natural.get(k.Key.NaturalKey, compareNatural); ok {
		return what(custodian.ErrNaturalKey)
	}
	if _, ok := s.content.get(k.Key.KID, compareKID); ok {
		return what(custodian.ErrKIDConflict)
	}
	if _, ok := s.fingerprint.get(k.Key.Fingerprint, compareFingerprint); ok {
		return what(custodian.ErrFingerprint)
	}
	s.categories = s.categories.with(string(k.Key.ContentID), k.Key.Category, strings.Compare)
	s.natural = s.natural.with(k.Key.NaturalKey, k.Key.KID, compareNatural)
	s.content = s.content.with(k.Key.KID, k, compareKID)
	s.fingerprint = s.fingerprint.with(k.Key.Fingerprint, k.Key.KID, compareFingerprint)
	s.byKEK = s.byKEK.with(kekUse{k.Key.KEK, k.Key.KID}, struct{}{}, compareUse)
	s.keys++
	t.count()
	return nil
}

func (t *memoryTx) ReplaceContentKey(revision uint64, k custodian.SealedKey) error {
	if err := checkSealed(k); err != nil {
		return fmt.Errorf("replace content key %s: %w", k.Key.KID, err)
	}
	k = copySealed(k)
	s := t.state
	old, ok := s.content.get(k.Key.KID, compareKID)
	switch {
	case !ok:
		return missing("content key %s", k.Key.KID)
	case old.Key.Revision != revision:
		return fmt.Errorf("content key %s: is at revision %d, not %d: %w", k.Key.KID, old.Key.Revision, revision, custodian.ErrChanged)
	case compareNatural(old.Key.NaturalKey, k.Key.NaturalKey) != 0:
		return fmt.Errorf("content key %s: is stored for %s: %w", k.Key.KID, old.Key.NaturalKey, custodian.ErrNaturalKey)
	case old.Key.Fingerprint != k.Key.Fingerprint && old.Key.Fingerprint.Version == k.Key.Fingerprint.Version:
		return fmt.Errorf("content key %s: its fingerprint would change: %w", k.Key.KID, custodian.ErrFingerprint)
	}
	if old.Key.Fingerprint != k.Key.Fingerprint {
		if _, taken := s.fingerprint.get(k.Key.Fingerprint, compareFingerprint); taken {
			return fmt.Errorf("content key %s: another has its fingerprint: %w", k.Key.KID, custodian.ErrFingerprint)
		}
		s.fingerprint = s.fingerprint.without(old.Key.Fingerprint, compareFingerprint)
		s.fingerprint = s.fingerprint.with(k.Key.Fingerprint, k.Key.KID, compareFingerprint)
	}
	s.byKEK = s.byKEK.without(kekUse{old.Key.KEK, k.Key.KID}, compareUse)
	s.byKEK = s.byKEK.with(kekUse{k.Key.KEK, k.Key.KID}, struct{}{}, compareUse)
	s.content = s.content.with(k.Key.KID, k, compareKID)
	t.count()
	return nil
}

// count raises the sequence once in an update.
func (t *memoryTx) count() {
	if !t.counted {
		t.counted = true
		t.state.sequence++
	}
}

func copyControl(r custodian.ControlRecord) custodian.ControlRecord {
	r.Body = append([]byte{}, r.Body...)
	return r
}

// copySealed reads the key out of a copy of the body, as a store on disk
// does. The body was decoded before it was stored.
func copySealed(k custodian.SealedKey) custodian.SealedKey {
	k.Body = append([]byte{}, k.Body...)
	k.Sealed = append([]byte{}, k.Sealed...)
	k.Key, _ = custodian.DecodeContentKey(k.Body)
	return k
}

func checkNatural(n custodian.NaturalKey) error {
	for _, c := range []struct {
		field string
		err   error
	}{
		{"category", n.Category.Check()},
		{"content_id", n.ContentID.Check()},
		{"track_type", n.TrackType.Check()},
		{"scheme", n.Scheme.Check()},
	} {
		if c.err != nil {
			return &custodian.InvalidError{Field: c.field, Err: c.err}
		}
	}
	if !n.HasPeriod && n.Period != 0 {
		return invalid("period", "index %d of no period", n.Period)
	}
	return nil
}

func checkSealed(k custodian.SealedKey) error {
	if err := checkNatural(k.Key.NaturalKey); err != nil {
		return err
	}
	switch {
	case k.Key.Generation == 0:
		return invalid("generation", "must be from 1")
	case k.Key.KID.IsZero():
		return invalid("kid", "the zero KID names no key")
	case k.Key.KEK.Category.Check() != nil:
		return &custodian.InvalidError{Field: "kek", Err: k.Key.KEK.Category.Check()}
	case !bytes.Equal(custodian.EncodeContentKey(k.Key), k.Body):
		return invalid("body", "is not the encoding of the key")
	}
	if _, err := custodian.DecodeContentKey(k.Body); err != nil {
		return &custodian.InvalidError{Field: "body", Err: err}
	}
	return nil
}

func invalid(field, format string, args ...any) error {
	return &custodian.InvalidError{Field: field, Err: fmt.Errorf(format, args...)}
}
