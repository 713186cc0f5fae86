package kms

import (
	"bytes"
	"context"
	"crypto"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/hsm"
)

// Token is t as the domain sees it: its operations by the domain's records,
// and its errors as those of a custodian.HSM. A MEK is used only once its
// recorded canary has proved it, in this connection to the token.
func Token(t *hsm.Token) custodian.HSM {
	return &token{t: t, meks: map[mekName]*provenMEK{}}
}

type token struct {
	t *hsm.Token

	// mu guards the map below.
	mu   sync.Mutex
	meks map[mekName]*provenMEK
}

type mekName struct {
	label string
	id    [16]byte
}

// A provenMEK has opened this canary. After a reconnect, package hsm opens it
// again before the MEK is used.
type provenMEK struct {
	*hsm.MEK
	canary []byte
}

func (t *token) Random(ctx context.Context, dst []byte) error {
	const most = 1024 // hsm takes no more at a time than a slot of its arena
	for {
		n := min(len(dst), most)
		if err := t.run(ctx, func() error { return t.t.Random(ctx, dst[:n]) }); err != nil {
			return err
		}
		if dst = dst[n:]; len(dst) == 0 {
			return nil
		}
	}
}

func (t *token) GenerateMEK(ctx context.Context, m custodian.MEK) error {
	return t.run(ctx, func() error {
		return t.t.GenerateMEK(ctx, hsm.MEKSpec{Label: m.Label, ID: m.ID, Profile: hsm.MEKProfile(m.Profile), Start: m.CreateTime, End: m.EndTime})
	})
}

func (t *token) NewMEKCanary(ctx context.Context, m custodian.MEK) (canary []byte, err error) {
	err = t.run(ctx, func() error {
		mek, err := t.t.OpenMEK(ctx, m.Label, m.ID)
		if err != nil {
			return err
		}
		canary, err = mek.NewCanary(ctx)
		return err
	})
	return canary, err
}

func (t *token) CheckMEK(ctx context.Context, m custodian.MEK) error {
	return t.run(ctx, func() error { _, err := t.prove(ctx, m); return err })
}

// prove finds the MEK in the token, whatever was found before, and has it
// open its canary.
func (t *token) prove(ctx context.Context, m custodian.MEK) (*provenMEK, error) {
	mek, err := t.t.OpenMEK(ctx, m.Label, m.ID)
	if err != nil {
		return nil, err
	}
	if err := mek.CheckCanary(ctx, m.Canary); err != nil {
		return nil, err
	}
	proven := &provenMEK{mek, bytes.Clone(m.Canary)}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.meks[mekName{m.Label, m.ID}] = proven
	return proven, nil
}

func (t *token) MEKAttributes(ctx context.Context, m custodian.MEK) (attributes map[string]string, err error) {
	err = t.run(ctx, func() error {
		mek, err := t.mek(ctx, m)
		if err == nil {
			attributes = mek.Attributes()
		}
		return err
	})
	return attributes, err
}

// mek is a MEK that was proved by the canary that m records.
func (t *token) mek(ctx context.Context, m custodian.MEK) (*provenMEK, error) {
	t.mu.Lock()
	proven := t.meks[mekName{m.Label, m.ID}]
	t.mu.Unlock()
	if proven != nil && same(proven.canary, m.Canary) {
		return proven, nil
	}
	return t.prove(ctx, m)
}

// useOf is the use that a KeyUse has in package hsm, which refuses all others.
func useOf(u custodian.KeyUse) hsm.Use {
	switch u {
	case custodian.UseSeal:
		return hsm.UseGCM
	case custodian.UseMAC:
		return hsm.UseCMAC
	}
	return 0
}

func (t *token) GenerateKey(ctx context.Context, m custodian.MEK, u custodian.KeyUse, identity []byte) (inner, canary []byte, err error) {
	err = t.run(ctx, func() error {
		mek, err := t.mek(ctx, m)
		if err != nil {
			return err
		}
		w, err := mek.Generate(ctx, useOf(u), identity)
		inner, canary = w.Blob, w.Canary
		return mek.unmade(err)
	})
	return inner, canary, err
}

// unmade is an error of Generate. Where the MEK itself is right, a key that
// does not open right after it was wrapped is the token's fault, and no
// statement about a blob.
func (m *provenMEK) unmade(err error) error {
	if errors.Is(err, hsm.ErrAuth) || errors.Is(err, hsm.ErrWrongKey) && m.right() {
		return mapped{err, custodian.ErrHSMUnavailable}
	}
	return err
}

