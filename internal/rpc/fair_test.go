package rpc_test

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/custodian"
)

// A slowHSM opens content keys one at a time, and each takes a while.
type slowHSM struct {
	custodian.HSM
	turn chan struct{}
	each time.Duration
}

func (h *slowHSM) LoadKey(ctx context.Context, m custodian.MEK, u custodian.KeyUse, identity, inner, canary []byte) (custodian.Key, error) {
	k, err := h.HSM.LoadKey(ctx, m, u, identity, inner, canary)
	return slowKey{k, h}, err
}

type slowKey struct {
	custodian.Key
	hsm *slowHSM
}

func (k slowKey) Open(ctx context.Context, iv [12]byte, aad, sealed, dst []byte) (int, error) {
	select {
	case k.hsm.turn <- struct{}{}:
	case <-ctx.Done():
		return 0, fmt.Errorf("wait for the token: %w", custodian.ErrDeadline)
	}
	defer func() { <-k.hsm.turn }()
	time.Sleep(k.hsm.each)
	return k.Key.Open(ctx, iv, aad, sealed, dst)
}

// TestModestCallerIsServed: one caller asks for ten times what the token can do,
// and heeds no refusal; another one that asks for a quarter of it is answered.
func TestModestCallerIsServed(t *testing.T) {
	token := &slowHSM{turn: make(chan struct{}, 1)}
	k := newKit(t, options{custody: func(c *custodian.Config) { token.HSM = c.HSM; c.HSM = token }})
	k.createCategory(t, "movies")
	var tracks []string
	for i := range 200 { // no two calls for one key at a time: they would share its opening
		tracks = append(tracks, fmt.Sprintf("T%d", i))
	}
	keys := k.issue(t, "clip", tracks...)
	token.each = 10 * time.Millisecond

	const learns, counts = 400 * time.Millisecond, 1200 * time.Millisecond
	var wg sync.WaitGroup
	var next atomic.Int64
	start := time.Now()
	type tally struct{ sent, answered, shed atomic.Int64 }
	send := func(who string, every time.Duration) *tally {
		callback, got := v1.NewKeyRetrievalServiceClient(k.conn(t, who)), &tally{}
		wg.Go(func() {
			for sent := 0; time.Since(start) < learns+counts; time.Sleep(time.Millisecond) {
				for ; sent < int(time.Since(start)/every); sent++ {
					wg.Go(func() {
						counted := time.Since(start) > learns
						kid := keys[next.Add(1)%int64(len(keys))].GetKid()
						ctx, cancel := context.WithTimeout(t.Context(), 250*time.Millisecond)
						defer cancel()
						_, err := callback.GetContentKeys(ctx, &v1.GetContentKeysRequest{Kids: [][]byte{kid}})
						if !counted {
							return
						}
						got.sent.Add(1)
						switch status.Code(err) {
						case codes.OK:
							got.answered.Add(1)
						case codes.ResourceExhausted:
							got.shed.Add(1)
						case codes.DeadlineExceeded:
						default:
							t.Errorf("%s: %v", who, err)
						}
					})
				}
			}
		})
		return got
	}
	greedy, modest := send(everybody, time.Millisecond), send(provider, 40*time.Millisecond)
	wg.Wait()
	t.Logf("greedy: %d of %d answered, %d shed; modest: %d of %d answered, %d shed", greedy.answered.Load(), greedy.sent.Load(), greedy.shed.Load(),
		modest.answered.Load(), modest.sent.Load(), modest.shed.Load())
	// A tenth of all calls can be answered, so by chance a tenth of its own would be.
	if got, sent := modest.answered.Load(), modest.sent.Load(); sent < 10 || got*10 < sent*6 {
		t.Errorf("the modest caller: %d of %d calls answered, want six in ten", got, sent)
	}
	if got, sent := greedy.answered.Load(), greedy.sent.Load(); got == 0 || got*10 > sent*3 || greedy.shed.Load() == 0 {
		t.Errorf("the greedy caller: %d of %d calls answered, %d shed; want a few, and the others shed", got, sent, greedy.shed.Load())
	}
}
