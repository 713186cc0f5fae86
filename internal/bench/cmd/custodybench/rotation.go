package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/rpc"
)

const roleRotate = "serve-rotation"

// A moment is how far a rotation was.
type moment struct {
	At   time.Time
	Done uint64
}

// serveRotation is the callback's server, which rotates the category's KEK
// each time it gets SIGUSR1, and writes down how that went when it is held.
func serveRotation(ctx context.Context, args []string) (err error) {
	f, err := parseServer(roleRotate, args)
	if err != nil {
		return err
	}
	tls, err := serverCerts(f.pki)
	if err != nil {
		return err
	}
	c, err := openCustody(ctx, f.dir, nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.close(context.WithoutCancel(ctx))) }()
	s, err := rpc.NewServer(rpc.Config{Certs: tls, Log: stderrLog()})
	if err != nil {
		return err
	}
	s.SetCustody(c.custodian)
	order := make(chan os.Signal, 1)
	signal.Notify(order, unix.SIGUSR1)
	defer signal.Stop(order)
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error { tls.Run(gctx, 5*time.Second); return nil })
	g.Go(func() error { c.custodian.RunRotations(gctx); return nil })
	g.Go(func() error {
		for {
			select {
			case <-gctx.Done():
				return nil
			case <-order:
				if err := c.rotate(gctx, f.dir); err != nil && gctx.Err() == nil {
					return err
				}
			}
		}
	})
	g.Go(func() error { return listen(f, func(l net.Listener) error { return s.Serve(gctx, l, drain) }) })
	return g.Wait()
}

func momentsFile(dir string) string { return filepath.Join(dir, "rotation.json") }

// rotate does one rotation: it moves every content key of the category.
func (c *custody) rotate(ctx context.Context, dir string) error {
	r, err := c.custodian.StartRotation(ctx, officer, custodian.RotationOrder{Kind: custodian.RotateKEK, Category: category, Cause: "benchmark"})
	if err != nil {
		return err
	}
	var moments []moment
	for {
		list, err := c.custodian.Rotations(ctx, officer)
		if err != nil {
			return err
		}
		for _, s := range list {
			if s.Name != r.Name() {
				continue
			}
			if s.LastError != "" {
				return fmt.Errorf("rotation %s: %s", s.Name, s.LastError)
			}
			if s.Step == custodian.StepRewrap && s.Total > 0 {
				moments = append(moments, moment{time.Now(), s.Done})
			}
			if s.Step == custodian.StepHold {
				if _, err := c.custodian.RetireRotation(ctx, officer, "", s.Name); err != nil {
					return err
				}
				b, err := json.Marshal(moments)
				if err != nil {
					return err
				}
				if err := os.WriteFile(momentsFile(dir)+".new", b, 0o600); err != nil {
					return err
				}
				return os.Rename(momentsFile(dir)+".new", momentsFile(dir))
			}
		}
		pause(ctx, 20*time.Millisecond)
		if ctx.Err() != nil {
			return nil
		}
	}
}

// rotation is how fast content keys move to a new KEK while callbacks go on,
// and what callbacks notice of it.
func (r *rig) rotation(ctx context.Context) error {
	data := filepath.Join(r.dir, "rotation")
	if _, err := r.prepare(ctx, data, r.scale.rotated); err != nil {
		return err
	}
	s, err := r.serve(ctx, roleRotate, "rotation", "-dir", data)
	if err != nil {
		return err
	}
	spec := loadSpec{methodRetrieve, 2, 1, kidsFile(data)}
	for range r.scale.rounds {
		quiet, err := r.load(ctx, s, spec)
		if err != nil {
			return err
		}
		if err := s.cmd.Process.Signal(unix.SIGUSR1); err != nil {
			return err
		}
		began := time.Now()
		busy, err := r.load(ctx, s, spec)
		if err != nil {
			return err
		}
		ended := time.Now()
		moments, err := takeMoments(ctx, data)
		if err != nil {
			return err
		}
		var tokenOps float64
		if err := call(ctx, &tokenOps, roleToken, "-dir", filepath.Join(r.dir, "token"), "-time", (r.scale.time / 2).String()); err != nil {
			return err
		}
		rate, err := rateBetween(moments, began, ended)
		if err != nil {
			return err
		}
		r.table.add("rewrap_ceks_per_s", rate)
		// Three operations move a key: open, seal, open again.
		r.table.add("rewrap_vs_token_rate", 3*rate/tokenOps)
		r.table.add("callback_p99_us_rewrap", busy.P99)
		r.table.add("callback_p99_us_quiet", quiet.P99)
		r.table.add("callback_p99_rewrap_vs_quiet", busy.P99/quiet.P99)
		r.table.add("callback_per_s_rewrap_vs_quiet", busy.callsPerSecond()/quiet.callsPerSecond())
		bytes, err := s.anonymous()
		if err != nil {
			return err
		}
		r.table.add("rss_anon_mb_rewrap", bytes/1e6)
	}
	return r.stopAll()
}

// takeMoments waits for the end of a rotation and takes its moments away.
func takeMoments(ctx context.Context, dir string) (moments []moment, err error) {
	for {
		b, err := os.ReadFile(momentsFile(dir))
		if err == nil {
			return moments, errors.Join(json.Unmarshal(b, &moments), os.Remove(momentsFile(dir)))
		}
		if !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		pause(ctx, 50*time.Millisecond)
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
	}
}

// rateBetween is how many records a second moved while there was load.
func rateBetween(moments []moment, began, ended time.Time) (float64, error) {
	var under []moment
	for _, m := range moments {
		if m.At.After(began) && m.At.Before(ended) {
			under = append(under, m)
		}
	}
	if len(under) < 2 {
		return 0, fmt.Errorf("a rotation was seen %d times under load; there are too few keys", len(under))
	}
	first, last := under[0], under[len(under)-1]
	return float64(last.Done-first.Done) / last.At.Sub(first.At).Seconds(), nil
}
