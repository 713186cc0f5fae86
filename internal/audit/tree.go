package audit

import (
	"crypto/sha256"

	"golang.org/x/mod/sumdb/tlog"
)

// A tree is the right edge of an RFC 6962 Merkle tree: the hashes of the
// largest complete subtrees, from left to right. It is all that is needed to
// add leaves and to know the root. Its zero value is the empty tree.
type tree struct {
	size uint64
	edge []tlog.Hash // one for each bit that is set in size
}

// add makes leaf the last one.
func (t *tree) add(leaf tlog.Hash) {
	h := leaf
	for n := t.size; n&1 == 1; n >>= 1 {
		last := len(t.edge) - 1
		h = tlog.NodeHash(t.edge[last], h)
		t.edge = t.edge[:last]
	}
	t.edge = append(t.edge, h)
	t.size++
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
