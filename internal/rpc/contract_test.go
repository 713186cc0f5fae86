package rpc_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	jose "github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/client"
	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/audit"
	"github.com/keycustody/custodian/kms"
)

// Callers of the contract tests beside those of every kit.
const (
	anyPackager = "packager/any" // for all categories
	thief       = "provider/thief"
	otherThief  = "provider/other-thief"
)

// A drill is a kit whose parts can be made to fail, with the doors that it is
// asked through. It remembers the reasons that were heard.
type drill struct {
	*kit
	t         *testing.T
	twin      string
	packagers string
	store     *moodyStore
	kms       *moodyKMS
	disk      *atomic.Bool // of the audit log: it takes nothing more
	clock     *atomic.Int64
	clients   map[string]*client.Client
	browsers  map[string]*http.Client
	heard     map[string]bool
	asked     int
}

// A moodyStore is away, or hangs, while view says so.
type moodyStore struct {
	custodian.Store
	view atomic.Pointer[func(context.Context) error]
}

func (s *moodyStore) View(ctx context.Context, f func(custodian.Tx) error) error {
	if view := s.view.Load(); view != nil {
		if err := (*view)(ctx); err != nil {
			return err
		}
	}
	return s.Store.View(ctx, f)
}

type moodyKMS struct {
	custodian.Provider
	away atomic.Bool
}

func (p *moodyKMS) Unwrap(ctx context.Context, w custodian.OuterWrap, c []byte) ([]byte, error) {
	if p.away.Load() {
		return nil, fmt.Errorf("dial: %w", custodian.ErrProviderUnavailable)
	}
	return p.Provider.Unwrap(ctx, w, c)
}

// fullFile is a file of the audit log on a disk that may be full.
type fullFile struct {
	audit.File
	full *atomic.Bool
}

func (f fullFile) WriteAt(b []byte, off int64) (int, error) {
	if f.full.Load() {
		return 0, errors.New("no space left on device")
	}
	return f.File.WriteAt(b, off)
}

func newDrill(t *testing.T, o options) *drill {
	t.Helper()
	d := &drill{t: t, store: &moodyStore{}, disk: &atomic.Bool{}, clock: &atomic.Int64{}, clients: map[string]*client.Client{}, browsers: map[string]*http.Client{}, heard: map[string]bool{}}
	change := o.custody
	o.custody = func(c *custodian.Config) {
		local, err := kms.Open(t.Context(), kms.Config{Name: "local", Kind: "local"})
		if err != nil {
			t.Fatal(err)
		}
		d.store.Store, d.kms = c.Store, &moodyKMS{Provider: local}
		c.Store, c.Providers = d.store, []custodian.Provider{d.kms}
		c.KMS.BreakerPause = 1 // it is asked again at once
		c.Now = func() time.Time { return time.Now().Add(time.Duration(d.clock.Load())) }
		if change != nil {
			change(c)
		}
	}
	o.audit = func(o *audit.Options) {
		o.WrapFile = func(f audit.File) audit.File { return fullFile{f, d.disk} }
	}
	d.kit = newKit(t, o)
	if o.genesis == nil { // else the genesis has its grants
		d.setPolicy(nil)
	}
	d.twin, d.packagers = d.serveTwin(t), d.servePackagers(t)
	return d
}

// grants are those of every kit, and of the drill's own callers.
func (d *drill) grants() []custodian.Grant {
	spki, err := d.spki(officer)
	if err != nil {
		d.t.Fatal(err)
	}
	movies := []custodian.CategoryName{"movies", "frozen"}
	return []custodian.Grant{
		{Identity: identity(packager), Role: custodian.RolePackager, Categories: movies},
		{Identity: identity(anyPackager), Role: custodian.RolePackager, AllCategories: true},
		{Identity: identity(provider), Role: custodian.RoleProvider, Categories: movies},
		{Identity: identity(thief), Role: custodian.RoleProvider, Categories: movies},
		{Identity: identity(otherThief), Role: custodian.RoleProvider, Categories: movies},
		{Identity: identity(everybody), Role: custodian.RoleProvider, AllCategories: true},
		{Identity: identity(officer), Role: custodian.RoleOfficer, AllCategories: true, SPKI: &spki},
		{Identity: identity(operator), Role: custodian.RoleOperator, AllCategories: true},
	}
}

// setPolicy has the grants in force, with what change adds.
func (d *drill) setPolicy(change func(*custodian.Policy) (*custodian.Policy, error)) {
	d.t.Helper()
	p, err := custodian.NewPolicy(d.grants())
	if err == nil && change != nil {
		p, err = change(p)
	}
	if err == nil {
		err = d.core.SetPolicy(context.WithoutCancel(d.t.Context()), p)
	}
	if err != nil {
		d.t.Fatal(err)
	}
	d.custody.Policy = p
}

// caller is who as the domain knows it.
func (d *drill) caller(who string) custodian.Caller {
	spki, err := d.spki(who)
	if err != nil {
		d.t.Fatal(err)
	}
	return custodian.Caller{ID: identity(who), Roles: custodian.Roles, SPKI: spki}
}

// key makes a key of a content item and returns its KID.
func (d *drill) key(category, content string) []byte {
	d.t.Helper()
	resp, err := d.client(anyPackager).IssueContentKeys(d.t.Context(), issueOf(category, content))
	if err != nil {
		d.t.Fatal(err)
	}
	return resp.GetKeys()[0].GetKey().GetKid()
}

