/* The head in blocks of the vocabulary (vocabulary.h). A row's block sums in 16 lane partials, as a
 * row of classifier.c does; e takes the place of the logits, so that no second exp is taken. */
#include "kernels/vocabulary.h"

#include <string.h>

#include "kernels/cpu/gemm.h"
#include "kernels/cpu/share.h"
#include "kernels/cpu/softmax.h"

/* Of a row: largest logit, sum of exp(logit - it), logit of the target. */
typedef struct row_sums {
    float top, sum, own;
} row_sums;

/* z[V] becomes e. */
VINLINE row_sums vocab_block_sums(float *z, int64_t V) {
    if (V == 0) return (row_sums){-HUGE_VALF, 0.0f, 0.0f};
    const float highest = largest_of(z, V);
    return (row_sums){highest, v_sum(exps_of(z, V, highest, z, 1)), 0.0f};
}

VINLINE row_sums vocab_two(row_sums a, row_sums b) {
    const float top = a.top > b.top ? a.top : b.top;
    const float one = a.sum * exp1_f32(a.top - top), other = b.sum * exp1_f32(b.top - top);
    return (row_sums){top, one + other, a.own + b.own};
}

/* In the tree; s is spent. */
VINLINE row_sums vocab_all(row_sums *s, int64_t n) {
    for (int64_t step = 1; step < n; step *= 2)
        for (int64_t i = 0; i + step < n; i += 2 * step) s[i] = vocab_two(s[i], s[i + step]);
    return s[0];
}

/* Rows of logits, or of what became of them, and what is made of them. */
typedef struct vocab_rows {
    int64_t V, N, BLOCK, FIRST;
    int64_t P, R;  /* parts, and the rows that their sums have */
    float *z;      /* [rows, V] */
    float *tops;   /* [N, R] */
    float *sums;   /* [3 P, R] */
    float *loss;   /* [rows]; NULL: not wanted */
    void *dlogits; /* [rows, V] */
    const int32_t *target;
    float scale;
    int dt;
} vocab_rows;

/* e, the tops of the blocks and the sums of all, of row r. */
VINLINE row_sums vocab_row_sums(const vocab_rows *j, int64_t r, float *tops) {
    row_sums s[HS_VOCAB_BLOCKS] = {{0, 0, 0}};
    float *z = j->z + r * j->V;
    const int64_t own = j->target[r] < 0 ? -1 : j->target[r] - j->FIRST;
    for (int64_t b = 0; b < j->N; b++) {
        const int64_t begin = hs_vocab_block(b, j->N, j->BLOCK, j->V),
                      end = hs_vocab_block(b + 1, j->N, j->BLOCK, j->V);
        const float logit = own >= begin && own < end ? z[own] : 0.0f;
        s[b] = vocab_block_sums(z + begin, end - begin);
        s[b].own = logit;
        tops[b] = s[b].top;
    }
    return vocab_all(s, j->N);
}

/* loss and dlogits of row r, whose e is there. */
VINLINE void vocab_row_grad(const vocab_rows *j, int64_t r, const float *tops, row_sums all,
                            int dt) {
    const int64_t V = j->V;
    const float *z = j->z + r * V;
    if (j->target[r] < 0) {
        if (j->loss) j->loss[r] = 0;
        for (int64_t v = 0; v < V; v += LANES)
            v_store_dt_n(j->dlogits, r * V + v, v_zero(), V - v, dt);
        return;
    }
    if (j->loss) j->loss[r] = (all.top - all.own) + log1_f32(all.sum);
    const int64_t own = j->target[r] - j->FIRST;
    const float each = j->scale / all.sum;
    for (int64_t b = 0; b < j->N; b++) {
        const int64_t begin = hs_vocab_block(b, j->N, j->BLOCK, V),
                      end = hs_vocab_block(b + 1, j->N, j->BLOCK, V);
        const float lower = exp1_f32(tops[b] - all.top);
        const vf factor = v_set1(lower * each);
        for (int64_t v = begin; v < end; v += LANES)
            v_store_dt_n(j->dlogits, r * V + v, v_mul(v_load_n(z + v, end - v), factor), end - v,
                         dt);
        if (own >= begin && own < end) {
            const float at_target = ((z[own] * lower) / all.sum - 1.0f) * j->scale;
            v_store_dt_n(j->dlogits, r * V + own, v_set1(at_target), 1, dt);
        }
    }
}

