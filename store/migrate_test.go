package store_test

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	bolt "go.etcd.io/bbolt"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/store"
)

// oldGolden is a store of schema 0, which has no indexes.
const oldGolden = "testdata/schema0.golden"

func TestMigrate(t *testing.T) {
	path := undump(t, oldGolden)
	before, backup := dump(t, path), path+".bak"
	if err := store.Migrate(t.Context(), path, backup, store.Options{}); err != nil {
		t.Fatalf("migrate: %v", err)
	}
	if got := dump(t, backup); !bytes.Equal(got, before) {
		t.Errorf("backup: got\n%s\nwant\n%s", got, before)
	}
	if _, err := store.Open(t.Context(), backup, store.Options{}); !errors.Is(err, store.ErrOlderSchema) {
		t.Errorf("open of the backup: got %v, want %v", err, store.ErrOlderSchema)
	}
	s := open(t, path)
	if err := s.Check(t.Context()); err != nil {
		t.Errorf("check: %v", err)
	}
	err := s.Update(t.Context(), func(tx custodian.UpdateTx) error {
		err := tx.InsertContentKey(goldenKeys[0])
		if !errors.Is(err, custodian.ErrNaturalKey) {
			t.Errorf("insert of a migrated key: got %v, want %v", err, custodian.ErrNaturalKey)
		}
		return tx.PutCursor("rewrap", []byte{1, 2, 3}) // the old schema had none
	})
	if err != nil {
		t.Errorf("update: %v", err)
	}
	wantGolden(t, s)
	if names := dirNames(t, filepath.Dir(path)); len(names) != 2 {
		t.Errorf("files: got %v, want the store and its backup", names)
	}
}

func TestMigrateCurrent(t *testing.T) {
	path := write(t, storeFile(t))
	before := digest(t, path)
	if err := store.Migrate(t.Context(), path, path+".bak", store.Options{}); err != nil {
		t.Errorf("migrate a current store: %v", err)
	}
	if digest(t, path) != before {
		t.Error("the file has changed")
	}
	if _, err := os.Stat(path + ".bak"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("backup: got %v, want none", err)
	}
}

// TestMigrateRefuses: whatever stops a migration leaves the store as it was.
func TestMigrateRefuses(t *testing.T) {
	old, err := os.ReadFile(undump(t, oldGolden))
	if err != nil {
		t.Fatal(err)
	}
	cut := func(_ *bolt.Bucket, tx *bolt.Tx) error {
		b := tx.Bucket([]byte("content"))
		k, v := b.Cursor().First()
		return b.Put(k, v[:len(v)-1])
	}
	twice := func(_ *bolt.Bucket, tx *bolt.Tx) error {
		b := tx.Bucket([]byte("content"))
		k, v := b.Cursor().First()
		k = append(bytes.Clone(k[:15]), 0x77)
		return b.Put(k, bytes.ReplaceAll(v, goldenKeys[0].Key.KID[:], k))
	}
	uncategorised := func(_ *bolt.Bucket, tx *bolt.Tx) error {
		return tx.Bucket([]byte("content_category")).Delete([]byte("film-1"))
	}
	tests := []struct {
		name    string
		content []byte
		want    error
	}{
		{"newer schema", setSchema(t, old, 7), store.ErrNewerSchema},
		{"text", []byte("no store"), store.ErrForeign},
		{"truncated", old[:len(old)/3], store.ErrTruncated},
		{"a record that is cut", edit(t, old, cut), custodian.ErrRecordCorrupt},
		{"two records for one natural key", edit(t, old, twice), custodian.ErrNaturalKey},
		{"a result that fails its check", edit(t, old, uncategorised), custodian.ErrRecordCorrupt},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			path := write(t, test.content)
			before := digest(t, path)
			err := store.Migrate(t.Context(), path, path+".bak", store.Options{})
			if !errors.Is(err, test.want) {
				t.Errorf("migrate: got %v, want %v", err, test.want)
			}
			if digest(t, path) != before {
				t.Error("the file has changed")
			}
		})
	}

	t.Run("a backup that exists", func(t *testing.T) {
		path := write(t, old)
		before := digest(t, path)
		if err := os.WriteFile(path+".bak", []byte("precious"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := store.Migrate(t.Context(), path, path+".bak", store.Options{}); !errors.Is(err, fs.ErrExist) {
			t.Errorf("migrate: got %v, want %v", err, fs.ErrExist)
		}
		if b, err := os.ReadFile(path + ".bak"); err != nil || string(b) != "precious" {
			t.Errorf("backup: got %q, %v, want it untouched", b, err)
		}
		if digest(t, path) != before {
			t.Error("the file has changed")
		}
	})
	t.Run("a backup that cannot be written", func(t *testing.T) {
		path := write(t, old)
		before := digest(t, path)
		err := store.Migrate(t.Context(), path, filepath.Join(filepath.Dir(path), "none", "bak"), store.Options{})
		if !errors.Is(err, custodian.ErrStoreUnavailable) {
			t.Errorf("migrate: got %v, want %v", err, custodian.ErrStoreUnavailable)
		}
		if digest(t, path) != before {
			t.Error("the file has changed")
		}
	})
}
