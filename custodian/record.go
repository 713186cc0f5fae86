package custodian

import "time"

// A MEKProfile says what a MEK's unwrap template allows.
type MEKProfile string

// Sealed forbids extractable objects: a MEK rotation makes new KEKs and
// re-wraps the CEKs. Rotatable allows KEKs to be re-wrapped inside the token.
const (
	ProfileSealed    MEKProfile = "sealed"
	ProfileRotatable MEKProfile = "rotatable"
)

// A MEK is one version of the root key. The key itself is a token object that
// never leaves the token.
type MEK struct {
	Version     uint32 // from 1
	Label       string // CKA_LABEL, PREFIX-vN
	ID          [16]byte
	Profile     MEKProfile
	State       State
	CreateTime  time.Time
	EndTime     time.Time // of the originator-usage period: one year
	Canary      []byte    // proves that the token holds this very key
	TokenSerial string
	Revision    uint64
}

// An OuterWrap is one KMS layer around a blob that the HSM has wrapped.
type OuterWrap struct {
	Provider string // provider instance, as the configuration names it
	KeyRef   string // the provider's own reference: key name, ARN, resource name
	Blob     []byte
}

// A Wrapped key rests inside the token's own wrap under a MEK, and around it
// one or more outer wraps of the same inner blob: any one of them, with the
// HSM, opens it.
type Wrapped struct {
	MEKVersion uint32
	Outer      []OuterWrap
	Canary     []byte // made by the key itself, opened after each unwrap
}

// A KEK is one version of a category's key-encryption key.
type KEK struct {
	ID         KEKID
	State      State
	CreateTime time.Time
	// DeactivateTime is zero while the version is active.
	DeactivateTime time.Time
	Wrapped        Wrapped
	// Reserved counts GCM invocations that were reserved, used or not. It is
	// written before they are used, so a crash can only over-count.
	Reserved uint64
	Revision uint64
}

// A HelperPurpose is what a symmetric helper key is for.
type HelperPurpose string

// The helper keys; DESIGN.md section 1.
const (
	HelperRecord      HelperPurpose = "record"
	HelperFingerprint HelperPurpose = "fingerprint"
	HelperPseudonym   HelperPurpose = "pseudonym"
)

// HelperPurposes are all of them, in the order in which they are made.
var HelperPurposes = []HelperPurpose{HelperRecord, HelperFingerprint, HelperPseudonym}

// A Helper is one version of a helper key (AES-256, used with AES-CMAC).
type Helper struct {
	Purpose    HelperPurpose
	Version    uint32
	State      State
	CreateTime time.Time
	Wrapped    Wrapped
	Revision   uint64
}

// A SigningAlgorithm is what a signing key pair is for. The zero algorithm makes
// none.
type SigningAlgorithm string

const (
	SignECDSAP256 SigningAlgorithm = "ecdsa-p256" // FIPS 186-5, with SHA-256
	SignEd25519   SigningAlgorithm = "ed25519"    // RFC 8032
)

// A Signer is a signing key pair in the token.
type Signer struct {
	Purpose    string // "audit"
	Version    uint32
	Label      string
	ID         [16]byte
	PublicKey  []byte // PKIX DER
	State      State
	CreateTime time.Time
	Revision   uint64
}

// A CategoryMode restricts a whole category. The zero mode serves nothing.
type CategoryMode uint8

// Open is normal service; Frozen releases and issues nothing. NoNew makes no new
// content key, and serves those that exist. RekeyRequired releases the content
// keys that exist, and issues them to nobody before their content is re-keyed;
// new content is issued as ever.
const (
	CategoryOpen          CategoryMode = 1
	CategoryFrozen        CategoryMode = 2
	CategoryNoNew         CategoryMode = 3
	CategoryRekeyRequired CategoryMode = 4
)

func (m CategoryMode) String() string {
	switch m {
	case CategoryOpen:
		return "OPEN"
	case CategoryFrozen:
		return "FROZEN"
	case CategoryNoNew:
		return "NO_NEW"
	case CategoryRekeyRequired:
		return "REKEY_REQUIRED"
	}
	return "UNSPECIFIED"
}

