package packager

import (
	"encoding/base64"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/keycustody/custodian/custodian"
)

// A CPIX is a document of the DASH-IF Content Protection Information Exchange
// Format, version 2.4 or one before it. What it says has been checked against
// itself: no id, KID or pair of KID and DRM system is there twice, and every
// reference leads to what it names.
type CPIX struct {
	ContentID string
	Version   string // as written; "" where it is not
	Keys      []CPIXKey
	Systems   []CPIXSystem
	Periods   []CPIXPeriod
	Rules     []CPIXRule
	// Deliveries are who the document is, or shall be, encrypted to.
	Deliveries []CPIXDelivery

	root *element

	// Where a KID, a pair of KID and system, and the id of a period are.
	keys    map[custodian.KID]int
	systems map[systemKey]bool
	periods map[string]int
	rules   map[custodian.KID][]int
}

type systemKey struct{ kid, system [16]byte }

// A CPIXKey is a ContentKey. Its value is in clear, encrypted, or absent.
type CPIXKey struct {
	KID    custodian.KID
	Scheme string // commonEncryptionScheme, "" where it is not written
	IV     []byte // explicitIV, 16 bytes, or none

	e *element
}

// A CPIXSystem is a DRMSystem: signalling of one key for one DRM.
type CPIXSystem struct {
	KID      custodian.KID
	SystemID SystemID

	e *element
}

// A CPIXPeriod is a ContentKeyPeriod.
type CPIXPeriod struct {
	ID string
	// Period has the times of a wall clock. Offsets into the media are checked
	// and passed on, but nothing is decided by them. Not Set: it has no index.
	custodian.Period
}

// A CPIXRule is a ContentKeyUsageRule: which tracks, in which periods, a key
// is for.
type CPIXRule struct {
	KID       custodian.KID
	TrackType string   // intendedTrackType
	Periods   []string // ids
	Labels    []string
	Video     int // number of filters
	Audio     int
}

// A CPIXDelivery is a DeliveryData.
type CPIXDelivery struct {
	Certificate []byte // DER

	e *element
}

// ParseCPIX reads a document. It is safe for documents of strangers: time and
// memory are bounded by the size, which may be MaxDocumentSize at most, no
// DTD, entity or reference is obeyed, and what CPIX does not know is refused.
// Every error names the place and the fault. Wipe clears the keys in it.
func ParseCPIX(doc []byte) (*CPIX, error) {
	root, err := parseXML(doc)
	if err != nil {
		return nil, fmt.Errorf("cpix: %w", err)
	}
	d := &CPIX{root: root, keys: map[custodian.KID]int{}, systems: map[systemKey]bool{}, periods: map[string]int{}, rules: map[custodian.KID][]int{}}
	if err := d.read(); err != nil {
		d.Wipe()
		return nil, fmt.Errorf("cpix: %w", err)
	}
	return d, nil
}

// Wipe clears every text of the document, and with it the keys.
func (d *CPIX) Wipe() { d.root.wipe() }

// versions that this package reads.
var versions = []string{"", "2.0", "2.1", "2.2", "2.3", "2.3.1", "2.4"}

var errVersion = errors.New("CPIX@version")

func (d *CPIX) read() error {
	d.ContentID, _ = d.root.attr("contentId")
	d.Version, _ = d.root.attr("version")
	if !slices.Contains(versions, d.Version) {
		return fmt.Errorf("%w %.20q: must be 2.0 to 2.4", errVersion, d.Version)
	}
	for _, part := range []struct {
		list, item string
		read       func(*element) error
	}{ // in this order: the later ones refer to the earlier ones
		{"DeliveryDataList", "DeliveryData", d.readDelivery},
		{"ContentKeyList", "ContentKey", d.readKey},
		{"DRMSystemList", "DRMSystem", d.readSystem},
		{"ContentKeyPeriodList", "ContentKeyPeriod", d.readPeriod},
		{"ContentKeyUsageRuleList", "ContentKeyUsageRule", d.readRule},
	} {
		list := d.root.child(nsCPIX, part.list)
		if list == nil {
			continue
		}
		for i, e := range list.children {
			if err := part.read(e); err != nil {
				return fmt.Errorf("%s[%d]%w", part.item, i, err)
			}
		}
	}
	return nil
}

// at prefixes a fault of an attribute or child, so that it reads
// ContentKey[3]@kid: ...
func at(place string, err error) error { return fmt.Errorf("%s: %w", place, err) }

var errMissing = errors.New("is missing")

func (d *CPIX) readDelivery(e *element) error {
	x509 := e.at(cpixName("DeliveryKey"), dsigName("X509Data"), dsigName("X509Certificate"))
	if x509 == nil {
		return at("/DeliveryKey/X509Data/X509Certificate", errMissing)
	}
	der, err := decodeBase64(x509.text)
	if err != nil {
		return at("/DeliveryKey/X509Data/X509Certificate", err)
	}
	d.Deliveries = append(d.Deliveries, CPIXDelivery{der, e})
	return nil
}

