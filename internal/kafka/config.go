package kafka

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"

	"github.com/twmb/franz-go/pkg/sasl"
	"github.com/twmb/franz-go/pkg/sasl/scram"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/anchor"
)

// Config says where events come from. The zero Config takes none.
type Config struct {
	Brokers []string      `yaml:"brokers"` // HOST:PORT
	Group   string        `yaml:"group"`   // consumer group; "custodian"
	TLS     TLSConfig     `yaml:"tls"`
	SASL    SASLConfig    `yaml:"sasl"`
	Topics  []TopicConfig `yaml:"topics"`
}

// TLSConfig is how brokers are spoken to.
type TLSConfig struct {
	Disable  bool   `yaml:"disable"`   // in clear, in development only
	CAFile   string `yaml:"ca_file"`   // PEM; without it the system's CAs
	CertFile string `yaml:"cert_file"` // of the client, for mutual TLS; read at each connection
	KeyFile  string `yaml:"key_file"`  // mode 0600
}

// SASLConfig is a login by SCRAM (RFC 5802), where the client has no certificate.
type SASLConfig struct {
	Mechanism    string `yaml:"mechanism"` // SCRAM-SHA-256 or SCRAM-SHA-512
	User         string `yaml:"user"`
	PasswordFile string `yaml:"password_file"` // mode 0600; read at each login
}

// The formats of events.
const (
	FormatCloudEvents = "cloudevents" // 1.0, JSON: structured, or binary with headers ce_…
	FormatJSON        = "json"
)

// A TopicConfig is one topic and what its events mean.
type TopicConfig struct {
	Name       string `yaml:"name"`
	DeadLetter string `yaml:"dead_letter"` // topic for events that can never be handled
	Format     string `yaml:"format"`      // cloudevents or json; cloudevents
	// Types says which type of event is which kind; "*" is every other. What is
	// not in it is passed over.
	Types  map[string]custodian.EventKind `yaml:"types"`
	Fields FieldsConfig                   `yaml:"fields"`
}

// FieldsConfig says where an event has what: names of objects and of the field,
// with points between them. Of a CloudEvent, ID and Type are its own attributes,
// and the others lie in its data.
type FieldsConfig struct {
	ID       string `yaml:"id"`         // "id"
	Type     string `yaml:"type"`       // "type"
	Category string `yaml:"category"`   // "category"
	Content  string `yaml:"content_id"` // "content_id"
	Session  string `yaml:"session_id"` // "session_id"
}

// DefaultTypes are the types of events where a topic names none.
var DefaultTypes = map[string]custodian.EventKind{
	"media.drm.batch":           custodian.EventNewBatch,
	"media.drm.packaged":        custodian.EventPackaged,
	"media.drm.session.revoked": custodian.EventSessionRevoked,
}

// Set says whether events are taken at all.
func (c *Config) Set() bool { return len(c.Brokers) > 0 || len(c.Topics) > 0 }

// Default fills the defaults in.
func (c *Config) Default() {
	set := func(v *string, def string) {
		if *v == "" {
			*v = def
		}
	}
	set(&c.Group, "custodian")
	for i := range c.Topics {
		t := &c.Topics[i]
		set(&t.Format, FormatCloudEvents)
		set(&t.Fields.ID, "id")
		set(&t.Fields.Type, "type")
		set(&t.Fields.Category, "category")
		set(&t.Fields.Content, "content_id")
		set(&t.Fields.Session, "session_id")
		if len(t.Types) == 0 {
			t.Types = DefaultTypes
		}
	}
}

// Resolve makes relative paths relative to dir.
func (c *Config) Resolve(dir string) {
	for _, p := range []*string{&c.TLS.CAFile, &c.TLS.CertFile, &c.TLS.KeyFile, &c.SASL.PasswordFile} {
		if *p != "" && !filepath.IsAbs(*p) {
			*p = filepath.Join(dir, *p)
		}
	}
}

// Check says everything that is wrong, each with its key. Outside development,
// brokers must be spoken to over TLS, and must know who we are.
func (c *Config) Check(development bool) []error {
	if !c.Set() {
		return nil
	}
	var faults []error
	fault := func(format string, args ...any) { faults = append(faults, fmt.Errorf(format, args...)) }
	if len(c.Brokers) == 0 {
		fault("brokers: empty")
	}
	for i, b := range c.Brokers {
		if _, _, err := net.SplitHostPort(b); err != nil {
			fault("brokers[%d]: %w", i, err)
		}
	}
	if len(c.Topics) == 0 {
		fault("topics: empty: no event would be taken")
	}
	faults = append(faults, c.checkLogin(development)...)
	names := map[string]bool{}
	for _, t := range c.Topics {
		names[t.Name] = true
	}
	for i, t := range c.Topics {
		for _, err := range t.check() {
			fault("topics[%d].%w", i, err)
		}
		if names[t.DeadLetter] {
			fault("topics[%d].dead_letter: %q is a topic that events are taken from", i, t.DeadLetter)
		}
		if slices.ContainsFunc(c.Topics[:i], func(o TopicConfig) bool { return o.Name == t.Name }) {
			fault("topics[%d].name: %q is there twice", i, t.Name)
		}
	}
	return faults
}

