package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/keycustody/custodian/certs"
	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/hsm"
	"github.com/keycustody/custodian/internal/kafka"
	"github.com/keycustody/custodian/kms"
)

// Config is the configuration file of custodiand: YAML, unknown fields are
// errors, secrets are paths of files. Relative paths are relative to the
// folder of the configuration file.
type Config struct {
	// Listen is the address of the gRPC listener, mutual TLS only.
	Listen string `yaml:"listen"`
	// HTTPListen is the address of GetContentKeys as JSON over HTTPS, mutual TLS
	// only; without it there is none.
	HTTPListen string `yaml:"http_listen"`
	// AdminListen serves /livez, /readyz and /metrics in clear; loopback only.
	AdminListen string `yaml:"admin_listen"`
	// Mode is production or development. In production the audit log must have
	// an anchor that can be asked. production where empty.
	Mode string `yaml:"mode"`
	// DataDir holds store.db, audit/ and pin.latch; mode 0700.
	DataDir string `yaml:"data_dir"`

	HSM       HSMConfig       `yaml:"hsm"`
	KMS       KMSConfig       `yaml:"kms"`
	TLS       TLSConfig       `yaml:"tls"`
	Packagers PackagersConfig `yaml:"packagers"`
	CPIX      CPIXConfig      `yaml:"cpix"`
	Grants    []GrantConfig   `yaml:"grants"`
	Policy    PolicyConfig    `yaml:"policy"`
	Sealing   SealingConfig   `yaml:"sealing"`
	Tokens    *TokensConfig   `yaml:"tokens"` // nil: no licence token is asked for
	Budgets   []BudgetConfig  `yaml:"budgets"`
	Limits    LimitsConfig    `yaml:"limits"`
	Events    EventsConfig    `yaml:"events"`
	MEK       MEKConfig       `yaml:"mek"`
	Kafka     kafka.Config    `yaml:"kafka"` // where events come from; without brokers, none do
	Audit     AuditConfig     `yaml:"audit"`
	Anchors   AnchorsConfig   `yaml:"anchors"`
	Log       LogConfig       `yaml:"log"`

	digest [32]byte
}

// HSMConfig names the token.
type HSMConfig struct {
	Module      string `yaml:"module"`       // path of the PKCS#11 module
	Token       string `yaml:"token"`        // token label, or an RFC 7512 URI
	PINFile     string `yaml:"pin_file"`     // mode 0600
	LabelPrefix string `yaml:"label_prefix"` // of our objects; "custodian-mek"
	Profile     string `yaml:"profile"`      // vendor profile; "" detects it
	MEKProfile  string `yaml:"mek_profile"`  // at init: sealed or rotatable; "" asks the self-test
	MaxSessions int    `yaml:"max_sessions"` // 0: the profile's
	// SoftHSMConf is exported as SOFTHSM2_CONF before the module is loaded.
	SoftHSMConf  string        `yaml:"softhsm_conf"`
	CallTimeout  time.Duration `yaml:"call_timeout"`  // of one call to the token; 5s
	DrainTimeout time.Duration `yaml:"drain_timeout"` // a drain beyond it ends the process; 30s
}

// KMSConfig lists the providers of the outer wrap.
type KMSConfig struct {
	Default   []string     `yaml:"default"` // of categories that name none, and of helper keys
	Providers []kms.Config `yaml:"providers"`

	Deadline time.Duration `yaml:"deadline"` // of opening one wrap; 5s
	// Grace is how long after the last contact with its provider a loaded KEK
	// serves on beyond its lifetime; 4h, and 0s for none. GraceCeiling is how
	// long after it was loaded it does so at most; 24h.
	Grace        *time.Duration `yaml:"grace"`
	GraceCeiling time.Duration  `yaml:"grace_ceiling"`

	// RewrapRate is how many keys a second get new outer wraps while a job moves
	// them to other providers; 50.
	RewrapRate float64 `yaml:"rewrap_rate"`

	Webhook WebhookConfig `yaml:"webhook"`
}

// WebhookConfig says who is told of incidents; nobody without a URL.
type WebhookConfig struct {
	URL        string `yaml:"url"`         // https, or http to a loopback address
	SecretFile string `yaml:"secret_file"` // mode 0600, at least 16 bytes; signs the messages
	CAFile     string `yaml:"ca_file"`     // PEM; without it the system's CAs
}

