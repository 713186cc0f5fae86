package custodian

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/singleflight"
)

// A keyring holds the keys that are loaded in the token. It decides which key
// version wraps and how long a loaded KEK may be used without asking the KMS
// again. The keys themselves are the token's.
type keyring struct {
	hsm       HSM
	providers map[string]Provider
	lifetime  time.Duration // of a loaded KEK, absolute
	timeout   time.Duration // of one load
	now       func() time.Time
	flight    singleflight.Group
	loads     atomic.Uint64

	// mu guards the map below.
	mu     sync.RWMutex
	loaded map[keyID]*loadedKey
}

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
	until time.Time // zero: for as long as the process lives
}

func newKeyring(hsm HSM, providers map[string]Provider, lifetime, timeout time.Duration, now func() time.Time) *keyring {
	return &keyring{hsm: hsm, providers: providers, lifetime: lifetime, timeout: timeout, now: now, loaded: map[keyID]*loadedKey{}}
}

// withKEK calls f with a version of a category's KEK. It calls f a second
// time, with a key that it has loaded afresh, where the handle was stale.
func (r *keyring) withKEK(ctx context.Context, s *controlSet, id KEKID, f func(Key) error) error {
	return r.with(ctx, s, keyID{kek: id.Category, version: id.Version}, f)
}

// withHelper is withKEK for helper keys, which stay loaded.
func (r *keyring) withHelper(ctx context.Context, s *controlSet, p HelperPurpose, version uint32, f func(Key) error) error {
	return r.with(ctx, s, keyID{helper: p, version: version}, f)
}

func (r *keyring) with(ctx context.Context, s *controlSet, id keyID, f func(Key) error) error {
	for again := false; ; again = true {
		l, err := r.get(ctx, s, id)
		if err == nil {
			err = f(l.key)
		}
		if !errors.Is(err, ErrStaleKey) {
			return err
		}
		if l != nil {
			r.drop(id, l)
		}
		if again {
			return fmt.Errorf("%s: %w: %w", id, err, ErrHSMUnavailable)
		}
	}
}

func (r *keyring) get(ctx context.Context, s *controlSet, id keyID) (*loadedKey, error) {
	r.mu.RLock()
	l := r.loaded[id]
	r.mu.RUnlock()
	if l != nil && (l.until.IsZero() || r.now().Before(l.until)) {
		return l, nil
	}
	// One flight a key. The load goes on when the caller who began it has run
	// out of time: the others wait for it, and the next call will want it.
	done := r.flight.DoChan(id.String(), func() (any, error) {
		r.mu.RLock()
		l := r.loaded[id]
		r.mu.RUnlock()
		if l != nil && (l.until.IsZero() || r.now().Before(l.until)) {
			return l, nil
		}
		lctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), r.timeout)
		defer cancel()
		return r.load(lctx, s, id)
	})
	select {
	case res := <-done:
		if res.Err != nil {
			return nil, res.Err
		}
		return res.Val.(*loadedKey), nil
	case <-ctx.Done():
		return nil, fmt.Errorf("%s: load: %w", id, ErrDeadline)
	}
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
	inner, err := r.openOuter(ctx, id, w, ident)
	if err != nil {
		return nil, err
	}
	key, err := r.hsm.LoadKey(ctx, m, use, ident, inner, w.Canary)
	if err != nil {
		return nil, unwrapError(id.String(), err)
	}
	r.loads.Add(1)
	l := &loadedKey{key: key}
	if id.kek != "" {
		l.until = r.now().Add(r.lifetime)
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

// openOuter takes the outer layer off, by any one of the providers.
func (r *keyring) openOuter(ctx context.Context, id keyID, w Wrapped, ident []byte) ([]byte, error) {
	var faults []error
	for _, o := range w.Outer {
		p := r.providers[o.Provider]
		if p == nil {
			faults = append(faults, fmt.Errorf("%s: provider %q is not configured: %w", id, o.Provider, ErrKMSUnavailable))
			continue
		}
		inner, err := p.Unwrap(ctx, o, ident)
		if err == nil {
			return inner, nil
		}
		faults = append(faults, fmt.Errorf("%s: provider %s: %w", id, o.Provider, kmsError(err)))
	}
	if len(faults) == 0 {
		return nil, corrupt(id.String(), errors.New("no outer wrap is recorded"))
	}
	// An outage outranks a refusal: what is away now may open it later.
	for _, f := range faults {
		if errors.Is(f, ErrKMSUnavailable) {
			return nil, f
		}
	}
	return nil, errors.Join(faults...)
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

// sweep releases the KEKs whose time is up, so that a key that nobody asks for
// any more does not stay in the token.
func (r *keyring) sweep() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for id, l := range r.loaded {
		if !l.until.IsZero() && !r.now().Before(l.until) {
			delete(r.loaded, id)
			l.key.Release()
		}
	}
}

// close releases every key.
func (r *keyring) close() {
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
	w := Wrapped{MEKVersion: m.Version, Canary: canary}
	for _, name := range providers {
		p := r.providers[name]
		if p == nil {
			return Wrapped{}, fmt.Errorf("provider %q is not configured: %w", name, ErrKMSUnavailable)
		}
		o, err := p.Wrap(ctx, inner, ident)
		if err != nil {
			return Wrapped{}, fmt.Errorf("provider %s: wrap: %w", name, kmsError(err))
		}
		back, err := p.Unwrap(ctx, o, ident)
		if err != nil {
			return Wrapped{}, fmt.Errorf("provider %s: open the new wrap: %w", name, kmsError(err))
		}
		if !bytes.Equal(back, inner) { // both are wrapped by the HSM: no secret is compared
			return Wrapped{}, fmt.Errorf("provider %s: the new wrap opens to something else: %w", name, ErrKMSUnavailable)
		}
		w.Outer = append(w.Outer, o)
	}
	if len(w.Outer) == 0 {
		return Wrapped{}, errors.New("no provider is named for the key")
	}
	return w, nil
}
