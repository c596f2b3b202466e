/* Attention's operands, laid out in a worker's scratch, and products that read them where they lie: nothing is packed
 * for one, and what one makes is the next one's operand.
 *
 * An operand is f32, [k][width], k being what a product sums over. In bf16 its k goes in pairs (gemm.h), an odd last one
 * beside zeros: the same, or on avx512_bf16 words of two, [pair][width]. packed_length says how many rows those are.
 */
#ifndef HS_KERNELS_CPU_TILE_H
#define HS_KERNELS_CPU_TILE_H

#include "kernels/cpu/gemm.h"

enum { TILE_ROW = 64 };

/* One head of one batch element: rows in memory, ld apart, D wide. */
typedef struct head {
    void *p;
    int64_t ld, rows, D;
    int dt;
} head;

/* Whether chains over numbers of this type go over pairs. */
static int by_pairs(int dt) {
    return dt == HS_BF16;
}

/* D in whole vectors: how far rows that lie straight are apart. */
static int64_t wide_of(int64_t D) {
    return hs_ceil_div(D, LANES) * LANES;
}

/* -------------------- operands in the scratch */

VINLINE void lay_dt(float *dst, int64_t ld, const side *s, int64_t first, int64_t n, int64_t all,
                    int64_t k0, int64_t kn, int dt) {
    for (int64_t i = 0; i < n; i += LANES)
        pack16_as(dst + i, ld, s, first + i, hs_min(LANES, n - i), all, k0, kn, by_pairs(dt), dt);
}

/* dst[d * ld + i] = row row0 + i: whole vectors of rows, zero where there are no more. d is summed over. */
static void lay_turned(float *dst, int64_t ld, head h, int64_t row0, int64_t rows) {
    const side s = {h.p, h.ld, 1, h.dt};
    BY_DTYPE(h.dt, lay_dt, dst, ld, &s, row0, rows, h.rows, 0, h.D);
}

/* dst[i * wide + d] = row row0 + i, zero from D on. Rows are summed over. */
static void lay_straight(float *dst, head h, int64_t row0, int64_t rows) {
    const side s = {h.p, 1, h.ld, h.dt};
    BY_DTYPE(h.dt, lay_dt, dst, wide_of(h.D), &s, 0, h.D, h.D, row0, rows);
}

typedef struct matrix {
    float *p;
    int64_t ld;
} matrix;

static matrix matrix_of(float *p, int64_t ld) {
    return (matrix){p, ld};
}

/* Row `first`, which is even where `pairs`, of an operand, and those behind it. */
static matrix rows_from(matrix m, int64_t first, int pairs) {
    return matrix_of(m.p + packed_length(first, pairs) * m.ld, m.ld);
}

#if HS_DOT
/* 32 numbers, rounded to bf16 as a product of pairs takes them: the first 16 as the low half. */
VINLINE __m512i v_to_words(vf first, vf second) {
    return (__m512i)_mm512_cvtne2ps_pbh(second, first);
}
#endif

/* What a product of pairs takes for x: denormal numbers are zero of their sign, then rounded to bf16. */
VINLINE vf v_narrowed(vf x) {
    const vi bits = v_bits(x), even = vi_and(vi_shr(bits, 16), vi_set1(1));
    const vi near = vi_add(bits, vi_add(even, vi_set1(0x7fff)));
    const vf size = v_from_bits(vi_and(bits, vi_set1(0x7fffffffu))),
             zero = v_from_bits(vi_and(bits, vi_set1(0x80000000u))),
             rounded = v_from_bits(vi_and(near, vi_set1(0xffff0000u)));
    const vf number = v_select_lt(size, v_set1(__builtin_inff()), rounded, x);
    return v_select_lt(size, v_set1(0x1p-126f), zero, number);
}

