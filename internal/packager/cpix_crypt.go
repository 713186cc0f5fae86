package packager

import (
	"bytes"
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha512"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"slices"

	josecipher "github.com/go-jose/go-jose/v4/cipher"

	"github.com/keycustody/custodian/custodian"
)

// The algorithms of encrypted documents that CPIX 2.4, section 6, makes
// mandatory, by their XML Encryption names; and key wrap (RFC 3394), which
// writers and readers of content keys may use too.
const (
	algAES256CBC  = nsEnc + "aes256-cbc"
	algAES256Wrap = nsEnc + "kw-aes256"
	algRSAOAEP    = nsEnc + "rsa-oaep-mgf1p" // SHA-1 and MGF1 with SHA-1
	algHMACSHA512 = "http://www.w3.org/2001/04/xmldsig-more#hmac-sha512"
	algSHA1       = nsDSig + "sha1"
)

// Sizes in bytes.
const (
	documentKeySize = 32
	macKeySize      = 64
	minRSABits      = 2048 // what SPEKE asks for; CPIX recommends 3072
)

// A KeyWrapping is how content keys are encrypted under the document key.
type KeyWrapping string

// The wrappings.
const (
	WrapCBC     KeyWrapping = "aes256-cbc" // what every reader of CPIX has to know
	WrapRFC3394 KeyWrapping = "kw-aes256"
)

// A Recipient is whom a document may be encrypted to: a certificate that the
// configuration pins. It counts until it is taken out of there; its dates and
// its issuer are not looked at.
type Recipient struct {
	der  []byte
	key  *rsa.PublicKey
	wrap KeyWrapping
}

// NewRecipient takes a certificate in DER, whose key must be RSA of 2048 bits
// at least. An empty wrap is WrapCBC.
func NewRecipient(der []byte, wrap KeyWrapping) (Recipient, error) {
	public, err := certificateKey(der)
	if err != nil {
		return Recipient{}, fmt.Errorf("recipient: %w", err)
	}
	key, ok := public.(*rsa.PublicKey)
	if !ok {
		return Recipient{}, fmt.Errorf("recipient: its key is a %T: CPIX encrypts to RSA keys only", public)
	}
	if n := key.N.BitLen(); n < minRSABits {
		return Recipient{}, fmt.Errorf("recipient: its RSA key has %d bits: must be at least %d", n, minRSABits)
	}
	switch wrap {
	case "":
		wrap = WrapCBC
	case WrapCBC, WrapRFC3394:
	default:
		return Recipient{}, fmt.Errorf("recipient: key wrapping %q: must be %s or %s", wrap, WrapCBC, WrapRFC3394)
	}
	return Recipient{der, key, wrap}, nil
}

// certificateKey is the public key in a certificate. It does not ask more of
// the certificate than that it is one: tools for CPIX have made certificates
// with negative serial numbers, which crypto/x509 refuses to read.
func certificateKey(der []byte) (any, error) {
	var cert struct {
		TBS struct {
			Version              int `asn1:"optional,explicit,default:0,tag:0"`
			Serial               *big.Int
			SignatureAlgorithm   asn1.RawValue
			Issuer               asn1.RawValue
			Validity             asn1.RawValue
			Subject              asn1.RawValue
			SubjectPublicKeyInfo asn1.RawValue
			Unique               asn1.RawValue `asn1:"optional,tag:1"`
			SubjectUnique        asn1.RawValue `asn1:"optional,tag:2"`
			Extensions           asn1.RawValue `asn1:"optional,explicit,tag:3"`
		}
		SignatureAlgorithm asn1.RawValue
		Signature          asn1.BitString
	}
	if rest, err := asn1.Unmarshal(der, &cert); err != nil || len(rest) > 0 {
		return nil, errors.New("not an X.509 certificate")
	}
	return x509.ParsePKIXPublicKey(cert.TBS.SubjectPublicKeyInfo.FullBytes)
}

// Fingerprint is the SHA-256 of the certificate, for the audit log.
func (r Recipient) Fingerprint() string { return certFingerprint(r.der) }

