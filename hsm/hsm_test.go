package hsm_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/keycustody/custodian/hsm"
	"github.com/keycustody/custodian/softhsm"
)

// open opens a token and closes it when the test ends.
func open(t testing.TB, c hsm.Config) *hsm.Token {
	t.Helper()
	tok, err := hsm.Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeToken(t, tok) })
	return tok
}

func closeToken(t testing.TB, tok *hsm.Token) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := tok.Close(ctx); err != nil {
		t.Error(err)
	}
}

// newMEK generates and opens a MEK with a random ID.
func newMEK(t testing.TB, tok *hsm.Token, label string, p hsm.MEKProfile) *hsm.MEK {
	t.Helper()
	id := randomID(t)
	if err := tok.GenerateMEK(t.Context(), hsm.MEKSpec{Label: label, ID: id, Profile: p}); err != nil {
		t.Fatal(err)
	}
	m, err := tok.OpenMEK(t.Context(), label, id)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func randomID(t testing.TB) (id [16]byte) {
	t.Helper()
	if _, err := rand.Read(id[:]); err != nil {
		t.Fatal(err)
	}
	return id
}

// newKey generates and loads a key.
func newKey(t testing.TB, m *hsm.MEK, use hsm.Use) (*hsm.Key, hsm.Wrapped) {
	t.Helper()
	w, err := m.Generate(t.Context(), use, []byte("movies/1"))
	if err != nil {
		t.Fatal(err)
	}
	k, err := m.Load(t.Context(), use, []byte("movies/1"), w)
	if err != nil {
		t.Fatal(err)
	}
	return k, w
}

// wantErr checks the cause of an error.
func wantErr(t testing.TB, what string, got, want error) {
	t.Helper()
	if !errors.Is(got, want) {
		t.Errorf("%s: got %v, want %v", what, got, want)
	}
}

// raw is what another user of the same process can do: a session beside the
// package's, with its login.
type raw struct {
	*pkcs11.Ctx
	session pkcs11.SessionHandle
}

func openRaw(t testing.TB, c hsm.Config) raw {
	t.Helper()
	p := pkcs11.New(c.Module)
	slots, err := p.GetSlotList(true)
	if err != nil {
		t.Fatal(err)
	}
	for _, slot := range slots {
		if ti, err := p.GetTokenInfo(slot); err != nil || ti.Label != c.Token {
			continue
		}
		s, err := p.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
		if err != nil {
			t.Fatal(err)
		}
		return raw{p, s}
	}
	t.Fatal("no such token")
	return raw{}
}

// find returns the one secret key with a label.
func (r raw) find(t testing.TB, label string) pkcs11.ObjectHandle {
	t.Helper()
	if err := r.FindObjectsInit(r.session, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), pkcs11.NewAttribute(pkcs11.CKA_LABEL, label),
	}); err != nil {
		t.Fatal(err)
	}
	found, _, err := r.FindObjects(r.session, 2)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.FindObjectsFinal(r.session); err != nil {
		t.Fatal(err)
	}
	if len(found) != 1 {
		t.Fatalf("%d keys with label %s, want 1", len(found), label)
	}
	return found[0]
}

// template of a secret key: attributes in pairs of type and value.
func (r raw) template(pairs ...any) []*pkcs11.Attribute {
	tpl := []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES),
		pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
	}
	for i := 0; i+1 < len(pairs); i += 2 {
		tpl = append(tpl, pkcs11.NewAttribute(uint(pairs[i].(int)), pairs[i+1]))
	}
	return tpl
}

func mechanism(m uint) []*pkcs11.Mechanism {
	return []*pkcs11.Mechanism{pkcs11.NewMechanism(m, nil)}
}

