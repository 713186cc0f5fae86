package certs

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

// An Authority is a certification authority in a directory, for development and
// tests. It is not for production: its key is a file beside the certificates,
// and the name in each of them says so. Keys are ECDSA P-256; all files have
// mode 0600.
//
// One process uses a directory at a time; within it an Authority is safe for
// concurrent use.
type Authority struct {
	// Now is the clock, time.Now after OpenAuthority. It may be set before the
	// first use.
	Now func() time.Time

	dir         string
	trustDomain string
	cert        *x509.Certificate
	key         *ecdsa.PrivateKey

	mu sync.Mutex // held while the files of the directory are changed
}

// A Pair is where a certificate and its private key are.
type Pair struct {
	CertFile string
	KeyFile  string
}

const (
	devOrganization   = "Custodian development, NOT FOR PRODUCTION"
	authorityLifetime = 10 * 365 * 24 * time.Hour
	firstCRLLifetime  = 30 * 24 * time.Hour

	// backdate keeps a new certificate valid where a clock is a little behind.
	backdate = time.Minute
)

// OpenAuthority opens the authority in dir, and makes it there if dir has none:
// ca.pem, ca.key, and crl.pem, an empty revocation list that is good for 30 days.
// Its clients are named in the trust domain, and an authority made for another
// trust domain is refused.
func OpenAuthority(dir, trustDomain string) (*Authority, error) {
	if err := checkTrustDomain(trustDomain); err != nil {
		return nil, fmt.Errorf("development ca %s: %w", dir, err)
	}
	a := &Authority{Now: time.Now, dir: dir, trustDomain: trustDomain}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("development ca: %w", err)
	}
	pair := Pair{CertFile: a.CertFile(), KeyFile: a.path("ca.key")}
	if !exists(pair.CertFile) && !exists(pair.KeyFile) {
		if err := a.create(pair); err != nil {
			return nil, fmt.Errorf("development ca %s: %w", dir, err)
		}
	}
	if err := a.open(pair); err != nil {
		return nil, fmt.Errorf("development ca %s: %w", dir, err)
	}
	if !exists(a.CRLFile()) {
		if err := a.WriteCRL(a.Now().Add(firstCRLLifetime)); err != nil {
			return nil, err
		}
	}
	return a, nil
}

// CertFile returns where the authority's own certificate is.
func (a *Authority) CertFile() string { return a.path("ca.pem") }

// CRLFile returns where its revocation list is.
func (a *Authority) CRLFile() string { return a.path("crl.pem") }

func (a *Authority) path(name string) string { return filepath.Join(a.dir, name) }

func exists(path string) bool {
	_, err := os.Lstat(path)
	return !errors.Is(err, fs.ErrNotExist)
}

func (a *Authority) create(pair Pair) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	now := a.Now()
	template := &x509.Certificate{
		Subject:               pkix.Name{Organization: []string{devOrganization}, CommonName: "Custodian development CA, NOT FOR PRODUCTION"},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(authorityLifetime),
		URIs:                  []*url.URL{{Scheme: "spiffe", Host: a.trustDomain}},
		BasicConstraintsValid: true,
		IsCA:                  true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return err
	}
	return writePair(pair, der, key)
}

func (a *Authority) open(pair Pair) error {
	certIn, keyIn := read(pair.CertFile, false), read(pair.KeyFile, true)
	defer clear(keyIn.data)
	cas, err := parseCACerts(certIn)
	if err != nil {
		return fmt.Errorf("%s: %w", pair.CertFile, err)
	}
	a.cert = cas[0]
	if keyIn.err != nil {
		return fmt.Errorf("%s: %w", pair.KeyFile, keyIn.err)
	}
	loaded, err := tls.X509KeyPair(certIn.data, keyIn.data)
	if err != nil {
		return fmt.Errorf("%s with %s: %w", pair.CertFile, pair.KeyFile, err)
	}
	key, ok := loaded.PrivateKey.(*ecdsa.PrivateKey)
	if !ok {
		return fmt.Errorf("%s: not an ECDSA key", pair.KeyFile)
	}
	a.key = key
	if err := checkTime(a.cert, a.Now()); err != nil {
		return fmt.Errorf("%s: %w", pair.CertFile, err)
	}
	uris, err := uriNames(a.cert)
	if want := spiffeScheme + a.trustDomain; err != nil || len(uris) != 1 || uris[0] != want {
		return fmt.Errorf("%s: made for %q, not for %s", pair.CertFile, uris, want)
	}
	return nil
}

