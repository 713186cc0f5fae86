// Package certs holds the mutual TLS of the daemon and of its clients:
// configurations that follow their files while running, and the identity that a
// client certificate proves.
//
// It decides which certificates are accepted (chain, usage, time, revocation)
// and which single name a certificate stands for. What that name may do is
// decided elsewhere: a [Peer] carries the roles that its CA may vouch for, not
// the roles that the caller has.
//
// [Server] and [Client] are for production. [Authority] is a certification
// authority in a directory, for development and tests only.
package certs

import (
	"errors"
	"time"
)

// What [Server.Peer] and the handshake refuse. The errors wrap one of these.
var (
	// ErrNoIdentity: no name in the certificate can be an identity.
	ErrNoIdentity = errors.New("no identity in the certificate")

	// ErrAmbiguousIdentity: the certificate has two candidate names, or two of
	// the configured CAs verify it.
	ErrAmbiguousIdentity = errors.New("ambiguous identity")

	// ErrNotVouched: no configured CA vouches for this certificate, or its CA
	// may not vouch for this name or this use.
	ErrNotVouched = errors.New("not vouched for")

	// ErrRevoked: a certificate of the chain is on its issuer's revocation list.
	ErrRevoked = errors.New("certificate revoked")

	// ErrCRLExpired: the issuer's revocation list is missing, or past its
	// nextUpdate by more than the grace period.
	ErrCRLExpired = errors.New("no current revocation list")

	// ErrExpired: a certificate of the chain is outside its validity period.
	ErrExpired = errors.New("certificate expired or not yet valid")
)

// A CA is one client CA of the configuration and what it may vouch for. A CA
// that lists nothing vouches for nothing.
type CA struct {
	// Name stands for the CA in messages and metrics.
	Name string

	// File holds one or more CA certificates in PEM. Each of them is trusted; a
	// revocation list of another one in the file may revoke it nevertheless.
	File string

	// CRLFile holds the revocation lists (RFC 5280) of this CA, in PEM, or one
	// in DER. Each must be complete and signed by a certificate of File. Where
	// it is set, every certificate that a client presents needs the list of its
	// issuer. Empty: nothing is ever revoked.
	CRLFile string

	// TrustDomain is the SPIFFE trust domain that the CA, and no other one, may
	// vouch for.
	TrustDomain string

	// DNSNames are the DNS names that the CA, and no other one, may vouch for, for
	// outside parties whose certificates carry no SPIFFE ID. They are compared whole, without
	// regard to case; wildcards are refused.
	DNSNames []string

	// Roles are the roles that the CA may vouch for. This package only hands
	// them on.
	Roles []string
}

// A Peer is who a verified client certificate says is calling.
type Peer struct {
	// Name is the SPIFFE ID, or the DNS name in lower case.
	Name string

	// CA is the name of the CA that verified the chain.
	CA string

	// Roles are the roles which that CA may vouch for.
	Roles []string

	// SPKI is the SHA-256 of the certificate's SubjectPublicKeyInfo in DER.
	SPKI [32]byte

	// Cert is the SHA-256 of the certificate in DER.
	Cert [32]byte

	// NotAfter is when the client's own certificate expires.
	NotAfter time.Time
}
