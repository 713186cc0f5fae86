package custodian

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"time"
)

// One encoding per record, and only here. An encoding begins with the kind of
// the record and the version of its form; numbers are minimal uvarints, byte
// strings are preceded by their length as a uvarint, times are 8 bytes, big
// endian, of Unix nanoseconds (the zero time: the lowest number). Every field
// is always there, in the order below, so equal records have equal encodings.

// The first byte of an encoding.
const (
	formContentKey = 1
	formMEK        = 2
	formKEK        = 3
	formHelper     = 4
	formSigner     = 5
	formCategory   = 6
	formException  = 7
	formHead       = 8
	formRotation   = 10
	formRewrap     = 9
	formVersion    = 1
	// formPackaged is the version of the form of a content key that is packaged:
	// it has the time of that at the end. Others stay as they were, so what is
	// sealed over them stays valid.
	formPackaged = 2
)

var errEncoding = errors.New("malformed encoding")

type encoder struct{ b []byte }

func newEncoder(form byte, room int) *encoder {
	e := &encoder{b: make([]byte, 0, room)}
	e.b = append(e.b, form, formVersion)
	return e
}

func (e *encoder) uint(v uint64)  { e.b = binary.AppendUvarint(e.b, v) }
func (e *encoder) raw(p []byte)   { e.b = append(e.b, p...) }
func (e *encoder) bytes(p []byte) { e.uint(uint64(len(p))); e.raw(p) }
func (e *encoder) str(s string)   { e.uint(uint64(len(s))); e.b = append(e.b, s...) }
func (e *encoder) strs(s []string) {
	e.uint(uint64(len(s)))
	for _, v := range s {
		e.str(v)
	}
}
func (e *encoder) bool(v bool) {
	if v {
		e.b = append(e.b, 1)
	} else {
		e.b = append(e.b, 0)
	}
}

func (e *encoder) versions(list []uint32) {
	e.uint(uint64(len(list)))
	for _, v := range list {
		e.uint(uint64(v))
	}
}

func (e *encoder) time(t time.Time) {
	n := int64(math.MinInt64)
	if !t.IsZero() {
		n = t.UnixNano()
	}
	e.b = binary.BigEndian.AppendUint64(e.b, uint64(n))
}

func (e *encoder) wrapped(w Wrapped) {
	e.uint(uint64(w.MEKVersion))
	e.uint(uint64(len(w.Outer)))
	for _, o := range w.Outer {
		e.str(o.Provider)
		e.str(o.KeyRef)
		e.bytes(o.Blob)
	}
	e.bytes(w.Canary)
}

// A decoder reads what an encoder wrote. Its first error sticks, and every
// later read returns zero values.
type decoder struct {
	b   []byte
	err error
}

func newDecoder(form byte, b []byte) *decoder { return newDecoderOf(form, formVersion, b) }

func newDecoderOf(form, version byte, b []byte) *decoder {
	d := &decoder{b: b}
	if len(b) < 2 || b[0] != form || b[1] != version {
		d.fail()
		return d
	}
	d.b = b[2:]
	return d
}

func (d *decoder) fail() { d.err, d.b = errEncoding, nil }

func (d *decoder) uint() uint64 {
	v, n := binary.Uvarint(d.b)
	if n <= 0 || (n > 1 && d.b[n-1] == 0) { // a longer form than needed is no encoding of ours
		d.fail()
		return 0
	}
	d.b = d.b[n:]
	return v
}

func (d *decoder) uint32() uint32 {
	v := d.uint()
	if v > math.MaxUint32 {
		d.fail()
		return 0
	}
	return uint32(v)
}

func (d *decoder) uint8() uint8 {
	v := d.uint()
	if v > math.MaxUint8 {
		d.fail()
		return 0
	}
	return uint8(v)
}

// raw returns the next n bytes; they are part of the input.
func (d *decoder) raw(n uint64) []byte {
	if n > uint64(len(d.b)) {
		d.fail()
		return nil
	}
	p := d.b[:n:n]
	d.b = d.b[n:]
	return p
}

func (d *decoder) bytes() []byte {
	p := d.raw(d.uint())
	if len(p) == 0 {
		return nil
	}
	return p
}
func (d *decoder) str() string { return string(d.bytes()) }

