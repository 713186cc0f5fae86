package packager_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/keycustody/custodian/certs"
	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/custodian/custodiantest"
	"github.com/keycustody/custodian/internal/audit"
	"github.com/keycustody/custodian/internal/packager"
	"github.com/keycustody/custodian/internal/rpc"
	"github.com/keycustody/custodian/kms"
)

// Who stands at the door, by the path of the SPIFFE ID.
const (
	doorPackager = "packager/alpha" // of the category movies
	doorOther    = "packager/beta"  // of the category sports, which does not exist
	doorChief    = "packager/chief" // of all categories
	doorProvider = "provider/alpha"
	doorNobody   = "nobody/nn" // a good certificate without any grant
)

func doorID(path string) string { return "spiffe://media.test/" + path }

// A doorKit is a daemon with its packager listener on loopback, on a token and a
// store in memory.
type doorKit struct {
	ca      *certs.Authority
	hsm     *custodiantest.HSM
	core    *custodian.Custodian
	rpc     *rpc.Server
	server  *packager.Server
	metrics *prometheus.Registry
	dir     string
	audit   *audit.Log
	url     string // of the category movies, without the protocol
	log     lockedBuffer
}

// newDoorKit makes a kit; change may be nil.
func newDoorKit(t testing.TB, change func(*packager.Config)) *doorKit {
	t.Helper()
	return newLoggedKit(t, audit.Options{}, change)
}

// newLoggedKit makes one whose audit log has options.
func newLoggedKit(t testing.TB, options audit.Options, change func(*packager.Config)) *doorKit {
	t.Helper()
	ctx := context.WithoutCancel(t.Context()) // the test's own ends before its clean-up
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	dir := t.TempDir()
	k := &doorKit{hsm: custodiantest.NewHSM(), metrics: prometheus.NewRegistry(), dir: dir}
	var err error
	k.ca, err = certs.OpenAuthority(filepath.Join(dir, "pki"), "media.test")
	must(err)
	pair, err := k.ca.IssueServer([]string{"localhost"}, []net.IP{net.IPv4(127, 0, 0, 1)}, 24*time.Hour)
	must(err)
	trust, err := certs.NewServer(certs.ServerOptions{CertFile: pair.CertFile, KeyFile: pair.KeyFile, CAs: []certs.CA{{Name: "clients",
		File: k.ca.CertFile(), TrustDomain: "media.test", Roles: []string{"packager", "drm-provider", "officer"}}}})
	must(err)
	k.openCore(t, dir, options)
	k.rpc, err = rpc.NewServer(rpc.Config{Certs: trust, Metrics: k.metrics})
	must(err)
	k.rpc.SetCustody(k.core)
	config := packager.Config{RPC: k.rpc, Hold: 10 * time.Second, Log: slog.New(slog.NewTextHandler(&k.log, nil))}
	if change != nil {
		change(&config)
	}
	k.server, err = packager.NewServer(config)
	must(err)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(err)
	ctx, stop := context.WithCancel(ctx)
	served := make(chan error, 1)
	go func() { served <- k.server.Serve(ctx, l, 5*time.Second) }()
	t.Cleanup(func() {
		stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
		if n := k.core.Arena().InUse(); n != 0 {
			t.Errorf("%d keys are still in clear", n)
		}
	})
	_, port, err := net.SplitHostPort(l.Addr().String())
	must(err)
	k.url = "https://localhost:" + port + "/v1/categories/movies/"
	return k
}