/* m[k][n], n in whole vectors, rounded to pairs of k, as dst of the same n. */
static void narrow_rows(matrix dst, matrix m, int64_t kn, int64_t n) {
    for (int64_t k = 0; k < kn; k += 2)
        for (int64_t j = 0; j < n; j += LANES) {
            const vf even = v_load(m.p + k * m.ld + j),
                     odd = k + 1 < kn ? v_load(m.p + (k + 1) * m.ld + j) : v_zero();
#if HS_DOT
        /* l and 16 + l of both, side by side */
#define WORD(l) ((l) | (16 + (l)) << 16)
            const vi order = _mm512_setr_epi32(WORD(0), WORD(1), WORD(2), WORD(3), WORD(4), WORD(5),
                                               WORD(6), WORD(7), WORD(8), WORD(9), WORD(10),
                                               WORD(11), WORD(12), WORD(13), WORD(14), WORD(15));
#undef WORD
            v_store(dst.p + k / 2 * dst.ld + j,
                    v_from_bits(_mm512_permutexvar_epi16(order, v_to_words(even, odd))));
#else
            v_store(dst.p + k * dst.ld + j, v_narrowed(even));
            v_store(dst.p + (k + 1) * dst.ld + j, v_narrowed(odd));
#endif
        }
}

/* m[i][k], i < rows, k < kn in steps of 32, rounded to pairs of k along a row of dst. */
static void narrow_along(matrix dst, matrix m, int64_t rows, int64_t kn) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t k = 0; k < kn; k += 2 * LANES) {
            const float *from = m.p + i * m.ld + k;
            const vf first = v_load(from), second = v_load(from + LANES);
#if HS_DOT
            v_store(dst.p + i * dst.ld + k / 2, v_from_bits(v_to_words(first, second)));
#else
            v_store(dst.p + i * dst.ld + k, v_narrowed(first));
            v_store(dst.p + i * dst.ld + k + LANES, v_narrowed(second));
#endif
        }
}

/* A sum as it is stored. Of pairs zero is +0: which sign it had can depend on products with a masked key's 0. */
VINLINE vf whole_sum(vf sum, int dt) {
    return by_pairs(dt) ? v_add(sum, v_zero()) : sum;
}

VINLINE void put_straight_dt(head out, int64_t row0, int64_t rows, const float *sum, float times,
                             int dt) {
    const int64_t wide = wide_of(out.D);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t d = 0; d < out.D; d += LANES) {
            vf x = v_mul(whole_sum(v_load(sum + i * wide + d), dt), v_set1(times));
            v_store_dt_n(out.p, (row0 + i) * out.ld + d, x, out.D - d, dt);
        }
}

/* row row0 + i = sum[i * wide + d] times something */
static void put_straight(head out, int64_t row0, int64_t rows, const float *sum, float times) {
    BY_DTYPE(out.dt, put_straight_dt, out, row0, rows, sum, times);
}

VINLINE void put_turned_dt(head out, int64_t row0, int64_t rows, const float *sum, int64_t ld,
                           float times, const float *over, int dt) {
    float t[LANES * LANES];
    for (int64_t i0 = 0; i0 < rows; i0 += LANES)
        for (int64_t d = 0; d < out.D; d += LANES) {
            transpose16(t, LANES, sum + d * ld + i0, ld, HS_F32);
            for (int64_t i = i0; i < hs_min(rows, i0 + LANES); i++) {
                vf x = whole_sum(v_load(t + (i - i0) * LANES), dt);
                x = over ? v_div(x, v_set1(over[i])) : v_mul(x, v_set1(times));
                v_store_dt_n(out.p, (row0 + i) * out.ld + d, x, out.D - d, dt);
            }
        }
}

/* row row0 + i = sum[d * ld + i] times something or, where over is there, by over[i] */
static void put_turned(head out, int64_t row0, int64_t rows, const float *sum, int64_t ld,
                       float times, const float *over) {
    BY_DTYPE(out.dt, put_turned_dt, out, row0, rows, sum, ld, times, over);
}

/* -------------------- products
 *
 *   c[i,j] = start + sum over k < kn of a(i,k) b[k,j]      one chain over k ascending, or over its pairs (gemm.h)
 *
 * b[k,j] is at k ld + j and c[i,j] at i ld + j; columns are computed in whole vectors, so that b has readable ones
 * and c room for them. a(i,k) is at k ld + i, or, by rows, at i TILE_ROW + k. In words, a pair is one k of those.
 */

