package store_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/custodian/custodiantest"
	"github.com/keycustody/custodian/store"
)

// pageSize is bbolt's, that of the machine.
var pageSize = int64(os.Getpagesize())

// storeFile makes a store with some of everything and returns its bytes: a
// backup, so that there is nothing after the last page.
func storeFile(t testing.TB) []byte {
	t.Helper()
	s := create(t, filepath.Join(t.TempDir(), "keys.db"))
	seed(t, s, 0, 200, 20)
	err := s.Update(t.Context(), func(tx custodian.UpdateTx) error {
		for i := range 50 {
			r := custodian.ControlRecord{Kind: custodian.ControlKEK, Name: fmt.Sprint("movies/", i), Body: make([]byte, 100)}
			if err := tx.PutControl(r); err != nil {
				return err
			}
		}
		return errors.Join(tx.PutHead(custodian.ControlRecord{Body: []byte("head")}), tx.PutCursor("rewrap", []byte{1}))
	})
	if err != nil {
		t.Fatalf("update: %v", err)
	}
	var b bytes.Buffer
	if err := s.Backup(t.Context(), &b); err != nil {
		t.Fatalf("backup: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatalf("close: %v", err)
	}
	return b.Bytes()
}

// write writes a file and returns its path.
func write(t testing.TB, content []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "keys.db")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func digest(t testing.TB, path string) [32]byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return sha256.Sum256(b)
}

