/* Rotary embedding, half form, in place. */
#include "kernels/rope.h"

#include "core/math.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/share.h"

static void rope_table_op(hs_kernel_ctx *ctx, const hs_args *a) {
    int64_t T = a->dim[0], half = a->dim[1] / 2;
    float *tab = a->ptr[0];
    (void)ctx; /* once a run: not worth sharing */
    for (int64_t i = 0; i < half; i++) {
        double power = hs_pow(a->real[0], 2.0 * (double)i / (double)a->dim[1]);
        for (int64_t t = 0; t < T; t++) {
            double angle = (double)t / power;
            tab[2 * (t * half + i)] = (float)hs_cos(angle);
            tab[2 * (t * half + i) + 1] = (float)hs_sin(angle);
        }
    }
}

typedef struct rope_job {
    const hs_args *a;
    int64_t R, T, N, D, ld;
    float sign; /* of the sine: 1, or -1 to turn back */
} rope_job;

VINLINE void rope_rows(const rope_job *j, int64_t begin, int64_t end, int dt) {
    void *x = j->a->ptr[0];
    const float *tab = j->a->ptr[1];
    const int64_t half = j->D / 2;
    const vf sign = v_set1(j->sign);
    for (int64_t r = begin; r < end; r++)
        for (int64_t i = 0; i < half; i += LANES) {
            int64_t left = min64(half - i, LANES);
            const float *pairs = tab + 2 * (r % j->T * half + i);
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

static void rope_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const rope_job *j = ctx;
    (void)worker;
    BY_DTYPE(j->a->dtype, rope_rows, j, begin, end);
}

static void rope_turn(hs_kernel_ctx *ctx, const hs_args *a, float sign) {
    rope_job j = {a, a->dim[0], a->dim[1], a->dim[2], a->dim[3], a->dim[4], sign};
    share_rows(ctx, j.R, j.N * j.D, rope_range, &j);
}

static void rope_fwd_op(hs_kernel_ctx *ctx, const hs_args *a) {
    rope_turn(ctx, a, 1.0f);
}

static void rope_igrad_op(hs_kernel_ctx *ctx, const hs_args *a) {
    rope_turn(ctx, a, -1.0f);
}
