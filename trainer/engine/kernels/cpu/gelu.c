/* GELU, tanh form. With z = 2 A (x + B x^3) and s = sigmoid(z): (1 + tanh(z/2)) / 2 = s, so
 * y = x s and dy/dx = s + x s (1 - s) dz/dx: no tanh, and full relative accuracy on both sides. */
#include "kernels/gelu.h"

#include "kernels/cpu/share.h"
#include "kernels/cpu/vec_math.h"

/* s and 1 - s; x cut to [-12, 12] for z, beyond which both are 0 or 1 to f32 (and x^2 could
 * overflow) */
VINLINE void gelu_sigmoid(vf x, vf *cut, vf *square, vf *s, vf *rest) {
    const float two_a = (float)(2 * HS_GELU_A);
    *cut = v_min(v_set1(12.0f), v_max(v_set1(-12.0f), x));
    *square = v_mul(*cut, *cut);
    vf z =
        v_mul(v_mul(*cut, v_set1(two_a)), v_fma(*square, v_set1((float)HS_GELU_B), v_set1(1.0f)));
    v_sigmoid(z, s, rest);
}

VINLINE void gelu_fwd_flat(const hs_gelu_fwd_args *a, int64_t begin, int64_t end, int dt) {
    for (int64_t i = begin; i < end; i += LANES) {
        vf x = v_load_dt_n(a->x, i, end - i, dt), cut, square, s, rest;
        gelu_sigmoid(x, &cut, &square, &s, &rest);
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
    const float two_a = (float)(2 * HS_GELU_A), six_ab = (float)(6 * HS_GELU_A * HS_GELU_B);
    for (int64_t i = begin; i < end; i += LANES) {
        int64_t left = end - i;
        vf x = v_load_dt_n(a->x, i, left, dt), cut, square, s, rest;
        gelu_sigmoid(x, &cut, &square, &s, &rest);
        vf dz = v_fma(square, v_set1(six_ab), v_set1(two_a));
        vf d = v_fma(v_mul(cut, v_mul(s, rest)), dz, s);
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
