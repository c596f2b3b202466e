/* Rotary embedding, half form, in place. */
#include "kernels/rope.h"

#include "core/math.h"
#include "kernels/cpu/share.h"
#include "kernels/cpu/vec.h"

static void rope_table_op(hs_kernel_ctx *ctx, hs_rope_table_args *a) {
    int64_t T = a->T, half = a->D / 2;
    float *tab = a->tab;
    (void)ctx; /* once a run: not worth sharing */
    for (int64_t i = 0; i < half; i++) {
        double power = hs_pow(a->base, 2.0 * (double)i / (double)a->D);
        for (int64_t t = 0; t < T; t++) {
            double angle = (double)t / power;
            tab[2 * (t * half + i)] = (float)hs_cos(angle);
            tab[2 * (t * half + i) + 1] = (float)hs_sin(angle);
        }
    }
}

typedef struct rope_job {
    void *x;
    const float *tab;
    const int32_t *first;
    int64_t T, N, D, ld;
    float sign; /* of the sine: 1, or -1 to turn back */
    int dt;
} rope_job;

VINLINE void rope_rows(const rope_job *j, int64_t begin, int64_t end, int dt) {
    void *x = j->x;
    const float *tab = j->tab;
    const int64_t half = j->D / 2;
    const vf sign = v_set1(j->sign);
    for (int64_t r = begin; r < end; r++) {
        const int64_t t = r % j->T - hs_first_of(j->first, r, r % j->T);
        for (int64_t i = 0; i < half; i += LANES) {
            int64_t left = hs_min(half - i, LANES);
            const float *pairs = tab + 2 * (t * half + i);
            float cosines[LANES] = {0}, sines[LANES] = {0};
            for (int64_t l = 0; l < left; l++)
                cosines[l] = pairs[2 * l], sines[l] = pairs[2 * l + 1];
            vf c = v_load(cosines), s = v_mul(v_load(sines), sign);
            for (int64_t n = 0; n < j->N; n++) {
                int64_t at = r * j->ld + n * j->D + i;
                vf p = v_load_dt_n(x, at, left, dt), q = v_load_dt_n(x, at + half, left, dt);
                v_store_dt_n(x, at, v_fnma(q, s, v_mul(p, c)), left, dt);
                v_store_dt_n(x, at + half, v_fma(p, s, v_mul(q, c)), left, dt);
            }
        }
    }
}

static void rope_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const rope_job *j = ctx;
    (void)worker;
    BY_DTYPE(j->dt, rope_rows, j, begin, end);
}

static void rope_fwd_op(hs_kernel_ctx *ctx, hs_rope_fwd_args *a) {
    rope_job j = {a->x, a->tab, a->first, a->T, a->N, a->D, a->ldx, 1.0f, (int)a->dtype};
    share_rows(ctx, a->R, a->N * a->D, rope_range, &j);
}

static void rope_igrad_op(hs_kernel_ctx *ctx, hs_rope_igrad_args *a) {
    rope_job j = {a->x, a->tab, a->first, a->T, a->N, a->D, a->ldx, -1.0f, (int)a->dtype};
    share_rows(ctx, a->R, a->N * a->D, rope_range, &j);
}
