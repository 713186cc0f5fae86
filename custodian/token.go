package custodian

import (
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	jose "github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
)

// Limits of licence tokens.
const (
	// MaxTokenSize in bytes. A token with 64 KIDs takes some 4 KiB.
	MaxTokenSize = 8 << 10
	// MaxTokenLifetime and MaxTokenSkew bound what may be configured.
	MaxTokenLifetime = 5 * time.Minute
	MaxTokenSkew     = time.Minute
	// Defaults where nothing is configured.
	DefaultTokenLifetime = 30 * time.Second
	DefaultTokenSkew     = 5 * time.Second
	DefaultTokenUses     = 3

	maxTokenName = 256 // bytes of jti and sid
)

// A TokenMode says whether a release needs a licence token. The zero mode is
// TokenRequired. A token that is presented and bad refuses in every mode.
type TokenMode string

// The modes.
const (
	TokenRequired TokenMode = "required"
	TokenOptional TokenMode = "optional"
	TokenNone     TokenMode = "none"
)

// A TokenIssuer signs licence tokens: a playback service.
type TokenIssuer struct {
	Issuer string // the claim iss
	Keys   *TokenKeys
	// KeysFrom says where Keys come from, for Digest and Conditions.
	KeysFrom string
	// The categories that it may sign for.
	AllCategories bool
	Categories    []CategoryName
}

// Tokens say which licence tokens are believed, and which releases need one.
type Tokens struct {
	Audience string // one of the claim aud
	Issuers  []TokenIssuer
	// Mode of the categories that are not in Categories.
	Mode       TokenMode
	Categories map[CategoryName]TokenMode
	// MaxLifetime is how long after its iat a token may end, 30 s if zero. Skew
	// is how far the issuer's clock may be off. MaxUses is how many calls may
	// show one token, 3 if zero.
	MaxLifetime time.Duration
	Skew        time.Duration
	MaxUses     int
}

// WithTokens returns the policy with rules for licence tokens, which Digest
// covers, all but the keys. It reports every fault at once. A policy without
// them asks for no token, and believes none.
func (p *Policy) WithTokens(t Tokens) (*Policy, error) {
	if t.MaxLifetime == 0 {
		t.MaxLifetime = DefaultTokenLifetime
	}
	if t.MaxUses == 0 {
		t.MaxUses = DefaultTokenUses
	}
	if t.Mode == "" {
		t.Mode = TokenRequired
	}
	if err := t.check(); err != nil {
		return nil, err
	}
	text := []string{fmt.Sprintf("%q %s %s %s %d", t.Audience, t.Mode, t.MaxLifetime, t.Skew, t.MaxUses)}
	for name, mode := range t.Categories {
		text = append(text, fmt.Sprintf("category %q %s", name, mode))
	}
	for _, i := range t.Issuers {
		names := slices.Sorted(slices.Values(i.Categories))
		text = append(text, fmt.Sprintf("issuer %q %v %q %q", i.Issuer, i.AllCategories, names, i.KeysFrom))
	}
	with := p.with(conditionTokens, text)
	with.tokens = &t
	return with, nil
}

func (t *Tokens) check() error {
	var faults []error
	fault := func(format string, args ...any) { faults = append(faults, fmt.Errorf(format, args...)) }
	mode := func(key string, m TokenMode) {
		if !slices.Contains([]TokenMode{TokenRequired, TokenOptional, TokenNone}, m) {
			fault("%s: %q: must be required, optional or none", key, m)
		}
	}
	mode("tokens.mode", t.Mode)
	needed := t.Mode != TokenNone
	for name, m := range t.Categories {
		if err := name.Check(); err != nil {
			fault("tokens.categories: %w", err)
		}
		mode(fmt.Sprintf("tokens.categories.%s", name), m)
		needed = needed || m != TokenNone
	}
	if needed && len(t.Issuers) == 0 {
		fault("tokens.issuers: empty; nobody could sign the tokens that are asked for")
	}
	if len(t.Issuers) > 0 && t.Audience == "" {
		fault("tokens.audience: must be set: it is what keeps a token for another service from being used here")
	}
	seen := map[string]bool{}
	for i, issuer := range t.Issuers {
		if issuer.Issuer == "" || seen[issuer.Issuer] {
			fault("tokens.issuers[%d].issuer: %q: must be set, and differ from the others", i, issuer.Issuer)
		}
		seen[issuer.Issuer] = true
		if !issuer.AllCategories && len(issuer.Categories) == 0 {
			fault("tokens.issuers[%d].categories: empty, so it could sign for nothing; name them, or write \"*\"", i)
		}
		for _, name := range issuer.Categories {
			if err := name.Check(); err != nil {
				fault("tokens.issuers[%d].categories: %w", i, err)
			}
		}
	}
	if t.MaxLifetime < time.Second || t.MaxLifetime > MaxTokenLifetime {
		fault("tokens.max_lifetime: %s: must be 1s to %s", t.MaxLifetime, MaxTokenLifetime)
	}
	if t.Skew < 0 || t.Skew > MaxTokenSkew {
		fault("tokens.clock_skew: %s: must be 0s to %s", t.Skew, MaxTokenSkew)
	}
	if t.MaxUses < 1 || t.MaxUses > 100 {
		fault("tokens.max_uses: %d: must be 1 to 100", t.MaxUses)
	}
	return errors.Join(faults...)
}

