package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"

	"github.com/keycustody/custodian/certs"
	"github.com/keycustody/custodian/custodian"
	fronts "github.com/keycustody/custodian/internal/packager"
	"github.com/keycustody/custodian/internal/rpc"
)

// Calls for new keys by the front doors of packagers.
const (
	methodWidevine  = "widevine"
	methodSPEKE     = "speke" // 2.0
	methodSPEKE1    = "speke1"
	methodPlayReady = "playready"
)

// serveDoors is the real stack behind the listener of packagers.
func serveDoors(ctx context.Context, args []string) (err error) {
	f, err := parseServer(roleDoors, args)
	if err != nil {
		return err
	}
	trust, err := serverCerts(f.pki)
	if err != nil {
		return err
	}
	c, err := openCustody(ctx, f.dir, nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.close(context.WithoutCancel(ctx))) }()
	s, err := rpc.NewServer(rpc.Config{Certs: trust, Log: stderrLog()})
	if err != nil {
		return err
	}
	s.SetCustody(c.custodian)
	doors, err := fronts.NewServer(fronts.Config{RPC: s, Log: stderrLog()})
	if err != nil {
		return err
	}
	return listen(f, func(l net.Listener) error { return doors.Serve(ctx, l, drain) })
}

// doors is the speed at which packagers get new content keys by their own
// protocols.
func (r *rig) doors(ctx context.Context) error {
	data := filepath.Join(r.dir, "doors")
	if _, err := r.prepare(ctx, data, 1); err != nil {
		return err
	}
	s, err := r.serve(ctx, roleDoors, "doors", "-dir", data)
	if err != nil {
		return err
	}
	for range r.scale.rounds {
		for _, door := range []struct {
			method, suffix string
			batch          int
		}{
			{methodWidevine, "_batch50", 50},
			{methodSPEKE, "_batch50", 50},
			{methodSPEKE1, "", 1},
			{methodPlayReady, "", 1}, // it knows one key a request
		} {
			l, err := r.load(ctx, s, loadSpec{method: door.method, inFlight: 8, batch: door.batch})
			if err != nil {
				return err
			}
			r.table.add(door.method+"_ceks_per_s"+door.suffix, l.keysPerSecond())
			r.table.add(door.method+"_p50_us"+door.suffix, l.P50)
			r.table.add(door.method+"_p99_us"+door.suffix, l.P99)
		}
	}
	return r.stopAll()
}

// A knocker calls at the listener of packagers, on TLS 1.2 and a connection of
// its own for each call, as Shaka Packager does.
type knocker struct {
	client *http.Client
	url    string // of the category
}

func newKnocker(pki, addr string) (*knocker, error) {
	c, err := certs.NewClient(certs.ClientOptions{CertFile: filepath.Join(pki, string(custodian.RolePackager)+".pem"),
		KeyFile: filepath.Join(pki, string(custodian.RolePackager)+".key"), CAFile: filepath.Join(pki, "ca.pem")})
	if err != nil {
		return nil, err
	}
	config := c.TLSConfig()
	config.ServerName, config.MinVersion, config.MaxVersion = "localhost", tls.VersionTLS12, tls.VersionTLS12
	return &knocker{&http.Client{Transport: &http.Transport{TLSClientConfig: config, DisableKeepAlives: true}},
		"https://" + addr + "/v1/categories/" + string(category) + "/"}, nil
}

func (k *knocker) post(ctx context.Context, door string, header http.Header, body []byte) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, k.url+door, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header = header
	res, err := k.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", res.Status, b)
	}
	return b, err
}

// widevine asks for the keys of a content item that is not there yet: batch
// crypto periods of one track.
func (c *caller) widevine(ctx context.Context) (int, error) {
	inner := fmt.Sprintf(`{"content_id":%q,"policy":"","tracks":[{"type":"HD"}],"drm_types":["WIDEVINE"],"first_crypto_period_index":0,"crypto_period_count":%d,"protection_scheme":"CENC"}`,
		base64.StdEncoding.EncodeToString([]byte(rand.Text())), c.batch)
	b, err := c.door.post(ctx, "widevine", http.Header{"Content-Type": {"application/json"}}, fmt.Appendf(nil, `{"request":%q}`, base64.StdEncoding.EncodeToString([]byte(inner))))
	if err != nil {
		return 0, err
	}
	var envelope struct{ Response []byte }
	var answer struct{ Tracks []struct{ Key []byte } }
	if err := errors.Join(json.Unmarshal(b, &envelope), json.Unmarshal(envelope.Response, &answer)); err != nil {
		return 0, err
	}
	if len(answer.Tracks) != c.batch {
		return 0, fmt.Errorf("%d keys instead of %d: %s", len(answer.Tracks), c.batch, envelope.Response)
	}
	c.size = len(b)
	return len(answer.Tracks), nil
}

