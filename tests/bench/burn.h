/* What a core can do: independent chains of fused multiply-adds in registers. Included once by a bench. */
#ifndef HS_TESTS_BURN_H
#define HS_TESTS_BURN_H

#include <stdint.h>
#include <time.h>

#include "kernels/cpu/vec.h"

/* One thread by its own clock: other processes do not count. */
static double now(int threads) {
    struct timespec t;
    clock_gettime(threads == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static volatile float sink;

/* CHAINS vectors, so that latency does not show on any of the instruction sets. */
#define CHAINS   12
#define CHAIN(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
#define MAKE(c)  vf x##c = v_count_from((float)(16 * c)); /* no two lanes alike: nothing to share */
#define GO(c)    x##c = v_fma(x##c, a, b);
#define ADD(c)   sum = v_add(sum, x##c);

/* 2 LANES CHAINS operations a step. */
static void burn_fma(int64_t steps) {
    const vf a = v_set1(0.999f), b = v_set1(0.001f);
    CHAIN(MAKE)
    for (int64_t s = 0; s < steps; s++) {
        CHAIN(GO)
    }
    vf sum = v_zero();
    CHAIN(ADD)
    sink = v_sum(sum);
}

#undef MAKE
#undef GO
#undef ADD

#endif
