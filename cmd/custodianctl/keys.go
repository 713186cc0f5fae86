package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	rpccode "google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/grpc/codes"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/client"
	"github.com/keycustody/custodian/custodian"
)

const hiddenKey = "(hidden; --reveal shows it)"

func (a *app) keysCmd() *cobra.Command {
	return group(&cobra.Command{Use: "keys", Short: "Content keys: issue, get, list, periods, import, export"}, a.keysIssueCmd(), a.keysGetCmd(), a.keysListCmd(), a.keysShowCmd(), a.keysPeriodsCmd(), a.keysImportCmd(), a.keysExportCmd())
}

// A keyView is a delivered content key in JSON. It has the key only where the
// user asked for it.
type keyView struct {
	KID          hexKID       `json:"kid"`
	Category     string       `json:"category,omitempty"`
	ContentID    string       `json:"content_id,omitempty"`
	ContentIDHex hexBytes     `json:"content_id_hex,omitempty"`
	TrackType    string       `json:"track_type,omitempty"`
	Scheme       string       `json:"scheme,omitempty"`
	Period       *uint32      `json:"period,omitempty"`
	Generation   uint32       `json:"generation,omitempty"`
	IV           hexBytes     `json:"iv,omitempty"`
	Created      *bool        `json:"created,omitempty"`
	Key          hexBytes     `json:"key,omitempty"`
	SealedTo     string       `json:"sealed_to,omitempty"` // a recipient key that this user has not
	CreateTime   *time.Time   `json:"create_time,omitempty"`
	Receipt      *receiptView `json:"receipt,omitempty"`
	Error        *errorView   `json:"error,omitempty"`
}

type receiptView struct {
	Index    uint64   `json:"index"`
	LeafHash hexBytes `json:"leaf_hash,omitempty"`

	Checkpoint string `json:"checkpoint,omitempty"`
}

// A hexKID is a KID in the 8-4-4-4-12 form, or what else came in its place.
type hexKID []byte

func (k hexKID) String() string {
	if len(k) != custodian.KIDSize {
		return hex.EncodeToString(k)
	}
	return custodian.KID(k).String()
}

func (k hexKID) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// viewKey takes a key out of its message. The message's key is wiped where it
// is not to be shown; where it is, the view shares its bytes.
func viewKey(k *v1.ContentKey, reveal bool) keyView {
	v := keyView{
		KID: k.GetKid(), Category: k.GetCategory(), ContentID: readable(k.GetContentId()), ContentIDHex: k.GetContentId(),
		TrackType: k.GetTrackType(), Scheme: k.GetScheme(), Generation: k.GetGeneration(), IV: k.GetIv(), CreateTime: timeOrNone(k.GetCreateTime()),
	}
	if p := k.GetPeriod(); p != nil {
		index := p.GetIndex()
		v.Period = &index
	}
	if r := k.GetReceipt(); r != nil {
		v.Receipt = &receiptView{r.GetIndex(), r.GetLeafHash(), string(r.GetCheckpoint())}
	}
	v.SealedTo = k.GetSealedKey().GetRecipientKeyId()
	if !reveal {
		clear(k.GetKey())
		return v
	}
	v.Key = k.GetKey()
	return v
}

// printKeys shows keys and wipes them, whatever happens. What the runtime and
// the JSON encoder copied on the way ends with the process, which is about to.
func (a *app) printKeys(views []keyView, requestID string) error {
	defer func() {
		for _, v := range views {
			clear(v.Key)
		}
	}()
	var out bytes.Buffer
	out.Grow(1024 * (len(views) + 1))
	defer func() { clear(out.Bytes()[:out.Cap()]) }()
	if a.json {
		err := encodeJSON(&out, struct {
			Keys      []keyView `json:"keys"`
			RequestID string    `json:"request_id,omitempty"`
		}{views, requestID})
		if err != nil {
			return err
		}
	} else {
		tableOfKeys(&out, views)
	}
	_, err := a.out.Write(out.Bytes())
	return err
}

