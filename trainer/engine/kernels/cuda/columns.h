/* Sums over rows for every column: gradients of norms' weights and of biases.
 *
 * Order, of this set alone (the CPU's is one chain over all rows, which would leave a GPU idle): rows
 * are cut into parts of column_part(R, C); in a part row r belongs to lane r % COLUMN_LANES, a lane is
 * one chain, rows ascending, from 0, and lanes join by the tree 32, 16, ..., 1; parts join ascending;
 * the old value is added last. It depends on the sizes alone.
 *
 * A block does COLUMNS columns of a part: the threads of a lane one pack each, side by side. Where
 * there are several parts their sums lie in the device's workspace, and a second launch joins them.
 */
#ifndef HS_KERNELS_CUDA_COLUMNS_H
#define HS_KERNELS_CUDA_COLUMNS_H

#include "kernels/cuda/lane.h"
#include "kernels/cuda/libraries.h"

enum {
    COLUMNS = 32,
    COLUMN_LANES = 64,
    COLUMN_ROWS = 256, /* a part has a multiple of so many rows */
    COLUMN_PARTS = 32  /* at most */
};

template <typename T> struct columns_of {
    static const int N = pack_of<T>::N;
    static const int ACROSS = COLUMNS / N; /* threads of a lane */
    static const int THREADS = ACROSS * COLUMN_LANES;
};

typedef float column_sums[COLUMN_LANES][COLUMNS + 1];

/* Where the sums of at most two tensors go. */
struct column_plan {
    int64_t part;   /* rows */
    unsigned parts; /* 1: the sums go to where they belong at once */
    float *to[2];   /* C of each part, or the gradients themselves */
};

static inline int64_t column_part(int64_t R, int64_t C) {
    const int64_t room = (int64_t)(HS_OWN_BYTES / (2 * sizeof(float))) / C;
    const int64_t most = room < 1 ? 1 : room < COLUMN_PARTS ? room : (int64_t)COLUMN_PARTS;
    return COLUMN_ROWS * hs_ceil_div(R, COLUMN_ROWS * most);
}

static inline hs_status plan_columns(const hs_cuda_ctx *ctx, int64_t R, int64_t C, float *a,
                                     float *b, column_plan *out) {
    out->part = column_part(R, C);
    out->parts = (unsigned)hs_ceil_div(R, out->part);
    out->to[0] = a, out->to[1] = b;
    if (out->parts == 1) return HS_OK;
    if (!ctx->workspace) return HS_E_BUG;
    out->to[0] = reinterpret_cast<float *>(HS_OWN_WORKSPACE(ctx));
    out->to[1] = out->to[0] + (int64_t)out->parts * C;
    return HS_OK;
}

static inline dim3 column_grid(const column_plan &p, int64_t C) {
    return dim3((unsigned)hs_ceil_div(C, COLUMNS), p.parts);
}

/* The sums of all lanes: added to old where this is the only part, else put where the part's are.
 * Every thread of the block calls it. */
template <int N>
HS_DEVICE void join_columns(column_sums &sums, const lanes<N> &own, float *to, int64_t C) {
    const int across = COLUMNS / N, lane = threadIdx.x / across;
    const int first = (int)(threadIdx.x % across) * N;
    const int64_t column = (int64_t)blockIdx.x * COLUMNS + first;
    for (int i = 0; i < N; i++) sums[lane][first + i] = own.x[i];
    for (int step = COLUMN_LANES / 2; step; step /= 2) {
        __syncthreads();
        if (lane < step)
            for (int i = 0; i < N; i++)
                sums[lane][first + i] = sums[lane][first + i] + sums[lane + step][first + i];
    }
    if (lane != 0) return;
    to += (int64_t)blockIdx.y * C;
    for (int i = 0; i < N; i++)
        if (column + i < C)
            to[column + i] =
                gridDim.y > 1 ? sums[0][first + i] : to[column + i] + sums[0][first + i];
}

enum { JOIN = 64 }; /* threads of a block, one a column: few columns still reach many processors */

/* old + the parts' sums; blockIdx.y is the tensor. T is float. */
template <typename T>
__global__ void __launch_bounds__(JOIN)
    join_parts(T *a, T *b, const T *of_a, const T *of_b, int parts, int64_t C) {
    const int64_t c = (int64_t)blockIdx.x * JOIN + threadIdx.x;
    if (c >= C) return;
    T *to = blockIdx.y ? b : a;
    const T *from = (blockIdx.y ? of_b : of_a) + c;
    T sum = from[0];
#pragma unroll 8
    for (int p = 1; p < parts; p++) sum = sum + from[p * C];
    to[c] = to[c] + sum;
}

/* After the launch that made the parts. b: NULL where there is one tensor. */
static inline hs_status finish_columns(const hs_cuda_ctx *ctx, const column_plan &p, float *a,
                                       float *b, int64_t C) {
    if (p.parts == 1) return HS_OK;
    const dim3 grid((unsigned)hs_ceil_div(C, JOIN), b ? 2 : 1);
    return HS_LAUNCH(join_parts, grid, JOIN, static_cast<cudaStream_t>(ctx->stream), a, b, p.to[0],
                     p.to[1], (int)p.parts, C);
}

#endif
