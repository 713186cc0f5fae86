package kms

import (
	"crypto/tls"
	"net"
	"net/http"
	"time"
)

// maxAnswer bounds one answer of a KMS, in bytes.
const maxAnswer = 1 << 20

// tlsConfig trusts the CAs of caFile, or the system's where there is none.
func tlsConfig(caFile string) (*tls.Config, error) {
	conf := &tls.Config{MinVersion: tls.VersionTLS12}
	if caFile != "" {
		roots, err := readRoots(caFile)
		if err != nil {
			return nil, err
		}
		conf.RootCAs = roots
	}
	return conf, nil
}

// http1 makes connections of HTTP/1.1: few calls are made, and one that is
// given up takes its connection with it, where a dead HTTP/2 connection would
// be used for the next call too. No proxy of the environment is used.
func http1(conf *tls.Config, timeout time.Duration) *http.Transport {
	var one http.Protocols
	one.SetHTTP1(true)
	return &http.Transport{
		DialContext:         (&net.Dialer{Timeout: timeout}).DialContext,
		TLSClientConfig:     conf,
		TLSHandshakeTimeout: timeout,
		Protocols:           &one,
		MaxIdleConnsPerHost: 4,
		IdleConnTimeout:     30 * time.Second,
	}
}

// bounded cuts an answer off that is longer than any of a KMS.
type bounded struct{ *http.Transport }

func (b bounded) RoundTrip(r *http.Request) (*http.Response, error) {
	answer, err := b.Transport.RoundTrip(r)
	if err == nil {
		answer.Body = http.MaxBytesReader(nil, answer.Body, maxAnswer)
	}
	return answer, err
}
