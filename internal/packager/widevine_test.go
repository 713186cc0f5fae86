package packager_test

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/packager"
)

// captured is a request that Shaka Packager 3.4.2 sent.
func captured(t testing.TB, name string) (body []byte, inner string) {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join("testdata", "widevine-api", name+".json"))
	if err != nil {
		t.Fatal(err)
	}
	var c struct {
		Body    string `json:"request_body"`
		Decoded string `json:"request_decoded"`
	}
	if err := json.Unmarshal(raw, &c); err != nil {
		t.Fatal(err)
	}
	return []byte(c.Body), c.Decoded
}

// tutorialSigner is the public test credential of Shaka Packager's tutorial.
func tutorialSigner(t testing.TB, identities ...string) packager.Signer {
	t.Helper()
	k := known[struct {
		Key string `json:"aes_signing_key_hex"`
		IV  string `json:"aes_signing_iv_hex"`
	}](t, "aes_request_signature")
	return packager.Signer{Name: "widevine_test", Identities: identities, AESKey: unhex(t, k.Key), AESIV: [16]byte(unhex(t, k.IV))}
}

func TestWidevineCaptured(t *testing.T) {
	k := newDoorKit(t, func(c *packager.Config) { c.Signers = []packager.Signer{tutorialSigner(t, doorID(doorPackager))} })
	c := k.client(t, doorPackager)
	for _, test := range []struct {
		name    string
		scheme  custodian.Scheme
		periods int
	}{
		{"01-single-video-aes", custodian.SchemeCENC, 0},
		{"mt-cenc-aes", custodian.SchemeCENC, 0},
		{"mt-cbcs-aes", custodian.SchemeCBCS, 0},
		{"mt-group-policy", custodian.SchemeCENC, 0},
		{"rotation-01", custodian.SchemeCENC, 0},
		{"rotation-02", custodian.SchemeCENC, 10},
	} {
		t.Run(test.name, func(t *testing.T) {
			body, inner := captured(t, test.name)
			status, raw := post(t, c, k.url+"widevine", body)
			a := wvDecode(t, raw)
			if status != http.StatusOK || a.Status != "OK" {
				t.Fatalf("got %d %s %s, want 200 OK", status, a.Status, a.Message)
			}
			labels := []string{"SD", "HD", "UHD1", "UHD2", "AUDIO"}
			if want := len(labels) * max(test.periods, 1); len(a.Tracks) != want {
				t.Fatalf("got %d tracks, want %d", len(a.Tracks), want)
			}
			for i, track := range a.Tracks {
				if track.Type != labels[i%5] {
					t.Errorf("track %d: got %s, want %s", i, track.Type, labels[i%5])
				}
				wantIV := 0
				if test.scheme == custodian.SchemeCBCS {
					wantIV = 16
				}
				if len(track.KID) != 16 || len(track.Key) != 16 || len(track.IV) != wantIV {
					t.Errorf("track %d: KID, key and IV of %d, %d and %d bytes, want 16, 16 and %d", i, len(track.KID), len(track.Key), len(track.IV), wantIV)
				}
				d := packager.WidevineData{KIDs: []custodian.KID{custodian.KID(track.KID)}, ContentID: custodian.ContentID("test content id"), Scheme: test.scheme}
				if strings.Contains(inner, "sd_only_policy") {
					d.Policy = "sd_only_policy"
				}
				if test.periods > 0 {
					if track.Period == nil || *track.Period != uint32(i/5) {
						t.Fatalf("track %d: period %v, want %d", i, track.Period, i/5)
					}
					start := time.Unix(int64(i/5*2), 0).UTC()
					if !track.Start.Equal(start) || !track.End.Equal(start.Add(2*time.Second)) {
						t.Errorf("track %d: period from %s to %s, want 2 s from %s", i, track.Start, track.End, start)
					}
					d.Period, d.PeriodSeconds = custodian.Period{Set: true, Index: uint32(i / 5)}, 2
				} else if track.Period != nil {
					t.Errorf("track %d: period %d, want none", i, *track.Period)
				}
				if len(track.PSSH) != 1 || track.PSSH[0].Type != "WIDEVINE" {
					t.Fatalf("track %d: PSSH %+v, want exactly one of WIDEVINE", i, track.PSSH)
				}
				if got, want := track.PSSH[0].Data, d.Encode(); !bytes.Equal(got, want) {
					t.Errorf("track %d: PSSH data\ngot  %x\nwant %x", i, got, want)
				}
				if got, want := track.PSSH[0].Boxes, packager.WidevinePSSH(d); !bytes.Equal(got, want) {
					t.Errorf("track %d: PSSH box\ngot  %x\nwant %x", i, got, want)
				}
			}
			if _, again := post(t, c, k.url+"widevine", body); !bytes.Equal(again, raw) {
				t.Error("the same request has another answer")
			}
		})
	}
}

