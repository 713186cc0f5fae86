package hsm_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/keycustody/custodian/hsm"
	"github.com/keycustody/custodian/softhsm"
)

// twoKeys are one to reseal from and one to reseal to.
func twoKeys(t testing.TB, mek *hsm.MEK) (from, to *hsm.Key) {
	t.Helper()
	from, _ = newKey(t, mek, hsm.UseGCM)
	to, _ = newKey(t, mek, hsm.UseGCM)
	return from, to
}

// resealings are n sealed texts on their way to another key.
func resealings(t testing.TB, k *hsm.Key, n int) []hsm.Resealing {
	t.Helper()
	items := make([]hsm.Resealing, n)
	for i := range items {
		r := &items[i]
		r.AAD, r.To = fmt.Appendf(nil, "from %d", i), fmt.Appendf(nil, "to %d", i)
		var err error
		if r.IV, r.Sealed, err = k.Seal(t.Context(), r.AAD, text(n, i), nil); err != nil {
			t.Fatal(err)
		}
	}
	return items
}

// text is what is sealed in the i'th of n items, no two of which in a row have
// the same length.
func text(n, i int) []byte {
	return bytes.Repeat(fmt.Appendf(nil, "content key %04d", i), 1+(n-i)%3)
}

// wantSealed says how many of items, the first ones, lie under to, and that the
// others still lie under from.
func wantSealed(t testing.TB, items []hsm.Resealing, from, to *hsm.Key, moved int) {
	t.Helper()
	for i, r := range items {
		k, aad := to, fmt.Appendf(nil, "to %d", i)
		if i >= moved {
			k, aad = from, fmt.Appendf(nil, "from %d", i)
		}
		dst := make([]byte, 64)
		n, err := k.Open(t.Context(), r.IV, aad, r.Sealed, dst)
		if want := text(len(items), i); err != nil || !bytes.Equal(dst[:n], want) {
			t.Errorf("item %d of %d, %d moved: does not open to what it was: %v", i, len(items), moved, err)
		}
	}
}

func TestReseal(t *testing.T) {
	tok := open(t, softhsm.Test(t))
	mek := newMEK(t, tok, "mek-v1", hsm.Sealed)
	from, to := twoKeys(t, mek)
	mac, _ := newKey(t, mek, hsm.UseCMAC)

	items := resealings(t, from, 5)
	if n, err := from.Reseal(t.Context(), to, items); n != 5 || err != nil {
		t.Fatalf("got %d %v, want all five", n, err)
	}
	wantSealed(t, items, from, to, 5)
	if n, err := from.Reseal(t.Context(), to, nil); n != 0 || err != nil {
		t.Errorf("nothing: got %d %v", n, err)
	}

	// The third is damaged: those before it are done, and the caller goes on
	// behind it.
	items = resealings(t, from, 5)
	items[2].Sealed[3] ^= 1
	n, err := from.Reseal(t.Context(), to, items)
	wantErr(t, "a damaged one", err, hsm.ErrAuth)
	if n != 2 {
		t.Errorf("before a damaged one: got %d, want 2", n)
	}
	items[2].Sealed[3] ^= 1
	wantSealed(t, items, from, to, 2)

	items = resealings(t, from, 1)
	items[0].AAD = []byte("another record")
	_, err = from.Reseal(t.Context(), to, items)
	wantErr(t, "other associated data", err, hsm.ErrAuth)
	_, err = to.Reseal(t.Context(), from, resealings(t, from, 1))
	wantErr(t, "by another key", err, hsm.ErrAuth)

	for what, bad := range map[string]hsm.Resealing{
		"short":                {Sealed: make([]byte, hsm.TagSize-1)},
		"long":                 {Sealed: make([]byte, hsm.MaxPlaintext+hsm.TagSize+1)},
		"long associated data": {Sealed: make([]byte, 32), AAD: make([]byte, hsm.MaxAAD+1)},
		"long new data":        {Sealed: make([]byte, 32), To: make([]byte, hsm.MaxAAD+1)},
	} {
		_, err = from.Reseal(t.Context(), to, []hsm.Resealing{bad})
		wantErr(t, what, err, hsm.ErrPolicy)
	}
	_, err = mac.Reseal(t.Context(), to, nil)
	wantErr(t, "from a CMAC key", err, hsm.ErrPolicy)
	_, err = from.Reseal(t.Context(), mac, nil)
	wantErr(t, "to a CMAC key", err, hsm.ErrPolicy)

	items = resealings(t, from, 2)
	gone, _ := newKey(t, mek, hsm.UseGCM)
	gone.Release()
	_, err = from.Reseal(t.Context(), gone, items)
	wantErr(t, "to a released key", err, hsm.ErrStale)
	_, err = gone.Reseal(t.Context(), to, items)
	wantErr(t, "from a released key", err, hsm.ErrStale)
	wantSealed(t, items, from, to, 0)
}

