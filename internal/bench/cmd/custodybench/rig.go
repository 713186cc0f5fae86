package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/keycustody/custodian/certs"
	"github.com/keycustody/custodian/custodian"
)

// A rig is what the sections measure with: the folder, the certificates that
// all servers and loads share, and the table.
type rig struct {
	scale   scale
	dir     string
	memory  string // folder on tmpfs; empty where there is none
	profile string
	table   *table
	servers []*server
}

const (
	trustDomain = "bench.custodian.internal"
	shm         = "/dev/shm"
)

// identity is the SPIFFE ID of a role's client.
func identity(r custodian.Role) string { return "spiffe://" + trustDomain + "/" + string(r) }

func newRig(s scale, under, profile string) (_ *rig, err error) {
	if err := os.MkdirAll(under, 0o755); err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(under, "custodybench-")
	if err != nil {
		return nil, err
	}
	r := &rig{scale: s, profile: profile, table: newTable()}
	if r.dir, err = filepath.Abs(dir); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.close())
		}
	}()
	if profile != "" {
		if r.profile, err = filepath.Abs(profile); err != nil {
			return nil, err
		}
		if err := os.MkdirAll(r.profile, 0o755); err != nil {
			return nil, err
		}
	}
	if isMemory(r.dir) {
		note("%s is on tmpfs: what is called durable here is not; choose a folder on a disk with -dir", r.dir)
	}
	if isMemory(shm) {
		if r.memory, err = os.MkdirTemp(shm, "custodybench-"); err != nil {
			return nil, err
		}
	}
	r.table.add("cpus", float64(runtime.NumCPU()))
	r.table.add("rounds", float64(s.rounds))
	return r, r.makePKI()
}

func (r *rig) pki() string { return filepath.Join(r.dir, "pki") }

func (r *rig) makePKI() error {
	ca, err := certs.OpenAuthority(r.pki(), trustDomain)
	if err != nil {
		return err
	}
	if _, err := ca.IssueServer([]string{"localhost"}, []net.IP{net.IPv4(127, 0, 0, 1)}, 24*time.Hour); err != nil {
		return err
	}
	for _, who := range []string{string(custodian.RoleProvider), modestProvider, string(custodian.RolePackager)} {
		if _, err := ca.IssueClient("/"+who, 24*time.Hour); err != nil {
			return err
		}
	}
	return nil
}

func (r *rig) close() error {
	errs := []error{r.stopAll()}
	for _, dir := range []string{r.dir, r.memory} {
		if dir != "" {
			errs = append(errs, os.RemoveAll(dir))
		}
	}
	return errors.Join(errs...)
}

func (r *rig) run(ctx context.Context, wanted []string) error {
	if err := r.measureDisk(); err != nil {
		return err
	}
	for _, s := range sections {
		if !slices.Contains(wanted, s.name) {
			continue
		}
		start := time.Now()
		if err := s.run(r, ctx); err != nil {
			return fmt.Errorf("section %s: %w", s.name, err)
		}
		note("section %s took %s", s.name, time.Since(start).Round(time.Second))
	}
	return nil
}

// measureDisk takes the time of an overwrite of 4 KiB with fdatasync, which is
// what an append to the audit log costs at least.
func (r *rig) measureDisk() error {
	f, err := os.Create(filepath.Join(r.dir, "sync"))
	if err != nil {
		return err
	}
	defer f.Close()
	block := make([]byte, 4096)
	var took []float64
	for i := range int64(200) {
		start := time.Now()
		if _, err := f.WriteAt(block, i%16*4096); err != nil {
			return err
		}
		if err := unix.Fdatasync(int(f.Fd())); err != nil {
			return err
		}
		took = append(took, micros(time.Since(start)))
	}
	r.table.add("fdatasync_p50_us", median(took[100:]))
	return nil
}

// isMemory says whether what is written to dir never reaches a disk.
func isMemory(dir string) bool {
	var fs unix.Statfs_t
	return unix.Statfs(dir, &fs) == nil && (fs.Type == unix.TMPFS_MAGIC || fs.Type == unix.RAMFS_MAGIC)
}

// child is this binary in a role. It ends with ctx, or when its input is closed.
func child(ctx context.Context, role string, args ...string) (*exec.Cmd, io.Closer, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, nil, err
	}
	cmd := exec.CommandContext(ctx, self, append([]string{"-role", role}, args...)...)
	cmd.Stderr = os.Stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGTERM) }
	cmd.WaitDelay = 30 * time.Second
	in, err := cmd.StdinPipe()
	return cmd, in, err
}

