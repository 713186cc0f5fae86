package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/keycustody/custodian/certs"
	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/hsm"
	"github.com/keycustody/custodian/internal/anchor"
	"github.com/keycustody/custodian/internal/kafka"
	"github.com/keycustody/custodian/internal/packager"
	"github.com/keycustody/custodian/internal/rpc"
	"github.com/keycustody/custodian/store"
)

// A daemon serves one configuration.
type daemon struct {
	config      *Config
	path        string // of the configuration, for SIGHUP
	log         *slog.Logger
	confirmTime bool
	onReady     func(listen, admin net.Addr) // dev mode says so

	certs   *certs.Server
	server  *rpc.Server
	metrics *prometheus.Registry
	outages *custodian.Outages
	// packagers and its address are nil where no listener for them is configured.
	packagers    *packager.Server
	packagerAddr net.Addr
	exports      *packager.Exports
	book         *incidentBook
	webhook      *webhook // nil: nobody is told of incidents
	anchors      *anchor.Set
	events       *kafka.Source // has no topics where none are configured
	custody      *custodian.Custodian
	parts        parts
	// tokenKeys of the issuers of licence tokens; a reload keeps them.
	tokenKeys tokenKeySets

	// mu guards the fields below.
	mu      sync.Mutex
	policy  *custodian.Policy // of the grants that were loaded last
	adopted bool              // custody has the policy, and takes a new one
}

// run is the order of start and stop. Listeners first: while token, KMS or
// store are away, callers hear STARTING and the supervisor sees a live
// process. Then the parts, again and again until they open. Stop goes
// backwards: no new calls, calls drained, then the domain, then the parts.
func (d *daemon) run(ctx context.Context) (err error) {
	// From here on, long before there is service, SIGHUP does not end the process.
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)
	d.metrics = prometheus.NewRegistry()
	sources, sets, err := newTokenSources(ctx, d.config.Tokens, d.metrics, d.log)
	if err != nil {
		return fmt.Errorf("tokens: %w", err)
	}
	d.tokenKeys = sets
	policy, err := d.config.policy(sets)
	if err != nil {
		return err
	}
	d.policy = policy
	if d.certs, err = certs.NewServer(d.config.serverCerts(d.log)); err != nil {
		return err
	}
	_, recipients, err := d.config.CPIX.load()
	if err != nil {
		return err
	}
	d.exports = packager.NewExports(recipients)
	d.server, err = rpc.NewServer(rpc.Config{Certs: d.certs, Exports: d.exports, Metrics: d.metrics, Log: d.log, Version: version,
		EarlyStatus: d.earlyStatus(), RetrieveDeadline: d.config.Limits.CallbackDeadline})
	if err != nil {
		return err
	}
	d.book = openIncidentBook(d.config.incidentsPath(), d.config.KMS.Webhook.URL != "", d.log)
	d.outages = custodian.NewOutages(time.Now, d.log, d.book.tell, d.book.open())
	if d.webhook, err = newWebhook(d.config.KMS.Webhook, d.book, d.log); err != nil {
		return err
	}
	l, err := d.listen()
	if err != nil {
		return err
	}
	d.log.Info("listening", "listen", l.grpc.Addr().String(), "admin", l.admin.Addr().String())
	// The parts outlive the calls that use them.
	defer func() { err = errors.Join(err, d.closeParts(context.WithoutCancel(ctx))) }()

	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error { return d.server.Serve(gctx, l.grpc, d.config.Limits.DrainTimeout) })
	g.Go(func() error { return d.serveAdmin(gctx, l.admin) })
	if l.packagers != nil {
		g.Go(func() error { return d.servePackagers(gctx, l.packagers) })
	}
	if l.twin != nil {
		g.Go(func() error { return d.server.ServeTwin(gctx, l.twin, d.config.Limits.DrainTimeout) })
	}
	g.Go(func() error { d.certs.Run(gctx, 5*time.Second); return nil })
	g.Go(func() error { d.heedHangups(gctx, hup); return nil })
	for _, s := range sources {
		g.Go(func() error { s.run(gctx); return nil })
	}
	if d.webhook != nil {
		g.Go(func() error { d.webhook.run(gctx); return nil })
	}
	g.Go(func() error { return d.begin(gctx, policy, l.grpc.Addr(), l.admin.Addr()) })
	return g.Wait()
}

// listeners are the daemon's; packagers and twin are nil where there are none.
type listeners struct{ grpc, admin, packagers, twin net.Listener }

