package custodian

import (
	"fmt"
	"log/slog"
	"sync"
	"time"
)

const (
	// incidentAfter is how long a provider is away before an incident is
	// declared, incidentHold how long it must be back before it is closed.
	incidentAfter = 5 * time.Minute
	incidentHold  = time.Minute
)

// An IncidentKind is what an incident is about.
type IncidentKind string

// IncidentOutage: a provider has not answered for five minutes. IncidentLogin:
// it refuses our login. That is an outage too, but one that nobody but we can
// mend, so it is told at once and by itself.
const (
	IncidentOutage IncidentKind = "outage"
	IncidentLogin  IncidentKind = "login"
)

// What a caller did with its budgets: it is over the soft one, it is slowed down,
// or it has broken the hard one and is frozen. Each is told once, closed: people
// have to look, and nothing ends it by itself.
const (
	IncidentBudgetSoft   IncidentKind = "budget-soft"
	IncidentBudgetRate   IncidentKind = "budget-rate"
	IncidentCallerFrozen IncidentKind = "caller-frozen"
)

// An Incident is trouble that people are told of. Trouble with a provider is told
// twice: when it is declared, and with Closed set when it has been over for a
// minute.
type Incident struct {
	ID        string       `json:"id"`
	Kind      IncidentKind `json:"kind"`
	Provider  string       `json:"provider,omitempty"`
	Caller    string       `json:"caller,omitempty"` // in a provider's place, where it is about a budget
	Since     time.Time    `json:"since"`            // the first call that failed
	Declared  time.Time    `json:"declared"`
	Back      time.Time    `json:"back,omitzero"` // contact, or a good login
	Closed    time.Time    `json:"closed,omitzero"`
	LastError string       `json:"last_error"` // of a budget: what was broken
}

// Outages know which providers are away or refuse our login, and tell of
// incidents. They outlive a Custodian, so that an outage in which the daemon
// cannot start becomes an incident as any other.
type Outages struct {
	clock *steady
	log   *slog.Logger
	tell  func(Incident)

	// mu guards the fields below.
	mu    sync.Mutex
	of    map[string]*outage
	order []*outage
}

// NewOutages takes the incidents that an earlier run has declared and not
// closed. tell hears of every incident when it is declared and when it is
// closed; it must not wait for anybody. It may be nil, and so may log.
func NewOutages(now func() time.Time, log *slog.Logger, tell func(Incident), open []Incident) *Outages {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	o := &Outages{clock: newSteady(now), log: log, tell: tell, of: map[string]*outage{}}
	for _, i := range open {
		a := &o.provider(i.Provider).away
		if i.Kind == IncidentLogin {
			a = &o.provider(i.Provider).login
		}
		a.open = &i
	}
	return o
}

func (o *Outages) provider(name string) *outage {
	o.mu.Lock()
	defer o.mu.Unlock()
	p := o.of[name]
	if p == nil {
		p = &outage{away: alarm{kind: IncidentOutage, after: incidentAfter}, login: alarm{kind: IncidentLogin}}
		p.name = name
		o.of[name], o.order = p, append(o.order, p)
	}
	return p
}

// Tick declares and closes incidents. Call it about once a second; it waits for
// nothing.
func (o *Outages) Tick() {
	now := o.clock.now()
	o.mu.Lock()
	order := o.order
	o.mu.Unlock()
	for _, p := range order {
		for _, told := range p.tick(now, o.clock) {
			o.publish(told)
		}
	}
}

func (o *Outages) publish(i Incident) {
	log, what := o.log.Error, map[IncidentKind]string{IncidentOutage: "incident: a KMS is out of reach", IncidentLogin: "a KMS refuses our login"}[i.Kind]
	if !i.Closed.IsZero() {
		log, what = o.log.Warn, map[IncidentKind]string{IncidentOutage: "incident closed: the KMS is back", IncidentLogin: "the KMS accepts our login again"}[i.Kind]
	}
	log(what, "incident", i.ID, "provider", i.Provider, "since", i.Since, "back", i.Back, "err", i.LastError)
	if o.tell != nil {
		o.tell(i)
	}
}

