/* Times the fast kernels at GPT-2 124M shapes. Built by bench_kernels.py, once per instruction set
 * (-DHS_PATH).
 *
 *   bench_kernels THREADS ROUNDS [NAME]     one JSON line a kernel: name, best seconds of a call,
 * work, unit of work
 *
 * Before and after every timed call a calibration loop runs (independent fma chains in registers),
 * so that a kernel and its peak see the same clock and the same neighbours; the peak printed beside
 * a kernel is the best of its own rounds. One thread is timed by its CPU clock (other processes do
 * not count), several by the wall clock.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "core/threads.h"
#include "kernels/cpu/vec.h"
#include "kernels/kernels.h"
#include "wire/plan.h"

#define SET    HS_VEC_CAT(hs_kernels_, HS_PATH)
#define CHAINS 12

static double now(int threads) {
    struct timespec t;
    clock_gettime(threads == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static volatile float sink;

/* CHAINS vectors, so that latency does not show on any of the instruction sets. */
static void burn(void *ctx, int64_t begin, int64_t end, int worker) {
    (void)worker;
    const int64_t steps = *(const int64_t *)ctx;
    for (int64_t i = begin; i < end; i++) {
        const vf a = v_set1(0.999f), b = v_set1(0.001f);
        /* MAKE: no two lanes alike, nothing to share */
#define CHAIN(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
#define MAKE(c)  vf x##c = v_count_from((float)(16 * c));
#define GO(c)    x##c = v_fma(x##c, a, b);
#define ADD(c)   sum = v_add(sum, x##c);
        CHAIN(MAKE)
        for (int64_t s = 0; s < steps; s++) {
            CHAIN(GO)
        }
        vf sum = v_zero();
        CHAIN(ADD)
        sink = v_sum(sum);
    }
}

static double peak(hs_pool *pool, int threads, int64_t steps) {
    double t = now(threads);
    hs_parallel_for(pool, threads, burn, &steps);
    return 2.0 * LANES * CHAINS * (double)steps * threads / (now(threads) - t);
}

typedef struct call {
    const char *name;
    uint16_t kernel;
    uint16_t dtype;
    int64_t dim[HS_CALL_DIMS];
    double real[HS_CALL_REALS];
    double work; /* floating-point operations, or bytes, or elements */
    const char *unit;
} call;

#define GEMM(r, n, k) 2.0 * (r) * (n) * (k), "flop"
#define LINEAR(dt, text, r, n, k)                                                                  \
    {"linear_fwd " text, HS_K_LINEAR_FWD, dt, {r, n, k, n, k, n}, {0}, GEMM(r, n, k)},             \
        {"linear_igrad " text, HS_K_LINEAR_IGRAD, dt, {r, n, k, k, n, 1}, {0}, GEMM(r, n, k)}, {   \
        "linear_wgrad " text, HS_K_LINEAR_WGRAD, dt, {r, n, k, n, k}, {0}, GEMM(r, n, k)           \
    }
#define ATTENTION(b, t, h, d, text)                                                                \
    {"attention_fwd " text,                                                                        \
     HS_K_ATTENTION_FWD,                                                                           \
     HS_F32,                                                                                       \
     {b, t, h, h, d, h * d, 3 * h * d, 3 * h * d, 3 * h * d},                                      \
     {0.125},                                                                                      \
     2.0 * (b) * (h) * (t) * (t) * (d),                                                            \
     "flop"},                                                                                      \
        {"attention_igrad " text,                                                                  \
         HS_K_ATTENTION_IGRAD,                                                                     \
         HS_F32,                                                                                   \
         {b, t, h, h, d, 3 * h * d, 3 * h * d, 3 * h * d, h * d, h * d, 3 * h * d, 3 * h * d,      \
          3 * h * d},                                                                              \
         {0.125},                                                                                  \
         5.0 * (b) * (h) * (t) * (t) * (d),                                                        \
         "flop"}

