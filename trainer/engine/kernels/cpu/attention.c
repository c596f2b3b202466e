/* Causal attention in tiles, on products that read their operands where they lie (tile.h).
 *
 * Order of the sums, the same for every build and any number of threads:
 *
 *   chain   In f32 one of fma, ascending. In bf16 over pairs ascending, those of gemm.h: (2i, 2i+1) of d, of a
 *           head's keys or of its rows, an odd last one beside 0; p and ds are rounded to bf16 as they enter one
 *           (denormal numbers are zero), the sum of p and delta are of what they were before. A whole sum that is
 *           zero is +0.
 *   scores  one chain over d, then times scale.
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
 * what no row of a tile reads is left out, the same on every path. Where rows have a first key, a
 * maximum begins with LEAST, and sums with 0: a block may come before a row's first.
 *
 * Every operand is laid out once: turned, [d][row], or straight, [row][d]. A tile of scores
 * is an operand of the products that follow as it lies, in bf16 rounded: forward it is turned, [key][query], so that
 * what is done to a row of the mathematics is done to 16 of them side by side, and o is made turned
 * too; backward it is [query][key], dk and dv are made turned, and dq reads it by rows.
 *
 * Work is cut by (batch, head) forward and (batch, kv head) backward: one owner for each row of dk
 * and dv. Backward goes over heads, rows (ROWS of them at a time) and blocks of keys: dq of the rows
 * is finished in it, the running dk and dv of all keys wait in the scratch. Where those do not fit
 * it (T long), dk and dv are made of a span of keys at a time, dq with that of the row's own place:
 * scores with keys of earlier spans are computed twice. The chains, and so the bits, are the same.
 */
#include "kernels/attention.h"

#include "kernels/cpu/share.h"
#include "kernels/cpu/tile.h"
#include "kernels/cpu/vec_math.h"

enum {
    KEYS = TILE_ROW,  /* of a block */
    STRIP = 32,       /* queries of a tile forward; keys of one backward */
    WIDE = 6 * STRIP, /* queries that a block of keys is used for in a row, forward */
    ROWS = 96,        /* queries of a tile backward: whole tiles of registers on every path */
    SPAN = 192 /* a span of keys has a multiple of it: whole blocks, and whole tiles of rows */
};

#define LEAST (-0x1.fffffep127f) /* finite: a masked score less it is no NaN */