// MarshalText writes the mode's name.
func (m CategoryMode) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// A Category has one line of KEKs and one set of providers.
type Category struct {
	Name       CategoryName
	Mode       CategoryMode
	ActiveKEK  uint32 // the version that protects
	Providers  []string
	CreateTime time.Time
	// ReissueWindow is how long after its creation a key is handed out again
	// to a packager that asks for it. Live categories have no end.
	ReissueWindow time.Duration
	Live          bool
	Revision      uint64
}

// An Exception is the recorded state of a content key that is not plain
// ACTIVE.
type Exception struct {
	KID      KID
	State    State
	Decided  bool // officers decided to go on processing
	Time     time.Time
	Cause    string
	Revision uint64
}

// A Head closes the control set: every record but the plain ACTIVE content
// keys. It is updated in the transaction that changes any of them, and its
// revision and digest are written to the audit log.
type Head struct {
	StoreID    [16]byte
	Revision   uint64 // from 1
	Digest     [32]byte
	Previous   [32]byte  // digest before the last change
	Pending    [32]byte  // SHA-256 of the audit entry of the last change
	HighestNow time.Time // the highest time ever seen
}

// An Origin says where a content key came from.
type Origin uint8

// Generated in the token, or imported from a studio.
const (
	OriginGenerated Origin = 1
	OriginImported  Origin = 2
)

func (o Origin) String() string {
	switch o {
	case OriginGenerated:
		return "GENERATED"
	case OriginImported:
		return "IMPORTED"
	}
	return "UNSPECIFIED"
}

// MarshalText writes the origin's name.
func (o Origin) MarshalText() ([]byte, error) { return []byte(o.String()), nil }

// A Fingerprint is an AES-CMAC of the key bytes under the fingerprint helper:
// equal keys have equal fingerprints, and nobody without the token can test a
// guess.
type Fingerprint struct {
	Version uint32 // of the helper key
	MAC     [16]byte
}

// A ContentKey is everything known of a CEK but its bytes. All of it is
// covered by the associated data of the sealed CEK.
type ContentKey struct {
	NaturalKey
	KID         KID
	IV          []byte // explicitIV, 16 bytes; empty where the scheme has none
	PeriodStart time.Time
	PeriodEnd   time.Time
	Origin      Origin
	KEK         KEKID // wraps it now
	BirthKEK    uint32
	CreateTime  time.Time
	// PackagedTime is when it was confirmed that the content is packaged with
	// the key. Zero: it was not. From then on the key is in use, and is handed
	// out again by a reissue grant only.
	PackagedTime time.Time
	Revision     uint64
	Fingerprint  Fingerprint
}

// A SealedKey is a content key as it rests: Body is the encoding of Key and
// the associated data of Sealed, which is AES-256-GCM of the 16 key bytes
// under Key.KEK (16 bytes of ciphertext, 16 of tag).
type SealedKey struct {
	Key    ContentKey
	Body   []byte
	IV     [12]byte
	Sealed []byte
}

// A ControlKind is the kind of a control record.
type ControlKind uint8

// The control records. The head is none of them.
const (
	ControlMEK       ControlKind = 1
	ControlKEK       ControlKind = 2
	ControlHelper    ControlKind = 3
	ControlSigner    ControlKind = 4
	ControlCategory  ControlKind = 5
	ControlException ControlKind = 6
	ControlRotation  ControlKind = 8
	ControlRewrap    ControlKind = 7
)

// A ControlRecord is a record as the store keeps it: Body is an encoding that
// only this package reads, MAC an AES-CMAC over it under the record helper of
// version MACVersion.
type ControlRecord struct {
	Kind       ControlKind
	Name       string // unique within the kind: "movies", "movies/4", "record/1"
	Body       []byte
	MACVersion uint32
	MAC        [16]byte
}

// An InitJournal names the token objects that init is about to make. It is
// durable before the first of them exists, so that a crash leaves no object
// that a second run would not adopt. It is removed in the transaction that
// writes the first head.
type InitJournal struct {
	StoreID  [16]byte
	MEKLabel string
	MEKID    [16]byte
	Profile  MEKProfile
	Start    time.Time
	End      time.Time
	SignLbl  string
	SignID   [16]byte
}
