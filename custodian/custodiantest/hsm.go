package custodiantest

import (
	"bytes"
	"context"
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"sync"

	"github.com/keycustody/custodian/custodian"
)

// An HSM is a custodian.HSM in memory, for tests: what it holds survives as
// long as it does. It wraps by AES-256-GCM where a token uses KWP. Its keys
// are Go slices, so it protects nothing.
//
// Fail and FailAfter break its operations by the names of the methods of
// custodian.HSM ("LoadKey") and custodian.Key ("Seal", "Open", "CMAC").
type HSM struct {
	// mu guards the fields below.
	mu      sync.Mutex
	epoch   uint64
	meks    map[objectID]*rootKey
	signers map[objectID]crypto.Signer
	foreign []custodian.TokenObject
	faults  map[string][]fault
	counts  map[string]int
	drawn   []byte // what Random gives once, for a dst of its length
}

type objectID struct {
	label string
	id    [16]byte
}

type rootKey struct {
	bytes   []byte
	profile custodian.MEKProfile
}

type fault struct {
	err   error
	left  int
	after bool
}

// NewHSM returns an HSM that holds nothing.
func NewHSM() *HSM {
	return &HSM{epoch: 1, meks: map[objectID]*rootKey{}, signers: map[objectID]crypto.Signer{}, faults: map[string][]fault{}, counts: map[string]int{}}
}

// Clone returns a token with the same objects, so that what happens to the one
// is not seen in the other. No key is loaded in it, and no fault is set.
func (h *HSM) Clone() *HSM {
	h.mu.Lock()
	defer h.mu.Unlock()
	n := NewHSM()
	n.meks, n.signers, n.foreign = maps.Clone(h.meks), maps.Clone(h.signers), slices.Clone(h.foreign)
	return n
}

// Fail makes the next n calls of op answer err and do nothing.
func (h *HSM) Fail(op string, err error, n int) { h.addFault(op, fault{err, n, false}) }

// FailAfter makes the next n calls of op do what they are asked and then
// answer err.
func (h *HSM) FailAfter(op string, err error, n int) { h.addFault(op, fault{err, n, true}) }

func (h *HSM) addFault(op string, f fault) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.faults[op] = append(h.faults[op], f)
}

// Count is how often op was called, failed calls included.
func (h *HSM) Count(op string) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.counts[op]
}

// Reconnect does what a lost and found connection does: every loaded Key is
// stale from now on.
func (h *HSM) Reconnect() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.epoch++
}

// ReplaceMEK puts another key in the place of the MEK with this label and ID,
// as a damaged token does without a word.
func (h *HSM) ReplaceMEK(label string, id [16]byte) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.meks[objectID{label, id}].bytes = random(32)
}

// RemoveMEK takes a MEK out of the token.
func (h *HSM) RemoveMEK(label string, id [16]byte) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.meks, objectID{label, id})
}

// AddObject puts an object into the token that nobody asked for.
func (h *HSM) AddObject(o custodian.TokenObject) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.foreign = append(h.foreign, o)
}

// do counts a call of op and runs f between the faults that are set for it.
func (h *HSM) do(ctx context.Context, op string, f func() error) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.counts[op]++
	if ctx.Err() != nil {
		return fmt.Errorf("%s: %w: %w", op, custodian.ErrDeadline, context.Cause(ctx))
	}
	broken := h.nextFault(op)
	if broken.err != nil && !broken.after {
		return fmt.Errorf("%s: %w", op, broken.err)
	}
	if err := f(); err != nil {
		return fmt.Errorf("%s: %w", op, err)
	}
	if broken.err != nil {
		return fmt.Errorf("%s: %w", op, broken.err)
	}
	return nil
}

func (h *HSM) nextFault(op string) fault {
	for len(h.faults[op]) > 0 {
		f := &h.faults[op][0]
		if f.left > 0 {
			f.left--
			return *f
		}
		h.faults[op] = h.faults[op][1:]
	}
	return fault{}
}

