/* What the kernel tests call through ctypes: one kernel of one set, plainly or between guard pages,
 * and a few loops over functions that take one number. Built by tests/engine/kernel_lib.py;
 * HS_TEST_CPU where the fast sets are linked in.
 */
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

#include "backend/check.h"
#include "core/crc32.h"
#include "core/math.h"
#include "core/rng.h"
#include "core/threads.h"
#include "kernels/deferred.h"
#include "kernels/kernels.h"

const hs_kernel_set *hs_test_set(const char *name);
int hs_test_has_set(const char *name);
const char *hs_test_pick(uint32_t path);
int hs_kernel_call(const char *set_name, uint32_t kernel, uint32_t dtype, void *const *ptrs,
                   const int64_t *dims, const double *reals, int threads);
int hs_kernel_calls_deferred(const char *set_name, int count, const uint32_t *kernels,
                             const uint32_t *dtypes, void *const *ptrs, const int64_t *dims,
                             const double *reals, int threads, const uint8_t *watched, size_t bytes,
                             uint8_t *seen);
int hs_kernel_call_guarded(const char *set_name, uint32_t kernel, uint32_t dtype, void *const *ptrs,
                           const uint64_t *bytes, const int64_t *dims, const double *reals,
                           int threads, int at_end);
int hs_test_check(const char *set_name, int threads, uint8_t *arena, size_t bytes, int wrong_call,
                  double *gflops, char text[768]);
int hs_test_map(const char *function, const double *x, const double *y, double *out, int64_t n);
int hs_test_wide_after_crc32(int way, const void *data, size_t bytes);
void hs_test_philox(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]);
void hs_test_normals(uint64_t seed, uint32_t tensor, uint32_t use, uint64_t first, int64_t n,
                     double *out);

/* NULL: no such set in this library, or this CPU lacks it. */
const hs_kernel_set *hs_test_set(const char *name) {
    if (!strcmp(name, "ref")) return &hs_kernels_ref;
#ifdef HS_TEST_CPU
    static const uint32_t paths[] = {HS_PATH_PORTABLE, HS_PATH_AVX2, HS_PATH_AVX512,
                                     HS_PATH_AVX512_BF16, HS_PATH_NEON};
    for (size_t i = 0; i < sizeof paths / sizeof paths[0]; i++)
        if (!strcmp(name, hs_kernel_path_name(paths[i]))) {
            const hs_kernel_set *set = NULL;
            (void)hs_kernels_pick(paths[i], &set, NULL);
            return set;
        }
#endif
    return NULL;
}

int hs_test_has_set(const char *name) {
    return hs_test_set(name) != NULL;
}

/* 1: the upper halves of vector registers are in use after a CRC-32 although they were not before, 0: they are not,
 * -1: this CPU does not tell, or has not these instructions. */
int hs_test_wide_after_crc32(int way, const void *data, size_t bytes) {
#if defined(__x86_64__)
    uint32_t a, b, c, d, low, high, crc = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE) || !(c & bit_AVX)) return -1;
    if (!__get_cpuid_count(13, 1, &a, &b, &c, &d) || !(a & 4)) return -1;
    __asm__ volatile("vzeroupper" ::: "memory");
    if (!hs_crc32_by(way, &crc, NULL, data, bytes)) return -1;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(1) : "memory");
    return (low & 0x44) != 0; /* YMM's halves, ZMM's */
#else
    (void)way, (void)data, (void)bytes;
    return -1;
#endif
}

/* The name of what hs_kernels_pick gives, or why it gives none. */
const char *hs_test_pick(uint32_t path) {
#ifdef HS_TEST_CPU
    static hs_why why;
    const hs_kernel_set *set = NULL;
    why = (hs_why){0};
    return hs_kernels_pick(path, &set, &why) == HS_OK ? set->name : why.text;
#else
    (void)path;
    return NULL;
#endif
}

#ifdef HS_TEST_CPU
/* At least so many bytes, full of NaN: nothing may be read before it is written. Kept from call to
 * call, because a call may end by a fault, which frees nothing. */
static void *scratch_of(size_t bytes) {
    static void *kept;
    static size_t kept_bytes;
    if (kept_bytes < bytes) {
        free(kept);
        kept = aligned_alloc(64, bytes);
        kept_bytes = kept ? bytes : 0;
    }
    if (kept) memset(kept, 0xff, bytes);
    return kept;
}
#endif

