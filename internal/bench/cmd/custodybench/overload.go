package main

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"flag"
	"fmt"
	mrand "math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/softhsm"
	"github.com/keycustody/custodian/softhsm/fault"
)

const roleOverload = "overload"

const (
	// viewerDeadline is that of each call under overload, as the daemon's own.
	viewerDeadline = 250 * time.Millisecond
	// sulk is how long a caller in a closed loop waits after a refusal, as it is
	// told to by RetryInfo. Those of an open loop do not heed it.
	sulk = time.Second
	// maxOut bounds the calls that the load has under way in an open loop.
	maxOut = 20_000

	overloadKeys = 1000
	tokenDelay   = 2 * time.Millisecond
	viewers      = 1000
	titles       = 5
)

// tokenModule is the PKCS#11 module in SoftHSM's place, where one is to stand
// before it. It is set once, before a custody is opened.
var tokenModule string

// slowToken has a token that is opened from now on be slow once the result is
// called: each of its decryptions and signatures takes so long.
func slowToken(d time.Duration) (slow func(), err error) {
	if d == 0 {
		return func() {}, nil
	}
	real, err := softhsm.FindModule()
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "custodybench-slow-")
	if err != nil {
		return nil, err
	}
	c := fault.Build(faultHost{dir}, real)
	tokenModule = c.Module
	return func() {
		os.RemoveAll(dir) // it is mapped by now
		c.Delay("C_Decrypt", d)
		c.Delay("C_Sign", d)
	}, nil
}

// A faultHost is what the failing module needs of a test.
type faultHost struct{ dir string }

func (faultHost) Helper()           {}
func (h faultHost) TempDir() string { return h.dir }
func (faultHost) Cleanup(func())    {}
func (faultHost) Fatal(args ...any) { fmt.Fprintln(os.Stderr, args...); os.Exit(1) }

// An overloadSpec is one run of calls that may be too many: with so many callers
// that each wait for their answer, or at a rate, whatever becomes of them.
type overloadSpec struct {
	callers int
	rate    float64 // calls a second; 0: callers
	keys    int     // that are asked for: the first ones
}

// An overloadResult is what became of the calls.
type overloadResult struct {
	Sent, Good, Shed, Late, Failed, Wrong int
	Seconds                               float64
	P50, P99                              float64 // µs, of the good ones
	FirstError                            string
}

func (o overloadResult) goodput() float64 { return float64(o.Good) / o.Seconds }

func (r *rig) overloadRun(ctx context.Context, s *server, data string, spec overloadSpec) (overloadResult, error) {
	var res overloadResult
	err := call(ctx, &res, roleOverload, "-pki", r.pki(), "-addr", s.addr, "-dir", data, "-callers", strconv.Itoa(spec.callers), "-rate", strconv.FormatFloat(spec.rate, 'f', 1, 64),
		"-keys", strconv.Itoa(spec.keys), "-warm", r.scale.warm.String(), "-time", (r.scale.time / 2).String())
	if err == nil && res.Good == 0 {
		note("overload, %+v: of %d calls none was answered", spec, res.Sent)
	}
	if res.Failed > 0 {
		note("overload, %+v: %d calls failed, the first: %s", spec, res.Failed, res.FirstError)
		r.table.count("failed_calls", float64(res.Failed))
	}
	r.table.count("overload_wrong_keys", float64(res.Wrong))
	return res, err
}

