package custodian_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/keycustody/custodian/custodian"
)

// kidsOf are the KIDs of keys, in order.
func kidsOf(keys []custodian.IssuedKey) []custodian.KID {
	kids := make([]custodian.KID, len(keys))
	for i, k := range keys {
		kids[i] = k.KID
	}
	return kids
}

func TestRetrieveInOrder(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	w.category("series")
	mine := kidsOf(w.issue("movies", "film-1", "SD", "HD"))
	other := kidsOf(w.issue("series", "show-1", "SD"))
	kids := []custodian.KID{mine[1], {9}, other[0], mine[0], mine[1]}
	for _, test := range []struct {
		who  custodian.Caller
		want []error
	}{
		{provider, []error{nil, custodian.ErrKeyNotFound, nil, nil, nil}},
		{narrow, []error{nil, custodian.ErrDenied, custodian.ErrDenied, nil, nil}},
		{packager, slices.Repeat([]error{custodian.ErrDenied}, 5)},
	} {
		from := w.log.Size()
		res, err := w.c.Retrieve(t.Context(), test.who, custodian.RetrieveRequest{KIDs: kids})
		if err != nil || len(res) != len(kids) {
			t.Fatalf("%s: got %d results and %v, want %d", test.who.ID, len(res), err, len(kids))
		}
		entries := w.entries(from)
		for i, r := range res {
			what := fmt.Sprintf("%s, key %d", test.who.ID, i)
			wantErr(t, what, r.Err, test.want[i])
			if r.KID != kids[i] {
				t.Errorf("%s: got the result of %s, want of %s", what, r.KID, kids[i])
			}
			if (r.Key.Len() == custodian.CEKSize) != (r.Err == nil) || (r.Info.KID == r.KID) != (r.Err == nil) {
				t.Errorf("%s: %d bytes of key and metadata of %s with %v", what, r.Key.Len(), r.Info.KID, r.Err)
			}
			if r.Receipt.Index != from+uint64(i) || string(entries[i].KID) != string(kids[i][:]) {
				t.Errorf("%s: got receipt %d of entry for %x, want %d", what, r.Receipt.Index, entries[i].KID, from+uint64(i))
			}
			r.Key.Destroy()
		}
		w.noneInClear()
	}
	w.whole()
}

func TestRetrieveLimits(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	kids := kidsOf(w.issue("movies", "film-1", tracks(65)...))
	for _, test := range []struct {
		what  string
		req   custodian.RetrieveRequest
		field string
	}{
		{"no KID", custodian.RetrieveRequest{}, "kids"},
		{"64 KIDs", custodian.RetrieveRequest{KIDs: kids[:64]}, ""},
		{"65 KIDs", custodian.RetrieveRequest{KIDs: kids}, "kids"},
		{"the zero KID", custodian.RetrieveRequest{KIDs: []custodian.KID{kids[0], {}}}, "kids[1]"},
		{"a content ID of 301 bytes", custodian.RetrieveRequest{KIDs: kids[:1], ContentID: make([]byte, 301)}, "content_id"},
		{"a request ID that the log does not take", custodian.RetrieveRequest{KIDs: kids[:1], RequestID: "\xff"}, "request_id"},
	} {
		from := w.log.Size()
		res, err := w.c.Retrieve(t.Context(), provider, test.req)
		var bad *custodian.InvalidError
		if errors.As(err, &bad) != (test.field != "") || bad != nil && bad.Field != test.field {
			t.Errorf("%s: got %v, want field %q", test.what, err, test.field)
		}
		if err != nil && (res != nil || w.log.Size() != from) {
			t.Errorf("%s: got results or an audit entry with %v", test.what, err)
		}
		for _, r := range res {
			wantErr(t, test.what, r.Err, nil)
			r.Key.Destroy()
		}
	}
	w.whole()
}

// What cannot be written down is not released.
func TestRetrieveAuditBlocked(t *testing.T) {
	for _, op := range auditOps {
		w := newWorld(t)
		w.category("movies")
		kids := kidsOf(w.issue("movies", "film-1", tracks(8)...))
		w.breaker.arm(op, 1, false)
		for _, what := range []string{"the append fails", "the log stays blocked"} {
			res, err := w.c.Retrieve(t.Context(), provider, custodian.RetrieveRequest{KIDs: kids})
			wantErr(t, op+": "+what, err, custodian.ErrAuditBlocked)
			if res != nil {
				t.Errorf("%s: %s, and %d keys are released", op, what, len(res))
			}
			_, err = w.c.Issue(t.Context(), packager, ask("movies", "film-1", "T0"))
			wantErr(t, op+": issue while "+what, err, custodian.ErrAuditBlocked)
			w.noneInClear()
		}
		if !w.breaker.disarm() {
			t.Errorf("%s was not called", op)
		}
		wantErr(t, op+": ready", w.c.Ready(t.Context()), custodian.ErrAuditBlocked)
		w.whole()
	}
}

