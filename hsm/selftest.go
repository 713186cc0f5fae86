package hsm

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"slices"

	"github.com/miekg/pkcs11"
)

// A selfTester runs the tests in one session; they run at each connect, because
// the module may have been replaced while we were away.
type selfTester struct {
	*worker
	made []handle
}

// selfTest proves with known answers that the module computes what its
// mechanisms are called after, and that the attributes we rely on are enforced.
// It tells whether WRAP_WITH_TRUSTED can be relied on. ErrUnfit names what is
// wrong.
func (w *worker) selfTest() (trusted bool, err error) {
	s := &selfTester{worker: w}
	defer s.clean()
	for _, step := range []struct {
		name string
		test func() error
	}{
		{"AES-GCM", s.gcm},
		{"AES-CMAC", s.cmac},
		{"AES key wrap with padding", s.kwp},
		{"bounds of a MEK", s.bounds},
	} {
		if err := step.test(); err != nil {
			return false, fmt.Errorf("%s: %w", step.name, err)
		}
	}
	return s.trusted()
}

func (s *selfTester) clean() {
	for _, k := range s.made {
		s.destroy(k)
	}
}

// Known answers. GCM: test case 16 of McGrew and Viega's submission, which SP
// 800-38D took over. CMAC: SP 800-38B, AES-256, 40 bytes. KWP: computed with
// two independent implementations of RFC 5649 (see the tests).
var (
	katGCMKey  = unhex("feffe9928665731c6d6a8f9467308308feffe9928665731c6d6a8f9467308308")
	katGCMIV   = [IVSize]byte(unhex("cafebabefacedbaddecaf888"))
	katGCMAAD  = unhex("feedfacedeadbeeffeedfacedeadbeefabaddad2")
	katGCMText = unhex("d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a721c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39")
	katGCMSeal = unhex("522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662" +
		"76fc6ece0f4e1768cddf8853bb2d551b")

	katCMACKey  = unhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
	katCMACText = unhex("6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e5130c81c46a35ce411")
	katCMAC     = unhex("aaf3d8f1de5640c232f5b169b9c911e6")

	katKWPKey  = unhex("000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f")
	katKWPBlob = unhex("3dbf791367fad871f850a0338abec065cc121a0e3726e1498b44e66f982974b2acd1de68c9186d20")
)

// unhex is for constants of this file; the test of known answers reads each.
func unhex(s string) []byte {
	b, err := hex.DecodeString(s)
	if err != nil {
		return nil
	}
	return b
}

// known makes a session key of a known value.
func (s *selfTester) known(value []byte, extractable bool, use template) (handle, error) {
	tpl := join(aes(false, extractable), template{{typ: pkcs11.CKA_VALUE, value: value}}, use)
	k, rv := s.t.lib.create(s.session, tpl)
	if rv != ckrOK {
		return 0, fmt.Errorf("make a known key: %w: %w", newFault(callCreate, rv), ErrUnfit)
	}
	s.made = append(s.made, k)
	return k, nil
}

func (s *selfTester) gcm() error {
	key, err := s.known(katGCMKey, false, residentUse(UseGCM))
	if err != nil {
		return err
	}
	out := make([]byte, len(katGCMSeal))
	n, rv := s.t.lib.gcmSeal(s.session, key, &katGCMIV, katGCMAAD, katGCMText, out)
	if rv != ckrOK || !bytes.Equal(out[:n], katGCMSeal) {
		return fmt.Errorf("encrypts wrongly, %s: %w", codeName(rv), ErrUnfit)
	}
	n, rv = s.t.lib.gcmOpen(s.session, key, &katGCMIV, katGCMAAD, katGCMSeal, out)
	if rv != ckrOK || !bytes.Equal(out[:n], katGCMText) {
		return fmt.Errorf("decrypts wrongly, %s: %w", codeName(rv), ErrUnfit)
	}
	bad := slices.Clone(katGCMSeal)
	bad[len(bad)-1] ^= 1
	if _, rv = s.t.lib.gcmOpen(s.session, key, &katGCMIV, katGCMAAD, bad, out); rv == ckrOK {
		return fmt.Errorf("accepts a wrong tag: %w", ErrUnfit)
	}
	// After an error the state of a session is not known.
	return s.renew()
}

func (s *selfTester) cmac() error {
	key, err := s.known(katCMACKey, false, residentUse(UseCMAC))
	if err != nil {
		return err
	}
	var out [TagSize]byte
	n, rv := s.t.lib.sign(s.session, pkcs11.CKM_AES_CMAC, key, katCMACText, out[:])
	if rv != ckrOK || !bytes.Equal(out[:n], katCMAC) {
		return fmt.Errorf("computes wrongly, %s: %w", codeName(rv), ErrUnfit)
	}
	return nil
}

