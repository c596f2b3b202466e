/* The C library's, less rsqrt: newer ones declare it, and CUDA's own declaration contradicts theirs. (cos is declared
 * a second time instead.) */
#pragma once
#define rsqrt cos
#include_next <math.h>
#undef rsqrt
