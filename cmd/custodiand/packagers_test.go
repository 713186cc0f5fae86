package main

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/certs"
	"github.com/keycustody/custodian/custodian"
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

// TestMemoryPackagers: of 1,000 keys that packagers got by the Widevine API, as
// few are left in the daemon's memory as TestMemory allows, whether as they were
// or in one of the encodings in which they left.
func TestMemoryPackagers(t *testing.T) {
	t.Parallel() // it waits, and takes little of the CPUs
	c := provision(t)
	c.edit("packagers:\n    listen: \"\"", "packagers:\n    listen: 127.0.0.1:0")
	c.mustRun("init", "-config", c.dev.configFile())
	c.mustStart()
	m := packagersLine.FindStringSubmatch(c.logText())
	if m == nil {
		t.Fatalf("the daemon does not say where packagers knock:\n%s", c.logText())
	}
	if _, err := c.dial(custodian.RoleOfficer).CreateCategory(t.Context(), &v1.CreateCategoryRequest{Name: "movies"}); err != nil {
		t.Fatal(err)
	}
	pki := filepath.Join(c.dev.dir, "pki")
	trust, err := certs.NewClient(certs.ClientOptions{CertFile: filepath.Join(pki, "packager.pem"), KeyFile: filepath.Join(pki, "packager.key"),
		CAFile: filepath.Join(pki, "ca.pem"), ServerName: "localhost"})
	if err != nil {
		t.Fatal(err)
	}
	config := trust.TLSConfig()
	config.MinVersion, config.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	transport := &http.Transport{TLSClientConfig: config}
	var forms [][]byte // of the keys
	keys := 0
	for _, periods := range []int{1, 199, 200, 600} { // short answers and long ones
		inner := fmt.Sprintf(`{"content_id":%q,"tracks":[{"type":"HD"}],"first_crypto_period_index":0,"crypto_period_count":%d}`,
			base64.StdEncoding.EncodeToString(fmt.Appendf(nil, "film of %d", periods)), periods)
		res, err := (&http.Client{Transport: transport}).Post("https://127.0.0.1:"+m[1]+"/v1/categories/movies/widevine", "application/json",
			strings.NewReader(fmt.Sprintf(`{"request":%q}`, base64.StdEncoding.EncodeToString([]byte(inner)))))
		if err != nil {
			t.Fatal(err)
		}
		var envelope struct{ Response []byte }
		err = json.NewDecoder(res.Body).Decode(&envelope)
		res.Body.Close()
		var answer struct{ Tracks []struct{ Key []byte } }
		if err = errors.Join(err, json.Unmarshal(envelope.Response, &answer)); err != nil {
			t.Fatal(err)
		}
		for _, track := range answer.Tracks {
			keys++
			text := base64.StdEncoding.EncodeToString(track.Key)
			forms = append(forms, track.Key, []byte(text))
			for shift := range 3 { // where the text may lie in the outer encoding
				forms = append(forms, []byte(base64.RawStdEncoding.EncodeToString([]byte(text[shift:shift+18]))))
			}
		}
	}
	if keys != 1000 {
		t.Fatalf("got %d keys, want 1000", keys)
	}
	transport.CloseIdleConnections()
	time.Sleep(5 * time.Second)
	image, _ := memoryOf(t, c.cmd.Process.Pid)
	left := count(image, forms)
	t.Logf("left in %d MB of memory: %d keys as they were, %d in the inner encoding, %d in the outer one", len(image)>>20, left[0], left[1], left[2]+left[3]+left[4])
	if sum := left[0] + left[1] + left[2] + left[3] + left[4]; sum > keys/1000 {
		t.Errorf("%d of %d keys are left, want at most %d", sum, keys, keys/1000)
	}
	// The test of the test: something that must be there is found.
	if got := count(image, [][]byte{[]byte("custodian-mek-v1")}); got[0] != 1 {
		t.Error("the image does not contain the MEK's label: the search finds nothing")
	}
}

// count is how many of the texts, of eight bytes at least, are in the image, by
// their index modulo 5. It looks for all at once.
func count(image []byte, texts [][]byte) (found [5]int) {
	byStart, starts := map[uint64]int{}, [1 << 16]bool{}
	for i, text := range texts {
		byStart[binary.LittleEndian.Uint64(text)] = i
		starts[binary.LittleEndian.Uint16(text)] = true
	}
	seen := map[int]bool{}
	for at := 0; at+8 <= len(image); at++ {
		if !starts[binary.LittleEndian.Uint16(image[at:])] {
			continue
		}
		if i, ok := byStart[binary.LittleEndian.Uint64(image[at:])]; ok && !seen[i] && bytes.HasPrefix(image[at:], texts[i]) {
			seen[i] = true
			found[i%5]++
		}
	}
	return found
}
