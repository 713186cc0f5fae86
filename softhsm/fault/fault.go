// Package fault builds a PKCS#11 module for tests that stands before another
// one and fails on demand: it delays calls, lets them hang, answers with a code
// in place of the call or after it was made, and counts. Its Control works from
// any process, on a module that is loaded in any other.
package fault

import (
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	_ "embed"
)

//go:embed shim/shim.c
var source []byte

// A T is the part of testing.TB that Build uses.
type T interface {
	Helper()
	TempDir() string
	Cleanup(func())
	Fatal(args ...any)
}

// A Control says what goes wrong. Its methods can be called while the module
// works.
type Control struct {
	// Module is the path of the failing module, to be opened in place of the
	// real one.
	Module string
	t      T
	real   string
	file   string
	mem    []byte
}

// Build makes a failing module in front of the real one, for one test, and
// points this process at it. The module is compiled once, by gcc or what CC
// says, and kept in the user's cache.
func Build(t T, real string) *Control {
	t.Helper()
	module, err := compiled()
	if err != nil {
		t.Fatal(err)
	}
	c := &Control{t: t, Module: module, real: real, file: filepath.Join(t.TempDir(), "control")}
	if err := c.open(); err != nil {
		t.Fatal(err)
	}
	// The memory stays mapped for good: a call that hangs may outlive the test.
	t.Cleanup(c.Reset)
	for _, kv := range c.Env() {
		k, v, _ := strings.Cut(kv, "=")
		if err := os.Setenv(k, v); err != nil {
			t.Fatal(err)
		}
	}
	return c
}

// compiled finds the module in the cache, under a name that changes with its
// source and its compiler, or compiles it.
func compiled() (string, error) {
	cc := os.Getenv("CC")
	if cc == "" {
		cc = "gcc"
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		cache = os.TempDir()
	}
	sum := sha256.Sum256(slices.Concat(source, []byte(cc)))
	dir := filepath.Join(cache, fmt.Sprintf("custodian-fault-%x", sum[:8]))
	module := filepath.Join(dir, "fault.so")
	if _, err := os.Stat(module); err == nil {
		return module, nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("fault module: %w", err)
	}
	// Other test processes may do the same: the last rename wins.
	tmp, err := os.MkdirTemp(dir, "build")
	if err != nil {
		return "", fmt.Errorf("fault module: %w", err)
	}
	defer os.RemoveAll(tmp)
	src, out := filepath.Join(tmp, "shim.c"), filepath.Join(tmp, "fault.so")
	if err := os.WriteFile(src, source, 0o600); err != nil {
		return "", fmt.Errorf("fault module: %w", err)
	}
	if says, err := exec.Command(cc, "-O1", "-Wall", "-shared", "-fPIC", "-o", out, src, "-ldl").CombinedOutput(); err != nil {
		return "", fmt.Errorf("fault module: %s: %w", says, err)
	}
	if err := os.Rename(out, module); err != nil {
		return "", fmt.Errorf("fault module: %w", err)
	}
	return module, nil
}

func (c *Control) open() error {
	f, err := os.OpenFile(c.file, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("fault control: %w", err)
	}
	defer f.Close()
	size := len(functions) * ruleSize
	if err := f.Truncate(int64(size)); err != nil {
		return fmt.Errorf("fault control: %w", err)
	}
	c.mem, err = syscall.Mmap(int(f.Fd()), 0, size, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("fault control: %w", err)
	}
	return nil
}

// Env is what another process needs to load the module.
func (c *Control) Env() []string {
	return []string{"FAULT_MODULE=" + c.real, "FAULT_CONTROL=" + c.file}
}

// Calls counts the calls of a function, "C_Login" for one.
func (c *Control) Calls(function string) int { return int(c.load(function, fieldCalls)) }

// Hanging counts the calls of a function that hang now.
func (c *Control) Hanging(function string) int { return int(c.load(function, fieldHanging)) }

// Fail has the next times calls answer code without being made.
func (c *Control) Fail(function string, code uint, times int) { c.fail(function, code, times, 0, 0) }

// FailAfter has the next times calls answer code after they were made.
func (c *Control) FailAfter(function string, code uint, times int) {
	c.fail(function, code, times, 1, 0)
}

// FailLater lets skip calls pass, and has the one after them answer code.
func (c *Control) FailLater(function string, code uint, skip int) {
	c.fail(function, code, 1, 0, skip)
}

func (c *Control) fail(function string, code uint, times, after, skip int) {
	c.store(function, fieldTimes, 0)
	c.store(function, fieldCode, uint64(code))
	c.store(function, fieldAfter, uint64(after))
	c.store(function, fieldSkip, uint64(skip))
	c.store(function, fieldTimes, uint64(times))
}

// Delay has every call wait first.
func (c *Control) Delay(function string, d time.Duration) {
	c.store(function, fieldDelay, uint64(d.Nanoseconds()))
}

// Hang has calls wait until Resume.
func (c *Control) Hang(function string) { c.store(function, fieldHang, 1) }

// Resume lets the calls that hang go on.
func (c *Control) Resume(function string) { c.store(function, fieldHang, 0) }

// Reset takes every fault back; counts stay.
func (c *Control) Reset() {
	for _, f := range functions {
		for _, field := range []int{fieldDelay, fieldHang, fieldTimes, fieldSkip} {
			c.store("C_"+f, field, 0)
		}
	}
}

// Fields of a rule, as the C side has them.
const (
	fieldCalls = iota
	fieldDelay
	fieldHang
	fieldHanging
	fieldCode
	fieldTimes
	fieldAfter
	fieldSkip

	ruleSize = 8 * 8
)

func (c *Control) load(function string, field int) uint64 {
	if p := c.at(function, field); p != nil {
		return atomic.LoadUint64(p)
	}
	return 0
}

func (c *Control) store(function string, field int, v uint64) {
	if p := c.at(function, field); p != nil {
		atomic.StoreUint64(p, v)
	}
}

// at finds a word of the control block.
func (c *Control) at(function string, field int) *uint64 {
	i := slices.Index(functions, strings.TrimPrefix(function, "C_"))
	if i < 0 {
		c.t.Fatal("fault: no function " + function)
		return nil
	}
	word := c.mem[i*ruleSize+field*8:][:8]
	return (*uint64)(unsafe.Pointer(unsafe.SliceData(word)))
}

// functions has the names in the order of CK_FUNCTION_LIST.
var functions = strings.Fields(`
	Initialize Finalize GetInfo GetFunctionList GetSlotList GetSlotInfo GetTokenInfo GetMechanismList
	GetMechanismInfo InitToken InitPIN SetPIN OpenSession CloseSession CloseAllSessions GetSessionInfo
	GetOperationState SetOperationState Login Logout CreateObject CopyObject DestroyObject GetObjectSize
	GetAttributeValue SetAttributeValue FindObjectsInit FindObjects FindObjectsFinal EncryptInit Encrypt
	EncryptUpdate EncryptFinal DecryptInit Decrypt DecryptUpdate DecryptFinal DigestInit Digest DigestUpdate
	DigestKey DigestFinal SignInit Sign SignUpdate SignFinal SignRecoverInit SignRecover VerifyInit Verify
	VerifyUpdate VerifyFinal VerifyRecoverInit VerifyRecover DigestEncryptUpdate DecryptDigestUpdate
	SignEncryptUpdate DecryptVerifyUpdate GenerateKey GenerateKeyPair WrapKey UnwrapKey DeriveKey SeedRandom
	GenerateRandom GetFunctionStatus CancelFunction WaitForSlotEvent`)
