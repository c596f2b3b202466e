/* What runs once a step over whole tensors.
 *
 *   sumsq       out = sum of x^2 in double: blocks of HS_SUMSQ_BLOCK elements into part[], then out.
 *               Fast set: 16 double lanes a block, joined 8,4,2,1; parts by a fixed pairwise tree.
 *   sumsq_parts, sum    the two halves of that: part[], and out of part[]
 *   adamw       see below
 *   adamw_copy  only the wc that adamw writes; w, m, v and g stay
 *   zero        bytes = 0
 *   cast        dst = src rounded to nearest even
 *   add_acc     dst += src
 *   fold        dst += src, src = 0
 *
 * AdamW has decoupled decay; clip, learning rate and bias corrections come ready from the control
 * block (hs_step_control in wire/plan.h). In acc and in this order, each m, v and w as stored:
 *
 *   g' = g clip_scale
 *   m  = beta1 m + (1 - beta1) g'
 *   v  = beta2 v + ((1 - beta2) g') g'
 *   w  = w - (lr_decay decay) w
 *   w  = w - (step_size m) / (sqrt(v) v_scale + eps)
 *
 * then wc = w rounded to dt (the copy that the kernels read), and g = 0 where ZERO_G is 1.
 * All elementwise but the sums.
 */
#ifndef HS_KERNELS_OPTIMIZER_H
#define HS_KERNELS_OPTIMIZER_H

#include "kernels/kernels.h"

#endif
