/* Times the fast kernels at GPT-2 124M shapes. Built by bench_kernels.py, once per instruction set
 * (-DHS_PATH).
 *
 *   bench_kernels THREADS ROUNDS [NAME]     one JSON line a kernel: name, median seconds of a call
 *                                           warm and cold, its operations and bytes, the peaks; NAME:
 *                                           those that contain it, or one like "linear_fwd bf16
 *                                           64x50304x768" of any size
 *   bench_kernels list                      the names of the small calls, a line each
 *   bench_kernels count NAME                one of them, once, inside hs_counted (tests/tools/counts.py)
 *
 * Warm: the call comes right after the same call, so that what fits a cache lies there. Cold: before
 * every call a buffer of twice the last-level cache is written, so that operands come from memory.
 *
 * Operands and workspace lie as a rank's do, in huge pages where the system gives them.
 *
 * Operations and bytes are those of the table of kernels: every operand's extent once, twice where it
 * is read and written. Beside them stand two peaks of the same rounds, medians too, so that a kernel
 * and its peak see the same clock and the same neighbours: independent fma chains in registers, and a
 * copy (bytes read and bytes written; memory also reads the lines that a copy writes). One thread is
 * timed by its CPU clock (other processes do not count), several by the wall clock.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "burn.h"
#include "core/arena.h"
#include "core/threads.h"
#include "kernels/kernels.h"
#include "wire/plan.h"

#define SET    HS_VEC_CAT(hs_kernels_, HS_PATH)
#define ROUNDS 100 /* at most */

static void burn(void *ctx, int64_t begin, int64_t end, int worker) {
    (void)worker;
    for (int64_t i = begin; i < end; i++) burn_fma(*(const int64_t *)ctx);
}

static double peak(hs_pool *pool, int threads, int64_t steps) {
    double t = now(threads);
    hs_parallel_for(pool, threads, burn, &steps);
    return 2.0 * LANES * CHAINS * (double)steps * threads / (now(threads) - t);
}

/* Two buffers that no cache holds: what a copy moves, and what drives operands out of the caches. */
typedef struct far_memory {
    char *from, *to;
    size_t bytes; /* of each */
} far_memory;

static int far_open(far_memory *f) {
    const long last_level = sysconf(_SC_LEVEL3_CACHE_SIZE);
    f->bytes = 2 * (size_t)(last_level > 0 ? last_level : 32 << 20);
    if (f->bytes < 64u << 20) f->bytes = 64u << 20;
    if (f->bytes > 512u << 20) f->bytes = 512u << 20;
    f->bytes = f->bytes / 4096 * 4096;
    f->from = aligned_alloc(4096, f->bytes);
    f->to = aligned_alloc(4096, f->bytes);
    if (!f->from || !f->to) return -1;
    memset(f->from, 1, f->bytes);
    memset(f->to, 2, f->bytes);
    return 0;
}

/* Pages [begin, end) of `to` from `from`. */
static void copy_pages(void *ctx, int64_t begin, int64_t end, int worker) {
    const far_memory *f = ctx;
    (void)worker;
    memcpy(f->to + begin * 4096, f->from + begin * 4096, (size_t)(end - begin) * 4096);
}

/* Bytes a second that a copy moves, in and out. */
static double copy_peak(hs_pool *pool, int threads, far_memory *f) {
    double t = now(threads);
    hs_parallel_for(pool, (int64_t)(f->bytes / 4096), copy_pages, f);
    return 2.0 * (double)f->bytes / (now(threads) - t);
}

typedef struct call {
    const char *name;
    uint16_t kernel;
    uint16_t dtype;
    int64_t dim[HS_CALL_DIMS];
    double real[HS_CALL_REALS];
    int64_t document; /* rows of each; 0: one a sequence, and the kernel is told nothing */
} call;

#define LINEAR(dt, text, r, n, k)                                                                  \
    {"linear_fwd " text, HS_K_LINEAR_FWD, dt, {r, n, k, n, k, n}, {0}},                            \
        {"linear_igrad " text, HS_K_LINEAR_IGRAD, dt, {r, n, k, k, n, 1}, {0}}, {                  \
        "linear_wgrad " text, HS_K_LINEAR_WGRAD, dt, {r, n, k, n, k, 1}, {0}                       \
    }
