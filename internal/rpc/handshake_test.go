package rpc_test

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/certs"
	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/rpc"
)

// TestRefusedHandshakes: a flood of connections that are refused does not flood
// the log, at no listener; the metric has each of them by its reason.
func TestRefusedHandshakes(t *testing.T) {
	log := &syncBuffer{}
	k := newKit(t, options{config: func(c *rpc.Config) { c.Log = slog.New(slog.NewJSONHandler(log, nil)) }})
	addrs, served := k.listeners(t)
	listeners := map[string]string{"gRPC": "grpc", "twin": "http", "packagers": "packagers"}

	config := func(who string) *tls.Config {
		return k.browser(t, who, nil).Transport.(*http.Transport).TLSClientConfig
	}
	revoked, nobody, foreign := config(stranger), config(auditor), config(auditor)
	k.revoke(t, stranger)
	nobody.Certificates = nil
	otherCA, err := certs.OpenAuthority(t.TempDir(), trustDomain)
	if err != nil {
		t.Fatal(err)
	}
	pair, err := otherCA.IssueClient(provider, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := tls.LoadX509KeyPair(pair.CertFile, pair.KeyFile)
	if err != nil {
		t.Fatal(err)
	}
	foreign.Certificates = nil
	foreign.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &theirs, nil }

	const n = 20
	want := map[string]int{"revoked": n, "not_vouched": n, "tls": 2 * n, "broken": n}
	for _, addr := range addrs {
		for range n {
			for _, config := range []*tls.Config{revoked, foreign, nobody} {
				shakeInVain(t, addr, config)
			}
			for _, said := range []string{"GET / HTTP/1.1\r\n\r\n", ""} {
				conn, err := net.Dial("tcp", addr)
				if err != nil {
					t.Fatal(err)
				}
				io.WriteString(conn, said)
				conn.(*net.TCPConn).CloseWrite()
				io.Copy(io.Discard, conn)
				conn.Close()
			}
		}
	}
	served("connections are refused")
	for _, listener := range listeners {
		for reason, n := range want {
			got := func() int { return int(k.counter(t, "custodian_handshakes_refused_total", listener, reason)) }
			for end := time.Now().Add(10 * time.Second); got() != n; time.Sleep(5 * time.Millisecond) {
				if time.Now().After(end) {
					t.Fatalf("%s, %s: counted %d, want %d", listener, reason, got(), n)
				}
			}
		}
	}
	if err := k.stop(); err != nil { // which writes what is counted
		t.Error(err)
	}
	lines, told := 0, map[string]int{}
	for text := range strings.Lines(log.String()) {
		var line struct {
			Msg, Listener, Reason, Remote, Err string
			Count                              int
		}
		if err := json.Unmarshal([]byte(text), &line); err != nil {
			t.Fatal(err)
		}
		if line.Msg != "connection refused" {
			continue
		}
		if line.Remote == "" || line.Err == "" {
			t.Errorf("a line without whence and why: %s", text)
		}
		lines++
		told[line.Listener+" "+line.Reason] += max(1, line.Count)
	}
	if lines > 3*3*len(addrs) { // of three reasons: the first, and one a period
		t.Errorf("%d lines for %d refused connections", lines, 4*n*len(addrs))
	}
	for _, listener := range listeners {
		for reason, n := range want {
			if reason == "broken" { // nobody refused those
				n = 0
			}
			if got := told[listener+" "+reason]; got != n {
				t.Errorf("%s, %s: the log tells of %d, want %d", listener, reason, got, n)
			}
		}
	}
}

// shakeInVain makes a connection that has to be refused.
func shakeInVain(t *testing.T, addr string, config *tls.Config) {
	t.Helper()
	conn, err := tls.Dial("tcp", addr, config)
	if err == nil { // in TLS 1.3 the client hears of it afterwards
		conn.SetReadDeadline(time.Now().Add(5 * time.Second))
		_, err = conn.Read(make([]byte, 1))
		conn.Close()
	}
	if op, ok := errors.AsType[*net.OpError](err); !ok || op.Op != "remote error" {
		t.Fatalf("%s: got %v, want an alert of TLS", addr, err)
	}
}

