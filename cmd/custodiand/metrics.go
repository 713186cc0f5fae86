package main

import (
	"cmp"
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/keycustody/custodian/certs"
	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/kafka"
)

// A collector turns one snapshot of status into metrics at each scrape, so
// that no number is kept twice.
type collector struct {
	custody *custodian.Custodian
	certs   *certs.Server
	events  *kafka.Source
}

func (d *daemon) registerMetrics() {
	d.metrics.MustRegister(&collector{d.custody, d.certs, d.events})
}

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("custodian_"+name, help, labels, nil)
}

var (
	descMEKEnd      = desc("mek_end_timestamp_seconds", "End of the originator-usage period of a MEK.", "label", "state")
	descMEKWarning  = desc("mek_warning_days", "The smallest of 90, 30, 7 and 0 days that the active MEK has not left any more; absent before.", "label")
	descEvents      = desc("kafka_events_total", "Events of the topic, by what became of them.", "topic", "result")
	descEventsHeld  = desc("kafka_held_up", "1 where an event of the topic is tried again and again.", "topic")
	descEventsAway  = desc("kafka_away", "1 where no broker can be reached.", "topic")
	descProvider    = desc("kms_reachable", "1 where the last call to the provider had an answer.", "provider", "kind")
	descKMSCalls    = desc("kms_calls_total", "Calls to the provider.", "provider")
	descKMSFailures = desc("kms_failures_total", "Calls to the provider that failed.", "provider")
	descKMSReasons  = desc("kms_calls_by_reason_total", "Calls to the provider, by why they were made and how they ended.", "provider", "reason", "result")
	descKMSGrace    = desc("kms_grace_left_seconds", "How long loaded keys would serve on from now if the provider does not answer any more.", "provider")
	descKMSRefused  = desc("kms_refused", "1 where the provider's access to its key was taken away, so that there is no grace.", "provider")
	descKMSLogin    = desc("kms_login_refused", "1 where the provider refuses our login: its credentials have to be renewed.", "provider")
	descKMSIncident = desc("kms_incident", "1 while an incident of the provider is open.", "provider")
	descKMSCount    = desc("kms_incidents_total", "Incidents of the provider that were declared.", "provider")
	descRewrapDone  = desc("rewrap_keys_done", "Keys whose outer wraps a job has moved; the job is there until it has ended.", "category")
	descRewrapKeys  = desc("rewrap_keys", "Keys whose outer wraps a job moves.", "category")
	descRotDone     = desc("rotation_records_done", "Records that the rotation's present step is done with.", "rotation", "step")
	descRotTotal    = desc("rotation_records", "Records of the rotation's present step.", "rotation", "step")
	descRotRate     = desc("rotation_records_per_second", "How fast the rotation's present step goes on.", "rotation", "step")
	descRotLeft     = desc("rotation_remaining_seconds", "How long the rotation's present step will take, by that rate.", "rotation", "step")
	descRotFault    = desc("rotation_failing", "1 where the last try of the rotation failed; it is tried again.", "rotation", "step")
	descKeys        = desc("store_content_keys", "Content keys in the store.")
	descStoreBytes  = desc("store_bytes", "Size of the store's file.")
	descEntries     = desc("audit_entries", "Entries in the audit log.")
	descBlocked     = desc("audit_blocked", "1 where the audit log cannot be written, so that nothing is released.")
	descAuditFull   = desc("audit_full", "1 where there is no room for the audit log, so that nothing is released.")
	descAuditBytes  = desc("audit_bytes", "Size of the audit log, all segments.")
	descAuditLimit  = desc("audit_limit_bytes", "Size that the audit log may have: audit.limit, or what the file system has for it.")
	descWatermark   = desc("audit_watermark_percent", "80 or 95 where the audit log has passed that much of its limit, else 0.")
	descSegments    = desc("audit_segments", "Segments of the audit log.")
	descPruned      = desc("audit_pruned_entries", "Entries of the audit log in pruned segments.")
	descAnchorLag   = desc("audit_anchor_lag_entries", "Entries of the audit log that the anchor's newest checkpoint does not cover.", "anchor", "kind")
	descAnchorTime  = desc("audit_anchor_lag_seconds", "Since when the anchor has not had the newest checkpoint, in seconds.", "anchor", "kind")
	descAnchorFail  = desc("audit_anchor_failures_total", "Checkpoints that the anchor did not take.", "anchor", "kind")
	descAnchorAlert = desc("audit_anchor_alert", "1 while the anchor is further behind than anchors.alert_after.", "anchor", "kind")
	descClear       = desc("ceks_in_clear", "CEKs that are in clear at this moment.")
	descAdmInside   = desc("admission_keys_inside", "Keys of GetContentKeys that are worked on.")
	descAdmLimit    = desc("admission_keys_limit", "Keys that may be worked on at once; it falls where they take long to come out.")
	descAdmWaiting  = desc("admission_calls_waiting", "Calls of GetContentKeys that wait for their turn.")
	descAdmRate     = desc("admission_keys_per_second", "Keys that came out while there were too many calls; 0 where there were not, in the last 10 s.")
	descAdmShed     = desc("admission_shed_total", "Calls of GetContentKeys that were refused because they would not have been answered in time.")
	descHotKept     = desc("hot_title_keys", "Opened content keys that are kept in clear now (limits.hot_titles).")
	descHotHits     = desc("hot_title_releases_total", "Releases of a kept content key, without the token.")
	descShared      = desc("shared_opens_total", "Releases that shared the token operation of another call for the same key.")
	descLoads       = desc("kek_loads_total", "KEKs that were unwrapped by KMS and token.")
	descAbandoned   = desc("hsm_abandoned_calls", "Calls to the token that were given up and have not ended.")
	descEpoch       = desc("hsm_epoch", "Connections to the token since the start.")
	descWarnings    = desc("warnings", "Warnings in custodianctl status.")
	descCertEnd     = desc("server_cert_end_timestamp_seconds", "End of validity of our own certificate.")
	descCAEnd       = desc("client_ca_end_timestamp_seconds", "End of validity of a client CA.", "ca")
	descCRLNext     = desc("crl_next_update_timestamp_seconds", "nextUpdate of the revocation list of a client CA.", "ca")
	descCRLState    = desc("crl_state", "State of the revocation list of a client CA: 0 none, 1 good, 2 stale but applied, 3 refusing.", "ca")
	descReloadBad   = desc("certificate_reload_failed", "1 where the last reload of certificates found a bad file and kept the last good one.")
	descBudgetKIDs  = desc("budget_kids", "Different KIDs that a caller has taken of a budget in its window; category * is all together.", "caller", "action", "category")
	descBudgetHard  = desc("budget_hard_kids", "Different KIDs of a budget after which the caller is frozen.", "caller", "action", "category")
	descFrozen      = desc("frozen_callers", "Callers that are frozen, by officers or by a budget that they broke.")
	descRevision    = desc("control_revision", "Revision of the control set.")
)

