package audit

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/keycustody/custodian/internal/checkpoint"
)

// remains say what a segment was that is pruned. Of its entries there are the
// leaf hashes, or the whole entry where it was kept.
type remains struct {
	entries uint64
	size    int64  // of the file
	batches uint64 // in it
	bare    uint64 // entries of the log, up to its end, before the first checkpoint

	first, last time.Time // of its entries
	at          time.Time // when it was pruned
	root        tlog.Hash // of the tree after it
	signed      []byte    // its last checkpoint, nil where there is none
}

const remainsSize = 3*8 + 3*12 + tlog.HashSize

// append appends what set reads. before is the checkpoint before the segment.
func (r *remains) append(b, before []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, uint64(r.size))
	b = binary.BigEndian.AppendUint64(b, r.batches)
	b = binary.BigEndian.AppendUint64(b, r.bare)
	for _, t := range []time.Time{r.first, r.last, r.at} {
		b = binary.BigEndian.AppendUint64(b, uint64(t.Unix()))
		b = binary.BigEndian.AppendUint32(b, uint32(t.Nanosecond()))
	}
	b = append(b, r.root[:]...)
	for _, signed := range [][]byte{before, r.signed} {
		b = binary.BigEndian.AppendUint16(b, uint16(len(signed)))
		b = append(b, signed...)
	}
	return b
}

func (r *remains) set(b []byte) (before []byte, err error) {
	if len(b) < remainsSize {
		return nil, fmt.Errorf("%d bytes are too few to say what was pruned", len(b))
	}
	r.size = int64(binary.BigEndian.Uint64(b))
	r.batches, r.bare = binary.BigEndian.Uint64(b[8:]), binary.BigEndian.Uint64(b[16:])
	b = b[24:]
	for _, t := range []*time.Time{&r.first, &r.last, &r.at} {
		if *t, err = decodeTime(b[:12]); err != nil {
			return nil, fmt.Errorf("a time: %w", err)
		}
		b = b[12:]
	}
	r.root, b = tlog.Hash(b[:tlog.HashSize]), b[tlog.HashSize:]
	for _, signed := range []*[]byte{&before, &r.signed} {
		if len(b) < 2 || len(b)-2 < int(binary.BigEndian.Uint16(b)) || binary.BigEndian.Uint16(b) > checkpoint.MaxSize {
			return nil, errors.New("malformed length of a checkpoint")
		}
		n := 2 + int(binary.BigEndian.Uint16(b))
		if n > 2 {
			*signed = append([]byte(nil), b[2:n]...)
		}
		b = b[n:]
	}
	if len(b) != 0 {
		return nil, fmt.Errorf("%d bytes follow the last checkpoint", len(b))
	}
	return before, nil
}

// appendHash appends what is left of an entry that is not kept.
func appendHash(b []byte, leaf tlog.Hash) []byte { return append(append(b, 0), leaf[:]...) }

// appendKept appends an entry that is kept.
func appendKept(b, entry []byte) []byte {
	return append(binary.AppendUvarint(b, uint64(len(entry))), entry...)
}

// remains calls visit, if it is not nil, with each entry that is left of the
// pruned segment that is open, and leaf with the leaf hash of every one. It
// steps over the segment.
func (s *scanner) remains(leaf func(tlog.Hash), visit func(*Entry) error) error {
	r := bufio.NewReaderSize(io.NewSectionReader(s.file, s.off, 1<<62), 64<<10)
	var b []byte
	for end := s.head.first + s.head.pruned.entries; s.index < end; s.index++ {
		size, err := binary.ReadUvarint(r)
		n := int(size)
		if size == 0 {
			n = tlog.HashSize
		}
		if err != nil || size > maxEntry || size > 0 && size < entryPrefix {
			return s.damage(errors.Join(errors.New("malformed remains of an entry"), err))
		}
		b = append(b[:0], make([]byte, n)...)
		if _, err := io.ReadFull(r, b); err != nil {
			return s.damage(fmt.Errorf("the remains of the segment end: %w", err))
		}
		if size == 0 {
			leaf(tlog.Hash(b))
			s.off += 1 + tlog.HashSize
			continue
		}
		e, err := UnmarshalEntry(b)
		if err == nil && e.Index != s.index {
			err = fmt.Errorf("entry %d is in the place of entry %d", e.Index, s.index)
		}
		if err != nil {
			return s.damage(err)
		}
		leaf(tlog.RecordHash(b))
		if visit != nil {
			if err := visit(&e); err != nil {
				return err
			}
		}
		s.off += int64(len(binary.AppendUvarint(nil, size))) + int64(n)
	}
	if _, err := r.ReadByte(); err == nil {
		return s.damage(errors.New("something follows the last entry of the pruned segment"))
	} else if err != io.EOF {
		return fmt.Errorf("read audit log at offset %d: %w", s.off, err)
	}
	return nil
}
