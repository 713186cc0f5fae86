package gcpkms_test

import (
	"bytes"
	"testing"

	kms "cloud.google.com/go/kms/apiv1"
	"cloud.google.com/go/kms/apiv1/kmspb"
	"google.golang.org/api/option"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/keycustody/custodian/testservers/gcpkms"
)

// Google's own client finds what it expects of Cloud KMS.
func TestServer(t *testing.T) {
	s := gcpkms.Start(t)
	key, other := s.CreateKey("movies"), s.CreateKey("series")
	client := newClient(t, s.Emulator, grpc.WithTransportCredentials(insecure.NewCredentials()))
	aad := []byte("record 1")
	made, err := client.Encrypt(t.Context(), &kmspb.EncryptRequest{Name: key, Plaintext: []byte("a KEK"), AdditionalAuthenticatedData: aad, PlaintextCrc32C: gcpkms.CRC32C([]byte("a KEK"))})
	if err != nil {
		t.Fatalf("encrypt: %v", err)
	}
	if !made.VerifiedPlaintextCrc32C || made.VerifiedAdditionalAuthenticatedDataCrc32C {
		t.Errorf("verified: got %v and %v, want that of the plaintext, which alone was sent", made.VerifiedPlaintextCrc32C, made.VerifiedAdditionalAuthenticatedDataCrc32C)
	}
	if want := key + "/cryptoKeyVersions/1"; made.Name != want {
		t.Errorf("version of the answer: got %s, want %s", made.Name, want)
	}
	decrypt := func(name string, blob, aad []byte, crc bool) (*kmspb.DecryptResponse, error) {
		in := &kmspb.DecryptRequest{Name: name, Ciphertext: blob, AdditionalAuthenticatedData: aad}
		if crc {
			in.CiphertextCrc32C = gcpkms.CRC32C([]byte("something else"))
		}
		return client.Decrypt(t.Context(), in)
	}
	out, err := decrypt(key, made.Ciphertext, aad, false)
	if err != nil || string(out.Plaintext) != "a KEK" || out.PlaintextCrc32C.GetValue() != gcpkms.CRC32C(out.Plaintext).Value {
		t.Errorf("decrypt: got %v, %v, want what was encrypted, with its checksum", out, err)
	}
	flipped := bytes.Clone(made.Ciphertext)
	flipped[len(flipped)-1] ^= 1
	for _, test := range []struct {
		name      string
		key       string
		blob, aad []byte
		crc       bool
		want      codes.Code
	}{
		{"other authenticated data", key, made.Ciphertext, []byte("record 2"), false, codes.InvalidArgument},
		{"a changed blob", key, flipped, aad, false, codes.InvalidArgument},
		{"another key", other, made.Ciphertext, aad, false, codes.InvalidArgument},
		{"an unknown key", gcpkms.Ring + "/cryptoKeys/none", made.Ciphertext, aad, false, codes.NotFound},
		{"a wrong checksum", key, made.Ciphertext, aad, true, codes.InvalidArgument},
	} {
		_, err := decrypt(test.key, test.blob, test.aad, test.crc)
		wantCode(t, "decrypt with "+test.name, err, test.want)
	}
	s.SetState(key, 1, kmspb.CryptoKeyVersion_DISABLED)
	_, err = decrypt(key, made.Ciphertext, aad, false)
	wantCode(t, "decrypt under a disabled version", err, codes.FailedPrecondition)
}

// With TLS, a call without a token that the server has given is refused.
func TestServerWantsAToken(t *testing.T) {
	s := gcpkms.Start(t)
	key := s.CreateKey("movies")
	creds, err := credentials.NewClientTLSFromFile(s.CAFile, "")
	if err != nil {
		t.Fatal(err)
	}
	client := newClient(t, s.Address, grpc.WithTransportCredentials(creds))
	_, err = client.Encrypt(t.Context(), &kmspb.EncryptRequest{Name: key, Plaintext: []byte("a KEK")})
	wantCode(t, "encrypt without a token", err, codes.Unauthenticated)
}

func newClient(t *testing.T, address string, options ...grpc.DialOption) *kms.KeyManagementClient {
	t.Helper()
	conn, err := grpc.NewClient(address, options...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	client, err := kms.NewKeyManagementClient(t.Context(), option.WithGRPCConn(conn))
	if err != nil {
		t.Fatal(err)
	}
	client.CallOptions = &kms.KeyManagementCallOptions{}
	return client
}

func wantCode(t *testing.T, what string, err error, want codes.Code) {
	t.Helper()
	if got := status.Code(err); got != want {
		t.Errorf("%s: got %v (%v), want %s", what, got, err, want)
	}
}
