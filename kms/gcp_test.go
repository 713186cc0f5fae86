package kms_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
	"time"

	"cloud.google.com/go/kms/apiv1/kmspb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/custodian/custodiantest"
	"github.com/keycustody/custodian/kms"
	"github.com/keycustody/custodian/testservers/gcpkms"
)

// A gcpBed is a server that speaks as Cloud KMS does, a key, and a provider
// that uses it through Google's own client.
type gcpBed struct {
	server *gcpkms.Server
	key    string
	clock  *clock
	config kms.Config
	p      custodian.Provider
}

func gcpBedOn(t *testing.T, server *gcpkms.Server) *gcpBed {
	t.Helper()
	b := &gcpBed{server: server, clock: &clock{now: time.Now()}}
	b.key = server.CreateKey(fmt.Sprintf("key-%08x", rand.Uint32()))
	b.config = kms.Config{Name: "outer", Kind: kms.KindGCP, Now: b.clock.Now, GCP: kms.GCPConfig{
		Key: b.key, Endpoint: server.Address, CAFile: server.CAFile, CredentialsFile: server.CredentialsFile, Timeout: 20 * time.Second,
	}}
	b.p = open(t, b.config)
	return b
}

func newGCPBed(t *testing.T) *gcpBed {
	t.Helper()
	return gcpBedOn(t, gcpkms.Start(t))
}

func TestGCP(t *testing.T) {
	server := gcpkms.Start(t)
	custodiantest.TestProvider(t, func(t *testing.T) custodian.Provider { return gcpBedOn(t, server).p })
}

// An emulator on this machine is spoken to without TLS and without a login.
func TestGCPEmulator(t *testing.T) {
	b := newGCPBed(t)
	b.config.GCP.Endpoint, b.config.GCP.CAFile, b.config.GCP.CredentialsFile = b.server.Emulator, "", ""
	b.config.GCP.InsecureLoopback = true
	before := b.server.Logins()
	b.p = open(t, b.config)
	wantOpens(t, "at an emulator", b.p, wrapWith(t, b.p))
	if got := b.server.Logins(); got != before {
		t.Errorf("logins for an emulator: got %d, want none", got-before)
	}
}

func TestGCPRotation(t *testing.T) {
	b := newGCPBed(t)
	w := wrapWith(t, b.p)
	b.server.RotateKey(b.key)
	wantOpens(t, "after the rotation", b.p, w)
	moved := wrapWith(t, b.p)
	b.server.SetState(b.key, 1, kmspb.CryptoKeyVersion_DESTROY_SCHEDULED)
	_, err := b.p.Unwrap(t.Context(), w, context1)
	wantOnly(t, "open under a version that is about to be destroyed", err, custodian.ErrProviderDisabled)
	wantOpens(t, "under the new version", b.p, moved)
}

