/* One virtual vector of 16 f32 lanes, the same in all builds: a zmm, two ymm, four
 * NEON registers, or four of the compiler's own small vectors.
 *
 * Everything that the fast kernels compute is written with these functions, each of which is one
 * IEEE operation per lane (or integer arithmetic). That is why portable, AVX2, AVX-512 and NEON, gcc
 * and clang give the same bits: no operation here is approximate (no rcp, rsqrt), none is contracted
 * (-ffp-contract=off; fma only where v_fma is written), and sums across lanes have one fixed tree.
 *
 *   vf   16 x f32       vi   16 x u32       vd   16 x f64 (sums of squares)
 *
 * max and min follow x86: where a lane of either operand is NaN, the lane of the second is
 * returned, so write v_max(limit, x) for NaN to pass through. Tails: *_part touch n <= 16 elements;
 * the lanes beyond read as zero.
 */
#ifndef HS_KERNELS_CPU_VEC_H
#define HS_KERNELS_CPU_VEC_H

#include <stdint.h>
#include <string.h>

#include "wire/kernels.h"

#define HS_VEC_PATH_portable    0
#define HS_VEC_PATH_avx2        1
#define HS_VEC_PATH_avx512      2
#define HS_VEC_PATH_avx512_bf16 2
#define HS_VEC_PATH_neon        3
#define HS_VEC_CAT2(a, b)       a##b
#define HS_VEC_CAT(a, b)        HS_VEC_CAT2(a, b)
#ifndef HS_PATH
#error                                                                                             \
    "compile kernels/cpu/all.c with -DHS_PATH=portable, avx2, avx512, avx512_bf16 or neon (see its first comment)"
#endif
#define HS_VEC HS_VEC_CAT(HS_VEC_PATH_, HS_PATH)

#define VINLINE static inline __attribute__((always_inline, unused))
#define LANES   16

typedef uint16_t bf16;

VINLINE uint32_t f32_bits(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}

VINLINE float f32_from_bits(uint32_t u) {
    float x;
    memcpy(&x, &u, 4);
    return x;
}

VINLINE float bf16_widen(bf16 h) {
    return f32_from_bits((uint32_t)h << 16);
}

