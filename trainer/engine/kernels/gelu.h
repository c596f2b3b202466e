/* GELU in the tanh form of GPT-2.
 *
 *   fwd    y = x/2 (1 + tanh(A (x + B x^3)))
 *   igrad  dx = dy (1/2 (1 + th) + x/2 (1 - th^2) A (1 + 3 B x^2)), th the tanh above; dx may be dy
 *
 * Elementwise.
 */
#ifndef HS_KERNELS_GELU_H
#define HS_KERNELS_GELU_H

#include "kernels/kernels.h"

#define HS_GELU_A 0x1.9884533d43651p-1 /* sqrt(2/pi) */
#define HS_GELU_B 0.044715

#endif
