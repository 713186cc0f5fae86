package admission

import (
	"container/list"
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"
)

// ErrShed: the call would not be answered in its time, so it is not begun.
var ErrShed = errors.New("more calls than can be answered in time")

// Bounds in keys.
const (
	maxInside  = 4096 // at once
	maxWaiting = 4096 // of all callers together
	// freeInside come in where nothing is known of the rate.
	freeInside = 1024
	// floor come in even where the rate asks for fewer, as long as they come out
	// within half of the deadline: a slow disk serves many at once as fast as one.
	floor = 64
	least = 4
	// maxQuantum is what a caller may send in when it is its turn, at most.
	maxQuantum = 8
)

const (
	// window is how long the rate is taken over, or until enough calls have left,
	// but no longer than the deadline: one that is taken from few calls jumps.
	window = 50 * time.Millisecond
	enough = 5
	// memory is for how long a rate is believed.
	memory = 10 * time.Second
	// patience is the share of a call's time that it may be expected to take. The
	// rest is for what is not known: the way back, and a rate that falls.
	patience = 0.6
	// modestPatience is that share for the calls of a caller beside one that has
	// twice as much inside and waiting, or more: it is not the one to make way.
	modestPatience = 0.9
)

// A Gate lets calls in. It is safe for concurrent use.
type Gate struct {
	deadline time.Duration
	clock    func() time.Time
	born     time.Time

	inside  atomic.Int64 // keys
	limit   atomic.Int64 // of inside
	waiting atomic.Int64 // calls

	// Of the window that ends at end, in nanoseconds since born.
	end  atomic.Int64
	done atomic.Int64 // keys that came out in time
	left atomic.Int64 // calls that came out
	stay atomic.Int64 // nanoseconds that these were inside

	shed atomic.Uint64

	// mu guards the fields below.
	mu      sync.Mutex
	rate    float64 // keys a second that come out while calls wait; 0: not known
	known   int64   // when that was seen last
	begin   int64   // of the window
	waited  bool    // calls were waiting then
	callers map[string]*queue
	turns   list.List // of *queue: who is next
}

// A queue has the calls of one caller that wait. It is there as long as it has
// any, or any that has waited is inside.
type queue struct {
	caller  string
	calls   list.List // of *waiter
	keys    int64     // of calls
	inside  int64     // keys of calls that have waited
	deficit int64     // keys that it may still send in at this turn
	turn    *list.Element
}

// A waiter is one call that waits.
type waiter struct {
	keys   int64
	until  time.Time // zero: it has no end
	answer chan error
	place  *list.Element // nil: it waits no more
}

// A Pass is a call that is inside. Whoever entered calls Leave once.
type Pass struct {
	keys  int64
	since int64
	from  *queue // where it has waited; nil: it has not
}

// New makes a gate for calls that have deadline at most; the calls' contexts may
// give them less. clock is the one that the contexts' deadlines are told by.
func New(deadline time.Duration, clock func() time.Time) *Gate {
	g := &Gate{deadline: deadline, clock: clock, born: clock(), callers: map[string]*queue{}}
	g.limit.Store(freeInside)
	g.end.Store(int64(window))
	return g
}

// Enter lets a call for so many keys in, or waits until there is room. It
// returns ErrShed where the call cannot be expected to be answered in its time,
// and the context's error where that ends first.
func (g *Gate) Enter(ctx context.Context, caller string, keys int) (Pass, error) {
	p := Pass{keys: int64(keys), since: g.now()}
	if g.waiting.Load() == 0 && g.take(p.keys) {
		return p, nil
	}
	return g.wait(ctx, caller, p)
}

