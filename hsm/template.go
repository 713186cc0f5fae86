package hsm

import (
	"encoding/binary"
	"time"

	"github.com/miekg/pkcs11"
)

// An attribute of a template: a value, or for an array attribute a template.
type attribute struct {
	typ    uint
	value  []byte
	nested template
}

// A template is what an object is made with. Every usage flag is listed,
// because modules take some that are left out for true; MODIFIABLE=false comes
// last, because SoftHSM applies attributes in order and refuses what follows.
type template []attribute

func flag(typ uint, on bool) attribute {
	if on {
		return attribute{typ: typ, value: []byte{1}}
	}
	return attribute{typ: typ, value: []byte{0}}
}

func number(typ, v uint) attribute {
	return attribute{typ: typ, value: numberBytes(v)}
}

func numberBytes(v uint) []byte {
	return binary.NativeEndian.AppendUint64(nil, uint64(v))
}

func mechanisms(list ...uint) attribute {
	a := attribute{typ: pkcs11.CKA_ALLOWED_MECHANISMS}
	for _, m := range list {
		a.value = append(a.value, numberBytes(m)...)
	}
	return a
}

// date encodes a CK_DATE: year, month and day in UTC as digits.
func date(typ uint, t time.Time) attribute {
	return attribute{typ: typ, value: []byte(t.UTC().Format("20060102"))}
}

// aes starts every template of a secret key: AES, private and sensitive.
func aes(token, extractable bool) template {
	return template{
		number(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY),
		number(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES),
		flag(pkcs11.CKA_TOKEN, token),
		flag(pkcs11.CKA_PRIVATE, true),
		flag(pkcs11.CKA_SENSITIVE, true),
		flag(pkcs11.CKA_EXTRACTABLE, extractable),
	}
}

// usages lists every usage flag of a secret key: those given are on.
func usages(on ...uint) template {
	var tpl template
	for _, typ := range []uint{
		pkcs11.CKA_ENCRYPT, pkcs11.CKA_DECRYPT, pkcs11.CKA_SIGN, pkcs11.CKA_VERIFY,
		pkcs11.CKA_WRAP, pkcs11.CKA_UNWRAP, pkcs11.CKA_DERIVE,
	} {
		set := false
		for _, o := range on {
			set = set || o == typ
		}
		tpl = append(tpl, flag(typ, set))
	}
	return tpl
}

// fixed ends a template: no copy with other attributes, no change.
func fixed() template {
	return template{flag(pkcs11.CKA_COPYABLE, false), flag(pkcs11.CKA_MODIFIABLE, false)}
}

func join(parts ...template) template {
	var tpl template
	for _, p := range parts {
		tpl = append(tpl, p...)
	}
	return tpl
}

// unwrapTemplate is what a MEK demands of every key that it unwraps. A sealed
// one demands too that the key can never leave the token again, so that even a
// holder of the PIN cannot wrap it under a key of his own.
func unwrapTemplate(p MEKProfile) template {
	tpl := template{
		number(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY),
		number(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES),
		flag(pkcs11.CKA_SENSITIVE, true),
		flag(pkcs11.CKA_PRIVATE, true),
		flag(pkcs11.CKA_TOKEN, false),
		flag(pkcs11.CKA_WRAP, false),
		flag(pkcs11.CKA_UNWRAP, false),
	}
	if p == Sealed {
		tpl = append(tpl, flag(pkcs11.CKA_EXTRACTABLE, false))
	}
	return tpl
}

// mekUse is the part of a MEK's template that bounds what it can do.
func mekUse(kwp uint, p MEKProfile) template {
	return join(usages(pkcs11.CKA_WRAP, pkcs11.CKA_UNWRAP), template{
		mechanisms(kwp),
		{typ: pkcs11.CKA_UNWRAP_TEMPLATE, nested: unwrapTemplate(p)},
	})
}

// mekTemplate makes a MEK: a token object that only wraps and unwraps by KWP.
func mekTemplate(pr profile, s MEKSpec) template {
	tpl := join(aes(true, false), template{
		number(pkcs11.CKA_VALUE_LEN, 32),
		{typ: pkcs11.CKA_LABEL, value: []byte(s.Label)},
		{typ: pkcs11.CKA_ID, value: s.ID[:]},
	}, mekUse(pr.kwp, s.Profile))
	if !s.Start.IsZero() {
		tpl = append(tpl, date(pkcs11.CKA_START_DATE, s.Start))
	}
	if !s.End.IsZero() {
		tpl = append(tpl, date(pkcs11.CKA_END_DATE, s.End))
	}
	return join(tpl, fixed())
}

