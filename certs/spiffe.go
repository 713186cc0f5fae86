package certs

import (
	"crypto/x509"
	"encoding/asn1"
	"fmt"
	"strings"
)

// Limits of the SPIFFE-ID specification, section 2.3.
const (
	maxSPIFFEID    = 2048
	maxTrustDomain = 255
)

const spiffeScheme = "spiffe://"

// A SPIFFEID names one workload: spiffe://TrustDomain/Path.
type SPIFFEID struct {
	TrustDomain string
	Path        string // begins with a slash and has at least one segment
}

// String returns the ID as a URI.
func (id SPIFFEID) String() string { return spiffeScheme + id.TrustDomain + id.Path }

// ParseSPIFFEID reads the SPIFFE ID of a workload (SPIFFE-ID section 2): at most
// 2048 bytes; a trust domain of lower-case letters, digits, dots, dashes and
// underscores; a path of one segment or more. Only the canonical spelling is
// accepted, so that two IDs are the same exactly when their strings are.
func ParseSPIFFEID(s string) (SPIFFEID, error) {
	if len(s) > maxSPIFFEID {
		return SPIFFEID{}, fmt.Errorf("spiffe id: %d bytes, at most %d are allowed", len(s), maxSPIFFEID)
	}
	rest, ok := strings.CutPrefix(s, spiffeScheme)
	if !ok {
		return SPIFFEID{}, fmt.Errorf("spiffe id %q: does not begin with %s", s, spiffeScheme)
	}
	slash := strings.IndexByte(rest, '/')
	if slash < 0 {
		return SPIFFEID{}, fmt.Errorf("spiffe id %q: no path", s)
	}
	id := SPIFFEID{TrustDomain: rest[:slash], Path: rest[slash:]}
	if err := checkTrustDomain(id.TrustDomain); err != nil {
		return SPIFFEID{}, fmt.Errorf("spiffe id %q: %w", s, err)
	}
	for segment := range strings.SplitSeq(id.Path[1:], "/") {
		if err := checkSegment(segment); err != nil {
			return SPIFFEID{}, fmt.Errorf("spiffe id %q: %w", s, err)
		}
	}
	return id, nil
}

func checkTrustDomain(td string) error {
	if td == "" {
		return fmt.Errorf("empty trust domain")
	}
	if len(td) > maxTrustDomain {
		return fmt.Errorf("trust domain of %d bytes, at most %d are allowed", len(td), maxTrustDomain)
	}
	for i := range len(td) {
		if c := td[i]; !lowerDigit(c) && c != '.' && c != '-' && c != '_' {
			return fmt.Errorf("trust domain %q: %q is not allowed", td, c)
		}
	}
	return nil
}

func checkSegment(segment string) error {
	switch segment {
	case "":
		return fmt.Errorf("empty path segment")
	case ".", "..":
		return fmt.Errorf("path segment %q is not allowed", segment)
	}
	for i := range len(segment) {
		c := segment[i]
		if !lowerDigit(c) && (c < 'A' || c > 'Z') && c != '.' && c != '-' && c != '_' {
			return fmt.Errorf("path segment %q: %q is not allowed", segment, c)
		}
	}
	return nil
}

func lowerDigit(c byte) bool { return 'a' <= c && c <= 'z' || '0' <= c && c <= '9' }

// oidSubjectAltName is id-ce-subjectAltName (RFC 5280 section 4.2.1.6).
var oidSubjectAltName = asn1.ObjectIdentifier{2, 5, 29, 17}

// tagURI is uniformResourceIdentifier in a GeneralName (RFC 5280 section 4.2.1.6).
const tagURI = 6

// uriNames returns the URI names of a certificate as they are written in it.
// Certificate.URIs has been through net/url, which maps different spellings to
// one: it lowers the scheme and drops an empty fragment.
func uriNames(cert *x509.Certificate) ([]string, error) {
	var uris []string
	for _, ext := range cert.Extensions {
		if !ext.Id.Equal(oidSubjectAltName) {
			continue
		}
		var names []asn1.RawValue
		if rest, err := asn1.Unmarshal(ext.Value, &names); err != nil || len(rest) > 0 {
			return nil, fmt.Errorf("subjectAltName: malformed")
		}
		for _, name := range names {
			if name.Class == asn1.ClassContextSpecific && name.Tag == tagURI {
				uris = append(uris, string(name.Bytes))
			}
		}
	}
	return uris, nil
}
