package audit

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/mod/sumdb/tlog"
	"golang.org/x/sys/unix"
)

// PruneOptions says what Prune takes away. A sealed segment goes where both
// Whole and Before let it go.
type PruneOptions struct {
	Whole  int       // so many of the newest sealed segments stay whole
	Before time.Time // only segments with nothing from this time on; zero: all

	// Keep picks the entries that stay whole; none where nil.
	Keep func(*Entry) bool

	// Check decides on the signature of each checkpoint of a segment before it
	// goes. Where it is nil, signatures are not looked at.
	Check func(signed []byte) error

	// Archive, where it is not empty, is a directory that has each segment,
	// under its own name and durably, before it is taken away.
	Archive string

	Rehearse bool // change nothing, and return what would be pruned
	Now      time.Time
}

// lockName is the file that keeps two at once from pruning.
const lockName = "prune.lock"

// Prune replaces sealed segments of the log in dir by the leaf hashes of their
// entries, oldest first, and returns what it has pruned, also with an error.
// Whether a proof is asked for or the log verified, the hashes do; only the
// entries are gone. A segment that does not verify is not touched, and ends it
// with a *DamageError. It can run beside the writer, which notices.
func Prune(ctx context.Context, dir string, o PruneOptions) (pruned []Pruned, err error) {
	lock, err := lockPruning(dir)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	numbers, err := segments(dir)
	if err != nil {
		return nil, err
	}
	for i, n := range numbers {
		if left := len(numbers) - 1 - i; left <= max(0, o.Whole) {
			break // the last one is not sealed
		}
		p, done, err := pruneSegment(ctx, dir, n, &o)
		if err != nil || !done {
			return pruned, err
		}
		if p != nil {
			pruned = append(pruned, *p)
		}
	}
	return pruned, nil
}

// ListPruned returns which segments of the log in dir are pruned, from their
// beginnings alone; how many entries of them are kept it does not know.
func ListPruned(dir string) ([]Pruned, error) {
	numbers, err := segments(dir)
	if err != nil {
		return nil, err
	}
	var pruned []Pruned
	for _, n := range numbers {
		f, h, err := openSegment(dir, n)
		if err != nil {
			return nil, err
		}
		f.Close()
		if r := h.pruned; r != nil {
			pruned = append(pruned, Pruned{Segment: n, First: h.first, Entries: r.entries, From: r.first, To: r.last, At: r.at})
		}
	}
	return pruned, nil
}

// lockPruning takes a lock that ends when the result is closed.
func lockPruning(dir string) (*os.File, error) {
	info, err := os.Stat(dir)
	if err != nil {
		return nil, fmt.Errorf("prune audit log: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(dir, lockName), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("prune audit log: %w", err)
	}
	err = giveTo(f, info)
	if err == nil {
		err = retry(func() error { return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) })
	}
	if err == unix.EWOULDBLOCK {
		err = errors.New("somebody else is pruning it")
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("prune audit log %s: %w", dir, err)
	}
	return f, nil
}

// giveTo makes f belong to the owner of info: who prunes may be root, and the
// daemon has to read what is left.
func giveTo(f *os.File, info os.FileInfo) error {
	want, ok := info.Sys().(*syscall.Stat_t)
	if !ok || int(want.Uid) == os.Geteuid() {
		return nil
	}
	return f.Chown(int(want.Uid), int(want.Gid))
}

// pruneSegment returns what was pruned, nil where that was done before. done is
// false where the segment, and so all later ones, are to stay.
func pruneSegment(ctx context.Context, dir string, number uint32, o *PruneOptions) (p *Pruned, done bool, err error) {
	v, err := openOne(dir, number, o.Check)
	if err != nil {
		return nil, false, err
	}
	defer v.close()
	if v.head.pruned != nil {
		return nil, true, nil
	}
	kept := uint64(0)
	if err := v.all(ctx, func(e *Entry) error {
		if o.Keep != nil && o.Keep(e) {
			kept++
		}
		return nil
	}); err != nil {
		return nil, false, err
	}
	if !o.Before.IsZero() && !v.last.Before(o.Before) {
		return nil, false, nil
	}
	h := v.head
	h.pruned = &remains{entries: v.index - h.first, size: v.off, batches: v.batches, bare: v.unsigned,
		first: v.first, last: v.last, at: o.Now, root: v.tree.root(), signed: v.checkpoint}
	p = &Pruned{Segment: number, First: h.first, Entries: h.pruned.entries, Kept: kept, From: v.first, To: v.last, At: o.Now}
	if o.Rehearse {
		return p, true, nil
	}
	if o.Archive != "" {
		if err := archive(v.file.Name(), o.Archive); err != nil {
			return nil, false, err
		}
	}
	if err := replaceSegment(ctx, dir, &h, o); err != nil {
		return nil, false, fmt.Errorf("prune segment %d: %w", number, err)
	}
	return p, true, nil
}

