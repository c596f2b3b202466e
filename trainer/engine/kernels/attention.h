/* Causal attention with grouped queries. Rows are b*T + t; head h of a row of q, o, do, dq starts
 * at h*D and reads key/value head h / (H/G), which starts at that times D in k, v, dk, dv.
 *
 *   s[t,u] = scale * q[t] . k[u], u <= t;  lse[t] = log sum_u exp(s[t,u]);  p = exp(s - lse)
 *   fwd    o[t] = sum_u p[t,u] v[u];  lse is kept, [B,H,T]
 *   igrad  delta[t] = do[t] . o[t];  ds = p (do[t] . v[u] - delta[t])
 *          dq[t] = scale sum_u ds k[u];  dk[u] = scale sum_t ds q[t];  dv[u] = sum_t p do[t]
 *          dk and dv sum over the query heads of their group, ascending, t ascending inside a head
 *
 * Outputs are written, not added to, and rounded once; scores are never rounded to dt nor kept.
 * delta [B,H,T] is scratch: written, meaningless afterwards. Attention has no weights, so no wgrad.
 * The order of the sums over u (blocks and a running maximum) is that of a set and depends on T and
 * D alone, never on threads, B, or the other rows.
 */
#ifndef HS_KERNELS_ATTENTION_H
#define HS_KERNELS_ATTENTION_H

#include "kernels/kernels.h"

/* Head sizes go up to this (a row fits on the stack); hs_kernel_extent refuses larger ones. */
#define HS_ATTENTION_HEAD_MAX 512

#endif
