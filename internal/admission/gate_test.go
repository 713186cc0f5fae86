package admission_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/keycustody/custodian/internal/admission"
)

const deadline = 250 * time.Millisecond

// A device does one thing at a time, in the order in which it is asked, and each
// takes a while.
type device struct {
	turn chan struct{}
	mu   sync.Mutex
	each time.Duration
}

func newDevice(each time.Duration) *device {
	d := &device{turn: make(chan struct{}, 1), each: each}
	d.turn <- struct{}{}
	return d
}

func (d *device) set(each time.Duration) {
	d.mu.Lock()
	d.each = each
	d.mu.Unlock()
}

// do waits for n turns, and gives up with ctx: a turn that has begun runs to its end.
func (d *device) do(ctx context.Context, n int) error {
	for range n {
		select {
		case <-d.turn:
		case <-ctx.Done():
			return ctx.Err()
		}
		d.mu.Lock()
		each := d.each
		d.mu.Unlock()
		time.Sleep(each)
		d.turn <- struct{}{}
	}
	return ctx.Err()
}

// A tally is what the calls of one caller came to.
type tally struct {
	mu                   sync.Mutex
	good, shed, late     int
	took                 []time.Duration // of good ones
	sent                 int
	shedLate             int // not at once
	otherErrors          []error
	goodSince, shedSince int // of those that began after mark
	mark                 time.Time
}

func (c *tally) p99() time.Duration {
	slices.Sort(c.took)
	if len(c.took) == 0 {
		return 0
	}
	return c.took[len(c.took)*99/100]
}

// flood sends calls at a rate, whatever becomes of them, for a while.
func flood(ctx context.Context, wg *sync.WaitGroup, g *admission.Gate, d *device, caller string, keys int, every, length time.Duration, to *tally) {
	for end := time.Now().Add(length); time.Now().Before(end); time.Sleep(every) {
		to.sent++
		wg.Go(func() { call(ctx, g, d, caller, keys, to) })
	}
}

func call(ctx context.Context, g *admission.Gate, d *device, caller string, keys int, to *tally) {
	start := time.Now()
	ctx, cancel := context.WithTimeout(ctx, deadline)
	defer cancel()
	p, err := g.Enter(ctx, caller, keys)
	if err == nil {
		err = d.do(ctx, keys)
		g.Leave(p, err == nil)
	}
	took := time.Since(start)
	to.mu.Lock()
	defer to.mu.Unlock()
	marked := !to.mark.IsZero() && !start.Before(to.mark)
	switch {
	case err == nil:
		to.good++
		to.took = append(to.took, took)
		if marked {
			to.goodSince++
		}
	case errors.Is(err, admission.ErrShed):
		to.shed++
		if took > time.Millisecond {
			to.shedLate++
		}
		if marked {
			to.shedSince++
		}
	case errors.Is(err, context.DeadlineExceeded):
		to.late++
	default:
		to.otherErrors = append(to.otherErrors, err)
	}
}

// TestOverload: at any multiple of what a device can do, nearly all that it does
// is of use, and the answers are in time.
func TestOverload(t *testing.T) {
	for _, test := range []struct {
		each  time.Duration // of the device
		keys  int
		times int // the capacity
	}{
		{2 * time.Millisecond, 1, 1},
		{2 * time.Millisecond, 1, 2},
		{2 * time.Millisecond, 1, 10},
		{2 * time.Millisecond, 4, 10},
		{10 * time.Millisecond, 1, 10},
		{250 * time.Microsecond, 1, 5},
	} {
		t.Run(fmt.Sprintf("%s x%d at %d", test.each, test.keys, test.times), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := admission.New(deadline, time.Now)
				d := newDevice(test.each)
				capacity := float64(time.Second) / float64(test.each) / float64(test.keys)
				const length = 4 * time.Second
				var wg sync.WaitGroup
				got := tally{mark: time.Now().Add(time.Second)}
				flood(t.Context(), &wg, g, d, "a", test.keys, time.Duration(float64(time.Second)/capacity/float64(test.times)), length, &got)
				wg.Wait()
				useful := float64(got.goodSince) / (capacity * (length - time.Second).Seconds())
				if useful < 0.9 {
					t.Errorf("of what the device can do, %.2f was answered in time: %d good, %d shed, %d late of %d", useful, got.good, got.shed, got.late, got.sent)
				}
				if limit := got.sent / 15; got.late > max(limit, int(capacity)/2) {
					t.Errorf("%d of %d calls were begun and not answered in time", got.late, got.sent)
				}
				if test.times > 1 && got.shed == 0 {
					t.Error("nothing was shed")
				}
				if got.shedLate > got.shed/5+10 {
					t.Errorf("%d of %d refusals did not come at once", got.shedLate, got.shed)
				}
				if p99 := got.p99(); p99 > deadline {
					t.Errorf("p99 of the answered: %s", p99)
				}
				if s := g.Stats(); s.Inside != 0 || s.Waiting != 0 {
					t.Errorf("at the end: %+v", s)
				}
				if len(got.otherErrors) > 0 {
					t.Errorf("other errors: %v", got.otherErrors[0])
				}
			})
		})
	}
}

