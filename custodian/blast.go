package custodian

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/keycustody/custodian/internal/audit"
)

// A BlastRequest names what was lost: a KEK version, or a caller.
type BlastRequest struct {
	KEK    KEKID
	Caller string // the identity; empty where KEK is set
}

// A BlastRow is a content key that counts as exposed, and who was given it.
type BlastRow struct {
	Key   ContentKey
	Given []Given // as far back as the audit log goes, by caller
}

// Given is how often a caller was given a content key.
type Given struct {
	Caller      string
	First, Last time.Time
	Count       uint64
}

// BlastRadius calls visit for each content key that the loss of a KEK version,
// or of a caller, exposes. Of a KEK these are all that it ever wrapped: those
// born under it or before, and not moved past it. Of a caller they are those
// that the audit log says it was given. It reads the whole audit log, and
// keeps in memory who was given what of it.
func (c *Custodian) BlastRadius(ctx context.Context, who Caller, req BlastRequest, visit func(BlastRow) error) error {
	if (req.Caller == "") == (req.KEK == KEKID{}) {
		return invalid("key_version", errors.New("name a key version, or a caller"))
	}
	d := c.decide(who, ActionBlastRadius, Resource{Category: req.KEK.Category})
	if d.Allow && req.Caller != "" && !d.KnowIt {
		d.Allow, d.Err = false, ErrDenied // a caller's keys are of every category
	}
	if !d.Allow {
		return c.refuse(ctx, who, d, ActionBlastRadius, ref{category: req.KEK.Category})
	}
	if _, ok := c.set.Load().keks[req.KEK]; !ok && req.Caller == "" {
		return invalid("key_version", fmt.Errorf("kek %s does not exist", req.KEK))
	}
	given, err := c.handedOut(ctx, req)
	if err != nil {
		return err
	}
	if req.Caller == "" {
		err = c.eachKey(ctx, req.KEK.Category, func(page []SealedKey) error {
			for _, k := range page {
				if k.Key.BirthKEK <= req.KEK.Version && req.KEK.Version <= k.Key.KEK.Version {
					if err := visit(BlastRow{k.Key, given[k.Key.KID]}); err != nil {
						return err
					}
				}
			}
			return nil
		})
		return deadline(ctx, err)
	}
	for _, kid := range slices.SortedFunc(maps.Keys(given), func(a, b KID) int { return strings.Compare(string(a[:]), string(b[:])) }) {
		var k SealedKey
		err := c.store.View(ctx, func(tx Tx) error {
			var err error
			k, err = tx.ContentKey(kid)
			return err
		})
		if errors.Is(err, ErrNotFound) {
			k.Key = ContentKey{KID: kid} // the log knows it, a restore has lost it
		} else if err != nil {
			return deadline(ctx, err)
		}
		if err := visit(BlastRow{k.Key, given[kid]}); err != nil {
			return err
		}
	}
	return nil
}

// handedOut reads from the audit log who was given which key.
func (c *Custodian) handedOut(ctx context.Context, req BlastRequest) (map[KID][]Given, error) {
	given := map[KID][]Given{}
	err := audit.Read(c.audit.Dir(), 0, func(e *audit.Entry) error {
		if len(e.KID) != KIDSize || e.Outcome != audit.Allowed || e.Caller == "" {
			return ctx.Err()
		}
		if req.Caller != "" && e.Caller != req.Caller || req.Caller == "" && e.Category != string(req.KEK.Category) {
			return nil
		}
		list := given[KID(e.KID)]
		i := slices.IndexFunc(list, func(g Given) bool { return g.Caller == e.Caller })
		if i < 0 {
			i, list = len(list), append(list, Given{Caller: e.Caller, First: e.Time})
		}
		list[i].Last, list[i].Count = e.Time, list[i].Count+max(1, e.Count)
		given[KID(e.KID)] = list
		return nil
	})
	if err != nil {
		return nil, auditError("key_version", err)
	}
	return given, nil
}
