package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/custodian"
)

const memoryReleases = 1000

// TestMemory takes a memory image of the daemon after 1,000 releases, with
// the connections closed and 5 s of idling, and looks for what must not be in
// it: the PIN, a KEK whose value the test knows, and the CEKs.
func TestMemory(t *testing.T) {
	t.Parallel() // it waits, and takes little of the CPUs
	c := provision(t)
	c.patient()
	c.mustRun("init", "-config", c.dev.configFile())
	kek := c.plantCategory("planted")
	c.mustStart()
	ceks := c.releaseMany("planted")
	time.Sleep(5 * time.Second)

	image, locked := memoryOf(t, c.cmd.Process.Pid)
	if n := len(image); n < 1<<20 {
		t.Fatalf("the image has only %d bytes: it is not of the whole process", n)
	}
	// The test of the test: something that must be there is found.
	if count(image, [][]byte{[]byte("custodian-mek-v1")})[0] != 1 {
		t.Fatal("the image does not contain the MEK's label: the search finds nothing")
	}
	pin, err := os.ReadFile(c.config.HSM.PINFile)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(image, bytes.TrimSpace(pin)) {
		t.Error("the PIN is in the memory image")
	}
	if bytes.Contains(image, kek) || bytes.Contains(image, []byte(hex.EncodeToString(kek))) {
		t.Error("the planted KEK is in the memory image")
	}
	sum := func(found [5]int) int { return found[0] + found[1] + found[2] + found[3] + found[4] }
	inArena, anywhere := sum(count(locked, ceks)), sum(count(image, ceks))
	t.Logf("image of %d MB (%d kB locked): %d of %d CEKs in locked memory, %d anywhere", len(image)>>20, len(locked)>>10, inArena, len(ceks), anywhere)
	if inArena > 0 {
		t.Errorf("%d CEKs are left in the arena, want 0", inArena)
	}
	if allowed := len(ceks) / 1000; anywhere > allowed {
		t.Errorf("%d of %d CEKs are left in memory, want at most %d", anywhere, len(ceks), allowed)
	}
}

// TestPreemptionIsOff: the daemon runs without signals that would save
// registers, and keeps the settings that it was given.
func TestPreemptionIsOff(t *testing.T) {
	for _, tt := range []struct{ name, given, want string }{
		{"nothing given", "", "GODEBUG=asyncpreemptoff=1"},
		{"another setting", "madvdontneed=1", "GODEBUG=madvdontneed=1,asyncpreemptoff=1"},
		{"given", "asyncpreemptoff=1,madvdontneed=1", "GODEBUG=asyncpreemptoff=1,madvdontneed=1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := provision(t)
			c.env = append(c.env, "GODEBUG="+tt.given)
			c.mustRun("init", "-config", c.dev.configFile())
			c.mustStart()
			env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", c.cmd.Process.Pid))
			if err != nil {
				t.Skipf("the environment of an undumpable process can only be read by root: %v", err)
			}
			if got := strings.Split(string(env), "\x00"); !slices.Contains(got, tt.want) {
				t.Errorf("environment: got %q, want %q in it", got, tt.want)
			}
		})
	}
}

// plantCategory makes a category whose KEK is known to the test: it imports a
// key into the token, has the MEK wrap it, and lets the domain store the blob
// as if the token had drawn the key. It returns the key.
func (c *custody) plantCategory(name custodian.CategoryName) []byte {
	t := c.t
	t.Helper()
	kek := make([]byte, 32)
	if _, err := rand.Read(kek); err != nil {
		t.Fatal(err)
	}
	blob := c.wrapUnderMEK(kek)

	c.withDomain(func(cfg *custodian.Config) {
		cfg.HSM = planted{cfg.HSM, kek, blob}
	}, func(d *custodian.Custodian) {
		if _, err := d.CreateCategory(t.Context(), c.officer(), custodian.CreateCategoryRequest{Name: name}); err != nil {
			t.Fatal(err)
		}
	})
	return kek
}

// planted is the real token but for one thing: it "generates" a known key.
type planted struct {
	custodian.HSM
	kek, blob []byte
}

