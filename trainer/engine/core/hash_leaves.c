#include "core/hash_leaves.h"

#include <stdbool.h>

#include "core/cpu.h"
#include "core/hash.h"
#include "core/hash_beside.h"
#include "core/hash_x86.h"

#if defined(__x86_64__)
#include <stdatomic.h>
#endif

enum {
    LANES = 16,
    FEW = 8 /* below so many leaves sixteen lanes take longer than two at a time */
};

/* A leaf on its way: what of its block is still to come, and where its digest goes. */
typedef struct lane {
    hs_sha256 sha;
    const uint8_t *at;
    size_t left;
    uint8_t *to;
} lane;

/* Where the next leaf begins. */
typedef struct walk {
    const uint8_t *at;
    const uint64_t *lengths; /* of `count` pieces after this one */
    size_t count, block;
    uint64_t left; /* of this piece */
    uint8_t *to;
    const hs_sha256_chunk *then; /* data behind it, or NULL */
} walk;

static walk leaves_of(const hs_sha256_chunk *chunk, size_t block, const hs_sha256_chunk *then) {
    return (walk){.at = chunk->data,
                  .lengths = chunk->lengths,
                  .count = chunk->count,
                  .block = block,
                  .to = chunk->leaves,
                  .then = then};
}

static bool next_leaf(walk *rest, lane *leaf) {
    while (!rest->left) {
        if (rest->count) {
            rest->left = *rest->lengths++;
            rest->count--;
        } else if (rest->then)
            *rest = leaves_of(rest->then, rest->block, NULL);
        else
            return false;
    }
    hs_sha256_init(&leaf->sha);
    leaf->at = rest->at;
    leaf->left = rest->left < rest->block ? rest->left : rest->block;
    leaf->to = rest->to;
    rest->at += leaf->left;
    rest->left -= leaf->left;
    rest->to += HS_SHA256_BYTES;
    return true;
}

static void end_leaf(lane *leaf) {
    hs_sha256_update(&leaf->sha, leaf->at, leaf->left);
    hs_sha256_final(&leaf->sha, leaf->to);
}

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

/* Compilers regroup sums, and then each round waits for four or five operations of the one before it; in this order, in
 * which the newest comes last, for three: 0.14 s a GB for 0.20 (Zen 5, where each takes two cycles). */
#define AS_IT_STANDS(x) __asm__("" : "+v"(x))

/* As many blocks of 64 bytes more of each lane. */
WIDE void sha_lanes(uint32_t states[8][LANES], const uint8_t *const p[LANES], size_t blocks) {
    __m512i state[8];
    for (int i = 0; i < 8; i++) state[i] = _mm512_load_si512(states[i]);
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
                __m512i d = s[(3 - i) & 7], e_new = ADD(d, ADD(s[(7 - i) & 7], ADD(k, w[i])));
                AS_IT_STANDS(e_new);
                e_new = ADD(e_new, CH(e, f, g));
                AS_IT_STANDS(e_new);
                e_new = ADD(e_new, XOR3(ROR(e, 6), ROR(e, 11), ROR(e, 25)));
                AS_IT_STANDS(e_new);
                __m512i a_new = ADD(_mm512_sub_epi32(e_new, d), MAJ(a, b, c));
                AS_IT_STANDS(a_new);
                s[(7 - i) & 7] = ADD(a_new, XOR3(ROR(a, 2), ROR(a, 13), ROR(a, 22)));
                s[(3 - i) & 7] = e_new;
                if (turn < 3) SCHEDULE(w, i);
            }
        }
        for (int i = 0; i < 8; i++) state[i] = ADD(state[i], s[i]);
    }
    for (int i = 0; i < 8; i++) _mm512_store_si512(states[i], state[i]);
    _mm256_zeroupper(); /* as in crc32.c */
}

/* So much of it is in its state. */
static void taken(lane *leaf, size_t bytes) {
    leaf->at += bytes;
    leaf->left -= bytes;
    leaf->sha.bytes += bytes;
}

/* Sixteen leaves side by side; where one ends, the next begins in its lane. What is left when few are, stays in
 * `lanes`, begun; how many those are. Beside them, unless it is NULL, two that are not of `rest`, as far as both go. */
