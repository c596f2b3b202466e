/* Attention backward: the order of its sums is in attention.h. */
#include "kernels/cpu/attention.h"

/* A worker's scratch. */
typedef struct backward {
    float *queries_turned, *grads_turned; /* [deep][ROWS] */
    float *queries, *grads, *dq;          /* [ROWS][wide] */
    float *score, *other;                 /* [ROWS][KEYS], which become p and ds */
    float *narrow_p, *narrow_ds;          /* a strip of them in pairs of rows */
    float *narrow_along;                  /* ds in pairs of keys, [ROWS][TILE_WORDS] */
    float *keys_turned, *values_turned;   /* [block][deep][KEYS] */
    float *keys;                          /* [key][wide] */
    float *dk, *dv;                       /* [block][wide][KEYS], of keys [begin, begin + span) */
    bool kept;    /* all blocks of a head are there; else there is room for one */
    int64_t span; /* a multiple of SPAN, or all keys */
} backward;

_Static_assert(SPAN % KEYS == 0 && SPAN % ROWS == 0, "a row's own span has all its later keys");
_Static_assert(HS_ATTENTION_HEAD_MAX * (5 * ROWS + 3 * KEYS + 2 * SPAN) + 3 * ROWS * KEYS +
                       2 * ROWS * STRIP <=
                   WORKER_FLOATS,
               "a span of the widest head fits the scratch");
_Static_assert(HS_ATTENTION_HEAD_MAX % LANES == 0 && KEYS % 2 == 0 && ROWS % 2 == 0 &&
                   STRIP == 2 * LANES,
               "no pair is cut, and none makes the widest head deeper");

static backward backward_of(const attention_job *j, int worker) {
    const int64_t deep = j->deep, wide = j->wide, all = hs_ceil_div(j->T, KEYS) * KEYS;
    float *at = j->scratch + (int64_t)worker * WORKER_FLOATS, *end = at + WORKER_FLOATS;
    backward w = {.queries_turned = at};
    w.grads_turned = w.queries_turned + ROWS * deep;
    w.queries = w.grads_turned + ROWS * deep;
    w.grads = w.queries + ROWS * wide;
    w.dq = w.grads + ROWS * wide;
    w.score = w.dq + ROWS * wide;
    w.other = w.score + ROWS * KEYS;
    w.narrow_p = w.other + ROWS * KEYS;
    w.narrow_ds = w.narrow_p + ROWS * STRIP;
    w.narrow_along = w.narrow_ds + ROWS * STRIP;
    w.keys_turned = w.narrow_along + ROWS * TILE_WORDS;
    w.kept = all * (2 * deep + 2 * wide) + packed_length(all, j->pairs) * wide <=
             end - w.keys_turned; /* dk and dv of all too */
    const int64_t laid = w.kept ? all : KEYS;
    w.values_turned = w.keys_turned + laid * deep;
    w.keys = w.values_turned + laid * deep;
    w.dk = w.keys + packed_length(laid, j->pairs) * wide;
    const int64_t room = (end - w.dk) / (2 * wide);
    w.span = all <= room ? all : room / SPAN * SPAN;
    w.dv = w.dk + w.span * wide;
    return w;
}

/* The heads of one owner: a kv head, and one of the query heads that read it. */
typedef struct pair {
    int64_t b;
    head q, k, v, grad, dq;
    const float *lse, *delta;
} pair;

VINLINE void delta_rows_dt(head grad, head out, int64_t T, int64_t D, float *delta, int dt) {
    for (int64_t t = 0; t < T; t++) {
        vf sum = v_zero();
        for (int64_t d = 0; d < D; d += LANES)
            sum = v_fma(v_load_dt_n(grad.p, t * grad.ld + d, D - d, dt),
                        v_load_dt_n(out.p, t * out.ld + d, D - d, dt), sum);
        delta[t] = v_sum(sum);
    }
}

