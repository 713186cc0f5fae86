package audit

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"strings"
	"time"
	"unicode/utf8"
)

// An Outcome says how an event ended. The zero Outcome is not valid.
type Outcome uint8

const (
	Allowed Outcome = 1 // it was decided to do it
	Denied  Outcome = 2 // a rule said no
	Failed  Outcome = 3 // it was allowed but did not work
	Begun   Outcome = 4 // it was decided to do it, and an entry with the end follows
)

func (o Outcome) String() string {
	switch o {
	case Allowed:
		return "allowed"
	case Denied:
		return "denied"
	case Failed:
		return "failed"
	case Begun:
		return "begun"
	}
	return fmt.Sprintf("outcome(%d)", uint8(o))
}

// A Ref stands for something that the log must not name, such as a viewer's
// session: a MAC of it under a key that is kept elsewhere. Who has the key and
// the name finds the entry, nobody else can enumerate names.
type Ref struct {
	Kind       string // what the MAC is of, for example "session"; up to 64 bytes
	KeyVersion uint32 // the version of the MAC's key
	MAC        [16]byte
}

// An Entry is one event. It never holds key material, nor personal data in
// clear. Strings are valid UTF-8 without zero bytes, of up to 4096 bytes; a
// field with its zero value is absent.
type Entry struct {
	Index uint64   // place in the log, from 0; given by Append
	Salt  [16]byte // random, so that a leaf hash tells nothing; given by Append

	Time      time.Time // UTC, to the nanosecond; Append sets it where it is zero
	Action    string    // what was asked for, for example "release"; required
	Outcome   Outcome   // required
	Reason    string    // why not, as ErrorInfo.reason has it
	Caller    string    // identity of who asked
	Role      string    // the role in which it was asked
	RequestID string

	Category   string
	ContentID  []byte // up to 500 bytes
	TrackType  string
	Scheme     string
	HasPeriod  bool
	Period     uint32 // the crypto period's index, where HasPeriod
	Generation uint32
	KID        []byte // absent, or 16 bytes
	KeyVersion string // the version that was really used, for example "movies/4"

	ControlRevision uint64
	ControlDigest   []byte // absent, or 32 bytes; set where the control set changed
	StoreSequence   uint64 // the store's write sequence after the event

	Count  uint64 // above 1: the entry stands for that many like it
	Detail string // of administrative actions
	Refs   []Ref  // up to 16

	HasAttempt bool
	Attempt    uint64 // where HasAttempt, the index of the entry that says that this begins

	// Priority lets an entry use the room that is kept back, as entries with
	// the outcome Allowed do anyway, and a denial with it is always written.
	// It is not part of the log.
	Priority bool

	// later holds fields that a later version may add without breaking this
	// one, as they were read.
	later []byte
}

// ErrInvalidEntry is returned by Append and the Marshal functions for an entry
// that breaks a rule of Entry.
var ErrInvalidEntry = errors.New("invalid audit entry")

const (
	entryVersion = 1
	entryPrefix  = 1 + 8 + 16 // version, index, salt

	maxString    = 4096
	maxContentID = 500 // below a disk sector, see the package doc
	maxRefKind   = 64
	maxRefs      = 16
	maxEntry     = 64 << 10
)

// The tags of the fields, in the order in which they are encoded. A number is
// never used again for something else. Tags from 1 to 127 are critical: who
// does not know one cannot read the entry. Others can be passed over.
const (
	tagTime = 1 + iota
	tagAction
	tagOutcome
	tagReason
	tagCaller
	tagRole
	tagRequestID
	tagCategory
	tagContentID
	tagTrackType
	tagScheme
	tagPeriod
	tagGeneration
	tagKID
	tagKeyVersion
	tagControlRevision
	tagControlDigest
	tagStoreSequence
	tagCount
	tagDetail
	tagRef
	tagAttempt

	tagLater = 128
)