// TLSConfig is the mutual TLS of the gRPC listener.
type TLSConfig struct {
	CertFile  string        `yaml:"cert_file"`
	KeyFile   string        `yaml:"key_file"` // mode 0600
	ClientCAs []CAConfig    `yaml:"client_cas"`
	CRLGrace  time.Duration `yaml:"crl_grace"` // 24h; how long a CRL past nextUpdate still applies
}

// CAConfig is one client CA and what it may vouch for.
type CAConfig struct {
	Name        string   `yaml:"name"`
	File        string   `yaml:"file"`
	CRLFile     string   `yaml:"crl_file"`
	TrustDomain string   `yaml:"trust_domain"`
	DNSNames    []string `yaml:"dns_names"`
	Roles       []string `yaml:"roles"`
}

// GrantConfig gives one identity one role over categories.
type GrantConfig struct {
	Identity   string   `yaml:"identity"`
	Role       string   `yaml:"role"`
	Categories []string `yaml:"categories"` // "*" only when written
	Reissue    bool     `yaml:"reissue"`    // packager: keys again after their window
	SPKI       string   `yaml:"spki"`       // SHA-256 of the public key, hex; officers need it
}

// LimitsConfig bounds calls and caches.
type LimitsConfig struct {
	CallbackDeadline time.Duration `yaml:"callback_deadline"` // 250ms
	KEKLifetime      time.Duration `yaml:"kek_lifetime"`      // 15m
	DrainTimeout     time.Duration `yaml:"drain_timeout"`     // of calls at shutdown; 10s
	RotationRate     int           `yaml:"rotation_rate"`     // content keys a second that rotations move; 0: as many as the token can
	// HotTitles keep the opened content keys of a category in clear, for so long
	// after each was opened; 1s to 60s. Categories that are not in it keep none.
	HotTitles map[string]time.Duration `yaml:"hot_titles"`
}

// EventsConfig is the standing approval for what events do by themselves.
type EventsConfig struct {
	DailyCap    int           `yaml:"daily_cap"`    // KEK versions that a category gets in 24 hours; 0: events make none
	MinInterval time.Duration `yaml:"min_interval"` // between two versions of a category; 1h
}

// LogConfig is the daemon's own log on standard error.
type LogConfig struct {
	Level  string `yaml:"level"`  // debug, info, warn, error; info
	Format string `yaml:"format"` // text or json; text
}

// LoadConfig reads and checks a configuration file. It reports all faults at
// once, each with its key path.
func LoadConfig(path string) (*Config, error) {
	raw, err := readPrivate(path)
	if err != nil {
		return nil, fmt.Errorf("config %s: %w", path, err)
	}
	c, err := parseConfig(raw)
	if err != nil {
		return nil, fmt.Errorf("config %s: %w", path, err)
	}
	c.digest = sha256.Sum256(raw)
	c.resolve(filepath.Dir(path))
	if err := c.check(); err != nil {
		return nil, fmt.Errorf("config %s:\n%w", path, err)
	}
	return c, nil
}

// parseConfig decodes strictly and fills the defaults in.
func parseConfig(raw []byte) (*Config, error) {
	var c Config
	d := yaml.NewDecoder(bytes.NewReader(raw))
	d.KnownFields(true)
	if err := d.Decode(&c); errors.Is(err, io.EOF) {
		return nil, errors.New("the file is empty; an empty configuration would serve nobody")
	} else if err != nil {
		return nil, err
	}
	if err := d.Decode(new(Config)); !errors.Is(err, io.EOF) {
		return nil, errors.New("the file holds more than one document")
	}
	set := func(v *string, def string) {
		if *v == "" {
			*v = def
		}
	}
	set(&c.Mode, modeProduction)
	c.Anchors.defaults()
	c.Kafka.Default()
	set(&c.Listen, "127.0.0.1:7443")
	set(&c.AdminListen, "127.0.0.1:7480")
	set(&c.HSM.LabelPrefix, "custodian-mek")
	set(&c.Log.Level, "info")
	set(&c.Log.Format, "text")
	if c.Limits.CallbackDeadline == 0 {
		c.Limits.CallbackDeadline = 250 * time.Millisecond
	}
	if c.Limits.KEKLifetime == 0 {
		c.Limits.KEKLifetime = 15 * time.Minute
	}
	if c.KMS.Deadline == 0 {
		c.KMS.Deadline = 5 * time.Second
	}
	if c.KMS.Grace == nil {
		grace := 4 * time.Hour
		c.KMS.Grace = &grace
	}
	if c.KMS.GraceCeiling == 0 {
		c.KMS.GraceCeiling = 24 * time.Hour
	}
	if c.Events.MinInterval == 0 {
		c.Events.MinInterval = time.Hour
	}
	if c.KMS.RewrapRate == 0 {
		c.KMS.RewrapRate = 50
	}
	if c.Limits.DrainTimeout == 0 {
		c.Limits.DrainTimeout = 10 * time.Second
	}
	return &c, nil
}

