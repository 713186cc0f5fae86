package hsm

import (
	"bytes"
	"context"
	"crypto/subtle"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"

	"github.com/miekg/pkcs11"
)

// A Use is the one thing that a wrapped key is for. Its zero value is none.
type Use uint8

const (
	// UseGCM seals and opens with AES-256-GCM.
	UseGCM Use = 1
	// UseCMAC computes AES-256-CMAC.
	UseCMAC Use = 2

	useMEKCanary Use = 3 // of package hsm itself
)

// String names the use for messages.
func (u Use) String() string {
	switch u {
	case UseGCM:
		return "GCM"
	case UseCMAC:
		return "CMAC"
	case useMEKCanary:
		return "MEK canary"
	}
	return fmt.Sprintf("use %d", uint8(u))
}

// template is what a key is unwrapped with for the use.
func (u Use) template(pr profile) template {
	if u == useMEKCanary {
		return residentTemplate(pr, UseGCM)
	}
	return residentTemplate(pr, u)
}

// BlobSize is the length of a wrapped AES-256 key (RFC 5649) in bytes.
const BlobSize = 40

// A Wrapped is an AES-256 key as it rests. Both parts can be stored in the
// open; neither binds anything but the key itself, its use and its identity,
// so the record around them has to be authenticated.
type Wrapped struct {
	Blob   []byte // AES-256 KWP (RFC 5649) of the key under the MEK, BlobSize bytes
	Canary []byte // shows that Blob was unwrapped to the right key, for the right use and identity
}

// A key's canary is a version, the use, and a proof under the key itself: for
// UseGCM an IV and the ciphertext of a constant, with use and identity as
// associated data; for UseCMAC the MAC of the same. It costs one of the key's
// GCM invocations.
const (
	keyCanaryVersion = 1
	gcmCanarySize    = 2 + IVSize + len(canaryText) + TagSize
	cmacCanarySize   = 2 + TagSize
	canaryText       = "hsm key canary\x00\x01" // no CMAC of a caller may start with it
	// MaxIdentity is the longest identity of a key in bytes.
	MaxIdentity = 1024
)

func canaryMessage(use Use, identity []byte) []byte {
	b := append([]byte(canaryText), byte(use))
	b = binary.BigEndian.AppendUint32(b, uint32(len(identity)))
	return append(b, identity...)
}

// Generate makes an AES-256 key inside the token and returns it wrapped. The
// key was loaded again and its canary checked before it is returned, and then
// released. identity is bound to the canary; Load wants the same.
func (m *MEK) Generate(ctx context.Context, use Use, identity []byte) (Wrapped, error) {
	if err := checkUse(use, identity); err != nil {
		return Wrapped{}, m.named("generate key", err)
	}
	var out Wrapped
	err := m.with(ctx, func(f found) (err error) {
		out, err = m.generate(ctx, f, use, identity)
		return err
	})
	if err != nil {
		return Wrapped{}, m.named("generate "+use.String()+" key", err)
	}
	return out, nil
}

func checkUse(use Use, identity []byte) error {
	if use != UseGCM && use != UseCMAC {
		return fmt.Errorf("%s: not a use: %w", use, ErrPolicy)
	}
	if len(identity) > MaxIdentity {
		return fmt.Errorf("identity of %d bytes is longer than %d: %w", len(identity), MaxIdentity, ErrPolicy)
	}
	return nil
}

func (m *MEK) generate(ctx context.Context, f found, use Use, identity []byte) (Wrapped, error) {
	blob, err := m.transient(ctx, f, f, func(w *worker) (handle, uint) {
		return w.t.lib.generate(w.session, pkcs11.CKM_AES_KEY_GEN, transientNew(w.t.profile))
	}, callGenerate)
	if err != nil {
		return Wrapped{}, err
	}
	k, err := m.unwrap(ctx, f, use, blob)
	if err != nil {
		return Wrapped{}, fmt.Errorf("verify: %w", err)
	}
	defer k.Release()
	canary, err := k.newCanary(ctx, identity)
	if err != nil {
		return Wrapped{}, err
	}
	if err := k.checkCanary(ctx, identity, canary); err != nil {
		return Wrapped{}, fmt.Errorf("verify: %w", err)
	}
	return Wrapped{blob, canary}, nil
}