// A sealer encrypts the content keys of one document.
type sealer struct {
	documentKey []byte
	macKey      []byte
	wrap        KeyWrapping
}

// newSealer draws the keys of one document. They are for the recipients of
// one reply, and are wiped by close.
func newSealer(wrap KeyWrapping) *sealer {
	s := &sealer{make([]byte, documentKeySize), make([]byte, macKeySize), wrap}
	rand.Read(s.documentKey) // it never fails
	rand.Read(s.macKey)
	return s
}

func (s *sealer) close() {
	clear(s.documentKey)
	clear(s.macKey)
}

// deliver writes the document key and the MAC key, encrypted to a recipient,
// into a DeliveryData.
func (s *sealer) deliver(delivery *element, to Recipient, version string) error {
	delivery.remove(nsCPIX, "DocumentKey")
	delivery.remove(nsCPIX, "MACMethod")
	rest := slices.DeleteFunc(slices.Clone(delivery.children), func(c *element) bool { return c.is(nsCPIX, "DeliveryKey") })
	delivery.children = slices.DeleteFunc(delivery.children, func(c *element) bool { return !c.is(nsCPIX, "DeliveryKey") })
	defer func() { delivery.children = append(delivery.children, rest...) }() // the schema's order
	document := delivery.add(nsCPIX, "DocumentKey")
	if version != "2.4" { // which has no such attribute
		document.setAttr("Algorithm", algAES256CBC)
	}
	if err := encryptTo(document.add(nsCPIX, "Data").add(nsPSKC, "Secret").add(nsPSKC, "EncryptedValue"), to.key, s.documentKey); err != nil {
		return err
	}
	mac := delivery.add(nsCPIX, "MACMethod")
	mac.setAttr("Algorithm", algHMACSHA512)
	// Of the three shapes in use, the one that SPEKE encryptors read.
	return encryptTo(mac.add(nsCPIX, "Key").add(nsPSKC, "EncryptedValue"), to.key, s.macKey)
}

func encryptTo(value *element, to *rsa.PublicKey, key []byte) error {
	sealed, err := rsa.EncryptOAEP(sha1.New(), rand.Reader, to, key, nil)
	if err != nil {
		return err
	}
	writeCipher(value, algRSAOAEP, sealed)
	return nil
}

func writeCipher(value *element, algorithm string, sealed []byte) {
	value.add(nsEnc, "EncryptionMethod").setAttr("Algorithm", algorithm)
	value.add(nsEnc, "CipherData").add(nsEnc, "CipherValue").text = encodeBase64(sealed)
}

// seal writes one content key, encrypted and with its MAC, into a ContentKey.
func (s *sealer) seal(contentKey *element, cek []byte) error {
	block, err := aes.NewCipher(s.documentKey)
	if err != nil {
		return err
	}
	defer forget(block)
	var sealed []byte
	algorithm := algAES256CBC
	if s.wrap == WrapRFC3394 {
		algorithm = algAES256Wrap
		sealed, err = josecipher.KeyWrap(block, cek)
		if err != nil {
			return err
		}
	} else {
		sealed = sealCBC(block, cek)
	}
	mac := hmac.New(sha512.New, s.macKey)
	mac.Write(sealed)
	secret := contentKey.add(nsCPIX, "Data").add(nsPSKC, "Secret")
	writeCipher(secret.add(nsPSKC, "EncryptedValue"), algorithm, sealed)
	secret.add(nsPSKC, "ValueMAC").text = encodeBase64(mac.Sum(nil))
	return nil
}

// sealCBC is AES-CBC with a random IV before it and the padding of XML
// Encryption 1.1, section 5.2, in the form of PKCS #7.
func sealCBC(block cipher.Block, plain []byte) []byte {
	pad := aes.BlockSize - len(plain)%aes.BlockSize
	out := make([]byte, aes.BlockSize+len(plain)+pad)
	iv, body := out[:aes.BlockSize], out[aes.BlockSize:]
	rand.Read(iv)
	copy(body, plain)
	copy(body[len(plain):], bytes.Repeat([]byte{byte(pad)}, pad))
	cipher.NewCBCEncrypter(block, iv).CryptBlocks(body, body)
	return out
}

