package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	mrand "math/rand/v2"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/certs"
	"github.com/keycustody/custodian/custodian"
)

// A loadSpec is what one run of the load process does.
type loadSpec struct {
	method   string // methodRetrieve and so on
	inFlight int
	batch    int    // keys of a call
	kids     string // file of KIDs to draw from
}

const (
	methodRetrieve = "retrieve"
	methodIssue    = "issue"
)

// A loadResult is what one run found. Times are those of calls that succeeded.
type loadResult struct {
	Calls, Failed int
	FirstError    string
	Keys          int
	Seconds       float64
	P50, P99      float64 // µs
	ClientCPU     float64 // µs, of the load process
	ServerCPU     float64 // µs
	ResponseBytes int
}

func (l loadResult) callsPerSecond() float64 { return float64(l.Calls) / l.Seconds }
func (l loadResult) keysPerSecond() float64  { return float64(l.Keys) / l.Seconds }

// load is the load process: as many callers as are to be in flight, each with
// one call after the other, spread over a few connections.
func load(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet(roleLoad, flag.ContinueOnError)
	pki := fs.String("pki", "", "folder of the certificates")
	addr := fs.String("addr", "", "address of the server")
	pid := fs.Int("pid", 0, "process of the server")
	method := fs.String("method", methodRetrieve, "what is called: retrieve, issue, or a front door of packagers")
	kidsFile := fs.String("kids", "", "file of KIDs")
	inFlight := fs.Int("inflight", 1, "calls in flight")
	batch := fs.Int("batch", 1, "keys of a call")
	connections := fs.Int("connections", 1, "connections")
	warm := fs.Duration("warm", 0, "how long to run before it counts")
	length := fs.Duration("time", time.Second, "how long to measure")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(400) // both share the CPUs: what the load does not use, the server has
	}
	role := custodian.RoleProvider
	if *method == methodIssue {
		role = custodian.RolePackager
	}
	conns, err := dial(*pki, string(role), *addr, *connections)
	if err != nil {
		return err
	}
	defer func() {
		for _, c := range conns {
			c.Close()
		}
	}()
	var kids []custodian.KID
	if *method == methodRetrieve {
		if kids, err = readKIDs(*kidsFile); err != nil {
			return err
		}
	}
	door, err := newKnocker(*pki, *addr)
	if err != nil {
		return err
	}
	callers := make([]*caller, *inFlight)
	for i := range callers {
		callers[i] = &caller{conn: conns[i%len(conns)], door: door, method: *method, batch: *batch, kids: kids}
	}
	res, err := run(ctx, callers, *pid, *warm, *length)
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(res)
}

// dial makes n connections with the certificate of who and waits for none of
// them: the first calls do, which do not count.
func dial(pki, who, addr string, n int) ([]*grpc.ClientConn, error) {
	tls, err := certs.NewClient(certs.ClientOptions{CertFile: filepath.Join(pki, who+".pem"),
		KeyFile: filepath.Join(pki, who+".key"), CAFile: filepath.Join(pki, "ca.pem")})
	if err != nil {
		return nil, err
	}
	conns := make([]*grpc.ClientConn, n)
	for i := range conns {
		conns[i], err = grpc.NewClient(addr, grpc.WithTransportCredentials(credentials.NewTLS(tls.TLSConfig())),
			grpc.WithDisableServiceConfig(), grpc.WithDisableRetry())
		if err != nil {
			return nil, err
		}
	}
	return conns, nil
}

// Phases of a run.
const (
	warming = iota
	measuring
	ended
)

