package packager

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/rpc"
)

// Sizes and limits of the listener.
const (
	// maxBody in bytes, of one request. The largest that is meant is a SPEKE
	// document for 600 keys.
	maxBody = MaxDocumentSize
	// maxHeader in bytes, of all headers of one request.
	maxHeader = 16 << 10
	// smallBody bytes of its request each call under way has room for, which is
	// more than any that is not a CPIX document of many keys.
	smallBody = 16 << 10
	// maxLarge calls at once may have a larger body. It takes six times its
	// size to read one, so without a bound of their own a few hundred strangers
	// with a certificate could have the memory of the whole machine.
	maxLarge  = 8
	largeWait = 5 * time.Second // for such a place; no longer than Hold
	// minReply in bytes: net/http would copy a shorter body into a buffer that
	// nobody wipes, so that is filled up with blanks, which JSON and XML allow.
	minReply = 2<<10 + 1

	headerTimeout = 10 * time.Second // of the handshake and the headers
	bodyTimeout   = 30 * time.Second
	writeTimeout  = 30 * time.Second
	idleTimeout   = 2 * time.Minute
)

// Config is what a Server stands on.
type Config struct {
	// RPC names callers, leads to the domain and explains errors.
	RPC *rpc.Server
	// Signers are those of the Widevine API.
	Signers []Signer
	// SPEKE says to whom SPEKE replies may be encrypted, and where they must be.
	SPEKE SPEKEConfig
	// Hold is how long a call waits for trouble of the daemon's that may pass:
	// 55 s if zero. Shaka Packager takes an error for the end of its run, and
	// gives a request up after 60 s.
	Hold time.Duration
	// Log receives what callers do wrong that somebody should look at. Nothing
	// is logged if nil.
	Log *slog.Logger
}

const defaultHold = 55 * time.Second

// A Server is the one HTTPS listener of all front doors for packagers, with
// mutual TLS.
type Server struct {
	config  Config
	http    *http.Server
	places  *rpc.Places
	large   chan struct{} // one for each of them with a large body
	calls   sync.WaitGroup
	signers atomic.Pointer[signers]
	spekes  atomic.Pointer[SPEKE]
}

// NewServer checks the configuration.
func NewServer(c Config) (*Server, error) {
	if c.RPC == nil {
		return nil, errors.New("packager server: no domain")
	}
	if c.Hold == 0 {
		c.Hold = defaultHold
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{config: c, places: rpc.NewPlaces(rpc.MaxCalls), large: make(chan struct{}, maxLarge)}
	if err := s.SetSigners(c.Signers); err != nil {
		return nil, fmt.Errorf("packager server: %w", err)
	}
	s.SetSPEKE(c.SPEKE)
	mux := http.NewServeMux()
	for _, d := range []door{
		{name: "widevine", answer: s.widevine, refuse: refuseWidevine},
		{name: "playready", answer: s.playReady, refuse: refusePlayReady},
		{name: "speke", answer: s.speke, refuse: refuseSPEKE},
	} {
		mux.Handle("POST /v1/categories/{category}/"+d.name, s.handler(d))
	}
	mux.Handle("GET /v1/categories/{category}/speke/heartbeat", s.handler(door{name: "speke.heartbeat", answer: s.heartbeat, refuse: refuseSPEKE}))
	s.http = &http.Server{Handler: mux, MaxHeaderBytes: maxHeader, ReadHeaderTimeout: headerTimeout, IdleTimeout: idleTimeout,
		ErrorLog: slog.NewLogLogger(c.Log.Handler(), slog.LevelWarn),
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, connKey{}, c)
		}}
	return s, nil
}

type connKey struct{}

