#include "core/hash_leaves.h"

#include <stdbool.h>

#include "core/cpu.h"
#include "core/hash.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <stdatomic.h>
#endif

enum {
    LANES = 16,
    FEW = 6 /* below so many blocks sixteen lanes take longer than two at a time */
};

#if defined(__x86_64__)
#define WIDE __attribute__((target("avx512f,avx512bw"))) static

static bool has_lanes(void) {
    enum { NO = 1, YES };
    static _Atomic int known;
    int has = atomic_load_explicit(&known, memory_order_relaxed);
    if (!has) {
        has = hs_cpu_has(bit_AVX512F | bit_AVX512BW, 0, HS_CPU_ZMM) ? YES : NO;
        atomic_store_explicit(&known, has, memory_order_relaxed);
    }
    return has == YES;
}

/* w[i] of all lanes from the 16 words of a block of each lane: a transposition, and bytes turned round. */
WIDE inline void words_of(__m512i w[16], const uint8_t *const p[LANES], size_t at) {
    const __m512i swap = _mm512_set4_epi32(0x0c0d0e0f, 0x08090a0b, 0x04050607, 0x00010203);
    __m512i r[16], t[16];
#pragma GCC unroll 16
    for (int l = 0; l < 16; l++)
        r[l] = _mm512_shuffle_epi8(_mm512_loadu_si512((const void *)(p[l] + at)), swap);
#pragma GCC unroll 16
    for (int l = 0; l < 16; l += 2) {
        t[l] = _mm512_unpacklo_epi32(r[l], r[l + 1]);
        t[l + 1] = _mm512_unpackhi_epi32(r[l], r[l + 1]);
    }
#pragma GCC unroll 16
    for (int l = 0; l < 16; l += 4) { /* r[l + j]: word j (mod 4) of lanes l to l + 3 */
        r[l] = _mm512_unpacklo_epi64(t[l], t[l + 2]);
        r[l + 1] = _mm512_unpackhi_epi64(t[l], t[l + 2]);
        r[l + 2] = _mm512_unpacklo_epi64(t[l + 1], t[l + 3]);
        r[l + 3] = _mm512_unpackhi_epi64(t[l + 1], t[l + 3]);
    }
#pragma GCC unroll 16
    for (int j = 0; j < 4; j++) {
        __m512i even = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88); /* words j, 8 + j of lanes 0-7 */
        __m512i odd = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);  /* 4 + j, 12 + j */
        __m512i even2 = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
        __m512i odd2 = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
        w[j] = _mm512_shuffle_i32x4(even, even2, 0x88);
        w[8 + j] = _mm512_shuffle_i32x4(even, even2, 0xdd);
        w[4 + j] = _mm512_shuffle_i32x4(odd, odd2, 0x88);
        w[12 + j] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
    }
}

#define ROR(x, n)      _mm512_ror_epi32(x, n)
#define XOR3(x, y, z)  _mm512_ternarylogic_epi32(x, y, z, 0x96)
#define CH(x, y, z)    _mm512_ternarylogic_epi32(x, y, z, 0xca)
#define MAJ(x, y, z)   _mm512_ternarylogic_epi32(x, y, z, 0xe8)
#define ADD(x, y)      _mm512_add_epi32(x, y)
#define SCHEDULE(w, i) /* the word of the round sixteen later, in its place */                     \
    w[(i) & 15] =                                                                                  \
        ADD(ADD(w[(i) & 15], XOR3(ROR(w[((i) + 1) & 15], 7), ROR(w[((i) + 1) & 15], 18),           \
                                  _mm512_srli_epi32(w[((i) + 1) & 15], 3))),                       \
            ADD(w[((i) + 9) & 15], XOR3(ROR(w[((i) + 14) & 15], 17), ROR(w[((i) + 14) & 15], 19),  \
                                        _mm512_srli_epi32(w[((i) + 14) & 15], 10))))

/* As many blocks of 64 bytes more of each lane. */
WIDE void sha_lanes(__m512i state[8], const uint8_t *const p[LANES], size_t blocks) {
    for (size_t block = 0; block < blocks; block++) {
        __m512i w[16], s[8];
        words_of(w, p, 64 * block);
        for (int i = 0; i < 8; i++) s[i] = state[i];
#pragma GCC unroll 4
        for (int turn = 0; turn < 4; turn++) {
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) {
                __m512i a = s[-i & 7], b = s[(1 - i) & 7], c = s[(2 - i) & 7], e = s[(4 - i) & 7],
                        f = s[(5 - i) & 7], g = s[(6 - i) & 7];
                __m512i k = _mm512_set1_epi32((int)hs_sha256_k[16 * turn + i]);
                __m512i t1 = ADD(ADD(ADD(s[(7 - i) & 7], ADD(k, w[i])), CH(e, f, g)),
                                 XOR3(ROR(e, 6), ROR(e, 11), ROR(e, 25)));
                __m512i t2 = ADD(XOR3(ROR(a, 2), ROR(a, 13), ROR(a, 22)), MAJ(a, b, c));
                s[(3 - i) & 7] = ADD(s[(3 - i) & 7], t1);
                s[(7 - i) & 7] = ADD(t1, t2);
                if (turn < 3) SCHEDULE(w, i);
            }
        }
        for (int i = 0; i < 8; i++) state[i] = ADD(state[i], s[i]);
    }
}