static const call calls[] = {
    LINEAR(HS_F32, "256x3072x768", 256, 3072, 768),
    LINEAR(HS_F32, "256x768x3072", 256, 768, 3072),
    LINEAR(HS_F32, "256x2304x768", 256, 2304, 768),
    LINEAR(HS_F32, "256x768x768", 256, 768, 768),
    LINEAR(HS_F32, "1024x3072x768", 1024, 3072, 768),
    LINEAR(HS_F32, "64x768x768", 64, 768, 768),
    LINEAR(HS_BF16, "bf16 256x3072x768", 256, 3072, 768),
    {"classifier_grad 256, chunk 64",
     HS_K_CLASSIFIER_GRAD,
     HS_F32,
     {256, 768, 50257, 64},
     {1.0},
     3 * GEMM(256, 50257, 768)},
    {"classifier_grad 256, chunk 256",
     HS_K_CLASSIFIER_GRAD,
     HS_F32,
     {256, 768, 50257, 256},
     {1.0},
     3 * GEMM(256, 50257, 768)},
    ATTENTION(4, 64, 12, 64, "4x64, 12 heads of 64"),
    ATTENTION(1, 1024, 12, 64, "1x1024, 12 heads of 64"),
    {"layernorm_fwd 1024x768",
     HS_K_LAYERNORM_FWD,
     HS_F32,
     {1024, 768},
     {1e-5},
     1024 * 768,
     "element"},
    {"layernorm_igrad 1024x768",
     HS_K_LAYERNORM_IGRAD,
     HS_F32,
     {1024, 768, 1},
     {0},
     1024 * 768,
     "element"},
    {"layernorm_wgrad 1024x768",
     HS_K_LAYERNORM_WGRAD,
     HS_F32,
     {1024, 768},
     {0},
     1024 * 768,
     "element"},
    {"gelu_fwd 1024x3072", HS_K_GELU_FWD, HS_F32, {1024 * 3072}, {0}, 1024 * 3072, "element"},
    {"gelu_igrad 1024x3072", HS_K_GELU_IGRAD, HS_F32, {1024 * 3072}, {0}, 1024 * 3072, "element"},
    {"adamw 32M",
     HS_K_ADAMW,
     HS_F32,
     {1 << 25, 1},
     {0.9, 0.95, 1e-8, 0.1},
     32.0 * (1 << 25),
     "byte"},
    {"sumsq 32M", HS_K_SUMSQ, HS_F32, {1 << 25}, {0}, 4.0 * (1 << 25), "byte"},
    {"init_normal 32M", HS_K_INIT_NORMAL, HS_F32, {1 << 25, 1, 2}, {0, 0.02}, 1 << 25, "element"},
    {"cast 32M to bf16", HS_K_CAST, HS_BF16, {1 << 25}, {0}, 6.0 * (1 << 25), "byte"},
};

/* Operands of the sizes that the extents say, filled with small numbers that are right for every
 * role. */
static int prepare(const call *c, hs_args *args) {
    const int operands = hs_kernel_facts_of((uint32_t)c->kernel)->operand_count;
    *args = (hs_args){.dtype = c->dtype};
    memcpy(args->dim, c->dim, sizeof c->dim);
    memcpy(args->real, c->real, sizeof c->real);
    for (int i = 0; i < operands; i++) {
        uint64_t bytes;
        if (hs_kernel_extent(c->kernel, c->dtype, c->dim, i, &bytes) != HS_OK) return -1;
        args->ptr[i] = aligned_alloc(64, (bytes + 4095) / 64 * 64);
        if (!args->ptr[i]) return -1;
        if (c->kernel == HS_K_ADAMW && i == 5) {
            *(hs_step_control *)args->ptr[i] =
                (hs_step_control){.clip_scale = 1, .step_size = 1e-4f, .v_scale = 1};
            continue;
        }
        if (c->kernel == HS_K_CLASSIFIER_GRAD && i == 5) {
            memset(args->ptr[i], 0, bytes);
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

int main(int argc, char **argv) {
    if (argc < 3) return 64;
    const int threads = atoi(argv[1]), rounds = atoi(argv[2]);
    hs_pool *pool = NULL;
    if (hs_pool_create(threads, &pool) != HS_OK) return 70;
    hs_kernel_ctx ctx = {pool, aligned_alloc(64, hs_kernels_scratch_bytes(threads) + 64), 0};
    ctx.scratch_bytes = hs_kernels_scratch_bytes(threads);
    for (size_t i = 0; i < sizeof calls / sizeof calls[0]; i++) {
        const call *c = &calls[i];
        if (argc > 3 && !strstr(c->name, argv[3])) continue;
        hs_args args;
        if (!ctx.scratch || prepare(c, &args)) return 70;
        if (SET.fn[c->kernel](&ctx, &args)) return 70;
        double best = 1e9, top = 0;
        for (int r = 0; r < rounds; r++) {
            double p = peak(pool, threads, 100000);
            if (p > top) top = p;
            double t = now(threads);
            SET.fn[c->kernel](&ctx, &args);
            t = now(threads) - t;
            if (t < best) best = t;
        }
        printf("{\"name\": \"%s\", \"path\": \"%s\", \"threads\": %d, \"seconds\": %.9f, \"work\": "
               "%.1f, "
               "\"unit\": \"%s\", \"peak_flops\": %.4g}\n",
               c->name, SET.name, threads, best, c->work, c->unit, top);
        fflush(stdout);
        for (int k = 0; k < HS_CALL_PTRS; k++) free(args.ptr[k]);
    }
    hs_pool_destroy(pool);
    free(ctx.scratch);
    return 0;
}
