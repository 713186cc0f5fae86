package custodian_test

import (
	"context"
	"errors"
	"path/filepath"
	"testing"
	"time"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/custodian/custodiantest"
	"github.com/keycustody/custodian/internal/audit"
	"github.com/keycustody/custodian/kms"
	"github.com/keycustody/custodian/store"
)

// A world is one custody in a test: a real store and a real audit log in a
// folder, a token in memory, and a clock that the test sets.
type world struct {
	t    *testing.T
	dir  string
	now  time.Time
	hsm  *custodiantest.HSM
	st   *store.Store
	log  *audit.Log
	c    *custodian.Custodian
	cfg  custodian.Config
	auto audit.Options
}

var (
	packager = custodian.Caller{ID: "spiffe://test/packager", Roles: []custodian.Role{custodian.RolePackager}}
	provider = custodian.Caller{ID: "spiffe://test/provider", Roles: []custodian.Role{custodian.RoleProvider}}
	officer  = custodian.Caller{ID: "spiffe://test/officer", Roles: []custodian.Role{custodian.RoleOfficer}, SPKI: [32]byte{1}}
	auditor  = custodian.Caller{ID: "spiffe://test/auditor", Roles: []custodian.Role{custodian.RoleAuditor}}
	operator = custodian.Caller{ID: "spiffe://test/operator", Roles: []custodian.Role{custodian.RoleOperator}}
	// narrow may release keys of the category movies only.
	narrow = custodian.Caller{ID: "spiffe://test/narrow", Roles: []custodian.Role{custodian.RoleProvider}}
)

func testPolicy(t *testing.T) *custodian.Policy {
	t.Helper()
	p, err := custodian.NewPolicy([]custodian.Grant{
		{Identity: packager.ID, Role: custodian.RolePackager, AllCategories: true},
		{Identity: provider.ID, Role: custodian.RoleProvider, AllCategories: true},
		{Identity: narrow.ID, Role: custodian.RoleProvider, Categories: []custodian.CategoryName{"movies"}},
		{Identity: officer.ID, Role: custodian.RoleOfficer, AllCategories: true, SPKI: &[32]byte{1}},
		{Identity: auditor.ID, Role: custodian.RoleAuditor, AllCategories: true},
		{Identity: operator.ID, Role: custodian.RoleOperator},
	})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, dir: t.TempDir(), now: time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC), hsm: custodiantest.NewHSM()}
	local, err := kms.Open(t.Context(), kms.Config{Name: "local", Kind: "local"})
	if err != nil {
		t.Fatal(err)
	}
	w.cfg = custodian.Config{HSM: w.hsm, Providers: []custodian.Provider{local}, DefaultProviders: []string{"local"}, Policy: testPolicy(t),
		Now: func() time.Time { return w.now }, LabelPrefix: "mek", MaxReleases: 1024}
	if w.st, err = store.Create(t.Context(), filepath.Join(w.dir, "store.db"), store.Options{}); err != nil {
		t.Fatal(err)
	}
	if w.log, err = audit.Create(filepath.Join(w.dir, "audit"), audit.Options{}); err != nil {
		t.Fatal(err)
	}
	w.cfg.Store, w.cfg.Audit = w.st, w.log
	if err := custodian.Init(t.Context(), w.cfg, custodian.InitSpec{}); err != nil {
		t.Fatal(err)
	}
	w.close()
	w.mustOpen()
	t.Cleanup(w.close)
	return w
}

// close closes everything that lies in the folder.
func (w *world) close() {
	w.t.Helper()
	if w.c != nil {
		w.c.Close()
		w.c = nil
	}
	if w.log != nil {
		w.log.Close()
		w.log = nil
	}
	if w.st != nil {
		w.st.Close()
		w.st = nil
	}
}

// open opens the folder as a start of the daemon does.
func (w *world) open() error {
	w.t.Helper()
	var err error
	var logged custodian.Logged
	if w.st, err = store.Open(w.t.Context(), filepath.Join(w.dir, "store.db"), store.Options{}); err != nil {
		return err
	}
	if w.log, err = audit.Open(filepath.Join(w.dir, "audit"), audit.Options{Visit: logged.Visit}); err != nil {
		return err
	}
	w.cfg.Store, w.cfg.Audit, w.cfg.Logged = w.st, w.log, logged
	w.c, err = custodian.Open(w.t.Context(), w.cfg)
	return err
}

