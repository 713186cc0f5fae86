package sealing_test

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/keycustody/custodian/internal/sealing"
)

func newKey(t *testing.T, kem string) sealing.PrivateKey {
	t.Helper()
	k, err := sealing.GenerateKey(kem)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func about() sealing.About {
	period := uint32(7)
	return sealing.About{Caller: "spiffe://test/provider", RequestID: "r-1", KID: bytes.Repeat([]byte{1}, 16), Generation: 1, IV: bytes.Repeat([]byte{2}, 16),
		Category: "movies", ContentID: []byte("film"), TrackType: "HD", Scheme: "cbcs", Period: &period}
}

func TestSealOpen(t *testing.T) {
	want := []byte("sixteen bytes ok")
	for _, kem := range sealing.KEMs {
		t.Run(kem, func(t *testing.T) {
			k := newKey(t, kem)
			text, err := k.Text()
			if err != nil {
				t.Fatal(err)
			}
			read, err := sealing.ParsePrivateKey(text)
			if err != nil {
				t.Fatal(err)
			}
			public, err := sealing.ParsePublicKey(k.Public().String())
			if err != nil {
				t.Fatal(err)
			}
			if got, want := public.ID(), read.Public().ID(); got != want || len(got) != 16 {
				t.Errorf("ID: got %q, want %q of 16 characters", got, want)
			}
			sealed, err := sealing.Seal(public, about(), want)
			if err != nil {
				t.Fatal(err)
			}
			if bytes.Contains(sealed, want) {
				t.Error("the sealed key shows the key")
			}
			got, err := read.Open(about(), sealed)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Errorf("opened: got %d other bytes", len(got))
			}
			again, err := sealing.Seal(public, about(), want)
			if err != nil {
				t.Fatal(err)
			}
			if bytes.Equal(again, sealed) {
				t.Error("sealing twice gives the same bytes")
			}
			if _, err := newKey(t, kem).Open(about(), sealed); !errors.Is(err, sealing.ErrOpen) {
				t.Errorf("another private key: got %v, want %v", err, sealing.ErrOpen)
			}
			for i := range sealed {
				if i%37 != 0 && i != len(sealed)-1 {
					continue
				}
				flipped := bytes.Clone(sealed)
				flipped[i] ^= 1
				if _, err := read.Open(about(), flipped); !errors.Is(err, sealing.ErrOpen) {
					t.Errorf("byte %d flipped: got %v, want %v", i, err, sealing.ErrOpen)
				}
			}
			for _, n := range []int{0, 1, 31, len(sealed) - 1} {
				if _, err := read.Open(about(), sealed[:n]); !errors.Is(err, sealing.ErrOpen) {
					t.Errorf("%d bytes of it: got %v, want %v", n, err, sealing.ErrOpen)
				}
			}
		})
	}
}

// TestBound: a sealed key opens only as what it was sealed as.
func TestBound(t *testing.T) {
	k := newKey(t, sealing.X25519)
	sealed, err := sealing.Seal(k.Public(), about(), make([]byte, 16))
	if err != nil {
		t.Fatal(err)
	}
	other := uint32(8)
	for name, change := range map[string]func(*sealing.About){
		"caller":         func(a *sealing.About) { a.Caller = "spiffe://test/other" },
		"request ID":     func(a *sealing.About) { a.RequestID = "r-2" },
		"KID":            func(a *sealing.About) { a.KID = bytes.Repeat([]byte{9}, 16) },
		"generation":     func(a *sealing.About) { a.Generation = 2 },
		"IV":             func(a *sealing.About) { a.IV = nil },
		"category":       func(a *sealing.About) { a.Category = "series" },
		"content ID":     func(a *sealing.About) { a.ContentID = []byte("film2") },
		"track type":     func(a *sealing.About) { a.TrackType = "UHD1" },
		"scheme":         func(a *sealing.About) { a.Scheme = "cenc" },
		"period":         func(a *sealing.About) { a.Period = &other },
		"no period":      func(a *sealing.About) { a.Period = nil },
		"moved boundary": func(a *sealing.About) { a.Caller, a.RequestID = a.Caller+"r", "-1" },
	} {
		changed := about()
		change(&changed)
		if _, err := k.Open(changed, sealed); !errors.Is(err, sealing.ErrOpen) {
			t.Errorf("another %s: got %v, want %v", name, err, sealing.ErrOpen)
		}
	}
}

func TestParse(t *testing.T) {
	good := newKey(t, sealing.X25519).Public().String()
	secret, err := newKey(t, sealing.X25519).Text()
	if err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{"", "x25519", "x25519:", "x25519:AAAA", "rsa:" + strings.TrimPrefix(good, "x25519:"), "mlkem768x25519" + strings.TrimPrefix(good, "x25519"),
		good + "!", string(secret)} {
		if _, err := sealing.ParsePublicKey(bad); err == nil {
			t.Errorf("public key %.30q: got a key, want an error", bad)
		} else if bad == string(secret) && strings.Contains(err.Error(), bad[16:]) {
			t.Error("the error shows a private key")
		}
		if bad == string(secret) {
			continue
		}
		if _, err := sealing.ParsePrivateKey([]byte(bad)); err == nil {
			t.Errorf("private key %.30q: got a key, want an error", bad)
		}
	}
	if _, err := sealing.ParsePrivateKey([]byte("private-x25519:AAAA")); err == nil {
		t.Error("a short private key: got a key, want an error")
	}
	if _, err := sealing.Seal(sealing.PublicKey{}, about(), nil); err == nil {
		t.Error("seal to no key: got no error")
	}
}

func BenchmarkSeal(b *testing.B) {
	for _, kem := range sealing.KEMs {
		k, err := sealing.GenerateKey(kem)
		if err != nil {
			b.Fatal(err)
		}
		b.Run(kem, func(b *testing.B) {
			to, key := k.Public(), make([]byte, 16)
			for b.Loop() {
				if _, err := sealing.Seal(to, about(), key); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
