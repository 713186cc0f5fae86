package packager_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/packager"
)

// The callers of the SPEKE tests.
var (
	encoder  = custodian.Caller{ID: doorID(doorPackager), Roles: []custodian.Role{custodian.RolePackager}}
	stranger = custodian.Caller{ID: doorID(doorNobody), Roles: []custodian.Role{custodian.RolePackager}}
	licenser = custodian.Caller{ID: doorID(doorProvider), Roles: []custodian.Role{custodian.RoleProvider}}
)

// openCustody is a domain with the category movies.
func openCustody(t *testing.T) *custodian.Custodian {
	t.Helper()
	return newDoorKit(t, nil).core
}

func spekeHeader(version string) http.Header {
	h := http.Header{"Content-Type": {"application/xml"}}
	if version != "" {
		h.Set("X-Speke-Version", version)
	}
	return h
}

// askSPEKE answers a request and returns the document of the reply.
func askSPEKE(ctx context.Context, s *packager.SPEKE, core *custodian.Custodian, version string, body []byte) ([]byte, error) {
	return s.Answer(ctx, issueAs(core, encoder), packager.SPEKERequest{Caller: encoder.ID, Category: "movies", Header: spekeHeader(version), Body: body})
}

func issueAs(core *custodian.Custodian, who custodian.Caller) packager.Issue {
	return func(ctx context.Context, req custodian.IssueRequest) ([]custodian.IssuedKey, error) {
		return core.Issue(ctx, who, req)
	}
}

func mustAsk(t *testing.T, s *packager.SPEKE, core *custodian.Custodian, version string, body []byte) spekeReply {
	t.Helper()
	doc, err := askSPEKE(t.Context(), s, core, version, body)
	if err != nil {
		t.Fatal(err)
	}
	var r spekeReply
	if err := xml.Unmarshal(doc, &r); err != nil {
		t.Fatalf("reply: %v\n%s", err, doc)
	}
	r.raw = doc
	return r
}

// A spekeReply is a reply as an encryptor reads it, by names and namespaces.
type spekeReply struct {
	XMLName   xml.Name `xml:"urn:dashif:org:cpix CPIX"`
	ContentID string   `xml:"contentId,attr"`
	Version   string   `xml:"version,attr"`
	Keys      []struct {
		KID    string `xml:"kid,attr"`
		IV     string `xml:"explicitIV,attr"`
		Secret struct {
			Plain  string       `xml:"urn:ietf:params:xml:ns:keyprov:pskc PlainValue"`
			Sealed *cipherValue `xml:"urn:ietf:params:xml:ns:keyprov:pskc EncryptedValue"`
			MAC    string       `xml:"urn:ietf:params:xml:ns:keyprov:pskc ValueMAC"`
		} `xml:"Data>Secret"`
	} `xml:"urn:dashif:org:cpix ContentKeyList>ContentKey"`
	Systems []struct {
		KID    string  `xml:"kid,attr"`
		System string  `xml:"systemId,attr"`
		PSSH   *string `xml:"PSSH"`
		CPD    *string `xml:"ContentProtectionData"`
		Smooth *string `xml:"SmoothStreamingProtectionHeaderData"`
		HLS    []struct {
			Playlist string `xml:"playlist,attr"`
			Text     string `xml:",chardata"`
		} `xml:"HLSSignalingData"`
	} `xml:"urn:dashif:org:cpix DRMSystemList>DRMSystem"`
	Rules []struct {
		KID   string `xml:"kid,attr"`
		Track string `xml:"intendedTrackType,attr"`
	} `xml:"urn:dashif:org:cpix ContentKeyUsageRuleList>ContentKeyUsageRule"`
	Deliveries []struct {
		Certificate string `xml:"DeliveryKey>X509Data>X509Certificate"`
		DocumentKey struct {
			Algorithm string      `xml:"Algorithm,attr"`
			Sealed    cipherValue `xml:"Data>Secret>EncryptedValue"`
		} `xml:"DocumentKey"`
		MACMethod struct {
			Algorithm string      `xml:"Algorithm,attr"`
			Sealed    cipherValue `xml:"Key>EncryptedValue"`
		} `xml:"MACMethod"`
	} `xml:"urn:dashif:org:cpix DeliveryDataList>DeliveryData"`

	raw []byte
}

type cipherValue struct {
	Method struct {
		Algorithm string `xml:"Algorithm,attr"`
	} `xml:"http://www.w3.org/2001/04/xmlenc# EncryptionMethod"`
	Value string `xml:"http://www.w3.org/2001/04/xmlenc# CipherData>CipherValue"`
}

