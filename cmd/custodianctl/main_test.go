// The tests are of package main, because testscript runs main itself as the
// command custodianctl.
package main

import (
	"bufio"
	"context"
	"crypto/subtle"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"go.yaml.in/yaml/v3"

	"github.com/keycustody/custodian/internal/audit"
	"github.com/keycustody/custodian/testservers/awskms"
)

// daemon is the real custodiand, built once for all scripts.
var daemon string

// A builder builds the daemon before the tests run. It does not run where this
// binary plays custodianctl.
type builder struct{ *testing.M }

func (b builder) Run() int {
	dir, err := os.MkdirTemp("", "custodianctl-test-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	daemon = filepath.Join(dir, "custodiand")
	if out, err := exec.Command("go", "build", "-o", daemon, "../custodiand").CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build custodiand: %v\n%s", err, out)
		return 1
	}
	return b.M.Run()
}

func TestMain(m *testing.M) {
	testscript.Main(builder{m}, map[string]func(){"custodianctl": main})
}

// TestScripts runs the scenarios in testdata/script, which are also examples of
// use. Beside the commands of testscript they have:
//
//	dev [-category NAME]...  start custodiand dev in ./dev, and set OFFICER,
//	                         PACKAGER, PROVIDER, OPERATOR and AUDITOR to the
//	                         config files of these callers
//	aws                      a key in AWS KMS is the provider aws of the custody in ./dev
//	serve                    start custodiand on ./dev with its configuration as it is;
//	                         dev writes its own
//	reload                   have it read its configuration again, which must go
//	                         well; with ! it must be refused
//	halt                     end it, which must go well
//	exits N COMMAND...       run a command that must end with exit code N
//	keep VAR FIELD           set VAR to the first FIELD on stdout, in JSON or at the
//	                         beginning of a line
//	samekey FILE FILE        both JSON files hold the same one content key
//	flip FILE OFFSET         change one byte
//	checkpoint FILE DIR N    write the first checkpoint of the log in DIR that
//	                         covers entry N
//	fill FILE...             put the variables that files name in their place
//	assemble                 officers anna, ben and cleo, of whom two decide, with
//	                         their keys in anna.key and so on and their public keys
//	                         in officers.pem; recovery keys rita and ron; and a
//	                         custody in ./dev that they have begun together
//	card NAME                a smart card with the token NAME and the key pair sign;
//	                         its module is CARD, its PIN is in NAME.pin
//
// VECTORS is the folder of DASH-IF's CPIX documents. testscript's own "stop" ends
// a script in the middle, as a success: it is not used.
func TestScripts(t *testing.T) {
	scripts, err := filepath.Glob("testdata/script/*.txtar")
	if err != nil || len(scripts) == 0 {
		t.Fatal("no scripts", err)
	}
	for _, path := range scripts {
		script, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if regexp.MustCompile(`(?m)^stop\b`).Match(script) {
			t.Errorf("%s: stop ends the script there, as a success: the daemon is ended with halt", path)
		}
	}
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"dev": startDev, "serve": serve, "aws": configureAWS(t), "halt": haltDev, "reload": reloadDev, "exits": exits, "keep": keep, "samekey": sameKey, "flip": flip,
			"checkpoint": saveCheckpoint, "await": await,
			"fill": fill, "assemble": assemble, "card": card,
		},
		Setup: func(e *testscript.Env) error {
			e.Setenv("HOME", filepath.Join(e.WorkDir, "home"))
			e.Setenv("XDG_CONFIG_HOME", "")
			e.Setenv(configEnv, "")
			vectors, err := filepath.Abs("../../internal/packager/testdata/cpix")
			if err != nil {
				return err
			}
			e.Setenv("VECTORS", vectors)
			e.Setenv("CUSTODIAND", daemon)
			e.Setenv("TOMORROW", time.Now().Add(24*time.Hour).UTC().Format(time.RFC3339))
			e.Setenv("NEXT_WEEK", time.Now().Add(7*24*time.Hour).UTC().Format(time.RFC3339))
			e.Values[processKey{}] = new(process)
			// A signed log of five segments, of which the first is pruned.
			return os.CopyFS(filepath.Join(e.WorkDir, "golden"), os.DirFS(filepath.Join("..", "..", "internal", "audit", "testdata", "log_v3")))
		},
	})
}

