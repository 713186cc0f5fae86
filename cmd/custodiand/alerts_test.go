package main

import (
	"bytes"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

// An alertRule is an alert that we hand out.
type alertRule struct {
	Alert       string
	Expr        string
	For         string
	Labels      map[string]string
	Annotations map[string]string
}

func readAlerts(t *testing.T) (rules []alertRule) {
	t.Helper()
	raw, err := os.ReadFile("../../deploy/prometheus-alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Groups []struct {
			Name  string
			Rules []alertRule
		}
	}
	d := yaml.NewDecoder(bytes.NewReader(raw))
	d.KnownFields(true)
	if err := d.Decode(&file); err != nil {
		t.Fatal(err)
	}
	for _, g := range file.Groups {
		rules = append(rules, g.Rules...)
	}
	if len(rules) < 20 {
		t.Fatalf("got %d alerts, want them all", len(rules))
	}
	return rules
}

// TestAlerts: each alert has a severity and says what has happened, the document
// for operators says what to do about it, and no two have one name. That there are
// the metrics that they ask for, TestKafka shows.
func TestAlerts(t *testing.T) {
	operations, err := os.ReadFile("../../docs/OPERATIONS.md")
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]bool{}
	for _, r := range readAlerts(t) {
		if names[r.Alert] || r.Alert == "" {
			t.Errorf("alert %q: twice, or without a name", r.Alert)
		}
		names[r.Alert] = true
		if s := r.Labels["severity"]; s != "page" && s != "ticket" {
			t.Errorf("%s: severity %q", r.Alert, s)
		}
		if r.Annotations["summary"] == "" {
			t.Errorf("%s: no summary", r.Alert)
		}
		if !bytes.Contains(operations, []byte("`"+r.Alert+"`")) {
			t.Errorf("%s: docs/OPERATIONS.md does not say what to do about it", r.Alert)
		}
	}
}

var (
	alertMetric  = regexp.MustCompile(`(custodian_[a-z0-9_]+)(?:\{([^}]*)\})?`)
	alertMatcher = regexp.MustCompile(`([a-z_]+)(=~?)"([^"]*)"`)
)

// wantAlertMetrics holds the alerts against what the daemon shows: each metric
// must be there, with each label that an alert looks at. Where an alert wants one
// value of a label, it must be a value that there is; reasons are of the one
// table, so they need not be there today.
func (c *custody) wantAlertMetrics() {
	t := c.t.(*testing.T)
	t.Helper()
	shown, looked := "\n"+c.metrics(), map[string]bool{}
	for _, r := range readAlerts(t) {
		metrics := alertMetric.FindAllStringSubmatch(r.Expr, -1)
		if len(metrics) == 0 {
			t.Errorf("alert %s looks at no metric of ours: %s", r.Alert, r.Expr)
		}
		for _, m := range metrics {
			looked[m[1]] = true
			if !strings.Contains(shown, "\n"+m[1]+" ") && !strings.Contains(shown, "\n"+m[1]+"{") {
				t.Errorf("alert %s looks at %s, which the daemon does not show", r.Alert, m[1])
				continue
			}
			for _, label := range alertMatcher.FindAllStringSubmatch(m[2], -1) {
				want := label[1] + `="`
				if label[2] == "=" && label[1] != "reason" {
					want += label[3] + `"`
				}
				if !regexp.MustCompile(`(?m)^` + m[1] + `\{[^}]*\b` + regexp.QuoteMeta(want)).MatchString(shown) {
					t.Errorf("alert %s looks at %s with %s, which the daemon does not show", r.Alert, m[1], label[0])
				}
			}
		}
	}
	if len(looked) < 15 {
		t.Errorf("the alerts look at %v only; they were not read", slices.Sorted(maps.Keys(looked)))
	}
}
