package main

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"cloud.google.com/go/kms/apiv1/kmspb"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/testservers/awskms"
	"github.com/keycustody/custodian/testservers/gcpkms"
)

// A cloudKMS is a KMS that a daemon is configured for, and its bad days.
type cloudKMS struct {
	config  string // of the provider, in YAML
	disable func()
	enable  func()
	renew   func() // the credentials end, and there are others
	away    func() // until back
	back    func()
	lockOut func() // logins are refused, until letIn
	letIn   func()
}

func startAWS(t *testing.T) cloudKMS {
	s := awskms.Start(t)
	key := s.CreateKey("custodian")
	return cloudKMS{
		config: "name: outer\n    kind: aws\n    aws: {key: '" + key + "', endpoint: '" + s.Address + "', ca_file: " + s.CAFile +
			", credentials_file: " + s.CredentialsFile + "}",
		disable: func() { s.SetState(key, awskms.Disabled) },
		enable:  func() { s.SetState(key, awskms.Enabled) },
		renew:   func() { s.Expire(); s.NewCredentials() },
		away:    func() { s.Break(awskms.Fail(503, "ServiceUnavailable", "")) },
		back:    func() { s.Break(nil) },
		lockOut: s.Expire,
		letIn:   func() { s.NewCredentials() },
	}
}

func startGCP(t *testing.T) cloudKMS {
	s := gcpkms.Start(t)
	key := s.CreateKey("custodian")
	return cloudKMS{
		config: "name: outer\n    kind: gcp\n    gcp: {key: '" + key + "', endpoint: '" + s.Address + "', ca_file: " + s.CAFile +
			", credentials_file: " + s.CredentialsFile + "}",
		disable: func() { s.SetState(key, 1, kmspb.CryptoKeyVersion_DISABLED) },
		enable:  func() { s.SetState(key, 1, kmspb.CryptoKeyVersion_ENABLED) },
		renew:   s.Revoke,
		away:    func() { s.Refuse(true) },
		back:    func() { s.Refuse(false) },
		lockOut: func() { s.Revoke(); s.RefuseLogins(true) },
		letIn:   func() { s.RefuseLogins(false) },
	}
}

// TestCloudKMS: with the outer layer in AWS KMS or Cloud KMS, the daemon issues
// and releases; a KMS that is away or whose key is disabled is never "unknown
// key"; when it is back, so is service, without a restart.
func TestCloudKMS(t *testing.T) {
	t.Parallel() // it waits, and takes little of the CPUs
	for _, test := range []struct {
		name  string
		start func(t *testing.T) cloudKMS
	}{{"aws", startAWS}, {"gcp", startGCP}} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			kms := test.start(t)
			c := provision(t)
			c.withKMS(kms.config, "0s")
			c.mustRun("init", "-config", c.dev.configFile())
			c.mustStart()
			s := serve(c)
			if got := s.get(); got != "" {
				t.Fatalf("callback: %s", got)
			}
			for _, day := range []struct {
				name       string
				harm, mend func()
				want       string
			}{
				{"away", kms.away, kms.back, "KMS_UNAVAILABLE"},
				{"key disabled", kms.disable, kms.enable, "KMS_UNAVAILABLE"},
				{"credentials ended", kms.renew, func() {}, ""},
				{"login refused", kms.lockOut, kms.letIn, "KMS_UNAVAILABLE"},
			} {
				day.harm()
				time.Sleep(1100 * time.Millisecond) // the KEK's lifetime
				if got := s.get(); got != day.want {
					t.Errorf("callback on the day %q: got %q, want %q", day.name, got, day.want)
				}
				c.wantMetric(fmt.Sprintf(`custodian_kms_login_refused{provider="outer"} %d`, map[bool]int{true: 1}[day.name == "login refused"]))
				day.mend()
				s.wantRecovery("KMS_UNAVAILABLE", "DEADLINE")
			}

			// A start that a refused login keeps waiting says so, and goes on by itself.
			c.kill()
			kms.lockOut()
			lines := c.launch()
			c.awaitLog(lines, "not serving yet")
			c.listenFromLog()
			early, err := c.dial(custodian.RoleOperator).Status(t.Context())
			if err != nil || !slices.ContainsFunc(early.GetWarnings(), func(w string) bool { return strings.Contains(w, "outer refuses our login since") }) {
				t.Errorf("status while it starts: got %v, %q, want the refused login", err, early.GetWarnings())
			}
			// The incident is told once: now, or on the day above if a tick of its
			// clock fell into it. Then it is open still, for it is closed after a minute.
			await(t, "the incident of a refused login", func() bool { return strings.Contains(c.logText(), `msg="a KMS refuses our login"`) })
			kms.letIn()
			if err := c.awaitServing(lines); err != nil {
				t.Fatal(err)
			}
			s.provider = c.dial(custodian.RoleProvider)
			s.wantRecovery("KMS_UNAVAILABLE", "DEADLINE")
		})
	}
}
