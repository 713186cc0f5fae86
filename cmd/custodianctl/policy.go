package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"
	"google.golang.org/grpc/codes"

	"github.com/keycustody/custodian/custodian"
)

func (a *app) policyCmd() *cobra.Command {
	return group(&cobra.Command{Use: "policy", Short: "Check and try rules, without the daemon"}, a.policyCheckCmd(), a.policyExplainCmd(), a.policySchemaCmd())
}

func readRules(names []string) ([]custodian.RulesFile, error) {
	var files []custodian.RulesFile
	for _, name := range names {
		text, err := os.ReadFile(name)
		if err != nil {
			return nil, fmt.Errorf("rules: %w", err)
		}
		files = append(files, custodian.RulesFile{Name: name, Text: text})
	}
	return files, nil
}

func (a *app) policyCheckCmd() *cobra.Command {
	return leaf(&cobra.Command{
		Use:               "check FILE...",
		Short:             "Say whether the daemon would take these rules",
		ValidArgsFunction: cobra.FixedCompletions(nil, cobra.ShellCompDirectiveDefault),
	}, cobra.MinimumNArgs(1), func(_ context.Context, args []string) error {
		files, err := readRules(args)
		if err != nil {
			return err
		}
		if _, err := new(custodian.Policy).WithRules(files); err != nil {
			return invalid(err)
		}
		if a.json {
			return a.printJSON(struct {
				Good bool `json:"good"`
			}{true})
		}
		return a.printf("good\n")
	})
}

func (a *app) policySchemaCmd() *cobra.Command {
	return leaf(&cobra.Command{Use: "schema", Short: "Print the Cedar schema that rules are checked against"}, cobra.NoArgs, func(context.Context, []string) error {
		return a.printf("%s", custodian.RulesSchema)
	})
}

// A rulesQuestion is the file of policy explain.
type rulesQuestion struct {
	Caller    string      `yaml:"caller"`
	Action    string      `yaml:"action"` // release where it is not there
	Category  string      `yaml:"category"`
	ContentID string      `yaml:"content_id"`
	TrackType string      `yaml:"track_type"`
	Scheme    string      `yaml:"scheme"`
	KID       string      `yaml:"kid"`
	Created   time.Time   `yaml:"create_time"`
	Now       time.Time   `yaml:"now"` // now where it is not there
	Token     *rulesToken `yaml:"token"`
	Asserted  rulesViewer `yaml:"asserted"`
}

type rulesToken struct {
	Issuer  string      `yaml:"issuer"`
	Session string      `yaml:"session"`
	Viewer  rulesViewer `yaml:"viewer"`
}

type rulesViewer struct {
	DRMSystem     string `yaml:"drm_system"`
	SecurityLevel string `yaml:"security_level"`
	HDCP          string `yaml:"hdcp"`
	Region        string `yaml:"region"`
	LicenceType   string `yaml:"licence_type"`
}

func (q rulesQuestion) domain(now time.Time) (custodian.RulesQuestion, error) {
	out := custodian.RulesQuestion{Caller: q.Caller, Action: custodian.Action(q.Action), Now: q.Now, Asserted: custodian.Viewer(q.Asserted),
		Key: custodian.ContentKey{CreateTime: q.Created, NaturalKey: custodian.NaturalKey{Category: custodian.CategoryName(q.Category),
			ContentID: custodian.ContentID(q.ContentID), TrackType: custodian.TrackType(q.TrackType), Scheme: custodian.Scheme(q.Scheme), Generation: 1}}}
	if q.Action == "" {
		out.Action = custodian.ActionRelease
	}
	if q.Now.IsZero() {
		out.Now = now
	}
	if q.Token != nil {
		out.Token = &custodian.TokenClaims{Issuer: q.Token.Issuer, Session: q.Token.Session, Viewer: custodian.Viewer(q.Token.Viewer)}
	}
	if q.KID == "" {
		return out, nil
	}
	var err error
	out.Key.KID, err = custodian.ParseKID(q.KID)
	return out, err
}

func (a *app) policyExplainCmd() *cobra.Command {
	var request string
	c := leaf(&cobra.Command{
		Use:   "explain FILE...",
		Short: "Say which rules forbid a release or an issue that grants permit",
		Long: `Say which rules forbid a release or an issue that grants permit. The question is a
YAML file; what is left out was not said:

  caller: callback.drm-partner.example
  action: release             # or issue, reissue
  category: movies
  content_id: film-1
  track_type: UHD1
  scheme: cenc
  now: 2027-01-01T00:00:00Z
  token:                      # without it, none is shown
    issuer: https://playback.example
    viewer: {security_level: L1, region: SE}
  asserted: {drm_system: widevine}

Exit code 0: no rule forbids it. 3: one does, or could not be evaluated.`,
		Example:           `  custodianctl policy explain rules.cedar --request question.yaml`,
		ValidArgsFunction: cobra.FixedCompletions(nil, cobra.ShellCompDirectiveDefault),
	}, cobra.MinimumNArgs(1), func(_ context.Context, args []string) error {
		files, err := readRules(args)
		if err != nil {
			return err
		}
		raw, err := os.ReadFile(request)
		if err != nil {
			return fmt.Errorf("question: %w", err)
		}
		var q rulesQuestion
		d := yaml.NewDecoder(bytes.NewReader(raw))
		d.KnownFields(true)
		if err := d.Decode(&q); err != nil {
			return invalid(fmt.Errorf("question %s: %w", request, err))
		}
		question, err := q.domain(a.now())
		if err != nil {
			return invalid(fmt.Errorf("question %s: %w", request, err))
		}
		against, err := custodian.TryRules(files, question)
		if err != nil {
			return invalid(err)
		}
		if len(against) > 0 {
			return &failure{reason: "DENIED", code: codes.PermissionDenied, err: fmt.Errorf("forbidden by %s", strings.Join(against, ", "))}
		}
		if a.json {
			return a.printJSON(struct {
				Forbidden bool `json:"forbidden"`
			}{false})
		}
		return a.printf("no rule forbids it; whether a grant permits it, the daemon's configuration says\n")
	})
	c.Flags().StringVar(&request, "request", "", "YAML `FILE` with the question")
	return need(c, "request")
}
