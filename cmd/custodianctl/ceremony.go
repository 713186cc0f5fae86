package main

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/client"
	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/checkpoint"
)

func (a *app) ceremonyCmd() *cobra.Command {
	return group(&cobra.Command{
		Use:   "ceremony",
		Short: "What the officers decide together: plans, approvals, evidence",
		Long: `A ceremony is a plan, a small YAML file that names every object it will touch.
An officer proposes it; officers approve it, each with a key and a copy of the file
of their own; one of them executes it, once; and what it leaves is a file of
evidence that verifies anywhere. docs/CEREMONY.md has a script for each kind.`,
		Example: `  custodianctl ceremony propose plan.yaml --rehearse
  custodianctl ceremony propose plan.yaml
  custodianctl ceremony approve 0123456789abcdef --plan plan.yaml --officer-key anna.key
  custodianctl ceremony execute 0123456789abcdef
  custodianctl ceremony evidence 0123456789abcdef --out evidence.json
  custodianctl ceremony verify evidence.json --trust officers.pem`,
	}, a.ceremonyProposeCmd(), a.ceremonyListCmd(), a.ceremonyShowCmd(), a.ceremonyApproveCmd(), a.ceremonyCancelCmd(), a.ceremonyExecuteCmd(),
		a.ceremonyWatchCmd(), a.ceremonyEvidenceCmd(), a.ceremonyVerifyCmd(), a.blastRadiusCmd(), a.conditionsCmd(), a.ceremonyDigestCmd(), a.ceremonySignCmd(), a.ceremonyKeyCmd(), a.ceremonyKeygenCmd())
}

// readPlan reads an officer's own copy of a plan.
func readPlan(path string) (*custodian.Plan, []byte, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, nil, err
	}
	p, err := custodian.ParsePlan(text)
	if err != nil {
		return nil, nil, invalid(fmt.Errorf("%s: %w", path, err))
	}
	return p, text, nil
}

// A ceremonyView is a ceremony in JSON.
type ceremonyView struct {
	ID            string          `json:"id"`
	Kind          string          `json:"kind"`
	State         string          `json:"state"`
	Reason        string          `json:"reason"`
	PlanDigest    hexBytes        `json:"plan_digest"`
	Plan          json.RawMessage `json:"plan"`
	Needed        uint32          `json:"approvals_needed"`
	Approvals     []string        `json:"approvals"`
	Cancellations []string        `json:"cancellations"`
	Revision      uint64          `json:"control_revision"`
	StoreID       hexBytes        `json:"store_id"`
	Nonce         hexBytes        `json:"nonce"`
	LogKey        hexBytes        `json:"log_key_sha256"`
	Expires       *time.Time      `json:"expire_time"`
	Proposer      string          `json:"proposer"`
	ProposeTime   *time.Time      `json:"propose_time"`
	ReadyTime     *time.Time      `json:"ready_time,omitempty"`
	Executor      string          `json:"executor,omitempty"`
	ExecuteTime   *time.Time      `json:"execute_time,omitempty"`
	EndTime       *time.Time      `json:"end_time,omitempty"`
	Progress      []progressView  `json:"progress,omitempty"`
}

type progressView struct {
	Name      string  `json:"name"`
	Step      string  `json:"step"`
	Done      uint64  `json:"done"`
	Total     uint64  `json:"total"`
	Rate      float64 `json:"rate"`
	Remaining string  `json:"remaining,omitempty"`
	LastError string  `json:"last_error,omitempty"`
}

