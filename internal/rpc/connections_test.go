package rpc_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/internal/rpc"
)

// listeners has the kit serve all its listeners, and returns their addresses and
// what shows that each still serves.
func (k *kit) listeners(t *testing.T) (addrs map[string]string, served func(while string)) {
	t.Helper()
	k.createCategory(t, "movies")
	kid := k.issue(t, "clip", "HD")[0].GetKid()
	twin, packagers := k.serveTwin(t), k.servePackagers(t)
	addrs = map[string]string{"gRPC": k.addr, "twin": strings.TrimPrefix(twin, "https://"), "packagers": strings.TrimPrefix(strings.TrimSuffix(packagers, "/v1/categories/movies/"), "https://")}
	callback := v1.NewKeyRetrievalServiceClient(k.conn(t, provider))
	http1, http2 := k.browser(t, provider, nil), k.browser(t, packager, nil)
	body := fmt.Sprintf(`{"kids":["%x-%x-%x-%x-%x"]}`, kid[:4], kid[4:6], kid[6:8], kid[8:10], kid[10:])
	return addrs, func(while string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		if _, err := callback.GetContentKeys(ctx, &v1.GetContentKeysRequest{Kids: [][]byte{kid}}, grpc.WaitForReady(true)); err != nil {
			t.Errorf("gRPC, while %s: %v", while, err)
		}
		for name, do := range map[string]func() (*http.Response, error){
			"twin": func() (*http.Response, error) {
				return http1.Post(twin+rpc.TwinPath, "application/json", strings.NewReader(body))
			},
			"packagers": func() (*http.Response, error) {
				return http2.Post(packagers+"widevine", "application/json", strings.NewReader("{}"))
			},
		} {
			resp, err := do()
			if err != nil {
				t.Errorf("%s, while %s: %v", name, while, err)
				continue
			}
			resp.Body.Close()
			if name == "twin" && resp.StatusCode != http.StatusOK || name == "packagers" && resp.StatusCode >= 500 {
				t.Errorf("%s, while %s: HTTP %d", name, while, resp.StatusCode)
			}
			http1.CloseIdleConnections() // the next one comes through the door again
			http2.CloseIdleConnections()
		}
	}
}

