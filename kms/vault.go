package kms

import (
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/keycustody/custodian/custodian"
)

// A VaultConfig says how to reach a key of Vault's transit engine. The key
// must be made with derived=true: only then does Vault bind a ciphertext to
// its context. The policy needs update on encrypt, decrypt and, to re-wrap,
// rewrap of this key, and nothing else.
type VaultConfig struct {
	Address   string `yaml:"address"`             // https://HOST:PORT
	Namespace string `yaml:"namespace,omitempty"` // Vault Enterprise
	Mount     string `yaml:"mount,omitempty"`     // of the transit engine; "transit"
	Key       string `yaml:"key"`                 // the transit key's name

	CAFile string `yaml:"ca_file,omitempty"` // PEM; without it the system's CAs
	// CertFile and KeyFile are our client certificate. They are read again at
	// each new connection.
	CertFile string `yaml:"cert_file,omitempty"`
	KeyFile  string `yaml:"key_file,omitempty"` // mode 0600

	// One of the logins. A token file is read again whenever Vault refuses
	// its token, and a token that can be renewed is.
	TokenFile  string     `yaml:"token_file,omitempty"` // mode 0600
	AppRole    AppRole    `yaml:"approle,omitempty"`
	Cert       CertLogin  `yaml:"cert,omitempty"`
	Kubernetes Kubernetes `yaml:"kubernetes,omitempty"`

	// Timeout bounds each request, with the login that it may need; 5 s.
	Timeout time.Duration `yaml:"timeout,omitempty"`
}

// An AppRole is a login by role ID and secret ID. Both files are read at each
// login.
type AppRole struct {
	RoleIDFile   string `yaml:"role_id_file"`    // mode 0600
	SecretIDFile string `yaml:"secret_id_file"`  // mode 0600
	Mount        string `yaml:"mount,omitempty"` // of the auth method; "approle"
}

// A CertLogin is a login by the client certificate of CertFile and KeyFile.
type CertLogin struct {
	Role  string `yaml:"role"`            // name of a trusted certificate of the auth method
	Mount string `yaml:"mount,omitempty"` // of the auth method; "cert"
}

// A Kubernetes is a login by a service account's token. The file is read at
// each login. Vault's jwt method takes the same request.
type Kubernetes struct {
	Role    string `yaml:"role"`
	JWTFile string `yaml:"jwt_file"`        // mode 0600
	Mount   string `yaml:"mount,omitempty"` // of the auth method; "kubernetes"
}

const (
	defaultTimeout = 5 * time.Second
	maxTimeout     = time.Minute
)

// Key names and mount paths become part of a URL: no dots alone, no escapes.
var (
	keyForm   = regexp.MustCompile(`^[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?$`)
	mountForm = regexp.MustCompile(`^[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?(/[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?)*$`)
)

func (c VaultConfig) withDefaults() VaultConfig {
	if c.Mount == "" {
		c.Mount = "transit"
	}
	if c.AppRole.Mount == "" {
		c.AppRole.Mount = "approle"
	}
	if c.Cert.Mount == "" {
		c.Cert.Mount = "cert"
	}
	if c.Kubernetes.Mount == "" {
		c.Kubernetes.Mount = "kubernetes"
	}
	if c.Timeout == 0 {
		c.Timeout = defaultTimeout
	}
	return c
}

func (c VaultConfig) check() []error {
	var faults []error
	fault := func(field string, err error) {
		if err != nil {
			faults = append(faults, fmt.Errorf("vault.%s: %w", field, err))
		}
	}
	named := c.withDefaults()
	fault("address", checkAddress(c.Address))
	if c.Namespace != "" {
		fault("namespace", checkPath(c.Namespace))
	}
	fault("mount", checkPath(named.Mount))
	if !keyForm.MatchString(c.Key) {
		fault("key", fmt.Errorf("%.80q: must be the name of a transit key", c.Key))
	}
	fault("timeout", checkTimeout(c.Timeout))
	if c.CAFile != "" {
		_, err := readRoots(c.CAFile)
		fault("ca_file", err)
	}
	switch {
	case c.CertFile != "" && c.KeyFile != "":
		_, err := readPair(c.CertFile, c.KeyFile)
		fault("key_file", err)
	case c.CertFile != "":
		fault("key_file", errors.New("missing: cert_file is set"))
	case c.KeyFile != "":
		fault("cert_file", errors.New("missing: key_file is set"))
	}
	return append(faults, c.checkLogin()...)
}

