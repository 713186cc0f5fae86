package certs

import (
	"crypto/sha256"
	"crypto/x509"
	"sync"
)

// cacheSize bounds a cache: far more callers than one daemon has, at a few
// hundred bytes each.
const cacheSize = 4096

// A cache remembers who presented which certificates. It belongs to one state,
// so a reload starts with an empty one. Refusals are not remembered.
type cache struct {
	mu sync.RWMutex
	m  map[[32]byte]identified
}

// cacheKey covers all that the peer presented: whether a leaf verifies depends
// on the intermediates that came with it.
func cacheKey(presented []*x509.Certificate) [32]byte {
	if len(presented) == 1 {
		return sha256.Sum256(presented[0].Raw)
	}
	h := sha256.New()
	for _, cert := range presented {
		h.Write(cert.Raw) // DER is self-delimiting
	}
	return [32]byte(h.Sum(nil))
}

func (c *cache) get(key [32]byte) (identified, bool) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	id, ok := c.m[key]
	return id, ok
}

func (c *cache) put(key [32]byte, id identified) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.m == nil {
		c.m = make(map[[32]byte]identified)
	}
	if len(c.m) >= cacheSize {
		for any := range c.m {
			delete(c.m, any)
			break
		}
	}
	c.m[key] = id
}
