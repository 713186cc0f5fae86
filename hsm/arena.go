package hsm

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ErrArenaFull means that every slot of an Arena is in use.
var ErrArenaFull = errors.New("no free slot of locked memory")

// An Arena is memory for secrets: outside of Go's heap, so that the garbage
// collector makes no copies; locked, so that it is not swapped; left out of
// core dumps; and wiped in a forked child. It has a fixed number of slots of
// one size, which are empty (all zero) when they are handed out.
type Arena struct {
	mem      []byte
	slotSize int

	mu   sync.Mutex // guards the two below
	free []int      // indexes of free slots
	used []bool
}

// NewArena maps and locks slots pieces of at least slotSize bytes. It is an
// error if the memory cannot be locked (see RLIMIT_MEMLOCK): a secret is never
// put into memory that can be swapped.
func NewArena(slotSize, slots int) (*Arena, error) {
	if slotSize <= 0 || slots <= 0 {
		return nil, fmt.Errorf("arena of %d slots of %d bytes: both must be positive", slots, slotSize)
	}
	slotSize = (slotSize + 15) &^ 15
	page := os.Getpagesize()
	size := (slotSize*slots + page - 1) / page * page
	mem, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return nil, fmt.Errorf("arena of %d bytes: map: %w", size, err)
	}
	if err := protect(mem); err != nil {
		_ = unix.Munmap(mem)
		return nil, fmt.Errorf("arena of %d bytes: %w", size, err)
	}
	a := &Arena{mem: mem, slotSize: slotSize, used: make([]bool, slots)}
	for i := slots - 1; i >= 0; i-- {
		a.free = append(a.free, i)
	}
	return a, nil
}

func protect(mem []byte) error {
	if err := unix.Mlock(mem); err != nil {
		return fmt.Errorf("lock (is the limit of locked memory too low?): %w", err)
	}
	if err := unix.Madvise(mem, unix.MADV_DONTDUMP); err != nil {
		return fmt.Errorf("leave out of core dumps: %w", err)
	}
	if err := unix.Madvise(mem, unix.MADV_WIPEONFORK); err != nil {
		return fmt.Errorf("wipe on fork: %w", err)
	}
	return nil
}

// SlotSize is the length of every slot in bytes.
func (a *Arena) SlotSize() int { return a.slotSize }

// InUse counts the slots that are handed out.
func (a *Arena) InUse() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.used) - len(a.free)
}

// Get hands out a slot of zeroes, or ErrArenaFull. Its length and capacity are
// SlotSize, so an append can never leave the arena unnoticed.
func (a *Arena) Get() ([]byte, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.mem == nil || len(a.free) == 0 {
		return nil, ErrArenaFull
	}
	i := a.free[len(a.free)-1]
	a.free = a.free[:len(a.free)-1]
	a.used[i] = true
	return a.slot(i), nil
}

func (a *Arena) slot(i int) []byte {
	return a.mem[i*a.slotSize : (i+1)*a.slotSize : (i+1)*a.slotSize]
}

// Put wipes a slot and takes it back; b may be any part of it. Memory that is
// not a slot in use is wiped and otherwise left alone.
func (a *Arena) Put(b []byte) {
	if cap(b) == 0 {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	i, ok := a.index(b)
	if !ok || !a.used[i] {
		clear(b)
		return
	}
	clear(a.slot(i))
	a.used[i] = false
	a.free = append(a.free, i)
}

// index finds the slot that holds the first byte of b.
func (a *Arena) index(b []byte) (int, bool) {
	if a.mem == nil {
		return 0, false
	}
	base := uintptr(unsafe.Pointer(unsafe.SliceData(a.mem)))
	at := uintptr(unsafe.Pointer(unsafe.SliceData(b[:1])))
	if at < base || at >= base+uintptr(len(a.used)*a.slotSize) {
		return 0, false
	}
	return int(at-base) / a.slotSize, true
}

// Close wipes and unmaps the memory. No slot may be used afterwards.
func (a *Arena) Close() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.mem == nil {
		return nil
	}
	clear(a.mem)
	mem := a.mem
	a.mem = nil
	return unix.Munmap(mem)
}
