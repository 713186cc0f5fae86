package custodian_test

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	jose "github.com/go-jose/go-jose/v4"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/audit"
)

const playback = "https://playback.test"

// A signer signs licence tokens as a playback service does.
type signer struct {
	t   testing.TB
	alg jose.SignatureAlgorithm
	key any
	kid string
}

func newSigner(t testing.TB, alg jose.SignatureAlgorithm, kid string) signer {
	t.Helper()
	s := signer{t: t, alg: alg, kid: kid}
	var err error
	switch alg {
	case jose.ES256:
		s.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case jose.ES384:
		s.key, err = ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	case jose.RS256:
		s.key, err = rsa.GenerateKey(rand.Reader, 2048)
	case jose.EdDSA:
		_, s.key, err = ed25519.GenerateKey(rand.Reader)
	}
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// public is the JWK that the issuer publishes.
func (s signer) public() jose.JSONWebKey {
	k := jose.JSONWebKey{Key: s.key, KeyID: s.kid, Use: "sig"}
	return k.Public()
}

// sign makes a token of claims, raw JSON or a map.
func (s signer) sign(payload any) string {
	s.t.Helper()
	return s.signWith(payload, (&jose.SignerOptions{}).WithType("JWT").WithHeader("kid", s.kid))
}

func (s signer) signWith(payload any, o *jose.SignerOptions) string {
	s.t.Helper()
	raw, ok := payload.(string)
	if !ok {
		b, err := json.Marshal(payload)
		if err != nil {
			s.t.Fatal(err)
		}
		raw = string(b)
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: s.alg, Key: s.key}, o)
	if err != nil {
		s.t.Fatal(err)
	}
	signed, err := signer.Sign([]byte(raw))
	if err != nil {
		s.t.Fatal(err)
	}
	compact, err := signed.CompactSerialize()
	if err != nil {
		s.t.Fatal(err)
	}
	return compact
}

