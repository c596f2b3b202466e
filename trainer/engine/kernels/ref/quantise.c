#include "kernels/quantise.h"

#include "kernels/ref/ref_internal.h"

void hs_ref_quantise(const hs_quantise_args *a) {
    const int64_t R = a->R, C = a->C;
    const int e5m2 = a->E5M2 != 0;
    uint8_t *q_rc = a->q, *qt_cr = a->qt;
    double most = 0, scale = 1;
    for (int64_t i = 0; i < R * C; i++) {
        const double x = fabs(load(a->x, a->dtype, i / C * a->ldx + i % C));
        most = x - x == 0 ? (x > most ? x : most) : NAN;
        if (most != most) break;
    }
    if (most != most) {
        scale = NAN;
    } else if (most > 0) {
        int e;
        const double half = frexp(most, &e); /* most = half 2^e, 1/2 <= half < 1 */
        e += (half > 0.875 ? 0 : -1) - (e5m2 ? 15 : 8);
        scale = ldexp(1, e < -100 ? -100 : e);
    }
    store(a->s, acc_of(a->dtype), 0, scale);
    for (int64_t r = 0; r < R; r++)
        for (int64_t c = 0; c < C; c++) {
            const uint8_t code = fp8_of(load(a->x, a->dtype, r * a->ldx + c) / scale, e5m2);
            q_rc[r * C + c] = code;
            if (qt_cr) qt_cr[c * R + r] = code;
        }
}
