package custodian_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/keycustody/custodian/custodian"
)

// A callback whose deadline passes is told of, with the stage that took its
// time: the one that is held up here for longer than the call has.
func TestLateCallback(t *testing.T) {
	const given = 60 * time.Millisecond
	for _, test := range []struct {
		op, stage, also string
		calls           int
	}{
		{"store.View", "store", "audit_last_sync=", 3},
		{"kms.Unwrap", "kek", "audit_last_sync=", 1}, // the KEK is not loaded after a start, and is after it
		{"hsm.Open", "token", "audit_last_sync=", 3},
		{"audit.Sync", "audit", "audit_now=sync", 3},
	} {
		t.Run(test.stage, func(t *testing.T) {
			w := newWorld(t)
			w.category("movies")
			kid := w.issue("movies", "film", "SD")[0].KID
			var log bytes.Buffer
			w.cfg.Log = slog.New(slog.NewTextHandler(&log, nil))
			w.reopen()
			if test.stage != "kek" {
				wantErr(t, "release", w.release(provider, kid), nil)
			}
			if got := late(log.String()); len(got) != 0 {
				t.Fatalf("a callback in time: got %s", got)
			}
			for i := range test.calls {
				w.lateCall(fmt.Sprintf("late-%d", i+1), test.op, given, kid)
			}
			told := late(log.String())
			if len(told) != 1 {
				t.Fatalf("%d late callbacks within a second: got %d lines, want one:\n%s", test.calls, len(told), log.String())
			}
			for _, want := range []string{"level=WARN", "caller=" + provider.ID, "request_id=late-1", "kids=1", "given=", test.also, "others=0"} {
				if !strings.Contains(told[0], want) {
					t.Errorf("got %s, want %s in it", told[0], want)
				}
			}
			m := regexp.MustCompile(` ` + test.stage + `=(\S+)`).FindStringSubmatch(told[0])
			if m == nil {
				t.Fatalf("no stage %s in %s", test.stage, told[0])
			}
			if took, err := time.ParseDuration(m[1]); err != nil || took < given*9/10 {
				t.Errorf("%s=%s, want about %s at least: %s", test.stage, m[1], given, told[0])
			}
		})
	}
}

// What was left out is counted in the next line, a second later.
func TestLateCallbacksAreCounted(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	kid := w.issue("movies", "film", "SD")[0].KID
	var log bytes.Buffer
	w.cfg.Log = slog.New(slog.NewTextHandler(&log, nil))
	w.reopen()
	began := time.Now()
	for range 4 {
		w.lateCall("late", "hsm.Open", time.Millisecond, kid)
	}
	time.Sleep(time.Until(began.Add(1100 * time.Millisecond)))
	w.lateCall("late", "hsm.Open", time.Millisecond, kid)
	told := late(log.String())
	if len(told) != 2 || !strings.Contains(told[1], "others=3") {
		t.Errorf("got %q, want two lines, the second for three others", told)
	}
	// Who leaves before the deadline is not late.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := w.c.Retrieve(ctx, provider, custodian.RetrieveRequest{KIDs: []custodian.KID{kid}}); err == nil {
		t.Error("a callback that nobody waits for is answered")
	}
	if got := late(log.String()); len(got) != 2 {
		t.Errorf("a caller who has left: got %q", got[2:])
	}
}

// lateCall is a callback with so much time, in which op is held up for a little
// longer.
func (w *world) lateCall(id, op string, given time.Duration, kid custodian.KID) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), given)
	defer cancel()
	release := w.breaker.block(op)
	defer release()
	over := time.AfterFunc(given+5*time.Millisecond, release)
	defer over.Stop()
	results, err := w.c.Retrieve(ctx, provider, custodian.RetrieveRequest{RequestID: id, KIDs: []custodian.KID{kid}})
	if err == nil {
		err = results[0].Err
		results[0].Key.Destroy()
	}
	wantErr(w.t, "a callback that is held up in "+op, err, custodian.ErrDeadline)
}

// late are the lines of a log that tell of late callbacks.
func late(log string) (lines []string) {
	for line := range strings.Lines(log) {
		if strings.Contains(line, `msg="a callback was late"`) {
			lines = append(lines, line)
		}
	}
	return lines
}
