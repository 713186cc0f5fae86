package rpc

import (
	"context"
	"errors"
	"slices"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/custodian"
)

// Domain is the domain of every google.rpc.ErrorInfo that the daemon sends.
const Domain = "custodian"

// Reasons that only this package gives. The others are the domain's.
const (
	// reasonIdentity: the client certificate stands for nobody (any more).
	reasonIdentity custodian.Reason = "IDENTITY"
	// reasonCancelled: the caller went away.
	reasonCancelled custodian.Reason = "CANCELLED"
	// reasonInternal: nobody classified the error.
	reasonInternal custodian.Reason = "INTERNAL"
)

// A row says what a caller hears of one reason.
type row struct {
	reason custodian.Reason
	code   codes.Code
	http   int
	// message is all that the caller hears in words, but for INVALID and what is
	// said to officers about a ceremony: an error's own words may name what the
	// caller is not to know.
	message string
	// retry is how long a caller is to wait before it tries again (RetryInfo).
	// Zero: trying again does not help.
	retry time.Duration
	// ours marks a fault on our side, which is logged with the real error.
	ours bool
}

// table is the one map from a reason to what the caller is told.
//
// Two refusals come from the transport and have no ErrorInfo: a message over
// the size limit (RESOURCE_EXHAUSTED) and an unknown method (UNIMPLEMENTED).
var table = index(
	row{reason: reasonOf(custodian.ErrKeyNotFound), code: codes.NotFound, http: 404, message: "no such content key"},
	row{reason: reasonOf(custodian.ErrCategoryNotFound), code: codes.NotFound, http: 404, message: "no such category"},
	row{reason: reasonOf(custodian.ErrDenied), code: codes.PermissionDenied, http: 403, message: "not granted"},
	row{reason: reasonOf(custodian.ErrCallerFrozen), code: codes.PermissionDenied, http: 403, message: "the caller is frozen; the officers can say why"},
	row{reason: reasonOf(custodian.ErrTokenMissing), code: codes.Unauthenticated, http: 401, message: "a licence token is needed"},
	row{reason: reasonOf(custodian.ErrTokenInvalid), code: codes.Unauthenticated, http: 401, message: "the licence token is not accepted"},
	row{reason: reasonOf(custodian.ErrTokenExpired), code: codes.Unauthenticated, http: 401, message: "the licence token is not valid at this time"},
	row{reason: reasonOf(custodian.ErrTokenMismatch), code: codes.Unauthenticated, http: 401, message: "the licence token is for something or somebody else"},
	row{reason: reasonOf(custodian.ErrTokenReplayed), code: codes.Unauthenticated, http: 401, message: "the licence token was used already"},
	row{reason: reasonOf(custodian.ErrTokenRevoked), code: codes.Unauthenticated, http: 401, message: "the session, or the issuer of the licence token, is revoked"},
	row{reason: reasonOf(custodian.ErrTokenKeys), code: codes.Unavailable, http: 503, message: "the keys of the licence token's issuer are not loaded", retry: 2 * time.Second, ours: true},
	row{reason: reasonIdentity, code: codes.Unauthenticated, http: 401, message: "the client certificate is not accepted"},
	row{reason: reasonOf(custodian.ErrKeyState), code: codes.FailedPrecondition, http: 409, message: "the key's state does not permit this"},
	row{reason: reasonOf(custodian.ErrKeyCompromised), code: codes.FailedPrecondition, http: 409, message: "the key is compromised"},
	row{reason: reasonOf(custodian.ErrCategoryFrozen), code: codes.FailedPrecondition, http: 409, message: "the category is frozen"},
	row{reason: reasonOf(custodian.ErrSealingRequired), code: codes.FailedPrecondition, http: 409, message: "keys of this category leave only sealed to a recipient key, and none is pinned for the caller"},
	row{reason: reasonOf(custodian.ErrMEKExpired), code: codes.FailedPrecondition, http: 409, message: "the root key is past its cryptoperiod", ours: true},
	row{reason: reasonOf(custodian.ErrRotationState), code: codes.FailedPrecondition, http: 409, message: "rotations do not permit this now; custodianctl rotation list shows how far they are"},
	row{reason: reasonOf(custodian.ErrKEKExhausted), code: codes.FailedPrecondition, http: 409, message: "the category's key has reached its limit of use", ours: true},
	row{reason: reasonOf(custodian.ErrKeyDestroyed), code: codes.NotFound, http: 410, message: "the key is destroyed"},
	row{reason: reasonOf(custodian.ErrKIDConflict), code: codes.AlreadyExists, http: 409, message: "the KID is in use for other content"},
	row{reason: reasonOf(custodian.ErrKeyConflict), code: codes.AlreadyExists, http: 409, message: "a key of the import, or what it is for, is in use otherwise; the audit log names its KID"},
	row{reason: reasonOf(custodian.ErrContentCategory), code: codes.AlreadyExists, http: 409, message: "the content item belongs to another category"},
	row{reason: reasonOf(custodian.ErrCategoryExists), code: codes.AlreadyExists, http: 409, message: "the category exists"},
	row{reason: reasonOf(custodian.ErrInvalid), code: codes.InvalidArgument, http: 400, message: "malformed request"},
	row{reason: reasonOf(custodian.ErrRate), code: codes.ResourceExhausted, http: 429, message: "too many calls", retry: time.Second},
	row{reason: reasonOf(custodian.ErrKIDBudget), code: codes.ResourceExhausted, http: 429, message: "the caller's budget of different keys is spent", retry: time.Minute},
	row{reason: reasonOf(custodian.ErrKMSUnavailable), code: codes.Unavailable, http: 503, message: "the KMS is out of reach", retry: 2 * time.Second, ours: true},
	row{reason: reasonOf(custodian.ErrHSMUnavailable), code: codes.Unavailable, http: 503, message: "the HSM is out of reach", retry: 2 * time.Second, ours: true},
	row{reason: reasonOf(custodian.ErrStoreUnavailable), code: codes.Unavailable, http: 503, message: "the store is out of reach", retry: 2 * time.Second, ours: true},
	row{reason: reasonOf(custodian.ErrAuditBlocked), code: codes.Unavailable, http: 503, message: "the audit log cannot be written", retry: 5 * time.Second, ours: true},
	row{reason: reasonOf(custodian.ErrRecordCorrupt), code: codes.DataLoss, http: 500, message: "the record fails authentication", ours: true},
	// A client may try once more, at once: that is not for RetryInfo to say.
	row{reason: reasonOf(custodian.ErrDeadline), code: codes.DeadlineExceeded, http: 504, message: "the deadline has passed"},
	row{reason: reasonOf(custodian.ErrStarting), code: codes.Unavailable, http: 503, message: "the daemon is starting", retry: time.Second},
	row{reason: reasonOf(custodian.ErrUninitialised), code: codes.Unavailable, http: 503, message: "the daemon is not initialised", retry: 10 * time.Second},
	row{reason: reasonOf(custodian.ErrSealed), code: codes.Unavailable, http: 503, message: "the daemon is sealed", retry: 10 * time.Second},
	row{reason: reasonOf(custodian.ErrQuorum), code: codes.FailedPrecondition, http: 409, message: "it needs the officers' quorum"},
	row{reason: reasonOf(custodian.ErrApproval), code: codes.PermissionDenied, http: 403, message: "the approval does not count"},
	row{reason: reasonOf(custodian.ErrPlan), code: codes.FailedPrecondition, http: 409, message: "the plan cannot be carried out as things are"},
	row{reason: reasonOf(custodian.ErrCeremonyState), code: codes.FailedPrecondition, http: 409, message: "the ceremony's state does not permit this"},
	row{reason: reasonOf(custodian.ErrCeremonyNotFound), code: codes.NotFound, http: 404, message: "no such ceremony"},
	row{reason: reasonOf(custodian.ErrClock), code: codes.Unavailable, http: 503, message: "the daemon's clock is not believed", retry: 10 * time.Second, ours: true},
	row{reason: reasonCancelled, code: codes.Canceled, http: 499, message: "the caller went away"},
	row{reason: reasonInternal, code: codes.Internal, http: 500, message: "internal error; the daemon's log has it under this request ID", ours: true},
)

