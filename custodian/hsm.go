package custodian

import (
	"context"
	"crypto"
	"time"
)

// A KeyUse says what a wrapped key may do once it is loaded. The zero use is
// nothing.
type KeyUse uint8

// UseSeal is AES-256-GCM, UseMAC AES-256-CMAC.
const (
	UseSeal KeyUse = 1
	UseMAC  KeyUse = 2
)

// An HSM is what the domain needs of a token. All its errors are, wrapped:
// ErrHSMUnavailable (try again later), ErrAuth, ErrStaleKey, ErrWrongMEK,
// ErrNoObject, or an error about the object that no retry will mend.
type HSM interface {
	// Random fills dst from the token's random source.
	Random(ctx context.Context, dst []byte) error
	// GenerateMEK makes the key that m names (Label, ID, Profile, CreateTime,
	// EndTime), or adopts the object that an earlier, interrupted call made.
	GenerateMEK(ctx context.Context, m MEK) error
	// NewMEKCanary makes what CheckMEK proves a MEK by.
	NewMEKCanary(ctx context.Context, m MEK) ([]byte, error)
	// CheckMEK verifies the attributes of the token object and its canary.
	CheckMEK(ctx context.Context, m MEK) error
	// MEKAttributes are the attributes of the token object that CheckMEK has
	// found last, by name. They hold no secret.
	MEKAttributes(ctx context.Context, m MEK) (map[string]string, error)
	// GenerateKey makes an AES-256 key in the token and returns it wrapped
	// under m, with a canary bound to identity. The key is in no variable.
	GenerateKey(ctx context.Context, m MEK, u KeyUse, identity []byte) (inner, canary []byte, err error)
	// LoadKey unwraps inner under m to a non-extractable session object and
	// checks the canary.
	LoadKey(ctx context.Context, m MEK, u KeyUse, identity, inner, canary []byte) (Key, error)
	// RewrapKey moves a wrapped key from a rotatable MEK to another one, inside
	// the token, and loads the result once before it returns. The canary stays.
	RewrapKey(ctx context.Context, from, to MEK, u KeyUse, identity, inner, canary []byte) ([]byte, error)
	// GenerateSigner makes, or adopts, a key pair.
	GenerateSigner(ctx context.Context, alg SigningAlgorithm, label string, id [16]byte) error
	// Signer returns a key pair of the token. One of ECDSA P-256 signs SHA-256
	// digests in ASN.1 DER, one of Ed25519 whole messages.
	Signer(ctx context.Context, label string, id [16]byte) (crypto.Signer, error)
	// Objects lists what lies in the token.
	Objects(ctx context.Context) ([]TokenObject, error)
	// DestroyLeftovers destroys what an interrupted init has left in the token:
	// the objects with one of the IDs, and those without ID that have one of the
	// labels ("" is an object without one, as every loaded Key is). It is called
	// only while nothing can have been used under these names. It returns how
	// many objects there were.
	DestroyLeftovers(ctx context.Context, labels []string, ids [][16]byte) (int, error)
	// DestroyMEK destroys the token object of m, for good. One that is not there
	// is destroyed already.
	DestroyMEK(ctx context.Context, m MEK) error
	// Health makes one real operation.
	Health(ctx context.Context) error
	// Status describes the token.
	Status() HSMStatus
}

// A Key is loaded in the token. It is safe for concurrent use.
type Key interface {
	// Seal encrypts and opens again before it returns. The ciphertext carries
	// its 128-bit tag; the IV is 96 random bits of the token.
	Seal(ctx context.Context, aad, plaintext []byte) (iv [12]byte, sealed []byte, err error)
	// Open decrypts into dst, which must have room for len(sealed) bytes, and
	// returns the length of the plaintext: one token operation.
	Open(ctx context.Context, iv [12]byte, aad, sealed, dst []byte) (int, error)
	// Reseal opens sealed keys and seals them under another key of this HSM,
	// without showing what is in them: three token operations for each. n are
	// changed, the first ones. ErrAuth is about the one after those; with
	// another error none is changed.
	Reseal(ctx context.Context, to Key, keys []Resealing) (n int, err error)
	// CMAC is AES-CMAC (SP 800-38B).
	CMAC(ctx context.Context, msg []byte) ([16]byte, error)
	// Release gives the handle back, after the calls under way have ended.
	Release()
}

