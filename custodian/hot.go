package custodian

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/keycustody/custodian/internal/secret"
)

// MaxHotTitle is the longest that an opened CEK may be kept.
const MaxHotTitle = time.Minute

// Of CEKs that are kept: how many at most, and how often it is looked for those
// whose time ends.
const (
	maxHot   = 1024
	hotSweep = 100 * time.Millisecond
)

// hotTitles spares the token what many ask for at once. Callers who want the
// same CEK at one moment share one operation of the token, a flight. In
// categories that are said to be so, an opened CEK is kept for a short, absolute
// time, in a locked arena of its own. Either way each release was decided and is
// written down on its own: this is behind the decision, in the place of the
// token.
//
// A kept CEK serves as long as the control set is the one under which it was
// opened, its record is the same, and its KEK is loaded and would serve: it is
// no other way to a key. It is wiped before its time ends, and whenever the
// control set changes, which every freeze, compromise and rotation does.
type hotTitles struct {
	lifetimes map[CategoryName]time.Duration // categories without one keep nothing
	clock     *steady
	flights   [64]flights // by KID
	spare     sync.Pool   // of *flight
	shared    atomic.Uint64
	hits      atomic.Uint64

	// mu guards the fields below.
	mu    sync.RWMutex
	arena *secret.Arena // nil where nothing is kept
	kept  map[KID]*keptCEK
}

type flights struct {
	mu sync.Mutex // guards the map, and the fields of its flights
	by map[KID]*flight
}

// A flight is one operation of the token under way.
type flight struct {
	set    *controlSet
	record SealedKey
	others []*passenger
}

// A passenger waits for a flight that another call began.
type passenger struct {
	slot   []byte // where the CEK goes
	landed chan struct{}
	grace  time.Duration
	err    error
	flight *flight // not nil: whoever began it ran out of time, and it is this one's now
}

type keptCEK struct {
	slot   []byte
	set    *controlSet
	record SealedKey
	kek    *loadedKey
	until  time.Time
}

// CheckHotTitle says what is wrong with keeping the CEKs of a category so long.
func CheckHotTitle(name CategoryName, life time.Duration) error {
	if err := name.Check(); err != nil {
		return err
	}
	if life < time.Second || life > MaxHotTitle {
		return fmt.Errorf("%s: must be 1s to %s", life, MaxHotTitle)
	}
	return nil
}

func newHotTitles(lifetimes map[CategoryName]time.Duration, clock *steady) (*hotTitles, error) {
	h := &hotTitles{lifetimes: lifetimes, clock: clock, kept: map[KID]*keptCEK{}}
	h.spare.New = func() any { return new(flight) }
	for i := range h.flights {
		h.flights[i].by = map[KID]*flight{}
	}
	for name, life := range lifetimes {
		if err := CheckHotTitle(name, life); err != nil {
			return nil, fmt.Errorf("hot titles: category %s: %w", name, err)
		}
	}
	if len(lifetimes) == 0 {
		return h, nil
	}
	var err error
	h.arena, err = secret.NewArena(CEKSize, maxHot)
	return h, err
}

// openHot is openCEK for a release: where the CEK is kept, or another call is
// just opening it, the token is spared. kept says which it was.
func (c *Custodian) openHot(ctx context.Context, set *controlSet, k SealedKey) (cek secret.Secret, grace time.Duration, kept bool, err error) {
	h := c.hot
	life := h.lifetimes[k.Key.Category]
	if life > 0 {
		if cek, kept, err = c.openKept(set, k); kept || err != nil {
			return cek, 0, kept, err
		}
	}
	f, p, err := c.board(set, k)
	if err != nil {
		return secret.Secret{}, 0, false, err
	}
	if p != nil {
		if cek, grace, f, err = c.ride(ctx, k, p); f == nil {
			return cek, grace, false, err
		}
	}
	var opened time.Time
	if life > 0 {
		opened = h.clock.now()
	}
	cek, grace, err = c.openCEK(ctx, set, k)
	if f != nil {
		h.land(f, cek, grace, err)
	}
	if err == nil && life > 0 && grace == 0 {
		c.keep(set, k, cek, opened.Add(life))
	}
	return cek, grace, false, err
}

