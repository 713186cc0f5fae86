// Package gcpkms is a gRPC server that speaks the protocol of Google Cloud KMS
// as far as Encrypt and Decrypt go, with the token endpoint of Google's OAuth
// beside it, for tests that put Google's own client in front of it. It checks
// tokens, CRC32C, additional authenticated data and the states of versions as
// Google does, and breaks as a test tells it. It holds keys in memory and is
// no place for real ones.
package gcpkms

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"net"
	"slices"
	"strings"
	"sync"

	"cloud.google.com/go/kms/apiv1/kmspb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/keycustody/custodian/testservers"
)

// Ring is the key ring of all keys.
const Ring = "projects/test-project/locations/europe-west3/keyRings/custodian"

// A Handler answers one request in the server's place. It calls next to have
// the server answer it.
type Handler func(ctx context.Context, in any, next grpc.UnaryHandler) (any, error)

// A Server is one KMS with TLS, and one without TLS and without logins, as an
// emulator is; both have the same keys. Its methods may be called at any time.
type Server struct {
	Address  string // HOST:PORT, with TLS
	Emulator string // HOST:PORT, without TLS; no token is asked for
	CAFile   string // the CA of its certificate, PEM
	// CredentialsFile is the key file of a service account, mode 0600, whose
	// tokens the server gives and takes.
	CredentialsFile string

	kmspb.UnimplementedKeyManagementServiceServer

	t      testservers.TB
	oauth  *oauth
	listen *listener

	// mu guards the fields below.
	mu       sync.Mutex
	keys     map[string]*key // by name
	denied   map[string]bool // operations
	broken   Handler
	requests int
}

// A key is a symmetric one, with all of its versions; the last is the primary.
type key struct {
	id       [16]byte
	versions []*version
}

type version struct {
	aead  cipher.AEAD
	state kmspb.CryptoKeyVersion_CryptoKeyVersionState
}

// Start starts a server that ends with its test.
func Start(t testservers.TB) *Server {
	t.Helper()
	cert, caFile := testservers.Certificate(t)
	s := &Server{t: t, CAFile: caFile, keys: map[string]*key{}, denied: map[string]bool{}}
	s.oauth = startOAuth(t, cert)
	s.CredentialsFile = s.oauth.serviceAccount(t)
	s.listen = &listener{Listener: listen(t)}
	s.Address = s.listen.Addr().String()
	s.serve(s.listen, grpc.Creds(credentials.NewServerTLSFromCert(&cert)), grpc.ChainUnaryInterceptor(s.intercept, s.authenticate))
	plain := listen(t)
	s.Emulator = plain.Addr().String()
	s.serve(plain, grpc.UnaryInterceptor(s.intercept))
	return s
}

func listen(t testservers.TB) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatalf("listen: %v", err)
	}
	return l
}

func (s *Server) serve(l net.Listener, options ...grpc.ServerOption) {
	server := grpc.NewServer(options...)
	kmspb.RegisterKeyManagementServiceServer(server, s)
	done := make(chan struct{})
	go func() {
		defer close(done)
		server.Serve(l) // ends with Stop
	}()
	s.t.Cleanup(func() {
		server.Stop()
		<-done
	})
}

func (s *Server) intercept(ctx context.Context, in any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	s.mu.Lock()
	broken := s.broken
	s.requests++
	s.mu.Unlock()
	if broken != nil {
		return broken(ctx, in, next)
	}
	return next(ctx, in)
}

func (s *Server) authenticate(ctx context.Context, in any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	sent, _ := metadata.FromIncomingContext(ctx)
	for _, value := range sent.Get("authorization") {
		if token, ok := strings.CutPrefix(value, "Bearer "); ok && s.oauth.good(token) {
			return next(ctx, in)
		}
	}
	return nil, status.Error(codes.Unauthenticated, "Request had invalid authentication credentials. Expected OAuth 2 access token, login cookie or other valid authentication credential.")
}

// Break has h answer all requests; nil ends that.
func (s *Server) Break(h Handler) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.broken = h
}

// Refuse resets the connections that there are, and all that come; false ends
// that.
func (s *Server) Refuse(refuse bool) { s.listen.refuse(refuse) }

// Cut resets the connections that there are.
func (s *Server) Cut() { s.listen.cut() }

// Deny takes operations (Encrypt, Decrypt) away; without any it gives all back.
func (s *Server) Deny(operations ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.denied)
	for _, op := range operations {
		s.denied[op] = true
	}
}

// Revoke ends all tokens that were given until now.
func (s *Server) Revoke() { s.oauth.revoke() }

// RefuseLogins has the token endpoint refuse the service account.
func (s *Server) RefuseLogins(refuse bool) { s.oauth.refuse(refuse) }

// Logins is how many tokens were asked for.
func (s *Server) Logins() int { return s.oauth.count() }

// Tokens are the tokens that are good now, for a test to look for; never print
// them.
func (s *Server) Tokens() []string { return s.oauth.given() }

// Requests is how many calls there were, good or bad.
func (s *Server) Requests() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.requests
}

// CreateKey makes a key in Ring and returns its name.
func (s *Server) CreateKey(id string) string {
	k := &key{versions: []*version{s.newVersion()}}
	rand.Read(k.id[:])
	name := Ring + "/cryptoKeys/" + id
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keys[name] = k
	return name
}

