package rpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/certs"
	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/secret"
)

// Custody is what the services need of the domain; *custodian.Custodian is it.
type Custody interface {
	Issue(context.Context, custodian.Caller, custodian.IssueRequest) ([]custodian.IssuedKey, error)
	Refuse(ctx context.Context, who custodian.Caller, r custodian.Refusal, why error) error
	Retrieve(context.Context, custodian.Caller, custodian.RetrieveRequest) ([]custodian.RetrieveResult, error)
	KeyPeriods(context.Context, custodian.Caller, custodian.KeyPeriodsRequest) ([]custodian.ContentKey, error)
	Import(context.Context, custodian.Caller, custodian.ImportRequest) ([]custodian.ImportedKey, error)
	Export(context.Context, custodian.Caller, custodian.ExportRequest) ([]custodian.ExportedKey, error)
	CountRefused(who custodian.Caller, what custodian.Action, requestID string, refused error) error
	Arena() *secret.Arena
	Ready(context.Context) error
	CreateCategory(context.Context, custodian.Caller, custodian.CreateCategoryRequest) (custodian.Category, error)
	SetCategoryMode(context.Context, custodian.Caller, custodian.SetModeRequest) (custodian.Category, error)
	FreezeCaller(context.Context, custodian.Caller, custodian.FreezeCallerRequest) (custodian.FrozenCaller, error)
	LiftCaller(context.Context, custodian.Caller, custodian.FreezeCallerRequest) (custodian.FrozenCaller, error)
	FrozenCallers(context.Context, custodian.Caller) ([]custodian.FrozenCaller, error)
	SetProviders(context.Context, custodian.Caller, custodian.SetProvidersRequest) (custodian.RewrapStatus, error)
	Reencrypt(context.Context, custodian.Caller, custodian.ReencryptRequest) (custodian.RewrapStatus, error)
	Rewraps(context.Context, custodian.Caller) ([]custodian.RewrapStatus, error)
	Categories(context.Context, custodian.Caller) ([]custodian.Category, error)
	KeyVersions(context.Context, custodian.Caller, custodian.CategoryName) ([]custodian.KEK, error)
	ListContentKeys(context.Context, custodian.Caller, custodian.ListRequest) ([]custodian.ContentKeyInfo, string, error)
	DescribeContentKey(context.Context, custodian.Caller, custodian.KID) (custodian.ContentKeyInfo, error)
	Status(context.Context, custodian.Caller) (custodian.Status, error)
	Backup(ctx context.Context, who custodian.Caller, recipient string, w io.Writer) error
	StartRotation(context.Context, custodian.Caller, custodian.RotationOrder) (custodian.Rotation, error)
	Rotations(context.Context, custodian.Caller) ([]custodian.RotationStatus, error)
	RollBackRotation(ctx context.Context, who custodian.Caller, requestID, name string) (custodian.Rotation, error)
	RetireRotation(ctx context.Context, who custodian.Caller, requestID, name string) (custodian.Rotation, error)
	ReportEvent(context.Context, custodian.Caller, custodian.Event) (custodian.EventResult, error)
	AuditCheckpoint(context.Context, custodian.Caller) ([]byte, custodian.AuditKey, error)
	AuditInclusion(ctx context.Context, who custodian.Caller, index, size uint64) (custodian.AuditProof, error)
	AuditConsistency(ctx context.Context, who custodian.Caller, old, size uint64) ([][32]byte, []byte, error)
	AuditEntries(context.Context, custodian.Caller, custodian.AuditQuery) ([]custodian.AuditEntry, uint64, error)
	AuditPrunedBefore() uint64
	FollowAudit(context.Context, custodian.Caller, custodian.AuditQuery, func([]custodian.AuditEntry) error) error
	Revoke(context.Context, custodian.Caller, custodian.RevokeRequest) (custodian.Revocation, error)
	LiftRevocation(context.Context, custodian.Caller, custodian.LiftRequest) error
	Revocations(context.Context, custodian.Caller) ([]custodian.Revocation, error)
	Ceremonies
}

