package rpc_test

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/certs"
	"github.com/keycustody/custodian/client"
	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/custodian/custodiantest"
	"github.com/keycustody/custodian/internal/audit"
	"github.com/keycustody/custodian/internal/rpc"
	"github.com/keycustody/custodian/kms"
	"github.com/keycustody/custodian/store"
)

const trustDomain = "media.test"

// Who calls, by the path of its SPIFFE ID.
const (
	packager  = "packager/alpha"
	provider  = "provider/alpha"  // for the category movies
	everybody = "provider/global" // for all categories
	officer   = "officer/anna"
	operator  = "operator/oli"
	auditor   = "auditor/ada"
	stranger  = "nobody/nn" // a good certificate without any grant
)

func identity(path string) string { return "spiffe://" + trustDomain + "/" + path }

// A kit is a whole daemon but for its token, on loopback.
type kit struct {
	dir     string
	ca      *certs.Authority
	certs   *certs.Server
	hsm     *custodiantest.HSM
	core    *custodian.Custodian
	custody custodian.Config // what core stands on
	audit   audit.Options
	trail   *audit.Log
	server  *rpc.Server
	metrics *prometheus.Registry
	log     *syncBuffer
	addr    string
	stop    func() error // of the server; the rest goes on
	closers []func() error
}

// options change what openKit makes.
type options struct {
	config func(*rpc.Config)
	audit  func(*audit.Options)
	// custody changes what the domain stands on.
	custody func(*custodian.Config)
	// genesis names officers; nil: there are none. beforeInit fills it in.
	genesis    *custodian.Genesis
	beforeInit func(*kit)
	// roles are what the CA may vouch for; nil: all.
	roles []string
	// starting leaves the server without its custody.
	starting bool
}

// openKit makes a kit in dir; the caller closes it, even with an error.
func openKit(ctx context.Context, dir string, o options) (k *kit, err error) {
	k = &kit{dir: dir, hsm: custodiantest.NewHSM(), metrics: prometheus.NewRegistry(), log: &syncBuffer{}}
	if err := k.openCerts(o); err != nil {
		return k, err
	}
	if err := k.openCore(ctx, o); err != nil {
		return k, err
	}
	config := rpc.Config{Certs: k.certs, Metrics: k.metrics, Version: "test", Log: slog.New(slog.NewTextHandler(k.log, nil)),
		EarlyStatus: func(_ context.Context, who custodian.Caller) (custodian.Status, error) {
			if who.ID != identity(operator) {
				return custodian.Status{}, custodian.ErrDenied
			}
			return custodian.Status{Warnings: []string{"it is early"}}, nil
		}}
	if o.config != nil {
		o.config(&config)
	}
	if k.server, err = rpc.NewServer(config); err != nil {
		return k, err
	}
	if !o.starting {
		k.server.SetCustody(k.core)
	}
	k.closers = append(k.closers, func() error { return k.stop() })
	return k, k.serve(ctx, "127.0.0.1:0")
}

// restart puts a new server where the one was that stopped.
func (k *kit) restart(ctx context.Context) (err error) {
	if k.server, err = rpc.NewServer(rpc.Config{Certs: k.certs}); err != nil {
		return err
	}
	k.server.SetCustody(k.core)
	return k.serve(ctx, k.addr)
}

func (k *kit) openCerts(o options) (err error) {
	if k.ca, err = certs.OpenAuthority(filepath.Join(k.dir, "pki"), trustDomain); err != nil {
		return err
	}
	pair, err := k.ca.IssueServer([]string{"localhost"}, []net.IP{net.IPv4(127, 0, 0, 1)}, 24*time.Hour)
	if err != nil {
		return err
	}
	roles := o.roles
	if roles == nil {
		for _, r := range custodian.Roles {
			roles = append(roles, string(r))
		}
	}
	k.certs, err = certs.NewServer(certs.ServerOptions{CertFile: pair.CertFile, KeyFile: pair.KeyFile,
		CAs: []certs.CA{{Name: "clients", File: k.ca.CertFile(), CRLFile: k.ca.CRLFile(), TrustDomain: trustDomain, Roles: roles}}})
	return err
}

