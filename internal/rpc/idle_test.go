package rpc_test

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/internal/rpc"
)

// idleConns is how many connections the tests below hold open. Their clients
// have a process of their own, so that the limit of open files counts each once.
const idleConns = 10_000

// idleSpec makes this test binary the other end of many connections: it has an
// idler as JSON.
const idleSpec = "CUSTODIAN_TEST_IDLER"

// An idler is the other end of many connections that do nothing.
type idler struct {
	Addr          string
	Cert, Key, CA string // files; none: the connections say nothing at all, not even hello
	Proto         string // for ALPN
	Hello         []byte // what is sent once, where there is a certificate
	Answered      bool   // the answer to it, of HTTP/1.1, is read
}

// run makes the connections, says so on standard output, and holds them until
// standard input ends, or until all of them are closed, which it says too.
func (i idler) run() error {
	var config *tls.Config
	if i.Cert != "" {
		pair, err := tls.LoadX509KeyPair(i.Cert, i.Key)
		if err != nil {
			return err
		}
		ca, err := os.ReadFile(i.CA)
		if err != nil {
			return err
		}
		config = &tls.Config{RootCAs: x509.NewCertPool(), Certificates: []tls.Certificate{pair}, ServerName: "localhost", NextProtos: []string{i.Proto}}
		config.RootCAs.AppendCertsFromPEM(ca)
	}
	conns := make([]net.Conn, idleConns)
	var g errgroup.Group
	g.SetLimit(8)
	for n := range conns {
		g.Go(func() (err error) {
			if conns[n], err = i.dial(config); err != nil {
				return fmt.Errorf("connection %d: %w", n, err)
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	fmt.Println("held")
	go func() {
		for _, c := range conns {
			io.Copy(io.Discard, c) // until it is closed, or reset
		}
		fmt.Println("closed")
	}()
	_, err := io.Copy(io.Discard, os.Stdin)
	return err
}

func (i idler) dial(config *tls.Config) (net.Conn, error) {
	if config == nil {
		return net.Dial("tcp", i.Addr)
	}
	c, err := tls.Dial("tcp", i.Addr, config)
	if err != nil {
		return nil, err
	}
	if _, err := c.Write(i.Hello); err != nil || !i.Answered {
		return c, err
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return nil, err
	}
	_, err = io.Copy(io.Discard, resp.Body)
	return c, err
}

// An idling is an idler that runs.
type idling struct {
	cmd *exec.Cmd
	in  io.Closer
	out *os.File

	before int // files that were open without it
}

// idle has the connections made, and returns when this process, which is the
// server, has accepted every one of them.
func (i idler) idle(t *testing.T) *idling {
	t.Helper()
	spec, err := json.Marshal(i)
	if err != nil {
		t.Fatal(err)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p := &idling{cmd: exec.CommandContext(t.Context(), exe), before: openFiles(t)}
	p.cmd.Env = append(os.Environ(), idleSpec+"="+string(spec))
	p.cmd.Stderr = os.Stderr
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, theirs, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	p.out, p.cmd.Stdout = out, theirs
	err = p.cmd.Start()
	theirs.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.end)
	p.says(t, "held", 2*time.Minute)
	for end := time.Now().Add(10 * time.Second); openFiles(t) < p.before+idleConns; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: of %d connections %d are open at this end", i.Addr, idleConns, openFiles(t)-p.before)
		}
	}
	return p
}

// says waits for a word of the other end.
func (p *idling) says(t *testing.T, want string, within time.Duration) {
	t.Helper()
	p.out.SetReadDeadline(time.Now().Add(within))
	word := make([]byte, len(want)+1)
	if _, err := io.ReadFull(p.out, word); string(word) != want+"\n" {
		t.Fatalf("the other end of the connections: got %q, %v; want %q", word, err, want)
	}
}

// end closes the connections that are open yet. It may be called twice.
func (p *idling) end() {
	p.in.Close()
	p.cmd.Wait()
	p.out.Close()
}

// gone ends it, and returns when nothing is left of its connections here.
func (p *idling) gone(t *testing.T) {
	t.Helper()
	p.end()
	for end := time.Now().Add(10 * time.Second); openFiles(t) > p.before+100; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d connections whose other end is gone are still open", openFiles(t)-p.before)
		}
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	dir, err := os.Open("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		t.Fatal(err)
	}
	return len(names)
}

// needOpenFiles sees to it that this process may have so many connections.
func needOpenFiles(t *testing.T) {
	t.Helper()
	const need = idleConns + 1000
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if limit.Max >= need { // Go has raised the other one to it
		return
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: need, Max: need}); err != nil {
		t.Skipf("%d connections need %d open files, and this machine allows %d: raise it (ulimit -Hn %d)", idleConns, need, limit.Max, need)
	}
}

