package client

import (
	"context"
	"math/rand/v2"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
)

// transportWait is the first wait after a connection that broke or could not be
// made. It doubles.
const transportWait = 100 * time.Millisecond

// once are the calls that may have worked although no answer came in time, and
// that would then be refused the second time.
var once = map[string]bool{
	v1.CustodyService_CreateCategory_FullMethodName:   true,
	v1.CeremonyService_ProposeCeremony_FullMethodName: true,
	v1.CeremonyService_ApproveCeremony_FullMethodName: true,
	v1.CeremonyService_CancelCeremony_FullMethodName:  true,
	v1.CeremonyService_ExecuteCeremony_FullMethodName: true,
	v1.RotationService_StartRotation_FullMethodName:   true,
}

// retries make a refused call again.
type retries struct{ attempts int }

// unary tries again where the daemon's answer has RetryInfo, after that delay
// and a little more each time; once where the daemon's deadline passed; and
// where no answer came, if the call may be repeated. It ends early where the
// caller's own deadline would not outlast the wait.
func (r retries) unary(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	var trailer metadata.MD
	grace, _ := ctx.Value(graceKey{}).(*time.Duration)
	if grace != nil {
		*grace = 0
		opts = append(opts[:len(opts):len(opts)], grpc.Trailer(&trailer))
	}
	timedOut := false
	for attempt := 1; ; attempt++ {
		err := invoke(ctx, method, req, reply, conn, opts...)
		if err == nil {
			setGrace(grace, trailer)
			return nil
		}
		e := newError(err)
		if attempt == r.attempts || ctx.Err() != nil {
			return e
		}
		wait := e.Retry << (attempt - 1)
		switch {
		case e.Retry > 0:
		case e.Reason == "DEADLINE" && !timedOut && !once[method]:
			timedOut = true
		case e.Code == codes.Unavailable && e.Reason == "" && !once[method]:
			wait = transportWait << (attempt - 1)
		default:
			return e
		}
		if !pause(ctx, wait) {
			return e
		}
	}
}

// pause waits for d and up to a fifth more, so that callers who were refused
// together do not come back together. It reports false, at once, where ctx ends
// before that.
func pause(ctx context.Context, d time.Duration) bool {
	if d > 0 {
		d += rand.N(d/5 + 1)
	}
	if end, ok := ctx.Deadline(); ok && time.Until(end) <= d {
		return false
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}
