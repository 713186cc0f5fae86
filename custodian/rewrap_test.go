package custodian_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/audit"
)

// rewrapWorld is a world with a category of some KEK versions, and a content
// key under each, wrapped by the first of the KMSs.
func rewrapWorld(t *testing.T, versions int, names ...string) (*world, []*badKMS) {
	t.Helper()
	w := newWorld(t)
	var kmss []*badKMS
	for _, name := range names {
		k := &badKMS{name: name}
		kmss = append(kmss, k)
		w.cfg.Providers = append(w.cfg.Providers, k)
	}
	w.cfg.KMS.RewrapRate = 1e6
	w.cfg.KMS.Deadline = 30 * time.Second
	w.cfg.GCMLimits = custodian.GCMLimits{Block: 1, Soft: 2, Hard: 1 << 20} // each issue makes a new version
	w.reopen()
	if _, err := w.c.CreateCategory(t.Context(), officer, custodian.CreateCategoryRequest{Name: "movies", Providers: names[:1]}); err != nil {
		t.Fatal(err)
	}
	for i := range versions {
		w.issue("movies", fmt.Sprintf("film-%d", i), "SD")
	}
	if got := len(w.keks("movies")); got < versions {
		t.Fatalf("got %d KEK versions, want %d at least", got, versions)
	}
	return w, kmss
}

// moveTo begins a job.
func (w *world) moveTo(providers ...string) {
	w.t.Helper()
	if _, err := w.c.SetProviders(w.t.Context(), officer, custodian.SetProvidersRequest{Category: "movies", Providers: providers, Cause: "a test"}); err != nil {
		w.t.Fatal(err)
	}
}

// rewraps runs the jobs until enough says so of what is left, or for 20 s.
func (w *world) rewraps(enough func([]custodian.RewrapStatus) bool) {
	w.t.Helper()
	ctx, cancel := context.WithCancel(w.t.Context())
	var running sync.WaitGroup
	running.Go(func() { w.c.RunRewraps(ctx) })
	defer running.Wait()
	defer cancel()
	for limit := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		left := w.jobs()
		if enough(left) {
			return
		}
		if time.Now().After(limit) {
			w.t.Fatalf("the jobs do not get there: %+v", left)
		}
	}
}

// rewrapsHalf runs a job of 70 keys by k until 32 are stored and 40 wraps made,
// and ends it there.
func (w *world) rewrapsHalf(k *badKMS) {
	w.t.Helper()
	made := 0
	k.mu.Lock()
	k.before = func(ctx context.Context) {
		if made++; made == 40 {
			<-ctx.Done()
		}
	}
	k.mu.Unlock()
	w.rewraps(func(left []custodian.RewrapStatus) bool { return len(left) == 1 && left[0].Done > 0 })
	k.mu.Lock()
	k.before = nil
	k.mu.Unlock()
}

func (w *world) jobs() []custodian.RewrapStatus {
	w.t.Helper()
	left, err := w.c.Rewraps(w.t.Context(), operator)
	if err != nil {
		w.t.Fatal(err)
	}
	return left
}

func none(left []custodian.RewrapStatus) bool  { return len(left) == 0 }
func stuck(left []custodian.RewrapStatus) bool { return len(left) == 1 && left[0].LastError != "" }

// wantWraps checks who holds every KEK version of movies.
func (w *world) wantWraps(what string, providers ...string) {
	w.t.Helper()
	for _, k := range w.keks("movies") {
		var got []string
		for _, o := range k.Wrapped.Outer {
			got = append(got, o.Provider)
		}
		if !slices.Equal(got, providers) {
			w.t.Errorf("%s: kek %s is held by %v, want %v", what, k.ID, got, providers)
		}
	}
}

// A category moves from one provider to any of two, to another, and back: all
// keys stay, new KEKs follow at once, and each way alone opens all of them.
func TestMoveProviders(t *testing.T) {
	w, kmss := rewrapWorld(t, 40, "vault", "aws")
	from := w.log.Size()
	w.moveTo("vault", "aws")
	if got := w.jobs(); len(got) != 1 || got[0].Done != 0 || got[0].Total != len(w.keks("movies")) || got[0].By != officer.ID {
		t.Errorf("the job before it runs: got %+v", got)
	}
	w.issue("movies", "film-new", "SD") // a new version, by both at once
	w.rewraps(none)
	w.wantWraps("after the move", "vault", "aws")
	for _, gone := range kmss {
		gone.set(custodian.ErrProviderUnavailable)
		w.whole()
		gone.set(nil)
	}
	if v, l := w.status("vault"), w.status("local"); v.KeyVersions != len(w.keks("movies")) || v.SoleKeyVersions != 0 || l.KeyVersions != 3 || l.SoleKeyVersions != 3 {
		t.Errorf("status: vault holds %d key versions, %d alone, and local %d, %d; want all, none, and the 3 helper keys", v.KeyVersions, v.SoleKeyVersions, l.KeyVersions, l.SoleKeyVersions)
	}
	w.wantJobEntries(from, "category.providers", "from vault to vault, aws: a test", "now by vault, aws", "all by vault, aws")

	w.moveTo("aws")
	w.rewraps(none)
	w.wantWraps("after vault was removed", "aws")
	kmss[0].set(custodian.ErrProviderDenied)
	w.whole()
	kmss[0].set(nil)
	w.moveTo("vault")
	w.rewraps(none)
	w.wantWraps("after it went back", "vault")
	w.whole()
}

