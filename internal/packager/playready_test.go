package packager_test

import (
	"encoding/base64"
	"encoding/json"
	"encoding/xml"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/packager"
)

func capturedSOAP(t testing.TB) string {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join("testdata", "playready-soap-request.json"))
	if err != nil {
		t.Fatal(err)
	}
	var c struct {
		Body string `json:"request_body"`
	}
	if err := json.Unmarshal(raw, &c); err != nil {
		t.Fatal(err)
	}
	return c.Body
}

func TestPlayReadyServer(t *testing.T) {
	k := newDoorKit(t, nil)
	c := k.client(t, doorPackager)
	status, body := post(t, c, k.url+"playready", []byte(capturedSOAP(t)))
	if status != http.StatusOK {
		t.Fatalf("got %d %s", status, body)
	}
	var v struct {
		KID    string `xml:"Body>AcquirePackagingDataResponse>PackagingData>KeyId"`
		Key    string `xml:"Body>AcquirePackagingDataResponse>PackagingData>KeyData"`
		Object string `xml:"Body>AcquirePackagingDataResponse>PackagingData>Data"`
	}
	if err := xml.Unmarshal(body, &v); err != nil {
		t.Fatal(err)
	}
	key, err := base64.StdEncoding.DecodeString(v.Key)
	if err != nil || len(key) != 16 {
		t.Fatalf("the key has %d bytes, %v", len(key), err)
	}
	kid := kidOf(t, v.KID)
	sum, err := packager.PlayReadyChecksum(kid, key)
	if err != nil {
		t.Fatal(err)
	}
	object, err := packager.PlayReadyObject(custodian.SchemeCENC, kid, sum)
	if err != nil {
		t.Fatal(err)
	}
	if v.Object != base64.StdEncoding.EncodeToString(object) {
		t.Error("the PlayReady Object is not the key's")
	}
	for _, literal := range []string{"<KeyId>", "<KeyData>", "<Data>"} { // which the packager looks for
		if strings.Count(string(body), literal) != 1 {
			t.Errorf("the answer has not one %s", literal)
		}
	}
	// The same key comes out of the other doors, for the track type ALL.
	_, raw := post(t, c, k.url+"widevine", wvBody(`{"content_id":"`+base64.StdEncoding.EncodeToString([]byte("asset-42"))+`","tracks":[{"type":"ALL"}]}`))
	if a := wvDecode(t, raw); len(a.Tracks) != 1 || string(a.Tracks[0].KID) != string(kid[:]) || string(a.Tracks[0].Key) != string(key) {
		t.Error("the Widevine API has another key")
	}
}

func TestPlayReadyServerRefuses(t *testing.T) {
	k := newDoorKit(t, nil)
	good := capturedSOAP(t)
	for _, test := range []struct {
		name, who, body, want string
		status                int
	}{
		{"no grant", doorNobody, good, "DENIED", 403},
		{"no document", doorPackager, "", "ProgramIdentifier: there must be one", 400},
		{"no XML", doorPackager, "{}", "ProgramIdentifier: there must be one", 400},
		{"no envelope", doorPackager, "<a/>", "must be one SOAP 1.1 envelope", 400},
		{"two programs", doorPackager, strings.Replace(good, "<ProgramIdentifier>", "<ProgramIdentifier>x</ProgramIdentifier><ProgramIdentifier>", 1), "2 elements ProgramIdentifier", 400},
		{"no program", doorPackager, strings.Replace(good, "asset-42", "", 1), "content_id", 400},
		{"another system", doorPackager, strings.Replace(good, "9A04F079", "EDEF8BA9", 1), "ProtectionSystemId", 400},
		{"an entity bomb", doorPackager, strings.Replace(good, "<soap:Envelope", `<!DOCTYPE a [<!ENTITY b "c">]><soap:Envelope`, 1), "document type or entity declaration", 400},
		{"an external entity", doorPackager, strings.Replace(good, "asset-42", "&x;", 1), "not well-formed", 400},
		{"many elements", doorPackager, strings.Replace(good, "<challenge", strings.Repeat("<a/>", 100)+"<challenge", 1), "more than 64 elements", 400},
		{"deep", doorPackager, strings.Replace(good, "<challenge", strings.Repeat("<a>", 100)+"<challenge", 1), "16 deep", 400},
		{"cut off", doorPackager, good[:len(good)-40], "not well-formed", 400},
		{"not UTF-8", doorPackager, strings.Replace(good, "asset", "\xff", 1), "not well-formed", 400},
	} {
		t.Run(test.name, func(t *testing.T) {
			status, body := post(t, k.client(t, test.who), k.url+"playready", []byte(test.body))
			if status != test.status || !strings.Contains(string(body), test.want) {
				t.Errorf("got %d %s, want %d with %q", status, body, test.status, test.want)
			}
		})
	}
}

// FuzzPlayReady: what is accepted names one program.
func FuzzPlayReady(f *testing.F) {
	f.Add([]byte(capturedSOAP(f)))
	f.Fuzz(func(t *testing.T, body []byte) {
		if id, err := packager.ParseSOAPForFuzz(body); err == nil && len(id) > len(body) {
			t.Errorf("an identifier of %d bytes came out of %d", len(id), len(body))
		}
	})
}
