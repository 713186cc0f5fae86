package rpc_test

import (
	"context"
	"testing"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/custodian"
)

// TestRulesAtEveryDoor: rules that forbid everything leave no way to a key,
// whoever is granted it. The front doors for packagers end in the same Issue.
func TestRulesAtEveryDoor(t *testing.T) {
	k := newKit(t, options{})
	url := k.serveTwin(t)
	k.createCategory(t, "movies")
	key := k.issue(t, "film", "HD")[0]
	policy, err := k.policy()
	if err != nil {
		t.Fatal(err)
	}
	forbidden, err := policy.WithRules([]custodian.RulesFile{{Name: "all.cedar", Text: []byte(`@id("all") forbid (principal, action, resource);`)}})
	if err != nil {
		t.Fatal(err)
	}
	kid, err := custodian.KIDFromBytes(key.GetKid())
	if err != nil {
		t.Fatal(err)
	}
	spec := []*v1.ContentKeySpec{{TrackType: "HD", Scheme: "cbcs"}}
	doors := map[string]func() error{
		"GetContentKeys": func() error {
			_, err := k.dial(t, everybody).GetContentKeys(t.Context(), &v1.GetContentKeysRequest{Kids: [][]byte{key.GetKid()}})
			return err
		},
		"GetContentKeys with all that a caller can say": func() error {
			_, err := k.dial(t, everybody).GetContentKeys(t.Context(), &v1.GetContentKeysRequest{Kids: [][]byte{key.GetKid()}, ContentId: []byte("film"),
				ViewerContext: &v1.ViewerContext{SessionId: "s", DrmSystem: "widevine", SecurityLevel: "L1", Hdcp: "2.3", Region: "SE", LicenceType: "rental"}})
			return err
		},
		"IssueContentKeys, again": func() error {
			_, err := k.dial(t, packager).IssueContentKeys(t.Context(), &v1.IssueContentKeysRequest{Category: "movies", ContentId: []byte("film"), Keys: spec})
			return err
		},
		"IssueContentKeys, new": func() error {
			_, err := k.dial(t, packager).IssueContentKeys(t.Context(), &v1.IssueContentKeysRequest{Category: "movies", ContentId: []byte("other"), Keys: spec})
			return err
		},
	}
	twin := func() twinAnswer {
		return post(t, k.browser(t, everybody, nil), url, map[string]any{"kids": []string{kid.String()}})
	}
	set := func(p *custodian.Policy) {
		if err := k.core.SetPolicy(context.WithoutCancel(t.Context()), p); err != nil {
			t.Fatal(err)
		}
	}
	set(forbidden)
	for name, knock := range doors {
		t.Run(name, func(t *testing.T) { wantRefused(t, knock(), "DENIED") })
	}
	if a := twin(); a.status != 403 || a.Error.Reason != "DENIED" {
		t.Errorf("twin: got HTTP %d and %+v, want 403 DENIED", a.status, a.Error)
	}
	// The doors do open: what was refused was the rules' doing.
	set(policy)
	for name, knock := range doors {
		if err := knock(); err != nil {
			t.Errorf("%s without rules: %v", name, err)
		}
	}
	if a := twin(); a.status != 200 {
		t.Errorf("twin without rules: got HTTP %d", a.status)
	}
}
