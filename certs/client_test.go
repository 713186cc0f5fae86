package certs_test

import (
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/keycustody/custodian/certs"
)

// newClient makes a client in its production form, with files of its own.
func newClient(t *testing.T, b *bench, o certs.ClientOptions) (*certs.Client, certs.ClientOptions) {
	t.Helper()
	pair, err := b.ca.IssueClient("/packager/alpha", 24*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	o.CertFile, o.KeyFile, o.CAFile, o.Now = pair.CertFile, pair.KeyFile, b.ca.CertFile(), b.clk.Now
	if o.ServerName == "" {
		o.ServerName = "localhost"
	}
	c, err := certs.NewClient(o)
	if err != nil {
		t.Fatal(err)
	}
	return c, o
}

func TestClient(t *testing.T) {
	b := newBench(t)
	s := b.server(t)
	c, _ := newClient(t, b, certs.ClientOptions{})
	cs := accepted(t, s, c.TLSConfig())
	if peer, err := s.Peer(cs); err != nil || peer.Name != alpha {
		t.Errorf("got %+v, %v, want %s", peer, err, alpha)
	}
	if cs.Version != tls.VersionTLS13 {
		t.Errorf("got %s, want TLS 1.3", tls.VersionName(cs.Version))
	}
}

func TestClientReload(t *testing.T) {
	b := newBench(t)
	s := b.server(t)
	var out log
	c, o := newClient(t, b, certs.ClientOptions{Log: slog.New(slog.NewTextHandler(&out, nil))})
	config := c.TLSConfig()
	serial := func() string { return accepted(t, s, config).PeerCertificates[0].SerialNumber.String() }
	first := serial()

	if err := os.Remove(o.CertFile); err != nil {
		t.Fatal(err)
	}
	if got := serial(); got != first {
		t.Error("without a file, the last good certificate was not used")
	}
	if _, err := b.ca.IssueClient("/packager/alpha", 24*time.Hour); err != nil {
		t.Fatal(err)
	}
	second := serial()
	if second == first {
		t.Error("the new certificate was not used")
	}
	writeFile(t, o.KeyFile, []byte("garbage"))
	for range 3 {
		if got := serial(); got != second {
			t.Error("with a bad key file, the last good certificate was not used")
		}
	}
	if got := out.count("last good one"); got != 2 {
		t.Errorf("two faults were logged %d times", got)
	}
}

// The client says itself that its certificate has expired.
func TestClientExpired(t *testing.T) {
	b := newBench(t)
	b.opts.CAs[0].CRLFile = ""
	s := b.server(t)
	c, o := newClient(t, b, certs.ClientOptions{})
	accepted(t, s, c.TLSConfig())
	b.clk.Advance(25 * time.Hour)
	_, _, err := connect(t, s.TLSConfig(), c.TLSConfig())
	if !errors.Is(err, certs.ErrExpired) {
		t.Errorf("handshake: got %v, want %v", err, certs.ErrExpired)
	}
	if _, err := certs.NewClient(o); !errors.Is(err, certs.ErrExpired) {
		t.Errorf("start: got %v, want %v", err, certs.ErrExpired)
	}
	if _, err := b.ca.IssueClient("/packager/alpha", 24*time.Hour); err != nil {
		t.Fatal(err)
	}
	accepted(t, s, c.TLSConfig())
}

func TestClientRefusesServer(t *testing.T) {
	b := newBench(t)
	s := b.server(t)
	stranger := openAuthority(t, trustDomain, b.clk)
	pair, err := stranger.IssueServer([]string{"localhost"}, []net.IP{net.IPv4(127, 0, 0, 1)}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	strangeOpts := b.opts
	strangeOpts.CertFile, strangeOpts.KeyFile = pair.CertFile, pair.KeyFile
	strange, err := certs.NewServer(strangeOpts)
	if err != nil {
		t.Fatal(err)
	}
	good, _ := newClient(t, b, certs.ClientOptions{})
	wrongName, _ := newClient(t, b, certs.ClientOptions{ServerName: "other.example"})
	keys, err := tls.LoadX509KeyPair(b.opts.CertFile, b.opts.KeyFile)
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name   string
		server *tls.Config
		client *certs.Client
	}{
		{"of another CA", strange.TLSConfig(), good},
		{"of another name", s.TLSConfig(), wrongName},
		{"with TLS 1.2", &tls.Config{Certificates: []tls.Certificate{keys}, MaxVersion: tls.VersionTLS12, Time: b.clk.Now}, good},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if _, _, err := connect(t, tt.server, tt.client.TLSConfig()); err == nil {
				t.Error("the server was accepted")
			}
		})
	}
}

func TestNewClientNamesAllFaults(t *testing.T) {
	b := newBench(t)
	_, good := newClient(t, b, certs.ClientOptions{})
	missing := filepath.Join(t.TempDir(), "missing")
	readable := filepath.Join(t.TempDir(), "readable.key")
	writeFile(t, readable, readFile(t, good.KeyFile))
	if err := os.Chmod(readable, 0o640); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name  string
		spoil func(*certs.ClientOptions)
		want  []string
	}{
		{"no files", func(o *certs.ClientOptions) {
			o.CertFile, o.KeyFile, o.CAFile = missing+".pem", missing+".key", missing+".ca"
		},
			[]string{missing + ".pem: ", missing + ".key: ", missing + ".ca: "}},
		{"key is readable by the group", func(o *certs.ClientOptions) { o.KeyFile = readable }, []string{readable + ": mode 0640"}},
		{"certificate is a server's", func(o *certs.ClientOptions) { o.CertFile, o.KeyFile = b.opts.CertFile, b.opts.KeyFile },
			[]string{b.opts.CertFile + ": ", "clientAuth"}},
		{"CA is no CA", func(o *certs.ClientOptions) { o.CAFile = b.opts.CertFile }, []string{b.opts.CertFile + ": ", "not a CA"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			o := good
			tt.spoil(&o)
			_, err := certs.NewClient(o)
			if err == nil {
				t.Fatal("accepted")
			}
			for _, want := range tt.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("no %q in: %v", want, err)
				}
			}
		})
	}
}
