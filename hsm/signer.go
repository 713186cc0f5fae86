package hsm

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
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
	return t.generatePair(ctx, curveP256, label, id)
}

// GenerateEd25519Signer is GenerateSigner for an Ed25519 pair (RFC 8032). A
// token that has no such keys answers ErrUnfit.
func (t *Token) GenerateEd25519Signer(ctx context.Context, label string, id [16]byte) error {
	return t.generatePair(ctx, curveEd25519, label, id)
}

func (t *Token) generatePair(ctx context.Context, c curve, label string, id [16]byte) error {
	what := "generate signer " + label
	if label == "" || id == [16]byte{} {
		return t.named(what, fmt.Errorf("label and ID must be set: %w", ErrPolicy))
	}
	err := t.again(ctx, func() error {
		return t.doWithin(ctx, makeTimeout, t.control, func(w *worker) error { return w.generateSigner(c, label, id) })
	})
	return t.named(what, err)
}

func (w *worker) generateSigner(c curve, label string, id [16]byte) error {
	adopted, err := w.adoptSigner(c, label, id)
	if adopted || err != nil {
		return err
	}
	for try := 0; ; try++ {
		rv := w.t.lib.generatePair(w.session, c.generate, signerPublic(c, label, id), signerPrivate(c, label, id))
		if rv == ckrOK {
			break
		}
		adopted, err := w.adoptSigner(c, label, id)
		if adopted || err != nil {
			return err
		}
		if rv == ckrMechanismInvalid {
			return fmt.Errorf("the token lacks %s: %w", mechanismName(c.generate), ErrUnfit)
		}
		if try > 0 || (rv != ckrGeneralError && rv != ckrTemplateMismatch) {
			return newFault(callPair, rv)
		}
	}
	w.settleFiles()
	adopted, err = w.adoptSigner(c, label, id)
	if err == nil && !adopted {
		return fmt.Errorf("the token made it and does not show it: %w", ErrUnfit)
	}
	return err
}

// adoptSigner tells whether both halves are there and right. It removes a
// public half that has no private one.
func (w *worker) adoptSigner(c curve, label string, id [16]byte) (bool, error) {
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
	return true, w.compareSigner(c, label, id, private, public)
}

func (w *worker) compareSigner(c curve, label string, id [16]byte, private, public handle) error {
	want := append(signerPrivate(c, label, id), flag(pkcs11.CKA_ALWAYS_SENSITIVE, true),
		flag(pkcs11.CKA_NEVER_EXTRACTABLE, true), flag(pkcs11.CKA_LOCAL, true))
	if _, err := w.compare(private, want); err != nil {
		return fmt.Errorf("private half: %w", err)
	}
	if _, err := w.compare(public, signerPublic(c, label, id)); err != nil {
		return fmt.Errorf("public half: %w", err)
	}
	return nil
}

// Signer finds a pair, holds its attributes against what they must be, and has
// it sign once. The result finds the pair again after a reconnect, and is safe
// for concurrent use. An ECDSA P-256 pair signs SHA-256 digests in ASN.1 DER, an
// Ed25519 pair whole messages, with crypto.Hash(0). Signatures are verified
// before they are returned. Each Sign waits for the token at most CallTimeout. ErrNotFound, ErrDuplicate and ErrUnfit as in
// OpenMEK; ErrWrongKey: the halves do not fit, or the pair is not the one that
// was found before.
func (t *Token) Signer(ctx context.Context, label string, id [16]byte) (crypto.Signer, error) {
	s := &signer{t: t, label: label, id: id}
	err := t.again(ctx, func() error { return s.locate(ctx) })
	if err != nil {
		return nil, t.named("open signer "+label, err)
	}
	probe := sha256.Sum256([]byte("hsm signer probe v1"))
	if _, err := s.sign(ctx, probe[:]); err != nil {
		return nil, t.named("open signer "+label, err)
	}
	return s, nil
}

// A signer is the stable face of a crypto11 signer, or of an Ed25519 key's
// handle, which crypto11 has no use for. Both end with their connection.
type signer struct {
	t     *Token
	label string
	id    [16]byte

	mu     sync.Mutex // guards the fields below
	epoch  Epoch
	pair   pair
	public crypto.PublicKey
}

// A pair is where a signer is in one connection: signer, or for Ed25519 private.
type pair struct {
	signer  crypto.Signer
	private handle
}

// maxMessage bounds what an Ed25519 pair signs.
const maxMessage = 4096

// Public is an *ecdsa.PublicKey or an ed25519.PublicKey.
func (s *signer) Public() crypto.PublicKey {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.public
}

