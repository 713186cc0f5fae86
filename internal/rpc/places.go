package rpc

import (
	"fmt"
	"sync"

	"github.com/keycustody/custodian/custodian"
)

// MaxCalls are under way at once at a front door that does not speak gRPC: as
// many bodies of requests are in memory.
const MaxCalls = 512

// Places are those of the calls under way at a front door. A caller may have as
// many as it leaves free: so however many some callers take, and keep by sending
// slowly, others find some.
type Places struct {
	mu   sync.Mutex // guards the fields below
	free int
	held map[string]int // by caller
}

// NewPlaces makes n places.
func NewPlaces(n int) *Places { return &Places{free: n, held: map[string]int{}} }

func (p *Places) take(caller string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.held[caller] >= p.free {
		return false
	}
	p.free--
	p.held[caller]++
	return true
}

func (p *Places) leave(caller string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.free++
	if p.held[caller]--; p.held[caller] == 0 {
		delete(p.held, caller)
	}
}

// Take takes a place for the visitor, who gives it back by calling leave; or
// says that there is none, which the audit log counts.
func (v *Visit) Take(p *Places, what custodian.Action) (leave func(), err error) {
	who := v.call.caller
	if p.take(who.ID) {
		return func() { p.leave(who.ID) }, nil
	}
	err = fmt.Errorf("%s has too many calls under way: %w", who.ID, custodian.ErrRate)
	v.server.metrics.crowded.Inc()
	if custody, _ := v.server.custody(); custody != nil {
		if cerr := custody.CountRefused(who, what, v.call.requestID, err); cerr != nil {
			return nil, fmt.Errorf("%w: %w", err, cerr)
		}
	}
	return nil, err
}