func TestSealOpen(t *testing.T) {
	tok := open(t, softhsm.Test(t))
	k, _ := newKey(t, newMEK(t, tok, "mek-v1", hsm.Sealed), hsm.UseGCM)
	defer k.Release()
	ivs := map[[hsm.IVSize]byte]bool{}
	for _, size := range []int{0, 1, 16, 100, hsm.MaxPlaintext} {
		aad, text := bytes.Repeat([]byte("a"), size%97), bytes.Repeat([]byte("p"), size)
		iv, ct, err := k.Seal(t.Context(), aad, text, nil)
		if err != nil {
			t.Fatalf("%d bytes: %v", size, err)
		}
		ivs[iv] = true
		if got, want := len(ct), size+hsm.TagSize; got != want {
			t.Errorf("%d bytes: ciphertext has %d, want %d", size, got, want)
		}
		dst := make([]byte, size)
		n, err := k.Open(t.Context(), iv, aad, ct, dst)
		if err != nil {
			t.Fatalf("%d bytes: %v", size, err)
		}
		if !bytes.Equal(dst[:n], text) {
			t.Errorf("%d bytes: opened to something else", size)
		}
		_, err = k.Open(t.Context(), iv, append(aad, 'x'), ct, dst)
		wantErr(t, "other associated data", err, hsm.ErrAuth)
		iv[0] ^= 1
		_, err = k.Open(t.Context(), iv, aad, ct, dst)
		wantErr(t, "other IV", err, hsm.ErrAuth)
	}
	if got, want := len(ivs), 5; got != want {
		t.Errorf("%d different IVs, want %d", got, want)
	}
}

func TestSealWritesToDst(t *testing.T) {
	tok := open(t, softhsm.Test(t))
	k, _ := newKey(t, newMEK(t, tok, "mek-v1", hsm.Sealed), hsm.UseGCM)
	buf := make([]byte, 64)
	_, ct, err := k.Seal(t.Context(), nil, []byte("0123456789abcdef"), buf)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := len(ct), 32; got != want {
		t.Errorf("ciphertext has %d bytes, want %d", got, want)
	}
	if &ct[0] != &buf[0] {
		t.Error("ciphertext is not in the memory given")
	}
}

