package custodian

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/keycustody/custodian/internal/audit"
)

// packaged marks the keys of a content item as in use. Which ones are left to
// mark is read from the keys themselves, so an event that was cut off, or is
// reported again, marks the rest.
func (c *Custodian) packaged(ctx context.Context, ev Event, e audit.Entry) (EventResult, error) {
	cat, ok := c.set.Load().categories[ev.Category]
	if !ok {
		return EventResult{}, fmt.Errorf("category %s: %w", ev.Category, ErrCategoryNotFound)
	}
	var res EventResult
	total, sequence := 0, uint64(0)
	for after := (*NaturalKey)(nil); ; {
		page, err := c.contentPage(ctx, ev, after)
		if err != nil {
			return res, err
		}
		if len(page) == 0 {
			break
		}
		marked, at, err := c.markPackaged(ctx, ev.Category, page)
		if errors.Is(err, ErrChanged) && ctx.Err() == nil {
			continue // a key was moved meanwhile, or the KEK replaced; the page is read again
		}
		if err != nil {
			return res, fmt.Errorf("content %q: %w", []byte(ev.ContentID), err)
		}
		total, res.Marked, sequence = total+len(page), res.Marked+marked, max(sequence, at)
		after = &page[len(page)-1].Key.NaturalKey
	}
	if total == 0 {
		return res, fmt.Errorf("content %q has no keys in category %s: %w", []byte(ev.ContentID), ev.Category, ErrKeyNotFound)
	}
	res.KEK = KEKID{cat.Name, c.set.Load().categories[cat.Name].ActiveKEK}
	e.Action, e.StoreSequence = "content.packaged", sequence
	e.Detail = fmt.Sprintf("%d of %d keys are in use from now on; the others were before", res.Marked, total)
	_, err := c.record(ctx, e)
	return res, err
}

// contentPage reads the next keys of a content item.
func (c *Custodian) contentPage(ctx context.Context, ev Event, after *NaturalKey) (page []SealedKey, err error) {
	err = c.store.View(ctx, func(tx Tx) error {
		owner, err := tx.ContentCategory(ev.ContentID)
		if errors.Is(err, ErrNotFound) {
			return nil
		}
		if err == nil && owner != ev.Category {
			err = fmt.Errorf("content %q: %w", []byte(ev.ContentID), ErrContentCategory)
		}
		if err != nil {
			return err
		}
		page = page[:0]
		return tx.ContentKeys(ev.Category, ev.ContentID, after, moveBatch, func(k SealedKey) error {
			page = append(page, k)
			return nil
		})
	})
	return page, err
}

// markPackaged seals the keys of a page that are not marked yet anew, with the
// mark, under the KEK that protects now: what a record says is covered by its
// seal.
func (c *Custodian) markPackaged(ctx context.Context, name CategoryName, page []SealedKey) (marked int, sequence uint64, err error) {
	var old []SealedKey
	for _, k := range page {
		if k.Key.PackagedTime.IsZero() {
			old = append(old, k)
		}
	}
	if len(old) == 0 {
		return 0, 0, nil
	}
	b := movedBatch{}
	if b.to, b.set, err = c.reserve(ctx, name, uint64(len(old))); err != nil {
		return 0, 0, err
	}
	now := c.now()
	for _, k := range old {
		sealed, err := c.sealAnew(ctx, b.set, k, func(is *ContentKey) { is.KEK, is.PackagedTime = b.to, now })
		if err != nil {
			return 0, 0, err
		}
		b.keys = append(b.keys, sealed)
	}
	sequence, err = c.storeBatch(ctx, b)
	return len(b.keys), sequence, err
}

// mayHaveAgain says why a packager needs a reissue grant to have a key again,
// or nil.
func (c *Custodian) mayHaveAgain(cat Category, k *ContentKey) error {
	if !k.PackagedTime.IsZero() {
		return fmt.Errorf("its content was packaged at %s", k.PackagedTime.Format(time.RFC3339))
	}
	if cat.Live || c.now().Before(k.CreateTime.Add(cat.ReissueWindow)) {
		return nil
	}
	return fmt.Errorf("it was issued more than %s ago", cat.ReissueWindow)
}
