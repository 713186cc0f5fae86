package hsm_test

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/subtle"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/keycustody/custodian/hsm"
)

func TestClassification(t *testing.T) {
	for _, row := range []struct {
		calls      string
		codes      []uint
		want       error
		lost, drop bool
	}{
		{"C_Decrypt C_UnwrapKey", []uint{0x40, 0x41, 0x110, 0x112}, hsm.ErrAuth, false, false},
		{"C_Encrypt C_GenerateKey", []uint{0x40, 0x41, 0x110, 0x112}, hsm.ErrPolicy, false, false},
		{"C_Decrypt C_Sign C_FindObjects", []uint{0xB3, 0xB0, 0x90, 0x91}, hsm.ErrDevice, false, true},
		{"C_Decrypt C_UnwrapKey", []uint{0x82, 0x60, 0x113, 0xF0}, hsm.ErrStale, false, false},
		{"C_Decrypt C_Login", []uint{0x101, 0x30, 0x31, 0x32, 0xE0, 0xE1, 0x190, 0x3}, hsm.ErrDevice, true, false},
		{"C_Login", []uint{0xA0, 0xA1, 0xA2, 0xA3, 0xA4}, hsm.ErrPIN, false, false},
		{"C_WrapKey C_Decrypt", []uint{0x68, 0x6A, 0x69, 0x10, 0x1B, 0xD1, 0x70, 0x71}, hsm.ErrPolicy, false, false},
		{"C_Decrypt C_GenerateKey", []uint{0x5, 0x6, 0x80000001, 0xFFFF}, hsm.ErrDevice, false, false}, // the probe decides
		{"C_OpenSession", []uint{0x2, 0xB1}, hsm.ErrBusy, false, false},
	} {
		for _, call := range strings.Fields(row.calls) {
			for _, code := range row.codes {
				lost, drop, err := hsm.Classified(call, code)
				if !errors.Is(err, row.want) || lost != row.lost || drop != row.drop {
					t.Errorf("%s %#x: %v, lost %v, drop %v; want %v, %v, %v", call, code, err, lost, drop, row.want, row.lost, row.drop)
				}
				if !errors.Is(err, pkcs11.Error(code)) {
					t.Errorf("%s %#x: the code cannot be asked for", call, code)
				}
			}
		}
	}
	if _, _, err := hsm.Classified("C_Decrypt", 0); err != nil {
		t.Errorf("OK is an error: %v", err)
	}
}

func TestCodeNames(t *testing.T) {
	for _, row := range []struct {
		code uint
		want string
	}{
		{0x1B, "CKR_ACTION_PROHIBITED (0x1B)"},
		{0xA0, "CKR_PIN_INCORRECT (0xA0)"},
		{0x80000102, "vendor code 0x80000102"},
		{0x7777, "unknown code 0x7777"},
	} {
		if got := hsm.CodeName(row.code); got != row.want {
			t.Errorf("%#x: got %s, want %s", row.code, got, row.want)
		}
	}
}

func TestMayLogin(t *testing.T) {
	const ready = pkcs11.CKF_TOKEN_INITIALIZED | pkcs11.CKF_USER_PIN_INITIALIZED
	for _, row := range []struct {
		name  string
		flags uint
		want  error
	}{
		{"ready", ready, nil},
		{"wrong PIN tried", ready | pkcs11.CKF_USER_PIN_COUNT_LOW, nil},
		{"final try", ready | pkcs11.CKF_USER_PIN_COUNT_LOW | pkcs11.CKF_USER_PIN_FINAL_TRY, hsm.ErrPIN},
		{"locked", ready | pkcs11.CKF_USER_PIN_LOCKED, hsm.ErrPIN},
		{"to be changed", ready | pkcs11.CKF_USER_PIN_TO_BE_CHANGED, hsm.ErrPIN},
		{"no PIN", pkcs11.CKF_TOKEN_INITIALIZED, hsm.ErrUnfit},
	} {
		wantErr(t, row.name, hsm.MayLogin(row.flags), row.want)
	}
}

