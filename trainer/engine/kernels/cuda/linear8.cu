/* Linear layers on FP8: three products, of gemm.h or, under path cuda, of a library (libraries.h),
 * whose operands are codes with the index that is summed over side by side. The library adds a
 * bias that was rounded to bf16. */
#include "kernels/cuda/bias.h"
#include "kernels/cuda/by_library.h"
#include "kernels/cuda/fp8.h"
#include "kernels/cuda/gemm.h"

#include "kernels/linear8.h"

/* Codes of m rows times those of n rows, k of each. */
template <typename A, typename O>
static gemm<A, O, e4m3> product8(int64_t m, int64_t n, int64_t k, const void *a, const void *as,
                                 const void *b, const void *bs) {
    gemm<A, O, e4m3> g = {};
    g.m = m, g.n = n, g.k = k;
    g.a = gemm_side<A>{static_cast<const A *>(a), k, 1};
    g.b = gemm_side<e4m3>{static_cast<const e4m3 *>(b), k, 1};
    g.scale_a = static_cast<const float *>(as), g.scale_b = static_cast<const float *>(bs);
    return g;
}

template <typename T>
static hs_status linear8_fwd_op(const hs_cuda_ctx *ctx, const hs_linear8_fwd_args &a) {
    const cudaStream_t stream = static_cast<cudaStream_t>(ctx->stream);
    if (hs_by_library(ctx) && hs_fp8_fits(a.dtype, a.R, a.N, a.K)) {
        if (a.b) HS_TRY(rounded_bias(ctx, a.b, a.N));
        return library_product(ctx, HS_K_LINEAR8_FWD, hs_linear8_fwd_args_to(&a));
    }
    gemm<e4m3, T, e4m3> g = product8<e4m3, T>(a.R, a.N, a.K, a.x8, a.xs, a.w8, a.ws);
    g.out = static_cast<T *>(a.y), g.ld_out = a.ldy;
    g.bias = static_cast<const float *>(a.b);
    g.res = static_cast<const T *>(a.res), g.ld_res = a.ldres;
    return gemm_run(stream, g);
}
HS_CUDA_CTX_OP(linear8_fwd)

template <typename T>
static hs_status linear8_igrad_op(const hs_cuda_ctx *ctx, const hs_linear8_igrad_args &a) {
    const cudaStream_t stream = static_cast<cudaStream_t>(ctx->stream);
    if (hs_by_library(ctx) && hs_fp8_fits(a.dtype, a.R, a.N, a.K))
        return library_product(ctx, HS_K_LINEAR8_IGRAD, hs_linear8_igrad_args_to(&a));
    gemm<e5m2, T, e4m3> g = product8<e5m2, T>(a.R, a.K, a.N, a.dy8, a.dys, a.w8t, a.ws);
    g.out = static_cast<T *>(a.dx), g.ld_out = a.lddx;
    g.add_old = a.ACCUM != 0;
    return gemm_run(stream, g);
}
HS_CUDA_CTX_OP(linear8_igrad)

template <typename T>
static hs_status linear8_wgrad_op(const hs_cuda_ctx *ctx, const hs_linear8_wgrad_args &a) {
    const cudaStream_t stream = static_cast<cudaStream_t>(ctx->stream);
    if (hs_by_library(ctx) && hs_fp8_fits(a.dtype, a.R, a.N, a.K)) {
        HS_TRY(library_product(ctx, HS_K_LINEAR8_WGRAD, hs_linear8_wgrad_args_to(&a)));
    } else {
        gemm<e5m2, float, e4m3> g =
            product8<e5m2, float>(a.N, a.K, a.R, a.dy8t, a.dys, a.x8t, a.xs);
        g.out = static_cast<float *>(a.dw), g.ld_out = a.K;
        g.add_old = true;
        HS_TRY(gemm_run(stream, g));
    }
    if (!a.db) return HS_OK;
    return bias_gradient(ctx, static_cast<float *>(a.db), static_cast<const T *>(a.dy), a.R, a.N,
                         a.lddy);
}
HS_CUDA_CTX_OP(linear8_wgrad)