func TestLimits(t *testing.T) {
	tok := open(t, softhsm.Test(t))
	m := newMEK(t, tok, "mek-v1", hsm.Sealed)
	gcm, w := newKey(t, m, hsm.UseGCM)
	mac, _ := newKey(t, m, hsm.UseCMAC)
	s := seal(t, gcm)
	ctx := t.Context()
	for _, row := range []struct {
		name string
		call func() error
		want error
	}{
		{"plaintext too long", func() error {
			_, _, err := gcm.Seal(ctx, nil, make([]byte, hsm.MaxPlaintext+1), nil)
			return err
		}, hsm.ErrPolicy},
		{"associated data too long", func() error { _, _, err := gcm.Seal(ctx, make([]byte, hsm.MaxAAD+1), nil, nil); return err }, hsm.ErrPolicy},
		{"no room", func() error { _, err := gcm.Open(ctx, s.iv, nil, s.ct, make([]byte, 15)); return err }, hsm.ErrPolicy},
		{"ciphertext shorter than a tag", func() error { _, err := gcm.Open(ctx, s.iv, nil, s.ct[:15], make([]byte, 16)); return err }, hsm.ErrAuth},
		{"message too long", func() error { _, err := mac.CMAC(ctx, make([]byte, hsm.MaxMessage+1)); return err }, hsm.ErrPolicy},
		{"message like a canary", func() error { _, err := mac.CMAC(ctx, []byte("hsm key canary\x00\x01\x02")); return err }, hsm.ErrPolicy},
		{"MAC with a GCM key", func() error { _, err := gcm.CMAC(ctx, nil); return err }, hsm.ErrPolicy},
		{"seal with a MAC key", func() error { _, _, err := mac.Seal(ctx, nil, nil, nil); return err }, hsm.ErrPolicy},
		{"open with a MAC key", func() error { _, err := mac.Open(ctx, s.iv, nil, s.ct, make([]byte, 16)); return err }, hsm.ErrPolicy},
		{"no use", func() error { _, err := m.Generate(ctx, 0, nil); return err }, hsm.ErrPolicy},
		{"unknown use", func() error { _, err := m.Load(ctx, 3, nil, w); return err }, hsm.ErrPolicy},
		{"identity too long", func() error { _, err := m.Generate(ctx, hsm.UseGCM, make([]byte, hsm.MaxIdentity+1)); return err }, hsm.ErrPolicy},
		{"random too long", func() error { return tok.Random(ctx, make([]byte, 4096)) }, hsm.ErrPolicy},
		{"MEK without an ID", func() error { return tok.GenerateMEK(ctx, hsm.MEKSpec{Label: "x", Profile: hsm.Sealed}) }, hsm.ErrPolicy},
		{"MEK without a profile", func() error { return tok.GenerateMEK(ctx, hsm.MEKSpec{Label: "x", ID: randomID(t)}) }, hsm.ErrPolicy},
		{"empty blob", func() error { _, err := m.Load(ctx, hsm.UseGCM, nil, hsm.Wrapped{Canary: w.Canary}); return err }, hsm.ErrAuth},
	} {
		wantErr(t, row.name, row.call(), row.want)
	}
	objects, err := tok.Objects(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := len(objects), 1; got != want {
		t.Errorf("%d token objects, want %d", got, want)
	}
}

func TestCMAC(t *testing.T) {
	tok := open(t, softhsm.Test(t))
	m := newMEK(t, tok, "mek-v1", hsm.Sealed)
	a, wrapped := newKey(t, m, hsm.UseCMAC)
	b, _ := newKey(t, m, hsm.UseCMAC)
	again, err := m.Load(t.Context(), hsm.UseCMAC, []byte("movies/1"), wrapped)
	if err != nil {
		t.Fatal(err)
	}
	for _, size := range []int{0, 1, 16, 4096, 4097, 100_000} {
		msg := bytes.Repeat([]byte("m"), size)
		macs := map[[16]byte]string{}
		for name, k := range map[string]*hsm.Key{"a": a, "b": b} {
			mac, err := k.CMAC(t.Context(), msg)
			if err != nil {
				t.Fatalf("%d bytes: %v", size, err)
			}
			macs[mac] = name
		}
		if len(macs) != 2 {
			t.Errorf("%d bytes: two keys, one MAC", size)
		}
		mac, err := again.CMAC(t.Context(), msg)
		if err != nil {
			t.Fatal(err)
		}
		if macs[mac] != "a" {
			t.Errorf("%d bytes: the same key loaded again gives another MAC", size)
		}
	}
}

func TestLoadChecksTheCanary(t *testing.T) {
	tok := open(t, softhsm.Test(t))
	m := newMEK(t, tok, "mek-v1", hsm.Sealed)
	other := newMEK(t, tok, "mek-v2", hsm.Sealed)
	id := []byte("movies/1")
	for _, use := range []hsm.Use{hsm.UseGCM, hsm.UseCMAC} {
		_, w := newKey(t, m, use)
		_, w2 := newKey(t, m, use)
		wrongUse := hsm.UseGCM + hsm.UseCMAC - use
		flipped := hsm.Wrapped{Blob: w.Blob, Canary: bytes.Clone(w.Canary)}
		flipped.Canary[len(flipped.Canary)-1] ^= 1
		for _, row := range []struct {
			name string
			m    *hsm.MEK
			use  hsm.Use
			id   []byte
			w    hsm.Wrapped
			want error
		}{
			{"right", m, use, id, w, nil},
			{"other identity", m, use, []byte("movies/2"), w, hsm.ErrWrongKey},
			{"other use", m, wrongUse, id, w, hsm.ErrWrongKey},
			{"canary of another key", m, use, id, hsm.Wrapped{Blob: w.Blob, Canary: w2.Canary}, hsm.ErrWrongKey},
			{"changed canary", m, use, id, flipped, hsm.ErrWrongKey},
			{"no canary", m, use, id, hsm.Wrapped{Blob: w.Blob}, hsm.ErrWrongKey},
			{"short blob", m, use, id, hsm.Wrapped{Blob: w.Blob[:32], Canary: w.Canary}, hsm.ErrAuth},
			{"other MEK", other, use, id, w, hsm.ErrAuth},
		} {
			_, err := row.m.Load(t.Context(), row.use, row.id, row.w)
			wantErr(t, use.String()+": "+row.name, err, row.want)
		}
	}
}

func TestMEKCanary(t *testing.T) {
	tok := open(t, softhsm.Test(t))
	m, other := newMEK(t, tok, "mek-v1", hsm.Sealed), newMEK(t, tok, "mek-v2", hsm.Rotatable)
	canary, err := m.NewCanary(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	wantErr(t, "right", m.CheckCanary(t.Context(), canary), nil)
	wantErr(t, "other MEK", other.CheckCanary(t.Context(), canary), hsm.ErrWrongKey)
	wantErr(t, "none", m.CheckCanary(t.Context(), nil), hsm.ErrWrongKey)
	for i := range canary {
		bad := bytes.Clone(canary)
		bad[i] ^= 4
		wantErr(t, "changed", m.CheckCanary(t.Context(), bad), hsm.ErrWrongKey)
	}
	if got := tok.Epoch(); got != 1 {
		t.Errorf("epoch %d after bad canaries, want 1", got)
	}
}

func TestRewrap(t *testing.T) {
	tok := open(t, softhsm.Test(t))
	old, next := newMEK(t, tok, "mek-v1", hsm.Rotatable), newMEK(t, tok, "mek-v2", hsm.Rotatable)
	closed := newMEK(t, tok, "mek-v3", hsm.Sealed)
	k, w := newKey(t, old, hsm.UseGCM)
	s := seal(t, k)
	moved, err := old.Rewrap(t.Context(), next, w, hsm.UseGCM, []byte("movies/1"))
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Equal(moved.Blob, w.Blob) {
		t.Error("the blob is the same under another MEK")
	}
	s.key, err = next.Load(t.Context(), hsm.UseGCM, []byte("movies/1"), moved)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.open(t.Context()); err != nil {
		t.Errorf("what the key sealed before it moved: %v", err)
	}
	_, sealedUnder := newKey(t, closed, hsm.UseGCM)
	_, err = closed.Rewrap(t.Context(), next, sealedUnder, hsm.UseGCM, []byte("movies/1"))
	wantErr(t, "from a sealed MEK", err, hsm.ErrPolicy)
	_, err = old.Rewrap(t.Context(), next, w, hsm.UseGCM, []byte("movies/2"))
	wantErr(t, "other identity", err, hsm.ErrWrongKey)
	_, err = old.Rewrap(t.Context(), next, moved, hsm.UseGCM, []byte("movies/1"))
	wantErr(t, "blob of another MEK", err, hsm.ErrAuth)
	if _, err := old.Rewrap(t.Context(), closed, w, hsm.UseGCM, []byte("movies/1")); err != nil {
		t.Errorf("from rotatable to sealed: %v", err)
	}
}

func TestOpenMEK(t *testing.T) {
	c := softhsm.Test(t)
	tok := open(t, c)
	r := openRaw(t, c)
	m := newMEK(t, tok, "mek-v1", hsm.Sealed)
	attrs := m.Attributes()
	for name, want := range map[string]string{
		"sensitive": "true", "extractable": "false", "never_extractable": "true", "always_sensitive": "true",
		"local": "true", "wrap": "true", "unwrap": "true", "decrypt": "false", "encrypt": "false", "sign": "false",
		"modifiable": "false", "copyable": "false", "profile": "sealed", "label": "mek-v1",
	} {
		if got := attrs[name]; got != want {
			t.Errorf("attribute %s: got %q, want %q", name, got, want)
		}
	}
	if !strings.Contains(attrs["unwrap_template"], "extractable=false") {
		t.Errorf("unwrap template: got %q, want extractable=false in it", attrs["unwrap_template"])
	}

	id, other := m.ID(), randomID(t)
	generate := func(label string, id [16]byte, pairs ...any) {
		t.Helper()
		tpl := append(r.template(pairs...), pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, 32),
			pkcs11.NewAttribute(pkcs11.CKA_LABEL, label), pkcs11.NewAttribute(pkcs11.CKA_ID, id[:]))
		if _, err := r.GenerateKey(r.session, mechanism(pkcs11.CKM_AES_KEY_GEN), tpl); err != nil {
			t.Fatal(err)
		}
	}
	loose := randomID(t)
	generate("loose", loose, pkcs11.CKA_SENSITIVE, true, pkcs11.CKA_EXTRACTABLE, true, pkcs11.CKA_WRAP, true, pkcs11.CKA_UNWRAP, true)
	_, err := tok.OpenMEK(t.Context(), "loose", loose)
	wantErr(t, "a plain key", err, hsm.ErrUnfit)
	wantErr(t, "generate over a plain key", tok.GenerateMEK(t.Context(), hsm.MEKSpec{Label: "loose", ID: loose, Profile: hsm.Sealed}), hsm.ErrUnfit)
	wantErr(t, "generate with another profile", tok.GenerateMEK(t.Context(), hsm.MEKSpec{Label: "mek-v1", ID: id, Profile: hsm.Rotatable}), hsm.ErrUnfit)
	_, err = tok.OpenMEK(t.Context(), "mek-v9", other)
	wantErr(t, "no such key", err, hsm.ErrNotFound)
	_, err = tok.OpenMEK(t.Context(), "mek-v1", other)
	wantErr(t, "label of another ID", err, hsm.ErrDuplicate)
	_, err = tok.OpenMEK(t.Context(), "mek-v9", id)
	wantErr(t, "ID of another label", err, hsm.ErrDuplicate)
	wantErr(t, "generate under a label in use", tok.GenerateMEK(t.Context(), hsm.MEKSpec{Label: "mek-v1", ID: other, Profile: hsm.Sealed}), hsm.ErrDuplicate)
	generate("mek-v1-copy", id)
	_, err = tok.OpenMEK(t.Context(), "mek-v1", id)
	wantErr(t, "two with one ID", err, hsm.ErrDuplicate)

	objects, err := tok.Objects(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	labels := map[string]int{}
	for _, o := range objects {
		labels[o.Class+"/"+o.Label]++
	}
	for _, want := range []string{"secret key/mek-v1", "secret key/loose", "secret key/mek-v1-copy"} {
		if labels[want] != 1 {
			t.Errorf("objects: %v, want one %s", labels, want)
		}
	}
}

// An extractable key with everything else right is refused: one wrong flag is
// enough.
func TestExtractableMEKIsUnfit(t *testing.T) {
	c := softhsm.Test(t)
	tok := open(t, c)
	r := openRaw(t, c)
	id := randomID(t)
	tpl := append(r.template(pkcs11.CKA_TOKEN, true, pkcs11.CKA_VALUE_LEN, 32, pkcs11.CKA_SENSITIVE, true, pkcs11.CKA_EXTRACTABLE, true,
		pkcs11.CKA_WRAP, true, pkcs11.CKA_UNWRAP, true, pkcs11.CKA_ENCRYPT, false, pkcs11.CKA_DECRYPT, false, pkcs11.CKA_SIGN, false,
		pkcs11.CKA_VERIFY, false, pkcs11.CKA_DERIVE, false, pkcs11.CKA_COPYABLE, false, pkcs11.CKA_LABEL, "mek-v1", pkcs11.CKA_ID, id[:]),
		pkcs11.NewAttribute(pkcs11.CKA_ALLOWED_MECHANISMS, binary.NativeEndian.AppendUint64(nil, 0x210A)))
	if _, err := r.GenerateKey(r.session, mechanism(pkcs11.CKM_AES_KEY_GEN), tpl); err != nil {
		t.Fatal(err)
	}
	_, err := tok.OpenMEK(t.Context(), "mek-v1", id)
	wantErr(t, "open", err, hsm.ErrUnfit)
}

// What a process that holds the PIN can try against a MEK.
func TestAttacks(t *testing.T) {
	c := softhsm.Test(t)
	tok := open(t, c)
	r := openRaw(t, c)
	_, w := newKey(t, newMEK(t, tok, "mek-v1", hsm.Sealed), hsm.UseGCM)
	_, rotatable := newKey(t, newMEK(t, tok, "mek-v2", hsm.Rotatable), hsm.UseGCM)
	mek, mek2 := r.find(t, "mek-v1"), r.find(t, "mek-v2")
	kwp := mechanism(0x210A)
	full := func(sensitive, extractable bool) []*pkcs11.Attribute {
		return r.template(pkcs11.CKA_SENSITIVE, sensitive, pkcs11.CKA_EXTRACTABLE, extractable, pkcs11.CKA_TOKEN, false,
			pkcs11.CKA_WRAP, false, pkcs11.CKA_UNWRAP, false, pkcs11.CKA_ENCRYPT, true, pkcs11.CKA_DECRYPT, true)
	}
	// The same template in its harmless form passes, so a refusal below is for
	// the attack and not for a slip in the test.
	if _, err := r.UnwrapKey(r.session, kwp, mek, w.Blob, full(true, false)); err != nil {
		t.Fatalf("harmless unwrap: %v", err)
	}
	for _, row := range []struct {
		name   string
		attack func() error
	}{
		{"A1: unwrap in clear", func() error { _, err := r.UnwrapKey(r.session, kwp, mek, w.Blob, full(false, true)); return err }},
		{"A1: unwrap in clear, rotatable", func() error {
			_, err := r.UnwrapKey(r.session, kwp, mek2, rotatable.Blob, full(false, true))
			return err
		}},
		{"A2: unwrap extractable under a sealed MEK", func() error { _, err := r.UnwrapKey(r.session, kwp, mek, w.Blob, full(true, true)); return err }},
		{"A3: make the MEK decrypt", func() error {
			return r.SetAttributeValue(r.session, mek, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_DECRYPT, true)})
		}},
		{"A3: decrypt with the MEK", func() error { return r.DecryptInit(r.session, mechanism(pkcs11.CKM_AES_ECB), mek) }},
		{"A3: copy the MEK", func() error {
			_, err := r.CopyObject(r.session, mek, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_DECRYPT, true)})
			return err
		}},
		{"A4: wrap by another mechanism", func() error {
			key, err := r.GenerateKey(r.session, mechanism(pkcs11.CKM_AES_KEY_GEN), append(full(true, true), pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, 32)))
			if err != nil {
				t.Fatal(err)
			}
			iv := make([]byte, 16)
			_, err = r.WrapKey(r.session, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_CBC, iv)}, mek, key)
			return err
		}},
		{"wrap the MEK itself", func() error { _, err := r.WrapKey(r.session, kwp, mek2, mek); return err }},
		{"read the MEK", func() error {
			_, err := r.GetAttributeValue(r.session, mek, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_VALUE, nil)})
			return err
		}},
	} {
		if err := row.attack(); err == nil {
			t.Errorf("%s: the token let it pass", row.name)
		}
	}
}

