package custodian

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/keycustody/custodian/internal/audit"
	"github.com/keycustody/custodian/internal/sealing"
	"github.com/keycustody/custodian/internal/secret"
)

// A RetrieveRequest asks for the keys of 1 to 64 KIDs.
type RetrieveRequest struct {
	RequestID string
	// ContentID is optional. A caller who names a content item that exists in
	// a category granted to it may hear that a KID is unknown.
	ContentID ContentID
	KIDs      []KID
	// RecipientKeyID names which of the caller's pinned public keys the answer
	// is sealed to; empty: the first, where there is one.
	RecipientKeyID string

	// LicenceToken is the signed token of the viewer's session, in the compact
	// serialization of a JWS; empty: none. SessionID is what the caller says the
	// session is; where it is given, the token's must be the same.
	LicenceToken string
	SessionID    string
	// UserID is what the caller says the viewer is. The audit log has keyed hashes
	// of session and user.
	UserID string
	// Asserted is what the caller says of the viewer, and nobody has signed.
	Asserted Viewer

	recipient sealing.PublicKey
	token     *Token
}

// A RetrieveResult is the answer for one KID: Info and Key, or Sealed in Key's
// place where the caller has a recipient key; or Err. Whoever gets it destroys
// Key.
type RetrieveResult struct {
	KID     KID
	Err     error
	Key     secret.Secret
	Sealed  *SealedTo
	Info    ContentKey
	Receipt audit.Receipt
	// Grace is what is left of the grace on which the key was released while
	// the KMS is away; zero: it was not.
	Grace time.Duration

	decision Decision
	kept     bool // the CEK was, as of a hot title
}

// session is the viewer's, from a licence token that is good where the caller
// names none.
func (r RetrieveRequest) session() string {
	if r.SessionID == "" && r.token != nil && r.token.err == nil {
		return r.token.session
	}
	return r.SessionID
}

// Check says what is wrong with the request, or nil.
func (r RetrieveRequest) Check() error {
	if err := checkText(r.RequestID, MaxRequestIDSize); err != nil {
		return invalid("request_id", err)
	}
	if len(r.KIDs) == 0 || len(r.KIDs) > MaxKIDsPerCall {
		return invalid("kids", fmt.Errorf("%d KIDs: must be 1 to %d", len(r.KIDs), MaxKIDsPerCall))
	}
	if len(r.ContentID) > 0 {
		if err := r.ContentID.Check(); err != nil {
			return invalid("content_id", err)
		}
	}
	if err := checkViewer("viewer_context.session_id", r.SessionID); err != nil {
		return err
	}
	if err := checkViewer("viewer_context.user_id", r.UserID); err != nil {
		return err
	}
	if err := r.Asserted.Check(); err != nil {
		return invalid("viewer_context", err)
	}
	for i, kid := range r.KIDs {
		if kid.IsZero() {
			return invalid(fmt.Sprintf("kids[%d]", i), errors.New("the zero KID names no key"))
		}
	}
	return nil
}

// Retrieve releases content keys to a DRM provider: one result for each KID,
// in order. It fails as a whole for a malformed request, where there are too
// many calls (ErrRate), and where the audit log cannot be written; then nothing
// is released.
func (c *Custodian) Retrieve(ctx context.Context, who Caller, req RetrieveRequest) ([]RetrieveResult, error) {
	if err := req.Check(); err != nil {
		return nil, err
	}
	if err := c.anchored(); err != nil {
		return nil, err
	}
	defer c.freezeBroken(ctx)
	ctx, watch := timed(ctx)
	defer c.tellLate(ctx, watch, who, req)
	pass, err := c.admit(ctx, who, req)
	watch.end(stageAdmission)
	if err != nil {
		return nil, err
	}
	results, err := c.retrieve(ctx, who, req)
	c.gate.Leave(pass, err == nil && !lateResults(results))
	return results, err
}

