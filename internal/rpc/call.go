package rpc

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/custodian"
)

// maxRequestID in characters.
const maxRequestID = 128

// A call is one call under way: who calls, and its name in the audit log.
type call struct {
	method    string // without the package: KeyRetrievalService/GetContentKeys
	caller    custodian.Caller
	requestID string
	start     time.Time
	grace     string // seconds, of an answer that was given while the KMS is away
}

type callKey struct{}

// callOf is the call that the interceptor began.
func callOf(ctx context.Context) *call {
	c, _ := ctx.Value(callKey{}).(*call)
	return c
}

// unary stands around every call: identity, deadline, status, metrics, log.
func (s *Server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	ctx, c, done, err := s.begin(ctx, info.FullMethod, req)
	defer done()
	var resp any
	if err == nil {
		resp, err = handler(ctx, req)
	}
	if err = s.end(ctx, c, s.noteMalformed(ctx, c, err)); err != nil {
		return nil, err
	}
	return resp, nil
}

// stream is the same for a streaming call, whose request its handler decodes.
func (s *Server) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	ctx, c, done, err := s.begin(ss.Context(), info.FullMethod, nil)
	defer done()
	if err == nil {
		err = handler(srv, &callStream{ss, ctx})
	}
	return s.end(ctx, c, s.noteMalformed(ctx, c, err))
}

// A callStream carries the context of its call.
type callStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s *callStream) Context() context.Context { return s.ctx }

// RecvMsg receives the request.
func (s *callStream) RecvMsg(message any) error { return receive(s.ServerStream.RecvMsg, message) }

// receive has gRPC receive a message, and says why where that is the caller's
// fault. One that does not decode, where gRPC itself would answer INTERNAL, comes
// in an envelope, which the codec never refuses. Of one that is too large the
// caller has heard already: gRPC answers before it tells us.
func receive(next func(any) error, message any) error {
	e := envelope{message: message}
	err := next(&e)
	switch {
	case status.Code(err) == codes.ResourceExhausted:
		return &custodian.InvalidError{Field: "message", Err: errTooLarge}
	case err == nil && e.err != nil:
		return &custodian.InvalidError{Field: "message", Err: errMalformed}
	}
	return err
}

var (
	errMalformed = errors.New("not a protocol buffer message of this method")
	errTooLarge  = fmt.Errorf("larger than %d bytes", MaxRequestSize)
)

// unreceived ends a call without a request.
func (s *Server) unreceived(ctx context.Context, fullMethod string, why error) error {
	ctx, c, done, err := s.begin(ctx, fullMethod, nil)
	defer done()
	if err == nil {
		err = why
	}
	return s.end(ctx, c, s.noteMalformed(ctx, c, err))
}

