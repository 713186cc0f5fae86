package main

import (
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// harden makes this process one whose memory is not for others: no core
// dumps, not ptraceable and unreadable in /proc by processes of the same
// user, new files for the owner only. CEKs in clear lie in locked memory of
// their own; mlockall would pin the pages of the store.
func harden() error {
	syscall.Umask(0o077)
	signal.Ignore(syscall.SIGXFSZ) // a file at its size limit is an error of a write, not the end
	none := unix.Rlimit{}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &none); err != nil {
		return fmt.Errorf("switch core dumps off: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("make the process undumpable: %w", err)
	}
	return nil
}

// preemptionOff is the setting that keeps Go's scheduler from interrupting a
// goroutine by a signal. The kernel saves the registers of the thread in memory
// for the handler, and where the thread is just copying an answer, they hold
// part of it: a CEK would stay on the handler's stack until the next signal. So
// goroutines yield at their function calls only. Nothing here computes for long
// without one.
const preemptionOff = "asyncpreemptoff=1"

// withoutPreemption starts this program again with preemptionOff, because the
// runtime reads it before main. It returns if it is on already, or with the
// reason why it cannot be.
func withoutPreemption() error {
	settings := os.Getenv("GODEBUG")
	if strings.Contains(","+settings+",", ","+preemptionOff+",") {
		return nil
	}
	if settings != "" {
		settings += ","
	}
	err := os.Setenv("GODEBUG", settings+preemptionOff)
	if err == nil {
		err = syscall.Exec("/proc/self/exe", os.Args, os.Environ())
	}
	return fmt.Errorf("start again with %s (or put it into GODEBUG in the environment): %w", preemptionOff, err)
}
