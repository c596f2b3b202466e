/* Causal attention in tiles, on the packed micro kernel of gemm.h.
 *
 * Order of the sums, the same for every build and any number of threads:
 *
 *   scores  one chain of fma over d ascending, then times scale.
 *   fwd     Keys in blocks of KEYS, cut at its multiples. A block: the new maximum; p = exp(s - maximum); the sum
 *           of p in 16 lane partials (lane = key % 16) joined by v_sum; shrink = exp(old maximum -
 *           new); l = l shrink + sum; o = o shrink, then one chain over the block's keys.
 *           At the end o / l, and lse = maximum + log l.
 *   igrad   p = exp(s - lse). dq: one chain over keys ascending. dk, dv: one chain over the heads
 *           of the group ascending, rows ascending inside a head. Then times scale, rounded once.
 *
 * A masked key, after a row or before the first that it reads, has p = 0 exactly and leaves every
 * chain as it was (unless its v, q or dy is not finite: 0 times that is NaN, so such a number also
 * shows in other rows of the same tile). So what a tile's other rows read never shows in a row, and
 * blocks that no row of a tile reads are left out. Where rows have a first key, a maximum begins
 * with LEAST, and sums with 0: a block may come before a row's first.
 *
 * Tiles of scores lie turned, keys as rows: what is done to a row of the mathematics is done to 16 of
 * them side by side, and p is packed without a transposition.
 *
 * Work is cut by (batch, head) forward and (batch, kv head) backward: one owner for each row of dk
 * and dv. Backward goes over tiles of keys (outside) and rows (inside): dk and dv of the tile are
 * finished in it, the running dq of every row of the group's heads waits in the scratch. Where
 * those do not fit it (T long), dq is made before, by itself: rows outside, keys inside, the scores
 * computed twice. The chains, and so the bits, are the same.
 */
#include "kernels/attention.h"

#include "kernels/cpu/gemm.h"
#include "kernels/cpu/share.h"
#include "kernels/cpu/vec_math.h"

/* Rows of a tile, packed once, and its columns. WIDE is a multiple of KEYS. */
enum { WIDE = 192, KEYS = 64 };

#define LEAST (-0x1.fffffep127f) /* finite: a masked score less it is no NaN */

#define HEAD_PAD ((HS_ATTENTION_HEAD_MAX + NR - 1) / NR * NR)

/* A worker's scratch. 64: see PACK_A. */
typedef struct attention_scratch {
    float rows0[WIDE * HEAD_PAD + 64], rows1[WIDE * HEAD_PAD + 64]; /* packed rows (A) */
    float cols0[KEYS * HEAD_PAD], cols1[KEYS * HEAD_PAD];           /* packed columns (B) */
    float score[WIDE * KEYS], other[WIDE * KEYS], packed[WIDE * KEYS + 64];
    float sum0[WIDE * HEAD_PAD], sum1[WIDE * HEAD_PAD]; /* running sums */
    float top[WIDE], total[WIDE];
    float keys[WIDE * HEAD_PAD]; /* a tile's keys, packed by row */
    float rest[]; /* forward: a head's keys and values, packed; backward: dq of a group's heads */
} attention_scratch;

_Static_assert(sizeof(attention_scratch) <= (size_t)WORKER_FLOATS * sizeof(float),
               "scratch of a worker");

#define REST_FLOATS ((int64_t)WORKER_FLOATS - (int64_t)(sizeof(attention_scratch) / sizeof(float)))

/* What both directions share of their arguments, and the arguments of the one that runs. */
typedef struct attention_job {
    const hs_attention_fwd_args *fwd;
    const hs_attention_igrad_args *igrad;
    attention_scratch *scratch;
    int64_t T, H, G, D;
    const int32_t *first;
    int64_t window;
    bool banded; /* there are rows that do not read all before them */
    float scale;
    int dt;
} attention_job;

/* The first key that row t reads. */
static int64_t low_of(const attention_job *j, int64_t b, int64_t t) {
    return hs_first_read(j->first, b * j->T + t, t, j->window);
}

/* Rows [0, return) of the tile from q0 on hold all that read keys before `end`, and whole groups of
 * `unit`. Rows do not read earlier keys than those above them. */
