package custodian

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
)

// TestTokenMemoryIsFull: where no more tokens can be remembered, new ones are
// refused, because one that is not remembered could be shown for ever; those that
// are known go on, and when a generation is over there is room again.
func TestTokenMemoryIsFull(t *testing.T) {
	rules := &Tokens{MaxLifetime: 30 * time.Second, Skew: 5 * time.Second, MaxUses: 3}
	issuer := &TokenIssuer{Issuer: "https://play.test"}
	u := newTokenUses(loggedUses{}, sampleTime)
	u.most = 4
	now := sampleTime.Add(time.Hour)
	use := func(n int) error {
		_, err := u.use(rules, Caller{ID: "provider"}, &Token{issuer: issuer, id: fmt.Sprint(n), session: "s", content: ContentID("film")}, now)
		return err
	}
	for n := range u.most {
		if err := use(n); err != nil {
			t.Fatal(err)
		}
	}
	for range 3 {
		if err := use(99); !errors.Is(err, ErrRate) || !strings.Contains(err.Error(), "4 others are remembered, and no more can be for 40s") {
			t.Errorf("one too many: got %v, want %v", err, ErrRate)
		}
	}
	for range 2 {
		if err := use(0); err != nil {
			t.Errorf("one that is known: %v", err)
		}
	}
	if err := use(0); !errors.Is(err, ErrTokenReplayed) {
		t.Errorf("its fourth use: got %v, want %v", err, ErrTokenReplayed)
	}
	now = now.Add(rules.span())
	if err := use(99); err != nil {
		t.Errorf("when the generation is over: %v", err)
	}
	if err := use(0); !errors.Is(err, ErrTokenReplayed) {
		t.Errorf("the one that was used up, then: got %v, want %v", err, ErrTokenReplayed)
	}
	now = now.Add(2 * rules.span())
	if err := use(100); err != nil {
		t.Errorf("later: %v", err)
	}
	if n := len(u.newer) + len(u.older); n != 1 {
		t.Errorf("%d tokens are remembered after all others are over, want 1", n)
	}
}
