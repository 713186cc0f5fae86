package custodian

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/singleflight"
)

// A keyring holds the keys that are loaded in the token. It decides which key
// version wraps and how long a loaded KEK may be used without asking the KMS
// again. The keys themselves are the token's.
//
// A KEK is loaded for its lifetime. After that it is asked for again; only
// where no provider that wraps it answers does the loaded one serve on, for a
// grace that counts from the last contact with one of them (see graceLeft).
type keyring struct {
	hsm      HSM
	guards   map[string]*guard
	order    []*guard // as configured
	limits   KMSLimits
	lifetime time.Duration // of a loaded KEK without grace
	timeout  time.Duration // of one load
	outages  *Outages
	clock    *steady // theirs
	flight   singleflight.Group
	loads    atomic.Uint64

	// base is what calls of the KMS run under: they may outlive the caller
	// who began them, and end with the keyring. calls counts those under way.
	base  context.Context
	stop  context.CancelFunc
	calls sync.WaitGroup

	// mu guards the maps below.
	mu     sync.RWMutex
	loaded map[keyID]*loadedKey
	bad    map[keyID]badKey
}

// A badKey could not be loaded, and no fault of a moment was the reason. Its
// wraps are not tried again before until: callers who ask for it all the same
// would have the KMS asked each time.
type badKey struct {
	outer []OuterWrap
	until time.Time
	err   error
}

// badPause is how long a bad key is left alone. It is short, since a KMS can
// answer nonsense for a moment, too.
const badPause = 10 * time.Second

// A keyID names a wrapped key: a KEK by its category, a helper by its purpose.
type keyID struct {
	kek     CategoryName
	helper  HelperPurpose
	version uint32
}

func (id keyID) String() string {
	if id.helper != "" {
		return fmt.Sprintf("helper %s/%d", id.helper, id.version)
	}
	return fmt.Sprintf("kek %s/%d", id.kek, id.version)
}

type loadedKey struct {
	key   Key
	from  time.Time // when it was loaded
	until time.Time // zero: for as long as the process lives
	// slow: somebody waits in vain for this key to be loaded again.
	slow atomic.Bool
}

func (l *loadedKey) fresh(now time.Time) bool { return l.until.IsZero() || now.Before(l.until) }

// newKeyring makes a keyring. ctx gives its calls their values, not their end.
func newKeyring(ctx context.Context, hsm HSM, providers []Provider, lifetime time.Duration, limits KMSLimits, outages *Outages) (*keyring, error) {
	r := &keyring{hsm: hsm, guards: map[string]*guard{}, limits: limits.withDefaults(), lifetime: lifetime, timeout: 30 * time.Second,
		outages: outages, clock: outages.clock, loaded: map[keyID]*loadedKey{}, bad: map[keyID]badKey{}}
	r.base, r.stop = context.WithCancel(context.WithoutCancel(ctx))
	successes := &atomic.Uint64{}
	for _, p := range providers {
		if r.guards[p.Name()] != nil {
			return nil, fmt.Errorf("provider %q is configured twice", p.Name())
		}
		g := newGuard(p, r.limits, outages, successes)
		r.guards[p.Name()], r.order = g, append(r.order, g)
	}
	return r, nil
}

// withKEK calls f with a version of a category's KEK. It calls f a second
// time, with a key that it has loaded afresh, where the handle was stale.
// grace is zero, or what is left of it where the KEK serves beyond its
// lifetime.
func (r *keyring) withKEK(ctx context.Context, s *controlSet, id KEKID, f func(Key) error) (grace time.Duration, err error) {
	return r.with(ctx, s, keyID{kek: id.Category, version: id.Version}, f)
}

// withHelper is withKEK for helper keys, which stay loaded.
func (r *keyring) withHelper(ctx context.Context, s *controlSet, p HelperPurpose, version uint32, f func(Key) error) error {
	_, err := r.with(ctx, s, keyID{helper: p, version: version}, f)
	return err
}

func (r *keyring) with(ctx context.Context, s *controlSet, id keyID, f func(Key) error) (grace time.Duration, err error) {
	for again := false; ; again = true {
		l, grace, err := r.get(ctx, s, id)
		if err == nil {
			err = f(l.key)
		}
		if !errors.Is(err, ErrStaleKey) {
			return grace, err
		}
		if l != nil {
			r.drop(id, l)
		}
		if again {
			return 0, fmt.Errorf("%s: %w: %w", id, err, ErrHSMUnavailable)
		}
	}
}

func (r *keyring) have(id keyID) *loadedKey {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.loaded[id]
}

