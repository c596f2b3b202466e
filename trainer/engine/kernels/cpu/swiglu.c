/* SwiGLU: row by row, gates and ups of a row side by side. */
#include "kernels/swiglu.h"

#include "kernels/cpu/share.h"
#include "kernels/cpu/vec_math.h"

VINLINE void swiglu_fwd_rows(const hs_swiglu_fwd_args *a, int64_t begin, int64_t end, int dt) {
    const int64_t F = a->F;
    for (int64_t r = begin; r < end; r++) {
        const int64_t row = r * F, gates = 2 * row, ups = gates + F;
        int64_t f = 0;
        for (; f + 4 * LANES <= F; f += 4 * LANES) {
            vf gate[4], s[4], rest[4];
#define LOAD(n) s[n] = gate[n] = v_load_dt(a->gu, gates + f + (n) * LANES, dt);
#define PUT(n)                                                                                     \
    v_store_dt(a->y, row + f + (n) * LANES,                                                        \
               v_mul(v_mul(gate[n], s[n]), v_load_dt(a->gu, ups + f + (n) * LANES, dt)), dt);
            V_FOUR(LOAD)
            v_sigmoid4(s, rest);
            V_FOUR(PUT)
#undef LOAD
#undef PUT
        }
        for (; f < F; f += LANES) {
            vf gate = v_load_dt_n(a->gu, gates + f, F - f, dt);
            vf up = v_load_dt_n(a->gu, ups + f, F - f, dt), s, rest;
            v_sigmoid(gate, &s, &rest);
            v_store_dt_n(a->y, row + f, v_mul(v_mul(gate, s), up), F - f, dt);
        }
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

VINLINE void swiglu_slopes(vf g, vf gate, vf up, vf s, vf rest, vf *dgate, vf *dup) {
    vf slope = v_mul(s, v_fma(gate, rest, v_set1(1.0f)));
    *dgate = v_mul(v_mul(g, up), slope);
    *dup = v_mul(g, v_mul(gate, s));
}

VINLINE void swiglu_igrad_rows(const hs_swiglu_igrad_args *a, int64_t begin, int64_t end, int dt) {
    const int64_t F = a->F;
    for (int64_t r = begin; r < end; r++) {
        const int64_t row = r * F, gates = 2 * row, ups = gates + F;
        int64_t f = 0;
        for (; f + 4 * LANES <= F; f += 4 * LANES) {
            vf gate[4], s[4], rest[4], dgate, dup;
#define LOAD(n) s[n] = gate[n] = v_load_dt(a->gu, gates + f + (n) * LANES, dt);
#define PUT(n)                                                                                     \
    swiglu_slopes(v_load_dt(a->dy, row + f + (n) * LANES, dt), gate[n],                            \
                  v_load_dt(a->gu, ups + f + (n) * LANES, dt), s[n], rest[n], &dgate, &dup);       \
    v_store_dt(a->dgu, gates + f + (n) * LANES, dgate, dt);                                        \
    v_store_dt(a->dgu, ups + f + (n) * LANES, dup, dt);
            V_FOUR(LOAD)
            v_sigmoid4(s, rest);
            V_FOUR(PUT)
#undef LOAD
#undef PUT
        }
        for (; f < F; f += LANES) {
            const int64_t left = F - f;
            vf gate = v_load_dt_n(a->gu, gates + f, left, dt), s, rest, dgate, dup;
            v_sigmoid(gate, &s, &rest);
            swiglu_slopes(v_load_dt_n(a->dy, row + f, left, dt), gate,
                          v_load_dt_n(a->gu, ups + f, left, dt), s, rest, &dgate, &dup);
            v_store_dt_n(a->dgu, gates + f, dgate, left, dt);
            v_store_dt_n(a->dgu, ups + f, dup, left, dt);
        }
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
