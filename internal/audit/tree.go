package audit

import (
	"crypto/sha256"
	"math/bits"

	"golang.org/x/mod/sumdb/tlog"
)

// A tree is the right edge of an RFC 6962 Merkle tree: the hashes of the
// largest complete subtrees, from left to right. It is all that is needed to
// add leaves and to know the root. Its zero value is the empty tree.
type tree struct {
	size uint64
	edge []tlog.Hash // one for each bit that is set in size

	// keep, if it is not nil, is called with each complete subtree.
	keep func(node, tlog.Hash)
}

// A node is a complete subtree: of 1<<level leaves, index<<level before it.
type node struct {
	level int
	index uint64
}

// add makes leaf the last one.
func (t *tree) add(leaf tlog.Hash) { t.join(0, leaf) }

// join puts a complete subtree of 1<<level leaves behind the last leaf. size
// must be a multiple of its number of leaves.
func (t *tree) join(level int, h tlog.Hash) {
	at := node{level, t.size >> level}
	for ; at.index&1 == 1; at = (node{at.level + 1, at.index >> 1}) {
		t.tell(at, h)
		last := len(t.edge) - 1
		h = tlog.NodeHash(t.edge[last], h)
		t.edge = t.edge[:last]
	}
	t.tell(at, h)
	t.edge = append(t.edge, h)
	t.size += 1 << level
}

func (t *tree) tell(at node, h tlog.Hash) {
	if t.keep != nil {
		t.keep(at, h)
	}
}

// cover returns the fewest complete subtrees that have the leaves from first up
// to end, from left to right.
func cover(first, end uint64) []node {
	var nodes []node
	for first < end {
		level := bits.Len64(end-first) - 1
		if first != 0 {
			level = min(level, bits.TrailingZeros64(first))
		}
		nodes = append(nodes, node{level, first >> level})
		first += 1 << level
	}
	return nodes
}

// root returns the hash of the whole tree.
func (t *tree) root() tlog.Hash {
	if t.size == 0 {
		return sha256.Sum256(nil)
	}
	last := len(t.edge) - 1
	h := t.edge[last]
	for i := last - 1; i >= 0; i-- {
		h = tlog.NodeHash(t.edge[i], h)
	}
	return h
}