// transient makes a key that can be wrapped, wraps it under the MEK at to and
// destroys it, in one job of the anchor.
func (m *MEK) transient(ctx context.Context, f, to found, make func(*worker) (handle, uint), c call) ([]byte, error) {
	var blob []byte
	err := m.t.do(ctx, m.t.anchor, func(w *worker) error {
		if f.epoch != w.t.epoch || to.epoch != w.t.epoch {
			return errMoved
		}
		key, rv := make(w)
		if rv != ckrOK {
			return newFault(c, rv)
		}
		defer w.destroy(key)
		n, rv := w.t.lib.wrap(w.session, w.t.profile.kwp, to.handle, key, w.out)
		if rv != ckrOK {
			return newFault(callWrap, rv)
		}
		if n != BlobSize {
			return fmt.Errorf("wrapped key has %d bytes, want %d: %w", n, BlobSize, ErrUnfit)
		}
		blob = slices.Clone(w.out[:n])
		return nil
	})
	if err != nil {
		return nil, err
	}
	return blob, nil
}

// Load unwraps a key for use, as an object that lives in the token until
// Release and cannot leave it, and checks its canary. ErrAuth: the blob was not
// wrapped under this MEK. ErrWrongKey: the canary is not that of this key, use
// and identity.
func (m *MEK) Load(ctx context.Context, use Use, identity []byte, w Wrapped) (*Key, error) {
	if err := checkUse(use, identity); err != nil {
		return nil, m.named("load key", err)
	}
	var k *Key
	err := m.with(ctx, func(f found) (err error) {
		k, err = m.load(ctx, f, use, identity, w)
		return err
	})
	if err != nil {
		return nil, m.named("load "+use.String()+" key", err)
	}
	return k, nil
}

func (m *MEK) load(ctx context.Context, f found, use Use, identity []byte, w Wrapped) (*Key, error) {
	k, err := m.unwrap(ctx, f, use, w.Blob)
	if err != nil {
		return nil, err
	}
	if err := k.checkCanary(ctx, identity, w.Canary); err != nil {
		k.Release()
		return nil, err
	}
	return k, nil
}

// unwrap makes a resident key in the anchor's session, which is never closed:
// session objects end with the session that made them.
func (m *MEK) unwrap(ctx context.Context, f found, use Use, blob []byte) (*Key, error) {
	// Modules take other lengths too, and make shorter keys of them.
	if len(blob) != BlobSize {
		return nil, fmt.Errorf("wrapped key has %d bytes, want %d: %w", len(blob), BlobSize, ErrAuth)
	}
	blob = slices.Clone(blob) // an abandoned call reads it after we left
	t := m.t
	w, err := t.take(ctx, t.anchor)
	if err != nil {
		return nil, err
	}
	err = w.run(ctx, func(w *worker) error {
		if f.epoch != t.epoch {
			return errMoved
		}
		key, rv := t.lib.unwrap(w.session, t.profile.kwp, f.handle, blob, use.template(t.profile))
		if rv != ckrOK {
			return newFault(callUnwrap, rv)
		}
		w.made = key
		w.undo = func() { w.destroy(key) }
		return nil
	})
	if err != nil {
		return nil, err
	}
	k := &Key{t: t, epoch: f.epoch, handle: w.made, use: use}
	k.refs.Store(1)
	w.release()
	return k, nil
}

