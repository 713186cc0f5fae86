package main

import (
	"context"
	"crypto"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/client"
	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/audit"
	"github.com/keycustody/custodian/internal/checkpoint"
)

func (a *app) auditCmd() *cobra.Command {
	return group(&cobra.Command{
		Use:   "audit",
		Short: "Check and read an audit log, without the daemon or from it",
		Long: `Check and read an audit log from its files: on the daemon's machine while it runs,
or a copy anywhere.`,
	}, a.auditVerifyCmd(), a.auditListCmd(), a.auditProveCmd(), a.auditExportCmd(), a.auditKeyCmd(), a.auditConsistencyCmd(), a.auditPruneCmd(), a.auditWitnessCmd())
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

	Checkpoints uint64 `json:"checkpoints"`
	Unsigned    uint64 `json:"unsigned_entries"`
	Signed      bool   `json:"signatures_checked"`
	Checkpoint  string `json:"checkpoint,omitempty"`

	From     uint64       `json:"from_index"`
	Segments int          `json:"segments"`
	Pruned   []prunedView `json:"pruned"`
}

func (a *app) auditVerifyCmd() *cobra.Command {
	var dir, keyFile, since string
	var from, to uint64
	c := leaf(&cobra.Command{
		Use:   "verify [FILE]",
		Short: "Check every byte, hash and signature of a log or an export; exit code 7 if it does not verify",
		Long: `Check every byte and every hash of an audit log, and print its Merkle root
(RFC 6962); with --key the signature of every checkpoint too. With FILE, check
what custodianctl audit export wrote, which needs nothing but the key.

A log cannot show by itself that its end was cut off. Keep its newest checkpoint
elsewhere, and check with --since that the log, or the export, continues it.

With --from and --to only the segments are read that have these entries; what is
before them is taken from the checkpoint that a segment begins with. Of segments
that are pruned the hashes are checked, and the output says what is gone.`,
		Example: `  custodianctl audit verify --dir /var/lib/custodian/audit --key audit.pem
  custodianctl audit verify entries.jsonl --key audit.pem`,
	}, cobra.MaximumNArgs(1), func(ctx context.Context, args []string) error {
		if (len(args) == 1) == (dir != "") {
			return invalid(errors.New("name an export, or a log by --dir"))
		}
		var key crypto.PublicKey
		if keyFile != "" {
			var err error
			if key, err = readAuditKey(keyFile); err != nil {
				return err
			}
		}
		old, err := readSince(since, key)
		if err != nil {
			return err
		}
		if len(args) == 1 && (from > 0 || to > 0) {
			return invalid(errors.New("--from, --to: an export is checked as a whole"))
		}
		if len(args) == 1 {
			return a.verifyExport(ctx, args[0], key, old)
		}
		return a.verifyLog(ctx, dir, key, audit.VerifyOptions{From: from, To: to, Since: old})
	})
	f := c.Flags()
	f.StringVar(&dir, "dir", "", "`DIR`ectory of the log: audit in the daemon's data_dir")
	f.StringVar(&keyFile, "key", "", "`FILE` with the public key of the checkpoints, in PEM")
	f.StringVar(&since, "since", "", "`FILE` with an older checkpoint of this log, which must be in it; needs --key")
	f.Uint64Var(&from, "from", 0, "only from the entry with this `INDEX` on")
	f.Uint64Var(&to, "to", 0, "only to before the entry with this `INDEX`; 0 for all")
	c.ValidArgsFunction = nil
	return c
}

// readAuditKey reads the public key of the checkpoints.
func readAuditKey(path string) (crypto.PublicKey, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, invalid(err)
	}
	key, err := checkpoint.ParseKey(b)
	if err != nil {
		return nil, invalid(fmt.Errorf("--key %s: %w", path, err))
	}
	return key, nil
}

// readSince reads an older checkpoint; nil where there is no path.
func readSince(path string, key crypto.PublicKey) (*checkpoint.Checkpoint, error) {
	if path == "" {
		return nil, nil
	}
	if key == nil {
		return nil, invalid(errors.New("--since: a checkpoint is worth nothing without --key"))
	}
	c, _, err := readCheckpoint(path, key)
	if err != nil {
		return nil, fmt.Errorf("--since %w", err)
	}
	return &c, nil
}

