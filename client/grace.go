package client

import (
	"context"
	"strconv"
	"time"

	"google.golang.org/grpc/metadata"
)

// graceTrailer is the trailer of an answer that was given while the daemon's
// KMS is away.
const graceTrailer = "custodian-kms-grace"

type graceKey struct{}

// WithGrace makes a context for a call of GetContentKeys or IssueContentKeys.
// When it has answered, *left is zero, or how long keys like these are served
// on while the daemon's KMS is away, in whole seconds. It is for one call at a
// time.
func WithGrace(ctx context.Context, left *time.Duration) context.Context {
	return context.WithValue(ctx, graceKey{}, left)
}

// setGrace takes what the trailer says down, where somebody wants to know.
func setGrace(left *time.Duration, trailer metadata.MD) {
	said := trailer.Get(graceTrailer)
	if left == nil || len(said) != 1 {
		return
	}
	if seconds, err := strconv.ParseUint(said[0], 10, 31); err == nil {
		*left = time.Duration(seconds) * time.Second
	}
}
