package rpc

import (
	"context"
	"strconv"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/keycustody/custodian/custodian"
)

// GraceTrailer names the response trailer of a call that was served while the
// KMS is away: the seconds until keys like those of the response are refused.
const GraceTrailer = "custodian-kms-grace"

// A graceTrailer is the least grace among the keys of one response; zero:
// none was on grace.
type graceTrailer time.Duration

func (g *graceTrailer) add(left time.Duration) {
	if left > 0 && (*g == 0 || left < time.Duration(*g)) {
		*g = graceTrailer(left)
	}
}

// send sets the trailer, and tells the call, for front doors that do not speak
// gRPC: with those, setting the trailer fails.
func (g graceTrailer) send(ctx context.Context) {
	if g != 0 {
		seconds := strconv.FormatInt(custodian.GraceSeconds(time.Duration(g)), 10)
		if c := callOf(ctx); c != nil {
			c.grace = seconds
		}
		_ = grpc.SetTrailer(ctx, metadata.Pairs(GraceTrailer, seconds))
	}
}
