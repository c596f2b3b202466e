/* The last layer with its loss, in chunks of CHUNK rows, so that the logits of all rows never
 * exist.
 *
 *   logits[i,v] = sum over c of x[r,c] w[v,c], kept in acc;  lse = log sum_v exp(logits[i,v])
 *   fwd    loss[r] = lse - logits[i,target[r]]
 *   grad   loss as in fwd; the gradients of scale * (sum of all losses):
 *          dlogits[i,v] = scale (exp(logits[i,v] - lse) - [v == target[r]]), rounded to dt
 *          dx[r] = sum over v ascending of dlogits[i,v] w[v], written, rounded once
 *          dw[v]: from the old value on (ACCUM 0: from +0), rows ascending, + dlogits[i,v] x[r]
 *   logits (inference) logits[r,v] for all rows
 *
 * A row with target < 0 is left out: loss 0, dlogits 0, dx 0. A target is below V. The maximum is
 * taken off before every exp. The last chunk may be short. CHUNK and the cuts between chunks do not
 * change the bits of the fast set (a row's sums and dw's chain are the same); ref rounds dw once a
 * chunk. Where dt is acc, dlogits may lie where logits do: a row's logits are read before its
 * dlogits are written.
 */
#ifndef HS_KERNELS_CLASSIFIER_H
#define HS_KERNELS_CLASSIFIER_H

#include "kernels/kernels.h"

#endif
