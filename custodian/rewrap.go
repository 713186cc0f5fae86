package custodian

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/keycustody/custodian/internal/audit"
)

// This file moves outer wraps: to other providers, or to the newest version of
// a provider's own key. What is wanted is a record, a RewrapJob; what is done
// is read from the wrapped keys themselves. So the job that runs, and the one
// that a restart finds, are the same code.

// A RewrapJob is what is still to be done to the outer wraps of a category's
// KEKs, or of the helper keys. It is there from the audit entry that begins it
// to the one that ends it.
type RewrapJob struct {
	Category  CategoryName // empty: the helper keys
	Providers []string     // each key is to have a wrap of each of these, and no other
	// Reencrypt are those of Providers whose wraps are made anew, since their
	// own keys have newer versions. No record tells the version of such a key,
	// so here the job keeps a mark: what is up to Purpose and Version is done.
	Reencrypt []string
	Purpose   HelperPurpose
	Version   uint32
	BeginTime time.Time
	By        string // who asked for it
	Revision  uint64
}

// A SetProvidersRequest says which providers hold the outer wraps of a category
// from now on, or of the helper keys.
type SetProvidersRequest struct {
	RequestID  string
	Category   CategoryName
	HelperKeys bool // in place of a category
	Providers  []string
	Cause      string
}

// A ReencryptRequest has the outer wraps of a category, or of the helper keys,
// made anew after providers rotated their own keys.
type ReencryptRequest struct {
	RequestID  string
	Category   CategoryName
	HelperKeys bool     // in place of a category
	Providers  []string // empty: all that hold a wrap
	Cause      string
}

// Check says what is wrong with the request, or nil.
func (r SetProvidersRequest) Check() error {
	if len(r.Providers) == 0 {
		return invalid("providers", errors.New("empty: nobody could open the keys"))
	}
	return checkRewrap(r.RequestID, r.Category, r.HelperKeys, r.Providers, r.Cause)
}

// Check says what is wrong with the request, or nil.
func (r ReencryptRequest) Check() error {
	return checkRewrap(r.RequestID, r.Category, r.HelperKeys, r.Providers, r.Cause)
}

func checkRewrap(requestID string, category CategoryName, helpers bool, providers []string, cause string) error {
	if err := checkText(requestID, MaxRequestIDSize); err != nil {
		return invalid("request_id", err)
	}
	if helpers && category != "" {
		return invalid("category", errors.New("set beside helper_keys: name one of them"))
	}
	if !helpers {
		if err := category.Check(); err != nil {
			return invalid("category", err)
		}
	}
	if err := checkProviders(providers); err != nil {
		return err
	}
	if err := checkText(cause, MaxCauseSize); err != nil {
		return invalid("cause", err)
	}
	return nil
}

// maxProviders is how many can hold one key.
const maxProviders = 16

func checkProviders(providers []string) error {
	if len(providers) > maxProviders {
		return invalid("providers", fmt.Errorf("%d: must be %d at most", len(providers), maxProviders))
	}
	for i, p := range providers {
		if slices.Contains(providers[:i], p) {
			return invalid(fmt.Sprintf("providers[%d]", i), fmt.Errorf("%q is named twice", p))
		}
	}
	return nil
}

// configured says which of the providers is not, or nil.
func (r *keyring) configured(providers []string) error {
	for i, p := range providers {
		if r.guards[p] == nil {
			return invalid(fmt.Sprintf("providers[%d]", i), fmt.Errorf("%.80q is not configured", p))
		}
	}
	return nil
}

// SetProviders begins the job that moves a category's KEKs, or the helper keys,
// to other providers. New KEKs are wrapped by them at once. It does not wait
// for the job: see RunRewraps.
func (c *Custodian) SetProviders(ctx context.Context, who Caller, req SetProvidersRequest) (RewrapStatus, error) {
	if err := req.Check(); err != nil {
		return RewrapStatus{}, err
	}
	d := c.decide(who, ActionSetProviders, Resource{Category: req.Category})
	if req.HelperKeys && d.Allow && !d.KnowIt {
		d.Allow, d.Err = false, ErrDenied // every category rests on the helper keys
	}
	return c.beginRewrap(ctx, who, d, ActionSetProviders, req.Category, req.RequestID, detail("to "+names(req.Providers), req.Cause), c.toProviders(req.Providers, req.Cause))
}

