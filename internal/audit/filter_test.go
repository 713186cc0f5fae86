package audit_test

import (
	"testing"
	"time"

	"github.com/keycustody/custodian/internal/audit"
)

func TestFilter(t *testing.T) {
	e := release(5)
	other := denial(900, "spiffe://studio.example/drm/two")
	other.Action, other.Category = "issue", "series"
	for name, f := range map[string]audit.Filter{
		"since":       {Since: other.Time},
		"before":      {Before: e.Time},
		"caller":      {Caller: other.Caller},
		"action":      {Action: other.Action},
		"outcome":     {Outcome: other.Outcome},
		"category":    {Category: other.Category},
		"content":     {ContentID: other.ContentID},
		"kid":         {KID: other.KID},
		"key version": {KeyVersion: "movies/5"},
		"request":     {RequestID: other.RequestID},
	} {
		if f.Match(&e) {
			t.Errorf("%s: it picks another entry", name)
		}
		if name != "before" && name != "key version" && !f.Match(&other) {
			t.Errorf("%s: it does not pick its entry", name)
		}
	}
	all := audit.Filter{Since: e.Time, Before: e.Time.Add(time.Nanosecond), Caller: e.Caller, Action: e.Action, Outcome: e.Outcome,
		Category: e.Category, ContentID: e.ContentID, KID: e.KID, KeyVersion: e.KeyVersion, RequestID: e.RequestID}
	if !all.Match(&e) || !new(audit.Filter).Match(&e) {
		t.Error("a filter does not pick what it describes")
	}
}