func (d *decoder) strs() (s []string) {
	for n := d.uint(); n > 0 && d.err == nil; n-- {
		s = append(s, d.str())
	}
	return s
}

func (d *decoder) array16() (a [16]byte) { copy(a[:], d.raw(16)); return a }
func (d *decoder) array32() (a [32]byte) { copy(a[:], d.raw(32)); return a }

func (d *decoder) bool() bool {
	p := d.raw(1)
	if len(p) == 1 && p[0] > 1 {
		d.fail()
	}
	return len(p) == 1 && p[0] == 1
}

func (d *decoder) time() time.Time {
	p := d.raw(8)
	if p == nil {
		return time.Time{}
	}
	n := int64(binary.BigEndian.Uint64(p))
	if n == math.MinInt64 {
		return time.Time{}
	}
	return time.Unix(0, n).UTC()
}

func (d *decoder) versions() (list []uint32) {
	for n := d.uint(); n > 0 && d.err == nil; n-- {
		list = append(list, d.uint32())
	}
	return list
}

func (d *decoder) wrapped() Wrapped {
	w := Wrapped{MEKVersion: d.uint32()}
	for n := d.uint(); n > 0 && d.err == nil; n-- {
		w.Outer = append(w.Outer, OuterWrap{Provider: d.str(), KeyRef: d.str(), Blob: d.bytes()})
	}
	w.Canary = d.bytes()
	return w
}

// done returns the decoder's error; what is left over is one, too.
func (d *decoder) done(what string) error {
	if d.err == nil && len(d.b) > 0 {
		d.err = errEncoding
	}
	if d.err != nil {
		return fmt.Errorf("%s: %w: %w", what, d.err, ErrRecordCorrupt)
	}
	return nil
}

// EncodeContentKey is the body of a content key's record.
func EncodeContentKey(k ContentKey) []byte {
	e := newEncoder(formContentKey, 160+len(k.Category)+len(k.ContentID))
	e.str(string(k.Category))
	e.bytes(k.ContentID)
	e.str(string(k.TrackType))
	e.str(string(k.Scheme))
	e.bool(k.HasPeriod)
	e.uint(uint64(k.Period))
	e.uint(uint64(k.Generation))
	e.raw(k.KID[:])
	e.bytes(k.IV)
	e.time(k.PeriodStart)
	e.time(k.PeriodEnd)
	e.uint(uint64(k.Origin))
	e.str(string(k.KEK.Category))
	e.uint(uint64(k.KEK.Version))
	e.uint(uint64(k.BirthKEK))
	e.time(k.CreateTime)
	e.uint(k.Revision)
	e.uint(uint64(k.Fingerprint.Version))
	e.raw(k.Fingerprint.MAC[:])
	if !k.PackagedTime.IsZero() {
		e.b[1] = formPackaged
		e.time(k.PackagedTime)
	}
	return e.b
}

// DecodeContentKey reads a body. The result shares memory with it.
func DecodeContentKey(b []byte) (ContentKey, error) {
	version := byte(formVersion)
	if len(b) > 1 && b[1] == formPackaged {
		version = formPackaged
	}
	d := newDecoderOf(formContentKey, version, b)
	var k ContentKey
	k.Category = CategoryName(d.str())
	k.ContentID = d.bytes()
	k.TrackType = TrackType(d.str())
	k.Scheme = schemeOf(d.bytes())
	k.HasPeriod = d.bool()
	k.Period = d.uint32()
	k.Generation = d.uint32()
	k.KID = d.array16()
	k.IV = d.bytes()
	k.PeriodStart = d.time()
	k.PeriodEnd = d.time()
	k.Origin = Origin(d.uint8())
	k.KEK.Category = k.Category
	if c := d.bytes(); string(c) != string(k.Category) {
		k.KEK.Category = CategoryName(c)
	}
	k.KEK.Version = d.uint32()
	k.BirthKEK = d.uint32()
	k.CreateTime = d.time()
	k.Revision = d.uint()
	k.Fingerprint.Version = d.uint32()
	k.Fingerprint.MAC = d.array16()
	if version == formPackaged {
		if k.PackagedTime = d.time(); k.PackagedTime.IsZero() {
			d.fail()
		}
	}
	return k, d.done("content key")
}

