/* Initial weights: 16 Philox blocks at once give 64 normals. Words as in core/rng.h, Box-Muller in
 * f32. */
#include "kernels/init.h"

#include "core/rng.h"
#include "kernels/cpu/share.h"
#include "kernels/cpu/vec_math.h"

enum { ROUNDS = 10 };

typedef struct init_job {
    float *w;
    int64_t n;
    float mean, std;
    uint32_t keys[ROUNDS][2];
} init_job;

/* Lane 4 l + i works on block 4 i + l, so that the results come out in order (see interleave). */
static const uint32_t block_of_lane[LANES] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};

/* out[16 i + 4 l + k] = x_k[4 l + i] */
VINLINE void interleave(float *out, vf x0, vf x1, vf x2, vf x3) {
#if HS_VEC == 2
    __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(x0, x1)),
            b = _mm512_castps_pd(_mm512_unpackhi_ps(x0, x1));
    __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(x2, x3)),
            d = _mm512_castps_pd(_mm512_unpackhi_ps(x2, x3));
    _mm512_storeu_pd(out, _mm512_unpacklo_pd(a, c));
    _mm512_storeu_pd(out + 16, _mm512_unpackhi_pd(a, c));
    _mm512_storeu_pd(out + 32, _mm512_unpacklo_pd(b, d));
    _mm512_storeu_pd(out + 48, _mm512_unpackhi_pd(b, d));
#else
    float t[4][LANES];
    v_store(t[0], x0);
    v_store(t[1], x1);
    v_store(t[2], x2);
    v_store(t[3], x3);
    for (int i = 0; i < 4; i++)
        for (int l = 0; l < 4; l++)
            for (int k = 0; k < 4; k++) out[16 * i + 4 * l + k] = t[k][4 * l + i];
#endif
}

/* The two normals of the words (a, b): r cos, r sin. */
VINLINE void box_muller(vi a, vi b, vf *even, vf *odd) {
    /* u = (a + 1) 2^-32. Near 1, 1 - u = (2^32 - 1 - a) 2^-32 is taken from the integer, without
     * cancellation. */
    vf f, e, s, c;
    v_log_split(v_mul(v_from_u32(vi_add(a, vi_set1(1))), v_set1(0x1p-32f)), &f, &e);
    vf from_one = v_mul(v_from_u32(vi_xor(a, vi_set1(0xffffffffu))), v_set1(-0x1p-32f));
    vf far = v_from_u32(a), limit = v_set1(0x1.6a09e6p+31f); /* sqrt(1/2) 2^32 */
    f = v_select_lt(far, limit, f, from_one);
    e = v_select_lt(far, limit, e, v_zero());
    vf r = v_sqrt(v_mul(v_set1(-2.0f), v_log_core(f, e)));
    v_sincos_turn(b, &s, &c);
    *even = v_mul(r, c);
    *odd = v_mul(r, s);
}

/* The ten rounds over the counters quad + block_of_lane, of the keys in order (k0, k1 of each round). */
#if HS_VEC == 2
/* A product has 64 bits, so each vector is taken as its even and its odd lanes, in the low halves of pairs: what is in
 * the high halves no product reads. */
#define PHILOX_HALF(c0, c1, c2, c3, key)                                                           \
    do {                                                                                           \
        const vi a_ = _mm512_mul_epu32(c0, m0), b_ = _mm512_mul_epu32(c2, m1);                     \
        c0 = vi_xor(vi_xor(_mm512_srli_epi64(b_, 32), c1), vi_set1((key)[0]));                     \
        c2 = vi_xor(vi_xor(_mm512_srli_epi64(a_, 32), c3), vi_set1((key)[1]));                     \
        c1 = b_;                                                                                   \
        c3 = a_;                                                                                   \
    } while (0)

VINLINE vi philox_join(vi even, vi odd) {
    return _mm512_mask_shuffle_epi32(even, 0xaaaa, odd,
                                     (_MM_PERM_ENUM)0xa0); /* its lanes 0, 0, 2, 2 */
}