// actions are what the calls of each method come to, for those that are
// malformed and so come to nothing.
var actions = map[string]custodian.Action{
	"KeyRetrievalService/GetContentKeys":   custodian.ActionRelease,
	"KeyRetrievalService/ListKeyPeriods":   custodian.ActionRelease,
	"KeyIssuanceService/IssueContentKeys":  custodian.ActionIssue,
	"KeyTransferService/ImportContentKeys": custodian.ActionImport,
	"KeyTransferService/ExportContentKeys": custodian.ActionExport,
	"CustodyService/CreateCategory":        custodian.ActionCreateCategory,
	"CustodyService/SetCategoryMode":       custodian.ActionSetMode,
	"CustodyService/ListCategories":        custodian.ActionReadCategories,
	"CustodyService/ListKeyVersions":       custodian.ActionReadCategories,
	"CustodyService/ListContentKeys":       custodian.ActionReadKeys,
	"CustodyService/DescribeContentKey":    custodian.ActionReadKeys,
	"CustodyService/FreezeCaller":          custodian.ActionFreezeCaller,
	"CustodyService/LiftCaller":            custodian.ActionFreezeCaller,
	"CustodyService/ListFrozenCallers":     custodian.ActionReadStatus,
	"CustodyService/SetProviders":          custodian.ActionSetProviders,
	"CustodyService/Reencrypt":             custodian.ActionReencrypt,
	"CustodyService/ListRewraps":           custodian.ActionReadStatus,
	"CustodyService/GetStatus":             custodian.ActionReadStatus,
	"CustodyService/Backup":                custodian.ActionBackup,
	"CeremonyService/ProposeCeremony":      custodian.ActionPropose,
	"CeremonyService/GetCeremony":          custodian.ActionReadCeremonies,
	"CeremonyService/ListCeremonies":       custodian.ActionReadCeremonies,
	"CeremonyService/ApproveCeremony":      custodian.ActionApprove,
	"CeremonyService/CancelCeremony":       custodian.ActionCancel,
	"CeremonyService/ExecuteCeremony":      custodian.ActionExecute,
	"CeremonyService/GetEvidence":          custodian.ActionReadCeremonies,
	"CeremonyService/GetBlastRadius":       custodian.ActionBlastRadius,
	"AuditService/GetCheckpoint":           custodian.ActionReadAudit,
	"AuditService/GetInclusionProof":       custodian.ActionReadAudit,
	"AuditService/GetConsistencyProof":     custodian.ActionReadAudit,
	"AuditService/ListEntries":             custodian.ActionReadAudit,
	"AuditService/FollowEntries":           custodian.ActionReadAudit,
	"RevocationService/Revoke":             custodian.ActionRevoke,
	"RevocationService/LiftRevocation":     custodian.ActionLiftRevocation,
	"RevocationService/ListRevocations":    custodian.ActionReadRevocations,
	"RotationService/StartRotation":        custodian.ActionRotate,
	"RotationService/ListRotations":        custodian.ActionReadRotations,
	"RotationService/RollBackRotation":     custodian.ActionRotate,
	"RotationService/RetireRotation":       custodian.ActionRotate,
	"RotationService/ReportEvent":          custodian.ActionReportEvent,
}

// noteMalformed has the domain write down that a request was malformed, unless it
// did so when it found out, and returns what the caller is to hear: err, or that
// it cannot be written down.
func (s *Server) noteMalformed(ctx context.Context, c *call, err error) error {
	if err == nil || reasonOf(err) != reasonOf(custodian.ErrInvalid) {
		return err
	}
	custody, away := s.custody()
	if away != nil { // and so is the audit log
		return err
	}
	return custody.Refuse(ctx, c.caller, custodian.Refusal{RequestID: c.requestID, Action: actions[c.method], Door: c.method}, err)
}

// begin names the caller and the call, and bounds its time. The call is there
// even with an error.
func (s *Server) begin(ctx context.Context, fullMethod string, req any) (context.Context, *call, context.CancelFunc, error) {
	c := &call{method: strings.TrimPrefix(fullMethod, "/custodian.v1."), start: s.config.Now()}
	s.metrics.inFlight.Inc()
	ctx, cancel := s.bound(ctx, fullMethod)
	ctx = context.WithValue(ctx, callKey{}, c)
	caller, err := s.identify(ctx)
	if err != nil {
		return ctx, c, cancel, err
	}
	c.caller = caller
	if r, ok := req.(interface{ GetRequestId() string }); ok {
		err = c.name(r.GetRequestId())
	} else {
		err = c.name("")
	}
	return ctx, c, cancel, err
}

// bound gives the call its deadline. Watching health and following the audit log
// have none.
func (s *Server) bound(ctx context.Context, fullMethod string) (context.Context, context.CancelFunc) {
	switch fullMethod {
	case v1.KeyRetrievalService_GetContentKeys_FullMethodName:
		return context.WithTimeout(ctx, s.config.RetrieveDeadline)
	case v1.CustodyService_Backup_FullMethodName, v1.CeremonyService_GetBlastRadius_FullMethodName:
		return context.WithTimeout(ctx, s.config.BackupDeadline)
	case healthWatch, v1.AuditService_FollowEntries_FullMethodName:
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, s.config.Deadline)
}

