package kafka_test

import (
	"context"
	"log/slog"
	"net"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/custodian/custodiantest"
	"github.com/keycustody/custodian/internal/audit"
	"github.com/keycustody/custodian/internal/kafka"
	"github.com/keycustody/custodian/kms"
	"github.com/keycustody/custodian/store"
)

const (
	topic = "media"
	dead  = "media.dead"
)

var (
	officer  = custodian.Caller{ID: "spiffe://test/officer", Roles: []custodian.Role{custodian.RoleOfficer}, SPKI: [32]byte{1}}
	auditor  = custodian.Caller{ID: "spiffe://test/auditor", Roles: []custodian.Role{custodian.RoleAuditor}}
	packager = custodian.Caller{ID: "spiffe://test/packager", Roles: []custodian.Role{custodian.RolePackager}}
)

// A kit is a custody, a broker and a source between them.
type kit struct {
	t       *testing.T
	clock   atomic.Int64 // Unix nanoseconds
	custody *custodian.Custodian
	cluster *kfake.Cluster
	opts    []kfake.Opt
	config  kafka.Config
	source  *kafka.Source
	stop    func()
}

// newKit has a category, movies, and a broker on a port of its own.
func newKit(t *testing.T, limits custodian.EventLimits) *kit {
	t.Helper()
	k := &kit{t: t, stop: func() {}}
	k.clock.Store(time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC).UnixNano())
	k.openCustody(limits)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := l.Addr().(*net.TCPAddr).Port
	l.Close()
	k.opts = []kfake.Opt{kfake.NumBrokers(1), kfake.Ports(port), kfake.SeedTopics(1, topic, dead), kfake.DataDir(t.TempDir())}
	k.config = kafka.Config{Brokers: []string{l.Addr().String()}, TLS: kafka.TLSConfig{Disable: true},
		Topics: []kafka.TopicConfig{{Name: topic, DeadLetter: dead}}}
	k.config.Default()
	t.Cleanup(func() { k.stop(); k.brokerDown() })
	return k
}

func (k *kit) openCustody(limits custodian.EventLimits) {
	k.t.Helper()
	ctx, dir := k.t.Context(), k.t.TempDir()
	must := func(err error) {
		k.t.Helper()
		if err != nil {
			k.t.Fatal(err)
		}
	}
	local, err := kms.Open(ctx, kms.Config{Name: "local", Kind: "local"})
	must(err)
	policy, err := custodian.NewPolicy([]custodian.Grant{
		{Identity: officer.ID, Role: custodian.RoleOfficer, AllCategories: true, SPKI: &[32]byte{1}},
		{Identity: auditor.ID, Role: custodian.RoleAuditor, AllCategories: true},
		{Identity: packager.ID, Role: custodian.RolePackager, AllCategories: true},
		{Identity: "kafka:" + topic, Role: custodian.RoleEventSource, AllCategories: true},
	})
	must(err)
	st, err := store.Create(ctx, filepath.Join(dir, "store.db"), store.Options{})
	must(err)
	var logged custodian.Logged
	log, err := audit.Create(filepath.Join(dir, "audit"), audit.Options{})
	must(err)
	cfg := custodian.Config{Store: st, HSM: custodiantest.NewHSM(), Providers: []custodian.Provider{local}, DefaultProviders: []string{"local"}, Audit: log,
		Policy: policy, Now: func() time.Time { return time.Unix(0, k.clock.Load()) }, LabelPrefix: "mek", Events: limits}
	must(custodian.Init(ctx, cfg, custodian.InitSpec{}))
	must(log.Close())
	log, err = audit.Open(filepath.Join(dir, "audit"), audit.Options{Visit: logged.Visit})
	must(err)
	cfg.Audit, cfg.Logged = log, logged
	k.custody, err = custodian.Open(ctx, cfg)
	must(err)
	k.t.Cleanup(func() { k.custody.Close(); log.Close(); st.Close() })
	_, err = k.custody.CreateCategory(ctx, officer, custodian.CreateCategoryRequest{Name: "movies"})
	must(err)
}

func (k *kit) brokerUp() {
	k.t.Helper()
	var err error
	if k.cluster, err = kfake.NewCluster(k.opts...); err != nil {
		k.t.Fatal(err)
	}
}

func (k *kit) brokerDown() {
	if k.cluster != nil {
		k.cluster.Close()
		k.cluster = nil
	}
}

// start runs a source on custody until the result is called, or the test ends.
func (k *kit) start(custody kafka.Custody) (stop func()) {
	k.t.Helper()
	if faults := k.config.Check(true); len(faults) > 0 {
		k.t.Fatal(faults)
	}
	k.source = kafka.New(kafka.Options{Config: k.config, Log: slog.New(slog.DiscardHandler), Pause: 10 * time.Millisecond, MaxPause: 50 * time.Millisecond})
	ctx, cancel := context.WithCancel(k.t.Context())
	ended := make(chan struct{})
	go func() { k.source.Run(ctx, custody); close(ended) }()
	k.stop = func() {
		cancel()
		<-ended
		k.stop = func() {}
	}
	return k.stop
}

// client is a client of the test's own.
func (k *kit) client(opts ...kgo.Opt) *kgo.Client {
	k.t.Helper()
	cl, err := kgo.NewClient(append(opts, kgo.SeedBrokers(k.config.Brokers...))...)
	if err != nil {
		k.t.Fatal(err)
	}
	k.t.Cleanup(cl.Close)
	return cl
}

func (k *kit) send(records ...*kgo.Record) {
	k.t.Helper()
	if err := k.client().ProduceSync(k.t.Context(), records...).FirstErr(); err != nil {
		k.t.Fatal(err)
	}
}

// event is a CloudEvent in its structured form.
func event(id, kind, data string) *kgo.Record {
	return &kgo.Record{Topic: topic, Headers: []kgo.RecordHeader{{Key: "content-type", Value: []byte("application/cloudevents+json; charset=utf-8")}},
		Value: []byte(`{"specversion":"1.0","id":"` + id + `","source":"//cms","type":"` + kind + `","data":` + data + `}`)}
}

func batch(id string) *kgo.Record { return event(id, "media.drm.batch", `{"category":"movies"}`) }

// await waits until the first topic's status is as it should be.
func (k *kit) await(what string, ok func(kafka.TopicStatus) bool) {
	k.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(k.source.Status()[0]); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			k.t.Fatalf("%s: it is still at %+v", what, k.source.Status()[0])
		}
	}
}

func handled(n uint64) func(kafka.TopicStatus) bool {
	return func(s kafka.TopicStatus) bool { return s.Handled+s.Dead+s.PassedOver >= n }
}

// buried are the events in the dead-letter topic.
func (k *kit) buried(n int) []*kgo.Record {
	k.t.Helper()
	cl := k.client(kgo.ConsumeTopics(dead), kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()))
	ctx, cancel := context.WithTimeout(k.t.Context(), 20*time.Second)
	defer cancel()
	var out []*kgo.Record
	for len(out) < n && ctx.Err() == nil {
		out = append(out, cl.PollFetches(ctx).Records()...)
	}
	if len(out) != n {
		k.t.Fatalf("%d events in the dead-letter topic, want %d", len(out), n)
	}
	return out
}

// versions is how many KEK versions movies has.
func (k *kit) versions() int {
	k.t.Helper()
	keks, err := k.custody.KeyVersions(k.t.Context(), auditor, "movies")
	if err != nil {
		k.t.Fatal(err)
	}
	return len(keks)
}
