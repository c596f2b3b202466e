#include "kernels/rmsnorm.h"

#include "kernels/ref/ref_internal.h"

hs_status hs_ref_rmsnorm_fwd(hs_kernel_ctx *ctx, const hs_args *a) {
    (void)ctx;
    const int64_t R = a->dim[0], N = a->dim[1], C = a->dim[2], ldx = a->dim[3], ldy = a->dim[4];
    const uint32_t dt = a->dtype, acc = acc_of(dt);
    void *y = a->ptr[0], *rstd_rn = a->ptr[1];
    const void *x = a->ptr[2], *w_c = a->ptr[3];
    for (int64_t r = 0; r < R; r++)
        for (int64_t n = 0; n < N; n++) {
            double squares = 0;
            for (int64_t c = 0; c < C; c++) {
                double v = load(x, dt, r * ldx + n * C + c);
                squares += v * v;
            }
            store(rstd_rn, acc, r * N + n, 1 / sqrt(squares / (double)C + a->real[0]));
            double rstd = load(rstd_rn, acc, r * N + n);
            for (int64_t c = 0; c < C; c++)
                store(y, dt, r * ldy + n * C + c,
                      load(x, dt, r * ldx + n * C + c) * rstd * load(w_c, acc, c));
        }
    return HS_OK;
}

hs_status hs_ref_rmsnorm_igrad(hs_kernel_ctx *ctx, const hs_args *a) {
    (void)ctx;
    const int64_t R = a->dim[0], N = a->dim[1], C = a->dim[2];
    const int64_t lddx = a->dim[3], lddy = a->dim[4], ldx = a->dim[5], accum = a->dim[6];
    const uint32_t dt = a->dtype, acc = acc_of(dt);
    void *dx = a->ptr[0];
    const void *dy = a->ptr[1], *x = a->ptr[2], *w_c = a->ptr[3], *rstd_rn = a->ptr[4];
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
                double old = accum ? load(dx, dt, at) : 0;
                store(dx, dt, at, rstd * (g - h * sum_gh / (double)C) + old);
            }
        }
    return HS_OK;
}

hs_status hs_ref_rmsnorm_wgrad(hs_kernel_ctx *ctx, const hs_args *a) {
    (void)ctx;
    const int64_t R = a->dim[0], N = a->dim[1], C = a->dim[2], lddy = a->dim[3], ldx = a->dim[4];
    const uint32_t dt = a->dtype, acc = acc_of(dt);
    const void *dy = a->ptr[1], *x = a->ptr[2], *rstd_rn = a->ptr[3];
    for (int64_t c = 0; c < C; c++) {
        double dw = load(a->ptr[0], acc, c);
        for (int64_t r = 0; r < R; r++)
            for (int64_t n = 0; n < N; n++)
                dw += load(dy, dt, r * lddy + n * C + c) * load(x, dt, r * ldx + n * C + c) *
                      load(rstd_rn, acc, r * N + n);
        store(a->ptr[0], acc, c, dw);
    }
    return HS_OK;
}
