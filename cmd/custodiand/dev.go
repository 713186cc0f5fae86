package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"

	"go.yaml.in/yaml/v3"

	"github.com/keycustody/custodian/certs"
	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/kms"
	"github.com/keycustody/custodian/softhsm"
)

const devTrustDomain = "dev.custodian.internal"

// names collects the values of a flag that may be given several times.
type names []string

func (n *names) String() string     { return strings.Join(*n, ",") }
func (n *names) Set(s string) error { *n = append(*n, s); return nil }

func devCommand(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	fs, _ := flags("custodiand dev", stderr)
	dir := fs.String("dir", "custodian-dev", "folder of the token, the certificates and the store; made where it is not")
	listen := fs.String("listen", "127.0.0.1:7443", "address of the gRPC listener")
	admin := fs.String("admin", "127.0.0.1:7480", "address of the health and metrics listener")
	packagers := fs.String("packagers", "127.0.0.1:7444", "address of the HTTPS listener of packagers; empty for none")
	var categories names
	fs.Var(&categories, "category", "category to create; may be given several times")
	if err := parse(fs, args); err != nil {
		return err
	}
	for _, cat := range categories {
		if err := custodian.CategoryName(cat).Check(); err != nil {
			return usageError{err}
		}
	}
	abs, err := filepath.Abs(*dir)
	if err != nil {
		return err
	}
	dev := devDir{dir: abs, listen: *listen, admin: *admin, packagers: *packagers}
	c, err := dev.provision(ctx)
	if err != nil {
		return fmt.Errorf("dev: %w", err)
	}
	log := c.logger(stderr)
	if have, err := exists(c.storePath()); err != nil {
		return err
	} else if !have {
		if err := initCustody(ctx, c, log); err != nil {
			return fmt.Errorf("dev: init: %w", err)
		}
	}
	d := &daemon{config: c, path: dev.configFile(), log: log}
	d.onReady = func(listen, admin net.Addr) {
		if err := dev.welcome(ctx, d, categories, listen, admin, stdout); err != nil {
			log.Error("dev", "err", err)
		}
	}
	return d.run(ctx)
}

// A devDir is the folder of a development custody.
type devDir struct{ dir, listen, admin, packagers string }

func (v devDir) configFile() string { return filepath.Join(v.dir, "custodiand.yaml") }

// provision makes whatever is missing: a SoftHSM token, a development PKI
// with one client certificate a role, and the configuration.
func (v devDir) provision(ctx context.Context) (*Config, error) {
	if err := os.MkdirAll(v.dir, 0o700); err != nil {
		return nil, err
	}
	token, err := softhsm.Provision(ctx, softhsm.Options{Dir: filepath.Join(v.dir, "token"), Label: "custodian-dev"})
	if err != nil {
		return nil, err
	}
	ca, err := certs.OpenAuthority(filepath.Join(v.dir, "pki"), devTrustDomain)
	if err != nil {
		return nil, err
	}
	if err := ca.WriteCRL(time.Now().Add(30 * 24 * time.Hour)); err != nil {
		return nil, err
	}
	server, err := ca.IssueServer([]string{"localhost"}, []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback}, 90*24*time.Hour)
	if err != nil {
		return nil, err
	}
	c := Config{Mode: modeDevelopment, Listen: v.listen, AdminListen: v.admin, DataDir: filepath.Join(v.dir, "data"),
		HSM: HSMConfig{Module: token.Module, Token: token.Label, PINFile: token.PINFile, SoftHSMConf: token.ConfigFile},
		KMS: KMSConfig{Default: []string{"local"}, Providers: []kms.Config{{Name: "local", Kind: "local"}}},
		TLS: TLSConfig{CertFile: server.CertFile, KeyFile: server.KeyFile,
			ClientCAs: []CAConfig{{Name: "dev", File: ca.CertFile(), CRLFile: ca.CRLFile(), TrustDomain: devTrustDomain}}}}
	c.Packagers.Listen = v.packagers
	for _, role := range custodian.Roles {
		pair, err := ca.IssueClient("/"+string(role), 90*24*time.Hour)
		if err != nil {
			return nil, err
		}
		c.TLS.ClientCAs[0].Roles = append(c.TLS.ClientCAs[0].Roles, string(role))
		g := GrantConfig{Identity: "spiffe://" + devTrustDomain + "/" + string(role), Role: string(role), Categories: []string{"*"}}
		if role == custodian.RoleOfficer {
			if g.SPKI, err = spkiOf(pair.CertFile); err != nil {
				return nil, err
			}
		}
		c.Grants = append(c.Grants, g)
	}
	raw, err := yaml.Marshal(c)
	if err != nil {
		return nil, err
	}
	header := "# Made by custodiand dev. Not for production: keys, PIN and certificates lie in one folder.\n"
	if err := os.WriteFile(v.configFile(), append([]byte(header), raw...), 0o600); err != nil {
		return nil, err
	}
	return LoadConfig(v.configFile())
}

