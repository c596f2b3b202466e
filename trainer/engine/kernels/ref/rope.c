#include "kernels/rope.h"

#include "kernels/ref/ref_internal.h"

void hs_ref_rope_table(const hs_rope_table_args *a) {
    const int64_t T = a->T, D = a->D;
    const uint32_t acc = acc_of(a->dtype);
    for (int64_t t = 0; t < T; t++)
        for (int64_t i = 0; i < D / 2; i++) {
            double angle = (double)t / hs_pow(a->base, (double)(2 * i) / (double)D);
            store(a->tab, acc, (t * (D / 2) + i) * 2, hs_cos(angle));
            store(a->tab, acc, (t * (D / 2) + i) * 2 + 1, hs_sin(angle));
        }
}

/* Turns the pairs by the table's angles times sign. */
static void turn(const hs_rope_fwd_args *a, double sign) {
    const int64_t R = a->R, T = a->T, N = a->N, D = a->D, ldx = a->ldx;
    const uint32_t dt = a->dtype, acc = acc_of(dt);
    for (int64_t r = 0; r < R; r++) {
        const int64_t t = r % T - hs_first_of(a->first, r, r % T);
        for (int64_t n = 0; n < N; n++)
            for (int64_t i = 0; i < D / 2; i++) {
                const int64_t at_tab = (t * (D / 2) + i) * 2, at = r * ldx + n * D + i;
                double c = load(a->tab, acc, at_tab), s = sign * load(a->tab, acc, at_tab + 1);
                double x = load(a->x, dt, at), y = load(a->x, dt, at + D / 2);
                store(a->x, dt, at, x * c - y * s);
                store(a->x, dt, at + D / 2, y * c + x * s);
            }
    }
}

void hs_ref_rope_fwd(const hs_rope_fwd_args *a) {
    turn(a, 1);
}

void hs_ref_rope_igrad(const hs_rope_igrad_args *a) {
    const hs_rope_fwd_args same = {.x = a->x,
                                   .tab = a->tab,
                                   .first = a->first,
                                   .R = a->R,
                                   .T = a->T,
                                   .N = a->N,
                                   .D = a->D,
                                   .ldx = a->ldx,
                                   .dtype = a->dtype};
    turn(&same, -1);
}