func issueOf(category, content string) *v1.IssueContentKeysRequest {
	return &v1.IssueContentKeysRequest{Category: category, ContentId: []byte(content), Keys: []*v1.ContentKeySpec{{TrackType: "HD", Scheme: "cenc"}}}
}

func (d *drill) mode(category string, m v1.CategoryMode) {
	d.t.Helper()
	if _, err := d.client(officer).SetCategoryMode(d.t.Context(), &v1.SetCategoryModeRequest{Category: category, Mode: m, Cause: "drill"}); err != nil {
		d.t.Fatal(err)
	}
}

func (d *drill) category(name string) {
	d.t.Helper()
	if _, err := d.client(officer).CreateCategory(d.t.Context(), &v1.CreateCategoryRequest{Name: name}); err != nil {
		d.t.Fatal(err)
	}
}

func (d *drill) client(who string) *client.Client {
	d.t.Helper()
	if d.clients[who] == nil {
		d.clients[who], d.browsers[who] = d.dial(d.t, who), d.browser(d.t, who, nil)
	}
	return d.clients[who]
}

// A question is asked by gRPC and by HTTP: a release through the twin, an issue
// through SPEKE. What only gRPC has, such as a new category, it asks alone.
type question struct {
	who, whoHTTP string // whoHTTP: where it is another
	kid          []byte // of a release
	content      string
	token        string
	issue        *v1.IssueContentKeysRequest
	create       string // a category
	grpcOnly     bool
}

func release(who string, kid []byte) question { return question{who: who, kid: kid} }

// A heard is what one door said.
type heard struct {
	status  int // of HTTP
	reason  string
	message string
	retry   time.Duration
}

// byGRPC asks by gRPC.
func (d *drill) byGRPC(q question, id string) *client.Error {
	d.t.Helper()
	cl, ctx := d.client(q.who), d.t.Context()
	var err error
	switch {
	case q.create != "":
		_, err = cl.CreateCategory(ctx, &v1.CreateCategoryRequest{RequestId: id, Name: q.create})
	case q.issue != nil:
		q.issue.RequestId = id
		_, err = cl.IssueContentKeys(ctx, q.issue)
	default:
		_, err = cl.GetContentKeys(ctx, &v1.GetContentKeysRequest{RequestId: id, Kids: [][]byte{q.kid}, ContentId: []byte(q.content), LicenceToken: q.token})
	}
	e, ok := errors.AsType[*client.Error](err)
	if !ok {
		d.t.Fatalf("%s by gRPC: got %v, want a refusal", id, err)
	}
	return e
}

// byHTTP asks by HTTP. SPEKE has no field for the reason.
func (d *drill) byHTTP(q question, id string) heard {
	d.t.Helper()
	who := q.who
	if q.whoHTTP != "" {
		who = q.whoHTTP
	}
	d.client(who)
	if q.issue == nil {
		kid := custodian.KID(q.kid).String()
		a := post(d.t, d.browsers[who], d.twin, map[string]any{"request_id": id, "kids": []string{kid}, "content_id": q.content, "licence_token": q.token})
		if a.Error == nil {
			d.t.Fatalf("%s by HTTP: got %d, want a refusal", id, a.status)
		}
		seconds, _ := strconv.Atoi(a.retryAfter)
		if want := int(math.Ceil(float64(a.Error.RetryAfterMS) / 1000)); seconds != want || a.Error.RequestID != id {
			d.t.Errorf("%s by HTTP: got Retry-After %q, want %d s; request %q", id, a.retryAfter, want, a.Error.RequestID)
		}
		return heard{a.status, a.Error.Reason, a.Error.Message, time.Duration(a.Error.RetryAfterMS) * time.Millisecond}
	}
	kid := q.issue.GetKeys()[0].GetKid()
	if kid == nil {
		d.asked++
		kid = fmt.Appendf(nil, "speke-key-%06d", d.asked)
	}
	text := custodian.KID(kid).String()
	body := `<c:CPIX xmlns:c="urn:dashif:org:cpix" contentId="` + string(q.issue.GetContentId()) + `" version="2.3"><c:ContentKeyList><c:ContentKey kid="` + text + `" commonEncryptionScheme="cenc"/></c:ContentKeyList>` +
		`<c:DRMSystemList><c:DRMSystem kid="` + text + `" systemId="edef8ba9-79d6-4ace-a3c8-27dcd51d21ed"><c:PSSH/></c:DRMSystem></c:DRMSystemList>` +
		`<c:ContentKeyUsageRuleList><c:ContentKeyUsageRule kid="` + text + `" intendedTrackType="HD"><c:VideoFilter/></c:ContentKeyUsageRule></c:ContentKeyUsageRuleList></c:CPIX>`
	req, err := http.NewRequestWithContext(d.t.Context(), http.MethodPost, strings.Replace(d.packagers, "/movies/", "/"+q.issue.GetCategory()+"/", 1)+"speke", strings.NewReader(body))
	if err != nil {
		d.t.Fatal(err)
	}
	req.Header = http.Header{"Content-Type": {"application/xml"}, "X-Speke-Version": {"2.0"}, "X-Request-Id": {id}}
	resp, err := d.browsers[who].Do(req)
	if err != nil {
		d.t.Fatal(err)
	}
	defer resp.Body.Close()
	said, err := io.ReadAll(resp.Body)
	if err != nil {
		d.t.Fatal(err)
	}
	seconds, _ := strconv.Atoi(resp.Header.Get("Retry-After"))
	return heard{resp.StatusCode, "", string(said), time.Duration(seconds) * time.Second}
}

