package packager

import (
	"bytes"
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/subtle"
	"errors"
	"fmt"
	"slices"

	"github.com/keycustody/custodian/custodian"
)

// A Signer is a name under which callers sign their requests to the Widevine
// API. Requests have neither a nonce nor a time, so that a signature can be
// replayed: a signer only narrows what the client certificate has proved.
type Signer struct {
	Name string
	// Identities are the callers that use this signer. Each of them must sign.
	Identities []string
	// One of the two is set: AESKey, of 16 or 32 bytes, with AESIV, or RSA.
	AESKey []byte
	AESIV  [aes.BlockSize]byte
	RSA    *rsa.PublicKey
}

func (s Signer) check() error {
	switch {
	case s.Name == "":
		return errors.New("it has no name")
	case len(s.Identities) == 0:
		return errors.New("identities: empty: nobody could use it")
	case (len(s.AESKey) == 0) == (s.RSA == nil):
		return errors.New("either an AES key or an RSA public key must be set")
	case s.RSA == nil && len(s.AESKey) != 16 && len(s.AESKey) != 32:
		return fmt.Errorf("AES key of %d bytes: must be 16 or 32", len(s.AESKey))
	case s.RSA != nil && s.RSA.N.BitLen() < 2048:
		return fmt.Errorf("RSA key of %d bits: must be at least 2048", s.RSA.N.BitLen())
	}
	return nil
}

// verify says whether signature is the signer's over request: AES-CBC of its
// SHA-1 digest with PKCS #7 padding, or RSASSA-PSS with SHA-1 and a salt of 20
// bytes. The protocol has no other forms.
func (s Signer) verify(request, signature []byte) error {
	digest := sha1.Sum(request)
	if s.RSA != nil {
		return rsa.VerifyPSS(s.RSA, crypto.SHA1, digest[:], signature, &rsa.PSSOptions{SaltLength: sha1.Size})
	}
	block, err := aes.NewCipher(s.AESKey)
	if err != nil {
		return err
	}
	defer forget(block)
	pad := 2*aes.BlockSize - sha1.Size
	want := append(digest[:], bytes.Repeat([]byte{byte(pad)}, pad)...)
	cipher.NewCBCEncrypter(block, s.AESIV[:]).CryptBlocks(want, want)
	if subtle.ConstantTimeCompare(want, signature) != 1 {
		return errors.New("it is not of this request and key")
	}
	return nil
}

// signers are those in force.
type signers struct {
	byName map[string]Signer
	must   map[string]bool // identities that have to sign
}

// SetSigners replaces the signers.
func (s *Server) SetSigners(list []Signer) error {
	set, err := newSigners(list)
	if err != nil {
		return err
	}
	s.signers.Store(set)
	return nil
}

// CheckSigners tells what is wrong with the signers, all at once.
func CheckSigners(list []Signer) error {
	_, err := newSigners(list)
	return err
}

func newSigners(list []Signer) (*signers, error) {
	set := &signers{map[string]Signer{}, map[string]bool{}}
	var faults []error
	for i, signer := range list {
		if err := signer.check(); err != nil {
			faults = append(faults, fmt.Errorf("signers[%d]: %w", i, err))
		}
		if _, twice := set.byName[signer.Name]; twice {
			faults = append(faults, fmt.Errorf("signers[%d]: %q is there twice", i, signer.Name))
		}
		set.byName[signer.Name] = signer
		for _, id := range signer.Identities {
			set.must[id] = true
		}
	}
	return set, errors.Join(faults...)
}

// check says what is wrong with the signature of who over request, or nil. A
// caller with a signer must sign, and one without must not: what nobody can
// verify is no signature. The error is not for the caller.
func (s *signers) check(who custodian.Caller, e envelope) error {
	if e.Signer == "" && len(e.Signature) == 0 {
		if s.must[who.ID] {
			return errors.New("the request is not signed, and a signer is configured for this caller")
		}
		return nil
	}
	signer, ok := s.byName[e.Signer]
	if !ok {
		return fmt.Errorf("signer %.80q is not configured", e.Signer)
	}
	if !slices.Contains(signer.Identities, who.ID) {
		return fmt.Errorf("signer %q is not this caller's", e.Signer)
	}
	if err := signer.verify(e.Request, e.Signature); err != nil {
		return fmt.Errorf("signature of %q: %w", e.Signer, err)
	}
	return nil
}
