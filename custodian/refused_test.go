package custodian_test

import (
	"errors"
	"strings"
	"testing"
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
