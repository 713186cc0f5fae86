package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/audit"
	"github.com/keycustody/custodian/internal/checkpoint"
)

// A prunedView is a pruned segment in JSON.
type prunedView struct {
	Segment   uint32    `json:"segment"`
	First     uint64    `json:"first_index"`
	Entries   uint64    `json:"entries"`
	Kept      uint64    `json:"kept"`
	FirstTime time.Time `json:"first_time"`
	LastTime  time.Time `json:"last_time"`
	PruneTime time.Time `json:"prune_time"`
	// Recorded is the index of the newest entry that tells of the pruning, in
	// what verify prints: null where there is none.
	Recorded *uint64 `json:"recorded_by,omitempty"`
}

func viewPruned(pruned []audit.Pruned) []prunedView {
	v := []prunedView{}
	for _, p := range pruned {
		v = append(v, prunedView{p.Segment, p.First, p.Entries, p.Kept, p.From, p.To, p.At.UTC(), nil})
	}
	return v
}

// prunedBy finds for each pruned segment the newest entry of the log that tells
// of its pruning.
func prunedBy(ctx context.Context, dir string, pruned []audit.Pruned) ([]prunedView, error) {
	v := viewPruned(pruned)
	if len(v) == 0 {
		return v, nil
	}
	err := audit.Read(dir, 0, func(e *audit.Entry) error {
		for i := range pruned {
			if custodian.RecordsPrune(e, pruned[i]) {
				v[i].Recorded = &e.Index
			}
		}
		return ctx.Err()
	})
	return v, err
}

func (p prunedView) String() string {
	by := "NOT RECORDED: no entry of the log tells of it"
	if p.Recorded != nil {
		by = fmt.Sprintf("recorded by entry %d", *p.Recorded)
	}
	return fmt.Sprintf("segment %d: entries %d to %d, of which %d are kept; on %s; %s", p.Segment, p.First, p.First+p.Entries-1, p.Kept, stamp(p.PruneTime), by)
}

// entriesText says how many entries were verified, and in what.
func entriesText(r *audit.Report) string {
	in := fmt.Sprintf("in %s, %s, %s", number(r.Batches, "batch", "batches"), number(uint64(r.Segments), "segment", "segments"), bytesText(r.Bytes))
	if r.From > 0 {
		return fmt.Sprintf("%d to %d, %s; the earlier ones by their checkpoint", r.From, r.Entries-1, in)
	}
	return fmt.Sprintf("%d, %s", r.Entries, in)
}

func (a *app) auditPruneCmd() *cobra.Command {
	var dir, keyFile, archive string
	var keep int
	var older time.Duration
	var dry bool
	c := leaf(&cobra.Command{
		Use:   "prune",
		Short: "Replace sealed segments of a log by the hashes of their entries",
		Long: `Replace sealed segments of an audit log, oldest first, by the hashes of their
entries. Proofs and custodianctl audit verify work on; which keys were released is
gone, and so are denials and failures. All other entries stay.

A segment goes where --keep-segments and --older-than both let it, and only if it
verifies. The daemon may run: it notices, and writes it down. With audit.keep_segments
or audit.keep_for in its configuration it does the same by itself.`,
		Example: `  custodianctl audit prune --dir /var/lib/custodian/audit --older-than 9600h --archive /mnt/archive --key audit.pem --dry-run`,
	}, cobra.NoArgs, func(ctx context.Context, _ []string) error {
		if keep < 0 || older < 0 || keep == 0 && older == 0 {
			return invalid(errors.New("say what stays by --keep-segments, --older-than or both"))
		}
		now := time.Now()
		o := audit.PruneOptions{Whole: keep, Keep: custodian.KeepInLog, Archive: archive, Rehearse: dry, Now: now}
		if older > 0 {
			o.Before = now.Add(-older)
		}
		if keyFile != "" {
			key, err := readAuditKey(keyFile)
			if err != nil {
				return err
			}
			o.Check = func(signed []byte) error {
				_, err := checkpoint.Verify(signed, key)
				return err
			}
		}
		pruned, err := audit.Prune(ctx, dir, o)
		if perr := a.printPruned(pruned, dry); err == nil {
			err = perr
		}
		if err != nil {
			return fmt.Errorf("prune: %w", err)
		}
		return nil
	})
	dirFlag(c, &dir)
	f := c.Flags()
	f.IntVar(&keep, "keep-segments", 0, "`N` of the newest sealed segments stay")
	f.DurationVar(&older, "older-than", 0, "segments with an entry younger than this `DURATION` stay")
	f.StringVar(&archive, "archive", "", "`DIR`ectory that gets each segment before it goes")
	f.StringVar(&keyFile, "key", "", "`FILE` with the public key of the checkpoints, to check each segment with before it goes")
	f.BoolVar(&dry, "dry-run", false, "only print what would go")
	return c
}

// notePruned says which entries cannot be listed any more, so that nobody takes
// a list for the whole truth.
func (a *app) notePruned(dir string) error {
	pruned, err := audit.ListPruned(dir)
	if err != nil || len(pruned) == 0 {
		return err
	}
	last := pruned[len(pruned)-1]
	return a.notePrunedBefore(last.First + last.Entries)
}

