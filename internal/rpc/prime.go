package rpc

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"net"
	"sync"
	"sync/atomic"
)

// primers keep plaintext out of what crypto/tls leaves behind.
//
// It encrypts a record in place, in a buffer of a pool. A buffer that is too
// small grows while it holds the record in clear, and what it grew out of stays
// in the heap as it was, with the keys of an answer (Go 1.26, conn.go:
// outBufPool and halfConn.encrypt). So just before an answer is written, as many
// zeros are written to a TLS connection that leads nowhere: its buffer grows
// instead and is put where the next Write of this processor takes it from. In
// the rare case that the goroutine is moved in between, nothing is lost but the
// precaution.
type primers struct {
	next atomic.Uint32
	list []*primer
}

type primer struct {
	mu   sync.Mutex // held while conn is written to
	conn *tls.Conn
}

// Room for a record of p and its overhead: a header of 5 bytes, the content
// type, a tag of 16 bytes.
const (
	primeSlack = 64
	primeMax   = 16 << 10 // the largest record
)

var zeros [primeMax]byte

// newPrimers makes n connections to nowhere.
func newPrimers(n int) (*primers, error) {
	config, err := nowhereConfig()
	if err != nil {
		return nil, fmt.Errorf("make a TLS connection to nowhere: %w", err)
	}
	p := &primers{}
	for range n {
		conn, err := dialNowhere(config)
		if err != nil {
			return nil, fmt.Errorf("make a TLS connection to nowhere: %w", err)
		}
		p.list = append(p.list, &primer{conn: conn})
	}
	return p, nil
}

// prime makes a buffer of crypto/tls ready for a write of n bytes.
func (p *primers) prime(n int) {
	to := p.list[int(p.next.Add(1)%uint32(len(p.list)))]
	to.mu.Lock()
	defer to.mu.Unlock()
	to.conn.Write(zeros[:min(n+primeSlack, primeMax)])
}

// dialNowhere returns the server's end of a TLS connection whose other end is
// forgotten.
func dialNowhere(config *tls.Config) (*tls.Conn, error) {
	near, far := net.Pipe()
	out := &nowhere{Conn: near}
	server, client := tls.Server(out, config), tls.Client(far, config)
	greeted := make(chan error, 1)
	go func() { greeted <- client.Handshake(); far.Close() }()
	err := server.Handshake()
	if err = errors.Join(err, <-greeted); err != nil {
		return nil, err
	}
	out.open.Store(true)
	return server, nil
}

// A nowhere is a connection that swallows what is written once it is open.
type nowhere struct {
	net.Conn
	open atomic.Bool
}

func (c *nowhere) Write(b []byte) (int, error) {
	if c.open.Load() {
		return len(b), nil
	}
	return c.Conn.Write(b)
}

// nowhereConfig is good for both ends. Its key protects nothing.
func nowhereConfig() (*tls.Config, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"nowhere.invalid"}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	return &tls.Config{
		MinVersion:                  tls.VersionTLS13,
		Certificates:                []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}},
		InsecureSkipVerify:          true, // nobody is there to be verified
		SessionTicketsDisabled:      true,
		DynamicRecordSizingDisabled: true,
	}, nil
}
