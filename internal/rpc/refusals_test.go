package rpc_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/certs"
	"github.com/keycustody/custodian/client"
	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/audit"
	"github.com/keycustody/custodian/internal/rpc"
)

type rpcConfig = rpc.Config

// counter is the sum of a metric over its labels, of those that have the values
// named.
func (k *kit) counter(t *testing.T, name string, values ...string) float64 {
	t.Helper()
	families, err := k.metrics.Gather()
	if err != nil {
		t.Fatal(err)
	}
	sum := 0.0
	for _, f := range families {
		if f.GetName() == name {
			for _, m := range f.GetMetric() {
				var has []string
				for _, l := range m.GetLabel() {
					has = append(has, l.GetValue())
				}
				if !slices.ContainsFunc(values, func(v string) bool { return !slices.Contains(has, v) }) {
					sum += m.GetCounter().GetValue()
				}
			}
		}
	}
	return sum
}

func TestBadInput(t *testing.T) {
	k := newKit(t, options{})
	k.createCategory(t, "movies")
	k.createCategory(t, "frozen")
	existing := k.issue(t, "clip", "HD")[0]
	pack, callback, boss, audits := k.dial(t, packager), k.dial(t, everybody), k.dial(t, officer), k.dial(t, auditor)

	kid := func(b byte) []byte { return bytes.Repeat([]byte{b}, 16) }
	var many [][]byte
	for i := range byte(65) {
		many = append(many, kid(i+1))
	}
	get := func(r *v1.GetContentKeysRequest) func(context.Context) error {
		return func(ctx context.Context) error { _, err := callback.GetContentKeys(ctx, r); return err }
	}
	issue := func(change func(*v1.IssueContentKeysRequest)) func(context.Context) error {
		r := &v1.IssueContentKeysRequest{Category: "movies", ContentId: []byte("other"), Keys: []*v1.ContentKeySpec{{TrackType: "HD", Scheme: "cenc"}}}
		change(r)
		return func(ctx context.Context) error { _, err := pack.IssueContentKeys(ctx, r); return err }
	}
	create := func(r *v1.CreateCategoryRequest) func(context.Context) error {
		return func(ctx context.Context) error { _, err := boss.CreateCategory(ctx, r); return err }
	}
	list := func(r *v1.ListContentKeysRequest) func(context.Context) error {
		return func(ctx context.Context) error { _, err := audits.ListContentKeys(ctx, r); return err }
	}
	tests := []struct {
		name   string
		call   func(context.Context) error
		code   codes.Code
		reason custodian.Reason
		field  string
	}{
		{"no KID", get(&v1.GetContentKeysRequest{}), codes.InvalidArgument, "INVALID", "kids"},
		{"65 KIDs", get(&v1.GetContentKeysRequest{Kids: many}), codes.InvalidArgument, "INVALID", "kids"},
		{"a KID of 15 bytes", get(&v1.GetContentKeysRequest{Kids: [][]byte{kid(1), kid(2)[:15]}}), codes.InvalidArgument, "INVALID", "kids[1]"},
		{"a KID of 17 bytes", get(&v1.GetContentKeysRequest{Kids: [][]byte{append(kid(1), 1)}}), codes.InvalidArgument, "INVALID", "kids[0]"},
		{"the zero KID", get(&v1.GetContentKeysRequest{Kids: [][]byte{kid(0)}}), codes.InvalidArgument, "INVALID", "kids[0]"},
		{"a KID twice", get(&v1.GetContentKeysRequest{Kids: [][]byte{kid(1), kid(2), kid(1)}}), codes.InvalidArgument, "INVALID", "kids[2]"},
		{"retrieve: a content ID of 301 bytes", get(&v1.GetContentKeysRequest{Kids: [][]byte{kid(1)}, ContentId: make([]byte, 301)}), codes.InvalidArgument, "INVALID", "content_id"},
		{"a request ID of 129 characters", get(&v1.GetContentKeysRequest{RequestId: strings.Repeat("x", 129), Kids: [][]byte{kid(1)}}), codes.InvalidArgument, "INVALID", "request_id"},
		{"a request ID with a line break", get(&v1.GetContentKeysRequest{RequestId: "a\nb", Kids: [][]byte{kid(1)}}), codes.InvalidArgument, "INVALID", "request_id"},
		{"an empty content ID", issue(func(r *v1.IssueContentKeysRequest) { r.ContentId = nil }), codes.InvalidArgument, "INVALID", "content_id"},
		{"a content ID of 301 bytes", issue(func(r *v1.IssueContentKeysRequest) { r.ContentId = make([]byte, 301) }), codes.InvalidArgument, "INVALID", "content_id"},
		{"no key", issue(func(r *v1.IssueContentKeysRequest) { r.Keys = nil }), codes.InvalidArgument, "INVALID", "keys"},
		{"601 keys", issue(func(r *v1.IssueContentKeysRequest) { r.Keys = make601() }), codes.InvalidArgument, "INVALID", "keys"},
		{"an unknown scheme", issue(func(r *v1.IssueContentKeysRequest) { r.Keys[0].Scheme = "cbcx" }), codes.InvalidArgument, "INVALID", "keys[0].scheme"},
		{"no track type", issue(func(r *v1.IssueContentKeysRequest) { r.Keys[0].TrackType = "" }), codes.InvalidArgument, "INVALID", "keys[0].track_type"},
		{"issue: a KID of 15 bytes", issue(func(r *v1.IssueContentKeysRequest) { r.Keys[0].Kid = kid(1)[:15] }), codes.InvalidArgument, "INVALID", "keys[0].kid"},
		{"one key twice", issue(func(r *v1.IssueContentKeysRequest) { r.Keys = append(r.Keys, r.Keys[0]) }), codes.InvalidArgument, "INVALID", "keys[1].track_type"},
		{"a period start out of range", issue(func(r *v1.IssueContentKeysRequest) {
			r.Keys[0].Period = &v1.Period{StartTime: &timestamppb.Timestamp{Nanos: -1}}
		}), codes.InvalidArgument, "INVALID", "keys[0].period.start_time"},
		{"a category that cannot be", issue(func(r *v1.IssueContentKeysRequest) { r.Category = "No Such" }), codes.InvalidArgument, "INVALID", "category"},
		{"a category of others", issue(func(r *v1.IssueContentKeysRequest) { r.Category = "series" }), codes.PermissionDenied, "DENIED", ""},
		{"content of another category", issue(func(r *v1.IssueContentKeysRequest) { r.Category, r.ContentId = "frozen", []byte("clip") }), codes.AlreadyExists, "CONTENT_CATEGORY", ""},
		{"a KID of other content", issue(func(r *v1.IssueContentKeysRequest) { r.Keys[0].Kid = existing.GetKid() }), codes.AlreadyExists, "KID_CONFLICT", ""},
		{"a category that exists", create(&v1.CreateCategoryRequest{Name: "movies"}), codes.AlreadyExists, "CATEGORY_EXISTS", ""},
		{"a bad category name", create(&v1.CreateCategoryRequest{Name: "Movies!"}), codes.InvalidArgument, "INVALID", "name"},
		{"an unknown provider", create(&v1.CreateCategoryRequest{Name: "new", Providers: []string{"vault"}}), codes.InvalidArgument, "INVALID", "providers[0]"},
		{"a negative window", create(&v1.CreateCategoryRequest{Name: "new", ReissueWindow: durationpb.New(-time.Hour)}), codes.InvalidArgument, "INVALID", "reissue_window"},
		{"a mode that is none", func(ctx context.Context) error {
			_, err := boss.SetCategoryMode(ctx, &v1.SetCategoryModeRequest{Category: "movies"})
			return err
		}, codes.InvalidArgument, "INVALID", "mode"},
		{"the mode of an unknown category", func(ctx context.Context) error {
			_, err := boss.SetCategoryMode(ctx, &v1.SetCategoryModeRequest{Category: "series", Mode: v1.CategoryMode_CATEGORY_MODE_FROZEN})
			return err
		}, codes.NotFound, "CATEGORY_NOT_FOUND", ""},
		{"a page of 1001", list(&v1.ListContentKeysRequest{Category: "movies", PageSize: 1001}), codes.InvalidArgument, "INVALID", "page_size"},
		{"a page token of nobody", list(&v1.ListContentKeysRequest{Category: "movies", PageToken: "!"}), codes.InvalidArgument, "INVALID", "page_token"},
		{"a list of an unknown category", list(&v1.ListContentKeysRequest{Category: "series"}), codes.NotFound, "CATEGORY_NOT_FOUND", ""},
		{"metadata of an unknown KID", func(ctx context.Context) error { _, err := audits.DescribeContentKey(ctx, kid(7)); return err }, codes.NotFound, "KEY_NOT_FOUND", ""},
		{"metadata of a KID of 15 bytes", func(ctx context.Context) error { _, err := audits.DescribeContentKey(ctx, kid(7)[:15]); return err }, codes.InvalidArgument, "INVALID", "kid"},
		{"a ceremony that cannot be", func(ctx context.Context) error {
			_, err := boss.ExecuteCeremony(ctx, &v1.ExecuteCeremonyRequest{Id: "x"})
			return err
		}, codes.InvalidArgument, "INVALID", "id"},
		{"a rotation that there is not", func(ctx context.Context) error {
			_, err := boss.RetireRotation(ctx, &v1.RetireRotationRequest{Name: "kek/movies/9"})
			return err
		}, codes.InvalidArgument, "INVALID", "name"},
		{"a revocation of nothing", func(ctx context.Context) error {
			_, err := boss.Revoke(ctx, &v1.RevokeRequest{Cause: "drill"})
			return err
		}, codes.InvalidArgument, "INVALID", "session_id"},
		{"an entry that the log does not have", func(ctx context.Context) error {
			_, err := audits.GetInclusionProof(ctx, &v1.GetInclusionProofRequest{Index: 1 << 40})
			return err
		}, codes.InvalidArgument, "INVALID", "index"},
		{"a backup for nobody", func(ctx context.Context) error {
			return k.dial(t, operator).Backup(ctx, &v1.BackupRequest{}, io.Discard)
		}, codes.InvalidArgument, "INVALID", "recipient"},
		{"the wrong role", func(ctx context.Context) error {
			_, err := pack.GetContentKeys(ctx, &v1.GetContentKeysRequest{Kids: [][]byte{existing.GetKid()}})
			return err
		}, codes.PermissionDenied, "DENIED", ""},
	}
	before := k.contentKeys(t)
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			from := len(k.entries(t))
			e := wantRefused(t, test.call(t.Context()), test.reason)
			written := slices.DeleteFunc(k.entries(t)[from:], func(e audit.Entry) bool { return e.Reason != "INVALID" })
			if test.reason == "INVALID" && len(written) != 1 {
				t.Errorf("audit log: got %+v, want one entry with INVALID", written)
			}
			if e.Code != test.code {
				t.Errorf("code: got %v, want %v", e.Code, test.code)
			}
			if e.Field != test.field {
				t.Errorf("field: got %q (%s), want %q", e.Field, e.Message, test.field)
			}
			if e.RequestID == "" && e.Field != "request_id" {
				t.Error("request ID: got none")
			}
			if e.Retry != 0 {
				t.Errorf("retry: got %v, want none", e.Retry)
			}
		})
	}
	if got := k.contentKeys(t); got != before {
		t.Errorf("content keys after all refusals: got %d, want %d", got, before)
	}
	if got := k.core.Arena().InUse(); got != 0 {
		t.Errorf("keys in clear after all refusals: got %d, want 0", got)
	}
}