// name takes the caller's request ID, or draws a UUIDv4 where there is none.
func (c *call) name(id string) error {
	if id == "" {
		c.requestID = newRequestID()
		return nil
	}
	if len(id) > maxRequestID || strings.ContainsFunc(id, func(r rune) bool { return r < ' ' || r > '~' }) {
		return &custodian.InvalidError{Field: "request_id", Err: fmt.Errorf("must be 1 to %d printable ASCII characters", maxRequestID)}
	}
	c.requestID = id
	return nil
}

// newRequestID draws a UUIDv4 (RFC 9562).
func newRequestID() string {
	var b [16]byte
	rand.Read(b[:]) // it never fails
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	var id [36]byte
	hex.Encode(id[0:8], b[0:4])
	hex.Encode(id[9:13], b[4:6])
	hex.Encode(id[14:18], b[6:8])
	hex.Encode(id[19:23], b[8:10])
	hex.Encode(id[24:], b[10:])
	id[8], id[13], id[18], id[23] = '-', '-', '-', '-'
	return string(id[:])
}

// end turns the error of a call into its status and counts the call.
func (s *Server) end(ctx context.Context, c *call, err error) error {
	s.metrics.inFlight.Dec()
	took := s.config.Now().Sub(c.start)
	if err == nil {
		s.metrics.observe(c.method, "OK", took)
		return nil
	}
	// gRPC's own refusals, such as a broken stream, pass as they are.
	if st, ok := transportStatus(err); ok {
		s.metrics.observe(c.method, st.Code().String(), took)
		return st.Err()
	}
	return s.refuse(ctx, c, err, took).statusOf(err, c.requestID).Err()
}

// refuse finds the row for the error that ended a call, counts the call and
// reports what is ours.
func (s *Server) refuse(ctx context.Context, c *call, err error, took time.Duration) row {
	r := explain(ctx, err)
	s.metrics.observe(c.method, string(r.reason), took)
	s.report(c, r, err)
	return r
}

// transportStatus is the status of an error that gRPC itself made on the way to
// or from the caller. A status inside of another error is somebody else's, such
// as a KMS's, and its words are not for the caller.
func transportStatus(err error) (*status.Status, bool) {
	if reasonOf(err) != reasonInternal {
		return nil, false
	}
	if send, ok := errors.AsType[*sendError](err); ok {
		err = send.err
	}
	grpcErr, ok := err.(interface{ GRPCStatus() *status.Status })
	if !ok || grpcErr.GRPCStatus().Code() == codes.OK {
		return nil, false
	}
	return grpcErr.GRPCStatus(), true
}

// A sendError is a stream to the caller that broke, on its way through the
// domain.
type sendError struct{ err error }

func (e *sendError) Error() string { return e.err.Error() }
func (e *sendError) Unwrap() error { return e.err }

// report writes the real error of our own faults, and of refused certificates,
// to the log: the caller hears neither. What fails for everybody until it is
// mended, and what anybody can bring about, is not written for each call, unless
// the audit log cannot be, which has them else.
func (s *Server) report(c *call, r row, err error) {
	write := s.config.Log.Error
	switch {
	case r.reason == reasonIdentity:
		write = s.config.Log.Warn
	case !r.ours:
		return
	}
	l := line{write, "call refused", []any{"method", c.method, "reason", string(r.reason), "caller", c.caller.ID, "request_id", c.requestID, "error", err}}
	if r.reason == reasonIdentity || r.retry > 0 && r.reason != reasonOf(custodian.ErrAuditBlocked) {
		s.repeats.say("call "+string(r.reason)+" "+c.caller.ID, l)
		return
	}
	l.write(l.message, l.attrs...)
}