// readCheckpoint reads a file with a checkpoint that key has signed.
func readCheckpoint(path string, key crypto.PublicKey) (checkpoint.Checkpoint, []byte, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return checkpoint.Checkpoint{}, nil, invalid(err)
	}
	c, err := checkpoint.Verify(b, key)
	if err != nil {
		return c, nil, fmt.Errorf("%s: %w", path, err)
	}
	return c, b, nil
}

func (a *app) verifyLog(ctx context.Context, dir string, key crypto.PublicKey, o audit.VerifyOptions) error {
	o.Progress = progressOn(a.err)
	if key != nil {
		o.Check = func(signed []byte) error {
			_, err := checkpoint.Verify(signed, key)
			return err
		}
	}
	r, err := audit.Verify(ctx, dir, o)
	if err != nil {
		return fmt.Errorf("verify: %w", err)
	}
	if key != nil && r.Checkpoints == 0 {
		return fmt.Errorf("verify: no entry of the log is signed: %w", checkpoint.ErrSignature)
	}
	pruned, err := prunedBy(ctx, dir, r.Pruned)
	if err != nil {
		return fmt.Errorf("verify: %w", err)
	}
	if a.json {
		v := reportView{LogID: r.ID[:], Entries: r.Entries, Batches: r.Batches, Root: r.Root[:], Bytes: r.Bytes, Torn: r.Torn,
			Checkpoints: r.Checkpoints, Unsigned: r.Unsigned, Checkpoint: string(r.Checkpoint), Signed: key != nil,
			From: r.From, Segments: r.Segments, Pruned: pruned}
		if r.Entries > 0 {
			v.First, v.Last = &r.First, &r.Last
		}
		return a.printJSON(v)
	}
	fields := [][2]string{
		{"verified", dir},
		{"log id", hexBytes(r.ID[:]).String()},
		{"entries", entriesText(&r)},
		{"root", hexBytes(r.Root[:]).String()},
		{"signed", signedText(r, key != nil)},
		{"from", stamp(r.First)},
		{"to", stamp(r.Last)},
	}
	for _, p := range pruned {
		fields = append(fields, [2]string{"pruned", p.String()})
	}
	if r.Torn > 0 {
		fields = append(fields, [2]string{"note", fmt.Sprintf("%s follow the last whole batch: one that is being written, or that a crash cut off; nobody was answered on it", number(r.Torn, "byte", "bytes"))})
	}
	return a.printFields(fields)
}

// signedText says how much of a log is signed, and whether that was checked.
func signedText(r audit.Report, checked bool) string {
	if r.Checkpoints == 0 {
		return "no"
	}
	s := number(r.Checkpoints, "checkpoint", "checkpoints")
	if !checked {
		s += "; signatures not checked, which needs --key"
	}
	if r.Unsigned > 0 {
		s += fmt.Sprintf("; the first %s were written before there was a key", number(r.Unsigned, "entry", "entries"))
	}
	return s
}

// An exportView is a verified export in JSON.
type exportView struct {
	Origin string   `json:"origin"`
	From   uint64   `json:"from"`
	To     uint64   `json:"to"`
	Size   uint64   `json:"log_entries"`
	Root   hexBytes `json:"root"`
	Since  uint64   `json:"continues_entries,omitempty"`
}

func (a *app) verifyExport(ctx context.Context, path string, key crypto.PublicKey, since *checkpoint.Checkpoint) error {
	if key == nil {
		return invalid(errors.New("an export is checked against a key: --key is needed"))
	}
	f, err := os.Open(path)
	if err != nil {
		return invalid(err)
	}
	defer f.Close()
	r, err := audit.VerifyExport(ctx, f, func(signed []byte) error {
		_, err := checkpoint.Verify(signed, key)
		return err
	}, nil)
	if err != nil {
		return fmt.Errorf("verify %s: %w", path, err)
	}
	if since != nil && r.Since != *since {
		return fmt.Errorf("verify %s: it does not show that the log continues the checkpoint of %d entries; export it with --since: %w", path, since.Size, checkpoint.ErrProof)
	}
	return a.printExport("verified", path, r)
}

