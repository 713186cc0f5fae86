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

// send sets the trailer. That fails only outside of a call, where there is
// nobody to tell.
func (g graceTrailer) send(ctx context.Context) {
	if g != 0 {
		seconds := custodian.GraceSeconds(time.Duration(g))
		_ = grpc.SetTrailer(ctx, metadata.Pairs(GraceTrailer, strconv.FormatInt(seconds, 10)))
	}
}
