package kms_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"cloud.google.com/go/kms/apiv1/kmspb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/certs"
	"github.com/keycustody/custodian/client"
	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/custodian/custodiantest"
	"github.com/keycustody/custodian/internal/audit"
	"github.com/keycustody/custodian/internal/rpc"
	"github.com/keycustody/custodian/kms"
	"github.com/keycustody/custodian/store"
	"github.com/keycustody/custodian/testservers/awskms"
)

const (
	houseLifetime = 10 * time.Minute
	houseGrace    = time.Hour
	houseDeadline = time.Second // of a call to the KMS
)

// A house is a custody whose KEKs are wrapped by a site's provider, and which
// callers ask over mutual TLS. All of it but the token is real. Its clock is
// the site's.
type house struct {
	t    *testing.T
	dir  string
	site *site
	st   *store.Store
	log  *audit.Log
	c    *custodian.Custodian

	officer, packager, provider *client.Client
	spki                        [32]byte
	keys                        map[string][]byte // that were issued, by KID
}

func newHouse(t *testing.T, s *site) *house {
	t.Helper()
	h := &house{t: t, dir: t.TempDir(), site: s, keys: map[string][]byte{}}
	ca, err := certs.OpenAuthority(filepath.Join(h.dir, "pki"), "media.test")
	h.must(err)
	server, err := ca.IssueServer([]string{"localhost"}, []net.IP{net.IPv4(127, 0, 0, 1)}, time.Hour)
	h.must(err)
	trust, err := certs.NewServer(certs.ServerOptions{CertFile: server.CertFile, KeyFile: server.KeyFile, CAs: []certs.CA{{Name: "clients",
		File: ca.CertFile(), TrustDomain: "media.test", Roles: []string{"officer", "packager", "drm-provider"}}}})
	h.must(err)
	officer, err := ca.IssueClient("/officer", time.Hour)
	h.must(err)
	pair, err := tls.LoadX509KeyPair(officer.CertFile, officer.KeyFile)
	h.must(err)
	h.spki = sha256.Sum256(pair.Leaf.RawSubjectPublicKeyInfo)
	policy, err := custodian.NewPolicy([]custodian.Grant{
		{Identity: "spiffe://media.test/officer", Role: custodian.RoleOfficer, AllCategories: true, SPKI: &h.spki},
		{Identity: "spiffe://media.test/packager", Role: custodian.RolePackager, AllCategories: true},
		{Identity: "spiffe://media.test/provider", Role: custodian.RoleProvider, AllCategories: true},
	})
	h.must(err)
	h.open(policy)

	front, err := rpc.NewServer(rpc.Config{Certs: trust, Log: slog.New(slog.DiscardHandler), RetrieveDeadline: 20 * time.Second})
	h.must(err)
	front.SetCustody(h.c)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	h.must(err)
	ctx, stop := context.WithCancel(t.Context())
	var serving sync.WaitGroup
	serving.Go(func() { front.Serve(ctx, l, 5*time.Second) })
	t.Cleanup(func() { stop(); serving.Wait(); h.close() })
	dial := func(certFile, keyFile string) *client.Client {
		cl, err := client.Dial(t.Context(), client.Config{Address: l.Addr().String(), ServerName: "localhost", CAFile: ca.CertFile(),
			CertFile: certFile, KeyFile: keyFile, Attempts: 1})
		h.must(err)
		t.Cleanup(func() { cl.Close() })
		return cl
	}
	h.officer = dial(officer.CertFile, officer.KeyFile)
	for _, who := range []struct {
		name string
		cl   **client.Client
	}{{"/packager", &h.packager}, {"/provider", &h.provider}} {
		pair, err := ca.IssueClient(who.name, time.Hour)
		h.must(err)
		*who.cl = dial(pair.CertFile, pair.KeyFile)
	}
	return h
}

func (h *house) must(err error) {
	h.t.Helper()
	if err != nil {
		h.t.Fatal(err)
	}
}

