package custodian_test

import (
	"strings"
	"testing"
	"time"

	"github.com/keycustody/custodian/custodian"
)

func TestReportEvent(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	batch := custodian.Event{ID: "b1", Kind: custodian.EventNewBatch, Category: "movies"}
	report := func(what string, ev custodian.Event, version uint32, rotated bool, why string) {
		t.Helper()
		got, err := w.c.ReportEvent(t.Context(), packager, ev)
		if err != nil || got.KEK.Version != version || got.Rotated != rotated || !strings.Contains(got.Reason, why) || (why == "") != (got.Reason == "") {
			t.Errorf("%s: got %+v, %v, want version %d, rotated %v, %q", what, got, err, version, rotated, why)
		}
	}
	report("without standing approval", batch, 1, false, "no standing approval")
	w.cfg.Events = custodian.EventLimits{DailyCap: 3, MinInterval: time.Hour}
	w.reopen()
	w.fill("movies", "before", 2)
	report("within the interval", batch, 1, false, "younger than 1h")
	w.advance(time.Hour)
	report("first", batch, 2, true, "")
	w.fill("movies", "in the batch", 2)
	w.advance(time.Hour)
	report("repeated", batch, 2, true, "")
	w.reopen()
	report("repeated after a restart", batch, 2, true, "")
	for _, k := range w.contentKeys() {
		want := uint32(1)
		if strings.HasPrefix(string(k.Key.ContentID), "in the batch") {
			want = 2
		}
		if k.Key.KEK.Version != want {
			t.Errorf("content %s: got %s, want version %d: a batch moves nothing", k.Key.ContentID, k.Key.KEK, want)
		}
	}
	batch.ID = "b2"
	report("second", batch, 3, true, "")
	w.advance(time.Hour)
	batch.ID = "b3"
	report("at the cap", batch, 3, false, "is the cap")
	w.advance(24 * time.Hour)
	report("a day later", batch, 4, true, "")
	// A rotation in its hold is not to be overtaken.
	r := w.rotate(kekOrder)
	w.advance(25 * time.Hour)
	batch.ID = "b4"
	report("in the hold of a rotation", batch, 5, false, r.Name()+" is at HOLD")
	w.whole()

	w.category("series")
	for name, c := range map[string]struct {
		who  custodian.Caller
		ev   custodian.Event
		want error
	}{
		"packaged, no content":     {packager, custodian.Event{ID: "x", Kind: custodian.EventPackaged, Category: "movies"}, custodian.ErrInvalid},
		"packaged, no keys":        {packager, packagedEvent("x", "movies", "nothing"), custodian.ErrKeyNotFound},
		"packaged, other category": {packager, packagedEvent("x", "series", "before-0"), custodian.ErrContentCategory},
		"packaged, provider":       {provider, packagedEvent("x", "movies", "before"), custodian.ErrDenied},
		"not its category":         {source, packagedEvent("x", "series", "before"), custodian.ErrDenied},
		"no ID":                    {packager, custodian.Event{Kind: custodian.EventNewBatch, Category: "movies"}, custodian.ErrInvalid},
		"unknown kind":             {packager, custodian.Event{ID: "x", Kind: "compromise", Category: "movies"}, custodian.ErrInvalid},
		"unknown category":         {packager, custodian.Event{ID: "x", Kind: custodian.EventNewBatch, Category: "none"}, custodian.ErrCategoryNotFound},
		"provider":                 {provider, batch, custodian.ErrDenied},
	} {
		_, err := w.c.ReportEvent(t.Context(), c.who, c.ev)
		wantErr(t, name, err, c.want)
	}
}

// source may report events about movies, and nothing else.
var source = custodian.Caller{ID: "kafka:media", CA: "kafka", Roles: []custodian.Role{custodian.RoleEventSource}}

// anySource may report about every category.
var anySource = custodian.Caller{ID: "kafka:all", CA: "kafka", Roles: []custodian.Role{custodian.RoleEventSource}}

