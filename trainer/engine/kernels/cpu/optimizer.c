/* What runs once a step over whole tensors; see optimizer.h for AdamW's exact steps. */
#include "kernels/optimizer.h"

#include "kernels/cpu/gemm.h"
#include "kernels/cpu/share.h"
#include "wire/plan.h"

typedef struct flat_job {
    const hs_args *a;
    int64_t n;
} flat_job;

static void add_acc_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const flat_job *j = ctx;
    float *dst = j->a->ptr[0];
    const float *src = j->a->ptr[1];
    (void)worker;
    begin *= SHARE_FLAT, end = min64(end * SHARE_FLAT, j->n);
    for (int64_t i = begin; i < end; i += LANES) {
        int64_t left = end - i;
        v_store_n(dst + i, v_add(v_load_n(dst + i, left), v_load_n(src + i, left)), left);
    }
}

static void add_acc_op(hs_kernel_ctx *ctx, const hs_args *a) {
    flat_job j = {a, a->dim[0]};
    share_flat(ctx, j.n, add_acc_range, &j);
}

/* Blocks are cut among threads whole, so where the cuts lie does not show. */
static void sumsq_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const flat_job *j = ctx;
    const float *x = j->a->ptr[1];
    double *part = j->a->ptr[2];
    (void)worker;
    for (int64_t block = begin; block < end; block++) {
        int64_t first = block * HS_SUMSQ_BLOCK, last = min64(first + HS_SUMSQ_BLOCK, j->n);
        vd sum = vd_zero();
        double lane[LANES];
        for (int64_t i = first; i < last; i += LANES)
            sum = vd_add_square(sum, v_load_n(x + i, last - i));
        vd_store(lane, sum);
        for (int step = 8; step; step /= 2)
            for (int l = 0; l < step; l++) lane[l] = lane[l] + lane[l + step];
        part[block] = lane[0];
    }
}

static void sumsq_op(hs_kernel_ctx *ctx, const hs_args *a) {
    flat_job j = {a, a->dim[0]};
    double *part = a->ptr[2];
    int64_t blocks = ceil_div(j.n, HS_SUMSQ_BLOCK);
    share_rows(ctx, blocks, HS_SUMSQ_BLOCK, sumsq_range, &j);
    /* neighbours join, level by level; an odd one goes up as it is */
    for (; blocks > 1; blocks = (blocks + 1) / 2) {
        for (int64_t i = 0; i < blocks / 2; i++) part[i] = part[2 * i] + part[2 * i + 1];
        if (blocks % 2) part[blocks / 2] = part[blocks - 1];
    }
    *(double *)a->ptr[0] = part[0];
}

typedef struct adamw_job {
    const hs_args *a;
    int64_t n;
    float clip, beta1, rest1, beta2, rest2, eps, shrink, step_size, v_scale;
} adamw_job;

VINLINE void adamw_flat(const adamw_job *j, int64_t begin, int64_t end, int dt) {
    float *w = j->a->ptr[0], *m = j->a->ptr[1], *v = j->a->ptr[2], *g = j->a->ptr[3];
    void *wc = j->a->ptr[4];
    const int zero = j->a->dim[1] != 0;
    for (int64_t i = begin; i < end; i += LANES) {
        int64_t left = end - i;
        vf gg = v_mul(v_load_n(g + i, left), v_set1(j->clip));
        vf mm = v_fma(v_set1(j->beta1), v_load_n(m + i, left), v_mul(v_set1(j->rest1), gg));
        vf vv =
            v_fma(v_set1(j->beta2), v_load_n(v + i, left), v_mul(v_mul(v_set1(j->rest2), gg), gg));
        vf den = v_fma(v_sqrt(vv), v_set1(j->v_scale), v_set1(j->eps));
        vf ww = v_load_n(w + i, left);
        ww = v_fnma(v_set1(j->shrink), ww, ww);
        ww = v_sub(ww, v_div(v_mul(v_set1(j->step_size), mm), den));
        v_store_n(w + i, ww, left);
        v_store_n(m + i, mm, left);
        v_store_n(v + i, vv, left);
        if (zero) v_store_n(g + i, v_zero(), left);
        if (wc) v_store_dt_n(wc, i, ww, left, dt);
    }
}

static void adamw_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const adamw_job *j = ctx;
    (void)worker;
    begin *= SHARE_FLAT, end = min64(end * SHARE_FLAT, j->n);
    BY_DTYPE(j->a->dtype, adamw_flat, j, begin, end);
}

static void adamw_op(hs_kernel_ctx *ctx, const hs_args *a) {
    const hs_step_control *control = a->ptr[5];
    adamw_job j = {
        .a = a,
        .n = a->dim[0],
        .clip = control->clip_scale,
        .beta1 = (float)a->real[0],
        .rest1 = (float)(1.0 - a->real[0]),
        .beta2 = (float)a->real[1],
        .rest2 = (float)(1.0 - a->real[1]),
        .eps = (float)a->real[2],
        .shrink = control->lr_decay * (float)a->real[3],
        .step_size = control->step_size,
        .v_scale = control->v_scale,
    };
    share_flat(ctx, j.n, adamw_range, &j);
}

static void zero_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const flat_job *j = ctx;
    (void)worker;
    begin *= SHARE_FLAT, end = min64(end * SHARE_FLAT, j->n);
    memset((char *)j->a->ptr[0] + begin, 0, (size_t)(end - begin));
}

static void zero_op(hs_kernel_ctx *ctx, const hs_args *a) {
    flat_job j = {a, a->dim[0]}; /* bytes */
    share_flat(ctx, j.n, zero_range, &j);
}

VINLINE void cast_flat(const flat_job *j, int64_t begin, int64_t end, int dt) {
    const float *src = j->a->ptr[1];
    for (int64_t i = begin; i < end; i += LANES)
        v_store_dt_n(j->a->ptr[0], i, v_load_n(src + i, end - i), end - i, dt);
}

static void cast_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const flat_job *j = ctx;
    (void)worker;
    begin *= SHARE_FLAT, end = min64(end * SHARE_FLAT, j->n);
    BY_DTYPE(j->a->dtype, cast_flat, j, begin, end);
}

static void cast_op(hs_kernel_ctx *ctx, const hs_args *a) {
    flat_job j = {a, a->dim[0]};
    share_flat(ctx, j.n, cast_range, &j);
}