func reasonOf(err error) custodian.Reason { return custodian.ReasonOf(err) }

func index(rows ...row) map[custodian.Reason]row {
	t := make(map[custodian.Reason]row, len(rows))
	for _, r := range rows {
		t[r.reason] = r
	}
	return t
}

// identityError is a certificate that Peer refused.
type identityError struct{ err error }

func (e *identityError) Error() string { return "identify caller: " + e.err.Error() }
func (e *identityError) Unwrap() error { return e.err }

// explain finds the row for the error of a call under ctx. Where the call's own
// time ran out, that is the answer, whatever part was waiting at that moment.
func explain(ctx context.Context, err error) row {
	if _, ok := errors.AsType[*identityError](err); ok {
		return table[reasonIdentity]
	}
	if ctx.Err() != nil && (errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) || errors.Is(err, custodian.ErrDeadline)) {
		if errors.Is(ctx.Err(), context.Canceled) {
			return table[reasonCancelled]
		}
		return table[reasonOf(custodian.ErrDeadline)]
	}
	if r, ok := table[reasonOf(err)]; ok {
		return r
	}
	return table[reasonInternal]
}

// words are the sentence that the caller hears.
func (r row) words(err error) string {
	if invalid, ok := errors.AsType[*custodian.InvalidError](err); ok && r.code == codes.InvalidArgument {
		return invalid.Error()
	}
	if refused, ok := errors.AsType[*custodian.CeremonyError](err); ok && reasonOf(refused) == r.reason {
		return refused.Error()
	}
	return r.message
}

