package custodian

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/keycustody/custodian/internal/audit"
)

// A FrozenCaller is a caller that is stopped: whatever its grants say, every
// call of it is refused with ErrCallerFrozen until the freeze is lifted. It is a
// control record, so a freeze cannot be lost with an older file.
type FrozenCaller struct {
	Identity string
	By       string // the officer who froze it, or the budget that it broke
	Cause    string
	Time     time.Time
	Revision uint64
}

const (
	// ControlFrozenCaller is a FrozenCaller. It is named by the hash of the
	// identity, which alone can be longer than a name may be.
	ControlFrozenCaller ControlKind = 11

	formFrozenCaller = 13
)

// What the audit log calls a freeze of a caller, and its end. The detail begins
// with the identity and a space: a restore reads it.
const (
	actionCallerFrozen = "caller.freeze"
	actionCallerLifted = "caller.lift"
)

func frozenCallerName(identity string) string {
	sum := sha256.Sum256([]byte(identity))
	return hex.EncodeToString(sum[:])
}

func frozenCallerRecord(f FrozenCaller) ControlRecord {
	return ControlRecord{Kind: ControlFrozenCaller, Name: frozenCallerName(f.Identity), Body: encodeFrozenCaller(f)}
}

func encodeFrozenCaller(f FrozenCaller) []byte {
	e := newEncoder(formFrozenCaller, 64+len(f.Identity)+len(f.By)+len(f.Cause))
	e.str(f.Identity)
	e.str(f.By)
	e.str(f.Cause)
	e.time(f.Time)
	e.uint(f.Revision)
	return e.b
}

func decodeFrozenCaller(b []byte) (FrozenCaller, error) {
	d := newDecoder(formFrozenCaller, b)
	f := FrozenCaller{Identity: d.str(), By: d.str(), Cause: d.str(), Time: d.time(), Revision: d.uint()}
	return f, d.done("frozen caller record")
}

// A FreezeCallerRequest stops a caller, or lets it call again.
type FreezeCallerRequest struct {
	RequestID string
	Identity  string // SPIFFE ID or DNS name
	Cause     string
}

// Check says what is wrong with the request, or nil.
func (r FreezeCallerRequest) Check() error {
	if err := checkText(r.RequestID, MaxRequestIDSize); err != nil {
		return invalid("request_id", err)
	}
	if err := checkCallerID(r.Identity); err != nil {
		return invalid("identity", err)
	}
	if err := printable(r.Cause, MaxCauseSize); err != nil {
		return invalid("cause", err)
	}
	return nil
}

// checkCallerID says what is wrong with an identity as text, or nil.
func checkCallerID(identity string) error {
	if err := printable(identity, MaxIdentitySize); err != nil {
		return err
	}
	if strings.ContainsAny(identity, " \n") {
		return errors.New("a SPIFFE ID or a DNS name has no spaces")
	}
	return nil
}

// MaxIdentitySize is that of a SPIFFE ID, in bytes.
const MaxIdentitySize = 2048

// FreezeCaller stops a caller at once: the break-glass for a stolen certificate,
// which any one officer of all categories may use. An identity that no grant
// names is refused, for it is a slip of the pen, and so is an officer's: the
// officers' own are changed by the quorum, so that none of them can silence the
// others.
func (c *Custodian) FreezeCaller(ctx context.Context, who Caller, req FreezeCallerRequest) (FrozenCaller, error) {
	return c.setCaller(ctx, who, req, actionCallerFrozen, func(e audit.Entry) (FrozenCaller, error) {
		switch roles := c.policyOf(c.set.Load()).rolesOf(req.Identity); {
		case len(roles) == 0:
			return FrozenCaller{}, invalid("identity", fmt.Errorf("no grant names %.200s: write it as the grants do", req.Identity))
		case slices.Contains(roles, RoleOfficer):
			return FrozenCaller{}, invalid("identity", fmt.Errorf("%.200s is an officer's, whom one officer alone cannot stop", req.Identity))
		}
		return c.freezeCaller(ctx, req.Identity, who.ID, req.Cause, e)
	})
}

// LiftCaller ends the freeze of a caller. Where there are officers, their
// quorum does.
func (c *Custodian) LiftCaller(ctx context.Context, who Caller, req FreezeCallerRequest) (FrozenCaller, error) {
	return c.setCaller(ctx, who, req, actionCallerLifted, func(e audit.Entry) (FrozenCaller, error) {
		var was FrozenCaller
		// Only a freeze does not wait for a clock that is believed.
		if err := c.lookAtClock(); err != nil {
			return was, err
		}
		err := c.change(ctx, func(old *controlSet, _ time.Time) (change, error) {
			if old.authority != nil {
				return change{}, refusePlan(ErrQuorum, "a freeze is lifted by a ceremony of kind %s, as the officers' quorum decides", KindUnfreeze)
			}
			var ok bool
			if was, ok = old.frozenCallers[req.Identity]; !ok {
				return change{}, invalid("identity", fmt.Errorf("%.200s is not frozen", req.Identity))
			}
			return change{remove: []controlKey{{ControlFrozenCaller, frozenCallerName(req.Identity)}}, entry: e}, nil
		})
		return was, err
	})
}

