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
	"github.com/keycustody/custodian/custodian"
)

func (a *app) categoryProvidersCmd() *cobra.Command {
	return group(&cobra.Command{Use: "providers", Short: "Who holds the outer wraps of a category's keys",
		Long: `Change who holds the outer wraps of a category's key-encryption keys, or of the
helper keys (--helper-keys in place of a NAME). The daemon does it key by key, opens
each new wrap before it drops an old one, and goes on after a restart. With --wait
the command shows the progress until the end; without, "providers jobs" shows it.`},
		a.providersSetCmd(), a.providersReencryptCmd(), a.providersJobsCmd())
}

// A rewrapView is a job in JSON.
type rewrapView struct {
	Category    string     `json:"category,omitempty"`
	HelperKeys  bool       `json:"helper_keys,omitempty"`
	Providers   []string   `json:"providers"`
	Reencrypt   []string   `json:"reencrypt,omitempty"`
	BeginTime   *time.Time `json:"begin_time,omitempty"`
	RequestedBy string     `json:"requested_by"`
	Done        int32      `json:"done"`
	Total       int32      `json:"total"`
	Ended       bool       `json:"ended"`
	LastError   string     `json:"last_error,omitempty"`
}

func viewRewrap(j *v1.Rewrap) rewrapView {
	return rewrapView{Category: j.GetCategory(), HelperKeys: j.GetCategory() == "", Providers: j.GetProviders(), Reencrypt: j.GetReencrypt(),
		BeginTime: timeOrNone(j.GetBeginTime()), RequestedBy: j.GetRequestedBy(), Done: j.GetDone(), Total: j.GetTotal(), LastError: j.GetLastError()}
}

// A rewrapScope is what the commands are about: a category, or the helper keys.
type rewrapScope struct {
	helpers   bool
	providers []string
	cause     string
	wait      bool
	name      string
}

func (s *rewrapScope) flags(c *cobra.Command, providers string) *cobra.Command {
	f := c.Flags()
	f.BoolVar(&s.helpers, "helper-keys", false, "the helper keys, in place of a category")
	f.StringArrayVar(&s.providers, "provider", nil, providers)
	f.StringVar(&s.cause, "cause", "", "why, `TEXT` for the audit log")
	f.BoolVar(&s.wait, "wait", false, "show the progress, and end when the job has ended")
	return need(c, "cause")
}

// take reads the arguments.
func (s *rewrapScope) take(args []string) error {
	var faults error
	switch {
	case s.helpers && len(args) > 0:
		faults = errors.New("--helper-keys: leave it or the category out")
	case !s.helpers && len(args) == 0:
		faults = errors.New("name a category, or give --helper-keys")
	case !s.helpers:
		s.name = args[0]
		faults = custodian.CategoryName(s.name).Check()
	}
	if strings.TrimSpace(s.cause) == "" {
		faults = errors.Join(faults, errors.New("--cause: say why; the audit log keeps it"))
	}
	if faults != nil {
		return invalid(faults)
	}
	return nil
}

func scopeOf(category string) string {
	if category == "" {
		return "helper keys"
	}
	return "category " + plain(category)
}

func (a *app) providersSetCmd() *cobra.Command {
	var s rewrapScope
	c := leaf(&cobra.Command{
		Use:   "set [NAME]",
		Short: "Say which KMS instances hold the outer wraps, any one of which opens the keys (officer)",
		Example: `  custodianctl category providers set movies --provider vault --provider aws --cause 'a second one' --wait
  custodianctl category providers set --helper-keys --provider vault --provider aws --cause 'a second one'`,
	}, cobra.MaximumNArgs(1), func(ctx context.Context, args []string) error {
		if err := s.take(args); err != nil {
			return err
		}
		job, err := ask(ctx, a, func(ctx context.Context, cl *client.Client) (*v1.Rewrap, error) {
			return cl.SetProviders(ctx, &v1.SetProvidersRequest{Category: s.name, HelperKeys: s.helpers, Providers: s.providers, Cause: s.cause})
		})
		if err != nil {
			return fmt.Errorf("set providers of %s: %w", scopeOf(s.name), err)
		}
		return a.followRewrap(ctx, job, s.wait)
	})
	return need(s.flags(c, "KMS `NAME` in the daemon's config that will hold a wrap; again for more"), "provider")
}