// MarshalBinary returns the canonical encoding, whose RFC 6962 leaf hash is
// the entry's place in the tree:
//
//	version (1) · index (8) · salt (16) · fields
//
// A field is a tag (1), a length (uvarint) and a value. Tags increase; only
// the one of a Ref may repeat. Numbers are big-endian without leading zeros,
// the time is seconds since 1970 (8) and nanoseconds (4).
func (e *Entry) MarshalBinary() ([]byte, error) { return e.AppendBinary(nil) }

// AppendBinary appends what MarshalBinary returns.
func (e *Entry) AppendBinary(b []byte) ([]byte, error) {
	if err := e.check(); err != nil {
		return nil, err
	}
	return e.encode(b), nil
}

// check reports the first rule of Entry that e breaks. It leaves Time alone,
// which encode can always represent once it is within four-digit years.
func (e *Entry) check() error {
	if e.Action == "" {
		return fmt.Errorf("action is empty: %w", ErrInvalidEntry)
	}
	if e.Outcome < Allowed || e.Outcome > Begun {
		return fmt.Errorf("outcome is %d: %w", uint8(e.Outcome), ErrInvalidEntry)
	}
	if y := e.Time.UTC().Year(); y < 1 || y > 9999 {
		return fmt.Errorf("time is in the year %d: %w", y, ErrInvalidEntry)
	}
	for _, f := range [...]struct{ name, value string }{
		{"action", e.Action}, {"reason", e.Reason}, {"caller", e.Caller}, {"role", e.Role},
		{"request ID", e.RequestID}, {"category", e.Category}, {"track type", e.TrackType},
		{"scheme", e.Scheme}, {"key version", e.KeyVersion}, {"detail", e.Detail},
	} {
		if err := checkString(f.name, f.value, maxString); err != nil {
			return err
		}
	}
	if n := len(e.ContentID); n > maxContentID {
		return fmt.Errorf("content ID has %d bytes, the limit is %d: %w", n, maxContentID, ErrInvalidEntry)
	}
	if n := len(e.KID); n != 0 && n != 16 {
		return fmt.Errorf("KID has %d bytes, not 16: %w", n, ErrInvalidEntry)
	}
	if n := len(e.ControlDigest); n != 0 && n != 32 {
		return fmt.Errorf("control digest has %d bytes, not 32: %w", n, ErrInvalidEntry)
	}
	if e.Period != 0 && !e.HasPeriod {
		return fmt.Errorf("period is %d, but there is none: %w", e.Period, ErrInvalidEntry)
	}
	if e.HasAttempt && e.Outcome == Begun || !e.HasAttempt && e.Attempt != 0 {
		return fmt.Errorf("outcome %s with attempt %d: %w", e.Outcome, e.Attempt, ErrInvalidEntry)
	}
	if n := len(e.Refs); n > maxRefs {
		return fmt.Errorf("%d references, the limit is %d: %w", n, maxRefs, ErrInvalidEntry)
	}
	for i := range e.Refs {
		if err := checkString("kind of reference", e.Refs[i].Kind, maxRefKind); err != nil {
			return err
		}
	}
	return nil
}

func checkString(name, s string, limit int) error {
	if len(s) > limit {
		return fmt.Errorf("%s has %d bytes, the limit is %d: %w", name, len(s), limit, ErrInvalidEntry)
	}
	if !utf8.ValidString(s) {
		return fmt.Errorf("%s is not UTF-8: %w", name, ErrInvalidEntry)
	}
	if strings.IndexByte(s, 0) >= 0 {
		return fmt.Errorf("%s contains a zero byte: %w", name, ErrInvalidEntry)
	}
	return nil
}

