/* FP8: a matrix x[R,C] as codes q[R,C] of one byte, their transpose qt[C,R], and one scale s:
 * x is about q s.
 *
 *   s    the least power of two with max|x| <= s MOST, MOST being the format's largest number, but at
 *        least 2^-100; 1 where x is all 0; NaN where an element of x is not finite
 *   q    x / s to the nearest of the format, ties to even, beyond MOST: MOST (v_fp8 of cpu/vec_fp8.h)
 *
 * x / s is exact but where it is far below the format's least number. s comes from all of x at once
 * and from nothing else, so no cut among threads or blocks shows, and none of a layout does: an
 * activation of a microbatch and a weight are whole wherever they are. Nothing is remembered from
 * one step to the next.
 *
 *            exponent  mantissa  bias  MOST           least           NaN          infinity
 *   E4M3     4 bits    3         7     448            2^-9            0x7f, 0xff   none
 *   E5M2     5         2         15    57344          2^-16           0x7d..0x7f   0x7c
 */
#ifndef HS_KERNELS_QUANTISE_H
#define HS_KERNELS_QUANTISE_H

#include "kernels/kernels.h"

#endif