// resolve makes relative paths relative to dir.
func (c *Config) resolve(dir string) {
	paths := []*string{&c.DataDir, &c.MEK.DraftDir, &c.HSM.PINFile, &c.HSM.SoftHSMConf, &c.TLS.CertFile, &c.TLS.KeyFile,
		&c.KMS.Webhook.SecretFile, &c.KMS.Webhook.CAFile, &c.Audit.ArchiveDir}
	paths = append(paths, c.Packagers.paths()...)
	paths = append(paths, c.CPIX.paths()...)
	for i := range c.Anchors.List {
		c.Anchors.List[i].Resolve(dir)
	}
	c.Kafka.Resolve(dir)
	for i := range c.TLS.ClientCAs {
		paths = append(paths, &c.TLS.ClientCAs[i].File, &c.TLS.ClientCAs[i].CRLFile)
	}
	for i := range c.Policy.RulesFiles {
		paths = append(paths, &c.Policy.RulesFiles[i])
	}
	if c.Tokens != nil {
		for i := range c.Tokens.Issuers {
			paths = append(paths, &c.Tokens.Issuers[i].JWKSFile, &c.Tokens.Issuers[i].CAFile)
		}
	}
	for i := range c.KMS.Providers {
		p := &c.KMS.Providers[i]
		v := &p.Vault
		paths = append(paths, &p.AWS.CAFile, &p.AWS.CredentialsFile, &p.GCP.CAFile, &p.GCP.CredentialsFile)
		paths = append(paths, &v.CAFile, &v.CertFile, &v.KeyFile, &v.TokenFile, &v.AppRole.RoleIDFile, &v.AppRole.SecretIDFile, &v.Kubernetes.JWTFile)
	}
	for _, p := range paths {
		if *p != "" && !filepath.IsAbs(*p) {
			*p = filepath.Join(dir, *p)
		}
	}
}

func (c *Config) check() error {
	var faults []error
	fault := func(key, format string, args ...any) { faults = append(faults, fmt.Errorf(key+": "+format, args...)) }
	need := func(key, value string) {
		if value == "" {
			fault(key, "must be set")
		}
	}
	private := func(key, path string) {
		if need(key, path); path != "" {
			if f, err := openPrivate(path); err != nil {
				fault(key, "%w", err)
			} else {
				f.Close()
			}
		}
	}
	if _, _, err := net.SplitHostPort(c.Listen); err != nil {
		fault("listen", "%w", err)
	}
	if _, _, err := net.SplitHostPort(c.HTTPListen); c.HTTPListen != "" && err != nil {
		fault("http_listen", "%w", err)
	}
	if host, _, err := net.SplitHostPort(c.AdminListen); err != nil {
		fault("admin_listen", "%w", err)
	} else if ip := net.ParseIP(host); host != "localhost" && (ip == nil || !ip.IsLoopback()) {
		fault("admin_listen", "%s: must be a loopback address; it speaks in clear", c.AdminListen)
	}
	faults = append(faults, c.checkAnchors()...)
	faults = append(faults, c.MEK.check()...)
	for _, err := range c.Kafka.Check(c.Mode == modeDevelopment) {
		faults = append(faults, fmt.Errorf("kafka.%w", err))
	}
	need("data_dir", c.DataDir)
	need("hsm.module", c.HSM.Module)
	need("hsm.token", c.HSM.Token)
	private("hsm.pin_file", c.HSM.PINFile)
	faults = append(faults, c.HSM.check()...)
	faults = append(faults, c.KMS.check()...)
	need("tls.cert_file", c.TLS.CertFile)
	private("tls.key_file", c.TLS.KeyFile)
	if len(c.TLS.ClientCAs) == 0 {
		fault("tls.client_cas", "empty: nobody could connect")
	}
	for i, ca := range c.TLS.ClientCAs {
		for j, r := range ca.Roles {
			if !knownRole(r) {
				fault(fmt.Sprintf("tls.client_cas[%d].roles[%d]", i, j), "%q: must be one of %v", r, custodian.Roles)
			}
		}
	}
	faults = append(faults, c.Tokens.check()...)
	faults = append(faults, c.Packagers.check()...)
	if _, _, err := c.CPIX.load(); err != nil {
		faults = append(faults, err)
	}
	if _, err := c.policy(nil); err != nil {
		faults = append(faults, err)
	}
	faults = append(faults, c.Audit.check()...)
	faults = append(faults, c.Limits.check()...)
	if c.Events.DailyCap < 0 || c.Events.DailyCap > 24 {
		fault("events.daily_cap", "%d: must be 0 to 24", c.Events.DailyCap)
	}
	if c.Events.MinInterval < 0 || c.Events.MinInterval > 24*time.Hour {
		fault("events.min_interval", "%s: must be positive, 24h at most", c.Events.MinInterval)
	}
	if err := new(slog.Level).UnmarshalText([]byte(c.Log.Level)); err != nil {
		fault("log.level", "%q: must be debug, info, warn or error", c.Log.Level)
	}
	if c.Log.Format != "text" && c.Log.Format != "json" {
		fault("log.format", "%q: must be text or json", c.Log.Format)
	}
	return errors.Join(faults...)
}

