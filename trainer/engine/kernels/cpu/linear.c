/* Linear layers: three calls of gemm.h, with the epilogues of linear.h. */
#include "kernels/linear.h"

#include "kernels/cpu/gemm.h"
#include "kernels/cpu/share.h"

static void linear_fwd_op(hs_kernel_ctx *ctx, const hs_args *a) {
    int64_t R = a->dim[0], N = a->dim[1], K = a->dim[2];
    int dt = (int)a->dtype;
    gemm g = {.m = R,
              .n = N,
              .k = K,
              .a = {a->ptr[1], a->dim[4], 1, dt},
              .b = {a->ptr[2], K, 1, dt},
              .out = a->ptr[0],
              .ld_out = a->dim[3],
              .dt_out = dt,
              .bias = a->ptr[3],
              .res = a->ptr[4],
              .ld_res = a->dim[5]};
    gemm_run(ctx, &g);
}

static void linear_igrad_op(hs_kernel_ctx *ctx, const hs_args *a) {
    int64_t R = a->dim[0], N = a->dim[1], K = a->dim[2];
    int dt = (int)a->dtype;
    gemm g = {.m = R,
              .n = K,
              .k = N,
              .a = {a->ptr[1], a->dim[4], 1, dt},
              .b = {a->ptr[2], 1, K, dt},
              .out = a->ptr[0],
              .ld_out = a->dim[3],
              .dt_out = dt,
              .add_old = a->dim[5] != 0};
    gemm_run(ctx, &g);
}

typedef struct bias_job {
    float *db;
    const void *dy;
    int64_t R, N, ld;
    int dt;
} bias_job;

VINLINE void bias_columns(const bias_job *j, int64_t begin, int64_t end, int dt) {
    for (int64_t n = begin; n < end; n += LANES) {
        int64_t left = end - n;
        vf s = v_load_n(j->db + n, left);
        for (int64_t r = 0; r < j->R; r++)
            s = v_add(s, v_load_dt_n(j->dy, r * j->ld + n, left, dt));
        v_store_n(j->db + n, s, left);
    }
}

static void bias_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const bias_job *j = ctx;
    (void)worker;
    begin *= SHARE_COLUMNS, end = min64(end * SHARE_COLUMNS, j->N);
    BY_DTYPE(j->dt, bias_columns, j, begin, end);
}

static void linear_wgrad_op(hs_kernel_ctx *ctx, const hs_args *a) {
    int64_t R = a->dim[0], N = a->dim[1], K = a->dim[2];
    int dt = (int)a->dtype;
    gemm g = {.m = N,
              .n = K,
              .k = R,
              .a = {a->ptr[2], 1, a->dim[3], dt},
              .b = {a->ptr[3], 1, a->dim[4], dt},
              .out = a->ptr[0],
              .ld_out = K,
              .dt_out = HS_F32,
              .from_old = 1};
    gemm_run(ctx, &g);
    if (a->ptr[1]) {
        bias_job j = {a->ptr[1], a->ptr[2], R, N, a->dim[3], dt};
        share_columns(ctx, R, N, bias_range, &j);
    }
}