// get returns a loaded key, and what is left of its grace where it serves
// beyond its lifetime.
func (r *keyring) get(ctx context.Context, s *controlSet, id keyID) (*loadedKey, time.Duration, error) {
	l, now := r.have(id), r.clock.now()
	if l != nil && l.fresh(now) {
		return l, 0, nil
	}
	// One flight a key. The load goes on when the caller who began it has run
	// out of time: the others wait for it, and the next call will want it.
	done := r.flight.DoChan(id.String(), func() (any, error) {
		if l := r.have(id); l != nil && l.fresh(r.clock.now()) {
			return l, nil
		}
		lctx, cancel := context.WithTimeout(r.base, r.timeout)
		defer cancel()
		if l != nil {
			defer l.slow.Store(false)
		}
		if err := r.knownBad(s, id); err != nil {
			return nil, err
		}
		l, err := r.load(lctx, s, id)
		r.noteBad(s, id, err)
		return l, err
	})
	var enough <-chan time.Time // of waiting, where the key at hand could serve
	if wait, ok := r.patience(ctx, s, id, l, now); ok {
		t := time.NewTimer(wait)
		defer t.Stop()
		enough = t.C
	}
	var gone <-chan time.Time // the load waits for the token, but who waits for it is to hear why in time
	if end, ok := ctx.Deadline(); ok && r.hsm.Status().Away {
		t := time.NewTimer(time.Until(end) / 2)
		defer t.Stop()
		gone = t.C
	}
	select {
	case res := <-done:
		if res.Err == nil {
			return res.Val.(*loadedKey), 0, nil
		}
		if left := r.graceLeft(s, id, l, r.clock.now()); left > 0 && errors.Is(res.Err, ErrKMSUnavailable) {
			return l, left, nil
		}
		return nil, 0, res.Err
	case <-enough:
		l.slow.Store(true)
		if left := r.graceLeft(s, id, l, r.clock.now()); left > 0 {
			return l, left, nil
		}
		return nil, 0, fmt.Errorf("%s: load: %w", id, ErrKMSUnavailable)
	case <-gone:
		return nil, 0, fmt.Errorf("%s: load: the token is away: %w", id, ErrHSMUnavailable)
	case <-ctx.Done():
		return nil, 0, fmt.Errorf("%s: load: %w", id, ErrDeadline)
	}
}

// knownBad is why id could not be loaded a moment ago, from the same wraps.
func (r *keyring) knownBad(s *controlSet, id keyID) error {
	r.mu.RLock()
	b, ok := r.bad[id]
	r.mu.RUnlock()
	if w, _, _ := s.outerOf(id); ok && r.clock.now().Before(b.until) && sameOuter(w.Outer, b.outer) {
		return b.err
	}
	return nil
}

// noteBad takes down how a load ended.
func (r *keyring) noteBad(s *controlSet, id keyID, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.bad, id)
	if errors.Is(err, ErrRecordCorrupt) {
		w, _, _ := s.outerOf(id)
		r.bad[id] = badKey{w.Outer, r.clock.now().Add(badPause), err}
	}
}

// patience is how long to wait for a load where l could serve by its grace.
// Where that is known to take long, nobody waits.
func (r *keyring) patience(ctx context.Context, s *controlSet, id keyID, l *loadedKey, now time.Time) (wait time.Duration, ok bool) {
	if r.graceLeft(s, id, l, now) == 0 {
		return 0, false
	}
	if l.slow.Load() || r.allSlow(s, id) {
		return 0, true
	}
	wait = r.limits.Patience
	if end, ok := ctx.Deadline(); ok {
		wait = min(wait, time.Until(end)/2)
	}
	return wait, true
}

// graceLeft is how long l may serve on beyond its lifetime while no provider
// answers: as long as the contact with one of those that wrap it is not older
// than the grace, and l itself not older than the ceiling. A provider that
// took its access away on purpose gives none.
func (r *keyring) graceLeft(s *controlSet, id keyID, l *loadedKey, now time.Time) time.Duration {
	if l == nil {
		return 0
	}
	w, _, _, err := s.wrapped(id)
	if err != nil {
		return 0
	}
	var left time.Duration
	for _, o := range w.Outer {
		if g := r.guards[o.Provider]; g != nil {
			left = max(left, g.graceLeft(now))
		}
	}
	return max(0, min(left, l.from.Add(r.limits.GraceCeiling).Sub(now)))
}

