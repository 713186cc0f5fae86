package main

import (
	"cmp"
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

	"golang.org/x/sync/errgroup"
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

	// modestProvider is the caller that keeps to its share: a quarter of the
	// capacity, where two callers have a half each.
	modestProvider = "modest-provider"
	modestShare    = 0.25

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
	own     bool    // each of the callers asks for one key only, the next one for the next
	who     string  // whose certificate; empty: the provider's
}

// An overloadResult is what became of the calls.
type overloadResult struct {
	Sent, Good, Shed, Late, Failed, Wrong int
	Seconds                               float64
	P50, P99                              float64 // µs, of the good ones
	FirstError                            string
}

func (o overloadResult) goodput() float64 { return float64(o.Good) / o.Seconds }

// share is what n of the calls are of all.
func (o overloadResult) share(n int) float64 { return float64(n) / float64(max(o.Sent, 1)) }

// overloadRun makes the runs at the same time, on one server.
func (r *rig) overloadRun(ctx context.Context, s *server, data string, specs ...overloadSpec) ([]overloadResult, error) {
	results := make([]overloadResult, len(specs))
	g, gctx := errgroup.WithContext(ctx)
	for i, spec := range specs {
		g.Go(func() error {
			return call(gctx, &results[i], roleOverload, "-pki", r.pki(), "-addr", s.addr, "-dir", data, "-who", cmp.Or(spec.who, string(custodian.RoleProvider)),
				"-callers", strconv.Itoa(spec.callers), "-rate", strconv.FormatFloat(spec.rate, 'f', 1, 64), "-keys", strconv.Itoa(spec.keys),
				"-own="+strconv.FormatBool(spec.own), "-warm", r.scale.warm.String(), "-time", (r.scale.time / 2).String())
		})
	}
	err := g.Wait()
	for i, res := range results {
		if err == nil && res.Good == 0 {
			note("overload, %+v: of %d calls none was answered", specs[i], res.Sent)
		}
		if res.Failed > 0 {
			note("overload, %+v: %d calls failed, the first: %s", specs[i], res.Failed, res.FirstError)
			r.table.count("failed_calls", float64(res.Failed))
		}
		r.table.count("overload_wrong_keys", float64(res.Wrong))
	}
	return results, err
}

// An overloadKind is a way to have too many calls: open, at multiples of the
// rate that the server can do, whatever becomes of the calls; or closed, with
// multiples of the callers that keep it busy.
type overloadKind struct {
	suffix  string // of the figures
	open    bool
	callers int // that keep the server busy
}

// overload is what is answered where there are more calls than can be: with a
// token that takes 2 ms a call, because a faster one would need more load than
// the same machine can make, and closed with the token as it is, too.
func (r *rig) overload(ctx context.Context) error {
	data := filepath.Join(r.dir, "overload")
	if _, err := r.prepare(ctx, data, overloadKeys); err != nil {
		return err
	}
	for _, server := range []struct {
		suffix string
		args   []string
		kinds  []overloadKind
	}{
		{"", []string{"-token-delay", tokenDelay.String()}, []overloadKind{{"", true, 64}, {"_closed_slow", false, 64}}},
		{"_closed", nil, []overloadKind{{"_closed", false, 128}}},
	} {
		s, err := r.serve(ctx, roleCallback, "overload"+server.suffix, append([]string{"-dir", data}, server.args...)...)
		if err != nil {
			return err
		}
		idle, err := s.anonymous()
		if err != nil {
			return err
		}
		peak := s.watchMemory(ctx)
		for range r.scale.rounds {
			for _, kind := range server.kinds {
				if err := r.overloadSteps(ctx, s, data, kind); err != nil {
					return err
				}
			}
		}
		r.table.add("overload_idle_mb"+server.suffix, idle/1e6)
		r.table.add("overload_peak_mb"+server.suffix, peak()/1e6)
		if err := r.stopAll(); err != nil {
			return err
		}
	}
	return nil
}