// listen opens all listeners, or none.
func (d *daemon) listen() (l listeners, err error) {
	defer func() {
		if err != nil {
			l.close()
		}
	}()
	if l.grpc, err = net.Listen("tcp", d.config.Listen); err != nil {
		return l, fmt.Errorf("listen: %w", err)
	}
	if l.admin, err = net.Listen("tcp", d.config.AdminListen); err != nil {
		return l, fmt.Errorf("admin_listen: %w", err)
	}
	if l.packagers, err = d.listenPackagers(); err != nil {
		return l, err
	}
	l.twin, err = d.listenTwin()
	return l, err
}

func (l listeners) close() {
	for _, one := range []net.Listener{l.grpc, l.admin, l.packagers, l.twin} {
		if one != nil {
			one.Close()
		}
	}
}

// begin opens the parts and begins service, then keeps house until ctx ends.
func (d *daemon) begin(ctx context.Context, policy *custodian.Policy, listen, admin net.Addr) error {
	starting, started := context.WithCancel(ctx)
	var ticking sync.WaitGroup
	ticking.Go(func() { everySecond(starting, d.outages.Tick) }) // an outage that keeps us from starting is one, too
	defer ticking.Wait()
	defer started()
	for wait := time.Second; ; wait = min(2*wait, 30*time.Second) {
		err := d.open(ctx, policy)
		if err == nil {
			break
		}
		if ctx.Err() != nil {
			return nil
		}
		if cerr := d.closeParts(ctx); cerr != nil {
			d.log.Warn("closing what was open", "err", cerr)
		}
		switch fatal := d.explainStart(err, wait); {
		case errors.Is(fatal, errSealed):
			<-ctx.Done()
			return nil
		case fatal != nil:
			return fatal
		}
		if !sleep(ctx, wait) {
			return nil
		}
	}
	started()
	d.registerMetrics()
	d.server.SetCustody(d.custody)
	d.log.Info("serving", "listen", listen.String(), "admin", admin.String(), "version", version)
	if d.onReady != nil {
		d.onReady(listen, admin)
	}
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error { return d.keepHouse(gctx) })
	g.Go(func() error { d.custody.RunRotations(gctx); return nil })
	g.Go(func() error { d.custody.RunHotTitles(gctx); return nil })
	g.Go(func() error { d.pruneLog(gctx); return nil })
	// Two of them: a KMS that hangs holds its probe up, but not the incident.
	g.Go(func() error { everySecond(gctx, func() { d.custody.ProbeKMS(gctx) }); return nil })
	g.Go(func() error { everySecond(gctx, d.custody.TickKMS); return nil })
	g.Go(func() error { d.custody.RunRewraps(gctx); return nil })
	g.Go(func() error { everySecond(gctx, func() { d.custody.TickBudgets(gctx) }); return nil })
	g.Go(func() error { d.events.Run(gctx, d.custody); return nil })
	g.Go(func() error { return d.anchors.Run(gctx) })
	g.Go(func() error { d.custody.KeepIndex(gctx); return nil })
	return g.Wait()
}

func everySecond(ctx context.Context, f func()) {
	for sleep(ctx, time.Second) {
		f()
	}
}

// explainStart tells callers and operators why there is no service yet. It
// returns err where starting again would not help.
func (d *daemon) explainStart(err error, wait time.Duration) error {
	switch {
	case errors.Is(err, custodian.ErrUninitialised):
		d.server.SetUnavailable(custodian.ErrUninitialised)
		d.log.Warn("not initialised; run custodiand init -config "+d.path, "again_in", wait.String())
	case errors.Is(err, hsm.ErrPIN), errors.Is(err, hsm.ErrLatched):
		// Never again by itself: another try could lock the token for good.
		d.server.SetUnavailable(custodian.ErrSealed)
		d.log.Error("sealed by the PIN latch until this process is started again", "err", err)
		return errSealed
	case errors.Is(err, custodian.ErrConditions):
		return usageError{fmt.Errorf("config %s: %w", d.path, err)}
	case isIntegrity(err):
		return err
	default:
		d.server.SetUnavailable(custodian.ErrStarting)
		d.log.Error("not serving yet", "err", err, "again_in", wait.String())
	}
	return nil
}

// errSealed ends the tries to begin, but not the process: status still
// answers, and a supervisor has nothing to restart.
var errSealed = errors.New("sealed by the PIN latch")

