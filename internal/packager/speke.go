package packager

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"mime"
	"net/http"
	"slices"
	"strings"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/rpc"
)

// SPEKEConfig says to whom SPEKE replies may be encrypted, and where they must
// be.
type SPEKEConfig struct {
	// Recipients are pinned for a caller: replies to it are encrypted to no
	// other certificate.
	Recipients map[string][]Recipient
	// Encrypted are the categories whose keys leave SPEKE only in encrypted
	// documents.
	Encrypted map[custodian.CategoryName]bool
}

// SPEKE answers the Secure Packager and Encoder Key Exchange API, versions 1.0
// (with CPIX 2.0), 2.0 (with CPIX 2.3) and 2.1 (with CPIX 2.4). It is an encoding over Issue: it
// decides nothing about who may have a key, but for what a document-encrypted
// reply needs.
type SPEKE struct{ config SPEKEConfig }

// NewSPEKE makes the front door.
func NewSPEKE(c SPEKEConfig) *SPEKE { return &SPEKE{c} }

// A SPEKERequest is one request, as the listener has received it.
type SPEKERequest struct {
	Caller   string // its identity
	Category custodian.CategoryName
	Header   http.Header
	Body     []byte // at most MaxDocumentSize
}

// An Issue is Custodian.Issue for the caller and the category of one request.
type Issue func(context.Context, custodian.IssueRequest) ([]custodian.IssuedKey, error)

// A SPEKEError is a fault of a request that SPEKE itself names: 422, or what
// Status says, with Text, of which the encryptor shows its user the beginning.
type SPEKEError struct {
	Status int
	Text   string
}

func (e *SPEKEError) Error() string { return e.Text }

// Unwrap makes it a malformed request also to who does not know SPEKE.
func (e *SPEKEError) Unwrap() error { return custodian.ErrInvalid }

func unprocessable(format string, args ...any) error {
	return &SPEKEError{http.StatusUnprocessableEntity, fmt.Sprintf(format, args...)}
}

// The texts that SPEKE 2 and the guide of AWS Elemental MediaPackage give.
const (
	textSPEKEVersion = "Unsupported SPEKE version"
	textNoContentID  = "Missing CPIX@contentId"
	textNoVersion    = "Missing CPIX@version"
	textVersion      = "Unsupported CPIX@version"
	textNoScheme     = "Missing ContentKey@commonEncryptionScheme for KID %s"
	textNoKey        = "Missing ContentKeyList/ContentKey"
	textNoSystem     = "Missing DRMSystemList/DRMSystem"
	textSchemes      = "Non compliant ContentKey@commonEncryptionScheme combination"
)

// spekeVersions are the versions of SPEKE. Requests of 1.0 name none.
var spekeVersions = map[string]spekeVersion{
	"":    {"2.0", (*CPIX).checkSPEKE1, (*CPIX).specs1},
	"2.0": {"2.3", (*CPIX).checkSPEKE, (*CPIX).specs},
	"2.1": {"2.4", (*CPIX).checkSPEKE, (*CPIX).specs},
}

// A spekeVersion is the version of CPIX in it, what it asks for beyond that,
// and which keys a document asks for.
type spekeVersion struct {
	cpix  string
	check func(d *CPIX, cpix string) error
	specs func(*CPIX) ([]custodian.KeySpec, error)
}

const (
	headerSPEKEVersion = "X-Speke-Version"
	headerSPEKEAgent   = "X-Speke-User-Agent"
	headerSPEKE1Agent  = "Speke-User-Agent"

	agent = "Custodian"
)

