package custodian

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"github.com/keycustody/custodian/internal/admission"
	"github.com/keycustody/custodian/internal/audit"
	"github.com/keycustody/custodian/internal/sealing"
	"github.com/keycustody/custodian/internal/secret"
)

// Limits of the GCM invocations of one KEK (SP 800-38D, section 8.3: 2^32
// with random 96-bit IVs) and the block in which they are reserved.
const (
	reserveBlock = 1 << 16
	softLimit    = 1 << 31
	hardLimit    = 1 << 32
)

// MEKPeriod is the originator-usage period of a MEK; MEKWarning how long
// before its end status begins to warn.
const (
	MEKPeriod  = 365 * 24 * time.Hour
	MEKWarning = 90 * 24 * time.Hour
)

// DefaultReissueWindow is how long a packager may have the same key again.
const DefaultReissueWindow = 72 * time.Hour

// Config is what a Custodian stands on. It owns none of it: whoever opened a
// part closes it, after Close.
type Config struct {
	Store     Store
	HSM       HSM
	Providers []Provider
	Audit     *audit.Log
	// Logged is what the audit log showed when it was opened.
	Logged Logged
	Policy *Policy
	Now    func() time.Time
	Log    *slog.Logger

	// AuditName begins the origin of the audit log's checkpoints, before its ID;
	// "custodian" where empty. It never changes.
	AuditName string
	// LabelPrefix of our objects in the token: PREFIX-v1, PREFIX-audit-v1.
	LabelPrefix string
	// DefaultProviders wrap the KEKs of a category that names none, and the
	// helper keys.
	DefaultProviders []string
	// KEKLifetime is how long a loaded KEK serves without asking the KMS
	// again. Zero: 15 minutes.
	KEKLifetime time.Duration
	// KMS says how providers are called, and what is served while they are
	// away.
	KMS KMSLimits
	// Outages know of providers that are away, also from before this Open. nil:
	// ones of its own, which tell OnIncident.
	Outages    *Outages
	OnIncident func(Incident)
	// ReleaseDeadline is how long a caller of Retrieve is kept waiting at most.
	// Where there are more calls than can be answered in that time, some are
	// refused at once. Zero: 250 ms.
	ReleaseDeadline time.Duration
	// HotTitles says in which categories an opened CEK is kept in clear, and for
	// how long, 60 s at most. Empty: in none.
	HotTitles map[CategoryName]time.Duration
	// MaxReleases is how many CEKs may be in clear at once. Zero: 8192.
	MaxReleases int
	// Anchors are held against the audit log at the start. Nil: there are none.
	Anchors Anchors
	// ConfirmTime accepts a clock that is far beyond the highest time seen.
	ConfirmTime bool
	// ConfigDigest names the configuration in the audit log.
	ConfigDigest [32]byte
	// Restored marks the first start after a restore: the store is expected
	// to be behind the audit log, and every category gets a new KEK version.
	Restored bool
	// RestoreOrder is what the officers have decided about the restore.
	RestoreOrder *RestoreOrder
	// RotationRate is how many content keys a second rotations move at most.
	// Zero: as many as the token can.
	RotationRate int
	// Events is the standing approval for what events do by themselves.
	Events EventLimits
	// Warnings are sentences for the status about parts that the domain does not
	// know; nil: there are none.
	Warnings func() []string
	// GCMLimits replaces the limits of invocations, for tests. Zero: the
	// constants above.
	GCMLimits GCMLimits
}

// GCMLimits are the limits of one KEK's GCM invocations.
type GCMLimits struct{ Block, Soft, Hard uint64 }

// A Custodian is the domain at work. It is safe for concurrent use.
type Custodian struct {
	store   Store
	hsm     HSM
	audit   *audit.Log
	index   *audit.Index
	keys    *keyring
	rewraps *rewrapping
	gate    *admission.Gate // before Retrieve
	late    *lateLog
	arena   *secret.Arena
	hot     *hotTitles
	log     *slog.Logger
	prefix  string
	limits  GCMLimits
	// limiter bounds the records that rotations move; nil: it does not.
	limiter   *rate.Limiter
	rotations *rotations
	events    EventLimits
	foreign   func() []string // warnings of others
	warned    map[string]bool // MEKAlerts that were told, by ID; WarnMEK owns it

	clock          func() time.Time
	defaultWraps   []string
	anchors        Anchors
	started        time.Time
	unknownObjects []TokenObject

	policy atomic.Pointer[Policy]
	set    atomic.Pointer[controlSet]
	// clockFault is why the clock is not believed; nil: it is.
	clockFault atomic.Pointer[error]
	lastLook   atomic.Int64  // Unix nanoseconds, when the clock was believed last; 0: never since the start
	incidents  atomic.Uint64 // KEY_NOT_FOUND answers to callers who may know

	auditName   string                    // of the audit log; "": the default
	checkLogged func(signed []byte) error // a checkpoint of the audit log
	prunedNoted atomic.Uint64             // pruned entries that the audit log has been told of

	// controlMu serialises changes of the control set and guards unsettled.
	controlMu sync.Mutex
	unsettled *unsettled

	uses     *tokenUses // of licence tokens
	ledger   *ledger    // of budgets
	attempts attempts

	joined    atomic.Pointer[joinedPolicy] // what policyOf found last
	finishing sync.Mutex                   // held while executed ceremonies are finished: nothing is ordered twice
	// workLists are what ceremonies have left to do of content, by their IDs.
	// finishing guards it.
	workLists map[string][]contentItem

	// budgetMu guards the map below.
	budgetMu sync.Mutex
	budgets  map[CategoryName]*budget
}