// tableOfKeys aligns all columns but the last, so that no key goes through the
// buffers of a tabwriter.
func tableOfKeys(out *bytes.Buffer, views []keyView) {
	var text bytes.Buffer
	w := tabwriter.NewWriter(&text, 0, 0, 2, ' ', 0)
	fmt.Fprint(w, "KID\tCONTENT\tTRACK\tSCHEME\tPERIOD\tNEW\t\n")
	for _, v := range views {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t\n", v.KID, short(contentText(v.ContentIDHex), 40), orDash(v.TrackType), orDash(v.Scheme), period(v.Period), yesNo(v.Created))
	}
	w.Flush() // a bytes.Buffer takes everything
	for i, line := range strings.Split(strings.TrimSuffix(text.String(), "\n"), "\n") {
		out.WriteString(line)
		switch {
		case i == 0:
			out.WriteString("KEY")
		case views[i-1].Error != nil:
			out.WriteString("(not released: " + views[i-1].Error.Reason + ")")
		case views[i-1].SealedTo != "":
			out.WriteString("(sealed to recipient key " + plain(views[i-1].SealedTo) + "; recipient_key_files opens it)")
		case len(views[i-1].Key) == 0:
			out.WriteString(hiddenKey)
		default:
			hexed := make([]byte, hex.EncodedLen(len(views[i-1].Key)))
			hex.Encode(hexed, views[i-1].Key)
			out.Write(hexed)
			clear(hexed)
		}
		out.WriteByte('\n')
	}
}

func period(p *uint32) string {
	if p == nil {
		return "-"
	}
	return strconv.FormatUint(uint64(*p), 10)
}

func yesNo(b *bool) string {
	switch {
	case b == nil:
		return "-"
	case *b:
		return "yes"
	}
	return "no"
}

// An issueFlags is the command line of keys issue.
type issueFlags struct {
	category, content, contentHex, scheme, kid string
	tracks                                     []string
	period                                     int64 // below zero: none
	reveal                                     bool
}

func (a *app) keysIssueCmd() *cobra.Command {
	var in issueFlags
	c := leaf(&cobra.Command{
		Use:   "issue",
		Short: "Get keys to encrypt a content item with, made where there are none yet (packager)",
		Long: `Get the keys to encrypt a content item with: one for each track type. Keys that do
not exist are made; asking again gives the same keys, within the category's
re-issue window.`,
		Example: `  custodianctl keys issue --category movies --content film-1 --track SD,HD,AUDIO --scheme cenc`,
	}, cobra.NoArgs, func(ctx context.Context, _ []string) error {
		req, err := in.request()
		if err != nil {
			return invalid(err)
		}
		resp, err := ask(ctx, a, func(ctx context.Context, cl *client.Client) (*v1.IssueContentKeysResponse, error) {
			return cl.IssueContentKeys(ctx, req)
		})
		if err != nil {
			return fmt.Errorf("issue keys of %s in %s: %w", contentText(req.GetContentId()), in.category, err)
		}
		views := make([]keyView, 0, len(resp.GetKeys()))
		for _, k := range resp.GetKeys() {
			v, created := viewKey(k.GetKey(), in.reveal), k.GetCreated()
			v.Created = &created
			views = append(views, v)
		}
		return a.printKeys(views, resp.GetRequestId())
	})
	f := c.Flags()
	f.StringVar(&in.category, "category", "", "content category `NAME`")
	f.StringVar(&in.content, "content", "", "content `ID`, as text")
	f.StringVar(&in.contentHex, "content-hex", "", "content ID in `HEX`adecimal")
	f.StringSliceVar(&in.tracks, "track", nil, "track `TYPE`s, with commas: SD, HD, UHD1, UHD2, AUDIO or your own")
	f.StringVar(&in.scheme, "scheme", "", "common encryption `SCHEME`: cenc, cbcs, cens or cbc1")
	f.Int64Var(&in.period, "period", -1, "`INDEX` of the crypto period (default: none)")
	f.StringVar(&in.kid, "kid", "", "`KID` for a new key, with a single --track (default: the daemon draws one)")
	f.BoolVar(&in.reveal, "reveal", false, "show the keys")
	completeWords(c, "track", "SD", "HD", "UHD1", "UHD2", "AUDIO")
	completeWords(c, "scheme", "cenc", "cbcs", "cens", "cbc1")
	return need(c, "category", "track", "scheme")
}