/* The kernel's status; 1 no such set or kernel, 2 no memory or threads. */
int hs_kernel_call(const char *set_name, uint32_t kernel, uint32_t dtype, void *const *ptrs,
                   const int64_t *dims, const double *reals, int threads) {
    const hs_kernel_set *set = hs_test_set(set_name);
    if (!set || kernel == 0 || kernel >= HS_K_COUNT || !set->fn[kernel]) return 1;
    hs_args args = {.dtype = dtype};
    memcpy(args.ptr, ptrs, sizeof args.ptr);
    memcpy(args.dim, dims, sizeof args.dim);
    memcpy(args.real, reals, sizeof args.real);
    hs_kernel_ctx ctx = {0};
#ifdef HS_TEST_CPU
    ctx.scratch_bytes = (hs_kernels_scratch_bytes(threads) + 63) / 64 * 64;
    ctx.scratch = scratch_of(ctx.scratch_bytes + 64);
    if (!ctx.scratch) return 2;
#endif
    int rc = 2;
    if (threads == 1 || hs_pool_create(threads, &ctx.pool) == HS_OK) {
        rc = set->fn[kernel](&ctx, &args);
        hs_pool_destroy(ctx.pool);
    }
    return rc;
}

#ifdef HS_TEST_CPU
/* Calls in turn as a device makes them, whose AdamW waits (kernels/deferred.h); after each of them `watched`'s bytes go
 * to seen, behind those of the calls before, and in the end, when nothing waits any more, once more. */
int hs_kernel_calls_deferred(const char *set_name, int count, const uint32_t *kernels,
                             const uint32_t *dtypes, void *const *ptrs, const int64_t *dims,
                             const double *reals, int threads, const uint8_t *watched, size_t bytes,
                             uint8_t *seen) {
    const hs_kernel_set *set = hs_test_set(set_name);
    hs_kernel_ctx ctx = {.deferred = hs_deferred_create(threads)};
    ctx.scratch_bytes = (hs_kernels_scratch_bytes(threads) + 63) / 64 * 64;
    ctx.scratch = scratch_of(ctx.scratch_bytes + 64);
    int rc = !set ? 1 : !ctx.deferred || !ctx.scratch ? 2 : 0;
    if (rc == 0 && threads > 1) rc = hs_pool_create(threads, &ctx.pool);
    for (int i = 0; i < count && rc == 0; i++) {
        hs_args args = {.dtype = dtypes[i]};
        memcpy(args.ptr, ptrs + (size_t)i * HS_CALL_PTRS, sizeof args.ptr);
        memcpy(args.dim, dims + (size_t)i * HS_CALL_DIMS, sizeof args.dim);
        memcpy(args.real, reals + (size_t)i * HS_CALL_REALS, sizeof args.real);
        hs_deferred_before(ctx.deferred, ctx.pool, (uint16_t)kernels[i], &args);
        rc = set->fn[kernels[i]](&ctx, &args);
        memcpy(seen + (size_t)i * bytes, watched, bytes);
    }
    if (rc == 0) {
        hs_deferred_settle(ctx.deferred, ctx.pool, NULL, UINT64_MAX);
        memcpy(seen + (size_t)count * bytes, watched, bytes);
        rc = hs_deferred_none(ctx.deferred) ? 0 : 3;
    }
    hs_pool_destroy(ctx.pool);
    hs_deferred_destroy(ctx.deferred);
    return rc;
}
#endif

static sigjmp_buf leave;

static void on_fault(int signal_number) {
    siglongjmp(leave, signal_number);
}

/* In this process, one thread: a fault of the kernel comes back here. */
static int call_caught(const char *set_name, uint32_t kernel, uint32_t dtype, void *const *ptrs,
                       const int64_t *dims, const double *reals) {
    struct sigaction action = {.sa_handler = on_fault}, segv, bus;
    sigemptyset(&action.sa_mask);
    sigaction(SIGSEGV, &action, &segv); /* and not the test runner's fault handler */
    sigaction(SIGBUS, &action, &bus);
    int signal_number = sigsetjmp(leave, 1);
    int rc = signal_number ? 1000 + signal_number
                           : hs_kernel_call(set_name, kernel, dtype, ptrs, dims, reals, 1);
    sigaction(SIGSEGV, &segv, NULL);
    sigaction(SIGBUS, &bus, NULL);
    return rc;
}

/* In a child process: the fault may be another thread's. */
static int call_forked(const char *set_name, uint32_t kernel, uint32_t dtype, void *const *ptrs,
                       const int64_t *dims, const double *reals, int threads) {
    fflush(NULL);
    pid_t child = fork();
    if (child < 0) return 2;
    if (child == 0) {
        signal(SIGSEGV, SIG_DFL);
        signal(SIGBUS, SIG_DFL);
        _exit(-hs_kernel_call(set_name, kernel, dtype, ptrs, dims, reals, threads) & 0xff);
    }
    int status;
    if (waitpid(child, &status, 0) != child) return 2;
    return WIFSIGNALED(status) ? 1000 + WTERMSIG(status) : -(int)(signed char)WEXITSTATUS(status);
}

