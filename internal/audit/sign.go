package audit

import (
	"errors"
	"fmt"

	"github.com/keycustody/custodian/internal/checkpoint"
)

// A Signer makes checkpoints. Its functions are called by one goroutine at a
// time.
type Signer struct {
	// Sign returns a checkpoint, in the form of package checkpoint, of the log
	// whose origin is one of its ID (checkpoint.OfLog), always the same. The root may be of a batch
	// that is never written, so nobody but the log is given the result. Sign
	// bounds its own time; while it runs, the next batch gathers.
	Sign func(size uint64, root [32]byte) ([]byte, error)

	// Check returns nil for a checkpoint that Sign has made.
	Check func(signed []byte) error
}

var errNoSigner = errors.New("the log is signed, and its signer is not there yet")

// SignWith has every batch from now on signed. It refuses, with a *DamageError,
// a log whose last checkpoint s.Check does not accept: whoever goes on with it
// would put a good signature over what somebody else has written.
func (l *Log) SignWith(s Signer) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.signed != nil {
		if err := s.Check(l.signed); err != nil {
			at := l.place
			at.Problem = fmt.Errorf("the last checkpoint: %w", err)
			return &at
		}
	}
	l.signer = &s
	return nil
}

// sign returns the checkpoint of the tree, which has that root; nil where the
// log is not signed.
func (l *Log) sign(root [32]byte) ([]byte, error) {
	l.mu.Lock()
	signer := l.signer
	l.mu.Unlock()
	if signer == nil {
		if l.sealed {
			return nil, fmt.Errorf("%w: %w", ErrBlocked, errNoSigner)
		}
		return nil, nil
	}
	signed, err := signer.Sign(l.tree.size, root)
	if err == nil {
		got, perr := checkpoint.Parse(signed)
		if perr != nil || got.Size != l.tree.size || got.Root != root || !checkpoint.OfLog(got.Origin, l.id) {
			err = errors.New("the signer made a checkpoint of something else")
		} else if l.origin != "" && got.Origin != l.origin {
			err = fmt.Errorf("the log's checkpoints are of %q, the signer's of %q: a log keeps its name", l.origin, got.Origin)
		}
		if err == nil {
			l.origin = got.Origin
		}
	}
	l.tellSigned(err)
	if err != nil {
		return nil, fmt.Errorf("%w: sign checkpoint: %w", ErrBlocked, err)
	}
	return signed, nil
}

// tellSigned makes known whether batches can be signed.
func (l *Log) tellSigned(err error) {
	switch {
	case err == nil && l.unsigned == nil:
		return
	case err == nil:
		l.log.Info("audit log: checkpoints can be signed again")
	case l.unsigned == nil:
		l.log.Error("audit log: a checkpoint could not be signed; nothing is written without one", "error", err)
	}
	l.unsigned = nil
	if err != nil {
		l.unsigned = fmt.Errorf("sign checkpoint: %w", err)
	}
	l.tellRoom()
}

// lookForSigner tries again to sign, where that failed: nobody may call until
// Stats says that the log is not blocked. The root is one that is signed, or
// could be, already.
func (l *Log) lookForSigner() {
	if l.unsigned != nil && l.latched == nil {
		l.sign(l.tree.root())
	}
}

// checkpointRoom is what a checkpoint adds to a batch at most, with padding.
func (l *Log) checkpointRoom() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.signer == nil {
		return 0
	}
	return checkpoint.MaxSize + 2 + 8
}