// Serve serves on l until ctx ends. Then it takes no new calls, waits up to
// drain for those under way, and cancels the others. It closes l. When it
// returns no call is left, so that the domain can be closed.
func (s *Server) Serve(ctx context.Context, l net.Listener, drain time.Duration) error {
	defer s.calls.Wait()
	served := make(chan error, 1)
	go func() { served <- s.http.Serve(s.config.RPC.Listen(l)) }()
	select {
	case err := <-served:
		return fmt.Errorf("packager listener: %w", err)
	case <-ctx.Done():
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), drain)
	defer cancel()
	if err := s.http.Shutdown(ctx); err != nil {
		s.http.Close() // which cancels the contexts of the calls
	}
	<-served
	return nil
}

// A door is one protocol.
type door struct {
	name string
	// answer is the whole answer to one request. Whatever it returns is sent.
	answer func(context.Context, *call) (reply, error)
	// refuse puts an error of answer into the protocol's own form.
	refuse func(rpc.Refusal, error) reply
}

// A call is one request at a door.
type call struct {
	*rpc.Visit
	category custodian.CategoryName
	header   http.Header // of the request
	body     []byte
	asked    bool // the domain, which writes down what it answers
	// Which places it has, until its answer is sent.
	place func()
	large bool
	// began and hold bound the wait for trouble that may pass.
	began time.Time
	hold  time.Duration
}

// A reply is a whole answer: a packager that gets half of one writes what it has
// got to its log, keys and all.
type reply struct {
	status      int // of HTTP, of a refusal; zero: 200, with keys
	contentType string
	header      map[string]string
	// body is wiped when it is sent. It is its own: nothing else holds it.
	body []byte
}

// errNoAnswer ends a call without an answer: the connection is held until the
// caller gives up, and closed. To some packagers that is the only refusal after
// which they try again.
var errNoAnswer = errors.New("the caller is left to its own timeout")

func (s *Server) handler(d door) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.calls.Add(1)
		defer s.calls.Done()
		ctx := r.Context()
		conn, _ := ctx.Value(connKey{}).(*rpc.FrontConn)
		if conn == nil { // only Serve makes connections
			http.Error(w, "no TLS", http.StatusInternalServerError)
			return
		}
		conn.Answer(w.Header())
		visit, err := s.config.RPC.Visit(conn.ConnectionState(), d.name, r.Header.Get("X-Request-Id"))
		c := &call{Visit: visit, category: custodian.CategoryName(r.PathValue("category")), header: r.Header, began: time.Now(), hold: s.config.Hold}
		defer s.leave(c)
		var answer reply
		if err == nil {
			answer, err = s.answer(ctx, d, c, w, r)
			if err != nil && !c.asked && !mayPass(err) { // else the domain has written it down, or counted that there was no place
				err = c.Refused(ctx, c.category, err)
			}
		}
		refusal := c.End(ctx, err)
		switch {
		case errors.Is(err, errNoAnswer):
			s.leave(c)
			<-ctx.Done()
			panic(http.ErrAbortHandler) // net/http's way to close a connection
		case err != nil:
			if errors.Is(err, errOverload) {
				w.Header().Set("Connection", "close") // or the rest of the body would be read
			}
			answer = d.refuse(refusal, err)
			if refusal.RetryAfter > 0 {
				w.Header().Set("Retry-After", strconv.Itoa(int(math.Ceil(refusal.RetryAfter.Seconds()))))
			}
		}
		w.Header().Set("X-Request-Id", c.RequestID())
		answer.send(w)
	})
}

// answer reads the request and has it answered, if there is a place.
func (s *Server) answer(ctx context.Context, d door, c *call, w http.ResponseWriter, r *http.Request) (reply, error) {
	var err error
	if c.place, err = c.Take(s.places, custodian.ActionIssue); err != nil {
		return reply{}, fmt.Errorf("%w: %w", errOverload, err)
	}
	if err := http.NewResponseController(w).SetReadDeadline(time.Now().Add(bodyTimeout)); err != nil {
		return reply{}, err
	}
	body, err := s.read(ctx, c, http.MaxBytesReader(w, r.Body, maxBody))
	if errors.Is(err, errOverload) {
		return reply{}, err
	}
	if tooLarge, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return reply{}, &custodian.InvalidError{Field: "body", Err: fmt.Errorf("it has more than %d bytes", tooLarge.Limit)}
	} else if err != nil {
		return reply{}, &custodian.InvalidError{Field: "body", Err: fmt.Errorf("it cannot be read to its end: %w", err)}
	}
	// The call may be held for longer; that the caller leaves is seen anyhow.
	if err := http.NewResponseController(w).SetReadDeadline(time.Time{}); err != nil {
		return reply{}, err
	}
	c.body = body
	if err := c.category.Check(); err != nil {
		return reply{}, &custodian.InvalidError{Field: "category", Err: err}
	}
	return d.answer(ctx, c)
}

