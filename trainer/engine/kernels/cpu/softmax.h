/* A row of logits: its largest, and the exponentials of what the others are below it. */
#ifndef HS_KERNELS_CPU_SOFTMAX_H
#define HS_KERNELS_CPU_SOFTMAX_H

#include "kernels/cpu/vec_math.h"

/* The largest of z[n], n at least 1. */
VINLINE float largest_of(const float *z, int64_t n) {
    const int64_t whole = n / LANES * LANES, fours = n / (4 * LANES) * (4 * LANES);
    vf top = v_set1(z[0]), most[4] = {top, top, top, top};
#define MOST(i) most[i] = v_max(most[i], v_load(z + v + (i) * LANES));
    for (int64_t v = 0; v < fours; v += 4 * LANES) {
        V_FOUR(MOST)
    }
#undef MOST
    top = v_max(v_max(most[0], most[1]), v_max(most[2], most[3]));
    for (int64_t v = fours; v < whole; v += LANES) top = v_max(top, v_load(z + v));
    float largest = v_max_lanes(top);
    for (int64_t v = whole; v < n; v++) largest = largest > z[v] ? largest : z[v];
    return largest;
}

/* Sums of e = exp(z[n] - largest) in LANES partials, indices ascending. z becomes e where `kept`; after: as many
 * numbers that are read next, to be fetched meanwhile. */
VINLINE vf exps_of(float *z, int64_t n, float largest, const float *after, int kept) {
    const int64_t fours = n / (4 * LANES) * (4 * LANES);
    const vf top = v_set1(largest);
    vf sum = v_zero();
#define ASK(i)  __builtin_prefetch(after + v + (i) * LANES, 0, 2);
#define REST(i) e[i] = v_sub(v_load(z + v + (i) * LANES), top);
#define SUM(i)  sum = v_add(sum, e[i]);
#define KEEP(i) v_store(z + v + (i) * LANES, e[i]);
    for (int64_t v = 0; v < fours; v += 4 * LANES) {
        vf e[4];
        V_FOUR(ASK)
        V_FOUR(REST)
        v_exp4(e, 0);
        V_FOUR(SUM)
        if (kept) {
            V_FOUR(KEEP)
        }
    }
#undef ASK
#undef REST
#undef SUM
#undef KEEP
    for (int64_t v = fours; v < n; v += LANES) {
        vf e = v_keep(v_exp(v_sub(v_load_n(z + v, n - v), top)), n - v);
        sum = v_add(sum, e);
        if (kept) v_store_n(z + v, e, n - v);
    }
    return sum;
}

#endif
