package kms

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"cloud.google.com/go/auth"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/keycustody/custodian/custodian"
)

// classify turns a failed request into one of the errors of a
// custodian.Provider, in a sentence. Google's status is in the text only: in
// the error's tree, a gRPC server of ours could take it for its own.
func (g *google) classify(op string, err error) error {
	answer := statusOf(err)
	said := g.fault(op, gcpSays(answer), gcpSentinel(op, answer))
	for _, ended := range []error{context.DeadlineExceeded, context.Canceled} {
		if errors.Is(err, ended) {
			return fmt.Errorf("%w: %w", said, ended)
		}
	}
	return said
}

func (g *google) fault(op, what string, sentinel error) error {
	return fmt.Errorf("kms %s: %s with %s: %s: %w", g.name, op, g.c.Key, what, sentinel)
}

// statusOf is the status in err, or one of code OK where there is none. What
// gRPC makes of an answer that is not gRPC's is Unavailable: something between
// us and Google answers.
func statusOf(err error) *status.Status {
	var answer interface{ GRPCStatus() *status.Status }
	if !errors.As(err, &answer) {
		return nil
	}
	s := answer.GRPCStatus()
	if strings.HasPrefix(s.Message(), "unexpected HTTP status code received from server") {
		return status.New(codes.Unavailable, s.Message())
	}
	return s
}

func gcpSentinel(op string, answer *status.Status) error {
	switch answer.Code() {
	case codes.ResourceExhausted:
		return custodian.ErrProviderThrottled
	case codes.PermissionDenied:
		return custodian.ErrProviderDenied
	case codes.Unauthenticated:
		return custodian.ErrProviderLogin
	case codes.FailedPrecondition, codes.NotFound:
		// The key's version is disabled, scheduled for destruction or
		// destroyed; or the key is not there.
		return custodian.ErrProviderDisabled
	case codes.InvalidArgument:
		switch {
		case strings.Contains(answer.Message(), "checksum"):
			return custodian.ErrProviderUnavailable // a bit flipped on the way there
		case op == "encrypt":
			return custodian.ErrProviderDisabled // a key that cannot do what is asked
		}
		return custodian.ErrProviderBlob
	}
	return custodian.ErrProviderUnavailable
}

// gcpSays is Google's answer on one line.
func gcpSays(answer *status.Status) string {
	return fmt.Sprintf("%s, %.300q", answer.Code(), strings.Join(strings.Fields(answer.Message()), " "))
}

// forbidden reports whether Google refuses the token, or what it may do.
func (g *google) forbidden(err error) bool {
	code := statusOf(err).Code()
	return code == codes.Unauthenticated || code == codes.PermissionDenied
}

// refused reports whether Google refuses to give a token.
func (g *google) refused(err error) bool {
	var answer *auth.Error
	if !errors.As(err, &answer) || answer.Response == nil {
		return false
	}
	code := answer.Response.StatusCode
	return code == http.StatusBadRequest || code == http.StatusUnauthorized || code == http.StatusForbidden
}

// refusal is a login without a token, in a sentence.
func (g *google) refusal(err error) error {
	var answer *auth.Error
	if !errors.As(err, &answer) || answer.Response == nil {
		return fmt.Errorf("kms %s: log in to google: %w: %w", g.name, custodian.ErrProviderUnavailable, err)
	}
	if answer.Response.StatusCode == http.StatusTooManyRequests {
		return fmt.Errorf("kms %s: log in to google: status 429: %w", g.name, custodian.ErrProviderThrottled)
	}
	sentinel := custodian.ErrProviderUnavailable
	if g.refused(err) {
		sentinel = custodian.ErrProviderLogin
	}
	body := strings.Join(strings.Fields(string(answer.Body)), " ")
	return fmt.Errorf("kms %s: log in to google: status %d, %.300q: %w", g.name, answer.Response.StatusCode, body, sentinel)
}
