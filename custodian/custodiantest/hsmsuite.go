package custodiantest

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/keycustody/custodian/custodian"
)

// TestHSM runs the conformance suite that every custodian.HSM passes. The
// function open may return one and the same token each time: the suite makes
// objects of its own, with IDs drawn at random.
func TestHSM(t *testing.T, open func(t *testing.T) custodian.HSM) {
	for _, test := range []struct {
		name string
		run  func(t *testing.T, h custodian.HSM)
	}{
		{"Random", testRandom},
		{"GenerateMEKAdopts", testMEKAdopt},
		{"MEKCanary", testMEKCanary},
		{"UnknownMEK", testMEKUnknown},
		{"DestroyMEK", testDestroyMEK},
		{"SealAndOpen", testSealOpen},
		{"OpenRefuses", testOpenRefuses},
		{"CMAC", testCMAC},
		{"LoadRefuses", testLoadRefuses},
		{"UseIsKept", testUseIsKept},
		{"Rewrap", testRewrapKey},
		{"Release", testRelease},
		{"Signer", testSigner},
		{"Objects", testObjects},
		{"EndedContext", testEndedContext},
		{"Concurrent", testConcurrent},
		{"StatusAndHealth", testStatusHealth},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(t, open(t)) })
	}
}

// NewMEK makes a MEK with its canary in h, as init does, and returns its
// record.
func NewMEK(t testing.TB, h custodian.HSM) custodian.MEK {
	t.Helper()
	return newMEK(t, h, h.Status().DefaultMEK)
}

func newMEK(t testing.TB, h custodian.HSM, p custodian.MEKProfile) custodian.MEK {
	t.Helper()
	now := time.Now()
	m := custodian.MEK{Version: 1, Profile: p, State: custodian.StateActive, CreateTime: now, EndTime: now.AddDate(1, 0, 0)}
	rand.Read(m.ID[:])
	m.Label = fmt.Sprintf("mek-%x", m.ID[:4])
	if err := h.GenerateMEK(t.Context(), m); err != nil {
		t.Fatalf("generate a mek: %v", err)
	}
	var err error
	if m.Canary, err = h.NewMEKCanary(t.Context(), m); err != nil {
		t.Fatalf("make a mek canary: %v", err)
	}
	return m
}

// A wrapped key as the tests keep it.
type wrapped struct {
	mek           custodian.MEK
	use           custodian.KeyUse
	identity      []byte
	inner, canary []byte
}

func generate(t testing.TB, h custodian.HSM, m custodian.MEK, u custodian.KeyUse, identity string) wrapped {
	t.Helper()
	w := wrapped{mek: m, use: u, identity: []byte(identity)}
	var err error
	if w.inner, w.canary, err = h.GenerateKey(t.Context(), m, u, w.identity); err != nil {
		t.Fatalf("generate key %s: %v", identity, err)
	}
	return w
}

func (w wrapped) load(t testing.TB, h custodian.HSM) custodian.Key {
	t.Helper()
	k, err := h.LoadKey(t.Context(), w.mek, w.use, w.identity, w.inner, w.canary)
	if err != nil {
		t.Fatalf("load key %s: %v", w.identity, err)
	}
	t.Cleanup(k.Release)
	return k
}

func wantError(t testing.TB, what string, got, want error) {
	t.Helper()
	if !errors.Is(got, want) {
		t.Errorf("%s: got %v, want %v", what, got, want)
	}
}

func testRandom(t *testing.T, h custodian.HSM) {
	var a, b [32]byte
	for _, dst := range [][]byte{a[:], b[:]} {
		if err := h.Random(t.Context(), dst); err != nil {
			t.Fatalf("random: %v", err)
		}
	}
	if a == b || a == [32]byte{} {
		t.Error("random: two draws of 32 bytes are equal, or zero")
	}
}

