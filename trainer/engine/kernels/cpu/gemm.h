/* Matrix product of the fast set: C[m,n] = start + sum over k of A[m,k] B[n,k], packed and
 * register-tiled.
 *
 * Order contract: every element of C is ONE chain of fma, from 0 or from the old C, over k
 * ascending where an operand is f32. Where both are bf16 or FP8 (which bf16 holds exactly) k goes in
 * pairs, the odd one first: c = fma(a[2p], b[2p], fma(a[2p+1], b[2p+1], c)), an odd k being padded
 * with +0, and denormals count as zero of their sign: in operands, in c, and as results. That is
 * VDPBF16PS, which the path avx512_bf16 computes it with; the others do it by two fma each in the
 * processor's own mode for that (flush.h). Tiles, blocks of k (the f32 accumulator is carried
 * between them exactly), remainders and threads do not show in the result.
 *
 * Packing (pack.h): a worker packs A once for every block of columns, and adds its rows up meanwhile where a bias's
 * gradient is wanted. A panel of B is packed while, or right after, the one before it is multiplied; where there are more
 * rows than a block it is kept for the others if B fits the scratch, or if a block of its k does beside all the sums,
 * which then wait for the next one; else two panels take turns in the near caches. With AVX-512 the loops of tiles pack a
 * B whose columns lie side by side in memory: they have room for it. What will be packed next, where a panel's sums go or
 * begin, and what they are added to, is asked for from memory meanwhile, a line with every k; and what a tile begins or
 * ends with once more right before it is needed: in the nearest cache nothing outlasts a tile, least of all rows that lie
 * a multiple of 4 KiB apart. A tile is finished (bias, residual, rounding) as soon as its sums are whole, in f32 before
 * they leave the registers. Between tiles a worker does slices of what waits (kernels/deferred.h), whose memory was asked
 * for in the same way.
 * Measured figures: docs/, from tests/bench/bench_kernels.py.
 */
#ifndef HS_KERNELS_CPU_GEMM_H
#define HS_KERNELS_CPU_GEMM_H

#include "core/ints.h"
#include "core/threads.h"
#include "kernels/cpu/flush.h"
#include "kernels/cpu/micro.h"
#include "kernels/cpu/pack.h"
#include "kernels/deferred.h"
#include "kernels/kernels.h"

/* Blocks of rows and of k; what a worker has for its packed operands and its sums, in floats, alike on all paths: the
 * portable one tells it. */
enum {
    MC = 264,
    /* words of a panel. With AVX-512 a long one: a tile begins and ends seldom, and what it reads comes from the second
     * level in time; MC of them are most of it. Elsewhere a panel of B stays in the first level, A in the second. */
    KC = HS_VEC == 2 ? 768 : 384,
    KC_PAIRS = HS_DOT ? 2 * 512 : KC, /* of k; a word has two */
    KC_LEAST = KC / 2,                /* where that lets more columns stay */
    WORKER_FLOATS = (1 << 20) + MC * (384 + 1024) + 128
};

/* What is asked for beside a panel's tiles (ahead.h). */
enum {
    NEXT_A, /* of A, what will be packed next */
    NEXT_B, /* the next panel of B, packed or as it lies in memory; where columns lie side by side, */
    END_OF_B, /* this is the last line of every k */
    SUMS,     /* what the next panel's sums begin with, or where they are made */
    OUT,      /* where the finished panel goes */
    RESIDUAL, /* what it is added to */
    AHEADS
};

/* -------------------- what becomes of the sums */

typedef struct gemm {
    int64_t m, n, k;
    side a, b;
    void *out;
    int64_t ld_out;
    int dt_out;
    int from_old;                   /* out is f32 and each chain starts from it */
    int add_old;                    /* the old out is added at the end */
    const float *scale_a, *scale_b; /* each sum is multiplied with both, one by one; NULL: not */
    const float *bias;              /* [n], added at the end; NULL: none */
    const void *res;                /* [m, n] of dt_out, added after the bias; NULL: none */
    int64_t ld_res;
    float *sums_a; /* [m], to which A's rows are added, k ascending; NULL: none. Asks for a.row 1 */
} gemm;

