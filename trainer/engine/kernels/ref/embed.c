#include "kernels/embed.h"

#include "kernels/ref/ref_internal.h"

void hs_ref_embed_fwd(const hs_embed_fwd_args *a) {
    const int64_t R = a->R, C = a->C, V = a->V, T = a->T;
    const int32_t *tok_r = a->tok;
    const void *wte_vc = a->wte, *wpe_tc = a->wpe;
    for (int64_t r = 0; r < R; r++) {
        HS_ASSERT(tok_r[r] >= 0 && tok_r[r] < V);
        const int64_t t = r % T - hs_first_of(a->first, r, r % T);
        for (int64_t c = 0; c < C; c++) {
            double y = load(wte_vc, a->dtype, tok_r[r] * C + c);
            if (wpe_tc) y += load(wpe_tc, a->dtype, t * C + c);
            store(a->y, a->dtype, r * C + c, y);
        }
    }
}

void hs_ref_embed_wgrad_tied(const hs_embed_wgrad_tied_args *a) {
    const int64_t R = a->R, C = a->C, V = a->V, T = a->T;
    const uint32_t acc = acc_of(a->dtype);
    const int32_t *tok_r = a->tok;
    int32_t *top_v = a->top, *next_r = a->next;
    for (int64_t r = 0; r < R; r++) HS_ASSERT(tok_r[r] >= 0 && tok_r[r] < V);
    hs_embed_rows_of(tok_r, R, V, top_v, next_r);
    for (int64_t v = 0; v < V; v++)
        for (int64_t c = 0; c < C && top_v[v] >= 0; c++) {
            double sum = 0;
            for (int64_t r = top_v[v]; r >= 0; r = next_r[r]) {
                sum += load(a->dy, a->dtype, r * C + c);
                if (acc == HS_F32) sum = (double)(float)sum;
            }
            add_to(a->dwte, acc, v * C + c, sum);
        }
    for (int64_t r = 0; r < R && a->dwpe; r++) {
        const int64_t t = r % T - hs_first_of(a->first, r, r % T);
        for (int64_t c = 0; c < C; c++)
            add_to(a->dwpe, acc, t * C + c, load(a->dy, a->dtype, r * C + c));
    }
}

void hs_ref_embed_wgrad(const hs_embed_wgrad_args *a) {
    const int64_t R = a->R, C = a->C, V = a->V, T = a->T;
    const uint32_t acc = acc_of(a->dtype);
    void *dwte_vc = a->dwte, *dwpe_tc = a->dwpe;
    const int32_t *tok_r = a->tok;
    for (int64_t r = 0; r < R; r++) {
        HS_ASSERT(tok_r[r] >= 0 && tok_r[r] < V);
        const int64_t t = r % T - hs_first_of(a->first, r, r % T);
        for (int64_t c = 0; c < C; c++) {
            double dy = load(a->dy, a->dtype, r * C + c);
            add_to(dwte_vc, acc, tok_r[r] * C + c, dy);
            if (dwpe_tc) add_to(dwpe_tc, acc, t * C + c, dy);
        }
    }
}