func viewCeremony(x *v1.Ceremony) ceremonyView {
	ch := x.GetChallenge()
	v := ceremonyView{ID: x.GetId(), Kind: x.GetKind(), State: enum(x.GetState().String(), "CEREMONY_STATE_"), Reason: x.GetReason(),
		PlanDigest: ch.GetPlanDigest(), Plan: x.GetPlan(), Needed: x.GetApprovalsNeeded(), Approvals: officersOf(x.GetApprovals()),
		Cancellations: officersOf(x.GetCancellations()), Revision: ch.GetControlRevision(), StoreID: ch.GetStoreId(), Nonce: ch.GetNonce(), LogKey: ch.GetLogKeySha256(),
		Expires: timeOrNone(ch.GetExpireTime()), Proposer: x.GetProposer(), ProposeTime: timeOrNone(x.GetProposeTime()), ReadyTime: timeOrNone(x.GetReadyTime()),
		Executor: x.GetExecutor(), ExecuteTime: timeOrNone(x.GetExecuteTime()), EndTime: timeOrNone(x.GetEndTime())}
	for _, p := range x.GetProgress() {
		pv := progressView{Name: p.GetName(), Step: p.GetStep(), Done: p.GetDone(), Total: p.GetTotal(), Rate: p.GetRate(), LastError: p.GetLastError()}
		if d := p.GetRemaining().AsDuration(); d > 0 {
			pv.Remaining = d.Round(time.Second).String()
		}
		v.Progress = append(v.Progress, pv)
	}
	return v
}

func officersOf(all []*v1.CeremonyApproval) []string {
	names := make([]string, len(all))
	for i, o := range all {
		names[i] = o.GetOfficer()
	}
	return names
}

// next says who has to do what about a ceremony.
func (v ceremonyView) next() string {
	missing := int(v.Needed) - len(v.Approvals)
	switch {
	case v.State == "proposed" && missing > 0:
		return fmt.Sprintf("%s: custodianctl ceremony approve %s --plan FILE --officer-key FILE", number(missing, "more officer", "more officers"), v.ID)
	case v.State == "proposed" && v.ReadyTime != nil:
		return fmt.Sprintf("from %s on: custodianctl ceremony execute %s; until then any officer can stop it with ceremony cancel", stamp(*v.ReadyTime), v.ID)
	case v.State == "proposed":
		return "custodianctl ceremony execute " + v.ID
	case v.State == "executed":
		return "custodianctl ceremony watch " + v.ID
	case v.State == "done":
		return fmt.Sprintf("custodianctl ceremony evidence %s --out FILE", v.ID)
	}
	if v.State == "failed" {
		return "custodianctl audit list --action ceremony.failed"
	}
	return "-"
}

func (a *app) printCeremony(x *v1.Ceremony) error {
	v := viewCeremony(x)
	if a.json {
		return a.printJSON(v)
	}
	fields := [][2]string{{"ceremony", plain(v.ID)}, {"kind", plain(v.Kind)}, {"state", v.State}, {"reason", plain(v.Reason)}, {"plan", v.PlanDigest.String()},
		{"approvals", fmt.Sprintf("%d of %d: %s", len(v.Approvals), v.Needed, names(v.Approvals))}, {"expires", stamp(at(x.GetChallenge().GetExpireTime()))},
		{"proposed", fmt.Sprintf("%s by %s", stamp(at(x.GetProposeTime())), orDash(v.Proposer))}}
	if len(v.Cancellations) > 0 {
		fields = append(fields, [2]string{"to cancel", names(v.Cancellations)})
	}
	if v.Executor != "" {
		fields = append(fields, [2]string{"executed", fmt.Sprintf("%s by %s", stamp(at(x.GetExecuteTime())), plain(v.Executor))})
	}
	for _, p := range v.Progress {
		fields = append(fields, [2]string{"progress", p.text()})
	}
	return a.printFields(append(fields, [2]string{"next", v.next()}))
}

func (p progressView) text() string {
	t := fmt.Sprintf("%s %s", plain(p.Name), strings.ToLower(plain(p.Step)))
	if p.Total > 0 {
		const width = 20
		done := min(width, int(p.Done*width/p.Total))
		t += fmt.Sprintf(" [%s%s] %d of %d", strings.Repeat("#", done), strings.Repeat(".", width-done), p.Done, p.Total)
	}
	if p.Rate > 0 {
		t += fmt.Sprintf(", %.0f a second", p.Rate)
	}
	if p.Remaining != "" {
		t += ", " + p.Remaining + " left"
	}
	if p.LastError != "" {
		t += "; it is tried again after: " + plain(p.LastError)
	}
	return t
}