func make601() []*v1.ContentKeySpec {
	specs := make([]*v1.ContentKeySpec, 601)
	for i := range specs {
		specs[i] = &v1.ContentKeySpec{TrackType: "HD", Scheme: "cenc", Period: &v1.Period{Index: uint32(i)}}
	}
	return specs
}

func (k *kit) contentKeys(t *testing.T) uint64 {
	t.Helper()
	s, err := k.core.Snapshot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return s.Store.ContentKeys
}

// rawCodec sends bytes as they are.
type rawCodec struct{}

func (rawCodec) Name() string { return "proto" }

func (rawCodec) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(*v.(*[]byte))}, nil
}

func (rawCodec) Unmarshal(b mem.BufferSlice, v any) error {
	*v.(*[]byte) = b.Materialize()
	return nil
}

// raw calls GetContentKeys with bytes of the test's own.
func (k *kit) raw(t *testing.T, who string, request []byte) error {
	t.Helper()
	return rawCall(t, k.conn(t, who), v1.KeyRetrievalService_GetContentKeys_FullMethodName, request)
}

func rawCall(t *testing.T, conn *grpc.ClientConn, fullMethod string, request []byte) error {
	var reply []byte
	return conn.Invoke(t.Context(), fullMethod, &request, &reply, grpc.ForceCodecV2(rawCodec{}))
}

