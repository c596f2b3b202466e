/* Attention forward: the order of its sums is in attention.h. */
#include "kernels/cpu/attention.h"

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
    attention_job j =
        attention_job_of(ctx, (int)a->dtype, a->T, a->H, a->G, a->D, a->scale, a->first, a->WINDOW);
    j.fwd = a;
    share_rows(ctx, a->B * a->H, a->T * a->T * a->D, attention_fwd_range, &j);
}
