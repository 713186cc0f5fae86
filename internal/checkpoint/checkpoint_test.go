package checkpoint_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"strings"
	"testing"

	"github.com/keycustody/custodian/internal/checkpoint"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func sign(t testing.TB, c checkpoint.Checkpoint, key crypto.Signer) []byte {
	t.Helper()
	s, err := checkpoint.NewSigner(c.Origin, key)
	if err != nil {
		t.Fatal(err)
	}
	b, err := c.Sign(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

var sample = checkpoint.Checkpoint{Origin: checkpoint.Origin([16]byte{1, 2}), Size: 20852163, Root: [32]byte{3}}

func TestText(t *testing.T) {
	want := "custodian/01020000000000000000000000000000\n20852163\nAwAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\n"
	if got := sample.Text(); got != want {
		t.Errorf("text = %q, want %q", got, want)
	}
}

// A signed checkpoint verifies, and with any byte changed it does not.
func TestSigned(t *testing.T) {
	key := newKey(t)
	signed := sign(t, sample, key)
	got, err := checkpoint.Verify(signed, key.Public())
	if err != nil || got != sample {
		t.Fatalf("Verify = %+v, %v, want %+v", got, err, sample)
	}
	for i := range signed {
		for _, mask := range []byte{0x01, 0x20, 0x80} {
			b := bytes.Clone(signed)
			b[i] ^= mask
			_, err := checkpoint.Verify(b, key.Public())
			if !errors.Is(err, checkpoint.ErrSignature) && !errors.Is(err, checkpoint.ErrMalformed) {
				t.Errorf("byte %d changed by %#x: Verify says %v", i, mask, err)
			}
		}
	}
	if _, err := checkpoint.Verify(signed, newKey(t).Public()); !errors.Is(err, checkpoint.ErrSignature) {
		t.Errorf("with another key: error = %v, want ErrSignature", err)
	}
}

// The signature is one that the note package's users can verify with nothing
// but the name, the key ID of the specification and the standard library.
func TestECDSANote(t *testing.T) {
	key := newKey(t)
	v, err := checkpoint.NewVerifier(sample.Origin, key.Public())
	if err != nil {
		t.Fatal(err)
	}
	n, err := note.Open(sign(t, sample, key), note.VerifierList(v))
	if err != nil || n.Text != sample.Text() || len(n.Sigs) != 1 || n.Sigs[0].Name != sample.Origin {
		t.Errorf("note = %+v, %v", n, err)
	}
}

// What the note package signs with Ed25519 is accepted here, and the other way.
func TestEd25519Interoperates(t *testing.T) {
	skey, vkey, err := note.GenerateKey(rand.Reader, sample.Origin)
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := note.NewSigner(skey)
	if err != nil {
		t.Fatal(err)
	}
	verifier, err := note.NewVerifier(vkey)
	if err != nil {
		t.Fatal(err)
	}
	signed, err := note.Sign(&note.Note{Text: sample.Text()}, theirs)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := checkpoint.Open(signed, verifier); err != nil || got != sample {
		t.Errorf("their note: %+v, %v", got, err)
	}

	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signed = sign(t, sample, private)
	text, err := note.NewEd25519VerifierKey(sample.Origin, public)
	if err != nil {
		t.Fatal(err)
	}
	if verifier, err = note.NewVerifier(text); err != nil {
		t.Fatal(err)
	}
	if n, err := note.Open(signed, note.VerifierList(verifier)); err != nil || n.Text != sample.Text() {
		t.Errorf("our note is refused: %v", err)
	}
	if got, err := checkpoint.Verify(signed, public); err != nil || got != sample {
		t.Errorf("our note: %+v, %v", got, err)
	}
}

func TestOrigin(t *testing.T) {
	id := [16]byte{1, 2}
	for _, tt := range []struct {
		origin string
		want   bool
	}{
		{checkpoint.Origin(id), true},
		{checkpoint.NamedOrigin("keys.video.example/audit", id), true},
		{checkpoint.NamedOrigin("Schlüssel", id), true},
		{checkpoint.Origin([16]byte{1, 3}), false},
		{checkpoint.Origin(id) + "/", false},
		{checkpoint.NamedOrigin("", id), false},
		{checkpoint.NamedOrigin("a name", id), false},
		{checkpoint.NamedOrigin("a+b", id), false},
		{checkpoint.NamedOrigin("a\nb", id), false},
		{checkpoint.NamedOrigin(strings.Repeat("x", 101), id), false},
	} {
		if got := checkpoint.OfLog(tt.origin, id); got != tt.want {
			t.Errorf("%q is of the log: %t, want %t", tt.origin, got, tt.want)
		}
	}
	// The longest one has room in a checkpoint.
	c := checkpoint.Checkpoint{Origin: checkpoint.NamedOrigin(strings.Repeat("x", 100), id), Size: 1<<63 - 1}
	key := newKey(t)
	if got, err := checkpoint.Verify(sign(t, c, key), key.Public()); err != nil || got != c {
		t.Errorf("Verify = %+v, %v", got, err)
	}
}

func TestMalformed(t *testing.T) {
	root := "AwAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="
	for _, tt := range []struct{ name, text string }{
		{"empty", ""},
		{"no signature", "o\n1\n" + root + "\n"},
		{"no origin", "\n1\n" + root + "\n\n— o AAAA\n"},
		{"two lines", "o\n1\n\n— o AAAA\n"},
		{"leading zero", "o\n01\n" + root + "\n\n— o AAAA\n"},
		{"sign", "o\n+1\n" + root + "\n\n— o AAAA\n"},
		{"too large", "o\n9223372036854775808\n" + root + "\n\n— o AAAA\n"},
		{"short root", "o\n1\nAAAA\n\n— o AAAA\n"},
		{"loose root", "o\n1\n" + root[:42] + "B=\n\n— o AAAA\n"},
		{"long", "o\n1\n" + root + "\n" + strings.Repeat("x", 1024) + "\n\n— o AAAA\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if c, err := checkpoint.Parse([]byte(tt.text)); !errors.Is(err, checkpoint.ErrMalformed) {
				t.Errorf("Parse = %+v, %v, want ErrMalformed", c, err)
			}
		})
	}
}