// Rewrap moves a key from this MEK, which must be rotatable, to another one of
// the same token. The key is never outside of the token; the result was loaded
// and its canary checked before it is returned. The canary stays as it was.
func (m *MEK) Rewrap(ctx context.Context, to *MEK, w Wrapped, use Use, identity []byte) (Wrapped, error) {
	what := "rewrap " + use.String() + " key to MEK " + to.label
	if err := checkUse(use, identity); err != nil {
		return Wrapped{}, m.named(what, err)
	}
	if to.t != m.t || m.Profile() != Rotatable {
		return Wrapped{}, m.named(what, fmt.Errorf("both must be of one token, and the old MEK rotatable, not %s: %w", m.Profile(), ErrPolicy))
	}
	if len(w.Blob) != BlobSize {
		return Wrapped{}, m.named(what, fmt.Errorf("wrapped key has %d bytes, want %d: %w", len(w.Blob), BlobSize, ErrAuth))
	}
	out := Wrapped{Canary: slices.Clone(w.Canary)}
	old := slices.Clone(w.Blob)
	err := m.with(ctx, func(f found) error {
		return to.with(ctx, func(g found) (err error) {
			out.Blob, err = m.transient(ctx, f, g, func(w *worker) (handle, uint) {
				return w.t.lib.unwrap(w.session, w.t.profile.kwp, f.handle, old, transientAgain(w.t.profile))
			}, callUnwrap)
			if err != nil {
				return err
			}
			k, err := to.load(ctx, g, use, identity, out)
			if err != nil {
				return fmt.Errorf("verify: %w", err)
			}
			k.Release()
			return nil
		})
	})
	if err != nil {
		return Wrapped{}, m.named(what, err)
	}
	return out, nil
}

// A Key is an AES-256 key inside the token, ready for use. It is safe for
// concurrent use. After a reconnect every operation is ErrStale: load it again.
type Key struct {
	t      *Token
	epoch  Epoch
	handle handle
	use    Use

	refs     atomic.Int64 // one for the owner, one for each call in flight
	released atomic.Bool
}

// Epoch is the connection that the key was loaded in.
func (k *Key) Epoch() Epoch { return k.epoch }

// Release lets the token destroy the key once the calls in flight have ended.
// Later operations are ErrStale. Releasing twice does no harm.
func (k *Key) Release() {
	if !k.released.Swap(true) {
		k.unref()
	}
}

func (k *Key) ref() bool {
	for {
		n := k.refs.Load()
		if n == 0 || k.released.Load() {
			return false
		}
		if k.refs.CompareAndSwap(n, n+1) {
			return true
		}
	}
}

func (k *Key) unref() {
	if k.refs.Add(-1) == 0 {
		k.t.doom(k.epoch, k.handle)
	}
}

// take borrows a worker of the pool for a call with the key.
func (k *Key) take(ctx context.Context) (*worker, error) {
	if !k.ref() {
		return nil, fmt.Errorf("key was released: %w", ErrStale)
	}
	w, err := k.t.take(ctx, k.t.pool)
	if err != nil {
		k.unref()
		return nil, err
	}
	w.key = k
	if k.epoch != k.t.epoch {
		w.release()
		return nil, fmt.Errorf("key is of epoch %d, the token in %d: %w", k.epoch, k.t.Epoch(), ErrStale)
	}
	return w, nil
}

// Seal encrypts plaintext (at most MaxPlaintext bytes) with AES-256-GCM under a
// random 96-bit IV of the token and a 128-bit tag. The ciphertext was opened
// again and compared before it is returned. ct is dst's memory if it has room
// for len(plaintext)+TagSize bytes, else new memory. The caller counts the
// invocations of a key.
func (k *Key) Seal(ctx context.Context, aad, plaintext, dst []byte) (iv [IVSize]byte, ct []byte, err error) {
	if k.use != UseGCM {
		return iv, nil, k.named("seal", fmt.Errorf("key is for %s: %w", k.use, ErrPolicy))
	}
	iv, ct, err = k.seal(ctx, aad, plaintext, dst)
	return iv, ct, k.named("seal", err)
}

