package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"

	"go.yaml.in/yaml/v3"
	"google.golang.org/grpc/codes"
)

// configEnv names the config file where there is no --config.
const configEnv = "CUSTODIANCTL_CONFIG"

// settings are the config file: YAML, unknown fields are errors. Relative paths
// are relative to the folder of the file.
type settings struct {
	Address    string `yaml:"address"`     // host:port of the daemon
	CertFile   string `yaml:"cert_file"`   // the caller's certificate chain, PEM
	KeyFile    string `yaml:"key_file"`    // its private key, PEM, mode 0600
	CAFile     string `yaml:"ca_file"`     // CAs that the daemon's certificate is verified with, PEM
	ServerName string `yaml:"server_name"` // the name it must have; empty: the host of address
	// RecipientKeyFiles hold private keys that open content keys which the
	// daemon seals to their public halves; mode 0600.
	RecipientKeyFiles []string `yaml:"recipient_key_files"`
}

// resolve merges config file and flags, and reports all that is missing at once.
func (a *app) resolve() (settings, error) {
	path, s, err := a.readConfig()
	if err != nil {
		return settings{}, &failure{reason: reasonConfig, code: codes.InvalidArgument, err: err}
	}
	for _, v := range []struct {
		to   *string
		flag string
	}{
		{&s.Address, a.settings.Address}, {&s.CertFile, a.settings.CertFile}, {&s.KeyFile, a.settings.KeyFile},
		{&s.CAFile, a.settings.CAFile}, {&s.ServerName, a.settings.ServerName},
	} {
		if v.flag != "" {
			*v.to = v.flag
		}
	}
	var faults []error
	for _, v := range []struct{ key, flag, value string }{
		{"address", "--address", s.Address}, {"cert_file", "--cert", s.CertFile}, {"key_file", "--key", s.KeyFile}, {"ca_file", "--ca", s.CAFile},
	} {
		if v.value == "" {
			faults = append(faults, fmt.Errorf("%s: not set: write it into the config file, or use %s", v.key, v.flag))
		}
	}
	if len(faults) == 0 {
		return s, nil
	}
	if path == "" {
		faults = append(faults, errors.New("there is no config file: custodianctl --help says where it is looked for"))
	} else {
		faults = append(faults, fmt.Errorf("the config file is %s", path))
	}
	return settings{}, &failure{reason: reasonConfig, code: codes.InvalidArgument, err: errors.Join(faults...)}
}

// readConfig finds and reads the config file; without one the path is empty.
func (a *app) readConfig() (path string, s settings, err error) {
	path = a.configFile
	if path == "" {
		path = os.Getenv(configEnv)
	}
	optional := path == ""
	if optional {
		dir, err := os.UserConfigDir()
		if err != nil {
			return "", s, nil // no home, no file
		}
		path = filepath.Join(dir, "custodian", "custodianctl.yaml")
	}
	raw, err := os.ReadFile(path)
	if optional && errors.Is(err, fs.ErrNotExist) {
		return "", s, nil
	}
	if err != nil {
		return path, s, fmt.Errorf("config: %w", err)
	}
	if s, err = parseConfig(raw); err != nil {
		return path, s, fmt.Errorf("config %s: %w", path, err)
	}
	for _, p := range []*string{&s.CertFile, &s.KeyFile, &s.CAFile} {
		if *p != "" && !filepath.IsAbs(*p) {
			*p = filepath.Join(filepath.Dir(path), *p)
		}
	}
	for i, p := range s.RecipientKeyFiles {
		if !filepath.IsAbs(p) {
			s.RecipientKeyFiles[i] = filepath.Join(filepath.Dir(path), p)
		}
	}
	return path, s, nil
}

// parseConfig reports all faults at once, each with its line.
func parseConfig(raw []byte) (settings, error) {
	var s settings
	d := yaml.NewDecoder(bytes.NewReader(raw))
	d.KnownFields(true)
	err := d.Decode(&s)
	if errors.Is(err, io.EOF) {
		return s, errors.New("the file is empty")
	}
	if types, ok := errors.AsType[*yaml.TypeError](err); ok {
		var faults []error
		for _, text := range types.Errors {
			faults = append(faults, errors.New(unknownField.ReplaceAllString(text, "unknown setting $1")))
		}
		return s, errors.Join(faults...)
	}
	if err != nil {
		return s, err
	}
	if err := d.Decode(new(settings)); !errors.Is(err, io.EOF) {
		return s, errors.New("the file holds more than one document")
	}
	return s, nil
}

// unknownField is how the YAML package words it, with a Go type in it.
var unknownField = regexp.MustCompile(`field (\S+) not found in type \S+`)
