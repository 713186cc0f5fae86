package kms_test

import (
	"encoding/base64"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/custodian/custodiantest"
	"github.com/keycustody/custodian/kms"
	"github.com/keycustody/custodian/testservers/awskms"
)

// An awsBed is a server that speaks as AWS KMS does, a key, and a provider
// that uses it through AWS's own client.
type awsBed struct {
	server *awskms.Server
	key    string // its ARN
	clock  *clock
	config kms.Config
	p      custodian.Provider
}

func awsBedOn(t *testing.T, server *awskms.Server) *awsBed {
	t.Helper()
	b := &awsBed{server: server, clock: &clock{now: time.Now()}}
	b.key = server.CreateKey(fmt.Sprintf("key-%08x", rand.Uint32()))
	b.config = kms.Config{Name: "outer", Kind: kms.KindAWS, Now: b.clock.Now, AWS: kms.AWSConfig{
		Key: b.key, Endpoint: server.Address, CAFile: server.CAFile, CredentialsFile: server.CredentialsFile, Timeout: 20 * time.Second,
	}}
	b.p = open(t, b.config)
	return b
}

func newAWSBed(t *testing.T) *awsBed {
	t.Helper()
	return awsBedOn(t, awskms.Start(t))
}

func TestAWS(t *testing.T) {
	server := awskms.Start(t)
	custodiantest.TestProvider(t, func(t *testing.T) custodian.Provider { return awsBedOn(t, server).p })
}

// What an alias names is the key; and AWS's client signs for the region that
// is configured.
func TestAWSAliasAndRegion(t *testing.T) {
	b := newAWSBed(t)
	b.server.CreateKey("custodian")
	b.config.AWS.Key, b.config.AWS.Region = "alias/custodian", awskms.Region
	b.p = open(t, b.config)
	w := wrapWith(t, b.p)
	wantOpens(t, "by the alias", b.p, w)

	b.config.AWS.Region = "us-east-1"
	b.p = open(t, b.config)
	_, err := b.p.Unwrap(t.Context(), w, context1)
	wantOnly(t, "open with a signature for another region", err, custodian.ErrProviderUnavailable)
	if err != nil && !strings.Contains(err.Error(), "region") {
		t.Errorf("open with a signature for another region: got %q, want it to say so", err)
	}
}

// The encryption context is the record's context, in each request.
func TestAWSEncryptionContext(t *testing.T) {
	b := newAWSBed(t)
	wrapWith(t, b.p)
	requests := b.server.Requests()
	if len(requests) != 2 {
		t.Fatalf("requests of a wrap: got %d, want one that wraps and one that tries another context", len(requests))
	}
	for i, want := range []struct{ op, context string }{{"Encrypt", string(context1)}, {"Decrypt", string(context1) + "\x00"}} {
		got := requests[i]
		if got.Operation != want.op || len(got.Context) != 1 || got.Context["custodian"] != base64.StdEncoding.EncodeToString([]byte(want.context)) {
			t.Errorf("request %d: got %s with %v, want %s with the context alone", i, got.Operation, got.Context, want.op)
		}
	}
}

func TestAWSRotation(t *testing.T) {
	b := newAWSBed(t)
	w := wrapWith(t, b.p)
	b.server.RotateKey(b.key)
	wantOpens(t, "after the rotation", b.p, w)
	moved, err := b.p.(custodian.Rewrapper).Rewrap(t.Context(), w, context1)
	if err != nil {
		t.Fatalf("rewrap: %v", err)
	}
	wantOpens(t, "the new wrap", b.p, moved)
	if got, want := awskms.Material(moved.Blob), awskms.Material(w.Blob)+1; got != want {
		t.Errorf("key material of the new wrap: got %d, want %d", got, want)
	}
}

// An answer of Encrypt or ReEncrypt that has no blob is none.
func TestAWSEmptyAnswer(t *testing.T) {
	b := newAWSBed(t)
	w := wrapWith(t, b.p)
	lie := answer(200, fmt.Sprintf(`{"CiphertextBlob":"","KeyId":%q}`, b.key))
	b.server.Break(awsOnly("Encrypt", lie))
	_, err := b.p.Wrap(t.Context(), inner, context1)
	wantOnly(t, "wrap", err, custodian.ErrProviderUnavailable)
	b.server.Break(awsOnly("ReEncrypt", lie))
	_, err = b.p.(custodian.Rewrapper).Rewrap(t.Context(), w, context1)
	wantOnly(t, "rewrap", err, custodian.ErrProviderUnavailable)
}

