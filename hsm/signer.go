package hsm

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/miekg/pkcs11"
)

// GenerateSigner makes an ECDSA P-256 pair. If it is there already, with
// exactly the right attributes, that is the result: a retry after a crash. A
// public half alone, which a crash can leave, is replaced; a private half alone
// is ErrUnfit and left for a person to look at.
func (t *Token) GenerateSigner(ctx context.Context, label string, id [16]byte) error {
	what := "generate signer " + label
	if label == "" || id == [16]byte{} {
		return t.named(what, fmt.Errorf("label and ID must be set: %w", ErrPolicy))
	}
	err := t.again(ctx, func() error {
		return t.doWithin(ctx, makeTimeout, t.control, func(w *worker) error { return w.generateSigner(label, id) })
	})
	return t.named(what, err)
}

func (w *worker) generateSigner(label string, id [16]byte) error {
	adopted, err := w.adoptSigner(label, id)
	if adopted || err != nil {
		return err
	}
	for try := 0; ; try++ {
		rv := w.t.lib.generatePair(w.session, pkcs11.CKM_EC_KEY_PAIR_GEN, signerPublic(label, id), signerPrivate(label, id))
		if rv == ckrOK {
			break
		}
		adopted, err := w.adoptSigner(label, id)
		if adopted || err != nil {
			return err
		}
		if try > 0 || (rv != ckrGeneralError && rv != ckrTemplateMismatch) {
			return newFault(callPair, rv)
		}
	}
	w.settleFiles()
	adopted, err = w.adoptSigner(label, id)
	if err == nil && !adopted {
		return fmt.Errorf("the token made it and does not show it: %w", ErrUnfit)
	}
	return err
}

// adoptSigner tells whether both halves are there and right. It removes a
// public half that has no private one.
func (w *worker) adoptSigner(label string, id [16]byte) (bool, error) {
	private, err := w.one(pkcs11.CKO_PRIVATE_KEY, label, id)
	if err != nil && !isNotFound(err) {
		return false, err
	}
	public, perr := w.one(pkcs11.CKO_PUBLIC_KEY, label, id)
	if perr != nil && !isNotFound(perr) {
		return false, perr
	}
	switch {
	case err != nil && perr != nil:
		return false, nil
	case err != nil:
		if derr := w.t.lib.p.DestroyObject(w.session, pkcs11.ObjectHandle(public)); derr != nil {
			return false, fmt.Errorf("remove a public half without its private one: %w", faultOf(callDestroy, derr))
		}
		return false, nil
	case perr != nil:
		return false, fmt.Errorf("private half is there without its public one: %w", ErrUnfit)
	}
	return true, w.compareSigner(label, id, private, public)
}

func (w *worker) compareSigner(label string, id [16]byte, private, public handle) error {
	want := append(signerPrivate(label, id), flag(pkcs11.CKA_ALWAYS_SENSITIVE, true),
		flag(pkcs11.CKA_NEVER_EXTRACTABLE, true), flag(pkcs11.CKA_LOCAL, true))
	if _, err := w.compare(private, want); err != nil {
		return fmt.Errorf("private half: %w", err)
	}
	if _, err := w.compare(public, signerPublic(label, id)); err != nil {
		return fmt.Errorf("public half: %w", err)
	}
	return nil
}

// Signer finds an ECDSA P-256 pair, holds its attributes against what they must
// be, and has it sign once. The result signs SHA-256 digests, finds the pair
// again after a reconnect, and is safe for concurrent use. Its signatures are
// ASN.1 DER, and verified before they are returned. Each Sign waits for the
// token at most CallTimeout. ErrNotFound, ErrDuplicate and ErrUnfit as in
// OpenMEK; ErrWrongKey: the halves do not fit, or the pair is not the one that
// was found before.
func (t *Token) Signer(ctx context.Context, label string, id [16]byte) (crypto.Signer, error) {
	s := &signer{t: t, label: label, id: id}
	err := t.again(ctx, func() error { return s.locate(ctx) })
	if err != nil {
		return nil, t.named("open signer "+label, err)
	}
	digest := sha256.Sum256([]byte("hsm signer probe v1"))
	if _, err := s.sign(ctx, digest[:]); err != nil {
		return nil, t.named("open signer "+label, err)
	}
	return s, nil
}