// Sizes and limits of the transport.
const (
	// MaxRequestSize in bytes; a larger message is refused with
	// RESOURCE_EXHAUSTED by the transport, and written down. The largest
	// request, 600 keys, takes some 80 KiB.
	MaxRequestSize = 1 << 20
	// maxResponseSize in bytes, of 600 keys with the longest names and receipts.
	maxResponseSize = 4 << 20
	// maxHeaderSize in bytes, of all headers of a call.
	maxHeaderSize = 16 << 10
	// Buffers of a connection, in bytes. Requests are small, and 10,000 idle
	// connections each keep one for reading; gRPC shares those for writing.
	readBufferSize  = 8 << 10
	writeBufferSize = 32 << 10
	// streamWorkers serve calls on stacks that have grown already. A worker waits
	// with its call for the audit log, so there are as many as calls are under
	// way at once; with more calls than that, gRPC starts goroutines.
	streamWorkers = 128
)

// Config is what a Server stands on.
type Config struct {
	// Certs accept the connections and name the callers.
	Certs *certs.Server
	// Metrics receives the server's metrics. Nil: nobody sees them.
	Metrics prometheus.Registerer
	// Log receives faults on our side. Nothing is logged if nil.
	Log *slog.Logger
	// Now is the clock, time.Now if nil.
	Now func() time.Time

	// Exports has the recipients of ExportContentKeys. Nil: there is none.
	Exports Exporter

	// Version is that of the daemon, for the status.
	Version string
	// EarlyStatus answers GetStatus until there is a Custody: it decides, from
	// the configuration alone, whether the caller may have it. Nil: nobody may.
	EarlyStatus func(context.Context, custodian.Caller) (custodian.Status, error)

	// RetrieveDeadline is the hard cap on a callback, 250 ms if zero. Deadline is
	// that of the other calls, 30 s if zero, and BackupDeadline that of a backup,
	// one hour if zero. A caller's own deadline counts where it is shorter.
	RetrieveDeadline time.Duration
	Deadline         time.Duration
	BackupDeadline   time.Duration
	// MaxStreams is how many calls one connection may have under way, 512 if
	// zero.
	MaxStreams uint32
	// MaxConnectionAge is when a connection is asked to be made anew, one hour
	// if zero, so that callers spread over daemons and certificates are shown
	// again.
	MaxConnectionAge time.Duration
}

