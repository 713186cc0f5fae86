package kafka_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/kafka"
)

var plenty = custodian.EventLimits{DailyCap: 24}

// Every kind of event, in every form.
func TestEvents(t *testing.T) {
	k := newKit(t, plenty)
	keys, err := k.custody.Issue(t.Context(), packager, custodian.IssueRequest{Category: "movies", ContentID: custodian.ContentID("film"),
		Keys: []custodian.KeySpec{{TrackType: "HD", Scheme: custodian.SchemeCENC}}})
	if err != nil {
		t.Fatal(err)
	}
	keys[0].Key.Destroy()
	k.brokerUp()
	k.start(k.custody)
	binary := &kgo.Record{Topic: topic, Value: []byte(`{"category":"movies","content_id":"film"}`), Headers: []kgo.RecordHeader{{Key: "ce_specversion", Value: []byte("1.0")},
		{Key: "ce_id", Value: []byte("p1")}, {Key: "ce_source", Value: []byte("//cms")}, {Key: "ce_type", Value: []byte("media.drm.packaged")}}}
	k.send(batch("b1"), binary, event("s1", "media.drm.session.revoked", `{"session_id":"viewer-7"}`), event("x", "media.drm.compromised", `{"category":"movies"}`))
	k.await("four events", handled(4))
	if s := k.source.Status()[0]; s.Handled != 3 || s.PassedOver != 1 || s.Dead != 0 {
		t.Errorf("got %+v, want 3 handled, one passed over", s)
	}
	if n := k.versions(); n != 2 {
		t.Errorf("%d versions, want 2", n)
	}
	info, err := k.custody.DescribeContentKey(t.Context(), auditor, keys[0].KID)
	if err != nil || info.PackagedTime.IsZero() {
		t.Errorf("packaged: got %+v, %v", info, err)
	}
	revoked, err := k.custody.Revocations(t.Context(), officer)
	if err != nil || len(revoked) != 1 || revoked[0].By != "kafka:media" {
		t.Errorf("revoked: got %+v, %v", revoked, err)
	}
	cats, err := k.custody.Categories(t.Context(), auditor)
	if err != nil || cats[0].Mode != custodian.CategoryOpen {
		t.Errorf("an event froze something: %+v, %v", cats, err)
	}
}

// Plain JSON, with types and fields under other names.
func TestJSONEvents(t *testing.T) {
	k := newKit(t, plenty)
	k.config.Topics[0].Format = kafka.FormatJSON
	k.config.Topics[0].Types = map[string]custodian.EventKind{"*": custodian.EventNewBatch}
	k.config.Topics[0].Fields = kafka.FieldsConfig{ID: "meta.uuid", Type: "meta.kind", Category: "batch.genre", Content: "c", Session: "s"}
	k.brokerUp()
	k.start(k.custody)
	k.send(&kgo.Record{Topic: topic, Value: []byte(`{"meta":{"uuid":"b1"},"batch":{"genre":"movies","size":7}}`)})
	k.await("the event", handled(1))
	if s := k.source.Status()[0]; s.Handled != 1 || k.versions() != 2 {
		t.Errorf("got %+v and %d versions, want a second one", s, k.versions())
	}
}

