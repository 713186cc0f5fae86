package admission

import (
	"runtime"

	"golang.org/x/sys/unix"
)

// StandBack lets whoever waits for a processor have it first. Work in the
// background calls it every 100 µs or so: the kernel does not take a processor
// from a thread that computes before a time slice has ended, which is some
// milliseconds, nor does our scheduler, and a callback would wait so long at
// each of its steps.
func StandBack() {
	runtime.Gosched()
	_, _, _ = unix.Syscall(unix.SYS_SCHED_YIELD, 0, 0, 0) // it cannot fail
}
