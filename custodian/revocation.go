package custodian

import (
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/keycustody/custodian/internal/audit"
)

// What is revoked is a control record each.
const (
	ControlRevocation ControlKind = 12

	formRevocation = 14
)

const (
	// MaxRevokedSessions are revoked at once. Beyond it, the issuer of their
	// tokens is what to revoke.
	MaxRevokedSessions = 10_000
	// MaxRevocation is how long a session may be revoked for.
	MaxRevocation = 366 * 24 * time.Hour
	// maxIssuerSize in bytes.
	maxIssuerSize = 256
	// sweepRevocations are taken out by one change of the control set.
	sweepRevocations = 500
)

// A RevokeRequest revokes a viewer's session, or everything that an issuer of
// licence tokens has signed and will sign: one of the two.
type RevokeRequest struct {
	RequestID string
	SessionID string
	Issuer    string
	// Until is when the revocation of a session ends. Zero: when the last licence
	// token is over that can have been signed for it by now. That of an issuer
	// has no end.
	Until time.Time
	Cause string
}

// A Revocation is a session or an issuer of licence tokens for which nothing is
// released. A session is personal data: of it there is only its keyed hash, as
// the audit log has it.
type Revocation struct {
	Session  audit.Ref // zero: it is about Issuer
	Issuer   string
	Until    time.Time // zero: until it is lifted, or the issuer is not configured any more
	Cause    string
	By       string // who revoked it
	Time     time.Time
	Revision uint64
}

// Name is what a revocation is lifted by.
func (r Revocation) Name() string {
	if r.Issuer != "" {
		return "issuer/" + r.Issuer
	}
	return fmt.Sprintf("%s/%d/%s", refSession, r.Session.KeyVersion, hex.EncodeToString(r.Session.MAC[:]))
}

// over says whether it has ended by itself.
func (r Revocation) over(now time.Time) bool { return !r.Until.IsZero() && !now.Before(r.Until) }

// Check says what is wrong with the request, or nil.
func (r RevokeRequest) Check() error {
	if err := checkText(r.RequestID, MaxRequestIDSize); err != nil {
		return invalid("request_id", err)
	}
	if (r.SessionID == "") == (r.Issuer == "") {
		return invalid("session_id", errors.New("name a session or an issuer, and not both"))
	}
	if err := checkViewer("session_id", r.SessionID); err != nil {
		return err
	}
	if err := checkText(r.Issuer, maxIssuerSize); err != nil {
		return invalid("issuer", err)
	}
	if r.Issuer != "" && !r.Until.IsZero() {
		return invalid("until_time", errors.New("an issuer is revoked until that is lifted"))
	}
	if err := printable(r.Cause, MaxCauseSize); err != nil {
		return invalid("cause", err)
	}
	return nil
}

// revoked is the part of a control set about sessions and issuers.
type revoked struct {
	sessions map[audit.Ref]*Revocation
	issuers  map[string]*Revocation
	// versions of the pseudonym key that the sessions' hashes are under, and how
	// many are under each.
	versions map[uint32]int
}

func newRevoked() revoked {
	return revoked{map[audit.Ref]*Revocation{}, map[string]*Revocation{}, map[uint32]int{}}
}

func (s *revoked) clone() revoked {
	return revoked{maps.Clone(s.sessions), maps.Clone(s.issuers), maps.Clone(s.versions)}
}

func (s *revoked) decodeRevocation(body []byte) (want string, err error) {
	r, err := decodeRevocation(body)
	if err != nil {
		return "", err
	}
	s.drop(r.Name())
	if r.Issuer != "" {
		s.issuers[r.Issuer] = &r
	} else {
		s.sessions[r.Session] = &r
		s.versions[r.Session.KeyVersion]++
	}
	return r.Name(), nil
}

// drop takes a revocation out.
func (s *revoked) drop(name string) {
	r := s.named(name)
	switch {
	case r == nil:
	case r.Issuer != "":
		delete(s.issuers, r.Issuer)
	default:
		delete(s.sessions, r.Session)
		if s.versions[r.Session.KeyVersion]--; s.versions[r.Session.KeyVersion] == 0 {
			delete(s.versions, r.Session.KeyVersion)
		}
	}
}

