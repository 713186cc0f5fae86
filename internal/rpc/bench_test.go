package rpc_test

import (
	"fmt"
	"testing"
	"time"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/client"
)

// inFlight is how many calls the benchmarks keep under way, over four
// connections.
const inFlight = 128

func parallel(b *testing.B, k *kit, who string, call func(*client.Client, int) error) {
	var conns []*client.Client
	for range 4 {
		conns = append(conns, k.dial(b, who))
	}
	next := make(chan int, inFlight)
	for i := range inFlight {
		next <- i
	}
	b.SetParallelism(inFlight / 2) // times GOMAXPROCS, which is 2 or more
	b.ReportAllocs()
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		i := <-next
		cl := conns[i%len(conns)]
		for pb.Next() {
			if err := call(cl, i); err != nil {
				b.Error(err)
				return
			}
		}
		next <- i
	})
}

func BenchmarkGetContentKeys(b *testing.B) {
	for _, n := range []int{1, 8} {
		b.Run(fmt.Sprintf("kids=%d", n), func(b *testing.B) {
			k := newKit(b, options{config: func(c *rpcConfig) { c.RetrieveDeadline = time.Minute }})
			k.createCategory(b, "movies")
			var tracks []string
			for i := range 128 {
				tracks = append(tracks, fmt.Sprintf("T%d", i))
			}
			keys := k.issue(b, "clip", tracks...)
			parallel(b, k, provider, func(cl *client.Client, i int) error {
				req := &v1.GetContentKeysRequest{}
				for j := range n {
					req.Kids = append(req.Kids, keys[(i+j)%len(keys)].GetKid())
				}
				_, err := cl.GetContentKeys(b.Context(), req)
				return err
			})
		})
	}
}

// BenchmarkEcho is what a call costs that does nothing.
func BenchmarkEcho(b *testing.B) {
	k := newKit(b, options{starting: true})
	parallel(b, k, provider, func(cl *client.Client, _ int) error { _, err := cl.Ready(b.Context()); return err })
}