/* The digests of up to sixteen blocks of the same length; lanes without one compute the first again. */
WIDE void leaves_lanes(const uint8_t *const at[LANES], size_t n, size_t block,
                       uint8_t *const to[LANES]) {
    hs_sha256 one;
    __m512i state[8];
    const uint8_t *p[LANES];
    uint32_t lanes[8][LANES];
    for (size_t l = 0; l < LANES; l++) p[l] = at[l < n ? l : 0];
    hs_sha256_init(&one);
    for (int i = 0; i < 8; i++) state[i] = _mm512_set1_epi32((int)one.state[i]);
    sha_lanes(state, p, block / 64);
    for (int i = 0; i < 8; i++) _mm512_storeu_si512(lanes[i], state[i]);
    for (size_t l = 0; l < n; l++) {
        for (int i = 0; i < 8; i++) one.state[i] = lanes[i][l];
        one.bytes = block / 64 * 64;
        hs_sha256 last = one;
        hs_sha256_update(&last, p[l] + block / 64 * 64, block % 64);
        hs_sha256_final(&last, to[l]);
    }
}
#else
static bool has_lanes(void) {
    return false;
}
static void leaves_lanes(const uint8_t *const at[LANES], size_t n, size_t block,
                         uint8_t *const to[LANES]) {
    (void)at, (void)n, (void)block, (void)to;
}
#endif

/* Two of the same length at a time. */
static void leaves_pairs(const uint8_t *const at[LANES], size_t n, size_t block,
                         uint8_t *const to[LANES]) {
    for (size_t l = 0; l < n; l += 2) {
        hs_sha256 leaf, next;
        hs_sha256_init(&leaf);
        if (l + 1 == n) {
            hs_sha256_update(&leaf, at[l], block);
        } else {
            hs_sha256_init(&next);
            hs_sha256_update_both((hs_sha256 *[]){&leaf, &next},
                                  (const uint8_t *[]){at[l], at[l + 1]}, block);
            hs_sha256_final(&next, to[l + 1]);
        }
        hs_sha256_final(&leaf, to[l]);
    }
}

static void blocks_of(const uint8_t *const at[LANES], size_t n, size_t block,
                      uint8_t *const to[LANES]) {
    (has_lanes() && n >= FEW ? leaves_lanes : leaves_pairs)(at, n, block, to);
}

/* The digest of everything is one chain, and a leaf's fits beside it into the time that it takes. */
static void leaves_and_whole(const uint8_t *p, const uint64_t *lengths, size_t count, size_t block,
                             uint8_t *leaves, uint8_t *whole) {
    hs_sha256 all;
    hs_sha256_init(&all);
    for (size_t piece = 0; piece < count; piece++) {
        for (size_t left = lengths[piece]; left; leaves += HS_SHA256_BYTES) {
            size_t bytes = left < block ? left : block;
            hs_sha256 leaf;
            hs_sha256_init(&leaf);
            hs_sha256_update_both((hs_sha256 *[]){&all, &leaf}, (const uint8_t *[]){p, p}, bytes);
            hs_sha256_final(&leaf, leaves);
            p += bytes;
            left -= bytes;
        }
    }
    hs_sha256_final(&all, whole);
}

void hs_sha256_leaves(const void *data, const uint64_t *lengths, size_t count, size_t block,
                      uint8_t *leaves, uint8_t *whole) {
    const uint8_t *p = data, *at[LANES];
    uint8_t *to[LANES];
    size_t n = 0;
    if (whole) {
        leaves_and_whole(p, lengths, count, block, leaves, whole);
        return;
    }
    for (size_t piece = 0; piece < count; piece++) {
        for (size_t left = lengths[piece]; left; leaves += HS_SHA256_BYTES) {
            size_t bytes = left < block ? left : block;
            if (bytes < block) {
                hs_sha256_of(p, bytes, leaves);
            } else {
                at[n] = p, to[n] = leaves, n++;
            }
            p += bytes;
            left -= bytes;
            if (n == LANES) {
                blocks_of(at, n, block, to);
                n = 0;
            }
        }
    }
    if (n) blocks_of(at, n, block, to);
}