// TestFair: a caller that keeps to its share is answered, whatever another sends.
func TestFair(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := admission.New(deadline, time.Now)
		d := newDevice(2 * time.Millisecond) // 500 a second
		var loud, quiet tally
		var wg, floods sync.WaitGroup
		quiet.mark = time.Now().Add(time.Second)
		floods.Go(func() { flood(t.Context(), &wg, g, d, "loud", 1, 200*time.Microsecond, 4*time.Second, &loud) })
		floods.Go(func() { flood(t.Context(), &wg, g, d, "quiet", 1, 10*time.Millisecond, 4*time.Second, &quiet) })
		floods.Wait()
		wg.Wait()
		if quiet.goodSince < 290 { // of 300
			t.Errorf("the quiet caller: %d of 300 answered, %d shed, %d late", quiet.goodSince, quiet.shed, quiet.late)
		}
		if loud.good < 1400 {
			t.Errorf("the loud caller: %d of %d answered; there was room for some 1600", loud.good, loud.sent)
		}
		if loud.shed < loud.sent/2 {
			t.Errorf("the loud caller: %d of %d shed", loud.shed, loud.sent)
		}
	})
}

// TestModest: a caller that asks for half of its share is answered beside one
// that asks for ten times of what there is, however slow the device is.
func TestModest(t *testing.T) {
	for _, test := range []struct {
		each time.Duration // of the device
		keys int           // of each call of the greedy one
	}{{500 * time.Microsecond, 1}, {2 * time.Millisecond, 1}, {2 * time.Millisecond, 8}, {5 * time.Millisecond, 1}, {10 * time.Millisecond, 1}, {10 * time.Millisecond, 4}, {20 * time.Millisecond, 1}, {25 * time.Millisecond, 1}} {
		t.Run(fmt.Sprintf("%s x%d", test.each, test.keys), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := admission.New(deadline, time.Now)
				d := newDevice(test.each)
				const length = 5 * time.Second
				mark := time.Now().Add(time.Second)
				greedy, modest := tally{mark: mark}, tally{mark: mark}
				var wg, floods sync.WaitGroup
				floods.Go(func() {
					flood(t.Context(), &wg, g, d, "greedy", test.keys, test.each*time.Duration(test.keys)/10, length, &greedy)
				})
				floods.Go(func() { flood(t.Context(), &wg, g, d, "modest", 1, 4*test.each+time.Microsecond, length, &modest) })
				floods.Wait()
				wg.Wait()
				want := int((length - time.Second) / (4 * test.each))
				t.Logf("modest: %d of %d answered, %d shed, %d late; greedy: %d of %d, %d late", modest.goodSince, want, modest.shed, modest.late, greedy.good, greedy.sent, greedy.late)
				if modest.goodSince*100 < want*85 {
					t.Errorf("the modest caller: %d of %d answered, %d shed, %d late", modest.goodSince, want, modest.shed, modest.late)
				}
				served := time.Duration(greedy.goodSince*test.keys+modest.goodSince) * test.each
				if served < (length-time.Second)*8/10 {
					t.Errorf("the device was of use for %s of %s", served, length-time.Second)
				}
			})
		})
	}
}