// retrieve is Retrieve of a call that was let in.
func (c *Custodian) retrieve(ctx context.Context, who Caller, req RetrieveRequest) ([]RetrieveResult, error) {
	watch := stopwatchOf(ctx)
	var err error
	if req.recipient, err = c.policy.Load().recipient(who, req.RecipientKeyID); err != nil {
		return nil, err
	}
	req.token = c.policy.Load().ReadToken(who, req.LicenceToken, req.SessionID, c.now())
	watch.end(stageLicence)
	results := make([]RetrieveResult, len(req.KIDs))
	sealed := make([]SealedKey, len(req.KIDs))
	contentCategory, err := c.readKeys(ctx, req, sealed, results)
	watch.end(stageStore)
	if err != nil {
		return nil, c.unread(ctx, who, req, deadline(ctx, err))
	}
	// The set is loaded after the records, so that it knows their KEKs.
	set := c.set.Load()
	viewer, err := c.lookAtViewer(ctx, set, who, &req)
	watch.end(stageViewer)
	if err != nil {
		return nil, c.unread(ctx, who, req, deadline(ctx, err))
	}
	entries := make([]audit.Entry, len(results))
	for i := range results {
		r := &results[i]
		r.KID = req.KIDs[i]
		c.release(ctx, set, who, req, contentCategory, &sealed[i], r)
		about := ref{contentID: req.ContentID, kid: r.KID}
		if _, ok := set.categories[sealed[i].Key.Category]; ok {
			about.category = sealed[i].Key.Category
		}
		if r.Err == nil { // else nothing has proved what the record says
			about.key = &r.Info
		}
		entries[i] = c.entry(set, who, r.decision, ActionRelease, req.RequestID, about, r.Err)
		entries[i].Detail = r.detail(req.token)
		entries[i].Refs = viewer
	}
	watch.end(stageDecide)
	receipts, err := c.record(ctx, entries...)
	watch.end(stageAudit)
	if err == nil && ctx.Err() != nil {
		err = fmt.Errorf("retrieve %d keys: %w", len(results), ErrDeadline) // nobody waits for them
	}
	if err != nil {
		for i := range results {
			results[i].Key.Destroy()
		}
		return nil, err
	}
	for i := range results {
		results[i].Receipt = receipts[i]
	}
	return results, nil
}

// readKeys reads the records that are asked for: what is wrong with one of them
// is the error of its result. It returns the category of the content item that
// the request names, "" where there is none.
func (c *Custodian) readKeys(ctx context.Context, req RetrieveRequest, sealed []SealedKey, results []RetrieveResult) (contentCategory CategoryName, err error) {
	err = c.store.View(ctx, func(tx Tx) error {
		for i, kid := range req.KIDs {
			sealed[i], results[i].Err = tx.ContentKey(kid)
		}
		if len(req.ContentID) == 0 {
			return nil
		}
		var err error
		if contentCategory, err = tx.ContentCategory(req.ContentID); errors.Is(err, ErrNotFound) {
			return nil
		}
		return err
	})
	return contentCategory, err
}

// lookAtViewer returns the references of the viewer that the audit log has, and
// makes the token of one whose session is revoked, or the token's issuer, a bad
// one. They cost operations of the token, which are not made for who may release
// nothing at all, whatever KIDs it names.
func (c *Custodian) lookAtViewer(ctx context.Context, set *controlSet, who Caller, req *RetrieveRequest) ([]audit.Ref, error) {
	if d := c.decide(who, ActionRelease, Resource{}); !d.Allow {
		return nil, nil
	}
	session := req.session()
	refs, err := c.viewerRefs(ctx, set, session, req.UserID)
	if err != nil {
		return nil, err
	}
	revoked, err := c.revocationOf(ctx, set, req.token, session, refs)
	if revoked != nil {
		req.token = &Token{err: revoked.refusal()}
	}
	return refs, err
}

