package audit_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/keycustody/custodian/internal/audit"
)

// BenchmarkAppend appends one typical entry at a time, with so many calls in
// flight, on disk (where the tests' temporary directory is) and on tmpfs.
func BenchmarkAppend(b *testing.B) {
	for _, where := range []string{"disk", "tmpfs"} {
		for _, inFlight := range []int{1, 32, 128} {
			b.Run(fmt.Sprintf("%s/inflight=%d", where, inFlight), func(b *testing.B) {
				dir := b.TempDir()
				if where == "tmpfs" {
					var err error
					if dir, err = os.MkdirTemp("/dev/shm", "audit"); err != nil {
						b.Skip("no tmpfs: ", err)
					}
					b.Cleanup(func() { os.RemoveAll(dir) })
				}
				benchmarkAppend(b, filepath.Join(dir, "audit"), inFlight, nil)
			})
		}
	}
}

func benchmarkAppend(b *testing.B, dir string, inFlight int, k *testKey) {
	l := create(b, dir, audit.Options{})
	if k != nil {
		signWith(b, l, k)
	}
	entry := release(1)
	b.ReportAllocs()
	b.ResetTimer()
	var next atomic.Int64
	var wg sync.WaitGroup
	for range inFlight {
		wg.Go(func() {
			for next.Add(1) <= int64(b.N) {
				if _, err := l.Append(context.Background(), []audit.Entry{entry}); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	b.StopTimer()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "entries/s")
	b.ReportMetric(float64(b.N)/float64(l.Stats().Batches), "entries/batch")
}

// BenchmarkAppendSigned is BenchmarkAppend with a software key that signs, and
// with one that takes a millisecond, as a token does.
func BenchmarkAppendSigned(b *testing.B) {
	for _, slow := range []time.Duration{0, time.Millisecond} {
		for _, inFlight := range []int{1, 32, 128} {
			b.Run(fmt.Sprintf("slow=%v/inflight=%d", slow, inFlight), func(b *testing.B) {
				k := newTestKey(b)
				k.slow = slow
				benchmarkAppend(b, filepath.Join(b.TempDir(), "audit"), inFlight, k)
			})
		}
	}
}

// BenchmarkVerify verifies a log of 100,000 entries in batches of 100.
func BenchmarkVerify(b *testing.B) {
	dir := filepath.Join(b.TempDir(), "audit")
	l := create(b, dir, audit.Options{})
	const entries = 100_000
	batch := make([]audit.Entry, 100)
	for i := 0; i < entries; i += len(batch) {
		for j := range batch {
			batch[j] = release(i + j)
		}
		appendTo(b, l, batch...)
	}
	shut(b, l)
	b.ReportAllocs()
	for b.Loop() {
		if got := verify(b, dir).Entries; got != entries {
			b.Fatalf("%d entries, want %d", got, entries)
		}
	}
	b.ReportMetric(float64(b.N)*entries/b.Elapsed().Seconds(), "entries/s")
}

// BenchmarkProve proves an entry of a log of 100,000 in signed batches of 100,
// which reads all of it, and verifies all its signatures.
func BenchmarkProve(b *testing.B) {
	dir := filepath.Join(b.TempDir(), "audit")
	k := newTestKey(b)
	l := create(b, dir, audit.Options{})
	signWith(b, l, k)
	const entries = 100_000
	batch := make([]audit.Entry, 100)
	for i := 0; i < entries; i += len(batch) {
		for j := range batch {
			batch[j] = release(i + j)
		}
		appendTo(b, l, batch...)
	}
	shut(b, l)
	b.Run("inclusion", func(b *testing.B) {
		for b.Loop() {
			p, err := audit.ProveInclusion(context.Background(), dir, entries/3, 0)
			if err != nil {
				b.Fatal(err)
			}
			b.ReportMetric(float64(32*len(p.Hashes)), "proof-bytes")
		}
	})
	b.Run("verify", func(b *testing.B) {
		for b.Loop() {
			if _, err := verifySigned(dir, k); err != nil {
				b.Fatal(err)
			}
		}
		b.ReportMetric(float64(b.N)*entries/b.Elapsed().Seconds(), "entries/s")
	})
}
