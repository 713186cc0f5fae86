package certs

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// ServerOptions configure a Server.
type ServerOptions struct {
	// CertFile and KeyFile are the server's chain, leaf first, and its private
	// key, in PEM. The key file must have mode 0600 or less.
	CertFile string
	KeyFile  string

	// CAs are the client CAs. There is at least one, and two of them never share
	// a certificate, a trust domain or a DNS name.
	CAs []CA

	// MinVersion is the lowest TLS version, TLS 1.3 if zero.
	MinVersion uint16

	// CRLGrace is how long a revocation list past its nextUpdate still applies
	// before the certificates of its issuer are refused: 24 hours if zero, not at
	// all if negative.
	CRLGrace time.Duration

	// Now is the clock, time.Now if nil.
	Now func() time.Time

	// Log receives what Run has to say. Nothing is logged if nil.
	Log *slog.Logger
}

const defaultCRLGrace = 24 * time.Hour

// A Server holds the certificate of a TLS server and the CAs of its clients as
// they are in their files now. It is safe for concurrent use.
type Server struct {
	opts ServerOptions

	// current is replaced as a whole by each reload that finds a change.
	current atomic.Pointer[state]

	// mu guards the fields below.
	mu    sync.Mutex
	seen  map[string][32]byte // what each file held at the last reload
	fault error               // of the last reload
}

// A state is everything that the files said at one time. Only its cache changes.
type state struct {
	pair  *tls.Certificate
	cas   []*trust
	pool  *x509.CertPool // of all cas
	cache cache
}

// NewServer loads all files. Every one of them must be good; all faults are
// returned at once, each with the file that it is in.
func NewServer(o ServerOptions) (*Server, error) {
	if o.MinVersion == 0 {
		o.MinVersion = tls.VersionTLS13
	}
	switch {
	case o.CRLGrace == 0:
		o.CRLGrace = defaultCRLGrace
	case o.CRLGrace < 0:
		o.CRLGrace = 0
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	cas, faults := checkCAs(o.CAs)
	if o.MinVersion < tls.VersionTLS12 {
		faults = append(faults, errors.New("minimum TLS version: TLS 1.2 and 1.3 are supported"))
	}
	o.CAs = cas
	s := &Server{opts: o}
	_, loadFaults := s.reload()
	if faults = append(faults, loadFaults...); len(faults) > 0 {
		return nil, errors.Join(faults...)
	}
	return s, nil
}

// checkCAs returns a copy of the CAs with DNS names in lower case, and what is
// wrong with the configuration of each.
func checkCAs(configured []CA) ([]CA, []error) {
	var faults []error
	if len(configured) == 0 {
		faults = append(faults, errors.New("client cas: none is configured, so that nobody could connect"))
	}
	names := make(map[string]bool)
	cas := make([]CA, 0, len(configured))
	for i, ca := range configured {
		if ca.Name == "" {
			faults = append(faults, fmt.Errorf("client ca number %d: it has no name", i+1))
		} else if names[ca.Name] {
			faults = append(faults, fmt.Errorf("client ca %s: two have this name", ca.Name))
		}
		names[ca.Name] = true
		if ca.TrustDomain == "" && len(ca.DNSNames) == 0 {
			faults = append(faults, fmt.Errorf("client ca %s: neither a trust domain nor DNS names: it would vouch for nobody", ca.Name))
		}
		if ca.TrustDomain != "" {
			if err := checkTrustDomain(ca.TrustDomain); err != nil {
				faults = append(faults, fmt.Errorf("client ca %s: %w", ca.Name, err))
			}
		}
		ca.Roles = slices.Clone(ca.Roles)
		ca.DNSNames = slices.Clone(ca.DNSNames)
		for j, name := range ca.DNSNames {
			if name == "" || strings.ContainsRune(name, '*') {
				faults = append(faults, fmt.Errorf("client ca %s: DNS name %q: a whole name is needed, no wildcard", ca.Name, name))
			}
			ca.DNSNames[j] = strings.ToLower(name)
		}
		cas = append(cas, ca)
	}
	return cas, append(faults, overlaps(cas)...)
}

// overlaps reports each name that two CAs may vouch for: either of them could
// give itself the other's callers, under its own roles.
func overlaps(cas []CA) []error {
	var faults []error
	for i, ca := range cas {
		for _, other := range cas[:i] {
			if ca.TrustDomain != "" && ca.TrustDomain == other.TrustDomain {
				faults = append(faults, fmt.Errorf("client cas %s and %s: both vouch for the trust domain %s: only one CA may", other.Name, ca.Name, ca.TrustDomain))
			}
			for j, name := range ca.DNSNames {
				if slices.Contains(other.DNSNames, name) && !slices.Contains(ca.DNSNames[:j], name) {
					faults = append(faults, fmt.Errorf("client cas %s and %s: both vouch for the DNS name %s: only one CA may", other.Name, ca.Name, name))
				}
			}
		}
	}
	return faults
}

// CheckCAs tells what is wrong with the client CAs of a configuration, without
// a look at their files. NewServer checks the same.
func CheckCAs(cas []CA) error {
	_, faults := checkCAs(cas)
	return errors.Join(faults...)
}

// TLSConfig returns the server's TLS configuration. Each handshake uses the
// certificate, the CAs and the revocation lists of its moment, and ends with the
// checks of Peer. The caller may set NextProtos on the result before using it;
// changes to other fields have no effect.
func (s *Server) TLSConfig() *tls.Config { return s.tlsConfig(s.opts.MinVersion, nil) }

// PackagerTLSConfig is TLSConfig for packagers without TLS 1.3, as Shaka Packager
// 3.4: it takes TLS 1.2 as well, with forward secrecy and authenticated
// encryption only.
func (s *Server) PackagerTLSConfig() *tls.Config {
	return s.tlsConfig(tls.VersionTLS12, []uint16{
		tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
		tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
	})
}

// tlsConfig takes the cipher suites of TLS 1.2; those of 1.3 are not for choice.
func (s *Server) tlsConfig(min uint16, suites []uint16) *tls.Config {
	outer := &tls.Config{MinVersion: min, SessionTicketsDisabled: true}
	outer.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		st := s.current.Load()
		return &tls.Config{
			Certificates: []tls.Certificate{*st.pair},
			ClientAuth:   tls.RequireAndVerifyClientCert,
			ClientCAs:    st.pool,
			MinVersion:   min,
			CipherSuites: suites,
			NextProtos:   outer.NextProtos,
			Time:         s.opts.Now,
			// A resumed session would skip the checks of the chain.
			SessionTicketsDisabled: true,
			VerifyConnection: func(cs tls.ConnectionState) error {
				_, err := s.Peer(cs)
				return err
			},
		}, nil
	}
	return outer
}