// wantJobEntries checks what the audit log says of one job: its begin by the
// officer, its changes, its end.
func (w *world) wantJobEntries(from uint64, action, begin, change, end string) {
	w.t.Helper()
	var seen []string
	for _, e := range w.entries(from) {
		if e.Outcome == audit.Begun {
			continue
		}
		switch e.Action {
		case action:
			if e.Caller == "" || !strings.Contains(e.Detail, begin) || len(seen) != 0 {
				w.t.Errorf("begin: got caller %q, detail %q", e.Caller, e.Detail)
			}
		case "kek.rewrap":
			if !strings.Contains(e.Detail, change) || e.ControlRevision == 0 {
				w.t.Errorf("change: got %q", e.Detail)
			}
		case "kek.rewrap.end":
			if !strings.Contains(e.Detail, end) {
				w.t.Errorf("end: got %q", e.Detail)
			}
		default:
			continue
		}
		seen = append(seen, e.Action)
	}
	if len(seen) < 3 || seen[0] != action || seen[len(seen)-1] != "kek.rewrap.end" || slices.Index(seen, "kek.rewrap.end") != len(seen)-1 {
		w.t.Errorf("the audit log tells the job as %q, want its begin, its changes and its end", seen)
	}
}

// A job stands still while a provider is away, says so, and goes on.
func TestMoveWaits(t *testing.T) {
	for _, away := range []int{0, 1} {
		w, kmss := rewrapWorld(t, 3, "vault", "aws")
		w.moveTo("vault", "aws")
		kmss[away].set(custodian.ErrProviderUnavailable)
		w.rewraps(stuck)
		if got := w.jobs()[0].LastError; !strings.Contains(got, kmss[away].name) {
			t.Errorf("the job says %q, want it to name %s", got, kmss[away].name)
		}
		w.wantWraps("while one is away", "vault")
		if s, err := w.c.Status(t.Context(), operator); err != nil || !slices.ContainsFunc(s.Warnings, func(s string) bool { return strings.Contains(s, "it does not go on") }) {
			t.Errorf("status: got %v %q, want a warning", err, s.Warnings)
		}
		kmss[away].set(nil)
		w.rewraps(none)
		w.wantWraps("after it is back", "vault", "aws")
		w.whole()
	}
}

// A restart at any moment finds the job where it stood. So does one after each
// part has failed once, before and after it did what was asked.
func TestMoveGoesOn(t *testing.T) {
	w, kmss := rewrapWorld(t, 70, "vault", "aws")
	w.moveTo("vault", "aws")
	w.rewrapsHalf(kmss[1])
	if got := w.jobs(); len(got) != 1 || got[0].Done == got[0].Total {
		t.Fatalf("the job was not stopped in its middle: %+v", got)
	}
	w.reopen()
	w.rewraps(none)
	w.wantWraps("after a restart in the middle", "vault", "aws")
	w.whole()

	for _, op := range []string{"store.Update", "audit.WriteAt", "audit.Sync", "hsm.LoadKey", "hsm.CMAC"} {
		for _, after := range []bool{false, true} {
			w, _ := rewrapWorld(t, 3, "vault", "aws")
			w.moveTo("vault", "aws")
			w.breaker.arm(op, 1, after)
			w.rewraps(func(left []custodian.RewrapStatus) bool { return stuck(left) || none(left) })
			if !w.breaker.disarm() {
				t.Errorf("%s was never called", op)
			}
			w.reopen()
			w.rewraps(none)
			w.wantWraps("after "+op+" failed", "vault", "aws")
			w.whole()
		}
	}
}