// kwp wraps the known GCM key under a known key, and unwraps the answer.
func (s *selfTester) kwp() error {
	pr := s.t.profile
	wrapping, err := s.known(katKWPKey, false, mekUse(pr.kwp, Sealed))
	if err != nil {
		return err
	}
	payload, err := s.known(katGCMKey, true, usages())
	if err != nil {
		return err
	}
	blob := make([]byte, 64)
	n, rv := s.t.lib.wrap(s.session, pr.kwp, wrapping, payload, blob)
	if rv != ckrOK || !bytes.Equal(blob[:n], katKWPBlob) {
		return fmt.Errorf("%s wraps wrongly, %s: %w", mechanismName(pr.kwp), codeName(rv), ErrUnfit)
	}
	key, rv := s.t.lib.unwrap(s.session, pr.kwp, wrapping, katKWPBlob, residentTemplate(pr, UseGCM))
	if rv != ckrOK {
		return fmt.Errorf("%s unwraps wrongly, %s: %w", mechanismName(pr.kwp), codeName(rv), ErrUnfit)
	}
	s.made = append(s.made, key)
	out := make([]byte, len(katGCMSeal))
	n, rv = s.t.lib.gcmOpen(s.session, key, &katGCMIV, katGCMAAD, katGCMSeal, out)
	if rv != ckrOK || !bytes.Equal(out[:n], katGCMText) {
		return fmt.Errorf("%s unwraps to another key, %s: %w", mechanismName(pr.kwp), codeName(rv), ErrUnfit)
	}
	bad := slices.Clone(katKWPBlob)
	bad[0] ^= 1
	if k, rv := s.t.lib.unwrap(s.session, pr.kwp, wrapping, bad, residentTemplate(pr, UseGCM)); rv == ckrOK {
		s.made = append(s.made, k)
		return fmt.Errorf("%s accepts a changed blob: %w", mechanismName(pr.kwp), ErrUnfit)
	}
	return s.renew()
}

// bounds tries what a process that holds the PIN could try against a sealed
// MEK: each must be refused.
func (s *selfTester) bounds() error {
	pr, lib := s.t.profile, s.t.lib
	mek, rv := lib.generate(s.session, pkcs11.CKM_AES_KEY_GEN,
		join(aes(false, false), template{number(pkcs11.CKA_VALUE_LEN, 32)}, mekUse(pr.kwp, Sealed), fixed()))
	if rv != ckrOK {
		return fmt.Errorf("generate: %w: %w", newFault(callGenerate, rv), ErrUnfit)
	}
	s.made = append(s.made, mek)
	transient, rv := lib.generate(s.session, pkcs11.CKM_AES_KEY_GEN, transientNew(pr))
	if rv != ckrOK {
		return fmt.Errorf("generate: %w: %w", newFault(callGenerate, rv), ErrUnfit)
	}
	s.made = append(s.made, transient)
	blob := make([]byte, 64)
	n, rv := lib.wrap(s.session, pr.kwp, mek, transient, blob)
	if rv != ckrOK {
		return fmt.Errorf("a sealed MEK does not wrap: %w: %w", newFault(callWrap, rv), ErrUnfit)
	}
	blob = blob[:n]
	resident, rv := lib.unwrap(s.session, pr.kwp, mek, blob, residentTemplate(pr, UseGCM))
	if rv != ckrOK {
		return fmt.Errorf("a sealed MEK does not unwrap: %w: %w", newFault(callUnwrap, rv), ErrUnfit)
	}
	s.made = append(s.made, resident)

	out := make([]byte, 64)
	if _, rv := lib.wrap(s.session, pr.kwp, mek, resident, out); rv == ckrOK {
		return fmt.Errorf("wraps a key that is not extractable: %w", ErrUnfit)
	}
	if k, rv := lib.unwrap(s.session, pr.kwp, mek, blob, transientAgain(pr)); rv == ckrOK {
		s.made = append(s.made, k)
		return fmt.Errorf("unwraps against the MEK's unwrap template: %w", ErrUnfit)
	}
	if _, rv := lib.wrap(s.session, pkcs11.CKM_AES_CBC, mek, transient, out); rv == ckrOK {
		return fmt.Errorf("wraps by a mechanism that the MEK does not allow: %w", ErrUnfit)
	}
	if err := lib.p.SetAttributeValue(s.session, pkcs11.ObjectHandle(mek), []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_DECRYPT, true),
	}); err == nil {
		return fmt.Errorf("changes a key that is not modifiable: %w", ErrUnfit)
	}
	return s.renew()
}

// trusted finds out whether an untrusted key may wrap what asks for a trusted
// one. Whether a private key can be made trusted at all, only the profile knows.
func (s *selfTester) trusted() (bool, error) {
	pr, lib := s.t.profile, s.t.lib
	if !pr.trusted {
		return false, nil
	}
	mek, rv := lib.generate(s.session, pkcs11.CKM_AES_KEY_GEN,
		join(aes(false, false), template{number(pkcs11.CKA_VALUE_LEN, 32)}, mekUse(pr.kwp, Rotatable)))
	if rv != ckrOK {
		return false, newFault(callGenerate, rv)
	}
	s.made = append(s.made, mek)
	picky, rv := lib.generate(s.session, pkcs11.CKM_AES_KEY_GEN, transientNew(pr))
	if rv != ckrOK {
		return false, newFault(callGenerate, rv)
	}
	s.made = append(s.made, picky)
	_, rv = lib.wrap(s.session, pr.kwp, mek, picky, make([]byte, 64))
	return rv != ckrOK, s.renew()
}

// renew opens the session again, which takes the keys of the tests with it.
func (s *selfTester) renew() error {
	s.made = nil
	s.closeSession()
	return s.openSession()
}
