package custodian

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"filippo.io/age"

	"github.com/keycustody/custodian/internal/audit"
)

const actionRestored = "restore"

// Backup writes the store to w, encrypted to an age X25519 recipient, while
// service goes on. The copy holds no key in clear, but it is encrypted all
// the same: content IDs and KIDs are nobody else's business.
func (c *Custodian) Backup(ctx context.Context, who Caller, recipient string, w io.Writer) error {
	d := c.decide(who, ActionBackup, Resource{})
	if !d.Allow {
		return c.refuse(ctx, who, d, ActionBackup, ref{})
	}
	to, err := age.ParseX25519Recipient(recipient)
	if err != nil {
		// Not err: it repeats what was given, which may be the private identity.
		return invalid("recipient", errors.New("it must be an age X25519 recipient, age1…"))
	}
	e := c.entry(c.set.Load(), who, d, ActionBackup, "", ref{}, nil)
	e.Detail = "to " + recipient
	begun, err := c.begin(ctx, e)
	if err != nil {
		return err
	}
	if err = c.backup(ctx, to, w); err != nil {
		e.Outcome, e.Reason = audit.Failed, string(ReasonOf(deadline(ctx, err)))
	}
	_, aerr := c.record(ctx, begun.end(e))
	return errors.Join(err, aerr)
}

// backup writes the store to w for a recipient.
func (c *Custodian) backup(ctx context.Context, to *age.X25519Recipient, w io.Writer) error {
	sealed, err := age.Encrypt(w, to)
	if err != nil {
		return fmt.Errorf("backup: %w", err)
	}
	if err := c.store.Backup(ctx, sealed); err != nil {
		return fmt.Errorf("backup: %w", err)
	}
	return sealed.Close()
}

// A RestoreReport says what a restored store lacks.
type RestoreReport struct {
	Revision uint64 `json:"control_revision"` // after the restore
	// MissingKIDs were handed out after the backup was made; their CEKs are
	// lost to this store.
	MissingKIDs []MissingKey `json:"missing_kids"`
	// LostChanges of the control set were made after the backup: freezes and
	// exceptions among them must be made again.
	LostChanges []ControlChange `json:"lost_control_changes"`
	Rotated     []KEKID         `json:"rotated_keks"`
	// Closed KEKs have no successor, because the MEK is past its year. They
	// release, and nothing is issued under them until the MEK is rotated.
	Closed []KEKID `json:"closed_keks,omitempty"`
	// Frozen categories were frozen or restricted after the backup, and are so
	// again.
	Frozen []CategoryName `json:"frozen_categories"`
	// Destroyed KEK versions were destroyed after the backup, and are so again.
	Destroyed []DestroyedKEK `json:"destroyed_keks,omitempty"`
	// DestroyedMEKs were destroyed after the backup, and are so again. Nothing of
	// the backup needs them.
	DestroyedMEKs []uint32 `json:"destroyed_meks,omitempty"`
	// FrozenCallers were frozen after the backup, and are so again.
	FrozenCallers []string `json:"frozen_callers"`
	// Revoked sessions and issuers were revoked after the backup, and are so
	// again; LostRevocations cannot be.
	Revoked         []string         `json:"revoked,omitempty"`
	LostRevocations []LostRevocation `json:"lost_revocations,omitempty"`
}

// A MissingKey is a KID that the audit log knows and the store does not.
type MissingKey struct {
	KID KID   `json:"kid"`
	KEK KEKID `json:"kek"`
}

// Restore finishes a restore in a store that was just put back from a backup
// and that nothing serves from yet: every category gets a new KEK version, so
// that no GCM invocation that the backup does not know is ever repeated under
// its key; the log is told where the store stands now; and what was lost is
// listed. cfg.Logged must have tracked KIDs.
func Restore(ctx context.Context, cfg Config) (RestoreReport, error) {
	cfg.Restored = true
	c, err := Open(ctx, cfg)
	if err != nil {
		return RestoreReport{}, err
	}
	defer c.Close()
	e := audit.Entry{Action: "custody.restore", Outcome: audit.Allowed, ControlRevision: c.set.Load().head.Revision}
	if err := c.set.Load().approvedRestore(cfg.RestoreOrder, cfg.Logged, c.now()); err != nil {
		return RestoreReport{}, c.refuseRestore(ctx, e, err)
	}
	begun, err := c.begin(ctx, e)
	if err != nil {
		return RestoreReport{}, err
	}
	rep, err := c.restore(ctx, cfg)
	if err != nil {
		e.Outcome, e.Reason = audit.Failed, string(ReasonOf(err))
	}
	e.ControlRevision = c.set.Load().head.Revision
	e.Detail = fmt.Sprintf("%d keys missing, %d control changes lost", len(rep.MissingKIDs), len(rep.LostChanges))
	_, aerr := c.record(ctx, begun.end(e))
	return rep, errors.Join(err, aerr)
}