/* of a row of an operand by rows */
#define TILE_WORDS (HS_DOT ? TILE_ROW / 2 : TILE_ROW)

typedef void (*tile_fn)(int64_t kn, const float *a, int64_t lda, const float *b, int64_t ldb,
                        float *c, int64_t ldc, int load, const float *shrink);

#define TILE_OF(name, mr, nv, how, row)                                                            \
    static void name(int64_t kn, const float *a, int64_t lda, const float *b, int64_t ldb,         \
                     float *c, int64_t ldc, int load, const float *shrink) {                       \
        micro_tile(mr, nv, how, kn, a, row, (row) > 1 ? 1 : lda, b, ldb, c, ldc, (nv) * LANES,     \
                   load, shrink, NULL, NULL, NULL);                                                \
    }
#define TILE(mr)                                                                                   \
    TILE_OF(tile_##mr##_1, mr, 1, IN_TURN, 1)                                                      \
    TILE_OF(tile_##mr##_2, mr, NR / LANES, IN_TURN, 1)                                             \
    TILE_OF(by_rows_##mr##_1, mr, 1, IN_TURN, TILE_ROW)                                            \
    TILE_OF(by_rows_##mr##_2, mr, NR / LANES, IN_TURN, TILE_ROW)                                   \
    TILE_OF(tile_pairs_##mr##_1, mr, 1, PAIRS_HOW, 1)                                              \
    TILE_OF(tile_pairs_##mr##_2, mr, NR / LANES, PAIRS_HOW, 1)                                     \
    TILE_OF(by_rows_pairs_##mr##_1, mr, 1, PAIRS_HOW, TILE_WORDS)                                  \
    TILE_OF(by_rows_pairs_##mr##_2, mr, NR / LANES, PAIRS_HOW, TILE_WORDS)
TILES_OF_ROWS(TILE)
#undef TILE
#undef TILE_OF

/* by rows, whether in pairs, whether a lies by rows, and whether wider than a vector */
#define ALL(mr)                                                                                    \
    {{{tile_##mr##_1, tile_##mr##_2}, {by_rows_##mr##_1, by_rows_##mr##_2}},                       \
     {{tile_pairs_##mr##_1, tile_pairs_##mr##_2},                                                  \
      {by_rows_pairs_##mr##_1, by_rows_pairs_##mr##_2}}},
static const tile_fn tiles[MR + 1][2][2][2] = {{{{NULL, NULL}, {NULL, NULL}}}, TILES_OF_ROWS(ALL)};
#undef ALL

static void product_of(int64_t m, int64_t n, int64_t kn, matrix a, int by_rows, matrix b, matrix c,
                       int pairs, int load, const float *shrink) {
    if (m <= 0) return;
    /* tiles of about as many rows each: a last one of few would wait for its own chains */
    const int64_t each = hs_ceil_div(m, hs_ceil_div(m, MR)), step = by_rows ? a.ld : 1;
    const int64_t turns = packed_length(kn, pairs);
    const int flushes = pairs && !HS_DOT;
    const flush_mode before = flushes ? flush_begin() : 0;
    for (int64_t j = 0; j < n; j += NR)
        for (int64_t i = 0; i < m; i += each)
            tiles[hs_min(each, m - i)][pairs][by_rows][n - j > LANES](
                turns, a.p + i * step, a.ld, b.p + j, b.ld, c.p + i * c.ld + j, c.ld, load,
                shrink ? shrink + j : NULL);
    if (flushes) flush_end(before);
}

/* start: 0, or where `load` the old c, times shrink[j] where that is not NULL */
static void product(int64_t m, int64_t n, int64_t kn, matrix a, matrix b, matrix c, int pairs,
                    int load, const float *shrink) {
    product_of(m, n, kn, a, 0, b, c, pairs, load, shrink);
}

/* a by rows; start: the old c */
static void product_by_rows(int64_t m, int64_t n, int64_t kn, matrix a, matrix b, matrix c,
                            int pairs) {
    product_of(m, n, kn, a, 1, b, c, pairs, 1, NULL);
}

#endif