/* Columns [j, j + n), n <= 16, of rows [i, i + m) of the output, from c (rows ldc apart); their bias is at
 * `bias`. */
VINLINE void finish_lanes(const gemm *g, const float *c, int64_t ldc, int64_t i, int64_t m,
                          int64_t j, int64_t n, int dt) {
    const vf bias = g->bias ? v_load_n(g->bias + j, n) : v_zero();
    for (int64_t end = i + m; i < end; i++, c += ldc) {
        const int64_t at = i * g->ld_out + j;
        vf x = v_load_n(c, n);
        if (g->scale_a) x = v_mul(v_mul(x, v_set1(*g->scale_a)), v_set1(*g->scale_b));
        if (g->bias) x = v_add(x, bias);
        if (g->res) x = v_add(x, v_load_dt_n(g->res, i * g->ld_res + j, n, dt));
        if (g->add_old) x = v_add(x, v_load_dt_n(g->out, at, n, dt));
        v_store_dt_n(g->out, at, x, n, dt);
    }
}

VINLINE void finish_dt(const gemm *g, const float *c, int64_t ldc, int64_t i, int64_t m, int64_t j,
                       int64_t n, int dt) {
    for (; n >= LANES; n -= LANES, j += LANES, c += LANES)
        finish_lanes(g, c, ldc, i, m, j, LANES, dt);
    if (n > 0) finish_lanes(g, c, ldc, i, m, j, n, dt);
}

/* Where whole sums go: the first of them is element (i, j) of g's output. */
typedef struct place {
    const gemm *g;
    int64_t i, j;
} place;

/* Those of c[m, n], from row `first` on. Not inlined: it computes in the usual mode, its caller may not. */
static __attribute__((noinline)) void finish(const place *to, const float *c, int64_t ldc,
                                             int64_t first, int64_t m, int64_t n) {
    BY_DTYPE(to->g->dt_out, finish_dt, to->g, c, ldc, to->i + first, m, to->j, n);
}

/* The same of f32 that nothing multiplies, for a tile itself to do; out is NULL where it is another. */
static ending ending_of(const place *to) {
    const gemm *g = to->g;
    if (g->dt_out != HS_F32 || g->scale_a) return (ending){0};
    return (ending){.out = (float *)g->out + to->i * g->ld_out + to->j,
                    .ld = g->ld_out,
                    .bias = g->bias ? g->bias + to->j : NULL,
                    .res = g->res ? (const float *)g->res + to->i * g->ld_res + to->j : NULL,
                    .ld_res = g->ld_res,
                    .add_old = g->add_old};
}

/* -------------------- what is done beside products (kernels/deferred.h) */

/* Steps of whole tiles' loops beside which an item is done: each asks for a line at most, and an item has 256. */
enum { STEPS_AN_ITEM = 320 };

typedef struct beside {
    hs_deferred *deferred;
    int worker;
    hs_deferred_slice slice; /* taken: its memory is asked for */
    int64_t steps;           /* since the last slice */
    ahead reads[HS_DEFERRED_READS];
} beside;

static void beside_take(beside *with) {
    with->slice = hs_deferred_take(with->deferred, with->worker);
    const hs_deferred_call *call = with->slice.call;
    const int64_t first = with->slice.begin * HS_DEFERRED_ITEM;
    for (int i = 0; call && i < HS_DEFERRED_READS; i++) {
        const hs_deferred_range *r = &call->touches[i];
        const int64_t bytes = (with->slice.end - with->slice.begin) * HS_DEFERRED_ITEM * r->element;
        with->reads[i] = spread((const char *)r->at + first * r->element, 0, 1, bytes, 1);
    }
}

static beside beside_begin(const hs_kernel_ctx *ctx, int worker) {
    beside with = {.deferred = ctx->deferred, .worker = worker};
    if (with.deferred) beside_take(&with);
    return with;
}

