// Package secret holds key material for the short time that software must
// hold it: an Arena of locked memory that is kept out of core dumps, and a
// Secret whose bytes no print verb, encoder or log handler can reach.
//
// It decides how secrets lie in memory and when they are wiped. What they
// mean, and who may see them, is decided elsewhere.
package secret

import (
	"errors"
	"fmt"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ErrFull means that every slot of an arena is in use. A caller may try again
// when others have given theirs back.
var ErrFull = errors.New("secret arena: all slots are in use")

// An Arena is anonymous memory outside the Go heap, cut into slots of one
// size. It is locked into RAM, left out of core dumps and wiped in a forked
// child. A slot is zero when it is handed out and is wiped when it comes back.
type Arena struct {
	slot int

	// mu guards the fields below.
	mu   sync.Mutex
	free []int32
	used []bool
	mem  []byte
}

// NewArena maps and locks an arena of n slots of size bytes each. Where the
// process may not lock that much memory (RLIMIT_MEMLOCK), it fails: keys are
// never kept in memory that could be swapped out.
func NewArena(size, n int) (*Arena, error) {
	if size <= 0 || n <= 0 {
		return nil, fmt.Errorf("secret arena: %d slots of %d bytes", n, size)
	}
	size = (size + 15) &^ 15
	page := unix.Getpagesize()
	total := (size*n + page - 1) / page * page
	mem, err := unix.Mmap(-1, 0, total, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return nil, fmt.Errorf("secret arena: map %d bytes: %w", total, err)
	}
	if err := unix.Mlock(mem); err != nil {
		unix.Munmap(mem)
		return nil, fmt.Errorf("secret arena: lock %d bytes (raise RLIMIT_MEMLOCK): %w", total, err)
	}
	for _, advice := range []int{unix.MADV_DONTDUMP, unix.MADV_WIPEONFORK} {
		if err := unix.Madvise(mem, advice); err != nil {
			unix.Munmap(mem)
			return nil, fmt.Errorf("secret arena: madvise %d: %w", advice, err)
		}
	}
	a := &Arena{slot: size, mem: mem, free: make([]int32, n), used: make([]bool, n)}
	for i := range a.free {
		a.free[i] = int32(n - 1 - i)
	}
	return a, nil
}

// Get hands out a zeroed slot, whole. Its owner gives it back with Put.
func (a *Arena) Get() ([]byte, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.free) == 0 {
		return nil, ErrFull
	}
	i := int(a.free[len(a.free)-1])
	a.free = a.free[:len(a.free)-1]
	a.used[i] = true
	return a.mem[i*a.slot : (i+1)*a.slot : (i+1)*a.slot], nil
}

// Put wipes the slot that b starts in and takes it back. Bytes that are not
// of this arena are wiped and otherwise left alone, so that a caller need not
// know where a key lies.
func (a *Arena) Put(b []byte) {
	if cap(b) == 0 {
		return
	}
	start := uintptr(unsafe.Pointer(unsafe.SliceData(b)))
	a.mu.Lock()
	defer a.mu.Unlock()
	base := uintptr(unsafe.Pointer(unsafe.SliceData(a.mem)))
	if len(a.mem) == 0 || start < base || start >= base+uintptr(len(a.mem)) {
		clear(b)
		return
	}
	i := int(start-base) / a.slot
	if i >= len(a.used) || !a.used[i] {
		return // given back already
	}
	a.used[i] = false
	clear(a.mem[i*a.slot : (i+1)*a.slot])
	a.free = append(a.free, int32(i))
}

// InUse is the number of slots that are handed out.
func (a *Arena) InUse() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.used) - len(a.free)
}

// Close wipes and unmaps the arena. No slot may be in use.
func (a *Arena) Close() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.mem == nil {
		return nil
	}
	clear(a.mem)
	err := unix.Munmap(a.mem)
	a.mem, a.free, a.used = nil, nil, nil
	return err
}

// A Secret is a short run of secret bytes. The zero Secret is empty. Copies
// share the bytes; the one that made it calls Destroy.
//
// The bytes sit behind a func, because fmt, encoding/json and log/slog look
// into unexported fields but never call a function.
type Secret struct {
	bytes   func() []byte
	destroy func()
}

// New makes a Secret of the first n bytes of a slot of a. Destroy wipes the
// slot and gives it back.
func New(a *Arena, slot []byte, n int) Secret {
	var once sync.Once
	b := slot[:n]
	return Secret{
		bytes:   func() []byte { return b },
		destroy: func() { once.Do(func() { b = nil; a.Put(slot) }) },
	}
}

// Len is the number of secret bytes.
func (s Secret) Len() int {
	if s.bytes == nil {
		return 0
	}
	return len(s.bytes())
}

// Use calls f with the bytes, which are f's only while it runs.
func (s Secret) Use(f func(b []byte)) {
	if s.bytes != nil {
		f(s.bytes())
	}
}

// Lend returns the bytes for a message that is about to be encoded. They are
// valid until Destroy, or until whoever encoded the message gives them back
// to the arena with Put.
func (s Secret) Lend() []byte {
	if s.bytes == nil {
		return nil
	}
	return s.bytes()
}

// Destroy wipes the bytes. It may be called twice.
func (s Secret) Destroy() {
	if s.destroy != nil {
		s.destroy()
	}
}

func (s Secret) String() string               { return "[secret]" }
func (s Secret) GoString() string             { return "[secret]" }
func (s Secret) MarshalText() ([]byte, error) { return []byte("[secret]"), nil }
