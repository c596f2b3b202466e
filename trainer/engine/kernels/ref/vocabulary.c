#include "kernels/vocabulary.h"

#include "core/ints.h"
#include "kernels/ref/ref_internal.h"

/* Of a row: largest logit, sum of exp(logit - it), logit of the target. */
typedef struct sums {
    double top, sum, own;
} sums;

static sums two(sums a, sums b) {
    const double top = a.top > b.top || a.top != a.top ? a.top : b.top;
    return (sums){top, a.sum * hs_exp(a.top - top) + b.sum * hs_exp(b.top - top), a.own + b.own};
}

static sums all_of(sums *s, int64_t n) {
    for (int64_t step = 1; step < n; step *= 2)
        for (int64_t i = 0; i + step < n; i += 2 * step) s[i] = two(s[i], s[i + step]);
    return s[0];
}

/* e of row i of a part's logits into e_iv, and the tops of its blocks. */
static sums sums_of(void *e_iv, int64_t i, const void *x_c, int64_t x_at, const void *w_vc,
                    const hs_vocab_sums_args *a, double tops[HS_VOCAB_BLOCKS], int32_t target) {
    const uint32_t dt = a->dtype, acc = acc_of(dt);
    sums s[HS_VOCAB_BLOCKS];
    for (int64_t b = 0; b < a->N; b++) {
        const int64_t begin = hs_vocab_block(b, a->N, a->BLOCK, a->V),
                      end = hs_vocab_block(b + 1, a->N, a->BLOCK, a->V);
        s[b] = (sums){-INFINITY, 0, 0};
        for (int64_t v = begin; v < end; v++) {
            double logit = 0;
            for (int64_t c = 0; c < a->C; c++)
                logit += load(x_c, dt, x_at + c) * load(w_vc, dt, v * a->C + c);
            store(e_iv, acc, i * a->V + v, logit);
            logit = load(e_iv, acc, i * a->V + v);
            if (logit > s[b].top || logit != logit) s[b].top = logit;
            if (target >= 0 && v + a->FIRST == target) s[b].own = logit;
        }
        for (int64_t v = begin; v < end; v++) {
            store(e_iv, acc, i * a->V + v, hs_exp(load(e_iv, acc, i * a->V + v) - s[b].top));
            s[b].sum += load(e_iv, acc, i * a->V + v);
        }
        tops[b] = s[b].top;
    }
    return all_of(s, a->N);
}

/* loss of row r, dlogits of row i of a chunk. */
static void row_grad(const hs_vocab_part_args *a, int64_t r, int64_t i, const void *e_iv,
                     const double *tops, sums all) {
    const uint32_t acc = acc_of(a->dtype);
    const int32_t target = ((const int32_t *)a->target)[r];
    HS_ASSERT(target < a->ALL);
    const double loss = target < 0 ? 0 : all.top - all.own + hs_log(all.sum);
    if (a->loss) store(a->loss, acc, r, loss);
    for (int64_t b = 0; b < a->N; b++)
        for (int64_t v = hs_vocab_block(b, a->N, a->BLOCK, a->V);
             v < hs_vocab_block(b + 1, a->N, a->BLOCK, a->V); v++) {
            const double p = load(e_iv, acc, i * a->V + v) * hs_exp(tops[b] - all.top) / all.sum;
            const double d = a->scale * (p - (v + a->FIRST == target));
            store(a->dlogits, a->dtype, i * a->V + v, target < 0 ? 0 : d);
        }
}