// edit changes a store file through bbolt.
func edit(t testing.TB, content []byte, f func(meta *bolt.Bucket, tx *bolt.Tx) error) []byte {
	t.Helper()
	path := write(t, content)
	db, err := bolt.Open(path, 0o600, &bolt.Options{Timeout: time.Second})
	if err != nil {
		t.Fatalf("bolt: %v", err)
	}
	err = db.Update(func(tx *bolt.Tx) error { return f(tx.Bucket([]byte("meta")), tx) })
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatalf("bolt: %v", err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func setSchema(t testing.TB, content []byte, schema uint32) []byte {
	t.Helper()
	return edit(t, content, func(meta *bolt.Bucket, _ *bolt.Tx) error {
		return meta.Put([]byte("schema"), binary.BigEndian.AppendUint32(nil, schema))
	})
}

// flip returns content with one byte of a page changed.
func flip(content []byte, page, off int64) []byte {
	b := bytes.Clone(content)
	b[page*pageSize+off] ^= 0x5a
	return b
}

// freelistPage is the page that the ruling meta of a backup names, which is
// the first.
func freelistPage(content []byte) int64 {
	return int64(binary.NativeEndian.Uint64(content[16+32:]))
}

func TestOpenRefuses(t *testing.T) {
	good := storeFile(t)
	other := func() []byte {
		path := filepath.Join(t.TempDir(), "other.db")
		db, err := bolt.Open(path, 0o600, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := db.Close(); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	noise := make([]byte, 64<<10)
	for i := range noise {
		noise[i] = byte(rand.Uint32())
	}
	bothMetas := flip(flip(good, 0, 30), 1, 30)
	tests := []struct {
		name    string
		content []byte
		want    error
	}{
		{"empty", nil, store.ErrTruncated},
		{"text", []byte("storage:\n  path: keys.db\n"), store.ErrForeign},
		{"long text", bytes.Repeat([]byte("0123456789abcde\n"), 4096), store.ErrForeign},
		{"noise", noise, store.ErrForeign},
		{"another program's bbolt file", other(), store.ErrForeign},
		{"without marker", edit(t, good, func(m *bolt.Bucket, _ *bolt.Tx) error { return m.Delete([]byte("marker")) }), store.ErrForeign},
		{"without schema", edit(t, good, func(m *bolt.Bucket, _ *bolt.Tx) error { return m.Delete([]byte("schema")) }), store.ErrDamaged},
		{"without a bucket", edit(t, good, func(_ *bolt.Bucket, tx *bolt.Tx) error { return tx.DeleteBucket([]byte("natural")) }), store.ErrDamaged},
		{"newer schema", setSchema(t, good, store.Schema+1), store.ErrNewerSchema},
		{"much newer schema", setSchema(t, good, 1<<32-1), store.ErrNewerSchema},
		{"older schema", setSchema(t, good, 0), store.ErrOlderSchema},
		{"both metas damaged", bothMetas, store.ErrDamaged},
		{"free list damaged", flip(good, freelistPage(good), 8), store.ErrDamaged},
		{"free list of another page", flip(good, freelistPage(good), 0), store.ErrDamaged},
		{"one meta page", good[:pageSize], store.ErrTruncated},
		{"half of it", good[:int64(len(good))/2], store.ErrTruncated},
		{"one page short", good[:int64(len(good))-pageSize], store.ErrTruncated},
		{"one byte short", good[:len(good)-1], store.ErrTruncated},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			path := write(t, test.content)
			before := digest(t, path)
			s, err := store.Open(t.Context(), path, store.Options{})
			if err == nil {
				t.Fatalf("open: no error, want %v", errors.Join(test.want, s.Close()))
			}
			if !errors.Is(err, test.want) || !strings.Contains(err.Error(), path) {
				t.Errorf("open: got %v, want %v with the path", err, test.want)
			}
			if errors.Is(err, custodian.ErrStoreUnavailable) {
				t.Errorf("open: %v is a fault of the device", err)
			}
			if digest(t, path) != before {
				t.Error("the file has changed")
			}
			// The lock is given back.
			if _, err := store.Open(t.Context(), path, store.Options{}); errors.Is(err, store.ErrLocked) {
				t.Errorf("second open: %v", err)
			}
			if names := dirNames(t, filepath.Dir(path)); len(names) != 1 {
				t.Errorf("files: got %v, want the store's only", names)
			}
		})
	}
}

func dirNames(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func TestOpenLeavesFileAlone(t *testing.T) {
	path := write(t, storeFile(t))
	before := digest(t, path)
	s := open(t, path)
	if err := s.Check(t.Context()); err != nil {
		t.Errorf("check: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
	if digest(t, path) != before {
		t.Error("opening, reading and closing changed the file")
	}
}

func TestOpenMissing(t *testing.T) {
	dir := t.TempDir()
	_, err := store.Open(t.Context(), filepath.Join(dir, "keys.db"), store.Options{})
	if !errors.Is(err, fs.ErrNotExist) || !errors.Is(err, custodian.ErrStoreUnavailable) {
		t.Errorf("open of nothing: got %v, want %v and %v", err, fs.ErrNotExist, custodian.ErrStoreUnavailable)
	}
	if names := dirNames(t, dir); len(names) != 0 {
		t.Errorf("files: got %v, want none", names)
	}
	if _, err := store.Open(t.Context(), dir, store.Options{}); !errors.Is(err, store.ErrForeign) {
		t.Errorf("open of a directory: got %v, want %v", err, store.ErrForeign)
	}
}

// TestOneMetaDamaged: a torn write of a meta page costs the last transaction
// at most.
func TestOneMetaDamaged(t *testing.T) {
	good := storeFile(t)
	for page := range int64(2) {
		s := open(t, write(t, flip(good, page, 40)))
		if err := s.Check(t.Context()); err != nil {
			t.Errorf("check with meta %d damaged: %v", page, err)
		}
		seed(t, s, 1000, 10, 1)
		if err := s.Check(t.Context()); err != nil {
			t.Errorf("check after updates with meta %d damaged: %v", page, err)
		}
		if err := s.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	}
}

func TestLocked(t *testing.T) {
	path := filepath.Join(t.TempDir(), "keys.db")
	s := create(t, path)
	began := time.Now()
	o := store.Options{Timeout: 50 * time.Millisecond}
	if _, err := store.Open(t.Context(), path, o); !errors.Is(err, store.ErrLocked) {
		t.Errorf("open of an open store: got %v, want %v", err, store.ErrLocked)
	}
	if waited := time.Since(began); waited < o.Timeout {
		t.Errorf("waited %v for the lock, want %v", waited, o.Timeout)
	}
	if err := store.Migrate(t.Context(), path, path+".bak", o); !errors.Is(err, store.ErrLocked) {
		t.Errorf("migrate of an open store: got %v, want %v", err, store.ErrLocked)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	open(t, path)
}

func TestCreate(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "keys.db")
	// A crash has left a half of a store behind.
	if err := os.WriteFile(path+".new", []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	s := create(t, path)
	if names := dirNames(t, dir); len(names) != 1 || names[0] != "keys.db" {
		t.Errorf("files: got %v, want keys.db", names)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode: got %v, %v, want 0600", info.Mode().Perm(), err)
	}
	seed(t, s, 0, 1, 1)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	before := digest(t, path)
	if _, err := store.Create(t.Context(), path, store.Options{}); !errors.Is(err, fs.ErrExist) {
		t.Errorf("create over a store: got %v, want %v", err, fs.ErrExist)
	}
	if digest(t, path) != before {
		t.Error("a refused create changed the store")
	}
	_, err = store.Create(t.Context(), filepath.Join(dir, "none", "keys.db"), store.Options{})
	if !errors.Is(err, custodian.ErrStoreUnavailable) {
		t.Errorf("create in a missing directory: got %v, want %v", err, custodian.ErrStoreUnavailable)
	}
}

// TestCreateRace: of many that create one store, one does.
func TestCreateRace(t *testing.T) {
	path := filepath.Join(t.TempDir(), "keys.db")
	results := make(chan error)
	const n = 8
	for range n {
		go func() {
			s, err := store.Create(t.Context(), path, store.Options{})
			if err == nil {
				err = s.Close()
			}
			results <- err
		}()
	}
	made := 0
	for range n {
		if err := <-results; err == nil {
			made++
		}
	}
	if made != 1 {
		t.Errorf("%d of %d creates succeeded, want 1", made, n)
	}
	if err := open(t, path).Check(t.Context()); err != nil {
		t.Errorf("check: %v", err)
	}
}

func TestBackupOpens(t *testing.T) {
	s := create(t, filepath.Join(t.TempDir(), "keys.db"))
	seed(t, s, 0, 300, 30)
	var b bytes.Buffer
	if err := s.Backup(t.Context(), &b); err != nil {
		t.Fatalf("backup: %v", err)
	}
	seed(t, s, 300, 10, 10)
	restored := open(t, write(t, b.Bytes()))
	if err := restored.Check(t.Context()); err != nil {
		t.Errorf("check of the backup: %v", err)
	}
	stats, err := restored.Stats(t.Context())
	if err != nil || stats.ContentKeys != 300 || stats.Sequence != 10 || stats.Schema != store.Schema {
		t.Errorf("stats of the backup: got %+v, %v, want 300 content keys at sequence 10", stats, err)
	}
	seed(t, restored, 300, 10, 10)
	if err := restored.Check(t.Context()); err != nil {
		t.Errorf("check after writing to the restored store: %v", err)
	}
}

// TestDamage changes bytes all over a store. Whatever it then does, it does
// not panic, it never calls a key unknown that it lists, and Check finds a
// tree that does not hold together.
func TestDamage(t *testing.T) {
	good := storeFile(t)
	r := rand.New(rand.NewPCG(1, 2))
	for i := range 120 {
		b := bytes.Clone(good)
		for range 1 + r.IntN(8) {
			page := r.Int64N(int64(len(b)) / pageSize)
			off := r.Int64N(pageSize)
			if r.IntN(2) == 0 {
				off = r.Int64N(64) // headers and first elements
			}
			b[page*pageSize+off] = byte(r.Uint32())
		}
		exercise(t, write(t, b), fmt.Sprintf("damage %d", i))
	}
}

// exercise opens a file that may be damaged in any way and uses it.
func exercise(t *testing.T, path, what string) {
	t.Helper()
	before := digest(t, path)
	s, err := store.Open(t.Context(), path, store.Options{InitialMmapSize: 1 << 20})
	if err != nil {
		if digest(t, path) != before {
			t.Errorf("%s: a refused file has changed", what)
		}
		return
	}
	defer func() { _ = s.Close() }() // a damaged store may say anything
	_ = s.Check(t.Context())         // the same
	_ = s.View(t.Context(), func(tx custodian.Tx) error {
		for n := range uint32(200) {
			_, err := tx.ContentKey(benchKid(n))
			classified(t, what, err)
			_, err = tx.HighestGeneration(benchKey(n).Key.NaturalKey)
			classified(t, what, err)
		}
		classified(t, what, tx.ContentKeys("movies", nil, nil, 1000, func(custodian.SealedKey) error { return nil }))
		classified(t, what, tx.Controls(func(custodian.ControlRecord) error { return nil }))
		_, err := tx.Head()
		classified(t, what, err)
		return nil
	})
	for n := uint32(1000); n < 1003; n++ {
		err := s.Update(t.Context(), func(tx custodian.UpdateTx) error { return tx.InsertContentKey(benchKey(n)) })
		classified(t, what, err)
	}
}

// classified demands one of the errors that a caller of a store knows.
func classified(t *testing.T, what string, err error) {
	t.Helper()
	for _, known := range []error{
		nil, custodian.ErrNotFound, custodian.ErrRecordCorrupt, custodian.ErrStoreUnavailable,
		custodian.ErrNaturalKey, custodian.ErrContentCategory, custodian.ErrKIDConflict, custodian.ErrFingerprint,
	} {
		if errors.Is(err, known) {
			return
		}
	}
	t.Errorf("%s: unclassified error %v", what, err)
}

// TestShrunkWhileOpen: somebody makes the file shorter under the running
// store; what was mapped is gone.
func TestShrunkWhileOpen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "keys.db")
	s := create(t, path)
	seed(t, s, 0, 500, 500)
	if err := os.Truncate(path, 2*pageSize); err != nil {
		t.Fatal(err)
	}
	err := s.View(t.Context(), func(tx custodian.Tx) error {
		_, err := tx.ContentKey(benchKid(7))
		return err
	})
	if !errors.Is(err, custodian.ErrStoreUnavailable) || errors.Is(err, custodian.ErrNotFound) {
		t.Errorf("read: got %v, want %v", err, custodian.ErrStoreUnavailable)
	}
	err = s.Update(t.Context(), func(tx custodian.UpdateTx) error { return tx.InsertContentKey(benchKey(1000)) })
	if !errors.Is(err, custodian.ErrStoreUnavailable) {
		t.Errorf("update: got %v, want %v", err, custodian.ErrStoreUnavailable)
	}
}

// TestCorruptRecords changes what lies under the right key.
func TestCorruptRecords(t *testing.T) {
	good := storeFile(t)
	kid := benchKid(7)
	other := benchKid(8)
	record := func(tx *bolt.Tx, kid custodian.KID) []byte {
		return bytes.Clone(tx.Bucket([]byte("content")).Get(kid[:]))
	}
	tests := []struct {
		name string
		edit func(tx *bolt.Tx) error
	}{
		{"empty", func(tx *bolt.Tx) error { return tx.Bucket([]byte("content")).Put(kid[:], nil) }},
		{"cut", func(tx *bolt.Tx) error {
			r := record(tx, kid)
			return tx.Bucket([]byte("content")).Put(kid[:], r[:len(r)-1])
		}},
		{"a byte more", func(tx *bolt.Tx) error {
			return tx.Bucket([]byte("content")).Put(kid[:], append(record(tx, kid), 0))
		}},
		{"another format", func(tx *bolt.Tx) error {
			r := record(tx, kid)
			r[0] = 9
			return tx.Bucket([]byte("content")).Put(kid[:], r)
		}},
		{"another kind", func(tx *bolt.Tx) error {
			r := record(tx, kid)
			r[1] = 2
			return tx.Bucket([]byte("content")).Put(kid[:], r)
		}},
		{"another format of the body", func(tx *bolt.Tx) error {
			r := record(tx, kid)
			r[4] ^= 0xff
			return tx.Bucket([]byte("content")).Put(kid[:], r)
		}},
		{"the record of another key", func(tx *bolt.Tx) error {
			return tx.Bucket([]byte("content")).Put(kid[:], record(tx, other))
		}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			s := open(t, write(t, edit(t, good, func(_ *bolt.Bucket, tx *bolt.Tx) error { return test.edit(tx) })))
			err := s.View(t.Context(), func(tx custodian.Tx) error {
				_, err := tx.ContentKey(kid)
				wantCorrupt(t, "content key", err)
				_, err = tx.HighestGeneration(benchKey(7).Key.NaturalKey)
				wantCorrupt(t, "highest generation", err)
				err = tx.ContentKeys("movies", nil, nil, 1000, func(custodian.SealedKey) error { return nil })
				wantCorrupt(t, "content keys", err)
				_, err = tx.ContentKey(other)
				return err
			})
			if err != nil {
				t.Errorf("another content key: %v", err)
			}
			wantCorrupt(t, "check", s.Check(t.Context()))
			err = s.Update(t.Context(), func(tx custodian.UpdateTx) error { return tx.ReplaceContentKey(1, benchKey(7)) })
			wantCorrupt(t, "replace", err)
		})
	}
}

func wantCorrupt(t *testing.T, what string, err error) {
	t.Helper()
	if !errors.Is(err, custodian.ErrRecordCorrupt) || errors.Is(err, custodian.ErrNotFound) {
		t.Errorf("%s: got %v, want %v", what, err, custodian.ErrRecordCorrupt)
	}
}

// TestCheckFinds breaks the agreement of records and indexes, one entry at a
// time.
func TestCheckFinds(t *testing.T) {
	good := storeFile(t)
	if err := open(t, write(t, good)).Check(t.Context()); err != nil {
		t.Fatalf("check of a good store: %v", err)
	}
	first := func(name string) func(tx *bolt.Tx) (*bolt.Bucket, []byte, []byte) {
		return func(tx *bolt.Tx) (*bolt.Bucket, []byte, []byte) {
			b := tx.Bucket([]byte(name))
			k, v := b.Cursor().First()
			return b, bytes.Clone(k), bytes.Clone(v)
		}
	}
	var tests []struct {
		name string
		edit func(tx *bolt.Tx) error
	}
	add := func(name string, edit func(tx *bolt.Tx) error) {
		tests = append(tests, struct {
			name string
			edit func(tx *bolt.Tx) error
		}{name, edit})
	}
	for _, name := range []string{"content", "natural", "content_category", "fingerprint", "bykek"} {
		add(name+" without an entry", func(tx *bolt.Tx) error {
			b, k, _ := first(name)(tx)
			return b.Delete(k)
		})
		add(name+" with an entry more", func(tx *bolt.Tx) error {
			b, k, v := first(name)(tx)
			k[len(k)-1] ^= 1
			return b.Put(k, v)
		})
		add(name+" with another value", func(tx *bolt.Tx) error {
			b, k, v := first(name)(tx)
			return b.Put(k, append(v, 'x'))
		})
	}
	for _, name := range []string{"control", "meta"} {
		for _, key := range map[string][]string{"control": {"\x02movies/7"}, "meta": {"head", "counters"}}[name] {
			add(name+" "+key+" cut", func(tx *bolt.Tx) error {
				b := tx.Bucket([]byte(name))
				v := b.Get([]byte(key))
				return b.Put([]byte(key), v[:len(v)-1])
			})
		}
	}
	add("control under another name", func(tx *bolt.Tx) error {
		b, _, v := first("control")(tx)
		return b.Put([]byte("\x02other"), v)
	})
	add("another count", func(tx *bolt.Tx) error {
		b := tx.Bucket([]byte("meta"))
		v := bytes.Clone(b.Get([]byte("counters")))
		v[len(v)-2] ^= 1
		return b.Put([]byte("counters"), v)
	})
	add("a bucket of somebody else's", func(tx *bolt.Tx) error {
		_, err := tx.CreateBucket([]byte("other"))
		return err
	})
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			s := open(t, write(t, edit(t, good, func(_ *bolt.Bucket, tx *bolt.Tx) error { return test.edit(tx) })))
			wantCorrupt(t, "check", s.Check(t.Context()))
		})
	}
}

