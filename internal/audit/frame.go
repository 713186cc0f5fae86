package audit

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/bits"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/keycustody/custodian/internal/checkpoint"
)

// The package doc describes the format that this file writes and reads.

const (
	fileMagic    = "custaud\n"
	batchMagic   = "batch/1\n"
	signedMagic  = "batch/2\n"
	sealMagic    = "batch/s\n"
	magicPrefix  = "batch/" // of all three
	batchTrailer = "\nbatch.\n"

	headerSize  = 64 // of the file and of a batch
	trailerSize = 8
	sectorSize  = 512

	maxPayload = 16 << 20
)

var crcTable = crc32.MakeTable(crc32.Castagnoli)

// A logID tells one log from another. It goes into the CRC of each batch
// header, so that nothing a caller puts into an entry can look like one.
type logID [16]byte

func encodeFileHeader(id logID) []byte {
	b := make([]byte, headerSize)
	copy(b, fileMagic)
	binary.BigEndian.PutUint32(b[8:], firstVersion)
	copy(b[12:], id[:])
	binary.BigEndian.PutUint32(b[60:], crc32.Checksum(b[:60], crcTable))
	return b
}

// A batchHeader says what a batch holds.
type batchHeader struct {
	payload int // bytes
	count   int // entries, at least one
	first   uint64
	root    tlog.Hash // of the tree after the batch
	sum     uint32    // CRC of payload and padding
	signed  bool      // the payload ends in a checkpoint
}

// padded returns the length of the payload with its padding.
func (h *batchHeader) padded() int { return (h.payload + 7) &^ 7 }

// frameSize returns the length on disk of a batch with that much payload.
func frameSize(payload int) int64 {
	return int64(headerSize + (payload+7)&^7 + trailerSize)
}

func (h *batchHeader) encode(b []byte, id logID) {
	copy(b, batchMagic)
	if h.signed {
		copy(b, signedMagic)
	}
	binary.BigEndian.PutUint32(b[8:], uint32(h.payload))
	binary.BigEndian.PutUint32(b[12:], uint32(h.count))
	binary.BigEndian.PutUint64(b[16:], h.first)
	copy(b[24:], h.root[:])
	binary.BigEndian.PutUint32(b[56:], h.sum)
	binary.BigEndian.PutUint32(b[60:], headerSum(b, id))
}

func headerSum(b []byte, id logID) uint32 {
	return crc32.Update(crc32.Checksum(id[:], crcTable), crcTable, b[:60])
}

// isFrame reports whether b begins with a batch header or the seal of a segment.
func isFrame(b []byte, id logID) bool {
	return len(b) >= headerSize && headerSum(b, id) == binary.BigEndian.Uint32(b[60:])
}

// decodeBatchHeader reports whether b begins with a batch header of the log.
func decodeBatchHeader(b []byte, id logID) (batchHeader, bool) {
	if !isFrame(b, id) {
		return batchHeader{}, false
	}
	magic := string(b[:8])
	if magic != batchMagic && magic != signedMagic {
		return batchHeader{}, false
	}
	return batchHeader{
		payload: int(binary.BigEndian.Uint32(b[8:])),
		count:   int(binary.BigEndian.Uint32(b[12:])),
		first:   binary.BigEndian.Uint64(b[16:]),
		root:    tlog.Hash(b[24:56]),
		sum:     binary.BigEndian.Uint32(b[56:]),
		signed:  magic == signedMagic,
	}, true
}

// whole reports whether body, which follows the header, is what was written.
func (h *batchHeader) whole(body []byte) bool {
	n := h.padded()
	return len(body) == n+trailerSize &&
		string(body[n:]) == batchTrailer &&
		allZero(body[h.payload:n]) &&
		crc32.Checksum(body[:n], crcTable) == h.sum
}

// split parts a payload into entries and checkpoint, which is nil where the
// batch is not signed.
func (h *batchHeader) split(payload []byte) (entries, signed []byte, err error) {
	if !h.signed {
		return payload, nil, nil
	}
	end := len(payload) - 2
	if end < 0 {
		return nil, nil, errors.New("the batch has no room for its checkpoint")
	}
	n := int(binary.BigEndian.Uint16(payload[end:]))
	if n == 0 || n > end || n > checkpoint.MaxSize {
		return nil, nil, fmt.Errorf("a checkpoint of %d bytes in %d bytes of payload", n, len(payload))
	}
	return payload[:end-n], payload[end-n : end : end], nil
}

// appendCheckpoint appends what split takes off.
func appendCheckpoint(b, signed []byte) []byte {
	return binary.BigEndian.AppendUint16(append(b, signed...), uint16(len(signed)))
}

// entries calls fn with the encoding of each entry of the payload, and checks
// that the entries fill it and are in their places.
func (h *batchHeader) entries(payload []byte, fn func(entry []byte) error) error {
	for i := range h.count {
		entry, rest, err := nextEntry(payload)
		if err != nil {
			return err
		}
		if index := binary.BigEndian.Uint64(entry[1:]); index != h.first+uint64(i) {
			return fmt.Errorf("entry %d is in the place of entry %d", index, h.first+uint64(i))
		}
		if err := fn(entry); err != nil {
			return err
		}
		payload = rest
	}
	if len(payload) != 0 {
		return fmt.Errorf("%d bytes follow the last entry of the batch", len(payload))
	}
	return nil
}

// nextEntry takes the first entry off a payload.
func nextEntry(payload []byte) (entry, rest []byte, err error) {
	size, n := binary.Uvarint(payload)
	if n <= 0 || n != (bits.Len64(size|1)+6)/7 {
		return nil, nil, errors.New("malformed length of an entry")
	}
	if size < entryPrefix || size > maxEntry || size > uint64(len(payload)-n) {
		return nil, nil, fmt.Errorf("an entry of %d bytes in %d bytes of payload", size, len(payload))
	}
	end := n + int(size)
	return payload[n:end:end], payload[end:], nil
}

// sectorLost reports whether one of the disk sectors that b covers, b being at
// off in the file, holds only zeros of it.
func sectorLost(b []byte, off int64) bool {
	for len(b) > 0 {
		n := min(int64(len(b)), sectorSize-off%sectorSize)
		if allZero(b[:n]) {
			return true
		}
		b, off = b[n:], off+n
	}
	return false
}

var zeros [4096]byte

func allZero(b []byte) bool {
	for len(b) > len(zeros) {
		if !bytes.Equal(b[:len(zeros)], zeros[:]) {
			return false
		}
		b = b[len(zeros):]
	}
	return bytes.Equal(b, zeros[:len(b)])
}