static int64_t rows_before(const attention_job *j, int64_t b, int64_t q0, int64_t rows, int64_t end,
                           int64_t unit) {
    if (!j->banded) return rows;
    int64_t found = 0, above = rows;
    while (found < above) {
        int64_t middle = (found + above) / 2;
        if (low_of(j, b, q0 + middle) < end)
            found = middle + 1;
        else
            above = middle;
    }
    return hs_min(rows, hs_ceil_div(found, unit) * unit);
}

static attention_scratch *scratch_of(const attention_job *j, int worker) {
    return (attention_scratch *)(void *)((float *)(void *)j->scratch +
                                         (size_t)worker * WORKER_FLOATS);
}

/* One head of one batch element: T rows, ld apart, D wide. */
typedef struct head {
    void *p;
    int64_t ld;
    int dt;
} head;

static head head_of(const attention_job *j, void *operand, int64_t ld, int64_t b, int64_t h) {
    return (head){(char *)operand + (b * j->T * ld + h * j->D) * dt_size(j->dt), ld, j->dt};
}

/* (row, d) and (d, row) of a head as the side of a product whose inner index is d, or the row */
static side inner_d(head h) {
    return (side){h.p, h.ld, 1, h.dt};
}
static side inner_row(head h) {
    return (side){h.p, 1, h.ld, h.dt};
}

/* out[row0 + i][d] = sum[i][d] times or divided by something */
VINLINE void put_rows_dt(head out, int64_t row0, int64_t rows, int64_t D, const float *sum,
                         float times, const float *over, int dt) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t d = 0; d < D; d += LANES) {
            vf x = v_load_n(sum + i * D + d, D - d);
            x = over ? v_div(x, v_set1(over[i])) : v_mul(x, v_set1(times));
            v_store_dt_n(out.p, (row0 + i) * out.ld + d, x, D - d, dt);
        }
}

static void put_rows(head out, int64_t row0, int64_t rows, int64_t D, const float *sum, float times,
                     const float *over) {
    BY_DTYPE(out.dt, put_rows_dt, out, row0, rows, D, sum, times, over);
}

/* Rows [first, rows) of a tile: packed rows times packed columns. Rows before it in first's panel
 * come along. */
static void scores(float *tile, const float *packed_rows, const float *packed_cols, int64_t first,
                   int64_t rows, int64_t cols, int64_t D) {
    int64_t skip = first / MR * MR;
    multiply_packed(rows - skip, cols, D, packed_rows + skip * D, packed_cols, tile + skip * KEYS,
                    KEYS, 0);
}

/* -------------------- forward */

/* Queries [i, i + LANES) of a tile of scores, turned (rows are keys, columns queries): a vector has
 * a key's score of each, and becomes its p in place. Query i + l sees keys from unseen[l] (NULL: 0)
 * up to seen + l. shrink: what the sums so far are to be multiplied with. */
static void softmax_columns(attention_scratch *s, int64_t i, int64_t keys, int64_t seen,
                            const float *unseen, float scale, float *shrink) {
    float *z = s->score + i;
    const vf sv = v_set1(scale), low = v_set1(-__builtin_inff()), lane = v_count_from(0.0f);
    const vf old = v_load(s->top + i);
    vf top = old, part[LANES];
    for (int64_t u = 0; u < keys; u++) {
        vf x = v_mul(v_load(z + u * WIDE), sv);
        if (u > seen) x = v_select_lt(lane, v_set1((float)(u - seen)), low, x);
        if (unseen) x = v_select_lt(v_set1((float)u), v_load(unseen), low, x);
        top = v_max(top, x);
        v_store(z + u * WIDE, x);
    }
    for (int64_t l = 0; l < LANES; l++) {
        part[l] = v_zero();
        for (int64_t u = l; u < keys; u += LANES) {
            vf p = v_exp(v_sub(v_load(z + u * WIDE), top));
            part[l] = v_add(part[l], p);
            v_store(z + u * WIDE, p);
        }
    }
    for (int64_t step = LANES / 2; step; step /= 2)
        for (int64_t l = 0; l < step; l++) part[l] = v_add(part[l], part[l + step]);
    vf factor = v_exp(v_sub(old, top)); /* exactly 1 where the maximum stays */
    v_store(shrink, factor);
    v_store(s->total + i, v_add(v_mul(v_load(s->total + i), factor), part[0]));
    v_store(s->top + i, top);
}