/* What both directions share of their arguments, and the arguments of the one that runs. */
typedef struct attention_job {
    const hs_attention_fwd_args *fwd;
    const hs_attention_igrad_args *igrad;
    float *scratch;
    int64_t T, H, G, D;
    int64_t wide; /* D in whole vectors */
    int pairs;    /* whether chains go over pairs */
    int64_t deep; /* rows of an operand over d (packed_length) */
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

/* Rows [0, return) of the tile from q0 on are those that read keys before `end`. Rows do not read
 * earlier keys than those above them. */
static int64_t rows_before(const attention_job *j, int64_t b, int64_t q0, int64_t rows,
                           int64_t end) {
    if (!j->banded) return rows;
    int64_t found = 0, above = rows;
    while (found < above) {
        int64_t middle = (found + above) / 2;
        if (low_of(j, b, q0 + middle) < end)
            found = middle + 1;
        else
            above = middle;
    }
    return found;
}

/* One head of one batch element. */
static head head_of(const attention_job *j, void *operand, int64_t ld, int64_t b, int64_t h) {
    return (head){(char *)operand + (b * j->T * ld + h * j->D) * dt_size(j->dt), ld, j->T, j->D,
                  j->dt};
}

/* -------------------- forward */

/* A worker's scratch. Strip s of a group of queries has its own at s STRIP times what a query has. */
typedef struct forward {
    float *queries;       /* [strip][deep][STRIP] */
    float *sums;          /* [strip][d][STRIP], the running o */
    float *tops, *totals; /* [WIDE] */
    float *score;         /* [KEYS][STRIP] */
    float *narrow;        /* the same in pairs */
    float *keys;          /* [block][deep][KEYS] */
    float *values;        /* [key][wide] */
    bool kept;            /* all blocks of a head are there; else there is room for one */
} forward;

static forward forward_of(const attention_job *j, int worker) {
    const int64_t all = hs_ceil_div(j->T, KEYS) * KEYS;
    float *at = j->scratch + (int64_t)worker * WORKER_FLOATS, *end = at + WORKER_FLOATS;
    forward f = {.queries = at};
    f.sums = f.queries + WIDE * j->deep;
    f.tops = f.sums + WIDE * j->wide;
    f.totals = f.tops + WIDE;
    f.score = f.totals + WIDE;
    f.narrow = f.score + KEYS * STRIP;
    f.keys = f.narrow + KEYS * STRIP;
    f.kept = all * j->deep + packed_length(all, j->pairs) * j->wide <= end - f.keys;
    f.values = f.keys + (f.kept ? all : KEYS) * j->deep;
    return f;
}

static void lay_block(const attention_job *j, const forward *f, head k, head v, int64_t k0) {
    const int64_t at = f->kept ? k0 : 0, keys = hs_min(KEYS, j->T - k0);
    lay_turned(f->keys + at * j->deep, KEYS, k, k0, keys);
    lay_straight(rows_from(matrix_of(f->values, j->wide), at, j->pairs).p, v, k0, keys);
}

/* A sum of each of LANES parts: part[0] = the tree of 8, 4, 2, 1. */
VINLINE void join_parts(vf *part) {
    for (int64_t step = LANES / 2; step; step /= 2)
        for (int64_t l = 0; l < step; l++) part[l] = v_add(part[l], part[l + step]);
}

/* A vector of queries goes on to a maximum and a sum of a block. shrink: what its sums so far are to be multiplied
 * with. */
VINLINE void go_on(float *tops, float *totals, float *shrink, vf top, vf sum) {
    vf factor = v_exp(v_sub(v_load(tops), top)); /* exactly 1 where the maximum stays */
    v_store(shrink, factor);
    v_store(totals, v_add(v_mul(v_load(totals), factor), sum));
    v_store(tops, top);
}

/* A vector of queries, in a tile of scores: z[u * STRIP] has key u's of each, and becomes its p in place.
 * Query l sees keys from unseen[l] (NULL: 0) up to seen + l. */
static void softmax_columns(float *z, int64_t keys, int64_t seen, const float *unseen, float scale,
                            float *tops, float *totals, float *shrink) {
    const vf sv = v_set1(scale), low = v_set1(-__builtin_inff()), lane = v_count_from(0.0f);
    const int64_t read = hs_min(keys, seen + LANES); /* by one of them */
    vf top = v_load(tops), part[LANES];
    for (int64_t u = 0; u < read; u++) {
        vf x = v_mul(v_load(z + u * STRIP), sv);
        if (u > seen) x = v_select_lt(lane, v_set1((float)(u - seen)), low, x);
        if (unseen) x = v_select_lt(v_set1((float)u), v_load(unseen), low, x);
        top = v_max(top, x);
        v_store(z + u * STRIP, x);
    }
    for (int64_t l = 0; l < LANES; l++) {
        part[l] = v_zero();
        for (int64_t u = l; u < read; u += LANES) {
            vf p = v_exp(v_sub(v_load(z + u * STRIP), top));
            part[l] = v_add(part[l], p);
            v_store(z + u * STRIP, p);
        }
    }
    for (int64_t u = read; u < keys; u++) v_store(z + u * STRIP, v_zero());
    join_parts(part);
    go_on(tops, totals, shrink, top, part[0]);
}

/* The same of a whole tile, whose queries see all KEYS keys: the same bits, with less to do. scale is above 0: the
 * largest score is the largest before it was scaled, too. */
static void softmax_tile(float *z, float scale, float *tops, float *totals, float *shrink) {
    const vf sv = v_set1(scale);
    vf part[2][LANES], most[2][2];
    for (int i = 0; i < 2; i++)
        most[i][0] = v_load(z + i * LANES), most[i][1] = v_load(z + STRIP + i * LANES);
    for (int64_t u = 2; u < KEYS; u += 2) {
        const float *zu = z + u * STRIP;
        most[0][0] = v_max(most[0][0], v_load(zu));
        most[1][0] = v_max(most[1][0], v_load(zu + LANES));
        most[0][1] = v_max(most[0][1], v_load(zu + STRIP));
        most[1][1] = v_max(most[1][1], v_load(zu + STRIP + LANES));
    }
    const vf top0 = v_max(v_load(tops), v_mul(v_max(most[0][0], most[0][1]), sv));
    const vf top1 = v_max(v_load(tops + LANES), v_mul(v_max(most[1][0], most[1][1]), sv));
#define AT(at)    z + (l + (at) * LANES) * STRIP + i
#define SCORE(at) v_sub(v_mul(v_load(AT(at)), sv), top)
    for (int64_t l = 0; l < LANES; l++)
        for (int64_t i = 0; i < STRIP; i += LANES) {
            const vf top = i ? top1 : top0;
            vf p[4] = {SCORE(0), SCORE(1), SCORE(2), SCORE(3)};
            v_exp4(p, 0);
            v_store(AT(0), p[0]), v_store(AT(1), p[1]), v_store(AT(2), p[2]), v_store(AT(3), p[3]);
            part[i / LANES][l] = v_add(v_add(v_add(p[0], p[1]), p[2]), p[3]);
        }
#undef AT
#undef SCORE
    join_parts(part[0]);
    join_parts(part[1]);
    go_on(tops, totals, shrink, top0, part[0][0]);
    go_on(tops + LANES, totals + LANES, shrink + LANES, top1, part[1][0]);
}

_Static_assert(KEYS == 4 * LANES && STRIP == 2 * LANES, "softmax_tile's");

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

/* What the block of keys from k0 on adds to strip s0 of the queries from q0 on. */
static void attention_fwd_tile(const attention_job *j, const forward *f, int64_t b, int64_t q0,
                               int64_t s0, int64_t queries, int64_t k0) {
    const int64_t t = q0 + s0, keys = hs_min(KEYS, t + queries - k0), at = f->kept ? k0 : 0;
    float *sums = f->sums + s0 * j->wide, shrink[STRIP];
    const matrix score = matrix_of(f->score, STRIP), narrow = matrix_of(f->narrow, STRIP);
    product(keys, queries, j->D, matrix_of(f->keys + at * j->deep, KEYS),
            matrix_of(f->queries + s0 * j->deep, STRIP), score, j->pairs, 0, NULL);
    const bool whole = queries == STRIP && k0 + KEYS <= t + 1 && low_of(j, b, t + STRIP - 1) <= k0;
    if (whole && j->scale > 0)
        softmax_tile(f->score, j->scale, f->tops + s0, f->totals + s0, shrink);
    for (int64_t i = 0; !(whole && j->scale > 0) && i < queries; i += LANES) {
        float unseen[LANES];
        const bool some = unseen_keys(j, b, t + i, k0, unseen);
        softmax_columns(f->score + i, keys, t + i - k0, some ? unseen : NULL, j->scale,
                        f->tops + s0 + i, f->totals + s0 + i, shrink + i);
    }
    /* the first block starts the chains (it masks no row wholly), later ones go on */
    const int later = j->banded || k0 > 0;
    if (j->pairs) narrow_rows(narrow, score, keys, queries);
    product(j->D, queries, keys, rows_from(matrix_of(f->values, j->wide), at, j->pairs),
            j->pairs ? narrow : score, matrix_of(sums, STRIP), j->pairs, later,
            later ? shrink : NULL);
}

static void attention_fwd_head(const attention_job *j, const forward *f, int64_t b, int64_t h) {
    const hs_attention_fwd_args *a = j->fwd;
    const int64_t T = j->T, kv = h / (j->H / j->G);
    head o = head_of(j, a->y, a->ldy, b, h), q = head_of(j, a->q, a->ldq, b, h);
    head k = head_of(j, a->k, a->ldk, b, kv), v = head_of(j, a->v, a->ldv, b, kv);
    float *lse = (float *)a->lse + (b * j->H + h) * T;
    const vf least = v_set1(j->banded ? LEAST : -__builtin_inff()), most = v_set1(3.0e38f);
    for (int64_t q0 = 0; q0 < T; q0 += WIDE) {
        int64_t rows = hs_min(WIDE, T - q0);
        for (int64_t s0 = 0; s0 < rows; s0 += STRIP)
            lay_turned(f->queries + s0 * j->deep, STRIP, q, q0 + s0, hs_min(STRIP, rows - s0));
        for (int64_t i = 0; i < WIDE; i += LANES)
            v_store(f->tops + i, least), v_store(f->totals + i, v_zero());
        if (j->banded) memset(f->sums, 0, (size_t)(WIDE * j->wide) * sizeof(float));
        for (int64_t k0 = low_of(j, b, q0) / KEYS * KEYS; k0 < q0 + rows; k0 += KEYS) {
            if (!f->kept) lay_block(j, f, k, v, k0);
            for (int64_t s0 = hs_max(0, k0 - q0); s0 < rows; s0 += STRIP) {
                if (low_of(j, b, q0 + s0) >= k0 + KEYS) break; /* nor do those below read it */
                attention_fwd_tile(j, f, b, q0, s0, hs_min(STRIP, rows - s0), k0);
            }
        }
        for (int64_t i = 0; i < rows; i += LANES) {
            vf total = v_load(f->totals + i); /* log passes on what is not finite */
            vf log = v_select_lt(total, most, v_log(total), total);
            v_store_n(lse + q0 + i, v_add(v_load(f->tops + i), log), rows - i);
        }
        for (int64_t s0 = 0; s0 < rows; s0 += STRIP)
            put_turned(o, q0 + s0, hs_min(STRIP, rows - s0), f->sums + s0 * j->wide, STRIP, 0,
                       f->totals + s0);
    }
}

static void attention_fwd_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const attention_job *j = ctx;
    const hs_attention_fwd_args *a = j->fwd;
    const forward f = forward_of(j, worker);
    for (int64_t i = begin, last = -1; i < end; i++) {
        int64_t b = i / j->H, kv = i % j->H / (j->H / j->G), group = b * j->G + kv;
        head k = head_of(j, a->k, a->ldk, b, kv), v = head_of(j, a->v, a->ldv, b, kv);
        for (int64_t k0 = 0; f.kept && group != last && k0 < j->T; k0 += KEYS)
            lay_block(j, &f, k, v, k0);
        last = group;
        attention_fwd_head(j, &f, b, i % j->H);
    }
}

