#include "kernels/classifier.h"

#include "kernels/ref/ref_internal.h"

static int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}

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

hs_status hs_ref_classifier_fwd(hs_kernel_ctx *ctx, const hs_args *a) {
    (void)ctx;
    const int64_t R = a->dim[0], C = a->dim[1], V = a->dim[2], CHUNK = a->dim[3];
    const uint32_t dt = a->dtype, acc = acc_of(dt);
    const int32_t *target_r = a->ptr[3];
    void *logits = a->ptr[4];
    for (int64_t first = 0; first < R; first += CHUNK) {
        const int64_t rows = smaller(CHUNK, R - first);
        logits_of(logits, a->ptr[1], a->ptr[2], first, rows, C, V, dt);
        for (int64_t i = 0; i < rows; i++)
            store(a->ptr[0], acc, first + i, loss_of(logits, i, V, target_r[first + i], acc));
    }
    return HS_OK;
}

hs_status hs_ref_classifier_grad(hs_kernel_ctx *ctx, const hs_args *a) {
    (void)ctx;
    const int64_t R = a->dim[0], C = a->dim[1], V = a->dim[2], CHUNK = a->dim[3];
    const uint32_t dt = a->dtype, acc = acc_of(dt);
    void *loss_r = a->ptr[0], *dx_rc = a->ptr[1], *dw_vc = a->ptr[2];
    const void *x_rc = a->ptr[3], *w_vc = a->ptr[4];
    const int32_t *target_r = a->ptr[5];
    void *logits = a->ptr[6], *dlogits = a->ptr[7];
    for (int64_t first = 0; first < R; first += CHUNK) {
        const int64_t rows = smaller(CHUNK, R - first);
        logits_of(logits, x_rc, w_vc, first, rows, C, V, dt);
        for (int64_t i = 0; i < rows; i++) {
            const int32_t target = target_r[first + i];
            store(loss_r, acc, first + i, loss_of(logits, i, V, target, acc));
            const double lse = lse_of(logits, i, V, acc);
            for (int64_t v = 0; v < V; v++) {
                double p = hs_exp(load(logits, acc, i * V + v) - lse);
                store(dlogits, dt, i * V + v, target < 0 ? 0 : a->real[0] * (p - (v == target)));
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
                double dw = load(dw_vc, acc, v * C + c);
                for (int64_t i = 0; i < rows; i++)
                    dw += load(dlogits, dt, i * V + v) * load(x_rc, dt, (first + i) * C + c);
                store(dw_vc, acc, v * C + c, dw);
            }
    }
    return HS_OK;
}

hs_status hs_ref_logits(hs_kernel_ctx *ctx, const hs_args *a) {
    (void)ctx;
    logits_of(a->ptr[0], a->ptr[1], a->ptr[2], 0, a->dim[0], a->dim[1], a->dim[2], a->dtype);
    return HS_OK;
}
