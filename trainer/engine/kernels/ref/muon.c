#include "kernels/muon.h"

#include "kernels/ref/ref_internal.h"
#include "wire/plan.h"

void hs_ref_muon_momentum(const hs_muon_momentum_args *a) {
    const uint32_t acc = acc_of(a->dtype);
    const hs_step_control *ctl = a->ctl;
    for (int64_t i = 0; i < a->n; i++) {
        const double g = load(a->g, acc, i) * (double)ctl->clip_scale;
        store(a->u, acc, i, g + a->momentum * (a->momentum * load(a->m, acc, i) + g));
    }
}

void hs_ref_muon_scale(const hs_muon_scale_args *a) {
    const uint32_t acc = acc_of(a->dtype);
    const double s = 1.0 / (sqrt(*(const double *)a->sumsq) + a->eps);
    for (int64_t i = 0; i < a->n; i++) store(a->x, acc, i, load(a->x, acc, i) * s);
}

void hs_ref_muon_poly(const hs_muon_poly_args *a) {
    const uint32_t acc = acc_of(a->dtype);
    for (int64_t i = 0; i < a->S * a->S; i++) {
        const double q = a->b * load(a->p, acc, i) + a->c * load(a->q, acc, i);
        store(a->q, acc, i, i / a->S == i % a->S ? q + a->a : q);
    }
}

/* Of a weight, by what is made of its momentum. */
static double stepped(double w, double o, const hs_step_control *ctl, double scale, double decay) {
    w -= (double)ctl->lr_decay * decay * w;
    return w - (double)ctl->lr_decay * scale * o;
}

void hs_ref_muon(const hs_muon_args *a) {
    const uint32_t acc = acc_of(a->dtype);
    const hs_step_control *ctl = a->ctl;
    for (int64_t i = 0; i < a->n; i++) {
        const double g = load(a->g, acc, i) * (double)ctl->clip_scale;
        store(a->m, acc, i, a->momentum * load(a->m, acc, i) + g);
        store(a->w, acc, i,
              stepped(load(a->w, acc, i), load(a->o, acc, i), ctl, a->scale, a->decay));
        if (a->wc) store(a->wc, a->dtype, i, load(a->w, acc, i));
        store(a->g, acc, i, 0);
    }
}

void hs_ref_muon_copy(const hs_muon_copy_args *a) {
    const uint32_t acc = acc_of(a->dtype);
    for (int64_t i = 0; i < a->n; i++) {
        double w = stepped(load(a->w, acc, i), load(a->o, acc, i), a->ctl, a->scale, a->decay);
        if (acc == HS_F32) w = (double)(float)w;
        store(a->wc, a->dtype, i, w);
    }
}
