package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/audit"
)

func (a *app) auditCmd() *cobra.Command {
	return group(&cobra.Command{
		Use:   "audit",
		Short: "Check and read an audit log, without the daemon",
		Long: `Check and read an audit log from its files: on the daemon's machine while it runs,
or a copy anywhere.`,
	}, a.auditVerifyCmd(), a.auditListCmd())
}

// A reportView is a verified log in JSON.
type reportView struct {
	LogID   hexBytes   `json:"log_id"`
	Entries uint64     `json:"entries"`
	Batches uint64     `json:"batches"`
	Root    hexBytes   `json:"root"`
	First   *time.Time `json:"first_time,omitempty"`
	Last    *time.Time `json:"last_time,omitempty"`
	Bytes   int64      `json:"bytes"`
	Torn    int64      `json:"torn_bytes"`
}

func (a *app) auditVerifyCmd() *cobra.Command {
	var dir string
	c := leaf(&cobra.Command{
		Use:   "verify",
		Short: "Check every byte and every hash of a log; exit code 7 if it does not verify",
		Long: `Check every byte and every hash of an audit log, and print its Merkle root
(RFC 6962).

A log cannot show by itself that its end was cut off. Keep the number of entries
and the root elsewhere, and see that the number never falls.`,
	}, cobra.NoArgs, func(ctx context.Context, _ []string) error {
		r, err := audit.Verify(ctx, dir, audit.VerifyOptions{Progress: progressOn(a.err)})
		if err != nil {
			return fmt.Errorf("verify: %w", err)
		}
		if a.json {
			v := reportView{LogID: r.ID[:], Entries: r.Entries, Batches: r.Batches, Root: r.Root[:], Bytes: r.Bytes, Torn: r.Torn}
			if r.Entries > 0 {
				v.First, v.Last = &r.First, &r.Last
			}
			return a.printJSON(v)
		}
		fields := [][2]string{
			{"verified", dir},
			{"log id", hexBytes(r.ID[:]).String()},
			{"entries", fmt.Sprintf("%d, in %s, %s", r.Entries, number(r.Batches, "batch", "batches"), bytesText(r.Bytes))},
			{"root", hexBytes(r.Root[:]).String()},
			{"from", stamp(r.First)},
			{"to", stamp(r.Last)},
		}
		if r.Torn > 0 {
			fields = append(fields, [2]string{"note", fmt.Sprintf("%s follow the last whole batch: one that is being written, or that a crash cut off; nobody was answered on it", number(r.Torn, "byte", "bytes"))})
		}
		return a.printFields(fields)
	})
	dirFlag(c, &dir)
	return c
}

func dirFlag(c *cobra.Command, dir *string) {
	c.Flags().StringVar(dir, "dir", "", "`DIR`ectory of the log: audit in the daemon's data_dir")
	need(c, "dir")
}

// progressOn shows progress where w is a terminal, four times a second.
func progressOn(w io.Writer) func(done, total int64) {
	f, ok := w.(*os.File)
	if !ok {
		return nil
	}
	if info, err := f.Stat(); err != nil || info.Mode()&os.ModeCharDevice == 0 {
		return nil
	}
	var last time.Time
	return func(done, total int64) {
		if done < total && time.Since(last) < time.Second/4 {
			return
		}
		last = time.Now()
		fmt.Fprintf(w, "\rverifying: %d%%", 100*done/max(total, 1))
		if done >= total {
			fmt.Fprint(w, "\r\x1b[K")
		}
	}
}

// A filter picks entries.
type filter struct {
	kid, caller, action, outcome string
	limit                        int

	wantKID []byte
}

func (f *filter) check() error {
	if f.kid != "" {
		kid, err := custodian.ParseKID(f.kid)
		if err != nil {
			return err
		}
		f.wantKID = kid[:]
	}
	if f.limit < 0 {
		return fmt.Errorf("--limit %d: must be 0 or more", f.limit)
	}
	switch f.outcome {
	case "", audit.Allowed.String(), audit.Denied.String(), audit.Failed.String():
		return nil
	}
	return fmt.Errorf("--outcome %s: must be allowed, denied or failed", plain(f.outcome))
}

func (f *filter) wants(e *audit.Entry) bool {
	return (f.wantKID == nil || bytes.Equal(e.KID, f.wantKID)) && (f.caller == "" || e.Caller == f.caller) &&
		(f.action == "" || e.Action == f.action) && (f.outcome == "" || e.Outcome.String() == f.outcome)
}