/* dx of the rows first .. first + rows in type dt_out, from their dlogits; their share of dw. */
static void products(const hs_vocab_part_args *a, int64_t first, int64_t rows, uint32_t dt_out) {
    const uint32_t dt = a->dtype, acc = acc_of(dt);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t c = 0; c < a->C; c++) {
            double part[HS_VOCAB_BLOCKS];
            for (int64_t b = 0; b < a->N; b++) {
                part[b] = 0;
                for (int64_t v = hs_vocab_block(b, a->N, a->BLOCK, a->V);
                     v < hs_vocab_block(b + 1, a->N, a->BLOCK, a->V); v++)
                    part[b] += load(a->dlogits, dt, i * a->V + v) * load(a->w, dt, v * a->C + c);
                store(a->parts, acc, (b * rows + i) * a->C + c, part[b]);
            }
            for (int64_t step = 1; step < a->N; step *= 2)
                for (int64_t b = 0; b + step < a->N; b += 2 * step) part[b] += part[b + step];
            store(a->dx, dt_out, (first + i) * a->C + c, part[0]);
        }
    for (int64_t v = 0; v < a->V; v++)
        for (int64_t c = 0; c < a->C; c++) {
            double dw = first > 0 || a->ACCUM ? load(a->dw, acc, v * a->C + c) : 0;
            for (int64_t i = 0; i < rows; i++)
                dw += load(a->dlogits, dt, i * a->V + v) * load(a->x, dt, (first + i) * a->C + c);
            store(a->dw, acc, v * a->C + c, dw);
        }
}

void hs_ref_vocab_sums(const hs_vocab_sums_args *a) {
    const uint32_t acc = acc_of(a->dtype);
    for (int64_t r = 0; r < a->R; r++) {
        double tops[HS_VOCAB_BLOCKS];
        const int32_t target = ((const int32_t *)a->target)[r];
        const sums all = sums_of(a->e, r, a->x, r * a->C, a->w, a, tops, target);
        for (int64_t b = 0; b < a->N; b++) store(a->tops, acc, b * a->R + r, tops[b]);
        store(a->sums, acc, r, all.top);
        store(a->sums, acc, a->R + r, all.sum);
        store(a->sums, acc, 2 * a->R + r, all.own);
    }
}

void hs_ref_vocab_part(const hs_vocab_part_args *a) {
    const uint32_t acc = acc_of(a->dtype);
    for (int64_t first = 0; first < a->R; first += a->CHUNK) {
        const int64_t rows = hs_min(a->CHUNK, a->R - first);
        for (int64_t i = 0; i < rows; i++) {
            const int64_t r = first + i;
            double tops[HS_VOCAB_BLOCKS];
            sums s[HS_VOCAB_BLOCKS];
            for (int64_t b = 0; b < a->N; b++) tops[b] = load(a->tops, acc, b * a->R + r);
            for (int64_t p = 0; p < a->P; p++)
                s[p] = (sums){load(a->sums, acc, 3 * p * a->R + r),
                              load(a->sums, acc, (3 * p + 1) * a->R + r),
                              load(a->sums, acc, (3 * p + 2) * a->R + r)};
            const char *e =
                (const char *)a->e +
                (size_t)(first * a->V) * (acc == HS_F64 ? sizeof(double) : sizeof(float));
            row_grad(a, r, i, e, tops, all_of(s, a->P));
        }
        products(a, first, rows, acc);
    }
}

void hs_ref_vocab_head(const hs_vocab_head_args *a) {
    const hs_vocab_sums_args fwd = {
        .C = a->C, .V = a->V, .N = a->N, .BLOCK = a->BLOCK, .ALL = a->V, .dtype = a->dtype};
    const hs_vocab_part_args grad = {.loss = a->loss,
                                     .dx = a->dx,
                                     .dw = a->dw,
                                     .x = a->x,
                                     .w = a->w,
                                     .target = a->target,
                                     .dlogits = a->dlogits,
                                     .parts = a->parts,
                                     .C = a->C,
                                     .V = a->V,
                                     .N = a->N,
                                     .BLOCK = a->BLOCK,
                                     .ALL = a->V,
                                     .ACCUM = a->ACCUM,
                                     .scale = a->scale,
                                     .dtype = a->dtype};
    for (int64_t first = 0; first < a->R; first += a->CHUNK) {
        const int64_t rows = hs_min(a->CHUNK, a->R - first);
        for (int64_t i = 0; i < rows; i++) {
            double tops[HS_VOCAB_BLOCKS];
            const int32_t target = ((const int32_t *)a->target)[first + i];
            const sums all =
                sums_of(a->logits, i, a->x, (first + i) * a->C, a->w, &fwd, tops, target);
            row_grad(&grad, first + i, i, a->logits, tops, all);
        }
        products(&grad, first, rows, a->dtype);
    }
}
