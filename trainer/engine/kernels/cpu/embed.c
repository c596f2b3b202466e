/* Embedding. The gradient is cut among threads by columns: rows stay in ascending order for every
 * element. */
#include "kernels/embed.h"

#include "kernels/cpu/share.h"
#include "kernels/cpu/vec.h"

VINLINE void embed_fwd_rows(const hs_embed_fwd_args *a, int64_t begin, int64_t end, int dt) {
    const int32_t *tok = a->tok;
    void *y = a->y;
    const void *wte = a->wte, *wpe = a->wpe;
    for (int64_t r = begin; r < end; r++) {
        const int64_t t = r % a->T - hs_first_of(a->first, r, r % a->T);
        for (int64_t c = 0; c < a->C; c += LANES) {
            int64_t left = a->C - c;
            vf x = v_load_dt_n(wte, tok[r] * a->C + c, left, dt);
            if (wpe) x = v_add(x, v_load_dt_n(wpe, t * a->C + c, left, dt));
            v_store_dt_n(y, r * a->C + c, x, left, dt);
        }
    }
}

static void embed_fwd_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const hs_embed_fwd_args *a = ctx;
    (void)worker;
    BY_DTYPE(a->dtype, embed_fwd_rows, a, begin, end);
}

static void embed_fwd_op(hs_kernel_ctx *ctx, hs_embed_fwd_args *a) {
    share_rows(ctx, a->R, a->C, embed_fwd_range, a);
}

VINLINE void embed_wgrad_columns(const hs_embed_wgrad_args *a, int64_t begin, int64_t end, int dt) {
    float *dwte = a->dwte, *dwpe = a->dwpe;
    const void *dy = a->dy;
    const int32_t *tok = a->tok;
    for (int64_t r = 0; r < a->R; r++) {
        const int64_t t = r % a->T - hs_first_of(a->first, r, r % a->T);
        for (int64_t c = begin; c < end; c += LANES) {
            int64_t left = end - c;
            vf g = v_load_dt_n(dy, r * a->C + c, left, dt);
            float *e = dwte + tok[r] * a->C + c;
            v_store_n(e, v_add(v_load_n(e, left), g), left);
            if (dwpe) {
                float *p = dwpe + t * a->C + c;
                v_store_n(p, v_add(v_load_n(p, left), g), left);
            }
        }
    }
}

VINLINE void embed_wgrad_tied_columns(const hs_embed_wgrad_tied_args *a, int64_t begin, int64_t end,
                                      int dt) {
    float *dwte = a->dwte, *dwpe = a->dwpe;
    const void *dy = a->dy;
    const int32_t *tok = a->tok, *top = a->top, *next = a->next;
    for (int64_t r = 0; r < a->R; r++) {
        const int64_t t = r % a->T - hs_first_of(a->first, r, r % a->T);
        const bool first = top[tok[r]] == r;
        for (int64_t c = begin; c < end; c += LANES) {
            int64_t left = end - c;
            if (dwpe) {
                float *p = dwpe + t * a->C + c;
                v_store_n(p, v_add(v_load_n(p, left), v_load_dt_n(dy, r * a->C + c, left, dt)),
                          left);
            }
            if (!first) continue;
            vf sum = v_zero();
            for (int64_t i = r; i >= 0; i = next[i])
                sum = v_add(sum, v_load_dt_n(dy, i * a->C + c, left, dt));
            float *e = dwte + tok[r] * a->C + c;
            v_store_n(e, v_add(v_load_n(e, left), sum), left);
        }
    }
}

static void embed_wgrad_tied_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const hs_embed_wgrad_tied_args *a = ctx;
    (void)worker;
    begin *= SHARE_COLUMNS, end = hs_min(end * SHARE_COLUMNS, a->C);
    BY_DTYPE(a->dtype, embed_wgrad_tied_columns, a, begin, end);
}

static void embed_wgrad_tied_op(hs_kernel_ctx *ctx, hs_embed_wgrad_tied_args *a) {
    hs_embed_rows_of(a->tok, a->R, a->V, a->top, a->next);
    share_columns(ctx, a->R, a->C, embed_wgrad_tied_range, a);
}

static void embed_wgrad_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const hs_embed_wgrad_args *a = ctx;
    (void)worker;
    begin *= SHARE_COLUMNS, end = hs_min(end * SHARE_COLUMNS, a->C);
    BY_DTYPE(a->dtype, embed_wgrad_columns, a, begin, end);
}

static void embed_wgrad_op(hs_kernel_ctx *ctx, hs_embed_wgrad_args *a) {
    share_columns(ctx, a->R, a->C, embed_wgrad_range, a);
}