// speke is the door of SPEKE.
func (s *Server) speke(ctx context.Context, c *call) (reply, error) {
	version := c.header.Get(headerSPEKEVersion)
	body, err := s.spekes.Load().Answer(ctx, c.issue, SPEKERequest{Caller: c.Caller().ID, Category: c.category, Header: c.header, Body: c.body})
	if err != nil {
		if errors.Is(err, errRecipient) {
			s.config.Log.Warn("SPEKE refused", "caller", c.Caller().ID, "category", string(c.category), "request_id", c.RequestID(), "err", err)
		}
		return reply{}, &spekeRefusal{version, err}
	}
	return reply{contentType: spekeContentType, header: spekeHeaders(version), body: body}, nil
}

// SetSPEKE replaces the recipients of encrypted replies.
func (s *Server) SetSPEKE(c SPEKEConfig) { s.spekes.Store(NewSPEKE(c)) }

// A spekeRefusal is an error of a call that named a version of SPEKE.
type spekeRefusal struct {
	version string
	error
}

func (e *spekeRefusal) Unwrap() error { return e.error }

// refuseSPEKE answers in words, as SPEKE wants it: a malformed request is 422.
func refuseSPEKE(r rpc.Refusal, err error) reply {
	status, text, version := r.HTTPStatus, r.Message, ""
	if e, ok := errors.AsType[*SPEKEError](err); ok {
		status, text = e.Status, e.Text
	} else if r.Reason == custodian.ReasonOf(custodian.ErrInvalid) {
		status = http.StatusUnprocessableEntity
	}
	if e, ok := errors.AsType[*spekeRefusal](err); ok {
		version = e.version
	}
	return reply{status: status, contentType: "text/plain; charset=utf-8", header: spekeHeaders(version), body: []byte(text)}
}

// spekeHeaders are what every reply has, also that of a refusal.
func spekeHeaders(version string) map[string]string {
	h := map[string]string{headerSPEKEAgent: agent, headerSPEKE1Agent: agent}
	if _, known := spekeVersions[version]; known && version != "" {
		h[headerSPEKEVersion] = version
	}
	return h
}

// spekeContentType is that of every reply but a refusal.
const spekeContentType = "application/xml"

// Answer returns the document of the reply. It holds keys, in clear or
// encrypted: whoever has sent it wipes it. Errors are a *SPEKEError, or those
// of Issue.
func (s *SPEKE) Answer(ctx context.Context, issue Issue, r SPEKERequest) ([]byte, error) {
	version, known := spekeVersions[r.Header.Get(headerSPEKEVersion)]
	if !known {
		return nil, unprocessable("%s", textSPEKEVersion)
	}
	doc, err := version.parse(r)
	if err != nil {
		return nil, err
	}
	defer doc.Wipe()
	to, err := s.recipients(doc, r)
	if err != nil {
		return nil, err
	}
	specs, err := version.specs(doc)
	if err != nil {
		return nil, err
	}
	keys, err := issue(ctx, custodian.IssueRequest{Category: r.Category, ContentID: custodian.ContentID(doc.ContentID), Keys: specs})
	if err != nil {
		return nil, err
	}
	defer func() {
		for i := range keys {
			keys[i].Key.Destroy()
		}
	}()
	if err := doc.fill(keys, to); err != nil {
		return nil, err
	}
	return doc.Encode(), nil
}

// parse reads a request and checks what SPEKE asks for beyond CPIX.
func (v spekeVersion) parse(r SPEKERequest) (*CPIX, error) {
	kind, params, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err != nil || kind != spekeContentType && kind != "text/xml" || !strings.EqualFold(params["charset"], "utf-8") && params["charset"] != "" {
		return nil, &SPEKEError{http.StatusUnsupportedMediaType, "Content-Type must be application/xml, in UTF-8"}
	}
	doc, err := ParseCPIX(r.Body)
	if errors.Is(err, errVersion) {
		return nil, unprocessable("%s", textVersion)
	}
	if err != nil {
		return nil, unprocessable("%s", err)
	}
	if err := v.check(doc, v.cpix); err != nil {
		doc.Wipe()
		return nil, err
	}
	return doc, nil
}

