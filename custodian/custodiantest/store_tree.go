package custodiantest

import (
	"iter"
	"math/rand/v2"
)

// A tree is an ordered map that never changes: with and without return
// another one, which shares most nodes with it. It is a treap: a search tree
// by key and a heap by random priorities, so of logarithmic depth. The zero
// tree is empty.
type tree[K, V any] struct{ root *node[K, V] }

type node[K, V any] struct {
	key         K
	value       V
	priority    uint64
	left, right *node[K, V]
}

func (t tree[K, V]) get(key K, compare func(a, b K) int) (V, bool) {
	for n := t.root; n != nil; {
		c := compare(key, n.key)
		if c == 0 {
			return n.value, true
		}
		if c < 0 {
			n = n.left
		} else {
			n = n.right
		}
	}
	var none V
	return none, false
}

// next returns the first entry after key, or at key where inclusive.
func (t tree[K, V]) next(key K, inclusive bool, compare func(a, b K) int) (K, V, bool) {
	var found *node[K, V]
	for n := t.root; n != nil; {
		if c := compare(key, n.key); c < 0 || c == 0 && inclusive {
			found, n = n, n.left
		} else {
			n = n.right
		}
	}
	if found == nil {
		found = new(node[K, V])
		return found.key, found.value, false
	}
	return found.key, found.value, true
}

// from yields the entries from key on.
func (t tree[K, V]) from(key K, compare func(a, b K) int) iter.Seq2[K, V] {
	return func(yield func(K, V) bool) {
		k, v, ok := t.next(key, true, compare)
		for ok && yield(k, v) {
			k, v, ok = t.next(k, false, compare)
		}
	}
}

func (t tree[K, V]) with(key K, value V, compare func(a, b K) int) tree[K, V] {
	left, right := split(t.root, key, compare)
	n := &node[K, V]{key: key, value: value, priority: rand.Uint64()}
	return tree[K, V]{join(join(left, n), right)}
}

func (t tree[K, V]) without(key K, compare func(a, b K) int) tree[K, V] {
	return tree[K, V]{join(split(t.root, key, compare))}
}

// split returns what lies before key and what lies after it.
func split[K, V any](n *node[K, V], key K, compare func(a, b K) int) (left, right *node[K, V]) {
	if n == nil {
		return nil, nil
	}
	c := compare(key, n.key)
	if c == 0 {
		return n.left, n.right
	}
	m := *n
	if c < 0 {
		left, m.left = split(n.left, key, compare)
		return left, &m
	}
	m.right, right = split(n.right, key, compare)
	return &m, right
}

// join makes one tree of two, of which all of the first lies before the
// second.
func join[K, V any](left, right *node[K, V]) *node[K, V] {
	switch {
	case left == nil:
		return right
	case right == nil:
		return left
	case left.priority > right.priority:
		m := *left
		m.right = join(left.right, right)
		return &m
	}
	m := *right
	m.left = join(left, right.left)
	return &m
}
