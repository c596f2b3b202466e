/* Pieces of SHA-256 for x86-64, which several loops are made of: rounds by the SHA instructions, of one digest or of two
 * side by side, and the words of sixteen digests in the lanes of AVX-512. For hash*.c alone. */
#ifndef HS_CORE_HASH_X86_H
#define HS_CORE_HASH_X86_H

#if defined(__x86_64__)

#include "core/hash.h"

#include <immintrin.h>

#define NI __attribute__((target("sha,sse4.1,ssse3"))) static

/* The instructions hold the state as (a b e f) and (c d g h). */
NI inline void ni_begin(const uint32_t state[8], __m128i *abef, __m128i *cdgh) {
    __m128i abcd = _mm_loadu_si128((const __m128i *)state); /* lanes low to high: a b c d */
    __m128i efgh = _mm_loadu_si128((const __m128i *)(state + 4));
    __m128i cdab = _mm_shuffle_epi32(abcd, 0xB1);
    __m128i hgfe = _mm_shuffle_epi32(efgh, 0x1B);
    *abef = _mm_alignr_epi8(cdab, hgfe, 8);
    *cdgh = _mm_blend_epi16(hgfe, cdab, 0xF0);
}

NI inline void ni_end(uint32_t state[8], __m128i abef, __m128i cdgh) {
    __m128i feba = _mm_shuffle_epi32(abef, 0x1B);
    __m128i dchg = _mm_shuffle_epi32(cdgh, 0xB1);
    _mm_storeu_si128((__m128i *)state, _mm_blend_epi16(feba, dchg, 0xF0));
    _mm_storeu_si128((__m128i *)(state + 4), _mm_alignr_epi8(dchg, feba, 8));
}

NI inline __m128i ni_words(const uint8_t *data, int i) {
    const __m128i swap = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
    return _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(const void *)data + i), swap);
}

/* Rounds 4 i to 4 i + 3, whose words are w0, and what they can do for the words of later ones, w1 to w3. In
 * two halves, and of variables: two digests at once just fit into the sixteen registers (4 of states, 8 of
 * words, xmm0, two sums); arrays of words stay in memory, at half the speed. */
#define HALF(i, abef, cdgh, sum, w0, w1, w3)                                                       \
    sum =                                                                                          \
        _mm_add_epi32(w0, _mm_load_si128((const __m128i *)(const void *)(hs_sha256_k + 4 * (i)))); \
    if ((i) > 2 && (i) < 15)                                                                       \
        w1 = _mm_sha256msg2_epu32(_mm_add_epi32(w1, _mm_alignr_epi8(w0, w3, 4)), w0);              \
    cdgh = _mm_sha256rnds2_epu32(cdgh, abef, sum);
#define OTHER_HALF(i, abef, cdgh, sum, w0, w3)                                                     \
    if ((i) > 0 && (i) < 13) w3 = _mm_sha256msg1_epu32(w3, w0);                                    \
    abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(sum, 0x0E));

#define ROUNDS_TWICE(i, w0, w1, w2, w3, v0, v1, v2, v3)                                            \
    HALF(i, abef, cdgh, sum, w0, w1, w3)                                                           \
    HALF(i, abef2, cdgh2, sum2, v0, v1, v3)                                                        \
    OTHER_HALF(i, abef, cdgh, sum, w0, w3)                                                         \
    OTHER_HALF(i, abef2, cdgh2, sum2, v0, v3)

/* w[i] of all lanes from the 16 words of a block of each lane: a transposition, and bytes turned round. */
__attribute__((target("avx512f,avx512bw"))) static inline void
words_of(__m512i w[16], const uint8_t *const p[16], size_t at) {
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

#endif

#endif
