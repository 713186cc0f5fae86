package packager_test

import (
	"bytes"
	"crypto/aes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha512"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"encoding/xml"
	"errors"
	"fmt"
	"maps"
	"math/big"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/packager"
)

// readPrivateKey reads the key of one of the vectors' certificates.
func readPrivateKey(t *testing.T, name string) *rsa.PrivateKey {
	t.Helper()
	block, _ := pem.Decode(readFile(t, "cpix", name+".key.pem"))
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return key.(*rsa.PrivateKey)
}

// values are the content keys of a document by their KIDs.
func values(t *testing.T, d *packager.CPIX) map[string]string {
	t.Helper()
	found := map[string]string{}
	for _, k := range d.Keys {
		v, err := k.Value()
		if err != nil {
			t.Fatal(err)
		}
		found[k.KID.String()] = base64.StdEncoding.EncodeToString(v)
	}
	return found
}

// The vectors of DASH-IF, by Axinom: the known answer of one, and for all what
// the specifications say that they hold.
func TestOpenVectors(t *testing.T) {
	for _, test := range []struct {
		file, key string
		want      error
	}{
		{"EncryptedContentKeys.xml", "Cert1", nil},
		{"EncryptedContentKeys.xml", "Cert2", packager.ErrNotRecipient},
		{"EncryptedContentKeysWithMultipleRecipients.xml", "Cert1", nil},
		{"EncryptedContentKeysWithMultipleRecipients.xml", "Cert2", nil},
		{"EncryptedContentKeysWithMultipleRecipients.xml", "Cert3", nil},
		{"Invalid_WrongMac.xml", "Cert1", packager.ErrTampered},
		{"ClearContentKeysOnly.xml", "Cert1", packager.ErrNotRecipient},
	} {
		t.Run(test.file+" "+test.key, func(t *testing.T) {
			doc := readFile(t, "cpix", test.file)
			d, err := packager.ParseCPIX(doc)
			if err != nil {
				t.Fatal(err)
			}
			if err := d.Open(readPrivateKey(t, test.key)); !errors.Is(err, test.want) {
				t.Fatalf("got %v, want %v", err, test.want)
			}
			if test.want == nil {
				want := specKeys(t, doc, readPrivateKey(t, test.key))
				if got := values(t, d); len(got) != 4 || !maps.Equal(got, want) {
					t.Errorf("got %v, want %v", got, want)
				}
				if known := knownKeys(t); test.file == "EncryptedContentKeys.xml" && !maps.Equal(want, known) {
					t.Errorf("got %v, want the known answer %v", want, known)
				}
			}
		})
	}
}

// knownKeys are those of EncryptedContentKeys.xml.
func knownKeys(t *testing.T) map[string]string {
	t.Helper()
	var kats struct {
		Document struct {
			Keys map[string]string `json:"verified_here"`
		} `json:"cpix_encrypted_document"`
	}
	if err := json.Unmarshal(readFile(t, "kats.json"), &kats); err != nil {
		t.Fatal(err)
	}
	return kats.Document.Keys
}

// RFC 3394, section 4.3: 128 bits of key under 256.
func TestSpecUnwrap(t *testing.T) {
	kek, _ := hex.DecodeString("000102030405060708090A0B0C0D0E0F101112131415161718191A1B1C1D1E1F")
	wrapped, _ := hex.DecodeString("64E8C3F9CE0F5BA263E9777905818A2A93C8191E7D6E8AE7")
	if got := fmt.Sprintf("%X", specUnwrap(t, kek, wrapped)); got != "00112233445566778899AABBCCDDEEFF" {
		t.Errorf("got %s", got)
	}
}

// newCertificate makes a certificate of a key for itself.
func newCertificate(t *testing.T, key any, public any) []byte {
	t.Helper()
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "encoder"}, NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, public, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func newRSA(t *testing.T, bits int) (*rsa.PrivateKey, []byte) {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		t.Fatal(err)
	}
	return key, newCertificate(t, key, &key.PublicKey)
}