// board begins a flight, or gets on one: then there is a passenger. Neither: a
// flight for the same KID is for another record or another control set.
func (c *Custodian) board(set *controlSet, k SealedKey) (*flight, *passenger, error) {
	fs := c.hot.of(k.Key.KID)
	fs.mu.Lock()
	defer fs.mu.Unlock()
	f := fs.by[k.Key.KID]
	if f == nil {
		f = c.hot.spare.Get().(*flight)
		f.set, f.record = set, k
		fs.by[k.Key.KID] = f
		return f, nil, nil
	}
	if f.set != set || !sameRecord(f.record, k) {
		return nil, nil, nil
	}
	slot, err := c.slot(k)
	if err != nil {
		return nil, nil, err
	}
	p := &passenger{slot: slot, landed: make(chan struct{})}
	f.others = append(f.others, p)
	c.hot.shared.Add(1)
	return nil, p, nil
}

func sameRecord(a, b SealedKey) bool {
	return a.IV == b.IV && bytes.Equal(a.Sealed, b.Sealed) && bytes.Equal(a.Body, b.Body)
}

func (h *hotTitles) of(kid KID) *flights { return &h.flights[int(kid[KIDSize-1])%len(h.flights)] }

// land ends a flight: everybody on it gets a copy. Where it was the time of the
// one who opens that ran out, the next one opens.
func (h *hotTitles) land(f *flight, cek secret.Secret, grace time.Duration, err error) {
	fs := h.of(f.record.Key.KID)
	fs.mu.Lock()
	defer fs.mu.Unlock()
	if errors.Is(err, ErrDeadline) && len(f.others) > 0 {
		next := f.others[0]
		f.others = f.others[1:]
		next.flight = f
		close(next.landed)
		return
	}
	delete(fs.by, f.record.Key.KID)
	for _, p := range f.others {
		if p.grace, p.err = grace, err; err == nil {
			cek.Use(func(b []byte) { copy(p.slot, b) })
		}
		close(p.landed)
	}
	clear(f.others)
	*f = flight{others: f.others[:0]}
	h.spare.Put(f) // whoever was on it has the passenger only
}

// ride waits for the flight to land. It returns the flight where the caller is
// to go on with it.
func (c *Custodian) ride(ctx context.Context, k SealedKey, p *passenger) (cek secret.Secret, grace time.Duration, mine *flight, err error) {
	select {
	case <-p.landed:
	case <-ctx.Done():
		c.hot.getOff(k.Key.KID, p)
		p.err = fmt.Errorf("content key %s: waiting for a call that opens it: %w", k.Key.KID, ErrDeadline)
		if p.flight != nil { // it came too late: the next one's turn
			c.hot.land(p.flight, secret.Secret{}, 0, p.err)
			p.flight = nil
		}
	}
	if p.err != nil || p.flight != nil {
		c.arena.Put(p.slot)
		return secret.Secret{}, 0, p.flight, p.err
	}
	return secret.New(c.arena, p.slot, CEKSize), p.grace, nil, nil
}

// getOff takes p off its flight, unless that has landed.
func (h *hotTitles) getOff(kid KID, p *passenger) {
	fs := h.of(kid)
	fs.mu.Lock()
	defer fs.mu.Unlock()
	if f := fs.by[kid]; f != nil {
		f.others = slices.DeleteFunc(f.others, func(o *passenger) bool { return o == p })
	}
}

