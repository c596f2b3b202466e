/* What every backend's check computes with (check.h): the inputs of a product whose bits are known,
 * and a word for every place of memory. C++ may include it. */
#ifndef HS_BACKEND_SHEET_H
#define HS_BACKEND_SHEET_H

#include <stdint.h>

#include "core/rng.h"

enum { HS_SHEET_X = 1, HS_SHEET_W = 2 }; /* streams of hs_sheet_fill */

/* The first n numbers of a fixed stream, in [-0.5, 0.5) with 24 random bits. */
static inline void hs_sheet_fill(float *x, int64_t n, uint32_t stream) {
    const hs_rng_key key = hs_rng_make_key(1, stream, 0);
    for (int64_t i = 0; i < n; i += 4) {
        uint32_t words[4];
        hs_rng_words(key, (uint64_t)i / 4, words);
        for (int64_t k = 0; k < 4; k++)
            x[i + k] = (float)((int32_t)(words[k] >> 8) - (1 << 23)) * 0x1p-24f;
    }
}

/* Every word names its place, so that two addresses of one cell are seen too. The second pass has
 * every bit the other way. */
#define HS_SHEET_PATTERN(at, pass)                                                                 \
    (((uint64_t)(at) + 1) * UINT64_C(0x9E3779B97F4A7C15) ^ ((pass) ? ~UINT64_C(0) : UINT64_C(0)))

#endif