// open makes the custody: the helper keys are local's, so that what is broken
// breaks callbacks and not the records' MACs.
func (h *house) open(policy *custodian.Policy) {
	var err error
	h.st, err = store.Create(h.t.Context(), filepath.Join(h.dir, "store.db"), store.Options{})
	h.must(err)
	h.log, err = audit.Create(filepath.Join(h.dir, "audit"), audit.Options{})
	h.must(err)
	local := open(h.t, kms.Config{Name: "local", Kind: kms.KindLocal})
	cfg := custodian.Config{Store: h.st, HSM: custodiantest.NewHSM(), Providers: []custodian.Provider{local, h.site.p}, DefaultProviders: []string{"local"},
		Audit: h.log, Policy: policy, Now: h.site.clock.Now, LabelPrefix: "mek", KEKLifetime: houseLifetime,
		KMS: custodian.KMSLimits{Deadline: houseDeadline, Grace: houseGrace, BreakerPause: time.Millisecond, Patience: 10 * time.Second}}
	h.must(custodian.Init(h.t.Context(), cfg, custodian.InitSpec{}))
	h.must(h.log.Close())
	var logged custodian.Logged
	h.log, err = audit.Open(filepath.Join(h.dir, "audit"), audit.Options{Visit: logged.Visit})
	h.must(err)
	cfg.Audit, cfg.Logged = h.log, logged
	h.c, err = custodian.Open(h.t.Context(), cfg)
	h.must(err)
}

func (h *house) close() {
	h.c.Close()
	h.log.Close()
	h.st.Close()
}

func (h *house) createCategory(name string) error {
	_, err := h.officer.CreateCategory(h.t.Context(), &v1.CreateCategoryRequest{Name: name, Providers: []string{"outer"}})
	return err
}

// issue makes a key in a category.
func (h *house) issue(category, content string) (kid []byte, err error) {
	res, err := h.packager.IssueContentKeys(h.t.Context(), &v1.IssueContentKeysRequest{Category: category, ContentId: []byte(content),
		Keys: []*v1.ContentKeySpec{{TrackType: "SD", Scheme: "cenc"}}})
	if err != nil {
		return nil, err
	}
	kid = res.Keys[0].Key.Kid
	h.keys[string(kid)] = bytes.Clone(res.Keys[0].Key.GetKey())
	return kid, nil
}

// A served is how a callback ends: with the key, perhaps on grace, or refused.
type served struct {
	reason string
	grace  bool
}

var (
	good        = served{}
	onGrace     = served{grace: true}
	unavailable = served{reason: "KMS_UNAVAILABLE"}
	corrupt     = served{reason: "RECORD_CORRUPT"}
)

// callback makes one, and checks that code and RetryInfo belong to the reason,
// that the key is the one that was issued, and that the audit log says the
// same in one entry.
func (h *house) callback(what string, kid []byte) served {
	t := h.t
	t.Helper()
	from, left := h.log.Size(), time.Duration(0)
	res, err := h.provider.GetContentKeys(client.WithGrace(t.Context(), &left), &v1.GetContentKeysRequest{Kids: [][]byte{kid}})
	got := served{reason: client.ReasonOf(err), grace: left > 0}
	var e *client.Error
	switch {
	case err == nil && !bytes.Equal(res.Results[0].GetKey().GetKey(), h.keys[string(kid)]):
		t.Errorf("%s: another key comes back than was issued", what)
	case err == nil:
	case !errors.As(err, &e):
		t.Fatalf("%s: %v", what, err)
	case got == unavailable && (e.Code != codes.Unavailable || e.Retry <= 0), got == corrupt && (e.Code != codes.DataLoss || e.Retry != 0):
		t.Errorf("%s: got code %s and RetryInfo %s with %s", what, e.Code, e.Retry, e.Reason)
	}
	var entries []audit.Entry
	h.must(audit.Read(filepath.Join(h.dir, "audit"), from, func(e *audit.Entry) error { entries = append(entries, *e); return nil }))
	outcome, marked := audit.Allowed, ""
	if err != nil {
		outcome = audit.Failed
	}
	if got.grace {
		marked = fmt.Sprintf("kms grace: %d s left", int(left.Seconds()))
	}
	if len(entries) != 1 || entries[0].Action != "release" || entries[0].Outcome != outcome || entries[0].Reason != got.reason ||
		entries[0].Detail != marked || !bytes.Equal(entries[0].KID, kid) {
		t.Errorf("%s: got %+v, and the audit log says %+v", what, got, entries)
	}
	return got
}

func (h *house) want(what string, kid []byte, want served) {
	h.t.Helper()
	if got := h.callback(what, kid); got != want {
		h.t.Errorf("%s: got %+v, want %+v", what, got, want)
	}
}