// transientNew generates a key that can be wrapped, does nothing and lives for
// one call.
func transientNew(pr profile) template {
	return join(aes(false, true), template{number(pkcs11.CKA_VALUE_LEN, 32)}, transientUse(pr))
}

// transientAgain unwraps a key for the move from one MEK to another.
func transientAgain(pr profile) template {
	return join(aes(false, true), length(pr), transientUse(pr))
}

func transientUse(pr profile) template {
	tpl := usages()
	if pr.trusted {
		tpl = append(tpl, flag(pkcs11.CKA_WRAP_WITH_TRUSTED, true))
	}
	return tpl
}

// length is CKA_VALUE_LEN where the module wants it on unwrap; others refuse it.
func length(pr profile) template {
	if !pr.valueLen {
		return nil
	}
	return template{number(pkcs11.CKA_VALUE_LEN, 32)}
}

// residentTemplate unwraps a key for use: never extractable, one mechanism.
func residentTemplate(pr profile, use Use) template {
	return join(aes(false, false), length(pr), residentUse(use), fixed())
}

func residentUse(use Use) template {
	switch use {
	case UseGCM:
		return append(usages(pkcs11.CKA_ENCRYPT, pkcs11.CKA_DECRYPT), mechanisms(pkcs11.CKM_AES_GCM))
	case UseCMAC:
		return append(usages(pkcs11.CKA_SIGN), mechanisms(pkcs11.CKM_AES_CMAC))
	default:
		return usages()
	}
}

// probeTemplate generates the key that shows that the token still answers.
func probeTemplate() template {
	return join(aes(false, false), template{number(pkcs11.CKA_VALUE_LEN, 32)}, residentUse(UseGCM), fixed())
}

// oidP256 is the DER of the OID of NIST P-256 (RFC 5480).
var oidP256 = []byte{0x06, 0x08, 0x2A, 0x86, 0x48, 0xCE, 0x3D, 0x03, 0x01, 0x07}

// A curve is what a signer's pair is on, with the mechanisms for it.
type curve struct {
	keyType, generate, sign uint
	params                  []byte // CKA_EC_PARAMS
}

var (
	curveP256 = curve{pkcs11.CKK_EC, pkcs11.CKM_EC_KEY_PAIR_GEN, pkcs11.CKM_ECDSA, oidP256}
	// PKCS #11 v3.0, section 2.3; the OID is that of RFC 8410.
	curveEd25519 = curve{ckkECEdwards, ckmECEdwardsKeyPairGen, ckmEDDSA, []byte{0x06, 0x03, 0x2B, 0x65, 0x70}}
)

const (
	ckkECEdwards           = 0x40
	ckmECEdwardsKeyPairGen = 0x1055
	ckmEDDSA               = 0x1057
)

// signerPrivate and signerPublic make the two halves of a signer. The public
// half is not private, so that evidence can be read without a login.
func signerPrivate(c curve, label string, id [16]byte) template {
	return join(template{
		number(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY),
		number(pkcs11.CKA_KEY_TYPE, c.keyType),
		{typ: pkcs11.CKA_LABEL, value: []byte(label)},
		{typ: pkcs11.CKA_ID, value: id[:]},
	}, signerPrivateUse(c), fixed())
}

func signerPrivateUse(c curve) template {
	return template{
		flag(pkcs11.CKA_TOKEN, true),
		flag(pkcs11.CKA_PRIVATE, true),
		flag(pkcs11.CKA_SENSITIVE, true),
		flag(pkcs11.CKA_EXTRACTABLE, false),
		flag(pkcs11.CKA_SIGN, true),
		flag(pkcs11.CKA_SIGN_RECOVER, false),
		flag(pkcs11.CKA_DECRYPT, false),
		flag(pkcs11.CKA_UNWRAP, false),
		flag(pkcs11.CKA_DERIVE, false),
		mechanisms(c.sign),
	}
}

func signerPublic(c curve, label string, id [16]byte) template {
	return join(template{
		number(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY),
		number(pkcs11.CKA_KEY_TYPE, c.keyType),
		{typ: pkcs11.CKA_EC_PARAMS, value: c.params},
		{typ: pkcs11.CKA_LABEL, value: []byte(label)},
		{typ: pkcs11.CKA_ID, value: id[:]},
		flag(pkcs11.CKA_TOKEN, true),
		flag(pkcs11.CKA_PRIVATE, false),
		flag(pkcs11.CKA_VERIFY, true),
		flag(pkcs11.CKA_VERIFY_RECOVER, false),
		flag(pkcs11.CKA_ENCRYPT, false),
		flag(pkcs11.CKA_WRAP, false),
		flag(pkcs11.CKA_DERIVE, false),
	}, fixed())
}