func (d *CPIX) checkSPEKE(version string) error {
	switch _, hasID := d.root.attr("id"); {
	case d.Version == "":
		return unprocessable("%s", textNoVersion)
	case d.Version != version:
		return unprocessable("%s", textVersion)
	case d.ContentID == "":
		return unprocessable("%s", textNoContentID)
	case hasID:
		return unprocessable("CPIX@id is of SPEKE 1: CPIX@contentId names the content")
	case len(d.Keys) == 0:
		return unprocessable("%s", textNoKey)
	case len(d.Keys) > custodian.MaxKeysPerIssue:
		return unprocessable("ContentKeyList: %d keys: must be at most %d", len(d.Keys), custodian.MaxKeysPerIssue)
	case len(d.Systems) == 0:
		return unprocessable("%s", textNoSystem)
	case len(d.Rules) == 0:
		return unprocessable("Missing ContentKeyUsageRuleList/ContentKeyUsageRule")
	}
	for _, k := range d.Keys {
		switch {
		case k.Scheme == "":
			return unprocessable(textNoScheme, k.KID)
		case k.Scheme != d.Keys[0].Scheme:
			return unprocessable("%s", textSchemes)
		case k.otherContent(d.ContentID):
			return unprocessable("ContentKey %s: its contentId is not that of the document", k.KID)
		case len(d.rules[k.KID]) == 0:
			return unprocessable("Missing ContentKeyUsageRule for KID %s", k.KID)
		}
		if err := k.checkSPEKE(); err != nil {
			return err
		}
	}
	if err := d.checkSystems("URIExtXKey", "HDSSignalingData", "KeyFormat", "KeyFormatVersions", "ProtectionHeader"); err != nil {
		return err
	}
	return d.checkRules()
}

// checkSPEKE is what every version asks of a key.
func (k CPIXKey) checkSPEKE() error {
	switch {
	case k.hasAttr("dependsOnKey"):
		return unprocessable("ContentKey %s: dependsOnKey is not in SPEKE", k.KID)
	case k.e.child(nsCPIX, "Data") != nil:
		return unprocessable("ContentKey %s has Data: keys are made here, and never taken from a request", k.KID)
	}
	return nil
}

func (k CPIXKey) hasAttr(name string) bool { _, has := k.e.attr(name); return has }

func (k CPIXKey) otherContent(id string) bool {
	own, has := k.e.attr("contentId")
	return has && own != id
}

// scheme is the common encryption scheme of all keys. SPEKE 2.1 allows the
// names of HLS too, and in 1.0 it is seldom named.
func (d *CPIX) scheme() (custodian.Scheme, error) {
	named := d.Keys[0].Scheme
	if named == "" {
		return d.scheme1(), nil
	}
	scheme := custodian.Scheme(named)
	if d.Version == "2.4" {
		switch named {
		case "SAMPLE-AES":
			scheme = custodian.SchemeCBCS
		case "SAMPLE-AES-CTR":
			scheme = custodian.SchemeCENC
		}
	}
	if err := scheme.Check(); err != nil {
		return "", unprocessable("Unsupported ContentKey@commonEncryptionScheme %.20q", named)
	}
	return scheme, nil
}

// checkSystems looks at the DRM systems, in which a version of SPEKE does not
// have the foreign elements.
func (d *CPIX) checkSystems(foreign ...string) error {
	scheme, err := d.scheme()
	if err != nil {
		return err
	}
	for _, sys := range d.Systems {
		switch sys.SystemID {
		case Widevine, PlayReady, Common:
		case FairPlay:
			if scheme != custodian.SchemeCBCS {
				return unprocessable("%s: FairPlay plays only cbcs", textSchemes)
			}
		default:
			return unprocessable("Unsupported DRMSystem@systemId %s", sys.SystemID)
		}
		for _, c := range sys.e.children {
			if slices.Contains(foreign, c.name.Local) {
				return unprocessable("DRMSystem %s: %s is not in this version of SPEKE", sys.SystemID, c.name.Local)
			}
			switch c.name.Local {
			case "HLSSignalingData", "URIExtXKey":
				if scheme != custodian.SchemeCBCS && scheme != custodian.SchemeCENC {
					return unprocessable("%s: HLS has only cenc and cbcs", textSchemes)
				}
			}
		}
	}
	return nil
}