func (a *app) ceremonyProposeCmd() *cobra.Command {
	var rehearse bool
	c := leaf(&cobra.Command{Use: "propose PLAN", Short: "Propose a plan, or rehearse it (officer)"}, cobra.ExactArgs(1), func(ctx context.Context, args []string) error {
		p, text, err := readPlan(args[0])
		if err != nil {
			return err
		}
		got, err := ask(ctx, a, func(ctx context.Context, cl *client.Client) (*v1.ProposeCeremonyResponse, error) {
			return cl.ProposeCeremony(ctx, &v1.ProposeCeremonyRequest{Plan: text, ValidateOnly: rehearse})
		})
		if err != nil {
			return fmt.Errorf("propose %s: %w", args[0], err)
		}
		r := got.GetRehearsal()
		if digest := p.Digest(); hex.EncodeToString(digest[:]) != hex.EncodeToString(r.GetPlanDigest()) {
			return damaged(fmt.Errorf("propose %s: the daemon answers the digest %x, and the file has %x", args[0], r.GetPlanDigest(), digest))
		}
		return a.printRehearsal(r, got.GetCeremony())
	})
	c.Flags().BoolVar(&rehearse, "rehearse", false, "run every check and say what would change; propose nothing")
	return c
}

func (a *app) printRehearsal(r *v1.CeremonyRehearsal, x *v1.Ceremony) error {
	if a.json {
		v := struct {
			Kind        string        `json:"kind"`
			PlanDigest  hexBytes      `json:"plan_digest"`
			Needed      uint32        `json:"approvals_needed"`
			Changes     []string      `json:"changes"`
			ContentKeys uint64        `json:"content_keys"`
			Duration    string        `json:"duration"`
			Ceremony    *ceremonyView `json:"ceremony,omitempty"`
		}{r.GetKind(), r.GetPlanDigest(), r.GetApprovalsNeeded(), r.GetChanges(), r.GetContentKeys(), r.GetDuration().AsDuration().String(), nil}
		if x != nil {
			cv := viewCeremony(x)
			v.Ceremony = &cv
		}
		return a.printJSON(v)
	}
	fields := [][2]string{{"kind", plain(r.GetKind())}, {"plan", hexBytes(r.GetPlanDigest()).String()}, {"approvals", fmt.Sprintf("%d are needed", r.GetApprovalsNeeded())}}
	for _, change := range r.GetChanges() {
		fields = append(fields, [2]string{"would", plain(change)})
	}
	if n := r.GetContentKeys(); n > 0 {
		fields = append(fields, [2]string{"re-wraps", fmt.Sprintf("%s, in about %s", number(n, "content key", "content keys"), r.GetDuration().AsDuration().Round(time.Second))})
	}
	if x == nil {
		return a.printFields(append(fields, [2]string{"rehearsed", "every check is good; nothing was changed"}))
	}
	if err := a.printFields(fields); err != nil {
		return err
	}
	return a.printCeremony(x)
}

func (a *app) ceremonyListCmd() *cobra.Command {
	return leaf(&cobra.Command{Use: "list", Short: "List the ceremonies (officer, operator, auditor)"}, cobra.NoArgs, func(ctx context.Context, _ []string) error {
		all, err := ask(ctx, a, func(ctx context.Context, cl *client.Client) ([]*v1.Ceremony, error) { return cl.ListCeremonies(ctx) })
		if err != nil {
			return fmt.Errorf("list ceremonies: %w", err)
		}
		return printList(a, "ceremonies", all, viewCeremony, []string{"CEREMONY", "KIND", "STATE", "APPROVALS", "EXPIRES", "REASON"}, func(x *v1.Ceremony, v ceremonyView) []string {
			return []string{plain(v.ID), plain(v.Kind), v.State, fmt.Sprintf("%d/%d", len(v.Approvals), v.Needed), stamp(at(x.GetChallenge().GetExpireTime())), short(v.Reason, 40)}
		})
	})
}