// Resident keys are found by anybody with the PIN, and give nothing away.
func TestResidentKeysStayInside(t *testing.T) {
	c := softhsm.Test(t)
	tok := open(t, c)
	newKey(t, newMEK(t, tok, "mek-v1", hsm.Sealed), hsm.UseGCM)
	r := openRaw(t, c)
	var found []pkcs11.ObjectHandle
	// The key that the new one was verified with goes away in its own time.
	eventually(t, "two session keys, the probe's and ours", func() bool {
		if err := r.FindObjectsInit(r.session, r.template(pkcs11.CKA_TOKEN, false)); err != nil {
			t.Fatal(err)
		}
		var err error
		if found, _, err = r.FindObjects(r.session, 100); err != nil {
			t.Fatal(err)
		}
		if err := r.FindObjectsFinal(r.session); err != nil {
			t.Fatal(err)
		}
		return len(found) == 2
	})
	for _, h := range found {
		if _, err := r.GetAttributeValue(r.session, h, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_VALUE, nil)}); err == nil {
			t.Error("the value of a session key can be read")
		}
		attrs, err := r.GetAttributeValue(r.session, h, []*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, nil), pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, nil), pkcs11.NewAttribute(pkcs11.CKA_MODIFIABLE, nil),
		})
		if err != nil {
			t.Fatal(err)
		}
		if attrs[0].Value[0] != 0 || attrs[1].Value[0] != 1 || attrs[2].Value[0] != 0 {
			t.Errorf("extractable %v, sensitive %v, modifiable %v: want 0, 1, 0", attrs[0].Value, attrs[1].Value, attrs[2].Value)
		}
	}
}

