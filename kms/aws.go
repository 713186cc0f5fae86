package kms

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/credentials"
	awskms "github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/aws-sdk-go-v2/service/kms/types"

	"github.com/keycustody/custodian/custodian"
)

// An AWSConfig says how to reach a key of AWS KMS: a symmetric one, of usage
// ENCRYPT_DECRYPT. The caller needs kms:Encrypt, kms:Decrypt and, to re-wrap,
// kms:ReEncryptFrom and kms:ReEncryptTo on it, and nothing else.
//
// Without CredentialsFile, who calls is found by AWS's standard chain: the
// environment, the shared files, web identity, ECS, EC2. It is walked again at
// each login.
type AWSConfig struct {
	// Key is the ARN of a key or of an alias, or alias/NAME. What an alias
	// wrapped opens only as long as it names the same key.
	Key string `yaml:"key"`
	// Region is of the key; it may be left out where Key is an ARN.
	Region string `yaml:"region,omitempty"`
	// Endpoint is https://HOST:PORT; without it, the region's own.
	Endpoint string `yaml:"endpoint,omitempty"`
	CAFile   string `yaml:"ca_file,omitempty"` // of Endpoint, PEM; without it the system's CAs

	// CredentialsFile has AWS's form of a shared credentials file. It is read
	// at each login, and is then the only source of credentials.
	CredentialsFile string `yaml:"credentials_file,omitempty"` // mode 0600
	Profile         string `yaml:"profile,omitempty"`          // of the shared files; "default"

	// Timeout bounds each request, with the login that it may need; 5 s.
	Timeout time.Duration `yaml:"timeout,omitempty"`
}

// The forms of names; AWS KMS API Reference, Encrypt, KeyId.
var (
	awsRegionForm = regexp.MustCompile(`^[a-z]{2,}(-[a-z]+)+-[0-9]{1,2}$`)
	awsARNForm    = regexp.MustCompile(`^arn:aws[a-z-]*:kms:([a-z0-9-]+):[0-9]{12}:(key/[A-Za-z0-9-]{1,64}|alias/[A-Za-z0-9/_-]{1,250})$`)
	awsAliasForm  = regexp.MustCompile(`^alias/[A-Za-z0-9/_-]{1,250}$`)
	profileForm   = regexp.MustCompile(`^[A-Za-z0-9._@+-]{1,64}$`)
)

func (c AWSConfig) withDefaults() AWSConfig {
	if parts := awsARNForm.FindStringSubmatch(c.Key); parts != nil && c.Region == "" {
		c.Region = parts[1]
	}
	if c.Timeout == 0 {
		c.Timeout = defaultTimeout
	}
	return c
}

func (c AWSConfig) check() []error {
	var faults []error
	fault := func(field string, err error) {
		if err != nil {
			faults = append(faults, fmt.Errorf("aws.%s: %w", field, err))
		}
	}
	arn := awsARNForm.FindStringSubmatch(c.Key)
	switch {
	case arn == nil && !awsAliasForm.MatchString(c.Key):
		fault("key", fmt.Errorf("%.80q: must be the ARN of a key or alias, or alias/NAME", c.Key))
	case arn == nil && c.Region == "":
		fault("region", errors.New("missing: the key is not an ARN that names it"))
	case arn != nil && c.Region != "" && c.Region != arn[1]:
		fault("region", fmt.Errorf("%.80q: the key is in %s", c.Region, arn[1]))
	}
	if c.Region != "" && !awsRegionForm.MatchString(c.Region) {
		fault("region", fmt.Errorf("%.80q: must be a region such as eu-central-1", c.Region))
	}
	if c.Endpoint != "" {
		fault("endpoint", checkAddress(c.Endpoint))
	}
	if c.CAFile != "" {
		_, err := readRoots(c.CAFile)
		fault("ca_file", err)
	}
	if c.CredentialsFile != "" {
		b, err := readSecret(c.CredentialsFile)
		clear(b)
		fault("credentials_file", err)
	}
	if c.Profile != "" && !profileForm.MatchString(c.Profile) {
		fault("profile", fmt.Errorf("%.80q: must be the name of a profile", c.Profile))
	}
	fault("timeout", checkTimeout(c.Timeout))
	return faults
}