// A Resealing is a sealed key that goes to another key: what Seal returned, and
// afterwards what it is under the other one.
type Resealing struct {
	IV     [12]byte
	AAD    []byte
	Sealed []byte
	// To is the associated data under the other key.
	To []byte
}

// A TokenObject is an object that the token shows us.
type TokenObject struct {
	Class string `json:"class"`
	Label string `json:"label"`
	ID    []byte `json:"id"`
}

// HSMStatus describes a token.
type HSMStatus struct {
	Label           string     `json:"label"`
	Serial          string     `json:"serial"`
	Model           string     `json:"model"`
	Manufacturer    string     `json:"manufacturer"`
	Profile         string     `json:"profile"`
	Epoch           uint64     `json:"epoch"`
	DefaultMEK      MEKProfile `json:"default_mek_profile"`
	EnforcesTrusted bool       `json:"enforces_wrap_with_trusted"`
	SessionsInUse   int        `json:"sessions_in_use"`
	SessionsMax     int        `json:"sessions_max"`
	Abandoned       int        `json:"abandoned_calls"`
	Away            bool       `json:"-"` // there is no connection; it is tried again
}

// A Provider is one configured KMS: the outer wrap. Its errors are, wrapped,
// the ErrProvider… sentinels and nothing else. It binds context, so that a
// blob moved to another record does not open.
type Provider interface {
	// Name is the instance's name in the configuration.
	Name() string
	// Wrap puts the provider's layer around blob. It returns none that opens
	// under another context; that it opens under its own, the caller proves.
	Wrap(ctx context.Context, blob, context []byte) (OuterWrap, error)
	// Unwrap takes the layer off. w must be of this provider.
	Unwrap(ctx context.Context, w OuterWrap, context []byte) ([]byte, error)
	// Status describes the provider for custodianctl status, from what past
	// calls have shown; it makes no call.
	Status() ProviderStatus
	Close() error
}

// A Rewrapper can move its layer to its newest key version by itself. What it
// returns is as a Wrap's.
type Rewrapper interface {
	Rewrap(ctx context.Context, w OuterWrap, context []byte) (OuterWrap, error)
}

// ProviderStatus describes a provider.
type ProviderStatus struct {
	Name        string    `json:"name"`
	Kind        string    `json:"kind"` // local, vault, aws, gcp
	KeyRef      string    `json:"key_ref,omitempty"`
	OuterLayer  bool      `json:"outer_layer"` // false: no second party; local only
	Reachable   bool      `json:"reachable"`
	LastContact time.Time `json:"last_contact,omitzero"`
	LastError   string    `json:"last_error,omitempty"`
	Calls       uint64    `json:"calls"`
	Failures    uint64    `json:"failures"`
	// NextRenewal is when the login is renewed, LoginEnd when it ends. Zero:
	// there is none yet, or it has no end.
	NextRenewal time.Time `json:"next_renewal,omitzero"`
	LoginEnd    time.Time `json:"login_end,omitzero"`

	// The domain adds what follows from all calls so far.

	AwaySince    time.Time     `json:"away_since,omitzero"`     // no answer since
	GraceLeft    time.Duration `json:"grace_left"`              // for loaded keys, if it goes or stays away
	Refused      string        `json:"refused,omitempty"`       // why there is no grace: access was taken away
	LoginRefused string        `json:"login_refused,omitempty"` // our login, so that nothing is known of the access
	// KeyVersions of which it holds a wrap, those of the helper keys included,
	// and those that nobody else holds one of.
	KeyVersions     int       `json:"key_versions"`
	SoleKeyVersions int       `json:"sole_key_versions"`
	Incident        time.Time `json:"incident,omitzero"` // declared, and still open
	Incidents       uint64    `json:"incidents"`         // since the start
	// CallsByReason counts what was asked of the provider, and how it ended.
	CallsByReason []CallCount `json:"calls_by_reason"`
}
