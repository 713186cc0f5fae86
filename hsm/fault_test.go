package hsm_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/keycustody/custodian/hsm"
	"github.com/keycustody/custodian/softhsm"
	"github.com/keycustody/custodian/softhsm/fault"
)

// faulty provisions a token behind a module that fails on demand.
func faulty(t testing.TB) (hsm.Config, *fault.Control) {
	t.Helper()
	c := softhsm.Test(t)
	f := fault.Build(t, c.Module)
	c.Module = f.Module
	return c, f
}

// sealed is a key with something sealed under it.
type sealed struct {
	key *hsm.Key
	iv  [hsm.IVSize]byte
	ct  []byte
}

func seal(t testing.TB, k *hsm.Key) sealed {
	t.Helper()
	iv, ct, err := k.Seal(t.Context(), nil, []byte("0123456789abcdef"), nil)
	if err != nil {
		t.Fatal(err)
	}
	return sealed{k, iv, ct}
}

func (s sealed) open(ctx context.Context) error {
	var dst [16]byte
	n, err := s.key.Open(ctx, s.iv, nil, s.ct, dst[:])
	if err == nil && !bytes.Equal(dst[:n], []byte("0123456789abcdef")) {
		return errors.New("opened to something else")
	}
	return err
}

func within(t testing.TB, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// eventually waits for something that another goroutine brings about.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("%s: did not happen within 10 s", what)
}

// abandon makes a call that hangs in a function of the module, and gives it up
// there.
func abandon(t testing.TB, f *fault.Control, function string, call func(context.Context) error) {
	t.Helper()
	hanging := f.Hanging(function)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- call(ctx) }()
	eventually(t, "the call hangs in "+function, func() bool { return f.Hanging(function) == hanging+1 })
	cancel()
	wantErr(t, "a call that is given up in "+function, <-ended, context.Canceled)
}

func TestBrokenSessionIsReplaced(t *testing.T) {
	c, f := faulty(t)
	tok := open(t, c)
	k, _ := newKey(t, newMEK(t, tok, "mek-v1", hsm.Sealed), hsm.UseGCM)
	s := seal(t, k)
	epoch := tok.Epoch()
	for _, code := range []uint{0xB3, 0xB0, 0x90, 0x91} {
		closed := f.Calls("C_CloseSession")
		f.Fail("C_DecryptInit", code, 1)
		if err := s.open(t.Context()); err != nil {
			t.Errorf("code %#x once: %v", code, err)
		}
		if got := f.Calls("C_CloseSession") - closed; got != 1 {
			t.Errorf("code %#x: %d sessions closed, want 1", code, got)
		}
	}
	if got := tok.Epoch(); got != epoch {
		t.Errorf("epoch %d, want still %d", got, epoch)
	}
}

