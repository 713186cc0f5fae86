package custodian_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/audit"
)

// A badKMS is a KMS of which the test says what it answers. It stands at the
// Provider interface, where a real one takes too long to seal, revoke and
// throttle; kms has those tests.
type badKMS struct {
	name string

	// mu guards the fields below.
	mu    sync.Mutex
	fails error         // what it answers; nil: it works
	hangs chan struct{} // it answers nothing until that is closed
	slow  time.Duration
	opens int
	wraps int
	key   byte // the newest version of its own key
	// What it makes is changed by lies, what it opens is garbage while it
	// misreads, and it knows nothing of the wrap lost.
	lies     func(custodian.OuterWrap) custodian.OuterWrap
	misreads bool
	lost     []byte
	before   func(context.Context) // is called before a wrap is made
}

func (k *badKMS) Name() string { return k.name }
func (k *badKMS) Close() error { return nil }
func (k *badKMS) Status() custodian.ProviderStatus {
	return custodian.ProviderStatus{Name: k.name, Kind: "test", OuterLayer: true}
}

func (k *badKMS) set(fails error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.fails = fails
}

// hang makes it hang until the result is called.
func (k *badKMS) hang() (end func()) {
	k.mu.Lock()
	defer k.mu.Unlock()
	c := make(chan struct{})
	k.hangs = c
	return sync.OnceFunc(func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.hangs = nil
		close(c)
	})
}

func (k *badKMS) opened() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.opens
}

func (k *badKMS) answer(ctx context.Context, count *int) error {
	k.mu.Lock()
	*count++
	hangs, slow, fails := k.hangs, k.slow, k.fails
	k.mu.Unlock()
	if slow > 0 {
		time.Sleep(slow)
	}
	if hangs != nil {
		select {
		case <-hangs:
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", custodian.ErrProviderUnavailable, ctx.Err())
		}
	}
	return fails
}

func (k *badKMS) Wrap(ctx context.Context, blob, binding []byte) (custodian.OuterWrap, error) {
	k.mu.Lock()
	before := k.before
	k.mu.Unlock()
	if before != nil {
		before(ctx)
	}
	if err := k.answer(ctx, &k.wraps); err != nil {
		return custodian.OuterWrap{}, err
	}
	return k.seal(blob, binding), nil
}

func (k *badKMS) Unwrap(ctx context.Context, w custodian.OuterWrap, binding []byte) ([]byte, error) {
	if err := k.answer(ctx, &k.opens); err != nil {
		return nil, err
	}
	return k.unseal(w, binding)
}

const (
	testLifetime = 10 * time.Minute
	testGrace    = time.Hour
	testCeiling  = 3 * time.Hour
)

// graceWorld is a world with one key, whose category needs any one of the
// KMSs named. The helper keys are local's.
func graceWorld(t *testing.T, names ...string) (w *world, kid custodian.KID, kmss []*badKMS, incidents *[]custodian.Incident) {
	t.Helper()
	w = newWorld(t)
	incidents = &[]custodian.Incident{}
	w.cfg.KEKLifetime = testLifetime
	w.cfg.KMS.Grace, w.cfg.KMS.GraceCeiling, w.cfg.KMS.Deadline = testGrace, testCeiling, 300*time.Millisecond
	w.cfg.KMS.Patience = 10 * time.Second // else a busy machine decides what is answered
	w.cfg.OnIncident = func(i custodian.Incident) { *incidents = append(*incidents, i) }
	for _, name := range names {
		k := &badKMS{name: name}
		kmss = append(kmss, k)
		w.cfg.Providers = append(w.cfg.Providers, k)
	}
	w.reopen()
	if _, err := w.c.CreateCategory(t.Context(), officer, custodian.CreateCategoryRequest{Name: "movies", Providers: names}); err != nil {
		t.Fatal(err)
	}
	return w, w.issue("movies", "film-1", "SD")[0].KID, kmss, incidents
}

// callback is one callback, and what the audit log says of it.
func (w *world) callback(kid custodian.KID) (custodian.RetrieveResult, audit.Entry) {
	w.t.Helper()
	from := w.log.Size()
	r := w.retrieve(provider, kid)
	r.Key.Destroy()
	entries := w.entries(from)
	if len(entries) != 1 {
		w.t.Fatalf("got %d audit entries of one callback, want 1", len(entries))
	}
	return r, entries[0]
}

