package rpc

import (
	"fmt"
	"sync/atomic"

	"google.golang.org/grpc/encoding"
	encproto "google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/internal/secret"
)

// A codec is the protobuf codec of gRPC, but for the messages that carry keys.
// These are encoded into buffers that are wiped when gRPC has written them, and
// the keys themselves go back to the arena as soon as they are encoded.
//
// It decides nothing about who may have a key: a message that comes here is as
// good as sent.
type codec struct {
	encoding.CodecV2
	arena atomic.Pointer[secret.Arena]
}

func newCodec() *codec { return &codec{CodecV2: encoding.GetCodecV2(encproto.Name)} }

// Marshal encodes a message. Messages with keys are spent by it: their keys are
// wiped.
func (c *codec) Marshal(v any) (mem.BufferSlice, error) {
	switch m := v.(type) {
	case *v1.GetContentKeysResponse:
		defer c.spend(func(yield func(*v1.ContentKey) bool) {
			for _, r := range m.Results {
				if !yield(r.GetKey()) {
					return
				}
			}
		})
		return marshalWiped(m)
	case *v1.IssueContentKeysResponse:
		defer c.spend(func(yield func(*v1.ContentKey) bool) {
			for _, k := range m.Keys {
				if !yield(k.GetKey()) {
					return
				}
			}
		})
		return marshalWiped(m)
	}
	return c.CodecV2.Marshal(v)
}

// An envelope is a message that is to be received, and why it could not be
// decoded.
type envelope struct {
	message any
	err     error
}

// Unmarshal decodes a message. An envelope takes the error in.
func (c *codec) Unmarshal(data mem.BufferSlice, v any) error {
	if e, ok := v.(*envelope); ok {
		e.err = c.CodecV2.Unmarshal(data, e.message)
		if _, keys := e.message.(*v1.ImportContentKeysRequest); keys {
			// The message has its own copy. These are gRPC's buffers, which go back
			// to a pool when they are freed, unwiped.
			for _, b := range data {
				clear(b.ReadOnlyData())
			}
		}
		return nil
	}
	return c.CodecV2.Unmarshal(data, v)
}

// spend wipes the keys and gives their places back to the arena.
func (c *codec) spend(keys func(func(*v1.ContentKey) bool)) {
	arena := c.arena.Load()
	for k := range keys {
		b := k.GetKey()
		if len(b) == 0 {
			continue
		}
		if arena != nil {
			arena.Put(b)
		} else {
			clear(b)
		}
		k.KeyMaterial = nil
	}
}

// marshalWiped encodes m into one buffer that is wiped when its last reference
// is freed.
func marshalWiped(m proto.Message) (mem.BufferSlice, error) {
	size := proto.Size(m)
	buf := wiped.Get(max(size, minWiped))
	out, err := proto.MarshalOptions{UseCachedSize: true}.MarshalAppend((*buf)[:0], m)
	if err == nil && len(out) != size {
		// The encoder would have moved to an array that nobody wipes.
		clear(out)
		err = fmt.Errorf("encode %T: %d bytes instead of %d", m, len(out), size)
	}
	if err != nil {
		wiped.Put(buf)
		return nil, err
	}
	*buf = out
	return mem.BufferSlice{mem.NewBuffer(buf, wiped)}, nil
}

// minWiped is the least capacity of a buffer. mem.NewBuffer forgets the pool of
// buffers of 1 KiB or less, and then nobody would wipe them (gRPC 1.85).
const minWiped = 2 << 10

// wiped pools the buffers of answers that carry keys: most hold one key; 64 keys
// with long content IDs take about 40 KiB, a packager's burst of 600 as many
// times more.
var wiped = wipingPool{mem.NewTieredBufferPool(minWiped, 16<<10, 64<<10, 512<<10)}

// A wipingPool wipes what comes back.
type wipingPool struct{ mem.BufferPool }

// Put wipes the bytes that were used and keeps the buffer.
func (p wipingPool) Put(b *[]byte) {
	clear(*b)
	p.BufferPool.Put(b)
}
