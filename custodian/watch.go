package custodian

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// ProbeKMS asks every provider that nobody has called for a minute whether it
// still opens what is ours, and waits for the answers. It is the only probe
// there is; call it about once a second.
func (c *Custodian) ProbeKMS(ctx context.Context) {
	c.keys.probe(ctx, c.set.Load())
}

// TickKMS declares and closes incidents, and lets go of loaded KEKs that can
// serve no more. Call it about once a second; it waits for nothing.
func (c *Custodian) TickKMS() {
	now := c.keys.clock.now()
	c.keys.outages.Tick()
	for _, g := range c.keys.order {
		if err := g.newRefusal(); err != nil {
			c.log.Error("a KMS refuses its key to us: loaded keys that need it have no grace", "provider", g.p.Name(), "err", err)
		}
	}
	c.keys.sweep(c.set.Load(), now)
}

// probe opens one wrap of each provider that is due. A provider that wraps
// nothing of ours is not asked.
func (r *keyring) probe(ctx context.Context, s *controlSet) {
	var asked sync.WaitGroup
	now := r.clock.now()
	for _, g := range r.order {
		w, ident, ok := s.wrapOf(g.p.Name())
		if !ok || !g.beginProbe(now) {
			continue
		}
		asked.Go(func() {
			defer g.endProbe()
			// The guard notes what comes of it.
			g.unwrap(ctx, CallProbe, w, ident)
		})
	}
	asked.Wait()
}

// wrapOf finds a wrap that a provider made: of a helper, else of any KEK.
func (s *controlSet) wrapOf(provider string) (w OuterWrap, ident []byte, ok bool) {
	find := func(id keyID) bool {
		wrapped, of, _, err := s.wrapped(id)
		if err != nil {
			return false
		}
		for _, o := range wrapped.Outer {
			if o.Provider == provider {
				w, ident, ok = o, of, true
				return true
			}
		}
		return false
	}
	for id := range s.helpers {
		if find(keyID{helper: id.purpose, version: id.version}) {
			return w, ident, ok
		}
	}
	for id := range s.keks {
		if find(keyID{kek: id.Category, version: id.Version}) {
			return w, ident, ok
		}
	}
	return w, ident, false
}

// ready says whether one of the providers that the next start needs answers,
// or grace is left: nil, or why not.
func (r *keyring) ready(s *controlSet) error {
	h, err := s.latestHelper(HelperRecord)
	if err != nil {
		return err
	}
	now, fault := r.clock.now(), error(nil)
	for _, o := range h.Wrapped.Outer {
		g := r.guards[o.Provider]
		if g == nil {
			continue
		}
		if g.ready(now) {
			return nil
		}
		g.mu.Lock()
		fault = g.lastErr
		g.mu.Unlock()
	}
	if fault == nil {
		return fmt.Errorf("no provider of the helper keys is configured: %w", ErrKMSUnavailable)
	}
	return kmsError(fault)
}

func (g *guard) ready(now time.Time) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.refused == nil && (g.outage.awaySince().IsZero() || g.graceLeftLocked(now) > 0)
}

// sweep releases the KEKs whose lifetime is over and that can have no grace
// any more: they would lie in the token for nothing.
func (r *keyring) sweep(s *controlSet, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for id, l := range r.loaded {
		if !l.fresh(now) && r.graceLeft(s, id, l, now) == 0 {
			delete(r.loaded, id)
			l.key.Release()
		}
	}
}
