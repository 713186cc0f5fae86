package awskms_test

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net/http"
	"os"
	"strings"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/smithy-go"

	"github.com/keycustody/custodian/testservers/awskms"
)

// AWS's own client finds what it expects of AWS.
func TestServer(t *testing.T) {
	s := awskms.Start(t)
	arn := s.CreateKey("movies")
	other := s.CreateKey("series")
	good := shared(t, s)
	client := newClient(t, s, good)
	context1, context2 := map[string]string{"record": "1"}, map[string]string{"record": "2"}
	made, err := client.Encrypt(t.Context(), &kms.EncryptInput{KeyId: aws.String("alias/movies"), Plaintext: []byte("a KEK"), EncryptionContext: context1})
	if err != nil {
		t.Fatalf("encrypt: %v", err)
	}
	if got := aws.ToString(made.KeyId); got != arn {
		t.Errorf("key of the answer: got %s, want %s", got, arn)
	}
	decrypt := func(client *kms.Client, key *string, blob []byte, context map[string]string) (string, error) {
		out, err := client.Decrypt(t.Context(), &kms.DecryptInput{KeyId: key, CiphertextBlob: blob, EncryptionContext: context})
		if err != nil {
			return "", err
		}
		return string(out.Plaintext), nil
	}
	if got, err := decrypt(client, nil, made.CiphertextBlob, context1); err != nil || got != "a KEK" {
		t.Errorf("decrypt without naming the key: got %q, %v", got, err)
	}
	moved, err := client.ReEncrypt(t.Context(), &kms.ReEncryptInput{CiphertextBlob: made.CiphertextBlob, SourceKeyId: &arn, DestinationKeyId: &other,
		SourceEncryptionContext: context1, DestinationEncryptionContext: context2})
	if err != nil {
		t.Fatalf("reencrypt: %v", err)
	}
	if got, err := decrypt(client, &other, moved.CiphertextBlob, context2); err != nil || got != "a KEK" {
		t.Errorf("decrypt what was moved: got %q, %v", got, err)
	}

	wrongSecret, wrongToken, unknown := good, good, good
	wrongSecret.SecretAccessKey = strings.ToLower(good.SecretAccessKey)
	wrongToken.SessionToken = ""
	unknown.AccessKeyID = "ASIA0000000000000000"
	flipped := bytes.Clone(made.CiphertextBlob)
	flipped[len(flipped)-1] ^= 1
	for _, test := range []struct {
		name    string
		client  *kms.Client
		key     string
		blob    []byte
		context map[string]string
		want    string
	}{
		{"another context", client, arn, made.CiphertextBlob, context2, "InvalidCiphertextException"},
		{"no context", client, arn, made.CiphertextBlob, nil, "InvalidCiphertextException"},
		{"a changed blob", client, arn, flipped, context1, "InvalidCiphertextException"},
		{"another key", client, other, made.CiphertextBlob, context1, "IncorrectKeyException"},
		{"an unknown key", client, "alias/none", made.CiphertextBlob, context1, "NotFoundException"},
		{"a wrong secret", newClient(t, s, wrongSecret), arn, made.CiphertextBlob, context1, "InvalidSignatureException"},
		{"no session token", newClient(t, s, wrongToken), arn, made.CiphertextBlob, context1, "UnrecognizedClientException"},
		{"an unknown access key", newClient(t, s, unknown), arn, made.CiphertextBlob, context1, "UnrecognizedClientException"},
	} {
		_, err := decrypt(test.client, &test.key, test.blob, test.context)
		wantCode(t, "decrypt with "+test.name, err, test.want)
	}

	s.SetState(arn, awskms.PendingDeletion)
	_, err = decrypt(client, nil, made.CiphertextBlob, context1)
	wantCode(t, "decrypt under a key that is about to be deleted", err, "KMSInvalidStateException")
	s.Expire()
	_, err = decrypt(client, &other, moved.CiphertextBlob, context2)
	wantCode(t, "decrypt with expired credentials", err, "ExpiredTokenException")
}

// A request that nobody signed gets no answer about keys.
func TestServerWantsASignature(t *testing.T) {
	s := awskms.Start(t)
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, s.Address+"/", strings.NewReader(`{}`))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/x-amz-json-1.1")
	r.Header.Set("X-Amz-Target", "TrentService.Decrypt")
	answer, err := httpClient(t, s).Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	var body bytes.Buffer
	body.ReadFrom(answer.Body)
	if answer.StatusCode != http.StatusBadRequest || !strings.Contains(body.String(), "MissingAuthenticationToken") {
		t.Errorf("without a signature: got %d %s, want 400 and MissingAuthenticationToken", answer.StatusCode, body.String())
	}
	if got := len(s.Requests()); got != 0 {
		t.Errorf("requests taken: got %d, want none", got)
	}
}

func shared(t *testing.T, s *awskms.Server) aws.Credentials {
	t.Helper()
	profile, err := config.LoadSharedConfigProfile(t.Context(), "default", func(o *config.LoadSharedConfigOptions) {
		o.CredentialsFiles, o.ConfigFiles = []string{s.CredentialsFile}, []string{}
	})
	if err != nil {
		t.Fatal(err)
	}
	return profile.Credentials
}

func newClient(t *testing.T, s *awskms.Server, c aws.Credentials) *kms.Client {
	t.Helper()
	return kms.New(kms.Options{Region: awskms.Region, BaseEndpoint: &s.Address, Retryer: aws.NopRetryer{},
		Credentials: credentials.StaticCredentialsProvider{Value: c}, HTTPClient: httpClient(t, s)})
}

func httpClient(t *testing.T, s *awskms.Server) *http.Client {
	t.Helper()
	pem, err := os.ReadFile(s.CAFile)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

func wantCode(t *testing.T, what string, err error, want string) {
	t.Helper()
	var answer smithy.APIError
	if !errors.As(err, &answer) || answer.ErrorCode() != want {
		t.Errorf("%s: got %v, want code %s", what, err, want)
	}
}
