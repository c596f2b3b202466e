/* What runs once a step over whole tensors; see optimizer.h for AdamW's exact steps. */
#include "kernels/optimizer.h"

#include "kernels/cpu/share.h"
#include "kernels/cpu/vec.h"
#include "kernels/deferred.h"
#include "wire/plan.h"

static void add_acc_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const hs_add_acc_args *a = ctx;
    float *dst = a->dst;
    const float *src = a->src;
    (void)worker;
    begin *= SHARE_FLAT, end = hs_min(end * SHARE_FLAT, a->n);
    for (int64_t i = begin; i < end; i += LANES) {
        int64_t left = end - i;
        v_store_n(dst + i, v_add(v_load_n(dst + i, left), v_load_n(src + i, left)), left);
    }
}

static void add_acc_op(hs_kernel_ctx *ctx, hs_add_acc_args *a) {
    share_flat(ctx, a->n, add_acc_range, a);
}

static void fold_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const hs_fold_args *a = ctx;
    float *dst = a->dst, *src = a->src;
    (void)worker;
    begin *= SHARE_FLAT, end = hs_min(end * SHARE_FLAT, a->n);
    for (int64_t i = begin; i < end; i += LANES) {
        int64_t left = end - i;
        v_store_n(dst + i, v_add(v_load_n(dst + i, left), v_load_n(src + i, left)), left);
        v_store_n(src + i, v_zero(), left);
    }
}

static void fold_op(hs_kernel_ctx *ctx, hs_fold_args *a) {
    share_flat(ctx, a->n, fold_range, a);
}

#define SUMSQ_AHEAD 8192 /* bytes: the processor itself looks no further than to a page's end */

/* Blocks are cut among threads whole, so where the cuts lie does not show. */
static void sumsq_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const hs_sumsq_parts_args *a = ctx;
    const float *x = a->x;
    double *part = a->part;
    (void)worker;
    for (int64_t block = begin; block < end; block++) {
        int64_t first = block * HS_SUMSQ_BLOCK, last = hs_min(first + HS_SUMSQ_BLOCK, a->n);
        vd sum = vd_zero();
        double lane[LANES];
        for (int64_t i = first; i < last; i += LANES) {
            __builtin_prefetch((const char *)(x + i) + SUMSQ_AHEAD);
            sum = vd_add_square(sum, v_load_n(x + i, last - i));
        }
        vd_store(lane, sum);
        for (int step = 8; step; step /= 2)
            for (int l = 0; l < step; l++) lane[l] = lane[l] + lane[l + step];
        part[block] = lane[0];
    }
}

static void sumsq_parts_op(hs_kernel_ctx *ctx, hs_sumsq_parts_args *a) {
    share_rows(ctx, hs_ceil_div(a->n, HS_SUMSQ_BLOCK), HS_SUMSQ_BLOCK, sumsq_range, a);
}

/* Neighbours join, level by level; an odd one goes up as it is. */
static double sum_pairs(double *part, int64_t n) {
    for (; n > 1; n = (n + 1) / 2) {
        for (int64_t i = 0; i < n / 2; i++) part[i] = part[2 * i] + part[2 * i + 1];
        if (n % 2) part[n / 2] = part[n - 1];
    }
    return part[0];
}

static void sumsq_op(hs_kernel_ctx *ctx, hs_sumsq_args *a) {
    hs_sumsq_parts_args parts = {.part = a->part, .x = a->x, .n = a->n, .dtype = a->dtype};
    sumsq_parts_op(ctx, &parts);
    *(double *)a->out = sum_pairs(a->part, hs_ceil_div(a->n, HS_SUMSQ_BLOCK));
}

static void sum_op(hs_kernel_ctx *ctx, hs_sum_args *a) {
    (void)ctx;
    memcpy(a->tree, a->part, (size_t)a->n * sizeof(double));
    *(double *)a->out = sum_pairs(a->tree, a->n);
}

/* Copies of so many elements go past the caches: the step that makes them moves 14 times their bytes, so they are out of
 * the caches before anybody reads them, and a line that is written whole need not be read first. */
#define PAST_CACHES (1 << 19)

/* Both of AdamW's: what changes the state, and what only makes the copy that it will leave. */
typedef struct adamw_job {
    hs_step_control control; /* as it is now: the work may wait */
    float *w, *m, *v, *g;
    void *wc;
    int64_t n;
    uint32_t dtype;
    bool zero, copy_only;
    float beta1, rest1, beta2, rest2, eps, decay;
} adamw_job;
_Static_assert(sizeof(adamw_job) <= HS_DEFERRED_JOB, "an AdamW call can wait");

