package main

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/hsm"
	"github.com/keycustody/custodian/internal/audit"
	"github.com/keycustody/custodian/internal/rpc"
	"github.com/keycustody/custodian/kms"
	"github.com/keycustody/custodian/softhsm"
	"github.com/keycustody/custodian/store"
)

// category is the one that all content of a benchmark is in.
const category custodian.CategoryName = "movies"

// contentID names the content item that a batch of seeded keys is for.
func contentID(batch int) custodian.ContentID {
	return custodian.ContentID(fmt.Sprintf("content-%08d", batch))
}

var (
	officer  = custodian.Caller{ID: identity(custodian.RoleOfficer), Roles: []custodian.Role{custodian.RoleOfficer}, SPKI: [32]byte{1}}
	packager = custodian.Caller{ID: identity(custodian.RolePackager), Roles: []custodian.Role{custodian.RolePackager}}
)

func stderrLog() *slog.Logger {
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
}

// A custody is the domain on real parts in one folder: a SoftHSM token, a
// bbolt store and an audit log.
type custody struct {
	custodian *custodian.Custodian
	config    custodian.Config
	token     *hsm.Token
	store     *store.Store
	log       *audit.Log
}

// sumsFile has the SHA-256 of each key, in the order of kidsFile.
func sumsFile(dir string) string { return filepath.Join(dir, "sums") }

func kidsFile(dir string) string { return filepath.Join(dir, "kids") }

// openParts opens what a Custodian stands on, or makes it anew.
func openParts(ctx context.Context, dir string, create bool) (_ *custody, err error) {
	c := &custody{}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.close(ctx))
		}
	}()
	token, err := softhsm.Provision(ctx, softhsm.Options{Dir: filepath.Join(dir, "token"), Label: "bench"})
	if err != nil {
		return nil, err
	}
	log := stderrLog()
	config := token.Config()
	config.Log = log
	if tokenModule != "" {
		config.Module = tokenModule
	}
	if c.token, err = hsm.Open(ctx, config); err != nil {
		return nil, err
	}
	openStore, openLog := store.Open, audit.Open
	if create {
		openStore, openLog = store.Create, audit.Create
	}
	var logged custodian.Logged
	if c.store, err = openStore(ctx, filepath.Join(dir, "store.db"), store.Options{Log: log}); err != nil {
		return nil, err
	}
	if c.log, err = openLog(filepath.Join(dir, "audit"), audit.Options{Visit: logged.Visit, Log: log}); err != nil {
		return nil, err
	}
	local, err := kms.Open(ctx, kms.Config{Name: "local", Kind: kms.KindLocal})
	if err != nil {
		return nil, err
	}
	policy, err := custodian.NewPolicy([]custodian.Grant{
		{Identity: identity(custodian.RoleProvider), Role: custodian.RoleProvider, AllCategories: true},
		{Identity: identity(modestProvider), Role: custodian.RoleProvider, AllCategories: true},
		{Identity: packager.ID, Role: custodian.RolePackager, AllCategories: true},
		{Identity: officer.ID, Role: custodian.RoleOfficer, AllCategories: true, SPKI: &officer.SPKI},
	})
	if err != nil {
		return nil, err
	}
	c.config = custodian.Config{Store: c.store, HSM: kms.Token(c.token), Providers: []custodian.Provider{local}, Audit: c.log, Logged: logged,
		Policy: policy, Now: time.Now, Log: log, LabelPrefix: "bench-mek", DefaultProviders: []string{"local"}}
	return c, nil
}

// openCustody opens a folder that prepare has made. change, where it is not
// nil, changes the configuration.
func openCustody(ctx context.Context, dir string, change func(*custodian.Config)) (*custody, error) {
	rpc.TuneRuntime() // as custodiand
	c, err := openParts(ctx, dir, false)
	if err != nil {
		return nil, err
	}
	if change != nil {
		change(&c.config)
	}
	if c.custodian, err = custodian.Open(ctx, c.config); err != nil {
		return nil, errors.Join(err, c.close(ctx))
	}
	return c, nil
}

func (c *custody) close(ctx context.Context) error {
	var errs []error
	if c.custodian != nil {
		errs = append(errs, c.custodian.Close())
	}
	if c.log != nil {
		errs = append(errs, c.log.Close())
	}
	if c.store != nil {
		errs = append(errs, c.store.Close())
	}
	if c.token != nil {
		errs = append(errs, c.token.Close(ctx))
	}
	return errors.Join(errs...)
}

// A seeded is what prepare tells its parent.
type seeded struct {
	Keys    int
	Seconds float64 // of issuing them
}

// prepare makes a custody in a folder, with content keys in it whose KIDs it
// writes to a file.
func prepare(ctx context.Context, args []string) (err error) {
	fs := flag.NewFlagSet(rolePrepare, flag.ContinueOnError)
	dir := fs.String("dir", "", "folder of the data")
	keys := fs.Int("keys", 0, "content keys to make")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if err := initialise(ctx, *dir); err != nil {
		return fmt.Errorf("init: %w", err)
	}
	c, err := openCustody(ctx, *dir, nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.close(context.WithoutCancel(ctx))) }()
	if _, err := c.custodian.CreateCategory(ctx, officer, custodian.CreateCategoryRequest{Name: category}); err != nil {
		return err
	}
	start := time.Now()
	if err := c.seed(ctx, *keys, kidsFile(*dir)); err != nil {
		return fmt.Errorf("seed: %w", err)
	}
	return json.NewEncoder(os.Stdout).Encode(seeded{*keys, time.Since(start).Seconds()})
}

