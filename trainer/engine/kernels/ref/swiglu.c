#include "kernels/swiglu.h"

#include "kernels/ref/ref_internal.h"

void hs_ref_swiglu_fwd(const hs_swiglu_fwd_args *a) {
    const int64_t R = a->R, F = a->F;
    for (int64_t r = 0; r < R; r++)
        for (int64_t f = 0; f < F; f++) {
            double gate = load(a->gu, a->dtype, r * 2 * F + f);
            double up = load(a->gu, a->dtype, r * 2 * F + F + f);
            store(a->y, a->dtype, r * F + f, gate / (1 + hs_exp(-gate)) * up);
        }
}

void hs_ref_swiglu_igrad(const hs_swiglu_igrad_args *a) {
    const int64_t R = a->R, F = a->F;
    for (int64_t r = 0; r < R; r++)
        for (int64_t f = 0; f < F; f++) {
            double dy = load(a->dy, a->dtype, r * F + f);
            double gate = load(a->gu, a->dtype, r * 2 * F + f);
            double up = load(a->gu, a->dtype, r * 2 * F + F + f);
            double sigmoid = 1 / (1 + hs_exp(-gate));
            store(a->dgu, a->dtype, r * 2 * F + f, dy * up * sigmoid * (1 + gate * (1 - sigmoid)));
            store(a->dgu, a->dtype, r * 2 * F + F + f, dy * gate * sigmoid);
        }
}