// overload is what is answered where there are more calls than can be. Open: at
// multiples of the rate that a token with 2 ms a call can do; a faster one would
// need more load than the same machine can make. Closed: at multiples of the
// callers that keep the real token busy.
func (r *rig) overload(ctx context.Context) error {
	data := filepath.Join(r.dir, "overload")
	if _, err := r.prepare(ctx, data, overloadKeys); err != nil {
		return err
	}
	times := []int{1, 2, 5, 10}
	for _, kind := range []struct {
		name   string
		args   []string
		serial int // callers that keep it busy
	}{{"", []string{"-token-delay", tokenDelay.String()}, 64}, {"_closed", nil, 128}} {
		s, err := r.serve(ctx, roleCallback, "overload"+kind.name, append([]string{"-dir", data}, kind.args...)...)
		if err != nil {
			return err
		}
		before, err := s.anonymous()
		if err != nil {
			return err
		}
		for range r.scale.rounds {
			var first, capacity float64
			if kind.name == "" {
				res, err := r.overloadRun(ctx, s, data, overloadSpec{callers: kind.serial, keys: overloadKeys})
				if err != nil {
					return err
				}
				capacity = res.goodput()
				r.table.add("overload_capacity_per_s", capacity)
			}
			for _, n := range times {
				spec := overloadSpec{callers: kind.serial * n, keys: overloadKeys}
				if kind.name == "" {
					spec = overloadSpec{rate: capacity * float64(n), keys: overloadKeys}
				}
				res, err := r.overloadRun(ctx, s, data, spec)
				if err != nil {
					return err
				}
				if n == 1 {
					first = res.goodput()
				}
				suffix := fmt.Sprintf("%s_%dx", kind.name, n)
				r.table.add("overload_goodput"+suffix, res.goodput())
				r.table.add("overload_offered"+suffix, float64(res.Sent)/res.Seconds)
				r.table.add("overload_p99_ms"+suffix, res.P99/1000)
				r.table.add("overload_shed_share"+suffix, float64(res.Shed)/float64(max(res.Sent, 1)))
				r.table.add("overload_late_share"+suffix, float64(res.Late)/float64(max(res.Sent, 1)))
				if n == 10 && first > 0 {
					r.table.add("goodput"+kind.name+"_10x_vs_1x", res.goodput()/first)
				}
			}
			after, err := s.anonymous()
			if err != nil {
				return err
			}
			r.table.add("overload_grown_mb"+kind.name, (after-before)/1e6)
		}
		if err := r.stopAll(); err != nil {
			return err
		}
	}
	return nil
}

// hot is a thousand viewers of five titles, with a token that takes 2 ms a call.
func (r *rig) hot(ctx context.Context) error {
	data := filepath.Join(r.dir, "hot")
	if _, err := r.prepare(ctx, data, titles); err != nil {
		return err
	}
	for range r.scale.rounds {
		for _, kept := range []struct {
			name string
			life time.Duration
		}{{"not_kept", 0}, {"kept_1s", time.Second}, {"kept_60s", time.Minute}} {
			s, err := r.serve(ctx, roleCallback, "hot", "-dir", data, "-token-delay", tokenDelay.String(), "-hot-titles", kept.life.String())
			if err != nil {
				return err
			}
			res, err := r.overloadRun(ctx, s, data, overloadSpec{callers: viewers, keys: titles})
			if err != nil {
				return err
			}
			r.table.add("hot_viewers_per_s_"+kept.name, res.goodput())
			r.table.add("hot_p99_ms_"+kept.name, res.P99/1000)
			r.table.add("hot_shed_share_"+kept.name, float64(res.Shed)/float64(max(res.Sent, 1)))
			if err := r.stopAll(); err != nil {
				return err
			}
		}
	}
	return nil
}

