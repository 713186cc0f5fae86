package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/audit"
	"github.com/keycustody/custodian/internal/checkpoint"
)

// AuditConfig says how the audit log is kept on disk.
type AuditConfig struct {
	SegmentSize byteSize `yaml:"segment_size"` // of one file; 64MiB
	Limit       byteSize `yaml:"limit"`        // of all files; 0: what the file system has
	// Sealed segments are pruned where all of these that are set let it be; none
	// where none is set.
	KeepSegments int           `yaml:"keep_segments"` // so many stay whole
	KeepFor      time.Duration `yaml:"keep_for"`      // what is younger stays whole
	ArchiveDir   string        `yaml:"archive_dir"`   // has each segment before it is pruned

	// Name is what the origin of the checkpoints begins with, before the log's
	// ID; custodian. It never changes after init.
	Name string `yaml:"name"`
	// Signing is the algorithm of the checkpoints: ecdsa-p256, or ed25519 where
	// the token has it. It counts at init only; ecdsa-p256 where empty.
	Signing custodian.SigningAlgorithm `yaml:"signing"`
}

const (
	minSegmentSize = 1 << 20
	maxSegmentSize = 1 << 40
	minAuditLimit  = 64 << 20 // the reserve, room ahead for two segments, and some entries
)

func (a *AuditConfig) check() []error {
	var faults []error
	fault := func(key, format string, args ...any) {
		faults = append(faults, fmt.Errorf("audit."+key+": "+format, args...))
	}
	if s := a.SegmentSize; s != 0 && (s < minSegmentSize || s > maxSegmentSize) {
		fault("segment_size", "%d: must be 1MiB to 1TiB", s)
	}
	if l := a.Limit; l != 0 && l < minAuditLimit {
		fault("limit", "%d: must be 0, for none, or at least 64MiB", l)
	}
	if a.KeepSegments < 0 {
		fault("keep_segments", "%d: must be 0, for no bound, or more", a.KeepSegments)
	}
	if a.KeepFor < 0 || a.KeepFor > 0 && a.KeepFor < time.Hour {
		fault("keep_for", "%s: must be 0s, for no bound, or at least 1h", a.KeepFor)
	}
	if err := checkpoint.CheckName(a.Name); a.Name != "" && err != nil {
		fault("name", "%q: %w", a.Name, err)
	}
	switch a.Signing {
	case "", custodian.SignECDSAP256, custodian.SignEd25519:
	default:
		fault("signing", "%q: must be %s or %s", a.Signing, custodian.SignECDSAP256, custodian.SignEd25519)
	}
	if a.ArchiveDir == "" {
		return faults
	}
	if a.KeepSegments == 0 && a.KeepFor == 0 {
		fault("archive_dir", "nothing is pruned, and so archived, without audit.keep_segments or audit.keep_for")
	}
	if info, err := os.Stat(a.ArchiveDir); err != nil {
		fault("archive_dir", "%w", err)
	} else if !info.IsDir() {
		fault("archive_dir", "%s: not a directory", a.ArchiveDir)
	}
	return faults
}

func (a *AuditConfig) retention() custodian.LogRetention {
	if a.KeepSegments == 0 && a.KeepFor == 0 {
		return custodian.LogRetention{}
	}
	return custodian.LogRetention{Segments: a.KeepSegments, Age: a.KeepFor, Archive: a.ArchiveDir}
}

func (c *Config) auditOptions(visit func(*audit.Entry) error, log *slog.Logger) audit.Options {
	return audit.Options{Visit: visit, SegmentSize: int64(c.Audit.SegmentSize), Limit: int64(c.Audit.Limit), Log: log}
}

// pruneLog prunes the audit log, a minute after the start and once an hour.
func (d *daemon) pruneLog(ctx context.Context) {
	for wait := time.Minute; sleep(ctx, wait); wait = time.Hour {
		if err := d.custody.PruneLog(ctx, d.config.Audit.retention()); err != nil && ctx.Err() == nil {
			d.log.Error("pruning the audit log", "err", err, "again_in", time.Hour)
		}
	}
}

// A byteSize is a number of bytes, in a configuration with one of the units
// KiB, MiB, GiB and TiB or without.
type byteSize int64

func (b *byteSize) UnmarshalText(text []byte) error {
	digits, shift := string(text), 0
	for i, unit := range []string{"KiB", "MiB", "GiB", "TiB"} {
		if n, ok := strings.CutSuffix(digits, unit); ok {
			digits, shift = n, 10*(i+1)
			break
		}
	}
	n, err := strconv.ParseUint(strings.TrimSpace(digits), 10, 62-shift)
	if err != nil {
		return fmt.Errorf("%q: must be a number of bytes, such as 64MiB", text)
	}
	*b = byteSize(n << shift)
	return nil
}
