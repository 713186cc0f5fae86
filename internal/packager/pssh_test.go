package packager_test

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/packager"
)

// known reads one entry of the known answers, which Shaka Packager 3.4.2 gave.
func known[T any](t testing.TB, name string) T {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join("testdata", "kats.json"))
	if err != nil {
		t.Fatal(err)
	}
	var all map[string]json.RawMessage
	if err := json.Unmarshal(raw, &all); err != nil {
		t.Fatal(err)
	}
	var v T
	if err := json.Unmarshal(all[name], &v); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return v
}

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func kidOf(t testing.TB, s string) custodian.KID {
	t.Helper()
	kid, err := custodian.ParseKID(s)
	if err != nil {
		t.Fatal(err)
	}
	return kid
}

type knownBoxes struct {
	Keys   string
	Scheme custodian.Scheme
	Boxes  struct{ Common, PlayReady, Widevine string } `json:"pssh_boxes_hex"`
}

func TestPSSHKnownAnswers(t *testing.T) {
	for _, name := range []string{"kav-cenc", "kav-cbcs", "kav-2keys"} {
		t.Run(name, func(t *testing.T) {
			want := known[knownBoxes](t, name)
			var kids []custodian.KID
			var first []byte
			for _, pair := range strings.Split(want.Keys, ", ") {
				kid, key, _ := strings.Cut(pair[strings.LastIndex(pair, " ")+1:], ":")
				kids = append(kids, kidOf(t, kid))
				if first == nil {
					first = unhex(t, key)
				}
			}
			sum, err := packager.PlayReadyChecksum(kids[0], first)
			if err != nil {
				t.Fatal(err)
			}
			object, err := packager.PlayReadyObject(want.Scheme, kids[0], sum)
			if err != nil {
				t.Fatal(err)
			}
			for _, c := range []struct {
				box  string
				got  []byte
				want string
			}{
				{"common", packager.CommonPSSH(kids...), want.Boxes.Common},
				{"playready", packager.PlayReadyPSSH(object), want.Boxes.PlayReady},
				{"widevine", packager.WidevinePSSH(packager.WidevineData{KIDs: kids, Scheme: want.Scheme}), want.Boxes.Widevine},
			} {
				if got := hex.EncodeToString(c.got); got != c.want {
					t.Errorf("%s:\ngot  %s\nwant %s", c.box, got, c.want)
				}
			}
		})
	}
}

func TestPlayReadyChecksum(t *testing.T) {
	for _, c := range known[[]struct {
		KID  string `json:"kid_hex"`
		Key  string `json:"key_hex"`
		Want string `json:"checksum_b64"`
	}](t, "playready_checksum") {
		got, err := packager.PlayReadyChecksum(kidOf(t, c.KID), unhex(t, c.Key))
		if err != nil {
			t.Fatal(err)
		}
		if b := base64.StdEncoding.EncodeToString(got[:]); b != c.Want {
			t.Errorf("checksum of %s: got %s, want %s", c.KID, b, c.Want)
		}
	}
	if _, err := packager.PlayReadyChecksum(custodian.KID{1}, make([]byte, 15)); err == nil {
		t.Error("a key of 15 bytes: got no error")
	}
}

func TestWidevineDataKnownAnswers(t *testing.T) {
	want := known[struct {
		CENC     string `json:"cenc_hex"`
		Rotation string `json:"rotation_period1_hex"`
	}](t, "widevine_pssh_data_with_content_id")
	d := packager.WidevineData{AESCTR: true, KIDs: []custodian.KID{kidOf(t, "df156b4efcc24dda1acf1d5211dda2c2")},
		Provider: "pkgproto", ContentID: custodian.ContentID("test content id"), Scheme: custodian.SchemeCENC}
	if got := hex.EncodeToString(d.Encode()); got != want.CENC {
		t.Errorf("without a period:\ngot  %s\nwant %s", got, want.CENC)
	}
	d.KIDs = []custodian.KID{kidOf(t, "e5422c0de53e858d7d7ac04fd583d0a3")}
	d.Period = custodian.Period{Set: true, Index: 1}
	if got := hex.EncodeToString(d.Encode()); got != want.Rotation {
		t.Errorf("period 1:\ngot  %s\nwant %s", got, want.Rotation)
	}
}

const (
	tutorialKID = "abba271e8bcf552bbd2e86a434a9a5d9"
	tutorialKey = "69eaa802a6763af979e8d1940fb88392"
)