// Describe sends nothing: the collector is unchecked, since its labels depend
// on the configuration.
func (c *collector) Describe(chan<- *prometheus.Desc) {}

func (c *collector) Collect(out chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second) // the interface gives none
	defer cancel()
	m := sink(out)
	m.certs(c.certs.Status())
	m.events(c.events.Status())
	s, err := c.custody.Snapshot(ctx)
	if err != nil {
		out <- prometheus.NewInvalidMetric(descKeys, err)
		return
	}
	m.meks(s.MEKs)
	m.providers(s.Providers)
	m.work(s.Rewraps, s.Rotations)
	m.audit(s.Audit)
	m.releases(s)
	m.budgets(c.custody.BudgetUse())
	m.gauge(descFrozen, float64(c.custody.CallersFrozen()))
	m.gauge(descKeys, float64(s.Store.ContentKeys))
	m.gauge(descStoreBytes, float64(s.Store.Bytes))
	m.gauge(descAbandoned, float64(s.HSM.Abandoned))
	m.gauge(descEpoch, float64(s.HSM.Epoch))
	m.gauge(descWarnings, float64(len(s.Warnings)))
	m.gauge(descRevision, float64(s.ControlRevision))
}

// A sink takes the metrics of one collection.
type sink chan<- prometheus.Metric

func (m sink) gauge(d *prometheus.Desc, v float64, labels ...string) {
	m <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
}

func (m sink) counter(d *prometheus.Desc, v uint64, labels ...string) {
	m <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
}

func (m sink) events(topics []kafka.TopicStatus) {
	for _, t := range topics {
		m.counter(descEvents, t.Handled, t.Topic, "handled")
		m.counter(descEvents, t.PassedOver, t.Topic, "passed_over")
		m.counter(descEvents, t.Dead, t.Topic, "dead_letter")
		m.gauge(descEventsHeld, number(!t.HeldUp.IsZero()), t.Topic)
		m.gauge(descEventsAway, number(!t.Away.IsZero()), t.Topic)
	}
}