func (t *Tokens) mode(c CategoryName) TokenMode {
	if m, ok := t.Categories[c]; ok {
		return m
	}
	return t.Mode
}

// issuer is the one with that name, or nil.
func (t *Tokens) issuer(name string) *TokenIssuer {
	if t == nil {
		return nil
	}
	i := slices.IndexFunc(t.Issuers, func(i TokenIssuer) bool { return i.Issuer == name })
	if i < 0 {
		return nil
	}
	return &t.Issuers[i]
}

// span is how long a use has to be remembered: from the earliest moment at
// which a token can be shown to the last.
func (t *Tokens) span() time.Duration { return t.MaxLifetime + 2*t.Skew }

// A Token is a licence token that a caller has shown: what its issuer says, or
// why it is not believed. The nil Token is none.
type Token struct {
	err        error // it is bad, and refuses every key
	issuer     *TokenIssuer
	id         string
	session    string
	content    ContentID
	kids       []KID // with trackTypes: the keys that it is for
	trackTypes []TrackType
	viewer     Viewer

	use *tokenUse // this call's use of it; nil: not used yet
}

// claims of a licence token. The decoder refuses a claim that is there twice,
// and a name in other letters is another claim.
type claims struct {
	Issuer     string            `json:"iss"`
	Audience   jwt.Audience      `json:"aud"`
	Expiry     *jwt.NumericDate  `json:"exp"`
	NotBefore  *jwt.NumericDate  `json:"nbf"`
	IssuedAt   *jwt.NumericDate  `json:"iat"`
	ID         string            `json:"jti"`
	Session    string            `json:"sid"`
	Content    string            `json:"content_id"`
	ContentB64 string            `json:"content_id_b64"`
	KIDs       []string          `json:"kids"`
	TrackTypes []string          `json:"track_types"`
	Viewer     Viewer            `json:"viewer"`
	Confirm    map[string]string `json:"cnf"`
}

var tokenAlgorithms = []jose.SignatureAlgorithm{jose.ES256, jose.EdDSA}

// tokenRules are nil where no licence token is asked for.
func (p *Policy) tokenRules() *Tokens {
	if p == nil {
		return nil
	}
	return p.tokens
}

// Err is why the token is not believed, whatever it is shown for; nil: it is.
func (t *Token) Err() error { return t.err }

// ReadToken verifies a token that who shows. It is judged once for a call, and
// what it is worth for one key is decided with the key.
func (p *Policy) ReadToken(who Caller, compact, session string, now time.Time) *Token {
	if compact == "" {
		return nil
	}
	t := &Token{}
	if t.err = t.read(p.tokenRules(), who, compact, now); t.err == nil && session != "" && session != t.session {
		t.err = fmt.Errorf("it is for another session: %w", ErrTokenMismatch)
	}
	if t.err != nil {
		t.err = fmt.Errorf("licence token: %w", t.err)
	}
	return t
}

func (t *Token) read(rules *Tokens, who Caller, compact string, now time.Time) error {
	if rules == nil || len(rules.Issuers) == 0 {
		return fmt.Errorf("no issuer is configured that could have signed it: %w", ErrTokenInvalid)
	}
	if len(compact) > MaxTokenSize {
		return fmt.Errorf("%d bytes: must be at most %d: %w", len(compact), MaxTokenSize, ErrTokenInvalid)
	}
	c, err := t.verify(rules, compact)
	if err != nil {
		return err
	}
	if !c.Audience.Contains(rules.Audience) {
		return fmt.Errorf("it is for another audience: %w", ErrTokenInvalid)
	}
	if err := c.checkTimes(rules, now); err != nil {
		return err
	}
	if err := c.checkConfirm(who); err != nil {
		return err
	}
	return t.take(c)
}

