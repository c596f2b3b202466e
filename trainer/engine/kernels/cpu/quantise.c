/* FP8; see quantise.h. The largest magnitude needs no order: any cut among the threads gives it. */
#include "kernels/quantise.h"

#include "kernels/cpu/share.h"
#include "kernels/cpu/vec.h"
#include "kernels/cpu/vec_fp8.h"

enum { QUANTISE_ROWS = 64 }; /* of a block whose transpose is written at once */

typedef struct quantise_job {
    const hs_quantise_args *a;
    int64_t each; /* rows of a part */
    float inverse;
} quantise_job;

/* The largest magnitude of the rows; NaN where one of their elements is not finite. */
VINLINE float most_of(const hs_quantise_args *a, int64_t begin, int64_t end, int dt) {
    vf most = v_zero(), odd = v_zero();
    for (int64_t r = begin; r < end; r++)
        for (int64_t c = 0; c < a->C; c += LANES) {
            const vf x = v_load_dt_n(a->x, r * a->ldx + c, a->C - c, dt);
            odd = v_fma(x, v_zero(), odd); /* 0, or NaN from then on */
            most = v_max(most, v_from_bits(vi_and(v_bits(x), vi_set1(0x7fffffff))));
        }
    return v_sum(odd) == 0.0f ? v_max_lanes(most) : f32_from_bits(0x7fc00000u);
}

VINLINE void most_parts(const quantise_job *j, int64_t begin, int64_t end, int dt) {
    float *part = j->a->part;
    for (int64_t p = begin; p < end; p++)
        part[p] = most_of(j->a, p * j->each, hs_min((p + 1) * j->each, j->a->R), dt);
}

static void most_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const quantise_job *j = ctx;
    (void)worker;
    BY_DTYPE(j->a->dtype, most_parts, j, begin, end);
}

VINLINE void codes_of_rows(const quantise_job *j, int64_t begin, int64_t end, int e5m2, int dt) {
    const hs_quantise_args *a = j->a;
    uint8_t *q = a->q, *qt = a->qt;
    const vf inverse = v_set1(j->inverse);
    for (int64_t r = begin; r < end; r++)
        for (int64_t c = 0; c < a->C; c += LANES) {
            const int64_t left = a->C - c;
            const vf x = v_mul(v_load_dt_n(a->x, r * a->ldx + c, left, dt), inverse);
            vi_store_bytes_n(q + r * a->C + c, v_fp8(x, e5m2), left);
        }
    if (!qt) return;
    for (int64_t c = 0; c < a->C; c++)
        for (int64_t r = begin; r < end; r++) qt[c * a->R + r] = q[r * a->C + c];
}

VINLINE void codes_dt(const quantise_job *j, int64_t begin, int64_t end, int dt) {
    if (j->a->E5M2)
        codes_of_rows(j, begin, end, 1, dt);
    else
        codes_of_rows(j, begin, end, 0, dt);
}

static void codes_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const quantise_job *j = ctx;
    (void)worker;
    for (int64_t b = begin; b < end; b++) {
        const int64_t first = b * QUANTISE_ROWS, last = hs_min(first + QUANTISE_ROWS, j->a->R);
        BY_DTYPE(j->a->dtype, codes_dt, j, first, last);
    }
}

static void quantise_op(hs_kernel_ctx *ctx, hs_quantise_args *a) {
    float *part = a->part, most = 0;
    quantise_job j = {.a = a, .each = hs_ceil_div(a->R, HS_QUANTISE_PARTS)};
    const int64_t parts = hs_ceil_div(a->R, j.each);
    share_rows(ctx, parts, j.each * a->C, most_range, &j);
    int finite = 1;
    for (int64_t p = 0; p < parts; p++) {
        finite &= part[p] == part[p];
        most = part[p] > most ? part[p] : most;
    }
    const uint32_t scale = fp8_scale_bits(f32_bits(most), finite, a->E5M2 != 0);
    *(float *)a->s = f32_from_bits(scale);
    j.inverse = f32_from_bits(fp8_inverse_bits(scale));
    share_rows(ctx, hs_ceil_div(a->R, QUANTISE_ROWS), QUANTISE_ROWS * a->C, codes_range, &j);
}