// Each direction has its checksums.
func TestGCPChecksums(t *testing.T) {
	b := newGCPBed(t)
	w := wrapWith(t, b.p)
	encrypts := func(change func(*kmspb.EncryptResponse)) gcpkms.Handler {
		return func(ctx context.Context, in any, next grpc.UnaryHandler) (any, error) {
			out, err := next(ctx, in)
			if made, ok := out.(*kmspb.EncryptResponse); ok && err == nil {
				change(made)
			}
			return out, err
		}
	}
	for _, test := range []struct {
		name   string
		breaks gcpkms.Handler
		want   error
		says   string
	}{
		{"a bit flips on the way to Google", func(ctx context.Context, in any, next grpc.UnaryHandler) (any, error) {
			if request, ok := in.(*kmspb.EncryptRequest); ok {
				request.Plaintext[0] ^= 1
			}
			return next(ctx, in)
		}, custodian.ErrProviderUnavailable, "checksum in field plaintext_crc32c"},
		{"a bit of the context flips", func(ctx context.Context, in any, next grpc.UnaryHandler) (any, error) {
			if request, ok := in.(*kmspb.EncryptRequest); ok {
				request.AdditionalAuthenticatedData[0] ^= 1
			}
			return next(ctx, in)
		}, custodian.ErrProviderUnavailable, "checksum in field additional"},
		{"a checksum of the request is lost", func(ctx context.Context, in any, next grpc.UnaryHandler) (any, error) {
			if request, ok := in.(*kmspb.EncryptRequest); ok {
				request.PlaintextCrc32C = nil
			}
			return next(ctx, in)
		}, custodian.ErrProviderUnavailable, "not verified the CRC32C"},
		{"the context's checksum is lost", func(ctx context.Context, in any, next grpc.UnaryHandler) (any, error) {
			if request, ok := in.(*kmspb.EncryptRequest); ok {
				request.AdditionalAuthenticatedDataCrc32C = nil
			}
			return next(ctx, in)
		}, custodian.ErrProviderUnavailable, "not verified the CRC32C"},
		{"a bit of the answer flips", encrypts(func(made *kmspb.EncryptResponse) { made.Ciphertext[40] ^= 1 }), custodian.ErrProviderUnavailable, "CRC32C of the answer"},
		{"the answer has no checksum", encrypts(func(made *kmspb.EncryptResponse) { made.CiphertextCrc32C = nil }), custodian.ErrProviderUnavailable, "CRC32C of the answer"},
		{"the answer is empty", encrypts(func(made *kmspb.EncryptResponse) {
			made.Ciphertext, made.CiphertextCrc32C = nil, gcpkms.CRC32C(nil)
		}), custodian.ErrProviderUnavailable, "CRC32C of the answer"},
	} {
		b.server.Break(test.breaks)
		_, err := b.p.Wrap(t.Context(), inner, context1)
		wantOnly(t, "wrap when "+test.name, err, test.want)
		if err != nil && !strings.Contains(err.Error(), test.says) {
			t.Errorf("wrap when %s: got %q, want it to say %q", test.name, err, test.says)
		}
	}

	for _, test := range []struct {
		name   string
		breaks gcpkms.Handler
		says   string
	}{
		{"a bit flips on the way to Google", func(ctx context.Context, in any, next grpc.UnaryHandler) (any, error) {
			in.(*kmspb.DecryptRequest).Ciphertext[40] ^= 1
			return next(ctx, in)
		}, "checksum in field ciphertext_crc32c"},
		{"a bit of the answer flips", func(ctx context.Context, in any, next grpc.UnaryHandler) (any, error) {
			out, err := next(ctx, in)
			if err == nil {
				out.(*kmspb.DecryptResponse).Plaintext[0] ^= 1
			}
			return out, err
		}, "CRC32C of the answer"},
		{"the answer has no checksum", func(ctx context.Context, in any, next grpc.UnaryHandler) (any, error) {
			out, err := next(ctx, in)
			if err == nil {
				out.(*kmspb.DecryptResponse).PlaintextCrc32C = nil
			}
			return out, err
		}, "CRC32C of the answer"},
	} {
		b.server.Break(test.breaks)
		_, err := b.p.Unwrap(t.Context(), w, context1)
		wantOnly(t, "open when "+test.name, err, custodian.ErrProviderUnavailable)
		if err != nil && !strings.Contains(err.Error(), test.says) {
			t.Errorf("open when %s: got %q, want it to say %q", test.name, err, test.says)
		}
	}
	b.server.Break(nil)
	wantOpens(t, "afterwards", b.p, w)
}

// gcpFails answers with a status.
func gcpFails(code codes.Code, text string) gcpkms.Handler {
	return func(context.Context, any, grpc.UnaryHandler) (any, error) { return nil, status.Error(code, text) }
}

// Each code of Google falls into one of the errors of a provider.
func TestGCPErrors(t *testing.T) {
	b := newGCPBed(t)
	w := wrapWith(t, b.p)
	for _, test := range []struct {
		code codes.Code
		text string
		want error
	}{
		{codes.ResourceExhausted, "Quota exceeded", custodian.ErrProviderThrottled},
		{codes.PermissionDenied, "Permission denied", custodian.ErrProviderDenied},
		{codes.PermissionDenied, "unexpected HTTP status code received from server: 403 (Forbidden)", custodian.ErrProviderUnavailable},
		{codes.FailedPrecondition, "is not enabled, current state is: DISABLED.", custodian.ErrProviderDisabled},
		{codes.NotFound, "CryptoKey not found.", custodian.ErrProviderDisabled},
		{codes.InvalidArgument, "Decryption failed", custodian.ErrProviderBlob},
		{codes.InvalidArgument, "The checksum in field ciphertext_crc32c did not match", custodian.ErrProviderUnavailable},
		{codes.Unauthenticated, "invalid authentication credentials", custodian.ErrProviderUnavailable},
		{codes.Unavailable, "try again", custodian.ErrProviderUnavailable},
		{codes.Internal, "", custodian.ErrProviderUnavailable},
		{codes.DeadlineExceeded, "", custodian.ErrProviderUnavailable},
		{codes.Unknown, "", custodian.ErrProviderUnavailable},
		{codes.Unimplemented, "", custodian.ErrProviderUnavailable},
		{codes.Aborted, "", custodian.ErrProviderUnavailable},
	} {
		b.server.Break(gcpFails(test.code, test.text))
		b.clock.Add(time.Minute)
		before := b.server.Requests()
		_, err := b.p.Unwrap(t.Context(), w, context1)
		wantOnly(t, fmt.Sprintf("%s %q", test.code, test.text), err, test.want)
		if _, passedOn := status.FromError(err); passedOn {
			t.Errorf("%s: Google's status is in the tree of %v", test.code, err)
		}
		if got := b.server.Requests() - before; got > 2 {
			t.Errorf("%s: got %d requests for one call, want one, and one after a login", test.code, got)
		}
	}
	b.server.Break(nil)
	b.clock.Add(time.Minute)
	wantOpens(t, "afterwards", b.p, w)
}