// alert tells of what a caller did with its budgets.
func (o *Outages) alert(i Incident) {
	what := map[IncidentKind]string{IncidentBudgetSoft: "a caller has passed its soft budget", IncidentBudgetRate: "a caller is slowed down by its budget",
		IncidentCallerFrozen: "a caller has broken its budget and is frozen; is its certificate stolen?"}[i.Kind]
	o.log.Error(what, "incident", i.ID, "caller", i.Caller, "budget", i.LastError)
	if o.tell != nil {
		o.tell(i)
	}
}

// Warnings are sentences for the status about providers that are away or refuse
// our login.
func (o *Outages) Warnings() []string {
	o.mu.Lock()
	order := o.order
	o.mu.Unlock()
	var w []string
	for _, p := range order {
		p.mu.Lock()
		if !p.login.since.IsZero() {
			w = append(w, fmt.Sprintf("provider %s refuses our login since %s: %s", p.name, o.clock.wall(p.login.since).Format(time.RFC3339), text(p.login.last)))
		}
		if !p.away.since.IsZero() {
			w = append(w, fmt.Sprintf("provider %s does not answer since %s: %s", p.name, o.clock.wall(p.away.since).Format(time.RFC3339), text(p.away.last)))
		}
		p.mu.Unlock()
	}
	return w
}

// An outage is what is known of one provider.
type outage struct {
	name string

	// mu guards the fields below.
	mu    sync.Mutex
	away  alarm
	login alarm
}

// note takes down how a call ended.
func (p *outage) note(now time.Time, result CallResult, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch result {
	case ResultUnavailable:
		p.away.bad(now, err)
	case ResultLogin:
		p.away.bad(now, err)
		p.login.bad(now, err)
	case ResultThrottled: // it is there, and has perhaps not looked at our login
		p.away.good(now)
	default:
		p.away.good(now)
		p.login.good(now)
	}
}

func (p *outage) tick(now time.Time, clock *steady) (told []Incident) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, a := range []*alarm{&p.away, &p.login} {
		if i := a.tick(now, clock, p.name); i != nil {
			told = append(told, *i)
		}
	}
	return told
}

// awaySince is since when it has not answered; zero: it answers, or nobody knows.
func (p *outage) awaySince() time.Time {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.away.since
}

// describe fills in s.
func (p *outage) describe(s *ProviderStatus, clock *steady) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s.AwaySince, s.Incidents = clock.wall(p.away.since), p.away.count
	if p.away.open != nil {
		s.Incident = p.away.open.Declared
	}
	if !p.login.since.IsZero() {
		s.LoginRefused = text(p.login.last)
	}
}

// An alarm is declared once when something has been bad for long enough, and
// closed once when it has been good for incidentHold, so that flapping is one
// incident.
type alarm struct {
	kind  IncidentKind
	after time.Duration
	since time.Time // when it became bad; zero: it is not
	back  time.Time // since when it is good again in an open incident
	last  error
	open  *Incident
	count uint64 // of incidents that were declared
}

func (a *alarm) bad(now time.Time, err error) {
	a.back, a.last = time.Time{}, err
	if a.since.IsZero() {
		a.since = now
	}
}

func (a *alarm) good(now time.Time) {
	a.since = time.Time{}
	if a.open != nil && a.back.IsZero() {
		a.back = now
	}
}

func (a *alarm) tick(now time.Time, clock *steady, provider string) *Incident {
	switch {
	case a.open == nil && !a.since.IsZero() && now.Sub(a.since) >= a.after:
		a.count++
		since := clock.wall(a.since)
		a.open = &Incident{ID: fmt.Sprintf("%s-%s-%d", provider, a.kind, since.Unix()), Kind: a.kind, Provider: provider, Since: since,
			Declared: clock.wall(now), LastError: text(a.last)}
		told := *a.open
		return &told
	case a.open != nil && !a.back.IsZero() && now.Sub(a.back) >= incidentHold:
		told := *a.open
		told.Back, told.Closed = clock.wall(a.back), clock.wall(now)
		a.open, a.back = nil, time.Time{}
		return &told
	}
	return nil
}