func initialise(ctx context.Context, dir string) (err error) {
	c, err := openParts(ctx, dir, true)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.close(context.WithoutCancel(ctx))) }()
	return custodian.Init(ctx, c.config, custodian.InitSpec{})
}

// seeders is how many batches are on their way at once.
const seeders = 8

// seed issues n keys through the domain, in the largest batches that it takes.
func (c *custody) seed(ctx context.Context, n int, path string) (err error) {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	sumsOut, err := os.Create(sumsFile(filepath.Dir(path)))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, sumsOut.Close()) }()
	kids, sums := bufio.NewWriter(f), bufio.NewWriter(sumsOut)
	var mu sync.Mutex // guards kids and sums
	var done atomic.Int64
	defer progress(n, &done)()

	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(seeders)
	for first := 0; first < n && gctx.Err() == nil; first += custodian.MaxKeysPerIssue {
		g.Go(func() error {
			issued, err := c.issueBatch(gctx, first/custodian.MaxKeysPerIssue, min(custodian.MaxKeysPerIssue, n-first))
			if err != nil {
				return err
			}
			done.Add(int64(len(issued)))
			mu.Lock()
			defer mu.Unlock()
			for _, k := range issued {
				if _, err := kids.Write(k.kid[:]); err != nil {
					return err
				}
				if _, err := sums.Write(k.sum[:]); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err := errors.Join(g.Wait(), ctx.Err()); err != nil {
		return err
	}
	return errors.Join(kids.Flush(), sums.Flush())
}

// A made is one seeded key.
type made struct {
	kid custodian.KID
	sum [sha256.Size]byte // of the key
}

// issueBatch makes n keys of one content item, one for each crypto period.
func (c *custody) issueBatch(ctx context.Context, batch, n int) ([]made, error) {
	req := custodian.IssueRequest{RequestID: "seed", Category: category, ContentID: contentID(batch), Keys: make([]custodian.KeySpec, n)}
	for i := range req.Keys {
		req.Keys[i] = custodian.KeySpec{TrackType: "HD", Scheme: custodian.SchemeCENC, Period: custodian.Period{Set: true, Index: uint32(i)}}
	}
	issued, err := c.custodian.Issue(ctx, packager, req)
	if err != nil {
		return nil, err
	}
	keys := make([]made, len(issued))
	for i := range issued {
		keys[i].kid = issued[i].KID
		issued[i].Key.Use(func(b []byte) { keys[i].sum = sha256.Sum256(b) })
		issued[i].Key.Destroy()
	}
	return keys, nil
}

// progress prints how seeding goes, every few seconds, until its result is
// called.
func progress(n int, done *atomic.Int64) (stop func()) {
	start, end := time.Now(), make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(5 * time.Second)
		defer tick.Stop()
		for {
			select {
			case <-end:
				return
			case <-tick.C:
			}
			d := done.Load()
			rate := float64(d) / time.Since(start).Seconds()
			if d == 0 {
				continue
			}
			note("seeded %d of %d keys, %.0f/s, %s left", d, n, rate, time.Duration(float64(n-int(d))/rate*float64(time.Second)).Round(time.Second))
		}
	})
	return func() { close(end); wg.Wait() }
}

// token measures the token alone: one decryption after the other, of what a
// callback decrypts.
func token(ctx context.Context, args []string) (err error) {
	fs := flag.NewFlagSet(roleToken, flag.ContinueOnError)
	dir := fs.String("dir", "", "folder of the token")
	length := fs.Duration("time", time.Second, "how long to measure")
	if err := fs.Parse(args); err != nil {
		return err
	}
	provisioned, err := softhsm.Provision(ctx, softhsm.Options{Dir: *dir, Label: "bench"})
	if err != nil {
		return err
	}
	config := provisioned.Config()
	config.Log = stderrLog()
	t, err := hsm.Open(ctx, config)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, t.Close(context.WithoutCancel(ctx))) }()
	spec := hsm.MEKSpec{Label: "bench-token", ID: [16]byte{1}, Profile: hsm.Sealed, Start: time.Now(), End: time.Now().Add(24 * time.Hour)}
	if err := t.GenerateMEK(ctx, spec); err != nil { // adopted from the second round on
		return err
	}
	rate, err := decryptRate(ctx, t, spec, *length)
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(rate)
}

// decryptRate is how often a second one caller has a content key decrypted.
func decryptRate(ctx context.Context, t *hsm.Token, spec hsm.MEKSpec, length time.Duration) (float64, error) {
	mek, err := t.OpenMEK(ctx, spec.Label, spec.ID)
	if err != nil {
		return 0, err
	}
	wrapped, err := mek.Generate(ctx, hsm.UseGCM, []byte("bench"))
	if err != nil {
		return 0, err
	}
	key, err := mek.Load(ctx, hsm.UseGCM, []byte("bench"), wrapped)
	if err != nil {
		return 0, err
	}
	defer key.Release()
	aad := make([]byte, 160) // that of a content key
	iv, ct, err := key.Seal(ctx, aad, make([]byte, custodian.CEKSize), nil)
	if err != nil {
		return 0, err
	}
	dst := make([]byte, 2*custodian.CEKSize)
	n, start := 0, time.Now()
	for time.Since(start) < length {
		if _, err := key.Open(ctx, iv, aad, ct, dst); err != nil {
			return 0, err
		}
		n++
	}
	return float64(n) / time.Since(start).Seconds(), nil
}
