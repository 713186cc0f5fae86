package anchor_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/anchor"
	"github.com/keycustody/custodian/internal/audit"
	"github.com/keycustody/custodian/internal/checkpoint"
)

// A testLog is a real audit log with a key in software.
type testLog struct {
	t   *testing.T
	dir string
	key *ecdsa.PrivateKey
	log *audit.Log
}

func newLog(t *testing.T) *testLog {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	l := &testLog{t: t, dir: filepath.Join(t.TempDir(), "audit"), key: key}
	if l.log, err = audit.Create(l.dir, audit.Options{}); err != nil {
		t.Fatal(err)
	}
	l.sign()
	t.Cleanup(func() { l.log.Close() })
	return l
}

func (l *testLog) sign() {
	l.t.Helper()
	origin := checkpoint.Origin(l.log.ID())
	signer, err := checkpoint.NewSigner(origin, l.key)
	if err != nil {
		l.t.Fatal(err)
	}
	err = l.log.SignWith(audit.Signer{
		Sign: func(size uint64, root [32]byte) ([]byte, error) {
			return checkpoint.Checkpoint{Origin: origin, Size: size, Root: root}.Sign(signer)
		},
		Check: func(signed []byte) error { _, err := checkpoint.Verify(signed, l.key.Public()); return err },
	})
	if err != nil {
		l.t.Fatal(err)
	}
}

// add writes n entries in batches of one.
func (l *testLog) add(n int) {
	l.t.Helper()
	for range n {
		if _, err := l.log.Append(l.t.Context(), []audit.Entry{{Action: "release", Outcome: audit.Allowed}}); err != nil {
			l.t.Fatal(err)
		}
	}
}

// copy is what is on disk now, for back.
func (l *testLog) copy() []byte {
	l.t.Helper()
	b, err := os.ReadFile(filepath.Join(l.dir, "audit.log"))
	if err != nil {
		l.t.Fatal(err)
	}
	return b
}

// back puts an older copy in place.
func (l *testLog) back(b []byte) {
	l.t.Helper()
	err := l.log.Close()
	if err == nil {
		err = os.WriteFile(filepath.Join(l.dir, "audit.log"), b, 0o600)
	}
	if err == nil {
		l.log, err = audit.Open(l.dir, audit.Options{})
	}
	if err != nil {
		l.t.Fatal(err)
	}
	l.sign()
}

func (l *testLog) anchored() custodian.AnchoredLog {
	return custodian.AnchoredLog{
		Origin:      checkpoint.Origin(l.log.ID()),
		Checkpoint:  l.log.Checkpoint,
		Verify:      func(signed []byte) (checkpoint.Checkpoint, error) { return checkpoint.Verify(signed, l.key.Public()) },
		Consistency: audit.NewProver(l.dir).Consistency,
	}
}

// A witness is the one of this package, over HTTP, and can be put out of order.
type witness struct {
	*httptest.Server
	server *anchor.Server
	dir    string
	broken atomic.Int32 // status to answer with; 0: none
	lost   atomic.Bool  // it takes the checkpoint, and the answer is lost
	calls  atomic.Int32
}

func newWitness(t *testing.T, l *testLog) *witness {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	w := &witness{dir: t.TempDir()}
	w.server = &anchor.Server{Dir: w.dir, Name: "witness.test/w1", Key: key}
	w.Server = httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, req *http.Request) {
		w.calls.Add(1)
		if status := w.broken.Load(); status != 0 {
			rw.WriteHeader(int(status))
			return
		}
		if w.lost.Load() {
			w.server.ServeHTTP(httptest.NewRecorder(), req)
			panic(http.ErrAbortHandler)
		}
		w.server.ServeHTTP(rw, req)
	}))
	t.Cleanup(w.Close)
	w.know(t, l)
	return w
}

func (w *witness) know(t *testing.T, l *testLog) {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(l.key.Public())
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(w.dir, w.log(l)+".pem"), checkpoint.FormatKey(der), 0o600); err != nil {
		t.Fatal(err)
	}
}

func (w *witness) log(l *testLog) string {
	return strings.TrimPrefix(checkpoint.Origin(l.log.ID()), "custodian/")
}

func (w *witness) config() anchor.Config {
	return anchor.Config{Name: "w1", Kind: anchor.Witness, URL: w.URL, Key: w.server.VerifierKey(), Interval: time.Second}
}