func (c *Config) checkLogin(development bool) []error {
	var faults []error
	fault := func(format string, args ...any) { faults = append(faults, fmt.Errorf(format, args...)) }
	if c.TLS.Disable {
		if !development {
			fault("tls.disable: brokers are spoken to in clear in mode: development only")
		}
		if c.TLS != (TLSConfig{Disable: true}) {
			fault("tls: without TLS there are no files")
		}
	} else if _, err := c.tlsConfig(); err != nil {
		fault("tls.%w", err)
	}
	if c.TLS.CertFile == "" && c.SASL == (SASLConfig{}) && !development {
		fault("tls.cert_file: set it and key_file, or sasl: without either, the broker does not know who we are")
	}
	if c.SASL != (SASLConfig{}) {
		if _, ok := mechanisms[c.SASL.Mechanism]; !ok {
			fault("sasl.mechanism: %q: must be SCRAM-SHA-256 or SCRAM-SHA-512", c.SASL.Mechanism)
		}
		if c.SASL.User == "" {
			fault("sasl.user: must be set")
		}
		if _, err := c.SASL.password(); err != nil {
			fault("sasl.password_file: %w", err)
		}
	}
	return faults
}

func (t TopicConfig) check() []error {
	var faults []error
	fault := func(format string, args ...any) { faults = append(faults, fmt.Errorf(format, args...)) }
	if t.Name == "" {
		fault("name: must be set")
	}
	if t.DeadLetter == "" {
		fault("dead_letter: must be set: what can never be handled goes there, so that nothing is lost")
	}
	if t.Format != FormatCloudEvents && t.Format != FormatJSON {
		fault("format: %q: must be %s or %s", t.Format, FormatCloudEvents, FormatJSON)
	}
	for name, kind := range t.Types {
		if !slices.Contains(custodian.EventKinds, kind) {
			fault("types.%s: %q: must be one of %v", name, string(kind), custodian.EventKinds)
		}
	}
	return faults
}

// tlsConfig is nil without TLS. An error begins with the key.
func (c *Config) tlsConfig() (*tls.Config, error) {
	if c.TLS.Disable {
		return nil, nil
	}
	roots, err := anchor.Roots(c.TLS.CAFile)
	if err != nil {
		return nil, fmt.Errorf("ca_file: %w", err)
	}
	conf := &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: roots}
	if c.TLS.CertFile == "" && c.TLS.KeyFile == "" {
		return conf, nil
	}
	if err := private(c.TLS.KeyFile); err != nil {
		return nil, fmt.Errorf("key_file: %w", err)
	}
	load := func() (*tls.Certificate, error) {
		cert, err := tls.LoadX509KeyPair(c.TLS.CertFile, c.TLS.KeyFile)
		return &cert, err
	}
	if _, err := load(); err != nil {
		return nil, fmt.Errorf("cert_file: %w", err)
	}
	conf.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return load() }
	return conf, nil
}

var mechanisms = map[string]func(func(context.Context) (scram.Auth, error)) sasl.Mechanism{
	"SCRAM-SHA-256": scram.Sha256,
	"SCRAM-SHA-512": scram.Sha512,
}

// login is read anew each time that a broker asks.
func (s SASLConfig) login(context.Context) (scram.Auth, error) {
	password, err := s.password()
	if err != nil {
		return scram.Auth{}, fmt.Errorf("kafka.sasl.password_file: %w", err)
	}
	return scram.Auth{User: s.User, Pass: password}, nil
}

func (s SASLConfig) password() (string, error) {
	if s.PasswordFile == "" {
		return "", errors.New("must be set")
	}
	if err := private(s.PasswordFile); err != nil {
		return "", err
	}
	raw, err := os.ReadFile(s.PasswordFile)
	if err != nil {
		return "", err
	}
	if raw = bytes.TrimSpace(raw); len(raw) == 0 {
		return "", fmt.Errorf("%s: empty", s.PasswordFile)
	}
	return string(raw), nil
}

// private says what is wrong with a file that only its owner may read, or nil.
func private(path string) error {
	fi, err := os.Stat(path)
	switch {
	case err != nil:
		return err
	case !fi.Mode().IsRegular():
		return fmt.Errorf("%s: not a regular file", path)
	case fi.Mode().Perm()&0o077 != 0:
		return fmt.Errorf("%s: mode %04o lets others read it; chmod 600 it", path, fi.Mode().Perm())
	}
	return nil
}

// caller is who a topic's events are reported by.
func (t TopicConfig) caller() custodian.Caller {
	return custodian.Caller{ID: "kafka:" + t.Name, CA: "kafka", Roles: []custodian.Role{custodian.RoleEventSource}}
}
