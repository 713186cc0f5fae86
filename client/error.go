package client

import (
	"errors"
	"fmt"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// domain is the domain of the daemon's google.rpc.ErrorInfo.
const domain = "custodian"

// An Error is a call that was refused or did not come through.
type Error struct {
	// Code is the status of the call.
	Code codes.Code
	// Reason is the stable name of the refusal: DENIED, KEY_NOT_FOUND and so on.
	// Empty where the daemon did not answer, or only its transport did.
	Reason string
	// Message is a sentence for people.
	Message string
	// Field is the place in the request that is malformed, keys[3].kid. Empty
	// but for the reason INVALID.
	Field string
	// RequestID names the call in the daemon's log and audit log.
	RequestID string
	// Retry is how long to wait before trying again. Zero: the daemon says that
	// trying again does not help, or did not answer.
	Retry time.Duration

	status *status.Status
}

func (e *Error) Error() string {
	s := e.Message
	if e.Reason != "" {
		s = e.Reason + ": " + s
	}
	if e.RequestID != "" {
		s += fmt.Sprintf(" (request %s)", e.RequestID)
	}
	return s
}

// GRPCStatus is the status as it came.
func (e *Error) GRPCStatus() *status.Status { return e.status }

// ReasonOf is the reason of the *Error in err's tree, or "".
func ReasonOf(err error) string {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Reason
	}
	return ""
}

// wrap makes an *Error of the error of a call; nil stays nil.
func wrap(err error) error {
	if err == nil {
		return nil
	}
	return newError(err)
}

func newError(err error) *Error {
	if e, ok := errors.AsType[*Error](err); ok {
		return e
	}
	st := status.Convert(err)
	e := &Error{Code: st.Code(), Message: st.Message(), status: st}
	for _, d := range st.Details() {
		switch d := d.(type) {
		case *errdetails.ErrorInfo:
			if d.GetDomain() == domain {
				e.Reason, e.Field, e.RequestID = d.GetReason(), d.GetMetadata()["field"], d.GetMetadata()["request_id"]
			}
		case *errdetails.RetryInfo:
			e.Retry = d.GetRetryDelay().AsDuration()
		}
	}
	return e
}