func (t *token) LoadKey(ctx context.Context, m custodian.MEK, u custodian.KeyUse, identity, inner, canary []byte) (custodian.Key, error) {
	var loaded *hsm.Key
	err := t.run(ctx, func() error {
		mek, err := t.mek(ctx, m)
		if err != nil {
			return err
		}
		loaded, err = mek.Load(ctx, useOf(u), identity, hsm.Wrapped{Blob: inner, Canary: canary})
		if errors.Is(err, hsm.ErrWrongKey) && mek.right() {
			return mapped{err, custodian.ErrAuth} // the key's canary, not the MEK's
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return key{loaded}, nil
}

func (t *token) RewrapKey(ctx context.Context, from, to custodian.MEK, u custodian.KeyUse, identity, inner, canary []byte) (moved []byte, err error) {
	err = t.run(ctx, func() error {
		old, err := t.mek(ctx, from)
		if err != nil {
			return err
		}
		next, err := t.mek(ctx, to)
		if err != nil {
			return err
		}
		w, err := old.Rewrap(ctx, next.MEK, hsm.Wrapped{Blob: inner, Canary: canary}, useOf(u), identity)
		if errors.Is(err, hsm.ErrWrongKey) && old.right() && next.right() {
			return mapped{err, custodian.ErrAuth} // the key's canary, not a MEK's
		}
		moved = w.Blob
		return err
	})
	if err != nil {
		return nil, err
	}
	return moved, nil
}

// right reports whether the MEK has opened its canary in this connection.
func (m *provenMEK) right() bool { return m.Checked() == m.Epoch() }

func (t *token) GenerateSigner(ctx context.Context, alg custodian.SigningAlgorithm, label string, id [16]byte) error {
	generate := map[custodian.SigningAlgorithm]func(context.Context, string, [16]byte) error{
		custodian.SignECDSAP256: t.t.GenerateSigner, custodian.SignEd25519: t.t.GenerateEd25519Signer}[alg]
	if generate == nil {
		return fmt.Errorf("generate signer %s: algorithm %q is not known", label, alg)
	}
	return t.run(ctx, func() error { return generate(ctx, label, id) })
}

func (t *token) Signer(ctx context.Context, label string, id [16]byte) (crypto.Signer, error) {
	var s crypto.Signer
	err := t.run(ctx, func() (err error) { s, err = t.t.Signer(ctx, label, id); return err })
	if err != nil {
		return nil, err
	}
	return signer{s}, nil
}

// DestroyLeftovers clears away what an interrupted init has left.
func (t *token) DestroyLeftovers(ctx context.Context, labels []string, ids [][16]byte) (n int, err error) {
	err = t.run(ctx, func() error {
		n, err = t.t.DestroyLeftovers(ctx, labels, ids)
		return err
	})
	return n, err
}

func (t *token) DestroyMEK(ctx context.Context, m custodian.MEK) error {
	return t.run(ctx, func() error {
		if err := t.t.DestroyMEK(ctx, m.Label, m.ID); err != nil {
			return err
		}
		t.mu.Lock()
		defer t.mu.Unlock()
		delete(t.meks, mekName{m.Label, m.ID})
		return nil
	})
}

func (t *token) Objects(ctx context.Context) (objects []custodian.TokenObject, err error) {
	err = t.run(ctx, func() error {
		found, err := t.t.Objects(ctx)
		for _, o := range found {
			objects = append(objects, custodian.TokenObject{Class: o.Class, Label: o.Label, ID: o.ID})
		}
		return err
	})
	return objects, err
}

func (t *token) Health(ctx context.Context) error {
	return t.run(ctx, func() error { return t.t.Health(ctx) })
}

func (t *token) Status() custodian.HSMStatus {
	i := t.t.Info()
	return custodian.HSMStatus{
		Label: i.Label, Serial: i.Serial, Model: i.Model, Manufacturer: i.Manufacturer,
		Profile: i.Profile, Epoch: uint64(i.Epoch),
		DefaultMEK: custodian.MEKProfile(i.DefaultMEKProfile), EnforcesTrusted: i.EnforcesTrusted,
		SessionsInUse: i.InFlight, SessionsMax: i.MaxSessions, Abandoned: i.Abandoned, Away: i.Outage != nil,
	}
}

// run makes one call of the token, unless its context has ended already: a
// call that was begun cannot be taken back.
func (t *token) run(ctx context.Context, f func() error) error {
	if err := ctx.Err(); err != nil {
		return mapped{err, custodian.ErrDeadline}
	}
	return meaning(ctx, f())
}

// A key is loaded. It is not wrapped by run: a release is one operation, and
// no closure is made for it.
type key struct{ k *hsm.Key }

func (k key) Seal(ctx context.Context, aad, plaintext []byte) (iv [12]byte, sealed []byte, err error) {
	if err := ctx.Err(); err != nil {
		return iv, nil, mapped{err, custodian.ErrDeadline}
	}
	iv, sealed, err = k.k.Seal(ctx, aad, plaintext, nil)
	if errors.Is(err, hsm.ErrAuth) {
		// The token does not open what it has just sealed.
		err = mapped{err, custodian.ErrHSMUnavailable}
	}
	return iv, sealed, meaning(ctx, err)
}

func (k key) Open(ctx context.Context, iv [12]byte, aad, sealed, dst []byte) (int, error) {
	if err := ctx.Err(); err != nil {
		return 0, mapped{err, custodian.ErrDeadline}
	}
	n, err := k.k.Open(ctx, iv, aad, sealed, dst)
	return n, meaning(ctx, err)
}

func (k key) Reseal(ctx context.Context, to custodian.Key, keys []custodian.Resealing) (int, error) {
	if err := ctx.Err(); err != nil {
		return 0, mapped{err, custodian.ErrDeadline}
	}
	other, ok := to.(key)
	if !ok {
		return 0, fmt.Errorf("%T is no key of this token: %w", to, hsm.ErrPolicy)
	}
	items := make([]hsm.Resealing, len(keys))
	for i, r := range keys {
		items[i] = hsm.Resealing(r)
	}
	n, err := k.k.Reseal(ctx, other.k, items)
	for i, it := range items[:n] {
		keys[i] = custodian.Resealing(it)
	}
	return n, meaning(ctx, err)
}

func (k key) CMAC(ctx context.Context, msg []byte) ([16]byte, error) {
	if err := ctx.Err(); err != nil {
		return [16]byte{}, mapped{err, custodian.ErrDeadline}
	}
	mac, err := k.k.CMAC(ctx, msg)
	return mac, meaning(ctx, err)
}

func (k key) Release() { k.k.Release() }

// A signer is a key pair whose errors are the domain's.
type signer struct{ crypto.Signer }

func (s signer) Sign(rand io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	signature, err := s.Signer.Sign(rand, digest, opts)
	return signature, mean(err)
}

// meaning is what an error of package hsm says to the domain. What no retry
// mends (attributes that are not right, two objects of one name, a bug) stays
// as it is.
func meaning(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	ended := ctx.Err() != nil && (errors.Is(err, ctx.Err()) || errors.Is(err, hsm.ErrBusy) || errors.Is(err, hsm.ErrDevice))
	if ended && !answers(err) {
		return mapped{err, custodian.ErrDeadline}
	}
	return mean(err)
}

// answers reports whether err is the token's own answer about a key or an
// object, which holds whether or not the caller still waits.
func answers(err error) bool {
	for _, e := range []error{hsm.ErrWrongKey, hsm.ErrAuth, hsm.ErrStale, hsm.ErrNotFound} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

func mean(err error) error {
	if _, done := err.(mapped); done || err == nil {
		return err
	}
	for _, m := range meanings {
		if errors.Is(err, m.from) {
			return mapped{err, m.to}
		}
	}
	return err
}

// meanings are in order of precedence: that a MEK does not open its canary is
// told by ErrWrongKey around an ErrAuth.
var meanings = []struct{ from, to error }{
	{hsm.ErrWrongKey, custodian.ErrWrongMEK},
	{hsm.ErrAuth, custodian.ErrAuth},
	{hsm.ErrLatched, custodian.ErrHSMUnavailable},
	{hsm.ErrPIN, custodian.ErrHSMUnavailable},
	{hsm.ErrDevice, custodian.ErrHSMUnavailable},
	{hsm.ErrBusy, custodian.ErrHSMUnavailable},
	{hsm.ErrStale, custodian.ErrStaleKey},
	{hsm.ErrNotFound, custodian.ErrNoObject},
}

// mapped is an error of the token with the domain's meaning. It keeps the
// token's sentence, which says what, which and why.
type mapped struct{ err, is error }

func (m mapped) Error() string   { return m.err.Error() }
func (m mapped) Unwrap() []error { return []error{m.is, m.err} }
