package custodian

import (
	"context"
	"errors"
	"fmt"
)

// MaxKeyPeriods is how many crypto periods KeyPeriods names at most: as many
// keys as one Retrieve takes.
const MaxKeyPeriods = MaxKIDsPerCall

// KeyPeriods names the key with that KID and those of the crypto periods after
// its own that exist, for the same content, tracks and scheme, in their order:
// limit of them at most. Of a period that was re-keyed it names the newest key. A
// provider fetches the next period's key with it before viewers ask.
//
// It releases no key and hears the same refusals as Retrieve. What it tells is
// what the store says; only Retrieve proves it.
func (c *Custodian) KeyPeriods(ctx context.Context, who Caller, requestID string, kid KID, limit int) ([]ContentKey, error) {
	if limit < 1 || limit > MaxKeyPeriods {
		return nil, invalid("limit", fmt.Errorf("%d: must be 1 to %d", limit, MaxKeyPeriods))
	}
	if err := checkText(requestID, MaxRequestIDSize); err != nil {
		return nil, invalid("request_id", err)
	}
	var first ContentKey
	err := c.store.View(ctx, func(tx Tx) error {
		k, err := tx.ContentKey(kid)
		first = k.Key
		return err
	})
	set := c.set.Load()
	r := RetrieveResult{KID: kid, Err: err}
	switch {
	case errors.Is(err, ErrNotFound):
		r.decision, r.Err = c.decideUnknown(who, "")
	case err != nil:
		c.decideUnread(who, &r)
	default:
		if r.decision = c.decide(who, ActionRelease, resourceOf(set, &first)); !r.decision.Allow {
			r.Err = fmt.Errorf("content key %s: %w", kid, r.decision.Err)
		}
	}
	if r.Err != nil {
		r.Err = deadline(ctx, r.Err)
		if _, err := c.record(ctx, c.entry(set, who, r.decision, ActionRelease, requestID, ref{kid: kid}, r.Err)); err != nil {
			return nil, err
		}
		return nil, r.Err
	}
	return c.periodsFrom(ctx, first, limit)
}

var errEnough = errors.New("no more are wanted")

// periodsFrom lists first and what follows it.
func (c *Custodian) periodsFrom(ctx context.Context, first ContentKey, limit int) ([]ContentKey, error) {
	periods := []ContentKey{first}
	if !first.HasPeriod {
		return periods, nil
	}
	err := c.store.View(ctx, func(tx Tx) error {
		periods = periods[:1]
		return tx.ContentKeys(first.Category, first.ContentID, &first.NaturalKey, MaxKeysPerIssue, func(k SealedKey) error {
			last := &periods[len(periods)-1]
			switch next := k.Key; {
			case next.TrackType != first.TrackType || next.Scheme != first.Scheme:
				return errEnough
			case next.Period == last.Period:
				*last = next
			case len(periods) == limit:
				return errEnough
			default:
				periods = append(periods, next)
			}
			return nil
		})
	})
	if err != nil && !errors.Is(err, errEnough) {
		return nil, deadline(ctx, err)
	}
	return periods, nil
}
