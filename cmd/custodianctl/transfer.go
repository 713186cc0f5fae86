package main

import (
	"context"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/client"
	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/packager"
)

// An importFlags is the command line of keys import.
type importFlags struct {
	category, content, contentHex, scheme, privateKey, ceremony string
	tracks                                                      []string
}

func (a *app) keysImportCmd() *cobra.Command {
	var in importFlags
	c := leaf(&cobra.Command{
		Use:   "import FILE",
		Short: "Take in a content item's existing keys from a CPIX document (officer)",
		Long: `Take in the existing keys of a content item, from a CPIX document of version 2.0 to
2.4. Keys in it may be in clear, or encrypted to the certificate of --private-key.

All keys are stored or none. A KID, a key, or a track type of the content item
that is in use otherwise is refused; the same import again changes nothing. What
the document does not say, flags do: --content, --scheme, --track.

The document is not changed and not removed: see to that yourself.`,
		Example: `  custodianctl keys import --category movies --private-key studio.key film-1.cpix.xml
  custodianctl keys import --category movies --content film-1 --scheme cenc --track 40d02dd1-61a3-4787-a155-572325d47b80=SD keys.xml`,
	}, cobra.ExactArgs(1), func(ctx context.Context, args []string) error {
		req, notes, err := in.request(args[0])
		defer wipeImport(req)
		if err != nil {
			return err
		}
		for _, n := range notes {
			fmt.Fprintln(a.err, "note:", n)
		}
		resp, err := ask(ctx, a, func(ctx context.Context, cl *client.Client) (*v1.ImportContentKeysResponse, error) {
			return cl.ImportContentKeys(ctx, req)
		})
		if err != nil {
			return fmt.Errorf("import keys of %s into %s: %w", contentText(req.GetContentId()), in.category, err)
		}
		return a.printImport(req, resp)
	})
	f := c.Flags()
	f.StringVar(&in.category, "category", "", "content category `NAME`")
	f.StringVar(&in.content, "content", "", "content `ID`, as text (default: the document's contentId)")
	f.StringVar(&in.contentHex, "content-hex", "", "content ID in `HEX`adecimal")
	f.StringVar(&in.scheme, "scheme", "", "common encryption `SCHEME` of keys for which the document has none")
	f.StringSliceVar(&in.tracks, "track", nil, "`KID=TYPE`, the track type of a key for which the document has none")
	f.StringVar(&in.privateKey, "private-key", "", "RSA private key of the document's recipient, PEM `FILE`, mode 0600")
	f.StringVar(&in.ceremony, "ceremony", "", "`ID` of the ceremony that permits it, where there are officers")
	completeWords(c, "scheme", "cenc", "cbcs", "cens", "cbc1")
	return need(c, "category")
}

// request reads the document. The request is there even with an error, as far
// as it came, so that its keys can be wiped.
func (in *importFlags) request(path string) (*v1.ImportContentKeysRequest, []string, error) {
	req := &v1.ImportContentKeysRequest{Category: in.category, Ceremony: in.ceremony}
	tracks, err := in.trackTypes()
	if err := errors.Join(err, custodian.CategoryName(in.category).Check()); err != nil {
		return req, nil, invalid(err)
	}
	doc, err := readDocument(path)
	if err != nil {
		return req, nil, err
	}
	defer doc.Wipe()
	if in.privateKey != "" {
		key, err := readRSAKey(in.privateKey)
		if err != nil {
			return req, nil, fmt.Errorf("--private-key: %w", err)
		}
		if err := doc.Open(key); errors.Is(err, packager.ErrTampered) {
			return req, nil, damaged(fmt.Errorf("%s: %w", path, err))
		} else if err != nil {
			return req, nil, invalid(fmt.Errorf("%s: %w", path, err))
		}
	}
	if req.ContentId, err = contentID(in.content, in.contentHex); err == nil && len(req.ContentId) == 0 {
		if req.ContentId = []byte(doc.ContentID); doc.ContentID == "" {
			err = errors.New("the document has no contentId: name the content with --content")
		}
	}
	faults := []error{err}
	var notes []string
	for _, k := range doc.Keys {
		key, note, err := in.key(doc, k, tracks)
		if err != nil {
			faults = append(faults, fmt.Errorf("key %s: %w", k.KID, err))
		}
		if note != "" {
			notes = append(notes, note)
		}
		req.Keys = append(req.Keys, key)
	}
	if len(doc.Keys) == 0 {
		faults = append(faults, errors.New("the document has no key"))
	}
	for kid := range tracks {
		if !slices.ContainsFunc(doc.Keys, func(k packager.CPIXKey) bool { return k.KID == kid }) {
			faults = append(faults, fmt.Errorf("--track %s: the document has no such KID", kid))
		}
	}
	if err := errors.Join(faults...); err != nil {
		return req, nil, invalid(fmt.Errorf("%s: %w", path, err))
	}
	return req, notes, nil
}

