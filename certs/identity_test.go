package certs_test

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/keycustody/custodian/certs"
)

func TestIdentity(t *testing.T) {
	dns := func(names ...string) func(*x509.Certificate) {
		return func(c *x509.Certificate) { c.DNSNames = names }
	}
	both := func(f, g func(*x509.Certificate)) func(*x509.Certificate) {
		return func(c *x509.Certificate) { f(c); g(c) }
	}
	usage := func(eku ...x509.ExtKeyUsage) func(*x509.Certificate) {
		return func(c *x509.Certificate) { c.ExtKeyUsage = eku }
	}
	tests := []struct {
		name   string
		change func(*x509.Certificate)
		want   string
		err    error
	}{
		{"spiffe", named(alpha), alpha, nil},
		{"spiffe and a DNS name that is not listed", both(named(alpha), dns("alpha.internal")), alpha, nil},
		{"listed DNS name", dns("drm.example"), "drm.example", nil},
		{"listed DNS name in other case", dns("BACKUP.DRM.example"), "backup.drm.example", nil},
		{"listed DNS name among others", dns("www.drm.example", "drm.example"), "drm.example", nil},

		{"no name", named(), "", certs.ErrNoIdentity},
		{"common name only", func(c *x509.Certificate) { c.Subject = pkix.Name{CommonName: "drm.example"} }, "", certs.ErrNoIdentity},
		{"common name that is a spiffe id", func(c *x509.Certificate) { c.Subject = pkix.Name{CommonName: alpha} }, "", certs.ErrNoIdentity},
		{"DNS name that is not listed", dns("evil.example"), "", certs.ErrNoIdentity},
		{"subdomain of a listed name", dns("x.drm.example"), "", certs.ErrNoIdentity},
		{"wildcard over a listed name", dns("*.example"), "", certs.ErrNoIdentity},
		{"e-mail address", func(c *x509.Certificate) { c.EmailAddresses = []string{"a@drm.example"} }, "", certs.ErrNoIdentity},
		{"IP address", func(c *x509.Certificate) { c.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1)} }, "", certs.ErrNoIdentity},

		{"two spiffe ids", named(alpha, "spiffe://media.test/packager/beta"), "", certs.ErrAmbiguousIdentity},
		{"one spiffe id twice", named(alpha, alpha), "", certs.ErrAmbiguousIdentity},
		{"spiffe id and another URI", named(alpha, "https://alpha.test/"), "", certs.ErrAmbiguousIdentity},
		{"spiffe id and listed DNS name", both(named(alpha), dns("drm.example")), "", certs.ErrAmbiguousIdentity},
		{"two listed DNS names", dns("drm.example", "backup.drm.example"), "", certs.ErrAmbiguousIdentity},

		{"another URI", named("https://media.test/packager/alpha"), "", certs.ErrNoIdentity},
		{"trust domain only", named("spiffe://media.test"), "", certs.ErrNoIdentity},
		{"empty path", named("spiffe://media.test/"), "", certs.ErrNoIdentity},
		{"trailing slash", named(alpha + "/"), "", certs.ErrNoIdentity},
		{"dot segments", named("spiffe://media.test/packager/../alpha"), "", certs.ErrNoIdentity},
		{"escaped slash", named("spiffe://media.test/packager%2Falpha"), "", certs.ErrNoIdentity},
		{"query", named(alpha + "?x=1"), "", certs.ErrNoIdentity},
		{"empty query", named(alpha + "?"), "", certs.ErrNoIdentity},
		{"fragment", named(alpha + "#x"), "", certs.ErrNoIdentity},
		{"empty fragment", named(alpha + "#"), "", certs.ErrNoIdentity},
		{"port", named("spiffe://media.test:443/packager/alpha"), "", certs.ErrNoIdentity},
		{"user", named("spiffe://root@media.test/packager/alpha"), "", certs.ErrNoIdentity},
		{"scheme in upper case", named("SPIFFE://media.test/packager/alpha"), "", certs.ErrNoIdentity},
		{"2049 bytes", named(alpha + strings.Repeat("a", 2049-len(alpha))), "", certs.ErrNoIdentity},

		{"trust domain of others", named("spiffe://other.test/packager/alpha"), "", certs.ErrNotVouched},
		{"trust domain that begins alike", named("spiffe://media.test.evil/packager/alpha"), "", certs.ErrNotVouched},

		{"no extended key usage", both(named(alpha), usage()), "", certs.ErrNotVouched},
		{"any extended key usage", both(named(alpha), usage(x509.ExtKeyUsageAny)), "", certs.ErrNotVouched},
		{"CA certificate", both(named(alpha), func(c *x509.Certificate) { c.IsCA = true }), "", certs.ErrNotVouched},
	}
	b := newBench(t)
	s := b.server(t)
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			conn, err, clientErr := connect(t, s.TLSConfig(), b.client(t, tt.change))
			if !errors.Is(err, tt.err) {
				t.Fatalf("handshake: got %v, want %v", err, tt.err)
			}
			if tt.err != nil {
				if clientErr == nil {
					t.Error("the client was not told")
				}
				return
			}
			cs := conn.ConnectionState()
			got, err := s.Peer(cs)
			if err != nil {
				t.Fatal(err)
			}
			leaf := cs.PeerCertificates[0]
			if got.Name != tt.want || got.CA != "own" || !slices.Equal(got.Roles, []string{"packager"}) ||
				got.SPKI != sha256.Sum256(leaf.RawSubjectPublicKeyInfo) || !got.NotAfter.Equal(leaf.NotAfter) {
				t.Errorf("got %+v, want %q of own", got, tt.want)
			}
		})
	}
}

