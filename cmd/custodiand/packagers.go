package main

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/rsa"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/keycustody/custodian/internal/packager"
)

// PackagersConfig is the HTTPS listener of packagers.
type PackagersConfig struct {
	Listen  string         `yaml:"listen"` // address; without it there is no listener
	Signers []SignerConfig `yaml:"signers"`
}

// SignerConfig is a signer of requests to the Widevine Common Encryption API.
// Its identities must sign; they are callers by their certificates all the same.
type SignerConfig struct {
	Name       string   `yaml:"name"`
	Identities []string `yaml:"identities"`
	// One of the two. AESFile, mode 0600, has the key in its first line and the IV
	// in its second, both in hexadecimal digits. RSAPublicKeyFile is PEM or DER.
	AESFile          string `yaml:"aes_file"`
	RSAPublicKeyFile string `yaml:"rsa_public_key_file"`
}

func (c *PackagersConfig) paths() []*string {
	var paths []*string
	for i := range c.Signers {
		paths = append(paths, &c.Signers[i].AESFile, &c.Signers[i].RSAPublicKeyFile)
	}
	return paths
}

func (c PackagersConfig) check() []error {
	var faults []error
	if c.Listen == "" {
		if len(c.Signers) > 0 {
			faults = append(faults, errors.New("packagers.listen: must be set where there are signers"))
		}
		return faults
	}
	if _, _, err := net.SplitHostPort(c.Listen); err != nil {
		faults = append(faults, fmt.Errorf("packagers.listen: %w", err))
	}
	if _, err := c.signers(); err != nil {
		faults = append(faults, err)
	}
	return faults
}

// signers reads the keys of all signers.
func (c PackagersConfig) signers() ([]packager.Signer, error) {
	var faults []error
	list := make([]packager.Signer, len(c.Signers))
	for i, sc := range c.Signers {
		s := packager.Signer{Name: sc.Name, Identities: sc.Identities}
		key, err := "aes_file", error(nil)
		switch {
		case sc.AESFile != "" && sc.RSAPublicKeyFile != "":
			err = errors.New("it excludes rsa_public_key_file")
		case sc.AESFile != "":
			s.AESKey, s.AESIV, err = readAESSigner(sc.AESFile)
		case sc.RSAPublicKeyFile != "":
			key = "rsa_public_key_file"
			s.RSA, err = readRSAPublicKey(sc.RSAPublicKeyFile)
		default:
			err = errors.New("it or rsa_public_key_file must be set")
		}
		if err != nil {
			faults = append(faults, fmt.Errorf("packagers.signers[%d].%s: %w", i, key, err))
		}
		list[i] = s
	}
	if len(faults) == 0 {
		if err := packager.CheckSigners(list); err != nil {
			faults = append(faults, fmt.Errorf("packagers.%w", err))
		}
	}
	return list, errors.Join(faults...)
}

func readAESSigner(path string) (key []byte, iv [aes.BlockSize]byte, err error) {
	raw, err := readPrivate(path)
	if err != nil {
		return nil, iv, err
	}
	defer clear(raw)
	lines := bytes.Fields(raw)
	if len(lines) != 2 {
		return nil, iv, fmt.Errorf("%s: %d lines: two are needed, key and IV", path, len(lines))
	}
	key = make([]byte, hex.DecodedLen(len(lines[0])))
	if _, err := hex.Decode(key, lines[0]); err != nil {
		return nil, iv, fmt.Errorf("%s: key: not hexadecimal digits", path)
	}
	if n, err := hex.Decode(iv[:], lines[1][:min(len(lines[1]), 2*len(iv))]); err != nil || n != len(iv) || len(lines[1]) != 2*len(iv) {
		return nil, iv, fmt.Errorf("%s: IV: must be %d hexadecimal digits", path, 2*len(iv))
	}
	return key, iv, nil
}

func readRSAPublicKey(path string) (*rsa.PublicKey, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	if block, _ := pem.Decode(raw); block != nil {
		raw = block.Bytes
	}
	if pub, err := x509.ParsePKIXPublicKey(raw); err == nil {
		if key, ok := pub.(*rsa.PublicKey); ok {
			return key, nil
		}
	} else if key, err := x509.ParsePKCS1PublicKey(raw); err == nil {
		return key, nil
	}
	return nil, fmt.Errorf("%s: no RSA public key in PEM or DER", path)
}

// listenPackagers opens the listener of packagers, if there is one.
func (d *daemon) listenPackagers() (net.Listener, error) {
	c := d.config.Packagers
	if c.Listen == "" {
		return nil, nil
	}
	signers, err := c.signers()
	if err != nil {
		return nil, err
	}
	speke, _, err := d.config.CPIX.load()
	if err != nil {
		return nil, err
	}
	if d.packagers, err = packager.NewServer(packager.Config{RPC: d.server, Signers: signers, SPEKE: speke, Log: d.log}); err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", c.Listen)
	if err != nil {
		return nil, fmt.Errorf("packagers.listen: %w", err)
	}
	d.log.Info("listening for packagers", "packagers", l.Addr().String())
	d.packagerAddr = l.Addr()
	return l, nil
}

func (d *daemon) servePackagers(ctx context.Context, l net.Listener) error {
	return d.packagers.Serve(ctx, l, d.config.Limits.DrainTimeout)
}
