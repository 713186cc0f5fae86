package gcpkms

import (
	"net"
	"sync"
)

// A listener can reset its connections.
type listener struct {
	net.Listener

	// mu guards the fields below.
	mu      sync.Mutex
	conns   []net.Conn
	refuses bool
}

func (l *listener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		l.mu.Lock()
		refuses := l.refuses
		if !refuses {
			l.conns = append(l.conns, conn)
		}
		l.mu.Unlock()
		if !refuses {
			return conn, nil
		}
		reset(conn)
	}
}

func (l *listener) refuse(refuses bool) {
	l.mu.Lock()
	l.refuses = refuses
	l.mu.Unlock()
	if refuses {
		l.cut()
	}
}

func (l *listener) cut() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, conn := range l.conns {
		reset(conn)
	}
	l.conns = nil
}

// reset ends a connection with a TCP reset.
func reset(conn net.Conn) {
	if tcp, ok := conn.(*net.TCPConn); ok {
		tcp.SetLinger(0)
	}
	conn.Close()
}
