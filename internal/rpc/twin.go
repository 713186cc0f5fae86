package rpc

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/custodian"
)

// TwinPath is where GetContentKeys is called over HTTPS.
const TwinPath = "/v1/content-keys/retrieve"

// Sizes and limits of the HTTP twin.
const (
	twinMaxBody       = 64 << 10 // bytes; a request of 64 KIDs with the largest token takes 12 KiB
	twinHeaderTimeout = 5 * time.Second
	twinBodyTimeout   = 5 * time.Second
	twinWriteTimeout  = 10 * time.Second
	twinIdleTimeout   = 2 * time.Minute
	// twinMinReply in bytes: net/http would copy a shorter body into a buffer
	// that nobody wipes, so that is filled up with blanks, which JSON allows.
	twinMinReply = 2<<10 + 1
)

// A twin is GetContentKeys as JSON over HTTPS, for providers without gRPC. It
// decodes a request into the message of gRPC, hands it to the same function, and
// encodes that function's answer: nothing is decided here.
type twin struct {
	server *Server
	method retrieval
	places *Places
	calls  sync.WaitGroup
}

// ServeTwin serves the HTTP twin over mutual TLS 1.3 on l until ctx ends. Then
// it takes no new calls, waits up to drain for those under way, and cancels the
// others. It closes l. When it returns no call is left.
func (s *Server) ServeTwin(ctx context.Context, l net.Listener, drain time.Duration) error {
	t := &twin{server: s, method: retrieval{server: s}, places: NewPlaces(MaxCalls)}
	defer t.calls.Wait()
	mux := http.NewServeMux()
	mux.Handle("POST "+TwinPath, t)
	h := &http.Server{Handler: mux, MaxHeaderBytes: maxHeaderSize, ReadHeaderTimeout: twinHeaderTimeout, IdleTimeout: twinIdleTimeout,
		ErrorLog: slog.NewLogLogger(s.config.Log.Handler(), slog.LevelDebug),
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, twinConn{}, c)
		}}
	config := s.config.Certs.TLSConfig()
	config.NextProtos = []string{"http/1.1"}
	served := make(chan error, 1)
	go func() { served <- h.Serve(&frontListener{l, listenerTwin, config, s}) }()
	select {
	case err := <-served:
		return fmt.Errorf("http listener: %w", err)
	case <-ctx.Done():
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), drain)
	defer cancel()
	if err := h.Shutdown(ctx); err != nil {
		h.Close() // which cancels the contexts of the calls
	}
	<-served
	return nil
}

type twinConn struct{}

func (t *twin) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	t.calls.Add(1)
	defer t.calls.Done()
	var state tls.ConnectionState
	if conn, ok := r.Context().Value(twinConn{}).(*FrontConn); ok { // only ServeTwin makes connections
		state = conn.ConnectionState()
		conn.Answer(w.Header())
	}
	visit, err := t.server.Visit(state, "KeyRetrievalService/GetContentKeys", "")
	ctx, cancel := t.server.bound(r.Context(), v1.KeyRetrievalService_GetContentKeys_FullMethodName)
	defer cancel()
	ctx = context.WithValue(ctx, callKey{}, &visit.call)
	var resp *v1.GetContentKeysResponse
	if err == nil {
		resp, err = t.call(ctx, visit, w, r)
	}
	err = t.server.noteMalformed(ctx, &visit.call, err)
	refusal := visit.End(ctx, err)
	body, status := []byte(nil), http.StatusOK
	if err == nil {
		body = t.encode(resp)
		if seconds := visit.call.grace; seconds != "" {
			w.Header().Set("Custodian-Kms-Grace", seconds)
		}
	} else {
		body, status = refusal.json(err, visit.RequestID()), refusal.HTTPStatus
		if refusal.RetryAfter > 0 {
			w.Header().Set("Retry-After", strconv.Itoa(int(math.Ceil(refusal.RetryAfter.Seconds()))))
		}
	}
	send(w, status, body)
}