// wantGrace checks a callback: released with this much grace left (zero:
// without), or refused with want; and that the audit log says the same.
func (w *world) wantGrace(what string, kid custodian.KID, left time.Duration, want error) {
	w.t.Helper()
	r, e := w.callback(kid)
	wantErr(w.t, what, r.Err, want)
	if r.Grace != left {
		w.t.Errorf("%s: got %s of grace left, want %s", what, r.Grace, left)
	}
	detail := ""
	if left > 0 {
		detail = fmt.Sprintf("kms grace: %d s left", custodian.GraceSeconds(left))
	}
	outcome, cause := audit.Allowed, ""
	if want != nil {
		outcome, cause = audit.Failed, string(custodian.ReasonOf(want))
	}
	if e.Action != "release" || e.Outcome != outcome || e.Reason != cause || e.Detail != detail {
		w.t.Errorf("%s: the audit log says %s %s %q %q, want release %s %q %q", what, e.Action, e.Outcome, e.Reason, e.Detail, outcome, cause, detail)
	}
}

func (w *world) status(name string) custodian.ProviderStatus {
	w.t.Helper()
	s, err := w.c.Status(w.t.Context(), operator)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, p := range s.Providers {
		if p.Name == name {
			return p
		}
	}
	w.t.Fatalf("no provider %s in the status", name)
	return custodian.ProviderStatus{}
}

// The KMS goes away. Loaded KEKs serve to the end of their lifetime, then for
// the grace, counted from the last contact, to the nanosecond.
func TestGrace(t *testing.T) {
	for _, test := range []struct {
		name string
		gone time.Duration // after the last contact, when the outage begins
	}{
		{"at once", 0},
		{"just before the lifetime ends", testLifetime - 1},
		{"just when it ends", testLifetime},
	} {
		t.Run(test.name, func(t *testing.T) {
			w, kid, kmss, _ := graceWorld(t, "vault")
			w.advance(test.gone)
			kmss[0].set(custodian.ErrProviderUnavailable)
			passed := test.gone
			at := func(since time.Duration) { w.advance(since - passed); passed = since }
			if test.gone < testLifetime {
				w.wantGrace("the outage begins", kid, 0, nil)
				at(testLifetime - 1)
				w.wantGrace("the last moment of the lifetime", kid, 0, nil)
			}
			at(testLifetime)
			w.wantGrace("the lifetime is over", kid, testGrace-testLifetime, nil)
			at(testGrace - time.Second)
			w.wantGrace("a second before the end", kid, time.Second, nil)
			at(testGrace - 1)
			w.wantGrace("a nanosecond before the end", kid, 1, nil)
			at(testGrace)
			w.wantGrace("the grace is over", kid, 0, custodian.ErrKMSUnavailable)
			if s := w.status("vault"); s.GraceLeft != 0 || s.AwaySince.IsZero() {
				t.Errorf("status: got %s of grace left and away since %s, want none left", s.GraceLeft, s.AwaySince)
			}
			w.c.TickKMS()
			w.wantGrace("after the handle was let go", kid, 0, custodian.ErrKMSUnavailable)
			kmss[0].set(nil)
			w.wantGrace("the KMS is back, without a restart", kid, 0, nil)
			w.whole()
		})
	}
}

// Probes prove contact, and so the grace counts from the last of them; but no
// KEK serves beyond the ceiling after it was itself loaded.
func TestGraceCeiling(t *testing.T) {
	w, kid, kmss, _ := graceWorld(t, "vault")
	for range int(testCeiling/time.Minute) - 30 {
		w.advance(time.Minute)
		w.c.ProbeKMS(t.Context())
	}
	// It lies unused for 2 h 30, and contact is a moment old.
	kmss[0].set(custodian.ErrProviderUnavailable)
	w.wantGrace("bounded by the ceiling, not by the last contact", kid, 30*time.Minute, nil)
	w.advance(30*time.Minute - 1)
	w.wantGrace("the last moment", kid, 1, nil)
	w.advance(1)
	w.wantGrace("the ceiling", kid, 0, custodian.ErrKMSUnavailable)
	kmss[0].set(nil)
	w.whole()
}