func jwks(t testing.TB, keys ...jose.JSONWebKey) []byte {
	t.Helper()
	b, err := json.Marshal(jose.JSONWebKeySet{Keys: keys})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func tokenKeys(t testing.TB, keys ...jose.JSONWebKey) *custodian.TokenKeys {
	t.Helper()
	k := custodian.NewTokenKeys()
	if _, err := k.Set(jwks(t, keys...)); err != nil {
		t.Fatal(err)
	}
	return k
}

// A tokenWorld is a world whose releases need a licence token, but for the
// categories trailers (optional) and free (none), with one key of two tracks.
type tokenWorld struct {
	*world
	signer signer
	keys   *custodian.TokenKeys
	hd, sd custodian.KID
}

func newTokenWorld(t *testing.T, change func(*custodian.Tokens)) *tokenWorld {
	t.Helper()
	w := &tokenWorld{world: bareWorld(t), signer: newSigner(t, jose.ES256, "k1")}
	w.keys = tokenKeys(t, w.signer.public())
	rules := custodian.Tokens{Audience: "custodian.test", Skew: 5 * time.Second,
		Issuers:    []custodian.TokenIssuer{{Issuer: playback, Keys: w.keys, AllCategories: true}},
		Categories: map[custodian.CategoryName]custodian.TokenMode{"trailers": custodian.TokenOptional, "free": custodian.TokenNone}}
	if change != nil {
		change(&rules)
	}
	p, err := testPolicy(t).WithTokens(rules)
	if err != nil {
		t.Fatal(err)
	}
	w.cfg.Policy = p
	w.openParts()
	if err := custodian.Init(t.Context(), w.cfg, custodian.InitSpec{}); err != nil {
		t.Fatal(err)
	}
	w.reopen()
	w.category("movies")
	keys := w.issue("movies", "film", "HD", "SD")
	w.hd, w.sd = keys[0].KID, keys[1].KID
	return w
}

var jtis int

// claims are those of a good token for the HD key of film.
func (w *tokenWorld) claims() map[string]any {
	jtis++
	return map[string]any{"iss": playback, "aud": "custodian.test", "iat": w.now().Unix(), "exp": w.now().Add(30 * time.Second).Unix(),
		"jti": fmt.Sprintf("token-%d", jtis), "sid": "session-1", "content_id": "film", "track_types": []string{"HD"}}
}

// token is a good one with some claims changed; nil takes a claim away.
func (w *tokenWorld) token(changes map[string]any) string {
	w.t.Helper()
	c := w.claims()
	maps.Copy(c, changes)
	maps.DeleteFunc(c, func(_ string, v any) bool { return v == nil })
	return w.signer.sign(c)
}

// show releases a key with a token and says how that ended.
func (w *tokenWorld) show(who custodian.Caller, kid custodian.KID, token string) error {
	w.t.Helper()
	return w.ask(who, custodian.RetrieveRequest{KIDs: []custodian.KID{kid}, LicenceToken: token})
}

func (w *tokenWorld) ask(who custodian.Caller, req custodian.RetrieveRequest) error {
	w.t.Helper()
	res, err := w.c.Retrieve(w.t.Context(), who, req)
	if err != nil {
		return err
	}
	defer func() {
		for _, r := range res {
			r.Key.Destroy()
		}
	}()
	for _, r := range res {
		if (r.Err == nil) != (r.Key.Len() == custodian.CEKSize) {
			w.t.Errorf("got %d bytes and %v", r.Key.Len(), r.Err)
		}
	}
	return res[0].Err
}

func TestToken(t *testing.T) {
	w := newTokenWorld(t, nil)
	wantErr(t, "a good token", w.show(provider, w.hd, w.token(nil)), nil)
	wantErr(t, "no token", w.show(provider, w.hd, ""), custodian.ErrTokenMissing)
	kids := []string{w.hd.String(), w.sd.String()}
	wantErr(t, "KIDs instead of track types", w.show(provider, w.sd, w.token(map[string]any{"kids": kids, "track_types": nil})), nil)
	wantErr(t, "a list of audiences", w.show(provider, w.hd, w.token(map[string]any{"aud": []string{"other", "custodian.test"}})), nil)
	wantErr(t, "a content ID in base64", w.show(provider, w.hd, w.token(map[string]any{"content_id": nil, "content_id_b64": base64.RawURLEncoding.EncodeToString([]byte("film"))})), nil)
	from := w.log.Size()
	wantErr(t, "a session in the token only", w.show(provider, w.hd, w.token(nil)), nil)
	if e := w.entries(from); len(e[0].Refs) != 1 || e[0].Refs[0].Kind != "session" {
		t.Errorf("the entry has the references %+v, want that of the token's session", e[0].Refs)
	}
	wantErr(t, "the session that the caller says", w.ask(provider, custodian.RetrieveRequest{KIDs: []custodian.KID{w.hd}, LicenceToken: w.token(nil), SessionID: "session-1"}), nil)

	// One token for the keys of one call, of which it allows one.
	res, err := w.c.Retrieve(t.Context(), provider, custodian.RetrieveRequest{KIDs: []custodian.KID{w.sd, w.hd}, LicenceToken: w.token(nil)})
	if err != nil {
		t.Fatal(err)
	}
	wantErr(t, "the key that it does not name", res[0].Err, custodian.ErrTokenMismatch)
	wantErr(t, "the key that it names", res[1].Err, nil)
	res[1].Key.Destroy()

	// EdDSA, beside the key of before: issuers change keys.
	ed := newSigner(t, jose.EdDSA, "k2")
	if ids, err := w.keys.Set(jwks(t, w.signer.public(), ed.public())); err != nil || !slices.Equal(ids, []string{"k1", "k2"}) {
		t.Fatalf("set of two keys: got %v and %v", ids, err)
	}
	wantErr(t, "ES256 beside EdDSA", w.show(provider, w.hd, w.token(nil)), nil)
	wantErr(t, "EdDSA", w.show(provider, w.hd, ed.sign(w.claims())), nil)

	// The categories that do not need one. A bad one refuses all the same.
	for name, mode := range map[custodian.CategoryName]string{"trailers": "optional", "free": "none"} {
		w.category(name)
		kid := w.issue(name, "clip-"+string(name), "HD")[0].KID
		wantErr(t, mode+": no token", w.show(provider, kid, ""), nil)
		wantErr(t, mode+": a good one", w.show(provider, kid, w.token(map[string]any{"content_id": "clip-" + string(name)})), nil)
		wantErr(t, mode+": one for other content", w.show(provider, kid, w.token(nil)), custodian.ErrTokenMismatch)
		wantErr(t, mode+": an expired one", w.show(provider, kid, w.token(map[string]any{"iat": w.now().Unix() - 100, "exp": w.now().Unix() - 70})), custodian.ErrTokenExpired)
	}
	// Who may not have the key hears nothing of tokens.
	wantErr(t, "not granted", w.show(nobody, w.hd, w.token(nil)), custodian.ErrDenied)
	wantErr(t, "unknown", w.show(narrow, custodian.KID{9}, w.token(nil)), custodian.ErrDenied)
}

// TestTokenAttacks: each is refused, with the reason that is written down, and
// no key is opened for it.
func TestTokenAttacks(t *testing.T) {
	w := newTokenWorld(t, nil)
	leaf := sha256.Sum256([]byte("the certificate"))
	certified := provider
	certified.Cert = leaf
	thumb := base64.RawURLEncoding.EncodeToString(leaf[:])
	wantErr(t, "the caller's own certificate", w.show(certified, w.hd, w.token(map[string]any{"cnf": map[string]string{"x5t#S256": thumb}})), nil)

	public, err := x509.MarshalPKIXPublicKey(w.signer.public().Key)
	if err != nil {
		t.Fatal(err)
	}
	hmac := signer{t: t, alg: jose.HS256, key: public, kid: "k1"}
	retired, p384, rs, thief := newSigner(t, jose.ES256, "k0"), newSigner(t, jose.ES384, "k1"), newSigner(t, jose.RS256, "k1"), newSigner(t, jose.ES256, "k1")
	ed := newSigner(t, jose.EdDSA, "k1")
	good := w.token(nil)
	header := func(h string) string { return base64.RawURLEncoding.EncodeToString([]byte(h)) }
	parts := strings.Split(good, ".")
	raw := func() string {
		b, err := json.Marshal(w.claims())
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	with := func(extra string) string { return strings.TrimSuffix(raw(), "}") + "," + extra + "}" }
	now := w.now().Unix()
	embedded := &jose.SignerOptions{EmbedJWK: true}

	for name, a := range map[string]struct {
		token string
		want  error
	}{
		"stripped":                          {"", custodian.ErrTokenMissing},
		"expired":                           {w.token(map[string]any{"iat": now - 36, "exp": now - 6}), custodian.ErrTokenExpired},
		"not yet valid":                     {w.token(map[string]any{"iat": now + 6, "exp": now + 36}), custodian.ErrTokenExpired},
		"not yet valid by nbf":              {w.token(map[string]any{"nbf": now + 10}), custodian.ErrTokenExpired},
		"a lifetime of an hour":             {w.token(map[string]any{"exp": now + 3600}), custodian.ErrTokenInvalid},
		"without end":                       {w.token(map[string]any{"exp": nil}), custodian.ErrTokenInvalid},
		"without iat":                       {w.token(map[string]any{"iat": nil}), custodian.ErrTokenInvalid},
		"an end beyond all time":            {w.token(map[string]any{"exp": 1e300}), custodian.ErrTokenInvalid},
		"a negative iat":                    {w.token(map[string]any{"iat": -1}), custodian.ErrTokenInvalid},
		"other content":                     {w.token(map[string]any{"content_id": "other"}), custodian.ErrTokenMismatch},
		"other KID":                         {w.token(map[string]any{"kids": []string{w.sd.String()}}), custodian.ErrTokenMismatch},
		"other track type":                  {w.token(map[string]any{"track_types": []string{"SD"}}), custodian.ErrTokenMismatch},
		"no key named":                      {w.token(map[string]any{"track_types": nil}), custodian.ErrTokenInvalid},
		"no content":                        {w.token(map[string]any{"content_id": nil}), custodian.ErrTokenInvalid},
		"two contents":                      {w.token(map[string]any{"content_id_b64": "Zmlsbg"}), custodian.ErrTokenInvalid},
		"no session":                        {w.token(map[string]any{"sid": nil}), custodian.ErrTokenInvalid},
		"no jti":                            {w.token(map[string]any{"jti": nil}), custodian.ErrTokenInvalid},
		"a jti of 257 bytes":                {w.token(map[string]any{"jti": strings.Repeat("j", 257)}), custodian.ErrTokenInvalid},
		"other audience":                    {w.token(map[string]any{"aud": "other.test"}), custodian.ErrTokenInvalid},
		"no audience":                       {w.token(map[string]any{"aud": nil}), custodian.ErrTokenInvalid},
		"other issuer":                      {w.token(map[string]any{"iss": "https://evil.test"}), custodian.ErrTokenInvalid},
		"no issuer":                         {w.token(map[string]any{"iss": nil}), custodian.ErrTokenInvalid},
		"other caller's certificate":        {w.token(map[string]any{"cnf": map[string]string{"x5t#S256": strings.Repeat("A", 43)}}), custodian.ErrTokenMismatch},
		"cnf of another kind":               {w.token(map[string]any{"cnf": map[string]string{"jkt": thumb}}), custodian.ErrTokenInvalid},
		"cnf of two kinds":                  {w.token(map[string]any{"cnf": map[string]string{"x5t#S256": thumb, "jkt": thumb}}), custodian.ErrTokenInvalid},
		"empty cnf":                         {w.token(map[string]any{"cnf": map[string]string{}}), custodian.ErrTokenInvalid},
		"alg none":                          {header(`{"alg":"none","kid":"k1"}`) + "." + parts[1] + ".", custodian.ErrTokenInvalid},
		"alg none with the signature":       {header(`{"alg":"none","kid":"k1"}`) + "." + parts[1] + "." + parts[2], custodian.ErrTokenInvalid},
		"HMAC with the public key":          {hmac.sign(w.claims()), custodian.ErrTokenInvalid},
		"RS256":                             {rs.sign(w.claims()), custodian.ErrTokenInvalid},
		"ES384, and so another curve":       {p384.sign(w.claims()), custodian.ErrTokenInvalid},
		"EdDSA with the key of ES256":       {ed.sign(w.claims()), custodian.ErrTokenInvalid},
		"ES256 in the header of EdDSA":      {header(`{"alg":"EdDSA","kid":"k1"}`) + "." + parts[1] + "." + parts[2], custodian.ErrTokenInvalid},
		"a thief's key under its key ID":    {thief.sign(w.claims()), custodian.ErrTokenInvalid},
		"the thief's key brought along":     {thief.signWith(w.claims(), embedded), custodian.ErrTokenInvalid},
		"key of a retired issuer":           {retired.sign(w.claims()), custodian.ErrTokenInvalid},
		"no key ID":                         {w.signer.signWith(w.claims(), (&jose.SignerOptions{}).WithType("JWT")), custodian.ErrTokenInvalid},
		"critical header":                   {w.signer.signWith(w.claims(), (&jose.SignerOptions{}).WithHeader("kid", "k1").WithHeader("crit", []string{"x"}).WithHeader("x", 1)), custodian.ErrTokenInvalid},
		"another type":                      {w.signer.signWith(w.claims(), (&jose.SignerOptions{}).WithType("logout+jwt").WithHeader("kid", "k1")), custodian.ErrTokenInvalid},
		"duplicate content_id":              {w.signer.sign(with(`"content_id":"film"`)), custodian.ErrTokenInvalid},
		"duplicate exp":                     {w.signer.sign(with(fmt.Sprintf(`"exp":%d`, now+30))), custodian.ErrTokenInvalid},
		"duplicate unknown claim":           {w.signer.sign(with(`"x":1,"x":2`)), custodian.ErrTokenInvalid},
		"claims in other letters":           {w.token(map[string]any{"content_id": nil, "Content_ID": "film"}), custodian.ErrTokenInvalid},
		"claims of another type":            {w.token(map[string]any{"content_id": 7}), custodian.ErrTokenInvalid},
		"a list of claims":                  {w.signer.sign("[" + raw() + "]"), custodian.ErrTokenInvalid},
		"no JSON":                           {w.signer.sign("film"), custodian.ErrTokenInvalid},
		"65 KIDs":                           {w.token(map[string]any{"kids": slices.Repeat([]string{w.hd.String()}, 65)}), custodian.ErrTokenInvalid},
		"a KID that is none":                {w.token(map[string]any{"kids": []string{"x"}}), custodian.ErrTokenInvalid},
		"1 MB":                              {strings.Repeat("A", 1<<20), custodian.ErrTokenInvalid},
		"1 MB, signed":                      {w.token(map[string]any{"pad": strings.Repeat("A", 1<<20)}), custodian.ErrTokenInvalid},
		"no token at all":                   {"film", custodian.ErrTokenInvalid},
		"two parts":                         {parts[0] + "." + parts[1], custodian.ErrTokenInvalid},
		"four parts":                        {good + ".e30", custodian.ErrTokenInvalid},
		"no signature":                      {parts[0] + "." + parts[1] + ".", custodian.ErrTokenInvalid},
		"a changed claim":                   {parts[0] + "." + header(raw()) + "." + parts[2], custodian.ErrTokenInvalid},
		"a signature of zeros":              {parts[0] + "." + parts[1] + "." + base64.RawURLEncoding.EncodeToString(make([]byte, 64)), custodian.ErrTokenInvalid},
		"a signature that is cut":           {parts[0] + "." + parts[1] + "." + parts[2][:len(parts[2])-2], custodian.ErrTokenInvalid},
		"JSON serialization instead of JWT": {`{"payload":"` + parts[1] + `","protected":"` + parts[0] + `","signature":"` + parts[2] + `"}`, custodian.ErrTokenInvalid},
	} {
		t.Run(name, func(t *testing.T) {
			opened := w.breaker.count("hsm.Open")
			from := w.logSize()
			wantErr(t, name, w.show(certified, w.hd, a.token), a.want)
			if got := w.breaker.count("hsm.Open"); got != opened {
				t.Errorf("the token opened %d keys", got-opened)
			}
			entries := w.entries(from)
			if len(entries) != 1 || entries[0].Outcome != audit.Denied || entries[0].Reason != string(custodian.ReasonOf(a.want)) {
				t.Errorf("the audit log has %+v, want one denial with %s", entries, custodian.ReasonOf(a.want))
			}
		})
	}
	wantErr(t, "other session", w.ask(provider, custodian.RetrieveRequest{KIDs: []custodian.KID{w.hd}, LicenceToken: w.token(nil), SessionID: "session-2"}), custodian.ErrTokenMismatch)
	wantErr(t, "the good one after all that", w.show(provider, w.hd, good), nil)
	// The key leaves the set: what it signed is worth nothing any more.
	kept := w.token(nil)
	if _, err := w.keys.Set(jwks(t, newSigner(t, jose.ES256, "k9").public())); err != nil {
		t.Fatal(err)
	}
	wantErr(t, "key of an issuer that retired it", w.show(provider, w.hd, kept), custodian.ErrTokenInvalid)
}

// logSize is how many entries the log has.
func (w *world) logSize() uint64 {
	w.t.Helper()
	return uint64(len(w.entries(0)))
}

// TestTokenReplay: a token is bound to its first use, may be shown three times,
// and a restart changes nothing about either.
func TestTokenReplay(t *testing.T) {
	other := custodian.Caller{ID: narrow.ID, Roles: narrow.Roles}
	w := newTokenWorld(t, nil)
	token := w.token(map[string]any{"jti": "once"})
	wantErr(t, "first use", w.show(provider, w.hd, token), nil)
	wantErr(t, "another caller", w.show(other, w.hd, token), custodian.ErrTokenReplayed)
	wantErr(t, "same jti, another session", w.show(provider, w.hd, w.token(map[string]any{"jti": "once", "sid": "session-2"})), custodian.ErrTokenReplayed)
	wantErr(t, "second use", w.show(provider, w.hd, token), nil)
	w.reopen()
	wantErr(t, "another caller after a restart", w.show(other, w.hd, token), custodian.ErrTokenReplayed)
	wantErr(t, "same jti, another session after a restart", w.show(provider, w.hd, w.token(map[string]any{"jti": "once", "sid": "session-2"})), custodian.ErrTokenReplayed)
	wantErr(t, "third use, after a restart", w.show(provider, w.hd, token), nil)
	wantErr(t, "fourth use", w.show(provider, w.hd, token), custodian.ErrTokenReplayed)
	w.reopen()
	wantErr(t, "fourth use after another restart", w.show(provider, w.hd, token), custodian.ErrTokenReplayed)
	// To the last moment in which the token is good, 35 s with the skew.
	w.advance(34 * time.Second)
	wantErr(t, "at its end", w.show(provider, w.hd, token), custodian.ErrTokenReplayed)
	w.reopen()
	wantErr(t, "at its end after a restart", w.show(provider, w.hd, token), custodian.ErrTokenReplayed)
	w.advance(time.Second)
	wantErr(t, "after its end", w.show(provider, w.hd, token), custodian.ErrTokenExpired)
	// The jti is free again when no token that was good then can be any more.
	w.advance(time.Hour)
	wantErr(t, "the jti later", w.show(provider, w.hd, w.token(map[string]any{"jti": "once"})), nil)

	// What is not written down did not happen, and does not count.
	w.reopen()
	token = w.token(nil)
	w.breaker.down("audit.WriteAt")
	if err := w.show(provider, w.hd, token); err == nil {
		t.Error("without an audit log: got the key")
	}
	w.breaker.disarm()
	w.reopen()
	for range 3 {
		wantErr(t, "after a release that was not written down", w.show(provider, w.hd, token), nil)
	}
	wantErr(t, "beyond the bound", w.show(provider, w.hd, token), custodian.ErrTokenReplayed)
}

// TestTokenReplayRace: of many calls at once that show one token, three have
// the key.
func TestTokenReplayRace(t *testing.T) {
	w := newTokenWorld(t, nil)
	token := w.token(nil)
	var wg sync.WaitGroup
	errs := make(chan error, 32)
	for range cap(errs) {
		wg.Go(func() { errs <- w.show(provider, w.hd, token) })
	}
	wg.Wait()
	close(errs)
	good := 0
	for err := range errs {
		if err == nil {
			good++
		} else if !errors.Is(err, custodian.ErrTokenReplayed) {
			t.Errorf("got %v, want %v", err, custodian.ErrTokenReplayed)
		}
	}
	if want := custodian.DefaultTokenUses; good != want {
		t.Errorf("releases: got %d, want %d", good, want)
	}
	w.reopen()
	wantErr(t, "after a restart", w.show(provider, w.hd, token), custodian.ErrTokenReplayed)
}

func TestTokenKeys(t *testing.T) {
	keys := custodian.NewTokenKeys()
	w := newTokenWorld(t, func(r *custodian.Tokens) {
		r.Issuers = append(r.Issuers, custodian.TokenIssuer{Issuer: "https://late.test", Keys: keys, Categories: []custodian.CategoryName{"series"}})
	})
	// An issuer whose keys could not be fetched is our fault, not the caller's.
	late := newSigner(t, jose.ES256, "k1")
	token := func() string { c := w.claims(); c["iss"] = "https://late.test"; return late.sign(c) }
	wantErr(t, "keys not loaded", w.show(provider, w.hd, token()), custodian.ErrTokenKeys)
	if _, err := keys.Set(jwks(t, late.public())); err != nil {
		t.Fatal(err)
	}
	wantErr(t, "an issuer for other categories", w.show(provider, w.hd, token()), custodian.ErrTokenMismatch)
	// A key that is not there is asked for.
	late.kid = "k2"
	wantErr(t, "unknown key", w.show(provider, w.hd, token()), custodian.ErrTokenInvalid)
	select {
	case <-keys.Wanted():
	default:
		t.Error("nobody was told that a key is wanted")
	}
	ec := newSigner(t, jose.ES256, "a")
	private, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: ec.key, KeyID: "a"}}})
	if err != nil {
		t.Fatal(err)
	}
	unnamed, other, foreign := ec.public(), ec.public(), ec.public()
	unnamed.KeyID, other.Use, foreign.Algorithm = "", "enc", "ES384"
	for name, bad := range map[string][]byte{
		"no JSON": []byte("x"), "empty": []byte(`{"keys":[]}`), "a private key": private, "a key without a kid": jwks(t, unnamed),
		"a kid twice": jwks(t, ec.public(), ec.public()), "an encryption key alone": jwks(t, other), "another algorithm alone": jwks(t, foreign),
		"other kinds alone": jwks(t, newSigner(t, jose.RS256, "r").public(), newSigner(t, jose.ES384, "p").public()),
		"too many":          jwks(t, slices.Repeat([]jose.JSONWebKey{ec.public()}, 65)...),
	} {
		if _, err := keys.Set(bad); err == nil {
			t.Errorf("%s: got no error", name)
		}
	}
	late.kid = "k1"
	wantErr(t, "after bad sets, the last good one", w.show(provider, w.hd, token()), custodian.ErrTokenMismatch)
	if ids, err := keys.Set(jwks(t, newSigner(t, jose.RS256, "r").public(), ec.public())); err != nil || !slices.Equal(ids, []string{"a"}) {
		t.Errorf("a key of another kind beside: got %v and %v, want it left out", ids, err)
	}
}