static void lay_keys(const attention_job *j, const backward *w, const pair *h, int64_t k0) {
    const int64_t at = w->kept ? k0 : 0, keys = hs_min(KEYS, j->T - k0);
    lay_turned(w->keys_turned + at * j->deep, KEYS, h->k, k0, keys);
    lay_turned(w->values_turned + at * j->deep, KEYS, h->v, k0, keys);
    lay_straight(rows_from(matrix_of(w->keys, j->wide), at, j->pairs).p, h->k, k0, keys);
}

/* Scores of rows [first, end) of the tile from q0 on with n keys from k on, which begin a strip's columns: z becomes p,
 * and y ds. Row i does not see keys after it, nor before the first that it reads. */
static void softmax_rows(const attention_job *j, const pair *h, float *z, float *y, int64_t q0,
                         int64_t first, int64_t end, int64_t k, int64_t n) {
    const vf sv = v_set1(j->scale);
    for (int64_t i = first; i < end; i++) {
        const int64_t seen = q0 + i - k, unseen = low_of(j, h->b, q0 + i) - k;
        const vf lv = v_set1(h->lse[q0 + i]), dv = v_set1(h->delta[q0 + i]);
        for (int64_t u = 0; u < n; u += LANES) {
            float *zu = z + i * KEYS + u, *yu = y + i * KEYS + u;
            if (u > seen || u + LANES <= unseen) {
                v_store(zu, v_zero());
                v_store(yu, v_zero());
                continue;
            }
            vf p = v_exp(v_sub(v_mul(v_load(zu), sv), lv));
            vf ds = v_mul(p, v_sub(v_load(yu), dv));
            const vf at = v_count_from((float)u), after = v_set1((float)hs_min(KEYS, seen + 1)),
                     from = v_set1((float)hs_max(0, unseen));
            p = v_select_lt(at, from, v_zero(), v_select_lt(at, after, p, v_zero()));
            ds = v_select_lt(at, from, v_zero(), v_select_lt(at, after, ds, v_zero()));
            v_store(zu, p);
            v_store(yu, ds);
        }
    }
}

/* The same of a strip of STRIP keys, from which each of the rows sees all: the same bits, with less to do. */
static void softmax_strip(const attention_job *j, const pair *h, float *z, float *y, int64_t q0,
                          int64_t first, int64_t end) {
    const vf sv = v_set1(j->scale);
    for (int64_t i = first; i < end; i += 2) {
        const int64_t next =
            hs_min(i + 1, end - 1); /* the last may come twice: it is read before it is written */
        const vf l0 = v_set1(h->lse[q0 + i]), l1 = v_set1(h->lse[q0 + next]);
        const vf d0 = v_set1(h->delta[q0 + i]), d1 = v_set1(h->delta[q0 + next]);
        float *z0 = z + i * KEYS, *z1 = z + next * KEYS, *y0 = y + i * KEYS, *y1 = y + next * KEYS;
#define SCORE(z, l) v_sub(v_mul(v_load(z), sv), l)
        vf p[4] = {SCORE(z0, l0), SCORE(z0 + LANES, l0), SCORE(z1, l1), SCORE(z1 + LANES, l1)};
#undef SCORE
        v_exp4(p, 1);
#define GRADIENT(y, d, p) v_mul(p, v_sub(v_load(y), d))
        const vf g0 = GRADIENT(y0, d0, p[0]), g1 = GRADIENT(y0 + LANES, d0, p[1]);
        const vf g2 = GRADIENT(y1, d1, p[2]), g3 = GRADIENT(y1 + LANES, d1, p[3]);
#undef GRADIENT
        v_store(z0, p[0]), v_store(z0 + LANES, p[1]), v_store(z1, p[2]), v_store(z1 + LANES, p[3]);
        v_store(y0, g0), v_store(y0 + LANES, g1), v_store(y1, g2), v_store(y1 + LANES, g3);
    }
}