// release decides about one key and opens it. r.Err holds what the store said.
func (c *Custodian) release(ctx context.Context, set *controlSet, who Caller, req RetrieveRequest, contentCategory CategoryName, k *SealedKey, r *RetrieveResult) {
	unknown := errors.Is(r.Err, ErrNotFound)
	if r.Err == nil && len(req.ContentID) > 0 && string(k.Key.ContentID) != string(req.ContentID) {
		unknown = true // of this content item, there is no such key
	}
	if unknown {
		r.decision, r.Err = c.decideUnknown(who, contentCategory)
		if errors.Is(r.Err, ErrKeyNotFound) {
			c.incidents.Add(1)
			c.log.Error("a granted caller asks for a KID that is not stored; is the store whole?", "kid", r.KID, "caller", who.ID)
		}
		return
	}
	if _, ok := set.categories[k.Key.Category]; r.Err == nil && !ok {
		r.Err = corrupt("content key "+r.KID.String(), fmt.Errorf("its category %q is not recorded", k.Key.Category))
	}
	if r.Err != nil {
		c.decideUnread(who, r)
		return
	}
	r.decision = c.decideRelease(who, resourceOf(set, &k.Key), req)
	if !r.decision.Allow {
		r.Err = fmt.Errorf("content key %s: %w", r.KID, r.decision.Err)
		return
	}
	watch := stopwatchOf(ctx)
	watch.end(stageDecide)
	r.Key, r.Grace, r.kept, r.Err = c.openHot(ctx, set, *k)
	watch.end(stageShare)
	if r.Err == nil {
		r.Info = k.Key
		r.Sealed, r.Err = sealTo(req.recipient, who, req.RequestID, &r.Info, r.Key)
		watch.end(stageSeal)
	}
}

// decideUnread is the decision about a key whose record could not be read.
// That a device is out of order every provider may hear. But of a damaged
// record nothing can be believed, its category neither: only who may have
// everything hears of it.
func (c *Custodian) decideUnread(who Caller, r *RetrieveResult) {
	c.log.Error("the record of a content key cannot be read", "kid", r.KID, "err", r.Err)
	r.decision = c.decide(who, ActionRelease, Resource{})
	if !r.decision.Allow {
		r.Err = fmt.Errorf("content key %s: %w", r.KID, r.decision.Err)
	} else if !r.decision.KnowIt && errors.Is(r.Err, ErrRecordCorrupt) {
		r.decision.Allow, r.Err = false, fmt.Errorf("content key %s: %w", r.KID, ErrDenied)
	}
}

// unread writes down, for each key of a call, that nothing could be read to
// decide about it, and returns what the caller hears: why, if it may have keys
// at all.
func (c *Custodian) unread(ctx context.Context, who Caller, req RetrieveRequest, why error) error {
	d := c.decide(who, ActionRelease, Resource{})
	if !d.Allow {
		why = fmt.Errorf("retrieve %d keys: %w", len(req.KIDs), d.Err)
	}
	entries := make([]audit.Entry, len(req.KIDs))
	for i, kid := range req.KIDs {
		entries[i] = c.entry(c.set.Load(), who, d, ActionRelease, req.RequestID, ref{contentID: req.ContentID, kid: kid}, why)
	}
	if _, err := c.record(ctx, entries...); err != nil {
		return err
	}
	return why
}

// decideUnknown is the decision about a key that does not exist: who may not
// know that hears what it would hear of a key that it is not granted.
func (c *Custodian) decideUnknown(who Caller, contentCategory CategoryName) (Decision, error) {
	d := c.decide(who, ActionRelease, Resource{})
	know := d.KnowIt
	if contentCategory != "" {
		know = know || c.decide(who, ActionRelease, Resource{Category: contentCategory}).Allow
	}
	if d.Allow && know {
		return d, ErrKeyNotFound
	}
	if errors.Is(d.Err, ErrCallerFrozen) { // as of a key that exists
		return d, d.Err
	}
	d.Allow = false
	return d, ErrDenied
}

