package certs_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/keycustody/custodian/certs"
)

// renew issues the server's certificate again into its files.
func (b *bench) renew(t *testing.T) {
	t.Helper()
	if err := os.Remove(b.opts.CertFile); err != nil {
		t.Fatal(err)
	}
	if _, err := b.ca.IssueServer([]string{"localhost"}, []net.IP{net.IPv4(127, 0, 0, 1)}, 60*24*time.Hour); err != nil {
		t.Fatal(err)
	}
}

func TestReloadServerCertificate(t *testing.T) {
	b := newBench(t)
	s := b.server(t)
	client := b.client(t, named(alpha))
	serial := func() string {
		var got string
		c := client.Clone()
		c.VerifyConnection = func(cs tls.ConnectionState) error {
			got = cs.PeerCertificates[0].SerialNumber.String()
			return nil
		}
		accepted(t, s, c)
		return got
	}
	before, expires := serial(), s.Status().CertNotAfter
	b.renew(t)
	if got := serial(); got != before {
		t.Error("the certificate changed before a reload")
	}
	if err := s.Reload(); err != nil {
		t.Fatal(err)
	}
	if got := serial(); got == before {
		t.Error("the certificate is the old one after a reload")
	}
	if got := s.Status().CertNotAfter; !got.After(expires) {
		t.Errorf("status: expires %s, was %s before", got, expires)
	}
}

