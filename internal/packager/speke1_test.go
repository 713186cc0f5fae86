package packager_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/packager"
	"github.com/keycustody/custodian/internal/secret"
)

// The parts of a request of SPEKE 1.0, as the public specification's examples
// have them: DRM systems and a key period.
const (
	speke1Widevine  = `<cpix:DRMSystem kid="KID" systemId="` + widevineID + `"><cpix:PSSH></cpix:PSSH></cpix:DRMSystem>`
	speke1PlayReady = `<cpix:DRMSystem kid="KID" systemId="` + playReadyID + `"><speke:ProtectionHeader></speke:ProtectionHeader><cpix:PSSH></cpix:PSSH></cpix:DRMSystem>`
	speke1FairPlay  = `<cpix:DRMSystem kid="KID" systemId="` + fairPlayID + `"><cpix:URIExtXKey></cpix:URIExtXKey><speke:KeyFormat></speke:KeyFormat><speke:KeyFormatVersions></speke:KeyFormatVersions></cpix:DRMSystem>`
	speke1AES128    = `<cpix:DRMSystem kid="KID" systemId="81376844-f976-481e-a84e-cc25d39b0b33"><cpix:URIExtXKey></cpix:URIExtXKey><speke:KeyFormat></speke:KeyFormat><speke:KeyFormatVersions></speke:KeyFormatVersions></cpix:DRMSystem>`
	speke1Live      = `<cpix:ContentKeyPeriodList><cpix:ContentKeyPeriod id="keyPeriod_1" index="7" /></cpix:ContentKeyPeriodList>` +
		`<cpix:ContentKeyUsageRuleList><cpix:ContentKeyUsageRule kid="KID"><cpix:KeyPeriodFilter periodId="keyPeriod_1" /></cpix:ContentKeyUsageRule></cpix:ContentKeyUsageRuleList>`
)

// speke1Doc is a request for one key of a content item.
func speke1Doc(id, kid, systems, rest string) string {
	return strings.ReplaceAll(`<cpix:CPIX id="`+id+`" xmlns:cpix="urn:dashif:org:cpix" xmlns:pskc="urn:ietf:params:xml:ns:keyprov:pskc" xmlns:speke="urn:aws:amazon:com:speke">`+
		`<cpix:ContentKeyList><cpix:ContentKey kid="KID" explicitIV="OFj2IjCsPJFfMAxmQxLGPw=="></cpix:ContentKey></cpix:ContentKeyList>`+
		`<cpix:DRMSystemList>`+systems+`</cpix:DRMSystemList>`+rest+`</cpix:CPIX>`, "KID", kid)
}

// A speke1Reply is what SPEKE 1.0 has beyond a spekeReply.
type speke1Reply struct {
	ID      string `xml:"id,attr"`
	Systems []struct {
		System   string  `xml:"systemId,attr"`
		KID      string  `xml:"kid,attr"`
		PSSH     *string `xml:"urn:dashif:org:cpix PSSH"`
		URI      *string `xml:"urn:dashif:org:cpix URIExtXKey"`
		Format   *string `xml:"urn:aws:amazon:com:speke KeyFormat"`
		Versions *string `xml:"urn:aws:amazon:com:speke KeyFormatVersions"`
		Header   *string `xml:"urn:aws:amazon:com:speke ProtectionHeader"`
	} `xml:"urn:dashif:org:cpix DRMSystemList>DRMSystem"`
}

func mustAsk1(t *testing.T, core *custodian.Custodian, body string) (spekeReply, speke1Reply) {
	t.Helper()
	r := mustAsk(t, packager.NewSPEKE(packager.SPEKEConfig{}), core, "", []byte(body))
	var more speke1Reply
	if err := xml.Unmarshal(r.raw, &more); err != nil {
		t.Fatal(err)
	}
	return r, more
}

