package custodian

import (
	"encoding/binary"
	"testing"
	"time"

	"github.com/keycustody/custodian/internal/audit"
)

// spender is a custody with nothing but budgets, two that count for each release.
func spender(tb testing.TB) (*Custodian, *Policy) {
	tb.Helper()
	const who = "spiffe://media.test/provider/alpha"
	p, err := NewPolicy([]Grant{{Identity: who, Role: RoleProvider, Categories: []CategoryName{"movies"}}})
	if err == nil {
		p, err = p.WithBudgets([]Budget{{Caller: "*", Action: ActionRelease, Window: time.Hour, SoftKIDs: 50_000, HardKIDs: 100_000, Rate: 1e6},
			{Caller: "*", Action: ActionRelease, Category: "movies", Window: time.Hour, HardKIDs: 100_000}})
	}
	if err != nil {
		tb.Fatal(err)
	}
	return &Custodian{ledger: newLedger(p, loggedSpending{}, sampleTime)}, p
}

func numbered(n uint64) (kid KID) {
	binary.BigEndian.PutUint64(kid[8:], n*0x9e3779b97f4a7c15)
	return kid
}

var spendingCaller = Caller{ID: "spiffe://media.test/provider/alpha"}

// TestSpendAllocates: the check of a key that was taken before allocates nothing.
func TestSpendAllocates(t *testing.T) {
	c, p := spender(t)
	n := uint64(0)
	spend := func() {
		if err := c.spend(p, spendingCaller, ActionRelease, "movies", numbered(n%1000), sampleTime.Add(time.Duration(n)*time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		n++
	}
	for range 1000 {
		spend()
	}
	if got := testing.AllocsPerRun(1000, spend); got != 0 {
		t.Errorf("%g allocations for a key, want none", got)
	}
}

func BenchmarkSpend(b *testing.B) {
	for name, kids := range map[string]uint64{"1000 titles": 1000, "90000 titles": 90_000} {
		b.Run(name, func(b *testing.B) {
			c, p := spender(b)
			now := sampleTime
			b.ReportAllocs()
			for n := uint64(0); b.Loop(); n++ {
				now = now.Add(time.Millisecond)
				if err := c.spend(p, spendingCaller, ActionRelease, "movies", numbered(n%kids), now); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// TestLoggedSpendingIsBounded: what the log knows is let go of when it is older
// than the longest window.
func TestLoggedSpendingIsBounded(t *testing.T) {
	var l loggedSpending
	for i := range uint64(50_000) {
		kid := numbered(i)
		l.visit(&audit.Entry{Time: sampleTime.Add(time.Duration(i) * time.Second), Action: string(ActionRelease), Outcome: audit.Allowed,
			Caller: spendingCaller.ID, Category: "movies", KID: kid[:]}, time.Hour)
	}
	if l.total > 3*3600+4096 {
		t.Errorf("%d KIDs are remembered of the last hour's 3600", l.total)
	}
	_, p := spender(t)
	ledger := newLedger(p, l, sampleTime.Add(50_000*time.Second))
	if n := ledger.accounts[spendingCaller.ID].counters[budgetScope{ActionRelease, "movies"}].count(); n != 3599 {
		t.Errorf("%d are counted, want the last hour's 3599", n)
	}
}