// Leave ends a call. inTime says that it came to an answer before its time was
// up: only those say how fast the work is.
func (g *Gate) Leave(p Pass, inTime bool) {
	now := g.now()
	if inTime {
		g.done.Add(p.keys)
	}
	g.left.Add(1)
	g.stay.Add(now - p.since)
	g.inside.Add(-p.keys)
	if now >= g.end.Load() {
		g.look(now)
	}
	if p.from == nil && g.waiting.Load() == 0 {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if q := p.from; q != nil {
		q.inside -= p.keys
		g.forget(q)
	}
	g.admit()
}

func (g *Gate) now() int64 { return int64(g.clock().Sub(g.born)) }

// take takes room for keys if there is any. A call that is larger than all the
// room there is comes in alone.
func (g *Gate) take(keys int64) bool {
	if in := g.inside.Add(keys); in <= g.limit.Load() || in == keys {
		return true
	}
	g.inside.Add(-keys)
	return false
}

// wait queues a call. Whoever took room in vain comes here and calls admit, so
// that nobody waits for room that was only lent.
func (g *Gate) wait(ctx context.Context, caller string, p Pass) (Pass, error) {
	g.look(p.since)
	w := &waiter{keys: p.keys, answer: make(chan error, 1)}
	w.until, _ = ctx.Deadline()
	g.mu.Lock()
	q := g.callers[caller]
	if q == nil {
		q = &queue{caller: caller}
	}
	if !g.worthWaiting(q, w) {
		g.admit()
		g.mu.Unlock()
		g.shed.Add(1)
		return Pass{}, ErrShed
	}
	g.push(q, w)
	g.admit()
	g.mu.Unlock()
	select {
	case err := <-w.answer:
		p.since, p.from = g.now(), q
		return p, err
	case <-ctx.Done():
	}
	g.mu.Lock()
	waits := w.place != nil
	if waits {
		g.pop(q, w)
	}
	g.mu.Unlock()
	if !waits && <-w.answer == nil { // it was let in at the last moment
		g.Leave(Pass{p.keys, g.now(), q}, false)
	}
	return Pass{}, ctx.Err()
}

// worthWaiting says whether a call can be expected to be answered in its time,
// if it waits now.
func (g *Gate) worthWaiting(q *queue, w *waiter) bool {
	callers := int64(len(g.callers))
	if g.callers[q.caller] == nil {
		callers++
	}
	if q.keys+w.keys > maxWaiting/callers {
		return false
	}
	if g.rate == 0 {
		return true
	}
	// The callers take turns: before this call come all of its caller's, and as
	// many of every other.
	ahead := g.inside.Load() + q.keys + w.keys
	share := patience
	mine := q.inside + q.keys + w.keys
	for _, other := range g.callers {
		if other == q {
			continue
		}
		ahead += min(other.keys, q.keys+w.keys)
		if other.inside+other.keys >= 2*mine {
			share = modestPatience
		}
	}
	return g.within(ahead, w, share)
}

// within says whether so many keys come out in a share of the time that a call
// has left.
func (g *Gate) within(keys int64, w *waiter, share float64) bool {
	left := g.deadline
	if !w.until.IsZero() {
		left = min(left, w.until.Sub(g.clock()))
	}
	return float64(keys)/g.rate <= share*left.Seconds()
}

func (g *Gate) push(q *queue, w *waiter) {
	g.callers[q.caller] = q
	if q.turn == nil {
		q.turn = g.turns.PushBack(q)
	}
	w.place = q.calls.PushBack(w)
	q.keys += w.keys
	g.waiting.Add(1)
}

func (g *Gate) pop(q *queue, w *waiter) {
	q.calls.Remove(w.place)
	w.place = nil
	q.keys -= w.keys
	g.waiting.Add(-1)
	if q.calls.Len() == 0 {
		g.turns.Remove(q.turn)
		q.turn, q.deficit = nil, 0
		g.forget(q)
	}
}

// forget lets go of a queue that nothing is left of.
func (g *Gate) forget(q *queue) {
	if q.turn == nil && q.inside == 0 {
		delete(g.callers, q.caller)
	}
}

// admit lets calls in while there is room, the callers in turn (deficit round
// robin, Shreedhar and Varghese 1995). A call that has waited for too long by
// now is sent away: room is for those who can still be answered.
func (g *Gate) admit() {
	for g.turns.Len() > 0 {
		q := g.turns.Front().Value.(*queue)
		w := q.calls.Front().Value.(*waiter)
		if g.rate > 0 && !w.until.IsZero() && float64(g.inside.Load()+w.keys)/g.rate > w.until.Sub(g.clock()).Seconds() {
			g.pop(q, w)
			g.shed.Add(1)
			w.answer <- ErrShed
			continue
		}
		if q.deficit < w.keys {
			q.deficit += g.quantum()
			g.turns.MoveToBack(q.turn)
			continue
		}
		if !g.take(w.keys) {
			return
		}
		q.deficit -= w.keys
		q.inside += w.keys
		g.pop(q, w)
		w.answer <- nil
	}
}

// quantum is what a caller may send in at its turn: no more than comes out in a
// tenth of the deadline, so that the next one's turn comes soon.
func (g *Gate) quantum() int64 {
	if g.rate == 0 {
		return maxQuantum
	}
	return int64(min(max(g.rate*g.deadline.Seconds()/10, 1), maxQuantum))
}

// look ends a window: where more calls came than there was room for, the rate at
// which keys came out is what can be had.
func (g *Gate) look(now int64) {
	end := g.end.Load()
	if now < end || !g.end.CompareAndSwap(end, now+int64(window)) {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	idle := now-end > int64(window) // nobody came or left for long
	if g.left.Load() < enough && now-g.begin < int64(g.deadline) && !idle {
		return
	}
	done, left, stay := g.done.Swap(0), g.left.Swap(0), g.stay.Swap(0)
	took := time.Duration(now - g.begin)
	g.begin = now
	waits := g.waiting.Load() > 0
	full := waits && g.waited
	// Many are inside for long: there is more than can be done, before the limit is met.
	crowded := g.inside.Load() >= floor && left > 0 && time.Duration(stay/left) > g.deadline/3
	g.waited = waits
	if idle { // it says nothing
		full, crowded = false, false
	}
	rate := float64(done) / took.Seconds()
	switch {
	case full || crowded:
		if g.rate > 0 {
			rate = max((g.rate+3*rate)/4, (3*g.rate+rate)/4) // up sooner than down: it falls by chance, too
		}
		g.rate, g.known = max(rate, 1), now
	case g.rate > 0 && rate > g.rate:
		g.rate, g.known = rate, now
	case g.rate > 0 && now-g.known > int64(memory):
		g.rate = 0
		g.limit.Store(freeInside)
		return
	}
	if g.rate > 0 {
		g.limit.Store(g.room())
	}
}

// room is how many keys may be inside: what comes out in a third of the deadline,
// so that the rest of it is for waiting in turn.
func (g *Gate) room() int64 {
	n := g.rate * g.deadline.Seconds()
	return int64(min(max(n/3, min(floor, n/2), least), maxInside))
}

// Stats are what a Gate is doing.
type Stats struct {
	Inside  int64   // keys
	Limit   int64   // of Inside
	Waiting int64   // calls
	Rate    float64 // keys a second, seen while there were too many calls; 0: not known
	Shed    uint64  // calls that were sent away
}

// Stats describes the gate now.
func (g *Gate) Stats() Stats {
	s := Stats{Inside: g.inside.Load(), Limit: g.limit.Load(), Waiting: g.waiting.Load(), Shed: g.shed.Load()}
	g.mu.Lock()
	s.Rate = g.rate
	g.mu.Unlock()
	return s
}
