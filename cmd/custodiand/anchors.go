package main

import (
	"fmt"
	"time"

	"github.com/keycustody/custodian/internal/anchor"
)

// The modes.
const (
	modeProduction  = "production"
	modeDevelopment = "development"
)

// AnchorsConfig says where the audit log's checkpoints go outside of this
// machine.
type AnchorsConfig struct {
	// AlertAfter is how long an anchor may be without the newest checkpoint; 15m.
	AlertAfter time.Duration `yaml:"alert_after"`
	// StartWithout is how long after a start keys are issued and released while
	// no anchor has answered, in production; 1h.
	StartWithout *time.Duration  `yaml:"start_without"`
	List         []anchor.Config `yaml:"list"`
}

// maxStartWithout is the longest that a rollback may go unnoticed.
const maxStartWithout = 24 * time.Hour

func (c *AnchorsConfig) defaults() {
	if c.AlertAfter == 0 {
		c.AlertAfter = 15 * time.Minute
	}
	if c.StartWithout == nil {
		hour := time.Hour
		c.StartWithout = &hour
	}
	for i := range c.List {
		c.List[i].Default()
	}
}

func (c *Config) checkAnchors() []error {
	var faults []error
	fault := func(format string, args ...any) { faults = append(faults, fmt.Errorf(format, args...)) }
	a := c.Anchors
	if c.Mode != modeProduction && c.Mode != modeDevelopment {
		fault("mode: %q: must be %s or %s", c.Mode, modeProduction, modeDevelopment)
	}
	if *a.StartWithout < 0 || *a.StartWithout > maxStartWithout {
		fault("anchors.start_without: %s: must be 0s to %s", *a.StartWithout, maxStartWithout)
	}
	names, canAnswer := map[string]bool{}, false
	for i, n := range a.List {
		for _, err := range n.Check() {
			fault("anchors.list[%d].%w", i, err)
		}
		if names[n.Name] {
			fault("anchors.list[%d].name: %q is there twice", i, n.Name)
		}
		if a.AlertAfter < 2*n.Interval {
			fault("anchors.alert_after: %s: must be twice the interval of anchor %q at least, %s", a.AlertAfter, n.Name, 2*n.Interval)
		}
		names[n.Name] = true
		canAnswer = canAnswer || n.CanAnswer()
	}
	if c.Mode == modeProduction && !canAnswer {
		fault("anchors.list: no witness and no directory: without one, nobody notices that log and store are rolled back together; where that may be, write mode: %s", modeDevelopment)
	}
	return faults
}

// newAnchors makes the anchors of the audit log.
func (d *daemon) newAnchors() (*anchor.Set, error) {
	c := d.config.Anchors
	o := anchor.Options{Anchors: c.List, AlertAfter: c.AlertAfter, Required: d.config.Mode == modeProduction, StartWithout: *c.StartWithout, Log: d.log}
	if d.webhook != nil {
		o.OnAlert = d.webhook.tellAnchor
	}
	return anchor.New(o)
}