// keys are the KIDs and keys of a reply in clear.
func (r spekeReply) keys(t *testing.T) map[string][]byte {
	t.Helper()
	found := map[string][]byte{}
	for _, k := range r.Keys {
		found[k.KID] = unbase64(t, k.Secret.Plain)
	}
	return found
}

func unbase64(t *testing.T, s string) []byte {
	t.Helper()
	b, err := base64.StdEncoding.DecodeString(s)
	if err != nil {
		t.Fatalf("%q: %v", s, err)
	}
	return b
}

// outline lists the elements that a request and its reply have in common, with
// their attributes, but for KIDs and IVs.
func outline(t *testing.T, doc []byte) []string {
	t.Helper()
	var lines []string
	depth, skip := 0, 0
	for dec := xml.NewDecoder(bytes.NewReader(doc)); ; {
		tok, err := dec.Token()
		if err != nil {
			break
		}
		switch e := tok.(type) {
		case xml.StartElement:
			depth++
			if skip == 0 && slices.Contains([]string{"Data", "DocumentKey", "MACMethod"}, e.Name.Local) {
				skip = depth
			}
			if skip > 0 {
				continue
			}
			var attrs []string
			for _, a := range e.Attr {
				if a.Name.Space != "xmlns" && a.Name.Local != "xmlns" && a.Name.Local != "kid" && a.Name.Local != "explicitIV" {
					attrs = append(attrs, a.Name.Local+"="+a.Value)
				}
			}
			slices.Sort(attrs)
			lines = append(lines, fmt.Sprint(depth, e.Name, attrs))
		case xml.EndElement:
			if skip == depth {
				skip = 0
			}
			depth--
		}
	}
	return lines
}

const (
	widevineID  = "edef8ba9-79d6-4ace-a3c8-27dcd51d21ed"
	playReadyID = "9a04f079-9840-4286-ab92-e65be0885f95"
	fairPlayID  = "94ce86fb-07ff-4f43-adb8-93d2fa968ca2"
)