// named is the revocation with that name, or nil.
func (s *revoked) named(name string) *Revocation {
	if issuer, ok := strings.CutPrefix(name, "issuer/"); ok {
		return s.issuers[issuer]
	}
	kind, rest, _ := strings.Cut(name, "/")
	version, mac, _ := strings.Cut(rest, "/")
	n, err1 := strconv.ParseUint(version, 10, 32)
	raw, err2 := hex.DecodeString(mac)
	if err1 != nil || err2 != nil || len(raw) != 16 {
		return nil
	}
	return s.sessions[audit.Ref{Kind: kind, KeyVersion: uint32(n), MAC: [16]byte(raw)}]
}

func revocationRecord(r Revocation) ControlRecord {
	return ControlRecord{Kind: ControlRevocation, Name: r.Name(), Body: encodeRevocation(r)}
}

func encodeRevocation(r Revocation) []byte {
	e := newEncoder(formRevocation, 128+len(r.Cause))
	e.str(r.Session.Kind)
	e.uint(uint64(r.Session.KeyVersion))
	e.raw(r.Session.MAC[:])
	e.str(r.Issuer)
	e.time(r.Until)
	e.str(r.Cause)
	e.str(r.By)
	e.time(r.Time)
	e.uint(r.Revision)
	return e.b
}

func decodeRevocation(b []byte) (Revocation, error) {
	d := newDecoder(formRevocation, b)
	r := Revocation{Session: audit.Ref{Kind: d.str(), KeyVersion: d.uint32(), MAC: d.array16()}, Issuer: d.str(), Until: d.time(), Cause: d.str(), By: d.str(), Time: d.time(), Revision: d.uint()}
	return r, d.done("revocation record")
}

// Revoke refuses everything to a session, or to the licence tokens of an issuer,
// from the next call on. One that is revoked already stays so for the longer of
// the two times.
func (c *Custodian) Revoke(ctx context.Context, who Caller, req RevokeRequest) (Revocation, error) {
	return c.revoke(ctx, who, c.decide(who, ActionRevoke, Resource{}), req)
}

// revoke is Revoke by a decision that was taken, as that about an event.
func (c *Custodian) revoke(ctx context.Context, who Caller, d Decision, req RevokeRequest) (Revocation, error) {
	if err := req.Check(); err != nil {
		return Revocation{}, err
	}
	set := c.set.Load()
	e := c.entry(set, who, d, ActionRevoke, req.RequestID, ref{}, nil)
	e.Detail = req.Cause
	r := Revocation{Issuer: req.Issuer, Until: req.Until, Cause: req.Cause, By: who.ID, Time: c.now()}
	err := d.Err
	if d.Allow {
		err = c.completeRevocation(ctx, set, req, &r)
	}
	var begun *attempt
	if err == nil {
		if e.Detail = r.logged(req.Cause); r.Issuer == "" {
			e.Refs = []audit.Ref{r.Session}
		}
		// As a freeze, it is not held up by a log that cannot be written.
		begun, _ = c.begin(ctx, e)
		err = c.putRevocation(ctx, &r, begun.end(e))
	}
	if err != nil {
		err = deadline(ctx, fmt.Errorf("revoke: %w", err))
		failed := c.entry(c.set.Load(), who, d, ActionRevoke, req.RequestID, ref{}, err)
		if _, aerr := c.record(ctx, c.fail(begun, failed)); aerr != nil {
			return Revocation{}, errors.Join(aerr, err)
		}
		return Revocation{}, err
	}
	c.log.Warn("revoked", "name", r.Name(), "until", r.Until, "by", who.ID)
	return r, nil
}

// completeRevocation fills in what the request leaves to the daemon.
func (c *Custodian) completeRevocation(ctx context.Context, set *controlSet, req RevokeRequest, r *Revocation) error {
	tokens := c.policyOf(set).tokenRules()
	if req.Issuer != "" {
		if tokens.issuer(req.Issuer) == nil {
			return invalid("issuer", fmt.Errorf("%.80q is not among tokens.issuers", req.Issuer))
		}
		return nil
	}
	switch {
	case r.Until.IsZero() && tokens != nil:
		r.Until = r.Time.Add(tokens.span())
	case r.Until.IsZero():
		r.Until = r.Time.Add(MaxTokenLifetime + 2*MaxTokenSkew)
	case !r.Until.After(r.Time) || r.Until.After(r.Time.Add(MaxRevocation)):
		return invalid("until_time", fmt.Errorf("%s: must lie ahead, %d days at most", r.Until.UTC().Format(time.RFC3339), MaxRevocation/(24*time.Hour)))
	}
	r.Until = r.Until.UTC()
	refs, err := c.viewerRefs(ctx, set, req.SessionID, "")
	if err == nil {
		r.Session = refs[0]
	}
	return err
}