// Errors of Open.
var (
	// ErrNotRecipient: the document is not encrypted to the key.
	ErrNotRecipient = errors.New("the document is not encrypted to this key")
	// ErrTampered: a value does not belong to its MAC.
	ErrTampered = errors.New("the MAC does not fit: the document was changed, or damaged")
)

// Open decrypts the content keys of the document with the private key of one
// of its recipients. Every MAC is checked before any content key is decrypted.
// Values in clear stay as they are.
func (d *CPIX) Open(private *rsa.PrivateKey) error {
	if err := d.open(private); err != nil {
		return fmt.Errorf("cpix: open: %w", err)
	}
	return nil
}

func (d *CPIX) open(private *rsa.PrivateKey) error {
	delivery, err := d.deliveryTo(&private.PublicKey)
	if err != nil {
		return err
	}
	documentKey, err := decryptKey(private, delivery.at(cpixName("DocumentKey"), cpixName("Data"), pskcName("Secret"), pskcName("EncryptedValue")), documentKeySize)
	if err != nil {
		return fmt.Errorf("DocumentKey: %w", err)
	}
	defer clear(documentKey)
	macKey, err := openMACKey(private, delivery.child(nsCPIX, "MACMethod"))
	if err != nil {
		return fmt.Errorf("MACMethod: %w", err)
	}
	defer clear(macKey)
	sealed := make([][]byte, len(d.Keys))
	for i, k := range d.Keys {
		if sealed[i], err = k.checkMAC(macKey); err != nil {
			return fmt.Errorf("content key %s: %w", k.KID, err)
		}
	}
	block, err := aes.NewCipher(documentKey)
	if err != nil {
		return err
	}
	defer forget(block)
	for i, k := range d.Keys {
		if sealed[i] == nil {
			continue
		}
		cek, err := openCEK(block, k.secret().child(nsPSKC, "EncryptedValue"), sealed[i])
		if err != nil {
			return fmt.Errorf("content key %s: %w", k.KID, err)
		}
		secret := k.secret()
		secret.children = nil
		secret.add(nsPSKC, "PlainValue").text = encodeBase64(cek)
		clear(cek)
	}
	return nil
}

// deliveryTo finds the part of the document that is for a key.
func (d *CPIX) deliveryTo(key *rsa.PublicKey) (*element, error) {
	for _, delivery := range d.Deliveries {
		if of, err := certificateKey(delivery.Certificate); err == nil && key.Equal(of) {
			return delivery.e, nil
		}
	}
	return nil, ErrNotRecipient
}

func openMACKey(private *rsa.PrivateKey, method *element) ([]byte, error) {
	if method == nil {
		return nil, errors.New("is missing: what has no MAC is not opened")
	}
	if a, _ := method.attr("Algorithm"); a != algHMACSHA512 {
		return nil, fmt.Errorf("algorithm %.80q: must be %s", a, algHMACSHA512)
	}
	value := method.child(nsPSKC, "MACKey")
	if key := method.child(nsCPIX, "Key"); value == nil && key != nil {
		value = key
		if inner := key.child(nsPSKC, "EncryptedValue"); inner != nil {
			value = inner
		}
	}
	return decryptKey(private, value, macKeySize)
}

// decryptKey opens a key that is encrypted to a recipient.
func decryptKey(private *rsa.PrivateKey, value *element, size int) ([]byte, error) {
	sealed, algorithm, err := readCipher(value)
	if err != nil {
		return nil, err
	}
	if algorithm != algRSAOAEP {
		return nil, fmt.Errorf("algorithm %.80q: must be %s", algorithm, algRSAOAEP)
	}
	key, err := private.Decrypt(nil, sealed, &rsa.OAEPOptions{Hash: crypto.SHA1})
	if err != nil {
		return nil, errors.New("does not decrypt under the private key")
	}
	if len(key) != size {
		clear(key)
		return nil, fmt.Errorf("has %d bytes: must have %d", len(key), size)
	}
	return key, nil
}

