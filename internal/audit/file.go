package audit

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// A File is what the log writes to.
type File interface {
	WriteAt(b []byte, off int64) (int, error)
	// Sync returns when everything that was written can be read after a
	// power failure.
	Sync() error
	// Allocate makes room for n bytes from off, which read as zeros until
	// they are written, so that writing them cannot fail for want of room.
	// What is allocated or written already stays as it is.
	Allocate(off, n int64) error
}

// A diskFile is a File on a local file system.
type diskFile struct {
	*os.File
}

func (f diskFile) Sync() error {
	return retry(func() error { return unix.Fdatasync(int(f.Fd())) })
}

func (f diskFile) Allocate(off, n int64) error {
	if n <= 0 {
		return nil
	}
	err := retry(func() error { return unix.Fallocate(int(f.Fd()), 0, off, n) })
	if errors.Is(err, unix.EOPNOTSUPP) {
		// All of the range is behind what was written.
		err = writeZeros(f, off, n)
	}
	if err != nil {
		return fmt.Errorf("allocate %d bytes: %w", n, err)
	}
	return nil
}

// writeZeros writes n zeros from off.
func writeZeros(w io.WriterAt, off, n int64) error {
	for end := off + n; off < end; {
		m, err := w.WriteAt(zeros[:min(end-off, int64(len(zeros)))], off)
		if err != nil {
			return err
		}
		off += int64(m)
	}
	return nil
}

func retry(call func() error) error {
	for {
		if err := call(); err != unix.EINTR {
			return err
		}
	}
}

// lockDir takes the one writer's lock, which is on the directory, because the
// file may be replaced. It ends when the result is closed or the process ends.
func lockDir(dir string) (*os.File, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("open audit log: %w", err)
	}
	err = retry(func() error { return unix.Flock(int(d.Fd()), unix.LOCK_EX|unix.LOCK_NB) })
	if err == unix.EWOULDBLOCK {
		err = ErrInUse
	}
	if err == nil {
		err = checkMode(d)
	}
	if err != nil {
		d.Close()
		return nil, fmt.Errorf("audit log %s: %w", dir, err)
	}
	return d, nil
}

// checkMode refuses what somebody else could write to.
func checkMode(f *os.File) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if perm := info.Mode().Perm(); perm&0o022 != 0 {
		return fmt.Errorf("%s: mode is %04o, group and others must not be able to write", f.Name(), perm)
	}
	return nil
}

// createFile makes an empty log in dir, whole or not at all, with room for
// reserve bytes.
func createFile(dir string, o *Options) error {
	path := filepath.Join(dir, fileName)
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		if err == nil {
			err = os.ErrExist
		}
		return fmt.Errorf("create audit log %s: %w", path, err)
	}
	f, err := writeNew(path, encodeFileHeader(newLogID()), headerSize+o.Reserve+growth, o.wrap)
	if err != nil {
		return errors.Join(fmt.Errorf("create audit log %s: %w", path, err), removeIfThere(path+".new"))
	}
	defer f.Close()
	if err := os.Rename(path+".new", path); err != nil {
		return fmt.Errorf("create audit log: %w", err)
	}
	return syncDir(dir)
}

// writeNew makes a file, under path with .new behind it, that begins with start
// and has room for that many bytes.
func writeNew(path string, start []byte, room int64, wrap func(*os.File) File) (_ *os.File, err error) {
	f, err := os.OpenFile(path+".new", os.O_RDWR|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	file := wrap(f)
	if err := file.Allocate(0, room); err != nil {
		return nil, err
	}
	if _, err := file.WriteAt(start, 0); err != nil {
		return nil, err
	}
	return f, file.Sync()
}

func removeIfThere(path string) error {
	if err := os.Remove(path); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