// A device that is away is never "no such key", nor a denial.
func TestRetrieveDeviceAway(t *testing.T) {
	for _, test := range []struct {
		op    string
		want  error
		whole bool // the call fails as a whole
	}{
		{"hsm.Open", custodian.ErrHSMUnavailable, false},
		{"hsm.LoadKey", custodian.ErrHSMUnavailable, false},
		{"kms.Unwrap", custodian.ErrKMSUnavailable, false},
		{"store.View", custodian.ErrStoreUnavailable, true},
		{"store.ContentKey", custodian.ErrStoreUnavailable, false},
	} {
		w := newWorld(t)
		w.category("movies")
		kids := kidsOf(w.issue("movies", "film-1", "SD", "HD"))
		w.reopen() // the KEK is cold
		for _, who := range []custodian.Caller{provider, narrow} {
			w.breaker.down(test.op)
			res, err := w.c.Retrieve(t.Context(), who, custodian.RetrieveRequest{KIDs: kids})
			if test.whole {
				wantErr(t, test.op, err, test.want)
			} else if err != nil || len(res) != 2 {
				t.Errorf("%s: got %d results and %v, want 2", test.op, len(res), err)
			}
			for _, r := range res {
				wantErr(t, test.op+" as "+who.ID, r.Err, test.want)
				if got := custodian.ReasonOf(r.Err); got != custodian.ReasonOf(test.want) {
					t.Errorf("%s as %s: got reason %s, want %s", test.op, who.ID, got, custodian.ReasonOf(test.want))
				}
			}
			if !w.breaker.disarm() {
				t.Errorf("%s was not called", test.op)
			}
			w.noneInClear()
		}
		w.breaker.down(test.op)
		wantErr(t, test.op+", to who has no grant", w.release(nobody, kids[0]), custodian.ErrDenied)
		w.breaker.disarm()
		wantErr(t, test.op+" is back", w.release(provider, kids[0]), nil)
		w.whole()
	}
}

// A KEK that is loaded serves while the KMS is away, to the end of its
// lifetime and no longer.
func TestKEKLifetime(t *testing.T) {
	w := newWorld(t)
	w.cfg.KEKLifetime = 10 * time.Minute
	w.reopen()
	w.category("movies")
	kid := w.issue("movies", "film-1", "SD")[0].KID
	w.breaker.down("kms.Unwrap")
	for _, test := range []struct {
		later time.Duration
		want  error
	}{
		{0, nil},
		{10*time.Minute - 1, nil},
		{1, custodian.ErrKMSUnavailable},
		{time.Hour, custodian.ErrKMSUnavailable},
	} {
		w.advance(test.later)
		wantErr(t, fmt.Sprintf("the KMS is away, %s later", test.later), w.release(provider, kid), test.want)
	}
	w.breaker.disarm()
	calls := w.breaker.count("kms.Unwrap")
	for range 3 {
		wantErr(t, "the KMS is back", w.release(provider, kid), nil)
	}
	if got := w.breaker.count("kms.Unwrap") - calls; got != 1 {
		t.Errorf("the KMS was asked %d times, want 1", got)
	}
	// Helpers have no lifetime: nothing was unwrapped for them.
	w.advance(24 * time.Hour)
	w.breaker.down("kms.Unwrap")
	w.freeze("movies", custodian.CategoryFrozen)
	w.breaker.disarm()
	w.freeze("movies", custodian.CategoryOpen)
	w.whole()
}

// After a reconnect to the token every loaded key is stale, and is loaded
// again without a caller noticing.
func TestStaleKeys(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	kid := w.issue("movies", "film-1", "SD")[0].KID
	for i := range 3 {
		w.hsm.Reconnect()
		wantErr(t, "release after a reconnect", w.release(provider, kid), nil)
		w.hsm.Reconnect()
		w.issue("movies", fmt.Sprintf("film-%d", i+2), "SD")
		w.hsm.Reconnect()
		w.freeze("movies", custodian.CategoryFrozen)
		w.freeze("movies", custodian.CategoryOpen)
	}
	// A handle that goes stale each time is a token that is out of order.
	w.hsm.Fail("Open", custodian.ErrStaleKey, 2)
	wantErr(t, "a key that stays stale", w.release(provider, kid), custodian.ErrHSMUnavailable)
	w.hsm.Fail("LoadKey", custodian.ErrStaleKey, 1)
	w.hsm.Reconnect()
	if err := w.release(provider, kid); err != nil && !errors.Is(err, custodian.ErrHSMUnavailable) {
		t.Errorf("a key that goes stale while it is loaded: got %v, want it released or ErrHSMUnavailable", err)
	}
	w.whole()
}