// refused asks through both doors, and holds what is heard against the reason's
// row of the table. written is how each is found in the audit log; empty: it is
// not there, and the caller of this function shows where it is. It returns the
// request IDs.
func (d *drill) refused(reason, written string, q question) []string {
	d.t.Helper()
	d.asked++
	ids := []string{fmt.Sprintf("%s-%d-grpc", reason, d.asked), fmt.Sprintf("%s-%d-http", reason, d.asked)}
	i := slices.IndexFunc(contract, func(r contractRow) bool { return string(custodian.ReasonOf(r.err)) == reason })
	if i < 0 {
		d.t.Fatalf("%s is not in the table", reason)
	}
	row := contract[i]
	e := d.byGRPC(q, ids[0])
	if e.Reason != reason || e.Code != row.want || (e.Retry > 0) != row.retry || e.RequestID != ids[0] {
		d.t.Errorf("%s by gRPC: got %s, %v, retry %v (%s); want %v, retry %v", reason, e.Reason, e.Code, e.Retry, e.Message, row.want, row.retry)
	}
	callers := map[string]string{ids[0]: identity(q.who)}
	if q.create != "" || q.grpcOnly {
		ids = ids[:1]
	} else {
		a := d.byHTTP(q, ids[1])
		if a.status != row.http || a.reason != reason && q.issue == nil || a.retry != e.Retry || a.message != e.Message {
			d.t.Errorf("%s by HTTP: got %d %+v, want %d, retry %v and %q", reason, a.status, a, row.http, e.Retry, e.Message)
		}
		callers[ids[1]] = identity(q.who)
		if q.whoHTTP != "" {
			callers[ids[1]] = identity(q.whoHTTP)
		}
	}
	d.heard[reason] = true
	found := map[string]string{}
	for _, entry := range d.entries(d.t) {
		if who := callers[entry.RequestID]; who != "" && entry.Outcome != audit.Begun {
			found[entry.RequestID] += fmt.Sprintf("%s %v %s", entry.Action, entry.Outcome, entry.Reason)
			if entry.Caller != who {
				d.t.Errorf("%s: the audit log says that %s called, want %s", entry.RequestID, entry.Caller, who)
			}
		}
	}
	for id := range callers {
		want := ""
		if written != "" {
			want = written + " " + reason
		}
		if found[id] != want {
			d.t.Errorf("%s: the audit log says %q, want %q", id, found[id], want)
		}
	}
	if n := d.core.Arena().InUse(); n != 0 {
		d.t.Errorf("%s: %d keys in clear after it was answered", reason, n)
	}
	return ids
}

// What has no place in the contract with packagers and providers: what officers
// and operators hear, and those of this package alone.
var administration = []string{"CANCELLED", "INTERNAL", "IDENTITY", "ROTATION_STATE", "KEY_CONFLICT", "QUORUM", "APPROVAL", "PLAN", "CEREMONY_STATE", "CEREMONY_NOT_FOUND", "CLOCK_SUSPECT"}

// TestContractByTheDomain brings about what each row of the table is about, in a
// whole custody: nobody injects the error. Each is asked by gRPC and by HTTP, is
// heard alike, and is in the audit log once for each, or where it is said.
func TestContractByTheDomain(t *testing.T) {
	heard := map[string]bool{}
	for name, run := range map[string]func(*testing.T) *drill{"requests": contractRequests, "limits": contractLimits, "officers": contractOfficers, "overload": contractOverload} {
		t.Run(name, func(t *testing.T) {
			for reason := range run(t).heard {
				heard[reason] = true
			}
		})
	}
	for _, row := range contract {
		reason := string(custodian.ReasonOf(row.err))
		if !heard[reason] && !slices.Contains(administration, reason) {
			t.Errorf("%s: nothing came to it", reason)
		}
	}
}

