package custodian_test

import (
	"bytes"
	"context"
	"crypto"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/custodian/custodiantest"
	"github.com/keycustody/custodian/internal/audit"
	"github.com/keycustody/custodian/kms"
	"github.com/keycustody/custodian/store"
)

// A world is one custody in a test: a real store and a real audit log in a
// folder, a token in memory, a KMS, and a clock that the test sets. Between
// the domain and each of its parts stands the breaker.
type world struct {
	segment int64 // of the audit log; 0: the default
	t       *testing.T
	dir     string
	clock   atomic.Int64 // Unix nanoseconds
	breaker *breaker
	hsm     *custodiantest.HSM
	kms     custodian.Provider
	st      *store.Store
	log     *audit.Log
	c       *custodian.Custodian
	cfg     custodian.Config
	logged  custodian.Logged // what the audit log showed when it was opened

	// answered are the keys that a caller got, by KID.
	answered map[custodian.KID][]byte
}

var (
	packager = custodian.Caller{ID: "spiffe://test/packager", Roles: []custodian.Role{custodian.RolePackager}}
	provider = custodian.Caller{ID: "spiffe://test/provider", Roles: []custodian.Role{custodian.RoleProvider}}
	officer  = custodian.Caller{ID: "spiffe://test/officer", Roles: []custodian.Role{custodian.RoleOfficer}, SPKI: [32]byte{1}}
	auditor  = custodian.Caller{ID: "spiffe://test/auditor", Roles: []custodian.Role{custodian.RoleAuditor}}
	operator = custodian.Caller{ID: "spiffe://test/operator", Roles: []custodian.Role{custodian.RoleOperator}}
	// narrow may release keys of the category movies only.
	narrow = custodian.Caller{ID: "spiffe://test/narrow", Roles: []custodian.Role{custodian.RoleProvider}}
	// patient may have keys after their re-issue window.
	patient = custodian.Caller{ID: "spiffe://test/patient", Roles: []custodian.Role{custodian.RolePackager}}
	// narrowOfficer decides about the category movies only.
	narrowOfficer = custodian.Caller{ID: "spiffe://test/narrow-officer", Roles: []custodian.Role{custodian.RoleOfficer}, SPKI: [32]byte{2}}
	// nobody has no grant.
	nobody = custodian.Caller{ID: "spiffe://test/nobody", Roles: custodian.Roles}
)

