package packager

import (
	"bytes"
	"crypto/aes"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"unicode/utf16"
	"unsafe"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/keycustody/custodian/custodian"
)

// A SystemID names a DRM system: the UUID that DASH-IF registers for it.
type SystemID [16]byte

// The DRM systems that signalling is made for.
var (
	Widevine  = SystemID{0xed, 0xef, 0x8b, 0xa9, 0x79, 0xd6, 0x4a, 0xce, 0xa3, 0xc8, 0x27, 0xdc, 0xd5, 0x1d, 0x21, 0xed}
	PlayReady = SystemID{0x9a, 0x04, 0xf0, 0x79, 0x98, 0x40, 0x42, 0x86, 0xab, 0x92, 0xe6, 0x5b, 0xe0, 0x88, 0x5f, 0x95}
	FairPlay  = SystemID{0x94, 0xce, 0x86, 0xfb, 0x07, 0xff, 0x4f, 0x43, 0xad, 0xb8, 0x93, 0xd2, 0xfa, 0x96, 0x8c, 0xa2}
	// Common is the system of the W3C's common PSSH box, which lists KIDs only.
	Common = SystemID{0x10, 0x77, 0xef, 0xec, 0xc0, 0xb2, 0x4d, 0x02, 0xac, 0xe3, 0x3c, 0x1e, 0x52, 0xe2, 0xfb, 0x4b}
)

// String is the UUID in the 8-4-4-4-12 form, in lower case.
func (s SystemID) String() string { return custodian.KID(s).String() }

// PSSHBox is a Protection System Specific Header box (ISO/IEC 23001-7, 8.1):
// version 0 without KIDs, version 1 with them. The KIDs are written in
// ascending order.
func PSSHBox(system SystemID, kids []custodian.KID, data []byte) []byte {
	size := 4 + 4 + 4 + len(system) + 4 + len(data)
	version := uint32(0)
	if len(kids) > 0 {
		version, size = 1<<24, size+4+len(kids)*custodian.KIDSize
	}
	b := binary.BigEndian.AppendUint32(make([]byte, 0, size), uint32(size))
	b = append(b, "pssh"...)
	b = binary.BigEndian.AppendUint32(b, version)
	b = append(b, system[:]...)
	if len(kids) > 0 {
		b = binary.BigEndian.AppendUint32(b, uint32(len(kids)))
		for _, kid := range sorted(kids) {
			b = append(b, kid[:]...)
		}
	}
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

// CommonPSSH is the box of the common system: the KIDs, and no data.
func CommonPSSH(kids ...custodian.KID) []byte { return PSSHBox(Common, kids, nil) }

func sorted(kids []custodian.KID) []custodian.KID {
	return slices.SortedFunc(slices.Values(kids), func(a, b custodian.KID) int { return bytes.Compare(a[:], b[:]) })
}

// WidevineData is what a Widevine PSSH box carries: the fields of the public
// WidevinePsshData message that are used here. Empty fields are left out.
type WidevineData struct {
	AESCTR    bool // algorithm, which only old clients read
	KIDs      []custodian.KID
	Provider  string
	ContentID custodian.ContentID
	Policy    string
	// Period is for keys that rotate. Its times are not carried.
	Period custodian.Period
	// PeriodSeconds is how long each period lasts. Zero: not said.
	PeriodSeconds uint32
	Scheme        custodian.Scheme
}

// Encode writes the message, with the KIDs in ascending order.
func (d WidevineData) Encode() []byte {
	var b []byte
	number := func(field protowire.Number, v uint64) {
		b = protowire.AppendVarint(protowire.AppendTag(b, field, protowire.VarintType), v)
	}
	text := func(field protowire.Number, v []byte) {
		if len(v) > 0 {
			b = protowire.AppendBytes(protowire.AppendTag(b, field, protowire.BytesType), v)
		}
	}
	if d.AESCTR {
		number(1, 1)
	}
	for _, kid := range sorted(d.KIDs) {
		text(2, kid[:])
	}
	text(3, []byte(d.Provider))
	text(4, d.ContentID)
	text(6, []byte(d.Policy))
	if d.Period.Set {
		number(7, uint64(d.Period.Index))
	}
	if d.Scheme != "" {
		number(9, uint64(binary.BigEndian.Uint32([]byte(d.Scheme)))) // its four characters
	}
	if d.PeriodSeconds > 0 {
		number(10, uint64(d.PeriodSeconds))
	}
	return b
}

// WidevinePSSH is the box with this data.
func WidevinePSSH(d WidevineData) []byte { return PSSHBox(Widevine, nil, d.Encode()) }

// PlayReadyChecksum is the checksum of a key in a PlayReady header of version
// 4.0: the first 8 bytes of the KID, encrypted under the key. It is how a
// client notices a wrong key. The key is not kept.
func PlayReadyChecksum(kid custodian.KID, key []byte) (sum [8]byte, err error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return sum, fmt.Errorf("PlayReady checksum of %s: %w", kid, err)
	}
	defer forget(block)
	guid := playReadyGUID(kid)
	block.Encrypt(guid[:], guid[:])
	copy(sum[:], guid[:])
	return sum, nil
}