func open(t *testing.T, o anchor.Options) *anchor.Set {
	t.Helper()
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.AlertAfter == 0 {
		o.AlertAfter = time.Hour
	}
	for _, c := range o.Anchors {
		if err := errors.Join(c.Check()...); err != nil {
			t.Fatal(err)
		}
	}
	s, err := anchor.New(o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// check is the check of a start, by a set that knows nothing.
func check(t *testing.T, l *testLog, c anchor.Config) (custodian.AnchorStatus, error) {
	t.Helper()
	s := open(t, anchor.Options{Anchors: []anchor.Config{c}})
	err := s.Check(t.Context(), l.anchored())
	return s.Status()[0], err
}

// What anchors that answer see of a log that goes on, is rolled back, and is
// forked.
func TestRollback(t *testing.T) {
	t.Parallel()
	l := newLog(t)
	w := newWitness(t, l)
	for _, c := range []anchor.Config{w.config(), {Name: "worm", Kind: anchor.Directory, Path: t.TempDir(), Interval: time.Second}} {
		t.Run(c.Kind, func(t *testing.T) {
			l := newLog(t)
			w.know(t, l)
			good := func(what string, size uint64) {
				t.Helper()
				if st, err := check(t, l, c); err != nil || st.Size != size || st.LastError != "" || st.Lag != 0 {
					t.Errorf("%s: %+v, %v, want %d entries", what, st, err, size)
				}
			}
			bad := func(what string, want error) {
				t.Helper()
				if st, err := check(t, l, c); !errors.Is(err, want) || st.LastError == "" {
					t.Errorf("%s: %v, want %v", what, err, want)
				}
			}
			l.add(5)
			good("new", 5)
			older := l.copy()
			good("again", 5)
			l.add(8)
			good("longer", 13)
			newer := l.copy()

			l.back(older)
			bad("rolled back", custodian.ErrAnchorAhead)
			l.add(7)
			bad("rolled back, and shorter still", custodian.ErrAnchorAhead)
			l.add(1)
			bad("another log of the same size", custodian.ErrAnchorFork)
			l.add(10)
			bad("another log that is longer", custodian.ErrAnchorFork)
			l.back(newer)
			good("the right one again", 13)
		})
	}
}

// A witness that took a checkpoint and whose answer was lost, and one that is
// away, are asked again; one that does not know us says so.
func TestWitnessFaults(t *testing.T) {
	t.Parallel()
	l := newLog(t)
	l.add(3)
	w := newWitness(t, l)
	s := open(t, anchor.Options{Anchors: []anchor.Config{w.config()}})
	w.lost.Store(true)
	if err := s.Check(t.Context(), l.anchored()); err != nil || s.Status()[0].LastError == "" {
		t.Fatalf("lost answer: %v, %+v", err, s.Status())
	}
	l.add(2)
	w.lost.Store(false)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- s.Run(ctx) }()
	await(t, "the witness has 5", func() bool { return s.Status()[0].Size == 5 && s.Status()[0].Lag == 0 })
	if s.Status()[0].Failures != 1 || s.Status()[0].LastError != "" {
		t.Errorf("status = %+v, want one failure", s.Status()[0])
	}
	w.broken.Store(http.StatusBadGateway)
	l.add(4)
	await(t, "it is behind", func() bool { return s.Status()[0].Lag == 4 && s.Status()[0].LastError != "" })
	w.broken.Store(0)
	await(t, "it has 9", func() bool { return s.Status()[0].Size == 9 })
	cancel()
	if err := <-ended; err != nil {
		t.Errorf("Run: %v", err)
	}

	for _, test := range []struct {
		what string
		do   func()
		want string
	}{
		{"unknown log", func() { os.Remove(filepath.Join(w.dir, w.log(l)+".pem")) }, "does not know the log"},
		{"unknown key", func() { w.know(t, &testLog{t: t, key: newLog(t).key, log: l.log}) }, "does not know the key"},
	} {
		test.do()
		if st, err := check(t, l, w.config()); err != nil || !strings.Contains(st.LastError, test.want) {
			t.Errorf("%s: %v, %+v", test.what, err, st)
		}
	}
	w.know(t, l)
	other := w.config()
	other.Key = newWitness(t, l).server.VerifierKey()
	if st, err := check(t, l, other); err != nil || !strings.Contains(st.LastError, "cosignature") {
		t.Errorf("cosignature of another witness: %v, %+v", err, st)
	}
	other.Key = ""
	if st, err := check(t, l, other); err != nil || st.Size != 9 {
		t.Errorf("no cosignature wanted: %v, %+v", err, st)
	}
}

// A rollback that an anchor could not show at the start is found when it is
// back.
func TestRunFindsRollback(t *testing.T) {
	t.Parallel()
	l := newLog(t)
	w := newWitness(t, l)
	l.add(3)
	older := l.copy()
	l.add(3)
	if _, err := check(t, l, w.config()); err != nil {
		t.Fatal(err)
	}
	l.back(older)
	w.broken.Store(http.StatusServiceUnavailable)
	s := open(t, anchor.Options{Anchors: []anchor.Config{w.config()}, Required: true, StartWithout: time.Hour})
	if err := s.Check(t.Context(), l.anchored()); err != nil {
		t.Fatal(err)
	}
	if err := s.Blocked(); err != nil {
		t.Errorf("within the time without an anchor: %v", err)
	}
	w.broken.Store(0)
	if err := s.Run(t.Context()); !errors.Is(err, custodian.ErrAnchorAhead) {
		t.Errorf("Run: %v, want ErrAnchorAhead", err)
	}
}

// Where an anchor is required, nothing is released without one for longer than
// configured, and syslog is none that can be asked.
func TestBlocked(t *testing.T) {
	t.Parallel()
	l := newLog(t)
	l.add(1)
	w := newWitness(t, l)
	w.broken.Store(http.StatusServiceUnavailable)
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	log := anchor.Config{Name: "log", Kind: anchor.Syslog, Address: "udp:" + pc.LocalAddr().String(), Interval: time.Second}
	s := open(t, anchor.Options{Anchors: []anchor.Config{log, w.config()}, Required: true, StartWithout: 300 * time.Millisecond})
	if err := s.Check(t.Context(), l.anchored()); err != nil {
		t.Fatal(err)
	}
	if err := s.Blocked(); err != nil {
		t.Errorf("at once: %v", err)
	}
	await(t, "it is blocked", func() bool { return s.Blocked() != nil })
	if err := s.Blocked(); !strings.Contains(err.Error(), "anchor w1") {
		t.Errorf("Blocked = %v, want it to name the witness", err)
	}
	w.broken.Store(0)
	go s.Run(t.Context())
	await(t, "it is not blocked any more", func() bool { return s.Blocked() == nil })
}

// An anchor that is too far behind is an alert, once, until it has caught up.
func TestAlert(t *testing.T) {
	t.Parallel()
	l := newLog(t)
	l.add(1)
	w := newWitness(t, l)
	alerts := make(chan custodian.AnchorAlert, 10)
	s := open(t, anchor.Options{Anchors: []anchor.Config{w.config()}, AlertAfter: 2 * time.Second, OnAlert: func(a custodian.AnchorAlert) { alerts <- a }})
	if err := s.Check(t.Context(), l.anchored()); err != nil {
		t.Fatal(err)
	}
	go s.Run(t.Context())
	w.broken.Store(http.StatusServiceUnavailable)
	l.add(2)
	declared := <-alerts
	if declared.Anchor != "w1" || !declared.Closed.IsZero() || declared.Lag != 2 || !strings.Contains(declared.LastError, "503") {
		t.Errorf("declared: %+v", declared)
	}
	if st := s.Status()[0]; st.Alert.IsZero() || st.LagTime < 2*time.Second {
		t.Errorf("status = %+v", st)
	}
	w.broken.Store(0)
	closed := <-alerts
	if closed.ID != declared.ID || closed.Closed.IsZero() || closed.Lag != 0 || !s.Status()[0].Alert.IsZero() {
		t.Errorf("closed: %+v", closed)
	}
	if len(alerts) > 0 {
		t.Errorf("one more alert: %+v", <-alerts)
	}
}

// In a directory no file is ever written twice, what is no checkpoint proves
// nothing, and the folder itself is not made.
func TestDirectory(t *testing.T) {
	l := newLog(t)
	l.add(2)
	c := anchor.Config{Name: "worm", Kind: anchor.Directory, Path: t.TempDir(), Interval: time.Second}
	if st, err := check(t, l, c); err != nil || st.Size != 2 {
		t.Fatalf("%v, %+v", err, st)
	}
	l.add(2)
	if st, err := check(t, l, c); err != nil || st.Size != 4 {
		t.Fatalf("%v, %+v", err, st)
	}
	files, err := filepath.Glob(filepath.Join(c.Path, "*", "*.checkpoint"))
	if err != nil || len(files) != 2 {
		t.Fatalf("files = %q, %v, want two", files, err)
	}
	for i, want := range []uint64{2, 4} {
		signed, err := os.ReadFile(files[i])
		if err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(files[i])
		if got, verr := checkpoint.Verify(signed, l.key.Public()); err != nil || verr != nil || got.Size != want || info.Mode().Perm()&0o222 != 0 {
			t.Errorf("%s: %+v, %v, mode %s", files[i], got, verr, info.Mode())
		}
	}
	// A file that was cut off, and a good one under the name of a larger size.
	dir := filepath.Dir(files[0])
	signed, err := os.ReadFile(files[1])
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{"00000000000000000009-x.checkpoint": signed[:40], "00000000000000000008-x.checkpoint": signed} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if st, err := check(t, l, c); err != nil || st.Size != 4 || st.LastError != "" {
		t.Errorf("with files that are no checkpoints: %v, %+v", err, st)
	}
	c.Path = filepath.Join(c.Path, "not-mounted")
	if st, err := check(t, l, c); err != nil || !strings.Contains(st.LastError, "no such file") {
		t.Errorf("no folder: %v, %+v", err, st)
	}
}

// Every transport of syslog carries the checkpoint, whole.
func TestSyslog(t *testing.T) {
	l := newLog(t)
	l.add(2)
	dir := t.TempDir()
	packet := func(network, address string) (net.Addr, func() string) {
		pc, err := net.ListenPacket(network, address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { pc.Close() })
		return pc.LocalAddr(), func() string {
			b := make([]byte, 4096)
			pc.SetReadDeadline(time.Now().Add(5 * time.Second))
			n, _, err := pc.ReadFrom(b)
			if err != nil {
				t.Fatal(err)
			}
			return string(b[:n])
		}
	}
	stream := func(network, address string) (net.Addr, func() string) {
		ln, err := net.Listen(network, address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ln.Close() })
		return ln.Addr(), func() string {
			conn, err := ln.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			b, err := io.ReadAll(conn)
			if err != nil {
				t.Fatal(err)
			}
			return string(b)
		}
	}
	udp, readUDP := packet("udp", "127.0.0.1:0")
	tcp, readTCP := stream("tcp", "127.0.0.1:0")
	datagrams, readDatagrams := packet("unixgram", filepath.Join(dir, "d"))
	connections, readConnections := stream("unix", filepath.Join(dir, "c"))
	for _, test := range []struct {
		address string
		read    func() string
	}{
		{"udp:" + udp.String(), readUDP}, {"tcp:" + tcp.String(), readTCP},
		{"unix:" + datagrams.String(), readDatagrams}, {"unix:" + connections.String(), readConnections},
	} {
		c := anchor.Config{Name: "log", Kind: anchor.Syslog, Address: test.address, Interval: time.Second}
		if st, err := check(t, l, c); err != nil || st.Size != 2 {
			t.Fatalf("%s: %v, %+v", test.address, err, st)
		}
		message := test.read()
		if strings.HasPrefix(test.address, "tcp") {
			size, rest, _ := strings.Cut(message, " ")
			if size != strconv.Itoa(len(rest)) {
				t.Errorf("%s: a frame of %d bytes says %s", test.address, len(rest), size)
			}
			message = rest
		}
		if !strings.HasPrefix(message, "<109>1 20") || strings.Contains(message, "\n") {
			t.Errorf("%s: message %q", test.address, message)
		}
		_, note, _ := strings.Cut(message, " note=")
		signed, err := base64.StdEncoding.DecodeString(note)
		if got, verr := checkpoint.Verify(signed, l.key.Public()); err != nil || verr != nil || got.Size != 2 {
			t.Errorf("%s: %q, %v, %v", test.address, message, err, verr)
		}
	}
}

