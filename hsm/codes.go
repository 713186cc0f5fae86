package hsm

import (
	"fmt"

	"github.com/miekg/pkcs11"
)

// Return codes by number, because a library's table of texts has gaps.
const (
	ckrOK               = 0x0
	ckrGeneralError     = 0x5
	ckrFunctionFailed   = 0x6
	ckrInitialized      = 0x191
	ckrLoggedIn         = 0x100
	ckrTypeInvalid      = 0x12
	ckrValueInvalid     = 0x13
	ckrMechanismInvalid = 0x70
	ckrTemplateMismatch = 0xD1

	ckrObjectHandleInvalid = 0x82
)

// Mechanisms. ckmAESKeyWrapKWP is of PKCS#11 3.0 and unknown to older headers.
const (
	ckmAESKeyWrapPad = 0x210A
	ckmAESKeyWrapKWP = 0x210B
)

var codeNames = map[uint]string{
	0x0: "OK", 0x1: "CANCEL", 0x2: "HOST_MEMORY", 0x3: "SLOT_ID_INVALID", 0x5: "GENERAL_ERROR",
	0x6: "FUNCTION_FAILED", 0x7: "ARGUMENTS_BAD", 0x8: "NO_EVENT", 0x9: "NEED_TO_CREATE_THREADS",
	0xA: "CANT_LOCK", 0x10: "ATTRIBUTE_READ_ONLY", 0x11: "ATTRIBUTE_SENSITIVE",
	0x12: "ATTRIBUTE_TYPE_INVALID", 0x13: "ATTRIBUTE_VALUE_INVALID", 0x1B: "ACTION_PROHIBITED",
	0x20: "DATA_INVALID", 0x21: "DATA_LEN_RANGE", 0x30: "DEVICE_ERROR", 0x31: "DEVICE_MEMORY",
	0x32: "DEVICE_REMOVED", 0x40: "ENCRYPTED_DATA_INVALID", 0x41: "ENCRYPTED_DATA_LEN_RANGE",
	0x50: "FUNCTION_CANCELED", 0x51: "FUNCTION_NOT_PARALLEL", 0x54: "FUNCTION_NOT_SUPPORTED",
	0x60: "KEY_HANDLE_INVALID", 0x62: "KEY_SIZE_RANGE", 0x63: "KEY_TYPE_INCONSISTENT",
	0x64: "KEY_NOT_NEEDED", 0x65: "KEY_CHANGED", 0x66: "KEY_NEEDED", 0x67: "KEY_INDIGESTIBLE",
	0x68: "KEY_FUNCTION_NOT_PERMITTED", 0x69: "KEY_NOT_WRAPPABLE", 0x6A: "KEY_UNEXTRACTABLE",
	0x70: "MECHANISM_INVALID", 0x71: "MECHANISM_PARAM_INVALID", 0x82: "OBJECT_HANDLE_INVALID",
	0x90: "OPERATION_ACTIVE", 0x91: "OPERATION_NOT_INITIALIZED", 0xA0: "PIN_INCORRECT",
	0xA1: "PIN_INVALID", 0xA2: "PIN_LEN_RANGE", 0xA3: "PIN_EXPIRED", 0xA4: "PIN_LOCKED",
	0xB0: "SESSION_CLOSED", 0xB1: "SESSION_COUNT", 0xB3: "SESSION_HANDLE_INVALID",
	0xB4: "SESSION_PARALLEL_NOT_SUPPORTED", 0xB5: "SESSION_READ_ONLY", 0xB6: "SESSION_EXISTS",
	0xB7: "SESSION_READ_ONLY_EXISTS", 0xB8: "SESSION_READ_WRITE_SO_EXISTS",
	0xC0: "SIGNATURE_INVALID", 0xC1: "SIGNATURE_LEN_RANGE", 0xD0: "TEMPLATE_INCOMPLETE",
	0xD1: "TEMPLATE_INCONSISTENT", 0xE0: "TOKEN_NOT_PRESENT", 0xE1: "TOKEN_NOT_RECOGNIZED",
	0xE2: "TOKEN_WRITE_PROTECTED", 0xF0: "UNWRAPPING_KEY_HANDLE_INVALID",
	0xF1: "UNWRAPPING_KEY_SIZE_RANGE", 0xF2: "UNWRAPPING_KEY_TYPE_INCONSISTENT",
	0x100: "USER_ALREADY_LOGGED_IN", 0x101: "USER_NOT_LOGGED_IN", 0x102: "USER_PIN_NOT_INITIALIZED",
	0x103: "USER_TYPE_INVALID", 0x104: "USER_ANOTHER_ALREADY_LOGGED_IN", 0x105: "USER_TOO_MANY_TYPES",
	0x110: "WRAPPED_KEY_INVALID", 0x112: "WRAPPED_KEY_LEN_RANGE", 0x113: "WRAPPING_KEY_HANDLE_INVALID",
	0x114: "WRAPPING_KEY_SIZE_RANGE", 0x115: "WRAPPING_KEY_TYPE_INCONSISTENT",
	0x120: "RANDOM_SEED_NOT_SUPPORTED", 0x121: "RANDOM_NO_RNG", 0x130: "DOMAIN_PARAMS_INVALID",
	0x140: "CURVE_NOT_SUPPORTED", 0x150: "BUFFER_TOO_SMALL", 0x160: "SAVED_STATE_INVALID",
	0x190: "CRYPTOKI_NOT_INITIALIZED", 0x191: "CRYPTOKI_ALREADY_INITIALIZED",
	0x1A0: "MUTEX_BAD", 0x1A1: "MUTEX_NOT_LOCKED", 0x200: "FUNCTION_REJECTED",
}