// amazon wraps by Encrypt and Decrypt of one key of AWS KMS, with the record's
// context as encryption context.
type amazon struct {
	name    string
	c       AWSConfig
	now     func() time.Time
	conn    *http.Transport
	logins  *logins[*awskms.Client]
	contact contact
}

func openAWS(c Config) (*amazon, error) {
	a := &amazon{name: c.Name, c: c.AWS.withDefaults(), now: c.Now, contact: contact{now: c.Now}}
	conf, err := tlsConfig(a.c.CAFile)
	if err != nil {
		return nil, fmt.Errorf("kms %s: %w", a.name, err)
	}
	a.conn = http1(conf, a.c.Timeout)
	a.logins = newLogins(a.name, a, c.Now)
	return a, nil
}

// login takes credentials from the file, or from AWS's chain. They are kept
// as they are until they end or are refused: no cache of the SDK's decides.
func (a *amazon) login(ctx context.Context) (*session[*awskms.Client], error) {
	begin := a.now()
	found, err := a.c.credentials(ctx)
	if err != nil {
		return nil, err
	}
	client := awskms.New(awskms.Options{
		Region:      a.c.Region,
		Credentials: credentials.StaticCredentialsProvider{Value: found},
		HTTPClient:  &http.Client{Transport: bounded{a.conn}, CheckRedirect: noRedirect},
		Retryer:     aws.NopRetryer{},
		// Without an endpoint of ours, the one of the region in the SDK's list;
		// the AWS_ENDPOINT_ variables of the environment have no say in it.
		BaseEndpoint: endpointOf(a.c.Endpoint),
	})
	s := &session[*awskms.Client]{client: client}
	if found.CanExpire {
		return lasting(s, begin, int64(found.Expires.Sub(begin)/time.Second)), nil
	}
	return s, nil
}

func (c AWSConfig) credentials(ctx context.Context) (aws.Credentials, error) {
	if c.CredentialsFile != "" {
		return c.fileCredentials(ctx)
	}
	options := []func(*config.LoadOptions) error{config.WithRegion(c.Region)}
	if c.Profile != "" {
		options = append(options, config.WithSharedConfigProfile(c.Profile))
	}
	loaded, err := config.LoadDefaultConfig(ctx, options...)
	if err != nil {
		return aws.Credentials{}, err
	}
	return loaded.Credentials.Retrieve(ctx)
}

// fileCredentials reads one profile of the credentials file, whose mode is
// looked at each time.
func (c AWSConfig) fileCredentials(ctx context.Context) (aws.Credentials, error) {
	b, err := readSecret(c.CredentialsFile)
	clear(b)
	if err != nil {
		return aws.Credentials{}, err
	}
	profile := c.Profile
	if profile == "" {
		profile = "default"
	}
	shared, err := config.LoadSharedConfigProfile(ctx, profile, func(o *config.LoadSharedConfigOptions) {
		o.CredentialsFiles, o.ConfigFiles = []string{c.CredentialsFile}, []string{}
	})
	if err != nil {
		return aws.Credentials{}, err
	}
	if !shared.Credentials.HasKeys() {
		return aws.Credentials{}, fmt.Errorf("%s: profile %s has no keys", c.CredentialsFile, profile)
	}
	return shared.Credentials, nil
}

func endpointOf(endpoint string) *string {
	if endpoint == "" {
		return nil
	}
	return &endpoint
}

func noRedirect(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }

// encryptionContext is context as AWS takes it. It is not secret: AWS writes
// it to CloudTrail, and policies can ask for it.
func encryptionContext(context []byte) map[string]string {
	return map[string]string{"custodian": base64.StdEncoding.EncodeToString(context)}
}

func (a *amazon) Name() string { return a.name }

// maxAWSBlob is the most that Encrypt takes; AWS KMS API Reference, Encrypt,
// Plaintext.
const maxAWSBlob = 4096

func (a *amazon) Wrap(ctx context.Context, blob, context []byte) (w custodian.OuterWrap, err error) {
	if err := refuse(a.name, blob, context); err != nil {
		return w, err
	}
	if len(blob) > maxAWSBlob {
		return w, fmt.Errorf("kms %s: the blob has %d bytes, and AWS takes %d: %w", a.name, len(blob), maxAWSBlob, custodian.ErrProviderBlob)
	}
	defer func() { a.contact.done(err) }()
	made, err := call(ctx, a, "encrypt", (*awskms.Client).Encrypt, &awskms.EncryptInput{
		KeyId: &a.c.Key, Plaintext: blob, EncryptionContext: encryptionContext(context),
		EncryptionAlgorithm: types.EncryptionAlgorithmSpecSymmetricDefault,
	})
	if err != nil {
		return w, err
	}
	return a.made(ctx, "encrypt", made.CiphertextBlob, context)
}

