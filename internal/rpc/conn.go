package rpc

import (
	"net"

	"google.golang.org/grpc/credentials"
)

// wipingCreds are TLS credentials whose connections wipe what was written, and
// whose refusals are told.
//
// Below the codec, gRPC copies each message once more, into the buffer of its
// HTTP/2 writer, where it would stay until later messages overwrite it. That
// buffer is the only thing that the transport ever passes to the connection's
// Write: in gRPC 1.85 all frames go through bufWriter (internal/transport,
// http_util.go), which copies into a buffer of its own, writes that, and starts
// again at offset 0 without reading the old bytes. The exception is a server
// with WriteBufferSize 0, which NewServer never makes.
//
// TestKeysLeaveMemory would notice if an upgrade left plaintext elsewhere, and
// all calls would break if an upgrade still read the bytes.
type wipingCreds struct {
	credentials.TransportCredentials
	server *Server
}

func (c wipingCreds) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := c.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		c.server.refusedHandshake(listenerGRPC, raw, err)
		return nil, nil, err
	}
	return &wipingConn{conn, c.server.primers}, info, nil
}

func (c wipingCreds) Clone() credentials.TransportCredentials {
	return wipingCreds{c.TransportCredentials.Clone(), c.server}
}

// A wipingConn wipes the caller's buffer once it is written. That is more than
// io.Writer allows; wipingCreds says why it is right here.
type wipingConn struct {
	net.Conn
	primers *primers
}

func (c *wipingConn) Write(p []byte) (int, error) {
	defer clear(p)
	c.primers.prime(len(p))
	return c.Conn.Write(p)
}