// withRecipients adds DeliveryData to a request.
func withRecipients(request []byte, certs ...[]byte) []byte {
	var b strings.Builder
	for _, der := range certs {
		b.WriteString(`<cpix:DeliveryData><cpix:DeliveryKey><ds:X509Data xmlns:ds="http://www.w3.org/2000/09/xmldsig#"><ds:X509Certificate>` +
			base64.StdEncoding.EncodeToString(der) + `</ds:X509Certificate></ds:X509Data></cpix:DeliveryKey></cpix:DeliveryData>`)
	}
	return bytes.Replace(request, []byte("<cpix:ContentKeyList>"), []byte("<cpix:DeliveryDataList>"+b.String()+"</cpix:DeliveryDataList><cpix:ContentKeyList>"), 1)
}

func pinned(t *testing.T, der []byte, wrap packager.KeyWrapping) packager.Recipient {
	t.Helper()
	r, err := packager.NewRecipient(der, wrap)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// TestSPEKEEncrypted: encrypted replies open with what the test has written
// after the specifications, and with our own reader, and hold the keys that a
// reply in clear has.
func TestSPEKEEncrypted(t *testing.T) {
	core := openCustody(t)
	key, der := newRSA(t, 2048)
	other, otherDER := newRSA(t, 3072)
	small := readFile(t, "speke", "small.request.xml")
	clear := mustAsk(t, packager.NewSPEKE(packager.SPEKEConfig{}), core, "2.0", small).keys(t)
	for _, test := range []struct {
		wrap    packager.KeyWrapping
		version string
		certs   [][]byte
		want    string // the algorithm of the content keys
	}{
		{"", "2.0", [][]byte{der}, "http://www.w3.org/2001/04/xmlenc#aes256-cbc"},
		{packager.WrapRFC3394, "2.0", [][]byte{der}, "http://www.w3.org/2001/04/xmlenc#kw-aes256"},
		{packager.WrapCBC, "2.1", [][]byte{der, otherDER}, "http://www.w3.org/2001/04/xmlenc#aes256-cbc"},
	} {
		t.Run(test.version+" "+string(test.wrap), func(t *testing.T) {
			s := packager.NewSPEKE(packager.SPEKEConfig{Encrypted: map[custodian.CategoryName]bool{"movies": true},
				Recipients: map[string][]packager.Recipient{encoder.ID: {pinned(t, der, test.wrap), pinned(t, otherDER, "")}}})
			request := withRecipients(small, test.certs...)
			request = bytes.Replace(request, []byte("</cpix:DeliveryKey>"), []byte("</cpix:DeliveryKey><cpix:Description>x</cpix:Description>"), 1)
			if test.version == "2.1" {
				request = bytes.ReplaceAll(request, []byte(`version="2.3"`), []byte(`version="2.4"`))
			}
			r := mustAsk(t, s, core, test.version, request)
			if got, want := outline(t, r.raw), outline(t, request); fmt.Sprint(got) != fmt.Sprint(want) {
				t.Errorf("elements: got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
			}
			if bytes.Contains(r.raw, []byte("PlainValue")) {
				t.Error("the reply has a key in clear")
			}
			for _, k := range r.Keys {
				if k.Secret.Sealed.Method.Algorithm != test.want {
					t.Errorf("algorithm %s, want %s", k.Secret.Sealed.Method.Algorithm, test.want)
				}
			}
			if alg := r.Deliveries[0].DocumentKey.Algorithm; (alg != "") != (test.version == "2.0") {
				t.Errorf("DocumentKey@Algorithm %q; CPIX 2.4 has none", alg)
			}
			readers := []*rsa.PrivateKey{key, other}[:len(test.certs)]
			for _, private := range readers {
				got := specKeys(t, r.raw, private)
				d, err := packager.ParseCPIX(r.raw)
				if err != nil {
					t.Fatal(err)
				}
				if err := d.Open(private); err != nil {
					t.Fatal(err)
				}
				ours := values(t, d)
				for kid, want := range clear {
					want := base64.StdEncoding.EncodeToString(want)
					if got[kid] != want || ours[kid] != want {
						t.Errorf("key %s: opened by the specification %v, by us %v", kid, got[kid] == want, ours[kid] == want)
					}
				}
			}
			checkSignalling(t, r)
			// The schema has an order: what is in the request comes last.
			if order := regexp.MustCompile(`(?s)<cpix:DeliveryKey>.*<cpix:DocumentKey.*<cpix:MACMethod.*<cpix:Description>`); !order.Match(r.raw) {
				t.Error("DeliveryKey, DocumentKey, MACMethod, Description are not in this order")
			}
		})
	}
}

// Nobody but pinned recipients, and nothing in clear where a category forbids
// that.
func TestSPEKERecipients(t *testing.T) {
	core := openCustody(t)
	_, der := newRSA(t, 2048)
	_, unpinned := newRSA(t, 2048)
	s := packager.NewSPEKE(packager.SPEKEConfig{Encrypted: map[custodian.CategoryName]bool{"movies": true},
		Recipients: map[string][]packager.Recipient{encoder.ID: {pinned(t, der, "")}, stranger.ID: {pinned(t, unpinned, "")}}})
	small := readFile(t, "speke", "small.request.xml")
	for _, test := range []struct {
		name    string
		request []byte
		status  int
		want    string
	}{
		{"in clear", small, 403, "only in encrypted documents"},
		{"a certificate that is pinned for somebody else", withRecipients(small, unpinned), 403, "DeliveryData[0]: the certificate"},
		{"one more beside the pinned one", withRecipients(small, der, unpinned), 403, "DeliveryData[1]: the certificate"},
		{"no certificate at all", withRecipients(small, []byte{}), 403, "is not pinned"},
	} {
		t.Run(test.name, func(t *testing.T) {
			reply, err := askSPEKE(t.Context(), s, core, "2.0", test.request)
			speke, ok := errors.AsType[*packager.SPEKEError](err)
			if !ok || reply != nil || speke.Status != test.status || !strings.Contains(speke.Text, test.want) {
				t.Errorf("got %v, want %d %q", err, test.status, test.want)
			}
		})
	}
	if _, err := askSPEKE(t.Context(), s, core, "2.0", withRecipients(small, der)); err != nil {
		t.Errorf("the pinned certificate: %v", err)
	}
}

func TestNewRecipientRefuses(t *testing.T) {
	_, weak := newRSA(t, 1024)
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	_, good := newRSA(t, 2048)
	for _, test := range []struct {
		name string
		der  []byte
		wrap packager.KeyWrapping
		want string
	}{
		{"not a certificate", []byte("x"), "", "recipient"},
		{"EC", newCertificate(t, ec, &ec.PublicKey), "", "RSA keys only"},
		{"short key", weak, "", "at least 2048"},
		{"wrapping", good, "rot13", "key wrapping"},
	} {
		if _, err := packager.NewRecipient(test.der, test.wrap); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: got %v, want %q", test.name, err, test.want)
		}
	}
}

// TestOpenTampered: whatever is changed in an encrypted document, it is
// refused, and no key of it comes out.
func TestOpenTampered(t *testing.T) {
	core := openCustody(t)
	private, der := newRSA(t, 2048)
	s := packager.NewSPEKE(packager.SPEKEConfig{Recipients: map[string][]packager.Recipient{encoder.ID: {pinned(t, der, "")}}})
	r := mustAsk(t, s, core, "2.0", withRecipients(readFile(t, "speke", "small.request.xml"), der))
	flip := func(value string) string {
		b := unbase64(t, value)
		b[len(b)/2] ^= 1
		return base64.StdEncoding.EncodeToString(b)
	}
	first, second := r.Keys[0].Secret, r.Keys[1].Secret
	delivery := r.Deliveries[0]
	for _, test := range []struct {
		name, old, with string
		want            string
	}{
		{"a content key", first.Sealed.Value, flip(first.Sealed.Value), "the MAC does not fit"},
		{"the last content key", second.Sealed.Value, flip(second.Sealed.Value), "the MAC does not fit"},
		{"a MAC", first.MAC, flip(first.MAC), "the MAC does not fit"},
		{"a short MAC", first.MAC, base64.StdEncoding.EncodeToString(unbase64(t, first.MAC)[:32]), "the MAC does not fit"},
		{"an empty MAC", first.MAC, "", "the MAC does not fit"},
		{"no MAC", "<pskc:ValueMAC>" + first.MAC + "</pskc:ValueMAC>", "", "ValueMAC is missing"},
		{"the document key", delivery.DocumentKey.Sealed.Value, flip(delivery.DocumentKey.Sealed.Value), "DocumentKey: does not decrypt"},
		{"the MAC key", delivery.MACMethod.Sealed.Value, flip(delivery.MACMethod.Sealed.Value), "MACMethod: does not decrypt"},
		{"the MAC key for the document key", delivery.DocumentKey.Sealed.Value, delivery.MACMethod.Sealed.Value, "DocumentKey: has 64 bytes"},
		{"another MAC", "xmldsig-more#hmac-sha512", "xmldsig-more#hmac-sha256", "MACMethod: algorithm"},
		{"another algorithm for keys", `xmlenc#aes256-cbc"/><enc:CipherData><enc:CipherValue>` + first.Sealed.Value, `xmlenc#aes128-cbc"/><enc:CipherData><enc:CipherValue>` + first.Sealed.Value, "algorithm"},
		{"another algorithm for the document key", "rsa-oaep-mgf1p", "rsa-1_5", "algorithm"},
		{"what is not base64", first.Sealed.Value, "?", "is not base64"},
	} {
		t.Run(test.name, func(t *testing.T) {
			doc := strings.Replace(string(r.raw), test.old, test.with, 1)
			if doc == string(r.raw) {
				t.Fatal("nothing was changed")
			}
			d, err := packager.ParseCPIX([]byte(doc))
			if err != nil {
				t.Fatal(err)
			}
			if err := d.Open(private); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want %q", err, test.want)
			}
			for kid, v := range values(t, d) {
				if v != "" {
					t.Errorf("key %s came out", kid)
				}
			}
		})
	}
	t.Run("two values changed places", func(t *testing.T) {
		// Each has its MAC with it, and nothing ties a value to its KID: CPIX
		// leaves that to a signature. It is written here so that nobody relies
		// on the MAC for it.
		doc := strings.NewReplacer(first.Sealed.Value, second.Sealed.Value, second.Sealed.Value, first.Sealed.Value, first.MAC, second.MAC, second.MAC, first.MAC).Replace(string(r.raw))
		d, err := packager.ParseCPIX([]byte(doc))
		if err != nil {
			t.Fatal(err)
		}
		if err := d.Open(private); err != nil {
			t.Errorf("got %v: then THREAT_MODEL.md is out of date", err)
		}
	})
}