// What crypto/tls refuses before this package looks has no sentinel of ours.
func TestHandshakeRefused(t *testing.T) {
	b := newBench(t)
	s := b.server(t)
	stranger := openAuthority(t, trustDomain, b.clk)
	tests := []struct {
		name   string
		client *tls.Config
	}{
		{"another CA of the same trust domain", clientOf(t, stranger, b, named(alpha))},
		{"server certificate", b.client(t, func(c *x509.Certificate) {
			named(alpha)(c)
			c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		})},
		{"expired", b.client(t, func(c *x509.Certificate) {
			named(alpha)(c)
			c.NotBefore, c.NotAfter = b.clk.Now().Add(-time.Hour), b.clk.Now().Add(-time.Second)
		})},
		{"not yet valid", b.client(t, func(c *x509.Certificate) {
			named(alpha)(c)
			c.NotBefore = b.clk.Now().Add(time.Second)
		})},
		{"no certificate", func() *tls.Config {
			c := b.client(t, named(alpha))
			c.GetClientCertificate = nil
			return c
		}()},
		{"TLS 1.2", func() *tls.Config {
			c := b.client(t, named(alpha))
			c.MaxVersion = tls.VersionTLS12
			return c
		}()},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err, clientErr := connect(t, s.TLSConfig(), tt.client)
			if err == nil || clientErr == nil {
				t.Errorf("accepted: server %v, client %v", err, clientErr)
			}
		})
	}
	accepted(t, s, b.client(t, named(alpha)))
}

func TestTLS12WhereConfigured(t *testing.T) {
	b := newBench(t)
	b.opts.MinVersion = tls.VersionTLS12
	client := b.client(t, named(alpha))
	client.MaxVersion = tls.VersionTLS12
	cs := accepted(t, b.server(t), client)
	if cs.Version != tls.VersionTLS12 {
		t.Errorf("got version %s, want TLS 1.2", tls.VersionName(cs.Version))
	}
}

func TestUnverifiedConnectionHasNoPeer(t *testing.T) {
	b := newBench(t)
	s := b.server(t)
	cs := accepted(t, s, b.client(t, named(alpha)))
	cs.VerifiedChains = nil
	if _, err := s.Peer(cs); !errors.Is(err, certs.ErrNoIdentity) {
		t.Errorf("got %v, want %v", err, certs.ErrNoIdentity)
	}
}

