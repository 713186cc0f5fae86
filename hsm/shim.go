package hsm

/*
#cgo CFLAGS: -O2 -Wall -Werror
#cgo linux LDFLAGS: -ldl
#include <stdlib.h>
#include "shim.h"
*/
import "C"

import (
	"fmt"
	"sync"
	"unsafe"

	"github.com/miekg/pkcs11"
)

// handle names a session or an object inside one epoch.
type handle = C.ck_ulong

// A library is a loaded PKCS#11 module. It reaches the same instance twice: p
// for the control plane, and the shim for calls that carry secrets or that are
// made often.
type library struct {
	path string
	shim *C.shim
	p    *pkcs11.Ctx
}

// libraries holds every module that was ever loaded: a module stays in the
// process, because unloading one while its threads or exit handlers live
// crashes. libraryMu guards the map.
var (
	libraryMu sync.Mutex
	libraries = map[string]*library{}
)

func loadLibrary(path string) (*library, error) {
	libraryMu.Lock()
	defer libraryMu.Unlock()
	if l := libraries[path]; l != nil {
		return l, nil
	}
	name := C.CString(path)
	defer C.free(unsafe.Pointer(name))
	shim := (*C.shim)(C.calloc(1, C.sizeof_shim))
	var why *C.char
	if C.shim_load(name, shim, &why) != 0 {
		defer C.free(unsafe.Pointer(why))
		C.free(unsafe.Pointer(shim))
		return nil, fmt.Errorf("load module %s: %s", path, C.GoString(why))
	}
	l := &library{path: path, shim: shim, p: pkcs11.New(path)}
	if l.p == nil {
		return nil, fmt.Errorf("load module %s: no function list", path)
	}
	libraries[path] = l
	return l, nil
}

// ptr gives C the memory of b. It must not be kept beyond the call.
func ptr(b []byte) *C.ck_byte {
	return (*C.ck_byte)(unsafe.Pointer(unsafe.SliceData(b)))
}

func (l *library) login(session pkcs11.SessionHandle, user uint, pin []byte) uint {
	return uint(C.shim_login(l.shim, C.ck_ulong(session), C.ck_ulong(user), ptr(pin), C.ck_ulong(len(pin))))
}

// initToken makes a new token in a slot; label is blank-padded to 32 bytes.
func (l *library) initToken(slot uint, soPIN []byte, label [32]byte) uint {
	return uint(C.shim_init_token(l.shim, C.ck_ulong(slot), ptr(soPIN), C.ck_ulong(len(soPIN)), ptr(label[:])))
}

func (l *library) initPIN(session pkcs11.SessionHandle, pin []byte) uint {
	return uint(C.shim_init_pin(l.shim, C.ck_ulong(session), ptr(pin), C.ck_ulong(len(pin))))
}

func (l *library) random(session pkcs11.SessionHandle, out []byte) uint {
	return uint(C.shim_random(l.shim, C.ck_ulong(session), ptr(out), C.ck_ulong(len(out))))
}

// gcmSeal encrypts in to out (len(in)+16 bytes of room) under a 96-bit IV.
func (l *library) gcmSeal(session pkcs11.SessionHandle, key handle, iv *[IVSize]byte, aad, in, out []byte) (int, uint) {
	n := C.ck_ulong(len(out))
	rv := C.shim_gcm_encrypt(l.shim, C.ck_ulong(session), key, ptr(iv[:]),
		ptr(aad), C.ck_ulong(len(aad)), ptr(in), C.ck_ulong(len(in)), ptr(out), &n)
	return int(n), uint(rv)
}

// gcmOpen decrypts in to out, which needs room for len(in) bytes: modules ask
// for more than the plaintext takes.
func (l *library) gcmOpen(session pkcs11.SessionHandle, key handle, iv *[IVSize]byte, aad, in, out []byte) (int, uint) {
	n := C.ck_ulong(len(out))
	rv := C.shim_gcm_decrypt(l.shim, C.ck_ulong(session), key, ptr(iv[:]),
		ptr(aad), C.ck_ulong(len(aad)), ptr(in), C.ck_ulong(len(in)), ptr(out), &n)
	return int(n), uint(rv)
}

func (l *library) sign(session pkcs11.SessionHandle, mechanism uint, key handle, in, out []byte) (int, uint) {
	n := C.ck_ulong(len(out))
	rv := C.shim_sign(l.shim, C.ck_ulong(session), C.ck_ulong(mechanism), key,
		ptr(in), C.ck_ulong(len(in)), ptr(out), &n)
	return int(n), uint(rv)
}

func (l *library) wrap(session pkcs11.SessionHandle, mechanism uint, by, key handle, out []byte) (int, uint) {
	n := C.ck_ulong(len(out))
	rv := C.shim_wrap(l.shim, C.ck_ulong(session), C.ck_ulong(mechanism), by, key, ptr(out), &n)
	return int(n), uint(rv)
}

