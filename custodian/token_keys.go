package custodian

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync/atomic"

	jose "github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/json"
)

// maxTokenKeys of one issuer.
const maxTokenKeys = 64

// TokenKeys are the public keys that an issuer signs licence tokens with now.
// Whoever fetches them replaces them as a whole; until the first Set there are
// none, and tokens of the issuer cannot be judged.
type TokenKeys struct {
	keys   atomic.Pointer[map[string]tokenKey] // by key ID
	wanted chan struct{}
}

// A tokenKey is a key and the one algorithm that it may verify.
type tokenKey struct {
	algorithm jose.SignatureAlgorithm
	key       crypto.PublicKey
}

// NewTokenKeys makes an empty set.
func NewTokenKeys() *TokenKeys { return &TokenKeys{wanted: make(chan struct{}, 1)} }

// Wanted says that a token named a key that is not in the set: it may be newer.
func (k *TokenKeys) Wanted() <-chan struct{} { return k.wanted }

// Set replaces the keys by those of a JWK set (RFC 7517): P-256 for ES256 and
// Ed25519 for EdDSA, each with a key ID of its own. Keys of other kinds, and
// those that are not for signatures, are left out. A set that has none left, a
// key ID twice, or private keys is refused, and the keys stay as they were.
func (k *TokenKeys) Set(jwks []byte) (ids []string, err error) {
	var set jose.JSONWebKeySet
	if err := json.Unmarshal(jwks, &set); err != nil {
		return nil, fmt.Errorf("JWK set: %w", err)
	}
	if len(set.Keys) > maxTokenKeys {
		return nil, fmt.Errorf("JWK set: %d keys: must be at most %d", len(set.Keys), maxTokenKeys)
	}
	keys := map[string]tokenKey{}
	for i, jwk := range set.Keys {
		if jwk.Key == nil {
			continue // of a kind that the library does not know
		}
		if !jwk.IsPublic() {
			return nil, fmt.Errorf("JWK set: keys[%d]: it is no public key; whoever can read the set could sign tokens", i)
		}
		key, ok := signingKey(jwk)
		if !ok {
			continue
		}
		if jwk.KeyID == "" {
			return nil, fmt.Errorf("JWK set: keys[%d]: it has no kid", i)
		}
		if _, twice := keys[jwk.KeyID]; twice {
			return nil, fmt.Errorf("JWK set: keys[%d]: kid %.80q is there twice", i, jwk.KeyID)
		}
		keys[jwk.KeyID] = key
	}
	if len(keys) == 0 {
		return nil, errors.New("JWK set: no key for ES256 or EdDSA in it")
	}
	k.keys.Store(&keys)
	return slices.Sorted(maps.Keys(keys)), nil
}

func signingKey(jwk jose.JSONWebKey) (tokenKey, bool) {
	if jwk.Use != "" && jwk.Use != "sig" {
		return tokenKey{}, false
	}
	var key tokenKey
	switch pub := jwk.Key.(type) {
	case *ecdsa.PublicKey:
		if pub.Curve != elliptic.P256() {
			return tokenKey{}, false
		}
		key = tokenKey{jose.ES256, pub}
	case ed25519.PublicKey:
		key = tokenKey{jose.EdDSA, pub}
	default:
		return tokenKey{}, false
	}
	return key, jwk.Algorithm == "" || jwk.Algorithm == string(key.algorithm)
}

// Loaded reports whether there are keys.
func (k *TokenKeys) Loaded() bool { return k.keys.Load() != nil }

// Knows reports whether there is a key with an ID.
func (k *TokenKeys) Knows(id string) bool {
	keys := k.keys.Load()
	if keys == nil {
		return false
	}
	_, ok := (*keys)[id]
	return ok
}

// find is the key with an ID.
func (k *TokenKeys) find(id string) (tokenKey, error) {
	keys := k.keys.Load()
	if keys == nil {
		return tokenKey{}, ErrTokenKeys
	}
	key, ok := (*keys)[id]
	if !ok {
		select {
		case k.wanted <- struct{}{}:
		default: // it is known already
		}
		return tokenKey{}, fmt.Errorf("its issuer has no key %.80q: %w", id, ErrTokenInvalid)
	}
	return key, nil
}
