package custodian_test

import (
	"bytes"
	"context"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/keycustody/custodian/custodian"
)

// A login that is refused is an outage with an alert of its own: told at once,
// in the log, the status and by a message, and taken back when logins are good
// again. Keys have their grace.
func TestLoginRefused(t *testing.T) {
	w, kid, kmss, incidents := graceWorld(t, "vault")
	var log bytes.Buffer
	w.cfg.Log = slog.New(slog.NewTextHandler(&log, nil))
	w.reopen()
	wantErr(t, "release", w.release(provider, kid), nil)
	kmss[0].set(custodian.ErrProviderLogin)
	w.advance(testLifetime)
	began := w.now().UTC()
	w.wantGrace("the login is refused", kid, testGrace-testLifetime, nil)
	for range 3 {
		w.c.TickKMS()
	}
	told := func(what string, want ...string) {
		t.Helper()
		var got []string
		for _, i := range *incidents {
			event := string(i.Kind) + " declared"
			if !i.Closed.IsZero() {
				event = string(i.Kind) + " closed"
			}
			got = append(got, event)
		}
		if !slices.Equal(got, want) {
			t.Fatalf("%s: got messages %q, want %q", what, got, want)
		}
	}
	told("at once", "login declared")
	if i := (*incidents)[0]; !i.Since.Equal(began) || !i.Declared.Equal(began) || i.Provider != "vault" || i.LastError == "" || i.ID == "" {
		t.Errorf("got %+v, want it since %s", i, began)
	}
	if s := w.status("vault"); s.LoginRefused == "" || s.Refused != "" || s.AwaySince.IsZero() {
		t.Errorf("status: got login refused %q, access refused %q, away since %s", s.LoginRefused, s.Refused, s.AwaySince)
	}
	if n := strings.Count(log.String(), `msg="a KMS refuses our login"`); n != 1 {
		t.Errorf("got %d lines in the log, want 1:\n%s", n, log.String())
	}
	w.advance(5 * time.Minute)
	w.c.TickKMS()
	told("it lasts", "login declared", "outage declared")
	kmss[0].set(custodian.ErrProviderUnavailable) // nobody knows whether the login would be good
	w.c.ProbeKMS(t.Context())
	w.advance(2 * time.Minute)
	w.c.TickKMS()
	told("it is away altogether", "login declared", "outage declared")
	kmss[0].set(nil)
	w.wantGrace("the login is good", kid, 0, nil)
	w.advance(time.Minute - time.Second)
	w.c.TickKMS()
	told("for 59 seconds", "login declared", "outage declared")
	w.advance(time.Second)
	w.c.TickKMS()
	told("for a minute", "login declared", "outage declared", "outage closed", "login closed")
	if s := w.status("vault"); s.LoginRefused != "" {
		t.Errorf("status afterwards: got login refused %q", s.LoginRefused)
	}
	w.whole()
}

// An outage in which the daemon cannot even start is an incident as any other,
// and one that was declared before a restart is closed after it.
func TestIncidentWhileStarting(t *testing.T) {
	w, _, kmss, _ := graceWorld(t, "vault")
	if _, err := w.c.SetProviders(t.Context(), officer, custodian.SetProvidersRequest{HelperKeys: true, Providers: []string{"vault"}}); err != nil {
		t.Fatal(err)
	}
	w.cfg.KMS.RewrapRate = 1e6
	w.reopen()
	w.rewraps(none)
	var told []custodian.Incident
	tell := func(i custodian.Incident) { told = append(told, i) }
	w.cfg.Outages = custodian.NewOutages(w.now, nil, tell, nil)

	kmss[0].set(custodian.ErrProviderUnavailable)
	began := w.now().UTC()
	for range 10 { // starts that fail, every half minute
		wantErr(t, "start while the KMS is away", w.open(), custodian.ErrKMSUnavailable)
		w.cfg.Outages.Tick()
		if len(told) != 0 {
			t.Fatalf("after %s: got %+v, want no message yet", w.now().Sub(began), told)
		}
		w.advance(30 * time.Second)
	}
	if got := w.cfg.Outages.Warnings(); len(got) != 1 || !strings.Contains(got[0], "vault does not answer since") {
		t.Errorf("warnings: got %q", got)
	}
	w.cfg.Outages.Tick()
	if len(told) != 1 || !told[0].Since.Equal(began) || !told[0].Declared.Equal(began.Add(5*time.Minute)) {
		t.Fatalf("after five minutes: got %+v, want one message", told)
	}

	// The daemon is started again: its file knows of the incident.
	w.cfg.Outages = custodian.NewOutages(w.now, nil, tell, told[:1])
	wantErr(t, "another start", w.open(), custodian.ErrKMSUnavailable)
	w.advance(10 * time.Minute)
	w.cfg.Outages.Tick()
	if len(told) != 1 {
		t.Fatalf("it goes on: got %+v, want it told once", told)
	}
	kmss[0].set(nil)
	w.reopen()
	back := w.now().UTC()
	w.advance(time.Minute)
	w.c.TickKMS()
	if len(told) != 2 || told[1].ID != told[0].ID || !told[1].Back.Equal(back) || told[1].Closed.IsZero() || !told[1].Since.Equal(began) {
		t.Errorf("when it is back: got %+v, want the same incident closed", told)
	}
	w.whole()
}

// A provider can have a deadline of its own.
func TestDeadlineOfAProvider(t *testing.T) {
	w, kid, kmss, _ := graceWorld(t, "vault", "aws")
	w.cfg.KMS.Deadline = time.Minute
	w.cfg.KMS.Deadlines = map[string]time.Duration{"vault": 50 * time.Millisecond, "aws": 50 * time.Millisecond}
	w.reopen()
	for _, k := range kmss {
		defer k.hang()()
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	res, err := w.c.Retrieve(ctx, provider, custodian.RetrieveRequest{KIDs: []custodian.KID{kid}})
	if err == nil {
		err = res[0].Err
	}
	wantErr(t, "a cold KEK while both hang", err, custodian.ErrKMSUnavailable)
}
