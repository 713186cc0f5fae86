package hsm

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/keycustody/custodian/internal/secret"
)

// Config says which token to use and how. Module, Token, PINFile and LatchFile
// must be set.
type Config struct {
	// Module is the absolute path of the PKCS#11 module.
	Module string
	// Token is the token's label, or an RFC 7512 URI that names it
	// (pkcs11:token=movies;serial=0123). Slot numbers are not used: modules
	// renumber them.
	Token string
	// PINFile holds the user PIN on one line. It is refused if it is not a
	// regular file or if its group or others may touch it. It is read before
	// each login and kept nowhere.
	PINFile string
	// MaxSessions bounds the sessions that are open at once, MinSessions at
	// least; 0 takes the profile's default.
	MaxSessions int
	// LatchFile is written before each login and removed after its success. If
	// it is there, no login is tried.
	LatchFile string
	// Profile names the vendor profile; "" finds it by the manufacturer.
	Profile string
	// CallTimeout bounds every wait for the token (5 s if zero), on top of the
	// caller's context; of Key.Reseal, each of its parts.
	CallTimeout time.Duration
	// DrainTimeout bounds the wait for calls in flight before the module is
	// finalised (30 s if zero).
	DrainTimeout time.Duration
	// OnFatal is called once, with the reason, if that wait ends in vain: only
	// a restart of the process helps then. nil: nothing is called.
	OnFatal func(error)
	// Log gets connects, losses and refused logins; nil discards them.
	Log *slog.Logger
}

const (
	defaultCallTimeout  = 5 * time.Second
	defaultDrainTimeout = 30 * time.Second

	// Sessions besides the pool: the anchor, the control plane, the signing
	// worker's own, and two of crypto11.
	fixedSessions = 5
	// MinSessions is the least that Config.MaxSessions may be.
	MinSessions = fixedSessions + 1
)

// withDefaults fills in what is zero, and tells everything that is wrong.
func (c Config) withDefaults() (Config, URI, error) {
	var problems []error
	if !filepath.IsAbs(c.Module) {
		problems = append(problems, fmt.Errorf("module %q: must be an absolute path", c.Module))
	}
	if c.PINFile == "" {
		problems = append(problems, errors.New("pin_file: must be set"))
	}
	if c.LatchFile == "" {
		problems = append(problems, errors.New("latch_file: must be set"))
	}
	if c.MaxSessions != 0 && c.MaxSessions < MinSessions {
		problems = append(problems, fmt.Errorf("max_sessions %d: must be 0 or at least %d", c.MaxSessions, MinSessions))
	}
	if c.CallTimeout < 0 || c.DrainTimeout < 0 {
		problems = append(problems, errors.New("timeouts: must not be negative"))
	}
	uri, err := tokenURI(c.Token)
	if err != nil {
		problems = append(problems, err)
	}
	if c.CallTimeout == 0 {
		c.CallTimeout = defaultCallTimeout
	}
	if c.DrainTimeout == 0 {
		c.DrainTimeout = defaultDrainTimeout
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c, uri, errors.Join(problems...)
}

// tokenURI reads a label or a URI. The URI must name a token, and nothing that
// the config says in fields of its own.
func tokenURI(s string) (URI, error) {
	if !strings.HasPrefix(s, uriScheme) {
		if s == "" || len(s) > 32 {
			return URI{}, fmt.Errorf("token %q: a label has 1 to 32 bytes", s)
		}
		return URI{Token: s}, nil
	}
	u, err := ParseURI(s)
	if err != nil {
		return URI{}, fmt.Errorf("token: %w", err)
	}
	if u.Token == "" && u.Serial == "" {
		return URI{}, fmt.Errorf("token %s: a URI must name token or serial", s)
	}
	if u.Object != "" || u.ID != nil || u.Type != "" || u.PINSource != "" || u.ModulePath != "" || u.ModuleName != "" {
		return URI{}, fmt.Errorf("token %s: only attributes of a token are allowed here", s)
	}
	return u, nil
}

// maxPIN is the longest PIN in bytes.
const maxPIN = 255

// takePIN reads a PIN into a slot of the arena. Its caller calls free when it
// has logged in.
func takePIN(pins *secret.Arena, path string) (pin []byte, free func(), err error) {
	slot, err := pins.Get()
	if err != nil {
		return nil, nil, err
	}
	if pin, err = readPIN(path, slot); err != nil {
		pins.Put(slot)
		return nil, nil, err
	}
	return pin, func() { pins.Put(slot) }, nil
}

// readPIN reads a PIN into slot, which is locked memory, without a copy
// elsewhere; the result is a part of slot.
func readPIN(path string, slot []byte) ([]byte, error) {
	// Not blocking, so that a FIFO in place of the file cannot hang us.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("pin_file: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("pin_file: %w", err)
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("pin_file %s: not a regular file", path)
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return nil, fmt.Errorf("pin_file %s: mode %04o lets group or others in, want 0600", path, mode)
	}
	n, err := readFull(f, slot)
	if err != nil {
		return nil, fmt.Errorf("pin_file: %w", err)
	}
	pin := slot[:n]
	for len(pin) > 0 && (pin[len(pin)-1] == '\n' || pin[len(pin)-1] == '\r') {
		pin = pin[:len(pin)-1]
	}
	if len(pin) == 0 || len(pin) > maxPIN {
		return nil, fmt.Errorf("pin_file %s: a PIN has 1 to %d bytes on one line", path, maxPIN)
	}
	return pin, nil
}

// readFull fills b as far as the file goes.
func readFull(r io.Reader, b []byte) (int, error) {
	n, err := io.ReadFull(r, b)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return n, nil
	}
	return n, err
}