static void attention_fwd_op(hs_kernel_ctx *ctx, hs_attention_fwd_args *a) {
    attention_job j = {.fwd = a,
                       .scratch = ctx->scratch,
                       .T = a->T,
                       .H = a->H,
                       .G = a->G,
                       .D = a->D,
                       .wide = wide_of(a->D),
                       .pairs = a->dtype == HS_BF16,
                       .deep = packed_length(a->D, a->dtype == HS_BF16),
                       .first = a->first,
                       .window = a->WINDOW,
                       .banded = a->first || a->WINDOW,
                       .scale = (float)a->scale,
                       .dt = (int)a->dtype};
    share_rows(ctx, a->B * a->H, a->T * a->T * a->D, attention_fwd_range, &j);
}

/* -------------------- backward */

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
    attention_job j = {.igrad = a,
                       .scratch = ctx->scratch,
                       .T = a->T,
                       .H = a->H,
                       .G = a->G,
                       .D = a->D,
                       .wide = wide_of(a->D),
                       .pairs = a->dtype == HS_BF16,
                       .deep = packed_length(a->D, a->dtype == HS_BF16),
                       .first = a->first,
                       .window = a->WINDOW,
                       .banded = a->first || a->WINDOW,
                       .scale = (float)a->scale,
                       .dt = (int)a->dtype};
    share_rows(ctx, a->B * a->G, a->T * a->T * a->D, attention_igrad_range, &j);
}
