package hsm

import (
	"fmt"
	"strings"
)

// A profile says what a module does differently from the others. It is data:
// no code asks for the name of a vendor. Numbers of mechanisms are in it
// because 0x210A is RFC 5649 in one module and something else in another; the
// self-test proves with known answers that the number is right.
type profile struct {
	name         string
	manufacturer string // start of the token's manufacturer ID, "" matches none
	kwp          uint   // mechanism that is AES key wrap with padding, RFC 5649
	valueLen     bool   // CKA_VALUE_LEN must be given when a key is unwrapped
	sessions     int    // default of Config.MaxSessions
	serial       bool   // the module does one thing at a time anyway
	trusted      bool   // a private wrapping key can be made CKA_TRUSTED
	sync         bool   // token objects are plain files that the module does not fsync
	refused      string // why the module cannot be used for now
}

// profiles is searched from the top. SoftHSM serialises, and threads that wait
// for each other in its locks cost more than goroutines that wait in ours: it
// gets one call of the pool at a time, and more sessions only for when a call
// hangs. A network module needs as many as its round trip hides.
var profiles = []profile{
	{name: "softhsm", manufacturer: "SoftHSM", kwp: ckmAESKeyWrapPad, sessions: 8, serial: true, sync: true},
	{name: "luna", manufacturer: "SafeNet", kwp: 0x80000171, valueLen: true, sessions: 32},
	{name: "nshield", manufacturer: "nCipher", kwp: ckmAESKeyWrapKWP, sessions: 32},
	{name: "nss", manufacturer: "Mozilla", kwp: ckmAESKeyWrapKWP, sessions: 8},
	{name: "cloudhsm", manufacturer: "Marvell", refused: "it draws the GCM IV itself, which is not supported yet"},
	{name: "generic", kwp: ckmAESKeyWrapKWP, sessions: 8},
	{name: "generic-v2", kwp: ckmAESKeyWrapPad, sessions: 8},
}

// chooseProfile finds the profile by the name in the config or, without one,
// by the manufacturer of the token.
func chooseProfile(name, manufacturer string) (profile, error) {
	for _, p := range profiles {
		if name == "" && (p.manufacturer == "" || !strings.HasPrefix(manufacturer, p.manufacturer)) {
			continue
		}
		if name != "" && p.name != name {
			continue
		}
		if p.refused != "" {
			return profile{}, fmt.Errorf("profile %s: %s: %w", p.name, p.refused, ErrUnfit)
		}
		return p, nil
	}
	if name != "" {
		return profile{}, fmt.Errorf("profile %q: not one of %s: %w", name, profileNames(), ErrUnfit)
	}
	return profile{}, fmt.Errorf("manufacturer %q: no profile knows it, set one of %s: %w", manufacturer, profileNames(), ErrUnfit)
}

func profileNames() string {
	var names []string
	for _, p := range profiles {
		names = append(names, p.name)
	}
	return strings.Join(names, ", ")
}
