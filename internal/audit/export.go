package audit

import (
	"bufio"
	"bytes"
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

	// Since is an older checkpoint, and Consistency the proof that the
	// checkpoint continues it; both absent where nobody asked.
	Since       string   `json:"since,omitempty"`
	Consistency [][]byte `json:"consistency,omitempty"`
}

// An ExportReport says what an export holds.
type ExportReport struct {
	From, To   uint64 // entries From to To-1
	Checkpoint checkpoint.Checkpoint
	Since      checkpoint.Checkpoint // which the other one continues; zero where that is not shown
}

// Export writes the entries from index from up to, and without, index to, with
// what proves them, to w. Where to is 0, it ends with what the newest
// checkpoint covers. Where since, an older checkpoint, is not nil, the export shows
// that the log continues it. It reads the log twice. ErrNoCheckpoint, ErrNoEntry,
// ErrPruned, checkpoint.ErrProof.
func Export(ctx context.Context, dir string, from, to uint64, since []byte, w io.Writer) (ExportReport, error) {
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
	h := exportHeader{Format: exportFormat, From: from, To: to, Since: string(since)}
	if since == nil {
		err = walk.run(ctx, nil)
	} else {
		h.Consistency, err = walk.proveSince(ctx, since)
	}
	if err != nil {
		return ExportReport{}, err
	}
	for _, p := range walk.v.pruned {
		if p.First < to && p.First+p.Entries > from && p.Kept < p.Entries {
			return ExportReport{}, fmt.Errorf("entries %d to %d, segment %d: %w", max(from, p.First), min(to, p.First+p.Entries)-1, p.Segment, ErrPruned)
		}
	}
	out := bufio.NewWriter(w)
	enc := json.NewEncoder(out)
	h.Checkpoint, h.Left, h.Right = string(walk.signed), walk.hashesOf(left), walk.hashesOf(right)
	if err := enc.Encode(h); err != nil {
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
	r := ExportReport{From: from, To: to}
	if r.Checkpoint, err = checkpoint.Parse(walk.signed); err == nil && since != nil {
		r.Since, err = checkpoint.Parse(since)
	}
	return r, errors.Join(err, out.Flush())
}

// proveSince proves that the checkpoint of the walk continues an older one.
func (w *walk) proveSince(ctx context.Context, since []byte) ([][]byte, error) {
	old, err := checkpoint.Parse(since)
	if err != nil {
		return nil, err
	}
	if old.Size == 0 || old.Size > w.size {
		return nil, fmt.Errorf("the checkpoint of %d entries is not older than the newest, of %d: %w", old.Size, w.size, checkpoint.ErrProof)
	}
	hashes, err := w.prove(ctx, func(r tlog.HashReader) ([]tlog.Hash, error) {
		return tlog.ProveTree(int64(w.size), int64(old.Size), r)
	}, nil)
	if err != nil {
		return nil, err
	}
	c, err := checkpoint.Parse(w.signed)
	if err == nil {
		err = c.CheckConsistency(old, hashes)
	}
	out := make([][]byte, len(hashes))
	for i := range hashes {
		out[i] = hashes[i][:]
	}
	return out, err
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
func VerifyExport(ctx context.Context, in io.Reader, check func(signed []byte) error, visit func(*Entry) error) (ExportReport, error) {
	lines := bufio.NewScanner(in)
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
	r := ExportReport{From: h.From, To: h.To, Checkpoint: c}
	if h.Since != "" {
		if r.Since, err = h.since(c, check); err != nil {
			return ExportReport{}, err
		}
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
	return r, nil
}

// since checks that c continues the older checkpoint of the export.
func (h *exportHeader) since(c checkpoint.Checkpoint, check func(signed []byte) error) (checkpoint.Checkpoint, error) {
	old, err := checkpoint.Parse([]byte(h.Since))
	if err != nil {
		return old, err
	}
	if err := check([]byte(h.Since)); err != nil {
		return old, err
	}
	hashes, err := toHashes(h.Consistency)
	if err != nil {
		return old, err
	}
	proof := make([][32]byte, len(hashes))
	for i := range hashes {
		proof[i] = hashes[i]
	}
	return old, c.CheckConsistency(old, proof)
}

func exportHead(lines *bufio.Scanner) (exportHeader, error) {
	var h exportHeader
	if !lines.Scan() {
		return h, fmt.Errorf("not an audit export: %w", checkpoint.ErrMalformed)
	}
	dec := json.NewDecoder(bytes.NewReader(lines.Bytes()))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&h); err != nil || h.Format != exportFormat || dec.More() {
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