// statusOf is the status of a call that failed with err.
func (r row) statusOf(err error, requestID string) *status.Status {
	info := &errdetails.ErrorInfo{Reason: string(r.reason), Domain: Domain}
	if requestID != "" {
		info.Metadata = map[string]string{"request_id": requestID}
	}
	details := []protoadapt.MessageV1{info}
	if invalid, ok := errors.AsType[*custodian.InvalidError](err); ok && r.code == codes.InvalidArgument {
		if info.Metadata == nil {
			info.Metadata = map[string]string{}
		}
		info.Metadata["field"] = invalid.Field
	}
	if r.retry > 0 {
		details = append(details, &errdetails.RetryInfo{RetryDelay: durationpb.New(r.retry)})
	}
	st := status.New(r.code, r.words(err))
	if detailed, err := st.WithDetails(details...); err == nil {
		return detailed
	}
	return st
}

// keyErrorOf is the same for one key of several.
func (r row) keyErrorOf(err error) *v1.KeyError {
	e := &v1.KeyError{Reason: string(r.reason), Message: r.words(err), Code: int32(r.code)}
	if r.retry > 0 {
		e.RetryDelay = durationpb.New(r.retry)
	}
	return e
}

// A Refusal is what every front door tells its caller of an error.
type Refusal struct {
	Reason     custodian.Reason
	HTTPStatus int
	Message    string
	RetryAfter time.Duration // zero: trying again does not help
}

// Explain is the table for front doors that do not speak gRPC.
func Explain(ctx context.Context, err error) Refusal {
	return explain(ctx, err).refusal(err)
}

func (r row) refusal(err error) Refusal {
	return Refusal{Reason: r.reason, HTTPStatus: r.http, Message: r.words(err), RetryAfter: r.retry}
}

// Reasons are all reasons that a caller can hear, sorted.
func Reasons() []custodian.Reason {
	reasons := make([]custodian.Reason, 0, len(table))
	for reason := range table {
		reasons = append(reasons, reason)
	}
	slices.Sort(reasons)
	return reasons
}
