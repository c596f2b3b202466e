/* Operands of a product, packed for its micro kernel (gemm.h): A into panels of MR rows, B into panels of
 * NR columns, both [k][width] of f32, so that it streams; avx512_bf16 packs pairs as words,
 * [pair][width], the odd one above.
 */
#ifndef HS_KERNELS_CPU_PACK_H
#define HS_KERNELS_CPU_PACK_H

#include "core/ints.h"
#include "kernels/cpu/vec.h"
#include "kernels/cpu/vec_fp8.h"
#include "kernels/kernels.h"

/* Whether a pair of bf16 is one word and one instruction. */
#if HS_VEC == 2 && defined(__AVX512BF16__)
#define HS_DOT 1
#else
#define HS_DOT 0
#endif

#if HS_VEC == 2
#define MR 12 /* 24 accumulators + 2 of B + 1 of A of 32 registers */
#define NR 32
#elif HS_VEC == 1
#define MR 6 /* 12 ymm accumulators + 2 + 1 of 16 registers */
#define NR 16
#elif HS_VEC == 3
#define MR 6 /* 24 accumulators + 4 of B + 1 of A of 32 registers */
#define NR 16
#else
#define MR 4
#define NR 16
#endif

/* Element (i, k) is p[i * row + k * col]; one of row and col is 1. dt: HS_F32, HS_BF16, HS_E4M3 or
 * HS_E5M2. */
typedef struct side {
    const void *p;
    int64_t row, col;
    int dt;
} side;

/* -------------------- elements of a side, dt being a constant wherever these are inlined */

enum { SIDE_WORDS = -1 }; /* 32 bf16, as 16 words; for transpose16 */

VINLINE vf side_load_n(const void *p, int64_t at, int64_t n, int dt) {
    if (dt == SIDE_WORDS) return v_load((const float *)(const void *)((const bf16 *)p + at));
    if (dt == HS_E4M3 || dt == HS_E5M2)
        return v_from_fp8(vi_load_bytes_n((const uint8_t *)p + at, n), dt == HS_E5M2);
    return v_load_dt_n(p, at, n, dt);
}
VINLINE vf side_load(const void *p, int64_t at, int dt) {
    return side_load_n(p, at, LANES, dt);
}
VINLINE float side_load1(const void *p, int64_t at, int dt) {
    float t[LANES];
    if (dt != HS_E4M3 && dt != HS_E5M2) return load1_dt(p, at, dt);
    v_store(t, side_load_n(p, at, 1, dt));
    return t[0];
}
VINLINE int64_t side_size(int dt) {
    return dt == HS_E4M3 || dt == HS_E5M2 ? 1 : dt_size(dt);
}

#define BY_SIDE(dt, body, ...)                                                                     \
    do {                                                                                           \
        if ((dt) == HS_E4M3)                                                                       \
            body(__VA_ARGS__, HS_E4M3);                                                            \
        else if ((dt) == HS_E5M2)                                                                  \
            body(__VA_ARGS__, HS_E5M2);                                                            \
        else                                                                                       \
            BY_DTYPE(dt, body, __VA_ARGS__);                                                       \
    } while (0)

/* -------------------- transposition */

#if HS_VEC == 2
#define UNPACK(x, y, r, s)                                                                         \
    vf x##r = _mm512_unpacklo_ps(y##r, y##s), x##s = _mm512_unpackhi_ps(y##r, y##s)
