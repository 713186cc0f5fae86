package audit

import (
	"context"
	"errors"
	"fmt"
	"io"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/keycustody/custodian/internal/checkpoint"
)

var (
	// ErrNoCheckpoint means that a log has no checkpoint, or none of the size
	// that was asked for.
	ErrNoCheckpoint = errors.New("the log has no such checkpoint")

	// ErrNoEntry means that the checkpoint does not cover an entry.
	ErrNoEntry = errors.New("the checkpoint covers no such entry")

	// ErrPruned means that of an entry, or a checkpoint, only the hash is left.
	ErrPruned = errors.New("it is in a segment that was pruned")
)

// A Proof leads from an entry to a checkpoint.
type Proof struct {
	Entry      Entry // only its Index where Pruned
	Pruned     bool  // nothing is left of the entry but the leaf hash
	LeafHash   [32]byte
	Hashes     [][32]byte // inclusion proof of RFC 6962, section 2.1.1
	Checkpoint []byte
}

// ProveInclusion proves that the entry with that index is in the log, to the
// checkpoint of that size, or to the newest one where size is 0. It reads and
// checks the log up to there. ErrNoCheckpoint, ErrNoEntry.
func ProveInclusion(ctx context.Context, dir string, index, size uint64) (Proof, error) {
	w, err := openWalk(dir, size)
	if err != nil {
		return Proof{}, err
	}
	defer w.close()
	if index >= w.size {
		return Proof{}, fmt.Errorf("entry %d of %d: %w", index, w.size, ErrNoEntry)
	}
	p := Proof{Entry: Entry{Index: index}, Pruned: true}
	w.v.decode = func(i uint64) bool { return i == index }
	prove := func(r tlog.HashReader) ([]tlog.Hash, error) { return tlog.ProveRecord(int64(w.size), int64(index), r) }
	w.want(node{0, index})
	hashes, err := w.prove(ctx, prove, func(e *Entry) error {
		if e.Index == index {
			p.Entry, p.Pruned = *e, false
		}
		return nil
	})
	if err != nil {
		return Proof{}, err
	}
	p.LeafHash, p.Hashes, p.Checkpoint = w.nodes[node{0, index}], hashes, w.signed
	return p, nil
}

// ProveConsistency proves that the log of old entries is the beginning of the
// log of size entries (RFC 6962, section 2.1.2), and returns the checkpoint of
// size, or the newest one where size is 0; nil where that one was pruned.
// ErrNoCheckpoint, ErrNoEntry.
func ProveConsistency(ctx context.Context, dir string, old, size uint64) (hashes [][32]byte, signed []byte, err error) {
	w, err := openWalk(dir, size)
	if err != nil {
		return nil, nil, err
	}
	defer w.close()
	if old > w.size || old == 0 {
		return nil, nil, fmt.Errorf("%d entries of %d: %w", old, w.size, ErrNoEntry)
	}
	w.bare = true
	hashes, err = w.prove(ctx, func(r tlog.HashReader) ([]tlog.Hash, error) {
		return tlog.ProveTree(int64(w.size), int64(old), r)
	}, nil)
	return hashes, w.signed, err
}

// A walk goes over a log up to a checkpoint and keeps the hashes of some
// complete subtrees, so that it needs little memory.
type walk struct {
	v      *verifier
	size   uint64 // of the checkpoint
	signed []byte // the checkpoint
	bare   bool   // it is no fault where the checkpoint was pruned
	nodes  map[node]tlog.Hash
}

// openWalk finds the checkpoint of that size, or the newest one for 0.
func openWalk(dir string, size uint64) (*walk, error) {
	if size == 0 {
		var err error
		if size, err = newestSigned(dir); err != nil {
			return nil, err
		}
	}
	s, err := openLog(dir, true)
	if err != nil {
		return nil, err
	}
	v, err := newVerifier(s, nil)
	if err != nil {
		s.close()
		return nil, err
	}
	w := &walk{v: v, size: size, nodes: map[node]tlog.Hash{}}
	v.decode = func(uint64) bool { return false } // the root says that they are what was signed
	w.v.tree.keep = func(n node, h tlog.Hash) {
		if _, wanted := w.nodes[n]; wanted {
			w.nodes[n] = h
		}
	}
	return w, nil
}