// What can never be handled goes to the dead-letter topic as it came, with the
// reason, and holds nothing up.
func TestDeadLetters(t *testing.T) {
	k := newKit(t, plenty)
	k.brokerUp()
	structured := func(value string) *kgo.Record {
		r := event("", "", "{}")
		r.Value = []byte(value)
		return r
	}
	bad := []struct {
		name, want string
		record     *kgo.Record
	}{
		{"no JSON", "no JSON object", structured("{")},
		{"nothing", "no JSON object", structured("")},
		{"two values", "more than one JSON value", structured(`{"specversion":"1.0"}{}`)},
		{"no CloudEvent", "no header ce_specversion", &kgo.Record{Topic: topic, Value: []byte(`{"category":"movies"}`)}},
		{"another version", "specversion", structured(`{"specversion":"0.3","id":"1","source":"a","type":"media.drm.batch","data":{"category":"movies"}}`)},
		{"no ID", "id: must be a text", structured(`{"specversion":"1.0","source":"a","type":"media.drm.batch","data":{"category":"movies"}}`)},
		{"data is text", "data: must be a JSON object", structured(`{"specversion":"1.0","id":"1","source":"a","type":"media.drm.batch","data":"movies"}`)},
		{"no category", "category: must be a text", event("1", "media.drm.batch", `{}`)},
		{"category is a number", "category: must be a text", event("1", "media.drm.batch", `{"category":7}`)},
		{"category is no name", "must be 1 to 64", event("1", "media.drm.batch", `{"category":"../movies"}`)},
		{"unknown category", "no such category", event("1", "media.drm.batch", `{"category":"none"}`)},
		{"unknown content", "has no keys", event("1", "media.drm.packaged", `{"category":"movies","content_id":"none"}`)},
		{"too large", "65536 at most", structured(`{"x":"` + strings.Repeat("x", 70_000) + `"}`)},
	}
	var all []*kgo.Record
	for _, b := range bad {
		all = append(all, b.record)
	}
	k.send(append(all, batch("good"))...)
	k.start(k.custody)
	k.await("all events", handled(uint64(len(bad)+1)))
	if s := k.source.Status()[0]; s.Dead != uint64(len(bad)) || s.Handled != 1 || k.versions() != 2 {
		t.Errorf("got %+v and %d versions, want %d dead ones and the good one handled", s, k.versions(), len(bad))
	}
	for i, r := range k.buried(len(bad)) {
		headers := map[string]string{}
		for _, h := range r.Headers {
			headers[h.Key] = string(h.Value)
		}
		if string(r.Value) != string(bad[i].record.Value) || !strings.Contains(headers["custodian-error"], bad[i].want) || headers["custodian-source"] != fmt.Sprintf("media/0/%d", i) {
			t.Errorf("%s: got %v, want an error with %q and the event as it came", bad[i].name, headers, bad[i].want)
		}
	}
}