/* What the rows of a tile, from q0 on, and the block of keys from k0 on give each other: keys to w->dq, where
 * with_dq; rows to dk and dv of the block, where these are not NULL. */
static void attention_igrad_tile(const attention_job *j, const backward *w, const pair *h,
                                 int64_t q0, int64_t rows, int64_t k0, bool with_dq, float *dk,
                                 float *dv) {
    const int64_t D = j->D, deep = j->deep, wide = j->wide, at = w->kept ? k0 : 0;
    const int64_t keys = hs_min(KEYS, q0 + rows - k0);
    const int64_t end = rows_before(j, h->b, q0, rows, k0 + keys);
    const int pairs = j->pairs;
    const matrix k_td = rows_from(matrix_of(w->keys, wide), at, pairs);
    int64_t above = hs_max(0, k0 - q0); /* rows before it do not see the strip, */
    for (int64_t u = 0; u < keys; u += STRIP) {
        const int64_t n = hs_min(STRIP, keys - u), k = k0 + u, first = above;
        float *z = w->score + u, *y = w->other + u;
        above = u + n < keys ? hs_max(0, k + STRIP - q0) : end; /* nor before this the next */
        if (first >= end) break;
        matrix p = matrix_of(z + first * KEYS, KEYS), ds = matrix_of(y + first * KEYS, KEYS),
               ds_rows = matrix_of(w->other + first * KEYS, KEYS);
        product(end - first, n, D, matrix_of(w->queries_turned + first, ROWS),
                matrix_of(w->keys_turned + at * deep + u, KEYS), p, pairs, 0, NULL);
        product(end - first, n, D, matrix_of(w->grads_turned + first, ROWS),
                matrix_of(w->values_turned + at * deep + u, KEYS), ds, pairs, 0, NULL);
        if (n == STRIP && k + n <= q0 + first + 1 && low_of(j, h->b, q0 + end - 1) <= k)
            softmax_strip(j, h, z, y, q0, first, end);
        else
            softmax_rows(j, h, z, y, q0, first, end, k, n);
        if (pairs) {
            ds_rows = matrix_of(w->narrow_along + first * TILE_WORDS, TILE_WORDS);
            if (with_dq)
                narrow_along(matrix_of(ds_rows.p + packed_length(u, pairs), TILE_WORDS), ds,
                             end - first, n);
            if (dk) {
                narrow_rows(matrix_of(w->narrow_p, STRIP), p, end - first, n);
                narrow_rows(matrix_of(w->narrow_ds, STRIP), ds, end - first, n);
                p = matrix_of(w->narrow_p, STRIP);
                ds = matrix_of(w->narrow_ds, STRIP);
            }
        }
        if (with_dq) /* rows that see no later strip of the block: keys up to here */
            product_by_rows(hs_min(above, end) - first, wide, u + n, ds_rows, k_td,
                            matrix_of(w->dq + first * wide, wide), pairs);
        if (!dk) continue;
        product(D, n, end - first, rows_from(matrix_of(w->grads, wide), first, pairs), p,
                matrix_of(dv + u, KEYS), pairs, 1, NULL);
        product(D, n, end - first, rows_from(matrix_of(w->queries, wide), first, pairs), ds,
                matrix_of(dk + u, KEYS), pairs, 1, NULL);
    }
}

/* One query head's rows of a tile: what they give dk and dv of the span [begin, end), and their own dq where the span is
 * the last that they read. */