// A clock that is set back makes no grace longer, and one that is set back
// again and again neither.
func TestGraceClockBack(t *testing.T) {
	w, kid, kmss, _ := graceWorld(t, "vault")
	kmss[0].set(custodian.ErrProviderUnavailable)
	w.advance(30 * time.Minute)
	w.wantGrace("half of it is over", kid, 30*time.Minute, nil)
	w.advance(-2 * time.Hour)
	w.wantGrace("the clock is set back", kid, 30*time.Minute, nil)
	w.advance(30*time.Minute - 1)
	w.wantGrace("it goes on from there", kid, 1, nil)
	w.advance(-time.Second)
	w.wantGrace("set back again", kid, 1, nil)
	w.advance(1)
	w.wantGrace("the grace is over", kid, 0, custodian.ErrKMSUnavailable)
	w.advance(-time.Hour)
	w.wantGrace("and stays over", kid, 0, custodian.ErrKMSUnavailable)
	kmss[0].set(nil)
	w.whole()
}

// What a KMS answers, and what the callback then does, for a KEK whose
// lifetime is over and for one that was never loaded.
func TestBadDays(t *testing.T) {
	left := testGrace - testLifetime
	for _, test := range []struct {
		name  string
		spoil func(*badKMS) (mend func())
		left  time.Duration // of grace, with a loaded KEK
		warm  error         // with a loaded KEK
		cold  error         // with none
	}{
		{"sealed, 5xx, reset, login refused", failing(custodian.ErrProviderUnavailable), left, nil, custodian.ErrKMSUnavailable},
		{"an error of no class", failing(errors.New("garbage")), left, nil, custodian.ErrKMSUnavailable},
		{"throttled", failing(custodian.ErrProviderThrottled), left, nil, custodian.ErrKMSUnavailable},
		{"denied after a good login", failing(custodian.ErrProviderDenied), 0, custodian.ErrKMSUnavailable, custodian.ErrKMSUnavailable},
		{"disabled", failing(custodian.ErrProviderDisabled), 0, custodian.ErrKMSUnavailable, custodian.ErrKMSUnavailable},
		{"another record's blob", failing(custodian.ErrProviderBlob), 0, custodian.ErrRecordCorrupt, custodian.ErrRecordCorrupt},
		{"hangs", (*badKMS).hang, left, nil, custodian.ErrKMSUnavailable},
		{"slow", func(k *badKMS) func() {
			k.mu.Lock()
			defer k.mu.Unlock()
			k.slow = 20 * time.Millisecond
			return func() { k.mu.Lock(); defer k.mu.Unlock(); k.slow = 0 }
		}, 0, nil, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			w, kid, kmss, _ := graceWorld(t, "vault")
			w.advance(testLifetime)
			mend := test.spoil(kmss[0])
			w.wantGrace("with a loaded KEK", kid, test.left, test.warm)
			w.wantGrace("and again", kid, test.left, test.warm)
			_, err := w.c.CreateCategory(t.Context(), officer, custodian.CreateCategoryRequest{Name: "series", Providers: []string{"vault"}})
			if (err != nil) != (test.cold != nil) {
				t.Errorf("a new KEK: got %v, want no grace for it", err)
			}
			w.reopen()
			w.wantGrace("with a cold KEK", kid, 0, test.cold)
			mend()
			w.advance(maxThrottle)
			w.wantGrace("mended, without a restart", kid, 0, nil)
			w.whole()
		})
	}
}

// maxThrottle is beyond the longest pause after a throttle.
const maxThrottle = 31 * time.Second

func failing(err error) func(*badKMS) func() {
	return func(k *badKMS) func() {
		k.set(err)
		return func() { k.set(nil) }
	}
}

// Access that is taken away in the middle of an outage ends the grace at once,
// and an outage after that does not bring it back: only a success does.
func TestDeniedEndsGrace(t *testing.T) {
	for _, refusal := range []error{custodian.ErrProviderDenied, custodian.ErrProviderDisabled} {
		w, kid, kmss, _ := graceWorld(t, "vault")
		kmss[0].set(custodian.ErrProviderUnavailable)
		w.advance(testLifetime)
		w.wantGrace("away", kid, testGrace-testLifetime, nil)
		kmss[0].set(refusal)
		w.wantGrace("refused", kid, 0, custodian.ErrKMSUnavailable)
		if s := w.status("vault"); s.Refused == "" || s.GraceLeft != 0 || !s.AwaySince.IsZero() {
			t.Errorf("status: got refused %q, grace %s, away since %s", s.Refused, s.GraceLeft, s.AwaySince)
		}
		kmss[0].set(custodian.ErrProviderUnavailable)
		w.wantGrace("away after that", kid, 0, custodian.ErrKMSUnavailable)
		kmss[0].set(nil)
		w.wantGrace("back", kid, 0, nil)
		kmss[0].set(custodian.ErrProviderUnavailable)
		w.advance(testLifetime)
		w.wantGrace("away again", kid, testGrace-testLifetime, nil)
		kmss[0].set(nil)
		w.whole()
	}
}

