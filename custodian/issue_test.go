package custodian_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/keycustody/custodian/custodian"
)

// tracks are n track types.
func tracks(n int) []custodian.TrackType {
	out := make([]custodian.TrackType, n)
	for i := range out {
		out[i] = custodian.TrackType(fmt.Sprintf("T%d", i))
	}
	return out
}

// Many packagers ask for the same content at once: each natural key gets one
// key, and all of them get that one.
func TestIssueRace(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	const callers = 24
	answers := make([][]custodian.IssuedKey, callers)
	var wg sync.WaitGroup
	for i := range callers {
		wg.Go(func() {
			names := []custodian.TrackType{"SD", "HD", "AUDIO", "UHD1"}
			if i%2 == 1 {
				slices.Reverse(names)
			}
			var err error
			if answers[i], err = w.c.Issue(t.Context(), packager, ask("movies", "film-1", names[:2+i%3]...)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	created, kids := map[custodian.TrackType]int{}, map[custodian.TrackType]custodian.KID{}
	for _, keys := range answers {
		for _, k := range keys {
			if k.Created {
				created[k.TrackType]++
			}
			if kid, ok := kids[k.TrackType]; ok && kid != k.KID {
				t.Errorf("track %s has two KIDs, %s and %s", k.TrackType, kid, k.KID)
			}
			kids[k.TrackType] = k.KID
		}
		w.remember(keys)
	}
	for _, tr := range []custodian.TrackType{"SD", "HD", "AUDIO", "UHD1"} {
		if created[tr] != 1 {
			t.Errorf("track %s: %d callers were told that theirs created it, want 1", tr, created[tr])
		}
	}
	w.whole()
}

func TestIssueKID(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	mine, other := custodian.KID{1}, custodian.KID{2}
	with := func(content string, kid custodian.KID) custodian.IssueRequest {
		return custodian.IssueRequest{Category: "movies", ContentID: []byte(content), Keys: []custodian.KeySpec{{TrackType: "SD", Scheme: custodian.SchemeCENC, KID: kid}}}
	}
	if got := w.issueReq(with("film-1", mine))[0]; got.KID != mine || !got.Created {
		t.Errorf("a KID of the request: got %s, created %v, want %s", got.KID, got.Created, mine)
	}
	if got := w.issueReq(with("film-1", other))[0]; got.KID != mine || got.Created {
		t.Errorf("another KID for the same content: got %s, created %v, want the stored %s", got.KID, got.Created, mine)
	}
	_, err := w.c.Issue(t.Context(), packager, with("film-2", mine))
	wantErr(t, "a KID that is stored for other content", err, custodian.ErrKIDConflict)
	drawn := w.issue("movies", "film-3", "SD")[0].KID
	if drawn[6]>>4 != 4 || drawn[8]>>6 != 2 {
		t.Errorf("a drawn KID: got %s, want a UUID of version 4", drawn)
	}

	// Two content items want the same KID at the same time.
	errs := make([]error, 8)
	var wg sync.WaitGroup
	for i := range errs {
		wg.Go(func() {
			keys, err := w.c.Issue(t.Context(), packager, with(fmt.Sprintf("race-%d", i), other))
			for _, k := range keys {
				k.Key.Destroy()
			}
			errs[i] = err
		})
	}
	wg.Wait()
	won := 0
	for _, err := range errs {
		if err == nil {
			won++
		} else if !errors.Is(err, custodian.ErrKIDConflict) {
			t.Errorf("a lost race: got %v, want ErrKIDConflict", err)
		}
	}
	if won != 1 {
		t.Errorf("%d requests got the same KID for different content, want 1", won)
	}
	w.whole()
}

func TestIssueIVAndPeriods(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	start := w.now().UTC()
	req := custodian.IssueRequest{Category: "movies", ContentID: []byte("film-1"), Keys: []custodian.KeySpec{
		{TrackType: "SD", Scheme: custodian.SchemeCENC},
		{TrackType: "SD", Scheme: custodian.SchemeCBCS},
		{TrackType: "SD", Scheme: custodian.SchemeCENS},
		{TrackType: "SD", Scheme: custodian.SchemeCBC1},
		{TrackType: "SD", Scheme: custodian.SchemeCENC, Period: custodian.Period{Set: true}},
		{TrackType: "SD", Scheme: custodian.SchemeCENC, Period: custodian.Period{Set: true, Index: 1, Start: start, End: start.Add(time.Hour)}},
		{TrackType: "HD", Scheme: custodian.SchemeCBCS},
	}}
	keys := w.issueReq(req)
	kids, ivs := map[custodian.KID]bool{}, map[string]bool{}
	for i, k := range keys {
		kids[k.KID] = true
		wantIV := 0
		if k.Scheme == custodian.SchemeCBCS {
			wantIV = 16
			ivs[string(k.IV)] = true
		}
		if len(k.IV) != wantIV {
			t.Errorf("keys[%d], %s: got an IV of %d bytes, want %d", i, k.Scheme, len(k.IV), wantIV)
		}
		if k.Origin != custodian.OriginGenerated || k.Generation != 1 || k.KEK.Version != 1 || k.BirthKEK != 1 || !k.CreateTime.Equal(w.now()) {
			t.Errorf("keys[%d]: got origin %s, generation %d, kek %s, birth %d, created %s", i, k.Origin, k.Generation, k.KEK, k.BirthKEK, k.CreateTime)
		}
	}
	if len(kids) != len(keys) || len(ivs) != 2 {
		t.Errorf("got %d KIDs and %d IVs, want %d and 2", len(kids), len(ivs), len(keys))
	}
	w.reopen()
	again := w.issueReq(req)
	for i, k := range again {
		if k.Created || k.KID != keys[i].KID || !slices.Equal(k.IV, keys[i].IV) || !k.PeriodStart.Equal(keys[i].PeriodStart) || !k.PeriodEnd.Equal(keys[i].PeriodEnd) {
			t.Errorf("keys[%d] asked again: got %+v, want %+v", i, k.ContentKey, keys[i].ContentKey)
		}
	}
	w.whole()
}

// Every refused request names its field or its error, and changes nothing.
func TestIssueRefusals(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	w.category("series")
	w.category("frozen")
	taken := w.issue("movies", "film-1", "SD")[0].KID
	w.issue("frozen", "film-9", "SD")
	w.freeze("frozen", custodian.CategoryFrozen)
	long := strings.Repeat("x", custodian.MaxContentIDSize+1)
	spec := func(f func(*custodian.KeySpec)) custodian.IssueRequest {
		r := ask("movies", "film-2", "SD", "HD")
		f(&r.Keys[1])
		return r
	}
	with := func(f func(*custodian.IssueRequest)) custodian.IssueRequest {
		r := ask("movies", "film-2", "SD", "HD")
		f(&r)
		return r
	}
	for _, test := range []struct {
		what  string
		req   custodian.IssueRequest
		field string // of an InvalidError
		want  error
	}{
		{"no keys", ask("movies", "film-2"), "keys", custodian.ErrInvalid},
		{"601 keys", ask("movies", "film-2", tracks(601)...), "keys", custodian.ErrInvalid},
		{"an empty content ID", ask("movies", "", "SD"), "content_id", custodian.ErrInvalid},
		{"a content ID of 301 bytes", ask("movies", long, "SD"), "content_id", custodian.ErrInvalid},
		{"no category", ask("", "film-2", "SD"), "category", custodian.ErrInvalid},
		{"a category of capitals", ask("Movies", "film-2", "SD"), "category", custodian.ErrInvalid},
		{"an empty track type", spec(func(k *custodian.KeySpec) { k.TrackType = "" }), "keys[1].track_type", custodian.ErrInvalid},
		{"a track type with a line break", spec(func(k *custodian.KeySpec) { k.TrackType = "a\nb" }), "keys[1].track_type", custodian.ErrInvalid},
		{"no scheme", spec(func(k *custodian.KeySpec) { k.Scheme = "" }), "keys[1].scheme", custodian.ErrInvalid},
		{"an unknown scheme", spec(func(k *custodian.KeySpec) { k.Scheme = "cbc2" }), "keys[1].scheme", custodian.ErrInvalid},
		{"the same key twice", spec(func(k *custodian.KeySpec) { k.TrackType = "SD" }), "keys[1].track_type", custodian.ErrInvalid},
		{"the same KID twice", with(func(r *custodian.IssueRequest) { r.Keys[0].KID, r.Keys[1].KID = custodian.KID{5}, custodian.KID{5} }), "keys[1].kid", custodian.ErrInvalid},
		{"a period that ends before it starts", spec(func(k *custodian.KeySpec) {
			k.Period = custodian.Period{Set: true, Start: w.now(), End: w.now().Add(-1)}
		}), "keys[1].period", custodian.ErrInvalid},
		{"a period in the year 3000", spec(func(k *custodian.KeySpec) {
			k.Period = custodian.Period{Set: true, Start: time.Date(3000, 1, 1, 0, 0, 0, 0, time.UTC)}
		}), "keys[1].period", custodian.ErrInvalid},
		{"an index of no period", spec(func(k *custodian.KeySpec) { k.Period.Index = 4 }), "keys[1].period", custodian.ErrInvalid},
		{"a request ID that the log does not take", with(func(r *custodian.IssueRequest) { r.RequestID = "a\x00b" }), "request_id", custodian.ErrInvalid},
		{"a request ID that is too long", with(func(r *custodian.IssueRequest) { r.RequestID = long }), "request_id", custodian.ErrInvalid},
		{"an unknown category", ask("sports", "film-2", "SD"), "", custodian.ErrCategoryNotFound},
		{"content of another category", ask("series", "film-1", "HD"), "", custodian.ErrContentCategory},
		{"a KID of other content", spec(func(k *custodian.KeySpec) { k.KID = taken }), "", custodian.ErrKIDConflict},
		{"a frozen category, a new key", ask("frozen", "film-8", "SD"), "", custodian.ErrCategoryFrozen},
		{"a frozen category, a key that exists", ask("frozen", "film-9", "SD"), "", custodian.ErrCategoryFrozen},
	} {
		before, err := w.st.Stats(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		keys, err := w.c.Issue(t.Context(), packager, test.req)
		wantErr(t, test.what, err, test.want)
		var bad *custodian.InvalidError
		if errors.As(err, &bad) != (test.field != "") || bad != nil && bad.Field != test.field {
			t.Errorf("%s: got %v, want field %q", test.what, err, test.field)
		}
		if keys != nil {
			t.Errorf("%s: got keys beside the error", test.what)
		}
		after, err := w.st.Stats(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if after.ContentKeys != before.ContentKeys || after.Sequence != before.Sequence {
			t.Errorf("%s: the store has changed", test.what)
		}
		w.noneInClear()
	}
	for _, who := range []custodian.Caller{provider, officer, auditor, operator, nobody, {}} {
		_, err := w.c.Issue(t.Context(), who, ask("movies", "film-2", "SD"))
		wantErr(t, "issue as "+who.ID, err, custodian.ErrDenied)
		_, err = w.c.Issue(t.Context(), who, ask("sports", "film-2", "SD"))
		wantErr(t, "issue for an unknown category as "+who.ID, err, custodian.ErrDenied)
	}
	w.freeze("frozen", custodian.CategoryOpen)
	w.whole()
}

// The largest request, which is larger than the block of invocations.
func TestIssueManyKeys(t *testing.T) {
	w := newWorld(t)
	w.cfg.GCMLimits = custodian.GCMLimits{Block: 16, Soft: 1 << 20, Hard: 1 << 21}
	w.reopen()
	w.category("movies")
	keys := w.issue("movies", strings.Repeat("x", custodian.MaxContentIDSize), tracks(custodian.MaxKeysPerIssue)...)
	if got := w.keks("movies")[0].Reserved; got < uint64(len(keys)) {
		t.Errorf("%d keys were sealed and %d invocations reserved", len(keys), got)
	}
	w.whole()
}

func TestReissueWindow(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	for _, req := range []custodian.CreateCategoryRequest{{Name: "live", Live: true}, {Name: "short", ReissueWindow: time.Hour}} {
		if _, err := w.c.CreateCategory(t.Context(), officer, req); err != nil {
			t.Fatal(err)
		}
	}
	cats := []custodian.CategoryName{"movies", "live", "short"}
	for _, cat := range cats {
		w.issue(cat, "film-"+string(cat), "SD")
	}
	again := func(who custodian.Caller, cat custodian.CategoryName) error {
		keys, err := w.c.Issue(t.Context(), who, ask(cat, "film-"+string(cat), "SD"))
		w.remember(keys)
		return err
	}
	for _, test := range []struct {
		later time.Duration // since issue
		want  map[custodian.CategoryName]error
	}{
		{0, nil},
		{time.Hour - 1, nil},
		{time.Hour, map[custodian.CategoryName]error{"short": custodian.ErrDenied}},
		{72*time.Hour - 1, map[custodian.CategoryName]error{"short": custodian.ErrDenied}},
		{72 * time.Hour, map[custodian.CategoryName]error{"short": custodian.ErrDenied, "movies": custodian.ErrDenied}},
		{80 * 24 * time.Hour, map[custodian.CategoryName]error{"short": custodian.ErrDenied, "movies": custodian.ErrDenied}},
	} {
		w.clock.Store(time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC).Add(test.later).UnixNano())
		w.reopen()
		for _, cat := range cats {
			wantErr(t, fmt.Sprintf("%s after %s", cat, test.later), again(packager, cat), test.want[cat])
			wantErr(t, fmt.Sprintf("%s after %s with a reissue grant", cat, test.later), again(patient, cat), nil)
		}
	}
	// A key whose window is over holds up those that are new in the request.
	_, err := w.c.Issue(t.Context(), packager, ask("movies", "film-movies", "SD", "HD"))
	wantErr(t, "an old key and a new one", err, custodian.ErrDenied)
	w.whole()
}

func TestMEKYear(t *testing.T) {
	w := newWorld(t)
	w.cfg.GCMLimits = custodian.GCMLimits{Block: 4, Soft: 8, Hard: 16}
	w.reopen()
	w.category("movies")
	old := w.issue("movies", "film-0", "SD")[0].KID
	warned := func() bool {
		s, err := w.c.Status(t.Context(), operator)
		if err != nil {
			t.Fatal(err)
		}
		return slices.ContainsFunc(s.Warnings, func(s string) bool { return strings.Contains(s, "mek-v1") })
	}
	w.advance(custodian.MEKPeriod - custodian.MEKWarning - time.Second)
	if warned() {
		t.Error("status warns of the MEK more than ninety days before its end")
	}
	w.advance(2 * time.Second)
	if !warned() {
		t.Error("status does not warn of the MEK ninety days before its end")
	}
	w.advance(custodian.MEKWarning - 2*time.Second)
	w.category("series") // in its last second
	w.advance(time.Second)
	_, err := w.c.CreateCategory(t.Context(), officer, custodian.CreateCategoryRequest{Name: "late"})
	wantErr(t, "a category under a MEK that is past its year", err, custodian.ErrMEKExpired)

	// Keys under the active KEK go on beyond the soft limit, where it cannot
	// be rotated, up to the hard one.
	issued := 0
	for err = nil; err == nil && issued < 32; issued++ {
		var keys []custodian.IssuedKey
		keys, err = w.c.Issue(t.Context(), packager, ask("movies", fmt.Sprintf("film-%d", issued+1), "SD"))
		w.remember(keys)
	}
	wantErr(t, "at the hard limit", err, custodian.ErrMEKExpired)
	if issued-1 < 8 || issued-1 > 15 {
		t.Errorf("%d keys were issued up to the hard limit of 16 invocations, want 8 to 15", issued-1)
	}
	wantErr(t, "release under a MEK that is past its year", w.release(provider, old), nil)
	if got := len(w.keks("movies")); got != 1 {
		t.Errorf("the category has %d KEKs; a MEK past its year made one", got)
	}
	w.cfg.ConfirmTime = true // a year was skipped
	w.whole()
}

func TestGCMLimits(t *testing.T) {
	w := newWorld(t)
	w.cfg.GCMLimits = custodian.GCMLimits{Block: 4, Soft: 9, Hard: 20}
	w.reopen()
	w.category("movies")
	reserved := func() (n uint64) {
		for _, k := range w.keks("movies") {
			n += k.Reserved
		}
		return n
	}
	sealed := w.breaker.count("hsm.Seal")
	for i := range 40 {
		w.issue("movies", fmt.Sprintf("film-%d", i), "SD")
		used := uint64(w.breaker.count("hsm.Seal")-sealed) + uint64(len(w.keks("movies"))) // a canary each
		if got := reserved(); got < used {
			t.Fatalf("after %d keys: %d invocations used, %d reserved", i+1, used, got)
		}
	}
	keks := w.keks("movies")
	if len(keks) != 5 {
		t.Errorf("40 keys at 8 a KEK: got %d versions, want 5", len(keks))
	}
	for i, k := range keks {
		want := custodian.StateDeactivated
		if i == len(keks)-1 {
			want = custodian.StateActive
		}
		if k.State != want || (k.State == custodian.StateActive) != k.DeactivateTime.IsZero() || k.Reserved > 12 {
			t.Errorf("kek %s: got %s since %s with %d reserved, want %s", k.ID, k.State, k.DeactivateTime, k.Reserved, want)
		}
	}
	births := map[uint32]int{}
	for _, k := range w.contentKeys() {
		births[k.Key.KEK.Version]++
	}
	for v, n := range births {
		if n > 8 {
			t.Errorf("kek %d: %d keys and a canary, the soft limit is 9", v, n)
		}
	}
	w.whole() // those under older versions, too

	// What a crash leaves unused stays reserved.
	w.issue("movies", "more-1", "SD")
	before := reserved()
	w.reopen()
	w.issue("movies", "more-2", "SD")
	if got := reserved(); got < before+4 {
		t.Errorf("after a restart: got %d reserved, want a new block upon %d", got, before)
	}

	// Nothing is sealed on a reservation that the store did not take.
	w.reopen()
	sealed = w.breaker.count("hsm.Seal")
	w.breaker.down("store.Update")
	_, err := w.c.Issue(t.Context(), packager, ask("movies", "more-3", "SD"))
	wantErr(t, "the block is not reserved", err, custodian.ErrStoreUnavailable)
	if n := w.breaker.count("hsm.Seal") - sealed; n != 0 || !w.breaker.disarm() {
		t.Errorf("%d keys were sealed before their invocations were reserved", n)
	}
	_, err = w.c.Issue(t.Context(), packager, ask("movies", "more-4", tracks(30)...))
	wantErr(t, "more keys than a KEK may seal", err, custodian.ErrKEKExhausted)
	w.whole()
}

func TestClock(t *testing.T) {
	start := time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)
	for _, test := range []struct {
		what    string
		off     time.Duration
		confirm bool
		want    error
	}{
		{"as it was", 0, false, nil},
		{"a little behind", -4 * time.Minute, false, nil},
		{"behind", -time.Hour, false, custodian.ErrClock},
		{"behind, confirmed", -time.Hour, true, nil},
		{"ahead", 89 * 24 * time.Hour, false, nil},
		{"far ahead", 91 * 24 * time.Hour, false, custodian.ErrClock},
		{"far ahead, confirmed", 91 * 24 * time.Hour, true, nil},
	} {
		w := newWorld(t)
		w.category("movies")
		kid := w.issue("movies", "film-1", "SD")[0].KID
		w.close()
		w.clock.Store(start.Add(test.off).UnixNano())
		w.cfg.ConfirmTime = test.confirm
		w.reopen()
		wantErr(t, test.what+": release", w.release(provider, kid), nil)
		keys, err := w.c.Issue(t.Context(), packager, ask("movies", "film-2", "SD"))
		w.remember(keys)
		wantErr(t, test.what+": issue", err, test.want)
		_, err = w.c.CreateCategory(t.Context(), officer, custodian.CreateCategoryRequest{Name: "series"})
		wantErr(t, test.what+": create a category", err, test.want)
		// The break-glass works, and the way back does not.
		w.freeze("movies", custodian.CategoryFrozen)
		wantErr(t, test.what+": release of a frozen category", w.release(provider, kid), custodian.ErrCategoryFrozen)
		_, err = w.c.SetCategoryMode(t.Context(), officer, custodian.SetModeRequest{Name: "movies", Mode: custodian.CategoryOpen})
		wantErr(t, test.what+": lift the freeze", err, test.want)

		if test.want == nil {
			continue
		}
		// The freeze has not made the wrong time the highest time seen.
		w.cfg.ConfirmTime = false
		w.reopen()
		_, err = w.c.CreateCategory(t.Context(), officer, custodian.CreateCategoryRequest{Name: "series"})
		wantErr(t, test.what+", started again: create a category", err, custodian.ErrClock)
		w.clock.Store(start.Add(time.Hour).UnixNano())
		wantErr(t, test.what+": the clock is set right", w.c.Tick(t.Context()), nil)
		w.freeze("movies", custodian.CategoryOpen)
		w.issue("movies", "film-3", "SD")
		w.whole()
	}
}

func TestTick(t *testing.T) {
	w := newWorld(t)
	revision := func() uint64 {
		s, err := w.c.Status(t.Context(), operator)
		if err != nil {
			t.Fatal(err)
		}
		return s.ControlRevision
	}
	before := revision()
	for range 23 {
		w.advance(time.Hour)
		wantErr(t, "tick", w.c.Tick(t.Context()), nil)
	}
	if got := revision(); got != before {
		t.Errorf("within a day: got revision %d, want %d", got, before)
	}
	w.advance(time.Hour)
	wantErr(t, "tick", w.c.Tick(t.Context()), nil)
	if got := revision(); got != before+1 {
		t.Errorf("after a day: got revision %d, want %d", got, before+1)
	}
	w.advance(-2 * time.Hour)
	w.reopen()
	_, err := w.c.CreateCategory(t.Context(), officer, custodian.CreateCategoryRequest{Name: "movies"})
	wantErr(t, "two hours behind what was seen", err, custodian.ErrClock)
}
