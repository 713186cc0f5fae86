/* The part of the PKCS#11 2.40 C interface (OASIS, Unix ABI: no packing) that
 * the shim needs. The function list is addressed by position, so that no
 * header of a module vendor is needed to build. */
#ifndef HSM_P11_H
#define HSM_P11_H

typedef unsigned long ck_ulong;
typedef unsigned char ck_byte;

typedef struct {
	ck_ulong type;
	void *value;
	ck_ulong len;
} ck_attribute;

typedef struct {
	ck_ulong mechanism;
	void *parameter;
	ck_ulong len;
} ck_mechanism;

typedef struct {
	ck_byte *iv;
	ck_ulong iv_len;
	ck_ulong iv_bits;
	ck_byte *aad;
	ck_ulong aad_len;
	ck_ulong tag_bits;
} ck_gcm_params;

enum {
	fn_Initialize, fn_Finalize, fn_GetInfo, fn_GetFunctionList,
	fn_GetSlotList, fn_GetSlotInfo, fn_GetTokenInfo,
	fn_GetMechanismList, fn_GetMechanismInfo,
	fn_InitToken, fn_InitPIN, fn_SetPIN,
	fn_OpenSession, fn_CloseSession, fn_CloseAllSessions, fn_GetSessionInfo,
	fn_GetOperationState, fn_SetOperationState, fn_Login, fn_Logout,
	fn_CreateObject, fn_CopyObject, fn_DestroyObject, fn_GetObjectSize,
	fn_GetAttributeValue, fn_SetAttributeValue,
	fn_FindObjectsInit, fn_FindObjects, fn_FindObjectsFinal,
	fn_EncryptInit, fn_Encrypt, fn_EncryptUpdate, fn_EncryptFinal,
	fn_DecryptInit, fn_Decrypt, fn_DecryptUpdate, fn_DecryptFinal,
	fn_DigestInit, fn_Digest, fn_DigestUpdate, fn_DigestKey, fn_DigestFinal,
	fn_SignInit, fn_Sign, fn_SignUpdate, fn_SignFinal,
	fn_SignRecoverInit, fn_SignRecover,
	fn_VerifyInit, fn_Verify, fn_VerifyUpdate, fn_VerifyFinal,
	fn_VerifyRecoverInit, fn_VerifyRecover,
	fn_DigestEncryptUpdate, fn_DecryptDigestUpdate,
	fn_SignEncryptUpdate, fn_DecryptVerifyUpdate,
	fn_GenerateKey, fn_GenerateKeyPair, fn_WrapKey, fn_UnwrapKey, fn_DeriveKey,
	fn_SeedRandom, fn_GenerateRandom, fn_GetFunctionStatus, fn_CancelFunction,
	fn_WaitForSlotEvent,
	fn_count
};

typedef struct {
	ck_byte major, minor;
	void *fn[fn_count];
} ck_function_list;

#endif