/* the linear maps of a layer, over so many rows */
#define LAYER(dt, text, r)                                                                         \
    LINEAR(dt, text #r "x2304x768", r, 2304, 768), LINEAR(dt, text #r "x768x768", r, 768, 768),    \
        LINEAR(dt, text #r "x3072x768", r, 3072, 768),                                             \
        LINEAR(dt, text #r "x768x3072", r, 768, 3072)
#define ATTENTION(b, t, h, d, text)                                                                \
    {"attention_fwd " text,                                                                        \
     HS_K_ATTENTION_FWD,                                                                           \
     HS_F32,                                                                                       \
     {b, t, h, h, d, h * d, 3 * h * d, 3 * h * d, 3 * h * d},                                      \
     {0.125}},                                                                                     \
    {                                                                                              \
        "attention_igrad " text, HS_K_ATTENTION_IGRAD, HS_F32,                                     \
            {b,         t,     h,     h,         d,         3 * h * d, 3 * h * d,                  \
             3 * h * d, h * d, h * d, 3 * h * d, 3 * h * d, 3 * h * d},                            \
            {0.125}                                                                                \
    }

#define BANDED_ATTENTION(dt, text, window, document)                                               \
    {"attention_fwd " text,                                                                        \
     HS_K_ATTENTION_FWD,                                                                           \
     dt,                                                                                           \
     {1, 460, 4, 2, 24, 96, 96, 48, 48, window},                                                   \
     {0.2},                                                                                        \
     document},                                                                                    \
    {                                                                                              \
        "attention_igrad " text, HS_K_ATTENTION_IGRAD, dt,                                         \
            {1, 460, 4, 2, 24, 96, 48, 48, 96, 96, 96, 48, 48, window}, {0.2}, document            \
    }

static const call calls[] = {
    LAYER(HS_F32, "", 256),
    LAYER(HS_F32, "", 1024),
    LINEAR(HS_F32, "64x768x768", 64, 768, 768),
    LAYER(HS_BF16, "bf16 ", 256),
    LAYER(HS_BF16, "bf16 ", 1024),
    {"classifier_grad 256, chunk 64",
     HS_K_CLASSIFIER_GRAD,
     HS_F32,
     {256, 768, 50257, 64, 1},
     {1.0}},
    {"classifier_grad 256, chunk 256",
     HS_K_CLASSIFIER_GRAD,
     HS_F32,
     {256, 768, 50257, 256, 1},
     {1.0}},
    ATTENTION(4, 64, 12, 64, "4x64, 12 heads of 64"),
    ATTENTION(1, 1024, 12, 64, "1x1024, 12 heads of 64"),
    {"embed_fwd 1024x768", HS_K_EMBED_FWD, HS_F32, {1024, 768, 50257, 256}, {0}},
    {"layernorm_fwd 1024x768", HS_K_LAYERNORM_FWD, HS_F32, {1024, 768}, {1e-5}},
    {"layernorm_igrad 1024x768", HS_K_LAYERNORM_IGRAD, HS_F32, {1024, 768, 1}, {0}},
    {"layernorm_wgrad 1024x768", HS_K_LAYERNORM_WGRAD, HS_F32, {1024, 768}, {0}},
    {"gelu_fwd 1024x3072", HS_K_GELU_FWD, HS_F32, {1024 * 3072}, {0}},
    {"gelu_igrad 1024x3072", HS_K_GELU_IGRAD, HS_F32, {1024 * 3072}, {0}},
    {"adamw 32M", HS_K_ADAMW, HS_F32, {1 << 25, 1}, {0.9, 0.95, 1e-8, 0.1}},
    {"sumsq 32M", HS_K_SUMSQ, HS_F32, {1 << 25}, {0}},
    {"init_normal 32M", HS_K_INIT_NORMAL, HS_F32, {1 << 25, 1, 2}, {0, 0.02}},
    {"cast 32M to bf16", HS_K_CAST, HS_BF16, {1 << 25}, {0}},
};

/* Calls of odd sizes, so that edges have their part, and small enough to be counted instruction by
 * instruction. */
static const call small[] = {
    LINEAR(HS_F32, "f32", 131, 100, 205),
    LINEAR(HS_BF16, "bf16", 131, 100, 205),
    {"attention_fwd f32", HS_K_ATTENTION_FWD, HS_F32, {1, 130, 4, 2, 24, 96, 96, 48, 48}, {0.2}},
    {"attention_fwd bf16", HS_K_ATTENTION_FWD, HS_BF16, {1, 130, 4, 2, 24, 96, 96, 48, 48}, {0.2}},
    {"attention_igrad f32",
     HS_K_ATTENTION_IGRAD,
     HS_F32,
     {1, 130, 4, 2, 24, 96, 48, 48, 96, 96, 96, 48, 48},
     {0.2}},
    {"attention_igrad bf16",
     HS_K_ATTENTION_IGRAD,
     HS_BF16,
     {1, 130, 4, 2, 24, 96, 48, 48, 96, 96, 96, 48, 48},
     {0.2}},
    BANDED_ATTENTION(HS_F32, "f32, documents", 0, 47),
    BANDED_ATTENTION(HS_F32, "f32, window", 70, 0),
    BANDED_ATTENTION(HS_BF16, "bf16, documents and window", 33, 47),
    {"borders i32", HS_K_BORDERS, HS_F32, {3, 1301, 9, 4}, {0}},
    {"classifier_fwd f32", HS_K_CLASSIFIER_FWD, HS_F32, {70, 49, 301, 32}, {0}},
    {"classifier_grad f32", HS_K_CLASSIFIER_GRAD, HS_F32, {70, 49, 301, 32, 1}, {1.0}},
    {"classifier_grad bf16", HS_K_CLASSIFIER_GRAD, HS_BF16, {70, 49, 301, 32, 1}, {1.0}},
    /* the presets' classifier_chunk */
    {"classifier_grad f32, chunk 256",
     HS_K_CLASSIFIER_GRAD,
     HS_F32,
     {259, 131, 301, 256, 1},
     {1.0}},
    {"classifier_grad bf16, chunk 256",
     HS_K_CLASSIFIER_GRAD,
     HS_BF16,
     {259, 131, 301, 256, 1},
     {1.0}},
    {"vocab_head bf16, chunk 256", HS_K_VOCAB_HEAD, HS_BF16, {259, 131, 301, 256, 8, 38, 1}, {1.0}},
    {"embed_fwd f32", HS_K_EMBED_FWD, HS_F32, {130, 101, 307, 65}, {0}},
    {"embed_wgrad f32", HS_K_EMBED_WGRAD, HS_F32, {130, 101, 307, 65}, {0}},
    {"layernorm_fwd f32", HS_K_LAYERNORM_FWD, HS_F32, {131, 101}, {1e-5}},
    {"layernorm_igrad f32", HS_K_LAYERNORM_IGRAD, HS_F32, {131, 101, 1}, {0}},
    {"layernorm_wgrad f32", HS_K_LAYERNORM_WGRAD, HS_F32, {131, 101}, {0}},
    {"rmsnorm_fwd f32", HS_K_RMSNORM_FWD, HS_F32, {131, 1, 101, 101, 101}, {1e-5}},
    {"rmsnorm_igrad f32", HS_K_RMSNORM_IGRAD, HS_F32, {131, 1, 101, 101, 101, 101, 1}, {0}},
    {"rope_fwd f32", HS_K_ROPE_FWD, HS_F32, {130, 65, 4, 24, 96}, {0}},
    {"gelu_fwd f32", HS_K_GELU_FWD, HS_F32, {9999}, {0}},
    {"gelu_igrad f32", HS_K_GELU_IGRAD, HS_F32, {9999}, {0}},
    {"swiglu_fwd f32", HS_K_SWIGLU_FWD, HS_F32, {99, 101}, {0}},
    {"swiglu_igrad f32", HS_K_SWIGLU_IGRAD, HS_F32, {99, 101}, {0}},
    {"adamw f32", HS_K_ADAMW, HS_F32, {9999, 1}, {0.9, 0.95, 1e-8, 0.1}},
    {"adamw bf16", HS_K_ADAMW, HS_BF16, {9999, 1}, {0.9, 0.95, 1e-8, 0.1}},
    {"muon_momentum f32", HS_K_MUON_MOMENTUM, HS_F32, {9999}, {0.95}},
    {"muon_scale f32", HS_K_MUON_SCALE, HS_F32, {9999}, {1e-7}},
    {"muon_poly f32", HS_K_MUON_POLY, HS_F32, {101}, {3.4445, -4.775, 2.0315}},
    {"muon f32", HS_K_MUON, HS_F32, {9999}, {0.95, 0.2, 0.1}},
    {"muon bf16", HS_K_MUON, HS_BF16, {9999}, {0.95, 0.2, 0.1}},
    {"muon_copy bf16", HS_K_MUON_COPY, HS_BF16, {9999}, {0.2, 0.1}},
    {"sumsq f32", HS_K_SUMSQ, HS_F32, {9999}, {0}},
    {"init_normal f32", HS_K_INIT_NORMAL, HS_F32, {9999, 1, 2}, {0, 0.02}},
    {"cast bf16", HS_K_CAST, HS_BF16, {9999}, {0}},
    {"quantise bf16", HS_K_QUANTISE, HS_BF16, {99, 101, 101, 0}, {0}},
};

/* The call that a name like "linear_fwd bf16 64x50304x768" tells: rows, outputs, inputs; float32
 * without a word. */
static bool linear_of(const char *name, call *c) {
    char op[6];
    int64_t r, n, k;
    uint16_t dtype = HS_BF16;
    if (sscanf(name, "linear_%5[a-z] bf16 %" SCNd64 "x%" SCNd64 "x%" SCNd64, op, &r, &n, &k) != 4) {
        dtype = HS_F32;
        if (sscanf(name, "linear_%5[a-z] %" SCNd64 "x%" SCNd64 "x%" SCNd64, op, &r, &n, &k) != 4)
            return false;
    }
    const call all[] = {LINEAR(dtype, "", r, n, k)};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        const char *own = all[i].name + strlen("linear_");
        if (strncmp(own, op, strlen(op)) || own[strlen(op)] != ' ') continue;
        *c = all[i];
        c->name = name;
        return true;
    }
    return false;
}

/* Whether the call has its operand i. */
static bool has(const call *c, const hs_operand *o) {
    return o->kind != HS_KIND_PLACES || o->role != HS_ROLE_READ || c->document;
}

/* The call's operands, in an arena as a rank's: one after the other, and a page apart. */
static int place(const call *c, const hs_kernel_facts *facts, hs_arena *arena, hs_args *args) {
    uint64_t at[HS_CALL_PTRS], bytes, all = 0;
    for (int i = 0; i < facts->operand_count; i++) {
        at[i] = all;
        if (!has(c, &facts->operands[i])) continue;
        if (hs_kernel_extent(c->kernel, c->dtype, c->dim, i, &bytes) != HS_OK) return -1;
        all += (bytes + 4095) / 64 * 64;
    }
    hs_why why;
    if (hs_arena_create(all, arena, &why) != HS_OK) return -1;
    for (int i = 0; i < facts->operand_count; i++)
        if (has(c, &facts->operands[i])) args->ptr[i] = arena->base + at[i];
    return 0;
}

/* Operands of the sizes that the extents say, filled with small numbers that are right for every
 * role. *moved: bytes that the call reads and writes. */
static int prepare(const call *c, hs_arena *arena, hs_args *args, double *moved) {
    const hs_kernel_facts *facts = hs_kernel_facts_of((uint32_t)c->kernel);
    *args = (hs_args){.dtype = c->dtype};
    if (place(c, facts, arena, args)) return -1;
    uint64_t output = 0;
    *moved = 0;
    memcpy(args->dim, c->dim, sizeof c->dim);
    memcpy(args->real, c->real, sizeof c->real);
    for (int i = 0; i < facts->operand_count; i++) {
        const hs_operand *o = &facts->operands[i];
        uint64_t bytes;
        if (!has(c, o)) continue;
        if (hs_kernel_extent(c->kernel, c->dtype, c->dim, i, &bytes) != HS_OK) return -1;
        if (i == 0) output = bytes;
        const bool gathered =
            o->role == HS_ROLE_READ && !strcmp(o->name, "wte"); /* a row a token */
        *moved += (double)(gathered ? output : bytes) *
                  (o->role == HS_ROLE_READ || o->role == HS_ROLE_WRITE ? 1 : 2);
        if (o->kind == HS_KIND_CONTROL) {
            *(hs_step_control *)args->ptr[i] =
                (hs_step_control){.clip_scale = 1, .step_size = 1e-4f, .v_scale = 1};
            continue;
        }
        if (o->kind == HS_KIND_TARGETS || o->kind == HS_KIND_TOKENS) {
            const int64_t below = hs_kernel_dim(facts, c->dim, o->below);
            for (uint64_t k = 0; k < bytes / 4; k++)
                ((int32_t *)args->ptr[i])[k] = (int32_t)((int64_t)k * 7919 % below);
            continue;
        }
        if (o->kind == HS_KIND_PLACES && o->role == HS_ROLE_READ) {
            const int64_t sequence = hs_kernel_dim(facts, c->dim, "T");
            for (uint64_t k = 0; k < bytes / 4; k++)
                ((int32_t *)args->ptr[i])[k] =
                    (int32_t)((int64_t)k % sequence / c->document * c->document);
            continue;
        }
        uint32_t x = 1;
        for (uint64_t k = 0; k < bytes / 2;
             k++) { /* bf16, or pairs of them: upper halves in [2^-4, 2^-3) */
            x = x * 1664525u + 1013904223u;
            ((uint16_t *)args->ptr[i])[k] = (uint16_t)(0x3d80 | x >> 25);
        }
    }
    return 0;
}

static int by_size(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values, int count) {
    qsort(values, (size_t)count, sizeof *values, by_size);
    return count % 2 ? values[count / 2] : (values[count / 2 - 1] + values[count / 2]) / 2;
}

hs_status hs_counted(uint16_t kernel, hs_kernel_ctx *ctx, hs_args *args);
__attribute__((noinline)) hs_status hs_counted(uint16_t kernel, hs_kernel_ctx *ctx, hs_args *args) {
    return SET.fn[kernel](ctx, args);
}

/* A small call once, on one thread; without a name, their names. */
static int count(const char *name) {
    hs_pool *pool = NULL;
    if (hs_pool_create(1, &pool) != HS_OK) return 70;
    hs_arena scratch, operands;
    hs_why why;
    if (hs_arena_create(hs_kernels_scratch_bytes(1), &scratch, &why) != HS_OK) return 70;
    hs_kernel_ctx ctx = {pool, scratch.base, scratch.bytes, NULL};
    int code = name ? 64 : 0;
    for (size_t i = 0; i < sizeof small / sizeof small[0]; i++) {
        hs_args args;
        double moved;
        if (!name) {
            puts(small[i].name);
        } else if (!strcmp(name, small[i].name)) {
            code = 70;
            if (prepare(&small[i], &operands, &args, &moved)) break;
            code = hs_counted(small[i].kernel, &ctx, &args) ? 70 : 0;
            hs_arena_destroy(&operands);
        }
    }
    hs_pool_destroy(pool);
    hs_arena_destroy(&scratch);
    return code;
}

int main(int argc, char **argv) {
    if (argc == 2 && !strcmp(argv[1], "list")) return count(NULL);
    if (argc == 3 && !strcmp(argv[1], "count")) return count(argv[2]);
    if (argc < 3) return 64;
    const int threads = atoi(argv[1]), rounds = atoi(argv[2]);
    if (rounds < 1 || rounds > ROUNDS) return 64;
    hs_pool *pool = NULL;
    far_memory far;
    if (hs_pool_create(threads, &pool) != HS_OK || far_open(&far)) return 70;
    hs_arena scratch, operands;
    hs_why why;
    if (hs_arena_create(hs_kernels_scratch_bytes(threads), &scratch, &why) != HS_OK) return 70;
    hs_kernel_ctx ctx = {pool, scratch.base, scratch.bytes, NULL};
    call one;
    const bool told = argc > 3 && linear_of(argv[3], &one);
    const size_t most = told ? 1 : sizeof calls / sizeof calls[0];
    for (size_t i = 0; i < most; i++) {
        const call *c = told ? &one : &calls[i];
        if (argc > 3 && !strstr(c->name, argv[3])) continue;
        hs_args args;
        hs_work work;
        double moved, seconds[2][ROUNDS], fma[ROUNDS], copied[ROUNDS];
        if (prepare(c, &operands, &args, &moved)) return 70;
        if (hs_kernel_work(c->kernel, c->dim, &work) != HS_OK) return 70;
        for (int cold = 0; cold < 2; cold++) {
            for (int r = -1; r < rounds; r++) { /* the first is not counted */
                if (cold) {
                    const double rate = copy_peak(pool, threads, &far);
                    if (r >= 0) copied[r] = rate;
                } else if (r >= 0) {
                    fma[r] = peak(pool, threads, 100000);
                }
                const double began = now(threads);
                if (SET.fn[c->kernel](&ctx, &args)) return 70;
                if (r >= 0) seconds[cold][r] = now(threads) - began;
            }
        }
        printf("{\"name\": \"%s\", \"path\": \"%s\", \"threads\": %d, \"warm\": %.9f, "
               "\"cold\": %.9f, \"operations\": %.1f, \"bytes\": %.1f, \"peak_operations\": %.4g, "
               "\"peak_bytes\": %.4g}\n",
               c->name, SET.name, threads, median(seconds[0], rounds), median(seconds[1], rounds),
               2.0 * (double)(work.products + work.again) + (double)work.each, moved,
               median(fma, rounds), median(copied, rounds));
        fflush(stdout);
        hs_arena_destroy(&operands);
    }
    hs_pool_destroy(pool);
    hs_arena_destroy(&scratch);
    free(far.from);
    free(far.to);
    return 0;
}