/* After a tile whose loop is as much work as so many steps of a whole one: the slices that are due. */
static void beside_tile(beside *with, int64_t steps) {
    with->steps += steps;
    while (with->slice.call) {
        const int64_t due = (with->slice.end - with->slice.begin) * STEPS_AN_ITEM;
        if (with->steps < due) return;
        with->steps -= due;
        hs_deferred_do(with->deferred, &with->slice, with->worker);
        beside_take(with);
    }
}

static void beside_end(beside *with) {
    if (with->slice.call) hs_deferred_do(with->deferred, &with->slice, with->worker);
}

enum {
    LAST = 2 * MR,        /* lines of ask_rows, */
    LATE = 6,             /* so many turns before the loop's end */
    LINE = 60,            /* bytes to the last float of a line */
    ASKS_TWICE = 4 * LAST /* in a loop of so many turns: others are over too soon */
};

/* c[m, n] (f32, rows ldc apart), n <= NR, from A's packed panels and one of B, each kn long. next: AHEADS of what is to
 * be asked for meanwhile (kn <= KC then). then: a panel of g's B that is packed meanwhile. whole: each tile is finished
 * and goes there (c is one tile's room if nothing is loaded); NULL: it stays in c. with: what waits is done beside it */
static void multiply_panel(int64_t m, int64_t n, int64_t kn, int pairs, const float *a,
                           const float *b, float *c, int64_t ldc, int load, ahead *next,
                           const gemm *g, panel *then, const place *whole, beside *with) {
    const int flushes = pairs && !HS_DOT;       /* VDPBF16PS does not ask for the mode */
    const int64_t most = flushes ? kn / 2 : kn; /* turns of a tile's loop */
    const int64_t soon = kn < 48 ? 2 * MR : MR; /* a short tile is over before its lines came */
    const int64_t step = whole && !load ? 0 : ldc;
    const int twice = ASKS_WITHIN && most >= ASKS_TWICE, sums = twice && step && load;
    const int outs = twice && whole && g->dt_out == HS_F32;
    int64_t far = twice ? most - LATE : most; /* turns for what is asked for the first time */
    const int64_t at_sums = sums ? far -= LAST : 0;
    const int64_t at_out = outs ? far -= LAST : 0; /* of bf16 a row is a line: nothing was gained */
    const char *res = outs ? g->res : NULL;
    const int64_t at_res = res ? far -= LAST : 0;
    ending end = whole && !pairs ? ending_of(whole) : (ending){0};
    const int ends = end.out != NULL;
    flush_mode before = flushes ? flush_begin() : 0;
    for (int64_t i = 0, mr; i < m; i += mr) {
        float *tile = c + i * step;
        mr = rows_of_tile(m - i);
        for (int64_t r = i + soon; step && !sums && r < hs_min(i + soon + MR, m); r++) {
            __builtin_prefetch(c + r * ldc, 1);
            __builtin_prefetch(c + r * ldc + n - 1, 1);
        }
        asks near;
        near.count = near.turns = 0;
        for (int what = 0; what < AHEADS; what++)
            if (next[what].runs) ask_for(next + what, &near, far, MOST_ASKS - 10);
        for (int what = 0; what < HS_DEFERRED_READS && with->slice.call; what++)
            if (with->reads[what].runs) ask_for(with->reads + what, &near, far, MOST_ASKS - 10);
        if (at_res)
            ask_rows(&near, at_res, (const char *)b,
                     res + ((whole->i + i) * g->ld_res + whole->j) * 4, g->ld_res * 4, n * 4);
        if (at_out)
            ask_rows(&near, at_out, (const char *)b,
                     (const char *)g->out + ((whole->i + i) * g->ld_out + whole->j) * 4,
                     g->ld_out * 4, n * 4);
        if (sums)
            ask_rows(&near, at_sums, (const char *)b, (const char *)(tile + mr * ldc), ldc * 4,
                     n * 4);
        units packs =
            ASKS_WITHIN && mr == MR && n == NR ? units_of(then, &g->b, pairs, i, m) : (units){0};
        while (ASKS_WITHIN && near.turns < most) { /* as many asks as there are units */
            const int64_t rest = most - near.turns, missing = packs.count - near.count;
            const int parted = missing > 1 && near.count + 1 < MOST_ASKS;
            ask_add(&near, (const char *)b, 0,
                    parted ? hs_min(rest, hs_max(8, rest / missing)) : rest);
        }
        packs.count = hs_min(packs.count, near.count);
        then->done += packs.count * unit_of_k(pairs);
        micro[mr][pairs][n == NR ? 2 : n > LANES](kn, a + i * kn, b, tile, ldc, n, load, near.list,
                                                  &packs, ends ? &end : NULL);
        if (ends) end.out += mr * end.ld;
        if (end.res) end.res += mr * end.ld_res;
        if ((!whole || ends) && !with->slice.call) continue;
        if (flushes) flush_end(before);
        if (whole && !ends) finish(whole, tile, ldc, i, mr, n);
        beside_tile(with, most * mr / MR * (n > LANES ? 2 : 1) / 2);
        if (flushes) before = flush_begin();
    }
    if (flushes) flush_end(before);
    pack_rest(then, &g->b, g->n, pairs);
}