// TestCheckFindsPages damages the structure of pages, which Open does not
// read beyond the branches.
func TestCheckFindsPages(t *testing.T) {
	good := storeFile(t)
	found := 0
	for page := int64(2); page < int64(len(good))/pageSize; page++ {
		if good[page*pageSize+8] != 2 {
			continue // not a leaf
		}
		s, err := store.Open(t.Context(), write(t, flip(good, page, 10)), store.Options{})
		if err == nil {
			err = s.Check(t.Context())
			_ = s.Close() // a damaged store may say anything
		}
		switch {
		case err == nil:
			// Free pages still say that they are leaves.
		case errors.Is(err, store.ErrDamaged), errors.Is(err, custodian.ErrRecordCorrupt):
			found++
		default:
			t.Errorf("page %d: got %v, want %v", page, err, store.ErrDamaged)
		}
	}
	if found < 10 {
		t.Errorf("found %d damaged leaves, want 10 at least", found)
	}
}

func TestCheckWhileWriting(t *testing.T) {
	s := create(t, filepath.Join(t.TempDir(), "keys.db"))
	done := make(chan struct{})
	go func() {
		defer close(done)
		for n := range uint32(300) {
			if err := s.Update(t.Context(), func(tx custodian.UpdateTx) error { return tx.InsertContentKey(benchKey(n)) }); err != nil {
				t.Errorf("update: %v", err)
				return
			}
		}
	}()
	for range 20 {
		if err := s.Check(t.Context()); err != nil {
			t.Errorf("check: %v", err)
		}
	}
	<-done
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Check(ended); !errors.Is(err, context.Canceled) {
		t.Errorf("check with an ended context: got %v, want %v", err, context.Canceled)
	}
}

// FuzzOpen opens files made from a good one.
func FuzzOpen(f *testing.F) {
	s := create(f, filepath.Join(f.TempDir(), "keys.db"))
	insertOne(f, s)
	var b bytes.Buffer
	if err := s.Backup(f.Context(), &b); err != nil {
		f.Fatal(err)
	}
	good := b.Bytes()
	f.Add(uint32(0), []byte{})
	f.Add(uint32(len(good)), []byte{})
	f.Add(uint32(0), good[:64])
	for page := 2; page < len(good)/int(pageSize); page++ {
		f.Add(uint32(page)*uint32(pageSize), good[page*int(pageSize):][:64])
	}
	f.Fuzz(func(t *testing.T, off uint32, patch []byte) {
		b := bytes.Clone(good)
		if int(off) < len(b) {
			copy(b[off:], patch)
		}
		exercise(t, write(t, b), "patched")
	})
}

func insertOne(tb testing.TB, s *store.Store) {
	tb.Helper()
	k := custodiantest.SealedKey(1, nil)
	if err := s.Update(tb.Context(), func(tx custodian.UpdateTx) error { return tx.InsertContentKey(k) }); err != nil {
		tb.Fatal(err)
	}
}
