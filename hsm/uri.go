package hsm

import (
	"encoding/hex"
	"fmt"
	"strings"
	"unicode/utf8"
)

const uriScheme = "pkcs11:"

// A URI names a module, a token or an object (RFC 7512). An empty field says
// nothing about that attribute. PINs have no place in it: pin-value is refused.
type URI struct {
	Token, Manufacturer, Serial, Model                      string
	LibraryManufacturer, LibraryDescription, LibraryVersion string
	SlotManufacturer, SlotDescription, SlotID               string
	Object                                                  string
	Type                                                    string // "public", "private", "cert", "secret-key" or "data"
	ID                                                      []byte
	PINSource, ModuleName, ModulePath                       string
}

// A uriField joins the name of an attribute with its place in a URI.
type uriField struct {
	name  string
	value func(*URI) *string
}

var uriPath = []uriField{
	{"token", func(u *URI) *string { return &u.Token }},
	{"manufacturer", func(u *URI) *string { return &u.Manufacturer }},
	{"serial", func(u *URI) *string { return &u.Serial }},
	{"model", func(u *URI) *string { return &u.Model }},
	{"library-manufacturer", func(u *URI) *string { return &u.LibraryManufacturer }},
	{"library-description", func(u *URI) *string { return &u.LibraryDescription }},
	{"library-version", func(u *URI) *string { return &u.LibraryVersion }},
	{"slot-manufacturer", func(u *URI) *string { return &u.SlotManufacturer }},
	{"slot-description", func(u *URI) *string { return &u.SlotDescription }},
	{"slot-id", func(u *URI) *string { return &u.SlotID }},
	{"object", func(u *URI) *string { return &u.Object }},
	{"type", func(u *URI) *string { return &u.Type }},
}

var uriQuery = []uriField{
	{"pin-source", func(u *URI) *string { return &u.PINSource }},
	{"module-name", func(u *URI) *string { return &u.ModuleName }},
	{"module-path", func(u *URI) *string { return &u.ModulePath }},
}

// Characters that need no percent-encoding besides letters, digits and "-._~"
// (RFC 7512, section 2.3).
const (
	uriPathChars  = ":[]@!$'()*+,=&"
	uriQueryChars = ":[]@!$'()*+,=/?|"
)

// ParseURI reads a PKCS#11 URI strictly: an attribute that is unknown, twice or
// empty, a character that had to be encoded, and text that is not UTF-8 are
// errors. Vendor attributes are unknown ones.
func ParseURI(s string) (URI, error) {
	rest, ok := strings.CutPrefix(s, uriScheme)
	if !ok {
		return URI{}, fmt.Errorf("URI %q: does not start with %s", s, uriScheme)
	}
	var u URI
	path, query, hasQuery := strings.Cut(rest, "?")
	if err := u.parse(path, ";", uriPath, uriPathChars); err != nil {
		return URI{}, fmt.Errorf("URI %q: %w", s, err)
	}
	if hasQuery && query == "" {
		return URI{}, fmt.Errorf("URI %q: nothing after the question mark", s)
	}
	if err := u.parse(query, "&", uriQuery, uriQueryChars); err != nil {
		return URI{}, fmt.Errorf("URI %q: %w", s, err)
	}
	if err := u.check(); err != nil {
		return URI{}, fmt.Errorf("URI %q: %w", s, err)
	}
	return u, nil
}

func (u *URI) parse(s, sep string, fields []uriField, chars string) error {
	if s == "" {
		return nil
	}
	seen := map[string]bool{}
	for part := range strings.SplitSeq(s, sep) {
		name, raw, ok := strings.Cut(part, "=")
		if !ok {
			return fmt.Errorf("attribute %q: has no value", part)
		}
		if seen[name] {
			return fmt.Errorf("attribute %q: given twice", name)
		}
		seen[name] = true
		value, err := percentDecode(raw, chars)
		if err != nil {
			return fmt.Errorf("attribute %q: %w", name, err)
		}
		if err := u.set(name, value, fields); err != nil {
			return fmt.Errorf("attribute %q: %w", name, err)
		}
	}
	return nil
}

