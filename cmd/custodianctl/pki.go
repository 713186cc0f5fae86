package main

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/keycustody/custodian/certs"
)

func (a *app) pkiCmd() *cobra.Command {
	return group(&cobra.Command{Use: "pki", Short: "Look at certificates, make some for development, and keys to seal content keys to"}, a.pkiShowCmd(), a.pkiDevInitCmd(), a.pkiDevIssueCmd(), a.pkiRecipientKeyCmd())
}

// A certView is a certificate in JSON.
type certView struct {
	File       string     `json:"file"`
	Subject    string     `json:"subject"`
	Issuer     string     `json:"issuer"`
	Serial     string     `json:"serial"`
	NotBefore  time.Time  `json:"not_before"`
	NotAfter   time.Time  `json:"not_after"`
	CA         bool       `json:"ca"`
	Usages     []string   `json:"usages"`
	Identities []nameView `json:"identities"`
	Verdict    string     `json:"verdict"`
	SPKISHA256 hexBytes   `json:"spki_sha256"`
	SHA256     hexBytes   `json:"sha256"`
}

// A nameView is a name that could be the caller's identity.
type nameView struct {
	Kind string `json:"kind"` // uri or dns
	Name string `json:"name"`
}

func (a *app) pkiShowCmd() *cobra.Command {
	return leaf(&cobra.Command{
		Use:   "show CERT.pem",
		Short: "Show who a certificate stands for, its public key's pin, and when it ends",
		Long: `Show who the first certificate of a file stands for, when it ends, and the SHA-256
of its public key: the spki of an officer in the daemon's config.`,
		ValidArgsFunction: cobra.FixedCompletions(nil, cobra.ShellCompDirectiveDefault),
	}, cobra.ExactArgs(1), func(_ context.Context, args []string) error {
		cert, err := readCert(args[0])
		if err != nil {
			return err
		}
		v := viewCert(args[0], cert)
		if a.json {
			return a.printJSON(v)
		}
		var fields [][2]string
		for _, n := range v.Identities {
			fields = append(fields, [2]string{"name", fmt.Sprintf("%s (%s)", plain(n.Name), n.Kind)})
		}
		return a.printFields(append(fields, [][2]string{
			{"identity", v.Verdict},
			{"spki sha256", v.SPKISHA256.String()},
			{"valid", fmt.Sprintf("%s to %s: %s", stamp(v.NotBefore), stamp(v.NotAfter), validity(cert, a.now()))},
			{"usage", names(v.Usages)},
			{"subject", orDash(v.Subject)},
			{"issuer", orDash(v.Issuer)},
			{"serial", v.Serial},
			{"sha256", v.SHA256.String()},
		}...))
	})
}

// readCert reads the first certificate of a PEM file.
func readCert(path string) (*x509.Certificate, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("certificate: %w", err)
	}
	block, _ := pem.Decode(raw)
	if block == nil {
		return nil, invalid(fmt.Errorf("certificate %s: no PEM in it", path))
	}
	if block.Type != "CERTIFICATE" {
		return nil, invalid(fmt.Errorf("certificate %s: it holds a PEM block %s", path, plain(block.Type)))
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, invalid(fmt.Errorf("certificate %s: %w", path, err))
	}
	return cert, nil
}

func viewCert(path string, c *x509.Certificate) certView {
	spki, whole := sha256.Sum256(c.RawSubjectPublicKeyInfo), sha256.Sum256(c.Raw)
	v := certView{
		File: path, Subject: c.Subject.String(), Issuer: c.Issuer.String(), Serial: c.SerialNumber.Text(16), NotBefore: c.NotBefore.UTC(), NotAfter: c.NotAfter.UTC(),
		CA: c.IsCA, Usages: usages(c), Identities: []nameView{}, SPKISHA256: spki[:], SHA256: whole[:],
	}
	for _, u := range c.URIs {
		v.Identities = append(v.Identities, nameView{"uri", u.String()})
	}
	for _, d := range c.DNSNames {
		v.Identities = append(v.Identities, nameView{"dns", d})
	}
	v.Verdict = verdict(c)
	return v
}

// verdict says what the daemon makes of the names. The last word is the
// daemon's: its config says what a CA may vouch for.
func verdict(c *x509.Certificate) string {
	switch {
	case c.IsCA:
		return "none: it is a CA's certificate"
	case len(c.URIs) > 1:
		return "refused: more than one URI"
	case len(c.URIs) == 1:
		id, err := certs.ParseSPIFFEID(c.URIs[0].String())
		if err != nil {
			return "refused: " + err.Error()
		}
		if len(c.DNSNames) > 0 {
			return id.String() + ", unless the daemon's config lists one of the DNS names too"
		}
		return id.String()
	case len(c.DNSNames) > 1:
		return "one of the DNS names, where the daemon's config lists exactly one of them"
	case len(c.DNSNames) == 1:
		return plain(c.DNSNames[0]) + ", where the daemon's config lists this DNS name"
	}
	return "refused: no URI and no DNS name; the common name never counts"
}