// all is the intendedTrackType of a key for everything.
const all = "ALL"

func (d *CPIX) checkRules() error {
	for i, r := range d.Rules {
		place := fmt.Sprintf("ContentKeyUsageRule[%d]", i)
		switch parts := strings.Count(r.TrackType, "+") + 1; {
		case r.TrackType == "":
			return unprocessable("Missing %s@intendedTrackType", place)
		case r.TrackType == all && len(d.Keys) > 1:
			return unprocessable(`%s@intendedTrackType: "ALL" is for a single key, and there are %d`, place, len(d.Keys))
		case r.Video+r.Audio == 0:
			return unprocessable("Missing %s/VideoFilter or AudioFilter", place)
		case r.Video+r.Audio < parts:
			return unprocessable("%s: intendedTrackType %.80q needs %d filters, one for each part, and has %d", place, r.TrackType, parts, r.Video+r.Audio)
		case len(r.Labels) > 0:
			return unprocessable("%s: LabelFilter is not in SPEKE", place)
		case len(d.Periods) > 0 && len(r.Periods) == 0:
			return unprocessable("Missing %s/KeyPeriodFilter: the document has key periods", place)
		}
	}
	return nil
}

// specs are the keys that a request asks for, in its order.
func (d *CPIX) specs() ([]custodian.KeySpec, error) {
	scheme, err := d.scheme()
	if err != nil {
		return nil, err
	}
	specs := make([]custodian.KeySpec, len(d.Keys))
	for i, k := range d.Keys {
		track, period, err := d.Purpose(k.KID)
		if err != nil {
			return nil, unprocessable("%s", err)
		}
		specs[i] = custodian.KeySpec{TrackType: custodian.TrackType(track), Scheme: scheme, Period: period, KID: k.KID}
	}
	return specs, nil
}

// errRecipient: there is nobody to encrypt to, who would have to be pinned.
var errRecipient = errors.New("it needs a pinned recipient")

func unpinned(text string) error {
	return fmt.Errorf("%w: %w: %w", errRecipient, custodian.ErrDenied, &SPEKEError{http.StatusForbidden, text})
}

// recipients finds for each DeliveryData the pinned certificate that it
// names. Only a caller with pinned certificates hears that a category wants
// them: to others the category need not even exist.
func (s *SPEKE) recipients(d *CPIX, r SPEKERequest) ([]Recipient, error) {
	if len(d.Deliveries) == 0 && s.config.Encrypted[r.Category] {
		if len(s.config.Recipients[r.Caller]) == 0 {
			return nil, fmt.Errorf("category %s: %w, and none is pinned for %s: %w", r.Category, errRecipient, r.Caller, custodian.ErrDenied)
		}
		return nil, unpinned("Keys of this category leave only in encrypted documents: send DeliveryDataList with your certificate")
	}
	to := make([]Recipient, len(d.Deliveries))
	for i, delivery := range d.Deliveries {
		found := false
		for _, pinned := range s.config.Recipients[r.Caller] {
			if bytes.Equal(pinned.der, delivery.Certificate) {
				to[i], found = pinned, true
			}
		}
		if !found {
			return nil, unpinned(fmt.Sprintf("DeliveryData[%d]: the certificate with SHA-256 %s is not pinned for this caller", i, certFingerprint(delivery.Certificate)))
		}
	}
	return to, nil
}

func certFingerprint(der []byte) string {
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:])
}

