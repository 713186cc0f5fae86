package custodian

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/keycustody/custodian/internal/audit"
)

// A CreateCategoryRequest makes a category with its first KEK.
type CreateCategoryRequest struct {
	RequestID     string
	Name          CategoryName
	Providers     []string      // empty: the configured default
	ReissueWindow time.Duration // zero: 72 hours
	Live          bool          // no end of the re-issue window
}

// Check says what is wrong with the request, or nil.
func (r CreateCategoryRequest) Check() error {
	if err := checkText(r.RequestID, MaxRequestIDSize); err != nil {
		return invalid("request_id", err)
	}
	if err := r.Name.Check(); err != nil {
		return invalid("name", err)
	}
	if r.ReissueWindow < 0 || r.ReissueWindow > 100*365*24*time.Hour {
		return invalid("reissue_window", fmt.Errorf("%s: must be positive, a hundred years at most", r.ReissueWindow))
	}
	return checkProviders(r.Providers)
}

// CreateCategory makes a category and version 1 of its KEK.
func (c *Custodian) CreateCategory(ctx context.Context, who Caller, req CreateCategoryRequest) (Category, error) {
	if err := req.Check(); err != nil {
		return Category{}, err
	}
	d := c.decide(who, ActionCreateCategory, Resource{Category: req.Name})
	about := ref{category: req.Name}
	cat, begun, err := c.createCategory(ctx, d, req, c.entry(c.set.Load(), who, d, ActionCreateCategory, req.RequestID, about, nil))
	if err != nil {
		err = deadline(ctx, err)
		if _, aerr := c.record(ctx, c.fail(begun, c.entry(c.set.Load(), who, d, ActionCreateCategory, req.RequestID, about, err))); aerr != nil {
			return Category{}, errors.Join(aerr, err)
		}
		return Category{}, err
	}
	return cat, nil
}

// createCategory returns the attempt too, where it came to one.
func (c *Custodian) createCategory(ctx context.Context, d Decision, req CreateCategoryRequest, e audit.Entry) (Category, *attempt, error) {
	if !d.Allow {
		return Category{}, nil, fmt.Errorf("category %s: %w", req.Name, d.Err)
	}
	if err := c.lookAtClock(); err != nil {
		return Category{}, nil, err
	}
	set := c.set.Load()
	if _, exists := set.categories[req.Name]; exists {
		return Category{}, nil, fmt.Errorf("category %s: %w", req.Name, ErrCategoryExists)
	}
	providers := req.Providers
	if len(providers) == 0 {
		providers = c.defaultWraps
	}
	if err := c.keys.configured(providers); err != nil {
		return Category{}, nil, err
	}
	if req.ReissueWindow == 0 && !req.Live {
		req.ReissueWindow = DefaultReissueWindow
	}
	begun, err := c.begin(ctx, e)
	if err != nil {
		return Category{}, nil, err
	}
	kek, err := c.newKEK(ctx, set, KEKID{req.Name, 1}, providers)
	if err != nil {
		return Category{}, begun, err
	}
	cat := Category{Name: req.Name, Mode: CategoryOpen, ActiveKEK: 1, Providers: providers, CreateTime: kek.CreateTime,
		ReissueWindow: req.ReissueWindow, Live: req.Live, Revision: 1}
	err = c.change(ctx, func(old *controlSet, _ time.Time) (change, error) {
		if _, exists := old.categories[req.Name]; exists {
			return change{}, fmt.Errorf("category %s: %w", req.Name, ErrCategoryExists)
		}
		e.KeyVersion = kek.ID.String()
		return change{put: []ControlRecord{categoryRecord(cat), kekRecord(kek)}, entry: begun.end(e)}, nil
	})
	return cat, begun, err
}

// newKEK makes one KEK version under the active MEK. Nothing is stored yet.
func (c *Custodian) newKEK(ctx context.Context, set *controlSet, id KEKID, providers []string) (KEK, error) {
	now := c.now()
	m, err := set.activeMEK(now)
	if err != nil {
		return KEK{}, err
	}
	w, err := c.keys.make(ctx, m, UseSeal, kekIdentity(set.head.StoreID, id), providers)
	if err != nil {
		return KEK{}, fmt.Errorf("kek %s: %w", id, err)
	}
	return KEK{ID: id, State: StateActive, CreateTime: now, Wrapped: w, Reserved: 1 /* the canary */, Revision: 1}, nil
}

// actionRotateKEK is what the audit log calls a new KEK version, to which
// nothing is moved.
const actionRotateKEK = "kek.rotate"