// Peer returns who is at the other end of a connection that TLSConfig accepted,
// by the CAs, the revocation lists and the time of now. It is meant to be called
// for each request: connections outlive what their certificates are good for.
//
// The identity is the one URI name of the certificate, which must be a SPIFFE ID
// of the trust domain that the CA vouches for, or the one DNS name that the CA
// lists; DNS names that it does not list are passed over, and the common name is
// never looked at. A certificate with two URI names, two listed DNS names, or
// one of each is refused. It must be for client authentication by its extended
// key usage, and no CA certificate.
//
// Errors wrap one of this package's sentinels.
func (s *Server) Peer(cs tls.ConnectionState) (Peer, error) {
	if len(cs.VerifiedChains) == 0 || len(cs.PeerCertificates) == 0 {
		return Peer{}, fmt.Errorf("no verified client certificate: %w", ErrNoIdentity)
	}
	st := s.current.Load()
	now := s.opts.Now()
	known, ok := st.cache.get(cs.PeerCertificates)
	if !ok || !known.good.holds(now) {
		var err error
		if known, err = st.identify(cs.PeerCertificates, now, s.opts.CRLGrace); err != nil {
			return Peer{}, fmt.Errorf("client certificate %x: %w", cs.PeerCertificates[0].SerialNumber, err)
		}
		st.cache.put(cs.PeerCertificates, known)
	}
	peer := known.peer
	peer.Roles = slices.Clone(peer.Roles)
	return peer, nil
}

// An identified is a peer and the time for which that holds under one state.
type identified struct {
	peer Peer
	good window
}

// identify verifies the presented chain anew, because the CAs may have changed
// since the handshake, and names its leaf.
func (st *state) identify(presented []*x509.Certificate, now time.Time, grace time.Duration) (identified, error) {
	leaf := presented[0]
	if err := checkTime(leaf, now); err != nil {
		return identified{}, err
	}
	ca, chains, err := st.verify(presented, now)
	if err != nil {
		return identified{}, err
	}
	if leaf.IsCA {
		return identified{}, fmt.Errorf("ca %s: a CA certificate is no client certificate: %w", ca.Name, ErrNotVouched)
	}
	// Verify lets a certificate without extended key usage pass for any use.
	if !slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageClientAuth) {
		return identified{}, fmt.Errorf("ca %s: its extended key usage lacks clientAuth: %w", ca.Name, ErrNotVouched)
	}
	good, err := ca.checkChains(chains, now, grace)
	if err != nil {
		return identified{}, err
	}
	name, err := ca.mayName(leaf)
	if err != nil {
		return identified{}, err
	}
	return identified{
		peer: Peer{Name: name, CA: ca.Name, Roles: ca.Roles, NotAfter: leaf.NotAfter,
			SPKI: sha256.Sum256(leaf.RawSubjectPublicKeyInfo), Cert: sha256.Sum256(leaf.Raw)},
		good: good,
	}, nil
}

