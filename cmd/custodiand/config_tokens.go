package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/anchor"
)

// TokensConfig says which licence tokens are believed and which releases need
// one. A configuration without it asks for none; with it, every category needs
// one that is not said to be otherwise.
type TokensConfig struct {
	Audience    string              `yaml:"audience"`     // must be in a token's aud
	Mode        string              `yaml:"mode"`         // required, optional or none; required
	Categories  map[string]string   `yaml:"categories"`   // the mode of a category, where it is another
	MaxLifetime time.Duration       `yaml:"max_lifetime"` // from iat to exp; 30s, at most 5m
	ClockSkew   *time.Duration      `yaml:"clock_skew"`   // 5s, at most 1m
	MaxUses     int                 `yaml:"max_uses"`     // calls that may show one token; 3
	Issuers     []TokenIssuerConfig `yaml:"issuers"`
}

// TokenIssuerConfig is one playback service that signs tokens.
type TokenIssuerConfig struct {
	Issuer     string        `yaml:"issuer"`     // the claim iss
	Categories []string      `yaml:"categories"` // that it may sign for; "*" only when written
	JWKSFile   string        `yaml:"jwks_file"`  // its public keys; this or jwks_url
	JWKSURL    string        `yaml:"jwks_url"`   // https, or http to a loopback address
	CAFile     string        `yaml:"ca_file"`    // for the URL; the system's CAs
	Refresh    time.Duration `yaml:"refresh"`    // how often the keys are looked at; a file 10s, a URL 5m
}

// tokenKeySets are the keys of the issuers, by the claim iss. An issuer that is
// not in it gets an empty set.
type tokenKeySets map[string]*custodian.TokenKeys

// apply adds the rules for tokens to a policy.
func (c *TokensConfig) apply(p *custodian.Policy, sets tokenKeySets) (*custodian.Policy, error) {
	if c == nil {
		return p, nil
	}
	t := custodian.Tokens{Audience: c.Audience, Mode: custodian.TokenMode(c.Mode), MaxLifetime: c.MaxLifetime, Skew: custodian.DefaultTokenSkew, MaxUses: c.MaxUses}
	if c.ClockSkew != nil {
		t.Skew = *c.ClockSkew
	}
	for name, mode := range c.Categories {
		if t.Categories == nil {
			t.Categories = map[custodian.CategoryName]custodian.TokenMode{}
		}
		t.Categories[custodian.CategoryName(name)] = custodian.TokenMode(mode)
	}
	for _, i := range c.Issuers {
		keys := sets[i.Issuer]
		if keys == nil {
			keys = custodian.NewTokenKeys()
		}
		issuer := custodian.TokenIssuer{Issuer: i.Issuer, Keys: keys, KeysFrom: "a file"} // officers sign it, and its path is that of one machine
		if i.JWKSURL != "" {
			issuer.KeysFrom = i.JWKSURL
		}
		for _, name := range i.Categories {
			if name == "*" {
				issuer.AllCategories = true
			} else {
				issuer.Categories = append(issuer.Categories, custodian.CategoryName(name))
			}
		}
		t.Issuers = append(t.Issuers, issuer)
	}
	return p.WithTokens(t)
}

// check says what is wrong with where the keys come from; the rest is the
// policy's to check.
func (c *TokensConfig) check() []error {
	if c == nil {
		return nil
	}
	var faults []error
	for i, issuer := range c.Issuers {
		fault := func(key string, err error) {
			faults = append(faults, fmt.Errorf("tokens.issuers[%d].%s: %w", i, key, err))
		}
		if (issuer.JWKSFile == "") == (issuer.JWKSURL == "") {
			fault("jwks_file", errors.New("set it, or jwks_url, and not both"))
		}
		if issuer.JWKSFile != "" {
			if raw, err := os.ReadFile(issuer.JWKSFile); err != nil {
				fault("jwks_file", err)
			} else if _, err := custodian.NewTokenKeys().Set(raw); err != nil {
				fault("jwks_file", err)
			}
		}
		if issuer.JWKSURL != "" {
			if err := checkWebhookURL(issuer.JWKSURL); err != nil {
				fault("jwks_url", err)
			}
		}
		if _, err := anchor.Roots(issuer.CAFile); err != nil {
			fault("ca_file", err)
		}
		if issuer.Refresh != 0 && (issuer.Refresh < time.Second || issuer.Refresh > 24*time.Hour) {
			fault("refresh", fmt.Errorf("%s: must be 1s to 24h", issuer.Refresh))
		}
	}
	return faults
}

