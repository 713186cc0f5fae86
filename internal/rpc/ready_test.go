package rpc_test

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/rpc"
)

// A still clock goes on only when it is told to.
type stillClock struct{ now atomic.Int64 }

func (c *stillClock) Now() time.Time          { return time.Unix(0, c.now.Load()) }
func (c *stillClock) advance(d time.Duration) { c.now.Add(int64(d)) }

// A troubled custody is a real one with a KMS that hangs, or one that answers
// with a status of its own.
type troubled struct {
	rpc.Custody
	hang       atomic.Bool
	asked      atomic.Int32
	categories error
}

func (c *troubled) Ready(ctx context.Context) error {
	c.asked.Add(1)
	if c.hang.Load() {
		<-ctx.Done()
		return fmt.Errorf("%w: %w", custodian.ErrKMSUnavailable, ctx.Err())
	}
	return c.Custody.Ready(ctx)
}

func (c *troubled) Categories(context.Context, custodian.Caller) ([]custodian.Category, error) {
	return nil, c.categories
}

// However many ask, the token is asked once a second at most.
func TestReadinessIsAskedOnce(t *testing.T) {
	clock := &stillClock{}
	clock.now.Store(time.Now().UnixNano())
	k := newKit(t, options{config: func(c *rpc.Config) { c.Now = clock.Now }})
	admin := httptest.NewServer(k.server.AdminHandler(k.metrics))
	defer admin.Close()
	caller := k.dial(t, stranger) // its dial asks too
	before := k.hsm.Count("Health")
	if before == 0 {
		t.Fatal("a client's dial did not ask the token, so that this test shows nothing")
	}
	ask := func() {
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() {
				if ready, err := caller.Ready(t.Context()); err != nil || !ready {
					t.Errorf("ready: got %v, %v; want true", ready, err)
				}
			})
			wg.Go(func() { wantHTTP(t, admin.URL+"/readyz", http.StatusOK, "ok") })
		}
		wg.Wait()
	}
	ask()
	if got := k.hsm.Count("Health") - before; got != 0 {
		t.Errorf("within the second: the token was asked %d times, want 0", got)
	}
	clock.advance(time.Second)
	ask()
	if got := k.hsm.Count("Health") - before; got != 1 {
		t.Errorf("a second later: the token was asked %d times, want 1", got)
	}
}

// A KMS that hangs makes nobody wait for longer than two seconds or so, and is
// asked once, even where the one who asked first has left.
func TestReadinessOfAHangingKMS(t *testing.T) {
	t.Parallel() // it waits, and takes little of the CPUs
	k := newKit(t, options{})
	c := &troubled{Custody: k.core}
	c.hang.Store(true)
	k.server.SetCustody(c)
	admin := httptest.NewServer(k.server.AdminHandler(k.metrics))
	defer admin.Close()
	start := time.Now()
	hasty, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	req, err := http.NewRequestWithContext(hasty, http.MethodGet, admin.URL+"/readyz", nil)
	if err != nil {
		t.Fatal(err)
	}
	if resp, err := http.DefaultClient.Do(req); err == nil {
		resp.Body.Close()
		t.Errorf("a hasty asker heard %s of a KMS that hangs", resp.Status)
	}
	var wg sync.WaitGroup
	for range 10 {
		wg.Go(func() { wantHTTP(t, admin.URL+"/readyz", http.StatusServiceUnavailable, "KMS_UNAVAILABLE") })
	}
	wg.Wait()
	if took := time.Since(start); took > 4*time.Second {
		t.Errorf("/readyz of a KMS that hangs took %s", took)
	}
	if got := c.asked.Load(); got != 1 {
		t.Errorf("the custody was asked %d times, want 1", got)
	}
	c.hang.Store(false)
	caller := k.dial(t, stranger)
	for limit := time.Now().Add(5 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		ready, err := caller.Ready(t.Context())
		if err == nil && ready {
			break
		}
		if time.Now().After(limit) {
			t.Fatalf("ready after the KMS is back: got %v, %v; want true", ready, err)
		}
	}
}

// The server does not end before the look that is under way.
func TestNoLookOutlivesServe(t *testing.T) {
	k := newKit(t, options{})
	c := &troubled{Custody: k.core}
	c.hang.Store(true)
	k.server.SetCustody(c)
	admin := httptest.NewServer(k.server.AdminHandler(k.metrics))
	defer admin.Close()
	heard := make(chan struct{})
	go func() {
		defer close(heard)
		if resp, err := http.Get(admin.URL + "/readyz"); err == nil {
			resp.Body.Close()
		}
	}()
	for limit := time.Now().Add(5 * time.Second); c.asked.Load() == 0 && time.Now().Before(limit); {
		time.Sleep(5 * time.Millisecond)
	}
	start := time.Now()
	if err := k.stop(); err != nil {
		t.Error(err)
	}
	if took := time.Since(start); took > 1500*time.Millisecond {
		t.Errorf("stop took %s, want it to cancel the look", took)
	}
	<-heard
	wantHTTP(t, admin.URL+"/readyz", http.StatusServiceUnavailable, "STARTING")
	if got := c.asked.Load(); got != 1 {
		t.Errorf("the custody was asked %d times, want not again after the end", got)
	}
}
