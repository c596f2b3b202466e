#include "kernels/linear8.h"

#include "kernels/ref/ref_internal.h"

/* Row i of a times row j of b, rows of n codes. */
static double products(const void *a, int a_e5m2, int64_t i, const void *b, int64_t j, int64_t n) {
    const uint8_t *p = (const uint8_t *)a + i * n, *q = (const uint8_t *)b + j * n;
    double sum = 0;
    for (int64_t k = 0; k < n; k++) sum += fp8_value(p[k], a_e5m2) * fp8_value(q[k], 0);
    return sum;
}

void hs_ref_linear8_fwd(const hs_linear8_fwd_args *a) {
    const uint32_t dt = a->dtype, acc = acc_of(dt);
    const double scale = load(a->xs, acc, 0) * load(a->ws, acc, 0);
    for (int64_t r = 0; r < a->R; r++)
        for (int64_t n = 0; n < a->N; n++) {
            double y = products(a->x8, 0, r, a->w8, n, a->K) * scale;
            if (a->b) y += load(a->b, acc, n);
            if (a->res) y += load(a->res, dt, r * a->ldres + n);
            store(a->y, dt, r * a->ldy + n, y);
        }
}

void hs_ref_linear8_igrad(const hs_linear8_igrad_args *a) {
    const uint32_t dt = a->dtype, acc = acc_of(dt);
    const double scale = load(a->dys, acc, 0) * load(a->ws, acc, 0);
    for (int64_t r = 0; r < a->R; r++)
        for (int64_t k = 0; k < a->K; k++) {
            double dx = products(a->dy8, 1, r, a->w8t, k, a->N) * scale;
            if (a->ACCUM) dx += load(a->dx, dt, r * a->lddx + k);
            store(a->dx, dt, r * a->lddx + k, dx);
        }
}

void hs_ref_linear8_wgrad(const hs_linear8_wgrad_args *a) {
    const uint32_t dt = a->dtype, acc = acc_of(dt);
    const double scale = load(a->dys, acc, 0) * load(a->xs, acc, 0);
    for (int64_t n = 0; n < a->N; n++) {
        for (int64_t k = 0; k < a->K; k++)
            add_to(a->dw, acc, n * a->K + k, products(a->dy8t, 1, n, a->x8t, k, a->R) * scale);
        if (!a->db) continue;
        double db = load(a->db, acc, n);
        for (int64_t r = 0; r < a->R; r++) db += load(a->dy, dt, r * a->lddy + n);
        store(a->db, acc, n, db);
    }
}