func (k *Key) seal(ctx context.Context, aad, plaintext, dst []byte) (iv [IVSize]byte, ct []byte, err error) {
	if len(plaintext) > MaxPlaintext || len(aad) > MaxAAD {
		return iv, nil, fmt.Errorf("plaintext of %d or associated data of %d bytes is too long: %w", len(plaintext), len(aad), ErrPolicy)
	}
	w, err := k.take(ctx)
	if err != nil {
		return iv, nil, err
	}
	w.inLen = copy(w.in, plaintext)
	w.aadLen = copy(w.aad, aad)
	if err := w.run(ctx, runSeal); err != nil {
		return iv, nil, err
	}
	iv = w.iv
	ct = append(dst[:0], w.out[:w.n]...)
	w.release()
	return iv, ct, nil
}

func runSeal(w *worker) error {
	if rv := w.t.lib.random(w.session, w.iv[:]); rv != ckrOK {
		return newFault(callRandom, rv)
	}
	return w.seal(w.key, w.aad[:w.aadLen])
}

// seal encrypts the input under w.iv, decrypts the result and compares.
func (w *worker) seal(key *Key, aad []byte) error {
	lib := w.t.lib
	n, rv := lib.gcmSeal(w.session, key.handle, &w.iv, aad, w.in[:w.inLen], w.out)
	if rv != ckrOK {
		return newFault(callEncrypt, rv)
	}
	if n != w.inLen+TagSize {
		return fmt.Errorf("ciphertext has %d bytes, want %d: %w", n, w.inLen+TagSize, ErrUnfit)
	}
	w.n = n
	defer clear(w.check)
	m, rv := lib.gcmOpen(w.session, key.handle, &w.iv, aad, w.out[:n], w.check)
	if rv != ckrOK {
		return fmt.Errorf("verify: %w", newFault(callDecrypt, rv))
	}
	if subtle.ConstantTimeCompare(w.check[:m], w.in[:w.inLen]) != 1 {
		return fmt.Errorf("verify: what was sealed opens to something else: %w", ErrDevice)
	}
	return nil
}

// Open decrypts ct into dst, which needs room for len(ct)-TagSize bytes, and
// returns the length of the plaintext. It is one operation of the token.
// ErrAuth: ct, aad or iv is not what Seal returned under this key.
func (k *Key) Open(ctx context.Context, iv [IVSize]byte, aad, ct, dst []byte) (n int, err error) {
	if k.use != UseGCM {
		return 0, k.named("open", fmt.Errorf("key is for %s: %w", k.use, ErrPolicy))
	}
	n, err = k.open(ctx, iv, aad, ct, dst)
	return n, k.named("open", err)
}

func (k *Key) open(ctx context.Context, iv [IVSize]byte, aad, ct, dst []byte) (int, error) {
	if len(ct) < TagSize || len(ct) > scratchText || len(aad) > MaxAAD {
		return 0, fmt.Errorf("ciphertext of %d or associated data of %d bytes has no valid length: %w", len(ct), len(aad), ErrAuth)
	}
	if len(dst) < len(ct)-TagSize {
		return 0, fmt.Errorf("room for %d bytes, want %d: %w", len(dst), len(ct)-TagSize, ErrPolicy)
	}
	w, err := k.take(ctx)
	if err != nil {
		return 0, err
	}
	w.iv = iv
	w.inLen = copy(w.in, ct)
	w.aadLen = copy(w.aad, aad)
	if err := w.run(ctx, runOpen); err != nil {
		return 0, err
	}
	n := copy(dst, w.out[:w.n])
	w.release()
	return n, nil
}

func runOpen(w *worker) error {
	n, rv := w.t.lib.gcmOpen(w.session, w.key.handle, &w.iv, w.aad[:w.aadLen], w.in[:w.inLen], w.out)
	if rv != ckrOK {
		return newFault(callDecrypt, rv)
	}
	if n != w.inLen-TagSize {
		return fmt.Errorf("plaintext has %d bytes, want %d: %w", n, w.inLen-TagSize, ErrDevice)
	}
	w.n = n
	return nil
}

