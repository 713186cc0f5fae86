package custodian

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/keycustody/custodian/internal/audit"
)

// actionDestroy is what the audit log calls the end of a KEK version. The detail
// begins with its name and a space: a restore reads it.
const actionDestroy = "kek.destroy"

// checkDestroy says what stands against the destruction of KEK versions and of a
// MEK: only what is retired, and what no record refers to, as a look at every
// record proves, can be destroyed. It names the backups that become unreadable.
func checkDestroy(ctx context.Context, c *Custodian, set *controlSet, p *Plan, r *Rehearsal) error {
	backups, err := c.backupsKnown(ctx)
	if err != nil {
		return err
	}
	for _, text := range p.KeyVersions {
		id, _ := ParseKEKID(text) // checked by ParsePlan
		k, ok := set.keks[id]
		end, retired := set.goneSince(RotateKEK, id.Category, id.Version)
		if !retired { // a rotation of a sealed MEK retires its KEKs with it
			end, retired = set.goneSince(RotateMEK, "", k.Wrapped.MEKVersion)
		}
		switch {
		case !ok:
			return refusePlan(ErrPlan, "there is no key version %s", id)
		case k.State == StateDestroyed:
			return refusePlan(ErrPlan, "key version %s is destroyed already", id)
		case k.State == StateActive:
			return refusePlan(ErrPlan, "key version %s is active: it protects category %s", id, id.Category)
		}
		if err := c.noneUnder(ctx, id); err != nil {
			return refusePlan(ErrPlan, "key version %s cannot be destroyed: %v", id, err)
		}
		if !retired {
			return refusePlan(ErrPlan, "key version %s is %s, and only what is retired can be destroyed", id, k.State)
		}
		r.Changes = append(r.Changes, fmt.Sprintf("key version %s is destroyed: its wrapped key is erased, and nothing brings it back", id))
		r.Changes = append(r.Changes, unreadable(backups, k.CreateTime, end, fmt.Sprintf("what lies under %s in it cannot be restored", id),
			fmt.Sprintf("no backup is known in which content keys lie under %s", id))...)
	}
	if p.MEKVersion > 0 {
		if err := c.checkDestroyMEK(ctx, set, p.MEKVersion, backups, r); err != nil {
			return err
		}
	}
	if n := c.audit.Stats().Pruned; n > 0 {
		r.Changes = append(r.Changes, fmt.Sprintf("the first %d entries of the audit log are pruned: backups that only they name are not listed", n))
	}
	return nil
}

// goneSince is when a version was retired, or when the rotation that made it was
// rolled back.
func (s *controlSet) goneSince(kind RotationKind, category CategoryName, version uint32) (end time.Time, ok bool) {
	for _, r := range s.rotations {
		if r.Kind == kind && r.Category == category && slices.Contains(r.gone(), version) {
			ok = true
			if r.StepTime.After(end) {
				end = r.StepTime
			}
		}
	}
	return end, ok
}

// noneUnder proves that no content key lies under a KEK version: by the index,
// and by reading every content key of the category.
func (c *Custodian) noneUnder(ctx context.Context, id KEKID) error {
	n, err := c.countUnder(ctx, []KEKID{id})
	if err != nil {
		return err
	}
	if n > 0 {
		return fmt.Errorf("%d content keys refer to it: %w", n, ErrRotationState)
	}
	return c.noneRefers(ctx, []CategoryName{id.Category}, func(_ *controlSet, k ContentKey) bool { return k.KEK == id })
}

// A knownBackup is a backup that the audit log tells of.
type knownBackup struct {
	time     time.Time
	revision uint64
	to       string
}

func (c *Custodian) backupsKnown(ctx context.Context) (known []knownBackup, err error) {
	err = audit.Read(c.audit.Dir(), 0, func(e *audit.Entry) error {
		if e.Action == string(ActionBackup) && e.Outcome == audit.Allowed {
			known = append(known, knownBackup{e.Time, e.ControlRevision, e.Detail})
		}
		return ctx.Err()
	})
	return known, err
}

// maxBackupLines is how many backups a rehearsal names one by one.
const maxBackupLines = 100

// unreadable names the backups in which something may lie under a key: those
// from when it was made until it was retired. what is what that means, and none
// is said where there are no such backups.
func unreadable(backups []knownBackup, from, to time.Time, what, none string) (lines []string) {
	n := 0
	for _, b := range backups {
		if b.time.Before(from) || b.time.After(to) {
			continue
		}
		if n++; n <= maxBackupLines {
			lines = append(lines, fmt.Sprintf("the backup of %s, control revision %d, %s, becomes unreadable: %s", b.time.UTC().Format(time.RFC3339), b.revision, b.to, what))
		}
	}
	if n > maxBackupLines {
		lines = append(lines, fmt.Sprintf("and %d more backups until %s, likewise", n-maxBackupLines, to.UTC().Format(time.RFC3339)))
	}
	if n == 0 {
		lines = append(lines, none)
	}
	return lines
}