func testPolicy(t *testing.T) *custodian.Policy {
	t.Helper()
	p, err := custodian.NewPolicy([]custodian.Grant{
		{Identity: packager.ID, Role: custodian.RolePackager, AllCategories: true},
		{Identity: patient.ID, Role: custodian.RolePackager, AllCategories: true, Reissue: true},
		{Identity: provider.ID, Role: custodian.RoleProvider, AllCategories: true},
		{Identity: narrow.ID, Role: custodian.RoleProvider, Categories: []custodian.CategoryName{"movies"}},
		{Identity: officer.ID, Role: custodian.RoleOfficer, AllCategories: true, SPKI: &[32]byte{1}},
		{Identity: narrowOfficer.ID, Role: custodian.RoleOfficer, Categories: []custodian.CategoryName{"movies"}, SPKI: &[32]byte{2}},
		{Identity: auditor.ID, Role: custodian.RoleAuditor, AllCategories: true},
		{Identity: operator.ID, Role: custodian.RoleOperator},
		{Identity: anySource.ID, Role: custodian.RoleEventSource, AllCategories: true},
		{Identity: source.ID, Role: custodian.RoleEventSource, Categories: []custodian.CategoryName{"movies"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// bareWorld is a world before init: an empty store and an empty log, closed.
func bareWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, dir: t.TempDir(), breaker: &breaker{}, hsm: custodiantest.NewHSM(), answered: map[custodian.KID][]byte{}}
	w.clock.Store(time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC).UnixNano())
	local, err := kms.Open(t.Context(), kms.Config{Name: "local", Kind: "local"})
	if err != nil {
		t.Fatal(err)
	}
	w.kms = brokenKMS{local, w.breaker}
	w.cfg = custodian.Config{HSM: brokenHSM{w.hsm, w.breaker}, Providers: []custodian.Provider{w.kms}, DefaultProviders: []string{"local"},
		Policy: testPolicy(t), Now: w.now, LabelPrefix: "mek", MaxReleases: 1024,
		KMS: custodian.KMSLimits{BreakerPause: 1}} // it keeps real time, which tests do not wait for
	if w.st, err = store.Create(t.Context(), w.storePath(), store.Options{}); err != nil {
		t.Fatal(err)
	}
	if w.log, err = audit.Create(w.auditDir(), audit.Options{Reserve: 64 << 10}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.close)
	w.close()
	return w
}

// newWorld is a world after init, open.
func newWorld(t *testing.T) *world {
	t.Helper()
	w := bareWorld(t)
	w.openParts()
	if err := custodian.Init(t.Context(), w.cfg, custodian.InitSpec{}); err != nil {
		t.Fatal(err)
	}
	w.reopen()
	return w
}

func (w *world) storePath() string { return filepath.Join(w.dir, "store.db") }
func (w *world) auditDir() string  { return filepath.Join(w.dir, "audit") }
func (w *world) now() time.Time    { return time.Unix(0, w.clock.Load()) }
func (w *world) advance(d time.Duration) {
	w.t.Helper()
	const step = 3 * time.Hour // a clock that jumps further under a running daemon is not believed
	for ; w.c != nil && d > step; d -= step {
		if err := w.c.Tick(w.t.Context()); err != nil {
			w.t.Fatal(err)
		}
		w.clock.Add(int64(step))
		if err := w.c.Tick(w.t.Context()); err != nil {
			w.t.Fatal(err)
		}
	}
	w.clock.Add(int64(d))
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

// openParts opens what lies in the folder, and no custody on it.
func (w *world) openParts() {
	w.t.Helper()
	if err := w.tryParts(); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) tryParts() (err error) {
	w.t.Helper()
	w.close()
	if w.st, err = store.Open(w.t.Context(), w.storePath(), store.Options{}); err != nil {
		return err
	}
	w.logged = custodian.Logged{TrackKIDs: true, Budgets: w.cfg.Policy.Budgets()}
	wrap := func(f audit.File) audit.File { return brokenFile{f, w.breaker} }
	if w.log, err = audit.Open(w.auditDir(), audit.Options{Visit: w.logged.Visit, WrapFile: wrap, SegmentSize: w.segment, Reserve: 64 << 10}); err != nil {
		return err
	}
	w.cfg.Store, w.cfg.Audit, w.cfg.Logged = brokenStore{w.st, w.breaker}, w.log, w.logged
	return nil
}

// open opens the folder as a start of the daemon does.
func (w *world) open() error {
	w.t.Helper()
	err := w.tryParts()
	if err == nil {
		w.c, err = custodian.Open(w.t.Context(), w.cfg)
	}
	return err
}

func (w *world) reopen() {
	w.t.Helper()
	if err := w.open(); err != nil {
		w.t.Fatalf("reopen: %v", err)
	}
}

func (w *world) category(name custodian.CategoryName) {
	w.t.Helper()
	if _, err := w.c.CreateCategory(w.t.Context(), officer, custodian.CreateCategoryRequest{Name: name}); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) freeze(name custodian.CategoryName, m custodian.CategoryMode) {
	w.t.Helper()
	if _, err := w.c.SetCategoryMode(w.t.Context(), officer, custodian.SetModeRequest{Name: name, Mode: m}); err != nil {
		w.t.Fatal(err)
	}
}

// ask is an issue request for tracks of one content item under cenc.
func ask(cat custodian.CategoryName, content string, tracks ...custodian.TrackType) custodian.IssueRequest {
	req := custodian.IssueRequest{Category: cat, ContentID: custodian.ContentID(content)}
	for _, tr := range tracks {
		req.Keys = append(req.Keys, custodian.KeySpec{TrackType: tr, Scheme: custodian.SchemeCENC})
	}
	return req
}

func (w *world) issue(cat custodian.CategoryName, content string, tracks ...custodian.TrackType) []custodian.IssuedKey {
	w.t.Helper()
	return w.issueReq(ask(cat, content, tracks...))
}

// issueReq issues and remembers what was answered. The keys are wiped.
func (w *world) issueReq(req custodian.IssueRequest) []custodian.IssuedKey {
	w.t.Helper()
	keys, err := w.c.Issue(w.t.Context(), packager, req)
	if err != nil {
		w.t.Fatal(err)
	}
	w.remember(keys)
	return keys
}

// remember takes note of the keys that a caller was answered with, and that
// they are those that it was answered with before.
func (w *world) remember(keys []custodian.IssuedKey) {
	w.t.Helper()
	for _, k := range keys {
		k.Key.Use(func(b []byte) {
			if len(b) != custodian.CEKSize {
				w.t.Errorf("content key %s: got %d bytes, want %d", k.KID, len(b), custodian.CEKSize)
			}
			if before, ok := w.answered[k.KID]; ok && !bytes.Equal(before, b) {
				w.t.Errorf("content key %s: it was answered with other bytes before", k.KID)
			}
			w.answered[k.KID] = bytes.Clone(b)
		})
		k.Key.Destroy()
	}
}

// retrieve returns the one result for kid. The caller destroys its key.
func (w *world) retrieve(who custodian.Caller, kid custodian.KID) custodian.RetrieveResult {
	w.t.Helper()
	res, err := w.c.Retrieve(w.t.Context(), who, custodian.RetrieveRequest{KIDs: []custodian.KID{kid}})
	if err != nil {
		return custodian.RetrieveResult{KID: kid, Err: err}
	}
	return res[0]
}

// release is retrieve without the key.
func (w *world) release(who custodian.Caller, kid custodian.KID) error {
	w.t.Helper()
	r := w.retrieve(who, kid)
	r.Key.Destroy()
	return r.Err
}

// whole checks what holds after whatever happened: it closes and opens
// again, and then every key that was ever answered is there unchanged, no
// natural key has two keys, records fit their indexes, the log verifies and
// knows every key that was answered, and no key is left in clear.
func (w *world) whole() {
	w.t.Helper()
	if w.c != nil {
		w.noneInClear()
	}
	w.reopen()
	for kid, want := range w.answered {
		r := w.retrieve(provider, kid)
		if r.Err != nil {
			w.t.Errorf("content key %s was answered and is lost: %v", kid, r.Err)
			continue
		}
		r.Key.Use(func(got []byte) {
			if !bytes.Equal(got, want) {
				w.t.Errorf("content key %s: released with other bytes than answered", kid)
			}
		})
		r.Key.Destroy()
		if _, ok := w.logged.KIDs[kid]; !ok {
			w.t.Errorf("content key %s was answered and is not in the audit log", kid)
		}
	}
	w.noneInClear()
	if err := w.st.Check(w.t.Context()); err != nil {
		w.t.Errorf("store: %v", err)
	}
	seen := map[string]custodian.KID{}
	for _, k := range w.contentKeys() {
		n := k.Key.NaturalKey
		n.Generation = 1
		if other, twice := seen[n.String()]; twice {
			w.t.Errorf("%s has two keys, %s and %s", n, other, k.Key.KID)
		}
		seen[n.String()] = k.Key.KID
	}
	if _, err := audit.Verify(w.t.Context(), w.auditDir(), audit.VerifyOptions{}); err != nil {
		w.t.Errorf("audit log: %v", err)
	}
	w.attemptsEnd()
}

// attemptsEnd checks that every attempt in the log has one end, of its action
// and after it. It is so after a start.
func (w *world) attemptsEnd() (attempts int) {
	w.t.Helper()
	open, ended := map[uint64]string{}, uint64(0)
	for _, e := range w.entries(0) {
		if e.Outcome == audit.Begun {
			open[e.Index] = e.Action
			attempts++
		}
		if !e.HasAttempt {
			continue
		}
		if open[e.Attempt] == "" && e.Attempt == ended {
			continue // one entry for each key
		}
		if open[e.Attempt] != e.Action {
			w.t.Errorf("entry %d, %s, ends %d, which is %q", e.Index, line(e), e.Attempt, open[e.Attempt])
		}
		delete(open, e.Attempt)
		ended = e.Attempt
	}
	if len(open) > 0 {
		w.t.Errorf("attempts without an end: %v", open)
	}
	return attempts
}

func (w *world) noneInClear() {
	w.t.Helper()
	if n := w.c.Arena().InUse(); n != 0 {
		w.t.Errorf("%d CEKs are in clear after all were given back", n)
	}
}

// contentKeys are all content keys of the store.
func (w *world) contentKeys() []custodian.SealedKey {
	w.t.Helper()
	var keys []custodian.SealedKey
	cats, err := w.c.Categories(w.t.Context(), auditor)
	if err != nil {
		w.t.Fatal(err)
	}
	err = w.st.View(w.t.Context(), func(tx custodian.Tx) error {
		for _, cat := range cats {
			if err := tx.ContentKeys(cat.Name, nil, nil, 1<<20, func(k custodian.SealedKey) error {
				keys = append(keys, k)
				return nil
			}); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return keys
}

// keks are the KEK versions of a category.
func (w *world) keks(name custodian.CategoryName) []custodian.KEK {
	w.t.Helper()
	keks, err := w.c.KeyVersions(w.t.Context(), auditor, name)
	if err != nil {
		w.t.Fatal(err)
	}
	return keks
}

// entries reads the audit log from an index on.
func (w *world) entries(from uint64) []audit.Entry {
	w.t.Helper()
	var out []audit.Entry
	if err := audit.Read(w.auditDir(), from, func(e *audit.Entry) error {
		out = append(out, *e)
		return nil
	}); err != nil {
		w.t.Fatal(err)
	}
	return out
}

// saveStore closes the world, and returns what puts the store's file back.
// The audit log stays as it then is.
func (w *world) saveStore() (putBack func()) {
	w.t.Helper()
	w.close()
	saved := newFileImage(readFile(w.t, w.storePath()))
	return func() {
		w.t.Helper()
		w.close()
		saved.write(w.t, w.storePath())
	}
}

// save is saveStore for the whole folder.
func (w *world) save() (putBack func()) {
	w.t.Helper()
	w.close()
	saved := readFolder(w.t, w.dir)
	return func() {
		w.t.Helper()
		w.close()
		if err := os.RemoveAll(w.dir); err != nil {
			w.t.Fatal(err)
		}
		saved.write(w.t, w.dir)
	}
}

func copyFolder(t *testing.T, from, to string) {
	t.Helper()
	readFolder(t, from).write(t, to)
}

// A folder is what lies in one, files by their paths. Of the zeros at the end
// of a file, of which a store's has 16 MiB, it has the number only.
type folder map[string]fileImage

type fileImage struct {
	data []byte
	size int64
}

func newFileImage(b []byte) fileImage {
	return fileImage{bytes.TrimRight(b, "\x00"), int64(len(b))}
}

// write has a hole in the place of the zeros.
func (f fileImage) write(t *testing.T, path string) {
	t.Helper()
	err := os.WriteFile(path, f.data, 0o600)
	if err == nil {
		err = os.Truncate(path, f.size)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func readFolder(t *testing.T, dir string) folder {
	t.Helper()
	f := folder{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		f[rel] = newFileImage(readFile(t, path))
		if d.Name() == "audit.log" { // the zeros behind are room, 4 MiB of it
			f[rel] = fileImage{f[rel].data, max(64, int64(len(f[rel].data)))}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func (f folder) write(t *testing.T, dir string) {
	t.Helper()
	for rel, image := range f {
		path := filepath.Join(dir, rel)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		image.write(t, path)
	}
}

func readFile(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func writeFile(t *testing.T, path string, b []byte) {
	t.Helper()
	newFileImage(b).write(t, path)
}

// wantErr reports an error that is not the wanted one; nil wants success.
func wantErr(t *testing.T, what string, got, want error) {
	t.Helper()
	if (want == nil && got != nil) || !errors.Is(got, want) {
		t.Errorf("%s: got %v, want %v", what, got, want)
	}
}

// A breaker fails one call of one operation, before or after doing it. It
// also counts calls, and can hold one up.
type breaker struct {
	// mu guards the fields below.
	mu    sync.Mutex
	calls map[string]int
	op    string
	left  int // calls of op until the one that fails
	after bool
	away  map[string]bool // every call of them fails
	hit   bool
	hold  map[string]chan struct{}
	then  map[string]func()
}

// arm makes the nth call of op from now on fail.
func (b *breaker) arm(op string, nth int, after bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.op, b.left, b.after, b.hit = op, nth, after, false
}

// down makes every call of op fail until it is disarmed.
func (b *breaker) down(op string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.away == nil {
		b.away = map[string]bool{}
	}
	b.away[op], b.hit = true, false
}

// disarm ends both, and reports whether a call came.
func (b *breaker) disarm() (hit bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.op, b.away = "", nil
	return b.hit
}

// block holds up every call of op until the result is called.
func (b *breaker) block(op string) (release func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.hold == nil {
		b.hold = map[string]chan struct{}{}
	}
	held := make(chan struct{})
	b.hold[op] = held
	return func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		if b.hold[op] != nil {
			delete(b.hold, op)
			close(held)
		}
	}
}

// afterwards calls f after the next call of op.
func (b *breaker) afterwards(op string, f func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.then = map[string]func(){op: f}
}

func (b *breaker) count(op string) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.calls[op]
}

// do counts a call of op, and fails it with err where it is its turn.
func (b *breaker) do(op string, err error, f func() error) error {
	b.mu.Lock()
	if b.calls == nil {
		b.calls = map[string]int{}
	}
	b.calls[op]++
	before, after := b.away[op], false
	b.hit = b.hit || before
	if b.op == op && b.left > 0 {
		if b.left--; b.left == 0 {
			b.hit, before, after = true, !b.after, b.after
		}
	}
	held, then := b.hold[op], b.then[op]
	delete(b.then, op)
	b.mu.Unlock()
	if held != nil {
		<-held
	}
	if before {
		return err
	}
	e := f()
	if then != nil {
		then()
	}
	if e != nil || !after {
		return e
	}
	return err
}

// errBroken is what the breaker has a part answer, beside its own class.
var errBroken = errors.New("broken by the test")

var (
	errHSM   = errors.Join(errBroken, custodian.ErrHSMUnavailable)
	errKMS   = errors.Join(errBroken, custodian.ErrProviderUnavailable)
	errStore = errors.Join(errBroken, custodian.ErrStoreUnavailable)
)

// The operations that a breaker knows.
var (
	hsmOps   = []string{"hsm.Random", "hsm.DestroyLeftovers", "hsm.DestroyMEK", "hsm.GenerateMEK", "hsm.NewMEKCanary", "hsm.CheckMEK", "hsm.GenerateKey", "hsm.LoadKey", "hsm.RewrapKey", "hsm.GenerateSigner", "hsm.Signer", "hsm.Objects", "hsm.Seal", "hsm.Open", "hsm.Reseal", "hsm.CMAC"}
	kmsOps   = []string{"kms.Wrap", "kms.Unwrap"}
	storeOps = []string{"store.View", "store.ContentKey", "store.Update"}
	auditOps = []string{"audit.WriteAt", "audit.Sync"}
	allOps   = slices.Concat(hsmOps, kmsOps, storeOps, auditOps)
)

type brokenHSM struct {
	custodian.HSM
	b *breaker
}

func (h brokenHSM) Random(ctx context.Context, dst []byte) error {
	return h.b.do("hsm.Random", errHSM, func() error { return h.HSM.Random(ctx, dst) })
}
func (h brokenHSM) GenerateMEK(ctx context.Context, m custodian.MEK) error {
	return h.b.do("hsm.GenerateMEK", errHSM, func() error { return h.HSM.GenerateMEK(ctx, m) })
}
func (h brokenHSM) NewMEKCanary(ctx context.Context, m custodian.MEK) (canary []byte, err error) {
	err = h.b.do("hsm.NewMEKCanary", errHSM, func() error { canary, err = h.HSM.NewMEKCanary(ctx, m); return err })
	return canary, err
}
func (h brokenHSM) CheckMEK(ctx context.Context, m custodian.MEK) error {
	return h.b.do("hsm.CheckMEK", errHSM, func() error { return h.HSM.CheckMEK(ctx, m) })
}
func (h brokenHSM) GenerateKey(ctx context.Context, m custodian.MEK, u custodian.KeyUse, identity []byte) (inner, canary []byte, err error) {
	err = h.b.do("hsm.GenerateKey", errHSM, func() error { inner, canary, err = h.HSM.GenerateKey(ctx, m, u, identity); return err })
	return inner, canary, err
}
func (h brokenHSM) LoadKey(ctx context.Context, m custodian.MEK, u custodian.KeyUse, identity, inner, canary []byte) (k custodian.Key, err error) {
	err = h.b.do("hsm.LoadKey", errHSM, func() error { k, err = h.HSM.LoadKey(ctx, m, u, identity, inner, canary); return err })
	return brokenKey{k, h.b}, err
}
func (h brokenHSM) RewrapKey(ctx context.Context, from, to custodian.MEK, u custodian.KeyUse, identity, inner, canary []byte) (moved []byte, err error) {
	err = h.b.do("hsm.RewrapKey", errHSM, func() error { moved, err = h.HSM.RewrapKey(ctx, from, to, u, identity, inner, canary); return err })
	return moved, err
}
func (h brokenHSM) GenerateSigner(ctx context.Context, alg custodian.SigningAlgorithm, label string, id [16]byte) error {
	return h.b.do("hsm.GenerateSigner", errHSM, func() error { return h.HSM.GenerateSigner(ctx, alg, label, id) })
}
func (h brokenHSM) Signer(ctx context.Context, label string, id [16]byte) (s crypto.Signer, err error) {
	err = h.b.do("hsm.Signer", errHSM, func() error { s, err = h.HSM.Signer(ctx, label, id); return err })
	return s, err
}
func (h brokenHSM) DestroyLeftovers(ctx context.Context, labels []string, ids [][16]byte) (n int, err error) {
	err = h.b.do("hsm.DestroyLeftovers", errHSM, func() error { n, err = h.HSM.DestroyLeftovers(ctx, labels, ids); return err })
	return n, err
}
func (h brokenHSM) DestroyMEK(ctx context.Context, m custodian.MEK) error {
	return h.b.do("hsm.DestroyMEK", errHSM, func() error { return h.HSM.DestroyMEK(ctx, m) })
}
func (h brokenHSM) Objects(ctx context.Context) (o []custodian.TokenObject, err error) {
	err = h.b.do("hsm.Objects", errHSM, func() error { o, err = h.HSM.Objects(ctx); return err })
	return o, err
}

// Status says that the token is away once "hsm.Status" is down.
func (h brokenHSM) Status() custodian.HSMStatus {
	h.b.mu.Lock()
	defer h.b.mu.Unlock()
	s := h.HSM.Status()
	s.Away = h.b.away["hsm.Status"]
	return s
}

type brokenKey struct {
	custodian.Key
	b *breaker
}

func (k brokenKey) Seal(ctx context.Context, aad, plaintext []byte) (iv [12]byte, sealed []byte, err error) {
	err = k.b.do("hsm.Seal", errHSM, func() error { iv, sealed, err = k.Key.Seal(ctx, aad, plaintext); return err })
	return iv, sealed, err
}
func (k brokenKey) Open(ctx context.Context, iv [12]byte, aad, sealed, dst []byte) (n int, err error) {
	err = k.b.do("hsm.Open", errHSM, func() error { n, err = k.Key.Open(ctx, iv, aad, sealed, dst); return err })
	return n, err
}
func (k brokenKey) Reseal(ctx context.Context, to custodian.Key, keys []custodian.Resealing) (n int, err error) {
	err = k.b.do("hsm.Reseal", errHSM, func() error { n, err = k.Key.Reseal(ctx, to.(brokenKey).Key, keys); return err })
	return n, err
}
func (k brokenKey) CMAC(ctx context.Context, msg []byte) (mac [16]byte, err error) {
	err = k.b.do("hsm.CMAC", errHSM, func() error { mac, err = k.Key.CMAC(ctx, msg); return err })
	return mac, err
}

type brokenKMS struct {
	custodian.Provider
	b *breaker
}

func (k brokenKMS) Wrap(ctx context.Context, blob, binding []byte) (o custodian.OuterWrap, err error) {
	err = k.b.do("kms.Wrap", errKMS, func() error { o, err = k.Provider.Wrap(ctx, blob, binding); return err })
	return o, err
}
func (k brokenKMS) Unwrap(ctx context.Context, o custodian.OuterWrap, binding []byte) (blob []byte, err error) {
	err = k.b.do("kms.Unwrap", errKMS, func() error { blob, err = k.Provider.Unwrap(ctx, o, binding); return err })
	return blob, err
}

type brokenStore struct {
	custodian.Store
	b *breaker
}

func (s brokenStore) View(ctx context.Context, f func(custodian.Tx) error) error {
	return s.b.do("store.View", errStore, func() error {
		return s.Store.View(ctx, func(tx custodian.Tx) error { return f(brokenTx{tx, s.b}) })
	})
}
func (s brokenStore) Update(ctx context.Context, f func(custodian.UpdateTx) error) error {
	return s.b.do("store.Update", errStore, func() error { return s.Store.Update(ctx, f) })
}

type brokenTx struct {
	custodian.Tx
	b *breaker
}

func (tx brokenTx) ContentKey(kid custodian.KID) (k custodian.SealedKey, err error) {
	err = tx.b.do("store.ContentKey", errStore, func() error { k, err = tx.Tx.ContentKey(kid); return err })
	return k, err
}

type brokenFile struct {
	audit.File
	b *breaker
}

func (f brokenFile) WriteAt(p []byte, off int64) (n int, err error) {
	err = f.b.do("audit.WriteAt", errBroken, func() error { n, err = f.File.WriteAt(p, off); return err })
	return n, err
}
func (f brokenFile) Sync() error { return f.b.do("audit.Sync", errBroken, f.File.Sync) }