// awsOnly behaves as b for one operation.
func awsOnly(op string, b behaviour) awskms.Handler {
	return func(w http.ResponseWriter, r *http.Request, next http.HandlerFunc) {
		if r.Header.Get("X-Amz-Target") == "TrentService."+op {
			b(w, r, next)
			return
		}
		next(w, r)
	}
}

// Each code of AWS falls into one of the errors of a provider.
func TestAWSErrors(t *testing.T) {
	b := newAWSBed(t)
	w := wrapWith(t, b.p)
	for _, test := range []struct {
		status     int
		code, text string
		want       error
	}{
		{400, "ThrottlingException", "Rate exceeded", custodian.ErrProviderThrottled},
		{400, "LimitExceededException", "", custodian.ErrProviderThrottled},
		{429, "SomethingNew", "", custodian.ErrProviderThrottled},
		{400, "AccessDeniedException", "no identity-based policy allows", custodian.ErrProviderDenied},
		{400, "DisabledException", "is disabled", custodian.ErrProviderDisabled},
		{400, "KMSInvalidStateException", "arn:aws:kms:1 is pending deletion.", custodian.ErrProviderDisabled},
		{400, "KMSInvalidStateException", "arn:aws:kms:1 is pending import.", custodian.ErrProviderDisabled},
		{400, "KMSInvalidStateException", "The custom key store is disconnected.", custodian.ErrProviderUnavailable},
		{400, "NotFoundException", "Alias is not found.", custodian.ErrProviderDisabled},
		{400, "InvalidArnException", "", custodian.ErrProviderDisabled},
		{400, "InvalidKeyUsageException", "", custodian.ErrProviderDisabled},
		{400, "InvalidCiphertextException", "", custodian.ErrProviderBlob},
		{400, "IncorrectKeyException", "", custodian.ErrProviderBlob},
		{400, "ValidationException", "too long", custodian.ErrProviderBlob},
		{500, "KMSInternalException", "", custodian.ErrProviderUnavailable},
		{500, "KeyUnavailableException", "", custodian.ErrProviderUnavailable},
		{500, "DependencyTimeoutException", "", custodian.ErrProviderUnavailable},
		{503, "ServiceUnavailable", "", custodian.ErrProviderUnavailable},
		{400, "UnrecognizedClientException", "", custodian.ErrProviderUnavailable},
		{400, "InvalidSignatureException", "", custodian.ErrProviderUnavailable},
		{400, "SomethingNew", "", custodian.ErrProviderUnavailable},
	} {
		requests := 0 // one call at a time
		b.server.Break(func(w http.ResponseWriter, r *http.Request, next http.HandlerFunc) {
			requests++
			awskms.Fail(test.status, test.code, test.text)(w, r, next)
		})
		b.clock.Add(time.Minute)
		_, err := b.p.Unwrap(t.Context(), w, context1)
		wantOnly(t, fmt.Sprintf("%d %s %q", test.status, test.code, test.text), err, test.want)
		if err != nil && !strings.Contains(err.Error(), test.code) {
			t.Errorf("%s: got %q, want it to name the code", test.code, err)
		}
		if requests < 1 || requests > 2 {
			t.Errorf("%s: got %d requests for one call, want one, and one after a login", test.code, requests)
		}
	}
	b.server.Break(nil)
	b.clock.Add(time.Minute)
	wantOpens(t, "afterwards", b.p, w)
}

