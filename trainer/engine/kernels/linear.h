/* A linear layer, y = x w^T + b + res, its weight kept as w[N,K] (one row an output).
 *
 *   fwd    y[r,n] = ((sum over k ascending of x[r,k] w[n,k]) + b[n]) + res[r,n], rounded once to dt
 *   igrad  dx[r,k] = sum over n ascending of dy[r,n] w[n,k]   (ACCUM 1: + old dx), rounded once
 *   wgrad  dw[n,k]: from the old value on (ACCUM 0: from +0, and dw is not read), over rows
 *          ascending, + dy[r,n] x[r,k]
 *          db[n]:   from the old value on, over rows ascending, + dy[r,n]
 *
 * The fast set takes each sum as one chain of fused multiply-adds in f32 (products are never
 * rounded), so the result does not depend on blocking, vector width or threads. In bf16 it goes
 * through pairs of the inner index in ascending order, the odd one of a pair first, and denormal
 * numbers count as zero (cpu/gemm.h). ref sums in double.
 * Activations have a leading dimension of their own (parts of a wider buffer); w and dw are dense.
 */
#ifndef HS_KERNELS_LINEAR_H
#define HS_KERNELS_LINEAR_H

#include "kernels/kernels.h"

#endif
