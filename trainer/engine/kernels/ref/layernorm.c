#include "kernels/layernorm.h"

#include "kernels/ref/ref_internal.h"

hs_status hs_ref_layernorm_fwd(hs_kernel_ctx *ctx, const hs_args *a) {
    (void)ctx;
    const int64_t R = a->dim[0], C = a->dim[1];
    const uint32_t dt = a->dtype, acc = acc_of(dt);
    void *y_rc = a->ptr[0], *mean_r = a->ptr[1], *rstd_r = a->ptr[2];
    const void *x_rc = a->ptr[3], *w_c = a->ptr[4], *b_c = a->ptr[5];
    for (int64_t r = 0; r < R; r++) {
        double sum = 0, squares = 0;
        for (int64_t c = 0; c < C; c++) sum += load(x_rc, dt, r * C + c);
        store(mean_r, acc, r, sum / (double)C);
        double mean = load(mean_r, acc, r);
        for (int64_t c = 0; c < C; c++) {
            double d = load(x_rc, dt, r * C + c) - mean;
            squares += d * d;
        }
        store(rstd_r, acc, r, 1 / sqrt(squares / (double)C + a->real[0]));
        double rstd = load(rstd_r, acc, r);
        for (int64_t c = 0; c < C; c++) {
            double h = (load(x_rc, dt, r * C + c) - mean) * rstd;
            store(y_rc, dt, r * C + c, h * load(w_c, acc, c) + load(b_c, acc, c));
        }
    }
    return HS_OK;
}

hs_status hs_ref_layernorm_igrad(hs_kernel_ctx *ctx, const hs_args *a) {
    (void)ctx;
    const int64_t R = a->dim[0], C = a->dim[1], accum = a->dim[2];
    const uint32_t dt = a->dtype, acc = acc_of(dt);
    void *dx_rc = a->ptr[0];
    const void *dy_rc = a->ptr[1], *x_rc = a->ptr[2], *w_c = a->ptr[3];
    for (int64_t r = 0; r < R; r++) {
        const double mean = load(a->ptr[4], acc, r), rstd = load(a->ptr[5], acc, r);
        double sum_g = 0, sum_gh = 0;
        for (int64_t c = 0; c < C; c++) {
            double g = load(dy_rc, dt, r * C + c) * load(w_c, acc, c);
            sum_g += g;
            sum_gh += g * (load(x_rc, dt, r * C + c) - mean) * rstd;
        }
        for (int64_t c = 0; c < C; c++) {
            double g = load(dy_rc, dt, r * C + c) * load(w_c, acc, c);
            double h = (load(x_rc, dt, r * C + c) - mean) * rstd;
            double dx = rstd * (g - sum_g / (double)C - h * sum_gh / (double)C);
            store(dx_rc, dt, r * C + c, dx + (accum ? load(dx_rc, dt, r * C + c) : 0));
        }
    }
    return HS_OK;
}

hs_status hs_ref_layernorm_wgrad(hs_kernel_ctx *ctx, const hs_args *a) {
    (void)ctx;
    const int64_t R = a->dim[0], C = a->dim[1];
    const uint32_t dt = a->dtype, acc = acc_of(dt);
    const void *dy_rc = a->ptr[2], *x_rc = a->ptr[3], *mean_r = a->ptr[4], *rstd_r = a->ptr[5];
    for (int64_t c = 0; c < C; c++) {
        double dw = load(a->ptr[0], acc, c), db = load(a->ptr[1], acc, c);
        for (int64_t r = 0; r < R; r++) {
            double dy = load(dy_rc, dt, r * C + c);
            dw += dy * (load(x_rc, dt, r * C + c) - load(mean_r, acc, r)) * load(rstd_r, acc, r);
            db += dy;
        }
        store(a->ptr[0], acc, c, dw);
        store(a->ptr[1], acc, c, db);
    }
    return HS_OK;
}
