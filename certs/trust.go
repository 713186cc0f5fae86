package certs

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"math/big"
	"slices"
	"strings"
	"time"
)

// A trust is a CA with what its files held when they were last good.
type trust struct {
	CA
	certs []*x509.Certificate
	pool  *x509.CertPool
	lists map[issuer]*list // nil without a CRLFile
}

// An issuer is who signed a certificate or a revocation list. Names repeat when
// a CA changes its key, so both are needed.
type issuer struct {
	name string // DER
	spki [32]byte
}

func issuerOf(ca *x509.Certificate) issuer {
	return issuer{name: string(ca.RawSubject), spki: sha256.Sum256(ca.RawSubjectPublicKeyInfo)}
}

// A list is one verified revocation list.
type list struct {
	number     *big.Int // nil where the list has none
	thisUpdate time.Time
	nextUpdate time.Time
	revoked    map[string]time.Time // by serial number, as serialKey writes it
}

func serialKey(serial *big.Int) string { return serial.Text(62) }

// olderThan tells whether l must not replace other. CRL numbers rise
// monotonically (RFC 5280 section 5.2.3); dates decide where there are none.
func (l *list) olderThan(other *list) bool {
	if l.number != nil && other.number != nil {
		return l.number.Cmp(other.number) < 0
	}
	return l.thisUpdate.Before(other.thisUpdate)
}

// loadTrust reads a CA's files. What is bad is replaced from old, if there is
// one, and reported; without old, a nil trust is returned with the faults.
func loadTrust(ca CA, in map[string]content, old *trust) (*trust, []error) {
	t := &trust{CA: ca}
	var faults []error
	var err error
	if t.certs, err = parseCACerts(in[ca.File]); err != nil {
		faults = append(faults, fmt.Errorf("client ca %s: %s: %w", ca.Name, ca.File, err))
		if old == nil {
			return nil, append(faults, unreadable(ca, in)...)
		}
		t.certs = old.certs
	}
	t.pool = x509.NewCertPool()
	for _, cert := range t.certs {
		t.pool.AddCert(cert)
	}
	if ca.CRLFile == "" {
		return t, faults
	}
	t.lists, err = parseLists(in[ca.CRLFile], t.certs)
	if err == nil && old != nil {
		err = rolledBack(t.lists, old.lists)
	}
	if err != nil {
		faults = append(faults, fmt.Errorf("client ca %s: %s: %w", ca.Name, ca.CRLFile, err))
		if old == nil {
			return nil, faults
		}
		t.lists = t.ownLists(old.lists)
	}
	return t, faults
}

// unreadable reports a CRL file that cannot be read, for a CA whose certificates
// are bad: the lists themselves cannot be judged without them.
func unreadable(ca CA, in map[string]content) []error {
	if ca.CRLFile == "" || in[ca.CRLFile].err == nil {
		return nil
	}
	return []error{fmt.Errorf("client ca %s: %s: %w", ca.Name, ca.CRLFile, in[ca.CRLFile].err)}
}

// ownLists leaves out the lists of issuers that are no longer in the CA's file.
func (t *trust) ownLists(lists map[issuer]*list) map[issuer]*list {
	own := maps.Clone(lists)
	maps.DeleteFunc(own, func(iss issuer, _ *list) bool {
		return !slices.ContainsFunc(t.certs, func(c *x509.Certificate) bool { return issuerOf(c) == iss })
	})
	return own
}

func parseCACerts(in content) ([]*x509.Certificate, error) {
	if in.err != nil {
		return nil, in.err
	}
	certs, err := parseCertificates(in.data)
	if err != nil {
		return nil, err
	}
	for _, cert := range certs {
		if !cert.BasicConstraintsValid || !cert.IsCA {
			return nil, fmt.Errorf("%q: not a CA certificate (basicConstraints)", cert.Subject)
		}
		if cert.KeyUsage != 0 && cert.KeyUsage&x509.KeyUsageCertSign == 0 {
			return nil, fmt.Errorf("%q: its key usage lacks keyCertSign", cert.Subject)
		}
	}
	return certs, nil
}