// bring imports a key that exists, as a studio's.
func bring(t *testing.T, core *custodian.Custodian, content string, kid custodian.KID, key []byte, track custodian.TrackType, scheme custodian.Scheme) {
	t.Helper()
	slot, err := core.Arena().Get()
	if err != nil {
		t.Fatal(err)
	}
	copy(slot, key)
	k := secret.New(core.Arena(), slot, custodian.CEKSize)
	defer k.Destroy()
	anna := custodian.Caller{ID: doorID("officer/anna"), Roles: []custodian.Role{custodian.RoleOfficer}, SPKI: sha256.Sum256([]byte("anna"))}
	if _, err := core.Import(t.Context(), anna, custodian.ImportRequest{Category: "movies", ContentID: []byte(content),
		Keys: []custodian.ImportKey{{KeySpec: custodian.KeySpec{TrackType: track, Scheme: scheme, KID: kid}, Key: k}}}); err != nil {
		t.Fatal(err)
	}
}

// TestSPEKE1KnownAnswers: for a key whose signalling is known, SPEKE 1.0 gives
// that, byte for byte.
func TestSPEKE1KnownAnswers(t *testing.T) {
	core := openCustody(t)
	k := known[knownBoxes](t, "kav-cenc")
	hexKID, hexKey, _ := strings.Cut(k.Keys, ":")
	kid := custodian.KID(unhex(t, hexKID))
	bring(t, core, "abc123", kid, unhex(t, hexKey), "ALL", custodian.SchemeCENC)
	r, more := mustAsk1(t, core, speke1Doc("abc123", kid.String(), speke1Widevine+speke1PlayReady, ""))
	if got := r.keys(t)[kid.String()]; !bytes.Equal(got, unhex(t, hexKey)) || len(r.Keys) != 1 {
		t.Fatalf("got %d keys, and not the known one", len(r.Keys))
	}
	if r.Keys[0].IV != "" {
		t.Error("a key for a counter mode has an IV: every track would start at it")
	}
	if got, want := unbase64(t, *more.Systems[0].PSSH), unhex(t, k.Boxes.Widevine); !bytes.Equal(got, want) {
		t.Errorf("Widevine PSSH\ngot  %x\nwant %x", got, want)
	}
	if got, want := unbase64(t, *more.Systems[1].PSSH), unhex(t, k.Boxes.PlayReady); !bytes.Equal(got, want) {
		t.Errorf("PlayReady PSSH\ngot  %x\nwant %x", got, want)
	}
	if got, want := unbase64(t, *more.Systems[1].Header), unhex(t, k.Boxes.PlayReady)[32:]; !bytes.Equal(got, want) {
		t.Errorf("ProtectionHeader\ngot  %x\nwant %x", got, want)
	}
}

