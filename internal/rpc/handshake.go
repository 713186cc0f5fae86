package rpc

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"os"
	"syscall"

	"github.com/keycustody/custodian/certs"
)

// Listeners, as the metrics and the log name them.
const (
	listenerGRPC      = "grpc"
	listenerTwin      = "http"
	listenerPackagers = "packagers"
)

// Why there is no connection, for metrics. Of these, brokenHandshake is nobody's
// refusal: the other end left, or said nothing until its time was up.
const (
	brokenHandshake = "broken"
	refusedTLS      = "tls" // no certificate, another version, no TLS at all
)

// refusedCertificates name what package certs refuses.
var refusedCertificates = []struct {
	err    error
	reason string
}{
	{certs.ErrRevoked, "revoked"},
	{certs.ErrExpired, "expired"},
	{certs.ErrCRLExpired, "crl_expired"},
	{certs.ErrAmbiguousIdentity, "ambiguous_identity"},
	{certs.ErrNoIdentity, "no_identity"},
	{certs.ErrNotVouched, "not_vouched"},
}

// refusedHandshake counts a connection that ended while shaking hands. A client
// that is refused there hears next to nothing, so the log says why.
func (s *Server) refusedHandshake(listener string, conn net.Conn, err error) {
	reason := handshakeReason(err)
	s.metrics.handshakes.WithLabelValues(listener, reason).Inc()
	if reason == brokenHandshake { // so does every port scan, and every look of a load balancer
		return
	}
	s.repeats.say("handshake "+listener+" "+reason, line{s.config.Log.Info, "connection refused", []any{
		"listener", listener, "reason", reason, "remote", conn.RemoteAddr().String(), "err", err}})
}

// handshakeReason says why a handshake failed. crypto/tls verifies the chain
// before package certs is asked.
func handshakeReason(err error) string {
	for _, c := range refusedCertificates {
		if errors.Is(err, c.err) {
			return c.reason
		}
	}
	if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		if invalid, ok := errors.AsType[x509.CertificateInvalidError](err); ok && invalid.Reason == x509.Expired {
			return "expired"
		}
		return "not_vouched"
	}
	for _, broken := range []error{io.EOF, io.ErrUnexpectedEOF, os.ErrDeadlineExceeded, net.ErrClosed, syscall.ECONNRESET, syscall.EPIPE} {
		if errors.Is(err, broken) {
			return brokenHandshake
		}
	}
	return refusedTLS
}