func (a *app) ceremonyShowCmd() *cobra.Command {
	return leaf(&cobra.Command{Use: "show ID", Short: "Show a ceremony and what is to do next (officer, operator, auditor)"}, cobra.ExactArgs(1), func(ctx context.Context, args []string) error {
		x, err := ask(ctx, a, func(ctx context.Context, cl *client.Client) (*v1.Ceremony, error) {
			return cl.GetCeremony(ctx, args[0])
		})
		if err != nil {
			return fmt.Errorf("ceremony %s: %w", plain(args[0]), err)
		}
		return a.printCeremony(x)
	})
}

func (a *app) ceremonyApproveCmd() *cobra.Command {
	return a.signedCmd("approve ID", "Approve a plan with your own key and your own copy of the file (officer)", custodian.ActApprove,
		func(ctx context.Context, cl *client.Client, id string, s *v1.OfficerSignature) (*v1.Ceremony, error) {
			return cl.ApproveCeremony(ctx, &v1.ApproveCeremonyRequest{Id: id, Signature: s})
		})
}

func (a *app) ceremonyCancelCmd() *cobra.Command {
	return a.signedCmd("cancel ID", "Say that a ceremony should not be; it takes as many officers as to approve it (officer)", custodian.ActCancel,
		func(ctx context.Context, cl *client.Client, id string, s *v1.OfficerSignature) (*v1.Ceremony, error) {
			return cl.CancelCeremony(ctx, &v1.CancelCeremonyRequest{Id: id, Signature: s})
		})
}

// signedCmd is a command in which an officer signs. The digest is that of the
// officer's own file, whatever the daemon says the plan is.
func (a *app) signedCmd(use, short string, act custodian.Act, send func(context.Context, *client.Client, string, *v1.OfficerSignature) (*v1.Ceremony, error)) *cobra.Command {
	var k officerKey
	var plan string
	c := leaf(&cobra.Command{Use: use, Short: short}, cobra.ExactArgs(1), func(ctx context.Context, args []string) (err error) {
		p, _, err := readPlan(plan)
		if err != nil {
			return err
		}
		key, public, done, err := k.open()
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, done()) }()
		x, err := ask(ctx, a, func(ctx context.Context, cl *client.Client) (*v1.Ceremony, error) {
			x, err := cl.GetCeremony(ctx, args[0])
			if err != nil {
				return nil, err
			}
			ch, err := challengeOf(x, p)
			if err != nil {
				return nil, err
			}
			signature, err := ch.Sign(act, key)
			if err != nil {
				return nil, fmt.Errorf("sign: %w", err)
			}
			return send(ctx, cl, args[0], &v1.OfficerSignature{Key: public, Signature: signature, Challenge: &v1.CeremonyChallenge{
				PlanDigest: ch.PlanDigest[:], StoreId: ch.StoreID[:], ControlRevision: ch.Revision, ExpireTime: timestamppb.New(ch.Expires), Nonce: ch.Nonce[:], LogKeySha256: ch.LogKey[:]}})
		})
		if err != nil {
			return fmt.Errorf("%s %s: %w", strings.Fields(use)[0], plain(args[0]), err)
		}
		return a.printCeremony(x)
	})
	k.flags(c)
	c.Flags().StringVar(&plan, "plan", "", "your own copy of the plan, `FILE`")
	return need(c, "plan")
}

