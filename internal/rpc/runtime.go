package rpc

import (
	"os"
	"runtime"
	"runtime/debug"
)

const (
	// gcPercent is how much garbage there may be beside what is in use, in
	// percent. That is some 5 MB however many keys are stored, so ten times as
	// much is little memory, while collecting it less often saves a tenth of the
	// CPU time of a callback.
	gcPercent = 1000
	// softLimit is where it is collected more often nevertheless, in bytes.
	softLimit = 512 << 20
)

// TuneRuntime sets the Go runtime up for a process that serves callbacks. What
// the environment says comes first (GOGC, GOMEMLIMIT, GOMAXPROCS).
func TuneRuntime() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(softLimit)
	}
	// One more than there are CPUs: a call of the token, or a sync of the audit
	// log, has one of them until the runtime finds that it blocks, and callbacks
	// would wait so long.
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(runtime.GOMAXPROCS(0) + 1)
	}
}
