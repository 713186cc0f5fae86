// Command custodiand is the daemon: it reads the configuration, opens token,
// store, KMS and audit log, serves the domain over mutual TLS, and ends
// cleanly on SIGINT or SIGTERM. It also makes a new custody (init), puts a
// backup back (restore), and runs a development custody (dev).
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/keycustody/custodian/certs"
	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/hsm"
	"github.com/keycustody/custodian/internal/audit"
	"github.com/keycustody/custodian/internal/rpc"
	"github.com/keycustody/custodian/store"
)

// Exit codes of custodiand; docs/OPERATIONS.md says what each asks for.
const (
	exitOK        = 0
	exitError     = 1
	exitUsage     = 2 // wrong command line or configuration: starting again does not help
	exitIntegrity = 4 // store, token and audit log disagree: people have to look
	exitHung      = 5 // a call to the token hung beyond the drain deadline: start again
)

// version is that of the module or of the commit that this was built from.
var version = func() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		return info.Main.Version
	}
	return "unknown"
}()

const usage = `usage:
  custodiand -config FILE [-check-config] [-confirm-time] [-migrate]
  custodiand init -config FILE [-plan GENESIS-PLAN -approval FILE -approval FILE...]
  custodiand restore -config FILE -from BACKUP -identity AGE-KEY-FILE
  custodiand dev [-dir DIR] [-listen ADDR] [-admin ADDR] [-category NAME]... [-provision]
  custodiand version
`

func main() {
	if err := withoutPreemption(); err != nil {
		fmt.Fprintln(os.Stderr, "custodiand:", err)
		os.Exit(exitError)
	}
	rpc.TuneRuntime()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	code := dispatch(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code) // not by returning: exit handlers of PKCS#11 modules are known to crash
}

func dispatch(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	if err := harden(); err != nil {
		fmt.Fprintln(stderr, "custodiand:", err)
		return exitError
	}
	command := ""
	if len(args) > 0 && len(args[0]) > 0 && args[0][0] != '-' {
		command, args = args[0], args[1:]
	}
	var err error
	switch command {
	case "":
		err = serveCommand(ctx, args, stdout, stderr)
	case "init":
		err = initCommand(ctx, args, stdout, stderr)
	case "restore":
		err = restoreCommand(ctx, args, stdout, stderr)
	case "dev":
		err = devCommand(ctx, args, stdout, stderr)
	case "version":
		fmt.Fprintln(stdout, "custodiand", version)
	default:
		err = usageError{fmt.Errorf("unknown command %q", command)}
	}
	return report(err, stderr)
}

// A usageError is a command line or a configuration that is wrong.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

// report prints err and finds its exit code.
func report(err error, stderr io.Writer) int {
	var u usageError
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp):
		return exitOK
	case errors.As(err, &u):
		fmt.Fprintf(stderr, "custodiand: %v\n%s", err, usage)
		return exitUsage
	}
	fmt.Fprintln(stderr, "custodiand:", err)
	if isIntegrity(err) {
		return exitIntegrity
	}
	return exitError
}

// isIntegrity tells the faults that no restart mends.
func isIntegrity(err error) bool {
	for _, fault := range []error{custodian.ErrRecordCorrupt, custodian.ErrWrongMEK, custodian.ErrNoObject, custodian.ErrLogRollback,
		custodian.ErrAnchorAhead, custodian.ErrAnchorFork,
		hsm.ErrUnfit, hsm.ErrDuplicate,
		store.ErrForeign, store.ErrTruncated, store.ErrDamaged, store.ErrNewerSchema, store.ErrOlderSchema} {
		if errors.Is(err, fault) {
			return true
		}
	}
	var damage *audit.DamageError
	return errors.As(err, &damage)
}

// flags is a flag set with our error handling and the -config flag.
func flags(name string, stderr io.Writer) (*flag.FlagSet, *string) {
	fs := flag.NewFlagSet(name, flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.Usage = func() { fmt.Fprint(stderr, usage) }
	return fs, fs.String("config", "", "configuration file")
}

func parse(fs *flag.FlagSet, args []string) error {
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return err
		}
		return usageError{err}
	}
	if fs.NArg() > 0 {
		return usageError{fmt.Errorf("unexpected argument %q", fs.Arg(0))}
	}
	return nil
}

func loadFlagged(path string) (*Config, error) {
	if path == "" {
		return nil, usageError{errors.New("-config FILE is needed")}
	}
	c, err := LoadConfig(path)
	if err != nil {
		return nil, usageError{err}
	}
	return c, nil
}

func serveCommand(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	fs, path := flags("custodiand", stderr)
	checkOnly := fs.Bool("check-config", false, "check the configuration and end")
	confirmTime := fs.Bool("confirm-time", false, "accept a clock far beyond the highest time seen")
	migrate := fs.Bool("migrate", false, "back the store up and migrate it to this schema, then serve")
	if err := parse(fs, args); err != nil {
		return err
	}
	c, err := loadFlagged(*path)
	if err != nil {
		return err
	}
	log := c.logger(stderr)
	if *checkOnly {
		if _, err := certs.NewServer(c.serverCerts(log)); err != nil {
			return usageError{fmt.Errorf("config %s: tls: %w", *path, err)}
		}
		p, err := c.policy(nil)
		if err != nil {
			return usageError{fmt.Errorf("config %s: %w", *path, err)}
		}
		fmt.Fprintf(stderr, "%s: good\n", *path)
		fmt.Fprintf(stdout, "conditions %x\n", p.Conditions())
		return nil
	}
	if *migrate {
		if err := migrateStore(ctx, c, log); err != nil {
			return err
		}
	}
	d := &daemon{config: c, path: *path, log: log, confirmTime: *confirmTime}
	return d.run(ctx)
}

func initCommand(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	fs, path := flags("custodiand init", stderr)
	plan := fs.String("plan", "", "genesis plan: it names the officers, and every one of them has signed it")
	var approvals names
	fs.Var(&approvals, "approval", "an officer's approval of the plan; may be given several times")
	if err := parse(fs, args); err != nil {
		return err
	}
	c, err := loadFlagged(*path)
	if err != nil {
		return err
	}
	genesis, err := readGenesis(*plan, approvals)
	if err != nil {
		return usageError{err}
	}
	if err := initCustody(ctx, c, genesis, c.logger(stderr)); err != nil {
		return fmt.Errorf("init: %w", err)
	}
	fmt.Fprintf(stdout, "initialised: MEK v1 in token %s, store %s, audit log %s\nback the token up now: without its MEK nothing of this store opens\n",
		c.HSM.Token, c.storePath(), c.auditDir())
	return nil
}