static void attention_igrad_rows(const attention_job *j, const backward *w, const pair *h,
                                 int64_t q0, int64_t begin, int64_t end) {
    const int64_t rows = hs_min(ROWS, j->T - q0);
    const bool with_dq = q0 < end;
    lay_turned(w->queries_turned, ROWS, h->q, q0, rows);
    lay_turned(w->grads_turned, ROWS, h->grad, q0, rows);
    lay_straight(w->queries, h->q, q0, rows);
    lay_straight(w->grads, h->grad, q0, rows);
    if (with_dq) memset(w->dq, 0, (size_t)(rows * j->wide) * sizeof(float));
    int64_t k0 = hs_max(with_dq ? 0 : begin, low_of(j, h->b, q0) / KEYS * KEYS);
    for (; k0 < hs_min(end, q0 + rows); k0 += KEYS) {
        const int64_t at = (k0 - begin) * j->wide;
        if (!w->kept) lay_keys(j, w, h, k0);
        attention_igrad_tile(j, w, h, q0, rows, k0, with_dq, k0 < begin ? NULL : w->dk + at,
                             k0 < begin ? NULL : w->dv + at);
    }
    if (with_dq) put_straight(h->dq, q0, rows, w->dq, j->scale);
}

static pair pair_of(const attention_job *j, int64_t b, int64_t h) {
    const hs_attention_igrad_args *a = j->igrad;
    const int64_t kv = h / (j->H / j->G), at = (b * j->H + h) * j->T;
    return (pair){.b = b,
                  .q = head_of(j, a->q, a->ldq, b, h),
                  .k = head_of(j, a->k, a->ldk, b, kv),
                  .v = head_of(j, a->v, a->ldv, b, kv),
                  .grad = head_of(j, a->dy, a->lddy, b, h),
                  .dq = head_of(j, a->dq, a->lddq, b, h),
                  .lse = (const float *)a->lse + at,
                  .delta = (const float *)a->delta + at};
}

static void attention_igrad_group(const attention_job *j, const backward *w, int64_t b, int64_t g) {
    const hs_attention_igrad_args *a = j->igrad;
    const int64_t T = j->T, each = j->H / j->G, from = g * each, to = from + each;
    const head dk = head_of(j, a->dk, a->lddk, b, g), dv = head_of(j, a->dv, a->lddv, b, g);
    for (int64_t h = from; h < to; h++) {
        const pair p = pair_of(j, b, h);
        BY_DTYPE(j->dt, delta_rows_dt, p.grad, head_of(j, a->y, a->ldy, b, h), T, j->D,
                 (float *)a->delta + (b * j->H + h) * T);
        for (int64_t k0 = 0; w->kept && h == from && k0 < T; k0 += KEYS) lay_keys(j, w, &p, k0);
    }
    for (int64_t begin = 0; begin < T; begin += w->span) {
        const int64_t end = hs_min(T, begin + w->span);
        memset(w->dk, 0, (size_t)(w->span * j->wide) * sizeof(float));
        memset(w->dv, 0, (size_t)(w->span * j->wide) * sizeof(float));
        for (int64_t h = from; h < to; h++) {
            const pair p = pair_of(j, b, h);
            for (int64_t q0 = begin; q0 < T; q0 += ROWS)
                attention_igrad_rows(j, w, &p, q0, begin, end);
        }
        for (int64_t k0 = begin; k0 < end; k0 += KEYS) {
            const int64_t keys = hs_min(KEYS, T - k0), at = (k0 - begin) * j->wide;
            put_turned(dk, k0, keys, w->dk + at, KEYS, j->scale, NULL);
            put_turned(dv, k0, keys, w->dv + at, KEYS, 1.0f, NULL);
        }
    }
}

static void attention_igrad_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const attention_job *j = ctx;
    const backward w = backward_of(j, worker);
    for (int64_t i = begin; i < end; i++) attention_igrad_group(j, &w, i / j->G, i % j->G);
}

static void attention_igrad_op(hs_kernel_ctx *ctx, hs_attention_igrad_args *a) {
    attention_job j =
        attention_job_of(ctx, (int)a->dtype, a->T, a->H, a->G, a->D, a->scale, a->first, a->WINDOW);
    j.igrad = a;
    share_rows(ctx, a->B * a->G, a->T * a->T * a->D, attention_igrad_range, &j);
}
