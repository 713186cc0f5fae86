package custodian_test

import (
	"slices"
	"testing"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/audit"
)

// TestSealedOrNotAtAll: every way by which keys leave asks whether they may
// leave in clear, is refused where they may not, and the refusal is a denial in
// the audit log. Import, by which none leaves, goes on.
func TestSealedOrNotAtAll(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	w.category("series")
	kid := w.issue("movies", "film-1", "SD")[0].KID
	other := w.issue("series", "serial-1", "SD")[0].KID
	sealed, err := w.cfg.Policy.WithSealing(custodian.Sealing{Require: []custodian.CategoryName{"movies"}})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.c.SetPolicy(t.Context(), sealed); err != nil {
		t.Fatal(err)
	}
	issue := func(content string, sealable bool) error {
		req := ask("movies", content, "SD")
		req.Sealable = sealable // nobody has a recipient key, so it helps nothing
		keys, err := w.c.Issue(t.Context(), packager, req)
		for _, k := range keys {
			k.Key.Destroy()
		}
		return err
	}
	for _, test := range []struct {
		name  string
		leave func() error
		audit string
	}{
		{"issue", func() error { return issue("film-2", false) }, "issue SEALING_REQUIRED"},
		{"issue, at a front door for sealed keys", func() error { return issue("film-2", true) }, "issue SEALING_REQUIRED"},
		{"issue again", func() error { return issue("film-1", false) }, "issue SEALING_REQUIRED"},
		{"release", func() error { return w.release(provider, kid) }, "release SEALING_REQUIRED"},
		{"export", func() error {
			keys, err := w.c.Export(t.Context(), officer, custodian.ExportRequest{Category: "movies", ContentID: []byte("film-1"), Recipient: "alpha"})
			for _, k := range keys {
				k.Key.Destroy()
			}
			return err
		}, "keys.export SEALING_REQUIRED  to alpha"},
	} {
		t.Run(test.name, func(t *testing.T) {
			from := w.log.Stats().Entries
			wantErr(t, test.name, test.leave(), custodian.ErrSealingRequired)
			if got := w.actions(from); !slices.Equal(got, []string{test.audit}) {
				t.Errorf("audit: got %q, want %q", got, test.audit)
			}
			for _, e := range w.entries(from) {
				if e.Outcome != audit.Denied {
					t.Errorf("audit: outcome %v, want a denial", e.Outcome)
				}
			}
			w.noneInClear()
		})
	}
	wantErr(t, "release from another category", w.release(provider, other), nil)
	_, err = w.take(officer, w.bring("movies", "film-3", w.foreign("SD", 1, 0xa1)))
	wantErr(t, "import", err, nil)
	w.noneInClear()
}
