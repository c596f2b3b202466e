/* Layer normalisation over rows of C.
 *
 *   fwd    mean = sum x / C;  rstd = 1 / sqrt(sum (x - mean)^2 / C + eps);  h = (x - mean) rstd
 *          y = h w + b
 *   igrad  g = dy w;  dx (+)= rstd (g - sum g / C - h sum(g h) / C)
 *   wgrad  dw += sum over rows of dy h;  db += sum over rows of dy
 *
 * Two passes: the variance is taken around the stored mean. igrad and wgrad read mean and rstd as
 * fwd stored them and recompute h. Order: sums inside a row in the fixed 16-lane tree of the fast
 * set (ref: ascending, in double); sums over rows ascending, from the old dw and db.
 * igrad with ACCUM 1: the old dx (`old`, where it is given) is added before the one rounding.
 */
#ifndef HS_KERNELS_LAYERNORM_H
#define HS_KERNELS_LAYERNORM_H

#include "kernels/kernels.h"

#endif