// request reports all faults at once.
func (in *issueFlags) request() (*v1.IssueContentKeysRequest, error) {
	var faults []error
	content, err := contentID(in.content, in.contentHex)
	if err == nil {
		err = custodian.ContentID(content).Check()
	}
	faults = append(faults, err, custodian.CategoryName(in.category).Check(), custodian.Scheme(in.scheme).Check())
	req := &v1.IssueContentKeysRequest{Category: in.category, ContentId: content}
	if in.period < -1 || in.period > 1<<32-1 {
		faults = append(faults, fmt.Errorf("--period %d: must be 0 to %d", in.period, uint32(1<<32-1)))
	}
	var kid []byte
	if in.kid != "" {
		id, err := custodian.ParseKID(in.kid)
		faults = append(faults, err)
		kid = id[:]
	}
	if in.kid != "" && len(in.tracks) != 1 {
		faults = append(faults, errors.New("--kid: a KID is for one key: give a single --track"))
	}
	for _, track := range in.tracks {
		faults = append(faults, custodian.TrackType(track).Check())
		spec := &v1.ContentKeySpec{TrackType: track, Scheme: in.scheme, Kid: kid}
		if in.period >= 0 {
			spec.Period = &v1.Period{Index: uint32(in.period)}
		}
		req.Keys = append(req.Keys, spec)
	}
	return req, errors.Join(faults...)
}

// contentID reads --content or --content-hex.
func contentID(text, hexed string) ([]byte, error) {
	if text != "" && hexed != "" {
		return nil, errors.New("--content and --content-hex: give one of them")
	}
	if hexed == "" {
		return []byte(text), nil
	}
	b, err := hex.DecodeString(hexed)
	if err != nil {
		return nil, fmt.Errorf("--content-hex: %w", err)
	}
	return b, nil
}

func (a *app) keysGetCmd() *cobra.Command {
	var content, contentHex, tokenFile string
	var reveal bool
	c := leaf(&cobra.Command{
		Use:   "get KID...",
		Short: "Get existing keys by KID, as the callback of a DRM provider does (drm-provider)",
		Long: `Get existing keys by KID, as the callback of a DRM provider does. Where some of
several keys are not released, the others are printed, and the exit code is that
of the first refusal.`,
		Example: `  custodianctl keys get 0f8c2f0e-6d3c-4f0e-9d54-8a4f3a3ed7a1 --reveal`,
	}, cobra.RangeArgs(1, custodian.MaxKIDsPerCall), func(ctx context.Context, args []string) error {
		req := &v1.GetContentKeysRequest{}
		var faults []error
		for _, arg := range args {
			kid, err := custodian.ParseKID(arg)
			faults = append(faults, err)
			req.Kids = append(req.Kids, kid[:])
		}
		id, err := contentID(content, contentHex)
		req.ContentId = id
		token, terr := readToken(tokenFile)
		req.LicenceToken = token
		if err := errors.Join(append(faults, err, terr)...); err != nil {
			return invalid(err)
		}
		resp, err := ask(ctx, a, func(ctx context.Context, cl *client.Client) (*v1.GetContentKeysResponse, error) {
			return cl.GetContentKeys(ctx, req)
		})
		if err != nil {
			return fmt.Errorf("get keys: %w", err)
		}
		return a.showReleased(resp, reveal)
	})
	f := c.Flags()
	f.StringVar(&content, "content", "", "content `ID` that the keys must belong to, as text")
	f.StringVar(&contentHex, "content-hex", "", "the same in `HEX`adecimal")
	f.StringVar(&tokenFile, "token-file", "", "`FILE` with the viewer's licence token")
	f.BoolVar(&reveal, "reveal", false, "show the keys")
	return c
}