// TestEquals: of callers that all ask for too much, none has less than half of
// its share, whose calls fall in with the device's; and what they have is in time.
func TestEquals(t *testing.T) {
	for _, each := range []time.Duration{2 * time.Millisecond, 10 * time.Millisecond} {
		t.Run(each.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g, d := admission.New(deadline, time.Now), newDevice(each)
				const length = 5 * time.Second
				var callers [4]tally
				var wg, floods sync.WaitGroup
				for i := range callers {
					callers[i].mark = time.Now().Add(time.Second)
					floods.Go(func() {
						flood(t.Context(), &wg, g, d, fmt.Sprint(i), 1, each/2+time.Duration(i)*each/100, length, &callers[i])
					})
				}
				floods.Wait()
				wg.Wait()
				share, late := int((length-time.Second)/each)/len(callers), 0
				for i := range callers {
					late += callers[i].late
					if got := callers[i].goodSince; got < share/2 {
						t.Errorf("caller %d: %d answered, its share is %d", i, got, share)
					}
				}
				if sent := 4 * callers[0].sent; late > sent/15 {
					t.Errorf("%d of %d calls were begun and not answered in time", late, sent)
				}
			})
		})
	}
}

// TestQuiet: what can be done is not shed: not a load below the capacity, not a
// burst out of nothing, and not the first calls when a slow device is fast again.
func TestQuiet(t *testing.T) {
	t.Run("below capacity", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			g, d := admission.New(deadline, time.Now), newDevice(2*time.Millisecond)
			var got tally
			var wg sync.WaitGroup
			flood(t.Context(), &wg, g, d, "a", 1, 2500*time.Microsecond, 3*time.Second, &got)
			wg.Wait()
			if got.good != got.sent {
				t.Errorf("%d of %d answered, %d shed, %d late", got.good, got.sent, got.shed, got.late)
			}
		})
	})
	t.Run("bursts", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			g, d := admission.New(deadline, time.Now), newDevice(100*time.Microsecond)
			var got tally
			var wg sync.WaitGroup
			for range 10 {
				for range 1500 { // 150 ms of work
					got.sent++
					wg.Go(func() { call(t.Context(), g, d, "a", 1, &got) })
				}
				time.Sleep(500 * time.Millisecond)
			}
			wg.Wait()
			if got.good != got.sent {
				t.Errorf("%d of %d answered, %d shed, %d late", got.good, got.sent, got.shed, got.late)
			}
		})
	})
	t.Run("after a bad time", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			g, d := admission.New(deadline, time.Now), newDevice(20*time.Millisecond)
			var got tally
			var wg sync.WaitGroup
			got.mark = time.Now().Add(3 * time.Second)
			go func() { time.Sleep(2 * time.Second); d.set(200 * time.Microsecond) }()
			flood(t.Context(), &wg, g, d, "a", 1, time.Millisecond, 4*time.Second, &got)
			wg.Wait()
			if got.shed == 0 {
				t.Error("nothing was shed while the device was slow")
			}
			if got.shedSince > 0 || got.goodSince < 990 {
				t.Errorf("a second after the device is fast again: %d of 1000 answered, %d shed", got.goodSince, got.shedSince)
			}
		})
	})
	t.Run("much at once, slowly", func(t *testing.T) {
		// A disk that takes 100 ms for any number of calls is no reason to shed, not
		// even after it has taken longer than anybody waits.
		synctest.Test(t, func(t *testing.T) {
			g := admission.New(deadline, time.Now)
			var wg sync.WaitGroup
			refused, start := 0, time.Now()
			for time.Since(start) < 5*time.Second {
				slow := time.Since(start) < time.Second
				counts := time.Since(start) > 3*time.Second
				wg.Go(func() {
					ctx, cancel := context.WithTimeout(t.Context(), deadline)
					defer cancel()
					p, err := g.Enter(ctx, "a", 1)
					if err != nil {
						if counts {
							refused++
						}
						return
					}
					if slow {
						<-ctx.Done()
					} else {
						time.Sleep(100 * time.Millisecond)
					}
					g.Leave(p, !slow)
				})
				time.Sleep(2 * time.Millisecond)
			}
			wg.Wait()
			if refused > 50 {
				t.Errorf("%d of 1000 refused", refused)
			}
		})
	})
}

