/* C[m,n] = start + sum over k of A[m,k] B[n,k], plain and sure: all products of path cuda-exact, and on
 * path cuda those that the library has no algorithm for (plain.cu).
 *
 * Order: every element is one chain of fma in f32, as kernels/cpu/gemm.h has it: over k ascending,
 * or, of operands narrower than f32, in pairs of k, the odd one first, denormal numbers counting as
 * zero: the same bits. Then bias, residual, old value, one rounding.
 *
 * A block makes GEMM_TILE x GEMM_TILE of C with 256 threads, a thread 4 x 4.
 */
#ifndef HS_KERNELS_CUDA_GEMM_H
#define HS_KERNELS_CUDA_GEMM_H

#include "kernels/cuda/lane.h"

enum { GEMM_TILE = 64, GEMM_K = 16, GEMM_THREADS = 256 };

/* Element (i, k) is p[i * row + k * col]; one of row and col is 1. */
template <typename T> struct gemm_side {
    const T *p;
    int64_t row, col;
};

/* I of the operands (J of b where it is another), O of the result. */
template <typename I, typename O, typename J = I> struct gemm {
    int64_t m, n, k;
    gemm_side<I> a;
    gemm_side<J> b;
    O *out;
    int64_t ld_out;
    bool from_old;         /* each chain starts from the old out */
    bool add_old;          /* the old out is added at the end */
    const float *bias;     /* [n], added at the end; NULL: none */
    const O *rounded_bias; /* the same, of out's type */
    const O *res;          /* [m, n], added after the bias; NULL: none */
    int64_t ld_res;
    const float *scale_a,
        *scale_b; /* each sum is multiplied with both at the end, first; NULL: not */
};

typedef float gemm_panel[GEMM_K][GEMM_TILE + 1];

/* panel[k][i] = side(first + i, k0 + k); 0 beyond `rows`. Threads beside each other read beside
 * each other. */
template <typename T>
HS_DEVICE void gemm_fetch(gemm_panel &panel, const gemm_side<T> &s, int64_t first, int64_t rows,
                          int64_t k0, int64_t K) {
    for (int at = threadIdx.x; at < GEMM_K * GEMM_TILE; at += GEMM_THREADS) {
        const int k = s.col == 1 ? at % GEMM_K : at / GEMM_TILE;
        const int i = s.col == 1 ? at / GEMM_K : at % GEMM_TILE;
        const bool there = first + i < rows && k0 + k < K;
        panel[k][i] = there ? widen(s.p[(first + i) * s.row + (k0 + k) * s.col]) : 0.0f;
    }
}

template <typename I, typename O, typename J>
__global__ void __launch_bounds__(GEMM_THREADS) gemm_tile(const gemm<I, O, J> g, int64_t tiles_n) {
    constexpr bool pairs = sizeof(I) < sizeof(float) && sizeof(J) < sizeof(float);
    HS_SHARED(gemm_panel, a, );
    HS_SHARED(gemm_panel, b, );
    const int64_t i0 = blockIdx.x / tiles_n * GEMM_TILE, j0 = blockIdx.x % tiles_n * GEMM_TILE;
    const int ti = threadIdx.x / 16 * 4, tj = threadIdx.x % 16;
    float c[4][4] = {};
    if (g.from_old)
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < 4; j++)
                if (i0 + ti + i < g.m && j0 + tj + 16 * j < g.n)
                    c[i][j] = widen(g.out[(i0 + ti + i) * g.ld_out + j0 + tj + 16 * j]);
    for (int64_t k0 = 0; k0 < g.k; k0 += GEMM_K) {
        gemm_fetch(a, g.a, i0, g.m, k0, g.k);
        gemm_fetch(b, g.b, j0, g.n, k0, g.k);
        __syncthreads();
        const int kn = (int)min64(GEMM_K, g.k - k0);
        for (int at = 0; at < (pairs ? (kn + 1) / 2 * 2 : kn); at++) {
            const int k = pairs ? at ^ 1 : at; /* an odd kn ends on a panel's zeros */
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++)
                    c[i][j] = chain<pairs>(a[k][ti + i], b[k][tj + 16 * j], c[i][j]);
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int64_t row = i0 + ti + i, column = j0 + tj + 16 * j;
            if (row >= g.m || column >= g.n) continue;
            float x = c[i][j];
            O *out = g.out + row * g.ld_out + column;
            if (g.scale_a) x = (x * *g.scale_a) * *g.scale_b;
            if (g.bias) x = x + g.bias[column];
            if (g.rounded_bias) x = x + widen(g.rounded_bias[column]);
            if (g.res) x = x + widen(g.res[row * g.ld_res + column]);
            if (g.add_old) x = x + widen(*out);
            narrow(x, out);
        }
}

template <typename I, typename O, typename J>
static hs_status gemm_run(cudaStream_t stream, const gemm<I, O, J> &g) {
    const int64_t tiles_n = hs_ceil_div(g.n, GEMM_TILE);
    const unsigned tiles = (unsigned)(hs_ceil_div(g.m, GEMM_TILE) * tiles_n);
    return HS_LAUNCH(gemm_tile, tiles, GEMM_THREADS, stream, g, tiles_n);
}

#endif