// readToken reads a licence token; without a file there is none.
func readToken(file string) (string, error) {
	if file == "" {
		return "", nil
	}
	token, err := os.ReadFile(file)
	return strings.TrimSpace(string(token)), err
}

// showReleased prints the results, and returns the first refusal among them.
func (a *app) showReleased(resp *v1.GetContentKeysResponse, reveal bool) error {
	views := make([]keyView, 0, len(resp.GetResults()))
	var first *failure
	refused := 0
	for _, r := range resp.GetResults() {
		e := r.GetError()
		if e == nil {
			views = append(views, viewKey(r.GetKey(), reveal))
			continue
		}
		if refused++; first == nil {
			first = &failure{reason: e.GetReason(), code: codes.Code(e.GetCode()), retry: e.GetRetryDelay().AsDuration(),
				err: fmt.Errorf("%s: %s: %s", hexKID(r.GetKid()), e.GetReason(), e.GetMessage())}
		}
		views = append(views, keyView{KID: r.GetKid(), Error: &errorView{Reason: e.GetReason(), Message: e.GetMessage(),
			Code: rpccode.Code(e.GetCode()).String(), RetryAfterMS: e.GetRetryDelay().AsDuration().Milliseconds()}})
	}
	if err := a.printKeys(views, resp.GetRequestId()); err != nil {
		return err
	}
	if first == nil {
		return nil
	}
	return fmt.Errorf("get keys: %d of %d not released, the first: %w", refused, len(views), first)
}

// An infoView is the metadata of a content key in JSON.
type infoView struct {
	KID             hexKID     `json:"kid"`
	Category        string     `json:"category"`
	ContentID       string     `json:"content_id,omitempty"`
	ContentIDHex    hexBytes   `json:"content_id_hex"`
	TrackType       string     `json:"track_type"`
	Scheme          string     `json:"scheme"`
	Period          *uint32    `json:"period,omitempty"`
	PeriodStart     *time.Time `json:"period_start_time,omitempty"`
	PeriodEnd       *time.Time `json:"period_end_time,omitempty"`
	Generation      uint32     `json:"generation"`
	IV              hexBytes   `json:"iv,omitempty"`
	State           string     `json:"state"`
	Origin          string     `json:"origin"`
	KeyVersion      uint32     `json:"key_version"`
	BirthKeyVersion uint32     `json:"birth_key_version"`
	CreateTime      *time.Time `json:"create_time,omitempty"`
	PackagedTime    *time.Time `json:"packaged_time,omitempty"`
	Revision        uint64     `json:"revision"`
}

func viewInfo(k *v1.ContentKeyInfo) infoView {
	return infoView{
		KID: k.GetKid(), Category: k.GetCategory(), ContentID: readable(k.GetContentId()), ContentIDHex: k.GetContentId(),
		TrackType: k.GetTrackType(), Scheme: k.GetScheme(), Period: k.PeriodIndex,
		PeriodStart: timeOrNone(k.GetPeriodStartTime()), PeriodEnd: timeOrNone(k.GetPeriodEndTime()),
		Generation: k.GetGeneration(), IV: k.GetIv(),
		State: enum(k.GetState().String(), "KEY_STATE_"), Origin: enum(k.GetOrigin().String(), "KEY_ORIGIN_"),
		KeyVersion: k.GetKeyVersion(), BirthKeyVersion: k.GetBirthKeyVersion(), CreateTime: timeOrNone(k.GetCreateTime()),
		PackagedTime: timeOrNone(k.GetPackagedTime()), Revision: k.GetRevision(),
	}
}