// A KEK version that is made while its category moves is by the new providers,
// also where its making began before the move and ended after it.
func TestMoveDuringARotation(t *testing.T) {
	w, kmss := rewrapWorld(t, 3, "vault", "aws")
	reached, held := make(chan struct{}), make(chan struct{})
	kmss[0].mu.Lock()
	kmss[0].before = func(context.Context) {
		reached <- struct{}{}
		<-held
	}
	kmss[0].mu.Unlock()
	versions := len(w.keks("movies"))
	var issuing sync.WaitGroup
	var issued []custodian.IssuedKey
	var err error
	issuing.Go(func() { issued, err = w.c.Issue(t.Context(), packager, ask("movies", "film-new", "SD")) })
	<-reached
	kmss[0].mu.Lock()
	kmss[0].before = nil
	kmss[0].mu.Unlock()
	w.moveTo("vault", "aws")
	w.rewraps(none)
	w.wantWraps("after the move", "vault", "aws")
	close(held)
	issuing.Wait()
	if err != nil {
		t.Fatal(err)
	}
	w.remember(issued)
	if got := len(w.keks("movies")); got != versions+1 {
		t.Errorf("got %d KEK versions, want the one that was being made as well, %d", got, versions+1)
	}
	w.wantWraps("after the rotation", "vault", "aws")
	w.whole()
}

// The job keeps to its rate, and changes nothing by a clock that is not
// believed.
func TestMoveKeepsToItsRate(t *testing.T) {
	w, _ := rewrapWorld(t, 5, "vault", "aws")
	w.cfg.KMS.RewrapRate = 20
	w.reopen()
	w.moveTo("vault", "aws")
	w.clock.Add(int64(10 * time.Hour))
	w.rewraps(stuck)
	if got := w.jobs()[0]; got.Done != 0 || !strings.Contains(got.LastError, "clock") {
		t.Errorf("by a clock that is not believed: got %+v, want nothing done", got)
	}
	w.clock.Add(-int64(10 * time.Hour))
	began := time.Now()
	w.rewraps(none)
	if took := time.Since(began); took < 200*time.Millisecond-time.Millisecond {
		t.Errorf("5 keys at 20 a second took %s", took)
	}
	w.wantWraps("after the move", "vault", "aws")
	w.whole()
}

// A provider that makes something else of a blob than a wrap of it is found out
// before the old wrap is dropped.
func TestWrapIsProved(t *testing.T) {
	for _, test := range []struct {
		name string
		lie  func(custodian.OuterWrap) custodian.OuterWrap
		want error
	}{
		{"another KEK's blob", func(o custodian.OuterWrap) custodian.OuterWrap { o.Blob[len(o.Blob)-1] ^= 1; return o }, custodian.ErrKMSUnavailable},
		{"another record's blob", func(o custodian.OuterWrap) custodian.OuterWrap { o.Blob[0] ^= 1; return o }, custodian.ErrRecordCorrupt},
		{"garbage", func(o custodian.OuterWrap) custodian.OuterWrap { o.Blob = []byte("garbage"); return o }, custodian.ErrRecordCorrupt},
	} {
		t.Run(test.name, func(t *testing.T) {
			w, kmss := rewrapWorld(t, 3, "vault", "aws")
			kmss[1].mu.Lock()
			kmss[1].lies = test.lie
			kmss[1].mu.Unlock()
			_, err := w.c.CreateCategory(t.Context(), officer, custodian.CreateCategoryRequest{Name: "series", Providers: []string{"aws"}})
			wantErr(t, "a new KEK", err, test.want)
			w.moveTo("aws")
			w.rewraps(stuck)
			w.wantWraps("while the new one lies", "vault")
			w.whole()
			kmss[1].mu.Lock()
			kmss[1].lies = nil
			kmss[1].mu.Unlock()
			w.rewraps(none)
			w.wantWraps("when it tells the truth", "aws")
			w.whole()
		})
	}
}

// What a provider opens is proved by the token before it is wrapped anew: else
// a KMS that answers garbage once would lose a KEK for good.
func TestMoveProvesItsSource(t *testing.T) {
	w, kmss := rewrapWorld(t, 3, "vault", "aws")
	kmss[0].mu.Lock()
	kmss[0].misreads = true
	kmss[0].mu.Unlock()
	w.moveTo("aws")
	w.rewraps(stuck)
	w.wantWraps("while the source opens to garbage", "vault")
	kmss[0].mu.Lock()
	kmss[0].misreads = false
	kmss[0].mu.Unlock()
	w.rewraps(none)
	w.whole()
}

