/* The two formats of FP8 (kernels/quantise.h) with the operations of vec.h: a virtual vector at a
 * time on the CPU, one number at a time where kernels/cuda/lane.h includes this. Codes lie in the
 * low bytes of a vi. e5m2 is a constant wherever these are inlined. */
#ifndef HS_KERNELS_CPU_VEC_FP8_H
#define HS_KERNELS_CPU_VEC_FP8_H

#ifndef HS_KERNELS_CPU_VEC_H
#include "kernels/cpu/vec.h"
#endif

#define FP8_MANTISSA(e5m2) ((e5m2) ? 2 : 3)
#define FP8_MOST(e5m2)     ((e5m2) ? 57344.0f : 448.0f)
/* what is added to an exponent of the format, in place, to make it one of f32 */
#define FP8_REBIAS(e5m2) ((e5m2) ? 112u << 2 : 120u << 3)
/* the least normal number; a number whose last place is the least number, and its bits */
#define FP8_NORMAL(e5m2)     ((e5m2) ? 0x1p-14f : 0x1p-6f)
#define FP8_MAGIC(e5m2)      ((e5m2) ? 128.0f : 16384.0f)
#define FP8_MAGIC_BITS(e5m2) ((e5m2) ? 0x43000000u : 0x46800000u)
#define FP8_NAN              0x7fu
#define FP8_LEAST_SCALE      (-100)

/* The code of the nearest number, ties to even; beyond MOST, MOST; of a NaN FP8_NAN. */
VINLINE vi v_fp8(vf x, int e5m2) {
    const int drop = 23 - FP8_MANTISSA(e5m2);
    const vi sign = vi_and(vi_shr(v_bits(x), 24), vi_set1(0x80));
    const vf size = v_from_bits(vi_and(v_bits(x), vi_set1(0x7fffffff)));
    const vi low =
        vi_sub(v_bits(v_add(size, v_set1(FP8_MAGIC(e5m2)))), vi_set1(FP8_MAGIC_BITS(e5m2)));
    const vi m = v_bits(v_min(size, v_set1(FP8_MOST(e5m2))));
    const vi even = vi_and(vi_shr(m, drop), vi_set1(1));
    const vi up = vi_add(m, vi_add(even, vi_set1((1u << (drop - 1)) - 1)));
    const vi high = vi_sub(vi_shr(up, drop), vi_set1(FP8_REBIAS(e5m2)));
    const vf code =
        v_select_lt(size, v_set1(FP8_NORMAL(e5m2)), v_from_bits(low), v_from_bits(high));
    const vf signed_code = v_from_bits(vi_or(v_bits(code), sign));
    /* a NaN is not above -1 */
    return v_bits(v_select_lt(v_set1(-1.0f), size, signed_code, v_from_bits(vi_set1(FP8_NAN))));
}

/* The number of a code. */
VINLINE vf v_from_fp8(vi code, int e5m2) {
    const int drop = 23 - FP8_MANTISSA(e5m2);
    const vi size = vi_and(code, vi_set1(0x7f)), sign = vi_shl(vi_and(code, vi_set1(0x80)), 24);
    const vf low =
        v_sub(v_from_bits(vi_or(size, vi_set1(FP8_MAGIC_BITS(e5m2)))), v_set1(FP8_MAGIC(e5m2)));
    const vf high = v_from_bits(vi_shl(vi_add(size, vi_set1(FP8_REBIAS(e5m2))), drop));
    vf x = v_select_lt(high, v_set1(FP8_NORMAL(e5m2)), low, high);
    const vf nan = v_from_bits(vi_set1(0x7fc00000));
    if (e5m2) { /* 2^16: infinity; above: NaN */
        const vf beyond = v_select_lt(v_set1(65536.0f), x, nan, v_from_bits(vi_set1(0x7f800000)));
        x = v_select_lt(x, v_set1(65536.0f), x, beyond);
    } else {
        x = v_select_lt(x, v_set1(480.0f), x, nan);
    }
    return v_from_bits(vi_or(v_bits(x), sign));
}

/* Exponent of the scale of a tensor whose largest magnitude has these bits: above 0 and finite.
 * MOST is 1.75 times a power of two. */
VINLINE int fp8_scale_exponent(uint32_t most, int e5m2) {
    const int top = e5m2 ? 15 : 8;
    const int e = (int)(most >> 23) - 127 - top + ((most & 0x7fffffu) > 0x600000u);
    return e < FP8_LEAST_SCALE ? FP8_LEAST_SCALE : e;
}

/* Bits of the scale, and of what numbers are multiplied with, for the largest magnitude's bits;
 * `finite`: no element is infinite or NaN. */
VINLINE uint32_t fp8_scale_bits(uint32_t most, int finite, int e5m2) {
    if (!finite) return 0x7fc00000u;
    return most == 0 ? 0x3f800000u : (uint32_t)(fp8_scale_exponent(most, e5m2) + 127) << 23;
}
VINLINE uint32_t fp8_inverse_bits(uint32_t scale) {
    return scale == 0x7fc00000u ? scale : (254u << 23) - scale;
}

#endif
