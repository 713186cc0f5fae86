package custodian_test

import (
	"errors"
	"testing"

	"github.com/keycustody/custodian/custodian"
)

// An auditor of one category reads and proves entries of that category only.
func TestAuditorOfOneCategory(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	w.category("series")
	ctx := t.Context()
	movie := w.issue("movies", "film-1", "SD")[0]
	episode := w.issue("series", "episode-1", "SD")[0]
	p, err := custodian.NewPolicy([]custodian.Grant{
		{Identity: auditor.ID, Role: custodian.RoleAuditor, Categories: []custodian.CategoryName{"movies"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.c.SetPolicy(ctx, p); err != nil {
		t.Fatal(err)
	}
	query := func(name string) custodian.AuditQuery {
		return custodian.AuditQuery{PageSize: 100, AuditFilter: custodian.AuditFilter{Category: name, Action: "issue"}}
	}
	page, _, err := w.c.AuditEntries(ctx, auditor, query("movies"))
	if err != nil || len(page) != 1 || page[0].Index != movie.Receipt.Index {
		t.Errorf("own category: %+v, %v", page, err)
	}
	for _, name := range []string{"series", "", "none"} {
		if page, _, err := w.c.AuditEntries(ctx, auditor, query(name)); !errors.Is(err, custodian.ErrDenied) {
			t.Errorf("category %q: %d entries, %v, want ErrDenied", name, len(page), err)
		}
	}
	if got, err := w.c.AuditInclusion(ctx, auditor, movie.Receipt.Index, 0); err != nil || got.LeafHash != movie.Receipt.LeafHash {
		t.Errorf("own entry: %v", err)
	}
	for _, index := range []uint64{episode.Receipt.Index, 0} {
		if _, err := w.c.AuditInclusion(ctx, auditor, index, 0); !errors.Is(err, custodian.ErrDenied) {
			t.Errorf("entry %d: error = %v, want ErrDenied", index, err)
		}
	}
	if _, _, err := w.c.AuditCheckpoint(ctx, auditor); err != nil {
		t.Errorf("checkpoint: %v", err)
	}
	if _, _, err := w.c.AuditCheckpoint(ctx, operator); !errors.Is(err, custodian.ErrDenied) {
		t.Errorf("checkpoint for an operator: error = %v, want ErrDenied", err)
	}
}