func packagedEvent(id string, cat custodian.CategoryName, content string) custodian.Event {
	return custodian.Event{ID: id, Kind: custodian.EventPackaged, Category: cat, ContentID: custodian.ContentID(content)}
}

// Content that is packaged has its keys in use: they are released as before,
// and given to packagers again by a reissue grant only.
func TestPackaged(t *testing.T) {
	w := newWorld(t)
	w.cfg.Events = custodian.EventLimits{DailyCap: 3}
	w.reopen()
	w.category("movies")
	if _, err := w.c.CreateCategory(t.Context(), officer, custodian.CreateCategoryRequest{Name: "live", Live: true}); err != nil {
		t.Fatal(err)
	}
	film := custodian.IssueRequest{Category: "movies", ContentID: custodian.ContentID("film")}
	for i := range 40 { // more than one batch
		film.Keys = append(film.Keys, custodian.KeySpec{TrackType: "HD", Scheme: custodian.SchemeCBCS, Period: custodian.Period{Set: true, Index: uint32(i)}})
	}
	w.issueReq(film)
	w.issue("movies", "other", "SD")
	channel := w.issue("live", "channel", "SD")[0]
	if _, err := w.c.ReportEvent(t.Context(), source, custodian.Event{ID: "b1", Kind: custodian.EventNewBatch, Category: "movies"}); err != nil {
		t.Fatal(err)
	}
	report := func(what, id string, cat custodian.CategoryName, content string, marked int) {
		t.Helper()
		from := w.log.Size()
		who := packager
		if cat == "movies" {
			who = source
		}
		got, err := w.c.ReportEvent(t.Context(), who, packagedEvent(id, cat, content))
		if err != nil || got.Marked != marked {
			t.Errorf("%s: got %+v, %v, want %d keys marked", what, got, err, marked)
		}
		e := w.entries(from)
		if last := e[len(e)-1]; last.Action != "content.packaged" || last.RequestID != id || last.Outcome != custodian.AuditAllowed || string(last.ContentID) != content {
			t.Errorf("%s: the log has %s", what, line(last))
		}
	}
	report("first", "p1", "movies", "film", 40)
	report("repeated", "p1", "movies", "film", 0)
	w.reopen()
	report("repeated after a restart", "p1", "movies", "film", 0)
	report("live content", "p2", "live", "channel", 1)
	for _, k := range w.contentKeys() {
		if packaged := string(k.Key.ContentID) != "other"; packaged == k.Key.PackagedTime.IsZero() || packaged && !k.Key.PackagedTime.Equal(w.now()) {
			t.Errorf("content %s: packaged at %v", k.Key.ContentID, k.Key.PackagedTime)
		}
	}

	_, err := w.c.Issue(t.Context(), packager, film)
	wantErr(t, "packaged, within the window", err, custodian.ErrDenied)
	_, err = w.c.Issue(t.Context(), packager, ask("live", "channel", "SD"))
	wantErr(t, "packaged, live", err, custodian.ErrDenied)
	w.issue("movies", "other", "SD")
	keys, err := w.c.Issue(t.Context(), patient, film)
	if err != nil {
		t.Fatalf("with a reissue grant: %v", err)
	}
	w.remember(keys)
	wantErr(t, "a callback", w.release(provider, channel.KID), nil)

	// Keys of later periods are not packaged, and a later event says so.
	later := custodian.IssueRequest{Category: "movies", ContentID: film.ContentID}
	later.Keys = []custodian.KeySpec{{TrackType: "HD", Scheme: custodian.SchemeCBCS, Period: custodian.Period{Set: true, Index: 100}}}
	w.issueReq(later)
	w.issueReq(later)
	report("later periods", "p4", "movies", "film", 1)
	_, err = w.c.Issue(t.Context(), packager, later)
	wantErr(t, "packaged later", err, custodian.ErrDenied)
	// They rotate as others do, and stay in use.
	w.rotate(kekOrder)
	_, err = w.c.Issue(t.Context(), packager, film)
	wantErr(t, "packaged and rotated", err, custodian.ErrDenied)
	w.whole()
}

