#include "kernels/gelu.h"

#include "kernels/ref/ref_internal.h"

void hs_ref_gelu_fwd(const hs_gelu_fwd_args *a) {
    for (int64_t i = 0; i < a->n; i++) {
        double x = load(a->x, a->dtype, i);
        double th = hs_tanh(HS_GELU_A * (x + HS_GELU_B * x * x * x));
        store(a->y, a->dtype, i, 0.5 * x * (1 + th));
    }
}

void hs_ref_gelu_igrad(const hs_gelu_igrad_args *a) {
    for (int64_t i = 0; i < a->n; i++) {
        double dy = load(a->dy, a->dtype, i), x = load(a->x, a->dtype, i);
        double th = hs_tanh(HS_GELU_A * (x + HS_GELU_B * x * x * x));
        double inner = HS_GELU_A * (1 + 3 * HS_GELU_B * x * x);
        store(a->dx, a->dtype, i, dy * (0.5 * (1 + th) + 0.5 * x * (1 - th * th) * inner));
    }
}
