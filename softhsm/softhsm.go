// Package softhsm provisions SoftHSM 2 tokens for tests and for the development
// mode. SoftHSM keeps keys in files that are as safe as the machine: it decides
// nothing about production, where the token is made by its vendor's tools.
package softhsm

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/keycustody/custodian/hsm"
	"github.com/keycustody/custodian/internal/secret"
)

// ConfEnv is the environment variable from which SoftHSM learns where its
// configuration is, each time the module is initialised. A process can
// therefore see the tokens of one directory at a time.
const ConfEnv = "SOFTHSM2_CONF"

// ModuleEnv names the module where it is not at one of the usual places.
const ModuleEnv = "SOFTHSM2_MODULE"

// FindModule looks for the SoftHSM 2 module: where ModuleEnv says, or else
// where Linux distributions put it.
func FindModule() (string, error) {
	if path := os.Getenv(ModuleEnv); path != "" {
		if _, err := os.Stat(path); err != nil {
			return "", fmt.Errorf("SoftHSM module of %s: %w", ModuleEnv, err)
		}
		return filepath.Abs(path)
	}
	for _, pattern := range []string{
		"/usr/lib/softhsm/libsofthsm2.so",
		"/usr/lib/*/softhsm/libsofthsm2.so",
		"/usr/lib64/pkcs11/libsofthsm2.so",
		"/usr/lib64/softhsm/libsofthsm2.so",
		"/usr/local/lib/softhsm/libsofthsm2.so",
		"/opt/homebrew/lib/softhsm/libsofthsm2.so",
	} {
		found, err := filepath.Glob(pattern)
		if err == nil && len(found) > 0 {
			return found[0], nil
		}
	}
	return "", fmt.Errorf("SoftHSM module: not at the usual places, install softhsm2 or set %s", ModuleEnv)
}

// Options say where a token is made and what it is called.
type Options struct {
	Dir    string // made with mode 0700 if it is not there
	Label  string // "custodian" if empty
	Module string // found by FindModule if empty
}

// A Token is a provisioned token: its label and the files around it. PINs are
// in their files only.
type Token struct {
	Module, Label, Serial string
	PINFile, SOPINFile    string
	ConfigFile, TokenDir  string
	LatchFile             string
}

// Provision makes a token, or finds the one that it made before: nothing that
// is there is overwritten. It sets ConfEnv in this process, because the module
// is asked at once; see Env for another process.
func Provision(ctx context.Context, o Options) (Token, error) {
	if o.Label == "" {
		o.Label = "custodian"
	}
	if filepath.Base(o.Label) != o.Label {
		return Token{}, fmt.Errorf("provision: label %q: is part of file names, so no path", o.Label)
	}
	dir, err := filepath.Abs(o.Dir)
	if err != nil {
		return Token{}, fmt.Errorf("provision: %w", err)
	}
	if o.Module == "" {
		if o.Module, err = FindModule(); err != nil {
			return Token{}, err
		}
	}
	t := Token{
		Module: o.Module, Label: o.Label,
		PINFile:    filepath.Join(dir, o.Label+".pin"),
		SOPINFile:  filepath.Join(dir, o.Label+".so-pin"),
		LatchFile:  filepath.Join(dir, o.Label+".latch"),
		ConfigFile: filepath.Join(dir, "softhsm2.conf"),
		TokenDir:   filepath.Join(dir, "tokens"),
	}
	if err := t.writeFiles(); err != nil {
		return Token{}, fmt.Errorf("provision: %w", err)
	}
	if err := t.Setenv(); err != nil {
		return Token{}, fmt.Errorf("provision: %w", err)
	}
	t.Serial, err = hsm.InitToken(ctx, hsm.TokenSpec{Module: t.Module, Label: t.Label, SOPINFile: t.SOPINFile, PINFile: t.PINFile})
	if err != nil {
		return Token{}, fmt.Errorf("provision: %w", err)
	}
	return t, nil
}

func (t Token) writeFiles() error {
	if err := os.MkdirAll(t.TokenDir, 0o700); err != nil {
		return err
	}
	conf := fmt.Sprintf("directories.tokendir = %s\nobjectstore.backend = file\nlog.level = ERROR\nslots.removable = false\n", t.TokenDir)
	if err := os.WriteFile(t.ConfigFile, []byte(conf), 0o600); err != nil {
		return err
	}
	for _, path := range []string{t.PINFile, t.SOPINFile} {
		if err := writePIN(path); err != nil {
			return err
		}
	}
	return nil
}

// writePIN draws 256 random bits. SoftHSM never locks a token, and who has its
// files can try PINs offline. The file is there with all of the PIN or not at
// all.
func writePIN(path string) (err error) {
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(path+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	if err := errors.Join(writeRandomHex(f), f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// writeRandomHex writes 32 random bytes as hex, by way of locked memory.
func writeRandomHex(f *os.File) (err error) {
	a, err := secret.NewArena(96, 1)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, a.Close()) }()
	b, err := a.Get()
	if err != nil {
		return err
	}
	if _, err := rand.Read(b[:32]); err != nil {
		return err
	}
	hex.Encode(b[32:96], b[:32])
	_, err = f.Write(b[32:96])
	return err
}

// Setenv points this process at the token's directory.
func (t Token) Setenv() error { return os.Setenv(ConfEnv, t.ConfigFile) }

// Env is what another process needs in its environment to see the token.
func (t Token) Env() []string { return []string{ConfEnv + "=" + t.ConfigFile} }

// Config opens the token.
func (t Token) Config() hsm.Config {
	return hsm.Config{Module: t.Module, Token: t.Label, PINFile: t.PINFile, LatchFile: t.LatchFile}
}

// A T is the part of testing.TB that Test uses.
type T interface {
	Helper()
	TempDir() string
	Context() context.Context
	Fatal(args ...any)
}

// Test provisions a token for one test and returns what opens it. Tests that do
// so in one process cannot run in parallel.
func Test(t T) hsm.Config {
	t.Helper()
	token, err := Provision(t.Context(), Options{Dir: t.TempDir(), Label: "test"})
	if err != nil {
		t.Fatal(err)
	}
	return token.Config()
}
