/* The last layer with its loss, CHUNK rows at a time.
 *
 * A row: maximum; then e = exp(logit - maximum), kept in place of the logits, and its sum in 16
 * lane partials; dlogits = e (scale / sum), so that no second exp is taken. A larger CHUNK reads
 * the weights (the largest tensor of a small model) less often: that is the only thing that depends
 * on it. */
#include "kernels/classifier.h"

#include "kernels/cpu/gemm.h"
#include "kernels/cpu/share.h"
#include "kernels/cpu/softmax.h"

typedef struct classifier_job {
    float *loss;   /* of the chunk's rows */
    float *logits; /* [rows, V] */
    void *dlogits; /* [rows, V] dt, NULL: the loss alone */
    const int32_t *target;
    int64_t V;
    float scale;
    int dt;
} classifier_job;

/* after: the row's logits that come next, to be fetched meanwhile; the last one's own */
VINLINE void classifier_row(const classifier_job *j, int64_t r, const float *after, int dt) {
    const int64_t V = j->V, target = j->target[r];
    float *z = j->logits + r * V;
    if (target < 0) {
        j->loss[r] = 0;
        if (j->dlogits)
            for (int64_t v = 0; v < V; v += LANES)
                v_store_dt_n(j->dlogits, r * V + v, v_zero(), V - v, dt);
        return;
    }
    const float highest = largest_of(z, V), logit = z[target];
    const float s = v_sum(exps_of(z, V, highest, after, j->dlogits != NULL));
    j->loss[r] = (highest - logit) + log1_f32(s);
    if (!j->dlogits) return;
    vf factor = v_set1(j->scale / s);
    /* the target's own: p - 1 is taken before scaling */
    float at_target = (z[target] / s - 1.0f) * j->scale;
    for (int64_t v = 0; v < V; v += LANES)
        v_store_dt_n(j->dlogits, r * V + v, v_mul(v_load_n(z + v, V - v), factor), V - v, dt);
    v_store_dt_n(j->dlogits, r * V + target, v_set1(at_target), 1, dt);
}

VINLINE void classifier_rows(const classifier_job *j, int64_t begin, int64_t end, int dt) {
    for (int64_t r = begin; r < end; r++)
        classifier_row(j, r, r + 1 < end ? j->logits + (r + 1) * j->V : j->logits + r * j->V, dt);
}

static void classifier_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const classifier_job *j = ctx;
    (void)worker;
    BY_DTYPE(j->dt, classifier_rows, j, begin, end);
}

VINLINE void classifier_logits(hs_kernel_ctx *ctx, float *logits, const char *x, const void *w,
                               int64_t rows, int64_t C, int64_t V, int dt) {
    gemm g = {.m = rows,
              .n = V,
              .k = C,
              .a = {x, C, 1, dt},
              .b = {w, C, 1, dt},
              .out = logits,
              .ld_out = V,
              .dt_out = HS_F32};
    gemm_run(ctx, &g);
}

static void classifier_fwd_op(hs_kernel_ctx *ctx, hs_classifier_fwd_args *a) {
    const int64_t R = a->R, C = a->C, V = a->V, chunk = a->CHUNK;
    const int dt = (int)a->dtype;
    for (int64_t r = 0; r < R; r += chunk) {
        int64_t rows = hs_min(chunk, R - r);
        classifier_job j = {
            (float *)a->loss + r, a->logits, NULL, (const int32_t *)a->target + r, V, 0, dt};
        classifier_logits(ctx, a->logits, (const char *)a->x + r * C * dt_size(dt), a->w, rows, C,
                          V, dt);
        share_rows(ctx, rows, V, classifier_range, &j);
    }
}

static void classifier_grad_op(hs_kernel_ctx *ctx, hs_classifier_grad_args *a) {
    const int64_t R = a->R, C = a->C, V = a->V, chunk = a->CHUNK;
    const int dt = (int)a->dtype;
    const void *w = a->w, *dlogits = a->dlogits;
    for (int64_t r = 0; r < R; r += chunk) {
        int64_t rows = hs_min(chunk, R - r);
        const char *x = (const char *)a->x + r * C * dt_size(dt);
        classifier_job j = {
            (float *)a->loss + r, a->logits, a->dlogits, (const int32_t *)a->target + r, V,
            (float)a->scale,      dt};
        classifier_logits(ctx, a->logits, x, w, rows, C, V, dt);
        share_rows(ctx, rows, V, classifier_range, &j);
        gemm dx = {.m = rows,
                   .n = C,
                   .k = V,
                   .a = {dlogits, V, 1, dt},
                   .b = {w, 1, C, dt},
                   .out = (char *)a->dx + r * C * dt_size(dt),
                   .ld_out = C,
                   .dt_out = dt};
        gemm_run(ctx, &dx);
        gemm dw = {.m = V,
                   .n = C,
                   .k = rows,
                   .a = {dlogits, 1, V, dt},
                   .b = {x, 1, C, dt},
                   .out = a->dw,
                   .ld_out = C,
                   .dt_out = HS_F32,
                   .from_old = r > 0 || a->ACCUM};
        gemm_run(ctx, &dw);
    }
}

static void logits_op(hs_kernel_ctx *ctx, hs_logits_args *a) {
    classifier_logits(ctx, a->logits, a->x, a->w, a->R, a->C, a->V, (int)a->dtype);
}