// newestSigned returns how many entries the newest checkpoint covers, from the
// headers of the batches alone.
func newestSigned(dir string) (uint64, error) {
	s, err := openLogAt(dir, 1<<63-1)
	if err != nil {
		return 0, err
	}
	defer s.close()
	for s.skip(1<<63 - 1) {
	}
	if !s.sealed {
		return 0, ErrNoCheckpoint
	}
	return s.index, nil
}

func (w *walk) close() { w.v.scanner.close() }

func (w *walk) want(nodes ...node) {
	for _, n := range nodes {
		w.nodes[n] = tlog.Hash{}
	}
}

// run reads and checks the log up to the checkpoint.
func (w *walk) run(ctx context.Context, visit func(*Entry) error) error {
	for w.v.tree.size < w.size {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := w.v.next(visit); err == io.EOF {
			break
		} else if err != nil {
			return err
		}
	}
	if n := len(w.v.pruned); n > 0 && w.v.tree.size > w.size && w.v.pruned[n-1].First+w.v.pruned[n-1].Entries > w.size {
		if w.bare {
			return nil
		}
		return fmt.Errorf("of %d entries, segment %d: %w: %w", w.size, w.v.pruned[n-1].Segment, ErrPruned, ErrNoCheckpoint)
	}
	if w.v.tree.size != w.size || w.v.checkpoint == nil {
		return fmt.Errorf("of %d entries: %w", w.size, ErrNoCheckpoint)
	}
	w.signed = w.v.checkpoint
	return nil
}

// prove runs and then makes a proof of what it kept.
func (w *walk) prove(ctx context.Context, prove func(tlog.HashReader) ([]tlog.Hash, error), visit func(*Entry) error) ([][32]byte, error) {
	// First it only says what it would need.
	if _, err := prove(tlog.HashReaderFunc(func(indexes []int64) ([]tlog.Hash, error) {
		for _, i := range indexes {
			w.want(storedNode(i))
		}
		return make([]tlog.Hash, len(indexes)), nil
	})); err != nil {
		return nil, err
	}
	if err := w.run(ctx, visit); err != nil {
		return nil, err
	}
	hashes, err := prove(tlog.HashReaderFunc(func(indexes []int64) ([]tlog.Hash, error) {
		out := make([]tlog.Hash, len(indexes))
		for j, i := range indexes {
			out[j] = w.nodes[storedNode(i)]
		}
		return out, nil
	}))
	out := make([][32]byte, len(hashes))
	for i := range hashes {
		out[i] = hashes[i]
	}
	return out, err
}

// storedNode is the subtree that package tlog calls by that index.
func storedNode(index int64) node {
	level, n := tlog.SplitStoredHashIndex(index)
	return node{level, uint64(n)}
}

// rebuild returns the root of a tree of size leaves: left are the subtrees that
// cover the leaves before first, leaves adds those up to end, and right are the
// subtrees that cover the others.
func rebuild(first, end, size uint64, left, right []tlog.Hash, leaves func(*tree) error) (tlog.Hash, error) {
	var t tree
	add := func(nodes []node, hashes []tlog.Hash) error {
		if len(nodes) != len(hashes) {
			return fmt.Errorf("%d hashes where %d belong: %w", len(hashes), len(nodes), checkpoint.ErrProof)
		}
		for i, n := range nodes {
			t.join(n.level, hashes[i])
		}
		return nil
	}
	if err := add(cover(0, first), left); err != nil {
		return tlog.Hash{}, err
	}
	if err := leaves(&t); err != nil {
		return tlog.Hash{}, err
	}
	if err := add(cover(end, size), right); err != nil {
		return tlog.Hash{}, err
	}
	return t.root(), nil
}
