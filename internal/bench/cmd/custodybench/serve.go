package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime/pprof"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/certs"
	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/audit"
	"github.com/keycustody/custodian/internal/rpc"
)

// drain is how long a server waits at its end for calls under way.
const drain = 5 * time.Second

// serverFlags are those of all servers.
type serverFlags struct {
	pki, dir, profile string
	kmsDelay          time.Duration
	kmsAnswers        int64
	tuned             bool
	lifetime          time.Duration
	tokenDelay, hot   time.Duration
	unsigned          bool
}

func parseServer(role string, args []string) (serverFlags, error) {
	fs := flag.NewFlagSet(role, flag.ContinueOnError)
	var f serverFlags
	fs.StringVar(&f.pki, "pki", "", "folder of the certificates")
	fs.StringVar(&f.dir, "dir", "", "folder of the data")
	fs.StringVar(&f.profile, "cpuprofile", "", "file of the CPU profile")
	fs.DurationVar(&f.kmsDelay, "kms-delay", 0, "of each answer of the KMS")
	fs.Int64Var(&f.kmsAnswers, "kms-answers", 0, "answers of the KMS before it hangs; 0: it never does")
	fs.BoolVar(&f.tuned, "tuned", false, "an echo with the daemon's own settings of gRPC and Go")
	fs.DurationVar(&f.tokenDelay, "token-delay", 0, "of each decryption and signature of the token")
	fs.DurationVar(&f.hot, "hot-titles", 0, "how long opened content keys are kept; 0: not at all")
	fs.DurationVar(&f.lifetime, "kek-lifetime", 0, "of a loaded KEK; 0: the default")
	fs.BoolVar(&f.unsigned, "unsigned", false, "no checkpoint of the audit log is signed")
	return f, fs.Parse(args)
}

// serveCallback is the real stack.
func serveCallback(ctx context.Context, args []string) (err error) {
	f, err := parseServer(roleCallback, args)
	if err != nil {
		return err
	}
	tls, err := serverCerts(f.pki)
	if err != nil {
		return err
	}
	slow, err := slowToken(f.tokenDelay)
	if err != nil {
		return err
	}
	c, err := openCustody(ctx, f.dir, func(c *custodian.Config) {
		if f.hot > 0 {
			c.HotTitles = map[custodian.CategoryName]time.Duration{category: f.hot}
		}
		c.Providers[0] = &badKMS{Provider: c.Providers[0], delay: f.kmsDelay, answers: f.kmsAnswers}
		if c.KEKLifetime = f.lifetime; f.kmsAnswers > 0 {
			c.KMS.Grace = time.Hour
		}
		if f.unsigned {
			c.HSM = noSignatures{c.HSM}
		}
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.close(context.WithoutCancel(ctx))) }()
	s, err := rpc.NewServer(rpc.Config{Certs: tls, Log: stderrLog()})
	if err != nil {
		return err
	}
	s.SetCustody(c.custodian)
	slow()
	go c.custodian.RunHotTitles(ctx)
	go tls.Run(ctx, 5*time.Second)
	return listen(f, func(l net.Listener) error { return s.Serve(ctx, l, drain) })
}

// serveEcho is what the callback is compared with: gRPC over the same mutual
// TLS that answers what it has, as many bytes as a callback.
func serveEcho(ctx context.Context, args []string) error {
	f, err := parseServer(roleEcho, args)
	if err != nil {
		return err
	}
	return serveBare(ctx, f, &echo{response: likeCallback()})
}

// serveEchoAppend is the echo that writes down one entry first.
func serveEchoAppend(ctx context.Context, args []string) (err error) {
	f, err := parseServer(roleEchoAppend, args)
	if err != nil {
		return err
	}
	log, err := audit.Create(filepath.Join(f.dir, "audit"), audit.Options{Log: stderrLog()})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, log.Close()) }()
	return serveBare(ctx, f, &echo{response: likeCallback(), log: log})
}

