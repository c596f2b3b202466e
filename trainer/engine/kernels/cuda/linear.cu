/* Linear layers: three products of gemm.h; the bias's gradient is columns.h's. */
#include "kernels/cuda/columns.h"
#include "kernels/cuda/gemm.h"

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

template <typename T>
static hs_status linear_fwd_op(cudaStream_t stream, const hs_linear_fwd_args &a) {
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
HS_CUDA_OP(linear_fwd)

template <typename T>
static hs_status linear_igrad_op(cudaStream_t stream, const hs_linear_igrad_args &a) {
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
HS_CUDA_OP(linear_igrad)

template <typename T>
static hs_status linear_wgrad_op(cudaStream_t stream, const hs_linear_wgrad_args &a) {
    const int64_t R = a.R, N = a.N, K = a.K, lddy = a.lddy, ldx = a.ldx;
    float *db = static_cast<float *>(a.db);
    const T *dy = static_cast<const T *>(a.dy);
    gemm<T, float> g = {};
    g.m = N, g.n = K, g.k = R;
    g.a = gemm_side<T>{dy, 1, lddy};
    g.b = gemm_side<T>{static_cast<const T *>(a.x), 1, ldx};
    g.out = static_cast<float *>(a.dw), g.ld_out = K;
    g.from_old = true;
    HS_TRY(gemm_run(stream, g));
    if (!db) return HS_OK;
    return HS_LAUNCH(bias_grad, (unsigned)hs_ceil_div(N, COLUMNS), columns_of<T>::THREADS, stream,
                     db, dy, R, N, lddy, wide_at(dy, lddy));
}
HS_CUDA_OP(linear_wgrad)
