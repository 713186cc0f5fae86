package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/rpc"
)

const rolePolicy = "policy"

// rulesText has a rule that is asked about every key, and two about categories
// that the callbacks have nothing to do with, as in deploy/rules-example.cedar.
const rulesText = `
@id("uhd-needs-hardware")
forbid (principal, action == Custodian::Action::"release", resource)
when { ["UHD1", "UHD2"].contains(resource.track_type) }
unless { context has token && context.token.viewer has security_level && ["L1", "SL3000"].contains(context.token.viewer.security_level) };

@id("nordic-window")
forbid (principal, action == Custodian::Action::"release", resource in Custodian::Category::"nordic")
unless { context.now < datetime("2027-12-31T23:00:00Z") };

@id("premiere-embargo")
forbid (principal, action == Custodian::Action::"release", resource in Custodian::Category::"premiere")
when { context.now < datetime("2027-03-01T19:00:00Z") };
`

// A cost is what a decision takes, in microseconds.
type cost struct {
	Grants, Rules float64 // of a decision by grants alone, and with rules
	Token, ECDSA  float64 // of a licence token never seen before, and of its signature alone
}

// policy is what a decision costs, and its share of a callback.
func (r *rig) policy(ctx context.Context) error {
	data := filepath.Join(r.dir, "policy")
	if _, err := r.prepare(ctx, data, min(r.scale.keys, 1000)); err != nil {
		return err
	}
	s, err := r.serve(ctx, roleCallback, "policy", "-dir", data)
	if err != nil {
		return err
	}
	for range r.scale.rounds {
		l, err := r.load(ctx, s, loadSpec{methodRetrieve, 128, 1, kidsFile(data)})
		if err != nil {
			return err
		}
		var c cost
		if err := call(ctx, &c, rolePolicy, "-time", (r.scale.time / 4).String()); err != nil {
			return err
		}
		perKey := l.ServerCPU / float64(l.Keys)
		r.table.add("policy_decision_us_grants", c.Grants)
		r.table.add("policy_decision_us", c.Rules)
		r.table.add("policy_callback_cpu_us", perKey)
		r.table.add("policy_cpu_share_grants", c.Grants/perKey)
		r.table.add("policy_cpu_share", c.Rules/perKey)
		r.table.add("token_verify_us", c.Token)
		r.table.add("token_verify_vs_ecdsa", c.Token/c.ECDSA)
	}
	return r.stopAll()
}

// policyCost measures in a process of its own what Decide and a licence token
// cost.
func policyCost(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet(rolePolicy, flag.ContinueOnError)
	length := fs.Duration("time", time.Second, "how long to measure each")
	if err := fs.Parse(args); err != nil {
		return err
	}
	rpc.TuneRuntime() // as custodiand
	who := custodian.Caller{ID: identity(custodian.RoleProvider), Roles: []custodian.Role{custodian.RoleProvider}}
	plain, err := custodian.NewPolicy([]custodian.Grant{{Identity: who.ID, Role: custodian.RoleProvider, Categories: []custodian.CategoryName{category}}})
	if err != nil {
		return err
	}
	ruled, err := plain.WithRules([]custodian.RulesFile{{Name: "bench.cedar", Text: []byte(rulesText)}})
	if err != nil {
		return err
	}
	now := time.Now()
	req := custodian.Request{Caller: who, Action: custodian.ActionRelease, Now: now, Asserted: custodian.Viewer{DRMSystem: "widevine", SecurityLevel: "L1", Region: "SE"},
		Resource: custodian.Resource{Category: category, Mode: custodian.CategoryOpen, IsKey: true, State: custodian.StateActive,
			Key: &custodian.ContentKey{NaturalKey: custodian.NaturalKey{Category: category, ContentID: contentID(0), TrackType: "HD", Scheme: custodian.SchemeCENC}, KID: custodian.KID{1}, CreateTime: now}}}
	decide := func(p *custodian.Policy) func(int) error {
		return func(int) error { return p.Decide(req).Err }
	}
	token, verify, err := tokenCost(plain, who, now)
	if err != nil {
		return err
	}
	var c cost
	const turns = 4 // one after the other, so that a slow moment of the machine is everybody's
	for range turns {
		for _, m := range []struct {
			to *float64
			do func(int) error
		}{{&c.Grants, decide(plain)}, {&c.Rules, decide(ruled)}, {&c.ECDSA, verify}, {&c.Token, token}} {
			us, err := microsEach(ctx, *length/turns, m.do)
			if err != nil {
				return err
			}
			*m.to += us / turns
		}
	}
	return json.NewEncoder(os.Stdout).Encode(c)
}

// microsEach is what one call of do takes.
func microsEach(ctx context.Context, length time.Duration, do func(i int) error) (float64, error) {
	n, start := 0, time.Now()
	for time.Since(start) < length && ctx.Err() == nil {
		for range 100 {
			if err := do(n); err != nil {
				return 0, err
			}
			n++
		}
	}
	return micros(time.Since(start)) / float64(n), ctx.Err()
}

// tokenCost returns what verifies one of many distinct tokens, and what verifies
// a signature alone.
func tokenCost(p *custodian.Policy, who custodian.Caller, now time.Time) (token, verify func(int) error, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	public := jose.JSONWebKey{Key: key.Public(), KeyID: "bench", Use: "sig", Algorithm: string(jose.ES256)}
	set, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{public}})
	if err != nil {
		return nil, nil, err
	}
	keys := custodian.NewTokenKeys()
	if _, err := keys.Set(set); err != nil {
		return nil, nil, err
	}
	p, err = p.WithTokens(custodian.Tokens{Audience: "bench", Issuers: []custodian.TokenIssuer{{Issuer: "https://playback.example", Keys: keys, AllCategories: true}}})
	if err != nil {
		return nil, nil, err
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: key}, (&jose.SignerOptions{}).WithType("JWT").WithHeader("kid", "bench"))
	if err != nil {
		return nil, nil, err
	}
	tokens := make([]string, 1024)
	for i := range tokens {
		claims, err := json.Marshal(map[string]any{"iss": "https://playback.example", "aud": "bench", "iat": now.Unix(), "exp": now.Unix() + 30, "jti": fmt.Sprintf("token-%d", i),
			"sid": fmt.Sprintf("session-%d", i), "content_id": string(contentID(0)), "track_types": []string{"SD", "HD", "AUDIO"}})
		if err != nil {
			return nil, nil, err
		}
		signed, err := signer.Sign(claims)
		if err != nil {
			return nil, nil, err
		}
		if tokens[i], err = signed.CompactSerialize(); err != nil {
			return nil, nil, err
		}
	}
	digest := sha256.Sum256([]byte("bench"))
	sig, err := ecdsa.SignASN1(rand.Reader, key, digest[:])
	if err != nil {
		return nil, nil, err
	}
	token = func(i int) error { return p.ReadToken(who, tokens[i%len(tokens)], "", now).Err() }
	verify = func(int) error {
		if !ecdsa.VerifyASN1(&key.PublicKey, digest[:], sig) {
			return errors.New("a good signature does not verify")
		}
		return nil
	}
	return token, verify, nil
}