// run lets the callers call, and measures from the end of warm on.
func run(ctx context.Context, callers []*caller, pid int, warm, length time.Duration) (loadResult, error) {
	var phase atomic.Int32
	var wg sync.WaitGroup
	for _, c := range callers {
		wg.Go(func() { c.run(ctx, &phase) })
	}
	pause(ctx, warm)
	before, err := cpuTimes(pid)
	start := time.Now()
	phase.Store(measuring)
	pause(ctx, length)
	phase.Store(ended)
	took := time.Since(start)
	after, err2 := cpuTimes(pid)
	wg.Wait()
	if err := errors.Join(err, err2, ctx.Err()); err != nil {
		return loadResult{}, err
	}
	res := loadResult{Seconds: took.Seconds(), ClientCPU: micros(after.own - before.own), ServerCPU: micros(after.other - before.other)}
	var times []float64
	for _, c := range callers {
		times = append(times, c.times...)
		res.Keys += c.keys
		res.Failed += c.failed
		res.ResponseBytes = max(res.ResponseBytes, c.size)
		if res.FirstError == "" && c.err != nil {
			res.FirstError = status.Convert(c.err).Message()
		}
	}
	slices.Sort(times)
	res.Calls = len(times)
	if res.Calls > 0 {
		res.P50, res.P99 = quantile(times, 0.5), quantile(times, 0.99)
	}
	return res, nil
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// A caller makes one call after the other and takes down how each went.
type caller struct {
	conn   *grpc.ClientConn
	door   *knocker
	method string
	batch  int
	kids   []custodian.KID

	times  []float64 // µs
	keys   int
	failed int
	err    error
	size   int // of the last response in bytes
}

func (c *caller) run(ctx context.Context, phase *atomic.Int32) {
	call := map[string]func(context.Context) (int, error){methodRetrieve: c.retrieve, methodIssue: c.issue, methodWidevine: c.widevine,
		methodSPEKE: c.speke, methodSPEKE1: c.speke1, methodPlayReady: c.playReady}[c.method]
	for phase.Load() != ended && ctx.Err() == nil {
		start := time.Now()
		n, err := call(ctx)
		took := time.Since(start)
		// What ends after the end does not count, however long it was on its
		// way before.
		if phase.Load() != measuring {
			continue
		}
		if err != nil {
			c.failed++
			c.err = err
			continue
		}
		c.times = append(c.times, micros(took))
		c.keys += n
	}
}

// retrieve asks for the keys of KIDs drawn at random.
func (c *caller) retrieve(ctx context.Context) (int, error) {
	req := &v1.GetContentKeysRequest{Kids: make([][]byte, c.batch)}
	for i := 0; i < len(req.Kids); {
		kid := c.kids[mrand.IntN(len(c.kids))]
		if slices.ContainsFunc(req.Kids[:i], func(b []byte) bool { return string(b) == string(kid[:]) }) {
			continue
		}
		req.Kids[i] = kid[:]
		i++
	}
	resp, err := v1.NewKeyRetrievalServiceClient(c.conn).GetContentKeys(ctx, req)
	if err != nil {
		return 0, err
	}
	if len(resp.GetResults()) != c.batch {
		return 0, fmt.Errorf("%d results for %d KIDs", len(resp.GetResults()), c.batch)
	}
	for _, r := range resp.GetResults() {
		if len(r.GetKey().GetKey()) != custodian.CEKSize {
			return 0, fmt.Errorf("no key: %s", r.GetError().GetReason())
		}
	}
	if c.size == 0 {
		c.size = proto.Size(resp)
	}
	return c.batch, nil
}

// issue asks for the keys of a content item that is not there yet.
func (c *caller) issue(ctx context.Context) (int, error) {
	req := &v1.IssueContentKeysRequest{Category: string(category), ContentId: []byte(rand.Text()), Keys: make([]*v1.ContentKeySpec, c.batch)}
	for i := range req.Keys {
		req.Keys[i] = &v1.ContentKeySpec{TrackType: "HD", Scheme: string(custodian.SchemeCENC), Period: &v1.Period{Index: uint32(i)}}
	}
	resp, err := v1.NewKeyIssuanceServiceClient(c.conn).IssueContentKeys(ctx, req)
	if err != nil {
		return 0, err
	}
	for _, k := range resp.GetKeys() {
		if !k.GetCreated() || len(k.GetKey().GetKey()) != custodian.CEKSize {
			return 0, errors.New("a key is missing, or not new")
		}
	}
	return len(resp.GetKeys()), nil
}

func readKIDs(path string) ([]custodian.KID, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	if len(b) == 0 || len(b)%custodian.KIDSize != 0 {
		return nil, fmt.Errorf("%s: %d bytes are no list of KIDs", path, len(b))
	}
	kids := make([]custodian.KID, 0, len(b)/custodian.KIDSize)
	for kid := range slices.Chunk(b, custodian.KIDSize) {
		kids = append(kids, custodian.KID(kid))
	}
	return kids, nil
}

// times are the CPU times of this process and of another one.
type times struct{ own, other time.Duration }

func cpuTimes(pid int) (times, error) {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		return times{}, err
	}
	other, err := processTime(pid)
	return times{own: time.Duration(u.Utime.Nano() + u.Stime.Nano()), other: other}, err
}

// processTime is the CPU time of a process, in user mode and in the kernel
// (proc(5): fields 14 and 15 of stat, in hundredths of a second).
func processTime(pid int) (time.Duration, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// The second field is a name in parentheses, which may contain anything.
	fields := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	if len(fields) < 13 {
		return 0, fmt.Errorf("/proc/%d/stat: %d fields", pid, len(fields))
	}
	var sum time.Duration
	for _, f := range fields[11:13] {
		ticks, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("/proc/%d/stat: %w", pid, err)
		}
		sum += time.Duration(ticks) * 10 * time.Millisecond
	}
	return sum, nil
}