// resourceOf is what the policy is told of a content key.
func resourceOf(set *controlSet, k *ContentKey) Resource {
	r := Resource{Category: k.Category, Mode: set.categories[k.Category].Mode, IsKey: true, Key: k, State: StateActive}
	r.Overdue = r.Mode == CategoryRekeyRequired && set.overdue(k)
	state, superseded := set.superseded(k)
	if x, ok := set.exceptions[k.KID]; ok {
		r.State, r.Decided = x.State, x.Decided
	} else if superseded && state == StateSuspended { // withdrawn, whatever was decided before
		r.State = state
	} else if exposed, serve := set.compromised(k); exposed {
		r.State, r.Decided = StateCompromised, serve
	} else if superseded {
		r.State = state
	}
	return r
}

// tagSize is that of AES-256-GCM as it is used here, 128 bits.
const tagSize = 16

// graceDetail marks an audit entry of what was done on grace.
func graceDetail(left time.Duration) string {
	if left == 0 {
		return ""
	}
	return fmt.Sprintf("kms grace: %d s left", GraceSeconds(left))
}

// GraceSeconds is what is left of a grace in whole seconds, rounded up: it is
// never zero where there is grace.
func GraceSeconds(left time.Duration) int64 { return int64((left + time.Second - 1) / time.Second) }

// openCEK opens one CEK into the arena: one operation of the token. grace is
// what is left where the KMS is away and the KEK serves on; else zero.
func (c *Custodian) openCEK(ctx context.Context, set *controlSet, k SealedKey) (cek secret.Secret, grace time.Duration, err error) {
	if err := k.checkSize(); err != nil {
		return secret.Secret{}, 0, err
	}
	slot, err := c.slot(k)
	if err != nil {
		return secret.Secret{}, 0, err
	}
	n, watch := 0, stopwatchOf(ctx)
	watch.end(stageShare)
	grace, err = c.keys.withKEK(ctx, set, k.Key.KEK, func(kek Key) error {
		watch.end(stageKEK)
		defer watch.end(stageToken)
		var err error
		n, err = kek.Open(ctx, k.IV, associatedData(set.head.StoreID, k.Body), k.Sealed, slot)
		return err
	})
	watch.end(stageKEK) // where it did not come
	if err == nil && n != CEKSize {
		err = corrupt("sealed key", fmt.Errorf("%d bytes, not %d", n, CEKSize))
	}
	if err != nil {
		c.arena.Put(slot)
		if errors.Is(err, ErrAuth) {
			err = corrupt("sealed key", err)
		}
		return secret.Secret{}, 0, fmt.Errorf("content key %s: kek %s: %w", k.Key.KID, k.Key.KEK, deadline(ctx, err))
	}
	return secret.New(c.arena, slot, CEKSize), grace, nil
}

// checkSize says that what is sealed cannot be a CEK, or nil.
func (k SealedKey) checkSize() error {
	if len(k.Sealed) != CEKSize+tagSize {
		return corrupt("content key "+k.Key.KID.String(), fmt.Errorf("sealed in %d bytes, not %d", len(k.Sealed), CEKSize+tagSize))
	}
	return nil
}

// slot is room in the arena for a CEK.
func (c *Custodian) slot(k SealedKey) ([]byte, error) {
	slot, err := c.arena.Get()
	if err != nil {
		return nil, fmt.Errorf("content key %s: %w: %w", k.Key.KID, err, ErrRate)
	}
	return slot, nil
}

// deadline names an error that came because ctx ended.
func deadline(ctx context.Context, err error) error {
	if err != nil && ctx.Err() != nil && !errors.Is(err, ErrRecordCorrupt) {
		return fmt.Errorf("%w: %w", err, ErrDeadline)
	}
	return err
}
