package custodian_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"filippo.io/age"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/audit"
)

// line is an audit entry as the table below has it: action, outcome, reason,
// caller, role, category and key version.
func line(e audit.Entry) string {
	caller := e.Caller[strings.LastIndex(e.Caller, "/")+1:]
	s := strings.Join([]string{e.Action, e.Outcome.String(), e.Reason, caller, e.Role, e.Category, e.KeyVersion}, " ")
	if e.ControlDigest != nil {
		s += " +"
	}
	return strings.Join(strings.Fields(s), " ")
}

// Every action leaves exactly its entries; " +" marks a change of the control
// set.
func TestAuditEntries(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	w.category("series")
	kid := w.issue("movies", "film-1", "SD")[0].KID
	w.reopen() // a new block is reserved next
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	issue := func(who custodian.Caller, req custodian.IssueRequest) func() error {
		return func() error {
			keys, err := w.c.Issue(ctx, who, req)
			w.remember(keys)
			return err
		}
	}
	retrieve := func(who custodian.Caller, kids ...custodian.KID) func() error {
		return func() error {
			res, err := w.c.Retrieve(ctx, who, custodian.RetrieveRequest{KIDs: kids, RequestID: "request-7"})
			for _, r := range res {
				err = errors.Join(err, r.Err)
				r.Key.Destroy()
			}
			return err
		}
	}
	mode := func(who custodian.Caller, name custodian.CategoryName, m custodian.CategoryMode) func() error {
		return func() error {
			_, err := w.c.SetCategoryMode(ctx, who, custodian.SetModeRequest{Name: name, Mode: m, Cause: "drill"})
			return err
		}
	}
	create := func(who custodian.Caller, name custodian.CategoryName) func() error {
		return func() error {
			_, err := w.c.CreateCategory(ctx, who, custodian.CreateCategoryRequest{Name: name})
			return err
		}
	}
	for _, test := range []struct {
		what string
		do   func() error
		err  error
		want []string
	}{
		{"start", w.open, nil, []string{"start allowed"}},
		{"issue, with a new block", issue(packager, ask("movies", "film-2", "SD", "HD")), nil,
			[]string{"kek.reserve allowed movies movies/1 +", "issue allowed packager packager movies movies/1", "issue allowed packager packager movies movies/1"}},
		{"issue", issue(packager, ask("movies", "film-3", "SD")), nil, []string{"issue allowed packager packager movies movies/1"}},
		{"issue what is there, and more", issue(packager, ask("movies", "film-3", "SD", "HD")), nil,
			[]string{"reissue allowed packager packager movies movies/1", "issue allowed packager packager movies movies/1"}},
		{"issue, denied", issue(provider, ask("movies", "film-4", "SD")), custodian.ErrDenied, []string{"issue denied DENIED provider movies"}},
		{"issue, no grant", issue(nobody, ask("movies", "film-4", "SD")), custodian.ErrDenied, []string{"issue denied DENIED nobody movies"}},
		{"issue, unknown category", issue(packager, ask("none", "film-4", "SD")), custodian.ErrCategoryNotFound, []string{"issue failed CATEGORY_NOT_FOUND packager packager none"}},
		{"issue, content of another category", issue(packager, ask("series", "film-3", "SD")), custodian.ErrContentCategory, []string{"issue failed CONTENT_CATEGORY packager packager series"}},
		{"issue, malformed", issue(packager, ask("movies", "")), custodian.ErrInvalid, nil},
		{"release", retrieve(provider, kid), nil, []string{"release allowed provider drm-provider movies movies/1"}},
		{"release two, one of them unknown", retrieve(provider, custodian.KID{9}, kid), custodian.ErrKeyNotFound,
			[]string{"release failed KEY_NOT_FOUND provider drm-provider", "release allowed provider drm-provider movies movies/1"}},
		{"release, unknown to who may not know", retrieve(narrow, custodian.KID{9}), custodian.ErrDenied, []string{"release denied DENIED narrow drm-provider"}},
		{"release, no grant", retrieve(nobody, kid), custodian.ErrDenied, []string{"release denied DENIED nobody movies"}},
		{"release, malformed", retrieve(provider), custodian.ErrInvalid, nil},
		{"freeze", mode(officer, "movies", custodian.CategoryFrozen), nil, []string{"category.freeze begun officer officer movies", "category.freeze allowed officer officer movies +"}},
		{"release, frozen", retrieve(provider, kid), custodian.ErrCategoryFrozen, []string{"release denied CATEGORY_FROZEN provider drm-provider movies"}},
		{"issue, frozen", issue(packager, ask("movies", "film-3", "SD")), custodian.ErrCategoryFrozen, []string{"issue denied CATEGORY_FROZEN packager packager movies"}},
		{"lift the freeze", mode(officer, "movies", custodian.CategoryOpen), nil, []string{"category.open begun officer officer movies", "category.open allowed officer officer movies +"}},
		{"freeze, denied", mode(operator, "movies", custodian.CategoryFrozen), custodian.ErrDenied, []string{"category.mode denied DENIED operator movies"}},
		{"freeze, unknown category", mode(officer, "none", custodian.CategoryFrozen), custodian.ErrCategoryNotFound, []string{"category.mode failed CATEGORY_NOT_FOUND officer officer none"}},
		{"create", create(officer, "sports"), nil, []string{"category.create begun officer officer sports", "category.create allowed officer officer sports sports/1 +"}},
		{"create, exists", create(officer, "sports"), custodian.ErrCategoryExists, []string{"category.create failed CATEGORY_EXISTS officer officer sports"}},
		{"create, denied", create(packager, "sports"), custodian.ErrDenied, []string{"category.create denied DENIED packager sports"}},
		{"list keys", func() error {
			_, _, err := w.c.ListContentKeys(ctx, auditor, custodian.ListRequest{Category: "movies"})
			return err
		}, nil, nil},
		{"list keys, denied", func() error {
			_, _, err := w.c.ListContentKeys(ctx, operator, custodian.ListRequest{Category: "movies"})
			return err
		}, custodian.ErrDenied, []string{"keys.read denied DENIED operator movies"}},
		{"status, denied", func() error { _, err := w.c.Status(ctx, packager); return err }, custodian.ErrDenied, []string{"status.read denied DENIED packager"}},
		{"backup", func() error { return w.c.Backup(ctx, operator, id.Recipient().String(), new(bytes.Buffer)) }, nil, []string{"backup begun operator operator", "backup allowed operator operator"}},
		{"backup, denied", func() error { return w.c.Backup(ctx, officer, id.Recipient().String(), nil) }, custodian.ErrDenied, []string{"backup denied DENIED officer"}},
		{"policy", func() error { return w.c.SetPolicy(ctx, testPolicy(t)) }, nil, []string{"policy.load begun", "policy.load allowed"}},
	} {
		from := w.log.Size()
		wantErr(t, test.what, test.do(), test.err)
		var got []string
		for _, e := range w.entries(from) {
			got = append(got, line(e))
			w.checkEntry(e)
		}
		if !slices.Equal(got, test.want) {
			t.Errorf("%s: got entries\n\t%s\nwant\n\t%s", test.what, strings.Join(got, "\n\t"), strings.Join(test.want, "\n\t"))
		}
	}
	w.whole()
	w.noKeysIn(w.dir)
}

