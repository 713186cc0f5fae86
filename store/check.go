package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"runtime/debug"

	bolt "go.etcd.io/bbolt"

	"github.com/keycustody/custodian/custodian"
)

// Check reads the whole store: every page, and every record against every
// index entry. Its error names what does not fit, wrapping
// custodian.ErrRecordCorrupt (or ErrDamaged for pages), or is one of the
// device. It says nothing of genuineness: MACs are not the store's.
func (s *Store) Check(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("check store: %w", err)
	}
	if s.unsettled.Load() {
		return s.broken.Load().err
	}
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	t, m, err := s.snapshot(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = t.bolt.Rollback() }() // a read transaction has nothing to lose
	if err := newWalker(s.file, m, true).check(); err != nil {
		return fmt.Errorf("check store %s: %w: %w", s.path, ErrDamaged, err)
	}
	if err := t.checkRecords(ctx); err != nil {
		return fmt.Errorf("check store %s: %w", s.path, err)
	}
	return nil
}

// snapshot begins a read transaction and reads its meta page, which the next
// commit but one overwrites: no update may run in between.
func (s *Store) snapshot(ctx context.Context) (*tx, meta, error) {
	select {
	case s.writer <- struct{}{}:
	case <-ctx.Done():
		return nil, meta{}, fmt.Errorf("check store: %w", ctx.Err())
	}
	defer func() { <-s.writer }()
	size, err := s.size()
	if err != nil {
		return nil, meta{}, err
	}
	t, err := s.begin(false)
	if err != nil {
		return nil, meta{}, err
	}
	m, err := readMeta(s.file, size)
	if err == nil && m.txid != uint64(t.bolt.ID()) {
		err = fmt.Errorf("meta page of transaction %d, want %d", m.txid, t.bolt.ID())
	}
	if err != nil {
		_ = t.bolt.Rollback() // a read transaction has nothing to lose
		return nil, meta{}, fmt.Errorf("check store %s: %w: %w", s.path, ErrDamaged, err)
	}
	return t, m, nil
}

// checkRecords holds records and indexes against each other. Each content key
// has entries of its own in three indexes, so where these have as many
// entries as there are content keys, none is left over.
func (t *tx) checkRecords(ctx context.Context) (err error) {
	defer t.guard(&err, t.enter())
	var keys uint64
	err = t.scan(bucketContent, nil, nil, func(key, _ []byte) (bool, error) {
		if err := ctx.Err(); err != nil {
			return false, err
		}
		kid, err := custodian.KIDFromBytes(key)
		if err != nil {
			return false, fmt.Errorf("content key %x: %w: %w", key, custodian.ErrRecordCorrupt, err)
		}
		keys++
		return true, t.checkContentKey(kid)
	})
	if err != nil {
		return err
	}
	for _, id := range []bucketID{bucketNatural, bucketFingerprint, bucketByKEK} {
		if err := t.checkCount(ctx, id, keys); err != nil {
			return err
		}
	}
	if err := t.checkCategories(ctx); err != nil {
		return err
	}
	c, err := decodeCounters(t.get(bucketMeta, metaCounters))
	if err != nil {
		return fmt.Errorf("counters: %w: %w", custodian.ErrRecordCorrupt, err)
	}
	if c.contentKeys != keys {
		return fmt.Errorf("counters: %d content keys, there are %d: %w", c.contentKeys, keys, custodian.ErrRecordCorrupt)
	}
	return t.checkOthers()
}

// checkContentKey holds one record against its index entries.
func (t *tx) checkContentKey(kid custodian.KID) error {
	k, err := t.contentKey(kid)
	if err != nil {
		return err
	}
	if err := checkSealed(k); err != nil {
		return fmt.Errorf("content key %s: %w: %w", kid, custodian.ErrRecordCorrupt, err)
	}
	for _, e := range []struct {
		bucket bucketID
		key    []byte
		want   []byte
	}{
		{bucketNatural, naturalKey(k.Key.NaturalKey), kid[:]},
		{bucketCategory, k.Key.ContentID, []byte(k.Key.Category)},
		{bucketFingerprint, fingerprintKey(k.Key.Fingerprint), kid[:]},
		{bucketByKEK, byKEKKey(k.Key.KEK, kid), []byte{}},
	} {
		got := t.get(e.bucket, e.key)
		if got == nil {
			return fmt.Errorf("content key %s: index %s has no entry: %w", kid, bucketNames[e.bucket], custodian.ErrRecordCorrupt)
		}
		if !bytes.Equal(got, e.want) {
			return fmt.Errorf("content key %s: index %s has %x, want %x: %w", kid, bucketNames[e.bucket], got, e.want, custodian.ErrRecordCorrupt)
		}
	}
	return nil
}

func (t *tx) checkCount(ctx context.Context, id bucketID, want uint64) error {
	var got uint64
	err := t.scan(id, nil, nil, func(_, _ []byte) (bool, error) {
		got++
		return true, ctx.Err()
	})
	if err == nil && got != want {
		err = fmt.Errorf("index %s: %d entries for %d content keys: %w", bucketNames[id], got, want, custodian.ErrRecordCorrupt)
	}
	return err
}

// checkCategories looks for content items without a content key.
func (t *tx) checkCategories(ctx context.Context) error {
	c := t.bucket(bucketNatural).Cursor()
	return t.scan(bucketCategory, nil, nil, func(id, category []byte) (bool, error) {
		prefix := itemPrefix(custodian.CategoryName(category), id)
		if k, _ := c.Seek(prefix); !bytes.HasPrefix(k, prefix) {
			return false, fmt.Errorf("content item %q of category %q: it has no content key: %w", id, category, custodian.ErrRecordCorrupt)
		}
		return true, ctx.Err()
	})
}

// checkOthers decodes the records that have no index.
func (t *tx) checkOthers() error {
	if _, err := t.Head(); err != nil && !errors.Is(err, custodian.ErrNotFound) {
		return err
	}
	if _, err := t.InitJournal(); err != nil && !errors.Is(err, custodian.ErrNotFound) {
		return err
	}
	if err := t.Controls(func(custodian.ControlRecord) error { return nil }); err != nil {
		return err
	}
	return t.bolt.ForEach(func(name []byte, _ *bolt.Bucket) error {
		for _, known := range bucketNames {
			if bytes.Equal(name, known) {
				return nil
			}
		}
		return fmt.Errorf("bucket %q: none of ours: %w", name, custodian.ErrRecordCorrupt)
	})
}
