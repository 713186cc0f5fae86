package certs

import (
	"bytes"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"time"
)

// A content is what one file held when it was read.
type content struct {
	data []byte
	err  error    // why the file could not be read
	sum  [32]byte // of data, or of the text of err
}

// read reads a regular file. A secret file must not be accessible to group or
// others; the check is on the open file, so that it cannot be swapped in between.
func read(path string, secret bool) content {
	data, err := readFile(path, secret)
	if err != nil {
		return content{err: err, sum: sha256.Sum256([]byte(err.Error()))}
	}
	return content{data: data, sum: sha256.Sum256(data)}
}

func readFile(path string, secret bool) ([]byte, error) {
	// Looked at before it is opened: opening a named pipe would wait for a writer.
	info, err := os.Stat(path)
	if err != nil {
		return nil, withoutPath(err)
	}
	if !info.Mode().IsRegular() {
		return nil, errors.New("not a regular file")
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, withoutPath(err)
	}
	defer f.Close()
	if info, err = f.Stat(); err != nil {
		return nil, withoutPath(err)
	}
	if perm := info.Mode().Perm(); secret && perm&0o077 != 0 {
		return nil, fmt.Errorf("mode %04o lets group or others at the private key, 0600 is needed", perm)
	}
	return io.ReadAll(f)
}

// withoutPath leaves only the reason of a file error: every fault is reported
// with its path in front.
func withoutPath(err error) error {
	if pathErr, ok := errors.AsType[*fs.PathError](err); ok {
		return pathErr.Err
	}
	return err
}

const (
	pemCertificate = "CERTIFICATE"
	pemCRL         = "X509 CRL"
)

// pemBlocks returns the blocks of a PEM file, all of which must be of one type.
func pemBlocks(data []byte, kind string) ([][]byte, error) {
	var blocks [][]byte
	for rest := data; ; {
		var block *pem.Block
		block, rest = pem.Decode(rest)
		if block == nil {
			break
		}
		if block.Type != kind {
			return nil, fmt.Errorf("PEM block %q where %q is expected", block.Type, kind)
		}
		blocks = append(blocks, block.Bytes)
	}
	// pem.Decode steps over damaged blocks without a word.
	if begun := bytes.Count(data, []byte("-----BEGIN ")); begun != len(blocks) {
		return nil, fmt.Errorf("damaged PEM: %d of %d blocks are readable", len(blocks), begun)
	}
	if len(blocks) == 0 {
		return nil, fmt.Errorf("no PEM block %q", kind)
	}
	return blocks, nil
}

func parseCertificates(data []byte) ([]*x509.Certificate, error) {
	blocks, err := pemBlocks(data, pemCertificate)
	if err != nil {
		return nil, err
	}
	certs := make([]*x509.Certificate, 0, len(blocks))
	for _, der := range blocks {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		certs = append(certs, cert)
	}
	return certs, nil
}

// parseKeyPair reads a certificate chain and its private key for one use.
// Certificate.Leaf is set in the result.
func parseKeyPair(certFile, keyFile string, cert, key content, use x509.ExtKeyUsage, now time.Time) (*tls.Certificate, error) {
	var faults []error
	if cert.err != nil {
		faults = append(faults, fmt.Errorf("%s: %w", certFile, cert.err))
	}
	if key.err != nil {
		faults = append(faults, fmt.Errorf("%s: %w", keyFile, key.err))
	}
	if len(faults) > 0 {
		return nil, errors.Join(faults...)
	}
	chain, err := parseCertificates(cert.data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", certFile, err)
	}
	leaf := chain[0]
	if err := checkTime(leaf, now); err != nil {
		return nil, fmt.Errorf("%s: %w", certFile, err)
	}
	if len(leaf.ExtKeyUsage) > 0 && !slices.Contains(leaf.ExtKeyUsage, use) {
		return nil, fmt.Errorf("%s: its extended key usage lacks %s: %w", certFile, useName(use), ErrNotVouched)
	}
	pair, err := tls.X509KeyPair(cert.data, key.data)
	if err != nil {
		return nil, fmt.Errorf("%s with %s: %w", certFile, keyFile, err)
	}
	return &pair, nil
}

func useName(use x509.ExtKeyUsage) string {
	if use == x509.ExtKeyUsageServerAuth {
		return "serverAuth"
	}
	return "clientAuth"
}

// checkTime wraps ErrExpired unless now is within the validity of cert.
func checkTime(cert *x509.Certificate, now time.Time) error {
	if now.Before(cert.NotBefore) {
		return fmt.Errorf("valid from %s: %w", cert.NotBefore.UTC().Format(time.RFC3339), ErrExpired)
	}
	if now.After(cert.NotAfter) {
		return fmt.Errorf("valid until %s: %w", cert.NotAfter.UTC().Format(time.RFC3339), ErrExpired)
	}
	return nil
}