/* By query of [t, t + LANES), how many of the keys from k0 on come before the first that it reads.
 * False: none does, for any. */
static bool unseen_keys(const attention_job *j, int64_t b, int64_t t, int64_t k0, float *unseen) {
    int64_t most = 0;
    for (int64_t l = 0; j->banded && l < LANES; l++) {
        int64_t count = t + l < j->T ? hs_max(0, low_of(j, b, t + l) - k0) : 0;
        unseen[l] = (float)hs_min(KEYS, count);
        most = hs_max(most, count);
    }
    return most > 0;
}

/* The keys and values of a head, packed by blocks of KEYS, where they fit the scratch: one head of
 * many may use them. Else NULL. */
static const float *packed_head(attention_scratch *s, const attention_job *j, const side *k_d,
                                const side *v_row, const float **values) {
    const int64_t T = j->T, D = j->D, wide = hs_ceil_div(D, NR) * NR;
    const int64_t blocks = hs_ceil_div(T, KEYS);
    float *keys = s->rest, *at = keys + blocks * KEYS * D + 64;
    if (blocks * KEYS * (D + wide) + 64 > REST_FLOATS) return NULL;
    for (int64_t k0 = 0; k0 < T; k0 += KEYS) {
        pack_a(keys + k0 * D, k_d, k0, hs_min(KEYS, T - k0), T, 0, D);
        pack_b(at + k0 * wide, v_row, 0, D, D, k0, hs_min(KEYS, T - k0));
    }
    *values = at;
    return keys;
}

static void attention_fwd_head(const attention_job *j, attention_scratch *s, int64_t b, int64_t h,
                               const float *keys_packed, const float *values_packed) {
    const hs_attention_fwd_args *a = j->fwd;
    const int64_t T = j->T, D = j->D, kv = h / (j->H / j->G), wide = hs_ceil_div(D, NR) * NR;
    head o = head_of(j, a->y, a->ldy, b, h), q = head_of(j, a->q, a->ldq, b, h);
    head k = head_of(j, a->k, a->ldk, b, kv), v = head_of(j, a->v, a->ldv, b, kv);
    float *lse = (float *)a->lse + (b * j->H + h) * T;
    side q_d = inner_d(q), k_d = inner_d(k), v_row = inner_row(v);
    for (int64_t q0 = 0; q0 < T; q0 += WIDE) {
        int64_t rows = hs_min(WIDE, T - q0);
        pack_b(s->rows0, &q_d, q0, rows, T, 0, D);
        const float top = j->banded ? LEAST : -__builtin_inff();
        for (int64_t i = 0; i < WIDE; i++) s->top[i] = top, s->total[i] = 0;
        if (j->banded) memset(s->sum0, 0, (size_t)(rows * D) * sizeof(float));
        for (int64_t k0 = low_of(j, b, q0) / KEYS * KEYS; k0 < q0 + rows; k0 += KEYS) {
            int64_t keys = hs_min(KEYS, T - k0),
                    first = hs_max(0, k0 - q0); /* rows before it see no key */
            int64_t end = rows_before(j, b, q0, rows, k0 + keys, LANES); /* nor those from it on */
            if (end <= first) continue;
            const bool later = j->banded || k0 > 0;
            const float *key = s->rows1, *value = s->cols1;
            if (keys_packed) {
                key = keys_packed + k0 * D, value = values_packed + k0 * wide;
            } else {
                pack_a(s->rows1, &k_d, k0, keys, T, 0, D);
                pack_b(s->cols1, &v_row, 0, D, D, k0, keys);
            }
            multiply_packed(keys, end - first, D, key, s->rows0 + first * D, s->score + first, WIDE,
                            0);
            for (int64_t i = first; i < end; i += LANES) {
                float shrink[LANES], unseen[LANES];
                bool some = unseen_keys(j, b, q0 + i, k0, unseen);
                softmax_columns(s, i, keys, q0 + i - k0, some ? unseen : NULL, j->scale, shrink);
                for (int64_t l = 0; later && l < hs_min(LANES, end - i); l++) {
                    if (shrink[l] == 1.0f) continue;
                    float *sum = s->sum0 + (i + l) * D;
                    for (int64_t d = 0; d < D; d += LANES)
                        v_store_n(sum + d, v_mul(v_load_n(sum + d, D - d), v_set1(shrink[l])),
                                  D - d);
                }
            }
            side p = {s->score, 1, WIDE, HS_F32};
            pack_a(s->packed, &p, first, end - first, WIDE, 0, keys);
            /* the first block starts the chains (it masks no row wholly), later ones go on */
            multiply_packed(end - first, D, keys, s->packed, value, s->sum0 + first * D, D, later);
        }
        put_rows(o, q0, rows, D, s->sum0, 0, s->total);
        for (int64_t i = 0; i < rows; i++) lse[q0 + i] = s->top[i] + log1_f32(s->total[i]);
    }
}