func usages(c *x509.Certificate) []string {
	var out []string
	for _, u := range c.ExtKeyUsage {
		switch u {
		case x509.ExtKeyUsageClientAuth:
			out = append(out, "clientAuth")
		case x509.ExtKeyUsageServerAuth:
			out = append(out, "serverAuth")
		default:
			out = append(out, fmt.Sprintf("usage %d", u))
		}
	}
	return out
}

func validity(c *x509.Certificate, now time.Time) string {
	switch left := c.NotAfter.Sub(now); {
	case now.Before(c.NotBefore):
		return "NOT YET VALID"
	case left < 0:
		return "EXPIRED"
	case left < 48*time.Hour:
		return number(int64(left.Hours()), "hour", "hours") + " left"
	default:
		return number(int64(left.Hours()/24), "day", "days") + " left"
	}
}

func (a *app) pkiDevInitCmd() *cobra.Command {
	var dir, domain string
	c := leaf(&cobra.Command{
		Use:   "dev-init",
		Short: "Make a certification authority for development, not for production",
	}, cobra.NoArgs, func(context.Context, []string) error {
		authority, err := certs.OpenAuthority(dir, domain)
		if err != nil {
			return err
		}
		if a.json {
			return a.printJSON(struct {
				CAFile  string `json:"ca_file"`
				CRLFile string `json:"crl_file"`
			}{authority.CertFile(), authority.CRLFile()})
		}
		return a.printf("%s is a CA for development, not for production: its key lies beside it\n", authority.CertFile())
	})
	c.Flags().StringVar(&dir, "dir", "", "`DIR`ectory for it")
	c.Flags().StringVar(&domain, "trust-domain", "", "SPIFFE trust `DOMAIN` of the callers that it names")
	return need(c, "dir", "trust-domain")
}

func (a *app) pkiDevIssueCmd() *cobra.Command {
	var dir, caller string
	var servers []string
	var lifetime time.Duration
	c := leaf(&cobra.Command{
		Use:   "dev-issue",
		Short: "Issue a certificate for development",
		Long: `Issue a certificate of the CA that custodianctl pki dev-init made: for a caller, or
for the daemon. A pair of files that is there and good is kept.`,
		Example: `  custodianctl pki dev-issue --dir pki --client packager/alpha
  custodianctl pki dev-issue --dir pki --server localhost,127.0.0.1`,
	}, cobra.NoArgs, func(context.Context, []string) error {
		if (caller == "") == (len(servers) == 0) {
			return invalid(errors.New("--client or --server: give one of them"))
		}
		if lifetime < time.Minute {
			return invalid(fmt.Errorf("--lifetime %s: must be a minute or more", lifetime))
		}
		pair, err := devIssue(dir, caller, servers, lifetime)
		if err != nil {
			return err
		}
		if a.json {
			return a.printJSON(struct {
				CertFile string `json:"cert_file"`
				KeyFile  string `json:"key_file"`
			}{pair.CertFile, pair.KeyFile})
		}
		return a.printf("%s\n%s\n", pair.CertFile, pair.KeyFile)
	})
	f := c.Flags()
	f.StringVar(&dir, "dir", "", "`DIR`ectory of the CA")
	f.StringVar(&caller, "client", "", "`PATH` of a caller in the trust domain: packager/alpha")
	f.StringSliceVar(&servers, "server", nil, "DNS names and IP `ADDRESS`es of a daemon, with commas")
	f.DurationVar(&lifetime, "lifetime", 90*24*time.Hour, "how long it is good")
	return need(c, "dir")
}

// devIssue reads the trust domain from the CA, so that nobody need say it twice.
func devIssue(dir, caller string, servers []string, lifetime time.Duration) (certs.Pair, error) {
	ca, err := readCert(filepath.Join(dir, "ca.pem"))
	if err != nil {
		return certs.Pair{}, err
	}
	if len(ca.URIs) != 1 {
		return certs.Pair{}, invalid(fmt.Errorf("%s: custodianctl pki dev-init did not make this CA", filepath.Join(dir, "ca.pem")))
	}
	authority, err := certs.OpenAuthority(dir, ca.URIs[0].Host)
	if err != nil {
		return certs.Pair{}, err
	}
	if caller != "" {
		return authority.IssueClient(strings.TrimPrefix(caller, "/"), lifetime)
	}
	var hosts []string
	var ips []net.IP
	for _, s := range servers {
		if ip := net.ParseIP(s); ip != nil {
			ips = append(ips, ip)
		} else {
			hosts = append(hosts, s)
		}
	}
	return authority.IssueServer(hosts, ips, lifetime)
}