// One bad record stops neither the others nor itself for good; and what stays
// is proved as well before anything is dropped.
func TestMoveWithABadRecord(t *testing.T) {
	w, kmss := rewrapWorld(t, 3, "vault", "aws", "gcp")
	w.moveTo("vault", "aws")
	w.rewraps(none)
	bad := w.keks("movies")[1].ID
	blob := w.keks("movies")[1].Wrapped.Outer[1].Blob // aws lost it, and nobody has noticed
	kmss[1].mu.Lock()
	kmss[1].lost = blob
	kmss[1].mu.Unlock()
	w.moveTo("aws", "gcp")
	w.rewraps(stuck)
	for _, k := range w.keks("movies") {
		want := []string{"aws", "gcp"}
		if k.ID == bad {
			want = []string{"vault", "aws"}
		}
		var got []string
		for _, o := range k.Wrapped.Outer {
			got = append(got, o.Provider)
		}
		if !slices.Equal(got, want) {
			t.Errorf("kek %s is held by %v, want %v", k.ID, got, want)
		}
	}
	if got := w.jobs()[0]; got.Done != got.Total-1 || !strings.Contains(got.LastError, bad.String()) {
		t.Errorf("the job: got %+v, want all but one done, and its name", got)
	}
	w.moveTo("vault", "gcp") // the way out: the wrap that is lost is not needed
	w.rewraps(none)
	w.wantWraps("after another was chosen", "vault", "gcp")
	w.whole()
}

// A provider that rotated its own key has its wraps made anew, by itself where
// it can; a restart goes on behind what was done.
func TestReencrypt(t *testing.T) {
	for _, by := range []string{"wrap", "rewrap", "a rewrap that is denied"} {
		own := by != "wrap"
		w, kmss := rewrapWorld(t, 70, "vault", "aws")
		var rewrapper *rewrapKMS
		if own {
			rewrapper = &rewrapKMS{badKMS: kmss[0], denied: by != "rewrap"}
			w.cfg.Providers[1] = rewrapper
			w.reopen()
		}
		w.moveTo("vault", "aws")
		w.rewraps(none)
		kmss[0].rotate()
		from, wraps := w.log.Size(), kmss[1].wrapped()
		total, wrapsBefore := len(w.keks("movies")), kmss[0].wrapped()
		if _, err := w.c.Reencrypt(t.Context(), operator, custodian.ReencryptRequest{Category: "movies", Providers: []string{"vault"}, Cause: "yearly"}); err != nil {
			t.Fatal(err)
		}
		w.rewrapsHalf(kmss[0])
		done := w.jobs()[0].Done
		w.reopen()
		made := kmss[0].wrapped()
		w.rewraps(none)
		if got := kmss[0].wrapped() - made; got != total-done {
			t.Errorf("after a restart with %d of %d done: got %d made anew, want the rest", done, total, got)
		}
		for _, k := range w.keks("movies") {
			if got := kmss[0].keyOf(k.Wrapped.Outer[0]); got != 1 {
				t.Errorf("kek %s is under version %d of the provider's key, want the newest", k.ID, got)
			}
		}
		if got := kmss[1].wrapped() - wraps; got != 0 {
			t.Errorf("the other provider made %d wraps, want none", got)
		}
		if by == "rewrap" && rewrapper.moved != kmss[0].wrapped()-wrapsBefore {
			t.Errorf("it moved %d of %d wraps itself", rewrapper.moved, kmss[0].wrapped()-wrapsBefore)
		}
		if s := w.status("vault"); s.Refused != "" {
			t.Errorf("by %s: the status says that access is refused: %s", by, s.Refused)
		}
		w.wantJobEntries(from, "category.reencrypt", "by vault: yearly", "now by vault, aws", "all by vault, aws")
		w.whole()
	}
}

// The helper keys move as a category does; without their old provider the next
// start goes well.
func TestMoveHelperKeys(t *testing.T) {
	w, kmss := rewrapWorld(t, 1, "vault", "aws")
	if _, err := w.c.SetProviders(t.Context(), officer, custodian.SetProvidersRequest{HelperKeys: true, Providers: []string{"vault", "aws"}}); err != nil {
		t.Fatal(err)
	}
	w.rewraps(none)
	for i, gone := range kmss {
		gone.set(custodian.ErrProviderUnavailable)
		w.breaker.down("kms.Unwrap") // local's
		if err := w.open(); err != nil {
			t.Errorf("start without local and %s: %v", kmss[i].name, err)
		}
		w.breaker.disarm()
		gone.set(nil)
	}
	w.whole()
}

