package kms_test

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"

	"cloud.google.com/go/kms/apiv1/kmspb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/kms"
	"github.com/keycustody/custodian/testservers"
	"github.com/keycustody/custodian/testservers/awskms"
	"github.com/keycustody/custodian/testservers/gcpkms"
)

// A badDay is what can go wrong with a KMS, or on the way to it.
type badDay string

const (
	sealedOrDisabled   badDay = "sealed or disabled"
	permissionDenied   badDay = "permission denied"
	throttled          badDay = "throttled"
	outOfOrder         badDay = "5xx"
	hangs              badDay = "hangs"
	slow               badDay = "slow"
	resets             badDay = "connection reset"
	garbage            badDay = "answers garbage"
	failsAfter         badDay = "fails after having done it"
	hangsAfter         badDay = "hangs after having done it"
	credentialsExpired badDay = "credentials expired"
	loginRefused       badDay = "login refused"
	// The KMS answers what it should answer to another record's blob.
	anothersAnswer badDay = "answers another record's blob"
)

// A site is a provider with its KMS, and the ways to break and mend it. What
// harm makes, a mend without a row of its own ends by unbreak.
type site struct {
	p     custodian.Provider
	clock *clock
	pass  func() // lets any wait before the next login pass
	harm  map[badDay]func()
	mend  map[badDay]func()
	// unbreak has the KMS answer by itself again.
	unbreak func()
	// rotate gives its key a newer version; retire closes the one before, or is
	// nil where nobody can.
	rotate, retire func()
}

// sites are all providers with an outer layer.
var sites = []struct {
	kind string
	make func(t *testing.T) *site
}{
	{kms.KindVault, vaultSite},
	{kms.KindAWS, awsSite},
	{kms.KindGCP, gcpSite},
}

// Each row breaks each KMS and says what a call answers. The blob from before
// opens when the KMS is mended, with the provider that is open.
func TestBadDays(t *testing.T) {
	rows := []struct {
		day  badDay
		want error // what a call answers; nil: it succeeds
		// sealed Vault is an outage, a disabled key is not
		vault error
	}{
		{day: sealedOrDisabled, want: custodian.ErrProviderDisabled, vault: custodian.ErrProviderUnavailable},
		{day: permissionDenied, want: custodian.ErrProviderDenied},
		{day: throttled, want: custodian.ErrProviderThrottled},
		{day: outOfOrder, want: custodian.ErrProviderUnavailable},
		{day: hangs, want: custodian.ErrProviderUnavailable},
		{day: slow},
		{day: resets, want: custodian.ErrProviderUnavailable},
		{day: garbage, want: custodian.ErrProviderUnavailable},
		{day: failsAfter, want: custodian.ErrProviderUnavailable},
		{day: hangsAfter, want: custodian.ErrProviderUnavailable},
		{day: credentialsExpired},
		{day: loginRefused, want: custodian.ErrProviderUnavailable},
	}
	for _, kind := range sites {
		t.Run(kind.kind, func(t *testing.T) {
			s := kind.make(t)
			w := wrapWith(t, s.p)
			for _, row := range rows {
				want := row.want
				if kind.kind == kms.KindVault && row.vault != nil {
					want = row.vault
				}
				t.Run(string(row.day), func(t *testing.T) { s.wantBadDay(t, row.day, w, want) })
			}
		})
	}
}

func (s *site) wantBadDay(t *testing.T, day badDay, w custodian.OuterWrap, want error) {
	harm := s.harm[day]
	if harm == nil {
		t.Fatalf("%s: the site has no way to break so", day)
	}
	mend := s.mend[day]
	if mend == nil {
		mend = s.unbreak
	}
	harm()
	mended := false
	defer func() {
		if !mended {
			mend()
		}
	}()
	before := s.p.Status()
	patience := 20 * time.Second
	if day == hangs || day == hangsAfter {
		patience = 300 * time.Millisecond
	}
	try := func(what string, call func(context.Context) error) {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		began := time.Now()
		err := call(ctx)
		if want == nil && err != nil {
			t.Errorf("%s: %v", what, err)
			return
		}
		if want != nil {
			wantOnly(t, what, err, want)
		}
		if got := errors.Is(err, custodian.ErrProviderLogin); got != (day == loginRefused) {
			t.Errorf("%s: got %v, told as a refused login: %v", what, err, got)
		}
		// The server ends the call at the same deadline, and may be a little early.
		if took := time.Since(began); patience < time.Second && took < patience*8/10 {
			t.Errorf("%s: got %v after %s, before the caller's %s were up", what, err, took, patience)
		}
	}
	try("open", func(ctx context.Context) error { _, err := s.p.Unwrap(ctx, w, context1); return err })
	try("wrap", func(ctx context.Context) error { _, err := s.p.Wrap(ctx, inner, context1); return err })
	s.wantStatus(t, before, want)

	mend()
	mended = true
	s.wantMended(t, w)
}

