package audit_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/keycustody/custodian/internal/audit"
	"github.com/keycustody/custodian/internal/checkpoint"
	"golang.org/x/mod/sumdb/note"
)

// A testKey signs checkpoints, and does not when told to.
type testKey struct {
	key *ecdsa.PrivateKey

	mu     sync.Mutex // guards the fields below
	before error      // what Sign answers and does not sign
	after  error      // what Sign answers when it has signed
	slow   time.Duration
	calls  int
}

func newTestKey(t testing.TB) *testKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return &testKey{key: key}
}

func (k *testKey) check(signed []byte) error {
	_, err := checkpoint.Verify(signed, k.key.Public())
	return err
}

// signer is the key as the log with that ID uses it.
func (k *testKey) signer(t testing.TB, id [16]byte) audit.Signer {
	t.Helper()
	origin := checkpoint.Origin(id)
	s, err := checkpoint.NewSigner(origin, k.key)
	if err != nil {
		t.Fatal(err)
	}
	return audit.Signer{Check: k.check, Sign: func(size uint64, root [32]byte) ([]byte, error) {
		k.mu.Lock()
		before, after, slow := k.before, k.after, k.slow
		k.calls++
		k.mu.Unlock()
		time.Sleep(slow)
		if before != nil {
			return nil, before
		}
		b, err := checkpoint.Checkpoint{Origin: origin, Size: size, Root: root}.Sign(s)
		if err == nil {
			err = after
		}
		return b, err
	}}
}

func (k *testKey) set(before, after error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.before, k.after = before, after
}

func signWith(t testing.TB, l *audit.Log, k *testKey) {
	t.Helper()
	if err := l.SignWith(k.signer(t, l.ID())); err != nil {
		t.Fatal(err)
	}
}

// makeSigned writes a log of 20 entries in batches of 1 to 5, all signed.
func makeSigned(t testing.TB, k *testKey) sample {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "audit")
	l := create(t, dir, audit.Options{})
	signWith(t, l, k)
	s := sample{ends: []int64{64}, sizes: []int{0}}
	for n := 0; n < 20; {
		var entries []audit.Entry
		for range min(len(s.ends)%5+1, 20-n) {
			entries = append(entries, release(n))
			n++
		}
		appendTo(t, l, entries...)
		s.ends, s.sizes = append(s.ends, l.Stats().Bytes), append(s.sizes, n)
	}
	shut(t, l)
	s.file = load(t, dir)[:s.ends[len(s.ends)-1]]
	return s
}

func verifySigned(dir string, k *testKey) (audit.Report, error) {
	return audit.Verify(context.Background(), dir, audit.VerifyOptions{Check: k.check})
}

// Each receipt's checkpoint covers its entry, also where many share a batch.
func TestReceiptsHaveCheckpoints(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	k := newTestKey(t)
	k.slow = time.Millisecond
	l := create(t, dir, audit.Options{})
	signWith(t, l, k)
	var wg sync.WaitGroup
	for range 32 {
		wg.Go(func() {
			for i := range 10 {
				for _, r := range appendTo(t, l, release(i), release(i+1)) {
					c, err := checkpoint.Verify(r.Checkpoint, k.key.Public())
					if err != nil || c.Size <= r.Index || c.Origin != checkpoint.Origin(l.ID()) {
						t.Errorf("checkpoint %+v of entry %d: %v", c, r.Index, err)
					}
				}
			}
		})
	}
	wg.Wait()
	if got := l.Stats(); got.Batches > 640/4 || uint64(k.calls) != got.Batches {
		t.Errorf("%d signatures for %d batches, want one for each and the batches to grow", k.calls, got.Batches)
	}
	last := l.Checkpoint()
	shut(t, l)
	r, err := verifySigned(dir, k)
	if err != nil || r.Checkpoints != r.Batches || r.Entries != 640 || r.Unsigned != 0 || !bytes.Equal(r.Checkpoint, last) {
		t.Errorf("report = %+v, %v", r, err)
	}
	l = open(t, dir, audit.Options{})
	if !bytes.Equal(l.Checkpoint(), last) {
		t.Error("the checkpoint after Open is another one")
	}
}

// A log of the version before goes on with signatures, and its entries stay.
func TestUnsignedLogIsSigned(t *testing.T) {
	dir := t.TempDir()
	old := load(t, filepath.Join("testdata", "log_v1"))
	store(t, dir, old)
	before := readAll(t, dir)
	k := newTestKey(t)
	l := open(t, dir, audit.Options{})
	signWith(t, l, k)
	appendTo(t, l, release(9))
	appendTo(t, l, release(10))
	shut(t, l)
	if got := load(t, dir); !bytes.HasPrefix(got, old) {
		t.Error("what was written before was changed")
	}
	if got := readAll(t, dir)[:len(before)]; !reflect.DeepEqual(got, before) {
		t.Errorf("entries = %+v, want %+v", got, before)
	}
	r, err := verifySigned(dir, k)
	if err != nil || r.Entries != 6 || r.Checkpoints != 2 || r.Unsigned != 4 {
		t.Errorf("report = %+v, %v, want 6 entries, the first 4 of them unsigned", r, err)
	}
	l = open(t, dir, audit.Options{})
	wantBlocked(t, l, nil, release(11))
	signWith(t, l, k)
	if got, want := appendTo(t, l, release(11))[0].Index, uint64(6); got != want {
		t.Errorf("index = %d, want %d", got, want)
	}
}

