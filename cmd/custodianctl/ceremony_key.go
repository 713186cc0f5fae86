package main

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"os"

	"github.com/ThalesIgnite/crypto11"
	"github.com/spf13/cobra"

	"github.com/keycustody/custodian/custodian"
)

// An officerKey says where an officer's own key is: in a file, or on a smart
// card.
type officerKey struct {
	file                        string
	module, token, label, pinIn string
}

func (k *officerKey) flags(c *cobra.Command) {
	f := c.Flags()
	f.StringVar(&k.file, "officer-key", "", "the officer's private key, PKCS#8 PEM `FILE`, mode 0600")
	f.StringVar(&k.module, "card-module", "", "PKCS#11 module of the officer's smart card, `FILE`; instead of --officer-key")
	f.StringVar(&k.token, "card-token", "", "`LABEL` of the card's token")
	f.StringVar(&k.label, "card-key", "", "`LABEL` of the key pair on the card (ECDSA P-256)")
	f.StringVar(&k.pinIn, "card-pin-file", "", "`FILE` with the card's PIN, mode 0600")
}

// check says which flags do not fit together.
func (k *officerKey) check() error {
	card := k.module != ""
	switch {
	case card == (k.file != ""):
		return invalid(errors.New("name the officer's key: --officer-key FILE, or a smart card with --card-module"))
	case card && (k.token == "" || k.label == "" || k.pinIn == ""):
		return invalid(errors.New("--card-module: --card-token, --card-key and --card-pin-file are needed with it"))
	}
	return nil
}

// open returns what signs for the officer, and its public key as a plan has
// it. The caller calls done.
func (k *officerKey) open() (signer crypto.Signer, public string, done func() error, err error) {
	if err := k.check(); err != nil {
		return nil, "", nil, err
	}
	done = func() error { return nil }
	if k.module != "" {
		signer, done, err = k.openCard()
	} else {
		signer, err = readOfficerKey(k.file)
	}
	if err != nil {
		return nil, "", nil, err
	}
	if public, err = custodian.OfficerKey(signer.Public()); err != nil {
		return nil, "", nil, errors.Join(fmt.Errorf("the officer's key: %w", err), done())
	}
	return signer, public, done, nil
}

// openCard logs in to the card, once: a wrong PIN is not tried again, because
// a card locks itself after a few.
func (k *officerKey) openCard() (crypto.Signer, func() error, error) {
	pin, err := readSecret(k.pinIn)
	if err != nil {
		return nil, nil, fmt.Errorf("--card-pin-file: %w", err)
	}
	card, err := crypto11.Configure(&crypto11.Config{Path: k.module, TokenLabel: k.token, Pin: string(bytes.TrimRight(pin, "\r\n"))})
	clear(pin)
	if err != nil {
		return nil, nil, fmt.Errorf("smart card %s: %w", plain(k.token), err)
	}
	signer, err := card.FindKeyPair(nil, []byte(k.label))
	if err == nil && signer == nil {
		err = errors.New("no such key pair")
	}
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("smart card %s: key %s: %w", plain(k.token), plain(k.label), err), card.Close())
	}
	return signer, card.Close, nil
}

// readSecret reads a small file that only its owner may read.
func readSecret(path string) ([]byte, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if fi.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("%s: mode %04o lets others read it; chmod 600 it", path, fi.Mode().Perm())
	}
	if fi.Size() > 64<<10 {
		return nil, fmt.Errorf("%s: %d bytes: no key is that long", path, fi.Size())
	}
	return os.ReadFile(path)
}

func readOfficerKey(path string) (crypto.Signer, error) {
	raw, err := readSecret(path)
	if err != nil {
		return nil, fmt.Errorf("--officer-key: %w", err)
	}
	defer clear(raw)
	block, _ := pem.Decode(raw)
	if block == nil || block.Type != "PRIVATE KEY" {
		return nil, invalid(fmt.Errorf("--officer-key %s: no private key in PKCS#8 PEM (custodianctl ceremony keygen makes one)", path))
	}
	defer clear(block.Bytes)
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, invalid(fmt.Errorf("--officer-key %s: %w", path, err))
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, invalid(fmt.Errorf("--officer-key %s: a key of type %T signs nothing", path, key))
	}
	return signer, nil
}

func (a *app) ceremonyKeygenCmd() *cobra.Command {
	var out string
	var ed bool
	c := leaf(&cobra.Command{
		Use:   "keygen",
		Short: "Make an officer's key pair in a file (officer; a smart card is better)",
		Example: `  custodianctl ceremony keygen --out anna.key
  custodianctl ceremony key --officer-key anna.key --name anna`,
	}, cobra.NoArgs, func(context.Context, []string) error {
		var key any
		var err error
		if ed {
			_, key, err = ed25519.GenerateKey(rand.Reader)
		} else {
			key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		}
		if err != nil {
			return err
		}
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return err
		}
		defer clear(der)
		if err := writeNew(out, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})); err != nil {
			return fmt.Errorf("write %s: %w", out, err)
		}
		return a.printOfficer("", key.(crypto.Signer).Public())
	})
	c.Flags().StringVar(&out, "out", "", "`FILE` to write")
	c.Flags().BoolVar(&ed, "ed25519", false, "Ed25519 instead of ECDSA P-256")
	return need(c, "out")
}

func (a *app) ceremonyKeyCmd() *cobra.Command {
	var k officerKey
	var name string
	c := leaf(&cobra.Command{
		Use:   "key",
		Short: "Print an officer's public key, as a plan has it and in PEM",
		Example: `  custodianctl ceremony key --officer-key anna.key --name anna
  custodianctl ceremony key --card-module /usr/lib/opensc-pkcs11.so --card-token Anna --card-key SIGN --card-pin-file pin --name anna`,
	}, cobra.NoArgs, func(context.Context, []string) (err error) {
		signer, _, done, err := k.open()
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, done()) }()
		return a.printOfficer(name, signer.Public())
	})
	k.flags(c)
	c.Flags().StringVar(&name, "name", "", "the officer's `NAME`")
	return c
}

func (a *app) printOfficer(name string, public crypto.PublicKey) error {
	key, err := custodian.OfficerKey(public)
	if err != nil {
		return err
	}
	der, err := base64.StdEncoding.DecodeString(key)
	if err != nil {
		return err
	}
	if a.json {
		return a.printJSON(custodian.Officer{Name: name, Key: key})
	}
	if name == "" {
		name = "NAME"
	}
	return a.printf("# in a plan: {name: %s, key: \"%s\"}\n%s", name, key, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
}

// readOfficers reads the public keys that evidence is held against.
func readOfficers(path string) ([]crypto.PublicKey, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("--trust: %w", err)
	}
	var keys []crypto.PublicKey
	for {
		block, rest := pem.Decode(raw)
		if block == nil {
			break
		}
		key, err := x509.ParsePKIXPublicKey(block.Bytes)
		if err == nil {
			_, err = custodian.OfficerKey(key)
		}
		if err != nil {
			return nil, invalid(fmt.Errorf("--trust %s: key %d: %w", path, len(keys)+1, err))
		}
		keys, raw = append(keys, key), rest
	}
	if len(keys) == 0 {
		return nil, invalid(fmt.Errorf("--trust %s: no public key in PEM", path))
	}
	return keys, nil
}
