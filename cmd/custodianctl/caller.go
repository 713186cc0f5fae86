package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/client"
)

func (a *app) callerCmd() *cobra.Command {
	return group(&cobra.Command{
		Use:   "caller",
		Short: "Callers that are stopped",
		Example: `  custodianctl caller freeze spiffe://example.org/provider-a --cause "ticket 4711: certificate stolen"
  custodianctl ceremony blast-radius --caller spiffe://example.org/provider-a`,
	}, a.callerSetCmd("freeze", "Refuse a caller everything from now on (officer)", "is frozen",
		func(ctx context.Context, cl *client.Client, identity, cause string) (*v1.FrozenCaller, error) {
			return cl.FreezeCaller(ctx, &v1.FreezeCallerRequest{Identity: identity, Cause: cause})
		}),
		a.callerSetCmd("unfreeze", "Let a frozen caller call again (officer)", "may call again",
			func(ctx context.Context, cl *client.Client, identity, cause string) (*v1.FrozenCaller, error) {
				return cl.LiftCaller(ctx, &v1.LiftCallerRequest{Identity: identity, Cause: cause})
			}),
		a.callerFrozenCmd())
}

// A frozenView is a frozen caller in JSON.
type frozenView struct {
	Identity string     `json:"identity"`
	By       string     `json:"by"`
	Cause    string     `json:"cause"`
	Time     *time.Time `json:"time"`
}

func viewFrozen(f *v1.FrozenCaller) frozenView {
	return frozenView{f.GetIdentity(), f.GetBy(), f.GetCause(), timeOrNone(f.GetTime())}
}

func (a *app) callerSetCmd(verb, short, is string, set func(ctx context.Context, cl *client.Client, identity, cause string) (*v1.FrozenCaller, error)) *cobra.Command {
	var cause string
	c := leaf(&cobra.Command{Use: verb + " IDENTITY", Short: short}, cobra.ExactArgs(1), func(ctx context.Context, args []string) error {
		if strings.TrimSpace(cause) == "" {
			return invalid(errors.New("--cause: say why; the audit log keeps it"))
		}
		got, err := ask(ctx, a, func(ctx context.Context, cl *client.Client) (*v1.FrozenCaller, error) {
			return set(ctx, cl, args[0], cause)
		})
		if err != nil {
			return fmt.Errorf("%s caller %s: %w", verb, plain(args[0]), err)
		}
		if a.json {
			return a.printJSON(viewFrozen(got))
		}
		return a.printf("caller %s %s\n", plain(got.GetIdentity()), is)
	})
	c.Flags().StringVar(&cause, "cause", "", "why, `TEXT` for the audit log")
	return need(c, "cause")
}

func (a *app) callerFrozenCmd() *cobra.Command {
	return leaf(&cobra.Command{Use: "frozen", Short: "List the callers that are frozen (officer, operator, auditor)"}, cobra.NoArgs, func(ctx context.Context, _ []string) error {
		all, err := ask(ctx, a, func(ctx context.Context, cl *client.Client) ([]*v1.FrozenCaller, error) {
			return cl.ListFrozenCallers(ctx)
		})
		if err != nil {
			return fmt.Errorf("list frozen callers: %w", err)
		}
		return printList(a, "callers", all, viewFrozen, []string{"CALLER", "SINCE", "BY", "CAUSE"}, func(f *v1.FrozenCaller, _ frozenView) []string {
			return []string{plain(f.GetIdentity()), stamp(at(f.GetTime())), plain(f.GetBy()), short(f.GetCause(), 60)}
		})
	})
}
