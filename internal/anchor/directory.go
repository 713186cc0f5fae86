package anchor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/checkpoint"
)

// A directory keeps one file for each checkpoint, PATH/LOG/SIZE-TIME.checkpoint,
// where LOG is the ID of the log and SIZE has 20 digits. A file is written
// under its name and never again, as storage with object lock wants it.
type directory struct {
	path    string
	checked bool // what was there is held against the log
}

const checkpointSuffix = ".checkpoint"

// maxDamaged is how many files that are no checkpoints of ours are passed over,
// from the newest: what a crash left half-written is one.
const maxDamaged = 1000

func (d *directory) push(ctx context.Context, l custodian.AnchoredLog, c checkpoint.Checkpoint, signed []byte) error {
	// The folder itself is not made: where storage is not mounted, its mount
	// point must not fill up instead.
	dir := filepath.Join(d.path, logOf(l.Origin))
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if !d.checked {
		old, err := newest(dir, l)
		if err != nil {
			return err
		}
		if err := continues(ctx, l, old, c); err != nil {
			return err
		}
		d.checked = true
		if old == c {
			return nil
		}
	}
	return write(filepath.Join(dir, fmt.Sprintf("%020d-%s%s", c.Size, time.Now().UTC().Format("20060102T150405.000000000Z"), checkpointSuffix)), signed)
}

// logOf is the ID of a log, in hexadecimal, with which its origin ends.
func logOf(origin string) string { return origin[strings.LastIndexByte(origin, '/')+1:] }

// newest returns the checkpoint with the most entries; one of no entries where
// there is none. Files that no key of ours has signed prove nothing, and are
// passed over.
func newest(dir string, l custodian.AnchoredLog) (checkpoint.Checkpoint, error) {
	files, err := os.ReadDir(dir) // sorted
	if err != nil {
		return checkpoint.Checkpoint{}, err
	}
	damaged := 0
	for _, f := range slices.Backward(files) {
		if !strings.HasSuffix(f.Name(), checkpointSuffix) {
			continue
		}
		signed, err := os.ReadFile(filepath.Join(dir, f.Name()))
		if err != nil {
			return checkpoint.Checkpoint{}, err
		}
		c, err := l.Verify(signed)
		if err == nil && strings.HasPrefix(f.Name(), fmt.Sprintf("%020d-", c.Size)) {
			return c, nil
		}
		if damaged++; damaged > maxDamaged {
			return checkpoint.Checkpoint{}, fmt.Errorf("%s: the newest %d files are not checkpoints of this log", dir, maxDamaged)
		}
	}
	return checkpoint.Checkpoint{Origin: l.Origin}, nil
}

func write(path string, b []byte) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o444)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	// Mounts of object storage need not know how to sync a directory.
	if err := dir.Sync(); err != nil && !errors.Is(err, errors.ErrUnsupported) && !errors.Is(err, fs.ErrInvalid) {
		return errors.Join(err, dir.Close())
	}
	return dir.Close()
}
