// Package sealing seals a content key to the public key of the caller that it
// is for, so that nobody on the way, such as a proxy that ends TLS, sees it.
//
// It decides the form of the keys, of what is sealed, and what a sealed key is
// bound to. Whom a key is sealed to is decided in package custodian.
//
// The scheme is HPKE (RFC 9180), base mode, one encapsulation for each key:
//
//	KEM   DHKEM(X25519, HKDF-SHA256) 0x0020, or MLKEM768-X25519 0x647a
//	KDF   HKDF-SHA256 0x0001
//	AEAD  AES-256-GCM 0x0002
//	info  "custodian sealed content key v1" and the fields of About
//	aad   empty
//
// What is sealed is the encapsulated key followed by the ciphertext. In info,
// each field of About follows in its order: a text or bytes as its length in 4
// bytes and its content, a number in 4 bytes, all big-endian; the period as a
// byte 0 for none, or a byte 1 and its index.
package sealing

import (
	"crypto/ecdh"
	"crypto/hpke"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
)

const label = "custodian sealed content key v1"

// The KEMs by the names that begin a key's text.
const (
	X25519         = "x25519"
	MLKEM768X25519 = "mlkem768x25519"
)

// KEMs are all of them, the one to prefer first.
var KEMs = []string{MLKEM768X25519, X25519}

const privatePrefix = "private-"

// ErrOpen means that a sealed key is not for this private key, or not about
// what it is said to be about.
var ErrOpen = errors.New("sealed key does not open")

func kemOf(name string) (hpke.KEM, error) {
	switch name {
	case MLKEM768X25519:
		return hpke.MLKEM768X25519(), nil
	case X25519:
		return hpke.DHKEM(ecdh.X25519()), nil
	}
	return nil, fmt.Errorf("KEM %.40q: must be one of %v", name, KEMs)
}

// A PublicKey is a recipient's. The zero PublicKey is none.
type PublicKey struct {
	kem string
	key hpke.PublicKey
	id  string
}

// ParsePublicKey reads KEM:BASE64.
func ParsePublicKey(s string) (PublicKey, error) {
	kem, raw, err := parse(s)
	if err != nil {
		return PublicKey{}, fmt.Errorf("recipient key: %w", err)
	}
	k, err := kemOf(kem)
	if err != nil {
		return PublicKey{}, fmt.Errorf("recipient key: %w", err)
	}
	key, err := k.NewPublicKey(raw)
	if err != nil {
		return PublicKey{}, fmt.Errorf("recipient key: %s: %w", kem, err)
	}
	return newPublicKey(kem, key), nil
}

func newPublicKey(kem string, key hpke.PublicKey) PublicKey {
	p := PublicKey{kem: kem, key: key}
	sum := sha256.Sum256([]byte(p.String()))
	p.id = hex.EncodeToString(sum[:8])
	return p
}

// String is what ParsePublicKey reads.
func (k PublicKey) String() string {
	return k.kem + ":" + base64.StdEncoding.EncodeToString(k.key.Bytes())
}

// ID names the key: the first 8 bytes of the SHA-256 of its text, in
// hexadecimal.
func (k PublicKey) ID() string { return k.id }

// IsZero reports whether k is no key.
func (k PublicKey) IsZero() bool { return k.key == nil }

// A PrivateKey opens what was sealed to its public half.
type PrivateKey struct {
	kem string
	key hpke.PrivateKey
}

// GenerateKey makes a private key for a KEM.
func GenerateKey(kem string) (PrivateKey, error) {
	k, err := kemOf(kem)
	if err != nil {
		return PrivateKey{}, err
	}
	key, err := k.GenerateKey()
	return PrivateKey{kem, key}, err
}

// ParsePrivateKey reads what PrivateKey.Text gave.
func ParsePrivateKey(text []byte) (PrivateKey, error) {
	s, ok := strings.CutPrefix(strings.TrimSpace(string(text)), privatePrefix)
	if !ok {
		return PrivateKey{}, errors.New("recipient private key: it does not begin with " + privatePrefix)
	}
	kem, raw, err := parse(s)
	if err != nil {
		return PrivateKey{}, fmt.Errorf("recipient private key: %w", err)
	}
	k, err := kemOf(kem)
	if err != nil {
		return PrivateKey{}, fmt.Errorf("recipient private key: %w", err)
	}
	key, err := k.NewPrivateKey(raw)
	if err != nil { // the library's words may show bytes of it
		return PrivateKey{}, fmt.Errorf("recipient private key: not a key of %s", kem)
	}
	return PrivateKey{kem, key}, nil
}

// parse splits KEM:BASE64. Its errors do not show the bytes, which may be
// secret.
func parse(s string) (kem string, raw []byte, err error) {
	kem, text, ok := strings.Cut(strings.TrimSpace(s), ":")
	if !ok {
		return "", nil, errors.New("must be KEM:BASE64")
	}
	if raw, err = base64.StdEncoding.DecodeString(text); err != nil {
		return "", nil, errors.New("must be KEM:BASE64: what follows the colon is no base64")
	}
	return kem, raw, nil
}

// Text is the key for a file that only its owner may read.
func (k PrivateKey) Text() ([]byte, error) {
	raw, err := k.key.Bytes()
	if err != nil {
		return nil, err
	}
	return []byte(privatePrefix + k.kem + ":" + base64.StdEncoding.EncodeToString(raw) + "\n"), nil
}

// Public is the public half.
func (k PrivateKey) Public() PublicKey { return newPublicKey(k.kem, k.key.PublicKey()) }

// About is what a sealed key is bound to: it opens only with the same.
type About struct {
	Caller     string // as the daemon knows it
	RequestID  string
	KID        []byte
	Generation uint32
	IV         []byte // the explicit IV, empty where there is none
	Category   string
	ContentID  []byte
	TrackType  string
	Scheme     string
	Period     *uint32 // nil: none
}

func (a About) info() []byte {
	b := make([]byte, 0, 256)
	text := func(s string) { b = append(binary.BigEndian.AppendUint32(b, uint32(len(s))), s...) }
	text(label)
	text(a.Caller)
	text(a.RequestID)
	text(string(a.KID))
	b = binary.BigEndian.AppendUint32(b, a.Generation)
	text(string(a.IV))
	text(a.Category)
	text(string(a.ContentID))
	text(a.TrackType)
	text(a.Scheme)
	if a.Period == nil {
		return append(b, 0)
	}
	return binary.BigEndian.AppendUint32(append(b, 1), *a.Period)
}

// Seal seals a content key to a recipient.
func Seal(to PublicKey, about About, key []byte) ([]byte, error) {
	if to.IsZero() {
		return nil, errors.New("seal content key: no recipient key")
	}
	sealed, err := hpke.Seal(to.key, hpke.HKDFSHA256(), hpke.AES256GCM(), about.info(), key)
	if err != nil {
		return nil, fmt.Errorf("seal content key to recipient key %s: %w", to.id, err)
	}
	return sealed, nil
}

// Open opens what Seal made for the same. Its errors are ErrOpen.
func (k PrivateKey) Open(about About, sealed []byte) ([]byte, error) {
	key, err := hpke.Open(k.key, hpke.HKDFSHA256(), hpke.AES256GCM(), about.info(), sealed)
	if err != nil {
		return nil, fmt.Errorf("recipient key %s: %w", k.Public().ID(), ErrOpen)
	}
	return key, nil
}
