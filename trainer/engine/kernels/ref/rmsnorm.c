#include "kernels/rmsnorm.h"

#include "kernels/ref/ref_internal.h"

void hs_ref_rmsnorm_fwd(const hs_rmsnorm_fwd_args *a) {
    const int64_t R = a->R, N = a->N, C = a->C, ldx = a->ldx, ldy = a->ldy;
    const uint32_t dt = a->dtype, acc = acc_of(dt);
    void *y = a->y, *rstd_rn = a->rstd;
    const void *x = a->x, *w_c = a->w;
    for (int64_t r = 0; r < R; r++)
        for (int64_t n = 0; n < N; n++) {
            double squares = 0;
            for (int64_t c = 0; c < C; c++) {
                double v = load(x, dt, r * ldx + n * C + c);
                squares += v * v;
            }
            store(rstd_rn, acc, r * N + n, 1 / sqrt(squares / (double)C + a->eps));
            double rstd = load(rstd_rn, acc, r * N + n);
            for (int64_t c = 0; c < C; c++)
                store(y, dt, r * ldy + n * C + c,
                      load(x, dt, r * ldx + n * C + c) * rstd * load(w_c, acc, c));
        }
}

void hs_ref_rmsnorm_igrad(const hs_rmsnorm_igrad_args *a) {
    const int64_t R = a->R, N = a->N, C = a->C;
    const int64_t lddx = a->lddx, lddy = a->lddy, ldx = a->ldx, accum = a->ACCUM;
    const uint32_t dt = a->dtype, acc = acc_of(dt);
    void *dx = a->dx;
    const void *dy = a->dy, *x = a->x, *w_c = a->w, *rstd_rn = a->rstd;
    const void *from = a->old ? a->old : a->dx;
    for (int64_t r = 0; r < R; r++)
        for (int64_t n = 0; n < N; n++) {
            const double rstd = load(rstd_rn, acc, r * N + n);
            double sum_gh = 0;
            for (int64_t c = 0; c < C; c++)
                sum_gh += load(dy, dt, r * lddy + n * C + c) * load(w_c, acc, c) *
                          load(x, dt, r * ldx + n * C + c) * rstd;
            for (int64_t c = 0; c < C; c++) {
                double g = load(dy, dt, r * lddy + n * C + c) * load(w_c, acc, c);
                double h = load(x, dt, r * ldx + n * C + c) * rstd;
                int64_t at = r * lddx + n * C + c;
                double old = accum ? load(from, dt, at) : 0;
                store(dx, dt, at, rstd * (g - h * sum_gh / (double)C) + old);
            }
        }
}

void hs_ref_rmsnorm_wgrad(const hs_rmsnorm_wgrad_args *a) {
    const int64_t R = a->R, N = a->N, C = a->C, lddy = a->lddy, ldx = a->ldx;
    const uint32_t dt = a->dtype, acc = acc_of(dt);
    const void *dy = a->dy, *x = a->x, *rstd_rn = a->rstd;
    for (int64_t c = 0; c < C; c++) {
        double dw = load(a->dw, acc, c);
        for (int64_t r = 0; r < R; r++)
            for (int64_t n = 0; n < N; n++)
                dw += load(dy, dt, r * lddy + n * C + c) * load(x, dt, r * ldx + n * C + c) *
                      load(rstd_rn, acc, r * N + n);
        store(a->dw, acc, c, dw);
    }
}
