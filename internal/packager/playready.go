package packager

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/rpc"
)

// The PlayReady packaging server, as Shaka Packager calls it: one SOAP request
// names a program, and gets one key for all of its tracks, for cenc. It looks for
// the answer's elements by their names, in this spelling and without a prefix.
const (
	nsSOAP       = "http://schemas.xmlsoap.org/soap/envelope/"
	nsProtocols  = "http://schemas.microsoft.com/DRM/2007/03/protocols"
	nsChallenge  = nsProtocols + "/AcquirePackagingData/v1.0"
	trackTypeAll = custodian.TrackType("ALL")

	playReadyContentType = "text/xml; charset=utf-8"
	maxSOAPDepth         = 16
	maxSOAPElements      = 64
)

// playReady answers one request for packaging data.
func (s *Server) playReady(ctx context.Context, c *call) (reply, error) {
	program, err := parseAcquirePackagingData(c.body)
	if err != nil {
		return reply{}, &custodian.InvalidError{Field: "body", Err: err}
	}
	keys, err := c.issue(ctx, custodian.IssueRequest{ContentID: program,
		Keys: []custodian.KeySpec{{TrackType: trackTypeAll, Scheme: custodian.SchemeCENC}}})
	if err != nil {
		return reply{}, err
	}
	defer keys[0].Key.Destroy()
	return encodePackagingData(&keys[0])
}

// parseAcquirePackagingData returns the program's identifier, which is the
// content ID. The rest of the request says nothing that could be granted.
func parseAcquirePackagingData(doc []byte) (custodian.ContentID, error) {
	r := reader{dec: xml.NewDecoder(bytes.NewReader(doc))}
	var path []xml.Name
	var text strings.Builder
	var program, system []string
	for elements := 0; ; {
		t, err := r.token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, err
		}
		switch t := t.(type) {
		case xml.StartElement:
			if elements++; elements > maxSOAPElements || len(path) == maxSOAPDepth {
				return nil, r.fault("more than %d elements, or more than %d deep", maxSOAPElements, maxSOAPDepth)
			}
			if len(path) == 0 && (elements > 1 || t.Name != xml.Name{Space: nsSOAP, Local: "Envelope"}) {
				return nil, r.fault("%s: the document must be one SOAP 1.1 envelope", t.Name.Local)
			}
			path = append(path, t.Name)
			text.Reset()
		case xml.CharData:
			text.Write(t)
		case xml.EndElement:
			switch t.Name {
			case xml.Name{Space: nsChallenge, Local: "ProgramIdentifier"}:
				program = append(program, text.String())
			case xml.Name{Space: nsChallenge, Local: "ProtectionSystemId"}:
				system = append(system, strings.TrimSpace(text.String()))
			}
			path = path[:len(path)-1]
			text.Reset()
		}
	}
	if len(program) != 1 {
		return nil, fmt.Errorf("%d elements ProgramIdentifier: there must be one", len(program))
	}
	if len(system) != 1 || !strings.EqualFold(system[0], PlayReady.String()) {
		return nil, fmt.Errorf("ProtectionSystemId: there must be one, of PlayReady, %s", PlayReady)
	}
	return custodian.ContentID(program[0]), nil
}

// encodePackagingData writes the answer by hand, as encodeWidevine does.
func encodePackagingData(k *custodian.IssuedKey) (reply, error) {
	var object []byte
	var err error
	k.Key.Use(func(cek []byte) {
		var sum [8]byte
		if sum, err = PlayReadyChecksum(k.KID, cek); err == nil {
			object, err = PlayReadyObject(k.Scheme, k.KID, sum)
		}
	})
	if err != nil {
		return reply{}, err
	}
	b := append(make([]byte, 0, 2*minReply+2*len(object)), `<?xml version="1.0" encoding="utf-8"?><soap:Envelope xmlns:soap="`+nsSOAP+`"><soap:Body><AcquirePackagingDataResponse xmlns="`+nsProtocols+
		`"><PackagingData xmlns="`+nsChallenge+`"><KeyId>`...)
	b = append(append(b, k.KID.String()...), "</KeyId><KeyData>"...)
	k.Key.Use(func(cek []byte) { b = base64.StdEncoding.AppendEncode(b, cek) })
	b = base64.StdEncoding.AppendEncode(append(b, "</KeyData><Data>"...), object)
	b = append(b, "</Data></PackagingData></AcquirePackagingDataResponse></soap:Body></soap:Envelope>"...)
	return reply{contentType: playReadyContentType, body: b}, nil
}

// refusePlayReady answers with the HTTP status: a packager reads no more of it.
func refusePlayReady(r rpc.Refusal, _ error) reply {
	return reply{status: r.HTTPStatus, contentType: "text/plain; charset=utf-8", body: []byte(string(r.Reason) + ": " + r.Message + "\n")}
}
