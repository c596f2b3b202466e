/* Linear layers on FP8: three calls of gemm.h, which widens operands while it packs them. The
 * bias's gradient is of numbers that are none of theirs. */
#include "kernels/linear8.h"

#include "kernels/cpu/gemm.h"
#include "kernels/cpu/share.h"

/* out = a times b, both with the index that is summed over side by side */
static gemm gemm8(int64_t m, int64_t n, int64_t k, const void *a, int dt_a, const float *a_scale,
                  const void *b, const float *b_scale) {
    return (gemm){.m = m,
                  .n = n,
                  .k = k,
                  .a = {a, k, 1, dt_a},
                  .b = {b, k, 1, HS_E4M3},
                  .scale_a = a_scale,
                  .scale_b = b_scale};
}

static void linear8_fwd_op(hs_kernel_ctx *ctx, hs_linear8_fwd_args *a) {
    gemm g = gemm8(a->R, a->N, a->K, a->x8, HS_E4M3, a->xs, a->w8, a->ws);
    g.out = a->y, g.ld_out = a->ldy, g.dt_out = (int)a->dtype;
    g.bias = a->b, g.res = a->res, g.ld_res = a->ldres;
    gemm_run(ctx, &g);
}

static void linear8_igrad_op(hs_kernel_ctx *ctx, hs_linear8_igrad_args *a) {
    gemm g = gemm8(a->R, a->K, a->N, a->dy8, HS_E5M2, a->dys, a->w8t, a->ws);
    g.out = a->dx, g.ld_out = a->lddx, g.dt_out = (int)a->dtype;
    g.add_old = a->ACCUM != 0;
    gemm_run(ctx, &g);
}

typedef struct bias_job {
    float *db;
    side dy;
    int64_t R, N;
} bias_job;

static void bias_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const bias_job *j = ctx;
    (void)worker;
    sum_rows(j->db, &j->dy, begin * SHARE_COLUMNS, hs_min(end * SHARE_COLUMNS, j->N), 0, j->R);
}

static void linear8_wgrad_op(hs_kernel_ctx *ctx, hs_linear8_wgrad_args *a) {
    gemm g = gemm8(a->N, a->K, a->R, a->dy8t, HS_E5M2, a->dys, a->x8t, a->xs);
    g.out = a->dw, g.ld_out = a->K, g.dt_out = HS_F32;
    g.add_old = 1;
    gemm_run(ctx, &g);
    bias_job j = {a->db, {a->dy, 1, a->lddy, (int)a->dtype}, a->R, a->N};
    if (a->db) share_columns(ctx, a->R, a->N, bias_range, &j);
}
