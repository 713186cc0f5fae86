package rpc_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/audit"
	"github.com/keycustody/custodian/internal/rpc"
)

// serveTwin serves the HTTP twin of the kit until the test ends.
func (k *kit) serveTwin(t *testing.T) (url string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.WithoutCancel(t.Context()))
	served := make(chan error, 1)
	go func() { served <- k.server.ServeTwin(ctx, l, 5*time.Second) }()
	t.Cleanup(func() {
		stop()
		if err := <-served; err != nil {
			t.Errorf("twin: %v", err)
		}
	})
	return "https://" + l.Addr().String()
}

// browser is an HTTP client with the certificate of who.
func (k *kit) browser(t *testing.T, who string, change func(*tls.Config)) *http.Client {
	t.Helper()
	c, err := k.config(who)
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.LoadX509KeyPair(c.CertFile, c.KeyFile)
	if err != nil {
		t.Fatal(err)
	}
	ca, err := os.ReadFile(c.CAFile)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	config := &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}, ServerName: "localhost"}
	if change != nil {
		change(config)
	}
	tr := &http.Transport{TLSClientConfig: config}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}

// A twinAnswer is what the twin says.
type twinAnswer struct {
	status     int
	retryAfter string
	header     http.Header
	RequestID  string `json:"request_id"`
	Results    []struct {
		KID   string         `json:"kid"`
		Key   map[string]any `json:"key"`
		Error *twinError     `json:"error"`
	} `json:"results"`
	Error *twinError `json:"error"`
}

type twinError struct {
	Reason       string `json:"reason"`
	Message      string `json:"message"`
	Field        string `json:"field"`
	RetryAfterMS int64  `json:"retry_after_ms"`
	RequestID    string `json:"request_id"`
}

func post(t *testing.T, c *http.Client, url string, body any) twinAnswer {
	t.Helper()
	raw, ok := body.(string)
	if !ok {
		b, err := json.Marshal(body)
		if err != nil {
			t.Fatal(err)
		}
		raw = string(b)
	}
	resp, err := c.Post(url+rpc.TwinPath, "application/json", strings.NewReader(raw))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	out, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	a := twinAnswer{status: resp.StatusCode, retryAfter: resp.Header.Get("Retry-After"), header: resp.Header}
	if err := json.Unmarshal(out, &a); err != nil {
		t.Fatalf("HTTP %d: %v\n%s", resp.StatusCode, err, out)
	}
	if got := resp.Header.Get("Cache-Control"); got != "no-store" {
		t.Errorf("Cache-Control: got %q, want no-store", got)
	}
	return a
}