/* to nearest even; a NaN stays one (quiet, sign and upper payload kept) */
VINLINE bf16 bf16_round(float x) {
    uint32_t u = f32_bits(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (bf16)(u >> 16 | 0x40);
    return (bf16)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

/* -------------------- AVX-512 */
#if HS_VEC == 2

#include <immintrin.h>

typedef __m512 vf;
typedef __m512i vi;
typedef struct vd {
    __m512d a, b;
} vd;

VINLINE vf v_zero(void) {
    return _mm512_setzero_ps();
}
VINLINE vf v_set1(float x) {
    return _mm512_set1_ps(x);
}
VINLINE vf v_load(const float *p) {
    return _mm512_loadu_ps(p);
}
VINLINE void v_store(float *p, vf x) {
    _mm512_storeu_ps(p, x);
}
VINLINE __mmask16 first_lanes(int64_t n) {
    return (__mmask16)((1u << n) - 1u);
}
VINLINE vf v_load_part(const float *p, int64_t n) {
    return _mm512_maskz_loadu_ps(first_lanes(n), p);
}
VINLINE void v_store_part(float *p, vf x, int64_t n) {
    _mm512_mask_storeu_ps(p, first_lanes(n), x);
}
VINLINE vf v_add(vf a, vf b) {
    return _mm512_add_ps(a, b);
}
VINLINE vf v_sub(vf a, vf b) {
    return _mm512_sub_ps(a, b);
}
VINLINE vf v_mul(vf a, vf b) {
    return _mm512_mul_ps(a, b);
}
VINLINE vf v_div(vf a, vf b) {
    return _mm512_div_ps(a, b);
}
VINLINE vf v_fma(vf a, vf b, vf c) {
    return _mm512_fmadd_ps(a, b, c);
}
VINLINE vf v_fnma(vf a, vf b, vf c) {
    return _mm512_fnmadd_ps(a, b, c);
}
VINLINE vf v_sqrt(vf a) {
    return _mm512_sqrt_ps(a);
}
VINLINE vf v_max(vf a, vf b) {
    return _mm512_max_ps(a, b);
}
VINLINE vf v_min(vf a, vf b) {
    return _mm512_min_ps(a, b);
}
/* a < b ? x : y by lanes; y where unordered */
VINLINE vf v_select_lt(vf a, vf b, vf x, vf y) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
}
VINLINE vi v_bits(vf x) {
    return _mm512_castps_si512(x);
}
VINLINE vf v_from_bits(vi x) {
    return _mm512_castsi512_ps(x);
}
VINLINE vi vi_set1(uint32_t x) {
    return _mm512_set1_epi32((int)x);
}
VINLINE vi vi_load(const uint32_t *p) {
    return _mm512_loadu_si512(p);
}
VINLINE vi vi_add(vi a, vi b) {
    return _mm512_add_epi32(a, b);
}
VINLINE vi vi_sub(vi a, vi b) {
    return _mm512_sub_epi32(a, b);
}
VINLINE vi vi_and(vi a, vi b) {
    return _mm512_and_si512(a, b);
}
VINLINE vi vi_or(vi a, vi b) {
    return _mm512_or_si512(a, b);
}
VINLINE vi vi_xor(vi a, vi b) {
    return _mm512_xor_si512(a, b);
}
#define vi_shl(a, count) _mm512_slli_epi32(a, count)
#define vi_shr(a, count) _mm512_srli_epi32(a, count)
/* the two halves of the 64-bit products */
VINLINE void vi_mul_wide(vi a, uint32_t m, vi *high, vi *low) {
    vi mm = _mm512_set1_epi64((long long)m);
    vi even = _mm512_mul_epu32(a, mm);
    vi odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), mm);
    *low = _mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
    *high = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
}
VINLINE vi vi_load_bytes(const uint8_t *p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(const void *)p));
}
VINLINE void vi_store_bytes(uint8_t *p, vi x) {
    _mm_storeu_si128((__m128i *)(void *)p, _mm512_cvtepi32_epi8(x));
}
VINLINE vf v_load_bf16(const bf16 *p) {
    __m256i h = _mm256_loadu_si256((const __m256i *)(const void *)p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
VINLINE vf v_load_bf16_part(const bf16 *p, int64_t n) {
    __m256i h = _mm256_maskz_loadu_epi16(first_lanes(n), p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
VINLINE __m256i v_to_bf16(vf x) {
#if defined(__AVX512BF16__)
    /* the same, but that it flushes denormal numbers (class 0x20) */
    if (__builtin_expect(!_mm512_fpclass_ps_mask(x, 0x20), 1))
        return (__m256i)_mm512_cvtneps_pbh(x);
#endif
    vi u = v_bits(x);
    vi even = vi_and(vi_shr(u, 16), vi_set1(1));
    vi r = vi_shr(vi_add(u, vi_add(even, vi_set1(0x7fff))), 16);
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    r = _mm512_mask_mov_epi32(r, nan, vi_or(vi_shr(u, 16), vi_set1(0x40)));
    return _mm512_cvtepi32_epi16(r);
}
VINLINE void v_store_bf16(bf16 *p, vf x) {
    _mm256_storeu_si256((__m256i *)(void *)p, v_to_bf16(x));
}
VINLINE void v_stream_bf16(bf16 *p, vf low, vf high) {
    _mm512_stream_si512(
        (void *)p, _mm512_inserti64x4(_mm512_castsi256_si512(v_to_bf16(low)), v_to_bf16(high), 1));
}
VINLINE void v_store_bf16_part(bf16 *p, vf x, int64_t n) {
    __m256i h = v_to_bf16(x);
    /* clang 22 makes one narrowing store of both; with a mask of one lane that writes 4 bytes */
    __asm__("" : "+v"(h));
    _mm256_mask_storeu_epi16(p, first_lanes(n), h);
}
/* lanes joined by the tree 8, 4, 2, 1 */
VINLINE float v_sum(vf x) {
    __m256 y = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    __m128 z = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    z = _mm_add_ps(z, _mm_movehl_ps(z, z));
    z = _mm_add_ss(z, _mm_shuffle_ps(z, z, 1));
    return _mm_cvtss_f32(z);
}
VINLINE vd vd_zero(void) {
    return (vd){_mm512_setzero_pd(), _mm512_setzero_pd()};
}
/* s + x * x by lanes, in double, where the product is exact */
VINLINE vd vd_add_square(vd s, vf x) {
    __m512d a = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
    __m512d b = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
    return (vd){_mm512_fmadd_pd(a, a, s.a), _mm512_fmadd_pd(b, b, s.b)};
}
VINLINE void vd_store(double *p, vd x) {
    _mm512_storeu_pd(p, x.a);
    _mm512_storeu_pd(p + 8, x.b);
}

/* -------------------- AVX2 */
#elif HS_VEC == 1

#include <immintrin.h>

typedef struct vf {
    __m256 a, b;
} vf;
typedef struct vi {
    __m256i a, b;
} vi;
typedef struct vd {
    __m256d a, b, c, d;
} vd;

#define EACH(T, expr_a, expr_b)                                                                    \
    return (T) {                                                                                   \
        expr_a, expr_b                                                                             \
    }
VINLINE vf v_zero(void) {
    EACH(vf, _mm256_setzero_ps(), _mm256_setzero_ps());
}
VINLINE vf v_set1(float x) {
    EACH(vf, _mm256_set1_ps(x), _mm256_set1_ps(x));
}
VINLINE vf v_load(const float *p) {
    EACH(vf, _mm256_loadu_ps(p), _mm256_loadu_ps(p + 8));
}
VINLINE void v_store(float *p, vf x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
VINLINE vf v_add(vf x, vf y) {
    EACH(vf, _mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b));
}
VINLINE vf v_sub(vf x, vf y) {
    EACH(vf, _mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b));
}
VINLINE vf v_mul(vf x, vf y) {
    EACH(vf, _mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b));
}
VINLINE vf v_div(vf x, vf y) {
    EACH(vf, _mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b));
}
VINLINE vf v_fma(vf x, vf y, vf z) {
    EACH(vf, _mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b));
}
VINLINE vf v_fnma(vf x, vf y, vf z) {
    EACH(vf, _mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b));
}
VINLINE vf v_sqrt(vf x) {
    EACH(vf, _mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b));
}
VINLINE vf v_max(vf x, vf y) {
    EACH(vf, _mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b));
}
VINLINE vf v_min(vf x, vf y) {
    EACH(vf, _mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b));
}
VINLINE vf v_select_lt(vf a, vf b, vf x, vf y) {
    EACH(vf, _mm256_blendv_ps(y.a, x.a, _mm256_cmp_ps(a.a, b.a, _CMP_LT_OQ)),
         _mm256_blendv_ps(y.b, x.b, _mm256_cmp_ps(a.b, b.b, _CMP_LT_OQ)));
}
VINLINE vi v_bits(vf x) {
    EACH(vi, _mm256_castps_si256(x.a), _mm256_castps_si256(x.b));
}
VINLINE vf v_from_bits(vi x) {
    EACH(vf, _mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b));
}
VINLINE vi vi_set1(uint32_t x) {
    EACH(vi, _mm256_set1_epi32((int)x), _mm256_set1_epi32((int)x));
}
VINLINE vi vi_load(const uint32_t *p) {
    EACH(vi, _mm256_loadu_si256((const __m256i *)(const void *)p),
         _mm256_loadu_si256((const __m256i *)(const void *)(p + 8)));
}
VINLINE vi vi_add(vi x, vi y) {
    EACH(vi, _mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b));
}
VINLINE vi vi_sub(vi x, vi y) {
    EACH(vi, _mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b));
}
VINLINE vi vi_and(vi x, vi y) {
    EACH(vi, _mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b));
}
VINLINE vi vi_or(vi x, vi y) {
    EACH(vi, _mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b));
}
VINLINE vi vi_xor(vi x, vi y) {
    EACH(vi, _mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b));
}
#define vi_shl(x, count) ((vi){_mm256_slli_epi32((x).a, count), _mm256_slli_epi32((x).b, count)})
#define vi_shr(x, count) ((vi){_mm256_srli_epi32((x).a, count), _mm256_srli_epi32((x).b, count)})
VINLINE void half_mul_wide(__m256i a, __m256i m, __m256i *high, __m256i *low) {
    __m256i even = _mm256_mul_epu32(a, m);
    __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), m);
    *low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
    *high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
}
VINLINE void vi_mul_wide(vi a, uint32_t m, vi *high, vi *low) {
    __m256i mm = _mm256_set1_epi64x((long long)m);
    half_mul_wide(a.a, mm, &high->a, &low->a);
    half_mul_wide(a.b, mm, &high->b, &low->b);
}
VINLINE vi vi_load_bytes(const uint8_t *p) {
    __m128i b = _mm_loadu_si128((const __m128i *)(const void *)p);
    EACH(vi, _mm256_cvtepu8_epi32(b), _mm256_cvtepu8_epi32(_mm_srli_si128(b, 8)));
}
VINLINE void vi_store_bytes(uint8_t *p, vi x) {
    __m256i mask = _mm256_set1_epi32(0xff);
    __m256i h = _mm256_packus_epi32(_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask));
    h = _mm256_permute4x64_epi64(h, 0xd8);
    _mm_storeu_si128((__m128i *)(void *)p,
                     _mm_packus_epi16(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1)));
}
VINLINE __m256 half_load_bf16(const bf16 *p) {
    __m128i h = _mm_loadu_si128((const __m128i *)(const void *)p);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
VINLINE vf v_load_bf16(const bf16 *p) {
    EACH(vf, half_load_bf16(p), half_load_bf16(p + 8));
}
VINLINE __m256i half_to_bf16(__m256 x) {
    __m256i u = _mm256_castps_si256(x), top = _mm256_srli_epi32(u, 16);
    __m256i even = _mm256_and_si256(top, _mm256_set1_epi32(1));
    __m256i r = _mm256_add_epi32(u, _mm256_add_epi32(even, _mm256_set1_epi32(0x7fff)));
    r = _mm256_srli_epi32(r, 16);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(r, _mm256_or_si256(top, _mm256_set1_epi32(0x40)), nan);
}
VINLINE __m256i v_to_bf16(vf x) {
    __m256i packed = _mm256_packus_epi32(half_to_bf16(x.a), half_to_bf16(x.b));
    return _mm256_permute4x64_epi64(packed, 0xd8);
}
VINLINE void v_store_bf16(bf16 *p, vf x) {
    _mm256_storeu_si256((__m256i *)(void *)p, v_to_bf16(x));
}
VINLINE void v_stream_bf16(bf16 *p, vf low, vf high) {
    _mm256_stream_si256((__m256i *)(void *)p, v_to_bf16(low));
    _mm256_stream_si256((__m256i *)(void *)(p + 16), v_to_bf16(high));
}
VINLINE float v_sum(vf x) {
    __m256 y = _mm256_add_ps(x.a, x.b);
    __m128 z = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    z = _mm_add_ps(z, _mm_movehl_ps(z, z));
    z = _mm_add_ss(z, _mm_shuffle_ps(z, z, 1));
    return _mm_cvtss_f32(z);
}
VINLINE vd vd_zero(void) {
    __m256d z = _mm256_setzero_pd();
    return (vd){z, z, z, z};
}
VINLINE __m256d quarter_add_square(__m256d s, __m128 x) {
    __m256d w = _mm256_cvtps_pd(x);
    return _mm256_fmadd_pd(w, w, s);
}
VINLINE vd vd_add_square(vd s, vf x) {
    return (vd){quarter_add_square(s.a, _mm256_castps256_ps128(x.a)),
                quarter_add_square(s.b, _mm256_extractf128_ps(x.a, 1)),
                quarter_add_square(s.c, _mm256_castps256_ps128(x.b)),
                quarter_add_square(s.d, _mm256_extractf128_ps(x.b, 1))};
}
VINLINE void vd_store(double *p, vd x) {
    _mm256_storeu_pd(p, x.a);
    _mm256_storeu_pd(p + 4, x.b);
    _mm256_storeu_pd(p + 8, x.c);
    _mm256_storeu_pd(p + 12, x.d);
}
#undef EACH

/* -------------------- NEON */
#elif HS_VEC == 3

#include <arm_neon.h>

typedef struct vf {
    float32x4_t a, b, c, d;
} vf;
typedef struct vi {
    uint32x4_t a, b, c, d;
} vi;
typedef struct vd {
    float64x2_t q[8];
} vd;

#define EACH(T, f, ...)                                                                            \
    return (T) {                                                                                   \
        f(a, __VA_ARGS__), f(b, __VA_ARGS__), f(c, __VA_ARGS__), f(d, __VA_ARGS__)                 \
    }
#define ONE(at, f, x)         f((x).at)
#define TWO(at, f, x, y)      f((x).at, (y).at)
#define THREE(at, f, x, y, z) f((x).at, (y).at, (z).at)
VINLINE vf v_set1(float x) {
    float32x4_t s = vdupq_n_f32(x);
    return (vf){s, s, s, s};
}
VINLINE vf v_zero(void) {
    return v_set1(0);
}
VINLINE vf v_load(const float *p) {
    return (vf){vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)};
}
VINLINE void v_store(float *p, vf x) {
    vst1q_f32(p, x.a);
    vst1q_f32(p + 4, x.b);
    vst1q_f32(p + 8, x.c);
    vst1q_f32(p + 12, x.d);
}
VINLINE vf v_add(vf x, vf y) {
    EACH(vf, TWO, vaddq_f32, x, y);
}
VINLINE vf v_sub(vf x, vf y) {
    EACH(vf, TWO, vsubq_f32, x, y);
}
VINLINE vf v_mul(vf x, vf y) {
    EACH(vf, TWO, vmulq_f32, x, y);
}
VINLINE vf v_div(vf x, vf y) {
    EACH(vf, TWO, vdivq_f32, x, y);
}
/* the addend comes first */
VINLINE vf v_fma(vf x, vf y, vf z) {
    EACH(vf, THREE, vfmaq_f32, z, x, y);
}
VINLINE vf v_fnma(vf x, vf y, vf z) {
    EACH(vf, THREE, vfmsq_f32, z, x, y);
}
VINLINE vf v_sqrt(vf x) {
    EACH(vf, ONE, vsqrtq_f32, x);
}
/* FMAX and FMIN treat NaN and the two zeros otherwise than x86 does */
#define PICK_MAX(x, y)        vbslq_f32(vcgtq_f32(x, y), x, y)
#define PICK_MIN(x, y)        vbslq_f32(vcltq_f32(x, y), x, y)
VINLINE vf v_max(vf x, vf y) {
    EACH(vf, TWO, PICK_MAX, x, y);
}
VINLINE vf v_min(vf x, vf y) {
    EACH(vf, TWO, PICK_MIN, x, y);
}
#undef PICK_MAX
#undef PICK_MIN
VINLINE vf v_select_lt(vf a, vf b, vf x, vf y) {
    return (vf){vbslq_f32(vcltq_f32(a.a, b.a), x.a, y.a), vbslq_f32(vcltq_f32(a.b, b.b), x.b, y.b),
                vbslq_f32(vcltq_f32(a.c, b.c), x.c, y.c), vbslq_f32(vcltq_f32(a.d, b.d), x.d, y.d)};
}
VINLINE vi v_bits(vf x) {
    EACH(vi, ONE, vreinterpretq_u32_f32, x);
}
VINLINE vf v_from_bits(vi x) {
    EACH(vf, ONE, vreinterpretq_f32_u32, x);
}
VINLINE vi vi_set1(uint32_t x) {
    uint32x4_t s = vdupq_n_u32(x);
    return (vi){s, s, s, s};
}
VINLINE vi vi_load(const uint32_t *p) {
    return (vi){vld1q_u32(p), vld1q_u32(p + 4), vld1q_u32(p + 8), vld1q_u32(p + 12)};
}
VINLINE vi vi_add(vi x, vi y) {
    EACH(vi, TWO, vaddq_u32, x, y);
}
VINLINE vi vi_sub(vi x, vi y) {
    EACH(vi, TWO, vsubq_u32, x, y);
}
VINLINE vi vi_and(vi x, vi y) {
    EACH(vi, TWO, vandq_u32, x, y);
}
VINLINE vi vi_or(vi x, vi y) {
    EACH(vi, TWO, vorrq_u32, x, y);
}
VINLINE vi vi_xor(vi x, vi y) {
    EACH(vi, TWO, veorq_u32, x, y);
}
VINLINE vi vi_shl(vi x, int count) {
    return (vi){x.a << (uint32_t)count, x.b << (uint32_t)count, x.c << (uint32_t)count,
                x.d << (uint32_t)count};
}
VINLINE vi vi_shr(vi x, int count) {
    return (vi){x.a >> (uint32_t)count, x.b >> (uint32_t)count, x.c >> (uint32_t)count,
                x.d >> (uint32_t)count};
}
VINLINE void quarter_mul_wide(uint32x4_t x, uint32x2_t m, uint32x4_t *high, uint32x4_t *low) {
    uint32x4_t p = vreinterpretq_u32_u64(vmull_u32(vget_low_u32(x), m));
    uint32x4_t q = vreinterpretq_u32_u64(vmull_u32(vget_high_u32(x), m));
    *low = vuzp1q_u32(p, q);
    *high = vuzp2q_u32(p, q);
}
VINLINE void vi_mul_wide(vi x, uint32_t m, vi *high, vi *low) {
    uint32x2_t mm = vdup_n_u32(m);
    quarter_mul_wide(x.a, mm, &high->a, &low->a);
    quarter_mul_wide(x.b, mm, &high->b, &low->b);
    quarter_mul_wide(x.c, mm, &high->c, &low->c);
    quarter_mul_wide(x.d, mm, &high->d, &low->d);
}
VINLINE vi vi_load_bytes(const uint8_t *p) {
    uint8x16_t bytes = vld1q_u8(p);
    uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_u8(vget_high_u8(bytes));
    return (vi){vmovl_u16(vget_low_u16(low)), vmovl_u16(vget_high_u16(low)),
                vmovl_u16(vget_low_u16(high)), vmovl_u16(vget_high_u16(high))};
}
VINLINE void vi_store_bytes(uint8_t *p, vi x) {
    uint16x8_t low = vcombine_u16(vmovn_u32(x.a), vmovn_u32(x.b));
    uint16x8_t high = vcombine_u16(vmovn_u32(x.c), vmovn_u32(x.d));
    vst1q_u8(p, vcombine_u8(vmovn_u16(low), vmovn_u16(high)));
}
VINLINE vf v_load_bf16(const bf16 *p) {
    uint16x8_t low = vld1q_u16(p), high = vld1q_u16(p + 8);
    return v_from_bits((vi){vshll_n_u16(vget_low_u16(low), 16), vshll_n_u16(vget_high_u16(low), 16),
                            vshll_n_u16(vget_low_u16(high), 16),
                            vshll_n_u16(vget_high_u16(high), 16)});
}
VINLINE uint16x4_t quarter_to_bf16(float32x4_t x) {
    uint32x4_t u = vreinterpretq_u32_f32(x), top = vshrq_n_u32(u, 16);
    uint32x4_t even = vandq_u32(top, vdupq_n_u32(1));
    uint32x4_t r = vshrq_n_u32(vaddq_u32(u, vaddq_u32(even, vdupq_n_u32(0x7fff))), 16);
    return vmovn_u32(vbslq_u32(vceqq_f32(x, x), r, vorrq_u32(top, vdupq_n_u32(0x40))));
}
VINLINE void v_store_bf16(bf16 *p, vf x) {
    vst1q_u16(p, vcombine_u16(quarter_to_bf16(x.a), quarter_to_bf16(x.b)));
    vst1q_u16(p + 8, vcombine_u16(quarter_to_bf16(x.c), quarter_to_bf16(x.d)));
}
VINLINE float v_sum(vf x) {
    float32x4_t s = vaddq_f32(vaddq_f32(x.a, x.c), vaddq_f32(x.b, x.d));
    float32x2_t t = vadd_f32(vget_low_f32(s), vget_high_f32(s));
    return vget_lane_f32(t, 0) + vget_lane_f32(t, 1);
}
VINLINE vd vd_zero(void) {
    float64x2_t z = vdupq_n_f64(0);
    return (vd){{z, z, z, z, z, z, z, z}};
}
VINLINE void quarter_add_square(float64x2_t s[2], float32x4_t x) {
    float64x2_t low = vcvt_f64_f32(vget_low_f32(x)), high = vcvt_high_f64_f32(x);
    s[0] = vfmaq_f64(s[0], low, low);
    s[1] = vfmaq_f64(s[1], high, high);
}
VINLINE vd vd_add_square(vd s, vf x) {
    quarter_add_square(s.q, x.a);
    quarter_add_square(s.q + 2, x.b);
    quarter_add_square(s.q + 4, x.c);
    quarter_add_square(s.q + 6, x.d);
    return s;
}
VINLINE void vd_store(double *p, vd x) {
    for (int i = 0; i < 8; i++) vst1q_f64(p + 2 * i, x.q[i]);
}
#undef EACH
#undef ONE
#undef TWO
#undef THREE

