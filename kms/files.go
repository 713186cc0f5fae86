package kms

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
)

// maxFile bounds what is read from a configured file: tokens, IDs and PEM
// files are all far smaller.
const maxFile = 1 << 20

// readSecret reads a regular file that its owner alone can read. The caller
// clears what it returns.
func readSecret(path string) ([]byte, error) {
	// O_NONBLOCK: a named pipe is refused below instead of waited for.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s: not a regular file", path)
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return nil, fmt.Errorf("%s: mode %04o lets others at it: chmod it to 0600", path, mode)
	}
	if info.Size() > maxFile {
		return nil, fmt.Errorf("%s: %d bytes, which is too large", path, info.Size())
	}
	b := make([]byte, info.Size())
	if _, err := io.ReadFull(f, b); err != nil {
		clear(b)
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return b, nil
}

// readSecretLine is readSecret for a file that holds one token or ID, as a
// string, because Vault's client takes nothing else.
func readSecretLine(path string) (string, error) {
	b, err := readSecret(path)
	if err != nil {
		return "", err
	}
	defer clear(b)
	line := bytes.TrimSpace(b)
	if len(line) == 0 {
		return "", fmt.Errorf("%s: the file is empty", path)
	}
	if bytes.ContainsFunc(line, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return "", fmt.Errorf("%s: must hold one line of printable ASCII", path)
	}
	return string(line), nil
}

// readPair reads a client certificate and its key.
func readPair(certFile, keyFile string) (*tls.Certificate, error) {
	cert, err := os.ReadFile(certFile)
	if err != nil {
		return nil, err
	}
	key, err := readSecret(keyFile)
	if err != nil {
		return nil, err
	}
	defer clear(key)
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return nil, fmt.Errorf("%s with %s: %w", certFile, keyFile, err)
	}
	return &pair, nil
}

// readRoots reads the CA certificates of a PEM file.
func readRoots(path string) (*x509.CertPool, error) {
	pem, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, errors.New(path + ": no certificate in PEM")
	}
	return roots, nil
}