// schemeOf spares an allocation on the hot path for the schemes that exist.
func schemeOf(b []byte) Scheme {
	switch string(b) {
	case string(SchemeCENC):
		return SchemeCENC
	case string(SchemeCBCS):
		return SchemeCBCS
	}
	return Scheme(b)
}

func encodeMEK(m MEK) []byte {
	e := newEncoder(formMEK, 256)
	e.uint(uint64(m.Version))
	e.str(m.Label)
	e.raw(m.ID[:])
	e.str(string(m.Profile))
	e.uint(uint64(m.State))
	e.time(m.CreateTime)
	e.time(m.EndTime)
	e.bytes(m.Canary)
	e.str(m.TokenSerial)
	e.uint(m.Revision)
	return e.b
}

func decodeMEK(b []byte) (MEK, error) {
	d := newDecoder(formMEK, b)
	m := MEK{Version: d.uint32(), Label: d.str(), ID: d.array16(), Profile: MEKProfile(d.str()), State: State(d.uint8()),
		CreateTime: d.time(), EndTime: d.time(), Canary: d.bytes(), TokenSerial: d.str(), Revision: d.uint()}
	return m, d.done("mek record")
}

func encodeKEK(k KEK) []byte {
	e := newEncoder(formKEK, 512)
	e.str(string(k.ID.Category))
	e.uint(uint64(k.ID.Version))
	e.uint(uint64(k.State))
	e.time(k.CreateTime)
	e.time(k.DeactivateTime)
	e.wrapped(k.Wrapped)
	e.uint(k.Reserved)
	e.uint(k.Revision)
	return e.b
}

func decodeKEK(b []byte) (KEK, error) {
	d := newDecoder(formKEK, b)
	k := KEK{ID: KEKID{CategoryName(d.str()), d.uint32()}, State: State(d.uint8()),
		CreateTime: d.time(), DeactivateTime: d.time(), Wrapped: d.wrapped(), Reserved: d.uint(), Revision: d.uint()}
	return k, d.done("kek record")
}

func encodeHelper(h Helper) []byte {
	e := newEncoder(formHelper, 512)
	e.str(string(h.Purpose))
	e.uint(uint64(h.Version))
	e.uint(uint64(h.State))
	e.time(h.CreateTime)
	e.wrapped(h.Wrapped)
	e.uint(h.Revision)
	return e.b
}

func decodeHelper(b []byte) (Helper, error) {
	d := newDecoder(formHelper, b)
	h := Helper{Purpose: HelperPurpose(d.str()), Version: d.uint32(), State: State(d.uint8()),
		CreateTime: d.time(), Wrapped: d.wrapped(), Revision: d.uint()}
	return h, d.done("helper key record")
}

func encodeSigner(s Signer) []byte {
	e := newEncoder(formSigner, 256)
	e.str(s.Purpose)
	e.uint(uint64(s.Version))
	e.str(s.Label)
	e.raw(s.ID[:])
	e.bytes(s.PublicKey)
	e.uint(uint64(s.State))
	e.time(s.CreateTime)
	e.uint(s.Revision)
	return e.b
}

func decodeSigner(b []byte) (Signer, error) {
	d := newDecoder(formSigner, b)
	s := Signer{Purpose: d.str(), Version: d.uint32(), Label: d.str(), ID: d.array16(), PublicKey: d.bytes(),
		State: State(d.uint8()), CreateTime: d.time(), Revision: d.uint()}
	return s, d.done("signing key record")
}

func encodeCategory(c Category) []byte {
	e := newEncoder(formCategory, 128)
	e.str(string(c.Name))
	e.uint(uint64(c.Mode))
	e.uint(uint64(c.ActiveKEK))
	e.strs(c.Providers)
	e.time(c.CreateTime)
	e.uint(uint64(c.ReissueWindow))
	e.bool(c.Live)
	e.uint(c.Revision)
	return e.b
}

func decodeCategory(b []byte) (Category, error) {
	d := newDecoder(formCategory, b)
	c := Category{Name: CategoryName(d.str()), Mode: CategoryMode(d.uint8()), ActiveKEK: d.uint32(), Providers: d.strs()}
	c.CreateTime = d.time()
	c.ReissueWindow = time.Duration(d.uint())
	c.Live = d.bool()
	c.Revision = d.uint()
	return c, d.done("category record")
}

