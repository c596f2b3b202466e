#include "kernels/linear.h"

#include "kernels/ref/ref_internal.h"

void hs_ref_linear_fwd(const hs_linear_fwd_args *a) {
    const int64_t R = a->R, N = a->N, K = a->K;
    const int64_t ldy = a->ldy, ldx = a->ldx, ldres = a->ldres;
    const uint32_t dt = a->dtype, acc = acc_of(dt);
    const void *x_rk = a->x, *w_nk = a->w, *b_n = a->b, *res_rn = a->res;
    for (int64_t r = 0; r < R; r++)
        for (int64_t n = 0; n < N; n++) {
            double y = 0;
            for (int64_t k = 0; k < K; k++)
                y += load(x_rk, dt, r * ldx + k) * load(w_nk, dt, n * K + k);
            if (b_n) y += load(b_n, acc, n);
            if (res_rn) y += load(res_rn, dt, r * ldres + n);
            store(a->y, dt, r * ldy + n, y);
        }
}

void hs_ref_linear_igrad(const hs_linear_igrad_args *a) {
    const int64_t R = a->R, N = a->N, K = a->K;
    const int64_t lddx = a->lddx, lddy = a->lddy, accum = a->ACCUM;
    const uint32_t dt = a->dtype;
    void *dx_rk = a->dx;
    const void *dy_rn = a->dy, *w_nk = a->w;
    for (int64_t r = 0; r < R; r++)
        for (int64_t k = 0; k < K; k++) {
            double dx = 0;
            for (int64_t n = 0; n < N; n++)
                dx += load(dy_rn, dt, r * lddy + n) * load(w_nk, dt, n * K + k);
            if (accum) dx += load(dx_rk, dt, r * lddx + k);
            store(dx_rk, dt, r * lddx + k, dx);
        }
}

void hs_ref_linear_wgrad(const hs_linear_wgrad_args *a) {
    const int64_t R = a->R, N = a->N, K = a->K, lddy = a->lddy, ldx = a->ldx;
    const uint32_t dt = a->dtype, acc = acc_of(dt);
    void *dw_nk = a->dw, *db_n = a->db;
    const void *dy_rn = a->dy, *x_rk = a->x;
    for (int64_t n = 0; n < N; n++) {
        for (int64_t k = 0; k < K; k++) {
            double dw = a->ACCUM ? load(dw_nk, acc, n * K + k) : 0;
            for (int64_t r = 0; r < R; r++)
                dw += load(dy_rn, dt, r * lddy + n) * load(x_rk, dt, r * ldx + k);
            store(dw_nk, acc, n * K + k, dw);
        }
        if (!db_n) continue;
        double db = load(db_n, acc, n);
        for (int64_t r = 0; r < R; r++) db += load(dy_rn, dt, r * lddy + n);
        store(db_n, acc, n, db);
    }
}