func signalling(t *testing.T, system packager.SystemID, scheme custodian.Scheme) packager.Signalling {
	t.Helper()
	key := custodian.ContentKey{KID: kidOf(t, tutorialKID)}
	key.Scheme = scheme
	if scheme.ExplicitIV() {
		key.IV = bytes.Repeat([]byte{0xab}, 16)
	}
	s, err := packager.NewSignalling(system, key, unhex(t, tutorialKey), packager.WidevineData{})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestHLS(t *testing.T) {
	const iv = ",IV=0xABABABABABABABABABABABABABABABAB"
	box := func(name, system string) string {
		k := known[knownBoxes](t, name)
		return base64.StdEncoding.EncodeToString(unhex(t, map[string]string{"w": k.Boxes.Widevine, "p": k.Boxes.PlayReady[64:]}[system]))
	}
	for _, c := range []struct {
		name   string
		system packager.SystemID
		scheme custodian.Scheme
		tag    packager.HLSTag
		want   string
	}{
		{"Widevine cenc", packager.Widevine, "cenc", packager.HLSKey,
			`#EXT-X-KEY:METHOD=SAMPLE-AES-CTR,URI="data:text/plain;base64,` + box("kav-cenc", "w") + `",KEYID=0xABBA271E8BCF552BBD2E86A434A9A5D9,KEYFORMATVERSIONS="1",KEYFORMAT="urn:uuid:edef8ba9-79d6-4ace-a3c8-27dcd51d21ed"`},
		{"Widevine cbcs", packager.Widevine, "cbcs", packager.HLSSessionKey,
			`#EXT-X-SESSION-KEY:METHOD=SAMPLE-AES,URI="data:text/plain;base64,` + box("kav-cbcs", "w") + `",KEYID=0xABBA271E8BCF552BBD2E86A434A9A5D9` + iv + `,KEYFORMATVERSIONS="1",KEYFORMAT="urn:uuid:edef8ba9-79d6-4ace-a3c8-27dcd51d21ed"`},
		{"PlayReady cenc", packager.PlayReady, "cenc", packager.HLSKey,
			`#EXT-X-KEY:METHOD=SAMPLE-AES-CTR,URI="data:text/plain;charset=UTF-16;base64,` + box("kav-cenc", "p") + `",KEYFORMATVERSIONS="1",KEYFORMAT="com.microsoft.playready"`},
		{"PlayReady cbcs", packager.PlayReady, "cbcs", packager.HLSKey,
			`#EXT-X-KEY:METHOD=SAMPLE-AES,URI="data:text/plain;charset=UTF-16;base64,` + box("kav-cbcs", "p") + `"` + iv + `,KEYFORMATVERSIONS="1",KEYFORMAT="com.microsoft.playready"`},
		{"FairPlay", packager.FairPlay, "cbcs", packager.HLSKey,
			`#EXT-X-KEY:METHOD=SAMPLE-AES,URI="skd://abba271e-8bcf-552b-bd2e-86a434a9a5d9:ABABABABABABABABABABABABABABABAB",KEYFORMATVERSIONS="1",KEYFORMAT="com.apple.streamingkeydelivery"`},
		{"common", packager.Common, "cenc", packager.HLSKey,
			`#EXT-X-KEY:METHOD=SAMPLE-AES-CTR,URI="data:text/plain;base64,q7onHovPVSu9LoakNKml2Q==",KEYFORMATVERSIONS="1",KEYFORMAT="identity"`},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := signalling(t, c.system, c.scheme).HLS(c.tag)
			if err != nil {
				t.Fatal(err)
			}
			if got != c.want {
				t.Errorf("\ngot  %s\nwant %s", got, c.want)
			}
		})
	}
}

func TestContentProtection(t *testing.T) {
	k := known[knownBoxes](t, "kav-cenc")
	b64 := func(s string) string { return base64.StdEncoding.EncodeToString(unhex(t, s)) }
	for _, c := range []struct {
		system packager.SystemID
		want   string
	}{
		{packager.Widevine, `<ContentProtection schemeIdUri="urn:uuid:edef8ba9-79d6-4ace-a3c8-27dcd51d21ed"><pssh xmlns="urn:mpeg:cenc:2013">` + b64(k.Boxes.Widevine) + `</pssh></ContentProtection>`},
		{packager.PlayReady, `<ContentProtection schemeIdUri="urn:uuid:9a04f079-9840-4286-ab92-e65be0885f95" value="MSPR 2.0"><pssh xmlns="urn:mpeg:cenc:2013">` + b64(k.Boxes.PlayReady) +
			`</pssh><pro xmlns="urn:microsoft:playready">` + b64(k.Boxes.PlayReady[64:]) + `</pro></ContentProtection>`},
		{packager.Common, `<ContentProtection schemeIdUri="urn:uuid:1077efec-c0b2-4d02-ace3-3c1e52e2fb4b"><pssh xmlns="urn:mpeg:cenc:2013">` + b64(k.Boxes.Common) + `</pssh></ContentProtection>`},
	} {
		got, err := signalling(t, c.system, custodian.SchemeCENC).ContentProtection()
		if err != nil {
			t.Fatal(err)
		}
		if got != c.want {
			t.Errorf("%s:\ngot  %s\nwant %s", c.system, got, c.want)
		}
	}
	want := `<ContentProtection schemeIdUri="urn:mpeg:dash:mp4protection:2011" value="cenc" cenc:default_KID="abba271e-8bcf-552b-bd2e-86a434a9a5d9" xmlns:cenc="urn:mpeg:cenc:2013"></ContentProtection>`
	if got := packager.DefaultKIDProtection(custodian.SchemeCENC, kidOf(t, tutorialKID)); got != want {
		t.Errorf("default KID:\ngot  %s\nwant %s", got, want)
	}
}

func TestSignallingRefuses(t *testing.T) {
	key := custodian.ContentKey{KID: kidOf(t, tutorialKID)}
	key.Scheme = custodian.SchemeCENC
	cek := unhex(t, tutorialKey)
	if _, err := packager.NewSignalling(packager.FairPlay, key, cek, packager.WidevineData{}); err == nil {
		t.Error("FairPlay with cenc: got no error")
	}
	if _, err := packager.NewSignalling(packager.SystemID{1}, key, cek, packager.WidevineData{}); err == nil {
		t.Error("unknown system: got no error")
	}
	for _, scheme := range []custodian.Scheme{custodian.SchemeCBC1, custodian.SchemeCENS} {
		if _, err := signalling(t, packager.Widevine, scheme).HLS(packager.HLSKey); err == nil {
			t.Errorf("HLS with %s: got no error", scheme)
		}
	}
	if _, err := signalling(t, packager.FairPlay, custodian.SchemeCBCS).ContentProtection(); err == nil {
		t.Error("FairPlay in DASH: got no error")
	}
	if _, err := packager.FairPlayURI(key.KID, nil); err == nil {
		t.Error("FairPlay without an IV: got no error")
	}
}