// TestDeadline: the caller's own time counts, before it waits and while it does.
func TestDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, d := admission.New(deadline, time.Now), newDevice(2*time.Millisecond)
		var loud tally
		var wg sync.WaitGroup
		wg.Go(func() { flood(t.Context(), &wg, g, d, "loud", 1, 500*time.Microsecond, 2*time.Second, &loud) })
		time.Sleep(time.Second)
		start := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Millisecond)
		defer cancel()
		if _, err := g.Enter(ctx, "hasty", 1); !errors.Is(err, admission.ErrShed) {
			t.Errorf("a call with 5 ms left: got %v, want ErrShed", err)
		}
		if took := time.Since(start); took > time.Millisecond {
			t.Errorf("it was refused after %s, not at once", took)
		}
		gone, leave := context.WithCancel(t.Context())
		time.AfterFunc(time.Millisecond, leave)
		if p, err := g.Enter(gone, "gone", 1); err == nil {
			g.Leave(p, true)
		} else if !errors.Is(err, context.Canceled) {
			t.Errorf("a caller that goes away: got %v", err)
		}
		wg.Wait()
		if s := g.Stats(); s.Inside != 0 || s.Waiting != 0 {
			t.Errorf("at the end: %+v", s)
		}
	})
}

// TestBounded: what waits is bounded, also where nothing is known of the rate,
// and one caller does not take the room of another.
func TestBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := admission.New(deadline, time.Now)
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		enter := func(caller string, keys, n int) (shed int) {
			var mu sync.Mutex
			for range n {
				wg.Go(func() {
					_, err := g.Enter(ctx, caller, keys)
					mu.Lock()
					defer mu.Unlock()
					if errors.Is(err, admission.ErrShed) {
						shed++
					}
				})
			}
			synctest.Wait()
			mu.Lock()
			defer mu.Unlock()
			return shed
		}
		if shed := enter("a", 64, 16); shed != 0 { // nobody ever leaves
			t.Errorf("1024 keys: %d calls shed", shed)
		}
		if shed := enter("a", 1, 5000); shed != 5000-4096 {
			t.Errorf("5000 that wait: %d shed, want %d", shed, 5000-4096)
		}
		if shed := enter("b", 1, 3000); shed != 3000-2048 {
			t.Errorf("3000 of another caller: %d shed, want %d", shed, 3000-2048)
		}
		cancel()
		wg.Wait()
		if s := g.Stats(); s.Waiting != 0 || s.Inside != 1024 {
			t.Errorf("after all have left: %+v", s)
		}
	})
}

// TestAlone: a call for more keys than there is room for comes in when nobody
// else is inside.
func TestAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, d := admission.New(deadline, time.Now), newDevice(20*time.Millisecond)
		var loud tally
		var wg sync.WaitGroup
		flood(t.Context(), &wg, g, d, "loud", 1, time.Millisecond, 2*time.Second, &loud)
		wg.Wait()
		if limit := g.Stats().Limit; limit >= 64 {
			t.Fatalf("limit: %d, want one below 64", limit)
		}
		p, err := g.Enter(t.Context(), "a", 64)
		if err != nil {
			t.Fatal(err)
		}
		g.Leave(p, true)
	})
}

func BenchmarkGate(b *testing.B) {
	g := admission.New(deadline, time.Now)
	ctx, cancel := context.WithTimeout(b.Context(), time.Hour)
	defer cancel()
	b.ReportAllocs()
	b.Run("alone", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			p, err := g.Enter(ctx, "a", 1)
			if err != nil {
				b.Fatal(err)
			}
			g.Leave(p, true)
		}
	})
	b.Run("parallel", func(b *testing.B) {
		b.ReportAllocs()
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				p, err := g.Enter(ctx, "a", 1)
				if err != nil {
					b.Fatal(err)
				}
				g.Leave(p, true)
			}
		})
	})
}
