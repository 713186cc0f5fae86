package certs_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/keycustody/custodian/certs"
)

const trustDomain = "media.test"

// A clock stands still until a test moves it.
type clock struct{ t atomic.Pointer[time.Time] }

func newClock() *clock {
	c := &clock{}
	// Certificates count in seconds.
	now := time.Now().Truncate(time.Second)
	c.t.Store(&now)
	return c
}

func (c *clock) Now() time.Time { return *c.t.Load() }

func (c *clock) Set(to time.Time) { c.t.Store(&to) }

func (c *clock) Advance(d time.Duration) { c.Set(c.Now().Add(d)) }

func openAuthority(t testing.TB, domain string, clk *clock) *certs.Authority {
	t.Helper()
	a, err := certs.OpenAuthority(filepath.Join(t.TempDir(), "pki"), domain)
	if err != nil {
		t.Fatal(err)
	}
	a.Now = clk.Now
	return a
}

// A bench is a server with one client CA, and what it is made of.
type bench struct {
	clk  *clock
	ca   *certs.Authority
	opts certs.ServerOptions
}

func newBench(t testing.TB) *bench {
	t.Helper()
	clk := newClock()
	b := &bench{clk: clk, ca: openAuthority(t, trustDomain, clk)}
	pair, err := b.ca.IssueServer([]string{"localhost"}, []net.IP{net.IPv4(127, 0, 0, 1)}, 30*24*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	b.opts = certs.ServerOptions{
		CertFile: pair.CertFile, KeyFile: pair.KeyFile, Now: clk.Now,
		CAs: []certs.CA{{
			Name: "own", File: b.ca.CertFile(), CRLFile: b.ca.CRLFile(),
			TrustDomain: trustDomain, DNSNames: []string{"drm.example", "Backup.drm.example"}, Roles: []string{"packager"},
		}},
	}
	return b
}

func (b *bench) server(t testing.TB) *certs.Server {
	t.Helper()
	s, err := certs.NewServer(b.opts)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// client returns the configuration of a client whose certificate is as change
// makes it.
func (b *bench) client(t testing.TB, change func(*x509.Certificate)) *tls.Config {
	t.Helper()
	return clientOf(t, b.ca, b, change)
}

func clientOf(t testing.TB, ca *certs.Authority, b *bench, change func(*x509.Certificate)) *tls.Config {
	t.Helper()
	certPEM, keyPEM, err := ca.Issue(change)
	if err != nil {
		t.Fatal(err)
	}
	return b.config(t, certPEM, keyPEM)
}

func (b *bench) config(t testing.TB, certPEM, keyPEM []byte) *tls.Config {
	t.Helper()
	pair, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(readFile(t, b.ca.CertFile())) {
		t.Fatal("no CA certificate")
	}
	return &tls.Config{
		RootCAs: pool, ServerName: "localhost", Time: b.clk.Now,
		// Sent whatever the server says it accepts.
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil },
	}
}

// named makes a client certificate with these URI names.
func named(uris ...string) func(*x509.Certificate) {
	return func(c *x509.Certificate) {
		for _, u := range uris {
			c.URIs = append(c.URIs, rawURI(u))
		}
	}
}

// rawURI is a URL that is written into a certificate as it stands.
func rawURI(s string) *url.URL {
	scheme, rest, _ := strings.Cut(s, ":")
	return &url.URL{Scheme: scheme, Opaque: rest}
}

const alpha = "spiffe://media.test/packager/alpha"

// connect makes one TLS connection over loopback and returns the server's end of
// it, with the errors of both ends.
func connect(t testing.TB, server, client *tls.Config) (conn *tls.Conn, serverErr, clientErr error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	dialled := make(chan error, 1)
	go func() {
		raw, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			dialled <- err
			return
		}
		t.Cleanup(func() { raw.Close() })
		raw.SetDeadline(time.Now().Add(10 * time.Second))
		tc := tls.Client(raw, client)
		if err = tc.HandshakeContext(ctx); err == nil {
			// The verdict on a TLS 1.3 client certificate, and session tickets,
			// come with the first read.
			_, err = tc.Read(make([]byte, 1))
		}
		if err != nil {
			raw.Close()
		}
		dialled <- err
	}()
	raw, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { raw.Close() })
	conn = tls.Server(raw, server)
	if serverErr = conn.HandshakeContext(ctx); serverErr == nil {
		if _, err := conn.Write([]byte{1}); err != nil {
			t.Fatal(err)
		}
	} else {
		raw.Close()
	}
	return conn, serverErr, <-dialled
}

// accepted connects a client that must be accepted and returns its state.
func accepted(t testing.TB, s *certs.Server, client *tls.Config) tls.ConnectionState {
	t.Helper()
	conn, serverErr, clientErr := connect(t, s.TLSConfig(), client)
	if serverErr != nil || clientErr != nil {
		t.Fatalf("connect: server %v, client %v", serverErr, clientErr)
	}
	return conn.ConnectionState()
}

func readFile(t testing.TB, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func writeFile(t testing.TB, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}