// Open verifies store, token and audit log against each other and begins
// service. It changes nothing but to write its start to the audit log.
//
// Errors: ErrUninitialised; ErrHSMUnavailable and ErrKMSUnavailable (try
// again); ErrRecordMAC, ErrControlDigest, ErrStoreRollback, ErrLogRollback,
// ErrAnchorAhead, ErrAnchorFork, ErrWrongMEK (never served; see docs/OPERATIONS.md).
func Open(ctx context.Context, cfg Config) (*Custodian, error) {
	c, err := newCustodian(ctx, cfg)
	if err != nil {
		return nil, err
	}
	if err := c.open(ctx, cfg); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

func newCustodian(ctx context.Context, cfg Config) (*Custodian, error) {
	if cfg.MaxReleases == 0 {
		cfg.MaxReleases = 8192
	}
	if cfg.ReleaseDeadline == 0 {
		cfg.ReleaseDeadline = 250 * time.Millisecond
	}
	if cfg.KEKLifetime == 0 {
		cfg.KEKLifetime = 15 * time.Minute
	}
	if cfg.GCMLimits == (GCMLimits{}) {
		cfg.GCMLimits = GCMLimits{reserveBlock, softLimit, hardLimit}
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Outages == nil {
		cfg.Outages = NewOutages(cfg.Now, cfg.Log, cfg.OnIncident, nil)
	}
	// A slot holds a CEK and its tag: modules want room for both.
	arena, err := secret.NewArena(2*CEKSize, cfg.MaxReleases)
	if err != nil {
		return nil, err
	}
	keys, err := newKeyring(ctx, cfg.HSM, cfg.Providers, cfg.KEKLifetime, cfg.KMS, cfg.Outages)
	if err != nil {
		return nil, errors.Join(err, arena.Close())
	}
	hot, err := newHotTitles(cfg.HotTitles, keys.clock)
	if err != nil {
		keys.close()
		return nil, errors.Join(err, arena.Close())
	}
	c := &Custodian{store: cfg.Store, hsm: cfg.HSM, audit: cfg.Audit, index: audit.NewIndex(cfg.Audit), arena: arena, log: cfg.Log, prefix: cfg.LabelPrefix, auditName: cfg.AuditName,
		limits: cfg.GCMLimits, clock: cfg.Now, defaultWraps: cfg.DefaultProviders, anchors: cfg.Anchors, keys: keys, rewraps: newRewrapping(keys.limits), budgets: map[CategoryName]*budget{}, workLists: map[string][]contentItem{}, rotations: newRotations(), events: cfg.Events, foreign: cfg.Warnings,
		hot: hot, gate: admission.New(cfg.ReleaseDeadline, time.Now) /* the clock of contexts */, late: newLateLog()}
	if cfg.RotationRate > 0 {
		c.limiter = rate.NewLimiter(rate.Limit(cfg.RotationRate), moveBatch)
	}
	c.attempts.open = map[uint64]bool{}
	c.policy.Store(cfg.Policy)
	c.warned = maps.Clone(cfg.Logged.warned)
	if c.warned == nil {
		c.warned = map[string]bool{}
	}
	c.started = cfg.Now()
	c.uses = newTokenUses(cfg.Logged.tokens, c.now())
	c.ledger = newLedger(cfg.Policy, cfg.Logged.spending, c.now())
	return c, nil
}

// Close releases the loaded keys and wipes what is left in clear.
func (c *Custodian) Close() error {
	c.keys.close()
	return errors.Join(c.index.Close(), c.hot.close(), c.arena.Close())
}

// Arena is where the Secrets of results lie.
func (c *Custodian) Arena() *secret.Arena { return c.arena }

// MayLoad says no to a policy that SetPolicy would refuse, as SetPolicy does.
func (c *Custodian) MayLoad(ctx context.Context, p *Policy) error { return c.refusePolicy(ctx, p) }

// SetPolicy replaces the policy. The digest of what was loaded goes to the
// audit log first. Where there are officers, their bundle stays in force, and
// another policy is ErrQuorum.
func (c *Custodian) SetPolicy(ctx context.Context, p *Policy) error {
	d := p.Digest()
	if err := c.refusePolicy(ctx, p); err != nil {
		return err
	}
	e := audit.Entry{Action: "policy.load", Outcome: audit.Allowed, ControlRevision: c.set.Load().head.Revision, Detail: "policy " + hex.EncodeToString(d[:])}
	begun, err := c.begin(ctx, e)
	if err != nil {
		return err
	}
	was := c.policy.Swap(p)
	if _, err := c.record(ctx, begun.end(e)); err != nil {
		c.policy.Store(was) // what is not written down is not in force
		return err
	}
	return nil
}

// now is the injected clock, in UTC.
func (c *Custodian) now() time.Time { return c.clock().UTC() }

// A ref says what an event was about, for the audit log.
type ref struct {
	category  CategoryName
	contentID ContentID
	key       *ContentKey
	kid       KID
}

// entry makes the audit entry of one decision, which was taken on set. The outcome follows from err:
// a refusal by authority, mode or state is a denial, anything else failed.
func (c *Custodian) entry(set *controlSet, who Caller, d Decision, a Action, requestID string, r ref, err error) audit.Entry {
	e := audit.Entry{Time: c.now(), Action: string(a), Caller: who.ID, Role: string(d.Role), RequestID: requestID,
		Category: string(r.category), ContentID: r.contentID, ControlRevision: set.head.Revision}
	if r.key != nil {
		e.Category, e.ContentID = string(r.key.Category), r.key.ContentID
		e.TrackType, e.Scheme = string(r.key.TrackType), string(r.key.Scheme)
		e.HasPeriod, e.Period, e.Generation = r.key.HasPeriod, r.key.Period, r.key.Generation
		e.KeyVersion = r.key.KEK.String()
		r.kid = r.key.KID
	}
	if !r.kid.IsZero() {
		e.KID = r.kid[:]
	}
	return judged(e, d, err)
}

// byState are refusals by authority, mode or state that can also come after the
// decision, from what was read since.
var byState = []error{ErrDenied, ErrKeyState, ErrKeyCompromised, ErrCategoryFrozen, ErrKeyDestroyed}

// judged adds the outcome that follows from a decision and from err. What is
// malformed and was found so only after the decision needs no Refuse.
func judged(e audit.Entry, d Decision, err error) audit.Entry {
	if invalid, ok := errors.AsType[*InvalidError](err); ok {
		invalid.judged = true
	}
	switch {
	case err == nil:
		e.Outcome = audit.Allowed
	case !d.Allow || slices.ContainsFunc(byState, func(refused error) bool { return errors.Is(err, refused) }):
		e.Outcome, e.Reason = audit.Denied, string(ReasonOf(err))
	default:
		e.Outcome, e.Reason = audit.Failed, string(ReasonOf(err))
	}
	return e
}

// record is the one place that writes to the audit log. What it refuses to
// write did not happen: the caller hands nothing over. A call whose time is up
// is written down all the same.
func (c *Custodian) record(ctx context.Context, entries ...audit.Entry) ([]audit.Receipt, error) {
	for i := range entries {
		if entries[i].Time.IsZero() {
			entries[i].Time = c.now()
		}
	}
	if ctx.Err() != nil {
		late, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		ctx = late
	}
	receipts, err := c.audit.Append(ctx, entries)
	if err != nil {
		if ctx.Err() != nil {
			return nil, fmt.Errorf("audit: %w: %w", err, ErrDeadline)
		}
		if errors.Is(err, ErrHSMUnavailable) { // no checkpoint without the token: the log itself is well
			return nil, fmt.Errorf("audit: %w", err)
		}
		return nil, fmt.Errorf("audit: %w: %w", err, ErrAuditBlocked)
	}
	c.attempts.note(entries, receipts)
	return receipts, nil
}

// decide asks the policy, and the clock for what changes state.
func (c *Custodian) decide(who Caller, a Action, r Resource) Decision {
	return c.decideLeaving(who, a, r, terms{})
}

// terms are what a decision about keys stands on beside caller, action and
// resource.
type terms struct {
	recipient sealing.PublicKey // that they would leave sealed to; the zero key: in clear
	permitted bool              // a ceremony permits it
}

// decideLeaving is decide for keys that would move on these terms.
func (c *Custodian) decideLeaving(who Caller, a Action, r Resource, t terms) Decision {
	set := c.set.Load()
	return c.policyOf(set).Decide(Request{Caller: who, Action: a, Resource: r, Recipient: t.recipient, Permitted: t.permitted, Now: c.now()}.under(set))
}

// under adds what the control set says beside the resource.
func (r Request) under(set *controlSet) Request {
	r.Officers, r.Sealed = set.authority != nil, set.sealed()
	_, r.Frozen = set.frozenCallers[r.Caller.ID]
	return r
}

// believesClock says whether anything may be issued or changed at this time.
func (c *Custodian) believesClock() error {
	if f := c.clockFault.Load(); f != nil {
		return *f
	}
	return nil
}