func TestReloadCAs(t *testing.T) {
	b := newBench(t)
	file := filepath.Join(t.TempDir(), "clients.pem")
	writeFile(t, file, readFile(t, b.ca.CertFile()))
	b.opts.CAs[0].File, b.opts.CAs[0].CRLFile = file, ""
	s := b.server(t)
	next := openAuthority(t, trustDomain, b.clk)
	oldClient, newClient := b.client(t, named(alpha)), clientOf(t, next, b, named(alpha))
	csOld := accepted(t, s, oldClient)
	if _, err, _ := connect(t, s.TLSConfig(), newClient); err == nil {
		t.Fatal("a client of the next CA was accepted too early")
	}

	writeFile(t, file, append(readFile(t, b.ca.CertFile()), readFile(t, next.CertFile())...))
	if err := s.Reload(); err != nil {
		t.Fatal(err)
	}
	accepted(t, s, oldClient)
	csNew := accepted(t, s, newClient)

	writeFile(t, file, readFile(t, next.CertFile()))
	if err := s.Reload(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Peer(csOld); !errors.Is(err, certs.ErrNotVouched) {
		t.Errorf("open connection under the old CA: got %v, want %v", err, certs.ErrNotVouched)
	}
	if _, err, _ := connect(t, s.TLSConfig(), oldClient); err == nil {
		t.Error("a client of the old CA was accepted")
	}
	if _, err := s.Peer(csNew); err != nil {
		t.Errorf("open connection under the new CA: %v", err)
	}
	accepted(t, s, newClient)
}

func TestBadFileKeepsLastGood(t *testing.T) {
	stranger := openAuthority(t, "other.test", newClock())
	strangerPair, err := stranger.IssueServer([]string{"localhost"}, nil, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	garbage := func(t *testing.T, file string) { writeFile(t, file, []byte("garbage")) }
	remove := func(t *testing.T, file string) {
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
	}
	copyOf := func(from string) func(*testing.T, string) {
		return func(t *testing.T, file string) { writeFile(t, file, readFile(t, from)) }
	}
	tests := []struct {
		name  string
		file  func(*bench) string
		spoil func(*testing.T, string)
	}{
		{"certificate is garbage", certFile, garbage},
		{"certificate is gone", certFile, remove},
		{"certificate of another key", certFile, copyOf(strangerPair.CertFile)},
		{"certificate is a client's", certFile, nil},
		{"key is garbage", keyFile, garbage},
		{"key is gone", keyFile, remove},
		{"key of another certificate", keyFile, copyOf(strangerPair.KeyFile)},
		{"key is readable by others", keyFile, func(t *testing.T, file string) {
			if err := os.Chmod(file, 0o644); err != nil {
				t.Fatal(err)
			}
		}},
		{"ca is garbage", caFile, garbage},
		{"ca is gone", caFile, remove},
		{"ca is empty", caFile, func(t *testing.T, file string) { writeFile(t, file, nil) }},
		{"ca is no ca", caFile, copyOf(strangerPair.CertFile)},
		{"ca with a damaged second certificate", caFile, func(t *testing.T, file string) {
			good := readFile(t, file)
			writeFile(t, file, append(good, good[:len(good)/2]...))
		}},
		{"crl is garbage", crlFile, garbage},
		{"crl is gone", crlFile, remove},
		{"crl of another ca", crlFile, copyOf(stranger.CRLFile())},
		{"crl is a named pipe", crlFile, func(t *testing.T, file string) {
			remove(t, file)
			if err := unix.Mkfifo(file, 0o600); err != nil {
				t.Fatal(err)
			}
		}},
		{"crl is a directory", crlFile, func(t *testing.T, file string) {
			remove(t, file)
			if err := os.Mkdir(file, 0o700); err != nil {
				t.Fatal(err)
			}
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b := newBench(t)
			client := b.client(t, named(alpha))
			s := b.server(t)
			cs := accepted(t, s, client)
			file := tt.file(b)
			info, err := os.Stat(file)
			if err != nil {
				t.Fatal(err)
			}
			good := readFile(t, file)
			spoil := tt.spoil
			if spoil == nil {
				pair, err := b.ca.IssueClient("/packager/alpha", time.Hour)
				if err != nil {
					t.Fatal(err)
				}
				spoil = copyOf(pair.CertFile)
			}
			spoil(t, file)
			for range 2 {
				err := s.Reload()
				if err == nil || !strings.Contains(err.Error(), file) {
					t.Fatalf("reload: got %v, want a fault in %s", err, file)
				}
			}
			if err := s.Status().ReloadError; err == nil || !strings.Contains(err.Error(), file) {
				t.Errorf("status: got %v, want a fault in %s", err, file)
			}
			accepted(t, s, client)
			if _, err := s.Peer(cs); err != nil {
				t.Errorf("open connection: %v", err)
			}
			if _, err := certs.NewServer(b.opts); err == nil || !strings.Contains(err.Error(), file) {
				t.Errorf("start: got %v, want a fault in %s", err, file)
			}

			if err := os.RemoveAll(file); err != nil {
				t.Fatal(err)
			}
			writeFile(t, file, good)
			if err := os.Chmod(file, info.Mode()); err != nil {
				t.Fatal(err)
			}
			if err := s.Reload(); err != nil {
				t.Errorf("reload of the good file: %v", err)
			}
			if err := s.Status().ReloadError; err != nil {
				t.Errorf("status after the good file: %v", err)
			}
			accepted(t, s, client)
		})
	}
}

func certFile(b *bench) string { return b.opts.CertFile }
func keyFile(b *bench) string  { return b.opts.KeyFile }
func caFile(b *bench) string   { return b.opts.CAs[0].File }
func crlFile(b *bench) string  { return b.opts.CAs[0].CRLFile }

// One bad file does not hold up a revocation in another.
func TestBadFileHoldsUpNoOther(t *testing.T) {
	b := newBench(t)
	s := b.server(t)
	cs := accepted(t, s, b.client(t, named(alpha)))
	writeFile(t, b.opts.KeyFile, []byte("garbage"))
	writeFile(t, b.opts.CAs[0].File, []byte("garbage"))
	if err := b.ca.Revoke(cs.PeerCertificates[0].SerialNumber); err != nil {
		t.Fatal(err)
	}
	if err := s.Reload(); err == nil {
		t.Fatal("garbage was loaded")
	}
	if _, err := s.Peer(cs); !errors.Is(err, certs.ErrRevoked) {
		t.Errorf("got %v, want %v", err, certs.ErrRevoked)
	}
}

// While a CA's two files are replaced one after the other, its new certificates
// wait for their list.
func TestNewCAWaitsForItsList(t *testing.T) {
	b := newBench(t)
	dir := t.TempDir()
	own := &b.opts.CAs[0]
	own.File, own.CRLFile = filepath.Join(dir, "ca.pem"), filepath.Join(dir, "crl.pem")
	writeFile(t, own.File, readFile(t, b.ca.CertFile()))
	writeFile(t, own.CRLFile, readFile(t, b.ca.CRLFile()))
	s := b.server(t)
	next := openAuthority(t, trustDomain, b.clk)
	client := clientOf(t, next, b, named(alpha))

	writeFile(t, own.File, readFile(t, next.CertFile()))
	if err := s.Reload(); err == nil {
		t.Error("a list without its CA was loaded")
	}
	if _, err, _ := connect(t, s.TLSConfig(), client); !errors.Is(err, certs.ErrCRLExpired) {
		t.Errorf("without a list: got %v, want %v", err, certs.ErrCRLExpired)
	}
	if got := s.Status().CAs[0].NoCRL; len(got) != 1 {
		t.Errorf("status: got CAs without a list %q, want one", got)
	}
	writeFile(t, own.CRLFile, readFile(t, next.CRLFile()))
	if err := s.Reload(); err != nil {
		t.Fatal(err)
	}
	accepted(t, s, client)
}

// Two CAs that come to share a certificate while running vouch for nobody.
func TestCAsComeToShareACertificate(t *testing.T) {
	b := newBench(t)
	other := openAuthority(t, "other.test", b.clk)
	file := filepath.Join(t.TempDir(), "other.pem")
	writeFile(t, file, readFile(t, other.CertFile()))
	b.opts.CAs = append(b.opts.CAs, certs.CA{Name: "other", File: file, TrustDomain: "other.test"})
	s := b.server(t)
	cs := accepted(t, s, b.client(t, named(alpha)))
	writeFile(t, file, readFile(t, b.ca.CertFile()))
	if err := s.Reload(); err == nil || !strings.Contains(err.Error(), "is in ca own too") {
		t.Errorf("got %v, want that the certificate is in ca own too", err)
	}
	if _, err := s.Peer(cs); !errors.Is(err, certs.ErrAmbiguousIdentity) {
		t.Errorf("got %v, want %v", err, certs.ErrAmbiguousIdentity)
	}
	writeFile(t, file, readFile(t, other.CertFile()))
	if err := s.Reload(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Peer(cs); err != nil {
		t.Error(err)
	}
}

// A log keeps what was logged.
type log struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *log) count(text string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.buf.String(), text)
}

func TestRunSaysThingsOnce(t *testing.T) {
	b := newBench(t)
	if err := b.ca.WriteCRL(b.clk.Now().Add(48 * time.Hour)); err != nil {
		t.Fatal(err)
	}
	var out log
	b.opts.Log = slog.New(slog.NewTextHandler(&out, nil))
	s := b.server(t)
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- s.Run(ctx, time.Minute) }()
		polls := func() { time.Sleep(5 * time.Minute) }
		expect := func(text string, want int) {
			t.Helper()
			if got := out.count(text); got != want {
				t.Errorf("%q was logged %d times, want %d", text, got, want)
			}
		}
		const kept, reloaded, stale, refused = "last good state", "certificates reloaded", "still applies", "are refused"
		polls()
		for _, text := range []string{kept, reloaded, stale, refused} {
			expect(text, 0)
		}
		good := readFile(t, b.opts.CertFile)
		writeFile(t, b.opts.CertFile, []byte("garbage"))
		polls()
		expect(kept, 1)
		writeFile(t, b.opts.CertFile, good)
		polls()
		expect(kept, 1)
		expect(reloaded, 1)
		b.renew(t)
		polls()
		expect(reloaded, 2)

		b.clk.Advance(48*time.Hour + time.Second)
		polls()
		expect(stale, 1)
		b.clk.Advance(24 * time.Hour)
		polls()
		expect(stale, 1)
		expect(refused, 1)
		if err := b.ca.WriteCRL(b.clk.Now().Add(time.Hour)); err != nil {
			t.Fatal(err)
		}
		polls()
		expect(reloaded, 3)
		b.clk.Advance(time.Hour + time.Second)
		polls()
		expect(stale, 2)

		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	if out.count("PRIVATE") != 0 {
		t.Error("a key was logged")
	}
}

func TestRunNeedsAnInterval(t *testing.T) {
	if err := newBench(t).server(t).Run(t.Context(), 0); err == nil {
		t.Error("Run with interval 0 returned nil")
	}
}

// Requests, handshakes and reloads go on at the same time.
func TestConcurrentUse(t *testing.T) {
	b := newBench(t)
	s := b.server(t)
	cs := accepted(t, s, b.client(t, named(alpha)))
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 200 {
				if _, err := s.Peer(cs); err != nil {
					t.Error(err)
					return
				}
				s.Status()
			}
		})
	}
	for range 20 {
		if err := b.ca.WriteCRL(b.clk.Now().Add(time.Hour)); err != nil {
			t.Fatal(err)
		}
		if err := s.Reload(); err != nil {
			t.Fatal(err)
		}
	}
	wg.Wait()
}

// What each request pays for its identity.
func BenchmarkPeer(b *testing.B) {
	bench := newBench(b)
	s := bench.server(b)
	cs := accepted(b, s, bench.client(b, named(alpha)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := s.Peer(cs); err != nil {
			b.Fatal(err)
		}
	}
}
