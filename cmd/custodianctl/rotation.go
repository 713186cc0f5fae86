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

func (a *app) rotationCmd() *cobra.Command {
	return group(&cobra.Command{Use: "rotation", Short: "New versions of keys in the place of old ones, and every record moved to them"},
		a.rotationStartCmd("kek CATEGORY", "Rotate a category's key-encryption key (officer)", v1.RotationKind_ROTATION_KIND_KEK, cobra.ExactArgs(1)),
		a.rotationStartCmd("mek", "Rotate the root key (officer)", v1.RotationKind_ROTATION_KIND_MEK, cobra.NoArgs),
		a.rotationListCmd(),
		a.rotationEndCmd("roll-back NAME", "Have the predecessor protect again (officer)", func(ctx context.Context, cl *client.Client, name string) (*v1.Rotation, error) {
			return cl.RollBackRotation(ctx, &v1.RollBackRotationRequest{Name: name})
		}),
		a.rotationEndCmd("retire NAME", "End the hold: what was replaced opens nothing any more (officer)", func(ctx context.Context, cl *client.Client, name string) (*v1.Rotation, error) {
			return cl.RetireRotation(ctx, &v1.RetireRotationRequest{Name: name})
		}))
}

func (a *app) rotationStartCmd(use, short string, kind v1.RotationKind, args cobra.PositionalArgs) *cobra.Command {
	var cause string
	var hold time.Duration
	var compromised []uint
	var serve, freeze bool
	c := leaf(&cobra.Command{Use: use, Short: short}, args, func(ctx context.Context, args []string) error {
		req := &v1.StartRotationRequest{Kind: kind, Cause: cause, ServeCompromised: serve, Hold: durationpb.New(hold)}
		var faults error
		if strings.TrimSpace(cause) == "" {
			faults = errors.Join(faults, errors.New("--cause: say why; the audit log keeps it"))
		}
		if hold < 0 {
			faults = errors.Join(faults, fmt.Errorf("--hold %s: must not be negative", hold))
		}
		if (len(compromised) > 0) != (serve || freeze) {
			faults = errors.Join(faults, errors.New("--compromised and the decision, --serve or --freeze, belong together"))
		}
		for _, v := range compromised {
			req.CompromisedVersions = append(req.CompromisedVersions, uint32(v))
		}
		if len(args) > 0 {
			req.Category = args[0]
			faults = errors.Join(faults, custodian.CategoryName(args[0]).Check())
		}
		if faults != nil {
			return invalid(faults)
		}
		got, err := ask(ctx, a, func(ctx context.Context, cl *client.Client) (*v1.Rotation, error) { return cl.StartRotation(ctx, req) })
		if err != nil {
			return fmt.Errorf("start a rotation: %w", err)
		}
		return a.printRotation(got)
	})
	f := c.Flags()
	f.StringVar(&cause, "cause", "", "why, `TEXT` for the audit log")
	f.DurationVar(&hold, "hold", 72*time.Hour, "how long it can be rolled back before it may be retired")
	if kind == v1.RotationKind_ROTATION_KIND_KEK {
		f.UintSliceVar(&compromised, "compromised", nil, "`VERSIONS` of the key that became known to others")
		f.BoolVar(&serve, "serve", false, "go on releasing the content keys that those have wrapped")
		f.BoolVar(&freeze, "freeze", false, "freeze the category")
		c.MarkFlagsMutuallyExclusive("serve", "freeze")
	}
	return need(c, "cause")
}

func (a *app) rotationEndCmd(use, short string, do func(context.Context, *client.Client, string) (*v1.Rotation, error)) *cobra.Command {
	return leaf(&cobra.Command{Use: use, Short: short}, cobra.ExactArgs(1), func(ctx context.Context, args []string) error {
		got, err := ask(ctx, a, func(ctx context.Context, cl *client.Client) (*v1.Rotation, error) { return do(ctx, cl, args[0]) })
		if err != nil {
			return fmt.Errorf("rotation %s: %w", args[0], err)
		}
		return a.printRotation(got)
	})
}

// A rotationView is a rotation in JSON.
type rotationView struct {
	Name        string     `json:"name"`
	Kind        string     `json:"kind"`
	Category    string     `json:"category,omitempty"`
	From        []uint32   `json:"from_versions"`
	To          uint32     `json:"to_version"`
	Compromised []uint32   `json:"compromised_versions,omitempty"`
	Serve       bool       `json:"serve_compromised,omitempty"`
	Step        string     `json:"step"`
	Cause       string     `json:"cause"`
	StartTime   *time.Time `json:"start_time,omitempty"`
	StepTime    *time.Time `json:"step_time,omitempty"`
	HoldUntil   *time.Time `json:"hold_until_time,omitempty"`
	Done        uint64     `json:"done_records"`
	Total       uint64     `json:"total_records"`
	Rate        float64    `json:"record_rate"`
	Remaining   string     `json:"remaining,omitempty"`
	LastError   string     `json:"last_error,omitempty"`
}

func viewRotation(r *v1.Rotation) rotationView {
	v := rotationView{Name: r.GetName(), Kind: enum(r.GetKind().String(), "ROTATION_KIND_"), Category: r.GetCategory(), From: r.GetFromVersions(),
		To: r.GetToVersion(), Compromised: r.GetCompromisedVersions(), Serve: r.GetServeCompromised(), Step: enum(r.GetStep().String(), "ROTATION_STEP_"),
		Cause: r.GetCause(), StartTime: timeOrNone(r.GetStartTime()), StepTime: timeOrNone(r.GetStepTime()), HoldUntil: timeOrNone(r.GetHoldUntilTime()),
		Done: r.GetDoneRecords(), Total: r.GetTotalRecords(), Rate: r.GetRecordRate(), LastError: r.GetLastError()}
	if r.GetRemaining() != nil {
		v.Remaining = r.GetRemaining().AsDuration().Round(time.Second).String()
	}
	return v
}

