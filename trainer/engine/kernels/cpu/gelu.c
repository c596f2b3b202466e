/* GELU, tanh form. With z = 2 A (x + B x^3) and s = sigmoid(z): (1 + tanh(z/2)) / 2 = s, so
 * y = x s and dy/dx = s + x s (1 - s) dz/dx: no tanh, and full relative accuracy on both sides. */
#include "kernels/gelu.h"

#include "kernels/cpu/share.h"
#include "kernels/cpu/vec_math.h"

/* z; x cut to [-12, 12] for it, beyond which s and 1 - s are 0 or 1 to f32 (and x^2 could overflow) */
VINLINE vf gelu_inner(vf x, vf *cut, vf *square) {
    const float two_a = (float)(2 * HS_GELU_A);
    *cut = v_min(v_set1(12.0f), v_max(v_set1(-12.0f), x));
    *square = v_mul(*cut, *cut);
    return v_mul(v_mul(*cut, v_set1(two_a)),
                 v_fma(*square, v_set1((float)HS_GELU_B), v_set1(1.0f)));
}

/* dy/dx, where rest = 1 - s */
VINLINE vf gelu_slope(vf cut, vf square, vf s, vf rest) {
    const float two_a = (float)(2 * HS_GELU_A), six_ab = (float)(6 * HS_GELU_A * HS_GELU_B);
    vf dz = v_fma(square, v_set1(six_ab), v_set1(two_a));
    return v_fma(v_mul(cut, v_mul(s, rest)), dz, s);
}

VINLINE void gelu_fwd_flat(const hs_gelu_fwd_args *a, int64_t begin, int64_t end, int dt) {
    int64_t i = begin;
    for (; i + 4 * LANES <= end; i += 4 * LANES) {
        vf x[4], cut, square, s[4], rest[4];
#define LOAD(n) x[n] = v_load_dt(a->x, i + (n) * LANES, dt), s[n] = gelu_inner(x[n], &cut, &square);
#define PUT(n)  v_store_dt(a->y, i + (n) * LANES, v_mul(x[n], s[n]), dt);
        V_FOUR(LOAD)
        v_sigmoid4(s, rest);
        V_FOUR(PUT)
#undef LOAD
#undef PUT
    }
    for (; i < end; i += LANES) {
        vf x = v_load_dt_n(a->x, i, end - i, dt), cut, square, s, rest;
        v_sigmoid(gelu_inner(x, &cut, &square), &s, &rest);
        v_store_dt_n(a->y, i, v_mul(x, s), end - i, dt);
    }
}

static void gelu_fwd_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const hs_gelu_fwd_args *a = ctx;
    (void)worker;
    begin *= SHARE_FLAT, end = hs_min(end * SHARE_FLAT, a->n);
    BY_DTYPE(a->dtype, gelu_fwd_flat, a, begin, end);
}

static void gelu_fwd_op(hs_kernel_ctx *ctx, hs_gelu_fwd_args *a) {
    share_flat(ctx, a->n, gelu_fwd_range, a);
}

VINLINE void gelu_igrad_flat(const hs_gelu_igrad_args *a, int64_t begin, int64_t end, int dt) {
    int64_t i = begin;
    for (; i + 4 * LANES <= end; i += 4 * LANES) {
        vf cut[4], square[4], s[4], rest[4];
#define LOAD(n) s[n] = gelu_inner(v_load_dt(a->x, i + (n) * LANES, dt), &cut[n], &square[n]);
#define PUT(n)                                                                                     \
    v_store_dt(a->dx, i + (n) * LANES,                                                             \
               v_mul(v_load_dt(a->dy, i + (n) * LANES, dt),                                        \
                     gelu_slope(cut[n], square[n], s[n], rest[n])),                                \
               dt);
        V_FOUR(LOAD)
        v_sigmoid4(s, rest);
        V_FOUR(PUT)
#undef LOAD
#undef PUT
    }
    for (; i < end; i += LANES) {
        int64_t left = end - i;
        vf cut, square, s, rest;
        v_sigmoid(gelu_inner(v_load_dt_n(a->x, i, left, dt), &cut, &square), &s, &rest);
        vf d = gelu_slope(cut, square, s, rest);
        v_store_dt_n(a->dx, i, v_mul(v_load_dt_n(a->dy, i, left, dt), d), left, dt);
    }
}

static void gelu_igrad_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const hs_gelu_igrad_args *a = ctx;
    (void)worker;
    begin *= SHARE_FLAT, end = hs_min(end * SHARE_FLAT, a->n);
    BY_DTYPE(a->dtype, gelu_igrad_flat, a, begin, end);
}

static void gelu_igrad_op(hs_kernel_ctx *ctx, hs_gelu_igrad_args *a) {
    share_flat(ctx, a->n, gelu_igrad_range, a);
}