// TestMalformedMessages sends to every method of the contract what is no message,
// and a message that is too large: each is refused, counted, and one denial in the
// audit log with the caller and what the call would have come to.
func TestMalformedMessages(t *testing.T) {
	k := newKit(t, options{audit: func(o *audit.Options) { o.DenialsPerSecond = 1000 }})
	conn, from := k.conn(t, stranger), len(k.entries(t))
	var methods []string
	protoregistry.GlobalFiles.RangeFilesByPackage("custodian.v1", func(f protoreflect.FileDescriptor) bool {
		for i := range f.Services().Len() {
			service := f.Services().Get(i)
			for j := range service.Methods().Len() {
				methods = append(methods, string(service.Name())+"/"+string(service.Methods().Get(j).Name()))
			}
		}
		return true
	})
	if len(methods) < 40 {
		t.Errorf("%d methods: these are not all", len(methods))
	}
	for _, method := range methods {
		st := status.Convert(rawCall(t, conn, "/custodian.v1."+method, []byte{0xff, 0xff, 0xff}))
		if info, _ := details(t, st); st.Code() != codes.InvalidArgument || info.GetReason() != "INVALID" {
			t.Errorf("%s: not a message: got %v with reason %q, want %v with INVALID", method, st, info.GetReason(), codes.InvalidArgument)
		}
		err := rawCall(t, conn, "/custodian.v1."+method, make([]byte, rpc.MaxRequestSize+1))
		if got, want := status.Code(err), codes.ResourceExhausted; got != want {
			t.Errorf("%s: a message of more than 1 MiB: got %v, want %v", method, err, want)
		}
	}
	if err := k.stop(); err != nil { // of what is too large the caller hears before it is written down
		t.Error(err)
	}
	written := map[string]int{}
	for _, e := range k.entries(t)[from:] {
		method, why, _ := strings.Cut(e.Detail, ": message: ")
		if e.Outcome != audit.Denied || e.Reason != "INVALID" || e.Caller != identity(stranger) || e.Action == "" || why == "" {
			t.Errorf("the audit log has %+v", e)
		}
		written[method]++
	}
	for _, method := range methods {
		if n, counted := written[method], k.counter(t, "custodian_calls_total", method, "INVALID"); n != 2 || counted != 2 {
			t.Errorf("%s: %d entries in the audit log and %v calls counted, want 2 of each", method, n, counted)
		}
	}
}