// A rotation clears up under service: what is loaded stays.
func TestLeftoversSpareLoadedKeys(t *testing.T) {
	tok := open(t, softhsm.Test(t))
	mek := newMEK(t, tok, "mek-v1", hsm.Sealed)
	newMEK(t, tok, "mek-v2", hsm.Sealed)
	k, _ := newKey(t, mek, hsm.UseGCM)
	s := seal(t, k)
	if n, err := tok.DestroyLeftovers(t.Context(), []string{"mek-v2"}, [][16]byte{randomID(t)}); n != 0 || err != nil {
		t.Errorf("nothing is left over: got %d %v", n, err)
	}
	if err := s.open(t.Context()); err != nil {
		t.Errorf("a loaded key: %v", err)
	}
	// And the one that it was generated as, if the keeper has not destroyed it yet.
	if n, err := tok.DestroyLeftovers(t.Context(), []string{""}, nil); n < 1 || n > 2 || err != nil {
		t.Errorf("objects without a name: got %d %v, want the loaded key", n, err)
	}
	wantErr(t, "the key is gone", s.open(t.Context()), hsm.ErrStale)
}

// What another call has destroyed since the search is no fault: a released key is
// destroyed at any time.
func TestLeftoversThatAreGone(t *testing.T) {
	c, f := faulty(t)
	tok := open(t, c)
	mek := newMEK(t, tok, "mek-v1", hsm.Sealed)
	for _, call := range []string{"C_GetAttributeValue", "C_DestroyObject"} {
		newKey(t, mek, hsm.UseGCM)
		f.Fail(call, 0x82, 1) // CKR_OBJECT_HANDLE_INVALID
		if _, err := tok.DestroyLeftovers(t.Context(), []string{""}, nil); err != nil {
			t.Errorf("%s of an object that is gone: %v", call, err)
		}
		f.Reset()
	}
}

