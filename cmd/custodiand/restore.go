package main

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"

	"filippo.io/age"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/audit"
	"github.com/keycustody/custodian/store"
)

func restoreCommand(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	fs, path := flags("custodiand restore", stderr)
	from := fs.String("from", "", "backup file, as custodianctl backup create wrote it")
	identity := fs.String("identity", "", "file with the age identity that the backup is encrypted to")
	plan := fs.String("plan", "", "plan of kind restore, where the backup has officers")
	var approvals []string
	fs.Func("approval", "what custodianctl ceremony sign wrote for an officer, again for each", func(s string) error { approvals = append(approvals, s); return nil })
	if err := parse(fs, args); err != nil {
		return err
	}
	if *from == "" || *identity == "" {
		return usageError{errors.New("-from BACKUP and -identity FILE are needed")}
	}
	c, err := loadFlagged(*path)
	if err != nil {
		return err
	}
	order, err := readRestoreOrder(*plan, approvals, *from)
	if err != nil {
		return usageError{err}
	}
	report, err := restore(ctx, c, *from, *identity, order, c.logger(stderr))
	if err != nil {
		return fmt.Errorf("restore: %w", err)
	}
	enc := json.NewEncoder(stdout)
	enc.SetIndent("", "  ")
	return enc.Encode(report)
}

// restore puts a backup back where no store is. The store is worked on under
// another name and takes its place last, so that an interrupted restore is
// simply run again.
func restore(ctx context.Context, c *Config, from, identity string, order *custodian.RestoreOrder, log *slog.Logger) (rep custodian.RestoreReport, err error) {
	policy, err := c.policy(nil)
	if err != nil {
		return rep, err
	}
	if have, err := exists(c.storePath()); err != nil {
		return rep, err
	} else if have {
		return rep, fmt.Errorf("%s is there; a restore goes only into an empty place. Move it away first, if you mean it", c.storePath())
	}
	if err := os.MkdirAll(c.DataDir, 0o700); err != nil {
		return rep, err
	}
	work := c.storePath() + ".restoring"
	if err := decryptBackup(from, identity, work); err != nil {
		return rep, err
	}
	var p parts
	closed := false
	defer func() {
		if !closed {
			err = errors.Join(err, p.close(context.WithoutCancel(ctx)))
		}
	}()
	if p.store, err = store.Open(ctx, work, store.Options{Log: log}); err != nil {
		return rep, fmt.Errorf("the backup's store: %w", err)
	}
	if err := p.store.Check(ctx); err != nil {
		return rep, fmt.Errorf("the backup's store: %w", err)
	}
	if err := p.openLogForRestore(c, log); err != nil {
		return rep, fmt.Errorf("audit log: %w", err)
	}
	if err := p.openProviders(ctx, c); err != nil {
		return rep, err
	}
	if p.token, err = openToken(ctx, c, log); err != nil {
		return rep, err
	}
	cfg := p.config(c, policy, log)
	cfg.RestoreOrder = order
	if rep, err = custodian.Restore(ctx, cfg); err != nil {
		return rep, err
	}
	closed = true
	if err := p.close(ctx); err != nil {
		return rep, err
	}
	if err := os.Rename(work, c.storePath()); err != nil {
		return rep, err
	}
	return rep, syncDir(c.DataDir)
}

// readRestoreOrder reads the plan of a restore, what the officers have signed, and
// the digest of the backup; nil where there is no plan.
func readRestoreOrder(plan string, approvals []string, from string) (*custodian.RestoreOrder, error) {
	signed, err := readGenesis(plan, approvals)
	if err != nil || signed == nil {
		return nil, err
	}
	o := &custodian.RestoreOrder{Plan: signed.Plan, Approvals: signed.Approvals}
	f, err := os.Open(from)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return nil, fmt.Errorf("backup %s: %w", from, err)
	}
	o.SHA256 = [32]byte(h.Sum(nil))
	return o, nil
}

// openLogForRestore opens the audit log, which knows what the backup lacks,
// or begins a new one where it was lost, too.
func (p *parts) openLogForRestore(c *Config, log *slog.Logger) error {
	have, err := exists(c.auditFile())
	if err != nil {
		return err
	}
	p.logged.TrackKIDs = true
	if have {
		p.log, err = audit.Open(c.auditDir(), c.auditOptions(p.logged.Visit, log))
	} else {
		log.Warn("no audit log is here; a new one begins, and what was issued after the backup cannot be listed", "dir", c.auditDir())
		p.log, err = audit.Create(c.auditDir(), c.auditOptions(nil, log))
	}
	return err
}

// decryptBackup writes the clear store of a backup to path, durably. What an
// earlier, interrupted restore left there is replaced.
func decryptBackup(from, identity, path string) (err error) {
	key, err := openPrivate(identity)
	if err != nil {
		return fmt.Errorf("identity: %w", err)
	}
	defer key.Close()
	ids, err := age.ParseIdentities(key)
	if err != nil {
		return fmt.Errorf("identity %s: %w", identity, err)
	}
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	clear, err := age.Decrypt(in, ids...)
	if err != nil {
		return fmt.Errorf("backup %s: %w", from, err)
	}
	out, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := out.Close(); err == nil {
			err = cerr
		}
	}()
	if _, err := io.Copy(out, clear); err != nil {
		return fmt.Errorf("backup %s: %w", from, err)
	}
	if err := out.Sync(); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