func (d *CPIX) readKey(e *element) error {
	k := CPIXKey{e: e}
	var err error
	if k.KID, err = kidAttr(e); err != nil {
		return err
	}
	if _, twice := d.keys[k.KID]; twice {
		return at("@kid", fmt.Errorf("%s is there twice", k.KID))
	}
	d.keys[k.KID] = len(d.Keys)
	k.Scheme, _ = e.attr("commonEncryptionScheme")
	if iv, ok := e.attr("explicitIV"); ok {
		if k.IV, err = parseIV(iv); err != nil {
			return at("@explicitIV", err)
		}
	}
	d.Keys = append(d.Keys, k)
	return nil
}

func (d *CPIX) readSystem(e *element) error {
	s := CPIXSystem{e: e}
	var err error
	if s.KID, err = d.knownKID(e); err != nil {
		return err
	}
	id, ok := e.attr("systemId")
	if !ok {
		return at("@systemId", errMissing)
	}
	u, err := custodian.ParseKID(id) // the same form, RFC 4122
	if err != nil || len(id) != 36 {
		return at("@systemId", fmt.Errorf("%.40q: must be a UUID", id))
	}
	s.SystemID = SystemID(u)
	key := systemKey{s.KID, s.SystemID}
	if d.systems[key] {
		return at("@systemId", fmt.Errorf("%s is there twice for KID %s", id, s.KID))
	}
	d.systems[key] = true
	playlists := map[string]bool{}
	for _, c := range e.children {
		if !c.is(nsCPIX, "HLSSignalingData") {
			continue
		}
		p, _ := c.attr("playlist")
		switch p {
		case "", "media", "master", "multiVariant": // 2.4 has renamed master
		default:
			return at("/HLSSignalingData@playlist", fmt.Errorf("%.20q: must be media or master", p))
		}
		if playlists[p] {
			return at("/HLSSignalingData@playlist", fmt.Errorf("%q is there twice", p))
		}
		playlists[p] = true
	}
	d.Systems = append(d.Systems, s)
	return nil
}

// xsDuration is the form of xs:duration; that something is in it is checked
// beside.
var xsDuration = regexp.MustCompile(`^P(\d{1,9}Y)?(\d{1,9}M)?(\d{1,9}D)?(T(\d{1,9}H)?(\d{1,9}M)?(\d{1,9}(\.\d{1,9})?S)?)?$`)

func (d *CPIX) readPeriod(e *element) error {
	var p CPIXPeriod
	p.ID, _ = e.attr("id")
	if index, ok := e.attr("index"); ok {
		n, err := strconv.ParseUint(index, 10, 32)
		if err != nil {
			return at("@index", fmt.Errorf("%.20q: must be 0 to %d", index, uint32(1<<32-1)))
		}
		p.Set, p.Index = true, uint32(n)
	}
	for _, t := range []struct {
		attr string
		to   *time.Time
	}{{"start", &p.Start}, {"end", &p.End}} {
		text, ok := e.attr(t.attr)
		if !ok {
			continue
		}
		when, err := parseTime(text)
		if err != nil {
			return at("@"+t.attr, err)
		}
		*t.to = when
	}
	for _, name := range []string{"startOffset", "endOffset", "duration"} {
		if text, ok := e.attr(name); ok && (!xsDuration.MatchString(text) || strings.HasSuffix(text, "T") || text == "P") {
			return at("@"+name, fmt.Errorf("%.40q: must be an xs:duration, such as PT60S", text))
		}
	}
	checked := p.Period
	checked.Set = true // times without an index are CPIX too
	if err := checked.Check(); err != nil {
		return at("", err)
	}
	if p.ID != "" {
		d.periods[p.ID] = len(d.Periods)
	}
	d.Periods = append(d.Periods, p)
	return nil
}

func (d *CPIX) readRule(e *element) error {
	var r CPIXRule
	var err error
	if r.KID, err = d.knownKID(e); err != nil {
		return err
	}
	r.TrackType, _ = e.attr("intendedTrackType")
	for _, f := range e.children {
		switch f.name.Local {
		case "KeyPeriodFilter":
			id, ok := f.attr("periodId")
			if !ok {
				return at("/KeyPeriodFilter@periodId", errMissing)
			}
			if _, known := d.periods[id]; !known {
				return at("/KeyPeriodFilter@periodId", fmt.Errorf("%.80q: there is no ContentKeyPeriod with this id", id))
			}
			r.Periods = append(r.Periods, id)
		case "LabelFilter":
			label, ok := f.attr("label")
			if !ok {
				return at("/LabelFilter@label", errMissing)
			}
			r.Labels = append(r.Labels, label)
		case "VideoFilter":
			r.Video++
			err = errors.Join(checkRange(f, "minPixels", "maxPixels"), checkRange(f, "minFps", "maxFps"), checkBool(f, "hdr"), checkBool(f, "wcg"))
		case "AudioFilter":
			r.Audio++
			err = checkRange(f, "minChannels", "maxChannels")
		case "BitrateFilter":
			err = checkRange(f, "minBitrate", "maxBitrate")
		}
		if err != nil {
			return at("/"+f.name.Local, err)
		}
	}
	d.rules[r.KID] = append(d.rules[r.KID], len(d.Rules))
	d.Rules = append(d.Rules, r)
	return nil
}