// openOne opens one sealed segment to check it.
func openOne(dir string, number uint32, check func(signed []byte) error) (*verifier, error) {
	s := &scanner{dir: dir, live: true, last: &number}
	if err := s.open(number); err != nil {
		return nil, err
	}
	s.id = s.head.id
	v, err := newVerifier(s, check)
	if err != nil {
		s.close()
		return nil, err
	}
	return v, nil
}

// all checks the segment to its seal.
func (v *verifier) all(ctx context.Context, visit func(*Entry) error) error {
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		err := v.next(visit)
		if err == io.EOF && v.sealRoot == nil {
			return v.damage(errors.New("the segment does not end with its seal"))
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// replaceSegment puts what h says is left of a segment in its place.
func replaceSegment(ctx context.Context, dir string, h *segmentHead, o *PruneOptions) (err error) {
	path := filepath.Join(dir, segmentName(h.number))
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(path+".pruned", os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, f.Close())
		if err != nil {
			err = errors.Join(err, removeIfThere(path+".pruned"))
		}
	}()
	if err := giveTo(f, info); err != nil {
		return err
	}
	out := bufio.NewWriterSize(f, 64<<10)
	if _, err := out.Write(h.encode()); err != nil {
		return err
	}
	v, err := openOne(dir, h.number, nil)
	if err != nil {
		return err
	}
	defer v.close()
	var b []byte
	if err := v.all(ctx, func(e *Entry) error {
		entry, err := e.MarshalBinary()
		if err != nil {
			return err
		}
		if o.Keep != nil && o.Keep(e) {
			b = appendKept(b[:0], entry)
		} else {
			b = appendHash(b[:0], tlog.RecordHash(entry))
		}
		_, err = out.Write(b)
		return err
	}); err != nil {
		return err
	}
	if err := out.Flush(); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := checkRemains(path+".pruned", h); err != nil {
		return err
	}
	if err := os.Rename(path+".pruned", path); err != nil {
		return err
	}
	return syncDir(dir)
}

// checkRemains makes sure that what was written leads to the same root, before
// the segment itself goes.
func checkRemains(path string, h *segmentHead) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	read, err := readHead(f)
	if err != nil {
		return err
	}
	t := h.tree()
	s := &scanner{file: f, head: read, off: read.body, index: read.first}
	if err := s.remains(t.add, nil); err != nil {
		return err
	}
	if !bytes.Equal(read.encode(), h.encode()) || t.root() != h.pruned.root {
		return errors.New("what would be left of it is not what it was")
	}
	return nil
}

// archive copies the file to dir, durably. A copy that is there is left alone.
func archive(path, dir string) error {
	to := filepath.Join(dir, filepath.Base(path))
	want, err := sumOf(path)
	if err != nil {
		return fmt.Errorf("archive: %w", err)
	}
	switch got, err := sumOf(to); {
	case err == nil && got == want:
		return nil
	case err == nil:
		return fmt.Errorf("archive %s: another file is there", to)
	case !errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("archive: %w", err)
	}
	if err := copyTo(to+".new", path); err != nil {
		return fmt.Errorf("archive %s: %w", to, errors.Join(err, removeIfThere(to+".new")))
	}
	if got, err := sumOf(to + ".new"); err != nil || got != want {
		return fmt.Errorf("archive %s: the copy is not the same: %w", to, errors.Join(err, removeIfThere(to+".new")))
	}
	if err := os.Rename(to+".new", to); err != nil {
		return fmt.Errorf("archive: %w", err)
	}
	return syncDir(dir)
}

func sumOf(path string) (sum [sha256.Size]byte, err error) {
	f, err := os.Open(path)
	if err != nil {
		return sum, err
	}
	defer f.Close()
	h := sha256.New()
	_, err = io.Copy(h, f)
	return [sha256.Size]byte(h.Sum(nil)), err
}

func copyTo(to, from string) (err error) {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	if _, err := io.Copy(out, in); err != nil {
		return err
	}
	return out.Sync()
}
