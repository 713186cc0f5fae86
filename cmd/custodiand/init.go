package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/audit"
	"github.com/keycustody/custodian/kms"
	"github.com/keycustody/custodian/store"
)

// initCustody makes a new custody: the MEK, the helper and signing keys, an
// empty store and the first entries of the audit log. Run again after a
// crash, it goes on where it stopped. Without a genesis there are no officers.
func initCustody(ctx context.Context, c *Config, genesis *custodian.Genesis, log *slog.Logger) (err error) {
	policy, err := c.policy(nil)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(c.DataDir, 0o700); err != nil {
		return err
	}
	var p parts
	defer func() { err = errors.Join(err, p.close(context.WithoutCancel(ctx))) }()
	if err := p.openProviders(ctx, c); err != nil {
		return err
	}
	if p.token, err = openToken(ctx, c, log); err != nil {
		return err
	}
	if err := p.createStore(ctx, c, log); err != nil {
		return err
	}
	return custodian.Init(ctx, p.config(c, policy, log), custodian.InitSpec{Profile: custodian.MEKProfile(c.HSM.MEKProfile), Genesis: genesis, AuditSigning: c.Audit.Signing})
}

// createStore makes store and audit log, or opens those of an init that was
// interrupted. Which of the two it is, Init finds out: it refuses a store
// with a head.
func (p *parts) createStore(ctx context.Context, c *Config, log *slog.Logger) error {
	have, err := exists(c.storePath())
	if err != nil {
		return err
	}
	haveLog, err := exists(c.auditFile())
	if err != nil {
		return err
	}
	if !have {
		// What is refused is refused before anything is made.
		if haveLog {
			return fmt.Errorf("%s is the audit log of a custody whose store is not here; restore the store (custodiand restore), or move the log away", c.auditDir())
		}
		if err := custodian.RefuseForeign(ctx, kms.Token(p.token), c.HSM.LabelPrefix); err != nil {
			return err
		}
	}
	if have {
		p.store, err = store.Open(ctx, c.storePath(), store.Options{Log: log})
	} else {
		p.store, err = store.Create(ctx, c.storePath(), store.Options{Log: log})
	}
	if err != nil {
		return fmt.Errorf("store: %w", err)
	}
	err = p.store.View(ctx, func(tx custodian.Tx) error {
		_, err := tx.Head()
		return err
	})
	if err == nil {
		return fmt.Errorf("%s is initialised already; init makes a new custody and never touches an old one", c.storePath())
	}
	if !errors.Is(err, custodian.ErrNotFound) {
		return err
	}
	if haveLog {
		p.log, err = audit.Open(c.auditDir(), c.auditOptions(p.logged.Visit, log))
	} else {
		p.log, err = audit.Create(c.auditDir(), c.auditOptions(nil, log))
	}
	if err != nil {
		return fmt.Errorf("audit log: %w", err)
	}
	if p.logged.Revision > 0 {
		return fmt.Errorf("%s is the audit log of another custody (control revision %d), and its store is not here; restore the store (custodiand restore), or move the log away", c.auditDir(), p.logged.Revision)
	}
	return nil
}
