/* The CUDA kernels' seam: a table of functions, as kernels/kernels.h has one, that put a call's
 * work on a stream and return. Operands are device addresses; contracts, dims and extents are those
 * of kernels/<op>.h and wire/kernels.h. A function allocates nothing, keeps nothing, waits for
 * nothing.
 *
 * backend/cuda opens them, in libhs_cuda.so (`make cuda`) and, compiled for the CPU (emulate.h), in
 * the tests' library.
 *
 * Bits: every op but those below gives what the fast CPU set gives, to the last bit, in f32 and
 * bf16: same order of sums, same functions (lane.h), no contraction. Its own order, fixed by the
 * sizes alone, have layernorm_wgrad, rmsnorm_wgrad, and linear_wgrad's and linear8_wgrad's db (columns.h) and the
 * classifier's rows (classifier.cu, vocabulary.cu). Path cuda is a family of its own:
 * products by libraries, and attention in bf16 by flash.h.
 */
#ifndef HS_KERNELS_CUDA_CUDA_H
#define HS_KERNELS_CUDA_CUDA_H

#ifdef __cplusplus
extern "C" {
#endif
#include "kernels/args.h"

#define HS_CUDA_VERSION  3  /* of the table below */
#define HS_CUDA_TOGETHER 64 /* calls of one launch, at most */

typedef struct hs_cuda_ctx {
    void *stream;        /* a cudaStream_t */
    uint32_t path;       /* HS_PATH_CUDA, or HS_PATH_CUDA_EXACT, which 0 means too */
    uint32_t capability; /* of the device: 90 */
    uint32_t processors; /* of the device; 0: not known */
    void *workspace; /* the device's, of this stream alone, aligned to 256 bytes: what lies there
                             * means nothing between two calls. NULL: none (then the path is exact) */
    size_t workspace_bytes;       /* HS_CUDA_WORKSPACE */
    struct hs_products *products; /* libraries.h; NULL: none (then the path is exact) */
    hs_why *why;                  /* says more where a call fails; may be NULL */
} hs_cuda_ctx;

/* A workspace's first part is the libraries', the rest is for kernels of ours (kernels/cuda/libraries.h). */
#define HS_CUDA_WORKSPACE (UINT64_C(40) << 20)

/* HS_OK: launched. HS_E_CONFIG: a dtype that is not f32 or bf16. HS_E_BUG: the launch was refused
 * (cudaGetLastError says why), or the emulator found a fault. */
typedef hs_status (*hs_cuda_fn)(const hs_cuda_ctx *ctx, const hs_args *args);

/* 1 to HS_CUDA_TOGETHER calls of one dtype, none of which touches what another writes, as one launch (or two, where a
 * call is two). */
typedef hs_status (*hs_cuda_together_fn)(const hs_cuda_ctx *ctx, const hs_args *args,
                                         uint32_t count);

typedef struct hs_cuda_table {
    uint32_t version; /* HS_CUDA_VERSION */
    uint32_t count;   /* HS_K_COUNT as the library was built */
    hs_cuda_fn fn[HS_K_COUNT];
    hs_cuda_together_fn (*together)(uint16_t kernel); /* NULL: its calls go one by one */
} hs_cuda_table;

const hs_cuda_table *hs_cuda_kernels(void);

#define X(number, NAME, name, ...)                                                                 \
    hs_status hs_cuda_##name(const hs_cuda_ctx *ctx, const hs_args *args);
HS_KERNELS(X)
#undef X

/* Kernels that a step calls for each tensor. */
#define HS_CUDA_TOGETHER_KERNELS(X)                                                                \
    X(SUMSQ, sumsq)                                                                                \
    X(SUMSQ_PARTS, sumsq_parts)                                                                    \
    X(SUM, sum)                                                                                    \
    X(ADAMW, adamw) X(ADAMW_COPY, adamw_copy) X(ZERO, zero) X(CAST, cast)

#define X(NAME, name)                                                                              \
    hs_status hs_cuda_##name##_together(const hs_cuda_ctx *ctx, const hs_args *args,               \
                                        uint32_t count);
HS_CUDA_TOGETHER_KERNELS(X)
#undef X

#ifdef __cplusplus
}
#endif

#endif
