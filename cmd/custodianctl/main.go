// Command custodianctl is the tool of the people who work with custodiand:
// officers, packagers, auditors and operators. Its commands are ordered by noun;
// custodianctl help lists them, and custodianctl help exit-codes says what the
// exit codes mean.
//
// It decides how a request is put together from flags, how answers and refusals
// are shown, and what the exit code is. What is allowed, the daemon decides.
package main

import (
	"context"
	"errors"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"

	"github.com/keycustody/custodian/client"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// An app is one run of the program.
type app struct {
	out, err io.Writer
	now      func() time.Time

	// What the flags say.
	configFile string
	settings   settings // from flags only; connect merges the config file
	json       bool
	timeout    time.Duration
}

// run executes one command line and returns the exit code.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	a := &app{out: stdout, err: stderr, now: time.Now}
	root := a.root()
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitOK
	}
	// A command line that could not be read has set no flag.
	return a.report(err, a.json || slices.Contains(args, "--json"))
}

func (a *app) root() *cobra.Command {
	root := group(&cobra.Command{
		Use:   "custodianctl",
		Short: "Work with custodiand, the custodian of content keys",
		Long: `custodianctl asks custodiand for what its user's certificate permits, and checks
audit logs, backups and certificates without it.

Where the daemon is and who calls comes from a YAML file, or from flags, which
win:

  address: custodian.example:7443
  cert_file: alice.pem        # paths are relative to the folder of this file
  key_file: alice.key
  ca_file: ca.pem
  server_name: ""             # where it is not the host in address
  recipient_key_files: []     # open keys that are sealed to the caller

The file is the one named by --config, else by $CUSTODIANCTL_CONFIG, else
~/.config/custodian/custodianctl.yaml where there is one.`,
		SilenceErrors: true,
		SilenceUsage:  true,
	}, a.categoryCmd(), a.callerCmd(), a.keysCmd(), a.ceremonyCmd(), a.rotationCmd(), a.eventCmd(), a.revocationCmd(), a.statusCmd(), a.auditCmd(), a.backupCmd(), a.pkiCmd(), a.policyCmd(), a.versionCmd(), exitCodesTopic())
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error { return usage(c, err) })
	f := root.PersistentFlags()
	f.StringVar(&a.configFile, "config", "", "config `FILE`")
	f.StringVar(&a.settings.Address, "address", "", "`HOST:PORT` of the daemon")
	f.StringVar(&a.settings.CertFile, "cert", "", "the caller's certificate, PEM `FILE`")
	f.StringVar(&a.settings.KeyFile, "key", "", "its private key, PEM `FILE`")
	f.StringVar(&a.settings.CAFile, "ca", "", "CA of the daemon's certificate, PEM `FILE`")
	f.StringVar(&a.settings.ServerName, "server-name", "", "`NAME` that the daemon's certificate must have")
	f.BoolVar(&a.json, "json", false, "print JSON, errors too")
	f.DurationVar(&a.timeout, "timeout", 10*time.Second, "how long the daemon may take to answer")
	return root
}

// group makes a command that only holds others.
func group(c *cobra.Command, subs ...*cobra.Command) *cobra.Command {
	c.AddCommand(subs...)
	c.Args = cobra.ArbitraryArgs
	c.SuggestionsMinimumDistance = 2
	c.RunE = func(c *cobra.Command, args []string) error {
		if len(args) > 0 {
			err := errors.New("unknown command " + plain(args[0]))
			if like := c.SuggestionsFor(args[0]); len(like) > 0 {
				err = errors.New("unknown command " + plain(args[0]) + ": is it " + strings.Join(like, " or ") + "?")
			}
			return usage(c, err)
		}
		if !c.HasParent() {
			return c.Help()
		}
		return usage(c, errors.New("which of its commands?"))
	}
	return c
}

// leaf makes a command that does something: args says which arguments it takes.
func leaf(c *cobra.Command, args cobra.PositionalArgs, do func(ctx context.Context, args []string) error) *cobra.Command {
	c.Args = func(c *cobra.Command, given []string) error {
		if err := args(c, given); err != nil {
			return usage(c, err)
		}
		// Cobra looks too, but later, and its error has no exit code.
		if err := c.ValidateRequiredFlags(); err != nil {
			return usage(c, err)
		}
		return nil
	}
	if c.ValidArgsFunction == nil {
		c.ValidArgsFunction = cobra.NoFileCompletions
	}
	c.RunE = func(c *cobra.Command, args []string) error { return do(c.Context(), args) }
	return c
}

// need marks flags without which a command makes no sense.
func need(c *cobra.Command, flags ...string) *cobra.Command {
	for _, name := range flags {
		// An error would mean that there is no such flag: a test leaves each
		// of them out.
		_ = c.MarkFlagRequired(name)
	}
	return c
}

// connect dials the daemon.
func (a *app) connect(ctx context.Context) (*client.Client, error) {
	s, err := a.resolve()
	if err != nil {
		return nil, err
	}
	keys, err := recipientKeys(s.RecipientKeyFiles)
	if err != nil {
		return nil, &failure{reason: reasonConfig, code: codes.InvalidArgument, err: err}
	}
	ctx, cancel := a.bounded(ctx)
	defer cancel()
	cl, err := client.Dial(ctx, client.Config{Address: s.Address, CertFile: s.CertFile, KeyFile: s.KeyFile, CAFile: s.CAFile, ServerName: s.ServerName, RecipientKeys: keys})
	if err == nil {
		return cl, nil
	}
	if _, ok := errors.AsType[*client.Error](err); !ok {
		return nil, &failure{reason: reasonConfig, code: codes.InvalidArgument, err: err}
	}
	return nil, err
}

// bounded limits ctx by --timeout, for one call.
func (a *app) bounded(ctx context.Context) (context.Context, context.CancelFunc) {
	if a.timeout <= 0 {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, a.timeout)
}

// ask connects and makes one call.
func ask[T any](ctx context.Context, a *app, call func(context.Context, *client.Client) (T, error)) (T, error) {
	var none T
	cl, err := a.connect(ctx)
	if err != nil {
		return none, err
	}
	defer cl.Close()
	ctx, cancel := a.bounded(ctx)
	defer cancel()
	return call(ctx, cl)
}

func (a *app) versionCmd() *cobra.Command {
	return leaf(&cobra.Command{Use: "version", Short: "Print the version"}, cobra.NoArgs, func(context.Context, []string) error {
		v := struct {
			Version string `json:"version"`
			Go      string `json:"go"`
		}{"unknown", "unknown"}
		if info, ok := debug.ReadBuildInfo(); ok {
			v.Version, v.Go = info.Main.Version, info.GoVersion
		}
		if a.json {
			return a.printJSON(v)
		}
		return a.printf("custodianctl %s (%s)\n", v.Version, v.Go)
	})
}
