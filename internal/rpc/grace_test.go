package rpc_test

import (
	"context"
	"errors"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/certs"
	"github.com/keycustody/custodian/client"
	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/rpc"
)

// An awayKMS is a provider that can go away.
type awayKMS struct {
	custodian.Provider
	away atomic.Bool
}

func (k *awayKMS) Unwrap(ctx context.Context, w custodian.OuterWrap, binding []byte) ([]byte, error) {
	if k.away.Load() {
		return nil, custodian.ErrProviderUnavailable
	}
	return k.Provider.Unwrap(ctx, w, binding)
}

// conn is a connection without the client's own conduct.
func (k *kit) conn(t *testing.T, who string) *grpc.ClientConn {
	t.Helper()
	c, err := k.config(who)
	if err != nil {
		t.Fatal(err)
	}
	tlsClient, err := certs.NewClient(certs.ClientOptions{CertFile: c.CertFile, KeyFile: c.KeyFile, CAFile: c.CAFile, ServerName: c.ServerName})
	if err != nil {
		t.Fatal(err)
	}
	conn, err := grpc.NewClient(k.addr, grpc.WithTransportCredentials(credentials.NewTLS(tlsClient.TLSConfig())))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// What is served while the KMS is away says so in a trailer; after the grace
// the caller hears when to come again.
func TestGraceTrailer(t *testing.T) {
	var away *awayKMS
	var ahead atomic.Int64
	k := newKit(t, options{custody: func(c *custodian.Config) {
		away = &awayKMS{Provider: c.Providers[0]}
		c.Providers = []custodian.Provider{away}
		c.Now = func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }
		c.KEKLifetime = time.Minute
		c.KMS = custodian.KMSLimits{Grace: time.Hour, BreakerPause: 1, Patience: 10 * time.Second}
	}})
	k.createCategory(t, "movies")
	kid := k.issue(t, "film-1", "SD")[0].GetKid()
	callback := func() (grace []string, err error) {
		var trailer metadata.MD
		cl := v1.NewKeyRetrievalServiceClient(k.conn(t, provider))
		_, err = cl.GetContentKeys(t.Context(), &v1.GetContentKeysRequest{Kids: [][]byte{kid}}, grpc.Trailer(&trailer))
		return trailer.Get(rpc.GraceTrailer), err
	}
	if grace, err := callback(); err != nil || grace != nil {
		t.Errorf("all in order: got %v and trailer %v, want none", err, grace)
	}
	away.away.Store(true)
	ahead.Store(int64(2 * time.Minute))
	grace, err := callback()
	if err != nil || len(grace) != 1 {
		t.Fatalf("the KMS is away: got %v and trailer %v, want one", err, grace)
	}
	seconds, err := strconv.Atoi(grace[0])
	if want := 58 * 60; err != nil || seconds > want || seconds < want-60 {
		t.Errorf("got %q seconds of grace left, want some %d", grace[0], want)
	}
	left := time.Duration(-1)
	if _, err := k.dial(t, provider).GetContentKeys(client.WithGrace(t.Context(), &left), &v1.GetContentKeysRequest{Kids: [][]byte{kid}}); err != nil {
		t.Fatal(err)
	}
	if want := 58 * time.Minute; left > want || left < want-time.Minute {
		t.Errorf("the client says %s of grace left, want some %s", left, want)
	}
	resp, err := k.dial(t, operator).Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	p := resp.GetProviders()[0]
	if p.GetAwaySinceTime() == nil || p.GetGraceLeft().AsDuration() < 50*time.Minute || len(p.GetCallsByReason()) == 0 {
		t.Errorf("the status does not tell of the outage: %v", p)
	}

	ahead.Store(int64(61 * time.Minute))
	_, err = k.dial(t, provider).GetContentKeys(t.Context(), &v1.GetContentKeysRequest{Kids: [][]byte{kid}})
	if e := wantRefused(t, err, custodian.ReasonOf(custodian.ErrKMSUnavailable)); e.Retry <= 0 {
		t.Errorf("got no RetryInfo in %v", err)
	}
	away.away.Store(false)
	if _, err := k.dial(t, provider).GetContentKeys(client.WithGrace(t.Context(), &left), &v1.GetContentKeysRequest{Kids: [][]byte{kid}}); err != nil || left != 0 {
		t.Errorf("the KMS is back: the client says %v and %s of grace left, want none", err, left)
	}
	if grace, err := callback(); err != nil || grace != nil {
		t.Errorf("the KMS is back: got %v and trailer %v, want none", errors.Unwrap(err), grace)
	}
}
