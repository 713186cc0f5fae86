#include "shim.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

/* CKR_FUNCTION_NOT_SUPPORTED, for a position that a module left empty. */
#define NOT_SUPPORTED 0x54UL
#define CKM_AES_GCM 0x1087UL

typedef ck_ulong rv;

#define CALL(type, index, ...) \
	(s->list->fn[index] ? ((type)s->list->fn[index])(__VA_ARGS__) : NOT_SUPPORTED)

typedef rv (*f_get_list)(ck_function_list **);
typedef rv (*f_login)(ck_ulong, ck_ulong, ck_byte *, ck_ulong);
typedef rv (*f_init_token)(ck_ulong, ck_byte *, ck_ulong, ck_byte *);
typedef rv (*f_bytes)(ck_ulong, ck_byte *, ck_ulong);
typedef rv (*f_init)(ck_ulong, ck_mechanism *, ck_ulong);
typedef rv (*f_crypt)(ck_ulong, ck_byte *, ck_ulong, ck_byte *, ck_ulong *);
typedef rv (*f_wrap)(ck_ulong, ck_mechanism *, ck_ulong, ck_ulong, ck_byte *, ck_ulong *);
typedef rv (*f_unwrap)(ck_ulong, ck_mechanism *, ck_ulong, ck_byte *, ck_ulong,
	ck_attribute *, ck_ulong, ck_ulong *);
typedef rv (*f_create)(ck_ulong, ck_attribute *, ck_ulong, ck_ulong *);
typedef rv (*f_generate)(ck_ulong, ck_mechanism *, ck_attribute *, ck_ulong, ck_ulong *);
typedef rv (*f_generate_pair)(ck_ulong, ck_mechanism *, ck_attribute *, ck_ulong,
	ck_attribute *, ck_ulong, ck_ulong *, ck_ulong *);
typedef rv (*f_attributes)(ck_ulong, ck_ulong, ck_attribute *, ck_ulong);

static char *copy_of(const char *text)
{
	return strdup(text ? text : "unknown reason");
}

int shim_load(const char *path, shim *out, char **why)
{
	f_get_list get;

	/* The same instance as any other dlopen of this path; never closed, because
	 * a module's threads and exit handlers may outlive its last user. */
	out->handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
	if (!out->handle) {
		*why = copy_of(dlerror());
		return -1;
	}
	*(void **)&get = dlsym(out->handle, "C_GetFunctionList");
	if (!get) {
		*why = copy_of("it has no C_GetFunctionList");
		return -1;
	}
	if (get(&out->list) != 0 || !out->list) {
		*why = copy_of("C_GetFunctionList gave no list");
		return -1;
	}
	return 0;
}

rv shim_login(shim *s, ck_ulong session, ck_ulong user, ck_byte *pin, ck_ulong len)
{
	return CALL(f_login, fn_Login, session, user, pin, len);
}

rv shim_init_token(shim *s, ck_ulong slot, ck_byte *pin, ck_ulong len, ck_byte *label32)
{
	return CALL(f_init_token, fn_InitToken, slot, pin, len, label32);
}

rv shim_init_pin(shim *s, ck_ulong session, ck_byte *pin, ck_ulong len)
{
	return CALL(f_bytes, fn_InitPIN, session, pin, len);
}

rv shim_random(shim *s, ck_ulong session, ck_byte *out, ck_ulong len)
{
	return CALL(f_bytes, fn_GenerateRandom, session, out, len);
}

/* The one place where GCM parameters are made: 96-bit IV, 128-bit tag. */
static rv gcm(shim *s, int init, int op, ck_ulong session, ck_ulong key, ck_byte *iv,
	ck_byte *aad, ck_ulong aad_len, ck_byte *in, ck_ulong in_len, ck_byte *out, ck_ulong *out_len)
{
	ck_gcm_params params = {iv, 12, 96, aad, aad_len, 128};
	ck_mechanism mechanism = {CKM_AES_GCM, &params, sizeof params};
	rv r = CALL(f_init, init, session, &mechanism, key);

	if (r != 0)
		return r;
	return CALL(f_crypt, op, session, in, in_len, out, out_len);
}