func (c LimitsConfig) check() []error {
	var faults []error
	fault := func(key, format string, args ...any) {
		faults = append(faults, fmt.Errorf("limits."+key+": "+format, args...))
	}
	if c.CallbackDeadline < time.Millisecond || c.CallbackDeadline > time.Minute {
		fault("callback_deadline", "%s: must be 1ms to 1m", c.CallbackDeadline)
	}
	if c.KEKLifetime < time.Second || c.KEKLifetime > 24*time.Hour {
		fault("kek_lifetime", "%s: must be 1s to 24h", c.KEKLifetime)
	}
	if c.RotationRate < 0 {
		fault("rotation_rate", "%d: must not be negative; 0 is as many as the token can", c.RotationRate)
	}
	for name, life := range c.HotTitles {
		if err := custodian.CheckHotTitle(custodian.CategoryName(name), life); err != nil {
			fault("hot_titles."+name, "%w", err)
		}
	}
	return faults
}

func (c HSMConfig) check() []error {
	var faults []error
	fault := func(key, format string, args ...any) {
		faults = append(faults, fmt.Errorf("hsm."+key+": "+format, args...))
	}
	if _, err := os.Stat(c.Module); c.Module != "" && err != nil {
		fault("module", "%w", err)
	}
	if strings.HasPrefix(c.Token, "pkcs11:") {
		if _, err := hsm.ParseURI(c.Token); err != nil {
			fault("token", "%w", err)
		}
	}
	if n := c.MaxSessions; n != 0 && n < hsm.MinSessions {
		fault("max_sessions", "%d: must be 0, for the profile's own, or at least %d", n, hsm.MinSessions)
	}
	switch custodian.MEKProfile(c.MEKProfile) {
	case "", custodian.ProfileSealed, custodian.ProfileRotatable:
	default:
		fault("mek_profile", "%q: must be sealed or rotatable", c.MEKProfile)
	}
	return faults
}

func (c KMSConfig) check() []error {
	var faults []error
	names := map[string]bool{}
	if len(c.Providers) == 0 {
		faults = append(faults, errors.New(`kms.providers: empty; for one machine without a KMS write {name: local, kind: local}`))
	}
	for i, p := range c.Providers {
		for _, err := range p.Check() {
			faults = append(faults, fmt.Errorf("kms.providers[%d].%w", i, err))
		}
		if names[p.Name] {
			faults = append(faults, fmt.Errorf("kms.providers[%d].name: %q is there twice", i, p.Name))
		}
		names[p.Name] = true
	}
	if len(c.Default) == 0 {
		faults = append(faults, errors.New("kms.default: empty; name at least one provider"))
	}
	for i, n := range c.Default {
		if !names[n] {
			faults = append(faults, fmt.Errorf("kms.default[%d]: %q is not among kms.providers", i, n))
		}
	}
	if c.Deadline < 10*time.Millisecond || c.Deadline > time.Minute {
		faults = append(faults, fmt.Errorf("kms.deadline: %s: must be 10ms to 1m", c.Deadline))
	}
	if c.GraceCeiling < time.Second || c.GraceCeiling > maxGraceCeiling {
		faults = append(faults, fmt.Errorf("kms.grace_ceiling: %s: must be 1s to %s", c.GraceCeiling, maxGraceCeiling))
	}
	if !(c.RewrapRate >= 0.1 && c.RewrapRate <= 10000) { // nor NaN
		faults = append(faults, fmt.Errorf("kms.rewrap_rate: %g: must be 0.1 to 10000", c.RewrapRate))
	}
	if *c.Grace < 0 || *c.Grace > c.GraceCeiling {
		faults = append(faults, fmt.Errorf("kms.grace: %s: must be 0s to kms.grace_ceiling, %s", *c.Grace, c.GraceCeiling))
	}
	return append(faults, c.Webhook.check()...)
}

