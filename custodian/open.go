package custodian

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/keycustody/custodian/internal/audit"
)

// Logged is what the audit log knows of the store. Visit it with every entry
// while the log is opened.
type Logged struct {
	Revision uint64   // of the newest head that was written down
	Digest   [32]byte // of that head
	Sequence uint64   // the highest write sequence of the store
	Entries  uint64
	// TrackKIDs collects the KIDs that were ever handed out, and the control
	// changes by revision; only a restore needs them.
	TrackKIDs bool
	tokens    loggedUses
	// Budgets are those that the log is to be held against: what callers took of
	// them is counted. Set them before the first entry.
	Budgets  []Budget
	spending loggedSpending
	warned   map[string]bool // MEKAlerts by ID
	KIDs     map[KID]KEKID
	KEKs     map[CategoryName]uint32 // the highest version that it names
	Changes  []ControlChange
	// Begun are the attempts without an end, by index.
	Begun map[uint64]audit.Entry
}

// A ControlChange is a change of the control set as the audit log tells it.
type ControlChange struct {
	Revision uint64    `json:"revision"`
	Time     time.Time `json:"time"`
	Action   string    `json:"action"`
	Category string    `json:"category,omitempty"`
	Detail   string    `json:"detail,omitempty"`

	refs []audit.Ref
}

// Visit takes one entry in.
func (l *Logged) Visit(e *audit.Entry) error {
	l.Entries++
	l.visitAttempt(e)
	l.tokens.visit(e)
	l.spending.visit(e, longestWindow(l.Budgets))
	l.visitWarning(e)
	if len(e.ControlDigest) == 32 {
		l.Revision, l.Digest = e.ControlRevision, [32]byte(e.ControlDigest)
		if l.TrackKIDs {
			l.Changes = append(l.Changes, ControlChange{e.ControlRevision, e.Time, e.Action, e.Category, e.Detail, e.Refs})
		}
	}
	if e.Action == actionRestored {
		l.Sequence = e.StoreSequence // the older store is now the right one
	}
	l.Sequence = max(l.Sequence, e.StoreSequence)
	if !l.TrackKIDs {
		return nil
	}
	kek := KEKID{Category: CategoryName(e.Category)}
	if _, v, ok := strings.Cut(e.KeyVersion, "/"); ok {
		n, _ := strconv.ParseUint(v, 10, 32) // zero where it is no version
		kek.Version = uint32(n)
	}
	if l.KIDs == nil {
		l.KIDs, l.KEKs = map[KID]KEKID{}, map[CategoryName]uint32{}
	}
	l.KEKs[kek.Category] = max(l.KEKs[kek.Category], kek.Version)
	if len(e.KID) == KIDSize && e.Outcome == audit.Allowed {
		l.KIDs[KID(e.KID)] = kek
	}
	return nil
}

// maxAhead is how far beyond the highest time seen a start may be without
// confirmation, and maxStep how far the clock may go between two looks at it
// while the daemon runs. maxBehind allows for small corrections of the clock.
const (
	maxAhead  = 90 * 24 * time.Hour
	maxStep   = 4 * time.Hour
	maxBehind = 5 * time.Minute
)

