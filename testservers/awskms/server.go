// Package awskms is a server that speaks the protocol of AWS KMS (JSON 1.1
// over HTTP, Signature Version 4) as far as Encrypt, Decrypt and ReEncrypt go,
// for tests that put AWS's own client in front of it. It checks signatures,
// regions, encryption contexts and key states as AWS does, and breaks as a
// test tells it. It holds keys in memory and is no place for real ones.
package awskms

import (
	"bytes"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/keycustody/custodian/testservers"
)

// Region is where the server says that it is.
const Region = "eu-central-1"

const account = "111122223333"

// A Handler answers one request in the server's place. It calls next to have
// the server answer it.
type Handler func(w http.ResponseWriter, r *http.Request, next http.HandlerFunc)

// A Server is one KMS. Its methods may be called at any time.
type Server struct {
	Address string // https://127.0.0.1:PORT
	CAFile  string // the CA of its certificate, PEM
	// CredentialsFile has the credentials that are good now, in AWS's form of
	// a shared credentials file, mode 0600.
	CredentialsFile string

	t testservers.TB

	// mu guards the fields below.
	mu       sync.Mutex
	keys     map[string]*key   // by ARN
	aliases  map[string]string // to the ARN
	callers  map[string]*caller
	broken   Handler
	requests []Request
}

// A Request is one that came with a good signature.
type Request struct {
	Operation string // Encrypt
	Context   map[string]string
	AccessKey string
}

// A caller is who owns an access key.
type caller struct {
	secret, token string
	expired       bool
	denied        map[string]bool // operations
}

// Start starts a server that ends with its test.
func Start(t testservers.TB) *Server {
	t.Helper()
	s := &Server{t: t, keys: map[string]*key{}, aliases: map[string]string{}, callers: map[string]*caller{}}
	cert, caFile := testservers.Certificate(t)
	s.CAFile = caFile
	s.CredentialsFile = filepath.Join(t.TempDir(), "credentials")
	s.NewCredentials()

	server := httptest.NewUnstartedServer(s)
	server.Config.ErrorLog = log.New(io.Discard, "", 0) // broken handshakes are what tests are about
	server.TLS = &tls.Config{Certificates: []tls.Certificate{cert}}
	server.StartTLS()
	t.Cleanup(func() {
		server.CloseClientConnections()
		server.Close()
	})
	s.Address = server.URL
	return s
}

// NewCredentials makes an access key, writes it to CredentialsFile and returns
// its ID. Those made before are good as well.
func (s *Server) NewCredentials() string {
	s.t.Helper()
	id, c := "ASIA"+rand.Text()[:16], &caller{secret: rand.Text(), token: rand.Text(), denied: map[string]bool{}}
	s.mu.Lock()
	s.callers[id] = c
	s.mu.Unlock()
	text := fmt.Sprintf("[default]\naws_access_key_id = %s\naws_secret_access_key = %s\naws_session_token = %s\n", id, c.secret, c.token)
	if err := os.WriteFile(s.CredentialsFile, []byte(text), 0o600); err != nil {
		s.t.Fatalf("write credentials: %v", err)
	}
	return id
}

// Expire ends all credentials that were made until now.
func (s *Server) Expire() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.callers {
		c.expired = true
	}
}

// Deny takes operations away from everybody; without any it gives all back.
func (s *Server) Deny(operations ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.callers {
		clear(c.denied)
		for _, op := range operations {
			c.denied[op] = true
		}
	}
}

// Break has h answer all requests; nil ends that.
func (s *Server) Break(h Handler) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.broken = h
}

// Requests are the requests so far that came with a good signature.
func (s *Server) Requests() []Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]Request(nil), s.requests...)
}

func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(io.LimitReader(r.Body, 1<<20))
	if err != nil {
		return
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	s.mu.Lock()
	broken := s.broken
	s.mu.Unlock()
	if broken != nil {
		broken(w, r, s.serve)
		return
	}
	s.serve(w, r)
}

// serve answers as AWS does.
func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	answer, err := s.answer(r, body)
	w.Header().Set("Content-Type", "application/x-amz-json-1.1")
	w.Header().Set("x-amzn-RequestId", rand.Text())
	if err != nil {
		fault, ok := err.(*Error)
		if !ok {
			fault = &Error{http.StatusInternalServerError, "KMSInternalException", err.Error()}
		}
		Fail(fault.Status, fault.Code, fault.Message)(w, r, nil)
		return
	}
	json.NewEncoder(w).Encode(answer)
}

func (s *Server) answer(r *http.Request, body []byte) (any, error) {
	if r.Method != http.MethodPost || r.URL.Path != "/" || r.Header.Get("Content-Type") != "application/x-amz-json-1.1" {
		return nil, &Error{http.StatusNotFound, "UnknownOperationException", ""}
	}
	op, ok := strings.CutPrefix(r.Header.Get("X-Amz-Target"), "TrentService.")
	if !ok {
		return nil, &Error{http.StatusBadRequest, "UnknownOperationException", ""}
	}
	accessKey, who, err := s.authenticate(r, body)
	if err != nil {
		return nil, err
	}
	var in input
	if err := json.Unmarshal(body, &in); err != nil {
		return nil, &Error{http.StatusBadRequest, "SerializationException", ""}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	seen := Request{Operation: op, Context: in.EncryptionContext, AccessKey: accessKey}
	s.requests = append(s.requests, seen)
	if who.denied[op] {
		return nil, &Error{http.StatusBadRequest, "AccessDeniedException",
			fmt.Sprintf("User: arn:aws:sts::%s:assumed-role/custodian/test is not authorized to perform: kms:%s on this resource because no identity-based policy allows the kms:%s action", account, op, op)}
	}
	switch op {
	case "Encrypt":
		return s.encrypt(in)
	case "Decrypt":
		return s.decrypt(in)
	case "ReEncrypt":
		return s.reencrypt(in)
	}
	return nil, &Error{http.StatusBadRequest, "UnknownOperationException", ""}
}

// An Error is one in AWS's form.
type Error struct {
	Status  int
	Code    string
	Message string
}

func (e *Error) Error() string { return e.Code + ": " + e.Message }

// Fail answers with an error in AWS's form.
func Fail(status int, code, message string) Handler {
	return func(w http.ResponseWriter, _ *http.Request, _ http.HandlerFunc) {
		w.Header().Set("Content-Type", "application/x-amz-json-1.1")
		w.WriteHeader(status)
		json.NewEncoder(w).Encode(map[string]string{"__type": code, "message": message})
	}
}