// readCipher reads an encrypted value and the name of its algorithm.
func readCipher(value *element) (sealed []byte, algorithm string, err error) {
	method, data := value.at(encName("EncryptionMethod")), value.at(encName("CipherData"), encName("CipherValue"))
	if method == nil || data == nil {
		return nil, "", errors.New("EncryptionMethod or CipherData/CipherValue is missing")
	}
	algorithm, _ = method.attr("Algorithm")
	if digest := method.child(nsDSig, "DigestMethod"); digest != nil {
		if a, _ := digest.attr("Algorithm"); a != algSHA1 {
			return nil, "", fmt.Errorf("digest %.80q: must be %s", a, algSHA1)
		}
	}
	sealed, err = decodeBase64(data.text)
	return sealed, algorithm, err
}

// secret is where a content key's value is; nil: it has none.
func (k CPIXKey) secret() *element { return k.e.at(cpixName("Data"), pskcName("Secret")) }

// checkMAC returns the encrypted value, once its MAC has been found right; nil
// where the value is not encrypted.
func (k CPIXKey) checkMAC(macKey []byte) ([]byte, error) {
	value := k.secret().at(pskcName("EncryptedValue"))
	if value == nil {
		return nil, nil
	}
	sealed, _, err := readCipher(value)
	if err != nil {
		return nil, err
	}
	given := k.secret().child(nsPSKC, "ValueMAC")
	if given == nil {
		return nil, errors.New("ValueMAC is missing: what has no MAC is not opened")
	}
	want, err := decodeBase64(given.text)
	if err != nil {
		return nil, fmt.Errorf("ValueMAC: %w", err)
	}
	mac := hmac.New(sha512.New, macKey)
	mac.Write(sealed)
	if !hmac.Equal(mac.Sum(nil), want) {
		return nil, ErrTampered
	}
	return sealed, nil
}

func openCEK(block cipher.Block, value *element, sealed []byte) (cek []byte, err error) {
	_, algorithm, err := readCipher(value)
	if err != nil {
		return nil, err
	}
	switch algorithm {
	case algAES256CBC:
		cek, err = openCBC(block, sealed)
	case algAES256Wrap:
		if len(sealed)%8 != 0 || len(sealed) < 24 {
			return nil, fmt.Errorf("wrapped in %d bytes: must be %d", len(sealed), custodian.CEKSize+8)
		}
		cek, err = josecipher.KeyUnwrap(block, sealed)
	default:
		return nil, fmt.Errorf("algorithm %.80q: must be %s or %s", algorithm, algAES256CBC, algAES256Wrap)
	}
	if err == nil && len(cek) != custodian.CEKSize {
		clear(cek)
		err = fmt.Errorf("has %d bytes: must have %d", len(cek), custodian.CEKSize)
	}
	return cek, err
}

func openCBC(block cipher.Block, sealed []byte) ([]byte, error) {
	if len(sealed) < 2*aes.BlockSize || len(sealed)%aes.BlockSize != 0 {
		return nil, fmt.Errorf("encrypted in %d bytes: must be IV and whole blocks", len(sealed))
	}
	plain := make([]byte, len(sealed)-aes.BlockSize)
	cipher.NewCBCDecrypter(block, sealed[:aes.BlockSize]).CryptBlocks(plain, sealed[aes.BlockSize:])
	// XML Encryption looks at the last byte only. The MAC was right, so this
	// is no oracle.
	pad := int(plain[len(plain)-1])
	if pad < 1 || pad > aes.BlockSize {
		clear(plain)
		return nil, errors.New("the padding is wrong")
	}
	return plain[:len(plain)-pad], nil
}

// Value is the content key in clear, nil where it is encrypted or absent.
// Whoever gets it wipes it.
func (k CPIXKey) Value() ([]byte, error) {
	plain := k.secret().at(pskcName("PlainValue"))
	if plain == nil {
		return nil, nil
	}
	cek, err := decodeBase64(plain.text)
	if err == nil && len(cek) != custodian.CEKSize {
		err = fmt.Errorf("has %d bytes: must have %d", len(cek), custodian.CEKSize)
		clear(cek)
	}
	if err != nil {
		return nil, fmt.Errorf("content key %s: PlainValue: %w", k.KID, err)
	}
	return cek, nil
}
