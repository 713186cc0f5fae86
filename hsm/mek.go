package hsm

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"sync"
	"time"

	"github.com/miekg/pkcs11"
	"golang.org/x/sys/unix"
)

// A MEKProfile says what a MEK lets out of the token again.
type MEKProfile string

const (
	// Sealed: a key that was wrapped under the MEK can only be unwrapped as one
	// that never leaves the token. A change of MEK needs new keys.
	Sealed MEKProfile = "sealed"
	// Rotatable: a wrapped key can be moved to another MEK inside the token. It
	// is only as safe as the module's WRAP_WITH_TRUSTED, see
	// Info.EnforcesTrusted: without it, who holds the PIN can take keys out.
	Rotatable MEKProfile = "rotatable"
)

// A MEKSpec says which MEK to generate. The ID is random and was written down
// by the caller before, so that a retry finds the key that a crash left.
type MEKSpec struct {
	Label   string
	ID      [16]byte
	Profile MEKProfile
	// Start and End are set in the token as dates; most modules only store
	// them. Zero leaves a date out.
	Start, End time.Time
}

// A MEK is an AES-256 key of the token that wraps and unwraps other keys. It
// finds itself again after a reconnect, and then checks the canary that it saw
// before.
type MEK struct {
	t     *Token
	label string
	id    [16]byte

	mu         sync.Mutex // guards the fields below
	epoch      Epoch
	handle     handle
	profile    MEKProfile
	attributes map[string]string
	canary     []byte // the last one that was right
	checked    Epoch  // in which it was right
}

// makeTimeout is the least time that the making of a token object gets: to
// settle its files can take long on a busy disk.
const makeTimeout = 30 * time.Second

// GenerateMEK makes a MEK. If one with this label and ID is there already, with
// exactly the right attributes, that is the result: a retry after a crash. It
// is ErrUnfit if its attributes differ, and ErrDuplicate if the label or the ID
// belongs to another key.
func (t *Token) GenerateMEK(ctx context.Context, s MEKSpec) error {
	what := "generate MEK " + s.Label
	if s.Label == "" || s.ID == [16]byte{} {
		return t.named(what, fmt.Errorf("label and ID must be set: %w", ErrPolicy))
	}
	if s.Profile != Sealed && s.Profile != Rotatable {
		return t.named(what, fmt.Errorf("profile %q: neither %s nor %s: %w", s.Profile, Sealed, Rotatable, ErrPolicy))
	}
	err := t.again(ctx, func() error {
		return t.doWithin(ctx, makeTimeout, t.control, func(w *worker) error { return w.generateMEK(s) })
	})
	return t.named(what, err)
}

func (w *worker) generateMEK(s MEKSpec) error {
	adopted, err := w.adopt(s)
	if adopted || err != nil {
		return err
	}
	_, rv := w.t.lib.generate(w.session, pkcs11.CKM_AES_KEY_GEN, mekTemplate(w.t.profile, s))
	if rv != ckrOK {
		// It may have failed after doing it, and some codes come up once in a
		// while when other processes work on the token.
		first := newFault(callGenerate, rv)
		if adopted, err := w.adopt(s); adopted || err != nil {
			return err
		}
		if rv != ckrGeneralError && rv != ckrTemplateMismatch {
			return first
		}
		if _, rv := w.t.lib.generate(w.session, pkcs11.CKM_AES_KEY_GEN, mekTemplate(w.t.profile, s)); rv != ckrOK {
			return newFault(callGenerate, rv)
		}
	}
	w.settleFiles()
	adopted, err = w.adopt(s)
	if err == nil && !adopted {
		return fmt.Errorf("the token made it and does not show it: %w", ErrUnfit)
	}
	return err
}

// DestroyMEK destroys the MEK with this label and ID, for good. One that is not
// there is destroyed already. ErrDuplicate: the label or the ID belongs to another
// key, and nothing was destroyed.
func (t *Token) DestroyMEK(ctx context.Context, label string, id [16]byte) error {
	err := t.again(ctx, func() error {
		return t.doWithin(ctx, makeTimeout, t.control, func(w *worker) error {
			h, err := w.one(pkcs11.CKO_SECRET_KEY, label, id)
			if isNotFound(err) {
				return nil
			}
			if err != nil {
				return err
			}
			if err := w.t.lib.p.DestroyObject(w.session, pkcs11.ObjectHandle(h)); err != nil {
				return faultOf(callDestroy, err)
			}
			w.settleFiles()
			return w.probe()
		})
	})
	return t.named("destroy MEK "+label, err)
}