type processKey struct{}

// A process is the daemon of one script.
type process struct{ cmd *exec.Cmd }

func startDev(ts *testscript.TestScript, neg bool, args []string) {
	if neg {
		ts.Fatalf("! dev has no meaning")
	}
	dir := ts.MkAbs("dev")
	launch(ts, `^custodiand: ready on (\S+)`, append([]string{"dev", "-dir", dir, "-listen", "127.0.0.1:0", "-admin", "127.0.0.1:0", "-packagers", "127.0.0.1:0"}, args...)...)
	for variable, role := range callers {
		ts.Setenv(variable, filepath.Join(dir, role+".yaml"))
	}
}

// callers are the roles of the development PKI, by the variables that have the
// names of their config files.
var callers = map[string]string{"OFFICER": "officer", "PACKAGER": "packager", "PROVIDER": "drm-provider", "OPERATOR": "operator", "AUDITOR": "auditor"}

var addressLine = regexp.MustCompile(`(?m)^address: .*$`)

func serve(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) > 0 {
		ts.Fatalf("usage: serve")
	}
	listen := launch(ts, `msg=serving listen=(\S+)`, "-config", ts.MkAbs("dev/custodiand.yaml"))
	for _, role := range callers {
		path := ts.MkAbs(filepath.Join("dev", role+".yaml"))
		config := addressLine.ReplaceAllString(ts.ReadFile(path), "address: "+listen)
		ts.Check(os.WriteFile(path, []byte(config), 0o600))
	}
}

