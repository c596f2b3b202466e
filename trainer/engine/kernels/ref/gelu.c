#include "kernels/gelu.h"

#include "kernels/ref/ref_internal.h"

hs_status hs_ref_gelu_fwd(hs_kernel_ctx *ctx, const hs_args *a) {
    (void)ctx;
    for (int64_t i = 0; i < a->dim[0]; i++) {
        double x = load(a->ptr[1], a->dtype, i);
        double th = hs_tanh(HS_GELU_A * (x + HS_GELU_B * x * x * x));
        store(a->ptr[0], a->dtype, i, 0.5 * x * (1 + th));
    }
    return HS_OK;
}

hs_status hs_ref_gelu_igrad(hs_kernel_ctx *ctx, const hs_args *a) {
    (void)ctx;
    for (int64_t i = 0; i < a->dim[0]; i++) {
        double dy = load(a->ptr[1], a->dtype, i), x = load(a->ptr[2], a->dtype, i);
        double th = hs_tanh(HS_GELU_A * (x + HS_GELU_B * x * x * x));
        double inner = HS_GELU_A * (1 + 3 * HS_GELU_B * x * x);
        store(a->ptr[0], a->dtype, i, dy * (0.5 * (1 + th) + 0.5 * x * (1 - th * th) * inner));
    }
    return HS_OK;
}