// speke asks for the keys of a content item that is not there yet: batch keys,
// five tracks in each crypto period, with PSSH boxes and DASH signalling for
// Widevine and PlayReady.
func (c *caller) speke(ctx context.Context) (int, error) {
	var keys, systems, periods, rules strings.Builder
	for i := range c.batch {
		track, period := []string{"SD", "HD", "UHD1", "UHD2", "AUDIO"}[i%5], i/5
		var kid custodian.KID
		rand.Read(kid[:])
		fmt.Fprintf(&keys, `<cpix:ContentKey kid="%s" commonEncryptionScheme="cbcs"/>`, kid)
		for _, system := range []fronts.SystemID{fronts.Widevine, fronts.PlayReady} {
			fmt.Fprintf(&systems, `<cpix:DRMSystem kid="%s" systemId="%s"><cpix:PSSH/><cpix:ContentProtectionData/></cpix:DRMSystem>`, kid, system)
		}
		if i%5 == 0 {
			fmt.Fprintf(&periods, `<cpix:ContentKeyPeriod id="p%d" index="%d"/>`, period, period)
		}
		fmt.Fprintf(&rules, `<cpix:ContentKeyUsageRule kid="%s" intendedTrackType="%s"><cpix:KeyPeriodFilter periodId="p%d"/><cpix:VideoFilter/></cpix:ContentKeyUsageRule>`, kid, track, period)
	}
	request := fmt.Sprintf(`<cpix:CPIX xmlns:cpix="urn:dashif:org:cpix" contentId="%s" version="2.3"><cpix:ContentKeyList>%s</cpix:ContentKeyList><cpix:DRMSystemList>%s</cpix:DRMSystemList>`+
		`<cpix:ContentKeyPeriodList>%s</cpix:ContentKeyPeriodList><cpix:ContentKeyUsageRuleList>%s</cpix:ContentKeyUsageRuleList></cpix:CPIX>`,
		rand.Text(), keys.String(), systems.String(), periods.String(), rules.String())
	b, err := c.door.post(ctx, "speke", http.Header{"Content-Type": {"application/xml"}, "X-Speke-Version": {"2.0"}}, []byte(request))
	if err != nil {
		return 0, err
	}
	if got := bytes.Count(b, []byte("<pskc:PlainValue>")); got != c.batch {
		return 0, fmt.Errorf("%d keys instead of %d: %s", got, c.batch, b)
	}
	c.size = len(b)
	return c.batch, nil
}

// speke1 asks for the key of a content item that is not there yet.
func (c *caller) speke1(ctx context.Context) (int, error) {
	var kid custodian.KID
	rand.Read(kid[:])
	request := fmt.Sprintf(`<cpix:CPIX xmlns:cpix="urn:dashif:org:cpix" id="%s"><cpix:ContentKeyList><cpix:ContentKey kid="%s"/></cpix:ContentKeyList>`+
		`<cpix:DRMSystemList><cpix:DRMSystem kid="%s" systemId="%s"><cpix:PSSH/></cpix:DRMSystem></cpix:DRMSystemList></cpix:CPIX>`,
		rand.Text(), kid, kid, fronts.Widevine)
	return c.askOne(ctx, "speke", "application/xml", request, "<pskc:PlainValue>")
}

// playReady asks for the key of a content item that is not there yet.
func (c *caller) playReady(ctx context.Context) (int, error) {
	request := fmt.Sprintf(`<soap:Envelope xmlns:soap="http://schemas.xmlsoap.org/soap/envelope/"><soap:Body><AcquirePackagingData xmlns="http://schemas.microsoft.com/DRM/2007/03/protocols">`+
		`<challenge xmlns="http://schemas.microsoft.com/DRM/2007/03/protocols/AcquirePackagingData/v1.0"><ProtectionSystems><ProtectionSystemId>%s</ProtectionSystemId></ProtectionSystems>`+
		`<StreamProtectionRequests><StreamInformation><ProgramIdentifier>%s</ProgramIdentifier><OffsetFromProgramStart>P0S</OffsetFromProgramStart></StreamInformation></StreamProtectionRequests>`+
		`</challenge></AcquirePackagingData></soap:Body></soap:Envelope>`, fronts.PlayReady, rand.Text())
	return c.askOne(ctx, "playready", "text/xml; charset=utf-8", request, "<KeyData>")
}

// askOne sends a request for one key, whose answer has the mark once.
func (c *caller) askOne(ctx context.Context, door, contentType, request, mark string) (int, error) {
	b, err := c.door.post(ctx, door, http.Header{"Content-Type": {contentType}}, []byte(request))
	if err != nil {
		return 0, err
	}
	if bytes.Count(b, []byte(mark)) != 1 {
		return 0, fmt.Errorf("%s: no key: %s", door, b)
	}
	c.size = len(b)
	return 1, nil
}