// forget wipes what a cipher has made of its key: the standard library has no
// way to say so. Its block is a struct of numbers without pointers.
func forget(block any) {
	v := reflect.ValueOf(block)
	clear(unsafe.Slice((*byte)(v.UnsafePointer()), v.Type().Elem().Size()))
}

// playReadyGUID is the KID as PlayReady writes it: a GUID, whose first three
// parts are little-endian.
func playReadyGUID(kid custodian.KID) custodian.KID {
	slices.Reverse(kid[0:4])
	slices.Reverse(kid[4:6])
	slices.Reverse(kid[6:8])
	return kid
}

// PlayReadyObject is the PlayReady Object for one key: a header of version 4.0
// with checksum for the counter-mode schemes, and of version 4.3, which has no
// checksum, for cbc1 and cbcs.
func PlayReadyObject(scheme custodian.Scheme, kid custodian.KID, checksum [8]byte) ([]byte, error) {
	guid := playReadyGUID(kid)
	id := base64.StdEncoding.EncodeToString(guid[:])
	var version, data string
	switch scheme {
	case custodian.SchemeCENC, custodian.SchemeCENS:
		version = "4.0.0.0"
		data = "<PROTECTINFO><KEYLEN>16</KEYLEN><ALGID>AESCTR</ALGID></PROTECTINFO><KID>" + id + "</KID><CHECKSUM>" +
			base64.StdEncoding.EncodeToString(checksum[:]) + "</CHECKSUM>"
	case custodian.SchemeCBC1, custodian.SchemeCBCS:
		version = "4.3.0.0"
		data = `<PROTECTINFO><KIDS><KID ALGID="AESCBC" VALUE="` + id + `"></KID></KIDS></PROTECTINFO>`
	default:
		return nil, scheme.Check()
	}
	header := utf16.Encode([]rune(`<WRMHEADER xmlns="http://schemas.microsoft.com/DRM/2007/03/PlayReadyHeader" version="` + version + `"><DATA>` + data + `</DATA></WRMHEADER>`))
	n := 2 * len(header)
	b := binary.LittleEndian.AppendUint32(make([]byte, 0, 10+n), uint32(10+n))
	b = binary.LittleEndian.AppendUint16(b, 1) // one record
	b = binary.LittleEndian.AppendUint16(b, 1) // a rights management header
	b = binary.LittleEndian.AppendUint16(b, uint16(n))
	for _, c := range header {
		b = binary.LittleEndian.AppendUint16(b, c)
	}
	return b, nil
}

// PlayReadyPSSH is the box around a PlayReady Object.
func PlayReadyPSSH(object []byte) []byte { return PSSHBox(PlayReady, nil, object) }

// FairPlayURI names a key to a FairPlay licence server: skd://KID:IV, the KID
// in the UUID form and the IV of the content in hexadecimal digits, which the
// licence has to carry because nothing in the stream does.
func FairPlayURI(kid custodian.KID, iv []byte) (string, error) {
	if len(iv) != 16 {
		return "", fmt.Errorf("FairPlay URI of %s: IV of %d bytes: must be 16", kid, len(iv))
	}
	return fmt.Sprintf("skd://%s:%X", kid, iv), nil
}

// Signalling is what manifests and files say of one key to one DRM system.
type Signalling struct {
	System SystemID
	KID    custodian.KID
	Scheme custodian.Scheme
	IV     []byte // of cbcs, 16 bytes
	// PSSH is the box. FairPlay has none.
	PSSH []byte
	// Object is the PlayReady Object, for PlayReady.
	Object []byte
}

// NewSignalling makes the signalling of key for system. widevine is what the
// box of Widevine carries beside the KID and the scheme. Whoever calls it has
// the key in clear; it is needed for PlayReady's checksum.
func NewSignalling(system SystemID, key custodian.ContentKey, cek []byte, widevine WidevineData) (Signalling, error) {
	s := Signalling{System: system, KID: key.KID, Scheme: key.Scheme, IV: key.IV}
	switch system {
	case Widevine:
		widevine.KIDs, widevine.Scheme = []custodian.KID{key.KID}, key.Scheme
		s.PSSH = WidevinePSSH(widevine)
	case PlayReady:
		sum, err := PlayReadyChecksum(key.KID, cek)
		if err != nil {
			return s, err
		}
		if s.Object, err = PlayReadyObject(key.Scheme, key.KID, sum); err != nil {
			return s, err
		}
		s.PSSH = PlayReadyPSSH(s.Object)
	case Common:
		s.PSSH = CommonPSSH(key.KID)
	case FairPlay:
		if key.Scheme != custodian.SchemeCBCS {
			return s, fmt.Errorf("FairPlay with scheme %s: it plays only cbcs", key.Scheme)
		}
	default:
		return s, fmt.Errorf("DRM system %s: no signalling is made for it", system)
	}
	return s, nil
}

