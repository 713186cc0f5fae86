package hsm

import (
	"crypto/subtle"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/ThalesIgnite/crypto11"
	"github.com/miekg/pkcs11"

	"github.com/keycustody/custodian/internal/secret"
)

// claim makes t the one owner of the module in this process.
func (l *library) claim(t *Token) error {
	libraryMu.Lock()
	defer libraryMu.Unlock()
	if o := owners[l]; o != nil {
		return fmt.Errorf("module %s: token %s of this process has it open: %w", l.path, o.c.Token, ErrPolicy)
	}
	owners[l] = t
	return nil
}

func (l *library) unclaim(t *Token) {
	libraryMu.Lock()
	defer libraryMu.Unlock()
	if owners[l] == t {
		delete(owners, l)
	}
}

// owners has the token that a module is open for; libraryMu guards it.
var owners = map[*library]*Token{}

// connect initialises the module, finds the token, logs in and tests what the
// module can do. After an error the module is not initialised.
func (t *Token) connect() error {
	ti, err := t.attach()
	if err != nil {
		return err
	}
	if err := t.establish(ti); err != nil {
		return errors.Join(err, t.disconnect())
	}
	t.c.Log.Info("token connected", "token", t.c.Token, "serial", t.serial, "profile", t.profile.name, "epoch", uint64(t.epoch))
	return nil
}

// Attempts to initialise the module until it sees the token: of processes that
// start at once, SoftHSM shows some no token at all.
const (
	attachTries = 5
	attachPause = 30 * time.Millisecond
)

// attach initialises the module through crypto11, which cannot share one that
// is initialised already. It does not log in: the PIN would be a string.
func (t *Token) attach() (pkcs11.TokenInfo, error) {
	var err error
	for try := range attachTries {
		if try > 0 {
			select {
			case <-time.After(time.Duration(try) * attachPause):
			case <-t.life.Done():
				return pkcs11.TokenInfo{}, fmt.Errorf("connect: %w", t.life.Err())
			}
		}
		if t.signers, err = t.configure(); err == nil {
			break
		}
		if t.epoch > 0 && hasCode(faultOf(callInit, err), ckrInitialized) {
			// Our own finalisation failed. No call is under way: do it again.
			_ = t.lib.p.Finalize()
		}
	}
	if err != nil {
		return pkcs11.TokenInfo{}, t.absent(faultOf(callInit, err))
	}
	slot, ti, err := t.lib.findToken(t.uri, t.serial)
	if err != nil {
		return ti, errors.Join(err, t.disconnect())
	}
	t.slot = slot
	return ti, nil
}

// configure opens a crypto11 context with one session for itself and one to
// sign in.
func (t *Token) configure() (*crypto11.Context, error) {
	c := crypto11.Config{Path: t.lib.path, MaxSessions: 2, PoolWaitTimeout: t.c.CallTimeout, LoginNotSupported: true}
	switch {
	case t.serial != "":
		c.TokenSerial = t.serial
	case t.uri.Serial != "":
		c.TokenSerial = t.uri.Serial
	default:
		c.TokenLabel = t.uri.Token
	}
	return crypto11.Configure(&c)
}

// findToken looks through the slots of the initialised module.
func (l *library) findToken(u URI, serial string) (slot uint, ti pkcs11.TokenInfo, err error) {
	slots, err := l.p.GetSlotList(true)
	if err != nil {
		return 0, ti, faultOf(callTokenInfo, err)
	}
	found := 0
	for _, s := range slots {
		info, err := l.p.GetTokenInfo(s)
		if err != nil || info.Flags&pkcs11.CKF_TOKEN_INITIALIZED == 0 {
			continue
		}
		if !u.names(info.Label, info.ManufacturerID, info.SerialNumber, info.Model) || (serial != "" && info.SerialNumber != serial) {
			continue
		}
		found++
		slot, ti = s, info
	}
	switch found {
	case 0:
		return 0, ti, fmt.Errorf("no slot of module %s holds it: %w", l.path, ErrDevice)
	case 1:
		return slot, ti, nil
	}
	return 0, ti, fmt.Errorf("%d tokens of module %s fit, name the serial: %w", found, l.path, ErrDuplicate)
}