/* -------------------- portable */
#else

#include <math.h>

/* Four of the small vectors that gcc and clang compile for any target. */
typedef float f4 __attribute__((vector_size(16)));
typedef uint32_t u4 __attribute__((vector_size(16)));
typedef int32_t i4 __attribute__((vector_size(16)));
typedef struct vf {
    f4 q[4];
} vf;
typedef struct vi {
    u4 q[4];
} vi;
typedef struct vd {
    double d[16];
} vd;

#define EACH(T, at)                                                                                \
    return (T) {                                                                                   \
        { at(0), at(1), at(2), at(3) }                                                             \
    }

VINLINE vf v_set1(float x) {
    f4 s = {x, x, x, x};
    return (vf){{s, s, s, s}};
}
VINLINE vf v_zero(void) {
    return v_set1(0);
}
VINLINE vf v_load(const float *p) {
    vf r;
    memcpy(&r, p, sizeof r);
    return r;
}
VINLINE void v_store(float *p, vf x) {
    memcpy(p, &x, sizeof x);
}
#define AT(i) x.q[i] + y.q[i]
VINLINE vf v_add(vf x, vf y) {
    EACH(vf, AT);
}
VINLINE vi vi_add(vi x, vi y) {
    EACH(vi, AT);
}
#undef AT
#define AT(i) x.q[i] - y.q[i]
VINLINE vf v_sub(vf x, vf y) {
    EACH(vf, AT);
}
VINLINE vi vi_sub(vi x, vi y) {
    EACH(vi, AT);
}
#undef AT
#define AT(i) x.q[i] * y.q[i]
VINLINE vf v_mul(vf x, vf y) {
    EACH(vf, AT);
}
#undef AT
#define AT(i) x.q[i] / y.q[i]
VINLINE vf v_div(vf x, vf y) {
    EACH(vf, AT);
}
#undef AT
#define AT(i) x.q[i] & y.q[i]
VINLINE vi vi_and(vi x, vi y) {
    EACH(vi, AT);
}
#undef AT
#define AT(i) x.q[i] | y.q[i]
VINLINE vi vi_or(vi x, vi y) {
    EACH(vi, AT);
}
#undef AT
#define AT(i) x.q[i] ^ y.q[i]
VINLINE vi vi_xor(vi x, vi y) {
    EACH(vi, AT);
}
#undef AT
#define AT(i) x.q[i] << (uint32_t)count
VINLINE vi vi_shl(vi x, int count) {
    EACH(vi, AT);
}
#undef AT
#define AT(i) x.q[i] >> (uint32_t)count
VINLINE vi vi_shr(vi x, int count) {
    EACH(vi, AT);
}
#undef AT