// Each CA vouches for its own names and roles, whatever the others may.
func TestTwoCAs(t *testing.T) {
	b := newBench(t)
	partner := openAuthority(t, "partner.test", b.clk)
	b.opts.CAs = append(b.opts.CAs, certs.CA{Name: "partner", File: partner.CertFile(),
		TrustDomain: "partner.test", DNSNames: []string{"keys.partner.example"}, Roles: []string{"drm-provider"}})
	s := b.server(t)
	tests := []struct {
		name   string
		ca     *certs.Authority
		change func(*x509.Certificate)
		want   string
		role   string
		err    error
	}{
		{"own id from own CA", b.ca, named(alpha), alpha, "packager", nil},
		{"partner id from partner CA", partner, named("spiffe://partner.test/a"), "spiffe://partner.test/a", "drm-provider", nil},
		{"own id from partner CA", partner, named(alpha), "", "", certs.ErrNotVouched},
		{"partner id from own CA", b.ca, named("spiffe://partner.test/a"), "", "", certs.ErrNotVouched},
		{"own DNS name from partner CA", partner, func(c *x509.Certificate) { c.DNSNames = []string{"drm.example"} }, "", "", certs.ErrNoIdentity},
		{"partner DNS name from partner CA", partner, func(c *x509.Certificate) { c.DNSNames = []string{"keys.partner.example"} }, "keys.partner.example", "drm-provider", nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			conn, err, _ := connect(t, s.TLSConfig(), clientOf(t, tt.ca, b, tt.change))
			if !errors.Is(err, tt.err) {
				t.Fatalf("got %v, want %v", err, tt.err)
			}
			if tt.err != nil {
				return
			}
			got, err := s.Peer(conn.ConnectionState())
			if err != nil || got.Name != tt.want || !slices.Equal(got.Roles, []string{tt.role}) {
				t.Errorf("got %+v, %v, want %s as %s", got, err, tt.want, tt.role)
			}
		})
	}
}

// Without a trust domain a CA vouches for no SPIFFE ID at all.
func TestNoTrustDomain(t *testing.T) {
	b := newBench(t)
	b.opts.CAs[0].TrustDomain = ""
	s := b.server(t)
	if _, err, _ := connect(t, s.TLSConfig(), b.client(t, named(alpha))); !errors.Is(err, certs.ErrNotVouched) {
		t.Errorf("got %v, want %v", err, certs.ErrNotVouched)
	}
}

func TestPeerKeepsItsRoles(t *testing.T) {
	b := newBench(t)
	s := b.server(t)
	cs := accepted(t, s, b.client(t, named(alpha)))
	peer, err := s.Peer(cs)
	if err != nil {
		t.Fatal(err)
	}
	peer.Roles[0] = "officer"
	if peer, err = s.Peer(cs); err != nil || peer.Roles[0] != "packager" {
		t.Errorf("got %v, %v, want packager", peer.Roles, err)
	}
}

// Requests on an open connection end with the certificate.
func TestExpiresWhileConnected(t *testing.T) {
	b := newBench(t)
	b.opts.CAs[0].CRLFile = ""
	s := b.server(t)
	cs := accepted(t, s, b.client(t, named(alpha)))
	notAfter := cs.PeerCertificates[0].NotAfter
	b.clk.Set(notAfter)
	if _, err := s.Peer(cs); err != nil {
		t.Fatalf("at notAfter: %v", err)
	}
	b.clk.Advance(time.Second)
	if _, err := s.Peer(cs); !errors.Is(err, certs.ErrExpired) {
		t.Errorf("after notAfter: got %v, want %v", err, certs.ErrExpired)
	}
	b.clk.Set(cs.PeerCertificates[0].NotBefore.Add(-time.Second))
	if _, err := s.Peer(cs); !errors.Is(err, certs.ErrExpired) {
		t.Errorf("before notBefore: got %v, want %v", err, certs.ErrExpired)
	}
}

// So do they with the CA.
func TestCAExpiresWhileConnected(t *testing.T) {
	b := newBench(t)
	b.opts.CAs[0].CRLFile = ""
	s := b.server(t)
	cs := accepted(t, s, b.client(t, func(c *x509.Certificate) {
		named(alpha)(c)
		c.NotAfter = b.clk.Now().AddDate(20, 0, 0)
	}))
	b.clk.Set(b.clk.Now().AddDate(11, 0, 0))
	if _, err := s.Peer(cs); !errors.Is(err, certs.ErrExpired) {
		t.Errorf("got %v, want %v", err, certs.ErrExpired)
	}
}

func TestNoResumption(t *testing.T) {
	b := newBench(t)
	s := b.server(t)
	client := b.client(t, named(alpha))
	client.ClientSessionCache = tls.NewLRUClientSessionCache(4)
	config := s.TLSConfig() // holds the ticket keys
	for range 2 {
		conn, err, _ := connect(t, config, client)
		if err != nil {
			t.Fatal(err)
		}
		if conn.ConnectionState().DidResume {
			t.Error("the session was resumed")
		}
	}
}