func TestSigner(t *testing.T) {
	c := softhsm.Test(t)
	tok := open(t, c)
	id := randomID(t)
	for range 2 { // the second adopts
		if err := tok.GenerateSigner(t.Context(), "audit-v1", id); err != nil {
			t.Fatal(err)
		}
	}
	s, err := tok.Signer(t.Context(), "audit-v1", id)
	if err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256([]byte("checkpoint"))
	sig, err := s.Sign(nil, digest[:], crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	if !verify(s.Public(), digest[:], sig) {
		t.Error("signature does not verify")
	}
	_, err = s.Sign(nil, digest[:31], crypto.SHA256)
	wantErr(t, "short digest", err, hsm.ErrPolicy)
	_, err = s.Sign(nil, digest[:], crypto.SHA512)
	wantErr(t, "other hash", err, hsm.ErrPolicy)
	_, err = tok.Signer(t.Context(), "audit-v2", randomID(t))
	wantErr(t, "no such signer", err, hsm.ErrNotFound)
	wantErr(t, "label in use", tok.GenerateSigner(t.Context(), "audit-v1", randomID(t)), hsm.ErrDuplicate)

	// A crash between the halves leaves the public one.
	r := openRaw(t, c)
	half := randomID(t)
	if _, err := r.CreateObject(r.session, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY), pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_EC),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, false),
		pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, []byte{6, 8, 0x2A, 0x86, 0x48, 0xCE, 0x3D, 3, 1, 7}),
		pkcs11.NewAttribute(pkcs11.CKA_EC_POINT, append([]byte{4, 65, 4}, make([]byte, 64)...)),
		pkcs11.NewAttribute(pkcs11.CKA_LABEL, "token-v1"), pkcs11.NewAttribute(pkcs11.CKA_ID, half[:]),
	}); err != nil {
		t.Fatal(err)
	}
	if err := tok.GenerateSigner(t.Context(), "token-v1", half); err != nil {
		t.Errorf("generate over a public half alone: %v", err)
	}
	if _, err := tok.Signer(t.Context(), "token-v1", half); err != nil {
		t.Error(err)
	}
}