// Of a key set at a URL: its greatest size, how long a look may take, and the
// least pause between two looks, however many tokens name an unknown key.
const (
	maxJWKSSize = 256 << 10
	jwksTimeout = 10 * time.Second
	jwksPause   = 5 * time.Second
)

// A tokenSource keeps the keys of one issuer current.
type tokenSource struct {
	config TokenIssuerConfig
	keys   *custodian.TokenKeys
	client *http.Client
	pause  time.Duration // least time between two looks
	log    *slog.Logger
	loaded prometheus.Gauge

	digest [32]byte // of the set that was loaded last
	fault  string   // of the last look; told once
}

// newTokenSources makes one for each issuer. Key sets in files are loaded at
// once.
func newTokenSources(ctx context.Context, c *TokensConfig, reg prometheus.Registerer, log *slog.Logger) ([]*tokenSource, tokenKeySets, error) {
	if c == nil {
		return nil, nil, nil
	}
	loaded := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "custodian_token_keys_load_timestamp_seconds",
		Help: "When the keys of a licence token issuer were last fetched and found good; 0: never."}, []string{"issuer"})
	if err := reg.Register(loaded); err != nil {
		return nil, nil, err
	}
	sets := tokenKeySets{}
	var sources []*tokenSource
	for _, ic := range c.Issuers {
		roots, err := anchor.Roots(ic.CAFile)
		if err != nil {
			return nil, nil, err
		}
		s := &tokenSource{config: ic, keys: custodian.NewTokenKeys(), pause: jwksPause, log: log, loaded: loaded.WithLabelValues(ic.Issuer),
			client: &http.Client{
				Timeout:       jwksTimeout,
				Transport:     &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}}, // and no proxy of the environment
				CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
			}}
		if ic.JWKSFile != "" {
			s.look(ctx)
		}
		sources, sets[ic.Issuer] = append(sources, s), s.keys
	}
	return sources, sets, nil
}

// run looks at the source until ctx ends: as often as is configured, and soon
// where a token names a key that is not there.
func (s *tokenSource) run(ctx context.Context) {
	every := s.config.Refresh
	if every == 0 && s.config.JWKSFile != "" {
		every = 10 * time.Second
	} else if every == 0 {
		every = 5 * time.Minute
	}
	for {
		good := s.look(ctx)
		if !sleep(ctx, min(s.pause, every)) {
			return
		}
		wait := every - min(s.pause, every)
		if !good {
			wait = min(wait, 30*time.Second)
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-timer.C:
		case <-s.keys.Wanted():
		}
		timer.Stop()
	}
}

// look takes the keys as they are now. A set that is bad, or that cannot be
// had, leaves those that were good last.
func (s *tokenSource) look(ctx context.Context) (good bool) {
	raw, err := s.read(ctx)
	var ids []string
	if err == nil {
		ids, err = s.keys.Set(raw)
	}
	if err != nil {
		if fault := err.Error(); fault != s.fault && ctx.Err() == nil {
			s.fault = fault
			s.log.Error("the keys of a licence token issuer; those that were good last stay", "issuer", s.config.Issuer, "err", err)
		}
		return false
	}
	s.fault = ""
	s.loaded.SetToCurrentTime()
	if digest := sha256.Sum256(raw); digest != s.digest {
		s.digest = digest
		s.log.Info("took the keys of a licence token issuer", "issuer", s.config.Issuer, "kids", strings.Join(ids, " "))
	}
	return true
}

func (s *tokenSource) read(ctx context.Context) ([]byte, error) {
	if s.config.JWKSFile != "" {
		return os.ReadFile(s.config.JWKSFile)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.config.JWKSURL, nil)
	if err != nil {
		return nil, err
	}
	resp, err := s.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: %s", s.config.JWKSURL, resp.Status)
	}
	var body bytes.Buffer
	if n, err := io.Copy(&body, io.LimitReader(resp.Body, maxJWKSSize+1)); err != nil {
		return nil, err
	} else if n > maxJWKSSize {
		return nil, fmt.Errorf("%s: more than %d bytes", s.config.JWKSURL, maxJWKSSize)
	}
	return body.Bytes(), nil
}