func (k *kit) openCore(ctx context.Context, o options) error {
	s, err := store.Create(ctx, filepath.Join(k.dir, "store.db"), store.Options{InitialMmapSize: 64 << 20})
	if err != nil {
		return err
	}
	k.closers = append(k.closers, s.Close)
	if o.audit != nil {
		o.audit(&k.audit)
	}
	if k.trail, err = audit.Create(filepath.Join(k.dir, "audit"), k.audit); err != nil {
		return err
	}
	k.closers = append(k.closers, k.closeCore)
	local, err := kms.Open(ctx, kms.Config{Name: "local", Kind: "local"})
	if err != nil {
		return err
	}
	policy, err := k.policy()
	if err != nil {
		return err
	}
	k.custody = custodian.Config{Store: s, HSM: k.hsm, Providers: []custodian.Provider{local}, Audit: k.trail, Policy: policy, Now: time.Now,
		LabelPrefix: "test", DefaultProviders: []string{"local"}, MaxReleases: 1024}
	if o.custody != nil {
		o.custody(&k.custody)
	}
	if o.beforeInit != nil {
		o.beforeInit(k)
	}
	if err := custodian.Init(ctx, k.custody, custodian.InitSpec{Genesis: o.genesis}); err != nil {
		return err
	}
	// As the daemon does: init and service are two openings of one log.
	return k.openAgain(ctx)
}

// openAgain closes custody and audit log and opens them as a start does.
func (k *kit) openAgain(ctx context.Context) (err error) {
	if err := k.closeCore(); err != nil {
		return err
	}
	logged := custodian.Logged{Budgets: k.custody.Policy.Budgets()}
	o := k.audit
	o.Visit = logged.Visit
	if k.trail, err = audit.Open(filepath.Join(k.dir, "audit"), o); err != nil {
		return err
	}
	k.custody.Audit, k.custody.Logged = k.trail, logged
	k.core, err = custodian.Open(ctx, k.custody)
	return err
}

func (k *kit) closeCore() (err error) {
	if k.core != nil {
		err = k.core.Close()
	}
	if k.trail != nil {
		err = errors.Join(err, k.trail.Close())
	}
	k.core, k.trail = nil, nil
	return err
}

func (k *kit) policy() (*custodian.Policy, error) {
	spki, err := k.spki(officer)
	if err != nil {
		return nil, err
	}
	movies := []custodian.CategoryName{"movies", "frozen"}
	return custodian.NewPolicy([]custodian.Grant{
		{Identity: identity(packager), Role: custodian.RolePackager, Categories: movies},
		{Identity: identity(provider), Role: custodian.RoleProvider, Categories: movies},
		{Identity: identity(everybody), Role: custodian.RoleProvider, AllCategories: true},
		{Identity: identity(officer), Role: custodian.RoleOfficer, AllCategories: true, SPKI: &spki},
		{Identity: identity(operator), Role: custodian.RoleOperator, AllCategories: true},
		{Identity: identity(auditor), Role: custodian.RoleAuditor, AllCategories: true},
	})
}

func (k *kit) spki(who string) ([32]byte, error) {
	pair, err := k.ca.IssueClient(who, 24*time.Hour)
	if err != nil {
		return [32]byte{}, err
	}
	pemBytes, err := os.ReadFile(pair.CertFile)
	if err != nil {
		return [32]byte{}, err
	}
	block, _ := pem.Decode(pemBytes)
	if block == nil {
		return [32]byte{}, fmt.Errorf("%s: no PEM", pair.CertFile)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return [32]byte{}, err
	}
	return sha256.Sum256(cert.RawSubjectPublicKeyInfo), nil
}