func TestConfigFaults(t *testing.T) {
	for _, test := range []struct {
		c    anchor.Config
		want string
	}{
		{anchor.Config{Kind: anchor.Syslog, Interval: time.Minute, Address: "udp:h:1"}, "name"},
		{anchor.Config{Name: "a", Kind: "smoke"}, "kind"},
		{anchor.Config{Name: "a", Kind: anchor.Directory, Path: "/x", Interval: time.Millisecond}, "interval"},
		{anchor.Config{Name: "a", Kind: anchor.Directory, Interval: time.Minute}, "path"},
		{anchor.Config{Name: "a", Kind: anchor.Directory, Interval: time.Minute, Path: "/x", URL: "https://h"}, "url: is not for"},
		{anchor.Config{Name: "a", Kind: anchor.Witness, Interval: time.Minute, URL: "http://witness.test/"}, "url: scheme"},
		{anchor.Config{Name: "a", Kind: anchor.Witness, Interval: time.Minute, URL: "https://h/", Key: "n+00000000+AAAA"}, "key"},
		{anchor.Config{Name: "a", Kind: anchor.Witness, Interval: time.Minute, URL: "https://h/", CAFile: "/none"}, "ca_file"},
		{anchor.Config{Name: "a", Kind: anchor.Syslog, Interval: time.Minute, Address: "h:514"}, "address"},
		{anchor.Config{Name: "a", Kind: anchor.Syslog, Interval: time.Minute, Address: "unix:dev/log"}, "address"},
	} {
		if err := errors.Join(test.c.Check()...); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%+v: %v, want a fault of %s", test.c, err, test.want)
		}
	}
}

func await(t *testing.T, what string, until func() bool) {
	t.Helper()
	for range 1000 {
		if until() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("after ten seconds it is not so that %s", what)
}