// Signing fails once before and once after it did its work: nothing is written
// or acknowledged, and the next entry has the index of the one that failed.
func TestSigningFails(t *testing.T) {
	for _, tt := range []struct {
		name          string
		before, after error
	}{{"before", errInjected, nil}, {"after", nil, errInjected}} {
		t.Run(tt.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "audit")
			k := newTestKey(t)
			l := create(t, dir, audit.Options{})
			signWith(t, l, k)
			appendTo(t, l, release(0), release(1), release(2))
			root, size := l.Root(), l.Stats().Bytes
			k.set(tt.before, tt.after)
			wantBlocked(t, l, errInjected, release(3))
			wantBlocked(t, l, errInjected, release(4), release(5))
			if got := l.Stats(); got.Entries != 3 || got.Bytes != size || !strings.Contains(got.Blocked, "injected fault") || l.Root() != root {
				t.Errorf("stats = %+v, want 3 entries and the reason", got)
			}
			k.set(nil, nil)
			for deadline := time.Now().Add(5 * time.Second); l.Stats().Blocked != ""; time.Sleep(20 * time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatal("the log still says that it is blocked")
				}
			}
			r := appendTo(t, l, release(6))[0]
			if c, err := checkpoint.Verify(r.Checkpoint, k.key.Public()); r.Index != 3 || err != nil || c.Size != 4 {
				t.Errorf("entry %d, checkpoint %+v, %v, want index 3", r.Index, c, err)
			}
			shut(t, l)
			if r, err := verifySigned(dir, k); err != nil || r.Entries != 4 || r.Torn != 0 {
				t.Errorf("report = %+v, %v, want 4 entries", r, err)
			}
		})
	}
}

// A signer that signs something else than it was asked for is not believed.
func TestSignerIsHeldToItsRoot(t *testing.T) {
	k := newTestKey(t)
	l := create(t, filepath.Join(t.TempDir(), "audit"), audit.Options{})
	s := k.signer(t, l.ID())
	right := s.Sign
	s.Sign = func(size uint64, root [32]byte) ([]byte, error) { return right(size+1, root) }
	if err := l.SignWith(s); err != nil {
		t.Fatal(err)
	}
	wantBlocked(t, l, nil, release(0))
}

// fastDir is a directory in memory, where there is one, for what syncs often.
func fastDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "audit")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// What is changed of a signed log with all checksums made to fit does not fit the
// signature. TestEveryByte changes bytes without.
func TestSignedFlips(t *testing.T) {
	k := newTestKey(t)
	s := makeSigned(t, k)
	offsets := make(chan int)
	var wg sync.WaitGroup
	for range 32 { // most of the time goes into looking again for what a writer may add
		dir := fastDir(t)
		wg.Go(func() {
			for at := range offsets {
				checkSignedFlip(t, dir, k, s, at)
			}
		})
	}
	for at := range s.file {
		offsets <- at
	}
	close(offsets)
	wg.Wait()
}

func checkSignedFlip(t *testing.T, dir string, k *testKey, s sample, at int) {
	b := bytes.Clone(s.file)
	b[at] ^= 0x21
	put := func(b []byte) {
		if err := os.WriteFile(filepath.Join(dir, "audit.log"), b, 0o600); err != nil {
			t.Error(err)
		}
	}
	sealed := reseal(b)
	if bytes.Equal(sealed, s.file) {
		return // it was a checksum
	}
	// A changed length can make the rest look as if it never arrived.
	put(sealed)
	if r, err := verifySigned(dir, k); err == nil && r.Entries == 20 {
		t.Errorf("byte %d, resealed: Verify says nothing", at)
	}
}

// A log is cut, or stops to arrive, at every byte of its last signed batch:
// exactly what was acknowledged is there, with its checkpoint, and it goes on.
func TestSignedTornTail(t *testing.T) {
	k := newTestKey(t)
	s := makeSigned(t, k)
	last := len(s.ends) - 1
	dir := fastDir(t)
	for cut := s.ends[last-1]; cut < s.ends[last]; cut++ {
		for _, room := range []int{0, 1000} {
			b := append(bytes.Clone(s.file[:cut]), make([]byte, room)...)
			store(t, dir, b)
			l, err := audit.Open(dir, audit.Options{Reserve: 1})
			if err != nil {
				t.Fatalf("cut at %d: %v", cut, err)
			}
			signWith(t, l, k)
			c, err := checkpoint.Verify(l.Checkpoint(), k.key.Public())
			if size := uint64(s.sizes[last-1]); err != nil || l.Size() != size || c.Size != size || c.Root != l.Root() {
				t.Errorf("cut at %d: %d entries, checkpoint %+v, %v, want %d", cut, l.Size(), c, err, size)
			}
			if cut%16 == 0 {
				appendTo(t, l, release(1))
			}
			shut(t, l)
			if r, err := verifySigned(dir, k); err != nil || r.Torn != 0 {
				t.Errorf("cut at %d: report = %+v, %v", cut, r, err)
			}
		}
	}
}

