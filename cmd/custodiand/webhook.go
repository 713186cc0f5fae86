package main

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/anchor"
)

// signatureHeader carries "t=SECONDS,v1=HEX": the time of sending since 1970,
// and HMAC-SHA256 under the secret of that number, a point, and the body. Who
// gets a message checks both: an old time is a message that somebody repeats.
const signatureHeader = "Custodian-Signature"

// minSecretSize is how long the secret must be.
const minSecretSize = 16

// Of the tries to deliver one message: the pause after the first and the
// longest, and when it is given up. The pauses are drawn from zero up.
const (
	webhookPause    = time.Second
	maxWebhookPause = 5 * time.Minute
	webhookGiveUp   = 24 * time.Hour
	webhookTimeout  = 10 * time.Second
)

func (c WebhookConfig) check() []error {
	if c.URL == "" {
		if c != (WebhookConfig{}) {
			return []error{errors.New("kms.webhook.url: must be set beside the other settings of the webhook")}
		}
		return nil
	}
	var faults []error
	if err := checkWebhookURL(c.URL); err != nil {
		faults = append(faults, fmt.Errorf("kms.webhook.url: %w", err))
	}
	if c.SecretFile == "" {
		faults = append(faults, errors.New("kms.webhook.secret_file: must be set"))
	} else if _, err := readWebhookSecret(c.SecretFile); err != nil {
		faults = append(faults, fmt.Errorf("kms.webhook.secret_file: %w", err))
	}
	if _, err := anchor.Roots(c.CAFile); err != nil {
		faults = append(faults, fmt.Errorf("kms.webhook.ca_file: %w", err))
	}
	return faults
}

func checkWebhookURL(s string) error {
	u, err := url.Parse(s)
	if err != nil {
		return errors.New("must be a URL")
	}
	if u.Hostname() == "" || u.User != nil || u.Fragment != "" {
		return errors.New("must be https://HOST/PATH, without a user")
	}
	ip := net.ParseIP(u.Hostname())
	if u.Scheme == "https" || u.Scheme == "http" && ip != nil && ip.IsLoopback() {
		return nil
	}
	return fmt.Errorf("scheme %q: must be https, or http to a loopback address", u.Scheme)
}

func readWebhookSecret(path string) ([]byte, error) {
	raw, err := readPrivate(path)
	if err != nil {
		return nil, err
	}
	secret := bytes.TrimSpace(raw)
	if len(secret) < minSecretSize {
		return nil, fmt.Errorf("%s: %d bytes: must be %d at least", path, len(secret), minSecretSize)
	}
	return secret, nil
}

// A webhook tells somebody of incidents, one message after the other, each
// until it is taken: a closed incident is never told before it was declared.
type webhook struct {
	config WebhookConfig
	client *http.Client
	book   *incidentBook // has the messages
	alerts chan anchorMessage
	log    *slog.Logger
	pause  time.Duration // after the first try
}

// newWebhook is nil without a URL.
func newWebhook(c WebhookConfig, book *incidentBook, log *slog.Logger) (*webhook, error) {
	if c.URL == "" {
		return nil, nil
	}
	roots, err := anchor.Roots(c.CAFile)
	if err != nil {
		return nil, fmt.Errorf("kms.webhook.ca_file: %w", err)
	}
	return &webhook{config: c, book: book, alerts: make(chan anchorMessage, 64), log: log, pause: webhookPause, client: &http.Client{
		Timeout: webhookTimeout,
		// No proxy of the environment, and what answers with another place is
		// not the one that was configured.
		Transport:     &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}, DisableKeepAlives: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}, nil
}

// run delivers until ctx ends, what an earlier run has left first.
func (h *webhook) run(ctx context.Context) {
	for {
		for {
			event, id, body, ok := h.book.next()
			if !ok {
				break
			}
			if !h.deliver(ctx, event, id, body) {
				return
			}
			h.book.done()
		}
		select {
		case <-ctx.Done():
			return
		case <-h.book.poke:
		case m := <-h.alerts:
			if !h.deliver(ctx, m.Event, m.ID, m) {
				return
			}
		}
	}
}

// A message is the body of a webhook about a KMS or a caller's budget.
type message struct {
	Event string `json:"event"`
	custodian.Incident
}

// An anchorMessage is the body of a webhook about an anchor.
type anchorMessage struct {
	Event string `json:"event"` // audit.anchor.behind or audit.anchor.caught_up
	custodian.AnchorAlert
}

// tellAnchor queues the message about an anchor and does not wait.
func (h *webhook) tellAnchor(a custodian.AnchorAlert) {
	m := anchorMessage{"audit.anchor.behind", a}
	if !a.Closed.IsZero() {
		m.Event = "audit.anchor.caught_up"
	}
	select {
	case h.alerts <- m:
	default:
		h.log.Error("the webhook takes nothing; a message is not sent", "event", m.Event, "id", a.ID)
	}
}

// messageOf names the event: kms.incident.declared and .closed, or for a login
// kms.login.refused and .accepted, or what a caller did with its budgets.
func messageOf(i custodian.Incident) message {
	event := map[custodian.IncidentKind][2]string{
		custodian.IncidentOutage: {"kms.incident.declared", "kms.incident.closed"},
		custodian.IncidentLogin:  {"kms.login.refused", "kms.login.accepted"},
		// What is told of budgets is told once, and closed.
		custodian.IncidentBudgetSoft:   {1: "caller.budget.soft"},
		custodian.IncidentBudgetRate:   {1: "caller.budget.rate"},
		custodian.IncidentCallerFrozen: {1: "caller.frozen"},
	}[i.Kind]
	if i.Closed.IsZero() {
		return message{event[0], i}
	}
	return message{event[1], i}
}

// deliver sends one message until it is taken or given up, with full jitter
// between the tries. It reports false where ctx ended first.
func (h *webhook) deliver(ctx context.Context, event, id string, m any) bool {
	body, err := json.Marshal(m)
	if err != nil {
		h.log.Error("webhook", "event", event, "id", id, "err", err)
		return true
	}
	began := time.Now()
	for pause := h.pause; ; pause = min(2*pause, maxWebhookPause) {
		err := h.send(ctx, body)
		if err == nil {
			h.log.Info("the webhook was told", "event", event, "id", id)
			return true
		}
		if ctx.Err() != nil {
			return false
		}
		if time.Since(began) > webhookGiveUp {
			h.log.Error("the webhook is given up", "event", event, "id", id, "err", err)
			return true
		}
		h.log.Warn("the webhook did not take a message; it is sent again", "event", event, "id", id, "err", err)
		if !sleep(ctx, rand.N(pause)) {
			return false
		}
	}
}

func (h *webhook) send(ctx context.Context, body []byte) error {
	secret, err := readWebhookSecret(h.config.SecretFile)
	if err != nil {
		return fmt.Errorf("secret: %w", err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, h.config.URL, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("User-Agent", "custodiand/"+version)
	req.Header.Set(signatureHeader, sign(secret, time.Now(), body))
	res, err := h.client.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	io.Copy(io.Discard, io.LimitReader(res.Body, 1<<16))
	if res.StatusCode/100 != 2 {
		return fmt.Errorf("status %s", res.Status)
	}
	return nil
}

func sign(secret []byte, now time.Time, body []byte) string {
	t := strconv.FormatInt(now.Unix(), 10)
	mac := hmac.New(sha256.New, secret)
	mac.Write([]byte(t + "."))
	mac.Write(body)
	return "t=" + t + ",v1=" + hex.EncodeToString(mac.Sum(nil))
}