// A Resealing is a ciphertext that goes from one key to another: first as Seal
// returned it, and when Reseal is done with it as it is under the other key.
type Resealing struct {
	IV     [IVSize]byte
	AAD    []byte
	Sealed []byte
	// To is the associated data under the other key.
	To []byte
}

// stepItems is how many items of a job have the token, and a processor, to
// themselves at a time: a callback waits so long.
const stepItems = 4

// A resealing is what Reseal gives a worker: memory of its own, since its caller
// may leave.
type resealing struct {
	to     *Key
	items  []Resealing
	done   int  // of items
	opened bool // the item after those: what fails now is the other key's
}

// Reseal opens ciphertexts and seals what is in them under another key, which is
// opened again and compared as by Seal. No plaintext leaves the locked memory
// and the token. It is one job of three operations for each item, which lets
// others who wait go first after every few items.
//
// n of the items are changed, the first ones. ErrAuth is about items[n], the
// others are still to be done. With another error nothing is changed.
func (k *Key) Reseal(ctx context.Context, to *Key, items []Resealing) (n int, err error) {
	if k.use != UseGCM || to.use != UseGCM {
		return 0, k.named("reseal", fmt.Errorf("keys are for %s and %s: %w", k.use, to.use, ErrPolicy))
	}
	n, err = k.reseal(ctx, to, items)
	return n, k.named("reseal", err)
}

func (k *Key) reseal(ctx context.Context, to *Key, items []Resealing) (int, error) {
	b := &resealing{to: to, items: make([]Resealing, len(items))}
	for i, it := range items {
		if len(it.Sealed) < TagSize || len(it.Sealed) > scratchText || len(it.AAD) > MaxAAD || len(it.To) > MaxAAD {
			return 0, fmt.Errorf("item %d: ciphertext of %d, or associated data of %d or %d bytes, has no valid length: %w", i, len(it.Sealed), len(it.AAD), len(it.To), ErrPolicy)
		}
		b.items[i] = Resealing{IV: it.IV, AAD: slices.Clone(it.AAD), Sealed: slices.Clone(it.Sealed), To: slices.Clone(it.To)}
	}
	w, err := k.take(ctx)
	if err != nil {
		return 0, err
	}
	if !to.ref() {
		w.release()
		return 0, fmt.Errorf("the other key was released: %w", ErrStale)
	}
	w.resealing = b
	if to.epoch != k.epoch {
		w.release()
		return 0, fmt.Errorf("keys are of epochs %d and %d: %w", k.epoch, to.epoch, ErrStale)
	}
	err = w.run(ctx, runReseal)
	switch {
	case err == nil:
		w.release()
	case !errors.Is(err, ErrAuth):
		return 0, err
	case b.opened:
		return 0, fmt.Errorf("the token does not open what it has sealed: %s: %w", err, ErrDevice)
	}
	return copy(items, b.items[:b.done]), err
}

// runReseal goes on where an earlier attempt, in a session that broke, ended.
func runReseal(w *worker) error {
	b := w.resealing
	ivs := make([]byte, IVSize*(len(b.items)-b.done)) // drawn at once: a call of the module each would be 4 %
	if rv := w.t.lib.random(w.session, ivs); rv != ckrOK {
		return newFault(callRandom, rv)
	}
	for ; b.done < len(b.items); b.done++ {
		it := &b.items[b.done]
		b.opened = false
		clear(w.in[:w.inLen]) // the item before may have been longer
		if b.done%stepItems == 0 && b.done > 0 && !w.stepAside() {
			return nil // to nobody
		}
		w.inLen = len(it.Sealed) // what is wiped if this fails
		n, rv := w.t.lib.gcmOpen(w.session, w.key.handle, &it.IV, it.AAD, it.Sealed, w.in)
		if rv != ckrOK {
			return newFault(callDecrypt, rv)
		}
		if n != len(it.Sealed)-TagSize {
			return fmt.Errorf("plaintext has %d bytes, want %d: %w", n, len(it.Sealed)-TagSize, ErrDevice)
		}
		clear(w.in[n:w.inLen])
		b.opened, w.inLen = true, n
		w.iv, ivs = [IVSize]byte(ivs), ivs[IVSize:]
		if err := w.seal(b.to, it.To); err != nil {
			return err
		}
		it.IV, it.AAD = w.iv, it.To
		copy(it.Sealed, w.out[:w.n])
	}
	return nil
}

