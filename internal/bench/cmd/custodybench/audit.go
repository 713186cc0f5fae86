package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/audit"
	"github.com/keycustody/custodian/internal/checkpoint"
)

// auditInFlight is with how many calls on their way entries are appended.
var auditInFlight = []int{1, 32, 128}

const (
	auditBatch = 100 // entries in a batch of the logs that are verified
	auditKey   = "audit.pem"
)

// audit is how fast entries get on the disk with the token's signature, and how
// a log of a million entries is verified.
func (r *rig) audit(ctx context.Context) error {
	data := filepath.Join(r.dir, "audit")
	if _, err := r.prepare(ctx, data, 1); err != nil {
		return err
	}
	small, big := filepath.Join(r.dir, "audit-small"), filepath.Join(r.dir, "audit-big")
	for dir, n := range map[string]int{small: r.scale.million / 10, big: r.scale.million} {
		var made seeded
		if err := call(ctx, &made, roleAuditMake, "-dir", dir, "-entries", strconv.Itoa(n)); err != nil {
			return err
		}
	}
	for range r.scale.rounds {
		var perSecond []float64
		if err := call(ctx, &perSecond, roleAuditAppend, "-dir", data, "-warm", (r.scale.warm / 2).String(), "-time", (r.scale.time / 2).String()); err != nil {
			return err
		}
		for i, n := range auditInFlight {
			r.table.add(fmt.Sprintf("audit_entries_per_s_c%d", n), perSecond[i])
		}
		var few, many verified
		if err := call(ctx, &few, roleAuditVerify, "-dir", small); err != nil {
			return err
		}
		if err := call(ctx, &many, roleAuditVerify, "-dir", big); err != nil {
			return err
		}
		r.table.add("audit_verify_entries_per_s", float64(many.Entries)/many.Seconds)
		r.table.add("audit_verify_peak_mb_100k", few.PeakBytes/1e6)
		r.table.add("audit_verify_peak_mb_1m", many.PeakBytes/1e6)
		r.table.add("audit_verify_peak_1m_vs_100k", many.PeakBytes/few.PeakBytes)
		var p proved
		if err := call(ctx, &p, roleAuditProve, "-dir", big, "-index", strconv.Itoa(r.scale.million/3)); err != nil {
			return err
		}
		r.table.add("audit_proof_ms_1m", 1000*p.Seconds)
		r.table.add("audit_proof_check_us_1m", p.CheckMicros)
		r.table.add("audit_proof_bytes_1m", float64(p.Bytes))
	}
	return nil
}

// auditEntry is one as the callback writes it.
func auditEntry(i int) audit.Entry {
	return audit.Entry{Action: string(custodian.ActionRelease), Outcome: audit.Allowed,
		Caller: identity(custodian.RoleProvider), Role: string(custodian.RoleProvider), RequestID: fmt.Sprintf("00000000-0000-4000-8000-%012d", i),
		Category: string(category), ContentID: []byte(contentID(i)), TrackType: "HD", Scheme: string(custodian.SchemeCENC),
		Generation: 1, KID: make([]byte, custodian.KIDSize), KeyVersion: string(category) + "/1", ControlRevision: 2}
}

// auditAppend appends entries one by one, with several calls in flight, to a log
// that the token signs, and prints how many a second of each.
func auditAppend(ctx context.Context, args []string) (err error) {
	fs := flag.NewFlagSet(roleAuditAppend, flag.ContinueOnError)
	dir := fs.String("dir", "", "folder of a custody")
	warm := fs.Duration("warm", 0, "how long before it is measured")
	length := fs.Duration("time", 0, "how long it is measured")
	if err := fs.Parse(args); err != nil {
		return err
	}
	c, err := openCustody(ctx, *dir, nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.close(context.WithoutCancel(ctx))) }()
	var perSecond []float64
	for _, n := range auditInFlight {
		v, err := appendPerSecond(ctx, c.log, n, *warm, *length)
		if err != nil {
			return err
		}
		perSecond = append(perSecond, v)
	}
	return json.NewEncoder(os.Stdout).Encode(perSecond)
}

func appendPerSecond(ctx context.Context, log *audit.Log, inFlight int, warm, length time.Duration) (float64, error) {
	var done atomic.Int64
	stop := make(chan struct{})
	g, gctx := errgroup.WithContext(ctx)
	for i := range inFlight {
		g.Go(func() error {
			entries := []audit.Entry{auditEntry(i)}
			for {
				select {
				case <-stop:
					return nil
				default:
				}
				if _, err := log.Append(gctx, entries); err != nil {
					return err
				}
				done.Add(1)
			}
		})
	}
	pause(gctx, warm)
	before, start := done.Load(), time.Now()
	pause(gctx, length)
	n, took := done.Load()-before, time.Since(start)
	close(stop)
	return float64(n) / took.Seconds(), g.Wait()
}

