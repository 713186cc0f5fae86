package hsm

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// A latch is a file that is there while a login is being tried, and stays if it
// did not succeed. A token locks itself after a few wrong PINs, and a
// supervisor that restarts a daemon would use them up in seconds.
//
// The file tells a login that failed from one whose outcome nobody knows,
// because the process was killed in the middle. The first is for a person. The
// second may be tried again, if the token says that no wrong PIN was given
// since the last good login, and maxUnknown times in a row at most.
type latch string

const (
	latchTrying = "trying" // one line for each login whose outcome is not known
	latchFailed = "failed"
	maxUnknown  = 2
)

// tries counts the logins whose outcome is not known. It is ErrLatched if a
// login failed, or if there are too many of them.
func (l latch) tries() (int, error) {
	b, err := os.ReadFile(string(l))
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("latch_file: %w", err)
	}
	n := strings.Count(string(b), latchTrying+"\n")
	if len(b) != n*len(latchTrying+"\n") || n >= maxUnknown {
		return n, fmt.Errorf("an earlier login did not succeed: check the PIN, then remove %s: %w", string(l), ErrLatched)
	}
	return n, nil
}

// set makes the file durable before the login. wrongPIN tells that the token
// has seen a wrong PIN since the last good login.
func (l latch) set(wrongPIN bool) error {
	n, err := l.tries()
	if err != nil {
		return err
	}
	if n > 0 && wrongPIN {
		return fmt.Errorf("an earlier login was interrupted and the token has seen a wrong PIN: check the PIN, then remove %s: %w", string(l), ErrLatched)
	}
	return l.write(strings.Repeat(latchTrying+"\n", n+1))
}

// fail records that the login did not succeed.
func (l latch) fail() error { return l.write(latchFailed + "\n") }

// write replaces the file at once, so that a crash leaves the old or the new.
func (l latch) write(text string) error {
	f, err := os.OpenFile(string(l)+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("latch_file: %w", err)
	}
	_, err = f.WriteString(text)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = errors.Join(os.Rename(string(l)+".new", string(l)), l.syncDir())
	}
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
