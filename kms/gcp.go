package kms

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"net"
	"net/http"
	"os"
	"regexp"
	"strconv"
	"strings"
	"time"

	"cloud.google.com/go/auth"
	gcpcredentials "cloud.google.com/go/auth/credentials"
	gcpkms "cloud.google.com/go/kms/apiv1"
	"cloud.google.com/go/kms/apiv1/kmspb"
	"github.com/googleapis/gax-go/v2"
	"google.golang.org/api/option"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/keycustody/custodian/custodian"
)

// A GCPConfig says how to reach a key of Google Cloud KMS: a symmetric one, of
// purpose ENCRYPT_DECRYPT. The caller needs the role
// roles/cloudkms.cryptoKeyEncrypterDecrypter on it, and nothing else.
//
// Without CredentialsFile, who calls is found by Google's application default
// credentials: GOOGLE_APPLICATION_CREDENTIALS, gcloud's own file, the metadata
// server. They are looked up again at each login.
type GCPConfig struct {
	// Key is projects/P/locations/L/keyRings/R/cryptoKeys/K, without a version.
	Key string `yaml:"key"`
	// Endpoint is HOST:PORT; cloudkms.googleapis.com:443.
	Endpoint string `yaml:"endpoint,omitempty"`
	// CAFile has the CAs of Endpoint, PEM; without it the system's CAs.
	CAFile string `yaml:"ca_file,omitempty"`

	// CredentialsFile is JSON of Google's: a service account's key, or a
	// configuration of workload identity federation. It is read at each login.
	CredentialsFile string `yaml:"credentials_file,omitempty"` // mode 0600
	// InsecureLoopback speaks without TLS and without credentials to an
	// Endpoint on this machine: an emulator.
	InsecureLoopback bool `yaml:"insecure_loopback,omitempty"`

	// Timeout bounds each request, with the login that it may need; 5 s.
	Timeout time.Duration `yaml:"timeout,omitempty"`
}

const (
	gcpEndpoint = "cloudkms.googleapis.com:443"
	gcpScope    = "https://www.googleapis.com/auth/cloudkms"
)

var gcpKeyForm = regexp.MustCompile(`^projects/[a-z0-9.:-]{1,100}/locations/[a-z0-9-]{1,40}/keyRings/[A-Za-z0-9_-]{1,63}/cryptoKeys/[A-Za-z0-9_-]{1,63}$`)

// gcpFileTypes are the kinds of credentials file that are taken. Those of a
// person are not.
var gcpFileTypes = []gcpcredentials.CredType{gcpcredentials.ServiceAccount, gcpcredentials.ExternalAccount, gcpcredentials.ImpersonatedServiceAccount}

func (c GCPConfig) withDefaults() GCPConfig {
	if c.Endpoint == "" {
		c.Endpoint = gcpEndpoint
	}
	if c.Timeout == 0 {
		c.Timeout = defaultTimeout
	}
	return c
}

func (c GCPConfig) check() []error {
	var faults []error
	fault := func(field string, err error) {
		if err != nil {
			faults = append(faults, fmt.Errorf("gcp.%s: %w", field, err))
		}
	}
	if !gcpKeyForm.MatchString(c.Key) {
		fault("key", fmt.Errorf("%.200q: must be projects/P/locations/L/keyRings/R/cryptoKeys/K", c.Key))
	}
	host, port, err := net.SplitHostPort(c.withDefaults().Endpoint)
	_, notPort := strconv.ParseUint(port, 10, 16)
	if err != nil || notPort != nil || host == "" || strings.ContainsAny(host, "/@?#") {
		fault("endpoint", fmt.Errorf("%.80q: must be HOST:PORT", c.Endpoint))
	} else if c.InsecureLoopback && !isLoopback(host) {
		fault("insecure_loopback", fmt.Errorf("%.80q is not a loopback address: nothing leaves this machine without TLS", c.Endpoint))
	}
	if c.CAFile != "" {
		_, err := readRoots(c.CAFile)
		fault("ca_file", err)
	}
	if c.InsecureLoopback && c.CredentialsFile != "" {
		fault("credentials_file", errors.New("set beside insecure_loopback, which sends none"))
	} else if c.CredentialsFile != "" {
		b, _, err := c.readCredentials()
		clear(b)
		fault("credentials_file", err)
	}
	fault("timeout", checkTimeout(c.Timeout))
	return faults
}

// isLoopback takes addresses only: where a name leads is not known here.
func isLoopback(host string) bool {
	ip := net.ParseIP(host)
	return ip != nil && ip.IsLoopback()
}