// What follows opens encrypted CPIX documents after RFC 8017, RFC 3394,
// RFC 2104 and XML Encryption, with nothing of the product, and of the
// standard library only the block cipher, the hash functions and big numbers.

// specKeys opens all content keys of a document, in base64 by their KIDs.
func specKeys(t *testing.T, doc []byte, private *rsa.PrivateKey) map[string]string {
	t.Helper()
	var r specDocument
	if err := xml.Unmarshal(doc, &r); err != nil {
		t.Fatal(err)
	}
	var documentKey, macKey []byte
	for _, d := range r.Deliveries {
		// The modulus names the key well enough; crypto/x509 refuses some of
		// the vectors' certificates for their serial numbers.
		if bytes.Contains(unbase64(t, d.Certificate), private.N.Bytes()) {
			documentKey, macKey = specOAEP(t, private, unbase64(t, d.DocumentKey)), specOAEP(t, private, unbase64(t, d.MACKey+d.MACKeySPEKE))
		}
	}
	if len(documentKey) != 32 || len(macKey) != 64 {
		t.Fatalf("keys of the document: %d and %d bytes", len(documentKey), len(macKey))
	}
	found := map[string]string{}
	for _, k := range r.Keys {
		sealed := unbase64(t, k.Value)
		if want := specHMAC(macKey, sealed); !bytes.Equal(want, unbase64(t, k.MAC)) {
			t.Fatalf("MAC of %s", k.KID)
		}
		var plain []byte
		switch k.Method.Algorithm {
		case "http://www.w3.org/2001/04/xmlenc#kw-aes256":
			plain = specUnwrap(t, documentKey, sealed)
		case "http://www.w3.org/2001/04/xmlenc#aes256-cbc":
			plain = specCBC(t, documentKey, sealed)
		default:
			t.Fatalf("algorithm %s", k.Method.Algorithm)
		}
		found[strings.ToLower(k.KID)] = base64.StdEncoding.EncodeToString(plain)
	}
	return found
}

