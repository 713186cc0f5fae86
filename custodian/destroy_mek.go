package custodian

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/keycustody/custodian/internal/audit"
)

// actionDestroyMEK is what the audit log calls the end of a MEK. The detail
// begins with its version and a space: a restore reads it.
const actionDestroyMEK = "mek.destroy"

// checkDestroyMEK is checkDestroy for a MEK. What only the MEK wraps ends with
// it, and that is said.
func (c *Custodian) checkDestroyMEK(ctx context.Context, set *controlSet, version uint32, backups []knownBackup, r *Rehearsal) error {
	m, ok := set.meks[version]
	end, retired := set.goneSince(RotateMEK, "", version)
	switch {
	case !ok:
		return refusePlan(ErrPlan, "there is no mek of version %d", version)
	case m.State == StateDestroyed:
		return refusePlan(ErrPlan, "mek %s is destroyed already", m.Label)
	case m.State == StateActive:
		return refusePlan(ErrPlan, "mek %s is active: it protects", m.Label)
	case !retired:
		return refusePlan(ErrPlan, "mek %s is %s, and only what is retired can be destroyed", m.Label, m.State)
	}
	if err := c.noneUnderMEK(ctx, set, version); err != nil {
		return refusePlan(ErrPlan, "mek %s cannot be destroyed: %v", m.Label, err)
	}
	keks, helpers := set.wrappedUnder(version)
	r.Changes = append(r.Changes, fmt.Sprintf("mek %s, version %d, CKA_ID %x, is destroyed: its object is removed from the token, and only a backup of the token could bring it back", m.Label, m.Version, m.ID))
	if len(keks) > 0 {
		r.Changes = append(r.Changes, "with it, because nothing else wraps them: key versions "+listed(keks, func(k KEK) string { return k.ID.String() }))
	}
	for _, h := range helpers {
		if h.Purpose == HelperPseudonym {
			r.Changes = append(r.Changes, fmt.Sprintf("sessions and users that the audit log has under helper key %s/%d, made %s, can no longer be looked for", h.Purpose, h.Version, h.CreateTime.UTC().Format(time.RFC3339)))
		}
	}
	what := "nothing of it can be restored without " + m.Label
	r.Changes = append(r.Changes, unreadable(backups, m.CreateTime, end, what, "no backup is known that needs "+m.Label)...)
	return nil
}

// listed names all, or the first few of very many.
func listed[T any](all []T, name func(T) string) string {
	var parts []string
	for _, one := range all[:min(len(all), maxBackupLines)] {
		parts = append(parts, name(one))
	}
	if more := len(all) - len(parts); more > 0 {
		parts = append(parts, fmt.Sprintf("and %d more", more))
	}
	return strings.Join(parts, ", ")
}

// wrappedUnder are the keys that a MEK wraps and that are not destroyed.
func (s *controlSet) wrappedUnder(mek uint32) (keks []KEK, helpers []Helper) {
	for _, k := range s.keks {
		if k.Wrapped.MEKVersion == mek && k.State != StateDestroyed {
			keks = append(keks, k)
		}
	}
	for _, h := range s.helpers {
		if h.Wrapped.MEKVersion == mek && h.State != StateDestroyed {
			helpers = append(helpers, h)
		}
	}
	slices.SortFunc(keks, func(a, b KEK) int { return strings.Compare(a.ID.String(), b.ID.String()) })
	slices.SortFunc(helpers, func(a, b Helper) int {
		if n := strings.Compare(string(a.Purpose), string(b.Purpose)); n != 0 {
			return n
		}
		return int(a.Version) - int(b.Version)
	})
	return keks, helpers
}