// Whatever call of the token fails, an item is either done or as it was.
func TestResealFaults(t *testing.T) {
	c, f := faulty(t)
	tok := open(t, c)
	mek := newMEK(t, tok, "mek-v1", hsm.Sealed)
	from, to := twoKeys(t, mek)

	for _, call := range []string{"C_DecryptInit", "C_Decrypt", "C_GenerateRandom", "C_EncryptInit", "C_Encrypt"} {
		items := resealings(t, from, 3)
		f.Fail(call, 0xB3, 1) // CKR_SESSION_HANDLE_INVALID: tried again in a new session
		if n, err := from.Reseal(t.Context(), to, items); n != 3 || err != nil {
			t.Errorf("%s: session broken once: got %d %v, want all three", call, n, err)
		}
		wantSealed(t, items, from, to, 3)

		items = resealings(t, from, 3)
		f.Fail(call, 0x68, 1) // CKR_KEY_FUNCTION_NOT_PERMITTED
		n, err := from.Reseal(t.Context(), to, items)
		wantErr(t, call+" not permitted", err, hsm.ErrPolicy)
		wantSealed(t, items, from, to, n)
	}

	items := resealings(t, from, 2)
	f.FailLater("C_Decrypt", 0x40, 1) // CKR_ENCRYPTED_DATA_INVALID, for what it has just sealed
	_, err := from.Reseal(t.Context(), to, items)
	wantErr(t, "does not open what it sealed", err, hsm.ErrDevice)
	if errors.Is(err, hsm.ErrAuth) {
		t.Errorf("does not open what it sealed: got %v, which blames the record", err)
	}
	f.Reset()
	wantSealed(t, items, from, to, 0)
	if got := tok.Info().InFlight; got != 0 {
		t.Errorf("%d calls are in flight afterwards", got)
	}
}

// A caller who leaves takes nothing along that the token still works on.
func TestResealAbandoned(t *testing.T) {
	c, f := faulty(t)
	tok := open(t, c)
	mek := newMEK(t, tok, "mek-v1", hsm.Sealed)
	from, to := twoKeys(t, mek)
	items := resealings(t, from, 2)
	f.Hang("C_Encrypt")
	abandon(t, f, "C_Encrypt", func(ctx context.Context) error {
		n, err := from.Reseal(ctx, to, items)
		if n != 0 {
			t.Errorf("got %d, want 0", n)
		}
		return err
	})
	f.Resume("C_Encrypt")
	eventually(t, "the call ends", func() bool { return tok.Info().InFlight == 0 })
	wantSealed(t, items, from, to, 0)
}

// Others do not wait for all of a long job: they go between two of its items.
func TestResealStepsAside(t *testing.T) {
	c, f := faulty(t)
	tok := open(t, c)
	mek := newMEK(t, tok, "mek-v1", hsm.Sealed)
	from, to := twoKeys(t, mek)
	items := resealings(t, from, 40)
	other := resealings(t, from, 1)[0]
	f.Delay("C_Encrypt", 20*time.Millisecond)
	ended := make(chan error, 1)
	encrypted := f.Calls("C_Encrypt")
	go func() {
		_, err := from.Reseal(t.Context(), to, items)
		ended <- err
	}()
	eventually(t, "the job has begun", func() bool { return f.Calls("C_Encrypt") > encrypted })
	dst := make([]byte, 64)
	if _, err := from.Open(t.Context(), other.IV, other.AAD, other.Sealed, dst); err != nil {
		t.Errorf("a call beside it: %v", err)
	}
	if done := f.Calls("C_Encrypt") - encrypted; done > 20 {
		t.Errorf("a call beside it waited for %d of %d items", done, len(items))
	}
	if err := <-ended; err != nil {
		t.Errorf("the job: %v", err)
	}
	wantSealed(t, items, from, to, len(items))
}

