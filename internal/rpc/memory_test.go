package rpc_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/certs"
	"github.com/keycustody/custodian/custodian"
)

// daemonDir makes this test binary a daemon in the directory that it names.
const daemonDir = "CUSTODIAN_TEST_DAEMON_DIR"

func TestMain(m *testing.M) {
	if dir := os.Getenv(daemonDir); dir != "" {
		if err := runDaemon(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if spec := os.Getenv(idleSpec); spec != "" {
		if err := runIdler(spec); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// runDaemon serves until its standard input ends.
func runDaemon(dir string) error {
	k, err := openKit(context.Background(), dir, options{config: func(c *rpcConfig) { c.RetrieveDeadline = time.Minute }})
	defer k.close()
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(context.Background())
	twin := make(chan error, 1)
	go func() { twin <- k.server.ServeTwin(ctx, l, time.Second) }()
	fmt.Println(k.addr, l.Addr())
	_, err = io.Copy(io.Discard, os.Stdin)
	stop()
	return errors.Join(err, <-twin)
}

// startDaemon runs a kit in a process of its own and returns its id.
func startDaemon(t *testing.T) (k *kit, twin string, pid int) {
	t.Helper()
	dir := t.TempDir()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), exe)
	// As custodiand does for itself: no signals that save registers.
	cmd.Env = append(os.Environ(), daemonDir+"="+dir, "GODEBUG=asyncpreemptoff=1")
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close(); cmd.Wait() })
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatalf("daemon: no address: %v", err)
	}
	addr, httpAddr, _ := strings.Cut(strings.TrimSpace(line), " ")
	ca, err := certs.OpenAuthority(filepath.Join(dir, "pki"), trustDomain)
	if err != nil {
		t.Fatal(err)
	}
	return &kit{dir: dir, ca: ca, addr: addr}, "https://" + httpAddr, cmd.Process.Pid
}

// TestKeysLeaveMemory looks for released keys in a memory image of the daemon:
// after 1,000 keys were issued and each was released alone and among others, by
// gRPC and by the HTTP twin, all connections are closed and five seconds have passed, at most one of them may
// be anywhere.
func TestKeysLeaveMemory(t *testing.T) {
	if testing.Short() {
		t.Skip("waits five seconds")
	}
	k, twin, pid := startDaemon(t)
	keys := k.releaseKeys(t, twin, 1000)
	for _, key := range keys { // as the twin writes them
		keys = append(keys, []byte(base64.StdEncoding.EncodeToString(key))[:16])
	}

	time.Sleep(5 * time.Second)
	left := findKeys(t, pid, keys)
	for i, where := range left {
		t.Logf("key %d: %s", i, where)
	}
	if got, want := len(left), 1; got > want {
		t.Errorf("keys in memory: got %d of %d, want at most %d", got, len(keys), want)
	}
}

// TestFindKeys: a search that finds nothing must be one that can find. The
// daemon has the name of this variable in its environment.
func TestFindKeys(t *testing.T) {
	_, _, pid := startDaemon(t)
	there, nowhere := []byte(daemonDir)[:16], bytes.Repeat([]byte{0xa5, 0x5a}, 8)
	left := findKeys(t, pid, [][]byte{there, nowhere})
	if _, found := left[0]; !found || len(left) != 1 {
		t.Errorf("found %v, want the first of two patterns", left)
	}
}

// releaseKeys issues n keys, releases each of them alone and in a call of
// sixteen, a quarter of them also by the HTTP twin, over a few connections that
// are closed in the end, and returns them.
func (k *kit) releaseKeys(t *testing.T, twin string, n int) [][]byte {
	t.Helper()
	var keys, kids [][]byte
	t.Run("release", func(t *testing.T) { // its clean-up closes the connections
		k.createCategory(t, "movies")
		for i := range n / 10 {
			var tracks []string
			for track := range 10 {
				tracks = append(tracks, fmt.Sprintf("T%d", track))
			}
			for _, key := range k.issue(t, fmt.Sprintf("clip-%d", i), tracks...) {
				keys, kids = append(keys, key.GetKey()), append(kids, key.GetKid())
			}
		}
		var wg sync.WaitGroup
		for part := range 4 {
			cl, browser := k.dial(t, provider), k.browser(t, provider, nil)
			wg.Go(func() {
				for i := part; i < n; i += 4 {
					if i%16 < 4 {
						kid, _ := custodian.KIDFromBytes(kids[i])
						a := post(t, browser, twin, map[string]any{"kids": []string{kid.String()}})
						if len(a.Results) != 1 || a.Results[0].Key["key"] != base64.StdEncoding.EncodeToString(keys[i]) {
							t.Errorf("key %d by the twin: %+v", i, a.Error)
							return
						}
					}
					resp, err := cl.GetContentKeys(t.Context(), &v1.GetContentKeysRequest{Kids: kids[i : i+1]})
					if err != nil || !bytes.Equal(resp.GetResults()[0].GetKey().GetKey(), keys[i]) {
						t.Errorf("key %d: %v", i, err)
						return
					}
					if i%16 == 0 {
						if _, err := cl.GetContentKeys(t.Context(), &v1.GetContentKeysRequest{Kids: kids[i:min(i+16, n)]}); err != nil {
							t.Error(err)
							return
						}
					}
				}
			})
		}
		wg.Wait()
	})
	if t.Failed() {
		t.FailNow()
	}
	return keys
}

// findKeys says where in the writable memory of a process the keys are, by the
// index of the key.
func findKeys(t *testing.T, pid int, keys [][]byte) map[int]string {
	t.Helper()
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		t.Skipf("no memory map of another process here: %v", err)
	}
	image, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		t.Skipf("no memory image of another process here: %v", err)
	}
	defer image.Close()
	s := newSearch(keys)
	for line := range strings.Lines(string(maps)) {
		var from, to uint64
		var mode string
		if _, err := fmt.Sscanf(line, "%x-%x %s", &from, &to, &mode); err != nil {
			t.Fatalf("memory map: %q: %v", line, err)
		}
		if !strings.HasPrefix(mode, "rw") {
			continue
		}
		const piece = 4 << 20
		for at := from; at < to; at += piece {
			b := make([]byte, min(piece+15, to-at)) // pieces overlap by a key
			n, err := image.ReadAt(b, int64(at))
			if n == 0 && err != nil {
				continue // a guard page
			}
			s.look(b[:n], at, strings.TrimSpace(line))
		}
	}
	return s.found
}

// A search looks for many keys of 16 bytes at once.
type search struct {
	keys  [][]byte
	maybe [1 << 16]bool    // by the first two bytes
	index map[uint64][]int // by the first eight bytes
	found map[int]string
}

func newSearch(keys [][]byte) *search {
	s := &search{keys: keys, index: map[uint64][]int{}, found: map[int]string{}}
	for i, key := range keys {
		s.maybe[binary.LittleEndian.Uint16(key)] = true
		head := binary.LittleEndian.Uint64(key)
		s.index[head] = append(s.index[head], i)
	}
	return s
}

func (s *search) look(b []byte, at uint64, where string) {
	for i := 0; i+16 <= len(b); i++ {
		if !s.maybe[binary.LittleEndian.Uint16(b[i:])] {
			continue
		}
		for _, k := range s.index[binary.LittleEndian.Uint64(b[i:])] {
			if bytes.Equal(b[i:i+16], s.keys[k]) {
				s.found[k] += fmt.Sprintf("%x in %s; ", at+uint64(i), where)
			}
		}
	}
}