func (a *app) keysListCmd() *cobra.Command {
	var category, content, contentHex string
	c := leaf(&cobra.Command{Use: "list", Short: "List the metadata of a category's content keys (auditor)"}, cobra.NoArgs, func(ctx context.Context, _ []string) error {
		id, err := contentID(content, contentHex)
		if err := errors.Join(err, custodian.CategoryName(category).Check()); err != nil {
			return invalid(err)
		}
		views := []infoView{}
		err = a.eachContentKey(ctx, &v1.ListContentKeysRequest{Category: category, ContentId: id, PageSize: 1000}, func(k *v1.ContentKeyInfo) {
			views = append(views, viewInfo(k))
		})
		if err != nil {
			return fmt.Errorf("list keys of %s: %w", category, err)
		}
		if a.json {
			return a.printJSON(struct {
				Keys []infoView `json:"keys"`
			}{views})
		}
		rows := make([][]string, 0, len(views))
		for _, v := range views {
			created := time.Time{}
			if v.CreateTime != nil {
				created = *v.CreateTime
			}
			rows = append(rows, []string{v.KID.String(), short(contentText(v.ContentIDHex), 40), plain(v.TrackType), plain(v.Scheme), period(v.Period), strconv.FormatUint(uint64(v.Generation), 10), v.State, stamp(created)})
		}
		return a.printTable([]string{"KID", "CONTENT", "TRACK", "SCHEME", "PERIOD", "GENERATION", "STATE", "CREATED"}, rows)
	})
	f := c.Flags()
	f.StringVar(&category, "category", "", "content category `NAME`")
	f.StringVar(&content, "content", "", "only this content `ID`, as text")
	f.StringVar(&contentHex, "content-hex", "", "the same in `HEX`adecimal")
	return need(c, "category")
}

// eachContentKey goes through all pages. --timeout is for each of them.
func (a *app) eachContentKey(ctx context.Context, req *v1.ListContentKeysRequest, visit func(*v1.ContentKeyInfo)) error {
	cl, err := a.connect(ctx)
	if err != nil {
		return err
	}
	defer cl.Close()
	for {
		bounded, cancel := a.bounded(ctx)
		page, err := cl.ListContentKeys(bounded, req)
		cancel()
		if err != nil {
			return err
		}
		for _, k := range page.GetContentKeys() {
			visit(k)
		}
		if page.GetNextPageToken() == "" {
			return nil
		}
		req.PageToken = page.GetNextPageToken()
	}
}

func (a *app) keysShowCmd() *cobra.Command {
	return leaf(&cobra.Command{Use: "show KID", Short: "Show the metadata of one content key (auditor)"}, cobra.ExactArgs(1), func(ctx context.Context, args []string) error {
		kid, err := custodian.ParseKID(args[0])
		if err != nil {
			return invalid(err)
		}
		k, err := ask(ctx, a, func(ctx context.Context, cl *client.Client) (*v1.ContentKeyInfo, error) {
			return cl.DescribeContentKey(ctx, kid[:])
		})
		if err != nil {
			return fmt.Errorf("show key %s: %w", kid, err)
		}
		v := viewInfo(k)
		if a.json {
			return a.printJSON(v)
		}
		fields := [][2]string{
			{"kid", v.KID.String()}, {"category", plain(v.Category)}, {"content", contentText(v.ContentIDHex)},
			{"track type", plain(v.TrackType)}, {"scheme", plain(v.Scheme)},
		}
		if v.Period != nil {
			fields = append(fields, [2]string{"period", fmt.Sprintf("%d, from %s to %s", *v.Period, stamp(at(k.GetPeriodStartTime())), stamp(at(k.GetPeriodEndTime())))})
		}
		if len(v.IV) > 0 {
			fields = append(fields, [2]string{"iv", v.IV.String()})
		}
		return a.printFields(append(fields, [][2]string{
			{"generation", strconv.FormatUint(uint64(v.Generation), 10)}, {"state", v.State}, {"origin", v.Origin},
			{"wrapped by", fmt.Sprintf("%s/%d, at first %s/%d", plain(v.Category), v.KeyVersion, plain(v.Category), v.BirthKeyVersion)},
			{"created", stamp(at(k.GetCreateTime()))}, {"packaged", orDash(stamp(at(k.GetPackagedTime())))},
			{"revision", strconv.FormatUint(v.Revision, 10)},
		}...))
	})
}

// completeWords offers words for a flag.
func completeWords(c *cobra.Command, flag string, words ...string) {
	// An error would mean that there is no such flag: a test asks for the
	// completions of each.
	_ = c.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(words, cobra.ShellCompDirectiveNoFileComp))
}