func TestAnyErrorButAuthDropsTheSession(t *testing.T) {
	c, f := faulty(t)
	tok := open(t, c)
	k, _ := newKey(t, newMEK(t, tok, "mek-v1", hsm.Sealed), hsm.UseGCM)
	s := seal(t, k)
	for _, row := range []struct {
		code   uint
		closed int
		want   error
	}{
		{0x40, 0, hsm.ErrAuth},
		{0x41, 0, hsm.ErrAuth},
		{0x68, 1, hsm.ErrPolicy},
		{0x2, 1, hsm.ErrBusy},
		{0x5, 1, hsm.ErrAuth}, // unclear: the probe decides
		{0x82, 1, hsm.ErrStale},
	} {
		closed := f.Calls("C_CloseSession")
		f.FailAfter("C_Decrypt", row.code, 1)
		wantErr(t, "open", s.open(t.Context()), row.want)
		if got := f.Calls("C_CloseSession") - closed; got != row.closed {
			t.Errorf("code %#x: %d sessions closed, want %d", row.code, got, row.closed)
		}
	}
	if err := s.open(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestBadCiphertextDoesNotReconnect(t *testing.T) {
	c, f := faulty(t)
	tok := open(t, c)
	m := newMEK(t, tok, "mek-v1", hsm.Sealed)
	k, w := newKey(t, m, hsm.UseGCM)
	s := seal(t, k)
	inits := f.Calls("C_Initialize")
	for i := range s.ct {
		bad := s
		bad.ct = bytes.Clone(s.ct)
		bad.ct[i] ^= 0x80
		wantErr(t, "open a changed ciphertext", bad.open(t.Context()), hsm.ErrAuth)
	}
	for i := range w.Blob {
		bad := hsm.Wrapped{Blob: bytes.Clone(w.Blob), Canary: w.Canary}
		bad.Blob[i] ^= 1
		_, err := m.Load(t.Context(), hsm.UseGCM, []byte("movies/1"), bad)
		wantErr(t, "load a changed blob", err, hsm.ErrAuth)
	}
	if got, want := f.Calls("C_Initialize"), inits; got != want {
		t.Errorf("C_Initialize was called %d times, want %d", got, want)
	}
	if err := s.open(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestLostTokenReconnects(t *testing.T) {
	c, f := faulty(t)
	tok := open(t, c)
	m := newMEK(t, tok, "mek-v1", hsm.Sealed)
	k, w := newKey(t, m, hsm.UseGCM)
	s := seal(t, k)
	for i, code := range []uint{0x30, 0x31, 0x32, 0xE0, 0xE1, 0x190, 0x3, 0x101} {
		f.Fail("C_DecryptInit", code, 1)
		wantErr(t, "open", s.open(t.Context()), hsm.ErrDevice)
		if err := tok.Health(within(t, 5*time.Second)); err != nil {
			t.Errorf("code %#x: %v", code, err)
		}
		want := hsm.Epoch(i + 2)
		if got := tok.Epoch(); got != want {
			t.Errorf("code %#x: epoch %d, want %d", code, got, want)
		}
		wantErr(t, "open with a key of the old epoch", s.open(t.Context()), hsm.ErrStale)
		s.key.Release() // must not destroy what has the number of its handle now
		again, err := m.Load(t.Context(), hsm.UseGCM, []byte("movies/1"), w)
		if err != nil {
			t.Fatal(err)
		}
		s.key = again
		if err := s.open(t.Context()); err != nil {
			t.Errorf("code %#x: %v", code, err)
		}
		if got := again.Epoch(); got != want {
			t.Errorf("key of epoch %d, want %d", got, want)
		}
	}
}

// A reconnect that fails is tried again, and everything works afterwards
// without a restart.
func TestReconnectBacksOff(t *testing.T) {
	c, f := faulty(t)
	tok := open(t, c)
	m := newMEK(t, tok, "mek-v1", hsm.Sealed)
	k, w := newKey(t, m, hsm.UseGCM)
	s := seal(t, k)
	logins := f.Calls("C_Login")
	f.Fail("C_GetSlotList", 0x30, 1_000_000)
	f.Fail("C_DecryptInit", 0x32, 1)
	wantErr(t, "open", s.open(t.Context()), hsm.ErrDevice)
	wantErr(t, "health", tok.Health(within(t, 5*time.Second)), hsm.ErrDevice)
	start := time.Now()
	_, err := m.Load(t.Context(), hsm.UseGCM, []byte("movies/1"), w)
	wantErr(t, "load during the outage", err, hsm.ErrDevice)
	if d := time.Since(start); d > 2*time.Second {
		t.Errorf("an operation during the outage took %s, want it to fail at once", d)
	}
	if tok.Info().Outage == nil {
		t.Error("Info has no outage")
	}
	if got := f.Calls("C_Login"); got != logins {
		t.Errorf("%d logins without a token", got-logins)
	}
	f.Reset()
	eventually(t, "reconnect by itself", func() bool { return tok.Info().Outage == nil })
	again, err := m.Load(t.Context(), hsm.UseGCM, []byte("movies/1"), w)
	if err != nil {
		t.Fatal(err)
	}
	s.key = again
	if err := s.open(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestWrongPINIsTriedOnce(t *testing.T) {
	c, f := faulty(t)
	right, err := os.ReadFile(c.PINFile)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(c.PINFile, []byte("not the PIN\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = hsm.Open(t.Context(), c)
	wantErr(t, "first open", err, hsm.ErrPIN)
	if strings.Contains(err.Error(), "not the PIN") {
		t.Errorf("the error shows the PIN: %v", err)
	}
	if got := f.Calls("C_Login"); got != 1 {
		t.Fatalf("%d logins, want 1", got)
	}
	_, err = hsm.Open(t.Context(), c)
	wantErr(t, "second open", err, hsm.ErrLatched)
	if !strings.Contains(err.Error(), c.LatchFile) {
		t.Errorf("error does not name the latch file: %v", err)
	}
	if got := f.Calls("C_Login"); got != 1 {
		t.Errorf("%d logins, want still 1", got)
	}
	if err := os.WriteFile(c.PINFile, right, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(c.LatchFile); err != nil {
		t.Fatal(err)
	}
	open(t, c)
	if _, err := os.Stat(c.LatchFile); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("latch file after a login that succeeded: %v, want none", err)
	}
}

// A login whose outcome is not known leaves the latch; one that cannot have
// reached the token does not.
func TestLatchByOutcome(t *testing.T) {
	for _, row := range []struct {
		code  uint
		latch bool
	}{{0xA0, true}, {0xA4, true}, {0x5, true}, {0x30, true}, {0xE0, false}, {0x190, false}} {
		c, f := faulty(t)
		f.Fail("C_Login", row.code, 1)
		tok, err := hsm.Open(t.Context(), c)
		if err == nil {
			closeToken(t, tok)
			t.Fatalf("login answered %#x and open succeeded", row.code)
		}
		_, err = os.Stat(c.LatchFile)
		if got := err == nil; got != row.latch {
			t.Errorf("login answered %#x: latch file is %v, want %v", row.code, got, row.latch)
		}
	}
}

// A PIN that is refused at a reconnect is final: no second login.
func TestPINRefusedAtReconnect(t *testing.T) {
	c, f := faulty(t)
	tok := open(t, c)
	s := seal(t, first(newKey(t, newMEK(t, tok, "mek-v1", hsm.Sealed), hsm.UseGCM)))
	logins := f.Calls("C_Login")
	f.Fail("C_Login", 0xA0, 1)
	f.Fail("C_DecryptInit", 0x32, 1)
	wantErr(t, "open", s.open(t.Context()), hsm.ErrDevice)
	for range 3 {
		wantErr(t, "health", tok.Health(within(t, 5*time.Second)), hsm.ErrPIN)
	}
	time.Sleep(300 * time.Millisecond) // longer than the first back-off
	if got := f.Calls("C_Login") - logins; got != 1 {
		t.Errorf("%d logins at the reconnect, want 1", got)
	}
}

func first(k *hsm.Key, _ hsm.Wrapped) *hsm.Key { return k }

func TestTokenSeenLate(t *testing.T) {
	c, f := faulty(t)
	f.Fail("C_GetTokenInfo", 0xE0, 2) // the first two of crypto11's searches
	open(t, c)
	if got := f.Calls("C_Initialize"); got < 3 {
		t.Errorf("%d initialisations, want 3 at least", got)
	}
}

func TestGenerateMEKIsAdopted(t *testing.T) {
	for _, row := range []struct {
		name string
		code uint
		set  func(*fault.Control, uint)
		ok   bool
	}{
		{"rare code, failed", 0x5, func(f *fault.Control, code uint) { f.Fail("C_GenerateKey", code, 1) }, true},
		{"rare code, after doing it", 0x5, func(f *fault.Control, code uint) { f.FailAfter("C_GenerateKey", code, 1) }, true},
		{"inconsistent, after doing it", 0xD1, func(f *fault.Control, code uint) { f.FailAfter("C_GenerateKey", code, 1) }, true},
		{"disk full, failed", 0x6, func(f *fault.Control, code uint) { f.Fail("C_GenerateKey", code, 1) }, false},
		{"device, after doing it", 0x30, func(f *fault.Control, code uint) { f.FailAfter("C_GenerateKey", code, 1) }, true},
	} {
		t.Run(row.name, func(t *testing.T) {
			c, f := faulty(t)
			tok := open(t, c)
			spec := hsm.MEKSpec{Label: "mek-v1", ID: randomID(t), Profile: hsm.Sealed}
			row.set(f, row.code)
			err := tok.GenerateMEK(t.Context(), spec)
			if got := err == nil; got != row.ok {
				t.Errorf("generate: %v, want success: %v", err, row.ok)
			}
			if err := tok.GenerateMEK(t.Context(), spec); err != nil {
				t.Errorf("retry: %v", err)
			}
			objects, err := tok.Objects(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if got := len(objects); got != 1 {
				t.Errorf("%d objects in the token, want 1: %v", got, objects)
			}
		})
	}
}

func TestGenerateSignerIsAdopted(t *testing.T) {
	for _, after := range []bool{false, true} {
		c, f := faulty(t)
		tok := open(t, c)
		id := randomID(t)
		if after {
			f.FailAfter("C_GenerateKeyPair", 0x5, 1)
		} else {
			f.Fail("C_GenerateKeyPair", 0x5, 1)
		}
		if err := tok.GenerateSigner(t.Context(), "audit-v1", id); err != nil {
			t.Errorf("after doing it %v: %v", after, err)
		}
		objects, err := tok.Objects(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if got := len(objects); got != 2 {
			t.Errorf("%d objects in the token, want 2: %v", got, objects)
		}
		closeToken(t, tok)
	}
}

func TestHangHonoursTheContext(t *testing.T) {
	c, f := faulty(t)
	tok := open(t, c)
	s := seal(t, first(newKey(t, newMEK(t, tok, "mek-v1", hsm.Sealed), hsm.UseGCM)))
	pool := tok.Info().MaxSessions - 5
	f.Hang("C_Decrypt")
	var wg sync.WaitGroup
	var late, busy atomic.Int32
	for range 10 * pool {
		wg.Go(func() {
			start := time.Now()
			err := s.open(within(t, 100*time.Millisecond))
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("open: %v, want deadline exceeded", err)
			}
			if errors.Is(err, hsm.ErrBusy) {
				busy.Add(1)
			}
			if time.Since(start) > time.Second {
				late.Add(1)
			}
		})
	}
	wg.Wait()
	if got := late.Load(); got != 0 {
		t.Errorf("%d calls came back a second after their deadline", got)
	}
	hang := tok.Info().Abandoned
	if hang < 1 || hang > pool {
		t.Errorf("%d calls abandoned, want some, and no more than the pool has sessions: %d", hang, pool)
	}
	if got, want := int(busy.Load()), 10*pool-hang; got != want {
		t.Errorf("%d calls got no session, want the other %d", got, want)
	}
	eventually(t, "they hang in the module", func() bool { return f.Hanging("C_Decrypt") == hang })
	f.Resume("C_Decrypt")
	eventually(t, "abandoned calls end", func() bool { return tok.Info().Abandoned == 0 && tok.Info().InFlight == 0 })
	if err := s.open(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestCallTimeoutBoundsTheWait(t *testing.T) {
	c, f := faulty(t)
	c.CallTimeout = 100 * time.Millisecond
	tok := open(t, c)
	s := seal(t, first(newKey(t, newMEK(t, tok, "mek-v1", hsm.Sealed), hsm.UseGCM)))
	f.Hang("C_Decrypt")
	wantErr(t, "open", s.open(t.Context()), hsm.ErrDevice)
	f.Resume("C_Decrypt")
	if err := tok.Health(within(t, 5*time.Second)); err != nil {
		t.Error(err)
	}
}

// Callers whose own deadlines are shorter than CallTimeout never time a call
// out. The token's outage is noticed all the same, and ends with the hang.
func TestHangUnderShortDeadlinesIsNoticed(t *testing.T) {
	c, f := faulty(t)
	c.CallTimeout = 300 * time.Millisecond
	tok := open(t, c)
	m := newMEK(t, tok, "mek-v1", hsm.Sealed)
	k, w := newKey(t, m, hsm.UseGCM)
	s := seal(t, k)
	f.Hang("C_Decrypt")
	eventually(t, "outage", func() bool {
		if err := s.open(within(t, 20*time.Millisecond)); err == nil {
			t.Error("opened while the module hangs")
		}
		return tok.Info().Outage != nil
	})
	f.Resume("C_Decrypt")
	eventually(t, "recovery", func() bool {
		k, err := m.Load(within(t, time.Second), hsm.UseGCM, []byte("movies/1"), w)
		if err == nil {
			s.key = k
		}
		return err == nil
	})
	if err := s.open(t.Context()); err != nil {
		t.Error(err)
	}
}

// With few calls the pool has free sessions left, and one call that hangs is
// no outage.
func TestOneHangingCallIsNoOutage(t *testing.T) {
	c, f := faulty(t)
	c.CallTimeout = 100 * time.Millisecond
	tok := open(t, c)
	s := seal(t, first(newKey(t, newMEK(t, tok, "mek-v1", hsm.Sealed), hsm.UseGCM)))
	f.Delay("C_Decrypt", 2*time.Second)
	before := f.Calls("C_Decrypt")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- s.open(ctx) }()
	eventually(t, "the call", func() bool { return f.Calls("C_Decrypt") > before })
	cancel()
	if err := <-ended; err == nil {
		t.Error("opened at once by a module that takes two seconds")
	}
	f.Delay("C_Decrypt", 0) // for the others
	time.Sleep(5 * c.CallTimeout)
	if got, want := tok.Info().Abandoned, 1; got != want {
		t.Fatalf("%d calls abandoned, want %d", got, want)
	}
	if err := tok.Info().Outage; err != nil {
		t.Errorf("outage: %v, want none", err)
	}
	eventually(t, "abandoned call ends", func() bool { return tok.Info().Abandoned == 0 })
}

// Nobody waits for a pool that is all abandoned, and it is good again by itself.
func TestAbandonedPoolRefusesAtOnce(t *testing.T) {
	c, f := faulty(t)
	c.CallTimeout = time.Minute
	tok := open(t, c)
	s := seal(t, first(newKey(t, newMEK(t, tok, "mek-v1", hsm.Sealed), hsm.UseGCM)))
	pool := tok.Info().MaxSessions - 5
	f.Hang("C_Decrypt")
	for range pool {
		abandon(t, f, "C_Decrypt", s.open)
	}
	start := time.Now()
	wantErr(t, "open with every session abandoned", s.open(within(t, 10*time.Second)), hsm.ErrDevice)
	if d := time.Since(start); d > time.Second {
		t.Errorf("refused after %s, want at once", d)
	}
	f.Resume("C_Decrypt")
	eventually(t, "a session free", func() bool { return s.open(t.Context()) == nil })
	if got, want := tok.Epoch(), hsm.Epoch(1); got != want {
		t.Errorf("epoch %d, want still %d", got, want)
	}
}

func TestCloseMissesItsDrain(t *testing.T) {
	c, f := faulty(t)
	c.DrainTimeout = 200 * time.Millisecond
	var fatal atomic.Int32
	c.OnFatal = func(error) { fatal.Add(1) }
	tok, err := hsm.Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	s := seal(t, first(newKey(t, newMEK(t, tok, "mek-v1", hsm.Sealed), hsm.UseGCM)))
	f.Hang("C_Decrypt")
	abandon(t, f, "C_Decrypt", s.open)
	finals := f.Calls("C_Finalize")
	wantErr(t, "close", tok.Close(t.Context()), hsm.ErrDevice)
	if got := fatal.Load(); got != 1 {
		t.Errorf("OnFatal was called %d times, want 1", got)
	}
	if got := f.Calls("C_Finalize"); got != finals {
		t.Error("the module was finalised with a call in flight")
	}
	_, err = hsm.Open(t.Context(), c)
	wantErr(t, "open while the old calls hang", err, hsm.ErrPolicy)
	f.Resume("C_Decrypt")
	eventually(t, "close in the end", func() bool { return tok.Close(t.Context()) == nil })
	if got := fatal.Load(); got != 1 {
		t.Errorf("OnFatal was called %d times, want 1", got)
	}
	open(t, c)
}

// All sessions hang: the token is lost, and a reconnect that cannot drain is
// the end.
func TestReconnectMissesItsDrain(t *testing.T) {
	c, f := faulty(t)
	c.CallTimeout, c.DrainTimeout = 100*time.Millisecond, 200*time.Millisecond
	var fatal atomic.Int32
	c.OnFatal = func(error) { fatal.Add(1) }
	tok := open(t, c)
	s := seal(t, first(newKey(t, newMEK(t, tok, "mek-v1", hsm.Sealed), hsm.UseGCM)))
	f.Hang("C_Decrypt")
	for range tok.Info().MaxSessions {
		_ = s.open(within(t, 20*time.Millisecond))
	}
	wantErr(t, "health", tok.Health(within(t, 5*time.Second)), hsm.ErrDevice)
	eventually(t, "OnFatal", func() bool { return fatal.Load() == 1 })
	f.Resume("C_Decrypt")
	eventually(t, "recovery, if the process goes on all the same", func() bool { return tok.Health(within(t, time.Second)) == nil })
}

func TestSignerAcrossReconnects(t *testing.T) {
	digest := sha256.Sum256([]byte("checkpoint"))
	t.Run("ECDSA P-256", func(t *testing.T) {
		signAcrossReconnects(t, (*hsm.Token).GenerateSigner, digest[:], crypto.SHA256)
	})
	t.Run("Ed25519", func(t *testing.T) {
		signAcrossReconnects(t, (*hsm.Token).GenerateEd25519Signer, []byte("checkpoint"), crypto.Hash(0))
	})
}

func signAcrossReconnects(t *testing.T, generate func(*hsm.Token, context.Context, string, [16]byte) error, text []byte, hash crypto.Hash) {
	c, f := faulty(t)
	tok := open(t, c)
	id := randomID(t)
	if err := generate(tok, t.Context(), "audit-v1", id); err != nil {
		t.Fatal(err)
	}
	s, err := tok.Signer(t.Context(), "audit-v1", id)
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		name string
		harm func()
	}{
		{"nothing", func() {}},
		{"session broken once", func() { f.Fail("C_SignInit", 0xB3, 1) }},
		{"sessions broken for good", func() { f.Fail("C_SignInit", 0xB3, 2) }},
		{"handle gone", func() { f.Fail("C_SignInit", 0x82, 1) }},
		{"logged out", func() { f.Fail("C_SignInit", 0x101, 1) }},
		{"device removed while signing", func() { f.Fail("C_Sign", 0x32, 1) }},
	} {
		t.Run(row.name, func(t *testing.T) {
			row.harm()
			sig, err := s.Sign(nil, text, hash)
			if err != nil {
				t.Fatal(err)
			}
			if !verify(s.Public(), text, sig) {
				t.Error("signature does not verify")
			}
		})
	}
	if got := tok.Epoch(); got < 3 {
		t.Errorf("epoch %d, want several reconnects", got)
	}
}

// Calls of many goroutines while the token is lost again and again: none may
// give a wrong answer, and the module must never be finalised under a call,
// which would end this process.
func TestReconnectsUnderLoad(t *testing.T) {
	c, f := faulty(t)
	tok := open(t, c)
	m := newMEK(t, tok, "mek-v1", hsm.Sealed)
	k, w := newKey(t, m, hsm.UseGCM)
	var current atomic.Pointer[sealed]
	s := seal(t, k)
	current.Store(&s)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var wg sync.WaitGroup
	var opened, reloads atomic.Int64
	for range 32 {
		wg.Go(func() {
			for ctx.Err() == nil {
				s := *current.Load()
				err := s.open(ctx)
				switch {
				case err == nil:
					opened.Add(1)
				case errors.Is(err, hsm.ErrStale):
					if k, err := m.Load(ctx, hsm.UseGCM, []byte("movies/1"), w); err == nil {
						reloads.Add(1)
						s.key.Release()
						s.key = k
						current.Store(&s)
					}
				case errors.Is(err, hsm.ErrDevice):
					time.Sleep(5 * time.Millisecond)
				case ctx.Err() == nil:
					t.Errorf("open: %v", err)
				}
			}
		})
	}
	several := func() bool { return tok.Epoch() >= 3 && opened.Load() > 0 && reloads.Load() > 0 }
	for start := time.Now(); time.Since(start) < 1500*time.Millisecond || !several() && time.Since(start) < 20*time.Second; {
		time.Sleep(150 * time.Millisecond)
		f.Fail("C_DecryptInit", 0x32, 1)
	}
	cancel()
	wg.Wait()
	f.Reset()
	if !several() {
		t.Errorf("epoch %d, %d opened, %d reloads: want several of each", tok.Epoch(), opened.Load(), reloads.Load())
	}
	eventually(t, "health", func() bool { return tok.Health(within(t, time.Second)) == nil })
}

func TestReleaseWaitsForCallsInFlight(t *testing.T) {
	c, f := faulty(t)
	tok := open(t, c)
	m := newMEK(t, tok, "mek-v1", hsm.Sealed)
	before := f.Calls("C_DestroyObject")
	s := seal(t, first(newKey(t, m, hsm.UseGCM)))
	// The key that was wrapped, and the one that it was verified with.
	eventually(t, "keys of the set-up destroyed", func() bool { return f.Calls("C_DestroyObject") == before+2 })
	f.Hang("C_Decrypt")
	result := make(chan error, 1)
	go func() { result <- s.open(t.Context()) }()
	eventually(t, "call hangs", func() bool { return f.Hanging("C_Decrypt") == 1 })
	destroyed := f.Calls("C_DestroyObject")
	s.key.Release()
	s.key.Release()
	wantErr(t, "open after release", s.open(t.Context()), hsm.ErrStale)
	time.Sleep(50 * time.Millisecond)
	if got := f.Calls("C_DestroyObject"); got != destroyed {
		t.Error("the key was destroyed under a call")
	}
	f.Resume("C_Decrypt")
	if err := <-result; err != nil {
		t.Errorf("call in flight: %v", err)
	}
	eventually(t, "key destroyed", func() bool { return f.Calls("C_DestroyObject") == destroyed+1 })
}

// A key that was released while the anchor was busy is destroyed later.
func TestReleaseWhileTheAnchorIsBusy(t *testing.T) {
	c, f := faulty(t)
	c.CallTimeout = time.Second
	lines := make(lineWriter, 64)
	c.Log = slog.New(slog.NewTextHandler(lines, nil))
	tok := open(t, c)
	m := newMEK(t, tok, "mek-v1", hsm.Sealed)
	before := f.Calls("C_DestroyObject")
	k, w := newKey(t, m, hsm.UseGCM)
	// The key that was wrapped, and the one that it was verified with.
	eventually(t, "keys of the set-up destroyed", func() bool { return f.Calls("C_DestroyObject") == before+2 })
	f.Hang("C_UnwrapKey")
	abandon(t, f, "C_UnwrapKey", func(ctx context.Context) error {
		_, err := m.Load(ctx, hsm.UseGCM, []byte("movies/1"), w)
		return err
	})
	k.Release()
	lines.await(t, "released keys not destroyed")
	f.Resume("C_UnwrapKey")
	// One is the key, the other what the abandoned load made.
	eventually(t, "both keys destroyed", func() bool { return f.Calls("C_DestroyObject") == before+4 })
	if got, want := tok.Epoch(), hsm.Epoch(1); got != want {
		t.Errorf("epoch %d, want still %d", got, want)
	}
}

// A lineWriter is a log whose lines a test waits for; it drops what has no room.
type lineWriter chan string

func (l lineWriter) Write(p []byte) (int, error) {
	select {
	case l <- string(p):
	default:
	}
	return len(p), nil
}

func (l lineWriter) await(t testing.TB, text string) {
	t.Helper()
	limit := time.After(10 * time.Second)
	for {
		select {
		case line := <-l:
			if strings.Contains(line, text) {
				return
			}
		case <-limit:
			t.Fatalf("the log does not say %q within 10 s", text)
		}
	}
}

func TestOpenHonoursTheContext(t *testing.T) {
	c, f := faulty(t)
	f.Hang("C_OpenSession")
	start := time.Now()
	_, err := hsm.Open(within(t, 100*time.Millisecond), c)
	wantErr(t, "open", err, context.DeadlineExceeded)
	if d := time.Since(start); d > 2*time.Second {
		t.Errorf("open came back after %s", d)
	}
	f.Resume("C_OpenSession")
	eventually(t, "module free again", func() bool {
		tok, err := hsm.Open(t.Context(), c)
		if err == nil {
			closeToken(t, tok)
		}
		return err == nil
	})
}

func TestUnfitModules(t *testing.T) {
	t.Run("mechanisms missing", func(t *testing.T) {
		c := softhsm.Test(t)
		c.Profile = "nshield" // its number of KWP is unknown to SoftHSM
		_, err := hsm.Open(t.Context(), c)
		wantErr(t, "open", err, hsm.ErrUnfit)
		if err != nil && !strings.Contains(err.Error(), "AES_KEY_WRAP_KWP") {
			t.Errorf("error does not name the mechanism: %v", err)
		}
	})
	t.Run("profile refused", func(t *testing.T) {
		c := softhsm.Test(t)
		c.Profile = "cloudhsm"
		_, err := hsm.Open(t.Context(), c)
		wantErr(t, "open", err, hsm.ErrUnfit)
	})
	t.Run("no known keys", func(t *testing.T) {
		c, f := faulty(t)
		f.Fail("C_CreateObject", 0x10, 1)
		_, err := hsm.Open(t.Context(), c)
		wantErr(t, "open", err, hsm.ErrUnfit)
	})
	// A module that answers OK where it must refuse.
	for _, row := range []struct {
		function string
		skip     int
		says     string
	}{
		{"C_Decrypt", 2, "accepts a wrong tag"}, // the probe's and the known answer's pass
		{"C_SetAttributeValue", 0, "not modifiable"},
	} {
		t.Run(row.says, func(t *testing.T) {
			c, f := faulty(t)
			f.FailLater(row.function, 0, row.skip)
			_, err := hsm.Open(t.Context(), c)
			wantErr(t, "open", err, hsm.ErrUnfit)
			if err != nil && !strings.Contains(err.Error(), row.says) {
				t.Errorf("error does not say %q: %v", row.says, err)
			}
		})
	}
	t.Run("not a module", func(t *testing.T) {
		c := softhsm.Test(t)
		c.Module = filepath.Join(t.TempDir(), "none.so")
		if _, err := hsm.Open(t.Context(), c); err == nil {
			t.Error("opened a module that is not there")
		}
	})
}
