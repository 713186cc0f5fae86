package rpc_test

import (
	"bytes"
	"crypto/rand"
	"testing"

	"google.golang.org/grpc/encoding"
	"google.golang.org/protobuf/proto"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/internal/rpc"
	"github.com/keycustody/custodian/internal/secret"
)

// spendable is a message with n keys of a, and what it looks like on the wire.
func spendable(t *testing.T, a *secret.Arena, n int, issue bool) (message proto.Message, wire []byte, slots [][]byte) {
	t.Helper()
	get, issued := &v1.GetContentKeysResponse{RequestId: "r"}, &v1.IssueContentKeysResponse{RequestId: "r"}
	for range n {
		slot, err := a.Get()
		if err != nil {
			t.Fatal(err)
		}
		rand.Read(slot[:16])
		slots = append(slots, slot)
		key := &v1.ContentKey{Category: "movies", KeyMaterial: &v1.ContentKey_Key{Key: secret.New(a, slot, 16).Lend()}}
		get.Results = append(get.Results, &v1.GetContentKeysResult{Result: &v1.GetContentKeysResult_Key{Key: key}},
			&v1.GetContentKeysResult{Result: &v1.GetContentKeysResult_Error{Error: &v1.KeyError{Reason: "DENIED"}}})
		issued.Keys = append(issued.Keys, &v1.IssuedContentKey{Key: key})
	}
	message = get
	if issue {
		message = issued
	}
	wire, err := proto.Marshal(message)
	if err != nil {
		t.Fatal(err)
	}
	return message, wire, slots
}

func TestCodecWipes(t *testing.T) {
	tests := []struct {
		name  string
		keys  int
		issue bool
	}{
		{"one key", 1, false},
		{"sixty-four keys", 64, false},
		{"six hundred new keys", 600, true},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			arena, err := secret.NewArena(32, 1024)
			if err != nil {
				t.Fatal(err)
			}
			defer arena.Close()
			codec := rpc.NewCodec(arena)
			message, want, slots := spendable(t, arena, test.keys, test.issue)
			out, err := codec.Marshal(message)
			if err != nil {
				t.Fatal(err)
			}
			if got := arena.InUse(); got != 0 {
				t.Errorf("slots in use once encoded: got %d, want 0", got)
			}
			for _, s := range slots {
				if !bytes.Equal(s, make([]byte, len(s))) {
					t.Fatal("a slot holds its key once it is encoded")
				}
			}
			if got := out.Materialize(); !bytes.Equal(got, want) {
				t.Fatalf("wire: got %d bytes that differ from protobuf's %d", len(got), len(want))
			}
			var buffers [][]byte
			for _, b := range out {
				buffers = append(buffers, b.ReadOnlyData())
			}
			// gRPC holds a second reference while the transport writes.
			out.Ref()
			out.Free()
			if bytes.Equal(buffers[0], make([]byte, len(buffers[0]))) {
				t.Fatal("a buffer was wiped while it is still referred to")
			}
			out.Free()
			for _, b := range buffers {
				if !bytes.Equal(b, make([]byte, len(b))) {
					t.Fatal("a freed buffer holds what was in it")
				}
			}
		})
	}
}

func TestCodecLeavesOtherMessages(t *testing.T) {
	codec := rpc.NewCodec(nil)
	want := &v1.GetContentKeysRequest{RequestId: "r", Kids: [][]byte{make([]byte, 16)}}
	out, err := codec.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	got := &v1.GetContentKeysRequest{}
	if err := codec.Unmarshal(out, got); err != nil {
		t.Fatal(err)
	}
	if !proto.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if got, want := codec.Name(), encoding.GetCodecV2("proto").Name(); got != want {
		t.Errorf("name: got %q, want %q", got, want)
	}
}

func BenchmarkCodecOneKey(b *testing.B) {
	arena, err := secret.NewArena(32, 16)
	if err != nil {
		b.Fatal(err)
	}
	defer arena.Close()
	codec := rpc.NewCodec(arena)
	result := &v1.GetContentKeysResult{Kid: make([]byte, 16)}
	message := &v1.GetContentKeysResponse{RequestId: "r", Results: []*v1.GetContentKeysResult{result}}
	key := &v1.ContentKey{Kid: make([]byte, 16), Category: "movies", ContentId: make([]byte, 36), TrackType: "HD", Scheme: "cenc"}
	result.Result = &v1.GetContentKeysResult_Key{Key: key}
	for b.Loop() {
		slot, err := arena.Get()
		if err != nil {
			b.Fatal(err)
		}
		key.KeyMaterial = &v1.ContentKey_Key{Key: slot[:16]}
		out, err := codec.Marshal(message)
		if err != nil {
			b.Fatal(err)
		}
		out.Free()
	}
}