// call reads the request and makes the call, if there is a place.
func (t *twin) call(ctx context.Context, v *Visit, w http.ResponseWriter, r *http.Request) (*v1.GetContentKeysResponse, error) {
	leave, err := v.Take(t.places, custodian.ActionRelease)
	if err != nil {
		return nil, err
	}
	defer leave()
	if err := http.NewResponseController(w).SetReadDeadline(time.Now().Add(twinBodyTimeout)); err != nil {
		return nil, err
	}
	raw, err := io.ReadAll(http.MaxBytesReader(w, r.Body, twinMaxBody))
	if err != nil {
		return nil, &custodian.InvalidError{Field: "body", Err: fmt.Errorf("must be read to its end, with at most %d bytes", twinMaxBody)}
	}
	// That the caller leaves is seen from now on.
	if err := http.NewResponseController(w).SetReadDeadline(time.Time{}); err != nil {
		return nil, err
	}
	req, err := decodeTwin(raw)
	if req.GetRequestId() != "" {
		if err := v.call.name(req.GetRequestId()); err != nil {
			return nil, err
		}
	}
	if err != nil {
		return nil, err
	}
	return t.method.GetContentKeys(ctx, req)
}

// A twinRequest is the JSON of a GetContentKeysRequest. Unknown fields are
// refused.
type twinRequest struct {
	RequestID      string      `json:"request_id"`
	KIDs           []string    `json:"kids"`
	ContentID      string      `json:"content_id"`
	ContentIDB64   []byte      `json:"content_id_b64"`
	LicenceToken   string      `json:"licence_token"`
	ViewerContext  twinContext `json:"viewer_context"`
	RecipientKeyID string      `json:"recipient_key_id"`
}

type twinContext struct {
	SessionID string `json:"session_id"`
	UserID    string `json:"user_id"`
	custodian.Viewer
}

// decodeTwin reads a request. One that is malformed still has its request ID,
// where that could be read.
func decodeTwin(raw []byte) (*v1.GetContentKeysRequest, error) {
	bad := func(field string, err error) error { return &custodian.InvalidError{Field: field, Err: err} }
	var in twinRequest
	d := json.NewDecoder(bytes.NewReader(raw))
	d.DisallowUnknownFields()
	if err := d.Decode(&in); err != nil {
		return nil, bad("body", fmt.Errorf("it is not the JSON of this call: %w", err))
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, bad("body", errors.New("something follows the JSON of this call"))
	}
	req := &v1.GetContentKeysRequest{RequestId: in.RequestID, ContentId: in.ContentIDB64, LicenceToken: in.LicenceToken, RecipientKeyId: in.RecipientKeyID,
		ViewerContext: &v1.ViewerContext{SessionId: in.ViewerContext.SessionID, UserId: in.ViewerContext.UserID, DrmSystem: in.ViewerContext.DRMSystem, SecurityLevel: in.ViewerContext.SecurityLevel,
			Hdcp: in.ViewerContext.HDCP, Region: in.ViewerContext.Region, LicenceType: in.ViewerContext.LicenceType}}
	if in.ContentID != "" {
		if len(in.ContentIDB64) > 0 {
			return req, bad("content_id_b64", errors.New("content_id is there too"))
		}
		req.ContentId = []byte(in.ContentID)
	}
	for i, text := range in.KIDs {
		kid, err := custodian.ParseKID(text)
		if err != nil {
			return req, bad(fmt.Sprintf("kids[%d]", i), err)
		}
		req.Kids = append(req.Kids, kid[:])
	}
	return req, nil
}

// encode writes the answer and gives its keys back to the arena. The buffer is
// large enough from the start: one that grew would leave keys behind.
func (t *twin) encode(resp *v1.GetContentKeysResponse) []byte {
	size := 1200
	for _, r := range resp.GetResults() {
		k := r.GetKey()
		size += 1024 + 2*(len(k.GetContentId())+len(k.GetSealedKey().GetSealed())) + 6*(len(k.GetCategory())+len(k.GetTrackType())+len(k.GetSealedKey().GetCaller())+len(k.GetReceipt().GetCheckpoint())+len(r.GetError().GetMessage()))
	}
	e := twinEncoder{make([]byte, 0, max(size, twinMinReply))}
	e.raw(`{"request_id":`).text(resp.GetRequestId()).raw(`,"results":[`)
	for i, r := range resp.GetResults() {
		if i > 0 {
			e.raw(",")
		}
		e.raw(`{"kid":`).kid(r.GetKid())
		if k := r.GetKey(); k != nil {
			e.raw(`,"key":`).key(k)
		} else {
			f := r.GetError()
			e.raw(`,"error":{"reason":`).text(f.GetReason()).raw(`,"message":`).text(f.GetMessage())
			if d := f.GetRetryDelay(); d != nil {
				e.raw(`,"retry_after_ms":`).number(d.AsDuration().Milliseconds())
			}
			e.raw("}")
		}
		e.raw("}")
	}
	e.raw("]}")
	t.server.codec.spend(func(yield func(*v1.ContentKey) bool) {
		for _, r := range resp.GetResults() {
			if !yield(r.GetKey()) {
				return
			}
		}
	})
	return e.b
}