// auditMake makes a log that a key signs which is then forgotten.
func auditMake(ctx context.Context, args []string) (err error) {
	fs := flag.NewFlagSet(roleAuditMake, flag.ContinueOnError)
	dir := fs.String("dir", "", "folder of the log, which must not exist")
	n := fs.Int("entries", 0, "how many")
	if err := fs.Parse(args); err != nil {
		return err
	}
	start := time.Now()
	log, err := audit.Create(*dir, audit.Options{Log: stderrLog()})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, log.Close()) }()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(*dir, auditKey), checkpoint.FormatKey(der), 0o600); err != nil {
		return err
	}
	origin := checkpoint.Origin(log.ID())
	signer, err := checkpoint.NewSigner(origin, key)
	if err != nil {
		return err
	}
	if err := log.SignWith(audit.Signer{
		Sign: func(size uint64, root [32]byte) ([]byte, error) {
			return checkpoint.Checkpoint{Origin: origin, Size: size, Root: root}.Sign(signer)
		},
		Check: func([]byte) error { return nil }, // the log is new
	}); err != nil {
		return err
	}
	for i := 0; i < *n; i += auditBatch {
		entries := make([]audit.Entry, min(auditBatch, *n-i))
		for j := range entries {
			entries[j] = auditEntry(i + j)
		}
		if _, err := log.Append(ctx, entries); err != nil {
			return err
		}
	}
	return json.NewEncoder(os.Stdout).Encode(seeded{*n, time.Since(start).Seconds()})
}

// A verified is what auditVerify tells its parent.
type verified struct {
	Entries   uint64
	Seconds   float64
	PeakBytes float64 // the most memory that the process ever had
}

// auditVerify verifies a log with all its signatures.
func auditVerify(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet(roleAuditVerify, flag.ContinueOnError)
	dir := fs.String("dir", "", "folder of the log")
	if err := fs.Parse(args); err != nil {
		return err
	}
	check, err := auditCheck(*dir)
	if err != nil {
		return err
	}
	start := time.Now()
	rep, err := audit.Verify(ctx, *dir, audit.VerifyOptions{Check: check})
	if err != nil {
		return err
	}
	v := verified{Entries: rep.Entries, Seconds: time.Since(start).Seconds()}
	var usage unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &usage); err != nil {
		return err
	}
	v.PeakBytes = float64(usage.Maxrss) * 1024
	return json.NewEncoder(os.Stdout).Encode(v)
}

// auditCheck decides on the signatures of a log of auditMake.
func auditCheck(dir string) (func(signed []byte) error, error) {
	text, err := os.ReadFile(filepath.Join(dir, auditKey))
	if err != nil {
		return nil, err
	}
	key, err := checkpoint.ParseKey(text)
	if err != nil {
		return nil, err
	}
	return func(signed []byte) error {
		_, err := checkpoint.Verify(signed, key)
		return err
	}, nil
}

// A proved is what auditProve tells its parent.
type proved struct {
	Seconds     float64 // of making the proof
	CheckMicros float64 // of checking it, with the signature
	Bytes       int     // of it, with checkpoint and leaf hash
}

// auditProve proves an entry of a log to the newest checkpoint, and checks that.
func auditProve(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet(roleAuditProve, flag.ContinueOnError)
	dir := fs.String("dir", "", "folder of the log")
	index := fs.Uint64("index", 0, "of the entry")
	if err := fs.Parse(args); err != nil {
		return err
	}
	check, err := auditCheck(*dir)
	if err != nil {
		return err
	}
	start := time.Now()
	p, err := audit.ProveInclusion(ctx, *dir, *index, 0)
	if err != nil {
		return err
	}
	out := proved{Seconds: time.Since(start).Seconds(), Bytes: 32*(len(p.Hashes)+1) + len(p.Checkpoint)}
	start = time.Now()
	if err := check(p.Checkpoint); err != nil {
		return err
	}
	c, err := checkpoint.Parse(p.Checkpoint)
	if err == nil {
		err = c.CheckInclusion(p.Entry.Index, p.LeafHash, p.Hashes)
	}
	if err != nil {
		return err
	}
	out.CheckMicros = micros(time.Since(start))
	return json.NewEncoder(os.Stdout).Encode(out)
}
