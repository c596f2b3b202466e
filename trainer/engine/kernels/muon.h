/* Muon: the step of a hidden matrix is its momentum, made orthogonal (docs/adr/0025). A plan makes it of
 * these and of linear layers' products in f32 (trainer/plan/muon.py): x is u over its norm, and five
 * times, with the smaller side first, p = x x^T, q = p p^T, q = a + b p + c q, x = q x.
 *
 *   muon_momentum  g' = g clip_scale
 *                  u  = g' + momentum (momentum m + g')
 *   muon_scale     x  = x s, s = 1 / (sqrt(sumsq) + eps), made in double and rounded once
 *   muon_poly      q  = (b p + c q) + a on the diagonal, of S x S
 *   muon           m  = momentum m + g'
 *                  w  = w - (lr_decay decay) w
 *                  w  = w - (lr_decay scale) o
 *                  wc = w rounded to dt (the copy that the kernels read), g = 0
 *   muon_copy      only the wc that muon writes; w and o stay
 *
 * clip_scale and lr_decay, which is the learning rate, come from the control block (hs_step_control in
 * wire/plan.h). m is one momentum; there is no second moment. All in acc and in this order, elementwise.
 */
#ifndef HS_KERNELS_MUON_H
#define HS_KERNELS_MUON_H

#include "kernels/kernels.h"

#endif
