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
 * Packing: A into panels of MR rows, B into panels of NR columns, both [k][width] of f32, so that
 * the micro kernel streams; avx512_bf16 packs pairs as words, [pair][width], the odd one above. A
 * worker packs A once for every block of columns. A panel of B is multiplied right after it was
 * packed; where there are more rows than a block it is kept for the others (it fits PACK_B unless k
 * is huge), else the next panel takes its place in the near caches, and what it will be made of is
 * asked for meanwhile. Against packing all panels first that is 3 to 5 % of a step's products.
 * Measured figures: docs/, from tests/bench/bench_kernels.py.
 */
#ifndef HS_KERNELS_CPU_GEMM_H
#define HS_KERNELS_CPU_GEMM_H

#include "core/ints.h"
#include "core/threads.h"
#include "kernels/cpu/flush.h"
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

/* floats; sizes of a worker's part of the scratch */
enum {
    KC = 384,              /* block of k: a panel of B stays in the first-level cache */
    MC = 264,              /* block of rows: A stays in the second level */
    NC_MAX = 1024,         /* block of columns */
    PACK_A = MC * KC + 64, /* 64: panels are stored 16 wide and overlap the next */
    PACK_B = 1 << 20,
    PACK_C = MC * NC_MAX,
    WORKER_FLOATS = PACK_A + PACK_B + PACK_C + 64
};

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

VINLINE void pack_a_dt(float *dst, const side *a, int64_t i0, int64_t m, int64_t rows, int64_t k0,
                       int64_t kn, int pairs, int dt) {
    for (int64_t i = 0; i < m; i += MR) {
        int64_t n = hs_min(MR, m - i);
        pack16_as(dst + i * packed_length(kn, pairs), n, a, i0 + i, n, rows, k0, kn, pairs, dt);
    }
}

