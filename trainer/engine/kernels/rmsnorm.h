/* Root-mean-square normalisation of N groups of C in every row, all with the same w[C] (N = 1: a
 * layer's norm; N = heads: Qwen's norms of queries and keys). Element (r, n, c) at r*ld + n*C + c.
 *
 *   fwd    rstd = 1 / sqrt(sum x^2 / C + eps);  y = x rstd w
 *   igrad  g = dy w;  h = x rstd;  dx (+)= rstd (g - h sum(g h) / C)
 *   wgrad  dw += sum over rows, and groups in a row, of dy h
 *
 * Order as in layernorm.h; wgrad: rows ascending, groups ascending inside a row, from the old dw.
 * igrad with ACCUM 1: the old dx (`old`, where it is given) is added before the one rounding.
 */
#ifndef HS_KERNELS_RMSNORM_H
#define HS_KERNELS_RMSNORM_H

#include "kernels/kernels.h"

#endif