func TestCertificates(t *testing.T) {
	k := newKit(t, options{})
	k.createCategory(t, "movies")
	otherCA, err := certs.OpenAuthority(t.TempDir(), trustDomain)
	if err != nil {
		t.Fatal(err)
	}
	spiffe := func(path string) *url.URL { return &url.URL{Scheme: "spiffe", Host: trustDomain, Path: "/" + path} }
	tests := []struct {
		name   string
		ca     *certs.Authority
		change func(*x509.Certificate)
	}{
		{"no identity", k.ca, func(*x509.Certificate) {}},
		{"a common name only", k.ca, func(c *x509.Certificate) { c.Subject.CommonName = identity(provider) }},
		{"two identities", k.ca, func(c *x509.Certificate) { c.URIs = []*url.URL{spiffe(provider), spiffe(officer)} }},
		{"another CA", otherCA, func(c *x509.Certificate) { c.URIs = []*url.URL{spiffe(provider)} }},
		{"another trust domain", k.ca, func(c *x509.Certificate) {
			c.URIs = []*url.URL{{Scheme: "spiffe", Host: "other.test", Path: "/" + provider}}
		}},
		{"for servers only", k.ca, func(c *x509.Certificate) {
			c.URIs, c.ExtKeyUsage = []*url.URL{spiffe(provider)}, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		}},
		{"expired", k.ca, func(c *x509.Certificate) {
			c.URIs, c.NotBefore, c.NotAfter = []*url.URL{spiffe(provider)}, time.Now().Add(-time.Hour), time.Now().Add(-time.Minute)
		}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			certPEM, keyPEM, err := test.ca.Issue(test.change)
			if err != nil {
				t.Fatal(err)
			}
			pair, err := tls.X509KeyPair(certPEM, keyPEM)
			if err != nil {
				t.Fatal(err)
			}
			// Not package client: it would refuse some of these by itself.
			err = k.callWith(t, &tls.Config{Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS13})
			if got, want := status.Code(err), codes.Unavailable; got != want {
				t.Errorf("got %v, want no connection (%v)", err, want)
			}
		})
	}
	t.Run("no certificate", func(t *testing.T) {
		if err := k.callWith(t, &tls.Config{MinVersion: tls.VersionTLS13}); status.Code(err) != codes.Unavailable {
			t.Errorf("got %v, want no connection", err)
		}
	})
	t.Run("TLS 1.2", func(t *testing.T) {
		c, err := k.config(provider)
		if err != nil {
			t.Fatal(err)
		}
		pair, err := tls.LoadX509KeyPair(c.CertFile, c.KeyFile)
		if err != nil {
			t.Fatal(err)
		}
		if err := k.callWith(t, &tls.Config{Certificates: []tls.Certificate{pair}, MaxVersion: tls.VersionTLS12}); status.Code(err) != codes.Unavailable {
			t.Errorf("got %v, want no connection", err)
		}
		// The same certificate is good otherwise.
		if err := k.callWith(t, &tls.Config{Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS13}); status.Code(err) != codes.PermissionDenied {
			t.Errorf("with TLS 1.3: got %v, want the daemon's answer", err)
		}
	})
}