// noneUnderMEK proves that nothing needs a MEK: no key that protects is wrapped
// under it, no content key lies under a KEK or has a fingerprint of a helper
// that is, and no control record has a MAC of one. Every record is looked at.
func (c *Custodian) noneUnderMEK(ctx context.Context, set *controlSet, mek uint32) error {
	keks, helpers := set.wrappedUnder(mek)
	under := map[KEKID]bool{}
	var ids []KEKID
	for _, k := range keks {
		if k.State == StateActive {
			return fmt.Errorf("kek %s, which protects, is wrapped under it: %w", k.ID, ErrRotationState)
		}
		under[k.ID] = true
		ids = append(ids, k.ID)
	}
	for _, h := range helpers {
		if h.State == StateActive {
			return fmt.Errorf("helper key %s/%d, which is in use, is wrapped under it: %w", h.Purpose, h.Version, ErrRotationState)
		}
	}
	helperUnder := func(p HelperPurpose, version uint32) bool {
		return slices.ContainsFunc(helpers, func(h Helper) bool { return h.Purpose == p && h.Version == version })
	}
	if err := c.eachControl(ctx, func(rec ControlRecord) error {
		if helperUnder(HelperRecord, rec.MACVersion) {
			return fmt.Errorf("control record %q has a MAC of %s/%d, which is wrapped under it: %w", rec.Name, HelperRecord, rec.MACVersion, ErrRotationState)
		}
		return nil
	}); err != nil {
		return err
	}
	n, err := c.countUnder(ctx, ids)
	if err != nil {
		return err
	}
	if n > 0 {
		return fmt.Errorf("%d content keys refer to keks under it: %w", n, ErrRotationState)
	}
	return c.noneRefers(ctx, set.categoryNames(), func(_ *controlSet, k ContentKey) bool {
		return under[k.KEK] || helperUnder(HelperFingerprint, k.Fingerprint.Version)
	})
}

// destroyMEK destroys a MEK: first in the store, with all that only it wraps,
// then in the token. What is cut off in between is done again: the record says
// so, and the object is looked for each time.
func (c *Custodian) destroyMEK(ctx context.Context, version uint32, e audit.Entry) error {
	m := c.set.Load().meks[version]
	if m.State != StateDestroyed {
		// Once more: it may be long since it was executed, if the daemon was away.
		if err := c.noneUnderMEK(ctx, c.set.Load(), version); err != nil {
			return err
		}
		e.Action, e.Detail, e.Priority = actionDestroyMEK, fmt.Sprintf("%d %s id %x: %s", version, m.Label, m.ID, e.Detail), true
		if err := c.carryOut(ctx, e, func(end audit.Entry) error { return c.eraseMEK(ctx, version, end) }); err != nil {
			return err
		}
	}
	if err := c.hsm.DestroyMEK(ctx, m); err != nil {
		return fmt.Errorf("mek %s: destroy its object: %w", m.Label, err)
	}
	objects, err := c.hsm.Objects(ctx)
	if err != nil {
		return err
	}
	if slices.ContainsFunc(objects, func(o TokenObject) bool { return bytes.Equal(o.ID, m.ID[:]) }) {
		return fmt.Errorf("mek %s (CKA_ID %x): the token has destroyed its object and still shows it: %w", m.Label, m.ID, ErrHSMUnavailable)
	}
	return nil
}

// eraseMEK erases a MEK's canary, and every key that it wraps, from the store.
func (c *Custodian) eraseMEK(ctx context.Context, version uint32, e audit.Entry) error {
	return c.erase(ctx, e, func(old *controlSet) []ControlRecord {
		m := old.meks[version]
		if m.State == StateDestroyed {
			return nil
		}
		m.State, m.Canary, m.Revision = StateDestroyed, nil, m.Revision+1
		put := []ControlRecord{mekRecord(m)}
		keks, helpers := old.wrappedUnder(version)
		for _, k := range keks {
			put = append(put, kekRecord(k.destroyed()))
		}
		for _, h := range helpers {
			h.State, h.Wrapped.Outer, h.Wrapped.Canary, h.Revision = StateDestroyed, nil, nil, h.Revision+1
			put = append(put, helperRecord(h))
		}
		return put
	})
}

// destroyedMEKs are the MEKs that were destroyed after a control revision.
func (l *Logged) destroyedMEKs(after uint64) (versions []uint32, err error) {
	for _, text := range l.destroyed(actionDestroyMEK, after) {
		v, err := strconv.ParseUint(text, 10, 32)
		if err != nil {
			return nil, corrupt("audit entry of a destroyed mek", err)
		}
		versions = append(versions, uint32(v))
	}
	return versions, nil
}

// destroyMEKsAgain destroys the MEKs that were destroyed after the backup: a
// restore brings back neither record nor object.
func (c *Custodian) destroyMEKsAgain(ctx context.Context, l Logged, backup uint64, rep *RestoreReport) error {
	versions, err := l.destroyedMEKs(backup)
	if err != nil {
		return err
	}
	for _, v := range versions {
		if _, ok := c.set.Load().meks[v]; !ok {
			continue
		}
		if err := c.destroyMEK(ctx, v, audit.Entry{Detail: "restore"}); err != nil {
			return err
		}
		rep.DestroyedMEKs = append(rep.DestroyedMEKs, v)
	}
	return nil
}