/* -------------------- driver */

typedef struct gemm_job {
    const gemm *g;
    const hs_kernel_ctx *ctx;
    int64_t split_m, split_n; /* the grid of workers; */
    int64_t each_m, each_n;   /* what one of them does, whole tiles */
} gemm_job;

/* A worker's way through its rows [i0, i1) and columns: blocks of k within blocks of rows, or the other way round. */
typedef struct walk {
    const gemm *g;
    int64_t i0, i1;
    int64_t mc, kc, nc;           /* of a block */
    int64_t row_blocks, k_blocks; /* so many */
    int64_t panel;                /* floats of the longest one of B */
    int pairs;
    int within;  /* tiles' loops pack B */
    int direct;  /* sums are made in the output */
    int keep_b;  /* B is packed once for all rows, */
    int k_first; /* a block of k of it, all of whose sums wait for the next; else all of k */
} walk;

/* The part of A that is multiplied at once. */
typedef struct rows_and_k {
    int64_t i, m, k, kn;
} rows_and_k;

static rows_and_k step_of(const walk *w, int64_t step) {
    const int64_t rows = w->k_first ? step % w->row_blocks : step / w->k_blocks,
                  of_k = w->k_first ? step / w->row_blocks : step % w->k_blocks;
    const int64_t i = w->i0 + rows * w->mc, k = of_k * w->kc;
    return (rows_and_k){i, hs_min(w->mc, w->i1 - i), k, hs_min(w->kc, w->g->k - k)};
}

/* Cuts k into so many blocks, or fewer: the floats that are left for B and sums. */
static int64_t cut_k(walk *w, int64_t blocks) {
    const int64_t kc = hs_ceil_div(w->g->k, blocks);
    w->kc = w->pairs ? (kc + 1) / 2 * 2 : kc;
    w->k_blocks = hs_ceil_div(w->g->k, w->kc);
    const int64_t words = packed_length(w->kc, w->pairs);
    w->panel = words * NR;
    return WORKER_FLOATS - size_of_a(w->mc, words) - MR * NR - 64;
}

/* For so many columns: as many at once as keep B packed for all rows, in the order of loops that has room for more, 256
 * at least; all where no panel is come back to, or packing it again costs next to nothing, if there is room for their
 * sums. */
