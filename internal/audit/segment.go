package audit

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/bits"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/tlog"
	"golang.org/x/sys/unix"

	"github.com/keycustody/custodian/internal/checkpoint"
)

const (
	fileName = "audit.log" // of segment 0; that of N is audit-N.log, in 8 digits

	firstVersion  = 1 // of the header of segment 0
	laterVersion  = 2 // of that of a later segment
	prunedVersion = 3 // of that of any segment that is pruned

	maxStart = 64*tlog.HashSize + 2*checkpoint.MaxSize + 512
)

func segmentName(number uint32) string {
	if number == 0 {
		return fileName
	}
	return fmt.Sprintf("audit-%08d.log", number)
}

// segments returns the numbers of the segments in dir, in order.
func segments(dir string) ([]uint32, error) {
	files, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("open audit log: %w", err)
	}
	var numbers []uint32
	for _, f := range files {
		digits, _ := strings.CutPrefix(strings.TrimSuffix(f.Name(), ".log"), "audit-")
		n, err := strconv.ParseUint(digits, 10, 32)
		if f.Name() == fileName {
			n, err = 0, nil
		}
		if err == nil && f.Name() == segmentName(uint32(n)) {
			numbers = append(numbers, uint32(n))
		}
	}
	slices.Sort(numbers)
	return numbers, nil
}

// A segmentHead is what a segment begins with.
type segmentHead struct {
	id     logID
	number uint32
	first  uint64      // index of its first entry
	edge   []tlog.Hash // of the tree before it
	signed []byte      // the checkpoint before it, nil where there is none
	body   int64       // where its batches, or what is left of them, begin
	pruned *remains    // nil where it is whole
}

// tree returns the tree before the segment.
func (h *segmentHead) tree() tree {
	return tree{size: h.first, edge: slices.Clone(h.edge)}
}

// encode returns the header of a segment, and its start, which is padded.
func (h *segmentHead) encode() []byte {
	var start []byte
	for _, e := range h.edge {
		start = append(start, e[:]...)
	}
	version, entries := uint32(laterVersion), uint64(0)
	if h.pruned != nil {
		version, entries = prunedVersion, h.pruned.entries
		start = h.pruned.append(start, h.signed)
	} else {
		start = append(start, h.signed...)
	}
	b := make([]byte, headerSize, headerSize+len(start)+8)
	copy(b, fileMagic)
	binary.BigEndian.PutUint32(b[8:], version)
	copy(b[12:], h.id[:])
	binary.BigEndian.PutUint32(b[28:], h.number)
	binary.BigEndian.PutUint64(b[32:], h.first)
	binary.BigEndian.PutUint32(b[40:], uint32(len(start)))
	binary.BigEndian.PutUint32(b[44:], crc32.Checksum(start, crcTable))
	binary.BigEndian.PutUint64(b[48:], entries)
	binary.BigEndian.PutUint32(b[60:], crc32.Checksum(b[:60], crcTable))
	b = append(b, start...)
	return append(b, zeros[:-len(start)&7]...)
}

// decodeHead reads the header of a segment, and what is known of its start.
func decodeHead(b []byte) (h segmentHead, start int, sum uint32, err error) {
	if string(b[:8]) != fileMagic {
		return h, 0, 0, errors.New("not an audit log")
	}
	if crc32.Checksum(b[:60], crcTable) != binary.BigEndian.Uint32(b[60:]) {
		return h, 0, 0, errors.New("checksum of the file header is wrong")
	}
	h.id, h.body = logID(b[12:28]), headerSize
	version := binary.BigEndian.Uint32(b[8:])
	if version < firstVersion || version > prunedVersion {
		return h, 0, 0, fmt.Errorf("version of the file is %d, this program reads up to %d", version, prunedVersion)
	}
	entries := binary.BigEndian.Uint64(b[48:])
	if version == firstVersion && !allZero(b[28:60]) || version == laterVersion && entries != 0 || !allZero(b[56:60]) {
		return h, 0, 0, errors.New("reserved bytes of the file header are set")
	}
	if version == firstVersion {
		return h, 0, 0, nil
	}
	h.number, h.first = binary.BigEndian.Uint32(b[28:]), binary.BigEndian.Uint64(b[32:])
	if (h.number == 0) != (h.first == 0) || version == laterVersion && h.number == 0 || version == prunedVersion && entries == 0 {
		return h, 0, 0, fmt.Errorf("segment %d with the version %d cannot begin with entry %d", h.number, version, h.first)
	}
	start, sum = int(binary.BigEndian.Uint32(b[40:])), binary.BigEndian.Uint32(b[44:])
	if start > maxStart || start < tlog.HashSize*bits.OnesCount64(h.first) {
		return h, 0, 0, fmt.Errorf("the file begins with %d bytes about what is before it", start)
	}
	h.body += int64(start+7) &^ 7
	if version == prunedVersion {
		h.pruned = &remains{entries: entries}
	}
	return h, start, sum, nil
}

// setStart takes in what follows the header.
func (h *segmentHead) setStart(b []byte) error {
	for range bits.OnesCount64(h.first) {
		h.edge, b = append(h.edge, tlog.Hash(b[:tlog.HashSize])), b[tlog.HashSize:]
	}
	if h.pruned != nil {
		var err error
		h.signed, err = h.pruned.set(b)
		return err
	}
	if len(b) > checkpoint.MaxSize {
		return fmt.Errorf("a checkpoint of %d bytes", len(b))
	}
	if len(b) > 0 {
		h.signed = slices.Clone(b)
	}
	return nil
}

// openSegment opens a segment for reading, and reads its head.
func openSegment(dir string, number uint32) (*os.File, segmentHead, error) {
	path := filepath.Join(dir, segmentName(number))
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, segmentHead{}, fmt.Errorf("open audit log: %w", err)
	}
	h, err := readHead(f)
	if err == nil && h.number != number {
		err = fmt.Errorf("it is segment %d", h.number)
	}
	if err == nil {
		return f, h, nil
	}
	f.Close()
	var fault *os.PathError
	if errors.As(err, &fault) {
		return nil, h, fmt.Errorf("read audit log: %w", err)
	}
	return nil, h, &DamageError{Path: path, Segment: number, Problem: err}
}

func readHead(f *os.File) (segmentHead, error) {
	b := make([]byte, headerSize)
	if _, err := f.ReadAt(b, 0); err != nil && err != io.EOF {
		return segmentHead{}, err
	}
	h, size, sum, err := decodeHead(b)
	if err != nil || h.body == headerSize && h.pruned == nil {
		return h, err
	}
	start := make([]byte, h.body-headerSize)
	if _, err := f.ReadAt(start, headerSize); err != nil && err != io.EOF {
		return h, err
	}
	if crc32.Checksum(start[:size], crcTable) != sum || !allZero(start[size:]) {
		return h, errors.New("what the file says of the entries before it is not what was written")
	}
	return h, h.setStart(start[:size])
}

// sealSize is more than a header, so that a version that knows no seals takes it
// for damage and not for a batch that was torn.
const sealSize = headerSize + trailerSize

// sealOf returns what ends a segment: the tree with all its entries.
func sealOf(id logID, number uint32, entries uint64, root tlog.Hash) []byte {
	b := make([]byte, headerSize)
	copy(b, sealMagic)
	binary.BigEndian.PutUint32(b[8:], number)
	binary.BigEndian.PutUint64(b[16:], entries)
	copy(b[24:], root[:])
	binary.BigEndian.PutUint32(b[60:], headerSum(b, id))
	return append(b, batchTrailer...)
}
