package packager_test

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/keycustody/custodian/internal/packager"
)

func readFile(t testing.TB, path ...string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(append([]string{"testdata"}, path...)...))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// cpixDoc wraps parts in a CPIX element with the usual prefixes.
func cpixDoc(parts string) string {
	return `<cpix:CPIX xmlns:cpix="urn:dashif:org:cpix" xmlns:pskc="urn:ietf:params:xml:ns:keyprov:pskc" contentId="c" version="2.3">` + parts + `</cpix:CPIX>`
}

const (
	kidA = "bc361b2a-ff8f-4f48-93d2-c0a9530485d2"
	kidB = "b57fa21b-02e8-46f9-af60-687ed6a86300"
)

func keyList(kids ...string) string {
	var b strings.Builder
	for _, kid := range kids {
		fmt.Fprintf(&b, `<cpix:ContentKey kid="%s"/>`, kid)
	}
	return "<cpix:ContentKeyList>" + b.String() + "</cpix:ContentKeyList>"
}

func TestParseCPIX(t *testing.T) {
	for _, test := range []struct {
		file                           string
		content, version               string
		keys, systems, periods, rules  int
		deliveries                     int
		firstKID, firstScheme, firstIV string
		firstTrack                     string
	}{
		{file: "speke/small.request.xml", content: "test_case_36d832cb-25b0-4b09-855d-a47cb7f1ba57", version: "2.3", keys: 2, systems: 2, periods: 1, rules: 2,
			firstKID: "bc361b2a-ff8f-4f48-93d2-c0a9530485d2", firstScheme: "cenc", firstTrack: "VIDEO"},
		{file: "speke/live-5keys-3drms.request.xml", content: "test_case_a8a231f1-d608-484b-9ede-576b1edae492", version: "2.3", keys: 5, systems: 15, periods: 1, rules: 5,
			firstKID: "43970b0b-50d7-4ecb-9a43-db2379ea7650", firstScheme: "cbcs", firstTrack: "SD"},
		{file: "cpix/ClearContentKeysOnly.xml", keys: 4, firstKID: "40d02dd1-61a3-4787-a155-572325d47b80"},
		{file: "cpix/KeyRotationMultiKeyMulitPeriod.xml", keys: 4, periods: 2, rules: 4,
			firstKID: "7ce7f10d-a91b-41b9-b331-7999fd1abf4c", firstIV: "f45bcebbf0df4a34bf4ec24edfcf6289"},
		{file: "cpix/EncryptedContentKeys.xml", keys: 4, deliveries: 1, firstKID: "bd5adf51-cf04-410f-aac3-ec63a69e929e"},
		{file: "cpix/EncryptedContentKeysWithMultipleRecipients.xml", keys: 4, deliveries: 4},
	} {
		t.Run(filepath.Base(test.file), func(t *testing.T) {
			d, err := packager.ParseCPIX(readFile(t, filepath.FromSlash(test.file)))
			if err != nil {
				t.Fatal(err)
			}
			got := fmt.Sprint(d.ContentID, d.Version, len(d.Keys), len(d.Systems), len(d.Periods), len(d.Rules), len(d.Deliveries))
			if want := fmt.Sprint(test.content, test.version, test.keys, test.systems, test.periods, test.rules, test.deliveries); got != want {
				t.Errorf("got %s, want %s", got, want)
			}
			if got := d.Keys[0].KID.String(); test.firstKID != "" && got != test.firstKID {
				t.Errorf("first KID: got %s, want %s", got, test.firstKID)
			}
			if d.Keys[0].Scheme != test.firstScheme || hex.EncodeToString(d.Keys[0].IV) != test.firstIV {
				t.Errorf("first key: got scheme %q and IV %x, want %q and %s", d.Keys[0].Scheme, d.Keys[0].IV, test.firstScheme, test.firstIV)
			}
			if len(d.Rules) > 0 && d.Rules[0].TrackType != test.firstTrack {
				t.Errorf("first track type: got %q, want %q", d.Rules[0].TrackType, test.firstTrack)
			}
			// What is written is the same document, and its own fixed point.
			again, err := packager.ParseCPIX(d.Encode())
			if err != nil {
				t.Fatalf("what Encode wrote: %v", err)
			}
			if !bytes.Equal(again.Encode(), d.Encode()) {
				t.Error("written, read and written again, the document has changed")
			}
		})
	}
}