func (a *app) providersReencryptCmd() *cobra.Command {
	var s rewrapScope
	c := leaf(&cobra.Command{
		Use:   "reencrypt [NAME]",
		Short: "Make the outer wraps anew after a KMS rotated its own key (officer, operator)",
	}, cobra.MaximumNArgs(1), func(ctx context.Context, args []string) error {
		if err := s.take(args); err != nil {
			return err
		}
		job, err := ask(ctx, a, func(ctx context.Context, cl *client.Client) (*v1.Rewrap, error) {
			return cl.Reencrypt(ctx, &v1.ReencryptRequest{Category: s.name, HelperKeys: s.helpers, Providers: s.providers, Cause: s.cause})
		})
		if err != nil {
			return fmt.Errorf("re-encrypt wraps of %s: %w", scopeOf(s.name), err)
		}
		return a.followRewrap(ctx, job, s.wait)
	})
	return s.flags(c, "KMS `NAME` that rotated its key; again for more (default: all that hold a wrap)")
}

func (a *app) providersJobsCmd() *cobra.Command {
	return leaf(&cobra.Command{Use: "jobs", Short: "List the jobs that have not ended (officer, operator, auditor)"}, cobra.NoArgs, func(ctx context.Context, _ []string) error {
		jobs, err := ask(ctx, a, func(ctx context.Context, cl *client.Client) ([]*v1.Rewrap, error) { return cl.ListRewraps(ctx) })
		if err != nil {
			return fmt.Errorf("list jobs: %w", err)
		}
		return printList(a, "jobs", jobs, viewRewrap, []string{"KEYS", "PROVIDERS", "REENCRYPT", "DONE", "LAST ERROR"}, func(j *v1.Rewrap, _ rewrapView) []string {
			return []string{scopeOf(j.GetCategory()), names(j.GetProviders()), names(j.GetReencrypt()), progress(j), short(orDash(j.GetLastError()), 60)}
		})
	})
}

func progress(j *v1.Rewrap) string { return fmt.Sprintf("%d of %d", j.GetDone(), j.GetTotal()) }

// waitPause is how long it is between two looks at a job.
const waitPause = 500 * time.Millisecond

// followRewrap shows a job that has begun, and, with wait, how it goes on. The
// progress is for people and goes to standard error.
func (a *app) followRewrap(ctx context.Context, job *v1.Rewrap, wait bool) error {
	view, said := viewRewrap(job), ""
	for wait && !view.Ended {
		jobs, err := ask(ctx, a, func(ctx context.Context, cl *client.Client) ([]*v1.Rewrap, error) { return cl.ListRewraps(ctx) })
		if err != nil {
			return fmt.Errorf("the job has begun and goes on by itself; ask for its progress: %w", err)
		}
		view.Ended, view.Done, view.LastError = true, view.Total, ""
		for _, j := range jobs {
			if j.GetCategory() == job.GetCategory() {
				view = viewRewrap(j)
			}
		}
		line := fmt.Sprintf("%s: %d of %d keys", scopeOf(view.Category), view.Done, view.Total)
		if view.LastError != "" {
			line += "; it does not go on: " + plain(view.LastError)
		}
		if line != said {
			fmt.Fprintln(a.err, line)
			said = line
		}
		if view.Ended {
			break
		}
		select {
		case <-time.After(waitPause):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if a.json {
		return a.printJSON(view)
	}
	if view.Ended {
		return a.printf("%s: %s by %s, and each was opened\n", scopeOf(view.Category), number(view.Total, "key is wrapped", "keys are wrapped"), names(view.Providers))
	}
	return a.printf("%s: the job has begun, %d of %d keys; custodianctl category providers jobs shows it\n", scopeOf(view.Category), view.Done, view.Total)
}