// readCredentials reads the credentials file, which the caller clears, and
// finds its type.
func (c GCPConfig) readCredentials() ([]byte, gcpcredentials.CredType, error) {
	b, err := readSecret(c.CredentialsFile)
	if err != nil {
		return nil, "", err
	}
	var file struct {
		Type gcpcredentials.CredType `json:"type"`
	}
	// The decoder's errors can quote the file.
	if json.Unmarshal(b, &file) != nil {
		clear(b)
		return nil, "", fmt.Errorf("%s: not JSON", c.CredentialsFile)
	}
	for _, known := range gcpFileTypes {
		if file.Type == known {
			return b, known, nil
		}
	}
	clear(b)
	return nil, "", fmt.Errorf("%s: type %.40q: must be one of %s", c.CredentialsFile, file.Type, gcpFileTypes)
}

// google wraps by Encrypt and Decrypt of one key of Cloud KMS, with the
// record's context as additional authenticated data.
type google struct {
	name    string
	c       GCPConfig
	now     func() time.Time
	conn    *grpc.ClientConn
	client  *gcpkms.KeyManagementClient
	oauth   *http.Client
	logins  *logins[gcpToken]
	contact contact
}

// A gcpToken is an OAuth access token; "" where none is sent.
type gcpToken string

func (t gcpToken) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	if t == "" {
		return nil, nil
	}
	return map[string]string{"authorization": "Bearer " + string(t)}, nil
}

func (t gcpToken) RequireTransportSecurity() bool { return t != "" }

func openGCP(ctx context.Context, c Config) (*google, error) {
	g := &google{name: c.Name, c: c.GCP.withDefaults(), now: c.Now, contact: contact{now: c.Now}}
	if err := g.connect(ctx); err != nil {
		return nil, fmt.Errorf("kms %s: %w", g.name, err)
	}
	g.logins = newLogins(g.name, g, c.Now)
	return g, nil
}

// connect makes the client; it connects with the first call.
func (g *google) connect(ctx context.Context) error {
	conf, err := tlsConfig(g.c.CAFile)
	if err != nil {
		return err
	}
	transport := credentials.NewTLS(conf)
	if g.c.InsecureLoopback {
		transport = insecure.NewCredentials()
	}
	if g.conn, err = grpc.NewClient(g.c.Endpoint,
		grpc.WithTransportCredentials(transport),
		grpc.WithNoProxy(), grpc.WithDisableRetry(), grpc.WithDisableServiceConfig(),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer)),
		grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: g.c.Timeout,
			Backoff: backoff.Config{BaseDelay: firstWait, Multiplier: 2, Jitter: 0.5, MaxDelay: awayWait}}),
		// Google allows few pings, so there are hardly any. It is the timeout
		// that counts: the kernel cuts a connection whose peer acknowledges
		// nothing for that long, where the next call would use it too.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Minute, Timeout: g.c.Timeout}),
	); err != nil {
		return fmt.Errorf("make a connection to %s: %w", g.c.Endpoint, err)
	}
	if g.client, err = gcpkms.NewKeyManagementClient(ctx, option.WithGRPCConn(g.conn)); err != nil {
		g.conn.Close()
		return fmt.Errorf("make a cloud kms client: %w", err)
	}
	// Its own retries would go on behind our back.
	g.client.CallOptions = &gcpkms.KeyManagementCallOptions{}
	if g.oauth, err = g.c.oauthClient(); err != nil {
		g.conn.Close()
		return err
	}
	return nil
}

// oauthClient makes the connections to whoever gives tokens: Google, or what
// the credentials file names. It trusts the system's CAs and those of CAFile.
func (c GCPConfig) oauthClient() (*http.Client, error) {
	conf, err := tlsConfig("")
	if err != nil {
		return nil, err
	}
	if c.CAFile != "" {
		if conf.RootCAs, err = x509.SystemCertPool(); err != nil {
			return nil, fmt.Errorf("read the system's CAs: %w", err)
		}
		pem, err := os.ReadFile(c.CAFile)
		if err != nil {
			return nil, err
		}
		conf.RootCAs.AppendCertsFromPEM(pem)
	}
	return &http.Client{Transport: bounded{http1(conf, c.Timeout)}, CheckRedirect: noRedirect}, nil
}

// login gets an access token. No cache of Google's library decides when the
// next is due: each login makes its credentials anew.
func (g *google) login(ctx context.Context) (*session[gcpToken], error) {
	if g.c.InsecureLoopback {
		return &session[gcpToken]{}, nil
	}
	begin := g.now()
	found, err := g.credentials()
	if err != nil {
		return nil, err
	}
	token, err := found.Token(ctx)
	if err != nil {
		return nil, err
	}
	s := &session[gcpToken]{client: gcpToken(token.Value)}
	if token.Expiry.IsZero() {
		return s, nil
	}
	return lasting(s, begin, int64(token.Expiry.Sub(begin)/time.Second)), nil
}

func (g *google) credentials() (*auth.Credentials, error) {
	options := &gcpcredentials.DetectOptions{Scopes: []string{gcpScope}, Client: g.oauth}
	if g.c.CredentialsFile == "" {
		return gcpcredentials.DetectDefault(options)
	}
	b, kind, err := g.c.readCredentials()
	if err != nil {
		return nil, err
	}
	defer clear(b)
	return gcpcredentials.NewCredentialsFromJSON(kind, b, options)
}