func (a *app) printRotation(r *v1.Rotation) error {
	if a.json {
		return a.printJSON(viewRotation(r))
	}
	return a.printf("rotation %s is at %s\n", plain(r.GetName()), enum(r.GetStep().String(), "ROTATION_STEP_"))
}

func (a *app) rotationListCmd() *cobra.Command {
	return leaf(&cobra.Command{Use: "list", Short: "List rotations, and how far they are (officer, operator, auditor)"}, cobra.NoArgs, func(ctx context.Context, _ []string) error {
		all, err := ask(ctx, a, func(ctx context.Context, cl *client.Client) ([]*v1.Rotation, error) { return cl.ListRotations(ctx) })
		if err != nil {
			return fmt.Errorf("list rotations: %w", err)
		}
		return printList(a, "rotations", all, viewRotation, []string{"ROTATION", "STEP", "RECORDS", "RATE", "REMAINING", "STARTED", "LAST ERROR"}, func(r *v1.Rotation, v rotationView) []string {
			return []string{plain(v.Name), v.Step, fmt.Sprintf("%d of %d", v.Done, v.Total), strconv.FormatFloat(v.Rate, 'f', 0, 64) + "/s",
				orDash(v.Remaining), stamp(at(r.GetStartTime())), plain(orDash(v.LastError))}
		})
	})
}

func (a *app) eventCmd() *cobra.Command {
	return group(&cobra.Command{Use: "event", Short: "Tell the daemon of what has happened elsewhere"}, a.eventBatchCmd(), a.eventPackagedCmd())
}

// reportEvent reports an event and says what came of it.
func (a *app) reportEvent(ctx context.Context, ev custodian.Event, kind v1.EventKind, say func(*v1.ReportEventResponse) error) error {
	if err := ev.Check(); err != nil {
		return invalid(err)
	}
	got, err := ask(ctx, a, func(ctx context.Context, cl *client.Client) (*v1.ReportEventResponse, error) {
		return cl.ReportEvent(ctx, &v1.ReportEventRequest{EventId: ev.ID, Kind: kind, Category: string(ev.Category), ContentId: ev.ContentID})
	})
	if err != nil {
		return fmt.Errorf("report event %s: %w", ev.ID, err)
	}
	if a.json {
		return a.printJSON(struct {
			KeyVersion uint32 `json:"key_version"`
			Rotated    bool   `json:"rotated"`
			Reason     string `json:"reason,omitempty"`
			MarkedKeys uint32 `json:"marked_keys"`
		}{got.GetKeyVersion(), got.GetRotated(), got.GetReason(), got.GetMarkedKeys()})
	}
	return say(got)
}

func (a *app) eventBatchCmd() *cobra.Command {
	var id string
	c := leaf(&cobra.Command{
		Use:     "new-batch CATEGORY",
		Short:   "New content is about to be packaged (packager, event source, officer)",
		Example: `  custodianctl event new-batch movies --id nightly-2026-11-22`,
	}, cobra.ExactArgs(1), func(ctx context.Context, args []string) error {
		ev := custodian.Event{ID: id, Kind: custodian.EventNewBatch, Category: custodian.CategoryName(args[0])}
		return a.reportEvent(ctx, ev, v1.EventKind_EVENT_KIND_NEW_BATCH, func(got *v1.ReportEventResponse) error {
			if !got.GetRotated() {
				return a.printf("category %s stays at key version %d: %s\n", args[0], got.GetKeyVersion(), plain(got.GetReason()))
			}
			return a.printf("category %s is at key version %d by this event\n", args[0], got.GetKeyVersion())
		})
	})
	return needEventID(c, &id)
}

func (a *app) eventPackagedCmd() *cobra.Command {
	var id, content, contentHex string
	c := leaf(&cobra.Command{
		Use:     "packaged CATEGORY",
		Short:   "A content item was packaged: its keys are in use, and are not issued again (packager, event source, officer)",
		Example: `  custodianctl event packaged movies --content film-1 --id film-1-packaged`,
	}, cobra.ExactArgs(1), func(ctx context.Context, args []string) error {
		item, err := contentID(content, contentHex)
		if err != nil {
			return invalid(err)
		}
		ev := custodian.Event{ID: id, Kind: custodian.EventPackaged, Category: custodian.CategoryName(args[0]), ContentID: item}
		return a.reportEvent(ctx, ev, v1.EventKind_EVENT_KIND_PACKAGED, func(got *v1.ReportEventResponse) error {
			return a.printf("%d keys of %s in category %s are in use from now on\n", got.GetMarkedKeys(), contentText(item), args[0])
		})
	})
	c.Flags().StringVar(&content, "content", "", "content `ID`, as text")
	c.Flags().StringVar(&contentHex, "content-hex", "", "content ID in `HEX`adecimal")
	return needEventID(c, &id)
}

func needEventID(c *cobra.Command, id *string) *cobra.Command {
	c.Flags().StringVar(id, "id", "", "names the event, `ID`; one that is reported again is the same event")
	return need(c, "id")
}