// The order of elements is free, and so are prefixes.
func TestParseCPIXOrder(t *testing.T) {
	doc := `<CPIX version="2.4" xmlns="urn:dashif:org:cpix" contentId="c">
		<ContentKeyUsageRuleList><ContentKeyUsageRule kid="` + kidA + `" intendedTrackType="SD"><VideoFilter maxPixels="589824"/><KeyPeriodFilter periodId="p"/></ContentKeyUsageRule></ContentKeyUsageRuleList>
		<ContentKeyPeriodList><ContentKeyPeriod end="2026-01-01T00:01:00Z" start="2026-01-01T00:00:00" index="7" id="p"/></ContentKeyPeriodList>
		<!-- a comment --><ContentKeyList><ContentKey kid="` + strings.ToUpper(kidA) + `"/></ContentKeyList></CPIX>`
	d, err := packager.ParseCPIX([]byte("\ufeff" + doc))
	if err != nil {
		t.Fatal(err)
	}
	p := d.Periods[0]
	if !p.Set || p.Index != 7 || p.End.Sub(p.Start) != time.Minute {
		t.Errorf("period: got %+v, want index 7 and one minute", p)
	}
	if r := d.Rules[0]; r.TrackType != "SD" || r.Video != 1 || len(r.Periods) != 1 {
		t.Errorf("rule: got %+v", r)
	}
}

