package custodian

import (
	"context"
	"errors"
	"strings"

	"github.com/keycustody/custodian/internal/audit"
)

// A Refusal is what is refused before anything is decided: a request that is
// malformed, that is not signed as it has to be, or that wants its answer
// encrypted to somebody whom the configuration does not know.
type Refusal struct {
	RequestID string
	Action    Action       // that it would have come to
	Category  CategoryName // as it was named; left out where it cannot be one
	Door      string       // where it was
}

// maxRefusalDetail in bytes: what a stranger has sent is not kept at length.
const maxRefusalDetail = 256

// Refuse writes a refusal down as a denial, under the limits of all denials,
// unless why is what a call ended with that is in the log already. It returns
// why, for the caller to hear; or, where it cannot be written down, that.
func (c *Custodian) Refuse(ctx context.Context, who Caller, r Refusal, why error) error {
	if invalid, ok := errors.AsType[*InvalidError](why); ok && invalid.judged {
		return why
	}
	if r.Category.Check() != nil {
		r.Category = ""
	}
	e := c.entry(c.set.Load(), who, Decision{}, r.Action, r.RequestID, ref{category: r.Category}, nil)
	e.Outcome, e.Reason = audit.Denied, string(ReasonOf(why))
	e.Detail = r.Door + ": " + strings.ToValidUTF8(why.Error(), "\uFFFD")
	if len(e.Detail) > maxRefusalDetail {
		e.Detail = strings.ToValidUTF8(e.Detail[:maxRefusalDetail], "") + "..."
	}
	if _, err := c.record(ctx, e); err != nil {
		return err
	}
	return why
}
