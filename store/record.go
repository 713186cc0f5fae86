package store

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/keycustody/custodian/custodian"
)

// Every record at rest is
//
//	format 1 byte | kind 1 byte | fields
//
// where a field of variable size is preceded by its length and numbers are
// unsigned varints in their shortest form. A time is its Unix second (zigzag)
// and its nanosecond. The golden files in testdata hold one of each; a record
// once written stays readable, or a migration rewrites it.
const recordFormat = 1

// A recordKind is what a record is, so that no record passes for another.
type recordKind uint8

const (
	recordContentKey recordKind = 1 // Body, IV, Sealed
	recordControl    recordKind = 2 // ControlKind, Name, Body, MACVersion, MAC
	recordHead       recordKind = 3 // the same
	recordJournal    recordKind = 4 // the fields of InitJournal in order
	recordCounters   recordKind = 5 // sequence, content keys
)

func (k recordKind) String() string {
	switch k {
	case recordContentKey:
		return "content key"
	case recordControl:
		return "control"
	case recordHead:
		return "head"
	case recordJournal:
		return "init journal"
	case recordCounters:
		return "counters"
	}
	return fmt.Sprintf("kind %d", uint8(k))
}

// A counters record counts for Stats and Sequence.
type counters struct {
	sequence    uint64 // updates that inserted or replaced content keys
	contentKeys uint64
}

func encodeContentKey(k custodian.SealedKey) []byte {
	b := newRecord(recordContentKey, 8+len(k.Body)+len(k.IV)+len(k.Sealed))
	b = appendBytes(b, k.Body)
	b = append(b, k.IV[:]...)
	return appendBytes(b, k.Sealed)
}

// decodeContentKey reads a content key record. The result shares memory with b.
func decodeContentKey(b []byte) (custodian.SealedKey, error) {
	r := openRecord(recordContentKey, b)
	var k custodian.SealedKey
	k.Body = r.bytes()
	copy(k.IV[:], r.fixed(len(k.IV)))
	k.Sealed = r.bytes()
	if err := r.close(); err != nil {
		return custodian.SealedKey{}, err
	}
	var err error
	if k.Key, err = custodian.DecodeContentKey(k.Body); err != nil {
		return custodian.SealedKey{}, err
	}
	return k, nil
}

func encodeControl(kind recordKind, c custodian.ControlRecord) []byte {
	b := newRecord(kind, 16+len(c.Name)+len(c.Body)+len(c.MAC))
	b = append(b, byte(c.Kind))
	b = appendBytes(b, []byte(c.Name))
	b = appendBytes(b, c.Body)
	b = binary.AppendUvarint(b, uint64(c.MACVersion))
	return append(b, c.MAC[:]...)
}

// decodeControl reads a control record or the head. The result shares memory
// with b.
func decodeControl(kind recordKind, b []byte) (custodian.ControlRecord, error) {
	r := openRecord(kind, b)
	var c custodian.ControlRecord
	if f := r.fixed(1); f != nil {
		c.Kind = custodian.ControlKind(f[0])
	}
	c.Name = string(r.bytes())
	c.Body = r.bytes()
	c.MACVersion = r.uint32()
	copy(c.MAC[:], r.fixed(len(c.MAC)))
	return c, r.close()
}

func encodeJournal(j custodian.InitJournal) []byte {
	b := newRecord(recordJournal, 128)
	b = append(b, j.StoreID[:]...)
	b = appendBytes(b, []byte(j.MEKLabel))
	b = append(b, j.MEKID[:]...)
	b = appendBytes(b, []byte(j.Profile))
	b = appendTime(b, j.Start)
	b = appendTime(b, j.End)
	b = appendBytes(b, []byte(j.SignLbl))
	return append(b, j.SignID[:]...)
}

func decodeJournal(b []byte) (custodian.InitJournal, error) {
	r := openRecord(recordJournal, b)
	var j custodian.InitJournal
	copy(j.StoreID[:], r.fixed(len(j.StoreID)))
	j.MEKLabel = string(r.bytes())
	copy(j.MEKID[:], r.fixed(len(j.MEKID)))
	j.Profile = custodian.MEKProfile(r.bytes())
	j.Start = r.time()
	j.End = r.time()
	j.SignLbl = string(r.bytes())
	copy(j.SignID[:], r.fixed(len(j.SignID)))
	return j, r.close()
}