// callWith calls GetContentKeys under a TLS configuration of the test's own.
func (k *kit) callWith(t *testing.T, c *tls.Config) error {
	t.Helper()
	roots := x509.NewCertPool()
	ca, err := os.ReadFile(k.ca.CertFile())
	if err != nil {
		t.Fatal(err)
	}
	roots.AppendCertsFromPEM(ca)
	c.RootCAs, c.ServerName = roots, "localhost"
	conn, err := grpc.NewClient(k.addr, grpc.WithTransportCredentials(credentials.NewTLS(c)))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_, err = v1.NewKeyRetrievalServiceClient(conn).GetContentKeys(t.Context(), &v1.GetContentKeysRequest{Kids: [][]byte{bytes.Repeat([]byte{1}, 16)}})
	return err
}

// TestRoleOfAnotherCA: a grant is worth nothing where the CA may not vouch for
// its role.
func TestRoleOfAnotherCA(t *testing.T) {
	k := newKit(t, options{roles: []string{"drm-provider"}})
	_, err := k.dial(t, officer).CreateCategory(t.Context(), &v1.CreateCategoryRequest{Name: "movies"})
	if got := wantRefused(t, err, "DENIED").Message; got != "not granted" {
		t.Errorf("message: got %q, want %q", got, "not granted")
	}
}

func TestRevokedWhileConnected(t *testing.T) {
	k := newKit(t, options{})
	k.createCategory(t, "movies")
	kid := k.issue(t, "clip", "HD")[0].GetKid()
	callback := k.dial(t, provider)
	get := &v1.GetContentKeysRequest{Kids: [][]byte{kid}}
	if _, err := callback.GetContentKeys(t.Context(), get); err != nil {
		t.Fatal(err)
	}
	k.revoke(t, provider)
	_, err := callback.GetContentKeys(t.Context(), get)
	if got := wantRefused(t, err, "IDENTITY").Code; got != codes.Unauthenticated {
		t.Errorf("code: got %v, want %v", got, codes.Unauthenticated)
	}
	if got := k.log.String(); !strings.Contains(got, "revoked") {
		t.Errorf("log: got %q, want it to say why", got)
	}
}

