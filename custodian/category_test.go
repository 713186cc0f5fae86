package custodian_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/keycustody/custodian/custodian"
)

func TestCreateCategoryRefusals(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	for _, test := range []struct {
		what  string
		who   custodian.Caller
		req   custodian.CreateCategoryRequest
		field string
		want  error
	}{
		{"no name", officer, custodian.CreateCategoryRequest{}, "name", custodian.ErrInvalid},
		{"65 letters", officer, custodian.CreateCategoryRequest{Name: custodian.CategoryName(strings.Repeat("x", 65))}, "name", custodian.ErrInvalid},
		{"a window of less than nothing", officer, custodian.CreateCategoryRequest{Name: "series", ReissueWindow: -1}, "reissue_window", custodian.ErrInvalid},
		{"a window of two hundred years", officer, custodian.CreateCategoryRequest{Name: "series", ReissueWindow: 200 * 365 * 24 * time.Hour}, "reissue_window", custodian.ErrInvalid},
		{"a provider twice", officer, custodian.CreateCategoryRequest{Name: "series", Providers: []string{"local", "local"}}, "providers[1]", custodian.ErrInvalid},
		{"an unknown provider", officer, custodian.CreateCategoryRequest{Name: "series", Providers: []string{"local", "vault"}}, "providers[1]", custodian.ErrInvalid},
		{"a request ID that the log does not take", officer, custodian.CreateCategoryRequest{Name: "series", RequestID: "\xff"}, "request_id", custodian.ErrInvalid},
		{"one that exists", officer, custodian.CreateCategoryRequest{Name: "movies"}, "", custodian.ErrCategoryExists},
		{"one that exists, without a grant", packager, custodian.CreateCategoryRequest{Name: "movies"}, "", custodian.ErrDenied},
		{"without a grant", operator, custodian.CreateCategoryRequest{Name: "series"}, "", custodian.ErrDenied},
		{"an officer with another key", custodian.Caller{ID: officer.ID, Roles: officer.Roles, SPKI: [32]byte{2}}, custodian.CreateCategoryRequest{Name: "series"}, "", custodian.ErrDenied},
	} {
		_, err := w.c.CreateCategory(t.Context(), test.who, test.req)
		wantErr(t, test.what, err, test.want)
		var bad *custodian.InvalidError
		if errors.As(err, &bad) != (test.field != "") || bad != nil && bad.Field != test.field {
			t.Errorf("%s: got %v, want field %q", test.what, err, test.field)
		}
	}
	cats, err := w.c.Categories(t.Context(), auditor)
	if err != nil || len(cats) != 1 {
		t.Errorf("after all were refused: got %v and %v, want movies", cats, err)
	}
	w.whole()
}

func TestSetMode(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	kid := w.issue("movies", "film-1", "SD")[0].KID
	for _, test := range []struct {
		what string
		who  custodian.Caller
		req  custodian.SetModeRequest
		want error
	}{
		{"an unknown category", officer, custodian.SetModeRequest{Name: "series", Mode: custodian.CategoryFrozen}, custodian.ErrCategoryNotFound},
		{"no mode", officer, custodian.SetModeRequest{Name: "movies"}, custodian.ErrInvalid},
		{"a mode that is none", officer, custodian.SetModeRequest{Name: "movies", Mode: 5}, custodian.ErrInvalid},
		{"a cause that is too long", officer, custodian.SetModeRequest{Name: "movies", Mode: custodian.CategoryFrozen, Cause: strings.Repeat("x", 1001)}, custodian.ErrInvalid},
		{"a cause that the log does not take", officer, custodian.SetModeRequest{Name: "movies", Mode: custodian.CategoryFrozen, Cause: "a\x00b"}, custodian.ErrInvalid},
		{"without a grant", provider, custodian.SetModeRequest{Name: "movies", Mode: custodian.CategoryFrozen}, custodian.ErrDenied},
	} {
		_, err := w.c.SetCategoryMode(t.Context(), test.who, test.req)
		wantErr(t, test.what, err, test.want)
		wantErr(t, "release after "+test.what, w.release(provider, kid), nil)
	}
	w.freeze("movies", custodian.CategoryFrozen)
	for range 2 {
		wantErr(t, "release of a frozen category", w.release(provider, kid), custodian.ErrCategoryFrozen)
		w.reopen()
	}
	w.freeze("movies", custodian.CategoryOpen)
	w.whole()
}