// Who may, and what is refused before anything is done.
func TestRewrapRefusals(t *testing.T) {
	w, _ := rewrapWorld(t, 1, "vault", "aws")
	set := func(who custodian.Caller, req custodian.SetProvidersRequest) error {
		_, err := w.c.SetProviders(t.Context(), who, req)
		return err
	}
	good := custodian.SetProvidersRequest{Category: "movies", Providers: []string{"aws"}}
	for _, who := range []custodian.Caller{operator, auditor, packager, provider, nobody} {
		wantErr(t, who.ID, set(who, good), custodian.ErrDenied)
	}
	_, err := w.c.SetProviders(t.Context(), narrowOfficer, custodian.SetProvidersRequest{HelperKeys: true, Providers: []string{"aws"}})
	wantErr(t, "the helper keys, by an officer of one category", err, custodian.ErrDenied)
	_, err = w.c.Reencrypt(t.Context(), auditor, custodian.ReencryptRequest{Category: "movies"})
	wantErr(t, "an auditor", err, custodian.ErrDenied)
	for what, req := range map[string]custodian.SetProvidersRequest{
		"no provider":              {Category: "movies"},
		"one named twice":          {Category: "movies", Providers: []string{"aws", "aws"}},
		"one that is not there":    {Category: "movies", Providers: []string{"azure"}},
		"more than can hold one":   {Category: "movies", Providers: slices.Repeat([]string{"aws"}, 17)},
		"a category and helpers":   {Category: "movies", HelperKeys: true, Providers: []string{"aws"}},
		"neither of them":          {Providers: []string{"aws"}},
		"a cause that is too long": {Category: "movies", Providers: []string{"aws"}, Cause: strings.Repeat("x", custodian.MaxCauseSize+1)},
	} {
		wantErr(t, what, set(officer, req), custodian.ErrInvalid)
	}
	wantErr(t, "an unknown category", set(officer, custodian.SetProvidersRequest{Category: "series", Providers: []string{"aws"}}), custodian.ErrCategoryNotFound)
	_, err = w.c.Reencrypt(t.Context(), operator, custodian.ReencryptRequest{Category: "movies", Providers: []string{"aws"}})
	wantErr(t, "one that holds nothing", err, custodian.ErrInvalid)
	w.advance(-time.Hour)
	wantErr(t, "with a clock that is not believed", set(officer, good), custodian.ErrClock)
	w.advance(time.Hour)
	if got := w.jobs(); len(got) != 0 {
		t.Errorf("got jobs %+v, want none", got)
	}
	w.wantWraps("after refusals", "vault")
	denied := 0
	for _, e := range w.entries(0) {
		if e.Action == "category.providers" && e.Outcome == audit.Denied {
			denied++
		}
	}
	if denied != 6 {
		t.Errorf("got %d denials in the audit log, want 6", denied)
	}
}

// A rewrapKMS moves its wraps to its newest key by itself.
type rewrapKMS struct {
	*badKMS
	moved  int
	denied bool
}

func (k *rewrapKMS) Rewrap(ctx context.Context, w custodian.OuterWrap, binding []byte) (custodian.OuterWrap, error) {
	if k.denied {
		return custodian.OuterWrap{}, custodian.ErrProviderDenied
	}
	blob, err := k.Unwrap(ctx, w, binding)
	if err != nil {
		return custodian.OuterWrap{}, err
	}
	k.moved++
	return k.Wrap(ctx, blob, binding)
}

var errLost = errors.Join(errors.New("lost"), custodian.ErrProviderBlob)

// keyOf is the version of its own key that made a wrap.
func (k *badKMS) keyOf(w custodian.OuterWrap) int { return int(w.Blob[0]) }

// rotate gives it a new version of its own key.
func (k *badKMS) rotate() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.key++
}

func (k *badKMS) wrapped() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.wraps
}

// seal and unseal are the layer: the version of its key and the context in
// front of the blob. One moved to another record does not open.
func (k *badKMS) seal(blob, binding []byte) custodian.OuterWrap {
	k.mu.Lock()
	defer k.mu.Unlock()
	o := custodian.OuterWrap{Provider: k.name, KeyRef: "key", Blob: slices.Concat([]byte{k.key}, binding, blob)}
	if k.lies != nil {
		o = k.lies(o)
	}
	return o
}

func (k *badKMS) unseal(w custodian.OuterWrap, binding []byte) ([]byte, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.lost != nil && bytes.Equal(w.Blob, k.lost) {
		return nil, errLost
	}
	if len(w.Blob) == 0 || w.Blob[0] > k.key {
		return nil, custodian.ErrProviderBlob
	}
	blob, ours := bytes.CutPrefix(w.Blob[1:], binding)
	if !ours {
		return nil, custodian.ErrProviderBlob
	}
	blob = bytes.Clone(blob)
	if k.misreads {
		blob[0] ^= 1
	}
	return blob, nil
}