// putRevocation makes the change. r becomes what is in force then.
func (c *Custodian) putRevocation(ctx context.Context, r *Revocation, e audit.Entry) error {
	return c.change(ctx, func(old *controlSet, now time.Time) (change, error) {
		ch := change{entry: e, restricts: true}
		for _, over := range old.overRevocations(now, nil) {
			if over.Name() != r.Name() {
				ch.remove = append(ch.remove, controlKey{ControlRevocation, over.Name()})
			}
		}
		r.Revision = 1
		if before := old.named(r.Name()); before != nil {
			r.Revision = before.Revision + 1
			if before.Until.After(r.Until) {
				r.Until = before.Until
			}
		} else if r.Issuer == "" && len(old.sessions)-len(ch.remove) >= MaxRevokedSessions {
			return change{}, fmt.Errorf("%d sessions are revoked, and no more can be; revoke the issuer of their tokens instead: %w", len(old.sessions), ErrRate)
		}
		ch.put, ch.entry.Detail = []ControlRecord{revocationRecord(*r)}, r.logged(r.Cause)
		return ch, nil
	})
}

// overRevocations are those that have ended, as many as one change takes out:
// those whose time is up, and those of issuers that tokens does not have; nil
// leaves issuers out.
func (s *controlSet) overRevocations(now time.Time, tokens *Tokens) []*Revocation {
	var over []*Revocation
	for _, r := range s.sessions {
		if r.over(now) && len(over) < sweepRevocations {
			over = append(over, r)
		}
	}
	for _, r := range s.issuers {
		if tokens != nil && tokens.issuer(r.Issuer) == nil {
			over = append(over, r)
		}
	}
	return over
}

// sweepRevocations takes out what has ended.
func (c *Custodian) sweepRevocations(ctx context.Context) error {
	tokens := c.policyOf(c.set.Load()).tokenRules()
	if tokens == nil {
		tokens = &Tokens{}
	}
	if len(c.set.Load().overRevocations(c.now(), tokens)) == 0 || c.believesClock() != nil {
		return nil
	}
	return c.change(ctx, func(old *controlSet, now time.Time) (change, error) {
		over := old.overRevocations(now, tokens)
		if len(over) == 0 {
			return change{}, errNoChange
		}
		ch := change{entry: audit.Entry{Action: "revocation.end", Detail: fmt.Sprintf("%d revocations are over", len(over))}}
		for _, r := range over {
			ch.remove = append(ch.remove, controlKey{ControlRevocation, r.Name()})
		}
		return ch, nil
	})
}

// A LiftRequest names a revocation, or the session that it is of.
type LiftRequest struct {
	RequestID string
	Name      string
	SessionID string
	Cause     string
}

// Check says what is wrong with the request, or nil.
func (r LiftRequest) Check() error {
	if err := checkText(r.RequestID, MaxRequestIDSize); err != nil {
		return invalid("request_id", err)
	}
	if (r.SessionID == "") == (r.Name == "") {
		return invalid("name", errors.New("name a revocation or a session, and not both"))
	}
	if err := checkText(r.Name, maxIssuerSize+64); err != nil {
		return invalid("name", err)
	}
	if err := checkViewer("session_id", r.SessionID); err != nil {
		return err
	}
	if err := printable(r.Cause, MaxCauseSize); err != nil {
		return invalid("cause", err)
	}
	return nil
}

