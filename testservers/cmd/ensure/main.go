// Ensure builds the test servers that are not in the cache yet, so that their
// minutes are seen before the tests and do not count against a test's timeout.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/keycustody/custodian/testservers"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	binary, err := testservers.EnsureVault(ctx, func(line string) { fmt.Println("test servers:", line) })
	if err != nil {
		fmt.Fprintln(os.Stderr, "test servers:", err)
		os.Exit(1)
	}
	fmt.Println("test servers: vault is at", binary)
}
