#include "core/hash_beside.h"

#include "core/hash_x86.h"

#if defined(__x86_64__)

/* The SHA instructions keep one of the vector units busy, the lanes the others: of two chunks of 64 MiB all digests take
 * 0.40 to 0.44 s a GB, where chains and then lanes take 0.48 and all by the SHA instructions 0.62 (Zen 5, gcc 12).
 *
 * The SHA instructions know sixteen registers, and run at half their speed while anything is in the upper part of any of
 * those. So the lanes live in the other sixteen, which no compiler can be told but by assembly: states in 16 to 23, sums
 * in 24 to 31, words in memory. Where they are finely mixed, both fit into what the CPU looks ahead. */

#define BESIDE __attribute__((target("avx512f,avx512bw,sha"))) static

/* A round of all lanes, of word i of turn t. */
#define LANES_ROUND(a, b, c, d, e, f, g, h, i, t)                                                  \
    __asm__ volatile(                                                                              \
        "vpbroadcastd %c[ki](%[k]), %%zmm28\n"                                                     \
        "vpaddd %c[wi](%[w]), %[H], %[H]\n"                                                        \
        "vpaddd %%zmm28, %[H], %[H]\n"                                                             \
        "vprord $6, %[E], %%zmm24\n"                                                               \
        "vprord $11, %[E], %%zmm25\n"                                                              \
        "vprord $25, %[E], %%zmm26\n"                                                              \
        "vmovdqa64 %[E], %%zmm27\n"                                                                \
        "vpternlogd $0xca, %[G], %[F], %%zmm27\n"                                                  \
        "vpternlogd $0x96, %%zmm25, %%zmm26, %%zmm24\n"                                            \
        "vpaddd %%zmm27, %[H], %[H]\n"                                                             \
        "vpaddd %%zmm24, %[H], %[H]\n"                                                             \
        "vpaddd %[H], %[D], %[D]\n"                                                                \
        "vprord $2, %[A], %%zmm24\n"                                                               \
        "vprord $13, %[A], %%zmm25\n"                                                              \
        "vprord $22, %[A], %%zmm26\n"                                                              \
        "vmovdqa64 %[A], %%zmm27\n"                                                                \
        "vpternlogd $0xe8, %[C], %[B], %%zmm27\n"                                                  \
        "vpternlogd $0x96, %%zmm25, %%zmm26, %%zmm24\n"                                            \
        "vpaddd %%zmm27, %[H], %[H]\n"                                                             \
        "vpaddd %%zmm24, %[H], %[H]\n"                                                             \
        : [H] "+v"(h), [D] "+v"(d)                                                                 \
        : [A] "v"(a), [B] "v"(b), [C] "v"(c), [E] "v"(e), [F] "v"(f), [G] "v"(g), [w] "r"(w),      \
          [k] "r"(hs_sha256_k), [wi] "i"(64 * (i)), [ki] "i"(4 * (16 * (t) + (i)))                 \
        : "xmm24", "xmm25", "xmm26", "xmm27", "xmm28", "memory");

/* The word of the round sixteen later, in its place. */
#define LANES_WORD(i)                                                                              \
    __asm__ volatile("vmovdqa64 %c[w1](%[w]), %%zmm28\n"                                           \
                     "vmovdqa64 %c[w14](%[w]), %%zmm31\n"                                          \
                     "vprord $7, %%zmm28, %%zmm29\n"                                               \
                     "vprord $18, %%zmm28, %%zmm30\n"                                              \
                     "vpsrld $3, %%zmm28, %%zmm28\n"                                               \
                     "vpternlogd $0x96, %%zmm29, %%zmm30, %%zmm28\n"                               \
                     "vpaddd %c[w0](%[w]), %%zmm28, %%zmm28\n"                                     \
                     "vpaddd %c[w9](%[w]), %%zmm28, %%zmm28\n"                                     \
                     "vprord $17, %%zmm31, %%zmm29\n"                                              \
                     "vprord $19, %%zmm31, %%zmm30\n"                                              \
                     "vpsrld $10, %%zmm31, %%zmm31\n"                                              \
                     "vpternlogd $0x96, %%zmm29, %%zmm30, %%zmm31\n"                               \
                     "vpaddd %%zmm31, %%zmm28, %%zmm28\n"                                          \
                     "vmovdqa64 %%zmm28, %c[w0](%[w])\n"                                           \
                     :                                                                             \
                     : [w] "r"(w), [w0] "i"(64 * (i)), [w1] "i"(64 * (((i) + 1) & 15)),            \
                       [w9] "i"(64 * (((i) + 9) & 15)), [w14] "i"(64 * (((i) + 14) & 15))          \
                     : "xmm28", "xmm29", "xmm30", "xmm31", "memory");
