/* Causal attention with grouped queries. Rows are b*T + t; head h of a row of q, y, dy, dq starts
 * at h*D and reads key/value head h / (H/G), which starts at that times D in k, v, dk, dv.
 *
 *   s[t,u] = scale * q[t] . k[u], low(t) <= u <= t;  lse[t] = log sum_u exp(s[t,u]);  p = exp(s - lse)
 *   fwd    y[t] = sum_u p[t,u] v[u];  lse is kept, [B,H,T]
 *   igrad  delta[t] = dy[t] . y[t];  ds = p (dy[t] . v[u] - delta[t])
 *          dq[t] = scale sum_u ds k[u];  dk[u] = scale sum_t ds q[t];  dv[u] = sum_t p dy[t]
 *          dk and dv sum over the query heads of their group, ascending, t ascending inside a head
 *
 * low(t), the first key that row t reads, is first[b,t] (borders.h), or t - WINDOW + 1 where WINDOW is
 * above 0 and that is later. Where neither is given it is 0.
 *
 * Outputs are written, not added to, and rounded once; scores are never kept. In bf16 p and ds are rounded to it
 * where they are multiplied with v, dy, k and q (the sum of p and delta are of what they were before), and products
 * go over pairs, as linear layers' do (linear.h).
 * delta [B,H,T] is scratch: written, meaningless afterwards. Attention has no weights, so no wgrad.
 * The order of the sums over u (blocks and a running maximum) is that of a set and depends on T, D
 * and what row t reads alone, never on threads, B, or the other rows. D is at most HS_ATTENTION_HEAD_MAX.
 */
#ifndef HS_KERNELS_ATTENTION_H
#define HS_KERNELS_ATTENTION_H

#include "kernels/borders.h"

#endif
