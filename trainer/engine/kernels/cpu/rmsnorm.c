/* RMSNorm over groups of C. Sums inside a group: 16 lane partials, index ascending, then the tree
 * of v_sum. */
#include "kernels/rmsnorm.h"

#include <math.h>

#include "kernels/cpu/share.h"
#include "kernels/cpu/vec.h"

VINLINE void rmsnorm_fwd_rows(const hs_rmsnorm_fwd_args *a, int64_t begin, int64_t end, int dt) {
    float *rstd = a->rstd;
    const void *x = a->x;
    const float *w = a->w, eps = (float)a->eps;
    const int64_t C = a->C, ldx = a->ldx, ldy = a->ldy;
    for (int64_t r = begin; r < end; r++)
        for (int64_t n = 0; n < a->N; n++) {
            int64_t at = r * ldx + n * C, to = r * ldy + n * C;
            vf square = v_zero();
            for (int64_t c = 0; c < C; c += LANES) {
                vf d = v_load_dt_n(x, at + c, C - c, dt);
                square = v_fma(d, d, square);
            }
            float s = 1.0f / sqrtf(v_sum(square) / (float)C + eps);
            vf sv = v_set1(s);
            for (int64_t c = 0; c < C; c += LANES) {
                vf h = v_mul(v_load_dt_n(x, at + c, C - c, dt), sv);
                v_store_dt_n(a->y, to + c, v_mul(h, v_load_n(w + c, C - c)), C - c, dt);
            }
            rstd[r * a->N + n] = s;
        }
}

static void rmsnorm_fwd_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const hs_rmsnorm_fwd_args *a = ctx;
    (void)worker;
    BY_DTYPE(a->dtype, rmsnorm_fwd_rows, a, begin, end);
}

static void rmsnorm_fwd_op(hs_kernel_ctx *ctx, hs_rmsnorm_fwd_args *a) {
    share_rows(ctx, a->R, a->N * a->C, rmsnorm_fwd_range, a);
}

VINLINE void rmsnorm_igrad_rows(const hs_rmsnorm_igrad_args *a, int64_t begin, int64_t end,
                                int dt) {
    void *dx = a->dx;
    const void *dy = a->dy, *x = a->x, *old = a->old ? a->old : a->dx;
    const float *w = a->w, *rstd = a->rstd;
    const int64_t C = a->C, lddx = a->lddx, lddy = a->lddy, ldx = a->ldx;
    const int accumulate = a->ACCUM != 0;
    for (int64_t r = begin; r < end; r++)
        for (int64_t n = 0; n < a->N; n++) {
            int64_t at_dx = r * lddx + n * C, at_dy = r * lddy + n * C, at = r * ldx + n * C;
            vf sv = v_set1(rstd[r * a->N + n]), sum = v_zero();
            for (int64_t c = 0; c < C; c += LANES) {
                vf g = v_mul(v_load_dt_n(dy, at_dy + c, C - c, dt), v_load_n(w + c, C - c));
                sum = v_fma(g, v_mul(v_load_dt_n(x, at + c, C - c, dt), sv), sum);
            }
            vf mean = v_set1(v_sum(sum) / (float)C);
            for (int64_t c = 0; c < C; c += LANES) {
                int64_t left = C - c;
                vf g = v_mul(v_load_dt_n(dy, at_dy + c, left, dt), v_load_n(w + c, left));
                vf h = v_mul(v_load_dt_n(x, at + c, left, dt), sv);
                vf d = v_mul(sv, v_fnma(h, mean, g));
                if (accumulate) d = v_add(d, v_load_dt_n(old, at_dx + c, left, dt));
                v_store_dt_n(dx, at_dx + c, d, left, dt);
            }
        }
}

static void rmsnorm_igrad_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const hs_rmsnorm_igrad_args *a = ctx;
    (void)worker;
    BY_DTYPE(a->dtype, rmsnorm_igrad_rows, a, begin, end);
}

static void rmsnorm_igrad_op(hs_kernel_ctx *ctx, hs_rmsnorm_igrad_args *a) {
    share_rows(ctx, a->R, a->N * a->C, rmsnorm_igrad_range, a);
}

VINLINE void rmsnorm_wgrad_columns(const hs_rmsnorm_wgrad_args *a, int64_t begin, int64_t end,
                                   int dt) {
    float *dw = a->dw;
    const void *dy = a->dy, *x = a->x;
    const float *rstd = a->rstd;
    const int64_t C = a->C, lddy = a->lddy, ldx = a->ldx;
    for (int64_t c = begin; c < end; c += LANES) {
        int64_t left = end - c;
        vf w = v_load_n(dw + c, left);
        for (int64_t r = 0; r < a->R; r++)
            for (int64_t n = 0; n < a->N; n++) {
                vf h = v_mul(v_load_dt_n(x, r * ldx + n * C + c, left, dt),
                             v_set1(rstd[r * a->N + n]));
                w = v_fma(v_load_dt_n(dy, r * lddy + n * C + c, left, dt), h, w);
            }
        v_store_n(dw + c, w, left);
    }
}

static void rmsnorm_wgrad_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const hs_rmsnorm_wgrad_args *a = ctx;
    (void)worker;
    begin *= SHARE_COLUMNS, end = hs_min(end * SHARE_COLUMNS, a->C);
    BY_DTYPE(a->dtype, rmsnorm_wgrad_columns, a, begin, end);
}

static void rmsnorm_wgrad_op(hs_kernel_ctx *ctx, hs_rmsnorm_wgrad_args *a) {
    share_columns(ctx, a->R * a->N, a->C, rmsnorm_wgrad_range, a);
}
