package rpc

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

const (
	// repeatPeriod is for how long what is said again is only counted.
	repeatPeriod = 10 * time.Second
	// maxRepeats is how many kinds are counted apart.
	maxRepeats = 256
)

// repeats keep the log readable where others decide how often something is
// said: whoever finds the port can be refused as often as they like, and in an
// outage every call fails for the same reason. The first line of a kind is
// written at once. Those that follow are counted: at the end of each period one
// line has the newest of them, and how many it stands for. Lines are written
// without the lock, so that a log that blocks holds up nobody whose line is only
// counted.
type repeats struct {
	mu    sync.Mutex // guards the map and what is in it
	kinds map[string]*repeat
}

// A repeat is what was not written of one kind since the last line.
type repeat struct {
	count  int
	newest line
}

// A line is a message with its attributes, and the logger's function of its
// level.
type line struct {
	write   func(message string, attrs ...any)
	message string
	attrs   []any
}

func newRepeats() *repeats { return &repeats{kinds: map[string]*repeat{}} }

// say writes l, or counts it.
func (r *repeats) say(kind string, l line) {
	if r.first(kind, l) {
		l.write(l.message, l.attrs...)
	}
}

// first tells whether l is the first line of its kind. Otherwise it counts it.
func (r *repeats) first(kind string, l line) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.kinds[kind] == nil && len(r.kinds) >= maxRepeats {
		kind = "others"
	}
	if again := r.kinds[kind]; again != nil {
		again.count++
		again.newest = l
		return false
	}
	r.kinds[kind] = &repeat{}
	return true
}

// run ends a period after the other, until ctx ends.
func (r *repeats) run(ctx context.Context) {
	tick := time.NewTicker(repeatPeriod)
	defer tick.Stop()
	defer r.endPeriod()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			r.endPeriod()
		}
	}
}

// endPeriod writes what was counted.
func (r *repeats) endPeriod() {
	for _, again := range r.take() {
		l := again.newest
		l.write(l.message, append(l.attrs, slog.Int("count", again.count))...)
	}
}

// take returns what was counted, and counts anew. A kind that was quiet for the
// whole period is forgotten: its next line is the first one again.
func (r *repeats) take() (counted []repeat) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for kind, again := range r.kinds {
		if again.count == 0 {
			delete(r.kinds, kind)
			continue
		}
		counted = append(counted, *again)
		*again = repeat{}
	}
	return counted
}
