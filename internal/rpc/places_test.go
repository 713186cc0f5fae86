package rpc_test

import (
	"testing"

	"github.com/keycustody/custodian/internal/rpc"
)

// TestPlaces: however many callers take all that they can get, the next one
// finds a place, and all come back.
func TestPlaces(t *testing.T) {
	p := rpc.NewPlaces(512)
	held := map[string]int{}
	for _, c := range []struct {
		caller string
		want   int
	}{{"a", 256}, {"b", 128}, {"c", 64}, {"a", 0}} {
		n := 0
		for p.TakeForTest(c.caller) {
			n++
		}
		if held[c.caller] += n; n != c.want {
			t.Errorf("%s got %d places, want %d", c.caller, n, c.want)
		}
	}
	for caller, n := range held {
		for range n {
			p.LeaveForTest(caller)
		}
	}
	n := 0
	for p.TakeForTest("d") {
		n++
	}
	if n != 256 {
		t.Errorf("after all have left: %d places for one caller, want 256", n)
	}
}