VINLINE void philox(uint64_t quad, const uint32_t keys[ROUNDS][2], vi x[4]) {
    const vi m0 = _mm512_set1_epi64(0xD2511F53), m1 = _mm512_set1_epi64(0xCD9E8D57);
    vi e0 = vi_add(vi_set1((uint32_t)quad), vi_load(block_of_lane)), o0 = _mm512_srli_epi64(e0, 32);
    vi e1 = vi_set1((uint32_t)(quad >> 32)), o1 = e1;
    vi e2 = vi_set1(0), o2 = e2, e3 = e2, o3 = e2;
    for (int round = 0; round < ROUNDS; round++) {
        PHILOX_HALF(e0, e1, e2, e3, keys[round]);
        PHILOX_HALF(o0, o1, o2, o3, keys[round]);
    }
    x[0] = philox_join(e0, o0);
    x[1] = philox_join(e1, o1);
    x[2] = philox_join(e2, o2);
    x[3] = philox_join(e3, o3);
}
#else
VINLINE void philox(uint64_t quad, const uint32_t keys[ROUNDS][2], vi x[4]) {
    x[0] = vi_add(vi_set1((uint32_t)quad), vi_load(block_of_lane));
    x[1] = vi_set1((uint32_t)(quad >> 32)), x[2] = x[3] = vi_set1(0);
    for (int round = 0; round < ROUNDS; round++) {
        vi ah, al, bh, bl;
        vi_mul_wide(x[0], 0xD2511F53u, &ah, &al);
        vi_mul_wide(x[2], 0xCD9E8D57u, &bh, &bl);
        x[0] = vi_xor(vi_xor(bh, x[1]), vi_set1(keys[round][0]));
        x[2] = vi_xor(vi_xor(ah, x[3]), vi_set1(keys[round][1]));
        x[1] = bl;
        x[3] = al;
    }
}
#endif

/* Elements 4 quad .. 4 quad + 63; quad is a multiple of 16, so its low half does not wrap inside. */
VINLINE void normals64(const init_job *j, uint64_t quad, float *out) {
    vi c[4];
    philox(quad, j->keys, c);
    vf x0, x1, x2, x3, mean = v_set1(j->mean), std = v_set1(j->std);
    box_muller(c[0], c[1], &x0, &x1);
    box_muller(c[2], c[3], &x2, &x3);
    interleave(out, v_fma(x0, std, mean), v_fma(x1, std, mean), v_fma(x2, std, mean),
               v_fma(x3, std, mean));
}

static void init_normal_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const init_job *j = ctx;
    (void)worker;
    begin *= SHARE_FLAT, end = hs_min(end * SHARE_FLAT, j->n);
    int64_t i = begin;
    for (; i + 64 <= end; i += 64) normals64(j, (uint64_t)i / 4, j->w + i);
    if (i < end) {
        float t[64];
        normals64(j, (uint64_t)i / 4, t);
        memcpy(j->w + i, t, (size_t)(end - i) * 4);
    }
}

static void init_normal_op(hs_kernel_ctx *ctx, hs_init_normal_args *a) {
    init_job j = {.w = a->w, .n = a->n, .mean = (float)a->mean, .std = (float)a->std};
    hs_rng_key key = hs_rng_make_key((uint64_t)a->SEED, (uint32_t)a->TENSOR, HS_RNG_USE_INIT);
    for (int round = 0; round < ROUNDS; round++) {
        j.keys[round][0] = key.k0, j.keys[round][1] = key.k1;
        key.k0 += 0x9E3779B9u;
        key.k1 += 0xBB67AE85u;
    }
    share_flat(ctx, j.n, init_normal_range, &j);
}

static void init_const_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const init_job *j = ctx;
    (void)worker;
    begin *= SHARE_FLAT, end = hs_min(end * SHARE_FLAT, j->n);
    for (int64_t i = begin; i < end; i += LANES) v_store_n(j->w + i, v_set1(j->mean), end - i);
}

static void init_const_op(hs_kernel_ctx *ctx, hs_init_const_args *a) {
    init_job j = {.w = a->w, .n = a->n, .mean = (float)a->value};
    share_flat(ctx, j.n, init_const_range, &j);
}
