package certs_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"math/big"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/keycustody/custodian/certs"
)

func TestRevokedWhileConnected(t *testing.T) {
	b := newBench(t)
	s := b.server(t)
	client, other := b.client(t, named(alpha)), b.client(t, named("spiffe://media.test/packager/beta"))
	cs, csOther := accepted(t, s, client), accepted(t, s, other)
	if _, err := s.Peer(cs); err != nil {
		t.Fatal(err)
	}
	if err := b.ca.Revoke(cs.PeerCertificates[0].SerialNumber); err != nil {
		t.Fatal(err)
	}
	if err := s.Reload(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Peer(cs); !errors.Is(err, certs.ErrRevoked) {
		t.Errorf("open connection: got %v, want %v", err, certs.ErrRevoked)
	}
	if _, err, _ := connect(t, s.TLSConfig(), client); !errors.Is(err, certs.ErrRevoked) {
		t.Errorf("new connection: got %v, want %v", err, certs.ErrRevoked)
	}
	if _, err := s.Peer(csOther); err != nil {
		t.Errorf("another client: %v", err)
	}
	accepted(t, s, other)
}

func TestRevocationListAges(t *testing.T) {
	const due = 10 * time.Hour
	tests := []struct {
		name  string
		grace time.Duration
		age   time.Duration // past nextUpdate
		want  certs.CRLState
		err   error
	}{
		{"at nextUpdate", 0, 0, certs.CRLCurrent, nil},
		{"past it", 0, time.Second, certs.CRLStale, nil},
		{"at the end of the default grace", 0, 24 * time.Hour, certs.CRLStale, nil},
		{"past the default grace", 0, 24*time.Hour + time.Second, certs.CRLRefusing, certs.ErrCRLExpired},
		{"at the end of a short grace", time.Minute, time.Minute, certs.CRLStale, nil},
		{"past a short grace", time.Minute, time.Minute + time.Second, certs.CRLRefusing, certs.ErrCRLExpired},
		{"past it, without grace", -1, time.Second, certs.CRLRefusing, certs.ErrCRLExpired},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b := newBench(t)
			b.opts.CRLGrace = tt.grace
			nextUpdate := b.clk.Now().Add(due)

			long := func(c *x509.Certificate) {
				named(alpha)(c)
				c.NotAfter = b.clk.Now().Add(100 * time.Hour)
			}
			revokedPEM, revokedKey, err := b.ca.Issue(long)
			if err != nil {
				t.Fatal(err)
			}
			revoked := b.config(t, revokedPEM, revokedKey)
			block, _ := pem.Decode(revokedPEM)
			leaf, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				t.Fatal(err)
			}
			if err := b.ca.Revoke(leaf.SerialNumber); err != nil {
				t.Fatal(err)
			}
			if err := b.ca.WriteCRL(nextUpdate); err != nil {
				t.Fatal(err)
			}
			s := b.server(t)
			client := b.client(t, long)
			cs := accepted(t, s, client)

			b.clk.Advance(due + tt.age)
			if _, err := s.Peer(cs); !errors.Is(err, tt.err) {
				t.Errorf("open connection: got %v, want %v", err, tt.err)
			}
			if _, err, _ := connect(t, s.TLSConfig(), client); !errors.Is(err, tt.err) {
				t.Errorf("new connection: got %v, want %v", err, tt.err)
			}
			if _, err, _ := connect(t, s.TLSConfig(), revoked); !errors.Is(err, certs.ErrRevoked) {
				t.Errorf("revoked client: got %v, want %v", err, certs.ErrRevoked)
			}
			got := s.Status().CAs[0]
			if got.CRL != tt.want || !got.CRLNextUpdate.Equal(nextUpdate) {
				t.Errorf("status: got %s due %s, want %s due %s", got.CRL, got.CRLNextUpdate, tt.want, nextUpdate)
			}

			// A new list ends it.
			if err := b.ca.WriteCRL(b.clk.Now().Add(time.Hour)); err != nil {
				t.Fatal(err)
			}
			if err := s.Reload(); err != nil {
				t.Fatal(err)
			}
			if _, err := s.Peer(cs); err != nil {
				t.Errorf("after a new list: %v", err)
			}
			if got := s.Status().CAs[0].CRL; got != certs.CRLCurrent {
				t.Errorf("status after a new list: got %s, want %s", got, certs.CRLCurrent)
			}
		})
	}
}

