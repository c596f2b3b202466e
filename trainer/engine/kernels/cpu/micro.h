/* The micro kernel of products (gemm.h): a tile of C from packed panels of A and B. */
#ifndef HS_KERNELS_CPU_MICRO_H
#define HS_KERNELS_CPU_MICRO_H

#include "kernels/cpu/ahead.h"
#include "kernels/cpu/pack.h"

#define ROWS_OF_TILE(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)

/* How a panel's rows are added, one after the other. */
enum { IN_TURN, ODD_FIRST, WORDS };
#define PAIRS_HOW (HS_DOT ? WORDS : ODD_FIRST) /* as operands in pairs are */

VINLINE vf v_dot(vf words_a, vf words_b, vf c) {
#if HS_DOT
    return _mm512_dpbf16_ps(c, (__m512bh)words_a, (__m512bh)words_b);
#else
    (void)words_a, (void)words_b;
    return c;
#endif
}

/* Where whole sums of f32 go, and what is added to them there, in this order. */
typedef struct ending {
    float *out;
    int64_t ld;
    const float *bias; /* of its columns; NULL: none */
    const float *res;  /* of its rows; NULL: none */
    int64_t ld_res;
    int add_old;
} ending;

/* c[i * ldc + j] = (load ? c times shrink[j] : 0) + chain over k < kn of a[i * row + k * lda] b[k * ldb + j], i < mr,
 * j < n <= 16 nv. mr, nv, how and row are constants where this is inlined. shrink: NULL, nothing is multiplied. near:
 * lines of memory, one of which is asked for with every k, or pair of them (all together would hold up what the
 * products read), so many turns in all as the loop has; NULL: none. packs: what the loop packs, a unit with every ask;
 * NULL: nothing. end: where sums go instead of c, and what they become; NULL: nothing */