// An Ed25519 pair has the attributes of a P-256 one but for its curve, and is
// found for what it is.
func TestEd25519Signer(t *testing.T) {
	c := softhsm.Test(t)
	tok := open(t, c)
	id := randomID(t)
	for range 2 { // the second adopts
		if err := tok.GenerateEd25519Signer(t.Context(), "audit-v1", id); err != nil {
			t.Fatal(err)
		}
	}
	s, err := tok.Signer(t.Context(), "audit-v1", id)
	if err != nil {
		t.Fatal(err)
	}
	public, ok := s.Public().(ed25519.PublicKey)
	if !ok {
		t.Fatalf("public key is a %T", s.Public())
	}
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			message := []byte(fmt.Sprintf("checkpoint %d", i))
			sig, err := s.Sign(nil, message, crypto.Hash(0))
			if err != nil || !ed25519.Verify(public, message, sig) {
				t.Errorf("message %d: %v, and the signature does not verify", i, err)
			}
		})
	}
	wg.Wait()
	_, err = s.Sign(nil, make([]byte, 32), crypto.SHA256)
	wantErr(t, "a digest", err, hsm.ErrPolicy)
	_, err = s.Sign(nil, make([]byte, 5000), crypto.Hash(0))
	wantErr(t, "long message", err, hsm.ErrPolicy)
	wantErr(t, "P-256 in its place", tok.GenerateSigner(t.Context(), "audit-v1", id), hsm.ErrUnfit)

	r := openRaw(t, c)
	if err := r.FindObjectsInit(r.session, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_ID, id[:])}); err != nil {
		t.Fatal(err)
	}
	found, _, err := r.FindObjects(r.session, 2)
	if err := errors.Join(err, r.FindObjectsFinal(r.session)); err != nil || len(found) != 1 {
		t.Fatalf("%d private halves, %v", len(found), err)
	}
	attrs, err := r.GetAttributeValue(r.session, found[0], []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, nil),
		pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, nil), pkcs11.NewAttribute(pkcs11.CKA_MODIFIABLE, nil)})
	if err != nil {
		t.Fatal(err)
	}
	if attrs[0].Value[0] != 0 || attrs[1].Value[0] != 1 || attrs[2].Value[0] != 0 {
		t.Errorf("extractable %v, sensitive %v, modifiable %v: want 0, 1, 0", attrs[0].Value, attrs[1].Value, attrs[2].Value)
	}
}

