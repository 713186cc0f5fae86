package packager_test

import (
	"bytes"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/keycustody/custodian/internal/packager"
)

// TestRSAKnownAnswer: the captured request of Shaka Packager, signed by OpenSSL,
// which knows nothing of this code, is accepted; other paddings and digests of
// the same key are not. The vectors have a captured RSA signature too, but not
// the public key that belongs to it.
func TestRSAKnownAnswer(t *testing.T) {
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("openssl is not installed: there is nothing independent to sign with")
	}
	dir := t.TempDir()
	run := func(args ...string) []byte {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), openssl, args...)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("openssl %v: %v\n%s", args, err, stderr.String())
		}
		return out
	}
	private, message := filepath.Join(dir, "signer.pem"), filepath.Join(dir, "request.json")
	run("genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048", "-out", private)
	block, _ := pem.Decode(run("pkey", "-in", private, "-pubout"))
	public, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	_, inner := captured(t, "mt-cenc-rsa")
	if err := os.WriteFile(message, []byte(inner), 0o600); err != nil {
		t.Fatal(err)
	}
	k := newDoorKit(t, func(c *packager.Config) {
		c.Signers = []packager.Signer{{Name: "widevine_test", Identities: []string{doorID(doorPackager)}, RSA: public.(*rsa.PublicKey)}}
	})
	c := k.client(t, doorPackager)
	for _, test := range []struct {
		name, digest string
		options      []string
		want         string
	}{
		{"PSS, SHA-1, salt of 20 bytes", "-sha1", []string{"rsa_padding_mode:pss", "rsa_pss_saltlen:20", "rsa_mgf1_md:sha1"}, "OK"},
		{"the same again, with another salt", "-sha1", []string{"rsa_padding_mode:pss", "rsa_pss_saltlen:20", "rsa_mgf1_md:sha1"}, "OK"},
		{"no salt", "-sha1", []string{"rsa_padding_mode:pss", "rsa_pss_saltlen:0", "rsa_mgf1_md:sha1"}, "SIGNATURE_FAILED"},
		{"another mask", "-sha1", []string{"rsa_padding_mode:pss", "rsa_pss_saltlen:20", "rsa_mgf1_md:sha256"}, "SIGNATURE_FAILED"},
		{"SHA-256", "-sha256", []string{"rsa_padding_mode:pss", "rsa_pss_saltlen:20", "rsa_mgf1_md:sha256"}, "SIGNATURE_FAILED"},
		{"PKCS #1 v1.5", "-sha1", []string{"rsa_padding_mode:pkcs1"}, "SIGNATURE_FAILED"},
	} {
		args := []string{"dgst", test.digest, "-sign", private}
		for _, o := range test.options {
			args = append(args, "-sigopt", o)
		}
		signature := run(append(args, message)...)
		body := fmt.Appendf(nil, `{"request":%q,"signature":%q,"signer":"widevine_test"}`, base64.StdEncoding.EncodeToString([]byte(inner)), base64.StdEncoding.EncodeToString(signature))
		status, raw := post(t, c, k.url+"widevine", body)
		if a := wvDecode(t, raw); status != http.StatusOK || a.Status != test.want {
			t.Errorf("%s: got %d %s, want 200 %s", test.name, status, a.Status, test.want)
		}
	}
}