WIDE size_t leaves_lanes(walk *rest, lane lanes[LANES], lane *two) {
    _Alignas(64) uint32_t states[8][LANES] = {{0}};
    size_t n = 0;
    for (;;) {
        for (; n < LANES && next_leaf(rest, &lanes[n]); n++)
            for (int i = 0; i < 8; i++) states[i][n] = lanes[n].sha.state[i];
        if (n < FEW) break;
        const uint8_t *p[LANES];
        size_t least = lanes[0].left;
        for (size_t l = 0; l < LANES; l++) { /* lanes without a leaf compute the first again */
            p[l] = lanes[l < n ? l : 0].at;
            if (l < n && lanes[l].left < least) least = lanes[l].left;
        }
        size_t blocks = least / 64;
        const size_t beside =
            two ? (two[0].left < two[1].left ? two[0].left : two[1].left) / HS_BESIDE_BYTES : 0;
        if (beside) {
            if (beside < blocks) blocks = beside;
            hs_sha256_beside(states, p, (uint32_t *[]){two[0].sha.state, two[1].sha.state},
                             (const uint8_t *[]){two[0].at, two[1].at}, blocks);
            for (int l = 0; l < 2; l++) taken(&two[l], blocks * HS_BESIDE_BYTES);
        } else
            sha_lanes(states, p, blocks);
        for (size_t l = n; l-- > 0;) {
            taken(&lanes[l], 64 * blocks);
            if (lanes[l].left >= 64) continue;
            for (int i = 0; i < 8; i++) lanes[l].sha.state[i] = states[i][l];
            end_leaf(&lanes[l]);
            lanes[l] = lanes[--n];
            for (int i = 0; i < 8; i++) states[i][l] = states[i][n];
        }
    }
    for (size_t l = 0; l < n; l++)
        for (int i = 0; i < 8; i++) lanes[l].sha.state[i] = states[i][l];
    return n;
}
#else
static bool has_lanes(void) {
    return false;
}
static size_t leaves_lanes(walk *rest, lane lanes[LANES], lane *two) {
    (void)rest, (void)lanes, (void)two;
    return 0;
}
#endif

/* Two at a time, those that were begun first; the next begins where the shorter one has ended. */
static void leaves_pairs(walk *rest, lane *lanes, size_t begun) {
    lane two[2];
    size_t n = 0;
    for (;;) {
        for (; n < 2 && begun; n++) two[n] = lanes[--begun];
        while (n < 2 && next_leaf(rest, &two[n])) n++;
        if (n < 2) break;
        const size_t bytes = two[0].left < two[1].left ? two[0].left : two[1].left;
        hs_sha256_update_both((hs_sha256 *[]){&two[0].sha, &two[1].sha},
                              (const uint8_t *[]){two[0].at, two[1].at}, bytes);
        for (size_t l = n; l-- > 0;) {
            two[l].at += bytes;
            two[l].left -= bytes;
            if (two[l].left) continue;
            end_leaf(&two[l]);
            two[l] = two[--n];
        }
    }
    if (n) end_leaf(&two[0]);
}

/* The digest of everything is one chain, and a leaf's fits beside it into the time that it takes. */
static void leaves_and_whole(walk *rest, uint8_t *whole) {
    hs_sha256 all;
    hs_sha256_init(&all);
    for (lane leaf; next_leaf(rest, &leaf); leaf.left = 0, end_leaf(&leaf))
        hs_sha256_update_both((hs_sha256 *[]){&all, &leaf.sha},
                              (const uint8_t *[]){leaf.at, leaf.at}, leaf.left);
    hs_sha256_final(&all, whole);
}

const uint32_t hs_hash_version = HS_HASH_VERSION;

void hs_sha256_leaves(const void *data, const uint64_t *lengths, size_t count, size_t block,
                      uint8_t *leaves, uint8_t *whole) {
    const hs_sha256_chunk chunk = {data, lengths, count, leaves, whole};
    walk rest = leaves_of(&chunk, block, NULL);
    lane lanes[LANES];
    if (whole)
        leaves_and_whole(&rest, whole);
    else
        leaves_pairs(&rest, lanes, has_lanes() ? leaves_lanes(&rest, lanes, NULL) : 0);
}

static lane whole_of(const hs_sha256_chunk *chunk) {
    lane all = {.at = chunk->data, .to = chunk->whole};
    hs_sha256_init(&all.sha);
    for (size_t i = 0; i < chunk->count; i++) all.left += chunk->lengths[i];
    return all;
}

void hs_sha256_two_chunks(const hs_sha256_chunk chunks[2], size_t block) {
    lane two[2] = {whole_of(&chunks[0]), whole_of(&chunks[1])}, begun[LANES + 2];
    walk rest = leaves_of(&chunks[0], block, &chunks[1]);
    if (has_lanes() && two[0].sha.by_instructions) {
        size_t n = leaves_lanes(&rest, begun, two);
        begun[n++] = two[0];
        begun[n++] = two[1];
        leaves_pairs(&rest, begun, n);
    } else
        for (int c = 0; c < 2; c++)
            hs_sha256_leaves(chunks[c].data, chunks[c].lengths, chunks[c].count, block,
                             chunks[c].leaves, chunks[c].whole);
}