// TestTokensFaults: each fault by its key; and what holds without tokens.
func TestTokensFaults(t *testing.T) {
	_, err := testPolicy(t).WithTokens(custodian.Tokens{Mode: "maybe", Categories: map[custodian.CategoryName]custodian.TokenMode{"movies": "", "No Such": custodian.TokenNone},
		MaxLifetime: time.Hour, Skew: time.Hour, MaxUses: 1000, Issuers: []custodian.TokenIssuer{{}, {Issuer: "a", Categories: []custodian.CategoryName{"No Such"}}, {Issuer: "a", AllCategories: true}}})
	if err == nil {
		t.Fatal("got no error")
	}
	for _, want := range []string{"tokens.mode:", "tokens.categories.movies:", `tokens.categories: category "No Such"`, "tokens.max_lifetime:", "tokens.clock_skew:", "tokens.max_uses:",
		"tokens.audience:", "tokens.issuers[0].issuer:", "tokens.issuers[0].categories: empty", "tokens.issuers[1].categories: category", "tokens.issuers[2].issuer:"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want it to say %q", err, want)
		}
	}
	if _, err := testPolicy(t).WithTokens(custodian.Tokens{}); err == nil || !strings.Contains(err.Error(), "tokens.issuers: empty") {
		t.Errorf("required without an issuer: got %v, want a fault of tokens.issuers", err)
	}
	none, err := testPolicy(t).WithTokens(custodian.Tokens{Mode: custodian.TokenNone})
	if err != nil {
		t.Fatal(err)
	}
	if none.Digest() == testPolicy(t).Digest() {
		t.Error("the digest does not cover the tokens")
	}
	// No rules at all: no token is asked for, and none is believed.
	w := &tokenWorld{world: newWorld(t), signer: newSigner(t, jose.ES256, "k1")}
	w.category("movies")
	kid := w.issue("movies", "film", "HD")[0].KID
	wantErr(t, "no rules, no token", w.show(provider, kid, ""), nil)
	wantErr(t, "no rules, a token", w.show(provider, kid, w.token(nil)), custodian.ErrTokenInvalid)
}

