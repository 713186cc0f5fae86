// Package rpc serves the domain over gRPC with mutual TLS. It decides who is
// calling (identity.go), what a caller is told when something is refused
// (status.go), how long a call may take, and how answers that carry keys are
// wiped from memory once they are sent (codec.go, conn.go).
//
// Everything else is decided in package custodian: the services here decode a
// request, ask the domain, and encode its answer.
package rpc
