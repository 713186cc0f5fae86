package custodian_test

import (
	"bytes"
	"crypto"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/custodian/custodiantest"
	"github.com/keycustody/custodian/internal/audit"
	"github.com/keycustody/custodian/internal/checkpoint"
)

// auditSigner is the token's key for checkpoints.
func (w *world) auditSigner() crypto.Signer {
	w.t.Helper()
	objects, err := w.hsm.Objects(w.t.Context())
	if err != nil {
		w.t.Fatal(err)
	}
	for _, o := range objects {
		if o.Label != "mek-audit-v1" {
			continue
		}
		s, err := w.hsm.Signer(w.t.Context(), o.Label, [16]byte(o.ID))
		if err != nil {
			w.t.Fatal(err)
		}
		return s
	}
	w.t.Fatal("the token has no audit signing key")
	return nil
}

// Every receipt has a checkpoint that the token signed and that covers its
// entry, from the entry of init on.
func TestReceiptsAreSigned(t *testing.T) {
	w := newWorld(t)
	key := w.auditSigner().Public()
	w.category("movies")
	keys := w.issue("movies", "film-1", "SD", "HD")
	for _, k := range keys {
		c, err := checkpoint.Verify(k.Receipt.Checkpoint, key)
		if err != nil || c.Origin != checkpoint.Origin(w.log.ID()) || c.Size <= k.Receipt.Index {
			t.Errorf("issue: checkpoint %+v for entry %d: %v", c, k.Receipt.Index, err)
		}
	}
	r := w.retrieve(provider, keys[0].KID)
	r.Key.Destroy()
	if c, err := checkpoint.Verify(r.Receipt.Checkpoint, key); err != nil || c.Size != r.Receipt.Index+1 || c.Root != w.log.Root() {
		t.Errorf("release: checkpoint %+v for entry %d: %v", c, r.Receipt.Index, err)
	}
	w.reopen()
	rep, err := audit.Verify(t.Context(), w.auditDir(), audit.VerifyOptions{Check: func(signed []byte) error {
		_, err := checkpoint.Verify(signed, key)
		return err
	}})
	if err != nil || rep.Unsigned != 1 { // init.begin, before there was a key
		t.Errorf("%d entries are unsigned, %v, want 1", rep.Unsigned, err)
	}
}

// A log whose end somebody else has signed is not gone on with.
func TestForeignCheckpoint(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	w.close()
	path := filepath.Join(w.auditDir(), "audit.log")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	other := newWorld(t)
	forged := other.auditSigner()
	origin := checkpoint.Origin([16]byte(b[12:28]))
	log, err := audit.Open(w.auditDir(), audit.Options{})
	if err != nil {
		t.Fatal(err)
	}
	signer, err := checkpoint.NewSigner(origin, forged)
	if err != nil {
		t.Fatal(err)
	}
	if err := log.SignWith(audit.Signer{
		Sign: func(size uint64, root [32]byte) ([]byte, error) {
			return checkpoint.Checkpoint{Origin: origin, Size: size, Root: root}.Sign(signer)
		},
		Check: func([]byte) error { return nil },
	}); err != nil {
		t.Fatal(err)
	}
	if _, err := log.Append(t.Context(), []audit.Entry{{Action: "release", Outcome: audit.Allowed}}); err != nil {
		t.Fatal(err)
	}
	if err := log.Close(); err != nil {
		t.Fatal(err)
	}
	err = w.open()
	var damage *audit.DamageError
	if !errors.Is(err, custodian.ErrLogRollback) || !errors.As(err, &damage) {
		t.Errorf("Open = %v, want a *audit.DamageError and ErrLogRollback", err)
	}
	w.close()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	w.reopen()
	if got, err := os.ReadFile(path); err != nil || !bytes.HasPrefix(got, b[:64]) {
		t.Errorf("the log is another one: %v", err)
	}
}

// What the token does not sign, or does not say that it signed, is not
// released. It goes on by itself.
func TestSigningFails(t *testing.T) {
	broken := errors.New("broken")
	for name, tt := range map[string]struct {
		fail func(h *custodiantest.HSM)
		want error
	}{
		"before":   {func(h *custodiantest.HSM) { h.Fail("Sign", broken, 1) }, custodian.ErrAuditBlocked},
		"after":    {func(h *custodiantest.HSM) { h.FailAfter("Sign", broken, 1) }, custodian.ErrAuditBlocked},
		"no token": {func(h *custodiantest.HSM) { h.Fail("Sign", custodian.ErrHSMUnavailable, 1) }, custodian.ErrHSMUnavailable},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.category("movies")
			kid := w.issue("movies", "film-1", "SD")[0].KID
			size := w.log.Size()
			tt.fail(w.hsm)
			if err := w.release(provider, kid); !errors.Is(err, tt.want) {
				t.Errorf("release = %v, want %v", err, tt.want)
			}
			if err := w.c.Ready(t.Context()); !errors.Is(err, custodian.ErrAuditBlocked) {
				t.Errorf("Ready = %v, want ErrAuditBlocked", err)
			}
			w.noneInClear()
			if got := w.log.Size(); got != size {
				t.Errorf("%d entries, want %d", got, size)
			}
			for deadline := time.Now().Add(10 * time.Second); w.c.Ready(t.Context()) != nil; time.Sleep(50 * time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatal("it is still not ready after 10 s")
				}
			}
			if err := w.release(provider, kid); err != nil {
				t.Errorf("release after it = %v", err)
			}
			w.whole()
		})
	}
}