// contractRequests has the rows that a request, or a part that is away, comes to.
func contractRequests(t *testing.T) *drill {
	d := newDrill(t, options{})
	d.category("movies")
	d.category("exposed")
	d.category("closed")
	d.atZero(`custodian_keys_refused_total{reason="RECORD_CORRUPT"}`, `custodian_calls_total{method="KeyIssuanceService/IssueContentKeys",reason="RECORD_CORRUPT"}`,
		`custodian_handshakes_refused_total{listener="packagers",reason="revoked"}`, `custodian_data_integrity_alerts_total`)
	film, other, exposed := d.key("movies", "film"), d.key("movies", "other"), d.key("exposed", "leak")
	missing := bytes.Repeat([]byte{7}, 16)

	// Who may know that something is not there, and who may not.
	d.refused("KEY_NOT_FOUND", "release failed", release(everybody, missing))
	d.refused("DENIED", "release denied", release(provider, missing))
	d.refused("KEY_NOT_FOUND", "release failed", question{who: provider, kid: missing, content: "film"})
	d.refused("DENIED", "release denied", question{who: provider, kid: missing, content: "leak"})
	if n := d.counter(t, "custodian_data_integrity_alerts_total"); n != 4 {
		t.Errorf("the metrics count %v alerts about missing keys, want 4", n)
	}
	d.refused("DENIED", "release denied", release(provider, exposed))
	d.refused("DENIED", "release denied", release(stranger, film))
	d.refused("DENIED", "issue denied", question{who: packager, issue: issueOf("exposed", "new")})
	d.refused("CATEGORY_NOT_FOUND", "issue failed", question{who: anyPackager, issue: issueOf("nowhere", "new")})
	d.refused("DENIED", "issue denied", question{who: packager, issue: issueOf("nowhere", "new")})

	// What is bound already.
	taken := issueOf("movies", "another")
	taken.Keys[0].Kid = film
	d.refused("KID_CONFLICT", "issue failed", question{who: packager, issue: taken})
	d.refused("CONTENT_CATEGORY", "issue failed", question{who: anyPackager, issue: issueOf("exposed", "film")})
	d.refused("CATEGORY_EXISTS", "category.create failed", question{who: officer, create: "movies"})

	// Malformed.
	malformed := question{who: provider, kid: film, content: strings.Repeat("x", custodian.MaxContentIDSize+1)}
	d.refused("INVALID", "release denied", malformed)

	// The state of a key, and of its category.
	d.mode("movies", v1.CategoryMode_CATEGORY_MODE_FROZEN)
	d.refused("CATEGORY_FROZEN", "release denied", release(provider, film))
	d.refused("CATEGORY_FROZEN", "issue denied", question{who: packager, issue: issueOf("movies", "new")})
	d.mode("movies", v1.CategoryMode_CATEGORY_MODE_OPEN)
	d.mode("closed", v1.CategoryMode_CATEGORY_MODE_NO_NEW)
	d.refused("KEY_STATE", "issue denied", question{who: anyPackager, issue: issueOf("closed", "new")})
	if _, err := d.core.StartRotation(t.Context(), d.caller(officer), custodian.RotationOrder{Kind: custodian.RotateKEK, Category: "exposed", Compromised: []uint32{1}, Cause: "drill"}); err != nil {
		t.Fatal(err)
	}
	if err := d.core.AdvanceRotations(t.Context()); err != nil {
		t.Fatal(err)
	}
	d.mode("exposed", v1.CategoryMode_CATEGORY_MODE_OPEN)
	d.refused("KEY_COMPROMISED", "release denied", release(everybody, exposed))
	d.refused("KEY_COMPROMISED", "issue denied", question{who: anyPackager, issue: issueOf("exposed", "leak")})
	d.setPolicy(func(p *custodian.Policy) (*custodian.Policy, error) {
		return p.WithSealing(custodian.Sealing{Require: []custodian.CategoryName{"movies"}})
	})
	d.refused("SEALING_REQUIRED", "release denied", release(provider, film))
	d.refused("SEALING_REQUIRED", "issue denied", question{who: packager, issue: issueOf("movies", "film")})

	d.tokens(film)

	// Budgets. Each thief has taken two keys.
	d.setPolicy(func(p *custodian.Policy) (*custodian.Policy, error) {
		return p.WithBudgets([]custodian.Budget{{Caller: identity(everybody), Action: custodian.ActionRelease, Window: time.Hour, HardKIDs: 1000, Rate: 0.01},
			{Caller: custodian.AnyCaller, Action: custodian.ActionRelease, Window: time.Hour, HardKIDs: 2}, {Caller: custodian.AnyCaller, Action: custodian.ActionReissue, Window: time.Hour, HardKIDs: 1000}})
	})
	third := d.key("movies", "third")
	for _, who := range []string{thief, otherThief} {
		d.take(who, film, other)
	}
	d.refused("KID_BUDGET", "release denied", question{who: thief, whoHTTP: otherThief, kid: third})
	d.refused("CALLER_FROZEN", "release denied", question{who: thief, whoHTTP: otherThief, kid: film})
	d.refused("CALLER_FROZEN", "release denied", question{who: thief, whoHTTP: otherThief, kid: missing})
	d.take(everybody, slices.Repeat([][]byte{film}, custodian.MaxKIDsPerCall)...) // the burst
	d.refused("RATE", "release denied", release(everybody, film))
	d.setPolicy(func(p *custodian.Policy) (*custodian.Policy, error) {
		return p.WithBudgets([]custodian.Budget{{Caller: custodian.AnyCaller, Action: custodian.ActionRelease, Window: time.Hour, HardKIDs: 1000}, {Caller: custodian.AnyCaller, Action: custodian.ActionReissue, Window: time.Hour, HardKIDs: 1}})
	})
	for _, who := range []string{packager, anyPackager} {
		if _, err := d.client(who).IssueContentKeys(t.Context(), issueOf("movies", "film")); err != nil {
			t.Fatal(err)
		}
	}
	d.refused("KID_BUDGET", "issue denied", question{who: packager, whoHTTP: anyPackager, issue: issueOf("movies", "other")})
	d.refused("CALLER_FROZEN", "issue denied", question{who: packager, whoHTTP: anyPackager, issue: issueOf("movies", "film")})
	for _, who := range []string{packager, anyPackager} {
		if _, err := d.core.LiftCaller(t.Context(), d.caller(officer), custodian.FreezeCallerRequest{Identity: identity(who), Cause: "drill"}); err != nil {
			t.Fatal(err)
		}
	}
	d.setPolicy(nil)

	// Parts that are away. A packager's front door waits for those, and asks more
	// than once: TestSPEKEHold of internal/packager.
	issue := question{who: packager, issue: issueOf("movies", "new"), grpcOnly: true}
	d.hsm.Fail("Open", custodian.ErrHSMUnavailable, 2)
	d.refused("HSM_UNAVAILABLE", "release failed", release(provider, film))
	d.hsm.Fail("Random", custodian.ErrHSMUnavailable, 1)
	d.refused("HSM_UNAVAILABLE", "issue failed", issue)
	d.kms.away.Store(true)
	d.hsm.Reconnect() // so that KEKs are loaded anew
	d.refused("KMS_UNAVAILABLE", "release failed", release(provider, film))
	d.refused("KMS_UNAVAILABLE", "issue failed", issue)
	d.kms.away.Store(false)
	away := func(context.Context) error { return fmt.Errorf("read page 7: %w", custodian.ErrStoreUnavailable) }
	d.store.view.Store(&away)
	d.refused("STORE_UNAVAILABLE", "release failed", release(provider, film))
	d.refused("STORE_UNAVAILABLE", "issue failed", issue)
	d.refused("DENIED", "release denied", release(stranger, film))
	hangs := func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
	d.store.view.Store(&hangs)
	d.refused("DEADLINE", "release failed", release(provider, film))
	d.store.view.Store(nil)
	d.take(provider, film) // all is well again

	d.damage(other)
	d.refused("RECORD_CORRUPT", "release failed", release(provider, other))
	d.refused("RECORD_CORRUPT", "issue failed", question{who: packager, issue: issueOf("movies", "other")})

	// There is no custody, and so no log that it could be written to: the
	// metrics count it.
	for _, err := range []error{custodian.ErrStarting, custodian.ErrUninitialised, custodian.ErrSealed} {
		before := d.calls(string(custodian.ReasonOf(err)))
		d.server.SetUnavailable(err)
		d.refused(string(custodian.ReasonOf(err)), "", release(provider, film))
		if n := d.calls(string(custodian.ReasonOf(err))) - before; n != 2 {
			t.Errorf("%v: the metrics count %v calls, want 2", err, n)
		}
	}
	d.server.SetCustody(d.core)

	// The log cannot be written: the daemon's own log has it, and the metrics.
	d.disk.Store(true)
	for _, q := range []question{release(provider, film), release(stranger, film), malformed, issue} {
		for _, id := range d.refused("AUDIT_BLOCKED", "", q) {
			if log := d.log.String(); !strings.Contains(log, "request_id="+id) || !strings.Contains(log, "reason=AUDIT_BLOCKED") {
				t.Errorf("the daemon's log does not have %s:\n%s", id, log)
			}
		}
	}
	if n := d.calls("AUDIT_BLOCKED"); n != 6 {
		t.Errorf("the metrics count %v calls with AUDIT_BLOCKED, want 6", n)
	}
	d.disk.Store(false)
	return d
}