// FuzzToken: whatever is shown, it releases nothing and breaks nothing.
func FuzzToken(f *testing.F) {
	s := newSigner(f, jose.ES256, "k1")
	f.Add(s.sign(map[string]any{"iss": playback, "aud": "custodian.test"}))
	f.Add("")
	f.Add("a.b.c")
	f.Add("eyJhbGciOiJub25lIn0..")
	p, err := custodian.NewPolicy([]custodian.Grant{{Identity: provider.ID, Role: custodian.RoleProvider, AllCategories: true}})
	if err != nil {
		f.Fatal(err)
	}
	p, err = p.WithTokens(custodian.Tokens{Audience: "custodian.test", Issuers: []custodian.TokenIssuer{{Issuer: playback, Keys: tokenKeys(f, s.public()), AllCategories: true}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, compact string) {
		if compact == "" {
			return
		}
		token := p.ReadToken(provider, compact, "", time.Unix(1_800_000_000, 0))
		d := p.Decide(custodian.Request{Caller: provider, Action: custodian.ActionRelease, Token: token,
			Resource: custodian.Resource{Category: "movies", Mode: custodian.CategoryOpen, IsKey: true, State: custodian.StateActive, Key: &custodian.ContentKey{}}})
		if d.Allow {
			t.Errorf("%q released a key", compact)
		}
	})
}

// BenchmarkToken is the cost of a token against that of its signature alone.
func BenchmarkToken(b *testing.B) {
	s := newSigner(b, jose.ES256, "k1")
	p, err := custodian.NewPolicy([]custodian.Grant{{Identity: provider.ID, Role: custodian.RoleProvider, AllCategories: true}})
	if err != nil {
		b.Fatal(err)
	}
	p, err = p.WithTokens(custodian.Tokens{Audience: "custodian.test", Issuers: []custodian.TokenIssuer{{Issuer: playback, Keys: tokenKeys(b, s.public()), AllCategories: true}}})
	if err != nil {
		b.Fatal(err)
	}
	now := time.Unix(1_800_000_000, 0)
	tokens := make([]string, 256)
	for i := range tokens {
		tokens[i] = s.sign(map[string]any{"iss": playback, "aud": "custodian.test", "iat": now.Unix(), "exp": now.Unix() + 30, "jti": fmt.Sprintf("token-%d", i),
			"sid": "session-1", "content_id": "film", "track_types": []string{"SD", "HD", "AUDIO"}})
	}
	b.Run("token", func(b *testing.B) {
		for i := 0; b.Loop(); i++ {
			if t := p.ReadToken(provider, tokens[i%len(tokens)], "", now); t.Err() != nil {
				b.Fatal(t.Err())
			}
		}
	})
	key := s.key.(*ecdsa.PrivateKey)
	digest := sha256.Sum256([]byte("x"))
	sig, err := ecdsa.SignASN1(rand.Reader, key, digest[:])
	if err != nil {
		b.Fatal(err)
	}
	b.Run("ecdsa.Verify", func(b *testing.B) {
		for b.Loop() {
			if !ecdsa.VerifyASN1(&key.PublicKey, digest[:], sig) {
				b.Fatal("bad signature")
			}
		}
	})
}