// verify returns the one CA that verifies the presented chain.
func (st *state) verify(presented []*x509.Certificate, now time.Time) (*trust, [][]*x509.Certificate, error) {
	var found *trust
	var chains [][]*x509.Certificate
	var why error
	expired := false
	for _, ca := range st.cas {
		c, err := ca.verify(presented, now)
		if err != nil {
			why = err
			invalid, ok := errors.AsType[x509.CertificateInvalidError](err)
			expired = expired || ok && invalid.Reason == x509.Expired
			continue
		}
		if found != nil {
			return nil, nil, fmt.Errorf("cas %s and %s both verify it: %w", found.Name, ca.Name, ErrAmbiguousIdentity)
		}
		found, chains = ca, c
	}
	if found != nil {
		return found, chains, nil
	}
	if expired {
		return nil, nil, fmt.Errorf("a CA certificate of its chain: %w", ErrExpired)
	}
	return nil, nil, fmt.Errorf("no client ca verifies it: %w: %w", why, ErrNotVouched)
}

// checkChains accepts the first chain of the CA that is not revoked.
func (t *trust) checkChains(chains [][]*x509.Certificate, now time.Time, grace time.Duration) (window, error) {
	var why error
	for _, chain := range chains {
		good, err := t.checkChain(chain, now, grace)
		if err == nil {
			return good, nil
		}
		why = err
	}
	return window{}, why
}

// Reload reads all files. A bad file keeps what it last held that was good; the
// others take effect. The faults of all files are returned, each with its file.
func (s *Server) Reload() error {
	_, faults := s.reload()
	return errors.Join(faults...)
}

// reload also returns the files that have changed since the last one.
func (s *Server) reload() (changed []string, faults []error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	in := s.read()
	defer func() { clear(in[s.opts.KeyFile].data) }()
	seen := make(map[string][32]byte, len(in))
	for file, c := range in {
		seen[file] = c.sum
		if s.seen[file] != c.sum {
			changed = append(changed, file)
		}
	}
	old := s.current.Load()
	// A fault may go by time alone, so only a good state is kept unexamined.
	if len(changed) == 0 && s.fault == nil && old != nil {
		return nil, nil
	}
	st, faults := s.load(in, old)
	s.seen, s.fault = seen, errors.Join(faults...)
	if old != nil || len(faults) == 0 {
		s.current.Store(st)
	}
	slices.Sort(changed)
	return changed, faults
}

func (s *Server) read() map[string]content {
	in := make(map[string]content)
	in[s.opts.CertFile] = read(s.opts.CertFile, false)
	for _, ca := range s.opts.CAs {
		in[ca.File] = read(ca.File, false)
		if ca.CRLFile != "" {
			in[ca.CRLFile] = read(ca.CRLFile, false)
		}
	}
	in[s.opts.KeyFile] = read(s.opts.KeyFile, true)
	return in
}

// load makes a state of what was read, with the parts of old in place of what is
// bad. Without old, a state with faults has holes and must not be used.
func (s *Server) load(in map[string]content, old *state) (*state, []error) {
	var faults []error
	st := &state{pool: x509.NewCertPool()}
	var err error
	st.pair, err = parseKeyPair(s.opts.CertFile, s.opts.KeyFile, in[s.opts.CertFile], in[s.opts.KeyFile], x509.ExtKeyUsageServerAuth, s.opts.Now())
	if err != nil {
		faults = append(faults, err)
		if old != nil {
			st.pair = old.pair
		}
	}
	for i, ca := range s.opts.CAs {
		var was *trust
		if old != nil {
			was = old.cas[i]
		}
		t, caFaults := loadTrust(ca, in, was)
		faults = append(faults, caFaults...)
		if t == nil {
			continue
		}
		faults = append(faults, st.shared(t)...)
		st.cas = append(st.cas, t)
		for _, cert := range t.certs {
			st.pool.AddCert(cert)
		}
	}
	return st, faults
}

// shared reports the issuers that t has in common with a CA before it. Their
// certificates are refused as ambiguous until that ends.
func (st *state) shared(t *trust) []error {
	var faults []error
	for _, cert := range t.certs {
		for _, other := range st.cas {
			if slices.ContainsFunc(other.certs, func(c *x509.Certificate) bool { return issuerOf(c) == issuerOf(cert) }) {
				faults = append(faults, fmt.Errorf("client ca %s: %s: %q is in ca %s too: one CA cannot vouch for two sets of names", t.Name, t.File, cert.Subject, other.Name))
			}
		}
	}
	return faults
}

// Run reloads the files at each interval until ctx ends, then returns nil. A
// fault is logged once when it appears, and so is its end; so is a revocation
// list that goes past its nextUpdate, and past the grace period.
func (s *Server) Run(ctx context.Context, interval time.Duration) error {
	if interval <= 0 {
		return fmt.Errorf("reload certificates: interval %s: it must be positive", interval)
	}
	w := watch{log: s.opts.Log, faults: make(map[string]bool), stale: make(map[string]CRLState)}
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for {
		changed, faults := s.reload()
		w.report(changed, faults, s.Status())
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
}
