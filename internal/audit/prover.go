package audit

import (
	"context"
	"fmt"
	"slices"
	"sync"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/keycustody/custodian/internal/checkpoint"
)

// maxProved is how many trees a Prover remembers, each of them below 2 KiB.
const maxProved = 64

// A Prover makes one consistency proof after the other of a log that grows. It
// remembers the trees that it has proved to, so that a proof from one of them
// reads only what was added since. Its methods may be called from any
// goroutine.
type Prover struct {
	dir string

	mu    sync.Mutex // one proof at a time, and guards the field below
	trees []tree     // the newest last
}

// NewProver returns a Prover of the log in dir.
func NewProver(dir string) *Prover { return &Prover{dir: dir} }

// Consistency proves that the log of old entries, at least one, is the beginning
// of the log of c, a checkpoint of its own that is durable. The log must lead to
// the root of c: a DamageError says that it does not. ErrNoEntry.
func (p *Prover) Consistency(ctx context.Context, old uint64, c checkpoint.Checkpoint) ([][32]byte, error) {
	if old == 0 || old > c.Size {
		return nil, fmt.Errorf("%d entries of %d: %w", old, c.Size, ErrNoEntry)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	g := stretch{nodes: map[node]tlog.Hash{}}
	if i := slices.IndexFunc(p.trees, func(t tree) bool { return t.size == old }); i >= 0 {
		g.start(p.trees[i])
	}
	prove := func(r tlog.HashReader) ([]tlog.Hash, error) { return tlog.ProveTree(int64(c.Size), int64(old), r) }
	if _, err := prove(tlog.HashReaderFunc(g.want)); err != nil {
		return nil, err
	}
	if err := g.run(ctx, p.dir, c.Size); err != nil {
		return nil, err
	}
	if root := g.tree.root(); g.tree.size != c.Size || root != c.Root {
		return nil, &DamageError{Path: p.dir, Index: g.tree.size, Problem: fmt.Errorf("its %d entries do not lead to the root of the checkpoint of %d", g.tree.size, c.Size)}
	}
	hashes, err := prove(tlog.HashReaderFunc(g.have))
	if err != nil {
		return nil, err
	}
	p.remember(g.tree)
	out := make([][32]byte, len(hashes))
	for i := range hashes {
		out[i] = hashes[i]
	}
	return out, nil
}

// remember keeps a tree, and forgets the oldest where there are too many.
func (p *Prover) remember(t tree) {
	t.keep = nil
	p.trees = slices.DeleteFunc(p.trees, func(o tree) bool { return o.size == t.size })
	p.trees = append(p.trees, t)
	if len(p.trees) > maxProved {
		p.trees = slices.Delete(p.trees, 0, len(p.trees)-maxProved)
	}
}

// A stretch goes from one tree to a later one and keeps the hashes of some
// complete subtrees.
type stretch struct {
	tree  tree
	nodes map[node]tlog.Hash
}

// start begins with a tree that is known, and its right edge.
func (g *stretch) start(t tree) {
	g.tree = tree{size: t.size, edge: slices.Clone(t.edge)}
	for i, n := range cover(0, t.size) {
		g.nodes[n] = t.edge[i]
	}
}

// want marks hashes to be kept, and has those that are there already.
func (g *stretch) want(indexes []int64) ([]tlog.Hash, error) {
	for _, i := range indexes {
		if n := storedNode(i); g.nodes[n] == (tlog.Hash{}) {
			g.nodes[n] = tlog.Hash{}
		}
	}
	return make([]tlog.Hash, len(indexes)), nil
}

// run reads what the log has from the tree on, up to size.
func (g *stretch) run(ctx context.Context, dir string, size uint64) error {
	g.tree.keep = func(n node, h tlog.Hash) {
		if _, wanted := g.nodes[n]; wanted {
			g.nodes[n] = h
		}
	}
	t, err := OpenTail(dir, g.tree.size)
	if err != nil {
		return err
	}
	defer t.Close()
	return t.next(size, func(leaf tlog.Hash) {
		if g.tree.size < size {
			g.tree.add(leaf)
		}
	}, func(*Entry) error { return ctx.Err() })
}

func (g *stretch) have(indexes []int64) ([]tlog.Hash, error) {
	out := make([]tlog.Hash, len(indexes))
	for j, i := range indexes {
		out[j] = g.nodes[storedNode(i)]
	}
	return out, nil
}
