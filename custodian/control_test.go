package custodian_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/keycustody/custodian/custodian"
)

// TestChangeIsWrittenBeforeItHolds: an officer lifts a freeze and goes away in
// the middle. The key is not released before the log has the change, with
// who made it.
func TestChangeIsWrittenBeforeItHolds(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	kid := w.issue("movies", "film-1", "SD")[0].KID
	w.freeze("movies", custodian.CategoryFrozen)
	ctx, cancel := context.WithCancel(t.Context())
	w.breaker.afterwards("store.Update", cancel) // the caller leaves while the store commits
	_, _ = w.c.SetCategoryMode(ctx, officer, custodian.SetModeRequest{Name: "movies", Mode: custodian.CategoryOpen, Cause: "all clear"})
	wantErr(t, "release", w.release(provider, kid), nil)
	entries := w.entries(0)
	opened, released := -1, -1
	for i, e := range entries {
		if e.Action == "category.open" && e.Caller == officer.ID {
			opened = i
		}
		if e.Action == "release" {
			released = i
		}
	}
	if opened < 0 || released < opened {
		t.Errorf("the log has the opening at %d and the release at %d, want the opening first, with who made it", opened, released)
	}
}

// TestCategoriesDoNotWaitForEachOther: while one category is rotated behind a
// KMS that hangs, another one issues.
func TestCategoriesDoNotWaitForEachOther(t *testing.T) {
	w := newWorld(t)
	w.cfg.GCMLimits = custodian.GCMLimits{Block: 2, Soft: 4, Hard: 1 << 20}
	w.reopen()
	w.category("movies")
	w.category("series")
	for i := range 3 {
		w.issue("movies", string(rune('a'+i)), "SD")
	}
	release := w.breaker.block("kms.Wrap")
	defer release()
	done := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		_, err := w.c.Issue(ctx, packager, ask("movies", "z", "SD"))
		done <- err
	}()
	time.Sleep(50 * time.Millisecond)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	keys, err := w.c.Issue(ctx, packager, ask("series", "show-1", "SD"))
	w.remember(keys)
	wantErr(t, "issue in another category while the KMS hangs", err, nil)
	release()
	if err := <-done; err != nil && !errors.Is(err, custodian.ErrDeadline) {
		t.Errorf("issue in the category that was rotated: %v", err)
	}
}