// toProviders changes a job to one that moves keys to these providers.
func (c *Custodian) toProviders(providers []string, cause string) func(*RewrapJob) (string, error) {
	return func(job *RewrapJob) (string, error) {
		if err := c.keys.configured(providers); err != nil {
			return "", err
		}
		was := names(job.Providers)
		job.Providers = providers
		job.Reencrypt = slices.DeleteFunc(job.Reencrypt, func(p string) bool { return !slices.Contains(providers, p) })
		return detail(fmt.Sprintf("from %s to %s", was, names(job.Providers)), cause), nil
	}
}

// Reencrypt begins the job that makes outer wraps anew under the newest version
// of the providers' own keys. It does not wait for it: see RunRewraps.
func (c *Custodian) Reencrypt(ctx context.Context, who Caller, req ReencryptRequest) (RewrapStatus, error) {
	if err := req.Check(); err != nil {
		return RewrapStatus{}, err
	}
	// An operator is granted the daemon, not categories: nobody holds a key
	// afterwards who did not before.
	d := c.decide(who, ActionReencrypt, Resource{})
	return c.beginRewrap(ctx, who, d, ActionReencrypt, req.Category, req.RequestID, detail("by "+cmp.Or(names(req.Providers), "all"), req.Cause), func(job *RewrapJob) (string, error) {
		by := req.Providers
		if len(by) == 0 {
			by = job.Providers
		}
		for i, p := range by {
			if !slices.Contains(job.Providers, p) {
				return "", invalid(fmt.Sprintf("providers[%d]", i), fmt.Errorf("%.80q holds none of these keys; those that do are %s", p, names(job.Providers)))
			}
			if !slices.Contains(job.Reencrypt, p) {
				job.Reencrypt = append(job.Reencrypt, p)
			}
		}
		job.Purpose, job.Version = "", 0 // what is done already is done again: it may be from before the rotation
		return detail("by "+names(by), req.Cause), nil
	})
}

// beginRewrap writes the job down with its first audit entry, where d allows it.
// what says in the log what is about to be done; want changes the job that is
// there, or a new one that changes nothing, and returns what its entry says.
func (c *Custodian) beginRewrap(ctx context.Context, who Caller, d Decision, a Action, name CategoryName, requestID, what string, want func(*RewrapJob) (string, error)) (RewrapStatus, error) {
	var job RewrapJob
	err := d.Err
	if d.Allow {
		err = c.lookAtClock()
	}
	e := c.entry(c.set.Load(), who, d, a, requestID, ref{category: name}, nil)
	e.Detail = fmt.Sprintf("%s: %s", scope(name), what)
	err = c.administer(ctx, d, e, err, func(e audit.Entry) (err error) {
		job, err = c.putRewrap(ctx, e, name, want)
		return err
	})
	if err != nil {
		return RewrapStatus{}, fmt.Errorf("%s: %w", scope(name), err)
	}
	c.rewraps.wake()
	return c.rewrapStatus(c.set.Load(), job), nil
}

// putRewrap writes a job down. It asks nobody: whoever calls it has decided.
func (c *Custodian) putRewrap(ctx context.Context, e audit.Entry, name CategoryName, want func(*RewrapJob) (string, error)) (job RewrapJob, err error) {
	err = c.change(ctx, func(old *controlSet, now time.Time) (change, error) {
		var running bool
		job, running = old.rewraps[name]
		cat, known := old.categories[name]
		switch {
		case !known && name != "":
			return change{}, ErrCategoryNotFound
		case running:
			job.Reencrypt = slices.Clone(job.Reencrypt)
		default:
			job = RewrapJob{Category: name, BeginTime: now, Providers: cat.Providers}
			if name == "" {
				job.Providers = old.helperProviders()
			}
		}
		said, err := want(&job)
		if err != nil {
			return change{}, err
		}
		job.By, job.Revision = e.Caller, job.Revision+1
		e.Detail = fmt.Sprintf("%s, %d keys: %s", scope(name), len(old.rewrappable(name)), said)
		ch := change{put: []ControlRecord{rewrapRecord(job)}, entry: e}
		if name != "" && !slices.Equal(cat.Providers, job.Providers) {
			cat.Providers, cat.Revision = job.Providers, cat.Revision+1
			ch.put = append(ch.put, categoryRecord(cat))
		}
		return ch, nil
	})
	return job, err
}

