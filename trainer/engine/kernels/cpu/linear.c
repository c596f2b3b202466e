/* Linear layers: three calls of gemm.h, with the epilogues of linear.h. */
#include "kernels/linear.h"

#include "kernels/cpu/gemm.h"
#include "kernels/cpu/share.h"

static void linear_fwd_op(hs_kernel_ctx *ctx, hs_linear_fwd_args *a) {
    int64_t R = a->R, N = a->N, K = a->K;
    int dt = (int)a->dtype;
    gemm g = {.m = R,
              .n = N,
              .k = K,
              .a = {a->x, a->ldx, 1, dt},
              .b = {a->w, K, 1, dt},
              .out = a->y,
              .ld_out = a->ldy,
              .dt_out = dt,
              .bias = a->b,
              .res = a->res,
              .ld_res = a->ldres};
    gemm_run(ctx, &g);
}

static void linear_igrad_op(hs_kernel_ctx *ctx, hs_linear_igrad_args *a) {
    int64_t R = a->R, N = a->N, K = a->K;
    int dt = (int)a->dtype;
    gemm g = {.m = R,
              .n = K,
              .k = N,
              .a = {a->dy, a->lddy, 1, dt},
              .b = {a->w, 1, K, dt},
              .out = a->dx,
              .ld_out = a->lddx,
              .dt_out = dt,
              .add_old = a->ACCUM != 0};
    gemm_run(ctx, &g);
}

typedef struct bias_job {
    float *db;
    const void *dy;
    int64_t R, N, ld;
    int dt;
} bias_job;

/* Of rows [r, r + rows): as they lie in memory, some at a time; the sums wait in the nearest cache. The rows after them
 * are asked for. */
VINLINE void bias_rows(const bias_job *j, int64_t r, int64_t rows, int64_t begin, int64_t end,
                       int dt) {
    for (int64_t n = begin; n < end; n += LANES) {
        int64_t left = end - n;
        vf s = v_load_n(j->db + n, left);
        for (int64_t k = r; k < r + rows; k++)
            s = v_add(s, v_load_dt_n(j->dy, k * j->ld + n, left, dt));
        v_store_n(j->db + n, s, left);
        if (n % (64 / dt_size(dt))) continue;
        for (int64_t k = r + rows; k < hs_min(r + 2 * rows, j->R); k++)
            __builtin_prefetch((const char *)j->dy + (k * j->ld + n) * dt_size(dt));
    }
}

VINLINE void bias_columns(const bias_job *j, int64_t begin, int64_t end, int dt) {
    int64_t r = 0;
    for (; r + SHARE_ROWS <= j->R; r += SHARE_ROWS) bias_rows(j, r, SHARE_ROWS, begin, end, dt);
    bias_rows(j, r, j->R - r, begin, end, dt);
}

static void bias_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const bias_job *j = ctx;
    (void)worker;
    begin *= SHARE_COLUMNS, end = hs_min(end * SHARE_COLUMNS, j->N);
    BY_DTYPE(j->dt, bias_columns, j, begin, end);
}

static void bias_gradient(hs_kernel_ctx *ctx, float *db, const void *dy, int64_t R, int64_t N,
                          int64_t lddy, int dt) {
    bias_job j = {db, dy, R, N, lddy, dt};
    share_columns(ctx, R, N, bias_range, &j);
}

static void linear_wgrad_op(hs_kernel_ctx *ctx, hs_linear_wgrad_args *a) {
    int64_t R = a->R, N = a->N, K = a->K;
    int dt = (int)a->dtype;
    gemm g = {.m = N,
              .n = K,
              .k = R,
              .a = {a->dy, 1, a->lddy, dt},
              .b = {a->x, 1, a->ldx, dt},
              .out = a->dw,
              .ld_out = K,
              .dt_out = HS_F32,
              .from_old = a->ACCUM != 0};
    gemm_run(ctx, &g);
    if (a->db) bias_gradient(ctx, a->db, a->dy, R, N, a->lddy, dt);
}