// key makes one key of the request; it is there even with an error.
func (in *importFlags) key(doc *packager.CPIX, k packager.CPIXKey, tracks map[custodian.KID]string) (*v1.ImportedContentKey, string, error) {
	out := &v1.ImportedContentKey{Spec: &v1.ContentKeySpec{Kid: k.KID[:], Scheme: k.Scheme}}
	value, err := k.Value()
	faults := []error{err}
	if out.Key = value; value == nil && err == nil {
		faults = append(faults, errors.New("it is encrypted or not there at all: --private-key opens it"))
	}
	track, period, err := doc.Purpose(k.KID)
	faults = append(faults, err)
	if given := tracks[k.KID]; given != "" {
		track = given
	}
	if out.Spec.TrackType = track; track == "" && err == nil {
		faults = append(faults, fmt.Errorf("the document does not say for which tracks: add --track %s=TYPE", k.KID))
	}
	if out.Spec.Scheme == "" {
		if out.Spec.Scheme = in.scheme; in.scheme == "" {
			faults = append(faults, errors.New("the document does not say its scheme: add --scheme"))
		}
	}
	if period.Set {
		out.Spec.Period = &v1.Period{Index: period.Index}
		if !period.Start.IsZero() {
			out.Spec.Period.StartTime = timestamppb.New(period.Start)
		}
		if !period.End.IsZero() {
			out.Spec.Period.EndTime = timestamppb.New(period.End)
		}
	}
	note := ""
	if len(k.IV) > 0 && custodian.Scheme(out.Spec.Scheme).ExplicitIV() {
		out.Iv = k.IV
	} else if len(k.IV) > 0 {
		note = fmt.Sprintf("key %s: its explicitIV is left out; only keys of scheme cbcs have one here", k.KID)
	} else if custodian.Scheme(out.Spec.Scheme).ExplicitIV() {
		note = fmt.Sprintf("key %s: the document has no explicitIV; FairPlay licences will have none", k.KID)
	}
	return out, note, errors.Join(faults...)
}

func (in *importFlags) trackTypes() (map[custodian.KID]string, error) {
	tracks := map[custodian.KID]string{}
	for _, t := range in.tracks {
		text, track, ok := strings.Cut(t, "=")
		if !ok {
			return nil, fmt.Errorf("--track %s: must be KID=TYPE", plain(t))
		}
		kid, err := custodian.ParseKID(text)
		if err := errors.Join(err, custodian.TrackType(track).Check()); err != nil {
			return nil, fmt.Errorf("--track %s: %w", plain(t), err)
		}
		tracks[kid] = track
	}
	return tracks, nil
}

func wipeImport(req *v1.ImportContentKeysRequest) {
	for _, k := range req.GetKeys() {
		clear(k.GetKey())
	}
}

// readDocument reads a CPIX document, in which there may be keys in clear.
func readDocument(path string) (*packager.CPIX, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, packager.MaxDocumentSize+1))
	defer clear(raw[:cap(raw)])
	if err != nil {
		return nil, err
	}
	doc, err := packager.ParseCPIX(raw)
	if err != nil {
		return nil, invalid(fmt.Errorf("%s: %w", path, err))
	}
	return doc, nil
}

