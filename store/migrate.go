package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"

	berrors "go.etcd.io/bbolt/errors"

	"github.com/keycustody/custodian/custodian"
)

// A migration brings a store from one schema to the next within one
// transaction. It writes through t.bolt.
type migration func(ctx context.Context, t *tx) error

// migrations[n] leads from schema n to n+1. Schema 0 was never released: it
// has the records and the categories of content items, but no indexes and no
// counters, and its migration is the one that makes them anew.
var migrations = [Schema]migration{
	0: rebuildIndexes,
}

// Migrate brings the store at path to this program's schema: it writes a copy
// to backupPath, which must not exist, makes it durable, and then changes the
// store in one transaction, which it keeps only if the result passes Check.
// A store of the current schema is left as it is, without a copy. A newer one
// is ErrNewerSchema.
func Migrate(ctx context.Context, path, backupPath string, o Options) (err error) {
	s, schema, err := openAny(ctx, path, o)
	if err != nil {
		return fmt.Errorf("migrate store %s: %w", path, err)
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	switch {
	case schema > Schema:
		return fmt.Errorf("migrate store %s: schema %d, this program knows %d: %w", path, schema, Schema, ErrNewerSchema)
	case schema == Schema:
		return nil
	}
	if err := s.backupTo(ctx, backupPath); err != nil {
		return fmt.Errorf("migrate store %s: %w", path, err)
	}
	if err := s.migrate(ctx, schema); err != nil {
		return fmt.Errorf("migrate store %s from schema %d to %d: %w", path, schema, Schema, err)
	}
	return nil
}

// backupTo writes a backup to a file that must not exist, durably.
func (s *Store) backupTo(ctx context.Context, path string) error {
	if _, err := os.Lstat(path); err == nil {
		return fmt.Errorf("backup %s: %w", path, os.ErrExist)
	}
	partial := path + ".partial"
	f, err := os.OpenFile(partial, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return device(err)
	}
	err = s.Backup(ctx, f)
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return errors.Join(device(err), os.Remove(partial))
	}
	if err := rename(partial, path); err != nil {
		return fmt.Errorf("backup %s of store in %s: %w", path, filepath.Dir(s.path), err)
	}
	return nil
}

func (s *Store) migrate(ctx context.Context, schema uint32) error {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	t, err := s.begin(true)
	if err != nil {
		return err
	}
	defer s.abandon(t)
	for ; schema < Schema; schema++ {
		if err := t.migrate(ctx, migrations[schema], schema+1); err != nil {
			return err
		}
	}
	if err := t.checkRecords(ctx); err != nil {
		return err
	}
	return s.commit(t)
}

func (t *tx) migrate(ctx context.Context, m migration, to uint32) (err error) {
	defer t.guard(&err, t.enter())
	if err := m(ctx, t); err != nil {
		return err
	}
	if err := putSchema(t.bolt, to); err != nil {
		return device(err)
	}
	return nil
}

// rebuildIndexes makes everything anew that follows from the content keys.
func rebuildIndexes(ctx context.Context, t *tx) error {
	for _, id := range []bucketID{bucketNatural, bucketFingerprint, bucketByKEK} {
		err := t.bolt.DeleteBucket(bucketNames[id])
		if err != nil && !errors.Is(err, berrors.ErrBucketNotFound) {
			return device(err)
		}
		if t.buckets[id], err = t.bolt.CreateBucket(bucketNames[id]); err != nil {
			return device(err)
		}
	}
	if _, err := t.bolt.CreateBucketIfNotExists(bucketNames[bucketCursor]); err != nil {
		return device(err)
	}
	var c counters
	err := t.scan(bucketContent, nil, nil, func(kid, _ []byte) (bool, error) {
		if err := ctx.Err(); err != nil {
			return false, err
		}
		c.contentKeys++
		k, err := t.contentKey(custodian.KID(kid))
		if err != nil {
			return false, err
		}
		return true, t.index(k.Key)
	})
	if err != nil {
		return err
	}
	return t.set(bucketMeta, metaCounters, encodeCounters(c))
}

// index writes the index entries of a content key that has none.
func (t *tx) index(k custodian.ContentKey) error {
	for _, e := range []struct {
		bucket     bucketID
		key, value []byte
		taken      error
	}{
		{bucketNatural, naturalKey(k.NaturalKey), k.KID[:], custodian.ErrNaturalKey},
		{bucketFingerprint, fingerprintKey(k.Fingerprint), k.KID[:], custodian.ErrFingerprint},
		{bucketByKEK, byKEKKey(k.KEK, k.KID), []byte{}, custodian.ErrKIDConflict},
	} {
		if t.get(e.bucket, e.key) != nil {
			return fmt.Errorf("content key %s: %w: %w", k.KID, custodian.ErrRecordCorrupt, e.taken)
		}
		if err := t.set(e.bucket, e.key, bytes.Clone(e.value)); err != nil {
			return err
		}
	}
	return nil
}
