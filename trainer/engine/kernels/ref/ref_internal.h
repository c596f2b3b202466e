/* Shared by the oracle's files: elements of any dtype as double, and the prototypes.
 *
 * The oracle is the shortest correct loop and is never made faster. It computes in double and
 * rounds where a value is stored, once; what it reads back it reads as stored. One thread, no
 * workspace.
 */
#ifndef HS_KERNELS_REF_INTERNAL_H
#define HS_KERNELS_REF_INTERNAL_H

#include <math.h>
#include <string.h>

#include "core/math.h"
#include "kernels/args.h"

/* hs_ref_<name> for every row of the table of kernels. */
#define X(number, NAME, name, ...) void hs_ref_##name(const hs_##name##_args *a);
HS_KERNELS(X)
#undef X

/* The "acc" type of a call. */
static inline uint32_t acc_of(uint32_t dtype) {
    return dtype == HS_F64 ? HS_F64 : HS_F32;
}

/* Nearest bf16, ties to even, in one rounding. */
static inline uint16_t bf16_of(double value) {
    float f = (float)value;
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    if (f != f) return (uint16_t)(u >> 16 | 0x40);
    /* rounding to float may have made a tie that was none: lean back to the true side */
    if ((u & 0xffff) == 0x8000 && (double)f != value) u += fabs((double)f) < fabs(value) ? 1u : -1u;
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

static inline double load(const void *p, uint32_t dtype, int64_t i) {
    if (dtype == HS_F64) return ((const double *)p)[i];
    if (dtype == HS_F32) return (double)((const float *)p)[i];
    uint32_t u = (uint32_t)((const uint16_t *)p)[i] << 16;
    float f;
    memcpy(&f, &u, sizeof f);
    return (double)f;
}

static inline void store(void *p, uint32_t dtype, int64_t i, double value) {
    if (dtype == HS_F64)
        ((double *)p)[i] = value;
    else if (dtype == HS_F32)
        ((float *)p)[i] = (float)value;
    else
        ((uint16_t *)p)[i] = bf16_of(value);
}

/* The number of a code of E4M3, or of E5M2. */
static inline double fp8_value(uint8_t code, int e5m2) {
    const int bits = e5m2 ? 2 : 3, bias = e5m2 ? 15 : 7, size = code & 0x7f;
    const int exponent = size >> bits, mantissa = size & ((1 << bits) - 1);
    double x = exponent ? ldexp(mantissa + (1 << bits), exponent - bias - bits)
                        : ldexp(mantissa, 1 - bias - bits);
    if (e5m2 && exponent == 31) x = mantissa ? (double)NAN : (double)INFINITY;
    if (!e5m2 && size == 0x7f) x = (double)NAN;
    return code & 0x80 ? -x : x;
}

/* The nearest code, ties to even; beyond the largest number, that; of a NaN 0x7f. */
static inline uint8_t fp8_of(double value, int e5m2) {
    const int bits = e5m2 ? 2 : 3, bias = e5m2 ? 15 : 7;
    const double size = fabs(value), most = e5m2 ? 57344 : 448;
    const uint8_t sign = signbit(value) ? 0x80 : 0;
    if (value != value) return 0x7f;
    if (size >= most) return sign | (e5m2 ? 0x7b : 0x7e);
    const int least = 1 - bias, own = size > 0 ? ilogb(size) : least;
    const int exponent = own > least ? own : least;
    const int places = (int)nearbyint(ldexp(size, bits - exponent)); /* to even */
    return (uint8_t)(sign | (((exponent + bias) << bits) + places - (1 << bits)));
}

static inline void add_to(void *p, uint32_t dtype, int64_t i, double value) {
    store(p, dtype, i, load(p, dtype, i) + value);
}

#endif