// absent explains why the token was not found: if another token has its name
// now, it was replaced.
func (t *Token) absent(err error) error {
	if _, ok := classOf(err); ok {
		return err
	}
	if ierr := t.lib.p.Initialize(); ierr != nil {
		return errors.Join(err, faultOf(callInit, ierr))
	}
	defer func() { _ = t.lib.p.Finalize() }()
	if t.serial != "" {
		if _, ti, ferr := t.lib.findToken(t.uri, ""); ferr == nil && ti.SerialNumber != t.serial {
			return replaced(t.serial, ti.SerialNumber)
		}
	}
	_, _, ferr := t.lib.findToken(t.uri, t.serial)
	if ferr == nil {
		return fmt.Errorf("found only after %d attempts: %w", attachTries, ErrDevice)
	}
	return ferr
}

func replaced(was, is string) error {
	return fmt.Errorf("serial was %s, is %s: it was re-initialised or replaced: %w", was, is, ErrDevice)
}

// establish makes a connection out of an initialised module.
func (t *Token) establish(ti pkcs11.TokenInfo) error {
	pr, err := chooseProfile(t.c.Profile, ti.ManufacturerID)
	if err != nil {
		return err
	}
	t.profile = pr
	if err := t.makeWorkers(ti); err != nil {
		return err
	}
	anchor, control := t.workers[0], t.workers[1]
	for _, w := range []*worker{anchor, control} {
		w.keep = false // the keeper may open the anchor
		if err := w.openSession(); err != nil {
			return err
		}
	}
	anchor.keep = true
	if err := t.login(anchor.session, ti); err != nil {
		return err
	}
	// Nobody has made a session object yet, so what looks like one is what the
	// module left when a process was killed while it made a token object.
	strays, err := control.find(template{flag(pkcs11.CKA_TOKEN, false)})
	if err != nil {
		return err
	}
	if len(strays) > 0 {
		t.c.Log.Warn("the token holds incomplete objects of a process that was killed", "token", t.c.Token, "objects", len(strays))
	}
	if err := t.lib.needs(t.slot, pr); err != nil {
		return err
	}
	if t.probing, err = anchor.newProbe(); err != nil {
		return err
	}
	if t.trusted, err = control.selfTest(); err != nil {
		return fmt.Errorf("self-test: %w", err)
	}
	t.publish(ti)
	return nil
}

