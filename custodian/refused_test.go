package custodian_test

import (
	"errors"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/audit"
)

// TestRefuse: what a front door refuses is a denial in the audit log, bounded
// in what a stranger can have written there; and where the log cannot be
// written, the caller hears that.
func TestRefuse(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	from := w.log.Stats().Entries
	long := &custodian.InvalidError{Field: "body", Err: errors.New("\xff" + strings.Repeat("é", 500))}
	r := custodian.Refusal{RequestID: "r1", Action: custodian.ActionIssue, Category: "movies", Door: "speke"}
	if err := w.c.Refuse(t.Context(), packager, r, long); err != error(long) {
		t.Errorf("got %v, want the refusal itself", err)
	}
	r.Category = "No Such\n"
	wantErr(t, "refuse", w.c.Refuse(t.Context(), packager, r, custodian.ErrDenied), custodian.ErrDenied)
	got := w.entries(from)
	if len(got) != 2 {
		t.Fatalf("got %d entries, want 2", len(got))
	}
	if e := got[0]; e.Action != "issue" || e.Outcome != audit.Denied || e.Reason != "INVALID" || e.Caller != packager.ID || e.RequestID != "r1" || e.Category != "movies" ||
		!strings.HasPrefix(e.Detail, "speke: body: ") || len(e.Detail) > 300 || !utf8.ValidString(e.Detail) {
		t.Errorf("got %+v", e)
	}
	if e := got[1]; e.Category != "" || e.Reason != "DENIED" || e.Detail != "speke: not granted" {
		t.Errorf("got %+v", e)
	}
	w.breaker.down("audit.Sync")
	wantErr(t, "refuse without a log", w.c.Refuse(t.Context(), packager, r, custodian.ErrDenied), custodian.ErrAuditBlocked)
}

// TestRefusedTooOften: of what is malformed, or not granted, the log has as many
// entries a second as of other denials, and counts the rest: also of what about
// ceremonies and frozen callers is never counted away where an officer does it.
func TestRefusedTooOften(t *testing.T) {
	w := newWorld(t)
	ctx := t.Context()
	malformed := &custodian.InvalidError{Field: "message", Err: errors.New("no message")}
	const calls, limit = 130, 100
	may := map[string]int{} // entries for each caller: a machine that stands still begins another second
	for _, test := range []struct {
		name string
		who  custodian.Caller
		call func() error
		want error
	}{
		{"malformed", narrow, func() error {
			return w.c.Refuse(ctx, narrow, custodian.Refusal{Action: custodian.ActionRevoke, Door: "gRPC"}, malformed)
		}, custodian.ErrInvalid},
		{"a plan of no officer", provider, func() error {
			_, _, err := w.c.ProposeCeremony(ctx, provider, []byte("kind: rekey"), "", false)
			return err
		}, custodian.ErrDenied},
		{"a plan that is none", officer, func() error {
			_, _, err := w.c.ProposeCeremony(ctx, officer, []byte("kind: none"), "", false)
			return err
		}, custodian.ErrInvalid},
		{"a freeze by no officer", packager, func() error {
			_, err := w.c.FreezeCaller(ctx, packager, custodian.FreezeCallerRequest{Identity: provider.ID, Cause: "no"})
			return err
		}, custodian.ErrDenied},
	} {
		var wg sync.WaitGroup
		began := time.Now()
		for range calls {
			wg.Go(func() {
				if err := test.call(); !errors.Is(err, test.want) {
					t.Errorf("%s: got %v, want %v", test.name, err, test.want)
				}
			})
		}
		wg.Wait()
		may[test.who.ID] = limit * (1 + int(time.Since(began)/time.Second))
	}
	w.close() // which writes what is counted
	written, told := map[string]int{}, map[string]int{}
	for _, e := range w.entries(0) {
		if e.Outcome != audit.Allowed && e.Caller != "" {
			written[e.Caller]++
			told[e.Caller] += int(max(1, e.Count))
		}
	}
	for _, who := range []custodian.Caller{narrow, provider, officer, packager} {
		if n := written[who.ID]; n > may[who.ID]+10 || told[who.ID] != calls {
			t.Errorf("%s: %d entries tell of %d calls; want %d calls, in about %d entries", who.ID, n, told[who.ID], calls, may[who.ID])
		}
	}
}