func (k *kit) serve(ctx context.Context, addr string) error {
	k.stop = func() error { return nil }
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	k.addr = l.Addr().String()
	ctx, stop := context.WithCancel(ctx)
	served := make(chan error, 1)
	server := k.server
	go func() { served <- server.Serve(ctx, l, 5*time.Second) }()
	k.stop = sync.OnceValue(func() error { stop(); return <-served })
	return nil
}

// close ends what openKit began, last things first.
func (k *kit) close() error {
	var errs []error
	for i := len(k.closers) - 1; i >= 0; i-- {
		errs = append(errs, k.closers[i]())
	}
	return errors.Join(errs...)
}

func newKit(t testing.TB, o options) *kit {
	t.Helper()
	// The test's own context ends before its clean-up runs.
	k, err := openKit(context.WithoutCancel(t.Context()), t.TempDir(), o)
	t.Cleanup(func() {
		if err := k.close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// revoke has a caller's certificate revoked from now on.
func (k *kit) revoke(t testing.TB, who string) {
	t.Helper()
	c, err := k.config(who)
	if err != nil {
		t.Fatal(err)
	}
	if err := k.ca.RevokeFile(c.CertFile); err != nil {
		t.Fatal(err)
	}
	if err := k.certs.Reload(); err != nil {
		t.Fatal(err)
	}
}

// config is that of a client named who.
func (k *kit) config(who string) (client.Config, error) {
	pair, err := k.ca.IssueClient(who, 24*time.Hour)
	return client.Config{Address: k.addr, CertFile: pair.CertFile, KeyFile: pair.KeyFile, CAFile: k.ca.CertFile(), ServerName: "localhost", Attempts: 1}, err
}

func (k *kit) dial(t testing.TB, who string) *client.Client {
	t.Helper()
	return k.dialAttempts(t, who, 1)
}

// dialAttempts is dial for a client that tries again.
func (k *kit) dialAttempts(t testing.TB, who string, attempts int) *client.Client {
	t.Helper()
	c, err := k.config(who)
	if err != nil {
		t.Fatal(err)
	}
	c.Attempts = attempts
	cl, err := client.Dial(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cl.Close() })
	return cl
}

// createCategory makes a category as the officer.
func (k *kit) createCategory(t testing.TB, name string) {
	t.Helper()
	if _, err := k.dial(t, officer).CreateCategory(t.Context(), &v1.CreateCategoryRequest{Name: name}); err != nil {
		t.Fatal(err)
	}
}

// issue makes one key for each track type as the packager.
func (k *kit) issue(t testing.TB, content string, trackTypes ...string) []*v1.ContentKey {
	t.Helper()
	req := &v1.IssueContentKeysRequest{Category: "movies", ContentId: []byte(content)}
	for _, track := range trackTypes {
		req.Keys = append(req.Keys, &v1.ContentKeySpec{TrackType: track, Scheme: "cbcs"})
	}
	resp, err := k.dial(t, packager).IssueContentKeys(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	var keys []*v1.ContentKey
	for _, key := range resp.GetKeys() {
		keys = append(keys, key.GetKey())
	}
	return keys
}

// wantRefused says what is wrong with the error of a call that must be refused.
func wantRefused(t *testing.T, err error, reason custodian.Reason) *client.Error {
	t.Helper()
	e, ok := errors.AsType[*client.Error](err)
	if !ok {
		t.Fatalf("got error %v, want one with reason %s", err, reason)
	}
	if e.Reason != string(reason) {
		t.Fatalf("reason: got %q (%v), want %s", e.Reason, err, reason)
	}
	return e
}

// A syncBuffer is a log that many write and one reads.
type syncBuffer struct {
	mu sync.Mutex
	b  []byte
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.b = append(s.b, p...)
	return len(p), nil
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return string(s.b)
}

var _ io.Writer = (*syncBuffer)(nil)