// TestSPEKE: replies to captured requests keep the published rules, hold keys
// that the DRM provider gets too, and are the same when asked for again.
func TestSPEKE(t *testing.T) {
	small := readFile(t, "speke", "small.request.xml")
	for _, test := range []struct {
		name, version string
		request       []byte
		scheme        string
	}{
		{"VIDEO and AUDIO", "2.0", small, "cenc"},
		{"five keys, three DRMs", "2.0", readFile(t, "speke", "live-5keys-3drms.request.xml"), "cbcs"},
		{"2.1", "2.1", bytes.ReplaceAll(small, []byte(`version="2.3"`), []byte(`version="2.4"`)), "cenc"},
		{"2.1, HLS's name of the scheme", "2.1", bytes.ReplaceAll(bytes.ReplaceAll(small, []byte(`version="2.3"`), []byte(`version="2.4"`)), []byte(`"cenc"`), []byte(`"SAMPLE-AES"`)), "cbcs"},
		{"VOD", "2.0", withoutPeriods(small), "cenc"},
	} {
		t.Run(test.name, func(t *testing.T) {
			core, s := openCustody(t), packager.NewSPEKE(packager.SPEKEConfig{})
			r := mustAsk(t, s, core, test.version, test.request)
			if got, want := outline(t, r.raw), outline(t, test.request); !slices.Equal(got, want) {
				t.Errorf("elements: got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
			}
			for _, ns := range []string{`xmlns:cpix="urn:dashif:org:cpix"`, `xmlns:pskc="urn:ietf:params:xml:ns:keyprov:pskc"`} {
				if !bytes.Contains(r.raw, []byte(ns)) {
					t.Errorf("%s is not declared", ns)
				}
			}
			if _, err := packager.ParseCPIX(r.raw); err != nil {
				t.Errorf("our own parser: %v", err)
			}
			checkKeys(t, core, r, test.scheme)
			checkSignalling(t, r)
			again := mustAsk(t, s, core, test.version, test.request)
			if !bytes.Equal(again.raw, r.raw) {
				t.Error("the same request has another reply")
			}
		})
	}
}

// withoutPeriods makes a request for VOD of one for a live stream.
func withoutPeriods(live []byte) []byte {
	s := string(live)
	start, end := strings.Index(s, "<cpix:ContentKeyPeriodList>"), strings.Index(s, "</cpix:ContentKeyPeriodList>")
	s = s[:start] + s[end+len("</cpix:ContentKeyPeriodList>"):]
	var lines []string
	for line := range strings.SplitSeq(s, "\n") {
		if !strings.Contains(line, "KeyPeriodFilter") {
			lines = append(lines, line)
		}
	}
	return []byte(strings.Join(lines, "\n"))
}

// checkKeys: every key is one of its own, has an IV where it may, and is what
// the provider gets for the KID, with the track type of its rule.
func checkKeys(t *testing.T, core *custodian.Custodian, r spekeReply, scheme string) {
	t.Helper()
	seen := map[string]bool{}
	for _, k := range r.Keys {
		key, iv := unbase64(t, k.Secret.Plain), unbase64(t, k.IV)
		if len(key) != 16 || seen[string(key)] {
			t.Errorf("key of %s: %d bytes, seen before: %v", k.KID, len(key), seen[string(key)])
		}
		seen[string(key)] = true
		if want := map[string]int{"cbcs": 16}[scheme]; len(iv) != want {
			t.Errorf("IV of %s: %d bytes, want %d", k.KID, len(iv), want)
		}
		kid, err := custodian.ParseKID(k.KID)
		if err != nil {
			t.Fatal(err)
		}
		released, err := core.Retrieve(t.Context(), licenser, custodian.RetrieveRequest{KIDs: []custodian.KID{kid}})
		if err != nil || released[0].Err != nil {
			t.Fatal(err, released)
		}
		released[0].Key.Use(func(b []byte) {
			if !bytes.Equal(b, key) {
				t.Errorf("the provider gets another key for %s", k.KID)
			}
		})
		released[0].Key.Destroy()
		if info := released[0].Info; string(info.Scheme) != scheme || !bytes.Equal(info.IV, iv) {
			t.Errorf("record of %s: %+v", k.KID, info)
		}
		for _, rule := range r.Rules {
			if rule.KID == k.KID && string(released[0].Info.TrackType) != rule.Track {
				t.Errorf("track type of %s: got %s, want %s", k.KID, released[0].Info.TrackType, rule.Track)
			}
		}
	}
}

// checkSignalling holds the rules that AWS's verification of SPEKE 2 providers
// has for each system.
func checkSignalling(t *testing.T, r spekeReply) {
	t.Helper()
	for _, sys := range r.Systems {
		place := sys.System + " of " + sys.KID
		if sys.PSSH == nil {
			t.Fatalf("%s: no PSSH element", place)
		}
		lines := map[string]string{}
		for _, h := range sys.HLS {
			lines[h.Playlist] = string(unbase64(t, h.Text))
		}
		media, isMedia := strings.CutPrefix(lines["media"], "#EXT-X-KEY:")
		master, isMaster := strings.CutPrefix(lines["master"], "#EXT-X-SESSION-KEY:")
		if !isMedia || !isMaster {
			t.Errorf("%s: HLS lines %q", place, lines)
		}
		for _, name := range []string{"METHOD=", "KEYFORMAT=", "KEYFORMATVERSIONS=", "URI="} {
			if a, b := hlsAttribute(media, name), hlsAttribute(master, name); a != b || a == "" {
				t.Errorf("%s: %s is %q for media and %q for master", place, name, a, b)
			}
		}
		if sys.System == fairPlayID {
			if *sys.PSSH != "" || sys.CPD != nil || !strings.Contains(media, "skd://"+sys.KID) {
				t.Errorf("%s: PSSH %q, ContentProtectionData %v, %s", place, *sys.PSSH, sys.CPD, media)
			}
			continue
		}
		box := unbase64(t, *sys.PSSH)
		kid, err := custodian.ParseKID(sys.KID)
		if err != nil {
			t.Fatal(err)
		}
		if id := strings.ReplaceAll(sys.System, "-", ""); len(box) < 32 || fmt.Sprintf("%x", box[12:28]) != id {
			t.Errorf("%s: PSSH %x is of another system", place, box)
		}
		want := `<pssh xmlns="urn:mpeg:cenc:2013">` + *sys.PSSH + `</pssh>`
		if sys.CPD == nil {
			t.Fatalf("%s: no ContentProtectionData", place)
		}
		switch got := string(unbase64(t, *sys.CPD)); sys.System {
		case widevineID:
			if got != want || !bytes.Contains(box, kid[:]) {
				t.Errorf("%s: ContentProtectionData %s, box %x", place, got, box)
			}
		case playReadyID:
			pro := base64.StdEncoding.EncodeToString(box[32:])
			if want += `<pro xmlns="urn:microsoft:playready">` + pro + `</pro>`; got != want {
				t.Errorf("%s: ContentProtectionData\n%s, want\n%s", place, got, want)
			}
		}
	}
}

// hlsAttribute is NAME=value of a line, in which no URI has a comma but after
// its type.
func hlsAttribute(line, name string) string {
	quoted := false
	for attr := range strings.FieldsFuncSeq(line, func(r rune) bool {
		if r == '"' {
			quoted = !quoted
		}
		return r == ',' && !quoted
	}) {
		if strings.HasPrefix(attr, name) {
			return attr
		}
	}
	return ""
}

// A stored KID stands for the requested one in every place of the reply, and
// the keys are those of the first request.
func TestSPEKEStoredKID(t *testing.T) {
	core, s := openCustody(t), packager.NewSPEKE(packager.SPEKEConfig{})
	request := readFile(t, "speke", "live-5keys-3drms.request.xml")
	first := mustAsk(t, s, core, "2.0", request)
	// Another encoder with KIDs of its own; and two KIDs changed places.
	other := string(request)
	swapped := []string{first.Keys[0].KID, first.Keys[1].KID}
	other = strings.NewReplacer(swapped[0], swapped[1], swapped[1], swapped[0], first.Keys[2].KID, kidA, first.Keys[3].KID, kidB).Replace(other)
	second := mustAsk(t, s, core, "2.0", []byte(other))
	if !bytes.Equal(second.raw, first.raw) {
		t.Errorf("got\n%s\nwant\n%s", second.raw, first.raw)
	}
	for _, kid := range []string{kidA, kidB} {
		if bytes.Contains(second.raw, []byte(kid)) {
			t.Errorf("the reply has the KID %s, which is not stored", kid)
		}
	}
	// A KID that is stored for other content is a conflict.
	_, err := askSPEKE(t.Context(), s, core, "2.0", bytes.ReplaceAll(request, []byte("test_case_"), []byte("other_")))
	if !errors.Is(err, custodian.ErrKIDConflict) {
		t.Errorf("KIDs of other content: got %v, want a conflict", err)
	}
}

// Each key period has keys of its own, and its published times are recorded.
func TestSPEKEPeriods(t *testing.T) {
	core, s := openCustody(t), packager.NewSPEKE(packager.SPEKEConfig{})
	request := func(index int) []byte {
		r := string(readFile(t, "speke", "small.request.xml"))
		r = strings.ReplaceAll(r, `version="2.3"`, `version="2.4"`)
		start := time.Date(2026, 1, 1, 0, index, 0, 0, time.UTC)
		r = strings.ReplaceAll(r, `index="0"`, fmt.Sprintf(`index="%d" start="%s" end="%s"`, index, start.Format(time.RFC3339), start.Add(time.Minute).Format(time.RFC3339)))
		return []byte(strings.NewReplacer("bc361b2a", fmt.Sprintf("bc36%04x", index), "b57fa21b", fmt.Sprintf("b57f%04x", index)).Replace(r))
	}
	all := map[string][]byte{}
	for index := range 20 {
		keys := mustAsk(t, s, core, "2.1", request(index)).keys(t)
		for kid, key := range keys {
			for other, known := range all {
				if other == kid || bytes.Equal(known, key) {
					t.Fatalf("period %d has the KID or key %s of a period before", index, kid)
				}
			}
		}
		maps.Copy(all, keys)
		for kid := range keys {
			id, err := custodian.ParseKID(kid)
			if err != nil {
				t.Fatal(err)
			}
			got, err := core.Retrieve(t.Context(), licenser, custodian.RetrieveRequest{KIDs: []custodian.KID{id}})
			if err != nil || got[0].Err != nil {
				t.Fatal(err, got)
			}
			got[0].Key.Destroy()
			info := got[0].Info
			if !info.HasPeriod || int(info.Period) != index || info.PeriodStart.Minute() != index || info.PeriodEnd.Sub(info.PeriodStart) != time.Minute {
				t.Errorf("record of period %d: %+v", index, info)
			}
		}
	}
	if again := mustAsk(t, s, core, "2.1", request(7)).keys(t); len(again) != 2 {
		t.Errorf("%d keys, want 2", len(again))
	} else {
		for kid, key := range again {
			if !bytes.Equal(all[kid], key) {
				t.Errorf("period 7 asked for again: another key for %s", kid)
			}
		}
	}
}

// TestSPEKERefuses: what is documented for SPEKE is said in its words.
func TestSPEKERefuses(t *testing.T) {
	core := openCustody(t)
	s := packager.NewSPEKE(packager.SPEKEConfig{Encrypted: map[custodian.CategoryName]bool{"sealed": true}})
	small := string(readFile(t, "speke", "small.request.xml"))
	replace := func(old, with string, n int) string {
		if !strings.Contains(small, old) {
			t.Fatalf("the request has no %q", old)
		}
		return strings.Replace(small, old, with, n)
	}
	change := func(old, with string) string { return replace(old, with, -1) }
	once := func(old, with string) string { return replace(old, with, 1) }
	cut := func(from, to string) string {
		start := strings.Index(small, from)
		end := strings.Index(small[start:], to)
		if start < 0 || end < 0 {
			t.Fatalf("the request has no %q to %q", from, to)
		}
		return small[:start] + small[start+end+len(to):]
	}
	withContent := func(inner string) string {
		return once(`commonEncryptionScheme="cenc" />`, `commonEncryptionScheme="cenc">`+inner+`</cpix:ContentKey>`)
	}
	for _, test := range []struct {
		name, version, body string
		status              int
		want                string // the whole text, or with ... its beginning
	}{
		{"no version of SPEKE", "", small, 422, "Unsupported SPEKE version"},
		{"version 3", "3.0", small, 422, "Unsupported SPEKE version"},
		{"empty", "2.0", "", 422, "cpix: ..."},
		{"not XML", "2.0", "hello", 422, "cpix: ..."},
		{"no content ID", "2.0", change(` contentId="test_case_36d832cb-25b0-4b09-855d-a47cb7f1ba57"`, ""), 422, "Missing CPIX@contentId"},
		{"no version of CPIX", "2.0", change(` version="2.3"`, ""), 422, "Missing CPIX@version"},
		{"an unknown version of CPIX", "2.0", change(`version="2.3"`, `version="5"`), 422, "Unsupported CPIX@version"},
		{"the version of CPIX of SPEKE 2.1", "2.0", change(`version="2.3"`, `version="2.4"`), 422, "Unsupported CPIX@version"},
		{"the version of CPIX of SPEKE 2.0", "2.1", small, 422, "Unsupported CPIX@version"},
		{"an id as of SPEKE 1", "2.0", change(` version=`, ` id="x" version=`), 422, "CPIX@id is of SPEKE 1..."},
		{"no keys", "2.0", cut("<cpix:ContentKeyList>", "</cpix:ContentKeyList>"), 422, "cpix: DRMSystem[0]@kid..."},
		{"no systems", "2.0", cut("<cpix:DRMSystemList>", "</cpix:DRMSystemList>"), 422, "Missing DRMSystemList/DRMSystem"},
		{"no rules", "2.0", cut("<cpix:ContentKeyUsageRuleList>", "</cpix:ContentKeyUsageRuleList>"), 422, "Missing ContentKeyUsageRuleList/ContentKeyUsageRule"},
		{"no rule for a key", "2.0", cut("<cpix:ContentKeyUsageRule kid", "</cpix:ContentKeyUsageRule>"), 422, "Missing ContentKeyUsageRule for KID " + kidA},
		{"nothing but the element", "2.0", cpixDoc(""), 422, "Missing ContentKeyList/ContentKey"},
		{"no scheme", "2.0", change(` commonEncryptionScheme="cenc"`, ""), 422, "Missing ContentKey@commonEncryptionScheme for KID " + kidA},
		{"mixed schemes", "2.0", once(`"cenc"`, `"cbcs"`), 422, "Non compliant ContentKey@commonEncryptionScheme combination"},
		{"FairPlay with cenc", "2.0", change(widevineID, fairPlayID), 422, "Non compliant ContentKey@commonEncryptionScheme combination..."},
		{"HLS with cens", "2.0", change(`"cenc"`, `"cens"`), 422, "Non compliant ContentKey@commonEncryptionScheme combination..."},
		{"an unknown scheme", "2.0", change(`"cenc"`, `"rot13"`), 422, "Unsupported ContentKey@commonEncryptionScheme..."},
		{"HLS's name of the scheme in 2.0", "2.0", change(`"cenc"`, `"SAMPLE-AES"`), 422, "Unsupported ContentKey@commonEncryptionScheme..."},
		{"no kid", "2.0", change(`ContentKey kid="`+kidA+`"`, `ContentKey`), 422, "cpix: ContentKey[0]@kid: is missing"},
		{"no system ID", "2.0", change(` systemId="`+widevineID+`"`, ""), 422, "cpix: DRMSystem[0]@systemId: is missing"},
		{"an unknown system", "2.0", change(widevineID, "00000000-0000-4000-8000-000000000001"), 422, "Unsupported DRMSystem@systemId..."},
		{"signalling of SPEKE 1", "2.0", once("<cpix:PSSH />", "<cpix:URIExtXKey/>"), 422, "DRMSystem " + widevineID + ": URIExtXKey..."},
		{"no track type", "2.0", change(` intendedTrackType="VIDEO"`, ""), 422, "Missing ContentKeyUsageRule[0]@intendedTrackType"},
		{"ALL and more", "2.0", change(`"VIDEO"`, `"ALL"`), 422, `ContentKeyUsageRule[0]@intendedTrackType: "ALL"...`},
		{"no filter", "2.0", change("<cpix:VideoFilter />", ""), 422, "Missing ContentKeyUsageRule[0]/VideoFilter or AudioFilter"},
		{"too few filters", "2.0", change(`"VIDEO"`, `"SD+HD"`), 422, "ContentKeyUsageRule[0]: intendedTrackType..."},
		{"no period filter", "2.0", cut("<cpix:KeyPeriodFilter", "/>"), 422, "Missing ContentKeyUsageRule[0]/KeyPeriodFilter..."},
		{"a period without index", "2.0", change(` index="0"`, ""), 422, "ContentKeyPeriod..."},
		{"a label filter", "2.0", once("<cpix:VideoFilter />", `<cpix:VideoFilter/><cpix:LabelFilter label="x"/>`), 422, "ContentKeyUsageRule[0]: LabelFilter..."},
		{"a key brought along", "2.0", withContent("<cpix:Data/>"), 422, "ContentKey " + kidA + " has Data..."},
		{"a key of other content", "2.1", strings.Replace(change(`version="2.3"`, `version="2.4"`), `ContentKey kid="`+kidA+`"`, `ContentKey contentId="x" kid="`+kidA+`"`, 1), 422, "ContentKey " + kidA + ": its contentId..."},
		{"a key hierarchy", "2.0", change(`ContentKey kid="`+kidA+`"`, `ContentKey dependsOnKey="`+kidB+`" kid="`+kidA+`"`), 422, "ContentKey " + kidA + ": dependsOnKey..."},
		{"two track types", "2.0", strings.Replace(small, `<cpix:ContentKeyUsageRule kid="`+kidB, `<cpix:ContentKeyUsageRule kid="`+kidA+`" intendedTrackType="SD"><cpix:KeyPeriodFilter periodId="keyPeriod_4cdb00a9-a04b-4643-9987-9471cb76fee1"/><cpix:VideoFilter/></cpix:ContentKeyUsageRule><cpix:ContentKeyUsageRule kid="`+kidB, 1), 422, "ContentKeyUsageRule[1]: KID " + kidA + "..."},
	} {
		t.Run(test.name, func(t *testing.T) {
			reply, err := askSPEKE(t.Context(), s, core, test.version, []byte(test.body))
			speke, ok := errors.AsType[*packager.SPEKEError](err)
			if !ok || reply != nil {
				t.Fatalf("got %v, want a SPEKEError", err)
			}
			beginning, short := strings.CutSuffix(test.want, "...")
			if speke.Status != test.status || speke.Text != test.want && (!short || !strings.HasPrefix(speke.Text, beginning)) {
				t.Errorf("got %d %q, want %d %q", speke.Status, speke.Text, test.status, test.want)
			}
			if !errors.Is(err, custodian.ErrInvalid) {
				t.Error("it does not count as a malformed request")
			}
		})
	}
	t.Run("nothing was issued", func(t *testing.T) {
		kid, err := custodian.ParseKID(kidA)
		if err != nil {
			t.Fatal(err)
		}
		got, err := core.Retrieve(t.Context(), licenser, custodian.RetrieveRequest{KIDs: []custodian.KID{kid}})
		if err != nil || !errors.Is(got[0].Err, custodian.ErrKeyNotFound) {
			t.Errorf("got %v, %v, want no key", err, got)
		}
	})
	for _, test := range []struct {
		name     string
		who      custodian.Caller
		category custodian.CategoryName
		content  string
		status   int // of a SPEKEError
		want     error
	}{
		{"a caller without the grant", stranger, "movies", "application/xml", 0, custodian.ErrDenied},
		{"a category that is not granted", encoder, "none", "application/xml", 0, custodian.ErrDenied},
		{"a category that wants encrypted documents, to a caller without a recipient", encoder, "sealed", "application/xml", 0, custodian.ErrDenied},
		{"another type of content", encoder, "movies", "application/json", 415, custodian.ErrInvalid},
		{"no type of content", encoder, "movies", "", 415, custodian.ErrInvalid},
		{"another character set", encoder, "movies", "application/xml; charset=iso-8859-1", 415, custodian.ErrInvalid},
	} {
		t.Run(test.name, func(t *testing.T) {
			h := spekeHeader("2.0")
			h.Set("Content-Type", test.content)
			reply, err := s.Answer(t.Context(), issueAs(core, test.who), packager.SPEKERequest{Caller: test.who.ID, Category: test.category, Header: h, Body: []byte(small)})
			if !errors.Is(err, test.want) || reply != nil {
				t.Errorf("got %v, want %v", err, test.want)
			}
			if speke, ok := errors.AsType[*packager.SPEKEError](err); ok != (test.status != 0) || ok && speke.Status != test.status {
				t.Errorf("got %#v, want status %d", err, test.status)
			}
		})
	}
}

// TestSPEKEDoor: what an encryptor sees over HTTPS, status, headers and words.
func TestSPEKEDoor(t *testing.T) {
	_, der := newRSA(t, 2048)
	k := newDoorKit(t, func(c *packager.Config) {
		c.Hold = 300 * time.Millisecond
		c.SPEKE = packager.SPEKEConfig{Recipients: map[string][]packager.Recipient{encoder.ID: {pinned(t, der, "")}}}
	})
	small := readFile(t, "speke", "small.request.xml")
	ask := func(who, category, version string, body []byte) (*http.Response, string) {
		t.Helper()
		url := strings.Replace(k.url, "/movies/", "/"+category+"/", 1) + "speke"
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header = spekeHeader(version)
		res, err := k.client(t, who).Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		text, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		return res, string(text)
	}
	for _, test := range []struct {
		name, who, category, version string
		body                         []byte
		status                       int
		text                         string // the whole of it; of a document, a part
	}{
		{"keys", doorPackager, "movies", "2.0", small, 200, "PlainValue>"},
		{"encrypted keys", doorPackager, "movies", "2.0", withRecipients(small, der), 200, "<cpix:DocumentKey"},
		{"no version", doorPackager, "movies", "", small, 422, "Unsupported SPEKE version"},
		{"no content ID", doorPackager, "movies", "2.0", []byte(strings.Replace(cpixDoc(""), ` contentId="c"`, "", 1)), 422, "Missing CPIX@contentId"},
		{"a long content ID", doorPackager, "movies", "2.0", bytes.ReplaceAll(small, []byte("test_case_"), bytes.Repeat([]byte("x"), 300)), 422, "content_id: content ID of 336 bytes: must be 1 to 300"},
		{"a caller without a grant", doorNobody, "movies", "2.0", small, 403, "not granted"},
		{"a category of others", doorOther, "movies", "2.0", small, 403, "not granted"},
		{"an unknown category", doorPackager, "none", "2.0", small, 403, "not granted"},
		{"an unknown category, to who may know", doorChief, "none", "2.0", small, 404, "no such category"},
		{"KIDs of other content", doorPackager, "movies", "2.0", bytes.ReplaceAll(small, []byte("test_case_"), []byte("other_")), 409, "the KID is in use for other content"},
		{"too large", doorPackager, "movies", "2.0", make([]byte, packager.MaxDocumentSize+1), 422, fmt.Sprintf("body: it has more than %d bytes", packager.MaxDocumentSize)},
	} {
		t.Run(test.name, func(t *testing.T) {
			res, text := ask(test.who, test.category, test.version, test.body)
			if res.StatusCode != test.status || res.Header.Get("X-Speke-User-Agent") != "Custodian" || res.Header.Get("X-Request-Id") == "" {
				t.Errorf("got %d, %v, want %d: %s", res.StatusCode, res.Header, test.status, text)
			}
			kind := "text/plain; charset=utf-8"
			if test.status == 200 {
				kind = "application/xml"
			}
			if got := res.Header.Get("Content-Type"); got != kind {
				t.Errorf("Content-Type %q, want %q", got, kind)
			}
			if test.name != "too large" && res.Header.Get("X-Speke-Version") != test.version {
				t.Errorf("X-Speke-Version %q, want %q", res.Header.Get("X-Speke-Version"), test.version)
			}
			if test.status == 200 && !strings.Contains(text, test.text) || test.status != 200 && text != test.text {
				t.Errorf("got %q, want %q", text, test.text)
			}
		})
	}
	_, stolen := newRSA(t, 2048)
	if res, text := ask(doorPackager, "movies", "2.0", withRecipients(small, stolen)); res.StatusCode != 403 || !strings.HasPrefix(text, "DeliveryData[0]: the certificate with SHA-256 ") {
		t.Errorf("a certificate that is not pinned: got %d, %q", res.StatusCode, text)
	}
	if log := k.log.String(); !strings.Contains(log, "SPEKE refused") || !strings.Contains(log, encoder.ID) {
		t.Errorf("the log does not say who asked for a certificate that is not pinned: %s", log)
	}
	k.rpc.SetUnavailable(custodian.ErrStarting)
	if res, text := ask(doorPackager, "movies", "2.0", small); res.StatusCode != 503 || res.Header.Get("Retry-After") == "" || text != "the daemon is starting" {
		t.Errorf("no domain yet: got %d, %v, %q", res.StatusCode, res.Header, text)
	}
}

// TestSPEKEHold: trouble of the token's that passes is waited out in the middle of
// a request; what stays is told.
func TestSPEKEHold(t *testing.T) {
	small := readFile(t, "speke", "small.request.xml")
	for _, test := range []struct {
		name   string
		fail   func(*doorKit)
		hold   time.Duration
		status int
		text   string
	}{
		{"passes", func(k *doorKit) { k.hsm.Fail("Random", custodian.ErrHSMUnavailable, 2) }, 10 * time.Second, 200, "PlainValue"},
		{"after it was done", func(k *doorKit) { k.hsm.FailAfter("Seal", custodian.ErrHSMUnavailable, 2) }, 10 * time.Second, 200, "PlainValue"},
		{"stays", func(k *doorKit) { k.hsm.Fail("Random", custodian.ErrHSMUnavailable, 1000) }, 300 * time.Millisecond, 503, "the HSM is out of reach"},
		{"too much", func(k *doorKit) { k.hsm.Fail("Random", custodian.ErrRate, 1000) }, 300 * time.Millisecond, 429, "too many calls"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			k := newDoorKit(t, func(c *packager.Config) { c.Hold = test.hold })
			test.fail(k)
			req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, k.url+"speke", bytes.NewReader(small))
			if err != nil {
				t.Fatal(err)
			}
			req.Header = spekeHeader("2.0")
			res, err := k.client(t, doorPackager).Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer res.Body.Close()
			text, err := io.ReadAll(res.Body)
			if err != nil || res.StatusCode != test.status || !bytes.Contains(text, []byte(test.text)) || (res.Header.Get("Retry-After") != "") != (test.status != 200) {
				t.Errorf("got %d, %v, %s, %v; want %d %q", res.StatusCode, res.Header, text, err, test.status, test.text)
			}
		})
	}
}