// TestSPEKE1: requests as encryptors send them, for DASH, for HLS, for both, and
// live, have replies with the elements of the request and the key that the DRM
// provider gets too; and the same reply when asked again, whatever KID is asked
// with.
func TestSPEKE1(t *testing.T) {
	for _, test := range []struct {
		name, systems, rest string
		scheme              string
	}{
		{"DASH", speke1Widevine + speke1PlayReady, "", "cenc"},
		{"HLS", speke1FairPlay, "", "cbcs"},
		{"CMAF", speke1FairPlay + speke1Widevine + speke1PlayReady, "", "cbcs"},
		{"live", speke1Widevine + speke1PlayReady, speke1Live, "cenc"},
		{"live HLS", speke1FairPlay, speke1Live, "cbcs"},
	} {
		t.Run(test.name, func(t *testing.T) {
			core := openCustody(t)
			request := speke1Doc("abc123", kidA, test.systems, test.rest)
			r, more := mustAsk1(t, core, request)
			if got, want := outline(t, r.raw), outline(t, []byte(request)); !slices.Equal(got, want) {
				t.Errorf("elements: got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
			}
			if more.ID != "abc123" || len(r.Keys) != 1 || r.Keys[0].KID != kidA {
				t.Fatalf("got %s", r.raw)
			}
			kid := kidOf(t, kidA)
			got, err := core.Retrieve(t.Context(), licenser, custodian.RetrieveRequest{KIDs: []custodian.KID{kid}})
			if err != nil || got[0].Err != nil {
				t.Fatal(err, got)
			}
			info := got[0].Info
			got[0].Key.Use(func(b []byte) {
				if !bytes.Equal(b, r.keys(t)[kidA]) {
					t.Error("the provider gets another key")
				}
			})
			got[0].Key.Destroy()
			if string(info.Scheme) != test.scheme || info.TrackType != "ALL" || string(info.ContentID) != "abc123" || info.HasPeriod != (test.rest != "") || info.HasPeriod && info.Period != 7 {
				t.Errorf("the record is %+v, want scheme %s, track type ALL", info, test.scheme)
			}
			if iv := r.Keys[0].IV; (iv != "") != (test.scheme == "cbcs") || iv != "" && !bytes.Equal(unbase64(t, iv), info.IV) {
				t.Errorf("explicitIV %q; the provider has %x", iv, info.IV)
			}
			for _, sys := range more.Systems {
				switch sys.System {
				case fairPlayID:
					uri := fmt.Sprintf("skd://%s:%X", kidA, info.IV)
					// The last two are known answers of the specification.
					if string(unbase64(t, *sys.URI)) != uri || *sys.Format != "Y29tLmFwcGxlLnN0cmVhbWluZ2tleWRlbGl2ZXJ5" || *sys.Versions != "MQ==" {
						t.Errorf("FairPlay: URI %s, want %s; format %s, versions %s", unbase64(t, *sys.URI), uri, *sys.Format, *sys.Versions)
					}
				case widevineID:
					if box := unbase64(t, *sys.PSSH); !bytes.Equal(box, packager.WidevinePSSH(packager.WidevineData{KIDs: []custodian.KID{kid}, Scheme: info.Scheme})) {
						t.Errorf("Widevine: PSSH %x", box)
					}
				case playReadyID:
					if box := unbase64(t, *sys.PSSH); !bytes.Equal(box[32:], unbase64(t, *sys.Header)) {
						t.Errorf("PlayReady: PSSH %x, ProtectionHeader %s", box, *sys.Header)
					}
				}
			}
			again, _ := mustAsk1(t, core, speke1Doc("abc123", kidB, test.systems, test.rest))
			if !bytes.Equal(again.raw, r.raw) {
				t.Error("the same content, asked for with another KID, has another reply")
			}
		})
	}
}

// TestSPEKE1Encrypted: a document that is encrypted to a pinned certificate
// opens with what the test has written after the specifications.
func TestSPEKE1Encrypted(t *testing.T) {
	core := openCustody(t)
	private, der := newRSA(t, 2048)
	s := packager.NewSPEKE(packager.SPEKEConfig{Encrypted: map[custodian.CategoryName]bool{"movies": true}, Recipients: map[string][]packager.Recipient{encoder.ID: {pinned(t, der, "")}}})
	request := []byte(speke1Doc("abc123", kidA, speke1Widevine, ""))
	if _, err := askSPEKE(t.Context(), s, core, "", request); !errors.Is(err, custodian.ErrDenied) {
		t.Errorf("in clear: got %v, want a denial", err)
	}
	r := mustAsk(t, s, core, "", withRecipients(request, der))
	if bytes.Contains(r.raw, []byte("PlainValue")) {
		t.Error("the reply has a key in clear")
	}
	if opened := specKeys(t, r.raw, private); len(unbase64(t, opened[kidA])) != 16 {
		t.Errorf("opened: %d keys", len(opened))
	}
	if r.Deliveries[0].DocumentKey.Algorithm == "" {
		t.Error("DocumentKey has no Algorithm, which CPIX 2.0 wants")
	}
}

func TestSPEKE1Refuses(t *testing.T) {
	core := openCustody(t)
	s := packager.NewSPEKE(packager.SPEKEConfig{})
	good := speke1Doc("abc123", kidA, speke1Widevine+speke1PlayReady, speke1Live)
	change := func(old, with string) string {
		if !strings.Contains(good, old) {
			t.Fatalf("the request has no %q", old)
		}
		return strings.Replace(good, old, with, 1)
	}
	second := `</cpix:ContentKey><cpix:ContentKey kid="` + kidB + `"/></cpix:ContentKeyList>`
	for _, test := range []struct{ name, version, body, want string }{
		{"no id", "", change(` id="abc123"`, ""), "Missing CPIX@id"},
		{"a document of SPEKE 2", "", change(` id="abc123"`, ` contentId="abc123" version="2.3"`), "Unsupported SPEKE version"},
		{"two names of the content", "", change(` id="abc123"`, ` id="abc123" contentId="b"`), "CPIX@contentId is of SPEKE 2: CPIX@id names the content, and they differ"},
		{"a version in the header", "1.0", good, "Unsupported SPEKE version"},
		{"to SPEKE 2", "2.0", good, "Missing CPIX@version"},
		{"an empty content ID", "", change(`id="abc123"`, `id=""`), `cpix: line 1: cpix:CPIX@id: "" is empty, or the id of another element`},
		{"no key", "", `<cpix:CPIX id="a" xmlns:cpix="urn:dashif:org:cpix"/>`, "Missing ContentKeyList/ContentKey"},
		{"two keys", "", change("</cpix:ContentKey></cpix:ContentKeyList>", second), "ContentKeyList: 2 keys: SPEKE 1.0 has one for each content ID and key period"},
		{"no system", "", speke1Doc("a", kidA, "", ""), "Missing DRMSystemList/DRMSystem"},
		{"AES-128, whose key would lie at a URL for viewers", "", speke1Doc("a", kidA, speke1AES128+speke1FairPlay, ""), "Unsupported DRMSystem@systemId 81376844-f976-481e-a84e-cc25d39b0b33"},
		{"FairPlay with cenc", "", strings.Replace(speke1Doc("a", kidA, speke1FairPlay, ""), " explicitIV", ` commonEncryptionScheme="cenc" explicitIV`, 1), "Non compliant ContentKey@commonEncryptionScheme combination: FairPlay plays only cbcs"},
		{"an unknown scheme", "", change(" explicitIV", ` commonEncryptionScheme="rot13" explicitIV`), `Unsupported ContentKey@commonEncryptionScheme "rot13"`},
		{"a key brought along", "", change("</cpix:ContentKey>", "<cpix:Data/></cpix:ContentKey>"), "ContentKey " + kidA + " has Data: keys are made here, and never taken from a request"},
		{"signalling of SPEKE 2", "", change("<cpix:PSSH>", "<cpix:HLSSignalingData/><cpix:PSSH>"), "DRMSystem " + widevineID + ": HLSSignalingData is not in this version of SPEKE"},
		{"a period and no rule", "", change(good[strings.Index(good, "<cpix:ContentKeyUsageRuleList>"):strings.Index(good, "</cpix:CPIX>")], ""), "Missing ContentKeyUsageRule/KeyPeriodFilter: the document has key periods"},
		{"a period and no filter", "", change(`<cpix:KeyPeriodFilter periodId="keyPeriod_1" />`, ""), "Missing ContentKeyUsageRule/KeyPeriodFilter: the document has key periods"},
		{"a period without index", "", change(` index="7"`, ""), "Missing ContentKeyPeriod@index"},
		{"two periods", "", strings.NewReplacer(`index="7" />`, `index="7" /><cpix:ContentKeyPeriod id="k2" index="8" />`, `periodId="keyPeriod_1" />`, `periodId="keyPeriod_1" /><cpix:KeyPeriodFilter periodId="k2" />`).Replace(good), "KID " + kidA + " is for 2 key periods: a key is for one"},
		{"an element that is not SPEKE's", "", change("<speke:ProtectionHeader>", "<speke:Other/><speke:ProtectionHeader>"), "cpix: line 1: speke:Other: has no place in cpix:DRMSystem"},
	} {
		t.Run(test.name, func(t *testing.T) {
			reply, err := askSPEKE(t.Context(), s, core, test.version, []byte(test.body))
			speke, ok := errors.AsType[*packager.SPEKEError](err)
			if !ok || reply != nil || speke.Status != 422 || speke.Text != test.want {
				t.Errorf("got %v, want 422 %q", err, test.want)
			}
		})
	}
	// One content item cannot be two schemes under one KID.
	mustAsk1(t, core, speke1Doc("film", kidB, speke1Widevine, ""))
	if _, err := askSPEKE(t.Context(), s, core, "", []byte(speke1Doc("film", kidB, speke1FairPlay, ""))); !errors.Is(err, custodian.ErrKIDConflict) {
		t.Errorf("the KID of another scheme: got %v, want a conflict", err)
	}
}

// TestSPEKE1Door: what an encryptor of SPEKE 1.0 sees over HTTPS, and its
// heartbeat.
func TestSPEKE1Door(t *testing.T) {
	k := newDoorKit(t, nil)
	ask := func(method, who, path, body string) (*http.Response, string) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), method, k.url+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		if body != "" {
			req.Header.Set("Content-Type", "application/xml")
		}
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
	good := speke1Doc("abc123", kidA, speke1Widevine, "")
	for _, test := range []struct {
		name, method, who, path, body string
		status                        int
		text                          string // a part
	}{
		{"keys", "POST", doorPackager, "speke", good, 200, "PlainValue>"},
		{"malformed", "POST", doorPackager, "speke", strings.Replace(good, ` id="abc123"`, "", 1), 422, "Missing CPIX@id"},
		{"no grant", "POST", doorNobody, "speke", good, 403, "not granted"},
		{"heartbeat", "GET", doorPackager, "speke/heartbeat", "", 200, "the key provider is there"},
		{"heartbeat of a method that it has not", "POST", doorPackager, "speke/heartbeat", "", 405, "Method Not Allowed"},
	} {
		t.Run(test.name, func(t *testing.T) {
			res, text := ask(test.method, test.who, test.path, test.body)
			if res.StatusCode != test.status || !strings.Contains(text, test.text) {
				t.Errorf("got %d %s, want %d %q", res.StatusCode, text, test.status, test.text)
			}
			if test.status != 405 && (res.Header.Get("Speke-User-Agent") != "Custodian" || res.Header.Get("X-Speke-Version") != "") {
				t.Errorf("headers %v", res.Header)
			}
		})
	}
	k.rpc.SetUnavailable(custodian.ErrStarting)
	if res, text := ask("GET", doorPackager, "speke/heartbeat", ""); res.StatusCode != 503 || res.Header.Get("Retry-After") == "" || text != "the daemon is starting" {
		t.Errorf("heartbeat without a domain: got %d, %v, %q", res.StatusCode, res.Header, text)
	}
}

// FuzzSPEKE1: a request that is accepted names its content, and one key.
func FuzzSPEKE1(f *testing.F) {
	for _, systems := range []string{speke1Widevine + speke1PlayReady, speke1FairPlay, speke1AES128} {
		f.Add([]byte(speke1Doc("abc123", kidA, systems, "")))
		f.Add([]byte(speke1Doc("abc123", kidA, systems, speke1Live)))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		id, keys, err := packager.ParseSPEKE1ForFuzz(body)
		if err != nil {
			if _, ok := errors.AsType[*packager.SPEKEError](err); !ok {
				t.Errorf("got %v, want an error that SPEKE has words for", err)
			}
			return
		}
		if id == "" || len(keys) != 1 || keys[0].KID.IsZero() || keys[0].Scheme.Check() != nil {
			t.Errorf("content %q, keys %+v", id, keys)
		}
	})
}