// A caller who leaves while the job has stepped aside, or at any other moment,
// leaves nothing behind: no lane is lost, and none is there twice.
func TestResealWithdrawn(t *testing.T) {
	tok := open(t, softhsm.Test(t))
	mek := newMEK(t, tok, "mek-v1", hsm.Sealed)
	from, to := twoKeys(t, mek)
	items := resealings(t, from, 50)
	stop := make(chan struct{})
	var beside sync.WaitGroup
	for range 3 {
		beside.Go(func() {
			dst := make([]byte, 64)
			for {
				select {
				case <-stop:
					return
				default:
				}
				if _, err := from.Open(t.Context(), items[0].IV, items[0].AAD, items[0].Sealed, dst); err != nil {
					t.Errorf("beside it: %v", err)
					return
				}
			}
		})
	}
	left := 0
	for i := range 300 {
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(i)*20*time.Microsecond)
		if _, err := from.Reseal(ctx, to, slices.Clone(items)); err != nil {
			wantErr(t, "left", err, context.DeadlineExceeded)
			left++
			eventually(t, "its call ends", func() bool { return tok.Info().Abandoned == 0 })
		}
		cancel()
	}
	close(stop)
	beside.Wait()
	if left == 0 {
		t.Error("nobody left: the test shows nothing")
	}
	eventually(t, "all calls end", func() bool { i := tok.Info(); return i.InFlight == 0 && i.Abandoned == 0 })
	if n, err := from.Reseal(t.Context(), to, items); n != len(items) || err != nil {
		t.Fatalf("afterwards: got %d %v, want all", n, err)
	}
	wantSealed(t, items, from, to, len(items))
}

// A caller who leaves while another call has the lane is told at once, and has
// not left a call behind that the token works on.
func TestResealWithdrawnAside(t *testing.T) {
	c, f := faulty(t)
	tok := open(t, c)
	mek := newMEK(t, tok, "mek-v1", hsm.Sealed)
	from, to := twoKeys(t, mek)
	mac, _ := newKey(t, mek, hsm.UseCMAC)
	items := resealings(t, from, 40)
	f.Delay("C_Encrypt", 10*time.Millisecond)
	f.Hang("C_SignInit")
	ctx, leave := context.WithCancel(t.Context())
	defer leave()
	resealed, signed := make(chan error, 1), make(chan error, 1)
	encrypted := f.Calls("C_Encrypt")
	go func() {
		_, err := from.Reseal(ctx, to, items)
		resealed <- err
	}()
	eventually(t, "the job has begun", func() bool { return f.Calls("C_Encrypt") > encrypted })
	go func() {
		_, err := mac.CMAC(t.Context(), []byte("message"))
		signed <- err
	}()
	eventually(t, "the other call has the lane", func() bool { return f.Hanging("C_SignInit") == 1 })
	leave()
	err := <-resealed
	wantErr(t, "left", err, hsm.ErrBusy)
	wantErr(t, "left", err, context.Canceled)
	if got := tok.Info().Abandoned; got != 0 {
		t.Errorf("%d calls are abandoned, want none: it was not running", got)
	}
	f.Resume("C_SignInit")
	if err := <-signed; err != nil {
		t.Errorf("the other call: %v", err)
	}
	eventually(t, "all calls end", func() bool { return tok.Info().InFlight == 0 })
	wantSealed(t, items, from, to, 0)
	if n, err := from.Reseal(t.Context(), to, items); n != len(items) || err != nil {
		t.Fatalf("afterwards: got %d %v, want all", n, err)
	}
}

// CallTimeout bounds what a job does until it steps aside, not all of it: a slow
// token needs longer for many items. A call that hangs in the middle of it ends
// it.
func TestResealTakesItsTime(t *testing.T) {
	c, f := faulty(t)
	c.CallTimeout = 400 * time.Millisecond
	tok := open(t, c)
	mek := newMEK(t, tok, "mek-v1", hsm.Sealed)
	from, to := twoKeys(t, mek)
	items := resealings(t, from, 60)
	f.Delay("C_Encrypt", 10*time.Millisecond)
	began := time.Now()
	if n, err := from.Reseal(t.Context(), to, items); n != len(items) || err != nil {
		t.Fatalf("got %d %v, want all", n, err)
	}
	if took := time.Since(began); took < c.CallTimeout {
		t.Fatalf("it took %s, less than CallTimeout: the test shows nothing", took)
	}
	wantSealed(t, items, from, to, len(items))
	f.Reset()
	items = resealings(t, from, 60)
	encrypted := f.Calls("C_Encrypt")
	f.Delay("C_Encrypt", 10*time.Millisecond)
	ended := make(chan error, 1)
	go func() {
		_, err := from.Reseal(t.Context(), to, items)
		ended <- err
	}()
	eventually(t, "it is in its middle", func() bool { return f.Calls("C_Encrypt") > encrypted+30 })
	f.Hang("C_Encrypt")
	select {
	case err := <-ended:
		wantErr(t, "hangs", err, hsm.ErrDevice)
	case <-time.After(30 * time.Second):
		t.Error("hangs: the caller waits for ever")
	}
	f.Reset()
	wantSealed(t, items, from, to, 0)
}