// The known answers of the self-test, against code that shares nothing with a
// module: the standard library, and RFC 5649 and SP 800-38B written out here.
func TestKnownAnswers(t *testing.T) {
	ka := hsm.KnownAnswers()
	for name, v := range ka {
		if len(v) == 0 {
			t.Errorf("%s is empty", name)
		}
	}
	gcm, err := cipher.NewGCM(block(t, ka["gcm key"]))
	if err != nil {
		t.Fatal(err)
	}
	same(t, "GCM", gcm.Seal(nil, ka["gcm iv"], ka["gcm text"], ka["gcm aad"]), ka["gcm seal"])
	same(t, "CMAC", cmac(block(t, ka["cmac key"]), ka["cmac text"]), ka["cmac"])
	same(t, "KWP", kwp(block(t, ka["kwp key"]), ka["gcm key"]), ka["kwp blob"])

	// The test's own code against published vectors: RFC 5649, section 6, and
	// SP 800-38B, AES-256 with an empty message and with 64 bytes.
	kek := unhex(t, "5840df6e29b02af1ab493b705bf16ea1ae8338f4dcc176a8")
	same(t, "RFC 5649, 20 octets", kwp(block(t, kek), unhex(t, "c37b7e6492584340bed12207808941155068f738")),
		unhex(t, "138bdeaa9b8fa7fc61f97742e72248ee5ae6ae5360d1ae6a5f54f373fa543b6a"))
	key := block(t, ka["cmac key"])
	same(t, "SP 800-38B, empty", cmac(key, nil), unhex(t, "028962f61b7bf89efc6b551f4667d983"))
	same(t, "SP 800-38B, 64 bytes", cmac(key, unhex(t, "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"+
		"30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710")), unhex(t, "e1992190549f6ed5696a2c056c315410"))
}

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func block(t *testing.T, key []byte) cipher.Block {
	t.Helper()
	b, err := aes.NewCipher(key)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func same(t *testing.T, what string, got, want []byte) {
	t.Helper()
	if !bytes.Equal(got, want) {
		t.Errorf("%s: got %x, want %x", what, got, want)
	}
}

// kwp is the wrap of RFC 5649 for more than eight octets.
func kwp(b cipher.Block, plain []byte) []byte {
	r := append([]byte{0xA6, 0x59, 0x59, 0xA6}, binary.BigEndian.AppendUint32(nil, uint32(len(plain)))...)
	r = append(r, plain...)
	for len(r)%8 != 0 {
		r = append(r, 0)
	}
	n := len(r)/8 - 1
	buf := make([]byte, 16)
	for j := range 6 {
		for i := 1; i <= n; i++ {
			copy(buf, r[:8])
			copy(buf[8:], r[8*i:8*i+8])
			b.Encrypt(buf, buf)
			binary.BigEndian.PutUint64(r, binary.BigEndian.Uint64(buf)^uint64(n*j+i))
			copy(r[8*i:], buf[8:])
		}
	}
	return r
}

// cmac is SP 800-38B, section 6.2.
func cmac(b cipher.Block, msg []byte) []byte {
	k1 := make([]byte, 16)
	b.Encrypt(k1, k1)
	double(k1)
	last := make([]byte, 16)
	n := (len(msg) + 15) / 16
	if n == 0 {
		n = 1
	}
	tail := msg[16*(n-1):]
	copy(last, tail)
	if len(tail) < 16 {
		last[len(tail)] = 0x80
		double(k1)
	}
	subtle.XORBytes(last, last, k1)
	c := make([]byte, 16)
	for i := range n - 1 {
		subtle.XORBytes(c, c, msg[16*i:16*i+16])
		b.Encrypt(c, c)
	}
	subtle.XORBytes(c, c, last)
	b.Encrypt(c, c)
	return c
}

func double(k []byte) {
	carry := byte(0)
	for i := len(k) - 1; i >= 0; i-- {
		next := k[i] >> 7
		k[i] = k[i]<<1 | carry
		carry = next
	}
	if carry == 1 {
		k[len(k)-1] ^= 0x87
	}
}
