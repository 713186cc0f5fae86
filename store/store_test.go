package store_test

import (
	"path/filepath"
	"testing"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/custodian/custodiantest"
	"github.com/keycustody/custodian/store"
)

func TestStore(t *testing.T) {
	custodiantest.TestStore(t, func(t *testing.T) (custodian.Store, func() custodian.Store) {
		path := filepath.Join(t.TempDir(), "keys.db")
		s := create(t, path)
		return s, func() custodian.Store {
			if err := s.Close(); err != nil {
				t.Fatalf("close: %v", err)
			}
			s = open(t, path)
			if err := s.Check(t.Context()); err != nil {
				t.Errorf("check: %v", err)
			}
			return s
		}
	})
}

func create(t testing.TB, path string) *store.Store {
	t.Helper()
	s, err := store.Create(t.Context(), path, store.Options{})
	if err != nil {
		t.Fatalf("create: %v", err)
	}
	t.Cleanup(func() { _ = s.Close() }) // closed by the test where it matters
	return s
}

func open(t testing.TB, path string) *store.Store {
	t.Helper()
	s, err := store.Open(t.Context(), path, store.Options{})
	if err != nil {
		t.Fatalf("open: %v", err)
	}
	t.Cleanup(func() { _ = s.Close() }) // closed by the test where it matters
	return s
}
