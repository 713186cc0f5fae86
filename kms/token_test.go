package kms_test

import (
	"context"
	"testing"
	"time"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/custodian/custodiantest"
	"github.com/keycustody/custodian/hsm"
	"github.com/keycustody/custodian/kms"
	"github.com/keycustody/custodian/softhsm"
)

// openToken opens a token of SoftHSM's.
func openToken(t *testing.T, c hsm.Config) *hsm.Token {
	t.Helper()
	token, err := hsm.Open(t.Context(), c)
	if err != nil {
		t.Fatalf("open token: %v", err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := token.Close(ctx); err != nil {
			t.Errorf("close token: %v", err)
		}
	})
	return token
}

func TestTokenIsAnHSM(t *testing.T) {
	token := openToken(t, softhsm.Test(t))
	custodiantest.TestHSM(t, func(*testing.T) custodian.HSM { return kms.Token(token) })
}

func TestTokenStatusAndRandom(t *testing.T) {
	config := softhsm.Test(t)
	token := openToken(t, config)
	h := kms.Token(token)
	got := h.Status()
	if got.Label != config.Token || got.Epoch == 0 || got.DefaultMEK != custodian.ProfileSealed {
		t.Errorf("status: got %+v, want label %s, an epoch and profile sealed", got, config.Token)
	}
	var long [5000]byte
	if err := h.Random(t.Context(), long[:]); err != nil {
		t.Fatalf("random: %v", err)
	}
	for i := 0; i < len(long); i += 50 {
		if [50]byte(long[i:]) == [50]byte{} {
			t.Errorf("random: bytes %d to %d are zero", i, i+50)
		}
	}
}