// openKept copies a kept CEK, if it may still serve.
func (c *Custodian) openKept(set *controlSet, k SealedKey) (cek secret.Secret, ok bool, err error) {
	h, now := c.hot, c.hot.clock.now()
	kek := c.keys.have(keyID{kek: k.Key.KEK.Category, version: k.Key.KEK.Version})
	h.mu.RLock()
	defer h.mu.RUnlock()
	e := h.kept[k.Key.KID]
	if e == nil || e.set != set || !now.Before(e.until) || e.kek != kek || !kek.fresh(now) || !sameRecord(e.record, k) {
		return secret.Secret{}, false, nil
	}
	slot, err := c.slot(k)
	if err != nil {
		return secret.Secret{}, false, err
	}
	copy(slot, e.slot[:CEKSize])
	h.hits.Add(1)
	return secret.New(c.arena, slot, CEKSize), true, nil
}

// keep keeps a CEK that was just opened, unless the control set has changed
// since that was decided, or one is kept already, whose time this does not
// prolong. Where there is no room it is not kept.
func (c *Custodian) keep(set *controlSet, k SealedKey, cek secret.Secret, until time.Time) {
	h := c.hot
	kek := c.keys.have(keyID{kek: k.Key.KEK.Category, version: k.Key.KEK.Version})
	if kek == nil {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if c.set.Load() != set { // publish stores the new set first, and wipes then
		return
	}
	if e := h.kept[k.Key.KID]; e != nil {
		if e.kek == kek && sameRecord(e.record, k) {
			return
		}
		h.drop(k.Key.KID)
	}
	slot, err := h.arena.Get()
	if err != nil {
		return
	}
	cek.Use(func(b []byte) { copy(slot, b) })
	h.kept[k.Key.KID] = &keptCEK{slot, set, k, kek, until}
}

// drop wipes one. mu is held.
func (h *hotTitles) drop(kid KID) {
	h.arena.Put(h.kept[kid].slot)
	delete(h.kept, kid)
}

// wipe wipes every kept CEK that gone says is to go.
func (h *hotTitles) wipe(gone func(*keptCEK) bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for kid, e := range h.kept {
		if gone(e) {
			h.drop(kid)
		}
	}
}

func all(*keptCEK) bool { return true }

func (h *hotTitles) close() error {
	if h.arena == nil {
		return nil
	}
	h.wipe(all)
	return h.arena.Close()
}

// publish makes a control set the one that is decided on. What was kept under
// the one before is wiped before any change that it makes is answered.
func (c *Custodian) publish(set *controlSet) {
	c.set.Store(set)
	c.hot.wipe(all)
}

// RunHotTitles wipes the kept CEKs whose time ends, until ctx ends, and then all.
func (c *Custodian) RunHotTitles(ctx context.Context) {
	if len(c.hot.lifetimes) == 0 {
		return
	}
	tick := time.NewTicker(hotSweep)
	defer tick.Stop()
	defer c.hot.wipe(all)
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			c.SweepHotTitles()
		}
	}
}

// SweepHotTitles wipes the kept CEKs whose time ends before the next look, and
// those whose KEK would not open them any more.
func (c *Custodian) SweepHotTitles() {
	now := c.hot.clock.now()
	c.hot.wipe(func(e *keptCEK) bool {
		kek := c.keys.have(keyID{kek: e.record.Key.KEK.Category, version: e.record.Key.KEK.Version})
		return !now.Add(hotSweep).Before(e.until) || e.kek != kek || !kek.fresh(now)
	})
}

// HotTitles are the categories whose opened CEKs are kept, sorted.
func (c *Custodian) HotTitles() []CategoryName {
	var names []CategoryName
	for name := range c.hot.lifetimes {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// HotStats say what was spared the token.
type HotStats struct {
	Kept   int    `json:"kept"`   // CEKs at this moment
	Hits   uint64 `json:"hits"`   // releases of a kept CEK
	Shared uint64 `json:"shared"` // releases that shared another call's operation
}

// Hot is what was spared the token so far.
func (c *Custodian) Hot() HotStats {
	s := HotStats{Hits: c.hot.hits.Load(), Shared: c.hot.shared.Load()}
	if c.hot.arena != nil {
		s.Kept = c.hot.arena.InUse()
	}
	return s
}
