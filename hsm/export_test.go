package hsm

import "context"

// Tests of the tables that decide, which have no door of their own.

// Classified is what the package makes of a return code.
func Classified(c string, code uint) (lost, retried bool, err error) {
	f := newFault(call(c), code)
	return hasClass(f, classLost), hasClass(f, classSession), f
}

// CodeName is the name of a code in messages.
func CodeName(code uint) string { return codeName(code) }

// KnownAnswers are those of the self-test.
func KnownAnswers() map[string][]byte {
	return map[string][]byte{
		"gcm key": katGCMKey, "gcm iv": katGCMIV[:], "gcm aad": katGCMAAD, "gcm text": katGCMText, "gcm seal": katGCMSeal,
		"cmac key": katCMACKey, "cmac text": katCMACText, "cmac": katCMAC,
		"kwp key": katKWPKey, "kwp blob": katKWPBlob,
	}
}

// MayLogin is the decision on the flags of a token.
func MayLogin(flags uint) error { return mayLogin(flags) }

// OpenInline is Key.Open on the caller's own thread, without the hand-over to
// the worker: what the hand-over costs is the difference to Open.
func (k *Key) OpenInline(ctx context.Context, iv [IVSize]byte, ct, dst []byte) (int, error) {
	w, err := k.take(ctx)
	if err != nil {
		return 0, err
	}
	defer w.release()
	w.iv, w.inLen = iv, copy(w.in, ct)
	if err := w.openSession(); err != nil {
		return 0, err
	}
	err = runOpen(w)
	return copy(dst, w.out[:w.n]), err
}