type specDocument struct {
	Deliveries []struct {
		Certificate string `xml:"DeliveryKey>X509Data>X509Certificate"`
		DocumentKey string `xml:"DocumentKey>Data>Secret>EncryptedValue>CipherData>CipherValue"`
		MACKey      string `xml:"MACMethod>Key>CipherData>CipherValue"`                // as in the vectors
		MACKeySPEKE string `xml:"MACMethod>Key>EncryptedValue>CipherData>CipherValue"` // as in SPEKE
	} `xml:"DeliveryDataList>DeliveryData"`
	Keys []struct {
		KID    string `xml:"kid,attr"`
		Method struct {
			Algorithm string `xml:"Algorithm,attr"`
		} `xml:"Data>Secret>EncryptedValue>EncryptionMethod"`
		Value string `xml:"Data>Secret>EncryptedValue>CipherData>CipherValue"`
		MAC   string `xml:"Data>Secret>ValueMAC"`
	} `xml:"ContentKeyList>ContentKey"`
}

// specOAEP is RSAES-OAEP-DECRYPT with SHA-1 and MGF1 (RFC 8017, 7.1.2).
func specOAEP(t *testing.T, private *rsa.PrivateKey, sealed []byte) []byte {
	t.Helper()
	m := new(big.Int).Exp(new(big.Int).SetBytes(sealed), private.D, private.N)
	em := m.FillBytes(make([]byte, private.Size()))
	seed, db := em[1:1+sha1.Size], em[1+sha1.Size:]
	specMGF1(seed, db)
	specMGF1(db, seed)
	empty := sha1.Sum(nil)
	one := bytes.IndexByte(db[sha1.Size:], 1)
	if em[0] != 0 || !bytes.Equal(db[:sha1.Size], empty[:]) || one < 0 || len(bytes.Trim(db[sha1.Size:sha1.Size+one], "\x00")) > 0 {
		t.Fatal("OAEP: decryption error")
	}
	return db[sha1.Size+one+1:]
}

