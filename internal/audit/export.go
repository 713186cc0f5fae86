package audit

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/keycustody/custodian/internal/checkpoint"
)

// An export is one file that proves a range of entries to whoever has the
// public key: lines of JSON, of which the first is an exportHeader, and each
// other one the canonical encoding of an entry, as a string in base64.

const exportFormat = "custodian-audit-export/1"

// maxExportLine bounds a line, in bytes: an entry in base64 is the longest.
const maxExportLine = maxEntry*4/3 + 1024

// An exportHeader says what an export holds. Left and Right are the roots of
// the fewest complete subtrees that cover the entries before and behind.
type exportHeader struct {
	Format     string   `json:"format"`
	From       uint64   `json:"from"`
	To         uint64   `json:"to"` // exclusive
	Checkpoint string   `json:"checkpoint"`
	Left       [][]byte `json:"left"`
	Right      [][]byte `json:"right"`
}

// An ExportReport says what an export holds.
type ExportReport struct {
	From, To   uint64 // entries From to To-1
	Checkpoint checkpoint.Checkpoint
}

// Export writes the entries from index from up to, and without, index to, with
// what proves them, to w. Where to is 0, it ends with what the newest
// checkpoint covers. It reads the log twice. ErrNoCheckpoint, ErrNoEntry, ErrPruned.
func Export(ctx context.Context, dir string, from, to uint64, w io.Writer) (ExportReport, error) {
	walk, err := openWalk(dir, 0)
	if err != nil {
		return ExportReport{}, err
	}
	defer walk.close()
	if to == 0 {
		to = walk.size
	}
	if from >= to || to > walk.size {
		return ExportReport{}, fmt.Errorf("entries %d to %d of %d: %w", from, to, walk.size, ErrNoEntry)
	}
	left, right := cover(0, from), cover(to, walk.size)
	walk.want(left...)
	walk.want(right...)
	if err := walk.run(ctx, nil); err != nil {
		return ExportReport{}, err
	}
	for _, p := range walk.v.pruned {
		if p.First < to && p.First+p.Entries > from && p.Kept < p.Entries {
			return ExportReport{}, fmt.Errorf("entries %d to %d, segment %d: %w", max(from, p.First), min(to, p.First+p.Entries)-1, p.Segment, ErrPruned)
		}
	}
	out := bufio.NewWriter(w)
	enc := json.NewEncoder(out)
	if err := enc.Encode(exportHeader{Format: exportFormat, From: from, To: to, Checkpoint: string(walk.signed),
		Left: walk.hashesOf(left), Right: walk.hashesOf(right)}); err != nil {
		return ExportReport{}, err
	}
	err = Read(dir, from, func(e *Entry) error {
		if e.Index >= to {
			return io.EOF
		}
		b, err := e.MarshalBinary()
		if err != nil {
			return err
		}
		return errors.Join(enc.Encode(b), ctx.Err())
	})
	if err != nil && err != io.EOF {
		return ExportReport{}, err
	}
	c, err := checkpoint.Parse(walk.signed)
	if err != nil {
		return ExportReport{}, err
	}
	return ExportReport{From: from, To: to, Checkpoint: c}, out.Flush()
}

func (w *walk) hashesOf(nodes []node) [][]byte {
	out := [][]byte{}
	for _, n := range nodes {
		h := w.nodes[n]
		out = append(out, h[:])
	}
	return out
}

// VerifyExport reads an export and calls visit, if it is not nil, with each
// entry; nothing of it may be believed before VerifyExport returns nil. check
// decides on the checkpoint's signature. Entries that do not lead to the
// checkpoint are checkpoint.ErrProof; what is not an export,
// checkpoint.ErrMalformed.
func VerifyExport(ctx context.Context, r io.Reader, check func(signed []byte) error, visit func(*Entry) error) (ExportReport, error) {
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, maxExportLine)
	h, err := exportHead(lines)
	if err != nil {
		return ExportReport{}, err
	}
	c, err := checkpoint.Parse([]byte(h.Checkpoint))
	if err != nil {
		return ExportReport{}, err
	}
	if err := check([]byte(h.Checkpoint)); err != nil {
		return ExportReport{}, err
	}
	if h.From >= h.To || h.To > c.Size {
		return ExportReport{}, fmt.Errorf("entries %d to %d of %d: %w", h.From, h.To, c.Size, checkpoint.ErrMalformed)
	}
	left, err := toHashes(h.Left)
	if err != nil {
		return ExportReport{}, err
	}
	right, err := toHashes(h.Right)
	if err != nil {
		return ExportReport{}, err
	}
	root, err := rebuild(h.From, h.To, c.Size, left, right, func(t *tree) error {
		for t.size < h.To {
			b, err := exportedEntry(ctx, lines, t.size, visit)
			if err != nil {
				return err
			}
			t.add(tlog.RecordHash(b))
		}
		return nil
	})
	if err != nil {
		return ExportReport{}, err
	}
	if lines.Scan() || lines.Err() != nil {
		return ExportReport{}, fmt.Errorf("something follows the last entry: %w", checkpoint.ErrMalformed)
	}
	if root != c.Root {
		return ExportReport{}, fmt.Errorf("the entries %d to %d are not those of the checkpoint of %d: %w", h.From, h.To, c.Size, checkpoint.ErrProof)
	}
	return ExportReport{From: h.From, To: h.To, Checkpoint: c}, nil
}

func exportHead(lines *bufio.Scanner) (exportHeader, error) {
	var h exportHeader
	if !lines.Scan() {
		return h, fmt.Errorf("not an audit export: %w", checkpoint.ErrMalformed)
	}
	if err := json.Unmarshal(lines.Bytes(), &h); err != nil || h.Format != exportFormat {
		return h, fmt.Errorf("not an audit export of the form %s: %w", exportFormat, checkpoint.ErrMalformed)
	}
	return h, nil
}

// exportedEntry reads the line of the entry with that index.
func exportedEntry(ctx context.Context, lines *bufio.Scanner, index uint64, visit func(*Entry) error) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if !lines.Scan() {
		return nil, fmt.Errorf("the export ends before entry %d: %w", index, checkpoint.ErrMalformed)
	}
	var b []byte
	if err := json.Unmarshal(lines.Bytes(), &b); err != nil {
		return nil, fmt.Errorf("entry %d: %v: %w", index, err, checkpoint.ErrMalformed)
	}
	e, err := UnmarshalEntry(b)
	if err == nil && e.Index != index {
		err = fmt.Errorf("entry %d is in its place", e.Index)
	}
	if err != nil {
		return nil, fmt.Errorf("entry %d: %v: %w", index, err, checkpoint.ErrMalformed)
	}
	if visit != nil {
		err = visit(&e)
	}
	return b, err
}

func toHashes(in [][]byte) ([]tlog.Hash, error) {
	out := make([]tlog.Hash, len(in))
	for i, b := range in {
		if len(b) != tlog.HashSize {
			return nil, fmt.Errorf("a hash of %d bytes: %w", len(b), checkpoint.ErrMalformed)
		}
		out[i] = tlog.Hash(b)
	}
	return out, nil
}
