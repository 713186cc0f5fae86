package custodian_test

import (
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/keycustody/custodian/custodian"
)

// The end of the MEK's year is told of ninety, thirty and seven days before it
// and when it has come, once each: through restarts, and again where whoever is
// told could not be.
func TestWarnMEK(t *testing.T) {
	w := newWorld(t)
	w.cfg.ConfirmTime = true
	const day = 24 * time.Hour
	end := w.now().Add(custodian.MEKPeriod)
	at := func(left time.Duration) {
		t.Helper()
		w.clock.Store(end.Add(-left).UnixNano())
		w.reopen()
	}
	var told []string
	broken := errors.New("broken")
	fail := false
	warn := func(what string, want ...string) {
		t.Helper()
		for range 3 {
			err := w.c.WarnMEK(t.Context(), func(a custodian.MEKAlert) error {
				if fail {
					return broken
				}
				told = append(told, a.ID)
				text, err := a.Plan()
				if err != nil {
					return err
				}
				p, err := custodian.ParsePlan(text)
				if err != nil || p.Kind != custodian.KindMEKRotation || p.MEKVersion != a.Version || !p.ExpireTime().After(w.now()) {
					t.Errorf("%s: the draft is\n%s%v", what, text, err)
				}
				return nil
			})
			if fail != errors.Is(err, broken) {
				t.Errorf("%s: got %v", what, err)
			}
		}
		if !slices.Equal(told, want) {
			t.Errorf("%s: told %v, want %v", what, told, want)
		}
		told = nil
	}
	warning := func() int {
		t.Helper()
		s, err := w.c.Status(t.Context(), operator)
		if err != nil {
			t.Fatal(err)
		}
		m := s.MEKs[len(s.MEKs)-1]
		if m.Warning == nil {
			return -1
		}
		return *m.Warning
	}
	at(90*day + time.Second)
	warn("a second too early")
	if got := warning(); got != -1 {
		t.Errorf("a second too early: status warns of %d days", got)
	}
	at(90 * day)
	fail = true
	warn("nobody hears")
	fail = false
	warn("ninety days", "mek-v1-90d")
	at(31 * day)
	warn("thirty-one days")
	at(29 * day)
	warn("less than thirty days", "mek-v1-30d")
	at(8 * day)
	warn("eight days")
	if got := warning(); got != 30 {
		t.Errorf("eight days: status warns of %d days, want 30", got)
	}
	at(7 * day)
	warn("seven days", "mek-v1-7d")
	at(-time.Second)
	warn("past its year", "mek-v1-0d")
	at(-time.Hour)
	warn("an hour later")
	told4 := 0
	for _, e := range w.entries(0) {
		if e.Action == "mek.warning" {
			told4++
		}
	}
	if told4 != 4 {
		t.Errorf("%d warnings in the audit log, want 4", told4)
	}
	w.rotate(mekOrder) // a new MEK has a year of its own
	warn("a new MEK")
}

// A daemon that first looks when the end is near tells of that only.
func TestWarnMEKLate(t *testing.T) {
	w := newWorld(t)
	w.cfg.ConfirmTime = true
	w.clock.Add(int64(custodian.MEKPeriod - 5*24*time.Hour))
	w.reopen()
	var told []int
	for range 2 {
		if err := w.c.WarnMEK(t.Context(), func(a custodian.MEKAlert) error { told = append(told, a.Days); return nil }); err != nil {
			t.Fatal(err)
		}
	}
	if !slices.Equal(told, []int{7}) {
		t.Errorf("told %v, want seven days once", told)
	}
}