// readRSAKey reads a private key that only its owner may read.
func readRSAKey(path string) (*rsa.PrivateKey, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if fi, err := f.Stat(); err != nil {
		return nil, err
	} else if fi.Mode().Perm()&0o077 != 0 {
		return nil, invalid(fmt.Errorf("%s: mode %04o lets others read it; chmod 600 it", path, fi.Mode().Perm()))
	}
	raw, err := io.ReadAll(io.LimitReader(f, 1<<20))
	defer clear(raw[:cap(raw)])
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(raw)
	if block == nil {
		return nil, invalid(fmt.Errorf("%s: no PEM", path))
	}
	defer clear(block.Bytes)
	if key, err := x509.ParsePKCS1PrivateKey(block.Bytes); err == nil {
		return key, nil
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if private, ok := key.(*rsa.PrivateKey); err == nil && ok {
		return private, nil
	}
	return nil, invalid(fmt.Errorf("%s: no RSA private key, PKCS #1 or PKCS #8 without a password", path))
}

// An importView is what became of one key, in JSON.
type importView struct {
	KID       hexKID       `json:"kid"`
	TrackType string       `json:"track_type"`
	Scheme    string       `json:"scheme"`
	Period    *uint32      `json:"period,omitempty"`
	Created   bool         `json:"created"`
	Receipt   *receiptView `json:"receipt,omitempty"`
}

func (a *app) printImport(req *v1.ImportContentKeysRequest, resp *v1.ImportContentKeysResponse) error {
	views := make([]importView, 0, len(resp.GetResults()))
	for i, r := range resp.GetResults() {
		v := importView{KID: r.GetKid(), Created: r.GetCreated(), Receipt: &receiptView{r.GetReceipt().GetIndex(), r.GetReceipt().GetLeafHash(), string(r.GetReceipt().GetCheckpoint())}}
		if i < len(req.GetKeys()) {
			spec := req.GetKeys()[i].GetSpec()
			v.TrackType, v.Scheme = spec.GetTrackType(), spec.GetScheme()
			if spec.GetPeriod() != nil {
				v.Period = &spec.GetPeriod().Index
			}
		}
		views = append(views, v)
	}
	if a.json {
		return a.printJSON(struct {
			Keys      []importView `json:"keys"`
			RequestID string       `json:"request_id,omitempty"`
		}{views, resp.GetRequestId()})
	}
	rows := make([][]string, 0, len(views))
	for _, v := range views {
		rows = append(rows, []string{v.KID.String(), short(contentText(req.GetContentId()), 40), plain(v.TrackType), plain(v.Scheme), period(v.Period), yesNo(&v.Created)})
	}
	return a.printTable([]string{"KID", "CONTENT", "TRACK", "SCHEME", "PERIOD", "NEW"}, rows)
}

func (a *app) keysExportCmd() *cobra.Command {
	var category, content, contentHex, to, out, ceremony string
	c := leaf(&cobra.Command{
		Use:   "export",
		Short: "Write a content item's keys to a CPIX document for a provider that takes them by push (officer)",
		Long: `Write the newest keys of a content item to a CPIX document, encrypted to a recipient
whose certificate the daemon's configuration pins for exports from the category.
Keys never leave in clear.`,
		Example: `  custodianctl keys export --category movies --content film-1 --to provider-a --out film-1.cpix.xml`,
	}, cobra.NoArgs, func(ctx context.Context, _ []string) error {
		id, err := contentID(content, contentHex)
		if err == nil {
			err = custodian.ContentID(id).Check()
		}
		if err := errors.Join(err, custodian.CategoryName(category).Check()); err != nil {
			return invalid(err)
		}
		// It must not exist. Better to know before keys are released to nowhere.
		f, err := os.OpenFile(out, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		if err != nil {
			return err
		}
		resp, err := ask(ctx, a, func(ctx context.Context, cl *client.Client) (*v1.ExportContentKeysResponse, error) {
			return cl.ExportContentKeys(ctx, &v1.ExportContentKeysRequest{Category: category, ContentId: id, Recipient: to, Ceremony: ceremony})
		})
		if err == nil {
			_, err = f.Write(resp.GetCpix())
			err = errors.Join(err, f.Sync())
		}
		if err = errors.Join(err, f.Close()); err != nil {
			return errors.Join(fmt.Errorf("export keys of %s from %s: %w", contentText(id), category, err), os.Remove(out))
		}
		return a.printKeysExport(resp, to, out)
	})
	f := c.Flags()
	f.StringVar(&category, "category", "", "content category `NAME`")
	f.StringVar(&content, "content", "", "content `ID`, as text")
	f.StringVar(&contentHex, "content-hex", "", "content ID in `HEX`adecimal")
	f.StringVar(&to, "to", "", "`NAME` of the recipient in the daemon's configuration")
	f.StringVar(&out, "out", "", "`FILE` to write, which must not exist")
	f.StringVar(&ceremony, "ceremony", "", "`ID` of the ceremony that permits it, where there are officers")
	return need(c, "category", "to", "out")
}

func (a *app) printKeysExport(resp *v1.ExportContentKeysResponse, to, out string) error {
	kids := make([]hexKID, 0, len(resp.GetKids()))
	for _, kid := range resp.GetKids() {
		kids = append(kids, kid)
	}
	if a.json {
		return a.printJSON(struct {
			File      string   `json:"file"`
			Recipient string   `json:"recipient"`
			KIDs      []hexKID `json:"kids"`
			RequestID string   `json:"request_id,omitempty"`
		}{out, to, kids, resp.GetRequestId()})
	}
	return a.printf("%d keys are in %s, encrypted to %s\n", len(kids), out, to)
}
