package custodian_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/audit"
)

const (
	aSession = "session-7f3a-watermarked"
	aUser    = "viewer-4711@example.com"
)

// An auditor who has a session's ID, or a user's, finds the releases for it,
// refused ones too. Neither ID is in any file, nor in the entry that says that
// somebody searched; and who is no auditor finds nothing.
func TestPseudonyms(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	w.category("series")
	ctx := t.Context()
	kid := w.issue("movies", "film-1", "SD")[0].KID
	other := w.issue("series", "episode-1", "SD")[0].KID
	get := func(who custodian.Caller, session, user string, kids ...custodian.KID) {
		t.Helper()
		res, err := w.c.Retrieve(ctx, who, custodian.RetrieveRequest{KIDs: kids, SessionID: session, UserID: user})
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range res {
			r.Key.Destroy()
		}
	}
	from := w.log.Size()
	get(provider, aSession, aUser, kid, other)
	get(narrow, aSession, "", other) // refused
	get(provider, "another session", aUser, kid)
	get(provider, aUser, "", kid) // a session that has the name of a user
	get(provider, "", "", kid)

	find := func(who custodian.Caller, q custodian.AuditQuery) ([]uint64, error) {
		q.PageSize = 100
		page, _, err := w.c.AuditEntries(ctx, who, q)
		var found []uint64
		for _, e := range page {
			if e.Action != "audit.lookup" {
				found = append(found, e.Index-from)
			}
		}
		return found, err
	}
	for _, test := range []struct {
		what string
		q    custodian.AuditQuery
		want []uint64
	}{
		{"session", custodian.AuditQuery{SessionID: aSession}, []uint64{0, 1, 2}},
		{"session, allowed only", custodian.AuditQuery{SessionID: aSession, AuditFilter: custodian.AuditFilter{Outcome: audit.Allowed}}, []uint64{0, 1}},
		{"user", custodian.AuditQuery{UserID: aUser}, []uint64{0, 1, 3}},
		{"session that is named like the user", custodian.AuditQuery{SessionID: aUser}, []uint64{4}},
		{"nobody", custodian.AuditQuery{SessionID: aSession + "x"}, nil},
		{"session, one category", custodian.AuditQuery{SessionID: aSession, AuditFilter: custodian.AuditFilter{Category: "movies"}}, []uint64{0}},
	} {
		before := w.log.Size()
		if got, err := find(auditor, test.q); err != nil || !slices.Equal(got, test.want) {
			t.Errorf("%s: got entries %d, %v, want %d", test.what, got, err, test.want)
		}
		wrote := w.entries(before)
		if len(wrote) != 1 || wrote[0].Action != "audit.lookup" || wrote[0].Caller != auditor.ID || len(wrote[0].Refs) != 1 {
			t.Errorf("%s: the search left %+v, want one entry with its reference", test.what, wrote)
		}
	}
	for _, who := range []custodian.Caller{provider, packager, officer, operator, nobody} {
		before := w.log.Size()
		if got, err := find(who, custodian.AuditQuery{SessionID: aSession}); !errors.Is(err, custodian.ErrDenied) || len(got) > 0 {
			t.Errorf("%s: got entries %d, %v, want ErrDenied", who.ID, got, err)
		}
		if wrote := w.entries(before); len(wrote) != 1 || wrote[0].Outcome != audit.Denied || len(wrote[0].Refs) != 0 {
			t.Errorf("%s: the refusal left %+v", who.ID, wrote)
		}
	}
	if _, err := find(auditor, custodian.AuditQuery{SessionID: aSession, UserID: aUser}); !errors.Is(err, custodian.ErrInvalid) {
		t.Errorf("session and user: %v, want ErrInvalid", err)
	}
	long := strings.Repeat("x", custodian.MaxViewerSize+1)
	if _, err := w.c.Retrieve(ctx, provider, custodian.RetrieveRequest{KIDs: []custodian.KID{kid}, SessionID: long}); !errors.Is(err, custodian.ErrInvalid) || strings.Contains(err.Error(), long) {
		t.Errorf("a session of %d bytes: %v, want ErrInvalid without it", len(long), err)
	}

	// It holds over a restart, and another custody has other references.
	w.reopen()
	if got, err := find(auditor, custodian.AuditQuery{SessionID: aSession}); err != nil || !slices.Equal(got, []uint64{0, 1, 2}) {
		t.Errorf("after a restart: %d, %v", got, err)
	}
	mac := w.entries(from)[0].Refs[0].MAC
	w2 := newWorld(t)
	w2.category("movies")
	kid2 := w2.issue("movies", "film-1", "SD")[0].KID
	from2 := w2.log.Size()
	if _, err := w2.c.Retrieve(ctx, provider, custodian.RetrieveRequest{KIDs: []custodian.KID{kid2}, SessionID: aSession}); err != nil {
		t.Fatal(err)
	}
	if w2.entries(from2)[0].Refs[0].MAC == mac {
		t.Error("two custodies have the same reference for a session")
	}
	w.close()
	err := filepath.WalkDir(w.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		for _, id := range []string{aSession, aUser} {
			if strings.Contains(string(b), id) {
				t.Errorf("%s holds %q", filepath.Base(path), id)
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// Where the reference cannot be made, nothing is released: the leak could not
// be traced.
func TestNoPseudonymNoRelease(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	kid := w.issue("movies", "film-1", "SD")[0].KID
	w.hsm.Fail("CMAC", custodian.ErrHSMUnavailable, 1)
	from := w.log.Size()
	res, err := w.c.Retrieve(t.Context(), provider, custodian.RetrieveRequest{KIDs: []custodian.KID{kid}, SessionID: aSession})
	if !errors.Is(err, custodian.ErrHSMUnavailable) || len(res) > 0 {
		t.Errorf("got %d results, %v, want ErrHSMUnavailable", len(res), err)
	}
	if wrote := w.entries(from); len(wrote) != 1 || wrote[0].Outcome != audit.Failed || wrote[0].Reason != "HSM_UNAVAILABLE" || [16]byte(wrote[0].KID) != kid {
		t.Errorf("the log has %+v, want the release that failed", wrote)
	}
}