// calls are the release calls that the metrics count with a reason.
func (d *drill) calls(reason string) float64 {
	d.t.Helper()
	families, err := d.metrics.Gather()
	if err != nil {
		d.t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != "custodian_calls_total" {
			continue
		}
		for _, m := range f.GetMetric() {
			if l := m.GetLabel(); l[0].GetValue() == "KeyRetrievalService/GetContentKeys" && l[1].GetValue() == reason {
				return m.GetCounter().GetValue()
			}
		}
	}
	return 0
}

// atZero wants counters to be shown before they have counted anything: one that
// begins at 1 has not increased for the alert that waits for it.
func (d *drill) atZero(lines ...string) {
	d.t.Helper()
	admin := httptest.NewServer(d.server.AdminHandler(d.metrics))
	defer admin.Close()
	for _, line := range lines {
		wantHTTP(d.t, admin.URL+"/metrics", http.StatusOK, "\n"+line+" 0\n")
	}
}

// take releases keys, which must be there.
func (d *drill) take(who string, kids ...[]byte) {
	d.t.Helper()
	req := custodian.RetrieveRequest{RequestID: "take"}
	for _, kid := range kids {
		req.KIDs = append(req.KIDs, custodian.KID(kid))
	}
	results, err := d.core.Retrieve(d.t.Context(), d.caller(who), req)
	if err != nil {
		d.t.Fatal(err)
	}
	for _, r := range results {
		r.Key.Destroy()
		if r.Err != nil {
			d.t.Fatalf("%s takes %s: %v", who, r.KID, r.Err)
		}
	}
}

// record is a content key's in the store.
func (d *drill) record(kid []byte) (k custodian.SealedKey) {
	d.t.Helper()
	if err := d.custody.Store.View(d.t.Context(), func(tx custodian.Tx) (err error) {
		k, err = tx.ContentKey(custodian.KID(kid))
		return err
	}); err != nil {
		d.t.Fatal(err)
	}
	return k
}

// replace puts another record in the place of a content key's.
func (d *drill) replace(revision uint64, k custodian.SealedKey) {
	d.t.Helper()
	if err := d.custody.Store.Update(d.t.Context(), func(tx custodian.UpdateTx) error { return tx.ReplaceContentKey(revision, k) }); err != nil {
		d.t.Fatal(err)
	}
}

// damage changes a field of a key's record, which its seal then does not cover.
func (d *drill) damage(kid []byte) {
	d.t.Helper()
	k := d.record(kid)
	was := k.Key.Revision
	k.Key.Revision++
	k.Body = custodian.EncodeContentKey(k.Key)
	d.replace(was, k)
}

