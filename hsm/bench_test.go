package hsm_test

import (
	"testing"

	"github.com/keycustody/custodian/hsm"
	"github.com/keycustody/custodian/softhsm"
)

func benchKey(b *testing.B, use hsm.Use) *hsm.Key {
	b.Helper()
	tok := open(b, softhsm.Test(b))
	k, _ := newKey(b, newMEK(b, tok, "mek-v1", hsm.Sealed), use)
	b.ReportAllocs()
	return k
}

func BenchmarkOpen(b *testing.B) {
	s := seal(b, benchKey(b, hsm.UseGCM))
	for b.Loop() {
		if err := s.open(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkOpenParallel(b *testing.B) {
	s := seal(b, benchKey(b, hsm.UseGCM))
	b.SetParallelism(16)
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if err := s.open(b.Context()); err != nil {
				b.Error(err)
				return
			}
		}
	})
}

// Without the hand-over to a worker, for comparison.
func BenchmarkOpenInline(b *testing.B) {
	s := seal(b, benchKey(b, hsm.UseGCM))
	var dst [16]byte
	for b.Loop() {
		if _, err := s.key.OpenInline(b.Context(), s.iv, s.ct, dst[:]); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkSeal(b *testing.B) {
	k := benchKey(b, hsm.UseGCM)
	text := make([]byte, 16)
	dst := make([]byte, 32)
	for b.Loop() {
		if _, _, err := k.Seal(b.Context(), nil, text, dst); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkSealParallel(b *testing.B) {
	k := benchKey(b, hsm.UseGCM)
	text := make([]byte, 16)
	b.SetParallelism(16)
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		dst := make([]byte, 32)
		for pb.Next() {
			if _, _, err := k.Seal(b.Context(), nil, text, dst); err != nil {
				b.Error(err)
				return
			}
		}
	})
}

func BenchmarkCMAC(b *testing.B) {
	k := benchKey(b, hsm.UseCMAC)
	msg := make([]byte, 500)
	for b.Loop() {
		if _, err := k.CMAC(b.Context(), msg); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkCMACParallel(b *testing.B) {
	k := benchKey(b, hsm.UseCMAC)
	msg := make([]byte, 500)
	b.SetParallelism(16)
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, err := k.CMAC(b.Context(), msg); err != nil {
				b.Error(err)
				return
			}
		}
	})
}

func BenchmarkLoad(b *testing.B) {
	tok := open(b, softhsm.Test(b))
	m := newMEK(b, tok, "mek-v1", hsm.Sealed)
	_, w := newKey(b, m, hsm.UseGCM)
	for b.Loop() {
		k, err := m.Load(b.Context(), hsm.UseGCM, []byte("movies/1"), w)
		if err != nil {
			b.Fatal(err)
		}
		k.Release()
	}
}