func (a *app) printExport(did, path string, r audit.ExportReport) error {
	if a.json {
		return a.printJSON(exportView{Origin: r.Checkpoint.Origin, From: r.From, To: r.To, Size: r.Checkpoint.Size, Root: r.Checkpoint.Root[:], Since: r.Since.Size})
	}
	fields := [][2]string{
		{did, path},
		{"log", plain(r.Checkpoint.Origin)},
		{"entries", fmt.Sprintf("%d to %d, of %d", r.From, r.To-1, r.Checkpoint.Size)},
		{"root", hexBytes(r.Checkpoint.Root[:]).String()},
	}
	if r.Since.Size > 0 {
		fields = append(fields, [2]string{"continues", fmt.Sprintf("the checkpoint of %s", number(r.Since.Size, "entry", "entries"))})
	}
	return a.printFields(fields)
}

func (a *app) auditExportCmd() *cobra.Command {
	var dir, out, sinceFile string
	var from, to uint64
	c := leaf(&cobra.Command{
		Use:   "export",
		Short: "Write entries with what proves them to one file",
		Long: `Write a range of entries, with the newest checkpoint and the hashes that lead to
it, to one file. On any machine custodianctl audit verify FILE --key PEM checks it.`,
		Example: `  custodianctl audit export --dir /var/lib/custodian/audit --from 1200 --to 1300 --out entries.jsonl`,
	}, cobra.NoArgs, func(ctx context.Context, _ []string) (err error) {
		var since []byte
		if sinceFile != "" {
			if since, err = os.ReadFile(sinceFile); err != nil {
				return invalid(err)
			}
		}
		f, err := os.OpenFile(out, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		if err != nil {
			return invalid(err)
		}
		r, err := audit.Export(ctx, dir, from, to, since, f)
		if err = errors.Join(err, f.Close()); err != nil {
			return fmt.Errorf("export: %w", errors.Join(err, os.Remove(out)))
		}
		return a.printExport("exported", out, r)
	})
	dirFlag(c, &dir)
	f := c.Flags()
	f.Uint64Var(&from, "from", 0, "first entry, by its `INDEX`")
	f.Uint64Var(&to, "to", 0, "end before the entry with this `INDEX`; 0 for all that are signed")
	f.StringVar(&sinceFile, "since", "", "`FILE` with an older checkpoint, to show that the log continues it")
	f.StringVar(&out, "out", "", "`FILE` to write, which must not exist")
	return need(c, "out")
}

// An auditKeyView is the key of the checkpoints in JSON.
type auditKeyView struct {
	PublicKey   string     `json:"public_key"`
	Label       string     `json:"label"`
	ID          hexBytes   `json:"id"`
	TokenSerial string     `json:"token_serial"`
	Attributes  []string   `json:"attributes"`
	CreateTime  *time.Time `json:"create_time,omitempty"`
	Checkpoint  string     `json:"checkpoint"`
}

func (a *app) auditKeyCmd() *cobra.Command {
	return leaf(&cobra.Command{
		Use:   "key",
		Short: "Print the public key of the checkpoints, in PEM, and where it is kept (auditor)",
		Long: `Ask the daemon for the public key that verifies the audit log's checkpoints, and
print it in PEM, with the attributes of its private half in the token as comments
before it. The newest checkpoint is in the JSON.`,
		Example: `  custodianctl audit key > audit.pem`,
	}, cobra.NoArgs, func(ctx context.Context, _ []string) error {
		got, err := ask(ctx, a, func(ctx context.Context, cl *client.Client) (*v1.GetCheckpointResponse, error) {
			return cl.GetCheckpoint(ctx)
		})
		if err != nil {
			return fmt.Errorf("audit key: %w", err)
		}
		k := got.GetSigningKey()
		if a.json {
			return a.printJSON(auditKeyView{PublicKey: string(checkpoint.FormatKey(k.GetPublicKey())), Label: k.GetLabel(), ID: k.GetId(),
				TokenSerial: k.GetTokenSerial(), Attributes: k.GetAttributes(), CreateTime: timeOrNone(k.GetCreateTime()), Checkpoint: string(got.GetCheckpoint())})
		}
		return a.printf("# key %s, CKA_ID %x, token %s\n# %s\n%s", plain(k.GetLabel()), k.GetId(), plain(k.GetTokenSerial()),
			plain(strings.Join(k.GetAttributes(), " ")), checkpoint.FormatKey(k.GetPublicKey()))
	})
}

// A proofView is an inclusion proof in JSON.
type proofView struct {
	Index      uint64     `json:"index"`
	LeafHash   hexBytes   `json:"leaf_hash"`
	Proof      []hexBytes `json:"inclusion_proof"`
	Checkpoint string     `json:"checkpoint"`
	Entry      *entryView `json:"entry"` // null where it was pruned
}

func (a *app) auditProveCmd() *cobra.Command {
	var dir string
	var index, size uint64
	c := leaf(&cobra.Command{
		Use:   "prove",
		Short: "Print the inclusion proof (RFC 6962) of one entry, as JSON",
		Long: `Print the inclusion proof of the entry with the index that a receipt names: the
hashes that lead from its leaf hash to the root of a checkpoint.`,
		Example: `  custodianctl audit prove --dir /var/lib/custodian/audit --index 1234`,
	}, cobra.NoArgs, func(ctx context.Context, _ []string) error {
		p, err := audit.ProveInclusion(ctx, dir, index, size)
		if err != nil {
			return fmt.Errorf("prove: %w", err)
		}
		v := proofView{Index: index, LeafHash: p.LeafHash[:], Proof: []hexBytes{}, Checkpoint: string(p.Checkpoint)}
		if !p.Pruned {
			e := viewEntry(&p.Entry)
			v.Entry = &e
		}
		for i := range p.Hashes {
			v.Proof = append(v.Proof, p.Hashes[i][:])
		}
		return a.printJSON(v)
	})
	dirFlag(c, &dir)
	f := c.Flags()
	f.Uint64Var(&index, "index", 0, "`INDEX` of the entry")
	f.Uint64Var(&size, "size", 0, "to the checkpoint of `N` entries; 0 for the newest")
	return need(c, "index")
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

// A filter picks entries, as flags say it.
type filter struct {
	kid, caller, action, outcome, category, content, keyVersion, request, since, before string

	// sessionFile and userFile name files: what is in them is nobody's business
	// who can list processes.
	sessionFile, userFile string
	session, user         string

	limit int
	audit.Filter
}

func (f *filter) check() error {
	if f.kid != "" {
		kid, err := custodian.ParseKID(f.kid)
		if err != nil {
			return err
		}
		f.KID = kid[:]
	}
	if f.limit < 0 {
		return fmt.Errorf("--limit %d: must be 0 or more", f.limit)
	}
	if f.outcome != "" {
		var ok bool
		if f.Outcome, ok = audit.ParseOutcome(f.outcome); !ok {
			return fmt.Errorf("--outcome %s: must be allowed, denied, failed or begun", plain(f.outcome))
		}
	}
	for _, t := range []struct {
		flag, text string
		to         *time.Time
	}{{"since", f.since, &f.Since}, {"before", f.before, &f.Before}} {
		if t.text == "" {
			continue
		}
		var err error
		if *t.to, err = time.Parse(time.RFC3339, t.text); err != nil {
			return fmt.Errorf("--%s %s: must be a time such as 2026-11-22T16:00:00Z", t.flag, plain(t.text))
		}
	}
	f.Caller, f.Action, f.Category, f.ContentID = f.caller, f.action, f.category, []byte(f.content)
	f.KeyVersion, f.RequestID = f.keyVersion, f.request
	return nil
}

// readViewer reads the IDs of session and user.
func (f *filter) readViewer(stdin io.Reader) error {
	for _, v := range []struct {
		flag, path string
		to         *string
	}{{"session-id-file", f.sessionFile, &f.session}, {"user-id-file", f.userFile, &f.user}} {
		if v.path == "" {
			continue
		}
		var err error
		if *v.to, err = readID(v.flag, v.path, stdin); err != nil {
			return err
		}
	}
	return nil
}

// readID reads the ID of a session or a user from a file, or from standard input
// where the path is -.
func readID(flag, path string, stdin io.Reader) (string, error) {
	in := stdin
	if path != "-" {
		file, err := os.Open(path)
		if err != nil {
			return "", err
		}
		defer file.Close()
		in = file
	}
	b, err := io.ReadAll(io.LimitReader(in, 2*custodian.MaxViewerSize))
	if err != nil {
		return "", err
	}
	id := strings.TrimRight(string(b), "\r\n")
	if id == "" {
		return "", fmt.Errorf("--%s %s: it is empty", flag, path)
	}
	return id, nil
}

func (f *filter) flags(c *cobra.Command) {
	fl := c.Flags()
	fl.StringVar(&f.kid, "kid", "", "only entries about this `KID`: who was given this key")
	fl.StringVar(&f.caller, "caller", "", "only entries of this caller `NAME`: which keys did it get")
	fl.StringVar(&f.action, "action", "", "only this `ACTION`: issue, release, category.create and so on")
	fl.StringVar(&f.outcome, "outcome", "", "only this `OUTCOME`: allowed, denied, failed or begun")
	fl.StringVar(&f.category, "category", "", "only entries about this `CATEGORY`")
	fl.StringVar(&f.content, "content", "", "only entries about this content `ID`")
	fl.StringVar(&f.keyVersion, "key-version", "", "only entries about keys under this key-encryption key, as `CATEGORY/VERSION`")
	fl.StringVar(&f.request, "request-id", "", "only entries of this request `ID`")
	fl.StringVar(&f.since, "since", "", "only entries from this `TIME` on, as 2026-11-22T16:00:00Z")
	fl.StringVar(&f.before, "before", "", "only entries earlier than this `TIME`")
	fl.StringVar(&f.sessionFile, "session-id-file", "", "only entries about the session whose ID is in this `FILE`, - for standard input (from the daemon only)")
	fl.StringVar(&f.userFile, "user-id-file", "", "only entries about the user whose ID is in this `FILE`, - for standard input (from the daemon only)")
	fl.IntVar(&f.limit, "limit", 100, "the newest `N` of them, 0 for all")
	completeWords(c, "outcome", "allowed", "denied", "failed", "begun")
	completeWords(c, "action", "issue", "reissue", "release", "category.create", "category.freeze", "category.open", "backup")
}

func (a *app) auditListCmd() *cobra.Command {
	var dir string
	var follow, open bool
	var f filter
	c := leaf(&cobra.Command{
		Use:   "list",
		Short: "Print the newest entries of a log, oldest first",
		Long: `Print the newest entries of an audit log, oldest first; with --json one object a
line. What the log says is not checked: custodianctl audit verify does that. With
--follow it goes on with those that are written, until it is interrupted.

Administrative actions are in the log before they begin and after they end. With
--unfinished only those are listed that have begun and of whose end nobody knows:
it is not written, or by the next start, because the daemon was killed.`,
		Example: `  custodianctl audit list --dir /var/lib/custodian/audit --action release --limit 0 --json
  custodianctl audit list --dir DIR --kid KID --action release --outcome allowed --limit 0     who was given this key
  custodianctl audit list --dir DIR --caller NAME --action release --outcome allowed --limit 0 which keys did it get
  custodianctl audit list --dir DIR --key-version movies/1 --limit 0                           all under this version
  custodianctl audit list --session-id-file session.txt                                        what this session got`,
	}, cobra.NoArgs, func(ctx context.Context, _ []string) error {
		if err := f.check(); err != nil {
			return invalid(err)
		}
		if err := f.readViewer(os.Stdin); err != nil {
			return invalid(err)
		}
		if f.session+f.user != "" && dir != "" {
			return invalid(errors.New("only the daemon has the key to find a session or a user: leave --dir out"))
		}
		if open && (follow || f.outcome != "" || f.session+f.user != "") {
			return invalid(errors.New("--unfinished: not together with --follow, --outcome, a session or a user"))
		}
		if follow {
			if dir != "" {
				return invalid(errors.New("--follow asks the daemon: leave --dir out"))
			}
			return a.follow(ctx, &f)
		}
		asked := &f
		if open { // the ends are needed, too, whatever they are about
			asked = &filter{Filter: audit.Filter{Since: f.Since}}
		}
		read := func(fn func(*audit.Entry) error) error { return audit.Read(dir, 0, fn) }
		if dir == "" {
			read = func(fn func(*audit.Entry) error) error { return a.readFromDaemon(ctx, asked, fn) }
		}
		if open {
			read = unfinished(read)
		}
		entries, err := newest(ctx, read, &f)
		if err == nil && dir != "" {
			err = a.notePruned(dir)
		}
		if err != nil {
			return fmt.Errorf("read: %w", err)
		}
		if a.json {
			return a.printEntries(entries...)
		}
		rows := make([][]string, 0, len(entries))
		for _, e := range entries {
			rows = append(rows, entryRow(e))
		}
		return a.printTable([]string{"INDEX", "TIME", "OUTCOME", "ACTION", "CALLER", "ABOUT"}, rows)
	})
	c.Flags().StringVar(&dir, "dir", "", "`DIR`ectory of the log; without it the daemon is asked (auditor)")
	c.Flags().BoolVar(&open, "unfinished", false, "only actions that have begun and of whose end nobody knows")
	c.Flags().BoolVar(&follow, "follow", false, "go on with the entries that are written (from the daemon only)")
	f.flags(c)
	return c
}

// unfinished makes of what reads a log what reads those of its attempts whose
// end nobody has seen.
func unfinished(read func(func(*audit.Entry) error) error) func(func(*audit.Entry) error) error {
	return func(fn func(*audit.Entry) error) error {
		begun := map[uint64]*audit.Entry{}
		err := read(func(e *audit.Entry) error {
			if e.Outcome == audit.Begun {
				begun[e.Index] = e
			}
			if e.HasAttempt && e.Reason != custodian.ReasonInterrupted {
				delete(begun, e.Attempt)
			}
			return nil
		})
		for _, i := range slices.Sorted(maps.Keys(begun)) {
			if err == nil {
				err = fn(begun[i])
			}
		}
		return err
	}
}

func entryRow(e *audit.Entry) []string {
	return []string{strconv.FormatUint(e.Index, 10), stamp(e.Time), outcome(e), plain(e.Action), orDash(e.Caller), about(e)}
}

// printEntries prints entries as lines: of JSON, or without columns, whose
// widths nobody knows before the last entry.
func (a *app) printEntries(entries ...*audit.Entry) error {
	enc := json.NewEncoder(a.out)
	enc.SetEscapeHTML(false)
	for _, e := range entries {
		if !a.json {
			if err := a.printf("%s\n", strings.Join(entryRow(e), "  ")); err != nil {
				return err
			}
			continue
		}
		if err := enc.Encode(viewEntry(e)); err != nil {
			return err
		}
	}
	return nil
}

// follow prints the newest entries, and then those that are written.
func (a *app) follow(ctx context.Context, f *filter) error {
	var size uint64
	entries, err := newest(ctx, func(fn func(*audit.Entry) error) error {
		cp, err := ask(ctx, a, func(ctx context.Context, cl *client.Client) (*v1.GetCheckpointResponse, error) {
			return cl.GetCheckpoint(ctx)
		})
		if err != nil {
			return err
		}
		c, err := checkpoint.Parse(cp.GetCheckpoint())
		if err != nil {
			return err
		}
		size = c.Size
		return a.readFromDaemon(ctx, f, func(e *audit.Entry) error {
			if e.Index >= size {
				return nil // it comes with those that follow
			}
			return fn(e)
		})
	}, f)
	if err == nil {
		err = a.printEntries(entries...)
	}
	if err != nil {
		return fmt.Errorf("read: %w", err)
	}
	cl, err := a.connect(ctx)
	if err != nil {
		return err
	}
	defer cl.Close()
	req := &v1.FollowEntriesRequest{Query: f.query()}
	req.Query.FromIndex = size
	for pause := 100 * time.Millisecond; ; pause = min(2*pause, 10*time.Second) {
		err := cl.FollowAuditEntries(ctx, req, func(b []byte) error {
			pause = 100 * time.Millisecond
			e, err := audit.UnmarshalEntry(b)
			if err != nil {
				return err
			}
			req.Query.FromIndex = e.Index + 1
			return a.printEntries(&e)
		})
		if ctx.Err() != nil {
			return nil // interrupted, as it is meant to end
		}
		// What a daemon that stops, or asks for a new connection, has ended, goes on
		// from where it was.
		if e, ok := errors.AsType[*client.Error](err); err != nil && (!ok || e.Code != codes.Unavailable) {
			return fmt.Errorf("follow: %w", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
	}
}

// newest returns the last entries that f wants, in the order of the log.
func newest(ctx context.Context, read func(func(*audit.Entry) error) error, f *filter) ([]*audit.Entry, error) {
	var kept []*audit.Entry
	err := read(func(e *audit.Entry) error {
		if !f.Match(e) {
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

// readFromDaemon calls fn with every entry that f picks, page by page.
func (a *app) readFromDaemon(ctx context.Context, f *filter, fn func(*audit.Entry) error) error {
	cl, err := a.connect(ctx)
	if err != nil {
		return err
	}
	defer cl.Close()
	req := f.query()
	for {
		bounded, cancel := a.bounded(ctx)
		resp, err := cl.ListAuditEntries(bounded, req)
		cancel()
		if err != nil {
			return err
		}
		for _, b := range resp.GetEntries() {
			e, err := audit.UnmarshalEntry(b)
			if err != nil {
				return err
			}
			if err := fn(&e); err != nil {
				return err
			}
		}
		if n := resp.GetPrunedBeforeIndex(); n > 0 && req.FromIndex == 0 { // once
			if err := a.notePrunedBefore(n); err != nil {
				return err
			}
		}
		if req.FromIndex = resp.GetNextIndex(); req.FromIndex == 0 {
			return nil
		}
	}
}

// query is the filter for the daemon. The numbers of the outcomes are the same
// here and there.
func (f *filter) query() *v1.ListEntriesRequest {
	req := &v1.ListEntriesRequest{PageSize: 1000, Caller: f.Caller, Action: f.Action, Outcome: v1.AuditOutcome(f.Outcome), Category: f.Category,
		ContentId: f.ContentID, Kid: f.KID, KeyVersion: f.KeyVersion, SessionId: f.session, UserId: f.user}
	if !f.Since.IsZero() {
		req.SinceTime = timestamppb.New(f.Since)
	}
	if !f.Before.IsZero() {
		req.BeforeTime = timestamppb.New(f.Before)
	}
	return req
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
	if e.HasAttempt {
		parts = append(parts, fmt.Sprintf("ends %d", e.Attempt))
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
	Attempt         *uint64   `json:"attempt,omitempty"` // index of the entry that says that it begins
	Refs            []refView `json:"refs,omitempty"`
	Salt            hexBytes  `json:"salt"`
}

// A refView is a keyed hash in the place of a session or a user, in JSON.
type refView struct {
	Kind       string   `json:"kind"`
	KeyVersion uint32   `json:"key_version"`
	MAC        hexBytes `json:"mac"`
}

func viewEntry(e *audit.Entry) entryView {
	v := entryView{
		Index: e.Index, Time: e.Time.UTC(), Action: e.Action, Outcome: e.Outcome.String(), Reason: e.Reason, Caller: e.Caller, Role: e.Role,
		RequestID: e.RequestID, Category: e.Category, ContentID: readable(e.ContentID), ContentIDHex: e.ContentID, TrackType: e.TrackType,
		Scheme: e.Scheme, Generation: e.Generation, KID: e.KID, KeyVersion: e.KeyVersion, ControlRevision: e.ControlRevision,
		ControlDigest: e.ControlDigest, StoreSequence: e.StoreSequence, Count: e.Count, Detail: e.Detail, Salt: e.Salt[:],
	}
	for i := range e.Refs {
		r := &e.Refs[i]
		v.Refs = append(v.Refs, refView{r.Kind, r.KeyVersion, r.MAC[:]})
	}
	if e.HasAttempt {
		v.Attempt = &e.Attempt
	}
	if e.HasPeriod {
		v.Period = &e.Period
	}
	return v
}