// IssueServer makes NAME.pem and NAME.key for a TLS server, where NAME is the
// first DNS name, or the first address without any. A pair that is there and
// good for all names and addresses is kept until a third of its lifetime is left.
func (a *Authority) IssueServer(names []string, ips []net.IP, lifetime time.Duration) (Pair, error) {
	all := slices.Clone(names)
	for _, ip := range ips {
		all = append(all, ip.String())
	}
	if len(all) == 0 {
		return Pair{}, fmt.Errorf("development ca %s: a server needs a name or an address", a.dir)
	}
	return a.issueFiles(all[0], lifetime, func(c *x509.Certificate) {
		c.Subject.CommonName = all[0]
		c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		c.DNSNames = names
		c.IPAddresses = ips
	})
}

// IssueClient makes NAME.pem and NAME.key for the client with this path in the
// trust domain, such as /packager/alpha, where NAME is the path with dashes for
// slashes: packager-alpha. A good pair is kept as by IssueServer.
func (a *Authority) IssueClient(spiffePath string, lifetime time.Duration) (Pair, error) {
	id := SPIFFEID{TrustDomain: a.trustDomain, Path: "/" + strings.TrimPrefix(spiffePath, "/")}
	if _, err := ParseSPIFFEID(id.String()); err != nil {
		return Pair{}, fmt.Errorf("development ca %s: %w", a.dir, err)
	}
	name := strings.ReplaceAll(id.Path[1:], "/", "-")
	return a.issueFiles(name, lifetime, func(c *x509.Certificate) {
		c.URIs = []*url.URL{{Scheme: "spiffe", Host: id.TrustDomain, Path: id.Path}}
	})
}

// Issue makes a certificate that nothing is remembered of, and its private key,
// both in PEM. The template is that of a client without names, good for a day
// from now; change may turn it into anything that X.509 can express.
func (a *Authority) Issue(change func(*x509.Certificate)) (certPEM, keyPEM []byte, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("development ca %s: %w", a.dir, err)
	}
	der, err := x509.CreateCertificate(rand.Reader, a.template(24*time.Hour, change), a.cert, key.Public(), a.key)
	if err != nil {
		return nil, nil, fmt.Errorf("development ca %s: %w", a.dir, err)
	}
	if keyPEM, err = encodeKey(key); err != nil {
		return nil, nil, fmt.Errorf("development ca %s: %w", a.dir, err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: pemCertificate, Bytes: der}), keyPEM, nil
}