func (d *daemon) open(ctx context.Context, policy *custodian.Policy) (err error) {
	have, err := exists(d.config.storePath())
	if err != nil {
		return err
	}
	if !have {
		return d.storeMissing()
	}
	d.parts.logged.Budgets = policy.Budgets()
	if err := d.parts.openStore(ctx, d.config, d.log); err != nil {
		return err
	}
	if err := d.parts.openProviders(ctx, d.config); err != nil {
		return err
	}
	if d.parts.token, err = openToken(ctx, d.config, d.log); err != nil {
		return err
	}
	cfg := d.parts.config(d.config, policy, d.log)
	cfg.ConfirmTime = d.confirmTime
	cfg.Outages = d.outages
	if d.anchors, err = d.newAnchors(); err != nil {
		return err
	}
	cfg.Anchors = d.anchors
	d.events = kafka.New(kafka.Options{Config: d.config.Kafka, Log: d.log})
	cfg.Warnings = d.events.Warnings
	if d.custody, err = custodian.Open(ctx, cfg); err != nil {
		return err
	}
	return d.adopt(ctx, policy)
}

// listenTwin opens the listener of providers without gRPC, if there is one.
func (d *daemon) listenTwin() (net.Listener, error) {
	if d.config.HTTPListen == "" {
		return nil, nil
	}
	l, err := net.Listen("tcp", d.config.HTTPListen)
	if err != nil {
		return nil, fmt.Errorf("http_listen: %w", err)
	}
	d.log.Info("listening for HTTPS", "http", l.Addr().String())
	return l, nil
}

// storeMissing tells an uninitialised place from one that has lost its store:
// an audit log without a store is refused, never initialised again.
func (d *daemon) storeMissing() error {
	have, err := exists(d.config.auditFile())
	if err != nil {
		return err
	}
	if have {
		return fmt.Errorf("%s is there, but %s is not: a custody without its store; put the store back (custodiand restore): %w",
			d.config.auditDir(), d.config.storePath(), custodian.ErrRecordCorrupt)
	}
	return custodian.ErrUninitialised
}

func (d *daemon) closeParts(ctx context.Context) error {
	var err error
	if d.custody != nil {
		err = d.custody.Close()
		d.custody = nil
	}
	return errors.Join(err, d.parts.close(ctx))
}

// keepHouse keeps the highest time seen.
func (d *daemon) keepHouse(ctx context.Context) error {
	tick := time.NewTicker(time.Minute)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			if err := d.custody.Tick(ctx); err != nil {
				d.log.Error("keeping the highest time seen", "err", err)
			}
			if err := d.custody.WarnMEK(ctx, d.tellMEK); err != nil {
				d.log.Error("the end of the MEK is told again", "err", err)
			}
		}
	}
}

// earlyStatus answers GetStatus before there is a custody, to whom the
// configuration lets see it.
func (d *daemon) earlyStatus() func(context.Context, custodian.Caller) (custodian.Status, error) {
	started := time.Now().UTC()
	return func(_ context.Context, who custodian.Caller) (custodian.Status, error) {
		now := time.Now().UTC()
		if dec := d.lastPolicy().Decide(custodian.Request{Caller: who, Action: custodian.ActionReadStatus, Now: now}); !dec.Allow {
			return custodian.Status{}, dec.Err
		}
		return custodian.Status{Time: now, Started: started, Warnings: append([]string{"no keys are served yet; the daemon's log says why"}, d.outages.Warnings()...)}, nil
	}
}

func (d *daemon) serveAdmin(ctx context.Context, l net.Listener) error {
	s := &http.Server{Handler: d.server.AdminHandler(d.metrics), ReadHeaderTimeout: 5 * time.Second, ErrorLog: slog.NewLogLogger(d.log.Handler(), slog.LevelWarn)}
	stop := context.AfterFunc(ctx, func() { s.Close() })
	defer stop()
	if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("admin listener: %w", err)
	}
	return nil
}

// sleep waits for d; false means that ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

func migrateStore(ctx context.Context, c *Config, log *slog.Logger) error {
	backup := fmt.Sprintf("%s.before-migration-%s", c.storePath(), time.Now().UTC().Format("20060102T150405Z"))
	if err := store.Migrate(ctx, c.storePath(), backup, store.Options{Log: log}); err != nil {
		return fmt.Errorf("migrate: %w", err)
	}
	return nil
}
