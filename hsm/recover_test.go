package hsm_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/keycustody/custodian/hsm"
	"github.com/keycustody/custodian/softhsm"
)

func verify(public crypto.PublicKey, digest, sig []byte) bool {
	if k, ok := public.(ed25519.PublicKey); ok {
		return ed25519.Verify(k, digest, sig)
	}
	k, ok := public.(*ecdsa.PublicKey)
	return ok && ecdsa.VerifyASN1(k, digest, sig)
}

// tokenDir is where softhsm.Test keeps the token of a config.
func tokenDir(c hsm.Config) string { return filepath.Join(filepath.Dir(c.PINFile), "tokens") }

func TestTokenTakenAwayAndPutBack(t *testing.T) {
	c := softhsm.Test(t)
	tok := open(t, c)
	m := newMEK(t, tok, "mek-v1", hsm.Sealed)
	canary, err := m.NewCanary(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_, w := newKey(t, m, hsm.UseGCM)
	id := randomID(t)
	if err := tok.GenerateSigner(t.Context(), "audit-v1", id); err != nil {
		t.Fatal(err)
	}
	signer, err := tok.Signer(t.Context(), "audit-v1", id)
	if err != nil {
		t.Fatal(err)
	}

	dir := tokenDir(c)
	if err := os.Rename(dir, dir+".away"); err != nil {
		t.Fatal(err)
	}
	wantErr(t, "health without the token", tok.Health(within(t, 5*time.Second)), hsm.ErrDevice)
	_, err = m.Load(within(t, 5*time.Second), hsm.UseGCM, []byte("movies/1"), w)
	wantErr(t, "load without the token", err, hsm.ErrDevice)
	_, err = tok.OpenMEK(within(t, 5*time.Second), "mek-v1", m.ID())
	wantErr(t, "open MEK without the token", err, hsm.ErrDevice)
	if errors.Is(err, hsm.ErrNotFound) {
		t.Error("a token that is not there was reported as a key that is not there")
	}

	if err := os.Rename(dir+".away", dir); err != nil {
		t.Fatal(err)
	}
	if err := tok.Health(within(t, 10*time.Second)); err != nil {
		t.Fatal(err)
	}
	k, err := m.Load(t.Context(), hsm.UseGCM, []byte("movies/1"), w)
	if err != nil {
		t.Fatal(err)
	}
	seal(t, k)
	if err := m.CheckCanary(t.Context(), canary); err != nil {
		t.Error(err)
	}
	digest := sha256.Sum256([]byte("checkpoint"))
	if sig, err := signer.Sign(nil, digest[:], crypto.SHA256); err != nil || !verify(signer.Public(), digest[:], sig) {
		t.Errorf("sign after the token came back: %v", err)
	}
}

// Without Health in between: the first operation that needs the token finds
// out, and one after it came back works.
func TestTokenAwayWithoutHealth(t *testing.T) {
	c := softhsm.Test(t)
	tok := open(t, c)
	m := newMEK(t, tok, "mek-v1", hsm.Sealed)
	_, w := newKey(t, m, hsm.UseGCM)
	dir := tokenDir(c)
	if err := os.Rename(dir, dir+".away"); err != nil {
		t.Fatal(err)
	}
	_, err := m.Load(within(t, 5*time.Second), hsm.UseGCM, []byte("movies/1"), w)
	wantErr(t, "load without the token", err, hsm.ErrDevice)
	if err := os.Rename(dir+".away", dir); err != nil {
		t.Fatal(err)
	}
	eventually(t, "load with the token back", func() bool {
		_, err := m.Load(t.Context(), hsm.UseGCM, []byte("movies/1"), w)
		return err == nil
	})
}

// initToken makes a token with the PINs of the config from another process,
// after it deleted the one that is there if it is told to.
func initToken(t *testing.T, c hsm.Config, label string, replace bool) {
	t.Helper()
	util, err := exec.LookPath("softhsm2-util")
	if err != nil {
		t.Skip("softhsm2-util is not installed:", err)
	}
	so, err := os.ReadFile(filepath.Join(filepath.Dir(c.PINFile), "test.so-pin"))
	if err != nil {
		t.Fatal(err)
	}
	pin, err := os.ReadFile(c.PINFile)
	if err != nil {
		t.Fatal(err)
	}
	commands := [][]string{{"--init-token", "--free", "--label", label, "--so-pin", string(so), "--pin", string(pin)}}
	if replace {
		commands = append([][]string{{"--delete-token", "--token", label}}, commands...)
	}
	for _, args := range commands {
		if out, err := exec.Command(util, args...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %s", args[0], out)
		}
	}
}

func TestTokenReinitialisedByAnotherProcess(t *testing.T) {
	c := softhsm.Test(t)
	tok := open(t, c)
	m := newMEK(t, tok, "mek-v1", hsm.Sealed)
	_, w := newKey(t, m, hsm.UseGCM)
	serial := tok.Info().Serial
	initToken(t, c, "test", true)
	err := tok.Health(within(t, 5*time.Second))
	wantErr(t, "health", err, hsm.ErrDevice)
	if err == nil || !strings.Contains(err.Error(), "re-initialised") || !strings.Contains(err.Error(), serial) {
		t.Errorf("error does not tell the story: %v", err)
	}
	_, err = m.Load(within(t, 5*time.Second), hsm.UseGCM, []byte("movies/1"), w)
	wantErr(t, "load", err, hsm.ErrDevice)
	if err := tok.GenerateMEK(within(t, 5*time.Second), hsm.MEKSpec{Label: "mek-v2", ID: randomID(t), Profile: hsm.Sealed}); !errors.Is(err, hsm.ErrDevice) {
		t.Errorf("generate in another token: %v, want %v", err, hsm.ErrDevice)
	}
}

// SoftHSM does not authenticate its files: a changed byte gives another key
// under the same name, and nothing but the canary tells.
func TestCanaryDetectsAChangedMEK(t *testing.T) {
	c := softhsm.Test(t)
	tok, err := hsm.Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	m := newMEK(t, tok, "mek-v1", hsm.Sealed)
	canary, err := m.NewCanary(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_, w := newKey(t, m, hsm.UseGCM)
	closeToken(t, tok)
	flipValue(t, tokenDir(c))

	tok = open(t, c)
	m, err = tok.OpenMEK(t.Context(), "mek-v1", m.ID())
	if err != nil {
		t.Fatalf("the change did not only touch the value: %v", err)
	}
	wantErr(t, "canary", m.CheckCanary(t.Context(), canary), hsm.ErrWrongKey)
	_, err = m.Load(t.Context(), hsm.UseGCM, []byte("movies/1"), w)
	wantErr(t, "load", err, hsm.ErrAuth)
}

// flipValue changes a byte of CKA_VALUE in the one key's file: an attribute is
// its type, its kind and its length in big endian, then the (encrypted) bytes.
func flipValue(t *testing.T, dir string) {
	t.Helper()
	value := binary.BigEndian.AppendUint64(nil, 0x11)
	flipped := 0
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, ".object") || d.Name() == "token.object" {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		at := bytes.Index(b, value)
		if at < 0 {
			return nil
		}
		// The last block of CBC: the IV and the padding stay right.
		b[at+24+16+3] ^= 1
		flipped++
		return os.WriteFile(path, b, 0o600)
	})
	if err != nil || flipped != 1 {
		t.Fatalf("%d values changed, want 1: %v", flipped, err)
	}
}