// settle calls until the key comes back, for 15 s: after a mend gRPC and the
// login wait a moment, a restart is never needed.
func (h *house) settle(what string, kid []byte) {
	h.t.Helper()
	for limit := time.Now().Add(15 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		got := h.callback(what, kid)
		if got == good {
			return
		}
		if time.Now().After(limit) {
			h.t.Fatalf("%s: got %+v, want the key without a restart", what, got)
		}
		h.site.clock.Add(time.Second) // pauses of logins and throttles
	}
}

// What a callback answers on each bad day of each KMS, with the vendor's own
// client in front of it and a caller who calls over mutual TLS: while the KEK is
// loaded and its lifetime is over, when the grace is over too, and when a new KEK
// is wanted. Then the KMS is mended, and all is as before.
func TestCallbackOnBadDays(t *testing.T) {
	outage := expected{onGrace, unavailable, "KMS_UNAVAILABLE"}
	revoked := expected{unavailable, unavailable, "KMS_UNAVAILABLE"}
	well := expected{good, good, ""}
	rows := []struct {
		day  badDay
		want expected
		// sealed Vault is an outage, a disabled key is not
		vault *expected
	}{
		{day: sealedOrDisabled, want: revoked, vault: &outage},
		{day: permissionDenied, want: revoked},
		{day: throttled, want: outage},
		{day: outOfOrder, want: outage},
		{day: hangs, want: outage},
		{day: resets, want: outage},
		{day: slow, want: well},
		{day: garbage, want: outage},
		{day: anothersAnswer, want: expected{corrupt, corrupt, "KMS_UNAVAILABLE"}},
		{day: failsAfter, want: outage},
		{day: hangsAfter, want: outage},
		{day: credentialsExpired, want: well},
		{day: loginRefused, want: outage},
	}
	for _, kind := range sites {
		t.Run(kind.kind, func(t *testing.T) {
			t.Parallel() // what hangs waits, and takes no processor
			h := newHouse(t, kind.make(t))
			h.must(h.createCategory("movies"))
			h.must(h.createCategory("series"))
			kid, err := h.issue("movies", "film")
			h.must(err)
			other, err := h.issue("series", "pilot")
			h.must(err)
			for i, row := range rows {
				want := row.want
				if kind.kind == kms.KindVault && row.vault != nil {
					want = *row.vault
				}
				h.badDay(row.day, fmt.Sprintf("new-%d", i), kid, other, want)
			}
			h.wantWhole()
		})
	}
}

// An expected bad day: a callback with a loaded KEK, one when the grace is
// over, and the reason that a new KEK is refused with.
type expected struct {
	warm, over served
	made       string
}

func (h *house) badDay(day badDay, category string, kid, other []byte, want expected) {
	t := h.t
	t.Helper()
	s := h.site
	harm, mend := s.harm[day], s.mend[day]
	if harm == nil {
		t.Fatalf("%s: the site has no way to break so", day)
	}
	if mend == nil {
		mend = s.unbreak
	}
	mended := false
	defer func() {
		if !mended {
			mend()
		}
	}()
	s.clock.Add(houseLifetime)
	harm()
	if day == anothersAnswer {
		h.want(string(day)+": whose answer is repeated", other, good)
	}
	h.want(string(day)+": with a loaded KEK", kid, want.warm)
	h.want(string(day)+": and again", kid, want.warm)
	s.clock.Add(houseGrace)
	h.c.TickKMS()
	h.want(string(day)+": when the grace is over", kid, want.over)
	st, err := h.c.Snapshot(t.Context())
	h.must(err)
	if p := st.Providers[1]; (p.LoginRefused != "") != (day == loginRefused) || (p.Refused != "") != (want.warm == unavailable) {
		t.Errorf("%s: the status says refused %q, and login refused %q", day, p.Refused, p.LoginRefused)
	}
	if err := h.createCategory(category); client.ReasonOf(err) != want.made || (err != nil) != (want.made != "") {
		t.Errorf("%s: a new KEK: got %v, want %q", day, err, want.made)
	}
	mend()
	mended = true
	s.pass()
	h.settle(string(day)+": mended", kid)
	if want.made != "" { // nothing half-made is in the way
		h.must(h.createCategory(category))
	}
	if _, err := h.issue(category, "film of "+category); err != nil {
		t.Errorf("%s: issue under the new KEK: %v", day, err)
	}
}

