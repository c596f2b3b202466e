#include "kernels/layernorm.h"

#include "kernels/ref/ref_internal.h"

void hs_ref_layernorm_fwd(const hs_layernorm_fwd_args *a) {
    const int64_t R = a->R, C = a->C;
    const uint32_t dt = a->dtype, acc = acc_of(dt);
    void *y_rc = a->y, *mean_r = a->mean, *rstd_r = a->rstd;
    const void *x_rc = a->x, *w_c = a->w, *b_c = a->b;
    for (int64_t r = 0; r < R; r++) {
        double sum = 0, squares = 0;
        for (int64_t c = 0; c < C; c++) sum += load(x_rc, dt, r * C + c);
        store(mean_r, acc, r, sum / (double)C);
        double mean = load(mean_r, acc, r);
        for (int64_t c = 0; c < C; c++) {
            double d = load(x_rc, dt, r * C + c) - mean;
            squares += d * d;
        }
        store(rstd_r, acc, r, 1 / sqrt(squares / (double)C + a->eps));
        double rstd = load(rstd_r, acc, r);
        for (int64_t c = 0; c < C; c++) {
            double h = (load(x_rc, dt, r * C + c) - mean) * rstd;
            store(y_rc, dt, r * C + c, h * load(w_c, acc, c) + load(b_c, acc, c));
        }
    }
}

void hs_ref_layernorm_igrad(const hs_layernorm_igrad_args *a) {
    const int64_t R = a->R, C = a->C, accum = a->ACCUM;
    const uint32_t dt = a->dtype, acc = acc_of(dt);
    void *dx_rc = a->dx;
    const void *dy_rc = a->dy, *x_rc = a->x, *w_c = a->w, *old_rc = a->old ? a->old : a->dx;
    for (int64_t r = 0; r < R; r++) {
        const double mean = load(a->mean, acc, r), rstd = load(a->rstd, acc, r);
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
            store(dx_rc, dt, r * C + c, dx + (accum ? load(old_rc, dt, r * C + c) : 0));
        }
    }
}

void hs_ref_layernorm_wgrad(const hs_layernorm_wgrad_args *a) {
    const int64_t R = a->R, C = a->C;
    const uint32_t dt = a->dtype, acc = acc_of(dt);
    const void *dy_rc = a->dy, *x_rc = a->x, *mean_r = a->mean, *rstd_r = a->rstd;
    for (int64_t c = 0; c < C; c++) {
        double dw = load(a->dw, acc, c), db = load(a->db, acc, c);
        for (int64_t r = 0; r < R; r++) {
            double dy = load(dy_rc, dt, r * C + c);
            dw += dy * (load(x_rc, dt, r * C + c) - load(mean_r, acc, r)) * load(rstd_r, acc, r);
            db += dy;
        }
        store(a->dw, acc, c, dw);
        store(a->db, acc, c, db);
    }
}
