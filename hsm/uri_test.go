package hsm_test

import (
	"reflect"
	"testing"

	"github.com/keycustody/custodian/hsm"
)

func TestParseURI(t *testing.T) {
	for _, row := range []struct {
		uri  string
		want hsm.URI
	}{
		{"pkcs11:", hsm.URI{}},
		{"pkcs11:token=movies;serial=0123", hsm.URI{Token: "movies", Serial: "0123"}},
		{"pkcs11:token=The%20Software%20PKCS%2311%20Softtoken;manufacturer=Snake%20Oil,%20Inc.;model=1.0", hsm.URI{Token: "The Software PKCS#11 Softtoken", Manufacturer: "Snake Oil, Inc.", Model: "1.0"}},
		{"pkcs11:object=my-key;type=private;id=%69%95%3E%5C%F4", hsm.URI{Object: "my-key", Type: "private", ID: []byte("\x69\x95\x3e\x5c\xf4")}},
		{"pkcs11:slot-id=327;library-version=3;token=a&b", hsm.URI{SlotID: "327", LibraryVersion: "3", Token: "a&b"}},
		{"pkcs11:token=x?pin-source=file:/etc/token&module-path=/usr/lib/p.so", hsm.URI{Token: "x", PINSource: "file:/etc/token", ModulePath: "/usr/lib/p.so"}},
		{"pkcs11:token=%C3%A9t%C3%A9", hsm.URI{Token: "été"}},
	} {
		got, err := hsm.ParseURI(row.uri)
		if err != nil {
			t.Errorf("%s: %v", row.uri, err)
			continue
		}
		if !reflect.DeepEqual(got, row.want) {
			t.Errorf("%s: got %+v, want %+v", row.uri, got, row.want)
		}
		again, err := hsm.ParseURI(got.String())
		if err != nil || !reflect.DeepEqual(again, got) {
			t.Errorf("%s: written as %s it reads %+v, %v", row.uri, got, again, err)
		}
	}
	for _, bad := range []string{
		"", "pkcs11", "PKCS11:token=x", "http://x", "pkcs11:token", "pkcs11:token=", "pkcs11:token=a;token=b",
		"pkcs11:token=a;", "pkcs11:;token=a", "pkcs11:x-vendor=1", "pkcs11:token=a b", "pkcs11:token=a%2", "pkcs11:token=a%zz",
		"pkcs11:token=%ff", "pkcs11:type=secret", "pkcs11:slot-id=x", "pkcs11:token=a?", "pkcs11:token=a?pin-value=1234",
		"pkcs11:token=a?module-path=/a&module-path=/b", "pkcs11:token=a/b", "pkcs11:token=a#b", "pkcs11:pin-source=x", "pkcs11:?token=x", "pkcs11:?id=x",
		"pkcs11:token=123456789012345678901234567890123", "pkcs11:serial=12345678901234567",
	} {
		if got, err := hsm.ParseURI(bad); err == nil {
			t.Errorf("%q: read as %+v, want an error", bad, got)
		}
	}
}

func FuzzParseURI(f *testing.F) {
	for _, s := range []string{
		"pkcs11:token=movies;serial=0123", "pkcs11:object=k;id=%00%ff;type=cert?pin-source=file:/x", "pkcs11:token=%", "pkcs11:?module-name=a|b", "pkcs11:token=a%3Bb%25",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		u, err := hsm.ParseURI(s)
		if err != nil {
			return
		}
		again, err := hsm.ParseURI(u.String())
		if err != nil {
			t.Fatalf("%q reads, but not as it is written, %q: %v", s, u, err)
		}
		if !reflect.DeepEqual(again, u) {
			t.Fatalf("%q: got %+v, want %+v", u, again, u)
		}
	})
}