#define PAIR(x, y, r, s) /* rows r, r+1, s, s+1 of the step before */                              \
    vf x##r =                                                                                      \
        _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(y##r), _mm512_castps_pd(y##s)));      \
    vf x##s = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(y##r), _mm512_castps_pd(y##s)))
#define BLOCKS(x, y, r, s, how_low, how_high)                                                      \
    vf x##r = _mm512_shuffle_f32x4(y##r, y##s, how_low),                                           \
       x##s = _mm512_shuffle_f32x4(y##r, y##s, how_high)

/* dst[k * width + i] = src[i * ld + k], 16 x 16. Row k is stored 16 wide, k ascending. */
VINLINE void transpose16(float *dst, int64_t width, const void *src, int64_t ld, int dt) {
    vf a0 = side_load(src, 0, dt), a1 = side_load(src, ld, dt), a2 = side_load(src, 2 * ld, dt),
       a3 = side_load(src, 3 * ld, dt), a4 = side_load(src, 4 * ld, dt),
       a5 = side_load(src, 5 * ld, dt), a6 = side_load(src, 6 * ld, dt),
       a7 = side_load(src, 7 * ld, dt), a8 = side_load(src, 8 * ld, dt),
       a9 = side_load(src, 9 * ld, dt), a10 = side_load(src, 10 * ld, dt),
       a11 = side_load(src, 11 * ld, dt), a12 = side_load(src, 12 * ld, dt),
       a13 = side_load(src, 13 * ld, dt), a14 = side_load(src, 14 * ld, dt),
       a15 = side_load(src, 15 * ld, dt);
    /* b: pairs of rows; c: columns 0, 1, 2, 3 (mod 4) of four rows; d, e: 4-lane blocks into place
     */
    UNPACK(b, a, 0, 1);
    UNPACK(b, a, 2, 3);
    UNPACK(b, a, 4, 5);
    UNPACK(b, a, 6, 7);
    UNPACK(b, a, 8, 9);
    UNPACK(b, a, 10, 11);
    UNPACK(b, a, 12, 13);
    UNPACK(b, a, 14, 15);
    PAIR(c, b, 0, 2);
    PAIR(c, b, 1, 3);
    PAIR(c, b, 4, 6);
    PAIR(c, b, 5, 7);
    PAIR(c, b, 8, 10);
    PAIR(c, b, 9, 11);
    PAIR(c, b, 12, 14);
    PAIR(c, b, 13, 15);
    /* c0 c2 c1 c3 hold columns 0 1 2 3 (and +4, +8, +12 in the blocks) of rows 0-3; c4.. of rows
     * 4-7 */
    BLOCKS(d, c, 0, 4, 0x88, 0xdd);
    BLOCKS(d, c, 8, 12, 0x88, 0xdd);
    BLOCKS(d, c, 2, 6, 0x88, 0xdd);
    BLOCKS(d, c, 10, 14, 0x88, 0xdd);
    BLOCKS(d, c, 1, 5, 0x88, 0xdd);
    BLOCKS(d, c, 9, 13, 0x88, 0xdd);
    BLOCKS(d, c, 3, 7, 0x88, 0xdd);
    BLOCKS(d, c, 11, 15, 0x88, 0xdd);
    /* d0: rows 0-3 block 0, block 2, rows 4-7 block 0, block 2; d4: blocks 1 and 3 */
    BLOCKS(e, d, 0, 8, 0x88, 0xdd);
    BLOCKS(e, d, 4, 12, 0x88, 0xdd);
    BLOCKS(e, d, 2, 10, 0x88, 0xdd);
    BLOCKS(e, d, 6, 14, 0x88, 0xdd);
    BLOCKS(e, d, 1, 9, 0x88, 0xdd);
    BLOCKS(e, d, 5, 13, 0x88, 0xdd);
    BLOCKS(e, d, 3, 11, 0x88, 0xdd);
    BLOCKS(e, d, 7, 15, 0x88, 0xdd);
    v_store(dst, e0);
    v_store(dst + width, e2);
    v_store(dst + 2 * width, e1);
    v_store(dst + 3 * width, e3);
    v_store(dst + 4 * width, e4);
    v_store(dst + 5 * width, e6);
    v_store(dst + 6 * width, e5);
    v_store(dst + 7 * width, e7);
    v_store(dst + 8 * width, e8);
    v_store(dst + 9 * width, e10);
    v_store(dst + 10 * width, e9);
    v_store(dst + 11 * width, e11);
    v_store(dst + 12 * width, e12);
    v_store(dst + 13 * width, e14);
    v_store(dst + 14 * width, e13);
    v_store(dst + 15 * width, e15);
}
#undef UNPACK
#undef PAIR
#undef BLOCKS
#elif HS_VEC == 1
#define PAIR(x, y, r, s)                                                                           \
    __m256 x##r = _mm256_unpacklo_ps(y##r, y##s), x##s = _mm256_unpackhi_ps(y##r, y##s)
#define QUAD(x, y, r, s)                                                                           \
    __m256 x##r = _mm256_shuffle_ps(y##r, y##s, 0x44), x##s = _mm256_shuffle_ps(y##r, y##s, 0xee)
#define HALF(at, r, s, low)                                                                        \
    _mm256_storeu_ps(dst + (at) * width, _mm256_permute2f128_ps(c##r, c##s, (low) ? 0x20 : 0x31))
/* dst[k * width + i] = a_i[k], 8 x 8, k ascending */
VINLINE void transpose8(float *dst, int64_t width, __m256 a0, __m256 a1, __m256 a2, __m256 a3,
                        __m256 a4, __m256 a5, __m256 a6, __m256 a7) {
    PAIR(b, a, 0, 1);
    PAIR(b, a, 2, 3);
    PAIR(b, a, 4, 5);
    PAIR(b, a, 6, 7);
    QUAD(c, b, 0, 2); /* columns 0 and 1 (and + 4) of rows 0-3 */
    QUAD(c, b, 1, 3); /* 2 and 3 */
    QUAD(c, b, 4, 6);
    QUAD(c, b, 5, 7);
    HALF(0, 0, 4, 1);
    HALF(1, 2, 6, 1);
    HALF(2, 1, 5, 1);
    HALF(3, 3, 7, 1);
    HALF(4, 0, 4, 0);
    HALF(5, 2, 6, 0);
    HALF(6, 1, 5, 0);
    HALF(7, 3, 7, 0);
}
#undef PAIR
#undef QUAD
#undef HALF
/* As above; with a width below 16 (panels of A, at most MR = 6 wide) the rows from 8 on are not
 * stored. */
VINLINE void transpose16(float *dst, int64_t width, const void *src, int64_t ld, int dt) {
    for (int64_t i = 0; i < (width < LANES ? 8 : LANES); i += 8) {
        vf a0 = side_load(src, i * ld, dt), a1 = side_load(src, (i + 1) * ld, dt),
           a2 = side_load(src, (i + 2) * ld, dt), a3 = side_load(src, (i + 3) * ld, dt),
           a4 = side_load(src, (i + 4) * ld, dt), a5 = side_load(src, (i + 5) * ld, dt),
           a6 = side_load(src, (i + 6) * ld, dt), a7 = side_load(src, (i + 7) * ld, dt);
        transpose8(dst + i, width, a0.a, a1.a, a2.a, a3.a, a4.a, a5.a, a6.a, a7.a);
        transpose8(dst + i + 8 * width, width, a0.b, a1.b, a2.b, a3.b, a4.b, a5.b, a6.b, a7.b);
    }
}
#elif HS_VEC == 3
/* Four rows' four columns, turned: columns ascending. */
VINLINE void turn4(float32x4_t r[4], const float *src, int64_t ld) {
    float32x4_t a = vld1q_f32(src), b = vld1q_f32(src + ld), c = vld1q_f32(src + 2 * ld),
                d = vld1q_f32(src + 3 * ld);
    float64x2_t ab = vreinterpretq_f64_f32(vtrn1q_f32(a, b)), /* 0 and 2 */
        ba = vreinterpretq_f64_f32(vtrn2q_f32(a, b)),         /* 1 and 3 */
        cd = vreinterpretq_f64_f32(vtrn1q_f32(c, d)), dc = vreinterpretq_f64_f32(vtrn2q_f32(c, d));
    r[0] = vreinterpretq_f32_f64(vtrn1q_f64(ab, cd));
    r[1] = vreinterpretq_f32_f64(vtrn1q_f64(ba, dc));
    r[2] = vreinterpretq_f32_f64(vtrn2q_f64(ab, cd));
    r[3] = vreinterpretq_f32_f64(vtrn2q_f64(ba, dc));
}
/* As above; with a width below 16 (panels of A, at most MR = 6 wide) the rows from 8 on are not
 * stored. */
VINLINE void transpose16(float *dst, int64_t width, const void *src, int64_t ld, int dt) {
    const int64_t rows = width < LANES ? 8 : LANES;
    float t[LANES * LANES];
    const float *from = src;
    if (dt != HS_F32) {
        for (int64_t i = 0; i < rows; i++) v_store(t + i * LANES, side_load(src, i * ld, dt));
        from = t;
        ld = LANES;
    }
    for (int64_t k = 0; k < LANES; k += 4) {
        float32x4_t turned[4][4];
        for (int64_t i = 0; i < rows; i += 4) turn4(turned[i / 4], from + i * ld + k, ld);
        for (int64_t j = 0; j < 4; j++)
            for (int64_t i = 0; i < rows; i += 4)
                vst1q_f32(dst + (k + j) * width + i, turned[i / 4][j]);
    }
}
#else
VINLINE void transpose16(float *dst, int64_t width, const void *src, int64_t ld, int dt) {
    float t[16][16];
    for (int i = 0; i < 16; i++) v_store(t[i], side_load(src, i * ld, dt));
    for (int k = 0; k < 16; k++) {
        float row[16];
        for (int i = 0; i < 16; i++) row[i] = t[i][k];
        memcpy(dst + k * width, row, sizeof row);
    }
}
#endif

/* -------------------- pairs */

static int in_pairs(const side *a, const side *b) {
    return a->dt != HS_F32 && b->dt != HS_F32;
}

/* How long a packed panel is that holds kn of k. */
static int64_t packed_length(int64_t kn, int pairs) {
    int64_t padded = pairs ? (kn + 1) / 2 * 2 : kn;
    return pairs && HS_DOT ? padded / 2 : padded;
}

/* -------------------- packing */

/* dst[k * width + i] = s(first + i, k0 + k) for i < n, 0 for n <= i < 16; k < kn. Lanes beyond a
 * width below 16 spill into the next row, which is stored later: the last row needs 16 - width
 * floats of room behind it. */
VINLINE void pack16(float *dst, int64_t width, const side *s, int64_t first, int64_t n,
                    int64_t rows, int64_t k0, int64_t kn, int dt) {
    const char *base = (const char *)s->p + (first * s->row + k0 * s->col) * side_size(dt);
    if (s->row == 1 && s->col != 1) {
        /* contiguous along i; where the row goes on, read 16 and let the surplus be overwritten */
        int64_t take = width < LANES && first + LANES <= rows ? LANES : n;
        for (int64_t k = 0; k < kn; k++)
            v_store(dst + k * width, side_load_n(base, k * s->col, take, dt));
        return;
    }
    if (s->col != 1) { /* a row length of 1 on both sides, or a general stride: rare, small */
        for (int64_t k = 0; k < kn; k++)
            for (int64_t i = 0; i < LANES; i++)
                dst[k * width + i] = i < n ? side_load1(base, i * s->row + k * s->col, dt) : 0.0f;
        return;
    }
    int64_t k = 0;
    float t[16 * 16], turned[16 * 16];
    if (n == LANES || (width < LANES && first + LANES <= rows))
        for (; k + LANES <= kn; k += LANES)
            transpose16(dst + k * width, width, base + k * side_size(dt), s->row, dt);
    for (; k < kn; k += LANES) {
        int64_t left = hs_min(kn - k, LANES);
        for (int64_t i = 0; i < LANES; i++)
            v_store(t + i * LANES, i < n ? side_load_n(base, i * s->row + k, left, dt) : v_zero());
        transpose16(turned, LANES, t, LANES, HS_F32);
        for (int64_t j = 0; j < left; j++)
            v_store(dst + (k + j) * width, v_load(turned + j * LANES));
    }
}

#if HS_DOT
/* Two rows of numbers that bf16 holds, as words. */
VINLINE vf words_of(vf even, vf odd) {
    return v_from_bits(vi_or(v_bits(odd), vi_shr(v_bits(even), 16)));
}

/* pack16 for pairs of k. */
VINLINE void pack16_pairs(float *dst, int64_t width, const side *s, int64_t first, int64_t n,
                          int64_t rows, int64_t k0, int64_t kn, int dt) {
    const char *base = (const char *)s->p + (first * s->row + k0 * s->col) * side_size(dt);
    int64_t k = 0;
    if (s->row == 1 && s->col != 1) {
        int64_t take = width < LANES && first + LANES <= rows ? LANES : n;
        for (; k + 1 < kn; k += 2, dst += width)
            v_store(dst, words_of(side_load_n(base, k * s->col, take, dt),
                                  side_load_n(base, (k + 1) * s->col, take, dt)));
        if (k < kn) v_store(dst, words_of(side_load_n(base, k * s->col, take, dt), v_zero()));
        return;
    }
    float t[2 * LANES * LANES], turned[LANES * LANES];
    if (s->col == 1 && dt == HS_BF16) { /* words as they lie there */
        if (n == LANES || (width < LANES && first + LANES <= rows))
            for (; k + 2 * LANES <= kn; k += 2 * LANES, dst += LANES * width)
                transpose16(dst, width, base + k * 2, s->row, SIDE_WORDS);
        for (; k < kn; k += 2 * LANES) {
            int64_t left = hs_min(kn - k, 2 * LANES), words = (left + 1) / 2;
            for (int64_t i = 0; i < LANES; i++)
                v_store(t + i * LANES, i < n
                                           ? v_from_bits(_mm512_maskz_loadu_epi16(
                                                 (__mmask32)((UINT64_C(1) << left) - 1),
                                                 (const bf16 *)(const void *)base + i * s->row + k))
                                           : v_zero());
            transpose16(turned, LANES, t, LANES, HS_F32);
            for (int64_t j = 0; j < words; j++, dst += width)
                v_store(dst, v_load(turned + j * LANES));
        }
        return;
    }
    for (; k < kn; k += 2 * LANES) { /* by way of f32 */
        int64_t left = hs_min(kn - k, 2 * LANES);
        pack16(t, LANES, s, first, n, rows, k0 + k, left, dt);
        if (left % 2) v_store(t + left * LANES, v_zero());
        for (int64_t j = 0; j < left; j += 2, dst += width)
            v_store(dst, words_of(v_load(t + j * LANES), v_load(t + (j + 1) * LANES)));
    }
}
#endif

/* One of the two, by what the product needs. */
VINLINE void pack16_as(float *dst, int64_t width, const side *s, int64_t first, int64_t n,
                       int64_t rows, int64_t k0, int64_t kn, int pairs, int dt) {
#if HS_DOT
    if (pairs) {
        pack16_pairs(dst, width, s, first, n, rows, k0, kn, dt);
        return;
    }
#endif
    pack16(dst, width, s, first, n, rows, k0, kn, dt);
    if (pairs && kn % 2) /* the surplus lanes of a narrow panel: the room behind it, or the next */
        v_store(dst + kn * width, v_zero());
}

/* Rows of the next tile of A, where so many are left: the last two are alike, because a tile of few rows waits for its
 * own sums. */
static int64_t rows_of_tile(int64_t left) {
    return left > MR && left < 2 * MR ? (left + 1) / 2 : hs_min(MR, left);
}

/* Rows of a packed panel in one go: with more of them, 12 KiB apart, the nearest cache has no room for their lines. */
enum { ROWS_AT_ONCE = 8 };

VINLINE void sum_rows_dt(float *to, const side *s, int64_t begin, int64_t end, int64_t k,
                         int64_t k_end, int dt) {
    for (int64_t last = k; k < k_end; k = last) {
        last = hs_min(k + ROWS_AT_ONCE, k_end);
        const int64_t asked = hs_min(last + ROWS_AT_ONCE, k_end);
        for (int64_t n = begin; n < end; n += LANES) {
            vf sum = v_load_n(to + n, end - n);
            for (int64_t at = k; at < last; at++)
                sum = v_add(sum, side_load_n(s->p, at * s->col + n, end - n, dt));
            v_store_n(to + n, sum, end - n);
            if ((n - begin) % (64 / side_size(dt))) continue;
            for (int64_t at = last; at < asked; at++)
                __builtin_prefetch((const char *)s->p + (at * s->col + n) * side_size(dt));
        }
    }
}

/* to[i] += s(i, k), i in [begin, end), k in [k, k_end) ascending; s.row is 1. As they lie in memory: the sums wait in
 * the nearest cache. */
static void sum_rows(float *to, const side *s, int64_t begin, int64_t end, int64_t k,
                     int64_t k_end) {
    BY_DTYPE(s->dt, sum_rows_dt, to, s, begin, end, k, k_end);
}

/* Of an A whose rows lie side by side in memory, kn being even where words are made: some k at a time, so that a line
 * is still in the nearest cache when the next panel reads on in it. What spills behind a panel would hit the next one.
 * adds: to sums, as sum_rows. */
VINLINE void pack_a_rows(float *dst, const side *a, int64_t i0, int64_t m, int64_t rows, int64_t k0,
                         int64_t kn, int pairs, float *sums, int adds, int dt) {
    const int64_t words = pairs && HS_DOT, each = 1 + words, length = packed_length(kn, pairs);
    const char *base = (const char *)a->p + (i0 + k0 * a->col) * side_size(dt);
    for (int64_t k = 0; k < kn; k += ROWS_AT_ONCE * each) {
        const int64_t end = hs_min(kn, k + ROWS_AT_ONCE * each);
        for (int64_t i = 0, n; i < m; i += n) {
            n = rows_of_tile(m - i);
            const int64_t take = n < LANES && i0 + i + LANES <= rows ? LANES : n;
            float *panel = dst + i * length + k / each * n;
            const float *spills = dst + (i + n) * length - LANES + 1; /* over the panel's end */
            vf sum = adds ? v_load_n(sums + i0 + i, n) : v_zero();
            for (int64_t at = k; at < end; at += each, panel += n) {
                vf x = side_load_n(base, at * a->col + i, take, dt);
                if (adds) sum = v_add(sum, x);
#if HS_DOT
                if (words) {
                    const vf odd = side_load_n(base, (at + 1) * a->col + i, take, dt);
                    if (adds) sum = v_add(sum, odd);
                    x = words_of(x, odd);
                }
#endif
                if (panel < spills)
                    v_store(panel, x);
                else
                    v_store_n(panel, x, n);
            }
            if (adds) v_store_n(sums + i0 + i, sum, n);
        }
    }
}

VINLINE void pack_a_dt(float *dst, const side *a, int64_t i0, int64_t m, int64_t rows, int64_t k0,
                       int64_t kn, int pairs, float *sums, int dt) {
    /* measured with AVX-512, whose panels are 12 wide; elsewhere it is a few instructions more */
    if (HS_VEC == 2 && a->row == 1 && a->col != 1 && !(pairs && kn % 2)) {
        if (sums)
            pack_a_rows(dst, a, i0, m, rows, k0, kn, pairs, sums, 1, dt);
        else
            pack_a_rows(dst, a, i0, m, rows, k0, kn, pairs, sums, 0, dt);
        return;
    }
    for (int64_t i = 0, n; i < m; i += n) {
        n = rows_of_tile(m - i);
        pack16_as(dst + i * packed_length(kn, pairs), n, a, i0 + i, n, rows, k0, kn, pairs, dt);
    }
    if (sums) sum_rows_dt(sums, a, i0, i0 + m, k0, k0 + kn, dt);
}

/* Floats of A's panels: they are stored 16 wide and overlap the next. */
static int64_t size_of_a(int64_t m, int64_t length) {
    return m * length + 64;
}

/* Rows [i0, i0 + m) of A (which has `rows` rows) and k in [k0, k0 + kn), in panels of MR rows. sums: [rows], to which
 * they are added as sum_rows does; NULL: none. */
static void pack_a_as(float *dst, const side *a, int64_t i0, int64_t m, int64_t rows, int64_t k0,
                      int64_t kn, int pairs, float *sums) {
    BY_SIDE(a->dt, pack_a_dt, dst, a, i0, m, rows, k0, kn, pairs, sums);
}

#if HS_DOT
/* NR columns, side by side in memory, of two rows of k, as words. */
VINLINE void pack_two_rows(float *dst, const char *even, const char *odd, int dt) {
    if (dt != HS_BF16) {
        for (int64_t l = 0; l < NR; l += LANES)
            v_store(dst + l, words_of(side_load(even, l, dt), side_load(odd, l, dt)));
        return;
    }
#define WORD(l) ((l) | (32 + (l)) << 16) /* of the two rows' 64 numbers, l and 32 + l */
    const vi low = _mm512_setr_epi32(WORD(0), WORD(1), WORD(2), WORD(3), WORD(4), WORD(5), WORD(6),
                                     WORD(7), WORD(8), WORD(9), WORD(10), WORD(11), WORD(12),
                                     WORD(13), WORD(14), WORD(15));
#undef WORD
    const vi high = vi_add(low, vi_set1(16 << 16 | 16));
    const vi x = _mm512_loadu_si512(even), y = _mm512_loadu_si512(odd);
    v_store(dst, v_from_bits(_mm512_permutex2var_epi16(x, low, y)));
    v_store(dst + LANES, v_from_bits(_mm512_permutex2var_epi16(x, high, y)));
}
#endif

/* A whole panel of a B whose columns lie side by side in memory. kn is even where words are made. */
VINLINE void pack_b_rows(float *dst, const side *b, int64_t j0, int64_t k0, int64_t kn, int pairs,
                         int dt) {
    const int64_t ld = b->col * side_size(dt);
    const char *row = (const char *)b->p + k0 * ld + j0 * side_size(dt);
#if HS_DOT
    if (pairs) {
        for (int64_t k = 0; k < kn; k += 2, row += 2 * ld, dst += NR)
            pack_two_rows(dst, row, row + ld, dt);
        return;
    }
#endif
    (void)pairs;
    for (int64_t k = 0; k < kn; k++, row += ld, dst += NR)
        for (int64_t l = 0; l < NR; l += LANES) v_store(dst + l, side_load(row, l, dt));
}

VINLINE void pack_b_dt(float *dst, const side *b, int64_t j0, int64_t n, int64_t rows, int64_t k0,
                       int64_t kn, int pairs, int dt) {
    const int along = b->row == 1 && b->col != 1 && !(pairs && kn % 2);
    for (int64_t j = 0; j < n; j += NR) {
        float *panel = dst + j * packed_length(kn, pairs);
        if (along && j + NR <= n) {
            pack_b_rows(panel, b, j0 + j, k0, kn, pairs, dt);
            continue;
        }
        for (int64_t l = 0; l < NR && j + l < n; l += LANES)
            pack16_as(panel + l, NR, b, j0 + j + l, hs_min(LANES, n - j - l), rows, k0, kn, pairs,
                      dt);
    }
}

/* The same for B, in panels of NR, padded with zero to a multiple of 16. */
static void pack_b_as(float *dst, const side *b, int64_t j0, int64_t n, int64_t rows, int64_t k0,
                      int64_t kn, int pairs) {
    BY_SIDE(b->dt, pack_b_dt, dst, b, j0, n, rows, k0, kn, pairs);
}

#endif