// destroyKeys destroys the versions of a plan, one by one.
func destroyKeys(ctx context.Context, c *Custodian, x Ceremony, p *Plan) (bool, error) {
	for _, text := range p.KeyVersions {
		id, _ := ParseKEKID(text) // checked by ParsePlan
		if c.set.Load().keks[id].State == StateDestroyed {
			continue
		}
		// Once more: it may be long since it was executed, if the daemon was away.
		if err := c.noneUnder(ctx, id); err != nil {
			return false, err
		}
		e := kekDestroyed(id, audit.Entry{Caller: x.Executor, RequestID: about(x.ID), Detail: p.Reason})
		if err := c.carryOut(ctx, e, func(end audit.Entry) error { return c.destroyKEK(ctx, id, end) }); err != nil {
			return false, err
		}
	}
	if p.MEKVersion > 0 {
		if err := c.destroyMEK(ctx, p.MEKVersion, audit.Entry{Caller: x.Executor, RequestID: about(x.ID), Detail: p.Reason}); err != nil {
			return false, err
		}
	}
	return true, nil
}

// kekDestroyed makes e the entry of the end of a KEK version.
func kekDestroyed(id KEKID, e audit.Entry) audit.Entry {
	e.Action, e.Category, e.KeyVersion, e.Detail, e.Priority = actionDestroy, string(id.Category), id.String(), id.String()+" "+e.Detail, true
	return e
}

// destroyKEK erases a KEK version from the store and from the token.
func (c *Custodian) destroyKEK(ctx context.Context, id KEKID, e audit.Entry) error {
	return c.erase(ctx, e, func(old *controlSet) []ControlRecord {
		k := old.keks[id]
		if k.State == StateDestroyed {
			return nil
		}
		return []ControlRecord{kekRecord(k.destroyed())}
	})
}

// erase puts records without keys in the place of those that have them, and
// drops what of these keys is loaded. records has none where that is done already.
func (c *Custodian) erase(ctx context.Context, e audit.Entry, records func(old *controlSet) []ControlRecord) error {
	err := c.change(ctx, func(old *controlSet, _ time.Time) (change, error) {
		put := records(old)
		if len(put) == 0 {
			return change{}, errNoChange
		}
		return change{put: put, entry: e}, nil
	})
	if err == nil {
		c.keys.forget(c.set.Load())
	}
	return err
}

// destroyed is the record of k without the wrapped key.
func (k KEK) destroyed() KEK {
	k.State, k.Wrapped.Outer, k.Wrapped.Canary, k.Revision = StateDestroyed, nil, nil, k.Revision+1
	return k
}

// destroyed are the names of what was destroyed after a control revision: the
// first words of the details.
func (l *Logged) destroyed(action string, after uint64) (names []string) {
	for _, ch := range l.Changes {
		if ch.Revision > after && ch.Action == action {
			name, _, _ := strings.Cut(ch.Detail, " ")
			names = append(names, name)
		}
	}
	return names
}

// destroyAgain destroys the KEK versions that were destroyed after the backup: a
// restore does not bring them back. What lies under them is lost.
func (c *Custodian) destroyAgain(ctx context.Context, l Logged, backup uint64, rep *RestoreReport) error {
	for _, name := range l.destroyed(actionDestroy, backup) {
		id, err := ParseKEKID(name)
		if err != nil {
			return corrupt("audit entry of a destroyed key version", err)
		}
		k, ok := c.set.Load().keks[id]
		if !ok || k.State == StateDestroyed {
			continue
		}
		n, err := c.countUnder(ctx, []KEKID{id})
		if err != nil {
			return err
		}
		if err := c.destroyKEK(ctx, id, kekDestroyed(id, audit.Entry{Detail: "restore"})); err != nil {
			return fmt.Errorf("key version %s: %w", id, err)
		}
		rep.Destroyed = append(rep.Destroyed, DestroyedKEK{id, n})
	}
	return nil
}

// A DestroyedKEK was destroyed after the backup, and is so again; so many content
// keys of the backup lie under it, and are lost.
type DestroyedKEK struct {
	KEK         KEKID  `json:"kek"`
	ContentKeys uint64 `json:"content_keys"`
}