// A probe that is refused ends the grace of keys that nobody asks for, too.
func TestProbeEndsGrace(t *testing.T) {
	w, kid, kmss, _ := graceWorld(t, "vault")
	kmss[0].set(custodian.ErrProviderDenied)
	w.advance(testLifetime)
	w.c.ProbeKMS(t.Context())
	kmss[0].set(custodian.ErrProviderUnavailable)
	w.wantGrace("refused by a probe", kid, 0, custodian.ErrKMSUnavailable)
	kmss[0].set(nil)
	w.whole()
}

// While the KMS hangs and all needed KEKs are loaded, nobody waits for it: the
// first callback after the lifetime waits a little, the others not at all.
func TestHangIsNotWaitedFor(t *testing.T) {
	w, kid, kmss, _ := graceWorld(t, "vault")
	w.cfg.KMS.Deadline, w.cfg.KMS.Patience = 5*time.Second, 0
	w.reopen()
	w.wantGrace("load", kid, 0, nil)
	w.advance(testLifetime)
	end := kmss[0].hang()
	defer end()
	for i := range 20 {
		ctx, cancel := context.WithTimeout(t.Context(), 250*time.Millisecond)
		began := time.Now()
		res, err := w.c.Retrieve(ctx, provider, custodian.RetrieveRequest{KIDs: []custodian.KID{kid}})
		took := time.Since(began)
		cancel()
		if err != nil || res[0].Err != nil || res[0].Grace == 0 {
			t.Fatalf("callback %d: got %v %+v, want a key on grace", i, err, res)
		}
		res[0].Key.Destroy()
		if i > 0 && took > 80*time.Millisecond {
			t.Errorf("callback %d took %s while the KMS hangs", i, took)
		}
	}
	end()
	w.whole()
}

// Ten thousand callbacks over a hundred KEKs cost a hundred openings within
// the lifetime, also when they all start at once.
func TestOneOpeningPerKEK(t *testing.T) {
	const categories, calls = 100, 100
	w, _, kmss, _ := graceWorld(t, "vault")
	w.cfg.MaxReleases = categories * calls
	w.cfg.KMS.Deadline, w.cfg.ReleaseDeadline = 30*time.Second, time.Minute
	w.reopen()
	var kids []custodian.KID
	for i := range categories {
		name := custodian.CategoryName(fmt.Sprintf("category-%d", i))
		if _, err := w.c.CreateCategory(t.Context(), officer, custodian.CreateCategoryRequest{Name: name, Providers: []string{"vault"}}); err != nil {
			t.Fatal(err)
		}
		kids = append(kids, w.issue(name, fmt.Sprintf("title-%d", i), "SD")[0].KID)
	}
	w.reopen() // all are cold
	before := kmss[0].opened()
	start := make(chan struct{})
	places := make(chan struct{}, 4000) // more at once are shed
	var wg sync.WaitGroup
	for i := range categories * calls {
		wg.Go(func() {
			<-start
			places <- struct{}{}
			defer func() { <-places }()
			ask := func() ([]custodian.RetrieveResult, error) {
				return w.c.Retrieve(t.Context(), provider, custodian.RetrieveRequest{KIDs: kids[i%categories : i%categories+1]})
			}
			res, err := ask()
			for until := time.Now().Add(time.Minute); errors.Is(err, custodian.ErrRate) && time.Now().Before(until); res, err = ask() {
				time.Sleep(50 * time.Millisecond) // a slow machine sends some away
			}
			if err != nil || res[0].Err != nil {
				t.Errorf("callback %d: got %v %v", i, err, res)
				return
			}
			res[0].Key.Destroy()
		})
	}
	close(start)
	wg.Wait()
	if got := kmss[0].opened() - before; got != categories {
		t.Errorf("%d callbacks over %d KEKs: got %d openings, want %d", categories*calls, categories, got, categories)
	}
	w.advance(testLifetime - 1)
	for _, kid := range kids {
		wantErr(t, "within the lifetime", w.release(provider, kid), nil)
	}
	if got := kmss[0].opened() - before; got != categories {
		t.Errorf("at the end of the lifetime: got %d openings, want %d", got, categories)
	}
	for _, c := range w.status("vault").CallsByReason {
		if c.Reason == custodian.CallLoad && (c.Result != custodian.ResultOK || c.Count != categories) {
			t.Errorf("status counts %+v, want %d openings and no other", c, categories)
		}
	}
}