// TestHostileCPIX: every fault is found and named, quickly and in little
// memory.
func TestHostileCPIX(t *testing.T) {
	utf16 := func(s string) string {
		b := []byte{0xff, 0xfe}
		for _, c := range []byte(s) {
			b = append(b, c, 0)
		}
		return string(b)
	}
	system := func(attrs, inner string) string {
		return "<cpix:DRMSystemList><cpix:DRMSystem " + attrs + ">" + inner + "</cpix:DRMSystem></cpix:DRMSystemList>"
	}
	rule := func(inner string) string {
		return keyList(kidA) + `<cpix:ContentKeyUsageRuleList><cpix:ContentKeyUsageRule kid="` + kidA + `">` + inner + `</cpix:ContentKeyUsageRule></cpix:ContentKeyUsageRuleList>`
	}
	period := func(attrs string) string {
		return "<cpix:ContentKeyPeriodList><cpix:ContentKeyPeriod " + attrs + "/></cpix:ContentKeyPeriodList>"
	}
	bomb := `<!DOCTYPE lolz [<!ENTITY a "aaaaaaaaaa">`
	for i := range 9 {
		bomb += fmt.Sprintf(`<!ENTITY a%d "%s">`, i, strings.Repeat(fmt.Sprintf("&a%d;", i-1), 10))
	}
	sid := `systemId="edef8ba9-79d6-4ace-a3c8-27dcd51d21ed"`
	for _, test := range []struct{ name, doc, want string }{
		{"empty", "", "no cpix:CPIX"},
		{"not XML", "key=value", "text outside"},
		{"JSON", `{"a":1}`, "text outside"},
		{"zero bytes", strings.Repeat("\x00", 1000), "not well-formed"},
		{"cut off", cpixDoc(keyList(kidA))[:150], "not well-formed"},
		{"another root", `<a/>`, "must be one cpix:CPIX"},
		{"CPIX of no namespace", `<CPIX/>`, "must be one cpix:CPIX"},
		{"an undeclared prefix", `<cpix:CPIX/>`, "must be one cpix:CPIX"},
		{"two roots", cpixDoc("") + cpixDoc(""), "must be one cpix:CPIX"},
		{"text after", cpixDoc("") + "x", "text outside"},

		{"entity bomb", bomb + "]>" + cpixDoc("&a8;"), "document type or entity"},
		{"quadratic entity", `<!DOCTYPE x [<!ENTITY a "` + strings.Repeat("a", 100_000) + `">]>` + cpixDoc(strings.Repeat("&a;", 100_000)), "document type or entity"},
		{"external entity", `<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]>` + cpixDoc("&a;"), "document type or entity"},
		{"external DTD", `<!DOCTYPE x SYSTEM "http://127.0.0.1:1/x.dtd">` + cpixDoc(""), "document type or entity"},
		{"an entity of nobody", cpixDoc("&a;"), "not well-formed"},
		{"an entity in an attribute", strings.Replace(cpixDoc(""), `"c"`, `"&a;"`, 1), "not well-formed"},
		{"style sheet", `<?xml-stylesheet href="http://127.0.0.1:1/"?>` + cpixDoc(""), "processing instruction"},
		{"XInclude", cpixDoc(`<xi:include xmlns:xi="http://www.w3.org/2001/XInclude" href="file:///etc/passwd"/>`), "has no place"},
		{"cipher reference", `<cpix:CPIX xmlns:cpix="urn:dashif:org:cpix" xmlns:pskc="urn:ietf:params:xml:ns:keyprov:pskc" xmlns:e="http://www.w3.org/2001/04/xmlenc#"><cpix:ContentKeyList><cpix:ContentKey kid="` + kidA +
			`"><cpix:Data><pskc:Secret><pskc:EncryptedValue><e:CipherData><e:CipherReference URI="http://127.0.0.1:1/"/></e:CipherData></pskc:EncryptedValue></pskc:Secret></cpix:Data></cpix:ContentKey></cpix:ContentKeyList></cpix:CPIX>`, "enc}CipherReference|CipherReference: has no place"},

		{"UTF-16", utf16(cpixDoc("")), "not well-formed"},
		{"UTF-16 by name", `<?xml version="1.0" encoding="UTF-16"?>` + cpixDoc(""), "not well-formed"},
		{"Latin 1 by name", `<?xml version="1.0" encoding="ISO-8859-1"?>` + cpixDoc(""), "not well-formed"},
		{"UTF-7 by name", `<?xml version="1.0" encoding="UTF-7"?>` + cpixDoc(""), "not well-formed"},
		{"bytes that are no UTF-8", strings.Replace(cpixDoc(""), `"c"`, "\"\xff\xfe\"", 1), "not well-formed"},
		{"XML 1.1", `<?xml version="1.1"?>` + cpixDoc(""), "not well-formed"},

		{"too large", cpixDoc(strings.Repeat(" ", packager.MaxDocumentSize)), "bytes: must be at most"},
		{"1,000,000 elements", cpixDoc("<cpix:ContentKeyList>" + strings.Repeat("<cpix:ContentKey/>", 1_000_000) + "</cpix:ContentKeyList>"), "bytes: must be at most"},
		{"many elements", cpixDoc("<cpix:ContentKeyList>" + strings.Repeat("<cpix:ContentKey/>", 100_000) + "</cpix:ContentKeyList>"), "more than 32768 elements"},
		{"deep", `<cpix:CPIX xmlns:cpix="urn:dashif:org:cpix">` + strings.Repeat("<cpix:CPIX>", 100_000), "has no place"},
		{"many attributes", `<cpix:CPIX ` + strings.Repeat(`xmlns:a="b" `, 100_000) + `/>`, "must be one cpix:CPIX|attributes: must be at most"},
		{"a long name", "<" + strings.Repeat("a", 1<<20) + "/>", "must be one cpix:CPIX"},
		{"many comments", cpixDoc(strings.Repeat("<!---->", 250_000) + "x"), "holds text"},

		{"unknown namespace", cpixDoc(`<x:ContentKeyList xmlns:x="urn:x"/>`), "has no place"},
		{"unknown element", cpixDoc(`<cpix:Keys/>`), "has no place"},
		{"element in the wrong place", cpixDoc(`<cpix:ContentKey kid="` + kidA + `"/>`), "has no place"},
		{"unknown attribute", cpixDoc(`<cpix:ContentKeyList a="b"/>`), "no such attribute"},
		{"attribute of another namespace", cpixDoc(`<cpix:ContentKeyList xmlns:x="urn:x" x:id="b"/>`), "no such attribute"},
		{"an attribute twice", cpixDoc(`<cpix:ContentKeyList id="a" id="b"/>`), "twice|not well-formed"},
		{"a list twice", cpixDoc(keyList(kidA) + keyList(kidB)), "is in cpix:CPIX twice"},
		{"text in a list", cpixDoc(`<cpix:ContentKeyList>x</cpix:ContentKeyList>`), "holds text"},
		{"an id twice", cpixDoc(`<cpix:ContentKeyList id="a"/><cpix:DRMSystemList id="a"/>`), "the id of another element"},
		{"an empty id", cpixDoc(`<cpix:ContentKeyList id=""/>`), "is empty"},
		{"signature", cpixDoc(`<ds:Signature xmlns:ds="http://www.w3.org/2000/09/xmldsig#"/>`), "has no place"},

		{"version", strings.Replace(cpixDoc(""), `"2.3"`, `"3.0"`, 1), "CPIX@version"},
		{"no kid", cpixDoc(`<cpix:ContentKeyList><cpix:ContentKey/></cpix:ContentKeyList>`), "ContentKey[0]@kid: is missing"},
		{"bad kid", cpixDoc(keyList("x")), "ContentKey[0]@kid"},
		{"zero kid", cpixDoc(keyList("00000000-0000-0000-0000-000000000000")), "ContentKey[0]@kid"},
		{"a kid twice", cpixDoc(keyList(kidA, kidB, strings.ToUpper(kidA))), "ContentKey[2]@kid"},
		{"short IV", cpixDoc(strings.Replace(keyList(kidA), "/>", ` explicitIV="AAAA"/>`, 1)), "explicitIV"},
		{"no system", cpixDoc(keyList(kidA) + system(`kid="`+kidA+`"`, "")), "DRMSystem[0]@systemId: is missing"},
		{"bad system", cpixDoc(keyList(kidA) + system(`systemId="widevine" kid="`+kidA+`"`, "")), "DRMSystem[0]@systemId"},
		{"system of an unknown kid", cpixDoc(keyList(kidA) + system(sid+` kid="`+kidB+`"`, "")), "DRMSystem[0]@kid"},
		{"playlist", cpixDoc(keyList(kidA) + system(sid+` kid="`+kidA+`"`, `<cpix:HLSSignalingData playlist="x"/>`)), "playlist"},
		{"a playlist twice", cpixDoc(keyList(kidA) + system(sid+` kid="`+kidA+`"`, strings.Repeat(`<cpix:HLSSignalingData playlist="media"/>`, 2))), "twice"},
		{"rule of an unknown kid", cpixDoc(strings.Replace(rule(""), `Rule kid="`+kidA, `Rule kid="`+kidB, 1)), "ContentKeyUsageRule[0]@kid"},
		{"unknown period", cpixDoc(rule(`<cpix:KeyPeriodFilter periodId="p"/>`)), "no ContentKeyPeriod"},
		{"a period that is something else's id", cpixDoc(strings.Replace(rule(`<cpix:KeyPeriodFilter periodId="p"/>`), "<cpix:ContentKeyList", `<cpix:ContentKeyList id="p"`, 1)), "no ContentKeyPeriod"},
		{"filter bounds", cpixDoc(rule(`<cpix:VideoFilter minPixels="2" maxPixels="1"/>`)), "minPixels"},
		{"filter number", cpixDoc(rule(`<cpix:AudioFilter maxChannels="-1"/>`)), "maxChannels"},
		{"filter boolean", cpixDoc(rule(`<cpix:VideoFilter hdr="yes"/>`)), "hdr"},
		{"period index", cpixDoc(period(`index="4294967296"`)), "index"},
		{"period time", cpixDoc(period(`index="1" start="yesterday"`)), "start"},
		{"period order", cpixDoc(period(`index="1" start="2026-01-02T00:00:00Z" end="2026-01-01T00:00:00Z"`)), "ends before"},
		{"period year", cpixDoc(period(`index="1" start="9999-01-02T00:00:00Z"`)), "1970 to 2199"},
		{"period offset", cpixDoc(period(`index="1" startOffset="60s"`)), "startOffset"},
		{"empty offset", cpixDoc(period(`index="1" startOffset="PT"`)), "startOffset"},
	} {
		t.Run(test.name, func(t *testing.T) {
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			start := time.Now()
			_, err := packager.ParseCPIX([]byte(test.doc))
			took := time.Since(start)
			runtime.ReadMemStats(&after)
			if err == nil {
				t.Fatal("accepted")
			}
			named := false
			for want := range strings.SplitSeq(test.want, "|") {
				named = named || strings.Contains(err.Error(), want)
			}
			if !named {
				t.Errorf("got %.300q, want it to say %q", err, test.want)
			}
			if len(err.Error()) > 500 {
				t.Errorf("the error has %d bytes: %.200s", len(err.Error()), err)
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

// The largest document that is meant is read in bounded time.
func TestParseCPIXLargest(t *testing.T) {
	var keys, systems, rules strings.Builder
	for i := range 600 {
		kid := fmt.Sprintf("00000000-0000-4000-8000-%012x", i+1)
		fmt.Fprintf(&keys, `<cpix:ContentKey kid="%s" commonEncryptionScheme="cbcs"/>`, kid)
		for j := range 5 {
			fmt.Fprintf(&systems, `<cpix:DRMSystem kid="%s" systemId="00000000-0000-4000-8000-%012x"><cpix:PSSH/><cpix:ContentProtectionData/><cpix:HLSSignalingData playlist="media"/><cpix:HLSSignalingData playlist="master"/></cpix:DRMSystem>`, kid, j)
		}
		fmt.Fprintf(&rules, `<cpix:ContentKeyUsageRule kid="%s" intendedTrackType="T%d"><cpix:VideoFilter/></cpix:ContentKeyUsageRule>`, kid, i)
	}
	doc := cpixDoc("<cpix:ContentKeyList>" + keys.String() + "</cpix:ContentKeyList><cpix:DRMSystemList>" + systems.String() +
		"</cpix:DRMSystemList><cpix:ContentKeyUsageRuleList>" + rules.String() + "</cpix:ContentKeyUsageRuleList>")
	start := time.Now()
	d, err := packager.ParseCPIX([]byte(doc))
	if err != nil {
		t.Fatal(err)
	}
	if len(d.Keys) != 600 || len(d.Systems) != 3000 || len(d.Rules) != 600 {
		t.Errorf("got %d keys, %d systems, %d rules", len(d.Keys), len(d.Systems), len(d.Rules))
	}
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("%d bytes took %s", len(doc), took)
	}
}

// FuzzParseCPIX: no document makes the parser panic, and what it accepts is
// written and read again as the same document.
func FuzzParseCPIX(f *testing.F) {
	for _, file := range []string{"speke/small.request.xml", "cpix/ClearContentKeysOnly.xml", "cpix/KeyRotationMultiKeyMulitPeriod.xml", "cpix/Invalid_WrongMac.xml"} {
		f.Add(readFile(f, filepath.FromSlash(file)))
	}
	f.Add([]byte(cpixDoc(keyList(kidA))))
	f.Fuzz(func(t *testing.T, doc []byte) {
		d, err := packager.ParseCPIX(doc)
		if err != nil {
			return
		}
		written := d.Encode()
		again, err := packager.ParseCPIX(written)
		if err != nil {
			t.Fatalf("what was written is refused: %v\n%s", err, written)
		}
		if !bytes.Equal(again.Encode(), written) {
			t.Fatalf("written twice, it differs:\n%s\n%s", written, again.Encode())
		}
	})
}
