package custodian

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// Sizes and limits of the vocabulary, in bytes unless said otherwise.
const (
	KIDSize          = 16  // RFC 4122; CPIX ContentKey@kid
	CEKSize          = 16  // AES-128; ISO/IEC 23001-7
	MaxContentIDSize = 300 // what packagers are known to send
	MaxTrackTypeSize = 64
	MaxKIDsPerCall   = 64  // of GetContentKeys
	MaxKeysPerIssue  = 600 // a Shaka Packager start-up burst is 555 keys
	MaxRequestIDSize = 128
	MaxCauseSize     = 1000
)

// checkText says what is wrong with a text of the caller's, or nil. What the
// audit log would refuse is refused here, before anything is done that could
// then not be written down.
func checkText(s string, limit int) error {
	if len(s) > limit {
		return fmt.Errorf("%d bytes: must be at most %d", len(s), limit)
	}
	if !utf8.ValidString(s) || strings.ContainsRune(s, 0) {
		return errors.New("must be UTF-8 without zero bytes")
	}
	return nil
}

// A CategoryName names a content category: 1 to 64 of a-z, 0-9, '.', '_' and
// '-', beginning with a letter or digit. A category has one line of KEKs.
type CategoryName string

var categoryForm = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,63}$`)

// Check says what is wrong with the name, or nil.
func (n CategoryName) Check() error {
	if !categoryForm.MatchString(string(n)) {
		return fmt.Errorf("category %.80q: must be 1 to 64 of a-z 0-9 . _ - and begin with a letter or digit", string(n))
	}
	return nil
}

// A ContentID names one content item: 1 to 300 bytes, kept verbatim (CPIX
// contentId, Widevine content_id). A content item belongs to one category.
type ContentID []byte

// Check says what is wrong with the ID, or nil.
func (id ContentID) Check() error {
	if len(id) < 1 || len(id) > MaxContentIDSize {
		return fmt.Errorf("content ID of %d bytes: must be 1 to %d", len(id), MaxContentIDSize)
	}
	return nil
}

// A TrackType says which tracks a key is for, kept verbatim: SD, HD, UHD1,
// UHD2, AUDIO (DASH-IF), SPEKE's, or a custom label of 1 to 64 printable
// ASCII bytes.
type TrackType string

// Check says what is wrong with the track type, or nil.
func (t TrackType) Check() error {
	if len(t) < 1 || len(t) > MaxTrackTypeSize || strings.ContainsFunc(string(t), func(r rune) bool { return r <= ' ' || r > '~' }) {
		return fmt.Errorf("track type %.80q: must be 1 to %d printable ASCII characters without spaces", string(t), MaxTrackTypeSize)
	}
	return nil
}

// A Scheme is a common encryption scheme of ISO/IEC 23001-7.
type Scheme string

// The schemes that keys are issued for.
const (
	SchemeCENC Scheme = "cenc"
	SchemeCBC1 Scheme = "cbc1"
	SchemeCENS Scheme = "cens"
	SchemeCBCS Scheme = "cbcs"
)

// Check says what is wrong with the scheme, or nil.
func (s Scheme) Check() error {
	switch s {
	case SchemeCENC, SchemeCBC1, SchemeCENS, SchemeCBCS:
		return nil
	}
	return fmt.Errorf("scheme %.20q: must be cenc, cbc1, cens or cbcs", string(s))
}

// ExplicitIV reports whether a key of this scheme carries a constant IV.
// Only cbcs does: its FairPlay licence needs it. A shared IV under a counter
// mode would reuse key stream between streams.
func (s Scheme) ExplicitIV() bool { return s == SchemeCBCS }

// A KID is a key ID (RFC 4122, 16 bytes, network order).
type KID [KIDSize]byte

// ParseKID reads a KID in 32 hexadecimal digits, or in the 8-4-4-4-12 form.
func ParseKID(s string) (KID, error) {
	var kid KID
	h := s
	if len(s) == 36 {
		if s[8] != '-' || s[13] != '-' || s[18] != '-' || s[23] != '-' {
			return KID{}, fmt.Errorf("KID %.40q: dashes must be at 8-4-4-4-12", s)
		}
		h = s[:8] + s[9:13] + s[14:18] + s[19:23] + s[24:]
	}
	if len(h) != 2*KIDSize {
		return KID{}, fmt.Errorf("KID %.40q: must be 32 hexadecimal digits, with or without the dashes of a UUID", s)
	}
	if _, err := hex.Decode(kid[:], []byte(h)); err != nil {
		return KID{}, fmt.Errorf("KID %.40q: %w", s, err)
	}
	if kid.IsZero() {
		return KID{}, fmt.Errorf("KID %q: the zero KID means \"not protected\" (ISO/IEC 23001-7) and names no key", s)
	}
	return kid, nil
}

// KIDFromBytes takes a KID of exactly 16 bytes, not all zero.
func KIDFromBytes(b []byte) (KID, error) {
	if len(b) != KIDSize {
		return KID{}, fmt.Errorf("KID of %d bytes: must be %d", len(b), KIDSize)
	}
	kid := KID(b)
	if kid.IsZero() {
		return KID{}, fmt.Errorf("the zero KID means \"not protected\" (ISO/IEC 23001-7) and names no key")
	}
	return kid, nil
}

// IsZero reports whether no KID is set.
func (k KID) IsZero() bool { return k == KID{} }

// String is the 8-4-4-4-12 form.
func (k KID) String() string {
	h := hex.EncodeToString(k[:])
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}

// MarshalText writes the KID as String does.
func (k KID) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// A Period is a crypto period (CPIX ContentKeyPeriod). The zero Period is
// none. Start and End are optional.
type Period struct {
	Set        bool
	Index      uint32
	Start, End time.Time
}

// The times that a period may have. A record keeps Unix nanoseconds, which
// end in the year 2262.
var (
	firstPeriod = time.Date(1970, 1, 1, 0, 0, 0, 0, time.UTC)
	lastPeriod  = time.Date(2200, 1, 1, 0, 0, 0, 0, time.UTC)
)

// Check says what is wrong with the period, or nil.
func (p Period) Check() error {
	if !p.Set && p != (Period{}) {
		return errors.New("an index or a time of no period")
	}
	for _, t := range []time.Time{p.Start, p.End} {
		if !t.IsZero() && (t.Before(firstPeriod) || t.After(lastPeriod)) {
			return fmt.Errorf("time %s: must be from 1970 to 2199", t.UTC().Format(time.RFC3339))
		}
	}
	if !p.Start.IsZero() && !p.End.IsZero() && !p.Start.Before(p.End) {
		return errors.New("it ends before it starts")
	}
	return nil
}

// A NaturalKey is what a content key is for. Two content keys never share
// one, and the caller is never part of it.
type NaturalKey struct {
	Category   CategoryName
	ContentID  ContentID
	TrackType  TrackType
	Scheme     Scheme
	HasPeriod  bool
	Period     uint32
	Generation uint32 // from 1; only a recorded re-key raises it
}

// SameItem reports whether two natural keys differ in their generation at most.
func (n NaturalKey) SameItem(o NaturalKey) bool {
	return n.Category == o.Category && bytes.Equal(n.ContentID, o.ContentID) && n.TrackType == o.TrackType &&
		n.Scheme == o.Scheme && n.HasPeriod == o.HasPeriod && n.Period == o.Period
}

func (n NaturalKey) String() string {
	s := fmt.Sprintf("%s/%q/%s/%s", n.Category, []byte(n.ContentID), n.TrackType, n.Scheme)
	if n.HasPeriod {
		s += fmt.Sprintf("/period %d", n.Period)
	}
	return fmt.Sprintf("%s/generation %d", s, n.Generation)
}

// A KEKID names one version of a category's key-encryption key, "movies/4".
type KEKID struct {
	Category CategoryName
	Version  uint32 // from 1
}

func (id KEKID) String() string {
	return string(id.Category) + "/" + strconv.FormatUint(uint64(id.Version), 10)
}

// MarshalText writes the ID as String does.
func (id KEKID) MarshalText() ([]byte, error) { return []byte(id.String()), nil }
