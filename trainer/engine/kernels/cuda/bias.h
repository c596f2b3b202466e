/* The gradient of a linear layer's bias: dy summed over rows, by columns.h. */
#ifndef HS_KERNELS_CUDA_BIAS_H
#define HS_KERNELS_CUDA_BIAS_H

#include "kernels/cuda/columns.h"

template <typename T>
__global__ void __launch_bounds__(columns_of<T>::THREADS)
    bias_grad(float *db, const T *dy, int64_t R, int64_t N_, int64_t lddy, int64_t part,
              bool wide) {
    const int N = pack_of<T>::N, across = columns_of<T>::ACROSS;
    HS_SHARED(column_sums, sums, );
    const int64_t c = (int64_t)blockIdx.x * COLUMNS + threadIdx.x % across * N;
    const int64_t first = (int64_t)blockIdx.y * part, end = c < N_ ? min64(first + part, R) : 0;
    lanes<N> b = {};
#pragma unroll 4
    for (int64_t r = first + threadIdx.x / across; r < end; r += COLUMN_LANES) {
        const lanes<N> g = load<N>(dy + r * lddy + c, N_ - c, wide);
        for (int i = 0; i < N; i++) b.x[i] = b.x[i] + g.x[i];
    }
    join_columns(sums, b, db, N_);
}

template <typename T>
static hs_status bias_gradient(const hs_cuda_ctx *ctx, float *db, const T *dy, int64_t R, int64_t N,
                               int64_t lddy) {
    column_plan p;
    HS_TRY(plan_columns(ctx, R, N, db, NULL, &p));
    HS_TRY(HS_LAUNCH(bias_grad, column_grid(p, N), columns_of<T>::THREADS,
                     static_cast<cudaStream_t>(ctx->stream), p.to[0], dy, R, N, lddy, p.part,
                     wide_at(dy, lddy)));
    return finish_columns(ctx, p, db, NULL, N);
}

#endif
