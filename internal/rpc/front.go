package rpc

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/keycustody/custodian/custodian"
)

// A Visit is one call at a front door that does not speak gRPC. It is the same
// call as gRPC's: the caller is who the certificate says, the domain decides and
// writes down, an error has the row of the one table, and metrics and log count
// it alike.
type Visit struct {
	server *Server
	call   call
}

// Visit begins a call on a connection of Listen. method names it in the metrics.
// The request ID is drawn where it is empty. The Visit is there even with an
// error; either way the caller calls End.
func (s *Server) Visit(state tls.ConnectionState, method, requestID string) (*Visit, error) {
	v := &Visit{server: s, call: call{method: method, start: s.config.Now()}}
	s.metrics.inFlight.Inc()
	var err error
	if v.call.caller, err = s.callerOf(state); err != nil {
		return v, err
	}
	return v, v.call.name(requestID)
}

// Caller is who calls.
func (v *Visit) Caller() custodian.Caller { return v.call.caller }

// RequestID is the call's name in the audit log.
func (v *Visit) RequestID() string { return v.call.requestID }

// Issue is Issue of the domain for the visitor, or why there is no domain now.
// The caller of this function destroys the keys.
func (v *Visit) Issue(ctx context.Context, req custodian.IssueRequest) ([]custodian.IssuedKey, error) {
	custody, err := v.server.custody()
	if err != nil {
		return nil, err
	}
	req.RequestID = v.call.requestID
	keys, err := custody.Issue(ctx, v.call.caller, req)
	if err == nil {
		v.server.metrics.countIssued(keys)
	}
	return keys, err
}

// Available says why there is no domain now, or nil.
func (v *Visit) Available() error {
	_, err := v.server.custody()
	return err
}

// Refused writes down that the front door refuses a request for keys before the
// domain is asked, and returns why; or what keeps that from being written down.
func (v *Visit) Refused(ctx context.Context, category custodian.CategoryName, why error) error {
	custody, err := v.server.custody()
	if err != nil {
		return err
	}
	return custody.Refuse(ctx, v.call.caller, custodian.Refusal{RequestID: v.call.requestID, Action: custodian.ActionIssue, Category: category, Door: v.call.method}, why)
}

// End counts the call, and says what the visitor is to hear of err.
func (v *Visit) End(ctx context.Context, err error) Refusal {
	v.server.metrics.inFlight.Dec()
	took := v.server.config.Now().Sub(v.call.start)
	if err == nil {
		v.server.metrics.observe(v.call.method, "OK", took)
		return Refusal{}
	}
	return v.server.refuse(ctx, &v.call, err, took).refusal(err)
}

// Listen serves TLS on l for front doors that do not speak gRPC. It accepts the
// clients that gRPC accepts, from TLS 1.2 on, for HTTP/1.1. What is written to
// its connections is wiped from the writer's buffer.
func (s *Server) Listen(l net.Listener) net.Listener {
	config := s.config.Certs.PackagerTLSConfig()
	config.NextProtos = []string{"http/1.1"}
	return &frontListener{l, listenerPackagers, config, s}
}

type frontListener struct {
	net.Listener
	name   string
	config *tls.Config
	server *Server
}

func (l *frontListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &FrontConn{Conn: tls.Server(conn, l.config), listener: l, end: time.Now().Add(l.server.config.MaxConnectionAge)}, nil
}

// A FrontConn is a connection that Listen accepted.
type FrontConn struct {
	*tls.Conn
	listener *frontListener
	greeted  sync.Once
	end      time.Time
}

// Answer prepares the headers of an answer: a connection that has been open for
// as long as one may be is closed after it, as a connection of gRPC is.
func (c *FrontConn) Answer(h http.Header) {
	if time.Now().After(c.end) {
		h.Set("Connection", "close")
	}
}

// Read shakes hands first.
func (c *FrontConn) Read(p []byte) (int, error) {
	c.greeted.Do(func() {
		if err := c.Conn.Handshake(); err != nil {
			c.listener.server.refusedHandshake(c.listener.name, c, err)
		}
	})
	return c.Conn.Read(p)
}

// Write wipes p once it is written, as wipingConn does: the buffers of net/http
// are written whole and not read again.
func (c *FrontConn) Write(p []byte) (int, error) {
	defer clear(p)
	c.listener.server.primers.prime(len(p))
	return c.Conn.Write(p)
}
