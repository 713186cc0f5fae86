package custodian

import (
	"context"
	"io"
)

// A Store keeps records. Its transactions are serializable, and durable once
// Update has returned nil. It keeps bodies and MACs opaque: what they mean,
// and whether they are genuine, is decided here in custodian.
//
// Every error of a device is ErrStoreUnavailable (wrapped); ErrNotFound only
// ever means that there is no such record.
type Store interface {
	// View runs f in a read transaction on one consistent state.
	View(ctx context.Context, f func(Tx) error) error
	// Update runs f in a write transaction. f may run twice, so it has no
	// effect but through its Tx. Nothing of f is kept if it returns an error.
	// f makes no call to HSM or KMS: there is one writer.
	Update(ctx context.Context, f func(UpdateTx) error) error
	// Backup writes a consistent copy of the whole store while it runs.
	Backup(ctx context.Context, w io.Writer) error
	// Stats describes the store for status and metrics.
	Stats(ctx context.Context) (StoreStats, error)
	Close() error
}

// StoreStats describes a store.
type StoreStats struct {
	Engine      string `json:"engine"`
	Path        string `json:"path"`
	Schema      uint32 `json:"schema"`
	Bytes       int64  `json:"bytes"`
	ContentKeys uint64 `json:"content_keys"`
	Sequence    uint64 `json:"sequence"`
}

// A Tx reads one consistent state. What it returns is the caller's to keep.
type Tx interface {
	// Head returns the head record (Kind 0), ErrNotFound before init.
	Head() (ControlRecord, error)
	// InitJournal returns the journal of an unfinished init, else ErrNotFound.
	InitJournal() (InitJournal, error)
	// Control returns one control record, else ErrNotFound.
	Control(kind ControlKind, name string) (ControlRecord, error)
	// Controls calls f for every control record, by kind, then name.
	Controls(f func(ControlRecord) error) error

	// ContentKey returns the content key with that KID, else ErrNotFound.
	ContentKey(kid KID) (SealedKey, error)
	// HighestGeneration returns the content key of the highest generation for
	// the natural key (whose own Generation is ignored), else ErrNotFound.
	HighestGeneration(n NaturalKey) (SealedKey, error)
	// ContentCategory returns the category that a content item belongs to.
	ContentCategory(id ContentID) (CategoryName, error)
	// FingerprintOwner returns the KID that the key bytes are stored under.
	FingerprintOwner(f Fingerprint) (KID, error)
	// ContentKeys calls f for the content keys of a category in the order of
	// (content ID, track type, scheme, period, generation), beginning after
	// the natural key after (zero: at the first), for limit keys at most. An
	// empty content ID means all content items.
	ContentKeys(c CategoryName, id ContentID, after *NaturalKey, limit int, f func(SealedKey) error) error
	// KeysUnderKEK returns up to limit KIDs whose keys are sealed under id,
	// in order, beginning after the KID after.
	KeysUnderKEK(id KEKID, after KID, limit int) ([]KID, error)
	// Cursor returns the saved position of a background job, nil if none.
	Cursor(job string) ([]byte, error)
	// Sequence counts the updates that inserted or replaced content keys.
	Sequence() uint64
}

// An UpdateTx also writes.
type UpdateTx interface {
	Tx
	PutHead(r ControlRecord) error
	PutInitJournal(j InitJournal) error
	DeleteInitJournal() error
	PutControl(r ControlRecord) error
	DeleteControl(kind ControlKind, name string) error

	// InsertContentKey adds a content key with all its index entries. It
	// checks, in this order, and changes nothing where one fails: the content
	// item's category (ErrContentCategory), the natural key (ErrNaturalKey),
	// the KID (ErrKIDConflict), the fingerprint (ErrFingerprint).
	InsertContentKey(k SealedKey) error
	// ReplaceContentKey puts k in the place of the record with the same KID,
	// whose revision must be the given one (else ErrChanged). The natural key
	// stays as it is, and so does the fingerprint unless it is of another helper
	// key; one that a key has already is ErrFingerprint.
	ReplaceContentKey(revision uint64, k SealedKey) error
	// PutCursor saves the position of a background job; nil removes it.
	PutCursor(job string, pos []byte) error
}
