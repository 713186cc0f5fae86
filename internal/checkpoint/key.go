package checkpoint

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"

	"golang.org/x/mod/sumdb/note"
)

// NewSigner returns what signs notes under name. An ECDSA P-256 key makes ASN.1
// DER signatures over the SHA-256 of the text, signature type 0x02 of the
// specification, whose key ID comes from the public key alone; an Ed25519 key
// signatures of type 0x01, as the checksum database of Go does.
func NewSigner(name string, key crypto.Signer) (note.Signer, error) {
	if public, ok := key.Public().(ed25519.PublicKey); ok {
		v, err := NewVerifier(name, public)
		if err != nil {
			return nil, err
		}
		return &ed25519Signer{v, key}, nil
	}
	v, err := newECDSA(name, key.Public())
	if err != nil {
		return nil, err
	}
	return &ecdsaSigner{v, key}, nil
}

// NewVerifier returns what verifies notes that the key, an *ecdsa.PublicKey on
// P-256 or an ed25519.PublicKey, has signed under name.
func NewVerifier(name string, key crypto.PublicKey) (note.Verifier, error) {
	if key, ok := key.(ed25519.PublicKey); ok {
		text, err := note.NewEd25519VerifierKey(name, key)
		if err != nil {
			return nil, fmt.Errorf("verifier %q: %w", name, err)
		}
		return note.NewVerifier(text)
	}
	v, err := newECDSA(name, key)
	if err != nil {
		return nil, err
	}
	return v, nil
}

// ParseKey reads a public key in PEM, as SubjectPublicKeyInfo (RFC 5280).
func ParseKey(text []byte) (crypto.PublicKey, error) {
	block, _ := pem.Decode(text)
	if block == nil || block.Type != "PUBLIC KEY" {
		return nil, errors.New("not a public key in PEM")
	}
	key, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return nil, err
	}
	if _, err := NewVerifier("any", key); err != nil {
		return nil, err
	}
	return key, nil
}

// FormatKey returns PEM of a DER SubjectPublicKeyInfo.
func FormatKey(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
}

type ecdsaVerifier struct {
	name string
	id   uint32
	key  *ecdsa.PublicKey
}

func newECDSA(name string, key crypto.PublicKey) (*ecdsaVerifier, error) {
	p, ok := key.(*ecdsa.PublicKey)
	if !ok || p.Curve != elliptic.P256() {
		return nil, fmt.Errorf("verifier %q: a key of type %T is neither ECDSA P-256 nor Ed25519", name, key)
	}
	der, err := x509.MarshalPKIXPublicKey(p)
	if err != nil {
		return nil, fmt.Errorf("verifier %q: %w", name, err)
	}
	sum := sha256.Sum256(der)
	return &ecdsaVerifier{name, binary.BigEndian.Uint32(sum[:4]), p}, nil
}

func (v *ecdsaVerifier) Name() string    { return v.name }
func (v *ecdsaVerifier) KeyHash() uint32 { return v.id }

func (v *ecdsaVerifier) Verify(text, sig []byte) bool {
	digest := sha256.Sum256(text)
	return ecdsa.VerifyASN1(v.key, digest[:], sig)
}

type ecdsaSigner struct {
	*ecdsaVerifier
	signer crypto.Signer
}

func (s *ecdsaSigner) Sign(text []byte) ([]byte, error) {
	digest := sha256.Sum256(text)
	return s.signer.Sign(rand.Reader, digest[:], crypto.SHA256)
}

type ed25519Signer struct {
	note.Verifier
	signer crypto.Signer
}

func (s *ed25519Signer) Sign(text []byte) ([]byte, error) {
	return s.signer.Sign(rand.Reader, text, crypto.Hash(0))
}