static void attention_fwd_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const attention_job *j = ctx;
    const hs_attention_fwd_args *a = j->fwd;
    attention_scratch *s = scratch_of(j, worker);
    const float *keys = NULL, *values = NULL;
    for (int64_t i = begin, last = -1; i < end; i++) {
        int64_t b = i / j->H, kv = i % j->H / (j->H / j->G), group = b * j->G + kv;
        if (group != last) {
            side k_d = inner_d(head_of(j, a->k, a->ldk, b, kv));
            side v_row = inner_row(head_of(j, a->v, a->ldv, b, kv));
            keys = packed_head(s, j, &k_d, &v_row, &values);
        }
        last = group;
        attention_fwd_head(j, s, b, i % j->H, keys, values);
    }
}

static void attention_fwd_op(hs_kernel_ctx *ctx, hs_attention_fwd_args *a) {
    attention_job j = {.fwd = a,
                       .scratch = ctx->scratch,
                       .T = a->T,
                       .H = a->H,
                       .G = a->G,
                       .D = a->D,
                       .first = a->first,
                       .window = a->WINDOW,
                       .banded = a->first || a->WINDOW,
                       .scale = (float)a->scale,
                       .dt = (int)a->dtype};
    share_rows(ctx, a->B * a->H, a->T * a->T * a->D, attention_fwd_range, &j);
}

/* -------------------- backward */

VINLINE void delta_rows_dt(head grad, head out, int64_t T, int64_t D, float *delta, int dt) {
    for (int64_t t = 0; t < T; t++) {
        vf sum = v_zero();
        for (int64_t d = 0; d < D; d += LANES)
            sum = v_fma(v_load_dt_n(grad.p, t * grad.ld + d, D - d, dt),
                        v_load_dt_n(out.p, t * out.ld + d, D - d, dt), sum);
        delta[t] = v_sum(sum);
    }
}

static void delta_rows(head grad, head out, int64_t T, int64_t D, float *delta) {
    BY_DTYPE(grad.dt, delta_rows_dt, grad, out, T, D, delta);
}

/* dq of one head. s->score becomes ds. */
static void attention_dq(const attention_job *j, attention_scratch *s, int64_t b, head dq,
                         head grad, head q, head k, head v, const float *lse, const float *delta) {
    const int64_t T = j->T, D = j->D;
    const vf sv = v_set1(j->scale);
    side q_d = inner_d(q), k_d = inner_d(k), v_d = inner_d(v), grad_d = inner_d(grad),
         k_row = inner_row(k);
    for (int64_t q0 = 0; q0 < T; q0 += WIDE) {
        int64_t rows = hs_min(WIDE, T - q0);
        pack_a(s->rows0, &q_d, q0, rows, T, 0, D);
        pack_a(s->rows1, &grad_d, q0, rows, T, 0, D);
        if (j->banded) memset(s->sum0, 0, (size_t)(rows * D) * sizeof(float));
        for (int64_t k0 = low_of(j, b, q0) / KEYS * KEYS; k0 < q0 + rows; k0 += KEYS) {
            int64_t keys = hs_min(KEYS, T - k0), first = hs_max(0, k0 - q0);
            /* whole panels, as they were packed */
            int64_t end = rows_before(j, b, q0, rows, k0 + keys, MR);
            if (end <= first) continue;
            pack_b(s->cols0, &k_d, k0, keys, T, 0, D);
            scores(s->score, s->rows0, s->cols0, first, end, keys, D);
            pack_b(s->cols1, &v_d, k0, keys, T, 0, D);
            scores(s->other, s->rows1, s->cols1, first, end, keys, D);
            for (int64_t i = first; i < end; i++) {
                int64_t valid = hs_min(keys, q0 + i - k0 + 1);
                int64_t unseen = hs_min(keys, low_of(j, b, q0 + i) - k0);
                vf lv = v_set1(lse[q0 + i]), dv = v_set1(delta[q0 + i]);
                for (int64_t u = 0; u < keys; u += LANES) {
                    float *z = s->score + i * KEYS + u;
                    vf p = v_exp(v_sub(v_mul(v_load(z), sv), lv));
                    vf ds = v_mul(p, v_sub(v_load(s->other + i * KEYS + u), dv));
                    vf at = v_count_from((float)u);
                    if (u + LANES > valid) ds = v_select_lt(at, v_set1((float)valid), ds, v_zero());
                    if (u < unseen) ds = v_select_lt(at, v_set1((float)unseen), v_zero(), ds);
                    v_store(z, ds);
                }
            }
            side ds = {s->score, KEYS, 1, HS_F32};
            pack_a(s->packed, &ds, first, end - first, rows, 0, keys);
            pack_b(s->cols0, &k_row, 0, D, D, k0, keys);
            /* the first block starts the chains (it masks no row wholly), later ones go on */
            multiply_packed(end - first, D, keys, s->packed, s->cols0, s->sum0 + first * D, D,
                            j->banded || k0 > 0);
        }
        put_rows(dq, q0, rows, D, s->sum0, j->scale, NULL);
    }
}