// codeName spells a return code as the standard does, with its number.
func codeName(code uint) string {
	if name := codeNames[code]; name != "" {
		return fmt.Sprintf("CKR_%s (0x%X)", name, code)
	}
	if code >= 0x80000000 {
		return fmt.Sprintf("vendor code 0x%X", code)
	}
	return fmt.Sprintf("unknown code 0x%X", code)
}

// mechanismNames has the mechanisms that the self-test asks for.
var mechanismNames = map[uint]string{
	ckmAESKeyWrapPad:           "AES_KEY_WRAP_PAD",
	ckmAESKeyWrapKWP:           "AES_KEY_WRAP_KWP",
	pkcs11.CKM_AES_GCM:         "AES_GCM",
	pkcs11.CKM_AES_CMAC:        "AES_CMAC",
	pkcs11.CKM_AES_KEY_GEN:     "AES_KEY_GEN",
	pkcs11.CKM_EC_KEY_PAIR_GEN: "EC_KEY_PAIR_GEN",
	pkcs11.CKM_ECDSA:           "ECDSA",
	ckmECEdwardsKeyPairGen:     "EC_EDWARDS_KEY_PAIR_GEN",
	ckmEDDSA:                   "EDDSA",
}

func mechanismName(m uint) string {
	if name := mechanismNames[m]; name != "" {
		return fmt.Sprintf("CKM_%s (0x%X)", name, m)
	}
	return fmt.Sprintf("mechanism 0x%X", m)
}

// attributeNames has the attributes that templates set and evidence shows.
var attributeNames = map[uint]string{
	pkcs11.CKA_CLASS: "class", pkcs11.CKA_KEY_TYPE: "key_type", pkcs11.CKA_VALUE_LEN: "value_len",
	pkcs11.CKA_LABEL: "label", pkcs11.CKA_ID: "id", pkcs11.CKA_TOKEN: "token",
	pkcs11.CKA_PRIVATE: "private", pkcs11.CKA_SENSITIVE: "sensitive",
	pkcs11.CKA_EXTRACTABLE: "extractable", pkcs11.CKA_ALWAYS_SENSITIVE: "always_sensitive",
	pkcs11.CKA_NEVER_EXTRACTABLE: "never_extractable", pkcs11.CKA_LOCAL: "local",
	pkcs11.CKA_WRAP: "wrap", pkcs11.CKA_UNWRAP: "unwrap", pkcs11.CKA_ENCRYPT: "encrypt",
	pkcs11.CKA_DECRYPT: "decrypt", pkcs11.CKA_SIGN: "sign", pkcs11.CKA_VERIFY: "verify",
	pkcs11.CKA_SIGN_RECOVER: "sign_recover", pkcs11.CKA_VERIFY_RECOVER: "verify_recover",
	pkcs11.CKA_DERIVE: "derive", pkcs11.CKA_MODIFIABLE: "modifiable", pkcs11.CKA_COPYABLE: "copyable",
	pkcs11.CKA_ALLOWED_MECHANISMS: "allowed_mechanisms", pkcs11.CKA_UNWRAP_TEMPLATE: "unwrap_template",
	pkcs11.CKA_WRAP_WITH_TRUSTED: "wrap_with_trusted", pkcs11.CKA_EC_PARAMS: "ec_params",
	pkcs11.CKA_START_DATE: "start_date", pkcs11.CKA_END_DATE: "end_date",
	pkcs11.CKA_VALUE: "value",
}

func attributeName(typ uint) string {
	if name := attributeNames[typ]; name != "" {
		return name
	}
	return fmt.Sprintf("attribute_0x%x", typ)
}
