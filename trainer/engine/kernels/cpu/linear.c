/* Linear layers: three calls of gemm.h, with the epilogues of linear.h. */
#include "kernels/linear.h"

#include "kernels/cpu/gemm.h"

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
              .from_old = a->ACCUM != 0,
              .sums_a = a->db};
    gemm_run(ctx, &g);
}
