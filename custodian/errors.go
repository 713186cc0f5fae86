package custodian

import (
	"errors"
	"fmt"
)

// A Reason is the stable name of a refusal: ErrorInfo.reason on the wire and
// the reason in the audit log. internal/rpc/status.go maps it to a status.
type Reason string

// A refusal is a sentinel error that carries its reason.
type refusal struct {
	reason Reason
	text   string
}

func (r *refusal) Error() string { return r.text }

// The refusals that a caller can hear, in the order of the error table in
// docs/DESIGN.md.
var (
	ErrKeyNotFound      error = &refusal{"KEY_NOT_FOUND", "no such content key"}
	ErrCategoryNotFound error = &refusal{"CATEGORY_NOT_FOUND", "no such category"}
	ErrDenied           error = &refusal{"DENIED", "not granted"}
	ErrCallerFrozen     error = &refusal{"CALLER_FROZEN", "the caller is frozen; the officers can say why"}
	ErrTokenMissing     error = &refusal{"TOKEN_MISSING", "a licence token is needed"}
	ErrTokenInvalid     error = &refusal{"TOKEN_INVALID", "the licence token is not accepted"}
	ErrTokenExpired     error = &refusal{"TOKEN_EXPIRED", "the licence token is not valid at this time"}
	ErrTokenMismatch    error = &refusal{"TOKEN_MISMATCH", "the licence token is for something or somebody else"}
	ErrTokenReplayed    error = &refusal{"TOKEN_REPLAYED", "the licence token was used already"}
	ErrTokenRevoked     error = &refusal{"TOKEN_REVOKED", "the session, or the issuer of the licence token, is revoked"}
	ErrTokenKeys        error = &refusal{"TOKEN_KEYS_UNAVAILABLE", "the keys of the licence token's issuer are not loaded"}
	ErrKeyState         error = &refusal{"KEY_STATE", "the key's state does not permit this"}
	ErrKeyCompromised   error = &refusal{"KEY_COMPROMISED", "the key is compromised and no decision to go on serving it is recorded"}
	ErrCategoryFrozen   error = &refusal{"CATEGORY_FROZEN", "the category is frozen"}
	ErrSealingRequired  error = &refusal{"SEALING_REQUIRED", "keys of this category leave only sealed to a recipient key, and none is pinned for the caller"}
	ErrMEKExpired       error = &refusal{"MEK_EXPIRED", "the MEK is past its cryptoperiod; rotate it"}
	ErrKEKExhausted     error = &refusal{"KEK_EXHAUSTED", "the KEK has reached its limit of GCM invocations; rotate it"}
	ErrRotationState    error = &refusal{"ROTATION_STATE", "rotations do not permit this now; custodianctl rotation list shows how far they are"}
	ErrKeyDestroyed     error = &refusal{"KEY_DESTROYED", "the key is destroyed"}
	ErrKIDConflict      error = &refusal{"KID_CONFLICT", "the KID is stored for other content"}
	ErrKeyConflict      error = &refusal{"KEY_CONFLICT", "the key, or what it is for, is in use otherwise"}
	ErrContentCategory  error = &refusal{"CONTENT_CATEGORY", "the content item belongs to another category"}
	ErrCategoryExists   error = &refusal{"CATEGORY_EXISTS", "the category exists"}
	ErrInvalid          error = &refusal{"INVALID", "malformed request"}
	ErrRate             error = &refusal{"RATE", "too many calls"}
	ErrKIDBudget        error = &refusal{"KID_BUDGET", "the caller's budget of different keys is spent"}
	ErrKMSUnavailable   error = &refusal{"KMS_UNAVAILABLE", "the KMS is out of reach"}
	ErrHSMUnavailable   error = &refusal{"HSM_UNAVAILABLE", "the HSM is out of reach"}
	ErrStoreUnavailable error = &refusal{"STORE_UNAVAILABLE", "the store is out of reach"}
	ErrAuditBlocked     error = &refusal{"AUDIT_BLOCKED", "the audit log cannot be written"}
	ErrRecordCorrupt    error = &refusal{"RECORD_CORRUPT", "the record fails authentication"}
	ErrDeadline         error = &refusal{"DEADLINE", "the deadline has passed"}
	ErrStarting         error = &refusal{"STARTING", "the daemon is starting"}
	ErrUninitialised    error = &refusal{"UNINITIALISED", "the daemon is not initialised; run custodiand init"}
	ErrSealed           error = &refusal{"SEALED", "the daemon is sealed"}
	ErrQuorum           error = &refusal{"QUORUM", "it needs the officers' quorum"}
	ErrApproval         error = &refusal{"APPROVAL", "the approval does not count"}
	ErrPlan             error = &refusal{"PLAN", "the plan cannot be carried out as things are"}
	ErrCeremonyState    error = &refusal{"CEREMONY_STATE", "the ceremony's state does not permit this"}
	ErrCeremonyNotFound error = &refusal{"CEREMONY_NOT_FOUND", "no such ceremony"}
	ErrClock            error = &refusal{"CLOCK_SUSPECT", "the clock disagrees with the highest time seen; nothing is issued until it is confirmed"}
)

