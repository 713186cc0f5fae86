package testservers

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/hashicorp/vault/api"
)

// TB is what a server needs of a test: *testing.T and *testing.B have it. It is
// spelt out so that programs other than tests (the bench) can start a server
// without importing testing.
type TB interface {
	Helper()
	Name() string
	TempDir() string
	Context() context.Context
	Cleanup(func())
	Logf(format string, args ...any)
	Fatalf(format string, args ...any)
}

// An Option changes how Vault starts.
type Option uint8

// Raft keeps Vault's data on disk, so that it survives Stop and Start. Without
// it the data is in memory: quicker, and it survives Seal and Unseal only.
const Raft Option = 1

// startLimit bounds the wait for a server that starts, seals or unseals; on a
// quiet machine each takes well under a second.
const startLimit = 60 * time.Second

// A VaultServer is one running Vault: TLS on loopback, client certificates
// required, initialised, unsealed, the transit engine mounted at transit/. It
// ends with its test. Its methods stop the test when they do not succeed; they
// are for one goroutine at a time.
type VaultServer struct {
	Address        string // https://127.0.0.1:PORT, the same for the server's whole life
	CAFile         string // the CA of the server's and the clients' certificates, PEM
	ClientCertFile string // a certificate that the listener accepts, PEM
	ClientKeyFile  string // its key, PKCS #8 PEM, mode 0600
	RootTokenFile  string // mode 0600; the token only, without a newline
	RootToken      string // never print it

	t         TB
	dir       string // everything of this server, the test's own temporary folder
	binary    string
	port      int
	raft      bool
	unsealKey string
	client    *api.Client
	process   *process // nil while stopped
}

// Vault starts a Vault server for t, building it first where it is not in the
// cache (see EnsureVault).
func Vault(t TB, options ...Option) *VaultServer {
	t.Helper()
	binary, err := EnsureVault(t.Context(), func(line string) { fmt.Fprintln(os.Stderr, "test servers:", line) })
	if err != nil {
		t.Fatalf("start vault: %v", err)
	}
	v := &VaultServer{t: t, dir: t.TempDir(), binary: binary}
	for _, option := range options {
		v.raft = v.raft || option == Raft
	}
	if err := v.makeCertificates(); err != nil {
		t.Fatalf("start vault: %v", err)
	}
	if err := os.Mkdir(v.raftDir(), 0o700); err != nil {
		t.Fatalf("start vault: %v", err)
	}
	t.Cleanup(v.Stop)

	if err := v.launchOnFreePort(); err != nil {
		t.Fatalf("start vault: %v", err)
	}
	if err := v.initialise(); err != nil {
		t.Fatalf("initialise vault: %v", err)
	}
	v.Unseal()
	if err := v.client.Sys().Mount("transit", &api.MountInput{Type: "transit"}); err != nil {
		t.Fatalf("mount transit: %v", err)
	}
	return v
}

// makeCertificates writes the CA, the server's and the client's certificate.
func (v *VaultServer) makeCertificates() error {
	v.CAFile = filepath.Join(v.dir, "ca.pem")
	ca, err := newAuthority(v.CAFile)
	if err != nil {
		return err
	}
	if _, _, err := ca.issue(v.dir, "server", 2, x509.ExtKeyUsageServerAuth); err != nil {
		return err
	}
	v.ClientCertFile, v.ClientKeyFile, err = ca.issue(v.dir, "client", 3, x509.ExtKeyUsageClientAuth)
	return err
}

// launchOnFreePort starts the server on a port of its own. Another process may
// take a free port before Vault does, so it tries a few.
func (v *VaultServer) launchOnFreePort() error {
	var err error
	for range 5 {
		if v.port, err = freePort(); err != nil {
			return err
		}
		v.Address = fmt.Sprintf("https://127.0.0.1:%d", v.port)
		if err = v.launch(); err == nil {
			return nil
		}
		if !strings.Contains(err.Error(), "address already in use") {
			return err
		}
	}
	return err
}