// call runs a child to its end and decodes the one line that it prints.
func call(ctx context.Context, result any, role string, args ...string) error {
	cmd, in, err := child(ctx, role, args...)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("%s: %w", role, err)
	}
	if err := json.Unmarshal(out, result); err != nil {
		return fmt.Errorf("%s: result: %w", role, err)
	}
	return nil
}

// A server is a child that serves.
type server struct {
	role string
	addr string
	pid  int
	cmd  *exec.Cmd
	in   io.Closer
}

// serve starts a server and waits until it accepts calls. name is that of its
// profile.
func (r *rig) serve(ctx context.Context, role, name string, args ...string) (*server, error) {
	args = append([]string{"-pki", r.pki()}, args...)
	if r.profile != "" {
		args = append(args, "-cpuprofile", filepath.Join(r.profile, name+".prof"))
	}
	cmd, in, err := child(ctx, role, args...)
	if err != nil {
		return nil, err
	}
	if role == roleCallback || role == roleRotate {
		cmd.Env = append(os.Environ(), "GODEBUG=asyncpreemptoff=1") // as custodiand
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	s := &server{role: role, pid: cmd.Process.Pid, cmd: cmd, in: in}
	r.servers = append(r.servers, s)
	line, err := bufio.NewReader(out).ReadBytes('\n')
	if err != nil {
		return nil, fmt.Errorf("%s: it did not start: %w", role, err)
	}
	if err := json.Unmarshal(line, &s.addr); err != nil {
		return nil, fmt.Errorf("%s: address: %w", role, err)
	}
	return s, nil
}

// stopAll ends the servers of a section.
func (r *rig) stopAll() error {
	var errs []error
	for _, s := range r.servers {
		errs = append(errs, s.stop())
	}
	return errors.Join(errs...)
}

// stop ends the server in good order. It may be called twice.
func (s *server) stop() error {
	if s.cmd == nil {
		return nil
	}
	cmd := s.cmd
	s.cmd = nil
	s.in.Close()
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("%s: %w", s.role, err)
	}
	return nil
}

// anonymous is the server's anonymous memory in bytes (RssAnon, proc(5)).
func (s *server) anonymous() (float64, error) { return anonymous(s.pid) }

func anonymous(pid int) (float64, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		var kib int64
		if n, _ := fmt.Sscanf(lines.Text(), "RssAnon: %d kB", &kib); n == 1 {
			return float64(kib * 1024), nil
		}
	}
	return 0, fmt.Errorf("process %d: no RssAnon", pid)
}

// watchMemory looks at the server's anonymous memory until its result is called,
// which returns the most that was seen, in bytes.
func (s *server) watchMemory(ctx context.Context) (peak func() float64) {
	ctx, stop := context.WithCancel(ctx)
	var most float64
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for ctx.Err() == nil {
			if now, err := s.anonymous(); err == nil {
				most = max(most, now)
			}
			select {
			case <-ctx.Done():
			case <-tick.C:
			}
		}
	})
	return func() float64 { stop(); wg.Wait(); return most }
}

// load runs the load process against a server for one run.
func (r *rig) load(ctx context.Context, s *server, l loadSpec) (loadResult, error) {
	args := []string{"-pki", r.pki(), "-addr", s.addr, "-pid", strconv.Itoa(s.pid), "-method", l.method,
		"-inflight", strconv.Itoa(l.inFlight), "-batch", strconv.Itoa(l.batch), "-connections", strconv.Itoa(r.scale.connections),
		"-warm", r.scale.warm.String(), "-time", r.scale.time.String()}
	if l.kids != "" {
		args = append(args, "-kids", l.kids)
	}
	var res loadResult
	if err := call(ctx, &res, roleLoad, args...); err != nil {
		return res, err
	}
	if res.Failed > 0 {
		note("%s, %s, %d in flight: %d of %d calls failed, the first: %s", s.role, l.method, l.inFlight, res.Failed, res.Failed+res.Calls, res.FirstError)
		r.table.count("failed_calls", float64(res.Failed))
	}
	if res.Calls == 0 {
		return res, fmt.Errorf("%s, %s, %d in flight: no call succeeded", s.role, l.method, l.inFlight)
	}
	return res, nil
}

// note tells whoever waits what goes on.
func note(format string, args ...any) { fmt.Fprintf(os.Stderr, "bench: "+format+"\n", args...) }

func micros(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }
