package packager

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net/http"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/rpc"
)

// A status of the Widevine Common Encryption API: the ones that a refusal here
// can have. INTERNAL_ERROR is never among them: after it Shaka Packager 3.4.2
// asks once more, and then trips over the two answers. Trouble on our side has
// an HTTP status instead.
type wvStatus string

const (
	wvOK                 wvStatus = "OK"
	wvSignatureFailed    wvStatus = "SIGNATURE_FAILED"
	wvContentIDMissing   wvStatus = "CONTENT_ID_MISSING"
	wvPolicyUnknown      wvStatus = "POLICY_UNKNOWN"
	wvTrackTypeMissing   wvStatus = "TRACK_TYPE_MISSING"
	wvTrackTypeUnknown   wvStatus = "TRACK_TYPE_UNKNOWN"
	wvMalformed          wvStatus = "MALFORMED_REQUEST"
	wvAccessDenied       wvStatus = "ACCESS_DENIED"
	wvTooManySpecifiers  wvStatus = "TOO_MANY_CONTENT_SPECIFIERS"
	wvRotationDRMType    wvStatus = "KEY_ROTATION_WITH_UNSUPPORTED_DRM_TYPE"
	wvNoPeriodsRequested wvStatus = "NO_REQUESTED_CRYPTO_PERIODS"
)

// A wvError is a refusal that the API has a status for. err is its place in the
// domain's vocabulary.
type wvError struct {
	status wvStatus
	err    error
}

func (e *wvError) Error() string { return e.err.Error() }
func (e *wvError) Unwrap() error { return e.err }

func wvInvalid(status wvStatus, field, format string, args ...any) error {
	return &wvError{status, &custodian.InvalidError{Field: field, Err: fmt.Errorf(format, args...)}}
}

// An envelope carries a request and its signature. The signature is over the
// bytes of Request, so it is checked before they are looked at.
type envelope struct {
	Request   []byte
	Signature []byte
	Signer    string
}

// A wvRequest is a request for the keys of one content item.
type wvRequest struct {
	ContentID custodian.ContentID
	Tracks    []custodian.TrackType
	Scheme    custodian.Scheme
	Policy    string
	// Periods are the crypto periods in order; one that is not set where keys do
	// not rotate.
	Periods []custodian.Period
}

func (r wvRequest) rotates() bool { return r.Periods[0].Set }

// maxPolicy in bytes; it goes into every PSSH box.
const maxPolicy = 128

// widevine answers one request for content keys.
func (s *Server) widevine(ctx context.Context, c *call) (reply, error) {
	e, err := parseEnvelope(c.body)
	if err != nil {
		return reply{}, err
	}
	if err := s.signers.Load().check(c.Caller(), e); err != nil {
		s.config.Log.WarnContext(ctx, "signature refused", slog.String("caller", c.Caller().ID), slog.String("request_id", c.RequestID()), slog.Any("err", err))
		return reply{}, &wvError{wvSignatureFailed, fmt.Errorf("signature: %w: %w", err, custodian.ErrDenied)}
	}
	req, err := parseWidevine(e.Request)
	if err != nil {
		return reply{}, err
	}
	issue := custodian.IssueRequest{ContentID: req.ContentID}
	for _, p := range req.Periods {
		for _, t := range req.Tracks {
			issue.Keys = append(issue.Keys, custodian.KeySpec{TrackType: t, Scheme: req.Scheme, Period: p})
		}
	}
	keys, err := c.issue(ctx, issue)
	if err != nil {
		// A stream that is running lives on the keys that it has, and asks again
		// after its own timeout. One that starts had better hear what is wrong.
		if req.rotates() && mayPass(err) {
			err = fmt.Errorf("%w: %w", errNoAnswer, err)
		}
		return reply{}, err
	}
	defer func() {
		for i := range keys {
			keys[i].Key.Destroy()
		}
	}()
	return encodeWidevine(req, keys), nil
}

func parseEnvelope(body []byte) (e envelope, err error) {
	fields, err := jsonObject(body)
	if err != nil {
		return e, wvInvalid(wvMalformed, "body", "%w", err)
	}
	if e.Request, err = jsonBytes(fields["request"]); err != nil {
		return e, wvInvalid(wvMalformed, "request", "%w", err)
	}
	if len(e.Request) == 0 {
		return e, wvInvalid(wvMalformed, "request", "it is missing")
	}
	if e.Signature, err = jsonBytes(fields["signature"]); err != nil {
		return e, wvInvalid(wvMalformed, "signature", "%w", err)
	}
	if e.Signer, err = jsonValue[string](fields["signer"]); err != nil {
		return e, wvInvalid(wvMalformed, "signer", "%w", err)
	}
	return e, nil
}

// parseWidevine reads a request. Fields that it does not know are passed over,
// as protocol buffers do, but for those that ask for what is not done here.
//
// group_id and video_feature are checked and have no effect: they ask for
// nothing that concerns the keys.
func parseWidevine(raw []byte) (r wvRequest, err error) {
	fields, err := jsonObject(raw)
	if err != nil {
		return r, wvInvalid(wvMalformed, "request", "%w", err)
	}
	if err := r.parseContent(fields); err != nil {
		return r, err
	}
	if err := r.parseTracks(fields["tracks"]); err != nil {
		return r, err
	}
	scheme, err := jsonValue[string](fields["protection_scheme"])
	if err != nil {
		return r, wvInvalid(wvMalformed, "protection_scheme", "%w", err)
	}
	switch scheme {
	case "", "UNSPECIFIED":
		r.Scheme = custodian.SchemeCENC // before the field existed
	case "CENC", "CBC1", "CENS", "CBCS":
		r.Scheme = custodian.Scheme(strings.ToLower(scheme))
	default:
		return r, wvInvalid(wvMalformed, "protection_scheme", "%.20q: must be CENC, CBC1, CENS or CBCS", scheme)
	}
	if entitled, err := jsonValue[bool](fields["enable_entitlement_license"]); err != nil || entitled {
		return r, wvInvalid(wvMalformed, "enable_entitlement_license", "entitlement licences are not made here")
	}
	if err := r.parsePeriods(fields); err != nil {
		return r, err
	}
	return r, r.parseDRMTypes(fields["drm_types"])
}

func (r *wvRequest) parseContent(fields map[string]json.RawMessage) error {
	id, err := jsonBytes(fields["content_id"])
	if err != nil {
		return wvInvalid(wvMalformed, "content_id", "%w", err)
	}
	for _, other := range []string{"pssh_data", "asset_id", "seed_id"} {
		if !isAbsent(fields[other]) && len(id) > 0 {
			return wvInvalid(wvTooManySpecifiers, other, "content_id names the content already")
		}
	}
	if len(id) == 0 {
		return wvInvalid(wvContentIDMissing, "content_id", "it is missing; keys are issued for a content_id only")
	}
	r.ContentID = id
	if err := r.ContentID.Check(); err != nil {
		return wvInvalid(wvMalformed, "content_id", "%w", err)
	}
	if r.Policy, err = jsonValue[string](fields["policy"]); err != nil {
		return wvInvalid(wvMalformed, "policy", "%w", err)
	}
	if len(r.Policy) > maxPolicy || strings.ContainsFunc(r.Policy, func(c rune) bool { return c < ' ' || c == 0x7f }) {
		return wvInvalid(wvPolicyUnknown, "policy", "must be at most %d bytes of text without control characters", maxPolicy)
	}
	if group, err := jsonBytes(fields["group_id"]); err != nil || len(group) > custodian.MaxContentIDSize {
		return wvInvalid(wvMalformed, "group_id", "must be base64 of at most %d bytes", custodian.MaxContentIDSize)
	}
	return nil
}

func (r *wvRequest) parseTracks(raw json.RawMessage) error {
	tracks, err := jsonValue[[]json.RawMessage](raw)
	if err != nil {
		return wvInvalid(wvMalformed, "tracks", "%w", err)
	}
	if len(tracks) == 0 {
		return wvInvalid(wvTrackTypeMissing, "tracks", "no track is named")
	}
	if len(tracks) > custodian.MaxKeysPerIssue {
		return wvInvalid(wvMalformed, "tracks", "%d tracks: must be at most %d", len(tracks), custodian.MaxKeysPerIssue)
	}
	for i, raw := range tracks {
		at := fmt.Sprintf("tracks[%d]", i)
		track, err := jsonObject(raw)
		if err != nil {
			return wvInvalid(wvMalformed, at, "%w", err)
		}
		name, err := jsonValue[string](track["type"])
		if err != nil {
			return wvInvalid(wvMalformed, at+".type", "%w", err)
		}
		if name == "" {
			return wvInvalid(wvTrackTypeMissing, at+".type", "it is missing")
		}
		t := custodian.TrackType(name)
		if err := t.Check(); err != nil {
			return wvInvalid(wvTrackTypeUnknown, at+".type", "%w", err)
		}
		if slices.Contains(r.Tracks, t) {
			return wvInvalid(wvMalformed, at+".type", "%s is there twice", t)
		}
		r.Tracks = append(r.Tracks, t)
	}
	return nil
}

// parsePeriods reads the crypto periods that are asked for: exactly these are
// answered, because a packager that gets fewer encrypts all later ones with the
// wrong keys.
func (r *wvRequest) parsePeriods(fields map[string]json.RawMessage) error {
	if isAbsent(fields["first_crypto_period_index"]) && isAbsent(fields["crypto_period_count"]) {
		r.Periods = []custodian.Period{{}}
		return nil
	}
	var first, count, seconds uint32
	for name, v := range map[string]*uint32{"first_crypto_period_index": &first, "crypto_period_count": &count, "crypto_period_seconds": &seconds} {
		var err error
		if *v, err = jsonUint32(fields[name]); err != nil {
			return wvInvalid(wvMalformed, name, "%w", err)
		}
	}
	if count == 0 {
		return wvInvalid(wvNoPeriodsRequested, "crypto_period_count", "no crypto period is asked for")
	}
	if most := custodian.MaxKeysPerIssue / len(r.Tracks); count > uint32(most) {
		return wvInvalid(wvMalformed, "crypto_period_count", "%d periods of %d tracks: must be at most %d", count, len(r.Tracks), most)
	}
	if first > math.MaxUint32-(count-1) {
		return wvInvalid(wvMalformed, "first_crypto_period_index", "%d: the last index is beyond %d", first, uint32(math.MaxUint32))
	}
	for i := range count {
		r.Periods = append(r.Periods, period(first+i, seconds))
	}
	return nil
}

// period is a crypto period of the media's own time, in which period 0 starts at
// 0: as in a live stream, that is 1970-01-01T00:00:00Z. What a record cannot
// hold is left out.
func period(index, seconds uint32) custodian.Period {
	p := custodian.Period{Set: true, Index: index}
	if seconds == 0 {
		return p
	}
	start := int64(index) * int64(seconds)
	timed := p
	timed.Start, timed.End = time.Unix(start, 0).UTC(), time.Unix(start+int64(seconds), 0).UTC()
	if timed.Check() != nil {
		return p
	}
	return timed
}

func (r *wvRequest) parseDRMTypes(raw json.RawMessage) error {
	types, err := jsonValue[[]string](raw)
	if err != nil {
		return wvInvalid(wvMalformed, "drm_types", "%w", err)
	}
	if r.rotates() && slices.ContainsFunc(types, func(t string) bool { return t != "WIDEVINE" }) {
		return wvInvalid(wvRotationDRMType, "drm_types", "%.80q: keys rotate for WIDEVINE only", types)
	}
	if len(types) > 0 && !slices.Contains(types, "WIDEVINE") {
		return wvInvalid(wvMalformed, "drm_types", "%.80q: PSSH data is made for WIDEVINE only", types)
	}
	return nil
}

// What is wrong with a text that came from outside. Errors never repeat more of
// it than a name.
var (
	errNotJSON   = errors.New("not JSON in UTF-8")
	errNotObject = errors.New("not a JSON object")
	errNotBase64 = errors.New("not base64")
	errJSONType  = errors.New("a JSON value of another type is needed")
)

// jsonObject takes one JSON object apart. Names are exact and come once each:
// what two readers could understand differently is refused.
func jsonObject(raw []byte) (map[string]json.RawMessage, error) {
	if !utf8.Valid(raw) || !json.Valid(raw) {
		return nil, errNotJSON
	}
	d := json.NewDecoder(bytes.NewReader(raw))
	if t, err := d.Token(); err != nil || t != json.Delim('{') {
		return nil, errNotObject
	}
	fields := map[string]json.RawMessage{}
	for d.More() {
		t, err := d.Token()
		if err != nil {
			return nil, errNotJSON
		}
		name, _ := t.(string) // what is valid has only strings here
		if _, twice := fields[name]; twice {
			return nil, fmt.Errorf("%.40q is there twice", name)
		}
		var v json.RawMessage
		if err := d.Decode(&v); err != nil {
			return nil, errNotJSON
		}
		fields[name] = v
	}
	return fields, nil
}

func isAbsent(raw json.RawMessage) bool { return len(raw) == 0 || string(raw) == "null" }

// jsonValue reads an optional value; absent is zero.
func jsonValue[T any](raw json.RawMessage) (v T, err error) {
	if isAbsent(raw) {
		return v, nil
	}
	if err := json.Unmarshal(raw, &v); err != nil {
		return v, errJSONType
	}
	return v, nil
}

// jsonUint32 reads a number, or as protocol buffers allow, a string of one.
func jsonUint32(raw json.RawMessage) (uint32, error) {
	return jsonValue[uint32](bytes.Trim(raw, `"`))
}

// jsonBytes reads bytes in base64, standard or for URLs, padded or not.
func jsonBytes(raw json.RawMessage) ([]byte, error) {
	s, err := jsonValue[string](raw)
	if err != nil {
		return nil, err
	}
	s = strings.NewReplacer("-", "+", "_", "/").Replace(strings.TrimRight(s, "="))
	b, err := base64.RawStdEncoding.DecodeString(s)
	if err != nil {
		return nil, errNotBase64
	}
	return b, nil
}

