package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/hsm"
	"github.com/keycustody/custodian/internal/audit"
	"github.com/keycustody/custodian/kms"
	"github.com/keycustody/custodian/store"
)

// parts are what a Custodian stands on, opened in this order and closed in
// the opposite one.
type parts struct {
	token     *hsm.Token
	providers []custodian.Provider
	store     *store.Store
	log       *audit.Log
	logged    custodian.Logged
}

// openToken loads the module and logs in, once: a PIN that failed is never
// tried again by itself.
func openToken(ctx context.Context, c *Config, log *slog.Logger) (*hsm.Token, error) {
	if c.HSM.SoftHSMConf != "" {
		if err := os.Setenv("SOFTHSM2_CONF", c.HSM.SoftHSMConf); err != nil {
			return nil, err
		}
	}
	return hsm.Open(ctx, hsm.Config{Module: c.HSM.Module, Token: c.HSM.Token, PINFile: c.HSM.PINFile, MaxSessions: c.HSM.MaxSessions,
		LatchFile: c.latchPath(), Profile: c.HSM.Profile, CallTimeout: c.HSM.CallTimeout, DrainTimeout: c.HSM.DrainTimeout,
		OnFatal: func(err error) {
			log.Error("a call to the token hangs and cannot be cancelled; this process ends so that a new one can begin", "err", err)
			os.Exit(exitHung)
		}, Log: log})
}

func (p *parts) openProviders(ctx context.Context, c *Config) error {
	for _, pc := range c.KMS.Providers {
		provider, err := kms.Open(ctx, pc)
		if err != nil {
			return fmt.Errorf("kms provider %s: %w", pc.Name, err)
		}
		p.providers = append(p.providers, provider)
	}
	return nil
}

// openStore opens store and audit log of an initialised custody. trackKIDs is
// for a restore.
func (p *parts) openStore(ctx context.Context, c *Config, log *slog.Logger) error {
	var err error
	if p.store, err = store.Open(ctx, c.storePath(), store.Options{Log: log}); err != nil {
		return fmt.Errorf("store: %w", err)
	}
	if p.log, err = audit.Open(c.auditDir(), c.auditOptions(p.logged.Visit, log)); err != nil {
		if errors.Is(err, os.ErrNotExist) {
			err = fmt.Errorf("%s has a store without its audit log; put the log back, or restore from a backup into an empty place: %w: %w", c.DataDir, err, custodian.ErrLogRollback)
		}
		return fmt.Errorf("audit log: %w", err)
	}
	return nil
}

// config of the domain on these parts.
func (p *parts) config(c *Config, policy *custodian.Policy, log *slog.Logger) custodian.Config {
	deadlines := map[string]time.Duration{}
	for _, p := range c.KMS.Providers {
		deadlines[p.Name] = p.Deadline
	}
	hot := map[custodian.CategoryName]time.Duration{}
	for name, life := range c.Limits.HotTitles {
		hot[custodian.CategoryName(name)] = life
	}
	return custodian.Config{Store: p.store, HSM: kms.Token(p.token), Providers: p.providers, Audit: p.log, Logged: p.logged, Policy: policy,
		Now: time.Now, Log: log, LabelPrefix: c.HSM.LabelPrefix, AuditName: c.Audit.Name, DefaultProviders: c.KMS.Default, KEKLifetime: c.Limits.KEKLifetime,
		ReleaseDeadline: c.Limits.CallbackDeadline, HotTitles: hot,
		KMS:          custodian.KMSLimits{Deadline: c.KMS.Deadline, Deadlines: deadlines, Grace: *c.KMS.Grace, GraceCeiling: c.KMS.GraceCeiling, RewrapRate: c.KMS.RewrapRate},
		ConfigDigest: c.digest, RotationRate: c.Limits.RotationRate,
		Events: custodian.EventLimits{DailyCap: c.Events.DailyCap, MinInterval: c.Events.MinInterval}}
}

// close closes what is open, last first. ctx bounds the drain of the token.
func (p *parts) close(ctx context.Context) error {
	var errs []error
	if p.log != nil {
		errs = append(errs, p.log.Close())
	}
	if p.store != nil {
		errs = append(errs, p.store.Close())
	}
	for _, pr := range p.providers {
		errs = append(errs, pr.Close())
	}
	if p.token != nil {
		errs = append(errs, p.token.Close(ctx))
	}
	*p = parts{}
	return errors.Join(errs...)
}

// exists tells whether something is at path, and whether that is known.
func exists(path string) (bool, error) {
	_, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}
