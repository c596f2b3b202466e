/* Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
 * 1, 2, 3").
 *
 * A number depends on (seed, tensor, use, element) and on nothing else: no state, no order, no
 * rank. Layout:
 *
 *   key      k0 = low 32 bits of seed ^ tensor * 0x9E3779B9 (mod 2^32)
 *            k1 = high 32 bits of seed ^ use                         use: HS_RNG_USE_*
 *   counter  c0, c1 = low, high 32 bits of element / 4;  c2, c3 = 0  (left for step and microbatch)
 *   output   four words x0..x3, one for each of the elements 4q .. 4q+3
 *
 * Standard normals (hs_rng_normal), by Box-Muller: words (0,1) give elements 4q and 4q+1, words
 * (2,3) give 4q+2 and 4q+3. Of a pair (a, b):
 *
 *   u = (a + 1) * 2^-32, in (0, 1]     r = sqrt(-2 log u)     angle = 2 pi b 2^-32
 *   even element: r cos(angle)         odd element: r sin(angle)
 *
 * so |normal| <= sqrt(64 log 2) = 6.66. Computed here in double; a kernel that works in f32 takes
 * the same integers and agrees to 1e-6. Pure functions, thread-safe.
 */
#ifndef HS_CORE_RNG_H
#define HS_CORE_RNG_H

#include <math.h>
#include <stdint.h>

#include "core/math.h"

enum { HS_RNG_USE_INIT = 1 }; /* initial weights */

typedef struct hs_rng_key {
    uint32_t k0, k1;
} hs_rng_key;

static inline hs_rng_key hs_rng_make_key(uint64_t seed, uint32_t tensor, uint32_t use) {
    hs_rng_key key = {(uint32_t)seed ^ tensor * 0x9E3779B9u, (uint32_t)(seed >> 32) ^ use};
    return key;
}

/* One block: ten rounds over the counter in c[4], the result replaces it. */
static inline void hs_philox4x32_10(uint32_t c[4], hs_rng_key key) {
    for (int round = 0; round < 10; round++) {
        uint64_t a = (uint64_t)0xD2511F53u * c[0];
        uint64_t b = (uint64_t)0xCD9E8D57u * c[2];
        uint32_t c1 = c[1], c3 = c[3];
        c[0] = (uint32_t)(b >> 32) ^ c1 ^ key.k0;
        c[1] = (uint32_t)b;
        c[2] = (uint32_t)(a >> 32) ^ c3 ^ key.k1;
        c[3] = (uint32_t)a;
        key.k0 += 0x9E3779B9u;
        key.k1 += 0xBB67AE85u;
    }
}

/* The four words of elements 4*quad .. 4*quad+3. */
static inline void hs_rng_words(hs_rng_key key, uint64_t quad, uint32_t out[4]) {
    out[0] = (uint32_t)quad;
    out[1] = (uint32_t)(quad >> 32);
    out[2] = 0;
    out[3] = 0;
    hs_philox4x32_10(out, key);
}

/* Standard normal of one element. */
static inline double hs_rng_normal(hs_rng_key key, uint64_t element) {
    uint32_t x[4];
    hs_rng_words(key, element / 4, x);
    uint32_t a = x[element & 2], b = x[(element & 2) + 1];
    double r = sqrt(-2.0 * hs_log(((double)a + 1.0) * 0x1p-32));
    double angle = 0x1.921fb54442d18p+2 * ((double)b * 0x1p-32);
    return r * (element & 1 ? hs_sin(angle) : hs_cos(angle));
}

#endif