// Any one of a category's KMSs opens its KEKs: to lose one is no outage. The
// last good one is asked first, and one that hangs is not waited for.
func TestAnyOf(t *testing.T) {
	w, kid, kmss, _ := graceWorld(t, "vault", "aws")
	vault, aws := kmss[0], kmss[1]
	opened := func(f func()) (int, int) {
		v, a := vault.opened(), aws.opened()
		w.advance(testLifetime)
		f()
		return vault.opened() - v, aws.opened() - a
	}
	vault.set(custodian.ErrProviderUnavailable)
	w.advance(testLifetime)
	w.wantGrace("the first is away", kid, 0, nil)
	if v, a := opened(func() { w.wantGrace("and once more", kid, 0, nil) }); v != 0 || a != 1 {
		t.Errorf("the first was asked %d times and the second %d, want 0 and 1", v, a)
	}
	vault.set(nil)
	aws.set(custodian.ErrProviderDenied)
	w.advance(testLifetime)
	w.wantGrace("the second is revoked", kid, 0, nil)
	if v, a := opened(func() { w.wantGrace("and once more", kid, 0, nil) }); v != 1 || a != 0 {
		t.Errorf("the first was asked %d times and the second %d, want 1 and 0", v, a)
	}

	// The second is still revoked, and the first goes away: grace by the first.
	vault.set(custodian.ErrProviderUnavailable)
	w.advance(testLifetime)
	w.wantGrace("one revoked, one away", kid, testGrace-testLifetime, nil)
	aws.set(nil)
	w.wantGrace("access is back", kid, 0, nil)

	vault.set(nil)
	end := vault.hang()
	w.cfg.KMS.Deadline = time.Minute
	w.reopen() // nothing is known of either: the first is asked first
	began := time.Now()
	w.wantGrace("a cold KEK, and the first hangs", kid, 0, nil)
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("one that hangs for a minute was waited for, %s", took)
	}
	end()

	w.cfg.KMS.Deadline = 300 * time.Millisecond
	w.reopen()
	end = aws.hang()
	defer end()
	// Making a KEK needs all of them.
	_, err := w.c.CreateCategory(t.Context(), officer, custodian.CreateCategoryRequest{Name: "series", Providers: []string{"vault", "aws"}})
	wantErr(t, "a new KEK while one hangs", err, custodian.ErrKMSUnavailable)
	end()
	w.whole()
}

// Issuing under a KEK that is loaded goes on during the grace, and says so.
// A KEK that would be new is not made.
func TestIssueOnGrace(t *testing.T) {
	w, _, kmss, _ := graceWorld(t, "vault")
	w.cfg.GCMLimits = custodian.GCMLimits{Block: 2, Soft: 4, Hard: 1 << 20}
	w.reopen()
	w.issue("movies", "film-2", "SD")
	versions := len(w.keks("movies"))
	kmss[0].set(custodian.ErrProviderUnavailable)
	w.advance(testLifetime)
	from := w.log.Size()
	keys, err := w.c.Issue(t.Context(), packager, ask("movies", "film-3", tracks(8)...)) // beyond the soft limit
	if err != nil {
		t.Fatal(err)
	}
	w.remember(keys)
	for _, k := range keys {
		if k.Grace != testGrace-testLifetime || k.KEK.Version != uint32(versions) {
			t.Errorf("issued under %s with %s of grace left, want version %d and %s", k.KEK, k.Grace, versions, testGrace-testLifetime)
		}
	}
	marked := 0
	for _, e := range w.entries(from) {
		if e.Action == "issue" && strings.HasPrefix(e.Detail, "kms grace: ") {
			marked++
		}
	}
	if marked != len(keys) {
		t.Errorf("%d of %d audit entries name the grace", marked, len(keys))
	}
	if got := len(w.keks("movies")); got != versions {
		t.Errorf("got %d KEK versions, want none made while the KMS is away, as %d before", got, versions)
	}
	kmss[0].set(nil)
	w.issue("movies", "film-4", "SD", "HD")
	if got := len(w.keks("movies")); got != versions+1 {
		t.Errorf("got %d KEK versions once the KMS is back, want %d", got, versions+1)
	}
	w.whole()
}

