package hsm_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"testing"
	"time"

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

func TestSealOpen(t *testing.T) {
	tok := open(t, softhsm.Test(t))
	k, _ := newKey(t, newMEK(t, tok, "mek-v1", hsm.Sealed), hsm.UseGCM)
	defer k.Release()
	aad, text := []byte("record"), []byte("0123456789abcdef")
	iv, ct, err := k.Seal(t.Context(), aad, text, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := len(ct), len(text)+hsm.TagSize; got != want {
		t.Errorf("ciphertext has %d bytes, want %d", got, want)
	}
	dst := make([]byte, 16)
	n, err := k.Open(t.Context(), iv, aad, ct, dst)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := dst[:n], text; !bytes.Equal(got, want) {
		t.Errorf("opened %q, want %q", got, want)
	}
}