// serveBare serves with the defaults of gRPC and Go, which is what bare means,
// or with those that the daemon has instead.
func serveBare(ctx context.Context, f serverFlags, e *echo) error {
	tls, err := serverCerts(f.pki)
	if err != nil {
		return err
	}
	options := []grpc.ServerOption{grpc.Creds(credentials.NewTLS(tls.TLSConfig()))}
	if f.tuned {
		rpc.TuneRuntime()
		options = append(options,
			grpc.MaxRecvMsgSize(rpc.MaxRequestSize),
			grpc.MaxConcurrentStreams(512),
			grpc.NumStreamWorkers(128),
			grpc.ReadBufferSize(8<<10),
			grpc.WriteBufferSize(32<<10),
			grpc.KeepaliveParams(keepalive.ServerParameters{Time: 30 * time.Second, Timeout: 10 * time.Second}),
		)
	}
	s := grpc.NewServer(options...)
	v1.RegisterKeyRetrievalServiceServer(s, e)
	stop := context.AfterFunc(ctx, s.GracefulStop)
	defer stop()
	return listen(f, s.Serve)
}

// An echo answers every call with the same response.
type echo struct {
	v1.UnimplementedKeyRetrievalServiceServer
	response *v1.GetContentKeysResponse
	log      *audit.Log // nil: nothing is written
}

func (e *echo) GetContentKeys(ctx context.Context, req *v1.GetContentKeysRequest) (*v1.GetContentKeysResponse, error) {
	if e.log == nil {
		return e.response, nil
	}
	k := e.response.Results[0].GetKey()
	_, err := e.log.Append(ctx, []audit.Entry{{Action: string(custodian.ActionRelease), Outcome: audit.Allowed,
		Caller: identity(custodian.RoleProvider), Role: string(custodian.RoleProvider), RequestID: e.response.RequestId,
		Category: k.Category, ContentID: k.ContentId, TrackType: k.TrackType, Scheme: k.Scheme, HasPeriod: true, Period: 1,
		Generation: k.Generation, KID: req.Kids[0], KeyVersion: k.Category + "/1", ControlRevision: 2}})
	if err != nil {
		return nil, err
	}
	return e.response, nil
}

// likeCallback is a response as the callback gives it, with a key that is none.
func likeCallback() *v1.GetContentKeysResponse {
	kid := make([]byte, custodian.KIDSize)
	for i := range kid {
		kid[i] = byte(i + 1)
	}
	return &v1.GetContentKeysResponse{RequestId: "00000000-0000-4000-8000-000000000000", Results: []*v1.GetContentKeysResult{{
		Kid: kid,
		Result: &v1.GetContentKeysResult_Key{Key: &v1.ContentKey{
			Kid: kid, KeyMaterial: &v1.ContentKey_Key{Key: make([]byte, custodian.CEKSize)}, Category: string(category),
			ContentId: []byte(contentID(0)), TrackType: "HD", Scheme: string(custodian.SchemeCENC), Generation: 1,
			Period: &v1.Period{Index: 100}, CreateTime: timestamppb.Now(),
			Receipt: &v1.Receipt{Index: 10_000, LeafHash: make([]byte, 32), Checkpoint: make([]byte, 243) /* as long as a signed one */},
		}},
	}}}
}

func serverCerts(pki string) (*certs.Server, error) {
	return certs.NewServer(certs.ServerOptions{CertFile: filepath.Join(pki, "localhost.pem"), KeyFile: filepath.Join(pki, "localhost.key"),
		Log: stderrLog(), CAs: []certs.CA{{Name: "bench", File: filepath.Join(pki, "ca.pem"), CRLFile: filepath.Join(pki, "crl.pem"),
			TrustDomain: trustDomain, Roles: []string{string(custodian.RoleProvider), string(custodian.RolePackager)}}}})
}

// listen listens, says where on standard output, and serves, with a profile
// where one is wanted.
func listen(f serverFlags, serve func(net.Listener) error) (err error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	if f.profile != "" {
		file, err := os.Create(f.profile)
		if err != nil {
			return err
		}
		defer file.Close()
		if err := pprof.StartCPUProfile(file); err != nil {
			return err
		}
		defer pprof.StopCPUProfile()
	}
	if err := json.NewEncoder(os.Stdout).Encode(l.Addr().String()); err != nil {
		return fmt.Errorf("say where: %w", err)
	}
	return serve(l)
}