#define NO_WORD(i)

#define LANES_0(i, t, WORD) LANES_ROUND(s0, s1, s2, s3, s4, s5, s6, s7, i, t) WORD(i)
#define LANES_1(i, t, WORD) LANES_ROUND(s7, s0, s1, s2, s3, s4, s5, s6, i, t) WORD(i)
#define LANES_2(i, t, WORD) LANES_ROUND(s6, s7, s0, s1, s2, s3, s4, s5, i, t) WORD(i)
#define LANES_3(i, t, WORD) LANES_ROUND(s5, s6, s7, s0, s1, s2, s3, s4, i, t) WORD(i)
#define LANES_4(i, t, WORD) LANES_ROUND(s4, s5, s6, s7, s0, s1, s2, s3, i, t) WORD(i)
#define LANES_5(i, t, WORD) LANES_ROUND(s3, s4, s5, s6, s7, s0, s1, s2, i, t) WORD(i)
#define LANES_6(i, t, WORD) LANES_ROUND(s2, s3, s4, s5, s6, s7, s0, s1, i, t) WORD(i)
#define LANES_7(i, t, WORD) LANES_ROUND(s1, s2, s3, s4, s5, s6, s7, s0, i, t) WORD(i)

/* All rounds of a block of both digests, and eight of the lanes: from word i of turn t on. */
#define BLOCK_OF_TWO(i, t, WORD)                                                                   \
    {                                                                                              \
        const __m128i abef_old = abef, cdgh_old = cdgh, abef2_old = abef2, cdgh2_old = cdgh2;      \
        __m128i a = ni_words(p0, 0), b = ni_words(p0, 1), c = ni_words(p0, 2);                     \
        __m128i d = ni_words(p0, 3), e = ni_words(p1, 0), f = ni_words(p1, 1);                     \
        __m128i g = ni_words(p1, 2), h = ni_words(p1, 3);                                          \
        ROUNDS_TWICE(0, a, b, c, d, e, f, g, h)                                                    \
        ROUNDS_TWICE(1, b, c, d, a, f, g, h, e)                                                    \
        LANES_0((i), t, WORD)                                                                      \
        ROUNDS_TWICE(2, c, d, a, b, g, h, e, f)                                                    \
        ROUNDS_TWICE(3, d, a, b, c, h, e, f, g)                                                    \
        LANES_1((i) + 1, t, WORD)                                                                  \
        ROUNDS_TWICE(4, a, b, c, d, e, f, g, h)                                                    \
        ROUNDS_TWICE(5, b, c, d, a, f, g, h, e)                                                    \
        LANES_2((i) + 2, t, WORD)                                                                  \
        ROUNDS_TWICE(6, c, d, a, b, g, h, e, f)                                                    \
        ROUNDS_TWICE(7, d, a, b, c, h, e, f, g)                                                    \
        LANES_3((i) + 3, t, WORD)                                                                  \
        ROUNDS_TWICE(8, a, b, c, d, e, f, g, h)                                                    \
        ROUNDS_TWICE(9, b, c, d, a, f, g, h, e)                                                    \
        LANES_4((i) + 4, t, WORD)                                                                  \
        ROUNDS_TWICE(10, c, d, a, b, g, h, e, f)                                                   \
        ROUNDS_TWICE(11, d, a, b, c, h, e, f, g)                                                   \
        LANES_5((i) + 5, t, WORD)                                                                  \
        ROUNDS_TWICE(12, a, b, c, d, e, f, g, h)                                                   \
        ROUNDS_TWICE(13, b, c, d, a, f, g, h, e)                                                   \
        LANES_6((i) + 6, t, WORD)                                                                  \
        ROUNDS_TWICE(14, c, d, a, b, g, h, e, f)                                                   \
        ROUNDS_TWICE(15, d, a, b, c, h, e, f, g)                                                   \
        LANES_7((i) + 7, t, WORD)                                                                  \
        abef = _mm_add_epi32(abef, abef_old);                                                      \
        cdgh = _mm_add_epi32(cdgh, cdgh_old);                                                      \
        abef2 = _mm_add_epi32(abef2, abef2_old);                                                   \
        cdgh2 = _mm_add_epi32(cdgh2, cdgh2_old);                                                   \
        p0 += 64;                                                                                  \
        p1 += 64;                                                                                  \
    }