// Who may not see a category hears the same of it as of one that is not
// there.
func TestReadsAreGranted(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	kid := w.issue("movies", "film-1", "SD", "HD", "AUDIO")[0].KID
	for _, who := range []custodian.Caller{packager, provider, narrow, nobody, {}} {
		_, err := w.c.Categories(t.Context(), who)
		wantErr(t, "categories as "+who.ID, err, custodian.ErrDenied)
		_, err = w.c.Status(t.Context(), who)
		wantErr(t, "status as "+who.ID, err, custodian.ErrDenied)
		wantErr(t, "backup as "+who.ID, w.c.Backup(t.Context(), who, "", nil), custodian.ErrDenied)
		for _, name := range []custodian.CategoryName{"movies", "series"} {
			_, err = w.c.KeyVersions(t.Context(), who, name)
			wantErr(t, "key versions as "+who.ID, err, custodian.ErrDenied)
			_, _, err = w.c.ListContentKeys(t.Context(), who, custodian.ListRequest{Category: name})
			wantErr(t, "list as "+who.ID, err, custodian.ErrDenied)
		}
		for _, k := range []custodian.KID{kid, {9}} {
			_, err = w.c.DescribeContentKey(t.Context(), who, k)
			wantErr(t, "describe as "+who.ID, err, custodian.ErrDenied)
		}
		w.breaker.down("store.ContentKey")
		_, err = w.c.DescribeContentKey(t.Context(), who, kid)
		wantErr(t, "describe from a broken store as "+who.ID, err, custodian.ErrDenied)
		w.breaker.disarm()
	}
	for _, who := range []custodian.Caller{operator, officer} {
		_, _, err := w.c.ListContentKeys(t.Context(), who, custodian.ListRequest{Category: "movies"})
		wantErr(t, "list as "+who.ID, err, custodian.ErrDenied)
		_, err = w.c.DescribeContentKey(t.Context(), who, kid)
		wantErr(t, "describe as "+who.ID, err, custodian.ErrDenied)
	}
	_, err := w.c.DescribeContentKey(t.Context(), auditor, custodian.KID{9})
	wantErr(t, "describe an unknown key", err, custodian.ErrKeyNotFound)
	_, err = w.c.KeyVersions(t.Context(), auditor, "series")
	wantErr(t, "key versions of an unknown category", err, custodian.ErrCategoryNotFound)
	info, err := w.c.DescribeContentKey(t.Context(), auditor, kid)
	if err != nil || info.KID != kid || info.State != custodian.StateActive {
		t.Errorf("describe: got %+v and %v", info, err)
	}
}

func TestListContentKeys(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	w.category("series")
	w.issue("movies", "film-1", tracks(5)...)
	w.issue("movies", "film-2", tracks(2)...)
	w.issue("series", "show-1", tracks(3)...)
	for _, test := range []struct {
		req   custodian.ListRequest
		want  int
		pages int
	}{
		{custodian.ListRequest{Category: "movies"}, 7, 1},
		{custodian.ListRequest{Category: "movies", PageSize: 3}, 7, 3},
		{custodian.ListRequest{Category: "movies", PageSize: 7}, 7, 1},
		{custodian.ListRequest{Category: "movies", ContentID: []byte("film-2")}, 2, 1},
		{custodian.ListRequest{Category: "movies", ContentID: []byte("film-1"), PageSize: 2}, 5, 3},
		{custodian.ListRequest{Category: "movies", ContentID: []byte("show-1")}, 0, 1},
		{custodian.ListRequest{Category: "series", PageSize: 1}, 3, 3},
	} {
		seen, pages := map[custodian.KID]bool{}, 0
		for {
			keys, next, err := w.c.ListContentKeys(t.Context(), auditor, test.req)
			if err != nil {
				t.Fatal(err)
			}
			for _, k := range keys {
				seen[k.KID] = true
			}
			pages++
			if test.req.PageToken = next; next == "" || pages > 9 {
				break
			}
		}
		if len(seen) != test.want || pages != test.pages {
			t.Errorf("%+v: got %d keys on %d pages, want %d on %d", test.req, len(seen), pages, test.want, test.pages)
		}
	}
	for _, token := range []string{"?", "AAAA", "AQE"} {
		_, _, err := w.c.ListContentKeys(t.Context(), auditor, custodian.ListRequest{Category: "movies", PageToken: token})
		wantErr(t, "page token "+token, err, custodian.ErrInvalid)
	}
}
