/* One crossing per operation, buffers owned by the caller. Every function
 * returns a CKR_ code; an Init that succeeded is followed by its operation in
 * the same call, so a session never carries state from one call to the next
 * unless the operation itself failed. */
#ifndef HSM_SHIM_H
#define HSM_SHIM_H

#include "p11.h"

typedef struct {
	void *handle;
	ck_function_list *list;
} shim;

/* 0 if the module is loaded; else a malloc'ed sentence is left in *why. */
int shim_load(const char *path, shim *out, char **why);

ck_ulong shim_login(shim *s, ck_ulong session, ck_ulong user, ck_byte *pin, ck_ulong len);
ck_ulong shim_init_token(shim *s, ck_ulong slot, ck_byte *pin, ck_ulong len, ck_byte *label32);
ck_ulong shim_init_pin(shim *s, ck_ulong session, ck_byte *pin, ck_ulong len);
ck_ulong shim_random(shim *s, ck_ulong session, ck_byte *out, ck_ulong len);

ck_ulong shim_gcm_encrypt(shim *s, ck_ulong session, ck_ulong key, ck_byte *iv,
	ck_byte *aad, ck_ulong aad_len, ck_byte *in, ck_ulong in_len, ck_byte *out, ck_ulong *out_len);
ck_ulong shim_gcm_decrypt(shim *s, ck_ulong session, ck_ulong key, ck_byte *iv,
	ck_byte *aad, ck_ulong aad_len, ck_byte *in, ck_ulong in_len, ck_byte *out, ck_ulong *out_len);
ck_ulong shim_sign(shim *s, ck_ulong session, ck_ulong mechanism, ck_ulong key,
	ck_byte *in, ck_ulong in_len, ck_byte *out, ck_ulong *out_len);

ck_ulong shim_wrap(shim *s, ck_ulong session, ck_ulong mechanism, ck_ulong by, ck_ulong key,
	ck_byte *out, ck_ulong *out_len);
ck_ulong shim_unwrap(shim *s, ck_ulong session, ck_ulong mechanism, ck_ulong by,
	ck_byte *in, ck_ulong in_len, ck_attribute *tpl, ck_ulong n, ck_ulong *key);

ck_ulong shim_create(shim *s, ck_ulong session, ck_attribute *tpl, ck_ulong n, ck_ulong *key);
ck_ulong shim_generate(shim *s, ck_ulong session, ck_ulong mechanism,
	ck_attribute *tpl, ck_ulong n, ck_ulong *key);
ck_ulong shim_generate_pair(shim *s, ck_ulong session, ck_ulong mechanism,
	ck_attribute *pub, ck_ulong npub, ck_attribute *priv, ck_ulong npriv,
	ck_ulong *pubkey, ck_ulong *privkey);

/* Reads a nested attribute array: *count is the room in out, then the number
 * found; values has room for stride bytes for each. The types in out say what
 * is expected: SoftHSM looks them up, where the standard has them overwritten. */
ck_ulong shim_nested(shim *s, ck_ulong session, ck_ulong object, ck_ulong type,
	ck_attribute *out, ck_ulong *count, ck_byte *values, ck_ulong stride);

#endif
