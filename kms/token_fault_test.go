package kms_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/custodian/custodiantest"
	"github.com/keycustody/custodian/kms"
	"github.com/keycustody/custodian/softhsm"
	"github.com/keycustody/custodian/softhsm/fault"
)

// What goes wrong in a module, and what the domain hears of it.
func TestTokenFaults(t *testing.T) {
	const (
		deviceRemoved = 0x32

		notPermitted = 0x68 // CKR_KEY_FUNCTION_NOT_PERMITTED: a bug
	)
	config := softhsm.Test(t)
	module := fault.Build(t, config.Module)
	config.Module, config.CallTimeout = module.Module, 2*time.Second
	h := kms.Token(openToken(t, config))
	m := custodiantest.NewMEK(t, h)
	seal := load(t, h, m, custodian.UseSeal)
	iv, sealed, err := seal.Seal(t.Context(), nil, []byte("content key"))
	if err != nil {
		t.Fatal(err)
	}
	open := func(ctx context.Context) error {
		_, err := seal.Open(ctx, iv, nil, sealed, make([]byte, 64))
		return err
	}

	t.Run("call hangs", func(t *testing.T) {
		module.Hang("C_Decrypt")
		defer module.Reset()
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		wantMeaning(t, "open while the caller waits", open(ctx), custodian.ErrDeadline)
		module.Resume("C_Decrypt")
	})
	t.Run("key may not do it", func(t *testing.T) {
		module.Fail("C_DecryptInit", notPermitted, 1)
		defer module.Reset()
		err := open(t.Context())
		if err == nil || custodian.ReasonOf(err) != "INTERNAL" {
			t.Errorf("open: got %v, want an error that no retry mends", err)
		}
	})
	t.Run("device removed", func(t *testing.T) {
		// Every call: the token's own look at itself must not use up the fault.
		module.Fail("C_Decrypt", deviceRemoved, 1_000_000)
		module.Fail("C_Initialize", deviceRemoved, 1_000_000)
		defer module.Reset()
		wantMeaning(t, "open", open(t.Context()), custodian.ErrHSMUnavailable)
		wantMeaning(t, "health", h.Health(t.Context()), custodian.ErrHSMUnavailable)
		wantMeaning(t, "check mek", h.CheckMEK(t.Context(), m), custodian.ErrHSMUnavailable)
		_, _, err := h.GenerateKey(t.Context(), m, custodian.UseSeal, []byte("movies/2"))
		wantMeaning(t, "generate key", err, custodian.ErrHSMUnavailable)
	})
	t.Run("device back", func(t *testing.T) {
		if err := h.Health(t.Context()); err != nil {
			t.Fatalf("health: %v", err)
		}
		wantMeaning(t, "open with the old handle", open(t.Context()), custodian.ErrStaleKey)
		if err := h.CheckMEK(t.Context(), m); err != nil {
			t.Errorf("check mek: %v", err)
		}
		load(t, h, m, custodian.UseMAC)
	})
}

func load(t *testing.T, h custodian.HSM, m custodian.MEK, u custodian.KeyUse) custodian.Key {
	t.Helper()
	inner, canary, err := h.GenerateKey(t.Context(), m, u, []byte("movies/1"))
	if err != nil {
		t.Fatalf("generate key: %v", err)
	}
	k, err := h.LoadKey(t.Context(), m, u, []byte("movies/1"), inner, canary)
	if err != nil {
		t.Fatalf("load key: %v", err)
	}
	t.Cleanup(k.Release)
	return k
}

// wantMeaning wants exactly one meaning, and the token's own sentence.
func wantMeaning(t *testing.T, what string, err, want error) {
	t.Helper()
	for _, sentinel := range []error{custodian.ErrHSMUnavailable, custodian.ErrDeadline, custodian.ErrAuth, custodian.ErrStaleKey, custodian.ErrWrongMEK, custodian.ErrNoObject} {
		if got := errors.Is(err, sentinel); got != (sentinel == want) {
			t.Errorf("%s: got %v, want %v only", what, err, want)
		}
	}
	if err != nil && !strings.HasPrefix(err.Error(), "token test: ") {
		t.Errorf("%s: got %q, want a sentence about the token", what, err)
	}
}