func TestBeforeService(t *testing.T) {
	t.Parallel() // it waits, and takes little of the CPUs
	k := newKit(t, options{starting: true})
	get := &v1.GetContentKeysRequest{Kids: [][]byte{bytes.Repeat([]byte{1}, 16)}}
	callback, ops := k.dial(t, provider), k.dial(t, operator)
	tests := []struct {
		err   error
		state v1.ServingState
	}{
		{custodian.ErrStarting, v1.ServingState_SERVING_STATE_STARTING},
		{custodian.ErrUninitialised, v1.ServingState_SERVING_STATE_UNINITIALISED},
		{custodian.ErrSealed, v1.ServingState_SERVING_STATE_SEALED},
	}
	admin := httptest.NewServer(k.server.AdminHandler(k.metrics))
	defer admin.Close()
	for i, test := range tests {
		reason := custodian.ReasonOf(test.err)
		t.Run(string(reason), func(t *testing.T) {
			if i > 0 { // it begins by itself with STARTING
				k.server.SetUnavailable(test.err)
			}
			_, err := callback.GetContentKeys(t.Context(), get)
			e := wantRefused(t, err, reason)
			if e.Code != codes.Unavailable || e.Retry <= 0 {
				t.Errorf("got %v with retry %v, want %v with one", e.Code, e.Retry, codes.Unavailable)
			}
			st, err := ops.Status(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if got := st.GetState(); got != test.state {
				t.Errorf("state: got %v, want %v", got, test.state)
			}
			_, err = callback.Status(t.Context())
			wantRefused(t, err, "DENIED")
			if ready, err := callback.Ready(t.Context()); err != nil || ready {
				t.Errorf("ready: got %v, %v; want false", ready, err)
			}
			wantHTTP(t, admin.URL+"/livez", http.StatusOK, "ok")
			wantHTTP(t, admin.URL+"/readyz", http.StatusServiceUnavailable, string(reason))
		})
	}
	k.server.SetCustody(k.core)
	if ready, err := callback.Ready(t.Context()); err != nil || !ready {
		t.Errorf("ready at last: got %v, %v; want true", ready, err)
	}
	wantHTTP(t, admin.URL+"/readyz", http.StatusOK, "ok")
	_, err := callback.GetContentKeys(t.Context(), get)
	wantRefused(t, err, "DENIED")

	k.hsm.Fail("Health", custodian.ErrHSMUnavailable, 1000)
	for limit := time.Now().Add(5 * time.Second); time.Now().Before(limit); time.Sleep(50 * time.Millisecond) {
		if ready, err := callback.Ready(t.Context()); err != nil || !ready {
			break // what was said before is good for a second
		}
	}
	wantHTTP(t, admin.URL+"/readyz", http.StatusServiceUnavailable, "HSM_UNAVAILABLE")
	wantHTTP(t, admin.URL+"/livez", http.StatusOK, "ok")
	wantHTTP(t, admin.URL+"/metrics", http.StatusOK, `custodian_calls_total{method="KeyRetrievalService/GetContentKeys",reason="DENIED"} 1`)
	wantHTTP(t, admin.URL+"/metrics", http.StatusOK, `custodian_peer_cert_end_timestamp_seconds{caller="spiffe://`)
}

func wantHTTP(t *testing.T, address string, code int, text string) {
	t.Helper()
	resp, err := http.Get(address)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode != code || !strings.Contains(string(body), text) {
		t.Errorf("%s: got %d %.200q, want %d with %q", address, resp.StatusCode, body, code, text)
	}
}

// slowFile is an audit file whose disk takes its time.
type slowFile struct {
	audit.File
	wait func()
}

func (f slowFile) Sync() error {
	f.wait()
	return f.File.Sync()
}

// blockable makes the next sync of the audit log wait for the channel that is
// sent.
func blockable(block <-chan chan struct{}) func(*audit.Options) {
	return func(o *audit.Options) {
		o.WrapFile = func(f audit.File) audit.File {
			return slowFile{f, func() {
				select {
				case until := <-block:
					<-until
				default:
				}
			}}
		}
	}
}

// TestDrain: a call that is under way when the daemon is told to stop gets its
// answer, and a new one does not.
func TestDrain(t *testing.T) {
	block := make(chan chan struct{}, 1)
	k := newKit(t, options{config: func(c *rpcConfig) { c.RetrieveDeadline = time.Minute }, audit: blockable(block)})
	k.createCategory(t, "movies")
	get := &v1.GetContentKeysRequest{Kids: [][]byte{k.issue(t, "clip", "HD")[0].GetKid()}}
	callback := k.dial(t, provider)
	until := make(chan struct{})
	block <- until
	answer := make(chan error, 1)
	go func() { _, err := callback.GetContentKeys(t.Context(), get); answer <- err }()
	for len(block) > 0 { // until the call waits for the disk
		time.Sleep(time.Millisecond)
	}
	stopped := make(chan error, 1)
	go func() { stopped <- k.stop() }()
	c, err := k.config(provider)
	if err != nil {
		t.Fatal(err)
	}
	refused := false
	for deadline := time.Now().Add(5 * time.Second); !refused && time.Now().Before(deadline); {
		late, err := client.Dial(t.Context(), c)
		if refused = err != nil; !refused {
			late.Close()
		}
	}
	if !refused {
		t.Error("a new caller is still served")
	}
	select {
	case err := <-stopped:
		t.Fatalf("the server stopped with a call under way: %v", err)
	default:
	}
	close(until)
	if err := <-answer; err != nil {
		t.Errorf("the call under way: got %v, want the key", err)
	}
	if err := <-stopped; err != nil {
		t.Errorf("stop: %v", err)
	}
}

func TestDeadline(t *testing.T) {
	block := make(chan chan struct{}, 1)
	k := newKit(t, options{config: func(c *rpcConfig) { c.RetrieveDeadline = 50 * time.Millisecond }, audit: blockable(block)})
	k.createCategory(t, "movies")
	kid := k.issue(t, "clip", "HD")[0].GetKid()
	callback := k.dial(t, provider)
	until := make(chan struct{})
	block <- until
	start := time.Now()
	_, err := callback.GetContentKeys(t.Context(), &v1.GetContentKeysRequest{Kids: [][]byte{kid}})
	if got := wantRefused(t, err, "DEADLINE").Code; got != codes.DeadlineExceeded {
		t.Errorf("code: got %v, want %v", got, codes.DeadlineExceeded)
	}
	if took := time.Since(start); took > 2*time.Second {
		t.Errorf("took %v, want about 50 ms", took)
	}
	// A client with attempts to spare tries once more, and no third time.
	before := k.counter(t, "custodian_calls_total")
	_, err = k.dialAttempts(t, provider, 4).GetContentKeys(t.Context(), &v1.GetContentKeysRequest{Kids: [][]byte{kid}})
	wantRefused(t, err, "DEADLINE")
	if got, want := k.counter(t, "custodian_calls_total")-before, 3.0; got != want { // one is Dial's
		t.Errorf("calls: got %v, want %v", got, want)
	}
	close(until)
	// A disk may take longer than this deadline by itself.
	limit := time.Now().Add(10 * time.Second)
	for {
		_, err := callback.GetContentKeys(t.Context(), &v1.GetContentKeysRequest{Kids: [][]byte{kid}})
		if err == nil {
			break
		}
		if wantRefused(t, err, "DEADLINE"); time.Now().After(limit) {
			t.Fatalf("afterwards: got %v, want the key", err)
		}
	}
	for k.core.Arena().InUse() > 0 { // of calls that nobody waits for any more
		if time.Now().After(limit) {
			t.Fatalf("keys in clear: got %d, want 0", k.core.Arena().InUse())
		}
		time.Sleep(time.Millisecond)
	}
}

func TestClientRetries(t *testing.T) {
	t.Parallel() // it waits, and takes little of the CPUs
	k := newKit(t, options{})
	k.createCategory(t, "movies")
	kid := k.issue(t, "clip", "HD")[0].GetKid()
	get := &v1.GetContentKeysRequest{Kids: [][]byte{kid}}
	twice := k.dialAttempts(t, provider, 2)
	calls := func() float64 { return k.counter(t, "custodian_calls_total") }

	k.hsm.Fail("Open", custodian.ErrHSMUnavailable, 1)
	start, before := time.Now(), calls()
	if _, err := twice.GetContentKeys(t.Context(), get); err != nil {
		t.Errorf("HSM away for one call: got %v, want the key", err)
	}
	if took := time.Since(start); took < 2*time.Second {
		t.Errorf("waited %v, want the 2 s of RetryInfo", took)
	}
	if got, want := calls()-before, 2.0; got != want {
		t.Errorf("calls: got %v, want %v", got, want)
	}

	// The wait would outlast the caller's deadline: the answer comes at once.
	k.hsm.Fail("Open", custodian.ErrHSMUnavailable, 1)
	ctx, cancel := context.WithTimeout(t.Context(), 1900*time.Millisecond)
	defer cancel()
	start = time.Now()
	_, err := twice.GetContentKeys(ctx, get)
	if e := wantRefused(t, err, "HSM_UNAVAILABLE"); e.Retry != 2*time.Second {
		t.Errorf("retry: got %v, want 2s", e.Retry)
	}
	if took := time.Since(start); took > 1800*time.Millisecond {
		t.Errorf("took %v, want no wait", took)
	}

	// Refusals that no retry mends are made once.
	before = calls()
	_, err = twice.GetContentKeys(t.Context(), &v1.GetContentKeysRequest{Kids: [][]byte{bytes.Repeat([]byte{7}, 16)}})
	wantRefused(t, err, "DENIED")
	if got, want := calls()-before, 1.0; got != want {
		t.Errorf("calls after DENIED: got %v, want %v", got, want)
	}
}

// TestClientOutlastsARestart: calls that find nobody there come back.
func TestClientOutlastsARestart(t *testing.T) {
	t.Parallel() // it waits, and takes little of the CPUs
	k := newKit(t, options{})
	k.createCategory(t, "movies")
	key := k.issue(t, "clip", "HD")[0]
	get := &v1.GetContentKeysRequest{Kids: [][]byte{key.GetKid()}}
	patient, hasty := k.dialAttempts(t, provider, 6), k.dial(t, provider)
	if err := k.stop(); err != nil {
		t.Fatal(err)
	}
	_, err := hasty.GetContentKeys(t.Context(), get)
	if e := wantRefused(t, err, ""); e.Code != codes.Unavailable {
		t.Errorf("nobody there: got %v, want %v", e.Code, codes.Unavailable)
	}
	got := make(chan error, 1)
	go func() {
		resp, err := patient.GetContentKeys(t.Context(), get)
		if err == nil && !bytes.Equal(resp.GetResults()[0].GetKey().GetKey(), key.GetKey()) {
			err = errors.New("it is another key")
		}
		got <- err
	}()
	time.Sleep(150 * time.Millisecond)
	if err := k.restart(context.WithoutCancel(t.Context())); err != nil {
		t.Fatal(err)
	}
	if err := <-got; err != nil {
		t.Errorf("after the restart: got %v, want the key", err)
	}
}

func TestDial(t *testing.T) {
	k := newKit(t, options{})
	good, err := k.config(provider)
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name    string
		change  func(*client.Config)
		want    string
		refused bool // by the daemon or on the way there: a *client.Error
	}{
		{"nobody listens", func(c *client.Config) { c.Address = "127.0.0.1:1" }, "connection refused", true},
		{"another name", func(c *client.Config) { c.ServerName = "vault.test" }, "vault.test", true},
		{"no certificate", func(c *client.Config) { c.CertFile = filepath.Join(k.dir, "none.pem") }, "none.pem", false},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			c := good
			test.change(&c)
			cl, err := client.Dial(t.Context(), c)
			if err == nil {
				cl.Close()
				t.Fatal("got a client, want an error")
			}
			if !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want it to name %q", err, test.want)
			}
			if _, refused := errors.AsType[*client.Error](err); refused != test.refused {
				t.Errorf("a *client.Error: got %v, want %v", refused, test.refused)
			}
		})
	}
}
