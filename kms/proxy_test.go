package kms_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/keycustody/custodian/testservers"
)

// A proxy stands between a provider and a real Vault, with TLS on both sides,
// and breaks requests about keys as a test tells it. It asks for a client
// certificate as Vault does.
type proxy struct {
	address string
	caFile  string
	otherCA []byte // PEM of a CA that signed nothing

	server *httptest.Server
	target string
	client *http.Client

	// mu guards the fields below.
	mu       sync.Mutex
	behaves  behaviour
	requests []*http.Request
}

// A behaviour answers one request. It calls next to have Vault answer it.
type behaviour func(w http.ResponseWriter, r *http.Request, next http.HandlerFunc)

func newProxy(t *testing.T, v *testservers.VaultServer) *proxy {
	t.Helper()
	pair, err := tls.LoadX509KeyPair(v.ClientCertFile, v.ClientKeyFile)
	if err != nil {
		t.Fatal(err)
	}
	vaultCA, err := os.ReadFile(v.CAFile)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(vaultCA)
	p := &proxy{target: v.Address, behaves: forward}
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}}}
	p.client = &http.Client{Transport: transport}

	p.server = httptest.NewUnstartedServer(p)
	p.server.Config.ErrorLog = log.New(io.Discard, "", 0)
	p.server.TLS = &tls.Config{Certificates: []tls.Certificate{selfSigned(t)}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: roots}
	p.server.StartTLS()
	t.Cleanup(func() {
		p.server.CloseClientConnections()
		p.server.Close()
		transport.CloseIdleConnections()
	})
	p.address = p.server.URL
	p.caFile = filepath.Join(t.TempDir(), "proxy-ca.pem")
	if err := os.WriteFile(p.caFile, certPEM(p.server.TLS.Certificates[0]), 0o600); err != nil {
		t.Fatal(err)
	}
	p.otherCA = certPEM(selfSigned(t))
	return p
}

func (p *proxy) set(b behaviour) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.behaves = b
}

func (p *proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	p.mu.Lock()
	behaves := p.behaves
	p.requests = append(p.requests, r)
	p.mu.Unlock()
	behaves(w, r, p.forward)
}

// forward has Vault answer.
func (p *proxy) forward(w http.ResponseWriter, r *http.Request) {
	out, err := http.NewRequestWithContext(r.Context(), r.Method, p.target+r.URL.RequestURI(), r.Body)
	if err != nil {
		w.WriteHeader(http.StatusBadGateway)
		return
	}
	out.Header = r.Header.Clone()
	answer, err := p.client.Do(out)
	if err != nil {
		w.WriteHeader(http.StatusBadGateway)
		return
	}
	defer answer.Body.Close()
	w.WriteHeader(answer.StatusCode)
	io.Copy(w, answer.Body)
}

// count is how many requests had this in their path.
func (p *proxy) count(part string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := 0
	for _, r := range p.requests {
		if strings.Contains(r.URL.Path, part) {
			n++
		}
	}
	return n
}

// tokens are the Vault tokens that were sent.
func (p *proxy) tokens() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	var tokens []string
	for _, r := range p.requests {
		if token := r.Header.Get("X-Vault-Token"); token != "" && !slices.Contains(tokens, token) {
			tokens = append(tokens, token)
		}
	}
	return tokens
}

func (p *proxy) sawHeader(name string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.ContainsFunc(p.requests, func(r *http.Request) bool { return r.Header.Get(name) != "" })
}

func (p *proxy) closeConnections() { p.server.CloseClientConnections() }

func forward(w http.ResponseWriter, r *http.Request, next http.HandlerFunc) { next(w, r) }

// answer answers in Vault's place.
func answer(status int, body string) behaviour {
	return func(w http.ResponseWriter, _ *http.Request, _ http.HandlerFunc) {
		w.WriteHeader(status)
		io.WriteString(w, body)
	}
}

// endless answers more than anybody wants to read.
func endless(w http.ResponseWriter, r *http.Request, _ http.HandlerFunc) {
	io.WriteString(w, `{"data":{"plaintext":"`)
	chunk := strings.Repeat("A", 1<<16)
	for r.Context().Err() == nil {
		if _, err := io.WriteString(w, chunk); err != nil {
			return
		}
	}
}

// only behaves as b for requests with this in their path.
func only(part string, b behaviour) behaviour {
	return func(w http.ResponseWriter, r *http.Request, next http.HandlerFunc) {
		if strings.Contains(r.URL.Path, part) {
			b(w, r, next)
			return
		}
		next(w, r)
	}
}

// reset cuts the connection before Vault hears of the request.
func reset(w http.ResponseWriter, _ *http.Request, _ http.HandlerFunc) { cut(w) }

// resetAfter cuts the connection when Vault has done what was asked.
func resetAfter(w http.ResponseWriter, r *http.Request, next http.HandlerFunc) {
	next(httptest.NewRecorder(), r)
	cut(w)
}

// hang never answers.
func hang(_ http.ResponseWriter, r *http.Request, _ http.HandlerFunc) { <-r.Context().Done() }

// hangAfter has Vault do what was asked and never answers.
func hangAfter(_ http.ResponseWriter, r *http.Request, next http.HandlerFunc) {
	next(httptest.NewRecorder(), r)
	<-r.Context().Done()
}

// cut closes the connection with a TCP reset.
func cut(w http.ResponseWriter) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	if tcp, ok := conn.(*tls.Conn).NetConn().(*net.TCPConn); ok {
		tcp.SetLinger(0)
		tcp.Close()
	}
}

// selfSigned makes a server certificate for 127.0.0.1 that is its own CA.
func selfSigned(t *testing.T) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "proxy"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func certPEM(c tls.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Certificate[0]})
}