/* Up to LANES elements from i on: their state, but where only the copy is made; returns w. */
VINLINE vf adamw_lanes(const adamw_job *j, int64_t i, int64_t left) {
    const hs_step_control *control = &j->control;
    vf g = v_mul(v_load_n(j->g + i, left), v_set1(control->clip_scale));
    vf m = v_fma(v_set1(j->beta1), v_load_n(j->m + i, left), v_mul(v_set1(j->rest1), g));
    vf v = v_fma(v_set1(j->beta2), v_load_n(j->v + i, left), v_mul(v_mul(v_set1(j->rest2), g), g));
    vf den = v_fma(v_sqrt(v), v_set1(control->v_scale), v_set1(j->eps));
    vf w = v_load_n(j->w + i, left);
    w = v_fnma(v_set1(control->lr_decay * j->decay), w, w);
    w = v_sub(w, v_div(v_mul(v_set1(control->step_size), m), den));
    if (j->copy_only) return w;
    v_store_n(j->w + i, w, left);
    v_store_n(j->m + i, m, left);
    v_store_n(j->v + i, v, left);
    if (j->zero) v_store_n(j->g + i, v_zero(), left);
    return w;
}

/* j is a copy of the caller's own: nothing that is stored can change it. */
VINLINE void adamw_flat(adamw_job own, int64_t begin, int64_t end, int dt) {
    const adamw_job *j = &own;
    int64_t i = begin;
    if (dt == HS_BF16 && j->wc && j->n >= PAST_CACHES && (uintptr_t)j->wc % 64 == 0) {
        for (; i + 2 * LANES <= end; i += 2 * LANES) {
            const vf low = adamw_lanes(j, i, LANES), high = adamw_lanes(j, i + LANES, LANES);
            v_stream_bf16((bf16 *)j->wc + i, low, high);
        }
        v_streamed();
    }
    for (; i < end; i += LANES) {
        const vf w = adamw_lanes(j, i, end - i);
        if (j->wc) v_store_dt_n(j->wc, i, w, end - i, dt);
    }
}

static void adamw_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const adamw_job *j = ctx;
    (void)worker;
    begin *= HS_DEFERRED_ITEM, end = hs_min(end * HS_DEFERRED_ITEM, j->n);
    BY_DTYPE(j->dtype, adamw_flat, *j, begin, end);
}

/* The operands and numbers that both have. */
#define ADAMW_JOB(a, ...)                                                                          \
    {.control = *(const hs_step_control *)(a)->ctl,                                                \
     .w = (a)->w,                                                                                  \
     .m = (a)->m,                                                                                  \
     .v = (a)->v,                                                                                  \
     .g = (a)->g,                                                                                  \
     .wc = (a)->wc,                                                                                \
     .n = (a)->n,                                                                                  \
     .dtype = (a)->dtype,                                                                          \
     .beta1 = (float)(a)->beta1,                                                                   \
     .rest1 = (float)(1.0 - (a)->beta1),                                                           \
     .beta2 = (float)(a)->beta2,                                                                   \
     .rest2 = (float)(1.0 - (a)->beta2),                                                           \
     .eps = (float)(a)->eps,                                                                       \
     .decay = (float)(a)->decay,                                                                   \
     __VA_ARGS__}

static void adamw_op(hs_kernel_ctx *ctx, hs_adamw_args *a) {
    adamw_job j = ADAMW_JOB(a, .zero = a->ZERO_G != 0);
    const void *const all[HS_DEFERRED_RANGES] = {a->w, a->m, a->v, a->g, a->wc};
    hs_deferred_call waits = {.fn = adamw_range, .elements = a->n};
    memcpy(waits.job, &j, sizeof j);
    for (int i = 0; i < HS_DEFERRED_RANGES; i++)
        waits.touches[i] = (hs_deferred_range){
            all[i], i < HS_DEFERRED_READS ? 4 : (uint32_t)dt_size((int)a->dtype)};
    if (a->n < HS_DEFERRED_ITEM || !hs_deferred_leave(ctx->deferred, &waits))
        share_rows(ctx, hs_ceil_div(a->n, HS_DEFERRED_ITEM), HS_DEFERRED_ITEM, adamw_range, &j);
}

static void adamw_copy_op(hs_kernel_ctx *ctx, hs_adamw_copy_args *a) {
    adamw_job j = ADAMW_JOB(a, .copy_only = true);
    share_rows(ctx, hs_ceil_div(a->n, HS_DEFERRED_ITEM), HS_DEFERRED_ITEM, adamw_range, &j);
}

static void zero_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const hs_zero_args *a = ctx;
    (void)worker;
    begin *= SHARE_FLAT, end = hs_min(end * SHARE_FLAT, a->bytes);
    memset((char *)a->dst + begin, 0, (size_t)(end - begin));
}

static void zero_op(hs_kernel_ctx *ctx, hs_zero_args *a) {
    share_flat(ctx, a->bytes, zero_range, a);
}

VINLINE void cast_flat(const hs_cast_args *a, int64_t begin, int64_t end, int dt) {
    const float *src = a->src;
    for (int64_t i = begin; i < end; i += LANES)
        v_store_dt_n(a->dst, i, v_load_n(src + i, end - i), end - i, dt);
}

static void cast_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const hs_cast_args *a = ctx;
    (void)worker;
    begin *= SHARE_FLAT, end = hs_min(end * SHARE_FLAT, a->n);
    BY_DTYPE(a->dtype, cast_flat, a, begin, end);
}

static void cast_op(hs_kernel_ctx *ctx, hs_cast_args *a) {
    share_flat(ctx, a->n, cast_range, a);
}