// TestIdleConnections: 10,000 connections to the listener of the callback that
// say nothing, and all listeners serve; when their other end is gone, nothing is
// left of them.
func TestIdleConnections(t *testing.T) {
	needOpenFiles(t)
	k := newKit(t, options{})
	_, served := k.listeners(t)
	p := idler{Addr: k.addr}.idle(t)
	served(fmt.Sprintf("%d connections are idle", idleConns))
	p.gone(t)
	served("they are gone")
}

// TestLongIdleConnections: 10,000 connections at each listener. Those that say
// nothing are closed after their time; those of callers, with a certificate, are
// kept, and calls are answered meanwhile. It tells what they cost.
func TestLongIdleConnections(t *testing.T) {
	if os.Getenv("CUSTODIAN_LONG") != "1" {
		t.Skip("10,000 connections at each listener, silent and with certificates, a minute: set CUSTODIAN_LONG=1, or make long")
	}
	needOpenFiles(t)
	k := newKit(t, options{})
	addrs, served := k.listeners(t)
	paths := map[string]string{"twin": rpc.TwinPath, "packagers": "/v1/categories/movies/widevine"}
	quiet := k.callbackTime(t)
	for name, addr := range addrs {
		p := idler{Addr: addr}.idle(t)
		start := time.Now()
		p.says(t, "closed", 20*time.Second)
		t.Logf("%s: %d silent connections were closed within %s", name, idleConns, time.Since(start).Round(time.Second))
		p.gone(t)
		served("silent connections have been closed")

		c, err := k.config(everybody)
		if err != nil {
			t.Fatal(err)
		}
		i := idler{Addr: addr, Cert: c.CertFile, Key: c.KeyFile, CA: c.CAFile, Proto: "h2", Hello: preface()}
		if path := paths[name]; path != "" {
			i.Proto, i.Answered = "http/1.1", true
			i.Hello = fmt.Appendf(nil, "POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n", path)
		}
		before := inUse()
		start = time.Now()
		p = i.idle(t)
		took := time.Since(start)
		t.Logf("%s: %d connections with a certificate: made in %s, %d bytes each; a callback takes %s beside them, %s alone", name, idleConns,
			took.Round(time.Second), (inUse()-before)/idleConns, k.callbackTime(t), quiet)
		served(fmt.Sprintf("%d callers of %s have nothing to ask", idleConns, name))
		p.gone(t)
	}
}

// callbackTime is the median of what callbacks for the key of listeners take,
// one after the other.
func (k *kit) callbackTime(t *testing.T) time.Duration {
	t.Helper()
	cl, kid := k.dial(t, provider), k.issue(t, "clip", "HD")[0].GetKid()
	var took []time.Duration
	for range 300 {
		start := time.Now()
		if _, err := cl.GetContentKeys(t.Context(), &v1.GetContentKeysRequest{Kids: [][]byte{kid}}); err != nil {
			t.Fatal(err)
		}
		took = append(took, time.Since(start))
	}
	slices.Sort(took)
	return took[len(took)/2].Round(10 * time.Microsecond)
}

// inUse is the memory of heap and stacks.
func inUse() int {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int(m.HeapAlloc + m.StackInuse)
}

// runIdler is what TestMain calls for an idler.
func runIdler(spec string) error {
	var i idler
	return errors.Join(json.Unmarshal([]byte(spec), &i), i.run())
}
