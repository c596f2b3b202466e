/* Linear layers: three products, of gemm.h or, under path cuda, of a library (libraries.h). The
 * library adds a bias of the result's type: of bf16 results it is rounded first. The bias's gradient is
 * columns.h's. */
#include "kernels/cuda/columns.h"
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/libraries.h"

#include "kernels/linear.h"

template <typename T>
__global__ void __launch_bounds__(columns_of<T>::THREADS)
    bias_grad(float *db, const T *dy, int64_t R, int64_t N_, int64_t lddy, bool wide) {
    const int N = pack_of<T>::N, across = columns_of<T>::ACROSS;
    HS_SHARED(column_sums, sums, );
    const int64_t c = (int64_t)blockIdx.x * COLUMNS + threadIdx.x % across * N;
    lanes<N> b = {};
    for (int64_t r = threadIdx.x / across; r < R && c < N_; r += COLUMN_LANES) {
        const lanes<N> g = load<N>(dy + r * lddy + c, N_ - c, wide);
        for (int i = 0; i < N; i++) b.x[i] = b.x[i] + g.x[i];
    }
    join_columns(sums, b, db, N_);
}

__global__ void __launch_bounds__(FLAT) round_bias(bf16 *to, const float *from, int64_t n) {
    const int64_t i = flat_index();
    if (i < n) narrow(from[i], to + i);
}

static hs_status library_product(const hs_cuda_ctx *ctx, uint16_t kernel, const hs_args &args) {
    hs_product p[HS_PRODUCTS_OF_A_CALL];
    (void)hs_products_of(kernel, &args, HS_OWN_WORKSPACE(ctx), p);
    return hs_products_run(ctx->products, ctx, p);
}

template <typename T>
static hs_status linear_fwd_op(const hs_cuda_ctx *ctx, const hs_linear_fwd_args &a) {
    const cudaStream_t stream = static_cast<cudaStream_t>(ctx->stream);
    if (hs_by_library(ctx)) {
        if (a.b && sizeof(T) == sizeof(bf16)) {
            if ((uint64_t)a.N * sizeof(bf16) > HS_OWN_BYTES) return HS_E_CONFIG;
            bf16 *bias = reinterpret_cast<bf16 *>(HS_OWN_WORKSPACE(ctx));
            HS_TRY(HS_LAUNCH(round_bias, flat_blocks(a.N), FLAT, stream, bias,
                             static_cast<const float *>(a.b), a.N));
        }
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
        g.from_old = true;
        HS_TRY(gemm_run(stream, g));
    }
    if (!db) return HS_OK;
    return HS_LAUNCH(bias_grad, (unsigned)hs_ceil_div(N, COLUMNS), columns_of<T>::THREADS, stream,
                     db, dy, R, N, lddy, wide_at(dy, lddy));
}
HS_CUDA_CTX_OP(linear_wgrad)