// encode appends the encoding of e, which check has accepted.
func (e *Entry) encode(b []byte) []byte {
	b = append(b, entryVersion)
	b = binary.BigEndian.AppendUint64(b, e.Index)
	b = append(b, e.Salt[:]...)

	b = append(b, tagTime, 12)
	b = binary.BigEndian.AppendUint64(b, uint64(e.Time.Unix()))
	b = binary.BigEndian.AppendUint32(b, uint32(e.Time.Nanosecond()))
	b = appendField(b, tagAction, e.Action)
	b = append(b, tagOutcome, 1, byte(e.Outcome))
	b = appendField(b, tagReason, e.Reason)
	b = appendField(b, tagCaller, e.Caller)
	b = appendField(b, tagRole, e.Role)
	b = appendField(b, tagRequestID, e.RequestID)
	b = appendField(b, tagCategory, e.Category)
	b = appendField(b, tagContentID, e.ContentID)
	b = appendField(b, tagTrackType, e.TrackType)
	b = appendField(b, tagScheme, e.Scheme)
	if e.HasPeriod {
		b = appendNumber(b, tagPeriod, uint64(e.Period))
	}
	if e.Generation != 0 {
		b = appendNumber(b, tagGeneration, uint64(e.Generation))
	}
	b = appendField(b, tagKID, e.KID)
	b = appendField(b, tagKeyVersion, e.KeyVersion)
	if e.ControlRevision != 0 {
		b = appendNumber(b, tagControlRevision, e.ControlRevision)
	}
	b = appendField(b, tagControlDigest, e.ControlDigest)
	if e.StoreSequence != 0 {
		b = appendNumber(b, tagStoreSequence, e.StoreSequence)
	}
	if e.Count != 0 {
		b = appendNumber(b, tagCount, e.Count)
	}
	b = appendField(b, tagDetail, e.Detail)
	for i := range e.Refs {
		r := &e.Refs[i]
		b = append(b, tagRef, byte(4+16+len(r.Kind)))
		b = binary.BigEndian.AppendUint32(b, r.KeyVersion)
		b = append(b, r.MAC[:]...)
		b = append(b, r.Kind...)
	}
	if e.HasAttempt {
		b = appendNumber(b, tagAttempt, e.Attempt)
	}
	return append(b, e.later...)
}

func appendField[T string | []byte](b []byte, tag byte, value T) []byte {
	if len(value) == 0 {
		return b
	}
	b = append(b, tag)
	b = binary.AppendUvarint(b, uint64(len(value)))
	return append(b, value...)
}

func appendNumber(b []byte, tag byte, v uint64) []byte {
	n := (bits.Len64(v) + 7) / 8
	b = append(b, tag, byte(n))
	for i := n - 1; i >= 0; i-- {
		b = append(b, byte(v>>(8*i)))
	}
	return b
}

// UnmarshalEntry reads one canonical encoding. It accepts exactly what
// MarshalBinary can return, and in addition fields with tags from 128, which
// it keeps as they are. The entry does not refer to b.
func UnmarshalEntry(b []byte) (Entry, error) {
	if len(b) > maxEntry {
		return Entry{}, fmt.Errorf("decode audit entry: %d bytes, the limit is %d", len(b), maxEntry)
	}
	if len(b) < entryPrefix {
		return Entry{}, fmt.Errorf("decode audit entry: %d bytes are too few", len(b))
	}
	if b[0] != entryVersion {
		return Entry{}, fmt.Errorf("decode audit entry: version is %d, not %d", b[0], entryVersion)
	}
	d := decoder{own: bytes.Clone(b)}
	d.text = string(d.own)
	d.entry.Index = binary.BigEndian.Uint64(b[1:])
	copy(d.entry.Salt[:], b[9:])
	if err := d.fields(); err != nil {
		return Entry{}, fmt.Errorf("decode audit entry %d: %w", d.entry.Index, err)
	}
	return d.entry, nil
}

// A decoder reads the fields of one entry. Its entry's strings and bytes are
// parts of text and own, so that an entry costs two allocations.
type decoder struct {
	own   []byte
	text  string
	entry Entry
	timed bool // the field of the time was there
}