// LiftRevocation ends a revocation before its time.
func (c *Custodian) LiftRevocation(ctx context.Context, who Caller, req LiftRequest) error {
	if err := req.Check(); err != nil {
		return err
	}
	d := c.decide(who, ActionLiftRevocation, Resource{})
	e := c.entry(c.set.Load(), who, d, ActionLiftRevocation, req.RequestID, ref{}, nil)
	e.Detail = req.Cause
	err := d.Err
	var begun *attempt
	if d.Allow {
		begun, err = c.lift(ctx, req, &e)
	}
	if err != nil {
		err = deadline(ctx, fmt.Errorf("lift a revocation: %w", err))
		failed := c.entry(c.set.Load(), who, d, ActionLiftRevocation, req.RequestID, ref{}, err)
		if _, aerr := c.record(ctx, c.fail(begun, failed)); aerr != nil {
			return errors.Join(aerr, err)
		}
	}
	return err
}

func (c *Custodian) lift(ctx context.Context, req LiftRequest, e *audit.Entry) (*attempt, error) {
	if err := c.lookAtClock(); err != nil {
		return nil, err
	}
	set := c.set.Load()
	found := set.named(req.Name)
	if req.SessionID != "" {
		refs, err := c.sessionRefs(ctx, set, req.SessionID, nil)
		if err != nil {
			return nil, err
		}
		for _, r := range refs {
			found = cmp.Or(found, set.sessions[r])
		}
	}
	if found == nil {
		return nil, invalid("name", errors.New("it is not revoked"))
	}
	if found.Issuer != "" {
		e.Detail = found.logged(req.Cause)
	} else {
		e.Refs = []audit.Ref{found.Session}
	}
	begun, err := c.begin(ctx, *e)
	if err != nil {
		return nil, err
	}
	return begun, c.change(ctx, func(old *controlSet, _ time.Time) (change, error) {
		if old.named(found.Name()) == nil {
			return change{}, invalid("name", errors.New("it is not revoked any more"))
		}
		return change{remove: []controlKey{{ControlRevocation, found.Name()}}, entry: begun.end(*e)}, nil
	})
}

// Revocations lists what is revoked, issuers first, then what ends first.
func (c *Custodian) Revocations(ctx context.Context, who Caller) ([]Revocation, error) {
	if d := c.decide(who, ActionReadRevocations, Resource{}); !d.Allow {
		return nil, c.refuse(ctx, who, d, ActionReadRevocations, ref{})
	}
	set, now := c.set.Load(), c.now()
	var out []Revocation
	for _, r := range set.issuers {
		out = append(out, *r)
	}
	for _, r := range set.sessions {
		if !r.over(now) {
			out = append(out, *r)
		}
	}
	slices.SortFunc(out, func(a, b Revocation) int { return cmp.Or(a.Until.Compare(b.Until), cmp.Compare(a.Name(), b.Name())) })
	return out, nil
}

// sessionRefs are the hashes of a session under the versions of the key that
// revoked sessions are hashed with. known are references that were made already.
func (c *Custodian) sessionRefs(ctx context.Context, set *controlSet, session string, known []audit.Ref) ([]audit.Ref, error) {
	var refs []audit.Ref
	for version := range set.versions {
		i := slices.IndexFunc(known, func(r audit.Ref) bool { return r.Kind == refSession && r.KeyVersion == version })
		if i >= 0 {
			refs = append(refs, known[i])
			continue
		}
		r, err := c.reference(ctx, set, version, refSession, session)
		if err != nil {
			return nil, err
		}
		refs = append(refs, r)
	}
	return refs, nil
}

// revocationOf says why nothing is released for a token and a session; nil
// where neither is revoked. refs are references of the viewer that were made.
func (c *Custodian) revocationOf(ctx context.Context, set *controlSet, t *Token, session string, refs []audit.Ref) (*Revocation, error) {
	if t != nil && t.err == nil {
		if r := set.issuers[t.issuer.Issuer]; r != nil {
			return r, nil
		}
	}
	if session == "" || len(set.sessions) == 0 {
		return nil, nil
	}
	all, err := c.sessionRefs(ctx, set, session, refs)
	if err != nil {
		return nil, err
	}
	for _, ref := range all {
		if r := set.sessions[ref]; r != nil && !r.over(c.now()) {
			return r, nil
		}
	}
	return nil, nil
}

// refusal is what a call for a revoked session or by a token of a revoked issuer
// hears, where it may have keys at all.
func (r *Revocation) refusal() error {
	if r.Issuer != "" {
		return fmt.Errorf("licence token: its issuer is revoked: %w", ErrTokenRevoked)
	}
	return fmt.Errorf("the session is revoked: %w", ErrTokenRevoked)
}
