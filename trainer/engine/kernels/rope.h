/* Rotary position embedding, the "half" form (GPT-NeoX, Llama in Hugging Face's layout).
 *
 *   table  angle = t / base^(2i/D), i < D/2;  tab[t,i] = (cos angle, sin angle)
 *   fwd    (a, b) = (x[i], x[i + D/2]) of each head -> (a c - b s, b c + a s), in place
 *   igrad  the same with -s: turns a gradient back, in place
 *
 * The table is computed in double (core/math.h) and rounded once. Elementwise, so no order of sums.
 * t = r % T - first[r] (borders.h); R is a multiple of T; D is even.
 */
#ifndef HS_KERNELS_ROPE_H
#define HS_KERNELS_ROPE_H

#include "kernels/borders.h"

#endif
