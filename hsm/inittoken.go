package hsm

import (
	"context"
	"errors"
	"fmt"

	"github.com/miekg/pkcs11"

	"github.com/keycustody/custodian/internal/secret"
)

// A TokenSpec says which token InitToken makes.
type TokenSpec struct {
	Module    string // absolute path of the PKCS#11 module
	Label     string // 1 to 32 bytes
	SOPINFile string // both as Config.PINFile
	PINFile   string
}

// InitToken makes a token with this label and its user PIN, and returns its
// serial. A token that has the label already is left as it is, but for a user
// PIN that it does not have yet, so that a retry finishes what a crash left. It
// never wipes a token. The module must not be open in this process.
func InitToken(ctx context.Context, s TokenSpec) (serial string, err error) {
	if s.Label == "" || len(s.Label) > 32 {
		return "", fmt.Errorf("token %q: a label has 1 to 32 bytes", s.Label)
	}
	lib, err := loadLibrary(s.Module)
	if err != nil {
		return "", err
	}
	owner := &Token{c: Config{Token: s.Label}}
	if err := lib.claim(owner); err != nil {
		return "", err
	}
	defer lib.unclaim(owner)
	pins, err := secret.NewArena(512, 2)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, pins.Close()) }()

	for _, step := range []func(TokenSpec, *secret.Arena) error{lib.makeToken, lib.makeUserPIN} {
		if err := ctx.Err(); err != nil {
			return "", fmt.Errorf("token %s: initialise: %w", s.Label, err)
		}
		if err := lib.initialized(func() error { return step(s, pins) }); err != nil {
			return "", fmt.Errorf("token %s: initialise: %w", s.Label, err)
		}
	}
	err = lib.initialized(func() error {
		_, ti, err := lib.findToken(URI{Token: s.Label}, "")
		serial = ti.SerialNumber
		return err
	})
	return serial, err
}

// initialized runs f between C_Initialize and C_Finalize. Modules renumber
// their slots after a token was made, so each step has its own pair.
func (l *library) initialized(f func() error) (err error) {
	if err := l.p.Initialize(); err != nil {
		return faultOf(callInit, err)
	}
	defer func() {
		if ferr := l.p.Finalize(); ferr != nil && err == nil {
			err = faultOf("C_Finalize", ferr)
		}
	}()
	return f()
}

func (l *library) makeToken(s TokenSpec, pins *secret.Arena) error {
	_, _, err := l.findToken(URI{Token: s.Label}, "")
	if err == nil || errors.Is(err, ErrDuplicate) {
		return err
	}
	slot, err := l.freeSlot()
	if err != nil {
		return err
	}
	pin, free, err := takePIN(pins, s.SOPINFile)
	if err != nil {
		return err
	}
	defer free()
	label := [32]byte([]byte(fmt.Sprintf("%-32s", s.Label)))
	return newFault(callInitToken, l.initToken(slot, pin, label))
}

// freeSlot finds a slot whose token is not initialised.
func (l *library) freeSlot() (uint, error) {
	slots, err := l.p.GetSlotList(true)
	if err != nil {
		return 0, faultOf(callTokenInfo, err)
	}
	for _, slot := range slots {
		ti, err := l.p.GetTokenInfo(slot)
		if err == nil && ti.Flags&pkcs11.CKF_TOKEN_INITIALIZED == 0 {
			return slot, nil
		}
	}
	return 0, fmt.Errorf("module %s has no slot without a token: %w", l.path, ErrUnfit)
}

func (l *library) makeUserPIN(s TokenSpec, pins *secret.Arena) (err error) {
	slot, ti, err := l.findToken(URI{Token: s.Label}, "")
	if err != nil {
		return err
	}
	if ti.Flags&pkcs11.CKF_USER_PIN_INITIALIZED != 0 {
		return nil
	}
	session, err := l.p.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		return faultOf(callSession, err)
	}
	so, freeSO, err := takePIN(pins, s.SOPINFile)
	if err != nil {
		return err
	}
	defer freeSO()
	pin, free, err := takePIN(pins, s.PINFile)
	if err != nil {
		return err
	}
	defer free()
	if rv := l.login(session, pkcs11.CKU_SO, so); rv != ckrOK {
		return newFault(callLogin, rv)
	}
	defer func() { _ = l.p.Logout(session) }()
	return newFault(callInitPIN, l.initPIN(session, pin))
}
