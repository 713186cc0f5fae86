package main

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
	"github.com/twmb/franz-go/pkg/sasl/scram"
	"google.golang.org/protobuf/types/known/durationpb"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/certs"
	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/kafka"
)

// A broker is a Kafka broker that speaks TLS and asks for SCRAM, and a client of
// the content system's.
type broker struct {
	t       *testing.T
	config  kafka.Config // of the daemon
	content *kgo.Client
}

func startBroker(t *testing.T) *broker {
	t.Helper()
	dir := t.TempDir()
	ca, err := certs.OpenAuthority(dir, "kafka.test")
	if err != nil {
		t.Fatal(err)
	}
	server, err := ca.IssueServer([]string{"localhost"}, []net.IP{net.IPv4(127, 0, 0, 1)}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.LoadX509KeyPair(server.CertFile, server.KeyFile)
	if err != nil {
		t.Fatal(err)
	}
	pem, err := os.ReadFile(ca.CertFile())
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	password := filepath.Join(dir, "password")
	if err := os.WriteFile(password, []byte("s3cret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	cluster, err := kfake.NewCluster(kfake.NumBrokers(1), kfake.SeedTopics(1, "media", "media.dead"), kfake.TLS(&tls.Config{Certificates: []tls.Certificate{pair}}),
		kfake.EnableSASL(), kfake.Superuser("SCRAM-SHA-512", "custodian", "s3cret"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(cluster.Close)
	b := &broker{t: t, config: kafka.Config{Brokers: cluster.ListenAddrs(), TLS: kafka.TLSConfig{CAFile: ca.CertFile()},
		SASL:   kafka.SASLConfig{Mechanism: "SCRAM-SHA-512", User: "custodian", PasswordFile: password},
		Topics: []kafka.TopicConfig{{Name: "media", DeadLetter: "media.dead"}}}}
	if b.content, err = kgo.NewClient(kgo.SeedBrokers(cluster.ListenAddrs()...), kgo.DialTLSConfig(&tls.Config{RootCAs: roots}),
		kgo.SASL(scram.Auth{User: "custodian", Pass: "s3cret"}.AsSha512Mechanism())); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.content.Close)
	return b
}

// send produces events of a kind with these IDs, in their order.
func (b *broker) send(kind, data string, ids ...string) {
	b.t.Helper()
	var all []*kgo.Record
	for _, id := range ids {
		all = append(all, &kgo.Record{Topic: "media", Headers: []kgo.RecordHeader{{Key: "content-type", Value: []byte("application/cloudevents+json")}},
			Value: []byte(`{"specversion":"1.0","source":"//cms","id":"` + id + `","type":"` + kind + `","data":` + data + `}`)})
	}
	if err := b.content.ProduceSync(b.t.Context(), all...).FirstErr(); err != nil {
		b.t.Fatal(err)
	}
}

// bury takes every member out of the daemon's group, as the broker itself does
// 45 seconds after it has heard of a member for the last time.
func (b *broker) bury() {
	b.t.Helper()
	ask := kmsg.NewDescribeGroupsRequest()
	ask.Groups = []string{"custodian"}
	groups, err := ask.RequestWith(b.t.Context(), b.content)
	if err != nil || len(groups.Groups) != 1 {
		b.t.Fatalf("describe the group: %+v, %v", groups, err)
	}
	leave := kmsg.NewLeaveGroupRequest()
	leave.Group = "custodian"
	for _, m := range groups.Groups[0].Members {
		gone := kmsg.NewLeaveGroupRequestMember()
		gone.MemberID = m.MemberID
		leave.Members = append(leave.Members, gone)
	}
	if _, err := leave.RequestWith(b.t.Context(), b.content); err != nil {
		b.t.Fatal(err)
	}
}

const announced = `{"category":"movies"}`

// TestKafka: the daemon as in production, with an anchor and a broker that asks
// for TLS and a login. A batch makes one KEK version, however often it is
// announced; a daemon that is killed in the middle loses none and doubles none.
// And with everything configured that there are alerts for, each metric of the
// alerts that we ship is there, with the labels that they look at.
func TestKafka(t *testing.T) {
	b := startBroker(t)
	c := provision(t)
	c.anchorTo(fmt.Sprintf("{name: worm, kind: directory, interval: 1s, path: %s}", t.TempDir()), "null")
	c.patient()
	c.configure(func(config *Config) {
		config.Kafka = b.config
		config.Kafka.SASL = kafka.SASLConfig{}
		config.Grants = append(config.Grants, GrantConfig{Identity: "kafka:media", Role: string(custodian.RoleEventSource), Categories: []string{"movies"}})
		config.Events = EventsConfig{DailyCap: 24, MinInterval: time.Millisecond}
		for _, action := range []custodian.Action{custodian.ActionRelease, custodian.ActionReissue} {
			config.Budgets = append(config.Budgets, BudgetConfig{Caller: "*", Action: string(action), Category: "*", Window: time.Hour, HardKIDs: 1000})
		}
	})
	if out, code := c.run("-config", c.dev.configFile(), "-check-config"); code != exitUsage || !strings.Contains(out, "kafka.tls.cert_file: set it and key_file, or sasl") {
		t.Errorf("a broker without a login, in production: exit %d\n%s", code, out)
	}
	c.configure(func(config *Config) { config.Kafka.SASL = b.config.SASL })
	c.mustRun("init", "-config", c.dev.configFile())
	c.mustStart()
	if _, err := c.dial(custodian.RoleOfficer).CreateCategory(t.Context(), &v1.CreateCategoryRequest{Name: "movies"}); err != nil {
		t.Fatal(err)
	}
	l := &ledger{byItem: map[string]answer{}, released: map[custodian.KID]bool{}}
	c.issueItems(l, "film", 3)

	b.send("media.drm.batch", announced, "b1", "b1", "b1")
	await(t, "three events", func() bool { return c.eventsHandled() == 3 })
	if n := c.versions(); n != 2 {
		t.Errorf("one batch, announced three times: %d versions, want 2", n)
	}

	var ids []string
	for i := range 12 {
		ids = append(ids, fmt.Sprintf("m%d", i), fmt.Sprintf("m%d", i/2)) // each, and some again
	}
	b.send("media.drm.batch", announced, ids[:12]...)
	await(t, "the first of many events", func() bool { return c.versions() > 4 })
	c.kill()
	b.bury()
	b.send("media.drm.batch", announced, ids[12:]...)
	b.send("media.drm.packaged", `{"category":"movies","content_id":"film-0"}`, "p1") // behind all of them
	c.mustStart()
	packaged := func() bool {
		a := l.byItem["film-0"]
		auditor := c.dial(custodian.RoleAuditor)
		defer auditor.Close()
		key, err := auditor.DescribeContentKey(t.Context(), a.kid[:])
		return err == nil && key.GetPackagedTime() != nil
	}
	await(t, "the last of many events", packaged)
	if n := c.versions(); n != 2+12 {
		t.Errorf("12 batches, a daemon that was killed in the middle: %d versions, want 14", n)
	}
	c.all(l)

	// Something of everything that there are alerts for.
	if _, err := c.dial(custodian.RoleProvider).GetContentKeys(t.Context(), &v1.GetContentKeysRequest{Kids: [][]byte{[]byte("there is none ..")}}); err == nil {
		t.Error("a key that is not there is released")
	}
	if conn, err := tls.Dial("tcp", c.listen, &tls.Config{InsecureSkipVerify: true}); err == nil { // it has no certificate
		_, _ = conn.Read(make([]byte, 1))
		conn.Close()
	}
	await(t, "a handshake that is refused", func() bool { return strings.Contains(c.metrics(), "\ncustodian_handshakes_refused_total{") })
	if _, err := c.dial(custodian.RoleOfficer).StartRotation(t.Context(), &v1.StartRotationRequest{Kind: v1.RotationKind_ROTATION_KIND_KEK, Category: "movies",
		Cause: "drill", Hold: durationpb.New(time.Hour)}); err != nil {
		t.Fatal(err)
	}
	c.wantAlertMetrics()
	if code := c.stop(); code != 0 {
		t.Errorf("stop: exit %d, want 0\n%s", code, c.logText())
	}
}

// eventsHandled is what the metrics say of the topic.
func (c *custody) eventsHandled() (n int) {
	_, rest, _ := strings.Cut(c.metrics(), "\ncustodian_kafka_events_total{result=\"handled\",topic=\"media\"} ")
	_, _ = fmt.Sscan(rest, &n)
	return n
}

// versions is how many KEK versions movies has.
func (c *custody) versions() int {
	c.t.Helper()
	auditor := c.dial(custodian.RoleAuditor)
	defer auditor.Close()
	all, err := auditor.ListKeyVersions(c.t.Context(), "movies")
	if err != nil {
		c.t.Fatal(err)
	}
	return len(all)
}
