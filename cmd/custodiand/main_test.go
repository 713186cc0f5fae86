package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/keycustody/custodian/client"
	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/softhsm"
)

// daemonBinary is the real daemon, built once for the tests of this package.
var daemonBinary string

func TestMain(m *testing.M) {
	flag.Parse()
	if p := flag.Lookup("test.parallel"); p.Value.String() == strconv.Itoa(runtime.GOMAXPROCS(0)) {
		flag.Set("test.parallel", strconv.Itoa(2*runtime.GOMAXPROCS(0))) // they wait for daemons and disks more than they compute
	}
	dir, err := os.MkdirTemp("", "custodiand-test-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	daemonBinary = filepath.Join(dir, "custodiand")
	if out, err := exec.Command("go", "build", "-o", daemonBinary, ".").CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build custodiand: %v\n%s", err, out)
		os.Exit(1)
	}
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

// A custody is one folder with token, PKI and configuration, and the daemon
// that runs on it. Tests kill it, damage its files and start it again.
type custody struct {
	t      testing.TB
	dev    devDir
	config *Config
	listen string // while it runs
	admin  string
	env    []string // added to the daemon's environment

	cmd    *exec.Cmd
	logged <-chan struct{} // closed when all that cmd said is in the log
	// mu guards the log.
	mu  sync.Mutex
	log bytes.Buffer
}

// provisioning is held by whoever provisions, or uses a token by itself: the
// module is in this process meanwhile, and a module is one custody's at a time.
var provisioning sync.Mutex

// provision makes a custody that is not initialised.
func provision(t testing.TB) *custody {
	t.Helper()
	c := &custody{t: t, dev: devDir{dir: filepath.Join(t.TempDir(), "custody"), listen: "127.0.0.1:0", admin: "127.0.0.1:0"}}
	provisioning.Lock()
	defer provisioning.Unlock()
	var err error
	if c.config, err = c.dev.provision(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.kill)
	return c
}

// holdModule lets the test itself use the token, until release is called.
func (c *custody) holdModule() (release func()) {
	c.t.Helper()
	provisioning.Lock()
	if err := os.Setenv(softhsm.ConfEnv, c.config.HSM.SoftHSMConf); err != nil {
		provisioning.Unlock()
		c.t.Fatal(err)
	}
	return provisioning.Unlock
}

// newCustody makes an initialised custody with a running daemon.
func newCustody(t testing.TB) *custody {
	t.Helper()
	c := provision(t)
	c.mustRun("init", "-config", c.dev.configFile())
	c.mustStart()
	return c
}

// run runs a command of the daemon to its end and returns its output and exit
// code.
func (c *custody) run(args ...string) (string, int) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, daemonBinary, args...)
	cmd.Env = append(os.Environ(), c.env...)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		c.t.Fatalf("custodiand %v: %v", args, err)
	}
	if exit != nil {
		return string(out), exit.ExitCode()
	}
	return string(out), 0
}

func (c *custody) mustRun(args ...string) {
	c.t.Helper()
	if out, code := c.run(args...); code != 0 {
		c.t.Fatalf("custodiand %v: exit %d\n%s", args, code, out)
	}
}

var listeningLine = regexp.MustCompile(`msg=listening listen=(\S+) admin=(\S+)`)

var servingLine = regexp.MustCompile(`msg=serving listen=(\S+) admin=(\S+)`)

// launch starts the daemon and returns a channel that gets each line of its
// log and is closed at its end.
func (c *custody) launch(prefix ...string) <-chan string {
	c.t.Helper()
	args := append(prefix, daemonBinary, "-config", c.dev.configFile())
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Env = append(os.Environ(), c.env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	pipe, err := cmd.StderrPipe()
	if err != nil {
		c.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		c.t.Fatal(err)
	}
	lines, logged := make(chan string, 10000), make(chan struct{})
	c.cmd, c.logged = cmd, logged
	go func() {
		defer close(logged)
		defer close(lines)
		for s := bufio.NewScanner(pipe); s.Scan(); {
			c.mu.Lock()
			fmt.Fprintln(&c.log, s.Text())
			c.mu.Unlock()
			select {
			case lines <- s.Text():
			default: // nobody reads any more
			}
		}
	}()
	return lines
}

// start starts the daemon and waits until it serves.
func (c *custody) start() error {
	c.t.Helper()
	return c.awaitServing(c.launch())
}

func (c *custody) awaitServing(lines <-chan string) error {
	limit := time.After(60 * time.Second)
	for {
		select {
		case line, ok := <-lines:
			if !ok {
				return fmt.Errorf("the daemon ended before it served: %w\n%s", c.wait(), c.logText())
			}
			if m := servingLine.FindStringSubmatch(line); m != nil {
				c.listen, c.admin = m[1], m[2]
				return nil
			}
		case <-limit:
			return fmt.Errorf("the daemon does not serve after a minute:\n%s", c.logText())
		}
	}
}

func (c *custody) mustStart() {
	c.t.Helper()
	if err := c.start(); err != nil {
		c.t.Fatal(err)
	}
}

// kill is SIGKILL. It does nothing where no daemon runs.
func (c *custody) kill() {
	if c.cmd != nil {
		c.cmd.Process.Kill()
		c.wait()
	}
}

// wait returns how the daemon ended, when it has ended and its log is whole:
// Wait closes the pipe, read or not.
func (c *custody) wait() error {
	<-c.logged
	err := c.cmd.Wait()
	c.cmd = nil
	return err
}

// stop is SIGTERM; it returns the exit code.
func (c *custody) stop() int {
	c.t.Helper()
	c.cmd.Process.Signal(syscall.SIGTERM)
	err := c.wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode()
	}
	return 0
}

func (c *custody) logText() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.log.String()
}

// dial connects as a role of the development PKI. A call is made once.
func (c *custody) dial(role custodian.Role) *client.Client {
	c.t.Helper()
	cl, err := c.tryDial(role)
	if err != nil {
		c.t.Fatalf("dial as %s: %v\n%s", role, err, c.logText())
	}
	c.t.Cleanup(func() { cl.Close() })
	return cl
}

func (c *custody) tryDial(role custodian.Role) (*client.Client, error) {
	pki := filepath.Join(c.dev.dir, "pki")
	return client.Dial(c.t.Context(), client.Config{Address: c.listen, ServerName: "localhost", CAFile: filepath.Join(pki, "ca.pem"), Attempts: 1,
		CertFile: filepath.Join(pki, string(role)+".pem"), KeyFile: filepath.Join(pki, string(role)+".key")})
}

// wantLog fails the test where the daemon's log has no line with s.
func (c *custody) wantLog(s string) {
	c.t.Helper()
	if log := c.logText(); !strings.Contains(log, s) {
		c.t.Errorf("the daemon's log does not say %q:\n%s", s, log)
	}
}

// http is the status of a GET on the admin listener.
func (c *custody) http(path string) int {
	c.t.Helper()
	res, err := http.Get("http://" + c.admin + path)
	if err != nil {
		c.t.Fatal(err)
	}
	res.Body.Close()
	return res.StatusCode
}