func encodeCounters(c counters) []byte {
	b := newRecord(recordCounters, 20)
	b = binary.AppendUvarint(b, c.sequence)
	return binary.AppendUvarint(b, c.contentKeys)
}

func decodeCounters(b []byte) (counters, error) {
	r := openRecord(recordCounters, b)
	c := counters{sequence: r.uint(), contentKeys: r.uint()}
	return c, r.close()
}

// newRecord begins a record that will have about size bytes of fields.
func newRecord(kind recordKind, size int) []byte {
	return append(make([]byte, 0, 2+size), recordFormat, byte(kind))
}

func appendBytes(b, field []byte) []byte {
	return append(binary.AppendUvarint(b, uint64(len(field))), field...)
}

func appendTime(b []byte, t time.Time) []byte {
	return binary.AppendUvarint(binary.AppendVarint(b, t.Unix()), uint64(t.Nanosecond()))
}

// A reader takes a record apart. After its first error every read yields
// zero, and close reports that error.
type reader struct {
	kind recordKind
	b    []byte
	err  error
}

var (
	errShort   = errors.New("ends early")
	errVarint  = errors.New("a number is not in its shortest form")
	errTooBig  = errors.New("a number is too big")
	errTime    = errors.New("a time is out of range")
	errMissing = errors.New("is empty")
)

func openRecord(kind recordKind, b []byte) reader {
	r := reader{kind: kind, b: b}
	switch {
	case len(b) == 0:
		r.fail(errMissing)
	case b[0] != recordFormat:
		r.fail(fmt.Errorf("has format %d, want %d", b[0], recordFormat))
	case len(b) < 2:
		r.fail(errShort)
	case recordKind(b[1]) != kind:
		r.fail(fmt.Errorf("is a %s record", recordKind(b[1])))
	default:
		r.b = b[2:]
	}
	return r
}

func (r *reader) fail(err error) {
	if r.err == nil {
		r.err = err
	}
	r.b = nil
}

// close reports the first error, and bytes that nobody has read.
func (r *reader) close() error {
	if r.err == nil && len(r.b) > 0 {
		r.fail(fmt.Errorf("has %d bytes too many", len(r.b)))
	}
	if r.err != nil {
		return fmt.Errorf("%s record %w", r.kind, r.err)
	}
	return nil
}

func (r *reader) fixed(n int) []byte {
	if len(r.b) < n {
		r.fail(errShort)
		return nil
	}
	f := r.b[:n:n]
	r.b = r.b[n:]
	return f
}

func (r *reader) bytes() []byte {
	n := r.uint()
	if n > uint64(len(r.b)) {
		r.fail(errShort)
		return nil
	}
	return r.fixed(int(n))
}

func (r *reader) uint() uint64 {
	v, n := binary.Uvarint(r.b)
	switch {
	case n == 0:
		r.fail(errShort)
		return 0
	case n < 0:
		r.fail(errTooBig)
		return 0
	case n > 1 && r.b[n-1] == 0:
		r.fail(errVarint)
		return 0
	}
	r.b = r.b[n:]
	return v
}

func (r *reader) uint32() uint32 {
	v := r.uint()
	if v > 1<<32-1 {
		r.fail(errTooBig)
		return 0
	}
	return uint32(v)
}

func (r *reader) time() time.Time {
	u := r.uint()
	sec := int64(u>>1) ^ -int64(u&1) // zigzag, as AppendVarint writes it
	nsec := r.uint()
	if nsec >= 1e9 {
		r.fail(errTime)
		return time.Time{}
	}
	if r.err != nil {
		return time.Time{}
	}
	t := time.Unix(sec, int64(nsec)).UTC()
	if t.Unix() != sec {
		r.fail(errTime)
		return time.Time{}
	}
	return t
}
