package rpc

import (
	"context"
	"log/slog"

	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"

	"github.com/keycustody/custodian/internal/secret"
)

// StatusOf is what a caller hears of err over gRPC.
func StatusOf(ctx context.Context, err error) *status.Status {
	return explain(ctx, err).statusOf(err, "")
}

// NewCodec is the server's codec with its arena.
func NewCodec(a *secret.Arena) encoding.CodecV2 {
	c := newCodec()
	c.arena.Store(a)
	return c
}

// ReceiveForTest decodes m as the server does, from the buffer wire.
func ReceiveForTest(wire []byte, m any) error {
	e := envelope{message: m}
	if err := newCodec().Unmarshal(mem.BufferSlice{mem.SliceBuffer(wire)}, &e); err != nil {
		return err
	}
	return e.err
}

// TakeForTest and LeaveForTest are what a visitor does.
func (p *Places) TakeForTest(caller string) bool { return p.take(caller) }
func (p *Places) LeaveForTest(caller string)     { p.leave(caller) }

// RepeatsForTest says lines of a kind to a log, over the periods until ctx ends.
func RepeatsForTest(log *slog.Logger) (say func(kind, message string), run func(ctx context.Context)) {
	r := newRepeats()
	return func(kind, message string) { r.say(kind, line{log.Info, message, nil}) }, r.run
}
