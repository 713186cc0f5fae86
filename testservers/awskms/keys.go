package awskms

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"maps"
	"net/http"
	"slices"
)

// A State is of a key.
type State string

// The states of a key that the tests need; AWS KMS Developer Guide, Key
// states of AWS KMS keys.
const (
	Enabled         State = "Enabled"
	Disabled        State = "Disabled"
	PendingDeletion State = "PendingDeletion"
	// Unavailable is of a key in a custom key store that is away.
	Unavailable State = "Unavailable"
	// Gone: there is no such key.
	Gone State = "Gone"
)

// A key is a symmetric one, with all of its material, the newest last.
type key struct {
	arn      string
	id       [16]byte
	material []cipher.AEAD
	state    State
}

// CreateKey makes a key and an alias for it, and returns the key's ARN.
func (s *Server) CreateKey(alias string) string {
	k := &key{material: []cipher.AEAD{s.newMaterial()}, state: Enabled}
	copy(k.id[:], random(16))
	k.arn = fmt.Sprintf("arn:aws:kms:%s:%s:key/%x-%x-%x-%x-%x", Region, account, k.id[:4], k.id[4:6], k.id[6:8], k.id[8:10], k.id[10:])
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keys[k.arn] = k
	s.aliases["alias/"+alias] = k.arn
	return k.arn
}

// RotateKey gives a key new material. The old is kept, as AWS does.
func (s *Server) RotateKey(arn string) {
	made := s.newMaterial()
	s.mu.Lock()
	defer s.mu.Unlock()
	k := s.keys[arn]
	k.material = append(k.material, made)
}

// SetState changes a key's state.
func (s *Server) SetState(arn string, state State) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keys[arn].state = state
}

// Material is the number of the key material that made a blob, from 0.
func Material(blob []byte) int { return int(binary.BigEndian.Uint16(blob[17:])) }

func (s *Server) newMaterial() cipher.AEAD {
	block, err := aes.NewCipher(random(32))
	if err != nil {
		s.t.Fatalf("make key material: %v", err)
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		s.t.Fatalf("make key material: %v", err)
	}
	return aead
}

func random(n int) []byte {
	b := make([]byte, n)
	rand.Read(b)
	return b
}

// An input has the members of all three operations.
type input struct {
	KeyId, SourceKeyId, DestinationKeyId                                           string
	Plaintext, CiphertextBlob                                                      []byte
	EncryptionContext, SourceEncryptionContext, DestinationEncryptionContext       map[string]string
	EncryptionAlgorithm, SourceEncryptionAlgorithm, DestinationEncryptionAlgorithm string
}

// An output has the members of all three answers.
type output struct {
	KeyId               string `json:"KeyId"`
	SourceKeyId         string `json:"SourceKeyId,omitempty"`
	Plaintext           []byte `json:"Plaintext,omitempty"`
	CiphertextBlob      []byte `json:"CiphertextBlob,omitempty"`
	EncryptionAlgorithm string `json:"EncryptionAlgorithm,omitempty"`
}

// find is the key of a name, if it can be used.
func (s *Server) find(name string) (*key, error) {
	arn := name
	if to, ok := s.aliases[name]; ok {
		arn = to
	}
	k := s.keys[arn]
	if k == nil || k.state == Gone {
		return nil, &Error{http.StatusBadRequest, "NotFoundException", fmt.Sprintf("Key '%s' does not exist", name)}
	}
	switch k.state {
	case Disabled:
		return nil, &Error{http.StatusBadRequest, "DisabledException", k.arn + " is disabled."}
	case PendingDeletion:
		return nil, &Error{http.StatusBadRequest, "KMSInvalidStateException", k.arn + " is pending deletion."}
	case Unavailable:
		return nil, &Error{http.StatusBadRequest, "KMSInvalidStateException", "The custom key store of " + k.arn + " is disconnected."}
	}
	return k, nil
}

