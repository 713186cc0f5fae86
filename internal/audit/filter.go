package audit

import (
	"bytes"
	"slices"
	"time"
)

// A Filter picks entries. A field with its zero value picks all; the others
// must all fit. An entry that stands for several denials counts as one.
type Filter struct {
	Since, Before time.Time // from Since on, and earlier than Before
	Caller        string
	Action        string
	Outcome       Outcome
	Category      string
	ContentID     []byte
	KID           []byte
	KeyVersion    string // of the KEK, for example "movies/4"
	RequestID     string
	Refs          []Ref // the entry has one of them
}

// Match reports whether the filter picks the entry.
func (f *Filter) Match(e *Entry) bool {
	is := func(want, got string) bool { return want == "" || want == got }
	return (f.Since.IsZero() || !e.Time.Before(f.Since)) &&
		(f.Before.IsZero() || e.Time.Before(f.Before)) &&
		is(f.Caller, e.Caller) &&
		is(f.Action, e.Action) &&
		(f.Outcome == 0 || f.Outcome == e.Outcome) &&
		is(f.Category, e.Category) &&
		(len(f.ContentID) == 0 || bytes.Equal(f.ContentID, e.ContentID)) &&
		(len(f.KID) == 0 || bytes.Equal(f.KID, e.KID)) &&
		is(f.KeyVersion, e.KeyVersion) &&
		is(f.RequestID, e.RequestID) &&
		(len(f.Refs) == 0 || slices.ContainsFunc(f.Refs, func(r Ref) bool { return slices.Contains(e.Refs, r) }))
}

// ParseOutcome is the inverse of String.
func ParseOutcome(s string) (Outcome, bool) {
	for _, o := range []Outcome{Allowed, Denied, Failed, Begun} {
		if o.String() == s {
			return o, true
		}
	}
	return 0, false
}