// TestTwin: the twin answers as gRPC does, field by field.
func TestTwin(t *testing.T) {
	k := newKit(t, options{})
	url := k.serveTwin(t)
	k.createCategory(t, "movies")
	start := time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)
	issued, err := k.core.Issue(t.Context(), custodian.Caller{ID: identity(packager), Roles: []custodian.Role{custodian.RolePackager}}, custodian.IssueRequest{
		Category: "movies", ContentID: custodian.ContentID("cl\"ip"), Keys: []custodian.KeySpec{
			{TrackType: "HD", Scheme: "cbcs"}, {TrackType: `a"<\`, Scheme: "cenc", Period: custodian.Period{Set: true, Index: 7, Start: start, End: start.Add(time.Hour)}}}})
	if err != nil {
		t.Fatal(err)
	}
	var kids []string
	raw := &v1.GetContentKeysRequest{RequestId: "same"}
	for _, key := range issued {
		kids = append(kids, key.KID.String())
		raw.Kids = append(raw.Kids, key.KID[:])
		key.Key.Destroy()
	}
	want, err := k.dial(t, everybody).GetContentKeys(t.Context(), raw)
	if err != nil {
		t.Fatal(err)
	}
	missing := "77777777-7777-4777-8777-777777777777"
	browser := k.browser(t, everybody, nil)
	a := post(t, browser, url, map[string]any{"request_id": "same", "kids": append(kids, missing)})
	if a.status != 200 || a.RequestID != "same" || len(a.Results) != 3 {
		t.Fatalf("got HTTP %d, request %q, %d results", a.status, a.RequestID, len(a.Results))
	}
	for i, r := range want.GetResults() {
		w := r.GetKey()
		b64 := base64.StdEncoding.EncodeToString
		got := a.Results[i]
		fields := map[string]any{"kid": kids[i], "key": b64(w.GetKey()), "category": "movies", "content_id_b64": b64(w.GetContentId()), "track_type": w.GetTrackType(),
			"scheme": w.GetScheme(), "generation": 1.0, "create_time": w.GetCreateTime().AsTime().Format(time.RFC3339Nano)}
		if len(w.GetIv()) > 0 {
			fields["iv"] = b64(w.GetIv())
		}
		if w.GetPeriod() != nil {
			fields["period"] = map[string]any{"index": 7.0, "start_time": start.Format(time.RFC3339Nano), "end_time": start.Add(time.Hour).Format(time.RFC3339Nano)}
		}
		receipt, _ := got.Key["receipt"].(map[string]any)
		delete(got.Key, "receipt")
		if g, w := fmt.Sprint(got.Key), fmt.Sprint(fields); g != w {
			t.Errorf("result %d: the twin's fields differ from gRPC's in %v", i, differing(got.Key, fields))
		}
		if hash, _ := receipt["leaf_hash"].(string); got.KID != kids[i] || len(hash) != 44 || receipt["index"] == nil {
			t.Errorf("result %d: KID %s, receipt %v", i, got.KID, receipt)
		}
	}
	if e := a.Results[2].Error; e == nil || e.Reason != "KEY_NOT_FOUND" {
		t.Errorf("the missing one: got %+v, want KEY_NOT_FOUND", e)
	}
	if got := k.core.Arena().InUse(); got != 0 {
		t.Errorf("keys in clear once all is answered: got %d, want 0", got)
	}
	// Without a request ID the daemon draws one; with content, keys must be of it.
	a = post(t, browser, url, map[string]any{"kids": kids[:1], "content_id": "cl\"ip"})
	if a.status != 200 || len(a.RequestID) != 36 {
		t.Errorf("with content: got HTTP %d and request ID %q", a.status, a.RequestID)
	}
	if a = post(t, browser, url, map[string]any{"kids": kids[:1], "content_id_b64": []byte("other")}); a.status != 404 {
		t.Errorf("of other content: got HTTP %d, want 404", a.status)
	}
}

// differing names the fields in which two maps differ, and no values.
func differing(a, b map[string]any) []string {
	var names []string
	for _, m := range []map[string]any{a, b} {
		for name := range m {
			if fmt.Sprint(a[name]) != fmt.Sprint(b[name]) {
				names = append(names, name)
			}
		}
	}
	return names
}

// TestTwinSealed: sealed keys come through the twin as they come through gRPC.
func TestTwinSealed(t *testing.T) {
	k, keys := sealedKit(t)
	url := k.serveTwin(t)
	resp, err := k.with(t, packager, keys[packager]...).IssueContentKeys(t.Context(), &v1.IssueContentKeysRequest{Category: "movies", ContentId: []byte("clip"),
		Keys: []*v1.ContentKeySpec{{TrackType: "HD", Scheme: "cenc"}}})
	if err != nil {
		t.Fatal(err)
	}
	want := resp.GetKeys()[0].GetKey()
	kid, err := custodian.KIDFromBytes(want.GetKid())
	if err != nil {
		t.Fatal(err)
	}
	a := post(t, k.browser(t, provider, nil), url, map[string]any{"request_id": "r", "kids": []string{kid.String()}, "recipient_key_id": keys[provider][1].ID()})
	if a.status != 200 || a.Results[0].Key["key"] != nil {
		t.Fatalf("got HTTP %d, %v", a.status, a.Error)
	}
	sealed := a.Results[0].Key["sealed_key"].(map[string]any)
	bytesOf, err := base64.StdEncoding.DecodeString(sealed["sealed"].(string))
	if err != nil {
		t.Fatal(err)
	}
	key := &v1.ContentKey{Kid: want.GetKid(), Category: "movies", ContentId: []byte("clip"), TrackType: "HD", Scheme: "cenc", Generation: 1,
		KeyMaterial: &v1.ContentKey_SealedKey{SealedKey: &v1.SealedKey{RecipientKeyId: sealed["recipient_key_id"].(string), Caller: sealed["caller"].(string), Sealed: bytesOf}}}
	if err := keys[provider][1].Open(key, "r"); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(key.GetKey(), want.GetKey()) {
		t.Error("it is another key")
	}
}

func TestTwinBadInput(t *testing.T) {
	k := newKit(t, options{})
	url := k.serveTwin(t)
	browser := k.browser(t, everybody, nil)
	kid := `"11111111-1111-4111-8111-111111111111"`
	for name, test := range map[string]struct{ body, field string }{
		"empty":                  {"", "body"},
		"no JSON":                {"<x/>", "body"},
		"a list":                 {"[]", "body"},
		"an unknown field":       {`{"kids":[` + kid + `],"x":1}`, "body"},
		"something after it":     {`{"kids":[` + kid + `]}{}`, "body"},
		"64 KiB":                 {`{"kids":["` + strings.Repeat("1", 64<<10) + `"]}`, "body"},
		"no KID":                 {`{"kids":[]}`, "kids"},
		"a KID that is none":     {`{"kids":["x"]}`, "kids[0]"},
		"a KID twice":            {`{"kids":[` + kid + `,` + kid + `]}`, "kids[1]"},
		"two forms of a content": {`{"kids":[` + kid + `],"content_id":"a","content_id_b64":"YQ=="}`, "content_id_b64"},
		"a long request ID":      {`{"kids":[` + kid + `],"request_id":"` + strings.Repeat("x", 129) + `"}`, "request_id"},
		"not base64":             {`{"kids":[` + kid + `],"content_id_b64":"?"}`, "body"},
	} {
		a := post(t, browser, url, test.body)
		if a.status != 400 || a.Error == nil || a.Error.Reason != "INVALID" || a.Error.Field != test.field {
			t.Errorf("%s: got HTTP %d and %+v, want 400 INVALID %s", name, a.status, a.Error, test.field)
		}
	}
	for _, method := range []string{http.MethodGet, http.MethodPut} {
		req, err := http.NewRequest(method, url+rpc.TwinPath, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := browser.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusMethodNotAllowed {
			t.Errorf("%s: got HTTP %d, want 405", method, resp.StatusCode)
		}
	}
	// The same TLS as gRPC's: a certificate of a known CA, and TLS 1.3.
	for name, change := range map[string]func(*tls.Config){
		"no certificate": func(c *tls.Config) { c.Certificates = nil },
		"TLS 1.2":        func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 },
	} {
		resp, err := k.browser(t, everybody, change).Post(url+rpc.TwinPath, "application/json", strings.NewReader(`{}`))
		if err == nil {
			resp.Body.Close()
			t.Errorf("%s: got HTTP %d, want no connection", name, resp.StatusCode)
		}
	}
}

// failing is the domain where its Retrieve fails, as a whole or for the key.
type failing struct {
	*custodian.Custodian
	err    error
	perKey bool
}

func (f *failing) Retrieve(ctx context.Context, who custodian.Caller, req custodian.RetrieveRequest) ([]custodian.RetrieveResult, error) {
	if f.perKey {
		return []custodian.RetrieveResult{{KID: req.KIDs[0], Err: f.err}}, nil
	}
	return nil, f.err
}

// TestContractOnTheWire: every row of the table through gRPC and through HTTP,
// whether the call fails or its one key does: code, reason, retry.
func TestContractOnTheWire(t *testing.T) {
	k := newKit(t, options{})
	url := k.serveTwin(t)
	cl, browser := k.dial(t, everybody), k.browser(t, everybody, nil)
	kid := bytes.Repeat([]byte{7}, 16)
	body := map[string]any{"request_id": "row", "kids": []string{"07070707-0707-0707-0707-070707070707"}}
	seen := map[string]bool{}
	for _, row := range contract {
		reason := string(custodian.ReasonOf(row.err))
		for _, perKey := range []bool{false, true} {
			err := fmt.Errorf("slot 7: %w", row.err)
			if row.err == custodian.ErrInvalid {
				err = &custodian.InvalidError{Field: "kids", Err: errors.New("no")}
			}
			k.server.SetCustody(&failing{k.core, err, perKey})
			_, got := cl.GetContentKeys(t.Context(), &v1.GetContentKeysRequest{RequestId: "row", Kids: [][]byte{kid}})
			e := wantRefused(t, got, custodian.Reason(reason))
			if e.Code != row.want || (e.Retry > 0) != row.retry || e.RequestID != "row" {
				t.Errorf("%s by gRPC: got %v, retry %v, request %q; want %v, retry %v", reason, e.Code, e.Retry, e.RequestID, row.want, row.retry)
			}
			a := post(t, browser, url, body)
			if a.status != row.http || a.Error == nil || a.Error.Reason != reason || a.Error.RequestID != "row" || a.Error.Message != e.Message {
				t.Errorf("%s by HTTP: got %d and %+v, want %d and %q", reason, a.status, a.Error, row.http, e.Message)
				continue
			}
			seconds, _ := strconv.Atoi(a.retryAfter)
			if want := int(math.Ceil(e.Retry.Seconds())); seconds != want || a.Error.RetryAfterMS != e.Retry.Milliseconds() || (a.retryAfter != "") != row.retry {
				t.Errorf("%s: got Retry-After %q and %d ms, want %d s", reason, a.retryAfter, a.Error.RetryAfterMS, want)
			}
		}
		seen[reason] = true
	}
	// Reasons that this package gives by itself have no error of the domain.
	for _, reason := range rpc.Reasons() {
		if !seen[string(reason)] && !slices.Contains([]custodian.Reason{"IDENTITY", "CANCELLED", "INTERNAL"}, reason) {
			t.Errorf("%s: no row was sent", reason)
		}
	}
}

// TestRefusalsWrittenDown: what the domain refuses by itself is heard alike
// through both, and is in the audit log with its reason. Who may not know hears
// the same of a key that does not exist as of one that is not granted.
func TestRefusalsWrittenDown(t *testing.T) {
	k, keys := sealedKit(t)
	url := k.serveTwin(t)
	pack := k.with(t, packager, keys[packager]...)
	issue := func(category, content string) string {
		resp, err := pack.IssueContentKeys(t.Context(), &v1.IssueContentKeysRequest{Category: category, ContentId: []byte(content), Keys: []*v1.ContentKeySpec{{TrackType: "HD", Scheme: "cenc"}}})
		if err != nil {
			t.Fatal(err)
		}
		kid, _ := custodian.KIDFromBytes(resp.GetKeys()[0].GetKey().GetKid())
		return kid.String()
	}
	open, sealedOnly, missing := issue("movies", "film"), issue("frozen", "secret"), "77777777-7777-4777-8777-777777777777"
	var shapes []string
	for i, test := range []struct {
		who, kid, token string
		before          func()
		want            custodian.Reason
		outcome         audit.Outcome
	}{
		{who: stranger, kid: open, want: "DENIED", outcome: audit.Denied},
		{who: stranger, kid: missing, want: "DENIED", outcome: audit.Denied},
		{who: packager, kid: open, want: "DENIED", outcome: audit.Denied},
		{who: everybody, kid: missing, want: "KEY_NOT_FOUND", outcome: audit.Failed},
		{who: everybody, kid: open, token: "bad", want: "TOKEN_INVALID", outcome: audit.Denied},
		{who: everybody, kid: sealedOnly, want: "SEALING_REQUIRED", outcome: audit.Denied},
		{who: everybody, kid: open, before: func() {
			if _, err := k.dial(t, officer).SetCategoryMode(t.Context(), &v1.SetCategoryModeRequest{Category: "movies", Mode: v1.CategoryMode_CATEGORY_MODE_FROZEN, Cause: "drill"}); err != nil {
				t.Fatal(err)
			}
		}, want: "CATEGORY_FROZEN", outcome: audit.Denied},
	} {
		if test.before != nil {
			test.before()
		}
		id := fmt.Sprintf("case-%d", i)
		raw, err := custodian.ParseKID(test.kid)
		if err != nil {
			t.Fatal(err)
		}
		_, err = k.dial(t, test.who).GetContentKeys(t.Context(), &v1.GetContentKeysRequest{RequestId: id, Kids: [][]byte{raw[:]}, LicenceToken: test.token})
		e := wantRefused(t, err, test.want)
		a := post(t, k.browser(t, test.who, nil), url, map[string]any{"request_id": id, "kids": []string{test.kid}, "licence_token": test.token})
		if a.Error == nil || a.Error.Reason != string(test.want) || a.Error.Message != e.Message {
			t.Errorf("%s: HTTP says %+v, gRPC %v", id, a.Error, e)
		}
		if test.who == stranger {
			a.header.Del("Date")
			shapes = append(shapes, fmt.Sprint(a.status, a.header, a.Error.Reason, a.Error.Message, a.Error.Field, a.Error.RetryAfterMS))
		}
		entries := 0
		if err := audit.Read(filepath.Join(k.dir, "audit"), 0, func(entry *audit.Entry) error {
			if entry.RequestID != id {
				return nil
			}
			entries++
			if entry.Action != "release" || entry.Outcome != test.outcome || entry.Reason != string(test.want) || entry.Caller != identity(test.who) {
				t.Errorf("%s: the audit log says %s %v %s by %s", id, entry.Action, entry.Outcome, entry.Reason, entry.Caller)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		if entries != 2 {
			t.Errorf("%s: got %d audit entries, want one for each front door", id, entries)
		}
	}
	if len(shapes) != 2 || shapes[0] != shapes[1] {
		t.Errorf("not granted and unknown differ:\n%s", strings.Join(shapes, "\n"))
	}
}

// TestOpenAPI: the document knows every reason and status of the table, and
// every field that the twin reads.
func TestOpenAPI(t *testing.T) {
	raw, err := os.ReadFile("../../docs/openapi.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var doc struct {
		Paths map[string]struct {
			Post struct {
				Responses map[string]any
			}
		}
		Components struct {
			Schemas map[string]struct {
				Enum       []string
				Properties map[string]any
			}
		}
	}
	if err := yaml.Unmarshal(raw, &doc); err != nil {
		t.Fatal(err)
	}
	var reasons []string
	for _, r := range rpc.Reasons() {
		reasons = append(reasons, string(r))
	}
	if got := doc.Components.Schemas["Reason"].Enum; !slices.Equal(got, reasons) {
		t.Errorf("reasons: got %q, want %q", got, reasons)
	}
	statuses := map[string]bool{"200": true}
	for _, row := range contract {
		statuses[strconv.Itoa(row.http)] = true
	}
	got := slices.Sorted(maps.Keys(doc.Paths[rpc.TwinPath].Post.Responses))
	if want := slices.Sorted(maps.Keys(statuses)); !slices.Equal(got, want) {
		t.Errorf("statuses: got %q, want %q", got, want)
	}
	// Each documented field is accepted: an unknown one would be refused by name.
	k := newKit(t, options{})
	url := k.serveTwin(t)
	browser := k.browser(t, everybody, nil)
	if len(doc.Components.Schemas["Request"].Properties) < 6 {
		t.Fatalf("got %d request fields", len(doc.Components.Schemas["Request"].Properties))
	}
	for field := range doc.Components.Schemas["Request"].Properties {
		a := post(t, browser, url, `{"`+field+`":null}`)
		if a.Error == nil || a.Error.Field != "kids" {
			t.Errorf("field %s: got %+v, want it taken and the KIDs missed", field, a.Error)
		}
	}
}
