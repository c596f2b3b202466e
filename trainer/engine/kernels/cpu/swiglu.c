/* SwiGLU: row by row, gates and ups of a row side by side. */
#include "kernels/swiglu.h"

#include "kernels/cpu/gemm.h"
#include "kernels/cpu/share.h"
#include "kernels/cpu/vec_math.h"

typedef struct swiglu_job {
    const hs_args *a;
    int64_t R, F;
} swiglu_job;

VINLINE void swiglu_fwd_rows(const swiglu_job *j, int64_t begin, int64_t end, int dt) {
    const int64_t F = j->F;
    for (int64_t r = begin; r < end; r++)
        for (int64_t f = 0; f < F; f += LANES) {
            vf gate = v_load_dt_n(j->a->ptr[1], 2 * r * F + f, F - f, dt);
            vf up = v_load_dt_n(j->a->ptr[1], 2 * r * F + F + f, F - f, dt), s, rest;
            v_sigmoid(gate, &s, &rest);
            v_store_dt_n(j->a->ptr[0], r * F + f, v_mul(v_mul(gate, s), up), F - f, dt);
        }
}

static void swiglu_fwd_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const swiglu_job *j = ctx;
    (void)worker;
    BY_DTYPE(j->a->dtype, swiglu_fwd_rows, j, begin, end);
}

static void swiglu_fwd_op(hs_kernel_ctx *ctx, const hs_args *a) {
    swiglu_job j = {a, a->dim[0], a->dim[1]};
    share_rows(ctx, j.R, j.F, swiglu_fwd_range, &j);
}

VINLINE void swiglu_igrad_rows(const swiglu_job *j, int64_t begin, int64_t end, int dt) {
    const int64_t F = j->F;
    for (int64_t r = begin; r < end; r++)
        for (int64_t f = 0; f < F; f += LANES) {
            int64_t left = F - f, at = 2 * r * F + f;
            vf g = v_load_dt_n(j->a->ptr[1], r * F + f, left, dt);
            vf gate = v_load_dt_n(j->a->ptr[2], at, left, dt);
            vf up = v_load_dt_n(j->a->ptr[2], at + F, left, dt), s, rest;
            v_sigmoid(gate, &s, &rest);
            vf slope = v_mul(s, v_fma(gate, rest, v_set1(1.0f)));
            v_store_dt_n(j->a->ptr[0], at, v_mul(v_mul(g, up), slope), left, dt);
            v_store_dt_n(j->a->ptr[0], at + F, v_mul(g, v_mul(gate, s)), left, dt);
        }
}

static void swiglu_igrad_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const swiglu_job *j = ctx;
    (void)worker;
    BY_DTYPE(j->a->dtype, swiglu_igrad_rows, j, begin, end);
}

static void swiglu_igrad_op(hs_kernel_ctx *ctx, const hs_args *a) {
    swiglu_job j = {a, a->dim[0], a->dim[1]};
    share_rows(ctx, j.R, 2 * j.F, swiglu_igrad_range, &j);
}
