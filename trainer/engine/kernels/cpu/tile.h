/* Attention's operands, laid out as f32 in a worker's scratch, and products that read them where they lie: nothing is
 * packed for one, and what one makes is the next one's operand.
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

/* D in whole vectors: how far rows that lie straight are apart. */
static int64_t wide_of(int64_t D) {
    return hs_ceil_div(D, LANES) * LANES;
}

/* -------------------- operands in the scratch */

VINLINE void lay_dt(float *dst, int64_t ld, const side *s, int64_t first, int64_t n, int64_t all,
                    int64_t k0, int64_t kn, int dt) {
    for (int64_t i = 0; i < n; i += LANES)
        pack16(dst + i, ld, s, first + i, hs_min(LANES, n - i), all, k0, kn, dt);
}

/* dst[d * ld + i] = row row0 + i: whole vectors of rows, zero where there are no more */
static void lay_turned(float *dst, int64_t ld, head h, int64_t row0, int64_t rows) {
    const side s = {h.p, h.ld, 1, h.dt};
    BY_DTYPE(h.dt, lay_dt, dst, ld, &s, row0, rows, h.rows, 0, h.D);
}

/* dst[i * wide + d] = row row0 + i, zero from D on */
static void lay_straight(float *dst, head h, int64_t row0, int64_t rows) {
    const side s = {h.p, 1, h.ld, h.dt};
    BY_DTYPE(h.dt, lay_dt, dst, wide_of(h.D), &s, 0, h.D, h.D, row0, rows);
}

VINLINE void put_straight_dt(head out, int64_t row0, int64_t rows, const float *sum, float times,
                             int dt) {
    const int64_t wide = wide_of(out.D);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t d = 0; d < out.D; d += LANES) {
            vf x = v_mul(v_load(sum + i * wide + d), v_set1(times));
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
                vf x = v_load(t + (i - i0) * LANES);
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
 *   c[i,j] = start + sum over k < kn of a(i,k) b[k,j]      one chain of fma over k ascending (gemm.h)
 *
 * b[k,j] is at k ld + j and c[i,j] at i ld + j; columns are computed in whole vectors, so that b has readable ones
 * and c room for them. a(i,k) is at k ld + i, or, by rows, at i TILE_ROW + k.
 */

typedef struct matrix {
    float *p;
    int64_t ld;
} matrix;

static matrix matrix_of(float *p, int64_t ld) {
    return (matrix){p, ld};
}

typedef void (*tile_fn)(int64_t kn, const float *a, int64_t lda, const float *b, int64_t ldb,
                        float *c, int64_t ldc, int load, const float *shrink);

#define TILE_OF(name, mr, nv, row)                                                                 \
    static void name(int64_t kn, const float *a, int64_t lda, const float *b, int64_t ldb,         \
                     float *c, int64_t ldc, int load, const float *shrink) {                       \
        micro_tile(mr, nv, IN_TURN, kn, a, row, (row) > 1 ? 1 : lda, b, ldb, c, ldc, (nv) * LANES, \
                   load, shrink, NULL);                                                            \
    }
#define TILE(mr)                                                                                   \
    TILE_OF(tile_##mr##_1, mr, 1, 1)                                                               \
    TILE_OF(tile_##mr##_2, mr, NR / LANES, 1)                                                      \
    TILE_OF(by_rows_##mr##_1, mr, 1, TILE_ROW)                                                     \
    TILE_OF(by_rows_##mr##_2, mr, NR / LANES, TILE_ROW)
TILES_OF_ROWS(TILE)
#undef TILE
#undef TILE_OF

/* by rows, whether a lies by rows, and whether wider than a vector */
#define BOTH(mr) {{tile_##mr##_1, tile_##mr##_2}, {by_rows_##mr##_1, by_rows_##mr##_2}},
static const tile_fn tiles[MR + 1][2][2] = {{{NULL, NULL}, {NULL, NULL}}, TILES_OF_ROWS(BOTH)};
#undef BOTH

static void product_of(int64_t m, int64_t n, int64_t kn, matrix a, int by_rows, matrix b, matrix c,
                       int load, const float *shrink) {
    if (m <= 0) return;
    /* tiles of about as many rows each: a last one of few would wait for its own chains */
    const int64_t each = hs_ceil_div(m, hs_ceil_div(m, MR)), step = by_rows ? a.ld : 1;
    for (int64_t j = 0; j < n; j += NR)
        for (int64_t i = 0; i < m; i += each)
            tiles[hs_min(each, m - i)][by_rows][n - j > LANES](kn, a.p + i * step, a.ld, b.p + j,
                                                               b.ld, c.p + i * c.ld + j, c.ld, load,
                                                               shrink ? shrink + j : NULL);
}

/* start: 0, or where `load` the old c, times shrink[j] where that is not NULL */
static void product(int64_t m, int64_t n, int64_t kn, matrix a, matrix b, matrix c, int load,
                    const float *shrink) {
    product_of(m, n, kn, a, 0, b, c, load, shrink);
}

/* a by rows; start: the old c */
static void product_by_rows(int64_t m, int64_t n, int64_t kn, float *a, matrix b, matrix c) {
    product_of(m, n, kn, matrix_of(a, TILE_ROW), 1, b, c, 1, NULL);
}

#endif
