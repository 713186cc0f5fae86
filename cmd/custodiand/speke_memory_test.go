package main

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"encoding/xml"
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/certs"
	"github.com/keycustody/custodian/custodian"
)

// TestMemorySPEKE: of 800 keys that an encoder got by SPEKE, as few are left in
// the daemon's memory as TestMemory allows, as they were or in base64. Of 200
// that an officer imported, only those of the last request are: they lie in the
// buffers in which crypto/tls and gRPC read, until the connection reads more.
func TestMemorySPEKE(t *testing.T) {
	t.Parallel() // it waits, and takes little of the CPUs
	c := provision(t)
	transport, port := serveEncoders(t, c)
	boss := c.dial(custodian.RoleOfficer)
	var keys [][]byte
	for _, n := range []int{1, 199, 600} { // short answers and long ones
		keys = append(keys, spekeKeys(t, transport, port, n)...)
	}
	for i := range 4 {
		req := &v1.ImportContentKeysRequest{Category: "movies", ContentId: fmt.Appendf(nil, "studio %d", i)}
		for j := range 50 {
			key, kid := make([]byte, 16), make([]byte, 16)
			rand.Read(key)
			rand.Read(kid)
			keys = append(keys, bytes.Clone(key))
			req.Keys = append(req.Keys, &v1.ImportedContentKey{Spec: &v1.ContentKeySpec{TrackType: fmt.Sprint("T", j), Scheme: "cenc", Kid: kid}, Key: key})
		}
		if _, err := boss.ImportContentKeys(t.Context(), req); err != nil {
			t.Fatal(err)
		}
	}
	if len(keys) != 1000 {
		t.Fatalf("got %d keys, want 1000", len(keys))
	}
	transport.CloseIdleConnections()
	time.Sleep(5 * time.Second)
	var issued, imported [][]byte
	for i, key := range keys {
		forms := [][]byte{key, []byte(base64.StdEncoding.EncodeToString(key))}
		if i < 800 {
			issued = append(issued, forms...)
		} else {
			imported = append(imported, forms...)
		}
	}
	image, _ := memoryOf(t, c.cmd.Process.Pid)
	sum := func(found [5]int) (n int) {
		for _, f := range found {
			n += f
		}
		return n
	}
	leftIssued, leftImported := sum(count(image, issued)), sum(count(image, imported))
	t.Logf("left in %d MB of memory: %d of 800 keys from SPEKE, %d of 200 imported ones", len(image)>>20, leftIssued, leftImported)
	if leftIssued > 1 {
		t.Errorf("%d of 800 keys from SPEKE are left, want at most 1", leftIssued)
	}
	if leftImported > 51 {
		t.Errorf("%d of 200 imported keys are left, want at most the 50 of the last request and one more", leftImported)
	}
	// The test of the test: something that must be there is found.
	if got := count(image, [][]byte{[]byte("custodian-mek-v1")}); got[0] != 1 {
		t.Error("the image does not contain the MEK's label: the search finds nothing")
	}
}

// serveEncoders starts a daemon with the category movies and a door for encoders,
// of whom one has the transport.
func serveEncoders(t *testing.T, c *custody) (transport *http.Transport, port string) {
	t.Helper()
	c.edit("packagers:\n    listen: \"\"", "packagers:\n    listen: 127.0.0.1:0")
	c.mustRun("init", "-config", c.dev.configFile())
	c.mustStart()
	m := packagersLine.FindStringSubmatch(c.logText())
	if m == nil {
		t.Fatalf("the daemon does not say where packagers knock:\n%s", c.logText())
	}
	if _, err := c.dial(custodian.RoleOfficer).CreateCategory(t.Context(), &v1.CreateCategoryRequest{Name: "movies"}); err != nil {
		t.Fatal(err)
	}
	pki := filepath.Join(c.dev.dir, "pki")
	trust, err := certs.NewClient(certs.ClientOptions{CertFile: filepath.Join(pki, "packager.pem"), KeyFile: filepath.Join(pki, "packager.key"),
		CAFile: filepath.Join(pki, "ca.pem"), ServerName: "localhost"})
	if err != nil {
		t.Fatal(err)
	}
	return &http.Transport{TLSClientConfig: trust.TLSConfig()}, m[1]
}

// spekeKeys asks for n keys of one content item, and gets them.
func spekeKeys(t *testing.T, transport *http.Transport, port string, n int) [][]byte {
	t.Helper()
	res := askSPEKE(t, transport, port, n)
	defer res.Body.Close()
	var answer struct {
		Values []string `xml:"ContentKeyList>ContentKey>Data>Secret>PlainValue"`
	}
	if err := xml.NewDecoder(res.Body).Decode(&answer); err != nil || len(answer.Values) != n {
		t.Fatalf("%s: %d keys instead of %d: %v", res.Status, len(answer.Values), n, err)
	}
	var keys [][]byte
	for _, v := range answer.Values {
		key, err := base64.StdEncoding.DecodeString(v)
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, key)
	}
	return keys
}

// askSPEKE asks for n keys of one content item.
func askSPEKE(t *testing.T, transport *http.Transport, port string, n int) *http.Response {
	t.Helper()
	var list, systems, rules strings.Builder
	for i := range n {
		kid := fmt.Sprintf("00000000-0000-4000-%04x-%012x", 0x8000+n, i+1)
		fmt.Fprintf(&list, `<c:ContentKey kid="%s" commonEncryptionScheme="cbcs"/>`, kid)
		fmt.Fprintf(&systems, `<c:DRMSystem kid="%s" systemId="9a04f079-9840-4286-ab92-e65be0885f95"><c:PSSH/></c:DRMSystem>`, kid)
		fmt.Fprintf(&rules, `<c:ContentKeyUsageRule kid="%s" intendedTrackType="T%d"><c:VideoFilter/></c:ContentKeyUsageRule>`, kid, i)
	}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://127.0.0.1:"+port+"/v1/categories/movies/speke",
		strings.NewReader(fmt.Sprintf(`<c:CPIX xmlns:c="urn:dashif:org:cpix" contentId="film of %d" version="2.3"><c:ContentKeyList>%s</c:ContentKeyList><c:DRMSystemList>%s</c:DRMSystemList><c:ContentKeyUsageRuleList>%s</c:ContentKeyUsageRuleList></c:CPIX>`,
			n, list.String(), systems.String(), rules.String())))
	if err != nil {
		t.Fatal(err)
	}
	req.Header = http.Header{"Content-Type": {"application/xml"}, "X-Speke-Version": {"2.0"}}
	res, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	return res
}