/* dk and dv of keys [k0, k0 + WIDE): what one query head adds; and, where dq is not NULL, what these
 * keys add to that head's. Tiles are turned: rows are keys, columns queries. */
static void attention_dkv(const attention_job *j, attention_scratch *s, int64_t b, int64_t k0,
                          int64_t keys, head grad, head q, head k, const float *lse,
                          const float *delta, float *dq) {
    const int64_t T = j->T, D = j->D;
    const vf sv = v_set1(j->scale);
    int64_t packed_keys = 0; /* of s->keys */
    side k_row = inner_row(k);
    side q_d = inner_d(q), grad_d = inner_d(grad), q_row = inner_row(q), grad_row = inner_row(grad);
    for (int64_t q0 = k0; q0 < T; q0 += KEYS) {
        int64_t queries = hs_min(KEYS, T - q0);
        if (low_of(j, b, q0) >= k0 + keys) break; /* nor does any later query read one of them */
        float
            unseen[KEYS]; /* by query, so many of these keys come before the first that it reads */
        int64_t most = 0;
        for (int64_t u = 0; j->banded && u < KEYS; u++) {
            most = hs_max(most, u < queries ? low_of(j, b, q0 + u) - k0 : 0);
            unseen[u] = (float)hs_min(keys, most);
        }
        int64_t seen =
            hs_min(keys, q0 + queries - k0); /* keys behind it are masked for all these queries */
        int64_t panels =
            hs_min(keys, hs_ceil_div(seen, MR) * MR); /* whole panels, as they were packed */
        pack_b(s->cols0, &q_d, q0, queries, T, 0, D);
        scores(s->score, s->rows0, s->cols0, 0, panels, queries, D);
        pack_b(s->cols1, &grad_d, q0, queries, T, 0, D);
        scores(s->other, s->rows1, s->cols1, 0, panels, queries, D);
        for (int64_t i = 0; i < seen; i++) {
            vf first = v_set1((float)(k0 + i - q0)); /* queries before it do not see key i */
            for (int64_t u = 0; u < queries; u += LANES) {
                float *z = s->score + i * KEYS + u, *y = s->other + i * KEYS + u;
                vf lv = v_load_n(lse + q0 + u, queries - u),
                   dv = v_load_n(delta + q0 + u, queries - u);
                vf p = v_exp(v_sub(v_mul(v_load(z), sv), lv));
                vf ds = v_mul(p, v_sub(v_load(y), dv));
                if (q0 < k0 + keys) {
                    vf at = v_count_from((float)u);
                    p = v_select_lt(at, first, v_zero(), p);
                    ds = v_select_lt(at, first, v_zero(), ds);
                }
                if (i < most) {
                    vf at = v_set1((float)i), from = v_load(unseen + u);
                    p = v_select_lt(at, from, v_zero(), p);
                    ds = v_select_lt(at, from, v_zero(), ds);
                }
                v_store(z, p);
                v_store(y, ds);
            }
        }
        side p = {s->score, KEYS, 1, HS_F32}, ds = {s->other, KEYS, 1, HS_F32};
        pack_a(s->packed, &p, 0, seen, seen, 0, queries);
        pack_b(s->cols0, &grad_row, 0, D, D, q0, queries);
        multiply_packed(seen, D, queries, s->packed, s->cols0, s->sum1, D, 1);
        pack_a(s->packed, &ds, 0, seen, seen, 0, queries);
        pack_b(s->cols0, &q_row, 0, D, D, q0, queries);
        multiply_packed(seen, D, queries, s->packed, s->cols0, s->sum0, D, 1);
        if (!dq) continue;
        side turned = {s->other, 1, KEYS, HS_F32};
        pack_a(s->packed, &turned, 0, queries, KEYS, 0, seen);
        if (seen != packed_keys) pack_b(s->keys, &k_row, 0, D, D, k0, seen);
        packed_keys = seen;
        multiply_packed(queries, D, seen, s->packed, s->keys, dq + q0 * D, D, j->banded || k0 > 0);
    }
}

