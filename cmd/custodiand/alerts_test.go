package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

// TestAlerts: the alerts that we hand out ask for metrics that there are, each has
// a severity and says what has happened, and no two have one name.
func TestAlerts(t *testing.T) {
	raw, err := os.ReadFile("../../deploy/prometheus-alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Groups []struct {
			Name  string
			Rules []struct {
				Alert       string
				Expr        string
				For         string
				Labels      map[string]string
				Annotations map[string]string
			}
		}
	}
	d := yaml.NewDecoder(strings.NewReader(string(raw)))
	d.KnownFields(true)
	if err := d.Decode(&file); err != nil {
		t.Fatal(err)
	}
	metrics := declaredMetrics(t)
	if len(metrics) < 40 {
		t.Fatalf("got %d metrics in the sources, want them all", len(metrics))
	}
	names := map[string]bool{}
	for _, g := range file.Groups {
		for _, r := range g.Rules {
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
			asked := regexp.MustCompile(`custodian_[a-z_]+`).FindAllString(r.Expr, -1)
			if len(asked) == 0 {
				t.Errorf("%s: it asks for no metric: %s", r.Alert, r.Expr)
			}
			for _, name := range asked {
				if !metrics[name] && !metrics[strings.TrimSuffix(name, "_bucket")] {
					t.Errorf("%s: there is no metric %s", r.Alert, name)
				}
			}
		}
	}
	if len(names) < 20 {
		t.Errorf("got %d alerts", len(names))
	}
}

// declaredMetrics reads the names of the metrics from the sources.
func declaredMetrics(t *testing.T) map[string]bool {
	t.Helper()
	found := map[string]bool{}
	literal := regexp.MustCompile(`Name: +"(custodian_[a-z_]+)"|desc\("([a-z_]+)"`)
	for _, pattern := range []string{"*.go", "../../internal/*/*.go"} {
		files, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range files {
			text, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range literal.FindAllStringSubmatch(string(text), -1) {
				if m[1] != "" {
					found[m[1]] = true
				} else {
					found["custodian_"+m[2]] = true
				}
			}
		}
	}
	return found
}