/* acc = fma(a, b, c), in a function of its own where it is long */
#if defined(__FP_FAST_FMAF) || defined(__FMA__) || defined(__aarch64__)
VINLINE vf v_fma(vf x, vf y, vf z) {
    for (int j = 0; j < 4; j++)
        for (int i = 0; i < 4; i++) z.q[j][i] = __builtin_fmaf(x.q[j][i], y.q[j][i], z.q[j][i]);
    return z;
}
#else
/* The target has no instruction for it. The product of two f32 is exact in f64; the sum is made f64
 * rounded to odd, from the exact error e of the addition, and rounding that to f32 is then the one
 * correct rounding. To odd: an inexact sum with an even last bit moves towards its error, up in
 * magnitude where the error has the sign of the sum. e is NaN where the sum is not finite: no
 * comparison holds and the sum stays. */
typedef double d2 __attribute__((vector_size(16)));
typedef int64_t l2 __attribute__((vector_size(16)));
VINLINE d2 fma_to_odd(d2 a, d2 b, d2 x) {
    const d2 zero = {0, 0};
    const l2 one = {1, 1};
    d2 p = a * b, s = p + x, t = s - p, e = (p - (s - t)) + (x - t);
    l2 positive = (l2)(e > zero), inexact = positive | (l2)(e < zero);
    l2 against = positive ^ (l2)(s > zero), bits = (l2)s, step = inexact & ~bits & one;
    return (d2)(bits + ((step ^ against) - against));
}
static __attribute__((noinline)) void fma16(vf *acc, const vf *x, const vf *y) {
    for (int j = 0; j < 4; j++) {
        f4 a = x->q[j], b = y->q[j], c = acc->q[j];
        d2 low = fma_to_odd((d2){(double)a[0], (double)a[1]}, (d2){(double)b[0], (double)b[1]},
                            (d2){(double)c[0], (double)c[1]});
        d2 high = fma_to_odd((d2){(double)a[2], (double)a[3]}, (d2){(double)b[2], (double)b[3]},
                             (d2){(double)c[2], (double)c[3]});
        acc->q[j] = (f4){(float)low[0], (float)low[1], (float)high[0], (float)high[1]};
    }
}
VINLINE vf v_fma(vf x, vf y, vf z) {
    fma16(&z, &x, &y);
    return z;
}
#endif
#define AT(i) -x.q[i]
VINLINE vf v_negative(vf x) {
    EACH(vf, AT);
}
#undef AT
VINLINE vf v_fnma(vf x, vf y, vf z) {
    return v_fma(v_negative(x), y, z);
}
VINLINE vf v_sqrt(vf x) {
    float t[16];
    v_store(t, x);
    for (int i = 0; i < 16; i++) t[i] = sqrtf(t[i]);
    return v_load(t);
}
VINLINE f4 pick4(i4 m, f4 x, f4 y) {
    return (f4)((m & (i4)x) | (~m & (i4)y));
}
#define AT(i) pick4((i4)(x.q[i] > y.q[i]), x.q[i], y.q[i])
VINLINE vf v_max(vf x, vf y) {
    EACH(vf, AT);
}
#undef AT
#define AT(i) pick4((i4)(x.q[i] < y.q[i]), x.q[i], y.q[i])
VINLINE vf v_min(vf x, vf y) {
    EACH(vf, AT);
}
#undef AT
#define AT(i) pick4((i4)(a.q[i] < b.q[i]), x.q[i], y.q[i])
VINLINE vf v_select_lt(vf a, vf b, vf x, vf y) {
    EACH(vf, AT);
}
#undef AT
#define AT(i) (u4) x.q[i]
VINLINE vi v_bits(vf x) {
    EACH(vi, AT);
}
#undef AT
#define AT(i) (f4) x.q[i]
VINLINE vf v_from_bits(vi x) {
    EACH(vf, AT);
}
#undef AT
VINLINE vi vi_set1(uint32_t x) {
    u4 s = {x, x, x, x};
    return (vi){{s, s, s, s}};
}
VINLINE vi vi_load(const uint32_t *p) {
    vi r;
    memcpy(&r, p, sizeof r);
    return r;
}
VINLINE vi vi_load_bytes(const uint8_t *p) {
    uint32_t t[16];
    for (int i = 0; i < 16; i++) t[i] = p[i];
    return vi_load(t);
}
VINLINE void vi_store_bytes(uint8_t *p, vi x) {
    uint32_t t[16];
    memcpy(t, &x, sizeof t);
    for (int i = 0; i < 16; i++) p[i] = (uint8_t)t[i];
}
VINLINE void vi_mul_wide(vi a, uint32_t m, vi *high, vi *low) {
    uint32_t x[16], h[16];
    memcpy(x, &a, sizeof x);
    for (int i = 0; i < 16; i++) {
        uint64_t p = (uint64_t)x[i] * m;
        h[i] = (uint32_t)(p >> 32);
        x[i] = (uint32_t)p;
    }
    *high = vi_load(h);
    *low = vi_load(x);
}
VINLINE vf v_load_bf16(const bf16 *p) {
    float t[16];
    for (int i = 0; i < 16; i++) t[i] = bf16_widen(p[i]);
    return v_load(t);
}
VINLINE void v_store_bf16(bf16 *p, vf x) {
    float t[16];
    v_store(t, x);
    for (int i = 0; i < 16; i++) p[i] = bf16_round(t[i]);
}
VINLINE float v_sum(vf x) {
    f4 s = (x.q[0] + x.q[2]) + (x.q[1] + x.q[3]);
    return (s[0] + s[2]) + (s[1] + s[3]);
}
VINLINE vd vd_zero(void) {
    return (vd){{0}};
}
VINLINE vd vd_add_square(vd s, vf x) {
    float t[16];
    v_store(t, x);
    for (int i = 0; i < 16; i++) s.d[i] = s.d[i] + (double)t[i] * (double)t[i];
    return s;
}
VINLINE void vd_store(double *p, vd x) {
    memcpy(p, &x, sizeof x);
}
#undef EACH

