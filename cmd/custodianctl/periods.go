package main

import (
	"context"
	"fmt"
	"strconv"

	"github.com/spf13/cobra"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/client"
	"github.com/keycustody/custodian/custodian"
)

// A periodView is a crypto period in JSON.
type periodView struct {
	KID    hexKID  `json:"kid"`
	Period *uint32 `json:"period,omitempty"`
	Start  string  `json:"start_time,omitempty"`
	End    string  `json:"end_time,omitempty"`
}

func (a *app) keysPeriodsCmd() *cobra.Command {
	var limit uint32
	var tokenFile string
	cmd := leaf(&cobra.Command{Use: "periods KID", Short: "List the crypto periods from a key's on, with their KIDs (DRM provider)"}, cobra.ExactArgs(1), func(ctx context.Context, args []string) error {
		kid, err := custodian.ParseKID(args[0])
		if err != nil {
			return invalid(err)
		}
		req := &v1.ListKeyPeriodsRequest{Kid: kid[:], Limit: limit}
		if req.LicenceToken, err = readToken(tokenFile); err != nil {
			return invalid(err)
		}
		resp, err := ask(ctx, a, func(ctx context.Context, cl *client.Client) (*v1.ListKeyPeriodsResponse, error) {
			return cl.ListKeyPeriods(ctx, req)
		})
		if err != nil {
			return fmt.Errorf("list periods of %s: %w", kid, err)
		}
		views, rows := []periodView{}, [][]string{}
		for _, p := range resp.GetPeriods() {
			v, row := periodView{KID: p.GetKid()}, []string{hexKID(p.GetKid()).String(), "-", "-", "-"}
			if period := p.GetPeriod(); period != nil {
				v.Period, row[1] = &period.Index, strconv.FormatUint(uint64(period.GetIndex()), 10)
				if period.GetStartTime() != nil && period.GetEndTime() != nil {
					v.Start, v.End = stamp(at(period.GetStartTime())), stamp(at(period.GetEndTime()))
					row[2], row[3] = v.Start, v.End
				}
			}
			views, rows = append(views, v), append(rows, row)
		}
		if a.json {
			return a.printJSON(map[string]any{"periods": views})
		}
		return a.printTable([]string{"KID", "PERIOD", "START", "END"}, rows)
	})
	cmd.Flags().Uint32Var(&limit, "limit", 0, "periods to list at most, 1 to 64; 0: 64")
	cmd.Flags().StringVar(&tokenFile, "token-file", "", "`FILE` with a licence token for the key")
	return cmd
}