// fill makes the reply of a request: keys are those of specs, in its order.
func (d *CPIX) fill(keys []custodian.IssuedKey, to []Recipient) error {
	if len(keys) != len(d.Keys) {
		return fmt.Errorf("speke: %d keys were issued, not %d", len(keys), len(d.Keys))
	}
	var s *sealer
	if len(to) > 0 {
		s = newSealer(wrappingFor(to))
		defer s.close()
		for i, delivery := range d.Deliveries {
			if err := s.deliver(delivery.e, to[i], d.Version); err != nil {
				return fmt.Errorf("speke: recipient %s: %w", to[i].Fingerprint(), err)
			}
		}
	}
	for i := range keys {
		if err := d.Keys[i].fill(&keys[i], s); err != nil {
			return fmt.Errorf("speke: content key %s: %w", keys[i].KID, err)
		}
	}
	for _, sys := range d.Systems {
		if err := sys.fill(&keys[d.keys[sys.KID]]); err != nil {
			return fmt.Errorf("speke: content key %s: DRM system %s: %w", keys[d.keys[sys.KID]].KID, sys.SystemID, err)
		}
	}
	for _, list := range d.root.children {
		for _, e := range list.children {
			// The stored KID stands for the requested one everywhere.
			if kid, err := kidAttr(e); err == nil {
				e.setAttr("kid", keys[d.keys[kid]].KID.String())
			}
		}
	}
	return nil
}

// wrappingFor is the one of all recipients, or what each reader has to know.
func wrappingFor(to []Recipient) KeyWrapping {
	for _, r := range to {
		if r.wrap != to[0].wrap {
			return WrapCBC
		}
	}
	return to[0].wrap
}

// fill writes the key, in clear or sealed, and the IV that was issued with it.
// An IV that the request brought does not count: of cbcs the stored one has to
// be used, because licences carry it, and a fixed one for cenc would repeat
// key stream between tracks.
func (k CPIXKey) fill(key *custodian.IssuedKey, s *sealer) (err error) {
	k.e.removeAttr("explicitIV")
	if len(key.IV) > 0 {
		k.e.setAttr("explicitIV", string(encodeBase64(key.IV)))
	}
	key.Key.Use(func(cek []byte) {
		if s != nil {
			err = s.seal(k.e, cek)
			return
		}
		k.e.add(nsCPIX, "Data").add(nsPSKC, "Secret").add(nsPSKC, "PlainValue").text = encodeBase64(cek)
	})
	return err
}

// fill writes the signalling that was asked for, and no other.
func (sys CPIXSystem) fill(key *custodian.IssuedKey) (err error) {
	var made Signalling
	key.Key.Use(func(cek []byte) { made, err = NewSignalling(sys.SystemID, key.ContentKey, cek, WidevineData{}) })
	if err != nil {
		return err
	}
	for _, c := range sys.e.children {
		text := ""
		switch c.name.Local {
		case "PSSH":
			c.text = encodeBase64(made.PSSH)
			continue
		case "ContentProtectionData":
			if sys.SystemID == FairPlay {
				c.text = nil
				continue // there is none, and the element stays as it was asked for
			}
			text, err = made.DASH()
		case "HLSSignalingData":
			tag := HLSKey
			if p, _ := c.attr("playlist"); p == "master" || p == "multiVariant" {
				tag = HLSSessionKey
			}
			text, err = made.HLS(tag)
		case "SmoothStreamingProtectionHeaderData", "ProtectionHeader":
			c.text = encodeBase64(made.Object) // of PlayReady only; it is text, not base64 of text
			continue
		case "URIExtXKey":
			text, _, err = made.hlsURI()
		case "KeyFormat":
			_, text, err = made.hlsURI()
		case "KeyFormatVersions":
			text = hlsKeyFormatVersions
		}
		if err != nil {
			return fmt.Errorf("%s: %w", c.name.Local, err)
		}
		c.text = encodeBase64([]byte(text))
	}
	return nil
}