// maxGraceCeiling is how long any KEK may serve without its KMS.
const maxGraceCeiling = 72 * time.Hour

func knownRole(r string) bool {
	for _, k := range custodian.Roles {
		if string(k) == r {
			return true
		}
	}
	return false
}

// policy compiles grants, sealing and tokens. sets are the keys of the issuers
// of tokens that are loaded.
func (c *Config) policy(sets tokenKeySets) (*custodian.Policy, error) {
	var faults []error
	grants := make([]custodian.Grant, len(c.Grants))
	for i, g := range c.Grants {
		grants[i] = custodian.Grant{Identity: g.Identity, Role: custodian.Role(g.Role), Reissue: g.Reissue}
		for _, cat := range g.Categories {
			if cat == "*" {
				grants[i].AllCategories = true
			} else {
				grants[i].Categories = append(grants[i].Categories, custodian.CategoryName(cat))
			}
		}
		if g.SPKI == "" {
			continue
		}
		pin, err := hex.DecodeString(g.SPKI)
		if err != nil || len(pin) != sha256.Size {
			faults = append(faults, fmt.Errorf("grants[%d].spki: must be 64 hexadecimal digits, the SHA-256 of the public key (custodianctl pki show prints it)", i))
			continue
		}
		grants[i].SPKI = (*[32]byte)(pin)
	}
	p, err := custodian.NewPolicy(grants)
	if err := errors.Join(append(faults, err)...); err != nil {
		return nil, err
	}
	ruled, rerr := c.Policy.apply(p)
	if rerr == nil {
		p = ruled
	}
	sealed, err := c.Sealing.apply(p)
	if err == nil {
		p = sealed
	}
	with, terr := c.Tokens.apply(p, sets)
	if terr == nil {
		p = with
	}
	bounded, berr := c.applyBudgets(p)
	if err := errors.Join(rerr, err, terr, berr); err != nil {
		return nil, err
	}
	return bounded, nil
}

func (c *Config) serverCerts(log *slog.Logger) certs.ServerOptions {
	o := certs.ServerOptions{CertFile: c.TLS.CertFile, KeyFile: c.TLS.KeyFile, CRLGrace: c.TLS.CRLGrace, Log: log}
	for _, ca := range c.TLS.ClientCAs {
		o.CAs = append(o.CAs, certs.CA{Name: ca.Name, File: ca.File, CRLFile: ca.CRLFile, TrustDomain: ca.TrustDomain, DNSNames: ca.DNSNames, Roles: ca.Roles})
	}
	return o
}

func (c *Config) storePath() string { return filepath.Join(c.DataDir, "store.db") }
func (c *Config) auditDir() string  { return filepath.Join(c.DataDir, "audit") }

// auditFile is there once the audit log is whole: it is put in place last.
func (c *Config) auditFile() string     { return filepath.Join(c.auditDir(), "audit.log") }
func (c *Config) incidentsPath() string { return filepath.Join(c.DataDir, "incidents.json") }
func (c *Config) latchPath() string     { return filepath.Join(c.DataDir, "pin.latch") }

func (c *Config) logger(w io.Writer) *slog.Logger {
	var level slog.Level
	level.UnmarshalText([]byte(c.Log.Level)) // checked before
	o := &slog.HandlerOptions{Level: level}
	if c.Log.Format == "json" {
		return slog.New(slog.NewJSONHandler(w, o))
	}
	return slog.New(slog.NewTextHandler(w, o))
}

// openPrivate opens a regular file that only its owner may read.
func openPrivate(path string) (*os.File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	fi, err := f.Stat()
	if err == nil && !fi.Mode().IsRegular() {
		err = fmt.Errorf("%s: not a regular file", path)
	} else if err == nil && fi.Mode().Perm()&0o077 != 0 {
		err = fmt.Errorf("%s: mode %04o lets others read it; chmod 600 it", path, fi.Mode().Perm())
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func readPrivate(path string) ([]byte, error) {
	f, err := openPrivate(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, 1<<20))
}