VINLINE void vocab_whole_rows(const vocab_rows *j, int64_t begin, int64_t end, int dt) {
    float tops[HS_VOCAB_BLOCKS];
    for (int64_t r = begin; r < end; r++) {
        const row_sums all = vocab_row_sums(j, r, tops);
        vocab_row_grad(j, r, tops, all, dt);
    }
}

VINLINE void vocab_part_rows(const vocab_rows *j, int64_t begin, int64_t end, int dt) {
    float tops[HS_VOCAB_BLOCKS];
    row_sums s[HS_VOCAB_BLOCKS] = {{0, 0, 0}};
    for (int64_t r = begin; r < end; r++) {
        for (int64_t b = 0; b < j->N; b++) tops[b] = j->tops[b * j->R + r];
        for (int64_t p = 0; p < j->P; p++) {
            const float *of = j->sums + 3 * p * j->R + r;
            s[p] = (row_sums){of[0], of[j->R], of[2 * j->R]};
        }
        vocab_row_grad(j, r, tops, vocab_all(s, j->P), dt);
    }
}

static void vocab_whole_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const vocab_rows *j = ctx;
    (void)worker;
    BY_DTYPE(j->dt, vocab_whole_rows, j, begin, end);
}

static void vocab_part_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const vocab_rows *j = ctx;
    (void)worker;
    BY_DTYPE(j->dt, vocab_part_rows, j, begin, end);
}

static void vocab_sums_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const vocab_rows *j = ctx;
    float tops[HS_VOCAB_BLOCKS];
    (void)worker;
    for (int64_t r = begin; r < end; r++) {
        const row_sums all = vocab_row_sums(j, r, tops);
        for (int64_t b = 0; b < j->N; b++) j->tops[b * j->R + r] = tops[b];
        j->sums[r] = all.top;
        j->sums[j->R + r] = all.sum;
        j->sums[2 * j->R + r] = all.own;
    }
}

/* What the blocks gave for dx, each [rows, C], and their sum in the tree. */
typedef struct vocab_tree {
    float *parts;
    int64_t N, size;
    void *out;
    int dt;
} vocab_tree;

VINLINE void vocab_tree_flat(const vocab_tree *t, int64_t begin, int64_t end, int dt) {
    const int64_t from = begin * SHARE_FLAT, to = hs_min(end * SHARE_FLAT, t->size);
    for (int64_t i = from; i < to; i += LANES) {
        vf x[HS_VOCAB_BLOCKS];
        x[0] = v_zero();
        for (int64_t b = 0; b < t->N; b++) x[b] = v_load_n(t->parts + b * t->size + i, to - i);
        for (int64_t step = 1; step < t->N; step *= 2)
            for (int64_t b = 0; b + step < t->N; b += 2 * step) x[b] = v_add(x[b], x[b + step]);
        v_store_dt_n(t->out, i, x[0], to - i, dt);
    }
}

static void vocab_tree_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const vocab_tree *t = ctx;
    (void)worker;
    BY_DTYPE(t->dt, vocab_tree_flat, t, begin, end);
}

/* dx and dw of `rows` rows, from their dlogits; dx in type dt_out. from_old: what is in dw is added
 * to. */