// publish starts the new epoch.
func (t *Token) publish(ti pkcs11.TokenInfo) {
	t.epoch++
	t.serial = ti.SerialNumber
	max := t.c.MaxSessions
	if max == 0 {
		max = len(t.workers) - 3 + fixedSessions
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.meks = nil
	t.info = Info{
		Label: ti.Label, Serial: ti.SerialNumber, Manufacturer: ti.ManufacturerID, Model: ti.Model,
		Firmware: fmt.Sprintf("%d.%d", ti.FirmwareVersion.Major, ti.FirmwareVersion.Minor),
		Profile:  t.profile.name, Epoch: t.epoch, EnforcesTrusted: t.trusted,
		DefaultMEKProfile: Sealed, MaxSessions: max,
	}
	if t.trusted {
		t.info.DefaultMEKProfile = Rotatable
	}
}

// makeWorkers starts the workers at the first connect, as many as the token
// has room for.
func (t *Token) makeWorkers(ti pkcs11.TokenInfo) error {
	if t.workers != nil {
		return nil
	}
	n := t.c.MaxSessions
	if n == 0 {
		n = t.profile.sessions
	}
	if room := ti.MaxRwSessionCount; room != pkcs11.CK_EFFECTIVELY_INFINITE && room != pkcs11.CK_UNAVAILABLE_INFORMATION && uint(n) > room {
		if t.c.MaxSessions != 0 || room < MinSessions {
			return fmt.Errorf("max_sessions %d: the token allows %d: %w", n, room, ErrUnfit)
		}
		n = int(room)
	}
	pool := n - fixedSessions
	arena, err := secret.NewArena(workerSlot, pool+4) // one slot is for the PIN
	if err != nil {
		return err
	}
	t.arena = arena
	t.anchor, t.control, t.signing = make(chan *worker, 1), make(chan *worker, 1), make(chan *worker, 1)
	t.pool = make(chan *worker, pool)
	lanes := pool
	if t.profile.serial {
		lanes = 1
	}
	t.lanes = make(chan struct{}, lanes)
	for range lanes {
		t.lanes <- struct{}{}
	}
	homes := []chan *worker{t.anchor, t.control, t.signing}
	for range pool {
		homes = append(homes, t.pool)
	}
	for i, home := range homes {
		w, err := newWorker(t, home, i == 0)
		if err != nil {
			return err
		}
		t.workers = append(t.workers, w)
	}
	return nil
}

// login logs the application in, once per connection, under the latch.
func (t *Token) login(session pkcs11.SessionHandle, ti pkcs11.TokenInfo) error {
	if err := mayLogin(ti.Flags); err != nil {
		return fmt.Errorf("login: %w", err)
	}
	if ti.Flags&pkcs11.CKF_USER_PIN_COUNT_LOW != 0 {
		t.c.Log.Warn("somebody tried a wrong PIN since the last login", "token", t.c.Token)
	}
	pin, free, err := takePIN(t.arena, t.c.PINFile)
	if err != nil {
		return err
	}
	defer free()
	l := latch(t.c.LatchFile)
	if err := l.set(ti.Flags&pkcs11.CKF_USER_PIN_COUNT_LOW != 0); err != nil {
		return err
	}
	rv := t.lib.login(session, pkcs11.CKU_USER, pin)
	if rv == ckrOK || rv == ckrLoggedIn {
		return l.clear()
	}
	err = newFault(callLogin, rv)
	if neverTried(rv) {
		return errors.Join(err, l.clear())
	}
	return errors.Join(fmt.Errorf("login: %w", err), l.fail())
}

// mayLogin refuses a login that the token's flags advise against. The last try
// before the PIN is locked is for a person.
func mayLogin(flags uint) error {
	switch {
	case flags&pkcs11.CKF_USER_PIN_INITIALIZED == 0:
		return fmt.Errorf("the token has no user PIN yet: %w", ErrUnfit)
	case flags&pkcs11.CKF_USER_PIN_LOCKED != 0:
		return fmt.Errorf("the PIN is locked: %w", ErrPIN)
	case flags&pkcs11.CKF_USER_PIN_FINAL_TRY != 0:
		return fmt.Errorf("one wrong PIN more locks the token, which is not risked: %w", ErrPIN)
	case flags&pkcs11.CKF_USER_PIN_TO_BE_CHANGED != 0:
		return fmt.Errorf("the PIN has to be changed first: %w", ErrPIN)
	}
	return nil
}

// neverTried tells the codes that say that the token was not reached, so that
// the PIN cannot have been counted. Any other failure leaves the latch.
func neverTried(code uint) bool {
	switch code {
	case 0x3, 0xB0, 0xB3, 0xE0, 0xE1, 0x190:
		return true
	}
	return false
}

// needs asks for the mechanisms without which nothing works.
func (l *library) needs(slot uint, pr profile) error {
	list, err := l.p.GetMechanismList(slot)
	if err != nil {
		return faultOf(callMechanisms, err)
	}
	has := map[uint]bool{}
	for _, m := range list {
		has[m.Mechanism] = true
	}
	var missing []string
	for _, m := range []uint{
		pr.kwp, pkcs11.CKM_AES_KEY_GEN, pkcs11.CKM_AES_GCM, pkcs11.CKM_AES_CMAC,
		pkcs11.CKM_EC_KEY_PAIR_GEN, pkcs11.CKM_ECDSA,
	} {
		if !has[m] {
			missing = append(missing, mechanismName(m))
		}
	}
	if missing != nil {
		return fmt.Errorf("module %s, profile %s: lacks %s: %w", l.path, pr.name, strings.Join(missing, ", "), ErrUnfit)
	}
	return nil
}

// disconnect finalises the module. The keeper holds every worker.
func (t *Token) disconnect() error {
	for _, w := range t.workers {
		w.forget()
	}
	if t.signers == nil {
		return nil
	}
	// crypto11 initialised the module and finalises it under everybody.
	err := t.signers.Close()
	t.signers = nil
	return faultOf("C_Finalize", err)
}

// A probe is a ciphertext under a key of the anchor: opening it proves that the
// token still computes.
type probe struct {
	key  handle
	iv   [IVSize]byte
	text []byte
}

const probePlaintext = "hsm probe v1"

func (w *worker) newProbe() (probe, error) {
	var p probe
	key, rv := w.t.lib.generate(w.session, pkcs11.CKM_AES_KEY_GEN, probeTemplate())
	if rv != ckrOK {
		return p, newFault(callGenerate, rv)
	}
	p.key = key
	if rv := w.t.lib.random(w.session, p.iv[:]); rv != ckrOK {
		return p, newFault(callRandom, rv)
	}
	p.text = make([]byte, len(probePlaintext)+TagSize)
	n, rv := w.t.lib.gcmSeal(w.session, p.key, &p.iv, nil, []byte(probePlaintext), p.text)
	if rv != ckrOK {
		return p, newFault(callEncrypt, rv)
	}
	p.text = p.text[:n]
	return p, w.openProbe(p)
}

func (w *worker) openProbe(p probe) error {
	out := make([]byte, len(p.text))
	n, rv := w.t.lib.gcmOpen(w.session, p.key, &p.iv, nil, p.text, out)
	if rv != ckrOK {
		return &fault{callDecrypt, rv, classLost}
	}
	if subtle.ConstantTimeCompare(out[:n], []byte(probePlaintext)) != 1 {
		return fmt.Errorf("probe opens to something else: %w", ErrDevice)
	}
	return nil
}

// probe shows that the token is there and works. Keys in sessions go on
// working after a token was taken away, so both have to be asked.
func (w *worker) probe() error {
	if err := w.openSession(); err != nil {
		return err
	}
	if err := w.openProbe(w.t.probing); err != nil {
		return err
	}
	ti, err := w.t.lib.p.GetTokenInfo(w.t.slot)
	if err != nil {
		return w.lost(faultOf(callTokenInfo, err))
	}
	if ti.SerialNumber != w.t.serial {
		return w.lost(replaced(w.t.serial, ti.SerialNumber))
	}
	return nil
}

// health is the probe with a fresh encryption, and a look at the MEKs.
func (w *worker) health() error {
	if err := w.probe(); err != nil {
		return err
	}
	p := probe{key: w.t.probing.key, text: w.out[:len(probePlaintext)+TagSize]}
	if rv := w.t.lib.random(w.session, p.iv[:]); rv != ckrOK {
		return newFault(callRandom, rv)
	}
	n, rv := w.t.lib.gcmSeal(w.session, p.key, &p.iv, nil, []byte(probePlaintext), p.text)
	if rv != ckrOK {
		return newFault(callEncrypt, rv)
	}
	p.text = p.text[:n]
	if err := w.openProbe(p); err != nil {
		return err
	}
	w.t.mu.Lock()
	meks := w.t.meks
	w.t.mu.Unlock()
	for _, mek := range meks {
		if _, err := w.attribute(mek, pkcs11.CKA_ID); err != nil {
			return w.lost(fmt.Errorf("a MEK is not there any more: %w", err))
		}
	}
	return nil
}