// A provider that fails is left alone for a while, and then tried again. A
// throttled one is, too, without counting as away.
func TestLeftAlone(t *testing.T) {
	w, kid, kmss, incidents := graceWorld(t, "vault")
	w.cfg.KMS.BreakerPause = time.Hour
	w.reopen()
	kmss[0].set(custodian.ErrProviderUnavailable)
	before := kmss[0].opened()
	for range 50 {
		wantErr(t, "away", w.release(provider, kid), custodian.ErrKMSUnavailable)
	}
	if got := kmss[0].opened() - before; got != 5 {
		t.Errorf("50 callbacks for a KEK that cannot be loaded: got %d calls, want 5", got)
	}
	kmss[0].set(nil)
	wantErr(t, "within the pause", w.release(provider, kid), custodian.ErrKMSUnavailable)
	w.cfg.KMS.BreakerPause = 20 * time.Millisecond
	w.reopen()
	kmss[0].set(custodian.ErrProviderUnavailable)
	for range 5 {
		wantErr(t, "away", w.release(provider, kid), custodian.ErrKMSUnavailable)
	}
	kmss[0].set(nil)
	time.Sleep(30 * time.Millisecond)
	wantErr(t, "after the pause", w.release(provider, kid), nil)

	kmss[0].set(custodian.ErrProviderThrottled)
	w.reopen()
	before = kmss[0].opened()
	for range 50 {
		wantErr(t, "throttled", w.release(provider, kid), custodian.ErrKMSUnavailable)
	}
	if got := kmss[0].opened() - before; got != 1 {
		t.Errorf("50 callbacks while we are throttled: got %d calls, want 1", got)
	}
	w.advance(time.Hour)
	w.c.TickKMS()
	if len(*incidents) != 0 || !w.status("vault").AwaySince.IsZero() {
		t.Errorf("a throttle counts as an outage: %+v", *incidents)
	}
	kmss[0].set(nil)
	wantErr(t, "not throttled any more", w.release(provider, kid), nil)
	w.whole()
}

// An outage of five minutes is an incident: declared once, to the second, and
// closed once, a minute after contact is back to stay.
func TestIncident(t *testing.T) {
	w, _, kmss, incidents := graceWorld(t, "vault")
	told := func(what string, want int) {
		t.Helper()
		w.c.TickKMS()
		if got := len(*incidents); got != want {
			t.Fatalf("%s: got %d messages, want %d: %+v", what, got, want, *incidents)
		}
	}
	probe := func(fails error) {
		kmss[0].set(fails)
		w.advance(time.Minute)
		w.c.ProbeKMS(t.Context())
	}
	away := custodian.ErrProviderUnavailable

	probe(away)
	began := w.now().UTC()
	w.advance(5*time.Minute - time.Second)
	told("a second too early", 0)
	w.advance(time.Second)
	told("five minutes", 1)
	first := (*incidents)[0]
	if !first.Since.Equal(began) || !first.Declared.Equal(began.Add(5*time.Minute)) || !first.Closed.IsZero() || first.Provider != "vault" || first.LastError == "" {
		t.Errorf("got %+v, want it since %s", first, began)
	}
	for range 10 {
		probe(away)
		told("it goes on", 1)
	}
	if s := w.status("vault"); !s.Incident.Equal(first.Declared) || s.Incidents != 1 {
		t.Errorf("status: got incident %s of %d", s.Incident, s.Incidents)
	}

	// Flapping: it comes and goes, and never stays for a minute.
	for range 10 {
		probe(nil)
		w.advance(30 * time.Second)
		told("back for half a minute", 1)
		probe(away)
		told("away again", 1)
	}
	probe(nil)
	back := w.now().UTC()
	w.advance(time.Minute - time.Second)
	told("back for 59 seconds", 1)
	w.advance(-time.Hour)
	told("the clock is set back", 1)
	w.advance(time.Second)
	told("back for a minute", 2)
	last := (*incidents)[1]
	if last.ID != first.ID || last.Closed.IsZero() || last.Closed.Sub(last.Back) != time.Minute {
		t.Errorf("got %+v, want it back at %s and closed a minute later", last, back)
	}
	if s := w.status("vault"); !s.Incident.IsZero() || s.Incidents != 1 {
		t.Errorf("status after it: got incident %s of %d", s.Incident, s.Incidents)
	}

	// Four minutes away, again and again, are none; nor is a refusal.
	for range 5 {
		probe(away)
		w.advance(4 * time.Minute)
		told("four minutes", 2)
		probe(nil)
		told("back", 2)
	}
	for range 10 {
		probe(custodian.ErrProviderDenied)
		told("access revoked is no outage", 2)
	}
	// A second one has a name of its own.
	probe(away)
	w.advance(5 * time.Minute)
	told("a second outage", 3)
	if id := (*incidents)[2].ID; id == first.ID {
		t.Errorf("two incidents have the ID %s", id)
	}
	kmss[0].set(nil)
}