// wantStatus compares the status with what two calls should have made of it.
func (s *site) wantStatus(t *testing.T, before custodian.ProviderStatus, want error) {
	t.Helper()
	after := s.p.Status()
	failures := before.Failures
	if want != nil {
		failures += 2
	}
	if after.Calls != before.Calls+2 || after.Failures != failures {
		t.Errorf("status: got %d calls and %d failures, want %d and %d", after.Calls, after.Failures, before.Calls+2, failures)
	}
	if reachable := !errors.Is(want, custodian.ErrProviderUnavailable); after.Reachable != reachable {
		t.Errorf("status: got reachable %v, want %v", after.Reachable, reachable)
	}
}

// wantMended opens w and wraps anew. gRPC waits a moment before it connects
// again, so the first calls may still fail; a restart is never needed.
func (s *site) wantMended(t *testing.T, w custodian.OuterWrap) {
	t.Helper()
	s.pass()
	for deadline := time.Now().Add(15 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		_, err := s.p.Unwrap(t.Context(), w, context1)
		if err == nil || time.Now().After(deadline) {
			break
		}
	}
	wantOpens(t, "after it was mended", s.p, w)
	wantOpens(t, "what is wrapped after it was mended", s.p, wrapWith(t, s.p))
	if status := s.p.Status(); !status.Reachable || status.LastError != "" {
		t.Errorf("status after it was mended: got %+v", status)
	}
}

// The status shows when a login is renewed: after two thirds of its life.
func TestRenewalIsShown(t *testing.T) {
	for _, kind := range sites {
		t.Run(kind.kind, func(t *testing.T) {
			s := kind.make(t)
			wrapWith(t, s.p)
			got, now := s.p.Status(), s.clock.Now()
			if kind.kind == kms.KindAWS { // these credentials have no end
				if !got.NextRenewal.IsZero() || !got.LoginEnd.IsZero() {
					t.Errorf("got a renewal at %s and an end at %s, want none", got.NextRenewal, got.LoginEnd)
				}
				return
			}
			life := got.LoginEnd.Sub(now)
			if renewal := got.NextRenewal.Sub(now); life <= 0 || renewal < life*6/10 || renewal > life*7/10 {
				t.Errorf("got a renewal in %s and an end in %s, want it at two thirds", renewal, life)
			}
		})
	}
}

// A blob that answers for another record opens for none.
func TestAnotherRecordsBlob(t *testing.T) {
	for _, kind := range sites {
		t.Run(kind.kind, func(t *testing.T) {
			s := kind.make(t)
			w := wrapWith(t, s.p)
			before := s.p.Status().Calls
			_, err := s.p.Unwrap(t.Context(), w, context2)
			wantOnly(t, "open another record's blob", err, custodian.ErrProviderBlob)
			status := s.p.Status()
			if !status.Reachable || status.Calls != before+1 || !strings.Contains(status.LastError, "refuses the blob") {
				t.Errorf("status: got %+v, want contact, and the refusal", status)
			}
			wantOpens(t, "with its own context", s.p, w)
		})
	}
}

// slowly answers late, and well.
func slowly(w http.ResponseWriter, r *http.Request, next http.HandlerFunc) {
	time.Sleep(100 * time.Millisecond)
	next(w, r)
}

func vaultSite(t *testing.T) *site {
	b := bedOn(t, testservers.Vault(t))
	breaks := func(h behaviour) func() { return func() { b.proxy.set(h) } }
	refuse := only(logins, answer(400, `{"errors":["invalid role or secret ID"]}`))
	return &site{
		p: b.p, clock: b.clock, pass: b.pass, unbreak: breaks(forward), rotate: func() { b.vault.RotateTransitKey(b.key) },
		retire: func() { b.write(t, "transit/keys/"+b.key+"/config", map[string]any{"min_decryption_version": 2}) },
		harm: map[badDay]func(){
			sealedOrDisabled:   b.vault.Seal,
			permissionDenied:   func() { b.vault.WritePolicy(b.key, policy(b.key, "rewrap")) },
			throttled:          breaks(answer(429, `{"errors":["request path \"transit\": rate limit quota exceeded"]}`)),
			outOfOrder:         breaks(answer(500, `{"errors":["internal error"]}`)),
			hangs:              breaks(hang),
			slow:               breaks(slowly),
			resets:             breaks(reset),
			garbage:            breaks(answer(200, "\x00\x01 garbage")),
			failsAfter:         breaks(resetAfter),
			hangsAfter:         breaks(hangAfter),
			credentialsExpired: func() { b.revoke(t) },
			loginRefused:       func() { b.revoke(t); b.proxy.set(refuse) },
			anothersAnswer:     func() { b.proxy.set(repeater()) },
		},
		mend: map[badDay]func(){sealedOrDisabled: b.vault.Unseal, permissionDenied: b.allow},
	}
}

