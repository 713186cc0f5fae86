// Package checkpoint makes and checks signed roots of a Merkle log, in the form
// of https://c2sp.org/tlog-checkpoint, which is a signed note
// (https://c2sp.org/signed-note), and the proofs that lead to them (RFC 6962,
// section 2.1).
//
// It decides what a checkpoint looks like and which signature makes it good. It
// keeps no key: a crypto.Signer signs, wherever its key is.
package checkpoint

import (
	"crypto"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// MaxSize bounds a signed checkpoint, in bytes.
const MaxSize = 1 << 10

var (
	// ErrMalformed means that something is not a checkpoint at all.
	ErrMalformed = errors.New("malformed checkpoint")

	// ErrSignature means that a checkpoint has no valid signature of the key
	// that it was held against.
	ErrSignature = errors.New("no valid signature of the key")

	// ErrProof means that a proof does not lead to the root of the checkpoint.
	ErrProof = errors.New("proof does not verify")
)

// A Checkpoint is the state of a log: the root of the tree of its first Size
// entries.
type Checkpoint struct {
	Origin string // names the log
	Size   uint64
	Root   [32]byte
}

// Origin names the log with that ID, where nobody has named it otherwise.
func Origin(logID [16]byte) string { return NamedOrigin("custodian", logID) }

// NamedOrigin names the log with that ID: name/ID. The name may be a URL without
// its scheme, as tlog-checkpoint recommends.
func NamedOrigin(name string, logID [16]byte) string {
	return name + "/" + hex.EncodeToString(logID[:])
}

// OfLog reports whether an origin is one of the log with that ID.
func OfLog(origin string, logID [16]byte) bool {
	name, found := strings.CutSuffix(origin, NamedOrigin("", logID))
	return found && CheckName(name) == nil
}

// CheckName says why a name cannot be that of a log: notes give a line to it and
// end it with a space or a plus sign.
func CheckName(name string) error {
	if name == "" || len(name) > maxName || !utf8.ValidString(name) ||
		strings.ContainsFunc(name, func(r rune) bool { return r == '+' || r < ' ' || unicode.IsSpace(r) }) {
		return fmt.Errorf("a name has 1 to %d bytes, and no spaces, control characters or plus signs", maxName)
	}
	return nil
}

// maxName leaves a checkpoint, which has its origin twice, within MaxSize.
const maxName = 100

// Text returns what is signed.
func (c Checkpoint) Text() string {
	return fmt.Sprintf("%s\n%d\n%s\n", c.Origin, c.Size, base64.StdEncoding.EncodeToString(c.Root[:]))
}

// Sign returns the checkpoint as a note that s has signed.
func (c Checkpoint) Sign(s note.Signer) ([]byte, error) {
	if _, err := parseText(c.Text()); err != nil {
		return nil, fmt.Errorf("sign checkpoint: %w", err)
	}
	b, err := note.Sign(&note.Note{Text: c.Text()}, s)
	if err != nil {
		return nil, fmt.Errorf("sign checkpoint: %w", err)
	}
	return b, nil
}

// Parse reads a signed checkpoint and does not look at its signatures: nothing
// that it returns may be believed. Lines after the third are passed over, as
// the specification has it. The error wraps ErrMalformed.
func Parse(signed []byte) (Checkpoint, error) {
	if len(signed) > MaxSize {
		return Checkpoint{}, fmt.Errorf("%d bytes, the limit is %d: %w", len(signed), MaxSize, ErrMalformed)
	}
	text, signatures, found := strings.Cut(string(signed), "\n\n")
	if !found || !strings.HasPrefix(signatures, "— ") || !strings.HasSuffix(signatures, "\n") {
		return Checkpoint{}, fmt.Errorf("it has no signature: %w", ErrMalformed)
	}
	return parseText(text + "\n")
}

func parseText(text string) (Checkpoint, error) {
	lines := strings.Split(text, "\n")
	if len(lines) < 4 || !utf8.ValidString(text) {
		return Checkpoint{}, fmt.Errorf("it has not the three lines of one: %w", ErrMalformed)
	}
	origin, size, root := lines[0], lines[1], lines[2]
	if origin == "" {
		return Checkpoint{}, fmt.Errorf("its origin is empty: %w", ErrMalformed)
	}
	c := Checkpoint{Origin: origin}
	var err error
	if c.Size, err = strconv.ParseUint(size, 10, 63); err != nil || strconv.FormatUint(c.Size, 10) != size {
		return Checkpoint{}, fmt.Errorf("its size is not a number: %w", ErrMalformed)
	}
	hash, err := base64.StdEncoding.Strict().DecodeString(root)
	if err != nil || len(hash) != len(c.Root) {
		return Checkpoint{}, fmt.Errorf("its root is not a hash: %w", ErrMalformed)
	}
	c.Root = [32]byte(hash)
	return c, nil
}

// Verify returns what a checkpoint says if key, an *ecdsa.PublicKey on P-256 or
// an ed25519.PublicKey, has signed it under the name of its origin. Signatures
// of other keys are passed over. The error wraps ErrMalformed or ErrSignature.
func Verify(signed []byte, key crypto.PublicKey) (Checkpoint, error) {
	c, err := Parse(signed)
	if err != nil {
		return Checkpoint{}, err
	}
	v, err := NewVerifier(c.Origin, key)
	if err != nil {
		return Checkpoint{}, err
	}
	return Open(signed, v)
}

// Open returns what a checkpoint says if v has verified it. The origin is the
// verifier's name. The error wraps ErrMalformed or ErrSignature.
func Open(signed []byte, v note.Verifier) (Checkpoint, error) {
	if len(signed) > MaxSize {
		return Checkpoint{}, fmt.Errorf("%d bytes, the limit is %d: %w", len(signed), MaxSize, ErrMalformed)
	}
	n, err := note.Open(signed, note.VerifierList(v))
	if err != nil {
		return Checkpoint{}, fmt.Errorf("checkpoint: %v: %w", err, ErrSignature)
	}
	for _, sig := range n.Sigs {
		// The note package lets bits pass that base64 does not use.
		if _, err := base64.StdEncoding.Strict().DecodeString(sig.Base64); err != nil {
			return Checkpoint{}, fmt.Errorf("checkpoint: signature of %s: %w: %w", sig.Name, err, ErrSignature)
		}
	}
	c, err := parseText(n.Text)
	if err == nil && c.Origin != v.Name() {
		err = fmt.Errorf("its origin is %q, its signer %q: %w", c.Origin, v.Name(), ErrMalformed)
	}
	if err != nil {
		return Checkpoint{}, err
	}
	return c, nil
}

// CheckInclusion reports whether proof shows that the entry with that index and
// leaf hash is in the log of the checkpoint. The error wraps ErrProof.
func (c Checkpoint) CheckInclusion(index uint64, leaf [32]byte, proof [][32]byte) error {
	if index >= c.Size {
		return fmt.Errorf("entry %d is not among the %d of the checkpoint: %w", index, c.Size, ErrProof)
	}
	if err := tlog.CheckRecord(hashes(proof), int64(c.Size), c.Root, int64(index), leaf); err != nil {
		return fmt.Errorf("entry %d in the checkpoint of %d: %w", index, c.Size, ErrProof)
	}
	return nil
}

// CheckConsistency reports whether proof shows that the log of old is the
// beginning of the log of c. The error wraps ErrProof.
func (c Checkpoint) CheckConsistency(old Checkpoint, proof [][32]byte) error {
	var err error
	switch {
	case old.Origin != c.Origin:
		return fmt.Errorf("the checkpoints are of the logs %q and %q: %w", old.Origin, c.Origin, ErrProof)
	case old.Size > c.Size:
		return fmt.Errorf("the checkpoint of %d entries is not newer than the one of %d: %w", c.Size, old.Size, ErrProof)
	case old.Size == 0 || old.Size == c.Size && old.Root == c.Root:
		return nil
	case old.Size == c.Size:
		err = ErrProof
	default:
		err = tlog.CheckTree(hashes(proof), int64(c.Size), c.Root, int64(old.Size), old.Root)
	}
	if err != nil {
		return fmt.Errorf("the log of %d entries is not the beginning of the log of %d: %w", old.Size, c.Size, ErrProof)
	}
	return nil
}

func hashes(in [][32]byte) []tlog.Hash {
	out := make([]tlog.Hash, len(in))
	for i := range in {
		out[i] = in[i]
	}
	return out
}
