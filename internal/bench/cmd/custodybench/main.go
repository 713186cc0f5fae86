// Command custodybench measures Custodian and writes what it measured, as a
// table for people and as one flat JSON object of numbers.
//
// The parent starts the same binary again for each role: servers (an echo, an
// echo that writes to an audit log, the real stack), which so have processes
// and CPU times of their own; and the load, one process and one code for all of
// them. What is compared runs in turns, several rounds of it: each figure is
// the median of the rounds, and a ratio is that of the ratios of each round.
//
// Nothing is switched off to be fast: token, store and audit log work as in the
// daemon. A bar that is missed is printed as missed and is no failure.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	err := dispatch(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "custodybench:", err)
		os.Exit(1)
	}
	os.Exit(0) // not by returning: exit handlers of PKCS#11 modules are known to crash
}

// dispatch runs a role, which the parent gives as the first argument, or is the
// parent.
func dispatch(ctx context.Context, args []string) error {
	if len(args) < 2 || args[0] != "-role" {
		return parent(ctx, args)
	}
	run, ok := roles[args[1]]
	if !ok {
		return fmt.Errorf("role %q: not known", args[1])
	}
	// A child ends with its parent, which holds the other end of its input.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		var b [1]byte
		for {
			if _, err := os.Stdin.Read(b[:]); err != nil {
				cancel()
				return
			}
		}
	}()
	if err := run(ctx, args[2:]); err != nil {
		return fmt.Errorf("%s: %w", args[1], err)
	}
	return nil
}

// roles are what a child can be.
var roles = map[string]func(context.Context, []string) error{
	roleEcho:       serveEcho,
	roleEchoAppend: serveEchoAppend,
	roleCallback:   serveCallback,
	roleDoors:      serveDoors,
	roleRotate:     serveRotation,
	rolePrepare:    prepare,
	roleLoad:       load,
	roleToken:      token,
	roleOverload:   overloadLoad,
	rolePolicy:     policyCost,

	roleAuditAppend: auditAppend,
	roleAuditMake:   auditMake,
	roleAuditVerify: auditVerify,
	roleAuditProve:  auditProve,
}

const (
	roleEcho       = "serve-echo"
	roleEchoAppend = "serve-echo-append"
	roleCallback   = "serve-callback"
	roleDoors      = "serve-doors"
	rolePrepare    = "prepare"
	roleLoad       = "load"
	roleToken      = "token"

	roleAuditAppend = "audit-append"
	roleAuditMake   = "audit-make"
	roleAuditVerify = "audit-verify"
	roleAuditProve  = "audit-prove"
)

// A scale says how long and how much is measured.
type scale struct {
	warm, time  time.Duration // of one run
	rounds      int
	keys        int // content keys behind the callback and in the small store
	million     int // in the big store
	rotated     int // that move to another key
	connections int
	lifetime    time.Duration // of a loaded KEK that ends in the middle of a run
	overload    []int         // times of what a server can do
}

var (
	fullScale  = scale{warm: time.Second, time: 4 * time.Second, rounds: 3, keys: 10_000, million: 1_000_000, rotated: 50_000, connections: 4, lifetime: time.Second, overload: []int{1, 2, 5, 10}}
	quickScale = scale{warm: 150 * time.Millisecond, time: 500 * time.Millisecond, rounds: 2, keys: 2_000, million: 20_000, rotated: 5_000, connections: 4, lifetime: 200 * time.Millisecond, overload: []int{1, 2, 5, 10}}
)

// sections in the order in which they run.
var sections = []struct {
	name string
	run  func(*rig, context.Context) error
}{
	{"callback", (*rig).callback},
	{"issue", (*rig).issue},
	{"doors", (*rig).doors},
	{"million", (*rig).million},
	{"kms", (*rig).kms},
	{"audit", (*rig).audit},
	{"rotation", (*rig).rotation},
	{"policy", (*rig).policy},
	{"overload", (*rig).overload},
	{"hot", (*rig).hot},
}

func parent(ctx context.Context, args []string) (err error) {
	fs := flag.NewFlagSet("custodybench", flag.ContinueOnError)
	only := fs.String("sections", "", "comma-separated: callback, issue, doors, million, kms, audit, rotation, policy, overload, hot; all if empty")
	quick := fs.Bool("quick", false, "less of everything, within a minute")
	out := fs.String("out", "bench.json", "file of the results")
	dir := fs.String("dir", "bin", "folder, on a real disk, under which data is kept while this runs")
	profile := fs.String("profile", "", "folder for CPU profiles of the servers")
	if err := fs.Parse(args); err != nil {
		return err
	}
	wanted, err := choose(*only)
	if err != nil {
		return err
	}
	s, n := fullScale, 0.0
	if *quick {
		s, n = quickScale, 1
	}
	r, err := newRig(s, *dir, *profile)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := r.close(); err == nil {
			err = cerr
		}
	}()
	r.table.add("quick", n)
	if err := r.run(ctx, wanted); err != nil {
		return err
	}
	r.table.print(os.Stdout)
	return r.table.writeJSON(*out)
}

// choose reads the list of sections.
func choose(list string) ([]string, error) {
	var all, wanted []string
	for _, s := range sections {
		all = append(all, s.name)
	}
	if strings.TrimSpace(list) == "" {
		return all, nil
	}
	for name := range strings.SplitSeq(list, ",") {
		name = strings.TrimSpace(name)
		if !slices.Contains(all, name) {
			return nil, fmt.Errorf("section %q: not one of %s", name, strings.Join(all, ", "))
		}
		wanted = append(wanted, name)
	}
	return wanted, nil
}
