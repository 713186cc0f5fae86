package custodian_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/keycustody/custodian/custodian"
)

// exported is how many keys an export gives an officer, and why none.
func (a *assembly) exported(req custodian.ExportRequest) (int, error) {
	a.t.Helper()
	keys, err := a.c.Export(a.t.Context(), officer, req)
	for _, k := range keys {
		k.Key.Destroy()
	}
	return len(keys), err
}

// TestTransferCeremonies: where there are officers, keys come in and go out only
// as far as a ceremony permits it: these content items, these keys, this
// recipient, until the plan expires. An officer alone is refused, also with a
// ceremony that permits something else.
func TestTransferCeremonies(t *testing.T) {
	a := newAssembly(t)
	a.category("movies")
	a.category("series")
	a.issue("movies", "film-1", "SD", "HD")
	foreign := a.foreign("SD", 1, 0xa1)
	foreign.Key.Destroy()
	kid := foreign.KID.String()
	const alpha = "ab12cd34ab12cd34ab12cd34ab12cd34ab12cd34ab12cd34ab12cd34ab12cd34"
	in := a.plan("import", fmt.Sprintf("content: [{category: movies, id: film-9}]\nkids: [%s]", kid))
	out := a.plan("export", "content: [{category: movies, id: film-1}]\nrecipient: {name: alpha, certificate: "+alpha+"}")
	bring := func(ceremony, content string, kid, b byte) error {
		req := a.bring("movies", content, a.foreign("SD", kid, b))
		req.Ceremony = ceremony
		_, err := a.take(officer, req)
		return err
	}
	take := custodian.ExportRequest{Category: "movies", ContentID: []byte("film-1"), Recipient: custodian.ExportRecipient("alpha", alpha)}
	export := func(ceremony string, change func(*custodian.ExportRequest)) error {
		req := take
		req.Ceremony = ceremony
		if change != nil {
			change(&req)
		}
		_, err := a.exported(req)
		return err
	}

	a.rehearse(in, `an officer may import keys of content "film-9" in category movies, of the 1 that the plan names, until `)
	a.rehearse(out, `an officer may export the keys of content "film-1" in category movies to alpha, certificate `+alpha+", until ")
	a.refusePlan(strings.Replace(in, "movies", "sport", 1), "there is no category sport")
	wantErr(t, "import by one officer", bring("", "film-9", 1, 0xa1), custodian.ErrQuorum)
	wantErr(t, "export by one officer", export("", nil), custodian.ErrQuorum)
	wantErr(t, "a ceremony that is not there", export("0123456789abcdef", nil), custodian.ErrCeremonyNotFound)
	wantErr(t, "what is no ceremony", export("x", nil), custodian.ErrInvalid)

	proposed := a.propose(in)
	wantErr(t, "import by a ceremony that waits", bring(proposed.ID, "film-9", 1, 0xa1), custodian.ErrCeremonyState)
	a.approve(proposed, in, a.anna, a.ben)
	wantErr(t, "import by a ceremony that is not executed", bring(proposed.ID, "film-9", 1, 0xa1), custodian.ErrCeremonyState)
	if err := a.execute(proposed); err != nil {
		t.Fatal(err)
	}
	imports := proposed.ID
	exports := a.hold(out, a.anna, a.ben).ID
	for _, test := range []struct {
		name string
		err  error
	}{
		{"import of other content", bring(imports, "film-8", 1, 0xa1)},
		{"import of another key", bring(imports, "film-9", 2, 0xa1)},
		{"import by an export", bring(exports, "film-9", 1, 0xa1)},
		{"export by an import", export(imports, nil)},
		{"export of other content", export(exports, func(r *custodian.ExportRequest) { r.ContentID = []byte("film-9") })},
		{"export from another category", export(exports, func(r *custodian.ExportRequest) { r.Category = "series" })},
		{"export to somebody else", export(exports, func(r *custodian.ExportRequest) { r.Recipient = custodian.ExportRecipient("beta", alpha) })},
		{"export to another certificate", export(exports, func(r *custodian.ExportRequest) {
			r.Recipient = custodian.ExportRecipient("alpha", strings.Repeat("0", 64))
		})},
	} {
		wantErr(t, test.name, test.err, custodian.ErrCeremonyState)
	}
	packagerReq := a.bring("movies", "film-9", a.foreign("SD", 1, 0xa1))
	packagerReq.Ceremony = imports
	_, err := a.take(packager, packagerReq)
	wantErr(t, "import by who is no officer", err, custodian.ErrDenied)

	from := a.log.Stats().Entries
	wantErr(t, "import", bring(imports, "film-9", 1, 0xa1), nil)
	wantErr(t, "release of the imported key", a.release(provider, foreign.KID), nil)
	if n, err := a.exported(func() custodian.ExportRequest { r := take; r.Ceremony = exports; return r }()); n != 2 || err != nil {
		t.Errorf("export: got %d keys and %v, want 2", n, err)
	}
	got := a.actions(from)
	for _, want := range []string{"keys.import allowed SD ceremony " + imports, "keys.export allowed HD ceremony " + exports + ": to alpha, certificate " + alpha} {
		if !slices.Contains(got, want) {
			t.Errorf("audit: got %q, want %q", got, want)
		}
	}
	a.reopen()
	wantErr(t, "import again, after a restart", bring(imports, "film-9", 1, 0xa1), nil)
	a.freeze("movies", custodian.CategoryFrozen)
	wantErr(t, "export of a frozen category", export(exports, nil), custodian.ErrCategoryFrozen)
	a.hold(a.plan("unfreeze", "categories: [movies]"), a.anna, a.ben)
	wantErr(t, "export", export(exports, nil), nil)
	a.advance(8 * 24 * time.Hour)
	wantErr(t, "import after the plan expired", bring(imports, "film-9", 1, 0xa1), custodian.ErrCeremonyState)
	wantErr(t, "export after the plan expired", export(exports, nil), custodian.ErrCeremonyState)
	a.noneInClear()
}

// What a plan of these kinds must say.
func TestTransferPlans(t *testing.T) {
	const head = "plan: custodian/1\nkind: %s\nreason: r\nexpires: 2026-11-24T12:00:00Z\n%s"
	const kid = "11111111-2222-4333-8444-000000000001"
	content := "content: [{category: movies, id: film-1}]\n"
	for _, test := range []struct{ kind, body, want string }{
		{"import", content, "kids: a plan of kind import needs it"},
		{"import", "kids: [" + kid + "]\n", "content: a plan of kind import needs it"},
		{"import", content + "kids: [x]\n", "kids[0]"},
		{"import", content + "kids: [" + strings.ToUpper("abcdef00-2222-4333-8444-000000000001") + "]\n", "kids[0]"},
		{"import", content + "kids: [" + kid + ", " + kid + "]\n", "is named twice"},
		{"import", content + "kids: [" + kid + "]\nrecipient: {name: a}\n", "recipient: a plan of kind import has none"},
		{"export", content, "recipient: a plan of kind export needs it"},
		{"export", content + "recipient: {name: a, certificate: ab}\n", "recipient.certificate"},
		{"export", content + "recipient: {name: \"\", certificate: " + strings.Repeat("0", 64) + "}\n", "recipient.name"},
		{"seal", "kids: [" + kid + "]\n", "kids: a plan of kind seal has none"},
	} {
		if _, err := custodian.ParsePlan(fmt.Appendf(nil, head, test.kind, test.body)); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s, %q: got %v, want %q", test.kind, test.body, err, test.want)
		}
	}
}
