/* Token (and learned position) embedding.
 *
 *   fwd    y[r] = wte[tok[r]] + wpe[t], the sum rounded once; t = r % T - first[r] (borders.h)
 *   wgrad  dwte[tok[r]] += dy[r], dwpe[t] += dy[r]
 *   wgrad_tied  dwte[v] += 0 + dy[r] + dy[s] + ..., the rows whose token is v; dwpe as wgrad
 *
 * There is no igrad: tokens have no gradient. Order: rows ascending, each addition rounded to acc;
 * a row of dwte whose token does not occur is not touched. wgrad_tied gives the bits of wgrad into
 * a gradient of its own, zero before, that is then added to dwte. R is a multiple of T. Tokens are in [0,
 * V): the reader of the shards checked them (data/), a kernel asserts or trusts it.
 */
#ifndef HS_KERNELS_EMBED_H
#define HS_KERNELS_EMBED_H

#include "kernels/borders.h"

/* top[v]: the first row whose token is v; next[r]: the row after r with r's token; -1: none. */
static inline void hs_embed_rows_of(const int32_t *tok, int64_t R, int64_t V, int32_t *top,
                                    int32_t *next) {
    for (int64_t v = 0; v < V; v++) top[v] = -1;
    for (int64_t r = R - 1; r >= 0; r--) {
        next[r] = top[tok[r]];
        top[tok[r]] = (int32_t)r;
    }
}

#endif
