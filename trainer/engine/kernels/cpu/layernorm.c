/* LayerNorm. Sums inside a row: 16 lane partials, index ascending, then the tree of v_sum. */
#include "kernels/layernorm.h"

#include <math.h>

#include "kernels/cpu/gemm.h"
#include "kernels/cpu/share.h"

typedef struct layernorm_job {
    const hs_args *a;
    int64_t R, C;
    float eps;
} layernorm_job;

VINLINE void layernorm_fwd_rows(const layernorm_job *j, int64_t begin, int64_t end, int dt) {
    float *mean = j->a->ptr[1], *rstd = j->a->ptr[2];
    const void *x = j->a->ptr[3];
    const float *w = j->a->ptr[4], *b = j->a->ptr[5];
    const int64_t C = j->C;
    for (int64_t r = begin; r < end; r++) {
        vf sum = v_zero(), square = v_zero();
        for (int64_t c = 0; c < C; c += LANES)
            sum = v_add(sum, v_load_dt_n(x, r * C + c, C - c, dt));
        float m = v_sum(sum) / (float)C;
        vf mv = v_set1(m);
        for (int64_t c = 0; c < C; c += LANES) {
            vf d = v_keep(v_sub(v_load_dt_n(x, r * C + c, C - c, dt), mv), C - c);
            square = v_fma(d, d, square);
        }
        float s = 1.0f / sqrtf(v_sum(square) / (float)C + j->eps);
        vf sv = v_set1(s);
        for (int64_t c = 0; c < C; c += LANES) {
            int64_t left = C - c;
            vf h = v_mul(v_sub(v_load_dt_n(x, r * C + c, left, dt), mv), sv);
            h = v_fma(h, v_load_n(w + c, left), v_load_n(b + c, left));
            v_store_dt_n(j->a->ptr[0], r * C + c, h, left, dt);
        }
        mean[r] = m;
        rstd[r] = s;
    }
}

static void layernorm_fwd_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const layernorm_job *j = ctx;
    (void)worker;
    BY_DTYPE(j->a->dtype, layernorm_fwd_rows, j, begin, end);
}

static void layernorm_fwd_op(hs_kernel_ctx *ctx, const hs_args *a) {
    layernorm_job j = {a, a->dim[0], a->dim[1], (float)a->real[0]};
    share_rows(ctx, j.R, j.C, layernorm_fwd_range, &j);
}

VINLINE void layernorm_igrad_rows(const layernorm_job *j, int64_t begin, int64_t end, int dt) {
    void *dx = j->a->ptr[0];
    const void *dy = j->a->ptr[1], *x = j->a->ptr[2];
    const float *w = j->a->ptr[3], *mean = j->a->ptr[4], *rstd = j->a->ptr[5];
    const int accumulate = j->a->dim[2] != 0;
    const int64_t C = j->C;
    for (int64_t r = begin; r < end; r++) {
        vf mv = v_set1(mean[r]), sv = v_set1(rstd[r]), sum_g = v_zero(), sum_gh = v_zero();
        for (int64_t c = 0; c < C; c += LANES) {
            int64_t left = C - c; /* beyond the row w is 0, so g is */
            vf g = v_mul(v_load_dt_n(dy, r * C + c, left, dt), v_load_n(w + c, left));
            vf h = v_mul(v_sub(v_load_dt_n(x, r * C + c, left, dt), mv), sv);
            sum_g = v_add(sum_g, g);
            sum_gh = v_fma(g, v_keep(h, left), sum_gh);
        }
        vf mean_g = v_set1(v_sum(sum_g) / (float)C), mean_gh = v_set1(v_sum(sum_gh) / (float)C);
        for (int64_t c = 0; c < C; c += LANES) {
            int64_t left = C - c, at = r * C + c;
            vf g = v_mul(v_load_dt_n(dy, at, left, dt), v_load_n(w + c, left));
            vf h = v_mul(v_sub(v_load_dt_n(x, at, left, dt), mv), sv);
            vf d = v_mul(sv, v_fnma(h, mean_gh, v_sub(g, mean_g)));
            if (accumulate) d = v_add(d, v_load_dt_n(dx, at, left, dt));
            v_store_dt_n(dx, at, d, left, dt);
        }
    }
}

static void layernorm_igrad_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const layernorm_job *j = ctx;
    (void)worker;
    BY_DTYPE(j->a->dtype, layernorm_igrad_rows, j, begin, end);
}

static void layernorm_igrad_op(hs_kernel_ctx *ctx, const hs_args *a) {
    layernorm_job j = {a, a->dim[0], a->dim[1], 0};
    share_rows(ctx, j.R, j.C, layernorm_igrad_range, &j);
}

VINLINE void layernorm_wgrad_columns(const layernorm_job *j, int64_t begin, int64_t end, int dt) {
    float *dw = j->a->ptr[0], *db = j->a->ptr[1];
    const void *dy = j->a->ptr[2], *x = j->a->ptr[3];
    const float *mean = j->a->ptr[4], *rstd = j->a->ptr[5];
    for (int64_t c = begin; c < end; c += LANES) {
        int64_t left = end - c;
        vf w = v_load_n(dw + c, left), b = v_load_n(db + c, left);
        for (int64_t r = 0; r < j->R; r++) {
            vf g = v_load_dt_n(dy, r * j->C + c, left, dt);
            vf h = v_mul(v_sub(v_load_dt_n(x, r * j->C + c, left, dt), v_set1(mean[r])),
                         v_set1(rstd[r]));
            w = v_fma(g, h, w);
            b = v_add(b, g);
        }
        v_store_n(dw + c, w, left);
        v_store_n(db + c, b, left);
    }
}

static void layernorm_wgrad_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const layernorm_job *j = ctx;
    (void)worker;
    begin *= SHARE_COLUMNS, end = min64(end * SHARE_COLUMNS, j->C);
    BY_DTYPE(j->a->dtype, layernorm_wgrad_columns, j, begin, end);
}

static void layernorm_wgrad_op(hs_kernel_ctx *ctx, const hs_args *a) {
    layernorm_job j = {a, a->dim[0], a->dim[1], 0};
    share_columns(ctx, j.R, j.C, layernorm_wgrad_range, &j);
}