func (l *library) unwrap(session pkcs11.SessionHandle, mechanism uint, by handle, blob []byte, tpl template) (handle, uint) {
	c := tpl.encode()
	defer c.free()
	var key handle
	rv := C.shim_unwrap(l.shim, C.ck_ulong(session), C.ck_ulong(mechanism), by,
		ptr(blob), C.ck_ulong(len(blob)), c.attrs, c.n, &key)
	return key, uint(rv)
}

func (l *library) create(session pkcs11.SessionHandle, tpl template) (handle, uint) {
	c := tpl.encode()
	defer c.free()
	var key handle
	rv := C.shim_create(l.shim, C.ck_ulong(session), c.attrs, c.n, &key)
	return key, uint(rv)
}

func (l *library) generate(session pkcs11.SessionHandle, mechanism uint, tpl template) (handle, uint) {
	c := tpl.encode()
	defer c.free()
	var key handle
	rv := C.shim_generate(l.shim, C.ck_ulong(session), C.ck_ulong(mechanism), c.attrs, c.n, &key)
	return key, uint(rv)
}

func (l *library) generatePair(session pkcs11.SessionHandle, mechanism uint, public, private template) uint {
	pub, priv := public.encode(), private.encode()
	defer pub.free()
	defer priv.free()
	var pubKey, privKey handle
	return uint(C.shim_generate_pair(l.shim, C.ck_ulong(session), C.ck_ulong(mechanism),
		pub.attrs, pub.n, priv.attrs, priv.n, &pubKey, &privKey))
}

// nested reads an attribute that is itself a template, given the types that are
// expected in it. A type that is not there has no value.
func (l *library) nested(session pkcs11.SessionHandle, object handle, typ uint, expect template) (template, uint) {
	const room, stride = 24, 256
	block := C.calloc(1, room*(C.sizeof_ck_attribute+stride))
	defer C.free(block)
	attrs := unsafe.Slice((*C.ck_attribute)(block), room)
	for i := range min(room, len(expect)) {
		attrs[i]._type = C.ck_ulong(expect[i].typ)
	}
	values := (*C.ck_byte)(unsafe.Add(block, room*C.sizeof_ck_attribute))
	n := C.ck_ulong(room)
	rv := C.shim_nested(l.shim, C.ck_ulong(session), object, C.ck_ulong(typ), &attrs[0], &n, values, stride)
	if rv != 0 {
		return nil, uint(rv)
	}
	var tpl template
	for _, a := range attrs[:n] {
		got := attribute{typ: uint(a._type)}
		if a.len <= stride {
			got.value = C.GoBytes(a.value, C.int(a.len))
		}
		tpl = append(tpl, got)
	}
	return tpl, 0
}

// An encoded template is an array of CK_ATTRIBUTE in C memory.
type encoded struct {
	attrs *C.ck_attribute
	n     C.ck_ulong
	size  C.size_t
}

// encode lays the template out in one block: the array, then the values, each
// at a multiple of eight; a nested template is laid out in the same way.
func (tpl template) encode() encoded {
	size := tpl.size()
	block := C.calloc(1, C.size_t(size))
	tpl.layOut(block)
	return encoded{(*C.ck_attribute)(block), C.ck_ulong(len(tpl)), C.size_t(size)}
}

func (e encoded) free() {
	clear(unsafe.Slice((*byte)(unsafe.Pointer(e.attrs)), int(e.size)))
	C.free(unsafe.Pointer(e.attrs))
}

func (tpl template) size() int {
	n := len(tpl) * C.sizeof_ck_attribute
	for _, a := range tpl {
		if a.nested != nil {
			n += a.nested.size()
			continue
		}
		n += (len(a.value) + 7) &^ 7
	}
	return n
}

// layOut writes the template to block and returns the first byte after it.
func (tpl template) layOut(block unsafe.Pointer) unsafe.Pointer {
	attrs := unsafe.Slice((*C.ck_attribute)(block), len(tpl))
	free := unsafe.Add(block, len(tpl)*C.sizeof_ck_attribute)
	for i, a := range tpl {
		attrs[i]._type = C.ck_ulong(a.typ)
		attrs[i].value = free
		if a.nested != nil {
			attrs[i].len = C.ck_ulong(len(a.nested) * C.sizeof_ck_attribute)
			free = a.nested.layOut(free)
			continue
		}
		attrs[i].len = C.ck_ulong(len(a.value))
		copy(unsafe.Slice((*byte)(free), len(a.value)), a.value)
		free = unsafe.Add(free, (len(a.value)+7)&^7)
	}
	return free
}
