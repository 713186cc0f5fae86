package custodian

import (
	"context"
	"fmt"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/keycustody/custodian/internal/audit"
)

// MEKWarnings are how long before the end of a MEK's period people are told of
// it, the last time when it is over.
var MEKWarnings = []time.Duration{90 * 24 * time.Hour, 30 * 24 * time.Hour, 7 * 24 * time.Hour, 0}

// A MEKAlert says that the period of the MEK that protects ends soon, or has
// ended.
type MEKAlert struct {
	ID      string    `json:"id"` // mek-v1-30d
	MEK     string    `json:"mek"`
	Version uint32    `json:"version"`
	EndTime time.Time `json:"end_time"`
	Days    int       `json:"days"` // of MEKWarnings: no more than so many are left
	Time    time.Time `json:"time"`
}

// mekWarning is the last of MEKWarnings that has come at now.
func (m MEK) mekWarning(now time.Time) (before time.Duration, due bool) {
	for _, w := range MEKWarnings {
		if m.EndTime.Sub(now) <= w {
			before, due = w, true
		}
	}
	return before, due
}

const actionMEKWarning = "mek.warning"

// WarnMEK has tell told that the MEK's period ends, once for each of
// MEKWarnings, and writes down that it was: the audit log is the memory of it.
// Where tell fails it is told again, and so it is after a crash between the two.
// Call it about once a minute, one caller at a time.
func (c *Custodian) WarnMEK(ctx context.Context, tell func(MEKAlert) error) error {
	if c.lookAtClock() != nil {
		return nil // the status says so
	}
	m, now := c.set.Load().protectingMEK(), c.now()
	before, due := m.mekWarning(now)
	a := MEKAlert{ID: fmt.Sprintf("%s-%dd", m.Label, int(before/(24*time.Hour))), MEK: m.Label, Version: m.Version, EndTime: m.EndTime, Days: int(before / (24 * time.Hour)), Time: now}
	if !due || c.warned[a.ID] {
		return nil
	}
	if err := tell(a); err != nil {
		return fmt.Errorf("mek %s: %w", m.Label, err)
	}
	_, err := c.record(ctx, audit.Entry{Action: actionMEKWarning, Outcome: audit.Allowed, RequestID: a.ID, KeyVersion: mekName(m.Version),
		ControlRevision: c.set.Load().head.Revision, Detail: a.text()})
	if err != nil {
		return err
	}
	c.log.Warn(a.text())
	c.warned[a.ID] = true
	return nil
}

func (a MEKAlert) text() string {
	if a.Days == 0 {
		return fmt.Sprintf("mek %s ended at %s: no new KEK is made under it", a.MEK, a.EndTime.Format(time.RFC3339))
	}
	return fmt.Sprintf("mek %s ends at %s, in %d days at most", a.MEK, a.EndTime.Format(time.RFC3339), a.Days)
}

// visitWarning takes down what people were told.
func (l *Logged) visitWarning(e *audit.Entry) {
	if e.Action != actionMEKWarning {
		return
	}
	if l.warned == nil {
		l.warned = map[string]bool{}
	}
	l.warned[e.RequestID] = true
}

// Plan drafts the ceremony that takes the MEK's place: a file that the officers
// review, change as they like, and propose.
func (a MEKAlert) Plan() ([]byte, error) {
	p := Plan{Format: PlanFormat, Kind: KindMEKRotation, Reason: a.text(), Expires: a.Time.Add(MaxPlanLife).UTC().Format("2006-01-02T15:04:05Z"), MEKVersion: a.Version, Hold: "72h"}
	text, err := yaml.Marshal(p)
	if err != nil {
		return nil, err
	}
	head := "# Drafted by custodiand, and approved by nobody. Check every line, then:\n# custodianctl ceremony propose FILE --rehearse\n"
	return append([]byte(head), text...), nil
}