// testRewrapKey moves keys from a rotatable MEK to another one: they stay the
// keys that they were, and the old wraps go on opening.
func testRewrapKey(t *testing.T, h custodian.HSM) {
	from, to := newMEK(t, h, custodian.ProfileRotatable), newMEK(t, h, custodian.ProfileRotatable)
	for _, u := range []custodian.KeyUse{custodian.UseSeal, custodian.UseMAC} {
		w := generate(t, h, from, u, "kek/movies")
		moved, err := h.RewrapKey(t.Context(), from, to, u, w.identity, w.inner, w.canary)
		if err != nil {
			t.Fatalf("rewrap: %v", err)
		}
		after := w
		after.mek, after.inner = to, moved
		before, now := w.load(t, h), after.load(t, h)
		if u == custodian.UseMAC {
			a, aerr := before.CMAC(t.Context(), []byte("message"))
			b, berr := now.CMAC(t.Context(), []byte("message"))
			if aerr != nil || berr != nil || a != b {
				t.Errorf("the key that was moved is another one: %v, %v", aerr, berr)
			}
			continue
		}
		iv, sealed, err := before.Seal(t.Context(), []byte("aad"), []byte("sixteen bytes ok"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := now.Open(t.Context(), iv, []byte("aad"), sealed, make([]byte, len(sealed))); err != nil {
			t.Errorf("the key that was moved does not open what it has sealed before: %v", err)
		}
	}
	w := generate(t, h, from, custodian.UseSeal, "kek/movies")
	for name, err := range map[string]error{
		"with the identity of another": second(h.RewrapKey(t.Context(), from, to, w.use, []byte("kek/series"), w.inner, w.canary)),
		"a changed blob":               second(h.RewrapKey(t.Context(), from, to, w.use, w.identity, flip(w.inner, 3), w.canary)),
		"from the wrong MEK":           second(h.RewrapKey(t.Context(), to, from, w.use, w.identity, w.inner, w.canary)),
	} {
		wantError(t, "rewrap "+name, err, custodian.ErrAuth)
	}
	closed := newMEK(t, h, custodian.ProfileSealed)
	w = generate(t, h, closed, custodian.UseSeal, "kek/movies")
	if _, err := h.RewrapKey(t.Context(), closed, to, w.use, w.identity, w.inner, w.canary); err == nil {
		t.Error("a sealed MEK lets a key go to another")
	}
}

func second(_ []byte, err error) error { return err }

func testMEKAdopt(t *testing.T, h custodian.HSM) {
	m := NewMEK(t, h)
	if err := h.GenerateMEK(t.Context(), m); err != nil {
		t.Fatalf("generate the same mek again: %v", err)
	}
	if err := h.CheckMEK(t.Context(), m); err != nil {
		t.Errorf("the adopted mek is not the first one: %v", err)
	}
	if got, want := len(objectsOf(t, h, m.ID)), 1; got != want {
		t.Errorf("objects with the mek's ID: got %d, want %d", got, want)
	}
	namesake, lookalike, plain := m, m, m
	rand.Read(namesake.ID[:])
	lookalike.Label += "-other"
	rand.Read(plain.ID[:])
	plain.Label, plain.Profile = m.Label+"-plain", ""
	for _, test := range []struct {
		name string
		mek  custodian.MEK
	}{
		{"with the label of another", namesake},
		{"with the ID of another", lookalike},
		{"without a profile", plain},
	} {
		if err := h.GenerateMEK(t.Context(), test.mek); err == nil {
			t.Errorf("generate a mek %s: got no error", test.name)
		}
	}
	if err := h.CheckMEK(t.Context(), m); err != nil {
		t.Errorf("the mek after the refusals: %v", err)
	}
}

func testMEKCanary(t *testing.T, h custodian.HSM) {
	m, o := NewMEK(t, h), NewMEK(t, h)
	if err := h.CheckMEK(t.Context(), m); err != nil {
		t.Fatalf("check mek: %v", err)
	}
	for _, test := range []struct {
		name   string
		canary []byte
	}{
		{"of another mek", o.Canary},
		{"changed", flip(m.Canary, len(m.Canary)/2)},
		{"cut short", m.Canary[:len(m.Canary)-1]},
		{"missing", nil},
	} {
		changed := m
		changed.Canary = test.canary
		wantError(t, "check mek with a canary "+test.name, h.CheckMEK(t.Context(), changed), custodian.ErrWrongMEK)
		_, _, err := h.GenerateKey(t.Context(), changed, custodian.UseSeal, []byte("kek"))
		wantError(t, "generate a key under a mek with a canary "+test.name, err, custodian.ErrWrongMEK)
	}
}

func testMEKUnknown(t *testing.T, h custodian.HSM) {
	m := NewMEK(t, h)
	w := generate(t, h, m, custodian.UseSeal, "kek")
	rand.Read(m.ID[:])
	m.Label += "-unknown"
	wantError(t, "check an unknown mek", h.CheckMEK(t.Context(), m), custodian.ErrNoObject)
	_, err := h.NewMEKCanary(t.Context(), m)
	wantError(t, "canary of an unknown mek", err, custodian.ErrNoObject)
	_, _, err = h.GenerateKey(t.Context(), m, custodian.UseSeal, []byte("kek"))
	wantError(t, "generate under an unknown mek", err, custodian.ErrNoObject)
	_, err = h.LoadKey(t.Context(), m, w.use, w.identity, w.inner, w.canary)
	wantError(t, "load under an unknown mek", err, custodian.ErrNoObject)
}

func testDestroyMEK(t *testing.T, h custodian.HSM) {
	m, other := NewMEK(t, h), NewMEK(t, h)
	w, kept := generate(t, h, m, custodian.UseSeal, "kek"), generate(t, h, other, custodian.UseSeal, "kek")
	for range 2 { // the second finds it destroyed already
		if err := h.DestroyMEK(t.Context(), m); err != nil {
			t.Fatalf("destroy a mek: %v", err)
		}
	}
	wantError(t, "check a destroyed mek", h.CheckMEK(t.Context(), m), custodian.ErrNoObject)
	_, err := h.LoadKey(t.Context(), m, w.use, w.identity, w.inner, w.canary)
	wantError(t, "load under a destroyed mek", err, custodian.ErrNoObject)
	objects, err := h.Objects(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if slices.ContainsFunc(objects, func(o custodian.TokenObject) bool { return bytes.Equal(o.ID, m.ID[:]) }) {
		t.Error("the token shows a destroyed mek")
	}
	if err := h.CheckMEK(t.Context(), other); err != nil {
		t.Errorf("another mek: %v", err)
	}
	kept.load(t, h)
}

func testSealOpen(t *testing.T, h custodian.HSM) {
	w := generate(t, h, NewMEK(t, h), custodian.UseSeal, "movies/1")
	first, second := w.load(t, h), w.load(t, h)
	ivs := map[[12]byte]bool{}
	for _, size := range []int{1, 16, 32, 1000} {
		plain, aad := bytes.Repeat([]byte{7}, size), []byte("record")
		iv, sealed, err := first.Seal(t.Context(), aad, plain)
		if err != nil {
			t.Fatalf("seal %d bytes: %v", size, err)
		}
		if ivs[iv] {
			t.Errorf("seal %d bytes: the IV is not new", size)
		}
		ivs[iv] = true
		if got, want := len(sealed), size+16; got != want {
			t.Errorf("seal %d bytes: got %d, want %d", size, got, want)
		}
		dst := make([]byte, len(sealed))
		n, err := second.Open(t.Context(), iv, aad, sealed, dst)
		if err != nil {
			t.Fatalf("open %d bytes by another handle: %v", size, err)
		}
		if !bytes.Equal(dst[:n], plain) {
			t.Errorf("open %d bytes: got other bytes", size)
		}
	}
}

func testOpenRefuses(t *testing.T, h custodian.HSM) {
	m := NewMEK(t, h)
	k := generate(t, h, m, custodian.UseSeal, "movies/1").load(t, h)
	other := generate(t, h, m, custodian.UseSeal, "movies/2").load(t, h)
	plain, aad := bytes.Repeat([]byte{7}, 16), []byte("record")
	iv, sealed, err := k.Seal(t.Context(), aad, plain)
	if err != nil {
		t.Fatalf("seal: %v", err)
	}
	wrongIV := iv
	wrongIV[0] ^= 1
	for _, test := range []struct {
		name   string
		key    custodian.Key
		iv     [12]byte
		aad    []byte
		sealed []byte
	}{
		{"another key", other, iv, aad, sealed},
		{"another IV", k, wrongIV, aad, sealed},
		{"other associated data", k, iv, []byte("recorD"), sealed},
		{"no associated data", k, iv, nil, sealed},
		{"a changed ciphertext", k, iv, aad, flip(sealed, 0)},
		{"a changed tag", k, iv, aad, flip(sealed, len(sealed)-1)},
		{"a short tag", k, iv, aad, sealed[:len(sealed)-1]},
		{"15 bytes", k, iv, aad, sealed[:15]},
		{"nothing", k, iv, aad, nil},
	} {
		dst := make([]byte, 64)
		n, err := test.key.Open(t.Context(), test.iv, test.aad, test.sealed, dst)
		wantError(t, "open with "+test.name, err, custodian.ErrAuth)
		if n != 0 || bytes.Contains(dst, plain) {
			t.Errorf("open with %s: plaintext came out", test.name)
		}
	}
	if n, err := k.Open(t.Context(), iv, aad, sealed, make([]byte, 64)); err != nil || n != 16 {
		t.Errorf("open after the refusals: got %d, %v, want 16 bytes", n, err)
	}
}

func testCMAC(t *testing.T, h custodian.HSM) {
	m := NewMEK(t, h)
	w := generate(t, h, m, custodian.UseMAC, "record/1")
	k, again := w.load(t, h), w.load(t, h)
	other := generate(t, h, m, custodian.UseMAC, "record/2").load(t, h)
	seen := map[[16]byte]int{}
	for _, size := range []int{0, 1, 15, 16, 17, 4000} {
		msg := bytes.Repeat([]byte{3}, size)
		mac := cmac(t, k, msg)
		if old, ok := seen[mac]; ok {
			t.Errorf("cmac of %d and of %d bytes are equal", old, size)
		}
		seen[mac] = size
		if got, want := cmac(t, again, msg), mac; got != want {
			t.Errorf("cmac of %d bytes by another handle: got %x, want %x", size, got, want)
		}
		if cmac(t, other, msg) == mac {
			t.Errorf("cmac of %d bytes by another key: got the same", size)
		}
	}
}

func cmac(t testing.TB, k custodian.Key, msg []byte) [16]byte {
	t.Helper()
	mac, err := k.CMAC(t.Context(), msg)
	if err != nil {
		t.Fatalf("cmac of %d bytes: %v", len(msg), err)
	}
	return mac
}

func testLoadRefuses(t *testing.T, h custodian.HSM) {
	m, o := NewMEK(t, h), NewMEK(t, h)
	w := generate(t, h, m, custodian.UseSeal, "movies/1")
	other := generate(t, h, m, custodian.UseSeal, "movies/2")
	for _, test := range []struct {
		name   string
		change func(w *wrapped)
	}{
		{"another mek", func(w *wrapped) { w.mek = o }},
		{"another identity", func(w *wrapped) { w.identity = other.identity }},
		{"another use", func(w *wrapped) { w.use = custodian.UseMAC }},
		{"another key's canary", func(w *wrapped) { w.canary = other.canary }},
		{"another key's inner blob", func(w *wrapped) { w.inner = other.inner }},
		{"another key with its canary", func(w *wrapped) { w.inner, w.canary = other.inner, other.canary }},
		{"a changed inner blob", func(w *wrapped) { w.inner = flip(w.inner, len(w.inner)/2) }},
		{"a changed canary", func(w *wrapped) { w.canary = flip(w.canary, len(w.canary)-1) }},
		{"a short inner blob", func(w *wrapped) { w.inner = w.inner[:len(w.inner)-8] }},
		{"a long inner blob", func(w *wrapped) { w.inner = append(slices.Clone(w.inner), make([]byte, 8)...) }},
		{"an empty inner blob", func(w *wrapped) { w.inner = nil }},
		{"an empty canary", func(w *wrapped) { w.canary = nil }},
	} {
		changed := w
		test.change(&changed)
		k, err := h.LoadKey(t.Context(), changed.mek, changed.use, changed.identity, changed.inner, changed.canary)
		wantError(t, "load with "+test.name, err, custodian.ErrAuth)
		if k != nil {
			t.Errorf("load with %s: got a key beside the error", test.name)
		}
	}
	w.load(t, h)
	if err := h.Health(t.Context()); err != nil {
		t.Errorf("health after the refusals: %v", err)
	}
}

func testUseIsKept(t *testing.T, h custodian.HSM) {
	m := NewMEK(t, h)
	sealer := generate(t, h, m, custodian.UseSeal, "movies/1").load(t, h)
	macer := generate(t, h, m, custodian.UseMAC, "record/1").load(t, h)
	if _, err := sealer.CMAC(t.Context(), []byte("x")); err == nil {
		t.Error("cmac by a sealing key: got no error")
	}
	if _, _, err := macer.Seal(t.Context(), nil, []byte("x")); err == nil {
		t.Error("seal by a MAC key: got no error")
	}
	for _, u := range []custodian.KeyUse{0, 3} {
		if _, _, err := h.GenerateKey(t.Context(), m, u, []byte("movies/2")); err == nil {
			t.Errorf("generate with use %d: got no error", u)
		}
	}
}

func testRelease(t *testing.T, h custodian.HSM) {
	w := generate(t, h, NewMEK(t, h), custodian.UseSeal, "movies/1")
	k, other := w.load(t, h), w.load(t, h)
	k.Release()
	k.Release()
	_, _, err := k.Seal(t.Context(), nil, []byte("x"))
	wantError(t, "seal after release", err, custodian.ErrStaleKey)
	if _, _, err := other.Seal(t.Context(), nil, []byte("x")); err != nil {
		t.Errorf("seal by another handle of the released key: %v", err)
	}
}

func testSigner(t *testing.T, h custodian.HSM) {
	message := []byte("checkpoint")
	digest := sha256.Sum256(message)
	for alg, verifies := range map[custodian.SigningAlgorithm]func(crypto.Signer) (bool, error){
		custodian.SignECDSAP256: func(s crypto.Signer) (bool, error) {
			signature, err := s.Sign(nil, digest[:], crypto.SHA256)
			public, ok := s.Public().(*ecdsa.PublicKey)
			return ok && public.Curve == elliptic.P256() && ecdsa.VerifyASN1(public, digest[:], signature), err
		},
		custodian.SignEd25519: func(s crypto.Signer) (bool, error) {
			signature, err := s.Sign(nil, message, crypto.Hash(0))
			public, ok := s.Public().(ed25519.PublicKey)
			return ok && ed25519.Verify(public, message, signature), err
		},
	} {
		var id, unknown [16]byte
		rand.Read(id[:])
		rand.Read(unknown[:])
		label := fmt.Sprintf("audit-%x", id[:4])
		for range 2 { // the second time it is adopted
			if err := h.GenerateSigner(t.Context(), alg, label, id); err != nil {
				t.Fatalf("generate signer: %v", err)
			}
		}
		first, second := signer(t, h, label, id), signer(t, h, label, id)
		if ok, err := verifies(second); !ok || err != nil {
			t.Errorf("%s: %v, and the signature verifies is %t", alg, err, ok)
		}
		if public, ok := first.Public().(interface{ Equal(crypto.PublicKey) bool }); !ok || !public.Equal(second.Public()) {
			t.Errorf("%s: one pair has two public keys", alg)
		}
		_, err := h.Signer(t.Context(), label+"-unknown", unknown)
		wantError(t, "an unknown signer", err, custodian.ErrNoObject)
		if err := h.GenerateSigner(t.Context(), "", label+"-none", unknown); err == nil {
			t.Error("a signer without an algorithm was made")
		}
	}
}

func signer(t testing.TB, h custodian.HSM, label string, id [16]byte) crypto.Signer {
	t.Helper()
	s, err := h.Signer(t.Context(), label, id)
	if err != nil {
		t.Fatalf("signer %s: %v", label, err)
	}
	return s
}

func testObjects(t *testing.T, h custodian.HSM) {
	m := NewMEK(t, h)
	before := len(listObjects(t, h))
	generate(t, h, m, custodian.UseSeal, "movies/1").load(t, h)
	if got := len(listObjects(t, h)); got != before {
		t.Errorf("objects after a key was made and loaded: got %d, want %d: keys are no token objects", got, before)
	}
	found := objectsOf(t, h, m.ID)
	if len(found) != 1 {
		t.Fatalf("objects with the mek's ID: got %d, want 1", len(found))
	}
	if got, want := found[0].Label, m.Label; got != want {
		t.Errorf("label of the mek: got %q, want %q", got, want)
	}
	if found[0].Class == "" {
		t.Error("class of the mek: got none")
	}
}

func listObjects(t testing.TB, h custodian.HSM) []custodian.TokenObject {
	t.Helper()
	objects, err := h.Objects(t.Context())
	if err != nil {
		t.Fatalf("list the token's objects: %v", err)
	}
	return objects
}

func objectsOf(t testing.TB, h custodian.HSM, id [16]byte) []custodian.TokenObject {
	t.Helper()
	return slices.DeleteFunc(listObjects(t, h), func(o custodian.TokenObject) bool { return !bytes.Equal(o.ID, id[:]) })
}

func testEndedContext(t *testing.T, h custodian.HSM) {
	m := NewMEK(t, h)
	w := generate(t, h, m, custodian.UseSeal, "movies/1")
	k := w.load(t, h)
	iv, sealed, err := k.Seal(t.Context(), nil, []byte("x"))
	if err != nil {
		t.Fatalf("seal: %v", err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	wantError(t, "random", h.Random(ended, make([]byte, 16)), custodian.ErrDeadline)
	_, _, err = h.GenerateKey(ended, m, custodian.UseSeal, []byte("movies/2"))
	wantError(t, "generate key", err, custodian.ErrDeadline)
	_, err = h.LoadKey(ended, m, w.use, w.identity, w.inner, w.canary)
	wantError(t, "load key", err, custodian.ErrDeadline)
	_, err = k.Open(ended, iv, nil, sealed, make([]byte, 64))
	wantError(t, "open", err, custodian.ErrDeadline)
	if _, err := k.Open(t.Context(), iv, nil, sealed, make([]byte, 64)); err != nil {
		t.Errorf("open after that: %v", err)
	}
}

func testConcurrent(t *testing.T, h custodian.HSM) {
	m := NewMEK(t, h)
	shared := generate(t, h, m, custodian.UseSeal, "shared/1").load(t, h)
	var all sync.WaitGroup
	for i := range 16 {
		all.Go(func() {
			identity := fmt.Appendf(nil, "movies/%d", i)
			inner, canary, err := h.GenerateKey(t.Context(), m, custodian.UseSeal, identity)
			if err != nil {
				t.Errorf("generate key %d: %v", i, err)
				return
			}
			own, err := h.LoadKey(t.Context(), m, custodian.UseSeal, identity, inner, canary)
			if err != nil {
				t.Errorf("load key %d: %v", i, err)
				return
			}
			defer own.Release()
			for _, k := range []custodian.Key{own, shared} {
				if err := roundTrip(t.Context(), k, identity); err != nil {
					t.Errorf("key %d: %v", i, err)
				}
			}
		})
	}
	all.Wait()
}

func roundTrip(ctx context.Context, k custodian.Key, plain []byte) error {
	iv, sealed, err := k.Seal(ctx, plain, plain)
	if err != nil {
		return fmt.Errorf("seal: %w", err)
	}
	dst := make([]byte, len(sealed))
	n, err := k.Open(ctx, iv, plain, sealed, dst)
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	if !bytes.Equal(dst[:n], plain) {
		return fmt.Errorf("open: got other bytes")
	}
	return nil
}

func testStatusHealth(t *testing.T, h custodian.HSM) {
	if err := h.Health(t.Context()); err != nil {
		t.Errorf("health: %v", err)
	}
	s := h.Status()
	if s.Label == "" || s.Serial == "" || s.Profile == "" || s.SessionsMax == 0 {
		t.Errorf("status: got %+v, want label, serial, profile and limit of sessions", s)
	}
	if s.DefaultMEK != custodian.ProfileSealed && s.DefaultMEK != custodian.ProfileRotatable {
		t.Errorf("default mek profile: got %q", s.DefaultMEK)
	}
}

// flip is a copy of b with one bit of byte i changed.
func flip(b []byte, i int) []byte {
	b = slices.Clone(b)
	b[i] ^= 1
	return b
}