func (c *Config) setDefaults() {
	if c.Metrics == nil {
		c.Metrics = prometheus.NewRegistry()
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	for _, d := range []struct {
		set     *time.Duration
		instead time.Duration
	}{
		{&c.RetrieveDeadline, 250 * time.Millisecond},
		{&c.Deadline, 30 * time.Second},
		{&c.BackupDeadline, time.Hour},
		{&c.MaxConnectionAge, time.Hour},
	} {
		if *d.set <= 0 {
			*d.set = d.instead
		}
	}
	if c.MaxStreams == 0 {
		c.MaxStreams = 512
	}
}

// A Server serves the domain over mutual TLS. Until SetCustody, every call but
// GetStatus is answered STARTING, or what SetUnavailable said.
type Server struct {
	config  Config
	grpc    *grpc.Server
	codec   *codec
	metrics *metrics
	// draining is closed when no new calls are taken.
	draining chan struct{}
	primers  *primers
	repeats  *repeats

	// serving is replaced as a whole.
	serving atomic.Pointer[serving]
}

// A serving is a custody and what it last said of itself, or why there is none.
type serving struct {
	custody   Custody
	err       error
	readiness readiness
}

// NewServer makes a server that is STARTING.
func NewServer(c Config) (*Server, error) {
	if c.Certs == nil {
		return nil, errors.New("rpc server: no certificates")
	}
	// gRPC reads this variable by itself and would write whole messages, keys
	// among them, to a file.
	if os.Getenv("GRPC_BINARY_LOG_FILTER") != "" {
		return nil, errors.New("rpc server: GRPC_BINARY_LOG_FILTER is set: it would write keys to a file; unset it")
	}
	c.setDefaults()
	s := &Server{config: c, codec: newCodec(), draining: make(chan struct{}), repeats: newRepeats()}
	var err error
	if s.metrics, err = newMetrics(c.Metrics); err != nil {
		return nil, fmt.Errorf("rpc server: %w", err)
	}
	if s.primers, err = newPrimers(runtime.GOMAXPROCS(0)); err != nil {
		return nil, fmt.Errorf("rpc server: %w", err)
	}
	s.SetUnavailable(custodian.ErrStarting)
	s.grpc = grpc.NewServer(
		grpc.Creds(wipingCreds{credentials.NewTLS(c.Certs.TLSConfig()), s}),
		grpc.ForceServerCodecV2(s.codec),
		grpc.UnaryInterceptor(s.unary),
		grpc.StreamInterceptor(s.stream),
		grpc.MaxRecvMsgSize(MaxRequestSize),
		grpc.MaxSendMsgSize(maxResponseSize),
		grpc.MaxHeaderListSize(maxHeaderSize),
		grpc.MaxConcurrentStreams(c.MaxStreams),
		grpc.NumStreamWorkers(streamWorkers),
		grpc.ReadBufferSize(readBufferSize),
		grpc.WriteBufferSize(writeBufferSize), // wipingCreds needs it above zero
		grpc.WaitForHandlers(true),            // whoever closes the custody next may unmap its keys
		grpc.ConnectionTimeout(10*time.Second),
		grpc.KeepaliveParams(keepalive.ServerParameters{
			MaxConnectionAge:      c.MaxConnectionAge,
			MaxConnectionAgeGrace: time.Minute,
			Time:                  30 * time.Second,
			Timeout:               10 * time.Second,
		}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
	)
	s.register(&v1.KeyRetrievalService_ServiceDesc, &retrieval{server: s})
	s.register(&v1.KeyIssuanceService_ServiceDesc, &issuance{server: s})
	s.register(&v1.KeyTransferService_ServiceDesc, &transfer{server: s})
	s.register(&v1.CustodyService_ServiceDesc, &custodyService{server: s})
	s.register(&v1.AuditService_ServiceDesc, &auditService{server: s})
	s.register(&v1.RotationService_ServiceDesc, &rotationService{server: s})
	s.register(&v1.RevocationService_ServiceDesc, &revocationService{server: s})
	s.register(&v1.CeremonyService_ServiceDesc, &ceremonyService{server: s})
	healthv1.RegisterHealthServer(s.grpc, &health{server: s})
	return s, nil
}

// register adds a service whose requests are received by receive.
func (s *Server) register(desc *grpc.ServiceDesc, impl any) {
	checked := *desc
	checked.Methods = make([]grpc.MethodDesc, len(desc.Methods))
	for i, m := range desc.Methods {
		checked.Methods[i] = grpc.MethodDesc{MethodName: m.MethodName,
			Handler: func(srv any, ctx context.Context, next func(any) error, in grpc.UnaryServerInterceptor) (any, error) {
				return m.Handler(srv, ctx, func(message any) error {
					err := receive(next, message)
					if _, ours := errors.AsType[*custodian.InvalidError](err); ours {
						return s.unreceived(ctx, "/"+desc.ServiceName+"/"+m.MethodName, err)
					}
					return err
				}, in)
			}}
	}
	s.grpc.RegisterService(&checked, impl)
}

// SetCustody begins service.
func (s *Server) SetCustody(c Custody) {
	s.codec.arena.Store(c.Arena())
	s.serving.Store(&serving{custody: c})
}

// SetUnavailable ends service, or says why there is none yet: every call but
// GetStatus hears err, which should be ErrStarting, ErrUninitialised or
// ErrSealed of package custodian.
func (s *Server) SetUnavailable(err error) { s.serving.Store(&serving{err: err}) }

// custody is the domain, or why there is none.
func (s *Server) custody() (Custody, error) {
	now := s.serving.Load()
	return now.custody, now.err
}

// untilDrain ends with ctx, and when no new calls are taken: for calls that do
// not end by themselves.
func (s *Server) untilDrain(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	go func() {
		select {
		case <-s.draining:
			cancel()
		case <-ctx.Done():
		}
	}()
	return ctx, cancel
}

// Serve serves on l until ctx ends. Then it takes no new calls, waits up to
// drain for those under way, cancels the others, and closes all connections. It
// closes l. When it returns no call is left, nor a look at the readiness, so
// that the custody can be closed: a call that neither ends nor heeds its context
// keeps it from returning.
func (s *Server) Serve(ctx context.Context, l net.Listener, drain time.Duration) error {
	defer func() { s.serving.Load().readiness.close() }()
	told, stop := context.WithCancel(context.WithoutCancel(ctx))
	var telling sync.WaitGroup
	telling.Go(func() { s.repeats.run(told) })
	defer func() { stop(); telling.Wait() }() // after the last call
	served := make(chan error, 1)
	go func() { served <- s.grpc.Serve(l) }()
	select {
	case err := <-served:
		return err
	case <-ctx.Done():
	}
	close(s.draining)
	force := time.AfterFunc(drain, s.grpc.Stop)
	defer force.Stop()
	s.grpc.GracefulStop()
	return <-served
}
