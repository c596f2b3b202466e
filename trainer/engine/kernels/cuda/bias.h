/* The gradient of a linear layer's bias: dy summed over rows, by columns.h. */
#ifndef HS_KERNELS_CUDA_BIAS_H
#define HS_KERNELS_CUDA_BIAS_H

#include "kernels/cuda/columns.h"

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
static hs_status bias_gradient(cudaStream_t stream, float *db, const T *dy, int64_t R, int64_t N,
                               int64_t lddy) {
    return HS_LAUNCH(bias_grad, (unsigned)hs_ceil_div(N, COLUMNS), columns_of<T>::THREADS, stream,
                     db, dy, R, N, lddy, wide_at(dy, lddy));
}

#endif
