package main

import (
	"context"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/keycustody/custodian/custodian"
)

// A badKMS is a KMS that takes its time, or hangs after a while.
type badKMS struct {
	custodian.Provider
	delay   time.Duration
	answers int64 // before it hangs; 0: it never does
	asked   atomic.Int64
}

func (k *badKMS) Unwrap(ctx context.Context, w custodian.OuterWrap, binding []byte) ([]byte, error) {
	wait := k.delay
	if n := k.asked.Add(1); k.answers > 0 && n > k.answers {
		wait = time.Hour
	}
	if wait > 0 {
		t := time.NewTimer(wait)
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
			return nil, custodian.ErrProviderUnavailable
		}
	}
	return k.Provider.Unwrap(ctx, w, binding)
}

const (
	// farAway is what a KMS takes in the same region.
	farAway = 50 * time.Millisecond
	// kmsInFlight leaves the machine some room: where it is full, p99 is that
	// of the queue.
	kmsInFlight = 8
)

// kms is what callers notice of a KMS that hangs while the KEK that they need
// is loaded, beyond the end of its lifetime; and what a KEK costs that is not.
func (r *rig) kms(ctx context.Context) error {
	lifetime := []string{"-kek-lifetime", r.scale.lifetime.String()}
	// It answers for the helper keys at the start, and for the one KEK.
	hang := append([]string{"-kms-answers", strconv.Itoa(len(custodian.HelperPurposes) + 1)}, lifetime...)
	cold := []string{"-kek-lifetime", "1ns", "-kms-delay", farAway.String()}
	var servers [3]*server
	var kids [3]string
	for i, s := range []struct {
		name string
		args []string
	}{{"kms-quiet", lifetime}, {"kms-hang", hang}, {"kms-cold", cold}} {
		data := filepath.Join(r.dir, s.name)
		if _, err := r.prepare(ctx, data, r.scale.keys); err != nil {
			return err
		}
		var err error
		if servers[i], err = r.serve(ctx, roleCallback, s.name, append([]string{"-dir", data}, s.args...)...); err != nil {
			return err
		}
		kids[i] = kidsFile(data)
	}
	for range r.scale.rounds {
		var p99 [3]float64
		for i, inFlight := range []int{kmsInFlight, kmsInFlight, 1} {
			l, err := r.load(ctx, servers[i], loadSpec{methodRetrieve, inFlight, 1, kids[i]})
			if err != nil {
				return err
			}
			p99[i] = l.P99
		}
		r.table.add("callback_p99_us_kms_quiet", p99[0])
		r.table.add("callback_p99_us_kms_hang", p99[1])
		r.table.add("callback_p99_kms_hang_vs_quiet", p99[1]/p99[0])
		r.table.add("callback_cold_p99_ms", p99[2]/1000)
	}
	return r.stopAll()
}