VINLINE void micro_tile(const int mr, const int nv, const int how, int64_t kn, const float *a,
                        const int64_t row, int64_t lda, const float *b, int64_t ldb, float *c,
                        int64_t ldc, int64_t n, int load, const float *shrink, const ask *near,
                        units *packs, const ending *end) {
#define ADD(x, b, c) c = how == WORDS ? v_dot(x, b, c) : v_fma(x, b, c)
#define DECLARE(i)   vf c##i##_0 = v_zero(), c##i##_1 = v_zero();
#define FETCH(i)                                                                                   \
    if (i < mr) {                                                                                  \
        c##i##_0 = v_load_n(c + i * ldc, n);                                                       \
        if (nv > 1) c##i##_1 = v_load_n(c + i * ldc + LANES, n - LANES);                           \
    }
#define SHRINK(i)                                                                                  \
    if (i < mr) {                                                                                  \
        c##i##_0 = v_mul(c##i##_0, s0);                                                            \
        if (nv > 1) c##i##_1 = v_mul(c##i##_1, s1);                                                \
    }
#define STEP(i)                                                                                    \
    if (i < mr) {                                                                                  \
        vf x = v_set1(a[at * lda + i * row]);                                                      \
        ADD(x, b0, c##i##_0);                                                                      \
        if (nv > 1) ADD(x, b1, c##i##_1);                                                          \
    }
#define TURN                                                                                       \
    for (int at = odd; at >= 0; at--) {                                                            \
        vf b0 = v_load(b + at * ldb), b1 = nv > 1 ? v_load(b + at * ldb + LANES) : b0;             \
        ROWS_OF_TILE(STEP)                                                                         \
        (void)b1;                                                                                  \
    }                                                                                              \
    a += (1 + odd) * lda;                                                                          \
    b += (1 + odd) * ldb;
#define PLUS(i, what, at)                                                                          \
    if (i < mr) {                                                                                  \
        c##i##_0 = v_add(c##i##_0, v_load_n(what + (at), n));                                      \
        if (nv > 1) c##i##_1 = v_add(c##i##_1, v_load_n(what + (at) + LANES, n - LANES));          \
    }
#define BIAS(i)     PLUS(i, end->bias, 0)
#define RESIDUAL(i) PLUS(i, end->res, i * end->ld_res)
#define OLD(i)      PLUS(i, c, i *ldc)
#define PUT(i)                                                                                     \
    if (i < mr) {                                                                                  \
        v_store_n(c + i * ldc, c##i##_0, n);                                                       \
        if (nv > 1) v_store_n(c + i * ldc + LANES, c##i##_1, n - LANES);                           \
    }
    const int odd = how == ODD_FIRST;
    ROWS_OF_TILE(DECLARE)
    if (load) {
        ROWS_OF_TILE(FETCH)
    }
    if (shrink) {
        const vf s0 = v_load(shrink), s1 = nv > 1 ? v_load(shrink + LANES) : s0;
        ROWS_OF_TILE(SHRINK)
        (void)s1;
    }
    if (ASKS_WITHIN && near) {
        for (; kn > 0; kn -= near++->turns * (1 + odd)) {
            const char *line = near->at;
            const int64_t step = near->step;
            if (packs && packs->count > 0) pack_unit(packs, how == WORDS);
            for (int64_t turns = near->turns; turns > 0; turns--, line += step) {
                __builtin_prefetch(line);
                TURN
            }
        }
    } else {
        for (int64_t k = 0; k < kn; k += 1 + odd) {
            TURN
        }
    }
    if (end) c = end->out, ldc = end->ld;
    /* the rows' addresses are made anew: while the loop runs there is no room for them */
    __asm__("" : "+r"(c), "+r"(ldc));
    if (end && end->bias) {
        ROWS_OF_TILE(BIAS)
    }
    if (end && end->res) {
        ROWS_OF_TILE(RESIDUAL)
    }
    if (end && end->add_old) {
        ROWS_OF_TILE(OLD)
    }
    ROWS_OF_TILE(PUT)
#undef ADD
#undef DECLARE
#undef FETCH
#undef SHRINK
#undef STEP
#undef TURN
#undef PLUS
#undef BIAS
#undef RESIDUAL
#undef OLD
#undef PUT
}

typedef void (*micro_fn)(int64_t kn, const float *a, const float *b, float *c, int64_t ldc,
                         int64_t n, int load, const ask *near, units *packs, const ending *end);

#define MICRO_OF(name, mr, nv, columns, how, whole)                                                \
    static __attribute__((unused)) void name(int64_t kn, const float *a, const float *b, float *c, \
                                             int64_t ldc, int64_t n, int load, const ask *near,    \
                                             units *packs, const ending *end) {                    \
        (void)packs;                                                                               \
        (void)n;                                                                                   \
        micro_tile(mr, nv, how, kn, a, 1, mr, b, NR, c, ldc, columns, load, NULL, near,            \
                   (whole) ? packs : NULL, (how) == IN_TURN ? end : NULL);                         \
    }
#define MICRO(mr)                                                                                  \
    MICRO_OF(micro_##mr##_1, mr, 1, n, IN_TURN, 0)                                                 \
    MICRO_OF(micro_##mr##_2, mr, NR / LANES, n, IN_TURN, 0)                                        \
    MICRO_OF(micro_##mr##_3, mr, NR / LANES, NR, IN_TURN, (mr) == MR)                              \
    MICRO_OF(pairs_##mr##_1, mr, 1, n, PAIRS_HOW, 0)                                               \
    MICRO_OF(pairs_##mr##_2, mr, NR / LANES, n, PAIRS_HOW, 0)                                      \
    MICRO_OF(pairs_##mr##_3, mr, NR / LANES, NR, PAIRS_HOW, (mr) == MR)
/* as many rows as a tile may have */
#if MR > 6
#define TILES_OF_ROWS(X) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12)
#elif MR > 4
#define TILES_OF_ROWS(X) X(1) X(2) X(3) X(4) X(5) X(6)
#else
#define TILES_OF_ROWS(X) X(1) X(2) X(3) X(4)
#endif
TILES_OF_ROWS(MICRO)
#undef MICRO
#undef MICRO_OF

#define BOTH(mr)                                                                                   \
    {                                                                                              \
        {micro_##mr##_1, micro_##mr##_2, micro_##mr##_3},                                          \
        {pairs_##mr##_1, pairs_##mr##_2, pairs_##mr##_3},                                          \
    },
/* by rows, whether in pairs, and columns: at most a vector, more, all */
static const micro_fn micro[MR + 1][2][3] = {{{NULL}, {NULL}}, TILES_OF_ROWS(BOTH)};
#undef BOTH

#endif