func (s *Server) encrypt(in input) (*output, error) {
	if n := len(in.Plaintext); n == 0 || n > 4096 {
		return nil, &Error{http.StatusBadRequest, "ValidationException", "Value at 'plaintext' failed to satisfy constraint: Member must have length between 1 and 4096"}
	}
	k, err := s.find(in.KeyId)
	if err != nil {
		return nil, err
	}
	return &output{KeyId: k.arn, CiphertextBlob: k.seal(in.Plaintext, in.EncryptionContext), EncryptionAlgorithm: in.EncryptionAlgorithm}, nil
}

func (s *Server) decrypt(in input) (*output, error) {
	k, plain, err := s.unseal(in.KeyId, in.CiphertextBlob, in.EncryptionContext)
	if err != nil {
		return nil, err
	}
	return &output{KeyId: k.arn, Plaintext: plain, EncryptionAlgorithm: in.EncryptionAlgorithm}, nil
}

func (s *Server) reencrypt(in input) (*output, error) {
	from, plain, err := s.unseal(in.SourceKeyId, in.CiphertextBlob, in.SourceEncryptionContext)
	if err != nil {
		return nil, err
	}
	to, err := s.find(in.DestinationKeyId)
	if err != nil {
		return nil, err
	}
	return &output{KeyId: to.arn, SourceKeyId: from.arn, CiphertextBlob: to.seal(plain, in.DestinationEncryptionContext)}, nil
}

// A blob is: 1, the key's ID, the number of the material, the nonce, the
// ciphertext. All of it is authenticated.
const blobHeader = 1 + 16 + 2

func (k *key) seal(plain []byte, context map[string]string) []byte {
	n := len(k.material) - 1
	blob := append([]byte{1}, k.id[:]...)
	blob = binary.BigEndian.AppendUint16(blob, uint16(n))
	nonce := random(12)
	sealed := k.material[n].Seal(nil, nonce, plain, append(slices.Clone(blob), canonical(context)...))
	return append(append(blob, nonce...), sealed...)
}

// unseal opens a blob as Decrypt does: the blob says which key made it, and
// the key that the caller names must be that one.
func (s *Server) unseal(name string, blob []byte, context map[string]string) (*key, []byte, error) {
	if n := len(blob); n == 0 || n > 6144 {
		return nil, nil, &Error{http.StatusBadRequest, "ValidationException", "Value at 'ciphertextBlob' failed to satisfy constraint: Member must have length between 1 and 6144"}
	}
	invalid := &Error{http.StatusBadRequest, "InvalidCiphertextException", ""}
	if len(blob) < blobHeader+12+16 || blob[0] != 1 {
		return nil, nil, invalid
	}
	var made *key
	for _, k := range s.keys {
		if k.id == [16]byte(blob[1:17]) {
			made = k
		}
	}
	if made == nil {
		return nil, nil, invalid
	}
	if name != "" {
		k, err := s.find(name)
		if err != nil {
			return nil, nil, err
		}
		if k != made {
			return nil, nil, &Error{http.StatusBadRequest, "IncorrectKeyException", "The key ID in the request does not identify a CMK that can perform this operation."}
		}
	}
	if _, err := s.find(made.arn); err != nil {
		return nil, nil, err
	}
	n := Material(blob)
	if n >= len(made.material) {
		return nil, nil, invalid
	}
	plain, err := made.material[n].Open(nil, blob[blobHeader:blobHeader+12], blob[blobHeader+12:], append(slices.Clone(blob[:blobHeader]), canonical(context)...))
	if err != nil {
		return nil, nil, invalid
	}
	return made, plain, nil
}

func canonical(context map[string]string) []byte {
	var b []byte
	for _, name := range slices.Sorted(maps.Keys(context)) {
		b = fmt.Appendf(b, "%d:%s=%d:%s;", len(name), name, len(context[name]), context[name])
	}
	return b
}
