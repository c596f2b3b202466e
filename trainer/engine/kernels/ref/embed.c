#include "kernels/embed.h"

#include "kernels/ref/ref_internal.h"

hs_status hs_ref_embed_fwd(hs_kernel_ctx *ctx, const hs_args *a) {
    (void)ctx;
    const int64_t R = a->dim[0], C = a->dim[1], V = a->dim[2], T = a->dim[3];
    const int32_t *tok_r = a->ptr[1];
    const void *wte_vc = a->ptr[2], *wpe_tc = a->ptr[3];
    for (int64_t r = 0; r < R; r++) {
        HS_ASSERT(tok_r[r] >= 0 && tok_r[r] < V);
        for (int64_t c = 0; c < C; c++) {
            double y = load(wte_vc, a->dtype, tok_r[r] * C + c);
            if (wpe_tc) y += load(wpe_tc, a->dtype, r % T * C + c);
            store(a->ptr[0], a->dtype, r * C + c, y);
        }
    }
    return HS_OK;
}

hs_status hs_ref_embed_wgrad(hs_kernel_ctx *ctx, const hs_args *a) {
    (void)ctx;
    const int64_t R = a->dim[0], C = a->dim[1], V = a->dim[2], T = a->dim[3];
    const uint32_t acc = acc_of(a->dtype);
    void *dwte_vc = a->ptr[0], *dwpe_tc = a->ptr[1];
    const int32_t *tok_r = a->ptr[3];
    for (int64_t r = 0; r < R; r++) {
        HS_ASSERT(tok_r[r] >= 0 && tok_r[r] < V);
        for (int64_t c = 0; c < C; c++) {
            double dy = load(a->ptr[2], a->dtype, r * C + c);
            add_to(dwte_vc, acc, tok_r[r] * C + c, dy);
            if (dwpe_tc) add_to(dwpe_tc, acc, r % T * C + c, dy);
        }
    }
    return HS_OK;
}