func (a *app) notePrunedBefore(index uint64) error {
	_, err := fmt.Fprintf(a.err, "note: entries 0 to %d are pruned: of these, releases, denials and failures are not listed\n", index-1)
	return err
}

func (a *app) printPruned(pruned []audit.Pruned, dry bool) error {
	if a.json {
		return a.printJSON(viewPruned(pruned))
	}
	rows := make([][]string, 0, len(pruned))
	for _, p := range pruned {
		rows = append(rows, []string{fmt.Sprint(p.Segment), fmt.Sprintf("%d to %d", p.First, p.First+p.Entries-1), fmt.Sprint(p.Kept), stamp(p.From), stamp(p.To)})
	}
	did := "PRUNED"
	if dry {
		did = "WOULD GO"
	}
	return a.printTable([]string{did, "ENTRIES", "KEPT", "FROM", "TO"}, rows)
}

// A consistencyFile is a consistency proof (RFC 6962, section 2.1.2) that stands
// for itself but for the checkpoints.
type consistencyFile struct {
	Format string     `json:"format"`
	Old    string     `json:"old_checkpoint"`
	New    string     `json:"new_checkpoint"`
	Proof  []hexBytes `json:"consistency_proof"`
}

const consistencyFormat = "custodian-audit-consistency/1"

func (a *app) auditConsistencyCmd() *cobra.Command {
	var dir, proof, keyFile string
	c := leaf(&cobra.Command{
		Use:   "consistency OLD NEW",
		Short: "Prove, or check, that one checkpoint continues another; exit code 7 if it does not",
		Long: `Prove from a log that the log of the checkpoint in the file OLD is the beginning of
the log of the one in NEW, and print the proof (RFC 6962) as JSON. With --proof,
check a proof that was printed so, with nothing but the key.`,
		Example: `  custodianctl audit consistency monday.txt friday.txt --dir /var/lib/custodian/audit --key audit.pem > proof.json
  custodianctl audit consistency monday.txt friday.txt --proof proof.json --key audit.pem`,
	}, cobra.ExactArgs(2), func(ctx context.Context, args []string) error {
		if (dir == "") == (proof == "") {
			return invalid(errors.New("name a log by --dir, or a proof by --proof"))
		}
		key, err := readAuditKey(keyFile)
		if err != nil {
			return err
		}
		var c [2]checkpoint.Checkpoint
		var signed [2][]byte
		for i, path := range args {
			if c[i], signed[i], err = readCheckpoint(path, key); err != nil {
				return fmt.Errorf("consistency: %w", err)
			}
		}
		file := consistencyFile{Format: consistencyFormat, Old: string(signed[0]), New: string(signed[1]), Proof: []hexBytes{}}
		if proof != "" {
			return a.checkConsistency(proof, file, c[0], c[1])
		}
		hashes, err := proveConsistency(ctx, dir, c[0], c[1])
		if err != nil {
			return fmt.Errorf("consistency: %w", err)
		}
		for i := range hashes {
			file.Proof = append(file.Proof, hashes[i][:])
		}
		return a.printJSON(file)
	})
	f := c.Flags()
	f.StringVar(&dir, "dir", "", "`DIR`ectory of the log")
	f.StringVar(&proof, "proof", "", "`FILE` with a proof, to be checked without the log")
	f.StringVar(&keyFile, "key", "", "`FILE` with the public key of the checkpoints, in PEM")
	c.ValidArgsFunction = nil
	return need(c, "key")
}

func proveConsistency(ctx context.Context, dir string, old, new checkpoint.Checkpoint) ([][32]byte, error) {
	if old.Size == 0 || old.Size >= new.Size {
		return nil, new.CheckConsistency(old, nil)
	}
	hashes, _, err := audit.ProveConsistency(ctx, dir, old.Size, new.Size)
	if err != nil {
		return nil, err
	}
	return hashes, new.CheckConsistency(old, hashes)
}

func (a *app) checkConsistency(path string, want consistencyFile, old, new checkpoint.Checkpoint) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return invalid(err)
	}
	var got consistencyFile
	if err := json.Unmarshal(b, &got); err != nil || got.Format != consistencyFormat {
		return fmt.Errorf("consistency %s: not a proof of the form %s: %w", path, consistencyFormat, checkpoint.ErrMalformed)
	}
	if got.Old != want.Old || got.New != want.New {
		return fmt.Errorf("consistency %s: it is about other checkpoints: %w", path, checkpoint.ErrProof)
	}
	hashes := make([][32]byte, len(got.Proof))
	for i, h := range got.Proof {
		if len(h) != len(hashes[i]) {
			return fmt.Errorf("consistency %s: a hash of %d bytes: %w", path, len(h), checkpoint.ErrMalformed)
		}
		hashes[i] = [32]byte(h)
	}
	if err := new.CheckConsistency(old, hashes); err != nil {
		return fmt.Errorf("consistency %s: %w", path, err)
	}
	return a.printFields([][2]string{
		{"consistent", plain(new.Origin)},
		{"entries", fmt.Sprintf("the first %d of %d are the same", old.Size, new.Size)},
	})
}
