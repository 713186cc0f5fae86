package main

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/keycustody/custodian/custodian"
)

// A receiver takes webhooks, after it has refused the first few.
type receiver struct {
	t      *testing.T
	secret string

	// mu guards the fields below.
	mu     sync.Mutex
	refuse int
	tries  int
	got    chan message
}

func (r *receiver) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	body, err := io.ReadAll(req.Body)
	if err != nil {
		r.t.Error(err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.tries++
	if err := r.verify(req.Header.Get("Custodian-Signature"), body); err != nil {
		r.t.Errorf("try %d: %v", r.tries, err)
	}
	if r.refuse > 0 {
		r.refuse--
		w.WriteHeader([]int{http.StatusInternalServerError, http.StatusFound, http.StatusNotFound}[r.refuse%3])
		return
	}
	var m message
	if err := json.Unmarshal(body, &m); err != nil {
		r.t.Error(err)
	}
	r.got <- m
}

// verify does what docs/OPERATIONS.md tells a receiver to do.
func (r *receiver) verify(header string, body []byte) error {
	stamp, signature, ok := strings.Cut(strings.TrimPrefix(header, "t="), ",v1=")
	seconds, err := strconv.ParseInt(stamp, 10, 64)
	if !ok || err != nil {
		return fmt.Errorf("signature %q is malformed", header)
	}
	if age := time.Since(time.Unix(seconds, 0)); age < -time.Minute || age > time.Minute {
		return fmt.Errorf("the signature is %s old", age)
	}
	mac := hmac.New(sha256.New, []byte(r.secret))
	fmt.Fprintf(mac, "%s.%s", stamp, body)
	if want := hex.EncodeToString(mac.Sum(nil)); signature != want {
		return fmt.Errorf("signature: got %s, want %s", signature, want)
	}
	return nil
}

// A message is sent again until it is taken, and in its order: an incident is
// never closed before it is declared.
func TestWebhook(t *testing.T) {
	secret := strings.Repeat("s3cret-", 4)
	r := &receiver{t: t, secret: secret, refuse: 4, got: make(chan message, 10)}
	server := httptest.NewServer(r)
	defer server.Close()
	file := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(file, []byte(secret+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	config := WebhookConfig{URL: server.URL, SecretFile: file}
	if faults := config.check(); len(faults) > 0 {
		t.Fatal(faults)
	}
	discard := slog.New(slog.DiscardHandler)
	path := filepath.Join(t.TempDir(), "incidents.json")
	book := openIncidentBook(path, true, discard)
	h, err := newWebhook(config, book, discard)
	if err != nil {
		t.Fatal(err)
	}
	h.pause = time.Millisecond
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { h.run(ctx) })
	defer running.Wait()
	defer cancel()

	declared := custodian.Incident{ID: "vault-1", Kind: custodian.IncidentOutage, Provider: "vault", Since: time.Unix(1, 0).UTC(), Declared: time.Unix(301, 0).UTC(), LastError: "sealed"}
	closed := declared
	closed.Back, closed.Closed = time.Unix(400, 0).UTC(), time.Unix(460, 0).UTC()
	book.tell(declared)
	book.tell(closed)
	for _, want := range []message{{"kms.incident.declared", declared}, {"kms.incident.closed", closed}} {
		select {
		case got := <-r.got:
			if got != want {
				t.Errorf("got %+v, want %+v", got, want)
			}
		case <-time.After(30 * time.Second):
			t.Fatalf("%s did not come", want.Event)
		}
	}
	h.tellAnchor(custodian.AnchorAlert{ID: "a1", Anchor: "studio", Since: time.Unix(1, 0).UTC(), Lag: 7})
	if got := <-r.got; got.Event != "audit.anchor.behind" || got.ID != "a1" {
		t.Errorf("got %+v, want the anchor's alert", got)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.tries != 7 {
		t.Errorf("got %d tries for 3 messages with 4 refusals, want 7", r.tries)
	}
}

// What the webhook has not taken when the daemon ends is sent by the next run,
// and an incident that was open then can be closed by it.
func TestWebhookAfterRestart(t *testing.T) {
	discard := slog.New(slog.DiscardHandler)
	path := filepath.Join(t.TempDir(), "incidents.json")
	first := custodian.Incident{ID: "vault-outage-1", Kind: custodian.IncidentOutage, Provider: "vault", Since: time.Unix(1, 0).UTC(), Declared: time.Unix(301, 0).UTC(), LastError: "sealed"}
	second := custodian.Incident{ID: "aws-login-2", Kind: custodian.IncidentLogin, Provider: "aws", Since: time.Unix(2, 0).UTC(), Declared: time.Unix(2, 0).UTC(), LastError: "expired"}
	over := first
	over.Back, over.Closed = time.Unix(400, 0).UTC(), time.Unix(460, 0).UTC()
	book := openIncidentBook(path, true, discard)
	book.tell(first)
	book.tell(second)
	book.tell(over)

	book = openIncidentBook(path, true, discard)
	if got := book.open(); !slices.Equal(got, []custodian.Incident{second}) {
		t.Errorf("open after a restart: got %+v, want the second", got)
	}
	r := &receiver{t: t, secret: "a secret of the webhook", got: make(chan message, 10)}
	server := httptest.NewServer(r)
	defer server.Close()
	file := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(file, []byte(r.secret), 0o600); err != nil {
		t.Fatal(err)
	}
	h, err := newWebhook(WebhookConfig{URL: server.URL, SecretFile: file}, book, discard)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { h.run(ctx) })
	for _, want := range []message{{"kms.incident.declared", first}, {"kms.login.refused", second}, {"kms.incident.closed", over}} {
		select {
		case got := <-r.got:
			if got != want {
				t.Errorf("got %+v, want %+v", got, want)
			}
		case <-time.After(30 * time.Second):
			t.Fatalf("%s did not come", want.Event)
		}
	}
	cancel()
	running.Wait()
	if event, _, _, ok := openIncidentBook(path, true, discard).next(); ok && event != "kms.incident.closed" { // which may be sent twice
		t.Errorf("after the delivery: %s waits", event)
	}

	if err := os.WriteFile(path, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := openIncidentBook(path, true, discard).open(); len(got) != 0 {
		t.Errorf("a book that cannot be read: got %+v, want none", got)
	}
	lost := openIncidentBook(filepath.Join(t.TempDir(), "gone", "incidents.json"), true, discard)
	lost.tell(first)
	if _, _, _, ok := lost.next(); !ok {
		t.Error("a message is lost because it cannot be kept")
	}
}

func TestWebhookURL(t *testing.T) {
	for url, good := range map[string]bool{
		"https://example.com/hook":      true,
		"http://127.0.0.1:9000/hook":    true,
		"http://[::1]/hook":             true,
		"http://example.com/hook":       false,
		"http://localhost/hook":         false, // a name can mean anything
		"ftp://127.0.0.1/":              false,
		"https://user:word@example.com": false,
		"https:///hook":                 false,
		"":                              false,
	} {
		if err := checkWebhookURL(url); (err == nil) != good {
			t.Errorf("%q: got %v, want it taken: %v", url, err, good)
		}
	}
}
