package certs_test

import (
	"crypto/x509"
	"encoding/pem"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/keycustody/custodian/certs"
)

func parseCert(t *testing.T, file string) *x509.Certificate {
	t.Helper()
	block, _ := pem.Decode(readFile(t, file))
	if block == nil {
		t.Fatalf("%s: no PEM block", file)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func TestAuthorityIsReopened(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "pki")
	first, err := certs.OpenAuthority(dir, trustDomain)
	if err != nil {
		t.Fatal(err)
	}
	pair, err := first.IssueClient("/packager/alpha", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	ca, leaf := parseCert(t, first.CertFile()), parseCert(t, pair.CertFile)
	if err := first.RevokeFile(pair.CertFile); err != nil {
		t.Fatal(err)
	}

	second, err := certs.OpenAuthority(dir, trustDomain)
	if err != nil {
		t.Fatal(err)
	}
	if !parseCert(t, second.CertFile()).Equal(ca) {
		t.Error("the authority has another certificate")
	}
	if err := second.WriteCRL(time.Now().Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(readFile(t, second.CRLFile()))
	crl, err := x509.ParseRevocationList(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	if got := crl.RevokedCertificateEntries; len(got) != 1 || got[0].SerialNumber.Cmp(leaf.SerialNumber) != 0 {
		t.Errorf("got %d revoked certificates, want the one", len(got))
	}
	if got := crl.Number.Int64(); got != 3 {
		t.Errorf("got CRL number %d, want 3", got)
	}
	if again, err := second.IssueClient("/packager/alpha", time.Hour); err != nil || parseCert(t, again.CertFile).Equal(leaf) {
		t.Errorf("a revoked certificate was kept: %v", err)
	}
	if _, err := certs.OpenAuthority(dir, "other.test"); err == nil || !strings.Contains(err.Error(), "other.test") {
		t.Errorf("another trust domain: got %v", err)
	}
}

func TestAuthorityFiles(t *testing.T) {
	a := openAuthority(t, trustDomain, newClock())
	server, err := a.IssueServer([]string{"localhost"}, []net.IP{net.IPv6loopback}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	client, err := a.IssueClient("/packager/alpha", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Dir(a.CertFile())
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]bool{"ca.pem": true, "ca.key": true, "crl.pem": true,
		filepath.Base(server.CertFile): true, filepath.Base(server.KeyFile): true,
		"packager-alpha.pem": true, filepath.Base(client.KeyFile): true}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		if !want[e.Name()] {
			t.Errorf("%s was left behind", e.Name())
		}
		if got := info.Mode().Perm(); got != 0o600 {
			t.Errorf("%s: got mode %o, want 600", e.Name(), got)
		}
	}
	if len(entries) != len(want) {
		t.Errorf("got %d files, want %d", len(entries), len(want))
	}
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("directory: got %v, %v, want mode 700", info.Mode(), err)
	}
	for _, file := range []string{a.CertFile(), server.CertFile, client.CertFile} {
		if cert := parseCert(t, file); !strings.Contains(cert.Subject.String(), "NOT FOR PRODUCTION") {
			t.Errorf("%s: subject %s does not say that it is not for production", file, cert.Subject)
		}
	}
}

func TestAuthorityKeepsPairs(t *testing.T) {
	const lifetime = 90 * time.Hour
	tests := []struct {
		name   string
		change func(t *testing.T, clk *clock, pair certs.Pair)
		keep   bool
	}{
		{"at once", func(*testing.T, *clock, certs.Pair) {}, true},
		{"more than a third left", func(_ *testing.T, clk *clock, _ certs.Pair) { clk.Advance(59 * time.Hour) }, true},
		{"less than a third left", func(_ *testing.T, clk *clock, _ certs.Pair) { clk.Advance(61 * time.Hour) }, false},
		{"no key", func(t *testing.T, _ *clock, pair certs.Pair) {
			if err := os.Remove(pair.KeyFile); err != nil {
				t.Fatal(err)
			}
		}, false},
		{"no certificate", func(t *testing.T, _ *clock, pair certs.Pair) {
			if err := os.Remove(pair.CertFile); err != nil {
				t.Fatal(err)
			}
		}, false},
		{"key of another pair", func(t *testing.T, _ *clock, pair certs.Pair) {
			writeFile(t, pair.KeyFile, readFile(t, filepath.Join(filepath.Dir(pair.KeyFile), "ca.key")))
		}, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			clk := newClock()
			a := openAuthority(t, trustDomain, clk)
			issue := map[string]func() (certs.Pair, error){
				"server": func() (certs.Pair, error) {
					return a.IssueServer([]string{"localhost"}, []net.IP{net.IPv4(127, 0, 0, 1)}, lifetime)
				},
				"client": func() (certs.Pair, error) { return a.IssueClient("packager/alpha", lifetime) },
			}
			for kind, issue := range issue {
				pair, err := issue()
				if err != nil {
					t.Fatal(err)
				}
				before := parseCert(t, pair.CertFile)
				start := clk.Now()
				tt.change(t, clk, pair)
				if pair, err = issue(); err != nil {
					t.Fatal(err)
				}
				after := parseCert(t, pair.CertFile)
				if after.Equal(before) != tt.keep {
					t.Errorf("%s: kept %t, want %t", kind, !tt.keep, tt.keep)
				}
				clk.Set(start)
			}
		})
	}
}

func TestAuthorityNewNames(t *testing.T) {
	a := openAuthority(t, trustDomain, newClock())
	if _, err := a.IssueServer([]string{"localhost"}, nil, time.Hour); err != nil {
		t.Fatal(err)
	}
	pair, err := a.IssueServer([]string{"localhost", "keys.example"}, nil, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if got := parseCert(t, pair.CertFile).DNSNames; len(got) != 2 {
		t.Errorf("got names %q, want both", got)
	}
}

// Nobody's files are overwritten with somebody else's.
func TestAuthorityRefusesNames(t *testing.T) {
	a := openAuthority(t, trustDomain, newClock())
	if _, err := a.IssueClient("/a/b", time.Hour); err != nil {
		t.Fatal(err)
	}
	ca := readFile(t, a.CertFile())
	for _, path := range []string{"/a-b", "/ca", "/crl", "", "/", "/..", "/a//b", "/a b", "/a?b", "/.hidden"} {
		if _, err := a.IssueClient(path, time.Hour); err == nil {
			t.Errorf("client %q was issued", path)
		}
	}
	for _, name := range []string{"a-b", "ca", "../x", "/x"} {
		if _, err := a.IssueServer([]string{name}, nil, time.Hour); err == nil {
			t.Errorf("server %q was issued", name)
		}
	}
	if _, err := a.IssueServer(nil, nil, time.Hour); err == nil {
		t.Error("a server without a name was issued")
	}
	if string(readFile(t, a.CertFile())) != string(ca) {
		t.Error("the authority's certificate was overwritten")
	}
	stranger := openAuthority(t, trustDomain, newClock())
	pair, err := stranger.IssueClient("/x", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if err := a.RevokeFile(pair.CertFile); err == nil {
		t.Error("another authority's certificate was revoked")
	}
}

func TestAuthorityRefusesReadableKey(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "pki")
	if _, err := certs.OpenAuthority(dir, trustDomain); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(dir, "ca.key"), 0o604); err != nil {
		t.Fatal(err)
	}
	if _, err := certs.OpenAuthority(dir, trustDomain); err == nil || !strings.Contains(err.Error(), "mode 0604") {
		t.Errorf("got %v, want a complaint about mode 0604", err)
	}
}