// challengeOf is what an officer signs: the digest and the expiry are those of
// the officer's own copy, the rest is the daemon's word for which ceremony it
// is. A daemon that shows another plan is told from a mistake here already.
func challengeOf(x *v1.Ceremony, p *custodian.Plan) (custodian.Challenge, error) {
	theirs := x.GetChallenge()
	ch := custodian.Challenge{PlanDigest: p.Digest(), Expires: p.ExpireTime(), Revision: theirs.GetControlRevision()}
	if hex.EncodeToString(theirs.GetPlanDigest()) != hex.EncodeToString(ch.PlanDigest[:]) {
		return ch, &failure{reason: "APPROVAL", code: codes.PermissionDenied, err: fmt.Errorf("your copy has the digest %x, and the plan of this ceremony %x: it is another plan; nothing was signed", ch.PlanDigest, theirs.GetPlanDigest())}
	}
	for _, f := range []struct{ from, to []byte }{{theirs.GetStoreId(), ch.StoreID[:]}, {theirs.GetNonce(), ch.Nonce[:]}, {theirs.GetLogKeySha256(), ch.LogKey[:]}} {
		if len(f.from) != len(f.to) {
			return ch, damaged(fmt.Errorf("the daemon's challenge has a field of %d bytes where %d belong; nothing was signed", len(f.from), len(f.to)))
		}
		copy(f.to, f.from)
	}
	return ch, nil
}

func (a *app) ceremonyExecuteCmd() *cobra.Command {
	return leaf(&cobra.Command{Use: "execute ID", Short: "Do what an approved plan says, once (officer)"}, cobra.ExactArgs(1), func(ctx context.Context, args []string) error {
		x, err := ask(ctx, a, func(ctx context.Context, cl *client.Client) (*v1.Ceremony, error) {
			return cl.ExecuteCeremony(ctx, &v1.ExecuteCeremonyRequest{Id: args[0]})
		})
		if err != nil {
			return fmt.Errorf("execute %s: %w", plain(args[0]), err)
		}
		return a.printCeremony(x)
	})
}

func (a *app) ceremonyWatchCmd() *cobra.Command {
	return leaf(&cobra.Command{
		Use:   "watch ID",
		Short: "Follow a ceremony until it is over (officer, operator, auditor)",
		Long: `Follow a ceremony until it is over: done, cancelled or expired. A line is printed
when something has changed. --timeout is for each look at it.`,
	}, cobra.ExactArgs(1), func(ctx context.Context, args []string) error {
		cl, err := a.connect(ctx)
		if err != nil {
			return err
		}
		defer cl.Close()
		for last := ""; ; {
			x, err := a.lookAt(ctx, cl, args[0])
			if err != nil {
				return fmt.Errorf("watch %s: %w", plain(args[0]), err)
			}
			v := viewCeremony(x)
			if over := v.State == "done" || v.State == "cancelled" || v.State == "expired" || v.State == "failed"; over {
				return a.printCeremony(x)
			}
			line := fmt.Sprintf("%s, %d of %d approvals", v.State, len(v.Approvals), v.Needed)
			for _, p := range v.Progress {
				line += "; " + p.text()
			}
			if line != last && !a.json {
				if err := a.printf("%s\n", line); err != nil {
					return err
				}
				last = line
			}
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(time.Second):
			}
		}
	})
}

func (a *app) lookAt(ctx context.Context, cl *client.Client, id string) (*v1.Ceremony, error) {
	ctx, cancel := a.bounded(ctx)
	defer cancel()
	return cl.GetCeremony(ctx, id)
}

func (a *app) ceremonyEvidenceCmd() *cobra.Command {
	var out string
	c := leaf(&cobra.Command{Use: "evidence ID", Short: "Write the evidence of a ceremony that is done to a file (officer, operator, auditor)"}, cobra.ExactArgs(1), func(ctx context.Context, args []string) error {
		b, err := ask(ctx, a, func(ctx context.Context, cl *client.Client) ([]byte, error) { return cl.GetEvidence(ctx, args[0]) })
		if err != nil {
			return fmt.Errorf("evidence of %s: %w", plain(args[0]), err)
		}
		if err := writeNew(out, b); err != nil {
			return fmt.Errorf("write %s: %w", out, err)
		}
		if a.json {
			return a.printJSON(struct {
				File  string `json:"file"`
				Bytes int    `json:"bytes"`
			}{out, len(b)})
		}
		return a.printf("evidence of %s is in %s; custodianctl ceremony verify %s --trust FILE checks it anywhere\n", plain(args[0]), out, out)
	})
	c.Flags().StringVar(&out, "out", "", "`FILE` to write")
	return need(c, "out")
}