VINLINE void vocab_products(hs_kernel_ctx *ctx, const vocab_rows *j, int64_t rows, int64_t C,
                            const void *x, const void *w, void *dx, int dt_out, float *dw,
                            int from_old, float *parts) {
    const int dt = j->dt;
    const char *dlogits = j->dlogits;
    for (int64_t b = 0; b < j->N; b++) {
        const int64_t begin = hs_vocab_block(b, j->N, j->BLOCK, j->V),
                      end = hs_vocab_block(b + 1, j->N, j->BLOCK, j->V);
        gemm one = {.m = rows,
                    .n = C,
                    .k = end - begin,
                    .a = {dlogits + begin * dt_size(dt), j->V, 1, dt},
                    .b = {(const char *)w + begin * C * dt_size(dt), 1, C, dt},
                    .out = parts + b * rows * C,
                    .ld_out = C,
                    .dt_out = HS_F32};
        if (one.k)
            gemm_run(ctx, &one);
        else
            memset(one.out, 0, (size_t)(rows * C) * sizeof(float));
    }
    vocab_tree t = {parts, j->N, rows * C, dx, dt_out};
    share_flat(ctx, t.size, vocab_tree_range, &t);
    gemm sum = {.m = j->V,
                .n = C,
                .k = rows,
                .a = {dlogits, 1, j->V, dt},
                .b = {x, 1, C, dt},
                .out = dw,
                .ld_out = C,
                .dt_out = HS_F32,
                .from_old = from_old};
    gemm_run(ctx, &sum);
}

static void vocab_head_op(hs_kernel_ctx *ctx, hs_vocab_head_args *a) {
    const int64_t R = a->R, C = a->C, V = a->V;
    const int dt = (int)a->dtype;
    for (int64_t r = 0; r < R; r += a->CHUNK) {
        const int64_t rows = hs_min(a->CHUNK, R - r);
        const char *x = (const char *)a->x + r * C * dt_size(dt);
        vocab_rows j = {.V = V,
                        .N = a->N,
                        .BLOCK = a->BLOCK,
                        .z = a->logits,
                        .loss = (float *)a->loss + r,
                        .dlogits = a->dlogits,
                        .target = (const int32_t *)a->target + r,
                        .scale = (float)a->scale,
                        .dt = dt};
        classifier_logits(ctx, a->logits, x, a->w, rows, C, V, dt);
        share_rows(ctx, rows, V, vocab_whole_range, &j);
        vocab_products(ctx, &j, rows, C, x, a->w, (char *)a->dx + r * C * dt_size(dt), dt, a->dw,
                       r > 0 || a->ACCUM, a->parts);
    }
}

static void vocab_sums_op(hs_kernel_ctx *ctx, hs_vocab_sums_args *a) {
    vocab_rows j = {.V = a->V,
                    .N = a->N,
                    .BLOCK = a->BLOCK,
                    .FIRST = a->FIRST,
                    .R = a->R,
                    .z = a->e,
                    .tops = a->tops,
                    .sums = a->sums,
                    .target = a->target};
    classifier_logits(ctx, a->e, a->x, a->w, a->R, a->C, a->V, (int)a->dtype);
    share_rows(ctx, a->R, a->V, vocab_sums_range, &j);
}

static void vocab_part_op(hs_kernel_ctx *ctx, hs_vocab_part_args *a) {
    const int64_t R = a->R, C = a->C, V = a->V;
    const int dt = (int)a->dtype;
    for (int64_t r = 0; r < R; r += a->CHUNK) {
        const int64_t rows = hs_min(a->CHUNK, R - r);
        vocab_rows j = {.V = V,
                        .N = a->N,
                        .BLOCK = a->BLOCK,
                        .FIRST = a->FIRST,
                        .P = a->P,
                        .R = R,
                        .z = (float *)a->e + r * V,
                        .tops = (float *)a->tops + r,
                        .sums = (float *)a->sums + r,
                        .loss = a->loss ? (float *)a->loss + r : NULL,
                        .dlogits = a->dlogits,
                        .target = (const int32_t *)a->target + r,
                        .scale = (float)a->scale,
                        .dt = dt};
        share_rows(ctx, rows, V, vocab_part_range, &j);
        vocab_products(ctx, &j, rows, C, (const char *)a->x + r * C * dt_size(dt), a->w,
                       (float *)a->dx + r * C, HS_F32, a->dw, r > 0 || a->ACCUM, a->parts);
    }
}