// A token that is refused, or near its end, is replaced; and no storm of
// logins comes of one that cannot be.
func TestGCPTokens(t *testing.T) {
	b := newGCPBed(t)
	w := wrapWith(t, b.p)
	logins := func(when string, want int) {
		t.Helper()
		if got := b.server.Logins(); got != want {
			t.Errorf("logins %s: got %d, want %d", when, got, want)
		}
	}
	logins("of the first call", 1)
	b.server.Revoke()
	wantOpens(t, "after the token was revoked", b.p, w)
	logins("after the token was revoked", 2)

	b.clock.Add(30 * time.Minute)
	wantOpens(t, "in the middle of the token's life", b.p, w)
	logins("in the middle of the token's life", 2)
	b.clock.Add(15 * time.Minute)
	wantOpens(t, "near its end", b.p, w)
	logins("near its end", 3)

	b.server.Revoke()
	b.server.RefuseLogins(true)
	for range 20 {
		_, err := b.p.Unwrap(t.Context(), w, context1)
		wantOnly(t, "open when the login is refused", err, custodian.ErrProviderUnavailable)
		if err != nil && !strings.Contains(err.Error(), "refuses our login") {
			t.Errorf("open when the login is refused: got %q, want it to say so", err)
		}
	}
	logins("in 20 calls when the login is refused", 4)
	b.server.RefuseLogins(false)
	b.clock.Add(time.Minute)
	wantOpens(t, "when logins work again", b.p, w)
}

// Without a credentials file Google's application default credentials decide
// who calls.
func TestGCPDefaultCredentials(t *testing.T) {
	b := newGCPBed(t)
	t.Setenv("GOOGLE_APPLICATION_CREDENTIALS", b.server.CredentialsFile)
	b.config.GCP.CredentialsFile = ""
	b.p = open(t, b.config)
	wantOpens(t, "with the default credentials", b.p, wrapWith(t, b.p))
}

func TestGCPServerOfAnotherCA(t *testing.T) {
	b := newGCPBed(t)
	b.config.GCP.CAFile = gcpkms.Start(t).CAFile
	b.p = open(t, b.config)
	_, err := b.p.Wrap(t.Context(), inner, context1)
	wantOnly(t, "wrap at a server of another CA", err, custodian.ErrProviderUnavailable)
}

func TestGCPCallerGivesUp(t *testing.T) {
	b := newGCPBed(t)
	w := wrapWith(t, b.p)
	b.server.Break(gcpHangs)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	_, err := b.p.Unwrap(ctx, w, context1)
	wantOnly(t, "open while Google hangs", err, custodian.ErrProviderUnavailable)
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("open while Google hangs: got %v, want %v in it", err, context.DeadlineExceeded)
	}
	b.server.Break(nil)
	wantOpens(t, "afterwards", b.p, w)
}

func gcpHangs(ctx context.Context, _ any, _ grpc.UnaryHandler) (any, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

func TestGCPErrorsShowNoSecrets(t *testing.T) {
	b := newGCPBed(t)
	var tokens []string
	w := wrapWith(t, b.p)
	file, err := os.ReadFile(b.server.CredentialsFile)
	if err != nil {
		t.Fatal(err)
	}
	tokens = append(tokens, b.server.Tokens()...)
	if len(tokens) == 0 || len(file) == 0 {
		t.Fatal("there is no token to look for")
	}
	b.server.RefuseLogins(true)
	for _, h := range []gcpkms.Handler{gcpFails(codes.Internal, ""), gcpFails(codes.PermissionDenied, ""), gcpFails(codes.Unauthenticated, "")} {
		b.server.Break(h)
		_, err := b.p.Unwrap(t.Context(), w, context1)
		if err == nil {
			t.Fatal("open while broken: got no error")
		}
		for _, token := range tokens {
			if strings.Contains(err.Error(), token) || strings.Contains(b.p.Status().LastError, token) {
				t.Error("an error shows a token")
			}
		}
		if strings.Contains(err.Error(), "PRIVATE KEY") {
			t.Error("an error shows the credentials file")
		}
	}
}