// overloadSteps goes from one to ten times of what the server can do. Where it
// is open, a greedy caller and a modest one come last.
func (r *rig) overloadSteps(ctx context.Context, s *server, data string, kind overloadKind) error {
	var first, capacity float64
	if kind.open {
		res, err := r.overloadRun(ctx, s, data, overloadSpec{callers: kind.callers, keys: overloadKeys})
		if err != nil {
			return err
		}
		capacity = res[0].goodput()
		r.table.add("overload_capacity_per_s", capacity)
	}
	for _, n := range r.scale.overload {
		spec := overloadSpec{callers: kind.callers * n, keys: overloadKeys}
		if kind.open {
			spec = overloadSpec{rate: capacity * float64(n), keys: overloadKeys}
		}
		runs, err := r.overloadRun(ctx, s, data, spec)
		if err != nil {
			return err
		}
		res := runs[0]
		suffix := fmt.Sprintf("%s_%dx", kind.suffix, n)
		r.table.add("overload_goodput"+suffix, res.goodput())
		r.table.add("overload_offered"+suffix, float64(res.Sent)/res.Seconds)
		r.table.add("overload_p99_ms"+suffix, res.P99/1000)
		r.table.add("overload_shed_share"+suffix, res.share(res.Shed))
		r.table.add("overload_late_share"+suffix, res.share(res.Late))
		if n == 1 {
			first = res.goodput()
		}
		if n == 10 && first > 0 {
			r.table.add("goodput"+kind.suffix+"_10x_vs_1x", res.goodput()/first)
		}
	}
	if !kind.open {
		return nil
	}
	runs, err := r.overloadRun(ctx, s, data, overloadSpec{rate: 10 * capacity, keys: overloadKeys},
		overloadSpec{rate: modestShare * capacity, keys: overloadKeys, who: modestProvider})
	if err != nil {
		return err
	}
	greedy, modest := runs[0], runs[1]
	r.table.add("greedy_goodput_beside_modest", greedy.share(greedy.Good))
	r.table.add("modest_goodput_under_greedy", modest.share(modest.Good))
	r.table.add("modest_p99_ms_under_greedy", modest.P99/1000)
	return nil
}

// hot is a thousand viewers, with a token that takes 2 ms a call. That calls for
// one key share an operation of the token cannot be switched off: what it spares
// is told by viewers of a title each, who have nobody to share it with.
func (r *rig) hot(ctx context.Context) error {
	data := filepath.Join(r.dir, "hot")
	if _, err := r.prepare(ctx, data, viewers); err != nil {
		return err
	}
	for range r.scale.rounds {
		for _, setting := range []struct {
			name   string
			titles int
			life   time.Duration
		}{{"not_shared", viewers, 0}, {"not_kept", titles, 0}, {"kept_1s", titles, time.Second}, {"kept_60s", titles, time.Minute}} {
			s, err := r.serve(ctx, roleCallback, "hot", "-dir", data, "-token-delay", tokenDelay.String(), "-hot-titles", setting.life.String())
			if err != nil {
				return err
			}
			runs, err := r.overloadRun(ctx, s, data, overloadSpec{callers: viewers, keys: setting.titles, own: true})
			if err != nil {
				return err
			}
			res := runs[0]
			r.table.add("hot_viewers_per_s_"+setting.name, res.goodput())
			r.table.add("hot_p99_ms_"+setting.name, res.P99/1000)
			r.table.add("hot_shed_share_"+setting.name, res.share(res.Shed))
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
	who := fs.String("who", "", "whose certificate")
	own := fs.Bool("own", false, "each caller that waits asks for one key only")
	callers := fs.Int("callers", 0, "callers that wait for their answers")
	rate := fs.Float64("rate", 0, "calls a second, where nobody waits")
	keys := fs.Int("keys", 1, "how many KIDs to ask for")
	warm := fs.Duration("warm", 0, "how long to run before it counts")
	length := fs.Duration("time", time.Second, "how long to measure")
	if err := fs.Parse(args); err != nil {
		return err
	}
	conns, err := dial(*pki, *who, *addr, 8)
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
		for i := range *callers {
			key := o.any
			if *own {
				key = func() int { return i % len(o.kids) }
			}
			wg.Go(func() { o.closed(ctx, key) })
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
				o.one(context.WithoutCancel(ctx), o.any())
			})
		}
	}
}

// closed makes a call when the one before has its answer.
func (o *overloader) closed(ctx context.Context, key func() int) {
	for ctx.Err() == nil {
		if o.one(context.WithoutCancel(ctx), key()) == codes.ResourceExhausted {
			pause(ctx, sulk)
		}
	}
}

// any draws a key.
func (o *overloader) any() int { return mrand.IntN(len(o.kids)) }

// one makes a call for a key, compares what it gets, and counts.
func (o *overloader) one(ctx context.Context, i int) codes.Code {
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
