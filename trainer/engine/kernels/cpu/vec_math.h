/* exp, log, sine and cosine of 16 lanes, in f32: polynomials (after Cephes) written with v_fma
 * only, so every build gives the same bits. Within 2 ulp of the true value over the ranges named
 * (tests compare). */
#ifndef HS_KERNELS_CPU_VEC_MATH_H
#define HS_KERNELS_CPU_VEC_MATH_H

#include "kernels/cpu/vec.h"

#define V_MAGIC                                                                                    \
    12582912.0f /* 1.5 * 2^23: adding it rounds to an integer, found in the low bits               \
                 */

/* What is done to four vectors, written out: gcc leaves in memory what a loop picks from an array. */
#define V_FOUR(X) X(0) X(1) X(2) X(3)

/* Steps of e^x of vectors x0, x1, ..., each step of all before the next of one, so that a processor has others to do
 * while it waits for one. Below -86.9: 0. Above 88: e^88. NaN stays NaN: bit arithmetic may make a number of it, y - y
 * is NaN still, and 0 of a number. What is made of numbers below -86.9 is not used. */
#define EXP_LIMIT(i) const vf y##i = limited ? v_min(v_set1(88.0f), x##i) : x##i;
#define EXP_TURN(i)  const vf t##i = v_fma(y##i, v_set1(1.44269504088896341f), v_set1(V_MAGIC));
#define EXP_WHOLE(i) const vf n##i = v_sub(t##i, v_set1(V_MAGIC));
#define EXP_REST(i)  vf r##i = v_fma(n##i, v_set1(-0.693359375f), y##i);
#define EXP_LOW(i)   r##i = v_fma(n##i, v_set1(2.12194440e-4f), r##i);
#define EXP_0(i)     vf p##i = v_fma(v_set1(1.9875691500e-4f), r##i, v_set1(1.3981999507e-3f));
#define EXP_1(i)     p##i = v_fma(p##i, r##i, v_set1(8.3334519073e-3f));
#define EXP_2(i)     p##i = v_fma(p##i, r##i, v_set1(4.1665795894e-2f));
#define EXP_3(i)     p##i = v_fma(p##i, r##i, v_set1(1.6666665459e-1f));
#define EXP_4(i)     p##i = v_fma(p##i, r##i, v_set1(5.0000001201e-1f));
#define EXP_5(i)     p##i = v_add(v_fma(p##i, v_mul(r##i, r##i), r##i), v_set1(1.0f));
/* times 2^n: n sits in the low bits of t; the shift drops the rest of t */
#define EXP_SCALE(i) p##i = v_from_bits(vi_add(v_bits(p##i), vi_shl(v_bits(t##i), 23)));
#define EXP_NAN(i)   p##i = v_add(p##i, v_sub(y##i, y##i));
#define EXP_ZERO(i)  p##i = v_select_lt(x##i, v_set1(-86.9f), v_zero(), p##i);
#define EXP_STEPS(OF)                                                                              \
    OF(EXP_LIMIT)                                                                                  \
    OF(EXP_TURN)                                                                                   \
    OF(EXP_WHOLE)                                                                                  \
    OF(EXP_REST)                                                                                   \
    OF(EXP_LOW)                                                                                    \
    OF(EXP_0)                                                                                      \
    OF(EXP_1)                                                                                      \
    OF(EXP_2)                                                                                      \
    OF(EXP_3)                                                                                      \
    OF(EXP_4)                                                                                      \
    OF(EXP_5)                                                                                      \
    OF(EXP_SCALE)                                                                                  \
    OF(EXP_NAN)                                                                                    \
    OF(EXP_ZERO)
#define EXP_OF_ONE(X) X(0)

/* e^x */
VINLINE vf v_exp(vf x0) {
    const int limited = 1;
    EXP_STEPS(EXP_OF_ONE)
    return p0;
}

/* of four vectors at once, in place. Where not limited, of numbers up to 88. */
VINLINE void v_exp4(vf x[4], const int limited) {
    const vf x0 = x[0], x1 = x[1], x2 = x[2], x3 = x[3];
    EXP_STEPS(V_FOUR)
    x[0] = p0, x[1] = p1, x[2] = p2, x[3] = p3;
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
#if HS_VEC == 2
    return _mm512_cvtepu32_ps(x);
#else
    const vi magic = vi_set1(0x4b000000u);
    vf high = v_sub(v_from_bits(vi_or(vi_shr(x, 16), magic)), v_set1(8388608.0f));
    vf low = v_sub(v_from_bits(vi_or(vi_and(x, vi_set1(0xffff)), magic)), v_set1(8388608.0f));
    return v_fma(high, v_set1(65536.0f), low);
#endif
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

/* The same of four vectors at once: x becomes s. */
VINLINE void v_sigmoid4(vf x[4], vf one_minus_s[4]) {
    const vf one = v_set1(1.0f), zero = v_zero();
    vf e[4] = {v_sub(zero, x[0]), v_sub(zero, x[1]), v_sub(zero, x[2]), v_sub(zero, x[3])};
    v_exp4(e, 1);
#define SIGMOID(i) x[i] = v_div(one, v_add(one, e[i])), one_minus_s[i] = v_mul(e[i], x[i]);
    V_FOUR(SIGMOID)
#undef SIGMOID
}

#endif
