/* SwiGLU: row by row, gates and ups of a row side by side. */
#include "kernels/swiglu.h"

#include "kernels/cpu/share.h"
#include "kernels/cpu/vec_math.h"

VINLINE void swiglu_fwd_rows(const hs_swiglu_fwd_args *a, int64_t begin, int64_t end, int dt) {
    const int64_t F = a->F;
    for (int64_t r = begin; r < end; r++)
        for (int64_t f = 0; f < F; f += LANES) {
            vf gate = v_load_dt_n(a->gu, 2 * r * F + f, F - f, dt);
            vf up = v_load_dt_n(a->gu, 2 * r * F + F + f, F - f, dt), s, rest;
            v_sigmoid(gate, &s, &rest);
            v_store_dt_n(a->y, r * F + f, v_mul(v_mul(gate, s), up), F - f, dt);
        }
}

static void swiglu_fwd_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const hs_swiglu_fwd_args *a = ctx;
    (void)worker;
    BY_DTYPE(a->dtype, swiglu_fwd_rows, a, begin, end);
}

static void swiglu_fwd_op(hs_kernel_ctx *ctx, hs_swiglu_fwd_args *a) {
    share_rows(ctx, a->R, a->F, swiglu_fwd_range, a);
}

VINLINE void swiglu_igrad_rows(const hs_swiglu_igrad_args *a, int64_t begin, int64_t end, int dt) {
    const int64_t F = a->F;
    for (int64_t r = begin; r < end; r++)
        for (int64_t f = 0; f < F; f += LANES) {
            int64_t left = F - f, at = 2 * r * F + f;
            vf g = v_load_dt_n(a->dy, r * F + f, left, dt);
            vf gate = v_load_dt_n(a->gu, at, left, dt);
            vf up = v_load_dt_n(a->gu, at + F, left, dt), s, rest;
            v_sigmoid(gate, &s, &rest);
            vf slope = v_mul(s, v_fma(gate, rest, v_set1(1.0f)));
            v_store_dt_n(a->dgu, at, v_mul(v_mul(g, up), slope), left, dt);
            v_store_dt_n(a->dgu, at + F, v_mul(g, v_mul(gate, s)), left, dt);
        }
}

static void swiglu_igrad_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const hs_swiglu_igrad_args *a = ctx;
    (void)worker;
    BY_DTYPE(a->dtype, swiglu_igrad_rows, a, begin, end);
}

static void swiglu_igrad_op(hs_kernel_ctx *ctx, hs_swiglu_igrad_args *a) {
    share_rows(ctx, a->R, 2 * a->F, swiglu_igrad_range, a);
}