// verify checks the signature. The claims are decoded before that, because they
// name the issuer; they are returned only after it.
func (t *Token) verify(rules *Tokens, compact string) (*claims, error) {
	bad := func(err error) error { return fmt.Errorf("%w: %w", err, ErrTokenInvalid) }
	parsed, err := jwt.ParseSigned(compact, tokenAlgorithms)
	if err != nil {
		return nil, bad(err)
	}
	header := parsed.Headers[0]
	if kind, ok := header.ExtraHeaders[jose.HeaderType]; ok && kind != "JWT" {
		return nil, bad(fmt.Errorf("typ %.40q", kind))
	}
	if _, ok := header.ExtraHeaders["b64"]; ok {
		return nil, bad(errors.New("header b64"))
	}
	var c claims
	if err := parsed.UnsafeClaimsWithoutVerification(&c); err != nil {
		return nil, bad(err)
	}
	if t.issuer = rules.issuer(c.Issuer); t.issuer == nil {
		return nil, bad(fmt.Errorf("issuer %.80q is not configured", c.Issuer))
	}
	key, err := t.issuer.Keys.find(header.KeyID)
	if err != nil {
		return nil, err
	}
	// The key decides the algorithm, never the token.
	if header.Algorithm != string(key.algorithm) {
		return nil, bad(fmt.Errorf("algorithm %s with a key for %s", header.Algorithm, key.algorithm))
	}
	// No destination: it verifies the very bytes that were decoded above.
	if err := parsed.Claims(key.key); err != nil {
		return nil, bad(err)
	}
	return &c, nil
}

// checkTimes holds iat, nbf and exp against the clock.
func (c *claims) checkTimes(rules *Tokens, now time.Time) error {
	const sane = 1 << 40 // seconds; what is beyond is no time
	if c.Expiry == nil || c.IssuedAt == nil {
		return fmt.Errorf("it has no exp or no iat: %w", ErrTokenInvalid)
	}
	for _, d := range []*jwt.NumericDate{c.Expiry, c.IssuedAt, c.NotBefore} {
		if d != nil && (*d <= 0 || *d > sane) {
			return fmt.Errorf("a time of it is no time: %w", ErrTokenInvalid)
		}
	}
	exp, iat := c.Expiry.Time(), c.IssuedAt.Time()
	if life := exp.Sub(iat); life <= 0 || life > rules.MaxLifetime {
		return fmt.Errorf("a lifetime of %s: must be at most %s: %w", life, rules.MaxLifetime, ErrTokenInvalid)
	}
	from := iat
	if c.NotBefore != nil && c.NotBefore.Time().After(from) {
		from = c.NotBefore.Time()
	}
	if now.Add(rules.Skew).Before(from) {
		return fmt.Errorf("not valid before %s: %w", from.UTC().Format(time.RFC3339), ErrTokenExpired)
	}
	if !now.Add(-rules.Skew).Before(exp) {
		return fmt.Errorf("it expired %s: %w", exp.UTC().Format(time.RFC3339), ErrTokenExpired)
	}
	return nil
}

// checkConfirm holds the token against the certificate of who shows it (RFC
// 8705). A confirmation of another kind cannot be checked, and refuses.
func (c *claims) checkConfirm(who Caller) error {
	if c.Confirm == nil {
		return nil
	}
	const member = "x5t#S256"
	thumb, ok := c.Confirm[member]
	if !ok || len(c.Confirm) != 1 {
		return fmt.Errorf("its cnf is not %s alone: %w", member, ErrTokenInvalid)
	}
	want := base64.RawURLEncoding.EncodeToString(who.Cert[:])
	if who.Cert == [32]byte{} || subtle.ConstantTimeCompare([]byte(thumb), []byte(want)) != 1 {
		return fmt.Errorf("it is for another caller's certificate: %w", ErrTokenMismatch)
	}
	return nil
}

