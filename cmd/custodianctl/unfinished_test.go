package main

import (
	"slices"
	"testing"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/audit"
)

// Of the attempts in a log those are unfinished that have no end, or one that
// nobody saw.
func TestUnfinished(t *testing.T) {
	dir := t.TempDir()
	log, err := audit.Create(dir, audit.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	end := func(of uint64, o audit.Outcome, reason string) audit.Entry {
		return audit.Entry{Action: "backup", Outcome: o, Reason: reason, HasAttempt: true, Attempt: of, Priority: true}
	}
	begun := audit.Entry{Action: "backup", Outcome: audit.Begun}
	if _, err := log.Append(t.Context(), []audit.Entry{begun, begun, begun, begun, {Action: "start", Outcome: audit.Allowed},
		end(2, audit.Failed, custodian.ReasonInterrupted), end(0, audit.Allowed, ""), end(3, audit.Failed, "INTERNAL")}); err != nil {
		t.Fatal(err)
	}
	entries, err := newest(t.Context(), unfinished(func(fn func(*audit.Entry) error) error { return audit.Read(dir, 0, fn) }), &filter{})
	if err != nil {
		t.Fatal(err)
	}
	var got []uint64
	for _, e := range entries {
		got = append(got, e.Index)
	}
	if want := []uint64{1, 2}; !slices.Equal(got, want) {
		t.Errorf("got the attempts %v, want %v", got, want)
	}
}
