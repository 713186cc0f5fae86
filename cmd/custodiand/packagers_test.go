package main

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestPackagersConfig(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	aes := write("aes", strings.Repeat("0a", 32)+"\n"+strings.Repeat("0b", 16)+"\n", 0o600)
	for _, test := range []struct {
		name   string
		signer SignerConfig
		want   string // of the fault; "" for none
	}{
		{"AES", SignerConfig{AESFile: aes}, ""},
		{"RSA, PEM", SignerConfig{RSAPublicKeyFile: write("pem", string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: spki})), 0o644)}, ""},
		{"RSA, DER", SignerConfig{RSAPublicKeyFile: write("der", string(spki), 0o644)}, ""},
		{"RSA, PKCS #1", SignerConfig{RSAPublicKeyFile: write("pkcs1", string(x509.MarshalPKCS1PublicKey(&key.PublicKey)), 0o644)}, ""},
		{"neither", SignerConfig{}, "packagers.signers[0].aes_file: it or rsa_public_key_file must be set"},
		{"both", SignerConfig{AESFile: aes, RSAPublicKeyFile: aes}, "packagers.signers[0].aes_file: it excludes rsa_public_key_file"},
		{"open to others", SignerConfig{AESFile: write("open", "x", 0o644)}, "chmod 600"},
		{"no file", SignerConfig{RSAPublicKeyFile: filepath.Join(dir, "none")}, "packagers.signers[0].rsa_public_key_file: open"},
		{"no IV", SignerConfig{AESFile: write("noiv", "0a0a\n", 0o600)}, "1 lines: two are needed"},
		{"a short IV", SignerConfig{AESFile: write("shortiv", strings.Repeat("0a", 32)+"\n0b0b\n", 0o600)}, "IV: must be 32 hexadecimal digits"},
		{"a short key", SignerConfig{AESFile: write("shortkey", "0a0a\n"+strings.Repeat("0b", 16), 0o600)}, "packagers.signers[0]: AES key of 2 bytes: must be 16 or 32"},
		{"no key", SignerConfig{AESFile: write("text", "secret\n"+strings.Repeat("0b", 16), 0o600)}, "key: not hexadecimal digits"},
		{"no public key", SignerConfig{RSAPublicKeyFile: aes}, "no RSA public key in PEM or DER"},
	} {
		t.Run(test.name, func(t *testing.T) {
			test.signer.Name, test.signer.Identities = "vod", []string{"spiffe://media.test/packager"}
			_, err := PackagersConfig{Listen: "127.0.0.1:0", Signers: []SignerConfig{test.signer}}.signers()
			switch {
			case test.want == "" && err != nil:
				t.Errorf("got %v, want no fault", err)
			case test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)):
				t.Errorf("got %v, want %q", err, test.want)
			case err != nil && strings.Contains(err.Error(), "secret"):
				t.Errorf("the fault has the key: %v", err)
			}
		})
	}
	if faults := (PackagersConfig{Signers: []SignerConfig{{}}}).check(); len(faults) != 1 || !strings.Contains(faults[0].Error(), "packagers.listen: must be set") {
		t.Errorf("signers without a listener: got %v", faults)
	}
}
