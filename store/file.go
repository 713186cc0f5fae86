package store

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"syscall"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/keycustody/custodian/custodian"
)

// Schema is the layout that this package writes. migrations lead to it.
const Schema = 1

// Errors of Open and Migrate. The file is then as it was, to the byte.
var (
	// ErrForeign: the file is none of ours.
	ErrForeign = errors.New("not a key store")
	// ErrTruncated: the file is shorter than the store in it.
	ErrTruncated = errors.New("the file is truncated; restore a backup")
	// ErrDamaged: pages that hold the file together are damaged.
	ErrDamaged = errors.New("the file is damaged; restore a backup")
	// ErrNewerSchema: a later version of custodiand has written the file.
	ErrNewerSchema = errors.New("the store has a newer schema; run the custodiand that wrote it, or a later one")
	// ErrOlderSchema: Migrate must be called first.
	ErrOlderSchema = errors.New("the store has an older schema; run custodiand -migrate")
	// ErrLocked: another process has the store open.
	ErrLocked = errors.New("the store is in use by another process")
)

// Open opens the store at path. Its errors are those above, else
// custodian.ErrStoreUnavailable with the device's own, fs.ErrNotExist among
// them.
func Open(ctx context.Context, path string, o Options) (*Store, error) {
	s, schema, err := openAny(ctx, path, o)
	if err != nil {
		return nil, fmt.Errorf("open store %s: %w", path, err)
	}
	switch {
	case schema > Schema:
		err = fmt.Errorf("open store %s: schema %d, this program knows %d: %w", path, schema, Schema, ErrNewerSchema)
	case schema < Schema:
		err = fmt.Errorf("open store %s: schema %d, this program wants %d: %w", path, schema, Schema, ErrOlderSchema)
	default:
		return s, nil
	}
	return nil, errors.Join(err, s.Close())
}

// openAny opens a store of any schema, and writes nothing.
func openAny(ctx context.Context, path string, o Options) (*Store, uint32, error) {
	o = o.withDefaults()
	info, err := os.Stat(path)
	if err != nil {
		return nil, 0, device(err)
	}
	if !info.Mode().IsRegular() {
		return nil, 0, fmt.Errorf("%s: %w", info.Mode().Type(), ErrForeign)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, 0, device(err)
	}
	s, schema, err := openFile(ctx, f, path, o)
	if err != nil {
		return nil, 0, errors.Join(err, closed(f))
	}
	return s, schema, nil
}

// openFile locks and examines f and then gives it to bbolt.
func openFile(ctx context.Context, f *os.File, path string, o Options) (*Store, uint32, error) {
	if err := lock(ctx, f, o.Timeout); err != nil {
		return nil, 0, err
	}
	if err := examine(f); err != nil {
		return nil, 0, err
	}
	s, err := openBolt(f, path, o)
	if err != nil {
		return nil, 0, err
	}
	schema, err := s.readSchema()
	if err != nil {
		return nil, 0, errors.Join(err, s.Close())
	}
	return s, schema, nil
}

// closed closes f, which bbolt may have closed already.
func closed(f *os.File) error {
	if err := f.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return err
	}
	return nil
}