func encodeException(x Exception) []byte {
	e := newEncoder(formException, 64+len(x.Cause))
	e.raw(x.KID[:])
	e.uint(uint64(x.State))
	e.bool(x.Decided)
	e.time(x.Time)
	e.str(x.Cause)
	e.uint(x.Revision)
	return e.b
}

func decodeException(b []byte) (Exception, error) {
	d := newDecoder(formException, b)
	x := Exception{KID: d.array16(), State: State(d.uint8()), Decided: d.bool(), Time: d.time(), Cause: d.str(), Revision: d.uint()}
	return x, d.done("exception record")
}

func encodeRotation(r Rotation) []byte {
	e := newEncoder(formRotation, 192)
	e.str(string(r.Kind))
	e.str(string(r.Category))
	e.uint(uint64(r.To))
	e.uint(uint64(r.Predecessor))
	e.versions(r.From)
	e.versions(r.Compromised)
	e.bool(r.Serve)
	e.uint(uint64(r.Step))
	e.str(r.Cause)
	e.str(r.RequestID)
	e.time(r.StartTime)
	e.time(r.StepTime)
	e.time(r.HoldUntil)
	e.uint(r.Total)
	e.uint(r.Verified)
	e.uint(r.Revision)
	return e.b
}

func decodeRotation(b []byte) (Rotation, error) {
	d := newDecoder(formRotation, b)
	r := Rotation{Kind: RotationKind(d.str()), Category: CategoryName(d.str()), To: d.uint32(), Predecessor: d.uint32(),
		From: d.versions(), Compromised: d.versions(), Serve: d.bool(), Step: RotationStep(d.uint8()), Cause: d.str(), RequestID: d.str()}
	r.StartTime, r.StepTime, r.HoldUntil = d.time(), d.time(), d.time()
	r.Total, r.Verified, r.Revision = d.uint(), d.uint(), d.uint()
	return r, d.done("rotation record")
}

func encodeHead(h Head) []byte {
	e := newEncoder(formHead, 128)
	e.raw(h.StoreID[:])
	e.uint(h.Revision)
	e.raw(h.Digest[:])
	e.raw(h.Previous[:])
	e.raw(h.Pending[:])
	e.time(h.HighestNow)
	return e.b
}

func decodeHead(b []byte) (Head, error) {
	d := newDecoder(formHead, b)
	h := Head{StoreID: d.array16(), Revision: d.uint(), Digest: d.array32(), Previous: d.array32(), Pending: d.array32(), HighestNow: d.time()}
	return h, d.done("head")
}

// macInput is what the MAC of a control record covers: the record's place as
// well as its body, so that no record can stand in for another.
func macInput(store [16]byte, r ControlRecord) []byte {
	b := make([]byte, 0, 64+len(r.Name)+len(r.Body))
	b = append(b, "custodian record mac 1\x00"...)
	b = append(b, store[:]...)
	b = append(b, byte(r.Kind))
	b = binary.AppendUvarint(b, uint64(len(r.Name)))
	b = append(b, r.Name...)
	b = binary.AppendUvarint(b, uint64(r.MACVersion))
	return append(b, r.Body...)
}

// associatedData is what the GCM tag of a sealed CEK covers beside the CEK.
func associatedData(store [16]byte, body []byte) []byte {
	b := make([]byte, 0, 48+len(body))
	b = append(b, "custodian content key 1\x00"...)
	b = append(b, store[:]...)
	return append(b, body...)
}

// identity is what the canary of a wrapped key and its outer wraps are bound
// to: store, purpose and version. The same wrapped bytes under another name
// do not open.
func identity(store [16]byte, purpose string, version uint32) []byte {
	b := make([]byte, 0, 64+len(purpose))
	b = append(b, "custodian wrapped key 1\x00"...)
	b = append(b, store[:]...)
	b = binary.AppendUvarint(b, uint64(len(purpose)))
	b = append(b, purpose...)
	return binary.BigEndian.AppendUint32(b, version)
}

func kekIdentity(store [16]byte, id KEKID) []byte {
	return identity(store, "kek/"+string(id.Category), id.Version)
}

func helperIdentity(store [16]byte, p HelperPurpose, version uint32) []byte {
	return identity(store, "helper/"+string(p), version)
}