// freePort finds a port below the range from which the kernel takes the ports
// of outgoing connections (net.ipv4.ip_local_port_range, 32768 upwards): while
// a server is stopped, no connection of another test can sit on its port.
func freePort() (int, error) {
	var err error
	for range 100 {
		port := 20000 + rand.IntN(12000)
		var l net.Listener
		if l, err = net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port)); err == nil {
			return port, l.Close()
		}
	}
	return 0, fmt.Errorf("find a free port: %w", err)
}

// launch starts the program and returns when it answers, sealed or not.
func (v *VaultServer) launch() error {
	client, err := v.newClient()
	if err != nil {
		return err
	}
	v.client = client
	config := filepath.Join(v.dir, "vault.hcl")
	if err := os.WriteFile(config, []byte(v.config()), 0o600); err != nil {
		return fmt.Errorf("write vault's configuration: %w", err)
	}
	process, err := startProcess(filepath.Join(v.dir, "vault.log"), v.binary, "server", "-config="+config)
	if err != nil {
		return err
	}
	v.process = process

	if err := v.await(answers); err != nil {
		v.Stop()
		return err
	}
	return nil
}

// config is the server's configuration. Vault wants one key a line.
func (v *VaultServer) config() string {
	var b strings.Builder
	if v.raft {
		// Without the multiplier, initialising takes nine seconds.
		fmt.Fprintf(&b, "storage \"raft\" {\n  path = %q\n  node_id = \"one\"\n  performance_multiplier = \"1\"\n}\n",
			v.raftDir())
		fmt.Fprintf(&b, "cluster_addr = \"https://127.0.0.1:%d\"\n", v.port+1)
	} else {
		b.WriteString("storage \"inmem\" {}\n")
	}
	fmt.Fprintf(&b, "listener \"tcp\" {\n  address = \"127.0.0.1:%d\"\n  cluster_address = \"127.0.0.1:%d\"\n", v.port, v.port+1)
	fmt.Fprintf(&b, "  tls_cert_file = %q\n  tls_key_file = %q\n  tls_client_ca_file = %q\n",
		filepath.Join(v.dir, "server.pem"), filepath.Join(v.dir, "server.key"), v.CAFile)
	b.WriteString("  tls_require_and_verify_client_cert = true\n}\n")
	fmt.Fprintf(&b, "disable_mlock = true\napi_addr = %q\nlog_level = \"warn\"\n", v.Address)
	return b.String()
}

func (v *VaultServer) raftDir() string { return filepath.Join(v.dir, "raft") }

// newClient makes a client with the client certificate and the root token.
func (v *VaultServer) newClient() (*api.Client, error) {
	config := api.DefaultConfig()
	if config.Error != nil {
		return nil, fmt.Errorf("make a vault client: %w", config.Error)
	}
	config.Address = v.Address
	config.MaxRetries = 0 // a sealed server is an answer here, not a reason to wait
	config.Timeout = 15 * time.Second
	err := config.ConfigureTLS(&api.TLSConfig{CACert: v.CAFile, ClientCert: v.ClientCertFile, ClientKey: v.ClientKeyFile})
	if err != nil {
		return nil, fmt.Errorf("make a vault client: %w", err)
	}
	client, err := api.NewClient(config)
	if err != nil {
		return nil, fmt.Errorf("make a vault client: %w", err)
	}
	// VAULT_NAMESPACE and VAULT_TOKEN of whoever runs the tests have no say.
	client.ClearNamespace()
	client.SetToken(v.RootToken)
	return client, nil
}

// initialise makes the seal with one share and keeps its key and the root token.
func (v *VaultServer) initialise() error {
	answer, err := v.client.Sys().Init(&api.InitRequest{SecretShares: 1, SecretThreshold: 1})
	if err != nil {
		return err
	}
	v.unsealKey = answer.KeysB64[0]
	v.RootToken = answer.RootToken
	v.client.SetToken(v.RootToken)
	v.RootTokenFile = filepath.Join(v.dir, "root-token")
	return os.WriteFile(v.RootTokenFile, []byte(v.RootToken), 0o600)
}