// tokens has the rows about licence tokens.
func (d *drill) tokens(film []byte) {
	d.t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		d.t.Fatal(err)
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: private}, (&jose.SignerOptions{}).WithType("JWT").WithHeader("kid", "k1"))
	if err != nil {
		d.t.Fatal(err)
	}
	set, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: private.Public(), KeyID: "k1", Use: "sig"}}})
	if err != nil {
		d.t.Fatal(err)
	}
	loaded, never := custodian.NewTokenKeys(), custodian.NewTokenKeys()
	if _, err := loaded.Set(set); err != nil {
		d.t.Fatal(err)
	}
	d.setPolicy(func(p *custodian.Policy) (*custodian.Policy, error) {
		return p.WithTokens(custodian.Tokens{Audience: "custodian.test", MaxUses: 1, Issuers: []custodian.TokenIssuer{
			{Issuer: "https://play.test", Keys: loaded, AllCategories: true}, {Issuer: "https://late.test", Keys: never, AllCategories: true}}})
	})
	n := 0
	token := func(change map[string]any) string {
		n++
		now := time.Now().Unix()
		claims := map[string]any{"iss": "https://play.test", "aud": "custodian.test", "iat": now, "exp": now + 30, "jti": fmt.Sprint("t-", n), "sid": "session", "content_id": "film", "track_types": []string{"HD"}}
		for k, v := range change {
			claims[k] = v
		}
		text, err := jwt.Signed(signer).Claims(claims).Serialize()
		if err != nil {
			d.t.Fatal(err)
		}
		return text
	}
	refused := func(reason, written, token string) {
		d.t.Helper()
		d.refused(reason, written, question{who: provider, kid: film, token: token})
	}
	refused("TOKEN_MISSING", "release denied", "")
	refused("TOKEN_INVALID", "release denied", "a.b.c")
	refused("TOKEN_EXPIRED", "release denied", token(map[string]any{"iat": time.Now().Unix() - 600, "exp": time.Now().Unix() - 570}))
	refused("TOKEN_MISMATCH", "release denied", token(map[string]any{"content_id": "other"}))
	// Of another certificate, as the handshake has shown it; and of one's own.
	bound := func(who string) string {
		d.client(who)
		cert := d.browsers[who].Transport.(*http.Transport).TLSClientConfig.Certificates[0].Certificate[0]
		sum := sha256.Sum256(cert)
		return token(map[string]any{"cnf": map[string]string{"x5t#S256": base64.RawURLEncoding.EncodeToString(sum[:])}})
	}
	refused("TOKEN_MISMATCH", "release denied", bound(everybody))
	if a := post(d.t, d.browsers[provider], d.twin, map[string]any{"kids": []string{custodian.KID(film).String()}, "licence_token": bound(provider)}); a.status != http.StatusOK {
		d.t.Errorf("a token of the caller's own certificate: got %d and %+v", a.status, a.Error)
	}
	// The largest that the doors let in, and larger ones.
	refused("TOKEN_INVALID", "release denied", strings.Repeat("A", 60<<10))
	if _, err := d.client(provider).GetContentKeys(d.t.Context(), &v1.GetContentKeysRequest{Kids: [][]byte{film}, LicenceToken: strings.Repeat("A", 1<<20)}); status.Code(err) != codes.ResourceExhausted {
		d.t.Errorf("1 MB by gRPC: got %v, want %v", err, codes.ResourceExhausted)
	}
	if a := post(d.t, d.browsers[provider], d.twin, map[string]any{"kids": []string{custodian.KID(film).String()}, "licence_token": strings.Repeat("A", 1<<20)}); a.status != http.StatusBadRequest || a.Error.Field != "body" {
		d.t.Errorf("1 MB by HTTP: got %d and %+v, want 400 for the body", a.status, a.Error)
	}
	refused("TOKEN_KEYS_UNAVAILABLE", "release denied", token(map[string]any{"iss": "https://late.test"}))
	once := token(nil)
	results, err := d.core.Retrieve(d.t.Context(), d.caller(provider), custodian.RetrieveRequest{KIDs: []custodian.KID{custodian.KID(film)}, LicenceToken: once})
	if err != nil || results[0].Err != nil {
		d.t.Fatal(err, results)
	}
	results[0].Key.Destroy()
	refused("TOKEN_REPLAYED", "release denied", once)
	if _, err := d.core.Revoke(d.t.Context(), d.caller(operator), custodian.RevokeRequest{SessionID: "session", Cause: "drill"}); err != nil {
		d.t.Fatal(err)
	}
	refused("TOKEN_REVOKED", "release denied", token(nil))
	// Who may not have the key hears nothing of tokens.
	d.refused("DENIED", "release denied", question{who: stranger, kid: film, token: token(nil)})
}

// contractLimits has the rows about the end of a KEK and of the MEK's year.
func contractLimits(t *testing.T) *drill {
	d := newDrill(t, options{custody: func(c *custodian.Config) { c.GCMLimits = custodian.GCMLimits{Block: 1, Soft: 100, Hard: 3} }})
	d.category("movies")
	film := d.key("movies", "film")
	d.key("movies", "second") // beside the canary, the last one
	d.refused("KEK_EXHAUSTED", "issue failed", question{who: packager, issue: issueOf("movies", "third")})
	d.take(provider, film)

	d.custody.GCMLimits.Soft, d.custody.ConfirmTime = 3, true
	d.clock.Add(int64(custodian.MEKPeriod + time.Hour))
	if err := d.openAgain(t.Context()); err != nil {
		t.Fatal(err)
	}
	d.server.SetCustody(d.core)
	d.refused("MEK_EXPIRED", "issue failed", question{who: packager, issue: issueOf("movies", "third")})
	d.refused("MEK_EXPIRED", "category.create failed", question{who: officer, create: "late"})
	d.take(provider, film)
	return d
}

