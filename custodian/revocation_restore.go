package custodian

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/keycustody/custodian/internal/audit"
)

// moveRevocations are put by one change of the control set.
const moveRevocations = 200

// logged is what the audit log says of a revocation beside the session's hash:
// what a restore needs to revoke it again, and the cause.
func (r *Revocation) logged(cause string) string {
	if r.Issuer != "" {
		return "issuer " + strconv.Quote(r.Issuer) + ": " + cause
	}
	return "until " + r.Until.UTC().Format(time.RFC3339Nano) + ": " + cause
}

// loggedRevocation reads a revocation from the audit log's entry of one, or of
// its lift, which has no end for a session. Without ok, it is only known which.
func loggedRevocation(ch ControlChange) (r Revocation, ok bool) {
	r = Revocation{Cause: ch.Detail, By: "restore", Time: ch.Time, Revision: 1}
	if len(ch.refs) == 1 {
		r.Session = ch.refs[0]
		text, cause, _ := strings.Cut(strings.TrimPrefix(ch.Detail, "until "), ": ")
		until, err := time.Parse(time.RFC3339Nano, text)
		if err == nil {
			r.Until, r.Cause = until, cause
		}
		return r, err == nil
	}
	rest := strings.TrimPrefix(ch.Detail, "issuer ")
	quoted, err := strconv.QuotedPrefix(rest)
	if err == nil {
		r.Issuer, err = strconv.Unquote(quoted)
		r.Cause = strings.TrimPrefix(rest[len(quoted):], ": ")
	}
	return r, err == nil
}

// A LostRevocation is one that a restore cannot make again, because the key that
// hashed its session is younger than the backup. Who knows the session revokes it
// again.
type LostRevocation struct {
	Name  string    `json:"name"`
	Until time.Time `json:"until,omitzero"`
	Cause string    `json:"cause"`
}

// revokeAgain revokes what was revoked when the store was lost: an old backup
// must not bring a session back, nor an issuer whose key was stolen. What was
// lifted after the backup, and not revoked again, stays as the backup has it.
func (c *Custodian) revokeAgain(ctx context.Context, l Logged, backup uint64, rep *RestoreReport) error {
	found := map[string]Revocation{}
	for _, ch := range l.Changes {
		if ch.Revision <= backup || ch.Action != string(ActionRevoke) && ch.Action != string(ActionLiftRevocation) {
			continue
		}
		r, ok := loggedRevocation(ch)
		switch {
		case ch.Action == string(ActionLiftRevocation):
			delete(found, r.Name())
		case ok:
			found[r.Name()] = r
		default:
			rep.lose(r)
		}
	}
	set, now := c.set.Load(), c.now()
	var again []ControlRecord
	for name, r := range found {
		is := set.named(name)
		if r.over(now) || is != nil && !r.Until.After(is.Until) {
			continue
		}
		if _, ok := set.helpers[helperID{HelperPseudonym, r.Session.KeyVersion}]; r.Issuer == "" && !ok {
			rep.lose(r)
			continue
		}
		if is != nil {
			r.Revision = is.Revision + 1
		}
		again = append(again, revocationRecord(r))
		rep.Revoked = append(rep.Revoked, name)
	}
	for batch := range slices.Chunk(again, moveRevocations) {
		if err := c.change(ctx, func(*controlSet, time.Time) (change, error) {
			return change{put: batch, restricts: true, entry: audit.Entry{Action: "revocation.restore", Detail: fmt.Sprintf("%d revocations", len(batch))}}, nil
		}); err != nil {
			return fmt.Errorf("revocations: %w", err)
		}
	}
	slices.Sort(rep.Revoked)
	slices.SortFunc(rep.LostRevocations, func(a, b LostRevocation) int { return strings.Compare(a.Name, b.Name) })
	return nil
}

func (rep *RestoreReport) lose(r Revocation) {
	rep.LostRevocations = append(rep.LostRevocations, LostRevocation{r.Name(), r.Until, r.Cause})
}