// await polls the server's health until ready accepts it.
func (v *VaultServer) await(ready func(*api.HealthResponse) bool) error {
	deadline := time.Now().Add(startLimit)
	for {
		health, err := v.client.Sys().Health()
		if err == nil && ready(health) {
			return nil
		}
		if v.process.ended() {
			return fmt.Errorf("vault has ended: %s", v.process.lastWords())
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("vault is not ready after %s: %s", startLimit, v.process.lastWords())
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func answers(*api.HealthResponse) bool    { return true }
func isSealed(h *api.HealthResponse) bool { return h.Sealed }
func isActive(h *api.HealthResponse) bool { return h.Initialized && !h.Sealed && !h.Standby }

// Seal seals the server: it answers 503 to everything until Unseal.
func (v *VaultServer) Seal() {
	v.t.Helper()
	if err := v.client.Sys().Seal(); err != nil {
		v.t.Fatalf("seal vault: %v", err)
	}
	if err := v.await(isSealed); err != nil {
		v.t.Fatalf("seal vault: %v", err)
	}
}

// Unseal unseals the server and returns when it is active.
func (v *VaultServer) Unseal() {
	v.t.Helper()
	if _, err := v.client.Sys().Unseal(v.unsealKey); err != nil {
		v.t.Fatalf("unseal vault: %v", err)
	}
	if err := v.await(isActive); err != nil {
		v.t.Fatalf("unseal vault: %v", err)
	}
}

// Stop kills the server: connections are refused until Start. A stopped server
// stays stopped.
func (v *VaultServer) Stop() {
	if v.process != nil {
		v.process.kill()
		v.process = nil
	}
}

// Start starts a stopped server again, on its old address, with its old data,
// and unseals it. It needs the option Raft.
func (v *VaultServer) Start() {
	v.t.Helper()
	if !v.raft {
		v.t.Fatalf("start vault again: its data was in memory: use testservers.Raft")
	}
	if v.process != nil {
		v.t.Fatalf("start vault again: it runs")
	}
	if err := v.launch(); err != nil {
		v.t.Fatalf("start vault again: %v", err)
	}
	v.Unseal()
}

// Pause makes the server hang: its kernel accepts connections, nothing answers.
func (v *VaultServer) Pause() {
	v.t.Helper()
	v.signal(syscall.SIGSTOP)
	// A thread that is on a processor stops a moment later than the signal is
	// sent, and could answer once more.
	for deadline := time.Now().Add(startLimit); !v.process.stopped(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			v.t.Fatalf("pause vault: it does not stop")
		}
	}
}

// Resume ends Pause.
func (v *VaultServer) Resume() { v.signal(syscall.SIGCONT) }

func (v *VaultServer) signal(s syscall.Signal) {
	v.t.Helper()
	if v.process == nil {
		v.t.Fatalf("signal vault: it is stopped")
	}
	if err := v.process.cmd.Process.Signal(s); err != nil {
		v.t.Fatalf("signal vault: %v", err)
	}
}

// CreateTransitKey makes a transit key, AES-256-GCM. A derived key needs a
// context in every call, and binds the ciphertext to it.
func (v *VaultServer) CreateTransitKey(name string, derived bool) {
	v.t.Helper()
	v.write("transit/keys/"+name, map[string]any{"type": "aes256-gcm96", "derived": derived})
}

// RotateTransitKey adds a version to a transit key.
func (v *VaultServer) RotateTransitKey(name string) {
	v.t.Helper()
	v.write("transit/keys/"+name+"/rotate", nil)
}

// WritePolicy makes or replaces an ACL policy, written in HCL.
func (v *VaultServer) WritePolicy(name, hcl string) {
	v.t.Helper()
	if err := v.client.Sys().PutPolicy(name, hcl); err != nil {
		v.t.Fatalf("write vault policy %s: %v", name, err)
	}
}

// AppRole makes an AppRole at auth/approle/ whose tokens carry policies, and
// returns the files, mode 0600, with its role ID and a secret ID. What else a
// role can have (token_ttl, secret_id_num_uses) a test writes through Client.
func (v *VaultServer) AppRole(role string, policies ...string) (roleIDFile, secretIDFile string) {
	v.t.Helper()
	mounts, err := v.client.Sys().ListAuth()
	if err != nil {
		v.t.Fatalf("list vault's auth methods: %v", err)
	}
	if mounts["approle/"] == nil {
		if err := v.client.Sys().EnableAuthWithOptions("approle", &api.EnableAuthOptions{Type: "approle"}); err != nil {
			v.t.Fatalf("enable approle: %v", err)
		}
	}
	path := "auth/approle/role/" + role
	v.write(path, map[string]any{"token_policies": policies})

	secret, err := v.client.Logical().Read(path + "/role-id")
	if err != nil {
		v.t.Fatalf("read role id of %s: %v", role, err)
	}
	roleIDFile = v.secretFile(role+".role-id", secret, "role_id")
	secretIDFile = v.secretFile(role+".secret-id", v.write(path+"/secret-id", nil), "secret_id")
	return roleIDFile, secretIDFile
}

// secretFile writes one string of an answer to a file.
func (v *VaultServer) secretFile(name string, answer *api.Secret, field string) string {
	v.t.Helper()
	if answer == nil {
		v.t.Fatalf("write %s: vault sent no data", name)
	}
	value, _ := answer.Data[field].(string)
	if value == "" {
		v.t.Fatalf("write %s: vault sent no %s", name, field)
	}
	file := filepath.Join(v.dir, name)
	if err := os.WriteFile(file, []byte(value), 0o600); err != nil {
		v.t.Fatalf("write %s: %v", name, err)
	}
	return file
}

func (v *VaultServer) write(path string, data map[string]any) *api.Secret {
	v.t.Helper()
	secret, err := v.client.Logical().Write(path, data)
	if err != nil {
		v.t.Fatalf("write %s: %v", path, err)
	}
	return secret
}

// Client returns a client of its own with the root token and the client
// certificate. It does not retry.
func (v *VaultServer) Client() *api.Client {
	v.t.Helper()
	client, err := v.newClient()
	if err != nil {
		v.t.Fatalf("%v", err)
	}
	return client
}

// A process is a child that ends with this one.
type process struct {
	cmd  *exec.Cmd
	log  string        // what it prints goes to this file
	done chan struct{} // closed when it has ended
}

// startProcess starts a program with its output in logFile.
func startProcess(logFile, program string, args ...string) (*process, error) {
	out, err := os.OpenFile(logFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(program, args...)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.Dir = filepath.Dir(logFile)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	p := &process{cmd: cmd, log: logFile, done: make(chan struct{})}

	started := make(chan error)
	go func() {
		// The kernel sends the death signal when the thread that started the
		// child ends, not the process; so this thread stays until the child has.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer out.Close()
		defer close(p.done)
		err := cmd.Start()
		started <- err
		if err == nil {
			cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", program, err)
	}
	return p, nil
}

func (p *process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// stopped reports whether all threads are stopped; proc(5), stat.
func (p *process) stopped() bool {
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", p.cmd.Process.Pid))
	if err != nil || len(files) == 0 {
		return false
	}
	for _, file := range files {
		stat, err := os.ReadFile(file)
		if err != nil {
			return false
		}
		// The state follows the name, which stands in parentheses.
		if _, rest, ok := strings.Cut(string(stat), ") "); !ok || !strings.HasPrefix(rest, "T") {
			return false
		}
	}
	return true
}

func (p *process) kill() {
	if err := p.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return // not ours any more: nothing to wait for
	}
	<-p.done
}

// lastWords is the end of what the process printed.
func (p *process) lastWords() string {
	out, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error()
	}
	return lastLines(out, 15)
}