// parseLists reads the revocation lists of a file, each verified under the CA
// certificate that issued it. Of two by one issuer the newer counts.
func parseLists(in content, cas []*x509.Certificate) (map[issuer]*list, error) {
	if in.err != nil {
		return nil, in.err
	}
	blocks := [][]byte{in.data}
	if bytes.Contains(in.data, []byte("-----BEGIN ")) {
		var err error
		if blocks, err = pemBlocks(in.data, pemCRL); err != nil {
			return nil, err
		}
	}
	lists := make(map[issuer]*list)
	for _, der := range blocks {
		iss, l, err := parseList(der, cas)
		if err != nil {
			return nil, err
		}
		if have := lists[iss]; have == nil || have.olderThan(l) {
			lists[iss] = l
		}
	}
	return lists, nil
}

func parseList(der []byte, cas []*x509.Certificate) (issuer, *list, error) {
	crl, err := x509.ParseRevocationList(der)
	if err != nil {
		return issuer{}, nil, err
	}
	if len(crl.Raw) != len(der) {
		return issuer{}, nil, errors.New("data after the revocation list")
	}
	iss, err := signer(crl, cas)
	if err != nil {
		return issuer{}, nil, err
	}
	if crl.NextUpdate.IsZero() {
		return issuer{}, nil, fmt.Errorf("revocation list of %q: no nextUpdate", crl.Issuer)
	}
	// A critical extension narrows what a list says: a delta, one shard, another
	// issuer's certificates. Taken for the whole, such a list would pass revoked
	// certificates (RFC 5280 sections 5.2 and 5.3).
	for _, ext := range crl.Extensions {
		if ext.Critical {
			return issuer{}, nil, fmt.Errorf("revocation list of %q: critical extension %s: only complete lists are supported", crl.Issuer, ext.Id)
		}
	}
	l := &list{number: crl.Number, thisUpdate: crl.ThisUpdate, nextUpdate: crl.NextUpdate,
		revoked: make(map[string]time.Time, len(crl.RevokedCertificateEntries))}
	for _, entry := range crl.RevokedCertificateEntries {
		for _, ext := range entry.Extensions {
			if ext.Critical {
				return issuer{}, nil, fmt.Errorf("revocation list of %q: entry %x: critical extension %s is not supported", crl.Issuer, entry.SerialNumber, ext.Id)
			}
		}
		l.revoked[serialKey(entry.SerialNumber)] = entry.RevocationTime
	}
	return iss, l, nil
}

// signer returns which of the CA certificates issued the list.
func signer(crl *x509.RevocationList, cas []*x509.Certificate) (issuer, error) {
	why := errors.New("its issuer is not in the CA file")
	for _, ca := range cas {
		if !bytes.Equal(crl.RawIssuer, ca.RawSubject) {
			continue
		}
		err := crl.CheckSignatureFrom(ca)
		if err == nil {
			return issuerOf(ca), nil
		}
		why = err
	}
	return issuer{}, fmt.Errorf("revocation list of %q: %w", crl.Issuer, why)
}

// rolledBack reports a list that is older than the one in use.
func rolledBack(lists, old map[issuer]*list) error {
	for iss, l := range lists {
		if was := old[iss]; was != nil && l.olderThan(was) {
			return fmt.Errorf("revocation list of %s is older than the one in use (of %s)",
				l.thisUpdate.UTC().Format(time.RFC3339), was.thisUpdate.UTC().Format(time.RFC3339))
		}
	}
	return nil
}

