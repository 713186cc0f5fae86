package kafka

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"strconv"
	"sync"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"

	"github.com/keycustody/custodian/custodian"
)

const (
	// reportTimeout bounds one try to have the domain do what an event calls for.
	reportTimeout = time.Minute
	// produceTimeout bounds one try to bring an event to the dead-letter topic.
	produceTimeout = 30 * time.Second
	// leaveTimeout bounds the farewell of a consumer from its group.
	leaveTimeout = 2 * time.Second
	// pollRecords are handled before their offsets are committed.
	pollRecords = 100
)

// A Custody does what events call for.
type Custody interface {
	ReportEvent(context.Context, custodian.Caller, custodian.Event) (custodian.EventResult, error)
}

// Options are what a Source stands on.
type Options struct {
	Config Config
	Log    *slog.Logger
	// Pause after the first try that failed, and the longest; zero: 1 s and 30 s.
	// They are drawn from half of that up.
	Pause, MaxPause time.Duration
}

// A Source takes events from the configured topics.
type Source struct {
	options Options
	topics  []*consumer
}

// New makes a Source. Nothing is connected before Run.
func New(o Options) *Source {
	if o.Pause == 0 {
		o.Pause = time.Second
	}
	if o.MaxPause == 0 {
		o.MaxPause = 30 * time.Second
	}
	s := &Source{options: o}
	for _, t := range o.Config.Topics {
		s.topics = append(s.topics, &consumer{topic: t, o: &s.options, log: o.Log.With("topic", t.Name)})
	}
	return s
}

// Run has custody do what events call for until ctx ends. Each topic has a
// consumer of its own, so that one that is held up holds up no other.
func (s *Source) Run(ctx context.Context, custody Custody) {
	var running sync.WaitGroup
	for _, c := range s.topics {
		running.Go(func() { c.run(ctx, custody) })
	}
	running.Wait()
}

// A TopicStatus says how it goes with the events of a topic.
type TopicStatus struct {
	Topic string
	// Handled events, those passed over for their type, and those that went to
	// the dead-letter topic, since the start.
	Handled, PassedOver, Dead uint64
	// HeldUp is since when one event is tried again and again, and LastError why.
	HeldUp    time.Time
	LastError string
	// Away is since when no broker could be reached.
	Away time.Time
}

// Status describes the topics in the order of the configuration.
func (s *Source) Status() []TopicStatus {
	out := make([]TopicStatus, len(s.topics))
	for i, c := range s.topics {
		c.mu.Lock()
		out[i] = c.status
		c.mu.Unlock()
		out[i].Topic = c.topic.Name
	}
	return out
}

// Warnings are sentences for the daemon's status.
func (s *Source) Warnings() (w []string) {
	for _, t := range s.Status() {
		if !t.Away.IsZero() {
			w = append(w, fmt.Sprintf("kafka: no broker for topic %s since %s: %s", t.Topic, t.Away.UTC().Format(time.RFC3339), t.LastError))
		} else if !t.HeldUp.IsZero() {
			w = append(w, fmt.Sprintf("kafka: topic %s is held up by an event since %s: %s", t.Topic, t.HeldUp.UTC().Format(time.RFC3339), t.LastError))
		}
	}
	return w
}

// A consumer takes the events of one topic.
type consumer struct {
	topic TopicConfig
	o     *Options
	log   *slog.Logger

	// mu guards the field below.
	mu     sync.Mutex
	status TopicStatus
}

func (c *consumer) client() (*kgo.Client, error) {
	tls, err := c.o.Config.tlsConfig()
	if err != nil {
		return nil, fmt.Errorf("kafka.tls.%w", err)
	}
	opts := []kgo.Opt{
		kgo.SeedBrokers(c.o.Config.Brokers...), kgo.ClientID("custodiand"),
		kgo.ConsumerGroup(c.o.Config.Group), kgo.ConsumeTopics(c.topic.Name),
		kgo.DisableAutoCommit(), // only what is done is committed
		// A group that is new begins with the first event that there is.
		kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()),
		kgo.RecordDeliveryTimeout(produceTimeout), kgo.RequiredAcks(kgo.AllISRAcks()),
		kgo.FetchMaxWait(500 * time.Millisecond),
		kgo.WithHooks(c),
	}
	if tls != nil {
		opts = append(opts, kgo.DialTLSConfig(tls))
	}
	if s := c.o.Config.SASL; s != (SASLConfig{}) {
		opts = append(opts, kgo.SASL(mechanisms[s.Mechanism](s.login)))
	}
	return kgo.NewClient(opts...)
}

// OnBrokerConnect takes down how it goes with the brokers. The client calls it.
func (c *consumer) OnBrokerConnect(_ kgo.BrokerMetadata, _ time.Duration, _ net.Conn, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case err == nil:
		c.status.Away = time.Time{}
	case c.status.Away.IsZero():
		c.status.Away = time.Now()
		c.log.Warn("kafka: a broker cannot be reached", "err", err)
	}
	if err != nil {
		c.status.LastError = err.Error()
	}
}

