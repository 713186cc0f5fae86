package anchor

import (
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Config is one anchor, as the configuration of the daemon has it.
type Config struct {
	Name string `yaml:"name"`
	Kind string `yaml:"kind"` // witness, directory or syslog
	// Interval is the least time between two checkpoints; what is in between is
	// covered by the next one.
	Interval time.Duration `yaml:"interval"`

	URL     string `yaml:"url"`     // witness: its submission prefix
	Key     string `yaml:"key"`     // witness: its verifier key, NAME+ID+BASE64, of type 0x04
	CAFile  string `yaml:"ca_file"` // witness: CAs of its server; the system's where empty
	Path    string `yaml:"path"`    // directory
	Address string `yaml:"address"` // syslog: unix:PATH, udp:HOST:PORT or tcp:HOST:PORT
}

// intervals are the default ones.
var intervals = map[string]time.Duration{Witness: 10 * time.Second, Directory: 5 * time.Minute, Syslog: time.Minute}

// Default fills in what is left out.
func (c *Config) Default() {
	if c.Interval == 0 {
		c.Interval = intervals[c.Kind]
	}
}

// Resolve makes relative paths relative to dir.
func (c *Config) Resolve(dir string) {
	for _, p := range []*string{&c.Path, &c.CAFile} {
		if *p != "" && !filepath.IsAbs(*p) {
			*p = filepath.Join(dir, *p)
		}
	}
}

// CanAnswer tells whether the anchor can be asked for what it has: without
// that, it cannot show a rollback to the daemon.
func (c Config) CanAnswer() bool { return c.Kind == Witness || c.Kind == Directory }

// Check returns all faults, each with the key that it is of.
func (c Config) Check() []error {
	var faults []error
	fault := func(key, format string, args ...any) { faults = append(faults, fmt.Errorf(key+": "+format, args...)) }
	if c.Name == "" || len(c.Name) > 64 || strings.Trim(c.Name, "abcdefghijklmnopqrstuvwxyz0123456789._-") != "" {
		fault("name", "%q: must be 1 to 64 of a-z 0-9 . _ -", c.Name)
	}
	if c.Kind != "" && (c.Interval < time.Second || c.Interval > 24*time.Hour) {
		fault("interval", "%s: must be 1s to 24h", c.Interval)
	}
	var used map[string]string // by key
	switch c.Kind {
	case Witness:
		used = map[string]string{"url": c.URL, "key": c.Key, "ca_file": c.CAFile}
		if err := checkURL(c.URL); err != nil {
			fault("url", "%w", err)
		}
		if _, err := parseWitnessKey(c.Key); c.Key != "" && err != nil {
			fault("key", "%w", err)
		}
		if _, err := Roots(c.CAFile); err != nil {
			fault("ca_file", "%w", err)
		}
	case Directory:
		used = map[string]string{"path": c.Path}
		if c.Path == "" {
			fault("path", "must be set")
		}
	case Syslog:
		used = map[string]string{"address": c.Address}
		if _, _, err := splitAddress(c.Address); err != nil {
			fault("address", "%w", err)
		}
	default:
		return append(faults, fmt.Errorf("kind: %q: must be %s, %s or %s", c.Kind, Witness, Directory, Syslog))
	}
	for _, k := range []struct{ key, value string }{{"url", c.URL}, {"key", c.Key}, {"ca_file", c.CAFile}, {"path", c.Path}, {"address", c.Address}} {
		if _, ours := used[k.key]; !ours && k.value != "" {
			fault(k.key, "is not for an anchor of kind %s", c.Kind)
		}
	}
	return faults
}

func (c Config) place() (place, error) {
	switch c.Kind {
	case Witness:
		return newWitness(c)
	case Directory:
		return &directory{path: c.Path}, nil
	case Syslog:
		network, address, err := splitAddress(c.Address)
		return &syslog{network, address}, err
	}
	return nil, fmt.Errorf("kind %q is not known", c.Kind)
}

func checkURL(s string) error {
	u, err := url.Parse(s)
	if err != nil || u.Hostname() == "" || u.User != nil || u.Fragment != "" || u.RawQuery != "" {
		return errors.New("must be https://HOST/PREFIX")
	}
	ip := net.ParseIP(u.Hostname())
	if u.Scheme == "https" || u.Scheme == "http" && ip != nil && ip.IsLoopback() {
		return nil
	}
	return fmt.Errorf("scheme %q: must be https, or http to a loopback address", u.Scheme)
}

// Roots are the CAs in a PEM file; nil, the system's, where there is no file.
func Roots(file string) (*x509.CertPool, error) {
	if file == "" {
		return nil, nil
	}
	raw, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(raw) {
		return nil, fmt.Errorf("%s: no certificate in it", file)
	}
	return roots, nil
}

func splitAddress(s string) (network, address string, err error) {
	network, address, _ = strings.Cut(s, ":")
	switch network {
	case "unix":
		if !filepath.IsAbs(address) {
			return "", "", fmt.Errorf("%q: the path of the socket must be absolute", s)
		}
	case "udp", "tcp":
		if _, _, err := net.SplitHostPort(address); err != nil {
			return "", "", err
		}
	default:
		return "", "", fmt.Errorf("%q: must be unix:PATH, udp:HOST:PORT or tcp:HOST:PORT", s)
	}
	return network, address, nil
}
