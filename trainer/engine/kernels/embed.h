/* Token (and learned position) embedding.
 *
 *   fwd    y[r] = wte[tok[r]] + wpe[t], the sum rounded once; t = r % T - first[r] (borders.h)
 *   wgrad  dwte[tok[r]] += dy[r], dwpe[t] += dy[r]
 *
 * There is no igrad: tokens have no gradient. Order: rows ascending, each addition rounded to acc;
 * a row of dwte whose token does not occur is not touched. R is a multiple of T. Tokens are in [0,
 * V): the reader of the shards checked them (data/), a kernel asserts or trusts it.
 */
#ifndef HS_KERNELS_EMBED_H
#define HS_KERNELS_EMBED_H

#include "kernels/borders.h"

#endif