// NextRandom makes the next call of Random for as many bytes give these, as a
// broken source would that repeats itself.
func (h *HSM) NextRandom(b []byte) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.drawn = bytes.Clone(b)
}

// Random fills dst from crypto/rand.
func (h *HSM) Random(ctx context.Context, dst []byte) error {
	return h.do(ctx, "Random", func() error {
		if len(h.drawn) == len(dst) && len(dst) > 0 {
			copy(dst, h.drawn)
			h.drawn = nil
			return nil
		}
		rand.Read(dst)
		return nil
	})
}

// GenerateMEK makes a MEK or adopts it.
func (h *HSM) GenerateMEK(ctx context.Context, m custodian.MEK) error {
	return h.do(ctx, "GenerateMEK", func() error {
		if m.Profile != custodian.ProfileSealed && m.Profile != custodian.ProfileRotatable {
			return fmt.Errorf("mek %s: profile %q", m.Label, m.Profile)
		}
		id := objectID{m.Label, m.ID}
		if k := h.meks[id]; k != nil {
			if k.profile != m.Profile {
				return fmt.Errorf("mek %s: it exists with profile %s", m.Label, k.profile)
			}
			return nil
		}
		for other := range h.meks {
			if other.label == m.Label || other.id == m.ID {
				return fmt.Errorf("mek %s: another has its label or its ID", m.Label)
			}
		}
		h.meks[id] = &rootKey{random(32), m.Profile}
		return nil
	})
}

// NewMEKCanary makes what CheckMEK proves a MEK by.
func (h *HSM) NewMEKCanary(ctx context.Context, m custodian.MEK) (canary []byte, err error) {
	err = h.do(ctx, "NewMEKCanary", func() error {
		k := h.meks[objectID{m.Label, m.ID}]
		if k == nil {
			return noMEK(m)
		}
		var err error
		canary, err = seal(k.bytes, mekCanaryData(m), random(32))
		return err
	})
	return canary, err
}

// CheckMEK verifies the canary of a MEK.
func (h *HSM) CheckMEK(ctx context.Context, m custodian.MEK) error {
	return h.do(ctx, "CheckMEK", func() error { _, err := h.mek(m); return err })
}

// MEKAttributes are those that every MEK has.
func (h *HSM) MEKAttributes(ctx context.Context, m custodian.MEK) (map[string]string, error) {
	err := h.do(ctx, "MEKAttributes", func() error { _, err := h.mek(m); return err })
	return map[string]string{"label": m.Label, "extractable": "false"}, err
}

// mek is the recorded MEK, proved by its canary. The caller holds mu.
func (h *HSM) mek(m custodian.MEK) (*rootKey, error) {
	k := h.meks[objectID{m.Label, m.ID}]
	if k == nil {
		return nil, noMEK(m)
	}
	if _, err := open(k.bytes, mekCanaryData(m), m.Canary); err != nil {
		return nil, fmt.Errorf("mek %s: canary: %w", m.Label, custodian.ErrWrongMEK)
	}
	return k, nil
}

func noMEK(m custodian.MEK) error {
	return fmt.Errorf("mek %s (CKA_ID %x): %w", m.Label, m.ID, custodian.ErrNoObject)
}

func mekCanaryData(m custodian.MEK) []byte { return fmt.Appendf(nil, "mek %x %s", m.ID, m.Label) }

