package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/client"
	"github.com/keycustody/custodian/custodian"
)

func (a *app) categoryCmd() *cobra.Command {
	return group(&cobra.Command{Use: "category", Short: "Content categories, each with its line of key-encryption keys"},
		a.categoryCreateCmd(), a.categoryListCmd(), a.categoryVersionsCmd(), a.categoryProvidersCmd(),
		a.categoryModeCmd("freeze", "Stop issuing and releasing keys of a category at once (officer)", v1.CategoryMode_CATEGORY_MODE_FROZEN),
		a.categoryModeCmd("unfreeze", "Let a frozen or restricted category serve again (officer)", v1.CategoryMode_CATEGORY_MODE_OPEN),
		a.categoryModeCmd("no-new", "Make no new content keys in a category, and serve those that exist (officer)", v1.CategoryMode_CATEGORY_MODE_NO_NEW),
		a.categoryModeCmd("rekey-required", "Issue no content key of a category that exists now until its content is re-keyed (officer)", v1.CategoryMode_CATEGORY_MODE_REKEY_REQUIRED))
}

// A categoryView is a category in JSON.
type categoryView struct {
	Name             string     `json:"name"`
	Mode             string     `json:"mode"`
	ActiveKeyVersion uint32     `json:"active_key_version"`
	Providers        []string   `json:"providers"`
	ReissueWindow    string     `json:"reissue_window,omitempty"`
	Live             bool       `json:"live"`
	CreateTime       *time.Time `json:"create_time,omitempty"`
	Revision         uint64     `json:"revision"`
}

func viewCategory(c *v1.Category) categoryView {
	v := categoryView{
		Name: c.GetName(), Mode: modeText(c.GetMode()), ActiveKeyVersion: c.GetActiveKeyVersion(),
		Providers: c.GetProviders(), Live: c.GetLive(), CreateTime: timeOrNone(c.GetCreateTime()), Revision: c.GetRevision(),
	}
	window := c.GetReissueWindow().AsDuration()
	if window == 0 {
		window = custodian.DefaultReissueWindow
	}
	if !c.GetLive() {
		v.ReissueWindow = window.String()
	}
	return v
}

// modeText is a mode as plans have it: rekey-required.
func modeText(m v1.CategoryMode) string {
	return strings.ReplaceAll(enum(m.String(), "CATEGORY_MODE_"), "_", "-")
}

func (a *app) categoryCreateCmd() *cobra.Command {
	var providers []string
	var window time.Duration
	var live bool
	c := leaf(&cobra.Command{
		Use:   "create NAME",
		Short: "Make a category with its first key-encryption key (officer)",
		Example: `  custodianctl category create movies
  custodianctl category create sport --live --provider vault-a --provider vault-b`,
	}, cobra.ExactArgs(1), func(ctx context.Context, args []string) error {
		req := &v1.CreateCategoryRequest{Name: args[0], Providers: providers, Live: live}
		if err := errors.Join(custodian.CategoryName(args[0]).Check(), checkWindow(window, live)); err != nil {
			return invalid(err)
		}
		if window > 0 {
			req.ReissueWindow = durationpb.New(window)
		}
		got, err := ask(ctx, a, func(ctx context.Context, cl *client.Client) (*v1.Category, error) { return cl.CreateCategory(ctx, req) })
		if err != nil {
			return fmt.Errorf("create category %s: %w", args[0], err)
		}
		if a.json {
			return a.printJSON(viewCategory(got))
		}
		return a.printf("category %s is made: key version %d, wrapped by the HSM and by %s\n",
			plain(got.GetName()), got.GetActiveKeyVersion(), names(got.GetProviders()))
	})
	f := c.Flags()
	f.StringArrayVar(&providers, "provider", nil, "KMS `NAME` in the daemon's config that holds the outer wrap; again for more (default: the daemon's)")
	f.DurationVar(&window, "reissue-window", 0, "how long a packager may ask for the same key again (default 72h)")
	f.BoolVar(&live, "live", false, "live channels: keys are issued again without an end")
	return c
}

func checkWindow(window time.Duration, live bool) error {
	if window < 0 {
		return fmt.Errorf("--reissue-window %s: must be above zero", window)
	}
	if window > 0 && live {
		return errors.New("--reissue-window: a live category has no such window; leave it or --live out")
	}
	return nil
}