// take reads what the token is for.
func (t *Token) take(c *claims) error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("%w: %w", fmt.Errorf(format, args...), ErrTokenInvalid)
	}
	for _, n := range []struct{ claim, value string }{{"jti", c.ID}, {"sid", c.Session}} {
		if len(n.value) < 1 || len(n.value) > maxTokenName {
			return bad("%s of %d bytes: must be 1 to %d", n.claim, len(n.value), maxTokenName)
		}
	}
	t.id, t.session = c.ID, c.Session
	if (c.Content == "") == (c.ContentB64 == "") {
		return bad("it must have content_id or content_id_b64")
	}
	t.content = ContentID(c.Content)
	if c.ContentB64 != "" {
		var err error
		if t.content, err = base64.RawURLEncoding.Strict().DecodeString(c.ContentB64); err != nil {
			return bad("content_id_b64: %w", err)
		}
	}
	if err := t.content.Check(); err != nil {
		return bad("%w", err)
	}
	if len(c.KIDs) == 0 && len(c.TrackTypes) == 0 {
		return bad("it must name kids or track_types")
	}
	if len(c.KIDs) > MaxKIDsPerCall || len(c.TrackTypes) > MaxKIDsPerCall {
		return bad("%d kids, %d track_types: must be at most %d", len(c.KIDs), len(c.TrackTypes), MaxKIDsPerCall)
	}
	for _, text := range c.KIDs {
		kid, err := ParseKID(text)
		if err != nil {
			return bad("kids: %w", err)
		}
		t.kids = append(t.kids, kid)
	}
	if err := c.Viewer.Check(); err != nil {
		return bad("viewer: %w", err)
	}
	t.viewer = c.Viewer
	for _, text := range c.TrackTypes {
		t.trackTypes = append(t.trackTypes, TrackType(text))
	}
	return nil
}

// checkToken says whether a release may be decided further, as far as licence
// tokens go. It costs nothing where none are configured and none is shown.
func (p *Policy) checkToken(t *Token, r Resource) error {
	if p.tokens == nil && t == nil || !r.IsKey {
		return nil
	}
	if t == nil {
		if p.tokens.mode(r.Category) == TokenRequired {
			return ErrTokenMissing
		}
		return nil
	}
	if t.err != nil {
		return t.err
	}
	return t.covers(r)
}

// covers says whether the token is for a key.
func (t *Token) covers(r Resource) error {
	mismatch := func(what string) error {
		return fmt.Errorf("licence token: it is for another %s: %w", what, ErrTokenMismatch)
	}
	if !t.issuer.AllCategories && !slices.Contains(t.issuer.Categories, r.Category) {
		return mismatch("category, as far as its issuer goes")
	}
	if r.Key == nil || string(r.Key.ContentID) != string(t.content) {
		return mismatch("content item")
	}
	if len(t.kids) > 0 && !slices.Contains(t.kids, r.Key.KID) {
		return mismatch("KID")
	}
	if len(t.trackTypes) > 0 && !slices.Contains(t.trackTypes, r.Key.TrackType) {
		return mismatch("track type")
	}
	return nil
}

// decideRelease decides about one key of a call, and counts the call as a use
// of its token at the first key that is allowed.
func (c *Custodian) decideRelease(who Caller, r Resource, call RetrieveRequest) Decision {
	set, now, t := c.set.Load(), c.now(), call.token
	p := c.policyOf(set)
	d := p.Decide(Request{Caller: who, Action: ActionRelease, Resource: r, Token: t, Asserted: call.Asserted, Recipient: call.recipient, Now: now}.under(set))
	if d.Allow {
		// Before the token's use: who is told to come back may come back with it.
		d.Err = c.spend(p, who, ActionRelease, r.Category, r.Key.KID, now)
		d.Allow = d.Err == nil
	}
	if !d.Allow || t == nil || t.use != nil {
		return d
	}
	if t.use, t.err = c.uses.use(p.tokens, who, t, now); t.err != nil {
		d.Allow, d.Err = false, t.err // and so it is for the other keys of the call
	}
	return d
}

// detail is what the audit log says of a release beside its fields.
func (r *RetrieveResult) detail(t *Token) string {
	text := r.Sealed.detail(graceDetail(r.Grace))
	if r.kept {
		text = strings.TrimPrefix(text+"; kept in clear as of a hot title", "; ")
	}
	if r.Err != nil && !r.decision.Allow && len(r.decision.Rules) > 0 && errors.Is(r.Err, ErrDenied) {
		return "forbidden by " + strings.Join(r.decision.Rules, ", ")
	}
	if r.Err != nil || t == nil || t.use == nil {
		return text
	}
	return strings.TrimPrefix(text+"; "+t.use.String(), "; ")
}
