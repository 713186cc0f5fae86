package rpc

import (
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/keycustody/custodian/certs"
	"github.com/keycustody/custodian/custodian"
)

// metrics count calls and keys. Their labels have few values: methods of the
// contract and reasons of the table, never a KID. Only the expiry of
// certificates is told by caller.
type metrics struct {
	calls      *prometheus.CounterVec
	latency    *prometheus.HistogramVec
	inFlight   prometheus.Gauge
	released   prometheus.Counter
	issued     *prometheus.CounterVec
	results    *prometheus.CounterVec
	missing    prometheus.Counter
	crowded    prometheus.Counter
	handshakes *prometheus.CounterVec
	peerEnd    *prometheus.GaugeVec
	peerEnds   sync.Map // caller's name to the NotAfter that peerEnd shows
}

func newMetrics(r prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		calls: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "custodian_calls_total",
			Help: "Calls that ended, by method and reason; OK where the call succeeded."}, []string{"method", "reason"}),
		latency: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "custodian_call_seconds",
			Help:    "Time from the decoded request to the answer, by method.",
			Buckets: []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 5, 30}}, []string{"method"}),
		inFlight: prometheus.NewGauge(prometheus.GaugeOpts{Name: "custodian_calls_in_flight", Help: "Calls under way."}),
		released: prometheus.NewCounter(prometheus.CounterOpts{Name: "custodian_keys_released_total",
			Help: "Content keys handed out by GetContentKeys."}),
		issued: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "custodian_keys_issued_total",
			Help: "Content keys handed out to packagers, by IssueContentKeys or another front door, new or again."}, []string{"kind"}),
		results: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "custodian_keys_refused_total",
			Help: "KIDs that GetContentKeys did not release, by reason."}, []string{"reason"}),
		missing: prometheus.NewCounter(prometheus.CounterOpts{Name: "custodian_data_integrity_alerts_total",
			Help: "KIDs that a caller who may know asked for and that do not exist: a key is lost, or a title was packaged elsewhere. Page."}),
	}
	m.crowded = prometheus.NewCounter(prometheus.CounterOpts{Name: "custodian_calls_without_place_total",
		Help: "Calls over HTTPS that were refused because their caller had too many under way."})
	m.handshakes = prometheus.NewCounterVec(prometheus.CounterOpts{Name: "custodian_handshakes_refused_total",
		Help: "Connections that ended while shaking hands, by listener and reason."}, []string{"listener", "reason"})
	m.peerEnd = prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "custodian_peer_cert_end_timestamp_seconds",
		Help: "End of validity of the certificate that a caller showed last."}, []string{"caller"})
	for _, c := range []prometheus.Collector{m.calls, m.latency, m.inFlight, m.released, m.issued, m.results, m.missing, m.crowded, m.handshakes, m.peerEnd} {
		if err := r.Register(c); err != nil {
			return nil, err
		}
	}
	m.begin()
	return m, nil
}

// begin shows at zero what an alert waits for: a counter that is there only once
// it has counted has not increased for Prometheus, and the first time, which may
// be the only one, would be missed.
func (m *metrics) begin() {
	for _, reason := range Reasons() {
		m.results.WithLabelValues(string(reason))
	}
	for method := range actions {
		m.calls.WithLabelValues(method, string(reasonOf(custodian.ErrRecordCorrupt)))
	}
	for _, listener := range []string{listenerGRPC, listenerTwin, listenerPackagers} {
		for _, refused := range refusedCertificates {
			m.handshakes.WithLabelValues(listener, refused.reason)
		}
	}
}

func (m *metrics) observe(method, reason string, took time.Duration) {
	m.calls.WithLabelValues(method, reason).Inc()
	m.latency.WithLabelValues(method).Observe(took.Seconds())
}

// countIssued counts the keys of one answer.
func (m *metrics) countIssued(keys []custodian.IssuedKey) {
	created := 0
	for i := range keys {
		if keys[i].Created {
			created++
		}
	}
	m.issued.WithLabelValues("new").Add(float64(created))
	m.issued.WithLabelValues("again").Add(float64(len(keys) - created))
}

// refused counts one KID. KEY_NOT_FOUND is said only to those who may know, so
// each one is an incident.
func (m *metrics) refused(reason custodian.Reason) {
	m.results.WithLabelValues(string(reason)).Inc()
	if reason == reasonOf(custodian.ErrKeyNotFound) {
		m.missing.Inc()
	}
}

// peer shows when the caller's certificate ends. A caller's certificate seldom
// changes, so mostly this is one look.
func (m *metrics) peer(who certs.Peer) {
	if shown, ok := m.peerEnds.Load(who.Name); ok && shown == who.NotAfter {
		return
	}
	m.peerEnds.Store(who.Name, who.NotAfter)
	m.peerEnd.WithLabelValues(who.Name).Set(float64(who.NotAfter.Unix()))
}
