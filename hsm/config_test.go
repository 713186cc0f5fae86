package hsm_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/keycustody/custodian/hsm"
	"github.com/keycustody/custodian/softhsm"
)

func TestConfigProblems(t *testing.T) {
	_, err := hsm.Open(t.Context(), hsm.Config{Module: "lib.so", Token: "pkcs11:object=x", MaxSessions: 2})
	if err == nil {
		t.Fatal("opened")
	}
	for _, want := range []string{"module", "pin_file", "latch_file", "max_sessions", "token"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("error does not name %s: %v", want, err)
		}
	}
}

func TestPINFileIsRefused(t *testing.T) {
	c := softhsm.Test(t)
	pin, err := os.ReadFile(c.PINFile)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	file := func(name string, mode os.FileMode, content []byte) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for _, row := range []struct{ name, path, says string }{
		{"world-readable", file("world", 0o644, pin), "0644"},
		{"group-readable", file("group", 0o640, pin), "0640"},
		{"writable by others", file("others", 0o602, pin), "0602"},
		{"empty", file("empty", 0o600, nil), "1 to 255"},
		{"too long", file("long", 0o600, make([]byte, 300)), "1 to 255"},
		{"a directory", dir, "regular"},
		{"absent", filepath.Join(dir, "none"), "no such file"},
	} {
		bad := c
		bad.PINFile = row.path
		_, err := hsm.Open(t.Context(), bad)
		if err == nil || !strings.Contains(err.Error(), row.says) || !strings.Contains(err.Error(), "pin_file") {
			t.Errorf("%s: got %v, want pin_file and %q in it", row.name, err, row.says)
		}
		if _, err := os.Stat(c.LatchFile); err == nil {
			t.Fatalf("%s: left a latch without a login", row.name)
		}
	}
	// A trailing newline is not part of the PIN.
	c.PINFile = file("newline", 0o400, append(pin, '\n'))
	open(t, c)
}

func TestTokenByURI(t *testing.T) {
	c := softhsm.Test(t)
	tok := open(t, c)
	serial := tok.Info().Serial
	closeToken(t, tok)
	for _, row := range []struct {
		token string
		want  error
	}{
		{"pkcs11:token=test;serial=" + serial, nil},
		{"pkcs11:serial=" + serial, nil},
		{"pkcs11:token=test;manufacturer=SoftHSM%20project", nil},
		{"pkcs11:token=test;serial=0000000000000000", hsm.ErrDevice},
		{"pkcs11:token=test;model=other", hsm.ErrDevice},
		{"other", hsm.ErrDevice},
	} {
		c := c
		c.Token = row.token
		tok, err := hsm.Open(t.Context(), c)
		wantErr(t, row.token, err, row.want)
		if err == nil {
			closeToken(t, tok)
		}
	}
}

func TestTwoTokensWithOneLabel(t *testing.T) {
	c := softhsm.Test(t)
	tok := open(t, c)
	serial := tok.Info().Serial
	closeToken(t, tok)
	initToken(t, c, "test", false)
	_, err := hsm.Open(t.Context(), c)
	wantErr(t, "open by label", err, hsm.ErrDuplicate)
	c.Token = "pkcs11:token=test;serial=" + serial
	open(t, c)
}