func (c *Custodian) open(ctx context.Context, cfg Config) error {
	records, head, sequence, err := c.readControl(ctx)
	if err != nil {
		return err
	}
	set, err := c.verifyControl(ctx, records, head, cfg)
	if err != nil {
		return err
	}
	if !cfg.Restored {
		if err := compareLog(set.head, sequence, cfg.Logged); err != nil {
			return err
		}
	}
	if err := c.checkToken(ctx, set); err != nil {
		return err
	}
	if err := c.signLog(ctx, set); err != nil {
		return err
	}
	if err := c.checkAnchors(ctx, set); err != nil {
		return err
	}
	c.publish(set)
	if !cfg.Restored && cfg.Logged.Revision < set.head.Revision {
		// The last run ended between the store's commit and the log's.
		e, err := c.pendingEntry(ctx, set)
		if err != nil {
			return err
		}
		if _, err := c.record(ctx, e); err != nil {
			return err
		}
		if e.HasAttempt {
			delete(cfg.Logged.Begun, e.Attempt)
		}
	}
	if err := c.endAttempts(ctx, cfg.Logged.Begun); err != nil {
		return err
	}
	c.checkClock(set.head.HighestNow, maxAhead, cfg.ConfirmTime)
	if cfg.ConfirmTime && !cfg.Restored && c.believesClock() == nil {
		// Kept now, so that the confirmation is needed once. A restore keeps it
		// with its first change, which lifts the revision above the log's.
		if err := c.confirmTime(ctx); err != nil {
			return err
		}
	}
	// Of other grants the officers' own are served, of other conditions nothing is:
	// nobody has them but the configuration. A restore serves nothing yet.
	if err := c.refusePolicy(ctx, c.policy.Load()); err != nil && (!errors.Is(err, ErrQuorum) || errors.Is(err, ErrConditions) && !cfg.Restored) {
		return err
	}
	policy := [32]byte{}
	if p := c.policyOf(set); p != nil {
		policy = p.Digest()
	}
	if !cfg.Restored {
		// What an earlier run has begun is ended; where it cannot be now, Tick tries again.
		if err := c.finishCeremonies(ctx); err != nil {
			c.log.Error("a ceremony has taken effect, and its end is not written down yet", "err", err)
		}
	}
	_, err = c.record(ctx, audit.Entry{Action: "start", Outcome: audit.Allowed, ControlRevision: set.head.Revision, StoreSequence: sequence,
		Detail: "config " + hex.EncodeToString(cfg.ConfigDigest[:]) + " policy " + hex.EncodeToString(policy[:])})
	return err
}

// pendingEntry is the audit entry of the newest change, which the last run
// stored with it and did not get to write to the log.
func (c *Custodian) pendingEntry(ctx context.Context, set *controlSet) (audit.Entry, error) {
	var raw []byte
	if err := c.store.View(ctx, func(tx Tx) error {
		var err error
		raw, err = tx.Cursor(pendingEntry)
		return err
	}); err != nil {
		return audit.Entry{}, err
	}
	if sha256.Sum256(raw) != set.head.Pending {
		return audit.Entry{}, corrupt(fmt.Sprintf("audit entry of control revision %d", set.head.Revision), ErrRecordMAC)
	}
	e, err := audit.UnmarshalEntry(raw)
	if err != nil {
		return e, corrupt(fmt.Sprintf("audit entry of control revision %d", set.head.Revision), err)
	}
	e.Detail = strings.TrimSpace(e.Detail + " (written by the next start)")
	return e, nil
}

func (c *Custodian) readControl(ctx context.Context) (records []ControlRecord, head ControlRecord, sequence uint64, err error) {
	err = c.store.View(ctx, func(tx Tx) error {
		var err error
		if head, err = tx.Head(); errors.Is(err, ErrNotFound) {
			if _, err := tx.InitJournal(); err == nil {
				return fmt.Errorf("an init was interrupted; run custodiand init again, it goes on where it stopped: %w", ErrUninitialised)
			}
			return ErrUninitialised
		} else if err != nil {
			return err
		}
		sequence = tx.Sequence()
		return tx.Controls(func(r ControlRecord) error {
			records = append(records, r)
			return nil
		})
	})
	return records, head, sequence, err
}