func (m sink) meks(all []custodian.MEKStatus) {
	for _, k := range all {
		m.gauge(descMEKEnd, float64(k.EndTime.Unix()), k.Label, k.State.String())
		if k.Warning != nil {
			m.gauge(descMEKWarning, float64(*k.Warning), k.Label)
		}
	}
}

func (m sink) providers(all []custodian.ProviderStatus) {
	for _, p := range all {
		m.gauge(descProvider, number(p.Reachable), p.Name, p.Kind)
		m.counter(descKMSCalls, p.Calls, p.Name)
		m.counter(descKMSFailures, p.Failures, p.Name)
		m.gauge(descKMSGrace, p.GraceLeft.Seconds(), p.Name)
		m.gauge(descKMSRefused, number(p.Refused != ""), p.Name)
		m.gauge(descKMSLogin, number(p.LoginRefused != ""), p.Name)
		m.gauge(descKMSIncident, number(!p.Incident.IsZero()), p.Name)
		m.counter(descKMSCount, p.Incidents, p.Name)
		for _, n := range p.CallsByReason {
			m.counter(descKMSReasons, n.Count, p.Name, string(n.Reason), string(n.Result))
		}
	}
}

// work is what jobs have done of what there is to do.
func (m sink) work(rewraps []custodian.RewrapStatus, rotations []custodian.RotationStatus) {
	for _, j := range rewraps {
		m.gauge(descRewrapDone, float64(j.Done), string(j.Category))
		m.gauge(descRewrapKeys, float64(j.Total), string(j.Category))
	}
	for _, r := range rotations {
		step := r.Step.String()
		m.gauge(descRotDone, float64(r.Done), r.Name, step)
		m.gauge(descRotTotal, float64(r.Total), r.Name, step)
		m.gauge(descRotRate, r.Rate, r.Name, step)
		m.gauge(descRotLeft, r.Remaining.Seconds(), r.Name, step)
		m.gauge(descRotFault, number(r.LastError != ""), r.Name, step)
	}
}

func (m sink) audit(s custodian.AuditStatus) {
	m.gauge(descEntries, float64(s.Entries))
	m.gauge(descBlocked, number(s.Blocked != ""))
	m.gauge(descAuditFull, number(s.Full))
	m.gauge(descAuditBytes, float64(s.Bytes))
	m.gauge(descAuditLimit, float64(s.Limit))
	m.gauge(descWatermark, float64(s.Watermark))
	m.gauge(descSegments, float64(s.Segments))
	m.gauge(descPruned, float64(s.Pruned))
	for _, a := range s.Anchors {
		m.gauge(descAnchorLag, float64(a.Lag), a.Name, a.Kind)
		m.gauge(descAnchorTime, a.LagTime.Seconds(), a.Name, a.Kind)
		m.counter(descAnchorFail, a.Failures, a.Name, a.Kind)
		m.gauge(descAnchorAlert, number(!a.Alert.IsZero()), a.Name, a.Kind)
	}
}

// releases is how callbacks are doing.
func (m sink) releases(s custodian.Status) {
	m.gauge(descClear, float64(s.CEKsInClear))
	m.gauge(descHotKept, float64(s.Hot.Kept))
	m.counter(descHotHits, s.Hot.Hits)
	m.counter(descShared, s.Hot.Shared)
	m.gauge(descAdmInside, float64(s.Admission.KeysInside))
	m.gauge(descAdmLimit, float64(s.Admission.KeysLimit))
	m.gauge(descAdmWaiting, float64(s.Admission.CallsWaiting))
	m.gauge(descAdmRate, s.Admission.KeysRate)
	m.counter(descAdmShed, s.Admission.Shed)
	m.counter(descLoads, s.KEKLoads)
}

func (m sink) budgets(uses []custodian.BudgetUse) {
	for _, b := range uses {
		category := cmp.Or(string(b.Category), "*")
		m.gauge(descBudgetKIDs, float64(b.KIDs), b.Caller, string(b.Action), category)
		m.gauge(descBudgetHard, float64(b.HardKIDs), b.Caller, string(b.Action), category)
	}
}

func (m sink) certs(st certs.Status) {
	m.gauge(descCertEnd, float64(st.CertNotAfter.Unix()))
	m.gauge(descReloadBad, number(st.ReloadError != nil))
	for _, ca := range st.CAs {
		m.gauge(descCAEnd, float64(ca.NotAfter.Unix()), ca.Name)
		if !ca.CRLNextUpdate.IsZero() {
			m.gauge(descCRLNext, float64(ca.CRLNextUpdate.Unix()), ca.Name)
			m.gauge(descCRLState, float64(ca.CRL), ca.Name)
		}
	}
}

func number(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
