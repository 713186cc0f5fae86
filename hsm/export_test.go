package hsm

// Tests of the tables that decide, which have no door of their own.

// Classified is what the package makes of a return code.
func Classified(c string, code uint) (err error, lost, retried bool) {
	f := newFault(call(c), code)
	return f, hasClass(f, classLost), hasClass(f, classSession)
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