/* Every operand copied to its own pages with a page that may not be touched on either side, flush
 * with the one after it (at_end) or before it. Results are copied back. The kernel's status, or
 * 1000 + the signal that a touch raised. */
int hs_kernel_call_guarded(const char *set_name, uint32_t kernel, uint32_t dtype, void *const *ptrs,
                           const uint64_t *bytes, const int64_t *dims, const double *reals,
                           int threads, int at_end) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    char *map[HS_CALL_PTRS] = {0};
    size_t length[HS_CALL_PTRS] = {0};
    void *inside[HS_CALL_PTRS] = {0};
    int rc = 2;
    for (int i = 0; i < HS_CALL_PTRS; i++) {
        if (!ptrs[i]) continue;
        size_t room = (bytes[i] + page - 1) / page * page;
        length[i] = room + 2 * page;
        void *m = mmap(NULL, length[i], PROT_NONE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        if (m == MAP_FAILED) goto out;
        map[i] = m;
        if (mprotect(map[i] + page, room, PROT_READ | PROT_WRITE)) goto out;
        inside[i] = map[i] + page + (at_end ? room - bytes[i] : 0);
        memcpy(inside[i], ptrs[i], bytes[i]);
    }
    rc = threads == 1 ? call_caught(set_name, kernel, dtype, inside, dims, reals)
                      : call_forked(set_name, kernel, dtype, inside, dims, reals, threads);
    for (int i = 0; rc == 0 && i < HS_CALL_PTRS; i++)
        if (ptrs[i]) memcpy(ptrs[i], inside[i], bytes[i]);
out:
    for (int i = 0; i < HS_CALL_PTRS; i++)
        if (map[i]) munmap(map[i], length[i]);
    return rc;
}

/* out[i] = function(x[i]) or function(x[i], y[i]); 1: no such function. */
int hs_test_map(const char *function, const double *x, const double *y, double *out, int64_t n) {
    static const struct {
        const char *name;
        double (*one)(double);
    } table[] = {
        {"exp", hs_exp}, {"log", hs_log}, {"tanh", hs_tanh}, {"sin", hs_sin}, {"cos", hs_cos}};
    if (!strcmp(function, "pow")) {
        for (int64_t i = 0; i < n; i++) out[i] = hs_pow(x[i], y[i]);
        return 0;
    }
    for (size_t f = 0; f < sizeof table / sizeof table[0]; f++) {
        if (strcmp(function, table[f].name)) continue;
        for (int64_t i = 0; i < n; i++) out[i] = table[f].one(x[i]);
        return 0;
    }
    return 1;
}

void hs_test_philox(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
    hs_rng_key k = {key[0], key[1]};
    memcpy(out, counter, 4 * sizeof counter[0]);
    hs_philox4x32_10(out, k);
}

void hs_test_normals(uint64_t seed, uint32_t tensor, uint32_t use, uint64_t first, int64_t n,
                     double *out) {
    const hs_rng_key key = hs_rng_make_key(seed, tensor, use);
    for (int64_t i = 0; i < n; i++) out[i] = hs_rng_normal(key, first + (uint64_t)i);
}

/* --- backend/check.h: a core that computes wrongly --------------------------------------------------
 */

static const hs_kernel_set *sound;
static int calls_until_wrong;

static hs_status linear_of_a_sick_core(hs_kernel_ctx *ctx, const hs_args *args) {
    const hs_status status = sound->fn[HS_K_LINEAR_FWD](ctx, args);
    if (__atomic_fetch_sub(&calls_until_wrong, 1, __ATOMIC_SEQ_CST) == 1)
        ((uint32_t *)args->ptr[0])[args->dim[0] * args->dim[1] - 1] ^= 1; /* the last bit of all */
    return status;
}

/* hs_check_machine over these bytes. wrong_call: which product comes out wrong, counted from 1; 0:
 * none does. The status, or 1 where there is no such set and 2 where threads cannot be made. */
int hs_test_check(const char *set_name, int threads, uint8_t *arena, size_t bytes, int wrong_call,
                  double *gflops, char text[768]) {
    sound = hs_test_set(set_name);
    if (!sound) return 1;
    hs_kernel_set sick = *sound;
    sick.fn[HS_K_LINEAR_FWD] = linear_of_a_sick_core;
    calls_until_wrong = wrong_call;
    hs_pool *pool;
    if (hs_pool_create(threads, &pool) != HS_OK) return 2;
    hs_check check;
    hs_why why = {0};
    const hs_arena memory = {.base = arena, .bytes = bytes};
    const int status = hs_check_machine(wrong_call ? &sick : sound, pool, &memory, &check, &why);
    hs_pool_destroy(pool);
    *gflops = check.gflops;
    memcpy(text, why.text, sizeof why.text);
    return status;
}
