/* How: reduce the argument to a short interval with constants split in parts (so the reduction
 * loses nothing), sum a Taylor series there (no fitted coefficients, each is a quotient of small
 * whole numbers), put the large term in last. pow carries the logarithm and the product as
 * unevaluated sums of two doubles.
 */
#include "core/math.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

/* Constants of the reductions; each row sums to the true value far beyond double. */
static const double ln2_hi = 0x1.62e42fefa0000p-1; /* 33 bits: k * ln2_hi is exact for |k| < 2^20 */
static const double ln2_lo = 0x1.cf79abc9e3b3ap-40;
static const double log2_e = 0x1.71547652b82fep+0;
static const double pi2_1 = 0x1.921fb54442d18p+0; /* pi/2 in three parts */
static const double pi2_2 = 0x1.1a62633145c07p-54;
static const double pi2_3 = -0x1.f1976b7ed8fbcp-110;
static const double two_over_pi = 0x1.45f306dc9c883p-1;

static uint64_t bits_of(double x) {
    uint64_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

static double of_bits(uint64_t u) {
    double x;
    memcpy(&x, &u, sizeof x);
    return x;
}

/* Nearest whole number, |x| < 2^51: the sum drops the fraction by rounding to nearest. */
static double nearest(double x) {
    return (x + 0x1.8p52) - 0x1.8p52;
}

/* 2^k, -1022 <= k <= 1023. */
static double power_of_two(int k) {
    return of_bits((uint64_t)(k + 1023) << 52);
}

/* exp(x + lo) = 2^*k * (1 + result), |lo| tiny against x, |x| < 750; |result| < 0.42. */
static double exp_reduced(double x, double lo, int *k) {
    double n = nearest(x * log2_e);
    double hi = x - n * ln2_hi;
    double rest = n * ln2_lo - lo;
    double r = hi - rest; /* |r| <= log(2)/2 */
    double tail = (hi - r) - rest;
    double p = 1.0 / 6227020800.0; /* 1/13!; the first term left out is below 2^-57 */
    p = p * r + 1.0 / 479001600.0;
    p = p * r + 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    *k = (int)n;
    return r + (p * (r * r) + tail);
}

/* exp(x + lo), in or out of range. */
static double exp_sum(double x, double lo) {
    if (x != x) return x;
    if (x > 710.0) return INFINITY;
    if (x < -746.0) return 0.0;
    int k;
    double y = 1.0 + exp_reduced(x, lo, &k);
    if (k > 1023) return y * 0x1p1023 * 2.0;
    if (k < -1021)
        return y * power_of_two(k + 1000) * 0x1p-1000; /* one rounding, into the subnormals */
    return y * power_of_two(k);
}

double hs_exp(double x) {
    return exp_sum(x, 0.0);
}

/* x = 2^*k * (1 + result), 1 + result in [sqrt(1/2), sqrt(2)); x positive and finite. */
static double log_reduced(double x, int *k) {
    int e = 0;
    if (x < 0x1p-1022) { /* subnormal */
        x *= 0x1p54;
        e = -54;
    }
    uint64_t u = bits_of(x);
    e += (int)(u >> 52) - 1023;
    double m = of_bits((u & 0xfffffffffffffu) | 0x3ff0000000000000u);
    if (m >= 0x1.6a09e667f3bcdp+0) {
        m *= 0.5;
        e += 1;
    }
    *k = e;
    return m - 1.0;
}

/* sum of 2 z^i / (2 i + 3), i = 0 ..., from the term `first` on; z = s^2 <= 0.0295. */
static double atanh_tail(double z, int first) {
    double p = 2.0 / 25.0;
    p = p * z + 2.0 / 23.0;
    p = p * z + 2.0 / 21.0;
    p = p * z + 2.0 / 19.0;
    p = p * z + 2.0 / 17.0;
    p = p * z + 2.0 / 15.0;
    p = p * z + 2.0 / 13.0;
    p = p * z + 2.0 / 11.0;
    p = p * z + 2.0 / 9.0;
    p = p * z + 2.0 / 7.0;
    p = p * z + 2.0 / 5.0;
    return first ? p : p * z + 2.0 / 3.0;
}

double hs_log(double x) {
    if (x != x || x == INFINITY) return x;
    if (x <= 0.0) return x == 0.0 ? -INFINITY : NAN;
    int k;
    double f = log_reduced(x, &k);
    /* log(1+f) = 2 atanh(s) = f - (f^2/2 - s (f^2/2 + R)): f, the exact part, comes last */
    double s = f / (2.0 + f);
    double z = s * s;
    double r = z * atanh_tail(z, 0);
    double half = 0.5 * f * f;
    double n = (double)k;
    return n * ln2_hi - ((half - (s * (half + r) + n * ln2_lo)) - f);
}

double hs_tanh(double x) {
    double a = fabs(x), y;
    if (!(a > 0x1p-28)) return x; /* and NaN */
    if (a > 22.0) {
        y = 1.0;
    } else {
        /* t = exp(v) - 1, v = 2a upwards of 1, -2a below: t + 2 never cancels */
        int k;
        double p = exp_reduced(a >= 1.0 ? 2.0 * a : -2.0 * a, 0.0, &k);
        double scale = power_of_two(k);
        double t = k == 0 ? p : scale * p + (scale - 1.0);
        y = a >= 1.0 ? 1.0 - 2.0 / (t + 2.0) : -t / (t + 2.0);
    }
    return x < 0 ? -y : y;
}

/* x = n pi/2 + result + *lo, |result| <= pi/4; returns n mod 4 in *quadrant. |x| < 2^30.
 * The first fma is exact (both sides are multiples of 2^-53 and the result is below 1); the rest of
 * pi/2 is taken off with its rounding errors kept in *lo. */
static double turn_reduced(double x, double *lo, int *quadrant) {
    double n = nearest(x * two_over_pi);
    double r0 = fma(-n, pi2_1, x);
    double w = n * pi2_2;
    double w_error = fma(n, pi2_2, -w);
    double r = r0 - w;
    /* two-sum error of r0 - w, whichever is larger */
    double b = r0 - r;
    double error = (r0 - (r + b)) + (b - w);
    *lo = error - (w_error + n * pi2_3);
    *quadrant = (int)((int64_t)n & 3);
    return r;
}

static double sin_kernel(double r, double lo) {
    double z = r * r;
    double p = 1.0 / 355687428096000.0; /* 1/17! */
    p = p * z - 1.0 / 1307674368000.0;
    p = p * z + 1.0 / 6227020800.0;
    p = p * z - 1.0 / 39916800.0;
    p = p * z + 1.0 / 362880.0;
    p = p * z - 1.0 / 5040.0;
    p = p * z + 1.0 / 120.0;
    p = p * z - 1.0 / 6.0;
    return r + (r * z * p + lo * (1.0 - 0.5 * z));
}

static double cos_kernel(double r, double lo) {
    double z = r * r;
    double p = -1.0 / 6402373705728000.0; /* 1/18! */
    p = p * z + 1.0 / 20922789888000.0;
    p = p * z - 1.0 / 87178291200.0;
    p = p * z + 1.0 / 479001600.0;
    p = p * z - 1.0 / 3628800.0;
    p = p * z + 1.0 / 40320.0;
    p = p * z - 1.0 / 720.0;
    p = p * z + 1.0 / 24.0;
    double half = 0.5 * z;
    double y = 1.0 - half;
    return y + (((1.0 - y) - half) + (z * z * p - r * lo));
}

static double sin_or_cos(double x, int shift) {
    if (!(fabs(x) < 0x1p30)) return NAN;
    double lo;
    int quadrant;
    double r = turn_reduced(x, &lo, &quadrant);
    quadrant = (quadrant + shift) & 3;
    double y = quadrant & 1 ? cos_kernel(r, lo) : sin_kernel(r, lo);
    return quadrant & 2 ? -y : y;
}

double hs_sin(double x) {
    return x == 0.0 ? x : sin_or_cos(x, 0);
}

double hs_cos(double x) {
    return sin_or_cos(x, 1);
}

/* log(x) as *hi + *lo, good to about 2^-64 of its value; x positive and finite. */
static void log_sum(double x, double *hi, double *lo) {
    int k;
    double f = log_reduced(x, &k);
    /* s = f / (2 + f) in two parts */
    double d = 2.0 + f, d_lo = (2.0 - d) + f;
    double s = f / d;
    double s_lo = (fma(-s, d, f) - s * d_lo) / d;
    /* z = s^2; R = 2/3 z in two parts, + the smaller terms in one */
    double z = s * s, z_lo = fma(s, s, -z) + 2.0 * s * s_lo;
    const double c = 0x1.5555555555555p-1, c_lo = 0x1.5555555555555p-55; /* 2/3 */
    double t = z * c, t_lo = fma(z, c, -t) + (z * c_lo + z_lo * c);
    double q = z * z * atanh_tail(z, 1) + t_lo;
    double r = t + q, r_lo = (t - r) + q;
    /* 2 s + s R */
    double p = s * r, p_lo = fma(s, r, -p) + (s * r_lo + s_lo * r);
    double a = 2.0 * s + p, a_lo = ((2.0 * s - a) + p) + (2.0 * s_lo + p_lo);
    /* + k log 2; the product is exact and, unless k = 0, the larger */
    double n = (double)k, m = n * ln2_hi;
    double sum = m + a;
    double error = k == 0 ? 0.0 : (m - sum) + a;
    double rest = error + (a_lo + n * ln2_lo);
    *hi = sum + rest;
    *lo = (sum - *hi) + rest;
}

double hs_pow(double x, double y) {
    if (y == 0.0 || x == 1.0) return 1.0;
    if (x != x || y != y) return x + y;
    if (x < 0.0) return NAN;
    if (x == 0.0) return y > 0.0 ? 0.0 : INFINITY;
    if (x == INFINITY) return y > 0.0 ? INFINITY : 0.0;
    double hi, lo;
    log_sum(x, &hi, &lo);
    double p = y * hi;
    if (!(fabs(p) < 800.0)) return p > 0.0 ? INFINITY : 0.0; /* and infinite y */
    return exp_sum(p, fma(y, hi, -p) + y * lo);
}