func specMGF1(out, seed []byte) {
	for i := 0; i < len(out); i += sha1.Size {
		h := sha1.Sum(binary.BigEndian.AppendUint32(bytes.Clone(seed), uint32(i/sha1.Size)))
		for j := range h {
			if i+j < len(out) {
				out[i+j] ^= h[j]
			}
		}
	}
}

// specHMAC is RFC 2104 with SHA-512.
func specHMAC(key, message []byte) []byte {
	var inner, outer [sha512.BlockSize]byte
	copy(inner[:], key)
	copy(outer[:], key)
	for i := range inner {
		inner[i] ^= 0x36
		outer[i] ^= 0x5c
	}
	h := sha512.Sum512(append(inner[:], message...))
	h = sha512.Sum512(append(outer[:], h[:]...))
	return h[:]
}

// specCBC is XML Encryption 1.1, 5.2: an IV, then CBC, the last byte the
// length of the padding.
func specCBC(t *testing.T, key, sealed []byte) []byte {
	t.Helper()
	block, err := aes.NewCipher(key)
	if err != nil {
		t.Fatal(err)
	}
	var plain []byte
	for i := 16; i < len(sealed); i += 16 {
		var b [16]byte
		block.Decrypt(b[:], sealed[i:i+16])
		for j := range b {
			b[j] ^= sealed[i-16+j]
		}
		plain = append(plain, b[:]...)
	}
	return plain[:len(plain)-int(plain[len(plain)-1])]
}

// specUnwrap is RFC 3394, 2.2.2.
func specUnwrap(t *testing.T, kek, wrapped []byte) []byte {
	t.Helper()
	block, err := aes.NewCipher(kek)
	if err != nil {
		t.Fatal(err)
	}
	n := len(wrapped)/8 - 1
	a, r := bytes.Clone(wrapped[:8]), bytes.Clone(wrapped[8:])
	for j := 5; j >= 0; j-- {
		for i := n; i >= 1; i-- {
			x := binary.BigEndian.Uint64(a) ^ uint64(n*j+i)
			b := append(binary.BigEndian.AppendUint64(nil, x), r[8*(i-1):8*i]...)
			block.Decrypt(b, b)
			copy(a, b[:8])
			copy(r[8*(i-1):], b[8:])
		}
	}
	if hex.EncodeToString(a) != "a6a6a6a6a6a6a6a6" {
		t.Fatal("key wrap: integrity check")
	}
	return r
}