func (d *CPIX) knownKID(e *element) (custodian.KID, error) {
	kid, err := kidAttr(e)
	if _, known := d.keys[kid]; err == nil && !known {
		err = at("@kid", fmt.Errorf("%s: there is no ContentKey with this KID", kid))
	}
	return kid, err
}

func kidAttr(e *element) (custodian.KID, error) {
	text, ok := e.attr("kid")
	if !ok {
		return custodian.KID{}, at("@kid", errMissing)
	}
	kid, err := custodian.ParseKID(text)
	if err != nil {
		return custodian.KID{}, at("@kid", err)
	}
	return kid, nil
}

// parseIV reads an explicitIV: base64 of 16 bytes, or, as some writers have
// it, the form of a UUID, which is never base64.
func parseIV(text string) ([]byte, error) {
	if kid, err := custodian.ParseKID(text); err == nil && len(text) == 36 {
		return kid[:], nil
	}
	iv, err := decodeBase64([]byte(text))
	if err != nil || len(iv) != 16 {
		return nil, fmt.Errorf("%.40q: must be 16 bytes in base64", text)
	}
	return iv, nil
}

// parseTime reads an xs:dateTime; one without a zone is in UTC.
func parseTime(text string) (time.Time, error) {
	for _, form := range []string{time.RFC3339Nano, "2006-01-02T15:04:05.999999999"} {
		if t, err := time.Parse(form, text); err == nil {
			return t.UTC(), nil
		}
	}
	return time.Time{}, fmt.Errorf("%.40q: must be an xs:dateTime, such as 2026-01-31T20:00:00Z", text)
}

// checkRange says what is wrong with two optional numbers, or nil.
func checkRange(e *element, minName, maxName string) error {
	var n [2]uint64
	for i, name := range []string{minName, maxName} {
		text, ok := e.attr(name)
		if !ok {
			if i == 1 {
				return nil // no upper bound
			}
			continue
		}
		var err error
		if n[i], err = strconv.ParseUint(text, 10, 63); err != nil {
			return at("@"+name, fmt.Errorf("%.20q: must be a number from 0", text))
		}
	}
	if n[0] > n[1] {
		return at("@"+minName, fmt.Errorf("%d: is above %s, %d", n[0], maxName, n[1]))
	}
	return nil
}

func checkBool(e *element, name string) error {
	switch text, ok := e.attr(name); {
	case !ok, text == "true", text == "false", text == "0", text == "1":
		return nil
	default:
		return at("@"+name, fmt.Errorf("%.20q: must be true or false", text))
	}
}

// decodeBase64 reads xs:base64Binary, in which white space means nothing.
func decodeBase64(text []byte) ([]byte, error) {
	compact := make([]byte, 0, len(text))
	for _, c := range text {
		if c != ' ' && c != '\t' && c != '\n' && c != '\r' {
			compact = append(compact, c)
		}
	}
	defer clear(compact)
	out := make([]byte, base64.StdEncoding.DecodedLen(len(compact)))
	n, err := base64.StdEncoding.Strict().Decode(out, compact)
	if err != nil {
		clear(out)
		return nil, errors.New("is not base64") // not err: it quotes
	}
	return out[:n], nil
}

func encodeBase64(b []byte) []byte {
	return base64.StdEncoding.AppendEncode(make([]byte, 0, base64.StdEncoding.EncodedLen(len(b))), b)
}

// Purpose is what the rules say that a key is for; an empty track type where
// they say nothing.
//
// The natural key has one track type and one period, so a key that is meant
// for two of either is refused rather than filed under one of them.
func (d *CPIX) Purpose(kid custodian.KID) (track string, period custodian.Period, err error) {
	for n, i := range d.rules[kid] {
		r, place := d.Rules[i], fmt.Sprintf("ContentKeyUsageRule[%d]", i)
		if len(r.Periods) > 1 {
			return "", period, at(place, fmt.Errorf("KID %s is for %d key periods: a key is for one", kid, len(r.Periods)))
		}
		var p custodian.Period
		if len(r.Periods) == 1 {
			if p = d.Periods[d.periods[r.Periods[0]]].Period; !p.Set {
				return "", period, at(fmt.Sprintf("ContentKeyPeriod %.80q@index", r.Periods[0]), errMissing)
			}
		}
		if n > 0 && (r.TrackType != track || p != period) {
			return "", period, at(place, fmt.Errorf("KID %s has another intendedTrackType or key period than in the rule before", kid))
		}
		track, period = r.TrackType, p
	}
	return track, period, nil
}

// Encode writes the document. What it returns holds the keys that are in the
// document, in one array: whoever sends it wipes it then.
func (d *CPIX) Encode() []byte { return d.root.write() }