func (p planted) GenerateKey(_ context.Context, _ custodian.MEK, u custodian.KeyUse, identity []byte) (inner, canary []byte, err error) {
	if u != custodian.UseSeal {
		return nil, nil, fmt.Errorf("planted: only a KEK is planted, not a key for use %d", u)
	}
	block, err := aes.NewCipher(p.kek)
	if err != nil {
		return nil, nil, err
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		return nil, nil, err
	}
	// The canary's form is hsm's: version, use, IV, ciphertext of a constant
	// with use and identity as associated data.
	const text = "hsm key canary\x00\x01"
	aad := binary.BigEndian.AppendUint32(append([]byte(text), 1), uint32(len(identity)))
	iv := make([]byte, gcm.NonceSize())
	if _, err := rand.Read(iv); err != nil {
		return nil, nil, err
	}
	canary = append([]byte{1, 1}, iv...)
	return p.blob, gcm.Seal(canary, iv, []byte(text), append(aad, identity...)), nil
}

// wrapUnderMEK imports key as a session object and wraps it under the MEK, by
// PKCS#11 calls of the test's own.
func (c *custody) wrapUnderMEK(key []byte) []byte {
	t := c.t
	t.Helper()
	var blob []byte
	c.withSession(func(m *pkcs11.Ctx, s pkcs11.SessionHandle) {
		o, err := m.CreateObject(s, []*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES),
			pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false), pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
			pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true), pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, true),
			pkcs11.NewAttribute(pkcs11.CKA_VALUE, key)})
		if err != nil {
			t.Fatal(err)
		}
		if err := m.FindObjectsInit(s, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_LABEL, "custodian-mek-v1")}); err != nil {
			t.Fatal(err)
		}
		found, _, err := m.FindObjects(s, 2)
		m.FindObjectsFinal(s)
		if err != nil || len(found) != 1 {
			t.Fatalf("find the MEK: %d objects, %v", len(found), err)
		}
		if blob, err = m.WrapKey(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_WRAP_PAD, nil)}, found[0], o); err != nil {
			t.Fatal(err)
		}
	})
	return blob
}

// releaseMany issues 1,000 keys and releases each once, over several
// connections at a time, which it closes. It returns the keys.
func (c *custody) releaseMany(category string) [][]byte {
	t := c.t
	t.Helper()
	packager := c.dial(custodian.RolePackager)
	var kids, ceks [][]byte
	for i := 0; len(kids) < memoryReleases; i++ {
		req := &v1.IssueContentKeysRequest{Category: category, ContentId: fmt.Appendf(nil, "film-%d", i)}
		for j := range 50 {
			req.Keys = append(req.Keys, &v1.ContentKeySpec{TrackType: fmt.Sprintf("T%d", j), Scheme: "cenc"})
		}
		res, err := packager.IssueContentKeys(t.Context(), req)
		if err != nil {
			t.Fatal(err)
		}
		for _, k := range res.Keys {
			kids = append(kids, k.Key.Kid)
			ceks = append(ceks, k.Key.GetKey())
		}
	}
	packager.Close()
	var wg sync.WaitGroup
	for worker := range 8 {
		provider := c.dial(custodian.RoleProvider)
		wg.Go(func() {
			defer provider.Close()
			for i := worker; i < len(kids); i += 8 {
				res, err := provider.GetContentKeys(t.Context(), &v1.GetContentKeysRequest{Kids: [][]byte{kids[i]}})
				if err != nil {
					t.Errorf("release %d: %v", i, err)
					return
				}
				if !bytes.Equal(res.Results[0].GetKey().GetKey(), ceks[i]) {
					t.Errorf("release %d: another key than was issued", i)
				}
			}
		})
	}
	wg.Wait()
	return ceks
}

// memoryOf reads all readable and writable memory of a process, and apart
// what of it is locked: the arenas.
func memoryOf(t *testing.T, pid int) (all, locked []byte) {
	t.Helper()
	maps, err := os.Open(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer maps.Close()
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		t.Skipf("the memory of the daemon cannot be read here (it is undumpable, so that takes CAP_SYS_PTRACE): %v", err)
	}
	defer mem.Close()
	var from, to uint64
	var perms string
	for s := bufio.NewScanner(maps); s.Scan(); {
		first, _, _ := strings.Cut(s.Text(), " ")
		if !strings.HasSuffix(first, ":") { // the head of a mapping
			if _, err := fmt.Sscanf(s.Text(), "%x-%x %s", &from, &to, &perms); err != nil {
				t.Fatalf("smaps line %q: %v", s.Text(), err)
			}
			continue
		}
		if first != "VmFlags:" || !strings.HasPrefix(perms, "rw") {
			continue
		}
		part := make([]byte, to-from)
		n, err := mem.ReadAt(part, int64(from))
		if err != nil && n == 0 {
			continue // guard pages and the like
		}
		all = append(all, part[:n]...)
		if strings.Contains(s.Text(), " lo ") {
			locked = append(locked, part[:n]...)
		}
	}
	return all, locked
}