func (g *google) Name() string { return g.name }

// maxGCPBlob is the most that Encrypt takes with a key of any protection
// level; Cloud KMS API, EncryptRequest.plaintext: 8 KiB with an HSM key, with
// the additional authenticated data.
const maxGCPBlob = 8 << 10

// Wrap and open send a CRC32C of all that they send and check one of all that
// they receive: Google asks for it, since a bit that flips between the TLS of
// its front door and its HSM would lose the key.
func (g *google) Wrap(ctx context.Context, blob, context []byte) (w custodian.OuterWrap, err error) {
	if err := refuse(g.name, blob, context); err != nil {
		return w, err
	}
	if n := len(blob) + len(context); n > maxGCPBlob {
		return w, fmt.Errorf("kms %s: blob and context have %d bytes, and google takes %d: %w", g.name, n, maxGCPBlob, custodian.ErrProviderBlob)
	}
	defer func() { g.contact.done(err) }()
	made, err := request(ctx, g, "encrypt", g.client.Encrypt, &kmspb.EncryptRequest{
		Name: g.c.Key, Plaintext: blob, PlaintextCrc32C: crc32c(blob),
		AdditionalAuthenticatedData: context, AdditionalAuthenticatedDataCrc32C: crc32c(context),
	})
	switch {
	case err != nil:
		return w, err
	case !made.VerifiedPlaintextCrc32C || !made.VerifiedAdditionalAuthenticatedDataCrc32C:
		return w, g.fault("encrypt", "google has not verified the CRC32C of the request", custodian.ErrProviderUnavailable)
	case len(made.Ciphertext) == 0 || made.CiphertextCrc32C.GetValue() != crc32c(made.Ciphertext).Value:
		return w, g.fault("encrypt", "the CRC32C of the answer is wrong", custodian.ErrProviderUnavailable)
	}
	w = custodian.OuterWrap{Provider: g.name, KeyRef: g.c.Key, Blob: made.Ciphertext}
	if err := proveBound(ctx, g, w, context); err != nil {
		return custodian.OuterWrap{}, err
	}
	return w, nil
}

func (g *google) Unwrap(ctx context.Context, w custodian.OuterWrap, context []byte) (blob []byte, err error) {
	if err := refuseWrap(g.name, w, context); err != nil {
		return nil, err
	}
	defer func() { g.contact.done(err) }()
	blob, err = g.open(ctx, w, context)
	if errors.Is(err, custodian.ErrProviderBlob) && w.KeyRef != g.c.Key {
		return nil, fmt.Errorf("the blob was made under %s: %w", w.KeyRef, err)
	}
	return blob, err
}

// open decrypts w. Google has no call that re-encrypts; whoever re-wraps
// opens and wraps.
func (g *google) open(ctx context.Context, w custodian.OuterWrap, context []byte) ([]byte, error) {
	answer, err := request(ctx, g, "decrypt", g.client.Decrypt, &kmspb.DecryptRequest{
		Name: g.c.Key, Ciphertext: w.Blob, CiphertextCrc32C: crc32c(w.Blob),
		AdditionalAuthenticatedData: context, AdditionalAuthenticatedDataCrc32C: crc32c(context),
	})
	if err != nil {
		return nil, err
	}
	if len(answer.Plaintext) == 0 || answer.PlaintextCrc32C.GetValue() != crc32c(answer.Plaintext).Value {
		return nil, g.fault("decrypt", "the CRC32C of the answer is wrong", custodian.ErrProviderUnavailable)
	}
	return answer.Plaintext, nil
}

// binds says which key of Google's binds the context.
func (g *google) binds() string { return "the key must be of purpose ENCRYPT_DECRYPT" }

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func crc32c(b []byte) *wrapperspb.Int64Value {
	return wrapperspb.Int64(int64(crc32.Checksum(b, castagnoli)))
}

// request makes one request within the timeout.
func request[I, O any](ctx context.Context, g *google, op string, do func(context.Context, I, ...gax.CallOption) (O, error), in I) (O, error) {
	ctx, cancel := context.WithTimeout(ctx, g.c.Timeout)
	defer cancel()
	return ask(ctx, g.logins, op, func(ctx context.Context, token gcpToken) (O, error) {
		answer, err := do(ctx, in, gax.WithGRPCOptions(grpc.PerRPCCredentials(token)))
		if cause := context.Cause(ctx); err != nil && cause != nil {
			return answer, fmt.Errorf("%w: %w", cause, err)
		}
		return answer, err
	})
}

func (g *google) Status() custodian.ProviderStatus {
	return g.logins.describe(g.contact.describe(custodian.ProviderStatus{Name: g.name, Kind: KindGCP, KeyRef: g.c.Key, OuterLayer: true}))
}

// Close forgets the login. The token ends with its lifetime.
func (g *google) Close() error {
	g.logins.forget()
	g.oauth.CloseIdleConnections()
	return g.conn.Close()
}