// names lists providers in a sentence.
func names(providers []string) string { return strings.Join(providers, ", ") }

// scope names what a job is about.
func scope(name CategoryName) string {
	if name == "" {
		return "helper keys"
	}
	return "category " + string(name)
}

func detail(what, cause string) string {
	if cause == "" {
		return what
	}
	return what + ": " + cause
}

// helperProviders are those of the newest record helper: all helper keys are
// moved together.
func (s *controlSet) helperProviders() []string {
	h, err := s.latestHelper(HelperRecord)
	if err != nil {
		return nil
	}
	return providersOf(h.Wrapped)
}

func providersOf(w Wrapped) []string {
	var out []string
	for _, o := range w.Outer {
		out = append(out, o.Provider)
	}
	return out
}

// rewrappable are the keys that a job of name is about, in the order in which
// it takes them. Destroyed keys have no wraps any more.
func (s *controlSet) rewrappable(name CategoryName) []keyID {
	var ids []keyID
	for id, k := range s.keks {
		if name != "" && id.Category == name && k.State != StateDestroyed {
			ids = append(ids, keyID{kek: id.Category, version: id.Version})
		}
	}
	for id, h := range s.helpers {
		if name == "" && h.State != StateDestroyed {
			ids = append(ids, keyID{helper: id.purpose, version: id.version})
		}
	}
	slices.SortFunc(ids, func(a, b keyID) int {
		return cmp.Or(strings.Compare(string(a.helper), string(b.helper)), cmp.Compare(a.version, b.version))
	})
	return ids
}

// outerOf is how a key rests now, and what its wraps are bound to.
func (s *controlSet) outerOf(id keyID) (w Wrapped, use KeyUse, ident []byte) {
	if id.helper != "" {
		return s.helpers[helperID{id.helper, id.version}].Wrapped, UseMAC, helperIdentity(s.head.StoreID, id.helper, id.version)
	}
	k := KEKID{id.kek, id.version}
	return s.keks[k].Wrapped, UseSeal, kekIdentity(s.head.StoreID, k)
}

// marked says whether the wraps of id are made anew already.
func (j RewrapJob) marked(id keyID) bool {
	return len(j.Reencrypt) == 0 || cmp.Or(strings.Compare(string(id.helper), string(j.Purpose)), cmp.Compare(id.version, j.Version)) <= 0
}

// done says whether nothing is left to do to id.
func (j RewrapJob) done(s *controlSet, id keyID) bool {
	w, _, _ := s.outerOf(id)
	return slices.Equal(providersOf(w), j.Providers) && j.marked(id)
}

// A RewrapStatus describes a job.
type RewrapStatus struct {
	Category   CategoryName `json:"category,omitempty"`
	HelperKeys bool         `json:"helper_keys,omitempty"`
	Providers  []string     `json:"providers"`
	Reencrypt  []string     `json:"reencrypt,omitempty"`
	BeginTime  time.Time    `json:"begin_time"`
	By         string       `json:"requested_by"`
	Done       int          `json:"done"` // keys
	Total      int          `json:"total"`
	LastError  string       `json:"last_error,omitempty"` // why it does not go on; it is tried again
}

func (c *Custodian) rewrapStatus(set *controlSet, j RewrapJob) RewrapStatus {
	s := RewrapStatus{Category: j.Category, HelperKeys: j.Category == "", Providers: j.Providers, Reencrypt: j.Reencrypt, BeginTime: j.BeginTime,
		By: j.By, LastError: c.rewraps.fault(j.Category)}
	for _, id := range set.rewrappable(j.Category) {
		s.Total++
		if j.done(set, id) {
			s.Done++
		}
	}
	return s
}

