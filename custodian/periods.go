package custodian

import (
	"context"
	"errors"
	"fmt"
)

// MaxKeyPeriods is how many crypto periods KeyPeriods names at most: as many
// keys as one Retrieve takes.
const MaxKeyPeriods = MaxKIDsPerCall

// A KeyPeriodsRequest asks for the crypto periods from a key's on.
type KeyPeriodsRequest struct {
	RequestID string
	KID       KID
	Limit     int // 1 to MaxKeyPeriods
	// LicenceToken is one for the key, where its release needs one.
	LicenceToken string
}

// Check says what is wrong with the request, or nil.
func (r KeyPeriodsRequest) Check() error {
	if r.Limit < 1 || r.Limit > MaxKeyPeriods {
		return invalid("limit", fmt.Errorf("%d: must be 1 to %d", r.Limit, MaxKeyPeriods))
	}
	if err := checkText(r.RequestID, MaxRequestIDSize); err != nil {
		return invalid("request_id", err)
	}
	return nil
}

// KeyPeriods names the key with that KID and those of the crypto periods after
// its own that exist, for the same content, tracks and scheme, in their order:
// limit of them at most. Of a period that was re-keyed it names the newest key. A
// provider fetches the next period's key with it before viewers ask.
//
// It releases no key, and so counts as no use of a licence token, but it hears the same refusals as Retrieve. What it tells is
// what the store says; only Retrieve proves it.
func (c *Custodian) KeyPeriods(ctx context.Context, who Caller, req KeyPeriodsRequest) ([]ContentKey, error) {
	if err := req.Check(); err != nil {
		return nil, err
	}
	kid, set := req.KID, c.set.Load()
	viewer := RetrieveRequest{token: c.policyOf(set).ReadToken(who, req.LicenceToken, "", c.now())}
	refs, err := c.lookAtViewer(ctx, set, who, &viewer)
	if err != nil {
		return nil, deadline(ctx, err)
	}
	var first ContentKey
	err = c.store.View(ctx, func(tx Tx) error {
		k, err := tx.ContentKey(kid)
		first = k.Key
		return err
	})
	set = c.set.Load()
	r := RetrieveResult{KID: kid, Err: err}
	switch {
	case errors.Is(err, ErrNotFound):
		r.decision, r.Err = c.decideUnknown(who, "")
	case err != nil:
		c.decideUnread(who, &r)
	default:
		p := c.policyOf(set)
		r.decision = p.Decide(Request{Caller: who, Action: ActionRelease, Resource: resourceOf(set, &first), Token: viewer.token, Now: c.now()}.under(set))
		if !r.decision.Allow {
			r.Err = fmt.Errorf("content key %s: %w", kid, r.decision.Err)
		}
	}
	if r.Err != nil {
		r.Err = deadline(ctx, r.Err)
		e := c.entry(set, who, r.decision, ActionRelease, req.RequestID, ref{kid: kid}, r.Err)
		e.Refs = refs
		if _, err := c.record(ctx, e); err != nil {
			return nil, err
		}
		return nil, r.Err
	}
	return c.periodsFrom(ctx, first, req.Limit)
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
