package gcpkms

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"io"
	"log"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/keycustody/custodian/testservers"
)

// tokenLife is how long an access token lives, as Google's do.
const tokenLife = time.Hour

const email = "custodian@test-project.iam.gserviceaccount.com"

// An oauth is the token endpoint of one service account (RFC 7523).
type oauth struct {
	url string
	key *rsa.PrivateKey

	// mu guards the fields below.
	mu      sync.Mutex
	tokens  map[string]time.Time // until when
	refuses bool
	asked   int
}

func startOAuth(t testservers.TB, cert tls.Certificate) *oauth {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatalf("make the key of a service account: %v", err)
	}
	o := &oauth{key: key, tokens: map[string]time.Time{}}
	server := httptest.NewUnstartedServer(o)
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.TLS = &tls.Config{Certificates: []tls.Certificate{cert}}
	server.StartTLS()
	t.Cleanup(func() {
		server.CloseClientConnections()
		server.Close()
	})
	o.url = server.URL + "/token"
	return o
}

// serviceAccount writes the account's key file.
func (o *oauth) serviceAccount(t testservers.TB) string {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(o.key)
	if err != nil {
		t.Fatalf("write the key of a service account: %v", err)
	}
	text, err := json.Marshal(map[string]string{
		"type": "service_account", "project_id": "test-project", "private_key_id": "1",
		"private_key":  string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})),
		"client_email": email, "client_id": "1", "token_uri": o.url,
	})
	if err != nil {
		t.Fatalf("write the key of a service account: %v", err)
	}
	file := filepath.Join(t.TempDir(), "service-account.json")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatalf("write the key of a service account: %v", err)
	}
	return file
}

func (o *oauth) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.asked++
	w.Header().Set("Content-Type", "application/json")
	if o.refuses || r.FormValue("grant_type") != "urn:ietf:params:oauth:grant-type:jwt-bearer" || !o.signed(r.FormValue("assertion")) {
		w.WriteHeader(http.StatusBadRequest)
		io.WriteString(w, `{"error":"invalid_grant","error_description":"Invalid JWT Signature."}`)
		return
	}
	token := "ya29." + rand.Text()
	o.tokens[token] = time.Now().Add(tokenLife)
	json.NewEncoder(w).Encode(map[string]any{"access_token": token, "token_type": "Bearer", "expires_in": int(tokenLife.Seconds())})
}

// signed reports whether a JWT is the account's, for this endpoint, and asks
// for the scope of Cloud KMS.
func (o *oauth) signed(jwt string) bool {
	parts := strings.Split(jwt, ".")
	if len(parts) != 3 {
		return false
	}
	signature, err := base64.RawURLEncoding.DecodeString(parts[2])
	if err != nil {
		return false
	}
	sum := sha256.Sum256([]byte(parts[0] + "." + parts[1]))
	if rsa.VerifyPKCS1v15(&o.key.PublicKey, crypto.SHA256, sum[:], signature) != nil {
		return false
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return false
	}
	var claims struct {
		Iss, Aud, Scope string
		Exp             int64
	}
	if json.Unmarshal(payload, &claims) != nil {
		return false
	}
	return claims.Iss == email && claims.Aud == o.url && claims.Scope == "https://www.googleapis.com/auth/cloudkms" && claims.Exp > time.Now().Unix()
}

func (o *oauth) good(token string) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return time.Now().Before(o.tokens[token])
}

func (o *oauth) revoke() {
	o.mu.Lock()
	defer o.mu.Unlock()
	clear(o.tokens)
}

func (o *oauth) refuse(refuses bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.refuses = refuses
}

func (o *oauth) count() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.asked
}

func (o *oauth) given() []string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return slices.Collect(maps.Keys(o.tokens))
}