#endif

/* -------------------- without masks, a part goes through a copy */
#if HS_VEC != 2
VINLINE vf v_load_part(const float *p, int64_t n) {
    float t[16] = {0};
    memcpy(t, p, (size_t)n * 4);
    return v_load(t);
}
VINLINE void v_store_part(float *p, vf x, int64_t n) {
    float t[16];
    v_store(t, x);
    memcpy(p, t, (size_t)n * 4);
}
VINLINE vf v_load_bf16_part(const bf16 *p, int64_t n) {
    bf16 t[16] = {0};
    memcpy(t, p, (size_t)n * 2);
    return v_load_bf16(t);
}
VINLINE void v_store_bf16_part(bf16 *p, vf x, int64_t n) {
    bf16 t[16];
    v_store_bf16(t, x);
    memcpy(p, t, (size_t)n * 2);
}
#endif

/* -------------------- all builds */

/* Stores of 32 bf16 to a line of 64 bytes past the caches, and what follows the last of them, before others read. */
#if HS_VEC == 1 || HS_VEC == 2
VINLINE void v_streamed(void) {
    _mm_sfence();
}
#else
VINLINE void v_stream_bf16(bf16 *p, vf low, vf high) {
    v_store_bf16(p, low);
    v_store_bf16(p + LANES, high);
}
VINLINE void v_streamed(void) {}
#endif