// CMAC computes AES-256-CMAC (SP 800-38B) of msg, at most MaxMessage bytes. A
// message that starts like a canary is refused.
func (k *Key) CMAC(ctx context.Context, msg []byte) (mac [TagSize]byte, err error) {
	if k.use != UseCMAC {
		return mac, k.named("CMAC", fmt.Errorf("key is for %s: %w", k.use, ErrPolicy))
	}
	if len(msg) > MaxMessage || bytes.HasPrefix(msg, []byte(canaryText)) {
		return mac, k.named("CMAC", fmt.Errorf("message of %d bytes is too long or starts like a canary: %w", len(msg), ErrPolicy))
	}
	mac, err = k.cmac(ctx, msg)
	return mac, k.named("CMAC", err)
}

func (k *Key) cmac(ctx context.Context, msg []byte) (mac [TagSize]byte, err error) {
	w, err := k.take(ctx)
	if err != nil {
		return mac, err
	}
	if len(msg) <= len(w.aad) {
		w.message = w.aad[:copy(w.aad, msg)]
	} else {
		w.message = slices.Clone(msg)
	}
	if err := w.run(ctx, runCMAC); err != nil {
		return mac, err
	}
	copy(mac[:], w.out[:TagSize])
	w.release()
	return mac, nil
}

func runCMAC(w *worker) error {
	n, rv := w.t.lib.sign(w.session, pkcs11.CKM_AES_CMAC, w.key.handle, w.message, w.out[:TagSize])
	if rv != ckrOK {
		return newFault(callSign, rv)
	}
	if n != TagSize {
		return fmt.Errorf("MAC has %d bytes, want %d: %w", n, TagSize, ErrDevice)
	}
	return nil
}

func (k *Key) newCanary(ctx context.Context, identity []byte) ([]byte, error) {
	head := []byte{keyCanaryVersion, byte(k.use)}
	if k.use == UseCMAC {
		mac, err := k.cmac(ctx, canaryMessage(k.use, identity))
		return append(head, mac[:]...), err
	}
	iv, ct, err := k.seal(ctx, canaryMessage(k.use, identity), []byte(canaryText), nil)
	return append(append(head, iv[:]...), ct...), err
}

// checkCanary proves that the key is the one of which the canary was made.
func (k *Key) checkCanary(ctx context.Context, identity, canary []byte) error {
	size := gcmCanarySize
	if k.use == UseCMAC {
		size = cmacCanarySize
	}
	if len(canary) != size || canary[0] != keyCanaryVersion || canary[1] != byte(k.use) {
		return fmt.Errorf("canary of %d bytes is not one of a %s key: %w", len(canary), k.use, ErrWrongKey)
	}
	message, proof := canaryMessage(k.use, identity), canary[2:]
	if k.use == UseCMAC {
		mac, err := k.cmac(ctx, message)
		if err != nil {
			return err
		}
		if subtle.ConstantTimeCompare(mac[:], proof) != 1 {
			return fmt.Errorf("canary is of another key or identity: %w", ErrWrongKey)
		}
		return nil
	}
	var text [len(canaryText)]byte
	_, err := k.open(ctx, [IVSize]byte(proof[:IVSize]), message, proof[IVSize:], text[:])
	if errors.Is(err, ErrAuth) || err == nil && string(text[:]) != canaryText {
		return fmt.Errorf("canary is of another key or identity: %w", ErrWrongKey)
	}
	return err
}

func (k *Key) named(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("token %s: %s: %w", k.t.c.Token, what, err)
}
