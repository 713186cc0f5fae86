package packager

import (
	"net/http"

	"github.com/keycustody/custodian/custodian"
)

// ParseForFuzz reads a request of the Widevine API as the listener does, and
// says how many tracks and periods it accepted.
func ParseForFuzz(body []byte) (tracks, periods int, err error) {
	e, err := parseEnvelope(body)
	if err != nil {
		return 0, 0, err
	}
	r, err := parseWidevine(e.Request)
	return len(r.Tracks), len(r.Periods), err
}

// ParseSOAPForFuzz reads a request to the PlayReady packaging server.
var ParseSOAPForFuzz = parseAcquirePackagingData

// ParseSPEKE1ForFuzz reads a request of SPEKE 1.0, and says what it asks for.
func ParseSPEKE1ForFuzz(body []byte) (content string, keys []custodian.KeySpec, err error) {
	v := spekeVersions[""]
	doc, err := v.parse(SPEKERequest{Header: http.Header{"Content-Type": {spekeContentType}}, Body: body})
	if err != nil {
		return "", nil, err
	}
	defer doc.Wipe()
	keys, err = v.specs(doc)
	return doc.ContentID, keys, err
}
