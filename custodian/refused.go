package custodian

import (
	"context"
	"strings"
)

// A Refusal is what a front door refuses by itself, before it can ask for
// anything: a request that is malformed, that is not signed as it has to be, or
// that wants its answer encrypted to somebody whom the configuration does not
// know.
type Refusal struct {
	RequestID string
	Action    Action       // that it would have come to
	Category  CategoryName // as it was named; left out where it cannot be one
	Door      string       // where it was
}

// maxRefusalDetail in bytes: what a stranger has sent is not kept at length.
const maxRefusalDetail = 256

// Refuse writes a refusal down as a denial, under the limits of all denials. It
// returns why, for the caller to hear; or, where it cannot be written down,
// that.
func (c *Custodian) Refuse(ctx context.Context, who Caller, r Refusal, why error) error {
	if r.Category.Check() != nil {
		r.Category = ""
	}
	e := c.entry(c.set.Load(), who, Decision{}, r.Action, r.RequestID, ref{category: r.Category}, why)
	e.Detail = r.Door + ": " + strings.ToValidUTF8(why.Error(), "\uFFFD")
	if len(e.Detail) > maxRefusalDetail {
		e.Detail = strings.ToValidUTF8(e.Detail[:maxRefusalDetail], "") + "..."
	}
	if _, err := c.record(ctx, e); err != nil {
		return err
	}
	return why
}