rv shim_gcm_encrypt(shim *s, ck_ulong session, ck_ulong key, ck_byte *iv,
	ck_byte *aad, ck_ulong aad_len, ck_byte *in, ck_ulong in_len, ck_byte *out, ck_ulong *out_len)
{
	return gcm(s, fn_EncryptInit, fn_Encrypt, session, key, iv, aad, aad_len, in, in_len, out, out_len);
}

rv shim_gcm_decrypt(shim *s, ck_ulong session, ck_ulong key, ck_byte *iv,
	ck_byte *aad, ck_ulong aad_len, ck_byte *in, ck_ulong in_len, ck_byte *out, ck_ulong *out_len)
{
	return gcm(s, fn_DecryptInit, fn_Decrypt, session, key, iv, aad, aad_len, in, in_len, out, out_len);
}

rv shim_sign(shim *s, ck_ulong session, ck_ulong mechanism, ck_ulong key,
	ck_byte *in, ck_ulong in_len, ck_byte *out, ck_ulong *out_len)
{
	ck_mechanism m = {mechanism, NULL, 0};
	rv r = CALL(f_init, fn_SignInit, session, &m, key);

	if (r != 0)
		return r;
	return CALL(f_crypt, fn_Sign, session, in, in_len, out, out_len);
}

rv shim_wrap(shim *s, ck_ulong session, ck_ulong mechanism, ck_ulong by, ck_ulong key,
	ck_byte *out, ck_ulong *out_len)
{
	ck_mechanism m = {mechanism, NULL, 0};

	return CALL(f_wrap, fn_WrapKey, session, &m, by, key, out, out_len);
}

rv shim_unwrap(shim *s, ck_ulong session, ck_ulong mechanism, ck_ulong by,
	ck_byte *in, ck_ulong in_len, ck_attribute *tpl, ck_ulong n, ck_ulong *key)
{
	ck_mechanism m = {mechanism, NULL, 0};

	return CALL(f_unwrap, fn_UnwrapKey, session, &m, by, in, in_len, tpl, n, key);
}

rv shim_create(shim *s, ck_ulong session, ck_attribute *tpl, ck_ulong n, ck_ulong *key)
{
	return CALL(f_create, fn_CreateObject, session, tpl, n, key);
}

rv shim_generate(shim *s, ck_ulong session, ck_ulong mechanism,
	ck_attribute *tpl, ck_ulong n, ck_ulong *key)
{
	ck_mechanism m = {mechanism, NULL, 0};

	return CALL(f_generate, fn_GenerateKey, session, &m, tpl, n, key);
}

rv shim_generate_pair(shim *s, ck_ulong session, ck_ulong mechanism,
	ck_attribute *pub, ck_ulong npub, ck_attribute *priv, ck_ulong npriv,
	ck_ulong *pubkey, ck_ulong *privkey)
{
	ck_mechanism m = {mechanism, NULL, 0};

	return CALL(f_generate_pair, fn_GenerateKeyPair, session, &m, pub, npub, priv, npriv, pubkey, privkey);
}

rv shim_nested(shim *s, ck_ulong session, ck_ulong object, ck_ulong type,
	ck_attribute *out, ck_ulong *count, ck_byte *values, ck_ulong stride)
{
	ck_attribute probe = {type, NULL, 0}, full = {type, out, 0};
	ck_ulong i, n;
	rv r = CALL(f_attributes, fn_GetAttributeValue, session, object, &probe, 1);

	if (r != 0)
		return r;
	if (probe.len == (ck_ulong)-1 || probe.len % sizeof(ck_attribute) != 0)
		return 0x12UL; /* CKR_ATTRIBUTE_TYPE_INVALID */
	n = probe.len / sizeof(ck_attribute);
	if (n > *count)
		return 0x150UL; /* CKR_BUFFER_TOO_SMALL */
	for (i = 0; i < n; i++) {
		out[i].value = values + i * stride;
		out[i].len = stride;
	}
	full.len = probe.len;
	*count = n;
	if (n == 0)
		return 0;
	return CALL(f_attributes, fn_GetAttributeValue, session, object, &full, 1);
}
