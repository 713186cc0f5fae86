package audit

import "time"

// Writing is what the one writer of a log is at, so that whoever waits for it
// too long can say for what.
type Writing struct {
	Step string // StepRoom and so on; "" where no batch is under way
	// For is how long the step has taken until now.
	For time.Duration
	// Sign and Sync are how long these took of the last batch that came so far.
	Sign, Sync time.Duration
}

// The steps of a batch.
const (
	StepRoom  = "room"  // a new segment, or more room for this one
	StepSign  = "sign"  // the token signs the checkpoint
	StepWrite = "write" // to the file
	StepSync  = "sync"  // the disk
)

// steps is what the writer keeps for Writing. The Log's mu guards it.
type steps struct {
	step       string
	began      time.Time
	sign, sync time.Duration
}

// Writing says what the writer is at.
func (l *Log) Writing() Writing {
	l.mu.Lock()
	defer l.mu.Unlock()
	w := Writing{Step: l.steps.step, Sign: l.steps.sign, Sync: l.steps.sync}
	if w.Step != "" {
		w.For = time.Since(l.steps.began)
	}
	return w
}

// at begins a step, which ends the one before; "" ends the last one.
func (l *Log) at(step string) {
	now := time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	switch took := now.Sub(l.steps.began); l.steps.step {
	case StepSign:
		l.steps.sign = took
	case StepSync:
		l.steps.sync = took
	}
	l.steps.step, l.steps.began = step, now
}