// set lists the logins that c has.
func (c VaultConfig) set() []string {
	var names []string
	for _, login := range []struct {
		name string
		set  bool
	}{
		{"token_file", c.TokenFile != ""},
		{"approle", c.AppRole != (AppRole{})},
		{"cert", c.Cert != (CertLogin{})},
		{"kubernetes", c.Kubernetes != (Kubernetes{})},
	} {
		if login.set {
			names = append(names, login.name)
		}
	}
	return names
}

func (c VaultConfig) checkLogin() []error {
	var faults []error
	fault := func(field string, err error) {
		if err != nil {
			faults = append(faults, fmt.Errorf("vault.%s: %w", field, err))
		}
	}
	secret := func(field, path string) {
		err := errors.New("missing")
		if path != "" {
			_, err = readSecretLine(path)
		}
		fault(field, err)
	}
	logins, named := c.set(), c.withDefaults()
	switch {
	case len(logins) == 0:
		fault("token_file", errors.New("missing: it, approle, cert or kubernetes must be set"))
	case len(logins) > 1:
		fault(logins[0], fmt.Errorf("set beside %s: only one login can be", strings.Join(logins[1:], " and ")))
	case logins[0] == "token_file":
		secret("token_file", c.TokenFile)
	case logins[0] == "approle":
		secret("approle.role_id_file", c.AppRole.RoleIDFile)
		secret("approle.secret_id_file", c.AppRole.SecretIDFile)
		fault("approle.mount", checkPath(named.AppRole.Mount))
	case logins[0] == "cert":
		if c.CertFile == "" {
			fault("cert_file", errors.New("missing: the login needs a client certificate"))
		}
		fault("cert.role", checkRole(c.Cert.Role))
		fault("cert.mount", checkPath(named.Cert.Mount))
	case logins[0] == "kubernetes":
		fault("kubernetes.role", checkRole(c.Kubernetes.Role))
		secret("kubernetes.jwt_file", c.Kubernetes.JWTFile)
		fault("kubernetes.mount", checkPath(named.Kubernetes.Mount))
	}
	return faults
}

func checkRole(role string) error {
	if !keyForm.MatchString(role) {
		return fmt.Errorf("%.80q: must be the name of a role", role)
	}
	return nil
}

// checkAddress refuses plain HTTP: the token would cross the network in clear.
func checkAddress(address string) error {
	u, err := url.Parse(address)
	if err != nil {
		return errors.New("must be https://HOST:PORT")
	}
	if u.Scheme != "https" || u.Hostname() == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || (u.Path != "" && u.Path != "/") {
		return fmt.Errorf("%.80q: must be https://HOST:PORT", u.Redacted())
	}
	return nil
}

func checkPath(path string) error {
	if !mountForm.MatchString(path) {
		return fmt.Errorf("%.80q: must be a path of Vault's, without slashes around it", path)
	}
	return nil
}

// vault wraps by encrypt and decrypt of one key of Vault's transit engine. It
// never looks into a ciphertext.
type vault struct {
	name    string
	c       VaultConfig
	conn    *http.Transport
	now     func() time.Time
	method  string // the login that is configured
	logins  *logins[*api.Client]
	contact contact
}

func openVault(c Config) (*vault, error) {
	v := &vault{name: c.Name, c: c.Vault.withDefaults(), method: c.Vault.set()[0], now: c.Now, contact: contact{now: c.Now}}
	conn, err := v.c.transport()
	if err != nil {
		return nil, fmt.Errorf("kms %s: %w", v.name, err)
	}
	v.conn = conn
	// A client that cannot be made at all is a fault of the set-up; better
	// now than at the first key.
	if _, err := v.client(""); err != nil {
		return nil, fmt.Errorf("kms %s: %w", v.name, err)
	}
	v.logins = newLogins(v.name, v, c.Now)
	return v, nil
}

// transport makes the connections to Vault.
func (c VaultConfig) transport() (*http.Transport, error) {
	conf, err := tlsConfig(c.CAFile)
	if err != nil {
		return nil, err
	}
	if c.CertFile != "" {
		conf.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return readPair(c.CertFile, c.KeyFile)
		}
	}
	return http1(conf, c.Timeout), nil
}