// rotateKEK gives a category the KEK version to in one change: successor
// ACTIVE, predecessor DEACTIVATED. Keys under the predecessor go on opening.
func (c *Custodian) rotateKEK(ctx context.Context, name CategoryName, from, to uint32, cause string) error {
	set := c.set.Load()
	cat, ok := set.categories[name]
	if !ok {
		return fmt.Errorf("category %s: %w", name, ErrCategoryNotFound)
	}
	e := audit.Entry{Action: actionRotateKEK, Outcome: audit.Allowed, Category: string(name), KeyVersion: KEKID{name, to}.String(), ControlRevision: set.head.Revision, Detail: cause}
	begun, err := c.begin(ctx, e)
	if err != nil {
		return err
	}
	err = c.replaceKEK(ctx, set, cat, from, to, begun.end(e))
	if err != nil {
		e.Outcome, e.Reason = audit.Failed, string(ReasonOf(err))
		if _, aerr := c.record(ctx, c.fail(begun, e)); aerr != nil {
			return errors.Join(aerr, err)
		}
	}
	if errors.Is(err, errOvertaken) {
		return nil
	}
	return err
}

// errOvertaken: the category has another KEK version already.
var errOvertaken = errors.New("another version is active by now")

// replaceKEK makes the KEK version and the change that e tells of.
func (c *Custodian) replaceKEK(ctx context.Context, set *controlSet, cat Category, from, to uint32, e audit.Entry) error {
	name := cat.Name
	kek, err := c.newKEK(ctx, set, KEKID{name, to}, cat.Providers)
	if err != nil {
		return err
	}
	return c.change(ctx, func(old *controlSet, now time.Time) (change, error) {
		cat, pred := old.categories[name], old.keks[KEKID{name, from}]
		if cat.ActiveKEK != from || !slices.Equal(cat.Providers, providersOf(kek.Wrapped)) {
			return change{}, fmt.Errorf("kek %s: %w", kek.ID, errOvertaken) // another was quicker, or it is wrapped by those that were the category's before
		}
		cat.ActiveKEK, cat.Revision = kek.ID.Version, cat.Revision+1
		pred.State, pred.DeactivateTime, pred.Revision = StateDeactivated, now, pred.Revision+1
		return change{put: []ControlRecord{categoryRecord(cat), kekRecord(pred), kekRecord(kek)}, entry: e}, nil
	})
}

// A SetModeRequest freezes a category, restricts it, or opens it again.
type SetModeRequest struct {
	RequestID string
	Name      CategoryName
	Mode      CategoryMode
	Cause     string
}

// Check says what is wrong with the request, or nil.
func (r SetModeRequest) Check() error {
	if err := checkText(r.RequestID, MaxRequestIDSize); err != nil {
		return invalid("request_id", err)
	}
	if err := r.Name.Check(); err != nil {
		return invalid("category", err)
	}
	if _, known := modeActions[r.Mode]; !known {
		return invalid("mode", fmt.Errorf("%s: must be OPEN, FROZEN, NO_NEW or REKEY_REQUIRED", r.Mode))
	}
	if err := checkText(r.Cause, MaxCauseSize); err != nil {
		return invalid("cause", err)
	}
	return nil
}

// modeActions are what the audit log calls a change of mode. A restore reads
// them to find the restrictions that a backup does not know.
var modeActions = map[CategoryMode]string{CategoryOpen: "category.open", CategoryFrozen: "category.freeze", CategoryNoNew: "category.no-new",
	CategoryRekeyRequired: "category.rekey-required"}

// SetCategoryMode freezes a category at once. Where there are no officers with a
// quorum, it sets the other modes, too.
func (c *Custodian) SetCategoryMode(ctx context.Context, who Caller, req SetModeRequest) (Category, error) {
	if err := req.Check(); err != nil {
		return Category{}, err
	}
	d := c.decide(who, ActionSetMode, Resource{Category: req.Name})
	var cat Category
	var begun *attempt
	set := c.set.Load()
	e := c.entry(set, who, d, ActionSetMode, req.RequestID, ref{category: req.Name}, nil)
	e.Action, e.Detail = modeActions[req.Mode], req.Cause
	err := d.Err
	if d.Allow && req.Mode != CategoryFrozen {
		// Only a freeze, the break-glass, does not wait for a clock that is believed.
		err = c.lookAtClock()
		if c.set.Load().authority != nil {
			err = refusePlan(ErrQuorum, "a freeze is lifted by a ceremony of kind %s, and another mode set by one of kind %s, as the officers' quorum decides", KindUnfreeze, KindCategoryPolicy)
		}
	}
	if _, ok := set.categories[req.Name]; err == nil && !ok {
		err = ErrCategoryNotFound
	}
	if err == nil {
		// A freeze is not held up by a log that cannot be written: then nothing is
		// released either, but it is to hold when that has passed.
		if begun, err = c.begin(ctx, e); req.Mode == CategoryFrozen {
			err = nil
		}
	}
	if err == nil {
		err = c.change(ctx, func(old *controlSet, now time.Time) (change, error) {
			put := old.setMode(old.categories[req.Name], req.Mode, now)
			return change{put: put, entry: begun.end(e), restricts: req.Mode == CategoryFrozen}, nil
		})
	}
	if err != nil {
		err = deadline(ctx, fmt.Errorf("category %s: %w", req.Name, err))
		failed := c.entry(c.set.Load(), who, d, ActionSetMode, req.RequestID, ref{category: req.Name}, err)
		if begun != nil {
			failed.Action = e.Action
		}
		if _, aerr := c.record(ctx, c.fail(begun, failed)); aerr != nil {
			return Category{}, errors.Join(aerr, err)
		}
		return Category{}, err
	}
	cat = c.set.Load().categories[req.Name]
	c.log.Warn("category mode set", "category", req.Name, "mode", req.Mode.String(), "by", who.ID)
	return cat, nil
}