// TestRefusedCallsInTheLog: what ends every call alike, and what anybody can
// bring about, has one line a period; a fault of the program has one each.
func TestRefusedCallsInTheLog(t *testing.T) {
	k := newKit(t, options{})
	admin, callback := k.dial(t, operator), k.dial(t, provider)
	const n = 30
	for _, why := range []error{fmt.Errorf("open the token: %w", custodian.ErrHSMUnavailable), errors.New("a bug")} {
		k.server.SetCustody(&troubled{Custody: k.core, categories: why})
		for range n {
			if _, err := admin.ListCategories(t.Context()); err == nil {
				t.Fatal("got an answer")
			}
		}
	}
	c, err := k.config(provider)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := callback.Ready(t.Context()); err != nil { // it is connected
		t.Fatal(err)
	}
	if err := k.ca.RevokeFile(c.CertFile); err != nil {
		t.Fatal(err)
	}
	if err := k.certs.Reload(); err != nil {
		t.Fatal(err)
	}
	for range n {
		_, err := callback.GetContentKeys(t.Context(), &v1.GetContentKeysRequest{})
		wantRefused(t, err, "IDENTITY")
	}
	if err := k.stop(); err != nil {
		t.Error(err)
	}
	for text, most := range map[string]int{"open the token": 4, "IDENTITY": 4, "a bug": n} { // two, and two more if a period has ended meanwhile
		lines, told := 0, 0
		for l := range strings.Lines(k.log.String()) {
			if !strings.Contains(l, text) {
				continue
			}
			lines++
			count := 1
			if _, after, ok := strings.Cut(l, " count="); ok {
				fmt.Sscan(after, &count)
			}
			told += count
		}
		if lines > most || told != n {
			t.Errorf("%q: %d lines tell of %d calls; want %d calls, in at most %d lines", text, lines, told, n, most)
		}
	}
}

// TestRepeats: the first line of a kind is written at once, what follows within a
// period is one line with a count, and after a quiet period it begins anew.
func TestRepeats(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log syncBuffer
		say, run := rpc.RepeatsForTest(slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			if a.Key == slog.TimeKey || a.Key == slog.LevelKey {
				return slog.Attr{}
			}
			return a
		}})))
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() { run(ctx); close(ended) }()
		time.Sleep(time.Second) // so that what follows is between two periods' ends
		read := 0
		wrote := func(when, want string) {
			t.Helper()
			synctest.Wait()
			if got := log.String()[read:]; got != want {
				t.Errorf("%s: got %q, want %q", when, got, want)
			}
			read = len(log.String())
		}
		for i := range 1000 {
			say("a", fmt.Sprint(i))
		}
		say("b", "other")
		wrote("at once", "msg=0\nmsg=other\n")
		time.Sleep(10 * time.Second)
		wrote("at the end of the period", "msg=999 count=999\n")
		say("a", "more")
		say("b", "other")
		wrote("in the next period: b was quiet, a was not", "msg=other\n")
		time.Sleep(10 * time.Second)
		wrote("at its end", "msg=more count=1\n")
		time.Sleep(10 * time.Second)
		say("a", "again")
		wrote("after a quiet period", "msg=again\n")
		say("a", "last")
		stop()
		<-ended
		wrote("at the end", "msg=last count=1\n")
		for i := range 1000 {
			say(fmt.Sprint(i), "kind")
		}
		if got := strings.Count(log.String()[read:], "\n"); got > 257 {
			t.Errorf("1,000 kinds: %d lines", got)
		}
	})
}

// A stuckLog is a log whose disk is stuck: each line waits until it may go on.
type stuckLog struct{ at, goOn chan struct{} }

func (l stuckLog) Write(p []byte) (int, error) {
	l.at <- struct{}{}
	<-l.goOn
	return len(p), nil
}

// TestRepeatsOfStuckLog: while the log blocks, at the first line of a kind or at
// the end of a period, what is said again does not wait for it.
func TestRepeatsOfStuckLog(t *testing.T) {
	stuck := stuckLog{make(chan struct{}), make(chan struct{})}
	say, run := rpc.RepeatsForTest(slog.New(slog.NewTextHandler(stuck, nil)))
	again := func(when string) {
		t.Helper()
		said := make(chan struct{})
		go func() { say("a", "again"); close(said) }()
		select {
		case <-said:
		case <-time.After(3 * time.Second):
			t.Fatalf("%s: a line that is only counted waits for the log", when)
		}
	}
	go say("a", "first")
	<-stuck.at
	again("at the first line")
	stuck.goOn <- struct{}{}

	ctx, stop := context.WithCancel(t.Context())
	stop() // which ends the period
	ended := make(chan struct{})
	go func() { run(ctx); close(ended) }()
	<-stuck.at
	again("at the end of a period")
	stuck.goOn <- struct{}{}
	<-ended
}
