package softhsm_test

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/keycustody/custodian/hsm"
	"github.com/keycustody/custodian/softhsm"
	"github.com/keycustody/custodian/softhsm/fault"
)

func provision(t *testing.T, dir, label string) softhsm.Token {
	t.Helper()
	tok, err := softhsm.Provision(t.Context(), softhsm.Options{Dir: dir, Label: label})
	if err != nil {
		t.Fatal(err)
	}
	return tok
}

func TestProvisionTwiceIsOneToken(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "dev")
	first := provision(t, dir, "movies")
	pin, err := os.ReadFile(first.PINFile)
	if err != nil {
		t.Fatal(err)
	}
	second := provision(t, dir, "movies")
	if first != second {
		t.Errorf("provisioned %+v, then %+v", first, second)
	}
	again, err := os.ReadFile(second.PINFile)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(pin, again) {
		t.Error("the PIN was changed")
	}
	if got, want := len(pin), 64; got != want {
		t.Errorf("PIN of %d characters, want %d", got, want)
	}
	tok, err := hsm.Open(t.Context(), second.Config())
	if err != nil {
		t.Fatal(err)
	}
	if got, want := tok.Info().Serial, first.Serial; got != want {
		t.Errorf("opened serial %s, want %s", got, want)
	}
	if err := tok.Close(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestTwoTokensInOneDirectory(t *testing.T) {
	dir := t.TempDir()
	a, b := provision(t, dir, "movies"), provision(t, dir, "series")
	if a.Serial == b.Serial {
		t.Fatalf("both have serial %s", a.Serial)
	}
	pins := map[string]bool{}
	for _, path := range []string{a.PINFile, a.SOPINFile, b.PINFile, b.SOPINFile} {
		pin, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		pins[string(pin)] = true
	}
	if got, want := len(pins), 4; got != want {
		t.Errorf("%d different PINs, want %d", got, want)
	}
	for _, token := range []softhsm.Token{a, b} {
		tok, err := hsm.Open(t.Context(), token.Config())
		if err != nil {
			t.Fatal(err)
		}
		if got, want := tok.Info().Serial, token.Serial; got != want {
			t.Errorf("%s: serial %s, want %s", token.Label, got, want)
		}
		if err := tok.Close(t.Context()); err != nil {
			t.Error(err)
		}
	}
}

func TestOthersCannotRead(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "dev")
	provision(t, dir, "movies")
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if mode := info.Mode().Perm(); mode&0o077 != 0 {
			t.Errorf("%s has mode %04o", path, mode)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// A crash between the token and its user PIN is finished by the next run.
func TestUserPINIsMadeUp(t *testing.T) {
	dir := t.TempDir()
	module, err := softhsm.FindModule()
	if err != nil {
		t.Fatal(err)
	}
	f := fault.Build(t, module)
	f.Fail("C_InitPIN", 0x30, 1)
	o := softhsm.Options{Dir: dir, Label: "movies", Module: f.Module}
	if _, err := softhsm.Provision(t.Context(), o); err == nil {
		t.Fatal("provisioned without a user PIN")
	}
	token, err := softhsm.Provision(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := f.Calls("C_InitToken"), 1; got != want {
		t.Errorf("%d tokens made, want %d", got, want)
	}
	tok, err := hsm.Open(t.Context(), token.Config())
	if err != nil {
		t.Fatal(err)
	}
	if err := tok.Close(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestProvisionRefusesAnOpenModule(t *testing.T) {
	c := softhsm.Test(t)
	tok, err := hsm.Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := softhsm.Provision(t.Context(), softhsm.Options{Dir: t.TempDir(), Label: "other"}); err == nil {
		t.Error("provisioned under an open token")
	}
	if err := tok.Close(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestFindModule(t *testing.T) {
	t.Setenv(softhsm.ModuleEnv, filepath.Join(t.TempDir(), "none.so"))
	if _, err := softhsm.FindModule(); err == nil || !strings.Contains(err.Error(), softhsm.ModuleEnv) {
		t.Errorf("a module that is not there: %v, want an error that names %s", err, softhsm.ModuleEnv)
	}
	t.Setenv(softhsm.ModuleEnv, "")
	path, err := softhsm.FindModule()
	if err != nil {
		t.Fatal(err)
	}
	if p := pkcs11.New(path); p == nil {
		t.Errorf("%s does not load", path)
	}
}
