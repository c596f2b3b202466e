#include "kernels/swiglu.h"

#include "kernels/ref/ref_internal.h"

hs_status hs_ref_swiglu_fwd(hs_kernel_ctx *ctx, const hs_args *a) {
    (void)ctx;
    const int64_t R = a->dim[0], F = a->dim[1];
    for (int64_t r = 0; r < R; r++)
        for (int64_t f = 0; f < F; f++) {
            double gate = load(a->ptr[1], a->dtype, r * 2 * F + f);
            double up = load(a->ptr[1], a->dtype, r * 2 * F + F + f);
            store(a->ptr[0], a->dtype, r * F + f, gate / (1 + hs_exp(-gate)) * up);
        }
    return HS_OK;
}

hs_status hs_ref_swiglu_igrad(hs_kernel_ctx *ctx, const hs_args *a) {
    (void)ctx;
    const int64_t R = a->dim[0], F = a->dim[1];
    for (int64_t r = 0; r < R; r++)
        for (int64_t f = 0; f < F; f++) {
            double dy = load(a->ptr[1], a->dtype, r * F + f);
            double gate = load(a->ptr[2], a->dtype, r * 2 * F + f);
            double up = load(a->ptr[2], a->dtype, r * 2 * F + F + f);
            double sigmoid = 1 / (1 + hs_exp(-gate));
            store(a->ptr[0], a->dtype, r * 2 * F + f,
                  dy * up * sigmoid * (1 + gate * (1 - sigmoid)));
            store(a->ptr[0], a->dtype, r * 2 * F + F + f, dy * gate * sigmoid);
        }
    return HS_OK;
}