// RotateKey gives a key a new primary version.
func (s *Server) RotateKey(name string) {
	made := s.newVersion()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keys[name].versions = append(s.keys[name].versions, made)
}

// SetState changes the state of version n of a key, from 1.
func (s *Server) SetState(name string, n int, state kmspb.CryptoKeyVersion_CryptoKeyVersionState) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keys[name].versions[n-1].state = state
}

func (s *Server) newVersion() *version {
	material := make([]byte, 32)
	rand.Read(material)
	block, err := aes.NewCipher(material)
	if err != nil {
		s.t.Fatalf("make a key version: %v", err)
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		s.t.Fatalf("make a key version: %v", err)
	}
	return &version{aead, kmspb.CryptoKeyVersion_ENABLED}
}

// find is the key of a name; the caller holds mu.
func (s *Server) find(op, permission, name string) (*key, error) {
	if s.denied[op] {
		return nil, status.Errorf(codes.PermissionDenied, "Permission '%s' denied on resource '%s' (or it may not exist).", permission, name)
	}
	k := s.keys[name]
	if k == nil {
		return nil, status.Errorf(codes.NotFound, "CryptoKey %s not found.", name)
	}
	return k, nil
}

func (k *key) usable(name string, n int) (*version, error) {
	v := k.versions[n-1]
	if v.state != kmspb.CryptoKeyVersion_ENABLED {
		return nil, status.Errorf(codes.FailedPrecondition, "%s/cryptoKeyVersions/%d is not enabled, current state is: %s.", name, n, v.state)
	}
	return v, nil
}

// Encrypt answers as Cloud KMS does.
func (s *Server) Encrypt(_ context.Context, in *kmspb.EncryptRequest) (*kmspb.EncryptResponse, error) {
	if n := len(in.Plaintext); n == 0 || n > 64<<10 {
		return nil, status.Error(codes.InvalidArgument, "The plaintext must be 1 to 65536 bytes.")
	}
	if err := verify("plaintext", in.Plaintext, in.PlaintextCrc32C); err != nil {
		return nil, err
	}
	if err := verify("additional_authenticated_data", in.AdditionalAuthenticatedData, in.AdditionalAuthenticatedDataCrc32C); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	k, err := s.find("Encrypt", "cloudkms.cryptoKeyVersions.useToEncrypt", in.Name)
	if err != nil {
		return nil, err
	}
	n := len(k.versions)
	v, err := k.usable(in.Name, n)
	if err != nil {
		return nil, err
	}
	blob := binary.BigEndian.AppendUint16(slices.Clone(k.id[:]), uint16(n))
	nonce := make([]byte, 12)
	rand.Read(nonce)
	sealed := v.aead.Seal(nil, nonce, in.Plaintext, append(slices.Clone(blob), in.AdditionalAuthenticatedData...))
	blob = append(append(blob, nonce...), sealed...)
	return &kmspb.EncryptResponse{
		Name: fmt.Sprintf("%s/cryptoKeyVersions/%d", in.Name, n), Ciphertext: blob, CiphertextCrc32C: CRC32C(blob),
		VerifiedPlaintextCrc32C:                   in.PlaintextCrc32C != nil,
		VerifiedAdditionalAuthenticatedDataCrc32C: in.AdditionalAuthenticatedDataCrc32C != nil,
	}, nil
}

// Decrypt answers as Cloud KMS does.
func (s *Server) Decrypt(_ context.Context, in *kmspb.DecryptRequest) (*kmspb.DecryptResponse, error) {
	if err := verify("ciphertext", in.Ciphertext, in.CiphertextCrc32C); err != nil {
		return nil, err
	}
	if err := verify("additional_authenticated_data", in.AdditionalAuthenticatedData, in.AdditionalAuthenticatedDataCrc32C); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	k, err := s.find("Decrypt", "cloudkms.cryptoKeyVersions.useToDecrypt", in.Name)
	if err != nil {
		return nil, err
	}
	const header = 16 + 2
	invalid := status.Error(codes.InvalidArgument, "Decryption failed: the ciphertext is invalid.")
	blob := in.Ciphertext
	if len(blob) < header+12+16 || k.id != [16]byte(blob[:16]) {
		return nil, invalid
	}
	n := int(binary.BigEndian.Uint16(blob[16:]))
	if n < 1 || n > len(k.versions) {
		return nil, invalid
	}
	v, err := k.usable(in.Name, n)
	if err != nil {
		return nil, err
	}
	plain, err := v.aead.Open(nil, blob[header:header+12], blob[header+12:], append(slices.Clone(blob[:header]), in.AdditionalAuthenticatedData...))
	if err != nil {
		return nil, invalid
	}
	return &kmspb.DecryptResponse{Plaintext: plain, PlaintextCrc32C: CRC32C(plain), UsedPrimary: n == len(k.versions)}, nil
}

// verify checks a checksum that came with a request.
func verify(field string, b []byte, sum *wrapperspb.Int64Value) error {
	if sum != nil && sum.Value != CRC32C(b).Value {
		return status.Errorf(codes.InvalidArgument, "The checksum in field %s_crc32c did not match the data in field %s.", field, field)
	}
	return nil
}

// CRC32C is the checksum of b as Cloud KMS sends it.
func CRC32C(b []byte) *wrapperspb.Int64Value {
	return wrapperspb.Int64(int64(crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli))))
}
