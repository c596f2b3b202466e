/* Embedding. The gradient is cut among threads by columns: rows stay in ascending order for every
 * element. */
#include "kernels/embed.h"

#include "kernels/cpu/gemm.h"
#include "kernels/cpu/share.h"

typedef struct embed_job {
    const hs_args *a;
    int64_t R, C, T;
} embed_job;

VINLINE void embed_rows(const embed_job *j, int64_t begin, int64_t end, int dt) {
    const int32_t *tok = j->a->ptr[1];
    void *y = j->a->ptr[0];
    const void *wte = j->a->ptr[2], *wpe = j->a->ptr[3];
    for (int64_t r = begin; r < end; r++)
        for (int64_t c = 0; c < j->C; c += LANES) {
            int64_t left = j->C - c;
            vf x = v_load_dt_n(wte, tok[r] * j->C + c, left, dt);
            if (wpe) x = v_add(x, v_load_dt_n(wpe, r % j->T * j->C + c, left, dt));
            v_store_dt_n(y, r * j->C + c, x, left, dt);
        }
}

static void embed_fwd_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const embed_job *j = ctx;
    (void)worker;
    BY_DTYPE(j->a->dtype, embed_rows, j, begin, end);
}

static void embed_fwd_op(hs_kernel_ctx *ctx, const hs_args *a) {
    embed_job j = {a, a->dim[0], a->dim[1], a->dim[3]};
    share_rows(ctx, j.R, j.C, embed_fwd_range, &j);
}

VINLINE void embed_columns(const embed_job *j, int64_t begin, int64_t end, int dt) {
    float *dwte = j->a->ptr[0], *dwpe = j->a->ptr[1];
    const void *dy = j->a->ptr[2];
    const int32_t *tok = j->a->ptr[3];
    for (int64_t r = 0; r < j->R; r++)
        for (int64_t c = begin; c < end; c += LANES) {
            int64_t left = end - c;
            vf g = v_load_dt_n(dy, r * j->C + c, left, dt);
            float *e = dwte + tok[r] * j->C + c;
            v_store_n(e, v_add(v_load_n(e, left), g), left);
            if (dwpe) {
                float *p = dwpe + r % j->T * j->C + c;
                v_store_n(p, v_add(v_load_n(p, left), g), left);
            }
        }
}

static void embed_wgrad_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const embed_job *j = ctx;
    (void)worker;
    begin *= SHARE_COLUMNS, end = min64(end * SHARE_COLUMNS, j->C);
    BY_DTYPE(j->a->dtype, embed_columns, j, begin, end);
}

static void embed_wgrad_op(hs_kernel_ctx *ctx, const hs_args *a) {
    embed_job j = {a, a->dim[0], a->dim[1], a->dim[3]};
    share_columns(ctx, j.R, j.C, embed_wgrad_range, &j);
}