func (a *app) auditListCmd() *cobra.Command {
	var dir string
	var f filter
	c := leaf(&cobra.Command{
		Use:   "list",
		Short: "Print the newest entries of a log, oldest first",
		Long: `Print the newest entries of an audit log, oldest first; with --json one object a
line. What the log says is not checked: custodianctl audit verify does that.`,
		Example: `  custodianctl audit list --dir /var/lib/custodian/audit --action release --limit 0 --json`,
	}, cobra.NoArgs, func(ctx context.Context, _ []string) error {
		if err := f.check(); err != nil {
			return invalid(err)
		}
		entries, err := newest(ctx, dir, &f)
		if err != nil {
			return fmt.Errorf("read: %w", err)
		}
		if a.json {
			enc := json.NewEncoder(a.out)
			enc.SetEscapeHTML(false)
			for _, e := range entries {
				if err := enc.Encode(viewEntry(e)); err != nil {
					return err
				}
			}
			return nil
		}
		rows := make([][]string, 0, len(entries))
		for _, e := range entries {
			rows = append(rows, []string{strconv.FormatUint(e.Index, 10), stamp(e.Time), outcome(e), plain(e.Action), orDash(e.Caller), about(e)})
		}
		return a.printTable([]string{"INDEX", "TIME", "OUTCOME", "ACTION", "CALLER", "ABOUT"}, rows)
	})
	dirFlag(c, &dir)
	fl := c.Flags()
	fl.StringVar(&f.kid, "kid", "", "only entries about this `KID`")
	fl.StringVar(&f.caller, "caller", "", "only entries of this caller `NAME`")
	fl.StringVar(&f.action, "action", "", "only this `ACTION`: issue, release, category.create and so on")
	fl.StringVar(&f.outcome, "outcome", "", "only this `OUTCOME`: allowed, denied or failed")
	fl.IntVar(&f.limit, "limit", 100, "the newest `N` of them, 0 for all")
	completeWords(c, "outcome", "allowed", "denied", "failed")
	completeWords(c, "action", "issue", "reissue", "release", "category.create", "category.mode", "backup")
	return c
}

// newest returns the last entries that f wants, in the order of the log.
func newest(ctx context.Context, dir string, f *filter) ([]*audit.Entry, error) {
	var kept []*audit.Entry
	err := audit.Read(dir, 0, func(e *audit.Entry) error {
		if !f.wants(e) {
			return ctx.Err()
		}
		kept = append(kept, e)
		// Cut now and then, so that a long log does not fill the memory.
		if f.limit > 0 && len(kept) >= 2*f.limit {
			kept = append(kept[:0:0], kept[len(kept)-f.limit:]...)
		}
		return ctx.Err()
	})
	if f.limit > 0 && len(kept) > f.limit {
		kept = kept[len(kept)-f.limit:]
	}
	return kept, err
}

func outcome(e *audit.Entry) string {
	s := e.Outcome.String()
	if e.Count > 1 {
		s += fmt.Sprintf(" %d times", e.Count)
	}
	return s
}

// about says in one cell what an entry is about.
func about(e *audit.Entry) string {
	var parts []string
	if e.Reason != "" {
		parts = append(parts, plain(e.Reason))
	}
	if len(e.KID) > 0 {
		parts = append(parts, "kid "+hexKID(e.KID).String())
	}
	if e.Category != "" {
		what := plain(e.Category)
		if len(e.ContentID) > 0 {
			what += " " + short(contentText(e.ContentID), 40)
		}
		if e.TrackType != "" {
			what += " " + plain(e.TrackType)
		}
		if e.Scheme != "" {
			what += " " + plain(e.Scheme)
		}
		if e.HasPeriod {
			what += fmt.Sprintf(" period %d", e.Period)
		}
		parts = append(parts, what)
	}
	if e.KeyVersion != "" {
		parts = append(parts, "key "+plain(e.KeyVersion))
	}
	if e.Detail != "" {
		parts = append(parts, plain(e.Detail))
	}
	return orDash(strings.Join(parts, "; "))
}

// An entryView is an entry in JSON.
type entryView struct {
	Index           uint64    `json:"index"`
	Time            time.Time `json:"time"`
	Action          string    `json:"action"`
	Outcome         string    `json:"outcome"`
	Reason          string    `json:"reason,omitempty"`
	Caller          string    `json:"caller,omitempty"`
	Role            string    `json:"role,omitempty"`
	RequestID       string    `json:"request_id,omitempty"`
	Category        string    `json:"category,omitempty"`
	ContentID       string    `json:"content_id,omitempty"`
	ContentIDHex    hexBytes  `json:"content_id_hex,omitempty"`
	TrackType       string    `json:"track_type,omitempty"`
	Scheme          string    `json:"scheme,omitempty"`
	Period          *uint32   `json:"period,omitempty"`
	Generation      uint32    `json:"generation,omitempty"`
	KID             hexKID    `json:"kid,omitempty"`
	KeyVersion      string    `json:"key_version,omitempty"`
	ControlRevision uint64    `json:"control_revision,omitempty"`
	ControlDigest   hexBytes  `json:"control_digest,omitempty"`
	StoreSequence   uint64    `json:"store_sequence,omitempty"`
	Count           uint64    `json:"count,omitempty"`
	Detail          string    `json:"detail,omitempty"`
	Salt            hexBytes  `json:"salt"`
}

func viewEntry(e *audit.Entry) entryView {
	v := entryView{
		Index: e.Index, Time: e.Time.UTC(), Action: e.Action, Outcome: e.Outcome.String(), Reason: e.Reason, Caller: e.Caller, Role: e.Role,
		RequestID: e.RequestID, Category: e.Category, ContentID: readable(e.ContentID), ContentIDHex: e.ContentID, TrackType: e.TrackType,
		Scheme: e.Scheme, Generation: e.Generation, KID: e.KID, KeyVersion: e.KeyVersion, ControlRevision: e.ControlRevision,
		ControlDigest: e.ControlDigest, StoreSequence: e.StoreSequence, Count: e.Count, Detail: e.Detail, Salt: e.Salt[:],
	}
	if e.HasPeriod {
		v.Period = &e.Period
	}
	return v
}