const contentTypeJSON = "application/json"

// encodeWidevine writes the answer by hand, so that no library keeps a copy of
// the keys: each goes from locked memory into the inner message, and that into
// the body, which is wiped after it is sent.
func encodeWidevine(r wvRequest, keys []custodian.IssuedKey) reply {
	size := 256
	boxes := make([][]byte, len(keys))
	for i := range keys {
		boxes[i] = WidevinePSSH(widevineData(r, keys[i].ContentKey))
		size += 512 + 6*len(keys[i].TrackType) + 4*len(boxes[i]) // more than is needed: growing would leave a copy behind
	}
	b := append(make([]byte, 0, size), `{"status":"OK","drm":[{"type":"WIDEVINE","system_id":"edef8ba979d64acea3c827dcd51d21ed"}],"tracks":[`...)
	for i := range keys {
		k, box := &keys[i], boxes[i]
		if i > 0 {
			b = append(b, ',')
		}
		b = appendString(append(b, `{"type":`...), string(k.TrackType))
		b = appendBase64(append(b, `,"key_id":`...), k.KID[:])
		b = append(b, `,"key":`...)
		k.Key.Use(func(cek []byte) { b = appendBase64(b, cek) })
		if len(k.IV) > 0 {
			b = appendBase64(append(b, `,"iv":`...), k.IV)
		}
		b = appendBase64(append(b, `,"pssh":[{"drm_type":"WIDEVINE","data":`...), box[psshHeader:])
		b = append(appendBase64(append(b, `,"boxes":`...), box), "}]"...)
		if k.HasPeriod {
			b = fmt.Appendf(b, `,"crypto_period_index":%d`, k.Period)
			if !k.PeriodStart.IsZero() && !k.PeriodEnd.IsZero() {
				b = fmt.Appendf(b, `,"crypto_period_start_time":%q,"crypto_period_end_time":%q`, k.PeriodStart.UTC().Format(time.RFC3339), k.PeriodEnd.UTC().Format(time.RFC3339))
			}
		}
		b = append(b, '}')
	}
	b = append(b, "]}"...)
	return envelop(0, b)
}

// psshHeader in bytes, of a box of version 0 before its data.
const psshHeader = 32

func widevineData(r wvRequest, k custodian.ContentKey) WidevineData {
	d := WidevineData{KIDs: []custodian.KID{k.KID}, ContentID: k.ContentID, Policy: r.Policy, Scheme: k.Scheme,
		Period: custodian.Period{Set: k.HasPeriod, Index: k.Period}}
	if !k.PeriodStart.IsZero() && !k.PeriodEnd.IsZero() {
		d.PeriodSeconds = uint32(k.PeriodEnd.Sub(k.PeriodStart) / time.Second)
	}
	return d
}

// envelop puts the inner message into its envelope, and wipes it.
func envelop(status int, inner []byte) reply {
	const open, shut = `{"response":`, `}`
	b := make([]byte, 0, len(open)+2+base64.StdEncoding.EncodedLen(len(inner))+len(shut))
	b = append(appendBase64(append(b, open...), inner), shut...)
	clear(inner[:cap(inner)])
	return reply{status: status, contentType: contentTypeJSON, body: b}
}

func appendBase64(b, v []byte) []byte {
	return append(base64.StdEncoding.AppendEncode(append(b, '"'), v), '"')
}

func appendString(b []byte, s string) []byte {
	q, _ := json.Marshal(s) // a string always can be
	return append(b, q...)
}

// refuseWidevine answers a refusal with its status where the API has one, and
// with an HTTP status where it has none: a packager takes a status that it does
// not know for success. No answer but OK has tracks. status_message is for
// people; a packager passes it over.
func refuseWidevine(r rpc.Refusal, err error) reply {
	status := wvStatus("")
	if e, ok := errors.AsType[*wvError](err); ok {
		status = e.status
	} else if r.Reason == custodian.ReasonOf(custodian.ErrInvalid) {
		status = wvMalformed
	} else if r.Reason == custodian.ReasonOf(custodian.ErrDenied) {
		status = wvAccessDenied
	}
	message := r.Message
	if status == wvSignatureFailed {
		message = "the request's signature is not accepted"
	}
	if status == "" {
		b := appendString([]byte(`{"error":`), string(r.Reason))
		b = append(appendString(append(b, `,"message":`...), message), '}')
		return reply{status: r.HTTPStatus, contentType: contentTypeJSON, body: b}
	}
	b := appendString([]byte(`{"status":`), string(status))
	return envelop(http.StatusOK, append(appendString(append(b, `,"status_message":`...), message), '}'))
}
