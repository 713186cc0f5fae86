package packager_test

import (
	"bytes"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/audit"
	"github.com/keycustody/custodian/internal/packager"
)

// entriesOf are the audit entries of one request, or with "" all of them.
func (k *doorKit) entriesOf(t *testing.T, requestID string) (found []audit.Entry) {
	t.Helper()
	if err := audit.Read(filepath.Join(k.dir, "audit"), 0, func(e *audit.Entry) error {
		if requestID == "" || e.RequestID == requestID {
			found = append(found, *e)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return found
}

// knock sends one request under a name of its own.
func (k *doorKit) knock(t *testing.T, who, door, category, requestID string, header http.Header, body []byte) int {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, strings.Replace(k.url, "/movies/", "/"+category+"/", 1)+door, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for name, values := range header {
		req.Header[name] = values
	}
	req.Header.Set("X-Request-Id", requestID)
	res, err := k.client(t, who).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	return res.StatusCode
}

// TestRefusedIsWrittenDown: whatever a front door refuses, be it before the
// domain is asked or by the domain, is one entry in the audit log, with who,
// what and why.
func TestRefusedIsWrittenDown(t *testing.T) {
	_, der := newRSA(t, 2048)
	_, unpinned := newRSA(t, 2048)
	k := newDoorKit(t, func(c *packager.Config) {
		c.Signers = []packager.Signer{tutorialSigner(t, doorID(doorPackager))}
		c.SPEKE = packager.SPEKEConfig{Encrypted: map[custodian.CategoryName]bool{"sealed": true}, Recipients: map[string][]packager.Recipient{encoder.ID: {pinned(t, der, "")}}}
	})
	signed, inner := captured(t, "mt-cenc-aes")
	speke := readFile(t, "speke", "small.request.xml")
	soap := []byte(capturedSOAP(t))
	denied, failed := audit.Denied, audit.Failed
	for _, test := range []struct {
		name, who, door, category string
		body                      []byte
		outcome                   audit.Outcome
		reason, detail            string
	}{
		{"no signature", doorPackager, "widevine", "movies", wvBody(inner), denied, "DENIED", "widevine: signature: the request is not signed"},
		{"bad signature", doorPackager, "widevine", "movies", bytes.Replace(signed, []byte(`"signature":"6D7a`), []byte(`"signature":"6D7b`), 1), denied, "DENIED", `widevine: signature: signature of "widevine_test"`},
		{"unknown signer", doorPackager, "widevine", "movies", bytes.Replace(signed, []byte("widevine_test"), []byte("somebody_else"), 1), denied, "DENIED", `widevine: signature: signer "somebody_else" is not configured`},
		{"somebody else's signer", doorChief, "widevine", "movies", signed, denied, "DENIED", `widevine: signature: signer "widevine_test" is not this caller's`},
		{"malformed envelope", doorPackager, "widevine", "movies", []byte("{"), denied, "INVALID", "widevine: body: not JSON"},
		{"malformed request", doorChief, "widevine", "movies", wvBody(`{"content_id":"YQ=="}`), denied, "INVALID", "widevine: tracks: no track"},
		{"what the domain finds malformed", doorChief, "playready", "movies", bytes.Replace(soap, []byte("asset-42"), nil, 1), denied, "INVALID", "playready: content_id"},
		{"malformed SOAP", doorPackager, "playready", "movies", []byte("<a/>"), denied, "INVALID", "playready: body: line 1"},
		{"malformed CPIX", doorPackager, "speke", "movies", []byte("<a/>"), denied, "INVALID", "speke: cpix: line 1"},
		{"a recipient that is not pinned", doorPackager, "speke", "movies", withRecipients(speke, unpinned), denied, "DENIED", "speke: it needs a pinned recipient"},
		{"in clear where it must be encrypted", doorPackager, "speke", "sealed", speke, denied, "DENIED", "speke: it needs a pinned recipient"},
		{"the same, without a recipient", doorNobody, "speke", "sealed", speke, denied, "DENIED", "speke: category sealed: it needs a pinned recipient"},
		{"what cannot be a category", doorPackager, "speke", "No%20Such", speke, denied, "INVALID", "speke: category: "},
		{"too large", doorPackager, "widevine", "movies", make([]byte, packager.MaxDocumentSize+1), denied, "INVALID", "widevine: body: it has more than"},
		{"unknown category", doorPackager, "speke", "none", speke, denied, "DENIED", ""},
		{"unknown category, to who may know", doorChief, "speke", "none", speke, failed, "CATEGORY_NOT_FOUND", ""},
		{"no grant, Widevine", doorNobody, "widevine", "movies", wvBody(inner), denied, "DENIED", ""},
		{"no grant, PlayReady", doorNobody, "playready", "movies", soap, denied, "DENIED", ""},
		{"no grant, SPEKE", doorNobody, "speke", "movies", speke, denied, "DENIED", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			id := strings.ReplaceAll(test.name, " ", "-")
			k.knock(t, test.who, test.door, test.category, id, spekeHeader("2.0"), test.body)
			got := k.entriesOf(t, id)
			if len(got) != 1 {
				t.Fatalf("got %d audit entries, want 1", len(got))
			}
			e := got[0]
			if e.Action != "issue" || e.Outcome != test.outcome || e.Caller != doorID(test.who) || e.Reason != test.reason || !strings.HasPrefix(e.Detail, test.detail) {
				t.Errorf("got %s %v %s by %s, detail %q; want issue %v %s, detail %q...", e.Action, e.Outcome, e.Reason, e.Caller, e.Detail, test.outcome, test.reason, test.detail)
			}
			if len(e.Detail) > 300 || test.detail == "" && e.Detail != "" {
				t.Errorf("detail %q: too much of what a stranger sends", e.Detail)
			}
			if want := test.category; want != "No%20Such" && e.Category != want || want == "No%20Such" && e.Category != "" {
				t.Errorf("category %q, want %q", e.Category, want)
			}
		})
	}
}

// TestRefusalsAreCounted: refusals of one caller beyond its share of a second
// are counted, as all denials are, so that nobody can fill the disk with them.
func TestRefusalsAreCounted(t *testing.T) {
	k := newLoggedKit(t, audit.Options{DenialsPerSecond: 1}, nil)
	const calls = 20
	before := len(k.entriesOf(t, ""))
	for range calls {
		k.knock(t, doorPackager, "widevine", "movies", "many", nil, []byte("{"))
	}
	counted := int(k.audit.Stats().Coalesced)
	if counted == 0 {
		t.Error("every refusal was written by itself")
	}
	written := len(slices.DeleteFunc(k.entriesOf(t, "")[before:], func(e audit.Entry) bool { return e.Count > 0 }))
	if written+counted < calls { // one that stands for itself alone may be written in the end
		t.Errorf("%d refusals are written and %d counted, of %d", written, counted, calls)
	}
}

// TestRefusedWithoutDomain: a refusal that cannot be written down is told as what keeps it from that.
func TestRefusedWithoutDomain(t *testing.T) {
	k := newDoorKit(t, nil)
	k.rpc.SetUnavailable(custodian.ErrStarting)
	if status := k.knock(t, doorPackager, "widevine", "movies", "x", nil, []byte("{")); status != http.StatusServiceUnavailable {
		t.Errorf("no domain yet: got %d, want 503", status)
	}
}
