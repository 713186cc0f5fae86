package certs

import (
	"crypto/x509"
	"slices"
	"sync"
)

// cacheSize bounds a cache: far more callers than one daemon has, at a few
// kilobytes each.
const cacheSize = 4096

// A cache remembers who presented which certificates. It belongs to one state,
// so a reload starts with an empty one. Refusals are not remembered.
//
// It compares certificates by their address: crypto/tls parses what a peer
// presents once a connection, and nobody changes it after that. An entry keeps
// its certificates, so that their addresses stay theirs.
type cache struct {
	mu sync.RWMutex
	m  map[*x509.Certificate]cached // by the leaf
}

// A cached is for all that the peer presented: whether a leaf verifies depends
// on the intermediates that came with it.
type cached struct {
	presented []*x509.Certificate
	who       identified
}

func (c *cache) get(presented []*x509.Certificate) (identified, bool) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	e, ok := c.m[presented[0]]
	if !ok || !slices.Equal(e.presented, presented) {
		return identified{}, false
	}
	return e.who, true
}

func (c *cache) put(presented []*x509.Certificate, who identified) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.m == nil {
		c.m = make(map[*x509.Certificate]cached)
	}
	if len(c.m) >= cacheSize {
		for any := range c.m {
			delete(c.m, any)
			break
		}
	}
	c.m[presented[0]] = cached{slices.Clone(presented), who}
}
