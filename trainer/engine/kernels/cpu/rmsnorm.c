/* RMSNorm over groups of C. Sums inside a group: 16 lane partials, index ascending, then the tree
 * of v_sum. */
#include "kernels/rmsnorm.h"

#include <math.h>

#include "kernels/cpu/gemm.h"
#include "kernels/cpu/share.h"

typedef struct rmsnorm_job {
    const hs_args *a;
    int64_t R, N, C;
} rmsnorm_job;

VINLINE void rmsnorm_fwd_rows(const rmsnorm_job *j, int64_t begin, int64_t end, int dt) {
    const hs_args *a = j->a;
    float *rstd = a->ptr[1];
    const void *x = a->ptr[2];
    const float *w = a->ptr[3], eps = (float)a->real[0];
    const int64_t C = j->C, ldx = a->dim[3], ldy = a->dim[4];
    for (int64_t r = begin; r < end; r++)
        for (int64_t n = 0; n < j->N; n++) {
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
                v_store_dt_n(a->ptr[0], to + c, v_mul(h, v_load_n(w + c, C - c)), C - c, dt);
            }
            rstd[r * j->N + n] = s;
        }
}

static void rmsnorm_fwd_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const rmsnorm_job *j = ctx;
    (void)worker;
    BY_DTYPE(j->a->dtype, rmsnorm_fwd_rows, j, begin, end);
}

static void rmsnorm_fwd_op(hs_kernel_ctx *ctx, const hs_args *a) {
    rmsnorm_job j = {a, a->dim[0], a->dim[1], a->dim[2]};
    share_rows(ctx, j.R, j.N * j.C, rmsnorm_fwd_range, &j);
}

VINLINE void rmsnorm_igrad_rows(const rmsnorm_job *j, int64_t begin, int64_t end, int dt) {
    const hs_args *a = j->a;
    void *dx = a->ptr[0];
    const void *dy = a->ptr[1], *x = a->ptr[2];
    const float *w = a->ptr[3], *rstd = a->ptr[4];
    const int64_t C = j->C, lddx = a->dim[3], lddy = a->dim[4], ldx = a->dim[5];
    const int accumulate = a->dim[6] != 0;
    for (int64_t r = begin; r < end; r++)
        for (int64_t n = 0; n < j->N; n++) {
            int64_t at_dx = r * lddx + n * C, at_dy = r * lddy + n * C, at = r * ldx + n * C;
            vf sv = v_set1(rstd[r * j->N + n]), sum = v_zero();
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
                if (accumulate) d = v_add(d, v_load_dt_n(dx, at_dx + c, left, dt));
                v_store_dt_n(dx, at_dx + c, d, left, dt);
            }
        }
}

static void rmsnorm_igrad_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const rmsnorm_job *j = ctx;
    (void)worker;
    BY_DTYPE(j->a->dtype, rmsnorm_igrad_rows, j, begin, end);
}

static void rmsnorm_igrad_op(hs_kernel_ctx *ctx, const hs_args *a) {
    rmsnorm_job j = {a, a->dim[0], a->dim[1], a->dim[2]};
    share_rows(ctx, j.R, j.N * j.C, rmsnorm_igrad_range, &j);
}

VINLINE void rmsnorm_wgrad_columns(const rmsnorm_job *j, int64_t begin, int64_t end, int dt) {
    const hs_args *a = j->a;
    float *dw = a->ptr[0];
    const void *dy = a->ptr[1], *x = a->ptr[2];
    const float *rstd = a->ptr[3];
    const int64_t C = j->C, lddy = a->dim[3], ldx = a->dim[4];
    for (int64_t c = begin; c < end; c += LANES) {
        int64_t left = end - c;
        vf w = v_load_n(dw + c, left);
        for (int64_t r = 0; r < j->R; r++)
            for (int64_t n = 0; n < j->N; n++) {
                vf h = v_mul(v_load_dt_n(x, r * ldx + n * C + c, left, dt),
                             v_set1(rstd[r * j->N + n]));
                w = v_fma(v_load_dt_n(dy, r * lddy + n * C + c, left, dt), h, w);
            }
        v_store_n(dw + c, w, left);
    }
}

static void rmsnorm_wgrad_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const rmsnorm_job *j = ctx;
    (void)worker;
    begin *= SHARE_COLUMNS, end = min64(end * SHARE_COLUMNS, j->C);
    BY_DTYPE(j->a->dtype, rmsnorm_wgrad_columns, j, begin, end);
}

static void rmsnorm_wgrad_op(hs_kernel_ctx *ctx, const hs_args *a) {
    rmsnorm_job j = {a, a->dim[0], a->dim[1], a->dim[2]};
    share_columns(ctx, j.R * j.N, j.C, rmsnorm_wgrad_range, &j);
}
