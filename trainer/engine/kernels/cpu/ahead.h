/* What is done ahead, a part with each tile of a product (gemm.h): memory is asked for, a panel of B packed. */
#ifndef HS_KERNELS_CPU_AHEAD_H
#define HS_KERNELS_CPU_AHEAD_H

#include "core/ints.h"
#include "kernels/cpu/pack.h"

/* Whether memory is asked for inside the loop of a tile: it is long enough not to feel it. */
#define ASKS_WITHIN (HS_VEC == 2)

/* Cache lines that are needed soon: `runs` of `length` each; the lines of a run are `step` bytes apart, the
 * runs `stride`. */
typedef struct ahead {
    const char *at; /* the run whose lines are next */
    int64_t step, length, stride, runs;
    int64_t done; /* lines of that run that were asked for */
    int64_t each; /* so many with a tile */
} ahead;

/* `rows`, `stride` bytes apart, of so many bytes each, over so many tiles. */
static ahead spread(const char *at, int64_t stride, int64_t rows, int64_t bytes, int64_t tiles) {
    const int64_t lines = hs_ceil_div(bytes, 64), each = hs_ceil_div(rows * lines, tiles);
    return lines >= rows ? (ahead){at, 64, lines, stride, rows, 0, each}
                         : (ahead){at, stride, rows, 64, lines, 0, each};
}

/* A line with each of so many turns of a tile's loop, `step` bytes apart. */
typedef struct ask {
    const char *at;
    int64_t step, turns;
} ask;

enum { MOST_ASKS = 40 };

/* So many units of a panel of B, 4 rows of f32 or of words each, that a tile's loop packs, one with every ask. */
typedef struct units {
    float *to;
    const char *from; /* NR columns, side by side in memory */
    int64_t ld;       /* bytes from k to k */
    int64_t count;
} units;

VINLINE void pack_unit(units *u, int words) {
    const char *from = u->from;
    const int64_t ld = u->ld;
    for (int r = 0; r < 4; r++, from += ld) {
#if HS_DOT
        if (words) {
            pack_two_rows(u->to + r * NR, from, from + ld, HS_BF16);
            from += ld;
            continue;
        }
#endif
        (void)words;
        for (int l = 0; l < NR; l += LANES)
            v_store(u->to + r * NR + l, v_load((const float *)(const void *)from + l));
    }
    u->from = from;
    u->to += 4 * NR;
    u->count--;
}

/* What is asked for within a tile's loop, one after the other. */
typedef struct asks {
    ask list[MOST_ASKS];
    int64_t count, turns; /* of the list; of the loop so far */
} asks;

static void ask_add(asks *to, const char *at, int64_t step, int64_t turns) {
    to->list[to->count++] = (ask){at, step, turns};
    to->turns += turns;
}

/* Its lines for a tile, after others, until so many turns and asks: into the list, or asked for here. */
static void ask_for(ahead *next, asks *to, int64_t most_turns, int64_t most_asks) {
    for (int64_t due = hs_min(next->each, most_turns - to->turns);
         next->runs && due > 0 && to->count < most_asks;) {
        const int64_t n = hs_min(due, next->length - next->done);
        const char *line = next->at + next->done * next->step;
        if (ASKS_WITHIN)
            ask_add(to, line, next->step, n);
        else
            for (int64_t i = 0; i < n; i++, to->turns++) __builtin_prefetch(line + i * next->step);
        due -= n;
        if ((next->done += n) < next->length) continue;
        next->done = 0;
        next->runs--;
        next->at += next->stride;
    }
}

/* Two lines of each of MR rows, `stride` bytes apart, of so many bytes, from a turn of the loop on; before it
 * nothing, which is a line that is near. */
static void ask_rows(asks *to, int64_t turn, const char *near, const char *at, int64_t stride,
                     int64_t bytes) {
    if (to->turns < turn) ask_add(to, near, 0, turn - to->turns);
    ask_add(to, at, stride, MR);
    ask_add(to, at + bytes - 1, stride, MR);
}

/* Rows [i, i + m) of a side and k in [k, k + kn), as they lie in memory, over so many tiles. Where all of a
 * tile's lines are asked for at once, only those that the processor does not foresee are. */
static ahead ahead_of(const side *s, int64_t i, int64_t m, int64_t k, int64_t kn, int64_t tiles) {
    const int64_t size = side_size(s->dt);
    if (!ASKS_WITHIN && s->col == 1) return (ahead){0};
    const char *at = (const char *)s->p + (i * s->row + k * s->col) * size;
    if (s->col == 1) return spread(at, s->row * size, m, kn * size, tiles);
    return s->row == 1 ? spread(at, s->col * size, kn, m * size, tiles) : (ahead){0};
}

/* A panel of B: columns [j, j + n) of k in [k, k + kn). The first `done` of k are packed. */
typedef struct panel {
    float *to;
    int64_t j, n, k, kn, done;
    int within; /* tiles' loops pack it */
} panel;

/* Of k in a unit. */
static int64_t unit_of_k(int pairs) {
    return pairs && HS_DOT ? 8 : 4;
}

/* Whether its columns lie side by side in memory, and no k does: loops of tiles ask for it k by k, and may pack it. */
static int by_columns(const side *b) {
    return ASKS_WITHIN && b->row == 1 && b->col != 1;
}

/* Whether tiles' loops pack panels of a B of so many k, beside what they multiply: it costs next to nothing then. */
static int packs_within(const side *b, int64_t k, int pairs) {
    if (!by_columns(b)) return 0;
    return pairs ? HS_DOT && b->dt == HS_BF16 && k % 2 == 0 : b->dt == HS_F32;
}

/* What the loop of tile i of m rows packs of it: nothing of the first one, where its lines are asked for, or of the
 * last, which have fewer rows. */
static units units_of(const panel *p, const side *b, int pairs, int64_t i, int64_t m) {
    if (!p->within || !i) return (units){0};
    const int64_t size = side_size(b->dt), all = p->kn / unit_of_k(pairs);
    const int64_t until = m > 4 * MR ? hs_min(all, all * i / (m - 3 * MR)) : all;
    return (units){.to = p->to + packed_length(p->done, pairs) * NR,
                   .from = (const char *)b->p + (p->j + (p->k + p->done) * b->col) * size,
                   .ld = b->col * size,
                   .count = until - p->done / unit_of_k(pairs)};
}

/* What is left of it; of a B that has so many rows. */
static void pack_rest(panel *p, const side *b, int64_t rows, int pairs) {
    if (p->done < p->kn)
        pack_b_as(p->to + packed_length(p->done, pairs) * NR, b, p->j, p->n, rows, p->k + p->done,
                  p->kn - p->done, pairs);
    p->done = p->kn;
}

/* Its lines, as they lie in memory, over so many tiles; where columns lie side by side, k by k: the first one of each,
 * and the last one. */
static void ask_for_panel(const panel *p, const side *b, int64_t tiles, ahead *first, ahead *end) {
    if (!by_columns(b)) {
        *first = ahead_of(b, p->j, p->n, p->k, p->kn, tiles);
        return;
    }
    const int64_t size = side_size(b->dt), bytes = p->n * size;
    const char *at = (const char *)b->p + (p->j + p->k * b->col) * size;
    /* sooner than units_of needs them */
    const int64_t each = hs_ceil_div(p->kn, hs_max(1, tiles - 3));
    *first = (ahead){at, b->col * size, p->kn, 0, 1, 0, each};
    if (bytes > 64) *end = (ahead){at + bytes - 1, b->col * size, p->kn, 0, 1, 0, each};
}

#endif
