package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"io"
	"log/slog"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/audit"
	"github.com/keycustody/custodian/testservers"
	"github.com/keycustody/custodian/testservers/awskms"
)

// TestMoveCategory moves a category of 1,000 KEK versions from Vault to any of
// Vault and AWS KMS, and kills the daemon in the middle, three times. At the
// end every version has both wraps, and each of the two alone, with the token,
// opens all of them.
func TestMoveCategory(t *testing.T) {
	if testing.Short() {
		t.Skip("a real Vault takes minutes to build; not in -short")
	}
	t.Parallel() // it waits, and takes little of the CPUs
	const versions = 1000
	v, aws := testservers.Vault(t), awskms.Start(t)
	c := provision(t)
	c.withVault(v)
	c.edit("\n  grace: 5s\n", "\n  - name: aws\n    kind: aws\n    aws: {key: '"+aws.CreateKey("custodian")+"', endpoint: '"+aws.Address+"', ca_file: "+aws.CAFile+
		", credentials_file: "+aws.CredentialsFile+"}\n  grace: 0s\n  rewrap_rate: 10000\n", "callback_deadline: 0s", "callback_deadline: 30s")
	var err error
	if c.config, err = LoadConfig(c.dev.configFile()); err != nil {
		t.Fatal(err)
	}
	c.mustRun("init", "-config", c.dev.configFile())
	keys := c.seed(versions)

	c.mustStart()
	set := func(req *v1.SetProvidersRequest) {
		t.Helper()
		req.Providers, req.Cause = []string{"outer", "aws"}, "a second provider"
		if _, err := c.dial(custodian.RoleOfficer).SetProviders(t.Context(), req); err != nil {
			t.Fatal(err)
		}
	}
	set(&v1.SetProvidersRequest{HelperKeys: true})
	set(&v1.SetProvidersRequest{Category: "movies"})
	began := time.Now()
	for _, share := range []int32{1, 4, 7} { // tenths
		if !c.awaitMoved(versions * share / 10) {
			t.Fatalf("the job ended before the kill at %d tenths", share)
		}
		c.wantMetric(`custodian_rewrap_keys{category="movies"} 1000`)
		c.kill()
		c.mustStart()
	}
	c.awaitMoved(versions + 1)
	t.Logf("%d KEK versions moved in %s, with three kills", versions, time.Since(began).Round(time.Millisecond))

	all, err := c.dial(custodian.RoleAuditor).ListKeyVersions(t.Context(), "movies")
	if err != nil {
		t.Fatal(err)
	}
	if len(all) != versions {
		t.Errorf("got %d key versions, want %d", len(all), versions)
	}
	for _, k := range all {
		var held []string
		for _, w := range k.GetOuterWraps() {
			held = append(held, w.GetProvider())
		}
		if !slices.Equal(held, []string{"outer", "aws"}) {
			t.Errorf("version %d is held by %v, want outer and aws", k.GetVersion(), held)
		}
	}
	c.wantMoveLogged()

	// Each of them alone, after a start that has loaded nothing.
	c.kill()
	v.Seal()
	c.mustStart()
	c.wantKeys("by AWS alone", keys)
	c.kill()
	v.Unseal()
	aws.Break(awskms.Fail(503, "ServiceUnavailable", ""))
	c.mustStart()
	c.wantKeys("by Vault alone", keys)
}

// wantMetric fails the test where the daemon does not show the metric with this
// value.
func (c *custody) wantMetric(line string) {
	c.t.Helper()
	if !strings.Contains("\n"+c.metrics(), "\n"+line+"\n") {
		c.t.Errorf("the metrics have no %s", line)
	}
}

// metrics are what the daemon shows at /metrics.
func (c *custody) metrics() string {
	c.t.Helper()
	res, err := http.Get("http://" + c.admin + "/metrics")
	if err != nil {
		c.t.Fatal(err)
	}
	defer res.Body.Close()
	all, err := io.ReadAll(res.Body)
	if err != nil {
		c.t.Fatal(err)
	}
	return string(all)
}

