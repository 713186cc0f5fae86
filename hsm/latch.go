package hsm

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// A latch is a file that is there while a login is being tried, and stays if it
// did not succeed. A token locks itself after a few wrong PINs, and a
// supervisor that restarts a daemon would use them up in seconds.
type latch string

// check is ErrLatched if an earlier login left the file.
func (l latch) check() error {
	_, err := os.Lstat(string(l))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("latch_file: %w", err)
	}
	return fmt.Errorf("an earlier login did not succeed: check the PIN, then remove %s: %w", string(l), ErrLatched)
}

// set makes the file durable before the login. It fails if the file is there.
func (l latch) set() error {
	if err := l.check(); err != nil {
		return err
	}
	f, err := os.OpenFile(string(l), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("latch_file: %w", err)
	}
	_, err = fmt.Fprintln(f, "A login to the token was started and has not succeeded. Check the PIN before you remove this file.")
	err = errors.Join(err, f.Sync(), f.Close(), l.syncDir())
	if err != nil {
		return fmt.Errorf("latch_file %s: %w", string(l), err)
	}
	return nil
}

// clear removes the file after a login that succeeded.
func (l latch) clear() error {
	if err := errors.Join(os.Remove(string(l)), l.syncDir()); err != nil {
		return fmt.Errorf("latch_file %s: %w", string(l), err)
	}
	return nil
}

func (l latch) syncDir() error {
	d, err := os.Open(filepath.Dir(string(l)))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