// client makes a client of Vault's that sends token. It retries nothing, and
// the VAULT_ variables of the environment have no say in it.
func (v *vault) client(token string) (*api.Client, error) {
	client, err := api.NewClient(&api.Config{
		Address: v.c.Address,
		HttpClient: &http.Client{
			Transport: bounded{v.conn},
			// The client follows a standby's redirect by itself.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
		MaxRetries: 0,
	})
	if err != nil {
		return nil, fmt.Errorf("make a vault client: %w", err)
	}
	client.SetHeaders(http.Header{api.RequestHeaderName: {"true"}})
	if v.c.Namespace != "" {
		client.SetNamespace(v.c.Namespace)
	}
	client.SetToken(token)
	return client, nil
}

func (v *vault) Name() string { return v.name }

func (v *vault) keyRef() string { return v.c.Mount + "/" + v.c.Key }

func (v *vault) Wrap(ctx context.Context, blob, context []byte) (w custodian.OuterWrap, err error) {
	if err := refuse(v.name, blob, context); err != nil {
		return w, err
	}
	defer func() { v.contact.done(err) }()
	made, err := v.call(ctx, "encrypt", map[string]any{
		"plaintext": base64.StdEncoding.EncodeToString(blob),
		"context":   base64.StdEncoding.EncodeToString(context),
		// Where the key is gone and the policy has create, Vault would make a
		// new one with this type in passing. There is no such type, so it
		// answers that instead. For a key that is there it is not looked at.
		"type": "must-exist",
	}, "ciphertext")
	if err != nil {
		return w, err
	}
	w = custodian.OuterWrap{Provider: v.name, KeyRef: v.keyRef(), Blob: []byte(made)}
	if err := proveBound(ctx, v, w, context); err != nil {
		return custodian.OuterWrap{}, err
	}
	return w, nil
}

// Unwrap opens w under the configured key, whatever key reference it carries:
// a transit engine that was restored under another path still opens its
// blobs, and a blob of another key does not open anyway.
func (v *vault) Unwrap(ctx context.Context, w custodian.OuterWrap, context []byte) (blob []byte, err error) {
	if err := refuseWrap(v.name, w, context); err != nil {
		return nil, err
	}
	defer func() { v.contact.done(err) }()
	blob, err = v.open(ctx, w, context)
	if errors.Is(err, custodian.ErrProviderBlob) && w.KeyRef != v.keyRef() {
		return nil, fmt.Errorf("the blob was made under %s: %w", w.KeyRef, err)
	}
	return blob, err
}

// Rewrap moves w to the newest version of the transit key, inside Vault.
func (v *vault) Rewrap(ctx context.Context, w custodian.OuterWrap, context []byte) (moved custodian.OuterWrap, err error) {
	if err := refuseWrap(v.name, w, context); err != nil {
		return moved, err
	}
	defer func() { v.contact.done(err) }()
	made, err := v.call(ctx, "rewrap", map[string]any{
		"ciphertext": string(w.Blob),
		"context":    base64.StdEncoding.EncodeToString(context),
	}, "ciphertext")
	if err != nil {
		return moved, err
	}
	moved = custodian.OuterWrap{Provider: v.name, KeyRef: v.keyRef(), Blob: []byte(made)}
	if err := proveBound(ctx, v, moved, context); err != nil {
		return custodian.OuterWrap{}, err
	}
	return moved, nil
}

// open decrypts w.
func (v *vault) open(ctx context.Context, w custodian.OuterWrap, context []byte) ([]byte, error) {
	text, err := v.call(ctx, "decrypt", map[string]any{
		"ciphertext": string(w.Blob),
		"context":    base64.StdEncoding.EncodeToString(context),
	}, "plaintext")
	if err != nil {
		return nil, err
	}
	blob, err := base64.StdEncoding.DecodeString(text)
	if err != nil || len(blob) == 0 {
		return nil, v.fault("decrypt", "its answer holds no base64", custodian.ErrProviderUnavailable)
	}
	return blob, nil
}

// call makes one request to the transit key and returns one string of its
// answer.
func (v *vault) call(ctx context.Context, op string, body map[string]any, field string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, v.c.Timeout)
	defer cancel()
	answer, err := ask(ctx, v.logins, op, func(ctx context.Context, client *api.Client) (*api.Secret, error) {
		return client.Logical().WriteWithContext(ctx, v.c.Mount+"/"+op+"/"+v.c.Key, body)
	})
	if err != nil {
		return "", err
	}
	if answer == nil {
		return "", v.fault(op, "its answer is empty", custodian.ErrProviderUnavailable)
	}
	text, _ := answer.Data[field].(string)
	if text == "" {
		return "", v.fault(op, "its answer has no "+field, custodian.ErrProviderUnavailable)
	}
	return text, nil
}

func (v *vault) Status() custodian.ProviderStatus {
	return v.logins.describe(v.contact.describe(custodian.ProviderStatus{Name: v.name, Kind: KindVault, KeyRef: v.keyRef(), OuterLayer: true}))
}

// Close forgets the login. The token ends with its lease.
func (v *vault) Close() error {
	v.logins.forget()
	v.conn.CloseIdleConnections()
	return nil
}