func (a *app) categoryListCmd() *cobra.Command {
	return leaf(&cobra.Command{Use: "list", Short: "List the categories (officer, operator, auditor)"}, cobra.NoArgs, func(ctx context.Context, _ []string) error {
		all, err := ask(ctx, a, func(ctx context.Context, cl *client.Client) ([]*v1.Category, error) { return cl.ListCategories(ctx) })
		if err != nil {
			return fmt.Errorf("list categories: %w", err)
		}
		return printList(a, "categories", all, viewCategory, []string{"NAME", "MODE", "KEY VERSION", "PROVIDERS", "REISSUE WINDOW", "CREATED"}, func(c *v1.Category, v categoryView) []string {
			window := v.ReissueWindow
			if v.Live {
				window = "no end (live)"
			}
			return []string{plain(v.Name), v.Mode, strconv.FormatUint(uint64(v.ActiveKeyVersion), 10), names(v.Providers), window, stamp(at(c.GetCreateTime()))}
		})
	})
}

// A versionView is a key version in JSON.
type versionView struct {
	Category            string     `json:"category"`
	Version             uint32     `json:"version"`
	State               string     `json:"state"`
	MEKVersion          uint32     `json:"mek_version"`
	OuterWraps          []wrapView `json:"outer_wraps"`
	ReservedInvocations uint64     `json:"reserved_invocations"`
	CreateTime          *time.Time `json:"create_time,omitempty"`
	DeactivateTime      *time.Time `json:"deactivate_time,omitempty"`
	Revision            uint64     `json:"revision"`
}

type wrapView struct {
	Provider string `json:"provider"`
	KeyRef   string `json:"key_ref"`
}

func viewVersion(k *v1.KeyVersion) versionView {
	v := versionView{
		Category: k.GetCategory(), Version: k.GetVersion(), State: enum(k.GetState().String(), "KEY_STATE_"), MEKVersion: k.GetMekVersion(),
		ReservedInvocations: k.GetReservedInvocations(), CreateTime: timeOrNone(k.GetCreateTime()),
		DeactivateTime: timeOrNone(k.GetDeactivateTime()), Revision: k.GetRevision(),
	}
	for _, w := range k.GetOuterWraps() {
		v.OuterWraps = append(v.OuterWraps, wrapView{w.GetProvider(), w.GetKeyRef()})
	}
	return v
}

func (a *app) categoryVersionsCmd() *cobra.Command {
	return leaf(&cobra.Command{Use: "versions NAME", Short: "List the versions of a category's key-encryption key (officer, operator, auditor)"}, cobra.ExactArgs(1), func(ctx context.Context, args []string) error {
		if err := custodian.CategoryName(args[0]).Check(); err != nil {
			return invalid(err)
		}
		all, err := ask(ctx, a, func(ctx context.Context, cl *client.Client) ([]*v1.KeyVersion, error) {
			return cl.ListKeyVersions(ctx, args[0])
		})
		if err != nil {
			return fmt.Errorf("list key versions of %s: %w", args[0], err)
		}
		return printList(a, "key_versions", all, viewVersion, []string{"KEY", "STATE", "MEK", "OUTER WRAPS", "CREATED", "DEACTIVATED"}, func(k *v1.KeyVersion, v versionView) []string {
			var holders []string
			for _, w := range v.OuterWraps {
				holders = append(holders, w.Provider)
			}
			return []string{fmt.Sprintf("%s/%d", plain(v.Category), v.Version), v.State, strconv.FormatUint(uint64(v.MEKVersion), 10), names(holders), stamp(at(k.GetCreateTime())), stamp(at(k.GetDeactivateTime()))}
		})
	})
}

func (a *app) categoryModeCmd(verb, short string, mode v1.CategoryMode) *cobra.Command {
	var cause string
	c := leaf(&cobra.Command{Use: verb + " NAME", Short: short}, cobra.ExactArgs(1), func(ctx context.Context, args []string) error {
		faults := custodian.CategoryName(args[0]).Check()
		if strings.TrimSpace(cause) == "" {
			faults = errors.Join(faults, errors.New("--cause: say why; the audit log keeps it"))
		}
		if faults != nil {
			return invalid(faults)
		}
		req := &v1.SetCategoryModeRequest{Category: args[0], Mode: mode, Cause: cause}
		got, err := ask(ctx, a, func(ctx context.Context, cl *client.Client) (*v1.Category, error) {
			return cl.SetCategoryMode(ctx, req)
		})
		if err != nil {
			return fmt.Errorf("%s category %s: %w", verb, args[0], err)
		}
		if a.json {
			return a.printJSON(viewCategory(got))
		}
		return a.printf("category %s is %s\n", plain(got.GetName()), modeText(got.GetMode()))
	})
	c.Flags().StringVar(&cause, "cause", "", "why, `TEXT` for the audit log")
	return need(c, "cause")
}