// errOverload: there is no place for the call now.
var errOverload = fmt.Errorf("the front door is full: %w", custodian.ErrRate)

// read reads the body. One that turns out to be large needs a place for that.
func (s *Server) read(ctx context.Context, c *call, r io.Reader) ([]byte, error) {
	var body bytes.Buffer
	if n, err := body.ReadFrom(io.LimitReader(r, smallBody+1)); err != nil || n <= smallBody {
		return body.Bytes(), err
	}
	wait, cancel := context.WithTimeout(ctx, min(largeWait, c.hold))
	defer cancel()
	select {
	case s.large <- struct{}{}:
		c.large = true
	case <-wait.Done():
		return nil, fmt.Errorf("%d requests of more than %d bytes are under way: %w", maxLarge, smallBody, errOverload)
	}
	_, err := body.ReadFrom(r)
	return body.Bytes(), err
}

// leave gives the call's places back.
func (s *Server) leave(c *call) {
	if c.large {
		<-s.large
	}
	if c.place != nil {
		c.place()
	}
	c.place, c.large = nil, false
}

// issue is Issue of the domain. Trouble that may pass is waited out, as long as
// the caller may be expected to wait.
func (c *call) issue(ctx context.Context, req custodian.IssueRequest) ([]custodian.IssuedKey, error) {
	req.Category = c.category
	if err := req.Check(); err != nil {
		return nil, err
	}
	c.asked = true
	ctx, cancel := context.WithDeadline(ctx, c.began.Add(c.hold))
	defer cancel()
	var last error // the trouble
	for wait := 100 * time.Millisecond; ; wait = min(2*wait, 2*time.Second) {
		keys, err := c.Issue(ctx, req)
		if err == nil || !mayPass(err) {
			if errors.Is(err, custodian.ErrDeadline) && last != nil {
				err = last // it says more than that time ran out
			}
			return keys, err
		}
		last = err
		pause := time.NewTimer(wait)
		select {
		case <-pause.C:
		case <-ctx.Done():
			pause.Stop()
			return nil, last
		}
	}
}

// mayPass says whether an error may be gone a little later without anybody's
// doing.
func mayPass(err error) bool {
	for _, passing := range []error{custodian.ErrKMSUnavailable, custodian.ErrHSMUnavailable, custodian.ErrStoreUnavailable,
		custodian.ErrAuditBlocked, custodian.ErrRate, custodian.ErrStarting} {
		if errors.Is(err, passing) {
			return true
		}
	}
	return false
}

// send writes the whole answer at once and wipes it.
func (r reply) send(w http.ResponseWriter) {
	body := r.body
	defer func() { clear(body[:cap(body)]) }()
	if len(body) < minReply && r.status == 0 { // a refusal has no keys
		body = make([]byte, minReply)
		copy(body, r.body)
		for i := len(r.body); i < len(body); i++ {
			body[i] = '\n'
		}
		clear(r.body[:cap(r.body)])
	}
	h := w.Header()
	for name, value := range r.header {
		h.Set(name, value)
	}
	h.Set("Content-Type", r.contentType)
	h.Set("Content-Length", strconv.Itoa(len(body)))
	h.Set("Cache-Control", "no-store")
	// A caller that does not read keeps no call open.
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(writeTimeout))
	w.WriteHeader(max(r.status, http.StatusOK))
	w.Write(body)
}
