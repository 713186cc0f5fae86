package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/custodian"
)

// A blastView is a content key that counts as exposed, in JSON.
type blastView struct {
	KID        string        `json:"kid"`
	Category   string        `json:"category"`
	ContentID  hexBytes      `json:"content_id"`
	Content    string        `json:"content,omitempty"` // where it is text
	TrackType  string        `json:"track_type"`
	Scheme     string        `json:"scheme"`
	Generation uint32        `json:"generation"`
	Birth      uint32        `json:"birth_key_version"`
	Version    uint32        `json:"key_version"`
	Handouts   []handoutView `json:"handouts"`
}

type handoutView struct {
	Caller string     `json:"caller"`
	First  *time.Time `json:"first_time"`
	Last   *time.Time `json:"last_time"`
	Count  uint64     `json:"count"`
}

// A rekeyView is a content item that needs new keys, as a line of the work list.
type rekeyView struct {
	Category  string   `json:"category"`
	ContentID hexBytes `json:"content_id"`
	Content   string   `json:"content,omitempty"`
	KIDs      []string `json:"kids"`
}

func (a *app) blastRadiusCmd() *cobra.Command {
	req := &v1.GetBlastRadiusRequest{}
	var workList, asPlan bool
	c := leaf(&cobra.Command{
		Use:   "blast-radius",
		Short: "Show what the loss of a key version, or of a caller, exposes (officer, auditor)",
		Long: `Show every content key that the loss of a key-encryption key's version exposes, which
is all that it ever wrapped, or that a caller was given; with who was given each of
them and when, as far back as the audit log goes. With --json each is an object on a
line; with --work-list each line is a content item that needs new keys. With
--plan-content these items are the content section of a plan of kind rekey.`,
		Example: `  custodianctl ceremony blast-radius --kek movies/4
  custodianctl ceremony blast-radius --caller spiffe://example.org/provider --work-list`,
	}, cobra.NoArgs, func(ctx context.Context, _ []string) error {
		if (req.KeyVersion == "") == (req.Caller == "") {
			return invalid(errors.New("name a key version with --kek, or a caller with --caller"))
		}
		if req.KeyVersion != "" {
			if _, err := custodian.ParseKEKID(req.KeyVersion); err != nil {
				return invalid(fmt.Errorf("--kek: %w", err))
			}
		}
		cl, err := a.connect(ctx)
		if err != nil {
			return err
		}
		defer cl.Close()
		var rows [][]string
		work := workItems{index: map[string]*rekeyView{}}
		lines := json.NewEncoder(a.out)
		err = cl.GetBlastRadius(ctx, req, func(r *v1.GetBlastRadiusResponse) error {
			switch {
			case workList || asPlan:
				work.add(r)
			case a.json:
				return lines.Encode(viewBlast(r))
			default:
				rows = append(rows, blastRows(r)...)
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("blast radius: %w", err)
		}
		if asPlan {
			return a.printf("%s", work.content())
		}
		for _, item := range work.items {
			if err := lines.Encode(item); err != nil {
				return err
			}
		}
		if workList || a.json {
			return nil
		}
		return a.printTable([]string{"KID", "CONTENT", "TRACK", "SCHEME", "BORN", "NOW", "GIVEN TO", "TIMES", "FIRST", "LAST"}, rows)
	})
	f := c.Flags()
	f.StringVar(&req.KeyVersion, "kek", "", "key `VERSION`: movies/4")
	f.StringVar(&req.Caller, "caller", "", "`IDENTITY` of a caller")
	f.BoolVar(&workList, "work-list", false, "the content items that need new keys, a JSON object on a line")
	f.BoolVar(&asPlan, "plan-content", false, "the content items that need new keys, as the content section of a plan")
	c.MarkFlagsMutuallyExclusive("work-list", "plan-content")
	return c
}

// kidText is a key ID from elsewhere.
func kidText(b []byte) string {
	kid, err := custodian.KIDFromBytes(b)
	if err != nil {
		return hexBytes(b).String()
	}
	return kid.String()
}

func viewBlast(r *v1.GetBlastRadiusResponse) blastView {
	v := blastView{KID: kidText(r.GetKid()), Category: r.GetCategory(), ContentID: r.GetContentId(), Content: readable(r.GetContentId()), TrackType: r.GetTrackType(),
		Scheme: r.GetScheme(), Generation: r.GetGeneration(), Birth: r.GetBirthKeyVersion(), Version: r.GetKeyVersion(), Handouts: []handoutView{}}
	for _, h := range r.GetHandouts() {
		v.Handouts = append(v.Handouts, handoutView{h.GetCaller(), timeOrNone(h.GetFirstTime()), timeOrNone(h.GetLastTime()), h.GetCount()})
	}
	return v
}

// blastRows are the lines of one key: one for each who was given it.
func blastRows(r *v1.GetBlastRadiusResponse) (rows [][]string) {
	v := func(n uint32) string { return strconv.FormatUint(uint64(n), 10) }
	key := []string{kidText(r.GetKid()), short(contentText(r.GetContentId()), 30), orDash(r.GetTrackType()), orDash(r.GetScheme()), v(r.GetBirthKeyVersion()), v(r.GetKeyVersion())}
	for _, h := range r.GetHandouts() {
		rows = append(rows, append(slices.Clone(key), plain(h.GetCaller()), strconv.FormatUint(h.GetCount(), 10), stamp(at(h.GetFirstTime())), stamp(at(h.GetLastTime()))))
	}
	if len(rows) == 0 {
		rows = append(rows, append(key, "-", "0", "-", "-"))
	}
	return rows
}

// workItems gather keys by content item, in the order in which items come.
type workItems struct {
	items []*rekeyView
	index map[string]*rekeyView // by category and content ID
}

func (w *workItems) add(r *v1.GetBlastRadiusResponse) {
	at := r.GetCategory() + "\x00" + string(r.GetContentId())
	item := w.index[at]
	if item == nil {
		item = &rekeyView{Category: r.GetCategory(), ContentID: r.GetContentId(), Content: readable(r.GetContentId())}
		w.items = append(w.items, item)
		w.index[at] = item
	}
	item.KIDs = append(item.KIDs, kidText(r.GetKid()))
}

// content is the content section of a plan that names the items. An item of
// which only the audit log knows has nothing to re-key.
func (w *workItems) content() string {
	var b strings.Builder
	b.WriteString("content:\n")
	for _, item := range w.items {
		switch id, err := json.Marshal(item.Content); {
		case len(item.ContentID) == 0:
		case err == nil && item.Content != "":
			fmt.Fprintf(&b, "- {category: %s, id: %s}\n", item.Category, id)
		default:
			fmt.Fprintf(&b, "- {category: %s, hex: %s}\n", item.Category, item.ContentID)
		}
	}
	return b.String()
}