// wantWhole retrieves all that was issued, and checks store and audit log.
func (h *house) wantWhole() {
	h.t.Helper()
	h.site.clock.Add(houseLifetime)
	for kid := range h.keys {
		h.want("at the end", []byte(kid), good)
	}
	h.must(h.st.Check(h.t.Context()))
	if _, err := audit.Verify(h.t.Context(), filepath.Join(h.dir, "audit"), audit.VerifyOptions{}); err != nil {
		h.t.Error(err)
	}
}

// After a KMS has rotated its own key, the wraps are made anew in it, or where
// it has no call for that, by opening and wrapping. Then nothing needs the
// version before.
func TestReencrypt(t *testing.T) {
	for _, kind := range sites {
		t.Run(kind.kind, func(t *testing.T) {
			s := kind.make(t)
			h := newHouse(t, s)
			h.must(h.createCategory("movies"))
			kid, err := h.issue("movies", "film")
			h.must(err)
			ctx, stop := context.WithCancel(t.Context())
			var running sync.WaitGroup
			running.Go(func() { h.c.RunRewraps(ctx) })
			t.Cleanup(func() { stop(); running.Wait() })
			before := h.wraps("movies")
			s.rotate()
			if _, err := h.officer.Reencrypt(t.Context(), &v1.ReencryptRequest{Category: "movies", Cause: "yearly"}); err != nil {
				t.Fatal(err)
			}
			for limit := time.Now().Add(15 * time.Second); ; time.Sleep(5 * time.Millisecond) {
				jobs, err := h.officer.ListRewraps(t.Context())
				h.must(err)
				if len(jobs) == 0 {
					break
				}
				if time.Now().After(limit) {
					t.Fatalf("the job does not end: %v", jobs)
				}
			}
			for i, after := range h.wraps("movies") {
				if bytes.Equal(after, before[i]) {
					t.Errorf("wrap %d is the old one", i)
				}
				if kind.kind == kms.KindAWS && awskms.Material(after) != awskms.Material(before[i])+1 {
					t.Errorf("wrap %d is under material %d, want the newest", i, awskms.Material(after))
				}
			}
			if s.retire != nil {
				s.retire()
			}
			h.wantWhole()
			h.want("under the newest version", kid, good)
		})
	}
}

// wraps are the blobs of a category's KEKs.
func (h *house) wraps(category string) (blobs [][]byte) {
	h.t.Helper()
	keks, err := h.c.KeyVersions(h.t.Context(), custodian.Caller{ID: "spiffe://media.test/officer", Roles: []custodian.Role{custodian.RoleOfficer}, SPKI: h.spki}, custodian.CategoryName(category))
	h.must(err)
	for _, k := range keks {
		blobs = append(blobs, k.Wrapped.Outer[0].Blob)
	}
	return blobs
}

// A repeater lets the first request to decrypt through, and then has each
// answered as the first was: a KMS, or what stands before it, that confuses
// records.
func repeater() behaviour {
	var mu sync.Mutex
	var first *http.Request
	var body []byte
	return func(w http.ResponseWriter, r *http.Request, next http.HandlerFunc) {
		if !strings.Contains(r.URL.Path, "/decrypt/") && !strings.HasSuffix(r.Header.Get("X-Amz-Target"), ".Decrypt") {
			next(w, r)
			return
		}
		mu.Lock()
		defer mu.Unlock()
		if first == nil {
			var err error
			if body, err = io.ReadAll(r.Body); err != nil {
				return
			}
			first = r.Clone(context.WithoutCancel(r.Context()))
		}
		again := first.Clone(r.Context())
		again.Body = io.NopCloser(bytes.NewReader(body))
		next(w, again)
	}
}

// gcpRepeater is a repeater for Google's protocol.
func gcpRepeater() func(context.Context, any, grpc.UnaryHandler) (any, error) {
	var mu sync.Mutex
	var first *kmspb.DecryptRequest
	return func(ctx context.Context, in any, next grpc.UnaryHandler) (any, error) {
		request, ok := in.(*kmspb.DecryptRequest)
		if !ok {
			return next(ctx, in)
		}
		mu.Lock()
		defer mu.Unlock()
		if first == nil {
			first = proto.CloneOf(request)
		}
		return next(ctx, proto.CloneOf(first))
	}
}