// The keys of a request are those of GetContentKeys, and of every caller and
// scheme of signature.
func TestWidevineIsIssue(t *testing.T) {
	k := newDoorKit(t, nil)
	_, inner := captured(t, "mt-cbcs-aes")
	_, raw := post(t, k.client(t, doorPackager), k.url+"widevine", wvBody(inner))
	tracks := wvDecode(t, raw).Tracks
	if len(tracks) != 5 {
		t.Fatalf("got %d tracks, want 5", len(tracks))
	}
	if _, chief := post(t, k.client(t, doorChief), k.url+"widevine", wvBody(inner)); !bytes.Equal(chief, raw) {
		t.Error("another packager has other keys for the same content")
	}
	provider := custodian.Caller{ID: doorID(doorProvider), CA: "clients", Roles: []custodian.Role{custodian.RoleProvider}}
	for _, track := range tracks {
		got, err := k.core.Retrieve(t.Context(), provider, custodian.RetrieveRequest{KIDs: []custodian.KID{custodian.KID(track.KID)}})
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range got {
			r.Key.Use(func(b []byte) {
				if !bytes.Equal(b, track.Key) {
					t.Errorf("%s: the provider gets another key", track.Type)
				}
			})
			if string(r.Info.TrackType) != track.Type || !bytes.Equal(r.Info.IV, track.IV) || string(r.Info.ContentID) != "test content id" {
				t.Errorf("%s: the provider gets track %s, IV %x, content %q", track.Type, r.Info.TrackType, r.Info.IV, r.Info.ContentID)
			}
			r.Key.Destroy()
		}
	}
	families, err := k.metrics.Gather()
	if err != nil {
		t.Fatal(err)
	}
	counted := false
	for _, f := range families {
		for _, m := range f.GetMetric() {
			counted = counted || f.GetName() == "custodian_calls_total" && strings.Contains(m.String(), `value:"widevine"`) && m.GetCounter().GetValue() == 2
		}
	}
	if !counted {
		t.Errorf("custodian_calls_total does not have the two calls: %v", families)
	}
}