// seed makes the category movies with so many KEK versions and a content key
// under each, through the domain: the daemon makes a version at 2^31
// invocations only. It returns the digests of the keys by KID.
func (c *custody) seed(versions int) map[custodian.KID][32]byte {
	t := c.t
	t.Helper()
	keys := map[custodian.KID][32]byte{}
	packager := custodian.Caller{ID: "spiffe://" + devTrustDomain + "/packager", Roles: []custodian.Role{custodian.RolePackager}}
	c.withDomain(func(cfg *custodian.Config) {
		cfg.GCMLimits = custodian.GCMLimits{Block: 1, Soft: 2, Hard: 1 << 20}
		cfg.KEKLifetime = time.Hour
	}, func(d *custodian.Custodian) {
		if _, err := d.CreateCategory(t.Context(), c.officer(), custodian.CreateCategoryRequest{Name: "movies", Providers: []string{"outer"}}); err != nil {
			t.Fatal(err)
		}
		for i := range versions {
			issued, err := d.Issue(t.Context(), packager, custodian.IssueRequest{Category: "movies", ContentID: []byte("film-" + strconv.Itoa(i)),
				Keys: []custodian.KeySpec{{TrackType: "SD", Scheme: custodian.SchemeCENC}}})
			if err != nil {
				t.Fatal(err)
			}
			issued[0].Key.Use(func(b []byte) { keys[issued[0].KID] = sha256.Sum256(b) })
			issued[0].Key.Destroy()
		}
	})
	return keys
}

// withDomain opens the custody in this process, with the daemon's parts, for as
// long as f runs. It holds the module, and waits for whoever does.
func (c *custody) withDomain(change func(*custodian.Config), f func(*custodian.Custodian)) {
	t := c.t
	t.Helper()
	defer c.holdModule()()
	log := slog.New(slog.DiscardHandler)
	policy, err := c.config.policy(nil)
	if err != nil {
		t.Fatal(err)
	}
	var p parts
	defer func() {
		if err := p.close(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	}()
	if err := p.openStore(t.Context(), c.config, log); err != nil {
		t.Fatal(err)
	}
	if err := p.openProviders(t.Context(), c.config); err != nil {
		t.Fatal(err)
	}
	if p.token, err = openToken(t.Context(), c.config, log); err != nil {
		t.Fatal(err)
	}
	cfg := p.config(c.config, policy, log)
	change(&cfg)
	d, err := custodian.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	f(d)
}

// officer is the officer of the development grants.
func (c *custody) officer() custodian.Caller {
	officer := custodian.Caller{ID: "spiffe://" + devTrustDomain + "/officer", Roles: []custodian.Role{custodian.RoleOfficer}}
	for _, g := range c.config.Grants {
		if g.Role == string(custodian.RoleOfficer) {
			hex.Decode(officer.SPKI[:], []byte(g.SPKI))
		}
	}
	return officer
}

// awaitMoved waits until so many keys of movies are moved; false means that the
// job has ended before.
func (c *custody) awaitMoved(want int32) bool {
	t := c.t
	t.Helper()
	operator := c.dial(custodian.RoleOperator)
	for limit := time.Now().Add(2 * time.Minute); time.Now().Before(limit); time.Sleep(5 * time.Millisecond) {
		jobs, err := operator.ListRewraps(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if len(jobs) == 0 {
			return false
		}
		if j := jobs[len(jobs)-1]; j.GetCategory() == "movies" && j.GetDone() >= want {
			return true
		}
	}
	t.Fatalf("the job does not go on:\n%s", c.logText())
	return false
}

// wantMoveLogged checks that the audit log verifies, and has the begin and the
// end of the category's job once.
func (c *custody) wantMoveLogged() {
	t := c.t
	t.Helper()
	if _, err := audit.Verify(t.Context(), c.config.auditDir(), audit.VerifyOptions{}); err != nil {
		t.Errorf("audit verify: %v", err)
	}
	begins, ends := 0, 0
	if err := audit.Read(c.config.auditDir(), 0, func(e *audit.Entry) error {
		if e.Category == "movies" && e.Action == string(custodian.ActionSetProviders) && strings.Contains(e.Detail, "from outer to outer, aws") {
			begins++
		}
		if e.Category == "movies" && e.Action == "kek.rewrap.end" && strings.Contains(e.Detail, "all by outer, aws") {
			ends++
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if begins != 1 || ends != 1 {
		t.Errorf("the audit log has %d begins and %d ends of the job, want one of each", begins, ends)
	}
}

// wantKeys retrieves every key and compares it with what was issued.
func (c *custody) wantKeys(what string, keys map[custodian.KID][32]byte) {
	t := c.t
	t.Helper()
	provider := c.dial(custodian.RoleProvider)
	var kids [][]byte
	for kid := range keys {
		kids = append(kids, kid[:])
	}
	for ask := range slices.Chunk(kids, custodian.MaxKIDsPerCall) {
		res, err := provider.GetContentKeys(t.Context(), &v1.GetContentKeysRequest{Kids: ask})
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		for i, r := range res.GetResults() {
			if got := sha256.Sum256(r.GetKey().GetKey()); got != keys[custodian.KID(ask[i])] {
				t.Errorf("%s: %x: got %v and another key than was issued", what, ask[i], r.GetError())
			}
		}
	}
}