/* Loads and stores by element type. dt is a constant wherever these are inlined (see BY_DTYPE). */
VINLINE vf v_load_dt(const void *p, int64_t at, int dt) {
    return dt == HS_BF16 ? v_load_bf16((const bf16 *)p + at) : v_load((const float *)p + at);
}
VINLINE vf v_load_dt_n(const void *p, int64_t at, int64_t n, int dt) {
    if (n >= LANES) return v_load_dt(p, at, dt);
    return dt == HS_BF16 ? v_load_bf16_part((const bf16 *)p + at, n)
                         : v_load_part((const float *)p + at, n);
}
VINLINE void v_store_dt(void *p, int64_t at, vf x, int dt) {
    if (dt == HS_BF16)
        v_store_bf16((bf16 *)p + at, x);
    else
        v_store((float *)p + at, x);
}
VINLINE void v_store_dt_n(void *p, int64_t at, vf x, int64_t n, int dt) {
    if (n >= LANES)
        v_store_dt(p, at, x, dt);
    else if (dt == HS_BF16)
        v_store_bf16_part((bf16 *)p + at, x, n);
    else
        v_store_part((float *)p + at, x, n);
}
VINLINE vf v_load_n(const float *p, int64_t n) {
    return n >= LANES ? v_load(p) : v_load_part(p, n);
}
VINLINE void v_store_n(float *p, vf x, int64_t n) {
    if (n >= LANES)
        v_store(p, x);
    else
        v_store_part(p, x, n);
}
VINLINE float load1_dt(const void *p, int64_t at, int dt) {
    return dt == HS_BF16 ? bf16_widen(((const bf16 *)p)[at]) : ((const float *)p)[at];
}
VINLINE int64_t dt_size(int dt) {
    return dt == HS_BF16 ? 2 : 4;
}

