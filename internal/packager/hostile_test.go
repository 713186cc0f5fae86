package packager_test

import (
	"encoding/base64"
	"fmt"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/keycustody/custodian/internal/packager"
)

// TestHostileRequests: what TestHostileCPIX shows for CPIX, for the JSON of the
// Widevine API, in its envelope and inside of it, and for the SOAP of the
// PlayReady packaging server: every fault is found and named, quickly and in
// little memory.
func TestHostileRequests(t *testing.T) {
	const tracks = `"tracks":[{"type":"SD"}]`
	utf16 := func(s string) string {
		b := []byte{0xff, 0xfe}
		for _, c := range []byte(s) {
			b = append(b, c, 0)
		}
		return string(b)
	}
	inner := func(s string) string {
		return `{"request":"` + base64.StdEncoding.EncodeToString([]byte(s)) + `"}`
	}
	good := `{"content_id":"YQ==",` + tracks + `}`
	var names strings.Builder
	for i := range 100_000 {
		fmt.Fprintf(&names, `"a%d":0,`, i)
	}
	json := func(body string) error { _, _, err := packager.ParseForFuzz([]byte(body)); return err }
	soap := capturedSOAP(t)
	put := func(old, with string) string { return strings.Replace(soap, old, with, 1) }
	bomb := `<!DOCTYPE lolz [<!ENTITY a "aaaaaaaaaa">`
	for i := range 9 {
		bomb += fmt.Sprintf(`<!ENTITY a%d "%s">`, i, strings.Repeat(fmt.Sprintf("&a%d;", i-1), 10))
	}
	xml := func(body string) error { _, err := packager.ParseSOAPForFuzz([]byte(body)); return err }
	if json(inner(good)) != nil || xml(soap) != nil {
		t.Fatal("the good requests are refused")
	}
	for _, test := range []struct {
		name  string
		parse func(string) error
		body  string
		want  string
	}{
		{"JSON: 1,000,000 elements", json, `{"a":[` + strings.Repeat("0,", 999_999) + `0]}`, "request: it is missing"},
		{"JSON: many elements inside", json, inner(`{"content_id":"YQ==","tracks":[` + strings.Repeat("{},", 400_000) + `{}]}`), "tracks: 400001 tracks: must be at most 600"},
		{"JSON: many names", json, inner(`{` + names.String() + `"a":0}`), "content_id: it is missing"},
		{"JSON: deep", json, strings.Repeat("[", 1_000_000), "not JSON"},
		{"JSON: deep inside", json, inner(`{"a":` + strings.Repeat(`{"a":`, 200_000)), "not JSON"},
		{"JSON: deep and closed", json, inner(`{"content_id":` + strings.Repeat("[", 9000) + strings.Repeat("]", 9000) + `,` + tracks + `}`), "content_id: a JSON value of another type"},
		{"JSON: a long name", json, `{"` + strings.Repeat("a", 1_500_000) + `":0}`, "request: it is missing"},
		{"JSON: a long name twice", json, `{"` + strings.Repeat("a", 500_000) + `":0,"` + strings.Repeat("a", 500_000) + `":0}`, "is there twice"},
		{"JSON: a long content ID", json, inner(`{"content_id":"` + strings.Repeat("YWFh", 300_000) + `",` + tracks + `}`), "content ID of 900000 bytes"},
		{"JSON: a name twice", json, inner(`{"content_id":"YQ==","content_id":"Yg==",` + tracks + `}`), `"content_id" is there twice`},
		{"JSON: a name twice in the envelope", json, `{"request":"YQ==","request":"Yg=="}`, `"request" is there twice`},
		{"JSON: one name in two spellings", json, inner(`{"content_id":"YQ==","content\u005fid":"Yg==",` + tracks + `}`), `"content_id" is there twice`},
		{"JSON: UTF-16", json, utf16(inner(good)), "not JSON in UTF-8"},
		{"JSON: UTF-16 inside", json, inner(utf16(good)), "not JSON in UTF-8"},
		{"JSON: a byte order mark", json, "\ufeff" + inner(good), "not JSON in UTF-8"},
		{"JSON: Latin 1", json, inner("{\"content_id\":\"YQ==\",\"policy\":\"\xe9\"," + tracks + "}"), "not JSON in UTF-8"},
		{"JSON: overlong UTF-8", json, inner("{\"content_id\":\"YQ==\",\"policy\":\"\xc0\xaf\"," + tracks + "}"), "not JSON in UTF-8"},
		{"JSON: half a surrogate", json, inner(`{"content_id":"YQ==","tracks":[{"type":"\ud800"}]}`), "tracks[0].type"},
		{"JSON: zero bytes", json, strings.Repeat("\x00", 1000), "not JSON"},
		{"JSON: a comment", json, inner(`{/* */"content_id":"YQ==",` + tracks + `}`), "not JSON"},
		{"JSON: NaN", json, inner(`{"content_id":"YQ==","crypto_period_count":NaN,` + tracks + `}`), "not JSON"},
		{"JSON: a huge number", json, inner(`{"content_id":"YQ==","crypto_period_count":` + strings.Repeat("9", 100_000) + `,` + tracks + `}`), "crypto_period_count"},
		{"JSON: a huge exponent", json, inner(`{"content_id":"YQ==","crypto_period_count":1e999999999,` + tracks + `}`), "crypto_period_count"},
		{"JSON: XML", json, soap, "not JSON"},

		{"SOAP: entity bomb", xml, bomb + "]>" + put("asset-42", "&a8;"), "document type or entity"},
		{"SOAP: external entity", xml, `<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]>` + put("asset-42", "&a;"), "document type or entity"},
		{"SOAP: 500,000 elements", xml, put("<challenge", strings.Repeat("<a/>", 500_000)+"<challenge"), "more than 64 elements"},
		{"SOAP: a long text", xml, put("asset-42", strings.Repeat("a&amp;", 300_000)), ""},
		{"SOAP: UTF-16", xml, utf16(soap), "not well-formed"},
		{"SOAP: UTF-16 by name", xml, `<?xml version="1.0" encoding="UTF-16"?>` + soap[strings.Index(soap, "<soap"):], "not well-formed"},
		{"SOAP: Latin 1 by name", xml, `<?xml version="1.0" encoding="ISO-8859-1"?>` + soap[strings.Index(soap, "<soap"):], "not well-formed"},
		{"SOAP: an identifier twice", xml, put("<ProgramIdentifier>", "<ProgramIdentifier>x</ProgramIdentifier><ProgramIdentifier>"), "2 elements ProgramIdentifier"},
		{"SOAP: an identifier of another namespace", xml, put("<ProgramIdentifier>", `<ProgramIdentifier xmlns="urn:x">`), "0 elements ProgramIdentifier"},
		{"SOAP: an envelope of another namespace", xml, strings.ReplaceAll(soap, "http://schemas.xmlsoap.org/soap/envelope/", "urn:x"), "SOAP 1.1 envelope"},
		{"SOAP: JSON", xml, inner(good), "0 elements ProgramIdentifier"},
	} {
		t.Run(test.name, func(t *testing.T) {
			if len(test.body) > packager.MaxDocumentSize {
				t.Fatalf("%d bytes: the listener would not read that", len(test.body))
			}
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			start := time.Now()
			err := test.parse(test.body)
			took := time.Since(start)
			runtime.ReadMemStats(&after)
			if test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
				t.Errorf("got %.300v, want it to say %q", err, test.want)
			}
			if err != nil && len(err.Error()) > 500 {
				t.Errorf("the error has %d bytes", len(err.Error()))
			}
			if took > 5*time.Second {
				t.Errorf("it took %s", took)
			}
			// All that was allocated, freed or not.
			if used := after.TotalAlloc - before.TotalAlloc; used > 100<<20 {
				t.Errorf("it allocated %d MiB", used>>20)
			}
		})
	}
}