// allSlow says whether every provider of a key kept us waiting in vain when it
// was last called.
func (r *keyring) allSlow(s *controlSet, id keyID) bool {
	w, _, _, err := s.wrapped(id)
	if err != nil {
		return true
	}
	for _, o := range w.Outer {
		if g := r.guards[o.Provider]; g != nil {
			if _, slow, _ := g.rank(); !slow {
				return false
			}
		}
	}
	return true
}

func (r *keyring) load(ctx context.Context, s *controlSet, id keyID) (*loadedKey, error) {
	w, ident, use, err := s.wrapped(id)
	if err != nil {
		return nil, err
	}
	m, ok := s.meks[w.MEKVersion]
	if !ok {
		return nil, corrupt(id.String(), fmt.Errorf("mek version %d is not recorded", w.MEKVersion))
	}
	if err := Usable(m.State, Process, false); err != nil {
		return nil, fmt.Errorf("%s: mek %s: %w", id, m.Label, err)
	}
	inner, err := r.openOuter(ctx, CallLoad, id, w, ident)
	if err != nil {
		return nil, err
	}
	key, err := r.hsm.LoadKey(ctx, m, use, ident, inner, w.Canary)
	if err != nil {
		return nil, unwrapError(id.String(), err)
	}
	r.loads.Add(1)
	l := &loadedKey{key: key, from: r.clock.now()}
	if id.kek != "" {
		l.until = l.from.Add(r.lifetime)
	}
	r.mu.Lock()
	old := r.loaded[id]
	r.loaded[id] = l
	r.mu.Unlock()
	if old != nil {
		old.key.Release()
	}
	return l, nil
}

// unwrapError names what a token's refusal to unwrap means: the blob or the
// token's MEK is not the recorded one, or the token is away.
func unwrapError(which string, err error) error {
	if errors.Is(err, ErrAuth) || errors.Is(err, ErrWrongMEK) {
		return corrupt(which, err)
	}
	return fmt.Errorf("%s: %w", which, err)
}

// hedgeAfter is how long one provider is waited for before the next is asked
// as well, where several can open a key.
const hedgeAfter = 75 * time.Millisecond

// openOuter takes the outer layer off, by any one of the providers: the last
// good one first, the next when that one fails or takes long. Whoever answers
// too late runs to its own deadline, so that its guard learns of it.
func (r *keyring) openOuter(ctx context.Context, why CallReason, id keyID, w Wrapped, ident []byte) ([]byte, error) {
	if len(w.Outer) == 0 {
		return nil, corrupt(id.String(), errors.New("no outer wrap is recorded"))
	}
	type answer struct {
		inner []byte
		err   error
	}
	order, faults := r.ranked(id, w.Outer)
	answers := make(chan answer, len(order))
	pending := 0
	ask := func() {
		o := order[0]
		order = order[1:]
		pending++
		if !r.begin() {
			answers <- answer{nil, fmt.Errorf("%s: the daemon ends: %w", id, ErrKMSUnavailable)}
			return
		}
		go func() {
			defer r.calls.Done()
			inner, err := r.guards[o.Provider].unwrap(r.base, why, o, ident)
			if err != nil {
				err = fmt.Errorf("%s: provider %s: %w", id, o.Provider, kmsError(err))
			}
			answers <- answer{inner, err}
		}()
	}
	hedge := time.NewTicker(hedgeAfter)
	defer hedge.Stop()
	for pending > 0 || len(order) > 0 {
		if pending == 0 {
			ask()
			hedge.Reset(hedgeAfter)
		}
		select {
		case a := <-answers:
			pending--
			if a.err == nil {
				return a.inner, nil
			}
			faults = append(faults, a.err)
		case <-hedge.C:
			if len(order) > 0 {
				ask()
			}
		case <-ctx.Done():
			return nil, fmt.Errorf("%s: %w: %w", id, context.Cause(ctx), ErrKMSUnavailable)
		}
	}
	// An outage outranks a refusal: what is away now may open it later.
	for _, f := range faults {
		if errors.Is(f, ErrKMSUnavailable) {
			return nil, f
		}
	}
	return nil, errors.Join(faults...)
}

// ranked is the order in which to ask, and a fault for each provider that is
// not configured.
func (r *keyring) ranked(id keyID, outer []OuterWrap) (order []OuterWrap, faults []error) {
	for _, o := range outer {
		if r.guards[o.Provider] == nil {
			faults = append(faults, fmt.Errorf("%s: provider %q is not configured: %w", id, o.Provider, ErrKMSUnavailable))
			continue
		}
		order = append(order, o)
	}
	slices.SortStableFunc(order, func(a, b OuterWrap) int {
		aFails, _, aGood := r.guards[a.Provider].rank()
		bFails, _, bGood := r.guards[b.Provider].rank()
		if aFails != bFails {
			if aFails {
				return 1
			}
			return -1
		}
		return cmp.Compare(bGood, aGood)
	})
	return order, faults
}