// An event source that may report about every category can revoke a session;
// one that is granted some of them cannot, nor can a packager.
func TestSessionRevokedByEvent(t *testing.T) {
	w := newWorld(t)
	ev := custodian.Event{ID: "s1", Kind: custodian.EventSessionRevoked, SessionID: "viewer-7"}
	for name, who := range map[string]custodian.Caller{"movies only": source, "packager": packager, "officer": officer, "nobody": nobody} {
		_, err := w.c.ReportEvent(t.Context(), who, ev)
		wantErr(t, name, err, custodian.ErrDenied)
	}
	for _, bad := range []custodian.Event{{ID: "s1", Kind: custodian.EventSessionRevoked}, {ID: "s1", Kind: custodian.EventSessionRevoked, SessionID: "x", Category: "movies"},
		{ID: "s1", Kind: custodian.EventNewBatch, SessionID: "x", Category: "movies"}} {
		_, err := w.c.ReportEvent(t.Context(), anySource, bad)
		wantErr(t, "malformed", err, custodian.ErrInvalid)
	}
	for range 2 { // it is the same event
		if _, err := w.c.ReportEvent(t.Context(), anySource, ev); err != nil {
			t.Fatal(err)
		}
		got, err := w.c.Revocations(t.Context(), operator)
		if err != nil || len(got) != 1 || got[0].By != anySource.ID || !got[0].Until.After(w.now()) {
			t.Errorf("revocations: got %+v, %v, want one", got, err)
		}
		w.reopen()
	}
	w.category("movies")
	kid := w.issue("movies", "film", "SD")[0].KID
	res, err := w.c.Retrieve(t.Context(), provider, custodian.RetrieveRequest{KIDs: []custodian.KID{kid}, SessionID: ev.SessionID})
	if err == nil {
		err = res[0].Err
		res[0].Key.Destroy()
	}
	wantErr(t, "the session's next callback", err, custodian.ErrTokenRevoked)
	wantErr(t, "another session's", w.release(provider, kid), nil)
}

// A flood of events makes no more versions than the cap.
func TestEventFlood(t *testing.T) {
	w := newWorld(t)
	w.cfg.Events = custodian.EventLimits{DailyCap: 2, MinInterval: time.Minute}
	w.reopen()
	w.category("movies")
	for i := range 50 {
		w.advance(time.Minute)
		ev := custodian.Event{ID: strings.Repeat("x", i+1), Kind: custodian.EventNewBatch, Category: "movies"}
		if _, err := w.c.ReportEvent(t.Context(), packager, ev); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(w.keks("movies")); n != 2 {
		t.Errorf("got %d versions, want 2", n)
	}
	w.whole()
}

// A KEK protects for two years at most. Here its MEK is rotatable, so that a
// new MEK brings no new KEK with it.
func TestKEKAge(t *testing.T) {
	w := profileWorld(t, custodian.ProfileRotatable)
	w.category("movies")
	w.fill("movies", "film", 2)
	w.cfg.ConfirmTime = true
	later := func(d time.Duration) {
		t.Helper()
		w.clock.Add(int64(d))
		w.reopen()
	}
	later(custodian.KEKMaxAge - time.Hour)
	wantErr(t, "before its time", w.c.RotateAged(t.Context()), nil)
	if n := len(w.keks("movies")); n != 1 {
		t.Errorf("before its time: got %d versions, want 1", n)
	}
	later(2 * time.Hour)
	wantErr(t, "under a MEK past its year", w.c.RotateAged(t.Context()), custodian.ErrMEKExpired)
	w.rotate(mekOrder)
	for range 2 {
		wantErr(t, "past its time", w.c.RotateAged(t.Context()), nil)
		if n := len(w.keks("movies")); n != 2 {
			t.Errorf("past its time: got %d versions, want 2", n)
		}
	}
	w.whole()
}
