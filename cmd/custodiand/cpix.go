package main

import (
	"encoding/pem"
	"errors"
	"fmt"
	"os"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/packager"
)

// CPIXConfig pins to whom documents with keys may be encrypted, and says where
// they must be.
type CPIXConfig struct {
	Recipients []CPIXRecipientConfig `yaml:"recipients"`
	// Encrypted are categories whose keys leave through SPEKE in encrypted
	// documents only.
	Encrypted []string `yaml:"encrypted"`
}

// CPIXRecipientConfig is one pinned certificate. It counts until it is taken out of
// the file; its dates and its issuer are not looked at.
type CPIXRecipientConfig struct {
	Name        string `yaml:"name"`
	CertFile    string `yaml:"cert_file"`    // PEM or DER; RSA of 2048 bits at least
	KeyWrapping string `yaml:"key_wrapping"` // aes256-cbc or kw-aes256; aes256-cbc
	// Identities are the callers whose SPEKE replies may be encrypted to it.
	Identities []string `yaml:"identities"`
	// Export are the categories whose keys officers may export to it.
	Export []string `yaml:"export"`
}

func (c *CPIXConfig) paths() []*string {
	var paths []*string
	for i := range c.Recipients {
		paths = append(paths, &c.Recipients[i].CertFile)
	}
	return paths
}

// load reads the certificates. It reports all faults at once, each with its key
// path.
func (c CPIXConfig) load() (packager.SPEKEConfig, []packager.ExportRecipient, error) {
	speke := packager.SPEKEConfig{Recipients: map[string][]packager.Recipient{}, Encrypted: map[custodian.CategoryName]bool{}}
	var exports []packager.ExportRecipient
	var faults []error
	fault := func(i int, key string, err error) {
		if err != nil {
			faults = append(faults, fmt.Errorf("cpix.recipients[%d].%s: %w", i, key, err))
		}
	}
	names := map[string]bool{}
	for i, rc := range c.Recipients {
		if rc.Name == "" || names[rc.Name] {
			fault(i, "name", fmt.Errorf("%q: must be there, and only once", rc.Name))
		}
		names[rc.Name] = true
		if len(rc.Identities) == 0 && len(rc.Export) == 0 {
			fault(i, "identities", errors.New("it and export are empty: nothing would be encrypted to it"))
		}
		r, err := readRecipient(rc)
		fault(i, "cert_file", err)
		to := packager.ExportRecipient{Name: rc.Name, Recipient: r}
		for _, name := range rc.Export {
			fault(i, "export", custodian.CategoryName(name).Check())
			to.Categories = append(to.Categories, custodian.CategoryName(name))
		}
		exports = append(exports, to)
		for _, id := range rc.Identities {
			speke.Recipients[id] = append(speke.Recipients[id], r)
		}
	}
	for i, name := range c.Encrypted {
		if err := custodian.CategoryName(name).Check(); err != nil {
			faults = append(faults, fmt.Errorf("cpix.encrypted[%d]: %w", i, err))
		}
		speke.Encrypted[custodian.CategoryName(name)] = true
	}
	return speke, exports, errors.Join(faults...)
}

func readRecipient(c CPIXRecipientConfig) (packager.Recipient, error) {
	raw, err := os.ReadFile(c.CertFile)
	if err != nil {
		return packager.Recipient{}, err
	}
	if block, rest := pem.Decode(raw); block != nil {
		if block.Type != "CERTIFICATE" {
			return packager.Recipient{}, fmt.Errorf("%s: the PEM is of type %s, not CERTIFICATE", c.CertFile, block.Type)
		}
		if next, _ := pem.Decode(rest); next != nil {
			return packager.Recipient{}, fmt.Errorf("%s: more than one certificate; one is pinned, not a chain", c.CertFile)
		}
		raw = block.Bytes
	}
	r, err := packager.NewRecipient(raw, packager.KeyWrapping(c.KeyWrapping))
	if err != nil {
		return r, fmt.Errorf("%s: %w", c.CertFile, err)
	}
	return r, nil
}