func TestWidevineSignatures(t *testing.T) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	small := known[struct {
		Key     string `json:"aes_signing_key_hex"`
		IV      string `json:"aes_signing_iv_hex"`
		Request string `json:"request_json"`
		Sig     string `json:"signature_hex"`
	}](t, "aes128_request_signature")
	k := newDoorKit(t, func(c *packager.Config) {
		c.Signers = []packager.Signer{tutorialSigner(t, doorID(doorPackager)),
			{Name: "aes128", Identities: []string{doorID(doorPackager)}, AESKey: unhex(t, small.Key), AESIV: [16]byte(unhex(t, small.IV))},
			{Name: "rsa_signer", Identities: []string{doorID(doorPackager)}, RSA: &key.PublicKey}}
	})
	signed := func(request, signer string, signature []byte) []byte {
		return fmt.Appendf(nil, `{"request":%q,"signature":%q,"signer":%q}`, base64.StdEncoding.EncodeToString([]byte(request)), base64.StdEncoding.EncodeToString(signature), signer)
	}
	rsaSign := func(request string, salt int) []byte {
		digest := sha1.Sum([]byte(request))
		sig, err := rsa.SignPSS(rand.Reader, key, crypto.SHA1, digest[:], &rsa.PSSOptions{SaltLength: salt})
		if err != nil {
			t.Fatal(err)
		}
		return sig
	}
	aes256, inner := captured(t, "mt-cenc-aes")
	rsaBody, _ := captured(t, "mt-cenc-rsa")
	flipped := bytes.Replace(aes256, []byte(`"signature":"6D7a`), []byte(`"signature":"6D7b`), 1)
	if bytes.Equal(flipped, aes256) {
		t.Fatal("the signature is not where it was")
	}
	for _, test := range []struct {
		name string
		who  string
		body []byte
		want string
	}{
		{"AES-256, known answer", doorPackager, aes256, "OK"},
		{"AES-128, known answer", doorPackager, signed(small.Request, "aes128", unhex(t, small.Sig)), "OK"},
		{"RSA", doorPackager, signed(inner, "rsa_signer", rsaSign(inner, 20)), "OK"},
		{"RSA with another salt length", doorPackager, signed(inner, "rsa_signer", rsaSign(inner, 16)), "SIGNATURE_FAILED"},
		{"RSA of another key", doorPackager, rsaBody, "SIGNATURE_FAILED"},
		{"one bit of the signature", doorPackager, flipped, "SIGNATURE_FAILED"},
		{"of another request", doorPackager, signed(strings.Replace(inner, "SD", "S1", 1), "widevine_test", unhex(t, "e83eda5ca808b2099bdf3a564b82c244eb186d3e020198494c8f194dadb29123")), "SIGNATURE_FAILED"},
		{"of another signer", doorPackager, signed(inner, "aes128", unhex(t, "e83eda5ca808b2099bdf3a564b82c244eb186d3e020198494c8f194dadb29123")), "SIGNATURE_FAILED"},
		{"an empty signature", doorPackager, signed(inner, "widevine_test", nil), "SIGNATURE_FAILED"},
		{"half a signature", doorPackager, signed(inner, "widevine_test", unhex(t, "e83eda5ca808b2099bdf3a564b82c244")), "SIGNATURE_FAILED"},
		{"unknown signer", doorPackager, signed(inner, "nobody", []byte("x")), "SIGNATURE_FAILED"},
		{"no signature", doorPackager, wvBody(inner), "SIGNATURE_FAILED"},
		{"somebody else's signer", doorChief, aes256, "SIGNATURE_FAILED"},
		{"no signature, and no signer of the caller", doorChief, wvBody(inner), "OK"},
	} {
		t.Run(test.name, func(t *testing.T) {
			status, raw := post(t, k.client(t, test.who), k.url+"widevine", test.body)
			a := wvDecode(t, raw)
			if status != http.StatusOK || a.Status != test.want {
				t.Errorf("got %d %s (%s), want 200 %s", status, a.Status, a.Message, test.want)
			}
			if test.want != "OK" && len(a.Tracks) != 0 {
				t.Errorf("a refusal has %d tracks", len(a.Tracks))
			}
		})
	}
	if log := k.log.String(); !strings.Contains(log, "signature refused") || !strings.Contains(log, "is not this caller's") {
		t.Errorf("the log does not say whose signature was refused and why:\n%s", log)
	}
}

