/* A PKCS#11 module that forwards to another one and does damage on the way, as
 * a control block in a shared file says: delays, hangs, return codes instead of
 * or after the call, and counts. For tests only.
 *
 * FAULT_MODULE   path of the real module
 * FAULT_CONTROL  path of the control file
 *
 * Both are read at each C_Initialize. Every function of PKCS#11 2.40 takes at
 * most eight arguments of register size, so one wrapper shape serves for all.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

typedef unsigned long word;
typedef word (*fn8)(word, word, word, word, word, word, word, word);

#define FUNCTIONS(X) \
	X(Initialize) X(Finalize) X(GetInfo) X(GetFunctionList) X(GetSlotList) X(GetSlotInfo) \
	X(GetTokenInfo) X(GetMechanismList) X(GetMechanismInfo) X(InitToken) X(InitPIN) X(SetPIN) \
	X(OpenSession) X(CloseSession) X(CloseAllSessions) X(GetSessionInfo) X(GetOperationState) \
	X(SetOperationState) X(Login) X(Logout) X(CreateObject) X(CopyObject) X(DestroyObject) \
	X(GetObjectSize) X(GetAttributeValue) X(SetAttributeValue) X(FindObjectsInit) X(FindObjects) \
	X(FindObjectsFinal) X(EncryptInit) X(Encrypt) X(EncryptUpdate) X(EncryptFinal) X(DecryptInit) \
	X(Decrypt) X(DecryptUpdate) X(DecryptFinal) X(DigestInit) X(Digest) X(DigestUpdate) X(DigestKey) \
	X(DigestFinal) X(SignInit) X(Sign) X(SignUpdate) X(SignFinal) X(SignRecoverInit) X(SignRecover) \
	X(VerifyInit) X(Verify) X(VerifyUpdate) X(VerifyFinal) X(VerifyRecoverInit) X(VerifyRecover) \
	X(DigestEncryptUpdate) X(DecryptDigestUpdate) X(SignEncryptUpdate) X(DecryptVerifyUpdate) \
	X(GenerateKey) X(GenerateKeyPair) X(WrapKey) X(UnwrapKey) X(DeriveKey) X(SeedRandom) \
	X(GenerateRandom) X(GetFunctionStatus) X(CancelFunction) X(WaitForSlotEvent)

enum {
#define X(name) at_##name,
	FUNCTIONS(X)
#undef X
	functions
};

/* One per function; the Go side has the same layout. */
struct rule {
	volatile uint64_t calls;    /* counted by the shim */
	volatile uint64_t delay_ns; /* before each call */
	volatile uint64_t hang;     /* calls wait while it is not 0 */
	volatile uint64_t hanging;  /* calls that wait, counted by the shim */
	volatile uint64_t code;     /* returned for the next `times` calls */
	volatile uint64_t times;
	volatile uint64_t after;    /* 1: the call is made all the same */
	volatile uint64_t skip;     /* calls to let pass first */
};

static struct {
	unsigned char version[2];
	fn8 fn[functions];
} *real, list;

static struct rule *rules;

static void nap(uint64_t ns)
{
	struct timespec t = {ns / 1000000000, ns % 1000000000};
	nanosleep(&t, NULL);
}

/* Takes one off a counter, unless it is zero. */
static int take(volatile uint64_t *counter)
{
	uint64_t n = __atomic_load_n(counter, __ATOMIC_SEQ_CST);
	while (n > 0)
		if (__atomic_compare_exchange_n(counter, &n, n - 1, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
			return 1;
	return 0;
}

static int load(void)
{
	const char *module = getenv("FAULT_MODULE"), *control = getenv("FAULT_CONTROL");
	word (*get)(void *);
	void *handle, *mem;
	int fd;

	if (!module || !control || !(handle = dlopen(module, RTLD_NOW | RTLD_LOCAL)))
		return -1;
	*(void **)&get = dlsym(handle, "C_GetFunctionList");
	if (!get || get(&real) != 0 || (fd = open(control, O_RDWR)) < 0)
		return -1;
	mem = mmap(NULL, sizeof(struct rule) * functions, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	close(fd);
	if (mem == MAP_FAILED)
		return -1;
	rules = mem; /* an older map stays: a hanging call may still read it */
	return 0;
}

static word call(int at, word a, word b, word c, word d, word e, word f, word g, word h)
{
	struct rule *r;
	word rv;

	if (at == at_Initialize && load() != 0)
		return 0x5;
	if (!real || !rules)
		return 0x190; /* CKR_CRYPTOKI_NOT_INITIALIZED */
	r = &rules[at];
	__atomic_add_fetch(&r->calls, 1, __ATOMIC_SEQ_CST);
	if (r->delay_ns)
		nap(r->delay_ns);
	if (r->hang) {
		__atomic_add_fetch(&r->hanging, 1, __ATOMIC_SEQ_CST);
		while (r->hang)
			nap(1000000);
		__atomic_sub_fetch(&r->hanging, 1, __ATOMIC_SEQ_CST);
	}
	if (!r->times || take(&r->skip) || !take(&r->times))
		return real->fn[at](a, b, c, d, e, f, g, h);
	if (r->after) {
		rv = real->fn[at](a, b, c, d, e, f, g, h);
		if (rv != 0)
			return rv;
	}
	return r->code;
}

#define X(name) \
	static word w_##name(word a, word b, word c, word d, word e, word f, word g, word h) \
	{ \
		return call(at_##name, a, b, c, d, e, f, g, h); \
	}
FUNCTIONS(X)
#undef X

word C_GetFunctionList(void **out)
{
	list.version[0] = 2;
	list.version[1] = 40;
#define X(name) list.fn[at_##name] = w_##name;
	FUNCTIONS(X)
#undef X
	list.fn[at_GetFunctionList] = (fn8)(void *)C_GetFunctionList;
	*out = &list;
	return 0;
}