// verifyControl decodes the control set, loads the record helper with what
// the set says, and then checks every MAC and the digest of the whole. What
// was decoded before its MAC was checked has only named blobs and canaries
// that the token itself authenticates.
func (c *Custodian) verifyControl(ctx context.Context, records []ControlRecord, head ControlRecord, cfg Config) (*controlSet, error) {
	set := newControlSet()
	var err error
	if set.head, err = decodeHead(head.Body); err != nil {
		return nil, err
	}
	for _, r := range records {
		if err := set.put(r); err != nil {
			return nil, err
		}
	}
	var destroyed []uint32 // since the backup
	if cfg.Restored {
		if destroyed, err = cfg.Logged.destroyedMEKs(set.head.Revision); err != nil {
			return nil, err
		}
	}
	for _, m := range set.meks {
		if m.State != StateActive && m.State != StateDeactivated {
			continue
		}
		if slices.Contains(destroyed, m.Version) {
			if !set.retiredMEK(m.Version) {
				return nil, fmt.Errorf("mek %s was destroyed by the officers after this backup was made, and the backup needs it: %w", m.Label, ErrKeyDestroyed)
			}
			continue // nothing of the backup needs it, and the restore destroys it again
		}
		if err := c.hsm.CheckMEK(ctx, m); err != nil {
			return nil, mekError(m, err)
		}
	}
	for _, r := range append(slices.Clone(records), head) {
		if err := c.verify(ctx, set, r); err != nil {
			return nil, err
		}
	}
	if d := set.digest(); d != set.head.Digest {
		return nil, corrupt(fmt.Sprintf("control set at revision %d", set.head.Revision), ErrControlDigest)
	}
	for _, p := range HelperPurposes { // all must load, so that none is missed in the middle of an issue
		h, err := set.latestHelper(p)
		if err != nil {
			return nil, err
		}
		if err := c.keys.withHelper(ctx, set, p, h.Version, func(Key) error { return nil }); err != nil {
			return nil, err
		}
	}
	return set, nil
}

func mekError(m MEK, err error) error {
	switch {
	case errors.Is(err, ErrNoObject):
		return fmt.Errorf("mek %s (CKA_ID %x) is not in the token; restore the token from its backup, or correct hsm.token. The store cannot be opened without it, and init would not help: %w", m.Label, m.ID, err)
	case errors.Is(err, ErrWrongMEK), errors.Is(err, ErrAuth):
		return fmt.Errorf("mek %s (CKA_ID %x): its canary does not verify; the token's object was damaged or replaced: %w", m.Label, m.ID, errors.Join(err, ErrWrongMEK))
	}
	return fmt.Errorf("mek %s: %w", m.Label, err)
}

// compareLog holds the store against the audit log. The store commits first,
// so it may be ahead by the one change that the log did not get to hear of.
func compareLog(h Head, sequence uint64, l Logged) error {
	switch {
	case l.Revision > h.Revision:
		return corrupt(fmt.Sprintf("control revision %d in the store, %d in the audit log", h.Revision, l.Revision), ErrStoreRollback)
	case l.Revision == h.Revision && l.Digest != h.Digest:
		return corrupt(fmt.Sprintf("control revision %d has another digest in the audit log", h.Revision), ErrStoreRollback)
	case l.Sequence > sequence:
		return corrupt(fmt.Sprintf("write sequence %d in the store, %d in the audit log", sequence, l.Sequence), ErrStoreRollback)
	case l.Revision+1 < h.Revision || (l.Revision+1 == h.Revision && l.Digest != h.Previous):
		return corrupt(fmt.Sprintf("control revision %d in the store, %d in the audit log", h.Revision, l.Revision), ErrLogRollback)
	}
	return nil
}

// checkToken compares what lies in the token with what is recorded.
func (c *Custodian) checkToken(ctx context.Context, set *controlSet) error {
	objects, err := c.hsm.Objects(ctx)
	if err != nil {
		return err
	}
	labels := map[string]string{} // of what is ours, by ID
	for _, m := range set.meks {
		if m.State != StateDestroyed { // one that somebody has brought back is not ours any more
			labels[string(m.ID[:])] = m.Label
		}
	}
	for _, g := range set.signers {
		labels[string(g.ID[:])] = g.Label
	}
	seen := map[string]bool{}
	c.unknownObjects = nil
	for _, o := range objects {
		label, ours := labels[string(o.ID)]
		k := o.Class + "\x00" + string(o.ID)
		if ours && seen[k] {
			return fmt.Errorf("token: two objects of class %s have the ID %x: %w", o.Class, o.ID, ErrWrongMEK)
		}
		seen[k] = true
		if !ours || o.Label != label {
			c.unknownObjects = append(c.unknownObjects, o)
			c.log.Warn("unknown object in the token; it is never used", "class", o.Class, "label", o.Label, "id", hex.EncodeToString(o.ID))
		}
	}
	return nil
}

