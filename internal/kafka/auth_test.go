package kafka_test

import (
	"crypto/tls"
	"crypto/x509"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/sasl"
	"github.com/twmb/franz-go/pkg/sasl/scram"

	"github.com/keycustody/custodian/certs"
	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/kafka"
)

func write(t *testing.T, path, text string, mode os.FileMode) string {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	return path
}

// The broker is believed by its certificate, and we are by ours or by SCRAM; a
// wrong one takes no event.
func TestLogin(t *testing.T) {
	dir := t.TempDir()
	ca, err := certs.OpenAuthority(dir, "test")
	if err != nil {
		t.Fatal(err)
	}
	server, err := ca.IssueServer([]string{"localhost"}, []net.IP{net.IPv4(127, 0, 0, 1)}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	client, err := ca.IssueClient("/kafka", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.LoadX509KeyPair(server.CertFile, server.KeyFile)
	if err != nil {
		t.Fatal(err)
	}
	caFile := ca.CertFile()
	pem, err := os.ReadFile(caFile)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	elsewhere := t.TempDir()
	if _, err := certs.OpenAuthority(elsewhere, "test"); err != nil {
		t.Fatal(err)
	}
	good := write(t, filepath.Join(dir, "good"), "s3cret\n", 0o600)
	bad := write(t, filepath.Join(dir, "bad"), "another", 0o600)
	withCert := kafka.TLSConfig{CAFile: caFile, CertFile: client.CertFile, KeyFile: client.KeyFile}
	password := func(file string) kafka.SASLConfig {
		return kafka.SASLConfig{Mechanism: "SCRAM-SHA-512", User: "custodian", PasswordFile: file}
	}
	mutual := kfake.TLS(&tls.Config{Certificates: []tls.Certificate{pair}, ClientCAs: roots, ClientAuth: tls.RequireAndVerifyClientCert})
	plain := kfake.TLS(&tls.Config{Certificates: []tls.Certificate{pair}})
	login := []kfake.Opt{plain, kfake.EnableSASL(), kfake.Superuser("SCRAM-SHA-512", "custodian", "s3cret")}
	for _, test := range []struct {
		name   string
		broker []kfake.Opt
		tls    kafka.TLSConfig
		sasl   kafka.SASLConfig
		served bool
	}{
		{"client certificate", []kfake.Opt{mutual}, withCert, kafka.SASLConfig{}, true},
		{"no client certificate", []kfake.Opt{mutual}, kafka.TLSConfig{CAFile: caFile}, password(good), false},
		{"SCRAM", login, kafka.TLSConfig{CAFile: caFile}, password(good), true},
		{"wrong password", login, kafka.TLSConfig{CAFile: caFile}, password(bad), false},
		{"another broker", []kfake.Opt{plain}, kafka.TLSConfig{CAFile: filepath.Join(elsewhere, "ca.pem"), CertFile: client.CertFile, KeyFile: client.KeyFile}, kafka.SASLConfig{}, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			k := newKit(t, plenty)
			k.opts = append(k.opts, test.broker...)
			k.config.TLS, k.config.SASL = test.tls, test.sasl
			if faults := k.config.Check(false); len(faults) > 0 {
				t.Fatalf("in production: %v", faults)
			}
			k.brokerUp()
			k.start(k.custody)
			if !test.served {
				k.await("refused", func(s kafka.TopicStatus) bool { return !s.Away.IsZero() && s.LastError != "" })
				return
			}
			var as []sasl.Mechanism
			if test.sasl.User != "" {
				as = append(as, scram.Auth{User: test.sasl.User, Pass: "s3cret"}.AsSha512Mechanism())
			}
			cl := k.client(kgo.DialTLSConfig(&tls.Config{RootCAs: roots, GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
				pair, err := tls.LoadX509KeyPair(client.CertFile, client.KeyFile)
				return &pair, err
			}}), kgo.SASL(as...))
			if err := cl.ProduceSync(t.Context(), batch("b1")).FirstErr(); err != nil {
				t.Fatal(err)
			}
			k.await("the event", handled(1))
			if n := k.versions(); n != 2 {
				t.Errorf("%d versions, want 2", n)
			}
		})
	}
}

// Everything that is wrong is said at once, with its key.
func TestConfigFaults(t *testing.T) {
	dir := t.TempDir()
	open := write(t, filepath.Join(dir, "open"), "s3cret", 0o644)
	c := kafka.Config{Brokers: []string{"kafka"}, TLS: kafka.TLSConfig{Disable: true},
		SASL: kafka.SASLConfig{Mechanism: "PLAIN", PasswordFile: open},
		Topics: []kafka.TopicConfig{{}, {Name: "a", DeadLetter: "b", Format: "xml", Types: map[string]custodian.EventKind{"x": "compromise"}},
			{Name: "b", DeadLetter: "c"}, {Name: "b", DeadLetter: "c"}}}
	c.Default()
	var got []string
	for _, err := range c.Check(false) {
		got = append(got, err.Error())
	}
	all := strings.Join(got, "\n")
	for _, want := range []string{"brokers[0]: ", "tls.disable: ", "sasl.mechanism: ", "sasl.user: must be set", "sasl.password_file: " + open + ": mode 0644",
		"topics[0].name: ", "topics[0].dead_letter: ", "topics[1].format: ", `topics[1].types.x: "compromise": must be one of`, `topics[1].dead_letter: "b" is a topic`, `topics[3].name: "b" is there twice`} {
		if !strings.Contains(all, want) {
			t.Errorf("no fault with %q in\n%s", want, all)
		}
	}
	c = kafka.Config{Brokers: []string{"kafka:9092"}, Topics: []kafka.TopicConfig{{Name: "a", DeadLetter: "b"}}}
	c.Default()
	if faults := c.Check(false); len(faults) != 1 || !strings.Contains(faults[0].Error(), "does not know who we are") {
		t.Errorf("without a login, in production: %v", faults)
	}
	if faults := c.Check(true); len(faults) != 0 {
		t.Errorf("without a login, in development: %v", faults)
	}
	if faults := new(kafka.Config).Check(false); len(faults) != 0 {
		t.Errorf("no Kafka at all: %v", faults)
	}
}