/* n bytes, 16 at most, one in each lane; the others read as 0. */
VINLINE vi vi_load_bytes_n(const uint8_t *p, int64_t n) {
    uint8_t t[16] = {0};
    if (n >= LANES) return vi_load_bytes(p);
    memcpy(t, p, (size_t)n);
    return vi_load_bytes(t);
}
/* The low bytes of the first n lanes. */
VINLINE void vi_store_bytes_n(uint8_t *p, vi x, int64_t n) {
    uint8_t t[16];
    if (n >= LANES) {
        vi_store_bytes(p, x);
        return;
    }
    vi_store_bytes(t, x);
    memcpy(p, t, (size_t)n);
}

/* Zero in the lanes from n on: keeps padding out of sums. */
VINLINE vf v_keep(vf x, int64_t n) {
    static const float index[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return n >= LANES ? x : v_select_lt(v_load(index), v_set1((float)n), x, v_zero());
}

/* first, first + 1, ... : exact while below 2^24 */
VINLINE vf v_count_from(float first) {
    static const float index[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return v_add(v_set1(first), v_load(index));
}

VINLINE float v_max_lanes(vf x) {
    float t[16];
    v_store(t, x);
    for (int step = 8; step; step /= 2)
        for (int i = 0; i < step; i++) t[i] = t[i] > t[i + step] ? t[i] : t[i + step];
    return t[0];
}

/* Calls body(..., dt) twice in the source, once in the machine, so that dt is a constant in each
 * copy. */
#define BY_DTYPE(dt, body, ...)                                                                    \
    do {                                                                                           \
        if ((dt) == HS_BF16)                                                                       \
            body(__VA_ARGS__, HS_BF16);                                                            \
        else                                                                                       \
            body(__VA_ARGS__, HS_F32);                                                             \
    } while (0)

#endif