// overloadLoad is the load process.
func overloadLoad(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet(roleOverload, flag.ContinueOnError)
	pki := fs.String("pki", "", "folder of the certificates")
	addr := fs.String("addr", "", "address of the server")
	dir := fs.String("dir", "", "folder of the custody")
	callers := fs.Int("callers", 0, "callers that wait for their answers")
	rate := fs.Float64("rate", 0, "calls a second, where nobody waits")
	keys := fs.Int("keys", 1, "how many KIDs to ask for")
	warm := fs.Duration("warm", 0, "how long to run before it counts")
	length := fs.Duration("time", time.Second, "how long to measure")
	if err := fs.Parse(args); err != nil {
		return err
	}
	conns, err := dial(*pki, custodian.RoleProvider, *addr, 8)
	if err != nil {
		return err
	}
	defer func() {
		for _, c := range conns {
			c.Close()
		}
	}()
	kids, err := readKIDs(kidsFile(*dir))
	if err != nil {
		return err
	}
	sums, err := os.ReadFile(sumsFile(*dir))
	if err != nil {
		return err
	}
	if len(sums) != len(kids)*sha256.Size || *keys > len(kids) {
		return fmt.Errorf("%s: %d bytes for %d KIDs, of which %d are asked for", sumsFile(*dir), len(sums), len(kids), *keys)
	}
	o := &overloader{conns: conns, kids: kids[:*keys], sums: sums}
	var wg sync.WaitGroup
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	if *rate > 0 {
		wg.Go(func() { o.open(ctx, *rate, &wg) })
	} else {
		for range *callers {
			wg.Go(func() { o.closed(ctx) })
		}
	}
	pause(ctx, *warm)
	start := time.Now()
	o.counts.Store(true)
	pause(ctx, *length)
	o.counts.Store(false)
	took := time.Since(start)
	stop()
	wg.Wait()
	o.mu.Lock()
	defer o.mu.Unlock()
	o.Seconds = took.Seconds()
	slices.Sort(o.times)
	if len(o.times) > 0 {
		o.P50, o.P99 = quantile(o.times, 0.5), quantile(o.times, 0.99)
	}
	return json.NewEncoder(os.Stdout).Encode(o.overloadResult)
}

// An overloader makes calls, and counts those that end while it measures.
type overloader struct {
	conns  []*grpc.ClientConn
	kids   []custodian.KID
	sums   []byte
	counts atomic.Bool
	out    atomic.Int64

	mu sync.Mutex // guards the fields below
	overloadResult
	times []float64
}

// open makes calls at a rate. Those that the machine is too slow for are made up
// for in the next millisecond.
func (o *overloader) open(ctx context.Context, rate float64, wg *sync.WaitGroup) {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	start, sent := time.Now(), 0
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		for due := int(rate * time.Since(start).Seconds()); sent < due && o.out.Load() < maxOut; sent++ {
			o.out.Add(1)
			wg.Go(func() {
				defer o.out.Add(-1)
				o.one(context.WithoutCancel(ctx))
			})
		}
	}
}

func (o *overloader) closed(ctx context.Context) {
	for ctx.Err() == nil {
		if o.one(context.WithoutCancel(ctx)) == codes.ResourceExhausted {
			pause(ctx, sulk)
		}
	}
}

// one makes a call, compares the key, and counts.
func (o *overloader) one(ctx context.Context) codes.Code {
	i := mrand.IntN(len(o.kids))
	ctx, cancel := context.WithTimeout(ctx, viewerDeadline)
	defer cancel()
	start := time.Now()
	resp, err := v1.NewKeyRetrievalServiceClient(o.conns[mrand.IntN(len(o.conns))]).GetContentKeys(ctx, &v1.GetContentKeysRequest{Kids: [][]byte{o.kids[i][:]}})
	took := time.Since(start)
	wrong := false
	if err == nil {
		sum := sha256.Sum256(resp.GetResults()[0].GetKey().GetKey())
		wrong = string(sum[:]) != string(o.sums[i*sha256.Size:(i+1)*sha256.Size])
	}
	code := status.Code(err)
	if !o.counts.Load() {
		return code
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.Sent++
	switch {
	case wrong:
		o.Wrong++
	case err == nil:
		o.Good++
		o.times = append(o.times, micros(took))
	case code == codes.ResourceExhausted:
		o.Shed++
	case code == codes.DeadlineExceeded:
		o.Late++
	default:
		if o.Failed++; o.FirstError == "" {
			o.FirstError = err.Error()
		}
	}
	return code
}
