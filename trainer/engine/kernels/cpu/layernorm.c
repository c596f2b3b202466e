/* LayerNorm. Sums inside a row: 16 lane partials, index ascending, then the tree of v_sum. */
#include "kernels/layernorm.h"

#include <math.h>

#include "kernels/cpu/share.h"
#include "kernels/cpu/vec.h"

VINLINE void layernorm_fwd_rows(const hs_layernorm_fwd_args *a, int64_t begin, int64_t end,
                                int dt) {
    float *mean = a->mean, *rstd = a->rstd;
    const void *x = a->x;
    const float *w = a->w, *b = a->b;
    const int64_t C = a->C;
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
        float s = 1.0f / sqrtf(v_sum(square) / (float)C + (float)a->eps);
        vf sv = v_set1(s);
        for (int64_t c = 0; c < C; c += LANES) {
            int64_t left = C - c;
            vf h = v_mul(v_sub(v_load_dt_n(x, r * C + c, left, dt), mv), sv);
            h = v_fma(h, v_load_n(w + c, left), v_load_n(b + c, left));
            v_store_dt_n(a->y, r * C + c, h, left, dt);
        }
        mean[r] = m;
        rstd[r] = s;
    }
}

static void layernorm_fwd_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const hs_layernorm_fwd_args *a = ctx;
    (void)worker;
    BY_DTYPE(a->dtype, layernorm_fwd_rows, a, begin, end);
}

static void layernorm_fwd_op(hs_kernel_ctx *ctx, hs_layernorm_fwd_args *a) {
    share_rows(ctx, a->R, a->C, layernorm_fwd_range, a);
}

VINLINE void layernorm_igrad_rows(const hs_layernorm_igrad_args *a, int64_t begin, int64_t end,
                                  int dt) {
    void *dx = a->dx;
    const void *dy = a->dy, *x = a->x, *old = a->old ? a->old : a->dx;
    const float *w = a->w, *mean = a->mean, *rstd = a->rstd;
    const int accumulate = a->ACCUM != 0;
    const int64_t C = a->C;
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
            if (accumulate) d = v_add(d, v_load_dt_n(old, at, left, dt));
            v_store_dt_n(dx, at, d, left, dt);
        }
    }
}

static void layernorm_igrad_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const hs_layernorm_igrad_args *a = ctx;
    (void)worker;
    BY_DTYPE(a->dtype, layernorm_igrad_rows, a, begin, end);
}

static void layernorm_igrad_op(hs_kernel_ctx *ctx, hs_layernorm_igrad_args *a) {
    share_rows(ctx, a->R, a->C, layernorm_igrad_range, a);
}

/* Of rows [r, r + rows): as they lie in memory, some at a time; the sums wait in the nearest cache. */
VINLINE void layernorm_wgrad_rows(const hs_layernorm_wgrad_args *a, int64_t r, int64_t rows,
                                  int64_t begin, int64_t end, int dt) {
    float *dw = a->dw, *db = a->db;
    const void *dy = a->dy, *x = a->x;
    const float *mean = a->mean, *rstd = a->rstd;
    for (int64_t c = begin; c < end; c += LANES) {
        int64_t left = end - c;
        vf w = v_load_n(dw + c, left), b = v_load_n(db + c, left);
        for (int64_t k = r; k < r + rows; k++) {
            vf g = v_load_dt_n(dy, k * a->C + c, left, dt);
            vf h = v_mul(v_sub(v_load_dt_n(x, k * a->C + c, left, dt), v_set1(mean[k])),
                         v_set1(rstd[k]));
            w = v_fma(g, h, w);
            b = v_add(b, g);
        }
        v_store_n(dw + c, w, left);
        v_store_n(db + c, b, left);
    }
}

VINLINE void layernorm_wgrad_columns(const hs_layernorm_wgrad_args *a, int64_t begin, int64_t end,
                                     int dt) {
    int64_t r = 0;
    for (; r + SHARE_ROWS <= a->R; r += SHARE_ROWS)
        layernorm_wgrad_rows(a, r, SHARE_ROWS, begin, end, dt);
    layernorm_wgrad_rows(a, r, a->R - r, begin, end, dt);
}

static void layernorm_wgrad_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const hs_layernorm_wgrad_args *a = ctx;
    (void)worker;
    begin *= SHARE_COLUMNS, end = hs_min(end * SHARE_COLUMNS, a->C);
    BY_DTYPE(a->dtype, layernorm_wgrad_columns, a, begin, end);
}

static void layernorm_wgrad_op(hs_kernel_ctx *ctx, hs_layernorm_wgrad_args *a) {
    share_columns(ctx, a->R, a->C, layernorm_wgrad_range, a);
}