// rewrapStatuses describes all jobs, the helper keys first.
func (c *Custodian) rewrapStatuses(set *controlSet) []RewrapStatus {
	var out []RewrapStatus
	for _, j := range set.rewraps {
		out = append(out, c.rewrapStatus(set, j))
	}
	slices.SortFunc(out, func(a, b RewrapStatus) int { return strings.Compare(string(a.Category), string(b.Category)) })
	return out
}

// Rewraps lists the jobs that have not ended.
func (c *Custodian) Rewraps(ctx context.Context, who Caller) ([]RewrapStatus, error) {
	d := c.decide(who, ActionReadStatus, Resource{})
	if !d.Allow {
		return nil, c.refuse(ctx, who, d, ActionReadStatus, ref{})
	}
	return c.rewrapStatuses(c.set.Load()), nil
}

// rewrapping is what the runner of the jobs keeps in memory.
type rewrapping struct {
	pace *rate.Limiter
	poke chan struct{} // of one place: there is a new job

	// mu guards the field below.
	mu     sync.Mutex
	faults map[CategoryName]error // of the last pass
}

func newRewrapping(limits KMSLimits) *rewrapping {
	return &rewrapping{pace: rate.NewLimiter(rate.Limit(limits.RewrapRate), 1), poke: make(chan struct{}, 1), faults: map[CategoryName]error{}}
}

func (r *rewrapping) wake() {
	select {
	case r.poke <- struct{}{}:
	default: // it will look anyway
	}
}

func (r *rewrapping) fault(name CategoryName) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return text(r.faults[name])
}

func (r *rewrapping) setFault(name CategoryName, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.faults[name] = err
}

// How long jobs that cannot go on are left alone: at first, and at most.
const (
	rewrapPause    = time.Second
	maxRewrapPause = time.Minute
)

// RunRewraps does the jobs that are there, whoever began them and before
// whatever restart, until ctx ends. A job that cannot go on, because a provider
// is away or a record is bad, is tried again for ever.
func (c *Custodian) RunRewraps(ctx context.Context) {
	for pause := rewrapPause; ctx.Err() == nil; {
		began := c.set.Load().head.Revision
		failed := false
		for name := range c.set.Load().rewraps {
			err := c.rewrapAll(ctx, name)
			if ctx.Err() != nil {
				return
			}
			if errors.Is(err, errOtherJob) {
				c.rewraps.wake() // and begin again with what is there now
				err = nil
			}
			c.rewraps.setFault(name, err)
			if err != nil {
				failed = true
				c.log.Warn("outer wraps are not all moved yet; the job goes on", "job", scope(name), "again_in", pause.String(), "err", err)
			}
		}
		if !failed || c.set.Load().head.Revision != began { // there is nothing to do, or it got somewhere
			pause = rewrapPause
		}
		again := time.NewTimer(pause)
		if failed {
			pause = min(2*pause, maxRewrapPause)
		} else {
			again.Stop()
		}
		select {
		case <-c.rewraps.poke:
		case <-again.C:
		case <-ctx.Done():
		}
		again.Stop()
	}
}

// A rewrapped key has new outer wraps, each of which was opened, and which are
// not stored yet.
type rewrapped struct {
	id    keyID
	was   []OuterWrap
	outer []OuterWrap
}

// rewrapBatch is how many keys are stored in one change of the control set. A
// crash loses the calls for as many, and nothing else.
const rewrapBatch = 32

// rewrapAll does one job to its end, or as far as it goes: an error is of the
// first key that it could not do. A bad record does not keep it from the
// others, a provider that is away does.
func (c *Custodian) rewrapAll(ctx context.Context, name CategoryName) error {
	set := c.set.Load()
	job, ok := set.rewraps[name]
	if !ok {
		return nil
	}
	var batch []rewrapped
	var first error
	mark := keyID{helper: job.Purpose, version: job.Version}
	for _, id := range set.rewrappable(name) {
		if !job.done(set, id) {
			outer, err := c.rewrapKey(ctx, set, job, id)
			if err != nil && first == nil {
				first = err
			}
			if errors.Is(err, ErrRecordCorrupt) {
				continue
			}
			if err != nil {
				break
			}
			w, _, _ := set.outerOf(id)
			batch = append(batch, rewrapped{id, w.Outer, outer})
		}
		if first == nil {
			mark = id
		}
		if len(batch) == rewrapBatch {
			if err := c.keepRewrapped(ctx, job, batch, mark); err != nil {
				return errors.Join(first, err)
			}
			batch = nil
		}
	}
	if err := c.keepRewrapped(ctx, job, batch, mark); err != nil || first != nil {
		return errors.Join(first, err)
	}
	return c.endRewrap(ctx, job)
}