// Inclusion and consistency, against proofs that tlog makes.
func TestProofs(t *testing.T) {
	const n = 21
	var stored []tlog.Hash
	read := tlog.HashReaderFunc(func(indexes []int64) ([]tlog.Hash, error) {
		var out []tlog.Hash
		for _, i := range indexes {
			out = append(out, stored[i])
		}
		return out, nil
	})
	var at []checkpoint.Checkpoint
	var leaves [][32]byte
	at = append(at, checkpoint.Checkpoint{Origin: "o"})
	for i := range int64(n) {
		leaf := tlog.RecordHash([]byte{byte(i)})
		more, err := tlog.StoredHashesForRecordHash(i, leaf, read)
		if err != nil {
			t.Fatal(err)
		}
		stored = append(stored, more...)
		root, err := tlog.TreeHash(i+1, read)
		if err != nil {
			t.Fatal(err)
		}
		leaves = append(leaves, leaf)
		at = append(at, checkpoint.Checkpoint{Origin: "o", Size: uint64(i + 1), Root: root})
	}
	for size := int64(1); size <= n; size++ {
		for i := range size {
			proof, err := tlog.ProveRecord(size, i, read)
			if err != nil {
				t.Fatal(err)
			}
			if err := at[size].CheckInclusion(uint64(i), leaves[i], raw(proof)); err != nil {
				t.Errorf("entry %d in %d: %v", i, size, err)
			}
			if err := at[size].CheckInclusion(uint64(i), [32]byte{9}, raw(proof)); !errors.Is(err, checkpoint.ErrProof) {
				t.Errorf("another entry %d in %d: error = %v, want ErrProof", i, size, err)
			}
			older, err := tlog.ProveTree(size, i+1, read)
			if err != nil {
				t.Fatal(err)
			}
			if err := at[size].CheckConsistency(at[i+1], raw(older)); err != nil {
				t.Errorf("%d after %d: %v", size, i+1, err)
			}
			forked := at[i+1]
			forked.Root[0]++
			if err := at[size].CheckConsistency(forked, raw(older)); !errors.Is(err, checkpoint.ErrProof) {
				t.Errorf("%d after another %d: error = %v, want ErrProof", size, i+1, err)
			}
		}
	}
	if err := at[3].CheckConsistency(at[4], nil); !errors.Is(err, checkpoint.ErrProof) {
		t.Errorf("older after newer: error = %v, want ErrProof", err)
	}
	if err := at[3].CheckInclusion(3, leaves[3], nil); !errors.Is(err, checkpoint.ErrProof) {
		t.Errorf("an entry that is not there: error = %v, want ErrProof", err)
	}
	other := at[2]
	other.Origin = "p"
	if err := at[2].CheckConsistency(other, nil); !errors.Is(err, checkpoint.ErrProof) {
		t.Errorf("another log: error = %v, want ErrProof", err)
	}
}

func raw(in []tlog.Hash) [][32]byte {
	var out [][32]byte
	for _, h := range in {
		out = append(out, h)
	}
	return out
}

func TestKeys(t *testing.T) {
	key := newKey(t)
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	got, err := checkpoint.ParseKey(checkpoint.FormatKey(der))
	if err != nil || !key.PublicKey.Equal(got) {
		t.Errorf("ParseKey = %v, %v", got, err)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if der, err = x509.MarshalPKIXPublicKey(p384.Public()); err != nil {
		t.Fatal(err)
	}
	for _, text := range [][]byte{nil, []byte("hello"), checkpoint.FormatKey(nil), checkpoint.FormatKey(der)} {
		if got, err := checkpoint.ParseKey(text); err == nil {
			t.Errorf("ParseKey(%q) = %v, want an error", text, got)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(sign(f, sample, newKey(f)))
	f.Add([]byte("o\n1\nAwAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\nmore\n\n— o AAAA\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := checkpoint.Parse(b)
		if err == nil && !strings.HasPrefix(string(b), c.Text()) {
			t.Errorf("%q was read as %q", b, c.Text())
		}
	})
}
