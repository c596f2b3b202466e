#include "kernels/optimizer.h"

#include "kernels/ref/ref_internal.h"
#include "wire/plan.h"

hs_status hs_ref_add_acc(hs_kernel_ctx *ctx, const hs_args *a) {
    (void)ctx;
    const uint32_t acc = acc_of(a->dtype);
    for (int64_t i = 0; i < a->dim[0]; i++) add_to(a->ptr[0], acc, i, load(a->ptr[1], acc, i));
    return HS_OK;
}

hs_status hs_ref_sumsq(hs_kernel_ctx *ctx, const hs_args *a) {
    (void)ctx;
    const int64_t n = a->dim[0];
    double *part = a->ptr[2], total = 0;
    for (int64_t first = 0; first < n; first += HS_SUMSQ_BLOCK) {
        double sum = 0;
        for (int64_t i = first; i < n && i < first + HS_SUMSQ_BLOCK; i++) {
            double x = load(a->ptr[1], acc_of(a->dtype), i);
            sum += x * x;
        }
        part[first / HS_SUMSQ_BLOCK] = sum;
        total += sum;
    }
    *(double *)a->ptr[0] = total;
    return HS_OK;
}

hs_status hs_ref_adamw(hs_kernel_ctx *ctx, const hs_args *a) {
    (void)ctx;
    const uint32_t acc = acc_of(a->dtype);
    void *w_n = a->ptr[0], *m_n = a->ptr[1], *v_n = a->ptr[2], *g_n = a->ptr[3], *wc_n = a->ptr[4];
    const hs_step_control *ctl = a->ptr[5];
    const double beta1 = a->real[0], beta2 = a->real[1], eps = a->real[2], decay = a->real[3];
    for (int64_t i = 0; i < a->dim[0]; i++) {
        const double g = load(g_n, acc, i) * (double)ctl->clip_scale;
        store(m_n, acc, i, beta1 * load(m_n, acc, i) + (1 - beta1) * g);
        store(v_n, acc, i, beta2 * load(v_n, acc, i) + (1 - beta2) * g * g);
        double root = sqrt(load(v_n, acc, i)) * (double)ctl->v_scale + eps;
        double w = load(w_n, acc, i);
        w -= (double)ctl->lr_decay * decay * w;
        w -= (double)ctl->step_size * load(m_n, acc, i) / root;
        store(w_n, acc, i, w);
        if (wc_n) store(wc_n, a->dtype, i, load(w_n, acc, i));
        if (a->dim[1]) store(g_n, acc, i, 0);
    }
    return HS_OK;
}

hs_status hs_ref_zero(hs_kernel_ctx *ctx, const hs_args *a) {
    (void)ctx;
    memset(a->ptr[0], 0, (size_t)a->dim[0]);
    return HS_OK;
}

hs_status hs_ref_cast(hs_kernel_ctx *ctx, const hs_args *a) {
    (void)ctx;
    for (int64_t i = 0; i < a->dim[0]; i++)
        store(a->ptr[0], a->dtype, i, load(a->ptr[1], acc_of(a->dtype), i));
    return HS_OK;
}