// Another key under the label and ID of the MEK after a reconnect is found out
// by the canary that the MEK saw before.
func TestReconnectChecksTheCanaryAgain(t *testing.T) {
	c, f := faulty(t)
	tok := open(t, c)
	m := newMEK(t, tok, "mek-v1", hsm.Sealed)
	if _, err := m.NewCanary(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got, want := m.Checked(), hsm.Epoch(1); got != want {
		t.Errorf("checked in epoch %d, want %d", got, want)
	}
	f.Hang("C_Finalize") // holds the reconnect until the file is changed
	f.Fail("C_GenerateRandom", 0x32, 1)
	go func() { _ = tok.Random(t.Context(), make([]byte, 8)) }()
	eventually(t, "reconnect", func() bool { return f.Hanging("C_Finalize") == 1 })
	flipValue(t, tokenDir(c))
	f.Resume("C_Finalize")
	if err := tok.Health(within(t, 10*time.Second)); err != nil {
		t.Fatal(err)
	}
	_, err := m.Generate(t.Context(), hsm.UseGCM, nil)
	wantErr(t, "generate under another MEK", err, hsm.ErrWrongKey)
}

// What somebody else in the process can do to the connection. The next
// operations find out, and everything works again without a restart.
func TestConnectionHarmedFromOutside(t *testing.T) {
	for _, row := range []struct {
		name string
		harm func(raw) error
	}{
		{"logged out", func(r raw) error { return r.Logout(r.session) }},
		{"all sessions closed", func(r raw) error {
			info, err := r.GetSessionInfo(r.session)
			if err != nil {
				return err
			}
			return r.CloseAllSessions(info.SlotID)
		}},
		{"finalised", func(r raw) error { return r.Finalize() }},
	} {
		t.Run(row.name, func(t *testing.T) {
			c := softhsm.Test(t)
			tok := open(t, c)
			m := newMEK(t, tok, "mek-v1", hsm.Sealed)
			k, w := newKey(t, m, hsm.UseGCM)
			s := seal(t, k)
			id := randomID(t)
			if err := tok.GenerateSigner(t.Context(), "audit-v1", id); err != nil {
				t.Fatal(err)
			}
			signer, err := tok.Signer(t.Context(), "audit-v1", id)
			if err != nil {
				t.Fatal(err)
			}
			if err := row.harm(openRaw(t, c)); err != nil {
				t.Fatal(err)
			}
			err = s.open(t.Context())
			if !errors.Is(err, hsm.ErrStale) && !errors.Is(err, hsm.ErrDevice) {
				t.Errorf("open with the old key: %v, want %v or %v", err, hsm.ErrStale, hsm.ErrDevice)
			}
			again, err := m.Load(t.Context(), hsm.UseGCM, []byte("movies/1"), w)
			if err != nil {
				t.Fatal(err)
			}
			s.key = again
			if err := s.open(t.Context()); err != nil {
				t.Error(err)
			}
			digest := sha256.Sum256(nil)
			if sig, err := signer.Sign(nil, digest[:], crypto.SHA256); err != nil || !verify(signer.Public(), digest[:], sig) {
				t.Errorf("sign: %v", err)
			}
			if got, want := tok.Epoch(), hsm.Epoch(2); got != want {
				t.Errorf("epoch %d, want %d", got, want)
			}
		})
	}
}

// A MEK that somebody destroyed is not found, but only after a new connection
// has shown that the token itself is the right one.
func TestMEKDestroyedFromOutside(t *testing.T) {
	c := softhsm.Test(t)
	tok := open(t, c)
	m := newMEK(t, tok, "mek-v1", hsm.Sealed)
	_, w := newKey(t, m, hsm.UseGCM)
	r := openRaw(t, c)
	if err := r.DestroyObject(r.session, r.find(t, "mek-v1")); err != nil {
		t.Fatal(err)
	}
	_, err := m.Load(t.Context(), hsm.UseGCM, []byte("movies/1"), w)
	wantErr(t, "load", err, hsm.ErrNotFound)
	if got, want := tok.Epoch(), hsm.Epoch(2); got != want {
		t.Errorf("epoch %d, want %d", got, want)
	}
	wantErr(t, "health", tok.Health(t.Context()), nil)
}

func TestFinalisationThatFailed(t *testing.T) {
	c, f := faulty(t)
	tok := open(t, c)
	f.Fail("C_Finalize", 0x6, 1)
	f.Fail("C_GenerateRandom", 0x32, 1)
	if err := tok.Random(t.Context(), make([]byte, 8)); err != nil {
		t.Errorf("random, after a reconnect: %v", err)
	}
	if got, want := tok.Epoch(), hsm.Epoch(2); got != want {
		t.Errorf("epoch %d, want %d", got, want)
	}
}

// A MEK is destroyed by label and ID, both: what has only the one or the other is
// another key. A module that fails leaves it to be destroyed again.
func TestDestroyMEK(t *testing.T) {
	c, f := faulty(t)
	tok := open(t, c)
	spec := hsm.MEKSpec{Label: "mek-v1", ID: randomID(t), Profile: hsm.Sealed}
	wantErr(t, "generate", tok.GenerateMEK(t.Context(), spec), nil)
	newMEK(t, tok, "mek-v2", hsm.Sealed)
	wantErr(t, "another ID", tok.DestroyMEK(t.Context(), "mek-v1", randomID(t)), hsm.ErrDuplicate)
	wantErr(t, "another label", tok.DestroyMEK(t.Context(), "mek-v2", spec.ID), hsm.ErrDuplicate)
	wantErr(t, "none", tok.DestroyMEK(t.Context(), "mek-v3", randomID(t)), nil)
	count := func() int {
		t.Helper()
		objects, err := tok.Objects(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return len(objects)
	}
	f.Fail("C_DestroyObject", 0x5, 1)
	if err := tok.DestroyMEK(t.Context(), spec.Label, spec.ID); err == nil || count() != 2 {
		t.Errorf("the module does not destroy it: got %v and %d objects, want an error and 2", err, count())
	}
	f.FailAfter("C_DestroyObject", 0x5, 1)
	if err := tok.DestroyMEK(t.Context(), spec.Label, spec.ID); err == nil || count() != 1 {
		t.Errorf("the module destroys it and fails: got %v and %d objects, want an error and 1", err, count())
	}
	wantErr(t, "again", tok.DestroyMEK(t.Context(), spec.Label, spec.ID), nil)
	_, err := tok.OpenMEK(t.Context(), spec.Label, spec.ID)
	wantErr(t, "open", err, hsm.ErrNotFound)
}