// rewrapKey makes the new outer wraps of one key. Nothing is stored yet.
func (c *Custodian) rewrapKey(ctx context.Context, set *controlSet, job RewrapJob, id keyID) ([]OuterWrap, error) {
	if err := c.rewraps.pace.Wait(ctx); err != nil {
		return nil, fmt.Errorf("%s: %w", id, err)
	}
	var afresh []string
	if !job.marked(id) {
		afresh = job.Reencrypt
	}
	return c.keys.rewrap(ctx, set, id, job.Providers, afresh)
}

// rewrap puts the layers of providers around a key, those of afresh anew. The
// token proves what it starts from, and every layer that the key will rest in
// is opened again, also one that stays: so nothing is dropped before there is
// another way that is proved.
func (r *keyring) rewrap(ctx context.Context, s *controlSet, id keyID, providers, afresh []string) ([]OuterWrap, error) {
	w, use, ident := s.outerOf(id)
	m, ok := s.meks[w.MEKVersion]
	if !ok {
		return nil, corrupt(id.String(), fmt.Errorf("mek version %d is not recorded", w.MEKVersion))
	}
	inner, err := r.openOuter(ctx, CallRewrap, id, w, ident)
	if err != nil {
		return nil, err
	}
	key, err := r.hsm.LoadKey(ctx, m, use, ident, inner, w.Canary)
	if err != nil {
		return nil, unwrapError(id.String(), err)
	}
	key.Release()
	var outer []OuterWrap
	for _, name := range providers {
		g := r.guards[name]
		if g == nil {
			return nil, fmt.Errorf("%s: provider %q is not configured: %w", id, name, ErrKMSUnavailable)
		}
		i := slices.IndexFunc(w.Outer, func(o OuterWrap) bool { return o.Provider == name })
		var o OuterWrap
		switch {
		case i < 0:
			o, err = g.wrap(ctx, CallRewrap, inner, ident)
		case slices.Contains(afresh, name):
			o, err = g.rewrap(ctx, w.Outer[i], inner, ident)
		default:
			o = w.Outer[i]
		}
		if err != nil {
			return nil, fmt.Errorf("%s: provider %s: wrap: %w", id, name, kmsError(err))
		}
		if err := r.proveWrap(ctx, CallRewrap, g, o, inner, ident); err != nil {
			return nil, fmt.Errorf("%s: %w", id, err)
		}
		outer = append(outer, o)
	}
	return outer, nil
}

// proveWrap opens a wrap before it counts: what the HSM has wrapped must come
// back.
func (r *keyring) proveWrap(ctx context.Context, why CallReason, g *guard, o OuterWrap, inner, ident []byte) error {
	back, err := g.unwrap(ctx, why, o, ident)
	if err != nil {
		return fmt.Errorf("provider %s: open the new wrap: %w", g.p.Name(), kmsError(err))
	}
	if !bytes.Equal(back, inner) { // both are wrapped by the HSM: no secret is compared
		return fmt.Errorf("provider %s: the new wrap opens to something else: %w", g.p.Name(), ErrKMSUnavailable)
	}
	return nil
}

var errOtherJob = errors.New("the job has changed meanwhile")