func (u *URI) set(name, value string, fields []uriField) error {
	if value == "" {
		return fmt.Errorf("is empty")
	}
	if name == "id" && fields[0].name == uriPath[0].name { // bytes, and in the path only
		u.ID = []byte(value)
		return nil
	}
	for _, f := range fields {
		if f.name != name {
			continue
		}
		if !utf8.ValidString(value) {
			return fmt.Errorf("is not UTF-8")
		}
		*f.value(u) = value
		return nil
	}
	if name == "pin-value" {
		return fmt.Errorf("a PIN does not belong into a URI")
	}
	return fmt.Errorf("not known here")
}

// check holds the values to their lengths (blank-padded fields of PKCS#11) and
// forms.
func (u *URI) check() error {
	for _, f := range []struct {
		name, value string
		max         int
	}{
		{"token", u.Token, 32}, {"manufacturer", u.Manufacturer, 32}, {"serial", u.Serial, 16}, {"model", u.Model, 16},
		{"library-manufacturer", u.LibraryManufacturer, 32}, {"library-description", u.LibraryDescription, 32},
		{"slot-manufacturer", u.SlotManufacturer, 32}, {"slot-description", u.SlotDescription, 64},
	} {
		if len(f.value) > f.max {
			return fmt.Errorf("attribute %q: longer than %d bytes", f.name, f.max)
		}
	}
	if strings.Trim(u.SlotID, "0123456789") != "" {
		return fmt.Errorf("attribute \"slot-id\": is not a number")
	}
	switch u.Type {
	case "", "public", "private", "cert", "secret-key", "data":
		return nil
	}
	return fmt.Errorf("attribute \"type\": %q is none of public, private, cert, secret-key, data", u.Type)
}

// String writes the URI in a fixed order; ParseURI reads it back.
func (u URI) String() string {
	var path, query []string
	for _, f := range uriPath {
		if v := *f.value(&u); v != "" {
			path = append(path, f.name+"="+percentEncode(v, uriPathChars))
		}
	}
	if len(u.ID) > 0 {
		path = append(path, "id=%"+strings.Join(pairs(hex.EncodeToString(u.ID)), "%"))
	}
	for _, f := range uriQuery {
		if v := *f.value(&u); v != "" {
			query = append(query, f.name+"="+percentEncode(v, uriQueryChars))
		}
	}
	s := uriScheme + strings.Join(path, ";")
	if len(query) > 0 {
		s += "?" + strings.Join(query, "&")
	}
	return s
}

func pairs(s string) []string {
	var out []string
	for ; len(s) >= 2; s = s[2:] {
		out = append(out, s[:2])
	}
	return out
}

func uriPlain(c byte, chars string) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' ||
		strings.IndexByte("-._~", c) >= 0 || strings.IndexByte(chars, c) >= 0
}

func percentDecode(s, chars string) (string, error) {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] != '%' {
			if !uriPlain(s[i], chars) {
				return "", fmt.Errorf("byte 0x%02x has to be percent-encoded", s[i])
			}
			b.WriteByte(s[i])
			continue
		}
		if i+2 >= len(s) {
			return "", fmt.Errorf("ends within a percent-encoding")
		}
		v, err := hex.DecodeString(s[i+1 : i+3])
		if err != nil {
			return "", fmt.Errorf("%q is no percent-encoding", s[i:i+3])
		}
		b.WriteByte(v[0])
		i += 2
	}
	return b.String(), nil
}

func percentEncode(s, chars string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if uriPlain(s[i], chars) {
			b.WriteByte(s[i])
			continue
		}
		fmt.Fprintf(&b, "%%%02X", s[i])
	}
	return b.String()
}

// names tells whether the URI fits a token with these properties.
func (u URI) names(label, manufacturer, serial, model string) bool {
	return (u.Token == "" || u.Token == label) && (u.Manufacturer == "" || u.Manufacturer == manufacturer) &&
		(u.Serial == "" || u.Serial == serial) && (u.Model == "" || u.Model == model)
}