// Sign signs a SHA-256 digest, or for Ed25519 a message; randomness comes from
// the token.
func (s *signer) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if _, ed := s.Public().(ed25519.PublicKey); ed {
		if opts == nil || opts.HashFunc() != 0 || len(digest) > maxMessage {
			return nil, s.t.named("sign by "+s.label, fmt.Errorf("wants a message of up to %d bytes, and no hash: %w", maxMessage, ErrPolicy))
		}
	} else if opts == nil || opts.HashFunc() != crypto.SHA256 || len(digest) != sha256.Size {
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
	epoch, key, public := s.epoch, s.pair, s.public
	s.mu.Unlock()
	if epoch != s.t.Epoch() {
		if err := s.locate(ctx); err != nil {
			return nil, err
		}
		s.mu.Lock()
		epoch, key, public = s.epoch, s.pair, s.public
		s.mu.Unlock()
	}
	var sig []byte
	err := s.t.do(ctx, s.t.signing, func(w *worker) error {
		if epoch != w.t.epoch {
			return errMoved
		}
		if key.signer == nil {
			out := make([]byte, ed25519.SignatureSize)
			n, rv := w.t.lib.sign(w.session, ckmEDDSA, key.private, digest, out)
			if rv != ckrOK {
				return newFault(callSign, rv)
			}
			sig = out[:n]
			return nil
		}
		// crypto11 puts a broken session back into its pool for ever, and cannot
		// be opened anew beside us (it finalises the module if that fails). So
		// a broken session of its is a lost connection, see worker.attempt.
		out, err := key.signer.Sign(nil, digest, crypto.SHA256)
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
	if !verifies(public, digest, sig) {
		return nil, fmt.Errorf("signature does not verify: %w", ErrWrongKey)
	}
	return sig, nil
}

func verifies(public crypto.PublicKey, digest, sig []byte) bool {
	if p, ok := public.(ed25519.PublicKey); ok {
		return ed25519.Verify(p, digest, sig)
	}
	p, ok := public.(*ecdsa.PublicKey)
	return ok && ecdsa.VerifyASN1(p, digest, sig)
}

// locate finds the pair in the current epoch.
func (s *signer) locate(ctx context.Context) error {
	var found pair
	var point ed25519.PublicKey
	var epoch Epoch
	err := s.t.do(ctx, s.t.control, func(w *worker) (err error) {
		found.private, point, err = w.checkSigner(s.label, s.id)
		epoch = w.t.epoch
		return err
	})
	if err != nil {
		return err
	}
	if point != nil {
		return s.set(epoch, found, point)
	}
	err = s.t.do(ctx, s.t.signing, func(w *worker) error {
		key, err := w.t.signers.FindKeyPair(s.id[:], []byte(s.label))
		if err != nil {
			return faultOf(callFind, err)
		}
		if key == nil {
			return fmt.Errorf("signer %s: %w", s.label, ErrNotFound)
		}
		found.signer, epoch = key, w.t.epoch
		return nil
	})
	if err != nil {
		return err
	}
	public, ok := found.signer.Public().(*ecdsa.PublicKey)
	if !ok || public.Curve != elliptic.P256() {
		return fmt.Errorf("public half is not a P-256 key: %w", ErrUnfit)
	}
	return s.set(epoch, found, public)
}

// set takes a pair in, which must be the one that it always was.
func (s *signer) set(epoch Epoch, found pair, public crypto.PublicKey) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if was, ok := s.public.(interface{ Equal(crypto.PublicKey) bool }); ok && !was.Equal(public) {
		return fmt.Errorf("the token has another pair under this name: %w", ErrWrongKey)
	}
	s.epoch, s.pair, s.public = epoch, found, public
	return nil
}

// checkSigner returns the private half, and for an Ed25519 pair its public key.
func (w *worker) checkSigner(label string, id [16]byte) (private handle, point ed25519.PublicKey, err error) {
	if private, err = w.one(pkcs11.CKO_PRIVATE_KEY, label, id); err != nil {
		return 0, nil, err
	}
	public, err := w.one(pkcs11.CKO_PUBLIC_KEY, label, id)
	if err != nil {
		return 0, nil, err
	}
	params, err := w.attribute(public, pkcs11.CKA_EC_PARAMS)
	if err != nil {
		return 0, nil, err
	}
	if !bytes.Equal(params, curveEd25519.params) {
		return private, nil, w.compareSigner(curveP256, label, id, private, public)
	}
	if err := w.compareSigner(curveEd25519, label, id, private, public); err != nil {
		return 0, nil, err
	}
	der, err := w.attribute(public, pkcs11.CKA_EC_POINT)
	if err != nil {
		return 0, nil, err
	}
	// The standard wants an OCTET STRING around it; some modules leave it out.
	raw := bytes.TrimPrefix(der, []byte{0x04, ed25519.PublicKeySize})
	if len(der) == ed25519.PublicKeySize {
		raw = der
	}
	if len(raw) != ed25519.PublicKeySize {
		return 0, nil, fmt.Errorf("public half has a point of %d bytes: %w", len(der), ErrUnfit)
	}
	return private, ed25519.PublicKey(raw), nil
}