// What docs/OPERATIONS.md tells to paste works.
func TestSPEKEDocumented(t *testing.T) {
	page, err := os.ReadFile("../../docs/OPERATIONS.md")
	if err != nil {
		t.Fatal(err)
	}
	_, after, found := bytes.Cut(page, []byte("```xml\n<cpix:CPIX"))
	request, _, ends := bytes.Cut(append([]byte("<cpix:CPIX"), after...), []byte("```"))
	if !found || !ends {
		t.Fatal("the page has no CPIX document")
	}
	r := mustAsk(t, packager.NewSPEKE(packager.SPEKEConfig{}), openCustody(t), "2.0", request)
	if len(r.keys(t)) != 2 || len(r.Systems) != 2 {
		t.Errorf("got %s", r.raw)
	}
	_, after, found = bytes.Cut(page, []byte("```\n<cpix:CPIX"))
	request, _, ends = bytes.Cut(append([]byte("<cpix:CPIX"), after...), []byte("```"))
	if !found || !ends {
		t.Fatal("the page has no CPIX document of SPEKE 1.0")
	}
	if r, more := mustAsk1(t, openCustody(t), string(request)); len(r.keys(t)) != 1 || *more.Systems[0].URI == "" {
		t.Errorf("got %s", r.raw)
	}
}
