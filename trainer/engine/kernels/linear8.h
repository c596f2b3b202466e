/* A linear layer of linear.h on operands that quantise.h made: x8 and w8 in E4M3, dy8 in E5M2.
 *
 *   fwd    y[r,n] = ((sum over k ascending of x8[r,k] w8[n,k]) xs) ws + b[n]) + res[r,n], rounded once
 *   igrad  dx[r,k] = ((sum over n ascending of dy8[r,n] w8t[k,n]) dys) ws   (ACCUM 1: + old dx),
 *          rounded once
 *   wgrad  dw[n,k] = old + ((sum over rows ascending of dy8t[n,r] x8t[k,r]) dys) xs
 *          db[n]: linear.h's, of dy itself
 *
 * Both operands of each product have the index that is summed over side by side, which is the only
 * form that the tensor cores take FP8 in: hence the transposes. The fast set takes each sum as one
 * chain of fused multiply-adds in f32 from 0, in the order of bf16 (linear.h). ref sums in double.
 */
#ifndef HS_KERNELS_LINEAR8_H
#define HS_KERNELS_LINEAR8_H

#include "kernels/kernels.h"

#endif