// shake makes a TLS connection as who.
func (k *kit) shake(t *testing.T, addr, who, proto string) *tls.Conn {
	t.Helper()
	config := k.browser(t, who, func(c *tls.Config) { c.NextProtos = []string{proto} }).Transport.(*http.Transport).TLSClientConfig
	conn, err := tls.Dial("tcp", addr, config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// answer reads the answer to one request, whole.
func answer(t *testing.T, conn *tls.Conn) *http.Response {
	t.Helper()
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		t.Fatal(err)
	}
	return resp
}

// TestAbusedConnections: connections that say nothing, that say it slowly, and
// that are reset, at each listener: others are served.
func TestAbusedConnections(t *testing.T) {
	k := newKit(t, options{})
	addrs, served := k.listeners(t)
	dial := func(addr string) *net.TCPConn {
		t.Helper()
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c.(*net.TCPConn)
	}
	for _, addr := range addrs {
		for i := range 200 { // half of them begin to shake hands
			if c := dial(addr); i%2 == 0 {
				c.Write([]byte{22, 3, 1, 2, 0, 1})
			}
		}
	}
	served("600 connections say nothing")

	// Callers with a certificate, which never come to an end.
	for range 20 {
		slow := k.shake(t, addrs["twin"], everybody, "http/1.1")
		fmt.Fprintf(slow, "POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Le", rpc.TwinPath)
		slow = k.shake(t, addrs["twin"], everybody, "http/1.1")
		fmt.Fprintf(slow, "POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{", rpc.TwinPath)
		slow = k.shake(t, addrs["packagers"], packager, "http/1.1")
		fmt.Fprintf(slow, "POST /v1/categories/movies/widevine HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{")
		slow = k.shake(t, addrs["gRPC"], everybody, "h2")
		slow.Write(append(preface(), 0, 0, 100, 1)) // part of a frame of headers
	}
	served("80 callers send slowly")

	var resets sync.WaitGroup
	var n atomic.Int64
	for _, addr := range addrs {
		resets.Go(func() {
			for range 500 {
				c, err := net.Dial("tcp", addr)
				if err != nil {
					continue
				}
				c.Write([]byte{22, 3, 1})
				c.(*net.TCPConn).SetLinger(0)
				c.Close()
				n.Add(1)
			}
		})
	}
	served("connections are reset")
	resets.Wait()
	served("1,500 connections have been reset")
	if n.Load() < 1000 {
		t.Errorf("only %d of 1,500 connections could be made to be reset", n.Load())
	}
}

// preface is what an HTTP/2 client begins with (RFC 9113, section 3.4): a
// connection preface and a SETTINGS frame.
func preface() []byte {
	return append([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), 0, 0, 0, 4, 0, 0, 0, 0, 0)
}

// goAway reads frames until the server says that it ends the connection, and
// returns why (RFC 9113, section 6.8).
func goAway(conn net.Conn, within time.Duration) (string, error) {
	conn.SetReadDeadline(time.Now().Add(within))
	for {
		var head [9]byte
		if _, err := io.ReadFull(conn, head[:]); err != nil {
			return "", err
		}
		payload := make([]byte, binary.BigEndian.Uint32(append([]byte{0}, head[:3]...)))
		if _, err := io.ReadFull(conn, payload); err != nil {
			return "", err
		}
		if head[3] == 7 && len(payload) >= 8 {
			return string(payload[8:]), nil
		}
	}
}

// TestKeepaliveEnforced: who pings too often is sent away.
func TestKeepaliveEnforced(t *testing.T) {
	k := newKit(t, options{})
	conn := k.shake(t, k.addr, provider, "h2")
	ping := append([]byte{0, 0, 8, 6, 0, 0, 0, 0, 0}, make([]byte, 8)...)
	if _, err := conn.Write(append(preface(), bytes.Repeat(ping, 10)...)); err != nil {
		t.Fatal(err)
	}
	if why, err := goAway(conn, 5*time.Second); err != nil || why != "too_many_pings" {
		t.Errorf("got %q, %v; want the connection to end for too_many_pings", why, err)
	}
}

// TestConnectionAge: a connection is asked to be made anew after its time, and
// calls go on; over HTTP it is closed after the next answer.
func TestConnectionAge(t *testing.T) {
	const age = 300 * time.Millisecond
	k := newKit(t, options{config: func(c *rpc.Config) { c.MaxConnectionAge = age }})
	addrs, served := k.listeners(t)
	conn := k.shake(t, k.addr, provider, "h2")
	if _, err := conn.Write(preface()); err != nil {
		t.Fatal(err)
	}
	if why, err := goAway(conn, 5*time.Second); err != nil {
		t.Errorf("gRPC: got %q, %v; want a connection past its time to be ended", why, err)
	}
	served("connections have passed their time")
	for _, name := range []string{"twin", "packagers"} {
		began := time.Now()
		conn := k.shake(t, addrs[name], provider, "http/1.1")
		for _, last := range []bool{false, true} {
			fmt.Fprintf(conn, "POST /v1/%s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n", map[string]string{"twin": "content-keys/retrieve", "packagers": "categories/movies/widevine"}[name])
			conn.SetReadDeadline(time.Now().Add(5 * time.Second))
			got := answer(t, conn).Close
			if got != last && (last || time.Since(began) < age) {
				t.Errorf("%s: the answer closes the connection: got %v, want %v", name, got, last)
			}
			if got { // the first one does where a slow machine took so long for it
				break
			}
			time.Sleep(time.Until(began.Add(age + 50*time.Millisecond)))
		}
		if _, err := io.Copy(io.Discard, conn); err != nil {
			t.Errorf("%s: after the last answer: %v, want the connection closed", name, err)
		}
	}
}

// TestTransportLimits: sizes of messages and headers, and the calls of one
// connection.
func TestTransportLimits(t *testing.T) {
	k := newKit(t, options{config: func(c *rpc.Config) { c.MaxStreams = 2 }})
	addrs, served := k.listeners(t)
	callback := v1.NewKeyRetrievalServiceClient(k.conn(t, provider))
	_, err := callback.GetContentKeys(t.Context(), &v1.GetContentKeysRequest{LicenceToken: strings.Repeat("x", rpc.MaxRequestSize)})
	if got := status.Code(err); got != codes.ResourceExhausted {
		t.Errorf("a message of more than 1 MiB: got %v, want ResourceExhausted", err)
	}
	large := metadata.AppendToOutgoingContext(t.Context(), "x-large", strings.Repeat("x", 20<<10))
	if _, err := callback.GetContentKeys(large, &v1.GetContentKeysRequest{}); err == nil || status.Code(err) == codes.InvalidArgument {
		t.Errorf("headers of 20 KiB: got %v, want a refusal by the transport", err)
	}
	for _, name := range []string{"twin", "packagers"} {
		conn := k.shake(t, addrs[name], provider, "http/1.1")
		fmt.Fprintf(conn, "POST /v1/content-keys/retrieve HTTP/1.1\r\nHost: localhost\r\nX-Large: %s\r\n\r\n", strings.Repeat("x", 40<<10))
		conn.SetReadDeadline(time.Now().Add(5 * time.Second))
		if got := answer(t, conn).StatusCode; got != http.StatusRequestHeaderFieldsTooLarge {
			t.Errorf("%s: headers of 40 KiB: got %d, want 431", name, got)
		}
	}
	// Two calls that do not end leave no room for a third on their connection.
	conn := k.conn(t, auditor)
	follow, end := context.WithCancel(t.Context())
	defer end()
	for range 2 {
		s, err := v1.NewAuditServiceClient(conn).FollowEntries(follow, &v1.FollowEntriesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Recv(); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := v1.NewCustodyServiceClient(conn).GetStatus(ctx, &v1.GetStatusRequest{}); status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("a third call: got %v, want it to wait", err)
	}
	end()
	if _, err := v1.NewCustodyServiceClient(conn).GetStatus(t.Context(), &v1.GetStatusRequest{}); err != nil {
		t.Errorf("when there is room again: %v", err)
	}
	served("all that was tried")
}

// TestRevokedOverHTTP: a certificate that is revoked while its connection is
// open loses the next call, at the doors that do not speak gRPC as well.
func TestRevokedOverHTTP(t *testing.T) {
	k := newKit(t, options{})
	addrs, served := k.listeners(t)
	for name, path := range map[string]string{"twin": "content-keys/retrieve", "packagers": "categories/movies/widevine"} {
		who := everybody
		if name == "packagers" {
			who = stranger
		}
		conn := k.shake(t, addrs[name], who, "http/1.1")
		ask := func() int {
			fmt.Fprintf(conn, "POST /v1/%s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n", path)
			conn.SetReadDeadline(time.Now().Add(5 * time.Second))
			return answer(t, conn).StatusCode
		}
		if got := ask(); got == http.StatusUnauthorized {
			t.Fatalf("%s: before: got %d", name, got)
		}
		k.revoke(t, who)
		if got := ask(); got != http.StatusUnauthorized {
			t.Errorf("%s: the next call: got %d, want 401", name, got)
		}
	}
	served("others are revoked")
}
