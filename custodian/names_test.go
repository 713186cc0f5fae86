package custodian_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/keycustody/custodian/custodian"
)

func TestParseKID(t *testing.T) {
	want := custodian.KID{0x9e, 0xb4, 5: 0x0f, 15: 0xff}
	for _, s := range []string{want.String(), strings.ToUpper(want.String()), strings.ReplaceAll(want.String(), "-", "")} {
		if got, err := custodian.ParseKID(s); err != nil || got != want {
			t.Errorf("%q: got %s and %v, want %s", s, got, err, want)
		}
	}
	for _, s := range []string{
		"", "9eb4", want.String() + "0", want.String()[1:], strings.Repeat("g", 32), strings.Repeat("0", 32),
		"00000000-0000-0000-0000-000000000000", "9eb40000-0000f-000-0000-0000000000ff", "9eb4000000-0f-0000-0000-0000000000ff",
		strings.Repeat("-", 36), "{9eb40000-000f-0000-0000-0000000000ff}", "9eb4 000000f00000000000000000000ff", strings.Repeat("é", 16), strings.Repeat("é", 18),
	} {
		if kid, err := custodian.ParseKID(s); err == nil {
			t.Errorf("%q: got %s, want an error", s, kid)
		}
	}
	for n := range 40 {
		_, err := custodian.KIDFromBytes(append([]byte{1}, make([]byte, n)...))
		if (err == nil) != (n+1 == custodian.KIDSize) {
			t.Errorf("a KID of %d bytes: got %v", n+1, err)
		}
	}
	if _, err := custodian.KIDFromBytes(make([]byte, custodian.KIDSize)); err == nil {
		t.Error("the zero KID names a key")
	}
}

func FuzzParseKID(f *testing.F) {
	for _, s := range []string{"", "9eb40000-000f-0000-0000-0000000000ff", "9EB40000000F000000000000000000FF", "00000000000000000000000000000000"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		kid, err := custodian.ParseKID(s)
		if err != nil {
			if !kid.IsZero() {
				t.Errorf("%q: got %s beside %v", s, kid, err)
			}
			return
		}
		again, err := custodian.ParseKID(kid.String())
		if err != nil || again != kid || kid.IsZero() {
			t.Errorf("%q: got %s, and of that %s and %v", s, kid, again, err)
		}
		if !strings.EqualFold(strings.ReplaceAll(s, "-", ""), strings.ReplaceAll(kid.String(), "-", "")) {
			t.Errorf("%q: got %s", s, kid)
		}
	})
}

func TestNames(t *testing.T) {
	for _, test := range []struct {
		what string
		err  error
		ok   bool
	}{
		{"category a", custodian.CategoryName("a").Check(), true},
		{"category with all letters", custodian.CategoryName("0a.b_c-d").Check(), true},
		{"category of 64", custodian.CategoryName(strings.Repeat("x", 64)).Check(), true},
		{"category of 65", custodian.CategoryName(strings.Repeat("x", 65)).Check(), false},
		{"no category", custodian.CategoryName("").Check(), false},
		{"category with a slash", custodian.CategoryName("a/1").Check(), false},
		{"category that begins with a dot", custodian.CategoryName(".a").Check(), false},
		{"category with a line break", custodian.CategoryName("a\n").Check(), false},
		{"content of one byte", custodian.ContentID{0}.Check(), true},
		{"content of 300 bytes", custodian.ContentID(make([]byte, 300)).Check(), true},
		{"content of 301 bytes", custodian.ContentID(make([]byte, 301)).Check(), false},
		{"no content", custodian.ContentID{}.Check(), false},
		{"track of 64", custodian.TrackType(strings.Repeat("~", 64)).Check(), true},
		{"track of 65", custodian.TrackType(strings.Repeat("~", 65)).Check(), false},
		{"track with a space", custodian.TrackType("a b").Check(), false},
		{"track beyond ASCII", custodian.TrackType("ä").Check(), false},
		{"scheme cenc", custodian.Scheme("cenc").Check(), true},
		{"scheme CENC", custodian.Scheme("CENC").Check(), false},
		{"no scheme", custodian.Scheme("").Check(), false},
	} {
		if (test.err == nil) != test.ok {
			t.Errorf("%s: got %v, want good: %v", test.what, test.err, test.ok)
		}
	}
}

func TestReasonOf(t *testing.T) {
	for _, test := range []struct {
		err  error
		want custodian.Reason
	}{
		{nil, ""},
		{errors.New("else"), "INTERNAL"},
		{fmt.Errorf("content key: %w", custodian.ErrKeyNotFound), "KEY_NOT_FOUND"},
		{errors.Join(errors.New("else"), fmt.Errorf("x: %w: %w", custodian.ErrAuth, custodian.ErrRecordCorrupt)), "RECORD_CORRUPT"},
		{&custodian.InvalidError{Field: "kid", Err: errors.New("else")}, "INVALID"},
	} {
		if got := custodian.ReasonOf(test.err); got != test.want {
			t.Errorf("%v: got %q, want %q", test.err, got, test.want)
		}
	}
}