func (c *consumer) run(ctx context.Context, custody Custody) {
	cl, err := c.client()
	for ; err != nil; cl, err = c.client() { // a file that it needs is gone since the start
		c.holdUp(err)
		if !sleep(ctx, c.o.MaxPause) {
			return
		}
	}
	defer func() {
		leave, cancel := context.WithTimeout(context.WithoutCancel(ctx), leaveTimeout)
		defer cancel()
		if err := cl.LeaveGroupContext(leave); err != nil {
			c.log.Warn("kafka: leaving the group", "err", err)
		}
		cl.Close()
	}()
	for ctx.Err() == nil {
		fetches := cl.PollRecords(ctx, pollRecords)
		fetches.EachError(func(_ string, partition int32, err error) {
			if ctx.Err() == nil {
				c.log.Error("kafka: fetch", "partition", partition, "err", err)
			}
		})
		var done []*kgo.Record
		for records := fetches.RecordIter(); !records.Done(); {
			r := records.Next()
			if !c.handle(ctx, custody, cl, r) {
				break
			}
			done = append(done, r)
		}
		c.commit(ctx, cl, done)
	}
}

// commit says that records are done. Where that fails, or the process ends
// before, they come again, and the domain knows them.
func (c *consumer) commit(ctx context.Context, cl *kgo.Client, done []*kgo.Record) {
	if len(done) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), leaveTimeout)
	defer cancel()
	if err := cl.CommitRecords(ctx, done...); err != nil {
		c.log.Warn("kafka: commit; the events will come again", "events", len(done), "err", err)
	}
}

// handle has the domain do what an event calls for, or puts the event where a
// person finds it. It tries until it is done; false: ctx ended first.
func (c *consumer) handle(ctx context.Context, custody Custody, cl *kgo.Client, r *kgo.Record) bool {
	ev, err := c.topic.decode(r)
	if errors.Is(err, errPassedOver) {
		c.note(func(s *TopicStatus) { s.PassedOver++ })
		return true
	}
	for pause := c.o.Pause; ; pause = min(2*pause, c.o.MaxPause) {
		if err == nil {
			err = c.report(ctx, custody, ev)
		}
		dead := err != nil && forGood(err)
		if dead {
			if perr := c.bury(ctx, cl, r, err); perr != nil {
				// The verdict on the event stays.
				c.holdUp(fmt.Errorf("dead-letter topic %s: %w", c.topic.DeadLetter, perr))
				if !sleep(ctx, pause) {
					return false
				}
				continue
			}
		}
		if err == nil || dead {
			c.note(func(s *TopicStatus) {
				s.HeldUp, s.LastError = time.Time{}, ""
				if s.Handled++; dead {
					s.Handled, s.Dead = s.Handled-1, s.Dead+1
				}
			})
			return true
		}
		if ctx.Err() != nil {
			return false
		}
		c.holdUp(fmt.Errorf("event %s at %s: %w", ev.ID, place(r), err))
		if !sleep(ctx, pause) {
			return false
		}
		err = nil
	}
}

func (c *consumer) report(ctx context.Context, custody Custody, ev custodian.Event) error {
	ctx, cancel := context.WithTimeout(ctx, reportTimeout)
	defer cancel()
	res, err := custody.ReportEvent(ctx, c.topic.caller(), ev)
	if err == nil {
		c.log.Info("kafka: event", "id", ev.ID, "kind", string(ev.Kind), "category", string(ev.Category), "rotated", res.Rotated, "marked", res.Marked, "reason", res.Reason)
	}
	return err
}

// forGood says whether an event can be handled at no later time either, unless
// a person changes something. Everything else is tried again.
func forGood(err error) bool {
	for _, never := range []error{errMalformed, custodian.ErrInvalid, custodian.ErrDenied, custodian.ErrCategoryNotFound, custodian.ErrKeyNotFound,
		custodian.ErrContentCategory, custodian.ErrCallerFrozen} {
		if errors.Is(err, never) {
			return true
		}
	}
	return false
}

// bury puts an event that can never be handled into the dead-letter topic, as it
// came, with where it came from and why it is there.
func (c *consumer) bury(ctx context.Context, cl *kgo.Client, r *kgo.Record, why error) error {
	c.log.Error("kafka: an event cannot be handled", "at", place(r), "dead_letter", c.topic.DeadLetter, "err", why)
	dead := &kgo.Record{Topic: c.topic.DeadLetter, Key: r.Key, Value: r.Value, Headers: append(r.Headers[:len(r.Headers):len(r.Headers)],
		kgo.RecordHeader{Key: "custodian-source", Value: []byte(place(r))},
		kgo.RecordHeader{Key: "custodian-error", Value: []byte(why.Error())})}
	return cl.ProduceSync(ctx, dead).FirstErr()
}

// place names a record: topic/partition/offset.
func place(r *kgo.Record) string {
	return r.Topic + "/" + strconv.Itoa(int(r.Partition)) + "/" + strconv.FormatInt(r.Offset, 10)
}

func (c *consumer) note(f func(*TopicStatus)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f(&c.status)
}

// holdUp takes down that an event waits.
func (c *consumer) holdUp(err error) {
	c.log.Warn("kafka: an event waits", "err", err)
	c.note(func(s *TopicStatus) {
		s.LastError = err.Error()
		if s.HeldUp.IsZero() {
			s.HeldUp = time.Now()
		}
	})
}

// sleep waits for d, less up to half of it; false: ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d - rand.N(d/2+1))
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