// contractOverload has calls that are shed before they are decided: the audit
// log has one entry that counts them.
func contractOverload(t *testing.T) *drill {
	d := newDrill(t, options{})
	d.category("movies")
	film := d.key("movies", "film")
	open := make(chan struct{})
	hangs := func(context.Context) error { <-open; return nil }
	d.store.view.Store(&hangs)
	const crowd = (1024 + 4096) / custodian.MaxKIDsPerCall // inside, and waiting
	ctx, cancel := context.WithCancel(t.Context())
	who := d.caller(everybody)
	var calls sync.WaitGroup
	for range crowd {
		calls.Go(func() {
			results, err := d.core.Retrieve(ctx, who, custodian.RetrieveRequest{RequestID: "crowd", KIDs: slices.Repeat([]custodian.KID{custodian.KID(film)}, custodian.MaxKIDsPerCall)})
			for i := range results {
				results[i].Key.Destroy()
			}
			if err != nil && !errors.Is(err, custodian.ErrDeadline) { // they are sent away at the end
				t.Errorf("one of the crowd: %v", err)
			}
		})
	}
	for end := time.Now().Add(10 * time.Second); d.core.Admission().CallsWaiting < 4096/custodian.MaxKIDsPerCall; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("the gate is not full: %+v", d.core.Admission())
		}
	}
	d.refused("RATE", "", release(everybody, film))
	if got := d.core.Admission().Shed; got != 2 {
		t.Errorf("shed: got %d, want the two that were asked", got)
	}
	cancel()
	close(open)
	calls.Wait()
	d.store.view.Store(nil)
	if err := d.openAgain(t.Context()); err != nil { // which writes what was counted
		t.Fatal(err)
	}
	d.server.SetCustody(d.core)
	shed := uint64(0)
	for _, e := range d.entries(t) {
		if e.Action == "release" && e.Outcome == audit.Denied && e.Reason == "RATE" && e.Caller == identity(everybody) {
			shed += max(e.Count, 1)
		}
	}
	if shed != 2 {
		t.Errorf("the audit log counts %d calls that were shed, want 2", shed)
	}
	d.take(everybody, film)
	return d
}

// Assembled are officers of whom two decide.
type assembled struct {
	*drill
	people string // as a plan names them
	keys   []ed25519.PrivateKey
	names  []string // their public keys
}

// contractOfficers has the rows that only a ceremony of the officers comes to.
func contractOfficers(t *testing.T) *drill {
	a := &assembled{people: "officers:\n"}
	for _, name := range []string{"anna", "ben", "cleo"} {
		public, private, err := ed25519.GenerateKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		text, err := custodian.OfficerKey(public)
		if err != nil {
			t.Fatal(err)
		}
		a.keys, a.names = append(a.keys, private), append(a.names, text)
		a.people += fmt.Sprintf("- {name: %s, key: %q}\n", name, text)
	}
	genesis := &custodian.Genesis{}
	a.drill = newDrill(t, options{genesis: genesis, beforeInit: func(k *kit) { a.drill = &drill{kit: k, t: t}; a.fill(genesis) }})
	a.category("movies")
	film, other := a.key("movies", "film"), a.key("movies", "other")

	// A key is withdrawn after a re-key.
	a.hold("rekey", "content:\n- {category: movies, id: film}")
	a.key("movies", "film")
	a.hold("withdraw", "content:\n- {category: movies, id: film}")
	a.refused("KEY_STATE", "release denied", release(provider, film))

	// A key version is destroyed, and somebody puts an old record back.
	old := a.record(other)
	a.hold("kek-rotation", "categories: [movies]")
	a.hold("retire", "rotations: [kek/movies/2]")
	a.hold("destroy", "key_versions: [movies/1]")
	now := a.record(other)
	a.replace(now.Key.Revision, old)
	a.refused("KEY_DESTROYED", "release denied", release(provider, other))

	a.hold("seal", "")
	a.refused("SEALED", "release denied", release(provider, other))
	a.refused("SEALED", "issue denied", question{who: packager, issue: issueOf("movies", "new")})
	return a.drill
}

// fill makes the genesis, with the grants of the drill.
func (a *assembled) fill(g *custodian.Genesis) {
	a.t.Helper()
	text := a.plan("genesis", "genesis: {mek_profile: sealed, nonce: "+strings.Repeat("ab", 32)+"}\n"+a.people+"quorum:\n  default: 2\ngrants:\n")
	for _, grant := range a.grants() {
		categories, pin := `["*"]`, ""
		if !grant.AllCategories {
			categories = "[movies, frozen]"
		}
		if grant.SPKI != nil {
			pin = fmt.Sprintf(", spki: %q", hex.EncodeToString(grant.SPKI[:]))
		}
		text += fmt.Sprintf("- {identity: %q, role: %s, categories: %s%s}\n", grant.Identity, grant.Role, categories, pin)
	}
	plan, err := custodian.ParsePlan([]byte(text))
	if err != nil {
		a.t.Fatalf("%v\n%s", err, text)
	}
	g.Plan = plan
	ch := custodian.Challenge{PlanDigest: plan.Digest(), Expires: plan.ExpireTime(), Nonce: [32]byte(bytes.Repeat([]byte{0xab}, 32))}
	for i, key := range a.keys {
		g.Approvals = append(g.Approvals, custodian.Approval{Officer: []string{"anna", "ben", "cleo"}[i], Key: a.names[i], Signature: a.sign(ch, key)})
	}
}

