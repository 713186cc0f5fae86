package custodian

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/keycustody/custodian/internal/audit"
)

// The kinds of references in the audit log. The log has keyed hashes in the
// place of what they refer to: who has a session's ID finds its releases, and
// nobody can list sessions.
const (
	refSession = "session"
	refUser    = "user"
)

// MaxViewerSize bounds session and user IDs, in bytes.
const MaxViewerSize = 256

// actionLookup is what the audit log calls a search for a session or a user.
const actionLookup = "audit.lookup"

// pseudonymInput is what the MAC of a reference covers.
func pseudonymInput(storeID [16]byte, kind, value string) []byte {
	b := append([]byte("custodian pseudonym 1\x00"), storeID[:]...)
	b = binary.AppendUvarint(b, uint64(len(kind)))
	b = append(b, kind...)
	return append(b, value...)
}

// reference makes the reference of a value under one version of the pseudonym
// key: one operation of the token.
func (c *Custodian) reference(ctx context.Context, set *controlSet, version uint32, kind, value string) (audit.Ref, error) {
	r := audit.Ref{Kind: kind, KeyVersion: version}
	err := c.keys.withHelper(ctx, set, HelperPseudonym, version, func(k Key) error {
		var err error
		r.MAC, err = k.CMAC(ctx, pseudonymInput(set.head.StoreID, kind, value))
		return err
	})
	if err != nil {
		return r, fmt.Errorf("reference to a %s: %w", kind, err)
	}
	return r, nil
}

// viewerRefs are the references of a viewer's session and user, as far as they
// are known, under the newest key.
func (c *Custodian) viewerRefs(ctx context.Context, set *controlSet, session, user string) ([]audit.Ref, error) {
	if session == "" && user == "" {
		return nil, nil
	}
	h, err := set.latestHelper(HelperPseudonym)
	if err != nil {
		return nil, err
	}
	var refs []audit.Ref
	for _, of := range []struct{ kind, value string }{{refSession, session}, {refUser, user}} {
		if of.value == "" {
			continue
		}
		r, err := c.reference(ctx, set, h.Version, of.kind, of.value)
		if err != nil {
			return nil, err
		}
		refs = append(refs, r)
	}
	return refs, nil
}

// checkViewer says what is wrong with a session or user ID. It does not repeat
// it.
func checkViewer(field, value string) error {
	if err := checkText(value, MaxViewerSize); err != nil {
		return invalid(field, err)
	}
	return nil
}

// lookUp fills in the references that a query by session or user asks for:
// those under every version of the key, since the log may have any. That
// somebody searched is written down first, with the reference in the place of
// the value.
func (c *Custodian) lookUp(ctx context.Context, who Caller, q *AuditQuery) error {
	kind, value := refSession, q.SessionID
	if q.UserID != "" {
		if q.SessionID != "" {
			return invalid("user_id", errors.New("name a session or a user, not both"))
		}
		kind, value = refUser, q.UserID
	}
	if value == "" {
		return nil
	}
	if err := checkViewer(kind+"_id", value); err != nil {
		return err
	}
	set := c.set.Load()
	var versions []uint32
	for id, h := range set.helpers {
		if id.purpose == HelperPseudonym && (h.State == StateActive || h.State == StateDeactivated) {
			versions = append(versions, id.version)
		}
	}
	slices.Sort(versions)
	for _, v := range versions {
		r, err := c.reference(ctx, set, v, kind, value)
		if err != nil {
			return err
		}
		q.Refs = append(q.Refs, r)
	}
	d := c.decide(who, ActionReadAudit, Resource{Category: CategoryName(q.Category)})
	e := c.entry(set, who, d, actionLookup, "", ref{category: CategoryName(q.Category)}, nil)
	e.Refs = q.Refs[max(0, len(q.Refs)-maxLookupRefs):]
	_, err := c.record(ctx, e)
	return err
}

// maxLookupRefs is how many references an audit entry has room for.
const maxLookupRefs = 16
