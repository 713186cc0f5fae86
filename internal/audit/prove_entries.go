package audit

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/mod/sumdb/tlog"
)

// ProveEntries proves several entries to one checkpoint: the first that covers
// them all, so that the same entries have the same proofs for ever. It reads
// and checks the log up to there, once. ErrNoCheckpoint, ErrNoEntry, ErrPruned.
func ProveEntries(ctx context.Context, dir string, indexes []uint64) ([]Proof, error) {
	if len(indexes) == 0 {
		return nil, fmt.Errorf("none is asked for: %w", ErrNoEntry)
	}
	size, err := firstSigned(dir, slices.Max(indexes))
	if err != nil {
		return nil, err
	}
	w, err := openWalk(dir, size)
	if err != nil {
		return nil, err
	}
	defer w.close()
	w.v.decode = func(i uint64) bool { return slices.Contains(indexes, i) }
	for _, i := range indexes {
		w.want(node{0, i})
		// It only says what it would need.
		if _, err := tlog.ProveRecord(int64(size), int64(i), tlog.HashReaderFunc(func(stored []int64) ([]tlog.Hash, error) {
			for _, s := range stored {
				w.want(storedNode(s))
			}
			return make([]tlog.Hash, len(stored)), nil
		})); err != nil {
			return nil, err
		}
	}
	entries := map[uint64]Entry{}
	if err := w.run(ctx, func(e *Entry) error {
		if slices.Contains(indexes, e.Index) {
			entries[e.Index] = *e
		}
		return nil
	}); err != nil {
		return nil, err
	}
	proofs := make([]Proof, len(indexes))
	for n, i := range indexes {
		if _, there := entries[i]; !there {
			return nil, fmt.Errorf("entry %d: %w", i, ErrPruned)
		}
		hashes, err := tlog.ProveRecord(int64(size), int64(i), tlog.HashReaderFunc(w.stored))
		if err != nil {
			return nil, err
		}
		p := Proof{Entry: entries[i], LeafHash: w.nodes[node{0, i}], Checkpoint: w.signed}
		for _, h := range hashes {
			p.Hashes = append(p.Hashes, h)
		}
		proofs[n] = p
	}
	return proofs, nil
}

// stored returns hashes that the walk has kept.
func (w *walk) stored(indexes []int64) ([]tlog.Hash, error) {
	out := make([]tlog.Hash, len(indexes))
	for j, i := range indexes {
		out[j] = w.nodes[storedNode(i)]
	}
	return out, nil
}

// firstSigned is the size of the first checkpoint that covers an entry.
func firstSigned(dir string, index uint64) (uint64, error) {
	s, err := openLogAt(dir, index)
	if err != nil {
		return 0, err
	}
	defer s.close()
	for s.skip(index) {
	}
	for {
		h, _, err := s.next()
		if err != nil {
			return 0, errors.Join(fmt.Errorf("entry %d: %w", index, ErrNoCheckpoint), err)
		}
		if h.signed && s.index > index {
			return s.index, nil
		}
	}
}
