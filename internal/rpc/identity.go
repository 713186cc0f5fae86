package rpc

import (
	"context"
	"crypto/tls"
	"errors"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/keycustody/custodian/custodian"
)

var errNoTLS = errors.New("the connection has no TLS state")

// identify says who is calling, from the verified chain of the connection and
// nothing else. It asks the certificates anew for each call, so that one that is
// revoked or expires while it is connected loses its next call.
func (s *Server) identify(ctx context.Context) (custodian.Caller, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return custodian.Caller{}, &identityError{errNoTLS}
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok {
		return custodian.Caller{}, &identityError{errNoTLS}
	}
	return s.callerOf(info.State)
}

// callerOf is the same for a connection that is not gRPC's.
func (s *Server) callerOf(state tls.ConnectionState) (custodian.Caller, error) {
	who, err := s.config.Certs.Peer(state)
	if err != nil {
		return custodian.Caller{}, &identityError{err}
	}
	s.metrics.peer(who)
	caller := custodian.Caller{ID: who.Name, CA: who.CA, SPKI: who.SPKI, Cert: who.Cert, Roles: make([]custodian.Role, len(who.Roles))}
	for i, role := range who.Roles {
		caller.Roles[i] = custodian.Role(role)
	}
	return caller, nil
}