static void attention_igrad_group(const attention_job *j, attention_scratch *s, int64_t b,
                                  int64_t g) {
    const hs_attention_igrad_args *a = j->igrad;
    const int64_t T = j->T, D = j->D, each = j->H / j->G;
    head dk = head_of(j, a->dk, a->lddk, b, g), dv = head_of(j, a->dv, a->lddv, b, g);
    head k = head_of(j, a->k, a->ldk, b, g), v = head_of(j, a->v, a->ldv, b, g);
    const float *lse = (const float *)a->lse + b * j->H * T;
    float *delta = (float *)a->delta + b * j->H * T;
    const bool at_once = each * T * D <= REST_FLOATS;
    for (int64_t h = g * each; h < (g + 1) * each; h++) {
        head dq = head_of(j, a->dq, a->lddq, b, h), grad = head_of(j, a->dy, a->lddy, b, h);
        delta_rows(grad, head_of(j, a->y, a->ldy, b, h), T, D, delta + h * T);
        if (at_once) continue;
        attention_dq(j, s, b, dq, grad, head_of(j, a->q, a->ldq, b, h), k, v, lse + h * T,
                     delta + h * T);
    }
    side k_d = inner_d(k), v_d = inner_d(v);
    if (at_once && j->banded) memset(s->rest, 0, (size_t)(each * T * D) * sizeof(float));
    for (int64_t k0 = 0; k0 < T; k0 += WIDE) {
        int64_t keys = hs_min(WIDE, T - k0);
        pack_a(s->rows0, &k_d, k0, keys, T, 0, D);
        pack_a(s->rows1, &v_d, k0, keys, T, 0, D);
        memset(s->sum0, 0, (size_t)(keys * D) * sizeof(float));
        memset(s->sum1, 0, (size_t)(keys * D) * sizeof(float));
        for (int64_t h = g * each; h < (g + 1) * each; h++)
            attention_dkv(j, s, b, k0, keys, head_of(j, a->dy, a->lddy, b, h),
                          head_of(j, a->q, a->ldq, b, h), k, lse + h * T, delta + h * T,
                          at_once ? s->rest + (h - g * each) * T * D : NULL);
        put_rows(dk, k0, keys, D, s->sum0, j->scale, NULL);
        put_rows(dv, k0, keys, D, s->sum1, 1.0f, NULL);
    }
    for (int64_t h = g * each; at_once && h < (g + 1) * each; h++)
        put_rows(head_of(j, a->dq, a->lddq, b, h), 0, T, D, s->rest + (h - g * each) * T * D,
                 j->scale, NULL);
}

static void attention_igrad_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const attention_job *j = ctx;
    for (int64_t i = begin; i < end; i++)
        attention_igrad_group(j, scratch_of(j, worker), i / j->G, i % j->G);
}

static void attention_igrad_op(hs_kernel_ctx *ctx, hs_attention_igrad_args *a) {
    attention_job j = {.igrad = a,
                       .scratch = ctx->scratch,
                       .T = a->T,
                       .H = a->H,
                       .G = a->G,
                       .D = a->D,
                       .first = a->first,
                       .window = a->WINDOW,
                       .banded = a->first || a->WINDOW,
                       .scale = (float)a->scale,
                       .dt = (int)a->dtype};
    share_rows(ctx, a->B * a->G, a->T * a->T * a->D, attention_igrad_range, &j);
}
