/* The gated MLP's middle: gu[R,2F] holds a row's gates, then its ups.
 *
 *   fwd    y = silu(gate) up,  silu(z) = z sigmoid(z),  sigmoid(z) = 1 / (1 + exp(-z))
 *   igrad  dgate = dy up sigmoid(gate) (1 + gate (1 - sigmoid(gate)));  dup = dy silu(gate)
 *
 * Elementwise. igrad: dgu may be gu.
 */
#ifndef HS_KERNELS_SWIGLU_H
#define HS_KERNELS_SWIGLU_H

#include "kernels/kernels.h"

#endif