#define LOAD(s, i)                                                                                 \
    __asm__ volatile("vmovdqa64 (%[p]), %[S]" : [S] "=v"(s) : [p] "r"(states[i]) : "memory");
#define ADD_TO(s, i)                                                                               \
    __asm__ volatile("vpaddd (%[p]), %[S], %[S]\n"                                                 \
                     "vmovdqa64 %[S], (%[p])"                                                      \
                     : [S] "+v"(s)                                                                 \
                     : [p] "r"(states[i])                                                          \
                     : "memory");

/* What comes AHEAD steps later is asked for: sixteen rows a MiB apart lie in one set of the cache, and nothing else asks
 * early enough (0.43 s a GB without). */
enum { AHEAD = 2 };

BESIDE inline void ask_ahead(const uint8_t *const p[16], size_t at, const uint8_t *p0,
                             const uint8_t *p1) {
    for (int l = 0; l < 16; l++) _mm_prefetch((const char *)(p[l] + at + 64 * AHEAD), _MM_HINT_T0);
    for (size_t i = AHEAD * HS_BESIDE_BYTES; i < (AHEAD + 1) * HS_BESIDE_BYTES; i += 64) {
        _mm_prefetch((const char *)(p0 + i), _MM_HINT_T0);
        _mm_prefetch((const char *)(p1 + i), _MM_HINT_T0);
    }
}

__attribute__((target("avx512f,avx512bw,sha"))) void
hs_sha256_beside(uint32_t states[8][16], const uint8_t *const p[16], uint32_t *const two[2],
                 const uint8_t *const data[2], size_t steps) {
    _Alignas(64) __m512i w[16];
    __m128i abef, cdgh, sum, abef2, cdgh2, sum2;
    const uint8_t *p0 = data[0], *p1 = data[1];
    register __m512i s0 __asm__("zmm16"), s1 __asm__("zmm17"), s2 __asm__("zmm18"),
        s3 __asm__("zmm19"), s4 __asm__("zmm20"), s5 __asm__("zmm21"), s6 __asm__("zmm22"),
        s7 __asm__("zmm23");
    ni_begin(two[0], &abef, &cdgh);
    ni_begin(two[1], &abef2, &cdgh2);
    for (size_t step = 0; step < steps; step++) {
        words_of(w, p, 64 * step);
        ask_ahead(p, 64 * step, p0, p1);
        _mm256_zeroupper();
        LOAD(s0, 0)
        LOAD(s1, 1)
        LOAD(s2, 2)
        LOAD(s3, 3)
        LOAD(s4, 4)
        LOAD(s5, 5)
        LOAD(s6, 6)
        LOAD(s7, 7)
        BLOCK_OF_TWO(0, 0, LANES_WORD)
        BLOCK_OF_TWO(8, 0, LANES_WORD)
        BLOCK_OF_TWO(0, 1, LANES_WORD)
        BLOCK_OF_TWO(8, 1, LANES_WORD)
        BLOCK_OF_TWO(0, 2, LANES_WORD)
        BLOCK_OF_TWO(8, 2, LANES_WORD)
        BLOCK_OF_TWO(0, 3, NO_WORD)
        BLOCK_OF_TWO(8, 3, NO_WORD)
        ADD_TO(s0, 0)
        ADD_TO(s1, 1)
        ADD_TO(s2, 2)
        ADD_TO(s3, 3)
        ADD_TO(s4, 4)
        ADD_TO(s5, 5)
        ADD_TO(s6, 6)
        ADD_TO(s7, 7)
    }
    ni_end(two[0], abef, cdgh);
    ni_end(two[1], abef2, cdgh2);
    _mm256_zeroupper(); /* as in crc32.c */
}

#endif