// setCaller does what an officer orders about a caller, and writes it down.
func (c *Custodian) setCaller(ctx context.Context, who Caller, req FreezeCallerRequest, action string, f func(audit.Entry) (FrozenCaller, error)) (FrozenCaller, error) {
	if err := req.Check(); err != nil {
		return FrozenCaller{}, err
	}
	d := c.decide(who, ActionFreezeCaller, Resource{})
	if d.Allow && !d.KnowIt {
		d.Allow, d.Err = false, ErrDenied // a caller's keys are of every category
	}
	e := c.entry(c.set.Load(), who, d, ActionFreezeCaller, req.RequestID, ref{}, nil)
	e.Action, e.Detail, e.Priority = action, req.Identity+" "+req.Cause, d.Allow
	var frozen FrozenCaller
	err := c.administer(ctx, d, e, d.Err, func(e audit.Entry) (err error) {
		frozen, err = f(e)
		return err
	})
	if err != nil {
		return FrozenCaller{}, err
	}
	c.log.Warn("caller set", "caller", req.Identity, "action", action, "by", who.ID)
	return frozen, nil
}

// freezeCaller is FreezeCaller for whoever has decided it: an officer, a
// ceremony, or a budget. A caller that is frozen stays as it was frozen first. It
// holds at once, also where the audit log cannot be written. e says who.
func (c *Custodian) freezeCaller(ctx context.Context, identity, by, cause string, e audit.Entry) (frozen FrozenCaller, err error) {
	e.Action, e.Detail, e.Priority = actionCallerFrozen, identity+" "+cause, true
	err = c.change(ctx, func(old *controlSet, now time.Time) (change, error) {
		var twice bool
		if frozen, twice = old.frozenCallers[identity]; twice {
			return change{}, errNoChange
		}
		frozen = FrozenCaller{Identity: identity, By: by, Cause: cause, Time: now, Revision: 1}
		return change{put: []ControlRecord{frozenCallerRecord(frozen)}, entry: e, restricts: true}, nil
	})
	return frozen, err
}

// FrozenCallers lists the callers that are frozen, by identity.
func (c *Custodian) FrozenCallers(ctx context.Context, who Caller) ([]FrozenCaller, error) {
	if d := c.decide(who, ActionReadStatus, Resource{}); !d.Allow {
		return nil, c.refuse(ctx, who, d, ActionReadStatus, ref{})
	}
	return c.set.Load().sortedFrozen(), nil
}

func (s *controlSet) sortedFrozen() []FrozenCaller {
	list := make([]FrozenCaller, 0, len(s.frozenCallers))
	for _, f := range s.frozenCallers {
		list = append(list, f)
	}
	slices.SortFunc(list, func(a, b FrozenCaller) int { return strings.Compare(a.Identity, b.Identity) })
	return list
}

// freezeCallersAgain freezes the callers that were frozen when the store was
// lost: an old backup must not lift a freeze.
func (c *Custodian) freezeCallersAgain(ctx context.Context, l Logged, backup uint64, rep *RestoreReport) error {
	frozen := map[string]string{}
	for _, ch := range l.Changes {
		identity, cause, ok := strings.Cut(ch.Detail, " ")
		if ch.Revision <= backup || !ok {
			continue
		}
		switch ch.Action {
		case actionCallerFrozen:
			frozen[identity] = cause
		case actionCallerLifted:
			delete(frozen, identity)
		}
	}
	for identity, cause := range frozen {
		if _, is := c.set.Load().frozenCallers[identity]; is {
			continue
		}
		if _, err := c.freezeCaller(ctx, identity, "restore", cause, audit.Entry{}); err != nil {
			return fmt.Errorf("caller %s: %w", identity, err)
		}
		rep.FrozenCallers = append(rep.FrozenCallers, identity)
	}
	slices.Sort(rep.FrozenCallers)
	return nil
}

// rolesOf are the roles that the grants give an identity.
func (p *Policy) rolesOf(identity string) (roles []Role) {
	if p == nil || p.authority == nil {
		return nil
	}
	for _, g := range p.authority.permits[identity] {
		roles = append(roles, g.grant.Role)
	}
	return roles
}
