package custodian

import (
	"context"
	"errors"
	"fmt"

	"github.com/keycustody/custodian/internal/admission"
	"github.com/keycustody/custodian/internal/audit"
)

// AdmissionStats are what the gate before Retrieve is doing.
type AdmissionStats struct {
	KeysInside   int64   `json:"keys_inside"`
	KeysLimit    int64   `json:"keys_limit"`
	CallsWaiting int64   `json:"calls_waiting"`
	KeysRate     float64 `json:"keys_per_second"` // seen while there were too many calls; 0: there were not, lately
	Shed         uint64  `json:"shed"`            // calls since the start
}

// Admission describes the gate now.
func (c *Custodian) Admission() AdmissionStats {
	s := c.gate.Stats()
	return AdmissionStats{s.Inside, s.Limit, s.Waiting, s.Rate, s.Shed}
}

// admit lets a call in, before anything is read or decided for it. Where there
// are too many, the callers take turns, and a call that would not be answered in
// its time hears ErrRate. That is not written down one by one: the calls that an
// overload is made of would keep the log, and so the others, busy.
func (c *Custodian) admit(ctx context.Context, who Caller, req RetrieveRequest) (admission.Pass, error) {
	pass, err := c.gate.Enter(ctx, who.ID, len(req.KIDs))
	if err == nil {
		return pass, nil
	}
	err = fmt.Errorf("retrieve %d keys: %w: %w", len(req.KIDs), err, ErrRate)
	if ctx.Err() != nil {
		err = fmt.Errorf("retrieve %d keys: waiting for its turn: %w", len(req.KIDs), ErrDeadline)
	}
	return pass, errors.Join(err, c.CountRefused(who, ActionRelease, req.RequestID, err))
}

// CountRefused has the audit log count a call that was refused before it came to
// a decision. It is for front doors that refuse calls by themselves, too.
func (c *Custodian) CountRefused(who Caller, a Action, requestID string, refused error) error {
	return c.audit.Count(audit.Entry{Time: c.now(), Action: string(a), Outcome: audit.Denied, Reason: string(ReasonOf(refused)), Caller: who.ID,
		RequestID: requestID, ControlRevision: c.set.Load().head.Revision})
}

// lateResults says whether keys were given up because time was up: then the call
// says nothing of how fast the work is.
func lateResults(results []RetrieveResult) bool {
	return len(results) > 0 && errors.Is(results[0].Err, ErrDeadline)
}
