#include "kernels/rope.h"

#include "kernels/ref/ref_internal.h"

hs_status hs_ref_rope_table(hs_kernel_ctx *ctx, const hs_args *a) {
    (void)ctx;
    const int64_t T = a->dim[0], D = a->dim[1];
    const uint32_t acc = acc_of(a->dtype);
    for (int64_t t = 0; t < T; t++)
        for (int64_t i = 0; i < D / 2; i++) {
            double angle = (double)t / hs_pow(a->real[0], (double)(2 * i) / (double)D);
            store(a->ptr[0], acc, (t * (D / 2) + i) * 2, hs_cos(angle));
            store(a->ptr[0], acc, (t * (D / 2) + i) * 2 + 1, hs_sin(angle));
        }
    return HS_OK;
}

/* Turns the pairs by the table's angles times sign. */
static void turn(const hs_args *a, double sign) {
    const int64_t R = a->dim[0], T = a->dim[1], N = a->dim[2], D = a->dim[3], ldx = a->dim[4];
    const uint32_t dt = a->dtype, acc = acc_of(dt);
    for (int64_t r = 0; r < R; r++)
        for (int64_t n = 0; n < N; n++)
            for (int64_t i = 0; i < D / 2; i++) {
                const int64_t at_tab = (r % T * (D / 2) + i) * 2, at = r * ldx + n * D + i;
                double c = load(a->ptr[1], acc, at_tab),
                       s = sign * load(a->ptr[1], acc, at_tab + 1);
                double x = load(a->ptr[0], dt, at), y = load(a->ptr[0], dt, at + D / 2);
                store(a->ptr[0], dt, at, x * c - y * s);
                store(a->ptr[0], dt, at + D / 2, y * c + x * s);
            }
}

hs_status hs_ref_rope_fwd(hs_kernel_ctx *ctx, const hs_args *a) {
    (void)ctx;
    turn(a, 1);
    return HS_OK;
}

hs_status hs_ref_rope_igrad(hs_kernel_ctx *ctx, const hs_args *a) {
    (void)ctx;
    turn(a, -1);
    return HS_OK;
}
