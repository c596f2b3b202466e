/* Linear layers: three products, of gemm.h or, under path cuda, of a library (libraries.h). The
 * library adds a bias of the result's type: of bf16 results it is rounded first. The bias's gradient is
 * bias.h's. */
#include "kernels/cuda/bias.h"
#include "kernels/cuda/by_library.h"
#include "kernels/cuda/gemm.h"

#include "kernels/linear.h"

template <typename T>
static hs_status linear_fwd_op(const hs_cuda_ctx *ctx, const hs_linear_fwd_args &a) {
    const cudaStream_t stream = static_cast<cudaStream_t>(ctx->stream);
    if (hs_by_library(ctx)) {
        if (a.b && sizeof(T) == sizeof(bf16)) HS_TRY(rounded_bias(ctx, a.b, a.N));
        return library_product(ctx, HS_K_LINEAR_FWD, hs_linear_fwd_args_to(&a));
    }
    const int64_t R = a.R, N = a.N, K = a.K;
    const int64_t ldy = a.ldy, ldx = a.ldx, ldres = a.ldres;
    gemm<T, T> g = {};
    g.m = R, g.n = N, g.k = K;
    g.a = gemm_side<T>{static_cast<const T *>(a.x), ldx, 1};
    g.b = gemm_side<T>{static_cast<const T *>(a.w), K, 1};
    g.out = static_cast<T *>(a.y), g.ld_out = ldy;
    g.bias = static_cast<const float *>(a.b);
    g.res = static_cast<const T *>(a.res), g.ld_res = ldres;
    return gemm_run(stream, g);
}
HS_CUDA_CTX_OP(linear_fwd)

template <typename T>
static hs_status linear_igrad_op(const hs_cuda_ctx *ctx, const hs_linear_igrad_args &a) {
    const cudaStream_t stream = static_cast<cudaStream_t>(ctx->stream);
    if (hs_by_library(ctx))
        return library_product(ctx, HS_K_LINEAR_IGRAD, hs_linear_igrad_args_to(&a));
    const int64_t R = a.R, N = a.N, K = a.K;
    const int64_t lddx = a.lddx, lddy = a.lddy, ACCUM = a.ACCUM;
    gemm<T, T> g = {};
    g.m = R, g.n = K, g.k = N;
    g.a = gemm_side<T>{static_cast<const T *>(a.dy), lddy, 1};
    g.b = gemm_side<T>{static_cast<const T *>(a.w), 1, K};
    g.out = static_cast<T *>(a.dx), g.ld_out = lddx;
    g.add_old = ACCUM != 0;
    return gemm_run(stream, g);
}
HS_CUDA_CTX_OP(linear_igrad)

template <typename T>
static hs_status linear_wgrad_op(const hs_cuda_ctx *ctx, const hs_linear_wgrad_args &a) {
    const cudaStream_t stream = static_cast<cudaStream_t>(ctx->stream);
    const int64_t R = a.R, N = a.N, K = a.K, lddy = a.lddy, ldx = a.ldx;
    float *db = static_cast<float *>(a.db);
    const T *dy = static_cast<const T *>(a.dy);
    if (hs_by_library(ctx)) {
        HS_TRY(library_product(ctx, HS_K_LINEAR_WGRAD, hs_linear_wgrad_args_to(&a)));
    } else {
        gemm<T, float> g = {};
        g.m = N, g.n = K, g.k = R;
        g.a = gemm_side<T>{dy, 1, lddy};
        g.b = gemm_side<T>{static_cast<const T *>(a.x), 1, ldx};
        g.out = static_cast<float *>(a.dw), g.ld_out = K;
        g.from_old = a.ACCUM != 0;
        HS_TRY(gemm_run(stream, g));
    }
    if (!db) return HS_OK;
    return bias_gradient(ctx, db, dy, R, N, lddy);
}
HS_CUDA_CTX_OP(linear_wgrad)