// adopt tells whether the MEK is there and right.
func (w *worker) adopt(s MEKSpec) (bool, error) {
	h, err := w.one(pkcs11.CKO_SECRET_KEY, s.Label, s.ID)
	if isNotFound(err) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	_, err = w.compare(h, mekWanted(w.t.profile, s.Label, s.ID, s.Profile))
	return err == nil, err
}

// settleFiles has new token objects survive a power cut where the module is a
// library that writes plain files and never syncs them. Which files, it does
// not say.
func (w *worker) settleFiles() {
	if w.t.profile.sync {
		unix.Sync()
	}
}

// mekWanted is what a MEK must look like: its template, and what the token
// itself says about its birth. Dates are left out, because modules do not
// give them back.
func mekWanted(pr profile, label string, id [16]byte, p MEKProfile) template {
	tpl := mekTemplate(pr, MEKSpec{Label: label, ID: id, Profile: p})
	return append(tpl, flag(pkcs11.CKA_ALWAYS_SENSITIVE, true), flag(pkcs11.CKA_NEVER_EXTRACTABLE, true), flag(pkcs11.CKA_LOCAL, true))
}

// OpenMEK finds a MEK and holds every attribute against what a MEK of its
// profile must have. ErrNotFound: the token works and has neither the label nor
// the ID. ErrDuplicate: more than one key has the one or the other. ErrUnfit:
// attributes differ, each is named. It does not show that the key has the value
// it had before; CheckCanary does.
func (t *Token) OpenMEK(ctx context.Context, label string, id [16]byte) (*MEK, error) {
	m := &MEK{t: t, label: label, id: id}
	err := t.again(ctx, func() error { _, err := m.find(ctx); return err })
	if err != nil {
		return nil, t.named("open MEK "+label, err)
	}
	return m, nil
}

// found is where a MEK is in one epoch.
type found struct {
	epoch      Epoch
	handle     handle
	profile    MEKProfile
	attributes map[string]string
}

func (m *MEK) find(ctx context.Context) (found, error) {
	var f found
	err := m.t.do(ctx, m.t.control, func(w *worker) error {
		h, err := w.one(pkcs11.CKO_SECRET_KEY, m.label, m.id)
		if err != nil {
			return err
		}
		p, err := w.profileOf(h)
		if errors.Is(err, ErrUnfit) { // of neither profile: say all that is wrong
			p, err = Sealed, nil
		}
		if err != nil {
			return err
		}
		attrs, err := w.compare(h, mekWanted(w.t.profile, m.label, m.id, p))
		if err != nil {
			return err
		}
		attrs["profile"] = string(p)
		f = found{w.t.epoch, h, p, attrs}
		return nil
	})
	if err != nil {
		return found{}, err // an abandoned job may still write f
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.profile != "" && m.profile != f.profile {
		return f, fmt.Errorf("MEK %s: was %s, is %s: %w", m.label, m.profile, f.profile, ErrWrongKey)
	}
	m.epoch, m.handle, m.profile, m.attributes = f.epoch, f.handle, f.profile, f.attributes
	m.t.watch(f)
	return f, nil
}

// watch has Health look at a MEK.
func (t *Token) watch(f found) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if f.epoch != t.info.Epoch {
		return
	}
	list := make([]handle, 0, len(t.meks)+1)
	for _, h := range t.meks {
		if h != f.handle {
			list = append(list, h)
		}
	}
	t.meks = append(list, f.handle) // a new slice: Health reads the old one without the lock
}

// profileOf reads from the unwrap template whether the MEK is sealed.
func (w *worker) profileOf(h handle) (MEKProfile, error) {
	var has string
	for _, p := range []MEKProfile{Sealed, Rotatable} {
		ok, text, err := w.compareNested(h, attribute{typ: pkcs11.CKA_UNWRAP_TEMPLATE, nested: unwrapTemplate(p)})
		if err != nil {
			return "", err
		}
		if ok {
			return p, nil
		}
		has = text
	}
	return "", fmt.Errorf("unwrap template {%s} is neither of a %s nor of a %s MEK: %w", has, Sealed, Rotatable, ErrUnfit)
}

// resolve gives the MEK's handle in the current epoch. After a reconnect it
// finds the key again and, if a canary is known, checks it.
func (m *MEK) resolve(ctx context.Context) (found, error) {
	m.mu.Lock()
	f := found{epoch: m.epoch, handle: m.handle, profile: m.profile}
	canary, checked := m.canary, m.checked
	m.mu.Unlock()
	if f.epoch == m.t.Epoch() {
		return f, nil
	}
	f, err := m.find(ctx)
	if err != nil {
		return f, err
	}
	if canary == nil || checked == f.epoch {
		return f, nil
	}
	return f, m.checkCanary(ctx, f, canary)
}

// errMoved means that a job came to another epoch than its handle.
var errMoved = &fault{callFind, ckrObjectHandleInvalid, classHandle}