func awsSite(t *testing.T) *site {
	b := newAWSBed(t)
	breaks := func(h behaviour) func() { return func() { b.server.Break(awskms.Handler(h)) } }
	return &site{
		p: b.p, clock: b.clock, pass: func() { b.clock.Add(time.Minute) }, unbreak: func() { b.server.Break(nil) },
		rotate: func() { b.server.RotateKey(b.key) },
		harm: map[badDay]func(){
			sealedOrDisabled:   func() { b.server.SetState(b.key, awskms.Disabled) },
			permissionDenied:   func() { b.server.Deny("Encrypt", "Decrypt", "ReEncrypt") },
			throttled:          func() { b.server.Break(awskms.Fail(400, "ThrottlingException", "Rate exceeded")) },
			outOfOrder:         func() { b.server.Break(awskms.Fail(500, "KMSInternalException", "")) },
			hangs:              breaks(hang),
			slow:               breaks(slowly),
			resets:             breaks(reset),
			garbage:            breaks(answer(200, "\x00\x01 garbage")),
			failsAfter:         breaks(resetAfter),
			hangsAfter:         breaks(hangAfter),
			credentialsExpired: func() { b.server.Expire(); b.server.NewCredentials() },
			loginRefused:       b.server.Expire,
			anothersAnswer:     func() { b.server.Break(awskms.Handler(repeater())) },
		},
		mend: map[badDay]func(){
			sealedOrDisabled: func() { b.server.SetState(b.key, awskms.Enabled) },
			permissionDenied: func() { b.server.Deny() },
			loginRefused:     func() { b.server.NewCredentials() },
		},
	}
}

func gcpSite(t *testing.T) *site {
	b := newGCPBed(t)
	breaks := func(h gcpkms.Handler) func() { return func() { b.server.Break(h) } }
	return &site{
		p: b.p, clock: b.clock, pass: func() { b.clock.Add(time.Minute) }, unbreak: breaks(nil),
		rotate: func() { b.server.RotateKey(b.key) }, retire: func() { b.server.SetState(b.key, 1, kmspb.CryptoKeyVersion_DESTROY_SCHEDULED) },
		harm: map[badDay]func(){
			sealedOrDisabled: func() { b.server.SetState(b.key, 1, kmspb.CryptoKeyVersion_DISABLED) },
			permissionDenied: func() { b.server.Deny("Encrypt", "Decrypt") },
			throttled:        breaks(gcpFails(codes.ResourceExhausted, "Quota exceeded for quota metric 'Cryptographic requests'")),
			outOfOrder:       breaks(gcpFails(codes.Internal, "Internal error encountered.")),
			hangs:            breaks(gcpHangs),
			slow: breaks(func(ctx context.Context, in any, next grpc.UnaryHandler) (any, error) {
				time.Sleep(100 * time.Millisecond)
				return next(ctx, in)
			}),
			resets: func() { b.server.Refuse(true) },
			garbage: breaks(func(context.Context, any, grpc.UnaryHandler) (any, error) {
				return &kmspb.CryptoKey{Name: "garbage"}, nil // of another type than was asked for
			}),
			failsAfter: breaks(func(ctx context.Context, in any, next grpc.UnaryHandler) (any, error) {
				next(ctx, in)
				b.server.Cut()
				return nil, ctx.Err()
			}),
			hangsAfter: breaks(func(ctx context.Context, in any, next grpc.UnaryHandler) (any, error) {
				next(ctx, in)
				return gcpHangs(ctx, in, nil)
			}),
			credentialsExpired: b.server.Revoke,
			loginRefused:       func() { b.server.Revoke(); b.server.RefuseLogins(true) },
			anothersAnswer:     func() { b.server.Break(gcpRepeater()) },
		},
		mend: map[badDay]func(){
			sealedOrDisabled: func() { b.server.SetState(b.key, 1, kmspb.CryptoKeyVersion_ENABLED) },
			permissionDenied: func() { b.server.Deny() },
			resets:           func() { b.server.Refuse(false) },
			loginRefused:     func() { b.server.RefuseLogins(false) },
		},
	}
}