func (a *app) ceremonyVerifyCmd() *cobra.Command {
	var trust, auditKey string
	c := leaf(&cobra.Command{
		Use:   "verify FILE",
		Short: "Check the evidence of a ceremony, without the daemon",
		Long: `Check the evidence of a ceremony on a machine that has never seen the daemon. The
officers' signatures vouch for the plan and for the key that signs the audit log,
that key for the entries of the log, and the last entry for everything else in the
file. --trust is a file with the public keys of the officers of that time, in PEM
(custodianctl ceremony key). The evidence of a genesis needs --audit-key, too: the
officers signed before that key was made.`,
	}, cobra.ExactArgs(1), func(_ context.Context, args []string) error {
		keys, err := readOfficers(trust)
		if err != nil {
			return err
		}
		t := custodian.Trust{Officers: keys}
		if auditKey != "" {
			raw, err := os.ReadFile(auditKey)
			if err == nil {
				t.AuditKey, err = checkpoint.ParseKey(raw)
			}
			if err != nil {
				return invalid(fmt.Errorf("--audit-key %s: %w", auditKey, err))
			}
		}
		text, err := os.ReadFile(args[0])
		if err != nil {
			return err
		}
		e, err := custodian.VerifyEvidence(text, t)
		if err != nil {
			return damaged(fmt.Errorf("%s: %w", args[0], err))
		}
		return a.printEvidence(args[0], e)
	})
	f := c.Flags()
	f.StringVar(&trust, "trust", "", "public keys of the officers, PEM `FILE`")
	f.StringVar(&auditKey, "audit-key", "", "public key of the audit log, PEM `FILE`, if you have it")
	return need(c, "trust")
}

func (a *app) printEvidence(path string, e custodian.Evidence) error {
	officers := make([]string, len(e.Approvals))
	for i, o := range e.Approvals {
		officers[i] = o.Officer
	}
	if a.json {
		return a.printJSON(struct {
			File       string    `json:"file"`
			Ceremony   string    `json:"ceremony"`
			Kind       string    `json:"kind"`
			PlanDigest string    `json:"plan_digest"`
			StoreID    string    `json:"store_id"`
			Approvals  []string  `json:"approvals"`
			Needed     uint32    `json:"approvals_needed"`
			ExecTime   time.Time `json:"execute_time"`
			EndTime    time.Time `json:"end_time"`
		}{path, e.ID, string(e.Plan.Kind), e.PlanDigest, e.StoreID, officers, e.Needed, e.ExecTime, e.EndTime})
	}
	return a.printFields([][2]string{{"verified", path}, {"ceremony", e.ID}, {"kind", string(e.Plan.Kind)}, {"reason", plain(e.Plan.Reason)}, {"plan", e.PlanDigest}, {"store", e.StoreID},
		{"approvals", fmt.Sprintf("%d of %d: %s", len(officers), e.Needed, names(officers))}, {"executed", fmt.Sprintf("%s by %s", stamp(e.ExecTime), plain(e.Executor))},
		{"done", stamp(e.EndTime)}, {"log", fmt.Sprintf("%d entries, proved to a signed checkpoint", len(e.Log.Entries))}})
}