static walk walk_of(const gemm *g, int64_t i0, int64_t i1, int64_t columns) {
    walk w = {.g = g, .i0 = i0, .i1 = i1, .pairs = in_pairs(&g->a, &g->b)};
    w.row_blocks = hs_ceil_div(i1 - i0, MC);
    w.mc = hs_ceil_div(hs_ceil_div(i1 - i0, w.row_blocks), MR) * MR;
    w.within = packs_within(&g->b, g->k, w.pairs);
    w.direct = g->dt_out == HS_F32 && !g->bias && !g->res && !g->add_old && !g->scale_a;
    const int64_t blocks = hs_ceil_div(g->k, w.pairs ? KC_PAIRS : KC),
                  most_blocks = hs_max(blocks, g->k / KC_LEAST), room = cut_k(&w, blocks);
    const int64_t waits = blocks > 1 && !w.direct ? w.mc : 0; /* sums, for the next block of k */
    const int64_t kept = room / (packed_length(g->k, w.pairs) + waits) / NR * NR;
    const int again = w.row_blocks > 1 && !w.within;
    int64_t most = columns, first = 0;
    if (again)
        most = hs_max(256, kept);
    else if (waits)
        most = (room - 2 * w.panel) / waits / NR * NR;
    for (int64_t n = blocks; again && blocks > 1 && most < columns && n <= most_blocks; n++) {
        const int64_t left = cut_k(&w, n) / (w.panel / NR + waits * w.row_blocks) / NR * NR;
        if (left > most) most = left, first = n;
    }
    w.k_first = first > 0;
    cut_k(&w, w.k_first ? first : blocks);
    w.nc = hs_ceil_div(hs_ceil_div(columns, hs_ceil_div(columns, most)), NR) * NR;
    w.keep_b = w.row_blocks > 1 && (w.k_first || w.nc <= kept);
    return w;
}

/* Where sums of block `at` and columns from j0 + j on are made. */
static float *sums_of(const walk *w, float *waiting, const rows_and_k *at, int64_t j0, int64_t wide,
                      int64_t j) {
    if (w->direct) return (float *)w->g->out + at->i * w->g->ld_out + j0 + j;
    if (w->k_blocks == 1) return waiting;
    return waiting + (w->k_first ? (at->i - w->i0) * wide : 0) + j * w->mc;
}

/* Columns [j0, j0 + n) of a walk's rows. */
static void gemm_columns(const walk *w, float *scratch, beside *with, int64_t j0, int64_t n) {
    const gemm *g = w->g;
    const int pairs = w->pairs, direct = w->direct;
    const int64_t size_out = dt_size(g->dt_out), wide = hs_ceil_div(n, NR) * NR;
    const int64_t kept = wide * packed_length(w->k_first ? w->kc : g->k, pairs);
    float *pa = scratch, *pb = pa + size_of_a(w->mc, w->panel / NR),
          *pc = pb + (w->keep_b ? kept : 2 * w->panel);
    const int64_t ldc = direct ? g->ld_out : NR, steps = w->row_blocks * w->k_blocks;
    panel now = {pb, j0, hs_min(NR, n), 0, hs_min(w->kc, g->k), 0, 0};
    pack_rest(&now, &g->b, g->n, pairs);
    for (int64_t step = 0; step < steps; step++) {
        const rows_and_k at = step_of(w, step), after = step_of(w, step + 1);
        const int ends = step + 1 == steps, last = at.k + at.kn == g->k;
        const int64_t tiles = hs_ceil_div(at.m, MR);
        ahead next[AHEADS] = {{0}};
        if (ASKS_WITHIN && !ends)
            next[NEXT_A] = ahead_of(&g->a, after.i, after.m, after.k, after.kn, tiles * wide / NR);
        pack_a_as(pa, &g->a, at.i, at.m, g->m, at.k, at.kn, pairs, j0 ? NULL : g->sums_a);
        for (int64_t j = 0; j < n; j += NR) {
            const int64_t nn = hs_min(NR, n - j);
            const float *b = now.to;
            float *c = sums_of(w, pc, &at, j0, wide, j);
            const place whole = {g, at.i, j0 + j};
            /* the panel after this one */
            const int goes_on = j + NR < n;
            const int64_t then_j = goes_on ? j + NR : 0;
            const rows_and_k *to = goes_on ? &at : &after;
            const int none = ends && !goes_on, ready = none || (w->keep_b && to->i > w->i0);
            panel then = {.j = j0 + then_j, .n = hs_min(NR, n - then_j), .k = to->k, .kn = to->kn};
            const int64_t then_length = packed_length(then.kn, pairs);
            then.to = w->keep_b ? pb + (w->k_first ? 0 : wide * packed_length(to->k, pairs)) +
                                      then_j * then_length
                      : b == pb ? pb + w->panel
                                : pb;
            then.done = ready ? then.kn : 0;
            then.within = w->within && then.n == NR && !ready;
            next[NEXT_B] = next[END_OF_B] = next[SUMS] = (ahead){0};
            if (!ready)
                ask_for_panel(&then, &g->b, tiles, next + NEXT_B, next + END_OF_B);
            else if (!none)
                next[NEXT_B] = spread((const char *)then.to, 0, 1, NR * then_length * 4, tiles);
            const float *sums = none ? NULL : sums_of(w, pc, to, j0, wide, then_j);
            /* LINE: where a row does not begin with a line, this panel asked for the first one of the next */
            if (ASKS_WITHIN && direct && sums)
                next[SUMS] = spread((const char *)sums + LINE, ldc * 4, to->m, then.n * 4, tiles);
            else if (ASKS_WITHIN && sums && to->k > 0)
                next[SUMS] = spread((const char *)sums, 0, 1, to->m * NR * 4, tiles);
            if (ASKS_WITHIN && !direct && last)
                next[OUT] = spread((const char *)g->out + (at.i * g->ld_out + j0 + j) * size_out,
                                   g->ld_out * size_out, at.m, nn * size_out, tiles);
            if (ASKS_WITHIN && !direct && last && g->res)
                next[RESIDUAL] =
                    spread((const char *)g->res + (at.i * g->ld_res + j0 + j) * size_out,
                           g->ld_res * size_out, at.m, nn * size_out, tiles);
            multiply_panel(at.m, nn, packed_length(at.kn, pairs), pairs, pa, b, c, ldc,
                           at.k > 0 || g->from_old, next, g, &then, !direct && last ? &whole : NULL,
                           with);
            now = then;
        }
    }
}