// A provider is probed once a minute where nobody calls it, and not at all
// where somebody does.
func TestProbes(t *testing.T) {
	w, kid, kmss, _ := graceWorld(t, "vault")
	probes := func() uint64 {
		for _, c := range w.status("vault").CallsByReason {
			if c.Reason == custodian.CallProbe {
				return c.Count
			}
		}
		return 0
	}
	for _, fails := range []error{nil, custodian.ErrProviderUnavailable} {
		kmss[0].set(fails)
		before := kmss[0].opened()
		for range 600 {
			w.advance(time.Second)
			w.c.ProbeKMS(t.Context())
			w.c.Ready(t.Context())
		}
		if got := kmss[0].opened() - before; got != 10 {
			t.Errorf("ten minutes, and the KMS answers %v: got %d probes, want 10", fails, got)
		}
	}
	kmss[0].set(nil)
	w.cfg.KEKLifetime = 30 * time.Second
	w.reopen()
	for range 10 {
		wantErr(t, "release", w.release(provider, kid), nil)
		w.advance(30 * time.Second)
		w.c.ProbeKMS(t.Context())
	}
	if got := probes(); got != 0 {
		t.Errorf("somebody calls it every half minute: got %d probes, want none", got)
	}
}

// A caller who leaves says nothing about the KMS, and a custody that closes
// does not wait for one that hangs.
func TestGivenUp(t *testing.T) {
	w, kid, kmss, _ := graceWorld(t, "vault")
	w.cfg.KMS.Deadline = time.Minute
	w.reopen()
	end := kmss[0].hang()
	defer end()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	_, err := w.c.CreateCategory(ctx, officer, custodian.CreateCategoryRequest{Name: "series", Providers: []string{"vault"}})
	wantErr(t, "a new KEK while the KMS hangs", err, custodian.ErrDeadline)
	s := w.status("vault")
	if want := (custodian.CallCount{Reason: custodian.CallMake, Result: custodian.ResultAbandoned, Count: 1}); !s.AwaySince.IsZero() || len(s.CallsByReason) != 1 || s.CallsByReason[0] != want {
		t.Errorf("got away since %s and calls %v, want not away and %v", s.AwaySince, s.CallsByReason, want)
	}
	ctx, cancel = context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	res, err := w.c.Retrieve(ctx, provider, custodian.RetrieveRequest{KIDs: []custodian.KID{kid}})
	if err == nil {
		err = res[0].Err
	}
	wantErr(t, "a cold KEK while the KMS hangs", err, custodian.ErrDeadline)
	began := time.Now()
	w.close()
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("closing while a KMS hangs for a minute took %s", took)
	}
	end()
	w.whole()
}

// A refusal is logged once, and again after access was given back.
func TestRefusalIsLogged(t *testing.T) {
	w, kid, kmss, _ := graceWorld(t, "vault")
	var log bytes.Buffer
	w.cfg.Log = slog.New(slog.NewTextHandler(&log, nil))
	w.reopen()
	for round := 1; round <= 2; round++ {
		kmss[0].set(nil)
		w.advance(testLifetime)
		wantErr(t, "access", w.release(provider, kid), nil)
		w.c.TickKMS()
		kmss[0].set(custodian.ErrProviderDenied)
		w.advance(testLifetime)
		for range 3 {
			wantErr(t, "no access", w.release(provider, kid), custodian.ErrKMSUnavailable)
			w.c.TickKMS()
		}
		if got := strings.Count(log.String(), "refuses its key"); got != round {
			t.Errorf("round %d: got %d lines in the log, want %d", round, got, round)
		}
	}
	kmss[0].set(nil)
	w.whole()
}

