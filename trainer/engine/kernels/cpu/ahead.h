/* What is asked for from memory before it is needed, some lines with each tile of a product (gemm.h). */
#ifndef HS_KERNELS_CPU_AHEAD_H
#define HS_KERNELS_CPU_AHEAD_H

#include "core/ints.h"
#include "kernels/cpu/pack.h"

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

enum { ASKS_AT_ONCE = 8 }; /* what is written beyond the end of a list of lines */

/* Its lines for a tile, after `count` others of at most `most`: into the list, or asked for here. Returns
 * how many there are now. */
static int64_t ask_for(ahead *next, const char **list, int64_t count, int64_t most) {
    for (most = hs_min(most, count + next->each); next->runs && count < most;) {
        const int64_t n = hs_min(most - count, next->length - next->done);
        const char *line = next->at + next->done * next->step;
#if HS_VEC == 2
        const __m512i ahead_by = _mm512_mullo_epi64(_mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7),
                                                    _mm512_set1_epi64(next->step));
        for (int64_t i = 0; i < n; i += ASKS_AT_ONCE, line += ASKS_AT_ONCE * next->step)
            _mm512_storeu_si512(list + count + i,
                                _mm512_add_epi64(_mm512_set1_epi64((intptr_t)line), ahead_by));
#else
        (void)list;
        for (int64_t i = 0; i < n; i++) __builtin_prefetch(line + i * next->step);
#endif
        count += n;
        if ((next->done += n) < next->length) continue;
        next->done = 0;
        next->runs--;
        next->at += next->stride;
    }
    return count;
}

/* For the last turns of a tile's loop: two lines of each of MR rows, `stride` bytes apart, of so many bytes. */
static void ask_last(const char **list, const char *at, int64_t stride, int64_t bytes) {
    for (int64_t r = 0; r < MR; r++, at += stride) {
        list[2 * r] = at;
        list[2 * r + 1] = at + bytes - 1;
    }
}

#endif
