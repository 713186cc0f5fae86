package certs

import (
	"crypto/x509"
	"testing"
)

func TestCacheIsBounded(t *testing.T) {
	var c cache
	for range cacheSize + 100 {
		c.put([]*x509.Certificate{{}}, identified{})
	}
	if got := len(c.m); got != cacheSize {
		t.Errorf("got %d entries, want %d", got, cacheSize)
	}
}

// TestCacheIsOfAllThatWasPresented: the same leaf with other intermediates has
// to be verified anew.
func TestCacheIsOfAllThatWasPresented(t *testing.T) {
	var c cache
	leaf, issuer, other := &x509.Certificate{}, &x509.Certificate{}, &x509.Certificate{}
	c.put([]*x509.Certificate{leaf, issuer}, identified{peer: Peer{Name: "a"}})
	for _, tt := range []struct {
		name      string
		presented []*x509.Certificate
		want      bool
	}{
		{"the same", []*x509.Certificate{leaf, issuer}, true},
		{"another intermediate", []*x509.Certificate{leaf, other}, false},
		{"none", []*x509.Certificate{leaf}, false},
		{"another leaf", []*x509.Certificate{other, issuer}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if _, got := c.get(tt.presented); got != tt.want {
				t.Errorf("got %t, want %t", got, tt.want)
			}
		})
	}
}