// launch starts the daemon and waits for a line like ready, of which it returns
// the first part in parentheses.
func launch(ts *testscript.TestScript, ready string, args ...string) string {
	cmd := exec.Command(daemon, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	log, err := os.OpenFile(ts.MkAbs("dev.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	ts.Check(err)
	said, stderr, err := os.Pipe()
	ts.Check(err)
	cmd.Stdout, cmd.Stderr = stderr, stderr
	ts.Check(cmd.Start())
	stderr.Close()
	ts.Value(processKey{}).(*process).cmd = cmd
	ts.Defer(func() { end(cmd) })

	line, found := regexp.MustCompile(ready), make(chan string, 1)
	go func() { // ends with the process
		defer log.Close()
		defer close(found)
		s := bufio.NewScanner(said)
		s.Buffer(nil, 1<<20)
		for s.Scan() {
			fmt.Fprintln(log, s.Text())
			if m := line.FindStringSubmatch(s.Text()); m != nil && len(found) == 0 {
				found <- m[1]
			}
		}
	}()
	select {
	case m, ok := <-found:
		if !ok {
			ts.Fatalf("custodiand ended:\n%s", ts.ReadFile("dev.log"))
		}
		return m
	case <-time.After(time.Minute):
		ts.Fatalf("custodiand is not ready after a minute:\n%s", ts.ReadFile("dev.log"))
	}
	return ""
}

// configureAWS starts AWS KMS when it is asked for.
func configureAWS(t *testing.T) func(*testscript.TestScript, bool, []string) {
	return func(ts *testscript.TestScript, neg bool, args []string) {
		if neg || len(args) > 0 {
			ts.Fatalf("usage: aws")
		}
		aws := awskms.Start(t)
		var config map[string]any
		ts.Check(yaml.Unmarshal([]byte(ts.ReadFile("dev/custodiand.yaml")), &config))
		kms := config["kms"].(map[string]any)
		kms["providers"] = append(kms["providers"].([]any), map[string]any{"name": "aws", "kind": "aws",
			"aws": map[string]any{"key": aws.CreateKey("custodian"), "endpoint": aws.Address, "ca_file": aws.CAFile, "credentials_file": aws.CredentialsFile}})
		raw, err := yaml.Marshal(config)
		ts.Check(err)
		ts.Check(os.WriteFile(ts.MkAbs("dev/custodiand.yaml"), raw, 0o600))
	}
}

// end kills a daemon that is still there.
func end(cmd *exec.Cmd) {
	if cmd.ProcessState != nil {
		return
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
}

func reloadDev(ts *testscript.TestScript, neg bool, _ []string) {
	before := len(ts.ReadFile("dev.log"))
	ts.Check(ts.Value(processKey{}).(*process).cmd.Process.Signal(syscall.SIGHUP))
	for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		log := ts.ReadFile("dev.log")[before:]
		done, refused := strings.Contains(log, "reloaded "), strings.Contains(log, "configuration stays")
		if done && !neg || refused && neg {
			return
		}
		if done || refused || time.Now().After(end) {
			ts.Fatalf("custodiand dev: reload done %v, refused %v:\n%s", done, refused, log)
		}
	}
}

func haltDev(ts *testscript.TestScript, _ bool, _ []string) {
	cmd := ts.Value(processKey{}).(*process).cmd
	ts.Check(cmd.Process.Signal(syscall.SIGTERM))
	if err := cmd.Wait(); err != nil {
		ts.Fatalf("custodiand dev: %v\n%s", err, ts.ReadFile("dev.log"))
	}
}

func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits N COMMAND...")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	got := 0
	if err := ts.Exec(args[1], args[2:]...); err != nil {
		ended, ok := errors.AsType[*exec.ExitError](err)
		if !ok {
			ts.Fatalf("run %s: %v", args[1], err)
		}
		got = ended.ExitCode()
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

// await runs a command again and again until its output matches, for half a
// minute.
func await(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: await REGEXP COMMAND...")
	}
	want, err := regexp.Compile(args[0])
	ts.Check(err)
	for range 150 {
		ts.Check(ts.Exec(args[1], args[2:]...))
		if want.MatchString(ts.ReadFile("stdout")) {
			return
		}
		time.Sleep(200 * time.Millisecond)
	}
	ts.Fatalf("%s never came", args[0])
}

func keep(ts *testscript.TestScript, _ bool, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: keep VAR FIELD")
	}
	field := regexp.MustCompile(`(?m)(?:"` + regexp.QuoteMeta(args[1]) + `": *"?|^` + regexp.QuoteMeta(args[1]) + ` )([^",}\n]+)`)
	m := field.FindStringSubmatch(ts.ReadFile("stdout"))
	if m == nil {
		ts.Fatalf("no field %s on stdout", args[1])
	}
	ts.Setenv(args[0], m[1])
}

var keyField = regexp.MustCompile(`"key": "([0-9a-f]{32})"`)

// sameKey says nothing of the keys: the log of a test is no place for them.
func sameKey(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: samekey FILE FILE")
	}
	var keys [2][]byte
	for i, name := range args {
		m := keyField.FindAllStringSubmatch(ts.ReadFile(name), -1)
		if len(m) != 1 {
			ts.Fatalf("%s holds %d keys, want 1", name, len(m))
		}
		keys[i] = []byte(m[0][1])
	}
	if same := subtle.ConstantTimeCompare(keys[0], keys[1]) == 1; same == neg {
		ts.Fatalf("the keys in %s and %s: same is %v, want %v", args[0], args[1], same, !neg)
	}
}

func saveCheckpoint(ts *testscript.TestScript, _ bool, args []string) {
	index, err := strconv.ParseUint(args[2], 10, 64)
	ts.Check(err)
	for size := index + 1; ; size++ {
		p, err := audit.ProveInclusion(context.Background(), ts.MkAbs(args[1]), index, size)
		if err == nil {
			ts.Check(os.WriteFile(ts.MkAbs(args[0]), p.Checkpoint, 0o600))
			return
		}
		if size > index+100 {
			ts.Check(err)
		}
	}
}

func flip(ts *testscript.TestScript, _ bool, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: flip FILE OFFSET")
	}
	offset, err := strconv.ParseInt(args[1], 10, 64)
	ts.Check(err)
	f, err := os.OpenFile(ts.MkAbs(args[0]), os.O_RDWR, 0)
	ts.Check(err)
	defer f.Close()
	b := make([]byte, 1)
	_, err = f.ReadAt(b, offset)
	ts.Check(err)
	b[0] ^= 1
	_, err = f.WriteAt(b, offset)
	ts.Check(err)
}
