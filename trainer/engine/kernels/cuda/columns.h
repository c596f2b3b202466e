/* Sums over rows for every column: gradients of norms' weights and of biases.
 *
 * Order, of this set alone (the CPU's is one chain over all rows, which would leave a GPU idle):
 * row r belongs to lane r % COLUMN_LANES; a lane is one chain, rows ascending, from 0; lanes join
 * by the tree 32, 16, ..., 1; the old value is added last. It depends on the number of rows alone.
 *
 * A block does COLUMNS columns: the threads of a lane one pack each, side by side.
 */
#ifndef HS_KERNELS_CUDA_COLUMNS_H
#define HS_KERNELS_CUDA_COLUMNS_H

#include "kernels/cuda/lane.h"

enum { COLUMNS = 32, COLUMN_LANES = 64 };

template <typename T> struct columns_of {
    static const int N = pack_of<T>::N;
    static const int ACROSS = COLUMNS / N; /* threads of a lane */
    static const int THREADS = ACROSS * COLUMN_LANES;
};

typedef float column_sums[COLUMN_LANES][COLUMNS + 1];

/* The sums of all lanes, on top of old. Every thread of the block calls it. */
template <int N>
HS_DEVICE void join_columns(column_sums &sums, const lanes<N> &own, float *old, int64_t C) {
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
    if (lane == 0)
        for (int i = 0; i < N; i++)
            if (column + i < C) old[column + i] = old[column + i] + sums[0][first + i];
}

#endif