func (a *app) ceremonyDigestCmd() *cobra.Command {
	return leaf(&cobra.Command{Use: "digest PLAN", Short: "Check a plan's form and print its digest, without the daemon"}, cobra.ExactArgs(1), func(_ context.Context, args []string) error {
		p, _, err := readPlan(args[0])
		if err != nil {
			return err
		}
		digest := p.Digest()
		if a.json {
			return a.printJSON(struct {
				Kind   string          `json:"kind"`
				Digest hexBytes        `json:"plan_digest"`
				Plan   json.RawMessage `json:"plan"`
			}{string(p.Kind), digest[:], p.Canonical()})
		}
		return a.printf("%x  %s plan, expires %s\n", digest, p.Kind, p.Expires)
	})
}

func (a *app) conditionsCmd() *cobra.Command {
	return leaf(&cobra.Command{
		Use:   "conditions",
		Short: "Show which conditions are in force, and which the officers have signed (officer, operator, auditor)",
		Long: `Show the digest of the conditions that are in force, and of those that the officers
have signed: what decides beside the grants, which are rules, licence tokens, sealing
and budgets. The digest of a configuration file is what custodiand -check-config
prints; a plan names it under conditions.`,
	}, cobra.NoArgs, func(ctx context.Context, _ []string) error {
		s, err := ask(ctx, a, func(ctx context.Context, cl *client.Client) (*v1.Status, error) { return cl.Status(ctx) })
		if err != nil {
			return fmt.Errorf("get conditions: %w", err)
		}
		inForce, signed := s.GetConditions(), s.GetSignedConditions()
		if a.json {
			return a.printJSON(struct {
				InForce string `json:"in_force"`
				Signed  string `json:"signed"`
			}{inForce, signed})
		}
		var fields [][2]string
		if signed != "" && signed != inForce {
			fields = append(fields, [2]string{"WARNING", "what is in force is not what the officers have signed: load the configuration that has it"})
		}
		said := plain(signed)
		if signed == "" {
			said = "none: the configuration file decides"
		}
		return a.printFields(append(fields, [2]string{"in force", orDash(inForce)}, [2]string{"signed", said}))
	})
}

func (a *app) ceremonySignCmd() *cobra.Command {
	var k officerKey
	var out string
	c := leaf(&cobra.Command{
		Use:   "sign PLAN",
		Short: "Approve a plan of genesis or restore, for which there is no daemon (officer)",
		Example: `  custodianctl ceremony sign genesis.yaml --officer-key anna.key --out anna.sig
  custodiand init -config FILE -plan genesis.yaml -approval anna.sig -approval ben.sig -approval cleo.sig`,
	}, cobra.ExactArgs(1), func(_ context.Context, args []string) (err error) {
		p, _, err := readPlan(args[0])
		if err != nil {
			return err
		}
		ch, err := p.OfflineChallenge()
		if err != nil {
			return invalid(fmt.Errorf("%s: %w", args[0], err))
		}
		key, public, done, err := k.open()
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, done()) }()
		approval := custodian.Approval{Key: public, Time: a.now().UTC().Truncate(time.Second)}
		for _, o := range p.Officers {
			if o.Key == public {
				approval.Officer = o.Name
			}
		}
		if approval.Officer == "" && p.Kind == custodian.KindGenesis {
			return invalid(fmt.Errorf("%s: your key is not that of an officer in the plan; nothing was signed", args[0]))
		}
		if approval.Signature, err = ch.Sign(custodian.ActApprove, key); err != nil {
			return fmt.Errorf("sign: %w", err)
		}
		b, err := json.MarshalIndent(approval, "", "  ")
		if err != nil {
			return err
		}
		if err := writeNew(out, append(b, '\n')); err != nil {
			return fmt.Errorf("write %s: %w", out, err)
		}
		if approval.Officer == "" { // a restore's plan names nobody: its backup does
			approval.Officer = "this key"
		}
		return a.printf("%s has signed the %s plan %x\n", plain(approval.Officer), p.Kind, p.Digest())
	})
	k.flags(c)
	c.Flags().StringVar(&out, "out", "", "`FILE` to write")
	return need(c, "out")
}
