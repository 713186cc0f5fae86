package certs_test

import (
	"net/url"
	"strings"
	"testing"

	"github.com/keycustody/custodian/certs"
)

func TestParseSPIFFEID(t *testing.T) {
	long := "spiffe://media.test/"
	good := []string{
		"spiffe://media.test/a",
		"spiffe://media.test/packager/alpha",
		"spiffe://m_e-d.1/A-Z_a.z/.../a..b/0",
		"spiffe://" + strings.Repeat("t", 255) + "/a",
		long + strings.Repeat("a", 2048-len(long)),
	}
	for _, s := range good {
		id, err := certs.ParseSPIFFEID(s)
		if err != nil || id.String() != s {
			t.Errorf("%q: got %q, %v", s, id, err)
		}
	}
	bad := []string{
		"", "spiffe", "spiffe:", "spiffe://", "spiffe:///", "spiffe:///a", "spiffe:/media.test/a",
		"SPIFFE://media.test/a", "spiffe://Media.test/a", "https://media.test/a", " spiffe://media.test/a",
		"spiffe://media.test", "spiffe://media.test/", "spiffe://media.test/a/", "spiffe://media.test//a",
		"spiffe://media.test/.", "spiffe://media.test/..", "spiffe://media.test/a/../b", "spiffe://media.test/a/./b",
		"spiffe://media.test/a?", "spiffe://media.test/a?b", "spiffe://media.test/a#", "spiffe://media.test/a#b",
		"spiffe://media.test:1/a", "spiffe://media.test:/a", "spiffe://u@media.test/a", "spiffe://u:p@media.test/a", "spiffe://@media.test/a",
		"spiffe://media.test/%61", "spiffe://media.test/a b", "spiffe://media.test/a\n", "spiffe://media.test/a\x00", "spiffe://media.test/ä",
		"spiffe://mediä.test/a", "spiffe://[::1]/a", "spiffe://media.test?/a", "spiffe://media.test/a\\b",
		"spiffe://" + strings.Repeat("t", 256) + "/a",
		long + strings.Repeat("a", 2049-len(long)),
	}
	for _, s := range bad {
		if id, err := certs.ParseSPIFFEID(s); err == nil {
			t.Errorf("%q: got %+v, want an error", s, id)
		}
	}
}

// What is accepted is its own canonical form, and net/url reads the same parts.
func FuzzParseSPIFFEID(f *testing.F) {
	for _, s := range []string{
		"spiffe://media.test/packager/alpha", "spiffe://media.test", "spiffe://media.test/", "spiffe://a@media.test:1/b?c#d",
		"spiffe://media.test/a/../b", "SPIFFE://media.test/a", "spiffe://media.test/%61", "https://media.test/a",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		id, err := certs.ParseSPIFFEID(s)
		if err != nil {
			if id != (certs.SPIFFEID{}) {
				t.Fatalf("%q: refused, but got %+v", s, id)
			}
			return
		}
		if id.String() != s {
			t.Fatalf("%q: written as %q", s, id)
		}
		u, err := url.Parse(s)
		if err != nil {
			t.Fatalf("%q: accepted, but: %v", s, err)
		}
		if u.Scheme != "spiffe" || u.Host != id.TrustDomain || u.Path != id.Path || u.RawPath != "" ||
			u.User != nil || u.Port() != "" || u.ForceQuery || u.RawQuery != "" || u.Fragment != "" || u.Opaque != "" {
			t.Fatalf("%q: got %+v, net/url reads %+v", s, id, u)
		}
		if len(s) > 2048 || len(id.Path) < 2 || strings.HasSuffix(s, "/") || strings.Contains(id.Path, "//") {
			t.Fatalf("%q: accepted", s)
		}
		for segment := range strings.SplitSeq(id.Path[1:], "/") {
			if segment == "." || segment == ".." {
				t.Fatalf("%q: accepted", s)
			}
		}
	})
}