// lock takes the lock that bbolt takes, before anybody reads: a file that
// another process writes to may look damaged.
func lock(ctx context.Context, f *os.File, timeout time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	for {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return nil
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) && !errors.Is(err, syscall.EINTR) {
			return device(fmt.Errorf("lock: %w", err))
		}
		select {
		case <-ctx.Done():
			return ErrLocked
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// examine refuses a file that bbolt would not survive, or would initialise.
func examine(f *os.File) error {
	info, err := f.Stat()
	if err != nil {
		return device(err)
	}
	m, err := readMeta(f, info.Size())
	if err == nil {
		err = newWalker(f, m, false).check()
	}
	var path *fs.PathError
	switch {
	case err == nil:
		return nil
	case errors.Is(err, errNotBolt):
		return fmt.Errorf("%w: %w", ErrForeign, err)
	case errors.Is(err, errTooShort):
		return fmt.Errorf("%w: %w", ErrTruncated, err)
	case errors.As(err, &path):
		return device(err)
	}
	return fmt.Errorf("%w: %w", ErrDamaged, err)
}

// openBolt gives a locked file to bbolt, to close it in the end. On an error
// it may or may not be closed.
func openBolt(f *os.File, path string, o Options) (s *Store, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			o.Log.Error("damaged file", "path", path, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
			s, err = nil, fmt.Errorf("%w: %v", ErrDamaged, p)
		}
	}()
	db, err := bolt.Open(path, 0o600, &bolt.Options{
		// Its lock is on the same open file, so it has it already.
		Timeout:         o.Timeout,
		FreelistType:    bolt.FreelistMapType,
		InitialMmapSize: o.InitialMmapSize,
		NoStatistics:    true, // a mutex on each read; nobody reads them
		OpenFile:        func(string, int, fs.FileMode) (*os.File, error) { return f, nil },
	})
	if err != nil {
		return nil, device(err)
	}
	return &Store{path: path, db: db, file: f, log: o.Log, writer: make(chan struct{}, 1)}, nil
}

// readSchema returns the schema of a store, ErrForeign if it is none.
func (s *Store) readSchema() (schema uint32, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	t, err := s.begin(false)
	if err != nil {
		return 0, err
	}
	defer func() { _ = t.bolt.Rollback() }() // a read transaction has nothing to lose
	defer t.guard(&err, t.enter())
	b := t.bucket(bucketMeta)
	if b == nil || string(b.Get(metaMarker)) != string(marker) {
		return 0, fmt.Errorf("%w: a bbolt file without our marker", ErrForeign)
	}
	v := b.Get(metaSchema)
	if len(v) != 4 {
		return 0, fmt.Errorf("%w: schema of %d bytes", ErrDamaged, len(v))
	}
	schema = binary.BigEndian.Uint32(v)
	if schema != Schema {
		return schema, nil // other buckets may be there
	}
	for i, name := range bucketNames {
		if t.bucket(bucketID(i)) == nil {
			return 0, fmt.Errorf("%w: no bucket %s", ErrDamaged, name)
		}
	}
	return schema, nil
}

// Create makes an empty store at path and opens it. It refuses a path that
// exists (fs.ErrExist). The store is made under the name path.new and gets
// its own when it is whole and durable, so a crash leaves no half of one.
func Create(ctx context.Context, path string, o Options) (*Store, error) {
	s, err := create(ctx, path, o.withDefaults())
	if err != nil {
		return nil, fmt.Errorf("create store %s: %w", path, err)
	}
	return s, nil
}

func create(ctx context.Context, path string, o Options) (*Store, error) {
	if _, err := os.Lstat(path); err == nil {
		return nil, fs.ErrExist
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, device(err)
	}
	fresh := path + ".new"
	f, err := createFresh(ctx, fresh, o.Timeout)
	if err != nil {
		return nil, err
	}
	s, err := openBolt(f, path, o)
	if err != nil {
		return nil, errors.Join(err, closed(f))
	}
	if err := s.initialise(); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	if err := rename(fresh, path); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// createFresh makes an empty file and locks it. One that a crash has left
// behind is removed, one that another process is at work on is not.
func createFresh(ctx context.Context, path string, timeout time.Duration) (*os.File, error) {
	if old, err := os.OpenFile(path, os.O_RDWR, 0); err == nil {
		err = lock(ctx, old, timeout)
		if err == nil {
			err = os.Remove(path)
		}
		if err := errors.Join(err, old.Close()); err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, device(err)
	}
	if err := lock(ctx, f, timeout); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", path, err), f.Close())
	}
	return f, nil
}

// rename gives a file its final name, which must not exist, durably.
func rename(from, to string) error {
	// A link, unlike a rename, replaces nothing.
	if err := os.Link(from, to); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return err
		}
		return device(err)
	}
	if err := os.Remove(from); err != nil {
		return device(err)
	}
	return syncDir(filepath.Dir(to))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return device(err)
	}
	if err := d.Sync(); err != nil {
		return errors.Join(device(err), d.Close())
	}
	return d.Close()
}

// initialise writes the empty buckets of the schema.
func (s *Store) initialise() error {
	err := s.db.Update(func(b *bolt.Tx) error {
		for _, name := range bucketNames {
			if _, err := b.CreateBucket(name); err != nil {
				return err
			}
		}
		m := b.Bucket(bucketNames[bucketMeta])
		if err := m.Put(metaMarker, marker); err != nil {
			return err
		}
		if err := m.Put(metaCounters, encodeCounters(counters{})); err != nil {
			return err
		}
		return putSchema(b, Schema)
	})
	if err != nil {
		return device(err)
	}
	return nil
}

func putSchema(b *bolt.Tx, schema uint32) error {
	return b.Bucket(bucketNames[bucketMeta]).Put(metaSchema, binary.BigEndian.AppendUint32(nil, schema))
}

// device marks an error as one of the device.
func device(err error) error { return fmt.Errorf("%w: %w", custodian.ErrStoreUnavailable, err) }