// GenerateKey makes a wrapped key and its canary.
func (h *HSM) GenerateKey(ctx context.Context, m custodian.MEK, u custodian.KeyUse, identity []byte) (inner, canary []byte, err error) {
	err = h.do(ctx, "GenerateKey", func() error {
		k, err := h.mek(m)
		if err != nil {
			return err
		}
		if u != custodian.UseSeal && u != custodian.UseMAC {
			return fmt.Errorf("key use %d", u)
		}
		b := random(32)
		if inner, err = seal(k.bytes, nil, b); err != nil {
			return err
		}
		canary, err = seal(b, keyCanaryData(u, identity), nil)
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	return inner, canary, nil
}

// LoadKey unwraps a key and checks its canary.
func (h *HSM) LoadKey(ctx context.Context, m custodian.MEK, u custodian.KeyUse, identity, inner, canary []byte) (custodian.Key, error) {
	var loaded *key
	err := h.do(ctx, "LoadKey", func() error {
		k, err := h.mek(m)
		if err != nil {
			return err
		}
		b, err := open(k.bytes, nil, inner)
		if err != nil {
			return fmt.Errorf("unwrap: %w", err)
		}
		if _, err := open(b, keyCanaryData(u, identity), canary); err != nil {
			return fmt.Errorf("canary: %w", err)
		}
		loaded = &key{h: h, use: u, bytes: b, epoch: h.epoch}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return loaded, nil
}

// RewrapKey moves a key from one MEK to another.
func (h *HSM) RewrapKey(ctx context.Context, from, to custodian.MEK, u custodian.KeyUse, identity, inner, canary []byte) (moved []byte, err error) {
	err = h.do(ctx, "RewrapKey", func() error {
		old, err := h.mek(from)
		if err != nil {
			return err
		}
		next, err := h.mek(to)
		if err != nil {
			return err
		}
		if old.profile != custodian.ProfileRotatable {
			return fmt.Errorf("mek %s: profile %s lets no key go to another", from.Label, old.profile)
		}
		b, err := open(old.bytes, nil, inner)
		if err != nil {
			return fmt.Errorf("unwrap: %w", err)
		}
		if _, err := open(b, keyCanaryData(u, identity), canary); err != nil {
			return fmt.Errorf("canary: %w", err)
		}
		moved, err = seal(next.bytes, nil, b)
		return err
	})
	if err != nil {
		return nil, err
	}
	return moved, nil
}

func keyCanaryData(u custodian.KeyUse, identity []byte) []byte {
	return append([]byte{byte(u)}, identity...)
}

// GenerateSigner makes a key pair or adopts it.
func (h *HSM) GenerateSigner(ctx context.Context, alg custodian.SigningAlgorithm, label string, id [16]byte) error {
	return h.do(ctx, "GenerateSigner", func() (err error) {
		if h.signers[objectID{label, id}] != nil {
			return nil
		}
		var k crypto.Signer
		switch alg {
		case custodian.SignECDSAP256:
			k, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		case custodian.SignEd25519:
			var private ed25519.PrivateKey
			_, private, err = ed25519.GenerateKey(rand.Reader)
			k = private
		default:
			err = fmt.Errorf("algorithm %q is not known", alg)
		}
		if err == nil {
			h.signers[objectID{label, id}] = k
		}
		return err
	})
}

// Signer returns a key pair.
func (h *HSM) Signer(ctx context.Context, label string, id [16]byte) (s crypto.Signer, err error) {
	err = h.do(ctx, "Signer", func() error {
		k := h.signers[objectID{label, id}]
		if k == nil {
			return fmt.Errorf("signer %s (CKA_ID %x): %w", label, id, custodian.ErrNoObject)
		}
		s = signingKey{h, k}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return s, nil
}

// A signingKey signs in the HSM, as the operation "Sign".
type signingKey struct {
	hsm *HSM
	key crypto.Signer
}

func (s signingKey) Public() crypto.PublicKey { return s.key.Public() }

func (s signingKey) Sign(random io.Reader, digest []byte, opts crypto.SignerOpts) (sig []byte, err error) {
	// A crypto.Signer has no context.
	err = s.hsm.do(context.Background(), "Sign", func() error {
		sig, err = s.key.Sign(random, digest, opts)
		return err
	})
	if err != nil {
		return nil, err
	}
	return sig, nil
}

// DestroyLeftovers removes MEKs, signers and foreign objects by name.
func (h *HSM) DestroyLeftovers(ctx context.Context, labels []string, ids [][16]byte) (n int, err error) {
	err = h.do(ctx, "DestroyLeftovers", func() error {
		leftover := func(label string, id []byte) bool {
			if len(id) == 0 {
				return slices.Contains(labels, label)
			}
			return slices.ContainsFunc(ids, func(want [16]byte) bool { return string(id) == string(want[:]) })
		}
		for k := range h.meks {
			if leftover(k.label, k.id[:]) {
				delete(h.meks, k)
				n++
			}
		}
		for k := range h.signers {
			if leftover(k.label, k.id[:]) {
				delete(h.signers, k)
				n++
			}
		}
		before := len(h.foreign)
		h.foreign = slices.DeleteFunc(h.foreign, func(o custodian.TokenObject) bool { return leftover(o.Label, o.ID) })
		n += before - len(h.foreign)
		return nil
	})
	return n, err
}

// DestroyMEK removes a MEK, and what AddObject put in under its name.
func (h *HSM) DestroyMEK(ctx context.Context, m custodian.MEK) error {
	return h.do(ctx, "DestroyMEK", func() error {
		delete(h.meks, objectID{m.Label, m.ID})
		h.foreign = slices.DeleteFunc(h.foreign, func(o custodian.TokenObject) bool { return o.Label == m.Label && bytes.Equal(o.ID, m.ID[:]) })
		return nil
	})
}

// Objects lists the MEKs, both halves of the key pairs, and what AddObject
// put in, ordered by label.
func (h *HSM) Objects(ctx context.Context) (objects []custodian.TokenObject, err error) {
	err = h.do(ctx, "Objects", func() error {
		objects = slices.Clone(h.foreign)
		for k := range h.meks {
			objects = append(objects, custodian.TokenObject{Class: "secret key", Label: k.label, ID: k.id[:]})
		}
		for k := range h.signers {
			for _, class := range []string{"private key", "public key"} {
				objects = append(objects, custodian.TokenObject{Class: class, Label: k.label, ID: k.id[:]})
			}
		}
		slices.SortFunc(objects, func(a, b custodian.TokenObject) int {
			return bytes.Compare([]byte(a.Label+a.Class+string(a.ID)), []byte(b.Label+b.Class+string(b.ID)))
		})
		return nil
	})
	if err != nil {
		return nil, err
	}
	return objects, nil
}

// Health answers what Fail has it answer.
func (h *HSM) Health(ctx context.Context) error {
	return h.do(ctx, "Health", func() error { return nil })
}

// Status describes a token of no vendor.
func (h *HSM) Status() custodian.HSMStatus {
	h.mu.Lock()
	defer h.mu.Unlock()
	return custodian.HSMStatus{Label: "memory", Serial: "0", Model: "memory", Manufacturer: "custodiantest", Profile: "memory", Epoch: h.epoch, DefaultMEK: custodian.ProfileSealed, SessionsMax: 1}
}

// A key is loaded. What it holds is guarded by its HSM's mu.
type key struct {
	h        *HSM
	use      custodian.KeyUse
	bytes    []byte
	epoch    uint64
	released bool
}

// usable says why k may not be used for u, or nil. The caller holds mu.
func (k *key) usable(u custodian.KeyUse) error {
	if k.released || k.epoch != k.h.epoch {
		return custodian.ErrStaleKey
	}
	if k.use != u {
		return fmt.Errorf("the key is for use %d, not %d", k.use, u)
	}
	return nil
}

func (k *key) Seal(ctx context.Context, aad, plaintext []byte) (iv [12]byte, sealed []byte, err error) {
	err = k.h.do(ctx, "Seal", func() error {
		if err := k.usable(custodian.UseSeal); err != nil {
			return err
		}
		blob, err := seal(k.bytes, aad, plaintext)
		if err != nil {
			return err
		}
		iv, sealed = [12]byte(blob), blob[12:]
		return nil
	})
	if err != nil {
		return [12]byte{}, nil, err
	}
	return iv, sealed, nil
}

func (k *key) Open(ctx context.Context, iv [12]byte, aad, sealed, dst []byte) (n int, err error) {
	if len(dst) < len(sealed) {
		return 0, fmt.Errorf("Open: room for %d bytes, want %d", len(dst), len(sealed))
	}
	err = k.h.do(ctx, "Open", func() error {
		if err := k.usable(custodian.UseSeal); err != nil {
			return err
		}
		plain, err := open(k.bytes, aad, append(iv[:], sealed...))
		if err != nil {
			return err
		}
		n = copy(dst, plain)
		clear(plain)
		return nil
	})
	if err != nil {
		return 0, err
	}
	return n, nil
}

func (k *key) Reseal(ctx context.Context, to custodian.Key, keys []custodian.Resealing) (n int, err error) {
	other, ok := to.(*key)
	if !ok || other.h != k.h {
		return 0, errors.New("Reseal: the other key is of another HSM")
	}
	done := slices.Clone(keys)
	err = k.h.do(ctx, "Reseal", func() error {
		if err := errors.Join(k.usable(custodian.UseSeal), other.usable(custodian.UseSeal)); err != nil {
			return err
		}
		for ; n < len(done); n++ {
			r := &done[n]
			plain, err := open(k.bytes, r.AAD, append(r.IV[:], r.Sealed...))
			if err != nil {
				return err
			}
			blob, err := seal(other.bytes, r.To, plain)
			clear(plain)
			if err != nil {
				return err
			}
			r.IV, r.AAD, r.Sealed = [12]byte(blob), r.To, blob[12:]
		}
		return nil
	})
	if err != nil && !errors.Is(err, custodian.ErrAuth) {
		return 0, err
	}
	return copy(keys, done[:n]), err
}

func (k *key) CMAC(ctx context.Context, msg []byte) (mac [16]byte, err error) {
	err = k.h.do(ctx, "CMAC", func() error {
		if err := k.usable(custodian.UseMAC); err != nil {
			return err
		}
		mac = CMAC(k.bytes, msg)
		return nil
	})
	if err != nil {
		return [16]byte{}, err
	}
	return mac, nil
}

func (k *key) Release() {
	k.h.mu.Lock()
	defer k.h.mu.Unlock()
	if !k.released {
		clear(k.bytes)
		k.released = true
	}
}

// CMAC is AES-CMAC (SP 800-38B) in software, to compare a token's with. The
// key must be an AES key.
func CMAC(key, msg []byte) (mac [16]byte) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return mac // of no length that an AES key has
	}
	var sub [16]byte
	block.Encrypt(sub[:], sub[:])
	double(&sub)
	for len(msg) > 16 {
		subtle.XORBytes(mac[:], mac[:], msg[:16])
		block.Encrypt(mac[:], mac[:])
		msg = msg[16:]
	}
	var last [16]byte
	if n := copy(last[:], msg); n < 16 {
		last[n] = 0x80
		double(&sub)
	}
	subtle.XORBytes(mac[:], mac[:], last[:])
	subtle.XORBytes(mac[:], mac[:], sub[:])
	block.Encrypt(mac[:], mac[:])
	return mac
}

// double multiplies by x in GF(2^128), SP 800-38B section 5.3.
func double(b *[16]byte) {
	carry := b[0] >> 7
	for i := range 15 {
		b[i] = b[i]<<1 | b[i+1]>>7
	}
	b[15] = b[15]<<1 ^ carry*0x87
}

func random(n int) []byte {
	b := make([]byte, n)
	rand.Read(b)
	return b
}

// gcm is AES-GCM with a 96-bit IV and a 128-bit tag.
func gcm(key []byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

// seal encrypts to a blob of IV, ciphertext and tag.
func seal(key, aad, plaintext []byte) ([]byte, error) {
	aead, err := gcm(key)
	if err != nil {
		return nil, err
	}
	iv := random(12)
	return aead.Seal(iv, iv, plaintext, aad), nil
}

func open(key, aad, blob []byte) ([]byte, error) {
	aead, err := gcm(key)
	if err != nil {
		return nil, err
	}
	if len(blob) < 12 {
		return nil, custodian.ErrAuth
	}
	plain, err := aead.Open(nil, blob[:12], blob[12:], aad)
	if err != nil {
		return nil, custodian.ErrAuth
	}
	return plain, nil
}
