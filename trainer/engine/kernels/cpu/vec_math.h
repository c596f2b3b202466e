/* exp, log, sine and cosine of 16 lanes, in f32: polynomials (after Cephes) written with v_fma
 * only, so every build gives the same bits. Within 2 ulp of the true value over the ranges named
 * (tests compare). */
#ifndef HS_KERNELS_CPU_VEC_MATH_H
#define HS_KERNELS_CPU_VEC_MATH_H

#include "kernels/cpu/vec.h"

#define V_MAGIC                                                                                    \
    12582912.0f /* 1.5 * 2^23: adding it rounds to an integer, found in the low bits               \
                 */

/* e^x. Below -86.9: 0. Above 88: e^88. NaN stays NaN. */
VINLINE vf v_exp(vf x) {
    const vf low = v_set1(-86.9f);
    vf y = v_min(v_set1(88.0f), v_max(low, x));
    vf t = v_fma(y, v_set1(1.44269504088896341f), v_set1(V_MAGIC));
    vf n = v_sub(t, v_set1(V_MAGIC));
    vf r = v_fma(n, v_set1(-0.693359375f), y);
    r = v_fma(n, v_set1(2.12194440e-4f), r);
    vf p = v_set1(1.9875691500e-4f);
    p = v_fma(p, r, v_set1(1.3981999507e-3f));
    p = v_fma(p, r, v_set1(8.3334519073e-3f));
    p = v_fma(p, r, v_set1(4.1665795894e-2f));
    p = v_fma(p, r, v_set1(1.6666665459e-1f));
    p = v_fma(p, r, v_set1(5.0000001201e-1f));
    p = v_add(v_fma(p, v_mul(r, r), r), v_set1(1.0f));
    /* times 2^n: n sits in the low bits of t; the shift drops the rest of t */
    vf e = v_from_bits(vi_add(v_bits(p), vi_shl(v_bits(t), 23)));
    e = v_select_lt(x, low, v_zero(), e);
    /* NaN: bit arithmetic above may have made it a number; p is NaN still */
    return v_add(e, v_mul(v_zero(), y));
}

/* log(1 + f) + e log 2, for 1 + f in [sqrt(1/2), sqrt(2)) */
VINLINE vf v_log_core(vf f, vf e) {
    vf z = v_mul(f, f);
    vf p = v_set1(7.0376836292e-2f);
    p = v_fma(p, f, v_set1(-1.1514610310e-1f));
    p = v_fma(p, f, v_set1(1.1676998740e-1f));
    p = v_fma(p, f, v_set1(-1.2420140846e-1f));
    p = v_fma(p, f, v_set1(1.4249322787e-1f));
    p = v_fma(p, f, v_set1(-1.6668057665e-1f));
    p = v_fma(p, f, v_set1(2.0000714765e-1f));
    p = v_fma(p, f, v_set1(-2.4999993993e-1f));
    p = v_fma(p, f, v_set1(3.3333331174e-1f));
    vf y = v_mul(v_mul(p, f), z);
    y = v_fma(e, v_set1(-2.12194440e-4f), y);
    y = v_fma(z, v_set1(-0.5f), y);
    return v_fma(e, v_set1(0.693359375f), v_add(f, y));
}

/* Splits a positive normal x into 2^e (1 + f). */
VINLINE void v_log_split(vf x, vf *f, vf *e) {
    vi bits = v_bits(x);
    vi biased = vi_shr(vi_add(bits, vi_set1(0x3f800000u - 0x3f3504f3u)), 23);
    vi m = vi_add(vi_sub(bits, vi_shl(biased, 23)), vi_set1(0x3f800000u));
    *f = v_sub(v_from_bits(m), v_set1(1.0f));
    /* an integer below 2^23 becomes a float by way of 2^23's low bits */
    *e = v_sub(v_from_bits(vi_or(biased, vi_set1(0x4b000000u))), v_set1(8388608.0f + 127.0f));
}

/* log x for positive normal finite x. */
VINLINE vf v_log(vf x) {
    vf f, e;
    v_log_split(x, &f, &e);
    return v_log_core(f, e);
}

/* log of one number; NaN and infinity pass through (a sum of exponentials is at least 1) */
VINLINE float log1_f32(float x) {
    float t[16];
    if (!(x < 3.0e38f)) return x;
    v_store(t, v_log(v_set1(x)));
    return t[0];
}

VINLINE float exp1_f32(float x) {
    float t[16];
    v_store(t, v_exp(v_set1(x)));
    return t[0];
}

/* u32 to f32, rounded once */
VINLINE vf v_from_u32(vi x) {
    const vi magic = vi_set1(0x4b000000u);
    vf high = v_sub(v_from_bits(vi_or(vi_shr(x, 16), magic)), v_set1(8388608.0f));
    vf low = v_sub(v_from_bits(vi_or(vi_and(x, vi_set1(0xffff)), magic)), v_set1(8388608.0f));
    return v_fma(high, v_set1(65536.0f), low);
}

/* Sine and cosine of the angle 2 pi w / 2^32, without argument error: the two top bits (after
 * rounding) name the quarter, the rest is an angle in [-pi/4, pi/4). */
VINLINE void v_sincos_turn(vi w, vf *sine, vf *cosine) {
    vi shifted = vi_add(w, vi_set1(0x20000000u));
    vi quarter = vi_shr(shifted, 30);
    vf x = v_sub(v_from_u32(vi_and(shifted, vi_set1(0x3fffffffu))), v_set1(536870912.0f));
    x = v_mul(x, v_set1(0x1.921fb6p-30f)); /* (pi / 2) / 2^30 */
    vf z = v_mul(x, x);
    vf s = v_fma(v_set1(-1.9515295891e-4f), z, v_set1(8.3321608736e-3f));
    s = v_fma(s, z, v_set1(-1.6666654611e-1f));
    s = v_fma(v_mul(s, z), x, x);
    vf c = v_fma(v_set1(2.443315711809948e-5f), z, v_set1(-1.388731625493765e-3f));
    c = v_fma(c, z, v_set1(4.166664568298827e-2f));
    c = v_fma(v_mul(c, z), z, v_fma(z, v_set1(-0.5f), v_set1(1.0f)));
    /* quarter 1: (c, -s), 2: (-s, -c), 3: (-c, s) in (sine, cosine) */
    vf odd = v_from_bits(vi_or(vi_and(quarter, vi_set1(1)), vi_set1(0x3f800000u)));
    const vf one = v_set1(1.0f);
    vf sin_part = v_select_lt(one, odd, c, s), cos_part = v_select_lt(one, odd, s, c);
    vi sin_sign = vi_shl(vi_shr(quarter, 1), 31);
    vi cos_sign = vi_shl(vi_shr(vi_add(quarter, vi_set1(1)), 1), 31);
    *sine = v_from_bits(vi_xor(v_bits(sin_part), sin_sign));
    *cosine = v_from_bits(vi_xor(v_bits(cos_part), cos_sign));
}

/* 1 / (1 + e^-x) and its complement, both to full relative accuracy */
VINLINE void v_sigmoid(vf x, vf *s, vf *one_minus_s) {
    vf e = v_exp(v_sub(v_zero(), x));
    vf d = v_div(v_set1(1.0f), v_add(v_set1(1.0f), e));
    *s = d;
    *one_minus_s = v_mul(e, d);
}

#endif
