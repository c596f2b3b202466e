#include "kernels/linear.h"

#include "kernels/ref/ref_internal.h"

hs_status hs_ref_linear_fwd(hs_kernel_ctx *ctx, const hs_args *a) {
    (void)ctx;
    const int64_t R = a->dim[0], N = a->dim[1], K = a->dim[2];
    const int64_t ldy = a->dim[3], ldx = a->dim[4], ldres = a->dim[5];
    const uint32_t dt = a->dtype, acc = acc_of(dt);
    const void *x_rk = a->ptr[1], *w_nk = a->ptr[2], *b_n = a->ptr[3], *res_rn = a->ptr[4];
    for (int64_t r = 0; r < R; r++)
        for (int64_t n = 0; n < N; n++) {
            double y = 0;
            for (int64_t k = 0; k < K; k++)
                y += load(x_rk, dt, r * ldx + k) * load(w_nk, dt, n * K + k);
            if (b_n) y += load(b_n, acc, n);
            if (res_rn) y += load(res_rn, dt, r * ldres + n);
            store(a->ptr[0], dt, r * ldy + n, y);
        }
    return HS_OK;
}

hs_status hs_ref_linear_igrad(hs_kernel_ctx *ctx, const hs_args *a) {
    (void)ctx;
    const int64_t R = a->dim[0], N = a->dim[1], K = a->dim[2];
    const int64_t lddx = a->dim[3], lddy = a->dim[4], accum = a->dim[5];
    const uint32_t dt = a->dtype;
    void *dx_rk = a->ptr[0];
    const void *dy_rn = a->ptr[1], *w_nk = a->ptr[2];
    for (int64_t r = 0; r < R; r++)
        for (int64_t k = 0; k < K; k++) {
            double dx = 0;
            for (int64_t n = 0; n < N; n++)
                dx += load(dy_rn, dt, r * lddy + n) * load(w_nk, dt, n * K + k);
            if (accum) dx += load(dx_rk, dt, r * lddx + k);
            store(dx_rk, dt, r * lddx + k, dx);
        }
    return HS_OK;
}

hs_status hs_ref_linear_wgrad(hs_kernel_ctx *ctx, const hs_args *a) {
    (void)ctx;
    const int64_t R = a->dim[0], N = a->dim[1], K = a->dim[2], lddy = a->dim[3], ldx = a->dim[4];
    const uint32_t dt = a->dtype, acc = acc_of(dt);
    void *dw_nk = a->ptr[0], *db_n = a->ptr[1];
    const void *dy_rn = a->ptr[2], *x_rk = a->ptr[3];
    for (int64_t n = 0; n < N; n++) {
        for (int64_t k = 0; k < K; k++) {
            double dw = load(dw_nk, acc, n * K + k);
            for (int64_t r = 0; r < R; r++)
                dw += load(dy_rn, dt, r * lddy + n) * load(x_rk, dt, r * ldx + k);
            store(dw_nk, acc, n * K + k, dw);
        }
        if (!db_n) continue;
        double db = load(db_n, acc, n);
        for (int64_t r = 0; r < R; r++) db += load(dy_rn, dt, r * lddy + n);
        store(db_n, acc, n, db);
    }
    return HS_OK;
}