func (a *assembled) plan(kind, body string) string {
	return fmt.Sprintf("plan: custodian/1\nkind: %s\nreason: a drill\nexpires: %s\n%s", kind, time.Now().Add(time.Hour).UTC().Format(time.RFC3339), body)
}

func (a *assembled) sign(ch custodian.Challenge, key ed25519.PrivateKey) []byte {
	a.t.Helper()
	sig, err := ch.Sign(custodian.ActApprove, key)
	if err != nil {
		a.t.Fatal(err)
	}
	return sig
}

// hold carries a ceremony out, from its proposal to its end.
func (a *assembled) hold(kind, body string) {
	a.t.Helper()
	ctx, who, text := a.t.Context(), a.caller(officer), a.plan(kind, body)
	info, _, err := a.core.ProposeCeremony(ctx, who, []byte(text), "", false)
	if err != nil {
		a.t.Fatalf("%s: %v", kind, err)
	}
	plan, err := custodian.ParsePlan([]byte(text))
	if err != nil {
		a.t.Fatal(err)
	}
	ch := custodian.Challenge{PlanDigest: plan.Digest(), StoreID: info.StoreID, Revision: info.Base, Expires: plan.ExpireTime(), Nonce: info.Nonce, LogKey: info.LogKey}
	for i, key := range a.keys[:2] {
		if _, err := a.core.ApproveCeremony(ctx, who, custodian.ApproveRequest{ID: info.ID, Key: a.names[i], Challenge: ch, Signature: a.sign(ch, key)}); err != nil {
			a.t.Fatalf("%s: %v", kind, err)
		}
	}
	if _, err := a.core.ExecuteCeremony(ctx, who, info.ID, ""); err != nil {
		a.t.Fatalf("%s: %v", kind, err)
	}
	if err := errors.Join(a.core.AdvanceRotations(ctx), a.core.Tick(ctx)); err != nil {
		a.t.Fatalf("%s: %v", kind, err)
	}
	if info, err = a.core.Ceremony(ctx, who, info.ID); err != nil || info.State != custodian.CeremonyDone {
		a.t.Fatalf("%s: got %s with %+v, %v; want it done", kind, info.State, info.Progress, err)
	}
}

// TestMalformedIsWrittenDown: a request for keys that is malformed, wherever that
// shows, is one denial in the audit log, as at the packagers' front doors.
func TestMalformedIsWrittenDown(t *testing.T) {
	k := newKit(t, options{})
	k.createCategory(t, "movies")
	twin := k.serveTwin(t)
	give, pack, browser := k.dial(t, provider), k.dial(t, packager), k.browser(t, provider, nil)
	get := func(r *v1.GetContentKeysRequest) func() {
		return func() { _, err := give.GetContentKeys(t.Context(), r); wantRefused(t, err, "INVALID") }
	}
	issue := func(r *v1.IssueContentKeysRequest) func() {
		return func() { _, err := pack.IssueContentKeys(t.Context(), r); wantRefused(t, err, "INVALID") }
	}
	http := func(body string) func() {
		return func() {
			if a := post(t, browser, twin, body); a.status != 400 || a.Error.Reason != "INVALID" {
				t.Errorf("%s: got %d and %+v", body, a.status, a.Error)
			}
		}
	}
	for name, test := range map[string]struct {
		ask    func()
		action string
		id     string // that the entry has, where the request has one that can be read
	}{
		"not a message":              {func() { wantCode(t, k.raw(t, provider, []byte{0xff, 0xff}), codes.InvalidArgument) }, "release", ""},
		"no KID":                     {get(&v1.GetContentKeysRequest{RequestId: "none"}), "release", "none"},
		"a KID of 15 bytes":          {get(&v1.GetContentKeysRequest{RequestId: "short", Kids: [][]byte{make([]byte, 15)}}), "release", "short"},
		"a request ID of two lines":  {get(&v1.GetContentKeysRequest{RequestId: "a\nb"}), "release", ""},
		"an unknown recipient key":   {get(&v1.GetContentKeysRequest{RequestId: "to", Kids: [][]byte{bytes.Repeat([]byte{1}, 16)}, RecipientKeyId: "x"}), "release", "to"},
		"no key to issue":            {issue(&v1.IssueContentKeysRequest{RequestId: "empty", Category: "movies", ContentId: []byte("film")}), "issue", "empty"},
		"a category that cannot be":  {issue(&v1.IssueContentKeysRequest{RequestId: "name", Category: "No Such", ContentId: []byte("film"), Keys: issueOf("", "").Keys}), "issue", "name"},
		"no JSON":                    {http("<x/>"), "release", ""},
		"JSON with a KID that isn't": {http(`{"request_id":"json","kids":["x"]}`), "release", "json"},
		"JSON without a KID":         {http(`{"request_id":"nothing","kids":[]}`), "release", "nothing"},
	} {
		from := len(k.entries(t))
		test.ask()
		written := k.entries(t)[from:]
		if len(written) != 1 || written[0].Action != test.action || written[0].Outcome != audit.Denied || written[0].Reason != "INVALID" || written[0].Caller == "" || written[0].Detail == "" {
			t.Errorf("%s: the audit log has %+v, want one denial with INVALID", name, written)
		} else if test.id != "" && written[0].RequestID != test.id {
			t.Errorf("%s: the audit log names the request %q, want %q", name, written[0].RequestID, test.id)
		}
	}
}

func wantCode(t *testing.T, err error, want codes.Code) {
	t.Helper()
	if got := status.Code(err); got != want {
		t.Errorf("got %v, want %v", err, want)
	}
}