// checkEntry checks what every entry has.
func (w *world) checkEntry(e audit.Entry) {
	w.t.Helper()
	if !e.Time.Equal(w.now()) {
		w.t.Errorf("%s: got time %s, want the clock's %s", line(e), e.Time, w.now())
	}
	if e.ControlRevision == 0 {
		w.t.Errorf("%s: no control revision", line(e))
	}
	if e.Outcome == audit.Allowed && (e.Action == "issue" || e.Action == "release" || e.Action == "reissue") {
		if len(e.KID) != 16 || len(e.ContentID) == 0 || e.TrackType == "" || e.Scheme == "" || e.Generation != 1 || e.KeyVersion == "" {
			w.t.Errorf("%s: it does not say which key: %+v", line(e), e)
		}
		if (e.StoreSequence != 0) != (e.Action == "issue") {
			w.t.Errorf("%s: got store sequence %d", line(e), e.StoreSequence)
		}
	}
	if e.Action == "release" && e.RequestID != "request-7" {
		w.t.Errorf("%s: got request ID %q", line(e), e.RequestID)
	}
}

// noKeysIn searches the files of a folder for the keys that were answered.
func (w *world) noKeysIn(dir string) {
	w.t.Helper()
	w.close()
	if len(w.answered) == 0 {
		w.t.Error("no key was answered; there is nothing to search for")
	}
	files := 0
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		files++
		for kid, key := range w.answered {
			for form, text := range map[string][]byte{"bytes": key, "hexadecimal": fmt.Appendf(nil, "%x", key), "capitals": fmt.Appendf(nil, "%X", key)} {
				if bytes.Contains(b, text) {
					w.t.Errorf("%s holds content key %s in clear, as %s", filepath.Base(path), kid, form)
				}
			}
		}
		return nil
	})
	if err != nil || files < 2 {
		w.t.Errorf("%d files searched: %v", files, err)
	}
}

// Nothing that is printed of an answer shows a key.
func TestAnswersHideKeys(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	kid := w.issue("movies", "film-1", "SD")[0].KID
	r := w.retrieve(provider, kid)
	defer r.Key.Destroy()
	keys, err := w.c.Issue(context.Background(), packager, ask("movies", "film-1", "SD"))
	if err != nil {
		t.Fatal(err)
	}
	defer keys[0].Key.Destroy()
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%x", "%d", "%q"} {
		for _, answer := range []any{r, keys, &r, &keys[0]} {
			printed := fmt.Sprintf(verb, answer)
			key := w.answered[kid]
			for _, form := range []string{string(key), fmt.Sprintf("%x", key), fmt.Sprintf("%d", key), strings.Trim(fmt.Sprintf("%#v", key), "[]byte{}")} {
				if strings.Contains(printed, form) {
					t.Errorf("%s of %T shows the key", verb, answer)
				}
			}
		}
	}
}