// A ca is a CA made by hand, for what an Authority does not do.
type ca struct {
	cert *x509.Certificate
	key  crypto.Signer
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// newCA makes a CA under parent, or a root if parent is nil.
func newCA(t *testing.T, clk *clock, name string, parent *ca) *ca {
	t.Helper()
	key := newKey(t)
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, NotBefore: clk.Now(), NotAfter: clk.Now().AddDate(1, 0, 0),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	up, signer := template, crypto.Signer(key)
	if parent != nil {
		up, signer = parent.cert, parent.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, up, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &ca{cert: cert, key: key}
}

// crl is a list of this CA, good for a day.
func (c *ca) crl(t *testing.T, clk *clock, number int64, change func(*x509.RevocationList), revoked ...*x509.Certificate) []byte {
	t.Helper()
	template := &x509.RevocationList{Number: big.NewInt(number), ThisUpdate: clk.Now(), NextUpdate: clk.Now().Add(24 * time.Hour)}
	for _, cert := range revoked {
		template.RevokedCertificateEntries = append(template.RevokedCertificateEntries,
			x509.RevocationListEntry{SerialNumber: cert.SerialNumber, RevocationTime: clk.Now()})
	}
	if change != nil {
		change(template)
	}
	der, err := x509.CreateRevocationList(rand.Reader, template, c.cert, c.key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// client is a client of this CA that sends these intermediates along.
func (c *ca) client(t *testing.T, b *bench, intermediates ...*ca) (*tls.Config, *x509.Certificate) {
	t.Helper()
	key := newKey(t)
	template := &x509.Certificate{
		NotBefore: b.clk.Now(), NotAfter: b.clk.Now().Add(24 * time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	named(alpha)(template)
	der, err := x509.CreateCertificate(rand.Reader, template, c.cert, key.Public(), c.key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	chain := certPEM(leaf)
	for _, i := range intermediates {
		chain = append(chain, certPEM(i.cert)...)
	}
	return b.config(t, chain, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})), leaf
}

func certPEM(certs ...*x509.Certificate) []byte {
	var out []byte
	for _, cert := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})...)
	}
	return out
}

func crlPEM(lists ...[]byte) []byte {
	var out []byte
	for _, der := range lists {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der})...)
	}
	return out
}

func TestRevocationWithIntermediate(t *testing.T) {
	clk := newClock()
	root := newCA(t, clk, "root", nil)
	inter := newCA(t, clk, "intermediate", root)
	b := newBench(t)
	b.clk = clk
	b.opts.Now = clk.Now
	client, leaf := inter.client(t, b, inter)
	bare, _ := inter.client(t, b) // does not send the intermediate

	rootOnly, all := certPEM(root.cert), certPEM(root.cert, inter.cert)
	clean := func(c *ca) []byte { return c.crl(t, clk, 1, nil) }
	with := func(c *ca, revoked *x509.Certificate) []byte { return c.crl(t, clk, 1, nil, revoked) }
	tests := []struct {
		name   string
		file   []byte
		crls   []byte
		client *tls.Config
		err    error
	}{
		{"no lists wanted", rootOnly, nil, client, nil},
		{"both lists", all, crlPEM(clean(root), clean(inter)), client, nil},
		{"both lists, intermediate not sent", all, crlPEM(clean(inter), clean(root)), bare, nil},
		{"leaf revoked", all, crlPEM(clean(root), with(inter, leaf)), client, certs.ErrRevoked},
		{"leaf's serial revoked by another issuer", all, crlPEM(with(root, leaf), clean(inter)), client, nil},
		{"intermediate revoked by its issuer", all, crlPEM(with(root, inter.cert), clean(inter)), client, certs.ErrRevoked},
		{"intermediate revoked and not sent", all, crlPEM(with(root, inter.cert), clean(inter)), bare, certs.ErrRevoked},
		{"intermediate revoked, not in the file", rootOnly, with(root, inter.cert), client, certs.ErrRevoked},
		{"no list of the leaf's issuer", rootOnly, clean(root), client, certs.ErrCRLExpired},
		{"trusted intermediate without its issuer's list", all, clean(inter), client, nil},
		{"intermediate alone in the file", certPEM(inter.cert), with(inter, leaf), client, certs.ErrRevoked},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b, dir := *b, t.TempDir()
			own := certs.CA{Name: "own", File: filepath.Join(dir, "ca.pem"), TrustDomain: trustDomain}
			writeFile(t, own.File, tt.file)
			if tt.crls != nil {
				own.CRLFile = filepath.Join(dir, "crl")
				writeFile(t, own.CRLFile, tt.crls)
			}
			b.opts.CAs = []certs.CA{own}
			s := b.server(t)
			conn, err, _ := connect(t, s.TLSConfig(), tt.client)
			if !errors.Is(err, tt.err) {
				t.Fatalf("got %v, want %v", err, tt.err)
			}
			if err != nil {
				return
			}
			if peer, err := s.Peer(conn.ConnectionState()); err != nil || peer.Name != alpha {
				t.Errorf("got %v, %v, want %s", peer, err, alpha)
			}
		})
	}
}

// A certificate under a CA that another entry of the configuration has signed
// could belong to either.
func TestTwoCAsVerifyOneCertificate(t *testing.T) {
	clk := newClock()
	root := newCA(t, clk, "root", nil)
	inter := newCA(t, clk, "intermediate", root)
	b := newBench(t)
	b.clk, b.opts.Now = clk, clk.Now
	dir := t.TempDir()
	b.opts.CAs = []certs.CA{
		{Name: "root", File: filepath.Join(dir, "root.pem"), TrustDomain: "root.test"},
		{Name: "inter", File: filepath.Join(dir, "inter.pem"), TrustDomain: trustDomain},
	}
	writeFile(t, b.opts.CAs[0].File, certPEM(root.cert))
	writeFile(t, b.opts.CAs[1].File, certPEM(inter.cert))
	s := b.server(t)
	client, _ := inter.client(t, b, inter)
	if _, err, _ := connect(t, s.TLSConfig(), client); !errors.Is(err, certs.ErrAmbiguousIdentity) {
		t.Errorf("got %v, want %v", err, certs.ErrAmbiguousIdentity)
	}
}

