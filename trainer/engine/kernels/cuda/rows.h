/* Rows that are summed in the CPU's order of 16 lanes (lane.h) and read once: sixteen threads, half
 * a warp, fetch a row 16 bytes at a time into shared memory, add a lane each from there, and make the
 * result from there. No thread waits for those of another row but its warp's other one.
 *
 * For rows that fit (staged_rows); longer ones take row_of of lane.h, the same bits. */
#ifndef HS_KERNELS_CUDA_ROWS_H
#define HS_KERNELS_CUDA_ROWS_H

#include "kernels/cuda/lane.h"

enum {
    STAGE_BYTES = 16640, /* of a tensor, a block: two rows of 4,096 bf16 and their gaps */
    STAGE_GAP = 16,      /* elements between rows: half a warp's banks */
    STAGE_ROWS = 16,
    STAGE_THREADS = STAGE_ROWS * LANES,
    STAGE_AHEAD = 8 /* packs that a thread has under way */
};

template <int TENSORS> struct alignas(16) row_stage {
    unsigned char at[TENSORS][STAGE_BYTES];
};

/* Rows of a block, 16 threads each; 0: they do not fit. Whole warps. */
template <typename T> static inline int staged_rows(int64_t C) {
    for (int rows = STAGE_ROWS; rows >= 2; rows /= 2)
        if (C <= STAGE_BYTES / ((int)sizeof(T) * rows) - STAGE_GAP) return rows;
    return 0;
}

HS_DEVICE int64_t staged_row() {
    return (int64_t)blockIdx.x * (blockDim.x / LANES) + threadIdx.x / LANES;
}
/* Where this thread's row lies. */
template <typename T> HS_DEVICE T *staged_at(unsigned char *stage, int64_t C) {
    return reinterpret_cast<T *>(stage) + (int64_t)(threadIdx.x / LANES) * (C + STAGE_GAP);
}
HS_DEVICE int staged_lane() {
    return (int)(threadIdx.x % LANES);
}

/* A row of `end` elements (0: there is none) into shared memory; stage_done before it is read. */
template <typename T> HS_DEVICE void stage_row(T *to, const T *row, int64_t end, bool wide) {
    const int N = pack_of<T>::N;
    if (!wide) {
        for (int64_t c = staged_lane(); c < end; c += LANES) to[c] = row[c];
        return;
    }
    for (int64_t c = staged_lane() * N; c < end; c += STAGE_AHEAD * LANES * N) {
        uint4 v[STAGE_AHEAD];
#pragma unroll
        for (int a = 0; a < STAGE_AHEAD; a++)
            if (c + a * LANES * N < end) {
                HS_ALIGNED16(row + c + a * LANES * N);
                v[a] = *reinterpret_cast<const uint4 *>(row + c + a * LANES * N);
            }
#pragma unroll
        for (int a = 0; a < STAGE_AHEAD; a++)
            if (c + a * LANES * N < end) *reinterpret_cast<uint4 *>(to + c + a * LANES * N) = v[a];
    }
}
HS_DEVICE void stage_done() {
    __syncwarp();
}

/* The sum of a row's lanes, to all its threads, by the CPU's tree. Every thread of the warp calls it. */
HS_DEVICE float join_row(float x) {
    for (int bits = LANES / 2; bits; bits /= 2) x = x + __shfl_xor_sync(0xffffffffu, x, bits);
    return x;
}

#endif