// restore is Restore in a custody that is open.
func (c *Custodian) restore(ctx context.Context, cfg Config) (RestoreReport, error) {
	var rep RestoreReport
	backup := c.set.Load().head.Revision
	if err := c.adoptRevision(ctx, cfg.Logged.Revision, cfg.RestoreOrder); err != nil {
		return rep, err
	}
	if err := c.retireKEKs(ctx, cfg.Logged, &rep); err != nil {
		return rep, err
	}
	if err := c.destroyAgain(ctx, cfg.Logged, backup, &rep); err != nil {
		return rep, err
	}
	if err := c.destroyMEKsAgain(ctx, cfg.Logged, backup, &rep); err != nil {
		return rep, err
	}
	if err := c.freezeAgain(ctx, cfg.Logged, backup, &rep); err != nil {
		return rep, err
	}
	if err := c.freezeCallersAgain(ctx, cfg.Logged, backup, &rep); err != nil {
		return rep, err
	}
	if err := c.revokeAgain(ctx, cfg.Logged, backup, &rep); err != nil {
		return rep, err
	}
	err := c.store.View(ctx, func(tx Tx) error {
		for kid, kek := range cfg.Logged.KIDs {
			if _, err := tx.ContentKey(kid); errors.Is(err, ErrNotFound) {
				rep.MissingKIDs = append(rep.MissingKIDs, MissingKey{kid, kek})
			} else if err != nil {
				return err
			}
		}
		return nil
	})
	for _, ch := range cfg.Logged.Changes {
		if ch.Revision > backup {
			rep.LostChanges = append(rep.LostChanges, ch)
		}
	}
	rep.Revision = c.set.Load().head.Revision
	slices.SortFunc(rep.MissingKIDs, func(a, b MissingKey) int { return strings.Compare(a.KID.String(), b.KID.String()) })
	for _, ids := range [][]KEKID{rep.Rotated, rep.Closed} {
		slices.SortFunc(ids, func(a, b KEKID) int { return strings.Compare(a.String(), b.String()) })
	}
	return rep, err
}

// retireKEKs sees to it that nothing more is sealed under a KEK of the
// backup: each category gets a new version. Where the MEK is past its year
// and none can be made, the old one counts as exhausted; issuing then makes
// the successor as soon as there is a MEK for it.
func (c *Custodian) retireKEKs(ctx context.Context, l Logged, rep *RestoreReport) error {
	for name, cat := range c.set.Load().categories {
		id := KEKID{name, cat.ActiveKEK}
		// A version that the log knows is never made a second time.
		to := max(c.set.Load().nextKEK(name), l.KEKs[name]+1)
		err := c.rotateKEK(ctx, name, id.Version, to, "restore")
		if errors.Is(err, ErrMEKExpired) {
			if err := c.closeKEK(ctx, id); err != nil {
				return fmt.Errorf("category %s: %w", name, err)
			}
			rep.Closed = append(rep.Closed, id)
			continue
		}
		if err != nil {
			return fmt.Errorf("category %s: %w", name, err)
		}
		rep.Rotated = append(rep.Rotated, KEKID{name, to})
	}
	return nil
}

// freezeAgain puts categories back into the mode that restricted them when the
// store was lost: an old backup must not lift a freeze. Where the log was lost as
// well, nobody knows of it.
func (c *Custodian) freezeAgain(ctx context.Context, l Logged, backup uint64, rep *RestoreReport) error {
	modes := map[CategoryName]CategoryMode{}
	for _, ch := range l.Changes {
		for m, action := range modeActions {
			if ch.Revision > backup && ch.Action == action {
				modes[CategoryName(ch.Category)] = m
			}
		}
	}
	for name, mode := range modes {
		cat, ok := c.set.Load().categories[name]
		if !ok || mode == CategoryOpen || cat.Mode == mode || cat.Mode == CategoryFrozen {
			continue
		}
		if err := c.change(ctx, func(old *controlSet, now time.Time) (change, error) {
			return change{put: old.setMode(old.categories[name], mode, now), restricts: true,
				entry: audit.Entry{Action: modeActions[mode], Category: string(name), Detail: "restore"}}, nil
		}); err != nil {
			return fmt.Errorf("category %s: %w", name, err)
		}
		rep.Frozen = append(rep.Frozen, name)
	}
	slices.Sort(rep.Frozen)
	return nil
}

// closeKEK leaves no GCM invocation of a KEK to be reserved.
func (c *Custodian) closeKEK(ctx context.Context, id KEKID) error {
	return c.change(ctx, func(old *controlSet, _ time.Time) (change, error) {
		k := old.keks[id]
		k.Reserved, k.Revision = max(k.Reserved, c.limits.Hard), k.Revision+1
		return change{put: []ControlRecord{kekRecord(k)}, entry: audit.Entry{Action: "kek.close", Category: string(id.Category),
			KeyVersion: id.String(), Detail: "restore under a MEK that is past its year"}}, nil
	})
}

// adoptRevision lifts the store's control revision beyond the log's and tells
// the log, so that from here on the two agree again.
func (c *Custodian) adoptRevision(ctx context.Context, logged uint64, order *RestoreOrder) error {
	var sequence uint64
	if err := c.store.View(ctx, func(tx Tx) error { sequence = tx.Sequence(); return nil }); err != nil {
		return err
	}
	first := c.audit.Size()
	return c.change(ctx, func(old *controlSet, now time.Time) (change, error) {
		ch := change{lift: logged, entry: audit.Entry{Action: actionRestored, StoreSequence: sequence,
			Detail: fmt.Sprintf("from a backup at control revision %d, %s", old.head.Revision, order.text())}}
		if order != nil {
			x, err := order.ceremony(old, first, now)
			if err != nil {
				return change{}, err
			}
			ch.put = append(ch.put, ceremonyRecord(x))
		}
		return ch, nil
	})
}