func (a *Authority) template(lifetime time.Duration, change func(*x509.Certificate)) *x509.Certificate {
	now := a.Now()
	template := &x509.Certificate{
		Subject:               pkix.Name{Organization: []string{devOrganization}},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(lifetime),
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	change(template)
	return template
}

func (a *Authority) issueFiles(name string, lifetime time.Duration, change func(*x509.Certificate)) (Pair, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	pair := Pair{CertFile: a.path(name + ".pem"), KeyFile: a.path(name + ".key")}
	if strings.ContainsAny(name, `/\`) || strings.HasPrefix(name, ".") {
		return Pair{}, fmt.Errorf("development ca %s: %q cannot be the name of a file", a.dir, name)
	}
	template := a.template(lifetime, change)
	keep, err := a.reusable(pair, template)
	if err != nil {
		return Pair{}, fmt.Errorf("development ca: %s: %w", pair.CertFile, err)
	}
	if keep {
		return pair, nil
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return Pair{}, fmt.Errorf("development ca: %s: %w", pair.CertFile, err)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, key.Public(), a.key)
	if err != nil {
		return Pair{}, fmt.Errorf("development ca: %s: %w", pair.CertFile, err)
	}
	if err := writePair(pair, der, key); err != nil {
		return Pair{}, fmt.Errorf("development ca: %w", err)
	}
	return pair, nil
}

// reusable tells whether the pair that is there serves for the template. A
// certificate of somebody else is an error: two names can share one file name.
func (a *Authority) reusable(pair Pair, template *x509.Certificate) (bool, error) {
	in := read(pair.CertFile, false)
	if errors.Is(in.err, fs.ErrNotExist) {
		return false, nil
	}
	if in.err != nil {
		return false, in.err
	}
	have, err := parseCertificates(in.data)
	if err != nil {
		return false, fmt.Errorf("in the way: %w", err)
	}
	leaf := have[0]
	if leaf.IsCA || !slices.Equal(leaf.ExtKeyUsage, template.ExtKeyUsage) || !sameURIs(leaf.URIs, template.URIs) {
		return false, errors.New("it is somebody else's certificate")
	}
	key := read(pair.KeyFile, true)
	defer clear(key.data)
	if _, err := tls.X509KeyPair(in.data, key.data); err != nil {
		return false, nil
	}
	left, lifetime := leaf.NotAfter.Sub(a.Now()), leaf.NotAfter.Sub(leaf.NotBefore)
	return left > lifetime/3 && !a.Now().Before(leaf.NotBefore) &&
		leaf.CheckSignatureFrom(a.cert) == nil && !a.isRevoked(leaf.SerialNumber) &&
		slices.Equal(leaf.DNSNames, template.DNSNames) &&
		slices.EqualFunc(leaf.IPAddresses, template.IPAddresses, net.IP.Equal), nil
}

func sameURIs(a, b []*url.URL) bool {
	return slices.EqualFunc(a, b, func(x, y *url.URL) bool { return x.String() == y.String() })
}

// Revoke puts a certificate on the revocation list and writes the list anew,
// with the nextUpdate that it has.
func (a *Authority) Revoke(serial *big.Int) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	old, err := a.readCRL()
	if err != nil {
		return err
	}
	entries := old.RevokedCertificateEntries
	if !listed(entries, serial) {
		entries = append(entries, x509.RevocationListEntry{SerialNumber: serial, RevocationTime: a.Now()})
	}
	return a.writeCRL(old, entries, old.NextUpdate)
}

// RevokeFile is Revoke for the first certificate in a PEM file.
func (a *Authority) RevokeFile(certFile string) error {
	in := read(certFile, false)
	if in.err != nil {
		return fmt.Errorf("revoke %s: %w", certFile, in.err)
	}
	have, err := parseCertificates(in.data)
	if err != nil {
		return fmt.Errorf("revoke %s: %w", certFile, err)
	}
	if err := have[0].CheckSignatureFrom(a.cert); err != nil {
		return fmt.Errorf("revoke %s: not a certificate of this ca: %w", certFile, err)
	}
	return a.Revoke(have[0].SerialNumber)
}

// WriteCRL writes the revocation list anew, due at nextUpdate, with all that has
// been revoked so far.
func (a *Authority) WriteCRL(nextUpdate time.Time) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	old := &x509.RevocationList{}
	if exists(a.CRLFile()) {
		var err error
		if old, err = a.readCRL(); err != nil {
			return err
		}
	}
	return a.writeCRL(old, old.RevokedCertificateEntries, nextUpdate)
}

func (a *Authority) readCRL() (*x509.RevocationList, error) {
	in := read(a.CRLFile(), false)
	if in.err != nil {
		return nil, fmt.Errorf("%s: %w", a.CRLFile(), in.err)
	}
	blocks, err := pemBlocks(in.data, pemCRL)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", a.CRLFile(), err)
	}
	crl, err := x509.ParseRevocationList(blocks[0])
	if err != nil {
		return nil, fmt.Errorf("%s: %w", a.CRLFile(), err)
	}
	if err := crl.CheckSignatureFrom(a.cert); err != nil {
		return nil, fmt.Errorf("%s: not a list of this ca: %w", a.CRLFile(), err)
	}
	return crl, nil
}

func (a *Authority) writeCRL(old *x509.RevocationList, entries []x509.RevocationListEntry, nextUpdate time.Time) error {
	number := big.NewInt(1)
	if old.Number != nil {
		number.Add(number, old.Number)
	}
	thisUpdate := a.Now()
	if !thisUpdate.Before(nextUpdate) {
		// Tests ask for lists that are due already.
		thisUpdate = nextUpdate.Add(-time.Second)
	}
	der, err := x509.CreateRevocationList(rand.Reader, &x509.RevocationList{
		Number: number, ThisUpdate: thisUpdate, NextUpdate: nextUpdate, RevokedCertificateEntries: entries,
	}, a.cert, a.key)
	if err != nil {
		return fmt.Errorf("%s: %w", a.CRLFile(), err)
	}
	return writeFile(a.CRLFile(), pem.EncodeToMemory(&pem.Block{Type: pemCRL, Bytes: der}))
}

// isRevoked takes a list that cannot be read for one that lists everything.
func (a *Authority) isRevoked(serial *big.Int) bool {
	crl, err := a.readCRL()
	return err != nil || listed(crl.RevokedCertificateEntries, serial)
}

func listed(entries []x509.RevocationListEntry, serial *big.Int) bool {
	return slices.ContainsFunc(entries, func(e x509.RevocationListEntry) bool { return e.SerialNumber.Cmp(serial) == 0 })
}

func encodeKey(key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	defer clear(der)
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// writePair writes the key first: a crash in between leaves a pair that does not
// match, which reusable finds.
func writePair(pair Pair, der []byte, key *ecdsa.PrivateKey) error {
	keyPEM, err := encodeKey(key)
	if err != nil {
		return err
	}
	defer clear(keyPEM)
	if err := writeFile(pair.KeyFile, keyPEM); err != nil {
		return err
	}
	return writeFile(pair.CertFile, pem.EncodeToMemory(&pem.Block{Type: pemCertificate, Bytes: der}))
}

// writeFile replaces a file at once: whoever polls it never sees half of it.
func writeFile(path string, data []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*") // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // gone already when all went well
	if _, err := f.Write(data); err != nil {
		f.Close()
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