// A signer is the stable face of a crypto11 signer, which ends with its
// connection.
type signer struct {
	t     *Token
	label string
	id    [16]byte

	mu     sync.Mutex // guards the fields below
	epoch  Epoch
	signer crypto.Signer
	public *ecdsa.PublicKey
}

// Public is the *ecdsa.PublicKey.
func (s *signer) Public() crypto.PublicKey {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.public
}

// Sign signs a SHA-256 digest; randomness comes from the token.
func (s *signer) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if opts == nil || opts.HashFunc() != crypto.SHA256 || len(digest) != sha256.Size {
		return nil, s.t.named("sign by "+s.label, fmt.Errorf("wants a SHA-256 digest: %w", ErrPolicy))
	}
	// crypto.Signer has no context; the token's own ends with Close, and
	// CallTimeout bounds the wait.
	sig, err := s.sign(s.t.life, digest)
	return sig, s.t.named("sign by "+s.label, err)
}

func (s *signer) sign(ctx context.Context, digest []byte) ([]byte, error) {
	digest = bytes.Clone(digest)
	sig, err := s.signOnce(ctx, digest)
	if err == nil {
		return sig, nil
	}
	if hasClass(err, classHandle) {
		sig, err = s.signOnce(ctx, digest) // finds the pair again
	}
	if err == nil || !errors.Is(err, ErrDevice) || s.t.check() == nil {
		return sig, err
	}
	if s.t.recovered(ctx, false) {
		return s.signOnce(ctx, digest)
	}
	return nil, s.t.reason(err)
}

func (s *signer) signOnce(ctx context.Context, digest []byte) ([]byte, error) {
	s.mu.Lock()
	epoch, key, public := s.epoch, s.signer, s.public
	s.mu.Unlock()
	if epoch != s.t.Epoch() {
		if err := s.locate(ctx); err != nil {
			return nil, err
		}
		s.mu.Lock()
		epoch, key, public = s.epoch, s.signer, s.public
		s.mu.Unlock()
	}
	var sig []byte
	err := s.t.do(ctx, s.t.signing, func(w *worker) error {
		if epoch != w.t.epoch {
			return errMoved
		}
		// crypto11 puts a broken session back into its pool for ever, and cannot
		// be opened anew beside us (it finalises the module if that fails). So
		// a broken session of its is a lost connection, see worker.attempt.
		out, err := key.Sign(nil, digest, crypto.SHA256)
		if err != nil {
			return faultOf(callSign, err)
		}
		sig = out
		return nil
	})
	if err != nil {
		if hasClass(err, classHandle) {
			s.mu.Lock()
			s.epoch = 0
			s.mu.Unlock()
		}
		return nil, err
	}
	if !ecdsa.VerifyASN1(public, digest, sig) {
		return nil, fmt.Errorf("signature does not verify: %w", ErrWrongKey)
	}
	return sig, nil
}

// locate finds the pair in the current epoch.
func (s *signer) locate(ctx context.Context) error {
	err := s.t.do(ctx, s.t.control, func(w *worker) error {
		return w.checkSigner(s.label, s.id)
	})
	if err != nil {
		return err
	}
	var key crypto.Signer
	var epoch Epoch
	err = s.t.do(ctx, s.t.signing, func(w *worker) error {
		found, err := w.t.signers.FindKeyPair(s.id[:], []byte(s.label))
		if err != nil {
			return faultOf(callFind, err)
		}
		if found == nil {
			return fmt.Errorf("signer %s: %w", s.label, ErrNotFound)
		}
		key, epoch = found, w.t.epoch
		return nil
	})
	if err != nil {
		return err
	}
	public, ok := key.Public().(*ecdsa.PublicKey)
	if !ok || public.Curve != elliptic.P256() {
		return fmt.Errorf("public half is not a P-256 key: %w", ErrUnfit)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.public != nil && !s.public.Equal(public) {
		return fmt.Errorf("the token has another pair under this name: %w", ErrWrongKey)
	}
	s.epoch, s.signer, s.public = epoch, key, public
	return nil
}

func (w *worker) checkSigner(label string, id [16]byte) error {
	private, err := w.one(pkcs11.CKO_PRIVATE_KEY, label, id)
	if err != nil {
		return err
	}
	public, err := w.one(pkcs11.CKO_PUBLIC_KEY, label, id)
	if err != nil {
		return err
	}
	return w.compareSigner(label, id, private, public)
}