// with runs an operation on the MEK's handle, and once more if the handle or
// the connection turns out to be gone. A MEK that was there and is not found
// any more is a lost token until a new connection says otherwise.
func (m *MEK) with(ctx context.Context, op func(found) error) error {
	err := m.try(ctx, op)
	if err == nil {
		return nil
	}
	if hasClass(err, classHandle) {
		m.mu.Lock()
		epoch := m.epoch
		m.epoch = 0
		m.mu.Unlock()
		if err = m.try(ctx, op); err == nil {
			return nil
		}
		if isNotFound(err) || hasClass(err, classHandle) {
			if epoch != 0 && epoch == m.t.Epoch() {
				m.t.lose(fmt.Errorf("MEK %s was there and is gone: %w", m.label, ErrDevice))
			}
			err = fmt.Errorf("MEK %s was there and is gone: %w", m.label, ErrDevice)
		}
	}
	if !errors.Is(err, ErrDevice) || m.t.check() == nil {
		return err
	}
	if m.t.recovered(ctx, false) {
		return m.try(ctx, op)
	}
	return m.t.reason(err)
}

func (m *MEK) try(ctx context.Context, op func(found) error) error {
	f, err := m.resolve(ctx)
	if err != nil {
		return err
	}
	return op(f)
}

// Label is the CKA_LABEL of the MEK.
func (m *MEK) Label() string { return m.label }

// ID is the CKA_ID of the MEK.
func (m *MEK) ID() [16]byte { return m.id }

// Profile is sealed or rotatable, as the token's own unwrap template says.
func (m *MEK) Profile() MEKProfile {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.profile
}

// Epoch is the connection in which the MEK was found last.
func (m *MEK) Epoch() Epoch {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.epoch
}

// Checked is the connection in which the MEK's canary was right last, 0 if it
// was not checked yet.
func (m *MEK) Checked() Epoch {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.checked
}

// Attributes are those that the token showed when the MEK was found last, for
// evidence. They contain no secret.
func (m *MEK) Attributes() map[string]string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return maps.Clone(m.attributes)
}

// A MEK's canary is a version, an AES-256 key wrapped under the MEK, and a GCM
// ciphertext under that key. KWP is authenticated, so another MEK does not
// unwrap it; the ciphertext shows that what was unwrapped is the very key, and
// binds label and ID.
const (
	mekCanaryVersion = 1
	mekCanarySize    = 1 + BlobSize + gcmCanarySize
)

func (m *MEK) canaryIdentity() []byte {
	b := binary.BigEndian.AppendUint16(nil, uint16(len(m.label)))
	b = append(b, m.label...)
	return append(b, m.id[:]...)
}

// NewCanary makes a canary of the MEK and checks it. It is kept beside the
// MEK's record, and CheckCanary must open it before the MEK is used.
func (m *MEK) NewCanary(ctx context.Context) ([]byte, error) {
	var canary []byte
	err := m.with(ctx, func(f found) error {
		w, err := m.generate(ctx, f, useMEKCanary, m.canaryIdentity())
		if err != nil {
			return err
		}
		canary = append(append([]byte{mekCanaryVersion}, w.Blob...), w.Canary...)
		return m.checkCanary(ctx, f, canary)
	})
	if err != nil {
		return nil, m.named("new canary", err)
	}
	return canary, nil
}

// CheckCanary proves that the MEK is the one for which NewCanary made the
// canary. ErrWrongKey: it is another key, or the canary is not this MEK's.
func (m *MEK) CheckCanary(ctx context.Context, canary []byte) error {
	err := m.with(ctx, func(f found) error { return m.checkCanary(ctx, f, canary) })
	return m.named("check canary", err)
}

func (m *MEK) checkCanary(ctx context.Context, f found, canary []byte) error {
	if len(canary) != mekCanarySize || canary[0] != mekCanaryVersion {
		return fmt.Errorf("canary of %d bytes is not one of a MEK: %w", len(canary), ErrWrongKey)
	}
	w := Wrapped{Blob: canary[1 : 1+BlobSize], Canary: canary[1+BlobSize:]}
	k, err := m.load(ctx, f, useMEKCanary, m.canaryIdentity(), w)
	if errors.Is(err, ErrAuth) {
		return fmt.Errorf("the token has another key under this name: %w: %w", err, ErrWrongKey)
	}
	if err != nil {
		return err
	}
	k.Release()
	m.mu.Lock()
	defer m.mu.Unlock()
	m.canary, m.checked = append([]byte(nil), canary...), f.epoch
	return nil
}

func (m *MEK) named(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("token %s: MEK %s: %s: %w", m.t.c.Token, m.label, what, err)
}