// kmsError names what a provider's error means to the caller.
func kmsError(err error) error {
	if errors.Is(err, ErrProviderBlob) {
		return fmt.Errorf("%w: %w", err, ErrRecordCorrupt)
	}
	return fmt.Errorf("%w: %w", err, ErrKMSUnavailable)
}

// wrapped finds the wrapped key of id in the control set.
func (s *controlSet) wrapped(id keyID) (w Wrapped, ident []byte, use KeyUse, err error) {
	if id.helper != "" {
		h, ok := s.helpers[helperID{id.helper, id.version}]
		if !ok {
			return w, nil, 0, corrupt(id.String(), errors.New("it is not recorded"))
		}
		if err := Usable(h.State, Process, false); err != nil {
			return w, nil, 0, fmt.Errorf("%s: state %s: %w", id, h.State, err)
		}
		// No record refers to a pseudonym key, but the audit log does, until the MEK
		// is destroyed.
		if id.helper != HelperPseudonym && s.retiredMEK(h.Wrapped.MEKVersion) {
			return w, nil, 0, corrupt(id.String(), errors.New("it is retired with its mek, and no record refers to it"))
		}
		return h.Wrapped, helperIdentity(s.head.StoreID, h.Purpose, h.Version), UseMAC, nil
	}
	kid := KEKID{id.kek, id.version}
	k, ok := s.keks[kid]
	if !ok {
		return w, nil, 0, corrupt(id.String(), errors.New("it is not recorded"))
	}
	if err := Usable(k.State, Process, false); err != nil {
		return w, nil, 0, fmt.Errorf("%s: state %s: %w", id, k.State, err)
	}
	if s.retired(kid) || s.retiredMEK(k.Wrapped.MEKVersion) { // whatever still names it is an old record that was put back
		return w, nil, 0, corrupt(id.String(), errors.New("it is retired, and no record refers to it"))
	}
	return k.Wrapped, kekIdentity(s.head.StoreID, kid), UseSeal, nil
}

// drop forgets l, unless another has taken its place already.
func (r *keyring) drop(id keyID, l *loadedKey) {
	r.mu.Lock()
	if r.loaded[id] == l {
		delete(r.loaded, id)
	}
	r.mu.Unlock()
	l.key.Release()
}

// begin counts a call that may outlive its caller, unless the keyring is
// closed. It ends with calls.Done.
func (r *keyring) begin() bool {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if r.base.Err() != nil {
		return false
	}
	r.calls.Add(1)
	return true
}

// close ends the calls under way and releases every key.
func (r *keyring) close() {
	r.mu.Lock()
	r.stop()
	r.mu.Unlock()
	r.calls.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	for id, l := range r.loaded {
		l.key.Release()
		delete(r.loaded, id)
	}
}

// count is how many keys are loaded.
func (r *keyring) count() int {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return len(r.loaded)
}

// make generates a key in the token and wraps it: in the token under m, and
// around that by each provider. Every layer is opened again before it counts.
func (r *keyring) make(ctx context.Context, m MEK, use KeyUse, ident []byte, providers []string) (Wrapped, error) {
	inner, canary, err := r.hsm.GenerateKey(ctx, m, use, ident)
	if err != nil {
		return Wrapped{}, unwrapError("generate key under "+m.Label, err)
	}
	return r.wrapOuter(ctx, Wrapped{MEKVersion: m.Version, Canary: canary}, inner, ident, providers)
}

// wrapOuter adds the providers' wraps of inner to w.
func (r *keyring) wrapOuter(ctx context.Context, w Wrapped, inner, ident []byte, providers []string) (Wrapped, error) {
	for _, name := range providers {
		g := r.guards[name]
		if g == nil {
			return Wrapped{}, fmt.Errorf("provider %q is not configured: %w", name, ErrKMSUnavailable)
		}
		o, err := g.wrap(ctx, CallMake, inner, ident)
		if err != nil {
			return Wrapped{}, fmt.Errorf("provider %s: wrap: %w", name, kmsError(err))
		}
		if err := r.proveWrap(ctx, CallMake, g, o, inner, ident); err != nil {
			return Wrapped{}, err
		}
		w.Outer = append(w.Outer, o)
	}
	if len(w.Outer) == 0 {
		return Wrapped{}, errors.New("no provider is named for the key")
	}
	return w, nil
}
