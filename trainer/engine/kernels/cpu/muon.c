/* Muon but for its products, which are linear layers'; see muon.h for the exact steps. */
#include "kernels/muon.h"

#include "kernels/cpu/share.h"
#include "kernels/cpu/vec.h"
#include "wire/plan.h"

/* momentum m + g clip: what m becomes. */
VINLINE vf muon_moment(vf momentum, vf m, vf clipped) {
    return v_fma(momentum, m, clipped);
}

static void muon_momentum_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const hs_muon_momentum_args *a = ctx;
    const hs_step_control *control = a->ctl;
    const vf clip = v_set1(control->clip_scale), momentum = v_set1((float)a->momentum);
    const float *m = a->m, *g = a->g;
    float *u = a->u;
    (void)worker;
    begin *= SHARE_FLAT, end = hs_min(end * SHARE_FLAT, a->n);
    for (int64_t i = begin; i < end; i += LANES) {
        int64_t left = end - i;
        vf gg = v_mul(v_load_n(g + i, left), clip);
        vf mm = muon_moment(momentum, v_load_n(m + i, left), gg);
        v_store_n(u + i, v_fma(momentum, mm, gg), left);
    }
}

static void muon_momentum_op(hs_kernel_ctx *ctx, hs_muon_momentum_args *a) {
    share_flat(ctx, a->n, muon_momentum_range, a);
}

static void muon_scale_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const hs_muon_scale_args *a = ctx;
    const vf s = v_set1((float)(1.0 / (sqrt(*(const double *)a->sumsq) + a->eps)));
    float *x = a->x;
    (void)worker;
    begin *= SHARE_FLAT, end = hs_min(end * SHARE_FLAT, a->n);
    for (int64_t i = begin; i < end; i += LANES) {
        int64_t left = end - i;
        v_store_n(x + i, v_mul(v_load_n(x + i, left), s), left);
    }
}

static void muon_scale_op(hs_kernel_ctx *ctx, hs_muon_scale_args *a) {
    share_flat(ctx, a->n, muon_scale_range, a);
}

static void muon_poly_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const hs_muon_poly_args *a = ctx;
    const vf b = v_set1((float)a->b), c = v_set1((float)a->c);
    (void)worker;
    for (int64_t row = begin; row < end; row++) {
        float *q = (float *)a->q + row * a->S;
        const float *p = (const float *)a->p + row * a->S;
        for (int64_t i = 0; i < a->S; i += LANES) {
            int64_t left = a->S - i;
            v_store_n(q + i, v_fma(b, v_load_n(p + i, left), v_mul(c, v_load_n(q + i, left))),
                      left);
        }
        q[row] = q[row] + (float)a->a;
    }
}

static void muon_poly_op(hs_kernel_ctx *ctx, hs_muon_poly_args *a) {
    share_rows(ctx, a->S, a->S, muon_poly_range, a);
}

typedef struct muon_job {
    const hs_step_control *control;
    float *w, *m, *g;
    const float *o;
    void *wc;
    int64_t n;
    uint32_t dtype;
    bool copy_only;
    float momentum, scale, decay;
} muon_job;

VINLINE void muon_flat(const muon_job *j, int64_t begin, int64_t end, int dt) {
    const hs_step_control *control = j->control;
    const vf shrink = v_set1(control->lr_decay * j->decay);
    const vf step = v_set1(control->lr_decay * j->scale);
    const vf clip = v_set1(control->clip_scale), momentum = v_set1(j->momentum);
    for (int64_t i = begin; i < end; i += LANES) {
        int64_t left = end - i;
        vf w = v_load_n(j->w + i, left);
        w = v_fnma(shrink, w, w);
        w = v_fnma(step, v_load_n(j->o + i, left), w);
        if (j->wc) v_store_dt_n(j->wc, i, w, left, dt);
        if (j->copy_only) continue;
        vf g = v_mul(v_load_n(j->g + i, left), clip);
        v_store_n(j->w + i, w, left);
        v_store_n(j->m + i, muon_moment(momentum, v_load_n(j->m + i, left), g), left);
        v_store_n(j->g + i, v_zero(), left);
    }
}

static void muon_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const muon_job *j = ctx;
    (void)worker;
    begin *= SHARE_FLAT, end = hs_min(end * SHARE_FLAT, j->n);
    BY_DTYPE(j->dtype, muon_flat, j, begin, end);
}

static void muon_op(hs_kernel_ctx *ctx, hs_muon_args *a) {
    muon_job j = {.control = a->ctl,
                  .w = a->w,
                  .m = a->m,
                  .g = a->g,
                  .o = a->o,
                  .wc = a->wc,
                  .n = a->n,
                  .dtype = a->dtype,
                  .momentum = (float)a->momentum,
                  .scale = (float)a->scale,
                  .decay = (float)a->decay};
    share_flat(ctx, a->n, muon_range, &j);
}

static void muon_copy_op(hs_kernel_ctx *ctx, hs_muon_copy_args *a) {
    muon_job j = {.control = a->ctl,
                  .w = a->w,
                  .o = a->o,
                  .wc = a->wc,
                  .n = a->n,
                  .dtype = a->dtype,
                  .copy_only = true,
                  .scale = (float)a->scale,
                  .decay = (float)a->decay};
    share_flat(ctx, a->n, muon_range, &j);
}
