package main

import (
	"fmt"
	"os/signal"
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