// keepRewrapped stores new wraps, and how far the job is. A key that has
// changed its wraps meanwhile is left as it is.
func (c *Custodian) keepRewrapped(ctx context.Context, job RewrapJob, batch []rewrapped, mark keyID) error {
	if len(batch) == 0 {
		return nil
	}
	if err := c.lookAtClock(); err != nil {
		return err
	}
	return c.change(ctx, func(old *controlSet, _ time.Time) (change, error) {
		now := old.rewraps[job.Category]
		if now.Revision != job.Revision {
			return change{}, errOtherJob
		}
		ch := change{entry: audit.Entry{Action: "kek.rewrap", Category: string(job.Category),
			Detail: fmt.Sprintf("%s to %s, %d keys: now by %s", batch[0].id, batch[len(batch)-1].id, len(batch), names(job.Providers))}}
		for _, b := range batch {
			r, ok := old.withOuter(b.id, b.was, b.outer)
			if !ok {
				return change{}, errOtherJob
			}
			ch.put = append(ch.put, r)
		}
		if len(job.Reencrypt) > 0 {
			now.Purpose, now.Version = mark.helper, mark.version
			ch.put = append(ch.put, rewrapRecord(now))
		}
		return ch, nil
	})
}

// withOuter is the record of a key with other wraps, if it still has those that
// the others were made from.
func (s *controlSet) withOuter(id keyID, was, outer []OuterWrap) (r ControlRecord, ok bool) {
	if id.helper != "" {
		h, ok := s.helpers[helperID{id.helper, id.version}]
		if !ok || !sameOuter(h.Wrapped.Outer, was) {
			return r, false
		}
		h.Wrapped.Outer, h.Revision = outer, h.Revision+1
		return helperRecord(h), true
	}
	k, ok := s.keks[KEKID{id.kek, id.version}]
	if !ok || !sameOuter(k.Wrapped.Outer, was) {
		return r, false
	}
	k.Wrapped.Outer, k.Revision = outer, k.Revision+1
	return kekRecord(k), true
}

func sameOuter(a, b []OuterWrap) bool {
	return slices.EqualFunc(a, b, func(a, b OuterWrap) bool {
		return a.Provider == b.Provider && a.KeyRef == b.KeyRef && bytes.Equal(a.Blob, b.Blob)
	})
}

// endRewrap takes a job away whose keys all rest as it wants.
func (c *Custodian) endRewrap(ctx context.Context, job RewrapJob) error {
	if err := c.lookAtClock(); err != nil {
		return err
	}
	err := c.change(ctx, func(old *controlSet, _ time.Time) (change, error) {
		now := old.rewraps[job.Category]
		if now.Revision != job.Revision {
			return change{}, errOtherJob
		}
		ids := old.rewrappable(job.Category)
		for _, id := range ids {
			if w, _, _ := old.outerOf(id); !slices.Equal(providersOf(w), job.Providers) {
				return change{}, errOtherJob // a new version came, wrapped by those before
			}
		}
		return change{remove: []controlKey{{ControlRewrap, rewrapName(job.Category)}}, entry: audit.Entry{Action: "kek.rewrap.end", Category: string(job.Category),
			Detail: fmt.Sprintf("%s, %d keys: all by %s, asked for by %s", scope(job.Category), len(ids), names(job.Providers), job.By)}}, nil
	})
	if err == nil {
		c.log.Info("outer wraps are moved, and each was opened", "job", scope(job.Category), "providers", names(job.Providers))
		c.rotations.wakeUp() // a ceremony may have waited for it
	}
	return err
}

func rewrapName(name CategoryName) string {
	if name == "" {
		return "helper keys" // no category has a space in its name
	}
	return string(name)
}

func rewrapRecord(j RewrapJob) ControlRecord {
	return ControlRecord{Kind: ControlRewrap, Name: rewrapName(j.Category), Body: encodeRewrap(j)}
}

func encodeRewrap(j RewrapJob) []byte {
	e := newEncoder(formRewrap, 256)
	e.str(string(j.Category))
	e.strs(j.Providers)
	e.strs(j.Reencrypt)
	e.str(string(j.Purpose))
	e.uint(uint64(j.Version))
	e.time(j.BeginTime)
	e.str(j.By)
	e.uint(j.Revision)
	return e.b
}

func decodeRewrap(b []byte) (RewrapJob, error) {
	d := newDecoder(formRewrap, b)
	j := RewrapJob{Category: CategoryName(d.str()), Providers: d.strs(), Reencrypt: d.strs(), Purpose: HelperPurpose(d.str()), Version: d.uint32(),
		BeginTime: d.time(), By: d.str(), Revision: d.uint()}
	return j, d.done("rewrap record")
}
