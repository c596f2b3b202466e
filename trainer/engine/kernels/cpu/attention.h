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
#ifndef HS_KERNELS_CPU_ATTENTION_H
#define HS_KERNELS_CPU_ATTENTION_H

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

/* The arguments of the one that runs are still to be set. first, window: of kernels/attention.h. */
static attention_job attention_job_of(const hs_kernel_ctx *ctx, int dt, int64_t T, int64_t H,
                                      int64_t G, int64_t D, double scale, const int32_t *first,
                                      int64_t window) {
    return (attention_job){.scratch = ctx->scratch,
                           .T = T,
                           .H = H,
                           .G = G,
                           .D = D,
                           .wide = wide_of(D),
                           .pairs = by_pairs(dt),
                           .deep = packed_length(D, by_pairs(dt)),
                           .first = first,
                           .window = window,
                           .banded = first || window,
                           .scale = (float)scale,
                           .dt = dt};
}

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

#endif
