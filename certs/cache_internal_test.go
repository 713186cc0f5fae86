package certs

import (
	"encoding/binary"
	"testing"
)

// The bound of a cache shows nowhere outside.
func TestCacheIsBounded(t *testing.T) {
	var c cache
	var key [32]byte
	for i := range uint64(cacheSize + 100) {
		binary.BigEndian.PutUint64(key[:], i)
		c.put(key, identified{})
		if _, ok := c.get(key); !ok {
			t.Fatalf("entry %d: not there after put", i)
		}
	}
	if got := len(c.m); got != cacheSize {
		t.Errorf("got %d entries, want %d", got, cacheSize)
	}
}
