package certs

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"
)

// ClientOptions configure a Client. The three files are needed.
type ClientOptions struct {
	// CertFile and KeyFile are the client's chain, leaf first, and its private
	// key, in PEM. The key file must have mode 0600 or less.
	CertFile string
	KeyFile  string

	// CAFile holds the CA certificates that servers are verified with, in PEM.
	// The system's CAs are never used.
	CAFile string

	// ServerName is the name that the server's certificate must have; empty for
	// the name that is dialled.
	ServerName string

	// Now is the clock, time.Now if nil.
	Now func() time.Time

	// Log receives a line when a changed certificate file is bad. Nothing is
	// logged if nil.
	Log *slog.Logger
}

// A Client holds the certificate of a TLS client as it is in its file now. It is
// safe for concurrent use.
type Client struct {
	opts ClientOptions
	pool *x509.CertPool

	// mu guards the fields below.
	mu      sync.Mutex
	pair    *tls.Certificate
	certSum [32]byte // of the files that pair is from
	keySum  [32]byte
	fault   string // of the last look at the files
}

// NewClient loads all files. All faults are returned at once, each with the file
// that it is in. A certificate that is out of its validity wraps ErrExpired.
func NewClient(o ClientOptions) (*Client, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	c := &Client{opts: o, pool: x509.NewCertPool()}
	var faults []error
	cas, err := parseCACerts(read(o.CAFile, false))
	if err != nil {
		faults = append(faults, fmt.Errorf("server ca: %s: %w", o.CAFile, err))
	}
	for _, ca := range cas {
		c.pool.AddCert(ca)
	}
	if err := c.load(); err != nil {
		faults = append(faults, err)
	}
	if len(faults) > 0 {
		return nil, errors.Join(faults...)
	}
	return c, nil
}

// TLSConfig returns the client's TLS configuration, TLS 1.3 only. Each handshake
// looks at the certificate's files again; a bad file keeps the last good
// certificate. The CA file is read by NewClient only.
func (c *Client) TLSConfig() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		RootCAs:    c.pool,
		ServerName: c.opts.ServerName,
		Time:       c.opts.Now,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return c.certificate()
		},
	}
}

// certificate returns the certificate to present, or ErrExpired: said here, it
// is clearer than the alert that the server would send.
func (c *Client) certificate() (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	fault := ""
	if err := c.load(); err != nil {
		fault = err.Error()
	}
	if fault != "" && fault != c.fault {
		c.opts.Log.Error("certificates: the last good one stays in use", "fault", fault)
	}
	c.fault = fault
	if err := checkTime(c.pair.Leaf, c.opts.Now()); err != nil {
		return nil, fmt.Errorf("%s: %w", c.opts.CertFile, err)
	}
	return c.pair, nil
}

// load reads the certificate, unless the files hold what it is from.
func (c *Client) load() error {
	cert, key := read(c.opts.CertFile, false), read(c.opts.KeyFile, true)
	defer clear(key.data)
	if c.pair != nil && cert.sum == c.certSum && key.sum == c.keySum {
		return nil
	}
	pair, err := parseKeyPair(c.opts.CertFile, c.opts.KeyFile, cert, key, x509.ExtKeyUsageClientAuth, c.opts.Now())
	if err != nil {
		return err
	}
	c.pair, c.certSum, c.keySum = pair, cert.sum, key.sum
	return nil
}