static void gemm_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const gemm_job *job = ctx;
    const gemm *g = job->g;
    float *scratch = (float *)job->ctx->scratch + (int64_t)worker * WORKER_FLOATS;
    beside with = beside_begin(job->ctx, worker);
    for (int64_t cell = begin; cell < end; cell++) {
        int64_t i0 = cell / job->split_n * job->each_m, j0 = cell % job->split_n * job->each_n;
        int64_t i1 = hs_min(g->m, i0 + job->each_m), j1 = hs_min(g->n, j0 + job->each_n);
        if (i0 >= i1 || j0 >= j1) continue;
        const walk w = walk_of(g, i0, i1, j1 - j0);
        for (int64_t j = j0; j < j1; j += w.nc)
            gemm_columns(&w, scratch, &with, j, hs_min(w.nc, j1 - j));
    }
    beside_end(&with);
}

/* Runs g on all threads of the context. */
static void gemm_run(hs_kernel_ctx *ctx, const gemm *g) {
    int64_t threads = hs_pool_threads(ctx->pool);
    gemm_job job = {g, ctx, 1, 1, g->m, g->n};
    if (threads > 1 && 2.0 * (double)g->m * (double)g->n * (double)g->k > 1e5) {
        /* the grid that packs least: a worker packs each_m rows and each_n columns */
        int64_t best = INT64_MAX;
        for (int64_t tm = 1; tm <= threads; tm++) {
            if (threads % tm) continue;
            int64_t tn = threads / tm;
            int64_t em = hs_ceil_div(hs_ceil_div(g->m, MR), tm) * MR,
                    en = hs_ceil_div(hs_ceil_div(g->n, NR), tn) * NR;
            /* the slowest worker's time: its tiles, and its packing at about 16 products an element
             */
            int64_t cost = em * en + 16 * (em + en);
            if (cost < best) {
                best = cost;
                job.split_m = tm, job.split_n = tn, job.each_m = em, job.each_n = en;
            }
        }
    }
    hs_parallel_for(ctx->pool, job.split_m * job.split_n, gemm_range, &job);
}

#endif
