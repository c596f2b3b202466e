#include "kernels/optimizer.h"

#include "core/ints.h"
#include "kernels/ref/ref_internal.h"
#include "wire/plan.h"

void hs_ref_add_acc(const hs_add_acc_args *a) {
    const uint32_t acc = acc_of(a->dtype);
    for (int64_t i = 0; i < a->n; i++) add_to(a->dst, acc, i, load(a->src, acc, i));
}

void hs_ref_fold(const hs_fold_args *a) {
    const uint32_t acc = acc_of(a->dtype);
    for (int64_t i = 0; i < a->n; i++) {
        add_to(a->dst, acc, i, load(a->src, acc, i));
        store(a->src, acc, i, 0);
    }
}

static void square(double *part, const void *x, uint32_t acc, int64_t n) {
    for (int64_t first = 0; first < n; first += HS_SUMSQ_BLOCK) {
        double sum = 0;
        for (int64_t i = first; i < n && i < first + HS_SUMSQ_BLOCK; i++)
            sum += load(x, acc, i) * load(x, acc, i);
        part[first / HS_SUMSQ_BLOCK] = sum;
    }
}

static double sum_of(const double *part, int64_t n) {
    double total = 0;
    for (int64_t i = 0; i < n; i++) total += part[i];
    return total;
}

void hs_ref_sumsq(const hs_sumsq_args *a) {
    square(a->part, a->x, acc_of(a->dtype), a->n);
    *(double *)a->out = sum_of(a->part, hs_ceil_div(a->n, HS_SUMSQ_BLOCK));
}

void hs_ref_sumsq_parts(const hs_sumsq_parts_args *a) {
    square(a->part, a->x, acc_of(a->dtype), a->n);
}

void hs_ref_sum(const hs_sum_args *a) {
    *(double *)a->out = sum_of(a->part, a->n);
}

void hs_ref_adamw(const hs_adamw_args *a) {
    const uint32_t acc = acc_of(a->dtype);
    void *w_n = a->w, *m_n = a->m, *v_n = a->v, *g_n = a->g, *wc_n = a->wc;
    const hs_step_control *ctl = a->ctl;
    const double beta1 = a->beta1, beta2 = a->beta2, eps = a->eps, decay = a->decay;
    for (int64_t i = 0; i < a->n; i++) {
        const double g = load(g_n, acc, i) * (double)ctl->clip_scale;
        store(m_n, acc, i, beta1 * load(m_n, acc, i) + (1 - beta1) * g);
        store(v_n, acc, i, beta2 * load(v_n, acc, i) + (1 - beta2) * g * g);
        double root = sqrt(load(v_n, acc, i)) * (double)ctl->v_scale + eps;
        double w = load(w_n, acc, i);
        w -= (double)ctl->lr_decay * decay * w;
        w -= (double)ctl->step_size * load(m_n, acc, i) / root;
        store(w_n, acc, i, w);
        if (wc_n) store(wc_n, a->dtype, i, load(w_n, acc, i));
        if (a->ZERO_G) store(g_n, acc, i, 0);
    }
}

/* The same on copies of the state, an element at a time. */
void hs_ref_adamw_copy(const hs_adamw_copy_args *a) {
    const size_t size = acc_of(a->dtype) == HS_F64 ? 8 : 4, copied = a->dtype == HS_BF16 ? 2 : size;
    for (int64_t i = 0; i < a->n; i++) {
        double w, m, v;
        memcpy(&w, (const char *)a->w + (size_t)i * size, size);
        memcpy(&m, (const char *)a->m + (size_t)i * size, size);
        memcpy(&v, (const char *)a->v + (size_t)i * size, size);
        hs_ref_adamw(&(hs_adamw_args){.w = &w,
                                      .m = &m,
                                      .v = &v,
                                      .g = (char *)a->g + (size_t)i * size,
                                      .wc = (char *)a->wc + (size_t)i * copied,
                                      .ctl = a->ctl,
                                      .n = 1,
                                      .beta1 = a->beta1,
                                      .beta2 = a->beta2,
                                      .eps = a->eps,
                                      .decay = a->decay,
                                      .dtype = a->dtype});
    }
}

void hs_ref_zero(const hs_zero_args *a) {
    memset(a->dst, 0, (size_t)a->bytes);
}

void hs_ref_cast(const hs_cast_args *a) {
    for (int64_t i = 0; i < a->n; i++)
        store(a->dst, a->dtype, i, load(a->src, acc_of(a->dtype), i));
}