func spkiOf(certFile string) (string, error) {
	raw, err := os.ReadFile(certFile)
	if err != nil {
		return "", err
	}
	block, _ := pem.Decode(raw)
	if block == nil {
		return "", fmt.Errorf("%s: no certificate in PEM", certFile)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return "", fmt.Errorf("%s: %w", certFile, err)
	}
	sum := sha256.Sum256(cert.RawSubjectPublicKeyInfo)
	return hex.EncodeToString(sum[:]), nil
}

// welcome writes a client configuration for each role, creates the wanted
// categories, and says what to type next.
func (v devDir) welcome(ctx context.Context, d *daemon, categories []string, listen, admin net.Addr, out io.Writer) error {
	for _, role := range custodian.Roles {
		raw, err := yaml.Marshal(map[string]string{"address": listen.String(), "server_name": "localhost",
			"ca_file":   filepath.Join(v.dir, "pki", filepath.Base(d.config.TLS.ClientCAs[0].File)),
			"cert_file": filepath.Join(v.dir, "pki", string(role)+".pem"), "key_file": filepath.Join(v.dir, "pki", string(role)+".key")})
		if err != nil {
			return err
		}
		if err := os.WriteFile(v.ctlFile(role), raw, 0o600); err != nil {
			return err
		}
	}
	officer := custodian.Caller{ID: "spiffe://" + devTrustDomain + "/officer", CA: "dev", Roles: []custodian.Role{custodian.RoleOfficer}}
	for _, g := range d.config.Grants {
		if g.Role == string(custodian.RoleOfficer) {
			hex.Decode(officer.SPKI[:], []byte(g.SPKI))
		}
	}
	for _, cat := range categories {
		_, err := d.custody.CreateCategory(ctx, officer, custodian.CreateCategoryRequest{Name: custodian.CategoryName(cat)})
		if err != nil && !errors.Is(err, custodian.ErrCategoryExists) {
			return err
		}
	}
	fmt.Fprintf(out, `
This is a development custody in %s.
It is NOT FOR PRODUCTION: token, PIN, certificates and store lie in one folder,
and the provider "local" has no outer layer.

Metrics and health: http://%s/metrics /livez /readyz
Paste these in another terminal:

  custodianctl --config %s category create movies
  custodianctl --config %s keys issue --category movies --content film-1 --track HD --scheme cenc
  custodianctl --config %s keys get KID --reveal
  custodianctl --config %s keys list --category movies
  custodianctl --config %s status
  custodianctl audit verify --dir %s

%scustodiand: ready on %s
`, v.dir, admin, v.ctlFile(custodian.RoleOfficer), v.ctlFile(custodian.RolePackager), v.ctlFile(custodian.RoleProvider),
		v.ctlFile(custodian.RoleAuditor), v.ctlFile(custodian.RoleOperator), d.config.auditDir(), doors(d.packagerAddr), listen)
	return nil
}

// doors says where packagers knock.
func doors(addr net.Addr) string {
	if addr == nil {
		return ""
	}
	_, port, _ := net.SplitHostPort(addr.String()) // a listener's own address
	return fmt.Sprintf("Packagers: https://localhost:%s/v1/categories/CATEGORY/widevine\n\n", port)
}

func (v devDir) ctlFile(r custodian.Role) string { return filepath.Join(v.dir, string(r)+".yaml") }