func (d *decoder) fields() error {
	last := 0
	for at := entryPrefix; at < len(d.own); {
		start := at
		tag := int(d.own[at])
		size, n := binary.Uvarint(d.own[at+1:])
		if n <= 0 || n != (bits.Len64(size|1)+6)/7 {
			return fmt.Errorf("field %d: malformed length", tag)
		}
		at += 1 + n
		if size > uint64(len(d.own)-at) {
			return fmt.Errorf("field %d: longer than the entry", tag)
		}
		if tag < last || tag == last && tag != tagRef {
			return fmt.Errorf("field %d: follows field %d", tag, last)
		}
		last = tag
		end := at + int(size)
		if tag >= tagLater {
			if d.entry.later == nil {
				d.entry.later = d.own[start:]
			}
			at = end
			continue
		}
		if err := d.field(tag, at, end); err != nil {
			return fmt.Errorf("field %d: %w", tag, err)
		}
		at = end
	}
	if !d.timed {
		return errors.New("has no time")
	}
	return d.entry.check()
}

// field sets the field of tag from own[at:end].
func (d *decoder) field(tag, at, end int) (err error) {
	e, value := &d.entry, d.own[at:end:end]
	if len(value) == 0 && tag != tagPeriod && tag != tagAttempt {
		return errors.New("is empty")
	}
	switch tag {
	case tagTime:
		d.timed = true
		e.Time, err = decodeTime(value)
	case tagAction:
		e.Action = d.text[at:end]
	case tagOutcome:
		if len(value) != 1 {
			return fmt.Errorf("has %d bytes, not 1", len(value))
		}
		e.Outcome = Outcome(value[0])
	case tagReason:
		e.Reason = d.text[at:end]
	case tagCaller:
		e.Caller = d.text[at:end]
	case tagRole:
		e.Role = d.text[at:end]
	case tagRequestID:
		e.RequestID = d.text[at:end]
	case tagCategory:
		e.Category = d.text[at:end]
	case tagContentID:
		e.ContentID = value
	case tagTrackType:
		e.TrackType = d.text[at:end]
	case tagScheme:
		e.Scheme = d.text[at:end]
	case tagPeriod:
		e.HasPeriod = true
		e.Period, err = decodeNumber[uint32](value, 4)
	case tagGeneration:
		e.Generation, err = decodeNumber[uint32](value, 4)
	case tagKID:
		e.KID = value
	case tagKeyVersion:
		e.KeyVersion = d.text[at:end]
	case tagControlRevision:
		e.ControlRevision, err = decodeNumber[uint64](value, 8)
	case tagControlDigest:
		e.ControlDigest = value
	case tagStoreSequence:
		e.StoreSequence, err = decodeNumber[uint64](value, 8)
	case tagCount:
		e.Count, err = decodeNumber[uint64](value, 8)
	case tagDetail:
		e.Detail = d.text[at:end]
	case tagRef:
		err = d.ref(at, end)
	case tagAttempt:
		e.HasAttempt = true
		e.Attempt, err = decodeNumber[uint64](value, 8)
	default:
		return errors.New("is not known, and may not be passed over")
	}
	return err
}

func (d *decoder) ref(at, end int) error {
	if end-at < 4+16 {
		return fmt.Errorf("has %d bytes, a reference needs 20", end-at)
	}
	r := Ref{KeyVersion: binary.BigEndian.Uint32(d.own[at:]), Kind: d.text[at+20 : end]}
	copy(r.MAC[:], d.own[at+4:])
	d.entry.Refs = append(d.entry.Refs, r)
	return nil
}

func decodeTime(b []byte) (time.Time, error) {
	if len(b) != 12 {
		return time.Time{}, fmt.Errorf("has %d bytes, not 12", len(b))
	}
	nanos := binary.BigEndian.Uint32(b[8:])
	if nanos >= 1e9 {
		return time.Time{}, fmt.Errorf("has %d nanoseconds", nanos)
	}
	return time.Unix(int64(binary.BigEndian.Uint64(b)), int64(nanos)).UTC(), nil
}

func decodeNumber[T uint32 | uint64](b []byte, limit int) (T, error) {
	if len(b) > limit {
		return 0, fmt.Errorf("has %d bytes, the limit is %d", len(b), limit)
	}
	if len(b) > 0 && b[0] == 0 {
		return 0, errors.New("begins with a zero")
	}
	var v T
	for _, c := range b {
		v = v<<8 | T(c)
	}
	return v, nil
}
