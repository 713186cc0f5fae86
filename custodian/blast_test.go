package custodian_test

import (
	"fmt"
	"testing"

	"github.com/keycustody/custodian/custodian"
)

func TestBlastRadius(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	w.category("sport")
	old := w.issue("movies", "old", "SD")[0].KID
	w.issue("sport", "match", "SD")
	wantErr(t, "release", w.release(narrow, old), nil)
	wantErr(t, "release", w.release(narrow, old), nil)
	w.rotate(custodian.RotationOrder{Kind: custodian.RotateKEK, Category: "movies"})
	young := w.issue("movies", "young", "SD")[0].KID
	wantErr(t, "release", w.release(provider, young), nil)

	radius := func(who custodian.Caller, req custodian.BlastRequest) string {
		t.Helper()
		got := ""
		if err := w.c.BlastRadius(t.Context(), who, req, func(r custodian.BlastRow) error {
			got += fmt.Sprintf("%s %d-%d", r.Key.ContentID, r.Key.BirthKEK, r.Key.KEK.Version)
			for _, g := range r.Given {
				got += fmt.Sprintf(" %s*%d", g.Caller[len("spiffe://test/"):], g.Count)
			}
			got += "; "
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		return got
	}
	kek := func(v uint32) custodian.BlastRequest {
		return custodian.BlastRequest{KEK: custodian.KEKID{Category: "movies", Version: v}}
	}
	// Moving a key away from a version does not un-expose it, and what is born
	// later was never exposed.
	for v, want := range map[uint32]string{1: "old 1-2 packager*1 narrow*2; ", 2: "old 1-2 packager*1 narrow*2; young 2-2 packager*1 provider*1; "} {
		if got := radius(officer, kek(v)); got != want {
			t.Errorf("of movies/%d: got %q, want %q", v, got, want)
		}
	}
	if got, want := radius(auditor, custodian.BlastRequest{Caller: narrow.ID}), "old 1-2 narrow*2; "; got != want {
		t.Errorf("of a caller: got %q, want %q", got, want)
	}
	none := func(custodian.BlastRow) error { t.Error("a row of what is refused"); return nil }
	wantErr(t, "a provider", w.c.BlastRadius(t.Context(), provider, kek(1), none), custodian.ErrDenied)
	wantErr(t, "no such version", w.c.BlastRadius(t.Context(), officer, kek(9), none), custodian.ErrInvalid)
	wantErr(t, "nothing named", w.c.BlastRadius(t.Context(), officer, custodian.BlastRequest{}, none), custodian.ErrInvalid)
}