func (k *doorKit) openCore(t testing.TB, dir string, options audit.Options) {
	t.Helper()
	ctx := context.WithoutCancel(t.Context())
	officer := custodian.Caller{ID: doorID("officer/anna"), Roles: []custodian.Role{custodian.RoleOfficer}, SPKI: sha256.Sum256([]byte("anna"))}
	policy, err := custodian.NewPolicy([]custodian.Grant{
		{Identity: doorID(doorPackager), Role: custodian.RolePackager, Categories: []custodian.CategoryName{"movies"}},
		{Identity: doorID(doorOther), Role: custodian.RolePackager, Categories: []custodian.CategoryName{"sports"}},
		{Identity: doorID(doorChief), Role: custodian.RolePackager, AllCategories: true},
		{Identity: doorID(doorProvider), Role: custodian.RoleProvider, AllCategories: true},
		{Identity: officer.ID, Role: custodian.RoleOfficer, AllCategories: true, SPKI: &officer.SPKI},
	})
	if err != nil {
		t.Fatal(err)
	}
	local, err := kms.Open(ctx, kms.Config{Name: "local", Kind: "local"})
	if err != nil {
		t.Fatal(err)
	}
	var logged custodian.Logged
	folder := filepath.Join(dir, "audit")
	log, err := audit.Create(folder, audit.Options{Visit: logged.Visit})
	if err != nil {
		t.Fatal(err)
	}
	c := custodian.Config{Store: custodiantest.NewStore(), HSM: k.hsm, Providers: []custodian.Provider{local}, Audit: log, Policy: policy,
		Now: time.Now, LabelPrefix: "test", DefaultProviders: []string{"local"}, MaxReleases: 2048}
	if err := custodian.Init(ctx, c, custodian.InitSpec{}); err != nil {
		t.Fatal(err)
	}
	if err := log.Close(); err != nil {
		t.Fatal(err)
	}
	options.Visit = logged.Visit
	if log, err = audit.Open(folder, options); err != nil {
		t.Fatal(err)
	}
	c.Audit, c.Logged, k.audit = log, logged, log
	if k.core, err = custodian.Open(ctx, c); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(k.core.Close(), log.Close()); err != nil {
			t.Error(err)
		}
	})
	if _, err := k.core.CreateCategory(ctx, officer, custodian.CreateCategoryRequest{Name: "movies"}); err != nil {
		t.Fatal(err)
	}
}

// client is the HTTP client of who, which speaks TLS 1.2 as Shaka Packager does.
func (k *doorKit) client(t testing.TB, who string) *http.Client {
	t.Helper()
	pair, err := k.ca.IssueClient(who, 24*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := tls.LoadX509KeyPair(pair.CertFile, pair.KeyFile)
	if err != nil {
		t.Fatal(err)
	}
	ca, err := os.ReadFile(k.ca.CertFile())
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(ca)
	root, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(root)
	tr := &http.Transport{TLSClientConfig: &tls.Config{Certificates: []tls.Certificate{cert}, RootCAs: roots, MaxVersion: tls.VersionTLS12}}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}

// post returns the status and the body of the answer.
func post(t testing.TB, c *http.Client, url string, body []byte) (int, []byte) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	res, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, b
}

// A wvAnswer is what a packager reads.
type wvAnswer struct {
	Status  string
	Message string `json:"status_message"`
	Tracks  []wvTrack
}

type wvTrack struct {
	Type   string
	KID    []byte `json:"key_id"`
	Key    []byte
	IV     []byte
	Period *uint32   `json:"crypto_period_index"`
	Start  time.Time `json:"crypto_period_start_time"`
	End    time.Time `json:"crypto_period_end_time"`
	PSSH   []struct {
		Type  string `json:"drm_type"`
		Data  []byte
		Boxes []byte
	}
}

func wvDecode(t testing.TB, body []byte) (a wvAnswer) {
	t.Helper()
	var e struct{ Response []byte }
	if err := json.Unmarshal(body, &e); err != nil {
		t.Fatalf("%v: %s", err, body)
	}
	if err := json.Unmarshal(e.Response, &a); err != nil {
		t.Fatalf("%v: %s", err, e.Response)
	}
	return a
}

// wvBody is an unsigned request.
func wvBody(request string) []byte {
	return []byte(`{"request":"` + base64.StdEncoding.EncodeToString([]byte(request)) + `"}`)
}

// A lockedBuffer is a log that many write and one reads.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *lockedBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *lockedBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}
