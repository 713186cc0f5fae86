package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/client"
)

func (a *app) revocationCmd() *cobra.Command {
	return group(&cobra.Command{Use: "revocation", Short: "Viewers' sessions and issuers of licence tokens that are revoked"},
		a.revocationAddCmd(), a.revocationListCmd(), a.revocationLiftCmd())
}

// A revocationView is a revocation in JSON.
type revocationView struct {
	Name       string     `json:"name"`
	Issuer     string     `json:"issuer,omitempty"`
	Until      *time.Time `json:"until_time,omitempty"`
	Cause      string     `json:"cause"`
	Caller     string     `json:"caller"`
	CreateTime *time.Time `json:"create_time"`
}

func viewRevocation(r *v1.Revocation) revocationView {
	return revocationView{r.GetName(), r.GetIssuer(), timeOrNone(r.GetUntilTime()), r.GetCause(), r.GetCaller(), timeOrNone(r.GetCreateTime())}
}

// A session is read from a file: an ID on the command line would be in the
// history of the shell.
const sessionFlag = "session-id-file"

func (a *app) revocationAddCmd() *cobra.Command {
	var sessionFile, issuer, until, cause string
	c := leaf(&cobra.Command{
		Use:   "add",
		Short: "Release nothing more for a session, or for the licence tokens of an issuer (operator, officer)",
		Example: `  custodianctl revocation add --session-id-file session.txt --cause 'the account is shared'
  custodianctl revocation add --issuer https://playback.example --cause 'its key was stolen'`,
	}, cobra.NoArgs, func(ctx context.Context, _ []string) error {
		req := &v1.RevokeRequest{Cause: cause}
		if (sessionFile == "") == (issuer == "") {
			return invalid(errors.New("give --session-id-file or --issuer, and not both"))
		}
		req.Target = &v1.RevokeRequest_Issuer{Issuer: issuer}
		if sessionFile != "" {
			id, err := readID(sessionFlag, sessionFile, os.Stdin)
			if err != nil {
				return err
			}
			req.Target = &v1.RevokeRequest_SessionId{SessionId: id}
		}
		if until != "" {
			t, err := time.Parse(time.RFC3339, until)
			if err != nil {
				return invalid(fmt.Errorf("--until %s: must be a time such as 2026-11-22T16:00:00Z", plain(until)))
			}
			req.UntilTime = timestamppb.New(t)
		}
		if err := checkCause(cause); err != nil {
			return invalid(err)
		}
		got, err := ask(ctx, a, func(ctx context.Context, cl *client.Client) (*v1.Revocation, error) { return cl.Revoke(ctx, req) })
		if err != nil {
			return fmt.Errorf("revoke: %w", err)
		}
		if a.json {
			return a.printJSON(viewRevocation(got))
		}
		return a.printf("%s is revoked, %s\n", plain(got.GetName()), untilText(got))
	})
	f := c.Flags()
	f.StringVar(&sessionFile, sessionFlag, "", "revoke the session whose ID is in this `FILE`, - for standard input")
	f.StringVar(&issuer, "issuer", "", "revoke this `ISSUER` of licence tokens, as the daemon's config names it")
	f.StringVar(&until, "until", "", "end of a session's revocation, a `TIME` (default: when tokens of the session are over)")
	f.StringVar(&cause, "cause", "", "why, `TEXT` for the audit log")
	return need(c, "cause")
}

func checkCause(cause string) error {
	if strings.TrimSpace(cause) == "" {
		return errors.New("--cause: say why; the audit log keeps it")
	}
	return nil
}

func untilText(r *v1.Revocation) string {
	if r.GetUntilTime() == nil {
		return "until that is lifted"
	}
	return "until " + stamp(at(r.GetUntilTime()))
}

func (a *app) revocationListCmd() *cobra.Command {
	return leaf(&cobra.Command{Use: "list", Short: "List what is revoked (operator, officer, auditor)"}, cobra.NoArgs, func(ctx context.Context, _ []string) error {
		all, err := ask(ctx, a, func(ctx context.Context, cl *client.Client) ([]*v1.Revocation, error) { return cl.ListRevocations(ctx) })
		if err != nil {
			return fmt.Errorf("list revocations: %w", err)
		}
		return printList(a, "revocations", all, viewRevocation, []string{"NAME", "UNTIL", "SINCE", "BY", "CAUSE"}, func(r *v1.Revocation, _ revocationView) []string {
			return []string{plain(r.GetName()), stamp(at(r.GetUntilTime())), stamp(at(r.GetCreateTime())), plain(r.GetCaller()), plain(r.GetCause())}
		})
	})
}

func (a *app) revocationLiftCmd() *cobra.Command {
	var sessionFile, cause string
	c := leaf(&cobra.Command{
		Use:   "lift [NAME]",
		Short: "End a revocation before its time (operator, officer)",
		Example: `  custodianctl revocation lift issuer/https://playback.example --cause 'it has a new key'
  custodianctl revocation lift --session-id-file session.txt --cause 'it was another viewer'`,
	}, cobra.MaximumNArgs(1), func(ctx context.Context, args []string) error {
		if (sessionFile == "") == (len(args) == 0) {
			return invalid(errors.New("give the NAME of a revocation or --session-id-file, and not both"))
		}
		if err := checkCause(cause); err != nil {
			return invalid(err)
		}
		req := &v1.LiftRevocationRequest{Cause: cause}
		if sessionFile != "" {
			id, err := readID(sessionFlag, sessionFile, os.Stdin)
			if err != nil {
				return err
			}
			req.Target = &v1.LiftRevocationRequest_SessionId{SessionId: id}
		} else {
			req.Target = &v1.LiftRevocationRequest_Name{Name: args[0]}
		}
		_, err := ask(ctx, a, func(ctx context.Context, cl *client.Client) (struct{}, error) {
			return struct{}{}, cl.LiftRevocation(ctx, req)
		})
		if err != nil {
			return fmt.Errorf("lift: %w", err)
		}
		if a.json {
			return a.printJSON(struct{}{})
		}
		return a.printf("the revocation is lifted\n")
	})
	f := c.Flags()
	f.StringVar(&sessionFile, sessionFlag, "", "lift that of the session whose ID is in this `FILE`, - for standard input")
	f.StringVar(&cause, "cause", "", "why, `TEXT` for the audit log")
	return need(c, "cause")
}