// A twinEncoder appends JSON.
type twinEncoder struct{ b []byte }

func (e *twinEncoder) raw(s string) *twinEncoder { e.b = append(e.b, s...); return e }

func (e *twinEncoder) number(n int64) *twinEncoder {
	e.b = strconv.AppendInt(e.b, n, 10)
	return e
}

// text writes a string that is no secret.
func (e *twinEncoder) text(s string) *twinEncoder {
	quoted, _ := json.Marshal(s) // a string always has a form
	e.b = append(e.b, quoted...)
	return e
}

func (e *twinEncoder) bytes(b []byte) *twinEncoder {
	e.raw(`"`)
	e.b = base64.StdEncoding.AppendEncode(e.b, b)
	return e.raw(`"`)
}

func (e *twinEncoder) kid(b []byte) *twinEncoder {
	kid, _ := custodian.KIDFromBytes(b) // the domain's own
	return e.raw(`"`).raw(kid.String()).raw(`"`)
}

func (e *twinEncoder) key(k *v1.ContentKey) {
	e.raw(`{"kid":`).kid(k.GetKid())
	if s := k.GetSealedKey(); s != nil {
		e.raw(`,"sealed_key":{"recipient_key_id":`).text(s.GetRecipientKeyId()).raw(`,"caller":`).text(s.GetCaller()).raw(`,"sealed":`).bytes(s.GetSealed()).raw("}")
	} else {
		e.raw(`,"key":`).bytes(k.GetKey())
	}
	e.raw(`,"category":`).text(k.GetCategory()).raw(`,"content_id_b64":`).bytes(k.GetContentId()).
		raw(`,"track_type":`).text(k.GetTrackType()).raw(`,"scheme":`).text(k.GetScheme()).
		raw(`,"generation":`).number(int64(k.GetGeneration()))
	if p := k.GetPeriod(); p != nil {
		e.raw(`,"period":{"index":`).number(int64(p.GetIndex()))
		if t := p.GetStartTime(); t != nil {
			e.raw(`,"start_time":`).text(t.AsTime().Format(time.RFC3339Nano))
		}
		if t := p.GetEndTime(); t != nil {
			e.raw(`,"end_time":`).text(t.AsTime().Format(time.RFC3339Nano))
		}
		e.raw("}")
	}
	if len(k.GetIv()) > 0 {
		e.raw(`,"iv":`).bytes(k.GetIv())
	}
	e.raw(`,"create_time":`).text(k.GetCreateTime().AsTime().Format(time.RFC3339Nano))
	if r := k.GetReceipt(); r != nil {
		e.raw(`,"receipt":{"index":`).number(int64(r.GetIndex())).raw(`,"leaf_hash":`).bytes(r.GetLeafHash())
		if len(r.GetCheckpoint()) > 0 {
			e.raw(`,"checkpoint":`).bytes(r.GetCheckpoint())
		}
		e.raw("}")
	}
	e.raw("}")
}

// json is what a caller without gRPC hears of a refusal.
func (r Refusal) json(err error, requestID string) []byte {
	e := twinEncoder{}
	e.raw(`{"error":{"reason":`).text(string(r.Reason)).raw(`,"message":`).text(r.Message)
	if invalid, ok := errors.AsType[*custodian.InvalidError](err); ok && r.Reason == reasonOf(custodian.ErrInvalid) {
		e.raw(`,"field":`).text(invalid.Field)
	}
	if r.RetryAfter > 0 {
		e.raw(`,"retry_after_ms":`).number(r.RetryAfter.Milliseconds())
	}
	if requestID != "" {
		e.raw(`,"request_id":`).text(requestID)
	}
	return e.raw("}}").b
}

// send writes the whole answer at once and wipes it.
func send(w http.ResponseWriter, status int, body []byte) {
	for len(body) < twinMinReply {
		body = append(body, '\n') // within its capacity, where it holds keys
	}
	defer clear(body)
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Content-Length", strconv.Itoa(len(body)))
	h.Set("Cache-Control", "no-store")
	// A caller that does not read keeps no call open.
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(twinWriteTimeout))
	w.WriteHeader(status)
	w.Write(body)
}