// DASH is what stands inside of the system's ContentProtection element: the
// pssh element (ISO/IEC 23001-7), and for PlayReady the pro element. Their
// namespaces are declared on them, so that they are good in any manifest.
func (s Signalling) DASH() (string, error) {
	if len(s.PSSH) == 0 {
		return "", errNoDASH
	}
	inner := `<pssh xmlns="urn:mpeg:cenc:2013">` + base64.StdEncoding.EncodeToString(s.PSSH) + `</pssh>`
	if s.System == PlayReady {
		inner += `<pro xmlns="urn:microsoft:playready">` + base64.StdEncoding.EncodeToString(s.Object) + `</pro>`
	}
	return inner, nil
}

var errNoDASH = errors.New("FairPlay has no signalling in DASH")

// ContentProtection is the system's element of a DASH manifest.
func (s Signalling) ContentProtection() (string, error) {
	inner, err := s.DASH()
	if err != nil {
		return "", err
	}
	value := ""
	if s.System == PlayReady {
		value = ` value="MSPR 2.0"`
	}
	return `<ContentProtection schemeIdUri="urn:uuid:` + s.System.String() + `"` + value + `>` + inner + `</ContentProtection>`, nil
}

// DefaultKIDProtection is the element of a DASH manifest that names the scheme
// and the KID, and that stands before those of the systems.
func DefaultKIDProtection(scheme custodian.Scheme, kid custodian.KID) string {
	return `<ContentProtection schemeIdUri="urn:mpeg:dash:mp4protection:2011" value="` + string(scheme) +
		`" cenc:default_KID="` + kid.String() + `" xmlns:cenc="urn:mpeg:cenc:2013"></ContentProtection>`
}

// HLSTag is a tag of HLS that names a key (RFC 8216).
type HLSTag string

// The tag of a media playlist, and the one of a multivariant playlist.
const (
	HLSKey        HLSTag = "#EXT-X-KEY"
	HLSSessionKey HLSTag = "#EXT-X-SESSION-KEY"
)

// HLS is the line of a playlist for the system. HLS has only cenc and cbcs.
func (s Signalling) HLS(tag HLSTag) (string, error) {
	var method string
	switch s.Scheme {
	case custodian.SchemeCENC:
		method = "SAMPLE-AES-CTR"
	case custodian.SchemeCBCS:
		method = "SAMPLE-AES"
	default:
		return "", fmt.Errorf("HLS with scheme %s: it has only cenc and cbcs", s.Scheme)
	}
	uri, format, err := s.hlsURI()
	if err != nil {
		return "", err
	}
	var line strings.Builder
	fmt.Fprintf(&line, `%s:METHOD=%s,URI="%s"`, tag, method, uri)
	if s.System == Widevine {
		fmt.Fprintf(&line, ",KEYID=0x%X", s.KID[:])
	}
	// A FairPlay licence carries the IV; clients want none here.
	if s.Scheme == custodian.SchemeCBCS && len(s.IV) > 0 && s.System != FairPlay {
		fmt.Fprintf(&line, ",IV=0x%X", s.IV)
	}
	fmt.Fprintf(&line, `,KEYFORMATVERSIONS="%s",KEYFORMAT="%s"`, hlsKeyFormatVersions, format)
	return line.String(), nil
}

const hlsKeyFormatVersions = "1"

// hlsURI is where a playlist says that the key is, and in which format.
func (s Signalling) hlsURI() (uri, format string, err error) {
	switch s.System {
	case Widevine:
		return "data:text/plain;base64," + base64.StdEncoding.EncodeToString(s.PSSH), "urn:uuid:" + s.System.String(), nil
	case PlayReady:
		return "data:text/plain;charset=UTF-16;base64," + base64.StdEncoding.EncodeToString(s.Object), "com.microsoft.playready", nil
	case Common:
		return "data:text/plain;base64," + base64.StdEncoding.EncodeToString(s.KID[:]), "identity", nil
	}
	uri, err = FairPlayURI(s.KID, s.IV)
	return uri, "com.apple.streamingkeydelivery", err
}
