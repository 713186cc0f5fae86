package store_test

import (
	"fmt"
	"path/filepath"
	"sync"
	"testing"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/custodian/custodiantest"
	"github.com/keycustody/custodian/store"
)

// benchKey is key n of a store of many keys, six to a content item, whose
// KIDs and fingerprints are spread as random ones are.
func benchKey(n uint32) custodian.SealedKey {
	return custodiantest.SealedKey(n, func(k *custodian.ContentKey) {
		k.ContentID = fmt.Appendf(nil, "title-%08x", (n/6)*0x9e3779b1)
		k.TrackType = [...]custodian.TrackType{"AUDIO", "SD", "HD", "UHD1", "UHD2", "HDR"}[n%6]
	})
}

// seed inserts keys from first on, in updates of batch keys.
func seed(tb testing.TB, s custodian.Store, first, n, batch uint32) {
	tb.Helper()
	for i := first; i < first+n; i += batch {
		err := s.Update(tb.Context(), func(tx custodian.UpdateTx) error {
			for j := i; j < min(i+batch, first+n); j++ {
				if err := tx.InsertContentKey(benchKey(j)); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			tb.Fatalf("seed: %v", err)
		}
	}
}

func BenchmarkContentKey(b *testing.B) {
	const keys = 100_000
	s := create(b, filepath.Join(b.TempDir(), "keys.db"))
	seed(b, s, 0, keys, 10_000)
	kids := make([]custodian.KID, keys)
	for n := range kids {
		kids[n] = benchKid(uint32(n))
	}
	b.ReportAllocs()
	n := 0
	for b.Loop() {
		n = (n + 7919) % keys
		err := s.View(b.Context(), func(tx custodian.Tx) error {
			_, err := tx.ContentKey(kids[n])
			return err
		})
		if err != nil {
			b.Fatal(err)
		}
	}
}

func benchKid(n uint32) custodian.KID { return custodiantest.SealedKey(n, nil).Key.KID }

// BenchmarkInsert inserts into a store of 100,000 keys.
func BenchmarkInsert(b *testing.B) {
	const keys = 100_000
	for _, batch := range []uint32{1, 50} {
		b.Run(fmt.Sprintf("batch=%d", batch), func(b *testing.B) {
			s := create(b, filepath.Join(b.TempDir(), "keys.db"))
			seed(b, s, 0, keys, 10_000)
			b.ReportAllocs()
			next := uint32(keys)
			for b.Loop() {
				seed(b, s, next, batch, batch)
				next += batch
			}
			b.ReportMetric(float64(next-keys)/b.Elapsed().Seconds(), "keys/s")
		})
	}
}

// BenchmarkUpdate compares updates one at a time with updates that wait for
// one another.
func BenchmarkUpdate(b *testing.B) {
	for _, callers := range []int{1, 8, 32, 128} {
		b.Run(fmt.Sprintf("callers=%d", callers), func(b *testing.B) {
			s := create(b, filepath.Join(b.TempDir(), "keys.db"))
			seed(b, s, 0, 10_000, 10_000)
			b.ResetTimer()
			runCallers(b, s, callers)
		})
	}
}

func runCallers(b *testing.B, s *store.Store, callers int) {
	var wg sync.WaitGroup
	for c := range callers {
		wg.Go(func() {
			for i := c; i < b.N; i += callers {
				k := benchKey(uint32(10_000 + i))
				err := s.Update(b.Context(), func(tx custodian.UpdateTx) error { return tx.InsertContentKey(k) })
				if err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "updates/s")
}
