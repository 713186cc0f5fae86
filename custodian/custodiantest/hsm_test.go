package custodiantest_test

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"testing"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/custodian/custodiantest"
)

func TestHSM(t *testing.T) {
	custodiantest.TestHSM(t, func(*testing.T) custodian.HSM { return custodiantest.NewHSM() })
}

// The examples of AES-256-CMAC in NIST SP 800-38B.
func TestCMACKnownAnswers(t *testing.T) {
	key := fromHex(t, "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
	msg := fromHex(t, "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e5130c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710")
	for _, test := range []struct {
		size int
		want string
	}{
		{0, "028962f61b7bf89efc6b551f4667d983"},
		{16, "28a7023f452e8f82bd4bf28d8c37c35c"},
		{40, "aaf3d8f1de5640c232f5b169b9c911e6"},
		{64, "e1992190549f6ed5696a2c056c315410"},
	} {
		got := custodiantest.CMAC(key, msg[:test.size])
		if hex.EncodeToString(got[:]) != test.want {
			t.Errorf("cmac of %d bytes: got %x, want %s", test.size, got, test.want)
		}
	}
}

func TestFail(t *testing.T) {
	h := custodiantest.NewHSM()
	h.Fail("Health", custodian.ErrHSMUnavailable, 2)
	for i, want := range []error{custodian.ErrHSMUnavailable, custodian.ErrHSMUnavailable, nil} {
		if got := h.Health(t.Context()); !errors.Is(got, want) {
			t.Errorf("call %d: got %v, want %v", i, got, want)
		}
	}
	if got, want := h.Count("Health"), 3; got != want {
		t.Errorf("count: got %d, want %d", got, want)
	}
}

func TestFailAfter(t *testing.T) {
	h := custodiantest.NewHSM()
	m := custodian.MEK{Label: "mek-v1", Profile: custodian.ProfileSealed}
	rand.Read(m.ID[:])
	h.Fail("GenerateMEK", custodian.ErrHSMUnavailable, 1)
	h.FailAfter("GenerateMEK", custodian.ErrHSMUnavailable, 1)
	for i, want := range []int{0, 1} {
		if err := h.GenerateMEK(t.Context(), m); !errors.Is(err, custodian.ErrHSMUnavailable) {
			t.Errorf("call %d: got %v, want %v", i, err, custodian.ErrHSMUnavailable)
		}
		objects, err := h.Objects(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if got := len(objects); got != want {
			t.Errorf("objects after call %d: got %d, want %d", i, got, want)
		}
	}
}

func TestReconnectMakesKeysStale(t *testing.T) {
	h := custodiantest.NewHSM()
	m := custodiantest.NewMEK(t, h)
	inner, canary, err := h.GenerateKey(t.Context(), m, custodian.UseMAC, []byte("record/1"))
	if err != nil {
		t.Fatal(err)
	}
	k, err := h.LoadKey(t.Context(), m, custodian.UseMAC, []byte("record/1"), inner, canary)
	if err != nil {
		t.Fatal(err)
	}
	h.Reconnect()
	if _, err := k.CMAC(t.Context(), nil); !errors.Is(err, custodian.ErrStaleKey) {
		t.Errorf("cmac after a reconnect: got %v, want %v", err, custodian.ErrStaleKey)
	}
	if _, err := h.LoadKey(t.Context(), m, custodian.UseMAC, []byte("record/1"), inner, canary); err != nil {
		t.Errorf("load after a reconnect: %v", err)
	}
}

func TestReplaceMEK(t *testing.T) {
	h := custodiantest.NewHSM()
	m := custodiantest.NewMEK(t, h)
	h.ReplaceMEK(m.Label, m.ID)
	if err := h.CheckMEK(t.Context(), m); !errors.Is(err, custodian.ErrWrongMEK) {
		t.Errorf("check a replaced mek: got %v, want %v", err, custodian.ErrWrongMEK)
	}
	h.RemoveMEK(m.Label, m.ID)
	if err := h.CheckMEK(t.Context(), m); !errors.Is(err, custodian.ErrNoObject) {
		t.Errorf("check a removed mek: got %v, want %v", err, custodian.ErrNoObject)
	}
}

func TestAddObject(t *testing.T) {
	h := custodiantest.NewHSM()
	want := custodian.TokenObject{Class: "secret key", Label: "stranger", ID: []byte{1}}
	h.AddObject(want)
	objects, err := h.Objects(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(objects) != 1 || objects[0].Label != want.Label || !bytes.Equal(objects[0].ID, want.ID) {
		t.Errorf("objects: got %v, want %v", objects, want)
	}
}

func fromHex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