func TestRevocationListsRefused(t *testing.T) {
	clk := newClock()
	root, stranger := newCA(t, clk, "root", nil), newCA(t, clk, "root", nil)
	good := root.crl(t, clk, 1, nil)
	flipped := slices.Clone(good)
	flipped[len(flipped)-1] ^= 1
	critical := func(oid ...int) func(*x509.RevocationList) {
		return func(l *x509.RevocationList) {
			l.ExtraExtensions = append(l.ExtraExtensions, pkix.Extension{Id: asn1.ObjectIdentifier(oid), Critical: true, Value: []byte{0x30, 0}})
		}
	}
	indirect := func(l *x509.RevocationList) {
		l.RevokedCertificateEntries = []x509.RevocationListEntry{{SerialNumber: big.NewInt(7), RevocationTime: clk.Now(),
			ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 29}, Critical: true, Value: []byte{0x30, 0}}}}}
	}
	tests := []struct {
		name string
		data []byte
		want string
	}{
		{"empty", nil, "malformed"},
		{"garbage", []byte("garbage"), "malformed"},
		{"another CA of that name", stranger.crl(t, clk, 1, nil), "verification failure"},
		{"unknown issuer", newCA(t, clk, "unknown", nil).crl(t, clk, 1, nil), "its issuer is not in the CA file"},
		{"bad signature", flipped, "verification failure"},
		{"one good, one bad", crlPEM(good, flipped), "verification failure"},
		{"trailing data", append(slices.Clone(good), 0), "data after"},
		{"cut off", good[:len(good)-1], "malformed"},
		{"damaged PEM", crlPEM(good)[:100], "damaged PEM"},
		{"certificate", certPEM(root.cert), `PEM block "CERTIFICATE"`},
		{"shard", root.crl(t, clk, 1, critical(2, 5, 29, 28)), "only complete lists"},
		{"delta", root.crl(t, clk, 1, critical(2, 5, 29, 27)), "only complete lists"},
		{"indirect", root.crl(t, clk, 1, indirect), "not supported"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b, dir := newBench(t), t.TempDir()
			own := certs.CA{Name: "own", File: filepath.Join(dir, "ca.pem"), CRLFile: filepath.Join(dir, "crl"), TrustDomain: trustDomain}
			b.opts.CAs = []certs.CA{own}
			writeFile(t, own.File, certPEM(root.cert))
			writeFile(t, own.CRLFile, good)
			b.server(t) // accepts the good one
			writeFile(t, own.CRLFile, tt.data)
			_, err := certs.NewServer(b.opts)
			if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), own.CRLFile) {
				t.Errorf("got %v, want %s: %q", err, own.CRLFile, tt.want)
			}
		})
	}
}

// An older list would take a revocation back.
func TestRevocationListRolledBack(t *testing.T) {
	b := newBench(t)
	old := readFile(t, b.ca.CRLFile())
	client := b.client(t, named(alpha))
	s := b.server(t)
	cs := accepted(t, s, client)
	if err := b.ca.Revoke(cs.PeerCertificates[0].SerialNumber); err != nil {
		t.Fatal(err)
	}
	if err := s.Reload(); err != nil {
		t.Fatal(err)
	}
	writeFile(t, b.ca.CRLFile(), old)
	if err := s.Reload(); err == nil || !strings.Contains(err.Error(), "older than the one in use") {
		t.Errorf("got %v, want that the list is older", err)
	}
	if _, err := s.Peer(cs); !errors.Is(err, certs.ErrRevoked) {
		t.Errorf("got %v, want %v", err, certs.ErrRevoked)
	}
}

// Of two lists by one issuer the newer counts, in whichever order they stand.
func TestNewerListCounts(t *testing.T) {
	clk := newClock()
	root := newCA(t, clk, "root", nil)
	b := newBench(t)
	b.clk, b.opts.Now = clk, clk.Now
	dir := t.TempDir()
	own := certs.CA{Name: "own", File: filepath.Join(dir, "ca.pem"), CRLFile: filepath.Join(dir, "crl"), TrustDomain: trustDomain}
	b.opts.CAs = []certs.CA{own}
	writeFile(t, own.File, certPEM(root.cert))
	client, leaf := root.client(t, b)
	older, newer := root.crl(t, clk, 9, nil), root.crl(t, clk, 10, nil, leaf)
	for _, crls := range [][]byte{crlPEM(older, newer), crlPEM(newer, older)} {
		writeFile(t, own.CRLFile, crls)
		if _, err, _ := connect(t, b.server(t).TLSConfig(), client); !errors.Is(err, certs.ErrRevoked) {
			t.Errorf("got %v, want %v", err, certs.ErrRevoked)
		}
	}
}
