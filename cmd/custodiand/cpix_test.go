package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/keycustody/custodian/custodian"
)

// writeRecipient writes a certificate that signs itself, as PEM.
func writeRecipient(t *testing.T, path string, public, private any) {
	t.Helper()
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, public, private)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestCPIXConfig(t *testing.T) {
	dir := t.TempDir()
	good, elliptical, chain, key := filepath.Join(dir, "good.pem"), filepath.Join(dir, "ec.pem"), filepath.Join(dir, "chain.pem"), filepath.Join(dir, "key.pem")
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	ecKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	writeRecipient(t, good, &rsaKey.PublicKey, rsaKey)
	writeRecipient(t, elliptical, &ecKey.PublicKey, ecKey)
	one, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}
	for path, b := range map[string][]byte{chain: append(one, one...), key: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte("x")})} {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, test := range []struct {
		name   string
		config CPIXConfig
		want   []string // parts of the error; none: it is good
	}{
		{"nothing", CPIXConfig{}, nil},
		{"good", CPIXConfig{Recipients: []CPIXRecipientConfig{{Name: "a", CertFile: good, Identities: []string{"x"}, Export: []string{"movies"}}}, Encrypted: []string{"movies"}}, nil},
		{"all faults at once", CPIXConfig{Recipients: []CPIXRecipientConfig{{CertFile: good, Identities: []string{"x"}}, {Name: "b", CertFile: filepath.Join(dir, "none"), Export: []string{"?"}}}, Encrypted: []string{"!"}},
			[]string{"cpix.recipients[0].name:", "cpix.recipients[1].cert_file: open", "cpix.recipients[1].export:", "cpix.encrypted[0]:"}},
		{"a name twice", CPIXConfig{Recipients: []CPIXRecipientConfig{{Name: "a", CertFile: good, Identities: []string{"x"}}, {Name: "a", CertFile: good, Identities: []string{"x"}}}}, []string{"cpix.recipients[1].name"}},
		{"for nothing", CPIXConfig{Recipients: []CPIXRecipientConfig{{Name: "a", CertFile: good}}}, []string{"cpix.recipients[0].identities: it and export are empty"}},
		{"EC", CPIXConfig{Recipients: []CPIXRecipientConfig{{Name: "a", CertFile: elliptical, Identities: []string{"x"}}}}, []string{"RSA keys only"}},
		{"a chain", CPIXConfig{Recipients: []CPIXRecipientConfig{{Name: "a", CertFile: chain, Identities: []string{"x"}}}}, []string{"one is pinned, not a chain"}},
		{"a private key", CPIXConfig{Recipients: []CPIXRecipientConfig{{Name: "a", CertFile: key, Identities: []string{"x"}}}}, []string{"not CERTIFICATE"}},
		{"a wrapping of nobody", CPIXConfig{Recipients: []CPIXRecipientConfig{{Name: "a", CertFile: good, KeyWrapping: "des", Identities: []string{"x"}}}}, []string{`key wrapping "des"`}},
	} {
		t.Run(test.name, func(t *testing.T) {
			speke, exports, err := test.config.load()
			if (err == nil) != (len(test.want) == 0) {
				t.Fatalf("got %v, want %q", err, test.want)
			}
			for _, want := range test.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("got %v, want it to say %q", err, want)
				}
			}
			if test.name == "good" && (len(speke.Recipients["x"]) != 1 || !speke.Encrypted["movies"] || len(exports) != 1 || exports[0].Categories[0] != custodian.CategoryName("movies")) {
				t.Errorf("got %+v, %+v", speke, exports)
			}
		})
	}
}
