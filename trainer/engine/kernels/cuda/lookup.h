/* A function of one bf16 number, looked up. An exponential and a division with the CPU's bits take
 * more time than the memory that an elementwise kernel moves; but bf16 has few numbers, so each block
 * first fills a table in shared memory by that very code, and looks its elements up there.
 *
 * F is a struct of constants and a function: LOW and HIGH, bits of bf16 without their sign, and
 * `static float of(float x)`. Of each sign the table has the numbers from LOW to HIGH. LOW and smaller ones
 * have 1/2; larger ones, infinity and NaN have what HIGH has. What makes that right is F's to say, and
 * test_kernels_cuda.py tries all 65,536 numbers.
 */
#ifndef HS_KERNELS_CUDA_LOOKUP_H
#define HS_KERNELS_CUDA_LOOKUP_H

#include "kernels/cuda/lane.h"

enum {
    LOOKUP_THREADS = 1024, /* of a block */
    LOOKUP_BLOCKS = 2      /* on a processor: all threads that it can have */
};

template <typename F> struct lookup {
    static const int SIGN = F::HIGH - F::LOW + 1; /* numbers of one sign */
    float y[2 * SIGN];
};

/* Every thread of the block calls it. */
template <typename F> HS_DEVICE void lookup_fill(lookup<F> *table) {
    const int SIGN = lookup<F>::SIGN;
#pragma unroll 1
    for (int i = threadIdx.x; i < 2 * SIGN; i += LOOKUP_THREADS) {
        const bool least = i == 0 || i == SIGN;
        const uint32_t number = i < SIGN ? F::LOW + i : 0x8000 + F::LOW + i - SIGN;
        table->y[i] = least ? 0.5f : F::of(__uint_as_float(number << 16));
    }
    __syncthreads();
}

/* x has come from a bf16. */
template <typename F> HS_DEVICE float looked_up(const lookup<F> &table, float x) {
    const int number = (int)(__float_as_uint(x) >> 16 & 0x7fff);
    const int low = number > F::LOW ? number : F::LOW, near = low < F::HIGH ? low : F::HIGH;
    return table.y[near - F::LOW + (int)(__float_as_uint(x) >> 31) * lookup<F>::SIGN];
}

/* The thread's first pack, and from one of its packs to its next, in elements of bf16. */
HS_DEVICE int64_t lookup_first() {
    return ((int64_t)blockIdx.x * LOOKUP_THREADS + threadIdx.x) * pack_of<bf16>::N;
}
HS_DEVICE int64_t lookup_step() {
    return (int64_t)gridDim.x * (LOOKUP_THREADS * pack_of<bf16>::N);
}

/* Host side: blocks that look up n elements, or 0 where filling the tables would take longer than is
 * gained: a pack takes some hundred instructions less, and a number of the table as many as an element
 * without it. */
template <typename F> static inline unsigned lookup_blocks(const hs_cuda_ctx *ctx, int64_t n) {
    const int64_t blocks = (int64_t)ctx->processors * LOOKUP_BLOCKS;
    return n >= blocks * lookup<F>::SIGN * pack_of<bf16>::N ? (unsigned)blocks : 0;
}

#endif