func TestSetSigners(t *testing.T) {
	k := newDoorKit(t, nil)
	body, _ := captured(t, "mt-cenc-aes")
	c := k.client(t, doorPackager)
	if _, raw := post(t, c, k.url+"widevine", body); wvDecode(t, raw).Status != "SIGNATURE_FAILED" {
		t.Error("a signer that is not configured: the request is not refused")
	}
	if err := k.server.SetSigners([]packager.Signer{tutorialSigner(t, doorID(doorPackager))}); err != nil {
		t.Fatal(err)
	}
	if _, raw := post(t, c, k.url+"widevine", body); wvDecode(t, raw).Status != "OK" {
		t.Error("a signer that was added: the request is refused")
	}
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	good := tutorialSigner(t, "x")
	for want, bad := range map[string][]packager.Signer{
		"signers[0]: it has no name":                              {{Identities: []string{"x"}, AESKey: good.AESKey}},
		"signers[0]: identities: empty":                           {{Name: "a", AESKey: good.AESKey}},
		"signers[0]: either an AES key or an RSA public key":      {{Name: "a", Identities: []string{"x"}}},
		"signers[0]: AES key of 15 bytes: must be 16 or 32":       {{Name: "a", Identities: []string{"x"}, AESKey: good.AESKey[:15]}},
		"signers[0]: RSA key of 1024 bits: must be at least 2048": {{Name: "a", Identities: []string{"x"}, RSA: &weak.PublicKey}},
		`signers[1]: "widevine_test" is there twice`:              {good, good},
	} {
		if err := k.server.SetSigners(bad); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
	if _, raw := post(t, c, k.url+"widevine", body); wvDecode(t, raw).Status != "OK" {
		t.Error("signers that are refused replaced the good ones")
	}
}

// What a packager may ask in a wrong way, and what it hears.
func TestWidevineRefusals(t *testing.T) {
	k := newDoorKit(t, nil)
	const tracks = `"tracks":[{"type":"SD"}]`
	for _, test := range []struct {
		name, request, want string
	}{
		{"no content ID", `{` + tracks + `}`, "CONTENT_ID_MISSING"},
		{"an empty content ID", `{"content_id":"",` + tracks + `}`, "CONTENT_ID_MISSING"},
		{"by PSSH", `{"pssh_data":"AAAA",` + tracks + `}`, "CONTENT_ID_MISSING"},
		{"by content ID and PSSH", `{"content_id":"YQ==","pssh_data":"AAAA",` + tracks + `}`, "TOO_MANY_CONTENT_SPECIFIERS"},
		{"a long content ID", `{"content_id":"` + strings.Repeat("YWFh", 101) + `",` + tracks + `}`, "MALFORMED_REQUEST"},
		{"a content ID that is no base64", `{"content_id":"a b",` + tracks + `}`, "MALFORMED_REQUEST"},
		{"a content ID that is a number", `{"content_id":7,` + tracks + `}`, "MALFORMED_REQUEST"},
		{"no tracks", `{"content_id":"YQ=="}`, "TRACK_TYPE_MISSING"},
		{"empty tracks", `{"content_id":"YQ==","tracks":[]}`, "TRACK_TYPE_MISSING"},
		{"a track without type", `{"content_id":"YQ==","tracks":[{}]}`, "TRACK_TYPE_MISSING"},
		{"a track type with spaces", `{"content_id":"YQ==","tracks":[{"type":"S D"}]}`, "TRACK_TYPE_UNKNOWN"},
		{"a track twice", `{"content_id":"YQ==","tracks":[{"type":"SD"},{"type":"SD"}]}`, "MALFORMED_REQUEST"},
		{"tracks that are a string", `{"content_id":"YQ==","tracks":"SD"}`, "MALFORMED_REQUEST"},
		{"an unknown scheme", `{"content_id":"YQ==","protection_scheme":"CBCX",` + tracks + `}`, "MALFORMED_REQUEST"},
		{"a long policy", `{"content_id":"YQ==","policy":"` + strings.Repeat("p", 129) + `",` + tracks + `}`, "POLICY_UNKNOWN"},
		{"a group that is no base64", `{"content_id":"YQ==","group_id":"???",` + tracks + `}`, "MALFORMED_REQUEST"},
		{"entitlement licences", `{"content_id":"YQ==","enable_entitlement_license":true,` + tracks + `}`, "MALFORMED_REQUEST"},
		{"no Widevine", `{"content_id":"YQ==","drm_types":["PLAYREADY"],` + tracks + `}`, "MALFORMED_REQUEST"},
		{"rotation with PlayReady", `{"content_id":"YQ==","drm_types":["WIDEVINE","PLAYREADY"],"first_crypto_period_index":0,"crypto_period_count":1,` + tracks + `}`, "KEY_ROTATION_WITH_UNSUPPORTED_DRM_TYPE"},
		{"no periods", `{"content_id":"YQ==","first_crypto_period_index":0,"crypto_period_count":0,` + tracks + `}`, "NO_REQUESTED_CRYPTO_PERIODS"},
		{"too many periods", `{"content_id":"YQ==","first_crypto_period_index":0,"crypto_period_count":601,` + tracks + `}`, "MALFORMED_REQUEST"},
		{"periods beyond the last", `{"content_id":"YQ==","first_crypto_period_index":4294967295,"crypto_period_count":2,` + tracks + `}`, "MALFORMED_REQUEST"},
		{"a negative period", `{"content_id":"YQ==","first_crypto_period_index":-1,"crypto_period_count":2,` + tracks + `}`, "MALFORMED_REQUEST"},
		{"a name twice", `{"content_id":"YQ==","content_id":"Yg==",` + tracks + `}`, "MALFORMED_REQUEST"},
		{"a track with a name twice", `{"content_id":"YQ==","tracks":[{"type":"SD","type":"HD"}]}`, "MALFORMED_REQUEST"},
		{"a name in other letters is another name", `{"Content_ID":"YQ==",` + tracks + `}`, "CONTENT_ID_MISSING"},
		{"no UTF-8", "{\"content_id\":\"YQ==\",\"policy\":\"\xff\"," + tracks + `}`, "MALFORMED_REQUEST"},
		{"UTF-16", "\xff\xfe{\x00}\x00", "MALFORMED_REQUEST"},
		{"no object", `[]`, "MALFORMED_REQUEST"},
		{"two objects", `{}{}`, "MALFORMED_REQUEST"},
		{"cut off", `{"content_id":"YQ`, "MALFORMED_REQUEST"},
	} {
		t.Run(test.name, func(t *testing.T) {
			status, raw := post(t, k.client(t, doorPackager), k.url+"widevine", wvBody(test.request))
			a := wvDecode(t, raw)
			if status != http.StatusOK || a.Status != test.want || a.Message == "" || len(a.Tracks) != 0 {
				t.Errorf("got %d %s (%s) with %d tracks, want 200 %s with a message and none", status, a.Status, a.Message, len(a.Tracks), test.want)
			}
		})
	}
}

// Forms that protocol buffers allow in JSON, and old packagers use.
func TestWidevineLenient(t *testing.T) {
	k := newDoorKit(t, nil)
	c := k.client(t, doorPackager)
	for name, request := range map[string]string{
		"no scheme":          `{"content_id":"-_-_","tracks":[{"type":"SD"}]}`,
		"padding":            `{"content_id":"+/+/","tracks":[{"type":"SD"}],"protection_scheme":"CENC"}`,
		"unknown fields":     `{"content_id":"-_-_","tracks":[{"type":"SD","future":[1,{"a":null}]}],"future":{"a":1},"protection_scheme":"UNSPECIFIED"}`,
		"nulls":              `{"content_id":"-_-_","tracks":[{"type":"SD"}],"policy":null,"drm_types":null,"group_id":null,"crypto_period_count":null}`,
		"a custom label too": `{"content_id":"-_-_","tracks":[{"type":"SD"}],"drm_types":["PLAYREADY","WIDEVINE"]}`,
	} {
		status, raw := post(t, c, k.url+"widevine", wvBody(request))
		if a := wvDecode(t, raw); status != http.StatusOK || a.Status != "OK" || len(a.Tracks) != 1 {
			t.Errorf("%s: got %d %s (%s) with %d tracks, want one", name, status, a.Status, a.Message, len(a.Tracks))
		}
	}
	_, raw := post(t, c, k.url+"widevine", wvBody(`{"content_id":"bGFiZWxz","tracks":[{"type":"<FOO>&"}],"first_crypto_period_index":"4294967295","crypto_period_count":"1","crypto_period_seconds":4294967295}`))
	a := wvDecode(t, raw)
	if len(a.Tracks) != 1 || a.Tracks[0].Type != "<FOO>&" || a.Tracks[0].Period == nil || *a.Tracks[0].Period != 4294967295 || !a.Tracks[0].Start.IsZero() {
		t.Errorf("a custom label in the last period: got %+v", a)
	}
}

// Shaka Packager's start with rotation: 11 requests of 10 periods and 5 tracks,
// at once and twice, beside a plain one.
func TestWidevineBurst(t *testing.T) {
	k := newDoorKit(t, nil)
	c := k.client(t, doorPackager)
	first := make([][]byte, 11)
	for round := range 2 {
		var calls sync.WaitGroup
		for i := range first {
			calls.Go(func() {
				request := fmt.Sprintf(`{"content_id":"bGl2ZQ==","policy":"","tracks":[{"type":"SD"},{"type":"HD"},{"type":"UHD1"},{"type":"UHD2"},{"type":"AUDIO"}],"drm_types":["WIDEVINE"],"first_crypto_period_index":%d,"crypto_period_count":10,"crypto_period_seconds":2,"protection_scheme":"CENC"}`, 10*i)
				status, raw := post(t, c, k.url+"widevine", wvBody(request))
				if status != http.StatusOK {
					t.Errorf("request %d: status %d", i, status)
				}
				if round == 0 {
					first[i] = raw
				} else if !bytes.Equal(first[i], raw) {
					t.Errorf("request %d: another answer the second time", i)
				}
			})
		}
		calls.Wait()
	}
	kids, keys := map[string]bool{}, map[string]bool{}
	for i, raw := range first {
		for j, track := range wvDecode(t, raw).Tracks {
			kids[string(track.KID)], keys[string(track.Key)] = true, true
			if want := uint32(10*i + j/5); track.Period == nil || *track.Period != want {
				t.Errorf("request %d, track %d: period %v, want %d", i, j, track.Period, want)
			}
		}
	}
	if len(kids) != 550 || len(keys) != 550 {
		t.Errorf("got %d KIDs and %d keys, want 550 of each", len(kids), len(keys))
	}
}

// More than 600 keys are more than a request may ask for; 600 are answered whole.
func TestWidevineLargest(t *testing.T) {
	k := newDoorKit(t, nil)
	request := `{"content_id":"bGFyZ2U=","tracks":[{"type":"SD"},{"type":"HD"},{"type":"` + strings.Repeat("<", 64) + `"}],"protection_scheme":"CBCS","policy":"` + strings.Repeat("p", 128) +
		`","first_crypto_period_index":4294967000,"crypto_period_count":200,"crypto_period_seconds":1}`
	status, raw := post(t, k.client(t, doorPackager), k.url+"widevine", wvBody(request))
	if a := wvDecode(t, raw); status != http.StatusOK || len(a.Tracks) != 600 {
		t.Errorf("got %d with %d tracks (%s), want 600", status, len(a.Tracks), a.Message)
	}
}

func TestDoor(t *testing.T) {
	k := newDoorKit(t, nil)
	_, inner := captured(t, "mt-cenc-aes")
	in := func(category string) string { return strings.Replace(k.url, "movies", category, 1) + "widevine" }
	for _, test := range []struct {
		name   string
		who    string
		url    string
		body   []byte
		status int
		want   string // of the API, or the reason
	}{
		{"no grant", doorNobody, in("movies"), wvBody(inner), 200, "ACCESS_DENIED"},
		{"no packager", doorProvider, in("movies"), wvBody(inner), 200, "ACCESS_DENIED"},
		{"another category", doorOther, in("movies"), wvBody(inner), 200, "ACCESS_DENIED"},
		{"a category that the caller may not know", doorPackager, in("nothing"), wvBody(inner), 200, "ACCESS_DENIED"},
		{"a category that the caller may know", doorChief, in("nothing"), wvBody(inner), 404, "CATEGORY_NOT_FOUND"},
		{"a category that is no name", doorChief, in("MOVIES"), wvBody(inner), 200, "MALFORMED_REQUEST"},
		{"no JSON", doorPackager, in("movies"), []byte("x"), 200, "MALFORMED_REQUEST"},
		{"no request", doorPackager, in("movies"), []byte("{}"), 200, "MALFORMED_REQUEST"},
		{"no base64", doorPackager, in("movies"), []byte(`{"request":"{}"}`), 200, "MALFORMED_REQUEST"},
		{"too large", doorPackager, in("movies"), bytes.Repeat([]byte(" "), 2<<20), 200, "MALFORMED_REQUEST"},
		{"deep", doorPackager, in("movies"), wvBody(strings.Repeat(`{"a":`, 100000)), 200, "MALFORMED_REQUEST"},
		{"many", doorPackager, in("movies"), wvBody(`{"content_id":"YQ==","tracks":[` + strings.Repeat(`{},`, 200000) + `{}]}`), 200, "MALFORMED_REQUEST"},
	} {
		t.Run(test.name, func(t *testing.T) {
			status, raw := post(t, k.client(t, test.who), test.url, test.body)
			if status != test.status {
				t.Fatalf("got %d %s, want %d", status, raw, test.status)
			}
			var got string
			if status == http.StatusOK {
				got = wvDecode(t, raw).Status
			} else {
				var refusal struct{ Error, Message string }
				if err := json.Unmarshal(raw, &refusal); err != nil || refusal.Message == "" {
					t.Errorf("%s: %v, want an error and a message", raw, err)
				}
				got = refusal.Error
			}
			if got != test.want {
				t.Errorf("got %s, want %s", got, test.want)
			}
		})
	}
	// A method and a path that are not there say so, to those with a certificate.
	res, err := k.client(t, doorPackager).Get(k.url + "widevine")
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	if res.StatusCode != http.StatusMethodNotAllowed {
		t.Errorf("GET: got %d, want 405", res.StatusCode)
	}
	if status, _ := post(t, k.client(t, doorPackager), k.url+"nothing", nil); status != http.StatusNotFound {
		t.Errorf("unknown door: got %d, want 404", status)
	}
}

func TestDoorTLS(t *testing.T) {
	k := newDoorKit(t, nil)
	other := newDoorKit(t, nil) // with a CA of its own
	_, inner := captured(t, "mt-cenc-aes")
	try := func(c *http.Client) error {
		res, err := c.Post(k.url+"widevine", "application/json", bytes.NewReader(wvBody(inner)))
		if err == nil {
			res.Body.Close()
		}
		return err
	}
	good := func() (*http.Client, *http.Transport) {
		c := k.client(t, doorPackager)
		return c, c.Transport.(*http.Transport)
	}
	c, _ := good()
	if err := try(c); err != nil {
		t.Errorf("TLS 1.2: %v", err)
	}
	c, tr := good()
	tr.TLSClientConfig.MaxVersion = 0
	if err := try(c); err != nil {
		t.Errorf("TLS 1.3: %v", err)
	}
	c, tr = good()
	tr.TLSClientConfig.Certificates = nil
	if try(c) == nil {
		t.Error("no certificate: it is let in")
	}
	c, tr = good()
	tr.TLSClientConfig.Certificates = other.client(t, doorPackager).Transport.(*http.Transport).TLSClientConfig.Certificates
	if try(c) == nil {
		t.Error("a certificate of another CA: it is let in")
	}
	for _, suite := range []uint16{0xc013 /* ECDHE, CBC */, 0x009c /* no forward secrecy */} {
		c, tr = good()
		tr.TLSClientConfig.CipherSuites = []uint16{suite}
		if try(c) == nil {
			t.Errorf("cipher suite %#x: it is taken", suite)
		}
	}
	c, tr = good()
	tr.TLSClientConfig.MaxVersion = 0x0302
	tr.TLSClientConfig.MinVersion = 0x0302
	if try(c) == nil {
		t.Error("TLS 1.1: it is taken")
	}
}

// Trouble that may pass is waited out inside of the request, and never answered
// with a status after which a packager gives up, as long as there is time.
func TestWidevineHold(t *testing.T) {
	_, inner := captured(t, "mt-cenc-aes")
	t.Run("passes", func(t *testing.T) {
		k := newDoorKit(t, nil)
		k.hsm.Fail("Random", custodian.ErrHSMUnavailable, 3)
		status, raw := post(t, k.client(t, doorPackager), k.url+"widevine", wvBody(inner))
		if status != http.StatusOK || wvDecode(t, raw).Status != "OK" {
			t.Errorf("got %d %s, want 200 OK", status, raw)
		}
	})
	t.Run("after it was done", func(t *testing.T) {
		k := newDoorKit(t, nil)
		k.hsm.FailAfter("Seal", custodian.ErrHSMUnavailable, 2)
		status, raw := post(t, k.client(t, doorPackager), k.url+"widevine", wvBody(inner))
		if status != http.StatusOK || wvDecode(t, raw).Status != "OK" {
			t.Errorf("got %d %s, want 200 OK", status, raw)
		}
	})
	t.Run("starting", func(t *testing.T) {
		k := newDoorKit(t, nil)
		k.rpc.SetUnavailable(custodian.ErrStarting)
		time.AfterFunc(300*time.Millisecond, func() { k.rpc.SetCustody(k.core) })
		status, raw := post(t, k.client(t, doorPackager), k.url+"widevine", wvBody(inner))
		if status != http.StatusOK || wvDecode(t, raw).Status != "OK" {
			t.Errorf("got %d %s, want 200 OK", status, raw)
		}
	})
	t.Run("sealed", func(t *testing.T) {
		k := newDoorKit(t, nil)
		k.rpc.SetUnavailable(custodian.ErrSealed)
		status, raw := post(t, k.client(t, doorPackager), k.url+"widevine", wvBody(inner))
		if status != http.StatusServiceUnavailable || !bytes.Contains(raw, []byte("SEALED")) {
			t.Errorf("got %d %s, want 503 at once", status, raw)
		}
	})
	t.Run("stays", func(t *testing.T) {
		k := newDoorKit(t, func(c *packager.Config) { c.Hold = 500 * time.Millisecond })
		k.hsm.Fail("Random", custodian.ErrHSMUnavailable, 1000)
		status, raw := post(t, k.client(t, doorPackager), k.url+"widevine", wvBody(inner))
		if status != http.StatusServiceUnavailable || !bytes.Contains(raw, []byte("HSM_UNAVAILABLE")) {
			t.Errorf("got %d %s, want 503 with the reason", status, raw)
		}
	})
	t.Run("stays, with rotation", func(t *testing.T) {
		k := newDoorKit(t, func(c *packager.Config) { c.Hold = 200 * time.Millisecond })
		k.hsm.Fail("Random", custodian.ErrHSMUnavailable, 1000)
		_, rotation := captured(t, "rotation-02")
		c := k.client(t, doorPackager)
		c.Timeout = time.Second
		res, err := c.Post(k.url+"widevine", "application/json", bytes.NewReader(wvBody(rotation)))
		if err == nil {
			res.Body.Close()
			t.Fatalf("got %s, want no answer until the packager's own timeout", res.Status)
		}
		if !strings.Contains(err.Error(), "Client.Timeout") {
			t.Errorf("got %v, want the packager's own timeout", err)
		}
	})
}

// FuzzWidevine: no request makes the server say anything but an answer of the
// API, and what is accepted is within the limits.
func FuzzWidevine(f *testing.F) {
	for _, name := range []string{"mt-cenc-aes", "mt-cenc-rsa", "mt-group-policy", "rotation-02"} {
		body, inner := captured(f, name)
		f.Add(body, []byte(inner))
	}
	f.Fuzz(func(t *testing.T, body, inner []byte) {
		packager.ParseForFuzz(body)
		tracks, periods, err := packager.ParseForFuzz(wvBody(string(inner)))
		if err == nil && (tracks < 1 || periods < 1 || tracks*periods > custodian.MaxKeysPerIssue) {
			t.Errorf("%d tracks in %d periods were accepted", tracks, periods)
		}
	})
}

func TestWidevineKeepsNoSecretInText(t *testing.T) {
	k := newDoorKit(t, nil)
	_, inner := captured(t, "mt-cenc-aes")
	_, raw := post(t, k.client(t, doorPackager), k.url+"widevine", wvBody(inner))
	for _, track := range wvDecode(t, raw).Tracks {
		for _, form := range []string{hex.EncodeToString(track.Key), base64.StdEncoding.EncodeToString(track.Key)} {
			if strings.Contains(k.log.String(), form) {
				t.Fatal("the log has a key")
			}
		}
	}
}