// The same event again, by a producer that retries or a second message, makes
// no second version; nor does a flood make more than the approval covers.
func TestDuplicatesAndFlood(t *testing.T) {
	k := newKit(t, custodian.EventLimits{DailyCap: 2, MinInterval: time.Hour})
	k.brokerUp()
	k.start(k.custody)
	k.clock.Add(int64(time.Hour))
	k.send(batch("b1"), batch("b1"), batch("b1"))
	k.await("duplicates", handled(3))
	if n := k.versions(); n != 2 {
		t.Errorf("three times one event: %d versions, want 2", n)
	}
	var flood []*kgo.Record
	for i := range 200 {
		flood = append(flood, batch(fmt.Sprintf("f%d", i)))
	}
	k.send(flood...)
	k.await("a flood", handled(203))
	if n := k.versions(); n != 2 {
		t.Errorf("a flood within the interval: %d versions, want 2", n)
	}
	k.clock.Add(int64(2 * time.Hour))
	k.send(batch("g1"), batch("b1"))
	k.await("at the cap", handled(205))
	if n := k.versions(); n != 2 {
		t.Errorf("a flood at the cap: %d versions, want 2", n)
	}
	for range 12 { // a clock that jumps is not believed
		k.clock.Add(int64(2 * time.Hour))
		if err := k.custody.Tick(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	k.send(batch("b1"), batch("g2"))
	k.await("a day later", handled(207))
	if s := k.source.Status()[0]; k.versions() != 3 || s.Dead != 0 {
		t.Errorf("a day later: %d versions and %+v, want one more by the event that is new", k.versions(), s)
	}
}

// A broker that is not there when the source starts, or goes away meanwhile, is
// waited for; what was sent then is handled.
func TestBrokerDown(t *testing.T) {
	t.Parallel() // it waits, and takes little of the CPUs
	k := newKit(t, plenty)
	k.start(k.custody)
	k.await("no broker", func(s kafka.TopicStatus) bool { return !s.Away.IsZero() })
	if w := k.source.Warnings(); len(w) != 1 || !strings.Contains(w[0], "no broker for topic media since") {
		t.Errorf("warnings: got %q", w)
	}
	k.brokerUp()
	k.send(batch("b1"))
	k.await("after it has come", handled(1))
	if w := k.source.Warnings(); len(w) != 0 {
		t.Errorf("warnings: got %q, want none", w)
	}
	k.brokerDown()
	k.await("it goes away", func(s kafka.TopicStatus) bool { return !s.Away.IsZero() })
	k.brokerUp()
	k.send(batch("b2"))
	k.await("after it is back", func(kafka.TopicStatus) bool { return k.versions() == 3 })
	if s := k.source.Status()[0]; s.Dead != 0 || s.LastError != "" && s.Away.IsZero() && !s.HeldUp.IsZero() {
		t.Errorf("at the end: %+v", s)
	}
}

// shaky fails as long as it is down, and can end a source in the middle of an
// event: then the domain has done it, and nobody has heard.
type shaky struct {
	kafka.Custody
	down  atomic.Bool
	calls atomic.Int64
	after func(n int64) error // may be nil; after call n was done
}

func (s *shaky) ReportEvent(ctx context.Context, who custodian.Caller, ev custodian.Event) (custodian.EventResult, error) {
	n := s.calls.Add(1)
	if s.down.Load() {
		return custodian.EventResult{}, fmt.Errorf("kek: %w", custodian.ErrKMSUnavailable)
	}
	res, err := s.Custody.ReportEvent(ctx, who, ev)
	if err == nil && s.after != nil {
		err = s.after(n)
	}
	return res, err
}

// A device that is away holds an event up until it is back, and loses none.
func TestHeldUp(t *testing.T) {
	k := newKit(t, plenty)
	k.brokerUp()
	custody := &shaky{Custody: k.custody}
	custody.down.Store(true)
	k.start(custody)
	k.send(batch("b1"), batch("b2"))
	k.await("held up", func(s kafka.TopicStatus) bool { return !s.HeldUp.IsZero() && custody.calls.Load() > 3 })
	if w := k.source.Warnings(); len(w) != 1 || !strings.Contains(w[0], "held up by an event since") {
		t.Errorf("warnings: got %q", w)
	}
	if s := k.source.Status()[0]; s.Handled != 0 || s.Dead != 0 {
		t.Errorf("while it is away: %+v", s)
	}
	custody.down.Store(false)
	k.await("back", handled(2))
	if s := k.source.Status()[0]; k.versions() != 3 || !s.HeldUp.IsZero() || s.Dead != 0 {
		t.Errorf("back: %d versions, %+v", k.versions(), s)
	}
}

// The process ends before an event is done, after it is done and before its
// offset is committed, and where commits fail: the next one handles what is
// left, and nothing twice.
func TestRestart(t *testing.T) {
	t.Parallel() // it waits, and takes little of the CPUs
	k := newKit(t, plenty)
	k.brokerUp()
	k.cluster.ControlKey(int16(kmsg.OffsetCommit), func(req kmsg.Request) (kmsg.Response, error, bool) {
		k.cluster.KeepControl()
		resp := req.ResponseKind().(*kmsg.OffsetCommitResponse)
		for _, topic := range req.(*kmsg.OffsetCommitRequest).Topics {
			rt := kmsg.NewOffsetCommitResponseTopic()
			rt.Topic, rt.TopicID = topic.Topic, topic.TopicID
			for _, p := range topic.Partitions {
				rp := kmsg.NewOffsetCommitResponseTopicPartition()
				rp.Partition, rp.ErrorCode = p.Partition, kerr.UnknownServerError.Code
				rt.Partitions = append(rt.Partitions, rp)
			}
			resp.Topics = append(resp.Topics, rt)
		}
		return resp, nil, true
	})
	for i := range 6 {
		k.send(batch(fmt.Sprintf("b%d", i)))
	}
	// The third event is done, and the process hears of an error and ends.
	third := make(chan struct{})
	custody := &shaky{Custody: k.custody}
	custody.after = func(n int64) error {
		if n < 3 {
			return nil
		}
		if n == 3 {
			close(third)
		}
		return errors.New("broken")
	}
	stop := k.start(custody)
	<-third
	stop()
	if n := k.versions(); n != 4 {
		t.Fatalf("%d versions after three events, want 4", n)
	}
	again := &shaky{Custody: k.custody}
	stop = k.start(again) // no commit was taken: it begins at the first event
	k.await("all of them", handled(6))
	stop()
	if n := k.versions(); n != 7 || again.calls.Load() != 6 {
		t.Errorf("six events: %d versions and %d events, want 7 and all six again", n, again.calls.Load())
	}
	k.brokerDown() // and with it the fault
	k.brokerUp()
	k.start(k.custody)
	k.await("once more", handled(6))
	k.stop()
	k.start(k.custody)
	k.send(batch("b6"))
	k.await("a new one", handled(1))
	if s := k.source.Status()[0]; s.Handled != 1 || k.versions() != 8 {
		t.Errorf("after a commit: %+v and %d versions, want one event and 8", s, k.versions())
	}
}
