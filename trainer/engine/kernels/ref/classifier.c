#include "kernels/classifier.h"

#include "core/ints.h"
#include "kernels/ref/ref_internal.h"

/* logits of rows [first, first + rows) into the first rows of logits_iv. */
static void logits_of(void *logits_iv, const void *x_rc, const void *w_vc, int64_t first,
                      int64_t rows, int64_t C, int64_t V, uint32_t dt) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t v = 0; v < V; v++) {
            double sum = 0;
            for (int64_t c = 0; c < C; c++)
                sum += load(x_rc, dt, (first + i) * C + c) * load(w_vc, dt, v * C + c);
            store(logits_iv, acc_of(dt), i * V + v, sum);
        }
}

/* log of the sum of the exponentials of row i. */
static double lse_of(const void *logits_iv, int64_t i, int64_t V, uint32_t acc) {
    double max = -INFINITY, sum = 0;
    for (int64_t v = 0; v < V; v++) {
        double l = load(logits_iv, acc, i * V + v);
        max = l > max || l != l ? l : max;
    }
    for (int64_t v = 0; v < V; v++) sum += hs_exp(load(logits_iv, acc, i * V + v) - max);
    return max + hs_log(sum);
}

/* The loss of row i of a chunk; 0 without a target. */
static double loss_of(const void *logits_iv, int64_t i, int64_t V, int32_t target, uint32_t acc) {
    HS_ASSERT(target < V);
    return target < 0 ? 0 : lse_of(logits_iv, i, V, acc) - load(logits_iv, acc, i * V + target);
}

void hs_ref_classifier_fwd(const hs_classifier_fwd_args *a) {
    const int64_t R = a->R, C = a->C, V = a->V, CHUNK = a->CHUNK;
    const uint32_t dt = a->dtype, acc = acc_of(dt);
    const int32_t *target_r = a->target;
    void *logits = a->logits;
    for (int64_t first = 0; first < R; first += CHUNK) {
        const int64_t rows = hs_min(CHUNK, R - first);
        logits_of(logits, a->x, a->w, first, rows, C, V, dt);
        for (int64_t i = 0; i < rows; i++)
            store(a->loss, acc, first + i, loss_of(logits, i, V, target_r[first + i], acc));
    }
}

void hs_ref_classifier_grad(const hs_classifier_grad_args *a) {
    const int64_t R = a->R, C = a->C, V = a->V, CHUNK = a->CHUNK;
    const uint32_t dt = a->dtype, acc = acc_of(dt);
    void *loss_r = a->loss, *dx_rc = a->dx, *dw_vc = a->dw;
    const void *x_rc = a->x, *w_vc = a->w;
    const int32_t *target_r = a->target;
    void *logits = a->logits, *dlogits = a->dlogits;
    for (int64_t first = 0; first < R; first += CHUNK) {
        const int64_t rows = hs_min(CHUNK, R - first);
        logits_of(logits, x_rc, w_vc, first, rows, C, V, dt);
        for (int64_t i = 0; i < rows; i++) {
            const int32_t target = target_r[first + i];
            store(loss_r, acc, first + i, loss_of(logits, i, V, target, acc));
            const double lse = lse_of(logits, i, V, acc);
            for (int64_t v = 0; v < V; v++) {
                double p = hs_exp(load(logits, acc, i * V + v) - lse);
                store(dlogits, dt, i * V + v, target < 0 ? 0 : a->scale * (p - (v == target)));
            }
        }
        for (int64_t i = 0; i < rows; i++)
            for (int64_t c = 0; c < C; c++) {
                double dx = 0;
                for (int64_t v = 0; v < V; v++)
                    dx += load(dlogits, dt, i * V + v) * load(w_vc, dt, v * C + c);
                store(dx_rc, dt, (first + i) * C + c, dx);
            }
        for (int64_t v = 0; v < V; v++)
            for (int64_t c = 0; c < C; c++) {
                double dw = first > 0 || a->ACCUM ? load(dw_vc, acc, v * C + c) : 0;
                for (int64_t i = 0; i < rows; i++)
                    dw += load(dlogits, dt, i * V + v) * load(x_rc, dt, (first + i) * C + c);
                store(dw_vc, acc, v * C + c, dw);
            }
    }
}

void hs_ref_logits(const hs_logits_args *a) {
    logits_of(a->logits, a->x, a->w, 0, a->R, a->C, a->V, a->dtype);
}