// Many calls for a cold KEK cost one call to the KMS.
func TestOneFlight(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	kids := kidsOf(w.issue("movies", "film-1", tracks(4)...))
	w.reopen()
	calls := w.breaker.count("kms.Unwrap")
	release := w.breaker.block("kms.Unwrap")
	var wg sync.WaitGroup
	for i := range 200 {
		wg.Go(func() {
			res, err := w.c.Retrieve(t.Context(), provider, custodian.RetrieveRequest{KIDs: kids[i%4 : i%4+1]})
			if err != nil {
				t.Error(err)
				return
			}
			wantErr(t, "release", res[0].Err, nil)
			res[0].Key.Destroy()
		})
	}
	for w.breaker.count("kms.Unwrap") == calls {
		time.Sleep(time.Millisecond)
	}
	release()
	wg.Wait()
	if got := w.breaker.count("kms.Unwrap") - calls; got != 1 {
		t.Errorf("200 calls for a cold KEK: the KMS was asked %d times, want 1", got)
	}
	w.noneInClear()
	w.whole()
}

func TestDeadline(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	kids := kidsOf(w.issue("movies", "film-1", "SD", "HD"))
	w.reopen()

	ended, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := w.c.Retrieve(ended, provider, custodian.RetrieveRequest{KIDs: kids})
	wantErr(t, "retrieve with a context that has ended", err, custodian.ErrDeadline)
	_, err = w.c.Issue(ended, packager, ask("movies", "film-2", "SD"))
	wantErr(t, "issue with a context that has ended", err, custodian.ErrDeadline)
	_, err = w.c.CreateCategory(ended, officer, custodian.CreateCategoryRequest{Name: "series"})
	wantErr(t, "create a category with a context that has ended", err, custodian.ErrDeadline)

	// The KMS does not answer. The caller leaves in time, and the load goes on
	// for those who come after.
	calls := w.breaker.count("kms.Unwrap")
	release := w.breaker.block("kms.Unwrap")
	defer release()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	began := time.Now()
	_, err = w.c.Retrieve(ctx, provider, custodian.RetrieveRequest{KIDs: kids})
	wantErr(t, "retrieve while the KMS hangs", err, custodian.ErrDeadline)
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("a caller with 30 ms waited %s", took)
	}
	w.noneInClear()
	release()
	wantErr(t, "retrieve afterwards", w.release(provider, kids[0]), nil)
	if got := w.breaker.count("kms.Unwrap") - calls; got != 1 {
		t.Errorf("the KMS was asked %d times, want once for both", got)
	}
	w.whole()
}

// While the token is away a load waits for it, and who waits for the load hears
// in time that it is the token, and not only that it was late.
func TestTokenAway(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	kids := kidsOf(w.issue("movies", "film-1", "SD"))
	w.reopen()
	w.breaker.down("hsm.Status")
	release := w.breaker.block("hsm.LoadKey")
	defer release()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	results, err := w.c.Retrieve(ctx, provider, custodian.RetrieveRequest{KIDs: kids})
	if err != nil || ctx.Err() != nil {
		t.Fatalf("got %v, %v, want an answer before the deadline", err, ctx.Err())
	}
	wantErr(t, "the key", results[0].Err, custodian.ErrHSMUnavailable)
	release()
	w.breaker.disarm()
	wantErr(t, "retrieve afterwards", w.release(provider, kids[0]), nil)
	w.whole()
}

// More keys in clear than there is room for wait for nothing: the caller is
// told to come again.
func TestArenaFull(t *testing.T) {
	w := newWorld(t)
	w.cfg.MaxReleases = 3
	w.reopen()
	w.category("movies")
	kids := kidsOf(w.issue("movies", "film-1", "SD", "HD"))
	kids = append(kids, kids...)
	res, err := w.c.Retrieve(t.Context(), provider, custodian.RetrieveRequest{KIDs: kids})
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []error{nil, nil, nil, custodian.ErrRate} {
		wantErr(t, fmt.Sprintf("key %d of room for three", i), res[i].Err, want)
	}
	_, err = w.c.Issue(t.Context(), packager, ask("movies", "film-2", "SD"))
	wantErr(t, "issue without room", err, custodian.ErrRate)
	for _, r := range res {
		r.Key.Destroy()
	}
	w.issue("movies", "film-2", "SD")
	w.whole()
}