// What a key of somebody else has signed, and what nobody has, is found.
func TestForgedCheckpoints(t *testing.T) {
	k, other := newTestKey(t), newTestKey(t)
	s := makeSigned(t, k)
	id := [16]byte(s.file[12:28])
	n := len(s.ends) - 1
	dir := fastDir(t)
	wantDamage := func(name string, b []byte, index int) {
		t.Helper()
		store(t, dir, b)
		var damage *audit.DamageError
		if _, err := verifySigned(dir, k); !errors.As(err, &damage) || damage.Index != uint64(index) {
			t.Errorf("%s: Verify says %v, want damage at entry %d", name, err, index)
		}
	}
	// grow opens the log of b and lets somebody else append to it.
	grow := func(b []byte, key *testKey) []byte {
		t.Helper()
		store(t, dir, b)
		l, err := audit.Open(dir, audit.Options{Reserve: 1})
		if err != nil {
			t.Fatal(err)
		}
		if key != nil {
			forger := key.signer(t, id)
			forger.Check = func([]byte) error { return nil }
			if err := l.SignWith(forger); err != nil {
				t.Fatal(err)
			}
		}
		appendTo(t, l, release(77))
		end := l.Stats().Bytes
		shut(t, l)
		return load(t, dir)[:end]
	}
	store(t, dir, s.file)
	if _, err := verifySigned(dir, other); !errors.Is(err, checkpoint.ErrSignature) {
		t.Errorf("another key: Verify says %v, want ErrSignature", err)
	}
	forged := grow(s.file, other)
	wantDamage("a batch that somebody else signed", forged, 20)
	if l := open(t, dir, audit.Options{}); l.SignWith(k.signer(t, id)) == nil {
		t.Error("SignWith goes on with what somebody else signed")
	} else {
		wantBlocked(t, l, nil, release(78))
		shut(t, l)
	}

	// The end is cut off and written anew, with the old checkpoints' help.
	shorter := grow(s.file[:s.ends[n-1]], other)
	wantDamage("the last batch replaced", shorter, s.sizes[n-1])
	store(t, dir, s.file[:64])
	l := open(t, dir, audit.Options{Reserve: 1})
	appendTo(t, l, release(0))
	end := l.Stats().Bytes
	shut(t, l)
	unsigned := load(t, dir)[64:end]
	moved := bytes.Clone(append(bytes.Clone(s.file), unsigned...))
	moved[len(s.file)+16+7] = 20 // the first index, so that it fits
	wantDamage("a batch that is not signed", reseal(moved), 20)

	twin := makeSigned(t, k)
	for i := 1; i <= n; i++ {
		splice := reseal(append(bytes.Clone(s.file[:s.ends[i-1]]), twin.file[twin.ends[i-1]:]...))
		wantDamage("another log of the same key", splice, s.sizes[i-1])
	}
}

// A log whose checkpoints an independent implementation has signed is accepted.
func TestSignedByNote(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	l := create(t, dir, small)
	origin := checkpoint.NamedOrigin("logs.example/audit", l.ID())
	skey, vkey, err := note.GenerateKey(rand.Reader, origin)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := note.NewSigner(skey)
	if err != nil {
		t.Fatal(err)
	}
	verifier, err := note.NewVerifier(vkey)
	if err != nil {
		t.Fatal(err)
	}
	check := func(signed []byte) error {
		_, err := checkpoint.Open(signed, verifier)
		return err
	}
	theirs := audit.Signer{Check: check, Sign: func(size uint64, root [32]byte) ([]byte, error) {
		return note.Sign(&note.Note{Text: checkpoint.Checkpoint{Origin: origin, Size: size, Root: root}.Text()}, signer)
	}}
	if err := l.SignWith(theirs); err != nil {
		t.Fatal(err)
	}
	fill(t, l, 0, 40)
	shut(t, l)
	r, err := audit.Verify(context.Background(), dir, audit.VerifyOptions{Check: check})
	if err != nil || r.Entries != 40 || r.Segments < 2 || r.Unsigned != 0 {
		t.Errorf("report = %+v, %v", r, err)
	}
	// Who signs under another name has not signed this log.
	l = open(t, dir, small)
	other := newTestKey(t)
	s := other.signer(t, l.ID())
	s.Check = check
	if err := l.SignWith(s); err != nil {
		t.Fatal(err)
	}
	wantBlocked(t, l, nil, release(0))
}