func (w *world) mustOpen() {
	w.t.Helper()
	if err := w.open(); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) category(name custodian.CategoryName) {
	w.t.Helper()
	if _, err := w.c.CreateCategory(w.t.Context(), officer, custodian.CreateCategoryRequest{Name: name}); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) issue(cat custodian.CategoryName, content string, tracks ...custodian.TrackType) []custodian.IssuedKey {
	w.t.Helper()
	req := custodian.IssueRequest{Category: cat, ContentID: custodian.ContentID(content)}
	for _, tr := range tracks {
		req.Keys = append(req.Keys, custodian.KeySpec{TrackType: tr, Scheme: custodian.SchemeCENC})
	}
	keys, err := w.c.Issue(w.t.Context(), packager, req)
	if err != nil {
		w.t.Fatal(err)
	}
	return keys
}

// retrieve returns the one result for kid.
func (w *world) retrieve(who custodian.Caller, kid custodian.KID) custodian.RetrieveResult {
	w.t.Helper()
	res, err := w.c.Retrieve(w.t.Context(), who, custodian.RetrieveRequest{KIDs: []custodian.KID{kid}})
	if err != nil {
		return custodian.RetrieveResult{KID: kid, Err: err}
	}
	return res[0]
}

// same says whether two keys have the same bytes; the test never sees them.
func same(a, b interface{ Use(func([]byte)) }) bool {
	equal := false
	a.Use(func(x []byte) { b.Use(func(y []byte) { equal = len(x) == custodian.CEKSize && string(x) == string(y) }) })
	return equal
}

func TestIssueThenRelease(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	issued := w.issue("movies", "film-1", "SD", "HD", "AUDIO")
	for reopened := range 2 {
		for _, k := range issued {
			r := w.retrieve(provider, k.KID)
			if r.Err != nil {
				t.Fatalf("reopened %d times: %v", reopened, r.Err)
			}
			if reopened == 0 && !same(r.Key, k.Key) {
				t.Errorf("%s: another key was released than issued", k.KID)
			}
			if r.Info.KEK != (custodian.KEKID{Category: "movies", Version: 1}) || r.Info.TrackType != k.TrackType {
				t.Errorf("metadata: got %v, want that of %v", r.Info, k.ContentKey)
			}
			r.Key.Destroy()
		}
		again := w.issue("movies", "film-1", "SD", "HD", "AUDIO")
		for i := range again {
			if again[i].KID != issued[i].KID || again[i].Created {
				t.Errorf("asked again: got KID %s created %v, want %s", again[i].KID, again[i].Created, issued[i].KID)
			}
			again[i].Key.Destroy()
		}
		if reopened == 0 {
			for _, k := range issued {
				k.Key.Destroy()
			}
		}
		if n := w.c.Arena().InUse(); n != 0 {
			t.Errorf("%d CEKs are in clear after all were destroyed", n)
		}
		w.close()
		w.mustOpen()
	}
}

func TestUnknownLooksLikeNotGranted(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	w.category("series")
	mine := w.issue("movies", "film-1", "SD")[0]
	other := w.issue("series", "show-1", "SD")[0]
	unknown := custodian.KID{1, 2, 3}
	if err := w.retrieve(narrow, mine.KID).Err; err != nil {
		t.Errorf("granted: %v", err)
	}
	for name, kid := range map[string]custodian.KID{"of another category": other.KID, "unknown": unknown} {
		if err := w.retrieve(narrow, kid).Err; !errors.Is(err, custodian.ErrDenied) {
			t.Errorf("%s, to who may not know: got %v, want ErrDenied", name, err)
		}
	}
	if err := w.retrieve(provider, unknown).Err; !errors.Is(err, custodian.ErrKeyNotFound) {
		t.Errorf("unknown, to who may know: got %v, want ErrKeyNotFound", err)
	}
	res, err := w.c.Retrieve(context.Background(), narrow, custodian.RetrieveRequest{KIDs: []custodian.KID{unknown}, ContentID: custodian.ContentID("film-1")})
	if err != nil || !errors.Is(res[0].Err, custodian.ErrKeyNotFound) {
		t.Errorf("unknown, naming content of a granted category: got %v %v, want ErrKeyNotFound", err, res)
	}
	if err := w.retrieve(packager, mine.KID).Err; !errors.Is(err, custodian.ErrDenied) {
		t.Errorf("packager asks the callback: got %v, want ErrDenied", err)
	}
}