func TestNextProtos(t *testing.T) {
	b := newBench(t)
	s := b.server(t)
	server, client := s.TLSConfig(), b.client(t, named(alpha))
	server.NextProtos, client.NextProtos = []string{"h2"}, []string{"h2", "http/1.1"}
	conn, err, _ := connect(t, server, client)
	if err != nil {
		t.Fatal(err)
	}
	if got := conn.ConnectionState().NegotiatedProtocol; got != "h2" {
		t.Errorf("got protocol %q, want h2", got)
	}
}

func TestNewServerNamesAllFaults(t *testing.T) {
	b := newBench(t)
	stranger := openAuthority(t, "other.test", b.clk)
	dir := t.TempDir()
	missing, garbage := filepath.Join(dir, "missing.pem"), filepath.Join(dir, "garbage.pem")
	writeFile(t, garbage, []byte("garbage"))
	b.opts.CertFile = missing
	b.opts.MinVersion = tls.VersionTLS11
	b.opts.CAs = []certs.CA{
		{Name: "a", File: garbage, TrustDomain: "a.test"},
		{Name: "b", File: b.ca.CertFile(), CRLFile: stranger.CRLFile(), TrustDomain: "b.test"},
		{Name: "c", File: stranger.CertFile(), CRLFile: filepath.Join(dir, "no.crl"), TrustDomain: "c.test"},
		{Name: "c", File: b.opts.KeyFile, DNSNames: []string{"*.c.test"}},
		{Name: "d", File: b.ca.CertFile()},
		{Name: "e", File: b.ca.CertFile(), TrustDomain: "E.test"},
	}
	_, err := certs.NewServer(b.opts)
	if err == nil {
		t.Fatal("all of that was accepted")
	}
	for _, want := range []string{
		missing + ": no such file",
		"TLS",
		"client ca a: " + garbage + ": no PEM block",
		"client ca b: " + stranger.CRLFile() + ": revocation list of",
		"client ca c: " + filepath.Join(dir, "no.crl") + ": ",
		"client ca c: two have this name",
		`client ca c: DNS name "*.c.test"`,
		`client ca c: ` + b.opts.KeyFile + `: PEM block "PRIVATE KEY"`,
		"client ca d: neither",
		`client ca e: trust domain "E.test"`,
		"is in ca d too",
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("no %q in:\n%v", want, err)
		}
	}
}

// Two CAs that may vouch for one name could each take the other's callers.
func TestCAsShareNoNames(t *testing.T) {
	b := newBench(t)
	other := openAuthority(t, "other.test", b.clk)
	own := certs.CA{Name: "own", File: b.ca.CertFile(), TrustDomain: trustDomain, DNSNames: []string{"drm.example", "a.example"}}
	for _, test := range []struct {
		name string
		ca   certs.CA
		want string
	}{
		{"nothing", certs.CA{TrustDomain: "other.test", DNSNames: []string{"b.example", "b.example"}}, ""},
		{"no trust domain twice", certs.CA{DNSNames: []string{"b.example"}}, ""},
		{"trust domain", certs.CA{TrustDomain: trustDomain}, "client cas own and other: both vouch for the trust domain " + trustDomain},
		{"DNS name", certs.CA{TrustDomain: "other.test", DNSNames: []string{"b.example", "DRM.example"}}, "client cas own and other: both vouch for the DNS name drm.example"},
	} {
		t.Run(test.name, func(t *testing.T) {
			test.ca.Name, test.ca.File = "other", other.CertFile()
			o := b.opts
			o.CAs = []certs.CA{own, test.ca}
			_, err := certs.NewServer(o)
			check := certs.CheckCAs(o.CAs)
			if test.want == "" {
				if err != nil || check != nil {
					t.Errorf("got %v and %v, want neither", err, check)
				}
				return
			}
			for _, err := range []error{err, check} {
				if err == nil || !strings.Contains(err.Error(), test.want) {
					t.Errorf("got %v, want %q", err, test.want)
				}
			}
		})
	}
}

func TestNewServerNeedsCAs(t *testing.T) {
	b := newBench(t)
	b.opts.CAs = nil
	if _, err := certs.NewServer(b.opts); err == nil {
		t.Error("a server without client CAs was made")
	}
}