// A KMS that comes and goes: each contact begins the grace anew, and each good
// opening the lifetime; what is between is served on grace, to the second.
func TestGraceFlapping(t *testing.T) {
	w, kid, kmss, _ := graceWorld(t, "vault")
	for range 5 {
		w.advance(testLifetime - time.Second)
		kmss[0].set(custodian.ErrProviderUnavailable) // a second before the lifetime ends
		w.wantGrace("the last second of the lifetime", kid, 0, nil)
		w.advance(time.Second)
		w.wantGrace("the lifetime is over", kid, testGrace-testLifetime, nil)
		w.advance(20 * time.Minute)
		w.wantGrace("20 minutes later", kid, testGrace-testLifetime-20*time.Minute, nil)
		kmss[0].set(nil)
		w.wantGrace("back for one callback", kid, 0, nil)
	}
	// Contact by a probe renews the grace of a KEK, and not its lifetime.
	w.advance(testLifetime)
	w.c.ProbeKMS(t.Context())
	kmss[0].set(custodian.ErrProviderUnavailable)
	w.wantGrace("a probe was the last contact", kid, testGrace, nil)
	w.advance(testGrace - time.Second)
	w.wantGrace("a second before the end", kid, time.Second, nil)
	w.advance(time.Second)
	w.wantGrace("the end", kid, 0, custodian.ErrKMSUnavailable)
	kmss[0].set(nil)
	w.whole()
}

// A clock that is set back in an outage neither hastens its incident nor puts
// it off: for the step it stands still.
func TestIncidentClockBack(t *testing.T) {
	w, _, kmss, incidents := graceWorld(t, "vault")
	kmss[0].set(custodian.ErrProviderUnavailable)
	w.advance(time.Minute)
	w.c.ProbeKMS(t.Context())
	w.advance(3 * time.Minute)
	w.c.TickKMS() // it is seen that so much time has passed
	w.advance(-time.Hour)
	w.c.TickKMS()
	w.advance(2*time.Minute - time.Second)
	w.c.TickKMS()
	if len(*incidents) != 0 {
		t.Fatalf("after four minutes and 59 seconds: got %+v, want no incident yet", *incidents)
	}
	w.advance(time.Second)
	w.c.TickKMS()
	w.advance(-time.Hour)
	w.c.TickKMS()
	if len(*incidents) != 1 {
		t.Fatalf("after five minutes: got %+v, want one incident", *incidents)
	}
	if i := (*incidents)[0]; i.Declared.Sub(i.Since) != 5*time.Minute {
		t.Errorf("it was declared %s after its begin", i.Declared.Sub(i.Since))
	}
	kmss[0].set(nil)
}

// A key whose wrap is refused is asked for once in ten seconds, however many
// callbacks want it; when the wrap is another, at once.
func TestBadKeyIsLeftAlone(t *testing.T) {
	w, kid, kmss, _ := graceWorld(t, "vault", "aws")
	outer := w.keks("movies")[0].Wrapped.Outer
	for i, k := range kmss {
		k.mu.Lock()
		k.lost = outer[i].Blob
		k.mu.Unlock()
	}
	w.advance(testLifetime)
	calls := func(f func()) int {
		before := kmss[0].opened() + kmss[1].opened()
		f()
		return kmss[0].opened() + kmss[1].opened() - before
	}
	refused := func() {
		for range 50 {
			wantErr(t, "a wrap that both refuse", w.release(provider, kid), custodian.ErrRecordCorrupt)
		}
	}
	if got := calls(refused); got != 2 {
		t.Errorf("50 callbacks: got %d calls, want one of each provider", got)
	}
	w.advance(10*time.Second - 1)
	if got := calls(refused); got != 0 {
		t.Errorf("50 callbacks within ten seconds: got %d calls, want none", got)
	}
	w.advance(1)
	if got := calls(refused); got != 2 {
		t.Errorf("50 callbacks after ten seconds: got %d calls, want one of each provider", got)
	}
	kmss[1].mu.Lock()
	kmss[1].lost = nil
	kmss[1].mu.Unlock()
	w.cfg.KMS.RewrapRate = 1e6
	if _, err := w.c.SetProviders(t.Context(), officer, custodian.SetProvidersRequest{Category: "movies", Providers: []string{"aws"}}); err != nil {
		t.Fatal(err)
	}
	w.rewraps(none)
	wantErr(t, "with another wrap", w.release(provider, kid), nil)
	w.whole()
}