// A budget is what is left of the GCM invocations that were reserved for a
// category's KEK. Who holds turn, a channel of one place, may use the rest.
type budget struct {
	turn    chan struct{}
	kek     KEKID
	left    uint64
	retryAt time.Time // not before, a rotation that failed is tried again
}

// rotateRetry is how long a rotation that failed is left alone while there
// are invocations left.
const rotateRetry = 30 * time.Second

// reserve returns the KEK version that protects in a category, with n GCM
// invocations that no one else will use. They are reserved in the store in
// blocks, before use. At the soft limit the category gets a new version.
// Categories do not wait for each other.
func (c *Custodian) reserve(ctx context.Context, name CategoryName, n uint64) (KEKID, *controlSet, error) {
	b := c.budget(name)
	select {
	case b.turn <- struct{}{}:
		defer func() { <-b.turn }()
	case <-ctx.Done():
		return KEKID{}, nil, fmt.Errorf("category %s: reserve GCM invocations: %w", name, ErrDeadline)
	}
	for range 4 { // a rotation, or two where its providers change, then a block, then the answer
		set := c.set.Load()
		cat, ok := set.categories[name]
		if !ok {
			return KEKID{}, nil, fmt.Errorf("category %s: %w", name, ErrCategoryNotFound)
		}
		id := KEKID{name, cat.ActiveKEK}
		kek := set.keks[id]
		if err := Usable(kek.State, Protect, false); err != nil {
			return id, nil, fmt.Errorf("kek %s: state %s: %w", id, kek.State, err)
		}
		if b.kek != id {
			b.kek, b.left = id, 0
		}
		if b.left >= n {
			b.left -= n
			return id, set, nil
		}
		block := max(c.limits.Block, n)
		fits := kek.Reserved <= c.limits.Hard && block <= c.limits.Hard-kek.Reserved
		if kek.Reserved >= c.limits.Soft && (!fits || !c.now().Before(b.retryAt)) {
			err := c.rotateKEK(ctx, name, id.Version, set.nextKEK(name), "soft limit of GCM invocations")
			if err == nil {
				continue
			}
			b.retryAt = c.now().Add(rotateRetry)
			c.log.Error("a KEK is past its soft limit and cannot be rotated", "kek", id.String(), "err", err)
			if !fits {
				return id, nil, fmt.Errorf("kek %s: %d of %d GCM invocations reserved, and it has no successor: %w", id, kek.Reserved, c.limits.Hard, err)
			}
		}
		if !fits {
			return id, nil, fmt.Errorf("kek %s: %d of %d GCM invocations reserved: %w", id, kek.Reserved, c.limits.Hard, ErrKEKExhausted)
		}
		if err := c.reserveBlock(ctx, id, block); err != nil {
			return id, nil, err
		}
		b.left += block
	}
	return KEKID{}, nil, fmt.Errorf("category %s: its KEK changes too fast: %w", name, ErrStoreUnavailable)
}

func (c *Custodian) budget(name CategoryName) *budget {
	c.budgetMu.Lock()
	defer c.budgetMu.Unlock()
	b := c.budgets[name]
	if b == nil {
		b = &budget{turn: make(chan struct{}, 1)}
		c.budgets[name] = b
	}
	return b
}

func (c *Custodian) reserveBlock(ctx context.Context, id KEKID, block uint64) error {
	return c.change(ctx, func(old *controlSet, _ time.Time) (change, error) {
		k := old.keks[id]
		k.Reserved, k.Revision = k.Reserved+block, k.Revision+1
		return change{put: []ControlRecord{kekRecord(k)}, entry: audit.Entry{Action: "kek.reserve", Category: string(id.Category),
			KeyVersion: id.String(), Detail: fmt.Sprintf("%d invocations reserved", k.Reserved)}}, nil
	})
}