func TestRandom(t *testing.T) {
	tok := open(t, softhsm.Test(t))
	seen := map[string]bool{}
	for range 100 {
		b := make([]byte, 16)
		if err := tok.Random(t.Context(), b); err != nil {
			t.Fatal(err)
		}
		seen[string(b)] = true
	}
	if got, want := len(seen), 100; got != want {
		t.Errorf("%d different values, want %d", got, want)
	}
}

func TestInfo(t *testing.T) {
	c := softhsm.Test(t)
	c.MaxSessions = 7
	tok := open(t, c)
	info := tok.Info()
	if info.Label != "test" || info.Serial == "" || info.Profile != "softhsm" || info.Epoch != 1 || info.MaxSessions != 7 || info.Outage != nil {
		t.Errorf("info: %+v", info)
	}
	if info.EnforcesTrusted || info.DefaultMEKProfile != hsm.Sealed {
		t.Errorf("trusted %v, default %s: want false and sealed, because SoftHSM cannot trust a private key", info.EnforcesTrusted, info.DefaultMEKProfile)
	}
	k, _ := newKey(t, newMEK(t, tok, "mek-v1", hsm.Sealed), hsm.UseGCM)
	s := seal(t, k)
	var wg sync.WaitGroup
	for range 32 {
		wg.Go(func() {
			for range 50 {
				if err := s.open(t.Context()); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if got := tok.Info(); got.Sessions > 7 || got.InFlight != 0 || got.Abandoned != 0 {
		t.Errorf("%d sessions, %d in flight, %d abandoned: want at most 7, 0, 0", got.Sessions, got.InFlight, got.Abandoned)
	}
}

func TestConcurrentMixedUse(t *testing.T) {
	tok := open(t, softhsm.Test(t))
	m := newMEK(t, tok, "mek-v1", hsm.Rotatable)
	gcm, w := newKey(t, m, hsm.UseGCM)
	mac, _ := newKey(t, m, hsm.UseCMAC)
	id := randomID(t)
	if err := tok.GenerateSigner(t.Context(), "audit-v1", id); err != nil {
		t.Fatal(err)
	}
	signer, err := tok.Signer(t.Context(), "audit-v1", id)
	if err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256(nil)
	s := seal(t, gcm)
	jobs := []func() error{
		func() error { return s.open(t.Context()) },
		func() error { _, _, err := gcm.Seal(t.Context(), nil, []byte("x"), nil); return err },
		func() error { _, err := mac.CMAC(t.Context(), []byte("x")); return err },
		func() error { _, err := signer.Sign(nil, digest[:], crypto.SHA256); return err },
		func() error {
			k, err := m.Load(t.Context(), hsm.UseGCM, []byte("movies/1"), w)
			if err == nil {
				k.Release()
			}
			return err
		},
		func() error { return tok.Health(t.Context()) },
		func() error { return tok.Random(t.Context(), make([]byte, 12)) },
		func() error { _, err := tok.Objects(t.Context()); return err },
	}
	var wg sync.WaitGroup
	for i := range 32 {
		wg.Go(func() {
			for range 20 {
				if err := jobs[i%len(jobs)](); err != nil {
					t.Errorf("job %d: %v", i%len(jobs), err)
				}
			}
		})
	}
	wg.Wait()
	if got := tok.Epoch(); got != 1 {
		t.Errorf("epoch %d, want 1: nothing was lost", got)
	}
}

func TestOneTokenPerModule(t *testing.T) {
	c := softhsm.Test(t)
	tok := open(t, c)
	_, err := hsm.Open(t.Context(), c)
	wantErr(t, "second open", err, hsm.ErrPolicy)
	closeToken(t, tok)
	closeToken(t, tok)
	wantErr(t, "use after close", tok.Random(t.Context(), make([]byte, 1)), hsm.ErrDevice)
	open(t, c)
}