func (a *amazon) Unwrap(ctx context.Context, w custodian.OuterWrap, context []byte) (blob []byte, err error) {
	if err := refuseWrap(a.name, w, context); err != nil {
		return nil, err
	}
	defer func() { a.contact.done(err) }()
	blob, err = a.open(ctx, w, context)
	if errors.Is(err, custodian.ErrProviderBlob) && w.KeyRef != a.c.Key {
		return nil, fmt.Errorf("the blob was made under %s: %w", w.KeyRef, err)
	}
	return blob, err
}

// Rewrap moves w to the newest material of the key, inside AWS.
func (a *amazon) Rewrap(ctx context.Context, w custodian.OuterWrap, context []byte) (moved custodian.OuterWrap, err error) {
	if err := refuseWrap(a.name, w, context); err != nil {
		return moved, err
	}
	defer func() { a.contact.done(err) }()
	made, err := call(ctx, a, "reencrypt", (*awskms.Client).ReEncrypt, &awskms.ReEncryptInput{
		CiphertextBlob: w.Blob, SourceKeyId: &a.c.Key, DestinationKeyId: &a.c.Key,
		SourceEncryptionContext: encryptionContext(context), DestinationEncryptionContext: encryptionContext(context),
		SourceEncryptionAlgorithm:      types.EncryptionAlgorithmSpecSymmetricDefault,
		DestinationEncryptionAlgorithm: types.EncryptionAlgorithmSpecSymmetricDefault,
	})
	if err != nil {
		return moved, err
	}
	return a.made(ctx, "reencrypt", made.CiphertextBlob, context)
}

// made is a new wrap that is proved to be bound to its context.
func (a *amazon) made(ctx context.Context, op string, made, context []byte) (custodian.OuterWrap, error) {
	if len(made) == 0 {
		return custodian.OuterWrap{}, a.fault(op, "its answer has no blob", custodian.ErrProviderUnavailable)
	}
	w := custodian.OuterWrap{Provider: a.name, KeyRef: a.c.Key, Blob: made}
	if err := proveBound(ctx, a, w, context); err != nil {
		return custodian.OuterWrap{}, err
	}
	return w, nil
}

// open decrypts w. It names the key: without, AWS would open a blob of any
// key that the caller may use.
func (a *amazon) open(ctx context.Context, w custodian.OuterWrap, context []byte) ([]byte, error) {
	answer, err := call(ctx, a, "decrypt", (*awskms.Client).Decrypt, &awskms.DecryptInput{
		KeyId: &a.c.Key, CiphertextBlob: w.Blob, EncryptionContext: encryptionContext(context),
		EncryptionAlgorithm: types.EncryptionAlgorithmSpecSymmetricDefault,
	})
	if err != nil {
		return nil, err
	}
	if len(answer.Plaintext) == 0 {
		return nil, a.fault("decrypt", "its answer holds nothing", custodian.ErrProviderUnavailable)
	}
	return answer.Plaintext, nil
}

// binds says which key of AWS binds the context.
func (a *amazon) binds() string { return "the key must be a symmetric one" }

// call makes one request within the timeout.
func call[I, O any](ctx context.Context, a *amazon, op string, do func(*awskms.Client, context.Context, I, ...func(*awskms.Options)) (O, error), in I) (O, error) {
	ctx, cancel := context.WithTimeout(ctx, a.c.Timeout)
	defer cancel()
	return ask(ctx, a.logins, op, func(ctx context.Context, client *awskms.Client) (O, error) {
		return do(client, ctx, in)
	})
}

func (a *amazon) Status() custodian.ProviderStatus {
	return a.logins.describe(a.contact.describe(custodian.ProviderStatus{Name: a.name, Kind: KindAWS, KeyRef: a.c.Key, OuterLayer: true}))
}

// Close forgets the login.
func (a *amazon) Close() error {
	a.logins.forget()
	a.conn.CloseIdleConnections()
	return nil
}
