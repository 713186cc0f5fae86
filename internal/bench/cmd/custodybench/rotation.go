package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/admission"
	"github.com/keycustody/custodian/internal/rpc"
)

const roleRotate = "serve-rotation"

// A moment is how far a rotation was.
type moment struct {
	At   time.Time
	Done uint64
}

// A course is how a rotation went.
type course struct {
	Moments []moment
	// Off is by how much its progress was wrong at most, as a share of all: what
	// it said is held against the records at each eighth of the way.
	Off float64
	// Memory is what the process has at each of these, in bytes.
	Memory []float64
}

// grown is how much more memory there was in the second half than in the first.
func (c course) grown() float64 {
	half := len(c.Memory) / 2
	if half == 0 {
		return math.NaN()
	}
	return slices.Max(c.Memory[half:]) / slices.Max(c.Memory[:half])
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

func courseFile(dir string) string { return filepath.Join(dir, "rotation.json") }

// rotate does one rotation: it moves every content key of the category.
func (c *custody) rotate(ctx context.Context, dir string) error {
	r, err := c.custodian.StartRotation(ctx, officer, custodian.RotationOrder{Kind: custodian.RotateKEK, Category: category, Cause: "benchmark"})
	if err != nil {
		return err
	}
	var went course
	for eighth := uint64(1); ctx.Err() == nil; pause(ctx, 20*time.Millisecond) {
		s, err := c.progress(ctx, r)
		if err != nil {
			return err
		}
		if s.Step == custodian.StepRewrap && s.Total > 0 {
			went.Moments = append(went.Moments, moment{time.Now(), s.Done})
			if s.Done*8 >= s.Total*eighth {
				eighth = s.Done*8/s.Total + 1
				off, err := c.progressOff(ctx, r, s)
				if err != nil {
					return err
				}
				memory, err := anonymous(os.Getpid())
				if err != nil {
					return err
				}
				went.Off, went.Memory = max(went.Off, off), append(went.Memory, memory)
			}
		}
		if s.Step == custodian.StepHold {
			if _, err := c.custodian.RetireRotation(ctx, officer, "", s.Name); err != nil {
				return err
			}
			return writeCourse(dir, went)
		}
	}
	return nil
}

// progress is what the daemon says of a rotation.
func (c *custody) progress(ctx context.Context, r custodian.Rotation) (custodian.RotationStatus, error) {
	list, err := c.custodian.Rotations(ctx, officer)
	if err != nil {
		return custodian.RotationStatus{}, err
	}
	i := slices.IndexFunc(list, func(s custodian.RotationStatus) bool { return s.Name == r.Name() })
	if i < 0 {
		return custodian.RotationStatus{}, fmt.Errorf("rotation %s is not listed", r.Name())
	}
	if list[i].LastError != "" {
		return list[i], fmt.Errorf("rotation %s: %s", r.Name(), list[i].LastError)
	}
	return list[i], nil
}

// progressOff counts the records that have not moved, and says by how much a
// rotation's progress is wrong. It goes on meanwhile, so anything between what
// it said before and what it says afterwards is right.
func (c *custody) progressOff(ctx context.Context, r custodian.Rotation, before custodian.RotationStatus) (float64, error) {
	left := uint64(0)
	for _, version := range r.From {
		var after custodian.KID
		for {
			admission.StandBack() // what is measured meanwhile is not this
			var kids []custodian.KID
			err := c.store.View(ctx, func(tx custodian.Tx) (err error) {
				kids, err = tx.KeysUnderKEK(custodian.KEKID{Category: r.Category, Version: version}, after, 512)
				return err
			})
			if err != nil {
				return 0, err
			}
			if len(kids) == 0 {
				break
			}
			left, after = left+uint64(len(kids)), kids[len(kids)-1]
		}
	}
	now, err := c.progress(ctx, r)
	if err != nil {
		return 0, err
	}
	if now.Step != custodian.StepRewrap {
		now.Done = now.Total
	}
	moved := before.Total - left
	off := max(float64(before.Done)-float64(moved), float64(moved)-float64(now.Done), 0)
	return off / float64(before.Total), nil
}

func writeCourse(dir string, went course) error {
	b, err := json.Marshal(went)
	if err != nil {
		return err
	}
	if err := os.WriteFile(courseFile(dir)+".new", b, 0o600); err != nil {
		return err
	}
	return os.Rename(courseFile(dir)+".new", courseFile(dir))
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
		went, err := takeCourse(ctx, data)
		if err != nil {
			return err
		}
		var tokenOps float64
		if err := call(ctx, &tokenOps, roleToken, "-dir", filepath.Join(r.dir, "token"), "-time", (r.scale.time / 2).String()); err != nil {
			return err
		}
		rate, err := rateBetween(went.Moments, began, ended)
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
		r.table.add("rss_rewrap_second_vs_first_half", went.grown())
		r.table.add("rewrap_progress_off", went.Off)
	}
	return r.stopAll()
}

// takeCourse waits for the end of a rotation and takes away what is written of
// it.
func takeCourse(ctx context.Context, dir string) (went course, err error) {
	for {
		b, err := os.ReadFile(courseFile(dir))
		if err == nil {
			return went, errors.Join(json.Unmarshal(b, &went), os.Remove(courseFile(dir)))
		}
		if !errors.Is(err, os.ErrNotExist) {
			return went, err
		}
		pause(ctx, 50*time.Millisecond)
		if ctx.Err() != nil {
			return went, ctx.Err()
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
