/* Initial values.
 *
 *   init_normal  w[e] = mean + std * normal(seed, tensor, e), the normals of core/rng.h (use INIT)
 *   init_const   w[e] = value
 *
 * Every element stands alone: any cut of a tensor among calls, threads or ranks gives the same
 * values (a call starts at element 0 of its tensor). TENSOR is the tensor's number in the plan's
 * table. Sets agree on the Philox words exactly and on the normals to 1e-6.
 */
#ifndef HS_KERNELS_INIT_H
#define HS_KERNELS_INIT_H

#include "kernels/kernels.h"

#endif
