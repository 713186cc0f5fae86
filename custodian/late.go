package custodian

import (
	"context"
	"errors"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
)

// A stage is a part of a callback that can take long.
type stage int

const (
	stageAdmission stage = iota // waiting for its turn
	stageLicence                // reading the licence token
	stageStore                  // reading the records
	stageViewer                 // references of the viewer, and revocations
	stageDecide
	stageKEK   // having the KEK, which KMS and token load where it is not
	stageToken // waiting for a session of the token, and opening
	stageShare // waiting for another call that opens the same key, and keeping it
	stageSeal  // to the caller's public key
	stageAudit
	stageCount
)

var stageNames = [stageCount]string{"admission", "licence", "store", "viewer", "decide", "kek", "token", "share", "seal", "audit"}

// A stopwatch is how long the stages of one call took, by real time. It belongs
// to the goroutine of the call. Of a nil one nothing is measured.
type stopwatch struct {
	began, last time.Time
	took        [stageCount]time.Duration
}

type stopwatchKey struct{}

// timed adds a stopwatch to a call.
func timed(ctx context.Context) (context.Context, *stopwatch) {
	now := time.Now()
	w := &stopwatch{began: now, last: now}
	return context.WithValue(ctx, stopwatchKey{}, w), w
}

// stopwatchOf is nil where the call has none.
func stopwatchOf(ctx context.Context) *stopwatch {
	w, _ := ctx.Value(stopwatchKey{}).(*stopwatch)
	return w
}

// end gives the stage the time since the last one ended.
func (w *stopwatch) end(s stage) {
	if w == nil {
		return
	}
	now := time.Now()
	w.took[s] += now.Sub(w.last)
	w.last = now
}

// A lateLog tells of callbacks whose deadline passed: of one a second, and how
// many others there were.
type lateLog struct {
	seldom rate.Sometimes
	untold atomic.Int64
}

func newLateLog() *lateLog { return &lateLog{seldom: rate.Sometimes{Interval: time.Second}} }

// tellLate writes what a call took its time for, where its deadline has passed.
// One that its caller has left is not late.
func (c *Custodian) tellLate(ctx context.Context, w *stopwatch, who Caller, req RetrieveRequest) {
	if !errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return
	}
	c.late.untold.Add(1)
	c.late.seldom.Do(func() {
		attrs := []any{"caller", who.ID, "request_id", req.RequestID, "kids", len(req.KIDs)}
		if end, ok := ctx.Deadline(); ok {
			attrs = append(attrs, "given", short(end.Sub(w.began)))
		}
		attrs = append(attrs, "took", short(time.Since(w.began)))
		for s, took := range w.took {
			if took = short(took); took > 0 {
				attrs = append(attrs, stageNames[s], took)
			}
		}
		log := c.audit.Writing()
		if log.Step != "" {
			attrs = append(attrs, "audit_now", log.Step, "audit_now_for", short(log.For))
		}
		c.log.Warn("a callback was late", append(attrs, "audit_last_sign", short(log.Sign), "audit_last_sync", short(log.Sync), "others", c.late.untold.Swap(0)-1)...)
	})
}

func short(d time.Duration) time.Duration { return d.Round(10 * time.Microsecond) }