// verify returns the chains from the leaf to this CA's certificates.
func (t *trust) verify(presented []*x509.Certificate, now time.Time) ([][]*x509.Certificate, error) {
	intermediates := x509.NewCertPool()
	for _, cert := range presented[1:] {
		intermediates.AddCert(cert)
	}
	return presented[0].Verify(x509.VerifyOptions{
		Roots:         t.pool,
		Intermediates: intermediates,
		CurrentTime:   now,
		KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
}

// window is the time within which a chain is known to be good.
type window struct{ from, until time.Time }

func (w window) holds(now time.Time) bool { return !now.Before(w.from) && !now.After(w.until) }

// checkChain checks a verified chain for revocation. Every certificate that the
// client presented needs the list of its issuer; one that is in the CA's file is
// trusted as it stands, unless a list that is there revokes it.
func (t *trust) checkChain(chain []*x509.Certificate, now time.Time, grace time.Duration) (window, error) {
	w := window{from: chain[0].NotBefore, until: chain[0].NotAfter}
	for _, cert := range chain {
		w.from = latest(w.from, cert.NotBefore)
		w.until = earliest(w.until, cert.NotAfter)
	}
	if t.CRLFile == "" {
		return w, nil
	}
	var stale error // a revocation further up says more
	path := t.upwards(chain)
	for i, cert := range path[:len(path)-1] {
		by := path[i+1]
		l := t.lists[issuerOf(by)]
		if l == nil {
			if presented := i < len(chain)-1; presented {
				stale = fmt.Errorf("ca %s: %s has no list of %q: %w", t.Name, t.CRLFile, by.Subject, ErrCRLExpired)
			}
			continue
		}
		if when, ok := l.revoked[serialKey(cert.SerialNumber)]; ok {
			return window{}, fmt.Errorf("ca %s: serial %x, on %s: %w", t.Name, cert.SerialNumber, when.UTC().Format(time.RFC3339), ErrRevoked)
		}
		end := l.nextUpdate.Add(grace)
		if now.After(end) {
			stale = fmt.Errorf("ca %s: the list of %q was due %s: %w", t.Name, by.Subject, l.nextUpdate.UTC().Format(time.RFC3339), ErrCRLExpired)
		}
		w.until = earliest(w.until, end)
	}
	return w, stale
}

// upwards continues a chain above the certificate where verification stopped,
// as far as the CA's file has the issuers.
func (t *trust) upwards(chain []*x509.Certificate) []*x509.Certificate {
	path := slices.Clone(chain)
	for len(path) <= len(chain)+len(t.certs) { // two CAs may have signed each other
		top := path[len(path)-1]
		i := slices.IndexFunc(t.certs, func(c *x509.Certificate) bool {
			return !c.Equal(top) && bytes.Equal(c.RawSubject, top.RawIssuer) && top.CheckSignatureFrom(c) == nil
		})
		if i < 0 || bytes.Equal(top.RawSubject, top.RawIssuer) {
			break
		}
		path = append(path, t.certs[i])
	}
	return path
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

func earliest(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// mayName returns the one name of the leaf that this CA may vouch for.
func (t *trust) mayName(leaf *x509.Certificate) (string, error) {
	uris, err := uriNames(leaf)
	if err != nil {
		return "", fmt.Errorf("%w: %w", err, ErrNoIdentity)
	}
	var dns []string
	for _, name := range leaf.DNSNames {
		if name = strings.ToLower(name); slices.Contains(t.DNSNames, name) {
			dns = append(dns, name)
		}
	}
	if len(uris) > 1 || len(dns) > 1 || len(uris) == 1 && len(dns) == 1 {
		return "", fmt.Errorf("%d URI and %d listed DNS names: %w", len(uris), len(dns), ErrAmbiguousIdentity)
	}
	if len(dns) == 1 {
		return dns[0], nil
	}
	if len(uris) == 0 {
		return "", fmt.Errorf("no URI name and no DNS name that ca %s lists: %w", t.Name, ErrNoIdentity)
	}
	id, err := ParseSPIFFEID(uris[0])
	if err != nil {
		return "", fmt.Errorf("%w: %w", err, ErrNoIdentity)
	}
	if id.TrustDomain != t.TrustDomain {
		return "", fmt.Errorf("%s: ca %s vouches for trust domain %q only: %w", id, t.Name, t.TrustDomain, ErrNotVouched)
	}
	return id.String(), nil
}
