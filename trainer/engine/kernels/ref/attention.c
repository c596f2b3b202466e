#include "kernels/attention.h"

#include "kernels/ref/ref_internal.h"

/* Dot product of n elements at two places. */
static double dot(const void *x, int64_t at_x, const void *y, int64_t at_y, int64_t n,
                  uint32_t dt) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += load(x, dt, at_x + i) * load(y, dt, at_y + i);
    return sum;
}

/* sum[i] += factor * x[at + i] */
static void add_scaled(double *sum, double factor, const void *x, int64_t at, int64_t n,
                       uint32_t dt) {
    for (int64_t i = 0; i < n; i++) sum[i] += factor * load(x, dt, at + i);
}

static void store_row(void *y, int64_t at, const double *row, int64_t n, uint32_t dt) {
    for (int64_t i = 0; i < n; i++) store(y, dt, at + i, row[i]);
}

void hs_ref_attention_fwd(const hs_attention_fwd_args *a) {
    const int64_t B = a->B, T = a->T, H = a->H, G = a->G, D = a->D;
    const int64_t ldo = a->ldy, ldq = a->ldq, ldk = a->ldk, ldv = a->ldv;
    const uint32_t dt = a->dtype, acc = acc_of(dt);
    const double scale = a->scale;
    const int32_t *first = a->first;
    void *o = a->y, *lse_bht = a->lse;
    const void *q = a->q, *k = a->k, *v = a->v;
    for (int64_t b = 0; b < B; b++)
        for (int64_t h = 0; h < H; h++)
            for (int64_t t = 0; t < T; t++) {
                const int64_t row = b * T, kv = h / (H / G) * D;
                const int64_t at_q = (row + t) * ldq + h * D;
                const int64_t low = hs_first_read(first, row + t, t, a->WINDOW);
                double max = -INFINITY, sum = 0, out[HS_ATTENTION_HEAD_MAX] = {0};
                for (int64_t u = low; u <= t; u++) {
                    double s = scale * dot(q, at_q, k, (row + u) * ldk + kv, D, dt);
                    max = s > max || s != s ? s : max;
                }
                for (int64_t u = low; u <= t; u++) {
                    double s = scale * dot(q, at_q, k, (row + u) * ldk + kv, D, dt);
                    double p = hs_exp(s - max);
                    sum += p;
                    add_scaled(out, p, v, (row + u) * ldv + kv, D, dt);
                }
                for (int64_t i = 0; i < D; i++) out[i] /= sum;
                store_row(o, (row + t) * ldo + h * D, out, D, dt);
                store(lse_bht, acc, (b * H + h) * T + t, max + hs_log(sum));
            }
}

void hs_ref_attention_igrad(const hs_attention_igrad_args *a) {
    const int64_t B = a->B, T = a->T, H = a->H, G = a->G, D = a->D;
    const int64_t lddq = a->lddq, lddk = a->lddk, lddv = a->lddv, lddo = a->lddy;
    const int64_t ldo = a->ldy, ldq = a->ldq, ldk = a->ldk, ldv = a->ldv;
    const uint32_t dt = a->dtype, acc = acc_of(dt);
    const double scale = a->scale;
    const int32_t *first = a->first;
    const void *d_o = a->dy, *o = a->y, *q = a->q, *k = a->k, *v = a->v;
    const void *lse_bht = a->lse;
    void *delta_bht = a->delta;

    for (int64_t b = 0; b < B; b++)
        for (int64_t h = 0; h < H; h++)
            for (int64_t t = 0; t < T; t++) { /* delta and dq */
                const int64_t row = b * T, kv = h / (H / G) * D, i = (b * H + h) * T + t;
                const int64_t at_do = (row + t) * lddo + h * D;
                store(delta_bht, acc, i, dot(d_o, at_do, o, (row + t) * ldo + h * D, D, dt));
                double dq[HS_ATTENTION_HEAD_MAX] = {0};
                for (int64_t u = hs_first_read(first, row + t, t, a->WINDOW); u <= t; u++) {
                    const int64_t at_k = (row + u) * ldk + kv;
                    double s = scale * dot(q, (row + t) * ldq + h * D, k, at_k, D, dt);
                    double p = hs_exp(s - load(lse_bht, acc, i));
                    double dp = dot(d_o, at_do, v, (row + u) * ldv + kv, D, dt);
                    add_scaled(dq, scale * p * (dp - load(delta_bht, acc, i)), k, at_k, D, dt);
                }
                store_row(a->dq, (row + t) * lddq + h * D, dq, D, dt);
            }

    for (int64_t b = 0; b < B; b++)
        for (int64_t g = 0; g < G; g++)
            for (int64_t u = 0; u < T; u++) { /* dk and dv */
                const int64_t row = b * T, at_k = (row + u) * ldk + g * D;
                double dk[HS_ATTENTION_HEAD_MAX] = {0}, dv[HS_ATTENTION_HEAD_MAX] = {0};
                for (int64_t h = g * (H / G); h < (g + 1) * (H / G); h++)
                    for (int64_t t = u; t < T; t++) {
                        if (hs_first_read(first, row + t, t, a->WINDOW) > u) continue;
                        const int64_t i = (b * H + h) * T + t, at_q = (row + t) * ldq + h * D;
                        const int64_t at_do = (row + t) * lddo + h * D;
                        double s = scale * dot(q, at_q, k, at_k, D, dt);
                        double p = hs_exp(s - load(lse_bht, acc, i));
                        double dp = dot(d_o, at_do, v, (row + u) * ldv + g * D, D, dt);
                        add_scaled(dk, scale * p * (dp - load(delta_bht, acc, i)), q, at_q, D, dt);
                        add_scaled(dv, p, d_o, at_do, D, dt);
                    }
                store_row(a->dk, (row + u) * lddk + g * D, dk, D, dt);
                store_row(a->dv, (row + u) * lddv + g * D, dv, D, dt);
            }
}