// ReasonOf is the reason of the first refusal in err's tree, "" for nil, and
// INTERNAL for an error that nobody classified.
func ReasonOf(err error) Reason {
	if err == nil {
		return ""
	}
	var r *refusal
	if errors.As(err, &r) {
		return r.reason
	}
	return "INTERNAL"
}

// An InvalidError names the field of a request that is malformed. It matches
// ErrInvalid.
type InvalidError struct {
	Field string // path in the request, "keys[3].kid"
	Err   error

	judged bool // an audit entry of this package says that the call ended with it
}

func (e *InvalidError) Error() string   { return e.Field + ": " + e.Err.Error() }
func (e *InvalidError) Unwrap() []error { return []error{ErrInvalid, e.Err} }

func invalid(field string, err error) error { return &InvalidError{Field: field, Err: err} }

// Errors of a Provider. Everything a KMS can answer falls into one of them.
var (
	// ErrProviderUnavailable: no answer, or the KMS says that it is out of
	// order or sealed. The blob may be fine; try again later.
	ErrProviderUnavailable = errors.New("kms unavailable")
	// ErrProviderLogin: the KMS refuses our login, so nothing is known of our
	// access to the key. It is an outage, and matches ErrProviderUnavailable.
	ErrProviderLogin = fmt.Errorf("kms refuses our login: %w", ErrProviderUnavailable)
	// ErrProviderThrottled: the KMS asks to be called less often.
	ErrProviderThrottled = errors.New("kms throttles us")
	// ErrProviderDenied: a fresh login was good and the KMS still says no.
	ErrProviderDenied = errors.New("kms denies access to the key")
	// ErrProviderDisabled: the KMS key is disabled, deleted or about to be.
	ErrProviderDisabled = errors.New("kms key is disabled")
	// ErrProviderBlob: the KMS answers about this very blob that it is not one
	// it made under this key and context.
	ErrProviderBlob = errors.New("kms refuses the blob")
)

// Errors of an HSM beside ErrHSMUnavailable.
var (
	// ErrAuth: the blob, ciphertext or tag does not belong to the key, and the
	// token itself is proved to work.
	ErrAuth = errors.New("authentication failed")
	// ErrStaleKey: the handle is of an earlier connection to the token; load
	// the key again.
	ErrStaleKey = errors.New("key handle is stale")
	// ErrWrongMEK: the token answers with a key that is not the recorded one.
	ErrWrongMEK = errors.New("the token holds another key than the one recorded")
	// ErrNoObject: the token has no such object.
	ErrNoObject = errors.New("no such object in the token")
)

// Errors of a Store beside ErrStoreUnavailable and the conflicts above.
var (
	// ErrNotFound: no record with that key. It never means that a device
	// failed.
	ErrNotFound = errors.New("no such record")
	// ErrChanged: the record, or the head, is not the revision that the
	// update was made for; read again and redo.
	ErrChanged = errors.New("the record changed meanwhile")
	// ErrNaturalKey: another content key has that natural key.
	ErrNaturalKey = errors.New("the natural key has a content key")
	// ErrFingerprint: the same key bytes are stored under another natural key.
	ErrFingerprint = errors.New("the key bytes are in use for other content")
)