// checkClock compares the clock with the highest time seen. A clock that is
// not believed changes nothing and issues nothing. ahead is how far beyond it
// may be; confirmed takes it as it is.
func (c *Custodian) checkClock(highest time.Time, ahead time.Duration, confirmed bool) {
	now := c.now()
	var fault error
	switch {
	case confirmed:
	case now.Before(highest.Add(-maxBehind)):
		fault = fmt.Errorf("clock: now is %s, before %s, the highest time seen; set the clock, or if that time was wrong, start with -confirm-time: %w", now.Format(time.RFC3339), highest.Format(time.RFC3339), ErrClock)
	case now.After(highest.Add(ahead)):
		fault = fmt.Errorf("clock: now is %s, more than %s after %s, the highest time seen; if that is right, start with -confirm-time: %w",
			now.Format(time.RFC3339), ahead, highest.Format(time.RFC3339), ErrClock)
	}
	if fault == nil {
		c.lastLook.Store(now.UnixNano())
		c.clockFault.Store(nil)
		return
	}
	if c.clockFault.Swap(&fault) == nil {
		c.log.Error("nothing is issued or changed", "err", fault)
	}
}

// lookAtClock is checkClock while running: once the clock was believed, it may
// not have gone far since the last look, nor back behind it.
func (c *Custodian) lookAtClock() error {
	if last := c.lastLook.Load(); last != 0 {
		c.checkClock(time.Unix(0, last).UTC(), maxStep, false)
	} else {
		c.checkClock(c.set.Load().head.HighestNow, maxAhead, false)
	}
	return c.believesClock()
}

// Tick keeps house: it looks at the clock, releases the KEKs whose time is up,
// ends a change that the audit log did not take at once, notes what was pruned of
// it, and keeps the highest time seen up to date. Call it about once a minute; it writes once a day.
func (c *Custodian) Tick(ctx context.Context) error {
	c.keys.sweep(c.set.Load(), c.keys.clock.now())
	if c.set.Load().sealed() {
		c.dropKeys() // a call that was under way at the seal may have loaded one
	}
	err := errors.Join(c.settleNow(ctx), c.notePruned(ctx), c.finishCeremonies(ctx), c.sweepRevocations(ctx))
	if c.lookAtClock() != nil || c.now().Sub(c.set.Load().head.HighestNow) < 24*time.Hour {
		return err
	}
	return c.keepTime(ctx, false, audit.Entry{Action: "time", Detail: c.now().Format(time.RFC3339)})
}

// confirmTime takes the clock as it is, because who started the daemon says
// that it is right.
func (c *Custodian) confirmTime(ctx context.Context) error {
	e := audit.Entry{Action: actionConfirmTime, Detail: fmt.Sprintf("-confirm-time: now is %s, and the highest time seen was %s",
		c.now().UTC().Format(time.RFC3339), c.set.Load().head.HighestNow.UTC().Format(time.RFC3339))}
	return c.carryOut(ctx, e, func(end audit.Entry) error { return c.keepTime(ctx, true, end) })
}

// actionConfirmTime is what the audit log calls a start with -confirm-time.
const actionConfirmTime = "time.confirm"

// keepTime writes the time down; confirmed, even if it is below the highest.
func (c *Custodian) keepTime(ctx context.Context, confirmed bool, e audit.Entry) error {
	return c.change(ctx, func(*controlSet, time.Time) (change, error) { return change{setTime: confirmed, entry: e}, nil })
}