// Credentials that end are read again, and no storm of requests comes of
// those that are refused.
func TestAWSCredentialsExpire(t *testing.T) {
	b := newAWSBed(t)
	w := wrapWith(t, b.p)
	b.server.Expire()
	b.server.NewCredentials()
	wantOpens(t, "with new credentials in the file, no time having passed", b.p, w)

	b.server.Expire()
	seen := 0
	b.server.Break(func(w http.ResponseWriter, r *http.Request, next http.HandlerFunc) {
		seen++ // one call at a time
		next(w, r)
	})
	for range 20 {
		_, err := b.p.Unwrap(t.Context(), w, context1)
		wantOnly(t, "open with expired credentials", err, custodian.ErrProviderUnavailable)
		if err != nil && !strings.Contains(err.Error(), "expired") {
			t.Errorf("open with expired credentials: got %q, want it to say so", err)
		}
	}
	if seen > 22 {
		t.Errorf("requests of 20 calls with expired credentials: got %d, want one each and few for new logins", seen)
	}
	b.server.NewCredentials()
	b.clock.Add(time.Minute)
	wantOpens(t, "with new credentials in the file", b.p, w)

	if err := os.Chmod(b.server.CredentialsFile, 0o644); err != nil {
		t.Fatal(err)
	}
	b.server.Expire()
	_, err := b.p.Unwrap(t.Context(), w, context1)
	wantOnly(t, "open with credentials that others can read", err, custodian.ErrProviderUnavailable)
	if err != nil && !strings.Contains(err.Error(), "mode 0644") {
		t.Errorf("open with credentials that others can read: got %q, want it to name the mode", err)
	}
}

// Without a credentials file, AWS's own chain decides who calls; and nothing
// else of the environment has a say.
func TestAWSEnvironment(t *testing.T) {
	b := newAWSBed(t)
	t.Setenv("AWS_EC2_METADATA_DISABLED", "true")
	t.Setenv("AWS_SHARED_CREDENTIALS_FILE", b.server.CredentialsFile)
	t.Setenv("AWS_CONFIG_FILE", b.server.CredentialsFile+".none")
	for _, name := range []string{"AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} {
		t.Setenv(name, "")
	}
	t.Setenv("AWS_REGION", "us-east-1")
	t.Setenv("AWS_ENDPOINT_URL", "https://127.0.0.1:1")
	t.Setenv("AWS_ENDPOINT_URL_KMS", "https://127.0.0.1:1")
	b.config.AWS.CredentialsFile = ""
	b.p = open(t, b.config)
	wantOpens(t, "with the chain's credentials", b.p, wrapWith(t, b.p))

	b.config.AWS.Profile = "none"
	b.p = open(t, b.config)
	_, err := b.p.Wrap(t.Context(), inner, context1)
	wantOnly(t, "wrap with a profile that is not there", err, custodian.ErrProviderUnavailable)
	if err != nil && !strings.Contains(err.Error(), "log in to aws") {
		t.Errorf("wrap with a profile that is not there: got %q, want it to name the login", err)
	}
}

func TestAWSErrorsShowNoSecrets(t *testing.T) {
	b := newAWSBed(t)
	w := wrapWith(t, b.p)
	text, err := os.ReadFile(b.server.CredentialsFile)
	if err != nil {
		t.Fatal(err)
	}
	var secrets []string
	for _, line := range strings.Split(string(text), "\n") {
		if name, value, ok := strings.Cut(line, " = "); ok && name != "aws_access_key_id" {
			secrets = append(secrets, value)
		}
	}
	if len(secrets) != 2 {
		t.Fatalf("secrets to look for: got %d, want the secret key and the session token", len(secrets))
	}
	for _, h := range []awskms.Handler{awskms.Fail(500, "KMSInternalException", ""), awskms.Fail(400, "AccessDeniedException", ""), awskms.Handler(answer(200, "{")), awskms.Handler(reset)} {
		b.server.Break(h)
		_, err := b.p.Unwrap(t.Context(), w, context1)
		if err == nil {
			t.Fatal("open while broken: got no error")
		}
		for _, secret := range secrets {
			if strings.Contains(err.Error(), secret) || strings.Contains(b.p.Status().LastError, secret) {
				t.Error("an error shows a secret")
			}
		}
	}
}

func wrapWith(t *testing.T, p custodian.Provider) custodian.OuterWrap {
	t.Helper()
	w, err := p.Wrap(t.Context(), inner, context1)
	if err != nil {
		t.Fatalf("wrap: %v", err)
	}
	return w
}

func wantOpens(t *testing.T, when string, p custodian.Provider, w custodian.OuterWrap) {
	t.Helper()
	got, err := p.Unwrap(t.Context(), w, context1)
	if err != nil {
		t.Errorf("open %s: %v", when, err)
		return
	}
	if string(got) != string(inner) {
		t.Errorf("open %s: got other bytes", when)
	}
}
