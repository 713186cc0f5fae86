package hsm

import (
	"errors"
	"fmt"

	"github.com/miekg/pkcs11"
)

// What a caller can act on. Every error of this package that has one of these
// causes says so to errors.Is.
var (
	// ErrAuth: a ciphertext or a wrapped key is not what this key made. It is
	// only said after the token has proved that it still works.
	ErrAuth = errors.New("authentication failed")
	// ErrWrongKey: the token holds another key than the one that was meant, or
	// the canary belongs to another key, use or identity.
	ErrWrongKey = errors.New("wrong key")
	// ErrDevice: the token or its module is gone, failed or did not answer.
	// The package reconnects by itself; trying again later can succeed.
	ErrDevice = errors.New("token not available")
	// ErrStale: the key was loaded before a reconnect, or released; load it again.
	ErrStale = errors.New("key has to be loaded again")
	// ErrPIN: the token refused the PIN. Nothing logs in again before a person
	// has looked at it.
	ErrPIN = errors.New("PIN refused")
	// ErrLatched: an earlier login did not succeed and its latch file is still
	// there, so that no login was tried.
	ErrLatched = errors.New("login latched")
	// ErrNotFound: the token works and has no such object.
	ErrNotFound = errors.New("not found in the token")
	// ErrDuplicate: two objects where one is allowed; none of them is used.
	ErrDuplicate = errors.New("more than one")
	// ErrUnfit: a module lacks something that is needed, or an object has other
	// attributes than it must have.
	ErrUnfit = errors.New("unfit")
	// ErrPolicy: the token, or this package, does not permit the operation: a
	// bug, or an attack.
	ErrPolicy = errors.New("not permitted")
	// ErrBusy: no session came free while the caller waited.
	ErrBusy = errors.New("no free session")
)

// A call names the PKCS#11 function that an error came from. What a code means
// depends on it: 0x5 is a bad tag, a tampered blob or a lost token.
type call string

const (
	callInit       call = "C_Initialize"
	callTokenInfo  call = "C_GetTokenInfo"
	callMechanisms call = "C_GetMechanismList"
	callSession    call = "C_OpenSession"
	callLogin      call = "C_Login"
	callRandom     call = "C_GenerateRandom"
	callEncrypt    call = "C_Encrypt"
	callDecrypt    call = "C_Decrypt"
	callSign       call = "C_Sign"
	callWrap       call = "C_WrapKey"
	callUnwrap     call = "C_UnwrapKey"
	callGenerate   call = "C_GenerateKey"
	callPair       call = "C_GenerateKeyPair"
	callCreate     call = "C_CreateObject"
	callDestroy    call = "C_DestroyObject"
	callFind       call = "C_FindObjects"
	callAttribute  call = "C_GetAttributeValue"
	callInitToken  call = "C_InitToken"
	callInitPIN    call = "C_InitPIN"
)

// A class says what to do about a return code.
type class uint8

const (
	classUnclear class = iota // ask the probe, then decide
	classAuth                 // the input is bad; the session is still good
	classSession              // drop the session, try once more
	classHandle               // the handle is not valid: find or load the key again
	classLost                 // the token is gone or logged out: reconnect
	classPIN                  // stop, no retry
	classPolicy               // a bug or an attack: tell
	classBusy                 // the token has no room for now
)

// classify is the one place where the meaning of a return code is decided.
func classify(c call, code uint) class {
	switch code {
	case 0x40, 0x41, 0x110, 0x112:
		if c == callDecrypt || c == callUnwrap {
			return classAuth
		}
		return classPolicy
	case 0xB3, 0xB0, 0x90, 0x91:
		return classSession
	case 0x82, 0x60, 0x113, 0xF0:
		return classHandle
	case 0x101, 0x30, 0x31, 0x32, 0xE0, 0xE1, 0x190, 0x3:
		return classLost
	case 0xA0, 0xA1, 0xA2, 0xA3, 0xA4, 0x102:
		return classPIN
	case 0x68, 0x6A, 0x69, 0x10, 0x1B, 0xD1, 0x70, 0x71, // refused by attributes
		0x7, 0x11, 0x12, 0x13, 0x20, 0x21, 0x54, 0x62, 0x63, 0xD0, 0xE2,
		0xF1, 0xF2, 0x114, 0x115, 0x130, 0x140, 0x150:
		return classPolicy
	case 0x2, 0xB1:
		return classBusy
	default:
		return classUnclear
	}
}

// A fault is a return code other than OK, with its class. lost says that the
// connection as a whole is in doubt.
type fault struct {
	call  call
	code  uint
	class class
}

func newFault(c call, code uint) error {
	if code == ckrOK {
		return nil
	}
	return &fault{c, code, classify(c, code)}
}

// faultOf turns an error of a library on top of PKCS#11 into a fault. Such
// libraries wrap in their own way, older ones by a Cause method.
func faultOf(c call, err error) error {
	if err == nil {
		return nil
	}
	for inner := err; inner != nil; {
		if code, ok := inner.(pkcs11.Error); ok {
			return newFault(c, uint(code))
		}
		causer, ok := inner.(interface{ Cause() error })
		if !ok {
			break
		}
		inner = causer.Cause()
	}
	var code pkcs11.Error
	if errors.As(err, &code) {
		return newFault(c, uint(code))
	}
	return fmt.Errorf("%s: %s: %w", c, err, ErrDevice)
}

func (f *fault) Error() string {
	return fmt.Sprintf("%s: %s: %s", f.call, codeName(f.code), f.kind())
}

// Unwrap gives the sentinel and the code, for errors.Is and errors.As.
func (f *fault) Unwrap() []error {
	return []error{f.kind(), pkcs11.Error(f.code)}
}

func (f *fault) kind() error {
	switch f.class {
	case classAuth:
		return ErrAuth
	case classHandle:
		return ErrStale
	case classPIN:
		return ErrPIN
	case classPolicy:
		return ErrPolicy
	case classBusy:
		return ErrBusy
	default:
		return ErrDevice
	}
}

// classOf tells the class of an error; ok is false if it is none of a token's.
func classOf(err error) (c class, ok bool) {
	var f *fault
	if !errors.As(err, &f) {
		return 0, false
	}
	return f.class, true
}

func hasClass(err error, want class) bool {
	c, ok := classOf(err)
	return ok && c == want
}

func hasCode(err error, code uint) bool {
	var f *fault
	return errors.As(err, &f) && f.code == code
}