/* Rows [i0, i0 + m) of A (which has `rows` rows) and k in [k0, k0 + kn), in panels of MR rows. */
static void pack_a_as(float *dst, const side *a, int64_t i0, int64_t m, int64_t rows, int64_t k0,
                      int64_t kn, int pairs) {
    BY_SIDE(a->dt, pack_a_dt, dst, a, i0, m, rows, k0, kn, pairs);
}
static void pack_a(float *dst, const side *a, int64_t i0, int64_t m, int64_t rows, int64_t k0,
                   int64_t kn) {
    pack_a_as(dst, a, i0, m, rows, k0, kn, 0);
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
static void pack_b(float *dst, const side *b, int64_t j0, int64_t n, int64_t rows, int64_t k0,
                   int64_t kn) {
    pack_b_as(dst, b, j0, n, rows, k0, kn, 0);
}

/* -------------------- micro kernel */

#define ROWS_OF_TILE(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)

/* How a panel's rows are added, one after the other. */
enum { IN_TURN, ODD_FIRST, WORDS };

VINLINE vf v_dot(vf words_a, vf words_b, vf c) {
#if HS_DOT
    return _mm512_dpbf16_ps(c, (__m512bh)words_a, (__m512bh)words_b);
#else
    (void)words_a, (void)words_b;
    return c;
#endif
}

/* c[i * ldc + j] = (load ? c : 0) + chain over k < kn of a[k * mr + i] b[k * NR + j], i < mr, j < n
 * <= 16 nv. mr, nv and how are constants where this is inlined. */
VINLINE void micro_tile(const int mr, const int nv, const int how, int64_t kn, const float *a,
                        const float *b, float *c, int64_t ldc, int64_t n, int load) {
#define ADD(x, b, c) c = how == WORDS ? v_dot(x, b, c) : v_fma(x, b, c)
#define DECLARE(i)   vf c##i##_0 = v_zero(), c##i##_1 = v_zero();
#define FETCH(i)                                                                                   \
    if (i < mr) {                                                                                  \
        c##i##_0 = v_load_n(c + i * ldc, n);                                                       \
        if (nv > 1) c##i##_1 = v_load_n(c + i * ldc + LANES, n - LANES);                           \
    }
#define STEP(i)                                                                                    \
    if (i < mr) {                                                                                  \
        vf x = v_set1(a[at * mr + i]);                                                             \
        ADD(x, b0, c##i##_0);                                                                      \
        if (nv > 1) ADD(x, b1, c##i##_1);                                                          \
    }
#define PUT(i)                                                                                     \
    if (i < mr) {                                                                                  \
        v_store_n(c + i * ldc, c##i##_0, n);                                                       \
        if (nv > 1) v_store_n(c + i * ldc + LANES, c##i##_1, n - LANES);                           \
    }
    ROWS_OF_TILE(DECLARE)
    if (load) {
        ROWS_OF_TILE(FETCH)
    }
    for (int64_t k = 0; k < kn; k += how == ODD_FIRST ? 2 : 1) {
        for (int at = how == ODD_FIRST; at >= 0; at--) {
            vf b0 = v_load(b + at * NR), b1 = nv > 1 ? v_load(b + at * NR + LANES) : b0;
            ROWS_OF_TILE(STEP)
            (void)b1;
        }
        a += how == ODD_FIRST ? 2 * mr : mr;
        b += how == ODD_FIRST ? 2 * NR : NR;
    }
    ROWS_OF_TILE(PUT)
#undef ADD
#undef DECLARE
#undef FETCH
#undef STEP
#undef PUT
}

typedef void (*micro_fn)(int64_t kn, const float *a, const float *b, float *c, int64_t ldc,
                         int64_t n, int load);

#define MICRO_OF(name, mr, nv, how)                                                                \
    static __attribute__((unused)) void name(int64_t kn, const float *a, const float *b, float *c, \
                                             int64_t ldc, int64_t n, int load) {                   \
        micro_tile(mr, nv, how, kn, a, b, c, ldc, n, load);                                        \
    }
#define MICRO(mr)                                                                                  \
    MICRO_OF(micro_##mr##_1, mr, 1, IN_TURN)                                                       \
    MICRO_OF(micro_##mr##_2, mr, NR / LANES, IN_TURN)                                              \
    MICRO_OF(pairs_##mr##_1, mr, 1, HS_DOT ? WORDS : ODD_FIRST)                                    \
    MICRO_OF(pairs_##mr##_2, mr, NR / LANES, HS_DOT ? WORDS : ODD_FIRST)
MICRO(1)
MICRO(2)
MICRO(3)
MICRO(4)
#if MR > 4
MICRO(5)
MICRO(6)
#endif
#if MR > 6
MICRO(7)
MICRO(8)
MICRO(9)
MICRO(10)
MICRO(11)
MICRO(12)
#endif
#undef MICRO
#undef MICRO_OF

#define BOTH(mr)                                                                                   \
    {                                                                                              \
        {micro_##mr##_1, micro_##mr##_2},                                                          \
        {pairs_##mr##_1, pairs_##mr##_2},                                                          \
    }
/* by rows, whether in pairs, and whether wider than a vector */
static const micro_fn micro[MR + 1][2][2] = {
    {{NULL, NULL}, {NULL, NULL}},
    BOTH(1),
    BOTH(2),
    BOTH(3),
    BOTH(4),
#if MR > 4
    BOTH(5),
    BOTH(6),
#endif
#if MR > 6
    BOTH(7),
    BOTH(8),
    BOTH(9),
    BOTH(10),
    BOTH(11),
    BOTH(12),
#endif
};
#undef BOTH

/* What will be packed next: `rows` of memory, `stride` bytes apart, of so many cache lines each. */
typedef struct ahead {
    const char *at;
    int64_t stride, rows, lines;
} ahead;

/* Asks for so many lines more, which come while products are made. */
static void fetch(ahead *next, int64_t count) {
    for (; next->rows && count > 0; count -= next->lines, next->rows--, next->at += next->stride)
        for (int64_t l = 0; l < next->lines; l++) __builtin_prefetch(next->at + 64 * l, 0, 2);
}

/* c[m, n] (f32, rows ldc apart) from packed panels, each kn long. */
static void multiply_panels(int64_t m, int64_t n, int64_t kn, int pairs, const float *a,
                            const float *b, float *c, int64_t ldc, int load, ahead next) {
    const int64_t each = hs_ceil_div(next.rows * next.lines, hs_ceil_div(m, MR));
    for (int64_t j = 0; j < n; j += NR) {
        int64_t nn = hs_min(NR, n - j);
        for (int64_t i = 0; i < m; i += MR) {
            int64_t mr = hs_min(MR, m - i);
            for (int64_t r = i + MR; r < hs_min(i + 2 * MR, m); r++) { /* the next tile of c */
                __builtin_prefetch(c + r * ldc + j, 1);
                __builtin_prefetch(c + r * ldc + j + nn - 1, 1);
            }
            fetch(&next, each);
            micro[mr][pairs][nn > LANES](kn, a + i * kn, b + j * kn, c + i * ldc + j, ldc, nn,
                                         load);
        }
    }
}

/* Of numbers added in turn. */
static void multiply_in_turn(int64_t m, int64_t n, int64_t kn, const float *a, const float *b,
                             float *c, int64_t ldc, int load, ahead next) {
    multiply_panels(m, n, kn, 0, a, b, c, ldc, load, next);
}
static void multiply_packed(int64_t m, int64_t n, int64_t kn, const float *a, const float *b,
                            float *c, int64_t ldc, int load) {
    multiply_in_turn(m, n, kn, a, b, c, ldc, load, (ahead){0});
}

/* Of pairs: kn is their packed length. VDPBF16PS does not ask for the mode. */
static __attribute__((noinline)) void multiply_pairs(int64_t m, int64_t n, int64_t kn,
                                                     const float *a, const float *b, float *c,
                                                     int64_t ldc, int load, ahead next) {
    const flush_mode before = HS_DOT ? 0 : flush_begin();
    multiply_panels(m, n, kn, 1, a, b, c, ldc, load, next);
    if (!HS_DOT) flush_end(before);
}

/* -------------------- driver */

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
} gemm;

typedef struct gemm_job {
    const gemm *g;
    float *scratch;
    int64_t split_m, split_n; /* the grid of workers; */
    int64_t each_m, each_n;   /* what one of them does, whole tiles */
} gemm_job;

VINLINE void finish_dt(const gemm *g, const float *c, int64_t ldc, int64_t i0, int64_t m,
                       int64_t j0, int64_t n, int dt) {
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j += LANES) {
            int64_t left = n - j, at = (i0 + i) * g->ld_out + j0 + j;
            vf x = v_load_n(c + i * ldc + j, left);
            if (g->scale_a) x = v_mul(v_mul(x, v_set1(*g->scale_a)), v_set1(*g->scale_b));
            if (g->bias) x = v_add(x, v_load_n(g->bias + j0 + j, left));
            if (g->res) x = v_add(x, v_load_dt_n(g->res, (i0 + i) * g->ld_res + j0 + j, left, dt));
            if (g->add_old) x = v_add(x, v_load_dt_n(g->out, at, left, dt));
            v_store_dt_n(g->out, at, x, left, dt);
        }
}

/* The panel that begins with column j, of columns below `end` and k in [k, k + kn), where its lines
 * lie too far apart for the processor to foresee them. */
static ahead ahead_of(const side *b, int64_t j, int64_t end, int64_t k, int64_t kn) {
    const int64_t size = side_size(b->dt);
    if (b->row != 1 || b->col == 1 || j >= end) return (ahead){0};
    return (ahead){(const char *)b->p + (j + k * b->col) * size, b->col * size, kn,
                   hs_ceil_div(hs_min(NR, end - j) * size, 64)};
}

/* Columns [j0, j0 + n) of rows [i0, i1). */
static void gemm_columns(const gemm *g, float *scratch, int64_t i0, int64_t i1, int64_t j0,
                         int64_t n) {
    float *pa = scratch, *pb = pa + PACK_A, *pc = pb + PACK_B;
    int direct = g->dt_out == HS_F32 && !g->bias && !g->res && !g->add_old && !g->scale_a;
    const int pairs = in_pairs(&g->a, &g->b);
    int64_t kc = hs_ceil_div(g->k, hs_ceil_div(g->k, pairs && HS_DOT ? 2 * KC : KC));
    if (pairs) kc = (kc + 1) / 2 * 2;
    const int64_t packed_k = packed_length(g->k, pairs);
    int64_t wide = hs_ceil_div(n, NR) * NR;
    int keep_b = i1 - i0 > MC && wide * packed_k <= PACK_B;
    int64_t row_blocks = hs_ceil_div(i1 - i0, MC);
    int64_t mc = hs_ceil_div(hs_ceil_div(i1 - i0, row_blocks), MR) * MR;
    for (int64_t i = i0; i < i1; i += mc) {
        int64_t m = hs_min(mc, i1 - i);
        float *c = direct ? (float *)g->out + i * g->ld_out + j0 : pc;
        int64_t ldc = direct ? g->ld_out : wide;
        for (int64_t k = 0; k < g->k; k += kc) {
            int64_t kn = hs_min(kc, g->k - k);
            const int64_t length = packed_length(kn, pairs);
            const int pack = !keep_b || i == i0;
            pack_a_as(pa, &g->a, i, m, g->m, k, kn, pairs);
            /* a panel is multiplied right after it was packed, from the near caches */
            for (int64_t j = 0; j < n; j += pack ? NR : n) {
                const int64_t nn = pack ? hs_min(NR, n - j) : n;
                float *b = keep_b ? pb + wide * packed_length(k, pairs) + j * length : pb;
                if (pack) pack_b_as(b, &g->b, j0 + j, nn, g->n, k, kn, pairs);
                (pairs ? multiply_pairs : multiply_in_turn)(
                    m, nn, length, pa, b, c + j, ldc, k > 0 || g->from_old,
                    keep_b ? (ahead){0} : ahead_of(&g->b, j0 + j + NR, j0 + n, k, kn));
            }
        }
        if (!direct) BY_DTYPE(g->dt_out, finish_dt, g, pc, ldc, i, m, j0, n);
    }
}

static void gemm_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const gemm_job *job = ctx;
    const gemm *g = job->g;
    const int64_t packed_k = packed_length(g->k, in_pairs(&g->a, &g->b));
    float *scratch = job->scratch + (int64_t)worker * WORKER_FLOATS;
    for (int64_t cell = begin; cell < end; cell++) {
        int64_t i0 = cell / job->split_n * job->each_m, j0 = cell % job->split_n * job->each_n;
        int64_t i1 = hs_min(g->m, i0 + job->each_m), j1 = hs_min(g->n, j0 + job->each_n);
        if (i0 >= i1 || j0 >= j1) continue;
        /* as many columns at once as keep B packed across the blocks of rows, 256 at least */
        int64_t nc = hs_min(NC_MAX, hs_max(256, PACK_B / hs_max(1, packed_k) / NR * NR));
        if (i1 - i0 <= MC) nc = NC_MAX;
        nc = hs_ceil_div(hs_ceil_div(j1 - j0, hs_ceil_div(j1 - j0, nc)), NR) * NR;
        for (int64_t j = j0; j < j1; j += nc)
            gemm_columns(g, scratch, i0, i1, j, hs_min(nc, j1 - j));
    }
}

/* Runs g on all threads of the context. */
static void gemm_run(hs_kernel_ctx *ctx, const gemm *g) {
    int64_t threads = hs_pool_threads(ctx->pool);
    gemm_job job = {g, ctx->scratch, 1, 1, g->m, g->n};
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
